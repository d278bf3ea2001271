"""Where training begins: what is gone on from, what is refused, and what a second one is told."""

import errno
import operator
import os
import signal
import types

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import TensorDataset

from stagewise.latents import open_latents
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes import order
from stagewise.recipes.arguments import exit_with_message
from stagewise.recipes.checkpoint_io import AtomicCheckpointIO, RunCheckpoint
from stagewise.recipes.latents import LatentsData
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.order import ResumableData
from stagewise.recipes.resume import checkpoint_of, explain_resume

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

# -- a second training, and other data ------------------------------------------------------------


class Numbered(ResumableData):
    """The numbers from 0, each a sample."""

    def __init__(self, count=20, batch_size=4, workers=0, first=0.0):
        super().__init__(batch_size, workers, seed=0)
        self.count, self.first = count, first

    def train_dataloader(self):
        numbers = torch.arange(self.count).float()[:, None]
        numbers[0] = self.first
        return self.train_loader(TensorDataset(numbers))

    def val_dataloader(self):
        return self.val_loader(TensorDataset(torch.zeros(4, 1)))


class Seen(FlowMatchingModule):
    """Takes note of its batches, and of what their draws begin with."""

    def __init__(self):
        super().__init__(nn.Linear(1, 1), FlowMatchingLoss())
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append((torch.initial_seed(), *batch[0].flatten().tolist()))
        return self.net(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def train(make_trainer, tmp_path_factory):
    """`train(steps)`: batches seen, the folder with a checkpoint of each step, and the trainer."""

    def run(steps, data=None, file=None, workers=0, **options):
        module, folder = Seen(), tmp_path_factory.mktemp("run")
        often = {} if "val_check_interval" in options else {"every_n_train_steps": 1}
        saved = ModelCheckpoint(folder, "{step}", save_top_k=-1, **often)
        trainer = make_trainer(saved, max_steps=steps, enable_checkpointing=True, **options)
        trainer.fit(
            module, datamodule=data or Numbered(workers=workers), ckpt_path=file, weights_only=True
        )
        return module.batches, folder, trainer

    return run


VALIDATED = {"check_val_every_n_epoch": None, "num_sanity_val_steps": 0}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, (1, 4, 5, 6, 10)),
        ({"limit_train_batches": 3}, (2, 3, 9)),
        ({"val_check_interval": 5, **VALIDATED}, (5, 10)),
        ({"val_check_interval": 3, **VALIDATED}, (3, 6, 9)),
        ({"workers": 1}, (5, 7)),
        ({"workers": 1, "val_check_interval": 5, **VALIDATED}, (5,)),
    ],
)
def test_it_goes_on_behind_each_step(train, options, steps):
    """There are 5 batches in an epoch; it may be left a second time, at its end too."""
    every = options.get("limit_train_batches", 5)
    whole, folder, _ = train(12, **options)
    assert whole[0] != whole[every]
    for step in steps:
        rest, again, _ = train(12, file=folder / f"step={step}.ckpt", **options)
        assert rest == whole[step:]
        later = min(11, every * (step // every + 1))
        if (file := again / f"step={later}.ckpt").exists():
            assert train(12, file=file, **options)[0] == whole[later:]


@pytest.mark.parametrize("end", [5, 7])
def test_a_training_that_had_ended_and_goes_on_can_be_resumed(train, end):
    _, folder, trainer = train(end)
    trainer.save_checkpoint(folder / "ended.ckpt")
    more, folder, _ = train(end + 11, file=folder / "ended.ckpt")
    if end == 7:
        assert more == train(18)[0][7:]
    for step in (1, 3, 5, 6, 10):
        assert train(end + 11, file=folder / f"step={end + step}.ckpt")[0] == more[step:]


def test_a_second_training_with_the_same_data_begins_at_its_beginning(train):
    data = Numbered()
    whole, folder, _ = train(12)
    assert train(12, data, folder / "step=7.ckpt")[0] == whole[7:]
    assert train(6, data)[0] == whole[:6]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Numbered(24), "made with 20 training samples, and there are 24"),
        (Numbered(20, 5), "batches of 4 samples over all ranks, and this run has 5. Change"),
        (Numbered(20, first=0.5), r"with other training samples: their fingerprint is .*weights="),
    ],
)
def test_other_data_or_batches_are_refused(train, data, message):
    _, folder, _ = train(2)
    with pytest.raises(ValueError, match=message):
        train(4, data, folder / "step=2.ckpt")


