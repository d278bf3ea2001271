"""The objectives, plain and with a scheme, without Lightning."""

import copy

import pytest
import torch
from torch import nn

from stagewise import (
    DIFFUSERS,
    STAGEWISE,
    AtStep,
    CosinePath,
    LatentBank,
    LinearPath,
    LogitNormal,
    MinSNR,
    Mix,
    Oracle,
    Phase,
    Phases,
    Prediction,
    ReferenceSet,
    Scheme,
    StageAware,
    StageFactors,
    StageGate,
    Uniform,
)
from stagewise.losses import FlowMatchingLoss, OracleRegularizer, StageWeightedLoss


def test_loss_equals_the_formula():
    x0, x1 = torch.randn(2, 6, 3, 4, 4)
    t = torch.rand(6)
    scale = torch.rand(6)
    loss_fn = FlowMatchingLoss(weight=lambda t: 2 + t)
    loss = loss_fn(lambda xt, t, s: s[:, None, None, None] * xt, x1, scale, x0=x0, t=t)
    total = 0.0
    for i in range(6):
        xt = t[i] * x1[i] + (1 - t[i]) * x0[i]
        per_sample = ((scale[i] * xt - (x1[i] - x0[i])) ** 2).mean()
        torch.testing.assert_close(loss_fn.last.loss[i], per_sample)
        total += float((2 + t[i]) * per_sample) / 6
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert torch.equal(loss_fn.last.t, t)
    torch.testing.assert_close(loss_fn.last.weight, 2 + t)
    assert list(loss_fn.parameters()) + list(loss_fn.buffers()) == []


@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score", "edm"])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_a_model_that_knows_the_answer_has_no_loss(path, kind):
    x0, x1, t = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5) * 0.8 + 0.1
    answer = Prediction(kind).target(path(t), x0, x1)
    loss_fn = FlowMatchingLoss(path, kind)
    assert float(loss_fn(lambda xt, t: answer, x1, x0=x0, t=t)) < 1e-9
    assert float(loss_fn(lambda xt, t: answer + 1, x1, x0=x0, t=t)) == pytest.approx(1, rel=1e-5)


def test_convention_is_applied_at_the_border():
    seen = {}
    x0, x1, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.0, 0.25, 1.0])

    def model(xt, time):
        seen["time"] = time
        return x0 - x1  # noise - data, as the SD3 scripts regress

    loss_fn = FlowMatchingLoss(convention=DIFFUSERS)
    assert float(loss_fn(model, x1, x0=x0, t=t)) < 1e-12
    assert seen["time"].tolist() == [1000, 750, 0]
    assert torch.equal(loss_fn.last.t, t)  # inside, t = 0 stays noise


def test_the_cosine_term_is_lightningdits_and_keeps_the_conditional_target():
    x1, net = torch.randn(6, 3, 2, 2), nn.Conv2d(3, 3, 1)
    oracle = Oracle(LatentBank(x1 + 0.1), LinearPath())
    scheme = Scheme(oracle, target=Mix(1.0), boundary=0.5)
    times = torch.rand(6)
    for given in (None, scheme):
        x0 = torch.randn_like(x1)
        with_term, without = (
            FlowMatchingLoss(scheme=given, cosine=on)(lambda xt, t: net(xt), x1, x0=x0, t=times)
            for on in (True, False)
        )
        xt = (1 - times.view(-1, 1, 1, 1)) * x0 + times.view(-1, 1, 1, 1) * x1
        v, u = net(xt).double(), (x1 - x0).double()
        cosine = (v * u).sum(1) / (v.square().sum(1) * u.square().sum(1)).sqrt()
        torch.testing.assert_close(
            (with_term - without).double(), (1 - cosine).mean(), rtol=1e-5, atol=1e-6
        )


def test_gradient_reaches_the_model_and_the_record_holds_none():
    net = nn.Linear(4, 4)
    loss_fn = FlowMatchingLoss()
    loss_fn(lambda xt, t: net(xt), torch.randn(8, 4)).backward()
    assert net.weight.grad.abs().sum() > 0
    assert not loss_fn.last.loss.requires_grad
    assert copy.deepcopy(loss_fn).last.loss.shape == (8,)


