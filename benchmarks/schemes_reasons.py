"""What docs/results.md says of the aims, and why they are missed: from `schemes_why.py`'s files.

Sentences are chosen by the numbers: a rerun that finds otherwise says otherwise.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from schemes import BATCH, DEFAULT
from schemes_data import EDGES
from schemes_report import AIMS, METRICS, Run, Runs, curves, seeds, share, share_cell, table
from schemes_why import LARGE

__all__ = ["aims", "by_time", "load_floors", "load_why", "why"]

SAMPLED = ("energy", "frechet")
Why = dict[tuple[str, int], list[Run]]


def load_floors(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Distances of training rows, a list of draws for each data set."""
    files = sorted(folder.glob("why-rows-*.json"))
    return {f.stem.removeprefix("why-rows-"): json.loads(f.read_text())["draws"] for f in files}


def load_why(folder: Path) -> dict[str, Why]:
    """Runs of the experiments by data set, then by scheme and batch, in order of their seeds."""
    found: dict[str, Why] = {}
    for file in sorted(folder.glob("why-*-*-*-*.json")):
        run = json.loads(file.read_text())
        key = (run["scheme"].split(",")[0], run["batch"])
        found.setdefault(run["data"], {}).setdefault(key, []).append(run)
    return found


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _of(draws: Sequence[dict[str, float]], metric: str) -> list[float]:
    return [draw[metric] for draw in draws]


def aims(runs: Runs, floor: Sequence[dict[str, float]] | None) -> list[str]:
    """Whether the default got where it was meant to get, and whether it could have."""
    if DEFAULT not in runs:
        return [f"The {DEFAULT} was not run here, so nothing is said about the aims.", ""]
    rows, notes = [], []
    for metric, title in METRICS.items():
        value = share(runs["plain"], runs[DEFAULT], metric)
        met = "met" if value[2] <= AIMS[metric] else "missed"
        if met == "missed" and value[0] <= AIMS[metric]:
            met = "met in the mean, not by the whole interval"
        end = float(curves(runs["plain"], metric)[:, 1, -1].mean())
        best = "not measured"
        if metric == "loss":
            best = "not known"
        elif floor:
            mean, spread = _spread(_of(floor, metric))
            best = f"{mean:.3g} ± {spread:.1g}"
            if met == "missed":
                notes.append(_room(title, end, mean, spread))
        rows.append([title, f"{AIMS[metric]:g}", share_cell(value), met, f"{end:.3g}", best])
    head = ["metric", "at most", "reached", "verdict", "plain ends at", "training rows score"]
    return [
        f"What was aimed at, for the {DEFAULT} (training rows: 1000 of them in place of samples, "
        "mean and standard deviation of several draws):",
        "",
        *table(head, rows),
        *notes,
        *([""] if notes else []),
    ]


def _room(title: str, end: float, mean: float, spread: float) -> str:
    if end <= mean + 2 * spread:
        return (
            f"- {title}: plain training ends at what training rows themselves score, so there is "
            "nothing left to gain that 1000 samples could show; the share above is mostly noise."
        )
    return (
        f"- {title}: plain training ends at {end:.3g}, training rows score {mean:.3g}: there is "
        "room, and the default does not take it in that many steps."
    )


def why(found: Why, floor: Sequence[dict[str, float]] | None) -> list[str]:
    """The section of the experiments; empty if plain and oracle did not run in them."""
    plain, oracle = found.get(("plain", BATCH)), found.get(("oracle", BATCH))
    if not plain or not oracle:
        return []
    name, horizon = plain[0]["data"], plain[0]["horizon"]
    return [
        f"## Why the aims are missed: experiments on {name}, {horizon} steps",
        "",
        "They ran at this horizon only: `python benchmarks/schemes_why.py --threads 1 --data "
        f"{name} --seeds {len(plain)}`. Oracle: targets at all t.",
        "",
        *_by_batch(found),
        *_noise(plain, oracle, floor),
    ]


def by_time(runs: Runs) -> list[str]:
    """Held-out loss by t of plain training and of those that have the oracle at all t."""
    names = [name for name in ("plain", "oracle, all t", DEFAULT) if name in runs]
    own = {n: np.array([run["by_time"] for run in runs[n] if "by_time" in run]) for n in names}
    means = {name: values.mean(0) for name, values in own.items() if len(values)}
    if "plain" not in means or len(means) < 2:
        return []
    plain, boundary = means.pop("plain"), runs["plain"][0]["boundary"]
    before = np.array(EDGES[1:]) <= boundary
    rows, notes = [["plain", *(f"{v:.4f}" for v in plain)]], []
    for name, values in means.items():
        gain, change = plain - values, values / plain - 1
        rows.append([name, *(f"{v:.4f} ({g:+.1%})" for v, g in zip(values, change, strict=True))])
        if before.any() and gain.sum() > 0:
            early = gain[before].sum() / gain.sum()
            lost = ", which lost some of it after it" if early > 1 else ""
            notes.append(f"{early:.0%} for {name}{lost}")
    head = [f"t {low:g} to {high:g}" for low, high in itertools.pairwise(EDGES)]
    return [
        f"Where the gain is: targets hardly differ after the boundary, t = {boundary:.3f}. "
        "Held-out loss at the end, in quarters of t:",
        "",
        *table(["scheme", *head], rows),
        *(
            [f"Of the whole gain in the quarters that end before it: {', '.join(notes)}."]
            if notes
            else []
        ),
        "",
    ]


