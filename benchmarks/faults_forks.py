"""Trials of the fault campaign, each in a process of its own.

Python, torch and the commands are imported once: each trial is a fork, which takes milliseconds
where a new process takes seconds. It has a HOME, a TMPDIR and a working directory of its own, and
notes which files it opens to write outside of its folder.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Changes", "Ended", "Line", "Trial", "about", "spawn"]

Line: TypeAlias = "dict[str, Any]"
"""What is kept of a trial."""
Trial: TypeAlias = "tuple[str, Callable[[], Line]]"
"""Its name, and what makes it."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int  # negative: by that signal
    said: str
    outside: list[str]

    @property
    def raw(self) -> bool:
        """Whether it ended in a traceback, where one line should be, or by a signal of its own."""
        return "Traceback (most recent call last)" in self.said or self.code < -signal.SIGKILL


def about(*ends: Ended) -> Line:
    """What is wrong with any trial."""
    return {
        "raw": any(ended.raw for ended in ends),
        "outside": sorted({path for ended in ends for path in ended.outside})[:5],
    }


def spawn(
    action: Callable[[], object],
    place: Path,
    inside: Path,
    until: Callable[[float], bool] = lambda seconds: False,
    limit: float = 300.0,
) -> Ended:
    """Runs an action in a fork, until it ends or `until` says that it is to be killed.

    Args:
        action: What a command does.
        place: A folder for what it says, its HOME and its working directory.
        inside: Where it may write.
        until: Asked all the time, with the seconds since it began.
        limit: Seconds after which it hangs.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "said.txt").write_text("")
    (place / "outside.txt").write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _run_and_exit(action, place, inside)
    began = time.monotonic()
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            break
        seconds = time.monotonic() - began
        if seconds > limit or until(seconds):
            os.killpg(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            break
        time.sleep(0.0005)
    said = (place / "said.txt").read_text(errors="replace")
    outside = sorted(set((place / "outside.txt").read_text().splitlines()))
    return Ended(os.waitstatus_to_exitcode(status), said, outside)


def _run_and_exit(action: Callable[[], object], place: Path, inside: Path) -> None:
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
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 0 if end.code is None else code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(log: int, inside: Path) -> None:
    """Notes files that are opened to write, made or removed elsewhere."""
    own, writes = os.getpid(), os.O_WRONLY | os.O_RDWR | os.O_CREAT
    # What libraries keep in HOME and TMPDIR is theirs.
    kept = (os.environ["HOME"], os.environ["TMPDIR"], "/dev", "/proc")
    allowed = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in (inside, *kept))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        flags = None
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & writes:
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
