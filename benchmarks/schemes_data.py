"""What the benchmark of schemes trains on, and what it measures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from spiral import spiral
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stagewise import Uniform, find_sample
from stagewise.copies import COPY_RATIO
from stagewise.losses import FlowMatchingLoss
from stagewise.sampling import sample

__all__ = [
    "EDGES",
    "Data",
    "Perceptron",
    "data_set",
    "energy_distance",
    "frechet_distance",
    "held_out_loss",
    "in_parts",
    "loss_by_time",
    "of_samples",
    "shuffled",
]

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
    split = (photos.train.tensors, photos.held_out.tensors)
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
    """The network, given so many samples at a time that what it computes stays in the cache."""

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
