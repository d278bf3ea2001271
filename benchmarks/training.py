"""What the oracle and the monitor cost beside a training step, on this machine.

- imagenet (a case of recipes.py): steps of SiT-S/2 with the oracle's targets and without, in pairs
  with the same batch, noise and times, on made latents of 4 x 32 x 32. The time inside the scheme
  is measured too: on a busy machine it is far less noisy than a difference of two steps.
- photos (a case of oracle.py): a step of the photos recipe, the oracle's correction on the same
  batches, and a probe of the monitor.
"""

from __future__ import annotations

import io
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import FEW, Options, Report, Result, Row, measure, ratio
from torch import Tensor

from stagewise import LatentBank, Mix, Oracle, Scheme, predicted_boundary
from stagewise.engines import Auto
from stagewise.latents import make_latents, open_latents
from stagewise.latents.base import Flips
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.latents import LatentsData
from stagewise.stages import StageCurve, stage_edges, stratified_times

SHAPE, CLASSES = (4, 32, 32), 1000
ORACLE_BATCH = 8
ORACLE_CLASSES, CLASS_ROWS = 4, 1300
BATCHES, EVERY = 16, 200  # EVERY: steps between probes in experiment/photos.yaml


class Step:
    """Forward, backward, clipping and AdamW of a recipe's network, by its own configuration."""

    def __init__(self, config: Any) -> None:
        torch.set_float32_matmul_precision("high")  # as `recipes.train` does
        objective = instantiate(config.objective)
        self.module = instantiate(config.module, net=instantiate(config.net), objective=objective)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.clip = config.trainer.gradient_clip_val
        self.module.train()

    def __call__(self, objective: Any, x1: Tensor, labels: Tensor, **kwargs: Any) -> None:
        loss = objective(self.module.net, x1, labels, **kwargs)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.module.net.parameters(), self.clip)
        self.optimizer.step()


def recipe(experiment: str, *overrides: str) -> Any:
    """The configuration of an experiment."""
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        return compose("train", [f"experiment={experiment}", *overrides])


def latents_data(
    path: Path, name: str | None, flips: Flips = "none", **options: Any
) -> LatentsData:
    """The data module, set up; all rows are trained on."""
    latents = open_latents(path, name, flips=flips)
    data = LatentsData(latents, CLASSES, held_out=0, **options)
    data.setup()
    return data


# -- the oracle -----------------------------------------------------------------------------------


def imagenet(options: Options) -> Report:
    """What exact targets at every step add to the time of a step."""
    rows = max(64, round(CLASS_ROWS * options.scale))
    report = Report(
        "oracle",
        f"SiT-S/2 in float32, batches of {ORACLE_BATCH}, class-wise over {ORACLE_CLASSES} classes "
        f"of {rows} rows, D = 4096",
    ).start()
    step = Step(recipe("imagenet256_sdvae_sit_s"))
    # The second one shows how far from 0 a share is that should be 0.
    objectives = {"plain": FlowMatchingLoss(), "plain again": FlowMatchingLoss()}
    with tempfile.TemporaryDirectory(prefix="stagewise-bench-") as folder:
        path = make_latents(Path(folder, "made"), ORACLE_CLASSES * rows, SHAPE, ORACLE_CLASSES)
        for dtype in ("float32", "bfloat16"):
            data = latents_data(path, "lightningdit", batch_size=ORACLE_BATCH, bank_dtype=dtype)
            made = Oracle(data.latent_bank(), engine=Auto())
            edges = stage_edges(predicted_boundary(made.bank, made.path, class_wise=True), 24)
            times = stratified_times(edges, 32, seed=0)
            curve = StageCurve.measure(made, times, seed=0, class_wise=True)
            boundary = curve.boundary(seed=0).midpoint
            report.note(f"{made.bank!r}: the boundary is measured at t = {boundary:.3f}")
            for lam in (1.0, "boundary"):
                scheme = ClockedScheme(made, target=Mix(lam), boundary=boundary)  # type: ignore[arg-type]
                objectives[f"Mix({lam!r}), {dtype} bank"] = FlowMatchingLoss(scheme=scheme)
        loader = data.train_dataloader()
        batches = (batch for epoch in itertools.cycle([loader]) for batch in epoch)
        taken = _in_pairs(step, objectives, batches, options.runs)
    lines = [shares(name, taken["plain"], taken[name]) for name in objectives]
    report.table(f"medians over {options.runs} steps, in pairs", lines)
    for line in lines[2:]:
        for which in (PAIRS, INSIDE):
            report.target(f"oracle, {line['step']}, {which}", line[which], 0.05)
    return report


@dataclass(frozen=True)
class Taken:
    """Seconds of a step: by the clock, of all processors, and inside the scheme."""

    wall: float
    processor: float
    inside: float


PAIRS, INSIDE = "step with - without", "inside the scheme"


