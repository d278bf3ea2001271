"""How the benchmarks of the oracle measure and print: rows in turn, medians, tables, targets.

Machines change their speed from second to second, so nothing is timed alone: each turn runs all
rows of a table once, and rows are compared by the medians over the turns. Before that each row runs
once to warm up, which is when its answer is judged.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SLOW, FEW = 10.0, 3
"""A row that takes more seconds than `SLOW` is run `FEW` times."""

Judge = Callable[[Any], dict[str, float]]
"""From an answer to further columns of the table."""


@dataclass
class Options:
    """Runs that count, and the share of the rows; less than 1 is a quick look."""

    runs: int = 7
    scale: float = 1.0

    def rows(self, count: int) -> int:
        return max(1000, round(count * self.scale))


@dataclass
class Row:
    """What is timed, and what was measured of it.

    Attributes:
        name: Its label.
        run: What is timed; None if it cannot run, for the reason in `note`.
        judge: Gives further columns.
        queries: How many queries it answers; rows are compared by their time per query.
        note: Printed behind the numbers.
        peer: Whether it is code of others: if it fails, the benchmark has not failed.
        milliseconds: The median over `runs`.
        ratio: To another row.
    """

    name: str
    run: Callable[[], Any] | None
    judge: Judge | None = None
    queries: int = 1
    note: str = ""
    peer: bool = False
    milliseconds: float | None = None
    ratio: float | None = None
    runs: int = 0
    failed: bool = False
    columns: dict[str, float] = field(default_factory=dict)


def measure(rows: Sequence[Row], runs: int, *, base: str | None = None) -> dict[str, Row]:
    """Runs all rows in turn, `runs` times; rows by name, with ratios to the row `base`."""
    results = {row.name: row for row in rows}
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    counts = {row.name: _warm_up(row, runs) for row in rows}
    for turn in range(runs):
        for row in rows:
            if row.run is not None and turn < counts[row.name]:
                start = time.perf_counter()
                row.run()
                times[row.name].append(1e3 * (time.perf_counter() - start))
    for name, values in times.items():
        if values:
            results[name].milliseconds, results[name].runs = statistics.median(values), len(values)
    for name in results if base else ():
        results[name].ratio = ratio(results, name, str(base))
    return results


def _warm_up(row: Row, runs: int) -> int:
    """Judges a row; returns how often to run it, 0 if it cannot run."""
    if row.run is None:
        return 0
    try:
        start = time.perf_counter()
        answer = row.run()
        seconds = time.perf_counter() - start
        row.columns = row.judge(answer) if row.judge else {}
    except Exception as error:  # a row that fails must not take the others with it
        row.note = f"failed: {type(error).__name__}: {first_line(error)}"
        row.failed = not row.peer
        return 0
    return runs if seconds < SLOW else min(FEW, runs)


def ratio(results: Mapping[str, Row], name: str, base: str) -> float | None:
    """The median of `name` over that of `base`, per query; None if one is missing."""
    times = []
    for result in (results.get(name), results.get(base)):
        if result is None or result.milliseconds is None:
            return None
        times.append(result.milliseconds / result.queries)
    return times[0] / times[1]


def row(
    name: str, make: Callable[[], Callable[[], Any]], judge: Judge | None = None, **options: Any
) -> Row:
    """A row; if `make` needs a library that is not installed, one that says "skipped"."""
    try:
        return Row(name, make(), judge, **options)
    except ImportError as error:
        return Row(name, None, note=f"skipped, {first_line(error)}")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:100]


# -- printing -------------------------------------------------------------------------------------


@dataclass
class Report:
    """A case: its tables, notes and targets, printed as they come and kept for the JSON."""

    name: str
    title: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"\n== {self.name}: {self.title}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def target(self, text: str, reached: float | None, limit: float, most: bool = True) -> None:
        """A number beside the limit it should keep; None: not measured."""
        wanted = f"{'<=' if most else '>='} {limit:g}"
        self.targets.append({"text": text, "reached": reached, "wanted": wanted})
        print(f"  {text}: {_cell(reached)} (wanted {wanted})", flush=True)

    def results(self, name: str, results: Mapping[str, Row]) -> None:
        """A table of measured rows."""
        columns = dict.fromkeys(key for result in results.values() for key in result.columns)
        lines = []
        for result in results.values():
            times = {"ms": result.milliseconds, "ratio": result.ratio, "runs": result.runs}
            own = {key: result.columns.get(key) for key in columns}
            lines.append({"what": result.name, **times, **own, "note": result.note})
        self.failed += [result.name for result in results.values() if result.failed]
        self.table(name, lines)

    def table(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """A table of dicts with the same keys."""
        self.tables[name] = list(rows)
        print(f"  {name}")
        lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for first, *others in lines:
            rest = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            print("    " + "  ".join([first.ljust(widths[0]), *rest]).rstrip(), flush=True)


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
    context = {**meta(), **vars(options)}
    print(", ".join(f"{key} {value}" for key, value in context.items()))
    reports = []
    for name in names:
        start = time.perf_counter()
        try:
            report = cases[name](options)
        except Exception as error:  # one case does not stop the others
            traceback.print_exc()
            report = Report(name, f"failed: {type(error).__name__}: {error}", failed=[name])
        reports.append(report)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    if arguments.json:
        held = {"meta": context, "cases": [vars(report) for report in reports]}
        arguments.json.write_text(json.dumps(held, indent=1))
    failed = [name for report in reports for name in report.failed]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
