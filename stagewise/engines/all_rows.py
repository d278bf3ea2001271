r"""All rows for many queries, by two products: used by the exact engine on CUDA beside `fused`.

The log-weights of all rows are one product, as in `stagewise.engines.exact`, with an error `delta`
(`products.rounding`, with truncation). The 512 largest of each query are computed again around r,
which is `x_1` or else the row of the largest weight, by the kernel of `stagewise.engines.fused`.
All others are the second product, in one 16-bit part: each weight is 1/512 at most, and rounding
moves the mean by at most

    2^-9 R (sum_i w_i^2)^(1/2) <= 2^-9 512^(-1/2) R = 9e-5 R,

R the root mean square of |x - c|. With a smaller `rtol` they are split in two parts. If a query
has all rows, weights count from their mean, so that the error is far smaller near noise.

The effect of the other logits' error on the mean is estimated as in `exact`. Queries for which it
is above `rtol |m - r|` are answered again by one pass over all rows; the device keeps their list,
and no number is read back.
"""

from __future__ import annotations

import torch

from stagewise.bank import LatentBank
from stagewise.engines import product_kernels  # noqa: F401 (makes its kernels known)
from stagewise.engines.fused import CHOSEN_PARTS, MOST, Around, listing
from stagewise.engines.kernels import launch
from stagewise.posterior import Posterior
from stagewise.products import averages, full_precision, rounding, scores
from stagewise.queries import Queries

__all__ = ["LEADING", "posterior"]

LEADING = 512
"""Rows of a query that are computed again."""

_LOGIT_BYTES = 2**32
"""Memory for logits, 4 bytes for each part of a query and row."""

_PULL_BYTES = 2**30
"""Memory for the partial sums of queries that are answered again."""

_ROWS, _SUMMED = 1024, 4096
"""Rows per program, in kernels that write each row, and in kernels that sum rows."""

_DIGITS = {torch.bfloat16: 9, torch.float16: 12, torch.float32: 24}


def posterior(bank: LatentBank, queries: Queries, k: int, rtol: float | None) -> Posterior:
    """The posterior of each query over the rows between its ends. Costs no device sync.

    The bank has more than `LEADING` + k rows, and `fused.serves` it. `rtol` is the largest
    `|dm| / |m - r|`, None for no check.
    """
    step = min(_LOGIT_BYTES // (8 * len(bank)), _PULL_BYTES // (4 * bank.dim * CHOSEN_PARTS))
    step = min(MOST, max(1, step))
    with full_precision():
        return Posterior.cat([_posterior(bank, some, k, rtol) for some in queries.split(step)])


def _posterior(bank: LatentBank, queries: Queries, k: int, rtol: float | None) -> Posterior:
    xt, path, width = queries.xt.contiguous(), queries.path, len(bank)
    ends, device, (count, dim) = queries.ends_on_device, xt.device, xt.shape
    alpha, sigma = path.alpha.contiguous(), path.sigma.contiguous()
    halves = bank.dtype != torch.float32
    centre, mean_norm = bank.centre.to(device), bank.mean_sq_norm.to(device)
    shift = centre - bank.offset.to(device)
    norms = bank.sq_norms.to(device)
    query = torch.empty(count * (1 + halves), dim, dtype=bank.dtype, device=device)
    figures = alpha.new_empty(count, 4)
    block = max(16, 1 << (dim - 1).bit_length())
    given = [xt, centre, shift, mean_norm, alpha, sigma]
    launch("project", [count], given, [query, figures], [dim, block, halves], 8)
    logits = scores(query, bank.rows)
    grid = [-(-width // _ROWS), count]
    launch("weigh", grid, [figures, norms, mean_norm, ends], [logits], [width, _ROWS, halves])
    logits = logits[:count]

    first = max(LEADING, k)
    value, column = logits.topk(first + 1, dim=1)
    lead, peaks = column[:, :first], value[:, first].contiguous()
    table = lead.masked_fill(value[:, :first] == -torch.inf, -1)
    near = bank.take(lead[:, 0], device) if queries.x1 is None else queries.x1
    around = Around(bank, queries, near)
    parts = around.parts(table, first, listed=k > 1, tabled=True, spare=1)
    logits.scatter_(1, lead, -torch.inf)

    blocks = -(-width // _SUMMED)
    totals = torch.empty(count, blocks, 3, dtype=torch.float32, device=device)
    launch("tail_sums", [blocks, count], [logits, peaks], [totals], [width, _SUMMED])
    totals = totals.sum(1, dtype=torch.float64)
    both = halves and rtol is not None and 2.0 ** -_DIGITS[bank.dtype] > rtol * first**0.5
    # Rows start at addresses that a GPU reads fastest.
    padded = -(-width // 64) * 64
    weights = torch.empty(count * (1 + both), padded, dtype=bank.dtype, device=device)
    given = [logits, peaks, totals, ends]
    launch("tail_weights", grid, given, [weights], [width, padded, _ROWS, both])
    averaged = averages(weights[:, :width], bank.rows)
    averaged = averaged[:count] + averaged[count:] if both else averaged
    given = [averaged, peaks, totals, ends, column, figures, around.factors, shift, around.origin]
    numbers = [width, parts.sums.shape[1], dim, first + 1, min(block, 512)]
    launch("tail_part", [count, -(-dim // min(block, 512))], given, parts[:3], numbers)
    mean, told, row = around.merge(parts)

    if rtol is not None:
        rounded = 2.0 ** -_DIGITS[torch.float32 if both else bank.dtype]
        reach = bank.radius if bank.shifted else bank.max_norm
        values = [rtol, *rounding(bank.dtype, dim, truncates=halves), rounded, reach]
        order = torch.zeros(count + 1, dtype=torch.int32, device=device)
        given = [mean, around.near, told, peaks, totals, column, norms, mean_norm, figures]
        given += [around.factors, alpha, sigma]
        launch("judge", [count], given, [order], [width, dim, first + 1, block], 8, values)
        again = around.parts(ends, width, order=order)
        around.merge(again, (mean, told, row), order)
    return listing(mean, told, row, k, parts.logits, lambda place: table.gather(1, place))
