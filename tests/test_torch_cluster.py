"""What is particular to the engine on torch_cluster.

`tests/test_engines.py` holds them to the same brute force as all others.
"""

import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise import LatentBank, Oracle
from stagewise.engines import Queries
from stagewise.engines.torch_cluster import _FARTHEST, TorchCluster, _position, _reach
from stagewise.paths import PathCoefficients

INSTALL = "pip install --no-build-isolation 'stagewise[cluster]'"


@pytest.fixture
def torch_cluster():
    return pytest.importorskip("torch_cluster", reason=INSTALL)


def coefficients(count, alpha, sigma):
    alpha, sigma = (torch.full((count,), v, dtype=torch.float64) for v in (alpha, sigma))
    return PathCoefficients(alpha, sigma, alpha, sigma)


def ragged_bank(dim=3, n=600, seed=0):
    """Classes of different sizes, one of 2 rows and one that nobody asks for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    labels = torch.multinomial(torch.tensor([5.0, 1, 3, 2]), n, True, generator=generator)
    labels[:2] = 8
    return LatentBank(x, labels)


def nearest_rows(bank, xt, alpha, segment, k):
    """The rows of a segment that are nearest in ||x_t - a x||, as a set."""
    gaps = (xt - alpha * bank.take(torch.arange(segment.start, segment.stop))).square().sum(1)
    return {segment.start + i for i in gaps.argsort()[:k].tolist()}


@pytest.mark.parametrize("names", [[2, 0, 8, 2, 3, 0, 0], [3], [8, 8], [None, None], [2, None, 0]])
def test_neighbours_are_those_of_each_class(torch_cluster, names):
    bank = ragged_bank()
    xt = torch.randn(len(names), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = torch.full((len(names),), 0.7, dtype=torch.float64)
    post = Oracle(bank, engine=TorchCluster(10)).posterior(xt, t, names, k=10)
    for rows, query, name in zip(post.rows.tolist(), xt, names, strict=True):
        segment = bank.whole if name is None else bank.segment(name)
        assert {row for row in rows if row >= 0} == nearest_rows(bank, query, 0.7, segment, 10)


def test_all_classes_in_one_call_and_no_copy_of_the_bank(torch_cluster, monkeypatch):
    bank, calls = ragged_bank(), []

    def knn(x, *args):
        calls.append(x)
        return torch_cluster_knn(x, *args)

    torch_cluster_knn = torch_cluster.knn
    monkeypatch.setattr(torch_cluster, "knn", knn)
    xt, t = torch.randn(6, 3), torch.full((6,), 0.5)
    Oracle(bank, engine=TorchCluster(10)).posterior(xt, t, [8, 0, 2, 0, 8, 0])
    assert len(calls) == 1
    assert calls[0].untyped_storage().data_ptr() == bank.rows.untyped_storage().data_ptr()


def test_classes_and_the_whole_bank_in_one_group_of_queries(torch_cluster):
    # Not what an oracle asks, but the protocol allows it: the sets overlap.
    bank = ragged_bank()
    xt = torch.randn(3, 3, dtype=torch.float64)
    segments = [bank.segment(2), bank.whole, bank.segment(0)]
    queries = Queries(xt, coefficients(3, 0.7, 0.3), segments)
    post = TorchCluster(10).posterior(bank, queries, k=10)
    for rows, query, segment in zip(post.rows.tolist(), xt, segments, strict=True):
        assert set(rows) == nearest_rows(bank, query, 0.7, segment, 10)


@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 1e4, 1e8])
def test_rows_of_any_size(torch_cluster, size):
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) * size
    bank = LatentBank(x)
    queries = Queries(
        0.6 * bank.take(torch.arange(9)) + 0.1 * size,
        coefficients(9, 0.6, 0.3 * size),
        [bank.whole] * 9,
    )
    post = TorchCluster(20).posterior(bank, queries, k=20)
    for rows, query in zip(post.rows.tolist(), queries.xt, strict=True):
        assert set(rows) == nearest_rows(bank, query, 0.6, bank.whole, 20)


def test_a_float64_bank_is_searched_in_float64(torch_cluster):
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    x = 1 + 1e-10 * order.double()[:, None] * torch.ones(1, 2)
    bank = LatentBank(x)
    queries = Queries(torch.zeros(1, 2).double(), coefficients(1, 1.0, 1e-3), [bank.whole])
    post = TorchCluster(10).posterior(bank, queries, k=10)
    assert set(post.rows[0].tolist()) == nearest_rows(bank, queries.xt, 1.0, bank.whole, 10)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e3, 1e8])
def test_squares_stay_below_what_cuda_takes_for_infinite(torch_cluster, monkeypatch, size):
    largest = []

    def knn(x, y, *args):
        largest.append(torch.cdist(x.double(), y.double()).square().max())
        return torch_cluster_knn(x, y, *args)

    torch_cluster_knn = torch_cluster.knn
    monkeypatch.setattr(torch_cluster, "knn", knn)
    bank = LatentBank(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * size)
    # At a = 0 a query stands as far away as queries do.
    queries = Queries(bank.take(torch.arange(5)), coefficients(5, 0.0, 1.0), [bank.whole] * 5)
    TorchCluster(20).posterior(bank, queries)
    assert 1e-20 < largest[0] < 1e10
    y, _ = _position(bank, queries)
    torch.testing.assert_close(y.norm(dim=1), torch.full((5,), _FARTHEST * _reach(bank)).double())


@pytest.mark.parametrize("dim", [3, 64, 512])
def test_the_bound_holds_where_rounding_decides_who_is_near(torch_cluster, dim):
    # Rows on a sphere around the query, as well as float32 can say: their distances differ by
    # less than the search can tell, and their weights by a lot.
    x = torch.randn(400, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    shift = torch.full((dim,), 0.3, dtype=torch.float64)
    bank = LatentBank((x + shift).float())
    rows, xt = bank.take(torch.arange(400)), shift[None]
    broken = 0
    for sigma in (1e-3, 3e-4, 1e-4):
        logits = -(xt - rows).square().sum(1) / (2 * sigma**2)
        gamma = torch.softmax(logits, 0)
        queries = Queries(xt, coefficients(1, 1.0, sigma), [bank.whole])
        post = TorchCluster(200).posterior(bank, queries, k=200)
        found = post.rows[0]
        missed = 1 - gamma[found].sum()
        assert missed <= post.tail_mass[0] + 1e-12
        seen = (logits[found] - logits.max()).exp()
        last = 200 * seen.min()
        broken += int(missed > 1.001 * last / (last + seen.sum()))
    assert broken  # the bound without an allowance for rounding, that is


def test_more_than_100_on_cuda_are_refused(torch_cluster):
    bank = LatentBank(torch.randn(300, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = bank.to("cuda")
        with pytest.raises(ValueError, match=r"at most 100, .* on CUDA, got 101.*Nearest\(101\)"):
            TorchCluster(101).prepare(moved)
        TorchCluster(100).prepare(moved)
        # The bank on the host, the queries on CUDA; and more weights wanted than neighbours.
        engine, xt = TorchCluster(101), torch.randn(2, 3, device="cuda", dtype=torch.float64)
        engine.prepare(bank)
        one = torch.ones(2, device="cuda", dtype=torch.float64)
        queries = Queries(xt, PathCoefficients(one, one, one, one), [bank.whole] * 2)
        with pytest.raises(ValueError, match="at most 100"):
            engine.posterior(bank, queries)
        with pytest.raises(ValueError, match="at most 100"):
            TorchCluster(10).posterior(bank, queries, k=150)
    TorchCluster(101).prepare(bank)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_cluster", None)
    engine, bank = TorchCluster(10), LatentBank(torch.randn(20, 3))
    with pytest.raises(ImportError) as caught:
        Oracle(bank, engine=engine)
    assert INSTALL in str(caught.value)


def test_a_library_for_another_torch_is_named(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(sys.modules, "torch_cluster", Broken("torch_cluster"))
    with pytest.raises(ImportError, match="(?s)no-build-isolation.*undefined symbol"):
        TorchCluster(10).prepare(LatentBank(torch.randn(20, 3)))


def test_many_rows_of_few_dimensions(torch_cluster):
    x = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    bank = LatentBank(x)
    t = torch.tensor([0.3, 0.8, 0.95, 0.99])
    xt = t[:, None] * x[:4] + (1 - t[:, None]) * torch.randn(4, 3)
    post = Oracle(bank, engine=TorchCluster(100)).posterior(xt, t, k=100)
    for rows, query, alpha in zip(post.rows.tolist(), xt.double(), t.double(), strict=True):
        found, wanted = set(rows), nearest_rows(bank, query, alpha, bank.whole, 100)
        assert len(found & wanted) >= 99  # the last may tie to rounding
