"""From the records of runs to numbers: curves, where they come down to, and intervals.

The question for each scheme: how many steps does it need to reach the last value of plain training
at the same horizon, as a share of plain's steps? Intervals are percentiles over resampled seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from schemes_plan import PLANS

METRICS = {"loss": "held-out loss", "energy": "energy distance", "frechet": "Frechet distance"}
AXES = {"step": "steps", "seconds": "time"}
DRAWS = 1000

Run = dict[str, Any]
Runs = dict[str, list[Run]]
Interval = tuple[float, float, float]
"""A number and its 95 % interval."""


def finished(folder: Path) -> list[Run]:
    """All training runs; the experiments with large batches are not among them."""
    files = (f for f in sorted(folder.glob("*-*.json")) if not f.name.startswith("why-"))
    return [json.loads(file.read_text()) for file in files]


def load(folder: Path) -> dict[tuple[str, int], Runs]:
    """Runs by data set and horizon, then by scheme; only those with plain's best rate.

    The best is that of the rates schemes ran with, if one was tried later that is better still.
    """
    runs = finished(folder)
    found: dict[tuple[str, int], Runs] = {}
    for name in PLANS:
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
    order = list(PLANS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def load_why(folder: Path) -> dict[str, dict[tuple[str, int], list[Run]]]:
    """Runs with several batches by data set, then by scheme and batch, in order of their seeds."""
    found: dict[str, dict[tuple[str, int], list[Run]]] = {}
    for file in sorted(folder.glob("why-*-*-*-*.json")):
        run = json.loads(file.read_text())
        key = (run["scheme"].split(",")[0], run["batch"])
        found.setdefault(run["data"], {}).setdefault(key, []).append(run)
    return found


def rates(runs: Sequence[Run], name: str) -> dict[float, float]:
    """The learning rates plain training was tried with, and the held-out loss of each."""
    first = ("plain", 0, PLANS[name].horizons[0])
    own = [r for r in runs if (r["scheme"], r["seed"], r["horizon"], r["data"]) == (*first, name)]
    tried = {run["lr"]: run["curve"][-1]["loss"] for run in own}
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


def share(plain: Sequence[Run], other: Sequence[Run], metric: str, axis: str = "step") -> Interval:
    """Steps (or seconds) to plain's final value over plain's."""

    def once(a: np.ndarray, b: np.ndarray) -> float:
        return reached(b.mean(0), a[:, 1, -1].mean()) / a[:, 0, -1].mean()

    return bootstrap(once, curves(plain, metric, axis), curves(other, metric, axis))


def bootstrap(
    once: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray
) -> Interval:
    """A number from two sets of runs; each set is resampled by itself."""
    draws = np.random.default_rng(0)

    def again(runs: np.ndarray) -> np.ndarray:
        return runs[draws.integers(len(runs), size=len(runs))]

    values = [once(again(a), again(b)) for _ in range(DRAWS)]
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return once(a, b), float(low), float(high)


# -- cells of tables ------------------------------------------------------------------------------


def share_cell(value: Interval, beyond: str = "not") -> str:
    """A number with its interval; `beyond` stands for infinity."""
    middle, low, high = (beyond if math.isinf(v) else f"{v:.2f}" for v in value)
    return f"{middle} [{low}, {high}]"


def ratio_cell(own: np.ndarray, plain: np.ndarray) -> str:
    """Of means, with its interval if there are several seeds."""
    value = bootstrap(lambda a, b: b.mean() / a.mean(), plain, own)
    return "{:.3f}".format(*value) if len(own) == 1 else "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def mean_cell(values: Sequence[float]) -> str:
    """Mean ± half the range; one value alone as it is."""
    spread = f" ± {(max(values) - min(values)) / 2:.1g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{spread}"


def seeds(runs: Sequence[Run]) -> str:
    """Of some runs, by commas."""
    return ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs))
