# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
"""Where samples stand in a bank, on CUDA: what `RowStore.find` and `ends_of` say, in one launch.

A program looks up one sample: its row, by the key of its bits (`bank.row_keys`), and the rows of
its class. Each is a search among sorted numbers, of which torch would launch every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stagewise.engines import fused

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = None

__all__ = ["placed"]

if triton is not None:

    @triton.jit
    def search(sorted_, count, wanted, steps, stride: tl.constexpr) -> Any:
        """How many numbers of a sorted list are below `wanted`, and how many not above it."""
        lane = tl.arange(0, 2)
        low, high = tl.zeros((2,), tl.int64), tl.full((2,), 0, tl.int64) + count
        for _ in range(steps):
            there, middle = low < high, (low + high) // 2
            value = tl.load(sorted_ + middle * stride, mask=there, other=0)
            below = (value < wanted) | ((value == wanted) & (lane == 1))
            low = tl.where(there & below, middle + 1, low)
            high = tl.where(there & (below == 0), middle, high)
        return tl.sum(tl.where(lane == 0, low, 0)), tl.sum(tl.where(lane == 1, low, 0))

    @triton.jit
    def place(
        x1,
        t,
        labels,
        source,
        rows,
        offset,
        factor,
        keys,
        order,
        table,
        row_of,
        ends,
        inserted,
        right,
        near,
        count,
        classes,
        steps,
        dim: tl.constexpr,
        block: tl.constexpr,
        word: tl.constexpr,
        told: tl.constexpr,
        labelled: tl.constexpr,
        named: tl.constexpr,
    ) -> None:
        """The row that a sample equals or is told to stand for, the ends of its class, and r."""
        b = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        inside = at < dim
        given = tl.load(x1 + b * dim + at, mask=inside, other=0.0).to(tl.float64)
        shift = tl.load(offset + at, mask=inside, other=0.0)
        x = (given - shift).to(tl.float32)
        if rows.dtype.element_ty == tl.bfloat16:  # to nearest, which the interpreter does not
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = x.to(rows.dtype.element_ty)
        whole = tl.where(x == 0.0, 0.0, x).to(rows.dtype.element_ty)  # -0 too
        bits = whole.to(word, bitcast=True).to(tl.int64)
        key = tl.sum(bits * tl.load(factor + at, mask=inside, other=0), axis=0)
        below, to = search(keys, count, key, steps, 1)
        found = tl.full((), -1, tl.int64)
        # Both ends of equal keys: two different rows might, once in many banks, share one.
        for end in range(2):
            spot = tl.where(end == 0, tl.minimum(below, count - 1), tl.maximum(to - 1, 0))
            row = tl.where(tl.load(keys + spot) == key, tl.load(order + spot), 0)
            stored = tl.load(rows + row * dim + at, mask=inside, other=0.0)
            same = tl.where(inside, stored == x, True).to(tl.int32)
            found = tl.where(tl.min(same, axis=0) == 1, tl.maximum(found, row), found)
        r = tl.where(found >= 0, x.to(tl.float64) + shift, given)
        tl.store(near + b * dim + at, r, mask=inside)
        row, fits = found, found < count
        if told:
            said = tl.load(source + b)
            row, fits = tl.where(said < 0, found, said), said < count
        spot = tl.full((), 0, tl.int64)
        if labelled:
            below, to = search(table, classes, tl.load(labels + b), steps, 3)
            spot = tl.minimum(below, classes - 1)
            known = to > below
        if not named:  # the class of the row, where there is one
            _, ended = search(table + 2, classes, row, steps, 3)
            spot = tl.where(row >= 0, tl.minimum(ended, classes - 1), spot)
            known = known | (row >= 0) if labelled else row >= 0
        time = tl.load(t + b)
        fits = fits & known & (time >= 0) & (time <= 1)
        first, stop = tl.load(table + 3 * spot + 1), tl.load(table + 3 * spot + 2)
        tl.store(row_of + b, tl.where((row >= first) & (row < stop), row, -1))
        tl.store(inserted + b, (found < first) | (found >= stop))
        tl.store(ends + 2 * b, first)
        tl.store(ends + 2 * b + 1, stop)
        tl.store(right + b, fits)


@torch.library.custom_op("stagewise::placed", mutates_args=())
def placed(
    x1: Tensor,
    t: Tensor,
    labels: Tensor | None,
    source: Tensor | None,
    named: bool,
    rows: Tensor,
    offset: Tensor,
    factor: Tensor,
    keys: Tensor,
    order: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where samples stand in a bank: one launch.

    Args:
        x1: Samples, (B, D), of no fewer digits than the rows have.
        t: Times, (B,).
        labels: Their classes, (B,), int64; or None.
        source: The rows they are told to stand for, (B,), int64, negative for none; or None.
        named: Whether the labels decide, and not the class of the row where there is one.
        rows: (N, D), contiguous, float32 or of a 16-bit type.
        offset: What makes a row a sample, (D,), float64.
        factor: The numbers that keys are made with, (D,), int64 (`row_keys.key_weights`).
        keys: Those of the rows, ascending, (N,), int64.
        order: The rows they belong to, (N,), int64.
        table: Label, first row and end of each class, (C, 3), int64, by label.

    Returns:
        Rows that samples stand for, (B,), int64, -1 for none of their class; the ends of their
        class, (B, 2); where they equal none of its rows, (B,), bool; where time, label and source
        are in range, (B,), bool; and the row that each equals, or else itself, (B, D), float64.
    """
    count, dim = x1.shape
    block, _, warps = fused.shape_of(dim, rows.element_size())
    row, ends = order.new_empty(count), order.new_empty(count, 2)
    inserted = torch.empty_like(row, dtype=torch.bool)
    right = torch.empty_like(inserted)
    near = torch.empty_like(x1, dtype=torch.float64, memory_format=torch.contiguous_format)
    word = tl.int16 if rows.element_size() == 2 else tl.int32
    some = [t if x is None else x for x in (labels, source)]  # not read where there is none
    place[(count,)](
        *(x.contiguous() for x in (x1, t, *some, rows, offset, factor, keys, order, table)),
        *(row, ends, inserted, right, near, len(rows), len(table), len(rows).bit_length()),
        *(dim, block, word, source is not None, labels is not None, named),
        num_warps=warps,
    )
    return row, ends, inserted, right, near


@placed.register_fake
def _(
    x1: Tensor,
    t: Tensor,
    labels: Tensor | None,
    source: Tensor | None,
    named: bool,
    rows: Tensor,
    offset: Tensor,
    factor: Tensor,
    keys: Tensor,
    order: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = order.new_empty(len(x1))
    inserted = torch.empty_like(row, dtype=torch.bool)
    near = torch.empty_like(x1, dtype=torch.float64)
    return row, row.new_empty(len(x1), 2), inserted, torch.empty_like(inserted), near
