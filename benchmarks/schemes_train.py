"""Data sets, training and metrics of the benchmarks of schemes and regularisers."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import meta
from schemes_plan import BATCH, PLANS, SAMPLES, WARMUP, Part, Plan, schemes
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torchdiffeq import odeint
from torchmetrics.image.fid import FrechetInceptionDistance

from stagewise import Oracle, Phases, Scheme, StageCurve, Uniform, find_sample
from stagewise.copies import COPY_RATIO
from stagewise.losses import FlowMatchingLoss
from stagewise.sampling import sample
from stagewise.stages import stratified_times

EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Between which the held-out loss is taken by t."""


@dataclass(frozen=True)
class Data:
    """Training and held-out samples with their classes."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    net: Callable[[], nn.Module]

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1


class Perceptron(nn.Module):
    """Three residual layers; t enters as sines and cosines, the class as a learned vector."""

    frequencies: Tensor

    def __init__(self, dim: int, classes: int, width: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, 64)
        self.register_buffer("frequencies", math.pi * 2 ** torch.linspace(-1, 6, 32))
        self.first, self.last = nn.Linear(dim + 128, width), nn.Linear(width, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.last.weight)

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies
        h = self.first(torch.cat([xt.flatten(1), angle.sin(), angle.cos(), self.label(labels)], 1))
        for layer in self.layers:
            h = h + layer(h)
        return self.last(nn.functional.silu(self.norm(h))).reshape(xt.shape)


def data_set(name: str) -> Data:
    """The samples of a name, and a network for them.

    photos8: 8x8 patches and a perceptron; photos16: those of the recipe and its SiT; digits;
    cancer: the table of scikit-learn, columns of mean 0 and variance 1; spiral: see `spiral`.
    """
    if name == "spiral":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = spiral().sample((3000,))
        y = torch.zeros(3000, dtype=torch.long)
        return Data((x[:1000], y[:1000]), (x[1000:], y[1000:]), lambda: Perceptron(2, 1, 256))
    if name == "cancer":
        from sklearn.datasets import load_breast_cancer

        table = load_breast_cancer()
        order = torch.randperm(len(table.data), generator=torch.Generator().manual_seed(0))
        x, y = torch.from_numpy(table.data).float()[order], torch.from_numpy(table.target)[order]
        x = (x - x[:300].mean(0)) / x[:300].std(0)
        return Data((x[:300], y[:300]), (x[300:], y[300:]), lambda: Perceptron(30, 2, 512))
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.data).float().reshape(-1, 1, 8, 8) / 8 - 1
        y = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], y[order]
        split = ((x[:1200], y[:1200]), (x[1200:], y[1200:]))
        return Data(*split, lambda: Perceptron(64, 10, 512))
    from stagewise.recipes.photos import PhotoPatches
    from stagewise.recipes.sit import SiT

    size = int(name.removeprefix("photos"))
    photos = PhotoPatches(patch=size)
    photos.setup()
    (x, y), (held, named) = photos.train.tensors, photos.held_out.tensors
    split = ((x, y), (held, named))
    if size == 8:
        return Data(*split, lambda: Perceptron(192, 7, 640))
    return Data(*split, lambda: SiT(7, 16, 3, 4, 128, 4, 4, class_dropout=0.0))


def shuffled(x: Tensor, y: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for at in torch.randperm(len(x), generator=generator).split(batch):
            if len(at) == batch:
                yield find_sample((x[at], y[at]))  # type: ignore[misc]


def in_parts(net: nn.Module, size: int = 128) -> Callable[..., Tensor]:
    """The network on few samples at a time, whose activations stay in the cache."""

    def run(*values: Tensor) -> Tensor:
        parts = zip(*(value.split(size) for value in values), strict=True)
        return torch.cat([net(*part) for part in parts])

    return run


@torch.no_grad()
def held_out_loss(net: nn.Module, data: Data) -> float:
    """Conditional flow-matching loss on held-out samples, four fixed (t, x_0) for each."""
    net.eval()
    objective = FlowMatchingLoss(timesteps=Uniform(stratified=True)).eval()
    x, y = data.held_out
    generator = torch.Generator().manual_seed(1)
    losses = [float(objective(in_parts(net), x, y, generator=generator)) for _ in range(4)]
    net.train()
    return statistics.fmean(losses)


@torch.no_grad()
def loss_by_time(net: nn.Module, data: Data, draws: int = 2) -> list[float]:
    """The same in each of the intervals between `EDGES`, `draws` fixed (t, x_0) for each."""
    net.eval()
    objective, generator = FlowMatchingLoss().eval(), torch.Generator().manual_seed(3)
    x, y = data.held_out
    means = []
    for low, high in itertools.pairwise(EDGES):
        losses = []
        for _ in range(draws):
            t = low + (high - low) * torch.rand(len(x), generator=generator)
            losses.append(float(objective(in_parts(net), x, y, t=t, generator=generator)))
        means.append(statistics.fmean(losses))
    net.train()
    return means


@torch.no_grad()
def of_samples(
    net: nn.Module, data: Data, steps: int, *, count: int, seed: int = 2, covered: bool = False
) -> dict[str, float]:
    """Energy and Frechet distance of samples to held-out data, the share of copies, coverage."""
    net.eval()
    x = data.train[0]
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, *x.shape[1:], generator=generator)
    labels = torch.arange(count) % data.classes
    run = in_parts(net)
    made = sample(lambda xt, t: run(xt, t, labels), x0, method="midpoint", steps=steps).flatten(1)
    net.train()
    real = data.held_out[0].flatten(1)
    if not made.isfinite().all():  # training has diverged
        return dict.fromkeys(("energy", "frechet", "copies", "coverage"), math.nan)
    near = torch.cdist(made, x.flatten(1)).topk(2, dim=1, largest=False).values
    coverage = {}
    if covered:
        radius = torch.cdist(real, real).kthvalue(6, dim=1).values  # the fifth but itself
        reached = torch.cdist(real, made).amin(1) < radius
        coverage = {"coverage": float(reached.float().mean())}
    return coverage | {
        "energy": energy_distance(made, real),
        "frechet": frechet_distance(made, real),
        "copies": float((near[:, 0] < COPY_RATIO * near[:, 1]).float().mean()),
    }


def energy_distance(x: Tensor, y: Tensor) -> float:
    """`2 E|x - y| - E|x - x'| - E|y - y'|`, without the pairs of a sample with itself."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """`|mean difference|^2 + tr(A + B - 2 (A B)^(1/2))` of the Gaussians fitted to pixels."""
    distance = FrechetInceptionDistance(_Pixels(x.shape[1]))
    distance.update(x.double(), real=True)
    distance.update(y.double(), real=False)
    return float(distance.compute())


class _Pixels(nn.Identity):
    """Rows as their own features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


