"""Forecasts: of targets, against covariances in closed form; of smoothing; and as a callback."""

import json
import math
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from stagewise import (
    AtStep,
    LatentBank,
    LogitNormal,
    Mix,
    Oracle,
    Phase,
    Phases,
    Scheme,
    Smoothing,
    StageAware,
    StageFactors,
    TargetForecast,
    forecast_smoothing,
    forecast_targets,
)
from stagewise.callbacks import Forecast, PosteriorMonitor, StageScheme, VelocityErrorMonitor
from stagewise.forecast import _estimate
from stagewise.losses import FlowMatchingLoss


def batches_of(x, size, count, labels=None, seed=0):
    """Random rows with replacement."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(count):
        at = torch.randint(len(x), (size,), generator=draws)
        yield x[at], None if labels is None else labels[at]


class Constant(nn.Module):
    """v = theta: the gradient of a sample is 2 (theta - u), whose covariance is 4 Cov u."""

    def __init__(self, dim=1):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dim))

    def forward(self, xt, t, labels=None):
        return self.theta.expand_as(xt)


class Linear(nn.Module):
    """v = theta x_t, a number for each coordinate."""

    def __init__(self, dim=1):
        super().__init__()
        self.theta = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, xt, t, labels=None):
        return self.theta * xt


def moments(a, power, theta):
    """E d^2, E g*^2 and (E g*)^2 of a coordinate that is a or -a, by quadrature.

    With v = theta x^p: d = (u* - u) x^p and g* = (theta x^p - u*) x^p.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    times, spans = np.polynomial.legendre.leggauss(400)
    removed = square = mean = 0.0
    for t, span in zip((times + 1) / 2, spans / 2, strict=True):
        for row in (a, -a):
            x = t * row + (1 - t) * nodes
            m = a * np.tanh(a * t * x / (1 - t) ** 2)
            g = (theta * x**power - (m - x) / (1 - t)) * x**power
            d_square = (a**2 - m**2) / (1 - t) ** 2 * x ** (2 * power)
            removed += span / 2 * (weights * d_square).sum()
            square += span / 2 * (weights * g**2).sum()
            mean += span / 2 * (weights * g).sum()
    return removed, square, mean**2


@pytest.mark.parametrize(
    ("net", "power"), [(Constant(6), 0), (Linear(6), 1)], ids=["constant", "linear"]
)
def test_share_and_noise_scale_are_those_of_the_closed_form(net, power):
    # All corners of a cube: the posterior is one for each coordinate.
    x = 0.8 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    removed, square, mean = moments(0.8, power, 0.3 * power)
    variance = removed + square - mean
    found = forecast_targets(net, net, Oracle(LatentBank(x)), batches_of(x, 256, 100))
    assert found.batch == 256
    assert 0.1 < removed / variance < 0.6
    assert abs(found.share - removed / variance) < 3 * found.error
    assert found.error < 0.03
    if power:
        assert found.noise_scale == pytest.approx(variance / mean, rel=0.15)
    else:
        assert found.noise_scale > 1e4, "by symmetry there is no signal"


def test_share_is_consistent_and_its_error_that_of_repeated_forecasts():
    draws = torch.Generator().manual_seed(0)

    def squares(n, mean):
        return -mean * torch.rand(n, generator=draws, dtype=torch.float64).log()

    signal = torch.tensor(9.0, dtype=torch.float64)
    found = [_estimate(squares(40, 1.0), squares(20, 2.0), signal, 8) for _ in range(400)]
    assert np.mean([one.share for one in found]) == pytest.approx(1 / 3, abs=0.01)
    spread = float(np.std([one.share for one in found], ddof=1))
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.1)
    many = _estimate(squares(20_000, 1.0), squares(10_000, 2.0), signal, 8)
    assert many.share == pytest.approx(1 / 3, abs=0.01)
    assert many.noise_scale == pytest.approx(8 * 3 / 9, rel=0.05)


def test_one_row_or_refinement_only_leaves_nothing_to_remove():
    x, one_row = 5 * torch.eye(4), torch.ones(2, 4)
    net = nn.Linear(4, 4)

    def velocity(xt, t, labels):
        return net(xt)

    alone = Oracle(LatentBank(one_row))
    one = forecast_targets(velocity, net, alone, batches_of(one_row, 8, 6))
    assert (one.share, one.factor, one.steps) == (0, 1, 1)
    late = StageAware(0.0, boundary=0.95)
    oracle = Oracle(LatentBank(x))
    assert forecast_targets(velocity, net, oracle, batches_of(x, 8, 6), timesteps=late).share < 1e-9
    assert forecast_targets(velocity, net, oracle, batches_of(x, 8, 6)).share > 0.01


