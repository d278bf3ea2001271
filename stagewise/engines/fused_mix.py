# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
r"""What `Mix` adds to the targets of a class-wise batch on CUDA: five launches, no sync.

    value = lambda c_t (m - x_1),

with m - x_1 by formula (2) of `stagewise.targets`. `placed` looks up each sample, `fused.Around`
reads the rows of its class, and `settle` replaces the row that x_1 stands for by x_1. If x_1 is a
row, r is its stored value, and differences from r are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.building import whole_labels
from stagewise.engines import fused
from stagewise.engines.fused_lookup import placed
from stagewise.engines.kernels import kernel, launch, shape_of, tl
from stagewise.paths import PathCoefficients
from stagewise.queries import Queries

__all__ = ["Mixed", "mixed", "takes"]

_BLOCK = 1024
"""Numbers of a sample that `settle` holds in registers, in five vectors of float64."""


class Mixed(NamedTuple):
    """What is added to the targets of B samples.

    Attributes:
        value: `lambda c_t (m - x_1)`, (B, *); 0 where it is within its rounding.
        top1: Largest weight of the set with x_1 in it, (B,), float64; 0 if lambda was given.
        row: The row that x_1 stands for, (B,), int64; -1 for none of its class.
        inserted: Whether x_1 equals no row of its class, and lambda is not 0, (B,).
        tail_mass: 0, (B,), float64.
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
    told,
    logits,
    row_of,
    ends,
    alpha,
    sigma,
    scale,
    lam,
    missing,
    value,
    top1,
    inserted,
    width,
    dim: tl.constexpr,
    block: tl.constexpr,
    weighed: tl.constexpr,
    listed: tl.constexpr,
    columns: tl.constexpr,
    rounding,
) -> None:
    """Formula (2), and the largest weight."""
    b = tl.program_id(0).to(tl.int64)
    a, s, row = tl.load(alpha + b), tl.load(sigma + b), tl.load(row_of + b)
    relative, scaled = tl.load(told + 5 * b + 4), a / (s * s)
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
        difference = tl.where(tl.abs(difference) <= rounding, 0.0, difference)
        out = (times * difference).to(value.dtype.element_ty)
        tl.store(value + b * dim + at, out, mask=inside)
    largest = tl.full((), 0.0, tl.float64)
    if listed:
        peak = tl.full((), float("-inf"), tl.float32)
        skipped = row - tl.load(ends + 2 * b)
        for start in range(0, width, columns):
            column = start + tl.arange(0, columns)
            kept = (column < width) & (column != skipped)
            score = tl.load(logits + b * width + column, mask=kept, other=float("-inf"))
            peak = tl.maximum(peak, tl.max(score, axis=0))
        largest = tl.maximum(tl.exp(peak.to(tl.float64) - relative), own)
        largest = tl.where(own == float("inf"), 1.0, largest / total)
    tl.store(top1 + 2 * b, largest)
    tl.store(top1 + 2 * b + 1, 0.0)


def takes(bank: LatentBank, x1: Tensor) -> bool:
    """Whether `mixed` accepts this number and type of samples, if `fused.serves` is true.

    `bank.find` looks up samples of fewer digits than the rows.
    """
    narrow = x1.dtype.itemsize < bank.dtype.itemsize
    half = x1.dtype.itemsize == bank.dtype.itemsize == 2
    narrow |= half and (x1.dtype != bank.dtype or bank.shifted)
    width = bank.largest_class
    fits = len(x1) <= fused.at_a_time(bank, width)
    return not narrow and fits and fused.by_rows(bank, len(x1), width)


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
    *,
    named: bool,
    dtype: torch.dtype,
) -> Mixed:
    """What `Mix` adds to the targets of a batch: five launches.

    `fused.serves` and `takes` must be true. `path` has the coefficients at the times, float64,
    sigma above 0; `scale` is `c_t`, (B,), float64; `lam` is lambda, (B,), float64, None if it
    depends on the largest weight. `named` is as in `placed`, `dtype` that of the value.
    """
    flat, given = (x.detach().flatten(1).contiguous() for x in (xt, x1))
    labels = None if labels is None else whole_labels(labels, len(x1))
    found = placed(bank, given, t, labels, source, named)
    around = fused.Around(bank, Queries(flat, path, None, ends=found.ends), found.near)
    parts = around.parts(found.ends, bank.largest_class, listed=lam is None)
    mean, told, _ = around.merge(parts)
    value = torch.empty_like(given, dtype=dtype)
    top1, inserted = torch.empty_like(told[:, :2]), torch.empty_like(found.missing)
    width, dim = parts.logits.shape[1], bank.dim
    tensors = [flat, given, found.near, bank.rows, bank.offset, mean, told, parts.logits]
    tensors += [found.row, found.ends, path.alpha, path.sigma, scale]
    tensors += [scale if lam is None else lam, found.missing]
    launch(
        *("settle", [len(x1)], [x.contiguous() for x in tensors], [value, top1, inserted]),
        [width, dim, min(shape_of(dim, 8)[0], _BLOCK), lam is not None, lam is None, 1024],
        values=[16 * torch.finfo(torch.float64).eps * bank.max_norm],
    )
    return Mixed(value.reshape(x1.shape), top1[:, 0], found.row, inserted, top1[:, 1], found.wrong)
