r"""Tests of the noise that the oracle assumes: standard normal, and independent of the data.

Mean and mean square are tested, each within six standard errors, the latter by Wilson and
Hilferty's cube root, which holds for few numbers too. Independence is tested by

    z = sum_i <x0_i, x1_i - mean(x1)> / sqrt(sum_i |x1_i - mean(x1)|^2),

which is standard normal for standard normal `x0` and any data. Pairs coupled within a batch make it
large and positive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagewise.masks import MaskedLabels, zeroed
from stagewise.paths import Path, PathCoefficients, expand_like

__all__ = [
    "NoiseSums",
    "can_tell",
    "check_independent",
    "check_noise",
    "dependence",
    "is_noise",
    "is_off",
    "noise_of",
]

_NOISE = (
    "The oracle target holds for x0 ~ N(0, I) only: train from torch.randn_like(x1), or steer the "
    "timesteps alone."
)


def can_tell(path: PathCoefficients, dtype: torch.dtype) -> Tensor:
    """Where the noise is ten times the rounding of noisy samples in `dtype`; any shape."""
    return path.sigma >= 10 * torch.finfo(dtype).eps


def noise_of(path: Path, xt: Tensor, t: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of noisy samples, `(x_t - a_t x_1) / s_t`, (B, *), float32, and `can_tell`, (B,).

    Where sigma is lost in the rounding of `xt` the noise is 0.
    """
    values = path(t.to(torch.float32))
    known = can_tell(values, xt.dtype)
    gap = xt.float() - expand_like(values.alpha, x1) * x1.float()
    return gap / expand_like(torch.where(known, values.sigma, torch.inf), x1), known


def is_off(count: int, mean: float, square: float, slack: float = 0.0) -> bool:
    """Whether a mean or a mean square of `count` normal numbers is beyond six standard errors."""
    error = math.sqrt(2 / (9 * count))
    off = abs(square ** (1 / 3) - 1 + error**2) > 6 * error + slack
    return off or abs(mean) > 6 / math.sqrt(count) + slack


def _moments(x0: Tensor) -> tuple[int, float, float]:
    values = x0.float()
    return x0.numel(), float(values.mean()), float(values.square().mean())


def check_noise(x0: Tensor) -> None:
    """Refuses noise that is not standard normal."""
    _check_moments(*_moments(x0))


def is_noise(x0: Tensor) -> bool:
    """Whether values are standard normal, judged by mean and mean square."""
    return not is_off(*_moments(x0))


def _check_moments(count: int, mean: float, square: float) -> None:
    if is_off(count, mean, square):
        raise ValueError(
            f"Expected `x0` to be standard normal noise, got a mean of {mean:.3g} and a mean "
            f"square of {square:.3g}. {_NOISE}"
        )


def dependence(x0: Tensor, x1: Tensor) -> float:
    """The z of the module for noise and its data, both (B, *)."""
    product, size = _leaning(x0.detach().float(), x1.detach().float()).tolist()
    return product / math.sqrt(size) if size else 0.0


def _leaning(x0: Tensor, x1: Tensor) -> Tensor:
    """Numerator and squared denominator of `dependence`, (2,)."""
    gap = x1 - (x1.mean(0) if len(x1) > 1 else x1.mean())
    return torch.stack([(x0 * gap).sum(), gap.square().sum()])


def check_independent(x0: Tensor, x1: Tensor) -> None:
    """Refuses standard normal noise, (B, *), that depends on its data, (B, *)."""
    _check_leaning(dependence(x0, x1))


def _check_leaning(z: float) -> None:
    if abs(z) > 6:
        raise ValueError(
            f"Expected `x0` to be independent of `x1`, but they correlate, {z:.1f} standard errors "
            "from zero. Is noise paired with data, as by optimal transport within the batch? The "
            "closed form of the oracle holds for independent pairs only: train from "
            "x0 = torch.randn_like(x1)."
        )


class NoiseSums:
    """Sums over the noise and data of several batches, for tests with more samples than one has.

    `add` costs no device sync, `check` does.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._samples = 0

    def add(self, x0: Tensor, x1: Tensor, labels: object = None) -> None:
        """Adds the noise and data of a batch, both (B, *); of masked labels, the valid numbers."""
        if x0.shape != x1.shape or x0.ndim < 2 or not x0.numel():
            return
        x0, x1 = zeroed(x0, labels), zeroed(x1, labels)
        x0, x1 = x0.detach().flatten(1).float(), x1.detach().flatten(1).float()
        count = torch.full_like(x0[:, 0], x0.shape[1])
        if isinstance(labels, MaskedLabels):
            count = labels.counts.to(count)
        of_samples = (x0.sum(1).square() / count).sum()
        own = torch.stack([x0.sum(), x0.square().sum(), of_samples, count.sum()])
        sums = torch.cat([own, _leaning(x0, x1)])
        sums = sums if x0.device.type == "mps" else sums.double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._samples += len(x0)

    def check(self) -> None:
        """Refuses noise that is not standard normal, or not independent of its data."""
        if self._sums is None:
            return
        total, square, of_samples, count, product, size = self._sums.tolist()
        _check_moments(round(count), total / count, square / count)
        # The means of samples have a variance of 1 / D: an offset of each sample shows there first.
        spread = of_samples / self._samples
        if is_off(self._samples, 0.0, spread):
            raise ValueError(
                "Expected `x0` to be standard normal noise, got samples whose means vary "
                f"{spread:.3g} times as much as those of such noise: is an offset added to each? "
                f"{_NOISE}"
            )
        _check_leaning(product / math.sqrt(size) if size else 0.0)
