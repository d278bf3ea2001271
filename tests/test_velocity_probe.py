"""What a probe measures, against the definitions; Pythagoras, and what breaks it."""

import math

import pytest
import torch
from torch import nn

from stagewise import CosinePath, LatentBank, LinearPath, LogitNormal, Oracle, Scheme
from stagewise.adapters import find_target_makers
from stagewise.adapters.own import nominal_shares
from stagewise.binned_sums import BinnedSums
from stagewise.losses import FlowMatchingLoss
from stagewise.velocity_probe import ALARM, PROBED, Probe, probe_entry, spent, window_entry

EDGES, STAGES = torch.linspace(0, 1, 7).double(), torch.tensor([0.0, 0.4, 0.8, 1.0]).double()
DIM = 5


def data(n=40, classes=0, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, DIM, generator=draws)
    return x, torch.arange(n) % classes if classes else None


def probe_of(x, labels, oracle, queries=200, **options):
    options = {"class_wise": False, "seed": (0, 0), "device": torch.device("cpu")} | options
    return Probe(x, labels, EDGES, queries, oracle, **options)


def measured(probe, velocity):
    means = BinnedSums.empty(torch.cat([EDGES, STAGES]).unique(), PROBED)
    probe.measure(velocity, means.update, torch.device("cpu"))
    return means


def marginal(x, xt, t, path):
    """The oracle velocity in float64, by its definition."""
    a, s, da, ds = path(t.double())
    d = ((xt[:, None].double() - a[:, None, None] * x[None].double()) ** 2).sum(-1)
    weights = torch.softmax(-d / (2 * s[:, None] ** 2), dim=1)
    mean = weights @ x.double()
    return da[:, None] * mean + ds[:, None] * (xt.double() - a[:, None] * mean) / s[:, None]


def wrong_model(xt, t, labels):
    """Any function of what a model sees: far from both targets."""
    return torch.sin(3 * xt) + t[:, None]


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_errors_are_those_of_the_definitions(path):
    x, _ = data()
    probe = probe_of(x, None, Oracle(LatentBank(x), path))
    inside = probe.t < 0.98  # where the textbook form can be evaluated
    best = marginal(x, probe.xt, probe.t, path)
    torch.testing.assert_close(probe.oracle_u[inside].double(), best[inside], rtol=1e-3, atol=1e-3)
    v = wrong_model(probe.xt, probe.t, None).double()
    result = measured(probe, wrong_model).merged([0.0, 1.0]).means()
    u, star = probe.u.double(), probe.oracle_u.double()
    for key, value in (
        ("conditional", (v - u).square().mean()),
        ("oracle", (v - star).square().mean()),
        ("floor", (u - star).square().mean()),
        ("cosine", torch.cosine_similarity(v, star).mean()),
        ("cross", 2 * ((v - star) * (star - u)).mean()),
    ):
        assert float(result[key]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)


def test_pythagoras_holds_for_any_model_and_as_an_identity_per_query():
    x, _ = data()
    means = measured(probe_of(x, None, Oracle(LatentBank(x))), wrong_model)
    result = means.means()
    parts = result["oracle"] + result["floor"] + result["cross"]
    torch.testing.assert_close(parts, result["conditional"], rtol=1e-5, atol=1e-6)
    entry = probe_entry({"train": means}, EDGES, STAGES)
    assert entry["alarm"] is None
    assert max(map(abs, entry["train"]["pythagoras_z"])) < 4


@pytest.mark.parametrize("broken", ["scale", "path", "labels"])
def test_a_wrong_oracle_raises_the_alarm(broken):
    x, labels = data(60, classes=3)
    x = x + 4 * torch.nn.functional.one_hot(labels, DIM)
    bank = LatentBank(1.1 * x if broken == "scale" else x, labels)
    right = LinearPath()
    probe = probe_of(x, labels, Oracle(bank, right))
    if broken == "path":
        other = probe_of(x, labels, Oracle(bank, CosinePath()))
        probe.oracle_u = other.oracle_u

    def model(xt, t, y):
        # For the labels: a model that knows the class, and an oracle that does not.
        return wrong_model(xt, t, y) + (y[:, None] == torch.arange(DIM)).float()

    entry = probe_entry({"train": measured(probe, model)}, EDGES, STAGES)
    assert max(map(abs, entry["train"]["pythagoras_z"])) > ALARM
    assert "not oracle error + floor" in entry["alarm"]
    if broken == "labels":
        wise = probe_of(x, labels, Oracle(bank, right), class_wise=True)
        entry = probe_entry({"train": measured(wise, model)}, EDGES, STAGES)
        assert entry["alarm"] is None


