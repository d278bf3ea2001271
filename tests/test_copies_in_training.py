"""Copies within a training: of what is trained, and of the callbacks themselves."""

import copy
import gc
import io
import pickle
import sys
import weakref

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, Mix, StageAware
from stagewise.callbacks import (
    MemorizationMonitor,
    PosteriorMonitor,
    StageRun,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.losses import FlowMatchingLoss

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated)"),
]

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
BEGIN, AHEAD, BEHIND, BACKWARD, END = MOMENTS = (
    "on_train_batch_start",
    "before the forward pass",
    "after it",
    "on_after_backward",
    "on_train_batch_end",
)


def posterior():
    return [PosteriorMonitor(every_n_steps=2, strata=4, queries=6)]


def errors():
    return [VelocityErrorMonitor(every_n_steps=2, strata=4, queries=6)]


def memorization():
    return [MemorizationMonitor(every_n_steps=2, samples=4, steps=3)]


def transitions():
    return [*errors(), StageTransitions()]


def scheme():
    return [StageScheme(target=Mix("boundary"), timesteps=StageAware(0.5))]


def monitors():
    return [StageRun(), *posterior(), *memorization(), *transitions()]


def everything():
    return [*monitors(), *scheme()]


ALL_KINDS = (monitors, scheme, pytest.param(everything, marks=pytest.mark.slow))


class Model(pl.LightningModule):
    """Flow matching that calls `at(module, moment)` at each of the moments of a step."""

    def __init__(self, at=None, fail_at=None):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(9, 1024), nn.SiLU(), nn.Linear(1024, 8))
        self.loss = FlowMatchingLoss()
        self.fail_at = fail_at
        self.__dict__["at"] = at or (lambda module, moment: None)

    def training_step(self, batch, batch_idx):
        self.at(self, AHEAD)
        loss = self.loss(lambda xt, t: ask(self.net, xt, t), batch[0])
        self.at(self, BEHIND)
        if self.global_step == self.fail_at:
            raise ArithmeticError("stopped")
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.at(self, BEGIN)

    def on_after_backward(self):
        self.at(self, BACKWARD)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.at(self, END)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def ask(net, xt, t):
    return net(torch.cat([xt, t[:, None]], 1))


def hooks(module):
    """How many entries of hooks there are in all submodules."""
    return sum(
        len(value)
        for part in module.modules()
        for key, value in vars(part).items()
        if "forward" in key and "hook" in key
    )


def probes(callback):
    """What was probed, to be compared: some of it is NaN."""
    return repr(getattr(callback, "history", None))


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    return file.getvalue()


@pytest.fixture
def fit(make_trainer):
    """`fit(callbacks, at, ...)`: trains for four steps; gives the module."""

    def fit(callbacks=(), at=None, *, fail_at=None, steps=4):
        module = Model(at, fail_at)
        pl.seed_everything(1, verbose=False)
        trainer = make_trainer(*callbacks, max_steps=steps)
        trainer.fit(module, DataLoader(TensorDataset(X), 16, shuffle=True))
        return module

    return fit


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_copies_have_no_hooks_and_training_is_what_it_was(fit, weights, kind):
    copies = []

    def take(module, moment):
        twin = copy.deepcopy(module.net)
        copies.extend([twin, copy.deepcopy(twin)])
        for one in copies[-2:]:  # with gradients, as training asks, of x_t of nothing
            ask(one, torch.zeros(16, 8), torch.linspace(0, 1, 16))
        if moment in (BACKWARD, END):
            assert not hooks(module)
            assert not hooks(twin)

    callbacks, others = kind(), kind()
    watched, copied = fit(callbacks), fit(others, take)
    if kind is monitors:
        assert torch.equal(weights(fit()), weights(watched))
    assert torch.equal(weights(watched), weights(copied)), "copying changes nothing"
    assert len(copies) == 2 * 4 * len(MOMENTS)
    assert not any(hooks(one) for one in copies), "nor does anything stay on them"
    for one, other in zip(callbacks, others, strict=True):
        assert probes(one) == probes(other)


def test_a_network_that_is_saved_in_training_is_as_large_as_without(fit):
    def sizes(callbacks):
        found = []
        fit(callbacks, lambda module, moment: found.append(len(saved(module.net))), steps=3)
        return found

    plain, watched = sizes([]), sizes(everything())
    assert watched == pytest.approx(plain, rel=0.01)
    for at, (size, other) in enumerate(zip(plain, watched, strict=True)):
        # Later on there is a hook from the start of a batch to the network's call.
        hooked = (BEGIN, AHEAD) if at >= len(MOMENTS) else (BEGIN, AHEAD, BEHIND)
        assert other == size or MOMENTS[at % len(MOMENTS)] in hooked


def test_a_network_that_is_saved_in_training_loads_without_this_library(fit, monkeypatch):
    files = []
    fit(everything(), lambda module, moment: files.append(saved(module.net)), steps=2)
    ours = saved(LatentBank)
    for name in [name for name in sys.modules if name.split(".")[0] == "stagewise"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError):
        torch.load(io.BytesIO(ours), weights_only=False)
    nets = [torch.load(io.BytesIO(file), weights_only=False) for file in files]
    assert [tuple(net(torch.zeros(3, 9)).shape) for net in nets] == [(3, 8)] * 10


def test_pickles_of_what_is_observed_load_without_this_library():
    from stagewise.adapters.base import rebind

    matcher = Matcher()
    detach = rebind(matcher, "sample", lambda: 2, observes=True)
    assert matcher.sample() == 2
    assert b"stagewise" not in pickle.dumps(matcher)
    assert pickle.loads(pickle.dumps(matcher)).sample() == copy.deepcopy(matcher).sample() == 1
    detach()
    assert not vars(matcher)


