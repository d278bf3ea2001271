"""The objective and the timestep samplers, without Lightning."""

import copy
import math

import pytest
import torch
from torch import nn

from stagewise import DIFFUSERS, CosinePath, LinearPath, LogitNormal, Prediction, Uniform
from stagewise.losses import FlowMatchingLoss


def test_loss_equals_the_formula():
    x0, x1 = torch.randn(2, 6, 3, 4, 4)
    t = torch.rand(6)
    scale = torch.rand(6)
    loss_fn = FlowMatchingLoss(weight=lambda t: 2 + t)
    loss = loss_fn(lambda xt, t, s: s[:, None, None, None] * xt, x1, scale, x0=x0, t=t)
    total = 0.0
    for i in range(6):
        xt = t[i] * x1[i] + (1 - t[i]) * x0[i]
        per_sample = ((scale[i] * xt - (x1[i] - x0[i])) ** 2).mean()
        torch.testing.assert_close(loss_fn.last.loss[i], per_sample)
        total += float((2 + t[i]) * per_sample) / 6
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert torch.equal(loss_fn.last.t, t)
    torch.testing.assert_close(loss_fn.last.weight, 2 + t)
    assert list(loss_fn.parameters()) + list(loss_fn.buffers()) == []


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "edm"])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_a_model_that_knows_the_answer_has_no_loss(path, kind):
    x0, x1, t = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5) * 0.8 + 0.1
    answer = Prediction(kind).target(path(t), x0, x1)
    loss_fn = FlowMatchingLoss(path, kind)
    assert float(loss_fn(lambda xt, t: answer, x1, x0=x0, t=t)) < 1e-9
    assert float(loss_fn(lambda xt, t: answer + 1, x1, x0=x0, t=t)) == pytest.approx(1, rel=1e-5)


def test_convention_is_applied_at_the_border():
    seen = {}
    x0, x1, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.0, 0.25, 1.0])

    def model(xt, time):
        seen["time"] = time
        return x0 - x1  # noise - data, as the SD3 scripts regress

    loss_fn = FlowMatchingLoss(convention=DIFFUSERS)
    assert float(loss_fn(model, x1, x0=x0, t=t)) < 1e-12
    assert seen["time"].tolist() == [1000, 750, 0]
    assert torch.equal(loss_fn.last.t, t)  # inside, t = 0 stays noise


def test_gradient_reaches_the_model_and_the_record_holds_none():
    net = nn.Linear(4, 4)
    loss_fn = FlowMatchingLoss()
    loss_fn(lambda xt, t: net(xt), torch.randn(8, 4)).backward()
    assert net.weight.grad.abs().sum() > 0
    assert not loss_fn.last.loss.requires_grad
    assert copy.deepcopy(loss_fn).last.loss.shape == (8,)


def test_generator_decides_the_draws_and_the_global_one_stays():
    x1 = torch.randn(16, 4)
    loss_fn = FlowMatchingLoss()

    def draw():
        return float(
            loss_fn(lambda xt, t: xt, x1, generator=torch.Generator().manual_seed(3)).detach()
        )

    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert draw() == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input(dtype):
    x1 = torch.randn(8, 4).to(dtype)
    loss_fn = FlowMatchingLoss()
    loss = loss_fn(lambda xt, t: xt if xt.dtype == dtype and t.dtype == torch.float32 else None, x1)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_bad_shapes_are_refused():
    loss_fn, x1 = FlowMatchingLoss(), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"`t` with shape \(8,\), got \(8, 1\)"):
        loss_fn(lambda xt, t: xt, x1, t=torch.rand(8, 1))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        loss_fn(lambda xt, t: xt, x1, t=torch.full((8,), 500.0))
    with pytest.raises(ValueError, match="`x0` with the shape of `x1`"):
        loss_fn(lambda xt, t: xt, x1, x0=torch.randn(8, 1))
    with pytest.raises(ValueError, match=r"return the shape of `x1`, \(8, 4\), got \(8, 8\)"):
        loss_fn(lambda xt, t: torch.cat([xt, xt], 1), x1)
    with pytest.raises(ValueError, match=r"`weight\(t\)` with shape \(8,\), got \(8, 1\)"):
        FlowMatchingLoss(weight=lambda t: t[:, None])(lambda xt, t: xt, x1)


SAMPLERS = [Uniform(), LogitNormal(), LogitNormal(-0.8, 1.6)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_draws_follow_the_density(sampler):
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    density = sampler.density(grid)
    cdf = torch.cumulative_trapezoid(density, grid)
    assert float(cdf[-1]) == pytest.approx(1, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    draws = sampler.sample(100_000, generator=generator).double().sort().values
    at = cdf[(draws * 20_000).long().clamp_max(len(cdf) - 1)]
    distance = (at - (torch.arange(100_000) + 0.5) / 100_000).abs().max()
    assert distance < 1.95 / math.sqrt(100_000)  # Kolmogorov-Smirnov at 0.1 %


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
    with pytest.raises(ValueError, match="`std` above 0"):
        LogitNormal(std=0)
