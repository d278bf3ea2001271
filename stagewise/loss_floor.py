"""The floor of the loss: what of it no model can remove, by t."""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.stages import StageCurve

__all__ = ["loss_floor", "require_curve"]


def loss_floor(curve: StageCurve, t: Tensor) -> Tensor:
    """`J*(t)`, the mean square of conditional minus oracle velocity. Costs no device sync.

    Args:
        curve: `StageCurve.measure(oracle)`.
        t: Times, any shape.

    Returns:
        Means over the D numbers of a sample, of the shape and dtype of `t`: linear between the
        strata of the curve, constant before the first and after the last.
    """
    times, means = (x.to(t.device) for x in (curve.times, curve.mean("target_difference")))
    at = torch.minimum(t.double().maximum(times[0]), times[-1])
    right = torch.searchsorted(times, at.contiguous()).clamp(1, len(times) - 1)
    share = (at - times[right - 1]) / (times[right] - times[right - 1])
    return torch.lerp(means[right - 1], means[right], share).to(t.dtype)


def require_curve(curve: StageCurve) -> None:
    """Refuses what is no measured curve.

    Raises:
        TypeError: With what measures one.
    """
    if not isinstance(curve, StageCurve):
        raise TypeError(
            f"Expected `curve` to be a StageCurve, got {type(curve).__name__}: "
            "curve = StageCurve.measure(oracle)."
        )
