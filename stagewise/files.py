"""Files: one writer that leaves no half-written file, and what error messages of files share."""

from __future__ import annotations

import errno
import math
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

__all__ = [
    "Damaged",
    "FilePath",
    "Problem",
    "first_line",
    "is_full",
    "jsonable",
    "joined",
    "replace_file",
]

FilePath: TypeAlias = "str | os.PathLike[str]"

_PARTIAL = re.compile(r"\..*\.(?:([0-9a-f]{8})-(\d{1,7})-)?[0-9a-f]{8}\.partial")
"""Names of files that are being written; older versions did not name the process."""

_DAY = 86400

_FULL = re.compile("unexpected pos|PytorchStreamWriter|requested and .* written|No space left")
"""What torch and numpy say if the disk is full."""


class Problem(ValueError):
    """A file that cannot be used."""


class Damaged(Problem):
    """A file that differs from what was written."""

    @classmethod
    def of(cls, path: FilePath, why: str, kind: str = "damaged") -> Damaged:
        """The error of a file, with the reason."""
        return cls(f"{os.fspath(path)} is {kind}: {why}. Copy or write it again.")


# -- writing ----------------------------------------------------------------------------------


def replace_file(path: FilePath, write: Callable[[Path], object], sync: bool = True) -> None:
    """Writes a file under a temporary name in the same folder, and renames it when it is complete.

    `path` never holds half a file. A process that is killed leaves `.NAME.….partial`, which the
    next writer in the folder removes.

    Args:
        path: The file, which may exist.
        write: Writes the file at the path that it is given.
        sync: Whether to wait until it is on the disk, default True.

    Raises:
        OSError: If the disk is full, or the folder cannot be written to; `path` is unchanged.
    """
    path = Path(path)
    _sweep(path.parent)
    # A name may have 255 bytes, and `path` may have as many.
    stem = path.name.encode()[:150].decode(errors="ignore")
    made = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial = path.with_name(f".{stem}.{made}.partial")
    _begun.add(partial.name)
    try:
        write(partial)
        if sync:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        if is_full(error):
            full = OSError(
                f"No space left on device: {path} could not be written; a file that was there is "
                f"unchanged. Make room in {path.parent}, or choose another folder."
            )
            full.errno = errno.ENOSPC
            raise full from error
        if isinstance(error, OSError) and error.filename in (str(partial), partial):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()
        _begun.discard(partial.name)


_begun: set[str] = set()
_swept: dict[Path, float] = {}


def _sweep(folder: Path) -> None:
    """Removes from a folder the partial files of processes that have ended."""
    began = time.monotonic()
    if began < _swept.get(folder, 0.0):
        return
    with suppress(OSError), os.scandir(folder) as listing:
        for item in listing:
            match = _PARTIAL.fullmatch(item.name)
            if match and item.name not in _begun:
                with suppress(OSError):
                    old = time.time() - item.stat(follow_symlinks=False).st_mtime > _DAY
                    if old or (match[1] == _machine() and not _is_alive(int(match[2]))):
                        os.unlink(item.path)
    # Folders may hold a million files: listing them takes at most a 50th of the time.
    now = time.monotonic()
    _swept[folder] = now + 50 * (now - began)


def _is_alive(process: int) -> bool:
    """Whether another process has this number; True if the system does not tell."""
    if process == os.getpid():
        return False
    try:
        if os.name == "posix":  # elsewhere signal 0 ends the process
            os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


@cache
def _machine() -> str:
    """A name for the host and container: process numbers are unique within it."""
    try:
        place = os.readlink("/proc/self/ns/pid")
    except OSError:
        place = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {place}'.encode()):08x}"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says that a disk is full."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    while error is not None:
        if getattr(error, "errno", None) in codes or _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# -- words and numbers ------------------------------------------------------------------------


def joined(paths: Iterable[object], most: int = 5) -> str:
    """The first names for a message, and how many more there are."""
    listed = [str(path) for path in paths]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def first_line(error: Exception) -> str:
    """The beginning of another library's message."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def jsonable(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks, and lists for tuples."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
