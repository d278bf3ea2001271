"""Smoothing against its definition, and its oracle against a dense mixture in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise import (
    CosinePath,
    EDMPath,
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    ReferenceSet,
    Scheme,
    SmoothedOracle,
    Smoothing,
    StageBoundary,
    StageCurve,
    VPPath,
)
from stagewise.engines import Exact, Sharded

PATHS = [LinearPath(), CosinePath(), VPPath(), EDMPath()]
TIMES = torch.tensor([0.0, 0.03, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(n=60, dim=12, seed=0):
    """Two clusters; row 1 stands three times, and rows 5 and 6 nearly agree."""
    x = torch.randn(n, dim, generator=draws(seed))
    x[: n // 2] += 2
    x[2] = x[3] = x[1]
    x[6] = x[5] + 1e-3
    return x


def labels(n=60):
    """Classes of several sizes, class 2 of one row."""
    y = torch.arange(n) % 2
    y[7] = 2
    return y


@pytest.fixture
def bank():
    return LatentBank(samples(), labels())


@pytest.fixture
def smoothing(bank):
    return Smoothing(bank, 4, 0.8, 0.1, progress=False)


def factors(smoothing):
    """`A_i` by its definition, (N, K, D), from all distances; with the K of each row."""
    bank = smoothing.bank
    x = bank.take(torch.arange(len(bank)))
    gaps = torch.linalg.vector_norm(x[:, None] - x, dim=2)
    gaps[(x[:, None] == x).all(2)] = math.inf
    if smoothing.class_wise:
        y = torch.tensor(bank.labels_of(range(len(bank))))
        gaps[y[:, None] != y] = math.inf
    far, near = gaps.topk(smoothing.neighbours, largest=False)
    there = far.isfinite()
    count = there.sum(1).clamp_min(1)
    a = (x[near] - x[:, None]) * there[:, :, None]
    return smoothing.scale / count.double().sqrt()[:, None, None] * a


def dense(smoothing, path, xt, t, rows):
    """Log-weights without the plain constant (B, n), and means of the Gaussians (B, n, D)."""
    bank, a = smoothing.bank, factors(smoothing)[rows]
    x, eye = bank.take(torch.arange(len(bank))[rows]), torch.eye(bank.dim).double()
    logs, means = [], []
    for query, time in zip(xt, t, strict=True):
        alpha, sigma, *_ = path(time)
        own = a.mT @ a + smoothing.floor**2 * eye
        whole = alpha**2 * own + sigma**2 * eye
        gap, root = query - alpha * x, torch.linalg.cholesky(whole)
        solved = torch.cholesky_solve(gap[:, :, None], root)[:, :, 0]
        log = -(gap * solved).sum(1) / 2 - root.diagonal(dim1=1, dim2=2).log().sum(1)
        logs.append(log + bank.dim * sigma.log())
        means.append(x + alpha * torch.einsum("nij,nj->ni", own, solved))
    return torch.stack(logs), torch.stack(means)


def queries(smoothing, path, t, seed=1):
    """Noisy samples of the smoothed set."""
    source = torch.randint(len(smoothing.bank), t.shape, generator=draws(seed))
    x1 = smoothing.draw(smoothing.bank.take(source), source, generator=draws(seed + 1))
    x0 = torch.randn(x1.shape, generator=draws(seed + 2), dtype=torch.float64)
    return path.interpolate(x0, x1, t), x1, source


# --- The oracle ----------------------------------------------------------------------------------


def assert_dense(oracle, xt, t, labels=None, *, mean=1e-5, k=3):
    smoothing, bank = oracle.smoothing, oracle.bank
    post = oracle.posterior(xt, t, labels, k=k)
    for i in range(len(t)):
        rows = bank.whole if labels is None else bank.segment(labels[i])
        at = slice(i, i + 1)
        logs, means = dense(smoothing, oracle.path, xt[at], t[at], rows)
        log_z = logs.logsumexp(1)
        gamma = (logs - log_z[:, None]).exp()[0]
        expected = gamma @ means[0]
        size = (expected - bank.centre).norm().clamp_min(1e-6 * bank.radius)  # 0 at t = 0
        off = (post.mean[i].flatten() - expected).norm() / size
        assert off < mean, (oracle.path, float(t[i]), float(off))
        torch.testing.assert_close(post.log_evidence[at], log_z, rtol=1e-6, atol=1e-6)
        entropy = torch.special.entr(gamma).sum()
        torch.testing.assert_close(post.entropy[i], entropy, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(post.ess[i], 1 / gamma.square().sum(), rtol=1e-5, atol=1e-6)
        top = gamma.topk(min(k, len(gamma))).values
        torch.testing.assert_close(post.weights[i, : len(top)], top, rtol=1e-5, atol=1e-8)
        there = post.rows[i] >= 0
        assert int(there.sum()) == len(top)
        assert (post.weights[i, ~there] == 0).all()
        own = gamma[post.rows[i, there] - rows.start]
        torch.testing.assert_close(own, top, rtol=1e-5, atol=1e-8)
    assert (post.tail_mass == 0).all()


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("neighbours", [1, 4, 32])
def test_dense_mixture(bank, path, floor, neighbours):
    smoothing = Smoothing(bank, neighbours, 0.8, floor, progress=False)
    xt, _, _ = queries(smoothing, path, TIMES)
    assert_dense(SmoothedOracle(bank, path, smoothing), xt, TIMES)


@pytest.mark.parametrize(
    ("path", "floor", "time"),
    list(zip(PATHS, (0.0, 0.1, 0.0, 0.1), (0.2, 0.2, 0.97, 0.97), strict=True)),
    ids=repr,
)
def test_dense_mixture_in_many_dimensions(path, floor, time):
    bank, t = LatentBank(samples(34, 256)), torch.tensor([time]).double()
    smoothing = Smoothing(bank, 32, 1.0, floor, progress=False)
    xt, _, _ = queries(smoothing, path, t)
    assert_dense(SmoothedOracle(bank, path, smoothing), xt, t)


@pytest.mark.parametrize("class_wise", [False, True])
def test_dense_mixture_of_classes(bank, class_wise):
    """Neighbours may be of other classes; a class of one row has none of its own."""
    smoothing = Smoothing(bank, 32, 0.8, 0.1, class_wise=class_wise, progress=False)
    t = torch.linspace(0.05, 0.9, 9).double()
    xt, _, source = queries(smoothing, LinearPath(), t)
    oracle = SmoothedOracle(bank, LinearPath(), smoothing, null_class=9)
    y = bank.labels_of(source.tolist())
    assert_dense(oracle, xt, t, y)
    assert_dense(oracle, xt, t, [2] * 9)
    whole, mixed = oracle.posterior(xt, t).mean, oracle.posterior(xt, t, [9, *y[1:]]).mean
    torch.testing.assert_close(mixed[0], whole[0])
    torch.testing.assert_close(mixed[1:], oracle.posterior(xt, t, y).mean[1:])


def test_far_rows_and_16_bits_and_sample_shapes():
    x = samples().reshape(60, 3, 2, 2) + 30
    bank = LatentBank(x, dtype=torch.bfloat16)
    smoothing = Smoothing(bank, 4, 1.0, progress=False)
    xt, x1, _ = queries(smoothing, LinearPath(), TIMES)
    oracle, shape = SmoothedOracle(bank, LinearPath(), smoothing), (6, 3, 2, 2)
    assert oracle.posterior(xt.reshape(shape), TIMES).mean.shape == shape
    assert oracle.correction(xt.reshape(shape), TIMES, x1.reshape(shape)).shape == shape
    flat = LatentBank(bank.take(torch.arange(60)))
    same = Smoothing(flat, 4, 1.0, progress=False)
    assert torch.equal(smoothing.index, same.index)
    assert_dense(SmoothedOracle(flat, LinearPath(), same), xt, TIMES)
    other = SmoothedOracle(flat, LinearPath(), same).posterior(xt, TIMES)
    mean = oracle.posterior(xt.reshape(shape), TIMES).mean.flatten(1)
    torch.testing.assert_close(mean, other.mean, rtol=1e-9, atol=1e-7)


def test_blocks_of_rows_and_queries_do_not_matter(smoothing, monkeypatch):
    oracle = SmoothedOracle(smoothing.bank, LinearPath(), smoothing)
    t = torch.linspace(0.05, 0.95, 40).double()
    xt, _, source = queries(smoothing, LinearPath(), t)
    y = smoothing.bank.labels_of(source.tolist())
    whole = [oracle.posterior(xt, t, names, source=source, k=2) for names in (None, y)]
    for name, number in (("_LOGITS", 500), ("_TURNED", 64), ("_GATHER", 700)):
        monkeypatch.setattr(f"stagewise.smoothed_oracle.{name}", number)
    again = SmoothedOracle(smoothing.bank, LinearPath(), smoothing)
    for one, names in zip(whole, (None, y), strict=True):
        other = again.posterior(xt, t, names, source=source, k=2)
        for name in ("mean", "log_evidence", "entropy", "ess", "weights", "source_weight"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_no_smoothing_is_the_plain_oracle(bank, path):
    smoothing = Smoothing(bank, 3, 0.0, progress=False)
    t = TIMES[1:]
    xt, x1, source = queries(smoothing, path, t)
    assert torch.equal(x1, bank.take(source))
    plain, oracle = Oracle(bank, path, Exact("float64")), SmoothedOracle(bank, path, smoothing)
    source[0] = -1
    y = [None, *bank.labels_of(source[1:].tolist())]
    for names in (None, y):
        expected = plain.posterior(xt, t, names, source=source, k=3)
        post = oracle.posterior(xt, t, names, source=source, k=3)
        for name in ("mean", "log_evidence", "entropy", "ess", "weights", "source_weight"):
            one, other = getattr(post, name), getattr(expected, name)
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, equal_nan=True)
        one, other = (o.velocity(xt, t, names) for o in (oracle, plain))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_without_strength_it_is_the_plain_engine_to_the_last_bit():
    bank = LatentBank(samples(120), labels(120))
    smoothing = Smoothing(bank, 8, progress=False)
    oracle = SmoothedOracle(bank, LinearPath(), smoothing, boundary=0.6)
    t = torch.linspace(0.1, 0.5, 20)
    xt, _, source = queries(smoothing, LinearPath(), t.double())
    for names in (None, bank.labels_of(source.tolist())):
        one = oracle.posterior(xt, t, names, source=source, k=2)
        two = Oracle(bank, LinearPath()).posterior(xt, t, names, source=source, k=2)
        for name in ("mean", "log_evidence", "entropy", "ess", "weights", "rows", "source_weight"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_strength_that_depends_on_t(smoothing, path):
    bank, t = smoothing.bank, TIMES[1:]
    xt, x1, source = queries(smoothing, path, t)
    y = [None, *bank.labels_of(source[1:].tolist())]
    plain, whole = Oracle(bank, path), SmoothedOracle(bank, path, smoothing)
    half = SmoothedOracle(bank, path, smoothing.with_scale(0.4, 0.05))
    options = {"boundary": 0.5}, {"strength": lambda t: 0.5 + 0 * t}
    cut, constant = (SmoothedOracle(bank, path, smoothing, **option) for option in options)
    for names in (None, y):
        early, late = cut.correction(xt, t, x1, names).split([2, 3])
        few = None if names is None else names[:2]
        assert torch.equal(early, plain.correction(xt[:2], t[:2], x1[:2], few))
        torch.testing.assert_close(late, whole.correction(xt, t, x1, names)[2:])
        one, two = (o.posterior(xt, t, names) for o in (constant, half))
        torch.testing.assert_close(one.mean, two.mean)
        torch.testing.assert_close(one.log_evidence, two.log_evidence)
    curves = [StageCurve.measure(oracle).values for oracle in (constant, half)]
    torch.testing.assert_close(*curves)
    with pytest.raises(ValueError, match="got both"):
        SmoothedOracle(bank, path, smoothing, boundary=0.5, strength=lambda t: t)


def test_the_source_of_another_class_has_no_weight(smoothing):
    bank, t = smoothing.bank, torch.tensor([0.3]).double()
    xt, _, source = queries(smoothing, LinearPath(), t)
    other = (bank.labels_of(source.tolist())[0] + 1) % 2
    post = SmoothedOracle(bank, LinearPath(), smoothing).posterior(xt, t, [other], source=source)
    assert post.source_weight.tolist() == [0]


# --- What is trained on --------------------------------------------------------------------------


@pytest.mark.parametrize("class_wise", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mixing_is_unbiased_for_the_smoothed_set(class_wise):
    """A frozen model's loss and gradient have the same expectation; those of rows have not."""
    x = samples(30, 5)
    y = labels(30) if class_wise else None
    bank = LatentBank(x, y)
    smoothing, count, path = Smoothing(bank, 4, 1.0, 0.1, progress=False), 40_000, LinearPath()
    oracle = SmoothedOracle(bank, path, smoothing)
    source = torch.randint(30, (count,), generator=draws(1))
    x0 = torch.randn(count, 5, generator=draws(2))
    x1 = smoothing.draw(bank.rows[source], source, generator=draws(3))
    names = bank.labels_of(source.tolist()) if class_wise else None
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    for time in (0.4, 0.7):
        t = torch.full((count,), time)
        xt, u = path.interpolate(x0, x1, t), x1 - x0
        scheme = Scheme(oracle, target=Mix(), class_wise=class_wise)
        target, _ = scheme(u, xt=xt, t=t, x1=x1, source=source, labels=names)
        torch.testing.assert_close(target, oracle.velocity(xt, t, names), rtol=1e-4, atol=1e-4)
        assert not scheme.last.inserted.any()
        raw = Oracle(bank, path).velocity(xt, t, names)
        with torch.no_grad():
            tests = torch.stack([model(xt), xt, target, torch.ones_like(xt), xt.square()])

        def biased(target, tests=tests, u=u):
            product = ((target - u) * tests).sum(2).double()
            return (product.mean(1) / product.std(1) * math.sqrt(count)).abs().max()

        assert biased(target) < 4.5
        assert biased(raw) > 6
        variance = [(v - tests[0]).square().sum(1).mean() for v in (target, u)]
        assert variance[0] < variance[1]


