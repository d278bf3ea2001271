"""What makes the targets is observed: told is what training uses, and nothing is changed."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stagewise import (
    Convention,
    CosinePath,
    LatentBank,
    LinearPath,
    LogitNormal,
    Mix,
    Oracle,
    Scheme,
)
from stagewise.adapters import (
    Seen,
    assumed_makers,
    find_couplings,
    find_target_makers,
    one_target_maker,
)
from stagewise.adapters.base import unwrapped
from stagewise.adapters.first_step import FirstStep
from stagewise.batches import find_sample
from stagewise.losses import FlowMatchingLoss
from stagewise.noise import NoiseSums, check_independent, dependence

SHAPE = (2, 3)
ROWS = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(5))
X1, LABELS = ROWS[:16], torch.arange(16) % 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.seen = []

    def forward(self, x, t, *args, **kwargs):
        self.seen.append((x, t))
        return self.scale * x


class Plan:
    """The interface of SiT's, with time running either way."""

    def __init__(self, reverse=False):
        self.reverse = reverse

    def compute_alpha_t(self, t):
        return (1 - t, -1) if self.reverse else (t, 1)

    def compute_sigma_t(self, t):
        return (t, 1) if self.reverse else (1 - t, -1)

    def plan(self, t, x0, x1):
        (a, da), (s, ds) = (
            f(t[:, None, None]) for f in (self.compute_alpha_t, self.compute_sigma_t)
        )
        return t, a * x1 + s * x0, da * x1 + ds * x0


class Transport:
    def __init__(self, kind="velocity", reverse=False):
        self.path_sampler, self.model_type = Plan(reverse), SimpleNamespace(name=kind)
        self.train_eps = self.sample_eps = 0.0

    def check_interval(self, train_eps, sample_eps):
        return 0, 1

    def sample(self, x1):
        return torch.rand(len(x1)), torch.randn_like(x1), x1

    def training_losses(self, model, x1, model_kwargs=None):
        t, x0, x1 = self.sample(x1)
        t, xt, ut = self.path_sampler.plan(t, x0, x1)
        target = ut if self.model_type.name == "velocity" else x0
        output = model(xt, t, **(model_kwargs or {}))
        return {"loss": (output - target).square().flatten(1).mean(1)}


class EDMLoss:
    P_mean, P_std, sigma_data = -0.4, 1.0, 0.5

    def __call__(self, net, images, labels=None, augment_pipe=None):
        sigma = (torch.randn(len(images), 1, 1) - 0.4).exp()
        y, extra = (images, None) if augment_pipe is None else augment_pipe(images)
        return (net(y + torch.randn_like(y) * sigma, sigma, labels, extra) - y) ** 2


class EDMModule(nn.Module):
    P_mean, P_std, sigma_data = -0.4, 1.0, 0.5

    def forward(self, net, images, labels=None, augment_pipe=None):
        return EDMLoss()(net, images, labels, augment_pipe)


def by_torchcfm(name, sigma=0.0):
    def make():
        cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
        return getattr(cfm, f"{name}ConditionalFlowMatcher")(sigma)

    return make


def by_flow_matching():
    return pytest.importorskip("flow_matching.path").CondOTProbPath()


def run_matcher(thing, net, x1, **options):
    t, xt, u = thing.sample_location_and_conditional_flow(torch.randn_like(x1), x1, **options)
    return (net(xt, t) - u).square().mean()


def run_path(thing, net, x1):
    found = thing.sample(t=torch.rand(len(x1)), x_0=torch.randn_like(x1), x_1=x1)
    return (net(found.x_t, found.t) - found.dx_t).square().mean()


def run_transport(thing, net, x1):
    return thing.training_losses(net, x1, {"y": LABELS, "more": {"text": x1}})["loss"].mean()


def run_loss(thing, net, x1):
    return thing(net, x1, LABELS, text=x1).mean()


def run_edm(thing, net, x1):
    return thing(net, x1, LABELS).mean()


