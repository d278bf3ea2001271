r"""The covariance spectrum of a bank: it predicts the boundary without a query.

A sample of a Gaussian of that covariance is distinguished from N - 1 others when the information in
`x_t` reaches log N,

    1/2 sum_k log(1 + rho_t^2 lambda_k) = log N

(after Biroli et al., arXiv 2402.18491, for Gaussian data). Real data are not Gaussian and collapse
later, so this places the grid and a line in the plot, and is not a measurement.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.paths import Path

__all__ = ["information", "predicted_boundary", "spectrum"]

_MAX_ROWS, _MAX_CLASSES = 2048, 8
"""Rows and classes that are used, evenly spaced; fewer rows if these take a gigabyte."""


def spectrum(bank: LatentBank, segment: slice | None = None) -> Tensor:
    """Variances of the rows, default all, along principal axes, ascending, float64, on the CPU."""
    segment = segment or bank.whole
    few = min(_MAX_ROWS, max(64, 2**27 // bank.dim))
    step = math.ceil((segment.stop - segment.start) / few)
    x = bank.take(torch.arange(segment.start, segment.stop, step)).cpu()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < bank.dim else x.T @ x
    return torch.linalg.eigvalsh(gram).clamp_min(0) / len(x)


def information(snr_sqrt: Tensor, eigenvalues: Tensor) -> Tensor:
    """`1/2 sum_k log(1 + rho^2 lambda_k)` for `rho_t`, (B,): (B,), float64.

    The information in `x_t` about `x_1` in nats for Gaussian rows of these variances: about
    `N exp(-information)` rows explain a query.
    """
    power = snr_sqrt.double().square()[:, None]
    return torch.log1p(power * eigenvalues.to(snr_sqrt.device)).sum(1) / 2


def predicted_boundary(bank: LatentBank, path: Path, *, class_wise: bool = False) -> float:
    """Predicts the boundary from the spectrum of the bank, without a query.

    Args:
        bank: The bank.
        path: The path of training.
        class_wise: Whether the posterior is class-wise: then the median over classes. Default
            False.

    Returns:
        t in [0, 1]; NaN if all rows are equal.

    Raises:
        ValueError: If `class_wise` is true and the bank has no labels.
    """
    segments = bank.scopes(class_wise)
    segments = segments[:: math.ceil(len(segments) / _MAX_CLASSES)]
    found = []
    for segment in segments:
        nats = math.log(segment.stop - segment.start)
        variances = spectrum(bank, segment)
        largest = float(variances.max())
        if largest <= 0:
            continue

        def missing(log_rho: float, variances: Tensor = variances, nats: float = nats) -> float:
            rho = torch.tensor([math.exp(log_rho)], dtype=torch.float64)
            return float(information(rho, variances)) - nats

        # Between no information at all and more than log N from the leading direction alone.
        high = nats + 1 - 0.5 * math.log(largest)
        found.append(path.time_of_snr_sqrt(math.exp(brentq(missing, high - 60, high))))
    return float(np.median(found)) if found else math.nan
