"""The posterior from log-weights, with the leading ones computed again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.engines.base import UNDERFLOW
from stagewise.engines.scan import CACHED, Scan
from stagewise.posterior import Posterior

__all__ = ["FEW", "MORE", "Refined"]

FEW, MORE = 8, 64
"""Rows whose log-weights are always computed again in float64, and if those are not enough."""

_LEAST = 1e-18
"""Weights below it count as it in the sum of their squares."""


@dataclass
class Refined:
    """A posterior whose leading log-weights come from differences.

    Attributes:
        post: The posterior, but for its `mean`, which is not there yet.
        columns: The rows with the largest logits, (B, n), descending, as columns of the logits;
            the leading ones come first.
        lead: Weights of the leading rows, (B, leading), float64.
        weights: Weights of all rows, (B, width), in the dtype of the logits.
        tail: The sum of those that do not lead, (B,), float64.
        squares: The sum of their squares, (B,), float64.
        error: Estimate of how far, in units of the rows' radius, the mean is off for using the
            logits of the tail, (B,).
    """

    post: Posterior
    columns: Tensor
    lead: Tensor
    weights: Tensor
    tail: Tensor
    squares: Tensor
    error: Tensor

    @property
    def leading(self) -> Tensor:
        """The columns that lead, (B, leading)."""
        return self.columns[:, : self.lead.shape[1]]

    @property
    def rest(self) -> Tensor:
        """The weights with 0 for the leading rows, (B, width)."""
        return self.weights.scatter(1, self.leading, 0)

    @classmethod
    def of(cls, scan: Scan, k: int, count: int) -> Refined:
        """Computes the `count` largest log-weights of each query again.

        Args:
            scan: The logits; they are shifted so that the largest is near 0.
            k: How many of the largest weights to return.
            count: How many to compute again.
        """
        width = scan.logits.shape[1]
        columns = scan.logits.topk(min(max(k, count + 1), width), dim=1).indices
        leading = columns[:, :count]
        exact = scan.differences(leading)
        peak = exact.amax(1)
        # In two steps, because the shift itself may be rounded.
        shifts = []
        for _ in range(2):
            shifts.append((scan.shared + peak).to(scan.logits.dtype))
            scan.shared = scan.shared - shifts[-1].double()
            scan.lifted = scan.lifted + shifts[-1].double()
        exact = exact - peak[:, None]
        lead = exact.exp()
        weights, sums = _exponentials(scan.logits, shifts, leading)
        others, squares, moment = sums
        z = lead.sum(1) + others
        moment = moment + (lead * exact).sum(1)
        tail = others / z
        error = torch.zeros_like(tail)
        if width > count:
            first = columns[:, count : count + 1]
            after = scan.logits.gather(1, first)[:, 0].double()
            delta = scan.noise(first, after)
            # Either every logit of the tail is nearly right, or none can matter even if wrong.
            error = (delta * squares.sqrt() / z * (16 * delta).exp()).nan_to_num(torch.inf)
            error = torch.minimum(error, width * (after + 16 * delta).exp())
        ess = z**2 / (lead.square().sum(1) + squares)
        largest = torch.cat([lead, weights.gather(1, columns[:, count:])], 1) / z[:, None]
        lead = largest[:, : lead.shape[1]]
        weights.mul_((1 / z).to(weights.dtype)[:, None])
        top, order = largest.topk(min(k, width), dim=1)
        missing = (0, k - top.shape[1])
        post = Posterior(
            mean=lead.new_empty(len(lead), 0),
            log_evidence=peak + z.log(),
            entropy=z.log() - moment / z,
            ess=ess,
            weights=pad(top, missing),
            rows=pad(scan.rows(columns.gather(1, order)), missing, value=-1),
            tail_mass=torch.zeros_like(tail),
        )
        weights.scatter_(1, leading, lead.to(weights.dtype))
        return cls(post, columns, lead, weights, tail, squares / z**2, error)


def _exponentials(
    logits: Tensor, shifts: Sequence[Tensor], leading: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights from logits, and what is summed over them.

    A few queries at a time, so that a CPU reads what it has just written from its cache.

    Args:
        logits: (B, width); the shifts are subtracted in place.
        shifts: Each (B,).
        leading: Columns whose weight is 0 here, (B, n).

    Returns:
        `w_i = exp(l_i)`, (B, width), and the sums of `w_i`, `w_i^2` and `w_i l_i`, (3, B), float64.
    """
    weights = torch.empty_like(logits)
    sums = logits.new_empty(3, len(logits), dtype=torch.float64)
    numbers = CACHED.get(logits.device.type, 2**62)
    step = max(1, numbers // logits.shape[1])
    # Numbers too small for their type take a processor a hundred times as long: what would
    # underflow is 0, and squares are those of no less than `_LEAST`.
    least = math.exp(UNDERFLOW)
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        own, w = logits[part], weights[part]
        for shift in shifts:
            own.sub_(shift[part, None])
        torch.clamp_min(own, UNDERFLOW, out=w)
        torch.threshold_(w.exp_(), 1.001 * least, 0).scatter_(1, leading[part], 0)
        some = w.clamp_min(_LEAST)
        sums[0, part] = w.sum(1, dtype=torch.float64)
        sums[1, part] = some.mul_(some).sum(1)
        sums[2, part] = torch.mul(w, own, out=some).sum(1)
    return weights, sums
