r"""The Gaussians around rows: what is stored of them, and their log-weights and means.

With the path's a and s, `v = s^2 + a^2 h^2`, `r_i = x_t - a x_i`, `p_i = A_i r_i` (K numbers),
`G_i = A_i A_i^T` and `M_i = I + (a^2/v) G_i`, the log-weight of row i and the mean of its Gaussian
given x_t are (Woodbury's identity)

    l_i = -1/2 [ |r_i|^2 / v - (a^2/v^2) p_i^T M_i^-1 p_i + log det M_i + D log(v / s^2) ],
    E[x~_1 | x_t, i] = (s^2/v) x_i + (a h^2/v) x_t + (a s^2/v^2) A_i^T M_i^-1 p_i.

`G_i = U_i diag(lambda_i) U_i^T` is diagonalised once; then M_i is diagonal. **One product for the
weights**: with `W_i = U_i^T g / sqrt K` and the products `P = (a/v) (x_i - c) . (x_t - a c)` of all
rows (c the bank's mean),

    (a/v) U_i^T p_i = W_i (P_{n(i,.)} - P_i) - (a^2/v) b_i,    b_i = U_i^T A_i (x_i - c),

that is, `W'_i = [W_i, -W_i 1, -b_i]` (stored) times the products of K + 1 rows, and a^2/v.

**One product for the mean**: `A_i^T M_i^-1 p_i` is a combination of rows, so the weights of the
rows and those of their neighbours are added up first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from stagewise.bank import LatentBank
from stagewise.engines.base import Queries
from stagewise.engines.scan import needs_centring
from stagewise.paths import PathCoefficients
from stagewise.products import scores
from stagewise.smoothing import Smoothing

__all__ = ["Gaussians", "Mixture", "Shapes", "Timed"]

_TURNED = 2**18
"""Numbers `U_i^T p_i` held at a time: what stays in a CPU's cache."""

_GATHER = 2**24
"""Numbers of gathered rows held at a time."""

_KEPT = 2**24
"""Up to so many numbers `M_i^-1 U_i^T p_i` are kept from the weights to the mean."""

_HELD = 2**22
"""Up to so many numbers of picked rows are kept from the weights to the mean."""

_ROWS = 2**20
"""Numbers of rows that are centred and multiplied at a time."""


class Timed(PathCoefficients):
    """The path at B times, and what multiplies the Gaussians' widths there, `share` (B,)."""

    share: Tensor

    def select(self, index: Tensor) -> Timed:
        """See `PathCoefficients`."""
        timed = Timed(*super().select(index))
        timed.share = self.share[index]
        return timed


