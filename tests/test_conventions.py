"""Targets made in each of nine conventions are those of MATH.md, in float64."""

import copy
import math
import pickle
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stagewise import (
    Condition,
    ConditionedOracle,
    CosinePath,
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    Scheme,
    SmoothedOracle,
    Smoothing,
    same_path,
)
from stagewise.adapters import assumed_makers
from stagewise.adapters.network_search import NetworkSearch
from stagewise.callbacks import PosteriorMonitor, StageRun, VelocityErrorMonitor
from stagewise.conventions import CONVENTIONS, Convention, DDPMPath, as_convention, ddpm, written
from stagewise.losses import FlowMatchingLoss
from stagewise.paths import Prediction
from stagewise.sampling import model_velocity
from stagewise.stage_target import StageTarget
from stagewise.timesteps import LogitNormal

N, D, B, STEPS, SIGMA_DATA = 40, 6, 64, 1000, 0.5
ROWS = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
ACP = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS), 0)


def of_vp(tau):
    alpha = torch.exp(-0.25 * 19.9 * tau**2 - 0.05 * tau)
    return alpha, (1 - alpha**2).sqrt()


def of_step(k):
    return ACP.double()[k].sqrt(), (1 - ACP.double()[k]).sqrt()


def uniform(low=0.02, high=0.98):
    return low + (high - low) * torch.rand(B, generator=torch.Generator().manual_seed(3)).double()


def sigmas():
    return torch.exp(
        1.2 * torch.randn(B, generator=torch.Generator().manual_seed(3)) - 1.2
    ).double()


def steps():
    return torch.randint(0, STEPS, (B,), generator=torch.Generator().manual_seed(3))


def edm_f(x1, x0, x, sigma):
    skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    return (x1 - skip * x) / out


# For each: what is passed, its times, (a, s) with x = a x_1 + s x_0, the target as its library
# writes it, and how much of the target is x_1 while x is held: dy/dx_1.
NINE = {
    "sit": ("sit", uniform, lambda t: (t, 1 - t), lambda x1, x0, *_: x1 - x0),
    "pi0": ("pi0", uniform, lambda t: (1 - t, t), lambda x1, x0, *_: x0 - x1),
    "diffusers": (
        "diffusers",
        lambda: 1000 * uniform(),
        lambda t: (1 - t / 1000, t / 1000),
        lambda x1, x0, *_: x0 - x1,
    ),
    "edm": ("edm", sigmas, lambda s: (1 + 0 * s, s), lambda x1, *_: x1),
    "edm_F": (
        "edm_F",
        sigmas,
        lambda s: (1 + 0 * s, s),
        lambda x1, x0, x, a, s: edm_f(x1, x0, x, s),
    ),
    "ddpm noise": (ddpm(ACP), steps, of_step, lambda x1, x0, *_: x0),
    "ddpm v": (ddpm(ACP, "v"), steps, of_step, lambda x1, x0, x, a, s: a * x0 - s * x1),
    "ddpm x_0": (ddpm(ACP, "data"), steps, of_step, lambda x1, *_: x1),
    "score_sde": ("score_sde", uniform, of_vp, lambda x1, x0, x, a, s: -x0 / s),
}


