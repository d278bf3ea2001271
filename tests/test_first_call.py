"""What the first call of a scheme holds against path, bank and conditions; and what comes friendly.

A number that is not that of the user's training must not enter a target without a word.
"""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

from stagewise import (
    DIFFUSERS,
    AtStep,
    Convention,
    CosinePath,
    EDMPath,
    LatentBank,
    LinearPath,
    LossSecondMoment,
    MinSNR,
    Mix,
    Oracle,
    Phase,
    Phases,
    Prediction,
    ReferenceSet,
    Scheme,
    StageAware,
    StageCurve,
    StageFactors,
    VPPath,
    WithFloor,
    predicted_boundary,
)
from stagewise.adapters import diffusers_target
from stagewise.adapters.paths import NoisedPath
from stagewise.engines import Sharded
from stagewise.losses import FlowMatchingLoss, OracleRegularizer
from stagewise.schemes.refusals import check_rows
from stagewise.stages import stage_edges, stratified_times

N, SHAPE = 200, (3, 4)
KINDS = ["velocity", "data", "noise", "score", "v", "edm"]
REVERSED = Convention(1, 0, -1)


def draws(seed):
    return torch.Generator().manual_seed(seed)


ROWS = torch.randn(N, *SHAPE, generator=draws(0))


def made(n=32, path=None, kind="velocity", seed=1, rows=ROWS):
    """Samples of the library's convention: `y` and the arguments of a call."""
    path = path or LinearPath()
    x1, x0 = (
        rows[torch.randint(N, (n,), generator=draws(seed))],
        torch.randn(n, *SHAPE, generator=draws(seed + 1)),
    )
    t = torch.rand(n, generator=draws(seed + 2)) * 0.96 + 0.02
    y = Prediction(kind).target(path(t), x0, x1)
    return y, {"xt": path.interpolate(x0, x1, t), "t": t, "x1": x1}


def mixing(path=None, labels=None, **options):
    return Scheme(Oracle(LatentBank(ROWS, labels), path), target=Mix(), **options)


# -- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath(), EDMPath()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_fits_is_taken(path, kind, dtype):
    for seed in (1, 11):
        y, call = made(path=path, kind=kind, seed=seed)
        call = {name: value.to(dtype) for name, value in call.items()} | {"t": call["t"]}
        for rows in (y.to(dtype), y):
            scheme = mixing(path)
            scheme(rows, **call, prediction=kind)
            weighs = Scheme(weight=MinSNR(prediction=kind), path=path)
            target, _ = weighs(rows, **call, prediction=kind)
            assert target is rows


def test_what_was_made_in_fewer_bits_than_it_has_is_taken():
    y, call = made(64)
    low = {name: value.bfloat16() for name, value in call.items()}
    x1, t = low["x1"], low["t"].reshape(-1, 1, 1)
    x0 = torch.randn(64, *SHAPE, generator=draws(9)).bfloat16()
    xt = (1 - t) * x0 + t * x1
    mixing()((x1 - x0).float(), xt=xt.float(), t=t.float(), x1=x1.float())
    half = [value.half().float() for value in (y, *call.values())]
    mixing()(half[0], **dict(zip(call, half[1:], strict=True)))


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_a_noisy_target_is_taken_and_a_wrong_one_is_not(noise):
    """As torchcfm's with sigma: y keeps noise that x_t and x_1 do not determine."""
    path = NoisedPath(LinearPath(), noise)
    x1, x0 = ROWS[:64], torch.randn(64, *SHAPE, generator=draws(5))
    t = torch.rand(64, generator=draws(6)).reshape(-1, 1, 1)
    xt = t * x1 + (1 - t) * x0 + noise * torch.randn(64, *SHAPE, generator=draws(7))
    call = {"xt": xt, "t": t, "x1": x1}
    mixing(path)(x1 - x0, **call)
    for wrong in (x0 - x1, x0, x1, 0.2 * x1 - x0):
        with pytest.raises(ValueError, match="a y that is off by"):
            mixing(path)(wrong, **call)
    with pytest.raises(ValueError, match="a y that is off by"):
        mixing(LinearPath())(x1 - x0, xt=t * x1 + (1 - t) * x0, t=t, x1=0.3 * x1 + 0.7 * x1 * t)


