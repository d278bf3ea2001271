"""Targets over the samples of a stream: no bias, and what a reservoir holds."""

import runpy
from pathlib import Path

import pytest
import torch

from stagewise import (
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    Reservoir,
    Scheme,
    Smoothing,
    StageTarget,
)
from stagewise.bank.row_classes import KNOWN, NO_TIME
from stagewise.callbacks import (
    Forecast,
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageRun,
    StageScheme,
    VelocityErrorMonitor,
    Watch,
)
from stagewise.masks import MaskedLabels
from stagewise.schemes.refusals import check_rows

ROOT = Path(__file__).parents[1]
BATCH, SIZE = 8, 12


def stream(draws, count):
    """Two skewed clusters with classes, and as many samples as are asked for."""
    y = (torch.rand(count, generator=draws) < 0.3).long()
    x = 0.5 * torch.randn(count, 2, generator=draws) + 2.0 * y[:, None] - 0.5
    return x + 0.3 * x.square(), y


def scores(target_of, *, replicates=400):
    """Of the gradient of a linear model: its mean difference from the plain one, in its errors."""
    draws, gaps = torch.Generator().manual_seed(4), []
    for _ in range(replicates):
        batches = [stream(draws, BATCH) for _ in range(4)]
        x1, y = batches[-1]
        x0, t = torch.randn(BATCH, 2, generator=draws), torch.rand(BATCH, generator=draws) * 0.9
        xt = LinearPath().interpolate(x0, x1, t)
        target = target_of(batches, x1 - x0, xt, t)
        features = torch.cat([torch.ones(BATCH, 1), t[:, None], xt], 1)
        gaps.append((features.T @ (target - (x1 - x0))).flatten() / BATCH)
    gaps = torch.stack(gaps).double()
    return gaps.mean(0) / (gaps.std(0) / replicates**0.5), gaps


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wise", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_mean_gradient_is_the_plain_one(wise):
    def target_of(batches, u, xt, t):
        reservoir = Reservoir(SIZE)
        scheme = Scheme(Oracle(reservoir), target=Mix())  # before it is known that there are labels
        for x1, y in batches:
            reservoir.add(x1, y if wise else None)
        labels = batches[-1][1] if wise else None
        target, _ = scheme(u, xt=xt, t=t, x1=batches[-1][0], labels=labels)
        return target

    score, gaps = scores(target_of, replicates=400 if wise else 100)
    assert score.abs().max() < 3
    assert gaps.std() > 0.05  # and it is another target


def test_a_reservoir_without_the_source_is_biased():
    def target_of(batches, u, xt, t):
        others = LatentBank(torch.cat([x for x, _ in batches[:-1]])[-SIZE:])
        return Oracle(others).velocity(xt, t)

    assert scores(target_of)[0].abs().max() > 4


@pytest.mark.parametrize("wise", [False, True])
def test_what_is_kept(wise):
    last, seen = Reservoir(20), []
    for number in range(30):
        x1 = torch.full((7 if number % 2 else 5, 1), float(number))
        x1 = x1 + torch.arange(len(x1))[:, None] / 10
        seen.append(x1)
        last.add(x1, (10 * x1[:, 0]).round().long() % 3 if wise else None)
    held = last.rows.flatten().sort().values
    torch.testing.assert_close(held, torch.cat(seen)[-20:].flatten().sort().values)
    assert last.classes == ([0, 1, 2] if wise else [])
    for label in last.classes:
        rows = last.rows[last.segment(label)]
        assert ((10 * rows).round().long() % 3 == label).all()


