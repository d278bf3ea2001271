"""The condition of each sample that is trained on, for a kernel on it: where it lies in a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stagewise.adapters.network import Network
from stagewise.adapters.rows import labels_of_rows, place_of
from stagewise.batches import describe, leaves_of
from stagewise.condition import Condition
from stagewise.schemes import Scheme

__all__ = ["BatchConditions"]


class BatchConditions:
    """Finds conditions in the batches of a run; where they lie is looked for once."""

    def __init__(self) -> None:
        self.place = ""

    def of(self, condition: Condition, batch: Any, x1: Tensor, labels: Any) -> Tensor:
        """Those of the samples that were found in a batch, (B, *)."""
        if condition.read_batch is None and self.place:  # to compare values again would wait
            return dict(leaves_of(batch))[self.place]
        c = condition.of(batch, x1, labels)
        self.place = place_of(c, batch)
        return c

    def of_rows(
        self,
        condition: Condition,
        batch: Any,
        own: tuple[Tensor, Any],
        x1: Tensor,
        as_is: bool,
    ) -> Tensor | None:
        """Those of samples x_1, (n, *), by the batch, with `own` found in it.

        `as_is`: whether they are known to be the batch's, in order.

        Returns:
            (n, *); None if it cannot be said which is whose.
        """
        c = self.of(condition, batch, *own)
        if as_is and len(x1) == len(c):
            return c
        at = labels_of_rows(x1, own[0], torch.arange(len(c), device=x1.device), None)
        return None if at is None else c[at.to(c.device)]

    def unlike(
        self,
        schemes: Iterable[Scheme],
        network: Network,
        batch: Any,
        own: tuple[Tensor, Any],
    ) -> str:
        """A warning if kernels go by another condition than the network is given, or empty."""
        for kernel in {s.oracle.condition for s in schemes if s.target and s.oracle}:
            c = None if kernel is None else self.of(kernel, batch, *own)
            if c is not None and not network.is_given(c):
                return (
                    f"{kernel!r} weighs rows by {self.place or 'what `read_batch` gives'}, "
                    f"{describe(c)}, and the network is given {', '.join(network.conditions)}, "
                    "which is another. The targets are right as far as one follows from the other. "
                    "Where the condition is: Condition(..., read_batch=lambda batch: ...)."
                )
        return ""
