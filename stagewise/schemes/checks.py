r"""What a scheme refuses before the first step, and in its first call.

What a training step makes must fit together: with the path's `a, s` and the prediction's `c, b`,

    x_0 = (x_t - a x_1) / s  is standard normal,   y = c x_1 + b x_t.

Reversed time, another scale, a wrong sign or another kind of prediction break one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.building import whole_labels
from stagewise.oracle import Oracle
from stagewise.paths import (
    Convention,
    LinearPath,
    Path,
    Prediction,
    PredictionKind,
    expand_like,
    same_path,
    unlike,
)
from stagewise.smoothing import Smoothing
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler

if TYPE_CHECKING:
    from stagewise.schemes.scheme import Scheme

__all__ = [
    "check_conditions",
    "check_density",
    "check_rows",
    "check_samples",
    "check_settings",
    "unknown_boundary",
    "unknown_conditions",
]

_FEW = 64
"""Samples of the first call that are looked at."""

_ROUNDING = 1e-4
"""Relative error of float32 samples: their path may be known to no more digits than that."""


def check_settings(
    oracle: Oracle | None,
    timesteps: object,
    target: object,
    class_wise: object,
    on_missing: object,
    path: Path | None,
    preserve_objective: bool,
    convention: object,
    smoothing: object,
    strength: object,
) -> None:
    """Refuses settings of a `Scheme` that are wrong by themselves or contradict each other.

    Raises:
        ValueError: With the cure.
        TypeError: If the target, the timesteps or the convention are something else.
    """
    if target is not None and not isinstance(target, Target):
        raise TypeError(
            f'Expected `target` to be a stagewise target such as Mix("boundary"), got {target!r}.'
        )
    if target is not None and oracle is None:
        raise ValueError(
            f"{target!r} needs an oracle, got none: Scheme(Oracle(bank, path), target=...). In a "
            "Lightning trainer StageScheme(target=...) makes one of the training set."
        )
    if timesteps is not None and not isinstance(timesteps, TimestepSampler):
        raise TypeError(
            f"Expected `timesteps` to be a TimestepSampler such as LogitNormal(), got "
            f"{timesteps!r}."
        )
    if not isinstance(convention, Convention):
        raise TypeError(
            "Expected `convention` to be a Convention such as Convention(1, 0, -1), got "
            f"{convention!r}."
        )
    if preserve_objective and timesteps is None:
        raise ValueError(
            "Expected `timesteps` with preserve_objective=True, got none: the weight p(t)/q(t) is "
            "that of draws which the scheme makes. Give it the sampler that draws t: "
            "Scheme(timesteps=LogitNormal(), preserve_objective=True)."
        )
    if class_wise not in (True, False, "auto"):
        raise ValueError(f'Expected `class_wise` to be True, False or "auto", got {class_wise!r}.')
    if on_missing not in ("insert", "error"):
        raise ValueError(f'Expected `on_missing` "insert" or "error", got {on_missing!r}.')
    if smoothing is not None and not isinstance(smoothing, Smoothing):
        raise TypeError(
            f"Expected `smoothing` to be a Smoothing, got {smoothing!r}: "
            "Scheme(smoothing=Smoothing(bank))."
        )
    if smoothing is not None and oracle is not None:
        smoothing.check(oracle)
    if strength is not None and smoothing is None:
        raise ValueError(
            "Expected a smoothing for the `strength`, got none: "
            "Scheme(smoothing=Smoothing(bank), strength=...)."
        )
    if oracle is not None and path is not None and not same_path(path, oracle.path):
        raise ValueError(
            f"Expected the path of the oracle, {unlike(oracle.path, path)}. Give one of them."
        )


def check_density(sampler: TimestepSampler, weight: Callable[[Tensor], Tensor] | None) -> None:
    """Refuses times that no draw reaches, where the loss counts.

    Raises:
        ValueError: With the times and the cure.
    """
    t = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    counts = torch.ones_like(t) if weight is None else weight(t)
    missed = t[(sampler.density(t) <= 0) & (counts > 0)]
    if len(missed):
        raise ValueError(
            "Expected draws wherever the loss counts (preserve_objective=True), but the density of "
            f"{sampler!r} is 0 from t = {missed[0]:.3f} to {missed[-1]:.3f}. Give it a floor: "
            "WithFloor(sampler, 0.1)."
        )


def unknown_boundary(collapsed: bool = False) -> ValueError:
    """What is raised where the boundary is needed and not known, or its collapsed end."""
    if collapsed:
        return ValueError(
            "Expected the boundary from which on samples are smoothed, which has not been measured "
            "yet: scheme.measure_boundary(), before the first step. Or say where: "
            "Scheme(strength=lambda t: (t >= 0.7).float(), ...)."
        )
    return ValueError(
        "Expected the boundary of the stages, which has not been measured yet. Give it as a "
        "number, Scheme(boundary=0.1) or scheme.set_boundary(0.1), or measure it before the first "
        "step: scheme.measure_boundary()."
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
) -> bool:
    """Refuses samples and targets that are not those of the path; see the module.

    Args:
        path: That of the scheme.
        prediction: What `y` is.
        convention: How `time` and `y` are given.
        y: Conditional target, (B, *); None if there is none to look at.
        xt: Noisy samples, (B, *).
        time: Times, (B,).
        x1: What `xt` was made from, (B, *).
        mixes: Whether the oracle enters the target, for which `x_0` must be standard normal.

    Returns:
        Whether anything could be told: not where sigma is lost in rounding.

    Raises:
        ValueError: With what was seen, and the convention or prediction that fits it if one does.
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
    hint = (
        "Look at the path, the scale of x1, and what x0 is. A target with terms of your own is "
        "y + scheme.correct(xt=xt, t=t, x1=x1), and its weight scheme.weight_of(t)."
    )
    for kind in get_args(PredictionKind):
        if y is not None and problem(convention, replace(prediction, kind=kind)) == "":
            hint = f'They fit another prediction: scheme(..., prediction="{kind}").'
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
            + f". Say so: Scheme(..., convention=Convention({numbers}))."
        )
    raise ValueError(
        f"Expected `xt`, `t`, `x1` and `y` of the {prediction.kind} on {path!r}, where time "
        f"{noise:g} is noise and {data:g} is data, got {found}. {hint}"
    )


