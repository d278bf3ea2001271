"""The pictures of a run. Every function returns a matplotlib figure and saves nothing.

Those of a model's velocity are in `stagewise.callbacks.velocity_figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from stagewise.copies import COPY_RATIO
from stagewise.stages import StageBoundary, StageCurve

__all__ = [
    "TIME_LABEL",
    "Column",
    "concentration_figure",
    "copies_figure",
    "draw_boundary",
    "draw_mean",
    "draw_spread",
    "grid_figure",
    "heatmap_figure",
    "is_image",
    "mark_time",
    "new_figure",
    "over_time",
    "render",
    "step_columns",
    "target_difference_figure",
    "time_axis",
]

Edges = Sequence[float]
Event = Mapping[str, Any]
Ends = tuple[float | None, float | None]

TIME_LABEL = "t   (0 = noise, 1 = data)"
_COPIED = "tab:red"


def render(figure: Figure) -> np.ndarray:
    """The picture as an array, (height, width, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure(width: float = 7, height: float = 4.2) -> Figure:
    """An empty figure of the house's size, outside pyplot, whose current figure is the user's."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def mark_time(axes: Axes, at: float | None, name: str, **style: Any) -> None:
    """A vertical line that the legend names; none where the time is None or NaN."""
    if at is not None and np.isfinite(at):
        axes.axvline(at, label=f"{name}  t = {at:.3f}", **style)


def draw_boundary(axes: Axes, boundary: StageBoundary, predicted: float) -> None:
    """Vertical lines at the boundaries, with their intervals shaded."""
    found = boundary.as_dict()
    for name, colour in (("midpoint", "tab:green"), ("collapsed", "tab:purple")):
        if np.isfinite(found[name]):
            low, high = found[f"{name}_low"], found[f"{name}_high"]
            axes.axvspan(low, high, color=colour, alpha=0.18, lw=0)
        mark_time(axes, found[name], name, color=colour, lw=1.2)
    mark_time(axes, predicted, "predicted", color="0.45", lw=1.2, ls="--")


def draw_spread(axes: Axes, curve: StageCurve, statistic: str) -> None:
    """A statistic over t: its mean, and the middle half of the queries."""
    t = curve.times.numpy()
    low, high = (curve.quantile(statistic, q).numpy() for q in (0.25, 0.75))
    axes.fill_between(t, low, high, color="0.85", label="middle half of the queries")
    axes.plot(t, curve.mean(statistic).numpy(), "k.-", lw=1.5, ms=4, label="mean")


def draw_mean(axes: Axes, curve: StageCurve, statistic: str) -> None:
    """A statistic over t: its mean with two standard errors."""
    values = curve.statistic(statistic)
    t, mean, error = curve.times, values.mean(1), 2 * values.std(1) / values.shape[1] ** 0.5
    style: dict[str, Any] = {"fmt": "k.-", "lw": 1.5, "ms": 4, "label": "mean, 2 standard errors"}
    axes.errorbar(t.numpy(), mean.numpy(), error.numpy(), **style)


def concentration_figure(
    curve: StageCurve, boundary: StageBoundary, predicted: float, title: str
) -> Figure:
    """Top-1 posterior weight over t: mean, middle half of the queries, and the boundaries."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel=TIME_LABEL, ylabel="largest posterior weight")
    draw_spread(axes, curve, "top1")
    draw_boundary(axes, boundary, predicted)
    axes.set(title=f"Posterior concentration\n{title}", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right", fontsize=8)
    return figure


def target_difference_figure(
    curve: StageCurve, boundary: StageBoundary, predicted: float, title: str
) -> Figure:
    """MSE between the conditional and the oracle velocity over t."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel=TIME_LABEL, ylabel="MSE(conditional, oracle velocity)")
    draw_mean(axes, curve, "target_difference")
    draw_boundary(axes, boundary, predicted)
    axes.set(title=f"How far the training target is from the oracle\n{title}", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", fontsize=8)
    return figure


def step_columns(steps: Sequence[int]) -> np.ndarray:
    """Edges of the columns of a heat map: a probe stands for the steps until the next one."""
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.array([*steps, steps[-1] + width], dtype=float)


def heatmap_figure(
    steps: Sequence[int], edges: np.ndarray, top1: np.ndarray, midpoints: Sequence[float]
) -> Figure:
    """Mean top-1 weight, (P, T), over t and the steps of P probes, with the midpoint at each."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="training step", ylabel=TIME_LABEL)
    columns = step_columns(steps)
    mesh = axes.pcolormesh(columns, edges, top1.T, vmin=0, vmax=1, cmap="viridis")
    middles = columns[:-1] + np.diff(columns) / 2
    axes.plot(middles, midpoints, "w.-", lw=1, ms=4, label="midpoint")
    axes.set(title="Posterior concentration while training", ylim=(0, 1))
    axes.legend(loc="upper right", fontsize=8, facecolor="0.4", labelcolor="w")
    figure.colorbar(mesh, label="mean largest posterior weight")
    return figure


def time_axis(axes: Axes, edges: np.ndarray) -> np.ndarray:
    """Labels the axis of t, stretched where the bins are narrow; gives the centres of the bins."""
    bins = len(edges) - 1
    even = np.allclose(np.diff(edges), 1 / bins, rtol=1e-3)
    if not even:
        places = np.linspace(0, 1, bins + 1)
        stretch = (lambda t: np.interp(t, edges, places), lambda at: np.interp(at, places, edges))
        axes.set_xscale("function", functions=stretch)
        axes.set_xticks(edges[:: max(1, bins // 8)])
        axes.xaxis.set_major_formatter(lambda t, _: f"{t:.3g}")
    axes.set(xlabel=TIME_LABEL + ("" if even else ", every bin drawn as wide"), xlim=(0, 1))
    return (edges[1:] + edges[:-1]) / 2


def over_time(edges: Edges, ends: Ends) -> tuple[Figure, Axes, np.ndarray]:
    """A figure over t with lines at both ends; its axes, and the centres of the bins."""
    figure = new_figure()
    axes = figure.add_subplot()
    t = time_axis(axes, np.asarray(edges))
    for at, name, style in zip(ends, ("midpoint", "collapsed"), ("--", ":"), strict=True):
        mark_time(axes, at, name, color="0.35", lw=1.1, ls=style)
    return figure, axes, t


def is_image(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be shown: (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def copies_figure(probes: Sequence[Event]) -> Figure:
    """The share of copies by t_switch with its interval, coloured by step; probes ascend."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="t_switch   (oracle before, model after)")
    for place, probe in enumerate(probes):
        colour = mpl.colormaps["viridis"](place / max(len(probes) - 1, 1) * 0.9)
        few = place in (0, len(probes) - 1) or len(probes) < 8
        label = f"step {probe['step']}" if few else None
        low, high = np.array(probe["low"], float), np.array(probe["high"], float)
        axes.plot(probe["t_switch"], probe["copies"], ".-", color=colour, label=label)
        axes.fill_between(probe["t_switch"], low, high, color=colour, alpha=0.15, lw=0)
    axes.set(ylabel=f"share of copies (d1/d2 < {COPY_RATIO:.2f})", ylim=(-0.02, 1.02))
    axes.set_title("Copies of training rows among samples, with 95 % interval")
    axes.legend(fontsize=8)
    return figure


class Column(NamedTuple):
    """Images of a `grid_figure`.

    Attributes:
        heading: Above it.
        images: (n, C, H, W).
        ratio: The d1/d2 that is printed under each image, (n,); a copy is framed.
        of_data: Whether they are data. The least and the largest number of such images are black
            and white in all columns, so that a sample and its nearest row can be compared.
    """

    heading: str
    images: Tensor
    ratio: Tensor | None = None
    of_data: bool = False


def grid_figure(columns: Sequence[Column], title: str) -> Figure:
    """Columns of images, copies framed."""
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
    said = "number: d1/d2 to the training rows; red frame: a copy; t = 0 is noise"
    figure.suptitle(f"{title}\n{said}", fontsize=9)
    return figure
