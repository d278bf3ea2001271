"""The pictures of a run's stages. Every function returns a matplotlib figure and saves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagewise.stages import StageBoundary, StageCurve

__all__ = [
    "TIME_LABEL",
    "concentration_figure",
    "draw_boundary",
    "draw_mean",
    "draw_spread",
    "heatmap_figure",
    "mark_time",
    "new_figure",
    "probe_edges",
    "render",
    "target_difference_figure",
]

TIME_LABEL = "t   (0 = noise, 1 = data)"
_MIDPOINT, _COLLAPSED, _PREDICTED = "tab:green", "tab:purple", "0.45"


def render(figure: Figure) -> np.ndarray:
    """The picture as an array, (height, width, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure() -> Figure:
    """An empty figure of the house's size, outside pyplot, whose current figure is the user's."""
    return Figure(figsize=(7, 4.2), dpi=110, layout="constrained")


def mark_time(axes: Axes, at: float | None, name: str, **style: Any) -> None:
    """A vertical line that the legend names; none where the time is None or NaN."""
    if at is not None and np.isfinite(at):
        axes.axvline(at, label=f"{name}  t = {at:.3f}", **style)


def draw_boundary(axes: Axes, boundary: StageBoundary, predicted: float) -> None:
    """Vertical lines at the boundaries, with their intervals shaded."""
    lines = (
        ("midpoint", boundary.midpoint, boundary.midpoint_low, boundary.midpoint_high),
        ("collapsed", boundary.collapsed, boundary.collapsed_low, boundary.collapsed_high),
    )
    for (name, at, low, high), colour in zip(lines, (_MIDPOINT, _COLLAPSED), strict=True):
        if np.isfinite(at):
            axes.axvspan(low, high, color=colour, alpha=0.18, lw=0)
        mark_time(axes, at, name, color=colour, lw=1.2)
    mark_time(axes, predicted, "predicted", color=_PREDICTED, lw=1.2, ls="--")


def draw_spread(axes: Axes, curve: StageCurve, statistic: str) -> None:
    """A statistic over t: its mean, and the middle half of the queries."""
    t = curve.times.numpy()
    low, high = (curve.quantile(statistic, q).numpy() for q in (0.25, 0.75))
    axes.fill_between(t, low, high, color="0.85", label="middle half of the queries")
    axes.plot(t, curve.mean(statistic).numpy(), "k.-", lw=1.5, ms=4, label="mean")


def draw_mean(axes: Axes, curve: StageCurve, statistic: str) -> None:
    """A statistic over t: its mean with two standard errors."""
    values = curve.statistic(statistic)
    mean, error = values.mean(1).numpy(), (values.std(1) / values.shape[1] ** 0.5).numpy()
    t, label = curve.times.numpy(), "mean, 2 standard errors"
    axes.errorbar(t, mean, 2 * error, fmt="k.-", lw=1.5, ms=4, label=label)


def concentration_figure(
    curve: StageCurve, boundary: StageBoundary, predicted: float, title: str
) -> Figure:
    """Top-1 posterior weight over t: mean, middle half of the queries, and the boundaries.

    Args:
        curve: The measured curve.
        boundary: Its boundary.
        predicted: The predicted boundary, or NaN.
        title: Names the data.

    Returns:
        The figure.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    draw_spread(axes, curve, "top1")
    draw_boundary(axes, boundary, predicted)
    axes.set(
        xlabel=TIME_LABEL,
        ylabel="largest posterior weight",
        title=f"Posterior concentration\n{title}",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axes.legend(loc="lower right", fontsize=8)
    return figure


def target_difference_figure(
    curve: StageCurve, boundary: StageBoundary, predicted: float, title: str
) -> Figure:
    """MSE between the conditional and the oracle velocity over t; arguments as above."""
    figure = new_figure()
    axes = figure.add_subplot()
    draw_mean(axes, curve, "target_difference")
    draw_boundary(axes, boundary, predicted)
    axes.set(
        xlabel=TIME_LABEL,
        ylabel="MSE(conditional, oracle velocity)",
        title=f"How far the training target is from the oracle\n{title}",
        xlim=(0, 1),
    )
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", fontsize=8)
    return figure


def probe_edges(steps: Sequence[int]) -> np.ndarray:
    """Edges of the columns of a heat map: a probe stands for the steps until the next one."""
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.array([*steps, steps[-1] + width], dtype=float)


def heatmap_figure(
    steps: Sequence[int], edges: np.ndarray, top1: np.ndarray, midpoints: Sequence[float]
) -> Figure:
    """Mean top-1 weight over t and training step.

    Args:
        steps: Steps of the probes, (P,), ascending.
        edges: Edges of the strata, (T + 1,).
        top1: Means, (P, T).
        midpoints: The boundary at each probe, (P,).

    Returns:
        The figure.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    columns = probe_edges(steps)
    mesh = axes.pcolormesh(columns, edges, top1.T, vmin=0, vmax=1, cmap="viridis")
    middles = columns[:-1] + np.diff(columns) / 2
    axes.plot(middles, midpoints, "w.-", lw=1, ms=4, label="midpoint")
    axes.set(
        xlabel="training step",
        ylabel=TIME_LABEL,
        title="Posterior concentration while training",
        ylim=(0, 1),
    )
    axes.legend(loc="upper right", fontsize=8, facecolor="0.4", labelcolor="w")
    figure.colorbar(mesh, label="mean largest posterior weight")
    return figure
