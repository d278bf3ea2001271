"""The pictures of a run. Every function returns a matplotlib figure and saves nothing.

Those of a model take what its monitors report, events as they stand in `stages.jsonl`: lists over
the bins of t, with None or NaN where a bin is empty. Arguments of one name are alike in all:

    edges          of the bins of t, (T + 1,)
    probe, probes  one event of a monitor, or several, ascending
    key            which error on training samples: "conditional" or "oracle"
    window         an event `training_window`
    times, top1    mean times of the strata of a `PosteriorMonitor`, and its mean largest weights
    ends           t where navigation ends and where the posterior has collapsed, or None
    title          names the data or the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
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
    "dynamics_figure",
    "error_heatmap",
    "gap_heatmap",
    "gap_is_clear",
    "grid_figure",
    "heatmap_figure",
    "is_image",
    "loss_by_time_figure",
    "mark_time",
    "new_figure",
    "over_time",
    "render",
    "spending_figure",
    "stages_and_error_figure",
    "target_difference_figure",
]

Edges = Sequence[float]
Event = Mapping[str, Any]
Ends = tuple[float | None, float | None]

TIME_LABEL = "t   (0 = noise, 1 = data)"
_TRAIN, _HELD_OUT, _ORACLE, _NOISE, _COPIED = "tab:blue", "tab:orange", "tab:red", "0.75", "tab:red"


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


def _columns(steps: Sequence[int]) -> np.ndarray:
    """Edges of the columns of a heat map: a probe stands for the steps until the next one."""
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.array([*steps, steps[-1] + width], dtype=float)


def heatmap_figure(
    steps: Sequence[int], edges: np.ndarray, top1: np.ndarray, midpoints: Sequence[float]
) -> Figure:
    """Mean top-1 weight, (P, T), over t and the steps of P probes, with the midpoint at each."""
    figure = new_figure()
    axes = figure.add_subplot(xlabel="training step", ylabel=TIME_LABEL)
    columns = _columns(steps)
    mesh = axes.pcolormesh(columns, edges, top1.T, vmin=0, vmax=1, cmap="viridis")
    middles = columns[:-1] + np.diff(columns) / 2
    axes.plot(middles, midpoints, "w.-", lw=1, ms=4, label="midpoint")
    axes.set(title="Posterior concentration while training", ylim=(0, 1))
    axes.legend(loc="upper right", fontsize=8, facecolor="0.4", labelcolor="w")
    figure.colorbar(mesh, label="mean largest posterior weight")
    return figure


def _time_axis(axes: Axes, edges: np.ndarray) -> np.ndarray:
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
    t = _time_axis(axes, np.asarray(edges))
    for at, name, style in zip(ends, ("midpoint", "collapsed"), ("--", ":"), strict=True):
        mark_time(axes, at, name, color="0.35", lw=1.1, ls=style)
    return figure, axes, t


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
    columns = _columns([probe["step"] for probe in probes])
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
    columns, grey = _columns([probe["step"] for probe in probes]), np.where(noise, 0.0, np.nan)
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
    _time_axis(right, bounds)
    right.stairs(draws / np.diff(bounds), bounds, fill=True, color="0.8", label="drawn")
    if window.get("density"):
        density = np.array(window["density"], float) / np.diff(bounds)
        right.stairs(density, bounds, color="tab:red", lw=1.3, label="nominal")
    title = f"Draws, steps {window['from_step']} to {window['step']}"
    right.set(ylabel="density of t", title=title)
    right.legend(fontsize=8)
    return figure


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
