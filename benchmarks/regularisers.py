"""What keeps a model from learning few samples by heart: training runs, in parts that resume.

`make bench-regularisers` runs it: one training for a data set of N samples, a method, its setting
and a seed. A finished run is a file in `--dir` and is not run again: the command may be stopped and
started again, and started twice at once. `--report` keeps what there is in
docs/regularisers.jsonl, from which `schemes.py --report` fills the tables of docs/results.md.

Plain training comes first, with the learning rates of the plan: that with the lowest held-out loss
at its best serves all methods. Other baselines are tuned on the first seed, over the settings in
`METHODS`, by the lowest held-out loss at the end. What stagewise adds is not tuned.

Held-out loss is taken at the end of a training and at its lowest ("best", with perfect early
stopping). Energy and Frechet distance, copies (d1/d2 < 1/3) and coverage are of 5000 samples at the
end, all against samples that were never trained on. Coverage is the share of held-out samples that
have a made one nearer than their fifth nearest held-out neighbour (Naeem et al., arXiv 2002.09797).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import schemes_plan
import torch
from schemes_plan import BATCH, options, pack, record, unpack
from schemes_train import (
    Data,
    data_set,
    held_out_loss,
    kl_from_density,
    loss_by_time,
    of_samples,
    steps,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stagewise import LatentBank, Oracle, Scheme, Smoothing, StageBoundary, StageCurve, Uniform

SAMPLES, EVALUATIONS = 5000, 20
AVERAGES = (0.99, 0.997, 0.999)
"""Of the weights, over one plain training."""


@dataclass(frozen=True)
class Plan:
    """How a set is trained on: its data, N, steps, learning rates, steps of the midpoint rule."""

    data: str
    rows: int
    steps: int = 3000
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    sampling_steps: int = 15
    small: bool = False
    baselines: bool = True


PLANS = {
    "photos8-200": Plan("photos8", 200, small=True),
    "digits-300": Plan("digits", 300, 1500, small=True),
    "cancer-300": Plan("cancer", 300, 1500, small=True),
    "spiral-100": Plan("spiral", 100, 1500, small=True),
    "digits-1200": Plan("digits", 1200, rates=(0.003,)),
    "photos8-2000": Plan("photos8", 2000, rates=(0.01, 0.03)),
    "photos8-20000": Plan("photos8", 20000, rates=(0.03,)),
    "photos16-300": Plan("photos16", 300, 1500, (0.01,), 10, small=True),
    "photos16-20000": Plan("photos16", 20000, 500, (0.01,), 10),
    "digits-300 for 3000 steps": Plan("digits", 300, 3000, (0.01,), small=True, baselines=False),
    "photos16-300 for 3000 steps": Plan(
        "photos16", 300, 3000, (0.01,), 10, small=True, baselines=False
    ),
}
"""A rate alone is the best of those that were tried on that set. The last two train for longer,
until plain training has learned by heart; of them only plain training and ours are run."""

OURS = ("smoothing", "fitted", "two stages")
METHODS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.1, 0.3, 1.0),
    "dropout": (0.05, 0.1, 0.2),
    "isotropic noise": (0.05, 0.1, 0.2),
    "CDC-FM": (1.0, 3.0, 9.0),
    "EMA": (0.0,),
    "smoothing, all t": (0.0,),
    "smoothing, from the midpoint": (0.0,),
    "smoothing, from halfway": (0.0,),
    "smoothing, ramp": (0.0,),
    "flips": (0.0,),
}
"""Baselines of the small sets, with the settings over which each is tuned."""


@dataclass(frozen=True)
class Part:
    """One training."""

    plan: str
    method: str
    setting: float
    lr: float
    seed: int

    @property
    def file(self) -> str:
        name = "".join(c if c.isalnum() else "_" for c in self.method)
        return f"{self.plan.replace(' ', '_')}-{name}-{self.setting:g}-{self.lr:g}-{self.seed}.json"


def with_dropout(net: nn.Module, share: float) -> nn.Module:
    """The network, with dropout behind each SiLU."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share, module.training)

    for module in net.modules():
        if isinstance(module, nn.SiLU):
            module.register_forward_hook(drop)
    return net


