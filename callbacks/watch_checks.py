"""What a `Watch` refuses to be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stagewise.adapters import find_couplings, find_target_makers
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.callbacks.run import StageRun
from stagewise.callbacks.stage_callback import StageCallback

__all__ = ["IN_A_LOOP", "check_watched"]

IN_A_LOOP = (
    "if the loop writes the target u out, make it steerable: target = stagewise.StageTarget(), "
    "Watch(..., target=target), and once u, xt and t are made u, w = target(u, xt=xt, t=t, x1=x1) "
    "in the loop, where w weighs the loss of each sample."
)
"""What messages say about a target that no object makes."""


def check_watched(model: Any, data: Any, callbacks: Sequence[Any], target: Any) -> None:
    """Refuses a model, callbacks or a target that are none; warns of no callbacks at all."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            "Expected `model` to be the network that the loop trains, an nn.Module, got "
            f"{type(model).__name__}: Watch(model, loader, PosteriorMonitor())."
        )
    for callback in callbacks:
        if not isinstance(callback, StageCallback) or isinstance(callback, StageRun):
            raise TypeError(
                f"Expected callbacks of stagewise, got {callback!r}. What is said about the run "
                "is said to the Watch: Watch(model, loader, PosteriorMonitor(), read_batch=...)."
            )
    if isinstance(data, StageCallback):
        raise TypeError(
            f"Expected the training loader or a LatentBank before the callbacks, got {data!r}: "
            "Watch(model, loader, PosteriorMonitor())."
        )
    if not callbacks:
        rank_zero_warn(
            "A Watch without callbacks measures nothing: Watch(model, loader, PosteriorMonitor())."
        )
    if target is not None and not find_target_makers(target) and not find_couplings(target):
        raise TypeError(
            f"Expected `target` to be what makes the targets, got {target!r}, which is nothing "
            f"that is known; {IN_A_LOOP}"
        )
