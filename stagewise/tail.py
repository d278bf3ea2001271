r"""How much of a posterior can lie on rows that were not read.

For a query made from row i, `x_t = a x^(i) + s eps`, and another row j at distance `Delta_j`, with
`rho = a/s`, `r_j = rho Delta_j` and some `z_j ~ N(0, 1)`,

    gamma_j / gamma_i = M_j = exp(-r_j^2 / 2 - r_j z_j),   E M_j = 1,

and the mass of some rows is at most `S = sum_j M_j` over them. If `S > eta`, then the numbers
`min(1, M_j / eta)` add up to at least 1. So Markov's inequality gives, with `L = log(1 / eta)`,

    P(S > eta) <= sum_j E min(1, M_j / eta)
                = sum_j [ Phi(L/r_j - r_j/2) + Phi(-L/r_j - r_j/2) / eta ]
               <= 2 sum_j Phi(L/r_j - r_j/2),                                                   (1)

the second term being at most the first, because Mills' ratio decreases. Terms decrease with `r_j`:
lower bounds on distances will do.

A query that was rounded, or made from a sample before the bank rounded it, is
`a x^(i) + s (eps + e)`. With `|e| <= kappa`, `M_j` is at most `exp(kappa r_j)` times as large, and
(1) has `r_j/2 - kappa` in place of `r_j/2`.

With `delta` shared equally among H groups of n_h rows, (1) gives a bound on the mass itself,

    S <= exp(-min_h r_h (r_h/2 - kappa - q_h))  with  2 n_h Phi(-q_h) = delta / H.              (2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tail"]

_NOISE = 0.01
"""Share of `delta` for noise that is longer than `kappa` allows."""


@dataclass(frozen=True)
class Tail:
    """Rows that are not read, in H groups for each of B queries.

    Attributes:
        count: Rows in each group, n_h, (B, H).
        r: `r_h`, at most that of any row in the group, (B, H), float64.
        half: `r_h/2 - kappa`, (B, H), float64.
        delta: Probability, over the noise of a query, that a bound may fail.
    """

    count: Tensor
    r: Tensor
    half: Tensor
    delta: float

    @classmethod
    def of(
        cls,
        rho: Tensor,
        distance: Tensor,
        count: Tensor,
        errors: tuple[float, float],
        dim: int,
        delta: float,
    ) -> Tail:
        """The tail from distances.

        Args:
            rho: `a/s`, (B, 1), float64.
            distance: The least distance from the source in each group, (B, H), float64.
            count: Rows in each group, (B, H).
            errors: The error of `a x_1`, divided by a, and of `s eps`, divided by `s |eps|`.
            dim: Numbers in a sample, D.
            delta: Probability that a bound may fail, between 0 and 1.
        """
        if not 0 < delta < 1:
            raise ValueError(f"Expected `delta` between 0 and 1, got {delta}.")
        # |eps| <= sqrt(D) + y but for a probability of exp(-y^2 / 2).
        longest = math.sqrt(dim) + math.sqrt(2 * math.log(1 / (_NOISE * delta)))
        # Not r/2 - kappa: both are infinite at the data end.
        half = rho * (distance / 2 - errors[0]) - errors[1] * longest
        return cls(count, rho * distance, half, (1 - _NOISE) * delta)

    def is_below(self, eta: float) -> Tensor:
        """Whether the mass is at most `eta`, between 0 and 1, by (1): (B,)."""
        if not 0 < eta < 1:
            raise ValueError(f"Expected `eta` between 0 and 1, got {eta}.")
        terms = 2 * self.count * torch.special.ndtr(-math.log(eta) / self.r - self.half)
        # NaN (rho or a distance that is 0 or infinite) compares as False.
        return torch.where(self.count > 0, terms, 0).sum(1) <= self.delta

    def mass(self, eta: float) -> Tensor:
        """A bound on the mass, by (2), (B,): at most `eta` where `is_below(eta)`, and at most 1."""
        share = self.delta / (2 * self.r.shape[1] * self.count.clamp_min(1))
        exponent = self.r * (self.half + torch.special.ndtri(share))
        exponent = torch.where(self.count > 0, exponent, torch.inf).nan_to_num(0, torch.inf, 0)
        bound = torch.exp(-exponent.amin(1)).clamp_max(1)
        return torch.where(self.is_below(eta), bound.clamp_max(eta), bound)
