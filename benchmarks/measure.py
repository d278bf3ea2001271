"""How the benchmarks measure and print: rows in turn, medians, peak memory; tables and targets.

Machines change their speed from second to second, so nothing is timed alone: each turn runs all
rows of a table once, and rows are compared by the medians over the turns. Before that each row runs
once to warm up, which is when its answer is judged, and once while its memory is watched.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

SLOW = 10.0  # seconds: a row that takes longer is run FEW times
FEW = 3
VERY_SLOW = 60.0  # and one that takes this long is not run again


@dataclass
class Options:
    """What the command line asks for.

    `scale` shrinks the number of rows, for a quick look; what is then printed proves nothing.
    """

    runs: int = 7
    scale: float = 1.0

    def rows(self, count: int) -> int:
        return max(1000, round(count * self.scale))


@dataclass
class Row:
    """One line of a table.

    Attributes:
        name: Its label.
        run: What is timed; None if it cannot run, for the reason in `note`.
        judge: From an answer to its "error", "tail" and other columns.
        queries: How many queries it answers, if fewer than the others of the table.
        note: Printed behind the numbers.
        peer: Whether this is somebody else's code: if it fails, the benchmark has not.
    """

    name: str
    run: Callable[[], Any] | None
    judge: Callable[[Any], dict[str, float]] | None = None
    queries: int | None = None
    note: str = ""
    peer: bool = False


@dataclass
class Result:
    """A row, measured: what the table and the JSON hold."""

    name: str
    milliseconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    tail: float | None = None
    memory: float | None = None
    runs: int = 0
    queries: int | None = None
    note: str = ""
    failed: bool = False
    best: float | None = None
    more: dict[str, float] = field(default_factory=dict)


def measure(
    rows: Sequence[Row], runs: int, *, base: str | None = None, queries: int | None = None
) -> dict[str, Result]:
    """Runs all rows in turn.

    Args:
        rows: The rows.
        runs: Turns that count.
        base: Name of the row that ratios are to; default none.
        queries: How many queries a row answers that does not say so itself. Rows with fewer are
            compared by their time per query.

    Returns:
        The results by name, in the order of the rows.
    """
    results = {row.name: Result(row.name, note=row.note, queries=row.queries) for row in rows}
    todo = [(row, _warm_up(row, results[row.name], runs)) for row in rows if row.run is not None]
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(runs):
        for row, count in todo:
            if count is not None and turn < count:
                start = time.perf_counter()
                row.run()  # type: ignore[misc]
                times[row.name].append(1e3 * (time.perf_counter() - start))
    for row, count in todo:
        result, values = results[row.name], times[row.name]
        if count is None:
            continue
        result.runs = max(count, 1)
        if values:
            result.milliseconds, result.best = statistics.median(values), min(values)
        remarks = [result.note] if result.note else []
        if row.queries is not None and row.queries != queries:
            remarks.append(f"{row.queries} queries, ratio per query")
        if count < runs:
            remarks.append(f"{result.runs} {'run' if result.runs == 1 else 'runs'}")
        result.note = "; ".join(remarks)
    for name in results if base else ():
        results[name].ratio = ratio(results, name, str(base), queries)
    return results


def _warm_up(row: Row, result: Result, runs: int) -> int | None:
    """How often a row is to be run, after it was judged; None if it failed."""
    assert row.run is not None
    try:
        with peak_memory() as peak:
            start = time.perf_counter()
            answer = row.run()
            seconds = time.perf_counter() - start
        if row.judge:
            judged = row.judge(answer)
            result.error, result.tail = judged.pop("error", None), judged.pop("tail", None)
            result.more = judged
        del answer
        if seconds < SLOW:
            with peak_memory() as peak:
                row.run()
    except Exception as error:  # a row that fails must not take the others with it
        text = str(error).strip().split("\n")[0][:100]
        result.note = f"failed: {type(error).__name__}: {text}"
        result.failed = not row.peer
        return None
    result.memory = peak[0]
    if seconds >= VERY_SLOW:
        result.milliseconds = result.best = 1e3 * seconds
        return 0
    return runs if seconds < SLOW else min(FEW, runs)


def ratio(
    results: dict[str, Result], name: str, base: str, queries: int | None = None
) -> float | None:
    """How many times the median of `base` that of `name` is, or None if one is missing."""
    both = [results.get(name), results.get(base)]
    if any(result is None or result.milliseconds is None for result in both):
        return None
    times = [r.milliseconds / (r.queries or queries or 1) for r in both]
    return times[0] / times[1]


def engine(name: str, *args: Any, **kwargs: Any) -> Any:
    """An engine of stagewise by name; ImportError if it, or a library it needs, is not there."""
    file = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    module = importlib.import_module(f"stagewise.engines.{file}")
    return getattr(module, name)(*args, **kwargs)


def row(
    name: str,
    make: Callable[[], Callable[[], Any]],
    judge: Callable[[Any], dict[str, float]] | None = None,
    **options: Any,
) -> Row:
    """A row whose making may need what is not installed: then it says so and is skipped."""
    try:
        return Row(name, make(), judge, **options)
    except ImportError as error:
        missing = getattr(error, "name", None)
        reason = f"{missing}: not installed" if missing else str(error).split("\n")[0]
        return Row(name, None, note=f"skipped, {reason}")


@contextmanager
def peak_memory() -> Iterator[list[float | None]]:
    """Watches the resident memory; the list holds its peak above the start, or None."""
    peak: list[float | None] = [None]
    if not os.path.exists("/proc/self/statm"):
        yield peak
        return
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts when it is used again
    start, done = _resident(), threading.Event()
    highest = [start]

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = float(max(highest[0], _resident()) - start)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- what is printed ------------------------------------------------------------------------------


@dataclass
class Report:
    """A case: its tables, findings and targets, printed as they come and kept for the JSON."""

    name: str
    title: str
    tables: dict[str, Any] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def start(self) -> Report:
        print(f"\n== {self.name}: {self.title}", flush=True)
        return self

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def target(self, text: str, reached: float | None, limit: float, most: bool = True) -> None:
        """A number beside what it is to be at most, or at least; None: it could not be told."""
        wanted = f"{'<=' if most else '>='} {limit:g}"
        self.targets.append({"text": text, "reached": reached, "wanted": wanted})
        value = "-" if reached is None else f"{reached:.3g}"
        print(f"  {text}: {value} (wanted {wanted})", flush=True)

    def table(self, name: str, results: Sequence[Result], columns: Sequence[str] = ()) -> None:
        """Prints measured rows; `columns` are further ones, of `Result.more`."""
        lines = []
        for result in results:
            memory = None if result.memory is None else f"{result.memory / 2**20:.0f}"
            about = {"ms": result.milliseconds, "ratio": result.ratio, "error": result.error}
            about |= {"tail": result.tail, "MiB": memory}
            about |= {column: result.more.get(column) for column in columns}
            lines.append({"": result.name, **about, "note": result.note})
        self._print(name, lines)
        self.tables[name] = [asdict(result) for result in results]

    def plain(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Prints a table of dicts with the same keys."""
        self._print(name, rows)
        self.tables[name] = list(rows)

    def _print(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        print(f"  {name}")
        lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for first, *others in lines:
            rest = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            print("    " + "  ".join([first.ljust(widths[0]), *rest]).rstrip(), flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of own rows that raised."""
        rows = [row for table in self.tables.values() for row in table]
        return [row["name"] for row in rows if row.get("failed")]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def meta() -> dict[str, Any]:
    """What the numbers were measured with."""
    cpu = platform.processor()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def run_cases(cases: Mapping[str, Callable[[Options], Report]], about: str, runs: int = 7) -> int:
    """The command line of a benchmark of several cases; the exit code."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--runs", type=int, default=runs, help="counted runs (%(default)s)")
    parser.add_argument("--only", help=f"some of the cases, by commas: {', '.join(cases)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows (default 1)")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(cases)
    if set(names) - set(cases) or arguments.runs < 1 or not 0 < arguments.scale <= 1:
        parser.error(f"expected cases among {list(cases)}, --runs >= 1 and --scale in (0, 1]")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    options = Options(arguments.runs, arguments.scale)
    context = {**meta(), "runs": options.runs, "scale": options.scale}
    print(", ".join(f"{key} {value}" for key, value in context.items()))
    reports = []
    for name in names:
        start = time.perf_counter()
        try:
            report = cases[name](options)
        except Exception as error:  # one case does not stop the others
            traceback.print_exc()
            report = Report(name, f"failed: {type(error).__name__}: {error}")
            report.tables["failed"] = [{"name": name, "failed": True}]
        reports.append(report)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    if arguments.json:
        held = {"meta": context, "cases": [vars(report) for report in reports]}
        arguments.json.write_text(json.dumps(held, indent=1))
    failed = [name for report in reports for name in report.failed]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