def test_a_model_that_is_the_oracle_has_no_other_noise():
    x = torch.randn(6, 3)
    oracle, net = Oracle(LatentBank(x)), Constant(3)
    found = forecast_targets(
        lambda xt, t, _: oracle.velocity(xt, t) + net.theta, net, oracle, batches_of(x, 8, 6)
    )
    assert found.share == pytest.approx(1, abs=1e-6)
    assert found.worth_trying


def test_weights_and_classes_count():
    x, labels = torch.tensor([[2.0], [-2.0]]), torch.tensor([0, 1])
    oracle, net = Oracle(LatentBank(x, labels)), Linear()
    batches = list(batches_of(x, 16, 8, labels))
    assert forecast_targets(net, net, oracle, batches).share == 0  # one row to a class
    whole = forecast_targets(net, net, oracle, batches, class_wise=False)
    assert whole.share > 0.05
    early = forecast_targets(
        net, net, oracle, batches, class_wise=False, weight=lambda t: (t < 0.5).float()
    )
    assert early.share > whole.share


def test_adam_counts_what_it_steps_in_its_own_metric():
    x = torch.tensor([[0.8, 0.1], [-0.8, -0.1]])
    oracle, net = Oracle(LatentBank(x)), Constant(2)
    batches = list(batches_of(x, 16, 8))
    optimizer = torch.optim.Adam(net.parameters())
    plain = forecast_targets(net, net, oracle, batches)
    # Before the first step there are no second moments.
    assert forecast_targets(net, net, oracle, batches, optimizer=optimizer) == plain
    by_number = []
    for other in (1e12, 1e-12):  # only the first number counts, or only the second
        square = torch.tensor([1.0, other**2])
        optimizer.state[net.theta] = {"exp_avg_sq": square}
        by_number.append(forecast_targets(net, net, oracle, batches, optimizer=optimizer).share)
    assert by_number[0] > plain.share > by_number[1]
    frozen = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    with pytest.raises(ValueError, match="optimizer has none of the parameters"):
        forecast_targets(net, net, oracle, batches, optimizer=frozen)


def test_what_says_nothing_is_refused():
    x = torch.randn(16, 4)
    oracle, net = Oracle(LatentBank(x)), nn.Linear(4, 4)
    broken = [(torch.full((8, 4), math.nan), None)] * 4
    with pytest.raises(ValueError, match="finite gradients"):
        forecast_targets(lambda xt, t, _: net(xt), net, oracle, broken)
    batches = list(batches_of(x, 8, 4))
    with pytest.raises(ValueError, match=r"leave `\.detach\(\)`"):
        forecast_targets(lambda xt, t, _: net(xt).detach(), net, oracle, batches)
    with pytest.raises(TypeError, match=r"timesteps=LogitNormal\(\)"):
        forecast_targets(lambda xt, t, _: net(xt), net, oracle, batches, timesteps="lognormal")


def test_nothing_of_the_training_changes():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    net[2].eval()
    x = torch.randn(16, 4)
    oracle = Oracle(LatentBank(x))
    net(x).sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters())
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = [
        forecast_targets(
            lambda xt, t, _: net(xt), net, oracle, batches_of(x, 8, 4), optimizer=optimizer
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [part.training for part in net] == [True, True, False, True]
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": [(torch.zeros(2, 4), None)] * 3}, "at least 4 batches, got 3"),
        ({"batches": [(torch.zeros(n, 4), None) for n in (2, 3)]}, "one size, got 2 and 3"),
        ({"velocity": lambda xt, t, _: xt[:1]}, r"shape \(2, 4\), got \(1, 4\)"),
        ({"module": nn.Identity()}, "Identity has none. Unfreeze.*module.net.requires_grad_"),
    ],
)
def test_refusals(change, message):
    net = nn.Linear(4, 4)
    given = {
        "velocity": lambda xt, t, _: net(xt),
        "module": net,
        "oracle": Oracle(LatentBank(torch.randn(3, 4))),
        "batches": [(torch.zeros(2, 4), None)] * 4,
    }
    with pytest.raises(ValueError, match=message):
        forecast_targets(**(given | change))