@pytest.mark.filterwarnings("error")
def test_a_scheme_with_a_cut_needs_no_source_and_warns_of_nothing(smoothing):
    bank, path = smoothing.bank, LinearPath()
    oracle = SmoothedOracle(bank, path, smoothing, boundary=0.5)
    source, t = torch.randint(60, (64,), generator=draws(1)), torch.rand(64, generator=draws(2))
    x1 = smoothing.draw(bank.rows[source], source, t=t, boundary=0.5, generator=draws(3))
    x0 = torch.randn(64, 12, generator=draws(4))
    xt, names = path.interpolate(x0, x1, t), bank.labels_of(source.tolist())
    for options, labels in (({}, names), ({"class_wise": False}, None)):
        scheme = Scheme(oracle, target=Mix(), **options)
        target, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1, labels=labels)
        torch.testing.assert_close(target, oracle.velocity(xt, t, labels), rtol=1e-4, atol=1e-4)


def test_measuring_the_stages(bank):
    # To no effect the curve is that of the rows.
    none = Smoothing(bank, 4, 0.0, progress=False)
    plain = StageCurve.measure(Oracle(bank, LinearPath(), Exact("float64")))
    curve = StageCurve.measure(SmoothedOracle(bank, LinearPath(), none))
    torch.testing.assert_close(curve.values, plain.values, rtol=1e-4, atol=1e-4)
    # Gaussians overlap: the largest weight is smaller, and targets keep a noise until the end.
    oracle = SmoothedOracle(bank, LinearPath(), none.with_scale(1.0, 0.1))
    smoothed = StageCurve.measure(oracle)
    late = smoothed.times > 0.6
    assert (smoothed.mean("top1") < plain.mean("top1"))[late].all()
    difference = [c.mean("target_difference")[late].mean() for c in (smoothed, plain)]
    assert difference[0] > 2 * difference[1]
    again = StageCurve.measure(oracle, batch_size=17)
    torch.testing.assert_close(again.values, smoothed.values)
    halves = [StageCurve.measure(oracle, rank=r, world_size=2).values for r in (0, 1)]
    torch.testing.assert_close(sum(halves), smoothed.values)
    assert Scheme(oracle, target=Mix("boundary")).measure_boundary().midpoint > 0


