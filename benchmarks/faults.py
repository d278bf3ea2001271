"""Kills, flipped bits, full disks and files with code in them: what the commands make of them.

    kills    train, encode, sample and the writing of banks, killed (SIGKILL) at random moments, or
             when a file has just changed, and resumed until they end
    flips    a bit of a file: in its first or last bytes (headers, directories), or anywhere
    disks    a small disk (tmpfs), full in the middle; then a larger one. Root only
    hostile  configurations, checkpoints and latents that would run code or write elsewhere

`make bench-faults` runs it. A fault is a line of `--dir`/faults.jsonl and is not made again; the
tables go to docs/faults.md. "Identical" compares all that two runs without faults have in common,
which leaves out times of day.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from faults_campaign import Campaign, Line
from faults_hostile import hostile
from faults_trials import disks, flips, kills
from tables import fill, table

ROOT = Path(__file__).parents[1]
BAD = {"raw": "tracebacks", "outside": "wrote elsewhere", "litter": "litter"}


def tables(made: Mapping[str, Line]) -> dict[str, str]:
    """How many faults of each kind ended in which way, in Markdown."""
    kinds: dict[str, dict[str, list[Line]]] = {}
    for key, line in made.items():
        kind, *words = key.split()
        kinds.setdefault(kind, {}).setdefault(" ".join(words[:-1]) or words[0], []).append(line)
    found = {}
    for kind, groups in kinds.items():
        outcomes = sorted({line["outcome"] for lines in groups.values() for line in lines})
        rows = []
        for name, lines in groups.items():
            counts = Counter(line["outcome"] for line in lines)
            cells = [sum(line.get("kills", 0) for line in lines)] if kind == "kill" else []
            cells += [counts[outcome] for outcome in outcomes]
            cells += [sum(bool(line.get(what)) for line in lines) for what in BAD]
            rows.append([name, f"{len(lines)}", *map(str, cells)])
        head = ["", "trials", *["SIGKILLs"] * (kind == "kill"), *outcomes, *BAD.values()]
        found[kind] = table(head, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=ROOT / "build/faults")
    parser.add_argument("--seconds", type=float, default=3600.0, help="(%(default)s)")
    parser.add_argument("--kills", type=int, default=13, help="of each command (%(default)s)")
    parser.add_argument("--flips", type=int, default=40, help="of each kind of file (%(default)s)")
    parser.add_argument("--disks", type=int, default=3, help="for each command (%(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/faults.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    campaign = Campaign(options.dir.resolve(), options.seconds)
    campaign.begin()
    campaign.run(kills(campaign, options.kills))
    campaign.run(flips(campaign, options.flips))
    campaign.run(disks(campaign, options.disks))
    campaign.run(hostile(campaign))
    campaign.clear()
    fill(options.page, tables(campaign.made))


if __name__ == "__main__":
    main()
