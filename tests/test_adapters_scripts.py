"""Adapters of interfaces that are no package: SiT's transport, EDM's losses, diffusers' scripts.

Each is written down here anew, as small as its interface allows, with what an adapter could trip
over: the type check of the transport, the one noise that makes input and target. The scripts are
written around the scheduler and the sampling of diffusers itself.
"""

import doctest
import enum
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from stagewise import (
    CosinePath,
    EDMPath,
    LatentBank,
    LinearPath,
    LogitNormal,
    Oracle,
    Smoothing,
    VPPath,
    sources,
)
from stagewise.adapters import diffusers as diffusers_adapter
from stagewise.adapters import diffusers_target, find_target_makers, one_target_maker
from stagewise.adapters.network_search import NetworkSearch
from stagewise.callbacks import StageScheme
from stagewise.schemes import Phase, Phases, Scheme
from stagewise.targets import Mix
from stagewise.transitions import AtStep

SHAPE = (2, 3)
ROWS = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(40) % 4


def rows_of_batch(n=16, seed=0):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:n]
    return ROWS[order], LABELS[order]


def posterior_mean(xt, alpha, sigma, labels=None):
    """`m` by brute force in float64, over all rows or those of each label."""
    rows = ROWS.flatten(1).double()
    gap = xt.double().flatten(1)[:, None] - alpha.double().reshape(-1, 1, 1) * rows
    logits = -gap.square().sum(2) / (2 * sigma.double().reshape(-1, 1) ** 2)
    if labels is not None:
        logits = logits.masked_fill(labels[:, None] != LABELS, -torch.inf)
    return (logits.softmax(1) @ rows).reshape(xt.shape)


def scheme_for(maker, labels=None, **options):
    return Scheme(Oracle(LatentBank(ROWS, labels), maker.path), **options)


class Net(nn.Module):
    """Notes what it is called with; its output is differentiable in one number."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, t, *args, **kwargs):
        self.seen.append((x.clone(), t.clone()))
        return self.scale * x


# -- SiT and LightningDiT ------------------------------------------------------------------------


class ModelType(enum.Enum):
    NOISE = enum.auto()
    SCORE = enum.auto()
    VELOCITY = enum.auto()


def expand(t, x):
    return t.reshape(-1, *(1 for _ in x.shape[1:]))


class ICPlan:
    path = LinearPath()

    def compute_alpha_t(self, t):
        return t, 1

    def compute_sigma_t(self, t):
        return 1 - t, -1

    def plan(self, t, x0, x1):
        (alpha, d_alpha), (sigma, d_sigma) = (
            compute(expand(t, x1)) for compute in (self.compute_alpha_t, self.compute_sigma_t)
        )
        return t, alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0


class ReversedPlan(ICPlan):
    """RAE's: time 1 is noise."""

    def compute_alpha_t(self, t):
        return 1 - t, -1

    def compute_sigma_t(self, t):
        return t, 1


class GVPCPlan(ICPlan):
    path = CosinePath()

    def compute_alpha_t(self, t):
        return torch.sin(t * torch.pi / 2), torch.pi / 2 * torch.cos(t * torch.pi / 2)

    def compute_sigma_t(self, t):
        return torch.cos(t * torch.pi / 2), -torch.pi / 2 * torch.sin(t * torch.pi / 2)


class VPCPlan(ICPlan):
    path = VPPath()

    def compute_alpha_t(self, t):
        alpha, _, d_alpha, _ = self.path(t)
        return alpha, d_alpha

    def compute_sigma_t(self, t):
        _, sigma, _, d_sigma = self.path(t)
        return sigma, d_sigma


class SiT:
    """SiT's `Transport`: the interval of t hangs on the type of the plan."""

    def __init__(self, plan=ICPlan, model_type=ModelType.VELOCITY):
        self.path_sampler, self.model_type = plan(), model_type
        self.train_eps = self.sample_eps = 0.0 if model_type is ModelType.VELOCITY else 1e-3

    def check_interval(self, train_eps, sample_eps):
        if type(self.path_sampler) in [VPCPlan]:
            return 0, 1 - train_eps
        if type(self.path_sampler) in [ICPlan, ReversedPlan, GVPCPlan]:
            kept = 0 if self.model_type is ModelType.VELOCITY else train_eps
            return kept, 1 - kept
        raise AssertionError("the plan has been replaced")

    def sample(self, x1):
        x0 = torch.randn_like(x1)
        start, end = self.check_interval(self.train_eps, self.sample_eps)
        t = torch.rand((len(x1),)) * (end - start) + start
        return t.to(x1), x0, x1

    def training_losses(self, model, x1, model_kwargs=None):
        t, x0, x1 = self.sample(x1)
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        output = model(xt, t, **(model_kwargs or {}))
        sigma, _ = self.path_sampler.compute_sigma_t(expand(t, xt))
        error = {
            ModelType.VELOCITY: lambda: output - ut,
            ModelType.NOISE: lambda: output - x0,
            ModelType.SCORE: lambda: output * sigma + x0,
        }[self.model_type]()
        return {"pred": output, "loss": error.square().flatten(1).mean(1)}


