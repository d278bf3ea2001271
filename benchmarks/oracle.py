"""Cost of the exact oracle against its floor and against what a user would write.

`make bench` runs it; `--json FILE` also writes the numbers. All rows are timed in one process, in
turn, on the same inputs, and the ratio is that of medians. The floor is the two bare matrix
products, queries x rows and weights x rows, in the same precision. The error is that of the
posterior mean against float64 explicit differences, as the largest over the queries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stagewise import LatentBank, LinearPath, Oracle


def explicit(x: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Posterior mean from explicit float64 differences: the reference."""
    x, xt, t = x.double(), xt.double(), t.double()
    distance = torch.stack([(q - a * x).square().sum(1) for q, a in zip(xt, t, strict=True)])
    return torch.softmax(-distance / (2 * (1 - t[:, None]) ** 2), 1) @ x


def with_cdist(x: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """What one writes first: torch.cdist in float32, then a softmax."""
    distance = torch.cdist(xt / t[:, None], x) * t[:, None]
    return torch.softmax(-distance.square() / (2 * (1 - t[:, None]) ** 2), 1) @ x


def with_products(x: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """The expanded form in float32: one product for the distances, one for the mean."""
    inverse = 1 / (1 - t[:, None]) ** 2
    logits = t[:, None] * inverse * (xt @ x.T)
    logits -= t[:, None] ** 2 * inverse / 2 * x.square().sum(1)
    return torch.softmax(logits, 1) @ x


def floor(x: Tensor, xt: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The two bare products."""
    rows, query = x.to(dtype), xt.to(dtype)
    weights = torch.rand(len(query), len(rows), dtype=dtype)

    def run() -> Tensor:
        query @ rows.T
        return weights @ rows

    return run


def compare(n: int, dim: int, queries: int, t_max: float, runs: int) -> list[dict[str, object]]:
    """Times all rows in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=generator)
    t = 0.001 + (t_max - 0.001) * torch.rand(queries, generator=generator)
    x0 = torch.randn(queries, dim, generator=generator)
    xt = LinearPath().interpolate(x0, x[torch.randperm(n, generator=generator)[:queries]], t)
    oracle = Oracle(LatentBank(x))
    rows: dict[str, Callable[[], Tensor]] = {
        "floor: two float64 products": floor(x, xt, torch.float64),
        "floor: two float32 products": floor(x, xt, torch.float32),
        "stagewise exact": lambda: oracle.posterior(xt, t).mean,
        "torch.cdist, softmax (float32)": lambda: with_cdist(x, xt, t),
        "expanded form (float32)": lambda: with_products(x, xt, t),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    reference = explicit(x, xt, t)
    errors = {}
    for run in range(runs + 1):
        for name, function in rows.items():
            start = time.perf_counter()
            answer = function()
            if run:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
            elif not name.startswith("floor"):
                gap = (answer.double() - reference).norm(dim=1) / reference.norm(dim=1)
                errors[name] = float(gap.max())
    base = statistics.median(times["floor: two float64 products"])
    return [
        {
            "case": f"N={n} D={dim} B={queries} t<{t_max:g}",
            "row": name,
            "milliseconds": 1e3 * statistics.median(values),
            "ratio": statistics.median(values) / base,
            "error": errors.get(name),
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each row")
    arguments = parser.parse_args()
    results = []
    for n, dim, queries, t_max in ((20_000, 768, 512, 0.3), (4_000, 4096, 128, 0.999)):
        part = compare(n, dim, queries, t_max, arguments.runs)
        print(f"\n{part[0]['case']}   (unit-Gaussian rows, {torch.get_num_threads()} threads)")
        print(f"  {'':32}{'ms':>8}{'ratio':>8}{'error':>11}")
        for row in part:
            error = "" if row["error"] is None else f"{row['error']:11.1e}"
            print(f"  {row['row']:32}{row['milliseconds']:8.1f}{row['ratio']:8.2f}{error}")
        results += part
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
