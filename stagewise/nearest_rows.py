r"""The exact search for nearest rows of a bank: for its own rows, or for any samples.

All rows are compared by a float32 product. With `u = 2^-24` a product of D numbers is off by less
than `8 sqrt(D) u |q| |x|` (the probabilistic bound of Higham and Mary, SIAM J. Sci. Comput. 41,
2019, with lambda = 8), so with `c = 8 (sqrt(D) + 1) u`

    (1 - c) (|q|^2 + |x|^2) - 2 <q, x>  <=  |q - x|^2.

16-bit rows on an accelerator are multiplied in their own type, the query in two parts, which adds
`products.rounding` to c. For the rows with the smallest bounds the distance is computed again, from
differences. If it is not below the bounds of all other rows, more are computed, until the nearest
are certain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.products import full_precision, rounding, scores, working_dtype

__all__ = ["Search", "nearest_others", "progress_bar", "rank_distances"]

T = TypeVar("T")

Settle: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""The result for b queries from their n nearest rows. Takes the numbers of the queries, (b,), the
distances, ascending, and the rows, (b, n), and the least distance of all other rows, (b, 1).
Returns whether these rows are enough, (b,), and the result, tensors (b, ...)."""

_BOUNDS = {"cpu": 2**25}
"""Bounds, and on a CPU numbers of rows, held at a time; elsewhere 2^28."""

_GATHER = {"cpu": 2**20}
"""Numbers of gathered rows held at a time; elsewhere 2^26, those of all queries."""

_SPARE = 16
"""Rows computed exactly beside those that are wanted."""


