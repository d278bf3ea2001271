"""What schemes gain: training runs with and without them, in parts that resume.

`make bench-schemes` runs it: one training run after another, each for a data set, a scheme, a
horizon with a learning-rate schedule of its own, and a seed. A finished run is a file in `--dir`
and is not run again: the command may be stopped and started again, and started twice at once.
`--report` adds the files to docs/results.jsonl, and writes docs/results.md and its pictures from
what is there. Runs of that file are not run again either, unless it is removed.

Plain training comes first, with a range of learning rates; the one whose held-out loss is lowest at
the short horizon serves all schemes, so that nothing is won against a badly tuned baseline. If it
is the largest of the range the report says so: the baseline may then still be a weak one.

Curves fall steeply where the learning rate does, at the end, so that how early a curve crosses a
value says little about a run that was planned to be short. `--horizons` therefore adds runs with
schedules of their own: what the default has after .6 and .75 of the steps is a question to them.

All models are class-conditional and all oracles class-wise. Every run of a data set, horizon and
seed begins with the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import meta
from schemes_data import Data, data_set, held_out_loss, loss_by_time, of_samples, shuffled
from schemes_records import ARCHIVE, pack, unpack
from torch import nn

from stagewise import (
    AtShare,
    LatentBank,
    LogitNormal,
    Mix,
    Oracle,
    Phase,
    Phases,
    ReferenceSet,
    Scheme,
    StageAware,
    StageCurve,
    Uniform,
    WithFloor,
)
from stagewise.losses import FlowMatchingLoss
from stagewise.stages import stratified_times

BATCH, WARMUP, SAMPLES = 128, 100, 1000


@dataclass(frozen=True)
class Plan:
    """How a data set is trained on and looked at.

    Attributes:
        horizons: Steps of a training; the learning rate is chosen at the first of them.
        rates: Learning rates that are tried.
        evaluations: How often the held-out loss is taken; samples are made every second time, and
            at the end.
        interval: Fewest steps between two evaluations.
        sampling_steps: Of the midpoint rule.
    """

    horizons: tuple[int, ...] = (1000, 3000)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    evaluations: int = 20
    interval: int = 1
    sampling_steps: int = 25


# Of the SiT an evaluation costs more than the training between two of them.
PLANS = {
    "photos8": Plan(),
    "digits": Plan(),
    "photos16": Plan(
        (500, 250), (1e-3, 3e-3, 1e-2, 3e-2), evaluations=10, interval=50, sampling_steps=10
    ),
}
DEFAULT = "default"


def schemes(oracle: Oracle, boundary: float) -> dict[str, Callable[[int], Scheme | Phases]]:
    """The rows of the tables, from a seed. Times are stratified in all of them."""
    even = {"timesteps": Uniform(stratified=True), "boundary": boundary}
    middle = {"timesteps": LogitNormal(stratified=True), "boundary": boundary}

    def switched(seed: int, **target: Any) -> Phases:
        first, last = (Scheme(**target, seed=seed, **times) for times in (middle, even))
        return Phases([Phase(first, AtShare(0.6)), Phase(last)])

    def default(seed: int) -> Phases:
        times = WithFloor(LogitNormal(), 0.5, stratified=True)
        first = Scheme(oracle, timesteps=times, target=Mix(), boundary=boundary, seed=seed)
        last = Scheme(oracle, target=Mix(), seed=seed, **even)
        return Phases([Phase(first, AtShare(0.6)), Phase(last)])

    return {
        "plain": lambda seed: Scheme(**even),
        "oracle, all t": lambda seed: Scheme(oracle, target=Mix(), seed=seed, **even),
        "oracle, navigation": lambda seed: Scheme(
            oracle, target=Mix("boundary"), seed=seed, **even
        ),
        "reference set of 128": lambda seed: Scheme(
            oracle, target=ReferenceSet(128), seed=seed, **even
        ),
        "logit-normal t": lambda seed: Scheme(**middle),
        "logit-normal then uniform t": switched,
        "oracle, logit-normal then uniform t": lambda seed: switched(
            seed, oracle=oracle, target=Mix()
        ),
        "stage-aware t (0.3)": lambda seed: Scheme(
            timesteps=StageAware(0.3, stratified=True), boundary=boundary
        ),
        DEFAULT: default,
        "two stages": lambda seed: Scheme.two_stage(
            oracle,
            timesteps=Uniform(stratified=True),
            boundary=StageCurve.measure(oracle, class_wise=True).boundary(),
            seed=seed,
        ),
    }


NAMES = tuple(schemes(None, 0.5))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """One training run."""

    data: str
    scheme: str
    horizon: int
    lr: float
    seed: int

    @property
    def file(self) -> str:
        name = "".join(c if c.isalnum() else "_" for c in self.scheme)
        return f"{self.data}-{name}-{self.horizon}-{self.lr:g}-{self.seed}.json"


@dataclass(frozen=True)
class State:
    """Where a training is: steps done, processor seconds they took, network and optimizer."""

    step: int
    seconds: float
    net: nn.Module
    optimizer: torch.optim.Optimizer


def steps(part: Part, data: Data, scheme: Scheme | Phases, batch: int = BATCH) -> Iterator[State]:
    """Trains, and stops before the first step and after each to be looked at."""
    torch.manual_seed(part.seed)
    net = data.net()
    scheme.check()
    objective = FlowMatchingLoss(scheme=scheme)
    optimizer = torch.optim.AdamW(net.parameters(), part.lr, (0.9, 0.95), weight_decay=0)

    def rate(step: int) -> float:
        return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / part.horizon)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = shuffled(*data.train, batch, seed=part.seed)
    seconds = 0.0
    yield State(0, seconds, net, optimizer)
    for step in range(1, part.horizon + 1):
        start = time.process_time()
        x1, labels = next(batches)
        loss = objective(net, x1, labels, classes=labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        scheme.observe(step=step, total=part.horizon)
        seconds += time.process_time() - start
        yield State(step, seconds, net, optimizer)


def train(
    part: Part, data: Data, oracle: Oracle, boundary: float, batch: int = BATCH
) -> tuple[dict[str, Any], nn.Module]:
    """Trains, and measures on the way; gives the record and the network.

    Seconds are the processor's: on one thread those of a machine with nothing else to do.
    """
    curve = []
    plan = PLANS.get(part.data, Plan())
    every = max(part.horizon // plan.evaluations, plan.interval)
    scheme = schemes(oracle, boundary)[part.scheme](part.seed)
    for at in steps(part, data, scheme, batch):
        left = part.horizon - at.step
        if at.step and left % every == 0:
            point = {"step": at.step, "seconds": at.seconds, "loss": held_out_loss(at.net, data)}
            if left % (2 * every) == 0:
                point |= of_samples(at.net, data, plan.sampling_steps, count=SAMPLES)
            curve.append(point)
    about = {"boundary": boundary, "threads": torch.get_num_threads(), "clock": "processor"}
    about |= {"cpu": meta()["cpu"], "by_time": loss_by_time(at.net, data)}
    return {**vars(part), **about, "curve": curve}, at.net


def boundary_of(oracle: Oracle) -> float:
    """The measured midpoint."""
    times = stratified_times(torch.linspace(0, 1, 25), 96)
    return StageCurve.measure(oracle, times, class_wise=True).boundary().midpoint


def best_rate(folder: Path, name: str, horizon: int) -> float | None:
    """The learning rate with which plain training gets lowest on the first seed, if all ran."""
    files = [folder / Part(name, "plain", horizon, lr, 0).file for lr in PLANS[name].rates]
    if not all(file.exists() for file in files):
        return None
    lowest = {}
    for file in files:
        found = json.loads(file.read_text())
        lowest[found["lr"]] = found["curve"][-1]["loss"]
    return min(lowest, key=lambda lr: math.inf if math.isnan(lowest[lr]) else lowest[lr])


def write_once(target: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Writes what `make` gives, unless it was written or another process is at it (None)."""
    claim = target.with_suffix(".running")
    if target.exists():
        return None
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return None
    try:
        result = make()
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(target)
        return result
    finally:
        claim.unlink()


