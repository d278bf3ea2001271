"""What the oracle's targets cost beside a training step, on this machine.

Steps with the oracle's targets and without are made in pairs: the same batch, noise and times. The
time inside the scheme is measured too: on a busy machine it is far less noisy than a difference of
two steps. `imagenet` (a case of recipes.py) has SiT-S/2 and made latents of 4 x 32 x 32, `photos`
(a case of oracle.py) the demo.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import Options, Report
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
PAIRS, INSIDE = "step with - without", "inside the scheme"


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


def imagenet(options: Options) -> Report:
    """What exact targets at every step add to the time of a step."""
    rows = max(64, round(CLASS_ROWS * options.scale))
    about = f"SiT-S/2 in float32, batches of {ORACLE_BATCH}, class-wise over {ORACLE_CLASSES}"
    report = Report("oracle", f"{about} classes of {rows} rows, D = 4096")
    schemes: dict[str, Scheme] = {}
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
            for name, target in {"1.0": Mix(1.0), "'boundary'": Mix("boundary")}.items():
                scheme = ClockedScheme(made, target=target, boundary=boundary)
                schemes[f"Mix({name}), {dtype} bank"] = scheme
        step = Step(recipe("imagenet256_sdvae_sit_s"))
        _in_pairs(report, step, schemes, data.train_dataloader(), options.runs, 0.05)
    return report


def photos(options: Options) -> Report:
    """The same for the demo, class-wise and over all rows."""
    report = Report("training", "share of a step of the photos recipe")
    config = recipe("photos", f"data.train_size={options.rows(20_000)}")
    data = instantiate(config.data)
    data.setup()
    oracle = Oracle(LatentBank(*data.train.tensors))
    report.note(f"{oracle.bank!r}, batches of {data.batch_size}")
    wise, every = (ClockedScheme(oracle, target=Mix(), class_wise=on) for on in (True, False))
    schemes = {"Mix(), class-wise": wise, "Mix(), all rows": every}
    runs = 3 * options.runs
    _in_pairs(report, Step(config), schemes, data.train_dataloader(), runs, 0.10)
    return report


class ClockedScheme(Scheme):
    """A scheme that knows how long its last call took."""

    seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        made = super().__call__(*args, **kwargs)
        self.seconds = time.perf_counter() - start
        return made


@dataclass(frozen=True)
class Taken:
    """Seconds of a step: by the clock, of all processors, and inside the scheme."""

    wall: float
    processor: float
    inside: float


def _in_pairs(
    report: Report,
    step: Step,
    schemes: Mapping[str, Scheme],
    loader: Any,
    runs: int,
    limit: float,
) -> None:
    """Makes steps with each scheme, and with none; `limit` is what their share should be below."""
    # The second one shows how far from 0 a share is that should be 0.
    objectives = {"plain": FlowMatchingLoss(), "plain again": FlowMatchingLoss()}
    objectives |= {name: FlowMatchingLoss(scheme=scheme) for name, scheme in schemes.items()}
    batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    names = list(objectives)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for turn in range(runs + 1):
        x1, labels, *source = next(batches)
        first = turn % len(names)  # the speed of the machine drifts: none is always the first
        for name in names[first:] + names[:first]:
            objective = objectives[name]
            torch.manual_seed(turn)  # the same noise, times and dropped labels in each pair
            wall, processor = time.perf_counter(), time.process_time()
            step(objective, x1, labels, classes=labels, source=source[0] if source else None)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            if turn:  # the first one warms up
                inside = getattr(objective.scheme, "seconds", 0.0)
                taken[name].append(Taken(wall, processor, inside))
    lines = [shares(name, taken["plain"], taken[name]) for name in names]
    report.table(f"medians over {runs} steps, in pairs", lines)
    for line, which in itertools.product(lines[2:], (PAIRS, INSIDE)):
        report.target(f"oracle, {line['step']}, {which}", line[which], limit)


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
