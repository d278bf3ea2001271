r"""The exact oracle of a smoothed set: a mixture of N Gaussians in place of N rows.

With the path's a and s, `v = s^2 + a^2 f^2`, `r_i = x_t - a x_i`, `p_i = A_i r_i` (K numbers),
`G_i = A_i A_i^T` and `M_i = I + (a^2/v) G_i`, the log-weight of row i and the mean of its Gaussian
given x_t are (Woodbury's identity)

    l_i = -1/2 [ |r_i|^2 / v - (a^2/v^2) p_i^T M_i^-1 p_i + log det M_i + D log(v / s^2) ],
    E[x~_1 | x_t, i] = (s^2/v) x_i + (a f^2/v) x_t + (a s^2/v^2) A_i^T M_i^-1 p_i.

`G_i = U_i diag(lambda_i) U_i^T` is diagonalised once; then M_i is diagonal. **One product for the
weights**: with `W_i = U_i^T g / sqrt K` and the products `P = (x_i - c) . (x_t - a c)` of all rows
(c the bank's mean),

    U_i^T p_i = W_i (P_{n(i,.)} - P_i) - a b_i,    b_i = U_i^T A_i (x_i - c),

that is, `W'_i = [W_i, -W_i 1, -b_i]` (stored) times the products of K + 1 rows, and a.

**One product for the mean**: `A_i^T M_i^-1 p_i` is a combination of rows, so the weights of the
rows and those of their neighbours are added up first.

`g = f = 0` is the plain oracle, and `log_evidence` means what it does there. Near t = 1 the
posterior need not collapse on a row: Gaussians overlap. All is computed in float64, but for queries
at whose time nothing is smoothed: on a CPU the plain engine answers those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.conventions import STAGEWISE, ConventionLike
from stagewise.engines import Auto, Engine
from stagewise.oracle import Oracle
from stagewise.paths import Path, PathCoefficients
from stagewise.posterior import UNDERFLOW, Posterior
from stagewise.queries import Queries, Times, indices_of, with_source_weight
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength, strength_at
from stagewise.stages import StageBoundary

__all__ = ["SmoothedOracle"]

_LOGITS = 2**24
"""Products with rows, and numbers that are as many, held at a time; there are about four."""

_TURNED = 2**17
"""Numbers `U_i^T p_i` held at a time: what stays in a CPU's cache."""

_GATHER = 2**24
"""Numbers of gathered rows held at a time."""

_DUST = 1e-18
"""A row of less weight adds less than rounding does."""

_FEW = 8
"""One of so many rows is few enough to take them one by one."""

_FACTORS = 16
"""Factors of a determinant, each below 1e18, that float64 holds."""


