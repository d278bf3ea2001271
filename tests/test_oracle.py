"""The oracle against a float64 brute force, exact cases, and properties it must have."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise import (
    CosinePath,
    EDMPath,
    LatentBank,
    LinearPath,
    Oracle,
    Prediction,
    VPPath,
    merge,
)
from stagewise.engines import Exact
from stagewise.queries import Queries

PATHS = [LinearPath(), CosinePath(), VPPath(), EDMPath()]
PREDICTIONS = ["velocity", "data", "noise", "score", "edm"]
TIMES = [0, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 0.99, 0.999]


def brute_force(bank, xt, t, path):
    """Posterior mean and weights in float64 from explicit differences."""
    x = bank.rows.double()
    alpha, sigma, *_ = path(t.double())
    asked = zip(xt.double(), alpha, strict=True)
    distance = torch.stack([(one - a * x).square_().sum(1) for one, a in asked])
    weights = torch.softmax(-distance / (2 * sigma[:, None] ** 2), dim=1)
    return weights @ x, weights


@cache
def make_bank(dim, n=150, seed=0, shift=0.0):
    """Rows with an exact duplicate, a near duplicate 1e-3 apart, and a cluster of such."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator) + shift
    x[1] = x[0]
    step = torch.randn(40, dim, generator=generator)
    x[3] = x[2] + 1e-3 * step[0] / step[0].norm()
    x[10:40] = x[4] + 1e-3 * step[10:40] / step[10:40].norm(dim=1, keepdim=True)
    # Twins of the first rows at the far end, so that they lie in different chunks.
    x[n - 10 : n - 5] = x[:5]
    x[n - 5 : n] = x[:5] + 1e-3 * step[:5] / step[:5].norm(dim=1, keepdim=True)
    return LatentBank(x)


def queries(bank, path, t, rows, seed=1):
    x1 = bank.rows[rows]
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(len(x1)) + t
    return path.interpolate(x0, x1, times), times, x0, x1