class LightningDiT(SiT):
    """Draws logit-normal times unless it is given an interval."""

    def sample(self, x1, sp_timesteps=None, shifted_mu=0):
        x0 = torch.randn_like(x1)
        if sp_timesteps is not None:
            start, end = sp_timesteps
            return (torch.rand(len(x1)) * (end - start) + start).to(x1), x0, x1
        return torch.sigmoid(torch.randn(len(x1)) + shifted_mu).to(x1), x0, x1

    def training_losses(self, model, x1, model_kwargs=None, sp_timesteps=None, shifted_mu=0):
        t, x0, x1 = self.sample(x1, sp_timesteps, shifted_mu)
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        output = model(xt, t, **(model_kwargs or {}))
        cosine = 1 - torch.cosine_similarity(output, ut, dim=1).flatten(1).mean(1)
        return {
            "pred": output,
            "loss": (output - ut).square().flatten(1).mean(1),
            "cos_loss": cosine,
        }


TRANSPORTS = [
    (kind, plan, model_type)
    for kind, plan in (
        *((SiT, ICPlan), (SiT, GVPCPlan), (SiT, VPCPlan), (SiT, ReversedPlan)),
        (LightningDiT, ICPlan),
    )
    for model_type in (ModelType if kind is SiT else [ModelType.VELOCITY])
]


def losses(transport, x1, net=None, seed=1, **options):
    torch.manual_seed(seed)
    terms = transport.training_losses(net or Net(), x1, **options)
    return terms["loss"], terms["pred"], torch.get_rng_state()


@pytest.mark.parametrize(("kind", "plan", "model_type"), TRANSPORTS)
def test_transport_unsteered_is_bit_identical(kind, plan, model_type):
    x1, labels = rows_of_batch()
    transport = kind(plan, model_type)
    expected = losses(transport, x1, model_kwargs={"y": labels})
    maker = one_target_maker(transport)
    assert repr(maker.path) == repr(plan.path)
    for scheme in (Scheme(path=maker.path), scheme_for(maker, LABELS, target=Mix(0.0))):
        detach = maker.attach(scheme)
        found = losses(transport, x1, model_kwargs={"y": labels})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        detach()


@pytest.mark.parametrize(("kind", "plan", "model_type"), TRANSPORTS)
def test_transport_target_is_the_oracle_of_its_prediction(kind, plan, model_type):
    x1, labels = rows_of_batch()
    x1 = x1.double()
    transport, net = kind(plan, model_type), Net().double()
    maker = one_target_maker(transport)
    maker.attach(scheme_for(maker, LABELS, target=Mix()))
    loss, pred, _ = losses(transport, x1, net, model_kwargs={"y": labels})
    ((xt, t),) = net.seen
    reverse = plan is ReversedPlan
    path = plan.path(1 - t if reverse else t)
    alpha, sigma, d_alpha, d_sigma = (expand(value, x1) for value in path)
    m = posterior_mean(xt, alpha, sigma, labels)
    noise = (xt - alpha * m) / sigma
    error = {
        ModelType.VELOCITY: pred - (-1 if reverse else 1) * (d_alpha * m + d_sigma * noise),
        ModelType.NOISE: pred - noise,
        ModelType.SCORE: pred * sigma + noise,
    }[model_type]
    expected = error.square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    unsteered, *_ = losses(kind(plan, model_type), x1, net, model_kwargs={"y": labels})
    assert (unsteered - loss).abs().max() > 0.05


def smoothing_scheme(maker):
    """Draws half of the samples anew, whatever t is."""
    smoothing = Smoothing(LatentBank(ROWS), 4, progress=False)
    return Scheme(path=maker.path, smoothing=smoothing, strength=lambda t: (t >= 0.5).to(t.dtype))


@pytest.mark.parametrize(("kind", "plan", "model_type"), TRANSPORTS)
def test_transport_trains_on_what_was_smoothed(kind, plan, model_type):
    x1, _ = rows_of_batch()
    kept, transport = x1.clone(), kind(plan, model_type)
    maker = one_target_maker(transport)
    scheme = smoothing_scheme(maker)
    maker.attach(scheme)
    found = losses(transport, x1)
    drawn, late = scheme.last.x1, scheme.last.t >= 0.5
    assert torch.equal((drawn == x1).flatten(1).all(1), ~late)
    assert 0 < late.sum() < len(late)
    assert torch.equal(x1, kept)
    for one, other in zip(found, losses(kind(plan, model_type), drawn), strict=True):
        torch.testing.assert_close(one, other)


