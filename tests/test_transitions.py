"""When phases end: steps, shares, and the plateau detector on synthetic curves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise import AtPlateau, AtShare, AtStep
from stagewise.transitions import is_flat

BOUNDARY = 0.4


def run(until, curve, *, noise=0.0, seed=0, batch=32, steps=6000):
    """The step at which it fires for losses around `curve(step)`, None if it does not."""
    draws = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        t = torch.from_numpy(draws.random(batch))
        loss = curve(step) + noise * torch.from_numpy(draws.standard_normal(batch))
        # In refinement losses go on as they like.
        loss = torch.where(t < BOUNDARY, loss, 5.0 + step)
        if until.observe(step, steps, t, loss, BOUNDARY) is not None:
            return step
    return None


def decay_to_plateau(step, start=2.0, floor=1.2, scale=300.0):
    return floor + (start - floor) * math.exp(-step / scale)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_a_noisy_decay_ends_at_its_plateau(noise, seed):
    """Within the stated window: after 2 and before 10 time constants (600 to 3000 steps)."""
    until = AtPlateau(25, window=8, patience=3)
    step = run(until, decay_to_plateau, noise=noise, seed=seed)
    assert step is not None
    assert 600 < step < 3000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "curve",
    [
        lambda step: 3 - step / 4000,
        lambda step: 1 + 8 * step**-0.35,
        lambda step: 2 * math.exp(-step / 2500),
    ],
    ids=["line", "power law", "exponential"],
)
def test_a_decay_that_goes_on_does_not_end(curve, seed):
    assert run(AtPlateau(25), curve, noise=0.02, seed=seed, steps=3000) is None


@pytest.mark.parametrize("seed", range(5))
def test_constant_noise_is_a_plateau(seed):
    until = AtPlateau(10, window=8, patience=3)
    step = run(until, lambda step: 1.0, noise=0.2, seed=seed, steps=1500)
    first = until.check(0, None)
    assert first == 10 * (2 * 8 + 3 - 1)
    assert first <= step <= 3 * first


def test_a_constant_fires_as_early_as_it_can():
    until = AtPlateau(10, window=6, patience=2)
    assert run(until, lambda step: 1.0) == until.check(0, None) == 130


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_units_of_the_loss_do_not_matter(scale, shift, seed):
    draws = np.random.default_rng(seed)
    y = np.exp(-np.arange(20) / draws.uniform(2, 30)) + 0.01 * draws.standard_normal(20)
    assert is_flat(y.tolist(), 8, 0.02) == is_flat((scale * (y + shift)).tolist(), 8, 0.02)


def test_the_criterion_is_its_formula():
    y = [9.0, 8, 7, 6.5, 5, 4.4, 4.1, 4.05]
    slope, *_ = np.polyfit(range(4), y[4:], 1)
    residual = np.array(y[4:]) - np.polyval(np.polyfit(range(4), y[4:], 1), range(4))
    error = 4 * math.sqrt((residual @ residual) / 2 / 5)  # sum (x - mean)^2 = 5
    drop = np.mean(y[:4]) - np.mean(y[4:])
    tolerance = (-4 * slope - 2 * error) / drop
    assert is_flat(y, 4, tolerance + 1e-9)
    assert not is_flat(y, 4, tolerance - 1e-9)
    assert not is_flat(y[:7], 4, 1.0)  # too few


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_named(bad):
    until = AtPlateau(10)
    curve = lambda step: bad if step == 15 else 1.0  # noqa: E731
    with pytest.raises(ValueError, match="between steps 10 and 20: training has diverged"):
        run(until, curve, steps=30)
    with pytest.raises(ValueError, match="at point 1"):
        is_flat([1.0, bad, 1.0], 4, 0.1)
    # In refinement they are not looked at.
    t, loss = torch.tensor([0.1, 0.9]), torch.tensor([1.0, bad])
    until = AtPlateau(1)
    assert until.observe(1, None, t, loss, BOUNDARY) is None
    assert until.points == [1.0]


def test_steps_without_navigation_make_no_point():
    until = AtPlateau(2)
    t, loss = torch.tensor([0.9]), torch.tensor([1.0])
    for step in range(1, 9):
        until.observe(step, None, t, loss, BOUNDARY)
    assert until.points == []


def test_steps_may_be_observed_at_intervals():
    """A point is what came since the last one."""
    until = AtPlateau(20)
    for step in range(10, 90, 10):
        until.observe(step, None, torch.tensor([0.1]), torch.tensor([float(step)]), BOUNDARY)
    assert until.points == [20.0, 45.0, 65.0]


@pytest.mark.parametrize("stop", [1, 7, 10, 333, 640])
def test_a_detector_goes_on_where_it_stopped(stop):
    def observe(until, steps):
        fired = None
        for step in steps:
            draws = np.random.default_rng(step)
            t = torch.from_numpy(draws.random(16)).float()
            loss = decay_to_plateau(step) + 0.1 * torch.from_numpy(draws.standard_normal(16))
            fired = fired or until.observe(step, None, t, loss.float(), BOUNDARY)
        return fired

    one = AtPlateau(10)
    observe(one, range(1, stop + 1))
    two = AtPlateau(10)
    two.load_state_dict(one.state_dict())
    rest = range(stop + 1, stop + 200)
    assert observe(one, rest) == observe(two, rest)
    assert one.state_dict() == two.state_dict()


def test_steps_and_shares():
    assert AtStep(3).observe(2, None, None, None, None) is None
    assert "step 3" in AtStep(3).observe(3, None, None, None, None)
    assert AtShare(0.6).observe(59, 100, None, None, None) is None
    assert "60%" in AtShare(0.6).observe(60, 100, None, None, None)
    with pytest.raises(ValueError, match="number of steps of training, which is not known"):
        AtShare(0.6).observe(60, None, None, None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AtStep(0), "`step` of at least 1"),
        (lambda: AtShare(1.0), "`share` between 0 and 1"),
        (lambda: AtPlateau(0), "`every` of at least 1"),
        (lambda: AtPlateau(window=3), "`window` of at least 4"),
        (lambda: AtPlateau(patience=0), "`patience` of at least 1"),
        (lambda: AtPlateau(tolerance=-0.1), r"`tolerance` in \[0, 1\)"),
        (lambda: AtStep(5).check(5, None), "end after it begins"),
        (lambda: AtStep(50).check(0, 50), "within the 50 steps"),
        (lambda: AtPlateau(50).check(0, 300), "within the 300 steps"),
        (lambda: AtPlateau().observe(1, None, None, None, 0.2), "needs the losses"),
        (
            lambda: AtPlateau().observe(1, None, torch.ones(1), torch.ones(1), None),
            "needs the boundary",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
