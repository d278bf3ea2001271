"""What the tests share: small runs of a small model, groups of processes, quicker libraries.

The helpers are fixtures because a file of tests is not importable from another one under
`--import-mode=importlib`.
"""

import gc
import json
import logging
import math
import os
import re
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities import registry
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise.batches import find_sample
from stagewise.callbacks import figures, velocity_figures, writer
from stagewise.engines import fused
from stagewise.losses import FlowMatchingLoss
from stagewise.stages import StageCurve

DIM = 6


def pytest_collection_finish():
    """What is imported and collected stays: the garbage collector need not look through it.

    It would still take a twentieth of the time, and what a test leaves is small.
    """
    gc.freeze()
    gc.set_threshold(7000)
    gc.enable()
    # pytest gives a handler to the root and to each logger that does not propagate, six times for
    # each test: all but three of 59 are torch's.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True


@contextmanager
def without_a_driver():
    """Skips what uses fake CUDA tensors where torch 2.6 asks for a driver for them."""
    try:
        yield
    except Exception as error:
        told = " ".join([str(error), *fused._said])  # or why kernels were given up
        wanted = ("Found no NVIDIA driver", "CUDA driver version is insufficient")
        if not torch.__version__.startswith("2.6.") or not any(w in told for w in wanted):
            raise
        pytest.skip("torch 2.6 makes no fake CUDA tensors without a driver")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test."""
    with without_a_driver():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture."""
    with without_a_driver():
        return (yield)


def pytest_configure(config):
    """Silences what Lightning says about its own use of torch, and its search for plugins."""
    config.addinivalue_line("filterwarnings", "ignore:.isinstance.treespec, LeafSpec")
    # The process that hands tests out would import Lightning, to show one of these.
    kind = "lightning.fabric.utilities.warnings.PossibleUserWarning"
    config.addinivalue_line("filterwarnings", f"ignore::{kind}")
    gc.disable()  # until all is collected
    # Each Trainer reads the metadata of all that is installed: as long as four steps of a fit.
    registry.entry_points = cache(registry.entry_points)
    # Lightning has cards counted by a library that is searched for at each look.
    if not torch.cuda.is_available():
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
    # A seed for a device that is not there is kept with the call stack: longer than a step.
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        if not kind.is_available():
            kind.manual_seed_all = lambda seed: None


class TinyFlow(pl.LightningModule):
    """Flow matching with a perceptron and dropout, all of it drawn from the global generator.

    With `seeded=True` the draws depend on the batch's place in training alone, so that a run that
    stops and resumes can be compared with one that does not.
    """

    def __init__(self, *, seeded: bool = False, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(DIM + 1, 16),
            nn.SiLU(),
            nn.Dropout(0.0 if seeded else 0.1),
            nn.Linear(16, DIM),
        )
        self.loss = FlowMatchingLoss()
        self.seeded, self.fail_at = seeded, fail_at
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        step = self.trainer.global_step
        if step == self.fail_at:
            raise PowerCut
        generator = torch.Generator().manual_seed(1000 * step + batch_idx) if self.seeded else None
        x1 = find_sample(batch)[0]
        return self.loss(
            lambda xt, t: self.net(torch.cat([xt, t[:, None].to(xt)], 1)), x1, generator=generator
        )

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class PowerCut(RuntimeError):
    """What stops a run in the middle."""


@pytest.fixture
def tiny_flow():
    """The class `TinyFlow`."""
    return TinyFlow


@pytest.fixture
def power_cut():
    """The exception that `TinyFlow(fail_at=step)` raises."""
    return PowerCut


@pytest.fixture
def weights():
    """All parameters of a module as one vector."""
    return lambda module: torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


@pytest.fixture
def make_data():
    """`make_data(n, classes=0)`: samples (n, DIM) and, if there are classes, their labels."""

    def make(n=64, classes=0):
        draws = torch.Generator().manual_seed(11)
        x = torch.randn(n, DIM, generator=draws)
        labels = torch.randint(classes, (n,), generator=draws) if classes else None
        return x, labels

    return make