def test_generator_decides_the_draws_and_the_global_one_stays():
    x1 = torch.randn(16, 4)
    loss_fn = FlowMatchingLoss()

    def draw():
        return float(
            loss_fn(lambda xt, t: xt, x1, generator=torch.Generator().manual_seed(3)).detach()
        )

    state = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert draw() == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input(dtype):
    x1 = torch.randn(8, 4).to(dtype)
    loss_fn = FlowMatchingLoss()
    loss = loss_fn(lambda xt, t: xt if xt.dtype == dtype and t.dtype == torch.float32 else None, x1)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_bad_shapes_are_refused():
    loss_fn, x1 = FlowMatchingLoss(), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"`t` with shape \(8,\), got \(4, 2\)"):
        loss_fn(lambda xt, t: xt, x1, t=torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        loss_fn(lambda xt, t: xt, x1, t=torch.full((8,), 500.0))
    with pytest.raises(ValueError, match="`x0` with the shape of `x1`"):
        loss_fn(lambda xt, t: xt, x1, x0=torch.randn(8, 1))
    with pytest.raises(ValueError, match=r"return the shape of `x1`, \(8, 4\), got \(8, 8\)"):
        loss_fn(lambda xt, t: torch.cat([xt, xt], 1), x1)
    with pytest.raises(ValueError, match=r"`weight\(t\)` with shape \(8,\), got \(8, 1\)"):
        FlowMatchingLoss(weight=lambda t: t[:, None])(lambda xt, t: xt, x1)


# -- with a scheme --------------------------------------------------------------------------------


def make_oracle(n=32, labels=False):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return Oracle(LatentBank(x, torch.arange(n) % 4 if labels else None)), x


def test_a_scheme_decides_draws_target_and_weight():
    oracle, x1 = make_oracle()
    scheme = Scheme(
        oracle,
        timesteps=LogitNormal(stratified=True),
        target=Mix("boundary"),
        weight=StageFactors(2, 1),
        boundary=0.4,
    )
    net = nn.Linear(6, 6)
    loss_fn = FlowMatchingLoss(scheme=scheme)
    torch.manual_seed(4)
    loss = loss_fn(lambda xt, t: net(xt), x1)
    torch.manual_seed(4)
    x0 = torch.randn(x1.shape)
    t = LogitNormal(stratified=True).sample(len(x1))
    xt = LinearPath().interpolate(x0, x1, t)
    early, y = t < 0.4, x1 - x0
    target = torch.where(early[:, None], y + oracle.correction(xt, t, x1), y)
    weight = 1 + early.float()
    trained, plain = ((net(xt) - goal).square().mean(1) for goal in (target, y))
    torch.testing.assert_close(loss, (weight * trained).mean())
    last = loss_fn.last
    assert torch.equal(last.t, t)
    torch.testing.assert_close(last.loss, plain.detach())
    torch.testing.assert_close(last.trained, trained.detach())
    torch.testing.assert_close(last.weight, weight)
    # The gradient is that of the target alone.
    found = torch.autograd.grad(loss, net.weight)[0]
    expected = torch.autograd.grad((weight * trained).mean(), net.weight)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("convention", [STAGEWISE, DIFFUSERS])
@pytest.mark.parametrize("kind", ["velocity", "data", "noise"])
def test_an_oracle_has_no_loss_against_its_own_target(convention, kind):
    oracle, x1 = make_oracle()
    loss_fn = FlowMatchingLoss(
        prediction=kind, convention=convention, scheme=Scheme(oracle, target=Mix())
    )

    def model(xt, time):
        t = convention.to_t(time)
        mean = oracle.posterior(xt, t).mean
        c, b = Prediction(kind).coefficients(oracle.path(t.double()))
        return convention.sign_of(Prediction(kind)) * (c[:, None] * mean + b[:, None] * xt)

    t = torch.linspace(0.02, 0.95, len(x1))
    assert float(loss_fn(model, x1, t=t)) < 1e-8
    assert loss_fn.last.trained.max() < 1e-7
    assert loss_fn.last.loss.mean() > 1e-3
    # Pythagoras: what is left of the conditional loss is what was added to the target.
    torch.testing.assert_close(
        loss_fn.last.loss.double(),
        loss_fn.scheme.last.added.double().square().flatten(1).mean(1),
        rtol=1e-3,
        atol=1e-6,
    )


def test_the_plain_scheme_gives_plain_gradients_to_the_bit():
    _, x1 = make_oracle()
    net = nn.Linear(6, 6)
    grads = []
    for scheme in (None, Scheme(), Phases([Phase(Scheme(timesteps=Uniform()))])):
        torch.manual_seed(2)
        loss = FlowMatchingLoss(scheme=scheme)(lambda xt, t: net(xt), x1)
        grads.append(torch.autograd.grad(loss, net.weight)[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_a_scheme_rests_in_eval_mode():
    oracle, x1 = make_oracle()
    held_out = x1 + 1
    scheme = Scheme(oracle, target=Mix(), timesteps=LogitNormal(), on_missing="error")
    loss_fn = FlowMatchingLoss(scheme=scheme)
    with pytest.raises(ValueError, match="32 of 32 are not"):
        loss_fn(lambda xt, t: xt, held_out)
    torch.manual_seed(0)
    found = loss_fn.eval()(lambda xt, t: xt, held_out)
    torch.manual_seed(0)
    assert torch.equal(found, FlowMatchingLoss()(lambda xt, t: xt, held_out))


def test_classes_and_sources_are_for_the_scheme_and_not_for_the_model():
    oracle, x1 = make_oracle(labels=True)
    loss_fn = FlowMatchingLoss(scheme=Scheme(oracle, target=Mix()))
    twin, labels = x1 + 0.1, torch.arange(32) % 4
    t, x0 = torch.full((32,), 0.3), torch.randn(32, 6)

    def model(xt, t, y):
        assert torch.equal(y, labels)
        return xt

    with pytest.raises(ValueError, match="Expected `labels`"):
        loss_fn(model, twin, labels, t=t, x0=x0)
    by_class = loss_fn(model, twin, labels, t=t, x0=x0, classes=labels)
    source = oracle.bank.find(x1)
    by_row = loss_fn(model, twin, labels, t=t, x0=x0, source=source)
    assert not torch.allclose(by_class, by_row)  # inserted beside its twin, or in its place
    assert loss_fn.scheme.last.inserted.all()


def test_what_does_not_go_with_a_scheme():
    oracle, _ = make_oracle()
    for extra in ({"timesteps": Uniform()}, {"weight": lambda t: t}):
        with pytest.raises(ValueError, match="either a scheme, or timesteps and weight"):
            FlowMatchingLoss(scheme=Scheme(), **extra)
    with pytest.raises(TypeError, match=r"a Scheme or Phases, got .*FlowMatchingLoss\(scheme=Sch"):
        FlowMatchingLoss(scheme=Mix())
    with pytest.raises(ValueError, match="the scheme's path, LinearPath"):
        FlowMatchingLoss(CosinePath(), scheme=Scheme(oracle))
    assert FlowMatchingLoss(scheme=Scheme(path=CosinePath())).path.snr_sqrt(torch.tensor(0.5)) == 1


def test_a_density_that_is_zero_where_loss_is_needed_is_refused_by_the_first_call():
    _, x1 = make_oracle()
    empty = Scheme(timesteps=StageAware(1.0, boundary=0.3), preserve_objective=True)
    with pytest.raises(ValueError, match=r"is 0 from t = 0\.300 to 1\.000.*WithFloor"):
        FlowMatchingLoss(scheme=empty)(lambda xt, t: xt, x1)
    weighted = StageWeightedLoss(nn.MSELoss(reduction="none"), empty)
    with pytest.raises(ValueError, match=r"is 0 from t = 0\.300 to 1\.000.*WithFloor"):
        weighted(x1, x1, t=torch.full((32,), 0.1))


def test_copies_share_the_scheme():
    oracle, x1 = make_oracle()
    loss_fn = FlowMatchingLoss(scheme=Scheme(oracle, target=Mix()))
    loss_fn(lambda xt, t: xt, x1)
    other = copy.deepcopy(loss_fn)
    assert other.scheme is loss_fn.scheme
    assert list(loss_fn.parameters()) + list(loss_fn.buffers()) == []
    assert loss_fn.state_dict() == {}


# -- the regulariser and the weighted loss --------------------------------------------------------


@pytest.mark.parametrize("kind", ["velocity", "data", "noise"])
def test_the_regulariser_is_its_formula(kind):
    oracle, x1 = make_oracle()
    t, x0 = torch.linspace(0.05, 0.9, 32), torch.randn(32, 6)
    path, xt = LinearPath(), LinearPath().interpolate(x0, x1, t)
    y = Prediction(kind).target(path(t), x0, x1)
    output = torch.randn(32, 6, requires_grad=True)
    c, b = Prediction(kind).coefficients(path(t.double()))
    best = c[:, None] * oracle.posterior(xt, t).mean + b[:, None] * xt
    expected = (t * (output - best).square().mean(1)).mean()
    regularizer = OracleRegularizer(oracle, lam=lambda t: t, prediction=kind)
    found = regularizer(output, y, xt=xt, t=t, x1=x1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    found.backward()
    torch.testing.assert_close(
        output.grad, (2 * t[:, None] * (output - best) / 6 / 32).float(), rtol=1e-3, atol=1e-6
    )
    twice = OracleRegularizer(oracle, lam=2.0, prediction=kind)(output, y, xt=xt, t=t, x1=x1)
    assert twice.shape == ()
    assert list(regularizer.parameters()) + list(regularizer.buffers()) == []
    pickled = copy.deepcopy(regularizer)
    torch.testing.assert_close(pickled(output, y, xt=xt, t=t, x1=x1), found)


def test_the_regulariser_takes_other_targets_and_refuses_bad_input():
    oracle, x1 = make_oracle()
    t, x0 = torch.full((32,), 0.3), torch.randn(32, 6)
    call = dict(xt=LinearPath().interpolate(x0, x1, t), t=t, x1=x1)
    plain, others = (
        OracleRegularizer(oracle, target=target)(x1, x1 - x0, **call)
        for target in (None, ReferenceSet(4))
    )
    assert not torch.allclose(plain, others)
    gate = StageGate(0.5)
    assert float(OracleRegularizer(oracle, gate)(x1, x1 - x0, **call)) == 0
    with pytest.raises(ValueError, match="`lam` of at least 0"):
        OracleRegularizer(oracle, lam=-1)
    with pytest.raises(ValueError, match="at most 32, the rows of the bank, got 33"):
        OracleRegularizer(oracle, target=ReferenceSet(33))
    with pytest.raises(ValueError, match="`output` with the shape of `y`"):
        OracleRegularizer(oracle)(x1[:, :3], x1 - x0, **call)


@pytest.mark.parametrize("weight", [StageFactors(2, 1, boundary=0.4), MinSNR(2.0), lambda t: t])
def test_a_weighted_loss(weight):
    t = torch.linspace(0.05, 0.95, 8)
    a, b = torch.randn(2, 8, 3, 2)
    loss_fn = StageWeightedLoss(nn.L1Loss(reduction="none"), weight)
    expected = (weight(t) * (a - b).abs().flatten(1).mean(1)).mean()
    torch.testing.assert_close(loss_fn(a, b, t=t), expected)
    scalar = StageWeightedLoss(lambda a, b: (a - b).flatten(1).norm(dim=1), weight)
    expected = (weight(t) * (a - b).flatten(1).norm(dim=1)).mean()
    torch.testing.assert_close(scalar(a, b, t=t), expected)


def test_a_weighted_loss_follows_its_scheme():
    t, loss = torch.tensor([0.1, 0.9]), torch.tensor([1.0, 3.0])
    scheme = Phases(
        [
            Phase(Scheme(weight=StageFactors(3, 1), boundary=0.5), AtStep(1)),
            Phase(Scheme(timesteps=StageAware(0.5, boundary=0.25), preserve_objective=True)),
        ]
    )
    loss_fn = StageWeightedLoss(lambda: loss, scheme)
    assert float(loss_fn(t=t)) == 3  # (3 * 1 + 1 * 3) / 2
    scheme.observe(step=1, total=None)
    assert float(loss_fn(t=t)) == pytest.approx((0.5 * 1 + 1.5 * 3) / 2)


def test_what_a_weighted_loss_refuses():
    t = torch.rand(4)
    with pytest.raises(ValueError, match=r"MSELoss\(reduction=\"none\"\)"):
        StageWeightedLoss(nn.MSELoss(), MinSNR())
    with pytest.raises(ValueError, match=r"shape \(4, '\*'\), one for each t, got \(\)"):
        StageWeightedLoss(lambda: torch.tensor(1.0), MinSNR())(t=t)
    with pytest.raises(ValueError, match=r"`weight\(t\)` with shape \(4,\), got \(4, 1\)"):
        StageWeightedLoss(lambda: t, lambda t: t[:, None])(t=t)
