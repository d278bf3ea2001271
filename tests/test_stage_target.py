"""`StageTarget`: a hand-written training step with one more line, alone, watched and steered."""

import copy
import pickle
import re
import runpy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import stagewise
from stagewise import (
    Convention,
    LatentBank,
    LogitNormal,
    Mix,
    Oracle,
    Scheme,
    Smoothing,
    StageAware,
    StageFactors,
    StageTarget,
)
from stagewise.adapters import find_target_makers, one_target_maker
from stagewise.callbacks import PosteriorMonitor, StageScheme, VelocityErrorMonitor
from stagewise.tracing import untraced

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|log_every)"),
]

NOISE_LAST = Convention(1, 0, -1)


def clusters(n=64, classes=4):
    """Rows around a centre for each class, and their classes."""
    draws = torch.Generator().manual_seed(5)
    y = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, 6, generator=draws)
    return centres[y] + 0.3 * torch.randn(n, 6, generator=draws), y


class Step(pl.LightningModule):
    """A step that is written out, with the line; `seen` keeps what each call was given and gave."""

    def __init__(self, target=None, classes=4, **options):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(7 + classes, 16), nn.SiLU(), nn.Linear(16, 6))
        self.classes = classes
        self.target = StageTarget(**options) if target is None else target
        self.seen = []

    def velocity(self, xt, t, y):
        one_hot = nn.functional.one_hot(y, self.classes).to(xt) if self.classes else xt[:, :0]
        return self.net(torch.cat([xt, t, one_hot], 1))

    def training_step(self, batch, batch_idx):
        x1, y = batch
        t = self.target.times(torch.rand(len(x1), 1))
        x1 = self.target.smooth(x1, t=t)
        x0 = torch.randn_like(x1)
        if self.target.convention == NOISE_LAST:
            xt, given = t * x0 + (1 - t) * x1, x0 - x1
        else:
            xt, given = t * x1 + (1 - t) * x0, x1 - x0
        u, w = self.target(given, xt=xt, t=t, x1=x1, labels=y)
        self.keep(given, xt, t[:, 0], x1, y, u, w)
        return (w * (self.velocity(xt, t, y) - u).square().mean(1)).mean()

    @untraced
    def keep(self, *values):
        self.seen.append(values)

    def validation_step(self, batch, batch_idx):
        x1, y = batch
        t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
        u, w = self.target(x1 - x0, xt=t * x1 + (1 - t) * x0, t=t, x1=x1, labels=y)
        assert torch.equal(u, x1 - x0)
        assert torch.equal(w, torch.ones(len(x1)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.fixture
def fit(make_trainer):
    def run(module, *callbacks, steps=3, data=None, batch=16, **options):
        torch.manual_seed(7)
        data = TensorDataset(*clusters()) if data is None else data
        trainer = make_trainer(*callbacks, **{"max_steps": steps, **options})
        trainer.fit(module, DataLoader(data, batch), DataLoader(data, batch))
        return module

    return run


def by_class(x, y, xt, t, labels):
    """The velocity of the oracle over the rows of the class, in float64 and rows one by one."""
    out = []
    for row, time, label in zip(xt.double(), t.double(), labels, strict=True):
        rows = x[y == label].double()
        logits = -(row - time * rows).square().sum(1) / (2 * (1 - time) ** 2)
        out.append((torch.softmax(logits, 0) @ rows - row) / (1 - time))
    return torch.stack(out)


def test_alone_it_returns_what_it_is_given_and_ones():
    target, x1, x0 = StageTarget(), torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    t = torch.rand(4, 1, 1)
    y = x1 - x0
    u, w = target(y, xt=t * x1 + (1 - t) * x0, t=t, x1=x1)
    assert u is y
    assert torch.equal(w, torch.ones(4))
    assert target.times(t) is t
    assert target.smooth(x1, t=t) is x1
    assert not target.state_dict()
    assert not list(target.parameters())


@pytest.mark.parametrize("options", [{}, {"convention": NOISE_LAST}])
def test_steered_targets_are_those_of_the_oracle_in_the_step_s_convention(fit, options):
    x, y = clusters()
    module = fit(Step(**options), StageScheme(target=Mix(1.0)))
    sign = module.target.convention.sign
    for _, xt, t, _, labels, u, w in module.seen:
        t = module.target.convention.to_t(t)
        near = t < 0.95  # there float32 has the digits
        expected = sign * by_class(x, y, xt, t, labels)
        torch.testing.assert_close(u[near].double(), expected[near], rtol=1e-5, atol=1e-4)
        assert torch.equal(w, torch.ones(len(w)))
    assert module.target.scheme is None


def test_all_that_a_scheme_has_reaches_the_step(fit):
    x, y = clusters()
    oracle = Oracle(LatentBank(x, y))
    scheme = Scheme(
        oracle,
        timesteps=LogitNormal(-2, 0.1),
        target=Mix("boundary"),
        weight=StageFactors(3, 1, boundary=0.2),
        boundary=0.3,
        smoothing=Smoothing(oracle.bank),
        strength=lambda t: (t > 0.15).float(),
    )
    module = fit(Step(), StageScheme(scheme), val_check_interval=2)
    for given, xt, t, x1, _, u, w in module.seen:
        assert bool((t < 0.3).all())
        assert torch.equal(w, torch.where(t < 0.2, 3.0, 1.0))
        assert not torch.equal(u, given)
        smoothed = torch.stack([(x - row).norm(dim=1).min() for row in x1]) > 1e-6
        assert torch.equal(smoothed, t > 0.15)
        torch.testing.assert_close((xt - t[:, None] * x1) / (1 - t[:, None]), x1 - given)
    assert len(module.seen) == 3


def test_a_watched_run_has_the_same_weights_and_finds_all(fit, caplog):
    plain = fit(Step())
    monitors = [PosteriorMonitor(), VelocityErrorMonitor(every_n_steps=2, queries=4, strata=4)]
    watched = fit(Step(), *monitors)
    assert "net: Sequential(x_t, time, labels)" in caplog.text
    assert monitors[1].history
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_made_meanwhile_stand_alone(fit):
    kept = []

    class Copies(Step):
        def on_before_optimizer_step(self, _):
            target = copy.deepcopy(self.target), pickle.loads(pickle.dumps(self.target))
            assert self.target.scheme is not None
            kept.extend(target)

    fit(Copies(), StageScheme(target=Mix(1.0)), steps=1)
    for target in kept:
        assert target.scheme is None
        assert target.observers == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, u: (1 - t, u), "StageTarget(convention=Convention(1, 0, 1))"),
        (lambda t, u: (1 - t, -u), 'StageTarget(convention="pi0")'),
        (lambda t, u: (t, -u), "StageTarget(convention=Convention(0, 1, -1))"),
        (lambda t, u: (t, 2 * u), "off by 100% of its size"),
    ],
)
@pytest.mark.parametrize("callback", [PosteriorMonitor, lambda: StageScheme(target=Mix(1.0))])
def test_what_does_not_fit_is_refused_before_the_first_weight(fit, change, said, callback):
    class Other(Step):
        def training_step(self, batch, batch_idx):
            x1, y = batch
            t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
            told, u = change(t, x1 - x0)
            u, w = self.target(u, xt=t * x1 + (1 - t) * x0, t=told, x1=x1)
            return u.mean() + 0 * self.net(torch.zeros(1, 11)).sum()

    module = Other()
    before = copy.deepcopy(module.net.state_dict())
    with pytest.raises(ValueError, match="Expected `xt`, `t`, `x1` and `y` of the velocity") as e:
        fit(module, callback())
    assert said in str(e.value)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), module.net.state_dict().values(), strict=True)
    )


