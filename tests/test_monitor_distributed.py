"""`PosteriorMonitor` in two processes (gloo, CPU): the curve of one, work shared, one writer."""

import json

import pytest
import torch

from stagewise.stages import STATISTICS

pytestmark = pytest.mark.slow

COSTS = ("probe_seconds", "share_of_step_time")

SCRIPT = """
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import SubsetRandomSampler

from stagewise.callbacks import PosteriorMonitor
from stagewise.callbacks.host import Host

data = TensorDataset(samples(101), torch.arange(101) % 3)


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
    model = Flow(1e-2, seed=1 + rank)  # DDP begins with the weights of rank 0
    trainer = make_trainer(*callbacks, logger=logger, max_steps=5, log_every_n_steps=1)
    assert trainer.world_size == devices
    trainer.fit(model, DataLoader(data, 8, **({"shuffle": True} | options)))
    return weights(model)


small = {"every_n_steps": 2, "strata": 4, "queries": 5}
monitor = PosteriorMonitor(**small, dirpath=out / f"rank{rank}")
# Files of this one go where the logger's do, a folder that rank 0 chooses.
beside = PosteriorMonitor(every_n_steps=4, strata=4, queries=4, class_wise=False, name="beside")
listen = Listen()
part = PosteriorMonitor(every_n_steps=100, strata=4, queries=2, dirpath=out / f"part{rank}")
rows = []
part.on_train_end = lambda *_: rows.append(len(part.oracle.bank))
with undrawn():
    plain = fit(Listen())
    watched = fit(listen, monitor, beside, logger=CSVLogger(out, "csv"))
    fit(part, shuffle=False, sampler=SubsetRandomSampler(range(0, 80, 2)))
report({
    "plain": plain, "watched": watched, "history": monitor.history, "beside": beside.history,
    "shapes": listen.shapes, "computed": listen.computed, "part": rows[0],
})
"""


@pytest.fixture(scope="module")
def folders(on_one_and_two_ranks):
    """The folder of the run in one process, and that of the run in two."""
    return on_one_and_two_ranks(SCRIPT)


@pytest.fixture(scope="module")
def reports(folders, reports_of):
    """What the one process reported, then rank 0 and rank 1 of the two."""
    return reports_of(*folders)


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
