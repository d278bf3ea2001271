"""`StageTarget`: one line that makes a hand-written training step steerable.

    u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1, labels=y)
    loss = (w * (self.net(xt, t, y) - u).square().flatten(1).mean(1)).mean()

With nothing attached, `u` is the given target and `w` is 1. A `StageScheme` returns its targets and
weights here, and monitors read the samples of the training from the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.conventions import STAGEWISE, ConventionLike, as_convention, path_of
from stagewise.masks import masked
from stagewise.paths import LinearPath, Path, Prediction, PredictionKind
from stagewise.queries import Labels, Times, as_times, check_times, require_like, require_tensors
from stagewise.schemes import Phases, Scheme, parts
from stagewise.schemes.first_call import check_samples
from stagewise.tracing import untraced

__all__ = ["BY_HAND", "Observer", "StageTarget"]

BY_HAND = (
    "if the training step writes its target u out, make it steerable: "
    "self.target = stagewise.StageTarget() in __init__, and once u, xt and t are made "
    "u, w = self.target(u, xt=xt, t=t, x1=x1) in the step, where w weighs the loss of each sample."
)
"""The cure in messages about a target that no object makes."""

Observer = Callable[[Tensor, Tensor, Tensor, Tensor, "Labels | None", "Tensor | None"], None]
"""Receives the target, `x_t`, t (of the library, t = 0 is noise), x_1, labels, which may be
`MaskedLabels`, and the condition of a call."""

_SAID = (
    "StageTarget(prediction={})",
    "StageTarget(convention={})",
    "Give it the plain target, and add terms of your own to what it returns.",
)


class StageTarget(nn.Module):
    """Makes a hand-written training step steerable and visible to monitors.

    Keep it as an attribute of the trained module, `self.target = StageTarget()`, and call it with
    the target before the network. It has no parameters, buffers or state. In eval mode it returns
    its input. Several calls in one step are parts of the batch. `torch.compile` runs it outside of
    the graph.

    Args:
        path: The path of the step, default that of the convention, or else `LinearPath()`:
            x_t = t x_1 + (1 - t) x_0.
        prediction: The kind of target, default that of the convention, the velocity.
        convention: How the step counts time, scales `x_t` and signs a velocity: a name such as
            "pi0", a noise scheduler of diffusers or a `Convention`; see `stagewise.conventions`.
            Default the library's (t = 0 is noise, data - noise).

    Attributes:
        scheme: The scheme that steers, or None. Not copied or pickled.
        observers: Called with each batch. Not copied or pickled.

    Example:
        >>> import torch
        >>> from stagewise import StageTarget
        >>> target = StageTarget()
        >>> x0, x1, t = torch.randn(8, 16), torch.randn(8, 16), torch.rand(8, 1)
        >>> u, w = target(x1 - x0, xt=t * x1 + (1 - t) * x0, t=t, x1=x1)
        >>> torch.equal(u, x1 - x0), w.shape
        (True, torch.Size([8]))
    """

    def __init__(
        self,
        path: Path | None = None,
        prediction: Prediction | PredictionKind | None = None,
        convention: ConventionLike = STAGEWISE,
    ) -> None:
        super().__init__()
        self.convention = as_convention(convention)
        self.path = path_of(self.convention, path) or LinearPath()
        self.prediction = Prediction.of(prediction or self.convention.prediction)
        self.scheme: Scheme | Phases | None = None
        self.observers: tuple[Observer, ...] = ()
        self.begin()

    def begin(self) -> None:
        """Forgets earlier calls."""
        self._fits = self._timed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "scheme": None, "observers": ()}

    @untraced
    def forward(
        self,
        y: Tensor,
        *,
        xt: Tensor,
        t: Times,
        x1: Tensor,
        labels: Labels | None = None,
        mask: Tensor | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The target to train on, and the weight of each sample's loss.

        Args:
            y: The conditional target, (B, *).
            xt: Noisy samples, (B, *).
            t: Their times in the step's convention, (B,) or (B, 1, ..., 1), or one number.
            x1: What `xt` was made from, (B, *).
            labels: Class of each sample, (B,); default those of the batch.
            mask: Which numbers count, (B, *); default that of the batch. Others do not change.
            source: Row of the bank that each sample stands for, (B,); see `Scheme`.
            condition: What the network is given, (B, *), for a `ConditionedOracle`; default that of
                the batch.

        Returns:
            The target, (B, *), and the weights, (B,), 1 without a weight in the scheme.

        Raises:
            ValueError: On shapes that do not fit; in the first call that is observed or steered, on
                arguments that do not fit each other, with the cure; and as the scheme.
            TypeError: If they are not tensors.
        """
        require_tensors(y=y, xt=xt, x1=x1)
        time, labels = as_times(t, x1), masked(labels, mask, x1)
        require_like("y", y, "x1", x1)
        require_like("xt", xt, "x1", x1)
        if time.shape != x1.shape[:1]:
            raise ValueError(
                f"Expected `t` with one number for each sample, {tuple(x1.shape[:1])}, got "
                f"{tuple(time.shape)}."
            )
        scheme = self.scheme
        if not self.training or (not self.observers if scheme is None else scheme.paused):
            dtype = time.dtype if time.is_floating_point() else torch.float32
            return y, torch.ones_like(time, dtype=dtype)
        # Checks must save nothing for the backward pass: checkpointing would miss it.
        with torch.no_grad():
            if not self._fits:
                self._fits = check_samples(
                    *(self.path, self.prediction, self.convention, y, xt, time, x1, labels),
                    mixes=False,
                    said=_SAID,
                )
            xt, t = self.convention.inside(xt, time)
        # Not under no_grad: an observer may ask whether gradients are on, and detaches x1.
        for observer in self.observers:
            observer(y.detach(), xt.detach(), t, x1, labels, condition)
        if self.scheme is None:
            return y, torch.ones_like(t)
        if not self._timed and any(part.draws_timesteps for part in parts(self.scheme)):
            raise ValueError(
                "The scheme draws t, and the training step does not use its draws. Take them "
                "right after you draw t yourself: t = self.target.times(t)."
            )
        smoothed = self.scheme.drawn
        if self.scheme.smoothing is not None and (smoothed is None or smoothed.x1 is not x1):
            raise ValueError(
                "The scheme smooths samples, and `x1` is not what it has drawn. Before you make "
                "x_t: x1 = self.target.smooth(x1, t=t)."
            )
        if t.device.type == "cpu":  # for a message in the step's times; elsewhere the scheme checks
            check_times(t, len(t), self.convention)
        sign = self.convention.sign_of(self.prediction)
        known = {"source": source, "condition": condition}
        target, weight = self.scheme(
            sign * y, xt=xt, t=t, x1=x1, labels=labels, prediction=self.prediction, **known
        )
        return sign * target, weight

    @untraced
    def times(self, t: Tensor) -> Tensor:
        """The times to train at: the scheme's draws, or `t`, (B,) or (B, 1, ..., 1), without one.

        Call it right after you draw `t`: `t = self.target.times(t)`.
        """
        self._timed = True
        if not self.training or self.scheme is None or not self.scheme.draws_timesteps:
            return t
        drawn = self.scheme.timesteps.sample(len(t), device=t.device)
        time = self.convention.from_t(drawn)
        return (time if t.is_floating_point() else time.round()).to(t).reshape(t.shape)

    @untraced
    def smooth(self, x1: Tensor, *, t: Times, source: Tensor | None = None) -> Tensor:
        """The samples to train on, (B, *): `x1`, or as a scheme smooths it at times `t`.

        Call it before you make `xt`: `x1 = self.target.smooth(x1, t=t)`. `source` are the rows of
        the samples, as in `Smoothing.draw`.
        """
        if not self.training or self.scheme is None:
            return x1
        return self.scheme.smooth(x1, t=self.convention.to_t(as_times(t, x1)), source=source)
