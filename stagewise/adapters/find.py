"""Finds the target makers in any object, and the objects that pair noise with data."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import Tensor, nn

from stagewise.adapters.base import Place, TargetMaker, unwrapped
from stagewise.adapters.diffusers import NoiseScheduler
from stagewise.adapters.edm import EDMLoss
from stagewise.adapters.flow_matching import FlowMatching
from stagewise.adapters.own import Objective, StageTargetMaker
from stagewise.adapters.repa import REPALoss
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

_KINDS = (
    *(Objective, StageTargetMaker, TorchCFM, FlowMatching),
    *(Transport, EDMLoss, REPALoss, NoiseScheduler),
)
"""All known makers. A new library is a file of this folder and an entry here."""

_LEAVES = (
    *(Tensor, str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType),
    *(types.MethodType, types.BuiltinFunctionType),
)
_ELSEWHERE = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
"""Packages whose objects hold no target maker, except in nested modules."""

_SKIPPED = ("_trainer", "trainer", "_fabric", "fabric", "_hparams_initial")
"""Attributes of a LightningModule that lead out of it, or hold copies."""


def find_target_makers(module: object) -> list[TargetMaker]:
    """Finds all target makers in an object, through its attributes.

    Nested modules, lists, tuples and dicts are searched too. An object found in two places counts
    once. Noise must not depend on data: beside a coupling (`find_couplings`) no maker can be
    steered.

    Args:
        module: A module, or any object; it may be the maker itself.

    Returns:
        The makers in the order of the attributes, also those that cannot be steered. A scheduler of
        diffusers only if there is nothing else: beside a maker it only samples.
    """
    return _training(_found(module)[0])


def chosen_makers(module: object, names: Set[str]) -> list[TargetMaker]:
    """The target makers of an object, or those with these names; refuses an unknown name."""
    found = find_target_makers(module)
    if not names:
        return found
    found += [one_target_maker(module, at) for at in names - {maker.name for maker in found}]
    return [maker for maker in found if maker.name in names]


def find_couplings(module: object) -> list[Place]:
    """Finds all objects that pair noise with data in an object, through its attributes.

    They are recognised by their interface: `sample_plan` (torchcfm's `OTPlanSampler`), or both
    `get_map` and `sample_map`; a bound method of one counts too. A coupling in the training step or
    in the data loader is not found (`stagewise.noise.check_independent` tests for it).

    Args:
        module: As for `find_target_makers`.

    Returns:
        Where they are, except those inside a maker, which concern only that maker.
    """
    return _found(module)[1]


def dependent_noise(makers: Sequence[TargetMaker], couplings: Sequence[Place]) -> str:
    """The reason why noise depends on data; empty if it does not."""
    found = next((f"{maker.name}: {maker.refusal}" for maker in makers if maker.coupled), "")
    return found or (_pairs(couplings[0]) if couplings else "")


def training_path(makers: Sequence[TargetMaker], *, said: bool = False) -> tuple[Path, str]:
    """The path that targets are made on, and where it is from; `LinearPath(), ""` without makers.

    Several paths are refused unless the user `said` which.
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
    """The one target maker of an object.

    Args:
        module: As for `find_target_makers`.
        at: The name of the maker, such as "module.FM"; default: there is only one.

    Returns:
        The maker. Makers that cannot be steered do not count if another one can.

    Raises:
        ValueError: If there is none, several, or one that cannot be steered; the message lists what
            was found and shows the cure.
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
        # A deeper one may be in a copy, of averaged weights for example, that no step calls.
        likely = min(able, key=lambda maker: maker.name.count(".") + maker.name.count("["))
        problem += f'\nSay which the step calls: target_maker="{likely.name}".'
    else:
        *others, last = [kind.what for kind in _KINDS if kind.trains]
        problem = (
            f"Found nothing that makes the targets in {type(module).__name__}: no "
            f"{', '.join(others)} or {last} as an attribute; {BY_HAND}"
        )
        for place in couplings[:1]:
            problem += f" But {_pairs(place)}"
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
            _refuse_coupled(maker, own)  # only this one: others may be in use
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
        # An object with two names is listed by the public one.
        for key in sorted(held, key=lambda key: key.startswith("_")):
            if key not in _SKIPPED:
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
    """Sets the reason why a maker cannot be steered, if there are couplings."""
    if couplings:
        maker.coupled = True
        cure = "Train on independent pairs, without it, to steer."
        maker.refusal = maker.refusal or f"{_pairs(couplings[0])} {cure}"


def _pairs(place: Place) -> str:
    whole = place.object
    kind = type(whole.__self__ if isinstance(whole, types.MethodType) else whole).__name__
    return (
        f"{place.name} ({kind}) pairs noise with data, which makes x_0 and x_1 "
        "dependent. The closed form of the oracle holds for independent pairs only."
    )


class _Assumed(TargetMaker):
    """What a training step may do that makes its target by hand; see `assumed_makers`."""

    library = "by hand"
    observable = False

    def describe(self) -> str:
        _, _, convention = super().describe().partition(f"({self.library}), ")
        return f"{self.name}: assumed, {convention}"


def assumed_makers(
    path: Path | None = None, convention: Convention | None = None
) -> list[TargetMaker]:
    """Makers for a training step that makes its target by hand, in the usual conventions.

    Time 1 is data; time 1 is noise and the target `noise - x`; either with times 0 to 1000; or, on
    the linear path, time is the noise level of EDM. They serve to recognise `x_t` and t in the
    arguments of a network, and cannot be steered.

    Args:
        path: The path of training, default that of the convention, or else `LinearPath()`.
        convention: The convention of training, if it is known.
    """
    place = Place(None, "the training step")
    usual = [STAGEWISE, CONVENTIONS["pi0"], DIFFUSERS, Convention(0, 1000)]
    if same_path(path or LinearPath(), LinearPath()):
        usual.append(CONVENTIONS["edm"])
    return [
        _Assumed(place, path_of(told, path) or LinearPath(), None, told, BY_HAND)
        for told in (usual if convention is None else [convention])
    ]
