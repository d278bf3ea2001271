# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
r"""What a target adds to a batch on CUDA, without a sync: `value = lambda c_t (m - x_1)`.

`placed` looks up each sample, an engine or a table of rows gives the posterior around r, and
`settle` replaces the row that x_1 stands for by x_1, by formula (2) of `stagewise.targets`. If x_1
is a row, r is its stored value, and differences from r are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines import fused
from stagewise.engines.fused_lookup import placed
from stagewise.engines.kernels import kernel, launch, part_of, tl
from stagewise.paths import PathCoefficients, Prediction
from stagewise.posterior import Posterior
from stagewise.queries import Queries

__all__ = ["Mixed", "mixed", "scaled"]


class Mixed(NamedTuple):
    """What is added to the targets of B samples.

    Attributes:
        value: `lambda c_t (m - x_1)`, (B, *); 0 where it is within its rounding.
        top1: Largest weight of the set with x_1 in it, (B,), float64; 0 if lambda was given.
        row: The row that x_1 stands for, (B,), int64; -1 for none of its class.
        inserted: Whether x_1 equals no row of its class, and lambda is not 0, (B,).
        tail_mass: Share of the posterior that was left out, (B,), float64.
        wrong: As in `Placed`, (B,).
    """

    value: Tensor
    top1: Tensor
    row: Tensor
    inserted: Tensor
    tail_mass: Tensor
    wrong: Tensor


@kernel
def settle(
    xt,
    x1,
    near,
    rows,
    offset,
    mean,
    log_evidence,
    weights,
    listed,
    row_of,
    alpha,
    sigma,
    scale,
    lam,
    missing,
    value,
    top1,
    inserted,
    dim: tl.constexpr,
    block: tl.constexpr,
    weighed: tl.constexpr,
    rounding,
) -> None:
    """Formula (2), and the largest weight."""
    b = tl.program_id(0).to(tl.int64)
    a, s, row = tl.load(alpha + b), tl.load(sigma + b), tl.load(row_of + b)
    relative, scaled = tl.load(log_evidence + b), a / (s * s)
    own, gamma = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    # Log-weights less that of r, from differences; a part of the numbers at a time.
    for start in range(0, dim, block):
        at = start + tl.arange(0, block)
        inside = at < dim
        r = tl.load(near + b * dim + at, mask=inside, other=0.0)
        x = tl.load(x1 + b * dim + at, mask=inside, other=0.0).to(tl.float64)
        noisy = tl.load(xt + b * dim + at, mask=inside, other=0.0).to(tl.float64)
        stored = tl.load(rows + row * dim + at, mask=inside & (row >= 0), other=0.0)
        twin = stored.to(tl.float64) + tl.load(offset + at, mask=inside, other=0.0)
        twin = tl.where(row >= 0, twin, r)
        own += scaled * tl.sum((x - r) * (noisy - a * (x + r) / 2), axis=0)
        gamma += scaled * tl.sum((twin - r) * (noisy - a * (twin + r) / 2), axis=0)
        gap = tl.where(inside, noisy - a * r, 0.0)
        relative += tl.sum(gap * gap, axis=0) / (2 * s * s)
    own = tl.exp(own - relative)
    gamma = tl.where(row >= 0, tl.minimum(tl.exp(gamma - relative), 1.0), 0.0)
    total = tl.maximum(1 - gamma + own, 2.2250738585072014e-308)
    times, put_in = tl.load(scale + b), tl.load(missing + b) != 0
    if weighed:
        factor = tl.load(lam + b)
        times, put_in = factor * times, put_in & (factor != 0)
    tl.store(inserted + b, put_in)
    for start in range(0, dim, block):
        at = start + tl.arange(0, block)
        inside = at < dim
        r = tl.load(near + b * dim + at, mask=inside, other=0.0)
        x = tl.load(x1 + b * dim + at, mask=inside, other=0.0).to(tl.float64)
        stored = tl.load(rows + row * dim + at, mask=inside & (row >= 0), other=0.0)
        twin = stored.to(tl.float64) + tl.load(offset + at, mask=inside, other=0.0)
        twin = tl.where(row >= 0, twin, x)
        m = tl.load(mean + b * dim + at, mask=inside, other=0.0)
        difference = ((m - r) + (r - x) - gamma * (twin - x)) / total
        # At t = 1 some paths have an infinite c_t.
        out = tl.where(tl.abs(difference) <= rounding, 0.0, times * difference)
        tl.store(value + b * dim + at, out.to(value.dtype.element_ty), mask=inside)
    largest = tl.full((), 0.0, tl.float64)
    if not weighed:  # of two weights, one may be that of the row
        for i in range(2):
            weight, which = tl.load(weights + 2 * b + i), tl.load(listed + 2 * b + i)
            largest = tl.maximum(largest, tl.where(which == row, 0.0, weight))
        largest = tl.maximum(largest, own)
        largest = tl.where(own == float("inf"), 1.0, largest / total)
    tl.store(top1 + b, largest)


@kernel
def scale(difference, factor, value, dim, block: tl.constexpr, rounding) -> None:
    """`c_t (m - x_1)`, 0 where the difference is within its rounding."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    gap = tl.load(difference + b * dim + at, mask=at < dim, other=0.0)
    gap = tl.where(tl.abs(gap) <= rounding, 0.0, tl.load(factor + b) * gap)
    tl.store(value + b * dim + at, gap.to(value.dtype.element_ty), mask=at < dim)


