"""Adapters of torchcfm and flow_matching, against the packages themselves."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise import LatentBank, LinearPath, LogitNormal, Oracle, Smoothing, Uniform, sources
from stagewise.adapters import (
    NoisedPath,
    ShrinkingPath,
    diffusers_target,
    find_target_makers,
    one_target_maker,
)
from stagewise.noise import check_noise
from stagewise.paths import expand_like
from stagewise.schemes import Phase, Phases, Scheme
from stagewise.targets import Mix
from stagewise.transitions import AtStep

cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
fm_path = pytest.importorskip("flow_matching.path")
fm_scheduler = pytest.importorskip("flow_matching.path.scheduler")

SHAPE = (2, 3)
ROWS = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(40) % 4

MATCHERS = {
    "icfm": lambda: cfm.ConditionalFlowMatcher(0.0),
    "icfm, sigma": lambda: cfm.ConditionalFlowMatcher(0.4),
    "target": lambda: cfm.TargetConditionalFlowMatcher(0.0),
    "target, sigma": lambda: cfm.TargetConditionalFlowMatcher(0.2),
    "vp": lambda: cfm.VariancePreservingConditionalFlowMatcher(0.0),
    "vp, sigma": lambda: cfm.VariancePreservingConditionalFlowMatcher(0.3),
}
PLAIN = "sample_location_and_conditional_flow"
SCHEDULERS = ("CondOT", "Cosine", "VP", "LinearVP")


def path_of(name):
    scheduler = getattr(fm_scheduler, f"{name}Scheduler")()
    return fm_path.CondOTProbPath() if name == "CondOT" else fm_path.AffineProbPath(scheduler)


def batch(n=24):
    """Noise and rows of the bank, float64 so that only the formulas differ."""
    return torch.randn(n, *SHAPE, dtype=torch.float64), ROWS[torch.randperm(40)[:n]].double()


def posterior_mean(xt, alpha, sigma, rows=ROWS, mask=None):
    """`m` by brute force in float64; `mask` (B, N) says which rows count."""
    gap = xt.flatten(1)[:, None] - alpha.reshape(-1, 1, 1) * rows.flatten(1).double()
    logits = -gap.square().sum(2) / (2 * sigma[:, None] ** 2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return (logits.softmax(1) @ rows.flatten(1).double()).reshape(xt.shape)


def torchcfm_velocity(matcher, t, xt, **options):
    """The marginal velocity of a matcher, from its own definitions."""
    t, s = t.double(), matcher.sigma
    wide = t.reshape(-1, *(1 for _ in SHAPE))
    if isinstance(matcher, cfm.TargetConditionalFlowMatcher):
        m = posterior_mean(xt, t, 1 - (1 - s) * t, **options)
        return (m - (1 - s) * xt) / (1 - (1 - s) * wide)
    if isinstance(matcher, cfm.VariancePreservingConditionalFlowMatcher):
        sin, cos = torch.sin(math.pi / 2 * wide), torch.cos(math.pi / 2 * wide)
        m = posterior_mean(xt, sin.flatten(), (cos**2 + s**2).sqrt().flatten(), **options)
        return math.pi / 2 * (cos * m - sin * cos * (xt - sin * m) / (cos**2 + s**2))
    v = (1 - wide) ** 2 + s**2
    m = posterior_mean(xt, t, v.sqrt().flatten(), **options)
    return m - (1 - wide) * (xt - wide * m) / v


def scheme_for(maker, labels=None, **options):
    return Scheme(Oracle(LatentBank(ROWS, labels), maker.path), **options)


@pytest.mark.parametrize("name", MATCHERS)
def test_torchcfm_unsteered_is_bit_identical(name):
    x0, x1 = batch()
    plain, steered = MATCHERS[name](), MATCHERS[name]()
    maker = one_target_maker(steered)
    for scheme in (Scheme(path=maker.path), scheme_for(maker, target=Mix(0.0))):
        detach = maker.attach(scheme)
        results = []
        for matcher in (plain, steered):
            torch.manual_seed(1)
            drawn = matcher.sample_location_and_conditional_flow(
                x0, x1, return_noise=scheme.target is None
            )
            results.append((*drawn, torch.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        detach()


@pytest.mark.parametrize("name", MATCHERS)
def test_torchcfm_target_is_the_marginal_velocity(name):
    x0, x1 = batch()
    matcher = MATCHERS[name]()
    plain = MATCHERS[name]()
    maker = one_target_maker(matcher)
    maker.attach(scheme_for(maker, target=Mix(1.0)))
    given = torch.linspace(0.02, 0.9, len(x0), dtype=torch.float64)
    torch.manual_seed(2)
    t, xt, u = matcher.sample_location_and_conditional_flow(x0, x1, given)
    torch.testing.assert_close(u, torchcfm_velocity(matcher, t, xt), rtol=2e-6, atol=2e-6)
    torch.manual_seed(2)
    _, xt_plain, conditional = plain.sample_location_and_conditional_flow(x0, x1, given)
    assert torch.equal(xt, xt_plain)
    assert (u - conditional).abs().max() > 0.1


LATE = torch.linspace(0.02, 0.98, 24, dtype=torch.float64) >= 0.5
TWICE = {"smoothing": Smoothing(LatentBank(ROWS), 4, progress=False)}
TWICE["strength"] = lambda t: (t >= 0.5).to(t.dtype)


@pytest.mark.parametrize("name", MATCHERS)
def test_torchcfm_is_given_what_was_smoothed(name):
    x0, x1 = batch()
    plain, steered = MATCHERS[name](), MATCHERS[name]()
    maker = one_target_maker(steered)
    scheme = Scheme(path=maker.path, **TWICE)
    maker.attach(scheme)
    given = torch.linspace(0.02, 0.98, 24, dtype=torch.float64)
    torch.manual_seed(2)
    t, xt, u, *_ = getattr(steered, PLAIN)(x0, x1, t=given)
    drawn = scheme.last.x1
    assert torch.equal((drawn == x1).flatten(1).all(1), ~LATE)
    torch.manual_seed(2)
    for one, other in zip((t, xt, u), getattr(plain, PLAIN)(x0, drawn, given), strict=True):
        torch.testing.assert_close(one, other)
    # Its own draw of t stays what it was.
    torch.manual_seed(3)
    t, *_ = getattr(steered, PLAIN)(x0, x1)
    torch.manual_seed(3)
    assert torch.equal(t, getattr(plain, PLAIN)(x0, x1)[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_matching_is_given_what_was_smoothed(name):
    x0, x1 = batch()
    path, plain = path_of(name), path_of(name)
    maker = one_target_maker(path)
    scheme = Scheme(path=maker.path, **TWICE)
    maker.attach(scheme)
    t = torch.linspace(0.02, 0.98, 24, dtype=torch.float64)
    found = path.sample(x_0=x0, x_1=x1, t=t)
    drawn = scheme.last.x1
    assert torch.equal((drawn == x1).flatten(1).all(1), ~LATE)
    again = plain.sample(x_0=x0, x_1=drawn, t=t)
    assert torch.equal(found.x_1, drawn)
    torch.testing.assert_close(found.x_t, again.x_t)
    torch.testing.assert_close(found.dx_t, again.dx_t)


def called(name, x1):
    """A matcher or path, and a call of it with `x1` at fixed times."""
    t, x0 = torch.linspace(0.02, 0.98, 24, dtype=torch.float64), batch()[0]
    if name in SCHEDULERS:
        path = path_of(name)
        return path, lambda: path.sample(x_0=x0, x_1=x1, t=t)
    matcher = Guided(0.0) if name == "guided" else MATCHERS[name]()
    method = f"guided_{PLAIN}" if name == "guided" else PLAIN
    return matcher, lambda: getattr(matcher, method)(x0, x1, t=t)


@pytest.mark.parametrize("name", [*MATCHERS, "guided", *SCHEDULERS])
def test_samples_that_are_no_rows_are_smoothed_around_the_rows_that_are_told(name):
    rows = torch.randperm(40)[:24]
    noisy = ROWS[rows].double() + 0.01 * torch.randn(24, *SHAPE, dtype=torch.float64)
    thing, call = called(name, noisy)
    scheme = Scheme(path=one_target_maker(thing).path, **TWICE)
    one_target_maker(thing).attach(scheme)
    with pytest.raises(ValueError, match=r"with stagewise\.sources\(i\):"):
        call()
    begun = scheme.state_dict()
    with sources(rows):
        call()
    assert torch.equal(scheme.last.source, rows)
    assert torch.equal((scheme.last.x1 == noisy).flatten(1).all(1), ~LATE)
    again = Scheme(path=scheme.path, **TWICE)
    again.load_state_dict(begun | {"draws": scheme.state_dict()["draws"] - 1})
    exact = ROWS[rows].double()
    moved = again.smooth(exact, t=scheme.last.t) - exact
    torch.testing.assert_close(scheme.last.x1 - noisy, moved)
    with pytest.raises(ValueError, match="the `source` of each"):
        call()


@pytest.mark.parametrize("name", ["icfm", "CondOT"])
def test_targets_take_the_rows_that_are_told(name):
    rows = torch.randperm(40)[:24]
    noisy = ROWS[rows].double() + 0.01 * torch.randn(24, *SHAPE, dtype=torch.float64)
    thing, call = called(name, noisy)
    maker = one_target_maker(thing)
    scheme = scheme_for(maker, target=Mix())
    maker.attach(scheme)
    with sources(rows):
        with sources(torch.full((24,), -1)):  # the inner one counts
            call()
            assert (scheme.last.source == -1).all()
        call()
    assert torch.equal(scheme.last.source, rows)
    with sources(rows[:5]), pytest.raises(ValueError, match="`source`"):
        call()
    with pytest.raises(TypeError, match="rows"), sources(rows.tolist()):
        pass


@pytest.mark.parametrize("name", ["icfm, sigma", "vp, sigma"])
def test_torchcfm_mixes_a_share_of_all_that_is_not_known(name):
    x0, x1 = batch()
    matcher, plain = MATCHERS[name](), MATCHERS[name]()
    maker = one_target_maker(matcher)
    maker.attach(scheme_for(maker, target=Mix(0.3)))
    t = torch.rand(len(x0), dtype=torch.float64)
    results = []
    for each in (matcher, plain):
        torch.manual_seed(2)
        results.append(each.sample_location_and_conditional_flow(x0, x1, t))
    (_, xt, mixed), (_, _, u) = results
    expected = u + 0.3 * (torchcfm_velocity(matcher, t, xt) - u)
    torch.testing.assert_close(mixed, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["icfm, sigma", "vp, sigma"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.95])
def test_noised_path_is_the_average_over_both_noises(name, t):
    # In one dimension, with the noise x_0 on a grid: no formula of ours takes part.
    matcher, rows, xt = MATCHERS[name](), torch.tensor([-1.25, 0.25, 1.0]).double(), 0.35
    x0, t = torch.linspace(-9, 9, 20_001).double(), torch.tensor(t).double()
    gap = xt - matcher.compute_mu_t(x0[:, None], rows, t)
    log_weight = -gap.square() / (2 * matcher.sigma**2) - x0[:, None].square() / 2
    weight = log_weight.flatten().softmax(0).reshape(gap.shape)
    u = matcher.compute_conditional_flow(x0[:, None], rows, t, None)
    oracle = Oracle(LatentBank(rows[:, None]), one_target_maker(matcher).path)
    velocity = oracle.velocity(torch.tensor([[xt]]).double(), t[None])
    assert float(velocity) == pytest.approx(float((weight * u).sum()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "path", [NoisedPath(LinearPath(), 0.3), ShrinkingPath(0.1), NoisedPath(ShrinkingPath(0.1), 1.0)]
)
def test_derivatives_of_paths(path):
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = path(t)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        (grad,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, grad)


def test_paths_refuse_what_is_none():
    with pytest.raises(ValueError, match="`noise` above 0, got 0"):
        NoisedPath(LinearPath(), 0)
    with pytest.raises(ValueError, match="`sigma_min` of at least 0, got -1"):
        ShrinkingPath(-1)


def test_torchcfm_class_wise_without_labels():
    x0, x1 = batch()
    matcher = MATCHERS["icfm"]()
    maker = one_target_maker(matcher)
    maker.attach(scheme_for(maker, LABELS, target=Mix()))
    t, xt, u = matcher.sample_location_and_conditional_flow(x0, x1)
    own = (x1[:, None] == ROWS.double()).flatten(2).all(2).float() @ LABELS.float()
    expected = torchcfm_velocity(matcher, t, xt, mask=own[:, None] == LABELS)
    torch.testing.assert_close(u, expected, rtol=2e-6, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_libraries_agree(seed, lam, kind):
    """One noise, one row, one time: the same steered target in every convention."""
    draws = torch.Generator().manual_seed(seed)
    x1 = ROWS[torch.randint(40, (8,), generator=draws)].double()
    x0 = torch.randn(8, *SHAPE, generator=draws, dtype=torch.float64)
    t = 0.02 + 0.95 * torch.rand(8, generator=draws, dtype=torch.float64)
    matcher = MATCHERS["icfm" if kind == "linear" else "vp"]()
    path = path_of("CondOT" if kind == "linear" else "Cosine")
    one_target_maker(matcher).attach(scheme_for(one_target_maker(matcher), target=Mix(lam)))
    one_target_maker(path).attach(scheme_for(one_target_maker(path), target=Mix(lam)))
    _, xt, u = matcher.sample_location_and_conditional_flow(x0, x1, t)
    found = path.sample(x_0=x0, x_1=x1, t=t)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.x_t, xt)
    torch.testing.assert_close(found.dx_t, u, **close)
    if kind == "linear":
        sigmas = expand_like(1 - t, x1)
        scheme = Scheme(Oracle(LatentBank(ROWS)), target=Mix(lam), class_wise=False)
        target = diffusers_target(xt, x1, x0, sigmas, scheme)
        torch.testing.assert_close(target, -u, **close)
        data = diffusers_target(xt, x1, x0, sigmas, scheme, prediction="data")
        torch.testing.assert_close((data - xt) / sigmas, u, **close)


class Guided(cfm.ConditionalFlowMatcher):
    """A guided variant of a matcher without coupling, as users write it."""

    def guided_sample_location_and_conditional_flow(
        self, x0, x1, y0=None, y1=None, t=None, return_noise=False
    ):
        t, xt, ut, *rest = self.sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return (t, xt, ut, y0, y1, *rest)


def test_torchcfm_guided_takes_the_labels_and_is_steered_once():
    x0, x1 = batch()
    matcher = Guided(0.0)
    before = dict(vars(matcher))
    maker = one_target_maker(matcher)
    scheme = scheme_for(maker, LABELS, target=Mix(0.5))
    scheme.rows_checked = True
    detach = maker.attach(scheme)
    labels = torch.randint(4, (len(x0),))  # not those of the rows: they are the caller's choice
    torch.manual_seed(3)
    t, xt, u, y0, y1 = matcher.guided_sample_location_and_conditional_flow(x0, x1, None, labels)
    own = (x1[:, None] == ROWS.double()).flatten(2).all(2)
    _, found = own.max(1)
    fits = labels == LABELS[found]
    mask = labels[:, None] == LABELS
    expected = (x1 - x0 + torchcfm_velocity(matcher, t, xt, mask=mask)) / 2
    torch.testing.assert_close(u[fits], expected[fits], rtol=2e-6, atol=2e-6)
    assert fits.any()
    assert y0 is None
    assert y1 is labels
    detach()
    assert vars(matcher) == before


_sample = cfm.ConditionalFlowMatcher.sample_location_and_conditional_flow
_guided = Guided.guided_sample_location_and_conditional_flow


@pytest.mark.parametrize(
    ("prefix", "own"),
    [
        ("", lambda self, x0, x1, *args, **kw: _sample(self, x0, x1, *args, **kw)),
        ("", lambda self, noise, data, time=None: _sample(self, noise, data, time)),
        ("", lambda self, *args, **kw: _sample(self, *args, **kw)),
        ("", lambda self, x0, x1, /, t=None, return_noise=False: _sample(self, x0, x1, t)),
        ("guided_", lambda self, *args, **kw: _guided(self, *args, **kw)),
        (
            "guided_",
            lambda self, noise, data, *labels_and_t: _guided(self, noise, data, *labels_and_t),
        ),
    ],
)
def test_torchcfm_methods_of_the_users_may_name_arguments_otherwise(prefix, own):
    name, (x0, x1), found = f"{prefix}{PLAIN}", batch(), []
    for kind in (Guided, type("Own", (Guided,), {name: own})):
        matcher = kind(0.0)
        maker = one_target_maker(matcher)
        maker.attach(scheme_for(maker, target=Mix()))
        torch.manual_seed(3)
        t, *more = getattr(matcher, name)(x0, x1)
        labels = (None, None) if prefix else ()
        found.append((t, *more, *getattr(matcher, name)(x0, x1, *labels, 1 - t)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_torchcfm_noise_is_not_given_where_only_the_velocity_is_steered(guided):
    x0, x1 = batch()
    matcher = Guided(0.4)
    prefix = "guided_" if guided else ""
    sample = f"{prefix}sample_location_and_conditional_flow"
    maker = one_target_maker(matcher)
    # Also where a later phase is the first to mix: not in the middle of a run.
    plain, mixed = Scheme(path=maker.path), scheme_for(maker, target=Mix(0.5))
    for scheme in (mixed, Phases([Phase(plain, AtStep(5)), Phase(mixed)])):
        detach = maker.attach(scheme)
        with pytest.raises(ValueError, match=r"return_noise=True, .*Call it without"):
            getattr(matcher, sample)(x0, x1, return_noise=True)
        getattr(matcher, sample)(x0, x1)
        detach()
    maker.attach(Scheme(timesteps=LogitNormal(), path=maker.path))
    *_, eps = getattr(matcher, sample)(x0, x1, return_noise=True)
    assert eps.shape == x0.shape


def test_torchcfm_draws_t_from_the_scheme_once():
    x0, x1 = batch()
    matcher = MATCHERS["icfm"]()
    detach = one_target_maker(matcher).attach(Scheme(timesteps=LogitNormal(-1, 0.3)))
    torch.manual_seed(4)
    t, *_ = matcher.sample_location_and_conditional_flow(x0, x1)
    torch.manual_seed(4)
    assert torch.equal(t, LogitNormal(-1, 0.3).sample(len(x0)).double())
    noise = torch.randn_like(x0)
    torch.manual_seed(4)
    *_, eps = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
    assert torch.equal(eps, noise), "nothing else is drawn"
    with pytest.raises(ValueError, match="module was given its times, but the scheme draws them"):
        matcher.sample_location_and_conditional_flow(x0, x1, t)
    detach()
    assert torch.equal(matcher.sample_location_and_conditional_flow(x0, x1, t)[0], t)


@pytest.mark.parametrize("kind", ["ExactOptimalTransport", "SchrodingerBridge"])
def test_torchcfm_couplings_are_refused_with_the_reason(kind):
    matcher = getattr(cfm, f"{kind}ConditionalFlowMatcher")(1.0)
    with pytest.raises(ValueError, match=r"makes x_0 and x_1 dependent.* ConditionalFlowMatcher"):
        one_target_maker(matcher)
    (maker,) = find_target_makers(matcher)
    with pytest.raises(ValueError, match="module cannot be steered"):
        maker.attach(Scheme())


def test_torchcfm_unknown_matcher_is_refused():
    class Curved(cfm.ConditionalFlowMatcher):
        def compute_mu_t(self, x0, x1, t):
            t = cfm.pad_t_like_x(t, x0)
            return t**2 * x1 + (1 - t) * x0

    with pytest.raises(ValueError, match=r"its path is not known.*self\.target\(u, xt=xt"):
        one_target_maker(Curved())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_matching_unsteered_is_bit_identical(name):
    x0, x1 = batch()
    t = torch.rand(len(x0), dtype=torch.float64)
    expected = path_of(name).sample(x_0=x0, x_1=x1, t=t)
    path = path_of(name)
    maker = one_target_maker(path)
    maker.attach(scheme_for(maker, target=Mix(0.0)))
    found = path.sample(x0, x1, t)
    assert type(found) is type(expected)
    assert all(torch.equal(getattr(found, key), getattr(expected, key)) for key in vars(expected))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_matching_target_is_the_marginal_velocity(name):
    x0, x1 = batch()
    t = torch.linspace(0.05, 0.9, len(x0), dtype=torch.float64)
    path = path_of(name)
    maker = one_target_maker(path)
    maker.attach(scheme_for(maker, target=Mix()))
    found = path.sample(x_0=x0, x_1=x1, t=t)
    at = path.scheduler(t)
    m = posterior_mean(found.x_t, at.alpha_t, at.sigma_t)
    alpha, sigma, d_alpha, d_sigma = (
        value.reshape(-1, 1, 1) for value in (at.alpha_t, at.sigma_t, at.d_alpha_t, at.d_sigma_t)
    )
    expected = d_alpha * m + d_sigma * (found.x_t - alpha * m) / sigma
    torch.testing.assert_close(found.dx_t, expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(found.x_1, x1)
    assert torch.equal(found.x_0, x0)


def test_flow_matching_class_wise_without_labels():
    x0, x1 = batch()
    t = torch.rand(len(x0), dtype=torch.float64) * 0.5
    path = path_of("CondOT")
    maker = one_target_maker(path)
    maker.attach(scheme_for(maker, LABELS, target=Mix()))
    found = path.sample(x_0=x0, x_1=x1, t=t)
    own = (x1[:, None] == ROWS.double()).flatten(2).all(2).float() @ LABELS.float()
    m = posterior_mean(found.x_t, t, 1 - t, mask=own[:, None] == LABELS)
    expected = (m - found.x_t) / (1 - t)[:, None, None]
    torch.testing.assert_close(found.dx_t, expected, rtol=2e-6, atol=2e-6)


def test_flow_matching_is_given_its_times():
    with pytest.raises(ValueError, match=r"given its times.*t = scheme\.timesteps\.sample"):
        one_target_maker(path_of("CondOT")).attach(Scheme(timesteps=Uniform()))


def test_other_paths_of_flow_matching_are_none():
    scheduler = fm_scheduler.PolynomialConvexScheduler(2.0)
    assert find_target_makers(fm_path.MixtureDiscreteProbPath(scheduler)) == []


ALL = {**MATCHERS, **{name: (lambda name=name: path_of(name)) for name in SCHEDULERS}}


@pytest.mark.parametrize("name", ALL)
def test_detached_it_is_what_it_was(name):
    thing = ALL[name]()
    before, kind = dict(vars(thing)), type(thing)
    maker = one_target_maker(thing)
    scheme = scheme_for(maker, target=Mix())
    detach = maker.attach(scheme)
    assert vars(thing) != before
    with pytest.raises(ValueError, match="steered by another scheme already"):
        one_target_maker(thing).attach(scheme)
    detach()
    detach()
    assert vars(thing) == before
    assert type(thing) is kind
    again = one_target_maker(thing).attach(scheme)
    detach()
    assert vars(thing) != before, "an old detach leaves a newer attach alone"
    again()
    assert vars(thing) == before


def test_copies_and_pickles_are_not_steered():
    x0, x1 = batch()
    matcher = MATCHERS["icfm"]()
    maker = one_target_maker(matcher)
    maker.attach(scheme_for(maker, target=Mix()))
    t = torch.full((len(x0),), 0.05, dtype=torch.float64)
    assert not torch.equal(matcher.sample_location_and_conditional_flow(x0, x1, t)[2], x1 - x0)
    for other in (copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        assert torch.equal(other.sample_location_and_conditional_flow(x0, x1, t)[2], x1 - x0)


@pytest.mark.parametrize("name", ["icfm", "vp, sigma", "CondOT"])
def test_a_source_that_is_not_standard_normal_is_refused(name):
    _, x1 = batch()
    thing = ALL[name]()
    maker = one_target_maker(thing)
    for x0 in (torch.rand(len(x1), *SHAPE).double(), 2 * torch.randn(len(x1), *SHAPE).double()):
        detach = maker.attach(scheme_for(maker, target=Mix()))
        method = thing.sample if name == "CondOT" else thing.sample_location_and_conditional_flow
        with pytest.raises(ValueError, match="`x0` to be standard normal noise"):
            method(x0, x1, torch.rand(len(x1)))
        detach()


def test_noise_is_never_taken_for_something_else():
    # 6 standard errors of each of two tests: one in 10^8 or so.
    draws = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 50, 5000):
        for _ in range(2000 if count < 100 else 20):
            check_noise(torch.randn(count, generator=draws))
    for _ in range(20):
        with pytest.raises(ValueError, match="standard normal"):
            check_noise(torch.randn(500, generator=draws) * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype):
    x0, x1 = (value.to(dtype) for value in batch())
    matcher = MATCHERS["icfm, sigma"]()
    maker = one_target_maker(matcher)
    maker.attach(scheme_for(maker, target=Mix()))
    t, xt, u = matcher.sample_location_and_conditional_flow(x0, x1)
    assert {t.dtype, xt.dtype, u.dtype} == {dtype}
