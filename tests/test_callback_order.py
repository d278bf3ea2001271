"""The order of callbacks in the trainer's list changes nothing: not a weight, not a byte."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from stagewise import AtEvent, LogitNormal, Mix, Phase, Phases, Scheme
from stagewise.callbacks import (
    Forecast,
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageRun,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.callbacks.stage_transitions import NAVIGATION_LEARNED

pytestmark = pytest.mark.usefixtures("quick_figures")

# Each is the first once, which leads the run, and each comes before each other once.
ORDERS = [
    *((0, 1, 2, 3), (3, 2, 1, 0)),
    *(pytest.param(order, marks=pytest.mark.slow) for order in ((1, 3, 0, 2), (2, 0, 3, 1))),
]
FEW = {"every_n_steps": 2, "strata": 4, "queries": 4}


def watch():
    """Three monitors, and a scheme that hangs on the boundary they measure."""
    return (
        PosteriorMonitor(**FEW),
        VelocityErrorMonitor(**FEW),
        MemorizationMonitor(every_n_steps=4, samples=4, steps=4),
        StageScheme(target=Mix("boundary")),
    )


def events():
    """A scheme that waits for an event, what notices it, and what that reads."""
    first = Phase(Scheme(timesteps=LogitNormal()), AtEvent(NAVIGATION_LEARNED))
    return (
        StageScheme(Phases([first, Phase(Scheme())])),
        StageTransitions(window=4, patience=1, tolerance=0.99),
        VelocityErrorMonitor(every_n_steps=1, strata=4, queries=4),
        PosteriorMonitor(**FEW),
    )


@pytest.fixture
def files(make_trainer, make_loader, make_data, tiny_flow, weights, tmp_path):
    """`files(callbacks, folder)`: the weights of a run and what it wrote, by file."""

    def files(callbacks, folder):
        model = tiny_flow()
        model.validation_step = lambda batch, batch_idx: None
        pl.seed_everything(1, verbose=False)
        trainer = make_trainer(
            *callbacks, max_steps=12, default_root_dir=tmp_path / folder, logger=False
        )
        train, others = make_loader(make_data(80)[0], shuffle=True), make_loader(make_data(16)[0])
        trainer.fit(model, train, others)
        found = {
            file.relative_to(tmp_path / folder): file.read_bytes()
            for file in sorted((tmp_path / folder).rglob("*"))
            if file.is_file()
        }
        return weights(model), found

    return files


@pytest.fixture(scope="module")
def seen():
    """What the first order of each kind gave."""
    return {}


@pytest.mark.parametrize("make", [watch, events], ids=["watch", "events"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_any_order_gives_the_same_files(files, seen, make, order):
    callbacks = make()
    trained, found = files([callbacks[place] for place in order], "run")
    assert len([file for file in found if file.name == "stages.jsonl"]) == 4
    expected, others = seen.setdefault(make, (trained, found))
    assert torch.equal(trained, expected)
    assert found == others


def test_a_forecast_reads_the_errors_wherever_it_stands(files):
    found = []
    for place in (0, 1):
        callbacks = [VelocityErrorMonitor(every_n_steps=2, queries=4)]
        callbacks.insert(place, Forecast())
        found.append(files(callbacks, f"run{place}")[1])
        assert callbacks[place].history[0]["smoothing"] is not None
    assert found[0] == found[1]


@pytest.mark.slow
def test_what_is_said_once_holds_for_all_wherever_it_is_said(files, make_data):
    def find(batch):
        return 1.0 * batch[0], None

    said = [StageRun(read_batch=find, seed=3, class_wise=False), *watch()[:3]]
    first = files(said, "first")
    last = files([*watch()[:3], StageRun(read_batch=find, seed=3, class_wise=False)], "last")
    assert first[1] == last[1]
    on_one = files([PosteriorMonitor(**FEW, read_batch=find), *watch()[1:3]], "one")
    on_other = files(
        [*watch()[:2], MemorizationMonitor(every_n_steps=4, samples=4, steps=4, read_batch=find)],
        "other",
    )
    assert on_one[1] == on_other[1]
    assert first[1] != on_one[1], "the seed"


def test_what_contradicts_itself_is_refused(files):
    one, other = (lambda batch: (batch[0], None) for _ in range(2))
    callbacks = (
        PosteriorMonitor(**FEW, read_batch=one),
        VelocityErrorMonitor(**FEW, read_batch=other),
    )
    with pytest.raises(
        ValueError, match=r"PosteriorMonitor\(read_batch=.* differ.*StageRun\(read_batch="
    ):
        files([*callbacks, MemorizationMonitor(samples=4, steps=4)], "run")
    with pytest.raises(ValueError, match="Expected one StageRun for each trainer, got 2"):
        files([StageRun(name="a"), StageRun(name="b"), PosteriorMonitor(**FEW)], "two")


def test_each_callback_has_at_most_nine_arguments_of_its_own():
    import inspect

    for kind in (
        *(PosteriorMonitor, VelocityErrorMonitor, MemorizationMonitor, StageTransitions),
        *(MemorizationGuard, StageScheme, StageRun, Forecast),
    ):
        own = set(inspect.signature(kind.__init__).parameters) - {"self", "bank", "options"}
        assert len(own) <= 9, kind


def test_an_argument_that_is_none_is_named():
    with pytest.raises(TypeError, match="PosteriorMonitor has no argument 'dir_path'.*dirpath"):
        PosteriorMonitor(dir_path="somewhere")


def test_loggers_get_ascending_steps(make_trainer, make_loader, make_data, tiny_flow, tmp_path):
    steps = []

    class Noted(CSVLogger):
        def log_metrics(self, metrics, step=None):
            steps.append(step)

    trainer = make_trainer(*watch(), max_steps=9, logger=Noted(tmp_path))
    trainer.fit(tiny_flow(), make_loader(make_data(80)[0]))
    assert steps == sorted(steps)
