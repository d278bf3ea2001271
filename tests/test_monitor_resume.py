"""`PosteriorMonitor` in a run that stops and resumes: the same curve, each probe once."""

import functools
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from stagewise.callbacks import PosteriorMonitor, figures

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    # The runs of this file are as short as that.
    pytest.mark.filterwarnings("ignore:.*(resuming from a checkpoint|callbacks used to create)"),
]

small = functools.partial(PosteriorMonitor, every_n_steps=3, strata=4, queries=4)
MEASURED = ("step", "t", "top1", "entropy", "midpoint", "midpoint_low", "collapsed_high")


def text(history):
    """For comparison: NaN equals NaN here, and every digit counts, but not what a probe cost."""
    cost = ("probe_seconds", "share_of_step_time")
    return json.dumps([{k: v for k, v in e.items() if k not in cost} for e in history])


@pytest.fixture
def run(make_data, make_trainer, tiny_flow, weights, tmp_path):
    """Trains up to `steps` or `epochs`, of eight batches each; gives the weights."""
    x, labels = make_data(classes=2)

    def run(
        monitor,
        *callbacks,
        steps=-1,
        epochs=None,
        batches=1,
        folder="run",
        fail_at=None,
        ckpt_path=None,
    ):
        model = tiny_flow(seeded=True, fail_at=fail_at)
        trainer = make_trainer(
            *([monitor] if monitor else []),
            *callbacks,
            max_steps=steps,
            max_epochs=epochs,
            accumulate_grad_batches=batches,
            default_root_dir=tmp_path / folder,
            enable_checkpointing=bool(callbacks),
        )
        data = DataLoader(list(zip(x, labels, strict=True)), 8)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / folder / "end.ckpt")
        return weights(model)

    return run


def test_stop_and_resume_in_another_folder_equals_not_stopping(run, tmp_path, read_stages):
    # Stops at the end of an epoch, because elsewhere Lightning itself begins the data anew.
    through, first, second = small(), small(), small()
    expected = run(through, epochs=2, folder="through")
    middle = run(first, epochs=1)
    end = run(second, epochs=2, folder="another", ckpt_path=tmp_path / "run" / "end.ckpt")
    assert torch.equal(end, expected)
    assert not torch.equal(end, middle)
    assert [entry["step"] for entry in first.history] == [0, 3, 6]
    assert [entry["step"] for entry in second.history] == [0, 3, 6, 9, 12, 15]
    assert text(second.history) == text(through.history)

    header, probes = read_stages(tmp_path / "through" / "stagewise_logs")
    again_header, again = read_stages(tmp_path / "another" / "stagewise_logs")
    assert again_header == header
    assert len(probes) == len(again) == 6
    for one, other in zip(probes, again, strict=True):
        assert [one[key] for key in MEASURED] == [other[key] for key in MEASURED]
    assert len(read_stages(tmp_path / "run" / "stagewise_logs")[1]) == 3, "left as it was"


@pytest.mark.parametrize("batches", [1, 2])
def test_power_cut_after_a_probe_that_was_not_saved(run, batches, tmp_path, read_stages, power_cut):
    saved = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=8)
    with pytest.raises(power_cut):
        run(small(), saved, steps=16, batches=batches, fail_at=10)
    _, probes = read_stages(tmp_path / "run" / "stagewise_logs")
    assert [probe["step"] for probe in probes] == [0, 3, 6, 9], (
        "9 is on disk, not in the checkpoint"
    )

    monitor, through = small(), small()
    run(monitor, steps=16, batches=batches, ckpt_path=tmp_path / "saved" / "step=8.ckpt")
    run(through, steps=16, batches=batches, folder="through")
    _, probes = read_stages(tmp_path / "run" / "stagewise_logs")
    assert [probe["step"] for probe in probes] == [0, 3, 6, 9, 12, 15]
    assert text(monitor.history) == text(through.history)


def test_resuming_at_a_step_to_be_probed(run, tmp_path):
    # A checkpoint of step 6 is written before step 6 is probed.
    monitor = small()
    run(small(), steps=6)
    run(monitor, steps=8, ckpt_path=tmp_path / "run" / "end.ckpt")
    assert [entry["step"] for entry in monitor.history] == [0, 3, 6]


def test_a_checkpoint_without_monitor_can_be_resumed_with_one(run, tmp_path, read_stages):
    run(None, steps=5)
    monitor = small()
    run(monitor, steps=10, ckpt_path=tmp_path / "run" / "end.ckpt")
    assert [entry["step"] for entry in monitor.history] == [5, 6, 9], "and at once, having none"
    assert len(read_stages(tmp_path / "run" / "stagewise_logs")[1]) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"strata": 6},
        {"every_n_steps": 2},
        {"seed": 4},
    ],
)
def test_resuming_with_other_settings(run, change, tmp_path, monkeypatch, read_stages):
    if "strata" in change:
        monkeypatch.undo()  # with figures, which show the probes of both runs
    run(small(), steps=4)
    monitor = small(**change)
    run(monitor, steps=8, ckpt_path=tmp_path / "run" / "end.ckpt")
    _, probes = read_stages(tmp_path / "run" / "stagewise_logs")
    steps = [0, 3, 4, 6] if "every_n_steps" in change else [0, 3, 6]
    assert [probe["step"] for probe in probes] == steps
    assert len(probes[-1]["top1"]) == change.get("strata", 4)


def test_a_resumed_run_marks_the_boundary_of_its_first_probe(run, tmp_path, monkeypatch):
    marked = []

    def draw(curve, boundary, *_):
        marked.append(boundary.midpoint)
        return Figure()

    monkeypatch.setattr(figures, "concentration_figure", draw)
    first, second = small(figures=1), small(figures=1)
    run(first, steps=4)
    run(second, steps=8, ckpt_path=tmp_path / "run" / "end.ckpt")
    measured = [entry["midpoint"] for entry in second.history]
    assert len({*measured}) == len(measured) == len(marked) == 3, "each probe has its own draws"
    assert {*marked} == {measured[0]}


def test_loading_state_only_stashes(run, tmp_path):
    monitor, fresh = small(), small()
    run(monitor, steps=4)
    state = monitor.state_dict()
    fresh.load_state_dict(state)
    assert json.dumps(fresh.state_dict()) == json.dumps(state)
    assert fresh.oracle is None
    fresh.events.append({})
    assert len(monitor.history) == 2, "the state is not shared"