class Given(Step):
    """Gives the line other labels, and goes through `encode` first, maybe checkpointed."""

    relabel = staticmethod(lambda y: y)
    checkpointed = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.encoder = nn.Linear(6, 6) if self.checkpointed else nn.Identity()

    def training_step(self, batch, batch_idx):
        if not self.checkpointed:
            return self.loss_of(*batch)
        return checkpoint(self.loss_of, *batch, use_reentrant=False)

    def loss_of(self, x1, y):
        x1, t = self.encoder(x1), torch.rand(len(x1), 1)
        x0 = torch.randn_like(x1)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1, labels=self.relabel(y))
        return (w * (self.velocity(xt, t, y) - u).square().mean(1)).mean()


def steer():
    return StageScheme(target=Mix(1.0))


@pytest.mark.parametrize(
    ("relabel", "callback", "said"),
    [
        (lambda y: y.flip(0), steer, "labels=batch[1]"),
        (torch.zeros_like, PosteriorMonitor, "got others for 12 of 16"),
        (lambda y: torch.full_like(y, 4), steer, "before dropping, labels=batch[1]"),
        (lambda y: y.where(y > 0, 4 + y.cumsum(0)), steer, "before dropping, labels=batch[1]"),
    ],
)
def test_labels_that_are_not_those_of_x1_are_refused_in_the_first_step(
    fit, relabel, callback, said
):
    module = type("Relabels", (Given,), {"relabel": staticmethod(relabel)})()
    before = copy.deepcopy(module.net.state_dict())
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(module, callback())
    assert all(map(torch.equal, before.values(), module.net.state_dict().values()))


