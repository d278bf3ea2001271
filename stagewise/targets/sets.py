r"""Targets from the posterior over a few rows: cheaper than the whole bank.

A set of rows S that was drawn for a source i is an unbiased reference if every member could have
been its source with the same probability, `P(S | i) = P(S | j)`: given S and `x_t` each is then the
source with its weight in S. Rows drawn from *all* rows and counted once, with x_1 in any case, are
such a set (drawn from the others, with replacement and counted as often as drawn, they are not).

**Common errors.** The error of m has a variance of about `var(x_1) / M` where many rows carry the
posterior. If the B queries of a call have sets of their own, it falls with B as the plain target's
does. If they share one, it is common to all of them and does not: the gradient then has less
variance than with the plain target only if M is well above B.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stagewise.engines import Exact, Nearest
from stagewise.engines.base import Queries, positions
from stagewise.engines.neighbours import random_rows
from stagewise.lambdas import LambdaLike
from stagewise.oracle import Oracle
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, inverse, merge
from stagewise.products import full_precision
from stagewise.targets.base import Pull, Query, Target

__all__ = ["ReferenceSet", "Stratified"]


class ReferenceSet(Target):
    """x_1 and M - 1 random rows (EFM, arXiv 2506.03719; STF, arXiv 2302.00670). Unbiased.

    Removes nearly all variance of the target where many rows carry the posterior, at the cost of M
    rows; near the data, where few do, it seldom holds them.

    Args:
        size: M, at least 2. Rows that were drawn twice count once; a class of no more than M rows
            gives all.
        lam: See `Target`.
        shared: Whether the queries of a call that look at the same rows (the bank, or a class)
            share their set. It is then one matrix product instead of B M gathered rows, and M
            should be some 10 times the batch (see the module). Default False.

    Raises:
        ValueError: If `size` is below 2.
    """

    def __init__(self, size: int, lam: LambdaLike = 1.0, *, shared: bool = False) -> None:
        super().__init__(lam)
        if size < 2:
            raise ValueError(f"Expected `size` of at least 2 (x_1 and one row), got {size}.")
        self.size, self.shared = size, shared

    def check(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().check(oracle)
        _require(oracle, self.size, "size")

    def pull(self, query: Query) -> Pull:
        """See `Target`; formula (1)."""
        post, _ = _draw(query, query.source[:, None], self.size - 1, self.shared)
        return _with_x1(query, post)


class Stratified(Target):
    """The rows nearest to the source, and random ones that stand for the rest.

    With n rows, `near` of them taken exactly, the random others share the weight of the
    `n - 1 - near` that are left: a ratio of two estimates. **Consistent, not unbiased**: the draws
    make the evidence of the rest vary, which favours x_1 and its neighbours by a share of about
    `(n / random) sum_i gamma_i^2` over the rest (from `E[1/Z] > 1/E[Z]`). It is nothing where the
    neighbours carry the posterior, and little where very many rows do.

    Nearest rows are searched at every call, which is one product with all rows. They are nearest
    to x_1 and not to `x_t`.

    Args:
        near: Rows nearest to x_1, at least 1.
        random: Random other rows, at least 1; those drawn twice count once.
        lam: See `Target`.
        shared: As in `ReferenceSet`.

    Raises:
        ValueError: For numbers out of range.
    """

    def __init__(
        self, near: int, random: int, lam: LambdaLike = 1.0, *, shared: bool = False
    ) -> None:
        super().__init__(lam)
        for name, value in (("near", near), ("random", random)):
            if value < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
        self.near, self.random, self.shared = near, random, shared

    def check(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().check(oracle)
        _require(oracle, 1 + self.near + self.random, "near + random + 1")

    def pull(self, query: Query) -> Pull:
        """See `Target`; formula (1)."""
        near = self._nearest(query)
        found = torch.cat([query.source[:, None], near], dim=1)
        rest, count = _draw(query, found, self.random, self.shared)
        left = query.others - (near >= 0).sum(1)
        each = (left.double() / count.clamp_min(1)).clamp_min(1)
        rest = replace(
            rest,
            log_evidence=rest.log_evidence + each.log(),
            weights=rest.weights / each[:, None],
        )
        return _with_x1(query, merge(_over(query, near), rest))

    def _nearest(self, query: Query) -> Tensor:
        """Rows that each query looks at and that are nearest to its x_1, (B, near); -1 for none."""
        queries = query.queries
        first, last = (
            queries.index([getattr(rows, end) for rows in queries.segments])[:, None]
            for end in ("start", "stop")
        )
        near = self._search(query)
        return near.masked_fill((near < first) | (near >= last), -1)

    def _search(self, query: Query) -> Tensor:
        bank, one = query.oracle.bank, torch.ones_like(query.t)
        here = PathCoefficients(one, one, one, one)
        at_x1 = Queries(query.x1, here, query.queries.segments)
        count = min(self.near + 1, max(at_x1.sizes))
        with full_precision():
            near = Nearest(count).search_all(bank, at_x1, count)
        # Copies of the source may come before it. If it is not there, the farthest row goes.
        own = (near == query.source[:, None]) & (near >= 0)
        return near.gather(1, own.int().argsort(dim=1, stable=True))[:, :-1]


def _require(oracle: Oracle, count: int, name: str) -> None:
    if count > len(oracle.bank):
        raise ValueError(
            f"Expected `{name}` of at most {len(oracle.bank)}, the rows of the bank, got {count}. "
            "For all rows use Mix()."
        )


def _draw(query: Query, found: Tensor, count: int, shared: bool) -> tuple[Posterior, Tensor]:
    """The posterior over random rows, each of them once.

    Args:
        query: The queries.
        found: Rows to leave out, (B, n), -1 for none.
        count: How many to draw; all if there are not more.
        shared: Whether queries that look at the same rows share the draws.

    Returns:
        The posterior, and over how many rows it is, (B,).
    """
    if not shared:
        table = _random_table(query, found, count)
        return _over(query, table), (table >= 0).sum(1)
    queries, parts, order = query.queries, [], []
    for at, segment in queries.groups:
        some, without = queries.select(at), found[positions(queries, at)]
        parts.append(random_rows(query.oracle.bank, some, segment, without, count, 1, query.draws))
        order += at
    post = Posterior.cat(parts)[queries.index(inverse(order))]
    rest = queries.index(queries.sizes) - (found >= 0).sum(1)
    drawn = rest.clamp_max(count)
    # There each row counts for those that were not drawn.
    each = (rest.double() / drawn.clamp_min(1)).clamp_min(1)
    post = replace(
        post,
        log_evidence=post.log_evidence - each.log(),
        weights=post.weights * each[:, None],
    )
    return post, drawn


def _random_table(query: Query, found: Tensor, count: int) -> Tensor:
    """Random rows for each query, (B, m), each once; -1 for those that there are not."""
    queries = query.queries
    sizes = np.array(queries.sizes)[:, None]
    first = np.array([rows.start for rows in queries.segments])[:, None]
    draws = np.random.default_rng(query.draws.getrandbits(64))
    rows = (draws.random((len(sizes), count)) * sizes).astype(np.int64)
    taken = found.shape[1]
    whole = sizes - taken <= count
    if whole.any():
        rows = np.pad(rows, [(0, 0), (0, taken)], constant_values=-1)
        every = np.arange(count + taken)
        rows = np.where(whole, np.where(every < sizes, every, -1), rows)
    rows.sort(axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
    table = torch.from_numpy(np.where(rows < 0, -1, rows + first)).to(found.device)
    return table.masked_fill((table[:, :, None] == found[:, None]).any(2), -1)


def _over(query: Query, table: Tensor) -> Posterior:
    """The posterior over the rows of a table, (B, n), -1 for none."""
    # Its check costs syncs on an accelerator; there are few rows, and their differences are exact.
    exact = Exact("auto" if table.device.type == "cpu" else "float32")
    with full_precision():
        return exact.solve(query.oracle.bank, query.queries, 1, table=table)


def _with_x1(query: Query, others: Posterior) -> Pull:
    """Formula (1), from the posterior over the others."""
    gap = others.log_evidence - query.log_weight(query.x1, query.path)
    share = torch.sigmoid(gap)
    top1 = torch.maximum(torch.sigmoid(-gap), share * others.top1)
    return Pull(share[:, None] * (others.mean - query.x1), top1, torch.zeros_like(top1))