# -- a density that is known ----------------------------------------------------------------------


def spiral() -> MixtureSameFamily:
    """60 Gaussians of width 0.06 along two turns, of unit size."""
    along = torch.linspace(0.25, 1, 60).sqrt()
    angle = 4 * math.pi * along
    centres = 1.8 * along[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    parts = Independent(Normal(centres, 0.06), 1)
    return MixtureSameFamily(Categorical(probs=torch.ones(60) / 60), parts)


def kl_from_density(
    net: Callable[[Tensor, Tensor, Tensor], Tensor], count: int = 1000, seed: int = 5
) -> float:
    """KL(density, model) in nats, over `count` draws; the model's log-density by its flow.

    `log p(x_1) = log N(x_0) - int_0^1 div v dt` (Chen et al., arXiv 1806.07366, eq. 8), with the
    exact divergence of two dimensions.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x1 = spiral().sample((count,))
    labels = torch.zeros(count, dtype=torch.long)

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = net(x, t.expand(count).float(), labels)
            parts = (torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1))
            divergence = torch.stack([part[:, i] for i, part in enumerate(parts)]).sum(0)
        return v.detach(), divergence.detach()

    # From the data back to the noise.
    times = torch.linspace(1, 0, 101)
    x0, change = odeint(field, (x1, torch.zeros(count)), times, method="midpoint")
    log_noise = Normal(0.0, 1.0).log_prob(x0[-1]).sum(1)
    return float((spiral().log_prob(x1) - log_noise - change[-1]).mean())


# -- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A training after `step` steps, which took so many seconds of the processor."""

    step: int
    seconds: float
    net: nn.Module
    optimizer: torch.optim.Optimizer


def steps(
    part: Part,
    data: Data,
    scheme: Scheme | Phases,
    batch: int = BATCH,
    *,
    decay: float = 0.0,
    change: Callable[[Tensor, Tensor], Tensor] = lambda x1, x0: x1,
) -> Iterator[State]:
    """Trains, and yields before the first step and after each; `change` is made to x_1, x_0."""
    torch.manual_seed(part.seed)
    net = data.net()
    scheme.check()
    objective = FlowMatchingLoss(scheme=scheme)
    optimizer = torch.optim.AdamW(net.parameters(), part.lr, (0.9, 0.95), weight_decay=decay)

    def rate(step: int) -> float:
        """A warm-up, and a cosine decay to 0."""
        return min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / part.horizon)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = shuffled(*data.train, batch, seed=part.seed)
    seconds = 0.0
    yield State(0, seconds, net, optimizer)
    for step in range(1, part.horizon + 1):
        start = time.process_time()
        x1, labels = next(batches)
        x0 = torch.randn_like(x1)
        loss = objective(net, change(x1, x0), labels, x0=x0, classes=labels)
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