# --- Draws ---------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_rows_that_differ(smoothing):
    a, bank = factors(smoothing), smoothing.bank
    assert smoothing.index.dtype == torch.int32
    x = bank.take(torch.arange(60))
    own = (x[smoothing.index.long()] - x[:, None]) * smoothing.scale / 2
    torch.testing.assert_close(own, a)


def test_copies_of_a_row_are_not_its_neighbours():
    x = samples(40)[4:]
    one = Smoothing(LatentBank(x), 4, progress=False)
    twice = Smoothing(LatentBank(torch.cat([x, x[:1], x[:1]])), 4, progress=False)
    z, source = torch.randn(1, 4, generator=draws()), torch.tensor([0])
    assert torch.equal(one.moved(x[:1], source, z), twice.moved(x[:1], source, z))
    # The whole set twice, with twice the neighbours, is the set.
    two = Smoothing(LatentBank(torch.cat([x, x])), 8, progress=False)
    a, b = factors(one), factors(two)[:36]
    torch.testing.assert_close(a.mT @ a, b.mT @ b)
    oracles = [SmoothedOracle(s.bank, LinearPath(), s) for s in (one, two)]
    t = TIMES[1:]
    xt, _, _ = queries(one, LinearPath(), t)
    torch.testing.assert_close(*(oracle.velocity(xt, t) for oracle in oracles))


