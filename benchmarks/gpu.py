"""The oracle on a CUDA device, in one command of at most eight minutes.

    python benchmarks/gpu.py --seconds 420 --json docs/gpu.json

Measures what a card does at best, whether the answers are right, what waits, whether monitors
change a bit, and times beside those of others; writes the numbers to the file and the tables into
docs/engines.md, with the card's name and the date. Without a card it says so in a line and measures
nothing. `--fill FILE` writes the tables of a file that is there. `--counted` counts launches,
waits and bytes on fake tensors of the real sizes, for which no card is needed, and writes those.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_counted
import gpu_times
import gpu_training
import torch
from measure import meta
from tables import fill, table

PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
CASES: dict[str, Callable[..., gpu_cases.Rows]] = {
    "ceilings": gpu_cases.ceilings,
    "right": gpu_cases.right,
    "digits": gpu_cases.digits,
    "waits": gpu_cases.waits,
    "places": gpu_training.places,
    "training": gpu_training.training,
    "times": gpu_times.times,
    "shares": gpu_training.shares,
}
"""In this order; the first lines of their docstrings are the titles of the tables."""


def measured(device: torch.device, sizes: gpu_cases.Sizes, seconds: float) -> dict[str, Any]:
    """All cases; one that fails or for which no time is left does not stop the others."""
    start = time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card: a CPU"
    about = meta() | {"card": name, "date": datetime.date.today().isoformat()}
    found: dict[str, Any] = {"meta": about, "failed": {}}
    for each, case in CASES.items():
        began = time.perf_counter()
        if began - start > seconds:
            found["failed"][each] = "no time was left"
            continue
        print(f"{began - start:4.0f} s  {each}", flush=True)
        try:
            found[each] = case(device, sizes, lambda: start + seconds - time.perf_counter())
        except Exception as error:
            traceback.print_exc()
            found["failed"][each] = f"{type(error).__name__}: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found["meta"]["seconds"] = round(time.perf_counter() - start)
    return found


def aims(found: Mapping[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Times that were to be reached: the aim, the value, what was wanted, whether it holds."""
    answers: list[tuple[str, float, str, bool]] = []

    def aim(text: str, reached: float, limit: float, most: bool = True) -> None:
        held = reached <= limit if most else reached >= limit
        answers.append((text, reached, f"at {'most' if most else 'least'} {limit:g}", held))

    rows = [row for row in found.get("times", ()) if row["rows"] == "bfloat16" and "ms" in row]
    by = {(row["what"], row["over"], row["queries"]): row for row in rows if row["t"] == "U(0, 1)"}
    limits = {("class", 256): 1.0, ("class", 32): 0.25}
    limits |= {("all rows", 256): 20.0, ("all rows", 32): 5.8}
    for (over, queries), limit in limits.items():
        if row := by.get(("stagewise", over, queries)):
            aim(f"{over}, {queries} queries, ms", row["ms"], limit)
    copied = [row["reached"] for row in found.get("ceilings", ()) if row["what"] == "copy"]
    if (row := by.get(("stagewise", "class", 256))) and copied:
        share = row["GB"] / row["ms"] / copied[0]
        aim("class, share of the copy bandwidth", share, 0.55, most=False)
    bare = by.get(("two bare products", "all rows", 256))
    if (row := by.get(("stagewise", "all rows", 256))) and bare:
        aim("all rows, in bare products", row["ms"] / bare["ms"], 1.4)
    for row in found.get("shares", ()):
        if row["network"] == "SiT-XL/2":
            aim("class-wise targets, share of a SiT-XL/2 step", row["share"], 0.01)
    return answers


def pages(found: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/engines.md, by their names there."""
    about = found["meta"]
    parts = [f"Measured on {about['card']}, {about['date']}, torch {about['torch']}."]
    rows = [
        [a, _cell(is_), wanted, "" if held else "missed"] for a, is_, wanted, held in aims(found)
    ]
    parts.append(table(["aim", "reached", "wanted", ""], rows))
    for name, case in CASES.items():
        if lines := found.get(name):
            title = str(case.__doc__).splitlines()[0].rstrip(".")
            head = list(dict.fromkeys(key for line in lines for key in line))
            cells = [[_cell(line.get(key, "")) for key in head] for line in lines]
            parts.append(f"{title}:\n\n{table(head, cells)}")
    parts += [f"{name}: not measured ({why})." for name, why in found["failed"].items()]
    return {"gpu": "\n\n".join(parts)}


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    seconds = "stop measuring after (%(default)s)"
    parser.add_argument("--seconds", type=float, default=420, help=seconds)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--fill", type=Path, help="only write the tables of this file")
    parser.add_argument("--counted", action="store_true", help="only count, without a card")
    parser.add_argument("--page", type=Path, default=PAGE, help="where tables go (%(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, on whatever is there")
    options = parser.parse_args(arguments)
    if options.counted:
        fill(options.page, {"gpu-counted": gpu_counted.counted()})
        return 0
    if options.fill:
        fill(options.page, pages(json.loads(options.fill.read_text())))
        return 0
    if not torch.cuda.is_available() and not options.small:
        print("skipped: no CUDA device here, so nothing is measured (--small tries the script)")
        return 0
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = gpu_cases.SMALL if options.small else gpu_cases.Sizes()
    found = measured(device, sizes, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for text, reached, wanted, held in aims(found):
        print(f"  {text}: {_cell(reached)} ({wanted}{'' if held else ', missed'})")
    if not options.small:
        fill(options.page, pages(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