KINDS = {
    "objective": (FlowMatchingLoss, run_loss),
    "objective, cosine": (lambda: FlowMatchingLoss(CosinePath(), "noise"), run_loss),
    "torchcfm": (by_torchcfm(""), run_matcher),
    "torchcfm, sigma": (by_torchcfm("", 0.3), run_matcher),
    "torchcfm, target": (by_torchcfm("Target", 0.1), run_matcher),
    "torchcfm, coupled": (by_torchcfm("ExactOptimalTransport"), run_matcher),
    "flow_matching": (by_flow_matching, run_path),
    "transport": (Transport, run_transport),
    "transport, noise": (lambda: Transport("noise"), run_transport),
    "transport, reversed": (lambda: Transport(reverse=True), run_transport),
    "transport, unknown": (lambda: Transport("flow_map"), run_transport),
    "edm": (EDMLoss, run_edm),
    "edm, module": (EDMModule, run_edm),
}


def holder_of(thing):
    holder = nn.Module()
    holder.thing = thing
    return holder


def state_of(holder):
    """All that an observer could have changed."""
    thing = holder.thing
    sampler = getattr(thing, "path_sampler", None)
    return dict(vars(holder)), thing, dict(vars(thing)), sampler and dict(vars(sampler))


def step(holder, run, x1=X1, seed=1):
    """Loss, gradient, and what the network was given."""
    net = Net()
    torch.manual_seed(seed)
    np.random.seed(seed)  # couplings draw from it
    loss = run(holder.thing, net, x1)
    loss.backward()
    return loss.detach(), net.scale.grad, *net.seen[0], torch.get_rng_state()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(params=KINDS)
def kind(request):
    make, run = KINDS[request.param]
    return request.param, holder_of(make()), run


def maker_of(holder):
    (maker,) = find_target_makers(holder)
    assert maker.observable
    return maker


def test_told_is_what_training_uses_and_nothing_changes(kind):
    name, holder, run = kind
    before, told = state_of(holder), []
    expected = step(holder, run)
    detach = maker_of(holder).observe(told.append)
    found = step(holder, run)
    detach()
    detach()
    if "objective" in name:  # its record of the last call is another object
        before[2].pop("last")
        after = state_of(holder)
        after[2].pop("last")
        assert after == before
    else:
        assert state_of(holder) == before
    assert same(found, expected)
    (seen,) = told
    assert isinstance(seen, Seen)
    _, _, x, time, _ = found
    assert not seen.x1.requires_grad
    if "coupled" in name:
        assert not torch.equal(seen.x1, X1)
        assert all(bool((row == X1).flatten(1).all(1).any()) for row in seen.x1)
    else:
        assert seen.x1.data_ptr() == X1.data_ptr(), "a reference"
    if "edm" in name:
        assert (seen.x0, seen.t, seen.xt) == (None, None, None)
    else:
        assert torch.equal(seen.xt, x)
        assert seen.t is None if "reversed" in name else torch.equal(seen.t, time)
    if seen.t is not None and seen.x0 is not None and "sigma" not in name:
        path = CosinePath() if "cosine" in name else one_target_maker(FlowMatchingLoss()).path
        torch.testing.assert_close(path.interpolate(seen.x0, seen.x1, seen.t), seen.xt)
    assert (seen.x0 is None) == ("edm" in name or "target" in name)
    expected = {
        "objective": ["args[0]", "text"],
        "transport": ["y", "more['text']"],
        "edm": ["labels"],
    }.get(name.split(",")[0], [])
    assert [key for key, _ in seen.conditions] == expected
    if expected:
        assert torch.equal(seen.conditions[0][1], LABELS)
    step(holder, run)
    assert len(told) == 1, "it has ended"


def test_only_calls_that_train_are_told(kind):
    _, holder, run = kind
    told = []
    maker_of(holder).observe(told.append)
    with torch.no_grad():
        run(holder.thing, Net(), X1)
    assert told == []
    run(holder.thing, Net(), X1)
    assert len(told) == 1


def test_copies_and_pickles_are_plain(kind):
    _, holder, run = kind
    told = []
    expected = step(copy.deepcopy(holder), run)
    detach = maker_of(holder).observe(told.append)
    again = maker_of(holder).observe(told.append)
    assert maker_of(holder).describe() == maker_of(holder_of(unwrapped(holder.thing))).describe()
    for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert same(step(other, run), expected)
    assert told == []
    step(holder, run)
    assert len(told) == 2, "observed twice"
    detach()
    step(holder, run)
    assert len(told) == 3
    again()


