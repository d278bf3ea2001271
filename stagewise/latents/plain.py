"""One file with one array of latents, scaled already, and perhaps their labels.

latents.safetensors, latents.npz   `latents` (N, *), or the only floating-point array;
                                   `labels` (N,), or the only integers of that length
latents.pt                         the same as a dict, a tuple, or the array alone
latents.npy                        the array; labels in latents_labels.npy
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from stagewise.latents.base import Latents, Reading
from stagewise.latents.files import (
    Problem,
    Rows,
    array_entry,
    map_rows,
    replace_file,
    safetensors_entries,
)
from stagewise.latents.scaling import AS_STORED, Affine

__all__ = ["SUFFIXES", "Plain", "write_plain"]

SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth")


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
        return None if name is None else self._held(name).x.to(torch.int64, copy=True)

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
        entry = array_entry(path, member)
        if entry is not None:
            held[member[:-4]] = map_rows(path, entry)
            continue
        try:  # compressed: there is nothing to map
            with np.load(path, allow_pickle=False) as arrays:
                held[member[:-4]] = Rows(torch.from_numpy(arrays[member[:-4]]))
        except (ValueError, TypeError, zipfile.BadZipFile) as error:
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
    return {str(name): Rows(x) for name, x in found.items() if isinstance(x, Tensor)}


def _pick(path: Path, held: Mapping[str, Rows]) -> tuple[str, str | None]:
    """The names of the latents and of their labels."""
    tensors = {name: rows.x for name, rows in held.items()}
    arrays = [name for name, x in tensors.items() if x.is_floating_point() and x.ndim >= 2]
    if "latents" in arrays:
        arrays = ["latents"]
    if len(arrays) != 1:
        seen = {name: f"{x.dtype} {tuple(x.shape)}" for name, x in tensors.items()}
        raise ValueError(
            f"Expected one floating-point array (N, *) in {path}, or one called `latents`, got "
            f"{seen or 'no arrays'}."
        )
    rows = tensors[arrays[0]].shape[:1]
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    labels = [name for name, y in tensors.items() if y.shape == rows and y.dtype in whole]
    if "labels" in labels:
        labels = ["labels"]
    if "labels" in tensors and not labels:
        raise ValueError(
            f"Expected `labels` as {rows[0]} integers in {path}, got "
            f"{tensors['labels'].dtype} {tuple(tensors['labels'].shape)}."
        )
    return arrays[0], labels[0] if len(labels) == 1 else None


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
