r"""Per-sample weights of the loss, as functions of t.

The error of any prediction is that of x_1 in other units: with `y = c_t x_1 + b_t x_t`, a weight
`W` on the squared error of x_1 is `W / c_t^2` on that of y. With `SNR = (a_t / s_t)^2`,

| weight | on the error of x_1 | as published |
|---|---|---|
| min-SNR-gamma (arXiv 2303.09556) | `min(SNR, gamma)` | noise: `min(SNR, gamma) / SNR` |
| P2 (arXiv 2204.00227) | `SNR / (k + SNR)^gamma` | noise: `1 / (k + SNR)^gamma` |
| EDM (arXiv 2206.00364, Table 1) | `SNR + 1/sigma_data^2` | the same, with `SNR = 1/sigma^2` |

and those on a velocity follow. At 0 and 1 the weights are those at `t = 1e-6` and `1 - 1e-6`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.paths import LinearPath, Path, Prediction, PredictionKind
from stagewise.stages import StageCurve, loss_floor, require_curve

if TYPE_CHECKING:
    from stagewise.schemes import Phases, Scheme

__all__ = [
    "EDMWeight",
    "InverseFloor",
    "MinSNR",
    "P2",
    "StageFactors",
    "StageGate",
    "Weight",
    "weights_at",
]

_END = 1e-6


class Weight(ABC):
    """The weight of a sample as a function of t: the base of all weights."""

    @property
    def needs_boundary(self) -> bool:
        """Whether it needs the boundary (`bind`) first."""
        return False

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """The weights at `t`, any shape, in its dtype; at least 0."""

    def bind(self, boundary: float | None, path: Path) -> Weight:
        """The weight with this boundary and path, unless it has its own."""
        return self


def weights_at(weight: Callable[[Tensor], Tensor] | None, t: Tensor) -> Tensor:
    """The weights at times, (B,), ones for None; refuses those of another shape."""
    found = torch.ones_like(t) if weight is None else weight(t)
    if found.shape != t.shape:
        raise ValueError(
            f"Expected `weight(t)` with shape {tuple(t.shape)}, got {tuple(found.shape)}."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _OfData(Weight):
    """A weight on the error of x_1, in the units of a prediction."""

    prediction: Prediction | PredictionKind = "velocity"
    path: Path | None = None

    def __post_init__(self) -> None:
        Prediction.of(self.prediction)

    @abstractmethod
    def of_data(self, snr: Tensor) -> Tensor:
        """The weight on the squared error of x_1."""

    def __call__(self, t: Tensor) -> Tensor:
        path = self.path or LinearPath()
        at = path(t.double().clamp(_END, 1 - _END))
        c = Prediction.of(self.prediction).of_data(at)
        return (self.of_data((at.alpha / at.sigma).square()) / c.square()).to(t.dtype)

    def bind(self, boundary: float | None, path: Path) -> Weight:
        return self if self.path is not None else replace(self, path=path)


@dataclass(frozen=True)
class MinSNR(_OfData):
    """Weighs noisy times by their SNR: min-SNR-gamma (Hang et al., arXiv 2303.09556).

    Args:
        gamma: Above 0, default 5.
        prediction: What the loss compares, default "velocity".
        path: Default that of the scheme, or `LinearPath()`.

    Example:
        >>> import torch
        >>> from stagewise import MinSNR
        >>> MinSNR(5.0)(torch.tensor([0.1, 0.5, 0.9])).shape
        torch.Size([3])
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise ValueError(f"Expected `gamma` above 0, got {self.gamma}.")

    @override
    def of_data(self, snr: Tensor) -> Tensor:
        return snr.clamp_max(self.gamma)


@dataclass(frozen=True)
class P2(_OfData):
    """Gives nearly clean times less weight: P2 (Choi et al., arXiv 2204.00227).

    Args:
        k: Above 0, default 1.
        gamma: At least 0, default 1.
        prediction: What the loss compares, default "velocity".
        path: Default that of the scheme, or `LinearPath()`.
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k <= 0 or self.gamma < 0:
            raise ValueError(f"Expected k > 0 and gamma >= 0, got {self.k} and {self.gamma}.")

    @override
    def of_data(self, snr: Tensor) -> Tensor:
        return snr / (self.k + snr) ** self.gamma


@dataclass(frozen=True)
class EDMWeight(_OfData):
    """The weight of EDM (Karras et al., arXiv 2206.00364): constant if F is predicted.

    Args:
        sigma_data: Standard deviation of the data, above 0, default 0.5.
        prediction: What the loss compares, default "velocity".
        path: Default that of the scheme, or `LinearPath()`.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data <= 0:
            raise ValueError(f"Expected `sigma_data` above 0, got {self.sigma_data}.")

    @override
    def of_data(self, snr: Tensor) -> Tensor:
        return snr + 1 / self.sigma_data**2


