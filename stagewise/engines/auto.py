r"""The engine that chooses an engine.

The rules were measured on CPUs (`make bench`):

- Few queries over few rows cost what their operations cost, not their numbers: `few_rows` has the
  fewest.
- `Exact` is one matrix product for all queries and a second for those in navigation. In more than a
  few dimensions nothing that returns the same numbers is faster.
- In up to 8 dimensions a k-d tree (`TorchCluster`, if it is installed) finds the nearest rows of a
  query without reading most others. It is faster from about 50 000 rows and 64 queries on (the tree
  is built in each call), for up to about 500 rows to find, and for queries whose posterior lies on
  few rows. With the spectrum `lambda_k` of the rows these are about
  `n exp(-1/2 sum_k log(1 + rho_t^2 lambda_k))` of n rows.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.engines import few_rows
from stagewise.engines.base import Engine
from stagewise.engines.exact import Exact
from stagewise.engines.torch_cluster import TorchCluster
from stagewise.posterior import Posterior, replace_queries
from stagewise.queries import Queries
from stagewise.spectrum import information, spectrum

__all__ = ["Auto"]

_log = logging.getLogger("stagewise")

_LOW_DIM, _MANY_ROWS = 8, 50_000
_ENOUGH = 64
"""From this many queries on a tree, which is built in each call, is faster than products."""
_MANY_NEIGHBOURS = 500
"""For more rows per query a tree is slower than products."""
_MAX_TAIL = 1e-7
"""The tail mass that an answer of the tree may miss: below the error that `Exact` allows."""

_EXACT = (
    "Exact: one product with all rows of a query, a second for queries in navigation, "
    "float64 only where float32 would show"
)

_FEW = (
    "Few rows: small batches in float64, one product with all rows and one for the means; "
    "otherwise Exact"
)


@dataclass(frozen=True)
class _Pick:
    why: str
    tree: TorchCluster | None = None
    variances: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Tensor | None = None


class Auto(Engine):
    """Chooses an engine by the size of the bank. The default.

    It is `Exact`, or a k-d tree for queries where that is faster and misses less than 1e-7 of the
    posterior. On a CPU few queries over few rows are computed in float64 at once. The choice and
    the reason are logged once for each bank (logger "stagewise", level INFO).
    """

    runs_kernel = True

    def __init__(self) -> None:
        self.exact = Exact()
        self.picks: WeakKeyDictionary[LatentBank, _Pick] = WeakKeyDictionary()

    @override
    def prepare(self, bank: LatentBank) -> None:
        if bank not in self.picks:
            pick = self.picks[bank] = self._pick(bank)
            _log.info("Auto engine for %r: %s", bank, pick.why)

    def _pick(self, bank: LatentBank) -> _Pick:
        n, dim = len(bank), bank.dim
        if dim > _LOW_DIM or n < _MANY_ROWS or bank.device.type != "cpu":
            rows = few_rows.centred_rows(bank)
            return _Pick(_EXACT if rows is None else _FEW, rows=rows)
        if find_spec("torch_cluster") is None:
            return _Pick(
                f"Exact. In {dim} dimensions a k-d tree would be faster near the data: "
                "pip install --no-build-isolation 'stagewise[cluster]'"
            )
        tree = TorchCluster(max_tail=_MAX_TAIL)
        try:
            tree.prepare(bank)
        except ImportError as error:
            return _Pick(f"Exact. Another engine would be faster near the data, but: {error}")
        return _Pick(
            f"a k-d tree (torch_cluster), which {dim} dimensions and {n} rows make faster than "
            "products near the data, and exactly for other queries",
            tree,
            spectrum(bank),
        )

    @override
    def describe(self, bank: LatentBank) -> str:
        self.prepare(bank)
        return self.picks[bank].why

    @override
    def reads_ends(self, bank: LatentBank, device: torch.device, count: int) -> bool:
        return self.exact.reads_ends(bank, device, count)  # a tree serves banks on a CPU

    @override
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        self.prepare(bank)
        pick = self.picks[bank]
        if pick.rows is not None and few_rows.serves(pick.rows, queries):
            return few_rows.posterior(bank, pick.rows, queries, k)
        if pick.tree is None or k > _MANY_NEIGHBOURS:
            return self.exact.posterior(bank, queries, k)
        queries = queries.on_host()
        told = information(queries.path.alpha / queries.path.sigma, pick.variances).tolist()
        width = max(k, pick.tree.k)
        few = [
            i
            for i, (size, nats) in enumerate(zip(queries.sizes, told, strict=True))
            if size >= _MANY_ROWS and nats > math.log(4 * size / width)
        ]
        if len(few) < _ENOUGH:
            return self.exact.posterior(bank, queries, k)
        found = pick.tree.posterior(bank, queries.select(few), k)
        rest = sorted(set(range(len(queries))) - set(few))
        if not rest:
            return found
        return replace_queries(
            self.exact.posterior(bank, queries.select(rest), k), few, found, len(queries)
        )

    def __reduce__(self) -> tuple[type[Auto], tuple[()]]:
        return Auto, ()  # choices are for banks of this process

    def __repr__(self) -> str:
        return "Auto()"
