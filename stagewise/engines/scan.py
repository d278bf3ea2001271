"""Log-weights of rows, and the posterior from them with the leading ones computed again.

What the dense engines (all rows) and the searching ones (some rows) have in common: see
`stagewise.engines.exact` for the formulas and for what is said of precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.engines.base import Queries
from stagewise.posterior import Posterior
from stagewise.products import averages, rounding, scores

__all__ = ["FEW", "MORE", "Refined", "Scan", "blocks", "positions", "where"]

FEW, MORE = 8, 64
"""Rows whose log-weights are always computed again in float64, and if those are not enough."""

_LOGIT_BYTES = 2**29
"""Logits kept at a time: with more queries than that allows the bank is read again."""

_SMALL_BYTES = 2**24
"""Logits that are kept at a time where reading the bank again costs little."""

_GATHER = {"cpu": 2**19}
"""Numbers of gathered rows held at a time: what stays in a CPU's cache; 2^24 on other devices."""

_NONE = -1e30  # a logit of no row at all: finite, so that 0 * (logit - peak) is 0


def blocks(queries: Queries) -> list[Queries]:
    """The queries in parts whose logits fit into memory."""
    width, dim = max(queries.sizes), queries.xt.shape[1]
    # Small enough to stay where they are in memory; but short rows only are read again cheaply.
    count = max(_SMALL_BYTES // (4 * width), min(128, dim // 32), 1)
    count = max(1, min(count, _LOGIT_BYTES // (4 * width)))
    every = range(len(queries))
    return [queries.select(every[first : first + count]) for first in every[::count]]


@dataclass
class Scan:
    """The log-weights of all rows for some queries: what the dense engines start from.

    Attributes:
        bank: The rows.
        queries: The queries.
        dtype: What the rows are multiplied in.
        logits: `l_i + shared`, (B, width), and hugely negative where a query looks at fewer rows
            than others.
        shared: What all log-weights of a query have in common, (B,), float64.
        delta: Standard deviation of a product's error for a row of norm 1, (B,), float64.
        growth: What a product of size 1 adds to that.
        lifted: What has been subtracted from the logits, (B,), float64.
        table: Which rows the columns of `logits` are, (B, width), -1 for none; None if they are
            all rows that a query looks at, in order.
        chunk_size: Rows multiplied at a time.
    """

    bank: LatentBank
    queries: Queries
    dtype: torch.dtype
    logits: Tensor
    shared: Tensor
    delta: Tensor
    growth: float
    lifted: Tensor
    table: Tensor | None
    chunk_size: int | None

    @classmethod
    def of(
        cls,
        bank: LatentBank,
        queries: Queries,
        dtype: torch.dtype,
        *,
        table: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Scan:
        """Multiplies the queries with the rows.

        Args:
            bank: The rows.
            queries: The queries.
            dtype: What the rows are multiplied in, see `products.working_dtype`.
            table: Which rows, (B, n), -1 for none; default all that a query looks at.
            chunk_size: Rows multiplied at a time.
        """
        xt, path = queries.xt, queries.path
        alpha, sigma = path.alpha[:, None], path.sigma[:, None]
        centre = bank.centre.to(xt.device)
        shift = centre - bank.offset.to(xt.device)
        y = xt - alpha * centre
        query = y * (alpha / sigma**2)
        half_snr = (path.alpha / path.sigma) ** 2 / 2
        # Norms count from their mean, which keeps digits where they are nearly the same.
        norm = bank.mean_sq_norm.to(xt.device)
        shared = query @ shift + half_snr * norm + (y * y).sum(1) / (2 * path.sigma**2)
        u, v = rounding(dtype, bank.dim)
        delta = u * query.norm(dim=1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        empty = torch.empty(0, dtype=wide, device=xt.device)
        lifted = torch.zeros_like(delta)
        scan = cls(bank, queries, dtype, empty, shared, delta, v, lifted, table, chunk_size)
        if table is None:
            scan.logits = scan._dense(query, half_snr, norm, wide)
        else:
            scan.logits = scan._gathered(query, half_snr, norm, wide)
        return scan

    def _dense(self, query: Tensor, half_snr: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
        bank, queries, device = self.bank, self.queries, query.device
        norms = (bank.sq_norms.to(device, non_blocking=True) - norm).to(wide)
        half = half_snr.to(wide)
        width = max(queries.sizes)
        logits = torch.empty(len(query), width, dtype=wide, device=device)
        if min(queries.sizes) < width:
            logits.fill_(_NONE)
        for at, segment in queries.groups:
            index = positions(queries, at)
            q, h = query[index], half[index]
            for first, rows in bank.chunks(segment, self.chunk_size, device, self.dtype):
                last = first + len(rows)
                part = scores(q, rows).addr_(h, norms[first:last], alpha=-1)
                logits[index, first - segment.start : last - segment.start] = part
        return logits

    def _gathered(self, query: Tensor, half_snr: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
        assert self.table is not None
        logits = [
            torch.einsum("bd,bnd->bn", query[part].to(wide), rows.to(wide))
            for part, rows in self._rows_in_blocks(self.table)
        ]
        there = self.table.clamp_min(0)
        norms = self.bank.sq_norms[there.to(self.bank.device)].to(query.device) - norm
        total = torch.cat(logits) - (half_snr[:, None] * norms).to(wide)
        return total.masked_fill(self.table < 0, _NONE)

    def _rows_in_blocks(self, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Stored rows of `table` (B, n), as (b, n, D) for a few queries at a time."""
        count = _GATHER.get(table.device.type, 2**24)
        step = max(1, count // (table.shape[1] * self.bank.dim))
        for first in range(0, len(table), step):
            part = slice(first, first + step)
            there = table[part].clamp_min(0)
            rows = self.bank.rows[there.flatten().to(self.bank.device)]
            yield part, rows.to(table.device).unflatten(0, there.shape)

    def select(self, at: Sequence[int]) -> Scan:
        """The scan of some of the queries."""
        index = positions(self.queries, at)
        return replace(
            self,
            queries=self.queries.select(at),
            logits=self.logits[index],
            shared=self.shared[index],
            delta=self.delta[index],
            lifted=self.lifted[index],
            table=None if self.table is None else self.table[index],
        )

    def rows(self, columns: Tensor) -> Tensor:
        """The rows that some columns are, (B, n), in the bank's own order; -1 for none."""
        if self.table is not None:
            return self.table.gather(1, columns)
        rows = self.queries.index([segment.start for segment in self.queries.segments])
        rows = rows[:, None] + columns
        if min(self.queries.sizes) == self.logits.shape[1]:
            return rows
        return rows.masked_fill(columns >= self.queries.index(self.queries.sizes)[:, None], -1)

    def differences(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Some log-weights from differences in float64.

        Args:
            columns: Which, (B, n), as columns of `logits`.

        Returns:
            `l_i`, (B, n), and `sum_i exp(l_i - max_j l_j) x^(i)` over them, (B, D).
        """
        rows, path = self.rows(columns), self.queries.path
        offset = self.bank.offset.to(columns.device)
        goal = path.alpha[:, None] * offset - self.queries.xt
        logits, moments = torch.empty_like(columns, dtype=goal.dtype), torch.empty_like(goal)
        for part, stored in self._rows_in_blocks(rows):
            samples = stored.double()
            gap = torch.addcmul(goal[part, None], samples, path.alpha[part, None, None])
            logit = -(torch.linalg.vector_norm(gap, dim=2) / path.sigma[part, None]).square() / 2
            logits[part] = logit.masked_fill_(rows[part] < 0, _NONE)
            weights = (logit - logit.amax(1, keepdim=True)).exp()
            moments[part] = torch.einsum("bn,bnd->bd", weights, samples)
            moments[part] += weights.sum(1, keepdim=True) * offset
        return logits, moments

    def noise(self, columns: Tensor, logits: Tensor) -> Tensor:
        """Standard deviation of the error of a logit.

        Args:
            columns: One row for each query, (B, 1), that stands for those of its weight.
            logits: Its logits, (B,), float64.

        Returns:
            (B,), float64.
        """
        bank, path, device = self.bank, self.queries.path, columns.device
        row = self.rows(columns)[:, 0].clamp_min(0)
        mean = bank.mean_sq_norm.to(device)
        norm = bank.sq_norms[row.to(bank.device)].to(device)
        far = torch.maximum(norm, mean).sqrt() + (bank.centre - bank.offset).norm().to(device)
        # The product itself: a logit holds the norm too, counted from the mean.
        half_snr = (path.alpha / path.sigma) ** 2 / 2
        product = logits + self.lifted + half_snr * (norm - mean)
        return self.delta * far + self.growth * product.abs()

    def tail_mean(self, weights: Tensor) -> Tensor:
        """`sum_i w_i x^(i)`: for all rows by a second product.

        Args:
            weights: (B, width), in the dtype of the logits.

        Returns:
            (B, D), float64.
        """
        device = weights.device
        total = weights.sum(1, dtype=torch.float64)[:, None] * self.bank.offset.to(device)
        if self.table is not None:
            for part, rows in self._rows_in_blocks(self.table):
                total[part] += torch.einsum("bn,bnd->bd", weights[part], rows.to(weights.dtype))
            return total
        for at, segment in self.queries.groups:
            index = positions(self.queries, at)
            own = weights[index]
            for first, rows in self.bank.chunks(segment, self.chunk_size, device, self.dtype):
                columns = slice(first - segment.start, first - segment.start + len(rows))
                total[index] += averages(own[:, columns], rows)
        return total


def positions(queries: Queries, at: Sequence[int]) -> slice | Tensor:
    """Positions as a slice, which costs no copy, if they are contiguous."""
    if list(at) == list(range(at[0], at[-1] + 1)):
        return slice(at[0], at[-1] + 1)
    return queries.index(at)


@dataclass
class Refined:
    """A posterior whose leading log-weights come from differences.

    Attributes:
        post: The posterior; its `mean` is only what the leading rows add to it.
        columns: The rows with the largest logits, (B, n), descending, as columns of the logits;
            the leading ones come first.
        weights: Weights of all rows but the leading ones, which have 0 here, (B, width).
        tail: Their sum, (B,), float64.
        leading: How many lead.
        error: Estimate of how far, in units of the rows' radius, the mean is off for using the
            logits of the tail, (B,).
    """

    post: Posterior
    columns: Tensor
    weights: Tensor
    tail: Tensor
    error: Tensor
    leading: int

    @classmethod
    def of(cls, scan: Scan, k: int, count: int) -> Refined:
        """Computes the `count` largest log-weights of each query again.

        Args:
            scan: The logits; they are shifted so that the largest is near 0.
            k: How many of the largest weights to return.
            count: How many to compute again.
        """
        width = scan.logits.shape[1]
        columns = scan.logits.topk(min(max(k, count + 1), width), dim=1).indices
        leading = columns[:, :count]
        exact, moment = scan.differences(leading)
        peak = exact.amax(1)
        # In two steps, because the shift itself may be rounded.
        for _ in range(2):
            shift = (scan.shared + peak).to(scan.logits.dtype)
            scan.logits.sub_(shift[:, None])
            scan.shared = scan.shared - shift.double()
            scan.lifted = scan.lifted + shift.double()
        lead = (exact - peak[:, None]).exp()
        weights = scan.logits.exp().scatter_(1, leading, 0)
        z = lead.sum(1) + weights.sum(1, dtype=lead.dtype)
        squares = lead.square().sum(1), torch.linalg.vecdot(weights, weights).double()
        entropy = torch.linalg.vecdot(weights, scan.logits).double()
        entropy = z.log() - (entropy + (lead * (exact - peak[:, None])).sum(1)) / z
        largest = torch.cat([lead, weights.gather(1, columns[:, count:])], 1) / z[:, None]
        top, order = largest.topk(min(k, width), dim=1)
        missing = (0, k - top.shape[1])
        tail = weights.sum(1, dtype=lead.dtype) / z
        post = Posterior(
            mean=moment / z[:, None],
            log_evidence=peak + z.log(),
            entropy=entropy,
            ess=z**2 / (squares[0] + squares[1]),
            weights=pad(top, missing),
            rows=pad(scan.rows(columns.gather(1, order)), missing, value=-1),
            tail_mass=torch.zeros_like(tail),
        )
        error = torch.zeros_like(tail)
        if width > count:
            first = columns[:, count : count + 1]
            after = scan.logits.gather(1, first)[:, 0].double()
            delta = scan.noise(first, after)
            # Either every logit of the tail is nearly right, or none can matter even if wrong.
            # Squares below float32's smallest number are lost.
            rest = (squares[1] + width * torch.finfo(torch.float32).tiny).sqrt() / z
            error = (delta * rest * (16 * delta).exp()).nan_to_num(torch.inf)
            error = torch.minimum(error, width * (after + 16 * delta).exp())
        return cls(post, columns, weights.div_(z[:, None]), tail, error, leading.shape[1])


def where(flags: Tensor) -> list[int]:
    """Positions of what is true, on the host."""
    return [i for i, flag in enumerate(flags.tolist()) if flag]
