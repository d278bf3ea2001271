r"""The two matrix products of the oracle, at a stated precision.

The dense engines cost two products: queries x rows (the logits) and weights x rows (the mean). Only
this module knows how each kind of hardware makes a product:

- **float64** rows: plain products.
- **float32** rows: IEEE float32 for any `torch.set_float32_matmul_precision` (TF32 and bf16 modes
  are off during the call). On x86 CPUs by oneDNN, which is up to 2 to 3 times as fast as torch's
  default BLAS. Without AVX-512 that BLAS is faster for many queries, if the rows are its left
  factor, and for up to three, if the rows come as a batch of small blocks.
- **bfloat16 / float16** rows on an accelerator: the other factor is split into a high and a low
  part of that type, and both are multiplied with the rows, accumulated in float32. The rows are
  exact in their own type, so the product is good to `2^-18` (bfloat16) or `2^-22` (float16) of the
  factors' norms.
- **bfloat16** rows on a CPU that multiplies them (AMX, or the bf16 instructions of AVX-512): the
  same, but these products come out rounded to bfloat16. So the high part is multiplied a second
  time, with the first answer subtracted before the rounding: answer and remainder together have all
  digits. This is done if an error of 1e-4 is allowed; otherwise a CPU gets 16-bit rows converted to
  float32 (`working_dtype`). The instruction set decides, not a measurement: a run on a busy machine
  gives the same bits.

`rounding(dtype, dim)` is the error of a product.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["averages", "full_precision", "rounding", "scores", "split", "working_dtype"]

_log = logging.getLogger("stagewise")

_HALF = (torch.bfloat16, torch.float16)

# oneDNN's float32 inner product, part of every x86 build of torch; without it torch.matmul is used.
_ONEDNN = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)

# With AVX2 only, BLAS with the rows on the left is faster from this many queries on. It gets this
# many rows at a time, so that the result is still in the cache when it is transposed.
_TURNED = 64 if torch.backends.cpu.get_cpu_capability() == "AVX2" else None
_CHUNK = 2048

# With AVX2 only, up to this many queries are multiplied with blocks of this many rows.
_FEW, _BLOCK = 3, 128

# Rows that an accelerator sums at a time. Tensor cores cut off what is below the last digit of a
# sum: over a million rows that would be 1e-3 of it.
_LONG = 2**14


def working_dtype(dtype: torch.dtype, device: torch.device, rough: bool = False) -> torch.dtype:
    """The type in which rows of a storage `dtype` are multiplied on a device.

    With `rough` a relative error of 1e-4 in a mean is allowed, and a CPU, too, multiplies bfloat16
    rows in their own type.
    """
    wide_output = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8
    if dtype in _HALF and device.type == "cuda" and wide_output and _multiplies(dtype):
        return dtype
    if rough and dtype == torch.bfloat16 and device.type == "cpu" and _multiplies_on_cpu():
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype: torch.dtype, dim: int, truncates: bool = False) -> tuple[float, float]:
    """The error of `<q, x>` for D = `dim` numbers multiplied as `dtype`: u and v.

    The standard deviation of the error is at most about `u |q| |x| + v |<q, x>|`. The factors are
    rounded; and if the D terms add up instead of cancelling, as for the source row of a query, the
    roundings of the partial sums add up too, and are larger (measured: 0.25 sqrt(D) of the last
    digit).

    With `truncates` tensor cores add the terms, 16 at a time, and cut off what is below the last
    digit of a sum (arXiv 2512.07004): half a digit less, in one direction, in each of D/16
    additions.
    """
    digits = {torch.float64: 53, torch.float32: 24, torch.float16: 22, torch.bfloat16: 18}
    sums = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    root = math.sqrt(dim)
    if truncates:
        cut = dim / 16 * 2.0**-24
        return 2.0 ** -digits[dtype] / min(root, 2) + cut / root, cut
    # On a CPU the remainder of a bfloat16 product is rounded, to 2^-9 of 2^-9 of it.
    remainder = 2.0**-19 if dtype == torch.bfloat16 else 0.0
    return 2.0 ** -digits[dtype] / min(root, 2), 0.3 * root * sums + remainder


def scores(query: Tensor, rows: Tensor) -> Tensor:
    """`query @ rows.T`, (B, n), float64 for float64 rows, otherwise float32.

    Args:
        query: (B, D), float64, or float32 for rows of fewer digits; in the 16-bit type of the rows
            it is not split.
        rows: (n, D), in their working dtype.
    """
    if rows.dtype == torch.float64:
        return query @ rows.T
    if rows.dtype == torch.float32:
        query = query.float()
        if not _in_blocks(query, rows):
            return _float32_product(query, rows)
        blocks, rest = _blocks(rows)
        batch = query.expand(len(blocks), -1, -1) @ blocks.mT
        return torch.cat([batch.transpose(0, 1).flatten(1), query @ rest.T], dim=1)
    if query.dtype == rows.dtype:
        return _wide_product(query, rows.T)
    # A query divided by its largest number fits any type.
    scale = query.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return _split_product(query / scale, rows.T) * scale.float()


def averages(weights: Tensor, rows: Tensor) -> Tensor:
    """`weights @ rows`, (B, D), in the dtype of the weights, at least float32.

    Args:
        weights: (B, n), in [0, 1], float64 or float32 as from `scores`; in the 16-bit type of the
            rows they are not split.
        rows: (n, D), in their working dtype.
    """
    if rows.dtype == torch.float64:
        return weights @ rows
    if weights.dtype == rows.dtype and (weights.is_cuda or rows.dtype in _HALF):
        return _long_product(weights, rows)
    if rows.dtype == torch.float32:
        if not _in_blocks(weights, rows):
            return _float32_product(weights, rows.T)
        blocks, rest = _blocks(rows)
        first, last = weights.split([len(rows) - len(rest), len(rest)], dim=1)
        batch = first.unflatten(1, (len(blocks), _BLOCK)).transpose(0, 1)
        return (batch @ blocks).sum(0).addmm_(last, rest)
    scale = 2.0**14  # keeps small weights above float16's smallest number
    if weights.is_cuda:
        both = _long_product(torch.cat(split(weights * scale, rows.dtype)), rows)
        return (both[: len(weights)] + both[len(weights) :]) / scale
    return _split_product(weights * scale, rows) / scale


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` as the sum of two tensors of a 16-bit type, to twice its digits."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in IEEE float32; restores the caller's setting at the end."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        # mkldnn has one too, which torch does not declare.
        places: tuple[Any, ...] = (
            torch.backends.cuda.matmul,
            getattr(torch.backends.mkldnn, "matmul"),  # noqa: B009
        )
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, setting in zip(places, before, strict=True):
                place.fp32_precision = setting
        return
    setting = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


def _in_blocks(left: Tensor, rows: Tensor) -> bool:
    few = left.device.type == "cpu" and len(left) <= _FEW and len(rows) >= 2 * _BLOCK
    return _TURNED is not None and few


def _blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in blocks, and the remaining rows."""
    count = len(rows) // _BLOCK
    return rows[: count * _BLOCK].unflatten(0, (count, _BLOCK)), rows[count * _BLOCK :]


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`."""
    if _ONEDNN is None or left.device.type != "cpu" or not len(right):
        return left @ right.T
    if _TURNED is not None and len(left) >= _TURNED:
        product = left.new_empty(len(left), len(right))
        for first in range(0, len(right), _CHUNK):
            rows = right[first : first + _CHUNK]
            product[:, first : first + len(rows)] = (rows @ left.T).T
        return product
    # A matrix times a vector is bound by reading, where BLAS with AVX-512 is faster.
    if _TURNED is None and len(left) == 1:
        return left @ right.T
    return _ONEDNN(left.contiguous(), right, None, "none", [], "")


def _split_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, right of a 16-bit type, in float32."""
    high, low = split(left, right.dtype)
    count, both = len(left), torch.cat([high, low])
    if left.device.type == "cuda" or not _multiplies_on_cpu():
        wide = _wide_product(both, right)
        return wide[:count] + wide[count:]
    first = both @ right
    remainder = torch.addmm(-first[:count], high, right)
    return first[:count].float().add_(first[count:]).add_(remainder)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, or of a batch of both, in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if not left.is_cuda:  # for tests of the arithmetic
        return left.float() @ right.float()
    multiply: Any = torch.bmm if left.ndim == 3 else torch.mm
    product: Tensor = multiply(left, right, out_dtype=torch.float32)
    return product


def _long_product(left: Tensor, rows: Tensor) -> Tensor:
    """`left @ rows` in float32, as a sum of products over few rows, to round less."""
    count = len(rows) // _LONG
    if count < 2:
        return _wide_product(left, rows)
    first, last = left.split([count * _LONG, len(rows) - count * _LONG], dim=1)
    blocks = rows[: count * _LONG].unflatten(0, (count, _LONG))
    product = _wide_product(first.unflatten(1, (count, _LONG)).transpose(0, 1), blocks).sum(0)
    return product.add_(_wide_product(last, rows[count * _LONG :])) if last.shape[1] else product


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether CUDA devices here have units for products of a 16-bit type."""
    if dtype == torch.float16 or not torch.cuda.is_available():
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _multiplies_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16; logged once, because it changes digits."""
    # torch does not declare these; without them rows are converted.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    there = any(getattr(torch.cpu, name, bool)() for name in names)
    done = "multiplied as they are" if there else "converted to float32"
    _log.info("bfloat16 rows are %s on this CPU where rtol is 1e-4 or more", done)
    return there
