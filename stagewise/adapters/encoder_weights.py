"""Notices when the weights that make x_1 have changed: then the rows of a bank are stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stagewise.adapters.network_search import eager

__all__ = ["STALE", "EncoderWeights", "version_of_weights"]

STALE = (
    "The encoder that makes x_1 is trained in the same step, so a bank that is read once goes "
    "stale. Freeze it, module.encoder.requires_grad_(False), or give a bank of what is trained on: "
    "StageRun(bank=LatentBank(latents, labels))."
)
"""The message for a bank whose rows change in training."""


class EncoderWeights:
    """The weights of the submodules of `module` that `encode` calls; it is called once."""

    def __init__(self, module: nn.Module, encode: Callable[[], Any]) -> None:
        self._weights: list[nn.Parameter] = []

        def note(part: nn.Module, _: Any) -> None:
            # The parts of a compiled module cannot be watched: take all its weights.
            self._weights += part.parameters(recurse="_orig_mod" in part._modules)

        hooks = [part.register_forward_pre_hook(note) for _, part in eager(module)]
        try:
            encode()
        finally:
            for hook in hooks:
                hook.remove()
        self._version = version_of_weights(self._weights)

    def changed(self) -> bool:
        """Whether they have changed since the last call; does not read their values."""
        before, self._version = self._version, version_of_weights(self._weights)
        return self._version != before


def version_of_weights(weights: Any) -> int:
    """A number that grows with each change of a weight; does not read their values."""
    return sum(weight._version for weight in weights)