@pytest.mark.parametrize(
    ("dim", "shift"), [(2, 0.0), (2, 5.0), (64, 0.0), (768, 5.0), (4096, 0.0), (4096, 5.0)]
)
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_mean_and_correction_equal_brute_force(path, dim, shift):
    bank, t = make_bank(dim, shift=shift), torch.tensor(TIMES).repeat_interleave(8)
    xt, times, x0, x1 = queries(bank, path, t, [0, 1, 2, 3, 4, 15, 60, 149] * len(TIMES))
    mean, _ = brute_force(bank, xt, times, path)
    oracle = Oracle(bank, path, Exact(chunk_size=50))
    got = oracle.posterior(xt, times).mean
    assert ((got - mean).norm(dim=1) / mean.norm(dim=1)).max() < 1e-5
    coefficients = path(times.double())
    for kind in PREDICTIONS[:2] if shift else PREDICTIONS:  # a shift is lost in the mean, if at all
        prediction = Prediction(kind)
        c, _ = prediction.coefficients(coefficients)
        expected = c[:, None] * (mean - x1.double())
        target = prediction.target(coefficients, x0.double(), x1.double())
        correction = oracle.correction(xt, times, x1, prediction=kind)
        assert correction.dtype == torch.float32
        error = (correction.double() - expected).norm(dim=1) / target.norm(dim=1)
        assert error.max() < 1e-5, kind


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_is_conditional_velocity_plus_correction(path):
    bank = make_bank(64)
    xt, t, x0, x1 = queries(bank, path, 0.2, [5, 60, 70])
    u = Prediction("velocity").target(path(t), x0, x1)
    oracle = Oracle(bank, path)
    expected = u + oracle.correction(xt, t, x1)
    torch.testing.assert_close(oracle.velocity(xt, t), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_data_end_is_collapsed_and_finite(path, kind):
    bank = make_bank(64)
    rows = [2, 3, 4, 60]
    x1 = bank.rows[rows]
    t = torch.ones(len(rows))
    xt = path.interpolate(torch.randn_like(x1), x1, t) if isinstance(path, EDMPath) else x1.clone()
    oracle = Oracle(bank, path)
    post = oracle.posterior(xt, t, source=torch.tensor(rows), k=2)
    if isinstance(path, EDMPath):  # sigma(1) = 0.002: the near duplicates still share the weight
        mean, weights = brute_force(bank, xt, t, path)
        torch.testing.assert_close(post.weights, weights.topk(2, 1).values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(post.mean, mean, rtol=1e-9, atol=1e-9)
        return
    # The first three have one exact twin; near ones, 1e-3 away, have lost all weight. At the
    # floor of sigma a logit is good to about 1e-4.
    half = torch.tensor([0.5, 0.5]).double()
    for twins in post.weights[:3]:
        torch.testing.assert_close(twins, half, rtol=2e-4, atol=0)
    ones = torch.tensor([0.5, 0.5, 0.5, 1]).double()
    torch.testing.assert_close(post.source_weight, ones, rtol=2e-4, atol=0)
    assert torch.equal(post.mean.float(), x1)
    assert torch.equal(oracle.correction(xt, t, x1, prediction=kind), torch.zeros_like(x1))
    if not isinstance(path, VPPath):
        d_alpha = path(t).d_alpha[:, None]
        torch.testing.assert_close(oracle.velocity(xt, t), d_alpha * x1, rtol=1e-5, atol=1e-5)


def test_no_rise_of_target_difference_at_the_data_end():
    # The published figure rises again to 0.03 at t = 1; there the correction must stay zero.
    bank = LatentBank(torch.randn(500, 512, generator=torch.Generator().manual_seed(3)))
    oracle = Oracle(bank, engine=Exact(chunk_size=130))
    for t in (0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999):
        xt, times, _, x1 = queries(bank, oracle.path, t, list(range(200)))
        assert oracle.correction(xt, times, x1).square().mean(1).max() < 1e-6


@pytest.mark.parametrize(("dim", "shift"), [(1, 1e4), (64, 0.0), (64, 100.0), (3072, 1.0)])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.999])
def test_chunk_size_does_not_matter(t, dim, shift):
    bank = make_bank(dim, shift=shift)
    xt, times, _, x1 = queries(bank, LinearPath(), t, list(range(20)))
    whole = Oracle(bank, engine=Exact("float64", chunk_size=len(bank))).posterior(xt, times, k=5)
    for chunk in (1, 7, 149, 1000):
        part = Oracle(bank, engine=Exact("float64", chunk_size=chunk)).posterior(xt, times, k=5)
        torch.testing.assert_close(part.mean, whole.mean, rtol=1e-6, atol=1e-6)
        # A logit is good to eps rho^2 ||x||^2, which is near 1e-5 in the worst case here.
        for name in ("log_evidence", "entropy", "ess", "weights"):
            torch.testing.assert_close(
                getattr(part, name), getattr(whole, name), rtol=2e-5, atol=2e-5, msg=name
            )
        expected = Oracle(bank, engine=Exact("float64", chunk_size=len(bank))).correction(
            xt, times, x1
        )
        got = Oracle(bank, engine=Exact("float64", chunk_size=chunk)).correction(xt, times, x1)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_statistics_equal_their_definitions():
    bank = make_bank(16, n=60)
    path = LinearPath()
    xt, t, _, _ = queries(bank, path, 0.25, [0, 2, 12, 50])
    _, weights = brute_force(bank, xt, t, path)
    post = Oracle(bank, path, Exact("float64", chunk_size=13)).posterior(
        xt, t, source=torch.tensor([0, 2, 12, 50]), k=4
    )
    alpha, sigma, *_ = path(t.double())
    distance = (xt.double()[:, None] - alpha[:, None, None] * bank.rows.double()).square().sum(2)
    log_z = torch.logsumexp(-distance / (2 * sigma[:, None] ** 2), 1)
    torch.testing.assert_close(post.log_evidence, log_z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(post.entropy, torch.special.entr(weights).sum(1))
    torch.testing.assert_close(post.ess, 1 / weights.square().sum(1))
    top = weights.topk(4, 1).values
    torch.testing.assert_close(post.weights, top)
    torch.testing.assert_close(weights.gather(1, post.rows), top)
    torch.testing.assert_close(post.source_weight, weights[range(4), [0, 2, 12, 50]])
    assert torch.equal(post.tail_mass, torch.zeros(4).double())


def test_class_wise_equals_a_bank_of_that_class():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 3, 4, generator=generator)
    labels = torch.randint(0, 4, (90,), generator=generator) * 10 - 7
    bank = LatentBank(x, labels)
    assert bank.classes == sorted(set(labels.tolist()))
    pick = torch.randint(0, 90, (25,), generator=generator)
    t = torch.rand(25, generator=generator) * 0.6
    xt = LinearPath().interpolate(torch.randn(25, 3, 4, generator=generator), x[pick], t)
    for asked in (labels[pick], labels[pick].tolist()):
        post = Oracle(bank, engine=Exact("float64")).posterior(xt, t, asked, k=2)
        for i, label in enumerate(labels[pick].tolist()):
            alone = Oracle(LatentBank(x[labels == label]), engine=Exact("float64")).posterior(
                xt[i : i + 1], t[i : i + 1], k=2
            )
            torch.testing.assert_close(post.mean[i], alone.mean[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(post.entropy[i], alone.entropy[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(post.weights[i], alone.weights[0], rtol=1e-9, atol=1e-9)
            rows = bank.index[post.rows[i]]
            assert torch.equal(rows, (labels == label).nonzero()[:, 0][alone.rows[0]])


@given(st.integers(0, 10_000), st.floats(0, 0.999), st.integers(2, 30), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_permuting_or_splitting_the_bank_changes_nothing(seed, t, n, dim):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    times = torch.full((4,), t, dtype=torch.float64)
    source = torch.randint(0, n, (4,), generator=generator)
    path = LinearPath()
    xt = path.interpolate(torch.randn(4, dim, generator=generator).double(), x[source], times)
    whole = Oracle(LatentBank(x), path).posterior(xt, times)
    order = torch.randperm(n, generator=generator)
    shuffled = Oracle(LatentBank(x[order]), path).posterior(xt, times)
    bank = LatentBank(x)
    cuts = [0, *sorted(torch.randint(1, n, (2,), generator=generator).tolist()), n]
    parts = [
        Exact("float64").posterior(bank, Queries(xt, path(times), [slice(a, b)] * 4))
        for a, b in zip(cuts, cuts[1:], strict=False)
        if a < b
    ]
    for other in (
        shuffled,
        merge(*parts),
        merge(merge(*parts[1:]), parts[0]) if parts[1:] else whole,
    ):
        for name in ("mean", "log_evidence", "entropy", "ess", "weights"):
            torch.testing.assert_close(
                getattr(other, name), getattr(whole, name), rtol=1e-7, atol=1e-8, msg=name
            )


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=30)
def test_paths_agree_at_equal_signal_to_noise(seed, t):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    answers = []
    rho = float(LinearPath().snr_sqrt(torch.tensor(t, dtype=torch.float64)))
    for path in PATHS:
        if not float(path.snr_sqrt(torch.zeros(()))) < rho < float(path.snr_sqrt(torch.ones(()))):
            continue
        times = torch.full((3,), path.time_of_snr_sqrt(rho), dtype=torch.float64)
        alpha = path(times).alpha[:, None]
        answers.append(Oracle(LatentBank(x), path).posterior(alpha * (x[:3] + z / rho), times).mean)
    assert len(answers) >= 3
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-8, atol=1e-9)


def test_velocity_is_the_score_of_the_mixture():
    # u* = (x_t + (1 - t) score) / t for the linear path: the score by autograd is independent.
    bank = make_bank(8, n=40)
    xt, t, _, _ = queries(bank, LinearPath(), 0.3, [5, 9, 60 % 40])
    point = xt.double().requires_grad_()
    s, a = 1 - t.double()[:, None, None], t.double()[:, None, None]
    logits = -((point[:, None] - a * bank.rows.double()) ** 2 / (2 * s**2)).sum(2)
    (score,) = torch.autograd.grad(torch.logsumexp(logits, 1).sum(), point)
    t = t[:, None].double()
    expected = (xt.double() + (1 - t) * score) / t
    got = Oracle(bank, engine=Exact("float64")).velocity(xt.double(), t[:, 0])
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bank_of_other_precision_is_exact_for_its_own_rows(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 32, generator=generator)
    bank = LatentBank(x, dtype=dtype)
    rounded = LatentBank(bank.take(torch.arange(100)))
    xt, t, _, _ = queries(LatentBank(x), LinearPath(), 0.15, list(range(20)))
    torch.testing.assert_close(
        Oracle(bank, engine=Exact("float64")).posterior(xt, t).mean,
        Oracle(rounded).posterior(xt, t).mean,
    )


def test_autocast_does_not_reach_the_oracle():
    bank = make_bank(64)
    xt, t, _, _ = queries(bank, LinearPath(), 0.3, [3, 50])
    expected = Oracle(bank).posterior(xt, t).mean
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Oracle(bank).posterior(xt, t).mean, expected)


def test_far_away_mean_costs_no_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator, dtype=torch.float64)
    shift = 1000.0
    t = torch.full((20,), 0.2, dtype=torch.float64)
    z = torch.randn(20, 64, generator=generator, dtype=torch.float64)
    path = LinearPath()
    near = Oracle(LatentBank(x)).posterior(path.interpolate(z, x[:20], t), t).mean
    far = Oracle(LatentBank(x + shift)).posterior(path.interpolate(z, x[:20] + shift, t), t).mean
    torch.testing.assert_close(far - shift, near, rtol=1e-6, atol=1e-6)


def test_no_gradient_and_no_copies():
    bank = make_bank(8)
    oracle = Oracle(bank)
    xt = torch.randn(3, 8, requires_grad=True)
    assert not oracle.posterior(xt, torch.rand(3)).mean.requires_grad
    assert copy.deepcopy(oracle) is oracle
    assert copy.deepcopy(bank) is bank


@pytest.mark.parametrize(
    ("xt", "t", "message"),
    [
        (torch.zeros(4, 9), torch.zeros(4), r"Expected `xt` with shape \('B', 8\)"),
        (torch.zeros(4, 8), torch.zeros(4, 2), r"Expected `t` with shape \(4,\), got \(4, 2\)"),
        (
            torch.zeros(4, 8),
            torch.tensor([0, 0.5, 1, 1.5]),
            r"in \[0, 1\].* from 0 to 1.5",
        ),
        (torch.zeros(4, 8), torch.tensor([0, 0.5, -1, 1]), r"in \[0, 1\].*from -1 to 1"),
        (torch.zeros(4, 8), torch.full((4,), torch.nan), r"in \[0, 1\]"),
    ],
)
def test_bad_queries_are_refused(xt, t, message):
    with pytest.raises(ValueError, match=message):
        Oracle(make_bank(8)).posterior(xt, t)


def test_bad_labels_are_refused():
    bank = LatentBank(torch.randn(6, 8), torch.tensor([3, 3, 4, 4, 9, 9]))
    oracle, xt, t = Oracle(bank), torch.zeros(2, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"Class 5 is not in the bank, which has 3 classes from 3"):
        oracle.posterior(xt, t, torch.tensor([3, 5]))
    with pytest.raises(ValueError, match=r"Expected `labels` with shape \(2,\)"):
        oracle.posterior(xt, t, [3])
    with pytest.raises(ValueError, match="needs a bank with labels"):
        Oracle(make_bank(8)).posterior(xt, t, [3, 4])
    for wrong, got in ((torch.tensor([[3, 4]]), r"\(1, 2\)"), (torch.tensor([3.7, 4.2]), "torch")):
        with pytest.raises(ValueError, match=rf"integer `labels` with shape \(2,\), got {got}"):
            oracle.posterior(xt, t, wrong)
    with pytest.raises(ValueError, match="`k` from 1 to the 6 rows of the bank, got 0"):
        oracle.posterior(xt, t, k=0)
    with pytest.raises(
        ValueError, match=r"integer `source` with shape \(2,\).*got torch.int64 of shape \(1,"
    ):
        oracle.posterior(xt, t, source=torch.tensor([0]))
    with pytest.raises(ValueError, match="`source` below 6, the rows of the bank.*, got 6"):
        oracle.posterior(xt, t, source=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="chunk_size"):
        Exact(chunk_size=0)
    with pytest.raises(ValueError, match="Expected `x1` with the shape"):
        oracle.correction(xt, t, xt[:1])


def test_small_classes_and_empty_batches_keep_their_shapes():
    bank = LatentBank(torch.randn(6, 8), torch.tensor([3, 3, 4, 4, 4, 9]))
    oracle = Oracle(bank)
    for labels in ([3, 9], [4, 4], [9, 9]):
        post = oracle.posterior(torch.randn(2, 8), torch.full((2,), 0.3), labels, k=4)
        assert post.weights.shape == post.rows.shape == (2, 4)
        torch.testing.assert_close(post.weights.sum(1), torch.ones(2).double())
        assert ((post.rows == -1) == (post.weights == 0)).all()
    with pytest.raises(ValueError, match="`k` from 1 to the 6 rows of the bank, got 7"):
        oracle.posterior(torch.randn(2, 8), torch.zeros(2), k=7)
    none = oracle.posterior(torch.zeros(0, 8), torch.zeros(0), [], k=2)
    assert none.mean.shape == (0, 8)
    assert none.weights.shape == (0, 2)


def test_merge_of_one_part_and_of_none():
    bank = make_bank(8)
    xt, t, _, _ = queries(bank, LinearPath(), 0.1, [0, 5])
    post = Oracle(bank).posterior(xt, t, k=3, source=torch.tensor([0, 5]))
    alone = merge(post, k=2)
    torch.testing.assert_close(alone.mean, post.mean)
    assert alone.weights.shape == (2, 2)
    assert alone.source_weight is None
    with pytest.raises(ValueError, match="at least one posterior"):
        merge()


def test_no_class_and_the_null_class_are_asked_of_the_whole_bank():
    generator = torch.Generator().manual_seed(0)
    bank = LatentBank(torch.randn(90, 6, generator=generator), torch.arange(90) % 3)
    xt, t, _, _ = queries(bank, LinearPath(), 0.2, list(range(0, 80, 10)))
    whole = Oracle(bank).posterior(xt, t, k=4)
    labels = [None, 0, 1, None, 2, 2, None, 0]
    wise = [i for i, label in enumerate(labels) if label is not None]
    classes = Oracle(bank).posterior(xt[wise], t[wise], [labels[i] for i in wise], k=4)
    null = Oracle(bank, null_class=1000)
    coded = torch.tensor([1000 if label is None else label for label in labels])
    for post in (
        Oracle(bank).posterior(xt, t, labels, k=4),
        null.posterior(xt, t, coded, k=4),
    ):
        for name in ("mean", "log_evidence", "entropy", "ess", "weights", "rows"):
            expected = getattr(whole, name).clone()
            expected[wise] = getattr(classes, name)
            torch.testing.assert_close(getattr(post, name), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(null.posterior(xt, t, [1000] * 8).mean, whole.mean)
    with pytest.raises(ValueError, match="Class 1000 is not in the bank"):
        Oracle(bank).posterior(xt, t, coded)


def test_an_unknown_source_has_no_weight():
    bank = make_bank(8)
    xt, t, source, _ = queries(bank, LinearPath(), 0.6, [3, 50])
    known = Oracle(bank).posterior(xt, t, source=torch.tensor([3, 50])).source_weight
    mixed = Oracle(bank).posterior(xt, t, source=torch.tensor([3, -1])).source_weight
    assert mixed[0] == known[0]
    assert mixed[1].isnan()


def test_a_source_of_another_class_has_no_weight():
    bank = LatentBank(torch.randn(60, 6), torch.arange(60) % 3)
    source = torch.tensor([3, 50, 50])
    xt, t, *_ = queries(bank, LinearPath(), 0.3, source.tolist())
    own = bank.labels_of([3, 50])
    weight = Oracle(bank).posterior(xt, t, [own[0], own[0], None], source=source).source_weight
    assert weight[0] > 0
    assert weight[1] == 0
    alone = Oracle(bank).posterior(xt[2:], t[2:], source=source[2:]).source_weight
    torch.testing.assert_close(weight[2:], alone, rtol=1e-12, atol=0)


def test_source_can_be_looked_up():
    bank = LatentBank(torch.randn(60, 2, 3), torch.arange(60) % 4)
    xt, t, _, x1 = queries(bank, LinearPath(), 0.4, [8, 20, 33])
    assert bank.find(x1.float()).tolist() == [8, 20, 33]


@pytest.mark.parametrize("what", ["eta", "delta"])
def test_shares_and_probabilities_are_between_0_and_1(what):
    with pytest.raises(ValueError, match=f"`{what}` between 0 and 1"):
        Oracle(make_bank(8), **{what: 1.0})
