"""REPA and EDM2: means and standard deviations, one `.npy` file for each image, and `dataset.json`.

    vae-sd/00000/img-mean-std-00000000.npy   (2C, H, W) float32, mean then standard deviation
    vae-sd/dataset.json                      {"labels": [["00000/img-mean-std-....npy", 6], ...]}

in a folder, or in a stored zip. Names and shapes are the same in both projects, the numbers are
not: REPA encodes pixels in [-1, 1] and trains on `0.18215 z`, EDM2 encodes pixels in [0, 1] and
normalises by channel to a standard deviation of 0.5. No file says which, so the user does.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.latents.base import Latents, Reading
from stagewise.latents.files import (
    Entry,
    Problem,
    array_entry,
    local_header,
    odd_sizes,
    read_array,
)
from stagewise.latents.scaling import EDM2 as EDM2_SCALING
from stagewise.latents.scaling import SD_VAE

__all__ = ["EDM2", "REPA", "MeanStd", "file_name", "find_folder", "write_mean_std"]

_INDEX = "dataset.json"


class MeanStd(Latents):
    """Means and standard deviations, of which each access draws.

    Args:
        path: The folder or zip with `dataset.json`, or a folder with `vae-sd` in it.
        reading: How to read.
    """

    moments = "std"

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        found = find_folder(path)
        if found is None:
            raise ValueError(
                f"Expected {_INDEX} beside 00000/img-mean-std-*.npy in {path} or in {path}/vae-sd."
            )
        self._root = found
        if found.is_dir():
            sizes, index = _listing(found)
            self._offsets: dict[str, int] = {}
        else:
            sizes, index = self._directory(found)
        odd = set(odd_sizes(sizes))
        usual = next((name for name in sorted(sizes) if name not in odd), None)
        if usual is None:
            raise ValueError(f"Expected .npy files in {found}, got none.")
        self._sizes = sizes
        first = self._entry(usual)
        if len(first.shape) != 3 or first.shape[0] % 2:
            raise ValueError(
                f"Expected mean and std, (2C, H, W), in {usual} of {found}, got {first.shape}."
            )
        for name in sorted(odd):
            try:
                other = self._entry(name).shape
            except (Problem, OSError) as error:
                self._leave_out(name, error)
                continue
            if other != first.shape:
                raise ValueError(
                    f"Expected shape {first.shape} in {name} of {found}, as in {usual}, got "
                    f"{other}. Keep latents of each shape in a folder of their own."
                )
            odd.discard(name)
        self._files = sorted(name for name in sizes if name not in odd)
        self._index = self._read_index(index)
        self._stored = first.shape
        self.shape, self.dtype = (first.shape[0] // 2, *first.shape[1:]), first.dtype
        self._prepare()
        self._stored_labels()

    def _directory(self, path: Path) -> tuple[dict[str, int], bytes | None]:
        """Sizes of a zip's members, and its index; where they lie is kept."""
        try:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: info for info in archive.infolist()}
                index = archive.read(_INDEX) if _INDEX in members else None
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(
                f"{path} is no whole zip ({error}). Copy or write it again."
            ) from error
        packed = [name for name, info in members.items() if info.compress_type]
        if packed:
            raise ValueError(
                f"Expected a stored (uncompressed) zip, got {path} with {len(packed)} compressed "
                f"members, the first {packed[0]}. Unpack it, or write it again: zip -0."
            )
        arrays = [name for name in members if name.endswith(".npy")]
        self._offsets = {name: members[name].header_offset for name in arrays}
        return {name: members[name].file_size for name in arrays}, index

    def _read_index(self, text: bytes | None) -> Tensor | None:
        if text is None:
            return None
        try:
            listed = json.loads(text)["labels"]
            if listed is None:
                return None
            by_name = dict(listed)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{_INDEX} of {self._root} is damaged: expected "
                '{"labels": [[name, class], ...]}. Write it again.'
            ) from error
        missing = [name for name in self._files if name not in by_name]
        if missing:
            raise ValueError(
                f"Expected a label for each file in {_INDEX} of {self._root}, got none for "
                f"{len(missing)}, the first {missing[0]}. Write the index again."
            )
        gone = by_name.keys() - self._files - set(self._sizes)
        if gone:
            for name in sorted(gone):
                self._leave_out(
                    name,
                    Problem(
                        f"{name} is in {_INDEX} of {self._root}, and there is no such file. Copy "
                        "or encode it again."
                    ),
                )
        wrong = [name for name in self._files if not isinstance(by_name[name], int)]
        if wrong:
            raise ValueError(
                f"Expected an integer for each file in {_INDEX} of {self._root}, got "
                f"{str(by_name[wrong[0]])[:60]} for {wrong[0]}."
            )
        return torch.tensor([by_name[name] for name in self._files], dtype=torch.int64)

    def _entry(self, name: str) -> Entry:
        zipped = self._root.suffix == ".zip"
        entry = array_entry(self._root, name) if zipped else array_entry(self._root / name)
        assert entry is not None
        return entry

    def _load(self, name: str) -> Tensor:
        if not self._offsets:
            return read_array((self._root / name).read_bytes(), str(self._root / name))
        pages = self._handle("zip", lambda: _map(self._root))
        start, where = self._offsets[name], f"{name} in {self._root}"
        try:
            start += local_header(pages[start : start + 30])
        except Problem as error:
            raise Problem(f"{where}: {error}. Copy or write it again.") from error
        return read_array(pages[start : start + self._sizes[name]], where)

    def _count(self) -> int:
        return len(self._files)

    def _read(self, row: int, flip: bool) -> Tensor:
        array = self._load(self._files[row])
        if array.shape != self._stored:
            raise Problem(
                f"Expected shape {self._stored} in {self._files[row]} of {self._root}, got "
                f"{array.shape}. Write it again."
            )
        return array

    def _read_labels(self) -> Tensor | None:
        return self._index

    def _read_all(self) -> list[str]:
        wrong = super()._read_all()
        if self._offsets:
            with zipfile.ZipFile(self._root) as archive:
                bad = archive.testzip()
            if bad is not None:
                wrong.append(f"{bad} does not match its checksum. Copy or encode it again.")
        return wrong

    def _parts(self) -> str:
        return f"{len(self._files)} files" + (" of a zip" if self._offsets else "")


