r"""How much of the oracle goes into a target: `lambda` in `u + lambda (u* - u)`.

The optimum of the regression stays where it is as long as lambda is a function of `(x_t, t)` alone,
or symmetric in the rows that the posterior is over: given those and `x_t`, each row is the source
with its own weight, so `E[lambda (m - x_1)] = lambda (m - m) = 0`. All here are of that kind. One
that reads the source itself, its weight for example, moves the optimum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.paths import Path

__all__ = ["Concentration", "Constant", "Hard", "Lambda", "LambdaLike", "Smooth"]


class Lambda(ABC):
    """From times, and what the posterior looks like, to numbers in [0, 1]."""

    needs_boundary = False
    """Whether it depends on where the stages meet."""

    from_t = True
    """Whether t alone decides, so that it is known before the posterior is."""

    @property
    def sparse(self) -> bool:
        """Whether it is 0 over a range of t, so that queries there need not be asked."""
        return False

    @abstractmethod
    def __call__(
        self, t: Tensor, top1: Tensor | None, path: Path, boundary: float | None
    ) -> Tensor:
        """The lambda of each query.

        Args:
            t: Times, (B,), float64.
            top1: Largest weight of each posterior, (B,), float64; None if `from_t`.
            path: The path of training.
            boundary: Where the stages meet; None if not `needs_boundary`.

        Returns:
            (B,), in [0, 1].
        """

    @staticmethod
    def of(value: LambdaLike) -> Lambda:
        """`value` itself, the constant of that number, or `Hard()` for "boundary"."""
        if isinstance(value, Lambda):
            return value
        if value == "boundary":
            return Hard()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                'Expected `lam` to be a number in [0, 1], "boundary", Smooth(width) or '
                f"Concentration(), got {value!r}."
            )
        return Constant(float(value))


LambdaLike: TypeAlias = "Lambda | float | Literal['boundary']"


@dataclass(frozen=True)
class Constant(Lambda):
    """The same at all t.

    Args:
        value: In [0, 1]; 0 is the conditional target, 1 the oracle's.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(
                f"Expected `lam` in [0, 1], got {self.value}: 0 is the conditional target, 1 the "
                "oracle's."
            )

    @property
    @override
    def sparse(self) -> bool:
        return self.value == 0

    @override
    def __call__(self, t: Tensor, *_: Any) -> Tensor:
        return torch.full_like(t, self.value)


@dataclass(frozen=True)
class Hard(Lambda):
    """1 in navigation, 0 in refinement, where no query is asked."""

    needs_boundary = True
    sparse = True

    @override
    def __call__(
        self, t: Tensor, top1: Tensor | None, path: Path, boundary: float | None
    ) -> Tensor:
        assert boundary is not None
        return (t < boundary).to(t.dtype)


@dataclass(frozen=True)
class Smooth(Lambda):
    """All of the oracle near noise, none near data, one half at the boundary.

    Args:
        width: In nats of the signal-to-noise ratio, default 1.
    """

    width: float = 1.0
    needs_boundary = True

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(
                f'Expected `width` above 0, got {self.width}. For a hard edge use "boundary".'
            )

    @override
    def __call__(
        self, t: Tensor, top1: Tensor | None, path: Path, boundary: float | None
    ) -> Tensor:
        assert boundary is not None
        edge = path.snr_sqrt(torch.full_like(t[:1], boundary))
        # rho is 0 or infinite at the ends, where sigmoid has its limits.
        return torch.sigmoid(2 * (edge.log() - path.snr_sqrt(t).log()) / self.width)


@dataclass(frozen=True)
class Concentration(Lambda):
    """As much of the oracle as the posterior is undecided: `1 - max_i gamma_i`."""

    from_t = False

    @override
    def __call__(self, t: Tensor, top1: Tensor | None, *_: Any) -> Tensor:
        assert top1 is not None
        return 1 - top1.clamp(0, 1)
