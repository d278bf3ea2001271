"""Finds what makes the targets, and what pairs noise with data, in any object."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import Tensor, nn

from stagewise.adapters.base import Place, TargetMaker, unwrapped
from stagewise.adapters.diffusers import NoiseScheduler
from stagewise.adapters.edm import EDMLoss
from stagewise.adapters.flow_matching import FlowMatching
from stagewise.adapters.objective import Objective
from stagewise.adapters.repa import REPALoss
from stagewise.adapters.stage_target import ByHand
from stagewise.adapters.torchcfm import TorchCFM
from stagewise.adapters.transport import Transport
from stagewise.conventions import CONVENTIONS, DIFFUSERS, STAGEWISE, Convention, path_of
from stagewise.paths import LinearPath, Path, same_path
from stagewise.stage_target import BY_HAND

__all__ = [
    "assumed_makers",
    "chosen_makers",
    "dependent_noise",
    "find_couplings",
    "find_target_makers",
    "one_target_maker",
    "training_path",
]

_KINDS = (Objective, ByHand, TorchCFM, FlowMatching, Transport, EDMLoss, REPALoss, NoiseScheduler)
"""All makers that are known. Another library is a file of this folder and an entry here."""

_LEAVES = (
    *(Tensor, str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType),
    *(types.MethodType, types.BuiltinFunctionType),
)
_ELSEWHERE = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
"""Packages whose objects hold no user's target, apart from the modules they nest."""

_NOT_OURS = ("_trainer", "trainer", "_fabric", "fabric", "_hparams_initial")
"""Attributes of a LightningModule that lead out of it, or hold copies."""


def find_target_makers(module: object) -> list[TargetMaker]:
    """All that makes targets in an object, by looking through its attributes.

    Nested modules, lists, tuples and dicts are looked through too. An object found in two places
    is one. Noise must not depend on data: beside a sampler of couplings (`find_couplings`) no maker
    can be steered.

    Args:
        module: A module, or any object; it may be the maker itself.

    Returns:
        The makers in the order of the attributes, those that cannot be steered included. The
        scheduler of diffusers only if there is nothing else: beside what makes targets it is there
        to sample.
    """
    return _training(_found(module)[0])


def chosen_makers(module: object, names: Set[str]) -> list[TargetMaker]:
    """Those of `find_target_makers`, or those with some names; refuses a name of none."""
    found = find_target_makers(module)
    if not names:
        return found
    found += [one_target_maker(module, at) for at in names - {maker.name for maker in found}]
    return [maker for maker in found if maker.name in names]


def find_couplings(module: object) -> list[Place]:
    """All that pairs noise with data, in an object, by looking through its attributes.

    Known by their interface are torchcfm's `OTPlanSampler` (`sample_plan`) and what has both
    `get_map` and `sample_map`; a bound method of one counts too. Coupling by hand, in the training
    step or where data are loaded, cannot be found so (`stagewise.noise.check_independent`).

    Args:
        module: As for `find_target_makers`.

    Returns:
        Where they are, except for those inside of a maker, which concern that one only.
    """
    return _found(module)[1]


def dependent_noise(makers: Sequence[TargetMaker], couplings: Sequence[Place]) -> str:
    """What pairs noise with data among what was found, with the reason; empty if nothing does."""
    found = next((f"{maker.name}: {maker.refusal}" for maker in makers if maker.coupled), "")
    return found or (_pairs(couplings[0]) if couplings else "")


def training_path(makers: Sequence[TargetMaker], *, said: bool = False) -> tuple[Path, str]:
    """The path that targets are made on, `LinearPath()` if nothing makes them.

    Args:
        makers: What `find_target_makers` found, or those of it that the user chose.
        said: Whether the user says the path, so that several may be there.

    Returns:
        The path, and where it is from; that is empty if nothing makes targets.

    Raises:
        ValueError: If there are several paths and nobody says which one counts.
    """
    able = [maker for maker in makers if not maker.refusal] or makers
    if not able:
        return LinearPath(), ""
    if not said and any(not same_path(maker.path, able[0].path) for maker in able):
        listed = ", ".join(sorted({repr(maker.path) for maker in able}))
        raise ValueError(
            f"The module makes targets on several paths, {listed}. Say which to watch: "
            "PosteriorMonitor(path=...)."
        )
    return able[0].path, f"from {able[0].name}, {able[0].library}"


