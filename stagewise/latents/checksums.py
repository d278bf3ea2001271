"""Checksums beside `.npy` files, which have no place for one.

FOLDER/.crc32.json        the CRC-32 of each file below a folder, by its name there
.FILE.npy.crc32.json      that of a file by itself, and of its labels
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from stagewise.files import replace_file
from stagewise.latents.arrays import outside

__all__ = ["compare_files", "write_checksums"]


def _note(root: Path) -> Path:
    return root / ".crc32.json" if root.is_dir() else root.with_name(f".{root.name}.crc32.json")


def write_checksums(root: Path, files: Iterable[Path]) -> Path:
    """Notes those of files that were written, in a folder `root` or beside the file that it is."""
    note = _note(root)
    sums = {file.relative_to(note.parent).as_posix(): _crc32(file) for file in files}
    replace_file(note, lambda partial: partial.write_text(json.dumps(sums)))
    return note


def compare_files(root: Path) -> tuple[list[str], list[Path]]:
    """What does not match its checksum, and `root` itself if there is no note of any."""
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


def _crc32(file: Path) -> int:
    return zlib.crc32(file.read_bytes())
