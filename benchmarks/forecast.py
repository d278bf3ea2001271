"""What `forecast_targets` says beside what training showed, in parts that resume.

`make bench-forecast` runs it. **Forecast**: plain training, stopped at some steps to be asked; the
gradients are those of 16 batches that the training does not see in this order. **Measured**: plain
training with larger batches, for the one whose held-out loss at the end is that of oracle targets
with a batch of 128, between batches by the logarithm of their size; plain and oracle targets with
128 and, where there are, 512 are the runs of docs/results.jsonl. Both write parts to `--dir` that
are not made again; the command then prints the tables and writes them to docs/forecast.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import schemes
import torch
from schemes import BATCH, PLANS, Part, write_once
from schemes_data import Data, data_set, held_out_loss, shuffled
from schemes_records import ARCHIVE, unpack
from schemes_report import ABOUT, load, share, share_cell, table
from scipy.optimize import isotonic_regression

from stagewise import LatentBank, Oracle, Scheme, Smoothing, Uniform
from stagewise.binned_sums import BinnedSums
from stagewise.forecast import TargetForecast, forecast_smoothing, forecast_targets
from stagewise.stages import StageCurve
from stagewise.velocity_probe import PROBED, Probe, probe_entry

BATCHES = (160, 192, 256)
ASKED = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of a training at which it is stopped to be asked."""
FROM = 0.25
"""Those from here on make the forecast of a training, as `stagewise.callbacks.Forecast` does."""
TIMES = Uniform(stratified=True)
METRICS = {"adam": "as Adam steps", "plain": "P = 1"}


def ended(part: Part, data: Data, scheme: Scheme, batch: int) -> dict[str, Any]:
    """The held-out loss at the end of a training."""
    *_, last = schemes.steps(part, data, scheme, batch)
    return {**vars(part), "batch": batch, "loss": held_out_loss(last.net, data)}


def smoothed(part: Part, data: Data, oracle: Oracle) -> dict[str, Any]:
    """The same with a smoothing from the collapsed boundary on."""
    scheme = Scheme(timesteps=TIMES, smoothing=Smoothing(oracle.bank), seed=part.seed)
    scheme.measure_boundary()
    return ended(part, data, scheme, BATCH)


def asked(part: Part, data: Data, oracle: Oracle) -> dict[str, Any]:
    """What a plain training says of itself: targets now and then, smoothing at the end."""
    curve = StageCurve.measure(oracle, class_wise=True).boundary()
    steps = {round(one * part.horizon): one for one in ASKED}
    found = []
    for at in schemes.steps(part, data, Scheme(timesteps=TIMES)):
        if at.step not in steps:
            continue
        for key in METRICS:
            few = itertools.islice(shuffled(*data.train, BATCH, seed=1000 + part.seed), 16)
            said = forecast_targets(
                lambda xt, t, labels, net=at.net: net(xt, t, labels),
                at.net,
                oracle,
                few,
                optimizer=at.optimizer if key == "adam" else None,
                timesteps=TIMES,
                seed=part.seed,
            )
            found.append({"at": steps[at.step], "metric": key, **vars(said)})
    ends = torch.tensor([0.0, curve.midpoint, curve.collapsed, 1.0]).double()
    edges = torch.cat([torch.linspace(0, 1, 13).double(), ends]).unique()
    sums = {}
    for number, (split, rows) in enumerate((("train", data.train), ("held_out", data.held_out))):
        probe = Probe(
            *rows, edges, 64, oracle, class_wise=True, seed=(0, number), device=torch.device("cpu")
        )
        sums[split] = BinnedSums.empty(edges, PROBED)
        at.net.eval()
        probe.measure(at.net, sums[split].update, torch.device("cpu"))
    about = {"edges": edges.tolist(), "collapsed": curve.collapsed}
    return {**vars(part), "found": found, "probe": probe_entry(sums, edges, ends), **about}


