r"""What a scheme refuses in its first call: samples and targets that are not those of its path.

With the path's `a, s` and the prediction's `c, b`,

    x_0 = (x_t - a x_1) / s  is standard normal,   y = c x_1 + b x_t.

Reversed time, another scale, a wrong sign or another kind of prediction break one of the two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from stagewise.noise import check_independent, is_off
from stagewise.paths import Convention, Path, Prediction, PredictionKind, expand_like

__all__ = ["check_samples"]

_FEW = 64
"""Samples of the first call that are looked at."""

_ROUNDING = 1e-4
"""Relative error of float32 samples: their path may be known to no more digits than that."""

_SAID = (
    "scheme(..., prediction={})",
    "Scheme(..., convention={})",
    "A target with terms of your own is y + scheme.correct(xt=xt, t=t, x1=x1), and its weight "
    "scheme.weight_of(t).",
)


def check_samples(
    path: Path,
    prediction: Prediction,
    convention: Convention,
    y: Tensor | None,
    xt: Tensor,
    time: Tensor,
    x1: Tensor,
    *,
    mixes: bool,
    said: tuple[str, str, str] = _SAID,
) -> bool:
    """Refuses samples and targets that are not those of the path; see the module.

    `y` and `time` are given in the `convention`; `mixes`: whether the oracle enters the target, for
    which `x_0` must be standard normal; `said`: how another prediction or convention is
    said, and what to do about a target with terms of one's own.

    Returns:
        Whether anything could be told: not where sigma is lost in rounding.
    """
    eps = _rounding(y, xt, time, x1)
    xt, time, x1 = (value[:_FEW].cpu().double() for value in (xt, time, x1))
    y = None if y is None else y[:_FEW].cpu().double()

    def problem(told: Convention, kind: Prediction) -> str | None:
        signed = y if y is None or kind.kind != "velocity" else told.sign * y
        return _problem(path, kind, signed, xt, told.to_t(time), x1, eps, mixes)

    found = problem(convention, prediction)
    if not found:
        if found is not None and mixes:
            _check_pairs(path, convention.to_t(time), xt, x1)
        return found is not None
    hint = f"Look at the path, the scale of x1, and what x0 is. {said[2]}"
    for kind in get_args(PredictionKind):
        if y is not None and problem(convention, replace(prediction, kind=kind)) == "":
            line = said[0].format(f'"{kind}"')
            hint = f"They fit another prediction: {line}."
    noise, data, sign = convention.noise_time, convention.data_time, convention.sign
    others = [Convention(data, noise, sign)]
    if prediction.kind == "velocity":
        minus = replace(convention, sign=-sign)
        others = [replace(minus, noise_time=data, data_time=noise), *others, minus]
    fitting = [told for told in others if problem(told, prediction) == ""]
    for told in fitting[:1]:
        numbers = f"{told.noise_time:g}, {told.data_time:g}, {told.sign}"
        hint = (
            f"They fit if time {told.noise_time:g} is noise and {told.data_time:g} is data"
            + (", with the opposite sign of y" if told.sign != sign else "")
            + f". Say so: {said[1].format(f'Convention({numbers})')}."
        )
    raise ValueError(
        f"Expected `xt`, `t`, `x1` and `y` of the {prediction.kind} on {path!r}, where time "
        f"{noise:g} is noise and {data:g} is data, got {found}. {hint}"
    )


def _check_pairs(path: Path, t: Tensor, xt: Tensor, x1: Tensor) -> None:
    """Refuses noise that depends on its data, for which the oracle does not hold."""
    alpha, sigma, *_ = path(t)
    told = sigma > 0.05  # elsewhere rounding is in the noise
    if told.sum() > 1:
        gap = xt - expand_like(alpha, x1) * x1
        check_independent((gap / expand_like(sigma.clamp_min(0.05), x1))[told], x1[told])


def _problem(
    path: Path,
    prediction: Prediction,
    y: Tensor | None,
    xt: Tensor,
    t: Tensor,
    x1: Tensor,
    eps: float,
    mixes: bool,
) -> str | None:
    """What does not fit; empty if all does, None if nothing can be told."""
    values = path(t)
    size_t, size_1 = (x.flatten(1).square().mean(1).sqrt() for x in (xt, x1))
    error = 2 * eps * (size_t + values.alpha.abs() * size_1) / values.sigma
    kept = error < 0.15
    if not kept.any():
        return None
    xt, x1, error, values = xt[kept], x1[kept], error[kept], values.select(kept)
    x0 = (xt - expand_like(values.alpha, x1) * x1) / expand_like(values.sigma, x1)
    if mixes:
        mean, square = float(x0.mean()), float(x0.square().mean())
        if is_off(x0.numel(), mean, square, float(error.square().mean().sqrt())):
            return (
                f"a noise (xt - a x1) / s with a mean of {mean:.3g} and a mean square of "
                f"{square:.3g}, where standard normal noise has 0 and 1"
            )
    if y is None:
        return ""
    y = y[kept]
    c, b = prediction.coefficients(values)
    own = expand_like(c, x1) * x1 + expand_like(b, xt) * xt
    gap, size_y = (y - own).flatten(1), y.flatten(1).square().mean(1).sqrt()
    allowed = 2 * eps * (c.abs() * size_1[kept] + b.abs() * size_t[kept] + size_y)
    if float((gap.square().mean(1) / allowed.square().clamp_min(1e-300)).mean()) <= 1:
        return ""
    if path.noisy_target and not any(_correlated(gap, x.flatten(1)) for x in (x1, x0)):
        return ""
    share = float(gap.square().mean().sqrt() / own.square().mean().sqrt().clamp_min(1e-30))
    return f"a y that is off by {share:.0%} of its size"


def _correlated(gap: Tensor, x: Tensor) -> bool:
    """Whether the sum of products is more than six standard errors from 0."""
    error = (gap.square().mean(1) * x.square().sum(1)).sum().sqrt()
    return bool((gap * x).sum().abs() > 6 * error)


def _rounding(*given: Tensor | None) -> float:
    """The relative error of what was given, which may have been made in fewer bits than it has."""
    eps = _ROUNDING
    for value in given:
        if value is None or not value.is_floating_point():
            continue
        eps = max(eps, torch.finfo(value.dtype).eps)
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(value.to(dtype).to(value.dtype), value):
                eps = max(eps, torch.finfo(dtype).eps)
    return eps
