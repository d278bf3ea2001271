"""What every engine is asked, and what it answers: one protocol."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, put

__all__ = [
    "LOGIT_ERROR",
    "NOTHING",
    "UNDERFLOW",
    "Engine",
    "Queries",
    "blocks",
    "positions",
    "sigma_floor",
    "where",
]

NOTHING = 1e-12
"""A share of a posterior that adds nothing to its mean."""

UNDERFLOW = -80.0
"""Log-weights below it count as it: numbers too small for their type take a CPU far longer."""

_LOGIT_BYTES = 2**29
"""Logits kept at a time: with more queries than that allows the bank is read again."""

_SMALL_BYTES = 2**24
"""Logits that are kept at a time where reading the bank again costs little."""


@dataclass(frozen=True)
class Queries:
    """B noisy samples with their coefficients, and the rows that each looks at.

    Attributes:
        xt: Noisy samples, (B, D), float64.
        path: Coefficients at the B times, each (B,), float64, sigma above 0.
        segments: For each query the rows it looks at, as a slice of the bank's own order (the
            whole bank, or a class). Known on the host, so that grouping costs no sync.
        source: The row each query was made from, (B,), int64, or None if it is not known.
    """

    xt: Tensor
    path: PathCoefficients
    segments: Sequence[slice]
    source: Tensor | None = None

    def __len__(self) -> int:
        return len(self.xt)

    @cached_property
    def groups(self) -> list[tuple[list[int], slice]]:
        """Queries that look at the same rows: their positions, and the rows."""
        members: dict[tuple[int, int], list[int]] = {}
        for query, rows in enumerate(self.segments):
            members.setdefault((rows.start, rows.stop), []).append(query)
        return [(at, slice(*ends)) for ends, at in members.items()]

    @property
    def sizes(self) -> list[int]:
        """How many rows each query looks at."""
        return [rows.stop - rows.start for rows in self.segments]

    def index(self, at: Sequence[int]) -> Tensor:
        """Positions as a tensor beside the queries."""
        return torch.tensor(at, dtype=torch.int64, device=self.xt.device)

    def select(self, at: Sequence[int]) -> Queries:
        """Some of the queries, by their positions; itself if that is all of them in order."""
        if list(at) == list(range(len(self))):
            return self
        index = self.index(at)
        return Queries(
            self.xt[index],
            self.path.select(index),
            [self.segments[i] for i in at],
            None if self.source is None else self.source[index],
        )


def blocks(queries: Queries) -> list[Queries]:
    """The queries in parts whose logits fit into memory."""
    width, dim = max(queries.sizes), queries.xt.shape[1]
    # Small enough to stay where they are in memory; but short rows only are read again cheaply.
    count = max(_SMALL_BYTES // (4 * width), min(128, dim // 32), 1)
    count = max(1, min(count, _LOGIT_BYTES // (4 * width)))
    every = range(len(queries))
    return [queries.select(every[first : first + count]) for first in every[::count]]


def positions(queries: Queries, at: Sequence[int]) -> slice | Tensor:
    """Positions as a slice, which costs no copy, if they are contiguous."""
    if list(at) == list(range(at[0], at[-1] + 1)):
        return slice(at[0], at[-1] + 1)
    return queries.index(at)


def where(flags: Tensor) -> list[int]:
    """Positions of what is true, on the host."""
    return [i for i, flag in enumerate(flags.tolist()) if flag]


class Engine(ABC):
    """How the rows of a bank are reached.

    One engine may serve several banks. It holds settings, and at most an index that `prepare`
    built for a bank.
    """

    @abstractmethod
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """The posterior of the queries over the rows they look at.

        Args:
            bank: The rows.
            queries: At least one query.
            k: How many of the largest weights to return, at least 1.

        Returns:
            The posterior, with `mean` (B, D), `weights` and `rows` (B, k) with rows in the bank's
            own order (weight 0 and row -1 where a class has fewer than k rows), and `tail_mass`
            the share of the posterior that did not enter `mean`. `source_weight` is left None.
        """

    def prepare(self, bank: LatentBank) -> None:  # noqa: B027
        """Checks the settings against a bank and builds what is needed, before the first query.

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

    def sigma_floor(self, bank: LatentBank) -> float:
        """See `sigma_floor`."""
        return sigma_floor(bank)

    def ask(
        self,
        bank: LatentBank,
        xt: Tensor,
        path: PathCoefficients,
        labels: Sequence[int | None] | None,
        source: Tensor | None,
        k: int,
    ) -> Posterior:
        """Finds the rows that each query looks at, and their posterior.

        Args:
            bank: The rows.
            xt: Noisy samples, (B, D), float64.
            path: Coefficients at the B times, each (B,), float64, sigma above 0.
            labels: The class of each query, or None where it looks at the whole bank; or None.
            source: The row each query was made from, (B,), negative where unknown; or None.
            k: How many of the largest weights to return.

        Returns:
            As `posterior`.
        """
        if not len(xt):
            return Posterior.empty(xt, k)
        names: Sequence[int | None] = [None] * len(xt) if labels is None else labels
        segments = [bank.whole if name is None else bank.segment(name) for name in names]
        queries = Queries(xt, path, segments, source)
        whole = [i for i, name in enumerate(names) if name is None]
        if not 0 < len(whole) < len(xt):
            return self.posterior(bank, queries, k)
        # Apart, because all logits of a call have the width of its largest segment.
        classes = [i for i, name in enumerate(names) if name is not None]
        some = self.posterior(bank, queries.select(classes), k)
        return put(some, whole, self.posterior(bank, queries.select(whole), k), len(xt))


LOGIT_ERROR = 1e-4
"""What rounding may move a logit by."""


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
