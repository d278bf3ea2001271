"""Files under latents: tensors mapped where they lie, and quick checks of whether they are whole.

A safetensors file is mapped read-only, and its tensors are views of the mapping: the reader that
`safetensors` has for torch maps a file with room for changes, which the system refuses for one
that is larger than its memory. An array in a stored (uncompressed) zip is found by its offset.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import struct
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Entry",
    "Problem",
    "Rows",
    "array_entry",
    "local_header",
    "map_rows",
    "names",
    "odd_sizes",
    "read_array",
    "read_tensor",
    "replace_file",
    "safetensors_entries",
]

_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_MAX_HEADER = 100_000_000  # what the format itself allows


class Problem(ValueError):
    """A file that cannot be used; of these, `on_error="skip"` leaves out the file."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        start: Where its numbers begin, in bytes from the start of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header and size alone.

    Raises:
        Problem: If it is no such file, or not all of it is there.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(data - 8) if data - 8 <= _MAX_HEADER else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = {
            name: Entry(
                tuple(entry["shape"]), _TYPES[entry["dtype"]], data + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
        ends = [data + entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(
            f"{path} is no safetensors file, or its header is damaged. Copy or write it again."
        ) from error
    end = max(ends, default=data)
    if size < end:
        raise Problem(
            f"{path} is truncated: {end} bytes were announced, {size} are there. Copy or "
            "write it again."
        )
    wrong = [name for name, e in entries.items() if e.start + e.nbytes > size]
    if wrong:
        raise Problem(f"{path} is damaged: {wrong} would end beyond the file. Write it again.")
    return entries


@dataclass(frozen=True)
class Rows:
    """An array, mapped from a file or in memory.

    Attributes:
        x: The array, (N, *); read-only if it is mapped: to write to it ends the process.
        path: The file under it, if it is mapped.
        start: Where it begins there, in bytes.
    """

    x: Tensor
    path: Path | None = None
    start: int = 0

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, in memory: many rows are read faster than they are mapped."""
        shape = (stop - start, *self.x.shape[1:])
        if self.path is None:
            return self.x[start:stop]
        before = start * math.prod(shape[1:]) * self.x.itemsize
        return read_tensor(self.path, Entry(shape, self.x.dtype, self.start + before))


def map_rows(path: Path, entry: Entry) -> Rows:
    """A tensor of a file, mapped for access to single rows."""
    if not entry.nbytes:
        return Rows(torch.empty(entry.shape, dtype=entry.dtype))
    with open(path, "rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(pages, "madvise") and hasattr(mmap, "MADV_RANDOM"):
        # Read ahead, as is done for a mapping, a single row took 100 times as long.
        pages.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(
            pages, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.start
        )
    return Rows(flat.view(entry.shape), path, entry.start)


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """A tensor of a file, in memory: for few numbers faster than a mapping."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    with open(path, "rb") as stream:
        stream.seek(entry.start)
        data = bytearray(entry.nbytes)
        if stream.readinto(data) != entry.nbytes:
            raise Problem(f"{path} has become shorter since it was opened. Copy it again.")
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)


def read_array(data: bytes, name: str) -> np.ndarray:
    """The array of a `.npy` file that was read; `name` is for the error.

    Raises:
        Problem: If it is no such file, or not all of it is there.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Problem(
            f"{name} is no whole .npy file of numbers ({_short(error)}). Copy or write it again."
        ) from error
    if not isinstance(array, np.ndarray):
        raise Problem(f"Expected a .npy file, got {name}, which is an archive.")
    return array


def array_entry(path: Path, member: str | None = None) -> Entry | None:
    """Where the numbers of a `.npy` file, or of one in a zip, lie.

    Args:
        path: The file.
        member: Its name in the zip, default none: `path` is the `.npy` file.

    Returns:
        The entry, or None if the member is compressed and has no place of its own.

    Raises:
        Problem: If it is no such file, or not all of it is there.
    """
    try:
        with open(path, "rb") as file:
            end = path.stat().st_size
            if member is not None:
                with zipfile.ZipFile(file) as archive:
                    info = archive.getinfo(member)
                if info.compress_type != zipfile.ZIP_STORED:
                    return None
                start = info.header_offset
                file.seek(start)
                start += local_header(file.read(30))
                end = start + info.file_size
                file.seek(start)
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, kind = read(file)
            entry = Entry(shape, torch.from_numpy(np.empty(0, kind)).dtype, file.tell())
    except (ValueError, EOFError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        name = path if member is None else f"{member} in {path}"
        raise Problem(
            f"{name} is no whole .npy file of numbers ({_short(error)}). Copy or write it again."
        ) from error
    if fortran and len(shape) > 1:
        raise Problem(f"{path} is in Fortran order. Save it again: np.ascontiguousarray(x).")
    if entry.start + entry.nbytes > end:
        raise Problem(
            f"{path} is truncated: an array of shape {shape} was announced, which is not there to "
            "its end. Copy or write it again."
        )
    return entry


def local_header(header: bytes) -> int:
    """Length of what stands before the data of a zip's member, from its first 30 bytes.

    Raises:
        Problem: If it is no such header.
    """
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise Problem("the zip is damaged: a member is not where its directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    return 30 + int(name) + int(extra)


def odd_sizes(sizes: Mapping[str, int]) -> list[str]:
    """Files whose size is not the most frequent one: of files of equal shape, those to look at."""
    values, counts = np.unique(list(sizes.values()), return_counts=True)
    usual = int(values[counts.argmax()]) if len(values) else 0
    return [name for name, size in sizes.items() if size != usual]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name beside its own, and renames it when it is on the disk.

    Args:
        path: Its name.
        write: Writes the file whose name it is given.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def names(paths: Iterable[object], most: int = 5) -> str:
    """A few names for a message, and how many more there are."""
    listed = [str(path) for path in paths]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
