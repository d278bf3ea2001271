"""Your own loss, weighted by stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.masks import masked, mean_of
from stagewise.schemes import Phases, Scheme
from stagewise.weights import weights_at

__all__ = ["StageWeightedLoss", "weighs"]


class StageWeightedLoss(nn.Module):
    """Weighs an unreduced loss by `w(t)`, and takes its mean over the batch.

    Args:
        loss: Called with the same arguments, without `t` and `loss_mask`; returns (B, *), which is
            averaged over all axes but the first: `nn.MSELoss(reduction="none")`, for example.
        weight: From t, (B,), to weights, (B,): `StageFactors(2, 1, boundary=0.1)`, `MinSNR()`; or a
            `Scheme` or `Phases`, of which the weight, with its importance weights, is taken.

    Raises:
        ValueError: If `loss` reduces over the batch, as its `reduction` says.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stagewise import StageFactors
        >>> from stagewise.losses import StageWeightedLoss
        >>> weight = StageFactors(navigation=2, refinement=1, boundary=0.5)
        >>> loss_fn = StageWeightedLoss(nn.MSELoss(reduction="none"), weight)
        >>> loss_fn(torch.zeros(2, 3), torch.ones(2, 3), t=torch.tensor([0.1, 0.9]))
        tensor(1.5000)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        weight: Callable[[Tensor], Tensor] | Scheme | Phases,
    ) -> None:
        super().__init__()
        reduction = getattr(loss, "reduction", "none")
        if reduction != "none":
            raise ValueError(
                f"Expected a loss for each sample, got one with reduction={reduction!r}. "
                f'Make it {type(loss).__name__}(reduction="none").'
            )
        self.loss = loss
        self.weight = weight.weight_of if isinstance(weight, Scheme | Phases) else weight

    def forward(
        self, *args: Any, t: Tensor, loss_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The weighted mean.

        Args:
            *args: For the loss, samples first. NaN and Inf outside of the mask become 0.
            t: Times in [0, 1], (B,); t = 0 is noise.
            loss_mask: Which numbers of the loss count, (B, *), as in `LatentBank`; default all.
            **kwargs: For the loss.

        Returns:
            A scalar, with gradient.

        Raises:
            ValueError: If the loss or the weight does not have the batch size of t.
        """
        if loss_mask is not None:  # a NaN outside of it would spread to every gradient
            args = tuple(_finite(x, loss_mask, getattr(args[0], "shape", None)) for x in args)
        loss = self.loss(*args, **kwargs)
        if loss.shape[:1] != t.shape:
            raise ValueError(
                f"Expected a loss with shape {(len(t), '*')}, one for each t, got "
                f"{tuple(loss.shape)}. Give it without reduction."
            )
        weight, of = weights_at(self.weight, t), masked(None, loss_mask, loss)
        return (weight * mean_of(loss.reshape(len(t), -1) if of is None else loss, of)).mean()


def _finite(value: Any, mask: Tensor, shape: torch.Size | None) -> Any:
    """Samples of a shape with zeros for NaN and Inf outside of their mask; others as they are."""
    if not isinstance(value, Tensor) or value.shape != shape:
        return value
    return value.where(masked(None, mask, value).entries | value.isfinite(), 0)


def weighs(module: nn.Module, scheme: Scheme | Phases) -> bool:
    """Whether a `StageWeightedLoss` in a module takes its weights from a scheme."""
    losses = [part for part in module.modules() if isinstance(part, StageWeightedLoss)]
    return any(getattr(loss.weight, "__self__", None) is scheme for loss in losses)