class SmoothedOracle(Oracle):
    """The exact `Oracle` of a smoothed set.

    `Mix` and `StageCurve.measure` take it as they take an oracle: x_1 is then a draw from the
    smoothed set (`Smoothing.draw`), with its row as `source`. `ReferenceSet`, which reads single
    rows, does not know the Gaussians.

    The first question diagonalises the G_i and keeps `8 N (K (K + 4) + 2)` bytes beside the queries
    (N = 20 000, K = 8: 16 MB; N = 1.28 million: 1 GB). Sums over rows are atomic on CUDA: for runs
    that must agree to the last bit there call `torch.use_deterministic_algorithms(True)`.

    Exact for samples drawn around the rows themselves. Where the VAE draws latents around theirs,
    it does not know that spread: give the smoothing an isotropic floor of about its size.

    Args:
        bank: The rows.
        path: The path of training.
        smoothing: The Gaussians around the rows of this bank.
        boundary: Rows are themselves before this time; what the draws are given (`Smoothing.draw`).
        strength: In its place, any function of t.
        null_class: See `Oracle`.
        convention: See `Oracle`, but for `boundary` and `strength`.

    Raises:
        ValueError: If the smoothing was made for another bank, or boundary and strength are given.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, LinearPath, SmoothedOracle, Smoothing
        >>> bank = LatentBank(torch.randn(200, 16))
        >>> smoothing = Smoothing(bank, progress=False)
        >>> oracle = SmoothedOracle(bank, LinearPath(), smoothing)
        >>> source, t = torch.randint(200, (8,)), torch.rand(8)
        >>> x0, x1 = torch.randn(8, 16), smoothing.draw(bank.rows[source], source)
        >>> xt = oracle.path.interpolate(x0, x1, t)
        >>> u = x1 - x0 + oracle.correction(xt, t, x1)
        >>> torch.allclose(u, oracle.velocity(xt, t), atol=1e-3)
        True
    """

    smoothing: Smoothing

    def __init__(
        self,
        bank: LatentBank,
        path: Path | None,
        smoothing: Smoothing,
        *,
        boundary: float | StageBoundary | None = None,
        strength: Strength | None = None,
        null_class: int | None = None,
        convention: ConventionLike = STAGEWISE,
    ) -> None:
        if not isinstance(smoothing, Smoothing):
            raise TypeError(
                f"Expected a Smoothing, got {type(smoothing).__name__}: "
                "SmoothedOracle(bank, path, Smoothing(bank))."
            )
        smoothing.check_bank(bank)
        super().__init__(
            bank, path, _Gaussians(smoothing), null_class=null_class, convention=convention
        )
        self.smoothing = smoothing
        self.boundary, self.strength = boundary, strength
        self._share(torch.zeros(1, 1), torch.ones(1))

    def _share(self, x: Tensor, t: Times) -> Tensor | None:
        return strength_at(x, t, self.boundary, self.strength)

    @override
    def sample(self, source: Tensor, t: Tensor, normals: Tensor) -> Tensor:
        x1 = super().sample(source, t, normals)
        return self.smoothing.moved(x1, source, normals, self._share(x1, t))

    @override
    def coefficients(self, xt: Tensor, t: Tensor) -> tuple[Tensor, PathCoefficients]:
        flat, path = super().coefficients(xt, t)
        share = self._share(flat, t)
        if share is None:
            return flat, path
        timed = _Timed(*path)
        timed.share = share.to(flat)
        return flat, timed

    def __repr__(self) -> str:
        return f"SmoothedOracle({self.bank!r}, {self.path!r}, {self.smoothing!r})"


class _Timed(PathCoefficients):
    """The path at B times, and what multiplies the Gaussians' widths there, `share` (B,)."""

    share: Tensor

    @override
    def select(self, index: Tensor) -> _Timed:
        timed = _Timed(*super().select(index))
        timed.share = self.share[index]
        return timed


