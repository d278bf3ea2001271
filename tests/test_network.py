"""The network that a training step calls is found, and asked as the training asks it."""

import copy

import pytest
import torch
from torch import nn

from stagewise import (
    DIFFUSERS,
    Convention,
    CosinePath,
    LinearPath,
    Prediction,
    VPPath,
)
from stagewise.adapters import find_target_makers
from stagewise.adapters.network_search import NetworkSearch
from stagewise.losses import FlowMatchingLoss
from stagewise.noise import noise_of
from stagewise.paths import expand_like
from stagewise.sampling import model_velocity

SHAPE, CLASSES = (3, 2, 2), 5


class Net(nn.Module):
    """Any order of arguments, with or without labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(12, 12)
        self.embed = nn.Embedding(CLASSES, 12)

    def forward(self, x, t, y=None, scale=1.0):
        h = self.inner(x.flatten(1)) * (1 + t.reshape(-1, 1))
        if y is not None:
            h = h + self.embed(y)
        return scale * h.reshape(x.shape)


class Swapped(Net):
    def forward(self, t, x, **kwargs):
        return super().forward(x, t, **kwargs)


class Model(nn.Module):
    def __init__(self, net=None, **objective):
        super().__init__()
        self.net, self.loss = net or Net(), FlowMatchingLoss(**objective)


def batch(n=64):
    draws = torch.Generator().manual_seed(1)
    x1 = 2 * torch.randn(n, *SHAPE, generator=draws) + 1
    return x1, torch.randint(CLASSES, (n,), generator=draws)


def search(model, step, x1=None, labels=None):
    """What a search finds in one call of `step(x1, labels)`."""
    own_x1, own_labels = batch()
    x1, labels = (own_x1, own_labels) if x1 is None else (x1, labels)
    found = NetworkSearch(model, find_target_makers(model), lambda: [("batch[0]", x1)], labels)
    torch.manual_seed(2)
    step(own_x1, own_labels)
    found.stop()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return found


def queries(n=7):
    draws = torch.Generator().manual_seed(3)
    xt = torch.randn(n, *SHAPE, generator=draws)
    return xt, 0.05 + 0.9 * torch.rand(n, generator=draws), torch.arange(n) % CLASSES


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "edm"])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath()], ids=repr)
@pytest.mark.parametrize("convention", [Convention(), Convention(1, 0, -1), DIFFUSERS], ids=str)
def test_the_velocity_is_that_of_the_prediction(kind, path, convention):
    model = Model(path=path, prediction=kind, convention=convention)
    network = search(model, lambda x1, y: model.loss(model.net, x1, y)).result()
    xt, t, labels = queries()
    expected = model_velocity(
        lambda x, time: model.net(x, time, labels),
        path=path,
        prediction=Prediction(kind),
        convention=convention,
    )
    assert network.name == "net"
    assert network.conditional
    torch.testing.assert_close(network(xt, t, labels), expected(xt, t).detach())


@pytest.mark.parametrize("how", ["positions", "names", "swapped", "columns", "forward"])
def test_arguments_are_found_wherever_they_are(how):
    model = Model(Swapped() if how == "swapped" else None)
    if how == "columns":
        model.net = nn.Linear(13, 12)

    def call(xt, t, y):
        if how == "names":
            return model.net(t=t, x=xt, y=y, scale=2.0)
        if how == "swapped":
            return model.net(t, xt)
        if how == "columns":
            return model.net(torch.cat([xt, t[:, None]], 1))
        return model.net(xt, t, y)

    flat = how == "columns"

    def step(x1, y):
        return model.loss(lambda xt, t: call(xt, t, y), x1.flatten(1) if flat else x1)

    x1, labels = batch()
    network = search(model, step, x1.flatten(1) if flat else x1, labels).result()
    xt, t, y = queries()
    xt = xt.flatten(1) if flat else xt
    torch.testing.assert_close(network(xt, t, y), call(xt, t, y).detach())
    assert network.conditional == (how not in ("swapped", "columns"))


@pytest.mark.parametrize("first", [True, False])
def test_channels_beside_x_t_are_given_again(first):
    model = Model()
    model.net = nn.Conv2d(5, 3, 1)
    model.net.forward = lambda x, t: (1 + t.reshape(-1, 1, 1, 1)) * nn.Conv2d.forward(model.net, x)
    other = torch.randn(64, 2, 2, 2)

    def call(xt, t, other):
        return model.net(torch.cat([xt, other] if first else [other, xt], 1), t)

    found = search(model, lambda x1, y: model.loss(lambda xt, t: call(xt, t, other), x1))
    network = found.result()
    assert network.conditions == ("x: 2 channels beside those of x_t",)
    assert found.line.endswith(f"net(torch.cat([{'xt, x' if first else 'x, xt'}], 1), t)")
    xt, t, _ = queries()
    torch.testing.assert_close(network(xt, t), call(xt, t, other[:7]).detach())


def test_torchcfm_and_a_step_of_ones_own():
    torchcfm = pytest.importorskip("torchcfm")
    model = Model()
    model.loss, model.matcher = None, torchcfm.ConditionalFlowMatcher(sigma=0.1)

    def step(x1, y):
        t, xt, u = model.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return (model.net(xt, t, y) - u).square().mean()

    network = search(model, step).result()
    assert network.maker.library == "torchcfm"
    xt, t, y = queries()
    torch.testing.assert_close(network(xt, t, y), model.net(xt, t, y).detach())


def test_flow_matching_with_times_from_anywhere():
    flow_matching = pytest.importorskip("flow_matching.path")
    scheduler = pytest.importorskip("flow_matching.path.scheduler")
    model = Model()
    model.loss = None
    model.path = flow_matching.AffineProbPath(scheduler.CosineScheduler())

    def step(x1, y):
        s = model.path.sample(t=torch.rand(len(x1)), x_0=torch.randn_like(x1), x_1=x1)
        return (model.net(x=s.x_t, t=s.t, y=y) - s.dx_t).square().mean()

    network = search(model, step).result()
    xt, t, y = queries()
    torch.testing.assert_close(network(xt, t, y), model.net(xt, t, y).detach())


class EDMLoss:
    """The interface of EDM's, with its own draw of sigma."""

    P_mean, P_std, sigma_data = -0.4, 1.0, 0.5

    def __call__(self, net, images, labels=None):
        sigma = (self.P_std * torch.randn(len(images), 1, 1, 1) + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoised = net(images + sigma * torch.randn_like(images), sigma, labels)
        return weight * (denoised - images) ** 2


class Denoiser(Net):
    def forward(self, x, sigma, labels=None):
        h = self.inner(x.flatten(1)) / (1 + sigma.reshape(-1, 1)) + labels @ self.embed.weight
        return h.reshape(x.shape)


def test_edm_is_asked_in_its_own_units():
    model = Model(Denoiser())
    model.loss, model.edm = None, EDMLoss()

    def step(x1, y):
        return model.edm(model.net, x1, nn.functional.one_hot(y, CLASSES).float())

    network = search(model, step).result()
    xt, t, y = queries()
    s = expand_like(t, xt)
    hot = nn.functional.one_hot(y, CLASSES).float()
    denoised = model.net(xt / s, (1 - s) / s, hot).detach()
    # The velocity of the linear path is (x_1 - x_t) / (1 - t).
    torch.testing.assert_close(network(xt, t, y), (denoised - xt) / (1 - s), rtol=1e-4, atol=1e-4)


def test_a_compiled_copy_is_found_outside_of_what_is_compiled():
    model = Model()
    model.net = torch.compile(model.net, backend="eager")
    network = search(model, lambda x1, y: model.loss(model.net, x1, y)).result()
    xt, t, y = queries()
    torch.testing.assert_close(network(xt, t, y), model.net(xt, t, y).detach())


def test_what_is_compiled_in_place_is_left_alone():
    model = Model()
    model.net.compile(backend="eager")
    with pytest.raises(ValueError, match="Found no network"):
        search(model, lambda x1, y: model.loss(model.net, x1, y)).result()


def test_the_same_network_in_a_copy():
    model = Model()
    network = search(model, lambda x1, y: model.loss(model.net, x1, y)).result()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.net.inner.bias.add_(1)
    xt, t, y = queries()
    torch.testing.assert_close(network.of(other)(xt, t, y), other.net(xt, t, y).detach())
    assert not torch.equal(network.of(other)(xt, t, y), network(xt, t, y))


def test_a_teacher_without_gradients_is_no_network():
    model = Model()
    model.a_teacher = Net()

    def step(x1, y):
        def call(xt, t):
            with torch.no_grad():
                model.a_teacher(xt, t, y)
            return model.net(xt, t, y)

        return model.loss(call, x1)

    assert search(model, step).result().name == "net"


@pytest.mark.parametrize("change", ["scaled", "reordered", "reversed"])
def test_samples_that_are_not_the_batch_are_refused(change):
    model = Model()

    def step(x1, y):
        x1 = {"scaled": 0.5 * x1, "reordered": x1.flip(0), "reversed": x1}[change]
        if change == "reversed":
            return model.loss(lambda xt, t: model.net(xt, 1 - t, y), x1)
        return model.loss(model.net, x1, y)

    with pytest.raises(
        ValueError, match=r"(?s)Found no network.*net: Net\(float32 \(64, 3, 2, 2\)"
    ):
        search(model, step).result()


def test_what_bank_rows_do_not_have_is_named():
    class Texted(Net):
        def forward(self, x, t, text):
            return super().forward(x, t) + text.mean()

    model = Model(Texted())

    def step(x1, y):
        return model.loss(model.net, x1, torch.randn(len(x1), 8, 4))

    assert search(model, step).result().conditions == ("text: float32 (64, 8, 4)",)


def test_labels_that_are_not_given_are_refused():
    model = Model()
    network = search(model, lambda x1, y: model.loss(model.net, x1, y)).result()
    xt, t, _ = queries()
    with pytest.raises(ValueError, match="Expected labels, got none"):
        network(xt, t)


def test_an_answer_of_another_shape_is_refused():
    model = Model()
    network = search(model, lambda x1, y: model.loss(model.net, x1, y)).result()
    xt, t, _ = queries()
    with pytest.raises(ValueError, match=r"return a prediction of shape \(7, 3, 2, 2\)"):
        network.velocity(torch.zeros(7, 6, 2, 2), xt, t)


def test_noise_is_what_it_was_made_from():
    x1, x0 = torch.randn(200, 4).double(), torch.randn(200, 4).double()
    t = torch.cat([torch.rand(199), torch.ones(1)])
    path = LinearPath()
    found, known = noise_of(path, path.interpolate(x0, x1, t.double()).float(), t, x1)
    torch.testing.assert_close(found[known].double(), x0[known], rtol=0, atol=1e-3)
    assert known.sum() == 199
    assert not found[~known].any()
