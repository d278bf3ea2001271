"""One of two processes fails in a probe (gloo): both raise, and none waits for ever."""

import json
import os
import signal

import pytest
from hydra import compose, initialize_config_module
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.train import train

pytestmark = pytest.mark.slow

SCRIPT = """
import time
from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from stagewise.callbacks import (
    MemorizationMonitor, PosteriorMonitor, StageTransitions, VelocityErrorMonitor
)
from stagewise.callbacks import posterior_monitor


class Fails:
    '''Does what it is told, until a step; then one rank cannot.'''

    def __init__(self, who, does, step=4):
        self.who, self.does, self.step = who, does, step

    def __call__(self, *args, **kwargs):
        if rank == self.who and self.trainer.global_step >= self.step:
            raise MemoryError("no room on this rank")
        return self.does(*args, **kwargs)


def fit(fails, *callbacks):
    # A rank that waits gives up in the end, and says something else.
    trainer = make_trainer(
        *callbacks, strategy=DDPStrategy(timeout=timedelta(seconds=60)), max_steps=8
    )
    if fails is not None:
        fails.trainer = trainer
    start = time.perf_counter()
    try:
        with undrawn():
            trainer.fit(Flow(0.1), loader(samples(40), 4))
        raised = "nothing"
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    probes = [len(c.history) for c in callbacks if hasattr(c, "history")]
    return {"raised": raised, "probes": probes, "seconds": time.perf_counter() - start}


def velocity(module, xt, t, labels):
    return module.net(torch.cat([xt, t[:, None]], 1))


small = {"every_n_steps": 4}
few = small | {"strata": 4, "queries": 4}
found = {}

for who in (0, 1):
    fails = Fails(who, velocity)
    found[f"velocity {who}"] = fit(
        fails, VelocityErrorMonitor(velocity=fails, dirpath=out / f"v{rank}", **few)
    )
    fails = Fails(who, velocity)
    found[f"memorization {who}"] = fit(
        fails,
        MemorizationMonitor(velocity=fails, samples=6, dirpath=out / f"m{rank}", **small),
    )
    measure = posterior_monitor.StageCurve.measure
    fails = posterior_monitor.StageCurve.measure = Fails(who, measure)
    found[f"posterior {who}"] = fit(fails, PosteriorMonitor(dirpath=out / f"p{rank}", **few))
    posterior_monitor.StageCurve.measure = measure

    changing = StageTransitions(dirpath=out / f"s{rank}")
    fails = changing._read = Fails(who, changing._read)
    found[f"transitions {who}"] = fit(
        fails, PosteriorMonitor(dirpath=out / f"p{rank}", **few), changing
    )

# Pictures and lines are the first rank's.
for name, monitor in (
    ("velocity", VelocityErrorMonitor(dirpath=out / f"vp{rank}", **few)),
    ("memorization", MemorizationMonitor(dirpath=out / f"mp{rank}", samples=6, **small)),
    ("posterior", PosteriorMonitor(dirpath=out / f"pp{rank}", **few)),
):
    fails = monitor._figures = Fails(0, monitor._figures)
    found[f"{name} pictures"] = fit(fails, monitor)

(out / "file").write_text("")
for kind in (VelocityErrorMonitor, MemorizationMonitor, PosteriorMonitor):
    found[f"{kind.__name__} folder"] = fit(None, kind(dirpath=out / "file" / "folder"))

report(found)
"""


@pytest.fixture(scope="module")
def reports(on_two_ranks, reports_of):
    """What each of the two ranks met."""
    return reports_of(on_two_ranks(SCRIPT))


NAMES = {
    "velocity": "a probe of VelocityErrorMonitor",
    "memorization": "a probe of MemorizationMonitor",
    "posterior": "a probe of PosteriorMonitor",
    "transitions": "reading training samples again for StageTransitions",
}


CASES = [(name, who) for name in NAMES for who in (0, 1, "pictures")]
CASES.remove(("transitions", "pictures"))


@pytest.mark.parametrize(("name", "who"), CASES)
def test_all_ranks_raise_what_one_of_them_met(reports, name, who):
    case = f"{name} {who}"
    failed = 0 if who == "pictures" else who
    mine, other = reports[failed][case], reports[1 - failed][case]
    assert mine["raised"] == "MemoryError: no room on this rank"
    expected = f"ValueError: Another process failed in {NAMES[name]}; see its message."
    assert other["raised"] == expected
    # The probe that failed has left no entry on any rank, and nobody has waited.
    assert mine["probes"] == other["probes"]
    assert mine["probes"][0] == (2 if name == "transitions" else 1)
    assert max(mine["seconds"], other["seconds"]) < 30


@pytest.mark.parametrize(
    "kind", ["VelocityErrorMonitor", "MemorizationMonitor", "PosteriorMonitor"]
)
def test_a_folder_that_only_the_first_rank_would_write(reports, kind):
    first, second = (report[f"{kind} folder"]["raised"] for report in reports)
    assert first.startswith("OSError: Cannot write")
    assert "Say where files go: dirpath" in first
    assert second == "ValueError: Another process failed in writing its files; see its message."


def _on_a_rank(until, *options):
    """Trains on the rank of the environment, and kills the second one in a step."""

    def kill(module, optimizer):
        if (module.global_step, module.global_rank) == (until, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])
    FlowMatchingModule.on_before_optimizer_step = kill
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        train(compose("train", options))


@pytest.mark.usefixtures("unevaluated")
def test_the_survivor_of_a_dead_rank_says_how_to_go_on(tmp_path, forked, capfd):
    options = [
        *("experiment=photos", "name=test", "data.patch=8", f"run_dir={tmp_path / 'run'}"),
        *("data.train_size=280", "data.held_out_size=70", "data.batch_size=16"),
        *("net.hidden_size=32", "net.depth=1", "trainer.enable_progress_bar=false"),
        *("~callbacks.progress", "~callbacks.memorization", "callbacks.monitor.queries=8"),
        *("callbacks.errors.every_n_steps=4", "callbacks.errors.queries=4"),
        *("+callbacks.monitor.figures=0", "+callbacks.errors.figures=0", "logger=csv"),
        *("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=9"),
        "+callbacks.checkpoint.every_n_train_steps=2",
    ]

    def run(until, *more):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
        ranks = [
            forked(_on_a_rank, until, *options, *more, LOCAL_RANK=rank, **place) for rank in "01"
        ]
        for process in ranks:
            process.join()
        return [process.exitcode for process in ranks], capfd.readouterr().err

    codes, said = run(7)
    assert codes == [1, -signal.SIGKILL]
    assert f"To continue from last.ckpt: run_dir={tmp_path / 'run'} resume=true" in said
    codes, said = run(None, "resume=true")
    assert codes == [0, 0], said[-3000:]
    lines = (tmp_path / "run/errors/stages.jsonl").read_text().splitlines()
    windows = [e for e in map(json.loads, lines) if e["event"] == "training_window"]
    said = "from step 4 to 6, where training was resumed, draws of one process of 2 are counted"
    assert [(w["step"], w.get("lacking")) for w in windows] == [
        *((step, None) for step in (1, 4)),
        (8, said),
        (9, None),
    ]
