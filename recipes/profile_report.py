"""The text of `stagewise profile`, for one set of latents and for two side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stagewise.latents import Latents
from stagewise.memory import format_bytes
from stagewise.profile import Profile

__all__ = ["Profiled", "comparison", "report", "shortened"]

_WIDTH = 100


@dataclass(frozen=True)
class Profiled:
    """A set of latents with its profile."""

    name: str
    latents: Latents
    profile: Profile
    total: int  # rows in the files
    note: str  # what a limit on the rows means for the numbers

    def as_dict(self) -> dict[str, Any]:
        """All as plain numbers, strings and lists."""
        return {
            "name": self.name,
            "latents": self.latents.describe(),
            "rows_in_files": len(self.latents),
            "left_out": self.latents.skipped,
            "note": self.note,
            **self.profile.as_dict(),
        }


def report(found: Profiled) -> str:
    """The profile as text of at most 100 columns."""
    p, b = found.profile, found.profile.boundary
    over = "class-wise" if p.class_wise else "over all rows"
    low, middle, high = p.class_rows
    rows = f"{p.rows} rows of {p.shape}, D = {p.dim}"
    if p.classes:
        rows += f", {p.classes} classes of {low} to {high} rows (median {middle})"
    twice = f"{p.duplicates} rows equal an earlier one" if p.duplicates else "none"
    if p.mislabelled:
        twice += f", {p.mislabelled} of them under another label"
    share = p.eigenvalues.cumsum(0)
    half = int((share < share[-1] / 2).sum()) + 1
    where = f"below t = {b.collapsed:.3f}" if 0 < b.collapsed < 1 else "at all t"
    wide, narrow = (format_bytes(size * found.total * p.dim) for size in (4, 2))
    lines = [
        ("rows", rows),
        *(("left out", skipped) for skipped in found.latents.skipped),
        *([("", found.note)] if found.note else []),
        ("scale", f"mean {p.mean:.3f}, standard deviation {p.std:.3f}"),
        ("channel means", _numbers(p.channel_mean)),
        ("channel stds", _numbers(p.channel_std)),
        ("duplicates", twice),
        ("spectrum", f"effective dimension {p.effective_dim:.1f} of {p.dim}; {half} axes have half "
         "of the variance"),
        ("boundary", f"{over}; t = 0 is noise, t = 1 is data; weight: the mean largest posterior "
         "weight"),
        ("  predicted", f"{_time(p.predicted)}   weight about 2/3, from the spectrum"),
        ("  midpoint", f"{_span(b.midpoint, b.midpoint_low, b.midpoint_high)}   weight 0.50"),
        ("  collapsed", f"{_span(b.collapsed, b.collapsed_low, b.collapsed_high)}   weight 0.99"),
        ("mixing", f"oracle targets {where} remove the floor from the loss: {p.removable:.3g} over "
         "uniform t"),
        ("engine", p.engine),
        ("memory", f"{found.total} rows of {p.dim} numbers: {wide} in float32, {narrow} in "
         "bfloat16"),
    ]  # fmt: skip
    text = [f"== {found.name}", *_wrap(found.latents.describe())]
    for name, value in lines:
        text += _wrap(value, first=f"{name:16}")
    text += ["", *_table(p), "", 'What to set: docs/latents.md, "What follows from a profile".']
    return "\n".join(text)


def comparison(first: Profiled, second: Profiled) -> str:
    """Two sets side by side, as text."""
    rows: list[tuple[str, str, str]] = [("", shortened(first.name), shortened(second.name))]

    def add(name: str, value: Any) -> None:
        rows.append((name, value(first.profile), value(second.profile)))

    add("rows", lambda p: str(p.rows))
    add("D", lambda p: str(p.dim))
    add("std", lambda p: f"{p.std:.3f}")
    add("duplicates", lambda p: str(p.duplicates))
    add("effective dimension", lambda p: f"{p.effective_dim:.1f}")
    add("predicted", lambda p: _time(p.predicted))
    for name in ("midpoint", "collapsed"):
        ends = (name, f"{name}_low", f"{name}_high")
        add(name, lambda p, ends=ends: _span(*(getattr(p.boundary, end) for end in ends)))
    add("floor over uniform t", lambda p: f"{p.removable:.4g}")
    lines = [f"{name:30}{one:>34}{other:>34}".rstrip() for name, one, other in rows]
    return "\n".join(["== side by side", *lines, *_wrap(_verdict(first, second))])


def _verdict(first: Profiled, second: Profiled) -> str:
    one, two = first.profile.boundary, second.profile.boundary
    if math.isnan(one.midpoint) or math.isnan(two.midpoint):
        return "A midpoint was not reached, so it is unknown which is earlier."
    if one.midpoint_high < two.midpoint_low or two.midpoint_high < one.midpoint_low:
        early, late = (first, second) if one.midpoint < two.midpoint else (second, first)
        return (
            f"{early.name} collapses earlier: its interval for the midpoint ends before that of "
            f"{late.name} begins. Across latents compare shapes of losses by t, not their values "
            "(second-hand: arXiv 2512.02826)."
        )
    return "The intervals of the midpoints overlap: the boundaries may not differ."


def _table(p: Profile, most: int = 9) -> list[str]:
    """Largest weight, effective sample size and floor at some t."""
    end = p.boundary.collapsed if math.isfinite(p.boundary.collapsed) else 1.0
    inside = [i for i, t in enumerate(p.curve.times.tolist()) if t <= 1.5 * end]
    shown = inside[:: max(1, math.ceil(len(inside) / most))]
    lines = [f"{'t':16}" + "".join(f"{float(p.curve.times[i]):9.3f}" for i in shown)]
    for label, name, form in (
        ("largest weight", "top1", "9.3f"),
        ("ESS, rows", "ess", "9.1f"),
        ("floor", "target_difference", "9.4f"),
    ):
        mean = p.curve.mean(name)
        lines.append(f"{label:16}" + "".join(format(float(mean[i]), form) for i in shown))
    return lines


def _numbers(values: Sequence[float], most: int = 8) -> str:
    rounded = [f"{round(value, 2) + 0.0:.2f}" for value in values]  # no -0.00
    if len(values) <= most:
        return ", ".join(rounded)
    low, high = (rounded[values.index(end)] for end in (min(values), max(values)))
    return f"{', '.join(rounded[:most])}, ... ({len(values)} channels, {low} to {high})"


def _time(t: float) -> str:
    return "not reached" if math.isnan(t) else f"{t:.3f}"


def _span(t: float, low: float, high: float) -> str:
    return _time(t) if math.isnan(t) else f"{t:.3f} [{low:.3f}, {high:.3f}]"


def _wrap(text: str, first: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    ) or [first.rstrip()]


def shortened(name: str, most: int = 33) -> str:
    """A name, or its end."""
    return name if len(name) <= most else f"...{name[3 - most :]}"
