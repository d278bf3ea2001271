"""All callbacks in a run that stops and resumes in the middle of a phase: as if it had not."""

import contextlib
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from stagewise import LatentBank, LogitNormal, Oracle, callbacks
from stagewise.callbacks import (
    Forecast,
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.callbacks.stage_transitions import NAVIGATION_LEARNED
from stagewise.losses import FlowMatchingLoss
from stagewise.schemes import Phase, Phases, Scheme
from stagewise.targets import Mix, ReferenceSet
from stagewise.timesteps import LossSecondMoment, StageAware
from stagewise.transitions import AtEvent, AtPlateau, AtShare, AtStep

cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(resuming from a checkpoint|callbacks used to create)"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

STEPS = 24


class PowerCut(RuntimeError):
    """What stops a run."""


class Flow(pl.LightningModule):
    """Draws depend on the batch's place in training alone."""

    def __init__(self, matched, fail_at):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))
        if matched:
            self.FM = cfm.ConditionalFlowMatcher(0.0)
        else:
            self.loss_fn = FlowMatchingLoss()
        self.matched, self.fail_at, self.t = matched, fail_at, []

    def velocity(self, xt, t):
        return self.net(torch.cat([xt, t[:, None]], 1))

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fail_at:
            raise PowerCut
        torch.manual_seed(1000 * self.trainer.global_step + batch_idx)
        if not self.matched:
            loss = self.loss_fn(self.velocity, batch[0])
            self.t.append(self.loss_fn.last.t)
            return loss
        x0 = torch.randn_like(batch[0])
        t, xt, u = self.FM.sample_location_and_conditional_flow(x0, batch[0])
        self.t.append(t)
        return (self.velocity(xt, t) - u).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def phased(*phases):
    *before, last = phases
    return Phases([*(Phase(scheme, until) for scheme, until in before), Phase(last)])


KINDS = {
    "one scheme": lambda oracle: StageScheme(Scheme(oracle, target=Mix(0.5))),
    "random rows": lambda oracle: StageScheme(Scheme(oracle, target=ReferenceSet(8), seed=2)),
    "parts": lambda oracle: StageScheme(target=Mix("boundary"), timesteps=StageAware(0.6)),
    "steps": lambda oracle: StageScheme(
        phased(
            (Scheme(timesteps=LogitNormal()), AtStep(5)),
            (Scheme(oracle, target=ReferenceSet(8)), AtStep(13)),
            Scheme(oracle, target=Mix("boundary")),
        )
    ),
    "share": lambda oracle: StageScheme(
        phased((Scheme(oracle, target=Mix()), AtShare(0.6)), Scheme())
    ),
    "plateau": lambda oracle: StageScheme(
        phased(
            (Scheme(oracle, target=Mix(0.5)), AtPlateau(1, window=4, patience=2, tolerance=0.9)),
            Scheme(timesteps=LogitNormal()),
        )
    ),
    "adapting": lambda oracle: StageScheme(
        timesteps=LossSecondMoment(bins=4, history=5), preserve_objective=True
    ),
    "event": lambda oracle: StageScheme(
        phased(
            (Scheme(oracle, target=Mix(0.5)), AtEvent(NAVIGATION_LEARNED)),
            Scheme(timesteps=LogitNormal()),
        )
    ),
}
NEEDS_LOSSES = ("plateau", "adapting")
PHASED = ("steps", "share", "plateau", "event")

# Anything is a plateau to these, as soon as there are probes enough: after step 10.
MONITORS = {
    PosteriorMonitor: lambda every: PosteriorMonitor(every_n_steps=5, strata=4, queries=4),
    VelocityErrorMonitor: lambda every: VelocityErrorMonitor(
        every_n_steps=every, strata=4, queries=4
    ),
    Forecast: lambda every: Forecast(every_n_steps=5),
    # A kept checkpoint is in the folder of its run.
    MemorizationGuard: lambda every: MemorizationGuard(
        every_n_steps=5, samples=4, queries=4, steps=4, alarm=False
    ),
    MemorizationMonitor: lambda every: MemorizationMonitor(
        every_n_steps=5, samples=4, t_switch=(0.0, 0.4), t_resume=(), steps=4
    ),
    StageTransitions: lambda every: StageTransitions(window=5, patience=1, tolerance=0.99),
}
EVENTS = (VelocityErrorMonitor, StageTransitions)

