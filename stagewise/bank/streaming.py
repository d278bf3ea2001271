"""Reads the rows of a bank chunk by chunk, on any device and in any type.

Rows that already have that device and type are views. Others pass through one buffer, so a bank
larger than the memory of its reader can be read, and no chunk costs an allocation. The next chunk
is fetched ahead: a CUDA device copies it while it computes on the current one, and the kernel of
the system reads the next part of a mapped file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MappedFile", "stream"]

_BUFFER_BYTES = {"cpu": 8 * 2**20}
"""Large enough for products at full speed, and small enough for a CPU's cache; 32 MiB on other
devices."""
_LEAST_ROWS = 256


@dataclass(frozen=True)
class MappedFile:
    """The file of rows that are memory-mapped."""

    pages: mmap.mmap
    start: int  # the first byte of the rows

    def expect(self, first: int, last: int) -> None:
        """Asks the system to read bytes `first` to `last` of the rows; only on Linux."""
        if hasattr(mmap, "MADV_WILLNEED"):
            first, last = self.start + first, self.start + last
            page = first - first % mmap.PAGESIZE
            self.pages.madvise(mmap.MADV_WILLNEED, page, last - page)


def stream(
    rows: Tensor,
    segment: slice,
    size: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    file: MappedFile | None = None,
    into: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The rows (N, D) of a segment, in chunks, as in `RowStore.chunks`; `file` is their file."""
    if size is not None and size < 1:
        raise ValueError(f"Expected `size` of at least 1 row, got {size}.")
    # The buffer's device has its full name ("cuda:0" for "cuda").
    buffer = rows.new_empty((0, rows.shape[1]), device=device, dtype=dtype)
    views = buffer.device == rows.device and buffer.dtype == rows.dtype
    start, stop, _ = segment.indices(len(rows))
    if size is None and views and file is None:
        size = max(stop - start, 1)
    elif size is None:
        most = _BUFFER_BYTES.get(buffer.device.type, 32 * 2**20)
        size = max(_LEAST_ROWS, most // (rows.shape[1] * buffer.element_size()))
    size = min(size, max(stop - start, 1))
    spans: Iterable[tuple[int, int]] = [
        (first, min(first + size, stop)) for first in range(start, stop, size)
    ]
    if file is not None and rows.device.type == "cpu":
        spans = _read_ahead(list(spans), file, rows.shape[1] * rows.element_size())
    if views:
        return ((first, rows[first:last]) for first, last in spans)
    # Fake tensors, which check placement without a device, have no streams.
    if buffer.device.type == "cuda" and rows.device.type == "cpu" and type(buffer) is Tensor:
        return _copied_ahead(rows, spans, size, buffer)
    buffer = buffer.new_empty((size, rows.shape[1])) if into is None else into
    return ((first, buffer[: last - first].copy_(rows[first:last])) for first, last in spans)


def _read_ahead(
    spans: list[tuple[int, int]], file: MappedFile, row_bytes: int
) -> Iterator[tuple[int, int]]:
    for at, span in enumerate(spans):
        for first, last in spans[:2] if at == 0 else spans[at + 1 : at + 2]:
            file.expect(first * row_bytes, last * row_bytes)
        yield span


def _copied_ahead(
    rows: Tensor, spans: Iterable[tuple[int, int]], size: int, like: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """From the host to a CUDA device: one buffer is filled while the reader uses the other.

    A copy is issued when the reader asks for the chunk, after it has queued its work on the chunk
    before. So it runs beside that work even from memory that is not pinned, where the host waits
    for the copy. No copy is under way at a `yield`: a reader may stop early and free the buffers.
    """
    device = like.device
    shape = (size, rows.shape[1])
    buffers = [like.new_empty(shape, dtype=rows.dtype) for _ in range(2)]
    # Conversion runs on the reader's stream, so one buffer is enough.
    wide = like.new_empty(shape) if like.dtype != rows.dtype else None
    read = [torch.cuda.Event(), torch.cuda.Event()]
    side = torch.cuda.Stream(device)
    # The buffers may reuse memory of work that is still queued.
    side.wait_stream(torch.cuda.current_stream(device))
    for turn, (first, last) in enumerate(spans):
        chunk = buffers[turn % 2][: last - first]
        with torch.cuda.stream(side):
            if turn >= 2:
                side.wait_event(read[turn % 2])
            chunk.copy_(rows[first:last], non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(side)
        yield first, chunk if wide is None else wide[: last - first].copy_(chunk)
        read[turn % 2].record(torch.cuda.current_stream(device))