STEERED = [name for name in KINDS if "coupled" not in name and "unknown" not in name]
ORDERS = ["observer first", "scheme first", "observer first, detached first", "in between"]


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.parametrize("order", ORDERS)
def test_observers_and_a_scheme_nest_in_any_order(name, order):
    make, run = KINDS[name]
    holder, told = holder_of(make()), []
    before = state_of(holder)
    old = maker_of(holder)  # found before anything stands for it

    def scheme():
        return Scheme(Oracle(LatentBank(ROWS), old.path), target=Mix(), class_wise=False)

    detach = old.attach(scheme())
    steered = step(holder, run)
    detach()
    if order == "scheme first":
        detach_scheme = old.attach(scheme())
        ends = [maker_of(holder).observe(told.append), detach_scheme]
    else:
        ends = [old.observe(told.append)]
        ends.append(old.attach(scheme()))
        if order == "in between":
            ends.insert(1, maker_of(holder).observe(told.append))
    with pytest.raises(ValueError, match=r"steered by another|has a scheme already"):
        maker_of(holder).attach(scheme())
    assert same(step(holder, run), steered)
    assert len(told) == len(ends) - 1
    if "detached first" in order or order == "in between":
        ends.pop(0)()
        assert same(step(holder, run), steered)
        assert len(told) == (1 if "detached" in order else 3)
        with pytest.raises(ValueError, match=r"steered by another|has a scheme already"):
            maker_of(holder).attach(scheme())
    for end in reversed(ends):
        end()
    after = state_of(holder)
    for state in (before, after):
        state[2].pop("last", None)
    assert after == before


def test_noise_that_a_scheme_has_overwritten_is_not_told():
    holder, told = holder_of(Transport("noise")), []
    maker = maker_of(holder)
    maker.attach(Scheme(Oracle(LatentBank(ROWS)), target=Mix(), class_wise=False))
    maker_of(holder).observe(told.append)
    step(holder, run_transport)
    assert told[0].x0 is None


def test_timesteps_of_a_scheme_are_told():
    holder, told = holder_of(by_torchcfm("")()), []
    maker = maker_of(holder)
    maker.observe(told.append)
    maker.attach(Scheme(timesteps=LogitNormal(-3, 0.1)))
    step(holder, run_matcher)
    assert told[0].t.max() < 0.2


def test_noise_that_is_given_to_the_objective_is_told():
    loss_fn, told = FlowMatchingLoss(convention=Convention(1, 0, -1)), []
    one_target_maker(loss_fn).observe(told.append)
    x0, t = torch.randn_like(X1), torch.rand(16)
    loss_fn(lambda xt, time: xt, x1=X1, x0=x0, t=t)
    (seen,) = told
    assert torch.equal(seen.x0, x0)
    assert torch.equal(seen.t, t)
    assert seen.conditions == ()


def test_an_objective_whose_path_is_a_module():
    class Learned(nn.Module, CosinePath):
        forward = CosinePath.__call__

    loss_fn, told = FlowMatchingLoss(), []
    del loss_fn.path
    loss_fn.path = Learned()
    one_target_maker(loss_fn).observe(told.append)
    loss_fn(lambda xt, t: xt, X1)
    assert len(told) == 1
    assert "path" in loss_fn._modules
    assert "path" not in vars(loss_fn)


def test_a_matcher_of_ones_own_without_sample_xt():
    class Own:
        sigma = 0.0

        def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False):
            t = torch.rand(len(x1)) if t is None else t
            s = t[:, None, None]
            return t, s * x1 + (1 - s) * x0, x1 - x0

        def guided_sample_location_and_conditional_flow(self, x0, x1, y0=None, y1=None, t=None):
            return (*self.sample_location_and_conditional_flow(x0, x1, t), y0, y1)

    holder, told = holder_of(Own()), []
    maker = maker_of(holder)
    assert "its path is not known" in maker.refusal
    maker.observe(told.append)
    expected = step(holder, run_matcher)
    x0 = torch.randn_like(X1)
    t, xt, *_ = holder.thing.guided_sample_location_and_conditional_flow(x0, X1, None, LABELS)
    assert len(told) == 2
    assert torch.equal(told[0].xt, expected[2])
    assert torch.equal(told[1].xt, xt)
    assert torch.equal(told[1].x0, x0)