# -- what does not --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath()], ids=repr)
@pytest.mark.parametrize("n", [2, 32])
def test_reversed_time_is_refused_with_the_line_that_works(path, n):
    y, call = made(n, path)
    theirs = {**call, "t": 1 - call["t"]}
    line = 'convention="pi0"'
    for scheme in (mixing(path), Scheme(weight=MinSNR(), path=path)):
        with pytest.raises(ValueError, match=line):
            scheme(-y, **theirs)
        with pytest.raises(ValueError, match=line):
            scheme(-y, **theirs)  # and not only once
    cured = mixing(path, convention=REVERSED)
    target, _ = cured(-y, **theirs)
    expected, _ = mixing(path)(y, **call)
    torch.testing.assert_close(target, -expected)
    with pytest.raises(ValueError, match=r"mean square|off by"):
        mixing(path).correct(**theirs)


def test_signs_scales_kinds_and_noise_that_are_wrong():
    y, call = made()
    x1 = call["x1"]
    scheme = mixing()
    for wrong, match in (
        (-y, r"opposite sign of y.*convention=Convention\(0, 1, -1\)"),
        (y - 0.8 * x1, "a y that is off by"),
        (y + 1, "a y that is off by"),
        (x1, 'prediction="data"'),
        (x1 - y, 'prediction="noise"'),
    ):
        with pytest.raises(ValueError, match=match):
            scheme(wrong, **call)
    for factor in (0.2, 3.0):
        with pytest.raises(ValueError, match=r"a noise \(xt - a x1\) / s with a mean of"):
            scheme(y, **{**call, "x1": factor * x1})
    shifted = call["xt"] + (1 - call["t"]).reshape(-1, 1, 1) * 0.8  # noise around 0.8
    with pytest.raises(ValueError, match="a noise"):
        scheme(y - 0.8, **{**call, "xt": shifted})
    # A weight alone holds for any noise; what it is given must still fit.
    weighs = Scheme(weight=StageFactors(2, 1, boundary=0.5))
    weighs(y - 0.8, **{**call, "xt": shifted})
    with pytest.raises(ValueError, match="a y that is off by"):
        Scheme(weight=StageFactors(2, 1, boundary=0.5))(-y, **call)
    # Times alone change neither target nor weight.
    assert torch.equal(Scheme(timesteps=StageAware(0.3, 0.2))(-y, **call)[0], -y)


def test_data_predictions_are_held_against_the_noise():
    y, call = made(kind="data")
    with pytest.raises(ValueError, match='convention="pi0"'):
        mixing()(y, **{**call, "t": 1 - call["t"]}, prediction="data")


def test_only_the_first_call_is_looked_at():
    y, call = made()
    scheme = mixing()
    scheme(y[:0], **{name: value[:0] for name, value in call.items()})  # of none nothing is known
    with pytest.raises(ValueError, match="off by"):
        scheme(-y, **call)
    scheme(y, **call)
    scheme(-y, **call)
    scheme.load_state_dict(scheme.state_dict())
    scheme(-y, **call)


def test_a_call_without_noise_to_see_leaves_it_to_the_next():
    y, call = made()
    late = {**call, "t": torch.ones(32), "xt": call["x1"]}
    scheme = mixing()
    scheme(y, **late)
    with pytest.raises(ValueError, match="off by"):
        scheme(-y, **call)


def test_a_later_phase_is_looked_at_when_it_begins():
    y, call = made()
    phases = Phases([Phase(Scheme(), AtStep(1)), Phase(mixing())])
    phases(-y, **call)
    phases.observe(step=1, total=9)
    with pytest.raises(ValueError, match="off by"):
        phases(-y, **call)


def test_losses_of_the_library_pass():
    _, call = made()
    for kind in KINDS:
        scheme = mixing(CosinePath())
        loss_fn = FlowMatchingLoss(prediction=kind, scheme=scheme, convention=DIFFUSERS)
        loss_fn(lambda xt, t: xt, call["x1"])
        assert scheme.last is not None
    y, call = made()
    regularizer = OracleRegularizer(Oracle(LatentBank(ROWS)))
    with pytest.raises(ValueError, match=r"Convention\(0, 1, -1\)"):
        regularizer(y, -y, **call)


