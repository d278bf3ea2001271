"""The oracle of a smoothed set where float32 is used: against a dense mixture in float64."""

import pytest
import torch

from stagewise import LatentBank, LinearPath, Oracle, SmoothedOracle, Smoothing
from stagewise.gaussian_engine import GaussianEngine

from .test_smoothing import PATHS, TIMES, assert_dense, draws, labels, queries, samples

LOOSE = {"mean": 1e-5, "others": 1e-4}
"""In float32 entropy, effective sample size and weights are right to 1e-4."""


@pytest.fixture(autouse=True)
def float32_for_any_number_of_rows(monkeypatch):
    monkeypatch.setattr("stagewise.gaussian_engine._SMALL", 0)


@pytest.fixture
def never_in_float64(monkeypatch):
    """Float64 throughout would hide rows that were dropped."""
    monkeypatch.setattr("stagewise.gaussian_engine._MANY", 0.1)


def near_duplicates(n):
    x = torch.randn(n, 10, generator=draws())
    x[n // 2 :] = x[: n - n // 2] + 1e-4 * torch.randn(n - n // 2, 10, generator=draws(1))
    return x


def lines(n):
    """Rows on a few long lines: Gaussians reach far, and rows off them are as near."""
    along = torch.randn(n, 1, generator=draws()) * 30
    at = torch.arange(n) % 5
    directions = torch.randn(5, 10, generator=draws(1))
    return along * directions[at] + 0.3 * torch.randn(n, 10, generator=draws(2))


def pairs_far_apart(n):
    """Each row's neighbour is close, but for a few whose neighbours are far."""
    x = torch.randn(n, 10, generator=draws()) / 2
    x[:20] += 40 * torch.randn(20, 10, generator=draws(1))
    return x


SETS = {
    "two clusters": samples,
    "near-duplicates": near_duplicates,
    "lines": lines,
    "far": pairs_far_apart,
    "offset": lambda n: samples(n, 10) + 300,
}


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(("neighbours", "floor"), [(1, 0.0), (4, 0.1), (32, 0.1)])
def test_few_rows(path, neighbours, floor):
    bank = LatentBank(samples(), labels())
    smoothing = Smoothing(bank, neighbours, 0.8, floor, progress=False)
    xt, _, _ = queries(smoothing, path, TIMES)
    assert_dense(SmoothedOracle(bank, path, smoothing), xt, TIMES, **LOOSE)


@pytest.mark.parametrize("floor", [0.0, 0.05])
@pytest.mark.parametrize("name", SETS)
def test_no_row_is_dropped(name, floor, never_in_float64):
    bank = LatentBank(SETS[name](700))
    smoothing = Smoothing(bank, 8, 1.0, floor, progress=False)
    t = torch.linspace(0.02, 0.99, 24).double()
    xt, _, _ = queries(smoothing, LinearPath(), t)
    assert_dense(SmoothedOracle(bank, LinearPath(), smoothing), xt, t, **LOOSE)


@pytest.mark.parametrize("class_wise", [False, True])
def test_classes(class_wise):
    """One class has one row, and neighbours may be of other classes."""
    bank = LatentBank(samples(700), labels(700))
    smoothing = Smoothing(bank, 8, 1.0, 0.05, class_wise=class_wise, progress=False)
    t = torch.linspace(0.05, 0.95, 12).double()
    xt, _, source = queries(smoothing, LinearPath(), t)
    oracle = SmoothedOracle(bank, LinearPath(), smoothing)
    assert_dense(oracle, xt, t, bank.labels_of(source.tolist()), **LOOSE)
    assert_dense(oracle, xt, t, [2] * 12, **LOOSE)


@pytest.mark.parametrize("name", SETS)
def test_ramps_and_both_ends_of_time(name, monkeypatch):
    bank = LatentBank(SETS[name](700))
    smoothing = Smoothing(bank, 8, 1.0, 0.05, progress=False)
    t = torch.linspace(0, 1, 33).double()
    xt, _, source = queries(smoothing, LinearPath(), t)
    ramp = {"strength": lambda t: ((t - 0.2) / 0.5).clamp(0, 1)}
    for options in ({}, ramp, {"boundary": 0.6}):
        oracle = SmoothedOracle(bank, LinearPath(), smoothing, **options)
        post = oracle.posterior(xt, t, source=source, k=3)
        with monkeypatch.context() as patched:
            patched.setattr("stagewise.gaussian_engine._SMALL", 10**9)
            expected = oracle.posterior(xt, t, source=source, k=3)
        size = (expected.mean - bank.centre).norm(dim=1).clamp_min(1e-6 * bank.radius)
        assert ((post.mean - expected.mean).norm(dim=1) / size).max() < 1e-5
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(post.source_weight, expected.source_weight, **close)
        torch.testing.assert_close(post.weights, expected.weights, **close)
        inner = slice(1, -1)  # at t = 1 neither holds digits after the point
        one, two = post.log_evidence[inner], expected.log_evidence[inner]
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_without_strength_it_is_the_plain_engine_to_the_last_bit():
    bank = LatentBank(samples(700), labels(700))
    smoothing = Smoothing(bank, 8, progress=False)
    oracle = SmoothedOracle(bank, LinearPath(), smoothing, boundary=0.6)
    assert isinstance(oracle.engine, GaussianEngine)
    t = torch.linspace(0.1, 0.5, 20)
    xt, _, source = queries(smoothing, LinearPath(), t.double())
    for names in (None, bank.labels_of(source.tolist())):
        one = oracle.posterior(xt, t, names, source=source, k=2)
        two = Oracle(bank, LinearPath()).posterior(xt, t, names, source=source, k=2)
        for name in ("mean", "log_evidence", "entropy", "ess", "weights", "rows", "source_weight"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_queries_alone_and_together():
    """Blocks of queries, and rows that lead for some of a block only."""
    bank = LatentBank(samples(1500))
    smoothing = Smoothing(bank, 8, 1.0, progress=False)
    t = torch.rand(150, generator=draws(5)).double() * 0.98
    xt, _, _ = queries(smoothing, LinearPath(), t)
    oracle = SmoothedOracle(bank, LinearPath(), smoothing)
    post = oracle.posterior(xt, t, k=2)
    for i in range(0, 150, 10):
        alone = oracle.posterior(xt[i : i + 1], t[i : i + 1], k=2)
        torch.testing.assert_close(alone.mean[0], post.mean[i], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(alone.weights[0], post.weights[i], rtol=1e-4, atol=1e-6)