def test_a_checkpoint_from_before_fingerprints_is_gone_on_from(train):
    whole, folder, _ = train(6)
    file = folder / "step=3.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["Numbered"]["fingerprint"]
    torch.save(checkpoint, file)
    assert train(6, file=file)[0] == whole[3:]


def test_latents_of_the_same_count_are_told_from_one_another(tmp_path):
    """By their numbers, or their labels; not by draws, their place, or the number of ranks."""
    x, labels = torch.randn(30, 2, 4, 4), torch.arange(30) % 3

    def known(name, x, labels, **options):
        folder = tmp_path / name
        folder.mkdir()
        np.savez(folder / "latents.npz", latents=x.numpy(), labels=labels.numpy())
        options = {"held_out": 4, "batch_size": 4} | options
        data = LatentsData(open_latents(folder / "latents.npz", expected_std=1.0), 3, **options)
        data.setup()
        data.train_dataloader()
        return data._fingerprint

    one = known("one", x, labels)
    assert known("moved", x, labels) == one
    assert known("batches", x, labels, batch_size=8) == one
    assert known("other", x + 1e-3, labels) != one
    assert known("relabelled", x, (labels + 1) % 3) != one
    assert known("reordered", x.flip(0), labels.flip(0)) != one


def test_what_is_drawn_of_a_sample_is_not_in_its_fingerprint():
    class Drawn(TensorDataset):
        def __getitem__(self, item):
            x, label = super().__getitem__(item)
            return x + torch.randn(()), label, int(torch.randint(100, ()))

        def fixed(self):
            return [(*super(Drawn, self).__getitem__(i), 7 * i) for i in range(len(self))]

    data = Drawn(torch.arange(500).float()[:, None], torch.arange(500) % 3)
    assert order._fingerprint(data) == order._fingerprint(data)
    plain = TensorDataset(*data.tensors)
    assert order._fingerprint(plain) == order._fingerprint(data)


