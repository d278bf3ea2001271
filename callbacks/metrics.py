"""Statistics by bins of t, as torchmetrics keeps them: sums and counts, added over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stagewise.copies import COPY_RATIO, binomial_interval

__all__ = ["SUMS", "BinnedMeans", "CopyShare"]

SUMS = ("count", "finite", "total", "square")
"""The states of a `BinnedMeans`: samples of each bin, and for each value finite ones, their sum and
that of their squares."""


class BinnedMeans(Metric):
    """Means of several values in fixed bins of t, with their standard errors.

    The bins are `[e_0, e_1), [e_1, e_2), ...`, the last one closed; times outside of them count in
    the first and the last. A value that is not finite is left out of its bin, and counted.
    `compute` returns a dict of tensors of shape (T,), float64, NaN where a bin is empty:

    - each key: the mean, and `<key>_se`: its standard error, NaN below two values.
    - `count`: how many samples; `share`: that as a share of all samples.
    - `nonfinite`: how many values of the samples in a bin were not finite.

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
    count: Tensor
    finite: Tensor
    total: Tensor
    square: Tensor

    def __init__(
        self,
        edges: Sequence[float] | Tensor,
        keys: Sequence[str],
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        bounds = torch.as_tensor(edges, dtype=dtype)
        if bounds.ndim != 1 or len(bounds) < 2 or bool((bounds.diff() < 0).any()):
            raise ValueError(f"Expected ascending `edges`, (T + 1,), got {bounds.tolist()}.")
        if len(set(keys)) != len(keys):
            raise ValueError(f"Expected distinct `keys`, got {list(keys)}.")
        self.keys = tuple(keys)
        self.register_buffer("edges", bounds, persistent=False)
        shape = (len(self.keys), len(bounds) - 1)
        self.add_state("count", torch.zeros(shape[1], dtype=dtype), dist_reduce_fx="sum")
        for name in ("finite", "total", "square"):
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, t: Tensor, values: Tensor) -> None:
        """Adds samples; costs no device sync.

        Args:
            t: Times, (B,).
            values: (K, B), in the order of the keys.
        """
        index = torch.bucketize(t.to(self.edges.dtype), self.edges[1:-1], right=True)
        # A product with indicators, and no index_add_: the same sums in each run on any device.
        inside = index[:, None] == torch.arange(self.count.numel(), device=t.device)
        inside = inside.to(self.edges.dtype)
        finite = values.isfinite()
        kept = torch.where(finite, values, 0.0).to(self.edges.dtype)
        self.count += inside.sum(0)
        self.finite += finite.to(self.edges.dtype) @ inside
        self.total += kept @ inside
        self.square += (kept * kept) @ inside

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        mean = self.total / self.finite
        variance = (self.square / self.finite - mean**2).clamp_min(0)
        error = (variance / (self.finite - 1)).sqrt()
        error = torch.where(self.finite > 1, error, torch.nan)
        result = {"count": self.count, "share": self.count / self.count.sum()}
        result["nonfinite"] = (self.count - self.finite).sum(0)
        for row, key in enumerate(self.keys):
            result[key], result[f"{key}_se"] = mean[row], error[row]
        return result

    def merged(
        self, edges: Sequence[float] | Tensor | None = None, without: BinnedMeans | None = None
    ) -> BinnedMeans:
        """The same samples in wider bins.

        Args:
            edges: Edges of the wider bins, ascending; exact if they are among those of this one.
                Default: the same bins.
            without: Samples that are left out, in the bins of this one.

        Returns:
            A metric that holds what this one does now, and adds up no ranks when computed.
        """
        edges = self.edges if edges is None else edges
        wide = BinnedMeans(edges, self.keys, self.edges.dtype, sync_on_compute=False)
        wide = wide.to(self.edges.device)
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        index = torch.bucketize(centres, wide.edges[1:-1], right=True)
        inside = index[:, None] == torch.arange(wide.count.numel(), device=index.device)
        for name in SUMS:
            sums = getattr(self, name)
            sums = sums if without is None else sums - getattr(without, name)
            setattr(wide, name, sums @ inside.to(self.edges.dtype))
        wide._update_count = self._update_count
        return wide


class CopyShare(Metric):
    """The share of samples that copy a training row, from `d_1 / d_2` (see `stagewise.copies`).

    `compute` returns plain numbers: `share` of the finite ratios below 1/3, NaN if there are none,
    with `low` and `high` (95 %, exact binomial); `median` of the ratios, to half a bin;
    `histogram`, counts in 30 equal bins of [0, 1]; `nonfinite`, how many were left out.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
        """Adds samples.

        Args:
            ratio: Their `d_1 / d_2`, (B,), in [0, 1], or NaN.
        """
        finite = ratio.isfinite()
        place = (ratio * self.BINS).floor().clamp_max(self.BINS - 1)
        bins = torch.arange(self.BINS, device=ratio.device)
        self.histogram += (place[:, None] == bins).sum(0)
        self.copies += (ratio < COPY_RATIO).sum()
        self.nonfinite += (~finite).sum()

    def compute(self) -> dict[str, Any]:
        """See the class."""
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
