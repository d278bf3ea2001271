r"""Copies: generated samples that are much nearer to one training row than to any other.

With `d_1` and `d_2` the distances from a sample to its nearest and its second nearest row (L2, not
squared), it is a copy where

    d_1 / d_2 < 1/3                                       (Bonnaire et al., arXiv 2505.17638).

**Equal rows are one row.** `d_2` is the distance of the nearest row that differs from the nearest
one: otherwise a row that is in the bank twice would give `d_1 = d_2` and hide its copies. Rows that
are nearly equal (a second encoding, a crop) are two rows and do hide copies: take them out of the
bank.

Distances are exact (`nearest_rows`), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.masks import MaskedLabels
from stagewise.nearest_rows import Search
from stagewise.products import full_precision

__all__ = ["COPY_RATIO", "Nearest", "binomial_interval", "copy_share", "nearest_rows"]

COPY_RATIO = 1 / 3
"""A sample is a copy below this `d_1 / d_2`; arXiv 2505.17638."""

_QUERIES = 256
"""Samples compared at a time."""

_BINS = 30
"""Of the histogram of ratios."""

_TYPES = torch.int64, torch.float64, torch.float64


class Nearest(NamedTuple):
    """The nearest rows of each of B samples.

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
        """Which samples are copies, (B,), bool; False for a sample that is not finite."""
        return self.ratio < COPY_RATIO


@torch.no_grad()
def nearest_rows(
    bank: LatentBank, x: Tensor, labels: Tensor | MaskedLabels | None = None
) -> Nearest:
    """The nearest row of each sample, and the distance of the next row that differs from it.

    With masks, among rows of the same mask; `d_2` is NaN if no other row has that mask.

    Args:
        bank: The training rows, all classes.
        x: Samples, (B, *), of the bank's shape.
        labels: `MaskedLabels` for a bank with masks; others do not count.

    Returns:
        Tensors on the device of the bank.

    Raises:
        ValueError: If the samples have another shape, or all rows of the bank are equal.
    """
    if tuple(x.shape[1:]) != bank.shape:
        raise ValueError(
            f"Expected samples of shape {('B', *bank.shape)}, the bank's, got {tuple(x.shape)}."
        )
    if not isinstance(labels, MaskedLabels):
        found, every = _nearest_in(bank, bank.whole, x)
        # Otherwise the search has ended at a second row.
        if every and bool(found.d2.isinf().any()):
            raise ValueError(
                "All rows of the bank are equal, so nothing can be nearer to one than to another. "
                "Give a bank with two different rows at least."
            )
    else:
        keys = labels.unlabelled().keys().tolist()
        found = Nearest(*(torch.zeros(len(x), device=bank.device, dtype=d) for d in _TYPES))
        for key in set(keys):
            at = torch.tensor([i for i, own in enumerate(keys) if own == key])
            part, _ = _nearest_in(bank, bank.segment(key), labels.zero(x)[at.to(x.device)])
            for value, own in zip(found, part, strict=True):
                value[at.to(value.device)] = own
        found.d2.masked_fill_(found.d2.isinf(), torch.nan)
    return found


def _nearest_in(bank: LatentBank, scope: slice, x: Tensor) -> tuple[Nearest, bool]:
    """The nearest in `scope`, and whether a search came to the end; `d_2` inf if all are equal."""
    search, most = Search(bank, scope, bank.device), 0
    flat = x.detach().flatten(1).to(bank.device).double() - bank.offset

    def settle(_: Tensor, distance: Tensor, rows: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        nonlocal most
        most = rows.shape[1]
        differ = search.differ(rows)
        second = differ.int().argmax(1, keepdim=True)
        d2 = distance.gather(1, second).masked_fill(~differ.any(1, keepdim=True), torch.inf)
        return (d2.isfinite() & (d2 <= limit))[:, 0], rows[:, 0], distance[:, 0], d2[:, 0]

    # Samples that are not finite are asked with the others: picking them would take a sync.
    finite = flat.isfinite().all(1)
    flat = flat.masked_fill(~finite[:, None], 0)
    number = torch.arange(len(flat), device=bank.device)
    with full_precision(), torch.autocast(bank.device.type, enabled=False):
        row, d1, d2 = search.ask(flat, 2, settle, number, at_once=_QUERIES)
    row = row.masked_fill(~finite, -1)
    nearest = Nearest(row, *(d.masked_fill(~finite, torch.nan) for d in (d1, d2)))
    return nearest, most == len(search)


def binomial_interval(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval of a share (Clopper and Pearson, Biometrika 26, 1934).

    It has a width even if all samples agree: 0 of 64 give 0 to 5.6 %. A count of 0 gives NaN.
    """
    if not count:
        return math.nan, math.nan
    tail = (1 - level) / 2
    low = beta.ppf(tail, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, count - hits) if hits < count else 1.0
    return float(low), float(high)


def copy_share(ratio: Tensor, add: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The share of samples that copy a training row, as plain numbers.

    `ratio` is `d_1 / d_2` of the samples of this rank, (B,), in [0, 1] or NaN; `add` sums a tensor
    over ranks.

    Returns:
        `share` of the finite ratios below 1/3, NaN if there are none, with `low` and `high` (95 %,
        exact binomial); `median` of the ratios, to half a bin; `histogram`, counts in 30 equal bins
        of [0, 1]; `nonfinite`, how many were left out.
    """
    place = (ratio * _BINS).floor().clamp_max(_BINS - 1)
    bins = (place[:, None] == torch.arange(_BINS, device=ratio.device)).sum(0)
    others = torch.stack([(ratio < COPY_RATIO).sum(), (~ratio.isfinite()).sum()])
    *counts, copies, broken = add(torch.cat([bins, others])).tolist()
    total = sum(counts)
    low, high = binomial_interval(copies, total)
    middle = next((i for i in range(_BINS) if 2 * sum(counts[: i + 1]) >= total), 0)
    return {
        "share": copies / total if total else math.nan,
        "low": low,
        "high": high,
        "median": (middle + 0.5) / _BINS if total else math.nan,
        "histogram": counts,
        "nonfinite": broken,
    }
