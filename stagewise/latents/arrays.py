"""Arrays and labels in files: `.npy` files, alone or in a zip, are mapped.

An array in a stored (uncompressed) zip is found by its offset, so no row has to be unpacked.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.batches import is_one_hot
from stagewise.files import Damaged, Problem, first_line, replace_file
from stagewise.tensor_files import Entry

__all__ = [
    "NoNumbers",
    "Rows",
    "array_entry",
    "check_zip",
    "class_numbers",
    "is_dense",
    "local_header",
    "members_of",
    "outside",
    "read_array",
    "require_labels",
    "save_arrays",
    "to_tensor",
]


class NoNumbers(Problem):
    """An undamaged array of something other than numbers."""


@dataclass(frozen=True)
class Rows:
    """An array (N, *), mapped from an entry of a file, or in memory."""

    x: Tensor
    entry: Entry | None = None

    @classmethod
    def of(cls, entry: Entry) -> Rows:
        """A tensor of a file, mapped to read single rows; writing to it ends the process."""
        if not entry.nbytes or entry.swapped:
            return cls(entry.read())
        x, pages = entry.map()
        if hasattr(mmap, "MADV_RANDOM"):
            # With the default read-ahead a single row takes 100 times as long.
            pages.madvise(mmap.MADV_RANDOM)
        return cls(x, entry)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, in memory: reading many rows is faster than mapping them."""
        return self.x[start:stop] if self.entry is None else self.entry.rows(start, stop)


def read_array(data: bytes, name: str) -> Tensor:
    """The array in the bytes of a `.npy` file; `name` is for the error."""
    try:
        stream = io.BytesIO(data)
        array = np.load(stream, allow_pickle=False)
        if isinstance(array, np.ndarray) and stream.read(1):
            raise ValueError("there are more bytes than it has numbers")
    except Exception as error:  # numpy raises what its parser does
        if "Object arrays" in str(error):
            raise _no_numbers(name, "objects") from error
        raise _unreadable(name, error) from error
    if not isinstance(array, np.ndarray):
        raise Problem(f"Expected a .npy file, got {name}, which is an archive.")
    return to_tensor(array, name)


def to_tensor(array: np.ndarray, name: str) -> Tensor:
    """An array as a tensor, in the byte order of this processor; `name` is for the error."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise _no_numbers(name, array.dtype) from error


def is_dense(x: object) -> bool:
    """Whether it is a tensor whose rows can be read: not sparse, quantised or "meta"."""
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and not x.is_quantized
        and x.device.type != "meta"
    )


def _no_numbers(name: str, held: object) -> NoNumbers:
    return NoNumbers(
        f"{name} is no whole .npy file of numbers: it holds {held}. Leave it out, or save numbers."
    )


def _unreadable(name: str, error: Exception) -> Problem:
    return Problem(
        f"{name} is no whole .npy file of numbers ({first_line(error)}). Copy or write it again."
    )


def array_entry(path: Path, member: str | None = None) -> Entry | None:
    """Where the numbers of a `.npy` file, or of a `member` of a zip, lie; None if compressed.

    Raises a `Problem` if the file is not complete, `NoNumbers` if it holds text.
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
            one = version == (1, 0)
            form = np.lib.format
            read = form.read_array_header_1_0 if one else form.read_array_header_2_0
            shape, fortran, kind = read(file)
            start = file.tell()
    except Exception as error:  # numpy and zipfile raise what their parsers do
        raise _unreadable(name, error) from error
    dtype = to_tensor(np.empty(0, kind), name).dtype
    entry = Entry(path, shape, dtype, start, swapped=not kind.isnative)
    if min(shape, default=0) < 0:
        raise Problem(f"{name} is damaged: its header has the shape {shape}. Write it again.")
    if fortran and len(shape) > 1:
        raise Problem(f"{path} is in Fortran order. Save it again: np.ascontiguousarray(x).")
    if entry.start + entry.nbytes != end:
        cut = entry.start + entry.nbytes > end
        why = f"expected an array of shape {shape}, {entry.nbytes} bytes, got "
        why += f"{end - entry.start} bytes"
        raise Damaged.of(name, why, "truncated" if cut else "damaged")
    return entry


