r"""Coarse to fine: a projection of the rows finds them, the rows themselves decide.

With the bank's mean c, its r leading principal axes P (D, r), `z_i = P^T (x^(i) - c)` and
`w = P^T (x_t - a c)`, the log-weight of row i has a part along the axes and one across them:

    l_i = c_i + R_i,   c_i = -||w - a z_i||^2 / 2 s^2,   R_i = -||x_t' - a x'^(i)||^2 / 2 s^2.

White noise is independent along and across. So the coarse weights, the softmax of `c_i`, are the
posterior given w alone, and for a query made from a row of the bank

    E[gamma_i | w] = exp(c_i) / sum_j exp(c_j).                                                  (1)

Hence the k rows with the largest `c_i` are those that may be expected to carry the most. (Scores
with the length of `x'^(i)` in them find less.) Those rows are read, and their `l_i` are exact.

**What is left out.** By (1) the tail mass is on average that of the coarse weights. The `R_i` of
rows that were read tell more: with `Z = sum_read exp(l_i)` the odds of the tail are about

    mean_read exp(R) x sum_unseen exp(c_i) / Z.

The mean is mostly made by the source, whose R stands out by about `rho^2 ||x'||^2`, so it is rather
too large. But where few of many `exp(R_i)` make up the sum over the unseen, that varies by a factor
of up to 10, and so the odds get a margin of 5. On photographs and on made data, fewer than one
estimate in a hundred is below half the true tail mass, and the median is about twice it. It stays
an estimate: a source that is not known may be missed altogether, about as often as (1) says.

`z_i` is kept in bfloat16, which moves `c_i` by `e = rho u |z_i|`, `u = 2^-9 / sqrt(3)`, times a
roughly standard normal number. Among near duplicates that favours the rows that are found:
`e (e + 4)` is added to the log-odds of the tail.

**When r axes suffice.** They tell `1/2 sum_(j <= r) log(1 + rho^2 lambda_j)` nats about the row
(`Coarse.information`). The search finds what matters where that is a few nats above `log(n / k)`.
Before, in navigation, the tail is large, and `max_tail` sends such queries to `Exact`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.streaming import stream
from stagewise.engines.base import UNDERFLOW, Queries, blocks, where
from stagewise.engines.exact import Exact
from stagewise.engines.neighbours import Neighbours
from stagewise.engines.projection import Projection
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, inverse, put
from stagewise.products import full_precision, scores, working_dtype
from stagewise.spectrum import information

__all__ = ["Coarse"]

_MARGIN = 5.0
"""Factor on the odds of the estimated tail, see the module docstring."""

_DENSE = 4
"""Up to this many times k rows it is faster to read all of them, in order."""

_WIDER = 16
"""Queries whose estimated tail is too large read so many times more rows before they give up."""

_NARROW, _NEGLIGIBLE = 64, 1e-3
"""So many rows are read for a query if the others have so small a part of `max_tail`."""

_BLOCK = 64
"""Rows whose coarse weights are summed up in one number: about sqrt(N / k)."""

_CHUNK = 8192
"""Projected rows multiplied at a time on a CPU: the product then stays in its cache."""

_ROUNDING = 2**-9 / math.sqrt(3)
"""Standard deviation of a number's relative error in bfloat16."""

_LEAST = 1e-38
"""Weights below it are float32 zeros."""