CASES = [
    *(((), kind, "loss", 1) for kind in KINDS),
    ((), "random rows", "matcher", 2),
    pytest.param((), "steps", "matcher", 2, marks=pytest.mark.slow),
    *(((), kind, "loss", 2) for kind in NEEDS_LOSSES),
    # StageTransitions needs a probe in each step, and without it there is one in some.
    *(
        pytest.param(kinds, kind, "loss", 1, marks=pytest.mark.slow)
        for kinds, kind in (
            ([kind for kind in MONITORS if kind is not StageTransitions], "steps"),
            (MONITORS, "event"),
        )
    ),
]


def company(watched, kind, oracle):
    """The scheme of a kind, and before it the callbacks to be watched, and those it needs."""
    kinds = {*watched, *(EVENTS if kind == "event" else ())}
    every = 1 if StageTransitions in kinds else 5
    before = [make(every) for each, make in MONITORS.items() if each in kinds]
    return [*before, KINDS[kind](oracle)]


@pytest.fixture
def run(make_data, make_trainer, weights, tmp_path):
    """Trains for 24 steps; gives the weights, and the times of the last run's steps.

    With `cut` the power goes two steps after that one, of which a checkpoint was saved: at the end
    of an epoch, because elsewhere Lightning itself begins the data anew.
    """
    x, _ = make_data()

    def run(*callbacks, way="loss", batches=1, folder="run", resume=None, cut=None):
        model = Flow(way == "matcher", None if cut is None else cut + 2)
        saved = ModelCheckpoint(
            tmp_path / folder / "saved", filename="{step}", every_n_train_steps=8, save_top_k=-1
        )
        trainer = make_trainer(
            *callbacks,
            saved,
            max_steps=STEPS,
            max_epochs=-1,
            accumulate_grad_batches=batches,
            default_root_dir=tmp_path / folder,
            enable_checkpointing=True,
        )
        data = DataLoader(list(zip(x, strict=True)), 8)
        path = None if resume is None else tmp_path / folder / "saved" / f"step={resume}.ckpt"
        stopped = pytest.raises(PowerCut) if cut is not None else contextlib.nullcontext()
        with stopped:
            trainer.fit(model, data, ckpt_path=path)
        return weights(model), torch.stack(model.t)

    return run


def lines(folder):
    """What all callbacks have written, by file, but for what it cost."""
    files = folder.glob("*_logs/stages.jsonl")
    return {
        file.parent.name: [comparable(json.loads(line)) for line in file.read_text().splitlines()]
        for file in files
    }


def comparable(value):
    """For comparison with `==`: without costs, tensors as lists, floats as text (NaN is NaN).

    What is added up batch by batch is not in the same order in both runs: the last digits go.
    """
    if isinstance(value, dict):
        costs = ("probe_seconds", "share_of_step_time")
        return {key: comparable(item) for key, item in value.items() if key not in costs}
    if isinstance(value, torch.Tensor):
        return comparable(value.tolist())
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return f"{value:.10g}" if isinstance(value, float) else value


@pytest.fixture
def oracle(make_data):
    return Oracle(LatentBank(make_data()[0]))


@pytest.fixture
def saved(tmp_path):
    """`saved(folder, step, *callbacks)`: their states in the checkpoint of a step."""

    def saved(folder, step, *callbacks):
        file = tmp_path / folder / "saved" / f"step={step}.ckpt"
        states = torch.load(file, weights_only=True)["callbacks"]
        return [states[callback.state_key] for callback in callbacks]

    return saved


