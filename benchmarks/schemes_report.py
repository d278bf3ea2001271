"""docs/results.md, from what `schemes.py` and `schemes_variance.py` have written.

Nothing here is typed in by hand: a cell without runs says so. Of each scheme is asked how many
steps it needs to reach what plain training ends with at the same horizon, as a share of plain's
steps; intervals are percentiles over resampled seeds. Plain training is asked too: a noisy metric
passes its last value early, and a scheme has gained only what it has beyond that.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from schemes import DEFAULT, NAMES, PLANS

METRICS = {"loss": "held-out loss", "energy": "energy distance", "frechet": "Frechet distance"}
AXES = {"step": "steps", "seconds": "time"}
AIMS = {"loss": 0.75, "energy": 0.6, "frechet": 0.6}
ABOUT = {
    "photos8": "Photographs, 8 x 8 x 3 (D = 192, N = 20 000, 7 classes), perceptron, 1.6 M weights",
    "digits": "Digits of scikit-learn (D = 64, N = 1200, 10 classes), perceptron, 1.0 M weights",
    "photos16": "Photographs, 16 x 16 x 3 (D = 768, N = 20 000, 7 classes), SiT, 1.3 M weights",
}
DRAWS = 1000

Run = dict[str, Any]
Runs = dict[str, list[Run]]


def finished(folder: Path) -> list[Run]:
    """All training runs; the experiments of `schemes_why.py` are not among them."""
    files = (f for f in sorted(folder.glob("*-*.json")) if not f.name.startswith("why-"))
    return [json.loads(file.read_text()) for file in files]


def load(folder: Path) -> dict[tuple[str, int], Runs]:
    """Runs by data set and horizon, then by scheme; only those with plain's best rate.

    The best is that of the rates schemes ran with, if one was tried later that is better still.
    """
    runs = finished(folder)
    found: dict[tuple[str, int], Runs] = {}
    for name in ABOUT:
        own = [run for run in runs if run["data"] == name]
        tried = rates(own, name)
        if len(tried) < 3:
            continue
        ran = {run["lr"] for run in own if run["scheme"] != "plain"} & tried.keys()
        best = min(ran or tried, key=tried.__getitem__)
        for run in own:
            if run["lr"] == best:
                place = found.setdefault((name, run["horizon"]), {})
                place.setdefault(run["scheme"], []).append(run)
    order = list(ABOUT)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def rates(runs: Sequence[Run], name: str) -> dict[float, float]:
    """The learning rates plain training was tried with, and the held-out loss of each."""
    tried = {
        run["lr"]: run["curve"][-1]["loss"]
        for run in runs
        if (run["scheme"], run["seed"], run["horizon"]) == ("plain", 0, PLANS[name].horizons[0])
    }
    return {lr: math.inf if math.isnan(loss) else loss for lr, loss in sorted(tried.items())}


def curves(runs: Sequence[Run], metric: str, axis: str = "step") -> np.ndarray:
    """(runs, 2, points): steps (or seconds) and the metric."""
    return np.array(
        [[[p[key] for p in run["curve"] if metric in p] for key in (axis, metric)] for run in runs]
    )


def curve(runs: Sequence[Run], metric: str, axis: str = "step") -> np.ndarray:
    """(2, points): the mean over runs."""
    return curves(runs, metric, axis).mean(0)


def reached(line: np.ndarray, goal: float) -> float:
    """Where a curve first comes down to `goal`, between its points; infinity if it does not."""
    below = np.flatnonzero(line[1] <= goal)
    if not len(below):
        return math.inf
    i = below[0]
    if i == 0:
        return float(line[0, 0])
    (x0, x1), (y0, y1) = line[0, i - 1 : i + 1], line[1, i - 1 : i + 1]
    return float(x0 + (x1 - x0) * (y0 - goal) / (y0 - y1))


def share(
    plain: Sequence[Run], other: Sequence[Run], metric: str, axis: str = "step"
) -> tuple[float, float, float]:
    """Steps (or seconds) to plain's final value over plain's, and its 95 % interval."""

    def once(a: np.ndarray, b: np.ndarray) -> float:
        return reached(b.mean(0), a[:, 1, -1].mean()) / a[:, 0, -1].mean()

    return bootstrap(once, curves(plain, metric, axis), curves(other, metric, axis))


def bootstrap(
    once: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray
) -> tuple[float, float, float]:
    """A number from two sets of runs and its 95 % interval; each set is resampled by itself."""
    draws = np.random.default_rng(0)

    def again(runs: np.ndarray) -> np.ndarray:
        return runs[draws.integers(len(runs), size=len(runs))]

    values = [once(again(a), again(b)) for _ in range(DRAWS)]
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return once(a, b), float(low), float(high)


def share_cell(value: tuple[float, float, float]) -> str:
    middle, low, high = ("not" if math.isinf(v) else f"{v:.2f}" for v in value)
    return f"{middle} [{low}, {high}]"


def _mean_cell(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.4g} ± {half:.1g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return [f"| {lines[0]} |", f"|{lines[1]}|", *(f"| {line} |" for line in lines[2:]), ""]


def setting(name: str, runs: Runs, tried: dict[float, float]) -> list[str]:
    """The learning rate, whether it can be trusted, and the measured boundary."""
    first = runs["plain"][0]
    found = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tried.items())
    edge = first["lr"] in (min(tried), max(tried))
    missing = [f"{lr:g}" for lr in PLANS[name].rates if lr not in tried]
    better = [f"{lr:g}" for lr, loss in tried.items() if loss < tried[first["lr"]]]
    return [
        f"Learning rate {first['lr']:g}, the best for plain training (held-out loss after "
        f"{PLANS[name].horizons[0]} steps, seed 0: {found}{'; not tried: ' if missing else ''}"
        f"{', '.join(missing)}). "
        + ("**It is at the end of what was tried: plain may be tuned too little.** " * edge)
        + (
            f"**Plain is tuned too little here: {', '.join(better)}, tried after the schemes had "
            "run, ends lower. What follows is no gain over a tuned baseline.** "
        )
        * bool(better)
        + f"Batch 128; measured boundary t = {first['boundary']:.3f}.",
        "",
    ]


def ends(name: str, horizon: int, runs: Runs) -> list[str]:
    """Final values of every scheme, those that were not run included, and what runs them."""
    rows = []
    for scheme in NAMES:
        own = runs.get(scheme, [])
        if not own:
            rows.append([scheme, "", "not run", "", "", "", ""])
            continue
        last = [run["curve"][-1] for run in own]
        cells = [_mean_cell([end[key] for end in last]) for key in METRICS]
        pace = np.median([1e3 * end["seconds"] / horizon for end in last])
        clock = "" if all(run.get("clock") for run in own) else " (wall)"
        copies = f"{np.mean([end['copies'] for end in last]):.3f}"
        rows.append([scheme, seeds(own), *cells, copies, f"{pace:.1f}{clock}"])
    return [
        *table(["scheme", "seeds", *METRICS.values(), "copies", "ms/step"], rows),
        *command(name, horizon),
    ]


def command(name: str, horizon: int | str) -> list[str]:
    """What runs a row."""
    return [
        f"A row: `python benchmarks/schemes.py --threads 1 --data {name} --horizons {horizon} "
        "--only 'SCHEME'`.",
        "",
    ]


def seeds(runs: Sequence[Run]) -> str:
    """Of some runs, by commas."""
    return ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs))


def shares(runs: Runs) -> list[str]:
    """Steps and time to plain's final values."""
    head = [f"{title}, {unit}" for unit in AXES.values() for title in METRICS.values()]
    rows = [
        [
            "plain itself" if scheme == "plain" else scheme,
            *(
                share_cell(share(runs["plain"], runs[scheme], metric, axis))
                for axis in AXES
                for metric in METRICS
            ),
        ]
        for scheme in NAMES
        if scheme in runs
    ]
    return [
        "Steps and time to what plain training ends with, as a share of plain's:",
        "",
        *table(["scheme", *head], rows),
    ]


