"""The smoothing of a scheme: it draws samples around rows, from a boundary in t on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stagewise.device_checks import require_all
from stagewise.lambdas import Hard
from stagewise.oracle import Oracle
from stagewise.paths import Path
from stagewise.queries import Times, as_times
from stagewise.smoothed_oracle import SmoothedOracle
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength, strength_at
from stagewise.targets import Target

__all__ = ["Smoothed", "SmoothedSamples"]


class SmoothedSamples(NamedTuple):
    """The samples that `Scheme.smooth` drew in its last call.

    Attributes:
        x1: The smoothed samples, (B, *).
        before: The samples that it was given, (B, *).
        source: The row of each, (B,).
        t: The time of each, (B,), as the caller counts it.
        strength: The strength of the smoothing for each, (B,), in [0, 1].
    """

    x1: Tensor
    before: Tensor
    source: Tensor
    t: Tensor
    strength: Tensor


class Smoothed:
    """Draws from a smoothing with a strength that depends on t, and keeps the last draw.

    Without a `strength` it is 0 before the collapsed boundary, and 1 from it on. That boundary is
    the scheme's, which passes it to the methods.
    """

    def __init__(self, smoothing: Smoothing, strength: Strength | None) -> None:
        self.smoothing, self.strength = smoothing, strength
        self.drawn: SmoothedSamples | None = None
        self._oracle: SmoothedOracle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "drawn": None}  # samples of a step are no state

    def _edge(self, collapsed: float | None) -> float | None:
        return collapsed if self.strength is None else None

    def draw(
        self,
        x1: Tensor,
        t: Tensor,
        told: Tensor,
        source: Tensor | None,
        seed: int,
        collapsed: float | None,
    ) -> Tensor:
        """Draws around rows as `Smoothing.draw`; refuses samples that it has drawn itself.

        `told` are the times `t`, (B,), as the caller counts them.
        """
        if self.drawn is not None and x1 is self.drawn.x1:
            raise ValueError(
                "Expected rows of the bank to smooth, got the samples that this scheme has drawn "
                "already. Smooth once: x1 = scheme.smooth(x1, t=t); u, w = scheme(x1 - x0, xt=xt, "
                "t=t, x1=x1). FlowMatchingLoss and StageScheme do it themselves."
            )
        source = self.smoothing.source_of(x1, source)
        generator = torch.Generator(x1.device).manual_seed(seed)
        share = strength_at(x1, t, self._edge(collapsed), self.strength)
        assert share is not None
        smoothed = self.smoothing.around(x1, source, share, generator)
        self.drawn = SmoothedSamples(smoothed, x1, source, told, share.detach())
        return smoothed

    def source_of(self, x1: Tensor, t: Times, source: Tensor | None, *, first: bool) -> Tensor:
        """The row of each smoothed sample, (B,); `first` checks that the times are the same."""
        if self.drawn is None or self.drawn.x1 is not x1:
            raise ValueError(
                f"Expected the `x1` that the last scheme.smooth gave, as this scheme has "
                f"{self.smoothing!r}, got another tensor. Smooth before x_t is made: "
                "x1 = scheme.smooth(x1, t=t); xt = scheme.path.interpolate(x0, x1, t)."
            )
        if first:
            require_all(
                (as_times(t, x1) - self.drawn.t).abs() < 0.01,
                "Expected the times `t` that the samples were smoothed at",
                lambda: (
                    ", got other times. Draw t once: t = scheme.timesteps.sample(len(x1)); "
                    "x1 = scheme.smooth(x1, t=t); xt = scheme.path.interpolate(x0, x1, t); "
                    "u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)."
                ),
            )
        return self.drawn.source if source is None else source

    def meets(self, target: Target | None) -> bool:
        """Whether a smoothed sample may get a target of the oracle."""
        # Mix("boundary") ends at the midpoint, which lies before the collapsed boundary.
        apart = target is not None and isinstance(target.lam, Hard) and self.strength is None
        return target is not None and not apart

    def oracle(self, oracle: Oracle, path: Path, collapsed: float | None) -> SmoothedOracle:
        """The oracle of the smoothed rows; raises if `oracle` has a kernel on a condition."""
        if oracle.condition is not None:
            raise ValueError(
                f"Expected oracle targets only before the boundary from which {self.smoothing!r} "
                f"acts, since the smoothed oracle takes no {oracle.condition!r}: "
                'Scheme(oracle, target=Mix("boundary"), smoothing=Smoothing(oracle.bank)).'
            )
        boundary = self._edge(collapsed)
        if self._oracle is None or self._oracle.boundary != boundary:
            self._oracle = SmoothedOracle(
                oracle.bank, path, self.smoothing, boundary=boundary, strength=self.strength
            )
        return self._oracle
