"""The covariance spectrum of a bank: what it tells of the posterior before any query."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagewise.bank import LatentBank

__all__ = ["information", "spectrum"]


def spectrum(bank: LatentBank, segment: slice | None = None, *, max_rows: int = 2048) -> Tensor:
    """Variances of the rows along their principal axes.

    Args:
        bank: The bank.
        segment: Which rows, default all.
        max_rows: Rows (evenly spaced) that are looked at, default 2048; fewer if they would take
            more than a gigabyte.

    Returns:
        Eigenvalues of the covariance, ascending, float64, on the CPU; as many as rows were looked
        at or as a row has numbers, whichever is less.
    """
    segment = segment or bank.whole
    few = min(max_rows, max(64, 2**27 // bank.dim))
    step = math.ceil((segment.stop - segment.start) / few)
    x = bank.take(torch.arange(segment.start, segment.stop, step)).cpu()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < bank.dim else x.T @ x
    return torch.linalg.eigvalsh(gram).clamp_min(0) / len(x)


def information(snr_sqrt: Tensor, eigenvalues: Tensor) -> Tensor:
    """What `x_t` tells of `x_1` in nats, if the rows were Gaussian.

    `1/2 sum_k log(1 + rho^2 lambda_k)`: about `N exp(-information)` rows explain a query.

    Args:
        snr_sqrt: `rho_t`, (B,).
        eigenvalues: See `spectrum`.

    Returns:
        (B,), float64.
    """
    power = snr_sqrt.double().square()[:, None]
    return torch.log1p(power * eigenvalues.to(snr_sqrt.device)).sum(1) / 2
