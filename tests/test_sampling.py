"""Sampling with a kept solver: exact flows, prediction types, guidance."""

import pytest
import torch

from stagewise import DIFFUSERS, CosinePath, LatentBank, LinearPath, Oracle, Prediction
from stagewise.sampling import (
    FIXED_SOLVERS,
    guidance_interval,
    guided,
    integration_range,
    model_velocity,
    sample,
    switched,
    time_grid,
)

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
    for interval, end in (((0, 1), 3.0), ((0.25, 0.5), 1.5), ((0.9, 0.95), 1.1)):
        asked.clear()
        field = guided(conditional, unconditional, 3.0, interval)
        x1 = sample(field, x0, method="euler", steps=400)
        assert (x1 - end).abs().max() < 0.02
        assert all(interval[0] - 1e-6 <= t <= interval[1] + 1e-6 for t in asked)
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


# -- grids of times ---------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 0.3, 0.1, 4.0])
def test_a_shifted_grid_is_the_formula(shift):
    expected = [shift * (m / 8) / (1 + (shift - 1) * m / 8) for m in range(9)]
    times = time_grid(8, shift=shift)
    assert times.dtype == torch.float64
    torch.testing.assert_close(
        times, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert times[0] == 0
    assert times[-1] == 1


def test_a_grid_that_starts_later_is_that_part_of_a_whole_one():
    whole = time_grid(10, shift=0.4)
    part = time_grid(5, shift=0.4, start=float(whole[3]), end=float(whole[8]))
    torch.testing.assert_close(part, whole[3:9], rtol=1e-14, atol=0)
    even = time_grid(4, start=0.2, end=0.6)
    torch.testing.assert_close(even, torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6]).double())
    assert (even[0], even[-1]) == (0.2, 0.6)


def test_a_coarse_grid_has_one_step_to_there():
    times = time_grid(5, coarse=0.2)
    torch.testing.assert_close(times, torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]).double())
    times = time_grid(7, coarse=0.25, shift=0.5, start=0.02, end=0.99)
    assert len(times) == 8
    assert times[0] == 0.02
    assert torch.equal(times[1:], time_grid(6, shift=0.5, start=0.25, end=0.99))


@pytest.mark.parametrize("method", FIXED_SOLVERS)
def test_every_number_of_steps_is_that_many(method):
    # A grid by step size has one of length 0 more at its end for 61 and 109 steps.
    per_step = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}[method]
    for steps in (1, 7, 61, 109):
        asked = []
        sample(lambda x, t: asked.append(t) or x, torch.zeros(1, 1), method=method, steps=steps)  # noqa: B023
        assert len(asked) == steps * per_step


def test_a_solver_asks_at_the_times_of_its_grid():
    times, asked = time_grid(6, shift=0.3, coarse=0.1), []

    def velocity(xt, t):
        asked.append(float(t[0]))
        return xt

    sample(velocity, torch.zeros(1, 1).double(), method="euler", times=times)
    assert asked == times[:-1].tolist()


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
@pytest.mark.parametrize("shift", [1.0, 0.3, 3.0])
@pytest.mark.parametrize("coarse", [None, 0.2])
def test_solvers_keep_their_order_on_any_grid(method, order, shift, coarse):
    # Times are float64 as the state is, or rounding would hide the fourth order.
    field, x0 = gaussian_velocity(LinearPath()), torch.linspace(-2, 2, 9).double()[:, None]
    begin, x = 0.0, x0
    if coarse is not None:
        # The one large step has its error; from there the flow is affine again.
        begin, x = coarse, sample(field, x0, method=method, steps=1, end=coarse)
    spread = ((begin * STD) ** 2 + (1 - begin) ** 2) ** 0.5
    exact = MEAN + STD / spread * (x - begin * MEAN)
    errors = []
    for steps in (64, 128):
        times = time_grid(steps + (coarse is not None), shift=shift, coarse=coarse)
        errors.append(float((sample(field, x0, method=method, times=times) - exact).abs().max()))
    assert errors[0] < 0.1
    # At least: for this flow the midpoint rule is of the third order.
    assert errors[0] / errors[1] > 0.85 * 2**order
    if method == "euler":
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_a_shift_puts_steps_where_they_are_asked_for():
    times = time_grid(50, shift=0.3)
    assert int((times[:-1] < 0.2).sum()) == pytest.approx(50 * 0.2 / (0.3 + 0.7 * 0.2), abs=1)


