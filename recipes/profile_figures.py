"""The pictures of `stagewise profile`: a page for each set of latents, and one of two side by side.

A page holds what is measured over t, near the boundary, and the spectrum with the condition that
predicts it: the information `1/2 sum_k log(1 + rho_t^2 lambda_k)` reaches log N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.callbacks.figures import (
    TIME_LABEL,
    draw_boundary,
    draw_mean,
    draw_spread,
    mark_time,
)
from stagewise.profile import Profile

__all__ = ["comparison_figure", "profile_figure"]

_PANELS = {
    "top1": ("largest posterior weight", "Posterior concentration"),
    "ess": ("effective sample size, rows", "Rows that explain a query"),
    "target_difference": (
        "MSE(conditional, oracle velocity)",
        "Distance of the target from the oracle",
    ),
}


def profile_figure(profile: Profile, title: str) -> Figure:
    """Concentration, rows that explain a query, target difference, and spectrum of one set."""
    figure = Figure(figsize=(12, 8.6), dpi=110, layout="constrained")
    over = "class-wise posterior" if profile.class_wise else "posterior over all rows"
    what = f"{profile.rows} rows of {profile.shape}, {profile.classes or 'no'} classes, {over}"
    figure.suptitle(f"{_short(title, 40)}: {what}", fontsize=12)
    rows = [["top1", "top1", "ess", "ess"], ["target_difference"] * 2 + ["axes", "sum"]]
    cells: dict[str, Axes] = figure.subplot_mosaic(rows)  # type: ignore[arg-type]
    end = _end([profile])
    late = profile.boundary.midpoint > end / 2
    for name in _PANELS:
        draw = draw_mean if name == "target_difference" else draw_spread
        draw(cells[name], profile.curve, name)
        draw_boundary(cells[name], profile.boundary, profile.predicted)
        _over_time(cells[name], name, end)
        free = ("upper left", "lower right") if name == "top1" else ("lower left", "upper right")
        cells[name].legend(loc=free[0] if late else free[1], fontsize=8)  # type: ignore[call-overload]
    _spectrum(cells["axes"], profile, "k", "variance")
    what = "a class of median size" if profile.class_wise else "all rows"
    cells["axes"].set_title(f"Spectrum of {what}", fontsize=11)
    _condition(cells["sum"], profile)
    return figure


def comparison_figure(profiles: Mapping[str, Profile]) -> Figure:
    """Two sets of latents, by name: concentration, effective sample size, target, spectrum."""
    figure = Figure(figsize=(12, 8.6), dpi=110, layout="constrained")
    figure.suptitle(" and ".join(_short(name, 40) for name in profiles), fontsize=12)
    *panels, eigenvalues = figure.subplots(2, 2).flat
    end = _end(list(profiles.values()))
    for (name, profile), colour in zip(profiles.items(), ("tab:blue", "tab:orange"), strict=False):
        boundary, name = profile.boundary, _short(name)
        at = "not reached" if math.isnan(boundary.midpoint) else f"midpoint {boundary.midpoint:.3f}"
        for axes, statistic in zip(panels, _PANELS, strict=True):
            label = f"{name}: {at}" if statistic == "top1" else name
            style = {"color": colour, "marker": ".", "lw": 1.5, "ms": 4, "label": label}
            t, mean = profile.curve.times.numpy(), profile.curve.mean(statistic).numpy()
            axes.plot(t, mean, **style)
        if math.isfinite(boundary.midpoint):
            span = (boundary.midpoint_low, boundary.midpoint_high)
            panels[0].axvspan(*span, color=colour, alpha=0.18, lw=0)
            panels[0].axvline(boundary.midpoint, color=colour, lw=1)
        if math.isfinite(profile.predicted):
            label = f"{name}: predicted {profile.predicted:.3f}"
            panels[0].axvline(profile.predicted, color=colour, lw=1.2, ls="--", label=label)
        scope = "a class of median size" if profile.class_wise else "all rows"
        label = f"{name}: {scope}, {profile.spectrum_rows} rows"
        _spectrum(eigenvalues, profile, colour, label)
    for axes, statistic in zip(panels, _PANELS, strict=True):
        _over_time(axes, statistic, end)
        axes.legend(loc="lower right" if statistic == "top1" else "upper right", fontsize=8)
    eigenvalues.set_title("Spectrum", fontsize=11)
    eigenvalues.legend(loc="lower left", fontsize=8)
    return figure


def _over_time(axes: Axes, statistic: str, end: float) -> None:
    label, title = _PANELS[statistic]
    axes.set(xlabel=TIME_LABEL, ylabel=label, xlim=(0, end))
    axes.set_title(title, fontsize=11)
    if statistic == "ess":
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.02 if statistic == "top1" else None)


def _spectrum(axes: Axes, profile: Profile, colour: str, label: str) -> None:
    # Beyond as many rows as were looked at, and at rounding, there is nothing to see.
    values = profile.eigenvalues.numpy()
    values = values[values > values[0] * 1e-9] if len(values) and values[0] > 0 else values[:0]
    axes.semilogy(np.arange(1, len(values) + 1), values, color=colour, lw=1.8, label=label)
    axes.set(xlabel="principal axis", ylabel="variance along it")
    if len(values) >= 30:  # over less than a decade and a half a log scale has no room for labels
        axes.set_xscale("log")


def _condition(axes: Axes, profile: Profile) -> None:
    """The information by t, which reaches log N at the predicted boundary."""
    axes.set_title("What predicts the boundary", fontsize=11)
    axes.set(xlabel=TIME_LABEL, ylabel=r"$\frac{1}{2}\sum_k\,\log(1+\rho_t^2\lambda_k)$, nats")
    if not 0 < profile.predicted < 1:
        return
    t = torch.linspace(0, min(1 - 1e-3, 2 * profile.predicted), 101, dtype=torch.float64)
    axes.plot(t.numpy(), profile.information(t).numpy(), color="k", lw=1.5, label="information")
    goal = math.log(profile.spectrum_rows)
    axes.axhline(goal, color="tab:red", lw=1.2, label=f"log N, N = {profile.spectrum_rows}")
    mark_time(axes, profile.predicted, "predicted", color="0.45", lw=1.2, ls="--")
    axes.set(xlim=(0, float(t[-1])), ylim=(0, 5 * goal))
    axes.legend(loc="upper left", fontsize=8)


def _end(profiles: list[Profile]) -> float:
    """As far as there is something to see: well beyond the last boundary."""
    last = [p.boundary.collapsed if math.isfinite(p.boundary.collapsed) else 1.0 for p in profiles]
    # Strata are wide far from the boundary; a line needs points on both sides of the edge.
    return min(1.0, max(0.1, 2.5 * max(last)))


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
