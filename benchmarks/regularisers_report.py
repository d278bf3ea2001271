"""The tables of docs/results.md about few samples, from what `regularisers.py` has written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from regularisers import METHODS, OURS, PLANS
from schemes_statistics import Run, mean_cell, ratio_cell
from tables import table

ARCHIVE = "regularisers.jsonl"
COLUMNS = {
    "end": "held-out, end",
    "best": "held-out, best",
    "energy": "energy distance",
    "frechet": "Frechet distance",
    "copies": "copies",
    "coverage": "coverage",
    "kl": "KL",
}


def tables(archive: Path) -> dict[str, str]:
    """The learning rates, and a table for each set that plain training was run on."""
    if not archive.exists():
        return {}
    runs = [json.loads(line)["record"] for line in archive.read_text().splitlines()]
    found, settings = {}, []
    for name, plan in PLANS.items():
        own = [run for run in runs if run["plan"] == name]
        first = [run for run in own if (run["method"], run["seed"]) == ("plain", 0)]
        if not first:
            continue
        rates = {run["lr"]: run["best"] for run in first}
        lr = min(rates, key=rates.__getitem__)
        plain = _of([run for run in own if run["lr"] == lr], "plain")
        tried = ", ".join(f"{rate:g}: {best:.4f}" for rate, best in sorted(rates.items()))
        collapsed = f"{plain[0]['boundary']['collapsed']:.3f}"
        settings.append([name, str(plan.steps), f"{lr:g}", tried, collapsed])
        found[f"few samples, {name}"] = _set([run for run in own if run["lr"] == lr], plain)
    head = ["data-N", "steps", "learning rate", "plain's best held-out loss by rate, seed 0"]
    return {"few samples: settings": table([*head, "smoothed from t"], settings), **found}


def _set(runs: Sequence[Run], plain: Sequence[Run]) -> str:
    keys = [key for key in COLUMNS if key in plain[0]]
    rows = [(method, _of(runs, method)) for method in ("plain", *OURS)]
    for method, settings in METHODS.items():
        for setting in settings if method != "EMA" else ():
            label = f"{method} {setting:g}" if len(settings) > 1 else method
            rows.append((label, _of(runs, method, setting)))
    for average in _of(runs, "EMA"):
        for decay, found in average["averages"].items():
            rows.append((f"EMA {decay}", [average | found]))
    head = ["method", "seeds", *(COLUMNS[key] for key in keys)]
    head += ["end / plain's end", "end / plain's best", "time / plain's"]
    return table(head, [_row(label, own, plain, keys) for label, own in rows if own])


def _of(runs: Sequence[Run], method: str, setting: float = 0.0) -> list[Run]:
    own = [run for run in runs if run["method"] == method and run["setting"] == setting]
    return sorted(own, key=lambda run: run["seed"])


def _row(label: str, own: Sequence[Run], plain: Sequence[Run], keys: Sequence[str]) -> list[str]:
    def ratio(above: str, below: str) -> str:
        return ratio_cell(np.array([r[above] for r in own]), np.array([r[below] for r in plain]))

    cells = [mean_cell([run.get(key, math.nan) for run in own]) for key in keys]
    ratios = (ratio("end", "end"), ratio("end", "best"), ratio("seconds", "seconds"))
    return [label, str(len(own)), *cells, *ratios]
