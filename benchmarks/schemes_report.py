"""docs/results.md and its pictures, from what `schemes.py` and `variance.py` have written.

Nothing here is typed in by hand: a cell without runs says so. The question asked of each scheme is
how many steps it needs to reach what plain training ends with at the same horizon, as a share of
plain's; intervals are percentiles over resampled seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from report import meta
from schemes import RATES, schemes

METRICS = {"loss": "held-out loss", "energy": "energy distance", "frechet": "Frechet distance"}
AIMS = {"loss": 0.75, "energy": 0.6, "frechet": 0.6}
ABOUT = {
    "photos8": "Photographs, 8 x 8 x 3 (D = 192, N = 20 000, 7 classes), perceptron, 1.6 M weights",
    "digits": "Digits of scikit-learn (D = 64, N = 1200, 10 classes), perceptron, 1.0 M weights",
    "photos16": "Photographs, 16 x 16 x 3 (D = 768, N = 20 000, 7 classes), SiT, 1.3 M weights",
}
DRAWS = 300

Runs = dict[str, list[dict[str, Any]]]


def load(folder: Path) -> dict[tuple[str, int], Runs]:
    """Runs by data set and horizon, then by scheme; of plain those with the best rate."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))]
    found: dict[tuple[str, int], Runs] = {}
    for name in ABOUT:
        own = [run for run in runs if run["data"] == name]
        if not own:
            continue
        short = min(run["horizon"] for run in own)
        tried = [
            run
            for run in own
            if run["scheme"] == "plain" and run["seed"] == 0 and run["horizon"] == short
        ]
        if len(tried) < len(RATES):
            continue
        rate = min(tried, key=lambda run: _last(run, "loss", math.inf))["lr"]
        for run in own:
            if run["lr"] == rate:
                place = found.setdefault((name, run["horizon"]), {})
                place.setdefault(run["scheme"], []).append(run)
    order = list(ABOUT)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _last(run: dict[str, Any], metric: str, worst: float) -> float:
    value = run["curve"][-1][metric]
    return worst if math.isnan(value) else value