def twins(runs: Runs) -> list[str]:
    """Schemes that turn out to be the same one on these data."""
    names, lines = [name for name in NAMES if name in runs], []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if len(runs[a]) == len(runs[b]) and all(
                np.allclose(curve([x], "loss")[1], curve([y], "loss")[1], rtol=2e-4)
                for x, y in zip(runs[a], runs[b], strict=True)
            ):
                lines.append(
                    f"“{b}” and “{a}” have the same curves: on these data they are one scheme."
                )
    return [*lines, ""] if lines else []


def shorter(name: str, horizon: int, found: dict[tuple[str, int], Runs]) -> list[str]:
    """The default with schedules of fewer steps against plain training at `horizon`."""
    plain = found[name, horizon]["plain"]
    rows = []
    for (data, short), runs in found.items():
        if data == name and short < horizon and "plain" not in runs:
            for scheme, own in runs.items():
                cells = []
                for metric in METRICS:
                    pair = (curves(runs, metric)[:, 1, -1] for runs in (plain, own))
                    value = bootstrap(lambda a, b: b.mean() / a.mean(), *pair)
                    cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*value))
                rows.append([scheme, seeds(own), f"{short} ({short / horizon:.2f})", *cells])
    if not rows:
        return []
    return [
        f"Shorter runs with schedules of their own: final value over that of plain training after "
        f"{horizon} steps (1 or below: as good with fewer steps):",
        "",
        *table(["scheme", "seeds", "steps (share)", *METRICS.values()], rows),
        *command(name, "STEPS"),
    ]