@pytest.fixture
def make_loader():
    """`make_loader(x, labels=None, ...)`: a loader over tensors."""

    def make(x, labels=None, *, batch_size=8, **options):
        tensors = (x,) if labels is None else (x, labels)
        return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **options)

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(*callbacks, ...)`: a quiet trainer on the CPU that writes to `tmp_path`."""

    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "max_steps": 4,
        }
        return pl.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make


@pytest.fixture
def assembled(tmp_path):
    """`assembled(kernel, kinds, fixed, capability, warps=4)`: its PTX, and bytes that are spilled.

    By the report of the assembler, without a card; `kinds` are the types of the arguments, and
    `fixed` those that are constants.
    """
    triton = pytest.importorskip("triton")
    from triton.backends import compiler

    def compile_(kernel, kinds, fixed, capability, warps=4):
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        assembler = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        if not assembler.exists():
            pytest.skip(f"Triton {triton.__version__} compiles nothing for sm_{capability}")
        kinds = kinds | dict.fromkeys(fixed, "constexpr")
        pointers = [at for at, name in enumerate(kernel.arg_names) if kinds[name][0] == "*"]
        aligned = {(at,): [["tt.divisibility", 16]] for at in pointers}
        if hasattr(compiler, "AttrsDescriptor"):  # up to 3.2
            aligned = compiler.AttrsDescriptor.from_hints(dict.fromkeys(pointers, 16))
        source = triton.compiler.ASTSource(kernel, kinds, fixed, aligned)
        target = compiler.GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
        (tmp_path / "kernel.ptx").write_text(ptx)
        architecture = re.search(r"\.target (\w+)", ptx)[1]
        command = [assembler, "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.bin"]
        report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return ptx, re.findall(r"(\d+) bytes spill", report.stderr)

    return compile_


class Pair:
    """Two ranks of one group, and the process that forked them."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, Path(__file__).with_name("rank_pair.py"), folder]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)

    def run(self, script, timeout=600):
        job = self.folder / str(self.number)
        self.number += 1
        job.mkdir()
        (job / "script.part").write_text(script)
        (job / "script.part").rename(job / "script.py")
        said, end = [job / f".said{rank}" for rank in (0, 1)], time.monotonic() + timeout
        while not all(file.exists() for file in said):
            failed = [file.read_text() for file in said if file.exists()]
            assert not any(failed), failed[0][-4000:]
            assert self.process.poll() is None, (self.folder / "log").read_text()[-4000:]
            assert time.monotonic() < end, f"no answer in {timeout} s"
            time.sleep(0.02)
        for file in said:
            assert not (text := file.read_text()), text[-4000:]
            file.unlink()
        return job

    def close(self):
        (self.folder / "stop").write_text("")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def _begin(variables, run, arguments):
    os.environ.update(variables)
    torch.set_num_threads(1)  # a fork has none of the threads of OpenMP
    run(*arguments)


@pytest.fixture(scope="session")
def forked():
    """`forked(run, *arguments, RANK="0")`: a process that does this, with what is imported here.

    Its exit code is that of any process, and `capfd` reads what it says.
    """

    def start(run, *arguments, **variables):
        process = get_context("fork").Process(target=_begin, args=(variables, run, arguments))
        process.start()
        return process

    return start


PRELUDE = (Path(__file__).parent / "rank_script.py").read_text()


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory):
    """`on_two_ranks(script)`: runs it in two processes of one group; gives the folder of the run.

    `rank_script.py` stands before the script. The processes are those of the script before, unless
    that failed.
    """
    pair = None

    def run(script):
        nonlocal pair
        pair = pair or Pair(tmp_path_factory.mktemp("two"))
        try:
            return pair.run(PRELUDE + script)
        except BaseException:
            pair.process.kill()
            pair = None
            raise

    yield run
    if pair is not None:
        pair.close()


@pytest.fixture(scope="module")
def on_one_and_two_ranks(tmp_path_factory, on_two_ranks):
    """`on_one_and_two_ranks(script)`: the same, and runs it here too; gives both folders."""

    def run(script):
        one = tmp_path_factory.mktemp("one")
        file = one / "script.py"
        file.write_text(PRELUDE + script)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(file), str(one), "1"])
            runpy.run_path(str(file))
        return one, on_two_ranks(script)

    return run


@pytest.fixture(scope="session")
def reports_of():
    """`reports_of(*folders)`: what `report(...)` has written there, in order of the ranks."""
    return lambda *folders: [
        json.loads(file.read_text())
        for folder in folders
        for file in sorted(folder.glob("report*.json"))
    ]


def nothing(*_, **__):
    """What is found of a training that is not evaluated."""
    return {"stages": [], "train_loss": math.nan, "held_out_loss": math.nan}


@pytest.fixture
def unevaluated(monkeypatch):
    """What comes after a training is left out, where only what it wrote before is read."""
    monkeypatch.setattr("stagewise.recipes.train.evaluate", nothing)


TINY_RUN = [
    *("name=tiny", "data.patch=8", "data.train_size=70", "data.held_out_size=14"),
    *("data.batch_size=16", "net.hidden_size=16", "net.depth=1", "net.num_heads=2"),
    *("module.lr=0.05", "module.warmup_steps=1", "trainer.accelerator=cpu", "trainer.devices=1"),
    *("trainer.max_steps=3", "trainer.val_check_interval=3", "callbacks=plain", "~logger"),
    *("trainer.enable_progress_bar=false", "~callbacks.progress"),
    *("callbacks.ema.decay=0.5", "callbacks.ema.update_starting_at_step=0"),
]


@pytest.fixture(scope="session")
def train_tiny():
    """`train_tiny(folder, ...)`: trains a recipe on photographs for three steps, without probes.

    What else it is given are overrides of the configuration.
    """
    from hydra import compose, initialize_config_module

    from stagewise.recipes.train import train

    def make(folder, *overrides):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stagewise.recipes.train.evaluate", nothing)
            with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
                train(compose("train", [*TINY_RUN, f"run_dir={folder}", *overrides]))
        return folder

    return make


@pytest.fixture
def read_stages():
    """`read_stages(folder)`: the header and the probes of a stages.jsonl, parsed strictly."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    def read(folder):
        text = (Path(folder) / "stages.jsonl").read_text()
        header, *probes = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
        return header, probes

    return read


@pytest.fixture(autouse=True)
def quick_intervals(request, monkeypatch):
    """A tenth of the bootstrap replicates, where no interval is tested, or compared with a file."""
    if request.path.stem not in ("test_stages", "test_callback_checkpoint"):
        monkeypatch.setitem(StageCurve.boundary.__kwdefaults__, "replicates", 20)


@contextmanager
def undrawn():
    """Pictures stay empty; drawing them would take most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, velocity_figures):
            for name in module.__all__:
                if name.endswith(("_figure", "_heatmap")):
                    patch.setattr(module, name, lambda *_: Figure())
        patch.setattr(writer, "render", lambda _: np.zeros((2, 3, 3), dtype=np.uint8))
        yield


@pytest.fixture
def quick_figures():
    """The same for a test."""
    with undrawn():
        yield


@pytest.fixture
def lightning_log(caplog):
    """`caplog` with the messages of Lightning, which may not reach the root logger, and ours."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
