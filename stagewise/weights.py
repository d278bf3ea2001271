"""Per-sample weights of the loss, as functions of t."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from stagewise.paths import Path

__all__ = ["Weight"]


class Weight(ABC):
    """From times, (B,), to weights, (B,)."""

    @property
    def needs_boundary(self) -> bool:
        """Whether it depends on where the stages meet, and has not been told."""
        return False

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """The weights at `t`, any shape, at least 0."""

    def bind(self, boundary: float | None, path: Path) -> Weight:
        """The weight for these stages and this path, where it was not given its own."""
        return self