@dataclass
class _Found:
    """Rows with the largest coarse weights, for B queries that look at the same segment.

    Attributes:
        rows: The rows, (B, n), in the bank's own order.
        coarse: Their `c_i`, up to what all `c_i` of a query share, (B, n), float64; descending,
            but for the source, which comes first.
        left: `log sum exp(c_i)` over the other rows, (B,), float64.
    """

    rows: Tensor
    coarse: Tensor
    left: Tensor

    @classmethod
    def of(
        cls, bank: LatentBank, made: Projection, queries: Queries, segment: slice, n: int
    ) -> _Found:
        logits, peaks, sums = _coarse(bank, made, queries, segment)
        known, place = _source(queries, segment)
        block, column = place // _BLOCK, place % _BLOCK
        # The n largest numbers are in the n blocks with the largest peaks.
        peak = peaks.gather(1, block).masked_fill(known, torch.inf)
        leading = peaks.scatter(1, block, peak).topk(min(n, peaks.shape[1]), dim=1).indices
        near = logits.unflatten(1, (-1, _BLOCK))
        near = near.gather(1, leading[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
        # The block of a known source is the first now.
        key = near.gather(1, column).masked_fill(known, torch.inf)
        columns = near.scatter(1, column, key).topk(n, dim=1).indices
        rows = leading.gather(1, columns // _BLOCK) * _BLOCK + columns % _BLOCK
        left = torch.cat(
            [near.scatter(1, columns, -torch.inf), sums.scatter(1, leading, -torch.inf)], dim=1
        )
        coarse = near.gather(1, columns).double()
        return cls(rows + segment.start, coarse, left.double().logsumexp(1))

    def first_rows(self, n: int) -> _Found:
        """The same if only the first n rows are taken."""
        left = torch.cat([self.coarse[:, n:], self.left[:, None]], dim=1).logsumexp(1)
        return _Found(self.rows[:, :n], self.coarse[:, :n], left)

    def __getitem__(self, index: Tensor) -> _Found:
        """The same for some of the queries."""
        return _Found(self.rows[index], self.coarse[index], self.left[index])


def _coarse(
    bank: LatentBank, made: Projection, queries: Queries, segment: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """`c_i` of all rows, (B, width), and the largest and the log-sum-exp of each block of them."""
    device, path = queries.xt.device, queries.path
    size, count = segment.stop - segment.start, len(queries)
    y = queries.xt - path.alpha[:, None] * bank.centre.to(device)
    query = (y @ made.axes.to(device).T) * (path.alpha / path.sigma**2)[:, None]
    snr = (path.alpha / path.sigma).square().float()
    half_norms = made.half_norms[segment].to(device)
    width = math.ceil(size / _BLOCK)
    logits = torch.empty(count, width * _BLOCK, device=device)
    logits[:, size:] = -torch.inf
    peaks, sums = (torch.empty(count, width, device=device) for _ in range(2))
    step = _CHUNK if device.type == "cpu" else 16 * _CHUNK
    kind = working_dtype(made.rows.dtype, device)
    for first, rows in stream(made.rows, segment, step, device, kind):
        at = first - segment.start
        part = scores(query, rows).addr_(snr, half_norms[at : at + len(rows)], alpha=-1)
        logits[:, at : at + len(rows)] = part
        here = slice(at // _BLOCK, math.ceil((at + len(rows)) / _BLOCK))
        parts = logits[:, at : here.stop * _BLOCK].unflatten(1, (-1, _BLOCK))
        peaks[:, here] = peak = parts.amax(2)
        # What underflows would take ten times as long.
        parts = (parts - peak[:, :, None]).clamp_min_(UNDERFLOW)
        sums[:, here] = parts.exp_().sum(2).log_() + peak
    return logits, peaks, sums


def _source(queries: Queries, segment: slice) -> tuple[Tensor, Tensor]:
    """Whether the source of each query is known and in the segment, and its place there; (B, 1)."""
    if queries.source is None:
        none = torch.zeros(len(queries), 1, dtype=torch.int64, device=queries.xt.device)
        return none.bool(), none
    source = queries.source.to(queries.xt.device)[:, None]
    known = (source >= segment.start) & (source < segment.stop)
    return known, torch.where(known, source - segment.start, 0)


class Coarse(Neighbours):
    """The mean over the rows that a projection finds, with the tail mass estimated.

    For hundreds of thousands of long rows, from the end of navigation on. The k rows of largest
    coarse weight are read, or 64 if all others together are negligible; and the source, if it is
    known. Queries that look at up to 4 k rows are answered exactly. Two device syncs beside those
    of `Exact`, one of them for each group of queries that look at the same rows, and as many again
    where more rows are read.

    Args:
        k: How many rows to read, default 512.
        dims: How many principal axes to search along, r, default 256; all that the bank has if
            those are fewer.
        max_tail: Queries with a larger estimated tail mass read 16 k rows instead; those for which
            that is not enough are answered by the exact engine. Default 1e-3. With None all are
            answered by what was found among k.

    Raises:
        ValueError: For numbers out of range.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, LinearPath, Oracle
        >>> bank = LatentBank(torch.randn(1000, 64))
        >>> oracle = Oracle(bank, LinearPath(), Coarse(k=64, dims=32))
        >>> x0, t = torch.randn(2, 64), torch.tensor([0.7, 0.7])
        >>> post = oracle.posterior(oracle.path.interpolate(x0, bank.rows[:2], t), t)
        >>> post.rows[:, 0], post.tail_kind
        (tensor([0, 1]), 'estimated')
    """

    def __init__(self, k: int = 512, *, dims: int = 256, max_tail: float | None = 1e-3) -> None:
        super().__init__(k, max_tail=max_tail)
        if dims < 1:
            raise ValueError(f"Expected `dims` of at least 1, got {dims}.")
        self.dims = dims
        self.exact = Exact()
        self._projections: WeakKeyDictionary[LatentBank, Projection] = WeakKeyDictionary()

    def prepare(self, bank: LatentBank) -> None:
        """Projects the rows, once for each bank, if there are more than 4 k."""
        if len(bank) > _DENSE * self.k:
            self.projection(bank)

    def projection(self, bank: LatentBank) -> Projection:
        """The projection of a bank, which is made when it is first asked for."""
        if bank not in self._projections:
            self._projections[bank] = Projection.of(bank, self._dims(bank))
        return self._projections[bank]

    def _dims(self, bank: LatentBank) -> int:
        return min(self.dims, bank.dim, len(bank))

    def information(self, bank: LatentBank, path: PathCoefficients) -> Tensor:
        """What the projection of a noisy sample tells about its row, in nats.

        Args:
            bank: The rows.
            path: Coefficients at B times, each (B,).

        Returns:
            `1/2 sum_(j <= r) log(1 + rho_t^2 lambda_j)`, (B,), float64. Compare with `log(n / k)`
            for the n rows that a query looks at.
        """
        return information(path.alpha / path.sigma, self.projection(bank).variances)

    def save(self, path: str | os.PathLike[str], bank: LatentBank) -> None:
        """Writes the projection of a bank to a safetensors file, in one step.

        Args:
            path: The file. It is replaced if it is there, once the new one is complete.
            bank: The rows. They are projected if that was not done yet.
        """
        self.projection(bank).save(path, bank)

    def load(self, path: str | os.PathLike[str], bank: LatentBank) -> None:
        """Takes the projection of a bank from a file, instead of making it.

        Args:
            path: What `save` wrote.
            bank: The bank that was projected, on any device.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no projection, one of other latents, or one on another number
                of axes.
        """
        self._projections[bank] = Projection.load(path, bank, self._dims(bank))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_projections"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _projections=WeakKeyDictionary())

    def __repr__(self) -> str:
        return f"Coarse(k={self.k}, dims={self.dims}, max_tail={self.max_tail})"

    def search(self, bank: LatentBank, queries: Queries, segment: slice, n: int) -> Tensor:
        """The rows of largest coarse weight, after the source; see `Neighbours.search`."""
        return _Found.of(bank, self.projection(bank), queries, segment, n).rows

    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """See `Engine.posterior`."""
        n = max(k, self.k)
        todo, done = list(range(len(queries))), []
        answers: list[Posterior] = []
        for width in (n,) if self.max_tail is None else (n, _WIDER * n):
            found, at = self._search_all(bank, queries, todo, width, k)
            if found is None:
                break
            good = list(range(len(at)))
            if self.max_tail is not None:
                good = where(found.tail_mass <= self.max_tail)
            answers.append(found[queries.index(good)])
            done += [at[i] for i in good]
            todo = sorted(set(todo).difference(done))
            if not todo:
                break
        if todo:
            answers.append(self.exact.posterior(bank, queries.select(todo), k))
        return Posterior.cat(answers)[queries.index(inverse(done + todo))]

    def _search_all(
        self, bank: LatentBank, queries: Queries, at: list[int], n: int, k: int
    ) -> tuple[Posterior | None, list[int]]:
        """What reading n rows says of those queries that look at many more, and which these are."""
        parts: list[Posterior] = []
        order: list[int] = []
        some = queries.select(at)
        with full_precision():
            for members, segment in some.groups:
                if segment.stop - segment.start > _DENSE * n:
                    parts += [self._find(bank, q, n, k) for q in blocks(some.select(members))]
                    order += [at[i] for i in members]
        return (Posterior.cat(parts) if parts else None), order

    def _find(self, bank: LatentBank, queries: Queries, n: int, k: int) -> Posterior:
        """The posterior over rows that are found, for queries that look at the same ones."""
        found = _Found.of(bank, self.projection(bank), queries, queries.segments[0], n)
        few = max(_NARROW, k)
        if few >= n:
            return self._read(bank, queries, found, k)
        less = found.first_rows(few)
        share = torch.sigmoid(less.left - less.coarse.logsumexp(1))
        narrow = where(share <= _NEGLIGIBLE * (self.max_tail or 1e-3))
        wide = sorted(set(range(len(queries))) - set(narrow))
        if not wide:
            return self._read(bank, queries, less, k)
        if not narrow:
            return self._read(bank, queries, found, k)
        post = self._read(bank, queries.select(wide), found[queries.index(wide)], k)
        other = self._read(bank, queries.select(narrow), less[queries.index(narrow)], k)
        return put(post, narrow, other, len(queries))

    def _read(self, bank: LatentBank, queries: Queries, found: _Found, k: int) -> Posterior:
        """The posterior over the rows found, and an estimate of what the others carry."""
        width = found.rows.shape[1]
        # In ascending order, as they lie in memory or in the file.
        table, order = found.rows.sort(1)
        post = self.exact.solve(bank, queries, width, table=table)
        coarse = found.coarse.gather(1, order.gather(1, torch.searchsorted(table, post.rows)))
        residual = post.weights.clamp_min(_LEAST).log() - coarse
        mean = residual.logsumexp(1) - math.log(width)
        moved = _ROUNDING * bank.radius * queries.path.alpha / queries.path.sigma
        tail = torch.sigmoid(found.left + mean + math.log(_MARGIN) + moved * (moved + 4))
        weights, rows = post.weights[:, :k], post.rows[:, :k]
        return replace(post, weights=weights, rows=rows, tail_mass=tail, tail_kind="estimated")
