r"""The second product in the same pass as the first, for rows that have to be fetched.

Rows on a disk, in host memory or in another type reach the products chunk by chunk, and to fetch a
chunk may cost more than to multiply it. So, while a chunk is there, its part of the mean is added
up as well, with weights relative to the largest logit so far (online softmax: Milakov and
Gimelshein, arXiv 1805.02867):

    p' = max(p, max_j l_j),   S' = exp(p - p') S + sum_j (exp(l_j - p') - w') x^(j).

Where the mean of all rows is known, w is the mean weight in the first chunk, `w' = exp(p - p') w`,
and what it takes away is given back at the end: see `Scan.product`. Otherwise it is 0.

The leading rows get other weights afterwards, because their log-weights are computed again; what S
has of them is then exchanged (`Refined`). Where a product's rounding has made too much of them for
that, the rows are read a second time, as they are where nothing was added up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagewise.engines.base import NOTHING, UNDERFLOW
from stagewise.products import averages

__all__ = ["Ahead"]


class Ahead:
    """Weighted sums of rows for B queries, made as their logits are.

    A query is left out if, of the first chunk, all but the `lead` largest weights make next to
    nothing. On an accelerator, where to know it would take a sync and products cost little beside
    the fetching, none is.

    Args:
        count: B.
        dim: D.
        logits: Of the dtype and on the device that logits have.
        lead: So many rows of a query are added up by themselves later.
        level: Whether weights count from w.

    Attributes:
        total: S, (B, D), float64.
        peak: p, (B,), in the dtype of the logits.
        level: w, (B,), float64; None if it is 0.
        chosen: Queries that were not left out, (B,).
    """

    def __init__(self, count: int, dim: int, logits: Tensor, *, lead: int, level: bool) -> None:
        self.total = logits.new_zeros(count, dim, dtype=torch.float64)
        self.peak = logits.new_full((count,), -torch.inf)
        self.chosen = torch.zeros(count, dtype=torch.bool, device=logits.device)
        self.level = torch.zeros_like(self.total[:, 0]) if level else None
        self.lead = lead

    def add(self, index: slice | Tensor, logits: Tensor, rows: Tensor, first: bool) -> None:
        """Adds a chunk.

        Args:
            index: The b queries that look at it, of which those that were chosen count.
            logits: Theirs, (b, n).
            rows: (n, D), in their working dtype.
            first: Whether it is the first chunk of these queries.
        """
        if first:
            self.chosen[index] = self._choose(logits)
        if logits.device.type == "cpu":
            some = self.chosen[index]
            if not some.any():
                return
            index, logits = torch.arange(len(self.chosen))[index][some], logits[some]
        before = self.peak[index]
        peak = torch.maximum(before, logits.amax(1))
        share = (before - peak).double().exp()
        weights = (logits - peak[:, None]).clamp_min_(UNDERFLOW).exp_()
        if self.level is not None:
            level = weights.mean(1).double() if first else self.level[index] * share
            weights -= level.to(weights.dtype)[:, None]
            self.level[index] = level
        self.total[index] = self.total[index].mul_(share[:, None]).add_(averages(weights, rows))
        self.peak[index] = peak

    def _choose(self, logits: Tensor) -> Tensor:
        if logits.device.type != "cpu":
            return torch.ones_like(logits[:, 0], dtype=torch.bool)
        top = logits.topk(min(self.lead, logits.shape[1]), dim=1)
        rest = logits.scatter(1, top.indices, -torch.inf).logsumexp(1)
        return rest - top.values.logsumexp(1) > math.log(NOTHING)
