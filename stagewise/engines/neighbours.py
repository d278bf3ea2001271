r"""The posterior from k rows that a search found, and what is known of the rest.

The found rows' log-weights are computed exactly. The rest of the n rows that a query looks at has
a share of the posterior, the tail mass, which is not in the mean, and whose neglect biases it by at
most (tail mass) x (diameter of the rows). In navigation it is most of the posterior. Three ways to
deal with it, in this order of cost:

- know it: after an exact search no other row is nearer than the farthest that was found, so with
  the K found rows' `Z_K = sum exp(l_i)`, the smallest of their log-weights `l_K`, and r = n - K,

      tail mass  <=  r exp(l_K + e) / (Z_K + r exp(l_K + e));

- **stratify**: draw m of the other rows at random, without replacement, and give each the weight of
  r/m rows inside the softmax. As a ratio of two unbiased sums the mean is consistent, with a bias
  of O(1/m), and exact where m reaches r; the tail mass is then an estimate;
- `max_tail`: ask the exact engine for those queries whose tail mass is above it.

**Where a query stands.** Libraries search for the rows nearest to a point, by their distance and in
float32. In coordinates around the bank's mean c, where no row is farther than R from the origin,
that point is `y = (x_t - a c)/a`, which is infinite at a = 0. It is put at
`y = (x_t - a c)/a'` with `a' = max(a, |x_t - a c| / 256 R)` instead. If a row j was not found, and
the search compares squared distances wrongly by v at most, then
`|y - x^(j)|^2 >= |y - x^(K)|^2 - v`, and from that `l_j <= l_K + e` with

    e = (a a' v + a (a' - a) R^2) / 2 s^2.

The second term is below 2e-6 |x_t - a c|^2/s^2, for noisy samples of a bank 2e-6 D.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.engines.base import Engine, Queries, positions, where
from stagewise.engines.exact import Exact
from stagewise.engines.refined import Refined
from stagewise.engines.scan import Scan
from stagewise.posterior import Posterior, merge, put
from stagewise.products import full_precision

__all__ = ["FAR", "Neighbours", "draw_rows", "random_rows", "reach", "stand"]

FAR = 256.0
"""How many times R a query stands from the bank's mean at most."""

_PROBES = 256
"""Random rows that estimate the tail mass after a search that was not exact."""


