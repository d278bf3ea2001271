"""The k nearest rows of each query, by one product with all rows.

`x_t` is nearest, in the metric of the posterior, to the row with the largest weight. Since the
product gives the log-weights of all rows, the tail mass is measured and not bounded, and a query
that turns out to need the whole posterior costs only the second product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import Queries, blocks, positions, where
from stagewise.engines.exact import Exact
from stagewise.engines.neighbours import Neighbours, draw_rows
from stagewise.engines.refined import MORE, Refined
from stagewise.engines.scan import Scan
from stagewise.posterior import Posterior
from stagewise.products import full_precision

__all__ = ["Nearest"]


class Nearest(Neighbours):
    """The mean over the k rows of largest weight, with the tail mass measured.

    For monitoring and for the end of navigation. In navigation itself the tail is most of the
    posterior: use `draws`, `max_tail`, or the exact engine, which costs at most twice as much.

    Args:
        k: How many rows, default 100; at least 8 are taken, and 64 where the log-weights of so many
            are computed again (see `Exact`). Classes with fewer rows give all.
        draws: At least how many random other rows stand for the rest, default 0 (the rest is left
            out).
        max_tail: Queries with a larger tail mass get the exact mean; default None.
        seed: Of the draws, default 0. Every call draws anew.
        precision: See `Exact`; "float32" and "float64" need no device sync without `max_tail`.
        chunk_size: Rows multiplied at a time, see `Exact`.
    """

    def __init__(
        self,
        k: int = 100,
        *,
        draws: int = 0,
        max_tail: float | None = None,
        seed: int = 0,
        precision: Literal["auto", "float32", "float64"] = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(k, draws=draws, max_tail=max_tail, seed=seed)
        self.exact = Exact(precision, chunk_size=chunk_size)

    def search(self, bank: LatentBank, queries: Queries, segment: slice, n: int) -> Tensor:
        """See `Neighbours.search`."""
        dtype, chunk_size = self.exact.dtype(bank, queries), self.exact.chunk_size
        scan = Scan.of(bank, queries, dtype, chunk_size=chunk_size)
        return scan.rows(scan.logits.topk(n, dim=1).indices)

    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """See `Engine.posterior`."""
        width = max(k, self.k)
        with full_precision():
            parts = [self.exact.solve(bank, q, width, self._finish) for q in blocks(queries)]
        post = Posterior.cat(parts)
        return replace(post, weights=post.weights[:, :k], rows=post.rows[:, :k])

    def _finish(self, scan: Scan, found: Refined) -> Posterior:
        post = found.post
        more = found.columns[:, found.lead.shape[1] : max(self.k, found.lead.shape[1])]
        weights = found.weights.gather(1, more)
        mean = scan.moment(found.leading, found.lead)
        if more.shape[1]:
            mean = mean + replace(scan, table=scan.rows(more)).product(weights)
        rest = found.rest.scatter_(1, more, 0)
        tail = rest.sum(1, dtype=torch.float64)
        # Not 1 - tail, which has lost the digits of a small share.
        kept = 1 - found.tail + weights.sum(1, dtype=torch.float64)
        need = [] if self.max_tail is None else where(tail > self.max_tail)
        if need:
            index = scan.queries.index(need)
            mean = mean.index_add(0, index, scan.product(rest, need))
            tail, kept = tail.index_fill(0, index, 0), kept.index_fill(0, index, 1)
        if not self.draws:
            return replace(post, mean=mean / kept[:, None], tail_mass=tail)
        drawn, there = self._draw(scan, rest)
        mean = mean + torch.where(there, tail, 0)[:, None] * drawn
        mean = mean / torch.where(there, 1, kept)[:, None]
        # Where every row was drawn nothing is missing.
        some = scan.queries.index([size > self._drawn for size in scan.queries.sizes])
        return replace(post, mean=mean, tail_mass=tail * some, tail_kind="estimated")

    @property
    def _drawn(self) -> int:
        """Rows to draw: as many more as may be among the nearest, whose weight is then 0."""
        return self.draws + max(self.k, MORE)

    def _draw(self, scan: Scan, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the rest, estimated from rows drawn from it.

        Args:
            scan: The scan.
            rest: Weights of the rows that are not among the nearest, (B, width).

        Returns:
            The mean, (B, D), and whether any drawn row had weight, (B,).
        """
        bank, device = scan.bank, rest.device
        mean = torch.zeros(len(rest), bank.dim, dtype=torch.float64, device=device)
        mass = torch.zeros(len(rest), dtype=torch.float64, device=device)
        for at, segment in scan.queries.groups:
            index = positions(scan.queries, at)
            rows = scan.queries.index(draw_rows(segment, self._drawn, self.generator))
            weights = rest[index][:, rows - segment.start].double()
            mass[index] = weights.sum(1)
            mean[index] = weights @ bank.take(rows, device=device)
        return mean / mass.clamp_min(1e-300)[:, None], mass > 0
