r"""`Scheme`: timesteps, target and weight of a training, in one object.

    t ~ q,   loss = w(t) || model(x_t, t) - (y + lambda c_t (m - x_1)) ||^2,

with q from `stagewise.timesteps`, m from `stagewise.targets`, lambda from `stagewise.lambdas` and w
from `stagewise.weights`, times `p(t) / q(t)`, p uniform, to keep the objective of uniform times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from stagewise.conventions import STAGEWISE, ConventionLike, as_convention, path_of
from stagewise.masks import cut
from stagewise.oracle import Oracle
from stagewise.paths import LinearPath, Path, Prediction, PredictionKind
from stagewise.queries import Labels, Times, as_times, check_times, require_like, require_tensors
from stagewise.schemes.conditions import has_classes, unknown_conditions
from stagewise.schemes.correction import Batch, Correction, correct, runs_kernel
from stagewise.schemes.first_call import check_first
from stagewise.schemes.refusals import check_density, check_settings, near_rows
from stagewise.schemes.sources import told_sources
from stagewise.schemes.state import SchemeRecord, SchemeState
from stagewise.smoothed_oracle import SmoothedOracle
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength, default_neighbours
from stagewise.stages import StageBoundary
from stagewise.targets import Mix, Target
from stagewise.timesteps import TimestepSampler
from stagewise.tracing import untraced
from stagewise.weights import Weight

__all__ = ["Scheme", "SchemeRecord"]


class Scheme(SchemeState):
    """The times, targets and weights of a training.

    Only t is drawn from the global generator, once per call of `timesteps.sample`; random rows and
    the draws of a smoothing come from generators of the scheme, a function of seed, rank and step.
    The first call checks its arguments against the path and, with a target, against the bank: it
    refuses reversed time, a wrong sign, scale or prediction, and warns of samples that are no rows.

    Args:
        oracle: Bank and path; needed by targets other than the conditional one.
        timesteps: How t is drawn, default `Uniform()`.
        target: What is added to the conditional target, default None: nothing.
        weight: From t, (B,), to weights, (B,), default all ones.
        boundary: Where navigation meets refinement, t in [0, 1], or a measured boundary. Default
            None: measured or set later (`set_boundary`), if anything depends on it.
        preserve_objective: Whether the weight includes `p(t) / q(t)`, so that the expected loss is
            that of uniform times for any `timesteps`. Needs them. Default False.
        class_wise: Whether posteriors are over the rows of x_1's class. Default "auto": if the bank
            has classes. A model with labels needs it. False means "my model ignores its
            conditions": otherwise conditions that are not classes are refused.
        path: Default that of the oracle or of the convention, or else `LinearPath()`.
        on_missing: For an x_1 that is not a row of the bank and has no `source`: "insert" it into
            the set as its own row (default), or "error".
        seed: Of random rows, default 0.
        convention: How your training counts time, scales `x_t` and makes its target: a name such
            as "pi0" (t = 1 is noise, noise - data), a noise scheduler of diffusers, or a
            `Convention`; see `stagewise.conventions`. Default that of the oracle. All arguments and
            results are in it, except the draws of `timesteps`: convert them by `convention.from_t`.
        smoothing: Gaussians around the rows, which `smooth` draws from. Default None.
        strength: From t, (B,), to the strength of the smoothing, in [0, 1], (B,). Default None: 1
            from the measured *collapsed* boundary on, where the plain target is a row, 0 before.

    Attributes:
        unconditional: Whether `class_wise=False` was given.
        rows_checked: Whether samples were checked against the bank, as in the first call.
        labels_of: From x_1, (B, *), to classes, (B,), or None; default None. Called if x_1 comes
            without labels and is not a row of the bank.
        condition_of: From a kernel and x_1 to conditions, (B, *), or None, if none are given.
        encoded: Whether rows and x_1 are rounded differently, as by an encoder: x_1 then stands for
            the row that it nearly equals. Default None: the first call finds out.
        before_smoothing: Called with each x_1 before it is smoothed; default None.
        trains: Returns whether calls are part of training; default None: all are. Others return
            their input.
        last: The record of the last call, None before.
        draws_timesteps: Whether `timesteps` was given and calls are part of training.

    Raises:
        ValueError: For settings that contradict each other or have no effect, with the cure.
        TypeError: For settings of another kind.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Mix, Oracle, Scheme
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
        convention: ConventionLike | None = None,
        smoothing: Smoothing | None = None,
        strength: Strength | None = None,
    ) -> None:
        check_settings(
            *(oracle, timesteps, target, weight, class_wise, on_missing, path),
            preserve_objective=preserve_objective,
            smoothing=smoothing,
            strength=strength,
        )
        convention = as_convention(convention or getattr(oracle, "convention", STAGEWISE))
        path = path_of(convention, path if oracle is None else oracle.path) or LinearPath()
        super().__init__(
            *(oracle, path, timesteps, target, weight, class_wise, convention, smoothing, strength),
            preserve_objective=preserve_objective,
        )
        self.on_missing, self.seed = on_missing, seed
        self.unconditional = class_wise is False
        self._fits = self.rows_checked = False
        if boundary is not None:
            self.set_boundary(boundary)

    @classmethod
    def two_stage(cls, oracle: Oracle, **options: Any) -> Scheme:
        """`Mix("boundary")` in navigation, and smoothing beyond the collapsed boundary.

        Args:
            oracle: Bank and path.
            **options: Of the scheme. `smoothing` replaces the default one, which takes some seconds
                to compute for 20 000 rows of 768 numbers; None leaves it out.
        """
        if not isinstance(oracle, Oracle):
            got = type(oracle).__name__
            raise TypeError(f"Expected an Oracle, got {got}: Scheme.two_stage(Oracle(bank)).")
        if "target" in options:
            raise ValueError(
                'Expected no `target` for two stages, which have Mix("boundary"), got one. Say '
                "both: Scheme(oracle, target=..., smoothing=Smoothing(oracle.bank))."
            )
        if "smoothing" not in options:
            options["smoothing"] = Smoothing(oracle.bank, default_neighbours(oracle.bank))
        return cls(oracle, target=Mix("boundary"), **options)

    # -- what a loop asks ----------------------------------------------------------------------

    @untraced
    def smooth(self, x1: Tensor, *, t: Times, source: Tensor | None = None) -> Tensor:
        """The samples to train on in place of x_1. Make `x_t` from them, and pass them to the call.

        Args:
            x1: Samples, (B, *). They are not changed.
            t: Their times, as in `__call__`.
            source: Their rows, as in `Smoothing.draw`.

        Returns:
            (B, *): draws from the Gaussians around the rows, and the samples themselves before the
            collapsed boundary; without a smoothing `x1` itself.

        Raises:
            ValueError: On a boundary that is not known yet; and as `Smoothing.draw`.
        """
        if self._smoothed is None or self.paused:
            return x1
        if self.before_smoothing is not None:
            self.before_smoothing(x1)
        self._check_once()
        self._draws += 1
        told = as_times(t, x1)
        seed = self._random(("smooth", self._draws)).getrandbits(63)
        source = self._near(x1, source)
        return self._smoothed.draw(
            x1, self.convention.to_t(told), told, source, seed, self.collapsed
        )

    def _random(self, call: object) -> Random:
        """The generator of this rank, step and call."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return Random(f"{self.seed} {rank} {self._step} {call}")

    @untraced
    def __call__(
        self,
        y: Tensor,
        *,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        labels: Labels | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
        prediction: Prediction | PredictionKind | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The target and the weight of each sample; the first call does what `check` does.

        Args:
            y: Conditional target, (B, *), in the scheme's `convention`, like `xt` and `t`
                (default: t in [0, 1], 0 is noise, and a velocity is data - noise).
            xt: Noisy samples, (B, *).
            t: Times, (B,) or (B, 1, ..., 1), or one number.
            x1: What `xt` was made from, (B, *).
            labels: Class of each sample, (B,), as in `Oracle.posterior`. Used if `class_wise`;
                default the class of the row that x_1 equals.
            mask: Which numbers count, (B, *), as in `Oracle.posterior`. Others do not change.
            source: The row of the bank that each x_1 stands for, (B,), negative for none. Default:
                as `sources` says, or the row that x_1 equals. Give it if x_1 is resampled.
            condition: What the model is given, (B, *), before dropping, for a `ConditionedOracle`.
            prediction: The kind of `y`, default that of the convention, the velocity.

        Returns:
            The target, (B, *), in the dtype of `y`, and the weights, (B,), in that of `t`.

        Raises:
            ValueError: On shapes, times, predictions, classes or labels that do not fit, a boundary
                that is not known yet, an x_1 that is not a row if `on_missing` is "error"; in the
                first call, on arguments that do not fit each other or the bank; and as `check`.
            TypeError: If they are not tensors.
        """
        require_tensors(y=y, xt=xt, x1=x1)
        require_like("y", y, "x1", x1)
        if self.paused:
            return y, torch.ones_like(as_times(t, x1), dtype=torch.float32)
        prediction = Prediction.of(prediction or self.convention.prediction)
        for part in (self.weight, self._sampler):
            if prediction.kind != "velocity" and getattr(part, "of_velocity", False):
                raise ValueError(
                    f"Expected a velocity for {type(part).__name__}, whose floor is that of a "
                    f"velocity, got {prediction.kind!r}. Leave it out, or train on the velocity."
                )
        source = self._source_of(x1, t, source)
        labels = self.with_masks(labels, mask, x1)
        t, added = self._correction(
            *(y, xt, t, x1, prediction), labels=labels, source=source, condition=condition
        )
        weight = self._weight(t)
        if not self._step:  # else steps are counted
            self._wait(1)
        self.last = SchemeRecord(
            t=t.detach(),
            x1=self._as_rows(x1.detach(), labels)[0],
            source=source,
            lam=added.lam,
            weight=weight.detach(),
            added=added.value,
            inserted=added.inserted,
            tail_mass=added.tail_mass,
            smoothed=torch.zeros_like(t) if self.drawn is None else self.drawn.strength,
        )
        if self.target is None:
            return y, weight
        return y + self._signed(added.value, prediction).to(y.dtype), weight

    @untraced
    def correct(
        self,
        *,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        mask: Tensor | None = None,
        prediction: Prediction | PredictionKind | None = None,
        **known: Any,
    ) -> Tensor:
        """`lambda c_t (m - x_1)`: what a call with these arguments adds to the conditional target.

        Returns (B, *), in the dtype of `x1`.
        """
        require_tensors(xt=xt, x1=x1)
        prediction = Prediction.of(prediction or self.convention.prediction)
        known["source"] = self._source_of(x1, t, known.get("source"))
        known["labels"] = self.with_masks(known.get("labels"), mask, x1)
        _, added = self._correction(None, xt, t, x1, prediction, **known)
        return self._signed(added.value, prediction).to(x1.dtype)

    def _signed(self, value: Tensor, prediction: Prediction) -> Tensor:
        return -value if self.convention.sign_of(prediction) < 0 else value

    def _source_of(self, x1: Tensor, t: Times, source: Tensor | None) -> Tensor | None:
        if self._smoothed is None:
            return self._near(x1, source)
        return self._smoothed.source_of(x1, t, source, first=self.last is None)

    def _near(self, x1: Tensor, source: Tensor | None) -> Tensor | None:
        """The rows of samples: given, told by `sources`, or those that an encoder made them of."""
        source = told_sources() if source is None else source
        return near_rows(self, x1) if source is None and self.encoded is not False else source

    @property
    def _around(self) -> SmoothedOracle | None:
        """The oracle of the smoothed rows, if the target is used where samples are smoothed."""
        smoothed = self._smoothed
        if smoothed is None or self.oracle is None or not smoothed.meets(self.target):
            return None
        return smoothed.oracle(self.oracle, self.path, self.collapsed)

    @torch.no_grad()
    def _correction(
        self,
        y: Tensor | None,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        prediction: Prediction,
        **known: Any,
    ) -> tuple[Tensor, Correction]:
        """The times, (B,), and what is added to a target, both in the library's convention."""
        self._check_once()
        require_like("x1", x1, "xt", xt)
        time = as_times(t, xt)
        labels = known.get("labels")
        if time.shape == xt.shape[:1]:
            own = (known["source"], prediction, labels, known.get("condition"))
            check_first(self, y, xt, time, x1, *own)
        xt, t = self.convention.inside(xt, time)
        around = self._around
        kernel = runs_kernel(self.target, self.oracle, labels, x1, self.class_wise)
        check_times(t, len(xt), self.convention, shape_only=around is None and kernel)
        if self.target is None or self.oracle is None:
            return t, Correction.none(x1)
        if not self.class_wise and not self.unconditional and has_classes(labels):
            raise unknown_conditions("labels, and a bank without classes")
        if self.oracle.condition and self.condition_of and known.get("condition") is None:
            known["condition"] = self.condition_of(self.oracle.condition, x1.detach())
        if self.target.lam.needs_boundary:
            self.require_boundary()
        self._calls += 1
        given = xt
        xt = self._as_rows(xt.detach(), labels)[0]
        x1, known["labels"] = self._as_rows(x1.detach(), labels)
        batch = Batch(
            *(xt, t.detach(), x1, prediction, self._random(self._calls)),
            **known,
            class_wise=self.class_wise,
            on_missing=self.on_missing,
            labels_of=None if self.labels_of is None else partial(self.labels_of, x1),
            boundary=self.boundary,
            dtype=(x1 if y is None else y).dtype,
        )
        if around is None:
            added = correct(self.target, self.oracle, batch)
            return t, added._replace(value=cut(added.value, self.oracle.bank.shape, given))
        assert self.drawn is not None
        # Smoothed samples get targets of the smoothed set.
        smoothed = self.drawn.strength > 0
        of_rows, of_smoothed = replace(batch, only=~smoothed), replace(batch, only=smoothed)
        parts = (
            correct(self.target, self.oracle, of_rows),
            correct(self.target, around, of_smoothed),
        )
        return t, Correction(*(a + b for a, b in zip(*parts, strict=True)))

    def check(self, total: int | None = None) -> None:
        """Checks the scheme before the first step, as the first call does; `total` is for `Phases`.

        Raises:
            ValueError: With the cure.
        """
        self.require_boundary()
        if self.oracle is not None and self.target is not None:
            if self.class_wise and self.oracle.engine.holds_all_rows:
                self.oracle.bank.require_classes()
            around = self._around
            self.target.check(self.oracle if around is None else around)
        if self.preserve_objective:
            check_density(self.timesteps, self._bound_weight())
        self._checked = True
