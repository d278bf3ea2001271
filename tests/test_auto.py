"""The engine that picks: what, why, and that the answer does not depend on it."""

import logging

import pytest
import torch

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Auto, Exact
from stagewise.engines import auto as module


def asked(bank, count=40):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(len(bank), (count,), generator=generator)
    t = torch.linspace(0, 0.999, count, dtype=torch.float64)
    x0 = torch.randn(count, bank.dim, generator=generator, dtype=torch.float64)
    return LinearPath().interpolate(x0, bank.take(rows), t), t, rows


@pytest.fixture
def low(monkeypatch):
    """A bank that counts as large, in three dimensions."""
    monkeypatch.setattr(module, "_MANY_ROWS", 1500)
    monkeypatch.setattr(module, "_ENOUGH", 1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) // 1600
    return LatentBank(torch.randn(2000, 3, generator=generator), labels)


@pytest.mark.parametrize(
    ("rows", "why"), [(50, "Few rows: small batches"), (5000, "Exact: one product with all rows")]
)
def test_says_once_for_each_bank_what_and_why(rows, why, caplog):
    bank = LatentBank(torch.randn(rows, 64))
    engine = Auto()
    with caplog.at_level(logging.INFO, logger="stagewise"):
        oracle = Oracle(bank, engine=engine)
        xt, t, _ = asked(bank, 3)
        oracle.posterior(xt, t)
        Oracle(bank, engine=engine)
    (record,) = caplog.records
    assert why in record.message
    assert repr(bank) in record.message
    assert engine.describe(bank) in record.message


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("asked_of", ["the bank", "classes", "both"])
def test_few_rows_are_the_reference(offset, asked_of):
    """To 1e-9 at all t, near-duplicates and classes of unlike sizes included."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(90, 24, generator=generator, dtype=torch.float64) + offset
    x[[7, 14]] = x[:1] + 1e-4 * torch.randn(2, 24, generator=generator, dtype=torch.float64)
    bank = LatentBank(x, (torch.arange(90) % 7).clamp_max(4), dtype=torch.float64)
    xt, t, rows = asked(bank, 300)
    labels = None if asked_of == "the bank" else bank.labels_of(rows.tolist())
    if asked_of == "both":
        labels[::3] = [None] * 100
    one, two = Oracle(bank), Oracle(bank, engine=Exact("float64"))
    assert one.engine.picks[bank].rows is not None
    found, expected = (o.posterior(xt, t, labels, source=rows, k=3) for o in (one, two))
    scale = (expected.mean - bank.centre).norm(dim=1) * (1 - t)
    off = (found.mean - expected.mean).norm(dim=1)
    assert bool((off <= 1e-9 * scale + 1e-12 * bank.max_norm * (1 - t)).all())
    for name in ("entropy", "ess", "weights", "source_weight"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-9
        )
    gap = (found.log_evidence - expected.log_evidence).abs()
    assert float(gap.max()) < 1e-6


@pytest.mark.parametrize(("name", "limit"), [("_PRODUCT", 50 * 64 * 8 - 1), ("_PAIRS", 50 * 8 - 1)])
def test_many_queries_of_few_rows_are_asked_of_exact(monkeypatch, name, limit):
    bank = LatentBank(torch.randn(50, 64))
    oracle, (xt, t, _) = Oracle(bank), asked(LatentBank(torch.randn(50, 64)), 8)
    few = oracle.posterior(xt, t)
    monkeypatch.setattr(module.few_rows, name, limit)
    many = oracle.posterior(xt, t)
    assert not torch.equal(few.mean, many.mean)
    torch.testing.assert_close(few.mean, many.mean, rtol=1e-5, atol=1e-5)


def test_names_the_missing_library(low, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    engine = Auto()
    assert "pip install --no-build-isolation 'stagewise[cluster]'" in engine.describe(low)
    assert engine.picks[low].tree is None


def test_a_library_for_another_torch_means_exact(low, monkeypatch):
    def broken(self, bank):
        raise ImportError("torch_cluster was built for another torch")

    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(module.TorchCluster, "prepare", broken)
    engine = Auto()
    assert engine.describe(low).startswith("Exact.")
    assert "built for another torch" in engine.describe(low)
    xt, t, _ = asked(low)
    assert (Oracle(low, engine=engine).posterior(xt, t).tail_mass == 0).all()


def test_no_tree_for_many_neighbours(low, monkeypatch):
    asked_for = []

    def found(bank, queries, k=1):
        asked_for.append(k)
        return engine.exact.posterior(bank, queries, k)

    engine = Auto()
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(module.TorchCluster, "prepare", lambda self, bank: None)
    engine.prepare(low)
    monkeypatch.setattr(engine.picks[low].tree, "posterior", found)
    xt, t, _ = asked(low)
    for k in (1, 500, 501):
        Oracle(low, engine=engine).posterior(xt, t, k=k)
    assert asked_for == [1, 500]


@pytest.mark.parametrize("labels", [None, [0, 1]])
def test_neighbours_where_few_rows_explain_a_query_and_exact_elsewhere(low, labels, monkeypatch):
    pytest.importorskip("torch_cluster", reason="pip install 'stagewise[cluster]'")
    engine = Auto()
    assert "k-d tree" in engine.describe(low)
    near, exact = engine.picks[low].tree, engine.exact
    counts = {"near": 0, "exact": 0}
    for name, part in (("near", near), ("exact", exact)):
        answer = part.posterior

        def counted(bank, queries, k=1, name=name, answer=answer):
            counts[name] += len(queries)
            return answer(bank, queries, k)

        monkeypatch.setattr(part, "posterior", counted)
    xt, t, rows = asked(low)
    names = None if labels is None else low.labels_of(rows.tolist())
    post = Oracle(low, engine=engine).posterior(xt, t, names, k=3)
    reference = Oracle(low, engine=Exact("float64")).posterior(xt, t, names, k=3)
    assert counts["near"] + counts["exact"] == 40
    assert min(counts.values()) >= 5
    assert post.tail_mass.max() <= 1e-7
    gap = (post.mean - reference.mean).norm(dim=1) / reference.mean.norm(dim=1)
    assert gap.max() <= 1e-5
    torch.testing.assert_close(post.weights, reference.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(post.log_evidence, reference.log_evidence, rtol=1e-6, atol=1e-5)


def test_no_tree_is_built_for_few_queries(low, monkeypatch):
    pytest.importorskip("torch_cluster", reason="pip install 'stagewise[cluster]'")
    monkeypatch.setattr(module, "_ENOUGH", 41)
    engine = Auto()
    engine.prepare(low)
    monkeypatch.setattr(engine.picks[low].tree, "posterior", None)  # would raise
    xt, t, _ = asked(low)
    assert (Oracle(low, engine=engine).posterior(xt, t).tail_mass == 0).all()


@pytest.mark.parametrize("engine", [Auto(), Exact(), Exact("float64")], ids=repr)
@pytest.mark.parametrize("t", [0.01, 0.5, 0.99])
def test_a_query_too_far_to_tell_rows_apart_has_no_posterior(engine, t):
    """Its squared distances from all rows are equal in float64: NaN, and not some row."""
    generator = torch.Generator().manual_seed(0)
    bank = LatentBank(torch.randn(50, 8, generator=generator))
    along = torch.randn(8, generator=generator, dtype=torch.float64)
    xt = along * torch.tensor([1.0, 1e9, 1e15, 1e18, 1e30])[:, None]
    post = Oracle(bank, engine=engine).posterior(xt, t)
    near = xt[:2, None] - t * bank.rows.double()
    weights = (near.square().sum(2) / (-2 * (1 - t) ** 2)).softmax(1)
    torch.testing.assert_close(post.mean[:2], weights @ bank.rows.double(), rtol=1e-4, atol=1e-5)
    for statistic in (post.mean, post.weights, post.entropy, post.ess):
        assert statistic[2:].isnan().all()
