r"""The one exact search for nearest rows: of each row of a bank, among the others.

All pairs are compared by a float32 product. With `u = 2^-24` a product of D numbers is off by less
than `8 sqrt(D) u |q| |x|` (the probabilistic bound of Higham and Mary, SIAM J. Sci. Comput. 41,
2019, with lambda = 8), so with `c = 8 (sqrt(D) + 1) u`

    (1 - c) (|q|^2 + |x|^2) - 2 <q, x>  <=  |q - x|^2.

For the rows where this is smallest the distance is computed again, from differences in float64. It
is that of the nearest rows for certain, once it is below the bound of all rows that were not
computed again; until then more of them are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.products import full_precision, scores

__all__ = ["Closest", "class_ends", "closest", "nearest_others", "shown"]

T = TypeVar("T")

_GATHER = 2**24
"""Numbers of gathered rows held at a time."""

_BOUNDS = 2**25
"""Bounds held at a time, on a CPU."""

_SPARE = 16
"""Rows computed exactly beside the neighbours that are wanted."""


class Closest(NamedTuple):
    """What is known of the other rows, for each row; exact copies of a row are not among them.

    Attributes:
        distances: Lower bounds on the distance from the nearest, 2nd, 4th, ..., 2^h-th nearest
            other row, infinite where there are fewer, (N, H), float32.
        beyond: The same for the (K + 1)-th nearest, (N,), float32.
        neighbours: The K nearest other rows, nearest first, in the bank's own order, (N, K), int32;
            -1 where there are fewer.
        copies: Rows that are equal, of all that were compared and of the own class, (N, 2), int32.
    """

    distances: Tensor
    beyond: Tensor
    neighbours: Tensor
    copies: Tensor


def closest(
    bank: LatentBank,
    neighbours: int = 0,
    class_wise: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Closest:
    """Compares all rows with all others.

    Args:
        bank: The rows.
        neighbours: K.
        class_wise: Whether to compare rows of the same class only.
        device: Where to compute, default where the rows are.
        progress: Whether to show a bar; without tqdm there is none.

    Returns:
        The result, on the CPU. The distances of the nearest and of the (K + 1)-th nearest row are
        exact to 1e-6, the others as far as the product is.
    """
    longest = max(scope.stop - scope.start for scope in _scopes(bank, class_wise))
    ranks = [2**h for h in range(max(1, (longest - 1).bit_length()))]
    options = (class_wise, device, progress, "certificate")
    reach, near, copies = _compare(bank, [*ranks, neighbours + 1], neighbours, *options)
    return Closest(reach[:, :-1].contiguous(), reach[:, -1].clone(), near, copies)


def nearest_others(
    bank: LatentBank,
    count: int,
    class_wise: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Tensor:
    """The nearest other rows of each row, without the bounds that `closest` adds at a price.

    Args:
        bank: The rows.
        count: K.
        class_wise: Whether to look among rows of the same class only.
        device: Where to compute, default where the rows are.
        progress: Whether to show a bar; without tqdm there is none.

    Returns:
        See `Closest.neighbours`, (N, K), int32, on the CPU.
    """
    return _compare(bank, [], count, class_wise, device, progress, "nearest rows")[1]


def _scopes(bank: LatentBank, class_wise: bool) -> list[slice]:
    return [bank.segment(name) for name in bank.classes] if class_wise else [bank.whole]


def _compare(
    bank: LatentBank,
    ranks: Sequence[int],
    neighbours: int,
    class_wise: bool,
    device: torch.device | str | None,
    progress: bool,
    title: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds at `ranks` (N, H), neighbours (N, K) and copies (N, 2) of all rows."""
    place = torch.device(device or bank.device)
    numbers = _BOUNDS if place.type == "cpu" else 8 * _BOUNDS
    ends = class_ends(bank).to(place)
    blocks = [
        (scope, slice(first, min(first + step, scope.stop)))
        for scope in _scopes(bank, class_wise)
        for step in [max(1, numbers // (scope.stop - scope.start))]
        for first in range(scope.start, scope.stop, step)
    ]

    def parts() -> Iterator[tuple[Tensor, ...]]:
        search = None
        for scope, rows in blocks:
            if search is None or search.scope != scope:
                search = _Search(bank, scope, ends, ranks, neighbours)
            yield tuple(value.cpu() for value in search.closest(rows))

    with full_precision():
        found = list(shown(parts(), len(blocks), progress, title))
    reach, near, copies = (torch.cat(column) for column in zip(*found, strict=True))
    return reach, near, copies


def class_ends(bank: LatentBank) -> Tensor:
    """Where the class of each row begins and ends, (N, 2), int32; the whole bank without labels."""
    segments = [bank.segment(name) for name in bank.classes] or [bank.whole]
    ends = torch.tensor([(rows.start, rows.stop) for rows in segments], dtype=torch.int32)
    return ends.repeat_interleave((ends[:, 1] - ends[:, 0]).long(), dim=0)


class _Search:
    """All rows of a scope, for the rows of a block."""

    def __init__(
        self,
        bank: LatentBank,
        scope: slice,
        ends: Tensor,
        ranks: Sequence[int],
        neighbours: int,
    ) -> None:
        self.bank, self.scope, self.ends, self.neighbours = bank, scope, ends, neighbours
        self.device = device = ends.device
        self.ranks = torch.tensor(ranks, dtype=torch.int64, device=device)
        self.wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
        shift = (bank.centre - bank.offset).to(device)
        # Rows far from 0 would lose their differences in a product.
        self.shift = shift.to(self.wide) if float(shift.norm()) > bank.radius else None
        norms = [
            self.centred(rows).double().square().sum(1)
            for _, rows in bank.chunks(scope, 1 + _GATHER // bank.dim, device, self.wide)
        ]
        self.norms = torch.cat(norms) * (1 - 8 * (math.sqrt(bank.dim) + 1) * 2.0**-24)

    def centred(self, rows: Tensor) -> Tensor:
        return rows.float() if self.shift is None else (rows - self.shift).float()

    def closest(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds at all ranks (b, H), neighbours (b, K), copies (b, 2) of a block of rows."""
        query = self.centred(self.bank.rows[rows].to(self.device, self.wide)).double()
        norms, start = self.norms.float(), self.scope.start
        low = torch.empty(len(query), len(norms), dtype=torch.float32, device=self.device)
        for first, chunk in self.bank.chunks(self.scope, None, self.device, self.wide):
            at = slice(first - start, first - start + len(chunk))
            torch.add(norms[at], scores(query, self.centred(chunk)), alpha=-2, out=low[:, at])
        index = torch.arange(rows.start, rows.stop, device=self.device)
        return self.ranked(index, low, self.neighbours + _SPARE)

    def ranked(self, rows: Tensor, low: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `closest`, from the bounds less the rows' own norms, (b, n), which are overwritten.

        Args:
            rows: The rows, (b,).
            low: The bounds.
            count: How many distances to compute exactly, or more where that is not enough.
        """
        own, size = self.norms[rows - self.scope.start, None], low.shape[1]
        count = min(count, size)
        value, column = low.topk(min(count + 1, size), dim=1, largest=False)
        exact, order = self.exact(rows, column[:, :count]).sort(dim=1)
        column = column[:, :count].gather(1, order)
        # What was not computed is no nearer than this.
        limit = _root(value[:, count:] + own) if count < size else exact.new_full((1, 1), torch.inf)
        twins = exact == 0  # the row itself and its copies
        others = twins.sum(1, keepdim=True)
        last = others + self.neighbours
        enough = (last < count) & (exact.gather(1, last.clamp_max(count - 1)) <= limit)
        wrong = (~enough[:, 0]).nonzero()[:, 0] if count < size else rows[:0]
        better = self.ranked(rows[wrong], low[wrong], 4 * count) if len(wrong) else ()

        place = others - 1 + self.ranks
        reach = exact.minimum(limit).gather(1, place.clamp_max(count - 1))
        if len(self.ranks):
            far = _root(_sort(low).gather(1, place.clamp_max(size - 1)) + own)
            reach = torch.where(place < count, reach, far).masked_fill(place >= size, torch.inf)
        place = others + torch.arange(self.neighbours, device=self.device)
        column += self.scope.start
        names = column.gather(1, place.clamp_max(count - 1)).masked_fill(place >= count, -1)
        ends = self.ends[rows]
        inside = (column >= ends[:, :1]) & (column < ends[:, 1:])
        copies = torch.stack([twins.sum(1), (twins & inside).sum(1)], dim=1) - 1
        # Below the true distance after roundings to float32, too.
        found = (reach * (1 - 2.0**-22)).float(), names.int(), copies.int()
        for value, new in zip(found, better, strict=bool(better)):
            value[wrong] = new
        return found

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Distances of rows (b,) from columns (b, n) of the scope, float64, to 2^-24."""
        stored, place = self.bank.rows, self.bank.device
        count, dim = columns.shape[1], self.bank.dim
        step = max(1, min(len(rows), _GATHER // 16 // (count * dim)))
        # One buffer, because fresh memory costs more than what is done with it here.
        buffer = torch.empty(step * count, dim, dtype=stored.dtype, device=place)
        distances = []
        for first in range(0, len(rows), step):
            at = slice(first, first + step)
            index = (columns[at] + self.scope.start).flatten().to(place)
            other = torch.index_select(stored, 0, index, out=buffer[: len(index)])
            own = stored[rows[at].to(place)].to(self.device, self.wide)
            gap = other.to(self.device, self.wide).view(-1, count, dim).sub_(own[:, None])
            distances.append(torch.linalg.vector_norm(gap, dim=2, dtype=torch.float64))
        return torch.cat(distances)


def _root(square: Tensor) -> Tensor:
    return square.double().clamp_min(0).sqrt()


def _sort(x: Tensor) -> Tensor:
    """Sorts along the second axis, in place where that is possible."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    x.numpy().sort(axis=1)  # without the indices that torch adds: some 20 times as fast
    return x


def shown(parts: Iterable[T], total: int, progress: bool, title: str) -> Iterable[T]:
    """The parts, with a bar if that is wanted and tqdm is there."""
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return parts
        return tqdm(parts, total=total, desc=title)
    return parts