def curve(runs: Sequence[dict[str, Any]], metric: str, axis: str = "step") -> np.ndarray:
    """(2, points): steps (or seconds) and the mean over runs."""
    points = [[point for point in run["curve"] if metric in point] for run in runs]
    x, y = (np.array([[p[key] for p in line] for line in points]) for key in (axis, metric))
    return np.stack([x.mean(0), y.mean(0)])


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
    plain: list[dict[str, Any]], other: list[dict[str, Any]], metric: str, axis: str = "step"
) -> tuple[float, float, float]:
    """Steps (or seconds) to plain's final value over plain's, and its 95 % interval."""
    draws = np.random.default_rng(0)

    def once(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> float:
        goal = curve(a, metric)[1, -1]
        return reached(curve(b, metric, axis), goal) / curve(a, metric, axis)[0, -1]

    values = [
        once(
            [plain[i] for i in draws.integers(len(plain), size=len(plain))],
            [other[i] for i in draws.integers(len(other), size=len(other))],
        )
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return once(plain, other), float(low), float(high)


def _share_cell(value: tuple[float, float, float]) -> str:
    middle, low, high = ("not" if math.isinf(v) else f"{v:.2f}" for v in value)
    return f"{middle} [{low}, {high}]"


def _mean_cell(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.4g} ± {half:.1g}"


def tables(found: dict[tuple[str, int], Runs]) -> list[str]:
    """Final values, and steps to plain's, for each data set and horizon."""
    lines = []
    for (name, horizon), runs in found.items():
        any_run = next(iter(runs.values()))[0]
        lines += [
            f"## {ABOUT[name]}: {horizon} steps",
            "",
            f"Learning rate {any_run['lr']:g} (best of {', '.join(f'{r:g}' for r in RATES)} for "
            f"plain training), batch 128; measured boundary t = {any_run['boundary']:.3f}.",
            "",
            f"| scheme | seeds | {' | '.join(METRICS.values())} | copies | ms/step |",
            "|---|---|---|---|---|---|---|",
        ]
        for scheme in schemes(None, 0.5):  # type: ignore[arg-type]
            own = runs.get(scheme, [])
            if not own:
                lines.append(f"| {scheme} | 0 | not run | | | | |")
                continue
            ends = [run["curve"][-1] for run in own]
            cells = [_mean_cell([end[key] for end in ends]) for key in METRICS]
            copies = f"{np.mean([end['copies'] for end in ends]):.3f}"
            pace = np.median([1e3 * end["seconds"] / horizon for end in ends])
            lines.append(f"| {scheme} | {len(own)} | {' | '.join(cells)} | {copies} | {pace:.1f} |")
        lines += [
            "",
            "Steps to what plain training ends with, as a share of its steps (last column: time):",
            "",
            f"| scheme | {' | '.join(METRICS.values())} | held-out loss, time |",
            "|---|---|---|---|---|",
        ]
        plain = runs["plain"]
        for scheme, own in runs.items():
            if scheme != "plain":
                cells = [_share_cell(share(plain, own, metric)) for metric in METRICS]
                cells.append(_share_cell(share(plain, own, "loss", "seconds")))
                lines.append(f"| {scheme} | {' | '.join(cells)} |")
        lines += ["", f"![Curves, {name}, {horizon} steps](images/curves_{name}_{horizon}.png)", ""]
        lines += [f"![Steps needed, {name}](images/steps_{name}_{horizon}.png)", ""]
    return lines


def draw_curves(folder: Path, name: str, horizon: int, runs: Runs) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for i, (scheme, own) in enumerate(runs.items()):
            x, y = curve(own, metric)
            wide = scheme == "plain"
            axis.plot(x, y, color="black" if wide else f"C{i}", lw=2 if wide else 1.2, label=scheme)
        axis.axhline(curve(runs["plain"], metric)[1, -1], color="black", lw=0.8, ls=":")
        axis.set(xlabel="optimizer step", ylabel=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    seeds = min(map(len, runs.values()))
    figure.suptitle(f"{name}, {horizon} steps: means over {seeds} seeds; dotted: where plain ends")
    figure.savefig(folder / f"curves_{name}_{horizon}.png", dpi=110)
    plt.close(figure)


def draw_steps(folder: Path, name: str, horizon: int, runs: Runs) -> None:
    others = [scheme for scheme in runs if scheme != "plain"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.5 * len(others) + 1.6), layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for row, scheme in enumerate(others):
            value, low, high = share(runs["plain"], runs[scheme], metric)
            if math.isinf(value):
                axis.text(1.02, row, "not reached", va="center", fontsize=8)
                continue
            axis.plot([low, min(high, 1.3)], [row, row], color="C0", lw=3, alpha=0.4)
            axis.plot(value, row, "o", color="C0")
        axis.axvline(1, color="black", lw=1)
        axis.axvline(AIMS[metric], color="C2", ls="--", lw=1)
        axis.set(xlim=(0, 1.3), ylim=(len(others) - 0.5, -0.5), xlabel=f"steps / plain's: {title}")
        axis.set_yticks(range(len(others)), others if axis is axes[0] else [""] * len(others))
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{name}: steps to what plain has after {horizon} (dashed: what was aimed at)")
    figure.savefig(folder / f"steps_{name}_{horizon}.png", dpi=110)
    plt.close(figure)


def variance(folder: Path, file: Path) -> list[str]:
    """Table and picture of the variance that targets leave."""
    if not file.exists():
        return ["## Variance by t", "", "Not run.", ""]
    made = json.loads(file.read_text())
    names = list(dict.fromkeys(line["target"] for line in made["lines"]))
    times = sorted({line["t"] for line in made["lines"]})
    by = {(line["target"], line["t"]): line for line in made["lines"]}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, name in enumerate(names):
        error = np.array([by[name, t]["error"] for t in times])
        cost = by[name, times[0]]["operations"]
        if error.max() > 0:
            axes[0].plot(times, error, "o-", ms=3, color=f"C{i}", label=name)
        axes[1].plot(times, (1 - error) / cost * 1e6, "o-", ms=3, color=f"C{i}", label=name)
    axes[0].axhline(1, color="black", lw=1)
    axes[0].set(yscale="log", ylim=(1e-3, 10), ylabel="error of the target / plain's")
    axes[1].set(yscale="log", ylabel="variance removed per million operations")
    for axis in axes:
        axis.set(xlabel="t (0 is noise)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(folder / "variance_by_t.png", dpi=110)
    plt.close(figure)
    lines = [
        "## Variance that a target leaves, by t",
        "",
        f"Photographs, {made['patch']} x {made['patch']} x 3, {made['rows']} rows, class-wise, "
        f"{made['queries']} queries for each t: error of the target over that of the plain one (0: "
        "the oracle, 1: nothing gained, above 1: worse than nothing).",
        "",
        f"| target | MFLOP | ms / {made['queries']} | "
        + " | ".join(f"{t:g}" for t in times)
        + " |",
        "|---" * (3 + len(times)) + "|",
    ]
    for name in names:
        own = [by[name, t] for t in times]
        cells = " | ".join(f"{line['error']:.2g}" for line in own)
        pace = np.median([line["ms"] for line in own])
        lines.append(f"| {name} | {own[0]['operations'] / 1e6:.2f} | {pace:.0f} | {cells} |")
    return [*lines, "", "![Variance by t](images/variance_by_t.png)", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("build/schemes"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    images = arguments.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    found = load(arguments.dir)
    for (name, horizon), runs in found.items():
        draw_curves(images, name, horizon, runs)
        draw_steps(images, name, horizon, runs)
    missing = [about for name, about in ABOUT.items() if name not in {key[0] for key in found}]
    about = ", ".join(f"{key} {value}" for key, value in meta().items() if key != "threads")
    text = [
        "# What schemes gain",
        "",
        "Written by `make bench-schemes` (benchmarks/schemes.py, variance.py, schemes_report.py), "
        f"never by hand. {about}; each run on one thread. Values are means over seeds ± half their "
        "range. Every horizon has a warm-up of 100 steps and a cosine decay of its own. Samples: "
        "1000, midpoint rule of 25 steps; copies: share with d1/d2 < 1/3; Frechet distance of "
        "Gaussians fitted to pixels. Ratios: [95 % interval, seeds resampled]; not: not reached.",
        "",
        *([f"**Not run:** {'; '.join(missing)}.", ""] if missing else []),
        *tables(found),
        *variance(images, arguments.dir / "variance.json"),
    ]
    (arguments.docs / "results.md").write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
