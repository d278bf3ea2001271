"""Means of several values in fixed bins of t, kept as sums: those of parts and ranks add up.

The bins are `[e_0, e_1), [e_1, e_2), ...`, the last one closed; times outside of them count in the
first and the last. A value that is not finite is left out of its bin, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["SUMS", "BinnedSums"]

SUMS = ("count", "finite", "total", "square")
"""What is summed up, fields of a `BinnedSums`."""


@dataclass
class BinnedSums:
    """Sums of K values in T bins; tensors are replaced, never written to.

    Attributes:
        edges: Of the bins, ascending, (T + 1,).
        keys: Names of the values.
        count: Samples of each bin, (T,).
        finite: How many values were finite, (K, T).
        total: Their sum, (K, T).
        square: That of their squares, (K, T).
    """

    edges: Tensor
    keys: tuple[str, ...]
    count: Tensor
    finite: Tensor
    total: Tensor
    square: Tensor

    @classmethod
    def empty(
        cls,
        edges: Sequence[float] | Tensor,
        keys: Sequence[str],
        dtype: torch.dtype = torch.float64,
    ) -> BinnedSums:
        """No samples so far, for ascending edges (T + 1,) and distinct keys.

        MPS has no float64: give it float32.
        """
        bounds = torch.as_tensor(edges, dtype=dtype)
        values = bounds.new_zeros(len(keys), len(bounds) - 1)
        return cls(bounds, tuple(keys), bounds.new_zeros(len(bounds) - 1), values, values, values)

    def update(self, t: Tensor, values: Tensor) -> None:
        """Adds `values`, (K, B), of samples at times `t`, (B,); costs no device sync."""
        inside = self._inside(t.to(self.edges.dtype), self.edges)
        finite = values.isfinite()
        kept = torch.where(finite, values, 0.0).to(inside.dtype)
        self.count = self.count + inside.sum(0)
        self.finite = self.finite + finite.to(inside.dtype) @ inside
        self.total = self.total + kept @ inside
        self.square = self.square + (kept * kept) @ inside

    def means(self) -> dict[str, Tensor]:
        """By bins, (T,), NaN where a bin is empty.

        Each key: the mean, and `<key>_se`: its standard error, NaN below two values; `count`: how
        many samples; `share`: that as a share of all samples; `nonfinite`: how many values of the
        samples in a bin were not finite.
        """
        mean = self.total / self.finite
        variance = (self.square / self.finite - mean**2).clamp_min(0)
        error = (variance / (self.finite - 1)).sqrt()
        error = torch.where(self.finite > 1, error, torch.nan)
        result = {"count": self.count, "share": self.count / self.count.sum()}
        result["nonfinite"] = (self.count - self.finite).sum(0)
        for row, key in enumerate(self.keys):
            result[key], result[f"{key}_se"] = mean[row], error[row]
        return result

    def merged(self, edges: Sequence[float] | Tensor) -> BinnedSums:
        """The same samples in wider bins; exact if their edges are among those of this one."""
        wide = BinnedSums.empty(edges, self.keys, self.edges.dtype).to(self.edges.device)
        inside = self._inside((self.edges[1:] + self.edges[:-1]) / 2, wide.edges)
        return replace(wide, **{name: getattr(self, name) @ inside for name in SUMS})

    def without(self, other: BinnedSums) -> BinnedSums:
        """The samples that are not among those of another one, of the same bins."""
        left = {name: getattr(self, name) - getattr(other, name) for name in SUMS}
        return replace(self, **left)

    def over(self, add: Callable[[Tensor], Tensor]) -> BinnedSums:
        """The samples of all ranks, by a function that adds a tensor up over them."""
        rows = [getattr(self, name).reshape(-1, len(self.count)) for name in SUMS]
        parts = add(torch.cat(rows)).split([len(row) for row in rows])
        summed = {n: x.view_as(getattr(self, n)) for n, x in zip(SUMS, parts, strict=True)}
        return replace(self, **summed)

    def to(self, device: torch.device | str) -> BinnedSums:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("edges", *SUMS)}
        return replace(self, **moved)

    @staticmethod
    def _inside(t: Tensor, edges: Tensor) -> Tensor:
        """Which bin each time is in, (B, T), 0 or 1.

        A product with them, and no index_add_: the same sums in each run on any device.
        """
        index = torch.bucketize(t, edges[1:-1], right=True)
        bins = torch.arange(len(edges) - 1, device=t.device)
        return (index[:, None] == bins).to(edges.dtype)
