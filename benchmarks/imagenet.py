"""A bank of the size of ImageNet: written, opened and asked.

`make bench-imagenet` runs it. It writes 1 281 167 rows of 4096 numbers in bfloat16 (10.5 GB, in
`--dir`, removed at the end) and asks them in a fresh process, which knows the file only. `--rows
20000 --dim 256` is a quick look.

The rows have 1000 classes as large as ImageNet's are on average, and a spectrum of natural images:
the variance along the k-th axis falls as 1/k and is 1 on average, a fifth of it between classes.
The axes are those of the coordinates: a rotation would change nothing that is measured, and cost
43 TFLOP.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measure import Report, Row, measure, meta
from torch import Tensor

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Exact

CLASSES, QUERIES = 1000, 32
BETWEEN = 0.2  # share of the variance between classes
BLOCK = 2**24  # numbers made at a time


def samples(rows: int, dim: int, labels: Tensor) -> Iterator[Tensor]:
    """All rows in order, in bfloat16."""
    axis = torch.arange(1, dim + 1, dtype=torch.float64)
    scale = (dim / (axis * (1 / axis).sum())).sqrt().float()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, dim, generator=generator)
    centres *= math.sqrt(BETWEEN) * scale
    within = math.sqrt(1 - BETWEEN) * scale
    for label in labels.split(max(1, BLOCK // dim)):
        noise = torch.randn(len(label), dim, generator=generator)
        yield noise.mul_(within).add_(centres[label]).to(torch.bfloat16)


def write(path: Path, rows: int, dim: int) -> None:
    """Makes and writes the bank."""
    labels = torch.arange(rows) * CLASSES // rows  # in order, as the folders of ImageNet are
    start = shown = time.perf_counter()

    def advance(done: int) -> None:
        nonlocal shown
        if time.perf_counter() - shown > 15:
            shown = time.perf_counter()
            print(f"  {done} of {rows} rows after {shown - start:.0f} s", flush=True)

    made = samples(rows, dim, labels)
    LatentBank.write(path, made, rows, labels=labels, dtype=torch.bfloat16, advance=advance)
    size, seconds = path.stat().st_size / 1e9, time.perf_counter() - start
    print(f"  {size:.2f} GB made and written in {seconds:.0f} s", flush=True)


def read(path: Path, runs: int) -> bool:
    """Asks the file in a process that has not seen it; whether something failed."""
    report = Report("imagenet", f"{path.stat().st_size / 1e9:.2f} GB, memory-mapped")
    before = memory("VmRSS")
    start = time.perf_counter()
    bank = LatentBank.open(path)
    opened = time.perf_counter() - start
    report.note(f"{bank!r}, {memory('VmRSS') - before:.0f} MiB more")
    report.target("seconds to open", opened, 1)

    exact = Oracle(bank, engine=Exact())
    generator = torch.Generator().manual_seed(2)
    t = torch.rand(QUERIES, generator=generator).clamp(0.001, 0.999)
    source = torch.randint(len(bank), (QUERIES,), generator=generator)
    x0 = torch.randn(QUERIES, bank.dim, generator=generator)
    xt = LinearPath().interpolate(x0, bank.take(source).float(), t)
    start = time.perf_counter()
    exact.posterior(xt, t)
    first = time.perf_counter() - start
    report.note(f"{QUERIES} unconditional queries, t~U(0, 1), for the first time: {first:.1f} s")
    report.target("peak resident GiB, the file's pages included", memory("VmHWM") / 1024, 14)
    labels = bank.labels_of(source.tolist())
    results = measure([Row("class-wise", lambda: exact.posterior(xt, t, labels))], runs)
    report.results(f"{QUERIES} class-wise queries, t~U(0, 1)", results)
    report.note(f"peak resident memory at the end {memory('VmHWM') / 1024:.2f} GiB")
    return bool(report.failed)


def memory(name: str) -> float:
    """A line of /proc/self/status in MiB; NaN where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), math.nan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where 11 GB are free")
    parser.add_argument("--runs", type=int, default=7, help="counted runs (%(default)s)")
    arguments = parser.parse_args()
    if arguments.rows < CLASSES:
        parser.error(f"expected --rows of at least {CLASSES}, one for each class")
    # The file is removed after a kill, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    print(", ".join(f"{key} {value}" for key, value in meta().items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="stagewise-bench-", dir=arguments.dir) as folder:
        path = Path(folder, "bank.safetensors")
        write(path, arguments.rows, arguments.dim)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as fresh:  # an error if it is killed
            return int(fresh.submit(read, path, arguments.runs).result())


if __name__ == "__main__":
    sys.exit(main())
