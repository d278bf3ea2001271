r"""The posterior of few queries over few rows on a CPU: float64, all queries and rows at once.

With c the bank's mean and `y = x_t - a c`, the log-weights of all rows are

    l_i = (a <y, x^(i) - c> - a^2 ||x^(i) - c||^2 / 2 - ||y||^2 / 2) / s^2.

`Exact` groups queries by the rows they look at, multiplies in float32 and looks for queries in
which that shows: some hundred small operations, which cost more than all numbers of a small bank.
Here every query is multiplied with every row in float64; then its own rows are selected. Near the
data, where that shows too, the largest log-weights come from differences.
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
"""Numbers of rows, of those times queries, and pairs of query and row, up to which this costs less
than `Exact`."""

_SHOWS = 1e-9
"""Log-weights with a larger error are computed from differences."""

_LEADING = 8
"""Rows whose log-weights come from differences there."""


def centred_rows(bank: LatentBank) -> Tensor | None:
    """The rows less their mean, (N, D), float64, to be kept.

    None if there are too many, they change, or they are not on the CPU.
    """
    if bank.rows.numel() > _ROWS or bank.device.type != "cpu" or bank.origin:
        return None
    return bank.rows.double() + (bank.offset - bank.centre)


def serves(rows: Tensor, queries: Queries) -> bool:
    """Whether these queries are few enough, and all beside the rows."""
    x = queries.xt
    there = type(x) is Tensor and x.device == rows.device and queries.segments is not None
    pairs = len(x) * len(rows)
    return there and pairs <= _PAIRS and pairs * rows.shape[1] <= _PRODUCT


def posterior(bank: LatentBank, rows: Tensor, queries: Queries, k: int) -> Posterior:
    """The posterior of a bank whose `centred_rows` are given; see `Engine.posterior`."""
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
    if near := indices_of(error[:, 0] > _SHOWS):
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
