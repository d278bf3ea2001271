r"""The two stages of a training target, measured and predicted.

At each t queries are made from rows of the bank, `x_t = a_t x^(i) + s_t x_0`. Early, many rows
carry the posterior (**navigation**); late, one does (**refinement**). The mean largest weight
`E max_i gamma_i` rises with t from 1/N to 1, and the **boundary** is where it crosses 0.5
(`midpoint`) and 0.99 (`collapsed`) (Liu et al., arXiv 2512.02826, Fig. 2).

`stagewise.spectrum` predicts the boundary without a query.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from stagewise.masks import compared_within, mean_square
from stagewise.oracle import Labels, Oracle
from stagewise.queries import check_times
from stagewise.spectrum import predicted_boundary

__all__ = [
    "STATISTICS",
    "Recipe",
    "StageBoundary",
    "StageCurve",
    "loss_floor",
    "require_curve",
    "require_whole_bank",
    "stage_edges",
    "stratified_times",
]

STATISTICS = ("top1", "entropy", "ess", "source_weight", "target_difference")
"""What is measured per query: largest weight, entropy in nats, effective sample size, weight of
the source row, and the mean over the numbers that count of (conditional - oracle velocity)^2."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a stage curve is measured: `edges` of the strata of t, (T + 1,), `queries` in each."""

    oracle: Oracle
    class_wise: bool
    edges: Tensor
    queries: int
    seed: int

    @classmethod
    def of(
        cls, oracle: Oracle, class_wise: bool, strata: int = 24, queries: int = 64, seed: int = 0
    ) -> Recipe:
        """A recipe with more strata near the predicted boundary."""
        predicted = predicted_boundary(oracle.bank, oracle.path, class_wise=class_wise)
        return cls(oracle, class_wise, stage_edges(predicted, strata), queries, seed)

    def times(self, seed: int | tuple[int, ...]) -> Tensor:
        """Times of the queries, (T, Q)."""
        return stratified_times(self.edges, self.queries, seed=seed)

    def measure(self, step: int, **where: Any) -> StageCurve:
        """Measures the curve; the same step gives the same queries. `where` as in `StageCurve`."""
        seed, t = (self.seed, step, 1), self.times((self.seed, step))
        return StageCurve.measure(self.oracle, t, seed=seed, class_wise=self.class_wise, **where)


@dataclass(frozen=True)
class StageBoundary:
    """Where the stages meet, with bootstrap intervals.

    NaN: not reached at any measured t. 0: passed already at the smallest measured t.

    Attributes:
        midpoint: t at which the mean largest weight crosses 0.5; its interval is from
            `midpoint_low` to `midpoint_high`, which is 1 if replicates do not reach it.
        collapsed: t at which it crosses 0.99, with `collapsed_low` and `collapsed_high`.
        confidence: Nominal coverage of the intervals.
    """

    midpoint: float
    midpoint_low: float
    midpoint_high: float
    collapsed: float
    collapsed_low: float
    collapsed_high: float
    confidence: float

    def as_dict(self) -> dict[str, float]:
        """The fields as plain floats."""
        return asdict(self)


