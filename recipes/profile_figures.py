"""The figures of `stagewise profile`: a page for each set of latents, and one that compares two.

A page shows what was measured over t near the boundary, the spectrum, and the condition that
predicts the boundary: the information `1/2 sum_k log(1 + rho_t^2 lambda_k)` reaches log N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.callbacks.drawing import (
    DATA,
    HELD_OUT,
    TRAIN,
    counted,
    draw_boundary,
    heading,
    legend,
    log_ticks,
    mark_time,
    new_figure,
    time_axis,
)
from stagewise.callbacks.figures import draw_mean, draw_spread
from stagewise.profile import Profile
from stagewise.recipes.profile_report import shortened

__all__ = ["comparison_figure", "profile_figure"]

_PANELS = {
    "top1": ("largest posterior weight", "Posterior concentration"),
    "ess": ("effective sample size, rows", "Rows that explain a noisy sample"),
    "target_difference": (
        "MSE(conditional, oracle velocity)",
        "Floor: the part of the loss no model can remove",
    ),
}


def profile_figure(profile: Profile, title: str) -> Figure:
    """Concentration, effective sample size, floor and spectrum of one set."""
    figure = new_figure(13, 9.4)
    over = "class-wise posterior" if profile.class_wise else "posterior over all rows"
    strata, queries = profile.curve.t.shape
    about = f"{profile.shape}, {profile.classes or 'no'} classes, {over}"
    about += f"\n{counted(profile.rows, queries, strata)}"
    figure.suptitle(f"{shortened(title, 40)}: {about}", fontsize=11)
    rows = [["top1"] * 3 + ["ess"] * 3, ["target_difference"] * 2 + ["axes"] * 2 + ["sum"] * 2]
    cells: dict[str, Axes] = figure.subplot_mosaic(rows)  # type: ignore[arg-type]
    for name in _PANELS:
        _over_time(cells[name], name, profile)
        draw_boundary(cells[name], profile.boundary, profile.predicted)
        draw = draw_mean if name == "target_difference" else draw_spread
        draw(cells[name], profile.curve, name)
        _from_zero(cells[name], name)
    _spectrum(cells["axes"], profile, DATA)
    what = "a class of median size" if profile.class_wise else "all rows"
    heading(cells["axes"], f"Spectrum of {what}")
    _condition(cells["sum"], profile)
    legend(figure, ncols=4)
    return figure


def comparison_figure(profiles: Mapping[str, Profile]) -> Figure:
    """Concentration, effective sample size, floor and spectrum of two sets, by name."""
    figure = new_figure(13, 9.4)
    figure.suptitle(" and ".join(shortened(name, 40) for name in profiles), fontsize=11)
    *panels, eigenvalues = figure.subplots(2, 2).flat
    wide = max(profiles.values(), key=lambda p: float(p.curve.times[-1] - p.curve.times[0]))
    for axes, statistic in zip(panels, _PANELS, strict=True):
        _over_time(axes, statistic, wide)
    lines = zip(profiles.items(), ((TRAIN, "-"), (HELD_OUT, "--")), strict=False)
    for (name, profile), (colour, dashes) in lines:
        short = shortened(name, 28)
        boundary = profile.boundary
        strata, queries = profile.curve.t.shape
        label = f"{short}: {counted(profile.rows, queries, strata)}"
        for axes, statistic in zip(panels, _PANELS, strict=True):
            t, mean = profile.curve.times.numpy(), profile.curve.mean(statistic).numpy()
            axes.plot(t, mean, color=colour, ls=dashes, marker=".", lw=1.5, ms=4, label=label)
        if math.isfinite(boundary.midpoint):
            span = (boundary.midpoint_low, boundary.midpoint_high)
            panels[0].axvspan(*span, color=colour, alpha=0.18, lw=0)
        mark_time(panels[0], boundary.midpoint, f"{short}: midpoint", color=colour, lw=1)
        about = f"{short}: predicted"
        mark_time(panels[0], profile.predicted, about, color=colour, lw=1.2, ls="-.")
        _spectrum(eigenvalues, profile, colour, dashes)
    for axes, statistic in zip(panels, _PANELS, strict=True):
        _from_zero(axes, statistic)
    scopes = {"a class of median size" if p.class_wise else "all rows" for p in profiles.values()}
    heading(eigenvalues, f"Spectrum of {' and of '.join(sorted(scopes))}")
    legend(figure, ncols=2)
    return figure


def _over_time(axes: Axes, statistic: str, profile: Profile) -> None:
    label, title = _PANELS[statistic]
    axes.set_ylabel(label)
    time_axis(axes, profile.curve.times.numpy())
    heading(axes, title)


def _from_zero(axes: Axes, statistic: str) -> None:
    if statistic == "ess":
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, 1.02 if statistic == "top1" else None)


def _spectrum(axes: Axes, profile: Profile, colour: str, dashes: str = "-") -> None:
    # Eigenvalues beyond the number of rows, and those of rounding, are not shown.
    values = profile.eigenvalues.numpy()
    values = values[values > values[0] * 1e-9] if len(values) and values[0] > 0 else values[:0]
    axes.semilogy(np.arange(1, len(values) + 1), values, color=colour, ls=dashes, lw=1.8)
    log_ticks(axes.yaxis)
    axes.set(xlabel="principal axis", ylabel="variance along it")
    if len(values) >= 30:  # below, a log scale has no room for labels
        axes.set_xscale("log")
        log_ticks(axes.xaxis)


def _condition(axes: Axes, profile: Profile) -> None:
    """The information over t, which reaches log N at the predicted boundary."""
    axes.set_ylabel(r"$\frac{1}{2}\sum_k\,\log(1+\rho_t^2\lambda_k)$, nats")
    time_axis(axes, profile.curve.times.numpy())
    about = "one class of median size; predicted: the median over classes"
    heading(axes, "What predicts the boundary", about if profile.class_wise else "")
    if not 0 < profile.predicted < 1:
        return
    low, high = (math.log(t / (1 - t)) for t in axes.get_xlim())
    t = torch.linspace(low, high, 101, dtype=torch.float64).sigmoid()
    label = "information in a noisy sample, by the spectrum"
    axes.plot(t.numpy(), profile.information(t).numpy(), color=DATA, lw=1.5, ls=":", label=label)
    goal = math.log(profile.spectrum_rows)
    axes.axhline(goal, color=TRAIN, lw=1.2, label=f"log N, N = {profile.spectrum_rows}")
    mark_time(axes, profile.predicted, "predicted", color=HELD_OUT, lw=1.2, ls="-.")
    axes.set_ylim(0, 3 * goal)
