"""`StageTransitions`: in small runs, told once, heard by schemes."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import RandomSampler

from stagewise import AtEvent, LatentBank, LogitNormal, Mix, Phase, Phases, Scheme, Uniform
from stagewise.callbacks import (
    PosteriorMonitor,
    StageRun,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.callbacks.stage_transitions import (
    BOUNDARY_MOVED,
    MEMORIZATION_ONSET,
    NAVIGATION_LEARNED,
)
from stagewise.losses import FlowMatchingLoss

pytestmark = pytest.mark.usefixtures("quick_figures")


class Flow(pl.LightningModule):
    """A perceptron that can learn 64 points by heart."""

    def __init__(self, lr=4e-3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(7, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 6)]
        self.net, self.loss, self.lr = nn.Sequential(*layers), FlowMatchingLoss(), lr

    def training_step(self, batch, batch_idx):
        return self.loss(lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), batch[0])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


@pytest.fixture
def fit(make_trainer, make_loader):
    def fit(x, *callbacks, steps, model=None, ckpt_path=None, **options):
        draws = torch.Generator().manual_seed(5)
        others = torch.randn(400, 6, generator=draws)
        pl.seed_everything(0, verbose=False)
        # One long epoch, and no validation in it: a short one costs more than its steps.
        sampler = RandomSampler(x, replacement=True, num_samples=64 * steps)
        trainer = make_trainer(
            *callbacks, max_steps=steps, log_every_n_steps=50, check_val_every_n_epoch=2, **options
        )
        train = make_loader(x, batch_size=64, sampler=sampler)
        held_out = make_loader(others, batch_size=64)
        trainer.fit(model or Flow(), train, held_out, ckpt_path=ckpt_path)
        return trainer

    return fit


def gaussian(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_learning_by_heart_is_seen_and_learning_is_not_taken_for_it(fit):
    said, seed = {}, 1
    for n in (32, 20_000):
        errors = VelocityErrorMonitor(every_n_steps=40, strata=12, queries=64, seed=seed)
        events = StageTransitions()
        fit(gaussian(n, seed), errors, events, steps=400, model=Flow(lr=1e-2, seed=seed))
        said[n] = [event["kind"] for event in events.events]
    assert MEMORIZATION_ONSET in said[32]
    assert MEMORIZATION_ONSET not in said[20_000]


@pytest.mark.slow
def test_events_are_said_once_and_heard(fit, tmp_path, read_stages, lightning_log):
    heard = []
    errors = VelocityErrorMonitor(every_n_steps=20, strata=4, queries=64)
    events = StageTransitions(gap=0.2, subscribers=[heard.append], dirpath=tmp_path / "events")
    # Rates so high that a short run learns 16 points by heart.
    phases = Phases(
        [
            Phase(Scheme(timesteps=LogitNormal()), AtEvent(MEMORIZATION_ONSET)),
            Phase(Scheme(timesteps=Uniform())),
        ]
    )
    scheme = StageScheme(phases)
    fit(gaussian(16), errors, events, scheme, steps=240, model=Flow(lr=1e-2))
    kinds = [event["kind"] for event in events.events]
    assert kinds.count(MEMORIZATION_ONSET) == 1
    assert len(set(kinds)) == len(kinds)
    assert heard == events.events
    assert phases.index == 1
    (change,) = scheme.transitions
    (onset,) = [event for event in events.events if event["kind"] == MEMORIZATION_ONSET]
    assert change["step"] == onset["step"]
    assert MEMORIZATION_ONSET in change["message"]
    lines = (tmp_path / "events" / "stages.jsonl").read_text().splitlines()
    header, *told = map(json.loads, lines)
    assert [event["kind"] for event in told] == kinds
    # What is not told has not happened, or could not be seen: the header says which.
    assert header["kinds"][MEMORIZATION_ONSET] == ""
    assert header["kinds"][BOUNDARY_MOVED].startswith("a PosteriorMonitor")
    assert "held-out error is above training error" in lightning_log.text


def test_a_phase_that_nobody_would_end_is_refused(fit):
    phases = Phases([Phase(Scheme(), AtEvent(NAVIGATION_LEARNED)), Phase(Scheme())])
    with pytest.raises(ValueError, match=r"no callback reports that event.*StageTransitions\(\)"):
        fit(gaussian(64), StageScheme(phases), steps=2)


def test_it_needs_a_monitor(fit):
    with pytest.raises(ValueError, match="reads what monitors measure, and there is none"):
        fit(gaussian(64), StageTransitions(), steps=2)
    # Wherever it stands in the list.
    fit(gaussian(64), StageTransitions(), PosteriorMonitor(strata=4, queries=4), steps=2)


class Shrink(pl.Callback):
    """Changes the tensor that the data set of the loader holds."""

    def __init__(self, x):
        self.x = x

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            self.x.mul_(0.2)


def test_targets_over_latents_that_have_changed_are_not_passed_over(fit):
    x, posterior = gaussian(64), PosteriorMonitor(every_n_steps=5, strata=4, queries=8)
    with pytest.warns(UserWarning, match="StageScheme: the training latents have changed"):
        fit(x, posterior, StageTransitions(), StageScheme(target=Mix(1.0)), Shrink(x), steps=12)


@pytest.mark.parametrize("given", [True, False])
def test_changed_latents_are_measured_anew(fit, given):
    """Latents that an encoder shrinks in the middle of training: the boundary moves."""
    x = gaussian(200)
    posterior = PosteriorMonitor(
        LatentBank(x) if given else None, every_n_steps=5, strata=12, queries=64
    )
    errors = VelocityErrorMonitor(every_n_steps=5, strata=4, queries=8)
    events = StageTransitions()

    said = [StageRun()] if given else []
    fit(x, *said, posterior, errors, events, Shrink(x), steps=16)
    (event,) = [event for event in events.events if event["kind"] == BOUNDARY_MOVED]
    assert event["step"] == 10
    evidence = event["evidence"]
    assert evidence["latents_changed"] == pytest.approx(0.8)
    assert evidence["moved"] > 0.05
    # Of data that are five times as small the midpoint lies where 5 t / (1 - t) was t / (1 - t).
    before, after = evidence["before"]["midpoint"], evidence["after"]["midpoint"]
    assert after == pytest.approx(5 * before / (1 + 4 * before), abs=0.06)
    assert errors.boundary.midpoint == pytest.approx(after)
    assert [entry["step"] for entry in errors.history] == [1, 5, 10, 15, 16]


def test_data_that_augment_are_not_taken_for_changed_latents(make_trainer):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return (gaussian(64)[index] + 0.2 * torch.randn(6),)

    x = gaussian(64)
    posterior = PosteriorMonitor(LatentBank(x), every_n_steps=2, strata=4, queries=8)
    events = StageTransitions()
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(posterior, events, max_steps=6)
    with pytest.warns(UserWarning, match="not rows of the bank"):
        trainer.fit(Flow(), torch.utils.data.DataLoader(Noisy(), 16))
    assert events.events == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 3}, "window"),
        ({"patience": 0}, "patience"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"gap": 0.0}, "gap"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        StageTransitions(**options)


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("resumed", [True, False])
def test_events_of_another_run_are_kept_and_those_that_come_again_are_not(fit, tmp_path, resumed):
    folder, line = tmp_path / "events", '{"event": "transition", "step": 3}\n'

    def run(steps, **options):
        errors = VelocityErrorMonitor(every_n_steps=2, strata=4, queries=4)
        return fit(gaussian(64), errors, StageTransitions(dirpath=folder), steps=steps, **options)

    run(2).save_checkpoint(tmp_path / "at2.ckpt")
    (folder / "stages.jsonl").write_text(line)  # noticed after the checkpoint
    run(4, ckpt_path=tmp_path / "at2.ckpt" if resumed else None)
    (header,) = map(json.loads, (folder / "stages.jsonl").read_text().splitlines())
    assert header["event"] == "transitions"
    kept = folder / "stages.bak.jsonl"
    assert kept.exists() != resumed
    assert resumed or kept.read_text() == line


def test_events_survive_a_checkpoint():
    first = StageTransitions()
    first.events = [{"event": "transition", "kind": NAVIGATION_LEARNED, "step": 4}]
    second = StageTransitions()
    second.load_state_dict(first.state_dict())
    assert second.stash["events"] == first.events
    until = AtEvent("x")
    until.notify("y")
    assert until.observe(1, None, None, None, None) is None
    until.notify("x")
    again = AtEvent("x")
    again.load_state_dict(until.state_dict())
    assert again.observe(1, None, None, None, None) == "x"
    with pytest.raises(ValueError, match="name of an event"):
        AtEvent("")
