"""`MemorizationMonitor`: a model that copies by construction, one that does not, and no trace."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from stagewise import LatentBank, Oracle
from stagewise.callbacks import writer
from stagewise.callbacks.figures import Column, grid_figure
from stagewise.callbacks.memorization_monitor import MemorizationMonitor
from stagewise.copies import binomial_interval, copy_share
from stagewise.losses import FlowMatchingLoss

pytestmark = pytest.mark.usefixtures("quick_figures")

SMALL = {"every_n_steps": 2, "samples": 8, "t_switch": (0, 0.4, 1), "t_resume": (0.5,), "steps": 25}


def fit(tiny_flow, make_trainer, make_loader, x, *callbacks):
    model = tiny_flow()
    make_trainer(*callbacks).fit(model, make_loader(x))
    return model


def test_the_oracle_copies_and_a_gaussian_does_not(
    tiny_flow, make_trainer, make_loader, make_data, tmp_path, read_stages
):
    x, _ = make_data(64)
    oracle = Oracle(LatentBank(x))

    def copying(module, xt, t, labels):
        return oracle.velocity(xt, t)

    monitor = MemorizationMonitor(
        velocity=copying, held_out=torch.randn(5, 6), dirpath=tmp_path / "m", **SMALL
    )
    fit(tiny_flow, make_trainer, make_loader, x, monitor)
    header, probes = read_stages(tmp_path / "m")
    assert header["event"] == "memorization"
    assert [probe["step"] for probe in probes] == [1, 2, 4]
    assert probes[0]["copies"] == [1, 1, 1]
    assert probes[0]["resumed_copies"] == [1]
    assert probes[0]["histogram"] == probes[2]["histogram"], "the same noise in all probes"
    assert (tmp_path / "m" / "copies.png").exists()

    def still(module, xt, t, labels):
        return torch.zeros_like(xt)  # samples stay where the noise is

    monitor = MemorizationMonitor(velocity=still, dirpath=tmp_path / "s", **SMALL)
    fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert [monitor.history[0]["copies"][k] for k in (0, 2)] == [0, 1]


def test_accumulated_batches_are_one_step(tiny_flow, make_trainer, make_loader, make_data):
    monitor = MemorizationMonitor(**SMALL)
    trainer = make_trainer(monitor, accumulate_grad_batches=3)
    trainer.fit(tiny_flow(), make_loader(make_data(100)[0]))
    assert [entry["step"] for entry in monitor.history] == [1, 2, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 1},
        {"t_switch": (1.2,)},
        {"t_resume": (1.0,)},
        {"weights": "ema"},
        {"steps": 0},
    ],
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        MemorizationMonitor(**wrong)


def test_an_average_that_is_not_there(tiny_flow, make_trainer, make_loader, make_data):
    monitor = MemorizationMonitor(weights="average")
    with pytest.raises(ValueError, match="EMAWeightAveraging"):
        fit(tiny_flow, make_trainer, make_loader, make_data(16)[0], monitor)


def plain(history):
    """For comparison: NaN equals NaN here, but what a probe cost does not count."""
    cost = ("probe_seconds",)
    return json.dumps([{k: v for k, v in e.items() if k not in cost} for e in history])


class Conditional(pl.LightningModule):
    """Draws each class to a point of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = Points(), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(10 * torch.eye(3, 6))

    def forward(self, xt, t, y):
        return (self.points[y] - xt) / (1 - t[:, None]).clamp_min(1e-3)


def test_the_found_network_is_given_the_labels_of_its_samples(make_trainer, monkeypatch):
    points = 10 * torch.eye(3, 6)
    labels = torch.arange(60) % 3
    x = points[labels] + 0.01 * torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    monitor = MemorizationMonitor(every_n_steps=9, samples=12, t_switch=(0,), t_resume=())
    for end in ("stop", "leaves"):  # would let go of probe and network
        monkeypatch.setattr(monitor, end, lambda: None)
    trainer = make_trainer(monitor, max_steps=1)
    trainer.fit(Conditional(), DataLoader(list(zip(x, labels, strict=True)), 20))
    probe, velocity = monitor._probe, monitor.velocity_of(trainer.lightning_module)
    made, _ = probe.generate(velocity, torch.device("cpu"))
    torch.testing.assert_close(made[0], points[probe.labels], rtol=0, atol=0.05)
    assert probe.labels.unique().tolist() == [0, 1, 2]