class CarreDuChamp:
    """CDC-FM as published (Bamberger et al., arXiv 2510.05930): `x_1 + C_i^(1/2) x_0` for `x_1`.

    `C_i` is the covariance of the K = 256 nearest rows, the row among them, with weights
    `exp(-d_ij^2 / (b_i b_j))`, `b_i` the distance of the 8th; of rank 8; its largest eigenvalue is
    gamma times a ninth of the squared distance of the nearest row, capped at the 90 % quantile of
    that over all rows.
    """

    def __init__(self, rows: Tensor, gamma: float, near: int = 256, rank: int = 8) -> None:
        flat = rows.flatten(1).double()
        distances, index = torch.cdist(flat, flat).topk(min(near, len(flat)), largest=False)
        widths = distances[:, 8]
        limit = distances[:, 1].square() / 9
        limit = limit.minimum(limit.quantile(0.9))
        factors = []
        for i in range(len(flat)):
            weights = (-distances[i].square() / (widths[i] * widths[index[i]])).exp()
            weights /= weights.sum()
            about = flat[index[i]] - weights @ flat[index[i]]
            _, s, vectors = torch.linalg.svd(weights.sqrt()[:, None] * about, full_matrices=False)
            values = s[:rank].square()
            factors.append((gamma * limit[i] * values / values[0]).sqrt()[:, None] * vectors[:rank])
        self.halves = torch.stack(factors).float()  # rows of C^(1/2) in its own axes
        self.axes = nn.functional.normalize(self.halves, dim=2)

    def __call__(self, x1: Tensor, source: Tensor, x0: Tensor) -> Tensor:
        along = torch.einsum("bkd,bd->bk", self.axes[source], x0.flatten(1))
        return x1 + torch.einsum("bkd,bk->bd", self.halves[source], along).view_as(x1)


@dataclass(frozen=True)
class Made:
    """What the runs of a set share."""

    data: Data
    oracle: Oracle
    boundary: StageBoundary
    smoothing: Smoothing
    fitted: Smoothing | None

    @classmethod
    @cache
    def of(cls, plan: Plan) -> Made:
        data = data_set(plan.data)
        order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(0))
        x, y = (part[order[: plan.rows]] for part in data.train)
        oracle = Oracle(LatentBank(x, y))
        boundary = StageCurve.measure(oracle, class_wise=True).boundary()
        # The bank of the smoothing is that of the oracle: sorted by class, its rows are looked up.
        smoothing = Smoothing(oracle.bank, progress=False)
        fitted = Smoothing.fit(oracle.bank, boundary, progress=False) if plan.small else None
        return cls(replace(data, train=(x, y)), oracle, boundary, smoothing, fitted)

    def scheme(self, method: str, seed: int) -> Scheme:
        known: dict[str, Any] = {"timesteps": Uniform(stratified=True), "seed": seed}
        if method == "two stages":
            return Scheme.two_stage(self.oracle, boundary=self.boundary, **known)
        if method.startswith("smoothing") or method == "fitted":
            known |= {"boundary": self.boundary, "strength": strength(method, self.boundary)}
            known["smoothing"] = self.fitted if method == "fitted" else self.smoothing
        return Scheme(**known)


def strength(method: str, boundary: StageBoundary) -> Callable[[Tensor], Tensor] | None:
    """The alternatives to smoothing from the collapsed boundary on; a ramp ends there."""
    low, high = boundary.midpoint, boundary.collapsed
    alternatives: dict[str, Callable[[Tensor], Tensor]] = {
        "smoothing, all t": torch.ones_like,
        "smoothing, from the midpoint": lambda t: (t >= low).float(),
        "smoothing, from halfway": lambda t: (t >= (low + high) / 2).float(),
        "smoothing, ramp": lambda t: ((t - low) / (high - low)).clamp(0, 1),
    }
    return alternatives.get(method)


def change(part: Part, made: Made) -> Callable[[Tensor, Tensor], Tensor]:
    """What a method does to a batch x_1 that is noised with x_0."""
    draws = torch.Generator().manual_seed(part.seed + 100)
    bank = made.oracle.bank
    if part.method == "isotropic noise":
        return lambda x1, x0: x1 + part.setting * torch.randn(x1.shape, generator=draws)
    if part.method == "flips":

        def flip(x1: Tensor, x0: Tensor) -> Tensor:
            flipped = torch.rand(len(x1), generator=draws) < 0.5
            return torch.where(flipped[:, None, None, None], x1.flip(-1), x1)

        return flip
    if part.method == "CDC-FM":
        noise = CarreDuChamp(bank.rows, part.setting)
        return lambda x1, x0: noise(x1, bank.find(x1), x0)
    return lambda x1, x0: x1


