"""What `stagewise encode` writes: a block of pictures at a time, in the chosen format.

    lightningdit   shards of posterior samples of the picture and its mirror image, with statistics
    repa, edm2     mean and standard deviation, one `.npy` for each picture, with `dataset.json`
    mar            mean and log-variance, also of the mirror image, one `.npz` for each

A sample is `mean + std * eps`, and eps depends on (seed, index of the picture, 1 for the mirror
image) only, not on batches or ranks. When `close` has returned, a block is on the disk; a block
that was interrupted is written again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from stagewise.latents import write_stats
from stagewise.latents.arrays import save_arrays
from stagewise.latents.lightningdit import shard_name, write_shard
from stagewise.latents.mean_std import file_name, write_index
from stagewise.recipes.image_folder import ImageList

__all__ = ["WRITERS", "Moments", "Writer"]

Moments: TypeAlias = "tuple[Tensor, Tensor]"
"""Mean and standard deviation, each (B, C, h, w), on the CPU."""


class Writer:
    """Writes the latents of the pictures of one rank into a folder, which exists."""

    pixels_from = -1.0
    """Value of black for the autoencoder; white is 1."""
    takes_flips = True
    """Whether the format stores mirrored pictures."""

    def __init__(
        self, folder: Path, images: ImageList, rank: int, seed: int, dtype: torch.dtype
    ) -> None:
        self.folder, self.images, self.rank = folder, images, rank
        self.seed, self.dtype = seed, dtype

    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        """Takes the moments of pictures, and of the mirrored ones."""
        raise NotImplementedError

    def close(self, number: int) -> None:
        """Ends a block: what was added is then on the disk. `number` counts blocks with rows."""
        # Once for a block: to wait for the disk after each of a million files takes hours.
        if hasattr(os, "sync"):
            os.sync()

    def files(self, number: int, indices: Sequence[int]) -> list[Path]:
        """The files of a block, from its number and its pictures that have rows."""
        raise NotImplementedError

    def finish(self, indices: Sequence[int]) -> list[Path]:
        """Writes and returns the files over the rows of all ranks, those of `indices`."""
        raise NotImplementedError


class _Shards(Writer):
    """LightningDiT's shards; without mirrored pictures each row is stored twice, as is usual."""

    _held: tuple[dict[str, Tensor], ...] = ()

    @override
    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        z = self._sample(indices, moments, 0)
        mirrored = z if flipped is None else self._sample(indices, flipped, 1)
        labels = torch.tensor([self.images.labels[index] for index in indices])
        self._held += ({"latents": z, "latents_flip": mirrored, "labels": labels},)

    def _sample(self, indices: Sequence[int], moments: Moments, flip: int) -> Tensor:
        mean, std = moments
        draws = [np.random.default_rng((self.seed, index, flip)) for index in indices]
        eps = [draw.standard_normal(mean.shape[1:], dtype=np.float32) for draw in draws]
        return (mean + std * torch.from_numpy(np.stack(eps))).to(self.dtype)

    @override
    def close(self, number: int) -> None:
        parts, self._held = self._held, ()
        shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_shard(self.folder, self.rank, number, shard)

    @override
    def files(self, number: int, indices: Sequence[int]) -> list[Path]:
        return [self.folder / shard_name(self.rank, number)]

    @override
    def finish(self, indices: Sequence[int]) -> list[Path]:
        write_stats(self.folder)
        return [self.folder / "latents_stats.pt"]


class _MeanStd(Writer):
    """REPA's, in its folder `vae-sd`."""

    takes_flips = False
    subfolder = "vae-sd"

    @override
    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        both = torch.cat(moments, dim=1).to(self.dtype)
        for file, rows in zip(self.files(0, indices), both, strict=True):
            save_arrays(file, rows, sync=False)  # `close` waits for the disk

    @override
    def files(self, number: int, indices: Sequence[int]) -> list[Path]:
        return [self.folder / self.subfolder / file_name(index) for index in indices]

    @override
    def finish(self, indices: Sequence[int]) -> list[Path]:
        listed = [(file_name(index), self.images.labels[index]) for index in indices]
        return write_index(self.folder / self.subfolder, listed)


class _EDM2(_MeanStd):
    """EDM2's: pixels in [0, 1]."""

    pixels_from = 0.0
    subfolder = ""


class _MAR(Writer):
    """MAR's, under the names of the classes."""

    @override
    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        both = [
            torch.cat([mean, 2 * std.log()], dim=1).to(self.dtype)
            for mean, std in (moments, flipped or moments)
        ]
        for file, rows, mirrored in zip(self.files(0, indices), *both, strict=True):
            save_arrays(file, {"moments": rows, "moments_flip": mirrored}, sync=False)

    @override
    def files(self, number: int, indices: Sequence[int]) -> list[Path]:
        def file(label: str, name: str) -> Path:
            name = name.removeprefix(f"{label}/").replace("/", "%2F")
            return self.folder / label / f"{name}.npz"

        images = self.images
        return [file(images.classes[images.labels[i]], images.files[i]) for i in indices]

    @override
    def finish(self, indices: Sequence[int]) -> list[Path]:
        # A label is the place of its folder, so a class without rows needs one too.
        for name in self.images.classes:
            (self.folder / name).mkdir(exist_ok=True)
        return []


WRITERS: dict[str, type[Writer]] = {
    "lightningdit": _Shards,
    "repa": _MeanStd,
    "edm2": _EDM2,
    "mar": _MAR,
}
