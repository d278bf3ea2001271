"""`RowStore`: samples as rows, reached by number, by value, by class, or chunk by chunk."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from stagewise.bank.building import BLOCK, HALF
from stagewise.bank.row_classes import RowClasses, as_real
from stagewise.bank.row_keys import (
    CLASS_FACTOR,
    condition_keys,
    find_rows,
    key_weights,
    row_keys,
)
from stagewise.bank.streaming import MappedFile, stream
from stagewise.files import Damaged
from stagewise.masks import MaskedLabels
from stagewise.memory import available_memory, format_bytes, oracle_device

__all__ = ["RowStore"]

_NONE: Mapping[Any, Callable[[], Tensor]] = {}


class RowStore(RowClasses):
    """N samples of D numbers, on any device or in a file; a copy is the store itself.

    `rows`, `offset`, `shape` and `index` are as in `LatentBank`; `segments` and `pairs` as in
    `RowClasses`; `file` is the mapped file of the rows, `keys` their keys, if there are any.
    """

    conditions: Tensor | None = None  # what a model is given for each row, (N, C)
    centre: Tensor  # the mean of the samples, (D,), float64
    sq_norms: Tensor  # their squared distances from it, (N,), float64
    _unread: Path | None = None  # the file, until its rows are compared with the keys in it

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
        super().__init__(rows, segments, pairs)
        self.offset, self.shape, self.index = offset, shape, index
        self._file, self._keys = file, keys
        self._fingerprint: str | None = None
        self._sorted_keys: dict[Any, tuple[Tensor, Tensor]] = {}
        self.shifted = bool(offset.any())

    @property
    def origin(self) -> str:
        """What the rows are if not a training set, such as "the last 4096 samples"; else empty."""
        return ""

    @property
    def dim(self) -> int:
        """D, the numbers in a sample."""
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.rows.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stored rows."""
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

    def take(self, rows: Tensor, device: torch.device | None = None) -> Tensor:
        """Samples of rows (own order, any shape, any device), `(*rows.shape, D)`, float64.

        They are on `device`, default that of the bank.
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

        Samples with more digits than the rows are rounded as the rows were. If they have fewer (a
        float32 bank asked with bfloat16), the rows are rounded to the type of `x1`; the first call
        with such a type reads all rows and keeps 16 bytes for each. Samples cast to 16 bits are not
        found in a 16-bit bank with an `offset`, unless they were cast from the bank's own samples:
        build the bank with `offset=torch.zeros(dim)` for that.

        Args:
            x1: Samples, (B, *), as the bank was built from, on any device. With masks, numbers
                outside them are zero.
            masks: `MaskedLabels`, for rows with the same mask only.
            condition: What the model is given, (B, *), for rows with the same condition only, at
                the lower of the two precisions.
            first: The first row of a class, (B,), for rows of that class only.

        Returns:
            Rows in the bank's own order, (B,), int64, on the device of `x1`; -1 for a sample that
            equals none. Of several equal rows it may be any. The first call reads all rows.

        Raises:
            ValueError: If the samples have another shape than those of the bank.
        """
        if x1.ndim < 2 or math.prod(x1.shape[1:]) != self.dim:
            raise ValueError(
                f"Expected `x1` with shape {('B', *self.shape)} as the bank's samples, got "
                f"{tuple(x1.shape)}."
            )
        flat, dtype = x1.detach().to(self.device).flatten(1), x1.dtype
        found: Tensor | None = None
        exact, rounded = self.looks(dtype)
        more: Tensor | int = 0
        also: dict[Any, Callable[[], Tensor]] = {}
        if isinstance(masks, MaskedLabels):
            more = masks.unlabelled().keys().to(self.device)
            also["mask"] = lambda: _by_row(self._of_masks)
        if condition is not None:
            c, stored = self.as_conditions(condition, len(flat)).to(self.device), self.conditions
            assert stored is not None
            c = c if c.is_floating_point() else c.to(stored)
            kind = min(stored.dtype, c.dtype, key=lambda dtype: dtype.itemsize)
            more = more + condition_keys(c.to(kind))
            also[kind] = lambda: condition_keys(stored.to(kind))
        if first is not None:
            more = more + first.to(self.device) * CLASS_FACTOR
            firsts = {rows.start: rows for rows in self._segments.values()}
            also["class"] = lambda: _by_row(firsts) * CLASS_FACTOR
        if exact:
            wanted = flat
            if self.shifted or dtype != self.dtype:
                wanted = (flat.double() - self.offset).to(self.dtype)
            # Faster than to index where rows are on the host.
            read = partial(self.rows.index_select, 0)
            found = find_rows(read, self.key_index(None, also), wanted, more)
        if rounded:
            index = self.key_index(dtype, also)
            other = find_rows(lambda rows: self.take(rows).to(dtype), index, flat, more)
            found = other if found is None else other.where(found < 0, found)
        assert found is not None
        return found.to(x1.device)

    def looks(self, dtype: torch.dtype) -> tuple[bool, bool]:
        """How `find` compares samples of a type: rounded as rows are, and with rows rounded to it.

        Of two 16-bit types neither holds the other, and neither holds samples with an offset.
        """
        fewer = dtype in (*HALF, torch.float32) and dtype.itemsize < self.dtype.itemsize
        both = dtype in HALF and self.dtype in HALF and (dtype != self.dtype or self.shifted)
        return not fewer, fewer or both

    def find_near(self, x1: Tensor, within: float = 1e-2) -> Tensor:
        """As `find`, up to rounding: an encoder rounds differently in another batch.

        A sample is a row if it is nearer than `within` times its distance from the mean. Of the
        rows whose projections on one direction are around that of the sample, those nearest to it
        in 16 directions are compared. Does not wait for the device.
        """
        found, flat = self.find(x1), x1.detach().to(self.device).flatten(1).double()
        # Random directions: different rows have different projections.
        along = key_weights(16 * self.dim, self.device).double().reshape(16, -1).T / 2**63
        if (projected := self._sorted_keys.get("projected")) is None:
            parts = [(rows + self.offset) @ along for _, rows in self.chunks(self.whole)]
            all_ = torch.cat(parts)
            order = all_[:, 0].argsort()
            projected = all_[order], order
            if as_real(all_, self.rows):
                self._sorted_keys["projected"] = projected
        values, order = projected
        wanted, span = flat @ along, min(1024, max(4, len(self) // 50))
        at = torch.searchsorted(values[:, 0].contiguous(), wanted[:, :1].contiguous())
        at = (at + torch.arange(-span, span, device=flat.device)).clamp(0, len(self) - 1)
        close = (values[at] - wanted[:, None]).square().sum(2)
        near = order[at.gather(1, close.topk(min(4, 2 * span), largest=False).indices)]
        gap, nearest = (self.take(near) - flat[:, None]).norm(dim=2).min(1)
        size = (flat - self.centre.to(flat.device)).norm(dim=1)
        row = near.gather(1, nearest[:, None])[:, 0].where(gap <= within * size, -1)
        return found.where(found >= 0, row.to(x1.device))

    def as_conditions(self, condition: Tensor, count: int) -> Tensor:
        """Conditions (B, *) as (B, C); refuses others than `count` finite ones of that width."""
        c = condition.detach()
        c = c.flatten(1) if c.ndim > 1 else c[:, None]
        width = None if self.conditions is None else self.conditions.shape[1]
        if c.shape != (count, width):
            raise ValueError(
                f"Expected `condition` with shape ({count}, {width}), one for each sample and as "
                f"wide as those of the bank, {width} numbers, got {tuple(condition.shape)}, "
                f"{c.shape[1]} numbers."
            )
        message, finite = "Expected finite `condition`, got NaN or Inf", c.isfinite().all(1)
        if c.device.type != "cpu":
            torch._assert_async(finite.all(), message)
        elif not finite.all():
            raise ValueError(f"{message} in row {int((~finite).nonzero()[0])}.")
        return c

    def key_index(
        self, dtype: torch.dtype | None = None, also: Mapping[Any, Callable[[], Tensor]] = _NONE
    ) -> tuple[Tensor, Tensor]:
        """The keys in ascending order and their rows; of the samples as `dtype` if it is given.

        `also` are keys of something else of each row, which are added, by a name.
        """
        name = (dtype, *also) if also else dtype
        if name in self._sorted_keys:
            return self._sorted_keys[name]
        if dtype is None:
            keys = self.row_keys()
        else:
            size = max(1, BLOCK // self.dim)
            parts = self.chunks(self.whole, size)
            # Through float64, as `take` gives a sample.
            keys = torch.cat([row_keys((part + self.offset).to(dtype)) for _, part in parts])
        for added in also.values():
            keys = keys + added().to(keys.device)
        values, order = keys.sort(stable=True)
        if as_real(values, self.rows):
            self._sorted_keys[name] = (values, order)
        return values, order

    def chunks(
        self,
        segment: slice,
        size: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        into: Tensor | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The rows of a segment as they are stored (without `offset`), chunk by chunk.

        Yields the number of the first row, in the bank's own order, and the rows, (n, D), of
        `whole`, `segment(label)` or any other slice; on `device` in `dtype`, default those of the
        bank. Rows that are there already are views. Others are copied into a buffer that is used
        again: **a chunk is valid until the next one is read**. A chunk has `size` rows; default all
        if they are views, otherwise 32 MiB of rows (8 MiB on a CPU), at least 256. `into`: the
        buffer for copies on a CPU, of `size` rows; default a new one.
        """
        return stream(self.rows, segment, size, device, dtype, self._file, into)

    @property
    def fingerprint(self) -> str:
        """A name for what the bank holds: 32 hexadecimal digits.

        Equal for banks with equal rows (type, order, offset), classes and conditions, on any
        device; different if any number differs, or two rows or columns are swapped. Computed once,
        from all rows.
        """
        if self._fingerprint is None:
            about = (len(self), self.dim, str(self.dtype), self.shape, self.class_ends)
            total = hashlib.blake2b(repr(about).encode(), digest_size=16)
            for part in (self.offset, self.row_keys()):
                total.update(part.cpu().numpy().tobytes())
            if (c := self.conditions) is not None:
                total.update(repr((str(c.dtype), c.shape[1])).encode())
                total.update(condition_keys(c).cpu().numpy().tobytes())
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def row_keys(self) -> Tensor:
        """The key of each row, (N,), int64; computed once."""
        if self._keys is not None:
            return self._keys
        keys = row_keys(self.rows)
        self._keys = keys if as_real(keys, self.rows) else None
        return keys

    def require_intact(self) -> None:
        """Compares the rows of a file with their keys in it, and refuses damaged ones.

        Reads all rows, once: the fingerprint is made of the keys, which are read at opening. Rows
        in memory need no check.
        """
        if self._unread is None:
            return
        wrong: list[int] = []
        for first, rows in self.chunks(self.whole):
            differ = row_keys(rows) != self.row_keys()[first : first + len(rows)]
            wrong += (first + differ.nonzero()[:, 0]).tolist()
        if wrong:
            raise Damaged.of(
                self._unread,
                f"{len(wrong)} of its {len(self)} rows are no longer those that were written, the "
                f"first is row {wrong[0]} of the file",
            )
        self._unread = None

    def to(self, device: torch.device | str) -> Self:
        """The store on `device`; itself if it is already there."""
        device = torch.device(device)
        if self.rows.device == device:
            return self
        return self._moved(lambda value: value.to(device))

    def beside_training(self, device: torch.device, taken: float = 0) -> Self:
        """On the training device if it fits into half of the free memory there, else on the host.

        `taken` are bytes that training will still allocate there: gradients, moments. The other
        half is for activations. On the host it is pinned if there is room, unless it is a file.
        Warns if the device runs out of memory nevertheless.
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

    def pin(self) -> Self:
        """The store in pinned host memory, which a CUDA device copies fastest."""
        if not torch.cuda.is_available():
            raise RuntimeError(
                "Expected a CUDA device, found none: pinned memory is for copies to one. Without a "
                "device, use the bank as it is."
            )
        return self._moved(lambda value: value.cpu().pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Self:
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

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _by_row(segments: Mapping[int, slice]) -> Tensor:
    """The key of its segment for each row, (N,); the segments are in the order of the rows."""
    each = segments.items()
    return torch.cat([torch.full((rows.stop - rows.start,), key) for key, rows in each])
