"""What `torch.compile` must not look into: the oracle, and all that asks it, reads values."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["caller_level", "untraced"]

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """A function that runs as it is where the code around it is compiled.

    `torch.compiler.disable` does that, but loads the compiler (seconds) where nothing is compiled.

    Args:
        function: A function, or a method in the body of its class.
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
    """The `stacklevel` of a warning about the caller of an untraced method, given inside it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        within, frame, level = frame.f_code.co_filename == __file__, frame.f_back, level + 1
        if within and frame.f_globals.get("__name__") != "stagewise.side_stream":
            break
    return level
