"""Log-weights of rows, and the posterior from them with the leading ones computed again.

What the dense engines (all rows) and the searching ones (some rows) have in common: see
`stagewise.engines.exact` for the formulas and for what is said of precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from stagewise.bank import LatentBank
from stagewise.engines.ahead import Ahead
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

_WORTHWHILE = 50
"""Up to so many times as many rows a product with all costs less than to pick those of a table."""

_PAIRS, _SPARSE = 2**16, 3
"""Numbers of single rows held at a time on a CPU; and of how many weights one is not 0, if it is
better to take the rows one by one."""

_NOTHING = -42.0
"""A log-weight this far below the largest adds less to anything than rounding does."""

_UNDERFLOW, _LEAST = -80.0, 1e-18
"""Log-weights below it count as it; weights below it count as it in the sum of their squares."""

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
        ahead: Weighted sums of the rows that were made in the same pass, or None.
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
    ahead: Ahead | None = None

    @classmethod
    def of(
        cls,
        bank: LatentBank,
        queries: Queries,
        dtype: torch.dtype,
        *,
        table: Tensor | None = None,
        chunk_size: int | None = None,
        lead: int = 0,
    ) -> Scan:
        """Multiplies the queries with the rows.

        Args:
            bank: The rows.
            queries: The queries.
            dtype: What the rows are multiplied in, see `products.working_dtype`.
            table: Which rows, (B, n), -1 for none; default all that a query looks at.
            chunk_size: Rows multiplied at a time.
            lead: If rows have to be fetched, make `ahead` for queries of which more than so many
                rows matter; default 0 (do not).
        """
        xt, path = queries.xt, queries.path
        alpha, sigma = path.alpha[:, None], path.sigma[:, None]
        centre = bank.centre.to(xt.device)
        shift = centre - bank.offset.to(xt.device)
        y = torch.addcmul(xt, alpha, centre, value=-1)
        length = torch.linalg.vector_norm(y, dim=1)
        query = y.mul_(alpha / sigma**2)
        half_snr = (path.alpha / path.sigma) ** 2 / 2
        # Norms count from their mean, which keeps digits where they are nearly the same.
        norm = bank.mean_sq_norm.to(xt.device)
        shared = query @ shift + half_snr * norm + (length / path.sigma).square() / 2
        u, v = rounding(dtype, bank.dim)
        delta = u * length * path.alpha / path.sigma**2
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        empty = torch.empty(0, dtype=wide, device=xt.device)
        lifted = torch.zeros_like(delta)
        scan = cls(bank, queries, dtype, empty, shared, delta, v, lifted, table, chunk_size)
        if lead and wide == torch.float32 and bank.fetched(xt.device, dtype):
            scan.ahead = Ahead(len(queries), bank.dim, empty, lead=lead)
        if table is None:
            scan.logits = scan._dense(query, half_snr, norm, wide)
        else:
            scan.logits = scan._gathered(query, half_snr, norm, wide)
        return scan

    def _dense(self, query: Tensor, half_snr: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
        bank, queries, device = self.bank, self.queries, query.device
        norms = (bank.sq_norms.to(device, non_blocking=True) - norm).to(wide)
        query, half = query.to(wide), half_snr.to(wide)
        width = max(queries.sizes)
        logits: Tensor | None = None
        for at, segment in queries.groups:
            index = positions(queries, at)
            q, h = query[index], half[index]
            for first, rows in bank.chunks(segment, self.chunk_size, device, self.dtype):
                last = first + len(rows)
                part = scores(q, rows).addr_(h, norms[first:last], alpha=-1)
                if self.ahead is not None:
                    self.ahead.add(index, part, rows, first == segment.start)
                if part.shape == (len(query), width):
                    return part
                if logits is None:
                    logits = torch.full((len(query), width), _NONE, dtype=wide, device=device)
                logits[index, first - segment.start : last - segment.start] = part
        assert logits is not None
        return logits

    def _gathered(self, query: Tensor, half_snr: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
        assert self.table is not None
        if max(self.queries.sizes) <= _WORTHWHILE * self.table.shape[1]:
            first = self.queries.index([rows.start for rows in self.queries.segments])[:, None]
            columns = (self.table - first).clamp_min(0)
            every = self._dense(query, half_snr, norm, wide)
            return every.gather(1, columns).masked_fill_(self.table < 0, _NONE)
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

    def _rows_one_by_one(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Stored rows (n,), as (m, D) in float64, as many at a time as stay in a CPU's cache."""
        step = max(1, _PAIRS // self.bank.dim)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            stored = self.bank.rows[rows[part].to(self.bank.device)]
            yield part, stored.to(rows.device).double()

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
            ahead=None,
        )

    def rows(self, columns: Tensor, at: Sequence[int] | None = None) -> Tensor:
        """The rows that some columns are, (B, n), in the bank's own order; -1 for none.

        Args:
            columns: The columns, (B, n), or (len(at), n).
            at: Of which queries; default all.
        """
        queries = self.queries if at is None else self.queries.select(at)
        if self.table is not None:
            table = self.table if at is None else self.table[positions(self.queries, at)]
            return table.gather(1, columns)
        rows = queries.index([segment.start for segment in queries.segments])
        rows = rows[:, None] + columns
        if min(queries.sizes) == self.logits.shape[1]:
            return rows
        return rows.masked_fill(columns >= queries.index(queries.sizes)[:, None], -1)

    def differences(self, columns: Tensor) -> Tensor:
        """Some log-weights from differences in float64.

        Args:
            columns: Which, (B, n), as columns of `logits`, the largest logit first.

        Returns:
            `l_i`, (B, n). Where to choose rows is cheap, on a CPU, those whose weight is below
            1e-18 of the first one's whatever the errors are come from `logits` instead.
        """
        rows, path = self.rows(columns), self.queries.path
        goal = path.alpha[:, None] * self.bank.offset.to(columns.device) - self.queries.xt
        if columns.device.type == "cpu":
            return self._few_differences(columns, rows, goal)
        logits = torch.empty_like(columns, dtype=goal.dtype)
        for part, stored in self._rows_in_blocks(rows):
            gap = stored.double().mul_(path.alpha[part, None, None]).add_(goal[part, None])
            distance = torch.linalg.vector_norm(gap, dim=2)
            logits[part] = -(distance / path.sigma[part, None]).square() / 2
        return logits.masked_fill_(rows < 0, _NONE)

    def _few_differences(self, columns: Tensor, rows: Tensor, goal: Tensor) -> Tensor:
        """The same for `rows` that matter, which differ in number."""
        path = self.queries.path
        below = self.logits.gather(1, columns).double()
        wrong = 32 * self.noise(columns[:, :1], below[:, 0])
        below = below - below[:, :1]
        far = (below < _NOTHING - wrong[:, None]) | (rows < 0)
        far[:, 0] = False
        query, place = (~far).nonzero(as_tuple=True)
        lengths = goal.new_empty(len(query))
        for part, stored in self._rows_one_by_one(rows[query, place].clamp_min(0)):
            own = query[part]
            gap = stored.mul_(path.alpha[own, None]).add_(goal[own])
            lengths[part] = torch.linalg.vector_norm(gap, dim=1)
        logits = torch.full_like(below, _NONE)
        logits[query, place] = -(lengths / path.sigma[query]).square() / 2
        logits.masked_fill_(rows < 0, _NONE)
        # What is far from the first row is as far from the largest of those that are right.
        return torch.where(far & (rows >= 0), logits.amax(1, keepdim=True) + below, logits)

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

    def moment(self, columns: Tensor, weights: Tensor, at: Sequence[int] | None = None) -> Tensor:
        """`sum_i w_i x^(i)` over a few rows, which are read one by one.

        Args:
            columns: Which, (B, n), as columns of `logits`.
            weights: Their weights, (B, n). Sums are made in their dtype.
            at: For which queries; default all. Then the others are missing in `columns` and
                `weights` too.

        Returns:
            (B, D), or (len(at), D), float64.
        """
        table, stored = self.rows(columns, at), self.bank.rows
        total = weights.sum(1, dtype=torch.float64)[:, None] * self.bank.offset.to(weights.device)
        if stored.dtype == weights.dtype and stored.device == weights.device:
            # Adds up rows where they lie, without a copy of them.
            return total + embedding_bag(
                table.clamp_min(0), stored, mode="sum", per_sample_weights=weights
            )
        if weights.device.type == "cpu":  # elsewhere to know where weights are 0 would take a sync
            query, place = weights.nonzero(as_tuple=True)
            if _SPARSE * len(query) < weights.numel():
                for part, rows in self._rows_one_by_one(table[query, place].clamp_min(0)):
                    own = query[part]
                    total.index_add_(0, own, rows.mul_(weights[own, place[part], None]))
                return total
        for part, rows in self._rows_in_blocks(table):
            total[part] += torch.einsum("bn,bnd->bd", weights[part], rows.to(weights.dtype))
        return total

    def product(self, weights: Tensor, at: Sequence[int] | None = None) -> Tensor:
        """`sum_i w_i x^(i)` over all columns of `logits`: the second product.

        Args:
            weights: (B, width), in the dtype of the logits.
            at: For which queries; default all.

        Returns:
            (B, D), or (len(at), D), float64.
        """
        device, some = weights.device, list(range(len(weights)) if at is None else at)
        index = positions(self.queries, some)
        if self.table is not None:
            columns = torch.arange(weights.shape[1], device=device).expand(len(some), -1)
            return self.moment(columns, weights[index], some)
        total = weights[index].sum(1).double()[:, None] * self.bank.offset.to(device)
        queries = self.queries.select(some)
        for members, segment in queries.groups:
            own = weights[positions(queries, [some[i] for i in members])]
            place = positions(queries, members)
            for first, rows in self.bank.chunks(segment, self.chunk_size, device, self.dtype):
                at_chunk = first - segment.start
                total[place] += averages(own[:, at_chunk : at_chunk + len(rows)], rows)
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
        post: The posterior, but for its `mean`, which is not there yet.
        columns: The rows with the largest logits, (B, n), descending, as columns of the logits;
            the leading ones come first.
        lead: Weights of the leading rows, (B, leading), float64.
        weights: Weights of all rows, (B, width), in the dtype of the logits.
        tail: The sum of those that do not lead, (B,), float64.
        error: Estimate of how far, in units of the rows' radius, the mean is off for using the
            logits of the tail, (B,).
    """

    post: Posterior
    columns: Tensor
    lead: Tensor
    weights: Tensor
    tail: Tensor
    error: Tensor

    @property
    def leading(self) -> Tensor:
        """The columns that lead, (B, leading)."""
        return self.columns[:, : self.lead.shape[1]]

    @property
    def rest(self) -> Tensor:
        """The weights with 0 for the leading rows, (B, width)."""
        return self.weights.scatter(1, self.leading, 0)

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
        exact = scan.differences(leading)
        peak = exact.amax(1)
        # In two steps, because the shift itself may be rounded.
        shifts = []
        for _ in range(2):
            shifts.append((scan.shared + peak).to(scan.logits.dtype))
            scan.shared = scan.shared - shifts[-1].double()
            scan.lifted = scan.lifted + shifts[-1].double()
        exact = exact - peak[:, None]
        lead = exact.exp()
        weights, sums = _exponentials(scan.logits, shifts, leading)
        others, squares, moment = sums
        z = lead.sum(1) + others
        moment = moment + (lead * exact).sum(1)
        tail = others / z
        error = torch.zeros_like(tail)
        if width > count:
            first = columns[:, count : count + 1]
            after = scan.logits.gather(1, first)[:, 0].double()
            delta = scan.noise(first, after)
            # Either every logit of the tail is nearly right, or none can matter even if wrong.
            error = (delta * squares.sqrt() / z * (16 * delta).exp()).nan_to_num(torch.inf)
            error = torch.minimum(error, width * (after + 16 * delta).exp())
        ess = z**2 / (lead.square().sum(1) + squares)
        largest = torch.cat([lead, weights.gather(1, columns[:, count:])], 1) / z[:, None]
        lead = largest[:, : lead.shape[1]]
        weights.mul_((1 / z).to(weights.dtype)[:, None])
        top, order = largest.topk(min(k, width), dim=1)
        missing = (0, k - top.shape[1])
        post = Posterior(
            mean=lead.new_empty(len(lead), 0),
            log_evidence=peak + z.log(),
            entropy=z.log() - moment / z,
            ess=ess,
            weights=pad(top, missing),
            rows=pad(scan.rows(columns.gather(1, order)), missing, value=-1),
            tail_mass=torch.zeros_like(tail),
        )
        weights.scatter_(1, leading, lead.to(weights.dtype))
        return cls(post, columns, lead, weights, tail, error)

    def select(self, index: Tensor | slice) -> Refined:
        """The same for some of the queries."""
        values = (self.columns, self.lead, self.weights, self.tail, self.error)
        return Refined(self.post[index], *(value[index] for value in values))


def _exponentials(
    logits: Tensor, shifts: Sequence[Tensor], leading: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights from logits, and what is summed over them.

    A few queries at a time, so that a CPU reads what it has just written from its cache.

    Args:
        logits: (B, width); the shifts are subtracted in place.
        shifts: Each (B,).
        leading: Columns whose weight is 0 here, (B, n).

    Returns:
        `w_i = exp(l_i)`, (B, width), and the sums of `w_i`, `w_i^2` and `w_i l_i`, (3, B), float64.
    """
    weights = torch.empty_like(logits)
    sums = logits.new_empty(3, len(logits), dtype=torch.float64)
    numbers = _GATHER.get(logits.device.type, 2**62)
    step = max(1, numbers // logits.shape[1])
    # Numbers too small for their type take a processor a hundred times as long: what would
    # underflow is 0, and squares are those of no less than `_LEAST`.
    least = math.exp(_UNDERFLOW)
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        own, w = logits[part], weights[part]
        for shift in shifts:
            own.sub_(shift[part, None])
        torch.clamp_min(own, _UNDERFLOW, out=w)
        torch.threshold_(w.exp_(), 1.001 * least, 0).scatter_(1, leading[part], 0)
        some = w.clamp_min(_LEAST)
        sums[0, part] = w.sum(1, dtype=torch.float64)
        sums[1, part] = some.mul_(some).sum(1)
        sums[2, part] = torch.mul(w, own, out=some).sum(1)
    return weights, sums


def where(flags: Tensor) -> list[int]:
    """Positions of what is true, on the host."""
    return [i for i, flag in enumerate(flags.tolist()) if flag]
