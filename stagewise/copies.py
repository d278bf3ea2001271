r"""Copies: generated samples that are much nearer to one training row than to any other.

With `d_1` and `d_2` the distances from a sample to its nearest and its second nearest row (L2, not
squared), it is a copy where

    d_1 / d_2 < 1/3                                       (Bonnaire et al., arXiv 2505.17638).

**Equal rows are one row.** `d_2` is the distance of the nearest row that is not equal, number by
number, to the nearest one: a row that is in the bank twice would otherwise give `d_1 = d_2` and
hide its copies. Rows that are nearly equal (a second encoding, a crop) are two rows and do hide
them: take such out of the bank.

Distances are exact (`nearest_rows`), in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.masks import MaskedLabels
from stagewise.nearest_rows import Search
from stagewise.products import full_precision

__all__ = ["COPY_RATIO", "Nearest", "binomial_interval", "nearest_rows"]

COPY_RATIO = 1 / 3
"""A sample is a copy below this `d_1 / d_2`; arXiv 2505.17638."""

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
def nearest_rows(bank: LatentBank, x: Tensor, labels: MaskedLabels | None = None) -> Nearest:
    """The nearest row of all, and how far the next that differs is.

    With masks it is the nearest of the same mask; `d_2` is NaN where no other row has that mask.

    Args:
        bank: The training rows, all classes.
        x: Samples, (B, *), as those of the bank.
        labels: Their masks, for a bank with masks.

    Returns:
        What was found, on the device of the bank.

    Raises:
        ValueError: If the samples have another shape, or all rows of the bank are equal.
    """
    if tuple(x.shape[1:]) != bank.shape:
        raise ValueError(
            f"Expected samples of shape {('B', *bank.shape)} as the bank's, got {tuple(x.shape)}."
        )
    scopes = [(torch.arange(len(x), device=bank.device), bank.whole)]
    if labels is not None:
        x, keys = labels.zero(x), labels.unlabelled().keys().to(bank.device)
        scopes = [((keys == key).nonzero()[:, 0], bank.segment(key)) for key in set(keys.tolist())]
    flat = x.detach().flatten(1).to(bank.device).double() - bank.offset
    unknown = flat.new_full((len(flat),), torch.nan)
    found = Nearest(unknown.new_full((len(flat),), -1, dtype=torch.int64), unknown, unknown.clone())

    def settle(_: Tensor, distance: Tensor, rows: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        differ = search.differ(rows)
        second = differ.int().argmax(1, keepdim=True)
        d2 = distance.gather(1, second).masked_fill(~differ.any(1, keepdim=True), torch.inf)
        return (d2.isfinite() & (d2 <= limit))[:, 0], rows[:, 0], distance[:, 0], d2[:, 0]

    finite = flat.isfinite().all(1)
    with full_precision(), torch.autocast(bank.device.type, enabled=False):
        for at, scope in scopes:
            search = Search(bank, scope, bank.device)
            for index in at[finite[at]].split(_QUERIES) if bool(finite[at].any()) else ():
                answer = search.ask(flat[index], 2, settle, index)
                for value, new in zip(found, answer, strict=True):
                    value[index] = new
    if labels is not None:
        found.d2[found.d2.isinf()] = torch.nan
    if bool(found.d2.isinf().any()):
        raise ValueError(
            "All rows of the bank are equal, so nothing can be nearer to one than to another. "
            "Give a bank with two different rows at least."
        )
    return found


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
