"""Every engine against a float64 brute force, through one tester.

What an engine answers is judged by what it says of itself: one that sums all rows by the posterior,
one that looks at some rows by the posterior over those rows and by what it says of the rest.
"""

import copy
import math
import pickle
from dataclasses import dataclass
from functools import cache

import pytest
import torch

import stagewise.engines
from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Engine, Exact, Nearest, Queries
from stagewise.engines.faiss import Faiss
from stagewise.engines.neighbours import Neighbours, random_rows, reach, stand
from stagewise.engines.torch_cluster import TorchCluster
from stagewise.paths import PathCoefficients

N, K = 300, 20
SIZES = {0: 150, 1: 90, 2: 40, 3: 15, 7: 3, 9: 2}
TIMES = (0, 0.02, 0.1, 0.3, 0.6, 0.9, 0.99, 0.999)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIMS = (3, 64, 512)
BANKS = ("gaussian", "clusters", "duplicates", "far")


class Plain(Neighbours):
    """Neighbours by explicit differences in float64."""

    def search(self, bank, queries, segment, n):
        y, _ = stand(bank, queries)
        rows = torch.arange(segment.start, segment.stop)
        x = bank.take(rows) - bank.centre
        gaps = (y[:, None] - x).square().sum(2)
        return rows[gaps.topk(n, largest=False).indices]


@dataclass(frozen=True)
class Case:
    """An engine, and what is to be expected of it.

    Attributes:
        make: Makes it.
        sums: Which rows enter the mean: "all", "found" (k rows, and the posterior is over those),
            or "some" (at least k, and the other statistics are of all).
        tail_kind: What it says of its tail mass.
        max_tail: The tail mass it lets pass.
    """

    make: type[Engine]
    sums: str
    tail_kind: str
    max_tail: float = 1.0


CASES = {
    "exact": Case(Exact, "all", "measured"),
    "exact-float64": Case(lambda: Exact("float64"), "all", "measured"),
    "exact-float32": Case(lambda: Exact("float32"), "all", "measured"),
    "exact-chunks": Case(lambda: Exact(chunk_size=37), "all", "measured"),
    "nearest-all": Case(lambda: Nearest(N), "all", "measured"),
    "nearest": Case(lambda: Nearest(K), "some", "measured"),
    "nearest-chunks": Case(lambda: Nearest(K, chunk_size=37), "some", "measured"),
    "nearest-exact": Case(lambda: Nearest(K, max_tail=1e-6), "all", "measured", 1e-6),
    "nearest-draws": Case(lambda: Nearest(K, draws=30), "drawn", "estimated"),
    "nearest-draws-all": Case(lambda: Nearest(K, draws=N), "all", "estimated"),
    "plain": Case(lambda: Plain(K), "found", "bounded"),
    "plain-all": Case(lambda: Plain(N), "all", "bounded"),
    "plain-exact": Case(lambda: Plain(K, max_tail=1e-6), "all", "bounded", 1e-6),
    "plain-draws": Case(lambda: Plain(K, draws=30), "drawn", "estimated"),
    "plain-draws-all": Case(lambda: Plain(K, draws=N), "all", "estimated"),
    "cluster": Case(lambda: TorchCluster(K), "found", "bounded"),
    "cluster-exact": Case(lambda: TorchCluster(K, max_tail=1e-6), "all", "bounded", 1e-6),
    "faiss": Case(lambda: Faiss(K), "found", "bounded"),
    "faiss-ivf": Case(lambda: Faiss(K, "IVF8,Flat", nprobe=8), "found", "bounded"),
    "faiss-ivf-some": Case(lambda: Faiss(K, "IVF8,Flat", nprobe=2), "found", "estimated"),
}
if hasattr(stagewise.engines, "Auto"):
    CASES["auto"] = Case(stagewise.engines.Auto, "all", "measured")
if hasattr(stagewise.engines, "Coarse"):
    CASES["coarse"] = Case(lambda: stagewise.engines.Coarse(K), "found", "estimated")
    CASES["coarse-exact"] = Case(
        lambda: stagewise.engines.Coarse(K, max_tail=0), "all", "estimated", 0
    )

