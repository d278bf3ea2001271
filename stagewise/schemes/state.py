"""The state of a scheme in its run: boundary, step, and what its sampler learned from losses."""

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
from stagewise.schemes.smoothed import Smoothed, SmoothedSamples
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength
from stagewise.stages import StageBoundary, StageCurve, require_whole_bank
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler, Uniform
from stagewise.tracing import caller_level, untraced
from stagewise.weights import Weight, weights_at

__all__ = ["SchemeRecord", "SchemeState", "Shared"]

_CALLS = 1000
"""Within which an adaptive sampler must get losses; an observed step counts like 50, however many
calls it has."""


@dataclass(frozen=True)
class SchemeRecord:
    """What one call of a scheme did, detached, on the device of the batch.

    Attributes:
        t: Times, (B,); t = 0 is noise.
        x1: The samples of the call, (B, *).
        source: Their rows, (B,), if they were given.
        lam: Lambda of each target, (B,), float64.
        weight: Weight of each sample, (B,).
        added: What was added to each target, (B, *), in the library's convention.
        inserted: Whether x_1 differed from every row, also from its `source`, and was added to the
            set, (B,), bool. False where lambda is 0.
        tail_mass: Share of the posterior that is not in the target, (B,), float64.
        smoothed: Strength of the smoothing of each sample, (B,).
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
    """One object per run: copies of a module that holds it (EMA) share it, and its bank."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class SchemeState(Shared):
    """The parts of a `Scheme` that depend on its run."""

    _patience: float = math.inf  # calls until it warns that losses are missing

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
        self._patience = _CALLS if self.needs_losses else math.inf

    @property
    def class_wise(self) -> bool:
        """Whether posteriors are over the rows of x_1's class: as set, or if the bank has classes.

        Not cached: a `Reservoir` has classes only after its first batch with labels.
        """
        known = self.oracle or self.smoothing
        return bool(known and known.bank.labelled) if self._wise == "auto" else self._wise

    @property
    def paused(self) -> bool:
        """Whether calls are outside of training now, and return their input."""
        return self.trains is not None and not self.trains()

    @property
    def draws_timesteps(self) -> bool:
        """Whether it draws t for the next call."""
        return self._draws_timesteps and not self.paused

    def with_masks(self, labels: Labels | None, mask: Tensor | None, x1: Tensor) -> Labels | None:
        """Labels with masks: those of the call, or else those that the run knows."""
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
        """Whether something depends on a boundary that is not known."""
        missing = self.boundary is None or (self._needs_collapsed and self.collapsed is None)
        return self.needs_boundary and missing

    @property
    def drawn(self) -> SmoothedSamples | None:
        """The last result of `smooth`, None before."""
        return None if self._smoothed is None else self._smoothed.drawn

    def set_boundary(self, boundary: float | StageBoundary) -> None:
        """Sets the boundary between the stages, and the t from which samples are smoothed.

        Args:
            boundary: t in [0, 1], or a measured boundary: its midpoint is used, and for a smoothing
                without a strength its collapsed end. NaN, not reached at any t, becomes 1.

        Raises:
            ValueError: If it is not in [0, 1], the timesteps cannot be bound to it, or the
                smoothing needs a measured boundary.
        """
        if isinstance(boundary, StageBoundary):
            ends = (boundary.midpoint, boundary.collapsed)
            if self._needs_collapsed and math.isnan(boundary.collapsed):
                warnings.warn(
                    f"{self.smoothing!r} never acts: the posterior collapses on one row at no t up "
                    "to 0.999, because rows are equal or nearly so. Leave duplicates out, without "
                    "labels LatentBank(x.unique(dim=0)), or say where smoothing begins: "
                    "strength=lambda t: (t >= 0.7).float().",
                    stacklevel=caller_level(),
                )
            self._bind(*(1.0 if math.isnan(end) else end for end in ends))
            return
        if not 0 <= boundary <= 1:
            raise ValueError(f"Expected `boundary` in [0, 1], t = 0 being noise, got {boundary}.")
        if self._needs_collapsed:
            raise ValueError(
                f"Expected a measured boundary, as {self.smoothing!r} begins at its collapsed end, "
                f"got {boundary}. Measure it, scheme.measure_boundary(), or say where: "
                "Scheme(strength=lambda t: (t >= 0.7).float(), boundary=...)."
            )
        self._bind(float(boundary), None)

    def _bind(self, boundary: float, collapsed: float | None) -> None:
        self._bound = self._sampler.bind(boundary)
        self.boundary, self.collapsed, self._checked = boundary, collapsed, False

    def measure_boundary(self, seed: int = 0) -> StageBoundary:
        """Measures the boundary of the oracle's bank, sets it and returns it.

        The queries depend on `seed`; global generators are not used. Raises a ValueError without an
        oracle, or if its bank is spread over ranks.
        """
        boundary = self.measured(seed)
        self.set_boundary(boundary)
        return boundary

    def measured(self, seed: int) -> StageBoundary:
        """The boundary that `measure_boundary` sets."""
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
        return curve.boundary(seed=seed)

    def require_boundary(self) -> None:
        """Raises a ValueError with the cure if something depends on a boundary that is unknown."""
        if self.lacks_boundary:
            raise unknown_boundary(self._needs_collapsed)

    @property
    def timesteps(self) -> TimestepSampler:
        """The sampler of t, bound to the boundary; in the library's time for any `convention`.

        Raises a ValueError if it depends on a boundary that is not known yet.
        """
        if self._sampler.needs_boundary:
            self.require_boundary()
        return self._bound

    # -- what counts how much ------------------------------------------------------------------

    @untraced
    def weight_of(self, t: Tensor) -> Tensor:
        """The weight at each t, (B,), of the scheme's `convention`, in the dtype of `t`.

        It includes importance weights. Raises a ValueError if a boundary is needed and not known.
        """
        return self._weight(self.convention.to_t(t))

    @torch.no_grad()
    def _weight(self, t: Tensor) -> Tensor:
        self._check_once()
        weight = weights_at(self._bound_weight(), t)
        if self.preserve_objective:
            kept = self.timesteps.importance_weight(t) * weight
            # Times without weight need no draws.
            weight = torch.where(weight > 0, kept, weight)
        return weight.to(t.dtype)

    def _bound_weight(self) -> Callable[[Tensor], Tensor] | None:
        if not isinstance(self.weight, Weight):
            return self.weight
        if self.weight.needs_boundary:
            self.require_boundary()
        return self.weight.bind(self.boundary, self.path)

    def check(self, total: int | None = None) -> None:
        """Refuses a scheme that cannot work."""
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
        """Takes an optimizer step; call it after each one.

        Args:
            step: Optimizer steps done.
            total: Steps of the training, None if unknown.
            t: Times of the step's samples, (B,), in the scheme's `convention`; those of all ranks,
                so that all ranks decide the same.
            loss: Their losses before any weight, (B,).

        Returns:
            A line for each change of phase; for a single scheme none.
        """
        self._step, self._calls, self._draws = step, 0, 0
        if t is not None and loss is not None:
            self._bound.update(self.convention.to_t(t), loss)
            self._patience = math.inf
        else:
            self._wait(50, level=3)
        return []

    def _wait(self, calls: int, level: int | None = None) -> None:
        self._patience -= calls
        if self._patience > 0:
            return
        self._patience = math.inf
        warnings.warn(
            f"{self._sampler!r} adapts to losses and got none: its draws do not change. After each "
            "step call scheme.observe(step=..., total=..., t=..., loss=...), with the times and "
            "the losses of its samples.",
            stacklevel=level or caller_level(),
        )

    # -- checkpoints and copies ----------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Functions of a run, which holds its trainer.
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
        """Restores what `state_dict` returned."""
        self.boundary, self.collapsed, self._checked = None, None, False
        self._bound = self._sampler
        if state["boundary"] is not None:
            self._bind(state["boundary"], state.get("collapsed"))
        self._step, self._calls = state["step"], state["calls"]
        self._draws = state.get("draws", 0)
        self._bound.load_state_dict(state["timesteps"])