@pytest.mark.parametrize(("row", "class_wise"), [(0, False), (7, True), (30, True)])
def test_covariance_of_draws(bank, class_wise, row):
    smoothing = Smoothing(bank, 40, 0.8, 0.3, class_wise=class_wise, progress=False)
    source = torch.full((50_000,), row)
    x = smoothing.draw(bank.rows[source], source, generator=draws(row))
    a = factors(smoothing)[row]
    covariance = a.T @ a + 0.09 * torch.eye(12)
    gap = x.double() - bank.take(torch.tensor(row))
    scale = covariance.diagonal().sqrt()
    error = (gap.T @ gap / len(gap) - covariance) / (scale[:, None] * scale)
    assert error.abs().max() < 6 * math.sqrt(2 / len(gap))
    assert ((gap.mean(0) / scale).abs() < 5 / math.sqrt(len(gap))).all()


def test_a_class_of_one_row_has_no_neighbours_of_its_own(bank, recwarn):
    smoothing = Smoothing(bank, 8, class_wise=True, progress=False)
    row = torch.tensor([bank.segment(2).start])
    assert torch.equal(smoothing.draw(bank.rows[row], row), bank.rows[row])
    assert not recwarn.list  # other rows have neighbours


@pytest.mark.parametrize(
    ("x", "y", "class_wise", "why"),
    [
        (torch.ones(20, 3), None, False, "all rows are equal"),
        (torch.ones(20, 3), torch.zeros(20).long(), True, "all rows are equal"),
        (samples(20), torch.arange(20), True, "no class has rows that differ .class_wise=False"),
    ],
)
def test_a_warning_where_no_row_has_a_neighbour(tmp_path, x, y, class_wise, why):
    bank = LatentBank(x, y)
    for _ in range(2):  # also where they are read from a file
        with pytest.warns(UserWarning, match=f"no row has a neighbour, since {why}") as caught:
            Smoothing.cached(tmp_path / "n", bank, class_wise=class_wise, progress=False)
        assert len(caught) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_rows_before_the_boundary_are_left_to_the_last_bit(smoothing, dtype):
    t, source = torch.linspace(0, 1, 50), torch.arange(50)
    x1 = smoothing.bank.rows[source].to(dtype)
    x1[:, 0] = -0.0
    before = x1.clone()
    measured = StageBoundary(0.2, 0.1, 0.3, 0.5, 0.4, 0.6, 0.95)
    for boundary in (0.5, measured):
        x = smoothing.draw(x1, source, t=t, boundary=boundary)
        assert x.dtype == dtype
        early = t < 0.5
        assert torch.equal(x[early].view(torch.uint8), x1[early].view(torch.uint8))
        assert (x[~early] != x1[~early]).any(1).all()
    assert torch.equal(x1, before)
    assert torch.equal(smoothing.draw(x1, source, t=t, boundary=math.nan), x1)
    assert torch.equal(smoothing.draw(x1, source, t=0.4, boundary=0.5), x1)


