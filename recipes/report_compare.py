"""The page that compares several runs of the same data."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from stagewise.callbacks.velocity_figures import sizes_figure
from stagewise.recipes import report_figures
from stagewise.recipes.report_facts import Facts, Value, even, number, percent
from stagewise.recipes.report_head import data_of, date_of, model_of, safely, steps_of
from stagewise.recipes.report_html import definitions, drawn, paragraph, row, stored, table
from stagewise.velocity_probe import STAGES

__all__ = ["compared", "refuse_other_data"]

_READING = (
    "All numbers are of the last probe up to the same step, over uniform t. The floor is the part "
    "of the loss that no model removes. It depends on the data only: runs on the same data share "
    "it, and differ in the loss above it. ± is two standard errors. Probes of runs with one seed "
    "use the same noisy samples, so their differences are more certain than that."
)

_STEPS = 4
"""Steps at which losses are drawn over the number of parameters."""


def refuse_other_data(runs: Mapping[str, Facts]) -> None:
    """Refuses runs of different data, since their floors and stages differ."""
    differing = {}
    for key in ("rows", "shape", "std", "classes", "class_wise", "path"):
        found = {k: facts.bank[key] for k, facts in runs.items() if facts.bank.get(key) is not None}
        if found and not _alike(list(found.values())):
            differing[key] = found
    if differing:
        listed = "; ".join(
            f"{key} {', '.join(f'{_short(value)} ({name})' for name, value in found.items())}"
            for key, found in differing.items()
        )
        pages = "".join(
            f"\n  stagewise report {shlex.quote(str(facts.run.folder))}" for facts in runs.values()
        )
        raise ValueError(
            f"Expected runs of the same data, got {listed}. Losses on other data have another "
            f"floor, and cannot be compared. For a page about each:{pages}"
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _alike(values: list[Any]) -> bool:
    one = values[0]
    close = isinstance(one, float)
    return all(math.isclose(one, x, rel_tol=1e-3) if close else one == x for x in values)


def compared(runs: Mapping[str, Facts], title: str) -> list[str]:
    """The parts of the page."""
    step = min((facts.last["step"] for facts in runs.values() if facts.last), default=0)
    measured = {name: facts for name, facts in runs.items() if facts.at(step) is not None}
    about = {"Data": data_of(next(iter(runs.values())))} | {
        name: f"{model_of(facts)}; trained on {facts.trained_on}; {steps_of(facts)}, "
        f"{date_of(facts)}"
        for name, facts in runs.items()
    }
    sections: dict[str, Callable[[Mapping[str, Facts]], str]] = {
        "How to read this page": lambda _: paragraph(_READING),
        f"Numbers at step {step}": lambda runs: _numbers(runs, step),
        "Over steps and t": lambda _: _over_steps(measured, step) if len(measured) > 1 else "",
        "Over size": lambda _: _over_size(measured) if len(measured) > 1 else "",
        "Samples": _samples,
        "Settings that differ": _settings,
    }
    made = {name: safely(part, runs) for name, part in sections.items()}
    return [
        f"<h1>{escape(title)}</h1>{definitions(about)}",
        safely(lambda measured: paragraph(_verdict(measured, step), "verdict"), measured),
        *(paragraph(line, "warn") for line in _warnings(runs)),
        *(f"<h2>{name}</h2>{text}" for name, text in made.items() if text),
    ]


def _samples(runs: Mapping[str, Facts]) -> str:
    pictures = {name: _picture(name, facts) for name, facts in runs.items()}
    without = [name for name, picture in pictures.items() if not picture]
    said = f"There is no picture of samples in {', '.join(without)}."
    return row(*pictures.values()) + (paragraph(said, "dim") if without else "")


def _picture(name: str, facts: Facts) -> str:
    whole = facts.run.folder / "samples.png"
    if whole.is_file():
        return stored(whole, f"{name}: training samples (left), generated samples (right)")
    beside = facts.run.picture("memorization_probe", "samples")
    return stored(beside, f"{name}: generated samples beside their nearest rows")


def _warnings(runs: Mapping[str, Facts]) -> list[str]:
    found = [f"{name}: {line}" for name, facts in runs.items() for line in facts.run.problems]
    for name, facts in runs.items():
        if not facts.bank:
            found.append(f"{name} has no PosteriorMonitor, so its data may be other data.")
        if facts.last is not None and facts.last.get("alarm"):
            found.append(f"{name}: {facts.last['alarm']}; its oracle is not that of its training.")
    banks = [facts.bank for facts in runs.values() if facts.bank.get("fingerprint")]
    kinds = {bank["dtype"] for bank in banks}
    if len({(bank["dtype"], bank["fingerprint"]) for bank in banks}) > len(kinds):
        found.append(
            "The training rows of these runs are not the same: other samples, another order, or "
            "latents drawn anew. If they are other data, their floors differ, and their losses "
            "cannot be compared."
        )
    return found


def _value(facts: Facts, step: int, split: str, key: str) -> Value:
    return facts.mean(facts.at(step), split, key)


def _verdict(runs: Mapping[str, Facts], step: int) -> str:
    """Which run is ahead: on held-out samples if all have some, or else above the floor."""
    if len(runs) < 2:
        return "Losses cannot be compared: fewer than two runs have a VelocityErrorMonitor."
    held_out = all(facts.gap(facts.probes[-1]).mean > -math.inf for facts in runs.values())
    what = ("held_out", "conditional") if held_out else ("train", "oracle")
    words = "held-out loss" if held_out else "loss above the floor"
    found = {name: _value(facts, step, *what) for name, facts in runs.items()}
    (first, low), *others = sorted(found.items(), key=lambda item: item[1].mean)
    second, high = others[0]
    values = ", ".join(f"{name} {value}" for name, value in found.items())
    noise = 2 * math.hypot(low.error, high.error)
    if high.mean - low.mean > noise:
        ahead = f"{first} is ahead of {second} by {percent(1 - low.mean / high.mean)}"
    else:
        ahead = f"{first} and {second} do not differ beyond noise"
    return f"At step {step} {ahead} in {words} ({values})."


def _numbers(runs: Mapping[str, Facts], step: int) -> str:
    rows: list[list[str]] = []

    def add(name: str, values: list[str]) -> None:
        if any(value != "–" for value in values):
            rows.append([name, *values])

    every = list(runs.values())
    add("parameters", [number(facts.parameters) for facts in every])
    add("last step", [number(facts.step) for facts in every])
    for name in every[0].crossings:
        found = [facts.crossings[name] for facts in every]
        add(name, [t + (interval and f" ({interval})") for t, interval in found])
    for name, split, key in (
        ("loss", "train", "conditional"),
        ("floor", "train", "floor"),
        ("above the floor", "train", "oracle"),
        ("held-out loss", "held_out", "conditional"),
    ):
        add(name, [str(_value(facts, step, split, key)) for facts in every])
    for stage in STAGES:
        values = [facts.stage(facts.at(step), stage, "oracle") for facts in every]
        add(f"above the floor, {stage}", even(values))
    found = [facts.share_of_copies for facts in every]
    add("share of copies", [share + (interval and f" ({interval})") for share, interval in found])
    return table(["", *runs], rows)


def _over_steps(runs: Mapping[str, Facts], step: int) -> str:
    found = {name: facts.at(step) for name, facts in runs.items()}
    probes = {name: probe for name, probe in found.items() if probe is not None}
    first = next(iter(runs.values()))
    captions = {
        None: "Both axes are logarithmic: without the floor a power law is a straight line. A "
        "model whose line is flat has learned what it can at its learning rate.",
        STAGES[0]: "The same in navigation, where the loss above the floor can still be learned.",
    }
    shown = []
    for stage, caption in captions.items():
        lines = {name: (facts, stage) for name, facts in runs.items()}
        title = f"Loss above the floor, {stage or 'all t'}"
        shown.append(drawn(report_figures.excess_figure(title, lines), caption))
    if any(facts.edges != first.edges for facts in runs.values()):
        return row(*shown) + paragraph("Errors by t are not drawn: the bins of t differ.", "dim")
    caption = "Where along t the runs differ, above the floor. Stages are those of the first run."
    return row(*shown, drawn(sizes_figure(first.edges, probes, first.ends), caption))


def _over_size(runs: Mapping[str, Facts]) -> str:
    unknown = [name for name, facts in runs.items() if not facts.parameters]
    if unknown:
        return paragraph(
            f"Not drawn: the files of {', '.join(unknown)} do not have the number of parameters, "
            "as in an older version, or for a model that is sharded over processes.",
            "dim",
        )
    ordered = sorted(runs.values(), key=lambda facts: facts.parameters or 0)
    sizes = [facts.parameters or 1 for facts in ordered]
    if len(set(sizes)) < len(sizes):
        listed = ", ".join(map(number, sizes))
        return paragraph(f"Not drawn: the sizes are not all different ({listed}).", "dim")
    shared = set.intersection(*({p["step"] for p in facts.probes} for facts in ordered))
    steps = sorted(step for step in shared if step > 1)
    if not steps:
        return paragraph("Not drawn: no step has a probe in all runs.", "dim")
    places = {round(i * (len(steps) - 1) / (_STEPS - 1)) for i in range(_STEPS)}
    chosen = [steps[place] for place in sorted(places)]
    loss, excess = (
        [_value(facts, chosen[-1], "train", key).mean for facts in ordered]
        for key in ("conditional", "oracle")
    )
    if not np.isfinite(loss + excess).all():
        return paragraph(f"Not drawn: at step {chosen[-1]} a loss is not finite.", "dim")
    return row(
        drawn(
            report_figures.by_size_figure(ordered, chosen, "conditional", "The loss itself"),
            f"At step {chosen[-1]} the loss goes as parameters to the power "
            f"{_signed(_powers(sizes, loss)[0])}. The floor is the same for all sizes: the loss "
            "bends towards it, so a line through the loss predicts nothing.",
        ),
        drawn(
            report_figures.by_size_figure(ordered, chosen, "oracle", "Loss above the floor"),
            _straight(_powers(sizes, excess)),
        ),
    )


def _powers(sizes: Sequence[int], values: Sequence[float]) -> list[float]:
    """The exponents of power laws: through the least and the largest size, and each to the next."""
    logs, found = np.log(sizes), np.log(values)
    whole = (found[-1] - found[0]) / (logs[-1] - logs[0])
    return [float(whole), *(np.diff(found) / np.diff(logs)).tolist()]


def _straight(powers: Sequence[float]) -> str:
    whole, *steps = powers
    text = f"Above the floor it goes as parameters to the power {_signed(whole)}. "
    if len(steps) < 2:
        return text + "Two sizes are always on a line: a third shows whether it is straight."
    between = f"from size to size {', '.join(map(_signed, steps))}"
    if min(steps) < 1.5 * max(steps):  # both below zero where a larger model is better
        return f"{text}That is not one line ({between}), so do not extrapolate."
    return f"{text}It is nearly one line ({between}); extrapolate with care."


def _signed(power: float) -> str:
    return f"{power:+.2f}".replace("-", "\u2212")


def _settings(runs: Mapping[str, Facts]) -> str:
    without = [name for name, facts in runs.items() if not facts.settings]
    if without:
        return paragraph(f"Not compared: no config.yaml in {', '.join(without)}.", "dim")
    every = []
    for facts in runs.values():
        own = facts.settings.get("run_dir", "")
        given = facts.settings.items()
        every.append({k: v.replace(own, "RUN") if own else v for k, v in given})
    keys = sorted({key for settings in every for key in settings})
    rows = [[key, *(settings.get(key, "–") for settings in every)] for key in keys]
    rows = [cells for cells in rows if len(set(cells[1:])) > 1]
    if not rows:
        return paragraph("None: the configurations are equal.", "dim")
    return table(["setting", *runs], rows, numbers=())
