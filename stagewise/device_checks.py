"""Refusing values without a device sync: on an accelerator the check is a device-side assertion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["require_all"]


def require_all(ok: Tensor, message: str, more: Callable[[], str]) -> None:
    """Refuses values that are not all `ok`.

    Args:
        ok: Which values are right, bool, any shape.
        message: What was expected. On an accelerator CUDA prints it and ends the process.
        more: The rest of the message, from the values; called on the host only.

    Raises:
        ValueError: On a CPU, if any is wrong.
    """
    if ok.device.type != "cpu":
        torch._assert_async(ok.all(), message)
    elif not ok.all():
        raise ValueError(message + more())