def test_pairs_that_a_matcher_couples_are_told_as_they_are_trained_on():
    x1 = torch.randn(64, 2) + 1
    thing, told = by_torchcfm("ExactOptimalTransport")(), []
    find_target_makers(thing)[0].observe(told.append)
    x0 = torch.randn_like(x1)
    thing.sample_location_and_conditional_flow(x0, x1)
    thing.guided_sample_location_and_conditional_flow(x0, x1, None, torch.zeros(64))
    assert len(told) == 2
    for seen in told:
        with pytest.raises(ValueError, match=r"independent .* optimal transport .*randn_like"):
            check_independent(seen.x0, seen.x1)
    check_independent(x0, x1)


@pytest.mark.parametrize("position", [True, False])
def test_edm_images_are_told_as_they_are_augmented(position):
    holder, told = holder_of(EDMLoss()), []
    maker_of(holder).observe(told.append)

    def augment(images):
        return images.flip(-1), torch.ones(16, 9)

    if position:
        holder.thing(Net(), X1, LABELS, augment)
    else:
        holder.thing(Net(), X1, augment_pipe=augment)
    (seen,) = told
    assert torch.equal(seen.x1, X1.flip(-1))
    expected = ["labels", "augment_labels"] if position else ["augment_labels"]
    assert [name for name, _ in seen.conditions] == expected


def test_what_is_raised_when_told_stops_training_and_leaves_no_trace(kind):
    _, holder, run = kind
    before = state_of(holder)

    def tell(seen):
        raise RuntimeError("enough")

    detach = maker_of(holder).observe(tell)
    with pytest.raises(RuntimeError, match="enough"):
        run(holder.thing, Net(), X1)
    detach()
    assert state_of(holder) == before


@pytest.mark.parametrize("name", ["objective", "transport", "torchcfm"])
def test_what_is_traced_is_left_alone(name):
    make, run = KINDS[name]
    holder, told = holder_of(make()), []
    maker_of(holder).observe(told.append)
    traced = torch.compile(lambda net, x1: run(holder.thing, net, x1), backend="eager")

    class Plain(nn.Module):
        def forward(self, x, t, *args, **kwargs):
            return 0.5 * x

    assert traced(Plain(), X1).isfinite()
    assert told == []


def test_a_number_among_the_conditions_is_no_label():
    holder = holder_of(Transport())
    look = FirstStep(holder, find_target_makers(holder), LinearPath(), find_sample)
    look.begin((X1, LABELS))
    look.watch()
    given = {"y": LABELS, "level": torch.tensor(3)}
    holder.thing.training_losses(Net(), X1, given)["loss"].mean().backward()
    look.finish()
    look.stop()
    assert look.conditions == ("level: int64 tensor ()",)


def test_where_nothing_can_be_seen():
    scheduler = SimpleNamespace(
        scale_noise=lambda: None, sigmas=torch.zeros(1), timesteps=torch.zeros(1)
    )
    unreachable = EDMLoss()
    for thing in (scheduler, unreachable):
        (maker,) = find_target_makers(thing)
        assert not maker.observable
        before = dict(vars(thing))
        detach = maker.observe(pytest.fail)
        assert vars(thing) == before
        detach()
    for maker in assumed_makers(CosinePath()):
        assert not maker.observable
        assert isinstance(maker.path, CosinePath)
        maker.observe(pytest.fail)()
        with pytest.raises(
            ValueError, match=r"the training step cannot be steered.*u, w = self\.target"
        ):
            maker.attach(Scheme(path=CosinePath()))
    told = [maker.describe() for maker in assumed_makers()]
    assert told[1] == (
        "the training step: assumed, LinearPath(), predicts minus the velocity, time 1 is noise "
        "and 0 is data"
    )


