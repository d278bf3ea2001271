"""The files of a run: the events of its monitors, their pictures, its configuration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stagewise.stages import StageBoundary

__all__ = ["Event", "RunFiles", "boundary_of", "flat", "read_run", "runs_in", "stage_bounds"]

Event = dict[str, Any]


@dataclass
class RunFiles:
    """The files of the run in a folder.

    Events are sorted by kind (their "event") and step, and have their folder under "folder".
    """

    folder: Path
    events: dict[str, list[Event]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # a line for each that could not be read
    config: str | None = None  # the text of `config.yaml`
    written: float = 0.0  # time of the last event, in seconds since 1970

    def of(self, kind: str) -> list[Event]:
        """The events of a kind, from the first folder that has some."""
        found = self.events.get(kind, [])
        return [event for event in found if event["folder"] == found[0]["folder"]]

    def first(self, kind: str) -> Event:
        """The first event of a kind; empty if there is none."""
        return next(iter(self.of(kind)), {})

    def boundary(self) -> StageBoundary:
        """The stage boundary of this run.

        From the header of the errors, which are cut there, or that of the bank, or else the first
        probe. Later probes measure with other draws.
        """
        return boundary_of(self.first("probe"), self.first("bank"), self.first("velocity"))

    def picture(self, kind: str, name: str) -> Path | None:
        """A picture beside the events of a kind."""
        found = self.of(kind)
        path = found[0]["folder"] / f"{name}.png" if found else None
        return path if path is not None and path.exists() else None


def boundary_of(*events: Event) -> StageBoundary:
    """The boundary in events; later events take precedence, and missing values are NaN."""
    held = {key: value for event in events for key, value in event.items()}
    found = {each.name: held.get(each.name) for each in fields(StageBoundary)}
    return StageBoundary(**{k: math.nan if v is None else v for k, v in found.items()})


def stage_bounds(boundary: StageBoundary) -> list[float]:
    """The times between which each stage lies."""
    middle, late = (1.0 if math.isnan(t) else t for t in (boundary.midpoint, boundary.collapsed))
    return [0.0, middle, max(middle, late), 1.0]


def read_run(folder: Path) -> RunFiles:
    """Reads all `stages.jsonl` under a folder; broken lines are listed under `problems`.

    Raises:
        ValueError: If there is no such folder, or no events in it.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"Expected the folder of a run, got a file, {folder}.")
        raise ValueError(f"There is no folder {folder}.")
    files = sorted(file for file in folder.rglob("stages.jsonl") if file.is_file())
    if not files:
        raise ValueError(
            f"No stages.jsonl in {folder} or below it: no monitor has written there. Give the "
            "folder of a run, or that of all its logs."
        )
    run = RunFiles(folder)
    for file in files:
        _read(file, run)
    run.written = max(file.stat().st_mtime for file in files)
    if not run.events:
        why = "; ".join(run.problems) or "its stages.jsonl holds no line yet"
        raise ValueError(f"No event could be read in {folder}: {why}")
    for found in run.events.values():
        found.sort(key=lambda event: event.get("step", -1))  # stable: the order of the file
    config = folder / "config.yaml"
    if config.is_file():
        run.config = config.read_text(errors="replace")
    return run


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, the newest first; the folder itself if it is one.

    A run is the nearest folder above a `stages.jsonl` with a `config.yaml`, or else the folder
    that holds the folders of monitors.
    """
    written: dict[Path, float] = {}
    for file in folder.rglob("stages.jsonl"):
        above = [place for place in file.parents if place.is_relative_to(folder)]
        run = next((place for place in above if (place / "config.yaml").is_file()), above[:2][-1])
        written[run] = max(written.get(run, 0.0), file.stat().st_mtime)
    outer = [run for run in written if written.keys().isdisjoint(run.parents)]
    return sorted(outer, key=lambda run: -written[run])


_NEEDED = {
    "transition": ("step", "message"),
    "non-finite": ("step", "rows"),
    "training_window": ("step", "from_step", "draws", "stages"),
    "velocity_probe": ("step", "train"),
    "probe": ("step", "t", "top1"),
}
"""The keys of an event that the page reads."""


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, interpolations of a `DictConfig` resolved."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, dict):
        return {prefix: config}
    parts = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in config.items())
    return {key: value for name, part in parts for key, value in flat(part, name).items()}


def _read(file: Path, run: RunFiles) -> None:
    text = file.read_text(errors="replace")
    lines, name = text.splitlines(), file.relative_to(run.folder)
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            kind, step = event["event"], event.get("step", 0)
            needed = _NEEDED.get(kind, ())
            whole = isinstance(kind, str) and isinstance(step, int)
            whole = whole and all(key in event for key in needed)
            whole = whole and (kind != "velocity_probe" or isinstance(event["train"], dict))
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            cut = number == len(lines) and not text.endswith("\n")
            why = "cut short, as when a run is killed" if cut else "no event"
            run.problems.append(f"{name}, line {number}: {why}; left out")
            continue
        run.events.setdefault(kind, []).append({**event, "folder": file.parent})
