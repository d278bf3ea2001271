"""The pictures of docs/results.md."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from schemes import NAMES
from schemes_report import AIMS, AXES, METRICS, Runs, curve, share

WIDEST = 1.6
"""Where the axis of shares ends."""


def draw_curves(folder: Path, name: str, horizon: int, runs: Runs) -> None:
    """Every metric over steps, one line for each scheme."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for i, scheme in enumerate(NAMES):
            if scheme in runs:
                plain = scheme == "plain"
                style = {"color": "black", "lw": 2.2} if plain else {"color": f"C{i}", "lw": 1.2}
                axis.plot(*curve(runs[scheme], metric), label=scheme, **style)
        axis.axhline(curve(runs["plain"], metric)[1, -1], color="black", lw=0.8, ls=":")
        axis.set(xlabel="optimizer step", ylabel=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    seeds = sorted({len(own) for own in runs.values()})
    figure.suptitle(
        f"{name}, {horizon} steps: means over {' or '.join(map(str, seeds))} seeds; "
        "dotted: where plain ends"
    )
    figure.savefig(folder / f"curves_{name}_{horizon}.png", dpi=110)
    plt.close(figure)


def draw_steps(folder: Path, name: str, metric: str, panels: dict[int, Runs]) -> None:
    """Steps and time to plain's final value of one metric, a row of panels for each horizon."""
    names = [scheme for scheme in NAMES if any(scheme in runs for runs in panels.values())]
    size = (12, len(panels) * (0.34 * len(names) + 1) + 0.5)
    figure, grid = plt.subplots(
        len(panels), 2, figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for line, (horizon, runs) in zip(grid, panels.items(), strict=True):
        for axis, (key, unit) in zip(line, AXES.items(), strict=True):
            for row, scheme in enumerate(names):
                if scheme not in runs:
                    axis.text(0.02, row, "not run", va="center", fontsize=8)
                    continue
                _interval(axis, row, share(runs["plain"], runs[scheme], metric, key))
            axis.axvline(1, color="black", lw=1)
            if key == "step":
                axis.axvline(AIMS[metric], color="C2", ls="--", lw=1)
            axis.set(xlim=(0, WIDEST), ylim=(len(names) - 0.5, -0.5))
            axis.set(xlabel=f"{unit} / plain's, {horizon} steps")
            axis.set_yticks(range(len(names)), names)
            axis.grid(alpha=0.3, axis="x")
    figure.suptitle(
        f"{name}: steps and time to plain's final {METRICS[metric]} (dashed: what was aimed at)"
    )
    figure.savefig(folder / f"steps_{name}_{metric}.png", dpi=110)
    plt.close(figure)


def _interval(axis: Any, row: int, value: tuple[float, float, float]) -> None:
    middle, low, high = value
    if math.isinf(low) or low > WIDEST:
        axis.text(1.02, row, "not reached" if math.isinf(low) else "beyond", va="center", size=8)
        return
    axis.plot([low, min(high, WIDEST)], [row, row], color="C0", lw=4, alpha=0.35)
    if math.isinf(middle):
        axis.text(1.02, row, "not reached by the mean", va="center", size=8)
    else:
        axis.plot(middle, row, "o", color="C0", clip_on=True)


def draw_variance(folder: Path, made: dict[str, Any]) -> None:
    """Error of each target over t, and what it removes for its cost."""
    names = list(dict.fromkeys(line["target"] for line in made["lines"]))
    times = sorted({line["t"] for line in made["lines"]})
    by = {(line["target"], line["t"]): line for line in made["lines"]}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for i, name in enumerate(names):
        style = {"marker": "o", "ms": 3, "color": f"C{i}", "label": name}
        own = [by[name, t] for t in times]
        error = np.array([line["error"] for line in own])
        if error.max() > 0:
            axes[0].plot(times, error, **style)
        removed = np.array([line["plain"] for line in own]) * (1 - error)
        removed = np.where(removed > 0, removed, np.nan)  # worse than nothing: no point
        axes[1].plot(times, removed / own[0]["operations"] * 1e6, **style)
        axes[2].plot(times, removed / np.array([line["ms"] for line in own]), **style)
    axes[0].axhline(1, color="black", lw=1)
    axes[0].set(yscale="log", ylim=(1e-4, 10), ylabel="error / plain's")
    axes[0].set_title("Mix has none; 1: nothing gained")
    axes[1].set(yscale="log", ylabel="removed / signal, for 10^6 operations of a query")
    axes[2].set(yscale="log", ylabel=f"removed / signal, for a ms of {made['queries']} queries")
    for axis in axes:
        axis.set(xlabel="t (0 is noise)")
        axis.grid(alpha=0.3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.savefig(folder / "variance_by_t.png", dpi=110)
    plt.close(figure)
