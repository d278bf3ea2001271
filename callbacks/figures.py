"""Pictures of posteriors and of samples, as matplotlib figures.

Those of a model's velocity are in `velocity_figures`; `drawing` has the axis of t, the stages and
the colours. `about` describes the data, with N and n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from torch import Tensor

from stagewise.callbacks.drawing import (
    DATA,
    MAGNITUDE,
    by_step,
    centres,
    draw_boundary,
    finished,
    new_figure,
    step_colour,
    time_axis,
)
from stagewise.copies import COPY_RATIO
from stagewise.stages import StageBoundary, StageCurve

__all__ = [
    "Column",
    "Event",
    "concentration_figure",
    "copies_figure",
    "draw_mean",
    "draw_spread",
    "grid_figure",
    "heatmap",
    "heatmap_figure",
    "step_columns",
    "target_difference_figure",
]

Event = Mapping[str, Any]

_COPIED = "#D55E00"


def draw_spread(axes: Axes, curve: StageCurve, statistic: str) -> None:
    """A statistic over t: its mean, and the middle half of the queries."""
    low, high = (curve.quantile(statistic, q) for q in (0.25, 0.75))
    label = "middle half of the samples"
    axes.fill_between(curve.times, low, high, color="0.78", lw=0, label=label)
    axes.plot(curve.times, curve.mean(statistic), ".-", color=DATA, lw=1.5, ms=4, label="mean")


def draw_mean(axes: Axes, curve: StageCurve, statistic: str) -> None:
    """A statistic over t: its mean with two standard errors."""
    values = curve.statistic(statistic)
    error = 2 * values.std(1) / values.shape[1] ** 0.5
    about: dict[str, Any] = {"label": "mean, 2 standard errors", "lw": 1.5, "ms": 4}
    axes.errorbar(curve.times, values.mean(1), error, fmt=".-", color=DATA, **about)


def concentration_figure(
    curve: StageCurve, boundary: StageBoundary, predicted: float, about: str
) -> Figure:
    """The largest posterior weight over t: mean, middle half of the queries, and boundaries."""
    figure, axes = _of_posterior(curve, boundary, predicted)
    draw_spread(axes, curve, "top1")
    axes.set(ylabel="largest posterior weight", ylim=(0, 1.02))
    title = "Posterior concentration: how far one row explains a noisy sample"
    return finished(figure, title, about)


def target_difference_figure(
    curve: StageCurve, boundary: StageBoundary, predicted: float, about: str
) -> Figure:
    """MSE between the conditional and the oracle velocity over t."""
    figure, axes = _of_posterior(curve, boundary, predicted)
    draw_mean(axes, curve, "target_difference")
    axes.set(ylabel="MSE(conditional, oracle velocity)")
    axes.set_ylim(bottom=0)
    return finished(figure, "The floor: the part of the loss that no model can remove", about)


def _of_posterior(
    curve: StageCurve, boundary: StageBoundary, predicted: float
) -> tuple[Figure, Axes]:
    figure = new_figure()
    axes = figure.add_subplot()
    time_axis(axes, curve.times.tolist())
    draw_boundary(axes, boundary, predicted)
    return figure, axes


def step_columns(steps: Sequence[int]) -> np.ndarray:
    """Edges of the columns of a heat map: half-way between probes; the outer ones are at its ends.

    So each column is around its probe, and no column lies beyond the last step.
    """
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    return np.array([steps[0], *centres(steps), steps[-1]], dtype=float)


def heatmap(
    edges: Sequence[float] | np.ndarray, steps: Sequence[int], values: np.ndarray, **colours: Any
) -> tuple[Figure, Axes, QuadMesh]:
    """Values, (T, P), over t and the steps of P probes; also the axes and the mesh."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="training step")
    time_axis(axes, centres(edges), which="y")
    rows = np.clip(edges, *axes.get_ylim())
    return figure, axes, axes.pcolormesh(step_columns(steps), rows, values, **colours)


def heatmap_figure(
    steps: Sequence[int],
    edges: np.ndarray,
    top1: np.ndarray,
    midpoints: Sequence[float],
    about: str = "",
) -> Figure:
    """Mean top-1 weight, (P, T), over t and the steps of P probes, with the midpoint at each."""
    figure, axes, mesh = heatmap(edges, steps, top1.T, vmin=0, vmax=1, cmap=MAGNITUDE)
    label = "midpoint of each probe"
    axes.plot(steps, midpoints, "w.-", lw=1, ms=5, label=label, clip_on=False)
    figure.colorbar(mesh, label="mean largest posterior weight")
    return finished(figure, "Posterior concentration while training", about, on="0.4")


def copies_figure(probes: Sequence[Event], about: str = "") -> Figure:
    """The share of copies by t_switch with its interval, coloured by step; probes ascend."""
    figure = new_figure()
    axes = figure.add_subplot()
    axes.set_xlabel("t_switch   (0 = noise; the oracle before it, the model after)")
    colours = by_step([probe["step"] for probe in probes])
    for place, probe in enumerate(probes):
        colour = step_colour(colours, probe["step"])
        few = place in (0, len(probes) - 1) or len(probes) < 8
        label = f"step {probe['step']}" if few else None
        low, high = np.array(probe["low"], float), np.array(probe["high"], float)
        axes.plot(probe["t_switch"], probe["copies"], ".-", color=colour, label=label)
        axes.fill_between(probe["t_switch"], low, high, color=colour, alpha=0.15, lw=0)
    top = max([0.2, *(high for probe in probes for high in probe["high"] if high is not None)])
    axes.set(ylabel=f"share of copies (d1/d2 < {COPY_RATIO:.2f})", ylim=(-0.02 * top, 1.04 * top))
    title = "Copies of training rows among samples, with 95 % interval"
    return finished(figure, title, about, ncols=4)


class Column(NamedTuple):
    """Images of a `grid_figure`.

    Attributes:
        heading: Above it.
        images: (n, C, H, W).
        ratio: The d1/d2 printed under each image, (n,); a copy gets a frame.
        of_data: Whether they are data. The smallest and the largest number of all data are black
            and white in all columns, so that a sample and its nearest row can be compared.
    """

    heading: str
    images: Tensor
    ratio: Tensor | None = None
    of_data: bool = False


def grid_figure(columns: Sequence[Column], title: str) -> Figure:
    """Columns of images, with a frame around copies."""
    rows = len(columns[0].images)
    figure = new_figure(max(4.0, 0.85 * len(columns)), 0.95 * rows + 0.9)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    data = torch.cat([column.images for column in columns if column.of_data])
    low, high = (float(end) for end in data.float().aminmax())
    for j, column in enumerate(columns):
        shown = ((column.images.float() - low) / max(high - low, 1e-12)).nan_to_num().clamp(0, 1)
        for i in range(rows):
            axes = grid[i, j]
            axes.imshow(shown[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            copied = column.ratio is not None and bool(column.ratio[i] < COPY_RATIO)
            for spine in axes.spines.values():
                spine.set(visible=copied, color=_COPIED, linewidth=2.5)
            if column.ratio is not None:
                label = axes.set_xlabel(f"{float(column.ratio[i]):.2f}", fontsize=7, labelpad=3)
                label.set(color=_COPIED if copied else "black")
        grid[0, j].set_title(column.heading, fontsize=7)
    key = "number: d1/d2 to the training rows; red frame: a copy; t = 0 is noise"
    figure.suptitle(f"{title}\n{key}", fontsize=9)
    return figure
