r"""The flow-matching objective, which keeps its per-sample losses.

    L = E_{t ~ q, x_0, x_1} [ w(t) ||model(x_t, t) - y||^2 / D ],   x_t = a_t x_1 + s_t x_0,

with `y` the conditional target of the prediction type (velocity: Lipman et al., arXiv 2210.02747;
data, noise, score, EDM: see `Prediction`). A `Scheme` gives q and w and changes y; the loss against
the conditional target is kept all the same, because only that can be compared between runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from stagewise.conventions import STAGEWISE, ConventionLike, as_convention, path_of, written
from stagewise.masks import masked, mean_square
from stagewise.paths import LinearPath, Path, Prediction, PredictionKind, same_path, unlike
from stagewise.queries import Labels, Times, as_times, check_times, require_like
from stagewise.schemes import Phases, Scheme, parts
from stagewise.schemes.conditions import check_conditions
from stagewise.side_stream import beside
from stagewise.timesteps import TimestepSampler, Uniform
from stagewise.weights import weights_at

__all__ = ["FlowMatchingLoss", "LossRecord"]


@dataclass(frozen=True)
class LossRecord:
    """Times and losses of one call of an objective, detached, on the device of the batch.

    Attributes:
        t: Times, (B,); t = 0 is noise.
        loss: Mean squared error of each sample, over its numbers that count, against the
            *conditional* target, before the weight, (B,).
        weight: Weight of each sample, (B,).
        trained: As `loss`, against the target that is trained on, (B,); without a scheme `loss`.
    """

    t: Tensor
    loss: Tensor
    weight: Tensor
    trained: Tensor


class FlowMatchingLoss(nn.Module):
    """The flow-matching loss for any model called as `model(xt, t, *args, **kwargs)`.

    It has no parameters and no buffers, and logs nothing. `last` holds the `LossRecord` of the last
    call, which callbacks read; `observers`, which copies and pickles do not hold, are called with
    x_1, x_0, t, x_t and the model's other arguments.

    Args:
        path: Default that of the convention, or else `LinearPath()`.
        prediction: What the model predicts, default that of the convention, the velocity.
        timesteps: How t is drawn, default `Uniform()`.
        weight: From t, (B,), to weights, (B,); default all ones.
        convention: How the model counts time, scales `x_t` and signs its velocity, default the
            library's own (t = 0 noise); see `stagewise.conventions`.
        scheme: A `Scheme` or `Phases` that gives times, targets and weights, in place of
            `timesteps` and `weight`; default None. It is not used in eval mode, because held-out
            samples are not in the bank.
        cosine: Whether to add LightningDiT's term, `1 - cos(model, y)` over the channels (arXiv
            2501.01423, Section 4), with the sample's weight; default False. It always takes the
            conditional target: as it is not linear in the target, a mean of targets would move its
            optimum. `last` holds the squared errors only.

    Raises:
        ValueError: If a scheme is given with timesteps or a weight, or has another path.
        TypeError: If the scheme is none.

    Example:
        >>> import torch
        >>> from stagewise.losses import FlowMatchingLoss
        >>> loss_fn = FlowMatchingLoss()
        >>> loss = loss_fn(lambda xt, t: torch.zeros_like(xt), torch.randn(16, 3, 8, 8))
        >>> loss.shape, loss_fn.last.loss.shape
        (torch.Size([]), torch.Size([16]))
    """

    observers: tuple[Callable[..., None], ...] = ()  # pickles of earlier versions have none

    def __init__(
        self,
        path: Path | None = None,
        prediction: Prediction | PredictionKind | None = None,
        timesteps: TimestepSampler | None = None,
        weight: Callable[[Tensor], Tensor] | None = None,
        convention: ConventionLike = STAGEWISE,
        scheme: Scheme | Phases | None = None,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if scheme is not None and not isinstance(scheme, Scheme | Phases):
            raise TypeError(
                f"Expected `scheme` to be a Scheme or Phases, got {scheme!r}: "
                'FlowMatchingLoss(scheme=Scheme(oracle, target=Mix("boundary"))).'
            )
        if scheme is not None and (timesteps is not None or weight is not None):
            raise ValueError(
                "Expected either a scheme, or timesteps and weight, got both. Give them to the "
                "scheme: Scheme(timesteps=..., weight=...)."
            )
        if scheme is not None and path is not None and not same_path(path, scheme.path):
            raise ValueError(f"Expected the scheme's path, {unlike(scheme.path, path)}.")
        if scheme is not None and scheme.convention != STAGEWISE:
            raise ValueError(
                "Expected a scheme without a convention, because the objective has it, got "
                f"{written(scheme.convention)}. Write "
                "FlowMatchingLoss(convention=..., scheme=Scheme(...))."
            )
        self.convention = as_convention(convention)
        path = path if scheme is None else scheme.path
        self.path = path_of(self.convention, path) or LinearPath()
        self.prediction = Prediction.of(prediction or self.convention.prediction)
        self.timesteps = timesteps or Uniform()
        self.weight = weight
        self.scheme, self.cosine = scheme, cosine
        self.last: LossRecord | None = None
        self.observers = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "observers": ()}

    def forward(
        self,
        model: Callable[..., Tensor],
        x1: Tensor,
        *args: Any,
        x0: Tensor | None = None,
        t: Times | None = None,
        generator: torch.Generator | None = None,
        part: tuple[int, int] = (0, 1),
        classes: Labels | None = None,
        loss_mask: Tensor | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean weighted loss of a batch.

        Args:
            model: Called as `model(xt, t, *args, **kwargs)`; returns (B, *).
            x1: Data, (B, *), floating point.
            *args: Passed on to the model, for example labels.
            x0: Noise, (B, *); default drawn.
            t: Times in [0, 1], (B,), t = 0 is noise; default drawn by the sampler, in float32, and
                rounded to the steps of DDPM. The model is given drawn times in the default dtype.
            generator: For the draws, on the device of `x1`; default torch's global one.
            part: (r, R): noise and times are drawn for R B samples, and every R-th, from r on, is
                used. With generators in the same state, R ranks draw what one rank would draw for
                the whole batch. Default (0, 1).
            classes: Class of each sample for a class-wise scheme, (B,); not passed to the model.
                Default: looked up in the bank.
            loss_mask: Which numbers count in the loss, (B, *), as in `LatentBank`; the bank of a
                scheme needs masks then. Not passed to the model. Default: all.
            source: The row of each sample in the scheme's bank, (B,); not passed to the model.
                Default: looked up; see `Scheme`.
            condition: For a scheme with a kernel on conditions: those of each sample, (B, *),
                before any are dropped; not passed to the model.
            **kwargs: Passed on to the model.

        Returns:
            A scalar in float32, with gradient.

        Raises:
            ValueError: If the shapes of `t`, `x0`, the weight or the model's output do not fit, or
                the model is given conditions that the scheme's target ignores; and as a call of the
                scheme, of which the first also checks as `Scheme.check` does.
        """
        if self.cosine and loss_mask is not None:
            raise ValueError(
                "Expected no `loss_mask` beside the cosine, which is over all positions: "
                "FlowMatchingLoss(cosine=False)."
            )
        scheme = self.scheme if self.training else None
        if scheme is not None and scheme.last is None:  # its first call
            for each in parts(scheme):
                known = each.with_masks(classes, loss_mask, x1)
                check_conditions(each, (*args, kwargs), (), len(x1), known)
        (first, step), count = part, part[1] * len(x1)
        if x0 is None:
            x0 = torch.randn(
                (count, *x1.shape[1:]), dtype=x1.dtype, device=x1.device, generator=generator
            )[first::step]
        if t is None:
            timesteps = self.timesteps
            if scheme is not None and scheme.draws_timesteps:
                timesteps = scheme.timesteps
            t = timesteps.sample(count, device=x1.device, generator=generator)[first::step]
            t = self.convention.rounded(t)
            told_in = torch.get_default_dtype()
        else:
            t = as_times(t, x1)
            told_in = t.dtype
            t = t.to(torch.promote_types(t.dtype, torch.float32))
        check_times(t, len(x1))
        if scheme is not None:
            x1 = scheme.smooth(x1, t=t, source=source)
        require_like("x0", x0, "x1", x1)
        path = self.path(t)
        xt = self.path.interpolate(x0, x1, t).to(x1.dtype)
        for observer in self.observers:
            observer(x1, x0, t, xt, {"args": args, **kwargs})
        y = self.prediction.target(path, x0.float(), x1.float())
        wait, of = None, masked(classes, loss_mask, x1)
        if scheme is not None:  # on a side stream, while the model runs
            told: dict[str, Any] = {"xt": xt, "t": t, "x1": x1, "labels": of, "source": source}
            told["condition"] = condition
            wait = beside(partial(scheme, y, **told, prediction=self.prediction), y, told)
        x, time = self.convention.outside(xt, t)
        output = model(x.to(xt), time.to(told_in), *args, **kwargs)
        if output.shape != x1.shape:
            raise ValueError(
                f"Expected the model to return the shape of `x1`, {tuple(x1.shape)}, got "
                f"{tuple(output.shape)}."
            )
        output = self.convention.sign_of(self.prediction) * output.float()
        weight = weights_at(self.weight, t)
        if wait is None:
            loss = trained = mean_square(output - y, of)
        else:
            target, own = wait()
            loss = mean_square(output.detach() - y, of)
            trained = mean_square(output - target, of)
            weight = weight * own
        self.last = LossRecord(t.detach(), loss.detach(), weight.detach(), trained.detach())
        if self.cosine:
            trained = trained + (1 - cosine_similarity(output, y, dim=1)).flatten(1).mean(1)
        return (weight * trained).mean()
