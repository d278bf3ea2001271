"""Sampling with a kept solver: exact flows, prediction types, guidance."""

import pytest
import torch

from stagewise import DIFFUSERS, CosinePath, LatentBank, LinearPath, Oracle, Prediction
from stagewise.sampling import guided, model_velocity, sample, switched

MEAN, STD = 2.0, 0.5


def gaussian_velocity(path):
    """The marginal velocity for data N(MEAN, STD^2), in closed form."""

    def velocity(xt, t):
        alpha, sigma, d_alpha, d_sigma = (v[:, None] for v in path(t))
        variance = (alpha * STD) ** 2 + sigma**2
        x1 = MEAN + alpha * STD**2 / variance * (xt - alpha * MEAN)
        x0 = sigma / variance * (xt - alpha * MEAN)
        return d_alpha * x1 + d_sigma * x0

    return velocity


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"),
    [("euler", 400, 6e-3), ("midpoint", 50, 2e-3), ("rk4", 25, 1e-4), ("dopri5", 1, 4e-3)],
)
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_flow_of_a_gaussian_is_affine(path, method, steps, tolerance):
    # The flow map from N(0, 1) to N(MEAN, STD^2) along a Gaussian path is x -> MEAN + STD x.
    x0 = torch.linspace(-3, 3, 13)[:, None]
    x1 = sample(gaussian_velocity(path), x0, method=method, steps=steps)
    assert x1.dtype == torch.float32
    assert (x1 - (MEAN + STD * x0)).abs().max() < tolerance


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5", "bosh3"])
def test_no_solver_leaves_the_interval(method):
    seen = []

    def velocity(xt, t):
        seen.append(float(t[0]))
        return gaussian_velocity(LinearPath())(xt, t)

    sample(velocity, torch.randn(4, 1), method=method, steps=7, start=0.1, end=0.9)
    assert min(seen) == pytest.approx(0.1)
    assert max(seen) <= 0.9 + 1e-6


def test_sixteen_bits_keep_time():
    seen = set()

    def velocity(xt, t):
        assert xt.dtype == torch.bfloat16
        seen.add(float(t[0]))
        return torch.zeros_like(xt, dtype=torch.float32)

    out = sample(velocity, torch.randn(2, 1).bfloat16(), method="euler", steps=1000)
    assert out.dtype == torch.bfloat16
    assert len(seen) == 1000


def test_more_steps_are_closer():
    x0 = torch.linspace(-3, 3, 13)[:, None]
    errors = [
        float((sample(gaussian_velocity(LinearPath()), x0, steps=n) - MEAN - STD * x0).abs().max())
        for n in (4, 8, 16)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_the_oracle_samples_its_bank():
    bank = LatentBank(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    x0 = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    x1 = sample(Oracle(bank).velocity, x0, method="dopri5", end=0.999)
    nearest = torch.cdist(x1, bank.rows).min(1)
    assert nearest.values.max() < 0.02
    assert len(nearest.indices.unique()) > 5


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "edm"])
def test_prediction_types_sample_alike(kind):
    path, prediction = LinearPath(), Prediction(kind)
    field = gaussian_velocity(path)

    def model(xt, time):
        t = DIFFUSERS.to_t(time)
        c, b = prediction.coefficients(path(t))
        c_v, b_v = Prediction("velocity").coefficients(path(t))
        x1 = (field(xt, t) - b_v[:, None] * xt) / c_v[:, None]
        return -(c[:, None] * x1 + b[:, None] * xt)

    velocity = model_velocity(model, prediction=kind, convention=DIFFUSERS)
    x0 = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = 0.01 if kind in ("noise", "score") else 0.0
    ends = {"start": start, "end": 0.99}
    expected = sample(field, x0, **ends)
    torch.testing.assert_close(sample(velocity, x0, **ends), expected, rtol=1e-4, atol=1e-4)


def test_guidance_acts_in_its_interval_only():
    asked = []

    def unconditional(xt, t):
        asked.append(float(t[0]))
        return torch.zeros_like(xt)

    def conditional(xt, t):
        return torch.ones_like(xt)

    x0 = torch.zeros(2, 1)
    for interval, end in (((0, 1), 3.0), ((0.25, 0.5), 1.5), ((2, 3), 1.0)):
        asked.clear()
        field = guided(conditional, unconditional, 3.0, interval)
        x1 = sample(field, x0, method="euler", steps=400)
        assert (x1 - end).abs().max() < 0.02
        assert all(interval[0] <= t <= interval[1] for t in asked)
    asked.clear()
    sample(guided(conditional, unconditional, 1.0), x0)
    assert asked == []


def test_switched_asks_each_velocity_on_its_side():
    asked = {"first": [], "second": []}

    def field(name, value):
        def velocity(xt, t):
            asked[name].append(round(float(t[0]), 5))
            return torch.full_like(xt, value)

        return velocity

    x0 = torch.zeros(2, 3)
    for at, expected in ((0, 10.0), (0.2, 8.2), (0.75, 3.25), (1, 1.0)):
        for times in asked.values():
            times.clear()
        x1 = switched(field("first", 1.0), field("second", 10.0), x0, at, method="euler", steps=20)
        torch.testing.assert_close(x1, torch.full_like(x0, expected))
        assert len(asked["first"]) == 20 * at
        assert len(asked["second"]) == 20 * (1 - at)
        assert all(t < at for t in asked["first"])
        assert all(t >= at for t in asked["second"])


def test_the_oracle_alone_reaches_its_rows_at_the_end():
    bank = LatentBank(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    x0 = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    x1 = switched(Oracle(bank).velocity, lambda x, t: x, x0, 1.0, method="euler")
    assert torch.cdist(x1, bank.rows).min(1).values.max() < 1e-4


def test_bad_arguments():
    for at in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"`at` in \[0, 1\]"):
            switched(lambda x, t: x, lambda x, t: x, torch.zeros(1, 1), at)
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        switched(lambda x, t: x, lambda x, t: x, torch.zeros(1, 1), 0.5, start=1.0)
    for start, end in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="0 <= start < end <= 1"):
            sample(lambda x, t: x, torch.zeros(1, 1), start=start, end=end)
    with pytest.raises(ValueError, match="`steps`"):
        sample(lambda x, t: x, torch.zeros(1, 1), steps=0)
    with pytest.raises(ValueError, match="`method` among .* got 'ode45'"):
        sample(lambda x, t: x, torch.zeros(1, 1), method="ode45")
