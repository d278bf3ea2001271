"""One file with one array of latents, scaled already, and perhaps their labels.

latents.safetensors, latents.npz   `latents` (N, *), or the only floating-point array;
                                   `labels` (N,) or (N, 1), or the only integers of that length
latents.pt                         the same as a dict, a tuple, or the array alone
latents.npy                        the array; labels in latents_labels.npy
"""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from stagewise.latents.base import Latents, Reading
from stagewise.latents.checking import class_numbers, is_one_hot
from stagewise.latents.files import (
    NoNumbers,
    Problem,
    Rows,
    array_entry,
    map_rows,
    read_array,
    replace_file,
    safetensors_entries,
)
from stagewise.latents.scaling import AS_STORED, Affine

__all__ = ["SUFFIXES", "Plain", "write_plain"]

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth")

_NAMES = ("latents", "labels")
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_WHOLE = (*_SIGNED, torch.uint64, torch.uint32, torch.uint16, torch.uint8)


class Plain(Latents):
    """One array in one file.

    Args:
        path: The file.
        reading: How to read.
    """

    name = "plain"

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        held = _tensors(path)
        self._name, self._label_name = _pick(path, held)
        x = held[self._name].x
        self._rows, self.shape, self.dtype = len(x), tuple(x.shape[1:]), x.dtype
        self.scaling = (
            AS_STORED if reading.multiplier is None else Affine((float(reading.multiplier),))
        )
        self._prepare()
        self._stored_labels()

    def _held(self, name: str) -> Rows:
        return self._handle("tensors", lambda: _tensors(self.path))[name]

    def _count(self) -> int:
        return self._rows

    def _read(self, row: int, flip: bool) -> Tensor:
        return self._held(self._name).x[row]

    def _read_block(self, start: int, stop: int, flip: bool) -> Tensor:
        return self._held(self._name).block(start, stop)

    def _read_labels(self) -> Tensor | None:
        name = self._label_name
        if name is None:
            return None
        return class_numbers(self._held(name).x, self._rows, f"`{name}`", self.path)

    def _parts(self) -> str:
        return f"one array, {self._name!r}"

    def _cure(self, large: bool) -> str:
        if large:
            return (
                "A plain file is taken as scaled; these rows are not: normalise them, or "
                "multiplier=0.18215 if they come from Stable Diffusion's autoencoder. "
            )
        return "They may have been scaled twice. multiplier=... undoes it. "


def _tensors(path: Path) -> dict[str, Rows]:
    """What the file holds, mapped where it can be."""
    if path.suffix == ".safetensors":
        entries = safetensors_entries(path)
        return {name: map_rows(path, entry) for name, entry in entries.items()}
    if path.suffix == ".npy":
        entry = array_entry(path)
        assert entry is not None
        held = {"latents": map_rows(path, entry)}
        beside = path.with_name(f"{path.stem}_labels.npy")
        if beside.is_file():
            entry = array_entry(beside)
            assert entry is not None
            held["labels"] = map_rows(beside, entry)
        return held
    return _archive(path) if path.suffix == ".npz" else _pickled(path)


def _archive(path: Path) -> dict[str, Rows]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
        raise Problem(f"{path} is no whole .npz ({error}). Copy or write it again.") from error
    held = {}
    for member in members:
        name = member[:-4]
        try:
            entry = array_entry(path, member)
            if entry is not None:
                held[name] = map_rows(path, entry)
                continue
            # Compressed: there is nothing to map.
            with zipfile.ZipFile(path) as archive:
                held[name] = Rows(read_array(archive.read(member), f"{member} in {path}"))
        except NoNumbers:
            if name in _NAMES:
                raise
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise Problem(f"{path}: {member} cannot be read ({error}).") from error
    return held


