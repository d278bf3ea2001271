r"""Copies: generated samples that are much nearer to one training row than to any other.

With `d_1` and `d_2` the distances from a sample to its nearest and its second nearest row (L2, not
squared), it is a copy where

    d_1 / d_2 < 1/3                                       (Bonnaire et al., arXiv 2505.17638).

**Equal rows are one row.** `d_2` is the distance of the nearest row that is not equal, number by
number, to the nearest one: a row that is in the bank twice would otherwise give `d_1 = d_2` and
hide its copies. Rows that are nearly equal (a second encoding, a crop) are two rows and do hide
them: take such out of the bank.

Distances are exact: chunk by chunk a product finds candidates, their distances are computed again
from differences in float64, and more candidates are taken until no other row can be nearer than the
two that are known (bound: see `nearest_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.products import full_precision, scores

__all__ = ["COPY_RATIO", "Nearest", "binomial_interval", "nearest_rows"]

COPY_RATIO = 1 / 3
"""A sample is a copy below this `d_1 / d_2`; arXiv 2505.17638."""

_CANDIDATES = 16
"""Rows of a chunk computed exactly for a sample, at first."""

_NUMBERS = 2**22
"""Numbers of a chunk of rows, and bounds on distances from it, held at a time."""

_QUERIES = 256
"""Samples compared at a time."""


class Nearest(NamedTuple):
    """What is near to each of B samples.

    Attributes:
        row: The nearest row in the bank's own order, (B,), int64; -1 for a sample with NaN or Inf.
        d1: Its distance, (B,), float64; NaN for such a sample.
        d2: The distance of the nearest row that differs from it, (B,), float64.
    """

    row: Tensor
    d1: Tensor
    d2: Tensor

    @property
    def ratio(self) -> Tensor:
        """`d_1 / d_2`, (B,), in [0, 1]; NaN for a sample that is not finite."""
        return self.d1 / self.d2

    @property
    def copied(self) -> Tensor:
        """Which samples are copies, (B,), bool; one that is not finite is none."""
        return self.ratio < COPY_RATIO


@torch.no_grad()
def nearest_rows(bank: LatentBank, x: Tensor) -> Nearest:
    """The nearest row of all, and how far the next that differs is.

    Args:
        bank: The training rows, all classes.
        x: Samples, (B, *), as those of the bank.

    Returns:
        What was found, on the device of the bank.

    Raises:
        ValueError: If the samples have another shape, or all rows of the bank are equal.
    """
    if tuple(x.shape[1:]) != bank.shape:
        raise ValueError(
            f"Expected samples of shape {('B', *bank.shape)} as the bank's, got {tuple(x.shape)}."
        )
    flat = x.detach().flatten(1).to(bank.device).double()
    unknown = flat.new_full((len(flat),), torch.nan)
    found = Nearest(unknown.new_full((len(flat),), -1, dtype=torch.int64), unknown, unknown.clone())
    finite = flat.isfinite().all(1).nonzero()[:, 0]
    with full_precision(), torch.autocast(bank.device.type, enabled=False):
        for index in finite.split(_QUERIES) if len(finite) else ():
            for value, new in zip(found, _search(bank, flat[index]), strict=True):
                value[index] = new
    return found


def _search(bank: LatentBank, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest row, d1 and d2 of queries (B, D), over all chunks of the bank."""
    # Of each query the nearest row and the nearest that differs from it: these two decide what
    # they are among more rows, too.
    rows = query.new_full((len(query), 2), -1, dtype=torch.int64)
    best = query.new_full((len(query), 2), torch.inf)
    for first, low in _bounds(bank, query):
        size, count = low.shape[1], _CANDIDATES
        near = (low.amin(1) < best[:, 1].square()).nonzero()[:, 0]
        while len(near):
            value, column = low[near].topk(min(count + 1, size), dim=1, largest=False)
            for place, few in zip(near.tolist(), first + column[:, :count], strict=True):
                rows[place], best[place] = _exact(bank, query[place], rows[place], few)
            if count >= size:
                break
            # What was not computed is no nearer than this.
            limit = value[:, count].clamp_min(0).sqrt()
            near, count = near[limit < best[near, 1]], 4 * count
    if bool(best[:, 1].isinf().any()):
        raise ValueError(
            "All rows of the bank are equal, so nothing can be nearer to one than to another. "
            "Give a bank with two different rows at least."
        )
    return rows[:, 0], best[:, 0], best[:, 1]


def _bounds(bank: LatentBank, query: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Lower bounds on the squared distance to the rows, (B, n), from a first row on."""
    slack = 8 * (math.sqrt(bank.dim) + 1) * 2.0**-24
    wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
    shift = bank.centre - bank.offset
    # Centred, so that rows far from 0 do not lose their differences in a product.
    centred = query - bank.centre
    own = centred.square().sum(1, keepdim=True)
    size = max(_CANDIDATES, _NUMBERS // max(bank.dim, len(query)))
    for first, chunk in bank.chunks(bank.whole, size, bank.device, wide):
        rows = (chunk.double() - shift).to(wide)
        norms = bank.sq_norms[first : first + len(rows)].to(query.device)
        yield first, (1 - slack) * (own + norms) - 2 * scores(centred, rows).double()


def _exact(bank: LatentBank, query: Tensor, known: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows the nearest and the nearest that differs from it, (2,), and their distances."""
    rows = torch.cat([known[known >= 0], others])
    samples = bank.take(rows)
    distances = torch.linalg.vector_norm(samples - query, dim=1)
    nearest = distances.argmin()
    differ = (samples != samples[nearest]).any(1)
    second = torch.where(differ, distances, torch.inf).argmin()
    both = torch.stack([nearest, second])
    d1, d2 = distances[both]
    return rows[both], torch.stack([d1, torch.where(differ[second], d2, torch.inf)])


def binomial_interval(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a share (Clopper and Pearson, Biometrika 26, 1934).

    Every share in it gives `hits` or more, and `hits` or fewer, with a probability of at least
    `(1 - level) / 2` each. It has a width where all samples agree: 0 of 64 give 0 to 5.6 %.

    Args:
        hits: Samples that are copies.
        count: All samples; 0 gives NaN.
        level: Of the interval, default 0.95.

    Returns:
        Its ends.
    """
    if not count:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low = beta.ppf(tail, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, count - hits) if hits < count else 1.0
    return float(low), float(high)
