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

    delta |gamma_tail| R / (|m - c| min(s_t, 1))

of its distance from c (R is the root mean square of |x - c|; the last factor is for the velocity),
if the errors of different rows are independent. The engine checks for each query that this is below
`rtol`. If it is not, it takes more rows out of the tail, and then does the query in float64.
`precision="float64"` does all of them so, and is the reference.

On an accelerator the checks cost two device syncs per call, for B booleans each; the two fixed
precisions cost none.

Below the noise level `base.sigma_floor` even float64 loses the fourth digit after the point of a
logit; the oracle is evaluated there instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import Engine, Queries
from stagewise.engines.scan import FEW, MORE, Refined, Scan, blocks, positions, where
from stagewise.posterior import Posterior, put
from stagewise.products import full_precision, working_dtype

__all__ = ["Exact"]

_NOTHING = 1e-12
"""A tail that adds less than this to a mean is left out."""


class Exact(Engine):
    """The posterior over all rows.

    Args:
        precision: "auto" (default) multiplies in the fastest type that the rows allow and checks
            each query's error against `rtol`; "float64" is the reference; "float32" is "auto"
            without the check, for accelerators where even one sync per call is too much.
        rtol: Relative error of the mean that "auto" lets pass, default 1e-5, and 1e-4 for 16-bit
            rows on an accelerator, whose products are split (`stagewise.products`).
        chunk_size: Rows multiplied at a time; default 128 MiB of them, or 32 MiB where they must be
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
        with full_precision():
            parts = [self.solve(bank, part, k) for part in blocks(queries)]
        return Posterior.cat(parts)

    def solve(
        self,
        bank: LatentBank,
        queries: Queries,
        k: int,
        finish: Callable[[Scan, Refined], Posterior] | None = None,
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
        scan = scan.select(wrong)
        found = Refined.of(scan, k, MORE)
        better = finish(scan, found)
        still = where(~(_error(scan, found, better) <= rtol))
        if still:
            part = scan.select(still)
            scan = scanned(part.queries, torch.float64, part.table)
            better = put(better, still, finish(scan, Refined.of(scan, k, FEW)), len(wrong))
        return put(post, wrong, better, len(queries))

    def _finish(self, scan: Scan, found: Refined) -> Posterior:
        """Adds to the leading rows what the others contribute."""
        need = list(range(len(found.tail)))
        if self.precision == "auto" or found.tail.device.type == "cpu":
            need = where(found.tail > _NOTHING)
        if not need:
            return found.post
        index = positions(scan.queries, need)
        mean = found.post.mean.clone()
        mean[index] += scan.select(need).tail_mean(found.weights[index])
        return replace(found.post, mean=mean)

    def dtype(self, bank: LatentBank, queries: Queries) -> torch.dtype:
        """What the rows of a bank are multiplied in."""
        if self.precision == "float64":
            return torch.float64
        return working_dtype(bank.dtype, queries.xt.device)

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
    length = (post.mean - scan.bank.centre.to(post.mean.device)).norm(dim=1)
    length = length * scan.queries.path.sigma.clamp_max(1)
    spread = scan.bank.mean_sq_norm.to(length.device).sqrt()
    return torch.where(found.error > 0, found.error * spread / length, 0)