def test_averaged_weights_are_those_that_are_asked(tiny_flow, make_trainer, make_loader, make_data):
    asked = []

    def velocity(module, xt, t, labels):
        asked.append(next(module.parameters()).detach().clone())
        return torch.zeros_like(xt)

    x, _ = make_data(32)
    averaging = EMAWeightAveraging(decay=0.5)
    monitor = MemorizationMonitor(velocity=velocity, **SMALL)
    model = fit(tiny_flow, make_trainer, make_loader, x, averaging, monitor)
    assert monitor.history[0]["weights"] == "average"
    assert torch.equal(asked[-1], next(averaging._average_model.module.parameters()))
    current = MemorizationMonitor(velocity=velocity, weights="current", **SMALL)
    model = fit(tiny_flow, make_trainer, make_loader, x, EMAWeightAveraging(decay=0.5), current)
    assert current.history[0]["weights"] == "current"
    assert model is not None


def test_samples_that_are_not_finite_are_counted_out(
    tiny_flow, make_trainer, make_loader, make_data
):
    def broken(module, xt, t, labels):
        return torch.zeros_like(xt).index_fill(0, torch.tensor([1]), torch.nan)

    x, _ = make_data(32)
    monitor = MemorizationMonitor(velocity=broken, **SMALL | {"t_switch": (0,), "t_resume": ()})
    with pytest.warns(UserWarning, match="1 samples of step 1 are not finite"):
        fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert monitor.history[0]["not_finite"] == 1
    assert sum(monitor.history[0]["histogram"][0]) == 7


def test_refusals_before_the_first_optimizer_step(
    tiny_flow, make_trainer, make_loader, make_data, weights
):
    x, _ = make_data(32)
    model = tiny_flow()
    before = weights(model)
    step = model.training_step
    model.training_step = lambda batch, batch_idx: step([batch[0] ** 3], batch_idx)
    with pytest.raises(ValueError, match="not on what was read from the batches"):
        make_trainer(MemorizationMonitor(**SMALL)).fit(model, make_loader(x))
    assert torch.equal(weights(model), before)
    wrong = MemorizationMonitor(velocity=lambda module, xt, t, labels: xt[:, :3], **SMALL)
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        make_trainer(wrong).fit(tiny_flow(), make_loader(x))


def test_without_held_out_data_the_log_says_what_is_left_out(
    tiny_flow, make_trainer, make_loader, make_data, lightning_log
):
    monitor = MemorizationMonitor(**SMALL)
    fit(tiny_flow, make_trainer, make_loader, make_data(32)[0], monitor)
    assert "MemorizationMonitor: there is no validation data" in lightning_log.text
    assert monitor.history[0]["resumed_copies"] == []
    assert len(monitor.history[0]["copies"]) == 3


def test_the_share_of_copies():
    ratio = torch.tensor([0.01, 0.32, 1 / 3, 0.34, 0.9, 1.0, torch.nan])
    sent = []
    copy_share(ratio[:3], lambda own: sent.append(own) or own)
    found = copy_share(ratio[3:], lambda own: own + sent[0])  # as over two ranks
    assert found["share"] == pytest.approx(2 / 6)
    assert (found["low"], found["high"]) == binomial_interval(2, 6)
    assert found["nonfinite"] == 1
    assert sum(found["histogram"]) == 6
    assert found["histogram"][29] == 1 + 0  # 0.9 lies in bin 27, 1.0 in the last
    assert abs(found["median"] - 1 / 3) < 1 / 30


def framed(figure, column, rows):
    """Which images of a column have a frame, and the numbers under them."""
    axes = figure.axes
    columns = len(axes) // rows
    cells = [axes[row * columns + column] for row in range(rows)]
    return [cell.spines["top"].get_visible() for cell in cells], [
        cell.get_xlabel() for cell in cells
    ]


def test_copies_are_framed_and_shades_can_be_compared():
    rows = torch.rand(4, 3, 5, 5)
    samples = rows.clone()
    samples[1] += 7  # would darken the rest of its column if it set the scale
    ratio = torch.tensor([0.01, 0.9, 0.34, 0.33])
    figure = grid_figure(
        [Column("sample", samples, ratio), Column("row", rows, of_data=True)], "Samples"
    )
    assert framed(figure, 0, 4) == ([True, False, False, True], ["0.01", "0.90", "0.34", "0.33"])
    assert framed(figure, 1, 4) == ([False] * 4, [""] * 4)
    shown = [cell.get_images()[0].get_array() for cell in figure.axes]
    assert (shown[0] == shown[1]).all()
    assert shown[2].min() == 1, "brighter than any row"
    assert "red frame: a copy" in figure.get_suptitle()


