r"""A term that pulls a model towards the oracle, added to any loss.

    L + E [ lambda(t) ||f(x_t, t) - y*||^2 / D ],   y* = y + c_t (m - x_1),

with f the model's output and y the conditional target of the same prediction type. For a velocity
`y* = u*`. With the same lambda at all t it only changes the variance of the conditional loss's
gradient; with lambda at some t, it also weighs these more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stagewise.masks import masked, mean_square
from stagewise.oracle import Oracle
from stagewise.paths import Prediction, PredictionKind
from stagewise.queries import Labels, require_like
from stagewise.schemes import Scheme
from stagewise.targets import Mix, Target

__all__ = ["OracleRegularizer"]


class OracleRegularizer(nn.Module):
    """The term `lambda(t) ||f - y*||^2`, with y* the oracle's target, to add to any loss.

    It is averaged over the batch and the numbers of a sample that count. It has no parameters and
    no buffers.

    Args:
        oracle: Bank and path.
        lam: A number of at least 0, or from t, (B,), to such numbers, (B,): `StageGate(scheme)`,
            for example. Default 1.
        prediction: What the model predicts, default "velocity".
        target: Which rows the oracle is over, default `Mix()`: all.

    Raises:
        ValueError: If `lam` is negative, or the target does not go with the oracle.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> from stagewise.losses import OracleRegularizer
        >>> x1, x0, t = torch.randn(8, 4), torch.randn(8, 4), torch.rand(8)
        >>> oracle = Oracle(LatentBank(x1))
        >>> xt = oracle.path.interpolate(x0, x1, t)
        >>> regularizer = OracleRegularizer(oracle, lam=0.5)
        >>> bool(regularizer(oracle.velocity(xt, t), x1 - x0, xt=xt, t=t, x1=x1) < 1e-6)
        True
    """

    def __init__(
        self,
        oracle: Oracle,
        lam: float | Callable[[Tensor], Tensor] = 1.0,
        prediction: Prediction | PredictionKind = "velocity",
        target: Target | None = None,
    ) -> None:
        super().__init__()
        if not callable(lam) and not lam >= 0:
            raise ValueError(f"Expected `lam` of at least 0, got {lam}.")
        self.lam, self.prediction = lam, Prediction.of(prediction)
        self.scheme = Scheme(oracle, target=target or Mix(), weight=self._factor)
        if not self.scheme.needs_boundary:
            self.scheme.check()

    def forward(
        self,
        output: Tensor,
        y: Tensor,
        *,
        xt: Tensor,
        t: Tensor,
        x1: Tensor,
        labels: Labels | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """The term, a scalar in float32, with gradient.

        Args:
            output: The model's, (B, *).
            y: See `Scheme.__call__`, like all others.
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,).
            x1: What `xt` was made from, (B, *).
            labels: Classes, (B,).
            mask: Which numbers count, (B, *).
            source: Rows of the bank, (B,).

        Raises:
            ValueError: If shapes do not fit; and as `Scheme.__call__`.
        """
        require_like("output", output, "y", y)
        of = masked(labels, mask, x1)
        best, weight = self.scheme(
            y.float(), xt=xt, t=t, x1=x1, labels=of, source=source, prediction=self.prediction
        )
        return (weight * mean_square(output.float() - best, of)).mean()

    def _factor(self, t: Tensor) -> Tensor:
        return self.lam(t) if callable(self.lam) else torch.full_like(t, self.lam)
