"""`VelocityErrorMonitor` and `StageTransitions` in two processes (gloo): what one would say."""

import json

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from stagewise.callbacks import (
    MemorizationMonitor, PosteriorMonitor, StageTransitions, VelocityErrorMonitor, writer
)
from stagewise.losses import FlowMatchingLoss

out, devices = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", 0))
draws = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(97, 6, generator=draws))
others = TensorDataset(torch.randn(31, 6, generator=draws))


class Flow(pl.LightningModule):
    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.loss, self.lr = torch.nn.Linear(7, 6), FlowMatchingLoss(), lr

    def training_step(self, batch, batch_idx):
        return self.loss(lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), batch[0])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def fit(*callbacks, logger=False, lr=0.0):  # the same model at any batch size
    pl.seed_everything(9 + rank, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, log_every_n_steps=2,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=list(callbacks), logger=logger, max_steps=10, default_root_dir=out,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    model = Flow(lr)
    trainer.fit(model, DataLoader(data, 8 // devices, shuffle=True), DataLoader(others, 8))
    return [p.detach().flatten().tolist() for p in model.parameters()]


# Drawing would take most of the time; put back, because one of the runs is in the tests' process.
render, writer.render = writer.render, lambda _: np.zeros((2, 3, 3), dtype=np.uint8)
errors = VelocityErrorMonitor(every_n_steps=2, strata=4, queries=9, dirpath=out / f"rank{rank}")
heard = []
events = StageTransitions(window=4, patience=1, subscribers=[heard.append])
# A model that does not move is at its plateau as soon as anything can be said.
errors_short = VelocityErrorMonitor(every_n_steps=1, strata=4, queries=4, name="short")
fit(errors_short, events, errors, logger=CSVLogger(out, "csv", version=""))

plain = fit(lr=0.1)
few = {"every_n_steps": 3, "strata": 4, "queries": 4}
all_of_them = (
    PosteriorMonitor(**few, name="a"), VelocityErrorMonitor(**few, name="b"),
    MemorizationMonitor(every_n_steps=3, samples=6, steps=5), StageTransitions(name="c"),
)
watched = fit(*all_of_them, lr=0.1)
writer.render = render
(out / f"report{rank}.json").write_text(json.dumps(
    {"events": errors.events, "heard": heard, "plain": plain, "watched": watched}
))
"""


@pytest.fixture(scope="module")
def folders(on_one_and_two_ranks):
    """The folder of the run in one process, and that of the run in two."""
    return on_one_and_two_ranks(SCRIPT)


def report(folder, rank=0):
    return json.loads((folder / f"report{rank}.json").read_text())


def test_probes_are_those_of_one_process(folders):
    one, first, second = report(folders[0]), report(folders[1]), report(folders[1], 1)
    assert first["events"][0]["step"] == 1
    assert [e["event"] for e in first["events"]] == [e["event"] for e in one["events"]]
    for mine, hers, expected in zip(first["events"], second["events"], one["events"], strict=True):
        if mine["event"] != "velocity_probe":
            continue
        for split in ("train", "held_out"):
            for key in ("conditional", "oracle", "cosine", "conditional_se"):
                assert mine[split][key] == pytest.approx(expected[split][key], rel=1e-5, abs=1e-6)
                assert mine[split][key] == pytest.approx(hers[split][key], rel=1e-12, nan_ok=True)
        assert mine["stages"]["train"]["navigation"]["floor"] == pytest.approx(
            expected["stages"]["train"]["navigation"]["floor"], rel=1e-5
        )


def test_windows_count_the_batches_of_all_ranks(folders):
    for rank in (0, 1):
        windows = [e for e in report(folders[1], rank)["events"] if e["event"] == "training_window"]
        steps = [(w["from_step"], w["step"]) for w in windows]
        assert steps == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
        assert all(sum(w["draws"]) == pytest.approx(1) for w in windows)
    same = [report(folders[1], rank)["events"][1]["loss"] for rank in (0, 1)]
    assert same[0] == pytest.approx(same[1], nan_ok=True)


def test_ranks_decide_the_same_transition_at_the_same_step(folders):
    first, second = (report(folders[1], rank)["heard"] for rank in (0, 1))
    assert first == second
    assert first[0]["kind"] == "navigation learned"
    assert [(e["kind"], e["step"]) for e in first] == [
        (e["kind"], e["step"]) for e in report(folders[0])["heard"]
    ]


def test_weights_are_bit_identical_with_all_monitors(folders):
    found = [report(folders[0]), report(folders[1]), report(folders[1], 1)]
    assert all(each["watched"] == each["plain"] for each in found)
    assert found[1]["plain"] == found[2]["plain"], "the ranks train one model"
    assert max(map(abs, found[0]["plain"][1])) > 0


def test_only_the_first_rank_writes(folders):
    assert (folders[1] / "rank0" / "stages.jsonl").exists()
    assert not (folders[1] / "rank1").exists()
