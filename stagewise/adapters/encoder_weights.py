"""Notices that weights have changed with which x_1 is made: rows that were read then are stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stagewise.adapters.network_search import eager

__all__ = ["STALE", "EncoderWeights", "version_of_weights"]

STALE = (
    "The encoder that makes x_1 is trained in the same step, so that a bank that is read once goes "
    "stale. Freeze it, module.encoder.requires_grad_(False), or give a bank of what is trained on: "
    "StageRun(bank=LatentBank(latents, labels))."
)
"""What is said where the rows of a bank move."""


class EncoderWeights:
    """The weights of the submodules that a function calls.

    Args:
        module: The module that it may call.
        encode: The function; it is called once.
    """

    def __init__(self, module: nn.Module, encode: Callable[[], Any]) -> None:
        self._weights: list[nn.Parameter] = []

        def note(part: nn.Module, _: Any) -> None:
            # The parts of what is compiled are not watched, and their weights are taken with it.
            self._weights += part.parameters(recurse="_orig_mod" in part._modules)

        hooks = [part.register_forward_pre_hook(note) for _, part in eager(module)]
        try:
            encode()
        finally:
            for hook in hooks:
                hook.remove()
        self._version = version_of_weights(self._weights)

    def changed(self) -> bool:
        """Whether they have changed since this was asked last; costs no look at their values."""
        before, self._version = self._version, version_of_weights(self._weights)
        return self._version != before


def version_of_weights(weights: Any) -> int:
    """Grows with each change of a weight, and costs nothing."""
    return sum(weight._version for weight in weights)
