"""How much of a smoothing is used at which t: none, all, or any share of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from stagewise.oracle import Times, as_times, check_times
from stagewise.stages import StageBoundary

__all__ = ["Strength", "strength_at"]

Strength: TypeAlias = "Callable[[Tensor], Tensor]"
"""From times (B,) to numbers in [0, 1], (B,), that multiply what is added to a row."""


def strength_at(
    x1: Tensor,
    t: Times | None,
    boundary: float | StageBoundary | None,
    strength: Strength | None,
) -> Tensor | None:
    """The strength at the time of each sample.

    Args:
        x1: Samples, (B, *).
        t: Their times, (B,), or as in `Oracle.posterior`.
        boundary: 0 before this time, 1 at it and after it: a time, or what was measured, of which
            the collapsed boundary is taken. NaN (never reached) gives 0.
        strength: In place of a boundary, any function of t.

    Returns:
        In [0, 1], (B,), or None where neither is given: 1 everywhere.

    Raises:
        ValueError: On a boundary or a strength without times, both, or numbers out of range.
    """
    if boundary is None and strength is None:
        return None
    if boundary is not None and strength is not None:
        raise ValueError(
            "Expected a `boundary` or a `strength`, got both. A step is strength=lambda t: (t >= "
            "0.5).float()."
        )
    if t is None:
        raise ValueError(
            "Expected the times `t` of the samples with a boundary or a strength, got none: "
            "draw(x1, source, t=t, boundary=0.5)."
        )
    time = as_times(t, x1)
    check_times(time, len(x1))
    if strength is None:
        edge = boundary.collapsed if isinstance(boundary, StageBoundary) else boundary
        assert edge is not None
        return (time >= edge).to(time.dtype)
    share = strength(time) if callable(strength) else strength
    if not isinstance(share, Tensor) or share.shape != time.shape:
        raise ValueError(
            f"Expected `strength` to give a tensor of shape {tuple(time.shape)}, got "
            f"{tuple(share.shape) if isinstance(share, Tensor) else share!r}: "
            "strength=lambda t: (t >= 0.5).float()."
        )
    inside = ((share >= 0) & (share <= 1)).all()
    message = "Expected `strength(t)` in [0, 1]"
    if share.device.type != "cpu":
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(
            f"{message}, got values from {share.min():.4g} to {share.max():.4g}. Clamp it: "
            "strength=lambda t: ((t - 0.3) / 0.4).clamp(0, 1)."
        )
    return share
