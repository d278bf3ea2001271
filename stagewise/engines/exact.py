r"""The exact engine: every row.

With the bank's mean `c` and `y = x_t - a_t c`, the log-weights of all rows are one matrix product,

    l_i = (a/s^2) <y, x^(i)> - (a^2 / 2 s^2) ||x^(i) - c||^2 - (a/s^2) <y, c> - ||y||^2 / 2 s^2,

and the mean `m = sum_i gamma_i x^(i)` is a second one, needed only for queries whose posterior is
not on a few rows. So the cost is one product over the bank for all queries, and a second for those
in navigation.

**Precision.** In float32 a logit has an error `delta` of about 2^-25 of its factors' norms, and
more for rows like the query (`products.rounding`): negligible in navigation, and hundreds near the
data. But there few rows carry the posterior, and their log-weights are computed again from
differences in float64. The remaining error is that of the tail, which moves the mean by about

    (delta |gamma_tail| + e) R / (|m - c| min(s_t, 1))

of its distance from c (R is the root mean square of |x - c|; the last factor is for the velocity),
if the errors of different rows are independent. Here e is the rounding of the second product: of
its weights and its partial sums. Rows far from the origin are therefore centred before they are
multiplied in float32, and weights count from their mean if all rows are summed
(`LogWeights.product`): the sum is then as small as m - c. The engine checks for each query that the
estimate is below `rtol`. Otherwise it solves the query again, on a CPU first with 64 leading rows,
and then in float64. `precision="float64"` solves all queries so, and is the reference.

On an accelerator the checks cost two device syncs per call, for B booleans each; the two fixed
precisions cost none. For banks on CUDA there are kernels without syncs: class-wise queries need no
checks, and so no `rtol` (`stagewise.engines.fused`); all rows, or many queries for each class, go
through products (`stagewise.engines.all_rows`), where the device checks.

Below the noise level `Engine.sigma_floor` even float64 loses the fourth digit after the point of a
logit; the oracle is evaluated there instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.engines import all_rows, fused
from stagewise.engines.base import NOTHING, Engine, lost
from stagewise.engines.log_weights import CACHED, LogWeights
from stagewise.posterior import UNDERFLOW, Posterior, Rest, posterior_of, replace_queries
from stagewise.products import full_precision, rounding, working_dtype
from stagewise.queries import Queries, indices_of

__all__ = ["FEW", "MORE", "Exact", "Leading", "in_blocks"]

FEW, MORE = 8, 64
"""Rows whose log-weights are computed again in float64: if the error is checked, and if not."""

_LEAST = 1e-18
"""The least weight in the sum of squares."""

_DUST = 1e-18
"""A row of less weight adds less than rounding."""

_WEIGHT, _SUM = 3.0, 16.0
"""Rounding errors of a weight, and of a sum of weighted rows, in units of that of a product."""

_LOGIT_BYTES = 2**29
"""Memory for logits: for more queries the bank is read again."""

_SMALL_BYTES = 2**24
"""Memory for logits if reading the bank again is cheap."""

Finish: TypeAlias = "Callable[[LogWeights, Leading], Posterior]"
"""From log-weights, the largest ones computed again, to a posterior with its mean."""


class Exact(Engine):
    """Reads every row: the exact posterior.

    Args:
        precision: "auto" (default) multiplies in the fastest type that the rows allow and checks
            each query's error against `rtol`; "float64" is the reference; "float32" is "auto"
            without the check, for accelerators where even one sync per call is too much.
        rtol: Relative error `|dm| / (|m - c| min(s_t, 1))` that "auto" allows, default 1e-5, and
            1e-4 for 16-bit rows on an accelerator, whose products are split (`stagewise.products`);
            for a bank on CUDA `|dm| / |m - x_1|`. From 1e-4 on, a CPU with bfloat16 instructions
            uses them for bfloat16 rows, whose own rounding is larger.
        chunk_size: Rows multiplied at a time; default all, or 2^23 numbers if they must be
            converted or centred, and 32 MiB if they must be moved.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> from stagewise.engines import Exact
        >>> oracle = Oracle(LatentBank(torch.randn(100, 8)), engine=Exact())
        >>> oracle.posterior(torch.randn(4, 8), 0.5).tail_mass.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    runs_kernel = True

    def __init__(
        self,
        precision: Literal["auto", "float32", "float64"] = "auto",
        *,
        rtol: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if precision not in ("auto", "float32", "float64"):
            raise ValueError(
                f'Expected `precision` to be "auto", "float32" or "float64", got {precision!r}.'
            )
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"Expected `chunk_size` of at least 1, got {chunk_size}.")
        if rtol is not None and not 0 < rtol < 1:
            raise ValueError(f"Expected `rtol` between 0 and 1, got {rtol}.")
        self.precision, self.rtol, self.chunk_size = precision, rtol, chunk_size

    @override
    def reads_ends(self, bank: LatentBank, device: torch.device, count: int) -> bool:
        plain = self.precision != "float64" and self.chunk_size is None
        return plain and count > 0 and fused.serves(bank, device)

    @override
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        if self.reads_ends(bank, queries.xt.device, len(queries)):
            found = fused.runs(self._by_kernels, bank, queries, k)
            if found is not None:
                return found
        queries, (alpha, sigma, *_) = queries.on_host(), queries.path
        away = queries.xt.norm(dim=1) - alpha * (bank.max_norm - bank.radius)
        far = lost(away, alpha * bank.radius, sigma)
        if far.device.type != "cpu" or far.any():
            queries = replace(queries, xt=queries.xt.masked_fill(far[:, None], torch.nan))
        return in_blocks(bank, queries, lambda some: self.solve(bank, some, k))

    def _by_kernels(self, bank: LatentBank, queries: Queries, k: int) -> Posterior:
        every, segments = range(len(queries)), queries.segments
        if segments is None:
            return self._of_width(bank, queries, k, bank.largest_class)
        # Queries of classes read their class only, also in a batch with queries of the bank.
        few, many = ([i for i in every if (segments[i] == bank.whole) == all_] for all_ in (0, 1))
        parts = [
            self._of_width(bank, some, k, max(some.sizes))
            for some in (queries.select(at) for at in (few, many) if at)
        ]
        return Posterior.cat(parts, [*few, *many])

    def _of_width(self, bank: LatentBank, queries: Queries, k: int, width: int) -> Posterior:
        few = fused.by_rows(bank, len(queries), width)
        few |= len(bank) <= 2 * max(all_rows.LEADING, k)
        # A card without products of 16-bit rows, or torch before 2.8.
        if few or working_dtype(bank.dtype, queries.xt.device) != bank.dtype:
            return fused.posterior(bank, queries, k, width)
        rtol = self._rtol(bank.dtype) if self.precision == "auto" else None
        return all_rows.posterior(bank, queries, k, rtol)

    def _rtol(self, dtype: torch.dtype) -> float:
        return self.rtol or (1e-5 if dtype == torch.float32 else 1e-4)

    def solve(
        self,
        bank: LatentBank,
        queries: Queries,
        k: int,
        finish: Finish | None = None,
        table: Tensor | None = None,
        lead: int = FEW,
    ) -> Posterior:
        """The posterior by a product, or in float64 for queries with too large an error.

        The logits of the queries fit into memory. `finish` makes a posterior from the weights,
        default with all rows. `table` has the rows of each query, (B, n), -1 for none; default its
        segment.
        """
        end = finish or self._finish
        dtype, size = self._dtype(bank, queries), self.chunk_size
        found = LogWeights(bank, queries, dtype, table=table, chunk_size=size, sums=finish is None)
        if self.precision != "auto" or dtype == torch.float64:
            return end(found, Leading.of(found, k, MORE))
        leading = Leading.of(found, k, lead)
        post = end(found, leading)
        wrong = indices_of(~(_error(found, leading, post) <= self._rtol(dtype)))
        if not wrong:
            return post
        some, rows = queries.select(wrong), None if table is None else table[queries.place(wrong)]
        if lead == FEW and queries.xt.device.type == "cpu":
            better = self.solve(bank, some, k, finish, rows, MORE)
        else:
            again = LogWeights(bank, some, torch.float64, table=rows, chunk_size=size)
            better = end(again, Leading.of(again, k, FEW))
        return replace_queries(post, wrong, better, len(queries))

    def _finish(self, found: LogWeights, leading: Leading) -> Posterior:
        """The mean: of a few rows if they carry the posterior, otherwise by a product."""
        queries, count = found.queries, len(found.queries)
        if self.precision != "auto" and leading.tail.device.type != "cpu":
            mean = found.moment(leading.columns, leading.shares)
            mean += found.product(leading.rest, total=leading.tail)
            return replace(leading.post, mean=mean)
        told = indices_of(torch.cat([leading.tail > NOTHING, found.wide]))
        needed, wide = ({i - n for i in told if n <= i < n + count} for n in (0, count))
        spread, tails = sorted(needed & wide), sorted(needed - wide)
        narrow = sorted(set(range(count)).difference(spread))
        mean = torch.empty_like(queries.xt)
        if ahead := [query for query in spread if query in found.ahead]:
            index = queries.place(ahead)
            lead = leading.columns[index], leading.shares[index], leading.scale[index]
            mean[index] = found.summed(ahead, *lead)
            spread = [query for query in spread if query not in found.ahead]
        if spread:
            # If it is nearly all queries, a product for all is cheaper than selecting them.
            some = spread if ahead or len(narrow) >= count / 16 else list(range(count))
            ones = torch.ones_like(leading.tail[: len(some)])
            mean[queries.place(some)] = found.product(leading.weights, some, ones)
        if narrow:
            index = queries.place(narrow)
            shares = torch.threshold(leading.shares[index], _DUST, 0)
            mean[index] = found.moment(leading.columns[index], shares, narrow)
        if tails:
            index = queries.place(tails)
            mean[index] += found.product(leading.rest, tails, leading.tail[index])
        return replace(leading.post, mean=mean)

    def _dtype(self, bank: LatentBank, queries: Queries) -> torch.dtype:
        """The type in which the rows are multiplied."""
        if self.precision == "float64":
            return torch.float64
        rough = self.rtol is not None and self.rtol >= 1e-4
        return working_dtype(bank.dtype, queries.xt.device, rough)

    def __repr__(self) -> str:
        return f'Exact("{self.precision}")'


