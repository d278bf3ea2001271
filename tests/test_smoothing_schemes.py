"""Smoothing where a scheme goes: which samples are drawn anew, and what they are trained on."""

import copy
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch

from stagewise import (
    AtEvent,
    Convention,
    CosinePath,
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    Phase,
    Phases,
    ReferenceSet,
    Scheme,
    SmoothedOracle,
    Smoothing,
    StageBoundary,
    StageCurve,
    StageTarget,
    sources,
)
from stagewise.adapters import diffusers_target
from stagewise.callbacks import PosteriorMonitor, StageScheme, VelocityErrorMonitor
from stagewise.engines import Sharded
from stagewise.losses import FlowMatchingLoss

ROWS = torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
BOUNDARY = StageBoundary(0.3, 0.3, 0.3, 0.6, 0.6, 0.6, 0.95)
T = torch.tensor([0.1, 0.29, 0.45, 0.599, 0.6, 0.8, 0.97, 1.0])
LATE = T >= 0.6


@pytest.fixture(scope="module")
def bank():
    return LatentBank(ROWS)


@pytest.fixture(scope="module")
def smoothing(bank):
    return Smoothing(bank, neighbours=4, progress=False)


@pytest.fixture
def oracle(bank):
    return Oracle(bank)


def asked(scheme, t=T, path=None, **options):
    """x_1 as it was drawn, x_t, the conditional target, and that of the scheme."""
    x0 = torch.randn(len(t), 6, generator=torch.Generator().manual_seed(1))
    x1 = scheme.smooth(ROWS[: len(t)], t=t)
    path = path or scheme.path
    xt = path.interpolate(x0, x1, t)
    y = path(t.double()).d_alpha[:, None] * x1 + path(t.double()).d_sigma[:, None] * x0
    u, _ = scheme(y.float(), xt=xt, t=t, x1=x1, **options)
    return x1, xt, y.float(), u


def test_rows_stay_before_the_collapsed_boundary_and_are_drawn_from_it_on(smoothing):
    scheme = Scheme(smoothing=smoothing, boundary=BOUNDARY)
    x1, _, y, u = asked(scheme)
    assert torch.equal(x1[~LATE], ROWS[:8][~LATE])
    assert ((x1 - ROWS[:8])[LATE].abs().amax(1) > 1e-3).all()
    assert torch.equal(u, y), "the target of the sample as it was drawn"
    assert torch.equal(scheme.last.smoothed, LATE.float())
    assert torch.equal(scheme.last.x1, x1)
    assert scheme.last.source.tolist() == list(range(8))
    drawn = scheme.smooth(ROWS[:8].repeat(4000, 1), t=T.repeat(4000))
    spread = drawn.view(4000, 8, 6).var(0)
    near = ROWS[smoothing.index[:8].long()] - ROWS[:8, None]
    torch.testing.assert_close(spread[LATE], near.square().mean(1)[LATE], rtol=0.12, atol=0)


def test_a_strength_says_how_much_at_any_t(smoothing):
    def ramp(t):
        return ((t - 0.2) / 0.6).clamp(0, 1)

    whole, part = (
        Scheme(smoothing=smoothing, strength=strength) for strength in (torch.ones_like, ramp)
    )
    moved, less = (scheme.smooth(ROWS[:8], t=T) - ROWS[:8] for scheme in (whole, part))
    torch.testing.assert_close(less, ramp(T)[:, None] * moved, rtol=1e-5, atol=1e-6)
    assert not whole.lacks_boundary


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()])
def test_targets_are_those_of_the_rows_and_then_of_the_smoothed_set(bank, smoothing, path):
    plain = Oracle(bank, path)
    scheme = Scheme(plain, target=Mix(), smoothing=smoothing, boundary=BOUNDARY)
    t = T[:-1]
    _, xt, y, u = asked(scheme, t)
    torch.testing.assert_close(u[~LATE[:-1]], plain.velocity(xt, t)[~LATE[:-1]])
    around = SmoothedOracle(bank, path, smoothing).velocity(xt, t)
    torch.testing.assert_close(u[LATE[:-1]], around[LATE[:-1]], rtol=1e-4, atol=1e-4)
    assert ((u - y)[LATE[:-1]].abs().amax(1) > 1e-3).all()
    assert not scheme.last.inserted.any()