LIBRARIES = {
    "cluster": ("torch_cluster", "pip install --no-build-isolation 'stagewise[cluster]'"),
    "faiss": ("faiss", "pip install 'stagewise[faiss]'"),
}


def engine_for(name):
    for prefix, (library, line) in LIBRARIES.items():
        if name.startswith(prefix):
            pytest.importorskip(library, reason=f"{library} is not installed: {line}")
    return CASES[name].make()


def samples(kind, dim):
    generator = torch.Generator().manual_seed(len(kind) + dim)
    x = torch.randn(N, dim, generator=generator, dtype=torch.float64)
    if kind == "clusters":
        x = 3 * x[torch.randint(12, (N,), generator=generator)] + 0.3 * x
    if kind == "duplicates":
        x[100:200] = x[:100]
        steps = torch.randn(100, dim, generator=generator, dtype=torch.float64)
        x[200:] = x[torch.arange(100) % 7] + 1e-3 * steps / steps.norm(dim=1, keepdim=True)
    if kind == "far":
        x = x + 100
    return x


@cache
def make_bank(kind, dim, dtype=torch.float32, permuted=False):
    labels = torch.cat([torch.full((size,), name) for name, size in SIZES.items()])
    labels = labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    x = samples(kind, dim).to(dtype if dtype == torch.float64 else torch.float32)
    if permuted:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
        x, labels = x[order], labels[order]
    return LatentBank(x, labels, dtype=dtype)


@dataclass(frozen=True)
class Truth:
    """Queries, and their posterior by explicit differences in float64."""

    xt: torch.Tensor
    t: torch.Tensor
    labels: list[int] | None
    x: torch.Tensor  # the samples
    inside: torch.Tensor  # which of them a query looks at
    logits: torch.Tensor
    gamma: torch.Tensor
    mean: torch.Tensor
    velocity: torch.Tensor

    def over(self, rows):
        """Log-evidence, weights (of all rows) and mean over some of the rows, -1 for none."""
        there = torch.zeros(len(rows), len(self.x) + 1, dtype=torch.bool)
        there = there.scatter_(1, rows.where(rows >= 0, len(self.x)), True)[:, :-1]
        logits = self.logits.masked_fill(~there, -torch.inf)
        gamma = torch.softmax(logits, 1)
        return torch.logsumexp(logits, 1), gamma, gamma @ self.x

    def outside(self, rows):
        """The posterior mass that is not on some rows."""
        padded = torch.cat([self.gamma, torch.zeros(len(rows), 1)], 1)
        return padded.scatter(1, rows.where(rows >= 0, len(self.x)), 0).sum(1)


@cache
def truth(kind, dim, dtype, class_wise):
    bank = make_bank(kind, dim, dtype)
    generator = torch.Generator().manual_seed(5)
    names = [list(SIZES)[i % len(SIZES)] for i in range(3 * len(TIMES))]
    source = [
        int(torch.randint(s.start, s.stop, (1,), generator=generator))
        for s in map(bank.segment, names)
    ]
    x = bank.take(torch.arange(N))
    t = torch.tensor(TIMES, dtype=torch.float64).repeat(3)
    x0 = torch.randn(len(t), dim, generator=generator, dtype=torch.float64)
    xt = LinearPath().interpolate(x0, x[source], t)
    inside = torch.ones(len(t), N, dtype=torch.bool)
    if class_wise:
        inside[:] = False
        for query, name in enumerate(names):
            inside[query, bank.segment(name)] = True
    gaps = (xt[:, None] - t[:, None, None] * x).square().sum(2)
    logits = (-gaps / (2 * (1 - t[:, None]) ** 2)).masked_fill(~inside, -torch.inf)
    gamma = torch.softmax(logits, 1)
    mean = gamma @ x
    velocity = (mean - xt) / (1 - t[:, None])
    return Truth(xt, t, names if class_wise else None, x, inside, logits, gamma, mean, velocity)


def entropy_and_ess(gamma):
    return -torch.special.xlogy(gamma, gamma).sum(1), 1 / gamma.square().sum(1)