def scaled(
    bank: LatentBank,
    queries: Queries,
    difference: Tensor,
    prediction: Prediction,
    lam: Tensor | float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`lambda c_t (m - x_1)` for a `difference` m - x_1, (B, D), float64, as `dtype`.

    It is 0 where the difference is within its rounding: at t = 1 some paths have an infinite `c_t`.
    """
    factor, gap = prediction.of_data(queries.path), None
    factor = factor if isinstance(lam, (int, float)) and lam == 1 else lam * factor
    if fused.serves(bank, difference.device):
        gap = fused.runs(_scaled, difference, factor, _rounding(bank), dtype)
    if gap is None:
        within = difference.abs() <= _rounding(bank)
        gap = torch.where(within, 0.0, factor[:, None] * difference).to(dtype)
    return gap if queries.valid is None else gap.where(queries.valid, 0)


def _rounding(bank: LatentBank) -> float:
    """The largest number of a difference m - x_1 that may be rounding."""
    return 16 * torch.finfo(torch.float64).eps * bank.max_norm


def _scaled(difference: Tensor, factor: Tensor, rounding: float, dtype: torch.dtype) -> Tensor:
    (count, dim), difference = difference.shape, difference.contiguous()
    value, step = torch.empty_like(difference, dtype=dtype), part_of(dim)
    read = [difference, factor.contiguous()]
    launch("scale", [count, -(-dim // step)], read, [value], [dim, step], values=[rounding])
    return value


def mixed(
    bank: LatentBank,
    xt: Tensor,
    t: Tensor,
    x1: Tensor,
    labels: Tensor | None,
    source: Tensor | None,
    path: PathCoefficients,
    scale: Tensor,
    lam: Tensor | None,
    ask: Callable[[Queries, int], Posterior],
    *,
    named: bool,
    class_wise: bool,
    dtype: torch.dtype,
) -> Mixed:
    """What a target adds to a batch, for a bank that `fused.serves`.

    `path` has the coefficients at the times, float64, sigma above 0; `scale` is `c_t`, (B,),
    float64; `lam` is lambda, (B,), float64, None if it depends on the largest weight. `ask` gives
    the posterior of queries, with this many weights, over their rows or some of them. `labels`,
    `named` and `class_wise` are as in `placed`, `dtype` is that of the value.
    """
    flat, given = xt.detach().flatten(1).double(), x1.detach().flatten(1).contiguous()
    found = placed(bank, given, t, labels, source, named, class_wise)
    segments = None if class_wise else [bank.whole] * len(x1)
    asked = Queries(flat, path, segments, ends=found.ends, x1=found.near, twin=found.row)
    post = ask(asked, 1 if lam is not None else 2)
    value = torch.empty_like(given, dtype=dtype)
    top1, inserted = torch.empty_like(post.log_evidence), torch.empty_like(found.missing)
    tensors = [flat, given, found.near, bank.rows, bank.offset, post.mean, post.log_evidence]
    tensors += [post.weights, post.rows, found.row, path.alpha, path.sigma, scale]
    tensors += [scale if lam is None else lam, found.missing]
    launch(
        *("settle", [len(x1)], [x.contiguous() for x in tensors], [value, top1, inserted]),
        [bank.dim, part_of(bank.dim), lam is not None],
        values=[_rounding(bank)],
    )
    return Mixed(value.view_as(x1), top1, found.row, inserted, post.tail_mass, found.wrong)