def one_target_maker(module: object, at: str | None = None) -> TargetMaker:
    """The one maker of an object.

    Args:
        module: As for `find_target_makers`.
        at: The name of the one that is meant, such as "module.FM"; default: there is one only.

    Returns:
        The maker. One that cannot be steered is not counted if another one can.

    Raises:
        ValueError: If there is none, more than one, or one that cannot be steered; the message
            lists what was found and shows the cure.
    """
    found, couplings = _found(module)
    able = [maker for maker in found if not maker.refusal] or _training(found)
    if at is not None:
        able = [maker for maker in found if maker.name == at]
    if len(able) == 1:
        able[0].refuse()
        return able[0]
    listed = "".join(f"\n  {maker.describe()}" for maker in found)
    if at is not None:
        problem = f"Expected {at} to make the targets; found there are:{listed or ' none'}"
    elif found:
        problem = f"Expected one object that makes the targets, found {len(able)}:{listed}"
        # What is deeper may be in a copy, of averaged weights for example, that no step calls.
        likely = min(able, key=lambda maker: maker.name.count(".") + maker.name.count("["))
        problem += f'\nSay which the step calls: target_maker="{likely.name}".'
    else:
        *others, last = [kind.what for kind in _KINDS if kind.trains]
        problem = (
            f"Found nothing that makes the targets in {type(module).__name__}: no "
            f"{', '.join(others)} or {last} as an attribute; {BY_HAND}"
        )
        for place in couplings[:1]:
            problem += (
                f" But not with {place.name} ({_kind(place.object)}), which pairs noise with data: "
                "the oracle holds for independent pairs only."
            )
    raise ValueError(problem)


def _found(module: object) -> tuple[list[TargetMaker], list[Place]]:
    """All makers, and the couplings beside them."""
    couplings: list[Place] = []
    makers = list(_makers(Place(module, "module"), set(), couplings))
    for maker in makers:
        _refuse_coupled(maker, couplings)
    return makers, couplings


def _training(makers: list[TargetMaker]) -> list[TargetMaker]:
    return [maker for maker in makers if maker.trains] or makers


def _makers(place: Place, seen: set[int], couplings: list[Place]) -> Iterator[TargetMaker]:
    if id(place.object) in seen or isinstance(place.object, _LEAVES):
        return
    seen.add(id(place.object))
    parts = list(_parts(place))
    own = [part for part in parts if _couples(part.object)]
    for kind in _KINDS:
        maker = kind.of(place)
        if maker is not None:
            _refuse_coupled(maker, own)  # and no other: it may not be the one that is used
            yield maker
            return
    couplings += own
    for part in parts:
        yield from _makers(part, seen, couplings)


def _parts(place: Place) -> Iterator[Place]:
    whole, name = place.object, place.name
    if isinstance(whole, Mapping):
        yield from (Place(value, f"{name}[{key!r}]") for key, value in whole.items())
    elif isinstance(whole, (list, tuple)):
        yield from (Place(value, f"{name}[{index}]") for index, value in enumerate(whole))
    elif isinstance(whole, nn.Module) or type(whole).__module__.split(".")[0] not in _ELSEWHERE:
        held = dict(getattr(whole, "__dict__", {}))
        if isinstance(whole, nn.Module):
            held |= held.pop("_modules")
        # An object that is held in two places goes by its public name.
        for key in sorted(held, key=lambda key: key.startswith("_")):
            if key not in _NOT_OURS:
                yield Place(unwrapped(held[key]), f"{name}.{key}", whole, key)


def _couples(value: object) -> bool:
    if isinstance(value, types.MethodType):
        value = value.__self__
    if isinstance(value, (type, types.ModuleType)):
        return False

    def has(name: str) -> bool:
        return callable(getattr(value, name, None))

    return has("sample_plan") or (has("get_map") and has("sample_map"))


def _refuse_coupled(maker: TargetMaker, couplings: list[Place]) -> None:
    """Gives a maker the reason why it cannot be steered, if there are couplings."""
    if couplings:
        maker.coupled = True
        cure = "Train on independent pairs, without it, to steer."
        maker.refusal = maker.refusal or f"{_pairs(couplings[0])} {cure}"


def _pairs(place: Place) -> str:
    return (
        f"{place.name} ({_kind(place.object)}) pairs noise with data, which makes x_0 and x_1 "
        "dependent, and the closed form of the oracle holds for independent ones only."
    )


def _kind(value: object) -> str:
    return type(value.__self__ if isinstance(value, types.MethodType) else value).__name__


class _Assumed(TargetMaker):
    """What a training step that writes its target out may do; see `assumed_makers`."""

    library = "by hand"
    observable = False

    def describe(self) -> str:
        _, _, convention = super().describe().partition(f"({self.library}), ")
        return f"{self.name}: assumed, {convention}"


def assumed_makers(
    path: Path | None = None, convention: Convention | None = None
) -> list[TargetMaker]:
    """What a training step may do that makes its target by hand, under the usual conventions.

    Time 1 is data; time 1 is noise and the target `noise - x`; either with times 0 to 1000; or, on
    the linear path, time is the noise level of EDM. They serve to recognise `x_t` and t among what
    a network is given, and cannot be steered.

    Args:
        path: The path of training, default that of the convention, or else `LinearPath()`.
        convention: That of training, if it is known.
    """
    place = Place(None, "the training step")
    usual = [STAGEWISE, CONVENTIONS["pi0"], DIFFUSERS, Convention(0, 1000)]
    if same_path(path or LinearPath(), LinearPath()):
        usual.append(CONVENTIONS["edm"])
    return [
        _Assumed(place, path_of(told, path) or LinearPath(), None, told, BY_HAND)
        for told in (usual if convention is None else [convention])
    ]
