"""`make_latents`: made-up latents with the statistics that matter for the stages, in any format.

A row is a Gaussian field whose power falls with spatial frequency as `|k|^-exponent`, as that of
natural pictures does (Field 1987: about 2), around the mean of its class, a field of the same kind.
Numbers have mean 0 and variance 1, of which `class_share` lies between classes. Files are written
as the public projects write theirs, in the scale of theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stagewise.latents.fast_dit import write_fast_dit
from stagewise.latents.lightningdit_writer import write_latents
from stagewise.latents.mar import write_mar
from stagewise.latents.mean_std import write_mean_std
from stagewise.latents.opening import FORMATS, Format
from stagewise.latents.plain import write_plain
from stagewise.latents.scaling import EDM2, KL16, SD_VAE, Normalised

__all__ = ["make_latents", "made_rows"]

_BLOCK = 1024  # rows made at a time: part of what a seed means

_SPREAD = 0.05
"""Standard deviation of the made posteriors, relative to that of the samples."""


def make_latents(
    path: str | os.PathLike[str],
    num_rows: int,
    shape: tuple[int, int, int] = (4, 32, 32),
    num_classes: int = 1000,
    format: Format = "lightningdit",  # noqa: A002 - as in open_latents
    *,
    seed: int = 0,
    exponent: float = 2.0,
    class_share: float = 0.2,
    duplicates: int = 0,
    shard_size: int = 10_000,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Makes latents and writes them.

    Args:
        path: The folder; a file for "plain", and a folder or `.zip` for "repa" and "edm2".
        num_rows: N.
        shape: (C, H, W) of a sample. "edm2" has 4 channels.
        num_classes: Classes, in turn over the rows: each is there if N is as large. Default 1000.
        format: As in `open_latents`.
        seed: Default 0. The samples of a seed are the same in every format and shard size, but for
            rounding.
        exponent: Of the power spectrum, default 2.
        class_share: Share of the variance between classes, in [0, 1), default 0.2.
        duplicates: How many rows at the end are copies of others, label and moments included.
        shard_size: Of LightningDiT's shards, default 10 000.
        dtype: Of the stored numbers, default float32.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If there are files at the path.
    """
    if format not in FORMATS:
        raise ValueError(f"Expected `format` among {tuple(FORMATS)}, got {format!r}.")
    if format == "edm2" and shape[0] != 4:
        raise ValueError(f"Expected 4 channels for edm2, got shape {shape}.")
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"Expected a new or empty place, got {path}. Choose another, or empty it."
        )
    blocks = made_rows(
        num_rows,
        shape,
        num_classes,
        seed=seed,
        exponent=exponent,
        class_share=class_share,
        duplicates=duplicates,
    )
    if format == "plain":
        x, _, labels = (torch.cat(column) for column in zip(*blocks, strict=True))
        return write_plain(path, x.to(dtype), labels)
    if format == "fast-dit":
        return write_fast_dit(path, ((x.to(dtype), y) for x, _, y in blocks))
    if format == "lightningdit":
        # Raw latents have means and scales of their own by channel, which the writer measures.
        draws = np.random.default_rng((seed, 7))
        mean, std = (
            torch.from_numpy(values).float()[:, None, None]
            for values in (draws.normal(0, 1, shape[0]), draws.uniform(2, 5, shape[0]))
        )
        raw = Normalised(mean, std)
        batches = ((raw.invert(x), raw.invert(flip), y) for x, flip, y in blocks)
        return write_latents(path, batches, shard_size=shard_size, dtype=dtype)
    stored = _Moments(format, dtype)
    if format == "mar":
        return write_mar(path, ((stored(x), stored(flip), y) for x, flip, y in blocks))
    place = path / "vae-sd" if format == "repa" and path.suffix != ".zip" else path
    write_mean_std(place, ((stored(x), y) for x, _, y in blocks))
    return path


def made_rows(
    num_rows: int,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    seed: int = 0,
    exponent: float = 2.0,
    class_share: float = 0.2,
    duplicates: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The samples, block by block; arguments as in `make_latents`.

    Yields:
        `(x_1, its flip, labels)`: (n, C, H, W) twice and (n,). The flip is the mirrored sample.
    """
    if num_rows < 1 or num_classes < 1 or min(shape) < 1 or len(shape) != 3:
        raise ValueError(
            f"Expected at least 1 row, 1 class and a shape (C, H, W), got {num_rows}, "
            f"{num_classes} and {shape}."
        )
    if not 0 <= class_share < 1:
        raise ValueError(f"Expected `class_share` in [0, 1), got {class_share}.")
    if not 0 <= duplicates < num_rows:
        raise ValueError(f"Expected `duplicates` from 0 to below {num_rows}, got {duplicates}.")
    return _blocks(num_rows, shape, num_classes, seed, exponent, class_share, duplicates)


def _blocks(
    num_rows: int,
    shape: tuple[int, int, int],
    num_classes: int,
    seed: int,
    exponent: float,
    class_share: float,
    duplicates: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    unique = num_rows - duplicates
    # Copies of the first rows, each once as far as they go.
    source = torch.cat([torch.arange(unique), torch.arange(duplicates) % unique])
    middles = _field((seed, 0), num_classes, shape, exponent) * class_share**0.5
    held: tuple[int, Tensor] = (-1, middles)

    def row(index: int) -> Tensor:
        nonlocal held
        block = index // _BLOCK
        if held[0] != block:
            held = (block, _field((seed, 1, block), _BLOCK, shape, exponent))
        return held[1][index % _BLOCK]

    for start in range(0, num_rows, _BLOCK):
        rows = source[start : start + _BLOCK].tolist()
        labels = torch.tensor(rows) % num_classes
        within = torch.stack([row(index) for index in rows])
        x = middles[labels] + within * (1 - class_share) ** 0.5
        yield x, x.flip(-1), labels


def _field(
    seed: tuple[int, ...], count: int, shape: tuple[int, int, int], exponent: float
) -> Tensor:
    """Gaussian fields of variance 1 with a power-law spectrum, (count, C, H, W), float32."""
    channels, height, width = shape
    frequency = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * height,
        torch.fft.rfftfreq(width, dtype=torch.float64)[None] * width,
    )
    amplitude = frequency.clamp_min(1) ** (-exponent / 2)
    # Columns of a real transform that stand for two count twice.
    double = torch.full((amplitude.shape[1],), 2.0, dtype=torch.float64)
    double[0] = 1
    if width % 2 == 0:
        double[-1] = 1
    amplitude /= ((amplitude.square() * double).sum() / (height * width)).sqrt()
    white = np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)
    spectrum = torch.fft.rfft2(torch.from_numpy(white)) * amplitude.float()
    return torch.fft.irfft2(spectrum, s=(height, width))


class _Moments:
    """From samples to mean and standard deviation (or log-variance), (B, 2C, H, W)."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.scaling = {"repa": SD_VAE, "edm2": EDM2, "mar": KL16}[kind]
        self.unit = 0.5 if kind == "edm2" else 1.0
        self.logs, self.dtype = kind == "mar", dtype

    def __call__(self, x: Tensor) -> Tensor:
        mean = self.scaling.invert(x * self.unit)
        gain = torch.tensor(self.scaling.gain)[:, None, None]
        std = (_SPREAD * self.unit / gain).expand_as(mean)
        return torch.cat([mean, 2 * std.log() if self.logs else std], dim=1).to(self.dtype)
