"""The Gaussian head is the oracle of its support, with gradients, on every kind of input."""

import copy
import doctest
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import stagewise.attention
from stagewise import (
    CosinePath,
    EDMPath,
    GaussianAttention,
    LatentBank,
    LinearPath,
    Oracle,
    Prediction,
    VPPath,
)
from stagewise.engines import Exact

ROOT = Path(__file__).parents[1]
TIMES = (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)


def plain(xt, t, support, path=None, kind="velocity", h=1.0, metric=None, log_weights=0.0):
    """The formula as it stands in the paper, from differences, in float64."""
    xt, t, support = xt.double(), t.double(), support.double()
    path = (path or LinearPath())(t)
    outputs = []
    for i, x in enumerate(xt):
        y = support if support.ndim == xt.ndim else support[i]
        y, a, s = y.flatten(1), path.alpha[i], path.sigma[i]
        gap = x.flatten() - a * y
        gap = gap if metric is None else gap @ torch.atleast_2d(metric.double()).T
        logits = -gap.square().sum(1) / (2 * (h * s) ** 2)
        outputs.append((logits + log_weights).softmax(0) @ y)
    c, b = (value[:, None] for value in Prediction(kind).coefficients(path))
    return (c * torch.stack(outputs) + b * xt.flatten(1)).reshape(xt.shape)


