"""What `forecast_targets` says beside what training showed, in parts that resume.

`make bench-forecast` runs it. **Forecast**: plain training, stopped at some steps to be asked; the
gradients are those of 16 batches that the training does not see in this order. **Measured**: plain
training with larger batches, for the one whose held-out loss at the end is that of oracle targets
with a batch of 128, between batches by the logarithm of their size; plain and oracle targets with
128 and, where there are, 512 are the runs of docs/results.jsonl. Both write parts to `--dir`, which
are kept in docs/forecast.jsonl and not made again; the command then writes the tables to
docs/forecast.md. A data set without parts has no line there.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from schemes_plan import (
    ARCHIVE,
    BATCH,
    LARGE,
    PLANS,
    Part,
    best_rate,
    options,
    pack,
    unpack,
    write_once,
)
from schemes_statistics import load, share, share_cell
from schemes_train import Data, data_set, held_out_loss, shuffled, steps
from scipy.optimize import isotonic_regression
from tables import fill, table

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
    *_, last = steps(part, data, scheme, batch)
    return {**vars(part), "batch": batch, "loss": held_out_loss(last.net, data)}


def smoothed(part: Part, data: Data, oracle: Oracle) -> dict[str, Any]:
    """The same with a smoothing from the collapsed boundary on."""
    scheme = Scheme(timesteps=TIMES, smoothing=Smoothing(oracle.bank), seed=part.seed)
    scheme.measure_boundary()
    return ended(part, data, scheme, BATCH)


def asked(part: Part, data: Data, oracle: Oracle) -> dict[str, Any]:
    """What a plain training says of itself: targets now and then, smoothing at the end."""
    curve = StageCurve.measure(oracle, class_wise=True).boundary()
    when = {round(one * part.horizon): one for one in ASKED}
    found = []
    for at in steps(part, data, Scheme(timesteps=TIMES)):
        if at.step not in when:
            continue
        for key in METRICS:
            few = itertools.islice(shuffled(*data.train, BATCH, seed=1000 + part.seed), 16)
            said = forecast_targets(
                partial(torch.nn.Module.__call__, at.net),
                at.net,
                oracle,
                few,
                optimizer=at.optimizer if key == "adam" else None,
                timesteps=TIMES,
                seed=part.seed,
            )
            found.append({"at": when[at.step], "metric": key, **vars(said)})
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
    lr = best_rate(records, name, horizon)
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


def tables(folder: Path, records: Path) -> dict[str, str]:
    """The tables of docs/forecast.md."""
    parts = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    runs, rows, course, smooth, losses = load(records), [], [], [], []
    for name in PLANS:
        own = [part for part in parts if part["data"] == name]
        seen = [part for part in own if "found" in part]
        larger = [part for part in own if part["scheme"] == "plain" and "loss" in part]
        if not seen or not larger:
            continue
        known = runs[name, PLANS[name].horizons[0]]
        plain, goal = ([_end(run) for run in known[key]] for key in ("plain", "oracle, all t"))
        by_batch = {BATCH: plain}
        for part in sorted(larger, key=lambda part: (part["batch"], part["seed"])):
            by_batch.setdefault(part["batch"], []).append(part["loss"])
        for file in sorted(records.glob(f"why-{name}-plain-{LARGE}-*.json")):
            by_batch.setdefault(LARGE, []).append(_end(json.loads(file.read_text())))
        measured = equivalent(by_batch, goal)
        by = {key: [f for p in seen for f in p["found"] if f["metric"] == key] for key in METRICS}
        said, bare = (mean_forecast(by[key], first=FROM) for key in ("adam", "plain"))
        alone = min(map(len, by_batch.values())) == 1
        excess = (said.factor - 1) / (measured[0] - 1) - 1
        rows.append(
            [
                *(name, share_cell((said.factor, *said.interval), "above")),
                f"{measured[0]:.2f} (one seed)" if alone else share_cell(measured, "above"),
                *(f"{said.factor / measured[0] - 1:+.0%}", f"{excess:+.0%}"),
                *(f"{bare.factor:.2f}", f"{said.steps:.2f}"),
                share_cell(share(known["plain"], known["oracle, all t"], "loss")),
            ]
        )
        at = {key: [mean_forecast(by[key], first=t, last=t) for t in ASKED] for key in METRICS}
        for key, label in METRICS.items():
            course.append([name, label, *(f"{one.factor:.2f}" for one in at[key])])
        scales = (f"{one.noise_scale:.0f}" for one in at["adam"])
        course.append([name, "noise scale, samples", *scales])
        ends = {str(batch): values for batch, values in sorted(by_batch.items())}
        for batch, values in (ends | {f"{BATCH}, oracle": goal}).items():
            half = (max(values) - min(values)) / 2
            mean = f"{np.mean(values):.4f} ± {half:.4f}"
            losses.append([name, batch, str(len(values)), mean])
        without = {run["seed"]: _end(run) for run in known["plain"]}
        smoothed_ = [part for part in own if part["scheme"] == "smoothed"]
        gains = {p["seed"]: f"{p['loss'] / without[p['seed']] - 1:+.1%}" for p in smoothed_}
        for part in seen:
            late = {key: one["refinement"] for key, one in part["probe"]["stages"].items()}
            gap = late["held_out"]["conditional"] / late["train"]["conditional"] - 1
            found = forecast_smoothing(part["probe"], part["edges"], part["collapsed"])
            about = (name, f"{part['seed']}", f"{part['collapsed']:.2f}", f"{gap:+.1%}")
            seen_gap = "none"
            if found is not None and found.worth_trying:
                seen_gap = f"{found.gap:.0%} for t in [{found.t_from:.2f}, {found.t_to:.2f}]"
            smooth.append([*about, seen_gap, gains.get(part["seed"], "not run")])
    shares = [f"{one:g}" for one in ASKED]
    head = ["data", "forecast", "measured", "off", "off, of the excess over 1"]
    head += ["forecast with P = 1", "steps, forecast", "steps, measured"]
    gaps = ["data", "seed", "collapsed at t", "gap beyond", "forecast", "with smoothing"]
    return {
        "forecast": table(head, rows),
        "over the training": table(["data", "metric", *shares], course),
        "losses by batch": table(["data", "batch", "seeds", "held-out loss"], losses),
        "smoothing": table(gaps, smooth),
    }


def _end(run: dict[str, Any]) -> float:
    return run["curve"][-1]["loss"]


def main() -> None:
    parser = options(__doc__, "build/forecast", PLANS)
    parser.add_argument("--records", type=Path, default=Path("build/schemes"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    own = arguments.docs / "forecast.jsonl"
    unpack(own, arguments.dir)
    unpack(arguments.docs / ARCHIVE, arguments.records)
    for name in [] if arguments.report else arguments.data.split(","):
        run(arguments.dir, arguments.records, name, arguments.seeds)
    pack(arguments.dir, own)
    fill(arguments.docs / "forecast.md", tables(arguments.dir, arguments.records))


if __name__ == "__main__":
    main()
