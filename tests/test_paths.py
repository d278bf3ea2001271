"""Paths, prediction types and conventions: derivatives, identities, and the formulas of peers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stagewise import (
    DIFFUSERS,
    STAGEWISE,
    AtStep,
    Convention,
    CosinePath,
    EDMPath,
    LatentBank,
    LinearPath,
    Oracle,
    Path,
    PathCoefficients,
    Phase,
    Phases,
    Prediction,
    Scheme,
    VPPath,
    same_path,
)
from stagewise.adapters.base import Place, TargetMaker
from stagewise.adapters.network_search import NetworkSearch
from stagewise.losses import FlowMatchingLoss

PATHS = [LinearPath(), CosinePath(), VPPath(), EDMPath()]
KINDS = ["velocity", "data", "noise", "score", "v", "edm"]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_derivatives_equal_autograd(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = path(t)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        if value.requires_grad:
            (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        else:
            expected = torch.zeros_like(t)
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_snr_grows_and_inverts(path):
    t = torch.linspace(0, 0.999, 300, dtype=torch.float64)
    rho = path.snr_sqrt(t)
    assert (rho.diff() > 0).all()
    for i in (1, 100, 250):
        assert path.time_of_snr_sqrt(float(rho[i])) == pytest.approx(float(t[i]), abs=1e-9)
    assert path.time_of_snr_sqrt(0.0) == pytest.approx(0, abs=1e-12)


def test_ends():
    ends = torch.tensor([0.0, 1.0])
    for path in (LinearPath(), CosinePath()):
        torch.testing.assert_close(path(ends).alpha, ends)
        torch.testing.assert_close(path(ends).sigma, 1 - ends)
    vp = VPPath()(ends.double())
    assert float(vp.alpha[0]) == pytest.approx(math.exp(-0.25 * 19.9 - 0.05))
    assert vp.sigma[1] == 0
    torch.testing.assert_close(vp.alpha**2 + vp.sigma**2, torch.ones(2).double())
    edm = EDMPath()(ends.double())
    torch.testing.assert_close(edm.sigma, torch.tensor([80, 0.002]).double())


def test_edm_times_invert_and_follow_the_published_schedule():
    path = EDMPath()
    # Karras et al., Eq. 5 with N = 18 steps: sigma_i for i = 0 .. 17 is our sigma at t = i / 17.
    i = torch.arange(18, dtype=torch.float64) / 17
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(path(i).sigma, expected)
    torch.testing.assert_close(path.time_of_sigma(expected), i, rtol=1e-9, atol=1e-12)
    assert path.time_of_sigma(torch.tensor(0.0)) == 1


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_target_is_linear_in_x1_and_xt_and_gives_the_velocity_back(path, kind):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    at, xt = path(t), path.interpolate(x0, x1, t)
    prediction = Prediction(kind)
    c, b = prediction.coefficients(at)
    y = prediction.target(at, x0, x1)
    torch.testing.assert_close(c[:, None] * x1 + b[:, None] * xt, y, rtol=1e-8, atol=1e-8)
    velocity = at.d_alpha[:, None] * x1 + at.d_sigma[:, None] * x0
    torch.testing.assert_close(prediction.to_velocity(at, y, xt), velocity, rtol=1e-6, atol=1e-6)


def test_edm_target_is_the_preconditioned_network_target():
    # Karras et al., Table 1: D(x) = c_skip x + c_out F, so F = (x_1 - c_skip x)/c_out.
    path, sd = EDMPath(), 0.5
    x0, x1 = torch.randn(2, 9, 5, dtype=torch.float64)
    at = path(torch.linspace(0, 1, 9, dtype=torch.float64))
    sigma = at.sigma[:, None]
    skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
    expected = (x1 - skip * (x1 + sigma * x0)) / out
    torch.testing.assert_close(Prediction("edm").target(at, x0, x1), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "edm"])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), EDMPath()], ids=repr)
def test_targets_are_finite_at_both_ends(path, kind):
    x0, x1 = torch.randn(2, 2, 5)
    assert Prediction(kind).target(path(torch.tensor([0.0, 1.0])), x0, x1).isfinite().all()


@given(st.floats(0, 1), st.floats(-1000, 1000), st.floats(1, 1000), st.sampled_from([1, -1]))
def test_conventions_round_trip(t, noise_time, span, sign):
    convention = Convention(noise_time, noise_time + sign * span, sign)
    value = torch.tensor(t, dtype=torch.float64)
    back = convention.to_t(convention.from_t(value))
    torch.testing.assert_close(back, value, rtol=0, atol=1e-9)


def test_named_conventions():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(STAGEWISE.from_t(t), t)
    assert torch.equal(DIFFUSERS.from_t(t), torch.tensor([1000.0, 750.0, 0.0]))
    assert DIFFUSERS.sign == -1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prediction("epsilon"), "Expected `prediction` to be one of .*got 'epsilon'"),
        (lambda: VPPath(2, 1), "beta_min"),
        (lambda: EDMPath(0, 1), "sigma_min"),
        (lambda: Convention(1, 1), "two different times"),
        (lambda: Convention(sign=0), "`sign`"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_formulas_of_torchcfm():
    cfm = pytest.importorskip("torchcfm")
    torch.manual_seed(0)
    x0, x1, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.rand(4)
    pairs = [
        (cfm.ConditionalFlowMatcher(sigma=0.0), LinearPath()),
        (cfm.VariancePreservingConditionalFlowMatcher(sigma=0.0), CosinePath()),
    ]
    for matcher, path in pairs:
        _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, t)
        torch.testing.assert_close(path.interpolate(x0, x1, t), xt)
        torch.testing.assert_close(Prediction("velocity").target(path(t), x0, x1), ut)


def test_formulas_of_flow_matching():
    pytest.importorskip("flow_matching")
    from flow_matching.path import scheduler as schedulers

    t = torch.linspace(0.01, 0.99, 20)
    pairs = [
        (schedulers.CondOTScheduler(), LinearPath()),
        (schedulers.CosineScheduler(), CosinePath()),
        (schedulers.VPScheduler(), VPPath()),
    ]
    for scheduler, path in pairs:
        theirs = scheduler(t)
        for ours, name in zip(
            path(t), ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t"), strict=True
        ):
            torch.testing.assert_close(ours, getattr(theirs, name), rtol=2e-4, atol=1e-5, msg=name)


class Polynomial(Path):
    """A schedule of another library, whose class hides its degree."""

    def __init__(self, n):
        self.coefficients = lambda t: (t**n, 1 - t**n, n * t ** (n - 1), -n * t ** (n - 1))

    def __call__(self, t):
        return PathCoefficients(*self.coefficients(t))

    def __repr__(self):
        return "Polynomial()"


def test_paths_are_compared_by_their_numbers():
    square, cube = Polynomial(2), Polynomial(3)
    assert repr(square) == repr(cube)
    assert not same_path(square, cube)
    assert same_path(square, Polynomial(2))
    assert same_path(VPPath(0.1, 20), VPPath(0.1, 20.0))
    assert same_path(Polynomial(1), LinearPath())
    oracle = Oracle(LatentBank(torch.randn(4, 2)), square)
    alike = r"Polynomial\(\), got one that prints alike but differs"
    for make in (
        lambda: Scheme(oracle, path=cube),
        lambda: Phases([Phase(Scheme(oracle), AtStep(1)), Phase(Scheme(path=cube))]),
        lambda: FlowMatchingLoss(cube, scheme=Scheme(oracle)),
    ):
        with pytest.raises(ValueError, match=alike):
            make()
    with pytest.raises(ValueError, match=r"path of the oracle, Polynomial\(\), got LinearPath"):
        Scheme(oracle, path=LinearPath())
    whole = Scheme(Oracle(oracle.bank, VPPath(0.1, 20)), path=VPPath(0.1, 20.0))
    Phases([Phase(whole, AtStep(1)), Phase(Scheme(path=VPPath(0.1, 20.0)))])
    FlowMatchingLoss(VPPath(0.1, 20.0), scheme=whole)


def test_a_network_is_searched_on_all_paths_that_differ():
    class PlainMaker(TargetMaker):
        def observe(self, tell):
            raise NotImplementedError

        def _attach(self, scheme):
            raise NotImplementedError

    place = Place(object(), "module")
    makers = [PlainMaker(place, path) for path in (Polynomial(2), Polynomial(3), Polynomial(2))]
    search = NetworkSearch(nn.Linear(2, 2), makers, lambda: [("batch[0]", torch.randn(4, 2))], None)
    search.stop()
    assert search.makers == makers[:2]
