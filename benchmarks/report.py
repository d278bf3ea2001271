"""What a case of the benchmarks says: tables and targets, for people and for JSON."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from measure import Result


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
        """Says whether `reached` is at most (or at least) `limit`; None: it could not be told."""
        met = None if reached is None else (reached <= limit if most else reached >= limit)
        sign = "<=" if most else ">="
        target = {"text": text, "reached": reached, "wanted": f"{sign} {limit:g}", "met": met}
        self.targets.append(target)
        verdict = {None: "not measured", True: "met", False: "MISSED"}[met]
        value = "" if reached is None else f"{reached:.3g}, "
        print(f"  target: {text} {sign} {limit:g}: {value}{verdict}", flush=True)

    def table(self, name: str, results: Sequence[Result], columns: Sequence[str] = ()) -> None:
        """Prints measured rows; `columns` are further ones, of `Result.more`."""
        self.tables[name] = [asdict(result) for result in results]
        width = max([38, *(len(result.name) for result in results)]) + 2
        head = [f"{'ms':>9}", f"{'ratio':>7}", f"{'error':>9}", f"{'tail':>9}", f"{'MiB':>7}"]
        print("  " + name.ljust(width) + "".join([*head, *(f"{c:>12}" for c in columns)]))
        for result in results:
            if result.milliseconds is None:
                print(f"  {result.name:{width}}  {result.note}")
                continue
            cells = [
                f"{result.milliseconds:9.1f}",
                _cell(result.ratio, 7, ".2f"),
                _cell(result.error, 9, ".1e"),
                _cell(result.tail, 9, ".1e"),
                _cell(None if result.memory is None else result.memory / 2**20, 7, ".0f"),
                *(_cell(result.more.get(column), 12, ".4g") for column in columns),
            ]
            note = f"  {result.note}" if result.note else ""
            print(f"  {result.name:{width}}{''.join(cells)}{note}", flush=True)

    def plain(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Prints a table of dicts with the same keys."""
        self.tables[name] = list(rows)
        cells = [[_plain(value) for value in row.values()] for row in rows]
        keys = list(rows[0])
        widths = [
            max(len(key), *(len(line[i]) for line in cells)) + 2 for i, key in enumerate(keys)
        ]
        first = widths[0]
        print(f"  {name}")
        print(
            "    "
            + keys[0].ljust(first)
            + "".join(key.rjust(width) for key, width in zip(keys[1:], widths[1:], strict=True))
        )
        for line in cells:
            rest = "".join(v.rjust(width) for v, width in zip(line[1:], widths[1:], strict=True))
            print("    " + line[0].ljust(first) + rest, flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of own rows that raised."""
        rows = [row for table in self.tables.values() for row in table]
        return [row["name"] for row in rows if row.get("failed")]


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


def _cell(value: float | None, width: int, form: str) -> str:
    return " " * width if value is None else f"{value:{width}{form}}"


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