class Neighbours(Engine):
    """An engine that finds rows and looks at those only.

    Args:
        k: How many rows to find, default 100. Classes with fewer rows give all.
        draws: Random other rows that stand for the rest, default 0 (the rest is left out). The
            queries that look at the same rows share them.
        max_tail: Queries with a larger tail mass are answered by the exact engine, at the cost of a
            device sync; default None.
        seed: Of the draws, default 0. Every call draws anew.

    Raises:
        ValueError: For numbers out of range.
    """

    def __init__(
        self, k: int = 100, *, draws: int = 0, max_tail: float | None = None, seed: int = 0
    ) -> None:
        if k < 1:
            raise ValueError(f"Expected `k` of at least 1, got {k}.")
        if draws < 0:
            raise ValueError(f"Expected `draws` of at least 0, got {draws}.")
        if max_tail is not None and not 0 <= max_tail < 1:
            raise ValueError(f"Expected `max_tail` in [0, 1), got {max_tail}.")
        self.k, self.draws, self.max_tail = k, draws, max_tail
        self.generator = Random(seed)

    def prepare(self, bank: LatentBank) -> None:
        """See `Engine.prepare`."""
        if self.k > len(bank):
            raise ValueError(
                f"Expected `k` of at most {len(bank)}, the rows of the bank, got {self.k}. For all "
                "rows use the engine Exact()."
            )

    @abstractmethod
    def search(self, bank: LatentBank, queries: Queries, segment: slice, n: int) -> Tensor:
        """Finds the rows nearest to where queries `stand`.

        Args:
            bank: The rows.
            queries: B queries that look at `segment`.
            segment: The rows they look at.
            n: How many to find, at most as many as there are.

        Returns:
            Rows in the bank's own order, (B, n), int64, each row once, and -1 for none, after those
            that were found. Only a query that is NaN may find none at all.
        """

    def search_all(self, bank: LatentBank, queries: Queries, n: int) -> Tensor:
        """Finds rows for all queries; by default group by group.

        Args:
            bank: The rows.
            queries: The queries.
            n: How many to find; -1 fills up where a query looks at fewer.

        Returns:
            As `search`.
        """
        parts, order = [], []
        for at, segment in queries.groups:
            count = min(n, segment.stop - segment.start)
            found = self.search(bank, queries.select(at), segment, count)
            parts.append(pad(found, (0, n - count), value=-1))
            order += at
        return torch.cat(parts).index_select(0, queries.index(order).argsort())

    def is_exact(self, bank: LatentBank) -> bool:
        """Whether no row is nearer than those found, but for `rounding`. Default True."""
        return True

    def rounding(self, bank: LatentBank, y: Tensor, distance: Tensor) -> Tensor:
        """How wrong the search may be when it compares squared distances: v above.

        Args:
            bank: The rows.
            y: Where the queries stand, (B, D).
            distance: From there to the farthest row that was found, (B,).

        Returns:
            In squared units of the bank, (B,). Default 0.
        """
        return torch.zeros_like(distance)

    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """See `Engine.posterior`."""
        with full_precision():
            n = min(max(self.k, k), max(queries.sizes))
            table = self.search_all(bank, queries, n)
            post = Exact().solve(bank, queries, k, self._finish, table=table)
            if self.draws or not self.is_exact(bank):
                post = self._with_random_rows(bank, queries, post, table)
        wrong = [] if self.max_tail is None else where(post.tail_mass > self.max_tail)
        if not wrong:
            return post
        exact = Exact().posterior(bank, queries.select(wrong), k)
        return exact if len(wrong) == len(queries) else put(post, wrong, exact, len(queries))

    def _finish(self, scan: Scan, found: Refined) -> Posterior:
        """The mean over the found rows, and a bound of the tail mass."""
        mean = scan.moment(found.leading, found.lead) + scan.product(found.rest)
        post = replace(found.post, mean=mean)
        if self.draws or not self.is_exact(scan.bank):
            return post
        assert scan.table is not None
        bank, queries, none = scan.bank, scan.queries, scan.table < 0
        # Any found row gives a bound, the one of least weight the best.
        last = scan.logits.masked_fill(none, torch.inf).argmin(1, keepdim=True)
        log_last = scan.differences(last)[:, 0]
        alpha, sigma, radius = queries.path.alpha, queries.path.sigma, reach(bank)
        y, wider = stand(bank, queries)
        distance = ((-2 * log_last).sqrt() * sigma + (wider - alpha) * radius) / wider
        excess = wider * self.rounding(bank, y, distance) + (wider - alpha) * radius**2
        log_last = log_last + alpha * excess / (2 * sigma**2)
        rest = queries.index(queries.sizes) - (~none).sum(1)
        tail = torch.sigmoid(rest.double().log() + log_last - post.log_evidence)
        return replace(post, tail_mass=tail, tail_kind="bounded")

    def _with_random_rows(
        self, bank: LatentBank, queries: Queries, post: Posterior, table: Tensor
    ) -> Posterior:
        """Adds what random rows say of the rest: all of it, or its share only."""
        parts, order = [], []
        for at, segment in queries.groups:
            found = table[positions(queries, at)]
            some = queries.select(at)
            count = self.draws or _PROBES
            k = post.weights.shape[1]
            parts.append(random_rows(bank, some, segment, found, count, k, self.generator))
            order += at
        rest = Posterior.cat(parts, order)
        tail = torch.sigmoid(rest.log_evidence - post.log_evidence)
        if not self.draws:
            return replace(post, tail_mass=tail, tail_kind="estimated")
        # Where every other row was drawn nothing is missing.
        tail = tail * rest.tail_mass
        post = merge(post, rest, k=post.weights.shape[1])
        return replace(post, tail_mass=tail, tail_kind="estimated")

    def __repr__(self) -> str:
        draws = f", draws={self.draws}" if self.draws else ""
        exact = "" if self.max_tail is None else f", max_tail={self.max_tail}"
        return f"{type(self).__name__}(k={self.k}{draws}{exact})"


