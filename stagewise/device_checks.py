"""Refusing values without a device sync: on an accelerator the check is a device-side assertion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["require_all", "seen_within"]


def require_all(ok: Tensor, message: str, more: Callable[[], str]) -> None:
    """Refuses values that are not all `ok`, a bool tensor of any shape.

    On a CPU by a ValueError, with `more` of the values; on an accelerator CUDA prints the message
    and ends the process.
    """
    if ok.device.type != "cpu":
        torch._assert_async(ok.all(), message)
    elif not ok.all():
        raise ValueError(message + more())


def seen_within(values: Tensor, low: float, high: float) -> bool:
    """Whether all numbers are seen to be in [low, high]; on an accelerator none is looked at.

    On the host this is cheaper than `require_all`, and almost every call passes it.
    """
    if values.device.type != "cpu" or type(values) is not Tensor or not values.numel():
        return False
    least, most = (float(end) for end in values.detach().aminmax())
    return low <= least and most <= high
