"""Mean and standard deviation of latents by channel, in one pass and without loss of digits.

Batches are merged by Welford's recurrence in the form of Chan, Golub and LeVeque (1979), in
float64: of two sets with counts n, m, means a, b and sums of squared deviations A, B,

    mean = a + (b - a) m / (n + m),    S = A + B + (b - a)^2 n m / (n + m).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ChannelStatistics"]


class ChannelStatistics:
    """Moments of samples (B, C, *), by channel; of (B, C), by column.

    Attributes:
        count: Numbers seen in each channel.
        mean: (C,), float64.
        squares: Sum of squared deviations from `mean`, (C,), float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean, self.squares = torch.zeros(0), torch.zeros(0)

    def update(self, z: Tensor) -> None:
        """Adds samples, (B, C, *)."""
        columns = z.double().movedim(1, 0).flatten(1)
        count, mean = columns.shape[1], columns.mean(1)
        squares = (columns - mean[:, None]).square_().sum(1)
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, gap = self.count + count, mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.count = total

    def std(self, correction: int = 1) -> Tensor:
        """Standard deviation, (C,), float64; by default with n - 1, as `torch.std` has it."""
        return (self.squares / max(1, self.count - correction)).sqrt()

    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all numbers together, around their one mean."""
        mean = self.mean.mean()
        variance = self.squares.mean() / max(1, self.count) + (self.mean - mean).square().mean()
        return float(mean), float(variance.sqrt())
