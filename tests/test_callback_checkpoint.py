"""A checkpoint that the version before wrote, with every callback in it, is taken up exactly.

`tests/data/callbacks.ckpt` was written by `Saves` below, after the first of two epochs of
`run(callbacks())`.
"""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from stagewise import AtStep, LogitNormal, Mix, Phase, Phases, Scheme
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

OLD = Path(__file__).parent / "data" / "callbacks.ckpt"

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(resuming from a checkpoint|callbacks used to create)"),
]


def phases(oracle):
    mixed = Scheme(oracle, target=Mix("boundary"))
    return Phases(
        [Phase(mixed, AtStep(2)), Phase(mixed, AtStep(6)), Phase(Scheme(timesteps=LogitNormal()))]
    )


def callbacks():
    """All of them, as small as they go."""
    few = {"every_n_steps": 2, "strata": 4, "queries": 3}
    return [
        StageRun(seed=5),
        PosteriorMonitor(**few),
        VelocityErrorMonitor(**few),
        MemorizationMonitor(
            every_n_steps=3, samples=4, steps=2, t_switch=(0, 0.5), t_resume=(0.5,)
        ),
        MemorizationGuard(every_n_steps=2, samples=4, steps=2, queries=3),
        Forecast(every_n_steps=3),
        StageTransitions(),
        StageScheme(phases),
    ]


class Saves(pl.Callback):
    """Writes the checkpoint."""

    def __init__(self, file):
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


@pytest.fixture
def run(make_data, make_trainer, make_loader, tiny_flow, weights, tmp_path):
    """Trains for two epochs of four batches; gives the module."""
    x, labels = make_data(32, classes=2)

    def run(callbacks, ckpt_path=None):
        model = tiny_flow(seeded=True)
        model.validation_step = lambda batch, batch_idx: None
        trainer = make_trainer(
            *callbacks,
            max_steps=-1,
            max_epochs=2,
            default_root_dir=tmp_path / str(ckpt_path is None),
        )
        others = make_loader(0.9 * x[:8].roll(1, dims=1), labels[:8])
        trainer.fit(model, make_loader(x, labels), others, ckpt_path=ckpt_path)
        return model

    return run


def same(one, other):
    """Whether two states are equal, numbers to what processors differ by."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(one, float):
        return other == pytest.approx(one, rel=1e-3, abs=1e-5, nan_ok=True)
    return one == other


def test_what_the_version_before_wrote_is_continued(run, weights):
    whole, resumed = callbacks(), callbacks()
    kept = torch.load(OLD, weights_only=True)["callbacks"]
    assert kept.keys() == {callback.state_key for callback in resumed[:-1]} | {
        "StageScheme{'name': 'stagewise_scheme'}"
    }
    expected, trained = run(whole), run(resumed, OLD)
    assert torch.allclose(weights(trained), weights(expected), rtol=1e-4, atol=1e-6)
    for one, other in zip(whole, resumed, strict=True):
        after, again, old = one.state_dict(), other.state_dict(), kept[other.state_key]
        for state in (after, again, old):
            (state.get("best") or {}).pop("file", None)  # where the kept weights lie
            for entry in (*state.get("events", []), *state.get("history", [])):
                if entry.get("event") == "forecast":  # in the words of that version
                    entry.pop("targets"), entry.pop("targets_used", None)
                elif "events" in state:  # that version did not count them
                    entry.pop("samples", None)
        assert same(after, again), one.name
        assert old.keys() == after.keys()
        for entry in old.get("history", old.get("events", [])):
            assert any(same(entry, later) for later in after.get("history", after.get("events")))


def test_it_has_something_of_all():
    kept = torch.load(OLD, weights_only=True)["callbacks"].values()
    assert sum(len(state.get("history", state.get("events", []))) > 0 for state in kept) == 5
    scheme = next(state for state in kept if "scheme" in state)
    assert [event["step"] for event in scheme["transitions"]] == [2]
