"""What `stagewise encode` writes: a block of pictures at a time, in the format asked for.

    lightningdit   shards of posterior samples and of those of the mirrored picture, with statistics
    repa, edm2     mean and standard deviation, one `.npy` for each picture, with `dataset.json`
    mar            mean and log-variance, also of the mirrored picture, one `.npz` for each

A sample is `mean + std * eps`, with eps drawn by (seed, index of the picture, 1 for the mirrored
one): neither batches nor ranks change it. A block counts when `close` has returned: it is on the
disk then, and a block that was cut off is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stagewise.files import replace_file
from stagewise.latents import write_stats
from stagewise.latents.lightningdit import write_shard
from stagewise.latents.mean_std import file_name
from stagewise.recipes.image_folder import ImageList

__all__ = ["WRITERS", "Moments", "Writer", "posterior_sample"]

Moments: TypeAlias = "tuple[Tensor, Tensor]"


class Writer:
    """Writes the latents of one rank.

    Args:
        folder: The folder; it exists.
        images: All pictures, also those of other ranks.
        rank: Of this process.
        seed: Of the samples.
        dtype: Of the stored numbers.
    """

    pixels_from = -1.0
    """What black is for the autoencoder; white is 1."""
    takes_flips = True
    """Whether mirrored pictures have a place in the format."""

    def __init__(
        self, folder: Path, images: ImageList, rank: int, seed: int, dtype: torch.dtype
    ) -> None:
        self.folder, self.images, self.rank = folder, images, rank
        self.seed, self.dtype = seed, dtype

    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        """Takes the moments of pictures, each (B, C, h, w), on the CPU."""
        raise NotImplementedError

    def close(self, number: int) -> None:
        """Ends a block: what was added is on the disk. `number` counts the blocks with rows."""
        raise NotImplementedError

    def finish(self, indices: Sequence[int]) -> None:
        """Writes what is over all rows, of all ranks; `indices` are those that are there."""
        raise NotImplementedError


class Shards(Writer):
    """LightningDiT's shards; without mirrored pictures rows are stored twice, as is usual."""

    def __init__(
        self, folder: Path, images: ImageList, rank: int, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__(folder, images, rank, seed, dtype)
        self._held: list[dict[str, Tensor]] = []

    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        """See `Writer`."""
        z = posterior_sample(moments, self.seed, indices).to(self.dtype)
        mirrored = z
        if flipped is not None:
            mirrored = posterior_sample(flipped, self.seed, indices, flip=True).to(self.dtype)
        labels = torch.tensor([self.images.labels[index] for index in indices])
        self._held.append({"latents": z, "latents_flip": mirrored, "labels": labels})

    def close(self, number: int) -> None:
        """See `Writer`."""
        parts, self._held = self._held, []
        shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_shard(self.folder, self.rank, number, shard)

    def finish(self, indices: Sequence[int]) -> None:
        """See `Writer`."""
        write_stats(self.folder)


class _Files(Writer):
    """One file for each picture."""

    def close(self, number: int) -> None:
        """See `Writer`."""
        # Once for a block: to wait for the disk after each of a million files takes hours.
        if hasattr(os, "sync"):
            os.sync()


class MeanStdFiles(_Files):
    """REPA's, in its folder `vae-sd`."""

    takes_flips = False
    subfolder = "vae-sd"

    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        """See `Writer`."""
        both = torch.cat(moments, dim=1).to(self.dtype).numpy()
        for index, rows in zip(indices, both, strict=True):
            _save(self.folder / self.subfolder / file_name(index), partial(np.save, arr=rows))

    def finish(self, indices: Sequence[int]) -> None:
        """See `Writer`."""
        listed = [[file_name(index), self.images.labels[index]] for index in indices]
        text = json.dumps({"labels": listed})
        replace_file(
            self.folder / self.subfolder / "dataset.json", lambda file: file.write_text(text)
        )


class EDM2Files(MeanStdFiles):
    """EDM2's: pixels in [0, 1]."""

    pixels_from = 0.0
    subfolder = ""


class MARFiles(_Files):
    """MAR's, under the names of the classes."""

    def add(self, indices: Sequence[int], moments: Moments, flipped: Moments | None) -> None:
        """See `Writer`."""
        both = [
            torch.cat([mean, 2 * std.log()], dim=1).to(self.dtype).numpy()
            for mean, std in (moments, flipped or moments)
        ]
        for index, rows, mirrored in zip(indices, *both, strict=True):
            _save(
                self.folder / self._name(index),
                partial(np.savez, moments=rows, moments_flip=mirrored),
            )

    def _name(self, index: int) -> str:
        label = self.images.classes[self.images.labels[index]]
        file = self.images.files[index].removeprefix(f"{label}/")
        return f"{label}/{file.replace('/', '%2F')}.npz"

    def finish(self, indices: Sequence[int]) -> None:
        """See `Writer`."""
        # The label is the place of the folder: one without rows has its place too.
        for name in self.images.classes:
            (self.folder / name).mkdir(exist_ok=True)


WRITERS: dict[str, type[Writer]] = {
    "lightningdit": Shards,
    "repa": MeanStdFiles,
    "edm2": EDM2Files,
    "mar": MARFiles,
}


def posterior_sample(
    moments: Moments, seed: int, indices: Sequence[int], flip: bool = False
) -> Tensor:
    """`mean + std * eps`, where eps depends on seed, index and `flip` alone.

    Args:
        moments: `(mean, std)`, each (B, C, h, w), on the CPU.
        seed: Of the draws.
        indices: Those of the pictures, B.
        flip: Whether these are the mirrored pictures.

    Returns:
        (B, C, h, w).
    """
    mean, std = moments
    shape = mean.shape[1:]
    eps = [
        np.random.default_rng((seed, index, int(flip))).standard_normal(shape, dtype=np.float32)
        for index in indices
    ]
    return mean + std * torch.from_numpy(np.stack(eps))


def _save(file: Path, write: Callable[[BinaryIO], object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # The same name each time: what a killed process left is written over.
    other = file.with_name(f".{file.name}.partial")
    try:
        with open(other, "wb") as stream:
            write(stream)
        other.replace(file)
    finally:
        other.unlink(missing_ok=True)
