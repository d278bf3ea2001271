"""The tables and pictures of docs/results.md, from the records of runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regularisers_report
from matplotlib.figure import Figure
from PIL import Image
from schemes_plan import BATCH, DEFAULT, LARGE, NAMES, PLANS, SAMPLES
from schemes_statistics import (
    AXES,
    METRICS,
    Interval,
    Run,
    Runs,
    curve,
    curves,
    finished,
    load,
    load_why,
    mean_cell,
    rates,
    ratio_cell,
    seeds,
    share,
    share_cell,
)
from schemes_train import EDGES
from tables import fill, table

from stagewise.callbacks.drawing import (
    HELD_OUT,
    TRAIN,
    apart,
    counted,
    legend,
    log_ticks,
    new_figure,
    render,
    time_axis,
)

AIMS = {"loss": 0.75, "energy": 0.6, "frechet": 0.6}
"""Shares of plain's steps that were aimed at for the default."""
WEIGHTS = 1.6e6
"""Of the perceptron: a training step counts six operations for each, on each sample."""
WIDEST = 1.6
"""Where the axis of shares ends."""

Shares = dict[tuple[str, str, str], Interval]
"""By scheme, metric and axis."""


def write(folder: Path, docs: Path) -> None:
    """Fills docs/results.md and draws its pictures."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    runs, found = finished(folder), load(folder)
    compared = {key: own for key, own in found.items() if "plain" in own}
    tables = regularisers_report.tables(docs / regularisers_report.ARCHIVE)
    tables["schemes: learning rates"] = _settings(compared, runs)
    panels: dict[str, dict[int, Shares]] = {}
    for (name, horizon), own in compared.items():
        reached: Shares = {
            (scheme, metric, axis): share(own["plain"], own[scheme], metric, axis)
            for scheme, metric, axis in itertools.product(own, METRICS, AXES)
        }
        draws = _training_rows(folder, name)
        place = f"{name}, {horizon} steps"
        tables[f"{place}: at the end"] = _ends(horizon, own)
        tables[f"{place}: steps and time"] = _shares(own, reached)
        if DEFAULT in own:
            tables[f"{place}: aims"] = _aims(own, reached, draws)
        tables[f"{place}: by t"] = _by_time(own)
        tables[f"{place}: shorter runs"] = _shorter(name, horizon, found)
        _draw_curves(images, name, horizon, own)
        panels.setdefault(name, {})[horizon] = reached
    for name, metric in itertools.product(panels, METRICS):
        _draw_steps(images, name, metric, panels[name])
    for name, why in load_why(folder).items():
        if ("plain", BATCH) in why and ("oracle", BATCH) in why:
            tables[f"{name}: batches"] = _by_batch(why)
            tables[f"{name}: draws of samples"] = _noise(why, _training_rows(folder, name))
    if (folder / "variance.json").exists():
        made = json.loads((folder / "variance.json").read_text())
        tables |= _variance(made)
        _draw_variance(images, made)
    fill(docs / "results.md", {name: text for name, text in tables.items() if text})


def _training_rows(folder: Path, name: str) -> list[dict[str, float]]:
    """Distances of training rows in place of samples, in several draws."""
    file = folder / f"why-rows-{name}.json"
    return json.loads(file.read_text())["draws"] if file.exists() else []


def _deviation_cell(draws: Sequence[dict[str, float]], metric: str) -> str:
    values = [draw[metric] for draw in draws]
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.1g}" if draws else "not measured"


# -- schemes --------------------------------------------------------------------------------------


def _settings(compared: dict[tuple[str, int], Runs], runs: Sequence[Run]) -> str:
    """The learning rates that were tried, the one that schemes ran with, the measured boundary."""
    rows = []
    for name in dict.fromkeys(key[0] for key in compared):
        tried = rates(runs, name)
        first = next(own["plain"][0] for key, own in compared.items() if key[0] == name)
        cells = {lr: f"{tried[lr]:.4f}" if lr in tried else "not run" for lr in PLANS[name].rates}
        losses = ", ".join(f"{lr:g}: {cell}" for lr, cell in cells.items())
        rows.append([name, f"{first['lr']:g}", losses, f"{first['boundary']:.3f}"])
    head = ["data", "learning rate", "plain's held-out loss at the first horizon by rate, seed 0"]
    return table([*head, "boundary, t"], rows)


def _ends(horizon: int, runs: Runs) -> str:
    """Final values of every scheme, those that were not run included."""
    rows = []
    for scheme in NAMES:
        own = runs.get(scheme, [])
        last = [run["curve"][-1] for run in own]
        if not own:
            rows.append([scheme, "", "not run", "", "", "", ""])
            continue
        cells = [mean_cell([end[key] for end in last]) for key in METRICS]
        pace = np.median([1e3 * end["seconds"] / horizon for end in last])
        copies = f"{np.mean([end['copies'] for end in last]):.3f}"
        rows.append([scheme, seeds(own), *cells, copies, f"{pace:.1f}"])
    return table(["scheme", "seeds", *METRICS.values(), "copies", "ms/step"], rows)


def _shares(runs: Runs, reached: Shares) -> str:
    """Steps and time to plain's final values."""
    head = [f"{title}, {unit}" for unit in AXES.values() for title in METRICS.values()]
    rows = []
    for scheme in (name for name in NAMES if name in runs):
        cells = [share_cell(reached[scheme, metric, axis]) for axis in AXES for metric in METRICS]
        rows.append(["plain itself" if scheme == "plain" else scheme, *cells])
    return table(["scheme", *head], rows)


