"""Safetensors files: one writer, and one reader of headers.

The library checks a file (`safe_open`). The header is then read again here for the position of each
tensor, to map it read-only: the library's reader for torch maps a file with room for changes, which
the system refuses for files larger than its memory.

Files written here have checksums in their metadata, one for the header and one for each tensor. The
header's is compared when a file is opened, a tensor's when it is read into memory; mapped tensors
are compared by `Entry.verify` only, which reads all of them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagewise.files import Damaged, FilePath, Problem, replace_file

__all__ = [
    "Entry",
    "is_computed",
    "lay_out",
    "map_file",
    "pack_header",
    "read_computed",
    "read_header",
    "read_metadata",
    "write_tensors",
]

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_LENGTH = ("not fully covered", "MetadataIncompleteBuffer")
"""Messages of the library, also of older versions, for a valid header before data of wrong length.
"""

_SUMS = "stagewise_crc32"
"""The key of the checksums in the metadata."""

_FORM = re.compile(r"[0-9a-f]{8} \{.*\}")
_BLOCK = 2**22


# -- writing ----------------------------------------------------------------------------------


def write_tensors(path: FilePath, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes a safetensors file with metadata and checksums, by `replace_file`.

    Not by the library, which gives a file the permissions of a temporary one, and leaves that
    behind when it is killed.
    """
    # The widest types first: then each tensor begins at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    data = {name: tensors[name].detach().cpu().contiguous() for name in order}
    header, _ = lay_out({name: (tensor.dtype, tensor.shape) for name, tensor in data.items()})
    sums = {name: zlib.crc32(_bytes(tensor)) for name, tensor in data.items()}
    text = pack_header(header, about, sums)
    text = text.ljust(len(text) + -len(text) % 8)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in data.values():
                file.write(_bytes(tensor))

    replace_file(path, write)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[dict[str, Any], int]:
    """The header of tensors of these types and shapes, one after the other, and their bytes."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        place = {"shape": list(shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": _NAMES[dtype], **place}
    return header, end


def pack_header(header: dict[str, Any], about: dict[str, str], sums: dict[str, int]) -> bytes:
    """The bytes of a header, with metadata and the checksums of the tensors."""
    whole = {"__metadata__": dict(about), **header}
    text = json.dumps(sums)
    whole["__metadata__"][_SUMS] = f"{_header_sum(whole, text):08x} {text}"
    return json.dumps(whole).encode()


def _header_sum(header: dict[str, Any], sums: str) -> int:
    """The checksum of a header without its checksums entry, together with `sums`."""
    about = {key: value for key, value in header["__metadata__"].items() if key != _SUMS}
    text = json.dumps([{**header, "__metadata__": about}, sums], sort_keys=True)
    return zlib.crc32(text.encode())


# -- safetensors ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # its first byte, from the start of the file
    swapped: bool = False  # the opposite byte order
    name: str = ""  # its key in the file
    crc32: int | None = None  # its checksum, if the file has one

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def verify(self) -> bool:
        """Reads it and compares its checksum, or raises `Damaged`; False if there is none."""
        if self.crc32 is None:
            return False
        found, left = 0, self.nbytes
        with open(self.path, "rb") as stream:
            stream.seek(self.start)
            while left and (block := stream.read(min(_BLOCK, left))):
                found, left = zlib.crc32(block, found), left - len(block)
        self._require(not left and found == self.crc32)
        return True

    def map(self) -> tuple[Tensor, mmap.mmap]:
        """The tensor and its pages; writing to it ends the process."""
        pages = map_file(self.path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(
                pages, dtype=self.dtype, count=math.prod(self.shape), offset=self.start
            )
        return flat.view(self.shape), pages

    def read(self) -> Tensor:
        """The tensor in memory: faster than a mapping for few numbers."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        with open(self.path, "rb") as stream:
            stream.seek(self.start)
            data = bytearray(self.nbytes)
            if stream.readinto(data) != self.nbytes:
                raise Problem(f"{self.path} has become shorter since it was opened. Copy it again.")
        self._require(self.crc32 is None or zlib.crc32(data) == self.crc32)
        if self.swapped:
            size = self.dtype.itemsize
            data = bytearray(np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1].tobytes())
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, in memory, without a comparison."""
        shape = (stop - start, *self.shape[1:])
        before = start * math.prod(shape[1:]) * self.dtype.itemsize
        return replace(self, shape=shape, start=self.start + before, crc32=None).read()

    def _require(self, alike: bool) -> None:
        if not alike:
            raise Damaged.of(self.path, f"`{self.name}` does not match its checksum")


def read_header(path: FilePath) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, after the library's checks.

    Tensors of types that torch cannot read are left out. Raises a `Problem` if it is another kind
    of file, is incomplete, or does not match its checksum.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            raise Problem(f"Expected a safetensors file, got {path}, which does not begin as one.")
        if data > size:
            raise _cut(path, data, size)
        file.seek(8)
        text = file.read(data - 8)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        if any(words in str(error) for words in _LENGTH):
            held = {**json.loads(text), "__metadata__": {"data_offsets": (0, 0)}}
            end = data + max(entry["data_offsets"][1] for entry in held.values())
            raise _cut(path, end, size) from error
        kind = "its header is no JSON of tensors: " if "JSON" in str(error) else ""
        raise Damaged.of(path, f"{kind}{error}") from error
    header: dict[str, Any] = json.loads(text)
    sums = _checksums(path, header)
    about = header.pop("__metadata__", None) or {}
    about.pop(_SUMS, None)
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] in _DTYPES:
            shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            start = data + entry["data_offsets"][0]
            entries[name] = Entry(path, shape, dtype, start, name=name, crc32=sums.get(name))
    return entries, about


def _cut(path: Path, end: int, size: int) -> Damaged:
    kind = "truncated" if size < end else "damaged"
    return Damaged.of(path, f"{end} bytes were announced, {size} are there", kind)


def _checksums(path: FilePath, header: dict[str, Any]) -> dict[str, int]:
    """The checksums of the tensors, after the check of the header; none in other files."""
    about = header.get("__metadata__") or {}
    # Found by their form too: then a flipped bit in the name does not hide them.
    if not any(name == _SUMS or _FORM.fullmatch(value) for name, value in about.items()):
        return {}
    own, _, text = about.get(_SUMS, "").partition(" ")
    if own != f"{_header_sum(header, text):08x}":
        raise Damaged.of(path, "its header does not match its checksum")
    return dict(json.loads(text))


def map_file(path: FilePath) -> mmap.mmap:
    """The pages of a file, read-only."""
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


# -- results that are computed once for a bank and kept -----------------------------------------


def read_metadata(path: FilePath, kind: str, name: str) -> dict[str, str]:
    """The metadata of a safetensors file, whose "format" must be `kind`; `name` is for messages."""
    with _or_deleted(name):
        try:
            about = read_header(path)[1]
        except Damaged:
            raise
        except Problem:
            about = {}
    if about.get("format") != kind:
        raise ValueError(
            f"Expected a {name} in {os.fspath(path)}, got another file. Choose another path."
        )
    return about


def is_computed(path: FilePath, wanted: dict[str, str], name: str) -> bool:
    """Whether there is a file with the `wanted` metadata; warns if it has others.

    Refuses a file of another "format", and a folder that is missing.
    """
    if not os.path.exists(path):
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"Expected a folder for the {name} in {os.fspath(path)}, got none at {folder}. "
                f"Make it first: os.makedirs({folder!r})."
            )
        return False
    found = read_metadata(path, wanted["format"], name)
    if found == wanted:
        return True
    same = found.get("fingerprint") == wanted["fingerprint"]
    kind = "other settings" if same else "other latents"
    other = [f"{key} {found.get(key)}" for key in wanted if found.get(key) != wanted[key]]
    warnings.warn(
        f"The {name} in {os.fspath(path)} belongs to {kind} ({', '.join(other)}): it is computed "
        "again and replaced.",
        stacklevel=3,
    )
    return False


def read_computed(
    path: FilePath, wanted: Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]], name: str
) -> list[Tensor]:
    """Tensors of a file, by name, of a type and a shape, in which None is any length."""
    with _or_deleted(name):
        entries, found = read_header(path)[0], []
        for key, (dtype, shape) in wanted.items():
            has = entries.get(key)
            if has is None or has.dtype != dtype or not _fits(has.shape, shape):
                raise Damaged.of(path, f"there is no `{key}` of {dtype} and shape {shape}")
            found.append(has.read())
    return found


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    sizes = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(size in (None, n) for n, size in sizes)


@contextmanager
def _or_deleted(name: str) -> Iterator[None]:
    try:
        yield
    except Damaged as error:
        words = f"{error} Or delete it: then the {name} is computed again."
        raise Problem(words) from error
