"""`StageScheme` in two processes (gloo, CPU): one decision, one boundary, one model."""

import json

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
from lightning.pytorch.loggers import CSVLogger

from stagewise import LatentBank, Oracle
from stagewise.callbacks import StageScheme
from stagewise.schemes import Phase, Phases, Scheme
from stagewise.targets import Mix, ReferenceSet
from stagewise.timesteps import LossSecondMoment
from stagewise.transitions import AtPlateau

rows = samples(96)


class Uneven(Flow):
    means = None

    def training_step(self, batch, batch_idx):
        # Ranks differ in what they draw, and now and then in how much.
        x1 = batch[0][: 8 - (rank == 1 and batch_idx == 3)]
        loss = super().training_step([x1], batch_idx)
        self.means.append(float(self.loss.last.loss.mean()))
        return loss


def fit(callback, name, steps=30):
    pl.seed_everything(9 + rank, verbose=False)
    model = Uneven(0.1)
    model.means = []
    trainer = make_trainer(
        callback, logger=CSVLogger(out, name), log_every_n_steps=3, max_steps=steps, max_epochs=-1
    )
    trainer.fit(model, loader(rows, shuffle=True))
    return {
        "transitions": callback.transitions,
        "boundary": callback.scheme.boundary,
        "weights": weights(model),
        "means": model.means,
    }


oracle = Oracle(LatentBank(rows))
plateau = Phases([
    Phase(Scheme(oracle, target=Mix("boundary")), AtPlateau(1, window=4, patience=2)),
    Phase(Scheme(oracle, target=ReferenceSet(8))),
])
found = {"plateau": fit(StageScheme(plateau), "plateau")}
sampler = LossSecondMoment(bins=4, history=4)
found["adapting"] = fit(StageScheme(timesteps=sampler), "adapting", steps=12)
found["shares"] = sampler.shares().tolist()
found["losses"] = int(sampler.state_dict()["count"].sum())
report(found)
"""


@pytest.fixture(scope="module")
def folder(on_two_ranks):
    return on_two_ranks(SCRIPT)


@pytest.fixture(scope="module")
def reports(folder, reports_of):
    return reports_of(folder)


def test_ranks_change_phase_at_the_same_step(reports):
    zero, one = (report["plateau"] for report in reports)
    assert zero["means"] != one["means"], "each rank has losses of its own"
    assert len(zero["transitions"]) == 1
    assert zero["transitions"] == one["transitions"]
    assert 8 < zero["transitions"][0]["step"] < 30
    assert "plateau of navigation" in zero["transitions"][0]["message"]


def test_ranks_measure_one_boundary_and_train_one_model(reports):
    zero, one = (report["plateau"] for report in reports)
    assert 0 < zero["boundary"] < 1
    assert zero["boundary"] == one["boundary"]
    assert zero["weights"] == one["weights"]


def test_ranks_adapt_to_the_losses_of_all(reports):
    zero, one = reports
    assert zero["shares"] == one["shares"]
    assert max(zero["shares"]) > 0.26
    # Twelve steps of two ranks with eight each: a rank that has seven sends one of them twice.
    assert zero["losses"] == one["losses"] == 12 * 2 * 8


def test_only_rank_zero_writes_and_logs_what_all_did(folder):
    text = (folder / "plateau/version_0/stagewise_scheme/stages.jsonl").read_text()
    assert [json.loads(line)["event"] for line in text.splitlines()] == ["scheme", "transition"]
    header, *lines = (folder / "plateau/version_0/metrics.csv").read_text().split()
    steps = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    means = [row for row in steps if row["stagewise_scheme/lambda"]]
    assert [int(row["step"]) for row in means] == list(range(2, 30, 3))