class REPA(MeanStd):
    """As written by sihyun-yu/REPA: pixels in [-1, 1], `0.18215 z`."""

    name = "REPA"
    scaling = SD_VAE

    def _cure(self, large: bool) -> str:
        return 'Files of EDM2 have the same names and another scale: format="edm2". '


class EDM2(MeanStd):
    """As written by NVlabs/edm2: pixels in [0, 1], normalised by channel."""

    name = "EDM2"
    scaling = EDM2_SCALING
    usual_std = 0.5
    scale_range = 1.4  # normalised by channel, rows are at 0.5

    def _cure(self, large: bool) -> str:
        return 'Files of REPA have the same names and another scale: format="repa". '


def find_folder(path: Path) -> Path | None:
    """The folder or zip with the index, at `path` or below it."""
    if path.suffix == ".zip":
        return path
    for place in (path, path / "vae-sd"):
        if (place / _INDEX).is_file() and next(place.glob("*/*.npy"), None):
            return place
    return path / "vae-sd.zip" if (path / "vae-sd.zip").is_file() else None


def file_name(row: int) -> str:
    """What both projects call the file of a row."""
    return f"{row:08d}"[:5] + f"/img-mean-std-{row:08d}.npy"


def write_mean_std(
    path: str | os.PathLike[str], batches: Iterable[tuple[Tensor, Tensor | None]]
) -> Path:
    """Writes means and standard deviations as REPA and EDM2 do.

    Args:
        path: A folder (REPA's `vae-sd`), or a name that ends with `.zip`.
        batches: `(moments, labels)`, (B, 2C, H, W) and (B,) or None.

    Returns:
        The path.
    """
    path, listed, row = Path(path), [], 0
    archive = None
    if path.suffix == ".zip":
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = zipfile.ZipFile(path, mode="w", compression=zipfile.ZIP_STORED)

    def save(name: str, data: bytes | str) -> None:
        if archive is not None:
            archive.writestr(name, data)
            return
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data.encode() if isinstance(data, str) else data)

    try:
        for moments, labels in batches:
            for at, moment in enumerate(moments.cpu().numpy()):
                name = file_name(row)
                buffer = io.BytesIO()
                np.save(buffer, moment)
                save(name, buffer.getvalue())
                listed.append(None if labels is None else [name, int(labels[at])])
                row += 1
        about: dict[str, Any] = {"labels": listed if None not in listed else None}
        save(_INDEX, json.dumps(about))
    finally:
        if archive is not None:
            archive.close()
    return path


def _listing(folder: Path) -> tuple[dict[str, int], bytes | None]:
    sizes: dict[str, int] = {}
    folders = (item for item in folder.iterdir() if item.is_dir() and item.name[0] != ".")
    for place in sorted(folders):
        with os.scandir(place) as listing:
            sizes |= {
                f"{place.name}/{item.name}": item.stat().st_size
                for item in listing
                if item.name.endswith(".npy")
            }
    index = folder / _INDEX
    return sizes, index.read_bytes() if index.is_file() else None


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
