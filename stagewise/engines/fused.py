# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
r"""One pass over the rows of each query's class: what the exact engine runs on CUDA.

For a query `x_t = a x_1 + s eps`, a sample r near `x_1`, and row i,

    d_i = x^(i) - r,   q = x_t - a r,
    l_i - l_r = (|q|^2 - |q - a d_i|^2) / 2 s^2 = <d_i, (a/s^2) q - (a^2/2s^2) d_i>,             (1)
    m - r = sum_i gamma_i d_i.                                                                   (2)

A program reads some rows of a query's class, once. Of each it forms (1), keeps a softmax that runs
along (Milakov and Gimelshein, arXiv 1805.02867), and adds up (2) with it. So the mean costs what it
costs to read the rows. Nothing is subtracted afterwards: where the posterior has collapsed on a row
that is r, (2) is 0 to the last bit.

Float32 is enough. With r near `x_1`, `l_i - l_r` is about `-rho^2 |d_i|^2 / 2 - rho |d_i| z` with
`z ~ N(0, 1)`, so rows that carry weight have `rho |d_i|` of about 10 at most, and rounding moves
(1) by some `2^-24 rho |d_i|`: 1e-6. Log-weights far below the largest are off by more, and do not
matter. Where nobody knows `x_1`, a first pass from the bank's mean finds a row to use as r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = None

__all__ = ["LARGEST_DIM", "pulled"]

LARGEST_DIM = 2**13
"""Numbers in a sample, at most: a program keeps three such vectors in registers, beside rows."""

_SPLIT = 64
"""Rows that a program reads."""

_BYTES = 2**15
"""What it reads at a time: enough that the memory is never idle, few enough for its registers."""

if triton is not None:

    @triton.jit
    def pull(
        rows,
        query,
        near,
        linear,
        square,
        first,
        stop,
        logits,
        peaks,
        sums,
        pulls,
        width,
        dim: tl.constexpr,
        block: tl.constexpr,
        split: tl.constexpr,
        at_once: tl.constexpr,
    ) -> None:
        """(1) of some rows of a query's class, and its parts of the sums in (2)."""
        part, parts, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
        start = tl.load(first + b)
        begin = part * split
        end = tl.minimum(begin + split, (tl.load(stop + b) - start).to(tl.int32))
        at = tl.arange(0, block)
        inside = at < dim
        q = tl.load(query + b.to(tl.int64) * dim + at, mask=inside, other=0.0)
        r = tl.load(near + b.to(tl.int64) * dim + at, mask=inside, other=0.0)
        q = q * tl.load(linear + b)
        c = tl.load(square + b)
        # Columns that are not written below.
        column = begin + tl.arange(0, split)
        tl.store(
            logits + b.to(tl.int64) * width + column,
            tl.full((split,), float("-inf"), tl.float32),
            mask=(column >= end) & (column < width),
        )
        peak = tl.full((), float("-inf"), tl.float32)
        z = tl.full((), 0.0, tl.float32)
        total = tl.zeros((block,), tl.float32)
        # Rows are on their way while those before them are summed up.
        row = begin + tl.arange(0, at_once)
        read = (row < end)[:, None] & inside[None, :]
        x = tl.load(rows + ((start + row) * dim)[:, None] + at[None, :], mask=read, other=0.0)
        for _ in range(begin, end, at_once):
            there, d = row < end, tl.where(read, x.to(tl.float32) - r[None, :], 0.0)
            after = row + at_once
            read = (after < end)[:, None] & inside[None, :]
            x = tl.load(rows + ((start + after) * dim)[:, None] + at[None, :], mask=read, other=0.0)
            score = tl.sum(d * (q[None, :] - c * d), axis=1)
            tl.store(logits + b.to(tl.int64) * width + row, score, mask=there)
            score = tl.where(there, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=0))
            kept = tl.exp(peak - higher)
            weight = tl.exp(score - higher)
            z = z * kept + tl.sum(weight, axis=0)
            total = total * kept + tl.sum(weight[:, None] * d, axis=0)
            peak, row = higher, after
        place = b.to(tl.int64) * parts + part
        tl.store(peaks + place, peak)
        tl.store(sums + place, z)
        tl.store(pulls + place * dim + at, total, mask=inside)

    @triton.jit
    def merge(peaks, sums, pulls, out, parts, dim, block: tl.constexpr) -> None:
        """(2) from its parts, in float64."""
        b = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * block + tl.arange(0, block)
        peak = tl.full((), float("-inf"), tl.float32)
        for part in range(parts):
            peak = tl.maximum(peak, tl.load(peaks + b * parts + part))
        z = tl.full((), 0.0, tl.float64)
        total = tl.zeros((block,), tl.float64)
        for part in range(parts):
            weight = tl.exp((tl.load(peaks + b * parts + part) - peak).to(tl.float64))
            z += weight * tl.load(sums + b * parts + part)
            part_of = tl.load(pulls + (b * parts + part) * dim + at, mask=at < dim, other=0.0)
            total += weight * part_of
        tl.store(out + b * dim + at, total / z, mask=at < dim)


def shape_of(dim: int, size: int) -> tuple[int, int, int]:
    """Numbers that a program holds of a row, rows that it reads at a time, its warps.

    Args:
        dim: Numbers in a row.
        size: Bytes of one.
    """
    block = max(16, triton.next_power_of_2(dim))
    return block, max(1, min(4, _BYTES // (block * size))), min(16, max(1, block // 256))


def pulled(
    rows: Tensor,
    query: Tensor,
    near: Tensor,
    linear: Tensor,
    square: Tensor,
    first: Tensor,
    stop: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Log-weights of the rows of each query's class, and how far they pull.

    Args:
        rows: (N, D), contiguous, float32 or of a 16-bit type.
        query: q, (B, D).
        near: r, as a row, (B, D).
        linear: `a/s^2`, (B,).
        square: `a^2/2s^2`, (B,).
        first: The first row of each class, (B,), int64.
        stop: Behind its last row, (B,), int64.
        width: Rows of the largest class.

    Returns:
        `l_i - l_r`, (B, width), float32, -inf beyond a class; and `m - r`, (B, D), float64.
    """
    count, dim = query.shape
    parts = triton.cdiv(width, _SPLIT)
    block, at_once, warps = shape_of(dim, rows.element_size())
    new: Any = {"dtype": torch.float32, "device": rows.device}
    logits = torch.empty(count, width, **new)
    peaks, sums = torch.empty(2, count, parts, **new)
    pulls = torch.empty(count, parts, dim, **new)
    pull[(parts, count)](
        rows,
        query.float().contiguous(),
        near.float().contiguous(),
        linear.float(),
        square.float(),
        first,
        stop,
        logits,
        peaks,
        sums,
        pulls,
        width,
        dim,
        block,
        _SPLIT,
        at_once,
        num_warps=warps,
    )
    mean = torch.empty(count, dim, dtype=torch.float64, device=rows.device)
    step = min(block, 512)
    merge[(count, triton.cdiv(dim, step))](
        peaks, sums, pulls, mean, parts, dim, step, num_warps=min(4, max(1, step // 128))
    )
    return logits, mean