@dataclass(frozen=True)
class InverseFloor(Weight):
    """Gives a time less weight the larger its irreducible loss: `min(1 / J*(t), largest)`.

    J* is the measured floor, for a velocity (Xu et al., arXiv 2506.13763, without its second term,
    a bump at middle times). Used with the draws of `LossAboveFloor`, which has our results.

    Args:
        curve: The measured floor, `StageCurve.measure(oracle)`.
        largest: The cap, above 0, default 5. J* falls to 0 at t = 1, where the cap decides; it is
            in the units of a velocity, the mean over D numbers.
    """

    of_velocity: ClassVar[bool] = True

    curve: StageCurve
    largest: float = 5.0

    def __post_init__(self) -> None:
        require_curve(self.curve)
        if not self.largest > 0:
            raise ValueError(f"Expected `largest` above 0, got {self.largest}.")

    @override
    def __call__(self, t: Tensor) -> Tensor:
        return (1 / loss_floor(self.curve, t)).clamp_max(self.largest)


class _OfStages(Weight):
    """A weight that depends on where the stages meet; a dataclass with this field."""

    boundary: float | Scheme | Phases | None

    @property
    def needs_boundary(self) -> bool:
        return self.boundary is None

    def bind(self, boundary: float | None, path: Path) -> Weight:
        own = self.boundary is not None
        return self if own else replace(self, boundary=boundary)  # type: ignore[type-var]


@dataclass(frozen=True)
class StageGate(_OfStages):
    """Limits an auxiliary loss of yours to one stage: 1 there, 0 in the other.

    Alignment losses help where the target has little variance, in refinement (Stable Velocity,
    arXiv 2602.05435, has a sigmoid of width 0.05 at t = 0.3):

        loss = loss + (StageGate(scheme)(t) * auxiliary).mean()

    Args:
        boundary: t, or a scheme; default that of the scheme it is given to.
        width: Of a sigmoid in t; default 0, a hard edge.
        stage: The stage with weight 1, default "refinement".

    Example:
        >>> import torch
        >>> from stagewise import StageGate
        >>> StageGate(0.3)(torch.tensor([0.1, 0.9])).tolist()
        [0.0, 1.0]
    """

    boundary: float | Scheme | Phases | None = None
    width: float = 0.0
    stage: Literal["navigation", "refinement"] = "refinement"

    def __post_init__(self) -> None:
        if isinstance(self.boundary, int | float) and not 0 <= self.boundary <= 1:
            raise ValueError(
                f"Expected `boundary` in [0, 1], t = 0 being noise, got {self.boundary}."
            )
        if self.width < 0:
            raise ValueError(f"Expected `width` of at least 0, got {self.width}.")
        if self.stage not in ("navigation", "refinement"):
            raise ValueError(f'Expected `stage` "navigation" or "refinement", got {self.stage!r}.')

    def __call__(self, t: Tensor) -> Tensor:
        """The weights at `t`; raises ValueError if the boundary is not known yet."""
        edge = self.boundary
        if edge is not None and not isinstance(edge, int | float):
            edge = edge.boundary
        if edge is None:
            raise ValueError(
                "Expected the boundary of the stages, which has not been measured yet. Give it as "
                "a number, StageGate(0.1), or give the scheme, StageGate(scheme), once it knows."
            )
        late = torch.sigmoid((t - edge) / self.width) if self.width else (t >= edge).to(t.dtype)
        return late if self.stage == "refinement" else 1 - late


@dataclass(frozen=True)
class StageFactors(_OfStages):
    """Multiplies the loss by one factor in navigation and by another in refinement.

    Args:
        navigation: At least 0, default 1.
        refinement: At least 0, default 1.
        width: Of the sigmoid in t between them; default 0, a hard edge.
        boundary: As in `StageGate`.

    Example:
        >>> import torch
        >>> from stagewise import StageFactors
        >>> factors = StageFactors(navigation=1.0, refinement=0.5, boundary=0.3)
        >>> factors(torch.tensor([0.1, 0.9])).tolist()
        [1.0, 0.5]
    """

    navigation: float = 1.0
    refinement: float = 1.0
    width: float = 0.0
    boundary: float | Scheme | Phases | None = None

    def __post_init__(self) -> None:
        StageGate(self.boundary, self.width)
        if min(self.navigation, self.refinement) < 0 or self.navigation == self.refinement == 0:
            raise ValueError(
                "Expected factors of at least 0 and not both 0, got "
                f"{self.navigation} and {self.refinement}."
            )

    @override
    def __call__(self, t: Tensor) -> Tensor:
        late = StageGate(self.boundary, self.width)(t)
        return self.navigation + (self.refinement - self.navigation) * late
