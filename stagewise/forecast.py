r"""What oracle targets, or smoothing, can gain in a training that runs: a forecast.

**Targets.** With the conditional target u and the oracle's u*, the gradient of a batch splits into

    g = g* + d,   g* = grad_theta mean_i w_i |v_i - u*_i|^2,   d = 2 mean_i w_i J_i^T (u*_i - u_i).

Since u* is the mean of u at every `x_t`, d has mean zero there: `Cov g = Cov g* + Cov d`. Oracle
targets remove the second part only. In the metric of the optimizer's step (for Adam
`P = 1 / sqrt(v)`, otherwise P = 1) its share is

    f = E d^T P d / (E d^T P d + tr P Cov g*),

so a batch of B with oracle targets has the noise of a batch of `B / (1 - f)` with plain ones. The
effect depends on how noisy a step is: with the noise scale `B_n = B tr(P Cov g) / (G^T P G)`, G the
mean gradient, the same progress takes `1 + B_n / B` times the steps without noise (McCandlish et
al., arXiv 1812.06162, Sec. 2.2), and with r times the batch `1 + B_n / (r B)`.

**Smoothing** replaces targets beyond the collapsed boundary, where each is a training row. It can
gain if the model memorizes there: if its error on held-out samples is above that on training
samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stagewise.masks import MaskedLabels, compared_within
from stagewise.oracle import Oracle
from stagewise.paths import expand_like
from stagewise.timesteps import TimestepSampler, Uniform
from stagewise.undisturbed import undisturbed
from stagewise.velocity_probe import noisy_targets

__all__ = ["SmoothingForecast", "TargetForecast", "forecast_smoothing", "forecast_targets"]

_WORTH = 0.75
"""Share of the steps up to which oracle targets are worth trying. In our runs (docs/results.md)
0.80 to 0.87 saved steps and lost time."""

_OPEN = 0.1
"""Smoothing may gain where held-out error is above training error by this share of the latter."""


@dataclass(frozen=True)
class TargetForecast:
    """The gain of oracle targets in a training; printed, it is a sentence.

    Attributes:
        share: f, the share of the gradient's variance that they remove, in [0, 1].
        error: Its standard error.
        noise_scale: B_n, in samples; infinite if the mean gradient is below the noise.
        batch: B, the size of the measured batches.
        used: Whether the training has oracle targets already, so that none are advised.
    """

    share: float
    error: float
    noise_scale: float
    batch: int
    used: bool = False

    @classmethod
    def mean(cls, forecasts: Sequence[TargetForecast]) -> TargetForecast:
        """The forecast of a whole training from several along it, of the same batch size.

        Noise scales are averaged as their inverse, the share of signal.
        """
        count = len(forecasts)
        signal = sum(1 / one.noise_scale for one in forecasts) / count
        return cls(
            share=sum(one.share for one in forecasts) / count,
            error=math.hypot(*(one.error for one in forecasts)) / count,
            noise_scale=1 / signal if signal else math.inf,
            batch=forecasts[-1].batch,
            used=forecasts[-1].used,
        )

    @property
    def factor(self) -> float:
        """How many times larger a plain batch must be for the same noise, at least 1."""
        return 1 / (1 - self.share) if self.share < 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The factor for a share two standard errors below and above."""
        low, high = (self.share + side * 2 * self.error for side in (-1, 1))
        return 1 / (1 - max(low, 0.0)), 1 / (1 - high) if high < 1 else math.inf

    @property
    def steps(self) -> float:
        """Share of the steps for the same progress, in (0, 1], by the model of McCandlish et al."""
        if math.isinf(self.noise_scale):
            return 1 / self.factor
        noise = self.noise_scale / self.batch
        return (1 + noise / self.factor) / (1 + noise)

    @property
    def worth_trying(self) -> bool:
        """Whether at most three quarters of the steps are needed, and they are not used already."""
        return self.steps <= _WORTH and not self.used

    def __str__(self) -> str:
        low, high = self.interval
        verdict = ": worth trying" if self.worth_trying else ": do not bother"
        return (
            f"oracle targets{', which this training has,' if self.used else ''} are worth a batch "
            f"of {self.factor:.2f} times the size here ({low:.2f} to {high:.2f}), and about "
            f"{self.steps:.2f} of the steps{'' if self.used else verdict}"
        )


