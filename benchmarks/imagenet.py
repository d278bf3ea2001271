"""A bank of the size of ImageNet: opened and streamed.

`make bench-imagenet` runs it. It writes 1 281 167 rows of 4096 numbers in bfloat16 (10.5 GB, in
`--dir`, removed at the end whatever happens) and asks them in a fresh process, which knows the file
only. `--rows 20000 --dim 256` is a quick look.

The rows have 1000 classes as large as ImageNet's are on average, and a spectrum of natural images:
the variance along the k-th axis falls as 1/k and is 1 on average, a fifth of it between classes.
The axes are those of the coordinates: what is measured does not depend on a rotation, which would
cost 43 TFLOP.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import Report, Row, engine, measure, meta
from torch import Tensor

ROWS, DIM, CLASSES = 1_281_167, 4096, 1000
BETWEEN = 0.2  # share of the variance between classes
QUERIES = 32
BLOCK = 2**24  # numbers made at a time


def samples(rows: int, dim: int, labels: Tensor) -> Iterator[Tensor]:
    """All rows in order, in bfloat16, some of them made ahead on other threads."""
    axis = torch.arange(1, dim + 1, dtype=torch.float64)
    scale = (dim / (axis * (1 / axis).sum())).sqrt().float()
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(0))
    centres *= math.sqrt(BETWEEN) * scale
    within = math.sqrt(1 - BETWEEN) * scale
    step = max(1, BLOCK // dim)

    def block(first: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + first)
        label = labels[first : first + step]
        noise = torch.randn(len(label), dim, generator=generator)
        return noise.mul_(within).add_(centres[label]).to(torch.bfloat16)

    firsts = range(0, rows, step)
    workers = max(1, torch.get_num_threads())
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(block, first) for first in firsts[:workers]]
        for first in [*firsts[workers:], *[None] * min(workers, len(firsts))]:
            done = waiting.pop(0)
            if first is not None:
                waiting.append(pool.submit(block, first))
            yield done.result()


def write(path: Path, rows: int, dim: int) -> float:
    """Makes and writes the bank; seconds."""
    from stagewise import LatentBank

    labels = torch.arange(rows) * CLASSES // rows  # in order, as the folders of ImageNet are
    start = time.perf_counter()
    shown = [start]

    def advance(done: int) -> None:
        if time.perf_counter() - shown[0] > 15:
            shown[0] = time.perf_counter()
            print(f"  {done} of {rows} rows after {shown[0] - start:.0f} s", flush=True)

    LatentBank.write(
        path,
        samples(rows, dim, labels),
        rows,
        labels=labels,
        dtype=torch.bfloat16,
        advance=advance,
    )
    return time.perf_counter() - start


def read(path: Path, runs: int) -> dict[str, Any]:
    """Everything that is asked of the file, in a process that has not seen it."""
    from stagewise import LatentBank, Oracle

    report = Report("imagenet", f"{path.stat().st_size / 1e9:.2f} GB, memory-mapped").start()
    before = memory("VmRSS")
    start = time.perf_counter()
    bank = LatentBank.open(path)
    opened = time.perf_counter() - start
    report.note(f"{bank!r}, opened in {opened:.3f} s, {memory('VmRSS') - before:.0f} MiB more")
    report.target("seconds to open", opened, 1)

    exact = Oracle(bank, engine=engine("Exact"))
    xt, t, source = queries(bank, torch.rand(QUERIES, generator=torch.Generator().manual_seed(2)))
    start = time.perf_counter()
    exact.posterior(xt, t)
    first = time.perf_counter() - start
    peak = memory("VmHWM") / 1024
    report.note(f"{QUERIES} unconditional queries, t~U(0, 1), for the first time: {first:.1f} s")
    report.note(f"peak resident memory {peak:.2f} GiB, mapped pages of the file included")
    report.target("peak resident memory in GiB", peak, 14)
    labels = bank.labels_of(source.tolist())
    results = measure([Row("class-wise", lambda: exact.posterior(xt, t, labels))], max(runs, 7))
    report.table(f"{QUERIES} class-wise queries, t~U(0, 1)", list(results.values()))

    report.note(f"peak resident memory at the end {memory('VmHWM') / 1024:.2f} GiB")
    return asdict(report)


def queries(bank: Any, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples of random rows at `times`: x_t, t, source."""
    from stagewise import LinearPath

    generator = torch.Generator().manual_seed(len(times))
    source = torch.randint(len(bank), times.shape, generator=generator)
    x0 = torch.randn(len(times), bank.dim, generator=generator)
    t = times.clamp(0.001, 0.999)
    return LinearPath().interpolate(x0, bank.take(source).float(), t), t, source


def memory(name: str) -> float:
    """A line of /proc/self/status in MiB; NaN where there is none."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return math.nan
    return int(line.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where 11 GB are free")
    parser.add_argument(
        "--runs", type=int, default=7, help="counted runs, 3 where one takes > 10 s"
    )
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        made = read(Path(arguments.read), arguments.runs)
        Path(arguments.json).write_text(json.dumps(made))
        return 0
    if arguments.rows < CLASSES:
        parser.error(f"expected --rows of at least {CLASSES}, one for each class")
    # So that a kill, too, passes through what removes the file.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    about = {**meta(), "rows": arguments.rows, "dim": arguments.dim}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="stagewise-bench-", dir=arguments.dir) as folder:
        path, result = Path(folder, "bank.safetensors"), Path(folder, "result.json")
        seconds = write(path, arguments.rows, arguments.dim)
        print(
            f"  {path.stat().st_size / 1e9:.2f} GB made and written in {seconds:.0f} s", flush=True
        )
        command = [sys.executable, os.path.abspath(__file__), "--read", str(path)]
        command += ["--json", str(result), "--runs", str(arguments.runs)]
        subprocess.run(command, check=True)
        made = {"meta": about, "seconds_to_write": seconds, "case": json.loads(result.read_text())}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(made, indent=1))
    tables = made["case"]["tables"].values()
    return int(any(row.get("failed") for table in tables for row in table))


if __name__ == "__main__":
    sys.exit(main())
