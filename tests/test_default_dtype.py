"""Times, noise and logits have their own dtype: bf16-true training sets torch's default one."""

import copy

import pytest
import torch
from torch import nn

from stagewise import (
    Beta,
    CosinePath,
    EDMLogNormal,
    LatentBank,
    LogitNormal,
    LossSecondMoment,
    MinSNR,
    Mix,
    Mode,
    Oracle,
    ReferenceSet,
    Scheme,
    Shifted,
    Uniform,
    UShaped,
    VPPath,
    WithFloor,
)
from stagewise.adapters.paths import LibraryPath
from stagewise.engines import Exact
from stagewise.losses import FlowMatchingLoss

ROWS = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
SAMPLERS = [
    *(Uniform(), Uniform(stratified=True), LogitNormal(), Mode(), Beta(), Beta(1.5, 1), Beta(2, 3)),
    *(EDMLogNormal(), EDMLogNormal(path=VPPath()), UShaped(), LossSecondMoment()),
    *(Shifted(LogitNormal(), 0.5), WithFloor(LogitNormal(stratified=True), 0.1)),
]


@pytest.fixture
def bf16():
    """bfloat16 as the default dtype, for a block."""
    before = torch.get_default_dtype()

    class Default:
        def __enter__(self):
            torch.set_default_dtype(torch.bfloat16)

        def __exit__(self, *args):
            torch.set_default_dtype(before)

    yield Default()
    torch.set_default_dtype(before)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_draws_are_the_same_whatever_the_default_dtype(sampler, bf16):
    def ask():
        own = copy.deepcopy(sampler)
        own.update(torch.linspace(0, 0.99, 900), torch.linspace(1, 2, 900))
        t = own.sample(2048, generator=torch.Generator().manual_seed(1))
        weight = Scheme(timesteps=own, weight=MinSNR(), preserve_objective=True).weight_of(t)
        return t, own.density(t), weight

    expected = ask()
    with bf16:
        found = ask()
    for one, same in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, same)
    assert len(torch.unique(found[0])) > 1900


@pytest.mark.parametrize("target", [Mix(), ReferenceSet(9), ReferenceSet(9, shared=True)], ids=repr)
def test_targets_and_boundaries_too(target, bf16):
    x1, x0 = ROWS[:32], torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    t = torch.rand(32, generator=torch.Generator().manual_seed(2))
    xt = CosinePath().interpolate(x0, x1, t)
    y = CosinePath()(t).d_alpha[:, None] * x1 + CosinePath()(t).d_sigma[:, None] * x0

    def ask():
        oracle = Oracle(LatentBank(ROWS), CosinePath(), Exact())
        scheme = Scheme(oracle, target=target, weight=MinSNR())
        return (*scheme(y, xt=xt, t=t, x1=x1), scheme.measure_boundary().midpoint)

    expected = ask()
    with bf16:
        found = ask()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


def test_numbers_of_other_libraries_keep_their_digits(bf16):
    path = LibraryPath(lambda t: (t, 1 - t, 1.00001, -0.3), "of numbers")
    with bf16:
        values = path(torch.tensor([0.3], dtype=torch.float64))
    assert [float(value) for value in values] == [0.3, 0.7, 1.00001, -0.3]


@pytest.mark.parametrize("steered", [False, True])
def test_the_objective_of_a_bf16_module(steered, bf16):
    with bf16:
        net = nn.Linear(13, 12)
        told = []

        def model(xt, t):
            told.append(t)
            return net(torch.cat([xt, t[:, None]], 1)) + 0 * net(
                torch.cat([xt, t[:, None].to(xt)], 1)
            )

        x1 = ROWS.bfloat16().repeat(20, 1)
        scheme = Scheme(Oracle(LatentBank(ROWS.bfloat16())), target=Mix()) if steered else None
        loss_fn = FlowMatchingLoss(scheme=scheme)
        loss = loss_fn(model, x1)
        loss.backward()
        loss_fn(model, x1, t=torch.full((2000,), 0.3, dtype=torch.bfloat16))
        assert loss_fn.last.t.dtype == torch.float32
        loss = loss_fn(model, x1)
    assert loss.dtype == torch.float32
    assert net.weight.grad.isfinite().all()
    assert [t.dtype for t in told] == 3 * [torch.bfloat16]  # as its weights: Linear takes no other
    assert loss_fn.last.t.dtype == torch.float32
    assert len(torch.unique(loss_fn.last.t)) > 1900
    # A bf16 batch in a float32 program, and a float64 program.
    loss_fn(lambda xt, t: told.append(t) or xt, x1)
    assert told[-1].dtype == torch.float32
