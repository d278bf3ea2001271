"""fast-DiT: one pair of `.npy` files for each image, already scaled.

    imagenet256_features/0.npy   (1, 4, 32, 32) float32, a sample times 0.18215
    imagenet256_labels/0.npy     (1,) int64

A row may be flipped at random, which cannot be seen. Processes that write into one folder overwrite
each other's numbers; only what is left can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.files import FilePath, joined
from stagewise.latents.arrays import (
    class_numbers,
    read_array,
    require_labels,
    save_arrays,
)
from stagewise.latents.base import Block, Reading, Writing
from stagewise.latents.checksums import Compared, compare_files, write_checksums
from stagewise.latents.per_file import PerFile, each_row, sizes_in

__all__ = ["FastDiT", "write_fast_dit"]

_MARK = "_features"


class FastDiT(PerFile):
    """Pairs of `.npy` files, in the order of their numbers. Labels are read at their first use."""

    name = "fast-DiT"
    looks_like = "*_features/0.npy ... and *_labels/0.npy ..."
    takes_multiplier = True
    scales = {"sd-vae": (True, None)}
    cures = (
        "fast-DiT writes scaled rows; these are not: multiplier=0.18215. ",
        "They may have been scaled twice: multiplier=1 / 0.18215. ",
    )
    needs_labels = True
    _unit = "pairs of files"

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        features, self._targets = _folders(path)
        self._root = features
        sizes, others = (_sizes(folder) for folder in (features, self._targets))
        for name in sorted(sizes.keys() ^ others.keys()):
            here, there = features, self._targets
            if name in others:
                here, there = there, here
            lost = f"{here / name} has no partner in {there.name}. Write the pair again."
            self._leave_out(f"{here.name}/{name}", lost)
            sizes.pop(name, None)
        self._find(sizes, _number)
        if len(self._stored) < 2 or self._stored[0] != 1:
            raise ValueError(
                f"Expected one latent, (1, C, H, W), in {features / self._files[0]}, got "
                f"{self._stored}."
            )
        self._opened(None)

    @override
    @classmethod
    def finds(cls, path: Path) -> bool:
        return next(path.glob(f"*{_MARK}"), None) is not None

    def _read(self, row: int, flip: bool) -> Tensor:
        return super()._read(row, flip)[0]

    def _label(self, row: int) -> int:
        if self._labels is not None:
            return int(self._labels[row])
        found = self._target(row)
        require_labels(found, self.reading.num_classes, self._targets / self._files[row])
        return int(found)

    def _target(self, row: int) -> Tensor:
        file = self._targets / self._files[row]
        labels = read_array(file.read_bytes(), str(file))
        return class_numbers(labels.reshape(1, -1), 1, "the label", file)

    @override
    @property
    def labels(self) -> Tensor:
        if self._labels is None:
            found = torch.cat([self._target(row) for row in range(len(self._files))])
            require_labels(found, self.reading.num_classes, self.path)
            self._labels = found
        return self._labels

    def _compare(self) -> Compared:
        return compare_files(self.path)

    @override
    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        return write_fast_dit(path, ((x.to(how.dtype), y) for x, _, y in blocks))


def _folders(path: Path) -> tuple[Path, Path]:
    """The folders of features and labels in a folder."""
    found = sorted(path.glob(f"*{_MARK}"))
    if len(found) != 1:
        raise ValueError(f"Expected one folder *{_MARK} in {path}, got {joined(found) or 'none'}.")
    labels = path / f"{found[0].name.removesuffix(_MARK)}_labels"
    if not labels.is_dir():
        raise ValueError(f"Expected the labels of {found[0].name} in {labels}, which is no folder.")
    return found[0], labels


def _sizes(folder: Path) -> dict[str, int]:
    return {name.split("/")[1]: size for name, size in sizes_in([folder], ".npy").items()}


def _number(name: str) -> tuple[int, str]:
    stem = name.removesuffix(".npy")
    return (int(stem) if stem.isdecimal() else -1, name)


def write_fast_dit(folder: FilePath, batches: Iterable[tuple[Tensor, Any]]) -> Path:
    """Writes scaled `(latents, labels)`, (B, C, H, W) and (B,), as fast-DiT does."""
    folder = Path(folder)
    files: list[Path] = []
    features, targets = folder / f"imagenet256{_MARK}", folder / "imagenet256_labels"
    for row, (x, label) in each_row(batches):
        files += [features / f"{row}.npy", targets / f"{row}.npy"]
        save_arrays(files[-2], x[None], sync=False)
        save_arrays(files[-1], label[None], sync=False)
    write_checksums(folder, files)
    return folder