def test_a_scheme_by_itself_refuses_them_but_not_those_of_an_equal_row():
    x, y = clusters()
    x[1] = x[0]
    scheme = Scheme(Oracle(LatentBank(x, y)), target=Mix(1.0))
    t, x0 = torch.full((64,), 0.5), torch.randn(64, 6)
    call = {"xt": (x + x0) / 2, "t": t, "x1": x}
    y[0] = 1
    with pytest.raises(ValueError, match="got others for 1 of 64: class 3 for an x_1 of class 2"):
        scheme(x - x0, **call, labels=torch.where(torch.arange(64) == 2, 3, y))
    scheme(x - x0, **call, labels=y)


def test_a_label_that_was_dropped_in_any_step_is_that_of_its_row(fit):
    """With the targets of labels that were not dropped, to the bit."""

    def drops(first):
        calls = []

        def relabel(y):
            calls.append(y)
            return y.where(torch.arange(len(y)) % 4 > 0, 4) if len(calls) > first else y

        return relabel

    modules = [
        type("Drops", (Given,), {"relabel": staticmethod(drops(first))}) for first in (0, 2, 10**6)
    ]
    early, late, never = (fit(module(), steer()).net.state_dict() for module in modules)
    for name, value in never.items():
        assert torch.equal(early[name], value)
        assert torch.equal(late[name], value)


@pytest.mark.parametrize("function", [True, False])
def test_a_null_class_that_an_oracle_is_told_is_one(fit, function):
    class Drops(Step):
        def training_step(self, batch, batch_idx):
            x1, y = batch
            return super().training_step((x1, torch.where(torch.arange(len(y)) % 3 == 0, 4, y)), 0)

    oracle = Oracle(LatentBank(*clusters()), null_class=4)
    given = (lambda _: Scheme(oracle, target=Mix())) if function else Scheme(oracle, target=Mix())
    module = fit(Drops(classes=5), StageScheme(given))
    assert len(module.seen) == 3
    with pytest.raises(ValueError, match="null_class=4"):
        fit(Always(classes=5), StageScheme(target=Mix()))


