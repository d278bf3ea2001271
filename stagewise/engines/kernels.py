# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
r"""The kernels of the exact engine on CUDA, and the one operator that starts them.

`prepare`, `pull` and `merge` read rows one by one; `stagewise.engines.fused` has the formulas, and
`stagewise.engines.product_kernels` the kernels around products. Work per number of a row is
float32; only work per query or part is float64, so GPUs with slow float64 are not slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = tl = None

__all__ = ["KernelError", "kernel", "launch", "missing", "part_of", "shape_of"]

_OLDEST = (3, 0)

_BYTES = 2**15
"""Bytes of rows that `pull` reads at a time: enough to keep the memory busy, few enough for its
registers."""

_PART = 1024
"""Numbers of a sample that a program holds in registers if it needs several vectors of them."""

_KERNELS: dict[str, Any] = {}

# These are errors of the device, not of a kernel.
_OF_DEVICE = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class KernelError(RuntimeError):
    """A kernel does not compile, or does not start, with this card and these packages."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function by Triton; `launch` finds it by its name."""
    made = function if triton is None else triton.jit(function)
    return _KERNELS.setdefault(function.__name__, made)


@kernel
def prepare(
    xt,
    near,
    offset,
    alpha,
    sigma,
    query,
    origin,
    factors,
    dim: tl.constexpr,
    block: tl.constexpr,
    far,
    slight,
) -> None:
    """`(a/s^2) q` and r as a row, in float32; `a^2/2s^2` and `|q|^2/2s^2`.

    The last is NaN for a query that is `lost` (`stagewise.engines.base`), and then all of `merge`.
    """
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < dim
    a, s = tl.load(alpha + b), tl.load(sigma + b)
    r = tl.load(near + b * dim + at, mask=inside, other=0.0)
    q = tl.load(xt + b * dim + at, mask=inside, other=0.0) - a * r
    r -= tl.load(offset + at, mask=inside, other=0.0)
    tl.store(query + b * dim + at, (q * (a / (s * s))).to(tl.float32), mask=inside)
    tl.store(origin + b * dim + at, r.to(tl.float32), mask=inside)
    squares = tl.sum(q * q, axis=0)
    away = a * tl.sqrt(squares)
    lost = (away > a * a * far) & (away * slight > s * s)
    tl.store(factors + 2 * b, a * a / (2 * s * s))
    tl.store(factors + 2 * b + 1, tl.where(lost, float("nan"), squares / (2 * s * s)))


@kernel
def pull(
    rows,
    query,
    origin,
    factors,
    ends,
    order,
    sums,
    best,
    pulls,
    logits,
    width,
    held,
    split,
    dim: tl.constexpr,
    block: tl.constexpr,
    at_once: tl.constexpr,
    listed: tl.constexpr,
    tabled: tl.constexpr,
    chosen: tl.constexpr,
) -> None:
    """(1) of some rows of a query, and its parts of all sums.

    Rows are those between `ends`, or if they are `tabled` those listed there. If queries are
    `chosen`, `order` holds their count and then their numbers, and otherwise it is all.
    """
    part = tl.program_id(0)
    at = tl.arange(0, block)
    inside = at < dim
    begin = part * split
    count = tl.num_programs(1)
    if chosen:
        count = tl.load(order)
    for j in range(tl.program_id(1), count, tl.num_programs(1)):
        b = tl.full((), 0, tl.int64) + j
        if chosen:
            b = tl.load(order + 1 + j).to(tl.int64)
        start = b * width  # in the table
        stop = width
        if not tabled:
            start = tl.load(ends + 2 * b)
            stop = (tl.load(ends + 2 * b + 1) - start).to(tl.int32)
        end = tl.minimum(begin + split, stop)
        q = tl.load(query + b * dim + at, mask=inside, other=0.0)
        r = tl.load(origin + b * dim + at, mask=inside, other=0.0)
        c = tl.load(factors + 2 * b).to(tl.float32)
        peak = tl.full((), float("-inf"), tl.float32)
        z = tl.full((), 0.0, tl.float32)
        moment = tl.full((), 0.0, tl.float32)
        squares = tl.full((), 0.0, tl.float32)
        first = begin
        total = tl.zeros((block,), tl.float32)
        # The next rows are loaded while the previous ones are summed.
        row = begin + tl.arange(0, at_once)
        there = row < end
        index = start + row
        if tabled:
            index = tl.load(ends + index, mask=there, other=-1)
            there = index >= 0
        read = there[:, None] & inside[None, :]
        x = tl.load(rows + (index * dim)[:, None] + at[None, :], mask=read, other=0.0)
        for i in range(begin, end, at_once):
            now, place = there, row
            d = tl.where(read, x.to(tl.float32) - r[None, :], 0.0)
            row = row + at_once
            there = row < end
            index = start + row
            if tabled:
                index = tl.load(ends + index, mask=there, other=-1)
                there = index >= 0
            read = there[:, None] & inside[None, :]
            x = tl.load(rows + (index * dim)[:, None] + at[None, :], mask=read, other=0.0)
            score = tl.sum(d * (q[None, :] - c * d), axis=1)
            score = tl.where(now, score, float("-inf"))
            if listed:
                tl.store(logits + b * width + place, score, mask=place < end)
            largest, which = tl.max(score, axis=0, return_indices=True)
            first = tl.where(largest > peak, i + which, first)
            higher = tl.maximum(peak, largest)
            # Where no row was there yet, nothing is subtracted.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            kept = tl.exp(peak - base)
            weight = tl.exp(score - base)
            # Sums of w (l - peak): those so far count from another peak.
            lowered = tl.where(z > 0, z * (peak - base), 0.0)
            moment = kept * (moment + lowered)
            moment += tl.sum(tl.where(now, weight * (score - base), 0.0), axis=0)
            z = z * kept + tl.sum(weight, axis=0)
            squares = squares * kept * kept + tl.sum(weight * weight, axis=0)
            total = total * kept + tl.sum(weight[:, None] * d, axis=0)
            peak = higher
        place_of = b * held + part
        tl.store(sums + 4 * place_of, peak)
        tl.store(sums + 4 * place_of + 1, z)
        tl.store(sums + 4 * place_of + 2, moment)
        tl.store(sums + 4 * place_of + 3, squares)
        found = start + first
        if tabled:
            found = tl.load(ends + found)
        tl.store(best + place_of, found)
        tl.store(pulls + place_of * dim + at, total, mask=inside)