def _by_batch(found: Why) -> list[str]:
    base = found["plain", BATCH]
    rows, reached = [], {}
    for (scheme, batch), runs in found.items():
        reached[scheme, batch] = share(base, runs, "loss")
        shares = [share(base, runs, "loss", axis) for axis in ("step", "seconds")]
        one = len(runs) == 1
        cells = [f"{value[0]:.2f} (one seed)" if one else share_cell(value) for value in shares]
        end = curves(runs, "loss")[:, 1, -1]
        rows.append([f"{scheme}, batch {batch}", seeds(runs), f"{end.mean():.4f}", *cells])
    head = ["training", "seeds", "held-out loss", "steps to plain's", "time to plain's"]
    lines = [
        f"**How much could less noise give?** A batch of {LARGE} divides the variance of plain's "
        f"gradient by {LARGE // BATCH}: that of x_1, x_0 and t too, which no target touches. (It "
        "also sees as many more samples, so it bounds what less noise gives from above.)",
        "",
        *table(head, rows),
    ]
    large = found.get(("plain", LARGE))
    if not large:
        return lines
    aim, bound = AIMS["loss"], reached["plain", LARGE][0]
    mine = reached["oracle", BATCH][0]
    steps = "not at all" if math.isinf(bound) else f"after {bound:.2f} of the steps"
    if bound > aim:
        lines.append(f"Even that gets there {steps}: no target could reach {aim:g}.")
    else:
        lines.append(
            f"That gets there {steps}: {aim:g} is not out of reach of less noise as such. "
            f"The oracle, which removes all noise of the targets and no other, needs {mine:.2f}."
        )
    first, last, big = (
        float(curves(runs, "loss")[:, 1, -1].mean())
        for runs in (base, found["oracle", BATCH], large)
    )
    if first > big:
        lines[-1] += (
            f" At the end it has gained {(first - last) / (first - big):.0%} of what the large "
            "batch has, which suggests that most of the noise that costs steps "
            + ("is not" if (first - last) < 0.5 * (first - big) else "is")
            + " that of the targets, as far as more samples do not explain it."
        )
    both = found.get(("oracle", LARGE))
    if both:
        end = float(curves(both, "loss")[:, 1, -1].mean())
        lines[-1] += (
            f" With batch {LARGE} the oracle ends {(big - end) / big:.1%} lower than plain "
            f"training, with batch {BATCH} {(first - last) / first:.1%}."
        )
    return [*lines, ""]


def _noise(
    plain: list[Run], oracle: list[Run], floor: Sequence[dict[str, float]] | None
) -> list[str]:
    def by_seed(runs: list[Run], metric: str) -> np.ndarray:
        return np.array([_of(run["draws"], metric) for run in runs])

    rows, notes = [], []
    for metric in SAMPLED:
        a, b = by_seed(plain, metric), by_seed(oracle, metric)
        draw = float(a.std(1, ddof=1).mean())
        cells: list[Any] = [METRICS[metric]]
        for values in (a, b):
            cells.append(f"{values.mean():.3g} ({', '.join(f'{v:.3g}' for v in values.mean(1))})")
        cells.append(f"{draw:.2g}")
        n = min(len(a), len(b))
        paired = (b[:n] - a[:n]).mean(1)  # the same draws for both
        cells.append(f"{paired.mean():+.2g} ({', '.join(f'{v:+.2g}' for v in paired)})")
        cells.append("{:.3g} ± {:.1g}".format(*_spread(_of(floor, metric))) if floor else "")
        rows.append(cells)
        size = abs(paired.mean())
        notes.append(
            f"- {METRICS[metric]}: schemes differ by {size / draw:.1f} of the standard deviation "
            "of one model's draws; "
            + (
                "there is one seed of training only, so nothing is said of others."
                if n == 1
                else "with the same draws the sign is the same for all seeds of training."
                if abs(np.sign(paired).sum()) == n
                else "with the same draws the sign depends on the seed of training: no difference "
                "was shown."
            )
        )
    draws = len(plain[0]["draws"])
    head = ["metric", "plain (by seed)", "oracle (by seed)", "deviation over draws"]
    head += ["oracle - plain, same draws (by seed)", "training rows"]
    return [
        f"**What can 1000 samples tell?** Each model sampled {draws} times with other noise, and "
        "training rows in place of samples:",
        "",
        *table(head, rows),
        *notes,
        "",
    ]
