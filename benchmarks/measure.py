"""How the benchmarks measure: rows in turn, medians, peak memory.

Machines change their speed from second to second, so nothing is timed alone: each turn runs all
rows of a table once, and rows are compared by the medians over the turns. Before that each row runs
once to warm up, which is when its answer is judged, and once while its memory is watched.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

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
        name: What it says.
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
    todo: list[tuple[Row, Callable[[], Any], int]] = []
    for row in rows:
        if row.run is None:
            continue
        result = results[row.name]
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
            continue
        result.memory = peak[0]
        count = runs if seconds < SLOW else min(FEW, runs) if seconds < VERY_SLOW else 0
        if not count:
            result.milliseconds = result.best = 1e3 * seconds
        todo.append((row, row.run, count))
    times: dict[str, list[float]] = {row.name: [] for row, _, _ in todo}
    for turn in range(runs):
        for row, run, count in todo:
            if turn < count:
                start = time.perf_counter()
                run()
                times[row.name].append(1e3 * (time.perf_counter() - start))
    for row, _, count in todo:
        result, values = results[row.name], times[row.name]
        result.runs = max(count, 1)
        if values:
            result.milliseconds, result.best = statistics.median(values), min(values)
        remarks = [result.note] if result.note else []
        if row.queries is not None and row.queries != queries:
            remarks.append(f"{row.queries} queries, ratio per query")
        if count < runs:
            remarks.append(f"{result.runs} {'run' if result.runs == 1 else 'runs'}")
        result.note = "; ".join(remarks)
    set_ratios(results, base, queries)
    return results


def set_ratios(results: dict[str, Result], base: str | None, queries: int | None = None) -> None:
    """Ratios of medians, per query where a row has fewer of them."""
    for name in results:
        results[name].ratio = ratio(results, name, base, queries) if base else None


def ratio(
    results: dict[str, Result], name: str, base: str, queries: int | None = None
) -> float | None:
    """How many times the median of `base` that of `name` is, or None if one is missing."""
    both = [results.get(name), results.get(base)]
    if any(result is None or result.milliseconds is None for result in both):
        return None
    times = [r.milliseconds / (r.queries or queries or 1) for r in both]
    return times[0] / times[1]


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
