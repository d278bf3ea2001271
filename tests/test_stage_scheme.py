"""`StageScheme` in training: what it steers, what it logs, what it refuses."""

import copy
import csv
import functools
import json
import logging
import math
import re
import runpy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from stagewise import (
    AtEvent,
    AtPlateau,
    AtShare,
    AtStep,
    CosinePath,
    LatentBank,
    LinearPath,
    LogitNormal,
    LossSecondMoment,
    Mix,
    Oracle,
    Phase,
    Phases,
    Scheme,
    StageAware,
    StageCurve,
    StageFactors,
    Uniform,
)
from stagewise.adapters import diffusers_target
from stagewise.callbacks import (
    PosteriorMonitor,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.callbacks.stage_transitions import (
    BOUNDARY_MOVED,
    MEMORIZATION_ONSET,
    NAVIGATION_LEARNED,
)
from stagewise.certificate import Certificate
from stagewise.engines import Exact, Nearest, Sharded
from stagewise.losses import FlowMatchingLoss, StageWeightedLoss
from stagewise.schemes.refusals import check_rows

cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated)"),
]


class Base(pl.LightningModule):
    """A perceptron; the training step is what differs."""

    def __init__(self, dim=6):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(dim + 1, 16), nn.SiLU(), nn.Linear(16, dim))

    def velocity(self, xt, t):
        return self.net(torch.cat([xt, t[:, None].to(xt)], 1))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Matched(Base):
    """What a user of torchcfm has."""

    def __init__(self, matcher=None):
        super().__init__()
        self.FM = matcher or cfm.ConditionalFlowMatcher(0.0)
        self.seen = []

    def training_step(self, batch, batch_idx):
        x1 = batch[0]
        t, xt, u = self.FM.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        self.seen.append((t, x1, xt, u))
        return (self.velocity(xt, t) - u).square().flatten(1).mean(1).mean()


class Lossy(Base):
    """What a user of stagewise has."""

    def __init__(self, **options):
        super().__init__()
        self.loss_fn = FlowMatchingLoss(**options)

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self.velocity, batch[0])


class Inline(Base):
    """What a user of diffusers' scripts has, with the one line changed."""

    def __init__(self, scheme):
        super().__init__()
        self.scheme = scheme

    def training_step(self, batch, batch_idx):
        x = batch[0]
        noise, sigmas = torch.randn_like(x), torch.rand(len(x), 1)
        noisy = (1 - sigmas) * x + sigmas * noise
        target = diffusers_target(noisy, x, noise, sigmas, self.scheme)
        return (self.velocity(noisy, 1000 * sigmas[:, 0]) - target).square().mean()