def test_planted_copies_are_framed_in_the_picture_of_a_run(
    make_trainer, tiny_flow, make_loader, monkeypatch, tmp_path
):
    """Of a model that leads every second sample to a row, and leaves the others where they are."""
    x = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    oracle = Oracle(LatentBank(x))

    def half(module, xt, t, labels):
        return oracle.velocity(xt, t) * (1 - torch.arange(len(xt)) % 2)[:, None, None, None]

    drawn = {}
    monkeypatch.setattr(writer, "show_pictures", lambda figures, *_: drawn.update(figures))
    monkeypatch.setattr("stagewise.callbacks.figures.grid_figure", grid_figure)  # not left empty
    model = tiny_flow()
    flat = model.training_step
    model.training_step = lambda batch, batch_idx: flat([batch[0].flatten(1)[:, :6]], batch_idx)
    monitor = MemorizationMonitor(
        LatentBank(x), velocity=half, held_out=x[:9] + 0.3, **SMALL | {"t_switch": (0,)}
    )
    make_trainer(monitor, max_steps=1).fit(model, make_loader(x))
    assert framed(drawn["samples"], 0, 8)[0] == [True, False] * 4
    assert framed(drawn["resumed"], 2, 8)[0] == [True, False] * 4


class Gaussians(pl.LightningModule):
    """A perceptron that can learn a few points by heart."""

    def __init__(self, steps):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(7, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 6)]
        self.net, self.loss, self.steps = nn.Sequential(*layers), FlowMatchingLoss(), steps

    def training_step(self, batch, batch_idx):
        return self.loss(lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), batch[0])

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        return [adam], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.slow
def test_copies_rise_where_the_data_are_few(make_trainer, make_loader):
    shares = {}
    for n in (8, 5000):
        x = torch.randn(n, 6, generator=torch.Generator().manual_seed(99))
        monitor = MemorizationMonitor(every_n_steps=400, samples=64, steps=25, t_resume=())
        sampler = RandomSampler(x, replacement=True, num_samples=128 * 400)
        trainer = make_trainer(monitor, max_steps=400, log_every_n_steps=50)
        trainer.fit(Gaussians(400), make_loader(x, batch_size=128, sampler=sampler))
        shares[n] = [entry["copies"] for entry in monitor.history]
    assert max(shares[8][0]) < 0.1
    assert min(shares[8][-1]) > 0.4
    assert max(shares[5000][-1]) < 0.1


SCRIPT = """
from stagewise.callbacks import MemorizationMonitor

monitor = MemorizationMonitor(
    every_n_steps=2, samples=9, t_switch=(0, 0.9), t_resume=(0.9,), steps=10,
    held_out=samples(7, seed=2), dirpath=out / f"rank{rank}",
)
make_trainer(monitor, max_steps=2).fit(Flow(), loader(samples(97)))
report(monitor.history)
"""


@pytest.mark.slow
def test_ranks_share_the_samples_and_know_the_same(on_one_and_two_ranks, reports_of):
    one, two = on_one_and_two_ranks(SCRIPT)
    expected, *found = reports_of(one, two)
    assert len(expected) == 2
    assert [*map(plain, found)] == [plain(expected)] * 2
    assert not (two / "rank1").exists()


def test_samples_are_not_rows_that_the_same_seed_has_made(make_trainer, tiny_flow, make_loader):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))

    def still(module, xt, t, labels):
        return torch.zeros_like(xt)  # a sample is its noise

    monitor = MemorizationMonitor(velocity=still, seed=0, **SMALL)
    fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert monitor.history[0]["copies"][0] == 0


def test_pictures_that_fail_leave_nothing_half_done(
    make_trainer, tiny_flow, make_loader, make_data
):
    def decode(x):
        raise KeyError("no such decoder")

    x, _ = make_data(32)
    monitor = MemorizationMonitor(decode=decode, **SMALL)
    with pytest.raises(KeyError, match="no such decoder"):
        fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert monitor.history == []


def test_a_model_that_fails_in_a_probe_is_named(make_trainer, tiny_flow, make_loader, make_data):
    asked = []

    def shrinks(module, xt, t, labels):
        asked.append(len(xt))
        return xt if len(asked) == 1 else xt[:, :3]  # right when it is tried at the start

    x, _ = make_data(32)
    monitor = MemorizationMonitor(velocity=shrinks, **SMALL)
    with pytest.raises(ValueError, match=r"velocity of shape \(8, 6\), got \(8, 3\)"):
        fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert monitor.history == []


def test_the_end_says_what_was_found(
    make_trainer, tiny_flow, make_loader, make_data, lightning_log
):
    x, _ = make_data(32)
    fit(tiny_flow, make_trainer, make_loader, x, MemorizationMonitor(**SMALL))
    assert "MemorizationMonitor: copies at step 4: " in lightning_log.text
    assert "100% (95 % 63% to 100%) from t = 1 on" in lightning_log.text