def gap(found, expected):
    """The largest relative error of a sample."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def near_duplicates(rows, dim, offset, gap, dtype=torch.float32):
    """Pairs of rows so near each other that a query has to weigh both."""
    first = torch.randn(rows // 2, dim)
    return (torch.cat([first, first + gap * torch.randn_like(first)]) + offset).to(dtype)


def queries(support, t, path=None):
    x1 = support[torch.randint(len(support), t.shape)]
    return (path or LinearPath()).interpolate(torch.randn_like(x1), x1, t.to(x1.dtype))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("rows", "dim", "offset", "gap_of_pairs"),
    [(2000, 8, 0.0, 0.02), (500, 256, 30.0, 5e-3), (200, 4096, 3.0, 1e-3), (40, 4096, 100.0, 1e-3)],
)
def test_equals_the_oracle_and_the_formula(rows, dim, offset, gap_of_pairs):
    support = near_duplicates(rows, dim, offset, gap_of_pairs)
    t = torch.tensor(TIMES).repeat(2)
    xt = queries(support, t)
    velocity = GaussianAttention()(xt, t, support)
    assert velocity.dtype == torch.float32
    assert gap(velocity, plain(xt, t, support)) < 1e-6
    bank = LatentBank(support)
    assert gap(velocity, Oracle(bank, engine=Exact("float64")).velocity(xt, t)) < 1e-6
    assert gap(velocity, Oracle(bank).velocity(xt, t)) < 1e-5
    weights = GaussianAttention().weights(xt, t, support)
    # The near duplicates are weighed, which is where float32 products fail.
    assert ((weights.amax(1) > 0.55) & (weights.amax(1) < 0.95)).any()


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "edm"])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath(), EDMPath()], ids=repr)
def test_every_path_and_prediction(path, kind):
    support, t = torch.randn(30, 2, 3), torch.tensor([0.0, 0.2, 0.6, 0.99])
    xt = queries(support, t, path)
    found = GaussianAttention(path, kind)(xt, t, support)
    expected = plain(xt, t, support, path, kind)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_noise_has_the_mean_of_the_support():
    support, xt, t = torch.randn(30, 5) + 10, torch.randn(4, 5), torch.zeros(4)
    mean = GaussianAttention(prediction="data")(xt, t, support)
    torch.testing.assert_close(mean, support.mean(0).expand(4, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(GaussianAttention()(xt, t, support), mean - xt)
    assert (GaussianAttention().weights(xt, t, support) - 1 / 30).abs().max() < 1e-8


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_the_data_end_is_the_oracles(offset):
    support, t = torch.randn(30, 64) + offset, torch.ones(6)
    bank = LatentBank(support)
    head = GaussianAttention()
    torch.testing.assert_close(head(support[:6], t, support), support[:6])
    beside = support[:6] + 0.1 * torch.randn(6, 64)
    found, expected = head(beside, t, support), Oracle(bank).velocity(beside, t)
    assert found.isfinite().all()
    assert gap(found, expected) < 1e-6
    mean = GaussianAttention(prediction="data")(beside, t, support)
    torch.testing.assert_close(mean, support[:6])


@pytest.mark.parametrize("size", [1, 3])
def test_rows_that_are_all_the_same(size):
    support, t = torch.full((size, 4), 7.0), torch.tensor([0.0, 0.5, 1.0])
    mean = GaussianAttention(prediction="data")(torch.randn(3, 4), t, support)
    torch.testing.assert_close(mean, torch.full((3, 4), 7.0))


def test_bandwidth_and_metric_are_those_of_the_formula():
    support, t = torch.randn(30, 2, 3), torch.linspace(0, 0.95, 7)
    xt = queries(support, t)
    scale, matrix = torch.rand(6) + 0.5, torch.randn(2, 6)
    for h, metric, full in (
        (1.7, None, None),
        (0.5, scale, scale.diag()),
        (1.3, matrix, matrix),
        (1.0, torch.ones(6), None),
    ):
        found = GaussianAttention(bandwidth=h, metric=metric)(xt, t, support)
        expected = plain(xt, t, support, h=h, metric=full)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_support_for_each_sample():
    supports, t = torch.randn(5, 12, 2, 3), torch.linspace(0, 1, 5)
    xt = torch.randn(5, 2, 3)
    head = GaussianAttention(bandwidth=1.2, metric=torch.rand(6))
    both = zip(xt, t, supports, strict=True)
    expected = torch.cat([head(x[None], time[None], y) for x, time, y in both])
    torch.testing.assert_close(head(xt, t, supports), expected)
    shared = supports[:1].expand(5, -1, -1, -1)
    torch.testing.assert_close(head(xt, t, shared), head(xt, t, supports[0]))
    weights = head.weights(xt, t, supports)
    assert weights.shape == (5, 12)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))


@pytest.mark.parametrize("shape", [(5, 3), (0, 5, 3)])
def test_no_queries(shape):
    nothing, support, mask = torch.empty(0, 3), torch.randn(shape), torch.arange(5) < 3
    head = GaussianAttention()
    assert head(nothing, torch.empty(0), support, mask=mask).shape == (0, 3)
    assert head.weights(nothing, torch.empty(0), support, mask=mask).shape == (0, 5)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_padding_has_no_influence(own, each):
    t, xt = torch.linspace(0, 1, 4), torch.randn(4, 3)
    short = torch.randn(4, 5, 3) + 20 if own else torch.randn(5, 3) + 20
    padded = torch.cat([short, torch.full_like(short, torch.nan)], dim=-2).requires_grad_()
    mask = torch.arange(10) < 5
    mask = mask.expand(4, -1) if each else mask
    head = GaussianAttention()
    found = head(xt, t, padded, mask=mask)
    torch.testing.assert_close(found, head(xt, t, short))
    found[:3].sum().backward()
    assert padded.grad.isfinite().all()
    assert not padded.grad[..., 5:, :].any()


def test_a_mask_for_each_sample_over_a_shared_support():
    support, xt, t = torch.randn(6, 3), torch.randn(6, 3), torch.linspace(0, 0.9, 6)
    others = ~torch.eye(6, dtype=torch.bool)
    found = GaussianAttention()(xt, t, support, mask=others)
    for i in range(6):
        expected = plain(xt[i : i + 1], t[i : i + 1], support[others[i]])
        torch.testing.assert_close(found[i : i + 1].double(), expected, rtol=1e-6, atol=1e-6)


def test_prior_weights():
    support, xt, t = torch.randn(6, 3), torch.randn(4, 3), torch.linspace(0, 0.9, 4)
    log_weights = torch.randn(6)
    head = GaussianAttention()
    found = head(xt, t, support, log_weights=log_weights)
    expected = plain(xt, t, support, log_weights=log_weights.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        head(xt, t, support, log_weights=log_weights.expand(4, -1) + 3), found
    )
    # A row of weight k is k rows.
    repeated = head(xt, t, torch.cat([support, support[:1]]))
    double = torch.tensor([2.0, 1, 1, 1, 1, 1]).log()
    torch.testing.assert_close(head(xt, t, support, log_weights=double), repeated)
    off = torch.zeros(6).index_fill(0, torch.tensor([2]), -torch.inf)
    kept = torch.arange(6) != 2
    torch.testing.assert_close(
        head(xt, t, support, log_weights=off), head(xt, t, support, mask=kept)
    )


@pytest.mark.parametrize("own", [True, False])
def test_gradients_are_those_of_the_formula(own):
    rows = near_duplicates(40, 1024, 30.0, 2e-3)
    t = torch.tensor(TIMES)
    xt = queries(rows, t)
    support = rows.expand(len(t), -1, -1).contiguous() if own else rows
    toward = torch.randn_like(xt)
    gradients = []
    for function in (GaussianAttention(), plain):
        leaves = [xt.clone().requires_grad_(), support.clone().requires_grad_()]
        function(leaves[0], t, leaves[1]).mul(toward).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert gap(gradients[0][0], gradients[1][0]) < 1e-6


@pytest.mark.parametrize(("own", "size"), [(True, (6,)), (False, (2, 6))])
def test_gradcheck(own, size):
    shape, metric = (2, 4, 2, 3) if own else (4, 2, 3), torch.rand(size) + 0.5
    head = GaussianAttention(metric=metric, learn_bandwidth=True, learn_metric=True)
    mask = torch.tensor([True, True, False, True])

    def call(xt, t, support, log_weights, log_bandwidth, metric):
        learned = {"log_bandwidth": log_bandwidth, "metric": metric}
        kwargs = {"mask": mask, "log_weights": log_weights}
        return functional_call(head, learned, (xt, t, support), kwargs)

    leaves = [torch.randn(2, 2, 3), torch.tensor([0.1, 0.8]), torch.randn(shape) + 2]
    leaves += [torch.randn(4), torch.tensor(0.3), metric]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_as_wide(dtype):
    support, t = torch.randn(30, 64).to(dtype), torch.linspace(0, 0.99, 5)
    xt = queries(support, t)
    found = GaussianAttention()(xt, t, support)
    assert found.dtype == dtype
    expected = plain(xt, t, support)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    else:
        assert torch.equal(found, expected.to(dtype))


def test_autocast_changes_nothing():
    support, t = torch.randn(30, 64) + 5, torch.linspace(0, 0.99, 5)
    xt = queries(support, t)
    head = GaussianAttention(metric=torch.rand(8, 64))
    expected = head(xt, t, support)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(xt, t, support), expected)


def test_bandwidth_and_metric_learn():
    support, t = torch.randn(40, 8), torch.full((64,), 0.5)
    xt = queries(support, t)
    metric = torch.tensor([1.0] * 4 + [0.2] * 4)
    target = GaussianAttention(prediction="data", bandwidth=2.0, metric=metric)(xt, t, support)
    head = GaussianAttention(
        prediction="data", metric=torch.ones(8), learn_bandwidth=True, learn_metric=True
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        loss = (head(xt, t, support) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]
    # Only the quotient is determined.
    torch.testing.assert_close((head.metric / head.bandwidth).float(), metric / 2, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [True, False])
def test_on_cuda_without_a_sync(own, dtype):
    with FakeTensorMode():
        with torch.device("cuda"):
            metric = torch.ones(3, 48)
            head = GaussianAttention(metric=metric, learn_bandwidth=True, learn_metric=True)
        xt = torch.randn(5, 3, 4, 4, device="cuda", dtype=dtype)
        shape = (5, 9, 3, 4, 4) if own else (9, 3, 4, 4)
        support = torch.randn(shape, device="cuda", dtype=dtype)
        t, mask = torch.rand(5, device="cuda"), torch.ones(9, device="cuda", dtype=torch.bool)
        velocity = head(xt, t, support, mask=mask, log_weights=torch.zeros(9, device="cuda"))
        assert (velocity.shape, velocity.dtype) == (xt.shape, dtype)
        weights = head.weights(xt, t, support, mask=mask)
        assert weights.shape == (5, 9)
        assert {velocity.device.type, weights.device.type} == {"cuda"}


def test_mps_is_refused():
    with FakeTensorMode():
        xt, t = torch.empty(2, 3, device="mps"), torch.empty(2, device="mps")
        with pytest.raises(ValueError, match="float64, which MPS lacks"):
            GaussianAttention()(xt, t, xt)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 traces fewer functions")
@pytest.mark.parametrize("own", [True, False])
def test_compiles_to_one_graph(own):
    support, t = torch.randn((5, 9, 8) if own else (9, 8)), torch.linspace(0, 1, 5)
    xt, mask = torch.randn(5, 8), torch.arange(9) != 3
    head = GaussianAttention(metric=torch.rand(8), learn_bandwidth=True)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    expected = head(xt, t, support, mask=mask)
    torch.testing.assert_close(compiled(xt, t, support, mask=mask), expected)


def test_copies_and_states():
    plain_head = GaussianAttention(metric=torch.rand(4), bandwidth=2.0)
    assert not plain_head.state_dict()
    assert not list(plain_head.parameters())
    head = GaussianAttention(metric=torch.rand(2, 4), learn_bandwidth=True, learn_metric=True)
    assert set(head.state_dict()) == {"log_bandwidth", "metric"}
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin.log_bandwidth += 1
        twin.metric *= 2
    xt, t, support = torch.randn(3, 4), torch.rand(3), torch.randn(6, 4)
    before = head(xt, t, support)
    assert not torch.equal(twin(xt, t, support), before)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(xt, t, support), before)
    assert "bandwidth=1, metric=(2, 4), learned=['log_bandwidth', 'metric']" in repr(head)
    assert isinstance(nn.Sequential(head)[0], GaussianAttention)


def test_the_given_metric_is_not_shared():
    metric = torch.ones(4)
    for learn in (True, False):
        head = GaussianAttention(metric=metric, learn_metric=learn)
        with torch.no_grad():
            head.metric.zero_()
        assert metric.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bandwidth": 0.0}, "`bandwidth` above 0 and finite, got 0"),
        ({"bandwidth": float("inf")}, "`bandwidth` above 0 and finite, got inf"),
        ({"learn_metric": True}, r"Expected `metric` with learn_metric=True.*torch.ones\(D\)"),
        ({"metric": torch.ones(2, 2, 2)}, r"shape \(D,\) or \(r, D\), got torch.float32 .*2, 2, 2"),
        ({"metric": torch.ones(2).long()}, "floating-point `metric`.* got torch.int64"),
        ({"prediction": "mean"}, "Expected `prediction`"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GaussianAttention(**settings)


GOOD = {"xt": torch.zeros(2, 3), "t": torch.zeros(2), "support": torch.zeros(5, 3)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"xt": torch.zeros(2)}, r"`xt` with shape \(B, \*\) and at least two axes.*\(2,\)"),
        ({"xt": torch.zeros(2, 3).long()}, "floating-point `xt`.*int64"),
        ({"support": torch.zeros(5, 4)}, r"\('M', 3\) or \(2, 'M', 3\).*got \(5, 4\)"),
        ({"support": torch.zeros(0, 3)}, r"M at least 1, got \(0, 3\)"),
        ({"support": torch.zeros(3, 5, 3)}, r"got \(3, 5, 3\)"),
        ({"support": torch.zeros(3)}, r"got \(3,\)"),
        ({"support": torch.zeros(1, 2, 5, 3)}, r"got \(1, 2, 5, 3\)"),
        ({"t": torch.zeros(3)}, r"`t` with shape \(2,\)"),
        ({"t": torch.full((2,), 1.5)}, r"`t` in \[0, 1\]"),
        (
            {"mask": torch.ones(2, dtype=torch.bool)},
            r"`mask` with shape \(5,\) or \(2, 5\).*\(2,\)",
        ),
        ({"mask": torch.ones(5)}, "Expected bool `mask`.*float32"),
        ({"mask": torch.arange(10).view(2, 5) < 5}, "at least one row for each query"),
        ({"log_weights": torch.ones(5, 2)}, r"`log_weights` with shape.*\(5, 2\)"),
    ],
)
def test_inputs_that_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        GaussianAttention()(**{**GOOD, **bad})


def test_a_metric_of_another_size_is_refused():
    with pytest.raises(ValueError, match="`xt` with 4 numbers per sample.*got 3"):
        GaussianAttention(metric=torch.ones(4))(**GOOD)


def test_example_of_the_docstring():
    failed, tried = doctest.testmod(stagewise.attention)
    assert tried > 0
    assert failed == 0


def test_code_of_the_page():
    page = (ROOT / "docs/attention.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    support, present = torch.randn(30, 16), torch.arange(30) < 20
    names = {"support": support, "present": present, "batch": torch.randn(64, 16)}
    names |= {"xt": torch.randn(4, 16), "t": torch.rand(4)}
    for block in blocks:
        exec(block, names)
    # The flow of the oracle ends at rows of the support.
    assert torch.cdist(names["x1"], support).amin(1).max() < 0.1
    assert names["head"].bandwidth > 1.5
