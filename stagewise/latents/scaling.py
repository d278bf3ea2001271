"""From what a file stores to what a model trains on.

Two forms cover the formats: `x = (z - mean) / std * multiplier` of rows stored raw with their
statistics, and `x = gain z + bias` with constants that belong to the autoencoder. Both are computed
in float32 in the order of the public readers, so that the numbers are theirs to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AS_STORED", "EDM2", "KL16", "SD_VAE", "Affine", "Normalised", "Scaling"]


class Scaling:
    """A map from stored numbers z, (*, C, H, W), to samples x."""

    def __call__(self, z: Tensor) -> Tensor:
        """The samples, float32; never a view of `z`."""
        raise NotImplementedError

    def invert(self, x: Tensor) -> Tensor:
        """What is stored for samples, float32."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Normalised(Scaling):
    """`(z - mean) / std * multiplier`.

    Attributes:
        mean: Per channel, (C, 1, 1), float32.
        std: Per channel, (C, 1, 1), float32, positive.
        multiplier: Default 1.
    """

    mean: Tensor
    std: Tensor
    multiplier: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        """See `Scaling`."""
        return _own(z).sub_(self.mean).div_(self.std).mul_(self.multiplier)

    def invert(self, x: Tensor) -> Tensor:
        """See `Scaling`."""
        return x.float() / self.multiplier * self.std + self.mean

    def __str__(self) -> str:
        times = "" if self.multiplier == 1 else f" * {self.multiplier:g}"
        return f"(z - mean) / std{times}"


@dataclass(frozen=True)
class Affine(Scaling):
    """`z * gain + bias`, with one number for all channels or one for each.

    Attributes:
        gain: One number, or C of them.
        bias: The same; empty: nothing is added.
    """

    gain: tuple[float, ...] = (1.0,)
    bias: tuple[float, ...] = ()

    def __call__(self, z: Tensor) -> Tensor:
        """See `Scaling`."""
        x = _own(z).mul_(_columns(self.gain))
        return x.add_(_columns(self.bias)) if self.bias else x

    def invert(self, x: Tensor) -> Tensor:
        """See `Scaling`."""
        x = x.float() - _columns(self.bias) if self.bias else x.float()
        return x / _columns(self.gain)

    def __str__(self) -> str:
        if len(self.gain) > 1:
            return "z * gain + bias, per channel"
        return "as stored" if self.gain == (1.0,) else f"z * {self.gain[0]:g}"


def _own(z: Tensor) -> Tensor:
    return z.to(torch.float32, copy=True)


def _columns(values: tuple[float, ...]) -> Tensor:
    if len(values) == 1:  # of any shape: samples need not be pictures
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