def test_a_ramp(smoothing):
    source, t = torch.arange(60), torch.linspace(0, 1, 60)
    x1 = smoothing.bank.rows
    full, half = (
        smoothing.draw(x1, source, t=t, strength=ramp, generator=draws(1))
        for ramp in (torch.ones_like, lambda t: t)
    )
    torch.testing.assert_close(half - x1, t[:, None] * (full - x1), rtol=1e-4, atol=1e-5)
    assert torch.equal(half[0], x1[0])


def test_draws_are_decided_by_the_generator(smoothing):
    source, x1 = torch.arange(60), smoothing.bank.rows
    one, two = (smoothing.draw(x1, source, generator=draws(4)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, smoothing.draw(x1, source, generator=draws(5)))
    state = torch.get_rng_state()
    smoothing.draw(x1, source, generator=draws(4))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(one, smoothing.draw(x1))  # looked up; of copies any will do
    assert copy.deepcopy(smoothing) is smoothing


def test_16_bit_rows_and_samples_of_other_types():
    bank = LatentBank(samples() + 5, dtype=torch.bfloat16)
    wide = LatentBank(bank.take(torch.arange(60)))
    source, z = torch.arange(60), torch.randn(60, 4, generator=draws())
    one, two = (Smoothing(b, 4, progress=False) for b in (bank, wide))
    x1 = wide.rows
    expected = x1 + torch.einsum("nk,nkd->nd", z.double(), factors(two))
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        for smoothing in (one, two):
            x = smoothing.moved(x1.to(dtype), source, z)
            assert x.dtype == dtype
            torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance)


