"""Finds what makes the targets, in any object."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from stagewise.adapters.base import Place, Seam
from stagewise.adapters.diffusers import FlowMatchScheduler
from stagewise.adapters.edm import EDMLoss
from stagewise.adapters.flow_matching import FlowMatching
from stagewise.adapters.objective import Objective
from stagewise.adapters.torchcfm import TorchCFM
from stagewise.adapters.transport import Transport

__all__ = ["find_seams", "one_seam"]

_KINDS = (Objective, TorchCFM, FlowMatching, Transport, EDMLoss, FlowMatchScheduler)

_LEAVES = (
    *(Tensor, str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType),
    *(types.MethodType, types.BuiltinFunctionType),
)
_ELSEWHERE = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
"""Packages whose objects hold no user's target, apart from the modules they nest."""

_NOT_OURS = ("_trainer", "trainer", "_fabric", "fabric", "_hparams_initial")
"""Attributes of a LightningModule that lead out of it, or hold copies."""


def find_seams(module: object) -> list[Seam]:
    """All that makes targets in an object, by looking through its attributes.

    Nested modules, lists, tuples and dicts are looked through too. An object found in two places
    is one.

    Noise must not depend on data. If the object, or what it holds, holds a sampler of couplings
    (torchcfm's `OTPlanSampler`, by its `sample_plan`), no seam can be steered. Coupling done by
    hand without one, in the training step or where data are loaded, cannot be seen.

    Args:
        module: A module, or any object; it may be the seam itself.

    Returns:
        The seams in the order of the attributes, those that cannot be steered included.
    """
    couplings: list[Place] = []
    seams = list(_seams(Place(module, "module"), set(), couplings))
    for seam in seams:
        _refuse_coupled(seam, couplings)
    return seams


def _seams(place: Place, seen: set[int], couplings: list[Place]) -> Iterator[Seam]:
    if id(place.object) in seen or isinstance(place.object, _LEAVES):
        return
    seen.add(id(place.object))
    parts = list(_parts(place))
    own = [part for part in parts if callable(getattr(part.object, "sample_plan", None))]
    for kind in _KINDS:
        seam = kind.of(place)
        if seam is not None:
            _refuse_coupled(seam, own)  # and no other: it may not be the one that is used
            yield seam
            return
    couplings += own
    for part in parts:
        yield from _seams(part, seen, couplings)


def _refuse_coupled(seam: Seam, couplings: list[Place]) -> None:
    """Gives a seam the reason why it cannot be steered, if there are couplings."""
    if couplings:
        first, seam.coupled = couplings[0], True
        seam.refusal = seam.refusal or (
            f"{first.name} ({type(first.object).__name__}) pairs noise with data, which makes x_0 "
            "and x_1 dependent, and the closed form of the oracle holds for independent ones only. "
            "Train on independent pairs, without it, to steer."
        )


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
                yield Place(held[key], f"{name}.{key}", whole, key)


def one_seam(module: object, at: str | None = None) -> Seam:
    """The one seam of an object.

    Args:
        module: As for `find_seams`.
        at: The name of the one that is meant, such as "module.FM"; default: there is one only.

    Returns:
        The seam. One that cannot be steered is not counted if another one can.

    Raises:
        ValueError: If there is none, more than one, or one that cannot be steered; the message
            lists what was found and shows the cure.
    """
    found = find_seams(module)
    able = [seam for seam in found if not seam.refusal] or found
    if at is not None:
        able = [seam for seam in found if seam.name == at]
    if len(able) == 1:
        able[0].refuse()
        return able[0]
    listed = "".join(f"\n  {seam.describe()}" for seam in found)
    if at is not None:
        problem = f"Expected {at} to make the targets; found there are:{listed or ' none'}"
    elif found:
        problem = f"Expected one object that makes the targets, found {len(able)}:{listed}"
        problem += f'\nSay which: seam="{able[0].name}".'
    else:
        problem = (
            f"Found nothing that makes the targets in {type(module).__name__}: no "
            "FlowMatchingLoss, torchcfm matcher, flow_matching path, SiT transport or EDM loss "
            "as an attribute. Make the target in your training step: "
            "u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)."
        )
    raise ValueError(problem)
