"""`read_batch` functions that need the trained module, for example to encode samples."""

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
    """A `read_batch` of the batch only, from one of a batch, or of a batch and the module.

    `encode` is applied to `x_1` afterwards. Both run in eval mode, without gradients, in the
    `context` of training's precision. What needs no module is returned itself.
    """
    takes_module = _takes_module(read_batch)
    if not takes_module and encode is None:
        return read_batch

    def read(batch: Any) -> Any:
        with in_eval_mode(module), torch.no_grad(), context():
            x1, *rest = read_batch(batch, module) if takes_module else read_batch(batch)
            return (x1 if encode is None else encode(x1, module), *rest)

    return read


def without_trace(read_batch: ReadBatch) -> ReadBatch:
    """A `read_batch` that restores the random state of torch; `find_sample` draws nothing."""
    if read_batch is find_sample:
        return read_batch

    def read(batch: Any) -> Any:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            return read_batch(batch)

    return read


def _takes_module(read_batch: Callable[..., Any]) -> bool:
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
