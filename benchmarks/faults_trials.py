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

from faults_campaign import Campaign, Changes, Ended, Line, Trial, about
from faults_cases import COMMANDS, FILES, reader, source

ENDINGS = {
    "run: sample": (".ckpt", ".yaml"),
    "run: resume": (".ckpt", ".yaml", ".jsonl"),
    "run: report": (".csv", ".jsonl", ".png", ".yaml"),
}
"""The endings that these read; others read all."""


def kills(campaign: Campaign, count: int) -> Iterator[Trial]:
    """As many kills of each command, up to three of a run."""
    for name in COMMANDS:
        for number in range(count):
            yield f"kill {name} {number}", partial(kill, campaign, name, number)


def kill(campaign: Campaign, name: str, number: int) -> Line:
    """Kills a command, resumes it, perhaps kills it again, and compares."""
    draws = random.Random(f"{name} {number}")
    usual = json.loads((campaign.base / f"{name}.json").read_text())
    ends: list[Ended] = []
    for _ in range(draws.randint(1, 3)):
        moment = draws.uniform(0, usual["seconds"])
        changes = Changes(campaign.out, draws.randint(1, max(1, usual["changes"])))
        until = changes if draws.random() < 0.5 else lambda seconds, m=moment: seconds > m
        ends.append(campaign.command(name, bool(ends), until))
        if ends[-1].code != -signal.SIGKILL:
            break
    times = sum(ended.code == -signal.SIGKILL for ended in ends)
    if ends[-1].code == -signal.SIGKILL:
        ends.append(campaign.command(name, True))
    line = _compared(campaign, name, ends[-1])
    said = "" if line["outcome"] == "identical" else ends[-1].said[-1500:]
    return {**line, "kills": times, **about(*ends), "said": said}


def _compared(campaign: Campaign, name: str, last: Ended) -> Line:
    """Whether what a command has left is that of a run without faults."""
    if last.code:
        return {"outcome": "does not go on", "differs": [], "litter": []}
    found = campaign.differences(name)
    return {"outcome": "differs" if found["differs"] else "identical", **found}


def flips(campaign: Campaign, count: int) -> Iterator[Trial]:
    """As many flipped bits for each kind of file that is read."""
    for what in FILES:
        for number in range(count):
            yield f"flip {what} {number}", partial(flip, campaign, what, number)


def flip(campaign: Campaign, what: str, number: int) -> Line:
    """Flips a bit of a file, and reads it."""
    draws = random.Random(f"{what} {number}")
    wanted = campaign.base / f"{what.replace(' ', '_').replace(':', '')}.result"
    read = reader(what, campaign.base, campaign.out)
    if not wanted.exists():
        shutil.copytree(source(what, campaign.base), campaign.out)
        ended = campaign.spawn(read)
        if ended.code or "RESULT" not in ended.said:
            raise SystemExit(f"{what} cannot be read without a fault:\n{ended.said[-3000:]}")
        wanted.write_text(_result(ended))
        campaign.clear()
    shutil.copytree(source(what, campaign.base), campaign.out)
    pattern = f"{what}0.safetensors" if what in ("bank", "certificate") else "*"
    by_ending: dict[str, list[Path]] = {}
    for file in sorted(campaign.out.rglob(pattern)):
        wants = what not in ENDINGS or file.suffix in ENDINGS[what]
        if wants and file.is_file() and file.stat().st_size:
            by_ending.setdefault(file.suffix, []).append(file)
    file = draws.choice(by_ending[draws.choice(sorted(by_ending))])
    data = bytearray(file.read_bytes())
    place = draws.choice(("begin", "end", "anywhere"))
    end = len(data) - 1 - draws.randrange(min(256, len(data)))
    begin, anywhere = draws.randrange(min(256, len(data))), draws.randrange(len(data))
    at = {"begin": begin, "end": end, "anywhere": anywhere}[place]
    data[at] ^= 1 << draws.randrange(8)
    file.write_bytes(data)
    ended = campaign.spawn(read)
    if ended.raw:
        outcome = "raw"
    elif ended.code:
        named = file.name in ended.said or file.parent.name in ended.said
        outcome = "named" if named else "refused without a name"
    elif _result(ended) != wanted.read_text():
        outcome = "another value"
    else:
        words = ("again", "damaged", "WARN", "Warning", "skipp")
        outcome = "mended" if any(word in ended.said for word in words) else "the same"
    usual = outcome in ("named", "the same", "mended")
    name = file.relative_to(campaign.out).as_posix()
    said = "" if usual else ended.said[-1500:]
    return {"outcome": outcome, "file": name, "at": [at, len(data)], **about(ended), "said": said}


def _result(ended: Ended) -> str:
    return ended.said.rpartition("RESULT ")[2][:16]


def disks(campaign: Campaign, count: int) -> Iterator[Trial]:
    """As many disks of different sizes for each command."""
    if os.geteuid() or shutil.which("mount") is None:
        return
    for name in COMMANDS:
        for share in ((number + 1) / (count + 1) for number in range(count)):
            yield f"disk {name} {share:.2f}", partial(disk, campaign, name, share)


def disk(campaign: Campaign, name: str, share: float) -> Line:
    """Runs a command on a disk with room for a share of its files, resumes it on a larger one."""
    files = (campaign.base / "whole" / name).rglob("*")
    # A file takes whole pages of the disk.
    pages = sum(-(-f.stat().st_size // 4096) if f.is_file() else 1 for f in files)
    campaign.out.mkdir(parents=True)
    size = f"size={max(1, int(share * pages)) * 4}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", campaign.out], check=True)
    try:
        full = campaign.command(name, False)
        subprocess.run(["mount", "-o", "remount,size=64m", campaign.out], check=True)
        last = campaign.command(name, True) if full.code or name != "bank" else full
        line = _compared(campaign, name, last)
    finally:
        subprocess.run(["umount", "-l", campaign.out], check=True)
    told = str(campaign.out) in full.said and ("full" in full.said or "No space" in full.said)
    good = line["outcome"] == "identical" and (told or not full.code)
    said = full.said[-600:] if good else f"{full.said[-1500:]}\n=====\n{last.said[-1500:]}"
    return {**line, "ended": full.code, "told": told, **about(full, last), "said": said}
