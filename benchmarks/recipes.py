"""The ImageNet recipes on this machine: their loader, their opening, the oracle's share of a step.

    python benchmarks/recipes.py --threads 2

Three cases, on made latents of 4 x 32 x 32 in a temporary folder:

- loader: `LatentsData.train_dataloader()` alone, in four formats, against a training step of
  SiT-S/2 (forward, backward, AdamW) in float32 on the CPU, by samples per second.
- opening: 1.28 M rows in LightningDiT's shards, with true headers and labels and holes for rows, so
  that no disk is needed; and what the other formats cost per row.
- oracle: steps with the oracle's targets and without (training.py).

A GPU takes a step some thousand times faster than a CPU, and the loader does not become faster:
compare its samples per second with what your GPUs take.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import training
from measure import Options, Report, Row, measure, run_cases
from training import CLASSES, SHAPE, Step, latents_data, recipe

from stagewise.latents import make_latents, open_latents
from stagewise.losses import FlowMatchingLoss

FORMATS = ("lightningdit", "fast-dit", "repa", "mar")
LOADER_BATCH, STEP_BATCH = 32, 4
SHARDS, SHARD_ROWS = 128, 10_000


def loader(options: Options) -> Report:
    """Samples per second of the loader, against those of a training step."""
    rows = options.rows(2048)
    about = f"{rows} made rows of {SHAPE} float32, batches of {LOADER_BATCH}, in the page cache"
    report = Report("loader", f"{about}, against SiT-S/2, batches of {STEP_BATCH}")
    base = f"training step, {STEP_BATCH} samples"
    draws = torch.Generator().manual_seed(0)
    x1 = torch.randn(STEP_BATCH, *SHAPE, generator=draws)
    labels = torch.randint(CLASSES, (STEP_BATCH,), generator=draws)
    step, objective = Step(recipe("imagenet256_sdvae_sit_s")), FlowMatchingLoss()
    timed = [Row(base, lambda: step(objective, x1, labels), queries=STEP_BATCH)]
    with tempfile.TemporaryDirectory(prefix="stagewise-bench-") as folder:
        for name in FORMATS:
            path = make_latents(Path(folder, name), rows, SHAPE, 10, name)  # type: ignore[arg-type]
            for workers in (0, 2):
                data = latents_data(path, name, batch_size=LOADER_BATCH, num_workers=workers)
                batches = data.train_dataloader()
                count = len(batches) * LOADER_BATCH
                read: Callable[[], Any] = partial(deque, batches, maxlen=0)
                timed.append(Row(f"{name}, {workers} workers", read, queries=count))
        results = measure(timed, options.runs, base=base)
    for result in results.values():
        if result.milliseconds is not None and result.ratio is not None:
            rate = 1e3 * result.queries / result.milliseconds
            result.columns = {"samples/s": rate, "times the step": 1 / result.ratio}
    report.results("medians", results)
    for name in list(results)[1:]:
        times = results[name].columns.get("times the step")
        report.target(f"loader / step, {name}", times, 20, most=False)
    return report


def opening(options: Options) -> Report:
    """Seconds until training could begin to read."""
    shards, rows = max(1, round(SHARDS * options.scale)), options.rows(8192)
    report = Report("opening", f"{shards} shards of {SHARD_ROWS} rows of {SHAPE}, twice")
    with tempfile.TemporaryDirectory(prefix="stagewise-bench-") as folder:
        path = Path(folder, "sparse")
        sparse_shards(path, shards)
        prepare = partial(latents_data, path, None, flips="random")
        timed = [Row("open_latents", partial(open_latents, path))]
        timed.append(Row("LatentsData.setup(), flips=random", prepare))
        results = measure(timed, options.runs)
        report.results("from shards", results)
        for name, result in results.items():
            report.target(f"milliseconds of {name}", result.milliseconds, 2000)
        timed = []
        for name in FORMATS[1:]:
            made = make_latents(Path(folder, name), rows, SHAPE, 10, name)  # type: ignore[arg-type]
            opened = partial(open_latents, made, name, num_classes=10)
            timed.append(Row(name, lambda opened=opened: opened().labels))  # type: ignore[misc]
        results = measure(timed, options.runs)
    for result in results.values():
        if result.milliseconds is not None:  # rows are not read: all of it grows with their number
            scaled = result.milliseconds / rows * 1281.167
            result.columns = {"seconds for 1 281 167 rows, scaled": scaled}
    report.results(f"a file for each of {rows} rows, in the page cache", results)
    return report


def sparse_shards(folder: Path, shards: int, rows: int = SHARD_ROWS) -> None:
    """Writes shards of one rank with headers and labels, and holes, read as zeros, for rows.

    The statistics are those that make 1 or -1 of a zero, so that the check of scale is passed.
    """
    folder.mkdir(parents=True)
    size = rows * 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    mean = torch.tensor([1.0, -1.0] * (SHAPE[0] // 2)).view(1, -1, 1, 1)
    torch.save({"mean": mean, "std": torch.ones_like(mean)}, folder / "latents_stats.pt")
    for shard in range(shards):
        numbers = torch.arange(shard * rows, (shard + 1) * rows)
        labels = (numbers * CLASSES // (shards * rows)).numpy().tobytes()
        latents = {"dtype": "F32", "shape": [rows, *SHAPE]}
        ends = [2 * size, 2 * size + len(labels)]
        header = {
            "latents": {**latents, "data_offsets": [0, size]},
            "latents_flip": {**latents, "data_offsets": [size, 2 * size]},
            "labels": {"dtype": "I64", "shape": [rows], "data_offsets": ends},
        }
        text = json.dumps(header).encode()
        with open(folder / f"latents_rank00_shard{shard:03d}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.seek(2 * size, 1)
            file.write(labels)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    logging.getLogger("stagewise").setLevel(logging.ERROR)
    cases = {"loader": loader, "opening": opening, "oracle": training.imagenet}
    sys.exit(run_cases(cases, str(__doc__), runs=9))
