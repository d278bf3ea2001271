"""What makes the targets of a module, and what steers them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from stagewise.adapters import TargetMaker, find_target_makers, one_target_maker
from stagewise.adapters.own import Objective
from stagewise.losses import OracleRegularizer
from stagewise.schemes import Phases, Scheme
from stagewise.schemes.words import in_words

if TYPE_CHECKING:
    from stagewise.callbacks.run import StageRun
    from stagewise.callbacks.stage_scheme import StageScheme

__all__ = ["maker_for", "own_scheme", "refuse_engine", "refuse_second", "schemes_of", "trained_on"]


def maker_for(
    module: nn.Module, at: str | None, given: Scheme | Phases | None
) -> TargetMaker | None:
    """What makes the targets of a module; None if it holds the `given` scheme and calls it itself.

    `at` is the name that was given, if any.
    """
    if given is None or at is not None:
        return one_target_maker(module, at)
    ours = [maker for maker in find_target_makers(module) if own_scheme(maker) is given]
    if len(ours) == 1:
        return ours[0]
    held = any(value is given for value in vars(module).values())
    return None if held else one_target_maker(module)


def own_scheme(maker: TargetMaker) -> Scheme | Phases | None:
    """The scheme of an objective, if it has one."""
    return maker.place.object.scheme if isinstance(maker, Objective) else None


def refuse_engine(given: list[Scheme], setting: object) -> None:
    """Refuses an engine or a certificate beside schemes that have oracles."""
    if setting is not None and any(part.oracle for part in given):
        raise ValueError(
            f"Expected a scheme without an oracle beside {setting!r}, which would change nothing: "
            "the oracle has an engine. Give it there: Oracle(bank, engine=..., certificate=...)."
        )


def refuse_second(callback: StageScheme, before: Iterable[object]) -> None:
    """Refuses a second callback of the same target maker or scheme."""
    for other in (one for one in before if isinstance(one, type(callback))):
        one, two = callback.maker, other.maker
        same = one and two and one.place.object is two.place.object
        if same or (callback._given is not None and other._given is callback._given):
            raise ValueError(
                f"Two StageScheme callbacks, {other.name!r} and {callback.name!r}, steer the same: "
                f"{callback._where()}. Use one: StageScheme(timesteps=..., target=..., weight=...)."
            )


def schemes_of(run: StageRun) -> list[Scheme | Phases]:
    """What steers a training: schemes of callbacks, of target makers, and held by the module."""
    # A regularizer has a scheme for its own term, not for the target.
    others = (m for m in run.module.modules() if not isinstance(m, OracleRegularizer))
    held = [value for module in others for value in vars(module).values()]
    own = [getattr(maker.place.object, "scheme", None) for maker in run.makers]
    found = (one for one in [*run.look.schemes, *own, *held] if isinstance(one, Scheme | Phases))
    return list({id(one): one for one in found}.values())


def trained_on(run: StageRun) -> dict[str, Any]:
    """What a module is trained on, and whether a scheme steers it; empty with a `StageScheme`.

    That callback writes it itself, once it knows the boundary.
    """
    if any(member.steers for member in run.members):
        return {}
    schemes = schemes_of(run)
    if schemes:
        return {"trained_on": "; ".join(map(in_words, schemes)), "steered": True}
    known = run.makers and all(isinstance(maker, Objective) for maker in run.makers)
    plain = "the target of its own step; no scheme was found in the module"
    return {"trained_on": "the plain target" if known else plain, "steered": False}
