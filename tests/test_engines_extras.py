"""What is particular to the engines on torch_cluster and faiss.

`tests/test_engines.py` holds them to the same brute force as all others.
"""

import copy
import gc
import sys
import types
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise import LatentBank, Oracle
from stagewise.engines import Queries
from stagewise.engines.faiss import Faiss
from stagewise.engines.neighbours import FAR, reach, stand
from stagewise.engines.torch_cluster import TorchCluster
from stagewise.paths import PathCoefficients

INSTALL = {
    "torch_cluster": "pip install --no-build-isolation 'stagewise[cluster]'",
    "faiss": "pip install 'stagewise[faiss]'",
}
ENGINES = [TorchCluster, Faiss]


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: {INSTALL[name]}")


@pytest.fixture
def torch_cluster():
    return library("torch_cluster")


@pytest.fixture
def faiss():
    return library("faiss")


def require(kind):
    library("faiss" if issubclass(kind, Faiss) else "torch_cluster")


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


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("names", [[2, 0, 8, 2, 3, 0, 0], [3], [8, 8], [None, None], [2, None, 0]])
def test_neighbours_are_those_of_each_class(kind, names):
    require(kind)
    bank = ragged_bank()
    xt = torch.randn(len(names), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = torch.full((len(names),), 0.7, dtype=torch.float64)
    post = Oracle(bank, engine=kind(10)).posterior(xt, t, names, k=10)
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


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 1e4, 1e8])
def test_rows_of_any_size(kind, size):
    require(kind)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) * size
    bank = LatentBank(x)
    queries = Queries(
        0.6 * bank.take(torch.arange(9)) + 0.1 * size,
        coefficients(9, 0.6, 0.3 * size),
        [bank.whole] * 9,
    )
    post = kind(20).posterior(bank, queries, k=20)
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
    y, _ = stand(bank, queries)
    torch.testing.assert_close(y.norm(dim=1), torch.full((5,), FAR * reach(bank)).double())


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("dim", [3, 64, 512])
def test_the_bound_holds_where_rounding_decides_who_is_near(kind, dim):
    # Rows on a sphere around the query, as well as float32 can say: their distances differ by
    # less than the search can tell, and their weights by a lot.
    require(kind)
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
        post = kind(200).posterior(bank, queries, k=200)
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


@pytest.mark.parametrize("kind", ENGINES)
def test_a_library_that_is_not_there_is_named(kind, monkeypatch):
    name = "faiss" if kind is Faiss else "torch_cluster"
    monkeypatch.setitem(sys.modules, name, None)
    engine, bank = kind(10), LatentBank(torch.randn(20, 3))
    with pytest.raises(ImportError) as caught:
        Oracle(bank, engine=engine)
    assert INSTALL[name] in str(caught.value)


