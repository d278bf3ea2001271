"""Functions that `torch.compile` must not trace: the oracle and its callers read values."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["caller_level", "untraced"]

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Decorates a function or method that `torch.compile` must not trace.

    `torch.compiler.disable` loads the compiler (seconds) even if nothing is compiled.
    """
    eager: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not eager:
            eager.append(torch.compiler.disable(function))
        return eager[0](*args, **kwargs)

    return call  # type: ignore[return-value]


def caller_level() -> int:
    """The `stacklevel` of a warning, inside an untraced method, about its caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        within, frame, level = frame.f_code.co_filename == __file__, frame.f_back, level + 1
        if within and frame.f_globals.get("__name__") != "stagewise.side_stream":
            break
    return level
