"""The oracle with a kernel on the condition: brute force, a known joint, its limits, bad input."""

import math
import pickle

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from stagewise import (
    Condition,
    ConditionedOracle,
    CosinePath,
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    ReferenceSet,
    Reservoir,
    Scheme,
    Smoothing,
    StageCurve,
)
from stagewise import condition as module
from stagewise.engines import Exact

N, DIM, WIDTH = 120, 24, 3


def laplace(c, rows):
    return -torch.cdist(c, rows, p=1)


KERNELS = [Condition("gaussian", 0.7), Condition("cosine", 0.6), Condition(laplace, 0.9)]


def by_hand(condition, c, rows):
    """log k in float64, pair by pair."""
    gap = c[:, None] - rows[None]
    if condition.kernel == "gaussian":
        return -gap.square().sum(2) / (2 * condition.bandwidth**2)
    if condition.kernel == "cosine":
        return (normalize(c, dim=1) @ normalize(rows, dim=1).T - 1) / condition.bandwidth**2
    return -gap.abs().sum(2) / condition.bandwidth


def brute_force(condition, x, c_rows, xt, c, t, path, allowed=None):
    """Weights in float64 from explicit differences, (B, N); `allowed` (B, N) are of its class."""
    alpha, sigma, *_ = path(t.double())
    gap = xt.double()[:, None] - alpha[:, None, None] * x.double()
    logits = -gap.square().sum(2) / (2 * sigma[:, None] ** 2)
    logits = logits + by_hand(condition, c.double(), c_rows.double())
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.logsumexp(1), logits.softmax(1)


@pytest.fixture(scope="module")
def data():
    """Rows with duplicates and near duplicates, conditions that some of them share, labels."""
    draw = torch.Generator().manual_seed(3)
    x, c = torch.randn(N, DIM, generator=draw), torch.randn(N, WIDTH, generator=draw)
    x[1], x[3] = x[0], x[2] + 1e-3
    c[4], c[3] = c[5], c[2]
    return x, c, torch.arange(N) % 4


def noisy(x1, t, path, seed=1):
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(seed))
    return x0, path.interpolate(x0, x1, t)


