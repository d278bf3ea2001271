"""What others do, and the floor: bare products.

Everything takes bank rows `x` (N, D), queries `xt` (B, D) and times `t` (B,) of the linear path, in
the dtype to compute in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stagewise import LinearPath
from stagewise.products import averages, full_precision, scores


def gaussian(
    n: int, dim: int, queries: int, t_max: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit-Gaussian rows, and noisy samples of some, t ~ U(0, t_max) above 0.001.

    x, source, t, xt.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    source = torch.randint(n, (queries,), generator=generator)
    t = 0.001 + (t_max - 0.001) * torch.rand(queries, generator=generator)
    x0 = torch.randn(queries, dim, generator=generator)
    return x, source, t, LinearPath().interpolate(x0, x[source], t)


def log_weights(x: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """`-||x_t - t x||^2 / 2 (1 - t)^2` (B, N) from explicit differences in float64."""
    x, xt, t = x.double(), xt.double(), t.double()[:, None]
    # ||x_t - t x|| = t ||x_t / t - x||; this mode of cdist makes no use of a product.
    gap = t * torch.cdist(xt / t, x, compute_mode="donot_use_mm_for_euclid_dist")
    return -gap.square() / (2 * (1 - t) ** 2)


def reference(x: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean (B, D) and weights (B, N) from explicit differences in float64."""
    gamma = torch.softmax(log_weights(x, xt, t), 1)
    return gamma @ x.double(), gamma


def relative(mean: Tensor, true: Tensor) -> float:
    """The largest relative error over the queries."""
    return float(((mean.double() - true).norm(dim=1) / true.norm(dim=1)).max())


def bare_products(
    x: Tensor, xt: Tensor, dtype: torch.dtype, onednn: bool = False
) -> Callable[[], Any]:
    """The floor: queries x rows and weights x rows, and nothing else."""
    rows, query = x.to(dtype), xt.to(dtype)
    weights = torch.rand(len(query), len(rows), dtype=dtype)
    if not onednn:
        return lambda: (query @ rows.T, weights @ rows)

    def run() -> tuple[Tensor, Tensor]:
        with full_precision():
            return scores(query, rows), averages(weights, rows)

    return run


def with_cdist(x: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """What one writes first: torch.cdist, then a softmax."""
    distance = torch.cdist(xt / t[:, None], x) * t[:, None]
    return torch.softmax(-distance.square() / (2 * (1 - t[:, None]) ** 2), 1) @ x


def with_products(x: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Squared norms and one product for the distances, one product for the mean."""
    t = t[:, None]
    square = xt.square().sum(1, keepdim=True) + t**2 * x.square().sum(1) - 2 * t * (xt @ x.T)
    return torch.softmax(-square / (2 * (1 - t) ** 2), 1) @ x


Found = Callable[[], tuple[Tensor, Tensor]]
"""Gives the means (B, D) and the rows that were found (B, k)."""


def with_faiss(x: Tensor, xt: Tensor, t: Tensor, k: int) -> Found:
    """The k nearest by a flat index, gathered, and the softmax of their distances."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x.numpy())

    def run() -> tuple[Tensor, Tensor]:
        square, near = index.search((xt / t[:, None]).numpy(), k)
        rows = torch.from_numpy(near)
        logits = -((t / (1 - t))[:, None] ** 2) * torch.from_numpy(square) / 2
        return torch.einsum("bk,bkd->bd", torch.softmax(logits, 1), x[rows]), rows

    return run


def with_torch_cluster(x: Tensor, xt: Tensor, t: Tensor, k: int) -> Found:
    """The same with `torch_cluster.knn`, which gives rows without distances."""
    import torch_cluster

    def run() -> tuple[Tensor, Tensor]:
        near = torch_cluster.knn(x, (xt / t[:, None]).contiguous(), k)[1].reshape(len(xt), k)
        gap = xt[:, None] - t[:, None, None] * x[near]
        logits = -gap.square().sum(2) / (2 * (1 - t[:, None]) ** 2)
        return torch.einsum("bk,bkd->bd", torch.softmax(logits, 1), x[near]), near

    return run


def with_keops(x: Tensor, xt: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """A symbolic matrix of log-weights, reduced by a softmax as it is made."""
    from pykeops.torch import LazyTensor

    def run() -> Tensor:
        query, rows = LazyTensor((xt / t[:, None])[:, None]), LazyTensor(x[None])
        scale = LazyTensor(((t / (1 - t)) ** 2 / 2)[:, None, None])
        logits = -((query - rows) ** 2).sum(-1) * scale
        return logits.sumsoftmaxweight(rows, axis=1)

    return run