class _Shapes(NamedTuple):
    """The Gaussians of all rows, float64: `W'_i`, (N, K, K + 2), and `lambda_i`, (N, K)."""

    turn: Tensor
    values: Tensor

    @classmethod
    def of(cls, bank: LatentBank, smoothing: Smoothing, device: torch.device) -> _Shapes:
        """Diagonalises `G_i`, from differences of rows."""
        parts, step = [], max(1, _GATHER // ((smoothing.neighbours + 1) * bank.dim))
        for some in torch.arange(len(bank)).split(step):
            x, factor, a = smoothing.factors(some, device)
            values, vectors = torch.linalg.eigh(a @ a.mT)
            mean = vectors.mT @ (a @ (x - bank.centre.to(device))[:, :, None])
            turn = factor * vectors.mT
            turn = torch.cat([turn, -turn.sum(2, keepdim=True), -mean], dim=2)
            parts.append((turn, values.clamp_min(0)))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Segment:
    """The n `rows` that queries look at, and the m `outside` that their Gaussians lean on besides.

    `near`, (n, K + 2), is where the factors of `W'_i` are: the neighbours of each row among both,
    the row itself, and after all rows a.
    """

    rows: slice
    outside: Tensor
    near: Tensor
    shapes: _Shapes

    @classmethod
    def of(cls, rows: slice, index: Tensor, shapes: _Shapes) -> _Segment:
        near, count = index[rows].long(), rows.stop - rows.start
        inside = (near >= rows.start) & (near < rows.stop)
        device = shapes.turn.device
        outside = near.new_empty(0)
        if count < len(index):
            outside = near[~inside].unique()
            beyond = count + torch.searchsorted(outside, near)
            near = torch.where(inside, near - rows.start, beyond)
        own, last = torch.arange(count), torch.full((count,), count + len(outside))
        near = torch.cat([near, own[:, None], last[:, None]], dim=1).to(device)
        return cls(rows, outside.to(device), near, _Shapes(shapes.turn[rows], shapes.values[rows]))

    def __len__(self) -> int:
        return len(self.near)

    @property
    def width(self) -> int:
        """Rows that are multiplied, n + m."""
        return len(self.near) + len(self.outside)

    def numbers(self, at: Tensor) -> Tensor:
        """The rows of the bank that stand at some places among both."""
        if not len(self.outside):
            return at + self.rows.start
        beyond = self.outside[(at - len(self)).clamp(0, len(self.outside) - 1)]
        return torch.where(at < len(self), at + self.rows.start, beyond)

    def samples(self, bank: LatentBank) -> Iterator[tuple[int, Tensor]]:
        """All of them less the bank's mean, float64, chunk by chunk, each with its place."""
        device, size = self.near.device, max(1, _GATHER // 8 // bank.dim)
        shift = (bank.offset - bank.centre).to(device)
        for first, rows in bank.chunks(self.rows, size, device):
            yield first - self.rows.start, rows + shift
        for first, few in enumerate(self.outside.split(size) if len(self.outside) else ()):
            yield len(self) + first * size, bank.take(few, device) - bank.centre.to(device)


class _Gaussians(Engine):
    """The posterior over the Gaussians of a smoothed set; see the module."""

    def __init__(self, smoothing: Smoothing) -> None:
        self.smoothing, self.plain = smoothing, Auto()
        self._shapes: dict[torch.device, _Shapes] = {}
        self._segments: dict[tuple[torch.device, int, int], _Segment] = {}

    @override
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        order, parts, path = [], [], queries.path
        if isinstance(path, _Timed) and queries.xt.device.type == "cpu":  # looks at values
            order = indices_of(path.share == 0)
        if order:
            plain = queries.select(order)
            parts.append(with_source_weight(self.plain.posterior(bank, plain, k), bank, plain))
        rest = sorted(set(range(len(queries))).difference(order))
        smoothed = queries.select(rest)
        for at, rows in smoothed.groups if rest else ():
            segment = self._segment(bank, rows, queries.xt.device)
            step = max(1, _LOGITS // segment.width)
            for first in range(0, len(at), step):
                some = smoothed.select(at[first : first + step])
                parts.append(_Solve(bank, segment, some, self.smoothing.floor).posterior(k))
            order += [rest[i] for i in at]
        return Posterior.cat(parts, order)

    def _segment(self, bank: LatentBank, rows: slice, device: torch.device) -> _Segment:
        key = (device, rows.start, rows.stop)
        if key not in self._segments:
            if device not in self._shapes:
                self._shapes[device] = _Shapes.of(bank, self.smoothing, device)
            self._segments[key] = _Segment.of(rows, self.smoothing.index, self._shapes[device])
        return self._segments[key]

    def __repr__(self) -> str:
        return f"Gaussians of {self.smoothing!r}"


class _Solve:
    """B queries over the Gaussians of a segment. Numbers of rows and queries are (n, B)."""

    def __init__(self, bank: LatentBank, segment: _Segment, queries: Queries, floor: float) -> None:
        self.bank, self.segment, self.queries = bank, segment, queries
        path, device = queries.path, queries.xt.device
        self.alpha = path.alpha
        self.variance = path.sigma.square()
        # g^2 and f^2 as multiples of those of the smoothing, and as they are.
        share = path.share if isinstance(path, _Timed) else torch.ones_like(self.alpha)
        self.width = share.square()
        self.floor = self.width * floor**2
        self.v = self.variance + path.alpha.square() * self.floor
        self.snr = path.alpha.square() * self.width / self.v
        self.y = queries.xt - path.alpha[:, None] * bank.centre.to(device)
        self.products = self.y.new_empty(segment.width + 1, len(queries))
        self.products[-1] = path.alpha
        for first, rows in segment.samples(bank):
            self.products[first : first + len(rows)] = rows @ self.y.T

    def posterior(self, k: int) -> Posterior:
        """Weights, statistics and mean."""
        rows, device = self.segment.rows, self.y.device
        norms = self.bank.sq_norms[rows].to(device)
        logits = self.alpha * self.products[: len(self.segment)]
        logits.addr_(norms, self.alpha.square(), alpha=-0.5)
        logits.sub_(self.y.square().sum(1) / 2).div_(self.v)
        logits.sub_(self.bank.dim / 2 * (self.v / self.variance).log())
        for at in self._parts():
            turned, scale = self._turned(at)
            square = turned.square_().div_(scale).sum(1)
            logits[at].addcmul_(square, self.snr / (2 * self.v))
            for factors in scale.split(_FACTORS, dim=1):
                logits[at].sub_(factors.prod(1).log_(), alpha=0.5)
        peak = logits.amax(0)
        gamma = logits.sub_(peak).clamp_min_(UNDERFLOW).exp_()
        total = gamma.sum(0)
        log_z = peak + total.log()
        gamma.div_(total)
        source, own = self.queries.source, None
        if source is not None:
            place = source.to(device) - rows.start
            there = (place >= 0) & (place < len(gamma))
            own = gamma.gather(0, place.clamp(0, len(gamma) - 1)[None])[0] * there
            own = own.masked_fill(source.to(device) < 0, torch.nan)
        weights, top = gamma.topk(min(k, len(gamma)), dim=0)
        missing = (0, k - len(weights))
        return Posterior(
            mean=self._mean(gamma),
            log_evidence=log_z,
            entropy=torch.special.entr(gamma).sum(0),
            ess=1 / gamma.square().sum(0),
            weights=pad(weights.T, missing),
            rows=pad(top.T + rows.start, missing, value=-1),
            tail_mass=torch.zeros_like(log_z),
            source_weight=own,
        )

    def _mean(self, gamma: Tensor) -> Tensor:
        """The posterior mean, (B, D)."""
        weights = torch.zeros_like(self.products)
        torch.threshold(gamma, _DUST, 0, out=weights[: len(gamma)])
        weights.mul_(self.variance / self.v)
        share = self.alpha * self.width * self.variance / self.v.square()
        on_host = gamma.device.type == "cpu"  # elsewhere to look would take a sync
        for at in self._parts():
            some: slice | Tensor = at
            if on_host:
                leading = at.start + (gamma[at] > _DUST).any(1).nonzero()[:, 0]
                if not len(leading):
                    continue
                some = leading
            turned, scale = self._turned(some)
            turned.div_(scale).mul_((gamma[some] * share)[:, None])
            moves = self.segment.shapes.turn[some].mT @ turned
            weights.index_add_(0, self.segment.near[some].flatten(), moves.flatten(0, 1))
        mean = (self.alpha * self.floor / self.v)[:, None] * self.y
        mean += self.bank.centre.to(mean.device)
        if on_host:
            used = (weights[:-1] != 0).any(1).nonzero()[:, 0]
            if len(used) < len(weights) / _FEW:
                rows = self.bank.take(self.segment.numbers(used), mean.device)
                rows -= self.bank.centre.to(mean.device)
                return mean.addmm_(weights[used].T, rows)
        for first, rows in self.segment.samples(self.bank):
            mean.addmm_(weights[first : first + len(rows)].T, rows)
        return mean

    def _parts(self) -> list[slice]:
        n, width = self.segment.near.shape
        step = max(1, _TURNED // (width * len(self.queries)))
        return [slice(first, min(first + step, n)) for first in range(0, n, step)]

    def _turned(self, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """`U_i^T p_i` and the diagonal of `M_i` for some rows i, each (m, K, B)."""
        shapes, near = self.segment.shapes, self.segment.near[at]
        gathered = self.products.index_select(0, near.flatten()).unflatten(0, near.shape)
        turned = torch.bmm(shapes.turn[at], gathered)
        one = torch.ones((), dtype=turned.dtype, device=turned.device)
        return turned, torch.addcmul(one, shapes.values[at][:, :, None], self.snr)