# -- a scheduler that samples, couplings ----------------------------------------------------------


@pytest.mark.parametrize("make", [FlowMatchingLoss, Transport, by_torchcfm("")])
def test_a_scheduler_that_samples_yields_to_what_trains(make):
    module = nn.Module()
    module.scheduler = SimpleNamespace(
        scale_noise=lambda: None, sigmas=torch.zeros(1), timesteps=torch.zeros(1)
    )
    (alone,) = find_target_makers(module)
    assert alone.library == "diffusers"
    module.trains = make()
    assert [maker.name for maker in find_target_makers(module)] == ["module.trains"]
    assert one_target_maker(module).name == "module.trains"


class Sampler:
    def get_map(self, x0, x1):
        return x0 @ x1.T

    def sample_map(self, plan, size):
        return plan, size


class Maps:
    """No coupling: half of the interface only."""

    def get_map(self):
        return None


def test_couplings_are_found_without_a_maker():
    module = nn.Module()
    module.maps, module.kind = Maps(), Sampler
    assert find_couplings(module) == []
    module.pairs = {"ot": [Sampler()]}
    module.pair = Sampler().get_map
    assert [place.name for place in find_couplings(module)] == [
        "module.pair",
        "module.pairs['ot'][0]",
    ]
    assert find_target_makers(module) == []
    module.loss = FlowMatchingLoss()
    (maker,) = find_target_makers(module)
    assert maker.coupled
    assert "module.pair (Sampler) pairs noise with data" in maker.refusal


def test_a_coupling_inside_of_a_maker_concerns_that_one():
    module = nn.Module()
    module.coupled, module.loss = by_torchcfm("ExactOptimalTransport")(), FlowMatchingLoss()
    assert find_couplings(module) == []
    assert one_target_maker(module).name == "module.loss"


# -- independence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_dependence_is_standard_normal_for_independent_pairs(size, offset):
    draws = torch.Generator().manual_seed(0)
    values = []
    for _ in range(300):
        x1 = 3 * torch.randn(size, 5, generator=draws) + offset
        values.append(dependence(torch.randn(size, 5, generator=draws), x1))
    values = torch.tensor(values)
    assert abs(float(values.mean())) < 0.25
    assert float(values.std()) == pytest.approx(1, abs=0.2)


def test_what_depends_is_refused_and_what_says_nothing_is_not():
    x1 = torch.randn(64, 8)
    for x0 in (x1, -x1, (x1 + torch.randn_like(x1)) / 2**0.5):
        with pytest.raises(ValueError, match=r"independent of `x1`, but they correlate"):
            check_independent(x0, x1)
    check_independent(torch.randn(4, 1), torch.ones(4, 1))


@pytest.mark.parametrize(("size", "dim"), [(1, 4), (2, 16), (8, 1), (32, 16)])
def test_sums_of_plain_noise_are_never_accused(size, dim):
    """Four tests, each at six standard errors, at four times: 3e-8 of all runs."""
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        sums, data = NoiseSums(), 3 * torch.randn(64, dim, generator=draws) + 1
        for batch in range(1, 33):
            x1 = data[torch.randint(64, (size,), generator=draws)]
            sums.add(torch.randn(size, dim, generator=draws), x1)
            if batch in (1, 8, 32):
                sums.check()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda x0, x1: 1.1 * x0, "a mean square of 1.2"),
        (lambda x0, x1: x0 + 0.15, "a mean of 0.1"),
        (lambda x0, x1: x0 + 0.3 * torch.randn(len(x0), 1), "is an offset added to each"),
        (lambda x0, x1: x0 - x0.mean(1, keepdim=True), "is an offset added to each"),
        (lambda x0, x1: torch.where(((x0 * x1).sum(1) < 0)[:, None], -x0, x0), "they correlate"),
    ],
)
def test_sums_show_what_a_batch_does_not(make, word):
    torch.manual_seed(0)
    sums = NoiseSums()
    for batch in range(40):
        x1 = torch.randn(4, 64)
        sums.add(make(torch.randn(4, 64), x1), x1)
        if not batch:
            sums.check()
    with pytest.raises(ValueError, match=word):
        sums.check()
