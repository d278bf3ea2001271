"""Files: one writer that leaves no half-written file, and the words that errors of files share."""

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
"""Names of files that are being written; older versions did not say by which process."""

_DAY = 86400

_FULL = re.compile("unexpected pos|PytorchStreamWriter|requested and .* written|No space left")
"""What torch and numpy say where the system says that a disk is full."""


class Problem(ValueError):
    """A file that cannot be used."""


class Damaged(Problem):
    """A file that is not what was written."""

    @classmethod
    def of(cls, path: FilePath, why: str, kind: str = "damaged") -> Damaged:
        """The error of a file, with the reason."""
        return cls(f"{os.fspath(path)} is {kind}: {why}. Copy or write it again.")


# -- writing ----------------------------------------------------------------------------------


def replace_file(path: FilePath, write: Callable[[Path], object], sync: bool = True) -> None:
    """Writes a file under another name beside its own, and renames it when it is complete.

    There is never half a file at `path`. A process that is killed leaves `.NAME.….partial`, which
    the next one that writes into the folder removes.

    Args:
        path: The file, which may be there already.
        write: Writes the file whose name it is given.
        sync: Whether to wait until it is on the disk, default True.

    Raises:
        OSError: If the disk is full, or the folder cannot be written to; `path` is as before.
    """
    path = Path(path)
    _sweep(path.parent)
    # A name may have 255 bytes, and the file's own may be as long.
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
                f"No space left on device: {path} could not be written, and what was there before "
                f"is unchanged. Make room in {path.parent}, or choose another folder."
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
    """Removes from a folder what processes that are no more have begun to write."""
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
    # Folders may hold a million files: at most a 50th of the time goes into listing them.
    now = time.monotonic()
    _swept[folder] = now + 50 * (now - began)


def _is_alive(process: int) -> bool:
    """Whether there is another process of this number; where one cannot ask, it is taken as so."""
    if process == os.getpid():
        return False
    try:
        if os.name == "posix":  # elsewhere signal 0 is no question
            os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


@cache
def _machine() -> str:
    """A name for what the numbers of processes count on: a host, and a container on it."""
    try:
        place = os.readlink("/proc/self/ns/pid")
    except OSError:
        place = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {place}'.encode()):08x}"


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full, in the system's words or in those of a library."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    while error is not None:
        if getattr(error, "errno", None) in codes or _FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# -- words and numbers ------------------------------------------------------------------------


def joined(paths: Iterable[object], most: int = 5) -> str:
    """A few names for a message, and how many more there are."""
    listed = [str(path) for path in paths]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def first_line(error: Exception) -> str:
    """The beginning of what another library's error says."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def jsonable(value: Any) -> Any:
    """The same with NaN and infinities, which JSON does not know, as None, and tuples as lists."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