def test_what_is_mixed_has_no_bias_for_the_smoothed_set(bank, smoothing):
    scheme = Scheme(Oracle(bank), target=Mix(0.5), smoothing=smoothing, strength=torch.ones_like)
    frozen = torch.nn.Linear(6, 6)
    draws = torch.Generator().manual_seed(0)
    means = []
    for _ in range(40):
        rows = torch.randint(60, (500,), generator=draws)
        t = 0.3 + 0.6 * torch.rand(500, generator=draws)
        x0, x1 = torch.randn(500, 6, generator=draws), scheme.smooth(ROWS[rows], t=t)
        xt = scheme.path.interpolate(x0, x1, t)
        u, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1)
        means.append(((u - (x1 - x0)) * frozen(xt).detach()).sum(1).mean())
    means = torch.stack(means).double()
    assert means.mean().abs() < 4 * means.std() / 40**0.5


def test_two_stages_are_the_oracle_and_then_the_neighbourhood(oracle):
    scheme = Scheme.two_stage(oracle)
    assert scheme.lacks_boundary
    found = scheme.measure_boundary()
    assert (scheme.boundary, scheme.collapsed) == (found.midpoint, found.collapsed)
    assert found == StageCurve.measure(oracle).boundary()
    t = torch.tensor([found.midpoint - 0.05, (found.midpoint + found.collapsed) / 2, 0.99])
    x1, xt, y, u = asked(scheme, t)
    torch.testing.assert_close(u[0], oracle.velocity(xt, t)[0])
    assert torch.equal(u[1:], y[1:])
    assert torch.equal(x1[:2], ROWS[:2])
    assert not torch.equal(x1[2], ROWS[2])


def test_a_boundary_that_was_never_reached_smooths_nothing(smoothing):
    never = StageBoundary(0.3, 0.3, 0.3, *3 * [float("nan")], 0.95)
    scheme = Scheme(smoothing=smoothing, boundary=never)
    assert torch.equal(scheme.smooth(ROWS[:7], t=T[:7]), ROWS[:7])


def test_draws_depend_on_seed_and_step_alone_and_go_on_where_a_run_stopped(smoothing):
    def drawn(steps, seed=0, state=None):
        scheme = Scheme(smoothing=smoothing, boundary=BOUNDARY, seed=seed)
        if state is not None:
            scheme.load_state_dict(copy.deepcopy(state))
        found = []
        for step in steps:
            found += [scheme.smooth(ROWS[:8], t=T) for _ in range(2)]
            scheme.observe(step=step + 1, total=None)
        return torch.stack(found), scheme.state_dict()

    torch.manual_seed(0)
    begin = torch.get_rng_state()
    whole, _ = drawn(range(4))
    _, state = drawn(range(2))
    rest, _ = drawn(range(2, 4), state=state)
    assert torch.equal(rest, whole[4:])
    assert torch.equal(torch.get_rng_state(), begin), "generators of its own"
    late = whole[:, LATE].flatten(1)
    assert len(late.unique(dim=0)) == 8, "each call another draw"
    assert not torch.equal(drawn(range(4), seed=1)[0], whole)


def test_times_of_another_convention(smoothing):
    other = Scheme(smoothing=smoothing, boundary=BOUNDARY, convention=Convention(1, 0, -1))
    x1 = other.smooth(ROWS[:8], t=1 - T)
    assert torch.equal((x1 == ROWS[:8]).all(1), ~LATE)


def test_a_step_by_hand_gives_the_rows_of_latents_that_are_drawn_again(smoothing):
    target = StageTarget().train()
    target.scheme = Scheme(smoothing=smoothing, boundary=BOUNDARY)
    x1 = ROWS[:8] + 0.01
    with pytest.raises(ValueError, match="Nor are latents that are drawn again each time"):
        target.smooth(x1, t=T)
    found = target.smooth(x1, t=T, source=torch.arange(8))
    assert torch.equal((found == x1).all(1), ~LATE)