def test_a_library_for_another_torch_is_named(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(sys.modules, "torch_cluster", Broken("torch_cluster"))
    with pytest.raises(ImportError, match="(?s)no-build-isolation.*undefined symbol"):
        TorchCluster(10).prepare(LatentBank(torch.randn(20, 3)))


@pytest.mark.parametrize("kind", ENGINES)
def test_many_rows_of_few_dimensions(kind):
    require(kind)
    x = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    bank = LatentBank(x)
    t = torch.tensor([0.3, 0.8, 0.95, 0.99])
    xt = t[:, None] * x[:4] + (1 - t[:, None]) * torch.randn(4, 3)
    post = Oracle(bank, engine=kind(100)).posterior(xt, t, k=100)
    for rows, query, alpha in zip(post.rows.tolist(), xt.double(), t.double(), strict=True):
        found, wanted = set(rows), nearest_rows(bank, query, alpha, bank.whole, 100)
        assert len(found & wanted) >= 99  # the last may tie to rounding


def test_a_mapped_bank_of_16_bits_is_indexed_in_chunks(faiss, tmp_path, monkeypatch):
    LatentBank(torch.randn(500, 16) + 7, dtype=torch.bfloat16).save(tmp_path / "bank.safetensors")
    bank = LatentBank.open(tmp_path / "bank.safetensors")
    monkeypatch.setattr("stagewise.engines.faiss.BLOCK", 64 * 16)
    sizes, add = [], faiss.IndexFlatL2.add
    monkeypatch.setattr(faiss.IndexFlatL2, "add", lambda i, x: sizes.append(len(x)) or add(i, x))
    engine = Faiss(20)
    engine.prepare(bank)
    assert sizes == [64] * 7 + [52]
    xt, t = bank.take(torch.arange(5)) + 0.3, torch.full((5,), 0.9)
    post = Oracle(bank, engine=engine).posterior(xt, t, k=20)
    for rows, query in zip(post.rows.tolist(), xt, strict=True):
        assert set(rows) == nearest_rows(bank, query, t[0].double(), bank.whole, 20)


def count_indices(faiss, monkeypatch):
    built, make = [], faiss.index_factory
    monkeypatch.setattr(faiss, "index_factory", lambda *args: built.append(args) or make(*args))
    return built


def test_an_index_is_built_once_for_a_bank(faiss, monkeypatch):
    built = count_indices(faiss, monkeypatch)
    bank, other = ragged_bank(), ragged_bank(seed=1)
    engine = Faiss(10, "IVF4,Flat")
    oracle = Oracle(bank, engine=engine)
    xt, t = torch.randn(4, 3), torch.full((4,), 0.5)
    for _ in range(2):
        oracle.posterior(xt, t)
        oracle.posterior(xt, t, [0, 2, 8, 3])
    Oracle(bank, engine=engine)
    assert len(built) == 1
    two = Oracle(other, engine=engine).posterior(xt, t, k=10)
    assert len(built) == 2
    # Each bank keeps its own.
    again = Oracle(other, engine=Faiss(10, "IVF4,Flat")).posterior(xt, t, k=10)
    assert torch.equal(two.rows, again.rows)
    assert not torch.equal(two.rows, oracle.posterior(xt, t, k=10).rows)


def test_an_index_does_not_outlive_its_bank(faiss):
    engine, bank = Faiss(10), LatentBank(torch.randn(50, 3))
    engine.prepare(bank)
    assert len(engine._built) == 1
    gone = weakref.ref(bank)
    del bank
    gc.collect()
    assert gone() is None
    assert len(engine._built) == 0


def test_a_copy_of_an_engine_builds_its_own_index(faiss, monkeypatch):
    built, bank = count_indices(faiss, monkeypatch), ragged_bank()
    engine = Faiss(10, "IVF4,Flat")
    engine.prepare(bank)
    copied = copy.deepcopy(engine)
    assert len(built) == 1
    copied.prepare(bank)
    assert len(built) == 2


def test_training_an_index_is_repeatable(faiss):
    bank = LatentBank(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
    xt, t = torch.randn(20, 8), torch.full((20,), 0.4)
    posts = []
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever was drawn before
        engine = Faiss(10, "IVF2,Flat", nprobe=1, seed=seed)
        posts.append(Oracle(bank, engine=engine).posterior(xt, t, k=10).rows)
    assert torch.equal(posts[0], posts[1])
    assert not torch.equal(posts[0], posts[2])


def test_an_inverted_file_finds_more_with_more_lists(faiss):
    bank = LatentBank(torch.randn(1500, 16, generator=torch.Generator().manual_seed(0)))
    xt = 0.6 * bank.rows[:40] + 0.4 * torch.randn(
        40, 16, generator=torch.Generator().manual_seed(1)
    )
    t = torch.full((40,), 0.6)
    found, kinds = [], []
    for nprobe in (1, 4, 16, None):
        engine = Faiss(20, "IVF16,Flat", nprobe=nprobe)
        post = Oracle(bank, engine=engine).posterior(xt, t, k=20)
        flat = Oracle(bank, engine=Faiss(20)).posterior(xt, t, k=20)
        found.append((post.rows[:, :, None] == flat.rows[:, None]).any(2).double().mean())
        kinds.append(post.tail_kind)
    assert found[0] < found[1] < found[2] == 1
    assert found[3] == found[1]  # the default is the square root of the lists
    assert kinds == ["estimated", "estimated", "bounded", "estimated"]


def test_a_compressed_inverted_file_is_never_exact(faiss):
    bank = LatentBank(torch.randn(600, 8))
    engine = Faiss(10, "IVF4,SQ8", nprobe=4)
    post = Oracle(bank, engine=engine).posterior(bank.rows[:5], torch.full((5,), 0.9), k=10)
    assert post.tail_kind == "estimated"
    # The rows it finds weigh what they weigh, not what their codes do.
    gaps = (bank.rows[:5, None].double() - 0.9 * bank.rows.double()).square().sum(2)
    logits = (-gaps / (2 * 0.1**2)).gather(1, post.rows)
    torch.testing.assert_close(post.weights, torch.softmax(logits, 1), atol=1e-5, rtol=0)


def test_the_tail_of_an_inverted_file_is_estimated_from_random_rows(faiss):
    bank = LatentBank(torch.randn(1500, 3, generator=torch.Generator().manual_seed(0)))
    xt = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    t = torch.full((30,), 0.3)
    post = Oracle(bank, engine=Faiss(20, "IVF16,Flat")).posterior(xt, t, k=20)
    logits = -(xt[:, None] - 0.3 * bank.rows).double().square().sum(2) / (2 * 0.7**2)
    missed = 1 - torch.softmax(logits, 1).gather(1, post.rows).sum(1)
    assert missed.min() > 0.5
    torch.testing.assert_close(post.tail_mass, missed, atol=0.05, rtol=0)


def test_a_class_that_few_lists_hold_is_found_all_the_same(faiss):
    # Two clusters far apart, and queries of the one that stand at the other.
    x = torch.randn(200, 2) + torch.tensor([50.0, 0.0]) * (torch.arange(200) >= 100)[:, None]
    bank = LatentBank(x, (torch.arange(200) >= 100).long())
    engine = Faiss(10, "IVF8,Flat", nprobe=1)
    xt, t = bank.take(torch.arange(3)), torch.full((3,), 0.9)
    post = Oracle(bank, engine=engine).posterior(xt, t, [1, 1, 0], k=10)
    for rows, query in zip(post.rows[:2].tolist(), xt, strict=False):
        assert set(rows) == nearest_rows(bank, query, t[0].double(), bank.segment(1), 10)
    assert (post.rows[2] < 100).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": "HNSW32"}, "inverted file"),
        ({"index": "flat"}, '"Flat"'),
        ({"nprobe": 4}, "`nprobe` .* inverted file, got 4 with 'Flat'"),
        ({"index": "IVF4,Flat", "nprobe": 0}, "at least 1"),
        ({"gpu": True, "k": 2049}, "at most 2048"),
    ],
)
def test_settings_that_no_index_has_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Faiss(**settings)


