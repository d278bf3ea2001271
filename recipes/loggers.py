"""Loggers that cannot write do not end the training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["tolerant"]

_WRITING = ("log_hyperparams", "log_metrics", "save", "finalize")


def tolerant(name: str, logger: Logger) -> Logger:
    """The same logger, which warns at its first `OSError` and then no longer writes.

    `name` is its name in the configuration. TensorBoard's writer, which has a thread of its own,
    raises at every call once it has failed.
    """
    failed: list[OSError] = []

    def call(method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if failed:
            return None
        try:
            return method(*arguments, **named)
        except Exception as raised:
            # Lightning's TensorBoardLogger turns all errors of its writer into a ValueError.
            error = raised if isinstance(raised, OSError) else raised.__cause__
            if not isinstance(error, OSError):
                raise
            failed.append(error)
            folder = logger.log_dir or logger.save_dir
            rank_zero_warn(
                f"{type(logger).__name__} cannot write to {Path(str(folder))}: "
                f"{error.strerror or error}. Training continues, but nothing more is logged there. "
                "Make room on that disk and continue with resume=true, or log elsewhere: "
                f"logger.{name}.save_dir=FOLDER."
            )
            return None

    for writes in _WRITING:
        method = getattr(logger, writes)
        setattr(logger, writes, wraps(method)(partial(call, method)))
    return logger
