"""Targets from the posterior over a few rows: cheaper than the whole bank."""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.engines import Exact, Nearest
from stagewise.engines.base import Queries
from stagewise.engines.neighbours import random_rows
from stagewise.engines.scan import positions
from stagewise.lambdas import LambdaLike
from stagewise.oracle import Oracle
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, inverse, merge
from stagewise.products import full_precision
from stagewise.targets.base import Pull, Query, Target

__all__ = ["ReferenceSet", "Stratified"]


class ReferenceSet(Target):
    """x_1 and M - 1 random other rows (EFM, arXiv 2506.03719; STF, arXiv 2302.00670). Unbiased.

    Removes nearly all variance of the target where many rows carry the posterior, at the cost of M
    rows; near the data, where few do, it seldom holds them. The queries of a call that look at the
    same rows (the bank, or a class) share their draws.

    Args:
        size: M, at least 2; a class with fewer rows gives all.
        lam: See `Target`.

    Raises:
        ValueError: If `size` is below 2.
    """

    def __init__(self, size: int, lam: LambdaLike = 1.0) -> None:
        super().__init__(lam)
        if size < 2:
            raise ValueError(f"Expected `size` of at least 2 (x_1 and one row), got {size}.")
        self.size = size

    def check(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().check(oracle)
        _require(oracle, self.size, "size")

    def pull(self, query: Query) -> Pull:
        """See `Target`; formula (1)."""
        post, each = _draw(query, query.source[:, None], self.size - 1)
        # In this set a row counts once, and not for those that were not drawn.
        return _with_x1(query, post, post.log_evidence - each.log())


class Stratified(Target):
    """The rows nearest to the source, and random ones that stand for the rest.

    With n rows, `near` of them taken exactly, each of `random` others has `(n - 1 - near) / random`
    times its weight: a ratio of two estimates. **Consistent, not unbiased**: the draws make the
    evidence of the rest vary, which favours x_1 and its neighbours by a share of about
    `(n / random) sum_i gamma_i^2` over the rest (from `E[1/Z] > 1/E[Z]`). It is nothing where the
    neighbours carry the posterior, and where very many rows do, and largest between.

    Nearest rows are those of the oracle's certificate if it has as many
    (`Certificate.compute(bank, neighbours=near)`), otherwise they are searched at every call, which
    is one product with all rows. They are nearest to x_1 and not to `x_t`, so that one graph serves
    all t.

    Args:
        near: Rows nearest to x_1, at least 1.
        random: Random other rows, at least 1.
        lam: See `Target`.

    Raises:
        ValueError: For numbers out of range.
    """

    def __init__(self, near: int, random: int, lam: LambdaLike = 1.0) -> None:
        super().__init__(lam)
        for name, value in (("near", near), ("random", random)):
            if value < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
        self.near, self.random = near, random

    def check(self, oracle: Oracle) -> None:
        """See `Target`."""
        super().check(oracle)
        _require(oracle, 1 + self.near + self.random, "near + random + 1")

    def pull(self, query: Query) -> Pull:
        """See `Target`; formula (1)."""
        near = self._nearest(query)
        with full_precision():
            post = Exact().solve(query.oracle.bank, query.queries, 1, table=near)
        found = torch.cat([query.source[:, None], near], dim=1)
        rest, _ = _draw(query, found, self.random)
        both = merge(post, rest)
        return _with_x1(query, both, both.log_evidence)

    def _nearest(self, query: Query) -> Tensor:
        """Rows that each query looks at and that are nearest to its x_1, (B, near); -1 for none."""
        oracle, queries = query.oracle, query.queries
        first, last = (
            queries.index([getattr(rows, end) for rows in queries.segments])[:, None]
            for end in ("start", "stop")
        )
        graph = oracle.certificate
        if graph is not None and graph.num_neighbours >= self.near:
            graph = graph.to(query.xt.device)
            near = graph.rows.neighbours[query.source.clamp_min(0), : self.near].long()
            near = near.masked_fill(query.source[:, None] < 0, -1)
        else:
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


def _draw(query: Query, found: Tensor, count: int) -> tuple[Posterior, Tensor]:
    """The posterior over rows that are not `found`, from random ones.

    Args:
        query: The queries.
        found: Rows to leave out, (B, n), -1 for none.
        count: How many to draw; all if there are fewer.

    Returns:
        The posterior, each row counting for those that were not drawn, and for how many, (B,).
    """
    queries, parts, order = query.queries, [], []
    for at, segment in queries.groups:
        some, without = queries.select(at), found[positions(queries, at)]
        parts.append(random_rows(query.oracle.bank, some, segment, without, count, 1, query.draws))
        order += at
    rest = queries.index(queries.sizes) - (found >= 0).sum(1)
    each = rest.double() / rest.clamp(1, count)
    return Posterior.cat(parts)[queries.index(inverse(order))], each.clamp_min(1)


def _with_x1(query: Query, others: Posterior, log_evidence: Tensor) -> Pull:
    """Formula (1), from the posterior over the others and their evidence."""
    gap = log_evidence - query.log_weight(query.x1, query.path)
    share = torch.sigmoid(gap)
    top1 = torch.maximum(torch.sigmoid(-gap), share * others.top1)
    return Pull(share[:, None] * (others.mean - query.x1), top1, torch.zeros_like(top1))
