r"""`Scheme`: timesteps, target and weight of a run, in one object that a training loop asks.

    t ~ q,   loss = w(t) || model(x_t, t) - (y + lambda c_t (m - x_1)) ||^2,

with q from `stagewise.timesteps`, the pull towards m from `stagewise.targets`, lambda from
`stagewise.lambdas` and w from `stagewise.weights`, times `p(t) / q(t)`, p uniform, if the objective
of uniform times is to be kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stagewise.engines import Sharded
from stagewise.lambdas import Hard
from stagewise.oracle import Labels, Oracle, Times, as_times, check_times, require_tensors
from stagewise.paths import STAGEWISE, Convention, LinearPath, Path, Prediction, PredictionKind
from stagewise.schemes.checks import (
    check_density,
    check_rows,
    check_samples,
    check_settings,
    unknown_boundary,
    unknown_conditions,
)
from stagewise.schemes.correction import Batch, Correction, correct
from stagewise.smoothed_oracle import SmoothedOracle
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength, rows_of
from stagewise.stages import StageBoundary, StageCurve, require_whole_bank
from stagewise.targets import Mix, Target, mix_target
from stagewise.timesteps import TimestepSampler, Uniform
from stagewise.tracing import caller_level, untraced
from stagewise.weights import Weight

__all__ = ["Scheme", "SchemeRecord"]

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
        correction_sq: Mean square over the D numbers of what was added to each target, (B,).
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
    correction_sq: Tensor
    inserted: Tensor
    tail_mass: Tensor
    smoothed: Tensor


class Drawn(NamedTuple):
    """What `Scheme.smooth` gave last: samples (B, *), those before, their rows and times, (B,)."""

    x1: Tensor
    before: Tensor
    source: Tensor
    t: Tensor


class Scheme:
    """What is drawn, what is trained on, and what counts how much.

    It is a plain object. The only thing it draws from the global generator is t, once per call of
    `timesteps.sample`; random rows and the draws of a smoothing come from generators of its own, a
    function of seed, rank and step.

    The first call holds what it is given against the path and, if it mixes, against the bank: it
    refuses reversed time, a wrong sign, scale or prediction, and warns of samples that are no rows.

    Args:
        oracle: Bank and path; needed by targets other than the conditional one.
        timesteps: How t is drawn, default `Uniform()`.
        target: What is added to the conditional target, default None: nothing.
        weight: From t, (B,), to weights, (B,), default all ones.
        boundary: Where navigation meets refinement, t in [0, 1], or what was measured. Default
            None: measured later (`set_boundary`), if anything depends on it.
        preserve_objective: Whether the weight includes `p(t) / q(t)`, so that the expected loss is
            that of uniform times whatever `timesteps` draws. Needs them. Default False.
        class_wise: Whether posteriors are over the rows of x_1's class. Default "auto": if the bank
            has classes. A model that sees labels needs it: what it should predict is not the mean
            over all classes. One that sees none may have either. False is the word for "my model
            ignores its conditions": without it conditions that are no classes are refused.
        path: Default that of the oracle, or `LinearPath()`.
        on_missing: What to do with an x_1 that is no row of the bank and comes without a `source`:
            "insert" it into the reference set as its own row (default), or "error".
        seed: Of random rows, default 0.
        convention: How your training counts time and signs a velocity, default as the library does
            (t = 0 is noise, data - noise). Times and targets are given, and targets returned, in
            it: `Convention(1, 0, -1)` where t = 1 is noise and the target is noise - data. Only
            `timesteps.sample` stays in the library's time: take `convention.from_t` of its draws.
        smoothing: Gaussians around the rows, which `smooth` draws from. Default None.
        strength: From t, (B,), to how much of the smoothing is used, in [0, 1], (B,). Default None:
            all of it from the measured *collapsed* boundary on, where the plain target is nothing
            but a row by heart, and nothing before it.

    Attributes:
        collapsed: From which t on samples are smoothed, None if that is not known.
        drawn: What `smooth` gave last, None before.
        unconditional: Whether `class_wise=False` was said.
        rows_checked: Whether samples have been held against the bank, which the first call does.
            Set it to do that elsewhere.
        labels_of: From x_1, (B, *), to classes, (B,), or None; default None. Asked where x_1 comes
            without labels and is no row of the bank.
        last: The record of the last call, None before.
        draws_timesteps: Whether `timesteps` was given. If not, whoever draws t by itself goes on.

    Raises:
        ValueError: For settings that contradict each other, with the cure.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> from stagewise.targets import Mix
        >>> x1 = torch.randn(8, 16)
        >>> scheme = Scheme(Oracle(LatentBank(x1)), target=Mix("boundary"), boundary=0.4)
        >>> t, x0 = scheme.timesteps.sample(8), torch.randn(8, 16)
        >>> xt = scheme.path.interpolate(x0, x1, t)
        >>> u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)
        >>> u.shape, w.shape
        (torch.Size([8, 16]), torch.Size([8]))
    """

    def __init__(
        self,
        oracle: Oracle | None = None,
        *,
        timesteps: TimestepSampler | None = None,
        target: Target | None = None,
        weight: Weight | Callable[[Tensor], Tensor] | None = None,
        boundary: float | StageBoundary | None = None,
        preserve_objective: bool = False,
        class_wise: bool | Literal["auto"] = "auto",
        path: Path | None = None,
        on_missing: Literal["insert", "error"] = "insert",
        seed: int = 0,
        convention: Convention = STAGEWISE,
        smoothing: Smoothing | None = None,
        strength: Strength | None = None,
    ) -> None:
        check_settings(
            *(oracle, timesteps, target, class_wise, on_missing, path),
            preserve_objective=preserve_objective,
            convention=convention,
            smoothing=smoothing,
            strength=strength,
        )
        self.oracle, self.convention = oracle, convention
        self.path = path or (LinearPath() if oracle is None else oracle.path)
        self.target, self.weight = target, weight
        self.preserve_objective, self.on_missing, self.seed = preserve_objective, on_missing, seed
        known = oracle or smoothing
        self.class_wise = bool(known and known.bank.classes) if class_wise == "auto" else class_wise
        self.unconditional = class_wise is False
        self.smoothing, self.strength = smoothing, strength
        self.boundary: float | None = None
        self.collapsed: float | None = None
        self.last: SchemeRecord | None = None
        self.labels_of: Callable[[Tensor], Tensor | None] | None = None
        self.draws_timesteps = timesteps is not None
        self._sampler = self._bound = timesteps or Uniform()
        self._step = self._calls = self._draws = 0
        self.drawn: Drawn | None = None
        self._around: SmoothedOracle | None = None
        self._checked = self._fits = self.rows_checked = False
        self._waits_for_losses = bool(self.needs_losses)
        self._untold_steps = self._untold_calls = 0
        if boundary is not None:
            self.set_boundary(boundary)

    @classmethod
    def two_stage(cls, oracle: Oracle, **options: Any) -> Scheme:
        """Learns the mean while many rows explain `x_t`, and the neighbourhood once one does.

        Oracle targets in navigation, `Mix("boundary")`, and from the collapsed boundary on the
        default `Smoothing`, which is searched here: some seconds for 20 000 rows of 768 numbers.

        Args:
            oracle: Bank and path.
            **options: Of the scheme; `smoothing=` another one, or None.
        """
        if not isinstance(oracle, Oracle):
            raise TypeError(
                f"Expected an Oracle, got {type(oracle).__name__}: Scheme.two_stage(Oracle(bank))."
            )
        if "target" in options:
            raise ValueError(
                'Expected no `target` for two stages, which have Mix("boundary"), got one. Say '
                "both: Scheme(oracle, target=..., smoothing=Smoothing(oracle.bank))."
            )
        if "smoothing" not in options:
            options["smoothing"] = Smoothing(oracle.bank)
        return cls(oracle, target=Mix("boundary"), **options)

    # -- the stages ----------------------------------------------------------------------------

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
        return self.smoothing is not None and self.strength is None

    @property
    def lacks_boundary(self) -> bool:
        """Whether something depends on where the stages meet, and that is not known."""
        return self.needs_boundary and self.boundary is None

    @property
    def needs_losses(self) -> str:
        """What needs each sample's loss (`observe`), for messages; empty if nothing does."""
        return "A sampler that adapts" if self._sampler.state_dict() else ""

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
        self.boundary, self.collapsed = boundary, collapsed
        self._checked, self._around = False, None

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

    # -- what a loop asks ----------------------------------------------------------------------

    @untraced
    def smooth(self, x1: Tensor, *, t: Times, source: Tensor | None = None) -> Tensor:
        """What to train on in place of x_1, before `x_t` is made of it; give it to the call, too.

        Args:
            x1: Samples, (B, *). Nothing is written into them.
            t: Their times, see `__call__`.
            source: Their rows; see `Smoothing.draw`.

        Returns:
            (B, *): draws from the Gaussians around the rows, before the collapsed boundary the
            samples as they are; without a smoothing `x1` itself.

        Raises:
            ValueError: On a boundary that is not known yet; and as `Smoothing.draw`.
        """
        if self.smoothing is None:
            return x1
        self._check_once()
        source = rows_of(self.smoothing.bank, x1, source)
        self._draws += 1
        generator = torch.Generator(x1.device).manual_seed(self._random("smooth", self._draws))
        times = as_times(t, x1)
        smoothed = self.smoothing.draw(
            x1,
            source,
            t=self._time(times),
            boundary=self.collapsed if self._needs_collapsed else None,
            strength=self.strength,
            generator=generator,
        )
        self.drawn = Drawn(smoothed, x1, source, times)
        return smoothed

    def _random(self, *what: Any) -> int:
        """A seed of this rank, step and call."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return Random(f"{self.seed} {rank} {self._step} {what}").getrandbits(63)

    def _source_of(self, x1: Tensor, t: Times, source: Tensor | None) -> Tensor:
        """The rows of samples that were smoothed; in the first call, at the same times."""
        if self.drawn is None or self.drawn.x1 is not x1:
            raise ValueError(
                f"Expected `x1` as the scheme has drawn it, {self.smoothing!r}, and `xt` made of "
                "it. Before x_t is made: x1 = scheme.smooth(x1, t=t)."
            )
        if self.last is None:
            same = ((as_times(t, x1) - self.drawn.t).abs() < 0.01).all()
            message = "Expected the times `t` that the samples were smoothed at"
            if same.device.type != "cpu" or type(same) is not Tensor:
                torch._assert_async(same, message)
            elif not same:
                raise ValueError(
                    f"{message}, got others. Draw t once: t = scheme.timesteps.sample(len(x1)); "
                    "x1 = scheme.smooth(x1, t=t); u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)."
                )
        return self.drawn.source if source is None else source

    @untraced
    def __call__(
        self,
        y: Tensor,
        *,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        labels: Labels | None = None,
        source: Tensor | None = None,
        prediction: Prediction | PredictionKind = "velocity",
    ) -> tuple[Tensor, Tensor]:
        """The target and the weight of each sample; the first call does what `check` does.

        Args:
            y: Conditional target, (B, *), in the scheme's `convention` (default: t = 0 is noise,
                and a velocity is data - noise).
            xt: Noisy samples, (B, *).
            t: Times in that convention (default: in [0, 1]), (B,) or (B, 1, ..., 1), or one number.
            x1: What `xt` was made from, (B, *).
            labels: Class of each sample, (B,); see `Oracle.posterior`. Used if `class_wise`, and
                default the class of the bank's row that x_1 is.
            source: The row of the bank that each x_1 stands for, (B,), negative where it is none.
                Default: the row that x_1 equals. Give it where x_1 is resampled from what is stored
                of its row.
            prediction: What `y` is, default "velocity".

        Returns:
            The target, (B, *), in the dtype of `y`, and the weights, (B,), in that of `t`.

        Raises:
            ValueError: On shapes that do not fit, t outside [0, 1], an unknown prediction or class,
                a boundary that is not known yet, an x_1 that is not in the bank if `on_missing` is
                "error", or labels where the bank has none; in the first call, on arguments that do
                not fit each other or the bank; and as `check`.
            TypeError: If they are no tensors.
        """
        require_tensors(y=y, xt=xt, x1=x1)
        if y.shape != x1.shape:
            raise ValueError(
                f"Expected `y` with the shape of `x1`, {tuple(x1.shape)}, got {tuple(y.shape)}."
            )
        prediction = Prediction.of(prediction)
        for part in (self.weight, self._sampler):
            if prediction.kind != "velocity" and getattr(part, "of_velocity", False):
                raise ValueError(
                    f"Expected a velocity for {type(part).__name__}, whose floor is that of its "
                    f"loss, got {prediction.kind!r}. Leave it out, or train on the velocity."
                )
        if self.smoothing is not None:
            source = self._source_of(x1, t, source)
        t, added = self._correction(y, xt, t, x1, labels, source, prediction)
        weight = self._weight(t)
        if self._waits_for_losses:
            self._untold_calls += 1
            self._warn_if(self._untold_calls == _CALLS)
        self.last = SchemeRecord(
            t=t.detach(),
            x1=x1.detach(),
            source=source,
            lam=added.lam,
            weight=weight.detach(),
            correction_sq=added.value.flatten(1).square().mean(1),
            inserted=added.inserted,
            tail_mass=added.tail_mass,
            smoothed=self._share(t),
        )
        if self.target is None:
            return y, weight
        return mix_target(y, self._sign(prediction) * added.value, 1.0), weight

    @untraced
    def correct(
        self,
        *,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        labels: Labels | None = None,
        source: Tensor | None = None,
        prediction: Prediction | PredictionKind = "velocity",
    ) -> Tensor:
        """`lambda c_t (m - x_1)`: what a call adds to the conditional target, (B, *).

        Args:
            xt: See `__call__`, like all others.
            t: Times.
            x1: Samples.
            labels: Classes.
            source: Rows.
            prediction: What the target is.

        Returns:
            (B, *), in the dtype of `x1`.
        """
        require_tensors(xt=xt, x1=x1)
        prediction = Prediction.of(prediction)
        if self.smoothing is not None:
            source = self._source_of(x1, t, source)
        _, added = self._correction(None, xt, t, x1, labels, source, prediction)
        return (self._sign(prediction) * added.value).to(x1.dtype)

    @untraced
    def weight_of(self, t: Tensor) -> Tensor:
        """The weight at each t, (B,), importance weights included, in the dtype of `t`.

        Args:
            t: Times, in the scheme's `convention`.

        Raises:
            ValueError: If it has another shape, or depends on a boundary that is not known yet; and
                as `check`.
        """
        return self._weight(self._time(t))

    def _time(self, t: Tensor) -> Tensor:
        """Times of the `convention` as the library's; integers, of other units, as floats."""
        t = t if t.is_floating_point() else t.float()
        return t if self.convention == STAGEWISE else self.convention.to_t(t)

    def _sign(self, prediction: Prediction) -> int:
        return self.convention.sign if prediction.kind == "velocity" else 1

    @torch.no_grad()
    def _share(self, t: Tensor) -> Tensor:
        """How much of the smoothing is used at each time, (B,)."""
        if self.smoothing is None:
            return torch.zeros_like(t)
        if self.strength is not None:
            return self.strength(t)
        assert self.collapsed is not None
        return (t >= self.collapsed).to(t.dtype)

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

    @torch.no_grad()
    def _correction(
        self,
        y: Tensor | None,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        labels: Labels | None,
        source: Tensor | None,
        prediction: Prediction,
    ) -> tuple[Tensor, Correction]:
        """The times, (B,), and what is added to a target, both in the library's convention."""
        self._check_once()
        if x1.shape != xt.shape:
            raise ValueError(
                f"Expected `x1` with the shape of `xt`, {tuple(xt.shape)}, got {tuple(x1.shape)}."
            )
        time = as_times(t, xt)
        t = self._time(time)
        check_times(t, len(xt))
        self._hold(y, xt, time, x1, source, prediction)
        if self.target is None or self.oracle is None:
            return t, Correction.none(x1)
        if not self.class_wise and not self.unconditional and _has_classes(labels):
            raise unknown_conditions("labels, and a bank without classes")
        if self.target.lam.needs_boundary:
            self.require_boundary()
        self._calls += 1
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        batch = Batch(
            self.oracle,
            xt.detach(),
            t.detach(),
            x1.detach(),
            labels,
            source,
            self.class_wise,
            self.on_missing,
            Random(f"{self.seed} {rank} {self._step} {self._calls}"),
            None if self.labels_of is None else partial(self.labels_of, x1.detach()),
        )
        if not self._overlaps:
            return t, correct(self.target, batch, self.boundary, prediction)
        # Where samples are smoothed their targets are those of the smoothed set.
        smoothed = self._share(t) > 0
        around = replace(batch, oracle=self._smoothed_oracle())
        parts = (
            correct(self.target, batch, self.boundary, prediction, ~smoothed),
            correct(self.target, around, self.boundary, prediction, smoothed),
        )
        return t, Correction(*(a + b for a, b in zip(*parts, strict=True)))

    @property
    def _overlaps(self) -> bool:
        """Whether samples that are smoothed may be given a target of the oracle."""
        if self.smoothing is None or self.target is None:
            return False
        # The midpoint, where "boundary" ends, lies before the collapsed boundary.
        return not (isinstance(self.target.lam, Hard) and self.strength is None)

    def _smoothed_oracle(self) -> SmoothedOracle:
        assert self.oracle is not None
        assert self.smoothing is not None
        if self._around is None:
            self._around = SmoothedOracle(
                self.oracle.bank,
                self.path,
                self.smoothing,
                boundary=self.collapsed if self._needs_collapsed else None,
                strength=self.strength,
            )
        return self._around

    def _hold(
        self,
        y: Tensor | None,
        xt: Tensor,
        time: Tensor,
        x1: Tensor,
        source: Tensor | None,
        prediction: Prediction,
    ) -> None:
        """Holds the first samples against the path and the bank."""
        mixes = self.target is not None
        counts = self.weight is not None or self.smoothing is not None
        looks = len(xt) and (mixes or (y is not None and counts))
        if looks and not self._fits:
            told = check_samples(
                *(self.path, prediction, self.convention, y, xt, time, x1), mixes=mixes
            )
            # A look at an accelerator costs a sync: there the first call is the only one.
            self._fits = y is not None and (told or xt.device.type != "cpu")
        if not looks or self.rows_checked or self.oracle is None or not mixes:
            return
        shard = isinstance(self.oracle.engine, Sharded)
        known = source is not None or self.oracle.smoothing is not None
        found = check_rows(self.oracle.bank, x1, known=known, shard=shard)
        self.rows_checked = True
        if found:
            warnings.warn(f"Scheme: {found}", stacklevel=caller_level())

    # -- what drives it ------------------------------------------------------------------------

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
            self._bound.update(self._time(t), loss)
            self._waits_for_losses = False
        elif self._waits_for_losses:
            self._untold_steps += 1
            self._warn_if(self._untold_steps == _STEPS)
        return []

    def _warn_if(self, late: bool) -> None:
        if not late:
            return
        self._waits_for_losses = False
        warnings.warn(
            f"{self._sampler!r} adapts to losses and was told of none: its draws stay as they "
            "began. After each step call scheme.observe(step=..., total=..., t=..., loss=...), "
            "with the times and the losses of its samples.",
            stacklevel=3,
        )

    def check(self, total: int | None = None) -> None:
        """Refuses what cannot work, before the first step; the first call does so by itself.

        Args:
            total: Steps of training, which only `Phases` need.

        Raises:
            ValueError: With the cure.
        """
        self.require_boundary()
        if self.oracle is not None and self.target is not None:
            if self.class_wise and not isinstance(self.oracle.engine, Sharded):
                self.oracle.bank.require_classes()
            self.target.check(self._smoothed_oracle() if self._overlaps else self.oracle)
        if self.preserve_objective:
            check_density(self.timesteps, None if self.weight is None else self._bound_weight())
        self._checked = True

    def _check_once(self) -> None:
        if not self._checked:
            self.check()

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
        self.boundary, self._bound, self._checked = None, self._sampler, False
        if state["boundary"] is not None:
            self._bind(state["boundary"], state.get("collapsed"))
        self._step, self._calls = state["step"], state["calls"]
        self._draws = state.get("draws", 0)
        self._bound.load_state_dict(state["timesteps"])

    # The bank is nobody's buffer, and what drives a run drives one scheme: a copy of a module that
    # holds it (EMA) holds the same.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "labels_of": None, "drawn": None}  # of a run, which holds its trainer

    def __copy__(self) -> Scheme:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Scheme:
        return self


def _has_classes(labels: Labels | None) -> bool:
    """Whether any sample has one."""
    if isinstance(labels, list | tuple):
        return any(label is not None for label in labels)
    return labels is not None