# -- the bank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.18, 4.0])
def test_another_scale_than_the_banks_is_refused(factor):
    y, call = made(rows=factor * ROWS)
    for scheme in (mixing(), Scheme(Oracle(LatentBank(ROWS)), target=ReferenceSet(8))):
        with pytest.raises(ValueError, match="Expected samples at the scale of the bank, got 100%"):
            scheme(y, **call)
    with pytest.raises(ValueError, match="scale of the bank"):
        check_rows(LatentBank(ROWS), call["x1"], known=True)
    # Of one sample alone nothing can be said but how far off it is.
    assert "100% of the samples" in check_rows(LatentBank(ROWS), call["x1"][:1])


def test_a_loop_is_told_once_of_samples_that_are_no_rows():
    moved = ROWS.clone()
    moved[::4] += 0.1
    y, call = made(400, rows=moved)
    with pytest.warns(
        UserWarning, match=r"Scheme: 2\d% of the samples .* nearest row is off by \d+%"
    ) as said:
        mixing()(y, **call)
    assert [warning.filename for warning in said] == [__file__]
    scheme = mixing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixing()(y, **call, source=torch.zeros(400, dtype=torch.int64))
        scheme.rows_checked = True  # as a callback sets it that looks by itself
        scheme(y, **call)
        plain, call = made()
        mixing()(plain, **call)
    assert check_rows(LatentBank(ROWS), call["x1"]) is None
    assert check_rows(LatentBank(ROWS[:100]), ROWS[100:], shard=True) is None


