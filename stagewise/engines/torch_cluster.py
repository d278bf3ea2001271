r"""Neighbours from `torch_cluster.knn`, which searches many ragged sets in one call.

It is fast in few dimensions on a CPU, where it builds a k-d tree per call, and for class-wise
queries on a GPU: all classes at once, without a copy of the bank and without a matrix of B x N
distances. For queries of the whole bank it is no faster than a product.

The log-weights of the found rows are computed exactly. No other row is nearer. So for the r other
rows, with `Z_K = sum exp(l_i)` of the K found rows and the smallest of their log-weights `l_K`,

    tail mass  <=  r exp(l_K + e) / (Z_K + r exp(l_K + e)).

**The position of a query.** In coordinates around the bank's mean c, where no row is farther than R
from the origin, the search is for the rows nearest to `y = (x_t - a c)/a`, which is infinite at
a = 0. Instead `y = (x_t - a c)/a'` with `a' = max(a, |x_t - a c| / 256 R)` is used. If a row j was
not found, and the search compares squared distances with an error of at most v, then
`|y - x^(j)|^2 >= |y - x^(K)|^2 - v`, and therefore `l_j <= l_K + e` with

    e = (a a' v + a (a' - a) R^2) / 2 s^2.

The second term is below 2e-6 |x_t - a c|^2/s^2, for noisy samples of a bank 2e-6 D.

**v.** The search is by explicit differences in float32 (float64 for a bank of that type). With unit
roundoff u, a squared distance has a relative error of 2 (D + 32) u for its sum and, in a tree, its
comparisons, and an error of 2 u |q| |q - x| for the rounding of the query q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.engines.exact import Exact, Leading
from stagewise.engines.log_weights import LogWeights
from stagewise.engines.nearest import Truncated
from stagewise.posterior import Posterior, replace_queries
from stagewise.products import full_precision
from stagewise.queries import Queries, indices_of

__all__ = ["TorchCluster"]

_FARTHEST = 256.0
"""Largest distance of a query from the bank's mean, in units of R."""

_CUDA_K = 100
"""Most neighbours of its CUDA kernel."""

_CUDA_FAR = 2.0**16
"""Largest distance for its CUDA kernel, which treats squares from 1e10 on as infinite."""


class TorchCluster(Truncated):
    """The mean over the k nearest rows, found by torch_cluster. For few dimensions.

    Bank and queries should be on the same device: rows on another device, of 16 bits, or more than
    250 from their mean (the kernel's limit for squares is 1e10) are copied in every call. On CUDA
    the library syncs once per call.

    Args:
        k: How many rows, default 100, the most that the library finds on CUDA.
        max_tail: Queries with a larger tail mass get the exact mean; default None.

    Raises:
        ValueError: For numbers out of range.
    """

    @override
    def prepare(self, bank: LatentBank) -> None:
        """Checks the settings and the library.

        Raises:
            ValueError: If `k` is above the rows of the bank, or above 100 for a bank on CUDA.
            ImportError: If torch_cluster is not installed, or for another build of torch.
        """
        super().prepare(bank)
        _library()
        _require_room(bank.device, self.k)

    @override
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """The posterior over the rows that are found.

        Raises:
            ValueError: For more than 100 rows for queries on CUDA.
        """
        with full_precision():
            table = self.search(bank, queries, min(max(self.k, k), max(queries.sizes)))
            post = Exact().solve(bank, queries, k, self._finish, table=table)
        wrong = [] if self.max_tail is None else indices_of(post.tail_mass > self.max_tail)
        if not wrong:
            return post
        exact = Exact().posterior(bank, queries.select(wrong), k)
        return replace_queries(post, wrong, exact, len(queries))

    def search(self, bank: LatentBank, queries: Queries, n: int) -> Tensor:
        """The n rows nearest to each query, (B, n), int64, each once; then -1 for none.

        Only a query with NaN may find no row.
        """
        device = queries.xt.device
        _require_room(device, n)
        groups = sorted(queries.groups, key=lambda group: group[1].start)
        table = torch.full((len(queries), n), -1, dtype=torch.int64, device=device)
        if any(one.stop > other.start for (_, one), (_, other) in pairwise(groups)):
            for at, _ in groups:
                table[queries.index(at)] = self.search(bank, queries.select(at), n)
            return table
        # Rows between two groups form a set without queries, so the bank is not copied.
        sizes, counts = [], []
        start = stop = groups[0][1].start
        for at, segment in groups:
            sizes += [segment.start - stop, segment.stop - segment.start]
            counts += [0, len(at)]
            stop = segment.stop
        order = queries.index([i for at, _ in groups for i in at])
        dtype, scale = _dtype(bank), _scale(bank)
        y, _ = _position(bank, queries)
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
        table[order[owner], place] = column + start
        return table

    def rounding(self, bank: LatentBank, y: Tensor, distance: Tensor) -> Tensor:
        """The `v` of the module, (B,), for queries at y, (B, D), and the farthest row found."""
        unit = torch.finfo(_dtype(bank)).eps / 2
        shift = (bank.centre - bank.offset).norm().to(y.device)
        query = torch.linalg.vector_norm(y, dim=1) + shift
        return 4 * unit * distance * ((bank.dim + 32) * distance + query)

    def _finish(self, found: LogWeights, leading: Leading) -> Posterior:
        """The mean over the found rows, and a bound of the tail mass."""
        assert found.table is not None
        mean = found.moment(leading.columns, leading.shares) + found.product(leading.rest)
        bank, queries, none = found.bank, found.queries, found.table < 0
        # Any found row gives a bound, that of least weight the best one.
        last = found.logits.masked_fill(none, torch.inf).argmin(1, keepdim=True)
        log_last = found.differences(last)[:, 0]
        alpha, sigma, radius = queries.path.alpha, queries.path.sigma, _reach(bank)
        y, wider = _position(bank, queries)
        distance = ((-2 * log_last).sqrt() * sigma + (wider - alpha) * radius) / wider
        excess = wider * self.rounding(bank, y, distance) + (wider - alpha) * radius**2
        log_last = log_last + alpha * excess / (2 * sigma**2)
        rest = queries.index(queries.sizes) - (~none).sum(1)
        tail = torch.sigmoid(rest.double().log() + log_last - leading.post.log_evidence)
        return replace(leading.post, mean=mean, tail_mass=tail, tail_kind="bounded")


def _reach(bank: LatentBank) -> float:
    """R, the largest distance of a row from the bank's mean; above 0 for any bank."""
    return max(bank.radius, 1e-9 * bank.max_norm) or 1.0


def _position(bank: LatentBank, queries: Queries) -> tuple[Tensor, Tensor]:
    """`y` around the bank's mean, (B, D), and `a'`, (B,); both float64."""
    alpha = queries.path.alpha
    z = queries.xt - alpha[:, None] * bank.centre.to(queries.xt.device)
    least = torch.linalg.vector_norm(z, dim=1) / (_FARTHEST * _reach(bank))
    wider = torch.maximum(alpha, least).clamp_min(torch.finfo(alpha.dtype).tiny)
    return z / wider[:, None], wider


def _dtype(bank: LatentBank) -> torch.dtype:
    return torch.float64 if bank.dtype == torch.float64 else torch.float32


def _scale(bank: LatentBank) -> float:
    """A power of two that brings distances of scaled rows into the kernel's range."""
    farthest = (_FARTHEST + 1) * _reach(bank)
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
            "build of torch. It is compiled against the installed torch: pip install "
            f"--no-build-isolation 'stagewise[cluster]'. The import says: {error}"
        ) from error
    return knn
