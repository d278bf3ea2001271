"""What each target costs and what variance it leaves, over t: which one should be the default.

Per t, noisy photograph patches and their targets. The error of a target is how far it is from the
oracle's, `E ||m_hat - m||^2`, over that of the conditional target, `E ||x_1 - m||^2`, with m the
exact posterior mean of the class: 1 is plain training, 0 the oracle. `plain` is what the latter is
of the signal, `E ||m - bank mean||^2`. Which targets are unbiased is not measured here but proved
in the tests, by enumeration of all sources (drawing rows anew for one x_1 would not show it: an
unbiased set pulls towards its own x_1, and averages out over the x_1 that explain x_t). Operations
are counted: two for a multiply-add, two products over the rows that are looked at. A training step
counts six for each weight of the perceptron, on each sample.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from stagewise import LatentBank, Mix, Oracle, Prediction, ReferenceSet, Target
from stagewise.recipes.photos import PhotoPatches
from stagewise.schemes.correction import correct

TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUERIES, DRAWS = 128, 8
WEIGHTS = 1.6e6


def targets(n: int) -> dict[str, tuple[Target, float]]:
    """Targets, and how many rows each query looks at, in both products."""
    return {
        "Mix()": (Mix(), n),
        "ReferenceSet(128)": (ReferenceSet(128), 128),
        "ReferenceSet(1024)": (ReferenceSet(1024), 1024),
    }


def measure(
    oracle: Oracle, target: Target, batch: dict[str, Any], exact: torch.Tensor
) -> dict[str, float]:
    """Error of `m - x_1`, relative to plain training's, and processor milliseconds."""
    pulls, times = [], []
    for draw in range(DRAWS):
        start = time.process_time()
        found = correct(
            target, oracle, prediction=Prediction("data"), draws=Random(draw),
            class_wise=True, on_missing="error", **batch,
        )  # fmt: skip
        pulls.append(found.value.flatten(1))
        times.append(1e3 * (time.process_time() - start))
    error = (torch.stack(pulls) - exact).square().sum((1, 2)).mean() / exact.square().sum()
    return {"error": float(error), "ms": sorted(times)[DRAWS // 2]}


def lines_of(oracle: Oracle, x: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """A line for each t and target."""
    n = round(len(x) / len(oracle.bank.classes))
    centre = x.flatten(1).double().mean(0)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for t in TIMES:
        at = torch.randint(len(x), (QUERIES,), generator=generator)
        x1, when = x[at], torch.full((QUERIES,), t)
        xt = oracle.path.interpolate(torch.randn(x1.shape, generator=generator), x1, when)
        mean = oracle.posterior(xt, when, labels[at]).mean.flatten(1)
        exact = mean - x1.flatten(1).double()
        signal = float((mean - centre).square().mean())
        plain = float(exact.square().mean()) / signal
        for name, (target, rows) in targets(n).items():
            found = measure(oracle, target, {"xt": xt, "t": when, "x1": x1}, exact)
            cost = {"operations": 4 * rows * oracle.bank.dim}
            lines.append(
                {"t": t, "target": name, "plain": plain, "signal": signal, **cost, **found}
            )
            print(lines[-1], flush=True)
    return lines


def table(made: dict[str, Any]) -> list[str]:
    """What the report says of it, and which default follows."""
    names = list(dict.fromkeys(line["target"] for line in made["lines"]))
    times = sorted({line["t"] for line in made["lines"]})
    by = {(line["target"], line["t"]): line for line in made["lines"]}
    plain = np.array([by[names[0], t]["plain"] for t in times])
    head = "".join(f" {t:g} |" for t in times)
    lines = [
        "## Variance that a target leaves, by t",
        "",
        f"Photographs, {made['patch']} x {made['patch']} x 3, {made['rows']} rows, class-wise, "
        f"{made['queries']} queries for each t. First the error of plain targets over the signal "
        "E||m - bank mean||², then that of each target over that of plain ones (0: the oracle, 1: "
        "nothing gained, above 1: worse than nothing).",
        "",
        f"| target | MFLOP | ms / {made['queries']} |{head}",
        "|---" * (3 + len(times)) + "|",
        f"| x_1 itself (plain) / signal | 0 | 0 |{''.join(f' {p:.2g} |' for p in plain)}",
    ]
    rows, best = [], ("", -np.inf)
    signal = np.array([by[names[0], t]["signal"] for t in times])
    weight = plain * signal / (1 - np.array(times)) ** 2  # variance of plain targets, a velocity
    for name in names:
        own = [by[name, t] for t in times]
        error = np.array([line["error"] for line in own])
        milliseconds = np.median([line["ms"] for line in own])
        operations = own[0]["operations"]
        lines.append(
            f"| {name} | {operations / 1e6:.2f} | {milliseconds:.0f} |"
            f"{''.join(f' {e:.2g} |' for e in error)}"
        )
        whole = np.trapezoid(weight * error, times) / np.trapezoid(weight, times)
        cost = operations / (6 * WEIGHTS)
        gain = (1 - whole) / (1 + cost)
        rows.append(
            f"| {name} | {1 - whole:.2f} | {cost:.2f} | {gain:.2f} | {(1 - whole) / cost:.2f} |"
        )
        if gain > best[1]:
            best = (name, gain)
    return [
        *lines,
        "",
        f"Over all t from {times[0]:g} to {times[-1]:g}, for a velocity, whose error counts "
        "1/(1 - t)² times that of m. Cost is that of the target in "
        f"training steps of the perceptron ({WEIGHTS:.1e} weights), by operations.",
        "",
        "| target | variance removed | cost / step | removed / (step + cost) | removed / cost |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"**By this measure the target to choose is {best[0]}**, which removes most for the cost "
        "of a whole step. Per cost of the target alone the smallest set "
        "always wins, and a smaller one would win over it: that ratio chooses nothing.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/schemes/variance.json"))
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    photos = PhotoPatches(patch=arguments.patch, train_size=arguments.rows)
    photos.setup()
    x, labels = photos.train.tensors
    oracle = Oracle(LatentBank(x, labels))
    about = {"patch": arguments.patch, "rows": len(x), "classes": len(oracle.bank.classes)}
    made = {**about, "queries": QUERIES, "lines": lines_of(oracle, x, labels)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
