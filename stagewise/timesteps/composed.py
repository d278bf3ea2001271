"""Samplers made of others: shifted, with a uniform share, and by stage."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.timesteps.base import TimestepSampler, Uniform, above_zero
from stagewise.timesteps.families import bisect

__all__ = ["Shifted", "StageAware", "WithFloor", "shift_times"]


class _Around(TimestepSampler):
    """A sampler around another one."""

    def __init__(self, sampler: TimestepSampler, stratified: bool) -> None:
        super().__init__(stratified)
        self.sampler = sampler

    @property
    def needs_boundary(self) -> bool:
        return self.sampler.needs_boundary

    def bind(self, boundary: float) -> TimestepSampler:
        inner = self.sampler.bind(boundary)
        if inner is self.sampler:
            return self
        bound = copy.copy(self)
        bound.sampler = inner
        return bound

    def update(self, t: Tensor, loss: Tensor) -> None:
        self.sampler.update(t, loss)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)


class Shifted(_Around):
    """Moves the draws of another sampler towards noise or data: `t -> s t / (1 + (s - 1) t)`.

    s < 1 gives more draws to navigation (0.5 was best on ImageNet 256; second-hand, arXiv
    2512.02826). Papers that count from data to noise use `1 / s`: SD3's 3 and RAE's
    `sqrt(D / 4096)` (arXiv 2510.11690) are `Shifted(..., 1 / 3)` and `sqrt(4096 / D)` here.

    Args:
        sampler: The other sampler.
        shift: s, above 0.

    Example:
        >>> from stagewise import Shifted, Uniform
        >>> t = Shifted(Uniform(), 0.5).sample(10_000)
        >>> 0.31 < t.mean() < 0.45  # more near noise
        tensor(True)
    """

    def __init__(self, sampler: TimestepSampler, shift: float, stratified: bool = False) -> None:
        super().__init__(sampler, stratified)
        above_zero(shift=shift)
        self.shift = shift

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return shift_times(self.sampler.quantile(u), self.shift)

    @override
    def place(self, u: Tensor) -> Tensor:
        return shift_times(self.sampler.place(u), self.shift)

    @override
    def density(self, t: Tensor) -> Tensor:
        before = shift_times(t, 1 / self.shift).clamp(0, 1)
        slope = self.shift / (self.shift - (self.shift - 1) * t) ** 2
        return self.sampler.density(before) * slope * Uniform().density(t)

    @override
    def update(self, t: Tensor, loss: Tensor) -> None:
        self.sampler.update(shift_times(t, 1 / self.shift), loss)


class WithFloor(_Around):
    """Draws a share of the times uniformly and the others by another sampler.

    Every t has draws, and with `preserve_objective` no weight is above `1 / share`.

    Args:
        sampler: The other sampler.
        share: Of uniform draws, above 0, at most 1.
    """

    def __init__(self, sampler: TimestepSampler, share: float, stratified: bool = False) -> None:
        super().__init__(sampler, stratified)
        if not 0 < share <= 1:
            raise ValueError(f"Expected `share` above 0 and at most 1, got {share}.")
        self.share = share

    @override
    def quantile(self, u: Tensor) -> Tensor:
        rest, goal = 1 - self.share, u.double()
        v = bisect(lambda v: self.share * self.sampler.quantile(v) + rest * v, goal)
        # Not quantile(v): in a gap of the other sampler v is constant and t is not.
        return ((goal - rest * v) / self.share).clamp(0, 1).to(u)

    @override
    def place(self, u: Tensor) -> Tensor:
        # u below `share` are the uniform draws.
        other = ((u - self.share) / max(1 - self.share, 1e-30)).clamp(0, 1 - 2**-24)
        return torch.where(u < self.share, u / self.share, self.sampler.place(other))

    @override
    def density(self, t: Tensor) -> Tensor:
        rest = (1 - self.share) * self.sampler.density(t)
        return self.share * Uniform().density(t) + rest


class StageAware(TimestepSampler):
    """Draws a share of the times in navigation, the others in refinement; uniform in each.

    Args:
        navigation: The share, in [0, 1].
        boundary: Where the stages meet, between 0 and 1; default that of the scheme.

    Example:
        >>> from stagewise import StageAware
        >>> t = StageAware(0.3, boundary=0.1).sample(10_000)
        >>> 0.28 < (t < 0.1).float().mean() < 0.32
        tensor(True)
    """

    def __init__(
        self, navigation: float, boundary: float | None = None, stratified: bool = False
    ) -> None:
        super().__init__(stratified)
        if not 0 <= navigation <= 1:
            raise ValueError(f"Expected `navigation` in [0, 1], got {navigation}.")
        if boundary is not None and not 0 < boundary < 1:
            raise ValueError(
                f"Expected `boundary` above 0 and below 1, got {boundary}: one of the stages would "
                "be empty. Use Uniform()."
            )
        self.navigation, self.boundary = navigation, boundary

    @property
    @override
    def needs_boundary(self) -> bool:
        return self.boundary is None

    @override
    def bind(self, boundary: float) -> TimestepSampler:
        if self.boundary is not None:
            return self
        return StageAware(self.navigation, boundary, self.stratified)

    @override
    def quantile(self, u: Tensor) -> Tensor:
        edge, share = self._edge(), self.navigation
        early = u * (edge / share) if share > 0 else u
        late = edge + (u - share) * ((1 - edge) / (1 - share)) if share < 1 else u
        return torch.where(u < share, early, late)

    @override
    def density(self, t: Tensor) -> Tensor:
        edge, share = self._edge(), self.navigation
        early = torch.full_like(t, share / edge)
        late = torch.full_like(t, (1 - share) / (1 - edge))
        return torch.where(t < edge, early, late) * Uniform().density(t)

    def _edge(self) -> float:
        if self.boundary is None:
            raise ValueError(
                f"Expected the boundary of the stages for {self!r}, which has not been measured "
                "yet. Give it as a number, StageAware(share, boundary=0.1), or use a Scheme, which "
                "passes it on."
            )
        return self.boundary


def shift_times(t: Tensor, shift: float) -> Tensor:
    """`s t / (1 + (s - 1) t)`; its inverse is that of `1 / s`."""
    return shift * t / (1 + (shift - 1) * t)