def test_the_objective_smooths_what_it_trains_on_and_rests_in_eval_mode(oracle):
    scheme = Scheme.two_stage(oracle, boundary=BOUNDARY)
    loss_fn, seen = FlowMatchingLoss(scheme=scheme), []

    def model(xt, t):
        seen.append((xt, t))
        return torch.zeros_like(xt)

    x0, t = torch.randn(8, 6), T
    loss_fn(model, ROWS[:8], x0=x0, t=t)
    assert torch.equal((scheme.last.x1 == ROWS[:8]).all(1), ~LATE)
    torch.testing.assert_close(seen[0][0], oracle.path.interpolate(x0, scheme.last.x1, t))
    expected = (scheme.last.x1 - x0).square().mean(1)
    torch.testing.assert_close(loss_fn.last.loss, expected)
    last = scheme.last
    loss_fn.eval()(model, ROWS[:8], x0=x0, t=t)
    assert scheme.last is last
    torch.testing.assert_close(seen[1][0], oracle.path.interpolate(x0, ROWS[:8], t))
    # Rows that are resampled latents stand for what is stored of them.
    loss_fn.train()(model, ROWS[:8] + 0.01, source=torch.arange(8))
    assert scheme.last.source.tolist() == list(range(8))


def test_smoothing_begins_with_a_phase(bank, smoothing):
    first, last = Scheme(), Scheme(smoothing=smoothing, boundary=BOUNDARY)
    phases = Phases([Phase(first, AtEvent("memorization onset")), Phase(last)])
    x1, _, y, u = asked(phases)
    assert torch.equal(x1, ROWS[:8])
    assert torch.equal(u, y)
    phases.notify("memorization onset")
    phases.observe(step=1, total=10)
    assert torch.equal((asked(phases)[0] == ROWS[:8]).all(1), ~LATE)
    # What is not told is measured over the rows of the smoothing.
    again = Phases([Phase(Scheme(), AtEvent("x")), Phase(Scheme(smoothing=smoothing))])
    found = again.measure_boundary()
    assert again.phases[1].scheme.collapsed == found.collapsed
    assert not again.lacks_boundary


def test_a_state_of_the_version_before_is_taken_up():
    scheme = Scheme(boundary=0.3)
    old = {k: v for k, v in scheme.state_dict().items() if k not in ("collapsed", "draws")}
    other = Scheme()
    other.load_state_dict(old)
    assert (other.boundary, other.collapsed) == (0.3, None)


