"""Pictures of a model's velocity while it trains, made from the events of its monitors.

Events are as in `stages.jsonl`: lists over the bins of t, with None or NaN for empty bins.
Arguments are the same in all functions:

    edges          of the bins of t, (T + 1,)
    probe, probes  one event of a monitor, or several, ascending
    key            which error on training samples: "conditional" or "oracle"
    window         an event `training_window`
    times, top1    mean times of the strata of a `PosteriorMonitor`, and its mean largest weights
    ends           midpoint and collapsed boundary, t or None
    about          describes the data or the model, with N and n
    marks          steps of events, with their names
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure

from stagewise.callbacks.drawing import (
    DATA,
    FLOOR,
    HELD_OUT,
    MAGNITUDE,
    NOISE,
    ORACLE,
    STAGE_COLOURS,
    TRAIN,
    Ends,
    by_step,
    centres,
    divide_stages,
    finished,
    heading,
    in_order,
    legend,
    log_ticks,
    mark_time,
    new_figure,
    shade_stages,
    step_bar,
    step_colour,
    time_axis,
)
from stagewise.callbacks.figures import Event, heatmap
from stagewise.stages import StageCurve

__all__ = [
    "dynamics_figure",
    "error_heatmap",
    "gap_heatmap",
    "gap_is_clear",
    "loss_by_time_figure",
    "of_run",
    "sizes_figure",
    "spending_figure",
    "stages_and_error_figure",
]

Edges = Sequence[float]
Marks = Sequence[tuple[int, str]]


def of_run(
    edges: Edges,
    probes: Sequence[Event],
    window: Event | None,
    curve: StageCurve | None,
    ends: Ends,
    about: str = "",
    marks: Marks = (),
) -> dict[str, Figure]:
    """All pictures of a run by name; `curve`: that of a `PosteriorMonitor` of the same posterior.

    Pictures without data are left out.
    """
    probe = probes[-1]
    # A resumed run may have been given another number of strata.
    probes = [entry for entry in probes if len(entry["train"]["oracle"]) == len(edges) - 1]
    drawn = {
        "loss_by_t": loss_by_time_figure(edges, probe, ends, about),
        "oracle_error": dynamics_figure(edges, probes, "oracle", ends, about),
        "conditional_error": dynamics_figure(edges, probes, "conditional", ends, about),
        "oracle_error_heatmap": error_heatmap(edges, probes, ends, about, marks),
    }
    gaps = [entry for entry in probes if entry["gap"] is not None]
    if gaps:
        drawn["gap_heatmap"] = gap_heatmap(edges, gaps, ends, about, marks)
    if window is not None:
        drawn["spending"] = spending_figure(edges, window, ends)
    if curve is not None:
        times, top1 = curve.times.tolist(), curve.mean("top1").tolist()
        drawn["stages_and_error"] = stages_and_error_figure(edges, probe, times, top1, ends, about)
    return drawn


def _over_time(edges: Edges, ends: Ends) -> tuple[Figure, Axes, np.ndarray]:
    """A figure over t with its stages; also its axes, and the centres of the bins."""
    figure = new_figure()
    axes, t = figure.add_subplot(), centres(edges)
    time_axis(axes, t)
    shade_stages(axes, ends)
    for at, name, style in zip(ends, ("midpoint", "collapsed"), ("--", ":"), strict=True):
        mark_time(axes, at, name, color="0.25", lw=1.2, ls=style)
    return figure, axes, t


def _labelled(figure: Figure, ylabel: str, title: str, about: str) -> Figure:
    """A figure of errors from 0 on, with label, title and legend."""
    figure.axes[0].set_ylabel(ylabel)
    figure.axes[0].set_ylim(bottom=0)
    return finished(figure, title, about)


def loss_by_time_figure(edges: Edges, probe: Event, ends: Ends, about: str = "") -> Figure:
    """Error against conditional and oracle velocity, and the floor (as Fig. 7a of the paper)."""
    figure, axes, t = _over_time(edges, ends)
    train = probe["train"]
    axes.fill_between(t, np.array(train["floor"], float), color=FLOOR, lw=0, label="floor")
    lines = [
        ("training, conditional", train, "conditional", TRAIN, "-"),
        ("training, oracle", train, "oracle", ORACLE, "-."),
    ]
    if probe.get("held_out"):
        lines.append(("held out, conditional", probe["held_out"], "conditional", HELD_OUT, "--"))
    for label, split, key, colour, style in lines:
        mean, error = np.array(split[key], float), 2 * np.array(split[f"{key}_se"], float)
        axes.errorbar(t, mean, error, color=colour, ls=style, lw=1.4, marker=".", label=label)
    title = f"Error by t at step {probe['step']}, with 2 standard errors"
    return _labelled(figure, "MSE of the velocity, per number", title, about)


def dynamics_figure(
    edges: Edges, probes: Sequence[Event], key: str, ends: Ends, about: str = ""
) -> Figure:
    """A curve for each of at most ten steps of training, coloured by step (as Fig. 8)."""
    figure, axes, t = _over_time(edges, ends)
    colours = by_step([probe["step"] for probe in probes])
    places = np.linspace(0, len(probes) - 1, min(10, len(probes)))
    for probe in (probes[place] for place in places.round().astype(int)):
        colour = step_colour(colours, probe["step"])
        axes.plot(t, np.array(probe["train"][key], float), color=colour, lw=1.5)
    if key == "conditional":
        floor = np.array(probes[-1]["train"]["floor"], float)
        axes.fill_between(t, floor, color=FLOOR, lw=0, label="floor: no model goes below")
    step_bar(axes, colours)
    ylabel, title = f"MSE({key} velocity), training samples", f"{key.capitalize()} error"
    return _labelled(figure, ylabel, f"{title} while training", about)


def sizes_figure(edges: Edges, models: Mapping[str, Event], ends: Ends, about: str = "") -> Figure:
    """Oracle error by t of probes of several models, by name, the smallest first (as Fig. 7b)."""
    figure, axes, t = _over_time(edges, ends)
    for (name, probe), colour in zip(models.items(), in_order(len(models)), strict=True):
        mean, error = (np.array(probe["train"][key], float) for key in ("oracle", "oracle_se"))
        axes.errorbar(t, mean, 2 * error, color=colour, lw=1.5, marker=".", label=name)
    title = "Oracle error of several models, with 2 standard errors"
    return _labelled(figure, "MSE(oracle velocity), training samples", title, about)


def _heatmap(
    edges: Edges,
    probes: Sequence[Event],
    values: np.ndarray,
    ends: Ends,
    marks: Marks,
    **colours: Any,
) -> tuple[Figure, Axes, QuadMesh]:
    """A `heatmap` with stages and marks."""
    figure, axes, mesh = heatmap(edges, [probe["step"] for probe in probes], values, **colours)
    divide_stages(axes, ends)
    for step, name in marks:
        axes.axvline(step, color="w", lw=2.4)
        axes.axvline(step, color=HELD_OUT, lw=1.2, ls="-.", label=f"{name}, step {step}")
    return figure, axes, mesh


def error_heatmap(
    edges: Edges, probes: Sequence[Event], ends: Ends, about: str = "", marks: Marks = ()
) -> Figure:
    """Oracle error on training samples over t and training step."""
    values = np.array([probe["train"]["oracle"] for probe in probes], float).T
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    norm = LogNorm(max(low, high / 1e3), max(high, low * 1.01))
    figure, axes, mesh = _heatmap(edges, probes, values, ends, marks, norm=norm, cmap=MAGNITUDE)
    log_ticks(figure.colorbar(mesh, label="MSE(oracle velocity), training samples").ax.yaxis)
    return finished(figure, "Oracle error while training", about)


def gap_heatmap(
    edges: Edges, probes: Sequence[Event], ends: Ends, about: str = "", marks: Marks = ()
) -> Figure:
    """Held-out minus training error, as a share of the latter, over t and training step.

    Cells whose gap is less than two standard errors from zero are grey. All probes have the same
    noisy samples, so a deviation by chance is in all of them.
    """
    gaps = np.array([probe["gap"] for probe in probes], float)
    values = (gaps / np.array([probe["train"]["conditional"] for probe in probes], float)).T
    noise = np.isfinite(values) & ~np.stack([gap_is_clear(probe) for probe in probes], axis=1)
    clear = np.where(noise, np.nan, values)
    largest = np.nanmax(np.abs(clear), initial=0.05)
    norm = TwoSlopeNorm(0, -largest, largest)
    figure, axes, mesh = _heatmap(edges, probes, clear, ends, marks, norm=norm, cmap="PuOr_r")
    cells = np.moveaxis(np.asarray(mesh.get_coordinates()), 2, 0)
    grey = np.where(noise, 0.0, np.nan)
    axes.pcolormesh(*cells, grey, cmap=ListedColormap([NOISE]), zorder=0.5)
    figure.colorbar(mesh, label="share of the training error")
    label = "noise: less than 2 standard errors from 0 (by chance 1 in 20 is coloured)"
    axes.fill_between([], [], color=NOISE, label=label)
    return finished(figure, "Held-out minus training error", about, ncols=1)


def gap_is_clear(probe: Event) -> np.ndarray:
    """In which bins the gap is two standard errors or more from zero, (T,) of bool."""
    gap, error = np.array(probe["gap"], float), np.array(probe["gap_se"], float)
    return np.abs(gap) >= 2 * error  # not where either is NaN: a lone sample has no error


def stages_and_error_figure(
    edges: Edges,
    probe: Event,
    times: Sequence[float],
    top1: Sequence[float],
    ends: Ends,
    about: str = "",
) -> Figure:
    """Concentration of the posterior and the model's oracle error, over one axis of t."""
    figure, axes, t = _over_time(edges, ends)
    label = "largest posterior weight (data)"
    axes.plot(times, np.array(top1, float), ".-", color=DATA, lw=1.3, ms=4, label=label)
    axes.set(ylabel="largest posterior weight", ylim=(0, 1.02))
    other, error = axes.twinx(), np.array(probe["train"]["oracle"], float)
    other.plot(t, error, ".-.", color=ORACLE, label="oracle error (model)")
    other.set_ylabel("MSE(oracle velocity)", color=ORACLE)
    other.tick_params(axis="y", colors=ORACLE)
    other.set_ylim(bottom=0)
    title = f"Where the data decide, and where the model errs, at step {probe['step']}"
    return finished(figure, title, about, ncols=2)


