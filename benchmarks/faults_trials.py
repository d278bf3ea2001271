"""Trials of the fault campaign: a command killed, a bit flipped, a disk too small."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from faults_cases import COMMANDS, FILES, reader, source
from faults_forks import Changes, Ended, Line, Trial, about, spawn

if TYPE_CHECKING:
    from faults import Campaign

__all__ = ["disks", "flips", "kills"]

# -- kills -----------------------------------------------------------------------------------------


def kills(campaign: Campaign, count: int) -> Iterator[Trial]:
    """As many kills of each command, up to three of a run."""
    for name in COMMANDS:
        for number in range(count):
            yield f"kill {name} {number}", partial(kill, campaign, name, number)


def kill(campaign: Campaign, name: str, number: int) -> Line:
    """Kills a command, goes on, perhaps kills it again, and compares."""
    draws = random.Random(f"{name} {number}")
    usual = json.loads((campaign.base / f"{name}.json").read_text())
    ends, resume = [], False
    for _ in range(draws.randint(1, 3)):
        moment = draws.uniform(0, usual["seconds"])
        changes = Changes(campaign.out, draws.randint(1, max(1, usual["changes"])))
        aimed = draws.random() < 0.5
        ended = campaign.spawn(name, resume, changes if aimed else lambda s, m=moment: s > m)
        ends.append(ended)
        resume = True
        if ended.code != -signal.SIGKILL:
            break
    times = sum(ended.code == -signal.SIGKILL for ended in ends)
    if ends[-1].code == -signal.SIGKILL:
        ends.append(campaign.spawn(name, True))
    last = ends[-1]
    differs, litter = campaign.differences(name) if last.code == 0 else ([], [])
    outcome = "identical" if last.code == 0 and not differs else "differs"
    return {
        "outcome": outcome if last.code == 0 else "does not go on",
        "kills": times,
        "differs": differs[:5],
        "litter": litter[:5],
        **about(*ends),
        "said": "" if outcome == "identical" and last.code == 0 else last.said[-1500:],
    }


# -- flips -----------------------------------------------------------------------------------------


def flips(campaign: Campaign, count: int) -> Iterator[Trial]:
    """As many flipped bits for each kind of file that is read."""
    for what in FILES:
        for number in range(count):
            yield f"flip {what} {number}", partial(flip, campaign, what, number)


READ = {
    "run: sample": (".ckpt", ".yaml"),
    "run: resume": (".ckpt", ".yaml", ".jsonl"),
    "run: report": (".csv", ".jsonl", ".png", ".yaml"),
}
"""The endings that these look at; others look at all."""


def flip(campaign: Campaign, what: str, number: int) -> Line:
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
    if what in ("bank", "certificate"):
        files = [campaign.out / f"{what}0.safetensors"]
    files = [file for file in files if file.suffix in READ.get(what, (file.suffix,))]
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
        **about(ended),
        "said": "" if usual else ended.said[-1500:],
    }


def _result(ended: Ended) -> str:
    return ended.said.rpartition("RESULT ")[2][:16]


# -- full disks ------------------------------------------------------------------------------------


def disks(campaign: Campaign, count: int) -> Iterator[Trial]:
    """As many disks of different sizes for each command."""
    if os.geteuid() or shutil.which("mount") is None:
        return
    for name in COMMANDS:
        for number in range(count):
            share = (number + 1) / (count + 1)
            yield f"disk {name} {share:.2f}", partial(disk, campaign, name, share)


def disk(campaign: Campaign, name: str, share: float) -> Line:
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
        **about(full, last),
        "said": full.said[-600:] if good else full.said[-1500:] + "\n=====\n" + last.said[-1500:],
    }
