"""Coarse-to-fine search: what it finds, what it says of the rest, and where it hands over."""

import copy
import logging
import math
import os
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import stagewise.engines.base
import stagewise.engines.coarse as coarse
import stagewise.engines.exact
from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Exact, Queries
from stagewise.engines.coarse import Coarse
from stagewise.engines.projection import Projection
from stagewise.spectrum import information, spectrum

PATH = LinearPath()
SIZES = (1000, 500, 390, 70, 40)


def natural(n, dim, seed=0, clusters=0, heavy=False):
    """Rows whose spectrum falls as 1/k, in clusters, or of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = 1 / torch.arange(1, dim + 1, dtype=torch.float64)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    if clusters:
        middle = torch.randn(clusters, dim, generator=generator, dtype=torch.float64)
        x = 0.7 * x + 0.7 * middle[torch.randint(clusters, (n,), generator=generator)]
    if heavy:
        x = x * (0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)).exp()
    return x * (spectrum / spectrum.mean()).sqrt()


@pytest.fixture(scope="module")
def bank():
    """2000 rows of 128 numbers in five classes, none of which begins where a block does."""
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(SIZES)])
    return LatentBank(natural(2000, 128, clusters=40).float(), labels)


def ask(bank, t, count=16, seed=1, segment=None, known=False):
    """Queries made from rows of the bank, and those rows."""
    generator = torch.Generator().manual_seed(seed)
    segment = segment or bank.whole
    source = torch.randint(segment.start, segment.stop, (count,), generator=generator)
    times = torch.as_tensor(t, dtype=torch.float64).expand(count)
    x0 = torch.randn(count, bank.dim, generator=generator, dtype=torch.float64)
    xt = PATH.interpolate(x0, bank.take(source), times)
    return Queries(xt, PATH(times), [segment] * count, source if known else None), source


def log_weights(bank, queries):
    """`l_i` of all rows from explicit differences, minus infinity outside the segments; (B, N)."""
    gaps = torch.cdist(
        queries.xt / queries.path.alpha[:, None],
        bank.take(torch.arange(len(bank))),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    logits = -((queries.path.alpha / queries.path.sigma)[:, None] * gaps).square() / 2
    for line, segment in zip(logits, queries.segments, strict=True):
        line[: segment.start] = line[segment.stop :] = -torch.inf
    return logits


def coarse_weights(bank, made, queries):
    """`c_i` of all rows from explicit differences in float64; (B, N)."""
    w = (queries.xt - queries.path.alpha[:, None] * bank.centre) @ made.axes.T
    gaps = w[:, None] - queries.path.alpha[:, None, None] * made.rows.double()
    return -gaps.square().sum(2) / (2 * queries.path.sigma[:, None] ** 2)


def missed(bank, queries, rows):
    """The posterior mass outside `rows`, to full relative precision; (B,)."""
    logits = log_weights(bank, queries)
    rest = logits.scatter(1, rows, -torch.inf).logsumexp(1)
    return (rest - logits.logsumexp(1)).exp()


def test_rows_that_are_few_are_all_read(bank, monkeypatch):
    monkeypatch.setattr(Projection, "of", lambda *_: pytest.fail("nothing to search"))
    engine = Coarse(k=500)
    engine.prepare(bank)
    queries, _ = ask(bank, 0.15)
    post, want = engine.posterior(bank, queries, 3), Exact().posterior(bank, queries, 3)
    assert torch.equal(post.mean, want.mean)
    assert torch.equal(post.rows, want.rows)
    assert post.tail_kind == "measured"
    assert (post.tail_mass == 0).all()


@pytest.mark.parametrize("label", [None, 0, 2], ids=["whole", "class", "small class"])
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "far", "far bfloat16"])
def test_posterior_is_that_of_the_rows_found(kind, label, bank):
    x = bank.rows.double() + 300 * kind.startswith("far")
    dtype = getattr(torch, kind.removeprefix("far ").replace("far", "float64"))
    moved = LatentBank(x, torch.repeat_interleave(torch.arange(5), torch.tensor(SIZES)))
    moved = LatentBank(x, torch.tensor(moved.labels_of(range(2000))), dtype=dtype)
    segment = moved.whole if label is None else moved.segment(label)
    queries, _ = ask(moved, [0.02, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9, 0.99], 8, segment=segment)
    post = Coarse(k=70, dims=24, max_tail=None).posterior(moved, queries, 70)
    assert ((post.rows >= segment.start) & (post.rows < segment.stop)).all()
    assert all(len(set(rows.tolist())) == 70 for rows in post.rows)
    logits = log_weights(moved, queries).gather(1, post.rows)
    weights = logits.softmax(1)
    torch.testing.assert_close(post.weights, weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(post.log_evidence, logits.logsumexp(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(post.ess, 1 / weights.square().sum(1), rtol=3e-5, atol=0)
    mean = (weights[:, :, None] * moved.take(post.rows)).sum(1)
    assert (post.mean - mean).norm(dim=1).max() < 1e-5 * moved.radius
    assert post.tail_kind == "estimated"
    assert ((post.tail_mass >= 0) & (post.tail_mass <= 1)).all()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("label", [None, 0, 1, 3])
def test_finds_the_largest_coarse_weights_and_sums_up_the_others(bank, label, known):
    segment = bank.whole if label is None else bank.segment(label)
    queries, source = ask(bank, [0.0, 0.05, 0.1, 0.2, 0.3, 0.6], 6, segment=segment, known=known)
    made = Projection.of(bank, 24)
    found = coarse._Found.of(bank, made, queries, segment, 17)
    want = coarse_weights(bank, made, queries)
    want[:, : segment.start] = want[:, segment.stop :] = -torch.inf
    key = want.scatter(1, source[:, None], torch.inf) if known else want
    least = key.topk(17, 1).values[:, -1]
    # c_i up to rounding of its float32, and to a number that all of a query share.
    shared = want.gather(1, found.rows) - found.coarse
    assert (shared - shared.mean(1, keepdim=True)).abs().max() < 1e-3
    assert (key.gather(1, found.rows) >= least[:, None] - 1e-3).all()
    assert all(len(set(rows.tolist())) == 17 for rows in found.rows)
    if known:
        assert torch.equal(found.rows[:, 0], source)
    for some, n in ((found, 17), (found.first_rows(9), 9)):
        left = want.scatter(1, found.rows[:, :n], -torch.inf).logsumexp(1)
        torch.testing.assert_close(some.left + shared.mean(1), left, rtol=0, atol=1e-3)
        assert some.rows.shape == some.coarse.shape == (6, n)


def test_coarse_weights_are_what_exact_ones_are_on_average():
    """Equation (1): over all noise across the axes, with the projection of the query fixed."""
    bank = LatentBank(natural(12, 8, seed=3))
    made = Projection.of(bank, 2)
    first, _ = ask(bank, 0.4, 1, seed=4)
    c = coarse_weights(bank, made, first)[0]
    generator = torch.Generator().manual_seed(5)
    source = torch.multinomial(c.softmax(0), 40_000, replacement=True, generator=generator)
    x0 = torch.randn(len(source), 8, generator=generator, dtype=torch.float64)
    xt = PATH.interpolate(x0, bank.take(source), torch.full((len(source),), 0.4))
    along = made.axes.T @ made.axes
    xt = xt + (first.xt - xt) @ along
    path = PATH(torch.full((len(source),), 0.4, dtype=torch.float64))
    gamma = log_weights(bank, Queries(xt, path, [bank.whole] * len(source))).softmax(1)
    assert gamma.std(0).max() > 0.2
    error = (gamma.mean(0) - c.softmax(0)).abs()
    # z is rounded to bfloat16, which moves the coarse weights by some thousandths.
    assert (error < 4 * gamma.std(0) / 200 + 2e-3).all()


DATA = {
    "gaussian": {},
    "clusters": {"clusters": 30},
    "lengths": {"heavy": True},
    "both": {"clusters": 100, "heavy": True},
}


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tail_is_rarely_underestimated_and_not_by_much_overestimated(dtype, known):
    ratios, errors = [], []
    for seed, options in enumerate(DATA.values()):
        bank = LatentBank(natural(2000, 128, seed, **options).float(), dtype=dtype)
        diameter = 2 * bank.radius
        engine = Coarse(k=48, dims=20, max_tail=None)
        for t in (0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.35, 0.4, 0.5):
            queries, _ = ask(bank, t, 48, seed=int(1000 * t) + seed, known=known)
            post = engine.posterior(bank, queries, 48)
            true = missed(bank, queries, post.rows)
            some = true > 1e-8
            ratios.append((post.tail_mass / true)[some])
            mean = log_weights(bank, queries).softmax(1) @ bank.take(torch.arange(2000))
            off = (post.mean - mean).norm(dim=1)
            errors.append(((off - 1e-5 * bank.radius) / (diameter * post.tail_mass))[some])
    ratio = torch.cat(ratios)
    assert len(ratio) > 700
    assert (ratio < 0.5).double().mean() < 0.01
    assert (ratio < 0.1).double().mean() < 0.002
    assert ratio.median() < 3
    assert ratio.quantile(0.75) < 15
    assert (torch.cat(errors) > 1).double().mean() < 0.005


@pytest.mark.parametrize("t", [0.3, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("spacing", [0, 1e-5, 1e-4, 1e-3, 1e-2])
def test_more_near_duplicates_than_rows_read_are_not_hidden_by_rounding(t, spacing):
    x = 5 * natural(1000, 64, seed=8)
    steps = torch.randn(200, 64, generator=torch.Generator().manual_seed(9))
    x[:200] = x[0] + spacing * steps
    bank = LatentBank(x)
    queries, source = ask(bank, t, 12, segment=slice(0, 200))
    queries = Queries(queries.xt, queries.path, [bank.whole] * 12)
    post = Coarse(k=16, dims=32, max_tail=None).posterior(bank, queries, 16)
    true = missed(bank, queries, post.rows)
    assert (post.tail_mass > true / 2 - 1e-5).all()


def test_large_tails_are_answered_exactly_and_in_order(bank):
    times = [0.3, 0.02, 0.5, 0.1, 0.9, 0.15, 0.25, 0.05]
    queries, _ = ask(bank, times, 8)
    free = Coarse(k=32, dims=24, max_tail=None).posterior(bank, queries, 4)
    post = Coarse(k=32, dims=24, max_tail=1e-2).posterior(bank, queries, 4)
    want = Exact().posterior(bank, queries, 4)
    large = free.tail_mass > 1e-2
    assert 2 < large.sum() < 7
    for name in ("mean", "weights", "rows", "log_evidence", "ess", "entropy"):
        got = getattr(post, name)
        assert torch.equal(got[large], getattr(want, name)[large])
        assert torch.equal(got[~large], getattr(free, name)[~large])
    assert (post.tail_mass[large] == 0).all()
    assert torch.equal(post.tail_mass[~large], free.tail_mass[~large])
    assert (post.mean - want.mean).norm(dim=1).max() <= 1e-2 * 2 * bank.radius
    nothing = Coarse(k=32, dims=24, max_tail=0).posterior(bank, queries, 4)
    torch.testing.assert_close(nothing.mean, want.mean, rtol=0, atol=1e-4)
    assert (nothing.tail_mass == 0).all()


def test_more_rows_are_read_before_all_are(monkeypatch):
    """In the middle of navigation 16 k rows carry what k rows miss."""
    bank = LatentBank(natural(6000, 64, clusters=40).float())
    engine, late = Coarse(k=20, dims=32), [0.1, 0.2, 0.25, 0.3, 0.35, 0.5]
    queries, _ = ask(bank, torch.tensor(late).repeat(5), 30)
    alone = Coarse(k=20, dims=32, max_tail=None).posterior(bank, queries)
    wider = Coarse(k=320, dims=32, max_tail=None).posterior(bank, queries)
    few, more = alone.tail_mass <= 1e-3, wider.tail_mass <= 1e-3
    assert few.any(), "some need no more"
    assert (~few & more).any(), "some do"
    assert (~more).any(), "some need all rows"
    asked = []
    exact = engine.exact.posterior

    def counted(bank, queries, k):
        asked.append(len(queries))
        return exact(bank, queries, k)

    monkeypatch.setattr(engine.exact, "posterior", counted)
    post, want = engine.posterior(bank, queries), Exact().posterior(bank, queries)
    assert asked == [int((~few & ~more).sum())]
    assert torch.equal(post.tail_mass[few], alone.tail_mass[few])
    torch.testing.assert_close(
        post.tail_mass[~few & more], wider.tail_mass[~few & more], rtol=1e-5, atol=0
    )
    assert ((post.mean - want.mean).norm(dim=1) <= 2 * bank.radius * 1e-3).all()


@pytest.mark.parametrize("max_tail", [None, 1e-3])
def test_classes_and_the_whole_bank_in_one_batch(bank, max_tail):
    labels = [0, None, 4, 1, 0, 3, None, 2]
    source = [5, 1700, 1980, 1400, 999, 1920, 3, 1600]
    times = torch.tensor([0.4, 0.45, 0.2, 0.4, 0.4, 0.15, 0.45, 0.4], dtype=torch.float64)
    x0 = torch.randn(8, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    xt = PATH.interpolate(x0, bank.take(torch.tensor(source)), times)
    engine = Coarse(k=30, dims=40, max_tail=max_tail)
    post = Oracle(bank, PATH, engine).posterior(xt, times, labels, k=2)
    want = Oracle(bank, PATH, Exact()).posterior(xt, times, labels, k=2)
    assert (want.weights[:, 0] > 0.9).sum() > 3
    assert ((post.mean - want.mean).norm(dim=1) <= 1e-3 * 2 * bank.radius).all()
    assert torch.equal(post.rows[:, 0], want.rows[:, 0])
    # Of 70 and 40 rows all are read.
    assert post.tail_mass[[2, 5]].tolist() == [0, 0]
    searched = [0, 1, 3, 4, 6, 7]
    assert (post.tail_mass[searched] > 0).sum() > 3
    some = [labels[i] for i in searched]
    alone = Oracle(bank, PATH, engine).posterior(xt[searched], times[searched], some, k=2)
    assert torch.equal(alone.rows, post.rows[searched])


def test_a_known_source_is_always_read(bank):
    queries, source = ask(bank, 0.08, 32, known=True)
    engine = Coarse(k=8, dims=24, max_tail=None)
    rows = engine.search(bank, queries, bank.whole, 8)
    without = Queries(queries.xt, queries.path, queries.segments)
    other = engine.search(bank, without, bank.whole, 8)
    absent = (other != source[:, None]).all(1)
    assert 4 < absent.sum() < 32
    assert (rows == source[:, None]).sum(1).eq(1).all()
    # All but the last of those that would be found otherwise are found still.
    same = (rows[:, :, None] == other[:, None, :]).any(2).sum(1)
    assert torch.equal(same, torch.where(absent, 7, 8))
    post = engine.posterior(bank, queries, 8)
    assert (post.rows == source[:, None]).any(1).all()
    unknown = Queries(queries.xt, queries.path, queries.segments, torch.full((32,), -1))
    assert torch.equal(engine.search(bank, unknown, bank.whole, 8), other)


def test_a_source_of_another_class_is_not_read(bank):
    segment = bank.segment(1)
    queries, _ = ask(bank, 0.1, 4, segment=segment)
    elsewhere = Queries(queries.xt, queries.path, queries.segments, torch.tensor([3, 999, 1500, 0]))
    engine = Coarse(k=8, dims=24)
    rows = engine.search(bank, elsewhere, segment, 8)
    assert torch.equal(rows, engine.search(bank, queries, segment, 8))


def test_easy_queries_read_fewer_rows(bank, monkeypatch):
    engine, widths = Coarse(k=200, dims=40, max_tail=None), []
    solve = engine.exact.solve

    def spy(bank, queries, k, *, table):
        widths.append(tuple(table.shape))
        assert (table.diff(dim=1) > 0).all()
        return solve(bank, queries, k, table=table)

    monkeypatch.setattr(engine.exact, "solve", spy)
    queries, _ = ask(bank, [0.9, 0.1, 0.8, 0.12, 0.7], 5)
    post = engine.posterior(bank, queries, 3)
    assert sorted(widths) == [(2, 200), (3, 64)]
    want = Exact().posterior(bank, queries, 3)
    assert torch.equal(post.rows[[0, 2, 4], 0], want.rows[[0, 2, 4], 0])
    assert (post.tail_mass[[0, 2, 4]] < 1e-5).all()
    assert (post.tail_mass[[1, 3]] > 1e-2).all()
    widths.clear()
    engine.posterior(bank, queries, 100)
    assert sorted(widths) == [(2, 200), (3, 100)]
    widths.clear()
    assert engine.posterior(bank, queries, 201).rows.shape == (5, 201)
    assert sorted(widths) == [(5, 201)]


def test_many_queries_are_asked_in_parts(bank, monkeypatch):
    queries, _ = ask(bank, 0.2, 10, known=True)
    engine = Coarse(k=32, dims=24, max_tail=None)
    want = engine.posterior(bank, queries, 4)
    monkeypatch.setattr(stagewise.engines.base, "_LOGIT_BYTES", 4 * 2000 * 3)
    post = engine.posterior(bank, queries, 4)
    assert torch.equal(post.rows, want.rows)
    torch.testing.assert_close(post.mean, want.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(post.tail_mass, want.tail_mass, rtol=1e-2, atol=0)


@pytest.mark.parametrize("k", [1, 2])
def test_very_few_rows(bank, k):
    queries, source = ask(bank, [0.1, 0.6], 2)
    post = Coarse(k=k, dims=24, max_tail=None).posterior(bank, queries)
    assert post.rows[1, 0] == source[1]
    assert (post.tail_mass >= missed(bank, queries, post.rows) / 2 - 1e-6).all()


@pytest.mark.parametrize("engine", [Coarse(k=32, dims=24), Coarse(k=32, dims=24, max_tail=None)])
def test_ends_of_the_path_and_nan(bank, engine):
    x1 = bank.rows[[7, 70, 700]]
    xt = torch.stack([torch.randn(128), x1[1], torch.full((128,), torch.nan)])
    post = Oracle(bank, PATH, engine).posterior(xt, torch.tensor([0.0, 1.0, 0.3]), k=2)
    assert post.rows[1, 0] == 70
    assert torch.equal(post.mean[1].float(), x1[1])
    assert post.mean[2].isnan().all()
    if engine.max_tail is None:
        assert post.tail_mass[0] > 0.9
    else:
        assert post.tail_mass[0] == 0
        torch.testing.assert_close(post.mean[0], bank.centre, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_axes_are_the_principal_ones(bank, dtype):
    far = LatentBank(bank.rows.double() + 100, dtype=dtype)
    made = Projection.of(far, 24)
    eye = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(made.axes @ made.axes.T, eye, rtol=0, atol=1e-6)
    centred = far.take(torch.arange(2000)) - far.centre
    want = torch.linalg.eigvalsh(centred.T @ centred / 2000).flip(0)[:24]
    torch.testing.assert_close(made.variances[:12], want[:12], rtol=1e-2, atol=0)
    torch.testing.assert_close(made.variances.sum(), want.sum(), rtol=5e-3, atol=0)
    z = centred @ made.axes.T
    assert (made.rows.double() - z).abs().max() <= 2**-8 * z.abs().max()
    half = made.rows.double().square().sum(1) / 2
    torch.testing.assert_close(made.half_norms.double(), half, rtol=1e-5, atol=0)


def test_information_is_that_of_the_axes(bank):
    path = PATH(torch.tensor([0.0, 0.1, 0.3, 0.9], dtype=torch.float64))
    few, all_axes = Coarse(k=8, dims=8), Coarse(k=8, dims=128)
    rho = path.alpha / path.sigma
    whole = information(rho, spectrum(bank))
    torch.testing.assert_close(all_axes.information(bank, path), whole, rtol=2e-2, atol=1e-6)
    nats = few.information(bank, path)
    torch.testing.assert_close(nats, information(rho, spectrum(bank)[-8:]), rtol=1e-2, atol=1e-6)
    assert nats[0] == 0
    # Where the projection tells much more than is needed, next to nothing is missed.
    engine = Coarse(k=32, dims=24, max_tail=None)
    t = next(
        t
        for t in torch.linspace(0.05, 0.9, 86, dtype=torch.float64)
        if engine.information(bank, PATH(t[None])) > math.log(2000 / 32) + 8
    )
    queries, _ = ask(bank, t, 64)
    post = engine.posterior(bank, queries, 32)
    assert missed(bank, queries, post.rows).mean() < 5e-3


@pytest.mark.parametrize(("rows", "dim", "dims"), [(100, 6, 6), (30, 200, 30), (500, 40, 40)])
def test_no_more_axes_than_there_are(rows, dim, dims):
    bank = LatentBank(natural(rows, dim))
    engine = Coarse(k=4, dims=1000, max_tail=None)
    assert engine.projection(bank).rows.shape == (rows, dims)
    queries, source = ask(bank, 0.9, 4)
    post = engine.posterior(bank, queries)
    assert torch.equal(post.rows[:, 0], source)
    assert post.tail_mass.max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 0}, "`dims` of at least 1, got 0"),
        ({"k": 0}, "`k` of at least 1, got 0"),
        ({"max_tail": 1.0}, r"`max_tail` in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Coarse(**options)


def test_a_bank_is_projected_once_and_says_what_it_costs(bank, caplog):
    engine = Coarse(k=32, dims=24)
    queries, _ = ask(bank, 0.3, 3)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="stagewise"):
        engine.prepare(bank)
        first = engine.posterior(bank, queries)
        engine.prepare(bank)
        engine.information(bank, queries.path)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(caplog.records) == 1
    assert "projects 2000 rows of 128 numbers on 24 axes" in caplog.text
    assert "1.0 MB and 0 GFLOP. Kept: 96.0 kB" in caplog.text
    other = LatentBank(natural(300, 32))
    engine.prepare(other)
    assert engine.projection(other).rows.shape == (300, 24)
    assert engine.projection(bank).rows.shape == (2000, 24)
    for twin in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert repr(twin) == repr(engine) == "Coarse(k=32, dims=24, max_tail=0.001)"
        assert torch.equal(twin.posterior(bank, queries).mean, first.mean)


def test_a_bank_that_is_gone_is_not_kept():
    engine, bank = Coarse(k=4, dims=4), LatentBank(natural(50, 8))
    engine.prepare(bank)
    assert len(engine._projections) == 1
    del bank
    assert len(engine._projections) == 0


def test_save_and_load(bank, tmp_path, monkeypatch):
    path = tmp_path / "projection.safetensors"
    queries, _ = ask(bank, [0.1, 0.2, 0.3], 3)
    engine = Coarse(k=32, dims=24, max_tail=None)
    engine.save(path, bank)
    want = engine.posterior(bank, queries, 5)
    monkeypatch.setattr(Projection, "of", lambda *_: pytest.fail("it is in the file"))
    again = Coarse(k=32, dims=24, max_tail=None)
    again.load(str(path), bank)
    post = again.posterior(bank, queries, 5)
    for name in ("mean", "rows", "weights", "tail_mass"):
        assert torch.equal(getattr(post, name), getattr(want, name))
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_is_whole_or_as_before(bank, tmp_path, monkeypatch):
    path = tmp_path / "projection.safetensors"
    engine = Coarse(k=32, dims=4)
    engine.save(path, bank)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        Coarse(k=32, dims=8).save(path, bank)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_refuses_other_files(bank, tmp_path):
    path = tmp_path / "projection.safetensors"
    Coarse(k=32, dims=4).save(path, bank)
    changed = bank.rows.clone()
    changed[1234, 56] += 1e-3
    labels = torch.tensor(bank.labels_of(range(2000)))
    engine = Coarse(k=32, dims=4)
    with pytest.raises(ValueError, match=r"made from other latents.*Coarse\.save\(path, bank\)"):
        engine.load(path, LatentBank(changed, labels))
    with pytest.raises(ValueError, match=r"on 5 axes, got .* with 4. Use Coarse\(dims=4\)"):
        Coarse(k=32, dims=5).load(path, bank)
    with pytest.raises(FileNotFoundError, match="got .*nowhere"):
        engine.load(tmp_path / "nowhere", bank)
    bank.save(tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="'stagewise.Projection'.* which says .*fingerprint"):
        engine.load(tmp_path / "bank.safetensors", bank)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        engine.load(path, bank)
    assert len(engine._projections) == 0


def test_memory_mapped_banks(bank, tmp_path):
    bank.save(tmp_path / "bank.safetensors")
    mapped = LatentBank.open(tmp_path / "bank.safetensors")
    queries, _ = ask(bank, [0.1, 0.2, 0.3], 3)
    engine = Coarse(k=32, dims=24)
    post, want = engine.posterior(mapped, queries, 3), engine.posterior(bank, queries, 3)
    assert torch.equal(post.rows, want.rows)
    torch.testing.assert_close(post.mean, want.mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("residency", ["cuda", "cpu"])
@pytest.mark.parametrize("labels", [None, [0, 1, None, 0, 4]], ids=["whole", "classes"])
def test_placement_on_cuda(bank, residency, labels, monkeypatch):
    # What is read on the host has no value here: some queries of each kind.
    monkeypatch.setattr(coarse, "where", lambda flags: list(range(0, len(flags), 2)))
    monkeypatch.setattr(stagewise.engines.exact, "where", lambda flags: list(range(len(flags))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = bank.to(residency)
        oracle = Oracle(there, PATH, Coarse(k=100, dims=24))
        xt, t = torch.randn(5, 128, device="cuda"), torch.rand(5, device="cuda")
        for source in (None, torch.arange(5, device="cuda")):
            post = oracle.posterior(xt, t, labels, source=source, k=3)
            tensors = [value for value in vars(post).values() if isinstance(value, torch.Tensor)]
            assert len(tensors) == 7 + (source is not None)
            assert {tensor.device.type for tensor in tensors} == {"cuda"}
            assert post.weights.shape == post.rows.shape == (5, 3)
        made = oracle.engine.projection(there)
        assert {v.device.type for v in vars(made).values()} == {residency}
