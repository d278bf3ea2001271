"""What `stagewise encode` records beside the latents, so that a stopped run can be resumed.

    encode.json                  the settings; at the end also the number of rows, the pictures that
                                 were left out or converted, and hashes of the files over all rows
    encode_rank00.json           the blocks that a rank has written, each with hashes of its files
                                 and of its part of the next file
    encode_rank00_pictures.bin   for each picture a stamp and a hash of what was read, 8 bytes each
    classes.json                 the names of the classes

Ranks do not communicate: each has a record of its own, and all write the same `encode.json`.

A resumed run compares contents, not names, and encodes blocks again if their files or pictures have
changed. It reads all files, but pictures only if their stamp (size and times of writing and of any
change) differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from stagewise.files import replace_file
from stagewise.recipes.image_folder import Batch, ImageList, read_stamped, stamp

__all__ = ["SETTINGS", "Record"]

SETTINGS = "encode.json"

Files: TypeAlias = "Callable[[int, Sequence[int]], list[Path]]"
"""The files of a block, from its number among those with rows and its pictures with rows."""

_CHECKSUM = "checksum"
_MOST_NAMES = 5  # of converted pictures, for each kind and block


class Record:
    """The record of a rank.

    A rank has `count` contiguous pictures from `start` on, so rows are in the order of the list for
    any number of ranks. They are cut into blocks, numbered from 0. `skipped` holds the names of the
    pictures left out, with the reason.
    """

    def __init__(
        self, folder: Path, rank: int, ranks: int, images: ImageList, size: int, files: Files
    ) -> None:
        self.folder, self.rank, self.ranks, self.images = folder, rank, ranks, images
        total = len(images.files)
        self.start = total * rank // ranks
        self.count = total * (rank + 1) // ranks - self.start
        self.skipped: dict[str, str] = {}
        self._size, self._files_of = size, files
        # Of each block: its number among those with rows, a hash of its files, conversions.
        self._blocks: list[dict[str, Any]] = [{} for _ in range(0, self.count, size)]
        self._seen = np.zeros((self.count, 2), dtype="<u8")

    def begin(self, settings: dict[str, Any], resume: bool) -> None:
        """Reads the progress of this rank; refuses a folder of other things or other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Listed first, since another rank may be writing its settings now.
        found = sorted(item.name for item in self.folder.iterdir() if not item.name.startswith("."))
        if found and not (self.folder / SETTINGS).is_file():
            raise FileExistsError(
                f"Expected a new or empty folder, got {self.folder} with {found[0]} and no "
                f"{SETTINGS}. Choose another."
            )
        self.require_same(settings)
        if note := _read(self._note(self.rank)):
            self._blocks, self.skipped = note["blocks"], note["skipped"]
            if not resume:
                raise FileExistsError(
                    f"{self.folder} holds {self.done} of {self.count} pictures of rank {self.rank} "
                    "already. Continue with --resume, or choose another folder."
                )
            held = self._pictures.read_bytes() if self._pictures.is_file() else b""
            held = held[: self._seen.nbytes].ljust(self._seen.nbytes, b"\0")
            self._seen = np.frombuffer(held, dtype="<u8").reshape(-1, 2).copy()

    def require_same(self, settings: dict[str, Any]) -> None:
        """Refuses settings that differ from those of the folder."""
        held = _read(self.folder / SETTINGS).get("settings", settings)
        differ = {name: value for name, value in settings.items() if held.get(name) != value}
        if differ.keys() - {"vae"}:  # the same weights may have moved
            named = [f"{name} ({held.get(name)} there, {differ[name]} here)" for name in differ]
            raise ValueError(
                f"{self.folder} holds latents that were made with other settings: "
                f"{', '.join(named)}. Use the same settings, or choose another folder."
            )

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes settings, classes and the record of this rank, before the first picture."""
        self.require_same(settings)
        _write(self.folder / SETTINGS, {"settings": settings})
        self._write_classes()
        self._save()

    # -- blocks -----------------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """How many pictures are written or left out."""
        return self.count - sum(len(self.indices(block)) for block in self.missing())

    def indices(self, block: int) -> range:
        """The pictures of a block."""
        first = self.start + block * self._size
        return range(first, min(first + self._size, self.start + self.count))

    def missing(self) -> list[int]:
        """The blocks that are not written."""
        return [block for block, held in enumerate(self._blocks) if "files" not in held]

    def number(self, block: int) -> int:
        """The number of a block among those with rows; it stays when the block is written again."""
        numbers = [held["number"] for held in self._blocks if held.get("number") is not None]
        own = self._blocks[block].get("number")
        return max(numbers, default=-1) + 1 if own is None else own

    def add(self, batch: Batch, indices: range) -> None:
        """Records the pictures of a batch, and which are left out."""
        names = self.images.files
        for index, found in zip(indices, batch.stamps, strict=True):
            self._seen[index - self.start] = found
        self.skipped.update({names[index]: reason for index, reason in batch.broken.items()})
        held = self._blocks[(indices[0] - self.start) // self._size]
        converted = held.setdefault("converted", {})
        for index, notes in batch.notes.items():
            for note in notes:
                kind = converted.setdefault(note, {"count": 0, "names": []})
                kind["count"] += 1
                kind["names"] += [names[index]][: _MOST_NAMES - len(kind["names"])]

    def close_block(self, block: int) -> None:
        """Records that a block is on the disk."""
        rows = self.with_rows(block)
        if not rows and self._blocks[block].get("number") is not None:
            # Without its number the files of the blocks would have a gap.
            raise ValueError(
                f"None of the {len(self.indices(block))} pictures that were encoded before as one "
                "block can be read, the first is "
                f"{self.images.folder / self.images.files[self.indices(block)[0]]}. Put them back "
                "and continue with --resume, or encode into another folder."
            )
        number = self.number(block) if rows else None
        hashed = "" if number is None else file_hash(self._files_of(number, rows))
        self._blocks[block] |= {"number": number, "files": hashed}
        self._blocks[block]["pictures"] = self._seen_hash(block)
        replace_file(self._pictures, lambda name: self._seen.tofile(name))
        self._save()

    def drop_damaged(self) -> list[str]:
        """Drops the blocks whose files are missing or damaged, and returns a line for each.

        Refuses pictures of other blocks that have changed since they were encoded.
        """
        whole = [block for block, held in enumerate(self._blocks) if "files" in held]
        with ThreadPoolExecutor(16) as pool:  # on a network drive each file takes a while
            found = pool.map(lambda block: self._damaged(block) or self._replaced(block), whole)
            faults = {block: fault for block, fault in zip(whole, found, strict=True) if fault}
        for block, fault in faults.items():
            if isinstance(fault, Path) and (listed := self._files(block)):
                raise ValueError(
                    f"{fault} has changed since it was encoded. Put the old picture back, or "
                    f"delete {listed[0]}: then --resume encodes the {len(self.indices(block))} "
                    "pictures of its block again."
                )
        for block in faults:
            # All files: a picture that can no longer be read leaves no row.
            for file in self._files(block):
                file.unlink(missing_ok=True)
            for index in self.indices(block):
                self.skipped.pop(self.images.files[index], None)
            self._blocks[block] = {"number": self._blocks[block]["number"]}
        if faults:
            self._save()
        return [
            f"{fault}: {len(self.indices(block))} pictures are encoded again."
            for block, fault in faults.items()
            if isinstance(fault, str)
        ]

    def _damaged(self, block: int) -> str:
        if self._seen_hash(block) != self._blocks[block]["pictures"]:
            return f"{self._pictures} is missing or damaged"
        listed = self._files(block)
        if file_hash(listed) == self._blocks[block]["files"]:
            return ""
        more = f" or one of the {len(listed) - 1} that follow" if len(listed) > 1 else ""
        return f"{listed[0]}{more} is missing or damaged"

    def _replaced(self, block: int) -> Path | None:
        for index in self.indices(block):
            file = self.images.folder / self.images.files[index]
            mark, content = self._seen[index - self.start]
            # A file that was copied or touched has another stamp and the same contents.
            if stamp(file.stat()) != mark and read_stamped(file)[0][1] != content:
                return file
        return None

    def _files(self, block: int) -> list[Path]:
        number = self._blocks[block]["number"]
        return [] if number is None else self._files_of(number, self.with_rows(block))

    def with_rows(self, block: int) -> list[int]:
        """The pictures of a block that are not left out."""
        files = self.images.files
        return [index for index in self.indices(block) if files[index] not in self.skipped]

    # -- all ranks --------------------------------------------------------------------------------

    def all_notes(self) -> tuple[dict[str, str], dict[str, Any]] | None:
        """What all ranks left out and converted; None before all ranks are done."""
        notes = [_read(self._note(rank)) for rank in range(self.ranks)]
        if any(not note or note["done"] < note["of"] for note in notes):
            return None
        skipped = {name: reason for note in notes for name, reason in note["skipped"].items()}
        converted: dict[str, Any] = {}
        for block in (block for note in notes for block in note["blocks"]):
            for kind, held in block.get("converted", {}).items():
                total = converted.setdefault(kind, {"count": 0, "names": []})
                total["count"] += held["count"]
                total["names"] += held["names"]
        return skipped, converted

    def close(self, about: dict[str, Any], files: Iterable[Path]) -> None:
        """Writes `about`, and hashes of the files over all rows."""
        files = [self._write_classes(), *files]
        held = _read(self.folder / SETTINGS)
        hashes = {file.relative_to(self.folder).as_posix(): file_hash([file]) for file in files}
        _write(self.folder / SETTINGS, {**held, **about, "files": hashes})

    def is_closed(self) -> bool:
        """Whether all files are written, also those over all rows."""
        hashes: dict[str, str] = _read(self.folder / SETTINGS).get("files", {})
        whole = (file_hash([self.folder / name]) == wanted for name, wanted in hashes.items())
        return bool(hashes) and not self.missing() and all(whole)

    # -- files ------------------------------------------------------------------------------------

    def _save(self) -> None:
        held = {"done": self.done, "of": self.count, "skipped": self.skipped}
        _write(self._note(self.rank), held | {"blocks": self._blocks})

    def _write_classes(self) -> Path:
        file, text = self.folder / "classes.json", json.dumps(self.images.classes, indent=1) + "\n"
        replace_file(file, lambda name: name.write_text(text))
        return file

    def _note(self, rank: int) -> Path:
        return self.folder / f"encode_rank{rank:02d}.json"

    @property
    def _pictures(self) -> Path:
        return self.folder / f"encode_rank{self.rank:02d}_pictures.bin"

    def _seen_hash(self, block: int) -> str:
        first = block * self._size
        return _hash(self._seen[first : first + self._size].tobytes())


def file_hash(files: Sequence[Path]) -> str:
    """A hash of the contents of files, in 16 digits; empty without files or if one is missing."""
    total = hashlib.sha256()
    for file in files:
        one = hashlib.sha256()
        try:
            with open(file, "rb") as stream:
                while block := stream.read(2**20):
                    one.update(block)
        except FileNotFoundError:
            return ""
        total.update(one.digest())
    return total.hexdigest()[:16] if files else ""


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    held: dict[str, Any] = {}
    with suppress(ValueError, TypeError):
        held = dict(json.loads(file.read_bytes()))
    if held.pop(_CHECKSUM, None) != _checksum(held):
        raise ValueError(
            f"{file} does not match its checksum: it is damaged, edited by hand or from an older "
            "version. Encode into another folder."
        )
    return held


def _write(file: Path, held: dict[str, Any]) -> None:
    text = json.dumps(held | {_CHECKSUM: _checksum(held)}, indent=1, sort_keys=True) + "\n"
    replace_file(file, lambda name: name.write_text(text))


def _checksum(held: dict[str, Any]) -> str:
    return _hash(json.dumps(held, sort_keys=True).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
