r"""The checks of a scheme's first call: samples and targets that do not fit its path.

With the path's `a, s` and the prediction's `c, b`,

    x_0 = (x_t - a x_1) / s  is standard normal,   y = c x_1 + b x_t.

Reversed time, another scale, a wrong sign or another kind of prediction break one of the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from stagewise.bank.building import whole_labels
from stagewise.conventions import CONVENTIONS, Convention, DDPMPath, written
from stagewise.masks import MaskedLabels, few_rows, fitted, mean_square, require_same_masks
from stagewise.noise import check_independent, is_off
from stagewise.paths import LinearPath, Path, Prediction, PredictionKind, expand_like, same_path
from stagewise.schemes.refusals import check_labels, check_rows, labels_in
from stagewise.tracing import caller_level

if TYPE_CHECKING:
    from stagewise.schemes.scheme import Scheme

__all__ = ["check_first", "check_samples"]

_FEW = 64
"""Samples of the first call that are checked."""

_ROUNDING = 1e-4
"""Relative error of float32 samples: their path may have no more digits."""

_SAID = (
    "scheme(..., prediction={})",
    "Scheme(..., convention={})",
    "A target with terms of your own is y + scheme.correct(xt=xt, t=t, x1=x1), and its weight "
    "scheme.weight_of(t).",
)


def check_first(
    scheme: Scheme,
    y: Tensor | None,
    xt: Tensor,
    time: Tensor,
    x1: Tensor,
    source: Tensor | None,
    prediction: Prediction,
    labels: object,
    condition: Tensor | None,
) -> None:
    """Checks the first samples of a scheme against its path and its bank."""
    oracle, mixes = scheme.oracle, scheme.target is not None
    counts = scheme.weight is not None or scheme.smoothing is not None
    if not len(xt) or not (mixes or (y is not None and counts)):
        return
    if not scheme._fits:
        samples = (scheme.path, prediction, scheme.convention, y, xt, time, x1, labels)
        scheme._fits = check_samples(*samples, mixes=mixes) and y is not None
    if oracle is None or not mixes:
        return
    if scheme.last is None:
        require_same_masks(oracle.bank, x1, labels)
        if few := few_rows(oracle.bank):
            warnings.warn(few, stacklevel=caller_level())
    if scheme.rows_checked:
        return
    if scheme.class_wise and oracle.engine.holds_all_rows and isinstance(labels, Tensor):
        given = whole_labels(labels.cpu(), len(x1))
        own = labels_in(oracle.bank, x1, given)
        check_labels(given, own, oracle.bank.classes, oracle.null_class)
    if scheme.smoothing is not None:  # `smooth` takes rows only, and x_1 is a draw around one
        scheme.rows_checked = True
        return
    near = bool(scheme.encoded)  # then the source was looked up
    known = oracle.smoothing is not None or oracle.bank.origin or (source is not None and not near)
    found = check_rows(
        oracle.bank,
        fitted(x1, labels, oracle.bank.shape)[0],
        known=bool(known),
        near=near,
        shard=not oracle.engine.holds_all_rows,
        condition=condition if oracle.condition else None,
    )
    scheme.rows_checked = True
    if found:
        warnings.warn(f"Scheme: {found}", stacklevel=caller_level())


def check_samples(
    path: Path,
    prediction: Prediction,
    convention: Convention,
    y: Tensor | None,
    xt: Tensor,
    time: Tensor,
    x1: Tensor,
    labels: object = None,
    *,
    mixes: bool,
    said: tuple[str, str, str] = _SAID,
) -> bool:
    """Refuses samples and targets, in the `convention`, that do not fit the path; see the module.

    `mixes`: whether the oracle enters the target, so that `x_0` must be standard normal. `said`:
    code for another prediction, for another convention, and the cure for a target with extra terms.

    Returns whether later calls need no check: these samples could be checked, which needs a sigma
    above rounding; or they are on an accelerator, where each check costs a sync.
    """
    once = xt.device.type != "cpu"
    if isinstance(labels, MaskedLabels):
        xt, x1, y = labels.zero(xt), labels.zero(x1), None if y is None else labels.zero(y)
        labels = labels[:_FEW].cpu()
    else:
        labels = None
    eps = _rounding(y, xt, time, x1)
    xt, time, x1 = (value[:_FEW].cpu().double() for value in (xt, time, x1))
    y = None if y is None else y[:_FEW].cpu().double()

    def problem(other: Convention, kind: Prediction, mixes: bool = mixes) -> str | None:
        at, t = other.inside(xt, time)
        if not bool(((t >= 0) & (t <= 1)).all()):
            low, high = sorted((other.noise_time, other.data_time))
            return f"times from {time.min():.4g} to {time.max():.4g}, not in [{low:g}, {high:g}]"
        signed = None if y is None else other.sign_of(kind) * y
        return _problem(other.path or path, kind, signed, at, t, x1, eps, mixes, labels)

    found = problem(convention, prediction)
    if not found:
        if found is not None and mixes:
            at, t = convention.inside(xt, time)
            _check_pairs(path, t, at, x1)
        return once or found is not None

    def fits(other: Convention, kind: Prediction) -> bool:
        return problem(other, kind, mixes=True) == ""

    raise ValueError(
        f"Expected `xt`, `t`, `x1` and `y` of the {prediction.kind} on {path!r}, where time "
        f"{convention.noise_time:g} is noise and {convention.data_time:g} is data, got {found}. "
        + _cure(path, prediction, convention, time, fits, said)
    )


def _cure(
    path: Path,
    prediction: Prediction,
    convention: Convention,
    time: Tensor,
    fits: Callable[[Convention, Prediction], bool],
    said: tuple[str, str, str],
) -> str:
    """A `convention` or `prediction` that fits the samples, for the message."""
    for name in get_args(PredictionKind):
        if fits(convention, replace(prediction, kind=name)):
            line = said[0].format(f'"{name}"')
            return f"They fit another prediction: {line}."
    noise, data, sign = convention.noise_time, convention.data_time, convention.sign
    own = [] if convention.by_sigma else [replace(convention, noise_time=data, data_time=noise)]
    signs = [replace(other, sign=-sign) for other in (*own, convention)]
    others = [signs[0], *own, signs[-1]] if prediction.kind == "velocity" else own
    named = list(CONVENTIONS.values())
    linear = [replace(other, path=other.path or LinearPath()) for other in named]
    for other in (*named, *others, *linear):
        for kind in (prediction, other.prediction):
            if fits(other, kind):
                turned = other.sign_of(kind) != convention.sign_of(kind)
                line = said[1].format(written(other))
                if other.path is not None and not same_path(other.path, path):
                    line += f", on its path: Oracle(bank, convention={written(other)})"
                if kind != other.prediction:
                    line += ", and " + said[0].format(f'"{kind.kind}"')
                return (
                    f"They fit if time {other.noise_time:g} is noise and {other.data_time:g} data"
                    + (", with the opposite sign of y" if turned else "")
                    + f". Say so: {line}."
                )
    if isinstance(convention.path, DDPMPath):
        return (
            f"The given schedule, {convention.path!r}, is not that of x_t: give the scheduler that "
            f"adds the noise in the step, {said[1].format('noise_scheduler')}."
        )
    if float(time.max()) > 1 and bool((time == time.round()).all()):
        line = said[1].format("noise_scheduler")
        return f'Integer timesteps need the schedule: {line}, or ddpm(alphas_cumprod, "noise").'
    return f"Look at the path, the scale of x1, and what x0 is. {said[2]}"


def _check_pairs(path: Path, t: Tensor, xt: Tensor, x1: Tensor) -> None:
    """Refuses noise that depends on its data, for which the oracle does not hold."""
    alpha, sigma, *_ = path(t)
    clear = sigma > 0.05  # below, the noise contains rounding errors
    if clear.sum() > 1:
        gap = xt - expand_like(alpha, x1) * x1
        check_independent((gap / expand_like(sigma.clamp_min(0.05), x1))[clear], x1[clear])


def _problem(
    path: Path,
    prediction: Prediction,
    y: Tensor | None,
    xt: Tensor,
    t: Tensor,
    x1: Tensor,
    eps: float,
    mixes: bool,
    labels: MaskedLabels | None,
) -> str | None:
    """What does not fit; empty if everything does, None if it cannot be checked."""
    values = path(t)
    size_t, size_1 = (mean_square(x, labels).sqrt() for x in (xt, x1))
    error = 2 * eps * (size_t + values.alpha.abs() * size_1) / values.sigma
    kept = error < 0.15
    if not kept.any():
        gap = (xt - expand_like(values.alpha, x1) * x1).flatten(1).square().mean(1).sqrt()
        size = gap / values.sigma  # rounding cannot make noise this large
        if mixes and bool((size > 8 * (1 + error)).any()):
            return f"a noise (xt - a x1) / s of size {float(size.max()):.3g}, which should be 1"
        return None
    xt, x1, error, values = xt[kept], x1[kept], error[kept], values.select(kept)
    labels = None if labels is None else labels[kept]
    x0 = (xt - expand_like(values.alpha, x1) * x1) / expand_like(values.sigma, x1)
    if mixes:
        noise = x0 if labels is None else x0[labels.entries]
        mean, square = float(noise.mean()), float(noise.square().mean())
        if is_off(noise.numel(), mean, square, float(error.square().mean().sqrt())):
            return (
                f"a noise (xt - a x1) / s with a mean of {mean:.3g} and a mean square of "
                f"{square:.3g}, where standard normal noise has 0 and 1"
            )
    if y is None:
        return ""
    y = y[kept]
    c, b = prediction.coefficients(values)
    own = expand_like(c, x1) * x1 + expand_like(b, xt) * xt
    gap, size_y = (y - own).flatten(1), mean_square(y, labels).sqrt()
    allowed = 2 * eps * (c.abs() * size_1[kept] + b.abs() * size_t[kept] + size_y)
    if float((mean_square(gap, labels) / allowed.square().clamp_min(1e-300)).mean()) <= 1:
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
    """The relative error of tensors, which may have been computed in fewer bits than they have."""
    eps = _ROUNDING
    for value in given:
        if value is None or not value.is_floating_point():
            continue
        eps = max(eps, torch.finfo(value.dtype).eps)
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(value.to(dtype).to(value.dtype), value):
                eps = max(eps, torch.finfo(dtype).eps)
    return eps
