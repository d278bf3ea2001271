r"""Sampling by a stochastic differential equation, as SiT does it (Ma et al., arXiv 2401.08740).

For any `w_t >= 0` the equation

    dx = [u(x, t) + w_t score(x, t)] dt + sqrt(2 w_t) dW

has the same distribution at each t as the flow dx = u dt. On the path `x_t = a_t x_1 + s_t x_0` the
velocity gives the mean noise and with it the score,

    E[x_0 | x] = (a u - a' x) / (a s' - a' s),   score = -E[x_0 | x] / s_t.

| `diffusion` | w_t, times `norm` |
|---|---|
| constant | 1 |
| sbdm | `a'/a s^2 - s s'`, that of the forward equation; infinite where a = 0 |
| sigma | `s_t` |
| linear | `1 - t` |
| decreasing | `(norm cos(pi t) + 1)^2 / 4` |
| increasing-decreasing | `sin(pi t)^2` |

A step of Euler-Maruyama is `x + drift(x, t) dt + sqrt(2 w_t dt) z`. Heun's kicks first, `x^ = x +
sqrt(2 w_t dt) z`, and takes the mean of the drifts at `(x^, t)` and `(x^ + drift dt, t + dt)`. The
score is singular at t = 1, so the last step, of size h from 1 - h, draws nothing: "mean" takes the
drift, "euler" the velocity alone, "tweedie" is the mean of the data, `x/a + s^2/a score`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stagewise.paths import LinearPath, Path
from stagewise.sampling import Velocity, checked_times, time_grid

__all__ = ["DIFFUSIONS", "LAST_STEPS", "SDE_SOLVERS", "sample_sde"]

SDE_SOLVERS = ("sde-euler", "sde-heun")
DIFFUSIONS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler", "none")


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    x0: Tensor,
    *,
    path: Path | None = None,
    method: str = "sde-euler",
    diffusion: str = "sigma",
    norm: float = 1.0,
    last_step: str = "mean",
    last_size: float = 0.04,
    steps: int = 250,
    start: float = 0.0,
    times: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Draws samples with noise at each step: integrates the stochastic equation of SiT.

    Args:
        velocity: `u(x_t, t)`.
        x0: State at `start`, (B, *).
        path: The path of training, default `LinearPath()`.
        method: One of `SDE_SOLVERS`, default "sde-euler"; Heun's takes two velocities per step.
        diffusion: One of `DIFFUSIONS`, default "sigma", as in SiT's commands.
        norm: Factor of w_t, default 1.
        last_step: One of `LAST_STEPS`, default "mean"; "none" has no special last step.
        last_size: h, default 0.04.
        steps: All steps, the last included, default 250, as SiT's num_steps.
        start: Time of `x0`, default 0; above 0 for "sbdm".
        times: The times of all steps but the last, ascending, (M,), in place of `steps` and
            `start`; the last step begins at the last of them.
        noise: Returns the noise of a step, (B, *); default `torch.randn_like`.

    Returns:
        The state at the end, (B, *).

    Raises:
        ValueError: On an unknown name or numbers out of range.
    """
    for name, value, known in (
        ("method", method, SDE_SOLVERS),
        ("diffusion", diffusion, DIFFUSIONS),
        ("last_step", last_step, LAST_STEPS),
    ):
        if value not in known:
            raise ValueError(f"Expected `{name}` among {known}, got {value!r}.")
    if not (norm >= 0 and math.isfinite(norm)):
        raise ValueError(f"Expected `norm` of at least 0, got {norm}.")
    path, ends = path or LinearPath(), last_step == "none"
    grid = sde_grid(steps, last_step, last_size, start=start) if times is None else times
    wide = torch.promote_types(x0.dtype, torch.float32)
    grid = checked_times(grid).to(x0.device, wide)
    if method == "sde-heun" and ends and float(grid[-1]) > 1 - 1e-6:
        raise ValueError(
            f'Expected `last_step` among {LAST_STEPS[:-1]} with "sde-heun", got "none": its last '
            "step would ask for the score at t = 1, where there is none."
        )
    if not bool(_strength(path, grid[0], diffusion, norm).isfinite()):
        raise ValueError(
            f'Expected `start` above 0 with diffusion "sbdm", which is infinite at t = '
            f"{float(grid[0]):g}: start=0.001."
        )

    def asked(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity, score and drift."""
        u = velocity(x.to(x0.dtype), t.expand(len(x))).to(wide)
        a, s, da, ds = path(t)
        score = -(a * u - da * x) / ((a * ds - da * s) * s)
        return u, score, u + _strength(path, t, diffusion, norm) * score

    x = x0.to(wide)
    for t, dt in zip(grid[:-1], grid.diff(), strict=True):
        z = torch.randn_like(x) if noise is None else noise().to(x)
        kick = (2 * _strength(path, t, diffusion, norm) * dt).sqrt() * z
        if method == "sde-euler":
            x = x + asked(x, t)[2] * dt + kick
        else:
            x = x + kick
            first = asked(x, t)[2]
            x = x + dt / 2 * (first + asked(x + dt * first, t + dt)[2])
    if not ends:
        u, score, drift = asked(x, grid[-1])
        a, s, *_ = path(grid[-1])
        size = 1 - grid[-1]
        by_mean = (x + s.square() * score) / a
        x = {"mean": x + size * drift, "euler": x + size * u, "tweedie": by_mean}[last_step]
    return x.to(x0.dtype)


def sde_grid(
    steps: int, last_step: str, last_size: float, *, shift: float = 1.0, start: float = 0.0
) -> Tensor:
    """The times of all steps but the last; arguments of `sample_sde` and `time_grid`."""
    if last_step == "none":
        return time_grid(steps, shift=shift, start=start)
    if not 0 < last_size < 1 - start:
        raise ValueError(f"Expected `last_size` between 0 and {1 - start:g}, got {last_size}.")
    if steps < 2:
        raise ValueError(f"Expected `steps` of at least 2, one of them the last, got {steps}.")
    return time_grid(steps - 1, shift=shift, start=start, end=1 - last_size)


def _strength(path: Path, t: Tensor, diffusion: str, norm: float) -> Tensor:
    """w_t, of the shape of t."""
    a, s, da, ds = path(t)
    if diffusion == "decreasing":
        return (norm * torch.cos(math.pi * t) + 1).square() / 4
    if diffusion == "sbdm":
        return norm * (da / a * s.square() - s * ds)
    if diffusion == "increasing-decreasing":
        return norm * torch.sin(math.pi * t).square()
    return norm * {"constant": torch.ones_like(t), "sigma": s, "linear": 1 - t}[diffusion]
