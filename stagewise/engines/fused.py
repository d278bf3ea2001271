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

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.posterior import Posterior
from stagewise.queries import Queries

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = None

__all__ = ["at_a_time", "attempt", "posterior", "pulled", "serves", "shape_of"]

T = TypeVar("T")

_LARGEST_DIM = 2**13
"""Numbers in a sample, at most: a program keeps three such vectors in registers, beside rows."""

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_QUERIES_A_CLASS = 8
"""Queries for each class, on average, up to which to read its rows for each of them costs less than
products of all queries with all rows."""

_SPLIT = 64
"""Rows that a program reads."""

_BYTES = 2**15
"""What it reads at a time: enough that the memory is never idle, few enough for its registers."""

_UNEQUAL = 8
"""Times that the largest class may be larger than one of average size."""

_MOST = 65535
"""Queries at a time, by CUDA's limit on a grid."""

_PART_BYTES = 2**28
"""Parts of sums that are held at a time."""

if triton is not None:

    @triton.jit
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
    ) -> None:
        """`(a/s^2) q` and r as a row, in float32; `a^2/2s^2` and `|q|^2/2s^2`."""
        b = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, block)
        inside = at < dim
        a, s = tl.load(alpha + b), tl.load(sigma + b)
        r = tl.load(near + b * dim + at, mask=inside, other=0.0)
        q = tl.load(xt + b * dim + at, mask=inside, other=0.0) - a * r
        r -= tl.load(offset + at, mask=inside, other=0.0)
        tl.store(query + b * dim + at, (q * (a / (s * s))).to(tl.float32), mask=inside)
        tl.store(origin + b * dim + at, r.to(tl.float32), mask=inside)
        tl.store(factors + 2 * b, a * a / (2 * s * s))
        tl.store(factors + 2 * b + 1, tl.sum(q * q, axis=0) / (2 * s * s))

    @triton.jit
    def pull(
        rows,
        query,
        origin,
        factors,
        ends,
        sums,
        best,
        pulls,
        logits,
        width,
        dim: tl.constexpr,
        block: tl.constexpr,
        split: tl.constexpr,
        at_once: tl.constexpr,
        listed: tl.constexpr,
    ) -> None:
        """(1) of some rows of a query's class, and its parts of all sums."""
        part, parts = tl.program_id(0), tl.num_programs(0)
        b = tl.program_id(1).to(tl.int64)
        start = tl.load(ends + 2 * b)
        begin = part * split
        end = tl.minimum(begin + split, (tl.load(ends + 2 * b + 1) - start).to(tl.int32))
        at = tl.arange(0, block)
        inside = at < dim
        q = tl.load(query + b * dim + at, mask=inside, other=0.0)
        r = tl.load(origin + b * dim + at, mask=inside, other=0.0)
        c = tl.load(factors + 2 * b).to(tl.float32)
        if listed:  # columns that are not written below
            column = begin + tl.arange(0, split)
            none = tl.full((split,), float("-inf"), tl.float32)
            tl.store(logits + b * width + column, none, mask=(column >= end) & (column < width))
        peak = tl.full((), float("-inf"), tl.float32)
        z = tl.full((), 0.0, tl.float32)
        moment = tl.full((), 0.0, tl.float32)
        squares = tl.full((), 0.0, tl.float32)
        first = begin
        total = tl.zeros((block,), tl.float32)
        # Rows are on their way while those before them are summed up.
        row = begin + tl.arange(0, at_once)
        read = (row < end)[:, None] & inside[None, :]
        x = tl.load(rows + ((start + row) * dim)[:, None] + at[None, :], mask=read, other=0.0)
        for i in range(begin, end, at_once):
            there, d = row < end, tl.where(read, x.to(tl.float32) - r[None, :], 0.0)
            after = row + at_once
            read = (after < end)[:, None] & inside[None, :]
            x = tl.load(rows + ((start + after) * dim)[:, None] + at[None, :], mask=read, other=0.0)
            score = tl.sum(d * (q[None, :] - c * d), axis=1)
            if listed:
                tl.store(logits + b * width + row, score, mask=there)
            score = tl.where(there, score, float("-inf"))
            largest, place = tl.max(score, axis=0, return_indices=True)
            first = tl.where(largest > peak, i + place, first)
            higher = tl.maximum(peak, largest)
            kept = tl.exp(peak - higher)
            weight = tl.exp(score - higher)
            # Sums of w (l - peak): those so far count from another peak.
            lowered = tl.where(z > 0, z * (peak - higher), 0.0)
            moment = kept * (moment + lowered)
            moment += tl.sum(tl.where(there, weight * (score - higher), 0.0), axis=0)
            z = z * kept + tl.sum(weight, axis=0)
            squares = squares * kept * kept + tl.sum(weight * weight, axis=0)
            total = total * kept + tl.sum(weight[:, None] * d, axis=0)
            peak, row = higher, after
        place_of = b * parts + part
        tl.store(sums + 4 * place_of, peak)
        tl.store(sums + 4 * place_of + 1, z)
        tl.store(sums + 4 * place_of + 2, moment)
        tl.store(sums + 4 * place_of + 3, squares)
        tl.store(best + place_of, start + first)
        tl.store(pulls + place_of * dim + at, total, mask=inside)

    @triton.jit
    def merge(
        sums, best, pulls, near, factors, mean, told, rows, parts, dim, block: tl.constexpr
    ) -> None:
        """The posterior from its parts, in float64."""
        b = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * block + tl.arange(0, block)
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
        tl.store(mean + b * dim + at, r + total / z, mask=at < dim)
        if tl.program_id(1) == 0:
            relative = peak + tl.log(z)
            tl.store(told + 5 * b, relative - tl.load(factors + 2 * b + 1))
            tl.store(told + 5 * b + 1, tl.log(z) - moment / z)
            tl.store(told + 5 * b + 2, z * z / squares)
            tl.store(told + 5 * b + 3, 1 / z)
            tl.store(told + 5 * b + 4, relative)
            tl.store(rows + b, row)