def run(folder: Path, records: Path, name: str, seeds: int) -> None:
    """Makes the parts of a data set that are not there."""
    horizon = PLANS[name].horizons[0]
    lr = schemes.best_rate(records, name, horizon)
    assert lr is not None
    data = data_set(name)
    oracle = Oracle(LatentBank(*data.train))
    for seed in range(seeds):
        part = Part(name, "plain", horizon, lr, seed)
        write_once(folder / f"{name}-asked-{seed}.json", partial(asked, part, data, oracle))
        for batch in BATCHES:
            target = folder / f"{name}-plain-{batch}-{seed}.json"
            write_once(target, partial(ended, part, data, Scheme(timesteps=TIMES), batch))
        part = replace(part, scheme="smoothed")
        write_once(folder / f"{name}-smoothed-{seed}.json", partial(smoothed, part, data, oracle))
        print(name, seed, flush=True)


def equivalent(by_batch: dict[int, list[float]], goal: list[float]) -> tuple[float, float, float]:
    """The batch, over `BATCH`, whose loss is that of `goal`, and its range over resampled seeds.

    Seed k of all batches is taken together: they begin with the same weights; seeds that some batch
    has not run are left out. Losses are made to fall with the batch by isotonic regression.
    Infinite: above the largest batch.
    """

    def once(seeds: tuple[int, ...]) -> float:
        sizes = sorted(by_batch)
        mean = [np.mean([by_batch[size][seed] for seed in seeds]) for size in sizes]
        falls = isotonic_regression(mean, increasing=False).x
        aim = np.mean([goal[seed] for seed in seeds])
        if aim < falls[-1]:
            return math.inf
        return float(np.exp(np.interp(-aim, -falls, np.log(sizes)))) / BATCH

    count = min(map(len, by_batch.values()))
    again = [once(seeds) for seeds in itertools.product(range(count), repeat=count)]
    low, high = np.quantile(again, [0.025, 0.975], method="nearest")
    return once(tuple(range(count))), float(low), float(high)


def mean_forecast(said: list[dict[str, Any]], *, first: float, last: float = 1.0) -> TargetForecast:
    """The mean over shares of the training from `first` to `last`, and over seeds."""
    keys = ("share", "error", "noise_scale", "batch")
    chosen = [one for one in said if first <= one["at"] <= last]
    return TargetForecast.mean([TargetForecast(*(one[key] for key in keys)) for one in chosen])


def cell(value: tuple[float, float, float]) -> str:
    middle, low, high = ("above" if math.isinf(v) else f"{v:.2f}" for v in value)
    return f"{middle} [{low}, {high}]"


