"""What every engine is asked, and what it answers: one protocol."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from stagewise.bank import LatentBank
from stagewise.posterior import Posterior
from stagewise.queries import Queries

__all__ = ["LOGIT_ERROR", "NOTHING", "Engine", "sigma_floor"]

NOTHING = 1e-12
"""A share of a posterior that adds nothing to its mean."""

LOGIT_ERROR = 1e-4
"""What rounding may move a logit by."""


class Engine(ABC):
    """The interface of an engine: how the rows of a bank are reached.

    One engine may serve several banks. It holds settings, and at most what `prepare` made for one.
    """

    holds_all_rows = True
    """Whether the bank it is given has all rows that a posterior is over."""

    collective = False
    """Whether all ranks have to ask whenever one does, also with no queries."""

    runs_kernel = False
    """Whether `fused` answers what `reads_ends` is true for, so that `fused_mix` may."""

    @abstractmethod
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """The posterior of the queries over the rows they look at.

        Args:
            bank: The rows.
            queries: At least one query, unless the engine is `collective`.
            k: How many of the largest weights to return, at least 1.

        Returns:
            The posterior, with `mean` (B, D), `weights` and `rows` (B, k) with rows in the bank's
            own order (weight 0 and row -1 where a class has fewer than k rows), and `tail_mass`
            the share of the posterior that did not enter `mean`. `source_weight` may be None.
        """

    def prepare(self, bank: LatentBank) -> None:  # noqa: B027
        """Checks the settings against a bank and makes what is needed, before the first query.

        Raises:
            ValueError: With what does not fit and the cure.
            ImportError: If an optional library is missing, with the line that installs it.
        """

    def describe(self, bank: LatentBank) -> str:
        """What is done for this bank and why, in a few words for a log."""
        return repr(self)

    def num_rows(self, bank: LatentBank) -> int:
        """How many rows there are."""
        return len(bank)

    def reads_ends(self, bank: LatentBank, device: torch.device, count: int) -> bool:
        """Whether so many class-wise queries may have `Queries.ends` in place of `segments`.

        Then their labels are not read back from the device.
        """
        return False

    def sigma_floor(self, bank: LatentBank) -> float:
        """The noise level below which the oracle is evaluated at it; see `sigma_floor`."""
        return sigma_floor(bank)


def sigma_floor(bank: LatentBank) -> float:
    """The noise level at which rounding moves a logit by 1e-4: about 1.5e-6 x the norm of a row.

    Args:
        bank: The bank; its largest row norms, centred and not, decide.

    Returns:
        A standard deviation in the units of the bank.
    """
    eps = torch.finfo(torch.float64).eps
    product = max(bank.radius * bank.max_norm, torch.finfo(torch.float32).tiny)
    return math.sqrt(product * eps / LOGIT_ERROR)