def _in_pairs(
    step: Step, objectives: dict[str, FlowMatchingLoss], batches: Iterator[Any], runs: int
) -> dict[str, list[Taken]]:
    names = list(objectives)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for turn in range(runs + 1):
        x1, labels, source = next(batches)
        first = turn % len(names)  # the speed of the machine drifts: none is always the first
        for name in names[first:] + names[:first]:
            objective = objectives[name]
            torch.manual_seed(turn)  # the same noise, times and dropped labels in each pair
            wall, processor = time.perf_counter(), time.process_time()
            step(objective, x1, labels, classes=labels, source=source)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            if turn:  # the first one warms up
                inside = getattr(objective.scheme, "seconds", 0.0)
                taken[name].append(Taken(wall, processor, inside))
    return taken


def shares(name: str, plain: list[Taken], steered: list[Taken]) -> dict[str, Any]:
    """Medians of a row, and shares of its own steps."""
    pairs = list(zip(plain, steered, strict=True))
    processor = statistics.median(1 - a.processor / b.processor for a, b in pairs)
    return {
        "step": name,
        "seconds": statistics.median(each.wall for each in steered),
        PAIRS: statistics.median(1 - a.wall / b.wall for a, b in pairs),
        "the same, processor time": processor,
        INSIDE: statistics.median(each.inside / each.wall for each in steered),
        "ms inside": 1e3 * statistics.median(each.inside for each in steered),
    }


class ClockedScheme(Scheme):
    """A scheme that knows how long its last call took."""

    seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        made = super().__call__(*args, **kwargs)
        self.seconds = time.perf_counter() - start
        return made


# -- the photos recipe ----------------------------------------------------------------------------


def photos(options: Options) -> Report:
    """The recipe's SiT on photographs: a step, corrections on the same batches, a probe."""
    report = Report("training", "share of a step of the photos recipe").start()
    before = torch.get_float32_matmul_precision()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _of_photos(report, folder, options)
    except ModuleNotFoundError as error:
        report.note(f"skipped, {str(error).splitlines()[0]}")
    finally:
        torch.set_float32_matmul_precision(before)
    return report


def _of_photos(report: Report, folder: str, options: Options) -> None:
    rows_wanted = f"data.train_size={options.rows(20_000)}"
    every = "callbacks.monitor.every_n_steps=1"
    config = recipe("photos", f"run_dir={folder}", rows_wanted, every)
    step, data, size = Step(config), instantiate(config.data), config.data.batch_size
    data.setup()
    bank = LatentBank(*data.train.tensors)
    batches, oracle = _queries(bank, step.module.objective, size), Oracle(bank)
    report.note(f"N={len(bank)}, D={bank.dim}, {len(bank.classes)} classes, batch {size}")

    def train() -> None:
        step(step.module.objective, *next(turn)[:2])

    def correction(wise: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x1, names, source, t, xt = next(turn)
            return oracle.correction(xt, t, x1, names if wise else None, source=source)

        return run

    turn, base = itertools.cycle(batches), "training step"
    names = {"correction, class-wise": True, "correction, all rows": False}
    rows = [Row(base, train), *(Row(name, correction(wise)) for name, wise in names.items())]
    results = measure(rows, 3 * options.runs, base=base)
    probe = _probe(config, step.module, data, min(FEW, options.runs))
    results[probe.name] = probe
    probe.ratio = ratio(results, probe.name, base)
    report.results("times", results)
    report.note("ratio: share of a step; a probe's is for a probe at every step")
    shares = [ratio(results, name, base) for name in names]
    for name, share in zip(names, shares, strict=True):
        report.target(f"{name} / step", share, 0.10)
    both = None if None in (shares[0], probe.ratio) else shares[0] + probe.ratio / EVERY
    report.target(f"correction, class-wise, and a probe every {EVERY} steps / step", both, 0.10)


def _queries(bank: LatentBank, objective: Any, size: int) -> list[tuple[Tensor, ...]]:
    """Batches as the objective draws them, and what it made of them."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for _ in range(BATCHES):
        source = torch.randint(len(bank), (size,), generator=generator)
        x1 = bank.take(source).float().reshape(-1, *bank.shape)
        t = objective.timesteps.sample(size, generator=generator)
        x0 = torch.randn(x1.shape, generator=generator)
        xt = objective.path.interpolate(x0, x1, t).to(x1.dtype)
        made.append((x1, torch.tensor(bank.labels_of(source.tolist())), source, t, xt))
    return made


def _probe(config: Any, module: Any, data: Any, count: int) -> Result:
    """Probes of the real monitor in a real fit, with its pictures, less the first."""
    monitor = instantiate(config.callbacks.monitor)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):  # progress bars
        trainer = instantiate(
            config.trainer,
            max_steps=count + 1,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[monitor],
            logger=[instantiate(logger) for logger in config.logger.values()],
        )
        trainer.fit(module, datamodule=data)
    name = f"probe of the monitor, {monitor.strata * monitor.queries} queries"
    middle = 1e3 * statistics.median(monitor.seconds[1:])
    return Result(name, 1, "with pictures", middle, runs=len(monitor.seconds) - 1)
