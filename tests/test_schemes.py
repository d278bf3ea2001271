"""Schemes and phases: what is drawn, what is refused, what a resumed run continues."""

import copy
import inspect
import pickle
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise import (
    AtPlateau,
    AtShare,
    AtStep,
    Beta,
    Certificate,
    Concentration,
    Condition,
    ConditionedOracle,
    CosinePath,
    EDMLogNormal,
    LatentBank,
    LinearPath,
    LogitNormal,
    LossSecondMoment,
    MinSNR,
    Mix,
    Mode,
    Oracle,
    Phase,
    Phases,
    ReferenceSet,
    Scheme,
    Shifted,
    Smooth,
    StageAware,
    StageBoundary,
    StageFactors,
    Uniform,
    UShaped,
    VPPath,
    WithFloor,
)
from stagewise.engines import Exact
from stagewise.losses import FlowMatchingLoss
from stagewise.schemes import correction

N, SHAPE = 40, (2, 3)


def rows(n=N):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))


def make_oracle(labels=False, **options):
    return Oracle(LatentBank(rows(), torch.arange(N) % 4 if labels else None), **options)


def batch(n=16, seed=1, path=None, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    i = torch.randint(N, (n,), generator=draws)
    x1, x0 = rows()[i], torch.randn(n, *SHAPE, generator=draws)
    t = torch.rand(n, generator=draws)
    xt = (path or LinearPath()).interpolate(x0, x1, t)
    call = dict(xt=xt.to(dtype), t=t, x1=x1.to(dtype))
    return (x1 - x0).to(dtype), call, i


# -- the plain scheme -----------------------------------------------------------------------------


def test_the_plain_scheme_changes_nothing():
    y, call, _ = batch()
    scheme = Scheme()
    scheme.check()
    target, weight = scheme(y, **call)
    assert target is y
    assert weight.tolist() == [1] * 16
    assert scheme.last.added.flatten(1).sum(1).tolist() == scheme.last.lam.tolist() == [0] * 16
    assert not scheme.needs_boundary
    assert not scheme.draws_timesteps
    assert Scheme(timesteps=Uniform()).draws_timesteps


def test_t_is_drawn_exactly_as_plain_training_would():
    torch.manual_seed(3)
    expected = torch.rand(8), torch.rand(1)
    torch.manual_seed(3)
    scheme = Scheme(make_oracle(), target=ReferenceSet(5))
    t = scheme.timesteps.sample(8)
    y, call, _ = batch(8)
    scheme(y, **call)
    assert torch.equal(t, expected[0])
    assert torch.equal(torch.rand(1), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    y, call, _ = batch(dtype=dtype)
    oracle = Oracle(LatentBank(rows(), dtype=dtype))
    scheme = Scheme(oracle, target=Mix("boundary"), weight=MinSNR(), boundary=0.5)
    target, weight = scheme(y, **call)
    assert target.dtype == dtype
    assert weight.dtype == call["t"].dtype
    assert target.isfinite().all()
    late = call["t"] >= 0.5
    assert torch.equal(target[late], y[late])
    assert not torch.equal(target[~late], y[~late])
    assert not target.requires_grad
    # A bfloat16 batch may have a float32 target, which keeps the digits of the correction.
    wide, _ = scheme(y.float(), **call)
    torch.testing.assert_close(wide.to(dtype), target, rtol=1e-2, atol=1e-2)


def test_nothing_of_the_graph_is_kept():
    y, call, _ = batch()
    call["x1"].requires_grad_()
    call["xt"].requires_grad_()
    scheme = Scheme(make_oracle(), target=Mix())
    target, _ = scheme(y, **call)
    assert not target.requires_grad
    scheme.correct(**call)
    record = [value for value in vars(scheme.last).values() if value is not None]
    assert not any(value.requires_grad for value in record)


def test_autocast_does_not_reach_the_oracle():
    y, call, _ = batch()
    scheme = Scheme(make_oracle(), target=Mix())
    expected, _ = scheme(y, **call)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = scheme(y, **call)
    assert torch.equal(found, expected)


def test_queries_beyond_the_boundary_are_not_asked(monkeypatch):
    oracle = make_oracle()
    seen = []
    answer = oracle.ask

    def ask(queries, k=1):
        seen.append(queries.path.alpha.tolist())
        return answer(queries, k)

    monkeypatch.setattr(oracle, "ask", ask)
    y, call, _ = batch()
    scheme = Scheme(oracle, target=Mix("boundary"), boundary=0.3)
    scheme(y, **call)
    assert seen == [[t for t in call["t"].double().tolist() if t < 0.3]]
    scheme.set_boundary(0.0)
    target, _ = scheme(y, **call)
    assert len(seen) == 1
    assert torch.equal(target, y)


def test_labels_are_looked_up_or_given():
    oracle = make_oracle(labels=True)
    y, call, i = batch()
    scheme = Scheme(oracle, target=Mix())
    assert scheme.class_wise
    given, _ = scheme(y, **call, labels=i % 4)
    found, _ = scheme(y, **call)
    assert torch.equal(given, found)
    listed, _ = scheme(y, **call, labels=(i % 4).tolist())
    assert torch.equal(listed, found)
    whole, _ = Scheme(oracle, target=Mix(), class_wise=False)(y, **call)
    assert not torch.allclose(whole, found)
    # A label and a boundary: those that are asked keep their own.
    part = Scheme(oracle, target=Mix("boundary"), boundary=0.5)
    some, _ = part(y, **call, labels=i % 4)
    early = call["t"] < 0.5
    torch.testing.assert_close(some[early], found[early])


def test_labels_are_asked_for_where_a_row_does_not_say():
    """`labels_of` sees all samples, and is asked once, if any is no row."""
    y, call, i = batch()
    labels, asked = i % 4, []
    near = call | {"x1": call["x1"] + 0.3}
    near["xt"] = call["xt"] + 0.3 * call["t"].reshape(-1, *(1 for _ in SHAPE))
    for target in (Mix("boundary"), Mix()):
        wise = Scheme(make_oracle(labels=True), target=target, boundary=0.5)
        expected = wise(y + 0.3, **near, labels=labels)
        wise.labels_of = lambda x1: asked.append(len(x1)) or labels
        assert torch.equal(wise(y + 0.3, **near)[0], expected[0])
        wise(y, **call)
    assert asked == [16, 16]
    wise.trains = lambda: True
    again = pickle.loads(pickle.dumps(wise))
    assert again.labels_of is again.trains is None
    wise.trains = None
    wise.labels_of = lambda x1: None
    refused("labels=y to a scheme", lambda: wise(y + 0.3, **near))


def test_certificates_change_nothing_but_the_cost():
    y, call, i = batch()
    x1 = 30 * rows()[i]  # far apart, so that most queries are certified
    x0, t = rows()[i] - y, call["t"]
    xt = LinearPath().interpolate(x0, x1, t)
    bank = LatentBank(30 * rows())
    certificate = Certificate.compute(bank, progress=False)
    plain, certified = (
        Scheme(Oracle(bank, certificate=c), target=Mix()) for c in (None, certificate)
    )
    expected, _ = plain(x1 - x0, xt=xt, t=t, x1=x1)
    found, _ = certified(x1 - x0, xt=xt, t=t, x1=x1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert certified.last.tail_mass.max() > 0


# -- the boundary ---------------------------------------------------------------------------------


def boundary_of(midpoint):
    return StageBoundary(midpoint, 0.1, 0.3, 0.4, 0.3, 0.5, 0.95)


def test_boundaries():
    scheme = Scheme(timesteps=StageAware(0.4), target=None)
    scheme.set_boundary(boundary_of(0.2))
    assert scheme.boundary == 0.2
    assert scheme.timesteps.boundary == 0.2
    scheme.set_boundary(0.25)
    assert scheme.timesteps.boundary == 0.25
    mix = Scheme(make_oracle(), target=Mix("boundary"))
    mix.set_boundary(boundary_of(float("nan")))  # never reached: all is navigation
    assert mix.boundary == 1
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`boundary` in \[0, 1\]"):
            mix.set_boundary(bad)
    with pytest.raises(ValueError, match="one of the stages would be empty"):
        scheme.set_boundary(boundary_of(float("nan")))
    assert scheme.boundary == 0.25  # and it is as before


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(timesteps=WithFloor(StageAware(0.4), 0.1)),
        Scheme(make_oracle(), target=Mix("boundary")),
        Scheme(make_oracle(), target=ReferenceSet(4, Smooth(1.0))),
        Scheme(weight=StageFactors(2, 1)),
        Phases([Phase(Scheme(), AtPlateau()), Phase(Scheme())]),
        Phases([Phase(Scheme(), AtStep(3)), Phase(Scheme(timesteps=StageAware(0.4)))]),
    ],
)
def test_a_boundary_asked_for_before_it_was_measured(scheme):
    assert scheme.needs_boundary
    with pytest.raises(ValueError, match=r"has not been measured yet.*set_boundary"):
        scheme.check()
    scheme.set_boundary(0.2)
    scheme.check()


def test_a_phase_keeps_the_boundary_it_came_with():
    own = Scheme(timesteps=StageAware(0.5), boundary=0.7)
    phases = Phases([Phase(Scheme(), AtStep(3)), Phase(own)])
    phases.check()  # nothing lacks one
    phases.set_boundary(0.3)
    assert (phases.boundary, own.boundary) == (0.3, 0.7)
    other = Phases([Phase(own, AtStep(3)), Phase(Scheme(timesteps=StageAware(0.5)))])
    assert other.lacks_boundary
    with pytest.raises(ValueError, match="boundary"):
        other.check()
    other.set_boundary(0.3)
    other.check()


def test_a_boundary_asked_for_by_a_call():
    y, call, _ = batch()
    with pytest.raises(ValueError, match="has not been measured yet"):
        Scheme(make_oracle(), target=Mix("boundary"))(y, **call)
    with pytest.raises(ValueError, match="has not been measured yet"):
        Scheme(timesteps=StageAware(0.4)).timesteps  # noqa: B018
    Scheme(make_oracle(), target=Mix(0.5))(y, **call)  # which needs none


# -- bad input ------------------------------------------------------------------------------------


def refused(match, make, error=ValueError):
    with pytest.raises(error, match=match):
        make()


def test_settings_that_are_refused():
    oracle = make_oracle()
    refused("needs an oracle, got none", lambda: Scheme(target=Mix()))
    refused(r"`target` to be a Target such as Mix", lambda: Scheme(oracle, target="mix"), TypeError)
    refused("a TimestepSampler", lambda: Scheme(timesteps="uniform"), TypeError)
    refused('`class_wise` to be True, False or "auto"', lambda: Scheme(oracle, class_wise=None))
    refused('"insert" or "error"', lambda: Scheme(oracle, on_missing="skip"))
    refused('a target for on_missing="error"', lambda: Scheme(oracle, on_missing="error"))
    refused("`weight` to be a function of t, got 0.5", lambda: Scheme(weight=0.5), TypeError)
    refused("an Oracle such as", lambda: Scheme(oracle.bank, target=Mix()), TypeError)
    refused("path of the oracle", lambda: Scheme(oracle, path=CosinePath()))
    refused(
        "needs a bank with labels",
        lambda: Scheme(oracle, target=Mix(), class_wise=True).check(),
    )


@pytest.mark.parametrize("early", [0.0, 1.0])
def test_a_density_that_is_zero_where_loss_is_needed(early):
    sampler = StageAware(early, boundary=0.25)
    scheme = Scheme(timesteps=sampler, preserve_objective=True)
    where = "0.000 to 0.250" if early == 0 else "0.250 to 1.000"
    with pytest.raises(ValueError, match=rf"is 0 from t = {where}.*WithFloor"):
        scheme.check()
    Scheme(timesteps=sampler).check()  # a stage alone may be wanted
    Scheme(timesteps=WithFloor(sampler, 0.1), preserve_objective=True).check()
    # Where the loss does not count, no draws are needed.
    factors = StageFactors(navigation=early, refinement=1 - early, boundary=0.25)
    alone = Scheme(timesteps=sampler, weight=factors, preserve_objective=True)
    alone.check()
    t = torch.tensor([0.1, 0.9])
    expected = [0.25 * early, 0.75 * (1 - early)]
    assert alone.weight_of(t).tolist() == pytest.approx(expected)


def make_empty(boundary=0.3):
    return Scheme(timesteps=StageAware(1.0), preserve_objective=True, boundary=boundary)


def test_the_first_call_refuses_what_cannot_work():
    y, call, _ = batch()
    ways = [
        lambda scheme: scheme(y, **call),
        lambda scheme: scheme.correct(**call),
        lambda scheme: scheme.weight_of(call["t"]),
    ]
    for ask in ways:
        refused("is 0 from t = 0.300 to 1.000", lambda ask=ask: ask(make_empty()))
        later = Phases([Phase(Scheme(), AtStep(3)), Phase(make_empty())])
        refused("is 0 from t = 0.300 to 1.000", lambda ask=ask, later=later: ask(later))
        refused("has not been measured yet", lambda ask=ask: ask(make_empty(None)))
    # A phase that waits for its boundary is looked at when it has one.
    waits = Phases([Phase(Scheme(), AtStep(1)), Phase(make_empty(None))])
    waits(y, **call)
    waits.set_boundary(0.3)
    waits.observe(step=1, total=10)
    refused("is 0 from t = 0.300 to 1.000", lambda: waits(y, **call))


def test_checks_cost_nothing_from_the_second_call_on():
    y, call, _ = batch()
    asked = []

    def weight(t):
        asked.append(len(t))
        return torch.ones_like(t)

    sampler = WithFloor(StageAware(0.5), 0.1)
    scheme = Scheme(timesteps=sampler, weight=weight, preserve_objective=True, boundary=0.3)
    scheme(y, **call)
    assert asked.count(4096) == 1
    scheme(y, **call)
    assert asked.count(4096) == 1
    scheme.set_boundary(0.5)  # another density
    scheme(y, **call)
    assert asked.count(4096) == 2


def test_an_objective_is_preserved_for_draws_that_are_known():
    kept = {"preserve_objective": True}
    refused("`timesteps` with preserve_objective=True, got none", lambda: Scheme(**kept))
    refused(
        "`timesteps` with preserve_objective=True, got none",
        lambda: Scheme(make_oracle(), target=Mix(), **kept),
    )
    assert Scheme(timesteps=LogitNormal(), **kept).weight_of(torch.tensor([0.1]))[0] > 1


def test_calls_that_are_refused():
    y, call, i = batch()
    scheme = Scheme(make_oracle(), target=Mix())

    def asked(**changes):
        return lambda: scheme(y, **{**call, **changes})

    refused("`y` with the shape of `x1`", lambda: scheme(y[:, :1], **call))
    refused("`x1` with the shape of `xt`", lambda: scheme(y, **{**call, "xt": y[:, :1]}))
    refused(r"`t` with shape \(16,\)", asked(t=call["t"][:8]))
    refused(r"in \[0, 1\]", asked(t=500 * call["t"]))
    refused("`prediction` to be one of", asked(prediction="u"))
    refused("`source` below 40", asked(source=i + 40))
    refused(
        r"`weight\(t\)` with shape \(16,\), got \(16, 1\)",
        lambda: Scheme(weight=lambda t: t[:, None])(y, **call),
    )
    plain = Scheme()
    refused("`prediction` to be one of", lambda: plain(y, **call, prediction="u"))
    refused(r"in \[0, 1\]", lambda: plain(y, **{**call, "t": 2 + call["t"]}))


def test_samples_that_are_not_in_the_bank():
    y, call, i = batch()
    for value, part in ((call["x1"], 1), (call["xt"], call["t"][3]), (y, 1)):
        value[3] += 0.5 * part
    insert = Scheme(make_oracle(), target=Mix())
    insert(y, **call)
    assert insert.last.inserted.nonzero().flatten().tolist() == [3]
    error = Scheme(make_oracle(), target=Mix(), on_missing="error")
    refused("1 of 16 are not", lambda: error(y, **call))
    error(y, **call, source=i)  # a twin is known by its row
    # Nobody is asked beyond the boundary.
    late = Scheme(make_oracle(), target=Mix("boundary"), on_missing="error", boundary=0.0)
    late(y, **call)
    wise = Scheme(make_oracle(labels=True), target=Mix())
    refused("Expected `labels`: the class of 1 of 16", lambda: wise(y, **call))
    wise(y, **call, labels=i % 4)
    assert wise.last.inserted.sum() == 1
    wise(y, **call, source=i)
    # A label that is not that of the row: it is none of the rows that are looked at.
    other = Scheme(make_oracle(labels=True), target=Mix())
    refused("got others for 15 of 16", lambda: other(y, **call, labels=(i + 1) % 4))
    other.rows_checked = True
    other(y, **call, labels=(i + 1) % 4)
    assert other.last.inserted.all()


# -- phases ---------------------------------------------------------------------------------------


def make_phases():
    """One of everything that has a state: draws, an adaptive sampler, a detector, a schedule."""
    oracle = make_oracle(labels=True)
    adaptive = WithFloor(LossSecondMoment(4, 2), 0.2)
    return Phases(
        [
            Phase(Scheme(oracle, target=ReferenceSet(6), timesteps=adaptive), AtStep(7), "sets"),
            Phase(
                Scheme(oracle, target=Mix("boundary"), timesteps=StageAware(0.5)),
                AtPlateau(2, window=4, patience=1),
                "oracle",
            ),
            Phase(Scheme(oracle, target=ReferenceSet(5, Concentration())), AtShare(0.8)),
            Phase(Scheme(timesteps=Shifted(LogitNormal(), 0.5), weight=StageFactors(1, 2))),
        ]
    )


TOTAL = 60


def train(phases, steps):
    """What a run sees: targets, weights, messages; each step's draws depend on the step alone."""
    seen = []
    for step in steps:
        for micro in range(2):  # accumulated
            draws = torch.Generator().manual_seed(100 * step + micro)
            t = phases.timesteps.sample(8, generator=draws)
            i = torch.randint(N, (8,), generator=draws)
            x1, x0 = rows()[i], torch.randn(8, *SHAPE, generator=draws)
            xt = phases.path.interpolate(x0, x1, t)
            target, weight = phases(x1 - x0, xt=xt, t=t, x1=x1)
        loss = (target - x1).square().flatten(1).mean(1)
        messages = phases.observe(step=step + 1, total=TOTAL, t=t, loss=loss)
        seen.append((phases.index, t, target, weight, messages))
    return seen


STOPS = (1, 4, 7, 8, 15, 30, 47, 48, 55)


@pytest.fixture(scope="module")
def through():
    """A run that does not stop: what it sees, and its state at each place to stop and its end."""
    phases, seen, states = make_phases(), [], {}
    phases.set_boundary(0.5)
    phases.check()
    for start, stop in pairwise((0, *STOPS, TOTAL)):
        seen += train(phases, range(start, stop))
        states[stop] = pickle.dumps(phases.state_dict())
    return seen, states


def test_phases_follow_one_another(through):
    seen, _ = through
    indices = [entry[0] for entry in seen]
    assert indices == sorted(indices)
    assert indices[5] == 0
    assert indices[6] == 1
    assert indices[-1] == 3
    messages = [line for entry in seen for line in entry[-1]]
    assert len(messages) == 3
    assert messages[0] == ("phase 0 (sets) ends at step 7 (step 7); phase 1 (oracle) begins")
    assert "plateau of navigation at" in messages[1]
    assert "ends at step 48 (80% of 60 steps); phase 3 begins" in messages[2]


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_resumes_equals_one_that_did_not_stop(through, stop):
    expected, states = through
    state = pickle.loads(states[stop])
    assert_plain(state)
    second = make_phases()  # which knows no boundary but from the state
    second.load_state_dict(state)
    found = train(second, range(stop, TOTAL))
    for one, other in zip(expected[stop:], found, strict=True):
        assert one[0] == other[0]
        assert one[-1] == other[-1]
        for a, b in zip(one[1:-1], other[1:-1], strict=True):
            assert torch.equal(a, b)
    assert repr(pickle.loads(states[TOTAL])) == repr(second.state_dict())


def assert_plain(state):
    if isinstance(state, dict):
        assert all(type(name) is str for name in state)
        state = list(state.values())
    if isinstance(state, list):
        for value in state:
            assert_plain(value)
    else:
        assert state is None or type(state) in (int, float, str, bool, torch.Tensor)


def test_several_phases_may_end_at_once():
    phases = Phases([Phase(Scheme(), AtStep(1)), Phase(Scheme(), AtStep(2)), Phase(Scheme())])
    assert len(phases.observe(step=5, total=10)) == 2
    assert phases.index == 2


@pytest.mark.parametrize(
    ("until", "enough"), [(AtStep(2), 8), (AtStep(5000), 1000), (AtShare(0.5), 1000)], ids=repr
)
def test_phases_that_are_told_of_no_step(until, enough, recwarn):
    t = torch.rand(2)
    phases, told = (Phases([Phase(Scheme(), until), Phase(Scheme())]) for _ in range(2))
    told.observe(step=1, total=20_000)
    for _ in range(enough - 1):
        phases.weight_of(t)
        told.weight_of(t)
    assert not recwarn
    with pytest.warns(UserWarning, match=rf"got none in {enough} calls: phase 0 never.*observe\("):
        phases.weight_of(t)
    for _ in range(5):
        phases.weight_of(t)
        told.weight_of(t)
    assert not recwarn  # once


def test_an_objective_in_a_loop_that_observes_nothing():
    phases = Phases([Phase(Scheme(), AtStep(1), "first"), Phase(Scheme())])
    loss_fn, x1 = FlowMatchingLoss(scheme=phases), rows()
    for _ in range(3):
        loss_fn(lambda xt, t: xt, x1)
    with pytest.warns(UserWarning, match=r"phase 0 \(first\) never ends") as caught:
        loss_fn(lambda xt, t: xt, x1)
    assert [warning.filename for warning in caught] == [inspect.getfile(FlowMatchingLoss)]


def test_a_state_without_a_boundary_is_taken_up_too():
    scheme = Scheme(timesteps=StageAware(0.4))
    begin = scheme.state_dict()
    scheme.set_boundary(0.3)
    scheme.load_state_dict(begin)
    assert scheme.boundary is None
    refused("has not been measured yet", scheme.check)
    refused("has not been measured yet", lambda: scheme.timesteps)


def test_phases_that_never_end():
    plain = Scheme()
    refused("Phase 0 of 2 never ends", lambda: Phases([Phase(plain), Phase(plain)]))
    refused("at least one phase", lambda: Phases([]))
    refused("no `until` for the last phase", lambda: Phases([Phase(plain, AtStep(3))]))
    late = Phases([Phase(plain, AtStep(10)), Phase(plain, AtStep(10)), Phase(plain)])
    refused("end after it begins", late.check)
    short = Phases([Phase(plain, AtStep(100)), Phase(plain)])
    short.check()
    refused("within the 50 steps of training", lambda: short.observe(step=1, total=50))
    share = Phases([Phase(plain, AtShare(0.5)), Phase(plain)])
    refused("which is not known", lambda: share.observe(step=1, total=None))
    slow = Phases([Phase(Scheme(boundary=0.1), AtPlateau(1000)), Phase(Scheme(boundary=0.1))])
    t = torch.ones(1)
    refused("within the 500 steps", lambda: slow.observe(step=1, total=500, t=t, loss=t))
    paths = [Phase(Scheme(), AtStep(1)), Phase(Scheme(path=CosinePath()))]
    refused("one path in all phases", lambda: Phases(paths))
    other = Phases([Phase(plain)]).state_dict()
    refused("state of 2 phases, got 1", lambda: short.load_state_dict(other))


def test_a_copy_is_the_scheme_itself():
    """An averaged model deep-copies its module: what the copy holds is driven too."""
    phases = make_phases()
    phases.set_boundary(0.5)
    train(phases, range(3))
    for copied in (copy.copy, copy.deepcopy):
        assert copied(phases) is phases
        assert copied(phases.scheme) is phases.scheme
        assert copied(FlowMatchingLoss(scheme=phases)).scheme is phases


# -- devices --------------------------------------------------------------------------------------

SAMPLERS = [
    *(Uniform(True), LogitNormal(), Mode(), Beta(), UShaped(stratified=True)),
    *(EDMLogNormal(), EDMLogNormal(path=VPPath()), LossSecondMoment(4, 2)),
    *(Shifted(Mode(), 0.5), WithFloor(LogitNormal(), 0.1), StageAware(0.4, 0.2)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samplers_on_cuda(sampler):
    """Fake tensors hold no numbers, so that a device sync is an error too."""
    sampler = copy.deepcopy(sampler)
    scheme = Scheme(timesteps=sampler, weight=MinSNR(), preserve_objective=True)
    scheme.check()  # reads values, once
    with FakeTensorMode(allow_non_fake_inputs=True):
        sampler.update(torch.rand(6, device="cuda"), torch.rand(6, device="cuda"))
        t = sampler.sample(6, device="cuda")
        for value in (t, sampler.quantile(t), sampler.density(t), scheme.weight_of(t)):
            assert value.device.type == "cuda"
            assert value.shape == (6,)
            assert value.dtype == torch.float32


TARGETS = [
    *(Mix(), Mix("boundary"), Mix(Smooth(1.0)), Mix(Concentration())),
    *(ReferenceSet(7), ReferenceSet(7, shared=True)),
]


@pytest.mark.parametrize(
    ("target", "residency", "labels"),
    [
        (target, residency, [0, 1, 2, 3, 0] if (k + j) % 2 else None)
        for k, target in enumerate(TARGETS)
        for j, residency in enumerate(["cuda", "cpu"])
    ],
    ids=repr,
)
def test_schemes_on_cuda(target, residency, labels, monkeypatch):
    monkeypatch.setattr(
        correction, "indices_of", lambda flags: [0, 1, 3]
    )  # reads values, for "boundary"
    bank = LatentBank(rows(), torch.arange(N) % 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        oracle = Oracle(bank.to(residency), engine=Exact("float32"))
        scheme = Scheme(
            oracle, target=target, weight=MinSNR(), boundary=0.4, class_wise=labels is not None
        )
        scheme._fits = scheme.rows_checked = True  # the first call reads values
        xt = torch.randn(5, *SHAPE, device="cuda")
        t, x1 = torch.rand(5, device="cuda"), torch.randn_like(xt)
        u, w = scheme(torch.randn_like(xt), xt=xt, t=t, x1=x1, labels=labels)
        record = [value for value in vars(scheme.last).values() if value is not None]
        for value in (u, w, *record):
            assert value.device.type == "cuda"
        assert u.shape == xt.shape
        assert w.shape == (5,)


def test_a_detector_on_cuda_syncs_once_in_a_while():
    until = AtPlateau(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = torch.rand(4, device="cuda")
        assert until.observe(1, None, t, t, 0.4) is None
        assert until.observe(2, None, t, t, 0.4) is None
        with pytest.raises(Exception, match="local_scalar_dense"):
            until.observe(3, None, t, t, 0.4)


@pytest.mark.parametrize("how", ["tensor", "list", "masks", "condition", "bfloat16", "source"])
def test_rows_that_stand_in_several_classes_are_those_of_their_own(how):
    """Each sample is in all four classes: against weights in float64, row by row."""
    x, y = rows(10).flatten(1).repeat(4, 1), torch.arange(40) // 10
    c = torch.arange(40)[:, None] % 10 / 5.0  # the same in each class
    conditions = c if how == "condition" else None
    mask = torch.arange(6) < 6 - torch.arange(40)[:, None] % 10 // 5 if how == "masks" else None
    x = (x if mask is None else x * mask).to(torch.bfloat16).float()
    dtype = torch.bfloat16 if how == "bfloat16" else None
    options = {"mask": mask, "conditions": conditions, "dtype": dtype}
    bank = LatentBank(x, y, offset=torch.zeros(6), **options)
    oracle, at, known = Oracle(bank, engine=Exact("float64")), torch.arange(0, 40, 3), {}
    if how == "condition":
        oracle, known = (
            ConditionedOracle(bank, None, Condition(bandwidth=0.7)),
            {"condition": c[at]},
        )
    if mask is not None:
        known = {"mask": mask[at]}
    if how == "source":
        known = {"source": torch.full((len(at),), -1)}
    t = torch.linspace(0.05, 0.6, len(at))
    x0 = torch.randn(len(at), 6, generator=torch.Generator().manual_seed(1))
    x0 = x0 if mask is None else x0 * mask[at]
    xt, labels = LinearPath().interpolate(x0, x[at], t), y[at]
    scheme = Scheme(oracle, target=Mix(), on_missing="error")
    labels = labels.tolist() if how == "list" else labels
    target, _ = scheme(x[at] - x0, xt=xt, t=t, x1=x[at], labels=labels, **known)
    logits = -(xt[:, None] - t[:, None, None] * x).double().square().sum(2)
    logits = logits / (2 * (1 - t.double())[:, None] ** 2)
    if how == "condition":
        logits -= (c[at] - c.T).square().double() / (2 * 0.7**2)
    alike = y[at][:, None] == y
    if mask is not None:
        alike &= (mask[at][:, None] == mask).all(2)
    mean = logits.masked_fill(~alike, -torch.inf).softmax(1) @ x.double()
    u = (mean - xt) / (1 - t.double())[:, None]
    torch.testing.assert_close(target.double(), u, rtol=1e-5, atol=1e-5)
    assert not scheme.last.inserted.any()