# -- conventions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", [REVERSED, DIFFUSERS, Convention(0, 1, -1)], ids=repr)
@pytest.mark.parametrize("kind", ["velocity", "data", "noise"])
def test_a_convention_is_the_same_training_in_other_words(convention, kind):
    y, call = made(kind=kind)
    sign = convention.sign if kind == "velocity" else 1
    theirs = {**call, "t": convention.from_t(call["t"])}
    options = {"weight": MinSNR(prediction=kind), "timesteps": LossSecondMoment(4, 2)}
    own, other = mixing(**options), mixing(**options, convention=convention)
    expected, weight = own(y, **call, prediction=kind)
    found, same = other(sign * y, **theirs, prediction=kind)
    torch.testing.assert_close(sign * found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(same, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.weight_of(theirs["t"]), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.last.t, call["t"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        sign * other.correct(**theirs, prediction=kind),
        own.correct(**call, prediction=kind),
        rtol=1e-3,
        atol=1e-3,
    )
    own.observe(step=1, total=9, t=call["t"], loss=torch.ones(32))
    other.observe(step=1, total=9, t=theirs["t"], loss=torch.ones(32))
    count = [scheme.state_dict()["timesteps"]["count"] for scheme in (own, other)]
    assert torch.equal(*count)


def test_integer_timesteps_and_phases_in_a_convention():
    _, call = made()
    steps = (1000 * (1 - call["t"])).long().clamp(1, 999)
    t = (1 - steps / 1000).reshape(-1, 1, 1)
    x1, x0 = call["x1"], torch.randn_like(call["x1"])
    call = {"xt": t * x1 + (1 - t) * x0, "t": steps, "x1": x1}
    scheme = mixing(convention=DIFFUSERS)
    phases = Phases([Phase(scheme, AtStep(1)), Phase(Scheme(convention=DIFFUSERS))])
    target, weight = phases(x0 - x1, **call)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(scheme.last.t, t.flatten())
    assert phases.convention == DIFFUSERS
    with pytest.raises(ValueError, match="one convention in all phases"):
        Phases([Phase(scheme, AtStep(1)), Phase(Scheme())])
    with pytest.raises(ValueError, match=r"FlowMatchingLoss\(convention=\.\.\., scheme=Scheme"):
        FlowMatchingLoss(scheme=scheme)


# -- conditions -----------------------------------------------------------------------------------

LABELS = torch.arange(N) % 4
TEXT = torch.randn(32, 5, 6)


def test_labels_that_a_bank_cannot_heed_are_refused():
    y, call = made()
    for labels in (torch.zeros(32, dtype=torch.int64), [0] * 32):
        with pytest.raises(ValueError, match=r"LatentBank\(x, labels\).*class_wise=False"):
            mixing()(y, **call, labels=labels)
        mixing(class_wise=False)(y, **call, labels=labels)
        Scheme(weight=MinSNR())(y, **call, labels=labels)
    mixing()(y, **call, labels=[None] * 32)
    assert mixing(class_wise=False).unconditional
    assert not mixing().unconditional


def test_labels_of_a_column_and_whole_floats_are_labels():
    y, call = made()
    own = LABELS[torch.randint(N, (32,), generator=draws(1))]
    expected, _ = mixing(labels=LABELS)(y, **call, labels=own)
    unchecked = mixing(labels=LABELS)
    unchecked.rows_checked = True  # they are not those of the rows
    other, _ = unchecked(y, **call, labels=(own + 1) % 4)
    assert not torch.allclose(expected, other)
    for labels in (own[:, None], own.double(), own[:, None].float(), own.to(torch.uint8)):
        found, _ = mixing(labels=LABELS)(y, **call, labels=labels)
        assert torch.equal(found, expected)
    for labels in (own + 0.5, nn.functional.one_hot(own), own[:5]):
        with pytest.raises(ValueError, match=r"integer `labels` with shape \(32,\), got"):
            mixing(labels=LABELS)(y, **call, labels=labels)


def test_diffusers_scripts_condition_on_text():
    _, call = made()
    x1, noise, sigmas = call["x1"], torch.randn_like(call["x1"]), 1 - call["t"]
    s = sigmas.reshape(-1, 1, 1)
    given = ((1 - s) * x1 + s * noise, x1, noise, sigmas)
    with pytest.raises(ValueError, match="changes what it learns.*class_wise=False"):
        diffusers_target(*given, mixing())
    later = Phases([Phase(Scheme(), AtStep(5)), Phase(mixing())])
    with pytest.raises(ValueError, match="class_wise=False"):
        diffusers_target(*given, later)
    diffusers_target(*given, mixing(class_wise=False))
    diffusers_target(*given, mixing(labels=LABELS))
    diffusers_target(*given, Scheme(weight=MinSNR()))


@pytest.mark.parametrize(
    ("labels", "args", "kwargs"),
    [
        (None, (LABELS[:32],), {}),
        (None, (TEXT,), {}),
        (LABELS, (), {"text": TEXT}),
        (LABELS, (LABELS[:32], {"deep": [TEXT]}), {}),
        (LABELS, (nn.functional.one_hot(LABELS[:32]).float(),), {}),
        (LABELS, (torch.rand(32),), {}),
        (LABELS, (LABELS[:32], LABELS[:32]), {}),
    ],
)
def test_conditions_that_a_target_ignores_are_refused_by_the_objective(labels, args, kwargs):
    def model(xt, t, *args, **kwargs):
        return xt

    for phases in (False, True):
        scheme = mixing(labels=labels)
        scheme = Phases([Phase(Scheme(), AtStep(9)), Phase(scheme)]) if phases else scheme
        with pytest.raises(ValueError, match="class_wise=False"):
            FlowMatchingLoss(scheme=scheme)(model, ROWS[:32], *args, **kwargs)
    for scheme in (mixing(labels=labels, class_wise=False), Scheme(weight=MinSNR())):
        FlowMatchingLoss(scheme=scheme)(model, ROWS[:32], *args, **kwargs)
    wise = FlowMatchingLoss(scheme=mixing(labels=LABELS))
    wise(model, ROWS[:32], LABELS[:32, None], None, flag=True)
    wise.eval()
    wise(model, ROWS[:32], TEXT)  # the scheme rests


# -- samplers that wait ---------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [lambda s: s, lambda s: WithFloor(s, 0.1)])
def test_an_adaptive_sampler_that_is_told_nothing_says_so_once(inner):
    y, call = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = Scheme(timesteps=inner(LossSecondMoment()))
        told.observe(step=1, total=None, t=call["t"], loss=call["t"])
        fixed = Scheme(timesteps=StageAware(0.3, 0.2))
        for step in range(1, 60):
            told.observe(step=step, total=None)
            fixed.observe(step=step, total=None)
    scheme = Scheme(timesteps=inner(LossSecondMoment()))
    phases = Phases([Phase(Scheme(timesteps=inner(LossSecondMoment())), AtStep(99)), Phase(told)])
    for asked in (scheme, phases):
        with pytest.warns(UserWarning, match=r"scheme\.observe\(step=.*t=.*loss=") as said:
            # t alone is not enough
            [asked.observe(step=step, total=None, t=call["t"]) for step in range(60)]
        assert len(said) == 1


@pytest.mark.filterwarnings("error")
def test_calls_of_a_step_that_is_observed_are_not_counted():
    y, call = made(2)
    scheme = Scheme(timesteps=LossSecondMoment())
    for step in range(1, 30):
        [scheme(y, **call) for _ in range(50 if step < 15 else 1)]
        losses = {"t": call["t"], "loss": call["t"]} if step % 16 == 0 else {}
        scheme.observe(step=step, total=None, **losses)


def test_an_adaptive_sampler_that_is_never_observed_says_so():
    y, call = made(2)
    scheme = Scheme(timesteps=LossSecondMoment())
    with pytest.warns(UserWarning, match="adapts to losses and got none") as said:
        [scheme(y, **call) for _ in range(1100)]
    assert len(said) == 1


# -- friendly arguments ---------------------------------------------------------------------------


def test_times_of_any_shape():
    _, call = made(8)
    xt, x1 = call["xt"], call["x1"]
    oracle = Oracle(LatentBank(ROWS))
    wide = torch.full((8,), 0.4)
    y = (x1 - xt) / 0.6
    ways = (0.4, torch.tensor(0.4), wide[:, None], wide[:, None, None], wide.numpy()[0])
    for t in ways:
        for ask in (
            lambda t: oracle.posterior(xt, t).mean,
            lambda t: oracle.correction(xt, t, x1),
            lambda t: oracle.velocity(xt, t),
        ):
            torch.testing.assert_close(ask(t), ask(wide), rtol=1e-5, atol=1e-5)
        scheme = mixing()
        scheme._fits = True
        target, weight = scheme(y, xt=xt, t=t, x1=x1)
        expected, _ = scheme(y, xt=xt, t=wide, x1=x1)
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
        assert weight.shape == (8,)
    for ask in (lambda t: oracle.velocity(xt, t), lambda t: mixing()(y, xt=xt, t=t, x1=x1)):
        for bad in (wide[:4], wide.reshape(2, 4), torch.zeros(1, 8)):
            with pytest.raises(ValueError, match=r"Expected `t` with shape \(8,\)"):
                ask(bad)
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            ask(40)
        with pytest.raises(TypeError, match=r"`t` to be a tensor, got list. Give torch\.as_tensor"):
            ask([0.4] * 8)
    loss = FlowMatchingLoss()
    loss(lambda xt, t: xt + t.reshape(-1, 1, 1), x1, t=0.4)
    assert loss.last.t.tolist() == pytest.approx([0.4] * 8)


def test_arrays_in_place_of_tensors_are_refused_with_a_cure():
    y, call = made(8)
    oracle, array = Oracle(LatentBank(ROWS)), call["xt"].numpy()
    for ask in (
        lambda: oracle.posterior(array, 0.4),
        lambda: oracle.velocity(array, 0.4),
        lambda: oracle.correction(array, 0.4, call["x1"]),
        lambda: mixing()(y, **{**call, "xt": array}),
        lambda: mixing().correct(**{**call, "xt": array}),
    ):
        with pytest.raises(TypeError, match=r"`xt` to be a tensor, got ndarray.*as_tensor\(xt\)"):
            ask()
    with pytest.raises(TypeError, match="`x1` to be a tensor"):
        oracle.correction(call["xt"], 0.4, array)
    with pytest.raises(TypeError, match="`y` to be a tensor"):
        mixing()(array, **call)


# -- the boundary ---------------------------------------------------------------------------------


def test_a_scheme_measures_its_boundary():
    oracle = Oracle(LatentBank(ROWS, LABELS))
    for wise, given in ((True, "auto"), (True, True), (False, False)):
        scheme = Scheme(oracle, target=Mix("boundary"), class_wise=given)
        with pytest.raises(ValueError, match=r"scheme\.measure_boundary\(\)"):
            scheme.check()
        found = scheme.measure_boundary(seed=3)
        predicted = predicted_boundary(oracle.bank, oracle.path, class_wise=wise)
        t = stratified_times(stage_edges(predicted, 24), 64, seed=3)
        curve = StageCurve.measure(oracle, t, seed=(3, 1), class_wise=wise)
        assert found == curve.boundary(seed=3)
        assert scheme.boundary == found.midpoint
        scheme.check()
    curve = StageCurve.measure(oracle, seed=3)
    assert torch.equal(curve.values, StageCurve.measure(oracle, seed=3, class_wise=True).values)
    assert curve.boundary(seed=3) != found
    assert StageCurve.measure(Oracle(LatentBank(ROWS)), seed=(3, 4)).t.shape == (24, 64)


def test_phases_measure_their_boundary():
    own = Scheme(Oracle(LatentBank(ROWS)), target=Mix("boundary"), boundary=0.9)
    phases = Phases([Phase(own, AtStep(3)), Phase(Scheme(timesteps=StageAware(0.4)))])
    found = phases.measure_boundary()
    assert (own.boundary, phases.phases[1].scheme.boundary) == (0.9, found.midpoint)
    phases.check()


def test_a_boundary_that_cannot_be_measured():
    with pytest.raises(ValueError, match=r"an oracle to measure .*Scheme\(Oracle\(bank, path\)"):
        Scheme(timesteps=StageAware(0.3)).measure_boundary()
    with pytest.raises(ValueError, match="an oracle to measure"):
        Phases([Phase(Scheme())]).measure_boundary()
    scheme = mixing()
    scheme.oracle.engine = Sharded.__new__(Sharded)
    with pytest.raises(ValueError, match="spread over the ranks"):
        scheme.measure_boundary()


# -- compiled code --------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """`torch.compile` that traces and compiles nothing."""
    torch._dynamo.reset()
    yield lambda thing: torch.compile(thing, backend="eager")
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_module_trains_with_an_objective_that_mixes(compiled):
    class Step(nn.Module):
        def __init__(self, scheme):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(13, 12)
            self.loss_fn = FlowMatchingLoss(scheme=scheme)

        def model(self, xt, t):
            return self.net(torch.cat([xt.flatten(1), t[:, None]], 1)).reshape(xt.shape)

        def forward(self, x1):
            return self.loss_fn(self.model, x1)

    found = []
    for run in (lambda step: step, compiled):
        adapting = mixing(timesteps=WithFloor(LossSecondMoment(4, 2), 0.1), weight=MinSNR())
        scheme = Phases([Phase(adapting, AtStep(2)), Phase(mixing())])
        step, losses = Step(scheme), []
        running = run(step)
        torch.manual_seed(1)
        for k in range(1, 4):
            loss = running(ROWS[:16])
            loss.backward()
            losses.append(float(loss))
            scheme.observe(step=k, total=3)
        found.append((losses, [p.grad for p in step.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, same in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, same)


@pytest.mark.slow
def test_a_compiled_function_asks_scheme_and_oracle(compiled):
    y, call = made()
    scheme, oracle = mixing(), Oracle(LatentBank(ROWS))

    def step(y, xt, t, x1):
        u, w = scheme(2 * y - y, xt=xt, t=t, x1=x1)
        added = scheme.correct(xt=xt, t=t, x1=x1) + oracle.correction(xt, t, x1)
        mean = oracle.posterior(xt, t).mean
        return u + added + mean + oracle.velocity(xt, t), w * scheme.weight_of(t)

    for found, expected in zip(compiled(step)(y, **call), step(y, **call), strict=True):
        torch.testing.assert_close(found, expected)


def test_methods_that_are_not_traced_look_as_they_did():
    for cls in (Scheme, Phases):
        assert list(inspect.signature(cls.__call__).parameters)[:2] == ["self", "y"]
    assert Scheme.correct.__doc__.startswith("`lambda c_t")
    scheme = Scheme(weight=MinSNR())
    again = pickle.loads(pickle.dumps(scheme))
    y, call = made()
    assert torch.equal(again(y, **call)[1], scheme(y, **call)[1])
    assert copy.deepcopy(scheme) is scheme
    assert pickle.loads(pickle.dumps(scheme.weight_of))(call["t"]).shape == (32,)


def test_noise_that_depends_on_its_data_is_refused_in_a_loop():
    """Hand-made targets with pairs of a coupling: normal noise, but not independent of x_1."""
    x1 = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(128, 8, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.05, 0.9, 128)
    for lean, refused in ((0.6, True), (0.0, False)):
        x0 = lean * x1 + (1 - lean**2) ** 0.5 * z
        scheme = Scheme(Oracle(LatentBank(x1)), target=Mix())
        asked = {"xt": LinearPath().interpolate(x0, x1, t), "t": t, "x1": x1}
        if refused:
            with pytest.raises(ValueError, match="independent"):
                scheme(x1 - x0, **asked)
        else:
            scheme(x1 - x0, **asked)
