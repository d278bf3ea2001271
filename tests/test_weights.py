"""Weights of the loss against the papers' formulas, and what is on in which stage."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise import (
    P2,
    CosinePath,
    EDMPath,
    EDMWeight,
    LinearPath,
    MinSNR,
    Prediction,
    Scheme,
    StageFactors,
    StageGate,
    VPPath,
)

T = torch.linspace(0.03, 0.97, 29, dtype=torch.float64)
PATHS = [LinearPath(), CosinePath(), VPPath()]


def snr(path, t=T):
    alpha, sigma, *_ = path(t)
    return (alpha / sigma) ** 2


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_published_weights(path):
    s, gamma = snr(path), 5.0
    cut = s.clamp_max(gamma)
    # arXiv 2303.09556, Sec. 3.4; its v-prediction is on variance-preserving paths.
    for kind, expected in (("data", cut), ("noise", cut / s)):
        torch.testing.assert_close(MinSNR(gamma, prediction=kind, path=path)(T), expected)
    if isinstance(path, CosinePath):
        # The velocity is pi/2 times v there.
        found = MinSNR(gamma, path=path)(T) * (math.pi / 2) ** 2
        torch.testing.assert_close(found, cut / (s + 1))
    # arXiv 2204.00227, Eq. 8, relative to the simple loss on the noise.
    found = P2(k=1.0, gamma=0.5, prediction="noise", path=path)(T)
    torch.testing.assert_close(found, 1 / (1 + s) ** 0.5)


def test_edm_weights():
    path, data = EDMPath(), 0.5
    sigma = path(T).sigma
    published = (sigma**2 + data**2) / (sigma * data) ** 2
    torch.testing.assert_close(EDMWeight(data, prediction="data", path=path)(T), published)
    # Which makes the weight on F, the network's output, the same at all noise levels.
    on_f = EDMWeight(data, prediction=Prediction("edm", data), path=path)(T)
    torch.testing.assert_close(on_f, torch.ones_like(T))


WEIGHTS = [MinSNR(2.0), P2(), EDMWeight(0.7)]


@given(seed=st.integers(0, 1000), path=st.sampled_from(PATHS), weight=st.sampled_from(WEIGHTS))
@settings(max_examples=40, deadline=None)
def test_a_weighted_error_is_the_same_in_every_prediction(seed, path, weight):
    """`w_y ||error of y||^2` does not depend on what y is, if the error of x_1 is the same."""
    draws = torch.Generator().manual_seed(seed)
    t = 0.05 + 0.9 * torch.rand(6, dtype=torch.float64, generator=draws)
    error = torch.randn(6, dtype=torch.float64, generator=draws)
    values = []
    for kind in ("data", "noise", "velocity", "score", "edm"):
        c, _ = Prediction(kind).coefficients(path(t))
        on_y = type(weight)(**{**vars(weight), "prediction": kind, "path": path})(t)
        values.append(on_y * (c * error) ** 2)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
@pytest.mark.parametrize("kind", ["data", "noise", "velocity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite(weight, kind, dtype):
    weight = type(weight)(**{**vars(weight), "prediction": kind})
    for path in PATHS:
        found = weight.bind(None, path)(torch.tensor([0.0, 1.0], dtype=dtype))
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert (found >= 0).all()


def test_a_scheme_gives_its_path_unless_there_is_one():
    linear, cosine = (MinSNR(path=path)(T) for path in (LinearPath(), CosinePath()))
    assert not torch.allclose(linear, cosine)
    torch.testing.assert_close(Scheme(weight=MinSNR(), path=CosinePath()).weight_of(T), cosine)
    own = Scheme(weight=MinSNR(path=LinearPath()), path=CosinePath())
    torch.testing.assert_close(own.weight_of(T), linear)


def test_gates():
    t = torch.tensor([0.0, 0.2999, 0.3, 1.0])
    assert StageGate(0.3)(t).tolist() == [0, 0, 1, 1]
    assert StageGate(0.3, stage="navigation")(t).tolist() == [1, 1, 0, 0]
    late = StageGate(0.3, width=0.05)(t.double())
    torch.testing.assert_close(late, 1 / (1 + torch.exp(-20 * (t.double() - 0.3))))
    early = StageGate(0.3, width=0.05, stage="navigation")(t.double())
    torch.testing.assert_close(late + early, torch.ones(4, dtype=torch.float64))


def test_a_gate_follows_its_scheme():
    scheme = Scheme()
    gate = StageGate(scheme)
    t = torch.tensor([0.1, 0.4])
    with pytest.raises(ValueError, match=r"not been measured yet.*StageGate\(scheme\)"):
        gate(t)
    scheme.set_boundary(0.3)
    assert gate(t).tolist() == [0, 1]
    scheme.set_boundary(0.05)
    assert gate(t).tolist() == [1, 1]


def test_factors():
    t = torch.tensor([0.1, 0.4])
    assert StageFactors(2, 0.5, boundary=0.3)(t).tolist() == [2, 0.5]
    middle = StageFactors(2, 0.5, width=0.1, boundary=0.3)(torch.tensor([0.3]))
    assert middle.tolist() == [1.25]
    scheme = Scheme(weight=StageFactors(3, 1))
    assert scheme.needs_boundary
    with pytest.raises(ValueError, match="has not been measured yet"):
        scheme.weight_of(t)
    with pytest.raises(ValueError, match="has not been measured yet"):
        scheme.check()
    scheme.set_boundary(0.3)
    scheme.check()
    assert scheme.weight_of(t).tolist() == [3, 1]
    # A number of its own wins.
    assert Scheme(weight=StageFactors(3, 1, boundary=0.05), boundary=0.3).weight_of(t).tolist() == [
        *(1, 1)
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(0), "`gamma` above 0"),
        (lambda: MinSNR(prediction="x0"), "`prediction` to be one of"),
        (lambda: P2(k=0), "k > 0"),
        (lambda: EDMWeight(0), "`sigma_data` above 0"),
        (lambda: StageGate(1.5), r"`boundary` in \[0, 1\]"),
        (lambda: StageGate(0.5, width=-1), "`width` of at least 0"),
        (lambda: StageGate(0.5, stage="end"), '"navigation" or "refinement"'),
        (lambda: StageFactors(-1, 1), "at least 0"),
        (lambda: StageFactors(0, 0), "not both 0"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