def _check_pairs(path: Path, t: Tensor, xt: Tensor, x1: Tensor) -> None:
    """Refuses noise that depends on its data, for which the oracle does not hold."""
    from stagewise.adapters.base import check_independent  # adapters stand above schemes

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
        # Six standard errors; chi-squared by Wilson and Hilferty's cube root, for few numbers too.
        slack, cube = float(error.square().mean().sqrt()), math.sqrt(2 / (9 * x0.numel()))
        off = abs(mean) > 6 / math.sqrt(x0.numel()) + slack
        if off or abs(square ** (1 / 3) - 1 + cube**2) > 6 * cube + slack:
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


def check_rows(
    bank: LatentBank, x1: Tensor, *, known: bool = False, shard: bool = False
) -> str | None:
    """Holds what a scheme is given against the bank its oracle asks.

    Refused is a scale that no row explains: most samples, at least 4, are no rows, and the distance
    of the median one from the bank's centre is more than 1.5 times that of the median row, and
    above that of 99 % of the rows; or below in the same way. Augmented and resampled samples are
    not so far off.

    Args:
        bank: The bank.
        x1: Samples of the first training step, (B, *), as the scheme was given them.
        known: Whether their rows are known, so that they stand in for these and nothing is warned
            of. Default False.
        shard: Whether the bank is only this rank's part of one, in which samples are not looked up.
            Default False.

    Returns:
        The text of a warning, with the share of samples that are no rows; None if there is nothing
        to say.

    Raises:
        ValueError: On another scale than the bank's.
    """
    missing = torch.ones(len(x1), dtype=torch.bool) if shard else bank.find(x1).cpu() < 0
    if not missing.any():
        return None
    share, others = float(missing.float().mean()), x1[missing.to(x1.device)].to(bank.device)
    distance = (others.flatten(1).double() - bank.centre).norm(dim=1).median()
    further = float((bank.sq_norms > distance.square()).double().mean())
    ratio = float(distance / bank.sq_norms.median().sqrt().clamp_min(1e-30))
    off = ratio > 1.5 and further < 0.01 or ratio < 1 / 1.5 and further > 0.99
    # Of a few samples any may be far off.
    if off and share > 0.5 and len(others) >= 4:
        raise ValueError(
            f"Expected samples at the scale of the bank, got {share:.0%} that are no rows of it, "
            f"{ratio:.3g} times as far from its centre as its rows: the oracle's targets would be "
            "wrong. Build the bank from the latents that are trained on, as the model sees them "
            "(scaled, normalised)."
        )
    if shard or known:
        return None
    return (
        f"{share:.0%} of the samples in the first step are no rows of the bank, and each of them "
        f"joins its rows: the nearest row is off by {distance_from_rows(bank, others):.0%} of "
        "their norm. "
        "Flips, augmentation, another VAE sample or another data set? Build the bank from what is "
        "trained on; give the `source` of resampled latents, which then take the place of their "
        'row; or refuse them: Scheme(on_missing="error").'
    )


def distance_from_rows(bank: LatentBank, x1: Tensor) -> float:
    """The median distance of a few samples from their nearest rows, as a share of their norm."""
    # On the linear path t = 1 has no noise at all: the posterior mean is the nearest row.
    few = x1[:16].to(bank.device, torch.float32)
    gap = (Oracle(bank, LinearPath()).posterior(few, 1.0).mean - few).flatten(1).norm(dim=1)
    return float(gap.median() / few.flatten(1).norm(dim=1).median().clamp_min(1e-30))


def unknown_conditions(what: str) -> ValueError:
    """What is raised where targets over all rows would be given to a model that sees conditions."""
    return ValueError(
        f"Expected a target for the conditions of the model, got {what}. A conditioned model "
        "should predict the mean over the data of its condition: the mean over other rows moves "
        "what it learns. For classes give the bank the labels of its rows, LatentBank(x, labels); "
        "if the model ignores its conditions, say Scheme(..., class_wise=False); otherwise steer "
        "without a target, Scheme(timesteps=..., weight=...)."
    )


def check_conditions(
    scheme: Scheme, labels: Iterable[Any], others: Iterable[Any], count: int
) -> Tensor | None:
    """What a model is given beside `x_t` and t, refused if the scheme's targets ignore it.

    Args:
        scheme: What makes the targets. Without a target, or with class_wise=False, nothing is
            looked at.
        labels: Arguments among which one may be the class of each sample.
        others: Arguments that are none.
        count: How many samples there are.

    Returns:
        The labels, (count,), int64, if there are any.

    Raises:
        ValueError: With the cure.
    """
    if scheme.target is None or scheme.unconditional:
        return None
    found, left = None, list(_tensors(others))
    for value in _tensors(labels):
        try:
            own = whole_labels(value, count)
        except ValueError:
            own = None
        if own is None or found is not None:
            left.append(value)
        else:
            found = own
    if left:
        raise unknown_conditions(
            f"{str(left[0].dtype).removeprefix('torch.')} of shape {tuple(left[0].shape)}, which "
            "are not the class of each sample"
        )
    if found is not None and not scheme.class_wise:
        raise unknown_conditions("labels, and a bank without classes")
    return found


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