def _pickled(path: Path) -> dict[str, Rows]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise Problem(
            f"{path} cannot be read as a file of tensors ({str(error).splitlines()[0][:120]}). "
            "Save a tensor, or a dict of tensors, with torch.save."
        ) from error
    if isinstance(found, Tensor):
        found = {"latents": found}
    elif isinstance(found, (tuple, list)):
        found = {str(at): value for at, value in enumerate(found)}
    elif not isinstance(found, Mapping):
        found = {}
    return {str(name): Rows(x.detach()) for name, x in found.items() if isinstance(x, Tensor)}


def _pick(path: Path, held: Mapping[str, Rows]) -> tuple[str, str | None]:
    """The names of the latents and of their labels."""
    # Sparse and quantised tensors, and those without numbers ("meta"), have no rows to read.
    dense = {name: r.x for name, r in held.items() if _is_plain(r.x)}
    arrays = [name for name, x in dense.items() if x.is_floating_point() and x.ndim >= 2]
    if "latents" in held:
        arrays = [name for name in arrays if name == "latents"]
    if len(arrays) != 1:
        seen = {name: _described(rows.x) for name, rows in held.items()}
        raise ValueError(
            f"Expected one floating-point array (N, *) in {path}, or one called `latents`, got "
            f"{seen or 'no arrays'}. Write the array under that name"
            f"{', dense: x.to_dense()' if len(dense) < len(held) else ''}."
        )
    rows = dense[arrays[0]].shape[0]
    if "labels" in held:
        labels = held["labels"].x
        if not _is_plain(labels):
            raise ValueError(
                f"Expected `labels` as {rows} integers in {path}, got {_described(labels)}. Save "
                "labels.to_dense()."
            )
        class_numbers(labels, rows, "`labels`", path)
        return arrays[0], "labels"
    labels_ = [
        name for name, y in dense.items() if y.shape in ((rows,), (rows, 1)) and y.dtype in _WHOLE
    ]
    if len(labels_) > 1:
        warnings.warn(
            f"{path} is read without labels: any of {labels_} may be them. Call them `labels`.",
            stacklevel=2,
        )
    for name, y in dense.items():
        if not labels_ and name != arrays[0] and is_one_hot(y, rows):
            class_numbers(y, rows, f"`{name}`", path)
    return arrays[0], labels_[0] if len(labels_) == 1 else None


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_quantized and x.device.type != "meta"


def _described(x: Tensor) -> str:
    layout = "" if x.layout == torch.strided else f"{str(x.layout).removeprefix('torch.')} "
    return f"{layout}{x.dtype} {tuple(x.shape)}"


def write_plain(
    path: str | os.PathLike[str], latents: Tensor, labels: Tensor | None = None
) -> Path:
    """Writes one file, in one step, by its ending.

    Args:
        path: Ends with `.safetensors`, `.npy`, `.npz` or `.pt`.
        latents: (N, *).
        labels: (N,), default None. Those of a `.npy` file go to `<name>_labels.npy`.

    Returns:
        The path.
    """
    path = Path(path)
    held = {"latents": latents.contiguous()}
    if labels is not None:
        held["labels"] = labels.contiguous()
    arrays = {name: value.numpy() for name, value in held.items()} if ".np" in path.suffix else {}

    def write(file: Path) -> None:
        if path.suffix == ".safetensors":
            save_file(held, file)
            return
        with open(file, "wb") as stream:  # by name, numpy would add its own ending
            if path.suffix == ".npy":
                np.save(stream, arrays["latents"])
            elif path.suffix == ".npz":
                np.savez(stream, allow_pickle=False, **arrays)
            else:
                torch.save(held, stream)

    if path.suffix not in SUFFIXES:
        raise ValueError(f"Expected a name that ends with one of {SUFFIXES}, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)
    if path.suffix == ".npy" and labels is not None:
        beside = path.with_name(f"{path.stem}_labels.npy")

        def write_labels(file: Path) -> None:
            with open(file, "wb") as stream:
                np.save(stream, arrays["labels"])

        replace_file(beside, write_labels)
    return path