@pytest.mark.parametrize("condition", KERNELS, ids=repr)
@pytest.mark.parametrize("wise", [False, True])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_posterior_equals_brute_force(data, condition, wise, path, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS", 16 * (8 + DIM + WIDTH))  # 16 rows at a time
    x, c, y = data
    bank = LatentBank(x, y if wise else None, conditions=c)
    at = torch.tensor([0, 1, 2, 3, 4, 50, 90, 119])
    t = torch.tensor([0.0, 0.02, 0.1, 0.2, 0.35, 0.6, 0.95, 0.999])
    _, xt = noisy(x[at], t, path)
    allowed = y[at][:, None] == y if wise else None
    asked = c[at] + 0.1
    log_z, weights = brute_force(condition, x, c, xt, asked, t, path, allowed)
    order = torch.arange(N) if bank.index is None else bank.index
    row = torch.argsort(order)[at]
    oracle = ConditionedOracle(bank, path, condition)
    post = oracle.posterior(xt, t, y[at] if wise else None, source=row, condition=asked, k=5)
    mean = weights @ x.double()
    assert ((post.mean - mean).norm(dim=1) / mean.norm(dim=1)).max() < 1e-6
    torch.testing.assert_close(post.log_evidence, log_z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(post.weights, weights.topk(5, 1).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(post.ess, 1 / weights.square().sum(1), rtol=1e-6, atol=0)
    entropy = torch.special.entr(weights).sum(1)
    torch.testing.assert_close(post.entropy, entropy, rtol=1e-6, atol=1e-9)
    own = weights.gather(1, at[:, None])[:, 0]
    torch.testing.assert_close(post.source_weight, own, rtol=1e-6, atol=1e-9)
    assert (weights.gather(1, order[post.rows]) - post.weights).abs().max() < 1e-6
    assert post.tail_mass.max() == 0


@pytest.mark.filterwarnings("ignore:Scheme. .* of the samples")
@pytest.mark.parametrize("condition", KERNELS, ids=repr)
def test_target_of_rows_of_others_and_of_rows_under_another_condition(data, condition):
    x, c, _ = data
    path, t = LinearPath(), torch.tensor([0.05, 0.1, 0.2, 0.4, 0.9])
    # A row; one under another condition, which is another, and in place of its own; two no rows.
    x1 = torch.stack([x[7], x[8], x[8], x[9] + 0.5, x[10] - 0.3])
    asked = torch.stack([c[7], c[8] + 0.4, c[8] + 0.4, c[9], c[10] + 0.2])
    source = torch.tensor([-1, -1, 8, -1, -1])
    x0, xt = noisy(x1, t, path)
    scheme = Scheme(ConditionedOracle(LatentBank(x, conditions=c), path, condition), target=Mix())
    known = {"condition": asked, "source": source}
    target, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1, **known)
    for i, replaced in enumerate([7, None, 8, None, None]):
        kept = torch.arange(N) != (N if replaced is None else replaced)
        rows, given = torch.cat([x[kept], x1[i : i + 1]]), torch.cat([c[kept], asked[i : i + 1]])
        one = slice(i, i + 1)
        _, weights = brute_force(condition, rows, given, xt[one], asked[one], t[one], path)
        u = (weights @ rows.double() - xt[one].double()) / (1 - t[i].double())
        torch.testing.assert_close(target[one].double(), u, rtol=1e-5, atol=1e-5)
    assert scheme.last.inserted.tolist() == [False, True, True, True, True]
    added = scheme.correct(xt=xt, t=t, x1=x1, **known)
    torch.testing.assert_close(x1 - x0 + added, target)


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wise", [False, True])
@pytest.mark.parametrize("condition", KERNELS, ids=repr)
def test_target_of_a_picture_with_several_captions(data, condition, wise, given):
    """Each picture is there four times: its row is that with the same caption (and class)."""
    x, c, y = data
    x, path, at = x[6 : 6 + N // 4].repeat(4, 1), LinearPath(), torch.arange(0, N, 7)
    c = c.to(given).float()
    bank = LatentBank(x, y if wise else None, conditions=c)
    oracle, t = ConditionedOracle(bank, path, condition), torch.linspace(0.01, 0.95, len(at))
    x0, xt = noisy(x[at], t, path)
    labels = {"labels": y[at]} if wise else {}
    scheme = Scheme(oracle, target=Mix(), on_missing="error")
    known = {"condition": c[at].to(given).reshape(len(at), WIDTH, 1), **labels}
    target, _ = scheme(x[at] - x0, xt=xt, t=t, x1=x[at], **known)
    allowed = y[at][:, None] == y if wise else None
    _, weights = brute_force(condition, x, c, xt, c[at], t, path, allowed)
    u = (weights @ x.double() - xt.double()) / (1 - t.double())[:, None]
    assert ((target - u).norm(dim=1) / u.norm(dim=1)).max() < 1e-5
    order = torch.arange(N) if bank.index is None else bank.index
    assert torch.equal(order[bank.find(x[at], None, known["condition"])], at)
    assert not scheme.last.inserted.any()


def test_limits_are_the_conditional_target_and_the_oracle_of_all_rows(data):
    x, c, _ = data
    bank, t = LatentBank(x, conditions=c), torch.linspace(0, 0.99, 12)
    x1, at = x[6:18], torch.arange(6, 18)
    x0, xt = noisy(x1, t, LinearPath())
    for bandwidth in (1e-4, 1e-12, 1e-200):
        narrow = ConditionedOracle(bank, None, Condition(bandwidth=bandwidth))
        target, _ = Scheme(narrow, target=Mix())(x1 - x0, xt=xt, t=t, x1=x1, condition=c[at])
        assert torch.equal(target, x1 - x0), bandwidth
        # Rows that share a condition share a target; a condition of none has the nearest one's.
        shared = narrow.posterior(xt[:2], t[:2], condition=torch.stack([c[4], c[20] + 1e-3]))
        among = Oracle(LatentBank(x[[4, 5]]), None, Exact("float64")).posterior(xt[:1], t[:1])
        torch.testing.assert_close(shared.mean[0], among.mean[0])
        if bandwidth > 1e-150:
            assert torch.equal(shared.mean[1], x[20].double())
    wide = ConditionedOracle(bank, None, Condition(bandwidth=math.inf))
    whole = Oracle(bank, None, Exact("float64"))
    one, other = wide.posterior(xt, t, condition=c[at], k=3), whole.posterior(xt, t, k=3)
    for name in ("mean", "log_evidence", "entropy", "ess", "weights"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bandwidth", [0.05, 0.6])
def test_of_a_gaussian_joint_it_is_the_known_posterior_smoothed_in_c(bandwidth):
    draw = torch.Generator().manual_seed(0)
    count, turn = 200_000, torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=torch.float64)
    c = torch.randn(count, 1, generator=draw, dtype=torch.float64)
    x = c @ torch.tensor([[1.2, -0.7]], dtype=torch.float64)
    x = x + 0.5 * torch.randn(count, 2, generator=draw, dtype=torch.float64) @ turn
    # The joint covariance of (x, c), and of c with the kernel's noise.
    b = torch.tensor([[1.2], [-0.7]], dtype=torch.float64)
    cov_x, cov_xc = b @ b.T + 0.25 * turn.T @ turn, b
    path, oracle = LinearPath(), None
    oracle = ConditionedOracle(LatentBank(x, conditions=c), path, Condition(bandwidth=bandwidth))
    at = torch.arange(24)
    t = torch.linspace(0.05, 0.6, 24, dtype=torch.float64)
    x0, xt = noisy(x[at], t, path)
    post = oracle.posterior(xt, t, condition=c[at])

    def known(h, i):
        """Mean and covariance of x_1 given x_t and c, if c is seen with noise h."""
        alpha, sigma = t[i], 1 - t[i]
        top = torch.cat([alpha**2 * cov_x + sigma**2 * torch.eye(2), alpha * cov_xc], 1)
        low = torch.cat([alpha * cov_xc.T, torch.ones(1, 1) + h**2], 1)
        gain = torch.cat([alpha * cov_x, cov_xc], 1) @ torch.linalg.inv(torch.cat([top, low]))
        seen = torch.cat([xt[i], c[i]])
        return gain @ seen, cov_x - gain @ torch.cat([alpha * cov_x, cov_xc], 1).T

    score, blind = [], []
    for i in range(len(at)):
        mean, cov = known(bandwidth, i)
        error = (cov.diagonal() / post.ess[i]).sqrt()
        score.append((post.mean[i] - mean) / error)
        blind.append((post.mean[i] - known(0.0, i)[0]) / error)
    score, blind = torch.stack(score), torch.stack(blind)
    assert score.abs().max() < 4.5
    assert score.square().mean() < 1.6
    # With a wide kernel the bias, which is in closed form, is seen; with a narrow one it is not.
    assert (blind.square().mean() > 4) == (bandwidth > 0.3)


def test_two_clusters_of_the_documentation():
    draw = torch.Generator().manual_seed(0)
    side = torch.arange(400) % 2
    x = (4.0 * side - 2)[:, None] + torch.zeros(400, 1)
    c = one_hot(side, 2)
    bank = LatentBank(x, conditions=c)
    at = torch.randint(400, (4000,), generator=draw)
    t, x0 = torch.rand(4000, generator=draw), torch.randn(4000, 1, generator=draw)
    xt = LinearPath().interpolate(x0, x[at], t)
    plain = Oracle(bank).velocity(xt, t).square().mean()
    condition = Condition(bandwidth=0.05)
    told = ConditionedOracle(bank, None, condition).velocity(xt, t, condition=c[at])
    assert plain < 3.5
    torch.testing.assert_close(told, x[at] - x0, rtol=1e-4, atol=1e-3)
    assert told.square().mean() > 4.7


def test_stages_of_a_narrow_kernel_have_collapsed_from_the_start(data):
    x, c, y = data
    bank = LatentBank(x[6:], y[6:], conditions=c[6:])
    t = torch.linspace(0.02, 0.9, 8)[:, None].expand(8, 16).contiguous()
    narrow, wide = (
        StageCurve.measure(ConditionedOracle(bank, None, Condition(bandwidth=h)), t)
        for h in (1e-3, 1e6)
    )
    assert narrow.mean("top1").min() > 1 - 1e-9
    assert narrow.mean("target_difference").max() < 1e-12
    plain = StageCurve.measure(Oracle(bank), t)
    torch.testing.assert_close(wide.values, plain.values, rtol=1e-4, atol=1e-5)


def test_conditions_follow_their_rows(data):
    x, c, y = data
    bank = LatentBank(x, y, conditions=c.reshape(N, 1, WIDTH))
    assert torch.equal(bank.conditions, c[bank.index])
    assert torch.equal(LatentBank(x, y).with_conditions(c).conditions, bank.conditions)
    assert torch.equal(bank.part(slice(1, None, 2)).conditions, bank.conditions[1::2])
    assert LatentBank(x, conditions=torch.arange(N)).conditions.shape == (N, 1)
    assert "conditions of 3 numbers" in repr(bank)
    assert "bandwidth=0.25" in repr(ConditionedOracle(bank, None, Condition(bandwidth=0.25)))


def test_bad_input(data):
    x, c, _ = data
    bank = LatentBank(x, conditions=c)
    condition, t = Condition(bandwidth=0.5), torch.full((4,), 0.3)
    oracle = ConditionedOracle(bank, None, condition)
    x0, xt = noisy(x[:4], t, LinearPath())
    batch = {"xt": xt, "t": t, "x1": x[:4]}
    mixing = Scheme(oracle, target=Mix())
    for made, match in [
        (lambda: oracle.posterior(xt, t, condition=torch.zeros(4, 5)), r"3 numbers, got \(4, 5\)"),
        (lambda: oracle.posterior(xt, t), "condition=c"),
        (lambda: oracle.posterior(xt, t, source=torch.tensor([0, 1, -1, 2])), "some is not known"),
        (lambda: mixing(x[:4] - x0, **batch), "condition=c"),
        (lambda: ConditionedOracle(LatentBank(x), None, condition), "conditions=c"),
        (lambda: LatentBank(x, conditions=c[1:]), r"\(120, \*\)"),
        (lambda: LatentBank(x, conditions=c / 0), "finite"),
        (lambda: Condition(), "bandwidth"),
        (lambda: Condition("tophat", 1.0), "gaussian"),
        (lambda: Condition(bandwidth="0.3"), "above 0, got '0.3'"),
        (lambda: Condition(bandwidth=math.nan), "above 0, got nan"),
        (lambda: Scheme(Oracle(bank), target=Mix()), "and no kernel on them.*ConditionedOracle"),
        (lambda: Oracle(bank).posterior(xt, t, condition=c[:4]), "ConditionedOracle"),
        (lambda: Scheme(oracle, target=ReferenceSet(9)).check(), "Use Mix"),
        (
            lambda: Scheme(
                *(oracle,),
                target=Mix(),
                smoothing=Smoothing(bank, progress=False),
                strength=lambda t: t,
            ).check(),
            "Mix..boundary",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            made()
    short = ConditionedOracle(bank, None, Condition(lambda c, rows: c[:, 0], 1.0))
    with pytest.raises(ValueError, match="one for each pair"):
        short.posterior(xt, t, condition=c[:4])
    for value, match in [(math.nan, "got NaN: where k is 0"), (-math.inf, "for 4 of 4 conditions")]:
        kernel = Condition(lambda c, rows, value=value: c.new_full((len(c), len(rows)), value), 1.0)
        with pytest.raises(ValueError, match=match):
            ConditionedOracle(bank, None, kernel).posterior(xt, t, condition=c[:4])
    with pytest.raises(TypeError, match="`condition` to be a tensor, got list"):
        oracle.posterior(xt, t, condition=c[:4].tolist())
    Scheme(Oracle(bank), target=Mix(), class_wise=False)


def test_the_condition_in_a_batch():
    x1, c, y = torch.randn(4, 6), torch.randn(4, 3), torch.arange(4)
    condition = Condition(bandwidth=1.0)
    assert condition.of({"x": x1, "obs": c, "label": y}, x1, y) is c
    assert condition.of((x1, c), x1, None) is c
    told = Condition(bandwidth=1.0, read_batch=lambda batch: batch["text"])
    assert told.of({"x": x1, "text": c, "other": c}, x1, None) is c
    for batch, seen in [
        ((x1, c, 2 * c), r"batch\[1\], batch\[2\].*read_batch=lambda batch: batch\[1\]\)"),
        ((x1, y), "found none"),
        ({"x": x1, "c": c, "z": 2 * c}, r"read_batch=lambda batch: batch\['c'\]\)"),
        ({"x": x1, "text": ["a", "b", "c", "d"]}, "text must be embedded"),
    ]:
        with pytest.raises(ValueError, match=seen):
            condition.of(batch, x1, y)


def test_a_condition_that_is_not_finite_is_refused(data):
    x, c, _ = data
    broken = c[:8].clone()
    broken[3, 0] = math.nan
    oracle = ConditionedOracle(LatentBank(x, conditions=c), None, Condition(bandwidth=0.5))
    with pytest.raises(ValueError, match="finite `condition`, got NaN or Inf in row 3"):
        oracle.posterior(x[:8], 0.5, condition=broken)
    x0 = torch.randn(x[:8].shape)
    given = {"xt": (x[:8] + x0) / 2, "t": 0.5, "x1": x[:8], "condition": broken}
    with pytest.raises(ValueError, match="in row 3"):
        Scheme(oracle, target=Mix())(x[:8] - x0, **given)


def test_a_reservoir_keeps_the_conditions_of_what_it_holds(data):
    x, c, y = data
    for labels in (None, y):
        reservoir, kernel = Reservoir(24), Condition(bandwidth=0.5)
        oracle = ConditionedOracle(reservoir, None, kernel)
        with pytest.raises(ValueError, match=r"reservoir\.add\(x1, conditions=c\)"):
            oracle.conditions  # noqa: B018
        for some in torch.arange(40).split(8):
            reservoir.add(x[some], None if labels is None else labels[some], c[some])
        held = torch.arange(16, 40)
        whole = LatentBank(x[held], None if labels is None else y[held], conditions=c[held])
        t = torch.full((8,), 0.3)
        own = None if labels is None else y[some]
        _, xt = noisy(x[some], t, LinearPath())
        found = oracle.posterior(xt, t, own, condition=c[some])
        expected = ConditionedOracle(whole, None, kernel).posterior(xt, t, own, condition=c[some])
        torch.testing.assert_close(found.mean, expected.mean)
        scheme = Scheme(oracle, target=Mix(1.0), class_wise="auto" if labels is not None else False)
        x0 = torch.randn(8, x.shape[1])
        xt = LinearPath().interpolate(x0, x[some], t)
        u, _ = scheme(x[some] - x0, xt=xt, t=t, x1=x[some], labels=own, condition=c[some])
        added = oracle.correction(xt, t, x[some], own, condition=c[some])
        torch.testing.assert_close(u, x[some] - x0 + added)
        with pytest.raises(ValueError, match="with conditions as before, got .*without conditions"):
            reservoir.add(x[:8], own)


def test_a_pickle_of_before_keeps_its_function():
    """`read_batch` was named `find`."""
    kernel = Condition(bandwidth=1.0)
    state = {key: value for key, value in vars(kernel).items() if key != "read_batch"}
    kernel.__setstate__({**state, "find": len})
    assert kernel.read_batch is len
    assert pickle.loads(pickle.dumps(kernel)).read_batch is len
