r"""Sampling: integrate `dx/dt = u(x, t)` from noise at t = 0 to data at t = 1.

The solver is torchdiffeq's; this module makes the velocity and the times of a fixed-step solver.
`model_velocity` turns any prediction type and convention into a velocity,
`guided` adds classifier-free guidance on an interval of t (Kynkaanniemi et al., arXiv 2404.07724),

    u = u_null + w (u_label - u_null)   for t in the interval,   u = u_label elsewhere,

and `switched` integrates one velocity to a time and another from there (Liu et al., arXiv
2512.02826, Fig. 5). `time_grid` spaces the steps by the timestep shift (the same, Tab. 2),

    t = s v / (1 + (s - 1) v),   v evenly spaced:   s < 1 spends more steps near noise,

and, coarse to fine, takes one large step first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchdiffeq import odeint

from stagewise.conventions import STAGEWISE, ConventionLike, as_convention, path_of
from stagewise.paths import LinearPath, Path, Prediction, PredictionKind
from stagewise.timesteps.composed import shift_times

__all__ = [
    "ADAPTIVE_SOLVERS",
    "FIXED_SOLVERS",
    "Velocity",
    "checked_times",
    "guidance_interval",
    "guided",
    "integration_range",
    "model_velocity",
    "sample",
    "switched",
    "time_grid",
    "times_between",
]

FIXED_SOLVERS = ("euler", "midpoint", "heun2", "heun3", "rk4")
"""Solvers that step from one given time to the next."""
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Solvers that choose their steps."""

_ROUNDING = 2.5e-7
"""Four roundings of a float32 time: a time this near the end of an interval is in it."""

_RANGES = {
    "velocity": (0.0, 1.0),
    "data": (0.0, 0.99),
    "edm": (0.0, 0.99),
    "v": (0.0, 0.99),
    "noise": (0.02, 0.999),
    "score": (0.02, 0.99),
}

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From `x_t`, (B, *), and t, (B,), to the velocity, (B, *)."""


def model_velocity(
    model: Callable[[Tensor, Tensor], Tensor],
    *,
    path: Path | None = None,
    prediction: Prediction | PredictionKind | None = None,
    convention: ConventionLike = STAGEWISE,
) -> Velocity:
    """Makes a velocity from a model with another prediction or convention.

    Args:
        model: Called as `model(xt, time)`, both in the model's convention.
        path: Path of training, default that of the convention, or else `LinearPath()`.
        prediction: What the model predicts, default that of the convention, the velocity.
        convention: The model's, default the library's; see `stagewise.conventions`.

    Example:
        >>> import torch
        >>> from stagewise.sampling import model_velocity
        >>> edm = model_velocity(lambda xt, sigma: torch.zeros_like(xt), convention="edm")
        >>> edm(torch.randn(4, 8), torch.full((4,), 0.5)).shape
        torch.Size([4, 8])
    """
    told = as_convention(convention)
    path, kind = path_of(told, path) or LinearPath(), Prediction.of(prediction or told.prediction)

    def velocity(xt: Tensor, t: Tensor) -> Tensor:
        y = told.sign_of(kind) * model(*told.outside(xt, t))
        return kind.to_velocity(path(t), y, xt)

    return velocity


def integration_range(prediction: Prediction | PredictionKind) -> tuple[float, float]:
    """The times between which samples of a prediction type are integrated.

    As a velocity, the errors of a noise or score prediction are multiplied by 1 / a_t, those of a
    data prediction by 1 / s_t; at t = 1 all but the velocity are 0 / 0.
    """
    return _RANGES[Prediction.of(prediction).kind]


def time_grid(
    steps: int,
    *,
    shift: float = 1.0,
    coarse: float | None = None,
    start: float = 0.0,
    end: float = 1.0,
) -> Tensor:
    """Spaces the steps of a fixed-step solver, denser near noise or near data.

    Args:
        steps: How many steps, M.
        shift: s of the shift `v -> s v / (1 + (s - 1) v)` on [0, 1], default 1: even steps. Below 1
            there are more near noise. Papers that count from data to noise use 1 / s.
        coarse: The end of a large first step, default None: a step like the others.
        start: First time, default 0.
        end: Last time, default 1.

    Returns:
        (M + 1,), float64, ascending, from `start` to `end`.

    Raises:
        ValueError: On numbers out of range.

    Example:
        >>> from stagewise.sampling import time_grid
        >>> time_grid(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"Expected 0 <= start < end <= 1, got {start} and {end}.")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"Expected `shift` above 0, got {shift}.")
    if coarse is not None:
        if not start < coarse < end:
            raise ValueError(f"Expected `coarse` between {start} and {end}, got {coarse}.")
        if steps < 2:
            raise ValueError(
                f"Expected `steps` of at least 2 with `coarse`, one of them coarse, got {steps}."
            )
        rest = time_grid(steps - 1, shift=shift, start=coarse, end=end)
        return torch.cat([rest.new_tensor([start]), rest])
    if steps < 1:
        raise ValueError(f"Expected `steps` of at least 1, got {steps}.")
    ends = shift_times(torch.tensor([start, end], dtype=torch.float64), 1 / shift)
    first, last = ends.tolist()
    times = shift_times(torch.linspace(first, last, steps + 1, dtype=torch.float64), shift)
    times[0], times[-1] = start, end
    return times


