r"""The oracle: the marginal velocity of a finite training set, in closed form.

For a Gaussian prior, independent coupling and the bank `x^(1..N)` (Liu et al., arXiv 2512.02826,
Theorem 2.1),

    gamma_i(x_t, t) = softmax_i( -||x_t - a_t x^(i)||^2 / (2 s_t^2) ),   m = sum_i gamma_i x^(i),
    u*(x_t, t) = a'_t m + s'_t (x_t - a_t m) / s_t.

For training targets use `correction`, `c_t (m - x_1)`: added to the conditional target of any
prediction type it gives the oracle's target. Where the posterior has collapsed on `x_1` it is
exactly 0, while the textbook form divides rounding errors by `s_t`.

**The data end.** At t = 1 (s_t = 0) the weights are the limit t -> 1: all mass on the rows nearest
to `x_t / a_t`. The oracle is evaluated at an `s_t` of at least 1.5e-6 times the norm of a row,
about (`Engine.sigma_floor`); for a query made from a row the correction there is 0. At t = 1
`velocity` has lost the noise direction and returns `a'_t m`, if `s'_t` is finite.

**Not valid** under couplings that make `x_0` and `x_1` dependent (minibatch OT, SD-FM,
Schroedinger bridges): the posterior above assumes independence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.building import whole_labels
from stagewise.certificate import Certificate
from stagewise.conventions import STAGEWISE, ConventionLike, as_convention, path_of, written
from stagewise.engines import Auto, Engine, fused
from stagewise.engines.fused_lookup import ends_of
from stagewise.engines.fused_mix import scaled
from stagewise.engines.fused_path import coefficients
from stagewise.masks import as_asked, cut, fitted, masked
from stagewise.paths import LinearPath, Path, PathCoefficients, Prediction, PredictionKind
from stagewise.posterior import Posterior, replace_queries
from stagewise.queries import (
    Labels,
    Queries,
    Times,
    as_times,
    check_times,
    checked_source,
    require_shape,
    require_tensors,
    segments_of,
    with_source_weight,
)
from stagewise.tracing import untraced

if TYPE_CHECKING:
    from stagewise.condition import Condition
    from stagewise.smoothing import Smoothing

__all__ = ["Oracle"]


class Oracle:
    """The exact posterior over a bank: its mean, the oracle's target, its velocity.

    A plain object, as the bank is; a deep copy returns the oracle itself.

    Args:
        bank: The training latents.
        path: The path of training, default `LinearPath()`.
        engine: How the rows are reached, default `Auto()`: exactly.
        certificate: Which queries need no search, if their source is known
            (`Certificate.compute(bank)`); default None.
        eta: Posterior mass that a certified answer may miss, default 1e-3.
        delta: Probability, over the noise of a query, that it misses more, default 1e-6.
        null_class: The label that means "no class" in your training (classifier-free guidance):
            its posterior is over the whole bank, as for labels that are None. Default None.
        convention: The convention of the noisy samples, times and answers of `posterior`,
            `correction` and `velocity`, default the library's. See `stagewise.conventions`.

    Raises:
        ValueError: If engine, certificate or convention do not fit the bank and the path.
        ImportError: If the engine needs a library that is not installed.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, LinearPath, Oracle
        >>> bank = LatentBank(torch.randn(1000, 16))
        >>> oracle = Oracle(bank, LinearPath())
        >>> x0, x1, t = torch.randn(8, 16), bank.rows[:8], torch.rand(8)
        >>> xt = oracle.path.interpolate(x0, x1, t)
        >>> u = x1 - x0 + oracle.correction(xt, t, x1)
        >>> torch.allclose(u, oracle.velocity(xt, t), atol=1e-3)
        True
    """

    smoothing: Smoothing | None = None
    """The Gaussians around the rows of a `SmoothedOracle`."""

    condition: Condition | None = None
    """The kernel that weighs the rows of a `ConditionedOracle`."""

    def __init__(
        self,
        bank: LatentBank,
        path: Path | None = None,
        engine: Engine | None = None,
        *,
        certificate: Certificate | None = None,
        eta: float = 1e-3,
        delta: float = 1e-6,
        null_class: int | None = None,
        convention: ConventionLike = STAGEWISE,
    ) -> None:
        for name, value in (("eta", eta), ("delta", delta)):
            if not 0 < value < 1:
                raise ValueError(f"Expected `{name}` between 0 and 1, got {value}.")
        self.bank = bank
        self.convention = as_convention(convention)
        self.path = path_of(self.convention, path) or LinearPath()
        self.engine = engine or Auto()
        self.certificate, self.eta, self.delta = certificate, eta, delta
        self.null_class = null_class
        self.engine.prepare(bank)
        if certificate is not None and not self.engine.holds_all_rows:
            raise ValueError(
                "A certificate knows the rows of one rank only: leave it out with Sharded()."
            )
        if certificate is not None:
            certificate.check(bank)

    def _inside(self, xt: Tensor, t: Times) -> tuple[Tensor, Times]:
        """Noisy samples and times of the `convention` in that of the library."""
        require_tensors(xt=xt)
        if self.convention == STAGEWISE:
            return xt, t
        xt, t = self.convention.inside(xt, as_times(t, xt))
        check_times(t, len(xt), self.convention)
        return xt, t

    def queries(
        self,
        xt: Tensor,
        t: Times,
        labels: Labels | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Queries:
        """The checked queries of `ask`, from arguments of `posterior` in the library's convention.

        Raises:
            ValueError: As `posterior`.
        """
        if condition is not None:
            raise ValueError(
                f"Expected an oracle with a kernel on the `condition`, got {self!r}: "
                "ConditionedOracle(bank, path, Condition(bandwidth=...))."
            )
        xt, valid, own = as_asked(self.bank, xt, labels, self.null_class)
        require_shape(self.bank, "xt", xt)
        if xt.device.type == "mps":
            raise ValueError("The oracle needs float64, which MPS lacks. Use the CPU.")
        count, times = len(xt), as_times(t, xt)
        names: list[int | None] | None = None
        ends = wrong = None
        if (own is None or isinstance(own, Tensor)) and self.reads_on_device(own, xt):
            check_times(times, count, shape_only=True)
            asked = own if own is None else whole_labels(own, count)
            ends, wrong = fused.runs(ends_of, self.bank, times.detach(), asked) or (None, None)
        if wrong is None:
            check_times(times, count)
        else:
            self.bank.report(wrong)
        flat, path = self.coefficients(xt, times)
        if own is not None and ends is None:
            names = whole_labels(own, count).tolist() if isinstance(own, Tensor) else list(own)
            if len(names) != count:
                raise ValueError(f"Expected `labels` with shape ({count},), got ({len(names)},).")
            if self.null_class is not None:
                names = [None if name == self.null_class else name for name in names]
        if source is not None:
            source = checked_source(source, count, self.engine.num_rows(self.bank))
            source = source.to(flat.device, torch.int64)
        segments: Sequence[slice] | None = () if ends is None else None
        if self.engine.holds_all_rows and (own is None or ends is None):
            segments = segments_of(self.bank, names, count)
        return Queries(flat, path, segments, source, names, xt.dtype, ends=ends, valid=valid)

    def coefficients(self, xt: Tensor, t: Tensor) -> tuple[Tensor, PathCoefficients]:
        """Noisy samples, (B, D), and the path at their times, (B,), float64, sigma floored."""
        flat = xt.detach().flatten(1).double()
        least = self.engine.sigma_floor(self.bank)
        return flat, coefficients(self.bank, self.path, t, flat.device, least)

    def reads_on_device(self, labels: Tensor | None, xt: Tensor) -> bool:
        """Whether labels stay on the device, which saves a sync."""
        plain = self.certificate is None and self.null_class is None
        there = labels is None or labels.device == xt.device
        return plain and there and self.engine.reads_ends(self.bank, xt.device, len(xt))

    @untraced
    @torch.no_grad()
    def posterior(
        self,
        xt: Tensor,
        t: Times,
        labels: Labels | None = None,
        *,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
        k: int = 1,
    ) -> Posterior:
        """The posterior over the rows of the bank for each query.

        Args:
            xt: Noisy samples, (B, *) with the bank's sample shape.
            t: Times in [0, 1], (B,), or as `Times`.
            labels: Class of each query, (B,), whole numbers: the posterior is then over the rows of
                that class, a valid target for a class-conditional model. None, or a label that is
                None or `null_class`: over all rows. Default None. A list or a CPU tensor costs no
                device sync; a tensor on an accelerator costs one, unless the engine reads it there
                (`Exact` on CUDA, without `null_class` and certificate), where the posterior of an
                unknown class, or at a time out of range, is NaN, and the next call raises.
            mask: Which numbers of each query count, (B, *), for a bank with masks: the posterior is
                over the rows of the same mask. Default None.
            source: The row of `bank.rows` that each query was made from, (B,), int64, for
                `source_weight` and the certificate; negative if unknown. Default None.
                `bank.find(x1)` looks it up.
            condition: What the model is given for each query, (B, *), for a `ConditionedOracle`.
                Default: the condition of the `source`.
            k: How many of the largest weights to return, default 1. If fewer have a weight above 0,
                the rest has weight 0, and may have row -1.

        Returns:
            The posterior, in float64.

        Raises:
            ValueError: On shapes that do not fit, t outside [0, 1], an unknown class, k below 1 or
                above the rows of the bank, a source that is not a row, labels that are not whole
                numbers, or queries on a device without float64 (MPS).
            TypeError: If `xt` is not a tensor.
        """
        labels = masked(labels, mask, xt)
        queries = self.queries(*self._inside(xt, t), labels, source, condition)
        with torch.autocast(queries.xt.device.type, enabled=False):
            post = self.ask(queries, k)
            if queries.source is not None:
                added = self.log_kernel(queries, queries.source)
                post = with_source_weight(post, self.bank, queries, added)
        return replace(post, mean=cut(post.mean, self.bank.shape, xt))

    def log_kernel(self, queries: Queries, rows: Tensor | None = None) -> Tensor | float:
        """What a kernel on the condition adds to `l` of one row per query, (B,); default x_1."""
        return 0.0

    @torch.no_grad()
    def ask(self, queries: Queries, k: int = 1) -> Posterior:
        """The posterior of `queries` with its mean as rows, (B, D); `source_weight` may be None.

        The certificate answers what it can, the engine the other queries. Raises a ValueError if k
        is below 1 or above the rows of the bank.
        """
        post = self._ask(queries, k)
        if queries.valid is None:
            return post
        # Outside of the mask the mean of zeros may be off by a rounding.
        return replace(post, mean=post.mean.where(queries.valid, 0))

    def _ask(self, queries: Queries, k: int) -> Posterior:
        rows = self.engine.num_rows(self.bank)
        if not 1 <= k <= rows:
            raise ValueError(f"Expected `k` from 1 to the {rows} rows of the bank, got {k}.")
        if not len(queries) and not self.engine.collective:
            return Posterior.empty(queries.xt, k)
        with torch.autocast(queries.xt.device.type, enabled=False):
            answer = None
            if self.certificate is not None and queries.source is not None:
                answer = self.certificate.answer(
                    self.bank, queries, k, eta=self.eta, delta=self.delta
                )
            if answer is None:
                return self.engine.posterior(self.bank, queries, k)
            post, left = answer
            if not left:
                return post
            searched = self.engine.posterior(self.bank, queries.select(left), k)
            return replace_queries(post, left, searched, len(queries))

    @untraced
    def correction(
        self,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        labels: Labels | None = None,
        *,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
        prediction: Prediction | PredictionKind | None = None,
        posterior: Posterior | None = None,
    ) -> Tensor:
        """`c_t (m - x_1)`: added to a conditional target it gives the oracle's.

        `x1`, (B, *), is what `xt` was made from. It must be rows of the bank: for others the
        correction is as large as their distance to the bank times `c_t`. `prediction` is the kind
        of target, default that of the convention, the velocity; `posterior` that of these queries
        if it is known already. Other arguments are those of `posterior`.

        Returns:
            The correction, (B, *), in the dtype of `x1`; 0 outside of the mask.

        Raises:
            ValueError: As `posterior`, or if `x1` has another shape than `xt`.
            TypeError: As `posterior`.
        """
        require_tensors(xt=xt, x1=x1)
        if x1.shape != xt.shape:
            raise ValueError(
                f"Expected `x1` with the shape of `xt`, {tuple(xt.shape)}, got {tuple(x1.shape)}."
            )
        labels = masked(labels, mask, xt)
        queries = self.queries(*self._inside(xt, t), labels, source, condition)
        flat = fitted(x1.detach(), labels, self.bank.shape)[0].flatten(1).to(queries.xt)
        queries = replace(queries, x1=flat)
        if posterior is None:
            mean = self.ask(queries).mean
        else:
            mean = fitted(posterior.mean, labels, self.bank.shape)[0].flatten(1)
        kind = Prediction.of(prediction or self.convention.prediction)
        sign = self.convention.sign_of(kind)
        gap = scaled(self.bank, queries, mean - flat, kind, sign, x1.dtype)
        return cut(gap, self.bank.shape, x1)

    @untraced
    def velocity(
        self,
        xt: Tensor,
        t: Times,
        labels: Labels | None = None,
        *,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The marginal velocity `u*(x_t, t)`; at sigma = 0 see the module docstring.

        With a convention that predicts velocities it is the mean of the convention's own target, as
        an ideal model returns it: `E[x_0 - x_1 | x_t]` for "pi0" and "diffusers" (for the latter
        per unit of sigma, not per timestep). Arguments are those of `posterior`.

        Returns:
            The velocity, (B, *), in the dtype of `xt`; 0 outside of the mask.

        Raises:
            ValueError: With a convention that predicts something else, or counts noise levels; and
                as `posterior`.
        """
        if self.convention.by_sigma or self.convention.prediction.kind != "velocity":
            raise ValueError(
                f"Expected a convention that predicts velocities, got {written(self.convention)}. "
                "In the library's convention, d x_t / dt with t = 0 noise: "
                "oracle.inner.velocity(*oracle.convention.inside(xt, time))."
            )
        queries = self.queries(*self._inside(xt, t), masked(labels, mask, xt), condition=condition)
        path, mean = queries.path, self.ask(queries).mean
        noise = (queries.xt - path.alpha[:, None] * mean) / path.sigma[:, None]
        velocity = path.d_alpha[:, None] * mean + path.d_sigma[:, None] * noise
        return cut(self.convention.sign * velocity, self.bank.shape, xt).to(xt.dtype)

    @property
    def inner(self) -> Oracle:
        """The same oracle in the library's convention."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), convention=STAGEWISE)
        return made

    def sample(self, source: Tensor, t: Tensor, normals: Tensor) -> Tensor:
        """Samples of the oracle's set around rows, (B,), at times, (B,): here the rows themselves.

        `normals`, (B, n), are the draws of a smoothing. Returns (B, *), float64.
        """
        return self.bank.take(source, device=source.device).reshape(-1, *self.bank.shape)

    @property
    def over(self) -> dict[str, str]:
        """What logs add to each number if the rows are not a whole set, or do not count alike."""
        notes = {"rows_are": self.bank.origin}
        if self.condition is not None:
            notes["condition"] = f"rows weighed by {self.condition!r}"
        return {key: value for key, value in notes.items() if value}

    def __copy__(self) -> Oracle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Oracle:
        return self

    def __repr__(self) -> str:
        return f"Oracle({self.bank!r}, {self.path!r}, {self.engine!r})"
