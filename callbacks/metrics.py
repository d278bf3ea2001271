"""Statistics by bins of t, as torchmetrics keeps them: sums and counts, added over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from stagewise.binned_sums import SUMS, BinnedSums
from stagewise.copies import COPY_RATIO, binomial_interval

__all__ = ["BinnedMeans", "CopyShare"]


class BinnedMeans(Metric):
    """Means of several values in fixed bins of t, with their standard errors.

    `compute` returns what `stagewise.binned_sums.BinnedSums.means` does.

    Args:
        edges: Edges of the bins, ascending, (T + 1,).
        keys: Names of the values.
        dtype: Of the sums, default float64; MPS has float32 only.
        **kwargs: See `torchmetrics.Metric`.

    Raises:
        ValueError: If the edges do not ascend or a name comes twice.

    Example:
        >>> import torch
        >>> means = BinnedMeans([0.0, 0.5, 1.0], ["loss"])
        >>> means.update(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([[1.0, 3.0, 7.0]]))
        >>> means.compute()["loss"]
        tensor([2., 7.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    edges: Tensor

    def __init__(
        self,
        edges: Sequence[float] | Tensor,
        keys: Sequence[str],
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        empty = BinnedSums.empty(edges, keys, dtype)
        self.keys = empty.keys
        self.register_buffer("edges", empty.edges, persistent=False)
        for name in SUMS:
            self.add_state(name, getattr(empty, name), dist_reduce_fx="sum")

    @property
    def sums(self) -> BinnedSums:
        """What has been added up so far; within `sync_context`, on all ranks."""
        return BinnedSums(self.edges, self.keys, *(getattr(self, name) for name in SUMS))

    def update(self, t: Tensor, values: Tensor) -> None:
        """Adds samples at times t, (B,), with values, (K, B); costs no device sync."""
        sums = self.sums
        sums.update(t, values)
        for name in SUMS:
            setattr(self, name, getattr(sums, name))

    @override
    def compute(self) -> dict[str, Tensor]:
        return self.sums.means()


class CopyShare(Metric):
    """The share of samples that copy a training row, from `d_1 / d_2` (see `stagewise.copies`).

    `compute` returns plain numbers: `share` of the finite ratios below 1/3, NaN if there are none,
    with `low` and `high` (95 %, exact binomial); `median` of the ratios, to half a bin;
    `histogram`, counts in 30 equal bins of [0, 1]; `nonfinite`, how many were left out.

    Example:
        >>> import torch
        >>> copies = CopyShare()
        >>> copies.update(torch.tensor([0.1, 0.9, 0.95, 0.99]))
        >>> copies.compute()["share"]
        0.25
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    BINS = 30
    histogram: Tensor
    copies: Tensor
    nonfinite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("histogram", torch.zeros(self.BINS), dist_reduce_fx="sum")
        self.add_state("copies", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("nonfinite", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, ratio: Tensor) -> None:
        """Adds samples by their `d_1 / d_2`, (B,), in [0, 1] or NaN."""
        place = (ratio * self.BINS).floor().clamp_max(self.BINS - 1)
        bins = torch.arange(self.BINS, device=ratio.device)
        self.histogram += (place[:, None] == bins).sum(0)
        self.copies += (ratio < COPY_RATIO).sum()
        self.nonfinite += (~ratio.isfinite()).sum()

    @override
    def compute(self) -> dict[str, Any]:
        counts = self.histogram.tolist()
        total, copies = int(sum(counts)), int(self.copies)
        low, high = binomial_interval(copies, total)
        middle = next((i for i in range(self.BINS) if 2 * sum(counts[: i + 1]) >= total), 0)
        return {
            "share": copies / total if total else float("nan"),
            "low": low,
            "high": high,
            "median": (middle + 0.5) / self.BINS if total else float("nan"),
            "histogram": counts,
            "nonfinite": int(self.nonfinite),
        }
