"""`PosteriorMonitor` in two processes (gloo, CPU): the curve of one, work shared, one writer."""

import json

import pytest
import torch

from stagewise.stages import STATISTICS

pytestmark = pytest.mark.slow

COSTS = ("probe_seconds", "share_of_step_time")

# Run once here and once by torchrun, which finds a free port itself.
SCRIPT = """
import json, os, sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from stagewise.callbacks import PosteriorMonitor, writer
from stagewise.callbacks.host import Host
from stagewise.losses import FlowMatchingLoss

out, devices = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", 0))
draws = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(101, 6, generator=draws), torch.arange(101) % 3)


class Flow(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1 + rank)  # DDP begins with the weights of rank 0
        self.net, self.loss = torch.nn.Linear(7, 6), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        return self.loss(lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


class Listen(pl.Callback):
    '''Notes what is summed over the ranks.'''

    def __init__(self):
        self.shapes, self.computed = [], []

    def on_train_start(self, trainer, pl_module):
        reduce = self.reduce = Host.reduce

        def noted(host, value, *args):
            if host.world_size > 1 and value.ndim == 3:
                self.shapes.append(list(value.shape))
                self.computed.append(int((value[0] > 0).sum()))
            return reduce(host, value, *args)

        Host.reduce = noted

    def on_train_end(self, trainer, pl_module):
        Host.reduce = self.reduce


def fit(*callbacks, logger=False, **options):
    pl.seed_everything(9 + rank, verbose=False)
    model = Flow()
    loader = DataLoader(data, 8, **({"shuffle": True} | options))
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, log_every_n_steps=1,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=list(callbacks), logger=logger, max_steps=5, default_root_dir=out,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    assert trainer.world_size == devices
    trainer.fit(model, loader)
    return [p.detach().flatten().tolist() for p in model.parameters()]


# Drawing would take most of the time; put back, because one of the runs is in the tests' process.
render, writer.render = writer.render, lambda _: np.zeros((2, 3, 3), dtype=np.uint8)
small = {"every_n_steps": 2, "strata": 4, "queries": 5}
monitor = PosteriorMonitor(**small, dirpath=out / f"rank{rank}")
# Files of this one go where the logger's do, a folder that rank 0 chooses.
beside = PosteriorMonitor(every_n_steps=4, strata=4, queries=4, class_wise=False, name="beside")
listen = Listen()
plain = fit(Listen())
watched = fit(listen, monitor, beside, logger=CSVLogger(out, "csv"))

part = PosteriorMonitor(every_n_steps=100, strata=4, queries=2, dirpath=out / f"part{rank}")
rows = []
part.on_train_end = lambda *_: rows.append(len(part.oracle.bank))
fit(part, shuffle=False, sampler=SubsetRandomSampler(range(0, 80, 2)))
writer.render = render

(out / f"report{rank}.json").write_text(json.dumps({
    "plain": plain, "watched": watched, "history": monitor.history, "beside": beside.history,
    "shapes": listen.shapes, "computed": listen.computed, "part": rows[0],
}))
"""


@pytest.fixture(scope="module")
def folders(on_one_and_two_ranks):
    """The folder of the run in one process, and that of the run in two."""
    return on_one_and_two_ranks(SCRIPT)


@pytest.fixture(scope="module")
def reports(folders):
    """What the one process reported, then rank 0 and rank 1 of the two."""
    one, two = folders
    paths = (one / "report0.json", two / "report0.json", two / "report1.json")
    return [json.loads(path.read_text()) for path in paths]


def test_the_curve_is_that_of_one_process(folders, read_stages):
    (header, probes), (header_of_two, probes_of_two) = (
        read_stages(folder / "rank0") for folder in folders
    )
    assert header_of_two == header
    assert header["rows"] == 101
    assert [probe["step"] for probe in probes] == [0, 2, 4]
    assert [probe["step"] for probe in probes_of_two] == [0, 2, 4]
    for one, two in zip(probes, probes_of_two, strict=True):
        for key in ("t", *STATISTICS):
            assert two[key] == pytest.approx(one[key], abs=1e-6), key
        for key in ("midpoint", "midpoint_low", "midpoint_high", "collapsed_low"):
            assert two[key] == pytest.approx(one[key], abs=1e-6), key


def test_every_rank_knows_the_same(reports):
    def measured(report):
        # As text, because NaN is not equal to itself; without costs, which are each rank's own.
        entries = report["history"] + report["beside"]
        return json.dumps([{key: e[key] for key in e if key not in COSTS} for e in entries])

    _, zero, one = reports
    assert measured(zero) == measured(one)


def test_every_rank_reaches_the_sum_and_does_its_share(reports):
    alone, zero, one = reports
    assert alone["shapes"] == []
    # Probes of step 0 (both monitors, by name), 2, 4 (both).
    ours, other = [len(STATISTICS), 4, 5], [len(STATISTICS), 4, 4]
    assert zero["shapes"] == one["shapes"] == [other, ours, ours, other, ours]
    assert zero["computed"] == one["computed"] == [8, 10, 10, 8, 10]


def test_only_rank_zero_writes(folders):
    one, two = folders
    names = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    of_two = {path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()}
    assert of_two == names | {"report1.json"}
    assert {"rank0/stages.jsonl", "rank0/heatmap.png"} < of_two
    (beside,) = two.glob("csv/*/beside/stages.jsonl")
    assert len(beside.read_text().splitlines()) == 1 + 2


def test_weights_are_bit_identical_with_and_without(reports):
    _, zero, one = reports
    assert zero["watched"] == zero["plain"]
    assert one["watched"] == zero["watched"], "the ranks train one model"
    assert torch.tensor(zero["watched"][0]).std() > 0.1


def test_bank_of_a_subset(reports):
    assert [report["part"] for report in reports] == [40, 40, 40]
