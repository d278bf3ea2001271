"""What runs of the schemes' benchmark have recorded, in one file that is kept with the results.

docs/results.md is written from docs/results.jsonl, a line for each run: who runs the benchmark
again, or goes on with it on another machine, has what was measured before. Each record says on
which processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["ARCHIVE", "pack", "unpack"]

ARCHIVE = "results.jsonl"
"""Its name, beside docs/results.md."""

_DIGITS = 6


def unpack(archive: Path, folder: Path) -> int:
    """Writes the records that `folder` does not have yet as files there; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, record in _read(archive).items():
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(record))
            count += 1
    return count


def pack(folder: Path, archive: Path) -> None:
    """Adds the records in `folder` to the archive, in place of those of the same name."""
    records = _read(archive)
    for file in sorted(folder.glob("*.json")):
        records[file.name] = _rounded(json.loads(file.read_text()))
    lines = (json.dumps({"file": name, "record": records[name]}) for name in sorted(records))
    partial = archive.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines))
    partial.replace(archive)


def _read(archive: Path) -> dict[str, Any]:
    if not archive.exists():
        return {}
    lines = map(json.loads, archive.read_text().splitlines())
    return {line["file"]: line["record"] for line in lines}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
