"""The top of the page of a run: what it is, the verdict, warnings, and the main numbers."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from html import escape
from typing import TypeVar

from stagewise.recipes.report_facts import Facts, number, percent
from stagewise.recipes.report_html import definitions, paragraph, tile
from stagewise.recipes.report_verdict import verdict
from stagewise.velocity_probe import STAGES

__all__ = ["data_of", "date_of", "head", "model_of", "safely", "steps_of"]

_Given = TypeVar("_Given")

_CALLBACKS = (
    ("bank", "PosteriorMonitor"),
    ("velocity", "VelocityErrorMonitor"),
    ("memorization", "MemorizationMonitor"),
    ("guard", "MemorizationGuard"),
    ("forecasts", "Forecast"),
    ("transitions", "StageTransitions"),
)


def head(facts: Facts, title: str) -> str:
    """Title, what and when, verdict, warnings, and the main numbers."""
    about = {
        "Model": model_of(facts),
        "Data": data_of(facts),
        "Trained on": facts.trained_on,
        "Steps": steps_of(facts),
        "Date": f"{date_of(facts)} (last measurement)",
        "Measured by": ", ".join(name for kind, name in _CALLBACKS if facts.run.of(kind)),
    }
    lines = [*facts.run.problems, *_stopped(facts), *_not_finite(facts)]
    warnings = "".join(paragraph(line, "warn") for line in lines)
    return (
        f"<h1>{escape(title)}</h1>{definitions(about)}"
        + safely(lambda facts: paragraph(verdict(facts), "verdict"), facts)
        + warnings
        + safely(_tiles, facts)
    )


def model_of(facts: Facts) -> str:
    """The trained network, in words."""
    about = facts.about or facts.run.first("memorization") or facts.run.first("guard")
    size = f"{number(facts.parameters)} parameters" if facts.parameters else ""
    parts = (about.get("network"), size, about.get("maker") or about.get("seam"))  # its name before
    return "; ".join(str(part) for part in parts if part)


def data_of(facts: Facts) -> str:
    """The training data, in words."""
    about, name = facts.bank, facts.settings.get("data._target_", "").rpartition(".")[2]
    if not about:
        return name
    shape = " × ".join(map(str, about.get("shape", [])))
    text = f"{number(about.get('rows'))} rows of {shape} numbers"
    text += f", standard deviation {number(about.get('std'))}"
    if about.get("classes"):
        over = "the rows of a class" if about.get("class_wise") else "all rows"
        text += f", {about['classes']} classes, posterior over {over}"
    return f"{name}: {text}" if name else text


def steps_of(facts: Facts) -> str:
    """The last step, and how many are planned."""
    planned = f" of {facts.planned} planned" if facts.planned else ""
    return f"measured up to step {facts.step}{planned}"


def date_of(facts: Facts) -> str:
    """The date of the last measurement."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.run.written))


def _stopped(facts: Facts) -> list[str]:
    """A warning if a run has not reached its end, by the monitors of its model."""
    last = (facts.probes or facts.samples or [{}])[-1]
    if not facts.planned or last.get("at_end") or facts.step >= facts.planned:
        return []
    measured = f"The last measurement is of step {facts.step} of {facts.planned}"
    if not last:
        return [f"{measured}. These files do not tell whether the run reached its end."]
    place = shlex.quote(str(facts.run.folder))
    return [
        f"{measured}: the run was stopped before its end, or is still running. To continue it, "
        f"repeat its command with run_dir={place} resume=true."
    ]


def _not_finite(facts: Facts) -> list[str]:
    found = facts.run.first("non-finite")
    if not found:
        return []
    return [
        f"At step {found['step']} the loss or its gradient was not finite: see Events. A lower "
        "learning rate, or gradient clipping, is the usual cure."
    ]


def _tiles(facts: Facts) -> str:
    last, tiles = facts.last, []
    if facts.run.of("probe") or math.isfinite(facts.boundary.midpoint):
        for name, (t, interval) in facts.crossings.items():
            tiles.append(tile(name, t, interval and f"95 % interval {interval}"))
    if last is not None:
        loss, floor = (facts.mean(last, "train", key) for key in ("conditional", "floor"))
        tiles.append(tile("loss", str(loss), f"of which floor {number(floor.mean)}"))
        navigation = number(facts.stage(last, STAGES[0], "oracle"))
        excess = facts.stage(last, STAGES[0], "excess")
        about_it = f"{percent(excess)} of the floor there" if math.isfinite(excess) else ""
        tiles.append(tile("above the floor in navigation", navigation, about_it))
        if math.isfinite((gap := facts.gap(last)).mean):
            tiles.append(tile("held-out minus training error", str(gap), "over all t"))
    if facts.samples:
        share, interval = facts.share_of_copies
        tiles.append(tile("share of copies", share, interval and f"95 % exact interval {interval}"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def safely(part: Callable[[_Given], str], given: _Given) -> str:
    """A part of the page, or why it cannot be made."""
    try:
        return part(given)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return paragraph(
            "This part cannot be made: the events have another shape than in this version of "
            f"stagewise. They may be from an older version ({error!r}).",
            "warn",
        )
