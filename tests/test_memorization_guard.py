"""`MemorizationGuard`: announces learning by heart, is silent elsewhere, keeps weights."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import AtEvent, LatentBank, Oracle, Phase, Phases, Scheme
from stagewise.callbacks import (
    MemorizationGuard,
    PosteriorMonitor,
    StageScheme,
    StageTransitions,
)
from stagewise.callbacks.stage_transitions import MEMORIZATION_ONSET
from stagewise.learning_events import GapWatch, OnsetLaw
from stagewise.losses import FlowMatchingLoss

pytestmark = pytest.mark.usefixtures("quick_figures")

FEW = {"samples": 16, "queries": 16, "figures": 0}
OFTEN = {**FEW, "queries": 64, "every_n_steps": 25}


class Flow(pl.LightningModule):
    """A perceptron that learns a few points by heart in some hundred steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(7, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 6)]
        self.net, self.loss = nn.Sequential(*layers), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        draws = torch.Generator().manual_seed(self.trainer.global_step)
        x1 = batch[0][torch.randint(len(batch[0]), (64,), generator=draws)]
        return self.loss(
            lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), x1, generator=draws
        )

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 4e-3)


def gaussian(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


class Cyclic(torch.utils.data.Sampler):
    """Batches of 64 rows, one after the other and around again, in one long epoch."""

    def __init__(self, rows, steps):
        self.rows, self.steps = rows, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        for step in range(self.steps):
            yield [(64 * step + place) % self.rows for place in range(64)]


@pytest.fixture
def fit(make_trainer, make_loader):
    """Trains on `rows` points; held-out ones are of the same kind."""

    def fit(rows, *callbacks, steps=300, x=None, others=300, ckpt_path=None, **options):
        x, model = gaussian(rows) if x is None else x, Flow()
        train = DataLoader(TensorDataset(x), batch_sampler=Cyclic(rows, steps))
        held_out = make_loader(gaussian(others, seed=5), batch_size=64) if others else None
        defaults = {"max_steps": steps, "check_val_every_n_epoch": 2, "log_every_n_steps": 50}
        trainer = make_trainer(*callbacks, **(defaults | options))
        trainer.fit(model, train, held_out, ckpt_path=ckpt_path)
        return model

    return fit


def lines(folder):
    return [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_learning_by_heart_is_announced_and_the_weights_before_it_are_kept(
    fit, tmp_path, lightning_log
):
    guard = MemorizationGuard(**OFTEN, dirpath=tmp_path / "g", onsets={8: 60, 16: 120})
    with pytest.warns(UserWarning, match="memorization onset: for t in .* since step") as said:
        fit(32, guard)
    (message,) = [str(w.message) for w in said if "memorization onset" in str(w.message)]
    onset, best = guard.onset, guard.best
    assert onset["step"] < 300
    assert onset["evidence"]["rise"] > 0.01
    assert onset["evidence"]["fall"] > 0
    assert onset["evidence"]["predicted"] == pytest.approx(240)
    assert "predicted for step 240" in message
    assert "are in" in message
    # The law, before and after.
    assert "by tau = 7.5 N memorization of 32 rows begins at step 240" in lightning_log.text
    assert f"MemorizationGuard(onsets={{32: {onset['step']}}})" in lightning_log.text
    # What is on disk.
    header, *events = lines(tmp_path / "g")
    assert header["event"] == "guard"
    assert header["predicted_onset"] == pytest.approx(240)
    assert [event for event in events if event["event"] == "transition"] == [onset]
    losses = {e["step"]: e["held_out_loss"] for e in events if e["event"] == "guard_probe"}
    assert best["held_out_loss"] == losses[best["step"]] <= min(losses.values()) / 0.99
    state = torch.load(best["file"], weights_only=True)
    assert state["global_step"] == best["step"]
    assert [f.name for f in (tmp_path / "g").iterdir() if "ckpt" in f.name] == ["before_onset.ckpt"]
    assert list(losses)[:4] == [1, 25, 38, 50]


def test_probes_come_early_in_a_long_run(fit):
    guard = MemorizationGuard(**FEW, every_n_steps=1000, alarm=False)
    fit(16, guard, steps=120)
    assert [entry["step"] for entry in guard.history] == [1, 32, 48, 72, 108, 120]


def test_it_is_silent_where_held_out_samples_are_like_those_of_training(fit):
    guard = MemorizationGuard(**OFTEN)
    fit(6400, guard, steps=200)
    assert guard.onset is None
    assert guard.best["step"] > 25


def test_weights_are_bit_identical_with_and_without(fit, weights):
    guard = MemorizationGuard(**OFTEN | {"every_n_steps": 10})
    assert torch.equal(weights(fit(16, steps=60)), weights(fit(16, guard, steps=60)))
    assert guard.best is not None


@pytest.mark.slow
def test_the_kept_checkpoint_goes_on_as_the_run_did(fit, weights, tmp_path):
    def make(folder):
        guard = MemorizationGuard(**OFTEN, dirpath=tmp_path / folder)
        scheme = StageScheme(switched(), dirpath=tmp_path / f"{folder}-scheme")
        return guard, scheme

    class Saves(pl.Callback):  # between the two probes that show the onset
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 40:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    through, scheme = make("through")
    expected = weights(fit(16, through, scheme, Saves(), steps=160))
    assert through.history[2]["step"] < 40 < through.onset["step"] < through.best["step"] < 160
    assert through.onset["step"] == through.history[3]["step"]
    # The event switches smoothing on.
    (change,) = scheme.transitions
    assert change["step"] == through.onset["step"]
    assert scheme.scheme.index == 1
    assert scheme.scheme.drawn is not None, "rows were smoothed"
    kept = torch.load(through.best["file"], weights_only=False)
    state = kept["callbacks"][through.state_key]
    state["history"].remove(state["onset"])  # as an older version has it
    torch.save(kept, tmp_path / "older.ckpt")
    files = {name: tmp_path / f"{name}.ckpt" for name in ("early", "older")}
    for name, file in (files | {"again": through.best["file"]}).items():
        again, other = make(name)
        resumed = fit(16, again, other, steps=160, ckpt_path=file)
        assert torch.equal(weights(resumed), expected)
        assert again.onset == through.onset
        assert other.transitions == scheme.transitions
        assert again.history == through.history
        assert lines(tmp_path / name) == lines(tmp_path / "through")


def switched():
    """Trains plainly, and on smoothed rows from the onset on."""

    def make(oracle):
        first = Phase(Scheme(oracle), AtEvent(MEMORIZATION_ONSET))
        return Phases([first, Phase(Scheme.two_stage(oracle))])

    return make


def test_nothing_is_learned_by_heart_before_rows_are_seen_twice(fit):
    """Held-out samples lie elsewhere: what training gains they lose, in the first steps at once."""
    guard = MemorizationGuard(**FEW, every_n_steps=10)
    fit(3200, guard, steps=95, x=gaussian(3200) * torch.tensor([2, 1, 0.5, 0.2, 0.1, 0.05]))
    assert guard.onset is None
    assert guard.watch.lowest is None  # 64 rows a step: twice at step 100


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_that_may_say_it_one_is_enough(fit, order):
    both = MemorizationGuard(**FEW), StageTransitions()  # which lacks a VelocityErrorMonitor
    few = PosteriorMonitor(strata=4, queries=4, figures=0)
    fit(16, StageScheme(switched()), *both[::order], few, steps=2)


def test_where_copies_are_wanted_they_are_information(fit, tmp_path, lightning_log, recwarn):
    guard = MemorizationGuard(**OFTEN, alarm=False, dirpath=tmp_path / "g")
    fit(32, guard, steps=200)
    assert guard.onset is not None
    assert "memorization onset: for t in" in lightning_log.text
    assert not [w for w in recwarn if "memorization onset" in str(w.message)]
    assert guard.best is None
    assert not list((tmp_path / "g").glob("*.ckpt"))


def copying(rows):
    """A velocity that leads to the rows, with the whole bank or a part of it."""
    oracle = Oracle(LatentBank(rows))
    return lambda module, xt, t, labels: oracle.velocity(xt, t)


def test_without_held_out_samples_copies_tell_and_rows_are_named(fit, tmp_path, lightning_log):
    x = gaussian(12)
    guard = MemorizationGuard(**OFTEN, velocity=copying(x[[3, 8]]), dirpath=tmp_path / "g")
    with pytest.warns(UserWarning, match="memorization onset: surely more than 1% are copied; 100"):
        fit(12, guard, x=x, steps=30, others=0)
    assert "MemorizationGuard(held_out=(samples, labels))" in lightning_log.text
    assert guard.onset["step"] == 1
    assert guard.best is None
    copied = dict(guard.history[-1]["copied_rows"])
    assert set(copied) == {3, 8}
    assert sum(copied.values()) == 16
    first = guard.history[-1]["copied_rows"][0]
    assert f"rows copied most, and by how many of 16 samples: {first[0]} ({first[1]})" in (
        lightning_log.text
    )
    # A model that does not copy: the last probe is kept.
    guard = MemorizationGuard(**OFTEN, dirpath=tmp_path / "n")
    fit(64, guard, steps=50, others=0)
    assert guard.onset is None
    assert torch.load(guard.best["file"], weights_only=True)["global_step"] == 50


def test_samples_that_are_near_rows_by_chance_raise_no_alarm(
    make_trainer, make_loader, tiny_flow, recwarn
):
    """In one dimension a third of all new samples count as copies."""
    x = torch.linspace(-1.5, 1.5, 8)[:, None]
    others = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    options = {"samples": 64, "queries": 16, "figures": 0}
    velocity = copying(torch.randn(3000, 1, generator=torch.Generator().manual_seed(2)))

    class Line(tiny_flow):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

    guard = MemorizationGuard(**options, velocity=velocity, held_out=others)
    make_trainer(guard, max_steps=1).fit(Line(), make_loader(x))
    assert guard.history[0]["low"][0] > 0.1
    assert guard.onset is None
    assert guard.best is not None
    guard = MemorizationGuard(**options, velocity=copying(x), held_out=others)
    with pytest.warns(UserWarning, match=r"\(49.3% of held-out samples would be, too\)"):
        make_trainer(guard, max_steps=1).fit(Line(), make_loader(x))


def test_rows_are_named_in_the_order_of_the_data_set(make_trainer, make_loader, tiny_flow):
    x, labels = gaussian(12), torch.arange(12) % 3  # the bank sorts them by class
    guard = MemorizationGuard(**FEW, velocity=copying(x[[5, 7]]), held_out=(x + 3, labels))
    with pytest.warns(UserWarning, match="memorization onset"):
        make_trainer(guard, max_steps=1).fit(tiny_flow(), make_loader(x, labels))
    assert {row for row, _ in guard.history[0]["copied_rows"]} == {5, 7}
    assert guard.history[0]["gap"] is not None


def test_held_out_samples_without_labels_of_the_bank_are_left_out(
    make_trainer, make_loader, tiny_flow, lightning_log
):
    x, labels = gaussian(12), torch.arange(12) % 3
    guard = MemorizationGuard(**FEW, velocity=copying(x), held_out=x + 3, alarm=False)
    make_trainer(guard, max_steps=1).fit(tiny_flow(), make_loader(x, labels))
    assert "held_out samples have no labels of the bank" in lightning_log.text
    assert "gap" not in guard.history[0]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"queries": 1}, "`queries`"),
        ({"samples": 1}, "`samples`"),
        ({"every_n_steps": 0}, "`every_n_steps`"),
        ({"onsets": {}}, r"onsets=\{64: 400, 128: 900\}"),
        ({"onsets": {64: -1}}, "`onsets` with the step"),
        ({"onsets": 400}, "got 400"),
    ],
)
def test_bad_arguments(wrong, match):
    with pytest.raises(ValueError, match=match):
        MemorizationGuard(**wrong)