@pytest.mark.parametrize("name", NINE)
def test_the_target_is_that_of_the_mathematics(name):
    """`E[y | x_t]` over the rows: the mean of the library's own target over the posterior."""
    convention, times, coefficients, target = NINE[name]
    time = times()
    a, s = (value[:, None] for value in coefficients(time))
    source = torch.randint(N, (B,), generator=torch.Generator().manual_seed(1))
    x1 = ROWS[source].double()
    x0 = torch.randn(B, D, generator=torch.Generator().manual_seed(2)).double()
    x = a * x1 + s * x0
    y = target(x1, x0, x, a, s)
    # By brute force: each row in place of x_1, the noise following from it.
    gap = x[:, None] - a[:, None] * ROWS.double()
    gamma = torch.softmax(-gap.square().sum(2) / (2 * s**2), 1)[..., None]
    each = target(ROWS.double(), gap / s[:, None], x[:, None], a[:, None], s[:, None])
    expected = (gamma * each.expand(gap.shape)).sum(1)

    oracle = Oracle(LatentBank(ROWS), convention=convention)
    for scheme in (
        Scheme(oracle, target=Mix()),
        Scheme(Oracle(LatentBank(ROWS), oracle.path), target=Mix(), convention=convention),
    ):
        found, weight = scheme(y, xt=x, t=time, x1=x1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(weight, torch.ones_like(weight))
        corrected = y + scheme.correct(xt=x, t=time, x1=x1)
        torch.testing.assert_close(corrected, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y + oracle.correction(x, time, x1), expected, rtol=1e-5, atol=1e-5)
    by_hand = StageTarget(convention=convention)
    by_hand.scheme = Scheme(oracle.inner, target=Mix())
    assert torch.equal(by_hand.eval()(y, xt=x, t=time, x1=x1)[0], y)
    found, _ = by_hand.train()(y, xt=x, t=time, x1=x1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mean = (gamma * ROWS.double()).sum(1)
    torch.testing.assert_close(oracle.posterior(x, time).mean, mean, rtol=1e-5, atol=1e-5)

    # Oracles that weigh rows, or smooth them, take it as the plain one does.
    banks = LatentBank(ROWS, conditions=ROWS[:, :2]), LatentBank(ROWS)
    one, point = torch.ones(B, 2), Smoothing(banks[1], 3, scale=0.0, progress=False)
    for other, given in (
        (ConditionedOracle(banks[0], None, Condition(bandwidth=1e9), convention=convention), one),
        (SmoothedOracle(banks[1], None, point, convention=convention), None),
    ):
        added = other.correction(x, time, x1, condition=given)
        torch.testing.assert_close(y + added, expected, rtol=1e-5, atol=1e-5)

    # A model that predicts it has the velocity of the oracle, and no loss in the objective.
    told = as_convention(convention)
    xt, t = told.inside(x, time)
    assert 0 <= float(t.min()) <= float(t.max()) <= 1
    back = told.outside(xt, t)
    torch.testing.assert_close(back[0], x)
    torch.testing.assert_close(back[1], time.to(back[1]), rtol=1e-5, atol=1e-4)

    def model(given, when):
        torch.testing.assert_close(given, x)
        return expected

    velocity = model_velocity(model, path=oracle.path, convention=convention)(xt, t.double())
    inner = oracle.inner.velocity(xt, t.double())
    if name in ("sit", "pi0", "diffusers"):
        torch.testing.assert_close(oracle.velocity(x, time), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"oracle\.inner\.velocity\(\*oracle\.convention"):
            oracle.velocity(x, time)
        line = oracle.inner.velocity(*oracle.convention.inside(x, time))
        torch.testing.assert_close(line, inner, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(velocity, inner, rtol=1e-4, atol=1e-3)
    loss_fn = FlowMatchingLoss(convention=convention)
    assert float(loss_fn(lambda *_: y.float(), x1.float(), x0=x0.float(), t=t)) < 1e-6


@pytest.mark.parametrize("steered", [False, True])
def test_an_objective_draws_whole_steps_of_ddpm(steered):
    scheme = Scheme(path=DDPMPath(ACP), timesteps=LogitNormal()) if steered else None
    loss_fn = FlowMatchingLoss(convention=ddpm(ACP), scheme=scheme)
    x1 = ROWS[torch.randint(N, (256,))]
    x0, asked = torch.randn(256, D), []

    def model(x, k):
        asked.append((x, k))
        return x0

    assert float(loss_fn(model, x1, x0=x0)) < 1e-12
    ((x, k),) = asked
    assert torch.equal(k, k.round())
    assert 0 <= k.min() < k.max() <= STEPS - 1
    assert len(k.unique()) > STEPS / 8
    a, s = (value[:, None] for value in of_step(k.long()))
    torch.testing.assert_close(x, (a * x1 + s * x0).float(), rtol=1e-5, atol=1e-5)


def test_names_are_those_of_the_table():
    assert as_convention("pi0") == as_convention("repa") == Convention(1, 0, -1)
    told = ddpm(ACP, "v")
    assert (told.noise_time, told.data_time, told.prediction.kind) == (STEPS - 1, 0, "v")
    assert as_convention(told) is told
    assert written(told) == 'ddpm(alphas_cumprod, "v")'
    for name, convention in CONVENTIONS.items():
        text = written(convention)
        assert eval(text) in CONVENTIONS, name
        assert CONVENTIONS[eval(text)] == convention
    for odd in (Convention(1, 0, 1), Convention(math.inf, 0, prediction=Prediction("noise"))):
        assert eval(written(odd)) == odd


def test_the_path_of_a_schedule():
    path = DDPMPath(ACP)
    k = torch.arange(STEPS)
    for dtype in (torch.float32, torch.float64):
        t = 1 - k.to(dtype) / (STEPS - 1)
        a, s, *_ = path(t)
        assert a.dtype is dtype
        exact = 1e-6 if dtype is torch.float32 else 1e-12
        torch.testing.assert_close(a.double(), ACP.double().sqrt(), rtol=exact, atol=exact / 10)
        torch.testing.assert_close(s.double(), (1 - ACP.double()).sqrt(), rtol=exact, atol=1e-12)
    t = (torch.arange(50, dtype=torch.float64) + 0.37) / 50.5
    a, s, d_a, d_s = path(t)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(t))
    assert bool((path.snr_sqrt(t).diff() > 0).all())
    for value, slope in ((0, d_a), (1, d_s)):
        rise = (path(t + 1e-6)[value] - path(t - 1e-6)[value]) / 2e-6
        torch.testing.assert_close(slope, rise, rtol=1e-5, atol=1e-6)
    for again in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
        assert same_path(again, path)
    assert not same_path(path, DDPMPath(ACP**1.1))
    # Zero terminal SNR: no data are left at the last step.
    ends = DDPMPath(torch.linspace(1, 0, 10))(torch.tensor([0.0, 1.0]))
    assert ends.alpha.tolist() == [0, 1]
    assert ends.sigma.tolist() == [1, 0]


def test_what_is_no_convention():
    for wrong, error, match in (
        ("ddpm", ValueError, r"convention=noise_scheduler, or its numbers: ddpm\(alphas_cumprod"),
        ("sdxl", ValueError, "one of 'sit', .*'score_sde'.* got 'sdxl'"),
        (1000, TypeError, 'a name such as "diffusers"'),
    ):
        for make in (as_convention, lambda told: Scheme(convention=told)):
            with pytest.raises(error, match=match):
                make(wrong)
    for wrong in (torch.rand(3, 3), torch.linspace(0, 1, 9), torch.linspace(2, 1, 9)):
        with pytest.raises(ValueError, match="numbers that fall within"):
            ddpm(wrong)
    bank = LatentBank(ROWS)
    for make in (
        lambda: Oracle(bank, LinearPath(), convention=ddpm(ACP)),
        lambda: Scheme(Oracle(bank), convention=ddpm(ACP)),
        lambda: FlowMatchingLoss(CosinePath(), convention="edm"),
        lambda: Convention(math.inf, 0, path=CosinePath()),
    ):
        with pytest.raises(ValueError, match=r"Expected (the path of the convention|noise levels)"):
            make()
    for convention, time in ((ddpm(ACP), torch.tensor([0, 1000])), ("pi0", torch.tensor([0.0, 2]))):
        oracle = Oracle(bank, convention=convention)
        last = 999 if convention != "pi0" else 1
        with pytest.raises(ValueError, match=rf"in \[0, {last}\] with t = {last} noise and t = 0"):
            oracle.posterior(ROWS[:2], time)


@pytest.mark.parametrize("name", NINE)
def test_what_fits_another_convention_is_refused_with_a_line_that_works(name):
    convention, times, coefficients, target = NINE[name]
    time = times()
    a, s = (value[:, None].float() for value in coefficients(time))
    x1, x0 = (
        ROWS[torch.arange(B) % N],
        torch.randn(B, D, generator=torch.Generator().manual_seed(5)),
    )
    x = a * x1 + s * x0
    y = target(x1, x0, x, a, s)
    for other in NINE:
        told = NINE[other][0]
        if as_convention(told) == as_convention(convention):
            continue
        scheme = Scheme(Oracle(LatentBank(ROWS), convention=told), target=Mix())
        with pytest.raises(ValueError, match="Expected") as error:
            scheme(y, xt=x, t=time, x1=x1)
        message = str(error.value)
        if "Integer timesteps need the schedule" in message:
            assert not time.is_floating_point()
            continue
        cure, kind = (
            re.search(rf"{word}=\"(\w+)\"", message) for word in ("convention", "prediction")
        )
        assert cure or kind, message
        oracle = Oracle(LatentBank(ROWS), convention=cure[1] if cure else told)
        cured = Scheme(oracle, target=Mix())
        cured(y, xt=x, t=time, x1=x1, prediction=kind[1] if kind else None)


class Step(torch.nn.Module):
    """A network of two arguments, called by a step that is written out."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Bilinear(D, 1, D)

    def forward(self, x, time):
        return self.net(x, time.float()[:, None] / 100)


@pytest.mark.parametrize("name", NINE)
def test_a_step_by_hand_is_recognised(name):
    """By the convention that is said, or by one of the usual ones, and by no other."""
    convention, times, coefficients, _ = NINE[name]
    told, time = as_convention(convention), times()
    a, s = (value[:, None].float() for value in coefficients(time))
    x1 = ROWS[torch.arange(B) % N]
    x = a * x1 + s * torch.randn(B, D, generator=torch.Generator().manual_seed(5))
    usual = name in ("sit", "pi0", "diffusers", "edm", "edm_F")
    for makers in (assumed_makers(convention=told), *([assumed_makers()] if usual else [])):
        module = Step()
        search = NetworkSearch(module, makers, lambda: [("batch", x1)], None)
        module(x, time if not time.is_floating_point() else time.float())
        search.stop()
        network = search.result()
        if name != "edm_F" or len(makers) == 1:
            assert network.maker.convention == told
        xt, t = network.inputs((x, time), {})
        torch.testing.assert_close(t, told.to_t(time).float())
        torch.testing.assert_close(xt, told.inside(x, time)[0].float())


class Script(pl.LightningModule):
    """Noise prediction with integer steps, written out; it may hold a scheduler of diffusers."""

    def __init__(self, scheduler=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = Step()
        if scheduler is not None:
            self.noise_scheduler = scheduler

    def training_step(self, batch, batch_idx):
        (x1,) = batch
        k, x0 = torch.randint(STEPS, (len(x1),)), torch.randn_like(x1)
        a, s = (value.float()[:, None] for value in of_step(k))
        return (self.net(a * x1 + s * x0, k) - x0).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("held", [True, False])
def test_monitors_watch_a_step_by_hand(held, make_trainer, read_stages, tmp_path, quick_figures):
    """They find a scheduler, or are told; nothing of the training changes."""
    scheduler = pytest.importorskip("diffusers").DDPMScheduler() if held else None
    run = StageRun(**({} if held else {"convention": ddpm(ACP)}))
    monitors = [PosteriorMonitor(strata=4, queries=8), VelocityErrorMonitor(strata=4, queries=8)]
    found, weights = [], []
    for callbacks in ([], [run, *monitors]):
        module = Script(scheduler)
        if callbacks:
            plain = run.tell

            def tell(what, *values, plain=plain):
                if what == "settle":
                    found.append((run.path, run.look.network))
                plain(what, *values)

            run.tell = tell
        torch.manual_seed(1)
        trainer = make_trainer(*callbacks, max_steps=4)
        trainer.fit(module, DataLoader(TensorDataset(ROWS), 20))
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ((path, network),) = found
    assert same_path(path, DDPMPath(ACP))
    assert network.maker.prediction.kind == "noise"
    xt, t = ROWS[:5], torch.linspace(0.1, 0.9, 5)
    k = ((STEPS - 1) * (1 - t)).round()
    expected = Prediction("noise").to_velocity(path(t), network.module(xt, k), xt)
    torch.testing.assert_close(network(xt, t), expected)
    header, _ = read_stages(next(tmp_path.rglob("stages.jsonl")).parent)
    assert header["path"].startswith("DDPMPath")


def test_code_and_names_of_the_page():
    page = (Path(__file__).parents[1] / "docs/conventions.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"torch": torch, "latents": torch.randn(60, 3, 4, 4)}
    exec(block, names)
    m = names["oracle"].posterior(names["a"] * names["x1"] + names["s"] * names["x0"], names["k"])
    expected = names["a"] * names["x0"] - names["s"] * names["x1"]
    expected = expected - (m.mean - names["x1"]) / names["s"]
    torch.testing.assert_close(names["v_star"].double(), expected, rtol=1e-5, atol=1e-5)
    assert all(f'`"{name}"`' in page or f'`"{name}"' in page for name in CONVENTIONS)


def test_two_schedules_said_for_one_run_are_refused(make_trainer):
    """Conventions with the same times may stand for two paths."""
    one, two = (
        PosteriorMonitor(name=name, convention=ddpm(ACP**p)) for name, p in (("a", 1), ("b", 2))
    )
    said = StageRun()
    with pytest.raises(ValueError, match=r"convention=.* differ"):
        make_trainer(said, one, two, max_steps=1).fit(Script(), DataLoader(TensorDataset(ROWS), 20))
