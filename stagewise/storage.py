"""A bank as a file: one safetensors file, of which only the rows are not read when it is opened.

    8 bytes        length of the header
    header         JSON: where each tensor is; what the bank is, as strings
    offset, centre (D,); sq_norms, keys, index (N,); classes, starts, stops (C,)   64-bit each
    rows           (N, D), as stored, from a page boundary to the end

The header is padded with spaces, as the format allows, so that the rows begin at a page boundary:
a mapping of them is then aligned for every instruction, and what comes before has its place before
the first row is written. A file is written under another name beside its own and renamed when it
is complete and on the disk: whoever is killed leaves a `.NAME.….partial`, never half a bank, and a
bank that was opened from an older file keeps that.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagewise.keys import digest
from stagewise.memory import format_bytes
from stagewise.streaming import MappedFile

__all__ = ["BankFile", "Draft", "Entry", "draft", "read", "read_header"]

FilePath: TypeAlias = "str | os.PathLike[str]"

_VERSION = 1
_PAGE = 4096
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_READ = {
    **{name: dtype for dtype, name in _TYPES.items()},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
}
_NEEDED = ("rows", "offset", "centre", "sq_norms", "keys")

_LENGTH = ("not fully covered", "MetadataIncompleteBuffer")
"""What the library says of a sound header before data of another length; its older versions, too.
"""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        start: Where its numbers begin, in bytes from the start of the file.
        swapped: Whether its bytes stand in the order of other processors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return math.prod(self.shape) * self.dtype.itemsize


_NO_CLASSES = Entry((0,), torch.int64, 0)


@dataclass(frozen=True)
class BankFile:
    """What a file holds.

    Attributes:
        rows: The rows, (N, D), mapped and read-only: writing to them ends the process.
        file: The mapping.
        tensors: Everything else, by name.
        shape: Shape of a sample.
        fingerprint: Of the bank that was saved.
    """

    rows: Tensor
    file: MappedFile
    tensors: dict[str, Tensor]
    shape: tuple[int, ...]
    fingerprint: str


@dataclass(frozen=True)
class Draft:
    """A file that is being written.

    Attributes:
        rows: Its rows, (N, D), mapped: what is assigned to them goes to the file.
    """

    rows: Tensor
    _pages: mmap.mmap
    _header: dict[str, Any]
    _data: int

    def finish(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Writes everything but the rows.

        Args:
            tensors: The other tensors of the file, by name.
            metadata: What the bank is.
        """
        for name, tensor in tensors.items():
            first, last = (self._data + end for end in self._header[name]["data_offsets"])
            self._pages[first:last] = tensor.cpu().numpy().tobytes()
        about = {"format": "pt", "stagewise_bank": str(_VERSION), **metadata}
        text = json.dumps({"__metadata__": about, **self._header}).encode()
        assert len(text) <= self._data - 8, "the space left for the header is far above its size"
        self._pages[: self._data] = (self._data - 8).to_bytes(8, "little") + text.ljust(
            self._data - 8
        )


