"""`StageScheme` in two processes (gloo, CPU): one decision, one boundary, one model."""

import json

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, LogitNormal, Oracle
from stagewise.callbacks import StageScheme
from stagewise.losses import FlowMatchingLoss
from stagewise.schemes import Phase, Phases, Scheme
from stagewise.targets import Mix, ReferenceSet
from stagewise.timesteps import LossSecondMoment
from stagewise.transitions import AtPlateau, AtStep

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
draws = torch.Generator().manual_seed(0)
rows = torch.randn(96, 6, generator=draws)


class Flow(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.loss = torch.nn.Linear(7, 6), FlowMatchingLoss()
        self.means = []

    def training_step(self, batch, batch_idx):
        # Ranks differ in what they draw, and now and then in how much.
        x1 = batch[0][: 8 - (rank == 1 and batch_idx == 3)]
        loss = self.loss(lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), x1)
        self.means.append(float(self.loss.last.loss.mean()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callback, name, steps=30):
    pl.seed_everything(9 + rank, verbose=False)
    model = Flow()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", log_every_n_steps=3, callbacks=[callback],
        logger=CSVLogger(out, name), max_steps=steps, max_epochs=-1, default_root_dir=out,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(rows), 8, shuffle=True))
    return {
        "transitions": callback.transitions,
        "boundary": callback.scheme.boundary,
        "weights": [p.detach().flatten().tolist() for p in model.parameters()],
        "means": model.means,
    }


oracle = Oracle(LatentBank(rows))
plateau = Phases([
    Phase(Scheme(oracle, target=Mix("boundary")), AtPlateau(1, window=4, patience=2)),
    Phase(Scheme(oracle, target=ReferenceSet(8))),
])
report = {"plateau": fit(StageScheme(plateau), "plateau")}
sampler = LossSecondMoment(bins=4, history=4)
report["adapting"] = fit(StageScheme(timesteps=sampler), "adapting", steps=12)
report["shares"] = sampler.shares().tolist()
report["losses"] = int(sampler.state_dict()["count"].sum())
(out / f"report{rank}.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(on_two_ranks):
    return on_two_ranks(SCRIPT)


@pytest.fixture(scope="module")
def reports(folder):
    return [json.loads((folder / f"report{rank}.json").read_text()) for rank in (0, 1)]


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
