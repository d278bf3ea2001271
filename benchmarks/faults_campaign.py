"""The fault campaign: its folder, and a process for each trial.

Python, torch and the commands are imported once: each trial is a fork, which takes milliseconds
where a new process takes seconds. It has a HOME, a TMPDIR and a working directory of its own, and
its writes outside of the trial's folder are logged.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from faults_cases import COMMANDS, action, contents, prepare

Line: TypeAlias = dict[str, Any]
"""What is kept of a trial."""
Trial: TypeAlias = tuple[str, Callable[[], Line]]
"""Its key, and what runs it."""
LIMIT = 300.0
"""Seconds after which a trial hangs."""
LEFT_OUT = ("csv/version_", "checkpoints/last.ckpt")
"""Lightning's logger begins a new file when a training resumes. A training that was killed between
its last two checkpoints resumes from the first, and does not write the second.
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: a signal), its output, writes elsewhere."""

    code: int
    said: str
    outside: list[str]

    @property
    def raw(self) -> bool:
        """Whether it ended in a traceback, where one line should be, or by a signal of its own."""
        return "Traceback (most recent call last)" in self.said or self.code < -signal.SIGKILL


def about(*ends: Ended) -> Line:
    """What is wrong with any trial."""
    outside = {path for ended in ends for path in ended.outside}
    return {"raw": any(ended.raw for ended in ends), "outside": sorted(outside)[:5]}


class Changes:
    """Counts how often files of a folder change; stops a trial at the n-th time."""

    def __init__(self, folder: Path, stop: float = float("inf")) -> None:
        self.folder, self.stop, self.count = folder, stop, 0
        self.before: dict[str, tuple[int, int]] = {}

    def __call__(self, seconds: float) -> bool:
        now = {}
        for place, _, names in os.walk(self.folder):
            for file in (os.path.join(place, name) for name in names):
                with suppress(OSError):  # removed since it was listed
                    now[file] = os.stat(file).st_size, os.stat(file).st_mtime_ns
        self.count += now != self.before
        self.before = now
        return self.count >= self.stop


class Campaign:
    """The faults of a folder; each trial has its files in `out`, its HOME and output in `place`."""

    def __init__(self, base: Path, seconds: float) -> None:
        self.base, self.end = base, time.monotonic() + seconds
        self.out, self.place = base / "out", base / "place"
        base.mkdir(parents=True, exist_ok=True)
        self.file = base / "faults.jsonl"
        text = self.file.read_text() if self.file.exists() else ""
        self.made: dict[str, Line] = {}
        for line in map(json.loads, text.splitlines()):
            self.made[line["key"]] = line

    def run(self, trials: Iterator[Trial]) -> None:
        """Runs the trials that were not run before, as long as there is time."""
        for key, trial in trials:
            if key in self.made or time.monotonic() > self.end:
                continue
            self.clear()
            line = self.made[key] = {"key": key, **trial()}
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            names = ("raw", "outside", "litter", "differs")
            bad = {name: line[name] for name in names if line.get(name)}
            print(f"{key:32} {line['outcome']}{f'  {bad}' if bad else ''}", flush=True)

    def clear(self) -> None:
        """Removes what the trial before has left."""
        for folder in (self.out, self.place):
            shutil.rmtree(folder, ignore_errors=True)

    def begin(self) -> None:
        """Runs each command twice without a fault."""
        prepare(self.base)
        for name in COMMANDS:
            for again in ("whole", "second"):
                kept, usual = self.base / again / name, self.base / f"{name}.json"
                if usual.exists():
                    continue
                self.clear()
                changes, began = Changes(self.out), time.monotonic()
                ended = self.command(name, False, changes)
                if ended.code:
                    raise SystemExit(f"{name} fails without a fault:\n{ended.said[-3000:]}")
                seconds = time.monotonic() - began
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(self.out, kept)
                if again == "second":
                    usual.write_text(json.dumps({"seconds": seconds, "changes": changes.count}))

    def command(
        self, name: str, resume: bool, until: Callable[[float], bool] = lambda seconds: False
    ) -> Ended:
        """Runs a command with its files in `out`."""
        return self.spawn(action(name, self.base, self.out, resume), until)

    def spawn(
        self, run: Callable[[], object], until: Callable[[float], bool] = lambda seconds: False
    ) -> Ended:
        """Runs what a command does in a fork, until it ends or `until`, given seconds, kills it."""
        self.place.mkdir(parents=True, exist_ok=True)
        said, outside = self.place / "said.txt", self.place / "outside.txt"
        for file in (said, outside):
            file.write_text("")
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            _run_and_exit(run, self.place, self.out)
        os.setpgid(process, process)  # by the fork too: it may be killed before it has begun
        began = time.monotonic()
        found, status = 0, 0
        while not found:
            found, status = os.waitpid(process, os.WNOHANG)
            seconds = time.monotonic() - began
            if not found and (seconds > LIMIT or until(seconds)):
                os.killpg(process, signal.SIGKILL)
                found, status = os.waitpid(process, 0)
            time.sleep(0.0005)
        lines = sorted(set(outside.read_text().splitlines()))
        return Ended(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), lines)

    def differences(self, name: str) -> Line:
        """What in `out` is not as in a run without faults, and which files such a run has not."""
        whole, second = self.base / "whole" / name, self.base / "second" / name
        usual, again, found = contents(whole), contents(second), contents(self.out)
        same = {key for key in usual if again.get(key) == usual[key]}
        differs = [key for key in same if found.get(key) != usual[key]]
        litter = files(self.out) - files(whole) - files(second)
        kept = ([n for n in names if not n.startswith(LEFT_OUT)] for names in (differs, litter))
        return dict(zip(("differs", "litter"), (sorted(names)[:5] for names in kept), strict=True))


def files(folder: Path) -> set[str]:
    """Names of the files in a folder and below."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# -- in the fork -----------------------------------------------------------------------------------


def _run_and_exit(run: Callable[[], object], place: Path, inside: Path) -> None:
    os.setpgid(0, 0)
    code = 1
    try:
        log = os.open(place / "said.txt", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for name in ("home", "tmp", "work"):
            (place / name).mkdir(exist_ok=True)
        os.environ |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
        tempfile.tempdir = None
        os.chdir(place / "work")
        _watch(os.open(place / "outside.txt", os.O_WRONLY | os.O_APPEND), inside.resolve())
        run()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(log: int, inside: Path) -> None:
    """Logs files that are opened to write, made or removed elsewhere."""
    own, writes = os.getpid(), os.O_WRONLY | os.O_RDWR | os.O_CREAT
    # What libraries keep in HOME and TMPDIR is theirs.
    kept = (os.environ["HOME"], os.environ["TMPDIR"], "/dev", "/proc")
    allowed = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in (inside, *kept))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        flags = None
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & writes:
                return
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"):
            path = arguments[1] if event == "os.rename" else arguments[0]
        else:
            return
        if isinstance(path, int) or os.getpid() != own or arguments[-1] not in (-1, flags):
            return  # the last one is an open folder, when a tree is removed
        full = os.path.realpath(os.fsdecode(path))
        if not f"{full}{os.sep}".startswith(allowed):
            os.write(log, f"{event} {full}\n".encode())

    sys.addaudithook(hook)