@dataclass(frozen=True)
class StageCurve:
    """How concentrated the posterior is over t: T strata with Q queries each.

    Attributes:
        t: Time of each query, (T, Q), float64; each row lies in one stratum, rows ascend.
        values: The statistics, (S, T, Q) in the order of `STATISTICS`, float64, on the CPU.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle, StageCurve
        >>> curve = StageCurve.measure(Oracle(LatentBank(torch.randn(300, 32))))
        >>> curve.mean("top1").shape  # one for each stratum
        torch.Size([24])
        >>> boundary = curve.boundary()
        >>> boundary.midpoint_low <= boundary.midpoint <= boundary.midpoint_high
        True
    """

    t: Tensor
    values: Tensor

    @classmethod
    def measure(
        cls,
        oracle: Oracle,
        t: Tensor | None = None,
        *,
        seed: int | tuple[int, ...] = 0,
        class_wise: bool | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
    ) -> StageCurve:
        """Measures the curve with queries made from random rows of the bank.

        Args:
            oracle: Bank and path.
            t: Time of each query, (T, Q), as from `stratified_times`. Default those of `Recipe.of`.
            seed: Of the rows and the noise; the same seed gives the same queries on every device,
                rank and number of ranks. Default 0. Global generators are not used.
            class_wise: Whether the posterior is over the rows of the query's own class, default
                "auto": if the bank has classes.
            device: Where to compute, default the bank's.
            rank: With `world_size` above 1 only every `world_size`-th query, from `rank` on, is
                computed and the others are 0: sum `values` over the ranks.
            world_size: Number of ranks, default 1.
            batch_size: Queries per batch, default 512, fewer if D is above 2^16.

        Raises:
            ValueError: If `t` has another shape or is outside [0, 1], or `class_wise` is true and
                the bank has no labels.
        """
        if class_wise == "auto":
            class_wise = oracle.bank.labelled
        if t is None:
            t = Recipe.of(oracle, class_wise).times(seed)
            # The rows must not depend on the draws of the times.
            seed = (*seed, 1) if isinstance(seed, tuple) else (seed, 1)
        if t.ndim != 2:
            raise ValueError(f"Expected `t` with shape (T, Q), got {tuple(t.shape)}.")
        check_times(t.flatten(), t.numel())
        if class_wise:
            oracle.bank.require_classes()
        batch_size = batch_size or max(16, min(512, 2**25 // oracle.bank.dim))
        bank, device = oracle.bank, torch.device(device or oracle.bank.device)
        t = t.double()
        draws = np.random.default_rng(seed)
        rows = draws.integers(len(bank), size=t.numel()).tolist()
        noise_seeds = draws.integers(2**62, size=t.numel()).tolist()
        values = torch.zeros(len(STATISTICS), t.numel(), dtype=torch.float64)
        generator = torch.Generator()
        for first in range(rank, t.numel(), batch_size * world_size):
            # One noise seed per query, so that the split over ranks and batches changes nothing.
            batch = range(t.numel())[first : first + batch_size * world_size : world_size]
            noise = [_noise(oracle, generator.manual_seed(noise_seeds[i])) for i in batch]
            at = torch.tensor(list(batch))
            x0, times = torch.stack(noise).to(device), t.flatten()[at].to(device)
            values[:, at] = _ask(oracle, x0, times, [rows[i] for i in batch], class_wise).cpu()
        return cls(t, values.reshape(len(STATISTICS), *t.shape))

    def statistic(self, name: str) -> Tensor:
        """One of `STATISTICS` per query, (T, Q)."""
        return self.values[STATISTICS.index(name)]

    def mean(self, name: str) -> Tensor:
        """Mean of a statistic per stratum, (T,)."""
        return self.statistic(name).mean(1)

    def quantile(self, name: str, q: float) -> Tensor:
        """Quantile of a statistic over the queries of each stratum, (T,)."""
        return self.statistic(name).quantile(q, dim=1)

    @property
    def times(self) -> Tensor:
        """Mean time of each stratum, (T,)."""
        return self.t.mean(1)

    def boundary(
        self, *, replicates: int = 200, confidence: float = 0.95, seed: int = 0
    ) -> StageBoundary:
        """Where the mean largest weight crosses 0.5 and 0.99.

        The means over halves of the strata are fitted by a function that grows with t (isotonic
        regression), and the crossing is interpolated. The interval is the percentile bootstrap over
        the queries within each stratum. At 95 % and 64 queries it covered the midpoint in 39 of 40
        simulated trials, and `collapsed`, which depends on rare queries, in 35.

        Args:
            replicates: Bootstrap replicates, default 200.
            confidence: Coverage, default 0.95.
            seed: Of the replicates, default 0.
        """
        top1, t = self.statistic("top1").numpy(), self.t.numpy()
        queries = t.shape[1]
        # Half a stratum: narrow enough for a steep curve, with enough queries for a level of 0.99.
        middle = (t.min(1, keepdims=True) + t.max(1, keepdims=True)) / 2
        half = 2 * np.arange(len(t))[:, None] + (t > middle)
        draws = np.random.default_rng(seed)

        def crossings(counts: np.ndarray) -> tuple[float, float]:
            weight, time, total = (
                np.bincount(half.ravel(), (counts * value).ravel(), 2 * len(t))
                for value in (1.0, t, top1)
            )
            kept = weight > 0
            weight, time, total = weight[kept], time[kept], total[kept]
            return _crossings(time / weight, total / weight, weight, (0.5, 0.99))

        found = crossings(np.ones_like(top1))
        share = np.full(queries, 1 / queries)
        again = [
            crossings(draws.multinomial(queries, share, size=len(top1)).astype(float))
            for _ in range(replicates)
        ]
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        low, high = np.percentile(np.nan_to_num(np.array(again), nan=1.0), tails, axis=0).tolist()
        return StageBoundary(found[0], low[0], high[0], found[1], low[1], high[1], confidence)


def loss_floor(curve: StageCurve, t: Tensor) -> Tensor:
    """The irreducible loss `J*(t)` at times of any shape, in their dtype. Costs no device sync.

    The mean square of conditional minus oracle velocity over the D numbers of a sample, linear
    between the strata of the `curve`, constant before the first and after the last.
    """
    times, means = (x.to(t.device) for x in (curve.times, curve.mean("target_difference")))
    at = torch.minimum(t.double().maximum(times[0]), times[-1])
    right = torch.searchsorted(times, at.contiguous()).clamp(1, len(times) - 1)
    share = (at - times[right - 1]) / (times[right] - times[right - 1])
    return torch.lerp(means[right - 1], means[right], share).to(t.dtype)


def require_curve(curve: StageCurve) -> None:
    """Refuses anything but a measured curve."""
    if not isinstance(curve, StageCurve):
        raise TypeError(
            f"Expected `curve` to be a StageCurve, got {type(curve).__name__}: "
            "curve = StageCurve.measure(oracle)."
        )


def require_whole_bank(oracle: Oracle) -> None:
    """Refuses to measure the boundary of a bank that is spread over the ranks."""
    if not oracle.engine.holds_all_rows:
        raise ValueError(
            "Expected a bank with all rows, got one spread over the ranks, whose boundary cannot "
            "be measured. Give the boundary: Scheme(boundary=...)."
        )


def _noise(oracle: Oracle, generator: torch.Generator) -> Tensor:
    """`x_0`, followed by the normals of a draw from a smoothed set."""
    parts = [oracle.bank.dim, oracle.smoothing.num_normals if oracle.smoothing else 0]
    return torch.cat([torch.randn(n, dtype=torch.float32, generator=generator) for n in parts])


def _ask(oracle: Oracle, noise: Tensor, t: Tensor, rows: list[int], class_wise: bool) -> Tensor:
    """The `STATISTICS` of queries from `rows` with the noise (B, D or more), as (S, B)."""
    oracle = oracle.inner
    bank, x0 = oracle.bank, noise[:, : oracle.bank.dim]
    source = torch.tensor(rows, device=x0.device)
    x1 = oracle.sample(source, t, noise[:, bank.dim :])
    xt = oracle.path.interpolate(x0.double().reshape(x1.shape), x1, t)
    own: Labels | None = bank.labels_of(rows) if class_wise else None
    if bank.pairs is not None:
        own = compared_within(bank.classes_of(rows), class_wise)
    post = oracle.posterior(xt, t, own, source=source)
    gap = oracle.correction(xt, t, x1, own, source=source, posterior=post)
    difference = mean_square(gap, own)
    assert post.source_weight is not None
    return torch.stack([post.top1, post.entropy, post.ess, post.source_weight, difference])


def _crossings(
    t: np.ndarray, means: np.ndarray, weights: np.ndarray, levels: tuple[float, float]
) -> tuple[float, float]:
    """Where the monotone fit crosses the levels, between its blocks; 0: before, NaN: never."""
    fit = isotonic_regression(means, weights=weights)
    starts = fit.blocks[:-1]
    value = fit.x[starts]
    centre = np.add.reduceat(t * weights, starts) / np.add.reduceat(weights, starts)
    low, high = (
        float(np.interp(level, value, centre, left=0.0)) if level <= value[-1] else math.nan
        for level in levels
    )
    return low, high


def stage_edges(predicted: float, strata: int) -> Tensor:
    """Edges of strata on [0, 1], ascending, float64, (strata + 1,); at least 4 strata.

    With a predicted boundary p below 1/6 half of the strata lie in [0, 3p], above 5/6 in
    [1 - 3(1 - p), 1]. Between, or for NaN, 0 or 1, the strata are equal.
    """
    if strata < 4:
        raise ValueError(f"Expected at least 4 strata, got {strata}.")
    if 5 / 6 < predicted < 1:
        return 1 - stage_edges(1 - predicted, strata).flip(0)
    if not 0 < predicted < 1 / 6:
        return torch.linspace(0, 1, strata + 1, dtype=torch.float64)
    fine = strata // 2
    early = torch.linspace(0, 3 * predicted, fine + 1, dtype=torch.float64)
    late = torch.linspace(3 * predicted, 1, strata - fine + 1, dtype=torch.float64)
    return torch.cat([early, late[1:]])


def stratified_times(edges: Tensor, queries: int, *, seed: int | tuple[int, ...] = 0) -> Tensor:
    """Q = `queries` random times in each stratum, one in each of Q equal parts: (T, Q), float64.

    `edges` of the strata, (T + 1,), ascend. Global generators are not used.
    """
    if queries < 2:
        raise ValueError(f"Expected at least 2 queries per stratum, got {queries}.")
    shape = (len(edges) - 1, queries)
    within = (np.arange(queries) + np.random.default_rng(seed).random(shape)) / queries
    return edges[:-1, None] + torch.from_numpy(within) * edges.diff()[:, None]
