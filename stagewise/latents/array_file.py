"""One file with one array of latents, already scaled, and optionally their labels.

latents.safetensors, latents.npz   `latents` (N, *), or the only floating-point array;
                                   `labels` (N,) or (N, 1), or the only integers of that length
latents.pt                         a dict of these, a tuple, or the array alone
latents.npy                        the array; labels in latents_labels.npy
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.batches import is_one_hot
from stagewise.files import Problem, first_line, replace_file
from stagewise.latents.arrays import (
    NoNumbers,
    Rows,
    array_entry,
    check_zip,
    class_numbers,
    is_dense,
    members_of,
    outside,
    read_array,
    save_arrays,
)
from stagewise.latents.base import Block, Latents, Reading, Writing
from stagewise.latents.checksums import (
    Compared,
    compare_files,
    compare_tensors,
    compare_zip,
    write_checksums,
)
from stagewise.tensor_files import read_header, write_tensors

__all__ = ["ArrayFile"]

_SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth")
_WHOLE = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


class ArrayFile(Latents):
    """One array in one file."""

    name = "plain"
    looks_like = "one file: .safetensors, .npy, .npz or .pt"
    is_file = True
    takes_multiplier = True
    scales = {"sd-vae": (True, None)}
    cures = (
        "A plain file is read as scaled; these rows are not: normalise them, or "
        "multiplier=0.18215 if they come from Stable Diffusion's autoencoder. ",
        "They may have been scaled twice. multiplier=... undoes it. ",
    )

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        held = _tensors(path)
        self._name, label_name = _pick(path, held)
        x = held[self._name].x
        self._rows, self.shape, self.dtype = len(x), tuple(x.shape[1:]), x.dtype
        labels = None
        if label_name is not None:
            labels = class_numbers(held[label_name].x, self._rows, f"`{label_name}`", path)
        self._opened(labels)

    @override
    @classmethod
    def finds(cls, path: Path) -> bool:
        return path.is_file() and path.suffix in _SUFFIXES

    def _held(self) -> Rows:
        return self._handle("tensors", lambda: _tensors(self.path))[self._name]

    def _count(self) -> int:
        return self._rows

    def _read(self, row: int, flip: bool) -> Tensor:
        return self._held().x[row]

    def _read_block(self, start: int, stop: int, flip: bool) -> Tensor:
        return self._held().block(start, stop)

    def _compare(self) -> Compared:
        if self.path.suffix == ".safetensors":
            return compare_tensors([read_header(self.path)[0]])
        return compare_files(self.path) if self.path.suffix == ".npy" else compare_zip(self.path)

    def _parts(self) -> str:
        return f"one array, {self._name!r}"

    @override
    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"Expected a name that ends with one of {_SUFFIXES}, got {path}.")
        columns = list(zip(*blocks, strict=True))
        held = {"latents": torch.cat(columns[0]).to(how.dtype)}
        if columns[2][0] is not None:
            held["labels"] = torch.cat(columns[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            write_tensors(path, held, {})
        elif path.suffix == ".npy":
            files = {path: held["latents"]}
            if "labels" in held:
                files[_beside(path)] = held["labels"]
            for file, array in files.items():
                save_arrays(file, array)
            write_checksums(path, files)
        elif path.suffix == ".npz":
            save_arrays(path, held)
        else:
            replace_file(path, lambda file: torch.save(held, file))
        return path


def _beside(path: Path) -> Path:
    """The file of the labels of a `.npy` file."""
    return path.with_name(f"{path.stem}_labels.npy")


def _tensors(path: Path) -> dict[str, Rows]:
    """The arrays in the file, mapped if possible."""
    if path.suffix == ".safetensors":
        return {name: Rows.of(entry) for name, entry in read_header(path)[0].items()}
    if path.suffix == ".npz":
        return _archive(path)
    if path.suffix != ".npy":
        return _pickled(path)
    files = {"latents": path}
    if _beside(path).is_file():
        files["labels"] = _beside(path)
    entries = {name: array_entry(file) for name, file in files.items()}
    return {name: Rows.of(entry) for name, entry in entries.items() if entry}


def _archive(path: Path) -> dict[str, Rows]:
    held, member = {}, ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members_of(archive):
                with archive.open(member):
                    pass  # raises if the two copies of its name differ
                if outside(member):
                    raise Problem("a name that points outside the file")
                if not member.endswith(".npy"):
                    continue
                name = member.removesuffix(".npy")
                try:
                    entry = array_entry(path, member)
                    if entry is not None:
                        held[name] = Rows.of(entry)
                    else:  # compressed: there is nothing to map
                        held[name] = Rows(read_array(archive.read(member), f"{member} in {path}"))
                except NoNumbers:
                    if name in ("latents", "labels"):
                        raise
    except NoNumbers:
        raise
    except Exception as error:  # zipfile raises what its parser does
        where = f", {member}," if member else ""
        raise Problem(
            f"{path}{where} is no whole .npz ({first_line(error)}). Copy or write it again."
        ) from error
    return held


def _pickled(path: Path) -> dict[str, Rows]:
    try:
        # Checks the description of the tensors; their numbers are mapped, not read here.
        check_zip(path, lambda name: "/data/" not in name)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise Problem(
            f"{path} cannot be read as a file of tensors ({first_line(error)}). "
            "Save a tensor, or a dict of tensors, with torch.save."
        ) from error
    if isinstance(found, Tensor):
        found = {"latents": found}
    elif isinstance(found, (tuple, list)):
        found = dict(enumerate(found))
    elif not isinstance(found, Mapping):
        found = {}
    return {str(name): Rows(x.detach()) for name, x in found.items() if isinstance(x, Tensor)}


def _pick(path: Path, held: Mapping[str, Rows]) -> tuple[str, str | None]:
    """The names of the latents and of their labels."""
    dense = {name: r.x for name, r in held.items() if is_dense(r.x)}
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
        if "labels" not in dense:
            raise ValueError(
                f"Expected `labels` as {rows} integers in {path}, got "
                f"{_described(held['labels'].x)}. Save labels.to_dense()."
            )
        return arrays[0], "labels"
    labels = [
        name for name, y in dense.items() if y.shape in ((rows,), (rows, 1)) and y.dtype in _WHOLE
    ]
    if len(labels) > 1:
        warnings.warn(
            f"{path} is read without labels: expected one array of labels, got {labels}. Name the "
            "right one `labels`.",
            stacklevel=2,
        )
    if labels:
        return arrays[0], labels[0] if len(labels) == 1 else None
    # One-hot labels are refused later, with the cure.
    others = (name for name, y in dense.items() if y.shape[:1] == (rows,) and name != arrays[0])
    return arrays[0], next((name for name in others if is_one_hot(dense[name][:64].float())), None)


def _described(x: Tensor) -> str:
    layout = "" if x.layout == torch.strided else f"{str(x.layout).removeprefix('torch.')} "
    return f"{layout}{x.dtype} {tuple(x.shape)}"
