r"""Tests whether tensors are `x_t` and t of known data, by the noise that they imply.

From `x_t`, t and `x_1` on a path

    x_0 = (x_t - a_t x_1) / s_t,

which is standard normal and independent of `x_1` if they belong together. Normal noise alone is not
enough: for standard normal data, `x_t = x_1` at t = 0 gives normal noise too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagewise.noise import dependence, noise_of
from stagewise.paths import Path, expand_like

__all__ = ["Noisy", "arranged", "factor_of", "flip_of", "layout_of"]

_NOISY = 0.05
"""The least sigma at which the noise of a sample is tested."""


@dataclass(frozen=True)
class Noisy:
    """What may be noisy samples with their times."""

    path: Path
    xt: Tensor  # (B, *)
    t: Tensor  # (B,)
    rounding: float  # the coarsest relative precision of these and the data

    def _rows(self, least: float) -> Tensor | None:
        """Which samples have at least that sigma, and more than rounding; None if none have."""
        if not bool(((self.t >= -1e-4) & (self.t <= 1 + 1e-4)).all()):
            return None
        rows = self.path(self.t.float()).sigma >= max(least, 20 * self.rounding)
        return rows if bool(rows.any()) else None

    def rows(self) -> Tensor | None:
        """Which samples have enough noise to test, (B,); None if none have."""
        rows = self._rows(_NOISY)
        return self._rows(1e-3) if rows is None else rows  # a small batch

    def leans(self, x1: Tensor) -> float | None:
        """`dependence` of the noise on data, 0 if it is within six standard errors.

        None if the noise is not standard normal: mean and mean square are tested, each within six
        standard errors, or what rounding explains. None, too, if `x_t` holds so little of the data
        that other data, or times in other units (class labels of 1000), would pass.
        """
        rows = self.rows()
        if rows is None:
            return None
        path, x = self.path(self.t[rows].float()), x1[rows].flatten(1).float()
        size = float(x.norm())
        least = 0.01 * size if len(x1) == 1 else min(6, 0.1 * size)
        if float((expand_like(path.alpha / path.sigma, x) * x).norm()) < least:
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
        """The factor by which data were scaled, rounded to about its error; None if none fits.

        By weighted least squares, `k = sum (a/s^2) <x_t, x_1> / sum (a/s)^2 |x_1|^2`.
        """
        rows = self._rows(1e-4)  # samples with little noise show the data best
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
    """The factor k with `x = k x_1`, both (B, *), or None."""
    if x.shape != x1.shape:
        return None
    x, x1 = x.detach().float(), x1.detach().float()
    size = float(x1.square().sum())
    k = float((x * x1).sum()) / size if size else 0.0
    gap = float(torch.linalg.vector_norm(x - k * x1))
    return float(f"{k:.5g}") if gap < 5e-3 * float(torch.linalg.vector_norm(x)) else None


def arranged(x1: Tensor, shape: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Data with permuted axes, and flat data as transposed matrices, (B, *shape), after code.

    The code is to be written after `x_1`, which is left out itself.
    """
    size, shape = math.prod(x1.shape[1:]), tuple(shape)
    if math.prod(shape) != size:
        return
    back = f".reshape(-1, {', '.join(map(str, shape))})"
    for order in itertools.permutations(range(1, x1.ndim)):
        x = x1.permute(0, *order)
        same = list(order) == sorted(order)
        text = "" if same else f".permute(0, {', '.join(map(str, order))})"
        if not same or x.shape[1:] != shape:
            yield (text if x.shape[1:] == shape else text + back), x.reshape(-1, *shape)
    for rows in range(2, size) if x1.ndim == 2 else ():
        if size % rows == 0:
            text = f".reshape(-1, {rows}, {size // rows}).transpose(1, 2)"
            yield text + back, x1.reshape(-1, rows, size // rows).mT.reshape(-1, *shape)


def layout_of(x: Tensor, x1: Tensor) -> str | None:
    """The order of values that makes `x` of `x_1`, both (B, ...), the same in all samples.

    As code to write after `x_1`; "" if there is no short one; None if there is no such order, or it
    is a flip, which augments.
    """
    if len(x) != len(x1) or x.numel() != x1.numel():
        return None
    x1 = x1.to(x)
    for text, made in arranged(x1, x.shape[1:]):
        if torch.equal(made, x):
            return text
    if x1.ndim > 3 and torch.equal(x1.flip(1), x):
        return ".flip(1)"
    if flip_of(x, x1):
        return None
    # A column is one value of all samples. In a small batch all samples may have the same flip.
    columns, others = x.flatten(1).double(), x1.flatten(1).double()
    weight = torch.linspace(1, 2, len(x), dtype=torch.float64, device=x.device).sqrt()[:, None]
    order = [(weight * each).sum(0).argsort() for each in (columns, others)]
    same = torch.equal(columns[:, order[0]], others[:, order[1]])
    return "" if same and len(x) >= 8 else None


def flip_of(x: Tensor, x1: Tensor) -> str:
    """The flip of all samples that makes `x` of `x_1`, both (B, *), as code; or empty."""
    axes = range(2 if x1.ndim > 3 else 1, x1.ndim)  # channels are not flipped to augment
    for count in range(1, len(axes) + 1):
        for dims in itertools.combinations(axes, count):
            if x.shape == x1.shape and torch.equal(x1.flip(dims).to(x), x):
                return f".flip({', '.join(map(str, dims))})"
    return ""