class Search:
    """A search among some rows of a bank, for batches of queries."""

    def __init__(self, bank: LatentBank, scope: slice, device: torch.device) -> None:
        self.bank, self.scope, self.device = bank, scope, device
        self.dtype = working_dtype(bank.dtype, device)
        # The type in which distances between rows of the bank are computed.
        self.exact = torch.promote_types(self.dtype, torch.float32)
        self.slack = 8 * (math.sqrt(bank.dim) + 1) * 2.0**-24
        if self.dtype in (torch.bfloat16, torch.float16):
            self.slack += 8 * sum(rounding(self.dtype, bank.dim, truncates=True))
        shift = (bank.centre - bank.offset).to(device)
        # In a product, rows far from 0 would lose their differences.
        self.shift = shift.to(self.exact) if bank.off_centre > bank.radius else None
        self.norms: Tensor | None = None  # known after the first pass

    def __len__(self) -> int:
        return self.scope.stop - self.scope.start

    def ask(
        self,
        query: Tensor,
        count: int,
        settle: Settle,
        number: Tensor,
        bounds: Tensor | None = None,
        at_once: int = 2**31,
    ) -> list[Tensor]:
        """The results of `settle` for each query. One sync, and one for each further round.

        Args:
            query: (b, D), samples less the bank's offset, on the device. Distances are computed in
                their dtype.
            count: How many rows `settle` needs at first.
            settle: As in `Settle`.
            number: The queries' numbers for `settle`, (b,).
            bounds: If given, (b, n), filled with the lower bounds on the squared distances, less
                `squares(query)`.
            at_once: How many queries are compared at a time, with `bounds` all.
        """
        count = min(count + _SPARE, len(self))
        blocks = zip(query.split(at_once), number.split(at_once), strict=True)
        parts = [self._round(*block, count, settle, bounds) for block in blocks]
        enough, *found = (torch.cat(column) for column in zip(*parts, strict=True))
        left = (~enough).nonzero()[:, 0] if count < len(self) else ()
        if len(left):
            better = self.ask(query[left], 8 * count, settle, number[left], at_once=at_once)
            for known, new in zip(found, better, strict=True):
                known[left] = new
        return found

    def _round(
        self, query: Tensor, number: Tensor, count: int, settle: Settle, bounds: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What `settle` says of the `count` rows with the smallest bounds."""
        value, column = self._lowest(query, min(count + 1, len(self)), bounds)
        distance, order = self._exact(query, column[:, :count]).sort(dim=1)
        limit = distance.new_full((len(query), 1), torch.inf)
        if count < len(self):
            limit = root(value[:, count:] + self.squares(query))
        rows = column[:, :count].gather(1, order) + self.scope.start
        return settle(number, distance, rows, limit)

    def squares(self, query: Tensor) -> Tensor:
        """`(1 - c) |q|^2`, (b, 1), float64."""
        x = self._centred(query)
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
        return (1 - self.slack) * norms.square()

    def differ(self, rows: Tensor) -> Tensor:
        """Which of the rows, (b, n), differ from the first in their line."""
        return torch.cat([(x != x[:, :1]).any(2).to(self.device) for _, x in self._gather(rows)])

    def _centred(self, rows: Tensor) -> Tensor:
        if self.shift is not None:
            return (rows - self.shift).float()
        return rows if rows.dtype == self.dtype != torch.float64 else rows.float()

    def _lowest(self, query: Tensor, count: int, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        """The `count` smallest bounds, ascending, and their places in the scope, (b, count)."""
        centred, start = self._centred(query), self.scope.start
        host = self.device.type == "cpu"  # rows are copied there to be converted
        held = _BOUNDS.get(self.device.type, 2**28)
        size = max(count, held // max(len(query), self.bank.dim if host else 1))
        value = query.new_empty(len(query), 0, dtype=torch.float32)
        column = torch.empty_like(value, dtype=torch.int64)
        norms = []
        for first, chunk in self.bank.chunks(self.scope, size, self.device, self.dtype):
            rows, at = self._centred(chunk), slice(first - start, first - start + len(chunk))
            norms.append(self.squares(chunk)[:, 0] if self.norms is None else self.norms[at])
            product = scores(centred, rows)
            out = product if bounds is None else bounds[:, at]
            low = torch.add(norms[-1].float(), product, alpha=-2, out=out)
            some, place = low.topk(min(count, len(rows)), dim=1, largest=False)
            value, column = torch.cat([value, some], 1), torch.cat([column, place + at.start], 1)
            value, place = value.topk(min(count, value.shape[1]), dim=1, largest=False)
            column = column.gather(1, place)
        self.norms = torch.cat(norms)
        return value, column

    def _exact(self, query: Tensor, columns: Tensor) -> Tensor:
        """Distances of queries from rows of the scope, (b, n), float64."""
        distances = []
        for at, rows in self._gather(columns + self.scope.start):
            gap = rows.to(self.device, query.dtype).sub_(query[at, None])
            distances.append(torch.linalg.vector_norm(gap, dim=2, dtype=torch.float64))
        return torch.cat(distances)

    def _gather(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Stored rows (b, n), as (m, n, D) for some lines at a time."""
        stored, count = self.bank.rows, rows.shape[1]
        held = _GATHER.get(stored.device.type, 2**26)
        step = max(1, min(len(rows), held // (count * self.bank.dim)))
        # One buffer, because new memory costs more than the work on it.
        buffer = stored.new_empty(step * count, self.bank.dim)
        for first in range(0, len(rows), step):
            index = rows[first : first + step].flatten().to(stored.device)
            some = torch.index_select(stored, 0, index, out=buffer[: len(index)])
            yield slice(first, first + step), some.view(-1, count, self.bank.dim)


def nearest_others(
    bank: LatentBank,
    count: int,
    class_wise: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    names: Tensor | None = None,
) -> Tensor:
    """The `count` nearest other rows of each row, without its duplicates.

    Duplicates are rows with the same of the `names`, integers, (N,); without names, rows at
    distance 0.

    Returns:
        Nearest first, in the bank's own order, (N, K), int32, on the CPU; -1 where there are fewer.
    """
    names = None if names is None else names.to(device or bank.device)

    def settle(number: Tensor, distance: Tensor, rows: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        same = distance == 0 if names is None else names[rows] == names[number, None]
        distance, order = distance.masked_fill(same, torch.inf).sort(dim=1, stable=True)
        near = rows.gather(1, order).masked_fill(distance.isinf(), -1)
        beyond = (0, count - rows.shape[1])  # if negative, as many are cut off
        distance, near = pad(distance, beyond, value=torch.inf), pad(near, beyond, value=-1)
        return (distance <= limit).all(1), near.int()

    def of_block(search: Search, query: Tensor, number: Tensor) -> list[Tensor]:
        return search.ask(query, count, settle, number)

    return _of_rows(bank, of_block, class_wise, device, progress, "nearest rows")[0]


def rank_distances(
    bank: LatentBank,
    class_wise: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Lower bounds on the distance of the nearest, 2nd, 4th, ..., 2^h-th nearest other row.

    Returns:
        The bounds, infinite where there are fewer rows, (N, H), float32: the first is exact to
        1e-6, the others as far as the product is. And the number of duplicates, which are not among
        the other rows: of all compared and of the own class, (N, 2), int32. Both on the CPU.
    """
    longest = max(scope.stop - scope.start for scope in _scopes(bank, class_wise))
    ranks = 2 ** torch.arange(max(1, (longest - 1).bit_length()))
    ends = torch.tensor([(rows.start, rows.stop) for rows in _scopes(bank, bool(bank.classes))])
    ends = ends.repeat_interleave(ends.diff(dim=1)[:, 0], dim=0).to(device or bank.device)

    def settle(number: Tensor, distance: Tensor, rows: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        count, twins = rows.shape[1], distance == 0  # the row itself and its duplicates
        others = twins.sum(1, keepdim=True)
        first = distance.gather(1, others.clamp_max(count - 1))
        place = others - 1 + ranks.to(rows.device)
        # Rows that were not computed are no nearer than the limit.
        near = distance.minimum(limit).gather(1, place.clamp_max(count - 1))
        near = near.masked_fill(place >= count, torch.nan)
        own = ends[number]
        inside = twins & (rows >= own[:, :1]) & (rows < own[:, 1:])
        duplicates = torch.stack([twins.sum(1), inside.sum(1)], dim=1) - 1
        return ((others < count) & (first <= limit))[:, 0], near, duplicates

    def of_block(search: Search, query: Tensor, number: Tensor) -> list[Tensor]:
        bounds = torch.empty(len(query), len(search), device=search.device)
        near, duplicates = search.ask(query, 1, settle, number, bounds)
        place = duplicates[:, :1] + ranks.to(search.device)
        # kthvalue may find another one of equal numbers in each run.
        if search.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
            far = _sorted(bounds).gather(1, place.clamp_max(len(search) - 1))
        else:
            far = _of_rank(bounds, ranks.tolist())
        far = far + search.squares(query)
        reach = torch.where(near.isnan(), root(far), near)
        # Stays below the true distance after rounding to float32.
        reach = (reach * (1 - 2.0**-22)).masked_fill(place >= len(search), torch.inf)
        return [reach.float(), duplicates.int()]

    distances, duplicates = _of_rows(bank, of_block, class_wise, device, progress, "certificate", 1)
    return distances, duplicates


def progress_bar(parts: Iterable[T], total: int, progress: bool, title: str) -> Iterable[T]:
    """The parts, with a progress bar if `progress` and tqdm is installed."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return parts
        return tqdm(parts, total=total, desc=title)
    return parts


def root(square: Tensor) -> Tensor:
    """The root of a bound on a squared distance, 0 for a negative one."""
    return square.double().clamp_min(0).sqrt()


def _of_rows(
    bank: LatentBank,
    of_block: Callable[[Search, Tensor, Tensor], list[Tensor]],
    class_wise: bool,
    device: torch.device | str | None,
    progress: bool,
    title: str,
    least: int = 512,
) -> list[Tensor]:
    """Searches for all rows of a bank, at least `least` at a time; the results on the CPU."""
    place = torch.device(device or bank.device)
    numbers = _BOUNDS.get(place.type, 2**28)
    blocks = [
        (scope, slice(first, min(first + step, scope.stop)))
        for scope in _scopes(bank, class_wise)
        for step in [max(least, numbers // (scope.stop - scope.start))]
        for first in range(scope.start, scope.stop, step)
    ]

    def parts() -> Iterator[tuple[Tensor, ...]]:
        search = None
        for scope, rows in blocks:
            if search is None or search.scope != scope:
                search = Search(bank, scope, place)
            query = bank.rows[rows].to(place, search.exact)
            number = torch.arange(rows.start, rows.stop, device=place)
            yield tuple(value.cpu() for value in of_block(search, query, number))

    with full_precision(), torch.autocast(place.type, enabled=False):
        found = list(progress_bar(parts(), len(blocks), progress, title))
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _scopes(bank: LatentBank, class_wise: bool) -> list[slice]:
    return [bank.segment(name) for name in bank.classes] if class_wise else [bank.whole]


def _of_rank(x: Tensor, ranks: list[int]) -> Tensor:
    """The (rank + 1)-th smallest numbers of each line, (b, H), without a full sort."""
    return torch.stack([x.kthvalue(min(rank + 1, x.shape[1])).values for rank in ranks], dim=1)


def _sorted(x: Tensor) -> Tensor:
    """`x` sorted along the second axis, on a CPU in place."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    x.numpy().sort(axis=1)  # without the indices that torch adds: some 20 times as fast
    return x