def run(folder: Path, part: Part, made: dict[str, Any]) -> None:
    """Runs a part unless it was, or another process is at it."""
    start = time.perf_counter()

    def make() -> dict[str, Any]:
        if part.data not in made:
            data = data_set(part.data)
            oracle = Oracle(LatentBank(*data.train))
            made[part.data] = (data, oracle, boundary_of(oracle))
        return train(part, *made[part.data])[0]

    result = write_once(folder / part.file, make)
    if result is not None:
        last = result["curve"][-1]
        print(
            f"{part.file}: loss {last['loss']:.4f}, energy {last['energy']:.4f}, Frechet "
            f"{last['frechet']:.3f}, copies {last['copies']:.3f}, {last['seconds']:.0f} s of "
            f"training, {time.perf_counter() - start:.0f} s in all",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("build/schemes"))
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="where the results are kept"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write what there is")
    parser.add_argument("--data", default="photos8,digits,photos16", help="which, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--horizons", help="by commas (default those of the data set)")
    parser.add_argument("--only", help="schemes, by ';' (default all)")
    parser.add_argument("--threads", type=int, help="of torch, for each process")
    arguments = parser.parse_args()
    archive = arguments.docs / ARCHIVE
    unpack(archive, arguments.dir)
    if arguments.report:
        import schemes_report

        arguments.docs.mkdir(parents=True, exist_ok=True)
        pack(arguments.dir, archive)
        schemes_report.write(arguments.dir, arguments.docs)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    made: dict[str, Any] = {}
    for name in arguments.data.split(","):
        short, *_ = own = PLANS[name].horizons
        for lr in PLANS[name].rates:
            run(arguments.dir, Part(name, "plain", short, lr, 0), made)
        while (lr := best_rate(arguments.dir, name, short)) is None:
            time.sleep(2)  # another process is at one of them
        names = arguments.only.split(";") if arguments.only else list(NAMES)
        chosen = [int(h) for h in arguments.horizons.split(",")] if arguments.horizons else own
        for horizon in chosen:
            for scheme in names:
                for seed in range(arguments.seeds):
                    run(arguments.dir, Part(name, scheme, horizon, lr, seed), made)


if __name__ == "__main__":
    main()