def test_held_out_samples_of_another_shape_are_refused_before_the_first_step(fit):
    with pytest.raises(ValueError, match=r"Expected `held_out` with samples of shape \(6,\)"):
        fit(16, MemorizationGuard(**FEW, held_out=torch.zeros(4, 5)), steps=1)


def test_a_full_disk_is_a_warning(fit, monkeypatch, tmp_path):
    guard = MemorizationGuard(**FEW, dirpath=tmp_path / "g")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.warns(UserWarning, match=r"Cannot write .*before_onset.ckpt: No space left"):
        fit(16, guard, steps=2)
    assert guard.best is None, "nothing is said to be kept"


def test_the_law_of_n():
    assert OnsetLaw({50: 200})(400) == pytest.approx(1600), "tau = c N"
    law = OnsetLaw({n: 3 * n**0.8 for n in (10, 40, 90)})
    assert (law.scale, law.power) == (pytest.approx(3), pytest.approx(0.8))
    assert law(1000) == pytest.approx(3 * 1000**0.8)


def errors(level, draws, noise=0.01):
    return level * (1 + noise * torch.randn(2, 64, generator=draws).double())


def test_the_gap_opens_where_both_errors_part_and_nowhere_else():
    edges, draws = torch.tensor([0.5, 0.75, 1.0]), torch.Generator().manual_seed(0)
    both = torch.ones(2, 1).double()
    late = torch.tensor([[1.0], [1.1]]).double()

    def course(*probes):
        watch, found = GapWatch(), []
        for step, (train, held_out) in enumerate(probes):
            at = errors(train, draws), errors(held_out, draws)
            found.append(watch.update(step, *at, edges))
        return watch, found

    # Harder data, both better, both worse, and a single probe: closed.
    harder = [(both * level, 2 * both * level) for level in (1, 0.8, 0.9, 1.0, 0.7)]
    assert course(*harder)[1] == [None] * 5
    assert course((both, both), (0.8 * both, late), (0.7 * both, 0.9 * both))[1] == [None] * 3
    watch, found = course((both, both), (0.8 * both, late), (0.7 * both, late))
    assert found[:2] == [None, None]
    assert (found[2]["t_from"], found[2]["t_to"], found[2]["since"]) == (0.75, 1.0, 0)
    assert found[2]["rise"] == pytest.approx(0.1, abs=0.01)
    assert found[2]["fall"] == pytest.approx(0.3, abs=0.01)
    # What is resumed goes on.
    again = GapWatch()
    again.load_state_dict(watch.state_dict())
    probe = errors(0.6 * both, draws), errors(late, draws)
    assert again.update(3, *probe, edges) == watch.update(3, *probe, edges)
    # A loss that is not finite is no lowest value.
    broken = GapWatch()
    broken.update(0, both * torch.nan, both * torch.nan, edges)
    broken.update(1, *probe, edges)
    assert bool(broken.lowest[0].isfinite().all())


SCRIPT = """
from stagewise.callbacks import MemorizationGuard

guard = MemorizationGuard(
    every_n_steps=5, samples=9, queries=5, figures=0, dirpath=out / "guard",
    held_out=samples(7, seed=2),
)
make_trainer(guard, max_steps=10).fit(Flow(), loader(samples(40)))
report([guard.history, guard.watch.lowest[1].tolist()])
"""


@pytest.mark.slow
def test_ranks_know_the_same_and_keep_one_file(on_one_and_two_ranks, reports_of):
    one, two = on_one_and_two_ranks(SCRIPT)
    expected, *reports = reports_of(one, two)
    assert reports[0] == reports[1]
    for name in ("held_out_loss", "train", "held_out"):
        found, alone = ([e[name] for e in probes] for probes in (reports[0][0], expected[0]))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone))
    for name in ("copies", "copied_rows"):
        assert [e[name] for e in reports[0][0]] == [e[name] for e in expected[0]]
    torch.testing.assert_close(torch.tensor(reports[0][1]), torch.tensor(expected[1]))
    kept = [file.name for file in (two / "guard").iterdir()]
    assert sorted(kept) == ["before_onset.ckpt", "stages.jsonl"]
