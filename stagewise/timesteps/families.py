r"""The densities that published recipes draw their times from, in this library's time.

Papers that count from data (t = 0) to noise are mirrored here, `t -> 1 - t`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.special import betaincinv
from torch import Tensor
from typing_extensions import override

from stagewise.paths import LinearPath, Path
from stagewise.timesteps.base import TimestepSampler, above_zero

__all__ = ["Beta", "EDMLogNormal", "LogitNormal", "Mode", "UShaped"]


class LogitNormal(TimestepSampler):
    """Draws most times in the middle: `logit t ~ N(mean, std^2)` (SD3, arXiv 2403.03206, Eq. 19).

    With the defaults only 1.4 % of the draws have t < 0.1, so the navigation stage of ImageNet
    latents is hardly trained.

    Args:
        mean: Mean of the logit, default 0; negative favours noise.
        std: Standard deviation of the logit, default 1.

    Example:
        >>> from stagewise import LogitNormal
        >>> LogitNormal().sample(256).shape
        torch.Size([256])
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        above_zero(std=std)
        self.mean, self.std = mean, std

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    @override
    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        scale = self.std * math.sqrt(2 * math.pi)
        value = torch.exp(-z * z / 2) / (scale * t * (1 - t))
        return torch.where((t > 0) & (t < 1), value, torch.zeros_like(t))


class Mode(TimestepSampler):
    """SD3's mode sampling (arXiv 2403.03206, Eq. 20), symmetric in t.

    Args:
        scale: s, from -1 to below 2 / (pi - 2) = 1.75; positive favours the middle, negative the
            ends. Default 1.29, that of SD3.
    """

    def __init__(self, scale: float = 1.29, stratified: bool = False) -> None:
        super().__init__(stratified)
        if not -1 <= scale < 2 / (math.pi - 2):
            raise ValueError(f"Expected `scale` in [-1, 1.75), got {scale}.")
        self.scale = scale

    @override
    def quantile(self, u: Tensor) -> Tensor:
        # cos^2 - 1 = -sin^2, which keeps its digits near 0.
        return u + self.scale * (u - torch.sin(math.pi / 2 * u) ** 2)

    @override
    def density(self, t: Tensor) -> Tensor:
        u = bisect(self.quantile, t)
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u))
        return _inside(t, 1 / slope)


class Beta(TimestepSampler):
    """Draws `t ~ Beta(alpha, beta)`.

    The default is that of pi0 (arXiv 2410.24164, App. B): Beta(1.5, 1) in its time, where 1 is
    noise.

    Args:
        alpha: Above 0, default 1; the density at t = 0 goes as `t^(alpha - 1)`.
        beta: Above 0, default 1.5; at t = 1 as `(1 - t)^(beta - 1)`. Where neither is 1, draws on
            an accelerator cost a device sync: scipy makes them.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.5, stratified: bool = False) -> None:
        super().__init__(stratified)
        above_zero(alpha=alpha, beta=beta)
        self.alpha, self.beta = alpha, beta

    @override
    def quantile(self, u: Tensor) -> Tensor:
        if self.alpha == 1:
            return -torch.expm1(torch.log1p(-u) / self.beta)
        if self.beta == 1:
            return u ** (1 / self.alpha)
        values = betaincinv(self.alpha, self.beta, u.double().cpu().numpy())
        return torch.as_tensor(values).to(u)

    @override
    def density(self, t: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        log_norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        value = t ** (a - 1) * (1 - t) ** (b - 1) * math.exp(-log_norm)
        return _inside(t, value)


class EDMLogNormal(TimestepSampler):
    """Draws EDM's noise levels: `log sigma ~ N(mean, std^2)` (arXiv 2206.00364, Table 1).

    On the linear path `t = 1 / (1 + sigma)`, so this is `LogitNormal(-mean, std)`. If a path has a
    largest or smallest sigma, the distribution is cut there.

    Args:
        mean: Default -1.2.
        std: Default 1.2.
        path: Default `LinearPath()`.
    """

    def __init__(
        self,
        mean: float = -1.2,
        std: float = 1.2,
        path: Path | None = None,
        stratified: bool = False,
    ) -> None:
        super().__init__(stratified)
        above_zero(std=std)
        self.mean, self.std, self.path = mean, std, path or LinearPath()

    @override
    def quantile(self, u: Tensor) -> Tensor:
        low, high = self._ends(u)
        z = torch.special.ndtri(low + (high - low) * u.double())
        if isinstance(self.path, LinearPath):
            return torch.sigmoid(self.std * z - self.mean).to(u)
        return bisect(self._score, z).to(u)

    @override
    def density(self, t: Tensor) -> Tensor:
        low, high = self._ends(t)
        alpha, sigma, d_alpha, d_sigma = self.path(t.double())
        z = self._score(t.double())
        slope = (d_alpha / alpha - d_sigma / sigma) / self.std
        value = slope * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (high - low)
        return _inside(t, value.to(t), open_ends=True)

    def _score(self, t: Tensor) -> Tensor:
        """`(mean - log sigma) / std`, which grows with t."""
        alpha, sigma, *_ = self.path(t)
        return (self.mean + alpha.log() - sigma.log()) / self.std

    def _ends(self, like: Tensor) -> Tensor:
        """The probability below t = 0 and below t = 1 of the uncut distribution."""
        ends = torch.arange(2, dtype=torch.float64, device=like.device)
        return torch.special.ndtr(self._score(ends))


class UShaped(TimestepSampler):
    """Draws more times at both ends: `q(t) ~ exp(a t) + exp(a (1 - t))` (arXiv 2405.20320).

    Args:
        slope: a, above 0, default 4.
    """

    def __init__(self, slope: float = 4.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        above_zero(slope=slope)
        self.slope = slope

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.slope / 2)) / self.slope

    @override
    def density(self, t: Tensor) -> Tensor:
        scale = self.slope / (2 * math.sinh(self.slope / 2))
        return _inside(t, scale * torch.cosh(self.slope * (t - 0.5)))


def bisect(grows: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Where in [0, 1] a growing function has a value; elementwise, without a device sync."""
    goal = value.double()
    low, high = torch.zeros_like(goal), torch.ones_like(goal)
    for _ in range(54):
        middle = (low + high) / 2
        below = grows(middle) < goal
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(value)


def _inside(t: Tensor, value: Tensor, open_ends: bool = False) -> Tensor:
    inside = (t > 0) & (t < 1) if open_ends else (t >= 0) & (t <= 1)
    return torch.where(inside, value, torch.zeros_like(t))