@kernel
def merge(
    sums,
    best,
    pulls,
    near,
    factors,
    order,
    mean,
    told,
    rows,
    queries,
    parts,
    dim,
    block: tl.constexpr,
    chosen: tl.constexpr,
) -> None:
    """The posterior from its parts, in float64."""
    at = tl.program_id(1) * block + tl.arange(0, block)
    count = tl.num_programs(0)
    if chosen:
        count = tl.load(order)
    for j in range(tl.program_id(0), count, tl.num_programs(0)):
        b = tl.full((), 0, tl.int64) + j
        if chosen:
            b = tl.load(order + 1 + j).to(tl.int64)
        peak = tl.full((), float("-inf"), tl.float32)
        row = tl.load(best + b * parts)
        for part in range(parts):
            own = tl.load(sums + 4 * (b * parts + part))
            row = tl.where(own > peak, tl.load(best + b * parts + part), row)
            peak = tl.maximum(peak, own)
        z = tl.full((), 0.0, tl.float64)
        moment = tl.full((), 0.0, tl.float64)
        squares = tl.full((), 0.0, tl.float64)
        total = tl.zeros((block,), tl.float64)
        for part in range(parts):
            place = b * parts + part
            lower = (tl.load(sums + 4 * place) - peak).to(tl.float64)
            weight = tl.exp(lower)
            own = tl.load(sums + 4 * place + 1).to(tl.float64)
            z += weight * own
            # A part without rows has a peak of -inf, and adds nothing.
            lowered = tl.where(own > 0, lower * own, 0.0)
            moment += weight * (tl.load(sums + 4 * place + 2) + lowered)
            squares += weight * weight * tl.load(sums + 4 * place + 3)
            some = tl.load(pulls + place * dim + at, mask=at < dim, other=0.0)
            total += weight * some
        r = tl.load(near + b * dim + at, mask=at < dim, other=0.0)
        shared = tl.load(factors + 2 * b + 1)
        z += 0 * shared
        tl.store(mean + b * dim + at, r + total / z, mask=at < dim)
        if tl.program_id(1) == 0:
            relative = peak + tl.log(z)
            tl.store(told + b, relative - shared)
            tl.store(told + queries + b, tl.log(z) - moment / z)
            tl.store(told + 2 * queries + b, z * z / squares)
            tl.store(told + 3 * queries + b, 1 / z)
            tl.store(told + 4 * queries + b, relative)
            tl.store(told + 5 * queries + b, 0.0)  # the tail mass
            tl.store(rows + b, row)


def missing() -> str:
    """Why kernels cannot run with the installed packages; empty if they can."""
    if triton is None:
        return "Triton is not installed: pip install triton"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        return f"Triton {triton.__version__} is too old: pip install --upgrade triton"
    return ""


def shape_of(dim: int, size: int) -> tuple[int, int, int]:
    """Block size, rows per read and warps of a program, for `dim` numbers of `size` bytes a row."""
    block = max(16, triton.next_power_of_2(dim))
    warps = min(16, max(1, block // 256))
    # 32 numbers a thread, which stay in registers.
    return block, max(1, min(32, 1024 * warps // block, _BYTES // (block * size))), warps


def part_of(dim: int) -> int:
    """How many of `dim` numbers a program reads at a time, with 4 warps, if it loops over them."""
    return min(shape_of(dim, 8)[0], _PART)


@torch.library.custom_op("stagewise::launch", mutates_args=("written",))
def launch(
    name: str,
    grid: Sequence[int],
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    numbers: Sequence[int],
    warps: int = 4,
    values: Sequence[float] | None = None,
) -> None:
    """Starts the kernel `name`. An operator, so that tests with fake tensors can count launches.

    The arguments of the kernel are `read` tensors, `written` tensors (which it may also read), all
    contiguous, `numbers` and `values`, in this order.
    """
    tensors = (*read, *written)
    # Triton starts kernels on the current device, which may be another one.
    with torch.cuda.device_of(tensors[0]):
        try:
            _KERNELS[name][tuple(grid)](*tensors, *numbers, *(values or ()), num_warps=warps)
        except _OF_DEVICE:
            raise
        except Exception as error:  # of several kinds, by version
            if len(devices := {str(tensor.device) for tensor in tensors}) > 1:
                given = " and ".join(sorted(devices))
                raise ValueError(
                    f"Expected all tensors of a call on one device, got {given}."
                ) from error
            reason = str(error).strip().split("\n")[0]
            raise KernelError(f"{type(error).__name__}: {reason}") from error


@launch.register_fake
def _(name: str, _: Any, read: Sequence[Tensor], written: Sequence[Tensor], *__: Any) -> None:
    assert all(tensor.is_contiguous() for tensor in (*read, *written)), name