def test_rows_in_a_file(smoothing, tmp_path):
    smoothing.bank.save(tmp_path / "bank.safetensors")
    there = LatentBank.open(tmp_path / "bank.safetensors")
    same = Smoothing(there, 4, 0.8, 0.1, progress=False)
    x1, source = smoothing.bank.rows[:9], torch.arange(9)
    one, two = (s.draw(x1, source, generator=draws()) for s in (smoothing, same))
    assert torch.equal(one, two)
    t = torch.linspace(0.1, 0.9, 9)
    one, two = (
        SmoothedOracle(s.bank, LinearPath(), s).velocity(x1, t, [0] * 9) for s in (smoothing, same)
    )
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("residency", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_on_a_device(smoothing, residency, dtype, monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        here = Smoothing.__new__(Smoothing)
        here.__dict__.update(smoothing.__dict__, bank=smoothing.bank.to(residency), _moved={})
        x1 = torch.randn(5, 12, device="cuda", dtype=dtype)
        source, t = torch.arange(5, device=residency).clone(), torch.rand(5, device="cuda")
        if residency == "cpu":
            # Reads values, which fake tensors have not.
            monkeypatch.setattr("stagewise.smoothing.rows_of", lambda bank, x1, source: source)
        for options in ({}, {"boundary": 0.5}, {"strength": lambda t: t}):
            x = here.draw(x1, source, t=t, **options)
            assert (x.device.type, x.dtype, x.shape) == ("cuda", dtype, x1.shape)


# --- Neighbours in a file -----------------------------------------------------------------------


@pytest.mark.parametrize("class_wise", [False, True])
def test_features_stand_in_the_order_of_the_data(class_wise):
    x, y = samples(), labels()
    line = torch.randperm(60, generator=draws(3))
    bank = LatentBank(x, y)
    smoothing = Smoothing(bank, 2, features=line[:, None], class_wise=class_wise, progress=False)
    own = line[bank.index]
    near = own[smoothing.index.long()]
    gaps = (own[:, None] - own).abs().double()
    gaps.fill_diagonal_(math.inf)
    if class_wise:
        names = y[bank.index]
        gaps[names[:, None] != names] = math.inf
    expected = gaps.topk(2, largest=False).values
    found = (near - own[:, None]).abs().double()
    there = expected.isfinite()
    torch.testing.assert_close(found[there], expected[there])
    assert (found[~there] == 0).all()


@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("tags", [False, True])
def test_features_give_the_distance_and_rows_the_duplicates(tags, class_wise):
    x, y = samples(), labels()  # row 1 stands three times
    features = torch.randn(60, 3, generator=draws(4))
    features[2] = features[1] + 1e-3
    if tags:
        features = torch.nn.functional.one_hot(torch.arange(60) % 4, 4).float()
    bank = LatentBank(x, y)
    smoothing = Smoothing(bank, 20, features=features, class_wise=class_wise, progress=False)
    x, y, own = x[bank.index], y[bank.index], features[bank.index].double()
    gaps = torch.linalg.vector_norm(own[:, None] - own, dim=2)
    wrong = (x[:, None] == x).all(2) | (class_wise & (y[:, None] != y))
    expected = gaps.masked_fill(wrong, math.inf).topk(20, largest=False).values
    near, row = smoothing.index.long(), torch.arange(60)[:, None]
    there = near != row
    assert torch.equal(there, expected.isfinite())
    torch.testing.assert_close(gaps[row, near][there], expected[there])
    assert not wrong[row, near][there].any()
    ordered = near.sort(dim=1).values  # each neighbour once
    assert ((ordered.diff(dim=1) > 0) | (ordered[:, 1:] == row)).all()


def test_cached(bank, tmp_path, monkeypatch, recwarn):
    file = tmp_path / "smoothing.safetensors"
    made = Smoothing.cached(file, bank, 4, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr("stagewise.smoothing.nearest_others", None)  # nothing is searched
        read = Smoothing.cached(file, bank, 4, 0.5, 0.1)
    assert torch.equal(read.index, made.index)
    assert (read.scale, read.floor, read.neighbours) == (0.5, 0.1, 4)
    assert not recwarn.list
    features = torch.randn(60, 2, generator=draws(8))
    for options in ({"neighbours": 5}, {"class_wise": True}, {"features": features}):
        with pytest.warns(UserWarning, match="smoothing in .* belongs to other settings"):
            again = Smoothing.cached(file, bank, **{"neighbours": 4, **options}, progress=False)
        recwarn.clear()
        again = Smoothing.cached(file, bank, **{"neighbours": 4, **options}, progress=False)
        assert not recwarn.list
        again.save(tmp_path / "other.safetensors")
        with (
            safe_open(tmp_path / "other.safetensors", "pt") as one,
            safe_open(file, "pt") as two,
        ):
            assert one.metadata() == two.metadata()
            assert torch.equal(one.get_tensor("index"), two.get_tensor("index"))
    other = LatentBank(samples(seed=5))
    with pytest.warns(UserWarning, match="smoothing in .* belongs to other latents"):
        Smoothing.cached(file, other, 4, progress=False)
    bank.save(file)
    with pytest.raises(ValueError, match="Expected a smoothing in .*, got another file"):
        Smoothing.cached(file, bank, 4)


def test_a_folder_that_is_missing_is_told_before_the_search(bank, tmp_path, monkeypatch):
    monkeypatch.setattr("stagewise.smoothing.nearest_others", None)
    with pytest.raises(FileNotFoundError, match=r"folder for the smoothing.*os.makedirs\('.*no'\)"):
        Smoothing.cached(tmp_path / "no" / "file", bank)


def test_numbers_of_other_libraries(bank, tmp_path):
    half, small = np.float32(0.5), torch.tensor(0.0625)
    made = Smoothing.cached(tmp_path / "n", bank, np.int64(8), half, small, progress=False)
    assert repr(made) == "Smoothing(8 neighbours, scale=0.5, floor=0.0625)"
    assert repr(made.with_scale(small, half)) == "Smoothing(8 neighbours, scale=0.0625, floor=0.5)"
    assert Smoothing(bank, torch.tensor(8), progress=False).neighbours == 8


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 60}, "`neighbours` from 1 to 59.*got 60: Smoothing.bank, neighbours=8"),
        ({"neighbours": 0}, "`neighbours` from 1 to 59.*got 0"),
        ({"scale": -1.0}, "`scale` of at least 0, got -1.0"),
        ({"floor": math.nan}, "`floor` of at least 0, got nan"),
        ({"scale": "1"}, "`scale` of at least 0, got '1'"),
        ({"scale": None}, "`scale` of at least 0, got None"),
        ({"scale": torch.ones(2)}, "`scale` of at least 0, got tensor"),
        ({"features": torch.zeros(59, 2)}, r"`features` with shape \(60, F\).*got \(59, 2\)"),
        ({"features": torch.zeros(60)}, r"`features` with shape \(60, F\).*got \(60,\)"),
        (
            {"features": torch.ones(60, 2).index_fill(0, torch.tensor([7, 9]), math.nan)},
            r"`features`, got NaN or Inf in 2 of 60 lines, the first 7.*features=features\[keep\]",
        ),
    ],
)
def test_settings_that_are_refused(bank, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Smoothing(bank, **options, progress=False)
    with pytest.raises(ValueError, match=message):
        Smoothing.cached(tmp_path / "file", bank, **options)


def test_what_is_no_bank_no_label_no_number(bank):
    with pytest.raises(TypeError, match=r"Expected a LatentBank.*Tensor.*LatentBank\(x\)"):
        Smoothing(bank.rows)
    for wrong in (0.5, "8", True):
        with pytest.raises(TypeError, match=f"whole number, got {wrong!r}: Smoothing"):
            Smoothing(bank, wrong)
    with pytest.raises(ValueError, match="bank with labels"):
        Smoothing(LatentBank(samples()), class_wise=True)
    with pytest.raises(TypeError, match="Expected a Smoothing, got float"):
        SmoothedOracle(bank, LinearPath(), 0.5)
    with pytest.raises(TypeError, match="`features` to be a tensor, got list"):
        Smoothing(bank, features=[1, 2])


def test_draws_that_are_refused(smoothing):
    x1, t = smoothing.bank.rows[:4], torch.rand(4)
    source = torch.arange(4)

    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            smoothing.draw(*args, **options)

    refused("rows of the bank, or the `source` of each.* got 4 of 4.*keeps its order", x1 + 1)
    refused("from 0 to 59.*got 1 of 4 .*the first 60", x1, source + 57)
    refused("from 0 to 59.*the first -1", x1, source - 1)
    refused("integer `source` with shape", x1, source[:2])
    refused("near the rows.*times as far.*argsort", x1, source + 40)
    for wrong in (source.float(), source > 1):
        refused("integer `source` with shape.*source=bank.find.x1", x1, wrong)
    refused(r"`x1` with shape \('B', 12\)", x1[:, :3], source)
    refused("times `t`.*draw.x1, source, t=t, boundary=0.5", x1, source, boundary=0.5)
    refused("times `t`", x1, source, strength=lambda t: t)
    refused("got both", x1, source, t=t, boundary=0.5, strength=lambda t: t)
    for wrong in (-0.1, 1.5, "late"):
        refused(r"`boundary` in \[0, 1\].*got .*draw.x1, source", x1, source, t=t, boundary=wrong)
    refused(r"in \[0, 1\], got values.*Clamp it", x1, source, t=t, strength=lambda t: t + 1)
    refused("`strength` to give a tensor of shape", x1, source, t=t, strength=lambda t: t[:, None])
    refused(r"`t` with shape \(4,\)", x1, source, t=t[:2], boundary=0.5)
    refused(r"t. in \[0, 1\]", x1, source, t=t + 1, boundary=0.5)
    with pytest.raises(TypeError, match="`source` to be a tensor"):
        smoothing.draw(x1, [0, 1, 2, 3])


def test_a_source_is_checked_after_draws_that_looked_it_up(smoothing):
    x1 = smoothing.bank.rows[:4]
    smoothing.draw(x1)
    with pytest.raises(ValueError, match="near the rows"):
        smoothing.draw(x1, torch.arange(40, 44))


def test_oracles_that_are_refused(smoothing):
    bank = smoothing.bank
    other = LatentBank(samples(seed=5))
    with pytest.raises(ValueError, match=r"bank of the smoothing.*Smoothing\(bank\)"):
        SmoothedOracle(other, LinearPath(), smoothing)
    with pytest.raises(ValueError, match="bank of the smoothing"):
        smoothing.check(Oracle(other))
    with pytest.raises(
        ValueError, match=r"one smoothing, got two.*Oracle\(oracle\.bank, oracle\.path\)"
    ):
        smoothing.check(SmoothedOracle(bank, LinearPath(), smoothing.with_scale(0.5)))
    with pytest.raises(ValueError, match="got Sharded.*LatentBank.open"):
        smoothing.check(Oracle(bank, engine=Sharded()))
    with pytest.raises(ValueError, match="`scale` of at least 0"):
        smoothing.with_scale(-1)
    oracle = SmoothedOracle(bank, LinearPath(), smoothing)
    for fits in (oracle, Oracle(bank)):
        smoothing.check(fits)
    with pytest.raises(ValueError, match="Use Mix, or the plain Oracle"):
        Scheme(oracle, target=ReferenceSet(4), boundary=0.5).check()
