r"""The exact engine: every row.

With the bank's mean `c` and `y = x_t - a_t c`, the log-weights of all rows are one matrix product,

    l_i = (a/s^2) <y, x^(i)> - (a^2 / 2 s^2) ||x^(i) - c||^2 - (a/s^2) <y, c> - ||y||^2 / 2 s^2,

and the mean `m = sum_i gamma_i x^(i)` is a second one, which only those queries need whose
posterior is not carried by a few rows. So the cost of B queries is one product over the bank, and
that of the queries in navigation a second.

**Precision.** In float32 a logit is off by a `delta` of about 2^-25 of its factors' norms, and
more for rows like the query (`products.rounding`): nothing in navigation, and hundreds near the
data. But there few rows carry the posterior, and the log-weights of those are computed again from
differences in float64. What is left of the error is that of the tail, which moves the mean by about

    (delta |gamma_tail| + e) R / (|m - c| min(s_t, 1))

of its distance from c (R is the root mean square of |x - c|; the last factor is for the velocity),
if the errors of different rows are independent. Here e is the rounding of the second product: of
its weights, and of what the sum comes to on the way. The rows of a bank that is far from the origin
are therefore centred before they are multiplied in float32, and weights count from their mean where
all rows are summed (`Scan.product`): the sum is then as small as m - c is. The engine checks for
each query that the estimate is below `rtol`. If it is not, it does the query in float64.
`precision="float64"` does all of them so, and is the reference.

On an accelerator the checks cost two device syncs per call, for B booleans each; the two fixed
precisions cost none.

Below the noise level `base.sigma_floor` even float64 loses the fourth digit after the point of a
logit; the oracle is evaluated there instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import NOTHING, Engine, Queries, blocks, positions, where
from stagewise.engines.refined import FEW, MORE, Refined
from stagewise.engines.scan import Scan
from stagewise.posterior import Posterior, put
from stagewise.products import full_precision, rounding, working_dtype

__all__ = ["Exact"]

_DUST = 1e-18
"""A row of less weight adds less than rounding does."""

_WIDE = 0.25
"""Noise level above which a velocity does not show that a mean was summed up in float32, for rows
whose distances are about as large as their norms."""

_WEIGHT, _SUM = 3.0, 16.0
"""What a weight, and a sum of weighted rows, are rounded by, in units of what a product is."""

Finish: TypeAlias = Callable[[Scan, Refined], Posterior]
"""From the refined weights of a scan to a posterior."""


class Exact(Engine):
    """The posterior over all rows.

    Args:
        precision: "auto" (default) multiplies in the fastest type that the rows allow and checks
            each query's error against `rtol`; "float64" is the reference; "float32" is "auto"
            without the check, for accelerators where even one sync per call is too much.
        rtol: Relative error `|dm| / (|m - c| min(s_t, 1))` that "auto" lets pass, default 1e-5,
            and 1e-4 for 16-bit rows on an accelerator, whose products are split
            (`stagewise.products`). From 1e-4 on a CPU splits the products of bfloat16 rows too, if
            it has units for them: such rows have been rounded by more than that.
        chunk_size: Rows multiplied at a time; default all, or 32 MiB where they must be
            converted or moved.
    """

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

    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """See `Engine.posterior`. The tail mass is 0."""
        # Queries that look at the same rows then stand together, and are reached without a copy.
        order = sorted(range(len(queries)), key=lambda i: queries.segments[i].start)
        with full_precision():
            parts = [self.solve(bank, part, k) for part in blocks(queries.select(order))]
        return Posterior.cat(parts, order)

    def solve(
        self,
        bank: LatentBank,
        queries: Queries,
        k: int,
        finish: Finish | None = None,
        table: Tensor | None = None,
    ) -> Posterior:
        """Scans, refines, and does again what is not good enough.

        Args:
            bank: The rows.
            queries: The queries.
            k: How many of the largest weights to return.
            finish: What makes a posterior of the refined weights; default adds all other rows.
            table: The rows that each query looks at, (B, n); default all of its segment.
        """
        finish = finish or self._finish

        def scanned(queries: Queries, dtype: torch.dtype, table: Tensor | None) -> Scan:
            return Scan.of(bank, queries, dtype, table=table, chunk_size=self.chunk_size)

        scan = scanned(queries, self.dtype(bank, queries), table)
        rtol = self._tolerance(scan)
        if rtol is None:
            return finish(scan, Refined.of(scan, k, MORE))
        found = Refined.of(scan, k, FEW)
        post = finish(scan, found)
        wrong = where(~(_error(scan, found, post) <= rtol))
        if not wrong:
            return post
        part = scan.select(wrong)
        scan = scanned(part.queries, torch.float64, part.table)
        return put(post, wrong, finish(scan, Refined.of(scan, k, FEW)), len(queries))

    def _finish(self, scan: Scan, found: Refined) -> Posterior:
        """The mean: of a few rows where they are all that matters, otherwise by a product."""
        if self.precision != "auto" and found.tail.device.type != "cpu":
            mean = scan.moment(found.leading, found.lead)
            mean += scan.product(found.rest, total=found.tail)
            return replace(found.post, mean=mean)
        count = len(scan.queries)
        told = where(torch.cat([found.tail > NOTHING, _wide(scan)]))
        needed, wide_ones = (
            {i - first for i in told if first <= i < first + count} for first in (0, count)
        )
        spread, tails = sorted(needed & wide_ones), sorted(needed - wide_ones)
        narrow = sorted(set(range(count)).difference(spread))
        mean = torch.empty_like(scan.queries.xt)
        if spread:
            # Where that is nearly all, to multiply for all costs less than to pick them.
            some = list(range(count)) if len(narrow) < count / 16 else spread
            ones = torch.ones_like(found.tail[: len(some)])
            mean[positions(scan.queries, some)] = scan.product(found.weights, some, ones)
        if narrow:
            index = positions(scan.queries, narrow)
            leading, lead = found.leading[index], found.lead[index]
            lead = torch.threshold(lead, _DUST, 0)
            mean[index] = scan.moment(leading, lead, narrow)
        if tails:
            index = positions(scan.queries, tails)
            mean[index] += scan.product(found.rest, tails, found.tail[index])
        return replace(found.post, mean=mean)

    def dtype(self, bank: LatentBank, queries: Queries) -> torch.dtype:
        """What the rows of a bank are multiplied in."""
        if self.precision == "float64":
            return torch.float64
        rough = self.rtol is not None and self.rtol >= 1e-4
        return working_dtype(bank.dtype, queries.xt.device, rough)

    def _tolerance(self, scan: Scan) -> float | None:
        """The relative error of the mean that is let pass, or None where none is checked."""
        if self.precision != "auto" or scan.dtype == torch.float64:
            return None
        return self.rtol or (1e-5 if scan.dtype == torch.float32 else 1e-4)

    def __repr__(self) -> str:
        return f'Exact("{self.precision}")'


def _error(scan: Scan, found: Refined, post: Posterior) -> Tensor:
    """The estimated error of the mean over its distance from the bank's mean, (B,).

    Near the data the velocity has a factor 1 / sigma, which is taken into account.
    """
    length = (post.mean - scan.origin - scan.shift).norm(dim=1)
    length = length * scan.queries.path.sigma.clamp_max(1)
    spread = scan.bank.mean_sq_norm.to(length.device).sqrt()
    wide, (unit, _) = _wide(scan), rounding(scan.dtype, scan.bank.dim)
    squares = torch.where(wide, 1 / found.post.ess, found.squares)
    share = torch.where(wide, 1, found.tail).square()
    # What is rounded in a sum is what it comes to on the way: at random, or in one direction.
    random, along = squares, share
    if scan.whole:
        random = along = torch.maximum(squares - share / len(scan.bank), 1e-6 * squares)
    sums = spread * random.sqrt() + scan.shift.norm() * along.sqrt()
    rounded = unit * (_WEIGHT * spread * squares.sqrt() + _SUM * sums)
    error = found.error * spread + torch.where(found.tail > NOTHING, rounded, 0)
    return torch.where(error > 0, error / length, 0)


def _wide(scan: Scan) -> Tensor:
    """Where a velocity does not show that leading rows were summed up in float32, (B,)."""
    return scan.queries.path.sigma.clamp_max(1) * scan.bank.radius >= _WIDE * scan.bank.max_norm
