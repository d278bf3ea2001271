"""Where a `StageScheme` steers, and what steers there already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from stagewise.adapters import Seam, find_seams, one_seam
from stagewise.adapters.objective import Objective
from stagewise.schemes import Phases, Scheme

if TYPE_CHECKING:
    from stagewise.callbacks.stage_scheme import StageScheme

__all__ = ["own_scheme", "refuse_second", "seam_for"]


def seam_for(module: nn.Module, at: str | None, given: Scheme | Phases | None) -> Seam | None:
    """What makes the targets of a module; None if it has the scheme, and asks it itself.

    Args:
        module: What is trained.
        at: Which is meant, if that was said.
        given: What shall steer; None if it is made later.
    """
    if given is None or at is not None:
        return one_seam(module, at)
    ours = [seam for seam in find_seams(module) if own_scheme(seam) is given]
    if len(ours) == 1:
        return ours[0]
    held = any(value is given for value in vars(module).values())
    return None if held else one_seam(module)


def own_scheme(seam: Seam) -> Scheme | Phases | None:
    """What an objective steers itself with, if anything."""
    return seam.place.object.scheme if isinstance(seam, Objective) else None


def refuse_second(callback: StageScheme, before: Iterable[object]) -> None:
    """Refuses a second callback that steers the same, or has the same name."""
    for other in (one for one in before if isinstance(one, type(callback))):
        one, two = callback.seam, other.seam
        same = one and two and one.place.object is two.place.object
        if same or (callback._given is not None and other._given is callback._given):
            raise ValueError(
                f"Two StageScheme callbacks, {other.name!r} and {callback.name!r}, steer the same: "
                f"{callback._where()}. Use one: StageScheme(timesteps=..., target=..., weight=...)."
            )
        if other.name == callback.name:
            raise ValueError(
                f"Expected a name for each StageScheme, got two with {callback.name!r}, which "
                "share tags, files and state. Give it: StageScheme(..., name=...)."
            )
