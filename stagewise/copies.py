r"""Copies: generated samples that are much nearer to one training row than to any other.

With `d_1` and `d_2` the distances from a sample to its nearest and its second nearest row (L2, not
squared), it is a copy where

    d_1 / d_2 < 1/3                                       (Bonnaire et al., arXiv 2505.17638).

**Equal rows are one row.** `d_2` is the distance of the nearest row that is not equal, number by
number, to the nearest one: a row that is in the bank twice would otherwise give `d_1 = d_2` and
hide its copies. Rows that are nearly equal (a second encoding, a crop) are two rows and do hide
them: take such out of the bank.

Distances are exact: a product finds candidates, their distances are computed again from differences
in float64, and more candidates are taken until no other row can be nearer (bound: see `closest`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.products import full_precision, scores

__all__ = ["COPY_RATIO", "Nearest", "nearest_rows", "share_interval"]

COPY_RATIO = 1 / 3
"""A sample is a copy below this `d_1 / d_2`; arXiv 2505.17638."""

_CANDIDATES = 16
"""Rows computed exactly for a sample, at first."""

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
            low = _bounds(bank, flat[index])
            for value, new in zip(found, _ranked(bank, flat[index], low), strict=True):
                value[index] = new
    return found


def _bounds(bank: LatentBank, query: Tensor) -> Tensor:
    """Lower bounds on the squared distance to all rows, (B, N)."""
    slack = 8 * (math.sqrt(bank.dim) + 1) * 2.0**-24
    wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
    shift = bank.centre - bank.offset
    # Centred, so that rows far from 0 do not lose their differences in a product.
    centred = query - bank.centre
    own = centred.square().sum(1, keepdim=True)
    parts = []
    # In chunks, because the centred rows are a copy.
    size = max(256, 2**24 // bank.dim)
    for first, chunk in bank.chunks(bank.whole, size, bank.device, wide):
        rows = (chunk.double() - shift).to(wide)
        norms = bank.sq_norms[first : first + len(rows)].to(query.device)
        parts.append((1 - slack) * (own + norms) - 2 * scores(centred, rows).double())
    return torch.cat(parts, 1)


def _ranked(
    bank: LatentBank, query: Tensor, low: Tensor, count: int = _CANDIDATES
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest row, d1 and d2, from the bounds; computes more rows exactly where it must."""
    size = len(bank)
    count = min(count, size)
    value, column = low.topk(min(count + 1, size), dim=1, largest=False)
    column = column[:, :count]
    row, d1, d2 = (
        torch.stack(parts)
        for parts in zip(
            *(_exact(bank, q, c) for q, c in zip(query, column, strict=True)), strict=True
        )
    )
    if count == size:
        if bool(d2.isinf().any()):
            raise ValueError(
                "All rows of the bank are equal, so nothing can be nearer to one than to another. "
                "Give a bank with two different rows at least."
            )
        return row, d1, d2
    limit = value[:, count].clamp_min(0).sqrt()
    wrong = (d2 > limit).nonzero()[:, 0]
    if len(wrong):
        better = _ranked(bank, query[wrong], low[wrong], 4 * count)
        for value, new in zip((row, d1, d2), better, strict=True):
            value[wrong] = new
    return row, d1, d2


def _exact(bank: LatentBank, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of some rows (n,), its distance and that of the nearest that differs from it."""
    candidates = bank.take(rows)
    distances = torch.linalg.vector_norm(candidates - query, dim=1)
    nearest = distances.argmin()
    equal = (candidates == candidates[nearest]).all(1)
    return rows[nearest], distances[nearest], distances.masked_fill(equal, torch.inf).min()


def share_interval(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of a share, without drawing.

    Resampling `count` samples of which `hits` are hits gives a binomial number of hits, so the
    percentiles of the bootstrap are those of `Binomial(count, hits / count)`, over `count`. Like
    every bootstrap it has no width where all samples agree: of 0 hits in n samples one can say with
    95 % that the true share is below 3/n.

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
    low, high = binom.ppf(np.array([tail, 1 - tail]), count, hits / count) / count
    return float(low), float(high)