def report(folder: Path, records: Path) -> list[str]:
    """docs/forecast.md."""
    parts = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    runs, rows, course, smooth, losses = load(records), [], [], [], []
    for name in ABOUT:
        seen = [part for part in parts if part["data"] == name and "found" in part]
        larger = [
            part
            for part in parts
            if (part["data"], part["scheme"]) == (name, "plain") and "loss" in part
        ]
        if not seen or not larger:
            continue
        known = runs[name, PLANS[name].horizons[0]]
        goal = [run["curve"][-1]["loss"] for run in known["oracle, all t"]]
        by_batch = {BATCH: [run["curve"][-1]["loss"] for run in known["plain"]]}
        for part in sorted(larger, key=lambda part: (part["batch"], part["seed"])):
            by_batch.setdefault(part["batch"], []).append(part["loss"])
        for file in sorted(records.glob(f"why-{name}-plain-512-*.json")):
            run = json.loads(file.read_text())
            by_batch.setdefault(512, []).append(run["curve"][-1]["loss"])
        measured = equivalent(by_batch, goal)
        by = {key: [f for p in seen for f in p["found"] if f["metric"] == key] for key in METRICS}
        whole = {key: mean_forecast(said, first=FROM) for key, said in by.items()}
        said = whole["adam"]
        off = said.factor / measured[0] - 1
        alone = min(map(len, by_batch.values())) == 1
        shown = f"{measured[0]:.2f} (one seed)" if alone else cell(measured)
        rows.append(
            [
                *(
                    name,
                    cell((said.factor, *said.interval)),
                    shown,
                    f"{off:+.0%}",
                ),
                f"{(said.factor - 1) / (measured[0] - 1) - 1:+.0%}",
                f"{whole['plain'].factor:.2f}",
                f"{said.steps:.2f}",
                share_cell(share(known["plain"], known["oracle, all t"], "loss")),
                "worth trying" if said.worth_trying else "do not bother",
            ]
        )
        for key, label in METRICS.items():
            each = [mean_forecast(by[key], first=one, last=one) for one in ASKED]
            course.append([name, label, *(f"{one.factor:.2f}" for one in each)])
        scales = [mean_forecast(by["adam"], first=one, last=one).noise_scale for one in ASKED]
        course.append([name, "noise scale, samples", *(f"{one:.0f}" for one in scales)])
        for size in sorted(by_batch):
            values = by_batch[size]
            half = (max(values) - min(values)) / 2
            losses.append(
                [name, f"{size}", f"{len(values)}", f"{np.mean(values):.4f} ± {half:.4f}"]
            )
        half = (max(goal) - min(goal)) / 2
        losses.append(
            [name, f"{BATCH}, oracle", f"{len(goal)}", f"{np.mean(goal):.4f} ± {half:.4f}"]
        )
        without = {run["seed"]: run["curve"][-1]["loss"] for run in known["plain"]}
        smoothed_ = [part for part in parts if (part["data"], part["scheme"]) == (name, "smoothed")]
        gains = {run["seed"]: run["loss"] / without[run["seed"]] - 1 for run in smoothed_}
        for part in seen:
            late = {key: one["refinement"] for key, one in part["probe"]["stages"].items()}
            gap = late["held_out"]["conditional"] / late["train"]["conditional"] - 1
            found = forecast_smoothing(part["probe"], part["edges"], part["collapsed"])
            gain = f"{gains[part['seed']]:+.1%}" if part["seed"] in gains else "not run"
            about = (name, f"{part['seed']}", f"{part['collapsed']:.2f}", f"{gap:+.1%}")
            smooth.append([*about, f"{found}", gain])
    return [
        "# The forecast beside what training showed",
        "",
        "Written by `make bench-forecast` (benchmarks/forecast.py), never by hand. Data, networks "
        "and learning rates are those of [results.md](results.md), at its shortest full horizon: "
        f"{', '.join(f'{name} {PLANS[name].horizons[0]} steps' for name in ABOUT)}; times are "
        "stratified.",
        "",
        "**Forecast**: by how much a batch would have to be larger for the gradient's noise to be "
        "that of oracle targets with a batch of 128, `1 / (1 - f)` of `forecast_targets` in plain "
        f"training, mean over {', '.join(f'{one:g}' for one in ASKED if one >= FROM)} of its steps "
        "and over seeds, with two standard errors. **Measured**: with which batch plain training "
        "ends at the held-out loss that oracle targets end at, over 128 [95 % interval, seeds "
        "resampled]. Off: forecast over measured; and the same of what exceeds 1. Steps: the share "
        "of plain's steps in which oracle targets come to where plain training ends, by the "
        "forecast and measured.",
        "",
        *table(
            [
                *("data", "forecast", "measured", "off", "off, of the excess over 1"),
                *("forecast with P = 1", "steps, forecast", "steps, measured", "verdict"),
            ],
            rows,
        ),
        "Over the training, at shares of its steps (mean over seeds). At 0 the network is "
        "untrained and the forecast too low; Adam has no second moments, and both metrics are one.",
        "",
        *table(["data", "metric", *(f"{one:g}" for one in ASKED)], course),
        "Held-out loss at the end (mean ± half the range over seeds), by the batch:",
        "",
        *table(["data", "batch", "seeds", "held-out loss"], losses),
        "**Smoothing**: error on held-out samples over that on training rows, minus 1, beyond the "
        "collapsed boundary, at the end of plain training; what `forecast_smoothing` says; and by "
        "how much the whole held-out loss at the end differs with a `Smoothing` from there on.",
        "",
        *table(
            ["data", "seed", "collapsed at t", "gap beyond", "forecast", "with smoothing"], smooth
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("build/forecast"))
    parser.add_argument("--records", type=Path, default=Path("build/schemes"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where results are kept")
    parser.add_argument("--data", default=",".join(ABOUT), help="which, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="run nothing, write what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.dir.mkdir(parents=True, exist_ok=True)
    unpack(arguments.docs / ARCHIVE, arguments.records)
    for name in [] if arguments.report else arguments.data.split(","):
        run(arguments.dir, arguments.records, name, arguments.seeds)
    lines = report(arguments.dir, arguments.records)
    print("\n".join(lines))
    (arguments.docs / "forecast.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
