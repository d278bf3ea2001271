r"""Sampling: integrate `dx/dt = u(x, t)` from noise at t = 0 to data at t = 1.

The solver is torchdiffeq's. What is ours is only the velocity that it is given: `model_velocity`
turns any prediction type and convention into one, `guided` adds classifier-free guidance on an
interval of t (Kynkaanniemi et al., arXiv 2404.07724),

    u = u_null + w (u_label - u_null)   for t in the interval,   u = u_label elsewhere,

and `switched` integrates one velocity to a time and another from there (Liu et al., arXiv
2512.02826, Fig. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torchdiffeq import odeint

from stagewise.paths import STAGEWISE, Convention, LinearPath, Path, Prediction, PredictionKind

__all__ = ["Velocity", "guided", "model_velocity", "sample", "switched"]

_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From `x_t`, (B, *), and t, (B,), to the velocity, (B, *)."""


def model_velocity(
    model: Callable[[Tensor, Tensor], Tensor],
    *,
    path: Path | None = None,
    prediction: Prediction | PredictionKind = "velocity",
    convention: Convention = STAGEWISE,
) -> Velocity:
    """The velocity of a model that predicts something else, or counts time another way.

    Args:
        model: Called as `model(xt, time)` with time in the model's convention.
        path: Path of training, default `LinearPath()`.
        prediction: What the model predicts, default "velocity".
        convention: Its time and sign, default the library's.

    Returns:
        `u(x_t, t)` in the library's convention.
    """
    path, prediction = path or LinearPath(), Prediction.of(prediction)

    def velocity(xt: Tensor, t: Tensor) -> Tensor:
        y = convention.sign * model(xt, convention.from_t(t))
        return prediction.to_velocity(path(t), y, xt)

    return velocity


def guided(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance within an interval of t.

    Args:
        conditional: Velocity given the label.
        unconditional: Velocity of the null label.
        scale: Guidance weight w; 1 is none.
        interval: Where it applies, in t (0 = noise); default everywhere. Outside it the
            unconditional velocity is not computed.

    Returns:
        The guided velocity.
    """
    everywhere = interval[0] <= 0 and interval[1] >= 1

    def velocity(xt: Tensor, t: Tensor) -> Tensor:
        with_label = conditional(xt, t)
        if scale == 1 or not (everywhere or interval[0] <= float(t[0]) <= interval[1]):
            return with_label
        without = unconditional(xt, t)
        return without + scale * (with_label - without)

    return velocity


@torch.no_grad()
def sample(
    velocity: Velocity,
    x0: Tensor,
    *,
    method: str = "midpoint",
    steps: int = 25,
    start: float = 0.0,
    end: float = 1.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Tensor:
    """Integrates the flow from `start` to `end`, in float32 at least.

    Args:
        velocity: `u(x_t, t)`.
        x0: State at `start`, noise if that is 0, (B, *).
        method: A solver of torchdiffeq: "euler", "midpoint", "heun2", "heun3" or "rk4" with fixed
            steps, or "dopri5", "dopri8", "bosh3", "fehlberg2" or "adaptive_heun", which choose
            their own; default "midpoint".
        steps: Steps of a fixed-step solver, default 25; midpoint asks for two velocities a step.
        start: Time of `x0`, default 0.
        end: Time of the result, default 1. Predictions other than the velocity are singular there:
            stop at 0.999.
        rtol: Relative tolerance of a solver that chooses its steps, default 1e-4.
        atol: Absolute tolerance, default 1e-4.

    Returns:
        The state at `end`, (B, *).

    Raises:
        ValueError: If the times are not 0 <= start < end <= 1, `steps` is below 1, or the solver
            is none of these.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"Expected 0 <= start < end <= 1, got {start} and {end}.")
    if steps < 1:
        raise ValueError(f"Expected `steps` of at least 1, got {steps}.")
    times = torch.tensor([start, end], device=x0.device, dtype=torch.float32)
    options: dict[str, object]
    if method in _FIXED:
        options = {"step_size": (end - start) / steps}
    elif method in _ADAPTIVE:
        # Left alone it steps beyond the end, where models are not trained, and interpolates back.
        options = {"step_t": times[1:]}
    else:
        raise ValueError(f"Expected `method` among {_FIXED + _ADAPTIVE}, got {method!r}.")
    # In 16 bits time would have few values and small steps would be lost.
    wide = torch.promote_types(x0.dtype, torch.float32)
    states = odeint(
        lambda t, x: velocity(x.to(x0.dtype), t.to(wide).expand(len(x))).to(wide),
        x0.to(wide),
        times,
        method=method,
        rtol=rtol,
        atol=atol,
        options=options,
    )
    return states[-1].to(x0.dtype)


def switched(
    first: Velocity,
    second: Velocity,
    x0: Tensor,
    at: float,
    *,
    method: str = "midpoint",
    steps: int = 25,
    start: float = 0.0,
    end: float = 1.0,
) -> Tensor:
    """Integrates one velocity to the time `at`, and another one from there.

    The oracle may be either: it is singular at t = 1, where "euler" and "midpoint" never ask. With
    the other solvers stop at 0.999.

    Args:
        first: Velocity before `at`; not asked where `at` is `start` or less.
        second: Velocity from there; not asked where `at` is `end` or more.
        x0: State at `start`, (B, *).
        at: Time of the switch, in [0, 1].
        method: See `sample`.
        steps: Steps from `start` to `end`; each part has its share of them, rounded up.
        start: Time of `x0`, default 0.
        end: Time of the result, default 1.

    Returns:
        The state at `end`, (B, *).

    Raises:
        ValueError: As `sample`, or if `at` is outside [0, 1].
    """
    if not 0 <= at <= 1:
        raise ValueError(f"Expected `at` in [0, 1], got {at}.")
    if not 0 <= start < end <= 1:
        raise ValueError(f"Expected 0 <= start < end <= 1, got {start} and {end}.")
    x, parts = x0, ((first, start, min(at, end)), (second, max(at, start), end))
    for velocity, begin, stop in parts:
        if begin < stop:
            # Less a rounding error, so that 0.2 of 25 steps are 5.
            share = math.ceil(steps * (stop - begin) / (end - start) - 1e-9)
            x = sample(velocity, x, method=method, steps=share, start=begin, end=stop)
    return x
