"""Safetensors files: one writer, and one reader of headers.

The library checks a file (`safe_open`). The header is then read again here for the position of each
tensor, to map it read-only: the library's reader for torch maps a file with room for changes, which
the system refuses for files larger than its memory.

Files written here have checksums in their metadata, one for the header and one for each tensor. The
header's is compared when a file is opened, a tensor's when it is read into memory; mapped tensors
are compared by `check_tensor` only, which reads all of them.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagewise.files import Damaged, FilePath, Problem, replace_file

__all__ = [
    "Entry",
    "check_tensor",
    "is_computed",
    "map_file",
    "map_tensor",
    "pack_header",
    "read_computed",
    "read_header",
    "read_metadata",
    "read_tensor",
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
    end, header, sums = 0, {}, {}
    for name, tensor in data.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        sums[name] = zlib.crc32(_bytes(tensor))
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
    """A tensor in a file: its shape, type and first byte, counted from the start of the file.

    `swapped`: its numbers have the opposite byte order. `name`: its key in the file. `crc32`: its
    checksum, if the file has one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    swapped: bool = False
    name: str = ""
    crc32: int | None = None

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: FilePath) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, after the library's checks.

    Tensors of types that torch cannot read are left out. Raises a `Problem` if it is another kind
    of file, is incomplete, or does not match its checksum.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        if file.read(1) != b"{":
            raise Problem(f"Expected a safetensors file, got {path}, which does not begin as one.")
        cut = data > size
        header: dict[str, Any] = {}
        if not cut:
            try:
                with safe_open(path, framework="np"):
                    pass
            except SafetensorError as error:
                cut = any(words in str(error) for words in _LENGTH)
                if not cut:
                    kind = "its header is no JSON of tensors: " if "JSON" in str(error) else ""
                    raise Damaged.of(path, f"{kind}{error}") from error
            file.seek(8)
            header = json.loads(file.read(data - 8))
    sums: dict[str, int] = {}
    if not cut:
        sums = _checksums(path, header)
    about = header.pop("__metadata__", None) or {}
    about.pop(_SUMS, None)
    if cut:
        end = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        kind = "truncated" if size < end else "damaged"
        raise Damaged.of(path, f"{end} bytes were announced, {size} are there", kind)
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] in _DTYPES:
            shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            start = data + entry["data_offsets"][0]
            entries[name] = Entry(shape, dtype, start, name=name, crc32=sums.get(name))
    return entries, about


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


def check_tensor(path: FilePath, entry: Entry) -> bool:
    """Reads a tensor and compares its checksum; False if there is none, `Damaged` if it differs."""
    if entry.crc32 is None:
        return False
    found, left = 0, entry.nbytes
    with open(path, "rb") as stream:
        stream.seek(entry.start)
        while left and (block := stream.read(min(_BLOCK, left))):
            found, left = zlib.crc32(block, found), left - len(block)
    if left or found != entry.crc32:
        raise Damaged.of(path, f"`{entry.name}` does not match its checksum")
    return True


def map_file(path: FilePath) -> mmap.mmap:
    """The pages of a file, read-only."""
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def map_tensor(path: FilePath, entry: Entry) -> tuple[Tensor, mmap.mmap]:
    """A tensor of a file and its pages; writing to it ends the process."""
    pages = map_file(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(
            pages, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.start
        )
    return flat.view(entry.shape), pages


def read_tensor(path: FilePath, entry: Entry) -> Tensor:
    """A tensor of a file, in memory: faster than a mapping for few numbers."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    with open(path, "rb") as stream:
        stream.seek(entry.start)
        data = bytearray(entry.nbytes)
        if stream.readinto(data) != entry.nbytes:
            raise Problem(f"{path} has become shorter since it was opened. Copy it again.")
    if entry.crc32 is not None and zlib.crc32(data) != entry.crc32:
        raise Damaged.of(path, f"`{entry.name}` does not match its checksum")
    if entry.swapped:
        size = entry.dtype.itemsize
        data = bytearray(np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1].tobytes())
    return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)


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
            found.append(read_tensor(path, has))
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