# -- which checkpoint -----------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """`started(*overrides)`: what Hydra tells a run that was started so in `tmp_path`."""

    def start(*overrides):
        with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
            config = compose("train", ["name=x", *overrides], return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        OmegaConf.update(config, "hydra.runtime.output_dir", str(tmp_path), force_add=True)
        OmegaConf.update(config, "hydra.job.num", 0)
        HydraConfig.instance().set_config(config)
        return config

    yield start
    HydraConfig.instance().cfg = None


@pytest.mark.slow
def test_resuming_in_a_folder_that_nobody_chose_is_refused(started, tmp_path):
    with pytest.raises(ValueError, match="Expected run_dir=FOLDER, the run to continue"):
        checkpoint_of(started("resume=true"), tmp_path)
    # A job that is put into the queue again says so from its first start on.
    assert checkpoint_of(started("resume=true"), tmp_path / "chosen") is None
    assert checkpoint_of(started("resume=true", f"hydra.run.dir={tmp_path}"), tmp_path) is None
    assert checkpoint_of(started(), tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints/epoch=0-step=3.ckpt"
    torch.save({"state_dict": {}, "global_step": 3}, last)
    assert checkpoint_of(started("resume=true"), tmp_path) == last
    with pytest.raises(FileExistsError, match="holds a run"):
        checkpoint_of(started(), tmp_path)


def test_a_damaged_configuration_is_named(started, tmp_path):
    for content in (b"a: [", b"\xff\xfe", b"- 1"):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.yaml cannot be read as a configuration"):
            checkpoint_of(started("resume=true", f"hydra.run.dir={tmp_path}"), tmp_path)


def test_a_damaged_checkpoint_is_said_and_left_out(started, tmp_path, lightning_log):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step in (("epoch=0-step=3.ckpt", 3), ("last.ckpt", 6)):
        torch.save(
            {"state_dict": {"w": torch.full((99,), 7.0)}, "global_step": step}, folder / name
        )
    config = started("resume=true", f"run_dir={tmp_path}")
    for name, before in (("last.ckpt", "epoch=0-step=3.ckpt"), ("epoch=0-step=3.ckpt", None)):
        content = bytearray((folder / name).read_bytes())
        content[content.index(torch.full((9,), 7.0).numpy()) + 100] ^= 1
        (folder / name).write_bytes(content)
        if before:
            with pytest.warns(UserWarning, match=r"skips .*last\.ckpt is damaged.*does not match"):
                assert checkpoint_of(config, tmp_path) == folder / before
            assert f"resume=true: from {folder / before}" in lightning_log.text
    with pytest.raises(
        ValueError, match=r"no whole checkpoint .*last\.ckpt .*step=3\.ckpt .*run_dir"
    ):
        checkpoint_of(config, tmp_path)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        checkpoint_of(started(f"ckpt_path={folder / 'last.ckpt'}"), tmp_path / "other")


# -- checkpoints ----------------------------------------------------------------------------------


def test_killed_while_writing_the_last_checkpoint_stays_and_no_rest(tmp_path, monkeypatch):
    file, other = tmp_path / "last[1].ckpt", tmp_path / ".other.ckpt.0.partial"
    other.touch()
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, file)

    def half(value, partial):
        partial.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(torch, "save", half)
        writer.save_checkpoint({"step": 2}, file)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert torch.load(file, weights_only=True) == {"step": 1}
    (left,) = tmp_path.glob(".last*")
    assert left.read_bytes() == b"half"
    writer.save_checkpoint({"step": 3}, file)
    assert torch.load(file, weights_only=True) == {"step": 3}
    assert sorted(tmp_path.iterdir()) == sorted([file, other])


class Averaging(EMAWeightAveraging):
    """Averages from the first step on."""

    def __init__(self):
        super().__init__(decay=0.5)


@pytest.mark.parametrize("every", [2, 3, 100])
def test_the_last_step_is_kept_with_its_own_weights(make_trainer, tmp_path, every):
    module, trained = Seen(), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trained.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    saved = RunCheckpoint(tmp_path, save_last=True, every_n_train_steps=every)
    options = {"max_steps": 7, "enable_checkpointing": True}
    make_trainer(saved, Averaging(), Look(), **options).fit(module, datamodule=Numbered())
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 7
    for name, value in trained.items():
        assert torch.equal(last["current_model_state"][name], value)
        assert torch.equal(last["state_dict"][name], module.state_dict()[name])
        assert not torch.equal(last["state_dict"][name], value)
    more, whole = Seen(), Seen()
    saved = RunCheckpoint(tmp_path / "b", save_last=True, every_n_train_steps=every)
    options["max_steps"] = 12
    make_trainer(saved, Averaging(), **options).fit(
        more, datamodule=Numbered(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    make_trainer(max_steps=12).fit(whole, datamodule=Numbered())
    assert more.batches == whole.batches[7:]
    assert torch.load(tmp_path / "b/last.ckpt", weights_only=True)["global_step"] == 12
    assert not list(tmp_path.rglob("*-v1.ckpt"))


def test_a_training_that_is_stopped_keeps_its_last_step(make_trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    saved = RunCheckpoint(tmp_path, save_last=True, every_n_train_steps=3)
    trainer = make_trainer(saved, Stop(), max_steps=7, enable_checkpointing=True)
    trainer.fit(Seen(), datamodule=Numbered())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_killed_between_the_two_files_of_a_step_it_goes_on_from_the_first(
    train_tiny, tmp_path, monkeypatch
):
    often = ("+callbacks.checkpoint.every_n_train_steps=2", "trainer.max_steps=6")
    train_tiny(tmp_path / "whole", *often)
    save, saved = AtomicCheckpointIO.save_checkpoint, []

    def killed_once(self, checkpoint, path, **options):
        step = checkpoint["global_step"]
        if str(path).endswith("last.ckpt") and saved == [2, 2, 4]:
            raise KeyboardInterrupt
        saved.append(step)
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", killed_once)
    with pytest.raises(KeyboardInterrupt, match="at step 4"):
        train_tiny(tmp_path / "cut", *often)
    train_tiny(tmp_path / "cut", *often, "resume=true")
    assert saved == [2, 2, 4, 6, 6], "step 4 is not made again"
    whole, cut = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "cut")
    )
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize(
    ("owner", "name", "used_by"),
    [
        (ModelCheckpoint, "_should_skip_saving_checkpoint", "RunCheckpoint"),
        (ModelCheckpoint, "_save_last_checkpoint", "RunCheckpoint"),
        (ModelCheckpoint, "_monitor_candidates", "RunCheckpoint"),
        (EMAWeightAveraging(), "_average_model", "RunAveraging"),
        (
            pl.Trainer(logger=False, barebones=True),
            "fit_loop.epoch_loop.batch_progress",
            "order.py",
        ),
    ],
)
def test_what_is_private_in_lightning_is_still_there(owner, name, used_by):
    try:
        operator.attrgetter(name)(owner)
    except AttributeError:
        pytest.fail(f"lightning {pl.__version__} has no {name} any more: mend {used_by}.")


# -- what ends a training early -------------------------------------------------------------------


@pytest.fixture
def ends(tmp_path):
    """`ends(error, step)`: what a training that began at step 3 raises, with a checkpoint there."""
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "checkpoints/last.ckpt")

    def end(error, step=5):
        with explain_resume(tmp_path, types.SimpleNamespace(global_step=step), 3):
            raise error

    return end


GO_ON = "at step 5. To continue from last.ckpt: run_dir={} resume=true"


def test_a_dead_process_or_a_full_disk_explain_resume(ends, tmp_path, capsys):
    go_on = GO_ON.format(tmp_path)
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught:
        ends(RuntimeError("Connection closed by peer"))
    noted = capsys.readouterr().err.splitlines() + getattr(caught.value, "__notes__", [])
    assert noted == [f"Training ended {go_on}"]
    with pytest.raises(SystemExit) as caught, exit_with_message("train"):
        ends(OSError(errno.ENOSPC, "No space left on device"))
    lines = f"{capsys.readouterr().err}{caught.value.code}"
    assert f"Make room in {tmp_path}" in lines
    assert lines.count(go_on) == 1
    assert "stagewise train: [Errno 28] No space left on device" in lines


def test_an_interrupt_and_a_sigterm_say_so_too(ends, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt, match="at step 5. To continue from last"):
        ends(SystemExit(1))
    with pytest.raises(SystemExit) as caught:
        ends(SIGTERMException())
    assert caught.value.code == 143
    said = capsys.readouterr().err
    assert said == f"stagewise train: ended by SIGTERM {GO_ON.format(tmp_path)}\n"
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt, match="at step 5, before the first checkpoint"):
        ends(SystemExit(1))


