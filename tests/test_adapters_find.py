"""Finding the maker: in modules, containers and plain objects; none, one, several."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stagewise import CosinePath, LatentBank, Oracle
from stagewise.adapters import find_target_makers, one_target_maker
from stagewise.losses import FlowMatchingLoss
from stagewise.schemes import Scheme
from stagewise.targets import Mix

cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
transport = pytest.importorskip("torchcfm.optimal_transport")
fm_path = pytest.importorskip("flow_matching.path")


def matcher(**options):
    return cfm.ConditionalFlowMatcher(**options)


def names(module):
    return [maker.name for maker in find_target_makers(module)]


def test_found_wherever_it_is_held():
    class Objective:
        def __init__(self):
            self.matchers = {"a": matcher(), "b": [matcher()]}

    module = nn.Module()
    module.FM = matcher()
    module.inner = nn.Sequential(nn.Linear(2, 2), nn.Module())
    module.inner[1].loss_fn = FlowMatchingLoss(CosinePath(), "data")
    module.objective = Objective()
    assert names(module) == [
        "module.FM",
        "module.objective.matchers['a']",
        "module.objective.matchers['b'][0]",
        "module.inner.1.loss_fn",
    ]
    loss = find_target_makers(module)[-1]
    assert isinstance(loss.path, CosinePath)
    assert loss.prediction.kind == "data"
    assert loss.describe() == (
        "module.inner.1.loss_fn: FlowMatchingLoss (stagewise), CosinePath(), predicts data, "
        "time 0 is noise and 1 is data"
    )
    assert names(module.FM) == ["module"]


def test_each_object_once_and_circles_end():
    module = nn.Module()
    module.FM = module.again = matcher()
    module.back = SimpleNamespace(module=module, FM=module.FM)
    assert names(module) == ["module.FM"]


def test_what_belongs_to_others_is_not_looked_through():
    module = nn.Module()
    module._trainer = SimpleNamespace(FM=matcher())
    module.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    module.optimizer.FM = matcher()
    assert names(module) == []


def test_no_maker_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"nothing that makes .* in Linear.*u, w = self\.target"):
        one_target_maker(nn.Linear(2, 2))


def test_two_makers_are_listed_with_the_cure():
    module = nn.Module()
    module.FM, module.loss = matcher(), FlowMatchingLoss()
    with pytest.raises(ValueError, match="found 2") as error:
        one_target_maker(module)
    message = str(error.value)
    for maker in find_target_makers(module):
        assert maker.describe() in message
    assert 'target_maker="module.FM"' in message
    assert one_target_maker(module, "module.loss").library == "stagewise"
    with pytest.raises(ValueError, match=r"Expected module\.other .*there are:\n  module\.FM"):
        one_target_maker(module, "module.other")


def test_what_cannot_be_steered_does_not_stand_in_the_way():
    module = nn.Module()
    module.scheduler = SimpleNamespace(
        scale_noise=lambda: None, sigmas=torch.zeros(1), timesteps=torch.zeros(1)
    )
    module.FM = matcher()
    assert one_target_maker(module).name == "module.FM"
    with pytest.raises(ValueError, match=r"module\.scheduler cannot be steered"):
        one_target_maker(module, "module.scheduler")


@pytest.mark.parametrize("make", [matcher, fm_path.CondOTProbPath, FlowMatchingLoss])
@pytest.mark.parametrize("nested", [False, True])
def test_what_couples_before_the_maker_is_refused(make, nested):
    sampler = transport.OTPlanSampler("exact")
    module = nn.Module()
    module.maker = make()
    one_target_maker(module)
    module.couple = {"pairs": [sampler]} if nested else sampler
    name = r"couple\['pairs'\]\[0\]" if nested else "couple"
    reason = rf"module\.{name} \(OTPlanSampler\) .* x_0 and x_1 dependent.* independent pairs"
    with pytest.raises(ValueError, match=rf"module\.maker cannot be steered: {reason}"):
        one_target_maker(module)
    with pytest.raises(ValueError, match=reason):
        one_target_maker(module, "module.maker")
    with pytest.raises(ValueError, match=reason):
        find_target_makers(module)[0].attach(Scheme())


def test_a_matcher_that_couples_inside_stands_in_no_others_way():
    class Coupled(cfm.ConditionalFlowMatcher):
        def __init__(self):
            super().__init__()
            self.couple = transport.OTPlanSampler("exact")

    with pytest.raises(ValueError, match=r"module\.couple \(OTPlanSampler\) pairs noise with data"):
        one_target_maker(Coupled())
    module = nn.Module()
    module.coupled = Coupled()
    module.exact = cfm.ExactOptimalTransportConditionalFlowMatcher()
    module.FM = matcher()
    assert one_target_maker(module).name == "module.FM"


def test_own_loss_takes_the_scheme_and_gives_it_back():
    x1 = torch.randn(32, 4)
    loss_fn = FlowMatchingLoss()
    before = dict(vars(loss_fn))
    maker = one_target_maker(loss_fn)
    scheme = Scheme(Oracle(LatentBank(x1)), target=Mix(), weight=lambda t: 1 + t)
    detach = maker.attach(scheme)
    assert loss_fn.scheme is scheme
    loss_fn(lambda xt, t: xt, x1[:8])
    assert scheme.last.lam.eq(1).all()
    assert torch.equal(maker.last[0], loss_fn.last.t)
    assert torch.equal(maker.last[1], loss_fn.last.loss)
    with pytest.raises(ValueError, match="has a scheme already"):
        one_target_maker(loss_fn).attach(Scheme())
    detach()
    assert vars(loss_fn).keys() == before.keys()
    assert loss_fn.scheme is None
    one_target_maker(loss_fn).attach(scheme2 := Scheme())
    detach()
    assert loss_fn.scheme is scheme2, "an old detach leaves a newer attach alone"
