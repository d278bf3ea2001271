"""Fine-tuning on 1 to 20 samples, in batches larger than the set: every callback, every target.

What is measured on so little must say so: no NaN in a file, no interval without a width.
"""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import (
    Concentration,
    LatentBank,
    LossAboveFloor,
    Mix,
    Oracle,
    ReferenceSet,
    Scheme,
    Smooth,
    Smoothing,
    StageAware,
    StageCurve,
)
from stagewise.callbacks import (
    Forecast,
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.losses import FlowMatchingLoss

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|num_workers)"),
]

FEW = {"strata": 4, "queries": 6, "every_n_steps": 3}
COPIES = {"samples": 4, "steps": 4, "every_n_steps": 3}


def guard():
    return MemorizationGuard(queries=4, **COPIES)


def above_floor(oracle):
    return Scheme(oracle, timesteps=LossAboveFloor(StageCurve.measure(oracle)))


KINDS = {
    "watch": lambda: [
        PosteriorMonitor(**FEW),
        VelocityErrorMonitor(**FEW),
        MemorizationMonitor(**COPIES),
        guard(),
        Forecast(every_n_steps=3),
        StageTransitions(),
    ],
    "mix": lambda: [StageScheme(target=Mix("boundary"))],
    "mix all": lambda: [StageScheme(target=Mix(1.0))],
    "mix smooth": lambda: [StageScheme(target=Mix(Smooth(1.0)))],
    "mix top-1": lambda: [StageScheme(target=Mix(Concentration()))],
    "reference set": lambda: [StageScheme(target=ReferenceSet(2, lam="boundary"))],
    "times": lambda: [StageScheme(timesteps=StageAware(0.5))],
    "floor": lambda: [StageScheme(above_floor)],
    "two stages": lambda: [guard(), StageScheme(Scheme.two_stage)],
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(34, 32)

    def forward(self, x, t, y=None):
        y = 0 * t if y is None else y
        columns = torch.stack([t, y.to(t)], 1).to(x)
        return self.f(torch.cat([x.flatten(1), columns], 1)).view_as(x)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = Net(), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.fixture
def trained(make_trainer):
    """Trains on so many rows; with labels there is one held-out sample, else none."""

    def train(callbacks, rows, labelled):
        x = torch.randn(rows + 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        parts = (x, torch.arange(rows + 1) % 2) if labelled else (x,)
        train, other = (
            TensorDataset(*(p[at] for p in parts)) for at in (slice(rows), slice(rows, None))
        )
        trainer = make_trainer(*callbacks, max_steps=6, num_sanity_val_steps=0)
        module = Module()
        trainer.fit(module, DataLoader(train, 64), *[DataLoader(other, 64)] * labelled)
        return module

    return train


def strict(text):
    raise AssertionError(f"{text} in a file")


def events_of(folder):
    return [
        json.loads(line, parse_constant=strict)
        for file in folder.rglob("stages.jsonl")
        for line in file.read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("kind", "rows", "labelled"),
    [
        *((kind, *few) for kind in KINDS for few in ((1, False), (2, True), (5, False))),
        *(("watch", *few) for few in ((2, False), (5, True), (20, True))),
        ("two stages", 20, True),
    ],
)
def test_a_short_training(trained, kind, rows, labelled, tmp_path, lightning_log, recwarn):
    refused = r"at least 2 rows, got \(1, 2, 4, 4\)\. A posterior" if rows == 1 else None
    if (kind, rows) == ("times", 2):  # one of two rows weighs a half at all t
        refused = r"got 0\.0: one of the stages would be empty\. Use Uniform\(\)"
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            trained(KINDS[kind](), rows, labelled)
        return
    module = trained(KINDS[kind](), rows, labelled)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    said = " ".join(record.getMessage() for record in lightning_log.records)
    warned = [
        str(each.message) for each in recwarn if "so smoothing takes all" in str(each.message)
    ]
    assert len(warned) == (kind == "two stages" and rows < 9)
    if warned:
        assert f"all {rows - 1} other rows as the neighbours of each row" in warned[0]
    events = events_of(tmp_path)
    for probe in (event for event in events if event["event"] == "probe"):
        for name in ("midpoint", "collapsed"):
            value, low, high = (probe[f"{name}{end}"] for end in ("", "_low", "_high"))
            assert value is not None
            assert low <= value <= high
            if low == high:  # nothing to be uncertain about: said in words
                assert value == 0
                assert f"({name}: the largest weight is above" in said
    for event in events:
        if event["event"] in ("memorization_probe", "guard_probe"):
            # Clopper-Pearson of 4 samples: none copied leaves up to 60 %.
            ends = zip(event["low"], event["high"], strict=True)
            assert all(high - low > 0.5 for low, high in ends)
    if kind == "watch":
        assert {"probe", "velocity_probe", "memorization_probe", "guard_probe", "forecast"} <= {
            event["event"] for event in events
        }
        assert ("1 held-out samples: errors on them" in said) == labelled
        forecast = next(event for event in events if event["event"] == "forecast")
        assert 0 <= forecast["share"] <= 1
        if rows > 2 or not labelled:  # else each class has one row, and targets have no noise
            assert forecast["share_se"] > 0
        assert math.isfinite(forecast["share_se"])


def test_more_reference_rows_than_there_are_is_refused_before_the_first_step(trained):
    target = ReferenceSet(1000, lam="boundary")
    with pytest.raises(ValueError, match=r"at most 5, the rows of the bank, got 1000\. For all"):
        trained([StageScheme(target=target)], 5, False)


def test_smoothing_of_few_rows():
    bank = LatentBank(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"from 1 to 4, .* got 8: Smoothing\(bank, neighbours=4\)"):
        Smoothing(bank)
    with pytest.raises(ValueError, match=r"at least 20 rows .* got 5: Smoothing\(bank, n.*=4"):
        Smoothing.fit(bank)
    with pytest.warns(UserWarning, match="all 4 other rows as the neighbours"):
        assert Scheme.two_stage(Oracle(bank)).smoothing.neighbours == 4
