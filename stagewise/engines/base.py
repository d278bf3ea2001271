"""The interface of engines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.posterior import Posterior
from stagewise.queries import Queries

__all__ = ["LOGIT_ERROR", "LOST", "NOTHING", "Engine", "lost"]

NOTHING = 1e-12
"""A share of a posterior that is too small to change its mean."""

LOGIT_ERROR = 1e-4
"""The largest error of a logit by rounding."""

_LEAST = 1e-15
"""The least noise level, for a bank of equal rows: `1 / sigma^2` must be a number in float32."""

LOST = 2.0**-43
"""A share of the distance to a query below which float64 does not tell two rows apart."""


def lost(away: Tensor, spread: Tensor, sigma: Tensor) -> Tensor:
    """Which queries are so far `away` that float64 does not tell rows apart, `spread` around c.

    Both are norms, of `x_t - a c` and `a (x - c)`. Their posterior is NaN, not that of some row.
    """
    return (LOST * away > spread) & (LOST * spread * away / sigma.square() > LOGIT_ERROR)


class Engine(ABC):
    """The interface of an engine: how the rows of a bank are reached.

    One engine may serve several banks. It holds settings, and at most what `prepare` made for one.
    """

    holds_all_rows = True
    """Whether the bank of a rank has all rows of a posterior."""

    collective = False
    """Whether all ranks must ask whenever one does, also without queries."""

    runs_kernel = False
    """Whether the kernels of `fused` answer if `reads_ends` is true; then `fused_mix` may too."""

    @abstractmethod
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """The posterior of the queries over their rows.

        Args:
            bank: The rows.
            queries: At least one query, unless the engine is `collective`.
            k: How many of the largest weights to return, at least 1.

        Returns:
            The posterior, with `mean` (B, D), `weights` and `rows` (B, k) with rows in the bank's
            own order (weight 0 and row -1 if a class has fewer than k rows), and `tail_mass`, the
            share of the posterior that is not in `mean`. `source_weight` may be None.
        """

    def prepare(self, bank: LatentBank) -> None:  # noqa: B027
        """Checks the settings against a bank and prepares it, before the first query.

        Raises:
            ValueError: With what does not fit and the cure.
            ImportError: If an optional library is missing, with the line that installs it.
        """

    def describe(self, bank: LatentBank) -> str:
        """The method used for this bank, and the reason, in a few words for a log."""
        return repr(self)

    def num_rows(self, bank: LatentBank) -> int:
        """How many rows there are, on all ranks."""
        return len(bank)

    def reads_ends(self, bank: LatentBank, device: torch.device, count: int) -> bool:
        """Whether `count` queries may have `Queries.ends` in place of `segments`.

        Labels then stay on the device.
        """
        return False

    def sigma_floor(self, bank: LatentBank) -> float:
        """The noise level at which rounding moves a logit by 1e-4: about 1.5e-6 x a row's norm.

        The oracle is evaluated at no lower one. In the units of the bank.
        """
        eps = torch.finfo(torch.float64).eps
        return max(_LEAST, math.sqrt(bank.radius * bank.max_norm * eps / LOGIT_ERROR))
