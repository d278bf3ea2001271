"""Files under latents: tensors mapped where they lie, and quick checks of whether they are whole.

A safetensors file is mapped read-only, and its tensors are views of the mapping: the reader that
`safetensors` has for torch maps a file with room for changes, which the system refuses for one
that is larger than its memory. An array in a stored (uncompressed) zip is found by its offset.
"""

from __future__ import annotations

import io
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

import numpy as np
import torch
from torch import Tensor

from stagewise.storage import Entry, read_header

__all__ = [
    "Entry",
    "NoNumbers",
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
    "to_tensor",
]


class Problem(ValueError):
    """A file that cannot be used; of these, `on_error="skip"` leaves out the file."""


class NoNumbers(Problem):
    """A whole array of something else than numbers."""


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, from its header and size alone.

    Raises:
        Problem: If it is no such file, or not all of it is there.
    """
    try:
        return read_header(path)[0]
    except ValueError as error:
        raise Problem(str(error).replace("is not complete", "is truncated")) from error


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
    if not entry.nbytes or entry.swapped:
        return Rows(read_tensor(path, entry))
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
    if entry.swapped:
        size = entry.dtype.itemsize
        data = bytearray(np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1].tobytes())
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)


def read_array(data: bytes, name: str) -> Tensor:
    """The array of a `.npy` file that was read; `name` is for the error.

    Raises:
        Problem: If it is no such file, or not all of it is there.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises what its parser does
        if "Object arrays" in str(error):
            raise _no_numbers(name, "objects") from error
        raise _unreadable(name, error) from error
    if not isinstance(array, np.ndarray):
        raise Problem(f"Expected a .npy file, got {name}, which is an archive.")
    return to_tensor(array, name)


def to_tensor(array: np.ndarray, name: str) -> Tensor:
    """An array as a tensor, in the byte order of this processor; `name` is for the error.

    Raises:
        NoNumbers: If it holds something else, as text.
    """
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise _no_numbers(name, array.dtype) from error


def _no_numbers(name: str, held: object) -> NoNumbers:
    return NoNumbers(
        f"{name} is no whole .npy file of numbers: it holds {held}. Leave it out, or save numbers."
    )


def _unreadable(name: object, error: Exception) -> Problem:
    return Problem(
        f"{name} is no whole .npy file of numbers ({_short(error)}). Copy or write it again."
    )


def array_entry(path: Path, member: str | None = None) -> Entry | None:
    """Where the numbers of a `.npy` file, or of one in a zip, lie.

    Args:
        path: The file.
        member: Its name in the zip, default none: `path` is the `.npy` file.

    Returns:
        The entry, or None if the member is compressed and has no place of its own.

    Raises:
        Problem: If it is no such file, or not all of it is there; `NoNumbers` if it holds text.
    """
    name = str(path) if member is None else f"{member} in {path}"
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
            start = file.tell()
    except Exception as error:  # numpy and zipfile raise what their parsers do
        raise _unreadable(name, error) from error
    dtype = to_tensor(np.empty(0, kind), name).dtype
    entry = Entry(shape, dtype, start, swapped=not kind.isnative)
    if min(shape, default=0) < 0:
        raise Problem(f"{name} is damaged: it says its shape is {shape}. Write it again.")
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