@contextmanager
def draft(
    path: FilePath, num_rows: int, dim: int, dtype: torch.dtype, num_classes: int = 0
) -> Iterator[Draft]:
    """A new file for a bank; it has its name when the block is left without an error.

    Args:
        path: Its name. A file that is there already is replaced.
        num_rows: N.
        dim: D.
        dtype: How rows are stored.
        num_classes: C; 0 without labels.

    Yields:
        The draft; its `finish` must be called.

    Raises:
        OSError: If the disk has no room for it, or the folder does not exist.
    """
    path = Path(path)
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in _layout(num_rows, dim, dtype, num_classes).items():
        begin, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _TYPES[kind], "shape": shape, "data_offsets": (begin, end)}
    # At least a page for the header, which takes about a quarter of it.
    data = _PAGE + -begin % _PAGE
    _require_disk(path.parent, data + end)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "x+b") as file:
            if hasattr(os, "posix_fallocate"):
                # A hole that the disk cannot fill later would end the process.
                os.posix_fallocate(file.fileno(), 0, data + end)
            else:
                file.truncate(data + end)
            pages = mmap.mmap(file.fileno(), data + end)
            flat = torch.frombuffer(pages, dtype=dtype, count=num_rows * dim, offset=data + begin)
            yield Draft(flat.view(num_rows, dim), pages, header, data)
            pages.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _layout(
    num_rows: int, dim: int, dtype: torch.dtype, num_classes: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor in the file of a bank, in order."""
    n, d, c = (num_rows,), (dim,), (num_classes,)
    wide, whole = torch.float64, torch.int64
    layout = {"offset": (wide, d), "centre": (wide, d), "sq_norms": (wide, n), "keys": (whole, n)}
    if num_classes:
        layout |= {"index": (whole, n), "classes": (whole, c)}
        layout |= {"starts": (whole, c), "stops": (whole, c)}
    return {**layout, "rows": (dtype, n + d)}


def _require_disk(folder: Path, need: int) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder for the bank, got {folder}, which is none.")
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"The bank needs {format_bytes(need)} on disk, and {format_bytes(free)} are free in "
            f"{folder}. Make room, choose another folder, or store it as dtype=torch.bfloat16."
        )


def read(path: FilePath) -> BankFile:
    """Opens a file without reading its rows.

    Args:
        path: Its name.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no bank, not complete, or of a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the file of a bank, got {path}, which is none. "
            "LatentBank.save(path) and LatentBank.write(path, ...) make one."
        )
    entries, about = read_header(path)
    missing = [name for name in _NEEDED if name not in entries]
    if missing or "stagewise_bank" not in about:
        raise ValueError(
            f"Expected the file of a bank, got {path}, a safetensors file with {sorted(entries)} "
            f"and without {missing or 'what a bank says about itself'}. To make a bank of its "
            "tensors: LatentBank(x, labels).save(path)."
        )
    version = about["stagewise_bank"][:20]
    if version != str(_VERSION):
        raise ValueError(
            f"{path} was written by a later version of stagewise (file version {version}, known up "
            f"to {_VERSION}). Update stagewise."
        )
    rows, num_classes = entries["rows"], math.prod(entries.get("classes", _NO_CLASSES).shape)
    layout = _layout(*rows.shape, rows.dtype, num_classes) if len(rows.shape) == 2 else {}
    held = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if held != layout or not rows.dtype.is_floating_point:
        raise _damaged(path, f"expected the tensors of a bank, got {held}")
    # The library's reader for numpy copies what is asked for; that for torch would map the file
    # once more, with room for changes.
    with safe_open(path, framework="np") as file:
        tensors = {
            name: torch.from_numpy(file.get_tensor(name)) for name in entries if name != "rows"
        }
    shape = _sample_shape(about.get("shape", ""))
    columns = [tensors[name].tolist() for name in ("classes", "starts", "stops") if num_classes]
    ends = list(zip(*columns, strict=True))
    fingerprint = digest(tensors["keys"], tensors["offset"], rows.dtype, shape, ends)
    if fingerprint != about.get("fingerprint"):
        raise _damaged(path, "what it says it holds and what it holds have other fingerprints")
    index = tensors.get("index", torch.arange(1))
    if not (tensors["sq_norms"] >= 0).all() or index.amin() < 0 or index.amax() >= rows.shape[0]:
        raise _damaged(path, "distances are negative, or positions are out of range")
    with open(path, "rb") as stream:
        # Private pages with room for changes would count as memory, and a file larger than that
        # could not be opened.
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(
            pages, dtype=rows.dtype, count=math.prod(rows.shape), offset=rows.start
        )
    file = MappedFile(pages, rows.start)
    return BankFile(flat.view(rows.shape), file, tensors, shape, fingerprint)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, once the library has accepted them.

    Args:
        path: Its name.

    Returns:
        The tensors by name, without those of types that torch cannot read; and the metadata.

    Raises:
        ValueError: If it is no such file, or not all of it is there.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        end = data = 8 + int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            raise ValueError(
                f"Expected a safetensors file, got {path}, which does not begin as one."
            )
    header: dict[str, Any] = {}
    about: dict[str, Any] = {}
    cut = data > size
    if not cut:
        try:
            # Offsets, shapes and types are checked here, so that what is read below is sound.
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            cut = any(words in str(error) for words in _LENGTH)
            if not cut:
                kind = "its header is no JSON of tensors: " if "JSON" in str(error) else ""
                raise _damaged(path, f"{kind}{error}") from error
        with open(path, "rb") as file:
            file.seek(8)
            header = json.loads(file.read(data - 8))
        about = header.pop("__metadata__", None) or {}
        end = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if cut:
        raise ValueError(
            f"{path} is {'not complete' if size < end else 'damaged'}: {end} bytes were announced, "
            f"{size} are there. Copy or write it again."
        )
    entries = {
        name: Entry(tuple(entry["shape"]), _READ[entry["dtype"]], data + entry["data_offsets"][0])
        for name, entry in header.items()
        if entry["dtype"] in _READ
    }
    return entries, about


def _sample_shape(text: str) -> tuple[int, ...]:
    """The shape that a file gives; empty if it is none, which no fingerprint is of."""
    try:
        return tuple(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return ()


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}. Copy or write it again.")
