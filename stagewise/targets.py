r"""Targets: the conditional one, moved towards the oracle's.

For a target `y = c_t x_1 + b_t x_t` and a set of rows with posterior mean m,

    target = y + lambda c_t (m - x_1).

The source is always in the set *as it is*: with `l_i = -||x_t - a x^(i)||^2 / 2 s^2`, `e = exp(l)`,

    m - x_1 = sum_{i in others} e_i (x^(i) - x_1) / (e_{x_1} + sum_{i in others} e_i),           (1)

where the others are the rows of the set without the row that x_1 stands for. From a posterior over
a set that holds that row as `x^(s)` (evidence Z, mean m', `gamma = e_s / Z`; 0 if it is not there)

    m - x_1 = [m' - x_1 - gamma (x^(s) - x_1)] / (1 - gamma + e_{x_1} / Z).                      (2)

If x_1 is the stored row this is exactly `m' - x_1`. If it is a resampled twin of the row, x_1
replaces it. If it is not a row, it is added to the set.

**What is unbiased** (the optimum of the regression stays the oracle): both targets. A set of rows S
that was drawn for a source i is an unbiased reference if every member could have been its source
with the same probability, `P(S | i) = P(S | j)`: given S and `x_t` each is then the source with its
own weight in S (Bertrand et al., arXiv 2506.03719, Prop. 2). Rows drawn from *all* rows and counted
once, with x_1 in any case, are such a set (drawn from the others, with replacement and counted as
often as drawn, they are not).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from stagewise.engines import Exact, fused
from stagewise.engines.nearest import draw_rows
from stagewise.lambdas import Constant, Lambda, LambdaLike
from stagewise.oracle import Oracle
from stagewise.paths import expand_like
from stagewise.posterior import Posterior, posterior_of, upload
from stagewise.products import full_precision
from stagewise.queries import Queries

__all__ = ["Mix", "TargetMean", "ReferenceSet", "Target", "mix_target"]


@dataclass(frozen=True)
class TargetMean:
    """The posterior mean of a target, as its difference from x_1.

    Attributes:
        difference: `m - x_1`, (B, D), float64.
        top1: Largest weight in the set, (B,), float64.
        tail_mass: Share of the posterior that was left out, (B,), float64.
    """

    difference: Tensor
    top1: Tensor
    tail_mass: Tensor


class Target(ABC):
    """The rows of a posterior mean, and lambda: the base of `Mix` and `ReferenceSet`.

    Args:
        lam: A number in [0, 1]; "boundary" (1 in navigation, 0 in refinement); `Smooth(width)`;
            `Concentration()`. Default 1.
    """

    reads_rows = True
    """Whether it reads rows itself, not only through the oracle."""

    def __init__(self, lam: LambdaLike = 1.0) -> None:
        self.lam = Lambda.of(lam)

    @abstractmethod
    def mean(self, oracle: Oracle, queries: Queries, draws: Random) -> TargetMean:
        """The posterior mean of x_1 over the target's rows, less x_1.

        Args:
            oracle: Bank and path.
            queries: Of that oracle, with `x1` and `twin`.
            draws: Of random rows.
        """

    def check(self, oracle: Oracle) -> None:
        """Refuses an oracle that the target cannot work with, with the cure."""
        if self.reads_rows and oracle.smoothing is not None:
            raise ValueError(
                f"{self!r} reads rows, and does not know the Gaussians that {oracle.smoothing!r} "
                "puts around them. Use Mix, or the plain Oracle(bank, path)."
            )
        if self.reads_rows and oracle.condition is not None:
            raise ValueError(
                f"{self!r} reads rows, and does not weigh them by {oracle.condition!r}. Use Mix."
            )
        if self.reads_rows and not oracle.engine.holds_all_rows:
            raise ValueError(
                f"{self!r} needs the rows of the whole bank, of which a rank of Sharded() has only "
                "its part. Use Mix, or give each rank the same memory-mapped bank: "
                "LatentBank.open(path)."
            )

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"


class Mix(Target):
    """Mixes the oracle's target into the conditional one: `u + lambda (u* - u)`. Unbiased.

    With lambda 1 the target has no variance given `x_t`. Its optimum is the same, memorizing one as
    that of the conditional target: it is not a regulariser.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Mix, Oracle, Scheme
        >>> x1 = torch.randn(64, 8)
        >>> scheme = Scheme(Oracle(LatentBank(x1)), target=Mix("boundary"), boundary=0.3)
        >>> x0, t = torch.randn_like(x1), torch.rand(64)
        >>> xt = scheme.path.interpolate(x0, x1, t)
        >>> u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)
        >>> torch.equal(u[t > 0.3], (x1 - x0)[t > 0.3])  # after the boundary nothing changes
        True
    """

    reads_rows = False

    def posterior(self, oracle: Oracle, draws: Random, queries: Queries, k: int) -> Posterior:
        """What kernels put into formula (2)."""
        return oracle.ask(queries, k)

    @override
    def mean(self, oracle: Oracle, queries: Queries, draws: Random) -> TargetMean:
        """Formula (2), or m - x_1 for an x_1 drawn from a smoothed set."""
        # k=2, because the largest weight may be that of the row x_1 stands for.
        post, x1, twin = oracle.ask(queries, k=2), queries.x1, queries.twin
        assert x1 is not None
        assert twin is not None
        if oracle.smoothing is not None:
            return TargetMean(post.mean - x1, post.top1, post.tail_mass)
        row, there = x1, twin >= 0
        if oracle.engine.holds_all_rows:  # otherwise the row may lie on another rank
            stored = oracle.bank.take(twin.clamp_min(0), device=x1.device)
            row = torch.where(there[:, None], stored, x1)
            on_host = x1.device.type == "cpu" and type(x1) is Tensor
            if on_host and oracle.condition is None and there.all() and torch.equal(row, x1):
                return TargetMean(post.mean - x1, post.top1, post.tail_mass)  # total is 1
        gamma = queries.log_weight(row) + oracle.log_kernel(queries, twin)
        gamma = torch.exp(gamma - post.log_evidence).clamp_max(1)
        gamma = torch.where(there, gamma, 0.0)
        own = queries.log_weight(x1) + oracle.log_kernel(queries)
        own = torch.exp(own - post.log_evidence)
        total = (1 - gamma + own).clamp_min(torch.finfo(own.dtype).tiny)
        gap = post.mean - x1 - gamma[:, None] * (row - x1)
        others = post.weights.masked_fill(post.rows == twin[:, None], 0).amax(1)
        top1 = torch.where(own.isinf(), 1.0, torch.maximum(others, own) / total)
        return TargetMean(gap / total[:, None], top1, post.tail_mass)


class ReferenceSet(Target):
    """Mixes in the mean over x_1 and M - 1 random rows, not over the whole bank. Unbiased.

    As EFM (arXiv 2506.03719) and STF (arXiv 2302.00670) do. It removes nearly all variance of the
    target where many rows carry the posterior, at the cost of M
    rows; near the data, where few do, it seldom holds them.

    The error of m has a variance of about `var(x_1) / M` where many rows carry the posterior. If
    the B queries of a call have sets of their own, it falls with B as the plain target's does. If
    they share one, it is common to all of them and does not: the gradient then has less variance
    than with the plain target only if M is well above B, some 10 times.

    Args:
        size: M, at least 2. Rows that were drawn twice count once; a class of no more than M rows
            gives all.
        lam: See `Target`.
        shared: Whether the queries of a call that look at the same rows (the bank, or a class)
            share their set. It is then one matrix product instead of B M gathered rows. Default
            False.

    Raises:
        ValueError: If `size` is below 2.
    """

    def __init__(self, size: int, lam: LambdaLike = 1.0, *, shared: bool = False) -> None:
        super().__init__(lam)
        if size < 2:
            raise ValueError(f"Expected `size` of at least 2 (x_1 and one row), got {size}.")
        self.size, self.shared = size, shared

    @override
    def check(self, oracle: Oracle) -> None:
        super().check(oracle)
        if self.size > len(oracle.bank):
            raise ValueError(
                f"Expected `size` of at most {len(oracle.bank)}, the rows of the bank, got "
                f"{self.size}. For all rows use Mix()."
            )

    def posterior(self, oracle: Oracle, draws: Random, queries: Queries, k: int) -> Posterior:
        """What kernels put into formula (2), whose set has the row that x_1 stands for."""
        assert queries.twin is not None
        others = _drawn_rows(oracle, queries, self.size - 1, draws, self.shared)
        table = torch.cat([queries.twin[:, None], others], dim=1)
        return fused.posterior(oracle.bank, queries, k, table.shape[1], table)

    @override
    def mean(self, oracle: Oracle, queries: Queries, draws: Random) -> TargetMean:
        """Formula (1)."""
        x1, queries = queries.x1, queries.on_host()
        assert x1 is not None
        rows = _shared_rows if self.shared else _own_rows
        others = rows(oracle, queries, self.size - 1, draws)
        gap = others.log_evidence - queries.log_weight(x1)
        share = torch.sigmoid(gap)
        top1 = torch.maximum(torch.sigmoid(-gap), share * others.top1)
        return TargetMean(share[:, None] * (others.mean - x1), top1, torch.zeros_like(top1))


def _drawn_rows(
    oracle: Oracle, queries: Queries, count: int, draws: Random, shared: bool = False
) -> Tensor:
    """`count` random rows for each query, each once and without its twin; -1 for none, (B, n).

    Those of `shared` are the same for all queries of a class.
    """
    assert queries.twin is not None
    bank, device = oracle.bank, queries.xt.device
    first, stop = queries.ends_on_device[:, :1], queries.ends_on_device[:, 1:]
    sizes, here = stop - first, queries.segments is not None
    generator = np.random.default_rng(draws.getrandbits(64))
    sets = len(queries) if not shared else 1 if here else len(bank.classes)
    places = upload(torch.from_numpy(generator.random((sets, count))), device)
    if shared and not here:
        firsts = bank.class_table(device)[:, 1].contiguous()
        places = places[torch.searchsorted(firsts, first[:, 0].contiguous())]
    rows = (places * sizes).long()
    if (min(queries.sizes) if here else bank.smallest_class) - 1 <= count:  # those give all rows
        every = torch.arange(count + 1, device=device)
        rows = torch.where(
            sizes - 1 <= count, every.where(every < sizes, -1), pad(rows, (0, 1), value=-1)
        )
    rows = rows.sort(1).values
    twice = rows[:, 1:] == rows[:, :-1]
    rows[:, 1:] = rows[:, 1:].masked_fill(twice, -1)
    table = (rows + first).masked_fill(rows < 0, -1)
    return table.masked_fill(table == queries.twin[:, None], -1)


def _own_rows(oracle: Oracle, queries: Queries, count: int, draws: Random) -> Posterior:
    """The posterior over random rows of each query."""
    table = _drawn_rows(oracle, queries, count, draws)
    # Its check costs syncs on an accelerator; there are few rows, and their differences are exact.
    exact = Exact("auto" if table.device.type == "cpu" else "float32")
    with full_precision():
        return exact.solve(oracle.bank, queries, 1, table=table)


def _shared_rows(oracle: Oracle, queries: Queries, count: int, draws: Random) -> Posterior:
    """The same, over random rows that queries of the same segment share."""
    parts, order = [], []
    for at, segment in queries.groups:
        some = queries.select(at)
        assert some.twin is not None
        # One more, as one may be a query's own: each takes the first of the others.
        rows = some.index(draw_rows(segment, count + 1, draws))
        others = rows != some.twin[:, None]
        others &= others.cumsum(1) <= count
        x = oracle.bank.take(rows, device=rows.device)
        post, shares = posterior_of(some.log_weights(x), rows.where(others, -1), 1)
        parts.append(replace(post, mean=shares @ x))
        order += at
    return Posterior.cat(parts, order)


def mix_target(y: Tensor, correction: Tensor, lam: Tensor | float) -> Tensor:
    """Goes from the conditional target towards the oracle's: `y + lambda * correction`.

    Args:
        y: Conditional target, (B, *).
        correction: `c_t (m - x_1)`, (B, *): `Oracle.correction`.
        lam: In [0, 1]: a number, or one for each sample, (B,). Tensors are not checked, which on an
            accelerator would wait for the device.

    Returns:
        (B, *), in the dtype of `y`.

    Raises:
        ValueError: If `lam` is a number outside of [0, 1].
    """
    if not isinstance(lam, Tensor):
        lam = Constant(lam).value
    elif lam.ndim:
        lam = expand_like(lam, y)
    return y + (lam * correction).to(y.dtype)