class Gradients(pl.Callback):
    """Keeps the gradient of every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


@pytest.fixture
def fit(make_data, make_loader, make_trainer):
    """Trains a module with the callbacks; gives the trainer."""

    def fit(module, *callbacks, shuffle=False, val=False, **options):
        x, _ = make_data()
        loader = make_loader(x, shuffle=shuffle)
        trainer = make_trainer(*callbacks, **options)
        pl.seed_everything(7, verbose=False)
        trainer.fit(module, loader, loader if val else None)
        return trainer

    return fit


@pytest.fixture
def bank(make_data):
    return LatentBank(make_data()[0])


SCHEMES = {
    "mix": lambda bank: Scheme(Oracle(bank), target=Mix(0.7)),
    "boundary": lambda bank: Scheme(
        Oracle(bank), target=Mix("boundary"), boundary=0.6, timesteps=LogitNormal(-0.5, 1.0)
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_three_ways_in_give_the_same_first_gradient(fit, bank, make_data, make_loader, name):
    scheme = SCHEMES[name](bank)
    modules = {"loss": Lossy(), "matcher": Matched()}
    gradients = {}
    for way, module in modules.items():
        keep = Gradients()
        fit(module, StageScheme(SCHEMES[name](bank)), keep, max_steps=1)
        gradients[way] = keep.seen[0]

    def objective(model, x1):
        return FlowMatchingLoss(scheme=scheme)(model, x1)

    def loop(model, x1):  # as the README has it
        path = scheme.path
        x0, t = torch.randn_like(x1), scheme.timesteps.sample(len(x1))
        xt = path.interpolate(x0, x1, t)
        u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (model(xt, t) - u).square().flatten(1).mean(1)).mean()

    for way in (objective, loop):
        module = Base()
        pl.seed_everything(7, verbose=False)
        (x1,) = next(iter(make_loader(make_data()[0])))
        way(module.velocity, x1).backward()
        gradients[way.__name__] = torch.cat([p.grad.flatten() for p in module.parameters()])
    for way in ("loss", "matcher", "objective"):
        assert torch.equal(gradients[way], gradients["loop"]), way
    plain = Gradients()
    fit(Lossy(), plain, max_steps=1)
    assert not torch.equal(plain.seen[0], gradients["loop"])


def test_a_function_makes_the_scheme_of_the_runs_oracle(fit, bank):
    made, engine, kept = [], Exact(), {}

    def phases(oracle):
        made.append(oracle)
        first = Scheme(oracle, target=Mix(0.7))
        return Phases([Phase(first, AtStep(2)), Phase(Scheme(oracle))])

    for way, scheme in {
        "function": StageScheme(phases, engine=engine),
        "scheme": StageScheme(phases(Oracle(bank, engine=engine))),
    }.items():
        kept[way] = Gradients()
        fit(Lossy(), scheme, kept[way], max_steps=4)
        assert scheme.scheme.index == 1
    (read, _) = made[::-1]
    assert read.engine is engine
    assert read.bank.fingerprint == bank.fingerprint
    assert all(map(torch.equal, kept["function"].seen, kept["scheme"].seen))
    with pytest.raises(TypeError, match="function that makes a Scheme or Phases, got Mix"):
        fit(Lossy(), StageScheme(lambda oracle: Mix()))


def test_an_engine_that_shards_needs_the_part_of_the_rank(fit, bank, make_trainer, make_loader):
    with pytest.raises(ValueError, match="the part of the bank that each rank holds"):
        fit(Lossy(), StageScheme(target=Mix(0.5), engine=Sharded()))

    class Data(pl.LightningDataModule):
        def latent_shard(self):
            return bank

        def train_dataloader(self):
            return make_loader(bank.rows)

    scheme = StageScheme(target=Mix(0.5), engine=Sharded())
    # The row of each sample has to be said; this module does not.
    with pytest.raises(ValueError, match="Expected `source` with Sharded"):
        make_trainer(scheme).fit(Lossy(), datamodule=Data())
    assert scheme.scheme.oracle.bank is bank
    Data.latent_shard = lambda self: bank.rows
    with pytest.raises(TypeError, match=r"latent_shard\(\)` of the data module .* got Tensor"):
        make_trainer(StageScheme(target=Mix(0.5), engine=Sharded())).fit(Lossy(), datamodule=Data())


def given_scheme(bank):
    return StageScheme(Scheme(Oracle(bank), target=Mix(0.0)))


def parts_that_read_bank_and_boundary(bank):
    return StageScheme(target=Mix(0.0), weight=StageFactors(1.0, 1.0))


def parts_that_read_nothing(bank):
    return StageScheme(timesteps=Uniform())


@pytest.mark.parametrize(
    ("kind", "steer"),
    [
        (Lossy, given_scheme),
        (Lossy, parts_that_read_bank_and_boundary),
        (Lossy, parts_that_read_nothing),
        (Matched, given_scheme),
        (Matched, parts_that_read_nothing),
    ],
)
def test_a_scheme_that_changes_nothing_changes_no_bit(fit, bank, weights, kind, steer):
    plain, steered = kind(), kind()
    fit(plain, shuffle=True, max_steps=6)
    fit(steered, steer(bank), shuffle=True, max_steps=6)
    assert torch.equal(weights(plain), weights(steered))


@pytest.mark.parametrize("kind", [Lossy, Matched])
def test_afterwards_the_module_is_what_it_was(fit, bank, kind):
    module = kind()
    thing = module.FM if kind is Matched else module.loss_fn
    before = dict(vars(thing))
    fit(module, StageScheme(SCHEMES["mix"](bank)))
    assert {k: v for k, v in vars(thing).items() if k != "last"} == {
        k: v for k, v in before.items() if k != "last"
    }


class Failing(Matched):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise InterruptedError


def test_restored_after_an_exception(fit, bank):
    module = Failing()
    before = dict(vars(module.FM))
    with pytest.raises(InterruptedError):
        fit(module, StageScheme(SCHEMES["mix"](bank)))
    t, x1, xt, u = module.seen[0]
    assert not torch.allclose(u, (x1 - xt) / (1 - t[:, None]), atol=1e-3)
    assert vars(module.FM) == before


class Saved(Matched):
    """Keeps its matcher among the hyperparameters, as `save_hyperparameters` invites to."""

    def __init__(self, matcher):
        super().__init__(matcher)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:.*(Attribute 'matcher'|checkpointing)")
def test_checkpoints_hold_the_matcher_as_it_was(fit, bank, tmp_path):
    module = Saved(cfm.ConditionalFlowMatcher(0.0))
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    scheme = Scheme(Oracle(bank), target=Mix(1.0))
    fit(module, StageScheme(scheme), saved, enable_checkpointing=True)
    loaded = torch.load(tmp_path / "step=2.ckpt", weights_only=False)["hyper_parameters"]
    _, x1, _, _ = module.seen[0]
    x0 = torch.randn_like(x1)
    _, _, u = loaded["matcher"].sample_location_and_conditional_flow(x0, x1)
    assert torch.equal(u, x1 - x0)
    assert (tmp_path / "step=2.ckpt").stat().st_size < 30_000, "the bank is not in it"


def test_validation_sees_the_plain_targets(fit, bank):
    class Validated(Matched):
        def validation_step(self, batch, batch_idx):
            x0 = torch.randn_like(batch[0])
            _, _, u = self.FM.sample_location_and_conditional_flow(x0, batch[0])
            assert torch.equal(u, batch[0] - x0)

    module = Validated()
    fit(module, StageScheme(SCHEMES["mix"](bank)), val=True, max_epochs=2, max_steps=-1)
    assert len(module.seen) == 16
    for t, x1, xt, u in module.seen:
        assert not torch.allclose(u, (x1 - xt) / (1 - t[:, None]), atol=1e-3)


def test_gradient_accumulation_counts_optimizer_steps(fit, bank):
    phases = Phases([Phase(Scheme(), AtStep(2)), Phase(SCHEMES["mix"](bank))])
    module, callback, keep = Matched(), StageScheme(phases), Gradients()
    observed, observe = [], phases.observe
    phases.observe = lambda **options: observed.append(options["step"]) or observe(**options)
    fit(module, callback, keep, accumulate_grad_batches=3, max_steps=4, max_epochs=-1)
    steered = [
        not torch.allclose(u, (x1 - xt) / (1 - t[:, None]), atol=1e-3)
        for t, x1, xt, u in module.seen
    ]
    assert len(keep.seen) == 4
    assert observed == [1, 2, 3, 4]
    # An epoch has eight batches: three, three and two for a step.
    assert steered == [False] * 6 + [True] * (len(steered) - 6)
    assert [event["step"] for event in callback.transitions] == [2]


def test_bf16_mixed(fit, bank):
    class Half(Matched):
        def training_step(self, batch, batch_idx):
            assert torch.is_autocast_enabled("cpu")
            return super().training_step(batch, batch_idx)

    module = Half()
    scheme = SCHEMES["mix"](bank)
    fit(module, StageScheme(scheme), precision="bf16-mixed", max_steps=1)
    t, x1, xt, u = module.seen[0]
    oracle = Oracle(bank).correction(xt, t, x1)
    conditional = (x1 - xt) / (1 - t[:, None])
    torch.testing.assert_close(u, conditional + 0.7 * oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_changes_do_not_recompile_the_network(fit, bank):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    phases = Phases(
        [
            Phase(Scheme(Oracle(bank), target=Mix(0.2), boundary=0.3), AtStep(2)),
            Phase(Scheme(Oracle(bank), target=Mix("boundary"), boundary=0.5), AtStep(4)),
            Phase(Scheme(timesteps=LogitNormal(), boundary=0.4)),
        ]
    )
    module = Lossy()
    module.net = torch.compile(module.net, backend=backend)
    callback = StageScheme(phases)
    fit(module, callback, max_steps=6)
    assert len(callback.transitions) == 2
    assert len(compiled) == 1


def test_averaged_weights_copy_neither_bank_nor_scheme(fit, bank):
    ema = EMAWeightAveraging(decay=0.5)
    scheme = SCHEMES["mix"](bank)
    module = Lossy()
    fit(module, ema, StageScheme(scheme), max_steps=4)
    averaged = ema._average_model.module
    assert averaged.loss_fn is not module.loss_fn
    assert averaged.loss_fn.scheme is None
    matched = Matched()
    ema = EMAWeightAveraging(decay=0.5)
    fit(matched, StageScheme(scheme), ema, max_steps=4)
    copied = ema._average_model.module.FM
    assert copied is not matched.FM
    assert vars(copied) == vars(matched.FM)
    assert Scheme(Oracle(bank)).oracle.bank is copy.deepcopy(scheme).oracle.bank


# -- the parts, the boundary ---------------------------------------------------------------------


def test_parts_make_the_scheme_of_the_maker(fit):
    module = Matched(cfm.VariancePreservingConditionalFlowMatcher(0.0))
    callback = StageScheme(target=Mix("boundary"), timesteps=StageAware(0.5), seed=3)
    fit(module, callback, max_steps=1)
    scheme = callback.scheme
    assert isinstance(scheme.path, CosinePath)
    assert scheme.oracle.path is scheme.path
    assert len(scheme.oracle.bank) == 64
    assert 0 < scheme.boundary < 1
    assert scheme.seed == 3


def test_parts_leave_what_the_loss_has(fit, bank):
    module = Lossy(timesteps=LogitNormal(-2, 0.1), weight=lambda t: 1 + t)
    callback = StageScheme(target=Mix(1.0), bank=bank)
    fit(module, callback, max_steps=1)
    assert module.loss_fn.last.t.max() < 0.2
    assert torch.equal(module.loss_fn.last.weight, 1 + module.loss_fn.last.t)
    fit(module, StageScheme(timesteps=Uniform()), max_steps=1)
    assert module.loss_fn.last.t.max() > 0.2


def test_without_parts_the_scheme_of_the_loss_is_driven(fit, bank):
    scheme = Scheme(Oracle(bank), target=Mix("boundary"))
    module = Lossy(scheme=scheme)
    fit(module, StageScheme(), max_steps=1)
    assert scheme.boundary is not None
    assert module.loss_fn.scheme is scheme
    with pytest.raises(ValueError, match="a scheme or its parts, got none"):
        fit(Lossy(), StageScheme())


def test_boundary_is_that_of_a_monitor_of_the_same_path(fit, monkeypatch):
    measured = []
    measure = StageCurve.measure.__func__

    def noted(cls, oracle, *args, **options):
        measured.append(oracle)
        return measure(cls, oracle, *args, **options)

    monkeypatch.setattr(StageCurve, "measure", classmethod(noted))
    monitor = PosteriorMonitor(every_n_steps=2, strata=4, queries=8)
    callback = StageScheme(target=Mix("boundary"))
    fit(Lossy(), monitor, callback, max_steps=1)
    assert callback.scheme.boundary == monitor.boundary.midpoint
    assert callback.scheme.oracle.bank is measured[0].bank, "and so is the bank"
    assert len(measured) == 1

    other = StageScheme(target=Mix("boundary"))
    watch_linear = PosteriorMonitor(path=LinearPath(), every_n_steps=2, strata=4, queries=8)
    module = Matched(cfm.VariancePreservingConditionalFlowMatcher(0.0))
    fit(module, watch_linear, other, max_steps=1)
    assert len(measured) == 3
    assert other.scheme.boundary != watch_linear.boundary.midpoint


def test_boundary_is_measured_on_the_path_of_the_maker(fit, bank):
    variance_preserving = cfm.VariancePreservingConditionalFlowMatcher
    scheme = Scheme(timesteps=StageAware(0.5))
    fit(Matched(variance_preserving(0.0)), StageScheme(scheme), max_steps=1)
    parts = StageScheme(timesteps=StageAware(0.5), target=Mix())
    fit(Matched(variance_preserving(0.0)), parts, max_steps=1)
    assert scheme.boundary == parts.scheme.boundary
    linear = Scheme(timesteps=StageAware(0.5))
    fit(Matched(), StageScheme(linear), max_steps=1)
    assert abs(linear.boundary - scheme.boundary) > 0.01


def test_boundary_is_measured_once_where_nothing_watches(fit, bank, lightning_log):
    scheme = Scheme(Oracle(bank), target=Mix("boundary"))
    fit(Lossy(), StageScheme(scheme), max_steps=2)
    first = scheme.boundary
    again = Scheme(Oracle(bank), target=Mix("boundary"))
    state = None

    class State(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            nonlocal state
            state = torch.get_rng_state()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert batch_idx or torch.equal(torch.get_rng_state(), state)

    fit(Lossy(), StageScheme(again), State(), max_steps=2)
    assert again.boundary == first
    assert lightning_log.text.count("the stages meet at t =") == 2
    given = Scheme(Oracle(bank), target=Mix("boundary"), boundary=0.25)
    fit(Lossy(), StageScheme(given), max_steps=2)
    assert given.boundary == 0.25


def test_a_certificate_is_written_once_and_answers(fit, bank, tmp_path, monkeypatch):
    file, modules, made = tmp_path / "made.certificate", [], []
    answered = []
    answer = Certificate.answer

    def counted(self, *args, **kwargs):
        found = answer(self, *args, **kwargs)
        answered.append(found is not None)
        return found

    monkeypatch.setattr(Certificate, "answer", counted)
    for certificate in (None, file, file):
        callback = StageScheme(
            target=Mix(1.0), timesteps=Uniform(), bank=bank, certificate=certificate
        )
        modules.append(Lossy())
        fit(modules[-1], callback, max_steps=4)
        made.append(file.exists() and file.stat().st_mtime_ns)
    assert made[0] is False
    assert made[1] == made[2]
    assert sum(answered) >= 2
    plain, *others = ([p.detach() for p in module.parameters()] for module in modules)
    for other in others:
        for mine, theirs in zip(plain, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="leave it out with Sharded"):
        fit(
            Lossy(),
            StageScheme(
                target=Mix(1.0), boundary=0.4, bank=bank, engine=Sharded(), certificate=file
            ),
            max_steps=1,
        )


# -- what is logged ------------------------------------------------------------------------------


def test_logs_means_at_the_trainers_pace(fit, bank, tmp_path):
    scheme = Scheme(
        Oracle(bank), target=Mix("boundary"), weight=lambda t: 1 + t, boundary=0.5, seed=1
    )
    logger = CSVLogger(tmp_path, "csv")
    module = Lossy()
    seen = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(scheme.last)

    fit(module, StageScheme(scheme), Keep(), logger=logger, log_every_n_steps=3, max_steps=7)
    text = (tmp_path / "csv/version_0/metrics.csv").read_text()
    table = list(csv.DictReader(text.splitlines()))
    assert [int(row["step"]) for row in table] == [2, 5]
    for row, records in zip(table, (seen[:3], seen[3:6]), strict=True):
        t, lam, weight = (
            torch.cat([getattr(record, key).double() for record in records])
            for key in ("t", "lam", "weight")
        )
        values = {key.removeprefix("stagewise_scheme/"): float(value) for key, value in row.items()}
        assert values["lambda"] == pytest.approx(float(lam.mean()), rel=1e-5)
        assert values["navigation_share"] == pytest.approx(float((t < 0.5).double().mean()))
        assert values["lambda"] == pytest.approx(values["navigation_share"])
        assert values["weight"] == pytest.approx(float(weight.mean()), rel=1e-5)
        assert values["boundary"] == 0.5
        assert values["phase"] == 0
        assert values["inserted_share"] == values["tail_mass"] == 0


def test_logs_what_was_inserted_among_what_was_mixed(fit, make_data, tmp_path):
    x, seen = make_data()[0], []
    oracle = Oracle(LatentBank(x[20:]), engine=Nearest(4))
    scheme = Scheme(oracle, target=Mix("boundary"), boundary=0.7)
    phases = Phases([Phase(Scheme(boundary=0.7), AtStep(3)), Phase(scheme)])

    class Keep(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(phases.last)

    options = {"log_every_n_steps": 3, "max_steps": 12, "shuffle": True}
    with pytest.warns(UserWarning, match="of the samples in the first step are no rows"):
        fit(Lossy(), StageScheme(phases), Keep(), logger=CSVLogger(tmp_path, "csv"), **options)
    text = (tmp_path / "csv/version_0/metrics.csv").read_text()
    keys = ("stagewise_scheme/inserted_share", "stagewise_scheme/tail_mass")
    rows = [row for row in csv.DictReader(text.splitlines()) if row["stagewise_scheme/lambda"]]
    plain, *mixed = ([float(row[key]) for key in keys] for row in rows)
    assert all(map(math.isnan, plain))
    for values, first in zip(mixed, (3, 6, 9), strict=True):
        lam, inserted, tail = (
            torch.cat([getattr(record, key).double() for record in seen[first : first + 3]])
            for key in ("lam", "inserted", "tail_mass")
        )
        assert 0 < inserted.sum() < lam.sum() < len(lam)
        assert tail.sum() > 0
        expected = [float(total / lam.sum()) for total in (inserted.sum(), tail.sum())]
        assert values == pytest.approx(expected, rel=1e-5)


def test_transitions_go_to_tensorboard_and_disk(fit, bank, tmp_path):
    phases = Phases([Phase(Scheme(), AtShare(0.5), "plain"), Phase(SCHEMES["mix"](bank))])
    callback = StageScheme(phases, dirpath=tmp_path / "files")
    logger = TensorBoardLogger(tmp_path, "tb")
    fit(Lossy(), callback, logger=logger, max_steps=6, log_every_n_steps=1)
    header, event = (
        json.loads(line) for line in (tmp_path / "files/stages.jsonl").read_text().splitlines()
    )
    assert header["event"] == "scheme"
    assert header["maker"].startswith("module.loss_fn: FlowMatchingLoss")
    assert event == callback.transitions[0]
    assert (event["step"], event["phase"]) == (3, 1)
    assert event["message"].startswith("phase 0 (plain) ends at step 3")
    logger.finalize("success")
    board = EventAccumulator(logger.log_dir)
    board.Reload()
    (marked,) = board.Scalars("stagewise_scheme/transition")
    assert (marked.step, marked.value) == (2, 1)
    (text,) = board.Tensors("stagewise_scheme/transition/text_summary")
    assert text.step == 2
    assert text.tensor_proto.string_val[0].decode() == event["message"]
    assert [s.value for s in board.Scalars("stagewise_scheme/phase")] == [0, 0, 0, 1, 1, 1]
    shares = [scalar.value for scalar in board.Scalars("stagewise_scheme/lambda")]
    assert shares == pytest.approx([0, 0, 0, 0.7, 0.7, 0.7])


def test_loss_driven_schemes_see_the_losses(fit):
    sampler = LossSecondMoment(bins=2, history=4)
    module = Lossy()
    fit(module, StageScheme(timesteps=sampler), max_steps=6)
    assert sampler.state_dict()["count"].sum() == 48
    with pytest.raises(ValueError, match="adapts needs each sample's loss, which module.FM never"):
        fit(Matched(), StageScheme(timesteps=LossSecondMoment()))


# -- what is refused -----------------------------------------------------------------------------


class Both(Matched):
    def __init__(self):
        super().__init__()
        self.other = cfm.ConditionalFlowMatcher(0.0)


class Neither(Base):
    def training_step(self, batch, batch_idx):
        return self.velocity(batch[0], batch[0][:, 0]).square().mean()


class Unused(Both):
    def training_step(self, batch, batch_idx):
        return self.velocity(batch[0], batch[0][:, 0]).square().mean()


def refused(fit, module, *callbacks, match, error=ValueError, **options):
    """That training is refused before the first step has changed a weight."""
    before = copy.deepcopy(module.state_dict())
    held = {key: dict(vars(value)) for key, value in vars(module).items() if "FM" in key}
    with pytest.raises(error, match=match):
        fit(module, *callbacks, **options)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert {key: vars(getattr(module, key)) for key in held} == held


def test_no_maker_and_two_makers(fit, bank):
    scheme = functools.partial(SCHEMES["mix"], bank)
    refused(
        fit, Neither(), StageScheme(scheme()), match="nothing that makes the targets in Neither"
    )
    refused(
        fit,
        Both(),
        StageScheme(scheme()),
        match=r"found 2:\n  module\.FM: .*\n.*\n.*target_maker=\"module",
    )
    fit(Both(), StageScheme(scheme(), target_maker="module.FM"), max_steps=1)
    unused = StageScheme(scheme(), target_maker="module.FM")
    match = r"made its target without module\.FM.*target_maker="
    refused(fit, Unused(), unused, match=match, error=RuntimeError)


def test_coupled_matchers(fit, bank):
    module = Matched(cfm.ExactOptimalTransportConditionalFlowMatcher(0.0))
    refused(fit, module, StageScheme(target=Mix(), bank=bank), match="x_0 and x_1 dependent")


def test_weights_where_the_loss_is_not_seen(fit, bank):
    def scheme():
        return Scheme(Oracle(bank), target=Mix(0.5), weight=lambda t: 1 + t)

    refused(fit, Matched(), StageScheme(scheme()), match=r"StageWeightedLoss\(loss_fn, scheme\)")
    refused(
        fit,
        Matched(),
        StageScheme(timesteps=StageAware(0.5), preserve_objective=True),
        match="cannot weigh it",
    )

    class Weighed(Matched):
        def __init__(self, scheme):
            super().__init__()
            self.loss_fn = StageWeightedLoss(nn.MSELoss(reduction="none"), scheme)

        def training_step(self, batch, batch_idx):
            x0 = torch.randn_like(batch[0])
            t, xt, u = self.FM.sample_location_and_conditional_flow(x0, batch[0])
            return self.loss_fn(self.velocity(xt, t), u, t=t)

    same, keep, ours = scheme(), Gradients(), Gradients()
    fit(Weighed(same), StageScheme(same), keep, max_steps=1)
    fit(Lossy(), StageScheme(scheme()), ours, max_steps=1)
    torch.testing.assert_close(keep.seen[0], ours.seen[0])


def test_two_that_steer_the_same(fit, bank):
    one, two = StageScheme(SCHEMES["mix"](bank)), StageScheme(target=Mix(), bank=bank, name="two")
    refused(fit, Matched(), one, two, match=r"'stagewise_scheme' and 'two', steer .*module\.FM")
    scheme = SCHEMES["mix"](bank)
    one, two = StageScheme(scheme), StageScheme(scheme, name="two")
    refused(fit, Inline(scheme), one, two, match="the scheme that the module holds")


def test_two_without_a_name(fit, bank):
    one, two = StageScheme(SCHEMES["mix"](bank)), StageScheme(target=Mix(), bank=bank)
    refused(fit, Matched(), one, two, match="state_key` must be unique", error=RuntimeError)
    assert one.state_key == two.state_key == "StageScheme{'name': 'stagewise_scheme'}"


# -- a bank that is not what is trained on -------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "ratio"),
    [(lambda x: 5 * x, r"0\.\d+"), (lambda x: x / 5, r"\d\.\d+"), (lambda x: x + 9, r"\d\.\d+")],
    ids=["larger", "smaller", "moved"],
)
def test_a_bank_at_another_scale(fit, make_data, change, ratio):
    x, match = make_data()[0], "at the scale of the bank, got 100% that are no rows of it, {} times"
    bank, match = LatentBank(change(x)), match.format(ratio)
    refused(fit, Matched(), StageScheme(target=Mix(1.0), bank=bank), match=match)
    late = Scheme(Oracle(bank), target=Mix("boundary"), boundary=0.0)
    refused(fit, Lossy(), StageScheme(late), match=match)  # though it never asks
    last = Scheme(Oracle(bank), target=Mix(), class_wise=False)
    phases = Phases([Phase(Scheme(), AtStep(2)), Phase(last)])
    refused(fit, Inline(phases), StageScheme(phases), match=match)
    fit(Lossy(), StageScheme(timesteps=Uniform(), bank=bank))  # nobody asks it


class Encoding(Lossy):
    """Trains on something else than what is in the batch."""

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self.velocity, self.encode(batch[0]))


def test_what_the_scheme_is_given_is_compared_and_not_the_batch(fit, make_data, recwarn):
    x = make_data()[0]
    fit(Encoding(lambda x: 5 * x), StageScheme(target=Mix(), bank=LatentBank(5 * x)))
    assert not [warning for warning in recwarn if "rows of the bank" in str(warning.message)]
    callback, match = StageScheme(target=Mix(), bank=LatentBank(x)), r"are no rows of it, 5\.\d+ t"
    refused(fit, Encoding(lambda x: 5 * x), callback, match=match)


@pytest.mark.parametrize(
    ("encode", "share"),
    [
        (lambda x: x + 0.2 * torch.randn(x.shape), 100),  # resampled
        (lambda x: x.flip(1), 100),
        (lambda x: torch.cat([x[:6], -x[6:]]), 25),
    ],
    ids=["resampled", "flipped", "some flipped"],
)
def test_samples_that_are_no_rows_are_warned_of_once(fit, make_data, encode, share, recwarn):
    callback = StageScheme(target=Mix(0.5), bank=LatentBank(make_data()[0]))
    fit(Encoding(encode), callback, max_steps=3)
    said = [str(warning.message) for warning in recwarn]
    (said,) = [message for message in said if "rows of the bank" in message]
    assert f"{share}% of the samples in the first step are no rows of the bank" in said
    assert re.search(r"nearest row is off by \d+% of their norm", said)


def test_a_batch_of_one_kind_is_no_other_scale():
    """Flat patches, flipped: far smaller than most rows, and some rows are like them."""
    x = torch.randn(400, 48, generator=torch.Generator().manual_seed(0))
    x[:20] *= 0.05
    assert "100% of the samples" in check_rows(LatentBank(x), -x[:16])
    with pytest.raises(ValueError, match="scale of the bank"):
        check_rows(LatentBank(x), 0.05 * x[20:36] / 3)


def test_a_part_of_a_bank_is_not_searched():
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0))
    assert check_rows(LatentBank(x[:100]), x[100:], shard=True) is None
    with pytest.raises(ValueError, match="scale of the bank"):
        check_rows(LatentBank(x[:100]), 3 * x[100:], shard=True)


# -- events that nothing says --------------------------------------------------------------------


def waiting_for(event):
    return StageScheme(Phases([Phase(Scheme(), AtEvent(event)), Phase(Scheme())]))


def test_events_that_nothing_says(fit):
    def errors(**options):
        return VelocityErrorMonitor(strata=4, queries=4, **{"every_n_steps": 1} | options)

    posterior = functools.partial(PosteriorMonitor, strata=4, queries=4)
    says = "no callback reports that event"
    typo = waiting_for("navigation learnt")
    refused(
        fit,
        Lossy(),
        *(posterior(), errors(), StageTransitions(), typo),
        match=rf"'navigation learnt'.*{says}\. Known are 'navigation learned', "
        r"'memorization onset' \(lacks held-out samples: .*\), 'boundary moved'\. Add",
        max_steps=20,
    )
    # What the monitors, the data and the steps do not allow for.
    learned, onset = (
        functools.partial(waiting_for, event) for event in (NAVIGATION_LEARNED, MEMORIZATION_ONSET)
    )
    refused(fit, Lossy(), posterior(), learned(), match=rf"{says}\. Add a callback that does")
    match = rf"{says}.*'navigation learned' \(lacks a VelocityErrorMonitor"
    refused(fit, Lossy(), posterior(), StageTransitions(), learned(), match=match, max_steps=20)
    match = rf"{says}.*'memorization onset' \(lacks held-out samples"
    refused(fit, Lossy(), errors(), StageTransitions(), onset(), match=match, max_steps=20)
    match = rf"{says}.*'navigation learned' \(lacks 9 probes before the end: Vel.*every_n_steps=2\)"
    callbacks = (errors(every_n_steps=3), StageTransitions(), learned())
    refused(fit, Lossy(), *callbacks, match=match, max_steps=24)
    match = rf"{says}.*'boundary moved' \(lacks a PosteriorMonitor"
    callbacks = (errors(), StageTransitions(), waiting_for(BOUNDARY_MOVED))
    refused(fit, Lossy(), *callbacks, match=match, max_steps=20)


def test_events_that_are_said(fit, make_data):
    # Before the others, too: what they say is known before the first batch.
    for event in (NAVIGATION_LEARNED, MEMORIZATION_ONSET):
        few = {"every_n_steps": 1, "strata": 4, "queries": 4}
        errors = VelocityErrorMonitor(held_out=make_data(8)[0], **few)
        fit(Lossy(), waiting_for(event), errors, StageTransitions(), max_steps=10)

    class Own(pl.Callback):
        event_kinds = {"half": "", "never": "a reason"}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                scheme.scheme.notify("half")

    scheme = waiting_for("half")
    fit(Lossy(), Own(), scheme, max_steps=4)
    assert [event["step"] for event in scheme.transitions] == [2]
    refused(fit, Lossy(), Own(), waiting_for("never"), match=r"'never' \(lacks a reason\)")
    past = waiting_for("gone")
    past.scheme.notify("gone")  # as a run that is resumed after it
    fit(Lossy(), past, max_steps=2)
    assert past.scheme.index == 1


def test_phases_that_cannot_end(fit, bank):
    def phases(until):
        return StageScheme(Phases([Phase(Scheme(), until), Phase(Scheme())]))

    refused(fit, Lossy(), phases(AtStep(9)), match="within the 4 steps of training", max_steps=4)
    refused(fit, Lossy(), phases(AtShare(0.5)), match="has no end", max_steps=-1, max_epochs=-1)
    refused(fit, Matched(), phases(AtPlateau(1)), match="module.FM never sees", max_steps=90)


def test_a_bank_over_ranks_needs_a_boundary_that_is_given(fit, bank):
    scheme = Scheme(Oracle(bank, engine=Sharded()), target=Mix("boundary"))
    refused(fit, Lossy(), StageScheme(scheme), match=r"cannot be measured.*boundary=\.\.\.")


def test_what_is_said_at_construction(bank):
    with pytest.raises(ValueError, match="a scheme or its parts, got both"):
        StageScheme(Scheme(), target=Mix())
    with pytest.raises(ValueError, match="a scheme or its parts, got both"):
        StageScheme(Scheme(), boundary=0.3)
    with pytest.raises(ValueError, match="a scheme or its parts, got both"):
        StageScheme(Scheme(), class_wise=False)
    with pytest.raises(TypeError, match="`scheme` to be a Scheme or Phases, or a func.*got Mix"):
        StageScheme(Mix())
    with pytest.raises(ValueError, match="a scheme or its parts, got both"):
        StageScheme(lambda oracle: Scheme(oracle), target=Mix())
    for useless in ({"engine": Exact()}, {"certificate": "a.certificate"}):
        with pytest.raises(ValueError, match=r"would change nothing.*Oracle\(bank, engine="):
            StageScheme(Scheme(Oracle(bank), target=Mix()), **useless)


def test_a_path_other_than_the_makers(fit, bank):
    module = Matched(cfm.ConditionalFlowMatcher(0.3))
    match = r"trains on NoisedPath\(path=LinearPath\(\), noise=0.3\), the scheme is for LinearPath"
    refused(fit, module, StageScheme(SCHEMES["mix"](bank)), match=match)
    fit(module, StageScheme(target=Mix(), bank=bank), max_steps=1)


def test_a_module_that_asks_the_scheme_itself_is_driven(fit, bank):
    last = Scheme(Oracle(bank), target=Mix("boundary"), class_wise=False)
    phases = Phases([Phase(Scheme(), AtStep(1)), Phase(last)])
    module, callback = Inline(phases), StageScheme(phases)
    fit(module, callback, max_steps=3)
    assert phases.index == 1
    assert phases.boundary is not None
    assert callback.transitions[0]["step"] == 1


def test_an_objective_that_has_the_scheme_sees_the_losses_for_a_module_that_has_it_too(fit, bank):
    class Holding(Lossy):
        def __init__(self, scheme):
            super().__init__(scheme=scheme)
            self.scheme = scheme

    scheme = Scheme(Oracle(bank), target=Mix(0.5), boundary=0.5)
    until = AtPlateau(1, window=4, patience=1, tolerance=0.9)
    phases = Phases([Phase(scheme, until), Phase(Scheme())])
    module, callback = Holding(phases), StageScheme(phases)
    fit(module, callback, max_steps=30)
    assert len(until.points) >= 8
    assert module.loss_fn.scheme is phases
    refused(fit, Inline(phases), callback, match="the scheme that the module holds never sees")


def test_what_ranks_send_is_kept_for_a_first_step_that_is_short(fit):
    first, resumed = (StageScheme(timesteps=LossSecondMoment(bins=2, history=4)) for _ in "ab")
    fit(Lossy(), first, max_steps=1)
    first._losses.share = 7  # as ranks agree on it
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    fit(Lossy(), resumed, max_steps=1)
    assert resumed._losses.share == 7


def test_a_second_fit_begins_anew(fit, bank):
    phases = Phases([Phase(Scheme(), AtStep(2)), Phase(SCHEMES["mix"](bank))])
    callback = StageScheme(phases)
    for _ in range(2):
        module = Matched()
        fit(module, callback, max_steps=4)
        assert [event["step"] for event in callback.transitions] == [2]
        steered = [
            not torch.allclose(u, (x1 - xt) / (1 - t[:, None]), atol=1e-3)
            for t, x1, xt, u in module.seen
        ]
        assert steered == [False, False, True, True]


def test_a_second_fit_forgets_what_was_learnt_and_measured(fit, make_data, make_loader):
    sampler = LossSecondMoment(bins=2, history=4)
    callback = StageScheme(timesteps=sampler)
    for _ in range(2):
        trainer = fit(Lossy(), callback, max_steps=6)
        assert sampler.state_dict()["count"].sum() == 48
    # Training that goes on is no second one.
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = 12, -1
    trainer.fit(trainer.lightning_module, make_loader(make_data()[0]))
    assert sampler.state_dict()["count"].sum() == 96

    scheme = Scheme(timesteps=StageAware(0.5))
    callback, measured = StageScheme(scheme), []
    for matcher in (cfm.VariancePreservingConditionalFlowMatcher, cfm.ConditionalFlowMatcher) * 2:
        fit(Matched(matcher(0.0)), callback, max_steps=1)
        measured.append(scheme.boundary)
    assert measured[:2] == measured[2:]
    assert abs(measured[0] - measured[1]) > 0.01


def test_a_second_fit_of_the_scheme_that_a_loss_has_begins_anew(fit, bank):
    def module():
        scheme = Scheme(timesteps=LossSecondMoment(bins=2, history=4))
        return Lossy(scheme=scheme), scheme

    (first, one), (second, other) = module(), module()
    callback = StageScheme()
    for _ in range(2):
        fit(first, callback, max_steps=6)
        assert one.state_dict()["timesteps"]["count"].sum() == 48
    fit(second, callback, max_steps=6)
    phases = Phases([Phase(other, AtStep(2)), Phase(SCHEMES["mix"](bank))])
    assert other.state_dict()["timesteps"]["count"].sum() == 48
    fit(Lossy(scheme=phases), callback, max_steps=6)
    assert phases.index == 1


def test_one_line_says_what_was_recognised(fit, bank, lightning_log):
    lightning_log.set_level(logging.INFO)
    fit(Matched(), StageScheme(SCHEMES["mix"](bank)), max_steps=1)
    assert (
        "StageScheme: steers module.FM: ConditionalFlowMatcher (torchcfm), LinearPath(), predicts "
        "velocity, time 0 is noise and 1 is data;"
    ) in lightning_log.text


@pytest.mark.slow
def test_example(tmp_path, monkeypatch, lightning_log):
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[1] / "examples/steer.py"
    runpy.run_path(str(example), run_name="__main__")
    assert "StageScheme: steers module.FM: ConditionalFlowMatcher (torchcfm)" in lightning_log.text
    lines = (tmp_path / "stagewise_scheme_logs/stages.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["step"] == 120
