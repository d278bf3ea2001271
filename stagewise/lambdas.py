r"""How much of the oracle goes into a target: `lambda` in `u + lambda (u* - u)`.

The optimum of the regression does not move if lambda is a function of `(x_t, t)`, or symmetric in
the rows of the posterior: given those and `x_t`, each row is the source with its own weight, so
`E[lambda (m - x_1)] = lambda (m - m) = 0`. All lambdas here are of that kind. A lambda that reads
the source, for example its weight, moves the optimum.
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
    """From times, and the largest weight of each posterior, to numbers in [0, 1]."""

    needs_boundary = False
    """Whether it depends on where the stages meet."""

    from_t = True
    """Whether it depends on t only, so that it is known before the posterior."""

    @property
    def sparse(self) -> bool:
        """Whether it is 0 over a range of t, where no query is needed."""
        return False

    @abstractmethod
    def __call__(
        self, t: Tensor, top1: Tensor | None, path: Path, boundary: float | None
    ) -> Tensor:
        """The lambda of each query at times t, (B,), float64: (B,), in [0, 1].

        `top1`, (B,), is the largest weight of each posterior, None if `from_t`; `boundary` is None
        if not `needs_boundary`.
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
    """1 in navigation, 0 in refinement, where no query is needed."""

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
    """1 near noise, 0 near data, one half at the boundary.

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
    """`1 - max_i gamma_i`: large where many rows share the posterior, 0 where it has collapsed."""

    from_t = False

    @override
    def __call__(self, t: Tensor, top1: Tensor | None, *_: Any) -> Tensor:
        assert top1 is not None
        return 1 - top1.clamp(0, 1)
