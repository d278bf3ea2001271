"""What `stagewise encode` notes beside the latents, so that a run that was stopped can go on.

    encode.json          the settings; at the end also the number of rows, and what was left out
    encode_rank00.json   how many pictures of its part a rank has written, after each block
    classes.json         the names of the classes

Ranks do not talk to one another: each has a note of its own, and all write the same `encode.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stagewise.files import replace_file

__all__ = ["SETTINGS", "Record"]

SETTINGS = "encode.json"


class Record:
    """The notes of a run in a folder.

    A rank has a contiguous part of the pictures: rows are in the order of the list, however many
    ranks there are.

    Attributes:
        start: The first picture of this rank.
        count: How many it has.
        done: How many of them are written, or left out.
        blocks: Of how many blocks with rows.
        skipped: Names of the pictures left out among these, with the reason.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, total: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.start = total * rank // ranks
        self.count = total * (rank + 1) // ranks - self.start
        self.done, self.blocks = 0, 0
        self.skipped: dict[str, str] = {}

    def begin(self, settings: dict[str, Any], resume: bool) -> None:
        """Finds how far this rank is; refuses a folder of something else, or of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Listed first: another rank may be writing its settings, which come before all else.
        found = sorted(item.name for item in self.folder.iterdir() if not item.name.startswith("."))
        if found and not (self.folder / SETTINGS).is_file():
            raise FileExistsError(
                f"Expected a new or empty folder, got {self.folder} with {found[0]} and no "
                f"{SETTINGS}. Choose another."
            )
        self.require_same(settings)
        note = _read(self._note(self.rank))
        if note and not resume:
            raise FileExistsError(
                f"{self.folder} holds {note['done']} of {self.count} pictures of rank {self.rank} "
                "already. Go on behind them: --resume. Or choose another folder."
            )
        if note:
            self.done, self.blocks, self.skipped = note["done"], note["blocks"], note["skipped"]
        # What a killed process left half-written; other ranks may be writing theirs now.
        whose = f"_rank{self.rank:02d}*" if self.ranks > 1 else ""
        for litter in self.folder.glob(f".*{whose}.partial"):
            litter.unlink()

    def require_same(self, settings: dict[str, Any]) -> None:
        """Refuses settings that differ from those of the folder, and names what differs."""
        held = _read(self.folder / SETTINGS).get("settings", settings)
        differ = {name: value for name, value in settings.items() if held.get(name) != value}
        if differ.keys() - {"vae"}:  # the same weights may lie elsewhere
            named = [f"{name} ({held.get(name)} there, {differ[name]} here)" for name in differ]
            raise ValueError(
                f"{self.folder} holds latents that were made in another way, and this differs: "
                f"{', '.join(named)}. Use the same, or choose another folder."
            )

    def settle(self, settings: dict[str, Any], classes: list[str]) -> None:
        """Writes settings, classes and the note of this rank, before the first picture."""
        self.require_same(settings)
        _write(self.folder / SETTINGS, {"settings": settings})
        _write(self.folder / "classes.json", classes)
        self.save()

    def save(self) -> None:
        """Writes the note of this rank."""
        held = {"done": self.done, "blocks": self.blocks, "skipped": self.skipped}
        _write(self._note(self.rank), held | {"of": self.count})

    def is_closed(self) -> bool:
        """Whether all is written, and what is over all rows too."""
        return "rows" in _read(self.folder / SETTINGS)

    def all_skipped(self) -> dict[str, str] | None:
        """What all ranks left out; None if not all of them are done."""
        notes = [_read(self._note(rank)) for rank in range(self.ranks)]
        if any(not note or note["done"] < note["of"] for note in notes):
            return None
        return {name: reason for note in notes for name, reason in note["skipped"].items()}

    def close(self, rows: int, skipped: dict[str, str]) -> None:
        """Writes how many rows there are, and what was left out."""
        held = _read(self.folder / SETTINGS)
        _write(self.folder / SETTINGS, {**held, "rows": rows, "skipped": skipped})

    def _note(self, rank: int) -> Path:
        return self.folder / f"encode_rank{rank:02d}.json"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Encode into another folder.") from error


def _write(file: Path, held: Any) -> None:
    replace_file(file, lambda name: name.write_text(json.dumps(held, indent=1) + "\n"))
