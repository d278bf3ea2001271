"""`Watch`: the callbacks in a loop without Lightning."""

import gc
import json
import re
import subprocess
import sys
import weakref
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn
from torch.optim import optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stagewise import LatentBank, LogitNormal, Mix, Watch
from stagewise.callbacks import (
    Forecast,
    MemorizationGuard,
    MemorizationMonitor,
    PosteriorMonitor,
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.losses import FlowMatchingLoss

SMALL = {"strata": 4, "queries": 4, "every_n_steps": 3}


def watchers():
    """Of each kind of monitor one."""
    return [
        PosteriorMonitor(**SMALL),
        VelocityErrorMonitor(**SMALL),
        MemorizationMonitor(samples=4, steps=2, every_n_steps=3),
        StageTransitions(),
    ]


class Loop:
    """A training by hand, with the draws of `TinyFlow(seeded=True)`, or others from the globals."""

    def __init__(self, tiny_flow, x, *, seeded=True):
        self.flow, self.x = tiny_flow(seeded=seeded), x
        self.model, self.loss = nn.Module(), FlowMatchingLoss()
        self.model.net, self.seeded = self.flow.net, seeded
        self.model.forward = lambda xt, t: self.model.net(torch.cat([xt, t[:, None].to(xt)], 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)

    def loader(self, shuffle=False):
        return DataLoader(TensorDataset(self.x), batch_size=8, shuffle=shuffle)

    def watch(self, *callbacks, **options):
        data = options.pop("data", self.loader())
        return Watch(self.model, data, *callbacks, target=self.loss, **options)

    def train(self, watch, steps, start=0, *, accumulate=1, context=nullcontext, show=True):
        # Lightning asks its loader for a seed of each epoch; a loop by hand does the same.
        batches, step, place = iter(()), start, start * accumulate
        loader = self.loader(shuffle=not self.seeded)
        while step < steps:
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                for _ in range(place % len(loader)):
                    next(batches)
                batch = next(batches)
            if watch is not None:
                watch.step(step, batch if show else None)
            draws = torch.Generator().manual_seed(1000 * step + place % len(loader))
            with context():
                loss = self.loss(self.model, batch[0], generator=draws if self.seeded else None)
            loss.backward()
            place += 1
            if place % accumulate == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
                step += 1

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.fixture
def loop(tiny_flow, make_data, tmp_path, monkeypatch, quick_figures):
    """`loop(seeded=True)`: a `Loop` that writes to `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda **options: Loop(tiny_flow, make_data(64)[0], **options)


def probes(callbacks):
    """What they found, comparable where it is NaN."""
    return repr([c.history for c in callbacks if hasattr(c, "history")])


def test_what_it_finds_is_what_the_trainer_finds(
    loop, make_trainer, tiny_flow, make_loader, weights, tmp_path
):
    host, hand = watchers(), watchers()
    module, mine = tiny_flow(seeded=True), loop()
    make_trainer(*host, max_steps=8).fit(module, make_loader(mine.x))
    with mine.watch(*hand, steps=8, dirpath="hand", log_every=1) as watch:
        mine.train(watch, 8)
    assert torch.equal(mine.weights(), weights(module))
    assert len(hand[0].history) == 3
    assert probes(hand) == probes(host)
    for callback in hand:
        lines = [
            (folder / "stages.jsonl").read_text().replace("module.model", "module.net")
            for folder in (tmp_path / "hand" / callback.name, tmp_path / f"{callback.name}_logs")
        ]
        events = [[json.loads(line) for line in text.splitlines()] for text in lines]
        for event in (*events[0], *events[1]):
            event.pop("network", None)
            event.pop("maker", None)
        assert events[0] == events[1]


def test_weights_are_those_of_a_loop_that_is_not_watched(loop):
    plain, watched = loop(seeded=False), loop(seeded=False)
    torch.manual_seed(5)
    plain.train(None, 10)
    guard = MemorizationGuard(samples=4, queries=4, steps=2, held_out=watched.x[:8] + 0.1)
    torch.manual_seed(5)
    with watched.watch(*watchers(), guard, Forecast(every_n_steps=4), steps=10) as watch:
        watched.train(watch, 10)
    assert torch.equal(watched.weights(), plain.weights())
    assert len(guard.history) >= 2
    kept = torch.load(guard.best["file"], weights_only=True)
    assert kept["step"] == guard.best["step"]
    assert kept["model"].keys() == watched.model.state_dict().keys()
    assert any("MemorizationGuard" in key for key in kept["watch"])


def test_a_stopped_loop_goes_on_with_the_same_history(loop, tmp_path):
    whole, parts = watchers(), watchers()
    one = loop()
    with one.watch(*whole, steps=9) as watch:
        one.train(watch, 9)
    two = loop()
    watch = two.watch(*parts, steps=9)
    two.train(watch, 6)
    parts_of = watch, two.model, two.optimizer
    torch.save([part.state_dict() for part in parts_of], tmp_path / "state.pt")
    again, two = watchers(), loop()
    watch = two.watch(*again, steps=9)
    for part, state in zip(
        (watch, two.model, two.optimizer),
        torch.load(tmp_path / "state.pt", weights_only=True),
        strict=True,
    ):
        part.load_state_dict(state)
    two.train(watch, 9, start=6)
    watch.close()
    assert torch.equal(one.weights(), two.weights())
    assert probes(again) == probes(whole)
    assert repr(again[1].events) == repr(whole[1].events)


def test_batches_of_one_step_are_one_step(loop):
    monitor, logged = VelocityErrorMonitor(**SMALL), []
    mine = loop()
    log = lambda values, step: logged.append((step, values))  # noqa: E731
    with mine.watch(monitor, steps=6, accumulate=2, log=log, log_every=1) as watch:
        mine.train(watch, 6, accumulate=2)
    assert [entry["step"] for entry in monitor.history] == [1, 3, 6]
    assert monitor.per_step == 16
    assert [step for step, values in logged if "stagewise_error/pythagoras" in values] == [0, 2, 5]


def test_a_loop_that_shows_no_batch_is_known_by_what_makes_its_targets(loop):
    monitor, mine = VelocityErrorMonitor(**SMALL), loop()
    with mine.watch(monitor, steps=4) as watch:
        mine.train(watch, 4, show=False)
    shown, other = VelocityErrorMonitor(**SMALL), loop()
    with other.watch(shown, steps=4) as watch:
        other.train(watch, 4)
    assert repr(monitor.events) == repr(shown.events)


def test_the_network_is_asked_in_the_autocast_of_the_loop(loop):
    mine, seen = loop(), []
    mine.model.net.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with mine.watch(VelocityErrorMonitor(**SMALL), steps=2) as watch:
        mine.train(watch, 2, context=autocast)
    assert len(seen) > 2
    assert set(seen) == {torch.bfloat16}


def test_it_steers_and_lets_go(loop):
    mine, steers = loop(), StageScheme(target=Mix("boundary"), boundary=0.6)
    with mine.watch(steers, steps=3) as watch:
        mine.train(watch, 3)
        record = steers.scheme.last
        assert mine.loss.scheme is steers.scheme
        for depth in (1, 2):
            with ExitStack() as nested:
                for _ in range(depth):
                    nested.enter_context(watch.validation())
                assert mine.loss.scheme is None
            assert mine.loss.scheme is steers.scheme
    assert mine.loss.scheme is None
    assert torch.equal(record.lam > 0, record.t < 0.6)
    plain = loop()
    plain.train(None, 3)
    assert not torch.equal(plain.weights(), mine.weights())


def test_a_network_that_is_compiled_in_place_hides_its_calls(loop):
    mine, monitor = loop(), PosteriorMonitor(**SMALL)
    mine.model.net.compile(backend="eager")
    mine.model.compile(backend="eager")
    watch = Watch(mine.model, mine.loader(), monitor, steps=2)
    mine.train(watch, 2)
    watch.close()
    assert monitor.history


class Forgot(Exception):
    pass


def test_an_exception_in_validation_leaves_it_steered(loop):
    mine, steers = loop(), StageScheme(target=Mix(1.0))
    with mine.watch(steers, steps=2) as watch:
        mine.train(watch, 1)
        with pytest.raises(Forgot), watch.validation():
            raise Forgot
        assert mine.loss.scheme is steers.scheme


def steered(mine):
    """Whether the loss is that of a target with an oracle in it."""
    loss, scheme = mine.loss, mine.loss.scheme
    draws = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    first = loss(mine.model, mine.x[:8], generator=draws())
    loss.scheme = None
    plain = loss(mine.model, mine.x[:8], generator=draws())
    loss.scheme = scheme
    return not torch.equal(first, plain)


def test_it_steers_no_call_of_a_model_in_eval_mode_and_none_without_gradients(loop):
    mine = loop()
    with mine.watch(StageScheme(target=Mix(1.0), timesteps=LogitNormal()), steps=4) as watch:
        mine.train(watch, 2)
        assert steered(mine)
        with torch.no_grad():
            assert not steered(mine)
        mine.model.eval()
        assert not steered(mine)
        mine.model.train()
        assert steered(mine)


@pytest.mark.filterwarnings("ignore:A Watch was deleted")
def test_a_watch_that_is_let_go_of_takes_itself_out(loop):
    mine = loop()
    steers, monitors = StageScheme(target=Mix("boundary"), boundary=0.6), watchers()
    guard = MemorizationGuard(samples=4, queries=4, steps=2, held_out=mine.x[:8] + 0.1)
    watch = mine.watch(*monitors, steers, guard, Forecast(every_n_steps=4), steps=9)
    mine.train(watch, 2)
    gone = weakref.ref(watch)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match=r"deleted without being closed.*watch\.close\(\)"):
            del watch
        assert gone() is None
    finally:
        gc.enable()
    assert mine.loss.scheme is None
    assert "forward" not in vars(mine.loss)
    for module in mine.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_what_another_watch_steers_is_refused(loop):
    mine = loop()
    old = mine.watch(StageScheme(target=Mix(1.0)), steps=9)
    mine.train(old, 2)
    new = mine.watch(VelocityErrorMonitor(**SMALL), steps=9)
    with pytest.raises(ValueError, match=r"target is steered by another Watch.*watch\.close\(\)"):
        mine.train(new, 1)
    old.close()
    mine.train(new, 1)
    new.close()


@pytest.mark.parametrize(
    ("steps", "accumulate", "options", "said"),
    [
        (lambda place: 0, 1, {}, "grown by 0 from one"),
        (lambda place: place, 4, {}, r"every 4 batches \(accumulate=1\).*accumulate=4"),
        (lambda place: place // 4, 4, {}, r"every 4 batches \(accumulate=1\).*accumulate=4"),
        (lambda place: place // 4, 4, {"accumulate": 4}, None),
        (lambda place: place, 1, {"accumulate": 2}, "accumulate=1"),
    ],
)
def test_steps_that_are_counted_in_another_way_are_named_once(
    loop, recwarn, steps, accumulate, options, said
):
    mine = loop()
    watch = mine.watch(PosteriorMonitor(**SMALL, figures=0), steps=99, **options)
    for place in range(16):
        watch.step(steps(place), (mine.x[:8],))
        mine.loss(mine.model, mine.x[:8]).backward()
        if place % accumulate == accumulate - 1:
            mine.optimizer.step()
    watch.close()
    told = [str(one.message) for one in recwarn if "An optimizer step" in str(one.message)]
    assert len(told) == (said is not None)
    assert said is None or re.search(said, told[0])


def test_steps_that_a_scaler_leaves_out_are_not_accused(loop, recwarn):
    mine = loop()
    watch = mine.watch(PosteriorMonitor(**SMALL, figures=0), steps=99)
    for step in range(9):
        watch.step(step, (mine.x[:8],))
        mine.loss(mine.model, mine.x[:8]).backward()
        if step not in (0, 1, 5):
            mine.optimizer.step()
    watch.close()
    assert not [one for one in recwarn if "An optimizer step" in str(one.message)]


def test_a_watch_whose_step_is_never_called_says_so(loop):
    mine = loop()
    watch = mine.watch(StageScheme(target=Mix(1.0)))
    mine.train(None, 1)
    with pytest.warns(UserWarning, match="never called: nothing was measured or steered"):
        watch.close()


def test_weights_of_another_network_are_not_changed(loop):
    mine, other = loop(), nn.Linear(6, 6)
    watch = mine.watch(PosteriorMonitor(**SMALL))
    optimizer, before = torch.optim.SGD(other.parameters(), 0.1), other.weight.clone()
    mine.optimizer = None
    watch.step(0, (mine.x[:8],))
    other(mine.x[:8]).sum().backward()
    with pytest.raises(ValueError, match="never called with gradients"):
        optimizer.step()
    assert torch.equal(other.weight, before)


def test_a_discriminator_may_step_before_the_network_is_called(loop):
    mine, judge = loop(), nn.Linear(6, 1)
    optimizer = torch.optim.SGD(judge.parameters(), 0.1)
    monitor = PosteriorMonitor(**SMALL)
    with mine.watch(monitor, steps=2) as watch:
        watch.step(0, (mine.x[:8],))
        judge(mine.x[:8]).sum().backward()
        optimizer.step()
        mine.loss(mine.model, mine.x[:8]).backward()
        mine.optimizer.step()
    assert monitor.history


def test_a_network_that_only_a_closure_calls_is_looked_at_before_it_changes(loop):
    def train(*monitors):
        mine = loop()
        optimizer = torch.optim.LBFGS(mine.model.parameters(), max_iter=3)
        watch = mine.watch(*monitors, steps=3)
        for step in range(3):
            if monitors:
                watch.step(step, (mine.x[:8],))
            draws = torch.Generator().manual_seed(step)

            def closure(draws=draws):
                optimizer.zero_grad()
                loss = mine.loss(mine.model, mine.x[:8], generator=draws)
                loss.backward()
                return loss

            optimizer.step(closure)
        watch.close()
        return mine.weights()

    monitor = VelocityErrorMonitor(**SMALL)
    assert torch.equal(train(monitor), train())
    assert [entry["step"] for entry in monitor.history] == [1, 3]


def test_a_closure_does_not_hide_what_is_refused(loop):
    mine = loop()
    before = mine.weights().clone()
    watch = Watch(mine.model, mine.loader(), VelocityErrorMonitor(**SMALL))
    watch.step(0, (mine.x[:8],))
    with pytest.raises(ValueError, match="say how to ask"):
        mine.optimizer.step(lambda: mine.loss(mine.model, mine.x[:8]).backward())
    assert torch.equal(mine.weights(), before)


def test_validation_in_the_first_step_is_not_what_is_trained_on(loop, recwarn):
    mine, monitor = loop(), VelocityErrorMonitor(**SMALL)
    with mine.watch(monitor, steps=1) as watch:
        watch.step(0, (mine.x[:8],))
        mine.model.eval()
        with torch.no_grad():
            mine.loss(mine.model, 50 * mine.x[:8])
        mine.model.train()
        mine.loss(mine.model, mine.x[:8]).backward()
        mine.optimizer.step()
    assert monitor.history
    assert not [one for one in recwarn if "other samples" in str(one.message)]


@pytest.mark.parametrize(("kind", "factor"), [(PosteriorMonitor, 1.01), (VelocityErrorMonitor, 9)])
def test_a_loop_over_another_loader_is_named(loop, kind, factor):
    mine = loop()
    watch = mine.watch(kind(**SMALL))
    watch.step(0, (factor * mine.x[:8],))
    mine.loss(mine.model, factor * mine.x[:8]).backward()
    if kind is PosteriorMonitor:
        with pytest.warns(UserWarning, match=r"100% of .*no rows.*Watch\(model, loader, \.\.\.\)"):
            mine.optimizer.step()
    else:
        with pytest.raises(ValueError, match="at the scale of the bank, got 100% that are no rows"):
            mine.optimizer.step()


def test_an_exception_leaves_no_hook(loop):
    mine, before = loop(), set(optimizer._global_optimizer_pre_hooks)

    def fail():
        with mine.watch(*watchers(), steps=9) as watch:
            mine.train(watch, 2)
            raise Forgot

    with pytest.raises(Forgot):
        fail()
    for module in mine.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not set(optimizer._global_optimizer_pre_hooks) - before


class Board:
    """What a `SummaryWriter` is known by."""

    def __init__(self):
        self.scalars, self.images = [], []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, step))

    def add_image(self, tag, image, step, dataformats):
        self.images.append(tag)


def test_a_board_gets_scalars_and_pictures(loop):
    board, mine = Board(), loop()
    with mine.watch(PosteriorMonitor(**SMALL), steps=2, log=board) as watch:
        mine.train(watch, 2)
    assert ("stagewise/midpoint", 0) in board.scalars
    assert "stagewise/concentration" in board.images


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(6)


def elsewhere(mine):
    other = nn.Linear(6, 6)
    watch = Watch(other, LatentBank(mine.x), PosteriorMonitor(**SMALL))
    optimizer = torch.optim.SGD(other.parameters(), 1e-2)
    watch.step(0, mine.x[:8])
    optimizer.step()


def idle(mine):
    watch = Watch(nn.Linear(6, 6), mine.loader(), PosteriorMonitor(**SMALL))
    watch.step(0, mine.x[:8])
    watch.step(1, mine.x[8:16])


def late(mine):
    watch = mine.watch(PosteriorMonitor(**SMALL))
    mine.train(None, 1)
    watch.step(1, mine.x[:8])


def back(mine):
    watch = mine.watch(PosteriorMonitor(**SMALL))
    mine.train(watch, 3)
    watch.step(0, mine.x[:8])


def closed(mine):
    watch = mine.watch(PosteriorMonitor(**SMALL))
    mine.train(watch, 2)
    watch.close()
    watch.step(2, mine.x[:8])


def resumed(mine):
    watch = mine.watch(PosteriorMonitor(**SMALL))
    mine.train(watch, 3)
    again = mine.watch(PosteriorMonitor(**SMALL))
    again.load_state_dict(watch.state_dict())
    again.step(0, mine.x[:8])


def unknown(mine):
    watch = Watch(mine.model, mine.loader(), VelocityErrorMonitor(**SMALL))
    mine.train(watch, 1)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda m: Watch("net", m.loader()), TypeError, "an nn.Module, got str"),
        (lambda m: Watch(m.model, m.loader(), print), TypeError, "callbacks of stagewise, got"),
        (
            lambda m: m.watch(PosteriorMonitor(), PosteriorMonitor()),
            ValueError,
            "a name for each of several",
        ),
        (lambda m: Watch(m.model, PosteriorMonitor()), TypeError, "before the callbacks, got"),
        (lambda m: Watch(m.model, m.loader(), PosteriorMonitor(), target=5), TypeError, "got 5"),
        (
            lambda m: m.train(Watch(m.model, m.loader(), StageScheme(target=Mix())), 1),
            ValueError,
            r"Watch\(..., target=target\), and once",
        ),
        (
            lambda m: m.watch(PosteriorMonitor(), log=3),
            TypeError,
            r"function of \(dict, step\), .* got 3",
        ),
        (
            lambda m: m.watch(PosteriorMonitor(), data=DataLoader(Endless(), 8)).step(0, m.x[:8]),
            ValueError,
            "no length, .* Give the bank yourself",
        ),
        (elsewhere, ValueError, "never called"),
        (idle, ValueError, "never called"),
        (late, ValueError, "at the top of the loop"),
        (back, ValueError, "`step` of at least 2"),
        (closed, RuntimeError, "This Watch is closed"),
        (resumed, ValueError, "at least 3, .* step = 3;"),
        (unknown, ValueError, r"say how to ask .*velocity=lambda module, xt, t, labels: module.m"),
    ],
)
def test_what_cannot_be_watched_is_refused(loop, wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong(loop())


def test_a_watch_of_nothing_says_so(loop):
    with pytest.warns(UserWarning, match="A Watch without callbacks measures nothing"):
        loop().watch()


WITHOUT = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "tensorboard", "hydra"):
    sys.modules[name] = None
import numpy, torch
import stagewise
from stagewise.callbacks import PosteriorMonitor, VelocityErrorMonitor, writer
from torch import nn

writer.render = lambda _: numpy.zeros((2, 3, 3), dtype="uint8")  # takes most of the time

class Net(nn.Linear):
    def forward(self, xt, t):
        return super().forward(torch.cat([xt, t[:, None]], 1))

x, net = torch.randn(64, 2), Net(3, 2)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
error = VelocityErrorMonitor(velocity=lambda module, xt, t, labels: module.model(xt, t))
with stagewise.Watch(net, stagewise.LatentBank(x), PosteriorMonitor(), error, steps=3) as watch:
    for step in range(3):
        watch.step(step, x[:32])
        x0, t = torch.randn(32, 2), torch.rand(32)
        xt = t[:, None] * x[:32] + (1 - t[:, None]) * x0
        (net(xt, t) - (x[:32] - x0)).square().mean().backward()
        optimizer.step()
assert [entry["step"] for entry in error.history] == [1, 2, 3]
from pathlib import Path
from stagewise.recipes import report_html, report_sections
from stagewise.recipes.report import report
report_sections.drawn = lambda figure, caption: report_html.image(b"", caption, (1, 1))
print(report(Path()))
"""


@pytest.mark.slow
def test_it_needs_no_lightning(tmp_path):
    run = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    assert (tmp_path / "stagewise_logs" / "concentration.png").exists()
    assert "PosteriorMonitor: boundary t = " in done.stderr
    page = (tmp_path / done.stdout.strip()).read_text(encoding="utf-8")
    assert "Error by t and by step" not in page, "said of a page that has none"
    assert page.count("data:image/png") >= 4


RANKS = """
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from stagewise import Watch
from stagewise.callbacks import PosteriorMonitor, VelocityErrorMonitor

many = devices > 1
if many and not dist.is_initialized():
    dist.init_process_group("gloo")
x = samples(64)[:, :4]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))

    def forward(self, xt, t):
        return self.net(torch.cat([xt, t[:, None]], 1))

def train(*callbacks):
    torch.manual_seed(3)
    model, loss = Net(), FlowMatchingLoss()
    model = DistributedDataParallel(model) if many else model
    data = loader(x, sampler=DistributedSampler(x) if many else None)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    torch.manual_seed(7 + rank)
    lines = []
    log = lambda values, step: lines.append(step)
    watch = Watch(model, data, *callbacks, target=loss, steps=4, log=log, dirpath=out)
    for step, batch in zip(range(4), data):
        if callbacks:
            watch.step(step, batch)
        optimizer.zero_grad()
        loss(model, batch[0]).backward()
        optimizer.step()
    watch.close()
    return model, bool(lines)

options = {"strata": 4, "queries": 4, "every_n_steps": 2}
posterior, error = PosteriorMonitor(**options), VelocityErrorMonitor(**options)
with undrawn():
    (plain, _), (watched, logs) = train(), train(posterior, error)
states = zip(plain.state_dict().values(), watched.state_dict().values())
same = [torch.equal(*pair) for pair in states]
found = repr(posterior.history), repr(error.events)
report({"same": all(same), "logs": logs, "found": found, "probes": len(error.history)})
"""


@pytest.fixture(scope="module")
def ranks(on_one_and_two_ranks, reports_of):
    return reports_of(*on_one_and_two_ranks(RANKS))


@pytest.mark.slow
def test_ranks_find_the_same_and_the_first_one_writes(ranks):
    alone, zero, one = ranks
    assert alone["same"] and zero["same"] and one["same"]  # noqa: PT018
    assert zero["found"] == one["found"]
    assert [zero["logs"], one["logs"]] == [True, False]
    # What is measured of the data does not hang on the number of ranks.
    parts = [json.loads(said["found"][0].replace("'", '"').replace("nan", "NaN")) for said in ranks]
    assert parts[0][0]["midpoint"] == pytest.approx(parts[1][0]["midpoint"], abs=1e-6)


def test_steering_that_ends_is_said_once(loop, recwarn):
    mine = loop()
    watch = mine.watch(StageScheme(target=Mix()))
    mine.train(watch, 2)
    watch._model.eval()
    mine.train(watch, 5, start=2)
    watch.close()
    said = [str(w.message) for w in recwarn if "that was steered" in str(w.message)]
    assert len(said) == 1
    assert "3 optimizer steps up to 4 came without a target" in said[0]