class Matcher:
    def sample(self):
        return 1


def test_averages_that_are_made_in_the_first_step(fit, weights):
    """By deep copy of the network, and of the whole module."""
    averages = {}

    def average(module, moment):
        if moment == AHEAD and not averages:
            averages["net"] = AveragedModel(module.net)
            averages["module"] = AveragedModel(module)
        if moment == END:
            averages["net"].update_parameters(module.net)
            averages["module"].update_parameters(module)

    assert torch.equal(weights(fit(everything())), weights(fit(everything(), average)))
    assert torch.equal(weights(averages["net"]), weights(averages["module"]))
    assert not any(hooks(one) for one in averages.values())


def test_no_answer_of_the_network_outlives_its_step(fit):
    alive = []

    def look(module, moment):
        if moment == BEGIN and module.global_step == 0:
            module.net.register_forward_hook(
                lambda net, _, output: (
                    alive.append(weakref.ref(output)) if output.requires_grad else None
                )
            )
        if moment == BEGIN:
            gc.collect()
            assert not any(reference() is not None for reference in alive)

    fit(everything(), look)
    assert len(alive) >= 4


def test_saving_an_answer_of_the_network_warns_of_nothing(fit, recwarn):
    answers = []

    def save(module, moment):
        if moment == BEGIN and module.global_step == 1:
            module.net.register_forward_hook(lambda net, _, output: answers.append(output))
        if moment == BEHIND and module.global_step == 1:
            assert answers[0]._backward_hooks, "it is listened to"
            torch.save(answers[0], io.BytesIO())

    fit(errors(), save, steps=2)
    assert not [each for each in recwarn if "hook" in str(each.message)]


# -- of the callbacks ----------------------------------------------------------------------------


def found(callback):
    """What a callback has found, to be compared."""
    keys = ("history", "events", "transitions", "boundary", "kept", "predicted")
    return {key: vars(callback).get(key) for key in keys}


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    ("kind", "fail_at"),
    [
        (everything, None),
        pytest.param(everything, 0, marks=pytest.mark.slow),
        (everything, 2),
    ],
)
def test_callbacks_can_be_copied_after_a_fit(fit, kind, fail_at):
    callbacks = kind()
    if fail_at is None:
        fit(callbacks)
    else:
        with pytest.raises(ArithmeticError, match="stopped"):
            fit(callbacks, fail_at=fail_at)
    for callback in callbacks:
        for twin in (copy.deepcopy(callback), copy.copy(callback), pickled(callback)):
            assert repr(found(twin)) == repr(found(callback))
            assert twin.state_key.split()[0] == callback.state_key.split()[0]
    fresh = kind()
    fit(fresh)
    for twins in (copy.deepcopy(callbacks), pickled(callbacks)):
        fit(twins)
        assert [*map(probes, twins)] == [*map(probes, fresh)]


@pytest.mark.parametrize("kind", [monitors, scheme])
def test_a_copy_within_a_fit_is_as_before_it(fit, kind, weights):
    callbacks, copies = kind(), []

    def take(module, moment):
        if module.global_step == 2 and moment == BEHIND:
            copies.extend(how(callbacks) for how in (copy.deepcopy, pickled))
            copies.append([copy.copy(callback) for callback in callbacks])

    watched = fit(callbacks, take)
    assert torch.equal(weights(watched), weights(fit(kind())))
    for twins in copies:
        for twin in twins:
            assert twin.run is None
            assert not any(found(twin)[key] for key in ("history", "events", "transitions", "kept"))
        again = fit(twins)
        assert [*map(probes, twins)] == [*map(probes, callbacks)]
        assert torch.equal(weights(again), weights(watched))


@pytest.mark.parametrize("fail_at", [None, 2])
def test_a_fit_that_is_over_is_let_go_of(fit, fail_at):
    callbacks, held = everything(), []

    def note(module, moment):
        held[:] = [weakref.ref(value) for value in (module, module.trainer, module.net)]

    if fail_at is None:
        fit(callbacks, note)
    else:
        with pytest.raises(ArithmeticError):
            fit(callbacks, note, fail_at=fail_at)
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


def test_a_given_bank_goes_with_a_copy(fit):
    bank = LatentBank(X)
    callback = PosteriorMonitor(bank, every_n_steps=2, strata=4, queries=6)
    fit([callback])
    assert copy.deepcopy(callback).options["bank"] is bank
    assert pickled(callback).options["bank"].fingerprint == bank.fingerprint


def test_a_copy_made_while_later_steps_are_looked_at_has_no_hook(make_trainer):
    class Guided(Model):
        """Gives its network labels from the third step on."""

        def __init__(self):
            super().__init__()
            self.net = Optional()

        def training_step(self, batch, batch_idx):
            x, y = batch
            if self.global_step == 1:
                copies.append(copy.deepcopy(self.net))
            return self.loss(self.net, x, *([y] if self.global_step > 1 else []))

    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(9, 8)

        def forward(self, x, t, y=None):
            h = self.inner(torch.cat([x, t[:, None]], 1))
            return h if y is None else h + y[:, None]

    copies = []
    loader = DataLoader(TensorDataset(X, torch.arange(64) % 4), batch_size=16)
    module = Guided()
    make_trainer(*posterior()).fit(module, loader)
    for net in (*copies, module.net):
        assert not net._forward_pre_hooks
    assert len(copies) == 1
