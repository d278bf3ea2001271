"""The numbers of a run, for its page, its verdict and the comparison of runs.

Means over t are for uniform times: they weigh each bin by its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from stagewise.forecast import SmoothingForecast, forecast_smoothing
from stagewise.recipes.run_files import Event, RunFiles, flat, stage_bounds
from stagewise.velocity_probe import STAGES

__all__ = ["FLAT", "NOTHING", "Facts", "Value", "even", "number", "percent", "span", "time_of"]

FLAT = 0.05
"""Relative change of an error that counts as none."""

_HEADERS = ("scheme", "bank", "velocity", "memorization", "guard", "forecasts")
"""The events that say what the run was trained on."""

_USERS = {"scheme": ("StageScheme",), "engine": ("StageScheme", "PosteriorMonitor")}
"""The parts of the configuration of a recipe that only these callbacks use."""


class Value(NamedTuple):
    """A mean and its standard error, or NaN."""

    mean: float
    error: float

    def __str__(self) -> str:
        spread = 2 * self.error
        if not (math.isfinite(self.mean) and math.isfinite(spread) and spread > 0):
            return number(self.mean)
        digits = max(0, 1 - math.floor(math.log10(spread)))  # two of the error
        return f"{self.mean:.{digits}f} ± {spread:.{digits}f}"


NOTHING = Value(math.nan, math.nan)


class Facts:
    """The numbers of one run.

    Attributes:
        run: Its files.
        boundary: Its stage boundary, one for the whole page.
        edges: Of the bins of t.
        probes: The probes of its model with these bins, by step.
        windows: The windows of training with these bins, by step.
    """

    def __init__(self, run: RunFiles) -> None:
        self.run, self.boundary = run, run.boundary()
        self.about: Event = run.first("velocity")
        self.bank: Event = run.first("bank")
        self.edges: list[float] = self.about.get("edges") or []
        bins = len(self.edges) - 1
        probes = run.of("velocity_probe")
        self.probes = [p for p in probes if len(p["train"].get("oracle", ())) == bins]
        windows = run.of("training_window")
        self.windows = [window for window in windows if len(window["draws"]) == bins]

    # -- the run ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.run.folder.resolve().name

    @cached_property
    def config(self) -> str | None:
        """The text of its configuration, without what no callback has used."""
        used = _used(tree := _tree(self.run.config))
        return self.run.config if used == tree else OmegaConf.to_yaml(used)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What applied of its configuration, by dotted key."""
        return {key: str(x) for key, x in flat(_used(_tree(self.run.config))).items()}

    @property
    def steered(self) -> bool:
        """Whether a scheme has steered it, as far as the files tell."""
        return any(event.get("steered") for event in self._headers) or bool(self.run.of("scheme"))

    @property
    def trained_on(self) -> str:
        """What it was trained on, in words."""
        found = [event for event in self._headers if event.get("trained_on")]
        if found:
            return "; ".join(dict.fromkeys(event["trained_on"] for event in found))
        return "steered by StageScheme; how is not recorded" if self.steered else "not recorded"

    @property
    def _headers(self) -> list[Event]:
        return [event for kind in _HEADERS for event in self.run.events.get(kind, [])]

    @property
    def step(self) -> int:
        """The last step in the files."""
        events = [event for found in self.run.events.values() for event in found]
        return max((event.get("step", 0) for event in events), default=0)

    @property
    def planned(self) -> int | None:
        """The steps of the whole training, if the configuration has them."""
        text = self.settings.get("trainer.max_steps", "")
        return int(text) if text.isdigit() else None

    @property
    def ends(self) -> tuple[float, float]:
        """The boundary, for a picture."""
        return self.boundary.midpoint, self.boundary.collapsed

    @property
    def crossings(self) -> dict[str, tuple[str, str]]:
        """Midpoint and collapsed boundary, each with its interval, in words."""
        b = self.boundary
        middle = time_of(b.midpoint), span(b.midpoint_low, b.midpoint_high, time_of)
        late = time_of(b.collapsed), span(b.collapsed_low, b.collapsed_high, time_of)
        return {"navigation ends at t": middle, "refinement begins at t": late}

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """The times between which each stage lies."""
        return dict(zip(STAGES, pairwise(stage_bounds(self.boundary)), strict=True))

    # -- the model ----------------------------------------------------------------------------

    @property
    def last(self) -> Event | None:
        """The last probe of the model."""
        return self.probes[-1] if self.probes else None

    @property
    def parameters(self) -> int | None:
        """The number of trained parameters, if the files have it."""
        return self.about.get("parameters")

    def at(self, step: int) -> Event | None:
        """The last probe up to a step."""
        return next((probe for probe in reversed(self.probes) if probe["step"] <= step), None)

    def mean(self, probe: Event | None, split: str, key: str) -> Value:
        """An error of a probe over all t; NaN without that split or a probe."""
        found = None if probe is None else probe.get(split)
        if not found:
            return NOTHING
        return self._over_t(found[key], found.get(f"{key}_se"))

    def gap(self, probe: Event) -> Value:
        """Held-out minus training error, over all t."""
        return self._over_t(probe["gap"], probe["gap_se"]) if probe.get("gap") else NOTHING

    def _over_t(self, values: Sequence[Any], errors: Sequence[Any] | None) -> Value:
        mean, width = np.array(values, float), np.diff(self.edges)
        there = np.isfinite(mean)
        if not there.any():
            return NOTHING
        share = width[there] / width[there].sum()
        error = np.array(errors or [math.nan] * len(values), float)[there]
        return Value(float(share @ mean[there]), float(np.sqrt((share**2) @ error**2)))

    @staticmethod
    def stage(probe: Event | None, stage: str, key: str, split: str = "train") -> float:
        """A mean of a probe over a stage, or NaN."""
        found = ((probe or {}).get("stages") or {}).get(split) or {}
        value = found.get(stage, {}).get(key)
        return math.nan if value is None else value

    def shares(self, probe: Event) -> dict[str, float]:
        """The share of each stage in the oracle error over all t."""
        parts = {
            stage: (high - low) * self.stage(probe, stage, "oracle")
            for stage, (low, high) in self.spans.items()
            if low < high
        }
        return {stage: part / sum(parts.values()) for stage, part in parts.items()}

    def trend(self, stage: str) -> tuple[float, int] | None:
        """The relative change of the oracle error of a stage, and since which step.

        Over about the last third of the steps; None with too few probes.
        """
        if self.last is None or (early := self.at(self.last["step"] * 2 // 3)) is None:
            return None
        before, after = (self.stage(probe, stage, "oracle") for probe in (early, self.last))
        if early["step"] < self.last["step"] / 10 or not before > 0 or math.isnan(after):
            return None  # since the first steps every error has fallen
        return after / before - 1, early["step"]

    def smoothing(self) -> SmoothingForecast | None:
        """What smoothing can gain, by the last probe; None if unknown."""
        if self.last is None or not self.last.get("gap"):
            return None
        train = {"conditional": _numbers(self.last["train"]["conditional"])}
        probe = {"train": train, **{key: _numbers(self.last[key]) for key in ("gap", "gap_se")}}
        return forecast_smoothing(probe, self.edges, self.spans[STAGES[2]][0])

    def best_held_out(self) -> tuple[Event, float] | None:
        """The probe of the lowest held-out error, and its relative rise since then.

        None unless the rise is above two standard errors and 2 %. All probes use the same samples,
        so the error of the rise is smaller than that.
        """
        probes = [probe for probe in self.probes if probe.get("held_out")]
        found = [self.mean(probe, "held_out", "conditional") for probe in probes]
        if not found:
            return None
        place = int(np.argmin([value.mean for value in found]))
        low, last = found[place], found[-1]
        rise = last.mean - low.mean
        if not rise > max(0.02 * low.mean, 2 * math.hypot(low.error, last.error)):
            return None
        return probes[place], rise / low.mean

    # -- copies and events --------------------------------------------------------------------

    @property
    def samples(self) -> list[Event]:
        """The probes of copies among samples of the model."""
        found = self.run.of("memorization_probe") or self.run.of("guard_probe")
        return [probe for probe in found if probe.get("copies")]

    @property
    def share_of_copies(self) -> tuple[str, str]:
        """The share of copies at the last probe, and its interval, in words."""
        if not self.samples:
            return "–", ""
        share, low, high = (self.samples[-1][key][0] for key in ("copies", "low", "high"))
        return even([share, low, high], 2)[0], span(low, high)

    @property
    def guarded(self) -> list[Event]:
        """The probes of a `MemorizationGuard` with held-out and training error."""
        return [probe for probe in self.run.of("guard_probe") if probe.get("held_out_loss")]

    @property
    def looked_for(self) -> dict[str, str] | None:
        """The events that the run looked for, each with what it lacked; None if unknown."""
        kinds: dict[str, str] | None = self.run.first("transitions").get("kinds")
        guard = {"memorization onset": ""} if self.guarded else {}
        return kinds if not guard else {**(kinds or {}), **guard}

    @property
    def events(self) -> list[Event]:
        """The events of the run, by step."""
        kinds = ("transition", "non-finite")
        events = [event for kind in kinds for event in self.run.events.get(kind, [])]
        return sorted(events, key=lambda event: event["step"])

    def noticed(self, kind: str) -> Event | None:
        """The first event of a kind, such as "memorization onset"."""
        return next((event for event in self.events if event.get("kind") == kind), None)


def _tree(config: str | None) -> dict[Any, Any]:
    """A configuration; empty without one that can be read."""
    try:
        tree = OmegaConf.to_container(OmegaConf.create(config or "{}"))
    except Exception:  # from yaml or OmegaConf: the page shows the text as it is
        return {}
    return tree if isinstance(tree, dict) else {}


def _used(tree: dict[Any, Any]) -> dict[Any, Any]:
    """A configuration without the parts that no callback of the run has used."""
    if not isinstance(tree.get("callbacks"), dict):
        return tree
    # An experiment may set options of a callback that was not chosen.
    chosen = {k: v for k, v in tree["callbacks"].items() if v and "_target_" in v}
    names = {str(part["_target_"]).rpartition(".")[2] for part in chosen.values()}
    unused = {key for key, users in _USERS.items() if names.isdisjoint(users)}
    return {k: chosen if k == "callbacks" else v for k, v in tree.items() if k not in unused}


def _numbers(values: Sequence[Any]) -> list[float]:
    """Values of a file, with NaN for null."""
    return [math.nan if value is None else value for value in values]


# -- words for numbers ------------------------------------------------------------------------


def number(value: Any) -> str:
    """Three digits, or a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return "0" if value == 0 else "< 0.0001" if 0 < value < 1e-4 else f"{value:.3g}"


def even(values: Sequence[Any], figures: int = 3) -> list[str]:
    """Numbers of one kind with the same digits after the point: 1.000 beside 0.999; or dashes.

    As many as give the largest its significant figures, and three at least below ten.
    """
    found = [abs(x) for x in values if isinstance(x, (int, float)) and math.isfinite(x)]
    largest = max(found, default=0.0)
    if largest >= 1000 or all(isinstance(x, int) for x in found):
        return [number(x) for x in values]
    needed = figures - 1 - math.floor(math.log10(largest)) if largest > 0 else 0
    digits = max(needed, 3 if largest < 10 else 1)
    return [f"{x:.{digits}f}" if number(x) != "–" else "–" for x in values]


def percent(share: float | None, digits: int | None = None) -> str:
    """A share in per cent, with a decimal below ten or with these digits, or a dash."""
    if share is None or not math.isfinite(share):
        return "–"
    usual = 0 if abs(share) >= 0.0995 or share == 0 else 1
    return f"{100 * share:.{usual if digits is None else digits}f} %"


def time_of(t: Any) -> str:
    """A time in [0, 1] with three decimals, near noise with three digits, or a dash."""
    return f"{t:.3f}" if isinstance(t, float) and t >= 0.0995 else number(t)


def span(low: Any, high: Any, words: Callable[[Any], str] | None = None) -> str:
    """The ends of an interval, by default with the same digits; empty if one is missing."""
    ends = even((low, high), 2) if words is None else [words(low), words(high)]
    return "" if "–" in ends else f"{ends[0]} to {ends[1]}"
