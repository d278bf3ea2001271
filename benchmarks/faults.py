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
import os
import pickle
import random
import shutil
import subprocess
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults_cases import (
    COMMANDS,
    FILES,
    KINDS,
    Ended,
    action,
    contents,
    latents_of,
    prepare,
    reader,
    source,
    spawn,
)
from tables import fill, table

ROOT = Path(__file__).parents[1]


class Campaign:
    """The faults of a folder: those made before, and those to make."""

    def __init__(self, base: Path, seconds: float) -> None:
        self.base, self.end = base, time.monotonic() + seconds
        self.out, self.place = base / "out", base / "place"
        base.mkdir(parents=True, exist_ok=True)
        self.file = base / "faults.jsonl"
        text = self.file.read_text() if self.file.exists() else ""
        self.made = {line["key"]: line for line in map(json.loads, text.splitlines())}

    def run(self, trials: Iterator[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
        """Makes the faults that were not made before, as long as there is time."""
        for key, trial in trials:
            if key in self.made or time.monotonic() > self.end:
                continue
            self.clear()
            line = {"key": key, **trial()}
            self.made[key] = line
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            bad = {name: line[name] for name in BAD if line.get(name)}
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
        same = [key for key, value in whole.items() if second.get(key) == value]
        names = {f.relative_to(self.out).as_posix() for f in self.out.rglob("*") if f.is_file()}
        usual = {
            f.relative_to(self.base / run / name).as_posix()
            for run in ("whole", "second")
            for f in (self.base / run / name).rglob("*")
        }
        litter = [name for name in names - usual if not name.startswith(LOGS)]
        return [key for key in same if found.get(key) != whole[key]], sorted(litter)


class Changes:
    """Counts how often files of a folder change; asks for the end at the n-th time."""

    def __init__(self, folder: Path, stop: int | None = None) -> None:
        self.folder, self.stop = folder, stop
        self.count, self.before = 0, {}

    def __call__(self, seconds: float) -> bool:
        now = dict(self._scan(self.folder))
        self.count += now != self.before
        self.before = now
        return self.stop is not None and self.count >= self.stop

    def _scan(self, folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
        try:
            items = list(os.scandir(folder))
        except OSError:
            return
        for item in items:
            try:
                if item.is_dir():
                    yield from self._scan(Path(item.path))
                else:
                    about = item.stat()
                    yield item.path, (about.st_size, about.st_mtime_ns)
            except OSError:
                continue


LOGS = "csv/version_"
"""Lightning's logger begins a new file when a training goes on."""
BAD = ("raw", "outside", "litter", "differs", "ran", "hangs")


# -- kills ------------------------------------------------------------------------------------------


def kills(campaign: Campaign, count: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """As many kills of each command, up to three of a run."""
    for name in COMMANDS:
        for number in range(count):
            yield f"kill {name} {number}", lambda name=name, n=number: kill(campaign, name, n)


def kill(campaign: Campaign, name: str, number: int) -> dict[str, Any]:
    """Kills a command, goes on, perhaps kills it again, and compares."""
    draws = random.Random(f"{name} {number}")
    about = json.loads((campaign.base / f"{name}.json").read_text())
    ends, resume = [], False
    for _ in range(draws.randint(1, 3)):
        moment = draws.uniform(0, about["seconds"])
        changes = Changes(campaign.out, draws.randint(1, max(1, about["changes"])))
        aimed = draws.random() < 0.5
        ended = campaign.spawn(name, resume, changes if aimed else lambda s, m=moment: s > m)
        ends.append(ended)
        resume = True
        if ended.code != -9:
            break
    times = sum(ended.code == -9 for ended in ends)
    if ends[-1].code == -9:
        ends.append(campaign.spawn(name, True))
    last = ends[-1]
    differs, litter = campaign.differences(name) if last.code == 0 else ([], [])
    outcome = "identical" if last.code == 0 and not differs else "differs"
    return {
        "outcome": outcome if last.code == 0 else "does not go on",
        "kills": times,
        "differs": differs[:5],
        "litter": litter[:5],
        **_about(ends),
        "said": "" if outcome == "identical" and last.code == 0 else last.said[-1500:],
    }


def _about(ends: list[Ended]) -> dict[str, Any]:
    return {
        "raw": any(ended.raw for ended in ends),
        "outside": sorted({path for ended in ends for path in ended.outside})[:5],
    }


# -- flips ------------------------------------------------------------------------------------------


def flips(campaign: Campaign, count: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """As many flipped bits for each kind of file that is read."""
    for what in FILES:
        for number in range(count):
            yield f"flip {what} {number}", lambda what=what, n=number: flip(campaign, what, n)


def flip(campaign: Campaign, what: str, number: int) -> dict[str, Any]:
    """Flips a bit of a file, and reads it."""
    draws = random.Random(f"{what} {number}")
    begin = source(what, campaign.base)
    wanted = campaign.base / f"{what.replace(' ', '_').replace(':', '')}.result"
    read = reader(what, campaign.base, campaign.out)
    if not wanted.exists():
        shutil.copytree(begin, campaign.out)
        ended = spawn(read, campaign.place, campaign.out)
        if ended.code or "RESULT" not in ended.said:
            raise SystemExit(f"{what} cannot be read undisturbed:\n{ended.said[-3000:]}")
        wanted.write_text(_result(ended))
        campaign.clear()
    shutil.copytree(begin, campaign.out)
    files = sorted(f for f in campaign.out.rglob("*") if f.is_file() and f.stat().st_size)
    by_ending: dict[str, list[Path]] = {}
    for file in files:
        by_ending.setdefault(file.suffix, []).append(file)
    file = draws.choice(by_ending[draws.choice(sorted(by_ending))])
    data = bytearray(file.read_bytes())
    place = draws.choice(("begin", "end", "anywhere"))
    first = len(data) - 1 - draws.randrange(min(256, len(data)))
    at = {"begin": draws.randrange(min(256, len(data))), "end": first}.get(
        place, draws.randrange(len(data))
    )
    data[at] ^= 1 << draws.randrange(8)
    file.write_bytes(data)
    ended = spawn(read, campaign.place, campaign.out)
    name = file.relative_to(campaign.out).as_posix()
    if ended.raw:
        outcome = "raw"
    elif ended.code:
        named = file.name in ended.said or file.parent.name in ended.said
        outcome = "named" if named else "refused without a name"
    else:
        outcome = "the same" if _result(ended) == wanted.read_text() else "another value"
        if outcome == "the same" and any(
            words in ended.said for words in ("again", "damaged", "WARN", "Warning", "skipp")
        ):
            outcome = "mended"
    usual = outcome in ("named", "the same", "mended")
    return {
        "outcome": outcome,
        "file": name,
        "at": [at, len(data)],
        **_about([ended]),
        "said": "" if usual else ended.said[-1500:],
    }


def _result(ended: Ended) -> str:
    return ended.said.rpartition("RESULT ")[2][:16]


# -- full disks -------------------------------------------------------------------------------------


def disks(campaign: Campaign, count: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """As many disks of different sizes for each command."""
    if os.geteuid() or shutil.which("mount") is None:
        return
    for name in COMMANDS:
        for number in range(count):
            share = (number + 1) / (count + 1)
            yield f"disk {name} {share:.2f}", lambda n=name, s=share: disk(campaign, n, s)


def disk(campaign: Campaign, name: str, share: float) -> dict[str, Any]:
    """Runs a command on a disk with room for a share of its files, and goes on on a larger one."""
    files = (campaign.base / "whole" / name).rglob("*")
    # A file takes whole pages of the disk.
    pages = sum(-(-f.stat().st_size // 4096) if f.is_file() else 1 for f in files)
    campaign.out.mkdir(parents=True)
    size = f"size={max(1, int(share * pages)) * 4}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", campaign.out], check=True)
    try:
        full = campaign.spawn(name, False)
        subprocess.run(["mount", "-o", "remount,size=64m", campaign.out], check=True)
        last = campaign.spawn(name, True) if full.code or name != "bank" else full
        differs, litter = campaign.differences(name) if last.code == 0 else ([], [])
    finally:
        subprocess.run(["umount", "-l", campaign.out], check=True)
    told = str(campaign.out) in full.said and ("full" in full.said or "No space" in full.said)
    outcome = "identical" if last.code == 0 and not differs else "differs"
    good = last.code == 0 and not differs and (told or not full.code)
    return {
        "outcome": outcome if last.code == 0 else "does not go on",
        "ended": full.code,
        "told": told,
        "differs": differs[:5],
        "litter": litter[:5],
        **_about([full, last]),
        "said": full.said[-600:] if good else full.said[-1500:] + "\n=====\n" + last.said[-1500:],
    }


# -- files that would do more than they say ---------------------------------------------------------


def hostile(campaign: Campaign, _: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Configurations, checkpoints and latents that would leave a mark if they were trusted."""
    for target in TARGETS:
        for how in ("sample", "resume", "report"):
            yield f"config {target} {how}", lambda t=target, h=how: config(campaign, t, h)
    for how in ("sample", "resume"):
        yield f"checkpoint {how}", lambda h=how: checkpoint(campaign, h)
    for kind in (*KINDS, "bank", "certificate"):
        yield f"pickle {kind}", lambda k=kind: pickled(campaign, k)
    for kind in ("repa.zip", "edm2.zip"):
        yield f"names {kind}", lambda k=kind: outside_names(campaign, k)


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


TARGETS = {
    "os.mkdir": {"_args_": ["MARK"]},
    "builtins.eval": {"_args_": ["__import__('os').mkdir('MARK')"]},
    "numpy.load": {"file": "PICKLE", "allow_pickle": True},
    "torch.load": {"f": "PICKLE", "weights_only": False},
    "stagewise.files.os.mkdir": {"_args_": ["MARK"]},
    "hydra.utils.instantiate": {"config": {"_target_": "os.mkdir", "_args_": ["MARK"]}},
}


def judged(campaign: Campaign, read: Callable[[], object], usual: bool = False) -> dict[str, Any]:
    """Reads what is in `out`; whether that left a mark, or was refused by name."""
    ended = spawn(read, campaign.place, campaign.out)
    ran = (campaign.base / "mark").exists()
    shutil.rmtree(campaign.base / "mark", ignore_errors=True)
    outcome = "named" if str(campaign.out) in ended.said else "refused without a name"
    outcome = "raw" if ended.raw else outcome if ended.code else "not asked for"
    said = "" if outcome in ("named", "not asked for") else ended.said[-1500:]
    return {"outcome": "ran" if ran else outcome, "ran": ran, **_about([ended]), "said": said}


def config(campaign: Campaign, target: str, how: str) -> dict[str, Any]:
    """A run whose configuration calls something else, for its network and within its data."""
    from omegaconf import OmegaConf

    shutil.copytree(source("run: sample", campaign.base), campaign.out)
    mark, file = campaign.base / "mark", campaign.base / "pickle"
    with open(file, "wb") as stream:
        pickle.dump(Mark(mark), stream)
    told = json.dumps(TARGETS[target]).replace("MARK", str(mark)).replace("PICKLE", str(file))
    held = OmegaConf.load(campaign.out / "config.yaml")
    held.data.latents.path = {"_target_": target, **json.loads(told)}
    held.net = {"_target_": target, **json.loads(told)}
    OmegaConf.save(held, campaign.out / "config.yaml")
    return judged(campaign, reader(f"run: {how}", campaign.base, campaign.out))


def checkpoint(campaign: Campaign, how: str) -> dict[str, Any]:
    """A checkpoint that is a pickle of something else."""
    shutil.copytree(source("run: sample", campaign.base), campaign.out)
    for file in campaign.out.rglob("*.ckpt"):
        held = torch.load(file, weights_only=True)
        torch.save({**held, "more": Mark(campaign.base / "mark")}, file)
    return judged(campaign, reader(f"run: {how}", campaign.base, campaign.out))


def pickled(campaign: Campaign, kind: str) -> dict[str, Any]:
    """Files of which each is a pickle, in the way that its ending has them."""
    what = kind if kind in ("bank", "certificate") else f"latents {kind}"
    shutil.copytree(source(what, campaign.base), campaign.out)
    mark = Mark(campaign.base / "mark")
    files = [file for file in campaign.out.rglob("*") if file.is_file()]
    for file in files:
        if kind == "certificate" and "bank" in file.name:
            continue
        if file.suffix == ".npy":
            np.save(file, np.array([mark], dtype=object), allow_pickle=True)
        elif file.suffix == ".npz":
            np.savez(file, moments=np.array([mark], dtype=object))
        elif file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
            with zipfile.ZipFile(file, "w") as archive:
                for name in names:
                    archive.writestr(name, pickle.dumps(mark))
        elif file.suffix == ".pt":
            torch.save(mark, file)
        elif file.suffix == ".safetensors":
            file.write_bytes(pickle.dumps(mark))
    return judged(campaign, reader(what, campaign.base, campaign.out))


def outside_names(campaign: Campaign, kind: str) -> dict[str, Any]:
    """A zip with members that lie outside of it."""
    shutil.copytree(source(f"latents {kind}", campaign.base), campaign.out)
    file = next(campaign.out.rglob("*.zip"))
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    rows = [name for name in held if name.endswith(".npy")]
    index = json.loads(held["dataset.json"])
    index["labels"] += [["../../mark/x.npy", 0], ["/mark/x.npy", 1]]
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("../../mark/x.npy", "/mark/x.npy", *rows):
            archive.writestr(name, held.get(name, held[rows[0]]))
        archive.writestr("dataset.json", json.dumps(index))
    return judged(campaign, reader(f"latents {kind}", campaign.base, campaign.out))


# -- tables -----------------------------------------------------------------------------------------


def tables(made: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Counts of each kind of fault, in Markdown."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for key, line in made.items():
        kinds.setdefault(key.split()[0], []).append(line)
    found = {}
    for kind, names in GROUPS.items():
        lines = [line for name in names for line in kinds.get(name, [])]
        if not lines:
            continue
        outcomes = sorted({line["outcome"] for line in lines})
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            words = line["key"].split()
            last = -1 if kind != "hostile" else (-1 if words[0] in ("config",) else None)
            groups.setdefault(" ".join(words[0 if kind == "hostile" else 1 : last]), []).append(
                line
            )
        rows = []
        for name, group in groups.items():
            counts = Counter(line["outcome"] for line in group)
            more = [f"{sum(line['kills'] for line in group)}"] if kind == "kills" else []
            bad = [f"{sum(bool(line.get(what)) for line in group)}" for what in BAD[:3]]
            cells = [f"{counts[outcome]}" for outcome in outcomes]
            rows.append([name, f"{len(group)}", *more, *cells, *bad])
        head = ["", "trials", *(["SIGKILLs"] if kind == "kills" else []), *outcomes]
        found[kind] = table([*head, "tracebacks", "wrote outside", "litter"], rows)
    return found


GROUPS = {
    "kills": ["kill"],
    "flips": ["flip"],
    "disks": ["disk"],
    "hostile": ["config", "checkpoint", "pickle", "names"],
}
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
