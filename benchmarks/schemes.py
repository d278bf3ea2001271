"""What schemes gain: training runs with and without them, in parts that resume.

`make bench-schemes` runs it: one training run after another, each for a data set, a scheme, a
horizon with a learning-rate schedule of its own, and a seed. A finished run is a file in `--dir`
and is not run again: the command may be stopped and started again, and started twice at once.
`--report` adds the files to docs/results.jsonl, and puts the tables into docs/results.md and its
pictures beside it. Runs of that file are not run again either, unless it is removed.

Plain training comes first, with a range of learning rates; the one whose held-out loss is lowest at
the short horizon serves all schemes, so that nothing is won against a badly tuned baseline.

A curve falls steeply where the learning rate does, at the end: where it crosses a value says little
about a shorter run. `--horizons` therefore adds runs with schedules of their own.

`--why` trains with batches four times as large, which divide the variance of the gradient from all
sources by four (targets are one source of several), and takes several draws of samples of each
model, and of training rows in their place. `--variance` measures the error of targets by t.

All models are class-conditional and all oracles class-wise. Every run of a data set, horizon and
seed begins with the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import schemes_report
import torch
from schemes_plan import (
    ARCHIVE,
    BATCH,
    LARGE,
    NAMES,
    PLANS,
    SAMPLES,
    Part,
    best_rate,
    options,
    pack,
    unpack,
    write_once,
)
from schemes_train import (
    Data,
    boundary_of,
    data_set,
    energy_distance,
    frechet_distance,
    of_samples,
    train,
)

from stagewise import LatentBank, Mix, Oracle, ReferenceSet, Scheme, Target

DRAWS = 5
"""Of 1000 samples of one model."""
TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUERIES, TARGET_DRAWS = 128, 8


@cache
def prepared(name: str) -> tuple[Data, Oracle, float]:
    """A data set, its oracle and its boundary."""
    data = data_set(name)
    oracle = Oracle(LatentBank(*data.train))
    return data, oracle, boundary_of(oracle)


def run(folder: Path, part: Part) -> None:
    """Runs a part, unless it has a file or another process runs it."""
    result = write_once(folder / part.file, lambda: train(part, *prepared(part.data))[0])
    if result is not None:
        last = ", ".join(f"{key} {value:.4g}" for key, value in result["curve"][-1].items())
        print(f"{part.file}: {last}", flush=True)


def run_all(folder: Path, name: str, horizons: Sequence[int], only: list[str], seeds: int) -> None:
    """Runs plain training with all learning rates, then all schemes with the best."""
    short = PLANS[name].horizons[0]
    for lr in PLANS[name].rates:
        run(folder, Part(name, "plain", short, lr, 0))
    while (best := best_rate(folder, name, short)) is None:
        time.sleep(2)  # another process runs one of them
    for horizon, scheme, seed in product(horizons, only, range(seeds)):
        run(folder, Part(name, scheme, horizon, best, seed))


def why(folder: Path, name: str, seeds: int) -> None:
    """Runs with large batches, with several draws of samples, and the distances of rows."""
    plan = PLANS[name]
    lr = best_rate(folder, name, plan.horizons[0])
    if lr is None:
        raise SystemExit("Run benchmarks/schemes.py first: the learning rate is chosen there.")
    for other in PLANS:
        write_once(folder / f"why-rows-{other}.json", partial(rows, other))

    def make(part: Part, batch: int) -> dict[str, Any]:
        data, oracle, boundary = prepared(name)
        result, net = train(part, data, oracle, boundary, batch)
        draws = [
            of_samples(net, data, plan.sampling_steps, count=SAMPLES, seed=2 + draw)
            for draw in range(DRAWS)
        ]
        return {**result, "batch": batch, "draws": draws}

    for seed, batch, scheme in product(range(seeds), (BATCH, LARGE), ("plain", "oracle, all t")):
        part = Part(name, scheme, plan.horizons[0], lr, seed)
        file = f"why-{name}-{scheme.split(',')[0]}-{batch}-{seed}.json"
        write_once(folder / file, partial(make, part, batch))


def rows(name: str) -> dict[str, Any]:
    """The distances of training rows to held-out data, several draws."""
    data = data_set(name)
    real, x = data.held_out[0].flatten(1), data.train[0].flatten(1)
    generator = torch.Generator().manual_seed(4)
    chosen = [x[torch.randperm(len(x), generator=generator)[:SAMPLES]] for _ in range(DRAWS)]
    distances = {"energy": energy_distance, "frechet": frechet_distance}
    return {"draws": [{key: of(made, real) for key, of in distances.items()} for made in chosen]}


def variance() -> dict[str, Any]:
    """What each target costs and what variance it leaves, over t, on photograph patches.

    The error of a target is how far it is from the oracle's, `E ||m_hat - m||^2`, over that of the
    conditional target, `E ||x_1 - m||^2`, with m the exact posterior mean of the class: 1 is plain
    training, 0 the oracle. `plain` is what the latter is of the signal, `E ||m - bank mean||^2`.
    Operations are counted: two for a multiply-add, two products over the rows that are looked at.
    """
    x, labels = data_set("photos8").train
    oracle = Oracle(LatentBank(x, labels))
    classes = len(oracle.bank.classes)
    targets: dict[str, tuple[Target, float]] = {  # and how many rows each query looks at
        "Mix()": (Mix(), round(len(x) / classes)),
        "ReferenceSet(128)": (ReferenceSet(128), 128),
        "ReferenceSet(1024)": (ReferenceSet(1024), 1024),
    }
    centre = x.flatten(1).double().mean(0)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for t in TIMES:
        at = torch.randint(len(x), (QUERIES,), generator=generator)
        x1, when = x[at].double(), torch.full((QUERIES,), t, dtype=torch.float64)
        x0 = torch.randn(x1.shape, generator=generator).double()
        xt, velocity = oracle.path.interpolate(x0, x1, when), x1 - x0
        mean = oracle.posterior(xt, when, labels[at]).mean.flatten(1)
        exact = mean - x1.flatten(1)
        signal = float((mean - centre).square().mean())
        about = {"t": t, "plain": float(exact.square().mean()) / signal, "signal": signal}
        for name, (target, looked_at) in targets.items():
            pulls, times = [], []
            for draw in range(TARGET_DRAWS):
                scheme = Scheme(oracle, target=target, seed=draw)
                start = time.process_time()
                # Velocities of targets differ by (m_hat - x_1) / sigma.
                moved, _ = scheme(velocity, xt=xt, t=when, x1=x1, labels=labels[at])
                times.append(1e3 * (time.process_time() - start))
                pulls.append((moved - velocity).flatten(1) * (1 - t))
            error = (torch.stack(pulls) - exact).square().sum((1, 2)).mean() / exact.square().sum()
            cost = {
                "operations": 4 * looked_at * x[0].numel(),
                "ms": sorted(times)[TARGET_DRAWS // 2],
            }
            lines.append({**about, "target": name, **cost, "error": float(error)})
            print(lines[-1], flush=True)
    return {"patch": 8, "rows": len(x), "classes": classes, "queries": QUERIES, "lines": lines}


def main() -> None:
    parser = options(__doc__, "build/schemes", PLANS)
    parser.add_argument("--why", action="store_true", help="larger batches, several draws")
    parser.add_argument("--variance", action="store_true", help="of targets, by t")
    parser.add_argument("--horizons", help="by commas (default those of the data set)")
    parser.add_argument("--only", default=";".join(NAMES), help="schemes, by ';'")
    arguments = parser.parse_args()
    folder = arguments.dir
    unpack(arguments.docs / ARCHIVE, folder)
    torch.set_num_threads(arguments.threads)
    if arguments.report:
        arguments.docs.mkdir(parents=True, exist_ok=True)
        pack(folder, arguments.docs / ARCHIVE)
        schemes_report.write(folder, arguments.docs)
        return
    if arguments.variance:
        write_once(folder / "variance.json", variance)
        return
    for name in arguments.data.split(","):
        if arguments.why:
            why(folder, name, arguments.seeds)
            continue
        horizons = PLANS[name].horizons
        if arguments.horizons:
            horizons = tuple(map(int, arguments.horizons.split(",")))
        run_all(folder, name, horizons, arguments.only.split(";"), arguments.seeds)


if __name__ == "__main__":
    main()