@dataclass(frozen=True)
class Leading:
    """A posterior whose largest ("leading") log-weights come from differences.

    Attributes:
        post: The posterior without its `mean`.
        columns: The leading rows, (B, n), as columns of the logits.
        shares: Their weights, (B, n), float64.
        next: The columns that follow, by their logits, descending, (B, m).
        weights: Weights of all rows, (B, width), in the dtype of the logits.
        tail: The sum of the weights that do not lead, (B,), float64.
        squares: The sum of their squares, (B,), float64.
        scale: Weights that do not lead are `scale exp(logits)`, (B,), float64.
        error: Estimated error of the mean by the logits of the tail, in units of the rows' radius,
            (B,).
    """

    post: Posterior
    columns: Tensor
    shares: Tensor
    next: Tensor
    weights: Tensor
    tail: Tensor
    squares: Tensor
    scale: Tensor
    error: Tensor

    @property
    def rest(self) -> Tensor:
        """The weights with 0 for the leading rows, (B, width)."""
        return self.weights.scatter(1, self.columns, 0)

    @classmethod
    def of(cls, found: LogWeights, k: int, count: int) -> Leading:
        """Computes the `count` largest log-weights again; shifts the logits to a maximum of 0."""
        width = found.logits.shape[1]
        columns = found.logits.topk(min(max(k, count + 1), width), dim=1).indices
        lead = columns[:, :count]
        exact = found.differences(lead)
        peak = exact.amax(1)
        weights, sums = _exponentials(found.logits, found.lift(peak), columns)
        after = found.logits.gather(1, columns[:, count:]).double()
        listed = torch.cat([exact - peak[:, None], after], dim=1)
        post, shares = posterior_of(listed, found.rows(columns), k, rest=Rest(peak, *sums))
        # The largest weight was 1 before the division by this.
        total = 1 / shares[:, :count].amax(1)
        few = shares[:, count:]
        tail = sums[0] / total + few.sum(1)
        squares = sums[1] / total**2 + few.square().sum(1)
        error = torch.zeros_like(tail)
        if width > count:
            delta = found.noise(columns[:, count : count + 1], after[:, 0])
            # Either the logits of the tail are nearly right, or they are too small to matter.
            error = (delta * squares.sqrt() * (16 * delta).exp()).nan_to_num(torch.inf)
            error = torch.minimum(error, width * (after[:, 0] + 16 * delta).exp())
        scale = 1 / total
        weights.mul_(scale.to(weights.dtype)[:, None])
        weights.scatter_(1, columns, shares.to(weights.dtype))
        followers = columns[:, count:]
        return cls(post, lead, shares[:, :count], followers, weights, tail, squares, scale, error)


