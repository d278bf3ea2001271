"""Where a monitor writes: any logger by what it can, whole files, failures that are warnings."""

import errno
import importlib.util
import json
import os
import signal
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stagewise.callbacks import PosteriorMonitor, writer
from stagewise.callbacks.host import Host
from stagewise.callbacks.writer import Writer, show_pictures
from stagewise.recipes.checkpoint_io import AtomicCheckpointIO
from stagewise.recipes.loggers import tolerant

MISSING = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name} here")
    for name in ("pytorch_lightning", "wandb", "mlflow", "comet_ml")
}


class Named(Logger):
    """A logger of no known library; what it is told is kept in `calls`."""

    name, version = "any", "0"

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", dict(metrics), step))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Experiment:
    """Notes each call of the methods it was made with."""

    def __init__(self, calls, *methods):
        for method in methods:
            setattr(
                self, method, lambda *args, method=method, **kw: calls.append((method, args, kw))
            )


class Board(Named):
    """As much of TensorBoard's as a monitor needs, of no class it knows."""

    def __init__(self):
        super().__init__()
        self.experiment = Experiment(self.calls, "add_image", "add_text", "add_custom_scalars")


class Weights(Named):
    """The interface of Weights & Biases' logger."""

    experiment = object()

    def log_image(self, key, images, step=None, **kwargs):
        assert isinstance(images, list)
        self.calls.append(("log_image", (key, images[0]), step))


class Flow(Named):
    """The interface of MLflow's."""

    run_id = "run 7"

    def __init__(self):
        super().__init__()
        self.experiment = types.SimpleNamespace(log_image=self._log_image)

    def _log_image(self, run_id, image, artifact_file):
        self.calls.append(("log_image", (run_id, image, artifact_file), None))


class Comet(Named):
    """The interface of Comet's."""

    def __init__(self):
        super().__init__()
        self.experiment = types.SimpleNamespace(log_image=self._log_image)

    def _log_image(self, image_data, name=None, overwrite=False, step=None):
        self.calls.append(("log_image", (name, image_data), step))


class Broken(Named):
    """Its pictures, texts and pages fail, and it cannot be a key of a dictionary."""

    __hash__ = None

    def __eq__(self, other):
        return self is other

    def __init__(self):
        super().__init__()
        names = ("add_image", "add_text", "add_custom_scalars")
        self.experiment = types.SimpleNamespace(**dict.fromkeys(names, self._fail))

    def _fail(self, *_, **__):
        raise ConnectionError("no route")


@pytest.fixture
def write(make_trainer, tmp_path):
    """`write(*loggers)`: a writer into `tmp_path / "files"` and its trainer."""

    def make(*loggers, name="watch"):
        trainer = make_trainer(logger=list(loggers))
        host = Host()
        host.loggers, host.folder = trainer.loggers, Path
        found = Writer(host, name, tmp_path / "files")
        found.start([{"event": "header"}], resumed=False)
        return found, trainer

    return make


def figure(number=1.0):
    drawn = Figure(figsize=(2, 1.5))
    drawn.add_subplot().plot([0, number])
    return drawn


def pixels(value):
    return np.asarray(Image.open(value) if isinstance(value, os.PathLike | str) else value)


# -- by what a logger can -------------------------------------------------------------------------