def test_the_oracle_itself_has_no_error_and_the_floor_for_its_conditional_one():
    x, labels = data(60, classes=3)
    oracle = Oracle(LatentBank(x, labels))
    probe = probe_of(x, labels, oracle, class_wise=True)
    means = measured(probe, lambda xt, t, y: oracle.velocity(xt, t, y.tolist()))
    entry = probe_entry({"train": means}, EDGES, STAGES)
    train = entry["train"]
    # At the last times dividing by 1 - t costs digits.
    assert max(train["oracle"][:-1]) < 1e-8
    assert train["conditional"][:-1] == pytest.approx(train["floor"][:-1], rel=1e-4)
    assert train["cosine"][:-1] == pytest.approx([1] * 5, abs=1e-6)
    stages = entry["stages"]["train"]
    assert stages["navigation"]["oracle"] < 1e-8
    assert stages["navigation"]["floor"] > 0.1


def test_ranks_share_the_same_queries():
    x, labels = data(60, classes=3)
    oracle = Oracle(LatentBank(x, labels))
    whole = probe_of(x, labels, oracle)
    parts = [probe_of(x, labels, oracle, rank=rank, world_size=3) for rank in range(3)]
    for name in ("t", "xt", "u", "oracle_u", "labels"):
        value = getattr(whole, name)
        shared = torch.empty_like(value)
        for rank, part in enumerate(parts):
            shared[rank::3] = getattr(part, name)
        torch.testing.assert_close(shared, value, rtol=1e-6, atol=1e-6)


def test_each_sample_is_taken_equally_often():
    x, _ = data(n=48)
    probe = probe_of(x, None, Oracle(LatentBank(x)), queries=16)  # 96 queries: each sample twice
    made_from = probe.xt + (1 - probe.t)[:, None] * probe.u  # x_1, on the linear path
    found = torch.cdist(made_from, x).argmin(1).bincount(minlength=len(x))
    assert found.tolist() == [2] * len(x)


def test_the_gap_is_held_out_minus_training():
    x, _ = data()
    oracle = Oracle(LatentBank(x))
    found = {
        "train": measured(probe_of(x, None, oracle), wrong_model),
        "held_out": measured(probe_of(3 + data(seed=1)[0], None, oracle, seed=(0, 1)), wrong_model),
    }
    entry = probe_entry(found, EDGES, STAGES)
    for gap, one, other in zip(
        entry["gap"], entry["held_out"]["conditional"], entry["train"]["conditional"], strict=True
    ):
        assert gap == pytest.approx(one - other)
        assert gap > 1
    assert "floor" not in entry["held_out"]


def test_relative_excess_is_oracle_error_over_the_floor_and_nothing_without_one():
    x, _ = data()
    train = probe_entry(
        {"train": measured(probe_of(x, None, Oracle(LatentBank(x))), wrong_model)}, EDGES, STAGES
    )["train"]
    assert train["floor"][0] > 0.5
    for excess, oracle, floor, error in zip(
        train["excess"], train["oracle"], train["floor"], train["conditional"], strict=True
    ):
        assert math.isnan(excess) == (floor < 1e-3 * error)
        assert math.isnan(excess) or excess == pytest.approx(oracle / floor)
    # Where the posterior has collapsed there is no floor to compare with.
    assert math.isnan(train["excess"][-1])


@pytest.mark.parametrize("place", ["loss", "scheme"])
def test_the_nominal_density_is_that_of_the_sampler(place):
    sampler = LogitNormal(-0.5, 0.8)
    module = nn.Module()
    module.loss = (
        FlowMatchingLoss(timesteps=sampler)
        if place == "loss"
        else FlowMatchingLoss(scheme=Scheme(timesteps=sampler))
    )
    (maker,) = find_target_makers(module)
    shares = nominal_shares(maker, EDGES)
    ends = torch.special.ndtr((torch.logit(EDGES) + 0.5) / 0.8)
    assert shares == pytest.approx(ends.diff().tolist(), abs=1e-4)
    # The realised one, of draws, is that within their errors.
    means = BinnedSums.empty(EDGES, ("loss", "gradient"))
    t = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
    means.update(t, torch.zeros(2, len(t)))
    entry = window_entry(means, EDGES, EDGES[[0, 2, 4, 6]], shares)
    assert entry["draws"] == pytest.approx(entry["density"], abs=4 * (0.25 / 20_000) ** 0.5)
    module.loss.timesteps = module.loss.scheme = None
    assert nominal_shares(maker, EDGES) is None, "not known"


def test_what_is_spent_adds_up_to_one():
    t = torch.tensor([0.1, 0.1, 0.5, 0.9])
    means = BinnedSums.empty(torch.cat([EDGES, STAGES]).unique(), ("loss", "gradient"))
    means.update(t, torch.tensor([[1.0, 3.0, 4.0, 2.0], [1.0, 1.0, 1.0, 5.0]]))
    shares = spent(means, STAGES)
    assert shares["navigation"] == {"draws": 0.5, "loss": 0.4, "gradient": 0.25}
    assert shares["refinement"] == {"draws": 0.25, "loss": 0.2, "gradient": 0.625}
    window = window_entry(means, EDGES, STAGES, None)
    assert window["samples"] == 4
    assert sum(window["draws"]) == pytest.approx(1)
    assert window["loss"][0] == 2.0
