"""REPA and EDM2: means and standard deviations, one `.npy` file for each image, and `dataset.json`.

    vae-sd/00000/img-mean-std-00000000.npy   (2C, H, W) float32, mean then standard deviation
    vae-sd/dataset.json                      {"labels": [["00000/img-mean-std-....npy", 6], ...]}

in a folder, or in a stored zip. Both projects use the same names and shapes, but other numbers:
REPA encodes pixels in [-1, 1] and trains on `0.18215 z`, EDM2 encodes pixels in [0, 1] and
normalises by channel to a standard deviation of 0.5. The files do not say which, so the user must.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from stagewise.files import FilePath, Problem, first_line, replace_file
from stagewise.latents.arrays import local_header, members_of, outside, read_array, save_arrays
from stagewise.latents.base import Block, Reading, Writing
from stagewise.latents.checksums import Compared, compare_files, compare_zip, write_checksums
from stagewise.latents.per_file import PerFile, each_row, sizes_in
from stagewise.latents.scaling import EDM2 as EDM2_SCALING
from stagewise.latents.scaling import SD_VAE
from stagewise.tensor_files import map_file

__all__ = ["EDM2", "REPA", "file_name", "write_index", "write_mean_std"]

_INDEX = "dataset.json"

Labelled: TypeAlias = "Sequence[tuple[str, int | None]]"
"""Names of files and their labels."""


class _MeanStd(PerFile):
    """Means and standard deviations, from which each access draws."""

    looks_like = "dataset.json and 00000/img-mean-std-*.npy, there, in vae-sd/ or in a stored zip"
    ambiguous = (
        "holds means and standard deviations, and two projects write such files with the same "
        'names. Say which: format="repa" (pixels in [-1, 1], latents times 0.18215) or '
        'format="edm2" (pixels in [0, 1], normalised by channel to 0.5).'
    )
    is_file = None
    moments = "std"

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        found = _find_root(path)
        if found is None:
            raise ValueError(f"Expected {self.looks_like}, in {path}.")
        self._root, self._zipped = found, found.is_file()
        sizes, index = self._zip_listing() if self._zipped else self._listing()
        self._find(sizes)
        self._opened(self._read_index(index, sizes))

    @override
    @classmethod
    def finds(cls, path: Path) -> bool:
        return _find_root(path) is not None

    def _listing(self) -> tuple[dict[str, int], bytes | None]:
        """Sizes of the files in folders that are not hidden, and the index."""
        folders = (p for p in self._root.iterdir() if p.is_dir() and not p.name.startswith("."))
        index = self._root / _INDEX
        return sizes_in(sorted(folders), ".npy"), index.read_bytes() if index.is_file() else None

    def _zip_listing(self) -> tuple[dict[str, int], bytes | None]:
        """The same for a zip; keeps the places of its members."""
        path = self._root
        try:
            with zipfile.ZipFile(path) as archive:
                members = members_of(archive)
                index = archive.read(_INDEX) if _INDEX in members else None
        except Exception as error:  # zipfile raises what its parser does
            raise ValueError(
                f"{path} is no whole zip ({first_line(error)}). Copy or write it again."
            ) from error
        for name in filter(outside, list(members)):
            lost = f"{name} in {path} has a name that points outside it. Write the zip again."
            self._leave_out(name, lost)
            del members[name]
        packed = [name for name, info in members.items() if info.compress_type]
        if packed:
            raise ValueError(
                f"Expected a stored (uncompressed) zip, got {path} with {len(packed)} compressed "
                f"members, the first {packed[0]}. Unpack it, or write it again: zip -0."
            )
        arrays = {name: info for name, info in members.items() if name.endswith(".npy")}
        # Only first byte and length: a million ZipInfo objects would take a GB.
        self._places = {name: (i.header_offset, i.file_size) for name, i in arrays.items()}
        return {name: info.file_size for name, info in arrays.items()}, index

    def _read_index(self, text: bytes | None, sizes: dict[str, int]) -> Tensor | None:
        where = f"{_INDEX} of {self._root}"
        try:
            listed = None if text is None else json.loads(text)["labels"]
            if listed is None:
                return None
            by_name = dict(listed)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{where} is damaged: expected {{"labels": [[name, class], ...]}}. Write it again.'
            ) from error
        missing = [name for name in self._files if name not in by_name]
        if missing:
            raise ValueError(
                f"Expected a label for each file in {where}, got none for {len(missing)}, the "
                f"first {missing[0]}. Write the index again."
            )
        for name in sorted(by_name.keys() - sizes.keys()):
            lost = f"{name} is in {where}, but there is no such file. Copy or encode it again."
            self._leave_out(name, lost)
        labels = {name: by_name[name] for name in self._files}
        wrong = [k for k, y in labels.items() if not isinstance(y, int) or abs(y) >= 2**63]
        if wrong:
            raise ValueError(
                f"Expected an integer for each file in {where}, got "
                f"{str(labels[wrong[0]])[:60]} for {wrong[0]}."
            )
        return torch.tensor(list(labels.values()), dtype=torch.int64)

    def _load(self, name: str, flip: bool) -> Tensor:
        if not self._zipped:
            return super()._load(name, flip)
        pages = self._handle("zip", lambda: map_file(self._root))
        (start, size), where = self._places[name], f"{name} in {self._root}"
        try:
            start += local_header(pages[start : start + 30])
        except Problem as error:
            raise Problem(f"{where}: {error}. Copy or write it again.") from error
        return read_array(pages[start : start + size], where)

    def _compare(self) -> Compared:
        return compare_zip(self._root) if self._zipped else compare_files(self._root)

    def _parts(self) -> str:
        return super()._parts() + (" of a zip" if self._zipped else "")

    @override
    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        return write_mean_std(path, ((cls._moments_of(x, how), y) for x, _, y in blocks))


class REPA(_MeanStd):
    """As written by sihyun-yu/REPA: pixels in [-1, 1], `0.18215 z`."""

    name = "REPA"
    scaling = SD_VAE
    scales = {"sd-vae": (True, None)}
    cures = ('Files of EDM2 have the same names and another scale: format="edm2". ',) * 2

    @override
    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        inside = how.made is not None and path.suffix != ".zip"
        super().write(path / "vae-sd" if inside else path, blocks, how)
        return path


class EDM2(_MeanStd):
    """As written by NVlabs/edm2: pixels in [0, 1], normalised by channel."""

    name = "EDM2"
    scaling = EDM2_SCALING
    usual_std = 0.5
    scale_range = 1.4  # rows normalised by channel have a standard deviation of 0.5
    cures = ('Files of REPA have the same names and another scale: format="repa". ',) * 2


def _find_root(path: Path) -> Path | None:
    """The folder or zip with the index: `path`, or vae-sd in it."""
    if path.suffix == ".zip":
        return path
    for place in (path, path / "vae-sd"):
        if (place / _INDEX).is_file() and next(place.glob("*/*.npy"), None):
            return place
    return path / "vae-sd.zip" if (path / "vae-sd.zip").is_file() else None


def file_name(row: int) -> str:
    """The name of the file of a row, in both projects."""
    return f"{row:08d}"[:5] + f"/img-mean-std-{row:08d}.npy"


def write_mean_std(path: FilePath, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Path:
    """Writes `(moments, labels or None)`, (B, 2C, H, W) and (B,), in a folder or a `.zip`."""
    path = Path(path)
    if path.suffix == ".zip":
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda partial: _write_zip(partial, batches))
        return path
    listed = _write_rows(batches, lambda name, z: save_arrays(path / name, z, sync=False))
    write_index(path, listed)
    return path


def write_index(folder: Path, listed: Labelled) -> list[Path]:
    """Writes the labels of the files in a folder, and their checksums; returns the two files."""
    index = folder / _INDEX
    replace_file(index, lambda partial: partial.write_text(_index_of(listed)))
    return [index, write_checksums(folder, [index, *(folder / name for name, _ in listed)])]


def _index_of(listed: Labelled) -> str:
    labelled = any(label is not None for _, label in listed)
    return json.dumps({"labels": listed if labelled else None})


def _write_zip(path: Path, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    with zipfile.ZipFile(path, mode="w") as archive:

        def save(name: str, moments: Tensor) -> None:
            buffer = io.BytesIO()
            np.save(buffer, moments.numpy())
            archive.writestr(name, buffer.getvalue())  # stored, not compressed

        archive.writestr(_INDEX, _index_of(_write_rows(batches, save)))


def _write_rows(
    batches: Iterable[tuple[Tensor, Tensor | None]], save: Callable[[str, Tensor], object]
) -> Labelled:
    """Writes the rows of batches; returns their names and labels."""
    listed: list[tuple[str, int | None]] = []
    for row, (moments, label) in each_row(batches):
        if listed and (label is None) != (listed[0][1] is None):
            raise ValueError(
                "Expected labels for all rows or for none, got "
                f"{'none' if label is None else 'labels'} from row {row} on, unlike before. Give "
                "(moments, labels) in every batch, or (moments, None) in every batch."
            )
        save(file_name(row), moments.cpu())
        listed.append((file_name(row), None if label is None else int(label)))
    return listed
