r"""The exact engine: every row, streamed in chunks.

With the bank's mean `c` and `y = x_t - a_t c`, the log-weights are one matrix product,

    l_i = (a/s^2) <y, x^(i)> - (a^2 / 2 s^2) ||x^(i) - c||^2 - (a/s^2) <y, c> - ||y||^2 / 2 s^2,

and the posterior of a chunk is merged into the one so far (`posterior.merge` is an online
log-sum-exp), so memory is O(B (D + chunk)) beside the bank, for any number of rows.

The product loses `||x||^2 eps / s^2` of every logit, which in float32 is useless at small `s_t`
(a logit is off by 250 at s = 0.001, D = 4096). The engine therefore computes in float64, whatever
the dtype the bank is stored in; on the CPUs it was measured on that costs 1.5 to 1.8 times the same
computation in float32. `sigma_floor` is the noise level below which even float64 loses the fourth
digit after the point of a logit; the oracle is evaluated there instead.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, merge

__all__ = ["exact_posterior", "sigma_floor"]

_CHUNK_BYTES = 32 * 2**20
"""A chunk of the bank, and of the logits, in the working dtype: small beside any memory, large
enough that the matrix products run at full speed."""


def sigma_floor(bank: LatentBank) -> float:
    """The noise level at which rounding moves a logit by 1e-4: about 1.5e-6 x the norm of a row.

    Args:
        bank: The bank; its largest row norms, centred and not, decide.

    Returns:
        A standard deviation in the units of the bank.
    """
    eps = torch.finfo(torch.float64).eps
    product = max(bank.radius * bank.max_norm, torch.finfo(torch.float32).tiny)
    return math.sqrt(product * eps / 1e-4)


def exact_posterior(
    bank: LatentBank,
    xt: Tensor,
    path: PathCoefficients,
    *,
    segment: slice | None = None,
    k: int = 1,
    chunk_size: int | None = None,
) -> Posterior:
    """The posterior of B queries over a contiguous part of the bank.

    Args:
        bank: The rows. They may lie on another device than the queries; chunks are moved.
        xt: Queries, (B, D), float64.
        path: Coefficients at the B times, each (B,), float64, sigma above 0.
        segment: Which rows, in the bank's own order; default all.
        k: How many of the largest weights to keep, default 1.
        chunk_size: Rows per chunk; default: as many as make 32 MiB of rows or of logits, but at
            least 256.

    Returns:
        The exact posterior, with `rows` in the bank's own order and `tail_mass` 0.
    """
    alpha, sigma = path.alpha[:, None], path.sigma[:, None]
    start, stop, _ = (segment or slice(None)).indices(len(bank))
    if chunk_size is None:
        chunk_size = max(256, _CHUNK_BYTES // (xt.element_size() * max(xt.shape)))
    centre = bank.centre.to(xt)
    y = xt - alpha * centre
    query = y * (alpha / sigma**2)
    half_snr = (path.alpha / path.sigma) ** 2 / 2
    post: Posterior | None = None
    for first in range(start, stop, chunk_size):
        rows = slice(first, min(first + chunk_size, stop))
        x = bank.rows[rows].to(device=xt.device, dtype=xt.dtype, non_blocking=True)
        norms = bank.sq_norms[rows].to(device=xt.device, dtype=xt.dtype, non_blocking=True)
        logits = (query @ x.T).addr_(half_snr, norms, alpha=-1)
        part = Posterior.from_logits(logits, x, k, first)
        post = part if post is None else merge(post, part, k=k)
    assert post is not None, "no empty segment can arise: every class of a bank has rows"
    # What all rows share changes nothing but the evidence.
    shared = query @ centre + (y * y).sum(1) / (2 * path.sigma**2)
    return replace(post, log_evidence=post.log_evidence - shared)
