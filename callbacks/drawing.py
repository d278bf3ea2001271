"""What all pictures of this package share: the axis of t, the colours, the legend.

t = 0 is noise in all of them. The axis of t is spaced by `log(t / (1 - t))`, for the linear path
half the log-SNR: so both the stages of images, near t = 0, and those of small vectors, near t = 1,
can be read. The stages are shaded and named above the axes. Colours are those of Okabe and Ito or
of viridis, which colour-blind readers can tell apart; ordered curves (steps, sizes, stages) go from
light, early, to dark, late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from typing_extensions import override

from stagewise.stages import StageBoundary
from stagewise.velocity_probe import STAGES

__all__ = [
    "DATA",
    "FLOOR",
    "HELD_OUT",
    "MAGNITUDE",
    "NOISE",
    "ORACLE",
    "STAGE_COLOURS",
    "TRAIN",
    "Ends",
    "apart",
    "by_step",
    "centres",
    "counted",
    "divide_stages",
    "draw_boundary",
    "finished",
    "heading",
    "in_order",
    "legend",
    "log_ticks",
    "mark_time",
    "new_figure",
    "render",
    "shade_stages",
    "step_bar",
    "step_colour",
    "time_axis",
]

Ends = tuple[float | None, float | None]
"""t where navigation ends (the midpoint) and where the posterior has collapsed, or None or NaN."""

DATA, TRAIN, HELD_OUT, ORACLE = "black", "#0072B2", "#D55E00", "#009E73"
_OKABE_ITO = (TRAIN, HELD_OUT, ORACLE, "#CC79A7", "#E69F00", "#56B4E9")
FLOOR, NOISE = "0.80", "0.75"
MAGNITUDE = "viridis"
"""Of heat maps: dark is small."""
_ORDER: Colormap = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.92, 0.0, 256)), "order")
"""From early to late, or small to large, without the yellow that is lost on white."""
STAGE_COLOURS = tuple(mpl.colors.to_hex(_ORDER(place)) for place in (0.05, 0.45, 0.85))

_TICKS = [0.5] + [
    tick
    for digit in (1, 2, 5)  # without room for all, the first of these
    for power in range(1, 7)
    for tick in (digit / 10**power, 1 - digit / 10**power)
]
_LEAST, _MOST = 3, 8
"""Labelled ticks of a logarithmic axis."""
_NARROW = 0.09
"""Share of an axis below which there is no room to name a stage."""
_APART = 0.055
"""The least distance of two ticks of t, as a share of the axis."""
_SMALL: dict[str, Any] = {"fontsize": 8, "color": "0.3"}


def render(figure: Figure) -> np.ndarray:
    """The picture as an array, (height, width, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def new_figure(width: float = 7, height: float = 4.4) -> Figure:
    """An empty figure of the usual size, outside of pyplot, which belongs to the user."""
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def counted(rows: int | None, queries: int | None, bins: int) -> str:
    """How many rows and noisy samples a picture shows, as far as known, in words."""
    parts = [f"N = {rows:,} rows".replace(",", " ")] if rows else []
    parts += [f"n = {queries} noisy samples in each of {bins} bins of t"] if queries else []
    return ", ".join(parts)


def heading(axes: Axes, title: str, about: str = "") -> None:
    """The title, and below it in small print `about`, above the names of the stages."""
    room = 20 if axes.get_xscale() == "logit" else 8  # for the names of the stages
    axes.set_title(title, loc="left", fontsize=11, pad=room + 14 if about else room)
    # Not in the layout: there is room below the title, and long text must not narrow the axes.
    place = (0, 1), (0, room), "axes fraction", "offset points"
    axes.annotate(about, *place, in_layout=False, **_SMALL)


def legend(figure: Figure, ncols: int = 3, on: str = "none") -> None:
    """One legend below all axes, each name once; `on`: its background, for white lines."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        ncols = min(ncols, len(found))
        style = {"ncols": ncols, "facecolor": on, "edgecolor": "none", "fontsize": 8}
        style["labelcolor"] = "black" if on == "none" else "white"
        figure.legend(found.values(), found.keys(), loc="outside lower center", **style)


def finished(figure: Figure, title: str, about: str = "", **options: Any) -> Figure:
    """A figure with heading and legend, whose options are in `options`."""
    heading(figure.axes[0], title, about)
    legend(figure, **options)
    return figure


# -- logarithmic axes -------------------------------------------------------------------------


def log_ticks(axis: Axis) -> None:
    """Labels three ticks or more of a logarithmic axis, however short, with plain numbers."""
    axis.set_major_locator(_LogTicks())
    axis.set_major_formatter(lambda value, _: _plain(value))
    axis.set_minor_formatter(NullFormatter())


class _LogTicks(LogLocator):
    """Powers of ten; on a shorter axis 2 and 5 too, then 3, 4, 6, ..., then round numbers."""

    @override
    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        powers = range(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        every = math.ceil(len(powers) / _MOST)
        for digits in ((1,), (1, 2, 5), (1, 1.2, 1.5, *range(2, 10))):
            found = [digit * 10.0**power for power in powers[::every] for digit in digits]
            within = [tick for tick in found if vmin <= tick <= vmax]
            if len(within) >= _LEAST:
                return within
        return MaxNLocator(_MOST, min_n_ticks=_LEAST).tick_values(vmin, vmax)


def _plain(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 1000 else f"{value:.6g}"


# -- the axis of t ----------------------------------------------------------------------------


def centres(edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """The middles of bins."""
    bounds = np.asarray(edges, float)
    return (bounds[1:] + bounds[:-1]) / 2


def time_axis(axes: Axes, t: Sequence[float] | np.ndarray, *, which: str = "x") -> None:
    """Makes an axis that of t, wide enough for ascending times within (0, 1).

    The ends are half as far from 0 and 1 as the outer times, so that the middle of a bin is in the
    middle of what is shown of it.
    """
    low, high = float(t[0]) / 2, 1 - (1 - float(t[-1])) / 2
    least = _APART * (_logit(high) - _logit(low))
    shown: list[float] = []
    for tick in _TICKS:
        near = any(abs(_logit(tick) - _logit(other)) < least for other in shown)
        if low <= tick <= high and not near:
            shown.append(tick)
    getattr(axes, f"set_{which}scale")("logit", nonpositive="clip")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(shown, [f"{tick:.6g}" for tick in shown])
    axis.set_ticks([], minor=True)
    getattr(axes, f"set_{which}lim")(low, high)
    scale = ",   log scale at both ends" if which == "x" else ""
    getattr(axes, f"set_{which}label")(f"t   (0 = noise, 1 = data){scale}")


def _logit(t: float) -> float:
    return math.log(t / (1 - t))


def _named_stages(axes: Axes, ends: Ends, which: str) -> list[tuple[str, float, float]]:
    """Names the stages beside an axis of t; the colour, start and end of each that is on it."""
    low, high = getattr(axes, f"get_{which}lim")()
    middle, late = (high if at is None or math.isnan(at) else at for at in ends)
    bounds = np.clip([low, middle, max(middle, late), high], low, high).tolist()
    found, whole = [], _logit(high) - _logit(low)
    style: dict[str, Any] = {"transform": getattr(axes, f"get_{which}axis_transform")(), **_SMALL}
    for name, colour, start, end in zip(STAGES, STAGE_COLOURS, bounds, bounds[1:], strict=False):
        share = (_logit(end) - _logit(start)) / whole
        centre = 1 / (1 + math.exp(-(_logit(start) + _logit(end)) / 2))
        if share > _NARROW and which == "x":
            axes.text(centre, 1.01, name, ha="center", va="bottom", **style)
        elif share > _NARROW:
            axes.text(1.01, centre, name, ha="left", va="center", rotation=-90, **style)
        if share > 0:
            found.append((colour, start, end))
    return found


def shade_stages(axes: Axes, ends: Ends) -> None:
    """Shades the stages and names them above; `time_axis` comes first."""
    for colour, start, end in _named_stages(axes, ends, "x"):
        axes.axvspan(start, end, color=colour, alpha=0.13, lw=0, zorder=0)


def divide_stages(axes: Axes, ends: Ends) -> None:
    """Lines where the stages meet on a vertical axis of t, and their names at the right."""
    for _, start, _ in _named_stages(axes, ends, "y")[1:]:
        axes.axhline(start, color="w", lw=2)
        axes.axhline(start, color="0.25", lw=1.2, ls="--")


def mark_time(axes: Axes, at: float | None, name: str, **style: Any) -> None:
    """A vertical line with a name in the legend; none for the times None, NaN, 0 and 1."""
    if at is not None and 0 < at < 1:  # 0 and 1 are not on the axis
        axes.axvline(at, label=f"{name}  t = {at:.3f}", **style)


def draw_boundary(axes: Axes, boundary: StageBoundary, predicted: float) -> None:
    """The stages, and lines at their boundaries with the 95 % intervals as grey bands."""
    shade_stages(axes, (boundary.midpoint, boundary.collapsed))
    found = boundary.as_dict()
    for name, style in (("midpoint", "--"), ("collapsed", ":")):
        if 0 < found[name] < 1:
            low, high = found[f"{name}_low"], found[f"{name}_high"]
            axes.axvspan(low, high, color="0.3", alpha=0.16, lw=0)
            label = f"{name}  t = {found[name]:.3f} [{low:.3f}, {high:.3f}]"
            axes.axvline(found[name], label=label, color="0.25", lw=1.2, ls=style)
    mark_time(axes, predicted, "predicted", color=HELD_OUT, lw=1.2, ls="-.")


# -- colours of curves without an order, and with one --------------------------------------------


def apart(count: int) -> list[dict[str, Any]]:
    """Styles of curves without an order: colours of Okabe and Ito, then dashes."""
    dashes = ("-", "--", "-.", ":")
    return [
        {"color": _OKABE_ITO[i % len(_OKABE_ITO)], "ls": dashes[i // len(_OKABE_ITO) % 4]}
        for i in range(count)
    ]


def in_order(count: int) -> list[Any]:
    """Colours of ordered curves, from early or small to late or large."""
    return [_ORDER(place) for place in np.linspace(0, 1, count)] if count > 1 else [_ORDER(1.0)]


def by_step(steps: Sequence[int]) -> ScalarMappable:
    """The colours of ascending steps, for `step_colour` and `step_bar`."""
    last = max(2, steps[-1])
    # Two decades at most, or the first steps would take most of the colours.
    begin = min(max(1.0, steps[0], last / 100), last / 2)
    return ScalarMappable(LogNorm(begin, last, clip=True), _ORDER)


def step_colour(colours: ScalarMappable, step: int) -> Any:
    """The colour of a step."""
    return colours.to_rgba(np.array([max(1, step)]))[0]


def step_bar(axes: Axes, colours: ScalarMappable) -> None:
    """The colour bar of `by_step`."""
    assert isinstance(axes.figure, Figure)
    log_ticks(axes.figure.colorbar(colours, ax=axes, label="training step").ax.yaxis)
