"""MAR: one `.npz` for each image, in a folder for each class.

    n01440764/n01440764_10026.JPEG.npz    moments, moments_flip   (2C, H, W) float32

The moments are mean and **log-variance** of the posterior; the label is the place of the folder
among the sorted folders that hold `.npz` files. Hidden folders and empty ones are no classes, as
those who train with `torchvision.datasets.DatasetFolder` have none; of an empty one that is not
hidden a warning tells, since the classes after it are numbered without it. Training draws a sample
and multiplies it by 0.2325.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.latents.base import Latents, Reading
from stagewise.latents.files import Entry, Problem, array_entry, names, odd_sizes, to_tensor
from stagewise.latents.scaling import KL16

__all__ = ["MAR", "write_mar"]

_KEYS = ("moments", "moments_flip")


class MAR(Latents):
    """Means and log-variances, of which each access draws.

    Args:
        path: The folder of the folders.
        reading: How to read.
    """

    name = "MAR"
    moments = "logvar"
    scaling = KL16
    has_flips = True

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        sizes: dict[str, int] = {}
        self._classes: list[Any] = []
        empty: list[Any] = []
        for folder in sorted(item for item in path.iterdir() if item.is_dir()):
            if folder.name.startswith("."):
                continue
            with os.scandir(folder) as listing:
                held = {
                    f"{folder.name}/{item.name}": item.stat().st_size
                    for item in listing
                    if item.name.endswith(".npz")
                }
            (self._classes if held else empty).append(folder.name)
            sizes |= held
        if empty and self._classes and empty[0] < self._classes[-1]:
            warnings.warn(
                f"{path} has folders without .npz files, which are no classes: {names(empty)}. The "
                "folders after them have labels that are lower by as many as are left out before "
                "them. If they stand for classes, put their rows there.",
                stacklevel=2,
            )
        odd = set(odd_sizes(sizes))
        usual = next((name for name in sorted(sizes) if name not in odd), None)
        if usual is None:
            raise ValueError(f"Expected .npz files in the folders of {path}, got none.")
        first = self._entries(usual)
        for name in sorted(odd):
            try:
                other = self._entries(name)
            except (Problem, OSError) as error:
                self._leave_out(name, error)
                continue
            if other.shape != first.shape:
                raise ValueError(
                    f"Expected shape {first.shape} in {path / name}, as in {usual}, got "
                    f"{other.shape}. Keep latents of each shape in a folder of their own."
                )
            odd.discard(name)
        if len(first.shape) != 3 or first.shape[0] % 2:
            raise ValueError(
                f"Expected mean and log-variance, (2C, H, W), in {path / usual}, got {first.shape}."
            )
        self._files = sorted(name for name in sizes if name not in odd)
        place = {name: at for at, name in enumerate(self._classes)}
        self._targets = torch.tensor([place[name.split("/")[0]] for name in self._files])
        self._stored = first.shape
        self.shape, self.dtype = (first.shape[0] // 2, *first.shape[1:]), first.dtype
        self._prepare()
        self._stored_labels()

    def _entries(self, name: str) -> Entry:
        both = [array_entry(self.path / name, f"{key}.npy") for key in _KEYS]
        if both[0] is None or both[1] is None:
            raise Problem(f"{self.path / name} is compressed: write it with np.savez.")
        return both[0]

    def _count(self) -> int:
        return len(self._files)

    def _read(self, row: int, flip: bool) -> Tensor:
        file = self.path / self._files[row]
        try:
            with np.load(file, allow_pickle=False) as held:
                array = held[_KEYS[flip]]
        except (zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError, MemoryError) as error:
            raise Problem(
                f"{file} is no whole .npz with {_KEYS[flip]} ({error}). Copy or encode it again."
            ) from error
        if array.shape != self._stored:
            raise Problem(
                f"Expected shape {self._stored} in {file}, got {array.shape}. Encode it again."
            )
        return to_tensor(array, str(file))

    def _read_labels(self) -> Tensor | None:
        return self._targets

    def _parts(self) -> str:
        return f"{len(self._files)} files in {len(self._classes)} folders"

    def _cure(self, large: bool) -> str:
        return "MAR's files are those of KL-16, scaled by 0.2325; is it another autoencoder? "


def write_mar(
    folder: str | os.PathLike[str], batches: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> Path:
    """Writes means and log-variances as MAR does.

    Args:
        folder: The folder.
        batches: `(moments, moments_flip, labels)`, (B, 2C, H, W) twice and (B,).

    Returns:
        The folder. Its classes are named by number, as `n00000006`, and rows by theirs.
    """
    folder, row = Path(folder), 0
    for moments, flipped, labels in batches:
        for z, flip, label in zip(moments, flipped, labels.tolist(), strict=True):
            name = f"n{label:08d}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.savez(
                folder / name / f"{name}_{row:08d}.JPEG.npz",
                moments=z.cpu().numpy(),
                moments_flip=flip.cpu().numpy(),
            )
            row += 1
    return folder