def _aims(runs: Runs, reached: Shares, draws: Sequence[dict[str, float]]) -> str:
    """The aims for the default, what it reached, and the scores of training rows."""
    rows = []
    for metric, title in METRICS.items():
        end = float(curves(runs["plain"], metric)[:, 1, -1].mean())
        best = "" if metric == "loss" else _deviation_cell(draws, metric)
        value = share_cell(reached[DEFAULT, metric, "step"])
        rows.append([title, f"{AIMS[metric]:g}", value, f"{end:.3g}", best])
    head = ["metric", "aim, at most", "reached", "plain ends at", "training rows score"]
    return table(head, rows)


def _by_time(runs: Runs) -> str:
    """Held-out loss by t of plain training and of those that have the oracle at all t."""
    names = [name for name in ("plain", "oracle, all t", DEFAULT) if name in runs]
    own = {n: np.array([run["by_time"] for run in runs[n] if "by_time" in run]) for n in names}
    means = {name: values.mean(0) for name, values in own.items() if len(values)}
    if "plain" not in means or len(means) < 2:
        return ""
    plain = means.pop("plain")
    before = np.array(EDGES[1:]) <= runs["plain"][0]["boundary"]
    rows = [["plain", *(f"{v:.4f}" for v in plain), ""]]
    for name, values in means.items():
        gain, change = plain - values, values / plain - 1
        cells = [f"{v:.4f} ({g:+.1%})" for v, g in zip(values, change, strict=True)]
        early = f"{gain[before].sum() / gain.sum():.0%}" if before.any() and gain.sum() > 0 else ""
        rows.append([name, *cells, early])
    head = [f"t {low:g} to {high:g}" for low, high in itertools.pairwise(EDGES)]
    return table(["scheme", *head, "of the gain, in quarters before the boundary"], rows)


def _shorter(name: str, horizon: int, found: dict[tuple[str, int], Runs]) -> str:
    """The default with schedules of fewer steps against plain training at `horizon`."""
    plain, rows = found[name, horizon]["plain"], []
    for (data, short), runs in found.items():
        if data == name and short < horizon and "plain" not in runs:
            for scheme, own in runs.items():
                ends = [[curves(r, key)[:, 1, -1] for r in (own, plain)] for key in METRICS]
                about = [scheme, seeds(own), f"{short} ({short / horizon:.2f})"]
                rows.append([*about, *(ratio_cell(*pair) for pair in ends)])
    return table(["scheme", "seeds", "steps (share)", *METRICS.values()], rows) if rows else ""


# -- why ------------------------------------------------------------------------------------------


def _by_batch(found: dict[tuple[str, int], list[Run]]) -> str:
    """What less noise gives: larger batches, with plain and with oracle targets."""

    def end(scheme: str, batch: int) -> float:
        runs = found.get((scheme, batch))
        return float(curves(runs, "loss")[:, 1, -1].mean()) if runs else math.nan

    base, rows = found["plain", BATCH], []
    for (scheme, batch), runs in found.items():
        shares = [share(base, runs, "loss", axis) for axis in AXES]
        one = len(runs) == 1
        cells = [f"{value[0]:.2f} (one seed)" if one else share_cell(value) for value in shares]
        own, plain = end(scheme, batch), end("plain", BATCH)
        cells.append(f"{(plain - own) / (plain - end('plain', LARGE)):.0%}")
        cells.append("" if scheme == "plain" else f"{1 - own / end('plain', batch):.1%}")
        rows.append([f"{scheme}, batch {batch}", seeds(runs), f"{own:.4f}", *cells])
    head = ["training", "seeds", "held-out loss", "steps to plain's", "time to plain's"]
    head += [f"gain over that of plain, batch {LARGE}", "below plain of the same batch"]
    return table(head, rows)