def takes_rows(made_by, x1, train):
    """Whether samples that are no rows are refused, and smoothed once their rows are said."""
    rows, noisy = LatentBank(ROWS).find(x1), x1 + 0.01 * torch.randn(x1.shape)
    maker = one_target_maker(made_by)
    scheme = smoothing_scheme(maker)
    maker.attach(scheme)
    with pytest.raises(ValueError, match=r"with stagewise\.sources\(i\):"):
        train(made_by, noisy)
    with sources(rows):
        train(made_by, noisy)
    kept = (scheme.last.x1 == noisy).flatten(1).all(1)
    return torch.equal(scheme.last.source, rows) and torch.equal(kept, scheme.last.t < 0.5)


@pytest.mark.parametrize(("kind", "plan", "model_type"), TRANSPORTS)
def test_transport_takes_the_rows_of_samples_that_are_none(kind, plan, model_type):
    assert takes_rows(kind(plan, model_type), rows_of_batch()[0], losses)


def test_transport_finds_the_class_itself_where_the_model_has_no_labels():
    x1, labels = rows_of_batch()
    transport = SiT()
    maker = one_target_maker(transport)
    detach = maker.attach(scheme_for(maker, LABELS, target=Mix()))
    without = losses(transport, x1)
    detach()
    maker.attach(scheme_for(maker, LABELS, target=Mix()))
    assert torch.equal(losses(transport, x1, model_kwargs={"y": labels})[0], without[0])


def test_transport_asks_for_the_classes_that_the_model_is_given():
    x1, _ = rows_of_batch()
    transport, net = SiT(), Net().double()
    oracle = Oracle(LatentBank(ROWS, LABELS), null_class=4)
    one_target_maker(transport).attach(Scheme(oracle, target=Mix()))
    dropped = torch.full((len(x1),), 4)  # as for classifier-free guidance
    loss, pred, _ = losses(transport, x1.double(), net, model_kwargs={"y": dropped})
    ((xt, t),) = net.seen
    target = (posterior_mean(xt, t, 1 - t) - xt) / expand(1 - t, xt)
    torch.testing.assert_close(loss, (pred - target).square().flatten(1).mean(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"y": torch.randn(16, 7)},
        {"y": nn.functional.one_hot(torch.arange(16) % 4)},
        {"y": torch.rand(16)},
        {"y": torch.arange(16) % 4, "text": torch.randn(16, 3, 8)},
        {"context": {"mask": torch.ones(16, 3, dtype=torch.bool)}},
    ],
)
def test_transport_refuses_conditions_that_are_no_classes(kwargs):
    x1, _ = rows_of_batch()
    for bank_labels in (None, LABELS):
        transport = SiT()
        maker = one_target_maker(transport)
        detach = maker.attach(scheme_for(maker, bank_labels, target=Mix()))
        with pytest.raises(ValueError, match="not the class of each sample.*class_wise=False"):
            losses(transport, x1, model_kwargs=kwargs)
        detach()
        maker.attach(scheme_for(maker, bank_labels, target=Mix(), class_wise=False))
        losses(transport, x1, model_kwargs=kwargs)
        transport = SiT()
        one_target_maker(transport).attach(Scheme(timesteps=LogitNormal(), weight=lambda t: t))
        losses(transport, x1, model_kwargs=kwargs)


def test_transport_takes_classes_in_other_shapes():
    x1, labels = rows_of_batch()
    transport = SiT()
    maker = one_target_maker(transport)
    scheme = scheme_for(maker, LABELS, target=Mix())
    scheme.rows_checked = True  # the first call refuses other classes than those of the rows
    maker.attach(scheme)
    given = (labels + 1) % 4
    expected, *_ = losses(transport, x1, model_kwargs={"y": given, "flag": True, "zs": None})
    assert not torch.equal(losses(transport, x1, model_kwargs={"y": labels})[0], expected)
    for same in (given[:, None], given.float(), given.double()[:, None]):
        assert torch.equal(losses(transport, x1, model_kwargs={"y": same})[0], expected)
    other = SiT()
    one_target_maker(other).attach(scheme_for(maker, target=Mix()))
    with pytest.raises(ValueError, match=r"labels, and a bank without classes.*LatentBank\(x, lab"):
        losses(other, x1, model_kwargs={"y": labels})


def test_transport_looks_at_all_phases():
    x1, labels = rows_of_batch()
    transport = SiT()
    maker = one_target_maker(transport)
    maker.attach(Phases([Phase(Scheme(), AtStep(9)), Phase(scheme_for(maker, target=Mix()))]))
    with pytest.raises(ValueError, match="class_wise=False"):
        losses(transport, x1, model_kwargs={"y": labels})