def test_sentences_and_verdicts():
    little = TargetForecast(share=0.2, error=0.01, noise_scale=256.0, batch=128)
    assert little.factor == pytest.approx(1.25)
    assert little.steps == pytest.approx((1 + 2 / 1.25) / 3)
    assert str(little) == (
        "oracle targets are worth a batch of 1.25 times the size here (1.22 to 1.28), and about "
        "0.87 of the steps: do not bother"
    )
    much = TargetForecast(share=0.6, error=0.01, noise_scale=math.inf, batch=128)
    assert (much.steps, much.worth_trying) == (pytest.approx(0.4), True)
    assert str(much).endswith("about 0.40 of the steps: worth trying")
    drowned = TargetForecast(share=0.6, error=0.01, noise_scale=12.8, batch=128)
    assert not drowned.worth_trying, "there is no noise to speak of in such a batch"


def probe_with(gap, train=1.0, error=0.02, bins=10):
    """A probe of ten bins with these gaps by bin."""
    return {
        "train": {"conditional": [train] * bins},
        "gap": [gap(place / bins) for place in range(bins)],
        "gap_se": [error] * bins,
    }


def test_smoothing_has_something_to_gain_where_a_gap_is():
    edges = [place / 10 for place in range(11)]
    found = forecast_smoothing(probe_with(lambda t: 0.4 * (t >= 0.69)), edges, 0.5)
    assert (found.t_from, found.t_to, found.gap) == pytest.approx((0.7, 1.0, 0.4))
    assert str(found) == (
        "held-out error is 40% above that on training rows for t in [0.70, 1.00]: smoothing has "
        "something to gain"
    )
    early = forecast_smoothing(probe_with(lambda t: 0.4 * (t < 0.5)), edges, 0.5)
    assert not early.worth_trying
    assert str(early).endswith("do not bother")
    small = probe_with(lambda t: 0.05)
    assert not forecast_smoothing(small, edges, 0.5).worth_trying
    loud = probe_with(lambda t: 0.4, error=0.5)
    assert not forecast_smoothing(loud, edges, 0.5).worth_trying
    assert forecast_smoothing({"gap": None}, edges, 0.5) is None
    assert forecast_smoothing(probe_with(lambda t: 1.0), edges, 1.0) is None


# -- the callback ---------------------------------------------------------------------------------


@pytest.fixture
def fit(make_data, make_trainer, tiny_flow, make_loader):
    """`fit(*callbacks, ...)`: a run of eight steps with held-out data; gives its model."""

    def fit(*callbacks, model=None, max_steps=8, **options):
        model = model or tiny_flow()
        model.validation_step = lambda batch, batch_idx: None
        pl.seed_everything(4, verbose=False)
        loaders = make_loader(make_data()[0], shuffle=True), make_loader(make_data(40)[0] + 0.1)
        make_trainer(*callbacks, max_steps=max_steps, **options).fit(model, *loaders)
        return model

    return fit


FEW = {"every_n_steps": 2, "strata": 8, "queries": 4, "figures": 0}


def test_forecasting_changes_nothing_and_says_both(fit, weights, tmp_path, read_stages):
    plain = weights(fit())
    callback = Forecast()
    logger = CSVLogger(tmp_path, "csv", version="")
    watched = fit(PosteriorMonitor(**FEW), VelocityErrorMonitor(**FEW), callback, logger=logger)
    assert torch.equal(weights(watched), plain)
    assert all(module.training for module in watched.modules())
    assert [entry["step"] for entry in callback.history] == [2, 4, 6, 8]
    header, *_ = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    kinds = ("share", "batch_factor", "steps", "probe_seconds")
    assert {f"stagewise_forecast/{kind}" for kind in kinds} <= set(header.split(","))
    about, events = read_stages(tmp_path / "csv" / "stagewise_forecast")
    assert (about["event"], about["class_wise"]) == ("forecasts", False)
    assert [event["event"] for event in events] == ["forecast"] * 4
    for event in events:
        assert 0 < event["share"] < 1
        assert event["targets"].startswith("oracle targets are worth a batch of")
        assert event["smoothing"].startswith(("no gap", "held-out error"))
        assert event["batch"] == 8


def later(oracle):
    """Two stages after five of eight steps."""
    return Phases([Phase(Scheme(), AtStep(5)), Phase(Scheme.two_stage(oracle))])


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize(
    ("make", "mixed", "smoothed"),
    [
        (lambda o: Scheme(o, target=Mix("boundary")), [True, True], [False, False]),
        (lambda o: Scheme(smoothing=Smoothing(o.bank, 4)), [False, False], [True, True]),
        (later, [False, True], [False, True]),
    ],
)
def test_what_a_training_has_already_is_not_advised(fit, make, mixed, smoothed):
    callback = Forecast(every_n_steps=4)
    fit(VelocityErrorMonitor(**FEW), callback, StageScheme(make))
    said = [(entry["targets"], entry["smoothing"]) for entry in callback.history]
    assert ["which this training has, are worth" in one for one, _ in said] == mixed
    assert [not one.endswith(("worth trying", "do not bother")) for one, _ in said] == mixed
    assert [other.endswith(", in a training that smooths") for _, other in said] == smoothed
    assert [": " not in other for _, other in said] == smoothed, "no advice"