@dataclass(frozen=True)
class Shapes:
    """The Gaussians of all rows, on one device, float64.

    Attributes:
        turn: `W'_i`, (N, K, K + 2).
        values: `lambda_i`, (N, K).
    """

    turn: Tensor
    values: Tensor

    @classmethod
    def of(cls, bank: LatentBank, smoothing: Smoothing, device: torch.device) -> Shapes:
        """Diagonalises `G_i`, from differences of rows."""
        index, k, parts = smoothing.index, smoothing.neighbours, []
        step = max(1, _GATHER // ((k + 1) * bank.dim))
        for first in range(0, len(bank), step):
            own = torch.arange(first, min(first + step, len(bank)))
            near = index[own].long()
            x = bank.take(own, device)
            count = (near != own[:, None]).sum(1).clamp_min(1).to(device)
            factor = (smoothing.scale / count.double().sqrt())[:, None, None]
            a = factor * (bank.take(near, device) - x[:, None])
            values, vectors = torch.linalg.eigh(a @ a.mT)
            mean = vectors.mT @ (a @ (x - bank.centre.to(device))[:, :, None])
            turn = factor * vectors.mT
            turn = torch.cat([turn, -turn.sum(2, keepdim=True), -mean], dim=2)
            parts.append((turn, values.clamp_min(0)))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Gaussians:
    """Some rows with their Gaussians, and the rows that these lean on besides.

    Attributes:
        rows: The first, n of them, ascending: a slice of the bank's own order, or numbers.
        outside: The others, (m,), int64.
        near: Where the factors of `W'_i` are: the neighbours of each row among both, the row, and
            after all rows a^2/v, (n, K + 2), int64.
        turn: `W'_i`, (n, K, K + 2).
        values: `lambda_i`, (n, K).
    """

    rows: slice | Tensor
    outside: Tensor
    near: Tensor
    turn: Tensor
    values: Tensor

    @classmethod
    def of(cls, rows: slice | Tensor, index: Tensor, shapes: Shapes) -> Gaussians:
        """From the index (N, K) of a smoothing, which is on the CPU as numbers of rows are."""
        own = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        near, count, device = index[rows].long(), len(own), shapes.turn.device
        place = torch.searchsorted(own, near).clamp_max_(count - 1)
        inside = own[place] == near
        outside = near[~inside].unique()
        beyond = count + torch.searchsorted(outside, near)
        near = torch.where(inside, place, beyond)
        last = torch.full((count,), count + len(outside))
        near = torch.cat([near, torch.arange(count)[:, None], last[:, None]], dim=1)
        at = rows if isinstance(rows, slice) else rows.to(device)
        turn, values = shapes.turn[at], shapes.values[at]
        return cls(at, outside.to(device), near.to(device), turn, values)

    def __len__(self) -> int:
        return len(self.near)

    @property
    def width(self) -> int:
        """Rows that are multiplied, n + m."""
        return len(self.near) + len(self.outside)

    @cached_property
    def bags(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`W'_i` in float32, (n K, K + 2), what they multiply, int32; `W_i^T`, and `lambda_i`."""
        n, k, width = self.turn.shape
        turn = self.turn.float()
        table = self.near.int()[:, None].expand(n, k, width).flatten(0, 1)
        back = turn[:, :, :-1].mT.flatten(0, 1)
        return turn.flatten(0, 1), table, back, self.values.float()

    def numbers(self, at: Tensor) -> Tensor:
        """The rows of the bank that stand at some places among the first."""
        return at + self.rows.start if isinstance(self.rows, slice) else self.rows[at]

    def places(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows of the bank stand among the first, and whether they do."""
        if isinstance(self.rows, slice):
            place = (numbers - self.rows.start).clamp(0, len(self) - 1)
        else:
            place = torch.searchsorted(self.rows, numbers).clamp_max_(len(self) - 1)
        return place, self.numbers(place) == numbers

    def samples(
        self, bank: LatentBank, origin: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor]]:
        """All of them less `origin`, chunk by chunk, each with its place."""
        device, size = self.near.device, max(1, _ROWS // bank.dim)
        shift, begin, rest = (bank.offset.to(device) - origin).to(dtype), 0, self.outside
        if isinstance(self.rows, slice):
            begin, buffer = len(self), shift.new_empty(size, bank.dim)
            moved = origin is not bank.offset
            for first, rows in bank.chunks(self.rows, size if moved else None, device, dtype):
                place = first - self.rows.start
                yield place, torch.add(rows, shift, out=buffer[: len(rows)]) if moved else rows
        else:
            rest = torch.cat([self.rows, rest])
        for first, few in enumerate(rest.split(size) if len(rest) else ()):
            rows = bank.rows[few.to(bank.device)].to(device, dtype)
            yield begin + first * size, rows.add_(shift)


class Mixture:
    """B queries over Gaussians, in float64 or float32. Numbers of rows and queries are (n, B).

    Attributes:
        common: What all log-weights of a query have in common and `logits` leaves out, (B,),
            float64.
    """

    def __init__(
        self,
        bank: LatentBank,
        gaussians: Gaussians,
        queries: Queries,
        floor: float,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.bank, self.gaussians, self.dtype = bank, gaussians, dtype
        path, device = queries.path, queries.xt.device
        self.alpha, self.variance = path.alpha, path.sigma.square()
        # g^2 and h^2 as multiples of those of the smoothing, and as they are.
        self.width = path.share.square() if isinstance(path, Timed) else torch.ones_like(self.alpha)
        self.floor = self.width * floor**2
        self.v = self.variance + self.alpha.square() * self.floor
        self.snr = self.alpha.square() * self.width / self.v
        centre = bank.centre.to(device)
        # In float32 rows count from a mean that float32 has, if that is far from the origin.
        self.origin = centre.to(dtype).double()
        if dtype == torch.float32 and not needs_centring(bank, dtype):
            self.origin = bank.offset
        self.y = queries.xt - self.alpha[:, None] * centre
        query = (self.alpha / self.v)[:, None] * self.y
        self.products = self.y.new_empty(gaussians.width + 1, len(query), dtype=dtype)
        self.products[-1] = self.alpha.square() / self.v
        self.kept: list[Tensor] = []
        factor = query.to(dtype)
        few = gaussians.width * bank.dim <= _HELD and not isinstance(gaussians.rows, slice)
        samples = gaussians.samples(bank, self.origin, dtype)
        self.held = list(samples) if few else None
        for first, rows in self.held or samples:
            self.products[first : first + len(rows)] = scores(rows, factor)
        norm = bank.mean_sq_norm.to(device)
        self.common = (
            query @ (self.origin - centre)
            - (self.y.square().sum(1) + self.alpha.square() * norm) / (2 * self.v)
            - bank.dim / 2 * (self.v / self.variance).log()
        )

    def norms(self) -> Tensor:
        """Squared distances of the first rows from the bank's mean, (n,), float64."""
        at = self.gaussians.rows
        at = at if isinstance(at, slice) else at.to(self.bank.device)
        return self.bank.sq_norms[at].to(self.y.device)

    def logits(self) -> Tensor:
        """Log-weights less `common`, (n, B)."""
        gaussians = self.gaussians
        norms = (self.norms() - self.bank.mean_sq_norm.to(self.y.device)).to(self.dtype)
        half = (self.alpha.square() / (2 * self.v)).to(self.dtype)
        logits = torch.addr(self.products[: len(gaussians)], norms, half, alpha=-1)
        width, count = (self.width / 2).to(self.dtype), self._factors()
        keep = gaussians.values.numel() * len(self.y) <= _KEPT
        for part in self._parts():
            turned, scale = self._turned(part)
            for factors in scale.split(count, dim=1):
                logits[part].sub_(factors.prod(1).log_(), alpha=0.5)
            solved = torch.div(turned, scale, out=scale)
            logits[part].addcmul_(turned.mul_(solved).sum(1), width)
            if keep:
                self.kept.append(solved)
        return logits

    def select(self, at: list[int]) -> Mixture:
        """That of some of the queries; itself if that is all of them."""
        if len(at) == len(self.y):
            return self
        some = copy(self)
        for name in ("common", "alpha", "variance", "width", "floor", "v", "snr", "y"):
            setattr(some, name, getattr(self, name)[at])
        some.products, some.kept = self.products[:, at], []
        return some

    def mean(self, gamma: Tensor) -> Tensor:
        """The mean by weights (n, B) that add up to 1 but for rounding, (B, D), float64."""
        weights = torch.zeros_like(self.products[:-1])
        torch.mul(gamma, (self.variance / self.v).to(self.dtype), out=weights[: len(gamma)])
        share = (self.width * self.variance / self.v).to(self.dtype)
        near = self.gaussians.near[:, :-1]
        for number, part in enumerate(self._parts()):
            solved = self.kept[number] if self.kept else torch.div(*self._turned(part))
            moves = self._turned_back(part, solved.mul_((gamma[part] * share)[:, None]))
            weights.index_add_(0, near[part].flatten(), moves)
        self.kept = []
        away = self.bank.centre.to(self.y.device) - self.origin
        at = self.y + self.alpha[:, None] * away
        share = self.alpha * self.floor / self.v
        return self.origin + share[:, None] * at + self._sum(weights)

    def _sum(self, weights: Tensor) -> Tensor:
        """The rows less `origin`, added up with weights (n + m, B): (B, D), float64."""
        total = weights.new_zeros(weights.shape[1], self.bank.dim, dtype=torch.float64)
        if isinstance(self.gaussians.rows, slice) and len(weights) == len(self.bank):
            # Weights count from their mean: nearly equal ones would round away what is left.
            level = weights.mean(0)
            weights.sub_(level)
            offset = self.bank.centre.to(total.device) - self.origin
            total += len(weights) * level.double()[:, None] * offset
        samples = self.gaussians.samples(self.bank, self.origin, self.dtype)
        for first, rows in self.held or samples:
            total += (rows.T @ weights[first : first + len(rows)]).T
        return total

    def _factors(self) -> int:
        """Of how many factors the determinants are multiplied before their logarithm."""
        if self.dtype == torch.float64:
            return 16  # each is below 1e18
        largest = 1 + float(self.snr.max() * self.gaussians.values.max())
        return max(1, int(37 / math.log10(largest + 1)))

    def _parts(self) -> Iterator[slice]:
        n, width = self.gaussians.near.shape
        step = max(1, _TURNED // (width * len(self.y)))
        for first in range(0, n, step):
            yield slice(first, min(first + step, n))

    def _turned(self, at: slice) -> tuple[Tensor, Tensor]:
        """`(a/v) U_i^T p_i` and the diagonal of `M_i` for some rows i, each (m, K, B)."""
        gaussians, k = self.gaussians, self.gaussians.values.shape[1]
        if self.dtype == torch.float32:
            turn, table, _, values = gaussians.bags
            own = slice(at.start * k, at.stop * k)
            turned = embedding_bag(
                table[own], self.products, mode="sum", per_sample_weights=turn[own]
            ).unflatten(0, (-1, k))
            values = values[at]
        else:
            near, values = gaussians.near[at], gaussians.values[at]
            gathered = self.products.index_select(0, near.flatten()).unflatten(0, near.shape)
            turned = torch.bmm(gaussians.turn[at], gathered)
        return turned, (values[:, :, None] * self.snr.to(self.dtype)).add_(1)

    def _turned_back(self, at: slice, turned: Tensor) -> Tensor:
        """What rows i give to their neighbours and to themselves, (m (K + 1), B)."""
        if self.dtype == torch.float64:
            return torch.bmm(self.gaussians.turn[at][:, :, :-1].mT, turned).flatten(0, 1)
        m, k = turned.shape[:2]
        back = self.gaussians.bags[2][at.start * (k + 1) : at.stop * (k + 1)]
        return embedding_bag(
            _own_rows(m, k), turned.flatten(0, 1), mode="sum", per_sample_weights=back
        )


@lru_cache(maxsize=8)
def _own_rows(m: int, k: int) -> Tensor:
    """The K lines of each of m rows, for each of its K + 1 sums, (m (K + 1), K), on the CPU."""
    lines = torch.arange(m * k, dtype=torch.int32).view(m, 1, k)
    return lines.expand(m, k + 1, k).flatten(0, 1)
