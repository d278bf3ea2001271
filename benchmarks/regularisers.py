"""What keeps a model from learning few samples by heart: training runs, in parts that resume.

`make bench-regularisers` runs it: one training for a data set of N samples, a method, its setting
and a seed. A finished run is a file in `--dir` and is not run again: the command may be stopped and
started again, and started twice at once. Baselines are tuned on the first seed, over the settings
in `METHODS`: that with the lowest held-out loss at the end is run with the other seeds. What
stagewise adds is not tuned: one setting for all sets.

Held-out loss is taken at the end of a training and at its lowest ("best", with perfect early
stopping), energy and Frechet distance and the share of copies of 5000 samples at the end, all
against samples that were never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from schemes import BATCH, WARMUP, write_once
from schemes_data import Data, data_set, held_out_loss, loss_by_time, of_samples, shuffled
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stagewise import LatentBank, Oracle, Scheme, Smoothing, StageCurve, Uniform
from stagewise.losses import FlowMatchingLoss

SAMPLES, EVALUATIONS = 5000, 20


@dataclass(frozen=True)
class Plan:
    """How a set is trained on: its data, N, steps, the learning rate, steps of the midpoint rule.

    The rates are those that plain training does best with on the whole set, from the benchmark of
    schemes.
    """

    data: str
    rows: int
    steps: int = 3000
    lr: float = 0.01
    sampling_steps: int = 25


PLANS = {
    "photos8-200": Plan("photos8", 200),
    "photos8-2000": Plan("photos8", 2000),
    "photos8-20000": Plan("photos8", 20000, lr=0.03),
    "digits-300": Plan("digits", 300),
    "digits-1200": Plan("digits", 1200),
    "photos16-300": Plan("photos16", 300, 1500, 0.003, 10),
    "photos16-20000": Plan("photos16", 20000, 500, 0.01, 10),
}

METHODS: dict[str, tuple[float, ...]] = {
    "plain": (0.0,),
    "smoothing": (0.0,),
    "two stages": (0.0,),
    "smoothing, all t": (0.0,),
    "weight decay": (0.1, 0.3, 1.0),
    "dropout": (0.05, 0.1, 0.2),
    "EMA": (0.99, 0.997, 0.999),
    "isotropic noise": (0.05, 0.1, 0.2),
    "flips": (0.0,),
}
"""With the settings over which each is tuned; one setting is none."""


@dataclass(frozen=True)
class Part:
    """One training."""

    plan: str
    method: str
    setting: float
    seed: int

    @property
    def file(self) -> str:
        name = "".join(c if c.isalnum() else "_" for c in self.method)
        return f"{self.plan}-{name}-{self.setting:g}-{self.seed}.json"


class _Dropped(nn.Module):
    """A network with dropout behind each SiLU."""

    def __init__(self, net: nn.Module, share: float) -> None:
        super().__init__()
        self.net = net
        for module in net.modules():
            if isinstance(module, nn.SiLU):
                module.register_forward_hook(
                    lambda m, _, out: nn.functional.dropout(out, share, m.training)
                )

    def forward(self, *args: Any) -> torch.Tensor:
        return self.net(*args)


@dataclass
class Made:
    """What the runs of a set share."""

    data: Data
    oracle: Oracle
    boundary: Any
    smoothing: Smoothing

    @classmethod
    def of(cls, plan: Plan) -> Made:
        data = data_set(plan.data)
        order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(0))
        few = order[: plan.rows]
        data = replace(data, train=tuple(part[few] for part in data.train))
        oracle = Oracle(LatentBank(*data.train))
        boundary = StageCurve.measure(oracle, class_wise=True).boundary()
        # The bank of the smoothing is that of the oracle: sorted by class, its rows are looked up.
        return cls(data, oracle, boundary, Smoothing(oracle.bank, progress=False))

    def scheme(self, method: str, seed: int) -> Scheme:
        times, known = Uniform(stratified=True), {"boundary": self.boundary, "seed": seed}
        if method == "smoothing":
            return Scheme(timesteps=times, smoothing=self.smoothing, **known)
        if method == "smoothing, all t":
            options = {"smoothing": self.smoothing, "strength": torch.ones_like}
            return Scheme(timesteps=times, **options, **known)
        if method == "two stages":
            return Scheme.two_stage(self.oracle, timesteps=times, **known)
        return Scheme(timesteps=times, seed=seed)


def train(part: Part, made: Made) -> dict[str, Any]:
    """Trains and measures; seconds are the processor's."""
    plan, data = PLANS[part.plan], made.data
    torch.manual_seed(part.seed)
    net = data.net()
    if part.method == "dropout":
        net = _Dropped(net, part.setting)
    scheme = made.scheme(part.method, part.seed)
    objective = FlowMatchingLoss(scheme=scheme)
    decay = part.setting if part.method == "weight decay" else 0.0
    optimizer = torch.optim.AdamW(net.parameters(), plan.lr, (0.9, 0.95), weight_decay=decay)

    def rate(step: int) -> float:
        return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / plan.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    measured: nn.Module = net
    average = None
    if part.method == "EMA":
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(part.setting))
        measured = average
    curve, seconds = [], 0.0
    generator = torch.Generator().manual_seed(part.seed + 100)
    batches = shuffled(*data.train, min(BATCH, plan.rows), seed=part.seed)
    for step in range(1, plan.steps + 1):
        start = time.process_time()
        x1, labels = next(batches)
        if part.method == "isotropic noise":
            x1 = x1 + part.setting * torch.randn(x1.shape, generator=generator)
        if part.method == "flips":
            flipped = torch.rand(len(x1), generator=generator) < 0.5
            x1 = torch.where(flipped[:, None, None, None], x1.flip(-1), x1)
        loss = objective(net, x1, labels, classes=labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(net)
        scheme.observe(step=step, total=plan.steps)
        seconds += time.process_time() - start
        if (plan.steps - step) % (plan.steps // EVALUATIONS) == 0:
            curve.append({"step": step, "loss": held_out_loss(measured, data)})
    found = of_samples(measured, data, plan.sampling_steps, count=SAMPLES)
    best = min(point["loss"] for point in curve)
    about = {"boundary": made.boundary.as_dict(), "by_time": loss_by_time(measured, data)}
    end = {"end": curve[-1]["loss"], "best": best, "seconds": seconds, **found}
    return {**vars(part), **about, **end, "curve": curve}


def run(folder: Path, part: Part, made: dict[str, Made]) -> dict[str, Any]:
    """Runs a part unless it was; waits for another process that is at it."""
    file = folder / part.file

    def make() -> dict[str, Any]:
        if part.plan not in made:
            made[part.plan] = Made.of(PLANS[part.plan])
        return train(part, made[part.plan])

    while not file.exists():
        result = write_once(file, make)
        if result is None:
            time.sleep(2)
        else:
            keys = ("end", "best", "energy", "frechet", "copies", "seconds")
            print(part.file, *(f"{key} {result[key]:.4f}" for key in keys), flush=True)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("build/regularisers"))
    parser.add_argument("--data", default=",".join(PLANS), help="which, by commas")
    parser.add_argument("--only", default=";".join(METHODS), help="methods, by ';'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.dir.mkdir(parents=True, exist_ok=True)
    made: dict[str, Made] = {}
    for plan in arguments.data.split(","):
        for method in arguments.only.split(";"):
            if method == "flips" and not plan.startswith("photos"):
                continue
            ends: Callable[[float], float] = lambda setting, m=method, p=plan: run(  # noqa: E731
                arguments.dir, Part(p, m, setting, 0), made
            )["end"]
            best = min(METHODS[method], key=ends)
            for seed in range(1, arguments.seeds):
                run(arguments.dir, Part(plan, method, best, seed), made)


if __name__ == "__main__":
    main()