def reach(bank: LatentBank) -> float:
    """R, which no row is farther from the bank's mean than; above 0 for any bank."""
    return max(bank.radius, 1e-9 * bank.max_norm) or 1.0


def stand(bank: LatentBank, queries: Queries) -> tuple[Tensor, Tensor]:
    """The points whose nearest rows are searched, see the module.

    Returns:
        `y` around the bank's mean, (B, D), and `a'`, (B,); both float64.
    """
    alpha = queries.path.alpha
    z = queries.xt - alpha[:, None] * bank.centre.to(queries.xt.device)
    least = torch.linalg.vector_norm(z, dim=1) / (FAR * reach(bank))
    wider = torch.maximum(alpha, least).clamp_min(torch.finfo(alpha.dtype).tiny)
    return z / wider[:, None], wider


def draw_rows(segment: slice, count: int, generator: Random) -> list[int]:
    """Rows of a segment, uniformly at random, without replacement, in random order.

    Args:
        segment: The rows.
        count: How many; all if there are fewer.
        generator: Not of torch, which would shuffle the numbers of all rows.
    """
    rows = range(segment.start, segment.stop)
    return generator.sample(rows, min(count, len(rows)))


def random_rows(
    bank: LatentBank,
    queries: Queries,
    segment: slice,
    found: Tensor,
    draws: int,
    k: int,
    generator: Random,
) -> Posterior:
    """The posterior over the rows that were not found, from a random sample of them.

    Args:
        bank: The rows.
        queries: B queries that look at `segment`.
        segment: The rows they look at.
        found: Rows that were found, (B, n), -1 for none: the sample leaves them out.
        draws: How many rows to draw for each query.
        k: How many of the largest weights to return.
        generator: Of the draws.

    Returns:
        The posterior over the rest of the segment, each draw standing for as many rows as the rest
        has for one draw. Its `log_evidence` is minus infinity where there is no rest, and its
        `tail_mass` 0 where all of the rest was drawn, otherwise 1.
    """
    device, path = queries.xt.device, queries.path
    # As many more as may turn out to be found already: each query then takes the first of those
    # that it did not find, which are a uniform sample of its own rest.
    order = draw_rows(segment, draws + found.shape[1], generator)
    rows = torch.tensor(order, dtype=torch.int64).to(device)
    samples = bank.take(rows, device=device)
    alpha, variance = path.alpha[:, None], path.sigma[:, None] ** 2
    centre = bank.centre.to(device)
    y, centred = queries.xt - alpha * centre, samples - centre
    logits = alpha * (y @ centred.T) - alpha**2 / 2 * centred.square().sum(1)
    logits = (logits - y.square().sum(1, keepdim=True) / 2) / variance
    unseen = ~_among(rows, found)
    unseen &= unseen.cumsum(1) <= draws
    count, rest = unseen.sum(1), segment.stop - segment.start - (found >= 0).sum(1)
    none = count == 0
    log_each = (rest.double() / count.clamp_min(1)).clamp_min(1).log()
    logits = logits.masked_fill(~unseen, -torch.inf)
    log_z = torch.logsumexp(logits, 1) + log_each
    gamma = (logits - log_z.masked_fill(none, 0)[:, None]).exp()
    mass = gamma * log_each.exp()[:, None]
    surprise = log_z[:, None] - logits
    weights, at = gamma.topk(min(k, len(rows)), dim=1)
    top = rows[at].masked_fill(~unseen.gather(1, at), -1)
    missing = (0, k - weights.shape[1])
    return Posterior(
        mean=mass @ samples,
        log_evidence=log_z,
        entropy=torch.where(unseen, mass * surprise, 0.0).sum(1),
        ess=torch.where(none, 1.0, 1 / (mass * gamma).sum(1)),
        weights=pad(weights, missing),
        rows=pad(top, missing, value=-1),
        tail_mass=(count < rest).to(log_z.dtype),
    )


def _among(rows: Tensor, found: Tensor) -> Tensor:
    """Whether each of `rows` (m,) is in a line of `found` (B, n): (B, m)."""
    lines = found.sort(1).values
    wanted = rows.expand(len(found), -1).contiguous()
    at = torch.searchsorted(lines, wanted).clamp_max(lines.shape[1] - 1)
    return lines.gather(1, at) == wanted
