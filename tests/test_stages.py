"""The stage curve, its boundary, and the prediction from the spectrum."""

import math

import pytest
import torch
from torch import nn

from stagewise import LatentBank, LinearPath, Oracle, StageCurve, predicted_boundary
from stagewise.engines import Exact
from stagewise.losses import FlowMatchingLoss
from stagewise.stages import STATISTICS, stage_edges, stratified_times


def gaussian(n, dim, seed=0):
    return LatentBank(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def fixed(times, queries):
    return torch.tensor(times, dtype=torch.float64)[:, None].expand(len(times), queries)


@pytest.mark.slow
def test_published_curve():
    # Liu et al., arXiv 2512.02826, Fig. 3a: unit-Gaussian data, N = 1400, D = 512.
    times = [0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20]
    published = torch.tensor([0.04, 0.09, 0.20, 0.40, 0.61, 0.80, 0.92, 0.98]).double()
    curve = StageCurve.measure(Oracle(gaussian(1400, 512)), fixed(times, 1400))
    assert (curve.mean("top1") - published).abs().max() < 0.03


def midpoint(n, dim):
    bank = gaussian(n, dim)
    edges = stage_edges(predicted_boundary(bank, LinearPath()), 12)
    return StageCurve.measure(Oracle(bank), stratified_times(edges, 64)).boundary().midpoint


def test_larger_dimension_earlier_larger_bank_later():
    by_dim = [midpoint(500, dim) for dim in (32, 128, 512)]
    assert by_dim[0] > by_dim[1] + 0.03 > by_dim[2] + 0.06
    by_size = [midpoint(n, 128) for n in (50, 400, 3200)]
    assert by_size[0] + 0.04 < by_size[1] + 0.02 < by_size[2]


def test_both_ends_of_the_curve():
    curve = StageCurve.measure(Oracle(gaussian(300, 64)), fixed([0.0, 1.0], 50))
    start, end = ({k: float(curve.mean(k)[i]) for k in ("top1", "entropy", "ess")} for i in (0, 1))
    assert start["top1"] == pytest.approx(1 / 300, rel=1e-9)
    assert start["entropy"] == pytest.approx(math.log(300), rel=1e-9)
    assert start["ess"] == pytest.approx(300, rel=1e-9)
    assert end == {"top1": 1, "entropy": 0, "ess": 1}
    # At t = 0 the oracle is the bank mean minus x_0, so the difference is the data's variance.
    bank = gaussian(300, 64)
    scatter = float((bank.rows.double() - bank.centre).square().mean())
    assert float(curve.mean("target_difference")[0]) == pytest.approx(scatter, rel=0.1)
    assert float(curve.mean("target_difference")[1]) == 0


def test_split_over_ranks_and_batches_is_the_same_curve():
    generator = torch.Generator().manual_seed(0)
    bank = LatentBank(torch.randn(90, 4, 4, generator=generator), torch.arange(90) % 3)
    t = stratified_times(stage_edges(0.1, 5), 7)
    whole = StageCurve.measure(
        Oracle(bank, engine=Exact("float64")), t, seed=(3, 1), class_wise=True
    )
    for world, batch in ((2, 512), (3, 4), (50, 1)):
        parts = [
            StageCurve.measure(
                Oracle(bank, engine=Exact("float64")),
                t,
                seed=(3, 1),
                class_wise=True,
                rank=rank,
                world_size=world,
                batch_size=batch,
            ).values
            for rank in range(world)
        ]
        torch.testing.assert_close(sum(parts), whole.values, rtol=1e-9, atol=1e-12)
    other = StageCurve.measure(Oracle(bank), t, seed=(3, 2), class_wise=True)
    assert not torch.equal(other.values, whole.values)


def test_measuring_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    curve = StageCurve.measure(Oracle(gaussian(50, 8)), stratified_times(stage_edges(0.1, 4), 4))
    curve.boundary()
    assert torch.equal(torch.get_rng_state(), state)


def synthetic(levels, queries=16, noise=0.0):
    """A curve whose top-1 weights are given."""
    t = stratified_times(torch.linspace(0, 1, len(levels) + 1, dtype=torch.float64), queries)
    values = torch.zeros(5, len(levels), queries, dtype=torch.float64)
    draws = torch.randn(len(levels), queries, generator=torch.Generator().manual_seed(0)).double()
    values[0] = torch.tensor(levels).double()[:, None] + noise * draws
    return StageCurve(t, values)


def test_boundary_interpolates():
    t = fixed([0.1, 0.2, 0.3, 0.4], 3)
    values = torch.zeros(5, 4, 3, dtype=torch.float64)
    values[0] = torch.tensor([0.0, 0.4, 0.8, 1.0]).double()[:, None]
    boundary = StageCurve(t, values).boundary()
    assert boundary.midpoint == pytest.approx(0.225)
    assert boundary.collapsed == pytest.approx(0.395)
    # No spread between queries: the bootstrap has nothing to add.
    assert boundary.midpoint_low == boundary.midpoint_high == pytest.approx(0.225)


def test_boundary_survives_a_dip_and_reports_what_is_not_reached():
    dip = synthetic([0.0, 0.2, 0.6, 0.3, 0.8, 1.0]).boundary()
    assert 0.3 < dip.midpoint < 0.7
    never = synthetic([0.0, 0.1, 0.2, 0.3]).boundary()
    assert math.isnan(never.midpoint)
    assert never.midpoint_high == 1
    assert math.isnan(never.collapsed)


def test_boundary_that_was_passed_before_the_first_query():
    # Over two rows the largest weight is never below 0.5.
    pair = StageCurve.measure(Oracle(gaussian(2, 8)), stratified_times(stage_edges(0.3, 8), 16))
    assert pair.boundary().midpoint == 0
    assert 0 < pair.boundary().collapsed < 1


def test_late_boundary_of_small_data_is_found():
    # Data of standard deviation 0.02: the noise hides it until the very end.
    x = 0.02 * torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    oracle = Oracle(LatentBank(x))
    late = stage_edges(predicted_boundary(oracle.bank, oracle.path), 24)
    found = StageCurve.measure(oracle, stratified_times(late, 64)).boundary()
    grid = torch.linspace(0.93, 0.99, 13, dtype=torch.float64)[:, None].expand(13, 800)
    truth = StageCurve.measure(oracle, grid, seed=5).boundary(replicates=2)
    assert found.midpoint == pytest.approx(truth.midpoint, abs=0.003)
    assert found.collapsed == pytest.approx(truth.collapsed, abs=0.004)


def test_bad_arguments_of_measuring():
    oracle = Oracle(gaussian(10, 4))
    with pytest.raises(ValueError, match=r"`t` with shape \(T, Q\), got \(3,\)"):
        StageCurve.measure(oracle, torch.rand(3))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        StageCurve.measure(oracle, torch.full((3, 2), 1.5))
    with pytest.raises(ValueError, match="needs a bank with labels"):
        StageCurve.measure(oracle, torch.rand(3, 2), class_wise=True)
    with pytest.raises(ValueError, match="needs a bank with labels"):
        predicted_boundary(oracle.bank, oracle.path, class_wise=True)


@pytest.mark.slow
def test_interval_of_the_midpoint_covers_the_truth():
    bank = gaussian(400, 128)
    oracle = Oracle(bank)
    centre = midpoint(400, 128)
    truth = StageCurve.measure(
        oracle, fixed([centre - 0.02 + 0.01 * i for i in range(5)], 3000), seed=99
    ).boundary(replicates=2)
    edges = stage_edges(predicted_boundary(bank, oracle.path), 12)
    inside, width = 0, 0.0
    for seed in range(20):
        b = StageCurve.measure(oracle, stratified_times(edges, 48, seed=seed), seed=seed).boundary()
        inside += b.midpoint_low <= truth.midpoint <= b.midpoint_high
        width += (b.midpoint_high - b.midpoint_low) / 20
    assert inside >= 17  # of 20 at 95 %: fewer has a chance of 1 in 400
    assert width < 0.05  # and not because they are wide


@pytest.mark.parametrize(("n", "dim"), [(1400, 512), (300, 1024), (5000, 64)])
def test_predicted_boundary_of_isotropic_data(n, dim):
    # Closed form for unit variance: rho^2 = N^(2/D) - 1. The sample spectrum is not quite flat.
    rho = math.sqrt(n ** (2 / dim) - 1)
    predicted = predicted_boundary(gaussian(n, dim), LinearPath())
    assert predicted == pytest.approx(rho / (1 + rho), rel=0.06)
    top1 = StageCurve.measure(Oracle(gaussian(n, dim)), fixed([predicted], 300)).mean("top1")
    assert 0.55 < float(top1) < 0.8  # "about 2/3"


def test_predicted_boundary_by_class_and_of_identical_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 256, generator=generator)
    labels = torch.arange(600) % 3
    wise = predicted_boundary(LatentBank(x, labels), LinearPath(), class_wise=True)
    alone = predicted_boundary(LatentBank(x[labels == 0]), LinearPath())
    assert wise == pytest.approx(alone, rel=0.02)
    assert wise < predicted_boundary(LatentBank(x), LinearPath())
    assert math.isnan(predicted_boundary(LatentBank(torch.ones(5, 3)), LinearPath()))


