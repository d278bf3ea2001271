"""Targets against brute force in float64, and what is and is not unbiased."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise import (
    Certificate,
    Concentration,
    CosinePath,
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    Prediction,
    ReferenceSet,
    Scheme,
    Smooth,
    VPPath,
    mix_target,
    targets,
)
from stagewise.engines import Exact, Sharded
from stagewise.lambdas import Lambda

N, DIM, CLASSES = 24, 3, 3
BOUNDARY = 0.45


def rows(n=N, dim=DIM, seed=0):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def names(n=N):
    return torch.arange(n) % CLASSES


def make_bank(labels=False):
    return LatentBank(rows(), names() if labels else None)


def noisy(x1, t, path, seed=1):
    x0 = torch.randn(x1.shape, dtype=x1.dtype, generator=torch.Generator().manual_seed(seed))
    return x0, path.interpolate(x0, x1, t)


def softmax_mean(x, xt, t, path):
    """The posterior mean over `x` for one query, and its weights."""
    alpha, sigma, *_ = path(t)
    logits = -(xt - alpha * x).square().sum(1) / (2 * sigma**2)
    weights = logits.softmax(0)
    return weights @ x, weights


def brute_correction(sets, xt, t, x1, path, kind="velocity"):
    """`c_t (m - x_1)` for each query over its own set of rows."""
    c, _ = Prediction(kind).coefficients(path(t))
    means = [
        softmax_mean(x, *query, path)[0]
        for x, query in zip(sets, zip(xt, t, strict=True), strict=True)
    ]
    return c[:, None] * (torch.stack(means) - x1)


@pytest.fixture
def batch():
    t = torch.linspace(0.02, 0.93, N, dtype=torch.float64)
    return t, rows()


# -- each target is its formula -------------------------------------------------------------------


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath()], ids=repr)
@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "edm"])
def test_mix_is_the_oracle(path, kind, batch):
    t, x1 = batch
    x0, xt = noisy(x1, t, path)
    scheme = Scheme(Oracle(make_bank(), path), target=Mix())
    y = Prediction(kind).target(path(t), x0, x1)
    target, weight = scheme(y, xt=xt, t=t, x1=x1, prediction=kind)
    expected = y + brute_correction([x1] * N, xt, t, x1, path, kind)
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)
    assert weight.tolist() == [1] * N
    assert not scheme.last.inserted.any()


@pytest.mark.parametrize("wise", [False, True])
def test_all_kinds_of_sets(wise, batch):
    t, x1 = batch
    path, labels = LinearPath(), names()
    _, xt = noisy(x1, t, path)
    own = [labels == label if wise else torch.ones(N, dtype=torch.bool) for label in labels]
    oracle = Oracle(make_bank(labels=True), path)
    cases = [
        (Mix(), own),
        # Of so many random rows none is left out.
        (ReferenceSet(N), own),
        (ReferenceSet(N, shared=True), own),
    ]
    for target, kept in cases:
        scheme = Scheme(oracle, target=target, class_wise=wise)
        scheme.check()
        found = scheme.correct(xt=xt, t=t, x1=x1)
        sets = [x1[keep] for keep in kept]
        expected = brute_correction(sets, xt, t, x1, path)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def lambda_of(lam, t, top1, path):
    if lam == "boundary":
        return (t < BOUNDARY).double()
    if isinstance(lam, Smooth):
        edge = 2 * math.log(BOUNDARY / (1 - BOUNDARY))
        return 1 / (1 + torch.exp((2 * torch.log(t / (1 - t)) - edge) / lam.width))
    if isinstance(lam, Concentration):
        return 1 - top1
    return torch.full_like(t, lam)


LAMBDAS = [0.0, 0.35, 1.0, "boundary", Smooth(0.7), Concentration()]


@pytest.mark.parametrize("lam", LAMBDAS, ids=repr)
def test_lambdas(lam, batch):
    t, x1 = batch
    path = LinearPath()
    x0, xt = noisy(x1, t, path)
    scheme = Scheme(Oracle(make_bank(), path), target=Mix(lam), boundary=BOUNDARY)
    target, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1)
    posts = [softmax_mean(x1, xt[i], t[i], path) for i in range(N)]
    top1 = torch.stack([weights.max() for _, weights in posts])
    correction = torch.stack([mean for mean, _ in posts]) - x1
    expected = lambda_of(lam, t, top1, path)
    torch.testing.assert_close(scheme.last.lam, expected, rtol=1e-9, atol=1e-9)
    added = expected[:, None] * correction / (1 - t)[:, None]
    torch.testing.assert_close(target, x1 - x0 + added, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        scheme.last.added.double().square().flatten(1).mean(1), added.square().mean(1)
    )
    for whole in (1, 1.0, torch.tensor(1.0)):
        assert torch.equal(mix_target(x1 - x0, added, whole), x1 - x0 + added)
    half = mix_target(x1 - x0, added, torch.full_like(t, 0.5))
    torch.testing.assert_close(half, x1 - x0 + added / 2)


def test_lambda_at_the_ends_of_time():
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for path in (LinearPath(), CosinePath()):
        assert Smooth(2.0)(t, None, path, 0.3).tolist() == [1, 0]
    bank = make_bank()
    x1 = rows()[:2]
    x0, xt = noisy(x1, t, LinearPath())
    for lam in LAMBDAS:
        target = Mix(lam)
        scheme = Scheme(Oracle(bank), target=target, boundary=BOUNDARY)
        u, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1)
        assert u.isfinite().all()
        assert torch.equal(u[1], (x1 - x0)[1])  # collapsed on x_1, whatever 1 / (1 - t) is


@given(shift=st.floats(-3, 3), width=st.floats(0.05, 5))
@settings(max_examples=30, deadline=None)
def test_smooth_is_about_the_signal_to_noise_ratio(shift, width):
    """Two paths have the same lambda where they have the same SNR."""
    linear, cosine = LinearPath(), CosinePath()
    rho = torch.exp(torch.linspace(-3, 3, 7, dtype=torch.float64))
    edge = math.exp(shift / 2)
    found = [
        Smooth(width)(t, None, path, b)
        for path, t, b in (
            (linear, rho / (1 + rho), edge / (1 + edge)),
            (cosine, torch.atan(rho) * 2 / math.pi, math.atan(edge) * 2 / math.pi),
        )
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


# -- x_1 that is no row ---------------------------------------------------------------------------


def others_of(x1, count):
    return rows(count + len(x1), seed=0)[len(x1) :]


@pytest.mark.parametrize("lam", [1.0, Concentration()], ids=repr)
def test_self_insertion_equals_a_bank_that_holds_the_row(lam, batch):
    t, x1 = batch
    t, x1, path = t[::4], x1[::4], LinearPath()
    without = torch.cat([rows()[i : i + 1] for i in range(N) if i % 4])
    x0, xt = noisy(x1, t, path)
    for i in range(len(x1)):
        one = slice(i, i + 1)
        call = dict(xt=xt[one], t=t[one], x1=x1[one])
        inserted = Scheme(Oracle(LatentBank(without), path), target=Mix(lam))
        u, _ = inserted((x1 - x0)[one], **call)
        full = LatentBank(torch.cat([without, x1[one]]))
        held = Scheme(Oracle(full, path), target=Mix(lam))
        expected, _ = held((x1 - x0)[one], **call)
        torch.testing.assert_close(u, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(inserted.last.lam, held.last.lam, rtol=1e-10, atol=1e-10)
        assert inserted.last.inserted.all()
        assert not held.last.inserted.any()


@pytest.mark.parametrize("std", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("lam", [1.0, Concentration()], ids=repr)
@pytest.mark.parametrize("size", [None, N])
def test_a_resampled_twin_takes_the_place_of_its_row(std, lam, size, batch):
    t, stored = batch
    path = LinearPath()
    twin = stored + std * rows(seed=7)
    x0, xt = noisy(twin, t, path)
    target = Mix(lam) if size is None else ReferenceSet(size, lam)
    scheme = Scheme(Oracle(make_bank(), path), target=target)
    scheme.rows_checked = True  # so far off no twin is
    u, _ = scheme(twin - x0, xt=xt, t=t, x1=twin, source=torch.arange(N))
    for i in range(N):
        replaced = stored.clone()
        replaced[i] = twin[i]
        mean, weights = softmax_mean(replaced, xt[i], t[i], path)
        own = 1.0 if lam == 1.0 else float(1 - weights.max())
        added = own * (mean - twin[i]) / (1 - t[i])
        torch.testing.assert_close(u[i], (twin - x0)[i] + added, rtol=1e-8, atol=1e-8)
        assert float(scheme.last.lam[i]) == pytest.approx(own, abs=1e-9)
    assert scheme.last.inserted.all()


def test_a_twin_replaced_needs_no_certificate_of_its_row():
    """A certificate speaks of queries made from the stored row, not from its twin."""
    stored = 4 * rows()
    bank = LatentBank(stored)
    certificate = Certificate.compute(bank, progress=False)
    twin, t = stored + 1.5 * rows(seed=7), torch.full((N,), 0.8, dtype=torch.float64)
    x0, xt = noisy(twin, t, LinearPath())
    plain, certified = (
        Scheme(Oracle(bank, certificate=c), target=Mix()) for c in (None, certificate)
    )
    call = dict(xt=xt, t=t, x1=twin, source=torch.arange(N))
    torch.testing.assert_close(plain.correct(**call), certified.correct(**call))


def test_sixteen_bit_banks_do_not_pull_to_the_rounded_row():
    """x_1 stands in the set as it is, so that rounding is not blown up by 1 / (1 - t)."""
    x1 = rows().float()
    bank = LatentBank(x1, dtype=torch.bfloat16)
    t = torch.full((N,), 0.9999)
    x0, xt = noisy(x1, t, LinearPath())
    scheme = Scheme(Oracle(bank), target=Mix())
    added = scheme.correct(xt=xt, t=t, x1=x1)
    assert added.abs().max() < 1e-6
    assert not scheme.last  # `correct` leaves no record
    plain = Oracle(bank).correction(xt, t, x1)
    assert plain.abs().max() > 1


# -- unbiasedness, exactly ------------------------------------------------------------------------


class ReadsTheSource(Lambda):
    """What must be caught: a lambda that depends on which row was the source."""

    def __init__(self):
        self.weight = None

    def __repr__(self):
        return "ReadsTheSource()"  # a name of a test, the same in each process

    def __call__(self, t, top1, path, boundary):
        return 1 - self.weight


class BiasedMix(Mix):
    """Mixing by one minus the weight of the source row."""

    def __init__(self):
        super().__init__()
        self.lam = ReadsTheSource()

    def mean(self, oracle, queries, draws):
        post = oracle.ask(queries)
        self.lam.weight = (queries.log_weight(queries.x1) - post.log_evidence).exp()
        return super().mean(oracle, queries, draws)


def every_source(target, xt, t, path, *, wise=False, draws=1):
    """`E[target | x_t]` less the oracle's, by enumerating sources with their posterior weights.

    With `wise` the class is drawn with its posterior probability, as for label-dropped rows.
    """
    x, n = rows(), N * draws
    scheme = Scheme(Oracle(make_bank(labels=wise), path), target=target, boundary=BOUNDARY)
    mean, weights = softmax_mean(x, xt, t, path)
    scheme._fits = True  # one x_t for all sources is no training batch
    conditional = x - (xt - path(t).alpha * x) / path(t).sigma
    u, _ = scheme(
        conditional.repeat(draws, 1), xt=xt.expand(n, -1), t=t.expand(n), x1=x.repeat(draws, 1)
    )
    return torch.einsum("n,rnd->rd", weights, u.reshape(draws, N, DIM)) - (mean - xt) / (1 - t)


@pytest.mark.parametrize("when", [0.05, 0.3, 0.44, 0.6, 0.8])
@pytest.mark.parametrize("lam", LAMBDAS, ids=repr)
@pytest.mark.parametrize("wise", [False, True])
def test_mixing_leaves_the_conditional_mean(lam, wise, when):
    t, path = torch.tensor(when, dtype=torch.float64), LinearPath()
    xt = when * rows(1, seed=3)[0] + (1 - when) * rows(1, seed=4)[0]
    bias = every_source(Mix(lam), xt, t, path, wise=wise)
    assert bias.abs().max() < 1e-9


def test_bias_is_caught():
    t = torch.tensor(0.4, dtype=torch.float64)
    bias = every_source(BiasedMix(), 0.7 * rows(1, seed=3)[0], t, LinearPath())
    assert bias.abs().max() > 0.01


@pytest.mark.parametrize("lam", [1.0, 0.4, Concentration()], ids=repr)
@pytest.mark.parametrize("shared", [False, True])
def test_random_sets_leave_the_conditional_mean(lam, shared, monkeypatch):
    """All sources and all draws, through the real target with its draws dictated."""
    t, n = torch.tensor(0.35, dtype=torch.float64), 5
    xt, x = 0.5 * rows(1, seed=3)[0], rows(n)
    scheme = Scheme(Oracle(LatentBank(x)), target=ReferenceSet(3, lam, shared=shared))
    _, weights = softmax_mean(x, xt, t, LinearPath())
    x0 = (xt - t * x) / (1 - t)
    total = torch.zeros(DIM, dtype=torch.float64)
    for i in range(n):
        # Two of the others; or any two of all, which may be the source, or the same row twice.
        others = [j for j in range(n) if j != i]
        draws = (
            itertools.combinations(others, 2)
            if shared
            else itertools.product(range(n), [*range(n)])
        )
        draws = list(draws)
        for drawn in draws:
            rng = SimpleNamespace(random=lambda shape, d=drawn: (np.array([d]) + 0.5) / n)
            monkeypatch.setattr(targets.np.random, "default_rng", lambda _, rng=rng: rng)
            monkeypatch.setattr(targets, "draw_rows", lambda *_, d=drawn, i=i: [*d, i])
            u, _ = scheme((x - x0)[i, None], xt=xt[None], t=t[None], x1=x[i, None])
            members = sorted({i, *drawn})
            mean, inner = softmax_mean(x[members], xt, t, LinearPath())
            own = float(1 - inner.max()) if isinstance(lam, Concentration) else lam
            expected = (x[i] - xt + own * (mean - x[i])) / (1 - t)
            torch.testing.assert_close(u[0], expected, rtol=1e-10, atol=1e-10)
            total += weights[i] / len(draws) * u[0]
    torch.testing.assert_close(total, (weights @ x - xt) / (1 - t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_draws_are_random_subsets(shared):
    """Each other row is in a set as often as any, and a source is never drawn as another."""
    n, runs = 6, 600
    x = torch.eye(n, dtype=torch.float64)
    scheme = Scheme(Oracle(LatentBank(x)), target=ReferenceSet(3, shared=shared))
    scheme._fits = True  # no noise at all
    counts = torch.zeros(n, n)
    each = 1 if shared else runs
    for step in range(runs // each):
        scheme.observe(step=step, total=None)
        # At t = 0 all weights are equal: m is the mean of the set.
        x1, zero = x.repeat(each, 1), torch.zeros(n * each, dtype=torch.float64)
        mean = scheme.correct(xt=x1, t=zero, x1=x1, prediction="data") + x1
        member = mean > 1e-9
        assert member.sum(1).max() == 3
        torch.testing.assert_close(mean, member / member.sum(1, keepdim=True).double())
        counts += member.reshape(each, n, n).sum(0)
    assert counts.diagonal().tolist() == [runs] * n
    off = counts[~torch.eye(n, dtype=torch.bool)] / runs
    expected = 2 / 5 if shared else 1 - (5 / 6) ** 2
    assert (off - expected).abs().max() < 4.5 * math.sqrt(0.24 / runs)


# -- unbiasedness, of gradients -------------------------------------------------------------------


def gradients(target, *, wise=False, when, runs=250, size=32, seed=0):
    """Gradients of a frozen random model under a target and the plain one, on the same draws."""
    x, labels, path = rows(), names(), LinearPath()
    scheme = Scheme(
        Oracle(make_bank(labels=wise), path), target=target, boundary=BOUNDARY, class_wise=wise
    )
    scheme.check()
    draws = torch.Generator().manual_seed(seed)
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(DIM + 2, 8), torch.nn.Tanh(), torch.nn.Linear(8, DIM)
    ).double()
    i = torch.randint(N, (runs * size,), generator=draws)
    x0 = torch.randn(runs * size, DIM, dtype=torch.float64, generator=draws)
    low, high = when
    t = low + (high - low) * torch.rand(runs * size, dtype=torch.float64, generator=draws)
    xt = path.interpolate(x0, x[i], t)
    # Queries of a call are independent, unless they share a set: then each batch is a call.
    parts = torch.arange(runs * size).split(size if getattr(target, "shared", False) else len(i))
    steered = torch.cat(
        [
            scheme(
                (x[i] - x0)[at],
                xt=xt[at],
                t=t[at],
                x1=x[i][at],
                labels=labels[i][at] if wise else None,
            )[0]
            for at in parts
        ]
    )
    # A model that sees labels needs class-wise posteriors: others are not its optimum.
    seen = labels[i, None].double() if wise else torch.zeros(len(i), 1, dtype=torch.float64)
    shown = torch.cat([xt, t[:, None], seen], 1)
    weights = dict(net.named_parameters())

    def loss(weights, shown, y):
        return (torch.func.functional_call(net, weights, (shown,)) - y).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    found = []
    for y in (x[i] - x0, steered):
        gradient = each(weights, *(value.unflatten(0, (runs, size)) for value in (shown, y)))
        found.append(torch.cat([part.flatten(1) for part in gradient.values()], 1))
    return found


def z_scores(target, **options):
    """How many standard errors the mean gradients are apart, for each parameter."""
    plain, steered = gradients(target, **options)
    gap = (steered - plain)[:, plain.std(0) > 0]
    return gap.mean(0) / gap.std(0) * math.sqrt(len(gap))


def within_errors(z):
    """Whether all are 0 within 3 standard errors, but for the one in 300 that leaves them."""
    few = (z.abs() > 3).double().mean() <= 0.03 and z.abs().max() < 4
    return bool(few and z.square().mean() < 2)


UNBIASED = [
    *(Mix(lam) for lam in LAMBDAS[1:]),
    ReferenceSet(6),
    ReferenceSet(6, Concentration()),
    ReferenceSet(6, shared=True),
]


@pytest.mark.parametrize("wise", [False, True])
@pytest.mark.parametrize("target", UNBIASED, ids=repr)
def test_mean_gradient_is_the_plain_one(target, wise):
    assert within_errors(z_scores(target, wise=wise, when=(0.0, 0.95)))


def test_a_biased_lambda_is_caught_by_the_same_test():
    z = z_scores(BiasedMix(), when=(0.2, 0.6), runs=500)
    assert not within_errors(z)
    assert z.square().mean() > 4


def variance_ratio(target, when, **options):
    plain, steered = gradients(target, when=when, runs=200, **options)
    return float(steered.var(0).sum() / plain.var(0).sum())


@pytest.mark.parametrize(
    ("target", "bounds"),
    [(Mix(), (0.7, 0.8, 1.001)), (ReferenceSet(6), (0.8, 0.9, 1.001))],
    ids=repr,
)
def test_gradient_variance_is_lower_in_navigation(target, bounds):
    for when, bound in zip([(0.0, 0.1), (0.2, 0.3), (0.9, 0.95)], bounds, strict=True):
        ratio = variance_ratio(target, when)
        print(f"{target!r} at t in {when}: gradient variance x {ratio:.3f}")
        assert ratio < bound


def test_a_small_set_that_a_batch_shares_adds_variance():
    """Its error is common to the batch, so that it does not average out."""
    own, shared = (variance_ratio(ReferenceSet(6, shared=s), (0.0, 0.1)) for s in (False, True))
    assert own < 0.8
    assert shared > 1.1


# -- classes and engines ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", [ReferenceSet(4), Mix()], ids=repr)
def test_a_class_of_one_row(target):
    bank = LatentBank(rows(), torch.cat([torch.tensor([9]), torch.ones(N - 1, dtype=torch.int64)]))
    x1 = rows()[:2]
    t = torch.full((2,), 0.2, dtype=torch.float64)
    _, xt = noisy(x1, t, LinearPath())
    scheme = Scheme(Oracle(bank), target=target)
    found = scheme.correct(xt=xt, t=t, x1=x1, labels=[9, 1])
    assert found[0].abs().max() == 0
    assert found[1].abs().max() > 0


def test_null_labels_look_at_the_whole_bank(batch):
    t, x1 = batch
    _, xt = noisy(x1, t, LinearPath())
    oracle = Oracle(make_bank(labels=True), null_class=99)
    for target in (Mix(), ReferenceSet(N)):
        wise, whole = (Scheme(oracle, target=target, class_wise=c) for c in (True, False))
        dropped = wise.correct(xt=xt, t=t, x1=x1, labels=torch.full((N,), 99))
        torch.testing.assert_close(dropped, whole.correct(xt=xt, t=t, x1=x1))


def test_sharded_banks(batch):
    t, x1 = batch
    _, xt = noisy(x1, t, LinearPath())
    whole = Scheme(Oracle(make_bank(), engine=Exact("float64")), target=Mix())
    shard = Scheme(Oracle(make_bank(), engine=Sharded(Exact("float64"))), target=Mix())
    shard.check()
    call = dict(xt=xt, t=t, x1=x1)
    expected = whole.correct(**call)
    torch.testing.assert_close(shard.correct(**call, source=torch.arange(N)), expected)
    with pytest.raises(ValueError, match="Expected `source` with Sharded"):
        shard.correct(**call)


def test_sharded_banks_are_refused_by_targets_that_read_rows():
    with pytest.raises(ValueError, match=r"needs the rows of the whole bank.*Use Mix"):
        Scheme(Oracle(make_bank(), engine=Sharded()), target=ReferenceSet(4)).check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mix(1.5), r"`lam` in \[0, 1\], got 1.5"),
        (lambda: Mix(-0.1), r"`lam` in \[0, 1\], got -0.1"),
        (lambda: Mix(math.nan), r"`lam` in \[0, 1\], got nan"),
        (lambda: Mix("border"), r"Smooth\(width\) or Concentration\(\), got 'border'"),
        (lambda: Mix(True), "got True"),
        (lambda: mix_target(rows(), rows(), 3.0), r"`lam` in \[0, 1\], got 3.0"),
        (lambda: mix_target(rows(), rows(), -0.1), r"`lam` in \[0, 1\], got -0.1"),
        (lambda: Smooth(0), "`width` above 0"),
        (lambda: ReferenceSet(1), "`size` of at least 2"),
        (
            lambda: Scheme(Oracle(make_bank()), target=ReferenceSet(25)).check(),
            "at most 24.*got 25",
        ),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_generators_are_private():
    """Random rows come from seed, step and call, and no global generator is touched."""
    x1 = rows()
    t = torch.full((N,), 0.2, dtype=torch.float64)
    _, xt = noisy(x1, t, LinearPath())

    def run(seed, step, calls=1):
        scheme = Scheme(Oracle(make_bank()), target=ReferenceSet(4), seed=seed)
        scheme.observe(step=step, total=None)
        return [scheme.correct(xt=xt, t=t, x1=x1) for _ in range(calls)][-1]

    states = torch.get_rng_state(), random.getstate()
    assert torch.equal(run(0, 5), run(0, 5))
    assert not torch.equal(run(0, 5), run(0, 6))
    assert not torch.equal(run(0, 5), run(1, 5))
    assert not torch.equal(run(0, 5, calls=2), run(0, 5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
