"""`Phases`: a scheme that changes at a step, at a share of training, at a plateau or an event."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stagewise.conventions import written
from stagewise.paths import same_path, unlike
from stagewise.schemes.refusals import unknown_boundary
from stagewise.schemes.scheme import Scheme
from stagewise.schemes.state import Shared
from stagewise.stages import StageBoundary
from stagewise.tracing import caller_level, untraced
from stagewise.transitions import AtEvent, AtPlateau, AtStep, Until

__all__ = ["Phase", "Phases", "mixes", "parts"]

_MANY = 1000
"""Calls, more than gradients are accumulated over, within which a step must be observed."""


@dataclass(frozen=True)
class Phase:
    """A part of a training: a scheme, and what ends it.

    Args:
        scheme: The scheme of the phase.
        until: `AtStep(n)`, `AtShare(share)`, `AtPlateau(...)` or `AtEvent(event)`; None for the
            last phase.
        name: For messages, default its number.
    """

    scheme: Scheme
    until: Until | None = None
    name: str | None = None

    @property
    def needs_boundary(self) -> bool:
        """Whether anything depends on where the stages meet."""
        return self.scheme.needs_boundary or isinstance(self.until, AtPlateau)


class Phases(Shared):
    """Schemes that follow one another in a training, with the interface of a `Scheme`.

    Other attributes are those of the current scheme: `oracle`, `path`, `convention`, `boundary`,
    `collapsed`, `timesteps`, `draws_timesteps`, `smoothing`, `smooth`, `drawn`, `last`. Phases
    change only if `observe` is called after each step; a warning is given once if it never is.

    Args:
        phases: At least one. All but the last end.

    Attributes:
        index: The number of the current phase, from 0.

    Raises:
        ValueError: If a phase but the last has no end, or the last has one, or paths or
            conventions differ.

    Example:
        >>> from stagewise import LogitNormal, Phase, Phases, Scheme
        >>> from stagewise.transitions import AtShare
        >>> phases = Phases([Phase(Scheme(timesteps=LogitNormal()), AtShare(0.6)), Phase(Scheme())])
        >>> phases.observe(step=60, total=100)
        ['phase 0 ends at step 60 (60% of 100 steps); phase 1 begins']
        >>> phases.timesteps
        Uniform(stratified=False)
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        if not phases:
            raise ValueError("Expected at least one phase, got none.")
        for number, phase in enumerate(phases[:-1]):
            if phase.until is None:
                raise ValueError(
                    f"Phase {number} of {len(phases)} never ends. Say when: Phase(scheme, "
                    "until=AtStep(n)), AtShare(share) or AtPlateau()."
                )
        if phases[-1].until is not None:
            raise ValueError(
                f"Expected no `until` for the last phase, which nothing follows, got "
                f"{phases[-1].until!r}."
            )
        first = phases[0].scheme
        for scheme in (phase.scheme for phase in phases):
            if not same_path(scheme.path, first.path):
                raise ValueError(
                    f"Expected one path in all phases, {unlike(first.path, scheme.path)}."
                )
            if scheme.convention != first.convention:
                raise ValueError(
                    "Expected one convention in all phases, got "
                    f"{written(first.convention)} and {written(scheme.convention)}."
                )
        self.phases = list(phases)
        self._own = [phase.scheme.boundary is not None for phase in phases]
        self.index = 0
        self._calls = 0
        self._observed = False

    @property
    def scheme(self) -> Scheme:
        """The current scheme."""
        return self.phases[self.index].scheme

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("phases", "index", "scheme"):  # not unpickled yet
            raise AttributeError(name)
        return getattr(self.scheme, name)

    @property
    def needs_boundary(self) -> bool:
        """Whether anything, in any phase, depends on where the stages meet."""
        return any(phase.needs_boundary for phase in self.phases)

    @property
    def lacks_boundary(self) -> bool:
        """Whether something, in any phase, depends on a boundary that is not known."""
        return any(phase.needs_boundary and phase.scheme.boundary is None for phase in self.phases)

    @property
    def needs_losses(self) -> str:
        """What needs each sample's loss, in any phase, for messages; empty for nothing."""
        plateaus = [repr(p.until) for p in self.phases if isinstance(p.until, AtPlateau)]
        return next(filter(None, [*plateaus, *(p.scheme.needs_losses for p in self.phases)]), "")

    @property
    def awaited(self) -> list[AtEvent]:
        """The events that this phase and later ones wait for."""
        ahead = [phase.until for phase in self.phases[self.index :]]
        return [until for until in ahead if isinstance(until, AtEvent) and not until.happened]

    @untraced
    def __call__(self, y: Tensor, **batch: Any) -> tuple[Tensor, Tensor]:
        """Calls the current scheme; arguments of `Scheme.__call__`."""
        return self._current()(y, **batch)

    @untraced
    def correct(self, **batch: Any) -> Tensor:
        """The correction of the current scheme; arguments of `Scheme.correct`."""
        return self._current().correct(**batch)

    @untraced
    def weight_of(self, t: Tensor) -> Tensor:
        """The weights of the current scheme, (B,)."""
        return self._current().weight_of(t)

    def set_boundary(self, boundary: float | StageBoundary) -> None:
        """Sets the boundary of all phases that were made without one."""
        for phase, own in zip(self.phases, self._own, strict=True):
            if not own:
                phase.scheme.set_boundary(boundary)

    def measure_boundary(self, seed: int = 0) -> StageBoundary:
        """Measures the boundary with the first oracle, and sets it as `set_boundary`."""
        schemes = [phase.scheme for phase in self.phases]
        able = next((each for each in schemes if each.oracle or each.smoothing), schemes[0])
        boundary = able.measured(seed)
        self.set_boundary(boundary)
        return boundary

    def observe(
        self,
        *,
        step: int,
        total: int | None,
        t: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> list[str]:
        """Takes an optimizer step, and changes the phase if it ends; arguments of `Scheme.observe`.

        Returns a line for each change of phase. Raises a ValueError if a phase cannot end within
        `total` steps, or what it needs is not given.
        """
        if not self._observed:
            self.check_ends(total)
            self._observed = True
        messages: list[str] = []
        while True:
            self.scheme.observe(step=step, total=total, t=t, loss=loss)
            phase = self.phases[self.index]
            if phase.until is None:
                return messages
            own = t if t is None else self.convention.to_t(t)
            why = phase.until.observe(step, total, own, loss, self.boundary)
            if why is None:
                return messages
            self.index += 1
            messages.append(
                f"{self._name(self.index - 1)} ends at step {step} ({why}); "
                f"{self._name(self.index)} begins"
            )

    def notify(self, event: str) -> None:
        """Takes an event; a phase that waits for it ends at the next `observe`."""
        for phase in self.phases:
            if isinstance(phase.until, AtEvent):
                phase.until.notify(event)

    def _current(self) -> Scheme:
        """The current scheme, for a call; the first call checks all phases."""
        if not self._calls:
            for scheme in (phase.scheme for phase in self.phases):
                # A scheme without its boundary is checked by its own first call.
                if not scheme.lacks_boundary:
                    scheme.check()
        self._calls += 1
        until = self.phases[self.index].until
        enough = min(4 * until.step, _MANY) if isinstance(until, AtStep) else _MANY
        if until is not None and not self._observed and self._calls == enough:
            warnings.warn(
                f"Expected a call of observe for each optimizer step, got none in {enough} calls: "
                f"{self._name(self.index)} never ends. Call scheme.observe(step=..., total=...) "
                "after each step, or train with the callback StageScheme(scheme).",
                stacklevel=caller_level(),
            )
        return self.scheme

    def _name(self, number: int) -> str:
        name = self.phases[number].name
        return f"phase {number}" if name is None else f"phase {number} ({name})"

    def check_ends(self, total: float | None) -> None:
        """Refuses a phase that cannot end within `total` steps, infinite if training has no end."""
        start = 0
        for phase in self.phases[:-1]:
            assert phase.until is not None
            start = phase.until.check(start, total)

    def check(self, total: int | None = None) -> None:
        """Checks all phases before the first step, as `Scheme.check`.

        Args:
            total: Steps of training. Without it phases that cannot end within them are refused
                when the first step is observed.
        """
        if self.lacks_boundary:
            raise unknown_boundary()
        for phase in self.phases:
            phase.scheme.check()
        self.check_ends(total)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "index": self.index,
            "schemes": [phase.scheme.state_dict() for phase in self.phases],
            "untils": [phase.until.state_dict() for phase in self.phases[:-1] if phase.until],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; refuses the state of another number of phases."""
        if len(state["schemes"]) != len(self.phases):
            raise ValueError(
                f"Expected the state of {len(self.phases)} phases, got {len(state['schemes'])}. "
                "Resume with the phases that the run began with."
            )
        self.index = state["index"]
        for phase, scheme in zip(self.phases, state["schemes"], strict=True):
            phase.scheme.load_state_dict(scheme)
        for phase, until in zip(self.phases[:-1], state["untils"], strict=True):
            assert phase.until is not None
            phase.until.load_state_dict(until)


def parts(scheme: Scheme | Phases) -> list[Scheme]:
    """The schemes of all phases, or the one."""
    return [scheme] if isinstance(scheme, Scheme) else [phase.scheme for phase in scheme.phases]


def mixes(scheme: Scheme | Phases) -> bool:
    """Whether any phase has a target other than the conditional one."""
    return any(part.target is not None for part in parts(scheme))
