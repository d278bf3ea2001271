"""Samples found through the module that is trained: `read_batch` asks it, or what it encodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.batches import ReadBatch, find_sample
from stagewise.undisturbed import in_eval_mode

__all__ = ["Encode", "through_module", "without_trace"]

Encode = Callable[[Tensor, nn.Module], Tensor]
"""From `x_1` of a batch, (B, *), and the module to what is trained on, (B, *)."""


def through_module(
    read_batch: Callable[..., Any],
    module: nn.Module,
    encode: Encode | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ReadBatch:
    """A `read_batch` of batches alone: in evaluation mode, no gradients, training's precision.

    What is drawn is drawn from the global generators.

    Args:
        read_batch: From a batch, or a batch and the module, to what a `read_batch` returns.
        module: The module.
        encode: What is done with `x_1` afterwards, default nothing.
        context: Makes the context of training's precision.

    Returns:
        `read_batch` itself if it needs no module.
    """
    asks = _asks_module(read_batch)
    if not asks and encode is None:
        return read_batch

    def found(batch: Any) -> Any:
        with in_eval_mode(module), torch.no_grad(), context():
            x1, *rest = read_batch(batch, module) if asks else read_batch(batch)
            return (x1 if encode is None else encode(x1, module), *rest)

    return found


def without_trace(read_batch: ReadBatch) -> ReadBatch:
    """A `read_batch` that leaves no trace in what the run draws; that of tensors draws nothing."""
    if read_batch is find_sample:
        return read_batch

    def found(batch: Any) -> Any:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            return read_batch(batch)

    return found


def _asks_module(read_batch: Callable[..., Any]) -> bool:
    """Whether a function takes a batch and a module."""
    try:
        parameters = inspect.signature(read_batch).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 2
