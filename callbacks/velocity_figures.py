"""The pictures of a model's velocity while it trains, of what its monitors report.

Those are events as they stand in `stages.jsonl`: lists over the bins of t, with None or NaN where a
bin is empty. Arguments of one name are alike in all:

    edges          of the bins of t, (T + 1,)
    probe, probes  one event of a monitor, or several, ascending
    key            which error on training samples: "conditional" or "oracle"
    window         an event `training_window`
    times, top1    mean times of the strata of a `PosteriorMonitor`, and its mean largest weights
    ends           t where navigation ends and where the posterior has collapsed, or None
    title          names the data or the model
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stagewise.callbacks.figures import (
    Edges,
    Ends,
    Event,
    new_figure,
    over_time,
    step_columns,
    time_axis,
)
from stagewise.stages import StageCurve

__all__ = [
    "dynamics_figure",
    "error_heatmap",
    "gap_heatmap",
    "gap_is_clear",
    "loss_by_time_figure",
    "of_run",
    "spending_figure",
    "stages_and_error_figure",
]

_TRAIN, _HELD_OUT, _ORACLE, _NOISE = "tab:blue", "tab:orange", "tab:red", "0.75"


def of_run(
    edges: Edges,
    probes: Sequence[Event],
    window: Event | None,
    curve: StageCurve | None,
    ends: Ends,
) -> dict[str, Figure]:
    """All pictures of a run by their names, as far as there is what they show.

    `curve`: what a `PosteriorMonitor` of the same posterior has measured.
    """
    probe = probes[-1]
    # A resumed run may have been given another number of strata.
    probes = [entry for entry in probes if len(entry["train"]["oracle"]) == len(edges) - 1]
    drawn = {
        "loss_by_t": loss_by_time_figure(edges, probe, ends),
        "oracle_error": dynamics_figure(edges, probes, "oracle", ends),
        "conditional_error": dynamics_figure(edges, probes, "conditional", ends),
        "oracle_error_heatmap": error_heatmap(edges, probes),
    }
    gaps = [entry for entry in probes if entry["gap"] is not None]
    if gaps:
        drawn["gap_heatmap"] = gap_heatmap(edges, gaps)
    if window is not None:
        drawn["spending"] = spending_figure(edges, window)
    if curve is not None:
        times, top1 = curve.times.tolist(), curve.mean("top1").tolist()
        drawn["stages_and_error"] = stages_and_error_figure(edges, probe, times, top1, ends)
    return drawn


def loss_by_time_figure(edges: Edges, probe: Event, ends: Ends, title: str = "") -> Figure:
    """Error against conditional and oracle velocity, and the floor (as Fig. 7a of the paper)."""
    figure, axes, t = over_time(edges, ends)
    train = probe["train"]
    axes.fill_between(t, np.array(train["floor"], float), color="0.88", lw=0, label="floor")
    lines = [
        ("training, conditional", train, "conditional", _TRAIN, "-"),
        ("training, oracle", train, "oracle", _ORACLE, "-"),
    ]
    if probe.get("held_out"):
        lines.append(("held out, conditional", probe["held_out"], "conditional", _HELD_OUT, "--"))
    for label, split, key, colour, style in lines:
        mean, error = np.array(split[key], float), 2 * np.array(split[f"{key}_se"], float)
        axes.errorbar(t, mean, error, color=colour, ls=style, lw=1.4, marker=".", label=label)
    axes.set(ylabel="MSE of the velocity, per number")
    axes.set_title(f"Error by t at step {probe['step']}" + (f"\n{title}" if title else ""))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _chosen(probes: Sequence[Event]) -> list[Event]:
    """At most ten probes, evenly over the training, first and last among them."""
    places = np.linspace(0, len(probes) - 1, min(10, len(probes)))
    return [probes[i] for i in sorted({round(float(place)) for place in places})]


def dynamics_figure(
    edges: Edges, probes: Sequence[Event], key: str, ends: Ends, title: str = ""
) -> Figure:
    """A curve for each of at most ten steps of training, coloured by step (as Fig. 8)."""
    figure, axes, t = over_time(edges, ends)
    last = max(2, probes[-1]["step"])
    # Two decades at most: the first steps of an untrained model would take most of the colours.
    begin = min(max(1.0, probes[0]["step"], last / 100), last / 2)
    norm, colours = LogNorm(begin, last, clip=True), mpl.colormaps["viridis_r"]
    for probe in _chosen(probes):
        colour = colours(norm(max(1, probe["step"])))
        axes.plot(t, np.array(probe["train"][key], float), color=colour, lw=1.5)
    if key == "conditional":
        floor = np.array(probes[-1]["train"]["floor"], float)
        axes.fill_between(t, floor, color="0.88", lw=0, label="floor: no model goes below")
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="training step")
    axes.set(ylabel=f"MSE({key} velocity), training samples")
    axes.set_title(f"{key.capitalize()} error while training" + (f"\n{title}" if title else ""))
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:  # no boundary and no floor: nothing to name
        axes.legend(fontsize=8)
    return figure


def _heatmap(
    edges: Edges, probes: Sequence[Event], values: np.ndarray, title: str, **colours: Any
) -> tuple[Figure, Axes, Any]:
    """Values, (T, P), over t and training step."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="training step", title=title)
    columns = step_columns([probe["step"] for probe in probes])
    mesh = axes.pcolormesh(columns, np.arange(len(edges)), values, **colours)
    axes.set(ylabel="t   (0 = noise), every bin drawn as high")
    ticks = np.arange(0, len(edges), max(1, len(edges) // 8))
    axes.set_yticks(ticks, [f"{edges[int(i)]:.3g}" for i in ticks])
    return figure, axes, mesh


def error_heatmap(edges: Edges, probes: Sequence[Event]) -> Figure:
    """Oracle error on training samples over t and training step."""
    values = np.array([probe["train"]["oracle"] for probe in probes], float).T
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    norm = LogNorm(max(low, high / 1e3), max(high, low * 1.01))
    title = "Oracle error while training"
    figure, _, mesh = _heatmap(edges, probes, values, title, norm=norm, cmap="magma")
    figure.colorbar(mesh, label="MSE(oracle velocity), training samples")
    return figure


def gap_heatmap(edges: Edges, probes: Sequence[Event]) -> Figure:
    """Held-out minus training error, as a share of the latter, over t and training step.

    Cells whose gap is less than two standard errors from zero are grey. The same samples are asked
    at every probe, so what is chance in one of them stays.
    """
    gaps = np.array([probe["gap"] for probe in probes], float)
    values = (gaps / np.array([probe["train"]["conditional"] for probe in probes], float)).T
    noise = np.isfinite(values) & ~np.stack([gap_is_clear(probe) for probe in probes], axis=1)
    clear = np.where(noise, np.nan, values)
    largest = np.nanmax(np.abs(clear), initial=0.05)
    colours = {"norm": TwoSlopeNorm(0, -largest, largest), "cmap": "RdBu_r"}
    figure, axes, mesh = _heatmap(edges, probes, clear, "Held-out minus training error", **colours)
    columns, grey = step_columns([probe["step"] for probe in probes]), np.where(noise, 0.0, np.nan)
    axes.pcolormesh(columns, np.arange(len(edges)), grey, cmap=ListedColormap([_NOISE]))
    figure.colorbar(mesh, label="share of the training error")
    label = "noise: less than 2 standard errors from 0 (by chance 1 in 20 is coloured)"
    figure.legend(handles=[Patch(color=_NOISE, label=label)], loc="outside lower left", fontsize=8)
    return figure


def gap_is_clear(probe: Event) -> np.ndarray:
    """In which bins the gap is two standard errors or more from zero, (T,) of bool."""
    gap, error = np.array(probe["gap"], float), np.array(probe["gap_se"], float)
    return np.abs(gap) >= 2 * error  # not where either is NaN: a lone sample has no error


def stages_and_error_figure(
    edges: Edges, probe: Event, times: Sequence[float], top1: Sequence[float], ends: Ends
) -> Figure:
    """Concentration of the posterior and the model's oracle error, over one axis of t."""
    figure, axes, t = over_time(edges, ends)
    label = "largest posterior weight (data)"
    axes.plot(times, np.array(top1, float), "k.-", lw=1.3, ms=4, label=label)
    axes.set(ylabel="largest posterior weight", ylim=(0, 1.02))
    other, error = axes.twinx(), np.array(probe["train"]["oracle"], float)
    other.plot(t, error, ".-", color=_ORACLE, label="oracle error (model)")
    other.set_ylabel("MSE(oracle velocity)", color=_ORACLE)
    other.tick_params(axis="y", colors=_ORACLE)
    other.set_ylim(bottom=0)
    axes.set_title(f"Where the data decide, and where the model errs, at step {probe['step']}")
    lines = [*axes.get_lines(), *other.get_lines()]
    names = [str(line.get_label()) for line in lines]
    # Neither axis knows where the other's curve is.
    figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def spending_figure(edges: Edges, window: Event) -> Figure:
    """What training spends on each stage, and how it draws t."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for row, name in enumerate(("draws", "loss", "gradient")):
        start = 0.0
        colours = ("#4477aa", "#ccbb44", "#aa3377")
        for (stage, shares), colour in zip(window["stages"].items(), colours, strict=True):
            share = shares[name] or 0.0
            left.barh(row, share, left=start, color=colour, label=stage if row == 0 else None)
            if share > 0.08:
                left.text(start + share / 2, row, f"{share:.0%}", ha="center", va="center", size=8)
            start += share
    left.set_yticks(range(3), ["draws", "loss", "gradient\n(dL/dv)"])
    left.set(xlim=(0, 1), xlabel="share", title="What training spends")
    left.invert_yaxis()
    figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    bounds, draws = np.asarray(edges), np.array(window["draws"], float)
    time_axis(right, bounds)
    right.stairs(draws / np.diff(bounds), bounds, fill=True, color="0.8", label="drawn")
    if window.get("density"):
        density = np.array(window["density"], float) / np.diff(bounds)
        right.stairs(density, bounds, color="tab:red", lw=1.3, label="nominal")
    title = f"Draws, steps {window['from_step']} to {window['step']}"
    right.set(ylabel="density of t", title=title)
    right.legend(fontsize=8)
    return figure
