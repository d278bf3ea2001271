"""The ImageNet recipes on this machine: their loader, their opening, the oracle's share of a step.

    python benchmarks/recipes.py --threads 2

Three cases, on made latents of 4 x 32 x 32 in a temporary folder, which is removed at the end:

- loader: `LatentsData.train_dataloader()` alone, in four formats, against a training step of
  SiT-S/2 (forward, backward, AdamW) in float32 on the CPU, by samples per second.
- opening: 1.28 M rows in LightningDiT's shards, with true headers and labels and holes for rows, so
  that no disk is needed; and what the other formats cost per row.
- oracle: steps of SiT-S/2 with the oracle's targets and without, in pairs: the same batch, noise
  and times, one after the other. The time that is spent inside the scheme is measured too, since
  on a busy machine it is known far better than a difference of two steps.

Times are of this machine; ratios of medians of one run travel better. A GPU takes a step some
thousand times faster than a CPU, and the loader does not become faster: compare its samples per
second with what your GPUs take. What can be counted is in recipe_costs.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import Options, Row, measure
from report import Report, meta
from torch import Tensor, nn

from stagewise import Oracle, Scheme
from stagewise.engines import Auto
from stagewise.latents import make_latents, open_latents
from stagewise.latents.lightningdit import save_stats
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.latents import LatentsData
from stagewise.spectrum import predicted_boundary
from stagewise.stages import StageCurve, stage_edges, stratified_times
from stagewise.targets import Mix

SHAPE, CLASSES = (4, 32, 32), 1000
FORMATS = ("lightningdit", "fast-dit", "repa", "mar")
LOADER_BATCH, STEP_BATCH, ORACLE_BATCH = 32, 4, 8
SHARDS, SHARD_ROWS = 128, 10_000
ORACLE_CLASSES, CLASS_ROWS = 4, 1300
RECIPE = "imagenet256_sdvae_sit_s"


# -- the loader -----------------------------------------------------------------------------------


def loader(options: Options, folder: Path) -> Report:
    """Samples per second of the loader, against those of a training step."""
    rows = options.rows(2048)
    report = Report(
        "loader",
        f"{rows} made rows of {SHAPE} float32, in batches of {LOADER_BATCH}, files in the page "
        f"cache, against SiT-S/2 in float32 in batches of {STEP_BATCH}",
    ).start()
    base = f"training step, {STEP_BATCH} samples"
    draws = torch.Generator().manual_seed(0)
    x1 = torch.randn(STEP_BATCH, *SHAPE, generator=draws)
    labels = torch.randint(CLASSES, (STEP_BATCH,), generator=draws)
    step = Step(*network())
    objective = FlowMatchingLoss()
    timed = [Row(base, lambda: step(objective, x1, labels), queries=STEP_BATCH)]
    for name in FORMATS:
        path = made_latents(folder, name, rows)
        for workers in (0, 2):
            data = latents_data(path, name, batch_size=LOADER_BATCH, num_workers=workers)
            batches = data.train_dataloader()
            count = len(batches) * LOADER_BATCH
            timed.append(Row(f"{name}, {workers} workers", _epoch(batches), queries=count))
    results = measure(timed, options.runs, base=base)
    step_rate = _rate(results[base])
    lines = [
        {
            "what": result.name,
            "samples/s": _rate(result),
            "times the step": _rate(result) / step_rate,
            "runs": result.runs,
        }
        for result in results.values()
    ]
    report.plain("samples per second, medians", lines)
    for line in lines[1:]:
        text = f"loader / step, {line['what']}"
        report.target(text, line["times the step"], 20, most=False)
    return report


def _epoch(batches: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in batches:
            pass

    return run


def _rate(result: Any) -> float:
    return float(1e3 * result.queries / result.milliseconds)


# -- opening --------------------------------------------------------------------------------------


def opening(options: Options, folder: Path) -> Report:
    """Seconds until training could begin to read."""
    shards = max(1, round(SHARDS * options.scale))
    report = Report("opening", f"{shards} shards of {SHARD_ROWS} rows of {SHAPE}, twice").start()
    path = folder / "sparse"
    sparse_shards(path, shards)
    results = measure(
        [
            Row("open_latents", lambda: open_latents(path)),
            Row(
                "LatentsData.setup(), flips=random",
                lambda: latents_data(path, None, flips="random"),
            ),
        ],
        options.runs,
    )
    report.table("from shards", list(results.values()))
    for name, result in results.items():
        if result.milliseconds is not None:
            report.target(f"seconds of {name}", result.milliseconds / 1e3, 2)
    rows = options.rows(8192)
    timed = []
    for name in FORMATS[1:]:
        path = made_latents(folder, name, rows)
        # Rows are not read, so that all of it grows with their number.
        timed.append(
            Row(name, lambda path=path, name=name: open_latents(path, name, num_classes=10).labels)
        )
    lines = [
        {
            "format": name,
            "microseconds per row": 1e3 * result.milliseconds / rows,
            "seconds for 1 281 167 rows, scaled": result.milliseconds / rows * 1281.167,
        }
        for name, result in measure(timed, options.runs).items()
        if result.milliseconds is not None
    ]
    report.plain(f"opening with labels, a file for each of {rows} rows, in the page cache", lines)
    return report


def sparse_shards(folder: Path, shards: int, rows: int = SHARD_ROWS) -> None:
    """Writes shards with headers and labels, and holes, read as zeros, where rows would be.

    The statistics are those that make 1 or -1 of a zero, so that the check of scale is passed.

    Args:
        folder: The folder.
        shards: How many, of one rank.
        rows: Rows in each.
    """
    folder.mkdir(parents=True)
    size = rows * 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    save_stats(folder, torch.tensor([1.0, -1.0] * (SHAPE[0] // 2)), torch.ones(SHAPE[0]))
    for shard in range(shards):
        numbers = torch.arange(shard * rows, (shard + 1) * rows)
        labels = (numbers * CLASSES // (shards * rows)).numpy().tobytes()
        latents = {"dtype": "F32", "shape": [rows, *SHAPE]}
        header = {
            "latents": {**latents, "data_offsets": [0, size]},
            "latents_flip": {**latents, "data_offsets": [size, 2 * size]},
            "labels": {
                "dtype": "I64",
                "shape": [rows],
                "data_offsets": [2 * size, 2 * size + len(labels)],
            },
        }
        text = json.dumps(header).encode()
        with open(folder / f"latents_rank00_shard{shard:03d}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.seek(2 * size, 1)
            file.write(labels)


# -- the oracle -----------------------------------------------------------------------------------


def oracle(options: Options, folder: Path) -> Report:
    """What exact targets at every step add to the time of a step."""
    rows = max(64, round(CLASS_ROWS * options.scale))
    report = Report(
        "oracle",
        f"SiT-S/2 in float32, batches of {ORACLE_BATCH}, class-wise over {ORACLE_CLASSES} classes "
        f"of {rows} rows, D = 4096",
    ).start()
    path = make_latents(folder / "classes", ORACLE_CLASSES * rows, SHAPE, ORACLE_CLASSES)
    step = Step(*network())
    # The second one shows how far from 0 a share is that should be 0.
    objectives = {"plain": FlowMatchingLoss(), "plain again": FlowMatchingLoss()}
    for dtype in ("float32", "bfloat16"):
        data = latents_data(path, "lightningdit", batch_size=ORACLE_BATCH, bank_dtype=dtype)
        made = Oracle(data.latent_bank(), engine=Auto())
        boundary = measured_boundary(made)
        report.note(f"{made.bank!r}: the boundary is measured at t = {boundary:.3f}")
        for lam in (1.0, "boundary"):
            scheme = ClockedScheme(made, target=Mix(lam), boundary=boundary)  # type: ignore[arg-type]
            objectives[f"Mix({lam!r}), {dtype} bank"] = FlowMatchingLoss(scheme=scheme)
    batches = forever(data.train_dataloader())
    names = list(objectives)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for turn in range(options.runs + 1):
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
    lines = [shares(name, taken["plain"], taken[name]) for name in names]
    report.plain(f"medians over {options.runs} steps, in pairs", lines)
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


def shares(name: str, plain: list[Taken], steered: list[Taken]) -> dict[str, Any]:
    """Medians of a row, and shares of its own steps."""
    pairs = list(zip(plain, steered, strict=True))
    return {
        "step": name,
        "seconds": statistics.median(each.wall for each in steered),
        PAIRS: statistics.median(1 - a.wall / b.wall for a, b in pairs),
        "the same, processor time": statistics.median(
            1 - a.processor / b.processor for a, b in pairs
        ),
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


def measured_boundary(made: Oracle) -> float:
    """As `StageScheme` measures it at the start of a run."""
    edges = stage_edges(predicted_boundary(made.bank, made.path, class_wise=True), 24)
    curve = StageCurve.measure(made, stratified_times(edges, 32, seed=0), seed=0, class_wise=True)
    return curve.boundary(seed=0).midpoint


# -- what they share ------------------------------------------------------------------------------


class Step:
    """Forward, backward and AdamW."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net, self.optimizer = net, optimizer

    def __call__(
        self, objective: FlowMatchingLoss, x1: Tensor, labels: Tensor, **kwargs: Any
    ) -> None:
        loss = objective(self.net, x1, labels, **kwargs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """SiT-S/2 and its AdamW, by the recipe's own configuration."""
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        config = compose("train", [f"experiment={RECIPE}"])
    torch.set_float32_matmul_precision("high")  # as `recipes.train` does
    module = instantiate(config.module, net=instantiate(config.net), objective=FlowMatchingLoss())
    return module.net.train(), module.configure_optimizers()["optimizer"]


def made_latents(folder: Path, name: str, rows: int) -> Path:
    """Made latents in a format, made once."""
    path = folder / f"{name}-{rows}"
    return path if path.exists() else make_latents(path, rows, SHAPE, 10, name)  # type: ignore[arg-type]


def latents_data(path: Path, name: str | None, **options: Any) -> LatentsData:
    """The data module, set up; all rows are trained on."""
    latents = open_latents(path, name, flips=options.pop("flips", "none"))
    data = LatentsData(latents, CLASSES, held_out=0, **options)
    data.setup()
    return data


def forever(batches: Any) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    return (batch for epoch in cycle([batches]) for batch in epoch)


CASES: dict[str, Callable[[Options, Path], Report]] = {
    "loader": loader,
    "opening": opening,
    "oracle": oracle,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument(
        "--runs", type=int, default=9, help="counted runs, 3 of what takes > 2 s (9)"
    )
    parser.add_argument("--only", help=f"some of the cases, by commas: {', '.join(CASES)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows (default 1)")
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown or arguments.runs < 1 or arguments.threads < 1 or not 0 < arguments.scale <= 1:
        parser.error(
            f"expected cases among {list(CASES)}, --runs and --threads >= 1 and --scale in (0, 1]"
        )
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    torch.manual_seed(0)
    about = {**meta(), "runs": arguments.runs, "scale": arguments.scale}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    reports = []
    with tempfile.TemporaryDirectory(prefix="stagewise-bench-") as folder:
        for name in names:
            start = time.perf_counter()
            made = CASES[name](Options(arguments.runs, arguments.scale), Path(folder))
            print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
            reports.append(made)
    if arguments.json:
        held = {"meta": about, "cases": [vars(report) for report in reports]}
        Path(arguments.json).write_text(json.dumps(held, indent=1))
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    sys.exit(main())