def train(part: Part, made: Made) -> dict[str, Any]:
    """Trains and measures; seconds are the processor's."""
    plan, data = PLANS[part.plan], made.data
    if part.method == "dropout":
        data = replace(data, net=lambda: with_dropout(made.data.net(), part.setting))
    averages: dict[float, AveragedModel] = {}
    curves: dict[float, list[dict[str, float]]] = {0.0: []}
    every = plan.steps // EVALUATIONS
    decay = part.setting if part.method == "weight decay" else 0.0
    about = schemes_plan.Part(plan.data, part.method, plan.steps, part.lr, part.seed)
    scheme, batch = made.scheme(part.method, part.seed), min(BATCH, plan.rows)
    for at in steps(about, data, scheme, batch, decay=decay, change=change(part, made)):
        if not at.step:
            for share in AVERAGES if part.method == "EMA" else ():
                averages[share] = AveragedModel(at.net, multi_avg_fn=get_ema_multi_avg_fn(share))
                curves[share] = []
            continue
        for average in averages.values():
            average.update_parameters(at.net)
        left = plan.steps - at.step
        if left % every == 0:
            curves[0.0].append({"step": at.step, "loss": held_out_loss(at.net, data)})
        if left % (4 * every) == 0:
            for share, average in averages.items():
                curves[share].append({"step": at.step, "loss": held_out_loss(average, data)})
    found = {"seconds": at.seconds, **ended(at.net, made, plan, curves[0.0])}
    found["averages"] = {
        str(share): ended(average, made, plan, curves[share]) for share, average in averages.items()
    }
    fitted = repr(made.fitted) if part.method == "fitted" else None
    return {**vars(part), "boundary": made.boundary.as_dict(), "fitted": fitted, **found}


def ended(net: nn.Module, made: Made, plan: Plan, curve: list[dict[str, float]]) -> dict[str, Any]:
    """What is reported of a network at the end of its training."""
    data = made.data
    found = of_samples(net, data, plan.sampling_steps, count=SAMPLES, covered=True)
    if plan.data == "spiral":
        found["kl"] = kl_from_density(net)
    ends = {"end": curve[-1]["loss"], "best": min(point["loss"] for point in curve)}
    return {**ends, **found, "by_time": loss_by_time(net, data), "curve": curve}


def run(folder: Path, part: Part) -> dict[str, Any]:
    """Runs a part that has no file; waits if another process runs it."""

    def make() -> dict[str, Any]:
        result = train(part, Made.of(PLANS[part.plan]))
        keys = ("end", "best", "energy", "frechet", "copies", "coverage", "seconds")
        print(part.file, *(f"{key} {result[key]:.4f}" for key in keys), flush=True)
        return result

    return record(folder / part.file, make)


def parts(name: str, only: Sequence[str], lr: float, seeds: int) -> Iterator[Part]:
    """What is run of a set, with the learning rate of plain training."""
    plan = PLANS[name]
    for method in ("plain", *only):
        if method in ("plain", *OURS) and (plan.small or method != "fitted"):
            yield from (Part(name, method, 0.0, lr, seed) for seed in range(seeds))
        elif (
            plan.small and plan.baselines and (method != "flips" or plan.data.startswith("photos"))
        ):
            yield from (Part(name, method, setting, lr, 0) for setting in METHODS.get(method, ()))


def main() -> None:
    parser = options(__doc__, "build/regularisers", PLANS)
    parser.add_argument("--only", default=";".join((*OURS, *METHODS)), help="methods, by ';'")
    arguments = parser.parse_args()
    folder, archive = arguments.dir, arguments.docs / "regularisers.jsonl"
    unpack(archive, folder)
    if arguments.report:
        pack(folder, archive)
        return
    torch.set_num_threads(arguments.threads)
    for name in arguments.data.split(","):
        tried = {
            lr: run(folder, Part(name, "plain", 0.0, lr, 0))["best"] for lr in PLANS[name].rates
        }
        best = min(tried, key=tried.__getitem__)
        for part in parts(name, arguments.only.split(";"), best, arguments.seeds):
            run(folder, part)


if __name__ == "__main__":
    main()
