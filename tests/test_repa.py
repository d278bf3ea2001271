"""REPA's loss, written down anew from its interface: what is steered there, and what is not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stagewise import (
    CosinePath,
    LatentBank,
    LinearPath,
    LogitNormal,
    Mix,
    Oracle,
    Scheme,
    Smoothing,
)
from stagewise.adapters import find_target_makers, one_target_maker
from stagewise.adapters.network_search import NetworkSearch

SHAPE, N = (2, 3, 3), 40
ROWS = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 4


class SILoss:
    """Interpolates with t = 1 as noise, regresses its derivative in t, and aligns features."""

    def __init__(self, path_type="linear", prediction="v"):
        self.path_type, self.prediction, self.weighting = path_type, prediction, "uniform"

    def interpolant(self, t):
        if self.path_type == "linear":
            return 1 - t, t, -1, 1
        angle = t * torch.pi / 2
        half_pi = torch.pi / 2
        return angle.cos(), angle.sin(), -half_pi * angle.sin(), half_pi * angle.cos()

    def __call__(self, model, images, model_kwargs=None, zs=None):
        time = torch.rand(len(images), 1, 1, 1).to(images)
        noise = torch.randn_like(images)
        self.drawn = time.flatten(), noise
        a, s, d_a, d_s = self.interpolant(time)
        out, features = model(a * images + s * noise, time.flatten(), **(model_kwargs or {}))
        error = (out - (d_a * images + d_s * noise)).square().flatten(1).mean(1)
        return error, -sum((z * f).sum(-1).mean() for z, f in zip(zs, features, strict=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.tensor(0.3)), None

    def forward(self, x, t, y=None):
        self.seen = x, t
        return self.scale * x, [self.scale * x.flatten(1)]


def batch(n=32):
    at = torch.arange(n)
    return ROWS[at], LABELS[at], [torch.ones(n, 18)]


def run(holder, net, images, labels, zs, seed=7):
    torch.manual_seed(seed)
    return holder.loss_fn(net, images, {"y": labels}, zs=zs)


def mean_of(x, a, s, labels):
    gap = x.double().flatten(1)[:, None] - a.reshape(-1, 1, 1) * ROWS.flatten(1).double()
    logits = -gap.square().sum(2) / (2 * s.reshape(-1, 1) ** 2)
    logits = logits.masked_fill(labels[:, None] != LABELS, -torch.inf)
    return (logits.softmax(1) @ ROWS.flatten(1).double()).reshape(x.shape)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_the_loss_is_that_of_the_steered_target(path_type):
    holder, net = SimpleNamespace(loss_fn=SILoss(path_type)), Net()
    images, labels, zs = batch()
    plain, alignment = run(holder, net, images, labels, zs)
    maker = one_target_maker(holder)
    assert isinstance(maker.path, LinearPath if path_type == "linear" else CosinePath)
    assert "minus the velocity, time 1 is noise and 0 is data" in maker.describe()
    idle = maker.attach(Scheme(path=maker.path))
    torch.testing.assert_close(run(holder, net, images, labels, zs)[0], plain)
    idle()
    scheme = Scheme(
        Oracle(LatentBank(ROWS, LABELS), maker.path), target=Mix(), weight=lambda t: 1 + t
    )
    detach = maker.attach(scheme)
    loss, aligned = run(holder, net, images, labels, zs)
    time = holder.loss_fn.drawn[0].double()
    a, s, d_a, d_s = (torch.as_tensor(v).double() for v in holder.loss_fn.interpolant(time))
    x, scale = net.seen[0], net.scale.detach().double()
    m = mean_of(x, a, s, labels)
    a, s, d_a, d_s = (v.expand(len(x)).reshape(-1, 1, 1, 1) for v in (a, s, d_a, d_s))
    target = d_a * m + d_s * (x.double() - a * m) / s
    expected = (scale * x.double() - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), (2 - time) * expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(aligned, alignment)
    torch.testing.assert_close(maker.last[1].double(), expected, rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(loss.sum(), net.scale)
    by_hand = 2 * ((scale * x.double() - target) * x.double()).flatten(1).mean(1)
    torch.testing.assert_close(slope.double(), ((2 - time) * by_hand).sum(), rtol=1e-4, atol=1e-4)
    detach()
    assert type(holder.loss_fn) is SILoss
    assert torch.equal(run(holder, net, images, labels, zs)[0], plain)


def test_a_smoothed_set_is_trained_on():
    images, labels, zs = batch()
    smoothing = Smoothing(LatentBank(ROWS), progress=False)
    holder, net = SimpleNamespace(loss_fn=SILoss()), Net()
    scheme = Scheme(smoothing=smoothing, strength=torch.ones_like)
    one_target_maker(holder).attach(scheme)
    loss, _ = run(holder, net, images, labels, zs)
    (time, noise), x1 = holder.loss_fn.drawn, scheme.last.x1
    assert not torch.equal(x1, images)
    s = time.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net.seen[0], (1 - s) * x1 + s * noise, rtol=1e-4, atol=1e-5)
    expected = (net.scale * net.seen[0] - (noise - x1)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_it_is_watched_without_a_trace():
    module = nn.Module()
    module.loss_fn, module.net, seen = SILoss(), Net(), []
    images, labels, zs = batch()
    plain = run(module, module.net, images, labels, zs)
    makers = find_target_makers(module)
    detach = makers[0].observe(seen.append)
    search = NetworkSearch(module, makers, lambda: [("batch[0]", images)], labels)
    watched = run(module, module.net, images, labels, zs)
    search.stop()
    detach()
    assert all(torch.equal(one, two) for one, two in zip(plain, watched, strict=True))
    assert torch.equal(seen[0].x1, images)
    torch.testing.assert_close(seen[0].t, 1 - module.loss_fn.drawn[0])
    network = search.result()
    xt, t = torch.randn(5, *SHAPE), torch.full((5,), 0.25)
    assert (network.name, network.conditional) == ("net", True)
    torch.testing.assert_close(network(xt, t, labels[:5]), -0.3 * xt)


def test_what_cannot_be_steered_there():
    with pytest.raises(ValueError, match="keep it as an attribute"):
        one_target_maker(SILoss())
    with pytest.raises(ValueError, match="prediction, 'x', is not known"):
        one_target_maker(SimpleNamespace(loss_fn=SILoss(prediction="x")))
    maker = one_target_maker(SimpleNamespace(loss_fn=SILoss()))
    with pytest.raises(ValueError, match="is given its times"):
        maker.attach(Scheme(timesteps=LogitNormal()))
