r"""Times drawn where the loss is large.

The importance weights `1 / q` have the least variance if `q(t)` goes as the root of the loss's
second moment at t (Nichol & Dhariwal, arXiv 2102.09672, Sec. 3.3). It is estimated in bins,

    q_b = (1 - e) sqrt(mean L_b^2) / sum_c sqrt(mean L_c^2) + e / bins,

from the last losses in each; draws are uniform until every bin has enough of them.

A model can still learn at t what its loss J(t) has above the floor J*(t) (`stages.loss_floor`).
Draws by that (Xu et al., arXiv 2506.13763) are

    q_b = (1 - e) w_b max(J_b - J*_b, 0) / sum_c w_c max(J_c - J*_c, 0) + e / bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.stages import StageCurve, loss_floor, require_curve
from stagewise.timesteps.base import TimestepSampler, Uniform

__all__ = ["LossAboveFloor", "LossSecondMoment"]


class LossSecondMoment(TimestepSampler):
    """Draws a time more often where the loss is large, by its second moment.

    Args:
        bins: Equal bins of t, default 64. (The paper has a thousand discrete times.)
        history: Losses kept for each, default 10, that of the paper.
        floor: The uniform share: that of uniform draws, default 0.001, as in the paper.
    """

    def __init__(
        self, bins: int = 64, history: int = 10, floor: float = 1e-3, stratified: bool = False
    ) -> None:
        super().__init__(stratified)
        for name, value in (("bins", bins), ("history", history)):
            if value < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
        if not 0 < floor <= 1:
            raise ValueError(f"Expected `floor` above 0 and at most 1, got {floor}.")
        self.bins, self.history, self.floor = bins, history, floor
        self._squares = torch.zeros(bins, history, dtype=torch.float64)
        self._count = torch.zeros(bins, dtype=torch.int64)

    def shares(self) -> Tensor:
        """The probability of each bin, (bins,), float64, on the device of the losses."""
        score = self._scores()
        ready = (self._count >= self.history).all() & (score.sum() > 0)
        share = torch.where(ready, score / score.sum().clamp_min(1e-300), 1 / self.bins)
        return (1 - self.floor) * share + self.floor / self.bins

    def _scores(self) -> Tensor:
        """The unnormalised shares, (bins,)."""
        return self._squares.mean(1).sqrt()

    @override
    def quantile(self, u: Tensor) -> Tensor:
        share = self.shares().to(u.device)
        ends = share.cumsum(0)
        goal = u.double()
        index = torch.searchsorted(ends, goal.contiguous(), right=True).clamp_max(self.bins - 1)
        within = (goal - (ends - share)[index]) / share[index]
        return ((index + within.clamp(0, 1)) / self.bins).to(u)

    @override
    def density(self, t: Tensor) -> Tensor:
        value = self.shares().to(t.device)[self._bin(t)] * self.bins
        return value.to(t) * Uniform().density(t)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Takes losses before any weight, (B,), at times (B,); only finite ones. No device sync."""
        self._squares, self._count = self._squares.to(loss.device), self._count.to(loss.device)
        square, index = loss.detach().double().square(), self._bin(t.detach().to(loss.device))
        member = torch.nn.functional.one_hot(index, self.bins) * square.isfinite()[:, None]
        rank = member.cumsum(0)
        new = rank[-1] if len(rank) else torch.zeros_like(self._count)
        rank = (rank * member).sum(1)
        # Only the last `history` losses of a bin are kept; others go to an extra place.
        kept = (rank > 0) & (rank > new[index] - self.history)
        place = index * self.history + (self._count[index] + rank - 1) % self.history
        place = torch.where(kept, place, self.bins * self.history)
        flat = torch.cat([self._squares.flatten(), self._squares.new_zeros(1)])
        flat = flat.scatter(0, place, square)
        self._squares = flat[:-1].reshape(self.bins, self.history)
        self._count = self._count + new

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"squares": self._squares.cpu().clone(), "count": self._count.cpu().clone()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["squares"].shape != self._squares.shape:
            raise ValueError(
                f"Expected the state of {tuple(self._squares.shape)} bins and losses, got "
                f"{tuple(state['squares'].shape)}. Resume with the sampler the run began with."
            )
        self._squares, self._count = state["squares"].clone(), state["count"].clone()

    def _bin(self, t: Tensor) -> Tensor:
        return (t.double() * self.bins).long().clamp(0, self.bins - 1)


class LossAboveFloor(LossSecondMoment):
    """Draws a time more often where a model can still learn, by its loss above the floor.

    Not a default: the paper reports FID 2.29 -> 2.08 on ImageNet 256 (second-hand), but on
    photograph patches of 8 x 8 (1000 steps) it moved draws to the data end and was worse, a
    held-out loss of 0.299 against 0.293 with uniform times.

    For velocities only: losses are means over their D numbers, as those of `FlowMatchingLoss`.

    Args:
        curve: The measured floor, `StageCurve.measure(oracle)`.
        weight: w, from t, (B,), to weights, (B,): the scheme's, `InverseFloor(curve)` in the paper.
            Default all ones.
        bins: Equal bins of t, default 32.
        history: Losses kept for each, default 100: a difference needs more than a moment.
        floor: The uniform share: that of uniform draws, default 0.1.

    Raises:
        TypeError: If `curve` is not a `StageCurve`.
    """

    of_velocity = True

    def __init__(
        self,
        curve: StageCurve,
        weight: Callable[[Tensor], Tensor] | None = None,
        bins: int = 32,
        history: int = 100,
        floor: float = 0.1,
        stratified: bool = False,
    ) -> None:
        super().__init__(bins, history, floor, stratified)
        require_curve(curve)
        centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        self._weight = torch.ones_like(centres) if weight is None else weight(centres)
        self._least = loss_floor(curve, centres)

    def _scores(self) -> Tensor:
        # Squares of losses are kept, and losses are positive.
        loss = self._squares.sqrt().mean(1)
        weight, least = self._weight.to(loss), self._least.to(loss)
        return weight * (loss - least).clamp_min(0)
