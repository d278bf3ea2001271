r"""The oracle: the marginal velocity of a finite training set, in closed form.

For a Gaussian prior, independent coupling and the bank `x^(1..N)` (Liu et al., arXiv 2512.02826,
Theorem 2.1),

    gamma_i(x_t, t) = softmax_i( -||x_t - a_t x^(i)||^2 / (2 s_t^2) ),   m = sum_i gamma_i x^(i),
    u*(x_t, t) = a'_t m + s'_t (x_t - a_t m) / s_t.

For training targets use `correction`, `c_t (m - x_1)`: added to the conditional target of any
prediction type it gives the oracle's target, and it vanishes exactly where the posterior has
collapsed on `x_1`, where the textbook form divides rounding errors by `s_t`.

**The data end.** At t = 1 (s_t = 0) the weights are the limit t -> 1: all mass on the rows nearest
to `x_t / a_t`. The whole oracle is evaluated at `max(s_t, floor)`, with the floor near 1.5e-6 times
the norm of a row (`engines.base.sigma_floor`); for a query made from a bank row the correction
there is 0. `velocity` at t = 1 has lost the noise direction and returns `a'_t m` only, for paths
whose `s'_t` is finite.

**Not valid** under couplings that make `x_0` and `x_1` dependent (minibatch OT, SD-FM,
Schroedinger bridges): the posterior above assumes independence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.certificate import Certificate
from stagewise.conventions import STAGEWISE, ConventionLike, as_convention, path_of, written
from stagewise.engines import Auto, Engine
from stagewise.masks import cut, fitted, masked
from stagewise.oracle_queries import OracleQueries
from stagewise.paths import LinearPath, Path, Prediction, PredictionKind
from stagewise.posterior import Posterior, replace_queries
from stagewise.queries import Labels, Queries, Times, require_tensors, with_source_weight
from stagewise.tracing import untraced

if TYPE_CHECKING:
    from stagewise.condition import Condition
    from stagewise.smoothing import Smoothing

__all__ = ["Oracle"]


class Oracle(OracleQueries):
    """Knows the exact posterior over a bank: the mean, the oracle's target, its velocity.

    Like the bank it is a plain object; a deep copy returns the oracle itself.

    Args:
        bank: The training latents.
        path: The path of training, default `LinearPath()`.
        engine: How the rows are reached, default `Auto()`: exactly.
        certificate: Which queries need no search, if their source is known
            (`Certificate.compute(bank)`); default None.
        eta: Posterior mass that a certified answer may miss, default 1e-3.
        delta: Probability, over the noise of a query, that it misses more, default 1e-6.
        null_class: The label that stands for "no class" in your training (classifier-free
            guidance): such queries are asked of the whole bank. Default None: only labels that are
            None are.
        convention: In which noisy samples and times are given to `posterior`, `correction` and
            `velocity`, and what these answer; default the library's. See `stagewise.conventions`.

    Raises:
        ValueError: If engine, certificate or convention do not fit the bank and the path.
        ImportError: If the engine needs a library that is not installed.

    Example:
        >>> import torch
        >>> bank = LatentBank(torch.randn(1000, 16))
        >>> oracle = Oracle(bank, LinearPath())
        >>> x0, x1, t = torch.randn(8, 16), bank.rows[:8], torch.rand(8)
        >>> xt = oracle.path.interpolate(x0, x1, t)
        >>> u = x1 - x0 + oracle.correction(xt, t, x1)
        >>> torch.allclose(u, oracle.velocity(xt, t), atol=1e-3)
        True
    """

    smoothing: Smoothing | None = None
    """What its rows stand for: Gaussians around them, for a `SmoothedOracle`."""

    condition: Condition | None = None
    """What weighs its rows by their conditions, for a `ConditionedOracle`."""

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
                "A certificate knows the rows of one rank only: it does not go with Sharded()."
            )
        if certificate is not None:
            certificate.check(bank)

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
        """The posterior over bank rows for each query.

        Args:
            xt: Noisy samples, (B, *) with the bank's sample shape.
            t: Times in [0, 1], (B,), or as `Times`.
            labels: Class of each query, (B,), whole numbers: the posterior is then over the rows of
                that class, which is a valid target for a class-conditional model. Default None:
                over all rows, as for single labels that are None or `null_class`. A list or a CPU
                tensor costs no device sync; one on an accelerator does, unless the engine
                reads it there (`Exact` on CUDA, without `null_class` and certificate), where the
                posterior of an unknown class is NaN, and the next call raises.
            mask: Which numbers of each query count, (B, *), as in `LatentBank`, for a bank with
                masks: the posterior is over rows of that mask. Numbers outside count for nothing.
            source: The row of `bank.rows` each query was made from, (B,), int64, for
                `source_weight` and the certificate; negative where it is not known. Default None.
                `bank.find(x1)` looks it up.
            condition: What the model is given for each query, (B, *), for an oracle with a kernel
                on it (`ConditionedOracle`). Default: that of the `source`.
            k: How many of the largest weights to return, default 1. Where a class has fewer rows
                the rest has weight 0 and row -1.

        Returns:
            The posterior, in float64.

        Raises:
            ValueError: On shapes that do not fit, t outside [0, 1], an unknown class, k below 1 or
                above the rows of the bank, a source that is no row of it, labels that are no whole
                numbers, or queries on a device without float64 (MPS).
            TypeError: If `xt` is no tensor.
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
        """What a kernel on the condition adds to `l` of a row for each query, (B,).

        `rows`: one for each of the queries; default x_1 itself.
        """
        return 0.0

    @torch.no_grad()
    def ask(self, queries: Queries, k: int = 1) -> Posterior:
        """The posterior with its mean as rows, (B, D); `source_weight` may be None.

        Certified queries are answered from what is stored, and the engine is asked for the others.

        Args:
            queries: Of this oracle.
            k: See `posterior`.

        Raises:
            ValueError: If k is below 1 or above the rows of the bank.
        """
        post = self._ask(queries, k)
        if queries.valid is None:
            return post
        # Numbers that are 0 in all rows are off by a rounding.
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
        """`c_t (m - x_1)`: what turns a conditional target into the oracle's.

        Args:
            xt: Noisy samples, (B, *).
            t: See `posterior`.
            x1: The samples `xt` was made from, (B, *). They must be rows of the bank: with others
                the correction is as large as their distance to the bank times `c_t`.
            labels: See `posterior`.
            mask: See `posterior`. Outside of it the correction is 0.
            source: See `posterior`.
            condition: See `posterior`.
            prediction: What the target is, default that of the convention, the velocity.
            posterior: The posterior at these queries if it is known already.

        Returns:
            The correction, (B, *), in the dtype of `x1`.

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
        gap = queries.correction(mean - flat, kind, self.bank.max_norm)
        gap = cut(self.convention.sign_of(kind) * gap, self.bank.shape, x1)
        return gap.to(x1.dtype)

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

        Under a convention that predicts velocities it is the mean of the convention's own target,
        what an ideal model returns: `E[x_0 - x_1 | x_t]` for "pi0" and "diffusers", there for sigma
        and not for a timestep. Others have no velocity of their own.

        Arguments are those of `posterior`.

        Returns:
            The velocity, (B, *), in the dtype of `xt`; 0 outside of the mask.

        Raises:
            ValueError: Under a convention that predicts something else, or counts noise levels; and
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
        """A sample of the set that the oracle is of, around each row.

        Args:
            source: The rows, (B,).
            t: At which times, (B,).
            normals: What a smoothing draws with (`Smoothing.moved`), (B, n); (B, 0) for rows.

        Returns:
            (B, *), float64: here the rows themselves.
        """
        return self.bank.take(source, device=source.device).reshape(-1, *self.bank.shape)

    @property
    def over(self) -> dict[str, str]:
        """What is said with each number of it, if not all rows of a set count alike."""
        said = {"rows_are": self.bank.origin}
        if self.condition is not None:
            said["condition"] = f"rows weighed by {self.condition!r}"
        return {key: value for key, value in said.items() if value}

    def __copy__(self) -> Oracle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Oracle:
        return self

    def __repr__(self) -> str:
        return f"Oracle({self.bank!r}, {self.path!r}, {self.engine!r})"
