"""The k nearest rows of each query, by one product with all rows.

The nearest row is the one with the largest weight. Since the product gives the log-weights of all
rows, the tail mass is measured, not bounded, and a query that needs the whole posterior costs only
the second product.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.engines.base import Engine
from stagewise.engines.exact import MORE, Exact, Leading, in_blocks
from stagewise.engines.log_weights import LogWeights
from stagewise.posterior import Posterior
from stagewise.queries import Queries, indices_of

__all__ = ["Nearest", "Truncated", "draw_rows"]


class Truncated(Engine):
    """An engine whose mean is over the k nearest rows.

    Args:
        k: How many rows, default 100, or all of a smaller class.
        max_tail: Queries with a larger tail mass get the exact mean, at the cost of a device sync;
            default None.
    """

    def __init__(self, k: int = 100, *, max_tail: float | None = None) -> None:
        if k < 1:
            raise ValueError(f"Expected `k` of at least 1, got {k}.")
        if max_tail is not None and not 0 <= max_tail < 1:
            raise ValueError(f"Expected `max_tail` in [0, 1), got {max_tail}.")
        self.k, self.max_tail = k, max_tail

    @override
    def prepare(self, bank: LatentBank) -> None:
        if self.k > len(bank):
            raise ValueError(
                f"Expected `k` of at most {len(bank)}, the rows of the bank, got {self.k}. For all "
                "rows use the engine Exact()."
            )

    def __repr__(self) -> str:
        exact = "" if self.max_tail is None else f", max_tail={self.max_tail}"
        return f"{type(self).__name__}(k={self.k}{exact})"


class Nearest(Truncated):
    """The mean over the k rows of largest weight, with the tail mass that is left out.

    For monitoring and for the end of navigation. In navigation itself the tail is most of the
    posterior: use `draws`, `max_tail`, or `Exact`, which costs at most twice as much.

    Args:
        k: How many rows, default 100, or all of a smaller class. At least the 8 or 64 rows whose
            log-weights `Exact` computes again.
        draws: Least number of random other rows that represent the rest, default 0 (the rest is
            left out). Queries of the same rows share them.
        max_tail: Queries with a larger tail mass get the exact mean; default None.
        seed: Of the draws, default 0. Every call draws other rows.
        precision: As in `Exact`; "float32" and "float64" need no device sync without `max_tail`.
        chunk_size: Rows multiplied at a time, as in `Exact`.

    Raises:
        ValueError: For numbers out of range.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> from stagewise.engines import Nearest
        >>> oracle = Oracle(LatentBank(torch.randn(500, 8)), engine=Nearest(50, max_tail=1e-3))
        >>> bool(oracle.posterior(torch.randn(4, 8), 0.5).tail_mass.max() <= 1e-3)
        True
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
        super().__init__(k, max_tail=max_tail)
        if draws < 0:
            raise ValueError(f"Expected `draws` of at least 0, got {draws}.")
        self.draws, self.generator = draws, Random(seed)
        self.exact = Exact(precision, chunk_size=chunk_size)

    @override
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        width = max(k, self.k)
        post = in_blocks(
            bank, queries, lambda some: self.exact.solve(bank, some, width, self._finish)
        )
        return replace(post, weights=post.weights[:, :k], rows=post.rows[:, :k])

    def _finish(self, found: LogWeights, leading: Leading) -> Posterior:
        more = leading.next[:, : max(0, self.k - leading.columns.shape[1])]
        weights = leading.weights.gather(1, more)
        mean = found.moment(leading.columns, leading.shares)
        if more.shape[1]:
            mean = mean + found.moment(more, weights)
        rest = leading.rest.scatter_(1, more, 0)
        tail = rest.sum(1, dtype=torch.float64)
        # Not 1 - tail, which would lose the digits of a small share.
        kept = 1 - leading.tail + weights.sum(1, dtype=torch.float64)
        need = [] if self.max_tail is None else indices_of(tail > self.max_tail)
        if need:
            index = found.queries.index(need)
            mean = mean.index_add(0, index, found.product(rest, need))
            tail, kept = tail.index_fill(0, index, 0), kept.index_fill(0, index, 1)
        if not self.draws:
            return replace(leading.post, mean=mean / kept[:, None], tail_mass=tail)
        drawn, there = self._draw(found, rest)
        mean = mean + torch.where(there, tail, 0)[:, None] * drawn
        mean = mean / torch.where(there, 1, kept)[:, None]
        # If every row was drawn, nothing is missing.
        some = found.queries.index([size > self._drawn for size in found.queries.sizes])
        return replace(leading.post, mean=mean, tail_mass=tail * some, tail_kind="estimated")

    @property
    def _drawn(self) -> int:
        """Rows to draw: more than `draws`, because those among the nearest have weight 0."""
        return self.draws + max(self.k, MORE)

    def _draw(self, found: LogWeights, rest: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over the rest, (B, D), estimated from random rows, and whether any had weight.

        `rest` are the weights of all rows, (B, width), 0 for the nearest.
        """
        bank, device = found.bank, rest.device
        mean = torch.zeros(len(rest), bank.dim, dtype=torch.float64, device=device)
        mass = torch.zeros(len(rest), dtype=torch.float64, device=device)
        for at, segment in found.queries.groups:
            index = found.queries.place(at)
            rows = found.queries.index(draw_rows(segment, self._drawn, self.generator))
            weights = rest[index][:, rows - segment.start].double()
            mass[index] = weights.sum(1)
            mean[index] = weights @ bank.take(rows, device=device)
        return mean / mass.clamp_min(1e-300)[:, None], mass > 0

    def __repr__(self) -> str:
        draws = f", draws={self.draws}" if self.draws else ""
        return f"{super().__repr__()[:-1]}{draws})"


def draw_rows(segment: slice, count: int, generator: Random) -> list[int]:
    """`count` random rows of a segment, or all, each once, in random order."""
    # Not by torch, which would shuffle the numbers of all rows.
    rows = range(segment.start, segment.stop)
    return generator.sample(rows, min(count, len(rows)))
