"""The two products: log-weights of rows, and sums of rows with their weights.

`stagewise.engines.exact` has the formulas and their precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from stagewise.bank import LatentBank
from stagewise.posterior import NO_ROW, UNDERFLOW
from stagewise.products import averages, rounding, scores
from stagewise.queries import Queries, indices_of

__all__ = ["CACHED", "LogWeights"]

CACHED = {"cpu": 2**19}
"""Numbers in gathered rows at a time: fits a CPU's cache; 2^24 on other devices."""

_WORTHWHILE = 50
"""Up to this many times the rows of a table, a product with all rows is cheaper than gathering."""

_SINGLE = {"cpu": 2**18}
"""Numbers in rows that are read one by one, at a time; 2^24 on other devices."""

_SPARSE = 3
"""If at most one in this many weights is not 0, rows are read one by one."""

_FAR = -42.0
"""A log-weight this far below the largest adds less than rounding."""

_LEAD = 9
"""If so many rows of a chunk have weight, they are summed ahead: no more than 8 are read one by
one."""

_AWAY = 0.25
"""Distance of a bank's mean from its offset, in radii, above which rows are centred before they are
multiplied: a float32 product would lose digits."""

_COPIED = 2**23
"""Numbers in rows that are centred, or converted on a CPU, at a time."""

_KEPT = 2**30
"""Bytes of rows that stay on a device, once moved, for the second product."""

_WIDE = 0.25
"""Noise level above which a mean may be summed in float32 without effect on the velocity, for rows
whose distances are about as large as their norms."""


class _Ahead:
    """`sum_i exp(l_i - p) x^(i)` for some lines of logits, of which p is the largest.

    A line is left out once a few rows have all its weight, which needs no second product. With
    `mean`, of all rows, what is summed is their difference from it where weights are alike:
    that keeps digits near noise.
    """

    def __init__(self, lines: list[int], mean: Tensor | None) -> None:
        self.lines, self.mean = lines, mean
        self.top = self.level = self.total = torch.empty(0)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        """Adds a chunk of rows and its logits, (B, n)."""
        logits = logits[self.lines]
        top = logits.topk(min(_LEAD, len(rows)), dim=1).values
        begins = not len(self.top)
        peak = top[:, :1] if begins else torch.maximum(self.top[:, :1], top[:, :1])
        weights = (logits - peak).clamp_min_(UNDERFLOW).exp_()
        if begins:
            self.top = top
            self.level = weights.mean(1, keepdim=True) * (self.mean is not None)
            self.total = logits.new_zeros((len(logits), rows.shape[1]), dtype=torch.float64)
        else:
            grown = (self.top[:, :1] - peak).exp()
            self.level *= grown
            self.total *= grown
            both = torch.cat([self.top, top], dim=1)
            self.top = both.topk(min(_LEAD, both.shape[1]), dim=1).values
        flat = indices_of(self.top[:, -1] - self.top[:, 0] > _FAR)
        if len(flat) < len(self.lines):
            self.lines = [self.lines[i] for i in flat]
            kept = (self.top, self.level, self.total, weights)
            self.top, self.level, self.total, weights = (x[flat] for x in kept)
        if flat:
            self.total += averages(weights - self.level, rows)

    def end(self, count: int) -> tuple[Tensor, Tensor]:
        """Each p, and the sums over all `count` rows, float64."""
        if self.mean is not None:
            self.total += count * self.level.double() * self.mean
        return self.top[:, 0].double(), self.total