def test_a_gap_in_spite_of_smoothing_is_told_without_the_advice():
    edges = [place / 10 for place in range(11)]
    found = replace(forecast_smoothing(probe_with(lambda t: 0.4), edges, 0.5), used=True)
    assert not found.worth_trying
    assert str(found) == (
        "held-out error is 40% above that on training rows for t in [0.50, 1.00], in a training "
        "that smooths"
    )
    much = TargetForecast(share=0.6, error=0.01, noise_scale=math.inf, batch=128, used=True)
    assert not much.worth_trying
    assert TargetForecast.mean([much, much]).used


def test_what_it_measures_is_what_the_function_does(fit):
    callback, seen = Forecast(every_n_steps=4), []

    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                net = pl_module.net

                def velocity(xt, t, labels):
                    return net(torch.cat([xt, t[:, None]], 1))

                seen.append(
                    forecast_targets(
                        velocity,
                        pl_module,
                        callback.run.oracle(callback),
                        callback._batches(),
                        optimizer=trainer.optimizers[0],
                    )
                )

    fit(callback, Ask(), accumulate_grad_batches=2, max_steps=4)
    first = callback.history[0]
    assert first["share"] == pytest.approx(seen[0].share, rel=1e-5)
    assert first["share_se"] == pytest.approx(seen[0].error, rel=1e-4)
    assert first["batch"] == 16, "two batches of 8 for a step"
    assert first["smoothing"] is None


def test_times_and_weights_are_those_of_the_objective(fit, tiny_flow):
    late, weight = LogitNormal(2.0, 0.3), StageFactors(0.001, 1.0, boundary=0.5)
    found = []
    for options in (
        {"scheme": Scheme(timesteps=late, weight=weight)},
        {"timesteps": late, "weight": weight},
        {},
    ):
        model, callback = tiny_flow(), Forecast(every_n_steps=4)
        model.loss = FlowMatchingLoss(**options)
        fit(callback, model=model, max_steps=4)
        found.append(callback.history[0]["share"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] < 0.5 * found[2]


def test_the_optimizer_is_that_of_the_network(fit, tiny_flow):
    class Two(tiny_flow):
        def __init__(self):
            super().__init__()
            self.automatic_optimization, self.other = False, nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            losses = self.other(torch.ones(2)), super().training_step(batch, batch_idx)
            for optimizer, own in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(own.sum())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters()) for part in (self.other, self.net)]

    callback = Forecast(every_n_steps=4)
    fit(callback, model=Two(), max_steps=8)
    assert callback.history[0]["share"] > 0.01


def test_a_loss_on_the_noise_counts_its_own_errors(fit, tiny_flow):
    model = tiny_flow()
    model.loss = FlowMatchingLoss(prediction="noise")
    callback = Forecast(every_n_steps=4)
    seen = []

    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen[:] = [callback._weight(torch.tensor([0.0, 0.25, 0.5, 0.999]))]

    fit(callback, Ask(), model=model, max_steps=4)
    # noise = -(a / s) x_1 + ..., velocity = 1 / s x_1 + ...
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 0.25, 0.5, 0.999]) ** 2)
    assert 0 < callback.history[0]["share"] < 1


def test_a_resumed_run_says_what_one_that_goes_through_says(
    fit, tiny_flow, tmp_path, make_trainer, make_loader, make_data
):
    def run(max_steps, callback, **options):
        model = tiny_flow(seeded=True)
        model.validation_step = lambda batch, batch_idx: None
        pl.seed_everything(4, verbose=False)
        trainer = make_trainer(callback, max_steps=max_steps)
        trainer.fit(model, make_loader(make_data()[0]), make_loader(make_data(40)[0]), **options)
        return trainer

    whole, first, second = (Forecast(every_n_steps=4) for _ in range(3))
    run(16, whole)
    run(8, first).save_checkpoint(tmp_path / "half.ckpt")
    run(16, second, ckpt_path=tmp_path / "half.ckpt")
    assert json.dumps(second.history) == json.dumps(whole.history)


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="`every_n_steps` of at least 1"):
        Forecast(every_n_steps=0)
    with pytest.raises(TypeError, match="Forecast has no argument 'batches'"):
        Forecast(batches=4)
