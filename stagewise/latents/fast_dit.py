"""fast-DiT: one pair of `.npy` files for each image, scaled already.

    imagenet256_features/0.npy   (1, 4, 32, 32) float32, a sample times 0.18215
    imagenet256_labels/0.npy     (1,) int64

A random flip is in each row and cannot be told. Several processes writing into one folder overwrite
one another's numbers; what is there is what is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stagewise.latents.base import Latents, Reading
from stagewise.latents.checking import class_numbers, require_labels
from stagewise.latents.files import Problem, array_entry, names, odd_sizes, read_array
from stagewise.latents.scaling import AS_STORED, Affine

__all__ = ["FastDiT", "write_fast_dit"]

_MARK = "_features"


class FastDiT(Latents):
    """Pairs of `.npy` files, in the order of their numbers.

    Args:
        path: The folder that holds the two.
        reading: How to read.
    """

    name = "fast-DiT"

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        self._features, self._targets = folders(path)
        sizes = _sizes(self._features)
        lone = sizes.keys() ^ _sizes(self._targets).keys()
        for name in sorted(lone):
            where = self._features if name in sizes else self._targets
            other = self._targets if name in sizes else self._features
            self._leave_out(
                f"{where.name}/{name}",
                Problem(f"{where / name} has no partner in {other.name}. Write the pair again."),
            )
            sizes.pop(name, None)
        files = sorted(sizes, key=_number)
        odd = set(odd_sizes(sizes))
        first = next((name for name in files if name not in odd), None)
        if first is None:
            raise ValueError(f"Expected .npy files in {self._features}, got none with a partner.")
        entry = array_entry(self._features / first)
        assert entry is not None
        for name in sorted(odd, key=_number):
            try:
                found = array_entry(self._features / name)
            except (Problem, OSError) as error:
                self._leave_out(f"{self._features.name}/{name}", error)
                continue
            if found is not None and found.shape != entry.shape:
                raise ValueError(
                    f"Expected latents of shape {entry.shape} in {self._features / name}, as in "
                    f"{first}, got {found.shape}. Keep latents of each shape in a folder of their "
                    "own."
                )
            odd.discard(name)
        if len(entry.shape) < 2 or entry.shape[0] != 1:
            raise ValueError(
                f"Expected one latent, (1, C, H, W), in {self._features / first}, got "
                f"{entry.shape}."
            )
        self._files = [name for name in files if name not in odd]
        self.shape, self.dtype = entry.shape[1:], entry.dtype
        self.scaling = (
            AS_STORED if reading.multiplier is None else Affine((float(reading.multiplier),))
        )
        self._prepare()

    def _count(self) -> int:
        return len(self._files)

    def _read(self, row: int, flip: bool) -> Tensor:
        return _load(self._features / self._files[row], (1, *self.shape))[0]

    def _label(self, row: int) -> int:
        if self._labels is not None:
            return int(self._labels[row])
        found = self._target(row)
        place = self._targets / self._files[row]
        require_labels(torch.tensor([found]), self.reading.num_classes, place)
        return found

    def _target(self, row: int) -> int:
        file = self._targets / self._files[row]
        labels = read_array(file.read_bytes(), str(file))
        return int(class_numbers(labels.reshape(1, -1), 1, "the label", file)[0])

    def _read_labels(self) -> Tensor | None:
        return torch.tensor([self._target(row) for row in range(len(self._files))])

    def _parts(self) -> str:
        return f"{len(self._files)} pairs of files"

    def _cure(self, large: bool) -> str:
        if large:
            return "fast-DiT writes rows that are scaled; these are not: multiplier=0.18215. "
        return "They may have been scaled twice: multiplier=1 / 0.18215. "


def folders(path: Path) -> tuple[Path, Path]:
    """The folders of features and labels in a folder.

    Raises:
        ValueError: If there are none, or several pairs.
    """
    found = sorted(path.glob(f"*{_MARK}"))
    if len(found) != 1:
        raise ValueError(f"Expected one folder *{_MARK} in {path}, got {names(found) or 'none'}.")
    labels = path / f"{found[0].name.removesuffix(_MARK)}_labels"
    if not labels.is_dir():
        raise ValueError(f"Expected the labels of {found[0].name} in {labels}, which is no folder.")
    return found[0], labels


def write_fast_dit(
    folder: str | os.PathLike[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    name: str = "imagenet256",
) -> Path:
    """Writes scaled latents as fast-DiT does.

    Args:
        folder: The folder.
        batches: `(latents, labels)`, (B, C, H, W) and (B,).
        name: What the two folders begin with.

    Returns:
        The folder.
    """
    folder, row = Path(folder), 0
    features, targets = folder / f"{name}{_MARK}", folder / f"{name}_labels"
    for place in (features, targets):
        place.mkdir(parents=True, exist_ok=True)
    for latents, labels in batches:
        for x, y in zip(latents.cpu().numpy(), labels.cpu().numpy(), strict=True):
            np.save(features / f"{row}.npy", x[None])
            np.save(targets / f"{row}.npy", y[None])
            row += 1
    return folder


def _sizes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as listing:
        return {item.name: item.stat().st_size for item in listing if item.name.endswith(".npy")}


def _number(name: str) -> tuple[int, str]:
    stem = name.removesuffix(".npy")
    return (int(stem) if stem.isdecimal() else -1, name)


def _load(file: Path, shape: tuple[int, ...]) -> Tensor:
    array = read_array(file.read_bytes(), str(file))
    if array.shape != shape:
        raise Problem(f"Expected shape {shape} in {file}, got {array.shape}. Write it again.")
    return array
