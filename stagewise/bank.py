"""`LatentBank`: the training latents, as the oracle needs them.

The bank holds N samples as rows of D numbers, sorted by class when labels are given, so that a
class is a contiguous block and needs no copy. Beside the rows it stores what every query needs
and no query should compute: the mean (`centre`), the squared distances from it (`sq_norms`), and
their largest (`radius`).

It is a plain object and not an `nn.Module`, on purpose: as a module's buffer it would be broadcast
by DDP, duplicated by an averaged (EMA) copy of the model, and written into every checkpoint. A deep
copy of a bank is the bank itself.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.batches import FindSample, find_checked, find_sample
from stagewise.memory import format_bytes, require_memory

__all__ = ["LatentBank"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BLOCK = 2**24  # numbers handled at a time when a whole-bank statistic is computed in float64


class LatentBank:
    """N training samples, ready to be asked for posteriors.

    Args:
        x: Samples, (N, *), floating point, at least two. Kept without a copy when no labels are
            given and `dtype` is theirs already: do not change them in place afterwards.
        labels: Integer class of each sample, (N,), any integers; default None (no classes).
        dtype: Storage: float32, float64, bfloat16 or float16; default that of `x`. The oracle
            computes in float64 in any case; a 16-bit bank halves the memory and *is* the data
            set, rounded, that the posterior is about.

    Attributes:
        rows: The samples, (N, D), in the bank's own order (sorted by class if there are labels).
        index: Position in `x` of each row, (N,), or None if the order is unchanged. Everything the
            oracle says about rows counts them in the bank's own order; this translates.
        shape: Shape of one sample.
        centre: Mean of the rows, (D,), float64.
        sq_norms: Squared distance of each row from `centre`, (N,), float64.
        radius: The largest such distance (not squared).
        max_norm: An upper bound on the norm of a row.
        std: Standard deviation of all numbers in the bank around their one mean.
        classes: The classes, ascending; empty without labels.

    Raises:
        ValueError: If there are fewer than two rows, rows with NaN or Inf (the count and the first
            index are named), or labels of another length.
        TypeError: If `x` is not floating point, or `labels` not integer.

    Example:
        >>> import torch
        >>> bank = LatentBank(torch.randn(100, 4, 8, 8), labels=torch.arange(100) % 10)
        >>> len(bank), bank.dim, bank.shape, len(bank.classes)
        (100, 256, (4, 8, 8), 10)
    """

    def __init__(
        self, x: Tensor, labels: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        if not x.is_floating_point():
            raise TypeError(f"Expected floating-point `x`, got {x.dtype}. Scale images to floats.")
        dtype = dtype or x.dtype
        if dtype not in _FLOATS:
            raise TypeError(f"Expected `dtype` among {_FLOATS}, got {dtype}.")
        if x.ndim < 2 or x.shape[0] < 2 or x[0].numel() == 0:
            raise ValueError(
                f"Expected `x` with shape (N, *) and at least 2 rows, got {tuple(x.shape)}. "
                "A posterior over fewer than two samples says nothing."
            )
        self._build(x.detach().flatten(1).to(dtype), tuple(x.shape[1:]), labels, in_place=False)

    def _build(
        self, rows: Tensor, shape: tuple[int, ...], labels: Tensor | None, *, in_place: bool
    ) -> None:
        self.rows, self.shape = rows, shape
        self.index: Tensor | None = None
        self._segments: dict[int, slice] = {}
        if labels is not None:
            self._sort_by_class(labels.to(rows.device), in_place)
        self._measure()

    def _sort_by_class(self, labels: Tensor, in_place: bool) -> None:
        if labels.shape != (len(self),):
            raise ValueError(
                f"Expected `labels` with shape ({len(self)},), got {tuple(labels.shape)}."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"Expected integer `labels`, got {labels.dtype}.")
        self.index = torch.argsort(labels, stable=True)
        classes, counts = torch.unique_consecutive(labels[self.index], return_counts=True)
        stops = counts.cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        self._segments = {
            int(label): slice(start, stop)
            for label, start, stop in zip(classes.tolist(), starts, stops, strict=True)
        }
        if not in_place:
            self.rows = self.rows[self.index]
            return
        # A few columns at a time, because a second copy of the bank may not fit.
        for columns in self.rows.split(max(1, _BLOCK // len(self)), dim=1):
            columns.copy_(columns[self.index])

    def _measure(self) -> None:
        step = max(1, _BLOCK // self.dim)
        device, wide = self.rows.device, torch.float64
        total = torch.zeros(self.dim, dtype=wide, device=device)
        bad: list[Tensor] = []
        for first in range(0, len(self), step):
            block = self.rows[first : first + step].to(wide)
            bad.append(~block.isfinite().all(1))
            total += block.sum(0)
        wrong = torch.cat(bad).nonzero()[:, 0]
        if len(wrong):
            places = (wrong if self.index is None else self.index[wrong]).sort().values
            raise ValueError(
                f"Expected finite rows, got NaN or Inf in {len(places)} of {len(self)}; the first "
                f"is row {int(places[0])}. Remove them, or look at what produced them."
            )
        self.centre = total / len(self)
        self.sq_norms = torch.empty(len(self), dtype=wide, device=device)
        for first in range(0, len(self), step):
            block = self.rows[first : first + step].to(wide) - self.centre
            self.sq_norms[first : first + step] = (block * block).sum(1)
        self.radius = math.sqrt(float(self.sq_norms.max()))
        self.max_norm = self.radius + float(self.centre.norm())
        scatter = self.sq_norms.mean() / self.dim + self.centre.var(correction=0)
        self.std = math.sqrt(float(scatter))

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Any],
        num_rows: int,
        *,
        find: FindSample = find_sample,
        dtype: torch.dtype | None = None,
        class_wise: bool = True,
        copies: int = 1,
        advance: Callable[[int], object] | None = None,
    ) -> LatentBank:
        """Builds a bank in host memory from batches, for example those of a `DataLoader`.

        Args:
            batches: Batches of anything that `find` understands; each sample once.
            num_rows: How many rows there are (`len(dataset)`); rows beyond it are not read.
            find: From a batch to `(x_1, labels or None)`; default `batches.find_sample`.
            dtype: Storage dtype; default that of the samples.
            class_wise: Whether to keep the labels that `find` gives, default True.
            copies: Processes on this host that build the same bank, for the check of memory.
            advance: Called with the number of rows read so far, for a progress display.

        Returns:
            The bank.

        Raises:
            MemoryError: If the bank would not fit into the memory that is available, before it is
                allocated; the message gives the size and the ways to make it fit.
            ValueError: If there are fewer rows than promised or shapes differ between batches.
        """
        rows: Tensor | None = None
        labels: list[Tensor] = []
        done = 0
        for batch in batches:
            x1, label = find_checked(find, batch)
            x1 = x1.detach()
            if rows is None:
                kind = dtype or x1.dtype
                require_memory(num_rows, x1[0].numel(), kind, copies)
                rows = torch.empty((num_rows, *x1.shape[1:]), dtype=kind)
            if x1.shape[1:] != rows.shape[1:]:
                raise ValueError(
                    f"Expected samples of shape {tuple(rows.shape[1:])} as in the first batch, "
                    f"got {tuple(x1.shape[1:])} after {done} rows."
                )
            count = min(len(x1), num_rows - done)
            rows[done : done + count] = x1[:count].to(rows.dtype)
            if label is not None and class_wise:
                labels.append(label[:count].detach().cpu())
            done += count
            if advance is not None:
                advance(done)
            if done == num_rows:
                break
        if rows is None or done < num_rows:
            raise ValueError(f"Expected {num_rows} rows in the batches, got {done}.")
        if num_rows < 2:
            return cls(rows)  # which refuses it
        bank = cls.__new__(cls)
        found = torch.cat(labels) if labels else None
        bank._build(rows.flatten(1), tuple(rows.shape[1:]), found, in_place=True)
        return bank

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D, the numbers in a sample."""
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.rows.device

    @property
    def dtype(self) -> torch.dtype:
        """How the rows are stored."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Memory of the rows in bytes."""
        return self.rows.numel() * self.rows.element_size()

    @property
    def classes(self) -> list[int]:
        """The classes, ascending; empty without labels."""
        return list(self._segments)

    def require_classes(self) -> None:
        """Refuses a bank without labels.

        Raises:
            ValueError: With the cure.
        """
        if not self._segments:
            raise ValueError(
                "A class-wise posterior needs a bank with labels: LatentBank(x, labels)."
            )

    def segment(self, label: int) -> slice:
        """The rows of a class, as a slice of the bank's own order.

        Raises:
            ValueError: If the bank has no such class, or no classes at all.
        """
        if label in self._segments:
            return self._segments[label]
        self.require_classes()
        known = self.classes
        raise ValueError(
            f"Class {label} is not in the bank, which has {len(known)} classes from {known[0]} to "
            f"{known[-1]}. Build the bank from the labels that training uses."
        )

    def labels_of(self, rows: Sequence[int]) -> list[int]:
        """The class of each of `rows` (own order), as Python integers, without a device sync."""
        classes, stops = self.classes, [segment.stop for segment in self._segments.values()]
        return [classes[bisect_right(stops, row)] for row in rows]

    def to(self, device: torch.device | str) -> LatentBank:
        """The bank on `device`; itself if it is there already."""
        device = torch.device(device)
        if self.rows.device == device:
            return self
        moved = object.__new__(LatentBank)
        moved.__dict__.update(self.__dict__)
        for name in ("rows", "index", "centre", "sq_norms"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else value.to(device))
        return moved

    def __copy__(self) -> LatentBank:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentBank:
        return self

    def __repr__(self) -> str:
        classes = f", {len(self._segments)} classes" if self._segments else ""
        return (
            f"LatentBank({len(self)} rows of shape {self.shape}{classes}, {self.dtype}, "
            f"{self.device}, {format_bytes(self.nbytes)})"
        )
