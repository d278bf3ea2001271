"""Samples as rows of fewer bits than they came in.

A row is stored as `(x - offset)` rounded to the storage type, and a sample is `row + offset`. With
an offset near the mean, a 16-bit type rounds relative to the distance from the mean and not to the
distance from zero: pixels in [0, 255] or latents with a bias lose no digits to their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "HALF", "given_offset", "narrow", "offset_for", "require_spread"]

HALF = (torch.bfloat16, torch.float16)
"""The 16-bit types, which get an offset."""

BLOCK = 2**20
"""Numbers handled at a time wherever something of a whole bank is computed in float64: the copies
stay in the cache, and their memory is used again."""


_LEAST = 2**-13
"""A standard deviation below which float16, whose numbers are 2^-24 apart there, loses digits."""


def offset_for(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What to subtract from samples before they are rounded to `dtype`.

    For a 16-bit type that is the mean of the samples, in numbers that float32 has: few digits, so
    that `row + offset` in float64 is exact, and `(row + offset) - offset` is `row` again. It is
    zero if samples have that type already, and for wider types.

    Args:
        x: Samples, (N, D). Those with NaN or Inf do not count: whoever refuses them is to see the
            other ones unharmed.
        dtype: Storage type.

    Returns:
        The offset, (D,), float64.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    if dtype not in HALF or x.dtype == dtype:
        return total
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    for block in x.split(max(1, BLOCK // x.shape[1])):
        finite = block.isfinite().all(1)
        total += block.double().where(finite[:, None], 0.0).sum(0)
        count += finite.sum()
    return (total / count.clamp_min(1)).float().double()


def given_offset(offset: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The offset a user gives, as it is kept; without one, `offset_for`.

    Args:
        offset: D finite numbers in any shape, or None.
        x: Samples, (N, D).
        dtype: Storage type. An offset for wider types, or of samples that have theirs, is left out.

    Returns:
        The offset, (D,), float64, on the device of `x`.

    Raises:
        ValueError: If there are other than D numbers, or such that are not finite.
    """
    if offset is None or dtype not in HALF or x.dtype == dtype:
        return offset_for(x, dtype)
    if offset.numel() != x.shape[1] or not offset.isfinite().all():
        raise ValueError(
            f"Expected `offset` of {x.shape[1]} finite numbers, one for each of a sample's, got "
            f"shape {tuple(offset.shape)}. Give a vector near the mean, for example "
            "x[:1000].float().mean(0)."
        )
    return offset.detach().flatten().to(x.device).float().double()


def narrow(x: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples as they are stored, `(x - offset)` rounded to `dtype`.

    Args:
        x: Samples, (N, D), floating point. NaN and Inf pass.
        offset: (D,), float64, on the device of `x`.
        dtype: Storage type.

    Returns:
        The rows, (N, D); `x` itself if nothing changes.

    Raises:
        ValueError: If a finite number of `x` is beyond the range of `dtype`.
    """
    if x.dtype == dtype and dtype not in HALF:
        return x
    rows = torch.empty_like(x, dtype=dtype)
    step = max(1, BLOCK // x.shape[1])
    for block, out in zip(x.split(step), rows.split(step), strict=True):
        out.copy_(block.double() - offset)
        beyond = out.isinf() & block.isfinite()
        if beyond.any():
            largest = float(block[beyond].double().abs().max())
            cure = "bfloat16 or dtype=torch.float32" if dtype == torch.float16 else "float64"
            where = " from the mean" if dtype in HALF else ""
            raise ValueError(
                f"Expected numbers that fit into {dtype}, which ends at "
                f"{torch.finfo(dtype).max:.5g}{where}, got values beyond range, the largest "
                f"{largest:.5g}. Store them as dtype=torch.{cure}, or scale them."
            )
    return rows


def require_spread(spread: float, dtype: torch.dtype) -> None:
    """Refuses samples that were too close together for their storage type.

    Args:
        spread: Root mean square of the numbers in the rows, from their mean, as stored.
        dtype: Storage type.

    Raises:
        ValueError: If float16 has too few numbers between them.
    """
    if dtype == torch.float16 and spread < _LEAST:
        raise ValueError(
            f"Expected samples that differ from their mean by {_LEAST:.2g} at least, root mean "
            f"square, to be stored as {dtype}, which has too few numbers below, got {spread:.2g}. "
            "Store them as dtype=torch.bfloat16 or torch.float32, or scale them."
        )
