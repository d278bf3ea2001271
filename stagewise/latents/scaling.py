"""The map from stored numbers to the samples that a model trains on.

Two forms cover the formats: `x = (z - mean) / std * multiplier` for rows stored raw with their
statistics, and `x = gain z + bias` with constants that belong to the autoencoder. Both are computed
in float32 in the order of the public readers, so the results are equal to the last bit.

`ChannelStatistics` computes mean and standard deviation by channel in one pass without loss of
digits. Batches are merged by Welford's recurrence in the form of Chan, Golub and LeVeque (1979), in
float64: for two sets with counts n, m, means a, b and sums of squared deviations A, B,

    mean = a + (b - a) m / (n + m),    S = A + B + (b - a)^2 n m / (n + m).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from stagewise.files import first_line, joined, replace_file
from stagewise.latents.arrays import check_zip, is_dense

__all__ = [
    "AS_STORED",
    "EDM2",
    "KL16",
    "SD_VAE",
    "STATS",
    "Affine",
    "ChannelStatistics",
    "Normalised",
    "Scaling",
    "read_stats",
    "save_stats",
]

STATS = "latents_stats.pt"
"""Of LightningDiT: mean and standard deviation by channel, beside the shards."""


@dataclass(frozen=True, eq=False)
class Normalised:
    """`(z - mean) / std * multiplier`."""

    mean: Tensor  # by channel, (C, 1, 1), float32
    std: Tensor  # the same, positive
    multiplier: float = 1.0
    channels: ClassVar[None] = None  # it is made for the channels of the file

    def __call__(self, z: Tensor) -> Tensor:
        """The samples of stored numbers (*, C, H, W), float32; never a view."""
        return _own(z).sub_(self.mean).div_(self.std).mul_(self.multiplier)

    def invert(self, x: Tensor) -> Tensor:
        """What is stored for samples, float32."""
        return x.float() / self.multiplier * self.std + self.mean

    def __str__(self) -> str:
        times = "" if self.multiplier == 1 else f" * {self.multiplier:g}"
        return f"(z - mean) / std{times}"


@dataclass(frozen=True)
class Affine:
    """`z * gain + bias`, with one number for all channels or one for each."""

    gain: tuple[float, ...] = (1.0,)
    bias: tuple[float, ...] = ()  # empty: nothing is added

    @property
    def channels(self) -> int | None:
        """C, if there is one number for each channel."""
        return len(self.gain) if len(self.gain) > 1 else None

    def __call__(self, z: Tensor) -> Tensor:
        """The samples of stored numbers (*, C, H, W), float32; never a view."""
        x = _own(z).mul_(_columns(self.gain))
        return x.add_(_columns(self.bias)) if self.bias else x

    def invert(self, x: Tensor) -> Tensor:
        """What is stored for samples, float32."""
        x = x.float() - _columns(self.bias) if self.bias else x.float()
        return x / _columns(self.gain)

    def __str__(self) -> str:
        if len(self.gain) > 1:
            return "z * gain + bias, per channel"
        return "as stored" if self.gain == (1.0,) else f"z * {self.gain[0]:g}"


Scaling: TypeAlias = "Normalised | Affine"
"""From stored numbers to samples."""


def _own(z: Tensor) -> Tensor:
    return z.to(torch.float32, copy=True)


def _columns(values: tuple[float, ...]) -> Tensor:
    if len(values) == 1:  # for any shape: samples need not be images
        return torch.tensor(values[0], dtype=torch.float32)
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _edm2() -> Affine:
    mean = torch.tensor([5.81, 3.25, 0.12, -2.15])
    gain = torch.tensor(0.5) / torch.tensor([4.17, 4.62, 3.71, 3.28])
    return Affine(tuple(gain.tolist()), tuple((0 - mean * gain).tolist()))


AS_STORED = Affine()
"""Latents that are scaled already."""

SD_VAE = Affine((0.18215,))
"""Stable Diffusion's autoencoder, pixels in [-1, 1] (DiT, SiT, REPA)."""

KL16 = Affine((0.2325,))
"""MAR's KL-16 autoencoder."""

EDM2 = _edm2()
"""Stable Diffusion's autoencoder, pixels in [0, 1], to a standard deviation of 0.5 (EDM2)."""


class ChannelStatistics:
    """Moments of samples (B, C, *) by channel, and of (B, C) by column.

    Attributes:
        count: Numbers seen in each channel.
        mean: (C,), float64.
        squares: Sum of squared deviations from `mean`, (C,), float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.squares = torch.zeros(0), torch.zeros(0)

    def update(self, z: Tensor) -> None:
        """Adds samples, (B, C, *)."""
        columns = z.double().movedim(1, 0).flatten(1)
        count, mean = columns.shape[1], columns.mean(1)
        squares = (columns - mean[:, None]).square_().sum(1)
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, gap = self.count + count, mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.count = total

    def std(self, correction: int = 1) -> Tensor:
        """Standard deviation, (C,), float64; by default with n - 1, as in `torch.std`."""
        return (self.squares / max(1, self.count - correction)).sqrt()

    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all numbers together, around their one mean."""
        mean = self.mean.mean()
        variance = self.squares.mean() / max(1, self.count) + (self.mean - mean).square().mean()
        return float(mean), float(variance.sqrt())


def read_stats(file: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, each (C, 1, 1), float32."""
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {STATS} with the mean and standard deviation of the latents, got none in "
            f"{file.parent}. Compute it: write_stats(folder). If they are not normalised: "
            "normalize=False with multiplier=0.18215 for Stable Diffusion's autoencoder, "
            "multiplier=1.0 for latents that are already scaled."
        )
    again = "Compute it again: write_stats(folder)."
    try:
        check_zip(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise ValueError(
            f"{file} cannot be read as a file of tensors ({first_line(error)}). {again}"
        ) from error
    if not isinstance(held, Mapping) or not {"mean", "std"} <= held.keys():
        found = joined(held) if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"Expected {{'mean': ..., 'std': ...}} in {file}, got {found}. {again}")
    for name in ("mean", "std"):
        shape = tuple(held[name].shape) if is_dense(held[name]) else ()
        if shape not in ((1, channels, 1, 1), (channels, 1, 1), (channels,)):
            raise ValueError(
                f"Expected `{name}` of shape {(1, channels, 1, 1)} in {file}, for latents with "
                f"{channels} channels, got {shape}. It belongs to other latents. {again}"
            )
    mean, std = (held[name].float().reshape(channels, 1, 1) for name in ("mean", "std"))
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"Expected finite numbers, `std` above 0, in {file}, got others. {again}")
    return mean, std


def save_stats(folder: Path, mean: Tensor, std: Tensor) -> None:
    """Writes `latents_stats.pt` for C channels, from numbers (C,)."""
    stats = {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}

    def save(partial: Path) -> None:
        with open(partial, "wb") as file:  # given a name, torch.save would record it
            torch.save(stats, file)

    replace_file(folder / STATS, save)
