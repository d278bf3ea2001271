# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
"""Looks up the class of each query on CUDA, and samples as `RowStore.find` does, in one launch.

A program looks up one sample: its row, by the key of its bits (`bank.row_keys`), and the rows of
its class. Each is a binary search; torch would launch a kernel for each step. Functions that return
numbers are annotated as `object`, because on Python 3.10 Triton compiles none that names `Any`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.row_keys import key_weights
from stagewise.engines.kernels import kernel, launch, part_of, tl

__all__ = ["Placed", "ends_of", "placed"]


@kernel
def search(sorted_, count, wanted, steps, stride: tl.constexpr) -> object:
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
def class_of(table, classes, label, steps) -> object:
    """The place of a class in the table, and whether it is there."""
    below, to = search(table, classes, label, steps, 3)
    return tl.minimum(below, classes - 1), to > below


@kernel
def beyond(t) -> object:
    """Whether a time is out of range or NaN."""
    return ((t >= 0) & (t <= 1)) == 0


@kernel
def classify(
    t,
    labels,
    table,
    ends,
    wrong,
    count,
    classes,
    steps,
    labelled: tl.constexpr,
) -> None:
    """The ends of a query's class, or of the bank; none if its label or time is wrong."""
    b = tl.program_id(0).to(tl.int64)
    first, stop = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64) + count
    none = tl.full((), -9223372036854775808, tl.int64)  # KNOWN; NO_TIME follows
    error = none
    if labelled:
        label = tl.load(labels + b)
        spot, known = class_of(table, classes, label, steps)
        first, stop = tl.load(table + 3 * spot + 1), tl.load(table + 3 * spot + 2)
        error = tl.where(known, none, label)
    error = tl.where(beyond(tl.load(t + b)), none + 1, error)
    tl.store(wrong + b, error)
    tl.store(ends + 2 * b, first)
    tl.store(ends + 2 * b + 1, tl.where(error == none, stop, first))


@kernel
def to_nearest(x, kind: tl.constexpr) -> object:
    """Float32 numbers as a 16-bit type, to nearest, which the interpreter does not for bfloat16."""
    if kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # NaN stays NaN
    return x.to(kind)


@kernel
def as_compared(x1, offset, place, at, inside, kind: tl.constexpr, whole: tl.constexpr) -> object:
    """Numbers of a sample as they are, or as they would be stored."""
    x = tl.load(x1 + place, mask=inside, other=0.0)
    if not whole:
        x = x.to(tl.float64) - tl.load(offset + at, mask=inside, other=0.0)
        x = to_nearest(x.to(tl.float32), kind)
    return x


@kernel
def look_up(
    x1,
    rows,
    offset,
    factor,
    keys,
    order,
    begin,
    b,
    count,
    steps,
    dim: tl.constexpr,
    block: tl.constexpr,
    named: tl.constexpr,
    whole: tl.constexpr,
) -> object:
    """The row that equals a sample, -1 for none; `whole` compares rows in the sample's type.

    Of equal rows it is, if `named`, the first from `begin` on.
    """
    kind: tl.constexpr = x1.dtype.element_ty if whole else rows.dtype.element_ty
    sums = tl.zeros((block,), tl.int64)
    for start in range(0, dim, block):  # a part at a time, to keep the registers free
        at = start + tl.arange(0, block)
        inside = at < dim
        x = as_compared(x1, offset, b * dim + at, at, inside, kind, whole)
        x = tl.where(x == 0.0, 0.0, x).to(kind)  # -0 too
        if kind == tl.float32:
            words = x.to(tl.int32, bitcast=True).to(tl.int64)
        else:
            words = x.to(tl.int16, bitcast=True).to(tl.int64)
        sums += words * tl.load(factor + at, mask=inside, other=0)
    key = tl.sum(sums, axis=0)
    below, to = search(keys, count, key, steps, 1)
    if named:  # equal keys stand by row: the first that is of the class, or of one after it
        low, high = below, to
        for _ in range(steps):
            there, middle = low < high, (low + high) // 2
            before = tl.load(order + middle, mask=there, other=0) < begin
            low = tl.where(there & before, middle + 1, low)
            high = tl.where(there & (before == 0), middle, high)
        below = tl.where(low < to, low, below)
    found = tl.full((), -1, tl.int64)
    # Both ends of equal keys, because two different rows can share a key.
    for end in range(2):
        edge = tl.where(end == 0, tl.minimum(below, count - 1), tl.maximum(to - 1, 0))
        row = tl.where(tl.load(keys + edge) == key, tl.load(order + edge), 0)
        differ = tl.zeros((block,), tl.int32)
        for start in range(0, dim, block):
            at = start + tl.arange(0, block)
            inside = at < dim
            x = as_compared(x1, offset, b * dim + at, at, inside, kind, whole)
            stored = tl.load(rows + row * dim + at, mask=inside, other=0.0)
            if whole:
                shift = tl.load(offset + at, mask=inside, other=0.0)
                stored = to_nearest((stored.to(tl.float64) + shift).to(tl.float32), kind)
            differ += tl.where(inside & (stored != x), 1, 0)
        same = tl.sum(differ, axis=0) == 0
        # If labels decide, the first of both, which is that of the class.
        first = tl.maximum(found, row) if not named else tl.where(found < 0, row, found)
        found = tl.where(same, first, found)
    return found


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
    rounded_keys,
    rounded_order,
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
    classed: tl.constexpr,
    exact: tl.constexpr,
    rounded: tl.constexpr,
) -> None:
    """The row that a sample equals or is given as its source, the ends of its class, and r."""
    b = tl.program_id(0).to(tl.int64)
    none = tl.full((), -9223372036854775808, tl.int64)  # KNOWN; NO_TIME and so on follow
    known, spot, label = tl.full((), 0, tl.int1), tl.full((), 0, tl.int64), none + 3
    if labelled:
        label = tl.load(labels + b)
        spot, known = class_of(table, classes, label, steps)
    begin = tl.full((), 0, tl.int64)
    if named:
        begin = tl.load(table + 3 * spot + 1)
    found = tl.full((), -1, tl.int64)
    if rounded:
        found = look_up(
            x1,
            rows,
            offset,
            factor,
            rounded_keys,
            rounded_order,
            begin,
            b,
            count,
            steps,
            dim,
            block,
            named,
            True,
        )
    if exact:
        own = look_up(
            x1,
            rows,
            offset,
            factor,
            keys,
            order,
            begin,
            b,
            count,
            steps,
            dim,
            block,
            named,
            False,
        )
        found = tl.where(own < 0, found, own)
    row, error = found, none
    if told:
        said = tl.load(source + b)
        row = tl.where(said < 0, found, said)
        error = tl.where(said < count, none, none + 2)
    error = tl.where(beyond(tl.load(t + b)), none + 1, error)
    first, stop = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64) + count
    if classed:
        of_row = row >= 0  # the class of its row, unless a label of the bank says otherwise
        if named:
            of_row = of_row & (known == 0)
        _, ended = search(table + 2, classes, row, steps, 3)
        spot = tl.where(of_row, tl.minimum(ended, classes - 1), spot)
        error = tl.where(known | of_row, error, label)
        first, stop = tl.load(table + 3 * spot + 1), tl.load(table + 3 * spot + 2)
    stop = tl.where(error == none, stop, first)  # no rows
    tl.store(wrong + b, error)
    absent = (found < first) | (found >= stop)
    equal = tl.where(absent, -1, found)  # a source of another class is none
    tl.store(row_of + b, tl.where((row >= first) & (row < stop), row, equal))
    tl.store(missing + b, absent)
    tl.store(ends + 2 * b, first)
    tl.store(ends + 2 * b + 1, stop)
    for start in range(0, dim, block):
        at = start + tl.arange(0, block)
        inside = at < dim
        given = tl.load(x1 + b * dim + at, mask=inside, other=0.0).to(tl.float64)
        stored = tl.load(rows + found * dim + at, mask=inside & (found >= 0), other=0.0)
        stored = stored.to(tl.float64) + tl.load(offset + at, mask=inside, other=0.0)
        r = tl.where(found >= 0, stored, given)
        r = tl.where(error == none, r, float("nan"))
        tl.store(near + b * dim + at, r, mask=inside)


