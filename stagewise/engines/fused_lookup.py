# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
"""Looks samples up in a bank on CUDA, as `RowStore.find` and `ends_of` do, in one launch.

A program looks up one sample: its row, by the key of its bits (`bank.row_keys`), and the rows of
its class. Each is a binary search; torch would launch a kernel for each step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.row_keys import key_weights
from stagewise.engines.kernels import kernel, launch, shape_of, tl

__all__ = ["Placed", "placed"]


@kernel
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


@kernel
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
    missing,
    wrong,
    near,
    count,
    classes,
    steps,
    dim: tl.constexpr,
    block: tl.constexpr,
    told: tl.constexpr,
    labelled: tl.constexpr,
    named: tl.constexpr,
) -> None:
    """The row that a sample equals or is given as its source, the ends of its class, and r."""
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
    if rows.dtype.element_ty == tl.float32:
        words = whole.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        words = whole.to(tl.int16, bitcast=True).to(tl.int64)
    key = tl.sum(words * tl.load(factor + at, mask=inside, other=0), axis=0)
    below, to = search(keys, count, key, steps, 1)
    found = tl.full((), -1, tl.int64)
    if named:  # equal keys stand by row: the first that is of the class, or of one after it
        spot, _ = search(table, classes, tl.load(labels + b), steps, 3)
        spot = tl.minimum(spot, classes - 1)
        begin, low, high = tl.load(table + 3 * spot + 1), below, to
        for _ in range(steps):
            there, middle = low < high, (low + high) // 2
            before = tl.load(order + middle, mask=there, other=0) < begin
            low = tl.where(there & before, middle + 1, low)
            high = tl.where(there & (before == 0), middle, high)
        below = tl.where(low < to, low, below)
    # Both ends of equal keys, because two different rows can share a key.
    for end in range(2):
        edge = tl.where(end == 0, tl.minimum(below, count - 1), tl.maximum(to - 1, 0))
        row = tl.where(tl.load(keys + edge) == key, tl.load(order + edge), 0)
        stored = tl.load(rows + row * dim + at, mask=inside, other=0.0)
        same = tl.where(inside, stored == x, True).to(tl.int32)
        same = tl.min(same, axis=0)
        # If labels decide, the first of both, which is that of the class.
        first = tl.maximum(found, row) if not named else tl.where(found < 0, row, found)
        found = tl.where(same == 1, first, found)
    r = tl.where(found >= 0, x.to(tl.float64) + shift, given)
    tl.store(near + b * dim + at, r, mask=inside)
    none = tl.full((), -9223372036854775808, tl.int64)  # KNOWN; NO_TIME and so on follow
    row, error = found, none
    if told:
        said = tl.load(source + b)
        row = tl.where(said < 0, found, said)
        error = tl.where(said < count, none, none + 2)
    known, spot, label = found < -1, tl.full((), 0, tl.int64), none + 3
    if labelled:
        label = tl.load(labels + b)
        below, to = search(table, classes, label, steps, 3)
        spot = tl.minimum(below, classes - 1)
        known = to > below
    of_row = row >= 0  # the class of its row, unless a label of the bank says otherwise
    if named:
        of_row = of_row & (known == 0)
    _, ended = search(table + 2, classes, row, steps, 3)
    spot = tl.where(of_row, tl.minimum(ended, classes - 1), spot)
    known = known | of_row
    time = tl.load(t + b)
    error = tl.where((time >= 0) & (time <= 1), error, none + 1)
    error = tl.where(known, error, label)
    tl.store(wrong + b, error)
    first, stop = tl.load(table + 3 * spot + 1), tl.load(table + 3 * spot + 2)
    stop = tl.where(error == none, stop, first)  # no rows
    tl.store(row_of + b, tl.where((row >= first) & (row < stop), row, -1))
    tl.store(missing + b, (found < first) | (found >= stop))
    tl.store(ends + 2 * b, first)
    tl.store(ends + 2 * b + 1, stop)


class Placed(NamedTuple):
    """The places of B samples in a bank.

    Attributes:
        row: The rows that they stand for, (B,), int64, -1 for none of their class.
        ends: The ends of their class, (B, 2), int64; empty ranges if a number is out of range.
        missing: Whether they equal no row of their class, (B,), bool.
        wrong: The argument of `RowStore.report`, (B,), int64.
        near: The row that each equals, or else the sample itself, (B, D), float64.
    """

    row: Tensor
    ends: Tensor
    missing: Tensor
    wrong: Tensor
    near: Tensor


def placed(
    bank: LatentBank,
    x1: Tensor,
    t: Tensor,
    labels: Tensor | None,
    source: Tensor | None,
    named: bool,
) -> Placed:
    """Looks samples up: one launch.

    Args:
        bank: The rows, of a type that `fused.serves`.
        x1: Samples, (B, D), with at least as many digits as the rows.
        t: Times, (B,).
        labels: Their classes, (B,), int64; or None.
        source: The rows they stand for, (B,), int64, negative for none; or None.
        named: Whether labels that are classes decide, not the class of the row.
    """
    count, dim = x1.shape
    block, _, warps = shape_of(dim, bank.dtype.itemsize)
    keys, order = bank.key_index()
    row = order.new_empty(count)
    found = Placed(
        *(row, order.new_empty(count, 2), torch.empty_like(row, dtype=torch.bool)),
        *(torch.empty_like(row), torch.empty(count, dim, dtype=torch.float64, device=x1.device)),
    )
    some = [order if x is None else x for x in (labels, source)]  # not read where there is none
    table, factor = bank.class_table(x1.device), key_weights(dim, x1.device)
    given = (x1, t, *some, bank.rows, bank.offset, factor, keys, order, table)
    launch(
        *("place", [count], [x.contiguous() for x in given], list(found)),
        [
            *(len(bank), len(table), len(bank).bit_length(), dim, block),
            *(source is not None, labels is not None, named),
        ],
        warps,
    )
    return found