def test_grids_refuse_what_is_no_grid():
    for start, end in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="0 <= start < end <= 1"):
            time_grid(4, start=start, end=end)
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`shift` above 0"):
            time_grid(4, shift=shift)
    with pytest.raises(ValueError, match="`steps` of at least 1, got 0"):
        time_grid(0)
    with pytest.raises(ValueError, match="`steps` of at least 2 with `coarse`"):
        time_grid(1, coarse=0.5)
    for coarse in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"`coarse` between 0\.0 and 1\.0"):
            time_grid(4, coarse=coarse)
    for times in ([0.0, 0.5, 0.5, 1.0], [0.5], [0.0, 1.5], [[0.0, 1.0]], [-0.5, 1.0]):
        for solve in (sample, lambda *a, **k: switched(a[0], a[0], a[1], 0.5, **k)):
            with pytest.raises(ValueError, match="`times` ascending"):
                solve(lambda x, t: x, torch.zeros(1, 1), times=torch.tensor(times))
    with pytest.raises(ValueError, match="no `times` with 'dopri5'.*'euler'"):
        sample(lambda x, t: x, torch.zeros(1, 1), method="dopri5", times=time_grid(4))


def test_a_switch_is_put_into_the_grid():
    asked = {"first": [], "second": []}

    def field(name):
        return lambda x, t: asked[name].append(float(t[0])) or torch.ones_like(x)

    times = time_grid(4)
    for at, first, second in (
        (0.3, [0.0, 0.25], [0.3, 0.5, 0.75]),
        (0.5, [0.0, 0.25], [0.5, 0.75]),
        (0.0, [], [0.0, 0.25, 0.5, 0.75]),
        (1.0, [0.0, 0.25, 0.5, 0.75], []),
    ):
        asked["first"].clear()
        asked["second"].clear()
        x0 = torch.zeros(1, 1).double()
        x = switched(field("first"), field("second"), x0, at, method="euler", times=times)
        assert x.item() == pytest.approx(1, abs=1e-12)
        assert asked == {"first": first, "second": second}


# -- guidance and ranges ----------------------------------------------------------------------


def test_guidance_of_some_channels_leaves_the_others():
    label, null = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    t = torch.tensor([0.5, 0.5])
    u = guided(lambda x, t: label, lambda x, t: null, 3.0, (0.4, 0.6), 2)(label, t)
    torch.testing.assert_close(u[:, :2], null[:, :2] + 3 * (label - null)[:, :2])
    assert torch.equal(u[:, 2:], label[:, 2:])
    outside = guided(lambda x, t: label, lambda x, t: null, 3.0, (0.6, 0.7), 2)(label, t)
    assert torch.equal(outside, label)
    with pytest.raises(ValueError, match="`channels` of at least 1, got 0"):
        guided(lambda x, t: x, lambda x, t: x, 3.0, channels=0)
    with pytest.raises(ValueError, match="at most the sample's 5, got 6"):
        guided(lambda x, t: label, lambda x, t: null, 3.0, channels=6)(label, t)


def test_predictions_stop_where_they_are_singular():
    t = torch.tensor([0.0, 1.0]).double()
    for kind in ("velocity", "data", "noise", "score", "edm"):
        ends = torch.tensor(integration_range(kind)).double()
        path = LinearPath()(ends)
        # Of y and x_t in the velocity: bounded at the ends of the range.
        bounded = Prediction(kind).to_velocity(path, torch.ones(2, 1), torch.ones(2, 1))
        assert bounded.isfinite().all()
        assert bounded.abs().max() < 1e4
        at_ends = Prediction(kind).to_velocity(LinearPath()(t), torch.ones(2, 1), torch.ones(2, 1))
        for got, want, value in zip(ends, t, at_ends, strict=True):
            assert (got == want) == bool(value.isfinite().all())


def test_the_interval_of_guidance():
    assert [guidance_interval(t) for t in (0.06, 0.49)] == [(0.06, 0.6), (0.49, 0.6)]
    assert all(guidance_interval(t) is None for t in (0.5, 0.7, float("nan"), 0.0, 1.0))
