"""How the rows of a bank are reached: engines behind one protocol (`base.Engine`).

`Exact` (all rows), `Nearest` (the k nearest, by one product with all rows), `Coarse` (a projection
of the rows prunes), `TorchCluster` and `Faiss` (neighbours from those libraries), `Sharded` (each
rank holds a part of the rows), and `Auto`, which picks.
"""

from stagewise.engines.auto import Auto
from stagewise.engines.base import Engine, Queries
from stagewise.engines.coarse import Coarse
from stagewise.engines.exact import Exact
from stagewise.engines.faiss import Faiss
from stagewise.engines.nearest import Nearest
from stagewise.engines.sharded import EmptyShard, Sharded, shard_rows
from stagewise.engines.torch_cluster import TorchCluster

__all__ = [
    "Auto",
    "Coarse",
    "EmptyShard",
    "Engine",
    "Exact",
    "Faiss",
    "Nearest",
    "Queries",
    "Sharded",
    "TorchCluster",
    "shard_rows",
]