class Placed(NamedTuple):
    """The places of B samples in a bank.

    Attributes:
        row: The rows that they stand for, (B,), int64, -1 for none of their class.
        ends: The ends of their class, (B, 2), int64; empty ranges if a number is out of range.
        missing: Whether they equal no row of their class, (B,), bool.
        wrong: The argument of `RowStore.report`, (B,), int64.
        near: The row that each equals, or else the sample itself, (B, D), float64; NaN if a number
            is out of range.
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
    class_wise: bool = True,
) -> Placed:
    """Looks samples up: one launch.

    Args:
        bank: The rows, of a type that `fused.serves`.
        x1: Samples, (B, D).
        t: Times, (B,).
        labels: Their classes, (B,), int64; or None.
        source: The rows they stand for, (B,), int64, negative for none; or None.
        named: Whether labels that are classes decide, not the class of the row.
        class_wise: Whether the rows of a sample are its class; otherwise the bank, and `labels` is
            None.
    """
    count, dim = x1.shape
    exact, rounded = bank.looks(x1.dtype)
    row = torch.empty(count, dtype=torch.int64, device=x1.device)
    found = Placed(
        *(row, row.new_empty(count, 2), torch.empty_like(row, dtype=torch.bool)),
        *(torch.empty_like(row), torch.empty(count, dim, dtype=torch.float64, device=x1.device)),
    )
    keys = bank.key_index(None if exact else x1.dtype)
    rounded_keys, order = bank.key_index(x1.dtype) if rounded else keys, keys[1]
    some = [order if x is None else x for x in (labels, source)]  # not read where there is none
    table = bank.class_table(x1.device) if class_wise else order
    factor = key_weights(dim, x1.device)
    given = (x1, t, *some, bank.rows, bank.offset, factor, *keys, *rounded_keys, table)
    launch(
        *("place", [count], [x.contiguous() for x in given], list(found)),
        [
            *(len(bank), len(table), len(bank).bit_length(), dim, part_of(dim)),
            *(source is not None, labels is not None, named, class_wise, exact, rounded),
        ],
    )
    return found


def ends_of(bank: LatentBank, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ends of the class of each query, or of the bank without labels, (B, 2): one launch.

    They are empty where a label or a time is out of range. Also the argument of `RowStore.report`.
    """
    wrong = torch.empty(len(t), dtype=torch.int64, device=bank.device)
    ends = wrong.new_empty(len(t), 2)
    t = t.to(bank.device)
    given, classes = [t, t, t], 0  # not read without labels
    if labels is not None:
        table = bank.class_table(bank.device)
        given, classes = [t, labels, table], len(table)
    numbers = [len(bank), classes, classes.bit_length(), labels is not None]
    launch("classify", [len(t)], [x.contiguous() for x in given], [ends, wrong], numbers)
    return ends, wrong