class LogWeights:
    """The log-weights of all rows for some queries, or of those in a table.

    Args:
        bank: The rows.
        queries: The queries.
        dtype: What the rows are multiplied in, see `products.working_dtype`.
        table: Which rows, (B, n), -1 for none; default all rows of a query, in order.
        chunk_size: Rows multiplied at a time.
        sums: Whether `summed` will be asked.

    Attributes:
        logits: `l_i + shared`, (B, width), `NO_ROW` where a query has fewer rows than others.
        shared: The common term of all log-weights of a query, (B,), float64.
        delta: Standard deviation of a product's error for a row of norm 1, (B,), float64.
        growth: What a product of size 1 adds to `delta`.
        lifted: The sum of what was subtracted from the logits, (B,), float64.
        wide: Where leading rows may be summed in float32 without effect on the velocity, (B,).
        ahead: For queries that `summed` answers: the largest logit p, and
            `sum_i exp(l_i - p) x^(i)`, (D,), float64.
        origin: The difference of a sample from its row as it is multiplied, (D,), float64.
        shift: The bank's mean minus `origin`, (D,), float64.
    """

    def __init__(
        self,
        bank: LatentBank,
        queries: Queries,
        dtype: torch.dtype,
        *,
        table: Tensor | None = None,
        chunk_size: int | None = None,
        sums: bool = True,
    ) -> None:
        self.bank, self.queries, self.dtype, self.table = bank, queries, dtype, table
        self.chunk_size = chunk_size
        xt, path = queries.xt, queries.path
        centre = bank.centre.to(xt.device)
        far = bank.max_norm - bank.radius > _AWAY * bank.radius
        self._centred = far and not bank.shifted and dtype == torch.float32 and table is None
        self.origin = centre.float().double() if self._centred else bank.offset.to(xt.device)
        self.shift = centre - self.origin
        y = torch.addcmul(xt, path.alpha[:, None], centre, value=-1)
        length = torch.linalg.vector_norm(y, dim=1)
        query = y.mul_((path.alpha / path.sigma**2)[:, None])
        half_snr = (path.alpha / path.sigma) ** 2 / 2
        # Norms count from their mean, which keeps digits where they are nearly the same.
        norm = bank.mean_sq_norm.to(xt.device)
        self.shared = query @ self.shift + half_snr * norm + (length / path.sigma).square() / 2
        u, self.growth = rounding(dtype, bank.dim)
        self.delta = u * length * path.alpha / path.sigma**2
        self.lifted = torch.zeros_like(self.delta)
        self.wide = path.sigma.clamp_max(1) * bank.radius >= _WIDE * bank.max_norm
        self.ahead: dict[int, tuple[Tensor, Tensor]] = {}
        multiply = self._dense if table is None else self._gathered
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = sum(segment.stop - segment.start for _, segment in queries.groups)
        small = rows * bank.dim * dtype.itemsize <= _KEPT
        self._keeps = small and bank.device.type != xt.device.type
        # All chunks are copied into one buffer: the first use of memory takes the system's time.
        copied = self._centred or dtype != bank.dtype
        size = min(chunk_size or max(1, _COPIED // bank.dim), max(queries.sizes))
        cpu = xt.device.type == bank.device.type == "cpu"
        self._into = xt.new_empty((size, bank.dim), dtype=dtype) if cpu and copied else None
        # To copy a row costs more than to multiply it by one query: so that is done once.
        once = sums and self._into is not None and table is None
        self._early = set(indices_of(self.wide)) if once else set()
        self._kept: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        self.logits = multiply(query, half_snr, norm, wide)

    def _dense(self, query: Tensor, half_snr: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
        bank, queries, device = self.bank, self.queries, query.device
        norms = (bank.sq_norms.to(device, non_blocking=True) - norm).to(wide)
        query, half = query.to(wide), half_snr.to(wide)
        width = max(queries.sizes)
        logits: Tensor | None = None
        for at, segment in queries.groups:
            index = queries.place(at)
            q, h = query[index], half[index]
            early = [line for line, query in enumerate(at) if query in self._early]
            sums = _Ahead(early, self.shift if segment == bank.whole else None)
            for first, rows in self._chunks(segment, device):
                last = first + len(rows)
                part = scores(q, rows).addr_(h, norms[first:last], alpha=-1)
                if sums.lines:
                    sums.add(part, rows)
                if part.shape == (len(query), width):
                    logits = part
                    break
                if logits is None:
                    logits = torch.full((len(query), width), NO_ROW, dtype=wide, device=device)
                logits[index, first - segment.start : last - segment.start] = part
            if sums.lines:
                peaks, totals = sums.end(segment.stop - segment.start)
                for line, peak, total in zip(sums.lines, peaks, totals, strict=True):
                    self.ahead[at[line]] = (peak, total)
        assert logits is not None
        return logits

    def _chunks(self, segment: slice, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Rows minus `origin`, in the dtype in which they are multiplied.

        Rows on another device are moved once, up to `_KEPT`.
        """
        ends = (segment.start, segment.stop)
        if ends in self._kept:
            yield from self._kept[ends]
            return
        size, into = self.chunk_size, self._into
        if self._centred or into is not None:
            size = size or max(1, _COPIED // self.bank.dim)
        for first, rows in self.bank.chunks(segment, size, device, self.dtype, into):
            if self._centred:
                out = None if into is None else into[: len(rows)]
                rows = torch.sub(rows, self.origin.float(), out=out)
            if self._keeps:
                rows = rows if self._centred else rows.clone()
                self._kept.setdefault(ends, []).append((first, rows))
            yield first, rows

    def _gathered(self, query: Tensor, half_snr: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
        assert self.table is not None
        if max(self.queries.sizes) <= _WORTHWHILE * self.table.shape[1]:
            columns = (self.table - self.queries.ends_on_device[:, :1]).clamp_min(0)
            every = self._dense(query, half_snr, norm, wide)
            return every.gather(1, columns).masked_fill_(self.table < 0, NO_ROW)
        logits = [
            torch.einsum("bd,bnd->bn", query[part].to(wide), rows.to(wide))
            for part, rows in self._rows_in_blocks(self.table)
        ]
        there = self.table.clamp_min(0)
        norms = self.bank.sq_norms[there.to(self.bank.device)].to(query.device) - norm
        total = torch.cat(logits) - (half_snr[:, None] * norms).to(wide)
        return total.masked_fill(self.table < 0, NO_ROW)

    def _rows_in_blocks(self, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Stored rows of `table` (B, n), as (b, n, D) for a few queries at a time."""
        count = CACHED.get(table.device.type, 2**24)
        step = max(1, count // (table.shape[1] * self.bank.dim))
        for first in range(0, len(table), step):
            part = slice(first, first + step)
            there = table[part].clamp_min(0)
            rows = self.bank.rows[there.flatten().to(self.bank.device)]
            yield part, rows.to(table.device).unflatten(0, there.shape)

    def _rows_one_by_one(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Stored rows of `rows` (n,), as (m, D) in float64, some at a time."""
        step = max(1, _SINGLE.get(rows.device.type, 2**24) // self.bank.dim)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            stored = self.bank.rows[rows[part].to(self.bank.device)]
            yield part, stored.to(rows.device).double()

    @property
    def whole(self) -> bool:
        """Whether every query has the whole bank, whose rows add up to N times its mean."""
        return self.table is None and min(self.queries.sizes) == len(self.bank)

    def rows(self, columns: Tensor, at: Sequence[int] | None = None) -> Tensor:
        """The rows of columns (B, n), or (len(at), n), in the bank's order; -1 for none."""
        queries = self.queries if at is None else self.queries.select(at)
        if self.table is not None:
            table = self.table if at is None else self.table[self.queries.place(at)]
            return table.gather(1, columns)
        first, stop = queries.ends_on_device.split(1, dim=1)
        rows = first + columns
        return rows.masked_fill(rows >= stop, -1)

    def differences(self, columns: Tensor) -> Tensor:
        """`l_i` of some columns (B, n), the largest logit first, from differences in float64.

        On a CPU, where selecting rows takes no sync, rows whose weight is certainly below 1e-18 of
        the first one's are taken from `logits`.
        """
        rows, path = self.rows(columns), self.queries.path
        goal = path.alpha[:, None] * self.bank.offset.to(columns.device) - self.queries.xt
        given = self.logits.gather(1, columns).double()
        below, far = given - given[:, :1], torch.zeros_like(rows, dtype=torch.bool)
        pairs = torch.arange(rows.numel(), device=rows.device)
        if rows.device.type == "cpu":
            far = below < _FAR - 32 * self.noise(columns[:, :1], given[:, 0])[:, None]
            far[:, 0] = False
            pairs = pairs[~far.flatten()]
        query, logits = pairs // rows.shape[1], torch.full_like(given, NO_ROW)
        for part, stored in self._rows_one_by_one(rows.flatten()[pairs].clamp_min(0)):
            own = query[part]
            gap = stored.mul_(path.alpha[own, None]).add_(goal[own])
            distance = torch.linalg.vector_norm(gap, dim=1) / path.sigma[own]
            logits.view(-1)[pairs[part]] = -distance.square() / 2
        # Distances from the first row hold relative to the largest exact one too.
        logits = torch.where(far, logits.amax(1, keepdim=True) + below, logits)
        return logits.masked_fill_(rows < 0, NO_ROW)

    def noise(self, columns: Tensor, logits: Tensor) -> Tensor:
        """Standard deviation of the error of one logit of each query, (B,), float64.

        `columns`, (B, 1), and `logits`, (B,), are those of the row.
        """
        bank, path, device = self.bank, self.queries.path, columns.device
        row = self.rows(columns)[:, 0].clamp_min(0)
        mean = bank.mean_sq_norm.to(device)
        norm = bank.sq_norms[row.to(bank.device)].to(device)
        far = torch.maximum(norm, mean).sqrt() + self.shift.norm()
        # The product alone: a logit contains the norm too, counted from the mean.
        half_snr = (path.alpha / path.sigma) ** 2 / 2
        product = logits + self.lifted + half_snr * (norm - mean)
        return self.delta * far + self.growth * product.abs()

    def lift(self, peak: Tensor) -> list[Tensor]:
        """The shifts, (B,) each, to subtract from the logits so that `l_i = peak` becomes 0.

        Two, because the first is rounded.
        """
        shifts = []
        for _ in range(2):
            shifts.append((self.shared + peak).to(self.logits.dtype))
            self.shared = self.shared - shifts[-1].double()
            self.lifted = self.lifted + shifts[-1].double()
        return shifts

    def moment(self, columns: Tensor, weights: Tensor, at: Sequence[int] | None = None) -> Tensor:
        """`sum_i w_i x^(i)` over a few rows, which are read one by one, (B, D), float64.

        `columns` and `weights`, (B, n), have a line for each query in `at`, default all. Sums are
        in the dtype of the weights.
        """
        table, stored = self.rows(columns, at), self.bank.rows
        total = weights.sum(1, dtype=torch.float64)[:, None] * self.bank.offset.to(weights.device)
        if stored.dtype == weights.dtype and stored.device == weights.device:
            # Sums rows in place, without a copy.
            return total + embedding_bag(
                table.clamp_min(0), stored, mode="sum", per_sample_weights=weights
            )
        if weights.device.type == "cpu":  # elsewhere `nonzero` takes a sync
            query, place = weights.nonzero(as_tuple=True)
            if _SPARSE * len(query) < weights.numel():
                for part, rows in self._rows_one_by_one(table[query, place].clamp_min(0)):
                    own = query[part]
                    total.index_add_(0, own, rows.mul_(weights[own, place[part], None]))
                return total
        for part, rows in self._rows_in_blocks(table):
            total[part] += torch.einsum("bn,bnd->bd", weights[part], rows.to(weights.dtype))
        return total

    def summed(self, at: Sequence[int], columns: Tensor, shares: Tensor, scale: Tensor) -> Tensor:
        """`sum_i w_i x^(i)` for queries in `ahead`, (len(at), D), float64.

        The weights are `shares` in some columns, (len(at), n), and `scale exp(logits)` in others.
        """
        given = self.logits[self.queries.place(at)].gather(1, columns).double().exp()
        more = shares - scale[:, None] * given
        total = self.moment(columns, more, at) + (1 - more.sum(1))[:, None] * self.origin
        for line, query in enumerate(at):
            peak, ahead = self.ahead[query]
            total[line] += (peak - self.lifted[query]).exp() * scale[line] * ahead
        return total

    def product(
        self, weights: Tensor, at: Sequence[int] | None = None, total: Tensor | None = None
    ) -> Tensor:
        """`sum_i w_i x^(i)` over all columns of `logits`, (B, D), float64: the second product.

        For queries of the whole bank the weights are `w_i - w`, w their mean: near noise, where
        weights are nearly equal and the mean is nearly c, sums of `w_i x^(i)` would lose digits.

        Args:
            weights: (B, width), in the dtype of the logits.
            at: For which queries; default all.
            total: The sum of their weights to more digits, float64; default their sum.
        """
        device, some = weights.device, list(range(len(weights)) if at is None else at)
        weights = weights[self.queries.place(some)]
        if self.table is not None:
            columns = torch.arange(weights.shape[1], device=device).expand(len(some), -1)
            return self.moment(columns, weights, some)
        held = weights.sum(1, dtype=torch.float64)
        mean = (held if total is None else total)[:, None] * (self.origin + self.shift)
        if self.whole:
            level = (held / weights.shape[1]).to(weights.dtype)
            weights = weights - level[:, None]
            held = held - weights.shape[1] * level.double()
        mean -= held[:, None] * self.shift
        queries = self.queries.select(some)
        for members, segment in queries.groups:
            place = queries.place(members)
            own = weights[place]
            for first, rows in self._chunks(segment, device):
                at_chunk = first - segment.start
                mean[place] += averages(own[:, at_chunk : at_chunk + len(rows)], rows)
        return mean
