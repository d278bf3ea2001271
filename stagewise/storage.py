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

from stagewise.memory import format_bytes
from stagewise.streaming import MappedFile

__all__ = ["BankFile", "Draft", "draft", "read"]

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
_NEEDED = ("rows", "offset", "centre", "sq_norms", "keys")


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
    n, d, c = (num_rows,), (dim,), (num_classes,)
    wide, whole = torch.float64, torch.int64
    layout = {"offset": (wide, d), "centre": (wide, d), "sq_norms": (wide, n), "keys": (whole, n)}
    if num_classes:
        layout |= {"index": (whole, n), "classes": (whole, c)}
        layout |= {"starts": (whole, c), "stops": (whole, c)}
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in {**layout, "rows": (dtype, n + d)}.items():
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
    header, data = _header(path)
    missing = [name for name in _NEEDED if name not in header]
    about = header.get("__metadata__", {})
    if missing or "stagewise_bank" not in about:
        held = sorted(name for name in header if name != "__metadata__")
        raise ValueError(
            f"Expected the file of a bank, got {path}, a safetensors file with {held} and without "
            f"{missing or 'what a bank says about itself'}. To make a bank of its tensors: "
            "LatentBank(x, labels).save(path)."
        )
    if int(about["stagewise_bank"]) > _VERSION:
        raise ValueError(
            f"{path} was written by a later version of stagewise (file version "
            f"{about['stagewise_bank']}, known up to {_VERSION}). Update stagewise."
        )
    # safe_open has checked that each tensor is as long as its shape says. Its reader for numpy
    # copies what is asked for; that for torch would map the file once more, with room for changes.
    try:
        with safe_open(path, framework="np") as file:
            tensors = {
                name: torch.from_numpy(file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118 - not a mapping
                if name != "rows"
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Write it again.") from error
    rows = header["rows"]
    kind = {name: dtype for dtype, name in _TYPES.items()}[rows["dtype"]]
    start = data + rows["data_offsets"][0]
    with open(path, "rb") as stream:
        # Private pages with room for changes would count as memory, and a file larger than that
        # could not be opened.
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(pages, dtype=kind, count=math.prod(rows["shape"]), offset=start)
    return BankFile(
        flat.view(rows["shape"]),
        MappedFile(pages, start),
        tensors,
        tuple(json.loads(about["shape"])),
        about["fingerprint"],
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the data behind it begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(data - 8) if data <= size else file.read(1)
    if not text.startswith(b"{"):
        raise ValueError(f"Expected a safetensors file, got {path}, which does not begin as one.")
    try:
        header: dict[str, Any] = json.loads(text) if data <= size else {}
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file: its header is no JSON.") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    full = data + max(ends, default=0)
    if size < full:
        raise ValueError(
            f"{path} is not complete: {full} bytes were announced, {size} are there. Copy or write "
            "it again."
        )
    return header, data