def forecast_targets(
    velocity: Callable[[Tensor, Tensor, Any], Tensor],
    module: nn.Module,
    oracle: Oracle,
    batches: Iterable[tuple[Tensor, Any]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    timesteps: TimestepSampler | None = None,
    weight: Callable[[Tensor], Tensor] | None = None,
    class_wise: bool | Literal["auto"] = "auto",
    seed: int = 0,
    reachable: Callable[[Tensor], Tensor] = lambda t: t,
) -> TargetForecast:
    """Measures the share of the gradient noise that oracle targets would remove now.

    Call it after a tenth of the training or later: in an untrained network most of the gradient
    differences come from what all samples teach. Each batch costs one forward pass, two backward
    passes and one call of the oracle.

    The training does not change: no gradient is accumulated and all generators are restored. The
    module is in evaluation mode meanwhile: with dropout, whose noise no target removes, the share
    is a little too large.

    Args:
        velocity: From `x_t`, (B, *), t, (B,), and labels, (B,) or None, to the velocity of the
            network (t = 0 is noise), (B, *).
        module: The module with the trained parameters.
        oracle: Bank and path.
        batches: Pairs of samples, (B, *), rows of the bank, and labels, (B,) or None: at least
            four, as large as those of the training. The last of an odd number counts less.
        optimizer: The optimizer of the training. Its parameters count, and Adam's second moments
            (`exp_avg_sq`) are the metric. Default: all parameters of the module that require a
            gradient, and P = 1.
        timesteps: How training draws t, default `Uniform()`.
        weight: From t, (B,), to the weight of the squared error of the velocity, default 1.
        class_wise: Whether the oracle is over the rows of the sample's class, default "auto": if
            the bank has classes and labels are given.
        seed: Of times and noise, default 0.
        reachable: From times, (B,), to the nearest ones that the model knows, for models with
            whole steps; default the times themselves.

    Raises:
        ValueError: On fewer than four batches, batches of different sizes, a velocity of another
            shape than `x_t` or without a graph, no parameter that requires a gradient, an optimizer
            of other parameters, or a gradient that is not finite.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle, forecast_targets
        >>> x, net = torch.randn(32, 4), torch.nn.Linear(4, 4)
        >>> batches = [(part, None) for part in x.split(8)]
        >>> found = forecast_targets(lambda xt, t, _: net(xt), net, Oracle(LatentBank(x)), batches)
        >>> 0 < found.share < 1
        True
    """
    if not callable(getattr(timesteps or Uniform(), "sample", None)):
        raise TypeError(
            f"Expected `timesteps` to be a sampler, got {timesteps!r}: timesteps=LogitNormal()."
        )
    parameters, metric = _metric(module, optimizer)
    if not parameters:
        raise ValueError(
            f"Expected a module with parameters that require gradients, {type(module).__name__} "
            "has none. Unfreeze the part that is trained: module.net.requires_grad_()."
        )
    draws, timesteps = torch.Generator().manual_seed(seed), timesteps or Uniform()
    removed: list[Tensor] = []
    kept: list[Tensor] = []
    total: list[Tensor] = []
    before: list[Tensor] = []
    size = 0
    with undisturbed(module, velocity, seed=seed):
        for number, (samples, classes) in enumerate(batches):
            if size not in (0, len(samples)):
                raise ValueError(
                    f"Expected batches of one size, got {size} and {len(samples)}. Leave out a "
                    "smaller last batch: DataLoader(drop_last=True)."
                )
            size = len(samples)
            x1 = samples.to(parameters[0].device, torch.float32)
            labels = None if classes is None else classes.to(x1.device)
            wise = oracle.bank.labelled if class_wise == "auto" else class_wise
            t = reachable(timesteps.sample(size, generator=draws)).to(x1.device)
            x0 = torch.randn(x1.shape, generator=draws).to(x1.device)
            xt, u, gap = noisy_targets(oracle, x0, x1, t, compared_within(labels, wise))
            w = 1.0 if weight is None else expand_like(weight(t), xt)
            with torch.enable_grad():
                v = velocity(xt, t, labels).float()
            if v.shape != xt.shape:
                raise ValueError(
                    f"Expected `velocity` to return a tensor of shape {tuple(xt.shape)}, got "
                    f"{tuple(v.shape)}."
                )
            if not v.requires_grad:
                raise ValueError(
                    "Expected `velocity` to return a tensor with a graph, got one without: leave "
                    "`.detach()` and `torch.no_grad` out of it."
                )
            # Common factors, such as 2 / (B D), change no ratio, and could underflow.
            pull = w * (v.detach() - u - gap)
            if isinstance(labels, MaskedLabels):  # padding is not in the loss
                pull = labels.zero(pull)
            smooth = torch.autograd.grad(
                v, parameters, pull, retain_graph=True, materialize_grads=True
            )
            noise = torch.autograd.grad(v, parameters, w * gap, materialize_grads=True)
            removed.append(_square(noise, metric))
            if number % 2:
                apart = [one - other for one, other in zip(smooth, before, strict=True)]
                kept.append(_square(apart, metric) / 2)
            before = list(smooth)
            total = [a + b for a, b in zip(total, smooth, strict=True)] if total else before
    if len(removed) < 4:
        raise ValueError(f"Expected at least 4 batches, got {len(removed)}.")
    signal = _square(total, metric) / len(removed) ** 2
    return _estimate(torch.stack(removed), torch.stack(kept), signal, size)


def _metric(
    module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The trained parameters, and P of each."""
    if optimizer is None:
        every: list[Tensor] = [one for one in module.parameters() if one.requires_grad]
        return every, [None] * len(every)
    parameters: list[Tensor] = []
    metric: list[Tensor | None] = []
    for group in optimizer.param_groups:
        for one in group["params"]:
            if one.requires_grad:
                square = optimizer.state.get(one, {}).get("exp_avg_sq")
                parameters.append(one)
                metric.append(None if square is None else 1 / (square.sqrt() + group["eps"]))
    return parameters, metric


def _square(gradient: Sequence[Tensor], metric: list[Tensor | None]) -> Tensor:
    """`g^T P g`, a scalar."""
    parts = [
        (g * g if p is None else g * g * p).sum(dtype=torch.float64)
        for g, p in zip(gradient, metric, strict=True)
    ]
    return torch.stack(parts).sum()


def _estimate(removed: Tensor, kept: Tensor, signal: Tensor, batch: int) -> TargetForecast:
    """From the squares of each batch, of each pair, and of the mean gradient."""
    count = len(removed)
    pairs = removed[: 2 * len(kept)].reshape(-1, 2).mean(1)
    whole = (pairs + kept).mean()
    share = pairs.mean() / whole.clamp_min(1e-300)
    # The error of a ratio of means, by the delta method.
    off = pairs - share * (pairs + kept)
    error = (off.square().sum() / (len(off) * (len(off) - 1))).sqrt() / whole.clamp_min(1e-300)
    mean = signal - kept.mean() / count  # without what noise adds to the square of a mean
    scale = torch.where(mean > 0, batch * whole / mean, torch.inf)
    f, wrong, samples, noise = torch.stack([share, error, scale, whole]).tolist()
    if not math.isfinite(noise):
        raise ValueError(
            "Expected finite gradients to forecast from, got NaN or infinity: the network has "
            "diverged, or a batch is not finite."
        )
    if noise == 0:
        raise ValueError(
            "Expected a gradient that is not 0, got 0: the optimizer has none of the parameters "
            "that the velocity depends on. Give the optimizer of the network: "
            "forecast_targets(..., optimizer=optimizer_of_the_network)."
        )
    return TargetForecast(f, wrong, samples, batch)


@dataclass(frozen=True)
class SmoothingForecast:
    """The range of t where held-out error is above training error; printed, it is a sentence.

    Attributes:
        t_from: Its lower end, NaN if there is none.
        t_to: Its upper end.
        gap: Held-out over training error there, minus 1; NaN if there is none.
        used: Whether the training smooths already, so that it is not advised.
    """

    t_from: float
    t_to: float
    gap: float
    used: bool = False

    @property
    def worth_trying(self) -> bool:
        """Whether there is such a range, and no smoothing yet."""
        return not math.isnan(self.gap) and not self.used

    @property
    def seen(self) -> str:
        """The range, without what to do."""
        if math.isnan(self.gap):
            return "no gap of held-out and training error is seen where smoothing acts"
        return (
            f"held-out error is {self.gap:.0%} above that on training rows for t in "
            f"[{self.t_from:.2f}, {self.t_to:.2f}]"
        )

    def __str__(self) -> str:
        if self.used:
            return f"{self.seen}, in a training that smooths"
        gains = "smoothing has something to gain" if self.worth_trying else "do not bother"
        return f"{self.seen}: {gains}"


def forecast_smoothing(
    probe: Mapping[str, Any], edges: Sequence[float], collapsed: float
) -> SmoothingForecast | None:
    """Looks for a held-out gap where smoothing acts.

    Args:
        probe: One of `VelocityErrorMonitor.history`.
        edges: Of its bins of t, (T + 1,).
        collapsed: The collapsed boundary, from which on smoothing acts.

    Returns:
        The forecast; None without held-out samples, or if no bin has its middle beyond the
        boundary. There is a gap if over all those bins held-out error is above training error by
        more than a tenth of it and by more than four standard errors; the range is from the first
        of them to the last in which it is above by a tenth.
    """
    bins = torch.tensor(edges, dtype=torch.float64)
    acts = (bins[1:] + bins[:-1]) / 2 > collapsed
    if probe["gap"] is None or not acts.any():
        return None
    width = bins.diff()[acts]
    train, gap, error = (
        torch.tensor(values, dtype=torch.float64)[acts]
        for values in (probe["train"]["conditional"], probe["gap"], probe["gap_se"])
    )
    whole, wrong = (gap * width).sum(), (error * width).square().sum().sqrt()
    if not (whole > _OPEN * (train * width).sum() and whole > 4 * wrong):
        return SmoothingForecast(math.nan, math.nan, math.nan)
    places = (gap > _OPEN * train).nonzero().flatten().tolist()
    within = slice(places[0], places[-1] + 1)
    mean = (gap * width)[within].sum() / (train * width)[within].sum()
    low, high = bins[:-1][acts][places[0]], bins[1:][acts][places[-1]]
    return SmoothingForecast(float(low), float(high), float(mean))