def test_what_would_be_refused_again_is_not_gone_on_with(ends, capsys):
    with pytest.raises(ValueError, match="^wrong$") as caught:
        ends(ValueError("wrong"), step=3)
    assert not hasattr(caught.value, "__notes__")
    assert not capsys.readouterr().err


# -- validation -----------------------------------------------------------------------------------


class Ranks:
    """As much of a trainer as a module asks for."""

    def __init__(self, rank, ranks):
        self.global_rank, self.world_size = rank, ranks


class Slope(nn.Module):
    """A network of one number."""

    def forward(self, xt, t, labels):
        return (1 + labels)[:, None] * xt + t[:, None]


def test_ranks_validate_as_one():
    x1, labels = torch.randn(12, 5), torch.arange(12) % 3

    def loss(rank, ranks, batch_idx):
        module = FlowMatchingModule(Slope(), FlowMatchingLoss()).eval()
        trainer = Ranks(rank, ranks)
        module.trainer = trainer
        found = []
        module.log = lambda name, value, **_: found.append(value)
        module.validation_step((x1[rank::ranks], labels[rank::ranks]), batch_idx)
        return found[0]

    one = loss(0, 1, 4)
    torch.testing.assert_close(torch.stack([loss(rank, 3, 4) for rank in range(3)]).mean(), one)
    assert not torch.isclose(loss(0, 1, 5), one, rtol=1e-3)
