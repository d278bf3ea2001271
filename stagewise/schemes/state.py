"""What a scheme knows of its run: where the stages meet, the step, and what losses have shown."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from stagewise.condition import Condition
from stagewise.conventions import Convention
from stagewise.masks import MaskedLabels, fitted, masked
from stagewise.oracle import Oracle
from stagewise.paths import Path
from stagewise.queries import Labels
from stagewise.schemes.refusals import unknown_boundary
from stagewise.schemes.smoothed import Drawn, Smoothed
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength
from stagewise.stages import StageBoundary, StageCurve, require_whole_bank
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler, Uniform
from stagewise.tracing import caller_level, untraced
from stagewise.weights import Weight

__all__ = ["SchemeRecord", "SchemeState", "Shared"]

_STEPS, _CALLS = 20, 1000
"""Observed steps, and calls, in which an adaptive sampler must have been told of losses."""


@dataclass(frozen=True)
class SchemeRecord:
    """What one call of a scheme did, detached, on the device of the batch.

    Attributes:
        t: Times, (B,); t = 0 is noise.
        x1: Samples as the scheme was given them, (B, *).
        source: Their rows, (B,), if it was given them.
        lam: How much of the oracle went into each target, (B,), float64.
        weight: Weight of each sample, (B,).
        added: What was added to each target, (B, *), in the library's convention.
        inserted: Where x_1 was no row of the bank, or another than its stored twin, and was put
            into the reference set as it is, (B,), bool. False where lambda is 0.
        tail_mass: Share of the posterior that did not enter the target, (B,), float64.
        smoothed: How much of the smoothing went into each sample, (B,).
    """

    t: Tensor
    x1: Tensor
    source: Tensor | None
    lam: Tensor
    weight: Tensor
    added: Tensor
    inserted: Tensor
    tail_mass: Tensor
    smoothed: Tensor


class Shared:
    """One for a run: a copy of a module that holds it (EMA) holds the same, and the same bank."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class SchemeState(Shared):
    """The parts of a scheme that depend on its run, and what they are told; see `Scheme`."""

    def __init__(
        self,
        oracle: Oracle | None,
        path: Path,
        timesteps: TimestepSampler | None,
        target: Target | None,
        weight: Weight | Callable[[Tensor], Tensor] | None,
        class_wise: bool | Literal["auto"],
        convention: Convention,
        smoothing: Smoothing | None,
        strength: Strength | None,
        preserve_objective: bool,
    ) -> None:
        self.oracle, self.path, self.target, self.weight = oracle, path, target, weight
        self._wise, self.convention = class_wise, convention
        self.smoothing, self.preserve_objective = smoothing, preserve_objective
        self.labels_of: Callable[[Tensor], Tensor | MaskedLabels | None] | None = None
        self.condition_of: Callable[[Condition, Tensor], Tensor | None] | None = None
        self.before_smoothing: Callable[[Tensor], object] | None = None
        self.trains: Callable[[], bool] | None = None
        self.encoded: bool | None = None
        self._smoothed = None if smoothing is None else Smoothed(smoothing, strength)
        self.boundary: float | None = None
        self.collapsed: float | None = None
        self.last: SchemeRecord | None = None
        self._draws_timesteps = timesteps is not None
        self._sampler = self._bound = timesteps or Uniform()
        self._step = self._calls = self._draws = 0
        self._checked = False
        self._waits_for_losses = bool(self.needs_losses)
        self._untold_steps = self._untold_calls = 0

    @property
    def class_wise(self) -> bool:
        """Whether posteriors are over the rows of x_1's class: as was said, or if they have some.

        That is looked up each time: a `Reservoir` has labels once it has seen some.
        """
        known = self.oracle or self.smoothing
        return bool(known and known.bank.labelled) if self._wise == "auto" else self._wise

    @property
    def paused(self) -> bool:
        """Whether calls are of no training now, so that they get what they give."""
        return self.trains is not None and not self.trains()

    @property
    def draws_timesteps(self) -> bool:
        """Whether it draws t for the next call."""
        return self._draws_timesteps and not self.paused

    def with_masks(self, labels: Labels | None, mask: Tensor | None, x1: Tensor) -> Labels | None:
        """Labels with masks, where those of a run are known although the call says none."""
        found = masked(labels, mask, x1)
        wants = self.target is not None and self.oracle is not None and self.oracle.bank.pairs
        if wants and not isinstance(found, MaskedLabels) and self.labels_of is not None:
            own = self.labels_of(x1.detach())
            if isinstance(own, MaskedLabels):
                return own if found is None else MaskedLabels.of(found, own.mask, x1)
        return found

    def _as_rows(self, x: Tensor, labels: Labels | None) -> tuple[Tensor, Labels | None]:
        """Samples and their masks as rows of the bank."""
        return fitted(x, labels, x.shape[1:] if self.oracle is None else self.oracle.bank.shape)

    # -- where the stages meet -----------------------------------------------------------------

    @property
    def needs_boundary(self) -> bool:
        """Whether anything depends on where the stages meet."""
        return (
            self._needs_collapsed
            or self._sampler.needs_boundary
            or (self.target is not None and self.target.lam.needs_boundary)
            or (isinstance(self.weight, Weight) and self.weight.needs_boundary)
        )

    @property
    def _needs_collapsed(self) -> bool:
        return self._smoothed is not None and self._smoothed.strength is None

    @property
    def lacks_boundary(self) -> bool:
        """Whether something depends on where the stages meet, and that is not known."""
        missing = self.boundary is None or (self._needs_collapsed and self.collapsed is None)
        return self.needs_boundary and missing

    @property
    def drawn(self) -> Drawn | None:
        """What `smooth` gave last, None before."""
        return None if self._smoothed is None else self._smoothed.drawn

    def set_boundary(self, boundary: float | StageBoundary) -> None:
        """Says where navigation meets refinement, and from where on samples are smoothed.

        Args:
            boundary: t in [0, 1], or what was measured, whose midpoint counts, and for a smoothing
                without a strength the collapsed end. One of NaN, not reached at any t, is 1.

        Raises:
            ValueError: If it is not in [0, 1], the timesteps cannot be bound to it, or the
                smoothing needs what was measured.
        """
        if isinstance(boundary, StageBoundary):
            ends = (boundary.midpoint, boundary.collapsed)
            if self._needs_collapsed and math.isnan(boundary.collapsed):
                warnings.warn(
                    f"{self.smoothing!r} never acts: the posterior collapses on one row at no t. "
                    "Rows that stand in the bank twice share it; leave them out, "
                    "LatentBank(x.unique(dim=0)), or say from when on: "
                    "strength=lambda t: (t >= 0.7).float().",
                    stacklevel=caller_level(),
                )
            self._bind(*(1.0 if math.isnan(end) else end for end in ends))
            return
        if not 0 <= boundary <= 1:
            raise ValueError(f"Expected `boundary` in [0, 1], t = 0 being noise, got {boundary}.")
        if self._needs_collapsed:
            raise ValueError(
                f"Expected the measured boundary, whose collapsed end is where {self.smoothing!r} "
                f"begins, got {boundary}. Measure it, scheme.measure_boundary(), or say where: "
                "Scheme(strength=lambda t: (t >= 0.7).float(), boundary=...)."
            )
        self._bind(float(boundary), None)

    def _bind(self, boundary: float, collapsed: float | None) -> None:
        self._bound = self._sampler.bind(boundary)
        self.boundary, self.collapsed, self._checked = boundary, collapsed, False

    def measure_boundary(self, seed: int = 0) -> StageBoundary:
        """Measures where the stages of the oracle's bank meet, and sets it.

        Args:
            seed: Of the queries, default 0. No global generator is touched.

        Returns:
            What was measured.

        Raises:
            ValueError: Without an oracle, or if its bank is spread over ranks.
        """
        oracle = self.oracle
        if self.smoothing is not None and (oracle is None or oracle.smoothing is not None):
            oracle = Oracle(self.smoothing.bank, self.path)  # the stages are those of the rows
        if oracle is None:
            raise ValueError(
                "Expected an oracle to measure the boundary with, got none: Scheme(Oracle(bank, "
                "path), ...). Or give the boundary: Scheme(boundary=0.1)."
            )
        require_whole_bank(oracle)
        curve = StageCurve.measure(oracle, seed=seed, class_wise=self.class_wise)
        boundary = curve.boundary(seed=seed)
        self.set_boundary(boundary)
        return boundary

    def require_boundary(self) -> None:
        """Refuses to go on without a boundary, if anything depends on it.

        Raises:
            ValueError: With the cure.
        """
        if self.lacks_boundary:
            raise unknown_boundary(self._needs_collapsed)

    @property
    def timesteps(self) -> TimestepSampler:
        """How t is drawn, for these stages; in the library's time, whatever the `convention`.

        Raises:
            ValueError: If that depends on a boundary that is not known yet.
        """
        if self._sampler.needs_boundary:
            self.require_boundary()
        return self._bound

    # -- what counts how much ------------------------------------------------------------------

    @untraced
    def weight_of(self, t: Tensor) -> Tensor:
        """The weight at each t, (B,), importance weights included, in the dtype of `t`.

        Args:
            t: Times, in the scheme's `convention`.

        Raises:
            ValueError: If it has another shape, or depends on a boundary that is not known yet; and
                as `check`.
        """
        return self._weight(self.convention.to_t(t))

    @torch.no_grad()
    def _weight(self, t: Tensor) -> Tensor:
        self._check_once()
        weight = torch.ones_like(t) if self.weight is None else self._bound_weight()(t)
        if weight.shape != t.shape:
            raise ValueError(
                f"Expected `weight(t)` with shape {tuple(t.shape)}, got {tuple(weight.shape)}."
            )
        if self.preserve_objective:
            kept = self.timesteps.importance_weight(t) * weight
            # Where the loss does not count, no draws are needed.
            weight = torch.where(weight > 0, kept, weight)
        return weight.to(t.dtype)

    def _bound_weight(self) -> Callable[[Tensor], Tensor]:
        assert self.weight is not None
        if not isinstance(self.weight, Weight):
            return self.weight
        if self.weight.needs_boundary:
            self.require_boundary()
        return self.weight.bind(self.boundary, self.path)

    def check(self, total: int | None = None) -> None:
        """Refuses what cannot work; see `Scheme`."""
        raise NotImplementedError

    def _check_once(self) -> None:
        if not self._checked:
            self.check()

    # -- steps and losses ----------------------------------------------------------------------

    @property
    def needs_losses(self) -> str:
        """What needs each sample's loss (`observe`), for messages; empty if nothing does."""
        return "A sampler that adapts" if self._sampler.state_dict() else ""

    def observe(
        self,
        *,
        step: int,
        total: int | None,
        t: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> list[str]:
        """Takes note of where training is; call it after every optimizer step.

        Args:
            step: Optimizer steps done.
            total: How many there will be, None if that is not known.
            t: Times of the step's samples, (B,), in the scheme's `convention`; on several ranks
                those of all, so that all decide the same.
            loss: Their losses before any weight, (B,).

        Returns:
            A line for each change of phase; of a single scheme none.
        """
        self._step, self._calls, self._draws = step, 0, 0
        if t is not None and loss is not None:
            self._bound.update(self.convention.to_t(t), loss)
            self._waits_for_losses = False
        elif self._waits_for_losses:
            self._untold_steps += 1
            self._warn_if(self._untold_steps == _STEPS, level=3)
        return []

    def _count_call(self) -> None:
        if self._waits_for_losses:
            self._untold_calls += 1
            self._warn_if(self._untold_calls == _CALLS, level=caller_level() + 1)

    def _warn_if(self, late: bool, level: int) -> None:
        if not late:
            return
        self._waits_for_losses = False
        warnings.warn(
            f"{self._sampler!r} adapts to losses and was told of none: its draws stay as they "
            "began. After each step call scheme.observe(step=..., total=..., t=..., loss=...), "
            "with the times and the losses of its samples.",
            stacklevel=level,
        )

    # -- checkpoints and copies ----------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Those are of a run, which holds its trainer.
        of_run = ("labels_of", "condition_of", "before_smoothing", "trains")
        return {**vars(self), **dict.fromkeys(of_run)}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers, strings, tensors, lists and dicts."""
        return {
            "boundary": self.boundary,
            "collapsed": self.collapsed,
            "step": self._step,
            "calls": self._calls,
            "draws": self._draws,
            "timesteps": self._bound.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.boundary, self.collapsed, self._checked = None, None, False
        self._bound = self._sampler
        if state["boundary"] is not None:
            self._bind(state["boundary"], state.get("collapsed"))
        self._step, self._calls = state["step"], state["calls"]
        self._draws = state.get("draws", 0)
        self._bound.load_state_dict(state["timesteps"])