def guided(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Adds classifier-free guidance to a velocity, within an interval of t.

    Args:
        conditional: Velocity given the label.
        unconditional: Velocity of the null label; not asked outside the interval.
        scale: Guidance weight w; 1 is none.
        interval: Where it applies, in t (0 = noise), ends included; default everywhere.
        channels: Number of channels to guide, the first ones, default all. The public samplers of
            DiT, SiT and LightningDiT guide 3, of 4 and of 32.

    Raises:
        ValueError: If `interval` is not within [0, 1], or `channels` is below 1; when called, if
            the samples have fewer.

    Example:
        >>> import torch
        >>> from stagewise.sampling import guided
        >>> u = guided(lambda x, t: x, lambda x, t: 0 * x, scale=2.0, interval=(0.3, 0.6))
        >>> [float(u(torch.ones(1, 1), torch.tensor([t]))) for t in (0.1, 0.5)]
        [1.0, 2.0]
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"Expected `interval` with 0 <= low < high <= 1, got {low} and {high}.")
    if channels is not None and channels < 1:
        raise ValueError(f"Expected `channels` of at least 1, got {channels}.")
    everywhere = low == 0 and high == 1

    def velocity(xt: Tensor, t: Tensor) -> Tensor:
        with_label = conditional(xt, t)
        if scale == 1 or not (everywhere or low - _ROUNDING <= float(t[0]) <= high + _ROUNDING):
            return with_label
        without = unconditional(xt, t)
        if channels is None:
            return without + scale * (with_label - without)
        if channels > xt.shape[1]:
            raise ValueError(
                f"Expected `channels` of at most the sample's {xt.shape[1]}, got {channels}."
            )
        label, null = with_label[:, :channels], without[:, :channels]
        return torch.cat([null + scale * (label - null), with_label[:, channels:]], 1)

    return velocity


def guidance_interval(collapsed: float) -> tuple[float, float] | None:
    """An interval for guidance from the collapsed boundary: a first guess, to be tuned.

    It goes from there to 0.6, after one table (second-hand; Liu et al., arXiv 2512.02826, Tab. 3).
    None if the boundary is unknown, or 0.5 and later.
    """
    return (collapsed, 0.6) if 0 < collapsed < 0.5 else None


