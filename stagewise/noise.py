r"""Whether noise is what the closed form of the oracle needs: normal, and independent of the data.

A mean and a mean square are tested, each within six standard errors, the latter by Wilson and
Hilferty's cube root, which holds for few numbers too. Independence is tested by

    z = sum_i <x0_i, x1_i - mean(x1)> / sqrt(sum_i |x1_i - mean(x1)|^2),

which is standard normal for standard normal `x0`, whatever the data are. Pairs coupled within a
batch make it large and positive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """The noise of noisy samples, `(x_t - a_t x_1) / s_t`, and where that can be said.

    Returns:
        `x_0`, (B, *), float32, and whether sigma is so large that the rounding of `xt` leaves at
        least a tenth of it unspoilt, (B,). Elsewhere it is 0.
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


def check_noise(x0: Tensor) -> None:
    """Refuses a source that is not standard normal."""
    values = x0.float()
    _check_moments(x0.numel(), float(values.mean()), float(values.square().mean()))


def is_noise(x0: Tensor) -> bool:
    """Whether a source is standard normal, as far as its moments tell."""
    values = x0.float()
    return not is_off(x0.numel(), float(values.mean()), float(values.square().mean()))


def _check_moments(count: int, mean: float, square: float) -> None:
    if is_off(count, mean, square):
        raise ValueError(
            f"Expected `x0` to be standard normal noise, got a mean of {mean:.3g} and a mean "
            f"square of {square:.3g}. {_NOISE}"
        )


def dependence(x0: Tensor, x1: Tensor) -> float:
    """By how many standard errors noise leans towards its data, both (B, *); see the module."""
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
    """Noise and its data, summed over batches: what a few samples do not show, many do.

    Adding waits for no device, `check` does.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._values = self._samples = 0

    def add(self, x0: Tensor, x1: Tensor) -> None:
        """Adds the pairs of a batch: noise and data, both (B, *)."""
        if x0.shape != x1.shape or x0.ndim < 2 or not x0.numel():
            return
        x0, x1 = x0.detach().flatten(1).float(), x1.detach().flatten(1).float()
        own = torch.stack([x0.sum(), x0.square().sum(), x0.sum(1).square().sum() / x0.shape[1]])
        sums = torch.cat([own, _leaning(x0, x1)])
        sums = sums if x0.device.type == "mps" else sums.double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._values, self._samples = self._values + x0.numel(), self._samples + len(x0)

    def check(self) -> None:
        """Refuses noise that is not standard normal, or not independent of its data."""
        if self._sums is None:
            return
        total, square, of_samples, product, size = self._sums.tolist()
        _check_moments(self._values, total / self._values, square / self._values)
        # The means of samples vary by 1 / D: an offset of each shows there first.
        spread = of_samples / self._samples
        if is_off(self._samples, 0.0, spread):
            raise ValueError(
                "Expected `x0` to be standard normal noise, got samples whose means vary "
                f"{spread:.3g} times as much as those of such noise: is an offset added to each? "
                f"{_NOISE}"
            )
        _check_leaning(product / math.sqrt(size) if size else 0.0)
