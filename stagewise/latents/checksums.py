"""Finds damaged latents. `.npy` files have no place for checksums, which are beside them.

FOLDER/.crc32.json        the CRC-32 of each file in a folder, by its path there
.FILE.npy.crc32.json      the CRC-32 of a single file, and of its labels
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from stagewise.files import Problem, joined, replace_file
from stagewise.latents.arrays import check_zip, outside
from stagewise.tensor_files import Entry

if TYPE_CHECKING:
    from stagewise.latents.base import Latents

__all__ = [
    "Compared",
    "compare_files",
    "compare_tensors",
    "compare_zip",
    "problems",
    "write_checksums",
]

Compared: TypeAlias = "tuple[list[str], list[Path]]"
"""What does not match its checksum, and the files and folders that have none."""


def _note(root: Path) -> Path:
    return root / ".crc32.json" if root.is_dir() else root.with_name(f".{root.name}.crc32.json")


def write_checksums(root: Path, files: Iterable[Path]) -> Path:
    """Writes the checksums of files into `root` if it is a folder, else beside it."""
    note = _note(root)
    sums = {file.relative_to(note.parent).as_posix(): _crc32(file) for file in files}
    replace_file(note, lambda partial: partial.write_text(json.dumps(sums)))
    return note


def compare_files(root: Path) -> Compared:
    """Compares the files of `write_checksums`."""
    note = _note(root)
    if not note.is_file():
        return [], [root]
    cure = f"Copy or write it again; if it was changed on purpose, delete {note}."
    try:
        sums = json.loads(note.read_bytes())
        names = [name for name in sums if not outside(name)]
        changed = [name for name in names if _crc32(note.parent / name) != sums[name]]
    except FileNotFoundError as error:
        return [f"{error.filename} is gone. {cure}"], []
    except (AttributeError, TypeError, ValueError):
        return [f"{note} cannot be read. {cure}"], []
    return [f"{note.parent / name} does not match its checksum. {cure}" for name in changed], []


def compare_tensors(files: Iterable[Mapping[str, Entry]]) -> Compared:
    """Compares the tensors of safetensors files."""
    wrong, unknown = [], []
    for entries in files:
        try:
            unknown += [entry.path for entry in entries.values() if not entry.verify()][:1]
        except (Problem, OSError) as error:
            wrong.append(str(error))
    return wrong, unknown


def compare_zip(file: Path) -> Compared:
    """Compares the members of a file that may be a zip, whose format has checksums."""
    try:
        return [], [] if check_zip(file) else [file]
    except Problem as error:
        return [str(error)], []


def problems(latents: Latents) -> list[str]:
    """What is wrong with files, labels, rows and flips; warns of files without checksums."""
    wrong, unknown = latents._compare()
    if unknown:
        warnings.warn(
            f"Not checked: {joined(unknown)} {'have' if len(unknown) > 1 else 'has'} no "
            "checksums. All numbers are read and must be finite; whether they are those that "
            "were written is not known.",
            stacklevel=3,
        )
    try:
        _ = latents.labels  # some formats read them here
    except ValueError as error:
        wrong.append(str(error))
    every = latents.with_options(flips="both" if latents.has_flips else "none", moments="mean")

    def problem(start: int, stop: int) -> str:
        try:
            finite = every.rows(start, stop).isfinite().all()
        except (ValueError, OSError) as error:
            return f"cannot be read: {error}"
        return "" if finite else "has NaN or Inf. Encode it again."

    block = max(1, 2**22 // math.prod(latents.shape))
    for start in range(0, len(every), block):
        stop = min(start + block, len(every))
        for index in range(start, stop) if problem(start, stop) else ():
            if why := problem(index, index + 1):
                row, flip = every._locate(index)
                wrong.append(f"row {row}{' (flip)' * flip} {why}")
    return wrong


def _crc32(file: Path) -> int:
    return zlib.crc32(file.read_bytes())
