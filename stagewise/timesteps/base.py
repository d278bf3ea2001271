r"""How training draws its times: samplers with a density.

Training with `t ~ q` and no weight minimises `int q(t) L(t) dt`, q the density of the sampler; the
weight `p(t) / q(t)` restores the objective of another density p with the draws of q.

Every sampler maps a uniform number through an inverse distribution function, so any can be
`stratified`: the n draws of a call fall one into each of n equal shares of the probability (Kingma
et al., arXiv 2107.00630, App. I.1), which lowers the variance of the loss and keeps its mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["TimestepSampler", "Uniform"]


def above_zero(**values: float) -> None:
    """Refuses arguments that are not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"Expected `{name}` above 0, got {value}.")


_LAST = 1 - 2**-24
"""The largest number below 1 in float32."""


class TimestepSampler(ABC):
    """Draws times in [0, 1], t = 0 being noise: the base of all samplers.

    Args:
        stratified: Whether the draws of one call are spread evenly over the probability, default
            False.
    """

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    @property
    def needs_boundary(self) -> bool:
        """Whether it needs the boundary (`bind`) before it can draw."""
        return False

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
            device: Default the CPU.
            generator: Default torch's global one for that device.

        Returns:
            Times, (n,), float32, in random order.
        """
        # float32 for any default dtype: 16 bits hold only a few hundred times.
        u = torch.rand(n, dtype=torch.float32, device=device, generator=generator)
        if self.stratified:
            order = torch.randperm(n, device=device, generator=generator)
            # Rounding must not reach 1, where some targets are infinite.
            u = ((order + u) / n).clamp_max(_LAST)
        return self.place(u).clamp(0, _LAST)

    def place(self, u: Tensor) -> Tensor:
        """From uniform numbers to draws, in any order; default `quantile`."""
        return self.quantile(u)

    def importance_weight(self, t: Tensor, of: TimestepSampler | None = None) -> Tensor:
        """`p(t) / q(t)` for times of any shape, p the density of another sampler, default uniform.

        Infinite where q is 0 and p is not, but 0 at t = 0 and 1, which have no probability.
        """
        p, q = (of or Uniform()).density(t), self.density(t)
        counts = (p > 0) & ((q > 0) | ((t > 0) & (t < 1)))
        return torch.where(counts, p / q, torch.zeros_like(p))

    def bind(self, boundary: float) -> TimestepSampler:
        """The sampler for this boundary; itself if it does not depend on it."""
        return self

    def update(self, t: Tensor, loss: Tensor) -> None:  # noqa: B027
        """Takes losses (B,) at times (B,); only adaptive samplers use them."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned from losses; empty for samplers that do not adapt."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what `state_dict` returned."""

    def __repr__(self) -> str:
        public = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in public.items())})"


class Uniform(TimestepSampler):
    """Draws all times alike, `t ~ U(0, 1)`: the choice of SiT and of most flow matching."""

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return u

    @override
    def density(self, t: Tensor) -> Tensor:
        return ((t >= 0) & (t <= 1)).to(t.dtype)
