r"""How training draws its times: samplers with a density.

A sampler is more than a way to draw: its density `q(t)` says what the draws do to the loss.
Training with `t ~ q` and no weight minimises `int q(t) L(t) dt`; the weight `p(t) / q(t)` restores
the objective of another density p while keeping the draws of q.

Both samplers here map a uniform number through an inverse distribution function, so `stratified`
applies to either: the n draws of a call fall one into each of n equal shares of the probability
(Kingma et al., arXiv 2107.00630, App. I.1), which lowers the variance of the loss and changes
nothing in the mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["LogitNormal", "TimestepSampler", "Uniform"]


class TimestepSampler(ABC):
    """Draws times in [0, 1], t = 0 being noise.

    Args:
        stratified: Whether the draws of one call are spread evenly over the probability, default
            False.
    """

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share `u` of the draws lies; any shape."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """The density `q(t)`, any shape; it integrates to 1 over [0, 1]."""

    def sample(
        self,
        n: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws n times.

        Args:
            n: How many.
            device: Where to draw them; default the CPU.
            generator: Default torch's global one for that device.

        Returns:
            Times, (n,), float32, in random order.
        """
        u = torch.rand(n, device=device, generator=generator)
        if self.stratified:
            order = torch.randperm(n, device=device, generator=generator)
            # Rounding must not reach 1, where some targets are infinite.
            u = ((order + u) / n).clamp_max(1 - 2**-24)
        return self.quantile(u)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"


class Uniform(TimestepSampler):
    """`t ~ U(0, 1)`: the choice of SiT and of most flow matching."""

    def quantile(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return u

    def density(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return ((t >= 0) & (t <= 1)).to(t.dtype)


class LogitNormal(TimestepSampler):
    """`logit t ~ N(mean, std^2)` (Esser et al., SD3, arXiv 2403.03206, Eq. 19).

    Concentrates on the middle: with the defaults only 1.4 % of the draws have t < 0.1, so the
    navigation stage of ImageNet latents is hardly trained.

    Args:
        mean: Mean of the logit, default 0; negative favours noise.
        std: Standard deviation of the logit, default 1.
        stratified: See `TimestepSampler`.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        if std <= 0:
            raise ValueError(f"Expected `std` above 0, got {std}.")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`; 0 at both ends."""
        z = (torch.logit(t) - self.mean) / self.std
        scale = self.std * math.sqrt(2 * math.pi)
        value = torch.exp(-z * z / 2) / (scale * t * (1 - t))
        return torch.where((t > 0) & (t < 1), value, torch.zeros_like(t))
