"""Kills, flipped bits, full disks and files with code in them: what the commands make of them.

    kills    train, encode, sample and the writing of banks, killed (SIGKILL) at random moments, or
             when a file has just changed, and gone on with until they end
    flips    a bit of a file: in its first or last bytes (headers, directories), or anywhere
    disks    a small disk (tmpfs), full in the middle; then a larger one. Root only
    hostile  configurations, checkpoints and latents that would run code or write elsewhere

`make bench-faults` runs it. A fault is a line of `--dir`/faults.jsonl and is not made again; the
tables go to docs/faults.md. "Identical" is said of all that two undisturbed runs have in common:
that leaves out times of day.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from faults_cases import COMMANDS, action, contents, prepare
from faults_forks import Changes, Ended, Line, Trial, spawn
from faults_hostile import hostile
from faults_trials import disks, flips, kills
from tables import fill, table

__all__ = ["Campaign", "TRIALS"]

ROOT = Path(__file__).parents[1]
LOGS = "csv/version_"
"""Lightning's logger begins a new file when a training goes on."""
BAD = {"raw": "tracebacks", "outside": "wrote elsewhere", "litter": "litter"}


class Campaign:
    """The faults of a folder: those made before, and those to make."""

    def __init__(self, base: Path, seconds: float) -> None:
        self.base, self.end = base, time.monotonic() + seconds
        self.out, self.place = base / "out", base / "place"
        base.mkdir(parents=True, exist_ok=True)
        self.file = base / "faults.jsonl"
        text = self.file.read_text() if self.file.exists() else ""
        self.made = {line["key"]: line for line in map(json.loads, text.splitlines())}

    def run(self, trials: Iterator[Trial]) -> None:
        """Makes the faults that were not made before, as long as there is time."""
        for key, trial in trials:
            if key in self.made or time.monotonic() > self.end:
                continue
            self.clear()
            line: Line = {"key": key, **trial()}
            self.made[key] = line
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            bad = {name: line[name] for name in (*BAD, "differs") if line.get(name)}
            print(f"{key:32} {line['outcome']}{f'  {bad}' if bad else ''}", flush=True)

    def clear(self) -> None:
        """Removes what the trial before has left."""
        for folder in (self.out, self.place):
            shutil.rmtree(folder, ignore_errors=True)

    def begin(self) -> None:
        """Runs each command twice without disturbing it."""
        prepare(self.base)
        for name in COMMANDS:
            for again in ("whole", "second"):
                kept = self.base / again / name
                if (self.base / f"{name}.json").exists():
                    continue
                self.clear()
                counter = Changes(self.out)
                began = time.monotonic()
                ended = self.spawn(name, False, counter)
                if ended.code:
                    raise SystemExit(f"{name} fails undisturbed:\n{ended.said[-3000:]}")
                seconds = time.monotonic() - began
                kept.parent.mkdir(exist_ok=True)
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(self.out, kept)
                if again == "second":
                    about = {"seconds": seconds, "changes": counter.count}
                    (self.base / f"{name}.json").write_text(json.dumps(about))

    def spawn(
        self, name: str, resume: bool, until: Callable[[float], bool] = lambda seconds: False
    ) -> Ended:
        """Runs a command with its files in `out`."""
        return spawn(action(name, self.base, self.out, resume), self.place, self.out, until)

    def differences(self, name: str) -> tuple[list[str], list[str]]:
        """What is in `out` and is not as in an undisturbed run, and files that are not in one."""
        whole, second = (contents(self.base / run / name) for run in ("whole", "second"))
        found = contents(self.out)
        same = [
            key
            for key, value in whole.items()
            if second.get(key) == value and not key.startswith(LOGS)
        ]
        names = {f.relative_to(self.out).as_posix() for f in self.out.rglob("*") if f.is_file()}
        usual = {
            f.relative_to(self.base / run / name).as_posix()
            for run in ("whole", "second")
            for f in (self.base / run / name).rglob("*")
        }
        litter = [name for name in names - usual if not name.startswith(LOGS)]
        return [key for key in same if found.get(key) != whole[key]], sorted(litter)


# -- tables ----------------------------------------------------------------------------------------


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


TRIALS = {"kills": kills, "flips": flips, "disks": disks, "hostile": hostile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=ROOT / "build/faults")
    parser.add_argument("--seconds", type=float, default=3600.0, help="(%(default)s)")
    parser.add_argument("--kills", type=int, default=13, help="of each command (%(default)s)")
    parser.add_argument("--flips", type=int, default=40, help="of each kind of file (%(default)s)")
    parser.add_argument("--disks", type=int, default=3, help="for each command (%(default)s)")
    parser.add_argument("--hostile", type=int, default=1, help="0: none (%(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/faults.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    campaign = Campaign(options.dir.resolve(), options.seconds)
    campaign.begin()
    for name, trials in TRIALS.items():
        if count := getattr(options, name):
            campaign.run(trials(campaign, count))
    campaign.clear()
    fill(options.page, tables(campaign.made))


if __name__ == "__main__":
    main()
