"""Samplers of t: densities, quantiles, published formulas, importance weights."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stagewise import (
    Beta,
    CosinePath,
    EDMLogNormal,
    EDMPath,
    InverseFloor,
    LatentBank,
    LogitNormal,
    LossAboveFloor,
    LossSecondMoment,
    Mode,
    Oracle,
    Scheme,
    Shifted,
    StageAware,
    StageCurve,
    Uniform,
    UShaped,
    VPPath,
    WithFloor,
)
from stagewise.stages import STATISTICS, loss_floor


def adapted():
    """A sampler that has seen a loss that falls with t."""
    sampler = LossSecondMoment(8, 3)
    t = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    sampler.update(t, 2 - t)
    return sampler


def curve_of(floor, strata=8):
    """A curve with this floor at the middle of even strata."""
    t = ((torch.arange(strata, dtype=torch.float64) + 0.5) / strata)[:, None].repeat(1, 2)
    values = torch.zeros(len(STATISTICS), *t.shape, dtype=torch.float64)
    values[STATISTICS.index("target_difference")] = floor(t)
    return StageCurve(t, values)


def above_floor(**options):
    """A sampler that has seen losses 1.5 over the floor of 1 - t, and 0.5 from t = 0.5 on."""
    sampler = LossAboveFloor(curve_of(lambda t: 1 - t), bins=8, history=3, **options)
    t = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    sampler.update(t, 1 - t + (t < 0.5) + 0.5)
    return sampler


SMOOTH = [
    Uniform(),
    LogitNormal(),
    LogitNormal(-0.8, 1.6),
    Mode(),
    Mode(-0.7),
    Beta(),
    Beta(2, 1),
    Beta(2.5, 1.5),
    EDMLogNormal(),
    EDMLogNormal(-0.4, 1.0, CosinePath()),
    EDMLogNormal(path=EDMPath()),
    EDMLogNormal(path=VPPath()),
    UShaped(),
    Shifted(LogitNormal(), 0.5),
    Shifted(UShaped(2.0), 3.0),
    WithFloor(LogitNormal(), 0.1),
    WithFloor(Beta(), 0.5),
]
STEPPED = [
    StageAware(0.3, 0.125),
    WithFloor(StageAware(1.0, 0.125), 0.25),
    WithFloor(StageAware(0.0, 0.125), 0.25),
    Shifted(StageAware(0.5, 0.25), 0.5),
    adapted(),
    WithFloor(adapted(), 0.5),
    above_floor(),
]
SAMPLERS = SMOOTH + STEPPED


def integral(sampler, of=lambda t: torch.ones_like(t), points=200_000):
    """`int q(t) f(t) dt` by the midpoint rule on a grid that is fine at both ends."""
    x = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    # t = x^3 (10 - 15 x + 6 x^2), whose slope vanishes at both ends.
    t, slope = x**3 * (10 - 15 * x + 6 * x**2), 30 * x**2 * (1 - x) ** 2
    return float((sampler.density(t) * of(t) * slope).mean())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_densities_integrate_to_one(sampler):
    tolerance = 1e-6 if sampler in SMOOTH else 1e-4  # jumps
    assert integral(sampler) == pytest.approx(1, abs=tolerance)
    outside = torch.tensor([-0.1, 1.1], dtype=torch.float64)
    assert sampler.density(outside).tolist() == [0, 0]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_density_is_one_over_the_slope_of_the_quantile(sampler):
    u, step = torch.linspace(0.0131, 0.9871, 97, dtype=torch.float64), 1e-5
    below, above = sampler.quantile(u - step), sampler.quantile(u + step)
    slope = (above - below) / (2 * step)
    q = sampler.density(sampler.quantile(u))
    # Where the density jumps within the step, its slope is neither.
    same = (sampler.density(below) / sampler.density(above)).log().abs() < 0.01
    assert same.sum() >= 95
    torch.testing.assert_close((q * slope)[same], torch.ones_like(u)[same], rtol=1e-5, atol=0)
    assert (above > below).all()


FORMULAS = {
    LogitNormal(-0.8, 1.6): lambda t: (
        stats.norm(-0.8, 1.6).pdf(math.log(t / (1 - t))) / (t * (1 - t))
    ),
    Beta(): lambda t: stats.beta(1.5, 1).pdf(1 - t),  # pi0 counts from data to noise
    Beta(2.5, 1.5): lambda t: stats.beta(2.5, 1.5).pdf(t),
    # sigma = (1 - t) / t on the linear path
    EDMLogNormal(): lambda t: stats.lognorm(1.2, scale=math.exp(-1.2)).pdf((1 - t) / t) / t**2,
    UShaped(): lambda t: (math.exp(4 * t) + math.exp(4 * (1 - t))) * 4 / (2 * (math.exp(4) - 1)),
    Shifted(Uniform(), 0.5): lambda t: 0.5 / (0.5 + 0.5 * t) ** 2,
    StageAware(0.3, 0.125): lambda t: 0.3 / 0.125 if t < 0.125 else 0.7 / 0.875,
    WithFloor(Beta(2, 1), 0.25): lambda t: 0.25 + 0.75 * 2 * t,
}


@pytest.mark.parametrize("sampler", FORMULAS, ids=repr)
def test_published_densities(sampler):
    t = torch.tensor([0.03, 0.1, 0.31, 0.5, 0.77, 0.98], dtype=torch.float64)
    expected = torch.tensor([FORMULAS[sampler](float(x)) for x in t], dtype=torch.float64)
    torch.testing.assert_close(sampler.density(t), expected, rtol=1e-12, atol=0)


def test_published_quantiles():
    u = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    s = 1.29
    # SD3's time runs from data to noise, and falls with its u.
    theirs = 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(Mode(s).quantile(u), 1 - theirs, rtol=1e-12, atol=1e-12)
    sigma = torch.exp(-1.2 - 1.2 * torch.special.ndtri(u))
    torch.testing.assert_close(EDMLogNormal().quantile(u), 1 / (1 + sigma), rtol=1e-12, atol=0)
    path = EDMPath()
    ends = torch.special.ndtr((-1.2 - torch.tensor([80.0, 0.002]).double().log()) / 1.2)
    sigma = torch.exp(-1.2 - 1.2 * torch.special.ndtri(ends[0] + (ends[1] - ends[0]) * u))
    found = EDMLogNormal(path=path).quantile(u)
    torch.testing.assert_close(found, path.time_of_sigma(sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_quantile(sampler, stratified):
    sampler = copy.deepcopy(sampler)
    sampler.stratified = stratified
    n = 40_000
    draws = sampler.sample(n, generator=torch.Generator().manual_seed(5))
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    shares = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    below = (draws[None].double() <= sampler.quantile(shares)[:, None]).double().mean(1)
    bound = 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %
    assert (below - shares).abs().max() < (bound if not stratified else 3 / n + 1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_preserving_the_objective_keeps_the_expected_loss(sampler):
    scheme = Scheme(timesteps=sampler, weight=lambda t: 1 + t, preserve_objective=True)
    scheme.check()

    def loss(t):
        return torch.exp(-3 * t) + t**2

    kept = integral(sampler, lambda t: scheme.weight_of(t) * loss(t))
    exact = integral(Uniform(), lambda t: (1 + t) * loss(t))
    assert kept == pytest.approx(exact, rel=1e-9)
    # The same over the draws: u uniform, on a grid that is fine at both ends.
    z = torch.linspace(-7, 7, 20_001, dtype=torch.float64)
    u, slope = torch.special.ndtr(z), torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    t = sampler.quantile(u)
    drawn = float(torch.trapezoid(scheme.weight_of(t) * loss(t) * slope, z))
    assert drawn == pytest.approx(exact, rel=1e-2)
    if not isinstance(sampler, Uniform):
        plain = integral(sampler, lambda t: (1 + t) * loss(t))
        assert abs(plain / exact - 1) > 1e-3


def test_importance_weights_of_other_densities():
    t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    weight = UShaped().importance_weight(t, of=Beta(2, 1))
    torch.testing.assert_close(weight, 2 * t / UShaped().density(t))
    early = StageAware(1.0, 0.25)
    assert early.importance_weight(t).tolist() == [0.25, math.inf, math.inf]
    assert Uniform().importance_weight(t, of=early).tolist() == [4, 0, 0]
    with_floor = WithFloor(early, 0.2).importance_weight(torch.linspace(0, 1, 101))
    assert with_floor.max() <= 1 / 0.2 + 1e-6


@given(shift=st.floats(0.05, 20), u=st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_mirrored_shifts_are_inverse(shift, u):
    """Under t -> 1 - t a shift becomes 1 / shift."""
    u = torch.tensor(u, dtype=torch.float64)
    one, other = Shifted(Uniform(), shift).quantile(u), Shifted(Uniform(), 1 / shift)
    torch.testing.assert_close(one, 1 - other.quantile(1 - u), rtol=1e-9, atol=1e-9)


@given(share=st.floats(0, 1), boundary=st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_stage_aware_puts_its_share_below_the_boundary(share, boundary):
    sampler = StageAware(share).bind(boundary)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = sampler.quantile(u)
    assert abs(float((t < boundary).double().mean()) - share) <= 1.001e-3
    assert (t.diff() >= -1e-12).all()
    assert t.min() >= 0
    assert t.max() <= 1


def test_binding_is_pure_and_reaches_the_inside():
    outer = WithFloor(Shifted(StageAware(0.5), 2.0), 0.1)
    assert outer.needs_boundary
    with pytest.raises(ValueError, match="has not been measured yet"):
        outer.sample(4)
    with pytest.raises(ValueError, match="has not been measured yet"):
        StageAware(0.5).density(torch.rand(3))
    bound = outer.bind(0.25)
    assert not bound.needs_boundary
    assert outer.needs_boundary
    assert bound.bind(0.9) is bound
    same = StageAware(0.5, boundary=0.4)
    assert same.bind(0.1) is same  # a number of its own wins
    with pytest.raises(ValueError, match="one of the stages would be empty"):
        StageAware(0.5).bind(0.0)


@pytest.mark.parametrize("sampler", [Uniform(True), LogitNormal(stratified=True)], ids=repr)
def test_stratified_draws_fill_every_share_once(sampler):
    t = sampler.sample(64, generator=torch.Generator().manual_seed(0)).double()
    u = t if isinstance(sampler, Uniform) else torch.special.ndtr(torch.logit(t))
    assert sorted((u * 64 + 1e-6).long().tolist()) == list(range(64))
    assert t.tolist() != sorted(t.tolist())


def test_stratified_draws_stay_below_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert Uniform(stratified=True).sample(4096).max() < 1


def test_logit_normal_trains_navigation_little():
    t = LogitNormal().sample(200_000, generator=torch.Generator().manual_seed(0))
    assert float((t < 0.1).float().mean()) == pytest.approx(0.014, abs=0.001)


# -- loss second moment ---------------------------------------------------------------------------


def test_second_moment_is_uniform_until_every_bin_is_full():
    sampler = LossSecondMoment(4, 2)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    sampler.update(t, torch.tensor([5.0, 1, 1, 1]))
    assert sampler.shares().tolist() == [0.25] * 4
    sampler.update(t[1:], torch.ones(3))
    assert sampler.shares().tolist() == [0.25] * 4
    sampler.update(t[:1], torch.tensor([5.0]))
    expected = 0.999 * torch.tensor([5, 1, 1, 1], dtype=torch.float64) / 8 + 0.001 / 4
    torch.testing.assert_close(sampler.shares(), expected)


@given(seed=st.integers(0, 10**6), batches=st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_second_moment_keeps_the_last_losses_of_each_bin(seed, batches):
    draws = torch.Generator().manual_seed(seed)
    sampler, kept = LossSecondMoment(5, 3, floor=0.01), [[] for _ in range(5)]
    for size in batches:
        t = torch.rand(size, generator=draws)
        loss = torch.rand(size, generator=draws)
        loss[torch.rand(size, generator=draws) < 0.1] = torch.nan
        sampler.update(t, loss)
        for when, value in zip(t.tolist(), loss.double().tolist(), strict=True):
            if math.isfinite(value):
                kept[min(4, int(when * 5))].append(value)
    if all(len(values) >= 3 for values in kept):
        roots = [math.sqrt(sum(v * v for v in values[-3:]) / 3) for values in kept]
        expected = [0.99 * root / sum(roots) + 0.002 for root in roots]
    else:
        expected = [0.2] * 5
    assert sampler.shares().tolist() == pytest.approx(expected, rel=1e-9)


def fresh_above_floor():
    return LossAboveFloor(curve_of(lambda t: 1 - t), bins=8, history=3)


@pytest.mark.parametrize(
    ("make", "fresh"),
    [(adapted, lambda: LossSecondMoment(8, 3)), (above_floor, fresh_above_floor)],
)
def test_a_state_is_plain_and_goes_on(make, fresh):
    one, other = make(), fresh()
    state = one.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    other.load_state_dict(copy.deepcopy(state))
    t, loss = torch.rand(20), torch.rand(20)
    for sampler in (one, other):
        sampler.update(t, loss)
    assert torch.equal(one.shares(), other.shares())
    with pytest.raises(ValueError, match="Resume with the sampler"):
        LossSecondMoment(4, 3).load_state_dict(state)


# -- loss above its floor -------------------------------------------------------------------------


def test_draws_go_by_what_of_the_loss_is_above_its_floor():
    sampler = fresh_above_floor()
    t = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    excess = torch.tensor([3, 0, 1, 2, 0, -0.01, 1, 1], dtype=torch.float64)
    for loss in (excess - 0.02, excess + 0.01, excess + 0.01):
        assert sampler.shares().tolist() == [0.125] * 8
        sampler.update(t, 1 - t + loss)
    expected = 0.9 * excess.clamp_min(0) / 8 + 0.1 / 8
    torch.testing.assert_close(sampler.shares(), expected)
    assert sampler.density(torch.linspace(0, 1, 101)).min() > 0, "no t is left without any"
    weighted = LossAboveFloor(curve_of(lambda t: 1 - t), lambda t: 1 + t, bins=8, history=3)
    weighted.load_state_dict(sampler.state_dict())
    score = excess.clamp_min(0) * (1 + t)
    torch.testing.assert_close(weighted.shares(), 0.9 * score / score.sum() + 0.1 / 8)


def test_a_model_at_its_floor_is_drawn_evenly():
    sampler = LossAboveFloor(curve_of(lambda t: 2 - t), bins=4, history=1)
    sampler.update(torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.ones(4))
    assert sampler.shares().tolist() == [0.25] * 4


def test_a_scheme_above_its_floor_resumes_where_it_was():
    t, loss = torch.rand(20), torch.rand(20)
    schemes = [Scheme(timesteps=above_floor(), preserve_objective=True) for _ in range(2)]
    schemes[0].observe(step=1, total=2, t=t, loss=loss)
    schemes[1].load_state_dict(schemes[0].state_dict())
    torch.testing.assert_close(schemes[0].weight_of(t), schemes[1].weight_of(t), rtol=0, atol=0)


def test_floor_and_weight_are_those_of_the_curve():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    curve = StageCurve.measure(Oracle(LatentBank(x)))
    torch.testing.assert_close(loss_floor(curve, curve.times), curve.mean("target_difference"))
    middle = (curve.times[3] + curve.times[4]) / 2
    expected = curve.mean("target_difference")[3:5].mean()
    torch.testing.assert_close(loss_floor(curve, middle), expected)
    ends = loss_floor(curve, torch.tensor([[0.0], [1.0]]))
    assert ends.dtype == torch.float32
    torch.testing.assert_close(
        ends.double(), curve.mean("target_difference")[[0, -1]][:, None], rtol=1e-6, atol=1e-9
    )
    weight = InverseFloor(curve, largest=2.0)(curve.times)
    torch.testing.assert_close(weight, (1 / curve.mean("target_difference")).clamp_max(2))
    assert weight[-1] == 2
    with pytest.raises(ValueError, match="`largest` above 0"):
        InverseFloor(curve, 0)


def test_a_shift_passes_losses_on_at_the_inner_time():
    inner = LossSecondMoment(4, 1)
    Shifted(inner, 0.5).update(torch.tensor([1 / 7]), torch.tensor([3.0]))  # 1/4 before
    assert inner.state_dict()["count"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormal(std=0), "`std` above 0"),
        (lambda: EDMLogNormal(std=-1), "`std` above 0"),
        (lambda: Mode(1.8), r"`scale` in \[-1, 1.75\)"),
        (lambda: Beta(0, 1), "`alpha` above 0"),
        (lambda: Beta(1, -1), "`beta` above 0"),
        (lambda: UShaped(0), "`slope` above 0"),
        (lambda: Shifted(Uniform(), 0), "`shift` above 0"),
        (lambda: WithFloor(Uniform(), 0), "`share` above 0"),
        (lambda: StageAware(1.2), r"`navigation` in \[0, 1\]"),
        (lambda: StageAware(0.5, 1.0), "`boundary` above 0 and below 1"),
        (lambda: LossSecondMoment(0), "`bins` of at least 1"),
        (lambda: LossSecondMoment(floor=0), "`floor` above 0"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