def in_blocks(
    bank: LatentBank, queries: Queries, solve: Callable[[Queries], Posterior]
) -> Posterior:
    """Solves queries in parts whose logits fit into memory.

    Queries of the same rows are adjacent, and selected without a copy. The logits of a part have
    the width of its largest segment, so queries of the whole bank form parts of their own.
    """
    parts: list[Posterior] = []
    order: list[int] = []
    assert queries.segments is not None
    segments = queries.segments
    every = bank.whole
    whole = [rows == every for rows in segments]
    with full_precision():
        for same in (False, True):
            at = [i for i, flag in enumerate(whole) if flag == same]
            at.sort(key=lambda i: segments[i].start)
            if at:
                step = _at_a_time(queries.select(at))
                parts += [
                    solve(queries.select(at[first : first + step]))
                    for first in range(0, len(at), step)
                ]
                order += at
    return Posterior.cat(parts, order)


def _at_a_time(queries: Queries) -> int:
    width, dim = max(queries.sizes), queries.xt.shape[1]
    # Small enough for the cache; but only short rows are cheap to read again.
    count = max(_SMALL_BYTES // (4 * width), min(128, dim // 32), 1)
    return max(1, min(count, _LOGIT_BYTES // (4 * width)))


def _exponentials(
    logits: Tensor, shifts: Sequence[Tensor], listed: Tensor
) -> tuple[Tensor, Tensor]:
    """`w_i = exp(l_i)`, (B, width), 0 if it is listed, and sums of `w`, `w^2`, `w l`, (3, B).

    Subtracts the shifts, (B,) each, from the logits in place. A few queries at a time, for a CPU's
    cache.
    """
    weights = torch.empty_like(logits)
    sums = logits.new_empty(3, len(logits), dtype=torch.float64)
    numbers = CACHED.get(logits.device.type, 2**62)
    step = max(1, numbers // logits.shape[1])
    # Denormal numbers take a CPU a hundred times as long: weights that would underflow are 0, and
    # squares are those of at least `_LEAST`.
    least = math.exp(UNDERFLOW)
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        own, w = logits[part], weights[part]
        for shift in shifts:
            own.sub_(shift[part, None])
        torch.clamp_min(own, UNDERFLOW, out=w)
        torch.threshold_(w.exp_(), 1.001 * least, 0).scatter_(1, listed[part], 0)
        some = w.clamp_min(_LEAST)
        sums[0, part] = w.sum(1, dtype=torch.float64)
        sums[1, part] = some.mul_(some).sum(1)
        sums[2, part] = torch.mul(w, own, out=some).sum(1)
    return weights, sums


def _error(found: LogWeights, leading: Leading, post: Posterior) -> Tensor:
    """The estimated error of the mean over its distance from the bank's mean, (B,).

    It includes the velocity's factor 1 / sigma near the data.
    """
    length = (post.mean - found.origin - found.shift).norm(dim=1)
    length = length * found.queries.path.sigma.clamp_max(1)
    spread = found.bank.mean_sq_norm.to(length.device).sqrt()
    wide, (unit, _) = found.wide, rounding(found.dtype, found.bank.dim)
    squares = torch.where(wide, 1 / leading.post.ess, leading.squares)
    share = torch.where(wide, 1, leading.tail).square()
    # The partial sums are rounded: at random, or in one direction.
    random, along = squares, share
    if found.whole:
        random = along = torch.maximum(squares - share / len(found.bank), 1e-6 * squares)
    sums = spread * random.sqrt() + found.shift.norm() * along.sqrt()
    rounded = unit * (_WEIGHT * spread * squares.sqrt() + _SUM * sums)
    error = leading.error * spread + torch.where(leading.tail > NOTHING, rounded, 0)
    return torch.where(error > 0, error / length, 0)
