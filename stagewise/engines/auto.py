r"""The engine that picks an engine.

What is fastest was measured on CPUs (`make bench`), and follows from what each engine reads:

- `Exact` is one matrix product for all queries and a second for those in navigation. In more than a
  few dimensions nothing that returns the same numbers is faster.
- In up to 8 dimensions a k-d tree (`TorchCluster`, if it is installed) finds the nearest rows of a
  query without looking at most others. It pays from some 50 000 rows and 64 queries on (the tree is
  built anew for each call) and up to some 500 rows to find, for queries whose posterior lies on few
  rows. That is known beforehand:
  with the spectrum `lambda_k` of the rows about `n exp(-1/2 sum_k log(1 + rho_t^2 lambda_k))` rows
  explain a query.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import Engine, Queries
from stagewise.engines.exact import Exact
from stagewise.engines.neighbours import Neighbours
from stagewise.engines.torch_cluster import TorchCluster
from stagewise.posterior import Posterior, put
from stagewise.spectrum import information, spectrum

__all__ = ["Auto"]

_log = logging.getLogger("stagewise")

_LOW_DIM, _MANY_ROWS = 8, 50_000
_ENOUGH = 64
"""Queries from which on a tree, which is built for each call, costs less than products."""
_MANY_NEIGHBOURS = 500
"""Rows to find for a query from which on a tree costs as much as products."""


@dataclass(frozen=True)
class _Pick:
    why: str
    near: Neighbours | None = None
    variances: Tensor = field(default_factory=lambda: torch.empty(0))


class Auto(Engine):
    """Exact, or neighbours for those queries where they are faster and miss next to nothing.

    What is picked, and why, is logged once for each bank (logger "stagewise", level INFO).

    Args:
        max_tail: The tail mass that an answer may miss, default 1e-7, which is below the error that
            `Exact` lets pass.

    Raises:
        ValueError: If `max_tail` is not in [0, 1).
    """

    def __init__(self, max_tail: float = 1e-7) -> None:
        if not 0 <= max_tail < 1:
            raise ValueError(f"Expected `max_tail` in [0, 1), got {max_tail}.")
        self.max_tail = max_tail
        self.exact = Exact()
        self.picks: WeakKeyDictionary[LatentBank, _Pick] = WeakKeyDictionary()

    def prepare(self, bank: LatentBank) -> None:
        """Picks for a bank, and says what and why."""
        if bank in self.picks:
            return
        pick = self._pick(bank)
        try:
            if pick.near is not None:
                pick.near.prepare(bank)
        except ImportError as error:
            pick = _Pick(f"Exact. Another engine would be faster near the data, but: {error}")
        self.picks[bank] = pick
        _log.info("Auto engine for %r: %s", bank, pick.why)

    def _pick(self, bank: LatentBank) -> _Pick:
        n, dim, cpu = len(bank), bank.dim, bank.device.type == "cpu"
        if dim <= _LOW_DIM and n >= _MANY_ROWS and cpu and self.max_tail > 0:
            if find_spec("torch_cluster") is not None:
                return _Pick(
                    f"a k-d tree (torch_cluster), which {dim} dimensions and {n} rows make faster "
                    "than products near the data, and exactly for other queries",
                    TorchCluster(max_tail=self.max_tail),
                    spectrum(bank),
                )
            return _Pick(
                f"Exact. In {dim} dimensions a k-d tree would be faster near the data: "
                "pip install --no-build-isolation 'stagewise[cluster]'"
            )
        return _Pick(
            "Exact: one product with all rows a query looks at, a second for queries in "
            "navigation, float64 only where float32 would show"
        )

    def describe(self, bank: LatentBank) -> str:
        """What was picked for a bank, and why."""
        self.prepare(bank)
        return self.picks[bank].why

    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """See `Engine.posterior`."""
        self.prepare(bank)
        near, variances = self.picks[bank].near, self.picks[bank].variances
        tree = isinstance(near, TorchCluster)
        if near is None or (tree and k > _MANY_NEIGHBOURS):
            return self.exact.posterior(bank, queries, k)
        width = max(k, near.k)
        told = information(queries.path.alpha / queries.path.sigma, variances)
        few = [
            i
            for i, (size, nats) in enumerate(zip(queries.sizes, told.tolist(), strict=True))
            if size >= _MANY_ROWS and nats > math.log(4 * size / width)
        ]
        if len(few) < (_ENOUGH if tree else 1):
            return self.exact.posterior(bank, queries, k)
        found = near.posterior(bank, queries.select(few), k)
        if len(few) == len(queries):
            return found
        rest = sorted(set(range(len(queries))) - set(few))
        exact = self.exact.posterior(bank, queries.select(rest), k)
        return put(exact, few, found, len(queries))

    def __getstate__(self) -> dict[str, Any]:
        # What was picked belongs to banks of this process.
        return {"max_tail": self.max_tail}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Auto(max_tail={self.max_tail:g})"