def spending_figure(edges: Edges, window: Event, ends: Ends) -> Figure:
    """What training spends on each stage, and how it draws t."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for row, name in enumerate(("draws", "loss", "gradient")):
        start = 0.0
        for (stage, shares), colour in zip(window["stages"].items(), STAGE_COLOURS, strict=True):
            share = shares[name] or 0.0
            label = stage if row == 0 else None
            left.barh(row, share, left=start, color=colour, alpha=0.55, label=label)
            if share > 0.08:
                left.text(start + share / 2, row, f"{share:.0%}", ha="center", va="center", size=9)
            start += share
    left.set_yticks(range(3), ["draws", "loss", "gradient\n(dL/dv)"])
    left.set(xlim=(0, 1), xlabel="share of each stage")
    left.invert_yaxis()
    seen = window.get("samples")  # missing in older files
    about = f"n = {seen:,} training samples".replace(",", " ") if seen else ""
    heading(left, "What training spends", about)
    time_axis(right, centres(edges))
    shade_stages(right, ends)
    bounds, draws = np.asarray(edges), np.array(window["draws"], float)
    within = np.clip(bounds, *right.get_xlim())
    right.stairs(draws / np.diff(bounds), within, fill=True, color="0.5", alpha=0.5, label="drawn")
    if window.get("density"):
        density = np.array(window["density"], float) / np.diff(bounds)
        right.stairs(density, within, color=HELD_OUT, lw=1.5, label="nominal")
    right.set(ylabel="density of t (1: uniform)")
    heading(right, f"Draws of t, steps {window['from_step']} to {window['step']}")
    legend(figure, ncols=5)
    return figure