@pytest.mark.parametrize(
    ("index", "nprobe", "message"),
    [
        ("IVF4,Flat", 5, "nprobe=5 and 'IVF4,Flat' with 4 lists"),
        ("IVF64,Flat", None, "the 40 rows of the bank"),
        ("IVF4,Nonsense", None, "could not parse|Nonsense"),
        ("IVF4,Flat,RFlat", None, "something else"),
    ],
)
def test_an_index_that_does_not_fit_the_bank_is_refused(faiss, index, nprobe, message):
    with pytest.raises(ValueError, match=message):
        Oracle(LatentBank(torch.randn(40, 3)), engine=Faiss(10, index, nprobe=nprobe))


def test_a_faiss_without_gpus_is_named(faiss):
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    with pytest.raises(ImportError, match="GPU support.*faiss-gpu"):
        Oracle(LatentBank(torch.randn(40, 3)), engine=Faiss(10, gpu=True))


def test_an_index_on_a_gpu(faiss, monkeypatch):
    # Without a GPU: what is asked of faiss, and that classes are refused there.
    moved = []
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda *args: moved.append(args[:2]) or args[2], raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    bank = ragged_bank()
    oracle = Oracle(bank, engine=Faiss(10, gpu=True))
    assert moved == [("resources", 3)]
    xt, t = torch.randn(2, 3), torch.full((2,), 0.5)
    on_cpu = Oracle(bank, engine=Faiss(10)).posterior(xt, t, k=10)
    assert torch.equal(oracle.posterior(xt, t, k=10).rows, on_cpu.rows)
    with pytest.raises(ValueError, match=r"whole bank with gpu=True.*gpu=False"):
        oracle.posterior(xt, t, [0, 2])
