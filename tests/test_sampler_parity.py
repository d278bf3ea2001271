"""Trajectories of the public samplers against re-derivations in float64: guidance, shift, ODE, SDE.

The public conventions (SiT's and LightningDiT's transport): N grid points for an ODE; for an SDE N
points up to 1 - h and the last step from there; guidance on the first three channels.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from stagewise import CosinePath, LinearPath
from stagewise.sampling import guided, sample, time_grid
from stagewise.sde import DIFFUSIONS, LAST_STEPS, sample_sde, sde_grid

X0 = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
SCALE, CHANNELS = 3.0, 3


def given(x, t):
    """A velocity given the label; numpy and torch alike."""
    return (
        x * (0.3 - t) + (0.7 * x).tanh() * t
        if torch.is_tensor(x)
        else x * (0.3 - t) + np.tanh(0.7 * x) * t
    )


def null(x, t):
    return -0.4 * x + t


def field(interval, channels=CHANNELS):
    def wide(f):
        return lambda x, t: f(x, t[:, None, None].to(x))

    return guided(wide(given), wide(null), SCALE, interval, channels)


def by_hand(x, t, inside, channels=CHANNELS):
    v = given(x, t)
    if inside:
        v = v.copy()
        u = null(x, t)[:, :channels]
        v[:, :channels] = u + SCALE * (v[:, :channels] - u)
    return v


def shifted(steps, s):
    """The grid as fractions, where membership of an interval is exact."""
    return [s * v / (1 + (s - 1) * v) for v in (Fraction(i, steps) for i in range(steps + 1))]


@pytest.mark.parametrize("shift", ["1", "3/10"])
@pytest.mark.parametrize("steps", [49, 50, 100, 249])
def test_euler_with_an_interval_whose_ends_are_on_the_grid(steps, shift):
    grid = shifted(steps, Fraction(shift))
    low, high = grid[steps // 9], grid[2 * steps // 3]
    x, guided_steps = X0.double().numpy(), 0
    for t, after in zip(grid, grid[1:], strict=False):
        inside = low <= t <= high
        guided_steps += inside
        x = x + float(after - t) * by_hand(x, float(t), inside)
    assert guided_steps == 2 * steps // 3 - steps // 9 + 1
    times = time_grid(steps, shift=float(Fraction(shift)))
    # The ends as one writes them, in double precision; the times arrive in float32.
    found = sample(field((float(low), float(high))), X0, method="euler", times=times)
    assert np.abs(found.numpy() - x).max() < 1e-5
    # One step less would be seen.
    less = sample(field((float(low) + 1e-4, float(high))), X0, method="euler", times=times)
    assert np.abs(less.numpy() - x).max() > 1e-3


@pytest.mark.parametrize("number", [0.11, 0.6, 0.7])
def test_a_float32_time_at_the_end_is_inside(number):
    t = torch.full((3,), number)  # above the double of the same name, or below it
    assert float(t[0]) != number
    for interval in ((number, 1.0), (0.0, number)):
        assert not torch.equal(field(interval)(X0, t), given(X0, number))


@pytest.mark.parametrize("interval", [(0.6, 0.1), (-0.1, 0.5), (0.5, 1.1), (0.3, 0.3)])
def test_an_interval_outside_is_refused(interval):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        field(interval)


def test_heun_and_dopri5():
    low, high = 0.11, 0.6
    x, grid = X0.double().numpy(), np.linspace(0, 1, 101)
    for t, after in zip(grid, grid[1:], strict=False):
        ends = [low - 1e-9 <= each <= high + 1e-9 for each in (t, after)]
        first = by_hand(x, t, ends[0])
        x = x + (after - t) / 2 * (first + by_hand(x + (after - t) * first, after, ends[1]))
    found = sample(field((low, high)), X0, method="heun2", steps=100)
    assert np.abs(found.numpy() - x).max() < 1e-5

    y = X0.double().numpy().ravel()
    for start, end, inside in ((0, low, False), (low, high, True), (high, 1, False)):
        flow = lambda t, y, i=inside: by_hand(y.reshape(X0.shape), t, i).ravel()  # noqa: E731
        y = solve_ivp(flow, (start, end), y, rtol=1e-10, atol=1e-12).y[:, -1]
    asked = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-11}
    found = sample(field((low, high)), X0.double(), **asked).numpy()
    assert np.abs(found.ravel() - y).max() < 1e-5
    loose = sample(field((low, high)), X0.double(), method="dopri5", rtol=1e-1, atol=1e-1).numpy()
    assert np.abs(loose.ravel() - y).max() > 1e-3


def coefficients(path, t):
    if isinstance(path, LinearPath):
        return t, 1 - t, 1.0, -1.0
    half = math.pi / 2
    return (
        math.sin(half * t),
        math.cos(half * t),
        half * math.cos(half * t),
        -half * math.sin(half * t),
    )


def sde_by_hand(path, method, form, norm, last, h, points, start, noise, interval):
    """N points from `start` to 1 - h, then the last step; all in float64."""

    def strength(t):
        a, s, da, ds = coefficients(path, t)
        return {
            "constant": lambda: norm,
            "sbdm": lambda: norm * (s * s * da / a - s * ds),
            "sigma": lambda: norm * s,
            "linear": lambda: norm * (1 - t),
            "decreasing": lambda: 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
            "increasing-decreasing": lambda: norm * math.sin(math.pi * t) ** 2,
        }[form]()

    def parts(x, t):
        a, s, da, ds = coefficients(path, t)
        v = by_hand(x, t, interval[0] - 1e-9 <= t <= interval[1] + 1e-9)
        # From v = E[a' x_1 + s' x_0 | x] and x = E[a x_1 + s x_0 | x].
        score = (a * v / da - x) / (s * s - a * ds * s / da)
        return v, score, v + strength(t) * score

    end = 1 - h if last != "none" else 1.0
    grid, x = np.linspace(start, end, points), X0.double().numpy()
    dt = grid[1] - grid[0]
    for t, z in zip(grid[:-1], noise, strict=False):
        kick = math.sqrt(2 * strength(t) * dt) * z
        if method == "sde-euler":
            x = x + dt * parts(x, t)[2] + kick
        else:
            x = x + kick
            k1 = parts(x, t)[2]
            x = x + dt / 2 * (k1 + parts(x + dt * k1, t + dt)[2])
    v, score, drift = parts(x, end) if last != "none" else (0, 0, 0)
    a, s, *_ = coefficients(path, end)
    return {
        "none": lambda: x,
        "mean": lambda: x + h * drift,
        "euler": lambda: x + h * v,
        "tweedie": lambda: x / a + s * s / a * score,
    }[last]()


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
@pytest.mark.parametrize("form", DIFFUSIONS)
@pytest.mark.parametrize("method", ["sde-euler", "sde-heun"])
def test_stochastic_trajectories(path, form, method):
    for last in LAST_STEPS:
        if (method, last) == ("sde-heun", "none"):
            continue
        points, h, norm = 30, 0.04, 0.7
        start = 1e-3 if form == "sbdm" else 0.0
        noise = np.random.default_rng(0).standard_normal((points, *X0.shape))
        interval = (0.2, 0.6)
        wanted = sde_by_hand(path, method, form, norm, last, h, points, start, noise, interval)
        draws = iter(torch.from_numpy(noise))
        # SiT's N points are N - 1 steps, and its last step is one more.
        steps = points if last != "none" else points - 1
        found = sample_sde(
            field(interval),
            X0.double(),
            path=path,
            method=method,
            diffusion=form,
            norm=norm,
            last_step=last,
            last_size=h,
            steps=steps,
            start=start,
            noise=lambda draws=draws: next(draws),
        )
        assert np.abs(found.numpy() - wanted).max() < 1e-5 * max(1, np.abs(wanted).max()), last
        assert len(list(draws)) == 1  # a draw for each step but the last


def test_the_equation_keeps_the_distribution():
    # Data N(2, 0.5^2): the velocity is known, and so is what must come out.
    def velocity(x, t):
        t = t[:, None]
        variance = (t * 0.5) ** 2 + (1 - t) ** 2
        return 2 + (t * 0.25 - (1 - t)) / variance * (x - 2 * t)

    x0 = torch.randn(40000, 1, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    for form in DIFFUSIONS:
        start = 1e-3 if form == "sbdm" else 0.0
        noise = lambda: torch.randn(x0.shape, generator=draws)  # noqa: E731
        about = {"diffusion": form, "last_step": "euler", "steps": 200, "start": start}
        x = sample_sde(velocity, x0, noise=noise, **about)
        assert x.mean() == pytest.approx(2, abs=0.02), form
        assert x.std() == pytest.approx(0.5, abs=0.02), form


def test_shift_and_refusals():
    times = sde_grid(10, "mean", 0.1, shift=0.3)
    assert len(times) == 10
    assert float(times[-1]) == pytest.approx(0.9)
    cases = {
        "method": {"method": "euler"},
        "diffusion": {"diffusion": "flat"},
        "last_step": {"last_step": "Mean"},
        "norm": {"norm": -1.0},
        "start=0.001": {"diffusion": "sbdm"},
        "t = 1, where there is none": {"method": "sde-heun", "last_step": "none"},
        "last_size": {"last_size": 1.0},
        "steps": {"steps": 1},
    }
    for message, about in cases.items():
        with pytest.raises(ValueError, match=message):
            sample_sde(lambda x, t: x, X0, **about)
