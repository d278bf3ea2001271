"""How the rows of a bank are reached: engines with one interface (`base.Engine`).

`Exact` (all rows), `Nearest` (the k nearest, by one product with all rows), `TorchCluster`
(neighbours from that library), `Sharded` (each rank holds a part of the rows), and `Auto`, which
chooses.
"""

from stagewise.engines.auto import Auto
from stagewise.engines.base import Engine
from stagewise.engines.exact import Exact
from stagewise.engines.nearest import Nearest
from stagewise.engines.sharded import EmptyShard, Sharded, shard_rows
from stagewise.engines.torch_cluster import TorchCluster
from stagewise.queries import Queries

__all__ = [
    "Auto",
    "EmptyShard",
    "Engine",
    "Exact",
    "Nearest",
    "Queries",
    "Sharded",
    "TorchCluster",
    "shard_rows",
]
