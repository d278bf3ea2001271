"""`RowStore`: samples as rows, reached by number, by value, by class, or chunk by chunk."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from stagewise.bank.building import BLOCK, HALF
from stagewise.bank.row_keys import CLASS_FACTOR, condition_keys, digest, find_rows, row_keys
from stagewise.bank.streaming import MappedFile, stream
from stagewise.masks import MaskedLabels
from stagewise.memory import available_memory, format_bytes, oracle_device

__all__ = ["KNOWN", "NO_LABEL", "NO_SOURCE", "NO_TIME", "RowStore"]

KNOWN = -(2**63)
"""What stands for a label that is known."""

NO_TIME, NO_SOURCE, NO_LABEL = KNOWN + 1, KNOWN + 2, KNOWN + 3
"""What stands for a time and a source out of range, and for a class that nobody knows."""

_REFUSED = {
    NO_TIME: "Expected `t` in [0, 1] with t = 0 noise and t = 1 data, got others.",
    NO_SOURCE: "Expected `source` below the number of rows of the bank, got others.",
    NO_LABEL: (
        "Expected `labels`: the class of a sample cannot be looked up, as it is no row of this "
        "bank. Give the labels of the batch: classes=y to a FlowMatchingLoss, labels=y to a scheme."
    ),
}

Self = TypeVar("Self", bound="RowStore")


class RowStore:
    """N samples of D numbers, wherever they lie. A copy of a store is the store itself.

    `rows`, `offset`, `shape` and `index` are those of `LatentBank`; `segments` the rows of each
    class, by its label, ascending; `file` is that under rows that are memory-mapped, and `keys`
    those of the rows, if they are known. With masks a class is a label and a mask, known by its
    key (`stagewise.masks`), and `pairs` are those of all segments in their order.
    `conditions` are what a model is given for each row, (N, C), if they are known.
    """

    conditions: Tensor | None = None

    def __init__(
        self,
        rows: Tensor,
        offset: Tensor,
        shape: tuple[int, ...],
        index: Tensor | None = None,
        segments: dict[int, slice] | None = None,
        file: MappedFile | None = None,
        keys: Tensor | None = None,
        pairs: MaskedLabels | None = None,
    ) -> None:
        self.rows, self.offset, self.shape = rows, offset, shape
        self.index, self._segments = index, segments or {}
        self.pairs, self._of_masks = pairs, _of_masks(pairs, self._segments)
        self._file, self._keys = file, keys
        self._fingerprint: str | None = None
        self._sorted_keys: dict[Any, tuple[Tensor, Tensor]] = {}
        self._class_table: dict[torch.device, Tensor] = {}
        self._unknown: deque[tuple[Tensor, Callable[[], bool]]] = deque()
        self.shifted = bool(offset.any())

    @property
    def origin(self) -> str:
        """What the rows are if they are no training set: "the last 4096 samples seen"; or empty."""
        return ""

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
    def residency(self) -> str:
        """Where the rows are: "host", "pinned host", "memory-mapped", or a device, "cuda:0"."""
        if self._file is not None:
            return "memory-mapped"
        if self.device.type != "cpu":
            return str(self.device)
        return "pinned host" if self.rows.is_pinned() else "host"

    @property
    def whole(self) -> slice:
        """All rows, as `segment` gives those of a class."""
        return slice(0, len(self))

    @property
    def classes(self) -> list[int]:
        """The classes, ascending; empty without labels."""
        return list(self._segments)

    @property
    def class_ends(self) -> list[tuple[int, int, int]]:
        """Label, first row and end of each class."""
        return [(label, rows.start, rows.stop) for label, rows in self._segments.items()]

    @property
    def labelled(self) -> bool:
        """Whether its rows have labels; with masks they may have classes and no labels."""
        return bool(self._segments) if self.pairs is None else self.pairs.labels is not None

    def scopes(self, class_wise: bool) -> list[slice]:
        """Sets of rows that posteriors are over: the classes, or without them the bank or masks."""
        if class_wise:
            self.require_classes()
            return list(self._segments.values())
        return [self.whole] if self.pairs is None else list(self._of_masks.values())

    @cached_property
    def median_class(self) -> int:
        """Rows of the class of the median row."""
        sizes = sorted(rows.stop - rows.start for rows in self._segments.values())
        return next(size for i, size in enumerate(sizes) if 2 * sum(sizes[: i + 1]) >= len(self))

    def require_classes(self) -> None:
        """Refuses a bank without labels, with the cure."""
        if not self._segments:
            raise ValueError(
                "A class-wise posterior needs a bank with labels: LatentBank(x, labels)."
            )

    def require_unmasked(self, what: str, cure: str) -> None:
        """Refuses a bank with masks, with the cure."""
        if self.pairs is not None:
            raise ValueError(f"{what} does not know masks, and the bank has some. {cure}")

    def has_masks(self, masks: MaskedLabels) -> Tensor:
        """Which samples have a mask (and label) of some row, (n,), on the host."""
        known = {*self._of_masks, *self._segments}
        return torch.tensor([key in known for key in masks.tolist()])

    def segment(self, label: int) -> slice:
        """The rows of a class, as a slice of the bank's own order; refuses another."""
        found = self._segments.get(label, self._of_masks.get(label))
        if found is not None:
            return found
        self.require_classes()
        if self.pairs is not None:
            raise ValueError(
                f"No row of the bank has this mask (and label), and its {len(self._of_masks)} "
                "masks are those it was built from. Build the bank from the masks that training "
                "uses: LatentBank(x, labels, mask=mask)."
            )
        known = self.classes
        raise ValueError(
            f"Class {label} is not in the bank, which has {len(known)} classes from {known[0]} to "
            f"{known[-1]}. Build the bank from the labels that training uses."
        )

    @cached_property
    def largest_class(self) -> int:
        """Rows of the largest class; 0 without labels."""
        return max((rows.stop - rows.start for rows in self._segments.values()), default=0)

    @cached_property
    def smallest_class(self) -> int:
        """Rows of the smallest class; 0 without labels."""
        return min((rows.stop - rows.start for rows in self._segments.values()), default=0)

    def class_table(self, device: torch.device) -> Tensor:
        """Label, first row and end of each class, and of each mask, (C, 3), int64, by label.

        Made on a device once.
        """
        if not self._of_masks:
            self.require_classes()
        table = self._class_table.get(device)
        if table is None:
            ends = {**self._of_masks, **self._segments}
            ordered = [(key, ends[key].start, ends[key].stop) for key in sorted(ends)]
            table = torch.tensor(ordered, device=device)
            if _as_real(table, self.rows):
                self._class_table[device] = table
        return table

    def ends_of(self, labels: Tensor) -> Tensor:
        """First row and end of the class of each label, (B, 2), int64, without a device sync.

        Args:
            labels: (B,), int64. One that is not in the bank has no rows: on an accelerator its
                posterior is NaN, and the first call after the device has found it out raises.

        Raises:
            ValueError: If a label of this call, or on an accelerator of one before, is unknown.
        """
        self._require_known()
        table = self.class_table(labels.device)
        at = torch.searchsorted(table[:, 0].contiguous(), labels).clamp_max(len(table) - 1)
        found = table[at]
        known = found[:, 0] == labels
        self.report(torch.where(known, KNOWN, labels))
        if labels.device.type == "cpu":
            self._require_known()
        return found[:, 1:].where(known[:, None], 0)

    def report(self, told: Tensor) -> None:
        """Has the next calls refuse what is wrong with samples, (B,), int64; waits for nothing.

        Args:
            told: The label of each sample if it is unknown, or else `KNOWN`; `NO_TIME`,
                `NO_SOURCE` or `NO_LABEL`.
        """
        self._require_known()
        if sent := _sent(told.amax()):
            self._unknown.append(sent)

    def _require_known(self) -> None:
        """Refuses a label that was found to be unknown; waits for nothing."""
        while self._unknown and self._unknown[0][1]():
            label = int(self._unknown.popleft()[0])
            if label != KNOWN:
                self._unknown.clear()
                if label in _REFUSED:
                    raise ValueError(_REFUSED[label])
                self.segment(label)

    def labels_of(self, rows: Sequence[int]) -> list[int]:
        """The class of each of `rows` (own order), as Python integers, without a device sync."""
        classes, stops = self.classes, [segment.stop for segment in self._segments.values()]
        return [classes[bisect_right(stops, row)] for row in rows]

    def classes_of(self, rows: Sequence[int]) -> Tensor | MaskedLabels | None:
        """The labels of rows, (n,), with their masks if they have any; None without classes."""
        if self.pairs is None:
            return torch.tensor(self.labels_of(rows)) if self._segments else None
        stops = [segment.stop for segment in self._segments.values()]
        return self.pairs[torch.tensor([bisect_right(stops, row) for row in rows])]

    def take(self, rows: Tensor, device: torch.device | None = None) -> Tensor:
        """Samples by their rows (own order, any shape, any device), (*rows.shape, D), float64.

        They are given on `device`, default that of the bank.
        """
        stored = self.rows[rows.to(self.device)]
        return stored.to(device or self.device) + self.offset.to(device or self.device)

    def find(
        self,
        x1: Tensor,
        masks: object = None,
        condition: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """The row of each sample that is in the bank, at the precision of `x1`.

        Samples of more digits than the rows have are rounded as the rows were. Of fewer (a float32
        bank asked with bfloat16), the bank's samples are rounded to the type of `x1`; the first
        call with such a type looks at all rows and keeps 16 bytes for each. Samples cast to 16 bits
        are not found in a 16-bit bank that was itself rounded relative to an `offset`, unless they
        were cast from the bank's own samples: give the bank `offset=torch.zeros(dim)` for that.

        Args:
            x1: Samples, (B, *), as those the bank was built from; on any device. With masks zeros
                are outside of them.
            masks: `MaskedLabels`, for rows of the same mask only.
            condition: What the model is given, (B, *), for rows of the same condition only, at the
                precision of the one that has fewer digits.
            first: The first row of a class, (B,), for rows of that class only.

        Returns:
            Rows in the bank's own order, (B,), int64, on the device of `x1`; -1 for a sample that
            equals none. Of rows that are equal, or equal once rounded, it may be any. The first
            call looks at all rows.

        Raises:
            ValueError: If the samples have another shape than those of the bank.
        """
        if x1.ndim < 2 or math.prod(x1.shape[1:]) != self.dim:
            raise ValueError(
                f"Expected `x1` with shape {('B', *self.shape)} as the bank's samples, got "
                f"{tuple(x1.shape)}."
            )
        flat, dtype = x1.detach().to(self.device).flatten(1), x1.dtype
        found = torch.full((len(flat),), -1, device=self.device)
        fewer = dtype in (*HALF, torch.float32) and dtype.itemsize < self.dtype.itemsize
        more: Tensor | int = 0
        of: list[Any] = [isinstance(masks, MaskedLabels), None, first is not None]
        if isinstance(masks, MaskedLabels):
            more = masks.unlabelled().keys().to(self.device)
        if condition is not None:
            c, stored = self.as_conditions(condition, len(flat)).to(self.device), self.conditions
            assert stored is not None
            c = c if c.is_floating_point() else c.to(stored)
            of[1] = min(stored.dtype, c.dtype, key=lambda dtype: dtype.itemsize)
            more = more + condition_keys(c.to(of[1]))
        if first is not None:
            more = more + first.to(self.device) * CLASS_FACTOR
        if not fewer:
            wanted = (flat.double() - self.offset).to(self.dtype)
            found = find_rows(self.rows.__getitem__, self.key_index(None, *of), wanted, more)
        # Of two 16-bit types neither holds the other, and neither holds samples with an offset.
        both = dtype in HALF and self.dtype in HALF and (dtype != self.dtype or self.shifted)
        if fewer or both:
            index = self.key_index(dtype, *of)
            rounded = find_rows(lambda rows: self.take(rows).to(dtype), index, flat, more)
            found = rounded.where(found < 0, found)
        return found.to(x1.device)

    def as_conditions(self, condition: Tensor, count: int) -> Tensor:
        """Conditions (B, *) as (B, C), refused if they are not `count`, as wide as the bank's."""
        c = condition.detach()
        c = c.flatten(1) if c.ndim > 1 else c[:, None]
        width = None if self.conditions is None else self.conditions.shape[1]
        if c.shape != (count, width):
            raise ValueError(
                f"Expected `condition` with shape ({count}, {width}), one for each sample and as "
                f"wide as those of the bank, {width} numbers, got {tuple(condition.shape)}, "
                f"{c.shape[1]} numbers."
            )
        return c

    def key_index(
        self,
        dtype: torch.dtype | None = None,
        of_masks: bool = False,
        of_conditions: torch.dtype | None = None,
        of_classes: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The keys in ascending order and their rows; of the samples as `dtype` if it is given.

        With `of_masks` the keys of their masks are added to them, with `of_conditions` those of
        their conditions as that type, with `of_classes` those of the first rows of their classes.
        """
        more = of_masks, of_conditions, of_classes
        name = (dtype, *more) if any(more) else dtype
        if name in self._sorted_keys:
            return self._sorted_keys[name]
        if dtype is None:
            keys = self.row_keys()
        else:
            size = max(1, BLOCK // self.dim)
            parts = self.chunks(self.whole, size)
            # Through float64, as `take` gives a sample.
            keys = torch.cat([row_keys((part + self.offset).to(dtype)) for _, part in parts])
        if of_masks:
            ends = self._of_masks.items()
            added = [torch.full((rows.stop - rows.start,), key) for key, rows in ends]
            keys = keys + torch.cat(added).to(keys.device)
        if of_conditions and self.conditions is not None:
            keys = keys + condition_keys(self.conditions.to(of_conditions)).to(keys.device)
        if of_classes:
            begins = [torch.full((b - a,), a) for _, a, b in self.class_ends]
            keys = keys + (torch.cat(begins) * CLASS_FACTOR).to(keys.device)
        values, order = keys.sort(stable=True)
        if _as_real(values, self.rows):
            self._sorted_keys[name] = (values, order)
        return values, order

    def chunks(
        self,
        segment: slice,
        size: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The rows of a segment as they are stored (without `offset`), chunk by chunk.

        Rows that lie on `device` in `dtype` are given as views. Others are copied into a buffer
        that is used again: **a chunk is valid until the next one is asked for**.

        Args:
            segment: Which rows: `whole`, `segment(label)`, or any other slice.
            size: Rows in a chunk; default all if they are views, and as many as make 32 MiB, at
                least 256, if they are copied or read from a file.
            device: Default that of the bank.
            dtype: Default that of the bank.

        Returns:
            Pairs of the first row's number in the bank's own order and the rows, (n, D).
        """
        return stream(self.rows, segment, size, device, dtype, self._file)

    @property
    def fingerprint(self) -> str:
        """A name for what the bank holds: 32 hexadecimal digits.

        Equal for banks with equal rows (type, order, offset), classes and conditions, wherever they
        are; different as soon as one number is another, or two rows or columns are swapped.
        Computed once, from all rows.
        """
        if self._fingerprint is None:
            self._fingerprint = digest(
                *(self.row_keys(), self.offset, self.dtype, self.shape, self.class_ends),
                self.conditions,
            )
        return self._fingerprint

    def row_keys(self) -> Tensor:
        """The key of each row, (N,), int64; computed once."""
        if self._keys is not None:
            return self._keys
        keys = row_keys(self.rows)
        self._keys = keys if _as_real(keys, self.rows) else None
        return keys

    def to(self: Self, device: torch.device | str) -> Self:
        """The store on `device`; itself if it is there already."""
        device = torch.device(device)
        if self.rows.device == device:
            return self
        return self._moved(lambda value: value.to(device))

    def beside_training(self: Self, device: torch.device, taken: float = 0) -> Self:
        """On the training device where half of what is free there holds it, else on the host.

        The other half is for activations. On the host it is pinned if there is room, and if it is
        no file. A device that runs out of memory all the same is warned of.

        Args:
            device: That of training.
            taken: Bytes that training has yet to allocate there: gradients, moments.
        """
        device = oracle_device(device)
        free = available_memory(device)
        if free is None or self.nbytes <= (free - taken) / 2:
            try:
                return self.to(device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                warnings.warn(
                    f"{self!r} does not fit on {device}, where {format_bytes(free or 0)} were "
                    "free: it stays on the host, and each call of an oracle copies rows to the "
                    "device. A bank with dtype=torch.bfloat16 takes half of float32.",
                    stacklevel=2,
                )
        room = available_memory()
        if device.type != "cuda" or self.residency != "host" or 2 * self.nbytes > (room or 0):
            return self
        return self.pin()

    def pin(self: Self) -> Self:
        """The store in pinned host memory, from where a CUDA device copies fastest."""
        if not torch.cuda.is_available():
            raise RuntimeError(
                "Expected a CUDA device, found none: pinned memory is for copies to one. Without "
                "it, use the bank as it is."
            )
        return self._moved(lambda value: value.cpu().pin_memory())

    def _moved(self: Self, move: Callable[[Tensor], Tensor]) -> Self:
        moved = object.__new__(type(self))
        moved.__dict__.update(self.__dict__, _file=None, _sorted_keys={}, _class_table={})
        moved._unknown = deque()
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                setattr(moved, name, move(value))
        return moved

    def __getstate__(self) -> dict[str, Any]:
        # Made again when asked for.
        return self.__dict__ | {"_sorted_keys": {}, "_class_table": {}, "_unknown": deque()}

    def __copy__(self: Self) -> Self:
        return self

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self


def _of_masks(pairs: MaskedLabels | None, segments: dict[int, slice]) -> dict[int, slice]:
    """The rows of each mask by its key, whatever their labels; they stand together."""
    found: dict[int, slice] = {}
    keys = () if pairs is None else pairs.unlabelled().tolist()
    for key, rows in zip(keys, segments.values(), strict=pairs is not None):
        found[key] = slice(found[key].start if key in found else rows.start, rows.stop)
    return found


def _sent(told: Tensor) -> tuple[Tensor, Callable[[], bool]] | None:
    """A number on its way to the host, and what says whether it is there; None if none goes."""
    if not told.is_cuda:
        return told, lambda: True
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None  # fake tensors, or a graph, which has no next call
    there = torch.empty_like(told, device="cpu", pin_memory=True)
    there.copy_(told, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event.query


def _as_real(value: Tensor, like: Tensor) -> bool:
    """Whether `value` may be kept beside `like`: a fake tensor may not beside a real one."""
    return type(value) is type(like)