@pytest.mark.parametrize(("watched", "kind", "way", "batches"), CASES)
def test_stop_and_resume_equals_not_stopping(
    run, saved, oracle, watched, kind, way, batches, tmp_path
):
    """In the first phase and in a later one: weights, times, states and what is on disk."""
    through, first, second, third = (company(watched, kind, oracle) for _ in range(4))
    options = {"way": way, "batches": batches}
    run(*first, cut=8, **options)
    run(*second, resume=8, cut=16, **options)
    # A run that goes on there writes the file again, within an accumulated step.
    states = saved("run", 16, *second)
    end, times = run(*third, resume=16, **options)
    states += saved("run", STEPS, *third)
    expected, times_through = run(*through, folder="through", **options)
    assert torch.equal(end, expected)
    assert torch.equal(times, times_through[-len(times) :])
    assert len(times) == 8 * batches
    assert all(map(is_plain, states))
    check_plain(states[len(second) - 1], KINDS[kind](oracle))
    expected = saved("through", 16, *through) + saved("through", STEPS, *through)
    for kept, state in zip(states, expected, strict=True):
        assert comparable(kept) == comparable(state)
    written = lines(tmp_path / "run")
    assert written == lines(tmp_path / "through")
    assert len(written) == len(through), "one file of each callback"
    *_, scheme = through
    assert third[-1].scheme.boundary == scheme.scheme.boundary
    if kind in PHASED:
        assert len(scheme.transitions) == len(scheme.scheme.phases) - 1
        stops = [saved("through", step, scheme)[0]["scheme"]["index"] for step in (8, 16)]
        assert stops[0] < stops[1]
        assert scheme.scheme.index == stops[1]


def test_no_callback_is_forgotten():
    found = (getattr(callbacks, name) for name in callbacks.__all__)
    kinds = {kind for kind in found if isinstance(kind, type)}
    assert kinds == {*MONITORS, StageScheme, callbacks.StageRun, callbacks.Watch}


def test_an_event_that_is_said_right_before_the_stop_is_heard_at_once(run, saved, oracle):
    """By a scheme that stands before what says it, too: the order of the list does not count."""

    def make():
        errors = VelocityErrorMonitor(every_n_steps=1, strata=4, queries=4)
        events = StageTransitions(window=4, patience=1, tolerance=0.99)
        return KINDS["event"](oracle), errors, events

    scheme, *_ = first = make()
    run(*first, cut=8)
    (state,) = saved("run", 8, scheme)
    assert (state["scheme"]["index"], state["scheme"]["untils"]) == (1, [{"happened": True}])
    scheme, _, events = second = make()
    run(*second, resume=8, cut=16)
    assert [event["step"] for event in events.events] == [8]
    assert [event["step"] for event in scheme.transitions] == [8]


def test_boundary_of_a_monitor_is_kept(run):
    def pair():
        monitor = PosteriorMonitor(every_n_steps=3, strata=4, queries=8)
        return monitor, StageScheme(target=Mix("boundary"))

    first, (monitor, resumed), through = pair(), pair(), pair()
    run(*first, cut=8)
    end, _ = run(monitor, resumed, resume=8)
    expected, _ = run(*through, folder="through")
    assert resumed.scheme.boundary == first[1].scheme.boundary == through[1].scheme.boundary
    assert monitor.boundary.midpoint != resumed.scheme.boundary
    assert torch.equal(end, expected)


def check_plain(state, fresh):
    """The state of a scheme is small, and a fresh callback only keeps it at first."""
    assert len(str(state)) < 4000, "the bank is not in it"
    before = None if fresh.scheme is None else str(fresh.scheme.state_dict())
    fresh.load_state_dict(state)
    assert fresh.transitions == []
    assert (None if fresh.scheme is None else str(fresh.scheme.state_dict())) == before


def test_a_checkpoint_without_the_callback_can_be_resumed_with_it(run, oracle):
    run(cut=8)
    callback = KINDS["steps"](oracle)
    run(callback, resume=8)
    assert [event["step"] for event in callback.transitions] == [9, 13]


def test_resuming_with_other_phases_is_refused(run, oracle):
    run(KINDS["steps"](oracle), cut=8)
    with pytest.raises(ValueError, match="state of 2 phases, got 3"):
        run(KINDS["share"](oracle), resume=8)


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (int, float, str, bool, torch.Tensor)