def test_grid():
    for predicted in (0.05, 0.3, 0.97, math.nan, 0.0, 1.0):
        edges = stage_edges(predicted, 11)
        assert len(edges) == 12
        assert edges[0] == 0
        assert edges[-1] == 1
        assert (edges.diff() > 0).all()
        t = stratified_times(edges, 6)
        assert t.shape == (11, 6)
        assert ((t >= edges[:-1, None]) & (t < edges[1:, None])).all()
    assert int((stage_edges(0.05, 10) <= 0.15 + 1e-9).sum()) == 6
    assert int((stage_edges(0.95, 10) >= 0.85 - 1e-9).sum()) == 6
    assert (stage_edges(1.0, 5).diff() - 0.2).abs().max() < 1e-12
    with pytest.raises(ValueError, match="at least 4 strata"):
        stage_edges(0.1, 3)
    with pytest.raises(ValueError, match="at least 2 queries"):
        stratified_times(stage_edges(0.1, 4), 1)


class Net(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim + 1, 64), nn.SiLU(), nn.Linear(64, dim))

    def forward(self, xt, t):
        return self.layers(torch.cat([xt, t[:, None]], 1))


def standard_errors(v, u, best):
    """How far E||v - u||^2 - E||v - best||^2 - E||u - best||^2 is from 0, in standard errors."""
    gap = (v - u).square().sum(1) - (v - best).square().sum(1) - (u - best).square().sum(1)
    return float(gap.mean().abs() / (gap.std() / len(gap) ** 0.5 + 1e-12))


