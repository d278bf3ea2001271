"""What each target costs and what variance it leaves, over t: which one should be the default.

Per t, noisy photograph patches and their targets. The error of a target is how far it is from the
oracle's, `E ||m_hat - m||^2`, over that of the conditional target, `E ||x_1 - m||^2`, with m the
exact posterior mean: 1 is plain training, 0 the oracle. Operations are counted: two for a
multiply-add, two products over the rows that are looked at. `schemes_report.py` makes table and
picture of what this writes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from stagewise import LatentBank, Mix, Oracle, ReferenceSet, Stratified, Target
from stagewise.recipes.photos import PhotoPatches
from stagewise.schemes.correction import Batch

TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUERIES, DRAWS = 128, 8


def targets(n: int) -> dict[str, tuple[Target, float]]:
    """Targets, and how many rows each query looks at (both products)."""
    return {
        "Mix()": (Mix(), n),
        "ReferenceSet(128)": (ReferenceSet(128), 128),
        "ReferenceSet(1024)": (ReferenceSet(1024), 1024),
        # The search for the nearest rows of x_1 is a product over all: half of two.
        "Stratified(32, 96)": (Stratified(32, 96), 128 + n / 2),
        "Stratified(128, 896)": (Stratified(128, 896), 1024 + n / 2),
    }


def measure(
    oracle: Oracle, target: Target, batch: dict[str, Any], exact: Tensor
) -> dict[str, float]:
    """Error of `m - x_1`, relative to plain training's, and milliseconds."""
    pulls, times = [], []
    for draw in range(DRAWS):
        query = Batch(
            oracle, labels=None, source=None, class_wise=True, on_missing="error",
            draws=Random(draw), **batch,
        ).query()  # fmt: skip
        start = time.perf_counter()
        pulls.append(target.pull(query).difference)
        times.append(1e3 * (time.perf_counter() - start))
        if isinstance(target, Mix):
            break
    error = (torch.stack(pulls) - exact).square().sum((1, 2)).mean() / exact.square().sum()
    return {"error": float(error), "ms": sorted(times)[len(times) // 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/schemes/variance.json"))
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=20_000)
    arguments = parser.parse_args()
    photos = PhotoPatches(patch=arguments.patch, train_size=arguments.rows)
    photos.setup()
    x, labels = photos.train.tensors
    oracle = Oracle(LatentBank(x, labels))
    n = len(x) / len(oracle.bank.classes)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for t in TIMES:
        at = torch.randint(len(x), (QUERIES,), generator=generator)
        x1, when = x[at], torch.full((QUERIES,), t)
        xt = oracle.path.interpolate(torch.randn(x1.shape, generator=generator), x1, when)
        batch = {"xt": xt, "t": when, "x1": x1}
        post = oracle.posterior(xt, when, labels[at])
        exact = post.mean.flatten(1) - x1.flatten(1).double()
        for name, (target, rows) in targets(round(n)).items():
            line = {"t": t, "target": name, **measure(oracle, target, batch, exact)}
            line["operations"] = 4 * rows * oracle.bank.dim
            lines.append(line)
            print(line, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"patch": arguments.patch, "rows": len(x), "classes": len(oracle.bank.classes)}
    arguments.out.write_text(json.dumps({**about, "queries": QUERIES, "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