class Lossy(pl.LightningModule):
    """Trains by `FlowMatchingLoss`, or by a torchcfm matcher; notes the x_1 that monitors see."""

    def __init__(self, matcher=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(7, 6)
        self.matcher = matcher
        self.loss = FlowMatchingLoss() if matcher is None else None
        self.agree = []

    def velocity(self, xt, t):
        scheme = next(c for c in self.trainer.callbacks if isinstance(c, StageScheme))
        if self.training and torch.is_grad_enabled():
            seen = scheme.run.look.x1_of_batch()
            self.agree.append(torch.equal(seen, scheme.scheme.drawn.x1))
        return self.net(torch.cat([xt, t[:, None].to(xt)], 1))

    def training_step(self, batch, batch_idx):
        if self.matcher is None:
            return self.loss(self.velocity, batch[0])
        t, xt, u = self.matcher.sample_location_and_conditional_flow(
            torch.randn_like(batch[0]), batch[0]
        )
        return (self.velocity(xt, t) - u).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize(
    ("matched", "make"),
    [(True, Scheme.two_stage), (False, lambda o: Scheme(smoothing=Smoothing(o.bank)))],
)
def test_in_a_trainer(matched, make, make_trainer, make_loader, lightning_log, recwarn):
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    module = Lossy(cfm.ConditionalFlowMatcher(0.0) if matched else None)
    steers = StageScheme(make)
    errors = VelocityErrorMonitor(strata=4, queries=4, velocity=lambda m, x, t, y: m.velocity(x, t))
    monitors = [PosteriorMonitor(strata=4, queries=8), errors]
    loader = make_loader(ROWS, batch_size=20, shuffle=True)
    make_trainer(*monitors, steers, max_steps=5).fit(module, loader)
    scheme = steers.scheme
    assert 0 < scheme.boundary < scheme.collapsed < 1
    assert f"after t = {scheme.collapsed:.3f}" in lightning_log.text
    late = scheme.last.t >= scheme.collapsed
    assert torch.equal(scheme.last.smoothed > 0, late)
    kept = (scheme.drawn.x1 == scheme.drawn.before).all(1)
    assert torch.equal(kept, ~late)
    assert all(module.agree)
    assert len(module.agree) >= 5
    told = [
        str(w.message)
        for w in recwarn
        if "stagewise" in str(w.filename) or "callbacks" in str(w.filename)
    ]
    assert [text for text in told if "not what is trained on" in text or "no rows" in text] == []


class DrawnAgain(torch.utils.data.Dataset):
    """Samples that differ a little each time, with label and position."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        return ROWS[i] + 0.01 * torch.randn(6), i % 4, i


class Told(Lossy):
    """Trains a matcher on them, and says which row each stands for."""

    def training_step(self, batch, batch_idx):
        x1, _, i = batch
        with sources(self.place[i]) if self.place is not None else nullcontext():
            t, xt, u = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return (self.net(torch.cat([xt, t[:, None]], 1)) - u).square().mean()


@pytest.mark.parametrize("known", [True, False])
def test_in_a_trainer_with_samples_that_are_drawn_again(known, make_trainer):
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    bank = LatentBank(ROWS, torch.arange(60) % 4)
    module = Told(cfm.ConditionalFlowMatcher(0.0))
    module.place = bank.index.argsort() if known else None
    steers = StageScheme(Scheme.two_stage, bank=bank, read_batch=lambda batch: batch[:2])
    trainer = make_trainer(steers, max_steps=6)
    loader = torch.utils.data.DataLoader(DrawnAgain(), 20, shuffle=True)
    if not known:
        with pytest.raises(ValueError, match=r"with stagewise\.sources\(i\):"):
            trainer.fit(module, loader)
        return
    trainer.fit(module, loader)
    drawn = steers.scheme.drawn
    gap = drawn.before - bank.take(drawn.source)
    assert gap.abs().max() < 0.1
    assert ((drawn.x1 - drawn.before).abs().amax(1) > 0).tolist() == (drawn.strength > 0).tolist()


@pytest.mark.usefixtures("quick_figures")
def test_a_resumed_run_smooths_from_the_same_boundary_on(make_trainer, make_loader, tmp_path):
    loader = make_loader(ROWS, batch_size=20)
    first = StageScheme(Scheme.two_stage)
    trainer = make_trainer(first, max_steps=3)
    trainer.fit(Lossy(), loader)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = StageScheme(Scheme.two_stage)
    make_trainer(second, max_steps=6).fit(Lossy(), loader, ckpt_path=tmp_path / "x.ckpt")
    assert second.scheme.collapsed == first.scheme.collapsed


def refusal(make, kind=ValueError):
    with pytest.raises(kind) as caught:
        make()
    return str(caught.value)


def test_bad_input(bank, smoothing, oracle):
    scheme = Scheme(smoothing=smoothing, boundary=BOUNDARY)
    x0, x1 = torch.randn(8, 6), ROWS[:8]
    xt = scheme.path.interpolate(x0, x1, T)
    message = refusal(lambda: scheme(x1 - x0, xt=xt, t=T, x1=x1))
    assert "Smooth before x_t is made: x1 = scheme.smooth(x1, t=t)" in message
    scheme.smooth(x1, t=T)
    assert "x1 = scheme.smooth" in refusal(lambda: scheme(x1 - x0, xt=xt, t=T, x1=x1))
    assert "x1 = scheme.smooth" in refusal(lambda: diffusers_target(xt, x1, x0, 1 - T, scheme))
    assert "the `source` of each" in refusal(lambda: scheme.smooth(x1 + 1, t=T))
    drawn = scheme.smooth(x1, t=T)
    message = refusal(lambda: scheme.smooth(drawn, t=torch.zeros(8)))  # also where none moves
    assert "Smooth once: x1 = scheme.smooth(x1, t=t)" in message
    other = scheme.path.interpolate(x0, drawn, 1 - T)
    message = refusal(lambda: scheme(drawn - x0, xt=other, t=T, x1=drawn))
    assert "They fit if time 1 is noise" in message

    unknown = Scheme(smoothing=smoothing)
    assert "scheme.measure_boundary()" in refusal(lambda: unknown.smooth(x1, t=T))
    assert "collapsed end" in refusal(lambda: unknown.set_boundary(0.4))
    assert "collapsed end" in refusal(lambda: Scheme(smoothing=smoothing, boundary=0.4))
    assert "Smoothing(bank)" in refusal(lambda: Scheme(smoothing=8), TypeError)
    for strength in (torch.ones_like, 0.5):  # there is nothing that it could apply to
        assert "Smoothing(bank)" in refusal(lambda s=strength: Scheme(strength=s))
    message = refusal(lambda: Scheme(smoothing=smoothing, strength=0.5), TypeError)
    assert "got 0.5: strength=lambda t: (t >= 0.7)" in message
    assert "other rows" in refusal(
        lambda: Scheme(Oracle(LatentBank(ROWS + 1)), target=Mix(), smoothing=smoothing)
    )
    assert "Sharded()" in refusal(
        lambda: Scheme(Oracle(bank, engine=Sharded()), target=Mix(), smoothing=smoothing)
    )
    other = SmoothedOracle(bank, None, Smoothing(bank, 3, progress=False))
    assert "got two" in refusal(lambda: Scheme(other, target=Mix(), smoothing=smoothing))
    late = Scheme(oracle, target=ReferenceSet(8), smoothing=smoothing, boundary=BOUNDARY)
    assert "Use Mix" in refusal(late.check)
    Scheme(
        oracle, target=ReferenceSet(8, "boundary"), smoothing=smoothing, boundary=BOUNDARY
    ).check()


def test_times_that_the_samples_were_not_smoothed_at_are_refused(smoothing):
    scheme = Scheme(smoothing=smoothing, boundary=BOUNDARY)
    x1 = scheme.smooth(ROWS[:8], t=T)
    with pytest.raises(ValueError, match=r"times `t` that the samples were smoothed at.*once"):
        scheme(x1, xt=x1, t=T.flip(0), x1=x1)


@pytest.mark.parametrize("seed", range(4))
def test_few_rows_each_a_class_are_smoothed(seed):
    """At all t, so that no sample is a row; draws are wider than rows that are so few."""
    torch.manual_seed(seed)
    x, y = torch.randn(5, 6), torch.arange(5)
    oracle = Oracle(LatentBank(x, y))
    scheme = Scheme.two_stage(oracle, smoothing=Smoothing(oracle.bank, 4))
    scheme.measure_boundary()
    for _ in range(4):
        t, x0 = torch.rand(5), torch.randn(5, 6)
        x1 = scheme.smooth(x, t=t)
        assert not torch.equal(x1, x)
        xt = scheme.path.interpolate(x0, x1, t)
        u, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1, labels=y)
        assert torch.equal(u, x1 - x0)


def test_rows_that_stand_twice_are_told_that_nothing_is_smoothed():
    twice = Oracle(LatentBank(ROWS.repeat(2, 1)))
    scheme = Scheme(twice, smoothing=Smoothing(twice.bank, 4, progress=False))
    with pytest.warns(UserWarning, match=r"never acts.*LatentBank\(x\.unique\(dim=0\)\)"):
        scheme.measure_boundary()


def test_the_stages_are_those_of_the_rows_whatever_the_oracle(bank, smoothing, oracle):
    around = SmoothedOracle(bank, None, smoothing)
    plain, smooth = (Scheme(o, smoothing=smoothing) for o in (oracle, around))
    assert plain.measure_boundary() == smooth.measure_boundary()


def test_two_stages_of_what_is_no_oracle(bank, oracle):
    with pytest.raises(TypeError, match=r"Scheme\.two_stage\(Oracle\(bank\)\)"):
        Scheme.two_stage(bank)
    with pytest.raises(ValueError, match="no `target` for two stages"):
        Scheme.two_stage(oracle, target=Mix())


def test_a_scheme_that_does_not_smooth_hands_the_collapsed_boundary_on():
    """A run may go on with another scheme, which smooths from where the first was told."""
    x = torch.randn(50, 6)
    oracle = Oracle(LatentBank(x))
    measured = StageBoundary(0.3, 0.2, 0.4, 0.6, 0.5, 0.7, 0.95)
    first = Scheme(oracle, target=Mix("boundary"), boundary=measured)
    assert first.collapsed == 0.6
    then = Scheme.two_stage(oracle)
    assert then.lacks_boundary
    then.load_state_dict(first.state_dict())
    t = torch.tensor([0.1, 0.4, 0.7, 0.9])
    moved = (then.smooth(x[:4], t=t) != x[:4]).any(1)
    assert moved.tolist() == [False, False, True, True]
    # One that was told a number does not know it, and says so.
    told = Scheme(oracle, target=Mix("boundary"), boundary=0.3)
    then.load_state_dict(told.state_dict())
    assert then.lacks_boundary
    with pytest.raises(ValueError, match="boundary"):
        then.smooth(x[:4], t=t)