def _noise(found: dict[tuple[str, int], list[Run]], floor: Sequence[dict[str, float]]) -> str:
    """Distances of several draws of samples of each model."""
    rows = []
    for metric in ("energy", "frechet"):
        a, b = (
            np.array([[draw[metric] for draw in run["draws"]] for run in found[scheme, BATCH]])
            for scheme in ("plain", "oracle")
        )
        draw = float(a.std(1, ddof=1).mean())
        n = min(len(a), len(b))
        paired = (b[:n] - a[:n]).mean(1)  # the same draws for both
        cells = [f"{v.mean():.3g} ({', '.join(f'{m:.3g}' for m in v.mean(1))})" for v in (a, b)]
        gain = f"{paired.mean():+.2g} ({', '.join(f'{v:+.2g}' for v in paired)})"
        cells += [f"{draw:.2g}", gain, f"{abs(paired.mean()) / draw:.1f}"]
        rows.append([METRICS[metric], *cells, _deviation_cell(floor, metric)])
    head = ["metric", "plain (by seed)", "oracle (by seed)", "deviation over draws"]
    head += ["oracle - plain, same draws (by seed)", "of a deviation", "training rows"]
    return table(head, rows)


# -- variance -------------------------------------------------------------------------------------


def _lines_of(made: dict[str, Any]) -> tuple[list[float], dict[str, list[dict[str, Any]]]]:
    """The times, and the lines of each target by t."""
    times = sorted({line["t"] for line in made["lines"]})
    names = dict.fromkeys(line["target"] for line in made["lines"])
    by = {(line["target"], line["t"]): line for line in made["lines"]}
    return times, {name: [by[name, t] for t in times] for name in names}


def _variance(made: dict[str, Any]) -> dict[str, str]:
    """Error of each target by t, and what it removes for its cost over all t."""
    times, lines = _lines_of(made)
    first = next(iter(lines.values()))
    plain, signal = (np.array([line[key] for line in first]) for key in ("plain", "signal"))
    by_t = [["x_1 itself (plain) / signal", "0", "0", *(f"{p:.2g}" for p in plain)]]
    weight = plain * signal / (1 - np.array(times)) ** 2  # variance of plain targets, a velocity
    whole = []
    for name, own in lines.items():
        error = np.array([line["error"] for line in own])
        milliseconds, operations = np.median([x["ms"] for x in own]), own[0]["operations"]
        about = [name, f"{operations / 1e6:.2f}", f"{milliseconds:.0f}"]
        by_t.append([*about, *(f"{e:.2g}" for e in error)])
        removed = 1 - np.trapezoid(weight * error, times) / np.trapezoid(weight, times)
        cost = operations / (6 * WEIGHTS)
        shares = (removed, cost, removed / (1 + cost), removed / cost)
        whole.append([name, *(f"{value:.2f}" for value in shares)])
    head = ["target", "MFLOP", f"ms / {made['queries']}", *(f"{t:g}" for t in times)]
    costs = ["variance removed", "cost / step", "removed / (step + cost)", "removed / cost"]
    return {
        "targets: variance by t": table(head, by_t),
        "targets: variance over all t": table(["target", *costs], whole),
    }


# -- pictures -------------------------------------------------------------------------------------


def _save(figure: Figure, file: Path) -> None:
    """With few colours: these are lines and text, and there are many of them in the repository."""
    Image.fromarray(render(figure)).quantize(128, dither=Image.Dither.NONE).save(file)


def _draw_curves(folder: Path, name: str, horizon: int, runs: Runs) -> None:
    """Every metric over steps, one line for each scheme."""
    figure = new_figure(13, 4.6)
    axes = figure.subplots(1, 3)
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for scheme, style in zip(NAMES, apart(len(NAMES)), strict=True):
            if scheme in runs:
                style = {"color": "black", "lw": 2.2} if scheme == "plain" else {**style, "lw": 1.2}
                axis.plot(*curve(runs[scheme], metric), label=scheme, **style)
        axis.axhline(curve(runs["plain"], metric)[1, -1], color="black", lw=0.8, ls=":")
        axis.set(xlabel="optimizer step", ylabel=title)
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        axis.grid(alpha=0.3)
    legend(figure, ncols=4)
    counts = " or ".join(map(str, sorted({len(own) for own in runs.values()})))
    figure.suptitle(
        f"{name}, {counted(PLANS[name].rows, None, 0)}, {horizon} steps: means over {counts} "
        f"seeds; distances: n = {SAMPLES} generated samples; dotted: where plain ends",
        fontsize=11,
    )
    _save(figure, folder / f"curves_{name}_{horizon}.png")


