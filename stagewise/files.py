"""Files: one writer that leaves no half-written file, and one reader of safetensors headers.

The library checks a safetensors file (`safe_open`). Its header is then read again here, because
only this tells where a tensor lies, so that it can be mapped read-only: the library's reader for
torch maps a file with room for changes, which the system refuses for one larger than its memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "Entry",
    "FilePath",
    "Problem",
    "first_line",
    "is_computed",
    "jsonable",
    "map_file",
    "map_tensor",
    "names",
    "read_header",
    "read_metadata",
    "read_tensor",
    "replace_file",
    "write_tensors",
]

FilePath: TypeAlias = "str | os.PathLike[str]"

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}

_LENGTH = ("not fully covered", "MetadataIncompleteBuffer")
"""What the library says of a sound header before data of another length; its older versions, too.
"""


class Problem(ValueError):
    """A file that cannot be used."""


# -- writing ----------------------------------------------------------------------------------


def replace_file(path: FilePath, write: Callable[[Path], object], sync: bool = True) -> None:
    """Writes a file under another name beside its own, and renames it when it is complete.

    There is never half a file at `path`; a process that is killed leaves `.NAME.….partial`.

    Args:
        path: The file, which may be there already.
        write: Writes the file whose name it is given.
        sync: Whether to wait until it is on the disk, default True.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(partial)
        if sync:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_tensors(path: FilePath, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes a safetensors file with metadata, by `replace_file`."""
    replace_file(path, lambda file: save_file(tensors, file, about))


# -- safetensors ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its shape and type, and its first byte, from the start of the file.

    `swapped` says that its bytes stand in the order of other processors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: FilePath) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, once the library has accepted them.

    Tensors of types that torch cannot read are left out. Raises a `Problem` if it is no such file,
    or not all of it is there.
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
                    raise Problem(
                        f"{path} is damaged: {kind}{error}. Copy or write it again."
                    ) from error
            file.seek(8)
            header = json.loads(file.read(data - 8))
    about = header.pop("__metadata__", None) or {}
    if cut:
        end = data + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        raise Problem(
            f"{path} is {'truncated' if size < end else 'damaged'}: {end} bytes were announced, "
            f"{size} are there. Copy or write it again."
        )
    entries = {
        name: Entry(tuple(entry["shape"]), _DTYPES[entry["dtype"]], data + entry["data_offsets"][0])
        for name, entry in header.items()
        if entry["dtype"] in _DTYPES
    }
    return entries, about


def map_file(path: FilePath) -> mmap.mmap:
    """The pages of a file, read-only."""
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def map_tensor(path: FilePath, entry: Entry) -> tuple[Tensor, mmap.mmap]:
    """A tensor of a file and the pages it lies in; to write to it ends the process."""
    pages = map_file(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(
            pages, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.start
        )
    return flat.view(entry.shape), pages


def read_tensor(path: FilePath, entry: Entry) -> Tensor:
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


# -- what was computed for a bank once and is kept ---------------------------------------------


def read_metadata(path: FilePath, kind: str, name: str) -> dict[str, str]:
    """The metadata of a safetensors file, whose "format" must be `kind`.

    `name` is what it should be, for the message: "certificate".
    """
    try:
        about = read_header(path)[1]
    except Problem:
        about = {}
    if about.get("format") != kind:
        raise ValueError(
            f"Expected a {name} in {os.fspath(path)}, got another file. Choose another path."
        )
    return about


def is_computed(path: FilePath, wanted: dict[str, str], name: str) -> bool:
    """Whether there is a file with the metadata asked for; warns if they are others.

    Refuses a file of another "format"; "fingerprint" is that of the bank.
    """
    if not os.path.exists(path):
        return False
    found = read_metadata(path, wanted["format"], name)
    if found == wanted:
        return True
    kind = "other settings" if found["fingerprint"] == wanted["fingerprint"] else "other latents"
    other = [f"{key} {found.get(key)}" for key in wanted if found.get(key) != wanted[key]]
    warnings.warn(
        f"The {name} in {os.fspath(path)} belongs to {kind} ({', '.join(other)}): it is computed "
        "again and replaced.",
        stacklevel=3,
    )
    return False


# -- words and numbers ------------------------------------------------------------------------


def names(paths: Iterable[object], most: int = 5) -> str:
    """A few names for a message, and how many more there are."""
    listed = [str(path) for path in paths]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def first_line(error: Exception) -> str:
    """The beginning of what another library's error says."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def jsonable(value: Any) -> Any:
    """The same with NaN and infinities, which JSON does not know, as None, and tuples as lists."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
