"""Neighbours from `torch_cluster.knn`, which searches many ragged sets in one call.

What it is good at: class-wise queries on a GPU, all classes at once, without a copy of the bank and
without a matrix of B x N distances. It is no faster than a product for queries that look at the
whole bank. On the CPU it builds a k-d tree per call, which serves few dimensions only.

The rows are searched as they are stored, in float32 (float64 for a bank of that type), by explicit
differences. With unit roundoff u, a squared distance is then wrong by 2 (D + 32) u of itself for
its sum and, in a tree, its comparisons, and by 2 u |q| |q - x| for the rounding of the query q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import Queries
from stagewise.engines.neighbours import FAR, Neighbours, reach, stand

__all__ = ["TorchCluster"]

_CUDA_K = 100
"""The neighbours that its CUDA kernel has room for."""

_CUDA_FAR = 2.0**16
"""A distance that its CUDA kernel still sees: it takes squares from 1e10 on for infinite."""


class TorchCluster(Neighbours):
    """The mean over the k nearest rows, found by torch_cluster.

    The bank should lie where the queries are: rows that do not, that have 16 bits, or that are more
    than 250 from their mean (the kernel counts squares to 1e10) are copied in every call. On CUDA
    the library waits for the device once per call.

    Args:
        k: How many rows, default 100, which is the most that the library finds on CUDA.
        draws: Random other rows that stand for the rest, see `Neighbours`.
        max_tail: Queries with a larger tail mass get the exact mean; default None.
        seed: Of the draws, default 0.
    """

    def prepare(self, bank: LatentBank) -> None:
        """See `Engine.prepare`.

        Raises:
            ValueError: If `k` is above the rows of the bank, or above 100 for a bank on CUDA.
            ImportError: If torch_cluster is not installed, or for another build of torch.
        """
        super().prepare(bank)
        _library()
        _require_room(bank.device, self.k)

    def search(self, bank: LatentBank, queries: Queries, segment: slice, n: int) -> Tensor:
        """See `Neighbours.search`."""
        return self.search_all(bank, queries, n)

    def search_all(self, bank: LatentBank, queries: Queries, n: int) -> Tensor:
        """See `Neighbours.search_all`: one call for all groups.

        Raises:
            ValueError: If `n` is above 100 for queries on CUDA.
        """
        device = queries.xt.device
        _require_room(device, n)
        groups = sorted(queries.groups, key=lambda group: group[1].start)
        if any(one.stop > other.start for (_, one), (_, other) in pairwise(groups)):
            return super().search_all(bank, queries, n)
        # Rows between two groups are a set that nobody asks: so the bank need not be copied.
        sizes, counts = [], []
        start = stop = groups[0][1].start
        for at, segment in groups:
            sizes += [segment.start - stop, segment.stop - segment.start]
            counts += [0, len(at)]
            stop = segment.stop
        order = queries.index([i for at, _ in groups for i in at])
        dtype, scale = _dtype(bank), _scale(bank)
        y, _ = stand(bank, queries)
        points = scale * (y[order] + (bank.centre - bank.offset).to(device))
        rows = bank.rows[start:stop].to(device, dtype)
        rows = rows if scale == 1 else rows * scale
        names = torch.arange(len(sizes), device=device)
        owner, column = _library()(
            rows,
            points.to(dtype),
            n,
            names.repeat_interleave(queries.index(sizes), output_size=len(rows)),
            names.repeat_interleave(queries.index(counts), output_size=len(points)),
        )
        first = torch.searchsorted(owner, torch.arange(len(points), device=device))
        place = torch.arange(len(owner), device=device) - first[owner]
        table = torch.full((len(points), n), -1, dtype=torch.int64, device=device)
        table[order[owner], place] = column + start
        return table

    def rounding(self, bank: LatentBank, y: Tensor, distance: Tensor) -> Tensor:
        """See `Neighbours.rounding`."""
        unit = torch.finfo(_dtype(bank)).eps / 2
        shift = (bank.centre - bank.offset).norm().to(y.device)
        query = torch.linalg.vector_norm(y, dim=1) + shift
        return 4 * unit * distance * ((bank.dim + 32) * distance + query)


def _dtype(bank: LatentBank) -> torch.dtype:
    return torch.float64 if bank.dtype == torch.float64 else torch.float32


def _scale(bank: LatentBank) -> float:
    """What to multiply the rows with, a power of two, so that their distances can be counted."""
    farthest = (FAR + 1) * reach(bank)
    if _CUDA_FAR**-1 <= farthest <= _CUDA_FAR:
        return 1.0
    return 2.0 ** -math.ceil(math.log2(farthest / _CUDA_FAR))


def _require_room(device: torch.device, k: int) -> None:
    if device.type == "cuda" and k > _CUDA_K:
        raise ValueError(
            f"Expected `k` of at most {_CUDA_K}, the most that torch_cluster finds on CUDA, got "
            f"{k}. For more use the engine Nearest({k})."
        )


def _library() -> Callable[..., Any]:
    try:
        from torch_cluster import knn
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            "The engine TorchCluster needs torch_cluster, which is not installed, or not for this "
            "build of torch. It is compiled against the torch that is there: pip install "
            f"--no-build-isolation 'stagewise[cluster]'. What was said: {error}"
        ) from error
    return knn
