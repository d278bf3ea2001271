"""The figures of reports: over steps, over sizes, and the posterior over t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.callbacks.drawing import (
    DATA,
    FLOOR,
    HELD_OUT,
    TRAIN,
    draw_boundary,
    heading,
    in_order,
    legend,
    log_ticks,
    new_figure,
    time_axis,
)
from stagewise.recipes.report_facts import Facts, Value

__all__ = [
    "by_size_figure",
    "excess_figure",
    "loss_by_step_figure",
    "posterior_figure",
]

_STYLES = ("-", "--", "-.", ":")
"""Of stages or runs, so that lines differ not only in colour."""


def loss_by_step_figure(facts: Facts) -> Figure:
    """The loss over uniform t against its floor."""
    figure, axes = _logarithmic("training step", "MSE of the velocity, uniform t")
    steps = _steps(facts)
    floor = [facts.mean(probe, "train", "floor").mean for probe in facts.probes]
    for split, colour, style, name in (
        ("train", TRAIN, "-", "training samples"),
        ("held_out", HELD_OUT, "--", "held-out samples"),
    ):
        found = [facts.mean(probe, split, "conditional") for probe in facts.probes]
        if np.isfinite([value.mean for value in found]).any():
            _line(axes, steps, found, label=name, color=colour, ls=style)
    if np.isfinite(floor).any():
        low = 0.5 * np.nanmin(floor)  # a logarithm has no zero to fill from
        axes.fill_between(steps, floor, low, color=FLOOR, lw=0)
        axes.plot(steps, floor, color="0.4", lw=1.4, label="floor: no model goes below")
        axes.set_ylim(bottom=low)
    heading(axes, "The loss and its floor while training")
    legend(figure)
    return figure


def posterior_figure(facts: Facts, key: str, label: str, title: str, about: str) -> Figure:
    """A statistic of the posterior over t at the first probe; later ones have other draws."""
    figure = new_figure()
    axes, probe = figure.add_subplot(), facts.run.first("probe")
    predicted = facts.bank.get("predicted")
    time_axis(axes, probe["t"])
    draw_boundary(axes, facts.boundary, np.nan if predicted is None else predicted)
    axes.plot(probe["t"], np.array(probe[key], float), ".-", color=DATA, label="mean")
    axes.set(ylabel=label)
    axes.set_ylim(bottom=0)
    heading(axes, title, about)
    legend(figure, ncols=2)
    return figure


def excess_figure(
    title: str, lines: Mapping[str, tuple[Facts, str | None]], colours: Sequence[Any] = ()
) -> Figure:
    """Loss above the floor over training steps; a line is a run over all t, or in one stage."""
    figure, axes = _logarithmic("training step", "MSE(oracle velocity), training samples")
    looks = zip(colours or in_order(len(lines)), _cycle(len(lines)), strict=True)
    for (name, (facts, stage)), (colour, style) in zip(lines.items(), looks, strict=True):
        found = [
            facts.mean(probe, "train", "oracle")
            if stage is None
            else Value(facts.stage(probe, stage, "oracle"), 0.0)
            for probe in facts.probes
        ]
        if np.isfinite([value.mean for value in found]).any():
            _line(axes, _steps(facts), found, label=name, color=colour, ls=style)
    heading(axes, title)
    legend(figure)
    return figure


def by_size_figure(runs: Sequence[Facts], steps: Sequence[int], key: str, title: str) -> Figure:
    """An error over the number of parameters of runs, ascending, at steps that all have."""
    figure, axes = _logarithmic("parameters", "MSE, uniform t")
    sizes = [facts.parameters or 0 for facts in runs]
    for step, colour, style in zip(steps, in_order(len(steps)), _cycle(len(steps)), strict=True):
        found = [facts.mean(facts.at(step), "train", key) for facts in runs]
        _line(axes, sizes, found, label=f"step {step}", color=colour, ls=style)
    heading(axes, title)
    legend(figure, ncols=4)
    return figure


def _logarithmic(x: str, y: str) -> tuple[Figure, Axes]:
    figure = new_figure()
    axes = figure.add_subplot(xlabel=x, ylabel=y, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)
    return figure, axes


def _steps(facts: Facts) -> list[int]:
    return [max(1, probe["step"]) for probe in facts.probes]


def _cycle(count: int) -> list[str]:
    return [_STYLES[place % len(_STYLES)] for place in range(count)]


def _line(axes: Axes, at: Sequence[float], found: Sequence[Value], **style: Any) -> None:
    """Means with a band of two standard errors."""
    mean, error = (np.array(values) for values in zip(*found, strict=True))
    axes.plot(at, mean, marker=".", lw=1.6, **style)
    low = np.maximum(mean - 2 * error, 1e-3 * np.abs(mean))  # a logarithm has no zero
    axes.fill_between(at, low, mean + 2 * error, color=style["color"], alpha=0.15, lw=0)