def save_arrays(path: Path, held: Tensor | dict[str, Tensor], sync: bool = True) -> None:
    """Writes a `.npy` file, or a `.npz` of several arrays, by `replace_file`; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:  # numpy adds a suffix to a name
            if isinstance(held, Tensor):
                np.save(stream, held.cpu().numpy())
            else:
                arrays: dict[str, Any] = {name: x.cpu().numpy() for name, x in held.items()}
                np.savez(stream, **arrays)

    replace_file(path, write, sync)


def check_zip(path: Path, of: Callable[[str], bool] = lambda name: True) -> bool:
    """Compares members of a zip, chosen by name, with their checksums; False if it is no zip.

    Raises a `Problem` that names what is damaged.
    """
    member = ""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            for member in filter(of, members_of(archive)):
                with archive.open(member) as stream:
                    while stream.read(2**20):
                        pass
    except Exception as error:  # zipfile raises what its parser does
        what = f"{member} in it" if member else "its directory"
        why = "does not match its checksum" if "Bad CRC" in str(error) else "cannot be read"
        raise Damaged.of(path, f"{what} {why} ({first_line(error)})") from error
    return True


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name; refuses a damaged directory."""
    found = {info.filename: info for info in archive.infolist()}
    # With a damaged length zipfile reads the following entries as a comment, without an error.
    if any(b"PK\x01\x02" in info.extra + info.comment for info in found.values()):
        raise Problem("its directory is damaged")
    return found


def outside(member: str) -> bool:
    r"""Whether the name of a zip's member points outside it: `../x`, `/x`, `C:\x`."""
    first, *others = re.split(r"[/\\]", member)
    return ".." in (first, *others) or not first or ":" in first


def local_header(header: bytes) -> int:
    """Length of the header before the data of a zip's member, from its first 30 bytes."""
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise Problem("the zip is damaged: a member is not where its directory says")
    name, extra = struct.unpack("<HH", header[26:30])
    return 30 + int(name) + int(extra)


def class_numbers(labels: Tensor, rows: int, name: str, path: Path) -> Tensor:
    """Labels of `rows` rows, (N,) or (N, 1) whole numbers of any type, as int64, (N,)."""
    expected = f"Expected {name} as {rows} integers, {name} of shape {(rows,)} in {path}, got"
    if labels.shape not in ((rows,), (rows, 1)):
        if labels.shape[:1] == (rows,) and is_one_hot(labels[:64].float()):
            raise Problem(
                f"{expected} one-hot rows, {tuple(labels.shape)}. Write their class numbers: "
                "labels.argmax(1)."
            )
        raise Problem(
            f"{expected} {labels.dtype} {tuple(labels.shape)}. Write one class number for each "
            "row, or leave them out."
        )
    numbers = labels.reshape(rows).to(torch.int64, copy=True)
    if labels.is_complex() or not torch.equal(numbers.to(labels.dtype), labels.reshape(rows)):
        raise Problem(f"{expected} {labels.dtype}. Write class numbers: labels.long().")
    return numbers


def require_labels(labels: Tensor, limit: int | None, path: Path) -> None:
    """Refuses labels, (N,), that are negative, or not below `limit`; names the first of them."""
    wrong = labels < 0 if limit is None else (labels < 0) | (labels >= limit)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        wanted = "of at least 0" if limit is None else f"in 0 to {limit - 1}"
        raise ValueError(
            f"Expected labels {wanted}, got {int(labels[row])} in row {row} of {path}, and "
            f"{int(wrong.sum())} such labels in all. Correct them"
            f"{'.' if limit is None else ', or num_classes.'}"
        )
