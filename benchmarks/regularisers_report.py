"""The part of docs/results.md about few samples, from what `regularisers.py` has written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from regularisers import METHODS, OURS, PLANS
from schemes_report import bootstrap, table

ARCHIVE = "regularisers.jsonl"
TITLES = {
    "photos8": "photographs 8 x 8 x 3 (D = 192), perceptron",
    "photos16": "photographs 16 x 16 x 3 (D = 768), SiT",
    "digits": "digits (D = 64), perceptron",
    "cancer": "breast cancer table (D = 30), perceptron",
    "spiral": "spiral in the plane (D = 2), perceptron",
}
COLUMNS = {
    "end": "held-out, end",
    "best": "held-out, best",
    "energy": "energy distance",
    "frechet": "Frechet distance",
    "copies": "copies",
    "coverage": "coverage",
    "kl": "KL",
}

Run = dict[str, Any]


def lines(archive: Path) -> list[str]:
    """A table for each set that plain training was run on."""
    if not archive.exists():
        return []
    runs = [json.loads(line)["record"] for line in archive.read_text().splitlines()]
    text = [
        "## Few samples: smoothing against other regularisers",
        "",
        "Written by `make bench-regularisers`. Class-conditional models, AdamW, batch 128, cosine "
        "decay. Plain training has the learning rate with the lowest held-out loss at its best, "
        "and so has every method; other regularisers have the best of the settings tried, all of "
        "which are shown, one seed each. Smoothing is not tuned: 8 neighbours, scale 1, floor 0, "
        "from the collapsed boundary on. Held-out loss with perfect early stopping is “best”. "
        "Values: mean ± half the range over seeds. 5000 samples; coverage: share of held-out "
        "samples with a made one nearer than their fifth nearest held-out neighbour; it is high "
        "for copies too. EMA: one training, averaged three ways.",
        "",
    ]
    for name in PLANS:
        own = [run for run in runs if run["plan"] == name]
        if any(run["method"] == "plain" for run in own):
            text += _set(name, own)
    return text


def _set(name: str, runs: Sequence[Run]) -> list[str]:
    plan = PLANS[name]
    rates = {run["lr"]: run["best"] for run in runs if (run["method"], run["seed"]) == ("plain", 0)}
    lr = min(rates, key=rates.__getitem__)
    runs = [run for run in runs if run["lr"] == lr]
    plain = _of(runs, "plain")
    collapsed = plain[0]["boundary"]["collapsed"]
    tried = ", ".join(f"{rate:g}: {best:.4f}" for rate, best in sorted(rates.items()))
    keys = [key for key in COLUMNS if key in plain[0]]
    rows = [_row("plain", plain, plain, keys)]
    rows += [_row(method, _of(runs, method), plain, keys) for method in OURS]
    for method, settings in METHODS.items():
        for setting in settings if method != "EMA" else ():
            label = f"{method} {setting:g}" if len(settings) > 1 else method
            rows.append(_row(label, _of(runs, method, setting), plain, keys))
    for average in _of(runs, "EMA"):
        for decay, found in average["averages"].items():
            rows.append(_row(f"EMA {decay}", [average | found], plain, keys))
    head = ["method", "seeds", *(COLUMNS[key] for key in keys)]
    head += ["end / plain's end", "end / plain's best", "time / plain's"]
    return [
        f"### {TITLES[plan.data]}, N = {plan.rows}, {plan.steps} steps",
        "",
        f"Learning rate {lr:g} (best held-out loss of plain, seed 0: {tried}). Rows are smoothed "
        f"from t = {collapsed:.3f} on.",
        "",
        *table(head, [row for row in rows if row]),
    ]


def _of(runs: Sequence[Run], method: str, setting: float = 0.0) -> list[Run]:
    own = [run for run in runs if run["method"] == method and run["setting"] == setting]
    return sorted(own, key=lambda run: run["seed"])


def _row(label: str, own: Sequence[Run], plain: Sequence[Run], keys: Sequence[str]) -> list[str]:
    if not own:
        return []
    cells = [_cell([run.get(key, math.nan) for run in own]) for key in keys]
    return [
        label,
        str(len(own)),
        *cells,
        *(_ratio(own, plain, "end", key) for key in ("end", "best")),
        _ratio(own, plain, "seconds", "seconds"),
    ]


def _cell(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{np.mean(values):.4g} ± {(max(values) - min(values)) / 2:.1g}"


def _ratio(own: Sequence[Run], plain: Sequence[Run], above: str, below: str) -> str:
    """Of means, with its interval over seeds if there are several."""
    a, b = (np.array([run[k] for run in r]) for r, k in ((plain, below), (own, above)))
    middle, low, high = bootstrap(lambda a, b: b.mean() / a.mean(), a, b)
    return f"{middle:.3f}" if len(own) == 1 else f"{middle:.3f} [{low:.3f}, {high:.3f}]"