def test_transport_weighs_and_reports_the_losses():
    x1, _ = rows_of_batch()
    transport, net = SiT(), Net()
    expected, *_ = losses(transport, x1, net)
    maker = one_target_maker(transport)
    maker.attach(Scheme(weight=lambda t: 1 + t))
    assert maker.last is None
    loss, *_ = losses(transport, x1, net)
    t = net.seen[-1][1]
    torch.testing.assert_close(loss, (1 + t) * expected)
    assert torch.equal(maker.last[0], t)
    assert torch.equal(maker.last[1], expected)
    assert not maker.last[1].requires_grad
    loss.mean().backward()
    assert net.scale.grad.abs() > 0


@pytest.mark.parametrize("kind", [SiT, LightningDiT])
@pytest.mark.parametrize("model_type", [ModelType.VELOCITY, ModelType.SCORE])
def test_transport_draws_t_from_the_scheme_once(kind, model_type):
    x1, _ = rows_of_batch()
    transport, net = kind(model_type=model_type), Net()
    sampler = LogitNormal(-1, 0.3)
    one_target_maker(transport).attach(Scheme(timesteps=sampler))
    *_, state = losses(transport, x1, net)
    torch.manual_seed(1)
    x0 = torch.randn_like(x1)
    start, end = transport.check_interval(transport.train_eps, transport.sample_eps)
    assert (start > 0) == (model_type is ModelType.SCORE)
    t = sampler.sample(len(x1)) * (end - start) + start
    assert torch.equal(net.seen[0][1], t)
    assert torch.equal(net.seen[0][0], ICPlan().plan(t, x0, x1)[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_transport_of_reversed_time_draws_and_reports_ours():
    x1, _ = rows_of_batch()
    transport, net = SiT(ReversedPlan), Net()
    maker = one_target_maker(transport)
    assert "predicts minus the velocity, time 1 is noise and 0 is data" in maker.describe()
    maker.attach(Scheme(timesteps=LogitNormal(-2, 0.1)))
    losses(transport, x1, net)
    assert net.seen[0][1].min() > 0.8, "near the noise"
    torch.testing.assert_close(maker.last[0], 1 - net.seen[0][1])


def test_lightningdit_keeps_its_own_times_unless_the_scheme_has_some():
    x1, _ = rows_of_batch()
    transport, net = LightningDiT(), Net()
    detach = one_target_maker(transport).attach(Scheme())
    losses(transport, x1, net, sp_timesteps=(0.9, 0.95))
    assert net.seen[0][1].min() >= 0.9
    detach()
    one_target_maker(transport).attach(Scheme(timesteps=LogitNormal(-1, 0.3)))
    with pytest.raises(ValueError, match="module was given its times, but the scheme draws them"):
        losses(transport, x1, net, sp_timesteps=(0.9, 0.95))


def test_lightningdit_weighs_both_of_its_losses():
    x1, _ = rows_of_batch()
    transport, net = LightningDiT(), Net()
    torch.manual_seed(1)
    expected = transport.training_losses(net, x1)
    one_target_maker(transport).attach(Scheme(weight=lambda t: 1 + t))
    torch.manual_seed(1)
    terms = transport.training_losses(net, x1)
    weight = 1 + net.seen[-1][1]
    assert torch.equal(terms["pred"], expected["pred"])
    for key in ("loss", "cos_loss"):
        torch.testing.assert_close(terms[key], weight * expected[key])


def test_transport_outside_of_its_losses_is_left_alone():
    x1, _ = rows_of_batch()
    transport = SiT()
    maker = one_target_maker(transport)
    maker.attach(scheme_for(maker, target=Mix(), timesteps=LogitNormal()))
    torch.manual_seed(0)
    t, x0, _ = transport.sample(x1)
    torch.manual_seed(0)
    assert torch.equal(t, SiT().sample(x1)[0])
    assert torch.equal(transport.path_sampler.plan(t, x0, x1)[2], x1 - x0)


def test_transport_is_what_it_was_even_after_an_error():
    x1, _ = rows_of_batch()
    transport = SiT()
    before, plan_before = dict(vars(transport)), dict(vars(transport.path_sampler))
    detach = one_target_maker(transport).attach(Scheme(path=LinearPath()))
    with pytest.raises(TypeError):
        transport.training_losses(lambda xt, t: None, x1)
    assert torch.equal(transport.path_sampler.plan(torch.zeros(16), x1, x1)[2], x1 - x1)
    detach()
    assert vars(transport) == before
    assert vars(transport.path_sampler) == plan_before


def test_transport_of_an_unknown_kind_is_refused():
    transport = SiT()
    transport.model_type = SimpleNamespace(name="FLOW_MAP")
    with pytest.raises(ValueError, match="model_type, 'flow_map', is not known"):
        one_target_maker(transport)


# -- EDM -----------------------------------------------------------------------------------------


class EDMLoss:
    """EDM's loss: one `images` makes input and target."""

    def __init__(self, P_mean=-0.4, P_std=1.0, sigma_data=0.5):  # noqa: N803
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def draw(self, images):
        normal = torch.randn([len(images), *(1 for _ in SHAPE)], device=images.device)
        sigma = (normal * self.P_std + self.P_mean).exp()
        return sigma, (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def __call__(self, net, images, labels=None, augment_pipe=None):
        sigma, weight = self.draw(images)
        y, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        noise = torch.randn_like(y) * sigma
        denoised = net(y + noise, sigma, labels, augment_labels=augment_labels)
        return weight * (denoised - y) ** 2


class EDM2Loss(EDMLoss):
    """EDM2's: with a learnt uncertainty."""

    def __call__(self, net, images, labels=None):
        sigma, weight = self.draw(images)
        noise = torch.randn_like(images) * sigma
        denoised, logvar = Uncertain(net)(images + noise, sigma, labels, return_logvar=True)
        return (weight / logvar.exp()) * (denoised - images) ** 2 + logvar


class Uncertain:
    def __init__(self, net):
        self.net = net

    def __call__(self, x, sigma, labels, return_logvar):
        assert return_logvar
        return self.net(x, sigma, labels, return_logvar=True), torch.full_like(sigma, 0.3)


class ModuleLoss(EDMLoss, nn.Module):
    """The same as a module."""

    def __init__(self):
        nn.Module.__init__(self)
        EDMLoss.__init__(self)

    __call__ = nn.Module.__call__
    forward = EDMLoss.__call__


EDM_KINDS = [EDMLoss, EDM2Loss, ModuleLoss]


def holder_of(kind):
    holder = nn.Module()
    holder.loss_fn = kind()
    return holder


def edm(holder, images, labels=None, net=None, **options):
    torch.manual_seed(1)
    loss = holder.loss_fn(net or Net(), images, labels, **options)
    return loss, torch.get_rng_state()


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_edm_unsteered_is_bit_identical(kind):
    images, _ = rows_of_batch()
    holder = holder_of(kind)
    expected = edm(holder, images)
    maker = one_target_maker(holder)
    maker.attach(scheme_for(maker, target=Mix(0.0)))
    kept = images.clone()
    found = edm(holder, images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(images, kept)


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_edm_trains_on_what_was_smoothed(kind):
    images, _ = rows_of_batch()
    kept, holder = images.clone(), holder_of(kind)
    maker = one_target_maker(holder)
    scheme = smoothing_scheme(maker)
    maker.attach(scheme)
    found = edm(holder, images)
    drawn, late = scheme.last.x1, scheme.last.t >= 0.5
    assert torch.equal((drawn == images).flatten(1).all(1), ~late)
    assert 0 < late.sum() < len(late)
    assert torch.equal(images, kept)
    for one, other in zip(found, edm(holder_of(kind), drawn), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_edm_takes_the_rows_of_images_that_are_none(kind):
    assert takes_rows(holder_of(kind), rows_of_batch()[0], edm)


@pytest.mark.parametrize("kind", EDM_KINDS)
@pytest.mark.parametrize("labelled", ["numbers", "one-hot", "not"])
def test_edm_target_is_the_posterior_mean(kind, labelled):
    images, labels = rows_of_batch()
    images, kept = images.double(), images.double()
    given = {"numbers": labels, "one-hot": nn.functional.one_hot(labels).float(), "not": None}
    holder, net = holder_of(kind), Net().double()
    maker = one_target_maker(holder)
    maker.attach(scheme_for(maker, LABELS, target=Mix()))
    loss, _ = edm(holder, images, given[labelled], net)
    ((x, sigma),) = net.seen
    m = posterior_mean(x, torch.ones(len(x)), sigma, labels)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * (0.5 * x - m) ** 2
    if kind is EDM2Loss:
        expected = expected / torch.tensor(0.3).exp() + 0.3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)
    assert (loss - edm(holder_of(kind), images, None, net)[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_edm_labels_without_columns_are_none(kind):
    """As EDM's data set gives them where there are no classes."""
    images, _ = rows_of_batch()
    results = []
    for labels in (None, torch.zeros(len(images), 0)):
        holder, net = holder_of(kind), Net()
        maker = one_target_maker(holder)
        maker.attach(scheme_for(maker, LABELS, target=Mix()))
        results.append(edm(holder, images, labels, net)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("labels", [None, torch.arange(16) % 4])
def test_edm_network_is_found_beside_labels_without_columns(labels):
    images, _ = rows_of_batch()
    module = holder_of(EDMLoss)
    module.net = Net()
    search = NetworkSearch(
        module, find_target_makers(module), lambda: [("batch[0]", images)], labels
    )
    edm(module, images, torch.zeros(len(images), 0), module.net)
    search.stop()
    network = search.result()
    assert (network.name, network.conditional) == ("net", False)
    xt, t = torch.randn(5, *SHAPE), torch.full((5,), 0.25)
    torch.testing.assert_close(network(xt, t), (0.5 * xt / 0.25 - xt) / 0.75)


def test_edm_rows_without_a_label_see_the_whole_bank():
    images, labels = rows_of_batch()
    one_hot = nn.functional.one_hot(labels).float()
    one_hot[::2] = 0
    holder, net = holder_of(EDMLoss), Net()
    maker = one_target_maker(holder)
    maker.attach(scheme_for(maker, LABELS, target=Mix()))
    loss, _ = edm(holder, images, one_hot, net)
    ((x, sigma),) = net.seen
    m = posterior_mean(x, torch.ones(len(x)), sigma)[::2].float()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(
        loss[::2], weight[::2] * (0.5 * x[::2] - m) ** 2, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_edm_weighs_and_reports_the_losses(kind):
    images, _ = rows_of_batch()
    holder, net = holder_of(kind), Net()
    expected, _ = edm(holder, images)
    maker = one_target_maker(holder)
    maker.attach(Scheme(weight=lambda t: 1 + t))
    loss, _ = edm(holder, images, None, net)
    t = 1 / (1 + net.seen[0][1])
    torch.testing.assert_close(loss, (1 + t) * expected)
    assert torch.equal(maker.last[0], t.flatten())
    assert torch.equal(maker.last[1], expected.flatten(1).mean(1))
    loss.sum().backward()
    assert net.scale.grad.abs() > 0


@pytest.mark.parametrize("kind", EDM_KINDS)
def test_edm_is_what_it_was(kind):
    holder = holder_of(kind)
    loss_fn = holder.loss_fn
    before, of_holder = dict(vars(loss_fn)), dict(vars(holder))
    detach = one_target_maker(holder).attach(Scheme())
    assert holder.loss_fn.P_mean == -0.4, "what it holds can be read meanwhile"
    with pytest.raises(ValueError, match="steered by another scheme already"):
        one_target_maker(holder).attach(Scheme())
    detach()
    assert holder.loss_fn is loss_fn
    assert vars(loss_fn) == before
    assert vars(holder) == of_holder


def test_edm_network_is_no_loss():
    class Precond(nn.Module):
        P_mean, P_std, sigma_data = -0.4, 1.0, 0.5

        def forward(self, x, sigma, labels=None):
            return x

    assert find_target_makers(Precond()) == []


def test_edm_refuses_what_it_cannot_steer():
    images, _ = rows_of_batch()
    holder = holder_of(EDMLoss)
    with pytest.raises(ValueError, match="keep it as an attribute"):
        one_target_maker(holder.loss_fn)
    with pytest.raises(ValueError, match="given its times"):
        one_target_maker(holder).attach(Scheme(timesteps=LogitNormal()))
    one_target_maker(holder).attach(Scheme())
    with pytest.raises(ValueError, match="without augment_pipe"):
        holder.loss_fn(Net(), images, None, lambda x: (x.flip(-1), None))


# -- diffusers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers():
    """The package, which takes seconds to import."""
    pytest.importorskip("diffusers.training_utils")
    return pytest.importorskip("diffusers")


@pytest.fixture
def script(diffusers):
    """The SD3 script up to its target: noisy input, noise, sigmas and timesteps."""

    def run(x, *, shift=1.0, weighting="none", seed=0):
        torch.manual_seed(seed)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        noise = torch.randn_like(x)
        u = diffusers.training_utils.compute_density_for_timestep_sampling(
            weighting, len(x), logit_mean=0.0, logit_std=1.0, mode_scale=1.29
        )
        timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
        steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
        sigmas = expand(scheduler.sigmas[steps], x).to(x)
        return (1 - sigmas) * x + sigmas * noise, noise, sigmas, timesteps

    return run


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["none", "logit_normal", "mode"])
def test_diffusers_target_is_minus_the_marginal_velocity(script, shift, weighting):
    x, labels = rows_of_batch()
    x = x.double()
    noisy, noise, sigmas, timesteps = script(x, shift=shift, weighting=weighting)
    for bank_labels, own in ((None, None), (LABELS, labels)):
        wise = bank_labels is not None
        scheme = Scheme(Oracle(LatentBank(ROWS, bank_labels)), target=Mix(), class_wise=wise)
        target = diffusers_target(noisy, x, noise, sigmas, scheme)
        m = posterior_mean(noisy, 1 - sigmas, sigmas, own)
        torch.testing.assert_close(target, (noisy - m) / sigmas, rtol=1e-4, atol=1e-4)
        data = diffusers_target(noisy, x, noise, sigmas.flatten(), scheme, prediction="data")
        torch.testing.assert_close(data, m, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scheme.last.t, 1 - timesteps.double() / 1000, rtol=0, atol=1e-6)


def test_diffusers_target_unsteered_is_the_scripts(script):
    x, _ = rows_of_batch()
    noisy, noise, sigmas, _ = script(x)
    mixing = Scheme(Oracle(LatentBank(ROWS)), target=Mix(0.0), class_wise=False)
    for scheme in (Scheme(), mixing):
        assert torch.equal(diffusers_target(noisy, x, noise, sigmas, scheme), noise - x)
        data = diffusers_target(noisy, x, noise, sigmas, scheme, prediction="data")
        assert torch.equal(data, x)


def test_diffusers_target_takes_the_rows_of_latents_that_are_none(script):
    x, _ = rows_of_batch()
    rows = LatentBank(ROWS).find(x)
    latents = x + 0.01 * torch.randn(x.shape)
    noisy, noise, sigmas, _ = script(latents)
    mixing = Scheme(Oracle(LatentBank(ROWS)), target=Mix(), class_wise=False)
    with sources(rows):
        target = diffusers_target(noisy, latents, noise, sigmas, mixing)
    told, _ = mixing(latents - noise, xt=noisy, t=1 - sigmas, x1=latents, source=rows)
    assert torch.equal(target, -told)
    smoothing = Scheme(
        smoothing=Smoothing(LatentBank(ROWS), 4, progress=False), strength=torch.ones_like
    )
    with sources(rows):
        drawn = smoothing.smooth(latents, t=1 - sigmas)
    noisy = (1 - sigmas) * drawn + sigmas * noise
    torch.testing.assert_close(
        diffusers_target(noisy, drawn, noise, sigmas, smoothing), noise - drawn
    )
    assert torch.equal(smoothing.last.source, rows)


def test_diffusers_example():
    failed, tried = doctest.testmod(diffusers_adapter)
    assert (failed, tried > 0) == (0, True)


def test_diffusers_target_takes_labels(script):
    x, labels = rows_of_batch()
    x = x.double()
    noisy, noise, sigmas, _ = script(x)
    scheme = Scheme(Oracle(LatentBank(ROWS, LABELS)), target=Mix())
    everywhere = diffusers_target(noisy, x, noise, sigmas, scheme, labels=[None] * len(x))
    m = posterior_mean(noisy, 1 - sigmas, sigmas)
    torch.testing.assert_close(everywhere, (noisy - m) / sigmas, rtol=1e-4, atol=1e-4)


def test_diffusers_scheduler_is_recognised_and_says_what_to_do(diffusers):
    module = SimpleNamespace(noise_scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    (maker,) = find_target_makers(module)
    assert "minus the velocity, time 1000 is noise and 0 is data" in maker.describe()
    with pytest.raises(ValueError, match=r"module\.noise_scheduler .*write diffusers_target\("):
        one_target_maker(module)


def test_diffusers_bad_input(script):
    x, _ = rows_of_batch()
    noisy, noise, sigmas, _ = script(x)
    with pytest.raises(ValueError, match=r"one of `times` for each of 16 samples, got \(3,\)"):
        diffusers_target(noisy, x, noise, sigmas.flatten()[:3], Scheme())
    with pytest.raises(ValueError, match="`prediction` to be one of"):
        diffusers_target(noisy, x, noise, sigmas, Scheme(), prediction="epsilon")


@pytest.fixture(params=["DDPMScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def scheduler(request, diffusers):
    """Makes a scheduler with a `prediction_type`, which that of flow matching has not."""
    made = getattr(diffusers, request.param)
    flow = request.param.startswith("Flow")
    return lambda kind: (
        made() if flow else made(prediction_type=kind, beta_schedule="squaredcos_cap_v2")
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_one_line_for_all_schedulers(scheduler, kind):
    """The target of the hand-written script, and its mean over the posterior by brute force."""
    noise_scheduler, (x, _) = scheduler(kind), rows_of_batch()
    draws = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=draws)
    flow = not hasattr(noise_scheduler, "alphas_cumprod")
    timesteps = torch.randint(0, 1000, (len(x),), generator=draws)
    if flow:
        timesteps = noise_scheduler.timesteps[timesteps]
        a, s = (expand(value / 1000, x).double() for value in (1000 - timesteps, timesteps))
        noisy, plain = noise_scheduler.scale_noise(x, timesteps, noise), noise - x
    else:
        noisy = noise_scheduler.add_noise(x, noise, timesteps)
        kept = noise_scheduler.alphas_cumprod[timesteps].double()
        a, s = expand(kept.sqrt(), x), expand((1 - kept).sqrt(), x)
        plain = {
            "epsilon": noise,
            "v_prediction": noise_scheduler.get_velocity(x, noise, timesteps),
            "sample": x,
        }[kind]
    given = (noisy, x, noise, timesteps)
    unsteered = diffusers_target(*given, Scheme(convention=noise_scheduler))
    torch.testing.assert_close(unsteered, plain, rtol=1e-6, atol=1e-6)
    bank = LatentBank(ROWS)
    scheme = Scheme(Oracle(bank, convention=noise_scheduler), target=Mix(), class_wise=False)
    m = posterior_mean(noisy, a, s)
    away = (noisy.double() - a * m) / s
    expected = {"epsilon": away, "v_prediction": a * away - s * m, "sample": m}[kind]
    expected = away - m if flow else expected
    torch.testing.assert_close(
        diffusers_target(*given, scheme).double(), expected, rtol=1e-5, atol=1e-5
    )
    # The same by the scheme itself, after the lines of the script that make its target.
    steered, _ = scheme(plain, xt=noisy, t=timesteps, x1=x)
    torch.testing.assert_close(steered.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"in \[0, (999|1000)\]"):
        scheme(plain, xt=noisy, t=timesteps + 1000, x1=x)
    (maker,) = find_target_makers(SimpleNamespace(noise_scheduler=noise_scheduler))
    assert (maker.convention, maker.trains) == (scheme.convention, False)


def test_a_scheduler_to_sample_with_is_no_training(diffusers):
    assert find_target_makers(SimpleNamespace(scheduler=diffusers.EulerDiscreteScheduler())) == []
    with pytest.raises(
        TypeError,
        match=r"got EulerDiscreteScheduler, which is for sampling.*DDPMScheduler\.from_config",
    ):
        Scheme(convention=diffusers.EulerDiscreteScheduler())


# -- all of them ---------------------------------------------------------------------------------


class Held(pl.LightningModule):
    """Trains on what it holds, a transport or a loss of EDM's."""

    def __init__(self, thing):
        super().__init__()
        self.net, self.thing, self.validated = Net(), thing, []

    def loss(self, batch, step):
        torch.manual_seed(step)
        x1, labels = batch
        if hasattr(self.thing, "training_losses"):
            return self.thing.training_losses(self.net, x1, {"y": labels})["loss"].mean()
        return self.thing(self.net, x1, nn.functional.one_hot(labels).float()).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch, self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        thing, *held = held_by(self)
        # Of the first batches the noise is looked at, which changes nothing.
        looks = [None if h is None else {k: v for k, v in h.items() if steers(v)} for h in held]
        self.validated.append((thing, *looks))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def steers(value):
    """Whether a value is other than what looks on."""
    return not getattr(value, "_observes", False)


def held_by(module):
    """All that a maker could have changed."""
    plan = getattr(module.thing, "path_sampler", None)
    held = {key: value for key, value in vars(module.thing).items() if key != "training"}
    return module.thing, held, None if plan is None else dict(vars(plan))


@pytest.mark.parametrize("kind", [SiT, LightningDiT, *EDM_KINDS])
def test_a_trainer_steers_what_its_module_holds(kind, make_trainer, make_loader):
    """In three steps as the loop by hand, and not as plain training; afterwards it is restored."""
    loader, bank = make_loader(ROWS, LABELS, batch_size=16), LatentBank(ROWS, LABELS)
    ends = []
    for steered in (True, False):
        module = Held(kind())
        maker, optimizer = one_target_maker(module), module.configure_optimizers()
        if steered:
            maker.attach(Scheme(Oracle(bank), target=Mix()))
        for step, batch in enumerate(loader):
            optimizer.zero_grad()
            module.loss(batch, step).backward()
            optimizer.step()
        ends.append(module.net.scale)
    module = Held(kind())
    before = held_by(module)
    callback = StageScheme(target=Mix(), bank=bank)
    trainer = make_trainer(callback, max_steps=3, num_sanity_val_steps=0)
    trainer.fit(module, loader, loader)
    assert callback.scheme.last.lam.eq(1).all()
    assert torch.equal(module.net.scale, ends[0])
    assert not torch.isclose(module.net.scale, ends[1], rtol=1e-4)
    assert held_by(module) == before
    assert module.validated == [before] * 3


def test_a_scheme_for_another_path_is_refused():
    transport = SiT(GVPCPlan)
    scheme = Scheme(Oracle(LatentBank(ROWS)), target=Mix())
    with pytest.raises(ValueError, match=r"trains on CosinePath\(\), the scheme is for LinearPath"):
        one_target_maker(transport).attach(scheme)
    with pytest.raises(ValueError, match=r"one_target_maker\(module\)\.path"):
        one_target_maker(transport).attach(Scheme(weight=lambda t: t, path=EDMPath()))
