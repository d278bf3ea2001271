"""What a scheme does with its smoothing: the samples it draws around rows, and from when on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stagewise.lambdas import Hard
from stagewise.oracle import Oracle
from stagewise.paths import Path
from stagewise.queries import Times, as_times
from stagewise.smoothed_oracle import SmoothedOracle
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import Strength, strength_at
from stagewise.targets import Target

__all__ = ["Drawn", "Smoothed"]


class Drawn(NamedTuple):
    """What `Scheme.smooth` gave last, for B samples.

    Attributes:
        x1: What it gave, (B, *).
        before: What it was given, (B, *).
        source: The rows of these, (B,).
        t: Their times, as they were told, (B,).
        share: How much of the smoothing is in each, (B,).
    """

    x1: Tensor
    before: Tensor
    source: Tensor
    t: Tensor
    share: Tensor


class Smoothed:
    """Draws from a smoothing, all of it from the collapsed boundary on, or a share of it.

    That boundary belongs to the scheme, and is handed in; None if it is not known.

    Args:
        smoothing: The Gaussians around the rows.
        strength: From t, (B,), to the share, whatever the boundary; None: 1 from it on, 0 before.

    Attributes:
        drawn: What was drawn last, None before.
    """

    def __init__(self, smoothing: Smoothing, strength: Strength | None) -> None:
        self.smoothing, self.strength = smoothing, strength
        self.drawn: Drawn | None = None
        self._oracle: SmoothedOracle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "drawn": None}  # of a run

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
        """Samples around the rows."""
        source = self.smoothing.source_of(x1, source)
        generator = torch.Generator(x1.device).manual_seed(seed)
        share = strength_at(x1, t, self._edge(collapsed), self.strength)
        assert share is not None
        smoothed = self.smoothing.around(x1, source, share, generator)
        self.drawn = Drawn(smoothed, x1, source, told, share.detach())
        return smoothed

    def source_of(self, x1: Tensor, t: Times, source: Tensor | None, *, first: bool) -> Tensor:
        """The rows of samples that were drawn; in the first call, at the same times."""
        if self.drawn is None or self.drawn.x1 is not x1:
            raise ValueError(
                f"Expected `x1` as the scheme has drawn it, {self.smoothing!r}, and `xt` made of "
                "it. Before x_t is made: x1 = scheme.smooth(x1, t=t)."
            )
        if first:
            same = ((as_times(t, x1) - self.drawn.t).abs() < 0.01).all()
            message = "Expected the times `t` that the samples were smoothed at"
            if same.device.type != "cpu" or type(same) is not Tensor:
                torch._assert_async(same, message)
            elif not same:
                raise ValueError(
                    f"{message}, got others. Draw t once: t = scheme.timesteps.sample(len(x1)); "
                    "x1 = scheme.smooth(x1, t=t); u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)."
                )
        return self.drawn.source if source is None else source

    def meets(self, target: Target | None) -> bool:
        """Whether samples that are smoothed may be given a target of the oracle."""
        # The midpoint, where "boundary" ends, lies before the collapsed boundary.
        apart = target is not None and isinstance(target.lam, Hard) and self.strength is None
        return target is not None and not apart

    def oracle(self, oracle: Oracle, path: Path, collapsed: float | None) -> SmoothedOracle:
        """The oracle of the smoothed rows; refuses one with a kernel on the condition."""
        if oracle.condition is not None:
            raise ValueError(
                f"Expected targets that end before {self.smoothing!r} begins, as it does not know "
                f'{oracle.condition!r}: Scheme(oracle, target=Mix("boundary"), smoothing=...).'
            )
        boundary = self._edge(collapsed)
        if self._oracle is None or self._oracle.boundary != boundary:
            self._oracle = SmoothedOracle(
                oracle.bank, path, self.smoothing, boundary=boundary, strength=self.strength
            )
        return self._oracle
