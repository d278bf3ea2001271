r"""The posterior of few queries over few rows on a CPU: all of them at once, in float64.

With c the mean of the bank and `y = x_t - a c`, the log-weights of the rows are

    l_i = (a <y, x^(i) - c> - a^2 ||x^(i) - c||^2 / 2 - ||y||^2 / 2) / s^2.

`Exact` groups queries by class, multiplies in float32 and repeats queries whose rounding error is
too large: some hundred small operations, which take longer than the arithmetic of a small bank.
Here every query is multiplied with every row in float64, and then the rows of its class are
selected. Near the data even float64 rounds too much; there the largest log-weights are computed
from the differences `y - a (x^(i) - c)`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import lost
from stagewise.posterior import NO_ROW, Posterior, posterior_of
from stagewise.products import rounding
from stagewise.queries import Queries, indices_of

__all__ = ["centred_rows", "posterior", "serves"]

_ROWS, _PRODUCT, _PAIRS = 2**18, 2**24, 2**17
"""Up to these sizes this is faster than `Exact`: numbers in the bank, multiplications of a call,
and pairs of query and row."""

_ERROR = 1e-9
"""With a larger rounding error, log-weights are computed from differences."""

_LEADING = 8
"""Rows of each query whose log-weights are then computed from differences."""


def centred_rows(bank: LatentBank) -> Tensor | None:
    """The rows minus their mean, (N, D), float64, for `posterior`.

    None if the bank is too large, its rows change, or it is not on the CPU.
    """
    if bank.rows.numel() > _ROWS or bank.device.type != "cpu" or bank.origin:
        return None
    return bank.rows.double() + (bank.offset - bank.centre)


def serves(rows: Tensor, queries: Queries) -> bool:
    """Whether the queries are few enough, and on the device of the rows."""
    x = queries.xt
    there = type(x) is Tensor and x.device == rows.device and queries.segments is not None
    pairs = len(x) * len(rows)
    return there and pairs <= _PAIRS and pairs * rows.shape[1] <= _PRODUCT


def posterior(bank: LatentBank, rows: Tensor, queries: Queries, k: int) -> Posterior:
    """The posterior over a bank, as `Engine.posterior` gives it, from its `centred_rows`."""
    alpha, sigma, *_ = (value[:, None] for value in queries.path)
    y = torch.addcmul(queries.xt, alpha, bank.centre, value=-1)
    half, variance = y.square().sum(1, keepdim=True) / 2, sigma.square()
    products = (alpha * y) @ rows.T
    logits = products.addr_(alpha[:, 0].square(), bank.sq_norms, alpha=-0.5)
    number, sizes = torch.arange(len(rows)), queries.sizes
    own, width, whole = number.expand_as(logits), max(sizes), min(sizes) == len(rows)
    at = own
    if not whole:
        first, stop = queries.ends_on_device.split(1, dim=1)
        own = first + number[:width]
        own, at = own.where(own < stop, -1), own.clamp_max(len(rows) - 1)
        logits = logits.gather(1, at)
    logits = (logits - half) / variance
    digits, _ = rounding(torch.float64, bank.dim)
    error = (digits * bank.radius) * alpha * half.sqrt() / variance
    if near := indices_of(error[:, 0] > _ERROR):
        some = queries.index(near)
        lead = logits[some].masked_fill(own[some] < 0, NO_ROW)
        lead = lead.topk(min(_LEADING, width), dim=1).indices
        gap = y[some, None] - alpha[some, None] * rows[at[some].gather(1, lead)]
        found = gap.square().sum(2) / (-2 * variance[some])
        far = lost((2 * half[some]).sqrt(), alpha[some] * bank.radius, sigma[some])
        logits[some[:, None], lead] = found.masked_fill(far, torch.nan)
    post, shares = posterior_of(logits, own, k)
    weights = shares if whole else products.zero_().scatter_add_(1, at, shares)
    return replace(post, mean=torch.addmm(bank.centre, weights, rows))