@torch.no_grad()
def sample(
    velocity: Velocity,
    x0: Tensor,
    *,
    method: str = "midpoint",
    steps: int = 25,
    start: float = 0.0,
    end: float = 1.0,
    times: Tensor | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Tensor:
    """Draws samples: integrates a velocity from noise to data, in float32 at least.

    Args:
        velocity: `u(x_t, t)`.
        x0: State at `start`, noise if that is 0, (B, *).
        method: One of `FIXED_SOLVERS` or `ADAPTIVE_SOLVERS`, default "midpoint".
        steps: Steps of a fixed-step solver, default 25; midpoint takes two velocities per step.
            The public samplers of SiT and LightningDiT count the M + 1 times instead: their
            num_steps = 250 is 249 here.
        start: Time of `x0`, default 0.
        end: Time of the result, default 1; see `integration_range`.
        times: The times of a fixed-step solver, ascending, (M + 1,), as from `time_grid`, in place
            of `steps`, `start` and `end`.
        rtol: Relative tolerance of an adaptive solver, default 1e-4. SiT's commands have 1e-3.
        atol: Absolute tolerance, default 1e-4. SiT's commands have 1e-6.

    Returns:
        The state at `end`, (B, *).

    Raises:
        ValueError: On an unknown solver, numbers out of range, or `times` for an adaptive solver.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> from stagewise.sampling import sample
        >>> oracle = Oracle(LatentBank(torch.randn(100, 8)))  # the ideal model of these rows
        >>> sample(oracle.velocity, torch.randn(4, 8), steps=10).shape
        torch.Size([4, 8])
    """
    known = FIXED_SOLVERS + ADAPTIVE_SOLVERS
    if method not in known:
        raise ValueError(f"Expected `method` among {known}, got {method!r}.")
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"Expected `rtol` and `atol` above 0, got {rtol} and {atol}.")
    if times is not None and method in ADAPTIVE_SOLVERS:
        raise ValueError(
            f"Expected no `times` with {method!r}, which chooses its own. Those with given times "
            f"are {FIXED_SOLVERS}."
        )
    # In 16 bits time would have few values and small steps would be lost.
    wide = torch.promote_types(x0.dtype, torch.float32)
    grid = time_grid(steps, start=start, end=end) if times is None else checked_times(times)
    grid = grid.to(x0.device, wide)
    times = grid[[0, -1]]
    options: dict[str, object]
    if method in FIXED_SOLVERS:
        # The solver's own grid may end with a step of length 0, by rounding: with 61 steps it does.
        options = {"grid_constructor": lambda *_: grid}
    else:
        # By default it steps beyond the end, where models are not trained, and interpolates back.
        options = {"step_t": times[1:]}
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
    steps: int = 25,
    start: float = 0.0,
    end: float = 1.0,
    times: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Draws samples with one velocity up to the time `at` and with another from there.

    The oracle may be either: it is singular at t = 1, which "euler" and "midpoint" never reach.
    With the other solvers stop at 0.999.

    Args:
        first: Velocity before `at`.
        second: Velocity from there.
        x0: State at `start`, (B, *).
        at: Time of the switch, in [0, 1].
        steps: Steps from `start` to `end`; each part has its share of them, rounded up.
        start: Time of `x0`, default 0.
        end: Time of the result, default 1.
        times: As in `sample`; `at` is added.
        **options: `method`, `rtol` and `atol` of `sample`.

    Returns:
        The state at `end`, (B, *).

    Raises:
        ValueError: As `sample`, or if `at` is outside [0, 1].
    """
    if not 0 <= at <= 1:
        raise ValueError(f"Expected `at` in [0, 1], got {at}.")
    if times is not None:
        start, end = (float(t) for t in checked_times(times)[[0, -1]])
    if not 0 <= start < end <= 1:
        raise ValueError(f"Expected 0 <= start < end <= 1, got {start} and {end}.")
    x, parts = x0, ((first, start, min(at, end)), (second, max(at, start), end))
    for velocity, begin, stop in parts:
        if begin < stop:
            # Less a rounding error, so that 0.2 of 25 steps are 5.
            share = math.ceil(steps * (stop - begin) / (end - start) - 1e-9)
            own = None if times is None else times_between(times, begin, stop)
            x = sample(velocity, x, steps=share, start=begin, end=stop, times=own, **options)
    return x


def checked_times(times: Tensor) -> Tensor:
    """Times for a solver as float64 on the host.

    Raises:
        ValueError: If they do not ascend within [0, 1].
    """
    known = times.detach().cpu().double()
    # Times that are equal in float32 would be a step of length 0.
    ascending = known.ndim == 1 and len(known) > 1 and bool((known.float().diff() > 0).all())
    if not (ascending and known[0] >= 0 and known[-1] <= 1):
        raise ValueError(
            f"Expected `times` ascending within [0, 1], (M + 1,), got shape {tuple(known.shape)}, "
            f"beginning with {[round(t, 6) for t in known.flatten()[:3].tolist()]}."
        )
    return known


def times_between(times: Tensor, begin: float, stop: float) -> Tensor:
    """The times of a grid from `begin` to `stop`, with these two as ends."""
    known, near = checked_times(times), 1e-6
    inside = known[(known > begin + near) & (known < stop - near)]
    return torch.cat([known.new_tensor([begin]), inside, known.new_tensor([stop])])
