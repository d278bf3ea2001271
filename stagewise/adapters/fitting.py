r"""Whether tensors are `x_t` and t of known data: the noise that is left must be that of training.

From `x_t`, t and `x_1` on a path

    x_0 = (x_t - a_t x_1) / s_t,

which for the right ones is standard normal and independent of `x_1`. Neither alone is enough: for
standard normal data `x_0` of `x_t = x_1` at t = 0 is normal, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewise.adapters.base import dependence
from stagewise.paths import Path, PathCoefficients, expand_like

__all__ = ["Noisy", "can_tell", "factor_of", "noise_of"]

_NOISY = 0.05
"""The least sigma at which the noise of a sample is held against a normal distribution."""


def noise_of(path: Path, xt: Tensor, t: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The noise of a noisy sample, and where that can be said.

    Args:
        path: The path.
        xt: Noisy samples, (B, *).
        t: Times in [0, 1], (B,).
        x1: What they were made from, (B, *).

    Returns:
        `x_0`, (B, *), float32, and whether sigma is so large that the rounding of `xt` leaves at
        least a tenth of it unspoilt, (B,). Elsewhere it is 0.
    """
    values = path(t.to(torch.float32))
    known = can_tell(values, xt.dtype)
    gap = xt.float() - expand_like(values.alpha, x1) * x1.float()
    x0 = gap / expand_like(torch.where(known, values.sigma, torch.inf), x1)
    return x0, known


def can_tell(path: PathCoefficients, dtype: torch.dtype) -> Tensor:
    """Where the noise is ten times the rounding of noisy samples in `dtype`; any shape."""
    return path.sigma >= 10 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Noisy:
    """What may be noisy samples with their times.

    Attributes:
        path: Their path.
        xt: (B, *).
        t: (B,).
        rounding: The coarsest precision, relative to 1, in which they and the data are known.
    """

    path: Path
    xt: Tensor
    t: Tensor
    rounding: float

    def _rows(self, least: float) -> Tensor | None:
        """Where sigma is at least that, and more than rounding spoils; None where nowhere."""
        if not bool(((self.t >= -1e-4) & (self.t <= 1 + 1e-4)).all()):
            return None
        rows = self.path(self.t.float()).sigma >= max(least, 20 * self.rounding)
        return rows if bool(rows.any()) else None

    def leans(self, x1: Tensor) -> float | None:
        """`dependence` of the noise on data, 0 where it is within six standard errors.

        None if the noise is not standard normal. The mean and the mean square are tested, each
        within six standard errors, or what rounding explains.
        """
        rows = self._rows(_NOISY)
        if rows is None:  # in a batch of few
            rows = self._rows(1e-3)
        if rows is None:
            return None
        x0 = noise_of(self.path, self.xt, self.t, x1)[0][rows]
        n, slack = x0.numel(), 0.02 + 5 * self.rounding
        mean, square = float(x0.mean()), float(x0.square().mean())
        # NaN compares as False.
        if not abs(mean) < max(6 / math.sqrt(n), slack):
            return None
        if not abs(square - 1) < max(6 * math.sqrt(2 / n), slack):
            return None
        z = dependence(x0, x1[rows])
        return z if abs(z) > max(6, 5 * self.rounding * math.sqrt(n)) else 0.0

    def fits(self, x1: Tensor) -> bool:
        """Whether they were made from these data, (B, *)."""
        return self.leans(x1) == 0

    def scale(self, x1: Tensor) -> float | None:
        """The factor by which data were scaled, to about its error; None if by none.

        That is by weighted least squares, `k = sum (a/s^2) <x_t, x_1> / sum (a/s)^2 |x_1|^2`.
        """
        rows = self._rows(1e-4)  # there the noise hides the data least
        if rows is None:
            return None
        path, x = self.path(self.t[rows].float()), x1[rows].flatten(1).float()
        weight = path.alpha / path.sigma
        size = float((weight.square() * x.square().sum(1)).sum())
        inner = float((weight / path.sigma * (self.xt[rows].flatten(1).float() * x).sum(1)).sum())
        k = inner / size if size else 0.0
        if abs(k) * math.sqrt(size) < 6 or not self.fits(k * x1):
            return None
        digits = max(2, math.ceil(math.log10(abs(k) * math.sqrt(size))))
        return float(f"{k:.{digits}g}")


def factor_of(x: Tensor, x1: Tensor) -> float | None:
    """The factor k with `x = k x_1`, both (B, *); None if there is none."""
    if x.shape != x1.shape:
        return None
    x, x1 = x.detach().float(), x1.detach().float()
    size = float(x1.square().sum())
    k = float((x * x1).sum()) / size if size else 0.0
    gap = float(torch.linalg.vector_norm(x - k * x1))
    return float(f"{k:.5g}") if gap < 5e-3 * float(torch.linalg.vector_norm(x)) else None