class Always(Step):
    """Drops the labels of all."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0], torch.full_like(batch[1], 4)), 0)


def test_watching_a_checkpointed_step_with_a_trained_encoder_changes_nothing_but_a_word(fit):
    class Trained(Given):
        checkpointed = True

    plain = fit(Trained())
    with pytest.warns(UserWarning, match=r"requires_grad_\(False\)"):
        watched = fit(Trained(), PosteriorMonitor(strata=4, queries=8))
    assert all(map(torch.equal, plain.parameters(), watched.parameters()))
    with pytest.raises(ValueError, match="goes stale. Freeze it"):
        fit(Trained(), steer())


class Two(Step):
    """Calls two targets, or one of them, and gives the network the time in other units."""

    called, units = ("target", "other"), staticmethod(lambda t: t)

    def __init__(self):
        super().__init__()
        self.other = StageTarget()

    def training_step(self, batch, batch_idx):
        x1, y = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        for name in self.called:
            u, w = getattr(self, name)(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (self.velocity(xt, self.units(t), y) - u).square().mean(1)).mean()


FEW = {"every_n_steps": 2, "queries": 4, "strata": 4}


@pytest.mark.parametrize(
    ("called", "target_maker", "said"),
    [
        (("target",), "module.nothere", "Expected module.nothere to make the targets; found there"),
        (("target", "other"), None, 'VelocityErrorMonitor(target_maker="module.target")'),
        (("target",), "module.other", "The first step did not call module.other"),
        ((), None, "The first step did not call module.target"),
    ],
)
def test_monitors_refuse_targets_that_are_not_the_one_of_the_step(fit, called, target_maker, said):
    module = type("Calls", (Two,), {"called": called})()
    if not called:
        module.training_step = lambda batch, batch_idx: module.velocity(
            batch[0], torch.rand(len(batch[0]), 1), batch[1]
        ).mean()
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        fit(module, VelocityErrorMonitor(**FEW, target_maker=target_maker))
    assert "velocity=" not in str(error.value)


def test_a_monitor_obeys_the_maker_it_is_told(fit, caplog):
    monitor = VelocityErrorMonitor(**FEW, target_maker="module.other")
    fit(Two(), monitor)
    assert monitor.network is None or monitor.network.maker.name == "module.other"
    assert monitor.history
    assert "module.net predicts the velocity, as the gradient of the loss says" in caplog.text


@pytest.mark.parametrize("units", [lambda t: 1000 * t, lambda t: 1 - t, lambda t: 3 - 2 * t])
def test_a_network_is_asked_in_the_units_of_time_that_the_step_gives_it(fit, units, caplog):
    called = {"called": ("target",), "units": staticmethod(units)}
    module, monitor = type("Units", (Two,), called)(), VelocityErrorMonitor(**FEW)
    fit(module, monitor)
    line = re.search(r"VelocityErrorMonitor\(velocity=(lambda .*)\)\.", caplog.text)[1]
    given = VelocityErrorMonitor(**FEW, velocity=eval(line, {"torch": torch, "nn": nn}))
    fit(type("Units", (Two,), called)(), given)
    assert monitor.history
    for one, two in zip(monitor.history, given.history, strict=True):
        assert one["train"]["oracle"] == pytest.approx(two["train"]["oracle"], rel=1e-4)


def test_draws_of_a_scheme_that_the_step_does_not_take_are_refused(fit):
    class Own(Step):
        def training_step(self, batch, batch_idx):
            x1, _ = batch
            t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
            u, w = self.target(x1 - x0, xt=t * x1 + (1 - t) * x0, t=t, x1=x1)
            return u.mean()

    with pytest.raises(ValueError, match=r"t = self\.target\.times\(t\)"):
        fit(Own(), StageScheme(timesteps=StageAware(0.5), boundary=0.3))


def test_the_target_of_a_copy_of_the_module_is_not_proposed(fit):
    class Averages(Step):
        def __init__(self):
            super().__init__()
            full = copy.deepcopy(self)
            del self.target
            self.full, self.target = full, StageTarget()

    with pytest.raises(ValueError, match='Say which the step calls: target_maker="module.target"'):
        fit(Averages(), StageScheme(target=Mix()))
    module = fit(Averages(), StageScheme(target=Mix(), target_maker="module.target"))
    assert len(module.seen) == 3


def test_two_of_them_are_told_apart_by_name():
    module = nn.ModuleList([StageTarget(), StageTarget()])
    assert len(find_target_makers(module)) == 2
    with pytest.raises(ValueError, match=r'target_maker="module\.0"'):
        one_target_maker(module)


class ByHand(Step):
    """A step without the line; what a message says is executed in it."""

    begin = line = ""

    def __init__(self):
        super().__init__(target=nn.Identity())
        exec(self.begin, {"self": self, "stagewise": stagewise})

    def validation_step(self, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        x1, y = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt, u = t * x1 + (1 - t) * x0, x1 - x0
        names = {"u": u, "w": torch.ones(len(x1)), "xt": xt, "t": t, "x1": x1, "self": self}
        exec(self.line, names)
        self.seen.append((u, names["u"]))
        v = self.velocity(xt, t, y)
        return (names["w"] * (v - names["u"]).square().mean(1)).mean()


@pytest.mark.parametrize("callback", [StageScheme, VelocityErrorMonitor])
def test_a_step_that_writes_its_target_out_is_told_lines_that_work(fit, callback):
    def callbacks():
        few = {"queries": 4, "strata": 4, "every_n_steps": 2}
        return callback(**{"target": Mix(1.0)} if callback is StageScheme else few)

    with pytest.raises(ValueError, match="Found nothing that makes the targets in ByHand") as error:
        fit(ByHand(), callbacks())
    begin = re.search(r"self\.target = \S+\(\)", str(error.value))
    line = re.search(r"u, w = self\.target\(.*?\)", str(error.value))

    told = {"begin": begin[0], "line": line[0]}
    module = fit(type("Cured", (ByHand,), told)(), callbacks())
    steered = not torch.equal(*module.seen[0])
    assert steered == (callback is StageScheme)


def test_the_example_steers_to_the_oracle_and_its_watched_run_is_the_same(fit):
    names = runpy.run_path(str(Path(__file__).parents[1] / "examples/steer_by_hand.py"))
    seen = []

    class Moons(names["Moons"]):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.target.register_forward_hook(
                lambda _, __, given, out: seen.append((given, out)), with_kwargs=True
            )

    x, y = names["data"].tensors
    fit(Moons(), StageScheme(target=Mix(1.0)), steps=1, data=names["data"])
    given, (u, _) = seen[0]
    near = given["t"][:, 0] < 0.9
    expected = by_class(x, y, given["xt"], given["t"][:, 0], given["labels"])
    torch.testing.assert_close(u[near].double(), expected[near], rtol=1e-5, atol=1e-5)
    runs = [fit(Moons(), *watch, steps=4, data=names["data"]) for watch in ([], names["callbacks"])]
    assert all(map(torch.equal, *(run.state_dict().values() for run in runs)))


class Loss(nn.Module):
    """A loss that holds the target, inside of what wraps it as DDP does."""

    def __init__(self, target):
        super().__init__()
        self.module = nn.ModuleDict({"target": target})


class Chunks(Step):
    """Goes through its batch in two parts; the target is made without gradients."""

    def training_step(self, batch, batch_idx):
        parts = zip(*(value.chunk(2) for value in batch), strict=True)
        return sum(Step.training_step(self, part, batch_idx) for part in parts)


class Inside(Chunks):
    target = property(lambda self: self.loss.module["target"])

    def __init__(self):
        super().__init__()
        self.loss = Loss(self._modules.pop("target"))


class Manual(Step):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class NoGrad(Step):
    def training_step(self, batch, batch_idx):
        x1, y = batch
        with torch.no_grad():
            x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
            xt = t * x1 + (1 - t) * x0
            u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        self.seen.append((x1 - x0, xt, t[:, 0], x1, y, u, w))
        return (w * (self.velocity(xt, t, y) - u).square().mean(1)).mean()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Chunks, {}),
        (Inside, {}),
        (Manual, {}),
        (NoGrad, {}),
        (Step, {"accumulate_grad_batches": 2}),
        pytest.param(*(lambda: torch.compile(Step(), backend="eager"), {}), marks=pytest.mark.slow),
    ],
    ids=["chunks", "inside", "manual", "no grad", "accumulated", "compiled"],
)
def test_other_ways_to_train_are_steered_and_watched_alike(fit, make, options):
    def trained(*callbacks):
        module = fit(make(), *callbacks, steps=2, **options)
        return getattr(module, "_orig_mod", module)

    x, y = clusters()
    module = trained(StageScheme(target=Mix(1.0)))
    if isinstance(make, type):  # test_cases.py watches one that is compiled
        runs = trained(), trained(PosteriorMonitor(strata=4, queries=8))
        assert all(map(torch.equal, *(run.state_dict().values() for run in runs)))
    assert module.seen
    for _, xt, t, _, labels, u, _ in module.seen:
        near = t < 0.9
        expected = by_class(x, y, xt, t, labels)
        torch.testing.assert_close(u[near].double(), expected[near], rtol=1e-5, atol=1e-4)


def test_the_network_must_come_after_the_target_only_where_x1_is_not_in_the_batch(fit):
    class First(Step):
        def training_step(self, batch, batch_idx):
            x1, y = self.scale * batch[0], batch[1]
            x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
            xt = t * x1 + (1 - t) * x0
            v = self.velocity(xt, t, y)
            u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
            return (w * (v - u).square().mean(1)).mean()

    few = {"every_n_steps": 2, "queries": 4, "strata": 4}
    First.scale = 1
    fit(First(), VelocityErrorMonitor(**few))
    First.scale = 3
    with pytest.raises(ValueError, match=r"target shows what is trained on: call it"):
        fit(First(), VelocityErrorMonitor(**few))


def test_shapes_that_do_not_fit_are_refused():
    x1, t = torch.randn(4, 3), torch.rand(4)
    call = {"y": x1, "xt": x1, "t": t, "x1": x1}
    wrong = {"y": x1[:, :2], "xt": x1[:2], "t": t[:3]}
    for name, value in wrong.items():
        given = call | {name: value}
        y = given.pop("y")
        with pytest.raises(ValueError, match=f"Expected `{name}` with"):
            StageTarget()(y, **given)
    with pytest.raises(TypeError):
        StageTarget()(x1, xt=x1, t="0.5", x1=x1)


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x, t, y):
        return self.inner(x) * t + y[:, None]


class Encoder(nn.Module):
    """Its answer is drawn from: nothing in the step has the values that are trained on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        z = self.inner(x)
        return z + 0.5 * torch.randn_like(z)


def test_an_encoder_whose_draws_are_not_seen_is_named_without_a_line_that_does_not_fit(fit):
    class Encoded(Step):
        def __init__(self):
            super().__init__(target=nn.Identity())
            self.vae, self.net = Encoder(), Velocity()

        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            x1, y = 3 * self.vae(batch[0]), batch[1]
            x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
            return (self.net(t * x1 + (1 - t) * x0, t, y) - x1 + x0).square().mean()

    with pytest.warns(UserWarning, match=r"called with x_1 alone before .*encode=") as told:
        fit(Encoded(), PosteriorMonitor(strata=4, queries=8))
    assert not any("velocity=" in str(each.message) for each in told)
