"""Why schemes gain what they gain, in parts that resume: `make bench-schemes` runs it.

Three questions, at the horizon where the learning rate was chosen:

- **How much could less noise give at best?** A batch four times as large divides the variance of
  the gradient, from whatever source, by four; targets are one source of several.
- **Is there any of that left for the oracle?** The same batch with oracle targets.
- **What can 1000 samples tell apart?** Energy and Frechet distance of one model's samples with
  other noise, and those of training rows: what a model would have that made them perfectly.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import schemes
import torch
from schemes import SAMPLES, Part
from schemes_data import Data, data_set, energy_distance, frechet_distance, of_samples
from schemes_records import ARCHIVE, unpack
from torch import Tensor, nn

from stagewise import LatentBank, Oracle

__all__ = ["LARGE", "main"]

LARGE = 512
DRAWS = 5


def distances(made: Tensor, real: Tensor) -> dict[str, float]:
    """Both distances of samples to held-out data."""
    return {"energy": energy_distance(made, real), "frechet": frechet_distance(made, real)}


def look(net: nn.Module, data: Data, steps: int) -> list[dict[str, float]]:
    """The distances of several draws of samples."""
    return [of_samples(net, data, steps, count=SAMPLES, seed=2 + draw) for draw in range(DRAWS)]


def rows(data: Data) -> list[dict[str, float]]:
    """The distances of training rows, several draws."""
    real, x = data.held_out[0].flatten(1), data.train[0].flatten(1)
    generator = torch.Generator().manual_seed(4)
    chosen = (torch.randperm(len(x), generator=generator)[:SAMPLES] for _ in range(DRAWS))
    return [distances(x[at], real) for at in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("build/schemes"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where results are kept")
    parser.add_argument("--data", default="photos8", choices=list(schemes.PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    unpack(arguments.docs / ARCHIVE, arguments.dir)
    of, plan = arguments.data, schemes.PLANS[arguments.data]
    horizon = plan.horizons[0]
    lr = schemes.best_rate(arguments.dir, of, horizon)
    if lr is None:
        raise SystemExit("Run benchmarks/schemes.py first: the learning rate is chosen there.")
    data = data_set(of)
    oracle = Oracle(LatentBank(*data.train))
    boundary = schemes.boundary_of(oracle)
    for name in schemes.PLANS:
        made = arguments.dir / f"why-rows-{name}.json"
        schemes.write_once(made, lambda name=name: {"draws": rows(data_set(name))})
    for seed in range(arguments.seeds):
        for scheme, batch in (
            ("plain", schemes.BATCH),
            ("oracle, all t", schemes.BATCH),
            ("plain", LARGE),
            ("oracle, all t", LARGE),
        ):
            part = Part(of, scheme, horizon, lr, seed)

            def run(part: Part = part, batch: int = batch) -> dict[str, Any]:
                result, net = schemes.train(part, data, oracle, boundary, batch)
                return {**result, "batch": batch, "draws": look(net, data, plan.sampling_steps)}

            name = scheme.split(",")[0]
            schemes.write_once(arguments.dir / f"why-{of}-{name}-{batch}-{seed}.json", run)


if __name__ == "__main__":
    main()
