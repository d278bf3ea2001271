"""`PerFile`: the formats with one file for each sample.

Opening lists the sizes of the files, and reads the headers of those with an unusual size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.files import Problem
from stagewise.latents.arrays import array_entry, read_array
from stagewise.latents.base import Latents, Writing
from stagewise.latents.scaling import Affine
from stagewise.tensor_files import Entry

__all__ = ["PerFile", "each_row", "sizes_in"]

_SPREAD = 0.05
"""Standard deviation of made-up posteriors, relative to that of the samples."""


class PerFile(Latents):
    """One file for each sample, by default a `.npy` file."""

    _root: Path
    _files: list[str]  # below it
    _stored: tuple[int, ...]  # shape of an array
    _unit = "files"

    def _entry(self, name: str) -> Entry:
        """Where the numbers of a file lie, from its header; by default of a `.npy` file."""
        zipped = self._root.is_file()
        entry = array_entry(self._root, name) if zipped else array_entry(self._root / name)
        assert entry is not None  # compressed members of a zip were refused
        return entry

    def _load(self, name: str, flip: bool) -> Tensor:
        file = self._root / name
        return read_array(file.read_bytes(), str(file))

    def _find(self, sizes: Mapping[str, int], order: Callable[..., Any] | None = None) -> None:
        """Keeps the files that can be used, from their names in `_root` and sizes in bytes.

        They are sorted by the key `order`, default by name, and must have one shape.
        """
        root, files = self._root, sorted(sizes, key=order)
        values, counts = np.unique(list(sizes.values()), return_counts=True)
        most = int(values[counts.argmax()]) if files else 0
        usual = next((name for name in files if sizes[name] == most), None)
        if usual is None:
            raise ValueError(f"Expected {self.looks_like} in {root}, got no such files.")
        first, lost = self._entry(usual), set()
        for name in (name for name in files if sizes[name] != most):
            try:
                shape = self._entry(name).shape
            except (Problem, OSError) as error:
                self._leave_out(name if root == self.path else f"{root.name}/{name}", error)
                lost.add(name)
                continue
            if shape != first.shape:
                raise ValueError(
                    f"Expected shape {first.shape} in {name} of {root}, as in {usual}, got "
                    f"{shape}. Keep latents of each shape in a folder of their own."
                )
        self._files = [name for name in files if name not in lost]
        self._stored, self.dtype, self.shape = first.shape, first.dtype, first.shape[1:]
        if self.moments:
            if len(first.shape) != 3 or first.shape[0] % 2:
                raise ValueError(
                    f"Expected mean and {self.moments}, (2C, H, W), in {usual} of {root}, got "
                    f"{first.shape}."
                )
            self.shape = (first.shape[0] // 2, *first.shape[1:])

    def _count(self) -> int:
        return len(self._files)

    def _read(self, row: int, flip: bool) -> Tensor:
        name = self._files[row]
        array = self._load(name, flip)
        if array.shape != self._stored:
            raise Problem(
                f"Expected shape {self._stored} in {name} of {self._root}, got {array.shape}. "
                "Write it again."
            )
        return array

    def _parts(self) -> str:
        return f"{len(self._files)} {self._unit}"

    @classmethod
    def _moments_of(cls, x: Tensor, how: Writing) -> Tensor:
        """Mean `x`, (n, C, H, W), with its std or log-variance: (n, 2C, H, W)."""
        assert isinstance(cls.scaling, Affine)
        mean = cls.scaling.invert(x)
        std = torch.zeros_like(mean)
        if how.made is not None:
            gain = torch.tensor(cls.scaling.gain)[:, None, None]
            std = (_SPREAD * cls.usual_std / gain).expand_as(mean)
        # MAR's reader cuts off at -30, a standard deviation of 3e-7.
        spread = (2 * std.log()).clamp_min(-30) if cls.moments == "logvar" else std
        return torch.cat([mean, spread], dim=1).to(how.dtype)


def each_row(blocks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Number and `(*arrays, label)` of each row of blocks `(*arrays, labels or None)`."""
    count = 0
    for *arrays, labels in blocks:
        parts = [*arrays, [None] * len(arrays[0]) if labels is None else labels]
        lengths = [len(part) for part in parts]
        if len(set(lengths)) > 1:
            raise ValueError(
                "Expected one length for the arrays and labels of a batch, got "
                f"{' and '.join(map(str, lengths))} in the batch from row {count} on. Give "
                "each row one label: (latents[:n], labels[:n])."
            )
        yield from enumerate(zip(*parts, strict=True), count)
        count += lengths[0]
    if not count:
        raise ValueError("Expected batches of latents, got none.")


def sizes_in(folders: Iterable[Path], suffix: str) -> dict[str, int]:
    """The sizes of the files with a suffix, by `folder/name`."""
    sizes: dict[str, int] = {}
    for folder in folders:
        with os.scandir(folder) as listing:
            sizes |= {
                f"{folder.name}/{item.name}": item.stat().st_size
                for item in listing
                if item.name.endswith(suffix)
            }
    return sizes
