"""`PosteriorMonitor` in a run: it changes nothing, and everything it found is where it said."""

import copy
import random
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import DataLoader, Dataset, RandomSampler

from stagewise import CosinePath, LatentBank, LinearPath, Oracle
from stagewise.callbacks import PosteriorMonitor
from stagewise.losses import FlowMatchingLoss
from stagewise.stages import (
    STATISTICS,
    StageCurve,
    predicted_boundary,
    stage_edges,
    stratified_times,
)

pytestmark = pytest.mark.usefixtures("quick_figures")  # drawn in test_monitors_together.py

FIGURES = ("concentration", "target_difference", "heatmap")
BOUNDARIES = [f"{key}{end}" for key in ("midpoint", "collapsed") for end in ("", "_low", "_high")]


def small(bank=None, **options):
    return PosteriorMonitor(bank, **({"every_n_steps": 2, "strata": 4, "queries": 4} | options))


class Augmented(Dataset):
    """Draws from all three global generators whenever a sample is read."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] * (1 + random.random()) + float(np.random.rand()) + torch.rand(1)


class Clumsy(pl.Callback):
    """What the monitor must not be: a callback that takes one number from a global generator."""

    def __init__(self, draw):
        self.draw = draw

    def on_train_batch_start(self, *_):
        self.draw()


# -- watching changes nothing -----------------------------------------------------------------

DRAWS = {
    "torch": lambda: torch.rand(1),
    "numpy": lambda: np.random.rand(),
    "python": lambda: random.random(),
}

# Name of the run, options of the trainer, how its loader is made.
RUNS = {
    "plain": ({}, lambda x: DataLoader(x, 8, shuffle=True)),
    "accumulation": ({"accumulate_grad_batches": 2}, lambda x: DataLoader(x, 8, shuffle=True)),
    "bf16": ({"precision": "bf16-mixed"}, lambda x: DataLoader(x, 8, shuffle=True)),
    "worker": ({}, lambda x: DataLoader(Augmented(x), 8, shuffle=True, num_workers=1)),
    "sampler": (
        {},
        lambda x: DataLoader(
            x, 8, sampler=RandomSampler(x, generator=torch.Generator().manual_seed(5))
        ),
    ),
    "augmented": ({}, lambda x: DataLoader(Augmented(x), 8, shuffle=True)),
}


@pytest.fixture
def trained(make_data, make_trainer, tiny_flow, weights):
    """Trains from fixed seeds; gives the weights and the state of the three generators after."""

    def train(run, *callbacks):
        options, make_loader = RUNS[run]
        model = tiny_flow()
        pl.seed_everything(17, verbose=False)
        # Ten steps are more than an epoch: the second one starts with generators as they were left.
        make_trainer(*callbacks, max_steps=10, **options).fit(model, make_loader(make_data()[0]))
        state = np.random.get_state()
        ends = (torch.get_rng_state().tolist(), (state[1].tolist(), state[2]), random.getstate())
        return weights(model), ends

    return train


@pytest.mark.filterwarnings("ignore:(The training set gives|Samples of the|The bank has a)")
@pytest.mark.parametrize(
    ("run", "given"), [*((run, False) for run in RUNS), ("plain", True), ("augmented", True)]
)
def test_weights_are_bit_identical_with_and_without(run, given, trained, make_data):
    monitor = small(LatentBank(make_data()[0]) if given else None)
    plain, ends = trained(run)
    watched, watched_ends = trained(run, monitor)
    assert torch.equal(plain, watched)
    assert ends == watched_ends
    assert [entry["step"] for entry in monitor.history] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("run", "generator"),
    [("plain", "torch"), ("augmented", "numpy"), ("augmented", "python")],
)
def test_a_callback_that_draws_would_be_noticed(run, generator, trained):
    plain, _ = trained(run)
    disturbed, _ = trained(run, Clumsy(DRAWS[generator]))
    assert not torch.equal(plain, disturbed)


# -- what is measured -------------------------------------------------------------------------


def test_curve_is_that_of_the_bank_at_the_documented_queries(
    make_data, make_loader, make_trainer, tiny_flow
):
    x, labels = make_data(classes=3)
    monitor = small(seed=7, every_n_steps=3)
    make_trainer(monitor).fit(tiny_flow(), make_loader(x, labels, shuffle=True))

    bank = LatentBank(x, labels)
    edges = stage_edges(predicted_boundary(bank, LinearPath(), class_wise=True), 4)
    assert [entry["step"] for entry in monitor.history] == [0, 3]
    for entry in monitor.history:
        t = stratified_times(edges, 4, seed=(7, entry["step"]))
        curve = StageCurve.measure(Oracle(bank), t, seed=(7, entry["step"], 1), class_wise=True)
        for statistic in STATISTICS:
            assert entry[statistic] == pytest.approx(curve.mean(statistic).tolist(), abs=1e-9)
        assert entry["midpoint"] == pytest.approx(curve.boundary(seed=7).midpoint, abs=1e-9)
    assert monitor.history[0]["t"] != monitor.history[1]["t"], "each probe has new queries"


@pytest.mark.parametrize(
    ("class_wise", "classes", "used"),
    [("auto", 3, True), ("auto", 0, False), (True, 3, True), (False, 3, False)],
)
@pytest.mark.parametrize("given", [False, True], ids=["bank_from_loader", "bank_given"])
def test_class_wise(
    class_wise, classes, used, given, make_data, make_loader, make_trainer, tiny_flow, read_stages,
    tmp_path,
):  # fmt: skip
    x, labels = make_data(classes=classes)
    monitor = small(LatentBank(x, labels) if given else None, class_wise=class_wise)
    make_trainer(monitor, max_steps=1).fit(tiny_flow(), make_loader(x, labels))
    header, probes = read_stages(tmp_path / "stagewise_logs")
    assert header["class_wise"] is used
    curve = StageCurve.measure(
        Oracle(LatentBank(x, labels)), monitor.curve.t, seed=(0, 0, 1), class_wise=used
    )
    # The order of the rows, and so the queries, are those of a bank with labels or without.
    if given or used or not classes:
        assert probes[0]["top1"] == pytest.approx(curve.mean("top1").tolist(), abs=1e-9)


def test_path_is_the_given_one_or_that_of_the_loss(
    make_data, make_loader, make_trainer, tiny_flow, read_stages, tmp_path, lightning_log
):
    def path_of(model, **options):
        make_trainer(small(**options), max_steps=1).fit(model, make_loader(make_data()[0]))
        return read_stages(tmp_path / "stagewise_logs")[0]["path"]

    of_loss, two = tiny_flow(), tiny_flow()
    of_loss.loss = FlowMatchingLoss(CosinePath())
    assert path_of(of_loss) == "CosinePath()"
    assert path_of(of_loss, path=LinearPath()) == "LinearPath()"
    two.loss, two.other = FlowMatchingLoss(CosinePath()), FlowMatchingLoss(CosinePath())
    assert path_of(two) == "CosinePath()", "as with an averaged copy of the module"
    two.other = FlowMatchingLoss()
    with pytest.raises(ValueError, match=r"several paths, CosinePath\(\), LinearPath\(\)"):
        path_of(two)
    del two.loss, two.other
    lightning_log.clear()
    with pytest.raises(AttributeError):  # the module has lost its loss
        path_of(two)
    assert "say path=... if training uses another" in lightning_log.text


def test_a_step_of_several_batches_is_probed_once(make_data, make_loader, make_trainer, tiny_flow):
    monitor, model = small(every_n_steps=1), tiny_flow()
    make_trainer(monitor, accumulate_grad_batches=4, max_steps=3).fit(
        model, make_loader(make_data()[0])
    )
    assert model.calls == 12
    assert [entry["step"] for entry in monitor.history] == [0, 1, 2]


# -- the bank is nobody's buffer --------------------------------------------------------------


def test_copies_of_bank_and_oracle_are_the_same_object(make_data):
    bank = LatentBank(*make_data(classes=3))
    oracle = Oracle(bank)
    for copied in (copy.copy, copy.deepcopy):
        assert copied(bank) is bank
        assert copied(oracle) is oracle
    assert copy.deepcopy({"inside": [oracle, bank]})["inside"] == [oracle, bank]


def test_weight_averaging_and_checkpoint_do_not_hold_the_bank(make_trainer, tiny_flow, tmp_path):
    x = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0))
    bank = LatentBank(x)
    assert bank.nbytes > 4e6
    pointers = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            pointers.append(monitor.oracle.bank.rows.data_ptr())

    def size(name, *callbacks):
        model = tiny_flow()
        # A module that holds the oracle, as a steered loss does, is copied whole for its average.
        model.oracle = Oracle(bank)
        average = EMAWeightAveraging(decay=0.9)
        saved = ModelCheckpoint(tmp_path / name, filename="end", every_n_train_steps=2)
        trainer = make_trainer(*callbacks, average, saved, enable_checkpointing=True, max_steps=2)
        trainer.fit(model, DataLoader(x[:64], 8))
        return (tmp_path / name / "end.ckpt").stat().st_size

    monitor = small(bank, every_n_steps=1)
    without, watched = size("without"), size("watched", monitor, Look())
    assert len(monitor.history) == 2
    assert set(pointers) == {x.data_ptr()}, "the bank is the tensor that was given, never a copy"
    assert without < 1e5
    assert 0 < watched - without < 1e4, "the probes, and nothing else"
    assert monitor.oracle is None, "let go of after training"


# -- what is logged ---------------------------------------------------------------------------


def twice(x):
    """Each sample two times: no posterior weight exceeds one half, and nothing ever collapses."""
    return torch.cat([x, x])


def test_tensorboard_holds_every_documented_tag(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path
):
    monitor = small()
    logger = TensorBoardLogger(tmp_path, name="tb", version="run")
    x, _ = make_data()
    make_trainer(monitor, logger=logger).fit(tiny_flow(), make_loader(twice(x)))

    events = EventAccumulator(logger.log_dir, {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    own = {tag for tag in tags["scalars"] if tag.startswith("stagewise")}
    edges = stage_edges(monitor.predicted, 4)
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    by_t = [f"stagewise_by_t/{s}/t={t:.3f}" for s in STATISTICS for t in centres]
    once = [*BOUNDARIES, "predicted", "probe_seconds", "share_of_step_time"]
    assert len(set(by_t)) == 5 * 4
    assert own == {f"stagewise/{tag}" for tag in once} | set(by_t)

    first, second = monitor.history
    for key in BOUNDARIES:
        logged = events.Scalars(f"stagewise/{key}")
        assert [point.step for point in logged] == [0, 2]
        expected = [first[key], second[key]]
        assert [p.value for p in logged] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    for s in STATISTICS:
        for i, t in enumerate(centres):
            values = [point.value for point in events.Scalars(f"stagewise_by_t/{s}/t={t:.3f}")]
            assert values == pytest.approx([first[s][i], second[s][i]], rel=1e-6)
    assert np.isnan(events.Scalars("stagewise/collapsed")[0].value)
    costs = [point.value for point in events.Scalars("stagewise/probe_seconds")]
    assert costs == pytest.approx(monitor.seconds, rel=1e-6)
    # Nothing was trained before the first probe, so it has no share.
    assert [p.step for p in events.Scalars("stagewise/share_of_step_time")] == [2]

    assert sorted(tags["images"]) == sorted(f"stagewise/{name}" for name in FIGURES)
    for name in FIGURES:
        pictures = events.Images(f"stagewise/{name}")
        assert [picture.step for picture in pictures] == [0, 2]
        written = np.asarray(Image.open(tmp_path / "tb" / "run" / "stagewise" / f"{name}.png"))
        assert written.shape == (pictures[1].height, pictures[1].width, 3)

    (layout,) = read_layouts(events)
    assert [category.title for category in layout.category] == ["stagewise", "epoch"]
    charts = {chart.title: chart for chart in layout.category[0].chart}
    assert len(charts["floor at four t"].multiline.tag) == 4
    shown = charts["midpoint with interval"].margin.series[0]
    assert (shown.value, shown.lower, shown.upper) == tuple(
        f"stagewise/midpoint{end}" for end in ("", "_low", "_high")
    )
    for chart in charts.values():
        for pattern in chart.multiline.tag:
            assert any(re.search(pattern, tag) for tag in own), f"{pattern} shows nothing"


def read_layouts(events):
    """The custom-scalars layouts of an event file, in the order in which they were written."""
    return [
        layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        for event in events.Tensors("custom_scalars__config__")
    ]


def test_csv_and_two_loggers(make_data, make_loader, make_trainer, tiny_flow, tmp_path):
    monitor = small()
    csv, board = CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")
    make_trainer(monitor, logger=[csv, board]).fit(tiny_flow(), make_loader(make_data()[0]))

    lines = [line.split(",") for line in (tmp_path / csv.log_dir / "metrics.csv").open()]
    keys, *rows = [[cell.strip() for cell in line] for line in lines]
    table = [dict(zip(keys, row, strict=True)) for row in rows]
    for entry, row in zip(monitor.history, table, strict=True):
        assert int(row["step"]) == entry["step"]
        for key in BOUNDARIES:
            logged = float(row[f"stagewise/{key}"])
            assert logged == pytest.approx(entry[key], nan_ok=True, rel=1e-5)
    assert not table[0]["stagewise/share_of_step_time"]
    assert float(table[1]["stagewise/share_of_step_time"]) > 0
    events = EventAccumulator(board.log_dir).Reload()
    in_board = {tag for tag in events.Tags()["scalars"] if tag.startswith("stagewise")}
    assert in_board == {key for key in keys if key.startswith("stagewise")}
    assert (tmp_path / csv.log_dir / "stagewise" / "stages.jsonl").exists()


def test_no_logger_writes_files_and_says_so(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path, read_stages, lightning_log
):
    monitor = small()
    make_trainer(monitor).fit(tiny_flow(), make_loader(make_data()[0]))
    folder = tmp_path / "stagewise_logs"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["stages.jsonl", *(f"{name}.png" for name in FIGURES)]
    )
    assert f"files in {folder}; there is no logger" in lightning_log.text
    header, probes = read_stages(folder)
    assert header["event"] == "bank"
    assert (header["rows"], header["shape"], header["classes"]) == (64, [6], 0)
    assert header["predicted"] == pytest.approx(monitor.predicted)
    assert [(probe["event"], probe["step"]) for probe in probes] == [("probe", 0), ("probe", 2)]
    assert not {"probe_seconds", "share_of_step_time"} & {*probes[1]}, "files do not hang on time"
    assert len(monitor.seconds) == 2


def test_the_log_tells_what_is_watched(
    make_data, make_loader, make_trainer, tiny_flow, lightning_log
):
    make_trainer(small()).fit(tiny_flow(), make_loader(*make_data(classes=3)))
    said = lightning_log.text
    assert "64 rows of shape (6,), 3 classes" in said
    assert "LinearPath() (from module.loss, stagewise), t = 0 is noise" in said
    assert "posterior over the rows of its class (3 classes)" in said
    assert "took x_1 = float32 tensor (8, 6) and labels = int64 tensor (8,)" in said
    assert "at step 2; 2 probes" in said


def test_lines_are_strict_json(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path, read_stages
):
    monitor = small()
    make_trainer(monitor).fit(tiny_flow(), make_loader(twice(make_data()[0])))
    assert np.isnan(monitor.history[0]["collapsed"])
    _, probes = read_stages(tmp_path / "stagewise_logs")
    assert [probe["collapsed"] for probe in probes] == [None, None]
    # All samples the same: there is nothing to predict.
    make_trainer(small()).fit(tiny_flow(), make_loader(torch.ones(16, 6)))
    header, _ = read_stages(tmp_path / "stagewise_logs")
    assert header["predicted"] is None


def test_two_monitors_of_two_names(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path, read_stages
):
    x, labels = make_data(classes=3)
    whole = small(class_wise=False, name="whole")
    each = small(class_wise=True, every_n_steps=3, name="each")
    logger = TensorBoardLogger(tmp_path, "tb")
    trainer = make_trainer(whole, each, logger=logger)
    trainer.fit(tiny_flow(), make_loader(x, labels))
    for monitor, steps, wise in ((whole, [0, 2], False), (each, [0, 3], True)):
        header, probes = read_stages(f"{logger.log_dir}/{monitor.name}")
        assert header["class_wise"] is wise
        assert [probe["step"] for probe in probes] == steps
        assert monitor.state_key in trainer._checkpoint_connector.dump_checkpoint()["callbacks"]
    events = EventAccumulator(logger.log_dir, {"tensors": 0}).Reload()
    tags = events.Tags()["scalars"]
    assert {"whole/midpoint", "each/midpoint"} <= set(tags)
    with pytest.raises(RuntimeError, match="same.*state"):
        make_trainer(small(), small())


def test_two_monitors_are_both_in_the_layout(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path
):
    logger = TensorBoardLogger(tmp_path, "tb")
    trainer = make_trainer(small(name="one"), small(name="two"), logger=logger, max_steps=1)
    trainer.fit(tiny_flow(), make_loader(make_data()[0]))
    events = EventAccumulator(logger.log_dir, {"tensors": 0}).Reload()
    last = read_layouts(events)[-1]
    assert [category.title for category in last.category] == ["one", "two", "epoch"]


def test_fast_dev_run_writes_nothing(make_data, make_loader, make_trainer, tiny_flow, tmp_path):
    monitor = small(every_n_steps=1)
    make_trainer(monitor, fast_dev_run=2).fit(tiny_flow(), make_loader(make_data()[0]))
    assert len(monitor.history) == 2
    assert list(tmp_path.iterdir()) == []


def test_dirpath(make_data, make_loader, make_trainer, tiny_flow, tmp_path):
    folder = tmp_path / "some" / "where"
    monitor = small(dirpath=folder, name="watch")
    make_trainer(monitor).fit(tiny_flow(), make_loader(make_data()[0]))
    assert (folder / "stages.jsonl").exists()
    assert not (tmp_path / "watch").exists()
    before = (folder / "stages.jsonl").read_text()
    make_trainer(small(dirpath=folder, seed=9)).fit(tiny_flow(), make_loader(make_data()[0]))
    assert (folder / "stages.bak.jsonl").read_text() == before, "another run's file is kept"
    assert (folder / "stages.jsonl").read_text() != before


def test_a_monitor_used_in_a_second_run_starts_afresh(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path, read_stages
):
    monitor = small()
    for run in ("first", "second"):
        make_trainer(monitor, default_root_dir=tmp_path / run).fit(
            tiny_flow(), make_loader(make_data()[0])
        )
    _, first = read_stages(tmp_path / "first" / "stagewise_logs")
    _, second = read_stages(tmp_path / "second" / "stagewise_logs")
    assert [probe["step"] for probe in first] == [probe["step"] for probe in second] == [0, 2]
    assert len(monitor.seconds) == 2, "measured in this run"


def test_optimizers_that_step_together_do_not_skip_probes(
    make_data, make_loader, make_trainer, tiny_flow
):
    class Manual(tiny_flow):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            first, last = self.net[0], self.net[-1]
            return [torch.optim.SGD(part.parameters(), 1e-2) for part in (first, last, last)]

    monitor = small(every_n_steps=4)
    make_trainer(monitor, max_steps=24).fit(Manual(), make_loader(make_data()[0]))
    # Steps are 0, 3, ..., 21: the first at or after each multiple of 4.
    assert [entry["step"] for entry in monitor.history] == [0, 6, 9, 12, 18, 21]
