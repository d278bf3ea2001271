"""A density in the plane that is known: a mixture of Gaussians along a spiral, and KL from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torchdiffeq import odeint

__all__ = ["kl_from_density", "spiral"]


def spiral() -> MixtureSameFamily:
    """60 Gaussians of width 0.06 along two turns, of unit size."""
    along = torch.linspace(0.25, 1, 60).sqrt()
    angle = 4 * math.pi * along
    centres = 1.8 * along[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    parts = Independent(Normal(centres, 0.06), 1)
    return MixtureSameFamily(Categorical(probs=torch.ones(60) / 60), parts)


def kl_from_density(
    net: Callable[[Tensor, Tensor, Tensor], Tensor], count: int = 1000, seed: int = 5
) -> float:
    """KL(density, model) in nats, over `count` draws; the model's log-density by its flow.

    `log p(x_1) = log N(x_0) - int_0^1 div v dt` (Chen et al., arXiv 1806.07366, eq. 8), with the
    exact divergence of two dimensions.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x1 = spiral().sample((count,))
    labels = torch.zeros(count, dtype=torch.long)

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = net(x, t.expand(count).float(), labels)
            parts = (torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1))
            divergence = sum(part[:, i] for i, part in enumerate(parts))
        return v.detach(), divergence.detach()

    # From the data back to the noise.
    times = torch.linspace(1, 0, 101)
    x0, change = odeint(field, (x1, torch.zeros(count)), times, method="midpoint")
    log_noise = Normal(0.0, 1.0).log_prob(x0[-1]).sum(1)
    return float((spiral().log_prob(x1) - log_noise - change[-1]).mean())
