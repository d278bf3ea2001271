"""`make_latents`: made-up latents with the statistics that matter for the stages, in any format.

A row is a Gaussian field whose power falls with spatial frequency as `|k|^-exponent`, as in natural
images (Field 1987: about 2), around the mean of its class, a field of the same kind. Numbers have
mean 0 and variance 1; a fifth of the variance is between classes. Files have the layout and the
scale of the public projects.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stagewise.files import FilePath
from stagewise.latents.base import Block, Writing
from stagewise.latents.opening import require_format

__all__ = ["made_rows", "make_latents"]

_CLASS_SHARE = 0.2  # of the variance, between classes
_BLOCK = 1024  # rows made at a time; another number gives other rows for a seed


def make_latents(
    path: FilePath,
    num_rows: int,
    shape: tuple[int, int, int] = (4, 32, 32),
    num_classes: int = 1000,
    format: str = "lightningdit",  # noqa: A002 - as in open_latents
    *,
    seed: int = 0,
    exponent: float = 2.0,
    duplicates: int = 0,
    shard_size: int = 10_000,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Makes latents and writes them.

    Args:
        path: The folder; a file for "plain", and a folder or `.zip` for "repa" and "edm2".
        num_rows: N.
        shape: (C, H, W) of a sample. "edm2" has 4 channels.
        num_classes: Number of classes, default 1000; rows take them in turn.
        format: As in `open_latents`.
        seed: Default 0. The samples of a seed are the same in every format and shard size, up to
            rounding.
        exponent: Of the power spectrum, default 2.
        duplicates: How many rows at the end equal earlier ones, with label and moments.
        shard_size: Of LightningDiT's shards, default 10 000.
        dtype: Of the stored numbers, default float32.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If there are files at the path.
    """
    kind = require_format(format)
    if kind.scaling.channels not in (None, shape[0]):
        raise ValueError(f"Expected {kind.scaling.channels} channels for {format}, got {shape}.")
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"Expected a new or empty place, got {path}. Choose another, or empty it."
        )
    rows = made_rows(num_rows, shape, num_classes, seed, exponent, duplicates)
    unit, first = kind.usual_std, next(rows)  # checks the arguments before a file is written
    blocks = ((x * unit, flip * unit, y) for x, flip, y in chain([first], rows))
    return kind.write(path, blocks, Writing(dtype, shard_size, seed))


def made_rows(
    num_rows: int,
    shape: tuple[int, int, int],
    num_classes: int,
    seed: int = 0,
    exponent: float = 2.0,
    duplicates: int = 0,
) -> Iterator[Block]:
    """The samples, block by block: `(x_1, its mirror image, labels)`, (n, C, H, W) and (n,)."""
    if num_rows < 1 or num_classes < 1 or min(shape) < 1 or len(shape) != 3:
        raise ValueError(
            f"Expected at least 1 row, 1 class and a shape (C, H, W), got {num_rows}, "
            f"{num_classes} and {shape}."
        )
    if not 0 <= duplicates < num_rows:
        raise ValueError(f"Expected `duplicates` from 0 to below {num_rows}, got {duplicates}.")
    unique = num_rows - duplicates
    # The duplicates repeat the first rows in turn.
    source = torch.cat([torch.arange(unique), torch.arange(duplicates) % unique])
    middles = _field((seed, 0), num_classes, shape, exponent) * _CLASS_SHARE**0.5

    @lru_cache(maxsize=1)
    def fields(block: int) -> Tensor:
        return _field((seed, 1, block), _BLOCK, shape, exponent)

    for start in range(0, num_rows, _BLOCK):
        rows = source[start : start + _BLOCK].tolist()
        labels = torch.tensor(rows) % num_classes
        within = torch.stack([fields(row // _BLOCK)[row % _BLOCK] for row in rows])
        x = middles[labels] + within * (1 - _CLASS_SHARE) ** 0.5
        yield x, x.flip(-1), labels


def _field(
    seed: tuple[int, ...], count: int, shape: tuple[int, int, int], exponent: float
) -> Tensor:
    """Gaussian fields of variance 1 with a power-law spectrum, (count, C, H, W), float32."""
    channels, height, width = shape
    frequency = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * height,
        torch.fft.fftfreq(width, dtype=torch.float64)[None] * width,
    )
    amplitude = frequency.clamp_min(1) ** (-exponent / 2)
    amplitude /= amplitude.square().mean().sqrt()
    white = np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)
    # A real transform has no negative frequencies.
    positive = amplitude[:, : width // 2 + 1].float()
    spectrum = torch.fft.rfft2(torch.from_numpy(white)) * positive
    return torch.fft.irfft2(spectrum, s=(height, width))