@pytest.mark.parametrize("steps", [0, 300], ids=["untrained", "trained"])
def test_pythagoras(steps):
    # E||v - u||^2 = E||v - u*||^2 + E||u - u*||^2 at each t, for any model v.
    torch.manual_seed(0)
    bank = gaussian(64, 16)
    oracle, net, loss_fn = Oracle(bank), Net(16), FlowMatchingLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(steps):
        loss = loss_fn(net, bank.rows[torch.randint(0, 64, (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert steps == 0 or last < 0.9 * first
    for t in (0.05, 0.2, 0.4, 0.7):
        x1 = bank.rows[torch.randint(0, 64, (20_000,))]
        x0, times = torch.randn_like(x1), torch.full((20_000,), t)
        xt = oracle.path.interpolate(x0, x1, times)
        with torch.no_grad():
            v = net(xt, times).double()
        u = (x1 - x0).double()
        best = u + oracle.correction(xt, times, x1.double()).double()
        assert standard_errors(v, u, best) < 4
        # The check has teeth: an oracle of a bank at another scale violates it where it matters.
        if t == 0.2:
            wrong = Oracle(LatentBank(bank.rows * 0.5)).velocity(xt, times).double()
            gap = (
                (v - u).square().sum(1) - (v - wrong).square().sum(1) - (u - wrong).square().sum(1)
            )
            assert gap.mean().abs() > 4 * gap.std() / len(gap) ** 0.5


def test_the_boundary_is_found_in_halves_of_the_strata():
    """A step at 0.7 is a mean of 0.4 in [0.625, 0.75], and not one of 0.2 in [0.5, 0.75]."""
    t = stratified_times(torch.linspace(0, 1, 5).double(), 200)
    values = torch.zeros(len(STATISTICS), *t.shape, dtype=torch.float64)
    values[STATISTICS.index("top1")] = 0.98 * (t > 0.7) + 0.02 * t  # no two means are equal
    found = StageCurve(t, values).boundary(replicates=2)
    first, last = 0.6875, 0.8125  # middles of the halves
    low, high = 0.98 * 0.4 + 0.02 * first, 0.98 + 0.02 * last
    expected = [first + (level - low) / (high - low) * (last - first) for level in (0.5, 0.99)]
    assert [found.midpoint, found.collapsed] == pytest.approx(expected, abs=3e-3)