def close(got, expected, tolerance, scale=1.0):
    error = (got - expected).abs() / scale
    assert error.max() <= tolerance, f"off by {error.max():.3g}, {tolerance:.3g} is let pass"


def check_statistics(post, log_evidence, gamma, k):
    """Log-evidence, entropy, ESS, weights and rows are those of the weights `gamma`."""
    entropy, ess = entropy_and_ess(gamma)
    close(post.log_evidence, log_evidence, 1e-5)
    close(post.entropy, entropy, 3e-5)
    close(post.ess, ess, 3e-5, ess)
    assert post.weights.shape == post.rows.shape == (len(gamma), k)
    top = gamma.topk(k, 1).values
    close(post.weights, top, 1e-5)
    none = post.rows < 0
    assert (post.weights[none] == 0).all()
    # Which of equal rows comes first is anybody's guess.
    close(gamma.gather(1, post.rows.clamp_min(0)).masked_fill(none, 0), top, 1e-5)
    for rows in post.rows:
        assert len(set(rows[rows >= 0].tolist())) == (rows >= 0).sum()


@pytest.mark.parametrize("class_wise", [False, True], ids=["whole", "class-wise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("name", CASES)
def test_engine(name, kind, dim, dtype, class_wise):
    case, bank = CASES[name], make_bank(kind, dim, dtype)
    want = truth(kind, dim, dtype, class_wise)
    oracle = Oracle(bank, engine=engine_for(name))
    k = N if name.endswith("-all") else K
    post = oracle.posterior(want.xt, want.t, want.labels, k=k)
    assert post.tail_kind == case.tail_kind or (post.tail_mass == 0).all()
    assert ((post.tail_mass >= 0) & (post.tail_mass <= 1)).all()
    radius = (want.x - bank.centre).norm(dim=1).max()
    diameter = torch.cdist(want.x, want.x).max()
    off = (post.mean - want.mean).norm(dim=1)

    if case.sums == "all":
        assert post.tail_mass.max() <= case.max_tail
        missed = post.tail_mass.max() if case.max_tail < 1 else 0
        assert (off <= 1e-5 * radius + missed * diameter).all()
        velocity = oracle.velocity(want.xt, want.t, want.labels)
        close((velocity - want.velocity).norm(dim=1), 0, 1e-5, want.velocity.norm(dim=1))
        if case.max_tail == 1:
            check_statistics(post, torch.logsumexp(want.logits, 1), want.gamma, k)
            assert post.tail_mass.max() == 0
        return

    if case.sums == "found":
        log_evidence, gamma, mean = want.over(post.rows)
        check_statistics(post, log_evidence, gamma, k)
        close((post.mean - mean).norm(dim=1), 0, 1e-5, radius)
        count = (post.rows >= 0).sum(1)
        assert torch.equal(count, want.inside.sum(1).clamp_max(K))
        if case.tail_kind == "bounded":
            missed = want.outside(post.rows)
            least = want.outside(want.gamma.topk(K, 1).indices)
            assert (missed <= post.tail_mass * (1 + 2e-5) + 1e-15).all()
            close(missed, least, 1e-5)  # the rows are the nearest
            assert (off <= post.tail_mass * diameter + 1e-5 * radius).all()
        return

    missed = post.tail_mass
    if case.sums == "some":
        check_statistics(post, torch.logsumexp(want.logits, 1), want.gamma, k)
        # How many rows were taken is up to the engine, but it must be the largest.
        ordered = want.gamma.sort(1, descending=True)
        tails = ordered.values.flip(1).cumsum(1).flip(1)[:, K:]
        close((tails - missed[:, None]).abs().amin(1), 0, 1e-5)
        taken = K + (tails - missed[:, None]).abs().argmin(1)
        rows = ordered.indices.where(torch.arange(N) < taken[:, None], -1)
        close((post.mean - want.over(rows)[2]).norm(dim=1), 0, 2e-5, radius)
    else:
        missed = torch.maximum(missed, want.outside(post.rows))
    assert (off <= missed * diameter + 1e-5 * radius).all()