def test_a_logger_of_no_known_class_that_can_show_pictures_gets_them(write, tmp_path):
    board = Board()
    made, trainer = write(board)
    trainer.callbacks.append(types.SimpleNamespace(name="watch", layout=lambda: {"a": ["b"]}))
    made.pictures({"curve": figure()}, 5)
    made.text("watch/moved", "it moved", 6)
    made.dashboard(trainer.callbacks)
    (_, (tag, image, step), options), text, page = board.calls
    assert (tag, step, options) == ("watch/curve", 5, {"dataformats": "HWC"})
    np.testing.assert_array_equal(image, pixels(tmp_path / "files/curve.png"))
    assert text == ("add_text", ("watch/moved", "it moved", 6), {})
    epoch = {"epoch": ["Multiline", ["^epoch$"]]}
    assert page == ("add_custom_scalars", ({"watch": {"a": ["b"]}, "epoch": epoch},), {})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Weights, lambda image: ("log_image", ("watch/curve", image), 5)),
        (
            Flow,
            lambda image: ("log_image", ("run 7", image, "watch/curve/step_00000005.png"), None),
        ),
        (Comet, lambda image: ("log_image", ("watch/curve", image), 5)),
    ],
)
def test_pictures_go_where_the_logger_takes_them_and_text_does_not(write, tmp_path, kind, expected):
    logger = kind()
    made, trainer = write(logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.pictures({"curve": figure()}, 5)
        made.text("watch/moved", "it moved", 6)
        made.dashboard(trainer.callbacks)
    (call,) = logger.calls
    image = next(value for value in call[1] if isinstance(value, Image.Image))
    assert call == expected(image)
    np.testing.assert_array_equal(pixels(image), pixels(tmp_path / "files/curve.png"))


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("kind", [Named, Weights, Flow, Comet, Board])
def test_a_run_with_any_logger_has_its_scalars_with_ascending_steps(
    make_data, make_loader, make_trainer, tiny_flow, kind
):
    logger = kind()
    monitor = PosteriorMonitor(every_n_steps=2, strata=4, queries=4)
    make_trainer(monitor, logger=logger).fit(tiny_flow(), make_loader(make_data()[0]))
    own = [
        call for call in logger.calls if call[0] == "metrics" and "stagewise/midpoint" in call[1]
    ]
    assert [step for _, _, step in own] == [probe["step"] for probe in monitor.history]
    assert len(own) > 1
    pictures = [call for call in logger.calls if call[0] in ("log_image", "add_image")]
    assert (len(pictures) >= 6) == (kind is not Named)
    steps = [call[2] for call in logger.calls if isinstance(call[2], int)]
    assert steps == sorted(steps)


def test_a_logger_that_fails_warns_once_and_the_others_go_on(write, tmp_path):
    broken, board = Broken(), Board()
    made, trainer = write(broken, board)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.pictures({"a": figure(), "b": figure()}, 1)
        made.text("watch/moved", "it moved", 2)
        made.dashboard(trainer.callbacks)
        show_pictures({"c": figure()}, "evaluation", None, [broken, board], 3)
    assert len(told) == 1
    assert "Broken did not take the picture watch/a: ConnectionError" in str(told[0].message)
    assert "Trainer(logger=[logger, TensorBoardLogger(" in str(told[0].message)
    assert [call[1][0] for call in board.calls if call[0] == "add_image"] == [
        "watch/a",
        "watch/b",
        "evaluation/c",
    ]
    assert (tmp_path / "files/b.png").exists()
    # Another one that fails is named too.
    with pytest.warns(UserWarning, match="Broken"):
        show_pictures({"c": figure()}, "evaluation", None, [Broken()], 3)


@pytest.mark.usefixtures("quick_figures")
def test_a_run_whose_logger_fails_at_pictures_ends_as_it_should(
    make_data, make_loader, make_trainer, tiny_flow
):
    logger = Broken()
    monitor = PosteriorMonitor(every_n_steps=2, strata=4, queries=4)
    trainer = make_trainer(monitor, logger=logger)
    with pytest.warns(UserWarning, match="Training goes on"):
        trainer.fit(tiny_flow(), make_loader(make_data()[0]))
    assert trainer.global_step == 4
    assert [probe["step"] for probe in monitor.history[:2]] == [0, 2]


# -- the libraries themselves ---------------------------------------------------------------------


@pytest.mark.usefixtures("quick_figures")
@MISSING["pytorch_lightning"]
def test_tensorboard_of_pytorch_lightning(
    make_data, make_loader, make_trainer, tiny_flow, tmp_path
):
    from pytorch_lightning.loggers import TensorBoardLogger as Other

    assert not issubclass(Other, TensorBoardLogger)
    logger = Other(tmp_path, name="tb", version="run")
    monitor = PosteriorMonitor(every_n_steps=2, strata=4, queries=4)
    make_trainer(monitor, logger=logger).fit(tiny_flow(), make_loader(make_data()[0]))
    events = EventAccumulator(logger.log_dir, {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert "stagewise/concentration" in tags["images"]
    steps = [image.step for image in events.Images("stagewise/concentration")]
    assert steps == [probe["step"] for probe in monitor.history]
    assert "stagewise/midpoint" in tags["scalars"]
    assert events.Tensors("custom_scalars__config__")


@MISSING["wandb"]
def test_weights_and_biases(write, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="stagewise")
    made, _ = write(logger)
    logged = []
    log = logger.experiment.log
    monkeypatch.setattr(logger.experiment, "log", lambda row: logged.append(row) or log(row))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in (0, 4):
            made.scalars({"watch/midpoint": 0.25}, step)
            made.pictures({"curve": figure()}, step)
            made.text("watch/moved", "it moved", step)
    rows = list(tmp_path.rglob("media/images/watch/curve*.png"))
    assert len(rows) == 2
    np.testing.assert_array_equal(pixels(rows[0])[..., :3], pixels(tmp_path / "files/curve.png"))
    assert logger.experiment.summary["watch/midpoint"] == 0.25
    assert [row["trainer/global_step"] for row in logged] == [0, 0, 4, 4]
    logger.experiment.finish()


@MISSING["mlflow"]
def test_mlflow(write, tmp_path, monkeypatch):
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database is not in mlflow-skinny
    logger = MLFlowLogger("stagewise", tracking_uri=(tmp_path / "ml").as_uri())
    made, _ = write(logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in (0, 4):
            made.scalars({"watch/midpoint": 0.25, "watch/collapsed": float("nan")}, step)
            made.pictures({"curve": figure()}, step)
            made.text("watch/moved", "it moved", step)
    found = sorted(tmp_path.glob("ml/**/watch/curve/*.png"))
    assert [file.name for file in found] == ["step_00000000.png", "step_00000004.png"]
    np.testing.assert_array_equal(pixels(found[1]), pixels(tmp_path / "files/curve.png"))
    points = logger.experiment.get_metric_history(logger.run_id, "watch/midpoint")
    assert [(point.step, point.value) for point in points] == [(0, 0.25), (4, 0.25)]


@MISSING["comet_ml"]
def test_comet(write, tmp_path, monkeypatch):
    import comet_ml

    monkeypatch.setenv("COMET_LOGGING_FILE_LEVEL", "ERROR")
    logger = Named()
    logger.experiment = comet_ml.OfflineExperiment(
        project_name="stagewise", offline_directory=str(tmp_path), display_summary_level=0
    )
    made, _ = write(logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made.pictures({"curve": figure()}, 4)
    logger.experiment.end()
    assert list(tmp_path.glob("*.zip"))


# -- files ----------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_warning_and_the_picture_of_before_stays(write, tmp_path, monkeypatch):
    made, _ = write()
    made.pictures({"curve": figure()}, 1)
    before = (tmp_path / "files/curve.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.warns(UserWarning, match=r"curve\.png: No space left.*dirpath=") as said:
            made.pictures({"curve": figure(2.0), "other": figure()}, 2)
        assert len(said) == 1, "once for a folder"
    assert (tmp_path / "files/curve.png").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "files").iterdir()) == [
        "curve.png",
        "stages.jsonl",
    ]
    made.pictures({"curve": figure(2.0)}, 3)
    assert (tmp_path / "files/curve.png").read_bytes() != before
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        made.pictures({"curve": figure(2.0)}, 4)


def test_a_logger_that_fails_at_scalars_is_a_warning(write, monkeypatch):
    logger = Named()
    monkeypatch.setattr(logger, "log_metrics", full)
    made, _ = write(logger)
    with pytest.warns(UserWarning, match=r"Named did not take scalars.*Training goes on"):
        made.scalars({"watch/a": 1.0}, 0)
    made.scalars({"watch/a": 1.0}, 1)


def test_the_logger_of_a_run_may_fill_its_disk(
    make_trainer, make_data, make_loader, tiny_flow, tmp_path
):
    """TensorBoard's writer has failed in its thread: Lightning makes a ValueError of that."""
    logger = tolerant("tensorboard", TensorBoardLogger(tmp_path, "tb", version=""))
    model, step = tiny_flow(), 0

    def training_step(batch, batch_idx, own=model.training_step):
        nonlocal step
        step += 1
        if step == 3:
            logger.experiment._get_file_writer().event_writer._async_writer._worker.exception = (
                OSError(errno.ENOSPC, "No space left on device")
            )
        model.log("loss", 1.0)
        return own(batch, batch_idx)

    model.training_step = training_step
    trainer = make_trainer(logger=logger, max_steps=6, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="TensorBoardLogger cannot write") as said:
        trainer.fit(model, make_loader(make_data()[0]))
    assert trainer.global_step == 6
    (message,) = [str(one.message) for one in said if "cannot write" in str(one.message)]
    assert f"{tmp_path / 'tb'}: No space left on device" in message
    assert "resume=true, or log elsewhere: logger.tensorboard.save_dir=FOLDER." in message


def test_a_logger_that_is_told_nonsense_still_says_so(tmp_path):
    logger = tolerant("tensorboard", TensorBoardLogger(tmp_path))
    with pytest.raises(ValueError, match="not supported"):
        logger.log_metrics({"a": object()}, 0)


def test_files_of_a_run_are_as_the_umask_says(write, tmp_path):
    before = os.umask(0o027)
    try:
        made, _ = write()
        made.pictures({"curve": figure()}, 1)
        made.event({"event": "probe", "step": 1})
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "files/last.ckpt")
    finally:
        os.umask(before)
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "files").iterdir()}
    assert found == dict.fromkeys(("curve.png", "stages.jsonl", "last.ckpt"), 0o640)


def test_events_are_kept_beside_only_if_there_are_some(write, tmp_path):
    made, _ = write()
    assert [file.name for file in (tmp_path / "files").iterdir()] == ["stages.jsonl"]
    for events, resumed, kept in (([], True, False), ([{"event": "a"}], False, False)):
        made.start(events, resumed=resumed)
        assert (tmp_path / "files/stages.bak.jsonl").exists() == kept
    made.start([], resumed=False)
    assert (tmp_path / "files/stages.bak.jsonl").read_text() == '{"event": "a"}\n'


def test_a_folder_that_has_gone_is_a_warning(write, tmp_path):
    made, _ = write()
    (tmp_path / "files/stages.jsonl").unlink()
    (tmp_path / "files").rmdir()
    with pytest.warns(UserWarning, match=r"curve\.png.*Training goes on"):
        made.pictures({"curve": figure()}, 1)
    with pytest.warns(UserWarning, match=r"stages\.jsonl.*Training goes on"):
        made.event({"event": "probe", "step": 1})


def test_an_event_that_does_not_fit_leaves_no_half_line(write, tmp_path, monkeypatch):
    made, _ = write()

    def half(file, events):
        with file.open("a") as lines:
            lines.write('{"event": "pro')
        full()

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_append", half)
        with pytest.raises(OSError, match=r"stages\.jsonl: No space left.*dirpath="):
            made.start([{"event": "header"}, {"event": "probe"}], resumed=True)
        with pytest.warns(UserWarning, match=r"stages\.jsonl: No space left.*dirpath="):
            made.event({"event": "probe", "step": 1})
    made.event({"event": "probe", "step": 2})
    assert [file.name for file in (tmp_path / "files").iterdir()] == ["stages.jsonl"]
    lines = (tmp_path / "files/stages.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 2]


def test_killed_while_writing_a_picture_the_one_of_before_is_whole(write, tmp_path, monkeypatch):
    made, _ = write()
    made.pictures({"cur[v]e": figure()}, 1)
    file = tmp_path / "files/cur[v]e.png"
    before = file.read_bytes()

    def half(image, target, **_):
        with open(target, "wb") as stream:
            stream.write(b"\x89PNG")
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(Image.Image, "save", half)
        made.pictures({"cur[v]e": figure(2.0)}, 2)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert file.read_bytes() == before
    assert len(list(file.parent.glob(".*.partial"))) == 1
    made.pictures({"cur[v]e": figure(2.0)}, 3)
    assert not list(file.parent.glob(".*")), "what was left is removed"
