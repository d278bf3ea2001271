r"""The paths of other libraries, as `a_t, s_t, a'_t, s'_t`.

A library may add a second noise to `x_t`: torchcfm's `sigma` adds `sigma eps`. Two independent
Gaussians are one,

    x_t = a_t x_1 + s_t x_0 + sigma eps = a_t x_1 + s~_t z,   s~_t^2 = s_t^2 + sigma^2,

and the mean of the conditional target `a'_t x_1 + s'_t x_0` given `x_t` and `x_1` is

    E[a' x_1 + s' x_0 | x_1, x_t] = a' x_1 + (s' s / s~^2) (x_t - a x_1) = a' x_1 + s~' z,

because `s~' = s s' / s~`: the velocity of the path `(a, s~)`. So that path's oracle is the oracle
of the library's target. (For the linear path: `m - (1 - t)(x_t - t m) / v` with
`v = (1 - t)^2 + sigma^2`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.paths import CosinePath, LinearPath, Path, PathCoefficients, VPPath, same_path

__all__ = ["LibraryPath", "NoisedPath", "ShrinkingPath", "recognise"]


class LibraryPath(Path):
    """A path whose coefficients come from another library's object.

    Args:
        coefficients: From t, any shape, to `a_t, s_t, a'_t, s'_t`: tensors like t, or numbers.
        name: For messages.
    """

    def __init__(
        self, coefficients: Callable[[Tensor], Sequence[Tensor | float]], name: str
    ) -> None:
        self.coefficients, self.name = coefficients, name

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        # Not through the default dtype, which may have 16 bits.
        values = (torch.as_tensor(v, dtype=t.dtype, device=t.device) for v in self.coefficients(t))
        return PathCoefficients(*(value.expand_as(t) for value in values))

    def __repr__(self) -> str:
        return self.name


class NoisedPath(Path):
    """A path with added independent noise of constant size: torchcfm's matchers with `sigma`.

    Args:
        path: The path without it.
        noise: Standard deviation of the added noise, above 0.
    """

    noisy_target = True

    def __init__(self, path: Path, noise: float) -> None:
        if noise <= 0:
            raise ValueError(f"Expected `noise` above 0, got {noise}.")
        self.path, self.noise = path, noise

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        alpha, sigma, d_alpha, d_sigma = self.path(t)
        total = torch.sqrt(sigma**2 + self.noise**2)
        return PathCoefficients(alpha, total, d_alpha, sigma * d_sigma / total)


class ShrinkingPath(Path):
    """`a = t`, `s = 1 - (1 - sigma_min) t` (Lipman et al., arXiv 2210.02747, Eq. 20).

    Args:
        sigma_min: The noise at t = 1, at least 0; 0 is `LinearPath`.
    """

    def __init__(self, sigma_min: float) -> None:
        if sigma_min < 0:
            raise ValueError(f"Expected `sigma_min` of at least 0, got {sigma_min}.")
        self.sigma_min = sigma_min

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        one, slope = torch.ones_like(t), 1 - self.sigma_min
        return PathCoefficients(t, 1 - slope * t, one, -slope * one)


def recognise(path: Path) -> Path:
    """This library's own path with the same coefficients, or else `path` itself."""
    known = (LinearPath(), CosinePath(), VPPath())
    return next((own for own in known if same_path(own, path)), path)