def write(folder: Path, docs: Path) -> None:
    """Writes docs/results.md and its pictures; few samples first, if they were trained on."""
    import regularisers_report
    from schemes_figures import draw_curves, draw_steps, draw_variance
    from schemes_reasons import aims, by_time, load_floors, load_why, why
    from schemes_variance import table as of_variance

    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    found = load(folder)
    runs, floors = finished(folder), load_floors(folder)
    compared = {key: value for key, value in found.items() if "plain" in value}
    missing = [about for name, about in ABOUT.items() if name not in {key[0] for key in compared}]
    missing += [
        f"{name} at {horizon} steps"
        for name, all_of in ((name, plan.horizons) for name, plan in PLANS.items())
        for horizon in all_of
        if (name, horizon) not in compared and name in {key[0] for key in compared}
    ]
    lines = []
    for name, horizon in compared:
        own = compared[name, horizon]
        draw_curves(images, name, horizon, own)
        lines += [f"## {ABOUT[name]}: {horizon} steps", ""]
        lines += setting(name, own, rates([r for r in runs if r["data"] == name], name))
        lines += [*ends(name, horizon, own), *twins(own), *shares(own)]
        lines += [*aims(own, floors.get(name)), *by_time(own)]
        lines += shorter(name, horizon, found)
        lines += [f"![Curves, {name}, {horizon} steps](images/curves_{name}_{horizon}.png)", ""]
    for name in dict.fromkeys(key[0] for key in compared):
        lines += [f"## {name}: steps and time to plain's final values", ""]
        panels = {h: own for (data, h), own in compared.items() if data == name}
        for metric, title in METRICS.items():
            draw_steps(images, name, metric, panels)
            lines += [f"![{title}, {name}](images/steps_{name}_{metric}.png)", ""]
    reasons = [why(runs, floors.get(name)) for name, runs in load_why(folder).items()]
    lines += itertools.chain.from_iterable(reasons)
    missing += [] if any(reasons) else ["experiments on why aims are missed"]
    variance = folder / "variance.json"
    if variance.exists():
        made = json.loads(variance.read_text())
        draw_variance(images, made)
        lines += [*of_variance(made), "![Variance by t](images/variance_by_t.png)", ""]
    else:
        missing.append("variance by t")
    machines = sorted({run["cpu"] for run in runs if "cpu" in run})
    about = f"torch {torch.__version__}, {' and '.join(machines) or 'unknown processor'}"
    text = [
        "# What schemes gain",
        "",
        "Written by `make bench-schemes` (benchmarks/schemes.py --report), never by hand. "
        f"{about}; each run on one thread. Values are means over seeds ± half their range. Every "
        "horizon has a warm-up of 100 steps and a cosine decay of its own. Times are drawn evenly "
        "over the probability in all rows, plain included. Samples: 1000, midpoint rule of 25 "
        "steps (10 for the SiT); copies: share with d1/d2 < 1/3; Frechet distance of Gaussians "
        "fitted to pixels. Ratios: [95 % interval, seeds resampled]; not: not reached. Time is the "
        "processor's, or by the clock on the wall, in part beside other work, where a row says "
        "(wall): compare those with care.",
        "",
        f"The {DEFAULT}: oracle targets at all t; for 60 % of the steps half of the times "
        "logit-normal and half uniform, then all uniform. Two stages: `Scheme.two_stage`, oracle "
        "targets up to the boundary and rows smoothed from its collapsed end on.",
        "",
        *([f"**Not run:** {'; '.join(missing)}.", ""] if missing else []),
        *regularisers_report.lines(docs / regularisers_report.ARCHIVE),
        *lines,
    ]
    (docs / "results.md").write_text("\n".join(text).rstrip() + "\n")