def test_an_oracle_follows_it():
    reservoir = Reservoir(12)
    oracle, t = Oracle(reservoir), torch.full((4,), 0.3)
    for seed in range(4):
        x1 = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        reservoir.add(x1)
        xt = LinearPath().interpolate(torch.zeros(4, 3), x1, t)
        fresh = Oracle(LatentBank(reservoir.rows.clone()))
        torch.testing.assert_close(oracle.posterior(xt, t).mean, fresh.posterior(xt, t).mean)
        assert (reservoir.find(x1) >= 0).all()
    assert reservoir.full
    assert reservoir.origin == "the last 12 samples seen"
    reservoir.report(torch.tensor([KNOWN, NO_TIME]))
    reservoir.add(x1)
    with pytest.raises(ValueError, match="`t` in"):  # a report outlives the rows
        reservoir.report(torch.tensor([KNOWN]))


def test_bad_input():
    with pytest.raises(ValueError, match=r"at least the 9 samples.*Reservoir\(90\)"):
        Reservoir(8).add(torch.randn(9, 2))
    reservoir = Reservoir(8)
    reservoir.add(torch.randn(4, 2))
    for x1, labels in [(torch.randn(4, 3), None), (torch.randn(4, 2), torch.arange(4))]:
        with pytest.raises(
            ValueError, match=r"shape \(2,\) without labels and without conditions as before"
        ):
            reservoir.add(x1, labels)
    masked = MaskedLabels.of(None, torch.ones(4, 2, dtype=torch.bool), torch.randn(4, 2))
    with pytest.raises(
        ValueError, match=r"does not support masks.*LatentBank\(x, labels, mask=mask\)"
    ):
        reservoir.add(torch.randn(4, 2), masked)
    broken, before = torch.randn(4, 2), reservoir.rows.clone()
    broken[2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 8; the first is.* 2\b"):
        reservoir.add(broken)
    assert torch.equal(reservoir.rows, before)
    reservoir.add(torch.randn(4, 2))
    assert reservoir.rows.isfinite().all()
    with pytest.raises(ValueError, match="at least 2"):
        Reservoir(1)


def test_rows_that_change_are_not_smoothed():
    reservoir = Reservoir(32)
    for smoothed in (Smoothing, lambda r: Scheme.two_stage(Oracle(r))):
        with pytest.raises(ValueError, match="bank of fixed rows for a smoothing"):
            smoothed(reservoir)
    reservoir.add(torch.randn(32, 2))
    same = Smoothing(LatentBank(reservoir.rows.clone()))
    for smoothed in (Smoothing, lambda r: Scheme(Oracle(r), smoothing=same)):
        with pytest.raises(ValueError, match="bank of fixed rows for a smoothing"):
            smoothed(reservoir)


def test_samples_that_the_step_draws_anew_are_told_from_those_taken():
    reservoir, x1 = Reservoir(32), torch.randn(8, 6)
    reservoir.add(x1)
    assert check_rows(reservoir, x1) is None
    said = check_rows(reservoir, x1 + 0.1 * torch.randn(8, 6))
    assert "100% of the samples" in said
    assert "Draw in the data set" in said
    assert "source" not in said


class Endless(torch.utils.data.IterableDataset):
    """A stream that never gives a sample again; drawn with its own generator."""

    def __iter__(self):
        draws = torch.Generator().manual_seed(1)
        while True:
            yield torch.randn(6, generator=draws)


@pytest.fixture
def fit(make_trainer, tiny_flow):
    def run(*callbacks, steps=8, resume=None):
        module = tiny_flow()
        module.net[0], module.net[-1] = torch.nn.Linear(7, 16), torch.nn.Linear(16, 6)
        loader = torch.utils.data.DataLoader(Endless(), 8)
        trainer = make_trainer(*callbacks, max_steps=steps, limit_train_batches=steps)
        trainer.fit(module, loader, ckpt_path=resume)
        return module, trainer

    return run


def test_a_stream_is_watched_over_what_was_seen(
    fit, weights, read_stages, tmp_path, quick_figures, lightning_log
):
    plain = weights(fit()[0])
    monitor = PosteriorMonitor(every_n_steps=2, queries=4, dirpath=tmp_path)
    assert torch.equal(weights(fit(StageRun(reservoir=24), monitor)[0]), plain)
    header, probes = read_stages(tmp_path)
    assert header["rows"] == 24
    assert [probe["step"] for probe in probes] == [2, 4, 6]  # the third batch fills it
    assert all(e["rows_are"] == "the last 24 samples seen" for e in (header, *probes))
    lines = [r.getMessage() for r in lightning_log.records]
    said = [line for line in lines if line.startswith("PosteriorMonitor")]
    assert len(said) == 2
    assert all("the last 24 samples seen" in line for line in said)
    assert probes[0]["top1"] != probes[1]["top1"]


def assert_target(y, batch, target, rows):
    """That a steered target is the float64 mean over rows, the batch among them."""
    xt, t = batch["xt"].double(), batch["t"].reshape(-1, 1).double()
    assert (batch["x1"][:, None].double() == rows).all(2).any(1).all()
    logits = -(xt[:, None] - t[:, :, None] * rows).square().sum(2) / (2 * (1 - t) ** 2)
    u = y.double() + (logits.softmax(1) @ rows - batch["x1"].double()) / (1 - t)
    assert ((target - u).norm(dim=1) / u.norm(dim=1)).max() < 1e-5


def test_a_stream_is_steered_with_the_target_of_what_was_seen(fit):
    calls = []

    class Kept(Scheme):
        def __call__(self, y, **batch):
            target, weight = super().__call__(y, **batch)
            calls.append((y, batch, target, self.oracle.bank.rows.double().clone()))
            return target, weight

    fit(StageRun(reservoir=20), StageScheme(lambda oracle: Kept(oracle, target=Mix())))
    assert [len(rows) for *_, rows in calls] == [8, 16, *6 * [20]]
    for y, batch, target, rows in calls:
        assert_target(y, batch, target, rows)


def test_a_reservoir_in_a_scheme_and_in_a_loop_of_ones_own(fit, tmp_path, quick_figures):
    scheme = Scheme(Oracle(Reservoir(16)), target=Mix())
    fit(StageScheme(scheme))
    assert scheme.oracle.bank.seen == 64
    net, monitor = torch.nn.Linear(7, 6), PosteriorMonitor(every_n_steps=1, queries=4)
    optimizer, target = torch.optim.SGD(net.parameters(), 1e-2), StageTarget()
    loader = torch.utils.data.DataLoader(Endless(), 8)
    options = {"target": target, "reservoir": 20, "dirpath": tmp_path}
    with Watch(net, loader, monitor, **options) as watch:
        for step, x1 in zip(range(6), loader, strict=False):
            watch.step(step, x1)
            x0, t = torch.randn(8, 6), torch.rand(8, 1)
            xt = t * x1 + (1 - t) * x0
            u, w = target(x1 - x0, xt=xt, t=t, x1=x1)
            (w * (net(torch.cat([xt, t], 1)) - u).square().mean(1)).mean().backward()
            optimizer.step()
    assert [entry["step"] for entry in monitor.history] == [2, 3, 4, 5]
    assert monitor.history[0]["rows_are"] == "the last 20 samples seen"
    with pytest.raises(TypeError, match=r"StageRun\(reservoir="):
        PosteriorMonitor(Reservoir(20))


def test_a_first_batch_that_is_refused_starts_no_callback_twice(tmp_path, monkeypatch):
    started, plain_start = [], StageScheme.start

    def start(self):
        started.append(self)
        plain_start(self)

    monkeypatch.setattr(StageScheme, "start", start)
    net, loader = torch.nn.Linear(7, 6), torch.utils.data.DataLoader(Endless(), 8)
    options = {"target": StageTarget(), "reservoir": 20, "dirpath": tmp_path}
    with Watch(net, loader, StageScheme(target=Mix()), **options) as watch:
        x1 = next(iter(loader))
        with monkeypatch.context() as broken:
            broken.setattr("stagewise.callbacks.run.check_batch", lambda run: {}["refused"])
            for _ in range(2):
                with pytest.raises(KeyError, match="refused"):
                    watch.step(0, x1)
        watch.step(0, x1)
    assert len(started) == 1


def test_what_a_reservoir_in_training_says(fit, tmp_path, quick_figures, lightning_log):
    with pytest.raises(ValueError, match=r"StageRun\(reservoir=4096\)"):
        fit(PosteriorMonitor())
    with pytest.raises(ValueError, match=r"at least the 8 samples"):
        fit(StageRun(reservoir=4), StageScheme(target=Mix()))
    with pytest.raises(ValueError, match=r"boundary=0\.3"):
        fit(StageRun(reservoir=20), StageScheme(target=Mix("boundary")))
    with pytest.warns(UserWarning, match="never full"):
        fit(PosteriorMonitor(reservoir=100))
    _, trainer = fit(StageRun(reservoir=Reservoir(20)), PosteriorMonitor(queries=4))
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    monitor = PosteriorMonitor(queries=4)
    fit(StageRun(reservoir=20), monitor, steps=12, resume=tmp_path / "at.ckpt")
    assert "filled again" in lightning_log.text
    assert monitor.history[0]["step"] < 8 < monitor.history[-1]["step"]


@pytest.mark.parametrize(
    "kind", [VelocityErrorMonitor, MemorizationMonitor, MemorizationGuard, Forecast]
)
def test_monitors_of_the_model_refuse_a_reservoir_before_training(
    fit, tiny_flow, kind, monkeypatch
):
    monkeypatch.setattr(tiny_flow, "training_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=f"^{kind.__name__} needs the same rows throughout"):
        fit(StageRun(reservoir=20), kind())


def test_the_example_of_a_stream(tmp_path, monkeypatch, quick_figures, weights):
    monkeypatch.chdir(tmp_path)
    train = runpy.run_path(str(ROOT / "examples/stream.py"))["train"]
    plain = weights(train(steps=12))
    monitor = PosteriorMonitor(every_n_steps=2, queries=4)
    watched = train(StageRun(reservoir=512), monitor, steps=12)
    assert torch.equal(weights(watched), plain)
    assert {e["rows_are"] for e in monitor.history} == {"the last 512 samples seen"}
    calls, plain_call = [], Scheme.__call__

    def call(self, y, **batch):
        target, weight = plain_call(self, y, **batch)
        calls.append((y, batch, target, self.oracle.bank.rows.double().clone()))
        return target, weight

    monkeypatch.setattr(Scheme, "__call__", call)
    steered = train(StageRun(reservoir=512), StageScheme(target=Mix()), steps=6)
    assert not torch.equal(weights(steered), weights(train(steps=6)))
    assert len(calls) == 6
    for y, batch, target, rows in calls:
        assert_target(y, batch, target, rows)


class Flipped(torch.utils.data.Dataset):
    """Samples of which each access gives one or its mirror image, and both without chance."""

    def __init__(self, x, both=False):
        self.x, self.both = torch.cat([x, x.flip(1)]) if both else x, both

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        flip = not self.both and torch.rand(()) < 0.5
        return self.x[index].flip(0) if flip else self.x[index]

    def fixed(self):
        return self if self.both else Flipped(self.x, both=True)


def test_flips_known_to_the_data_set_are_in_the_bank(make_trainer, tiny_flow, recwarn, make_data):
    x, _ = make_data()
    scheme = StageScheme(target=Mix())
    make_trainer(scheme, max_steps=4).fit(
        tiny_flow(), torch.utils.data.DataLoader(Flipped(x), 8, shuffle=True)
    )
    bank = scheme.scheme.oracle.bank
    assert len(bank) == 2 * len(x)
    assert (bank.find(torch.cat([x, x.flip(1)])) >= 0).all()
    assert not scheme.scheme.last.inserted.any()
    assert not [w for w in recwarn if "rows of the bank" in str(w.message)]
    assert not [w for w in recwarn if "other values of x_1" in str(w.message)]