def shape_of(dim: int, size: int) -> tuple[int, int, int]:
    """Numbers that a program holds of a row, rows that it reads at a time, its warps.

    Args:
        dim: Numbers in a row.
        size: Bytes of one.
    """
    block = max(16, triton.next_power_of_2(dim))
    return block, max(1, min(4, _BYTES // (block * size))), min(16, max(1, block // 256))


@torch.library.custom_op("stagewise::pulled", mutates_args=())
def pulled(
    rows: Tensor,
    offset: Tensor,
    xt: Tensor,
    near: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    ends: Tensor,
    width: int,
    listed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The posterior of each query over the rows of its class.

    Args:
        rows: (N, D), contiguous, float32 or of a 16-bit type.
        offset: What makes a row a sample, (D,), float64.
        xt: Noisy samples, (B, D).
        near: r, (B, D).
        alpha: a, (B,), float64, as what follows.
        sigma: s, (B,), above 0.
        ends: The first row of each class and that behind its last, (B, 2), int64.
        width: Rows of the largest class.
        listed: Whether to return the log-weights.

    Returns:
        The mean m, (B, D); log-evidence, entropy, effective sample size, largest weight, and
        `log sum_i exp(l_i - l_r)`, (B, 5); all float64. The row of the largest weight, (B,), int64.
        `l_i - l_r`, (B, width), float32, -inf beyond a class; of no columns if it is not `listed`.
    """
    count, dim = xt.shape
    parts = triton.cdiv(width, _SPLIT)
    block, at_once, warps = shape_of(dim, rows.element_size())
    single: Any = {"dtype": torch.float32, "device": rows.device}
    double: Any = {"dtype": torch.float64, "device": rows.device}
    query, origin = torch.empty(2, count, dim, **single)
    factors = torch.empty(count, 2, **double)
    offset, xt, near, alpha, sigma, ends = (
        x.contiguous() for x in (offset, xt, near, alpha, sigma, ends)
    )
    prepare[(count,)](
        xt, near, offset, alpha, sigma, query, origin, factors, dim, block, num_warps=warps
    )
    sums = torch.empty(count, parts, 4, **single)
    best = torch.empty(count, parts, dtype=torch.int64, device=rows.device)
    pulls = torch.empty(count, parts, dim, **single)
    logits = torch.empty(count, width if listed else 0, **single)
    pull[(parts, count)](
        rows,
        query,
        origin,
        factors,
        ends,
        sums,
        best,
        pulls,
        logits,
        width,
        dim,
        block,
        _SPLIT,
        at_once,
        listed,
        num_warps=warps,
    )
    mean, told = torch.empty(count, dim, **double), torch.empty(count, 5, **double)
    row = torch.empty(count, dtype=torch.int64, device=rows.device)
    step = min(block, 512)
    merge[(count, triton.cdiv(dim, step))](
        sums, best, pulls, near, factors, mean, told, row, parts, dim, step, num_warps=4
    )
    return mean, told, row, logits


@pulled.register_fake
def _(
    rows: Tensor,
    offset: Tensor,
    xt: Tensor,
    near: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    ends: Tensor,
    width: int,
    listed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = xt.new_empty(len(xt), width if listed else 0, dtype=torch.float32)
    row = ends.new_empty(len(xt))
    double = torch.empty_like(xt, dtype=torch.float64)
    return double, double.new_empty(len(xt), 5), row, logits


_broken = False


def serves(bank: LatentBank, device: torch.device, count: int) -> bool:
    """Whether `posterior` answers so many class-wise queries on a device, and faster than products.

    A program is started for the largest class whatever the class of a query.
    """
    classes = len(bank.classes)
    return (
        triton is not None
        and not _broken
        and device.type == "cuda"
        and bank.device == device
        and bank.dtype in _TYPES
        and bank.rows.is_contiguous()
        and bank.dim <= _LARGEST_DIM
        and 0 < count <= _QUERIES_A_CLASS * classes
        and bank.largest_class * classes <= _UNEQUAL * len(bank)
    )


def at_a_time(bank: LatentBank) -> int:
    """Queries whose parts of sums fit into memory."""
    parts = bank.largest_class // _SPLIT + 1
    return min(_MOST, max(1, _PART_BYTES // (4 * bank.dim * parts)))


def attempt(run: Callable[[], T]) -> T | None:
    """What `run` gives; None, after a warning, if a kernel does not compile here."""
    global _broken
    # Those tell of the device, and not of the kernel.
    others = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    try:
        return run()
    except others:
        raise
    except Exception as error:  # of several kinds, by version
        _broken = True
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            "The kernel for class-wise posteriors does not run here, and products take its place: "
            f"{type(error).__name__}: {reason}",
            stacklevel=3,
        )
        return None


def posterior(bank: LatentBank, queries: Queries, k: int) -> Posterior | None:
    """The posterior of each query over the rows of its class. Costs no device sync.

    Args:
        bank: The rows.
        queries: Class-wise, so many that `serves` is true.
        k: How many of the largest weights to return.

    Returns:
        As `Engine.posterior`; None, after a warning, if the kernel does not compile here.
    """
    step, every = at_a_time(bank), range(len(queries))

    def run() -> Posterior:
        parts = (every[first : first + step] for first in every[::step])
        return Posterior.cat([_posterior(bank, queries.select(part), k) for part in parts])

    return attempt(run)


def _posterior(bank: LatentBank, queries: Queries, k: int) -> Posterior:
    xt, path, ends = queries.xt, queries.path, queries.ends_on_device
    width, offset = bank.largest_class, bank.offset.to(xt.device)

    def ask(near: Tensor, listed: bool = False) -> tuple[Tensor, ...]:
        return pulled(bank.rows, offset, xt, near, path.alpha, path.sigma, ends, width, listed)

    near = queries.x1
    if near is None:
        near = bank.take(ask(bank.centre.to(xt.device).expand_as(xt))[2], xt.device)
    mean, told, row, logits = ask(near, k > 1)
    log_evidence, entropy, ess, top, relative = told.unbind(1)
    weights, rows = top[:, None], row[:, None]
    if k > 1:
        largest, place = logits.topk(min(k, width), dim=1)
        missing = (0, k - place.shape[1])
        weights = pad((largest - relative[:, None]).exp(), missing)
        rows = (ends[:, :1] + place).masked_fill(largest == -torch.inf, -1)
        rows = pad(rows, missing, value=-1)
    none = torch.zeros_like(top)
    return Posterior(mean, log_evidence, entropy, ess, weights, rows, none)
