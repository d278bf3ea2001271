"""MAR: one `.npz` for each image, in a folder for each class.

    n01440764/n01440764_10026.JPEG.npz    moments, moments_flip   (2C, H, W) float32

The moments are mean and **log-variance** of the posterior; the label is the index of the folder
among the sorted folders that hold `.npz` files. As in `torchvision.datasets.DatasetFolder`, hidden
and empty folders are no classes; an empty one gives a warning, since it does not count in the
numbers of later classes. Training draws a sample and multiplies it by 0.2325.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from stagewise.files import FilePath, Problem, first_line, joined
from stagewise.latents.arrays import array_entry, save_arrays, to_tensor
from stagewise.latents.base import Block, Reading, Writing
from stagewise.latents.per_file import PerFile, each_row, sizes_in
from stagewise.latents.scaling import KL16
from stagewise.tensor_files import Entry

__all__ = ["MAR", "write_mar"]

_KEYS = ("moments", "moments_flip")


class MAR(PerFile):
    """Means and log-variances, from which each access draws."""

    name = "MAR"
    looks_like = "a folder for each class with *.npz of moments"
    needs_labels = True
    moments = "logvar"
    scaling = KL16
    cures = ("MAR's files are those of KL-16, scaled by 0.2325; is it another autoencoder? ",) * 2
    has_flips = True

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        self._root = path
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        sizes = sizes_in(folders, ".npz")
        classes = sorted({name.split("/")[0] for name in sizes})
        empty = [folder.name for folder in folders if folder.name not in classes]
        if classes and empty and empty[0] < classes[-1]:
            warnings.warn(
                f"{path} has folders without .npz files, which are no classes: {joined(empty)}. "
                "They are not counted in the labels of the folders after them. If they are "
                "classes, put their rows there.",
                stacklevel=2,
            )
        self._find(sizes)
        self._classes = len(classes)
        place = {name: at for at, name in enumerate(classes)}
        self._opened(torch.tensor([place[name.split("/")[0]] for name in self._files]))

    @override
    @classmethod
    def finds(cls, path: Path) -> bool:
        return next(path.glob("*/*.npz"), None) is not None

    def _entry(self, name: str) -> Entry:
        both = [array_entry(self.path / name, f"{key}.npy") for key in _KEYS]
        if both[0] is None or both[1] is None:
            raise Problem(f"{self.path / name} is compressed: write it with np.savez.")
        return both[0]

    def _load(self, name: str, flip: bool) -> Tensor:
        file = self.path / name
        try:
            with np.load(file, allow_pickle=False) as held:
                array = held[_KEYS[flip]]
        except Exception as error:  # numpy and zipfile raise what their parsers do
            raise Problem(
                f"{file} is no whole .npz with {_KEYS[flip]} ({first_line(error)}). Copy or encode "
                "it again."
            ) from error
        return to_tensor(array, str(file))

    def _parts(self) -> str:
        return f"{super()._parts()} in {self._classes} folders"

    @override
    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        moments = cls._moments_of
        return write_mar(path, ((moments(x, how), moments(flip, how), y) for x, flip, y in blocks))


def write_mar(folder: FilePath, batches: Iterable[tuple[Tensor, Tensor, Any]]) -> Path:
    """Writes `(moments, moments_flip, labels)`, (B, 2C, H, W) twice and (B,), as MAR does.

    Folders are named by class, such as `n00000006`, and files by class and row.
    """
    folder = Path(folder)
    for row, (*both, label) in each_row(batches):
        name = f"n{int(label):08d}"
        held = dict(zip(_KEYS, both, strict=True))
        save_arrays(folder / name / f"{name}_{row:08d}.JPEG.npz", held, sync=False)
    return folder
