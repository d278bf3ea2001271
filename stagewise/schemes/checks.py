"""What a scheme refuses before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stagewise.oracle import Oracle
from stagewise.paths import Path
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler

__all__ = ["check_density", "check_settings", "unknown_boundary"]


def check_settings(
    oracle: Oracle | None,
    timesteps: object,
    target: object,
    class_wise: object,
    on_missing: object,
    path: Path | None,
    preserve_objective: bool,
) -> None:
    """Refuses settings of a `Scheme` that are wrong by themselves or contradict each other.

    Raises:
        ValueError: With the cure.
        TypeError: If the target or the timesteps are something else.
    """
    if target is not None and not isinstance(target, Target):
        raise TypeError(
            f'Expected `target` to be a stagewise target such as Mix("boundary"), got {target!r}.'
        )
    if target is not None and oracle is None:
        raise ValueError(
            f"{target!r} needs an oracle, got none: Scheme(Oracle(bank, path), target=...)."
        )
    if timesteps is not None and not isinstance(timesteps, TimestepSampler):
        raise TypeError(
            f"Expected `timesteps` to be a TimestepSampler such as LogitNormal(), got "
            f"{timesteps!r}."
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


def unknown_boundary() -> ValueError:
    """What is raised where the boundary is needed and not known."""
    return ValueError(
        "Expected the boundary of the stages, which has not been measured yet. Give it as a "
        "number, Scheme(boundary=0.1), or measure it before the first step: "
        "scheme.set_boundary(StageCurve.measure(oracle, t).boundary())."
    )