def _draw_steps(folder: Path, name: str, metric: str, panels: dict[int, Shares]) -> None:
    """Steps and time to plain's final value of one metric, a row of panels for each horizon."""
    names = [n for n in NAMES if any((n, metric, "step") in own for own in panels.values())]
    figure = new_figure(12, len(panels) * (0.34 * len(names) + 1) + 0.9)
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey=True)
    for line, (horizon, own) in zip(grid, panels.items(), strict=True):
        for axis, (key, unit) in zip(line, AXES.items(), strict=True):
            for row, scheme in enumerate(names):
                _draw_interval(axis, row, own.get((scheme, metric, key)))
            axis.axvline(1, color="black", lw=1)
            if key == "step":
                axis.axvline(AIMS[metric], color=HELD_OUT, ls="--", lw=1, label="aim")
            axis.set(xlim=(0, WIDEST), ylim=(len(names) - 0.5, -0.5))
            axis.set(xlabel=f"{unit} as a share of plain's, runs of {horizon} steps")
            axis.set_yticks(range(len(names)), names)
            axis.grid(alpha=0.3, axis="x")
    about = f"{name}, {counted(PLANS[name].rows, None, 0)}"
    figure.suptitle(f"{about}: steps and time to plain's final {METRICS[metric]}", fontsize=11)
    legend(figure, ncols=4)
    _save(figure, folder / f"steps_{name}_{metric}.png")


def _draw_interval(axis: Any, row: int, value: Interval | None) -> None:
    """Number and interval of a scheme. What lies off the axis is said above the interval."""
    middle, low, high = value or (math.inf,) * 3

    def say(text: str, **place: Any) -> None:
        place = {"va": "center", **place}
        axis.annotate(text, (1.02, row), textcoords="offset points", fontsize=8, **place)

    if value is None:
        say("not run", xytext=(0, 0))
    elif low > WIDEST:
        say("not reached" if math.isinf(low) else f"more than {WIDEST}", xytext=(0, 0))
    else:
        axis.plot(
            *([low, min(high, WIDEST)], [row, row]),
            **{"color": TRAIN, "lw": 4, "alpha": 0.35, "label": "95 % interval, seeds resampled"},
        )
        if high > WIDEST:
            beyond = "interval ends beyond the axis, or some seeds do not reach the value"
            axis.plot(WIDEST, row, ">", color=TRAIN, ms=5, clip_on=False, ls="", label=beyond)
        if middle <= WIDEST:
            axis.plot(middle, row, "o", color=TRAIN, ls="", label="mean over seeds")
        else:
            text = "the mean does not reach it" if math.isinf(middle) else f"mean {middle:.2f}"
            say(text, xytext=(0, 3), va="bottom")


def _draw_variance(folder: Path, made: dict[str, Any]) -> None:
    """Error of each target over t, and what it removes for its cost."""
    times, lines = _lines_of(made)
    figure = new_figure(15, 4.6)
    axes = figure.subplots(1, 3)
    for (name, own), look in zip(lines.items(), apart(len(lines)), strict=True):
        style = {"marker": "o", "ms": 3, "label": name, **look}
        error = np.array([line["error"] for line in own])
        if name != "Mix()":
            axes[0].plot(times, error, **style)
        removed = np.array([line["plain"] for line in own]) * (1 - error)
        removed = np.where(removed > 0, removed, np.nan)  # worse than nothing: no point
        axes[1].plot(times, removed / own[0]["operations"] * 1e6, **style)
        axes[2].plot(times, removed / np.array([line["ms"] for line in own]), **style)
    axes[0].axhline(1, color="black", lw=1, label="plain")
    axes[0].set(ylim=(1e-4, 10), ylabel="error / plain's", title="variance left (Mix leaves none)")
    axes[1].set(ylabel="removed / signal", title="removed by 10$^6$ operations for a query")
    axes[2].set(ylabel="removed / signal", title=f"removed in 1 ms for {made['queries']} queries")
    for axis in axes:
        axis.set_yscale("log")
        log_ticks(axis.yaxis)
        time_axis(axis, times)
        axis.grid(alpha=0.3)
    about = f"photos{made['patch']}, {counted(made['rows'], None, 0)}, class-wise"
    figure.suptitle(f"{about}, n = {made['queries']} noisy samples at each t", fontsize=11)
    legend(figure, ncols=4)
    _save(figure, folder / "variance_by_t.png")
