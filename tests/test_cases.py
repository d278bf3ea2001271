"""Situations from public reports, each with every callback that it concerns.

What is measured or trained on without being that of the user's training is said, or refused before
a weight has changed, with a cure that works in that very situation; all else runs and is right.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stagewise import CosinePath, LatentBank, LinearPath, Mix, Scheme, StageAware
from stagewise.adapters import find_target_makers
from stagewise.adapters.first_step import FirstStep
from stagewise.batches import find_sample
from stagewise.callbacks import (
    MemorizationMonitor,
    PosteriorMonitor,
    StageRun,  # noqa: F401 - for what is pasted
    StageScheme,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.losses import FlowMatchingLoss

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings(
        "ignore:.*(does not have many workers|resuming from a checkpoint|used to create|deprecated)"
    ),
]

SIZE = 8
X = torch.randn(96, SIZE, generator=torch.Generator().manual_seed(0))
OTHER = 0.2 * torch.randn(96, SIZE, generator=torch.Generator().manual_seed(1))
OTHER[::2] += 2  # two clusters, so that the stages meet elsewhere
Y = torch.arange(96) % 3
FEW = {"every_n_steps": 2, "strata": 4, "queries": 8}


def posterior(**options):
    return PosteriorMonitor(**(FEW | options))


def errors(**options):
    return VelocityErrorMonitor(**(FEW | options))


KINDS = {
    "posterior": lambda **options: [posterior(**options)],
    "errors": lambda **options: [errors(**options)],
    "copies": lambda **options: [
        MemorizationMonitor(samples=4, steps=2, every_n_steps=2, **options)
    ],
    "mixing": lambda **options: [StageScheme(target=Mix("boundary"), **options)],
    "times": lambda **options: [StageScheme(timesteps=StageAware(0.5), **options)],
}
WATCHING = ("posterior", "errors", "copies")
EACH = pytest.mark.parametrize("kind", KINDS)
TOGETHER = {
    "watching": lambda: [*(KINDS[kind]()[0] for kind in WATCHING), StageTransitions()],
    "steering": lambda: [StageScheme(target=Mix("boundary"), timesteps=StageAware(0.5))],
}
BOTH = pytest.mark.parametrize("together", TOGETHER)
"""Where nothing is refused: a training with all that watches, and one with all that steers."""


def star(name, cases, *others, kind="errors"):
    """Each case with one kind of callback, and the `others`, default the first, with each kind."""
    rest = [(k, case) for case in others or [next(iter(cases))] for k in KINDS if k != kind]
    return pytest.mark.parametrize(("kind", name), [*((kind, case) for case in cases), *rest])


class Net(nn.Module):
    def __init__(self, size=SIZE):
        super().__init__()
        self.f = nn.Linear(size + 2, size)

    def forward(self, x, t, y=None):
        columns = torch.stack([t, 0 * t if y is None else y.to(t)], 1).to(x)
        return self.f(torch.cat([x.flatten(1), columns], 1)).view_as(x)


class Plain(pl.LightningModule):
    """Trains on a batch as it comes: x_1, and labels if there are any."""

    def __init__(self, size=SIZE, **loss):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = Net(size), FlowMatchingLoss(**loss)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def loader(*tensors, **options):
    return DataLoader(TensorDataset(*(tensors or (X, Y))), 16, **options)


class Rows(Dataset):
    """A dictionary for each sample."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __len__(self):
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.tensors.items()}


OURS = (
    "stagewise",
    "velocity",
    "bank",
    "Monitor",
    "measure",
    "network",
    "Scheme",
    "oracle",
    "Training is",
)


@pytest.fixture
def run(make_trainer, weights):
    """`run(module, callbacks, data, ...)`: weights, error and what was said of the training."""

    def run(module, callbacks, data=None, ckpt_path=None, **options):
        before = weights(module)
        pl.seed_everything(7, verbose=False)
        trainer = make_trainer(*callbacks, **({"max_steps": 2} | options))
        error = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
            except (ValueError, RuntimeError) as raised:
                error = raised
        texts = [str(warning.message) for warning in caught]
        return SimpleNamespace(
            error=error,
            said=[text for text in texts if any(word in text for word in OURS)],
            weights=weights(module),
            unchanged=torch.equal(before, weights(module)),
            trainer=trainer,
            callbacks=callbacks,
        )

    return run


def argument(message):
    """The first argument that a message tells the user to give, as it is written there."""
    wanted = ("read_batch=lambda", "encode=", "class_wise=False", "bank=LatentBank(")
    found = [place for each in wanted if (place := message.find(each)) >= 0]
    at = min(found, default=message.find("velocity=lambda"))
    depth, begin = 0, message.find(": ", at) if message[at] in "ev" else at
    for end in range(begin, len(message) + 1):
        depth += (message[end : end + 1] == "(") - (message[end : end + 1] == ")")
        over = message[end : end + 2] in (". ", "; ", ", ", ".", ";", "")
        if depth < 0 or (depth == 0 and over):
            return message[at:end]
    raise AssertionError(message)


def cured(run, make, kinds, data, names, most=3, also=(), but=None, **options):
    """Pastes what messages say until none is left; gives the arguments, and the run without.

    That run has the last one, which needs no more words, as `last`. Messages with the words `but`
    have no line to paste.
    """
    given, first = [], None
    for _ in range(most + 1):
        module = make()
        line = f"StageRun({', '.join(given)})"
        callbacks = [each for kind in kinds.split() for each in KINDS[kind]()]
        callbacks += [each() for each in also]
        if given:
            callbacks.insert(0, eval(line, {**globals(), **names, "module": module}))
        came = run(module, callbacks, data(), **options)
        first = first or came
        said = [text for text in came.said if but is None or but not in text]
        if came.error is None and not said:
            first.last = came
            return given, first
        if came.error is not None:
            assert came.unchanged, "refused too late"
        given.append(argument(" ".join([*said, str(came.error or "")])))
    raise AssertionError(f"no end: {given}")


# -- the bank is not what is trained on -----------------------------------------------------------


@BOTH
@pytest.mark.parametrize("same", [True, False], ids=["the same", "others"])
def test_resuming_with_other_latents_of_the_same_count(together, same, run, tmp_path):
    """A training goes on with latents that were encoded anew: as many, of the same shape."""
    first = TOGETHER[together]()
    before = run(Plain(), first, max_steps=3)
    assert before.error is None
    if together == "watching":
        event = {"event": "transition", "kind": "navigation learned", "step": 1}
        first[-1].events.append(event)
    before.trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    own = LatentBank(X, Y).fingerprint
    for callback in first:
        assert state[callback.state_key]["run"]["bank"] == own

    again = TOGETHER[together]()
    rows = X if same else OTHER
    came = run(Plain(), again, loader(rows, Y), tmp_path / "end.ckpt", max_steps=6)
    assert came.error is None
    named = [text for text in came.said if "The bank is not that of the checkpoint" in text]
    assert len(named) == (not same)
    if not same:
        new = LatentBank(OTHER, Y).fingerprint
        assert f"fingerprint {new[:8]} with 96 rows, and {own[:8]} before" in named[0]
    for callback in again:
        if hasattr(callback, "history"):
            assert (callback.history[0]["step"] < 3) == same
        assert callback.state_dict()["run"]["bank"] == (own if same else new)
    if together == "watching":
        assert again[-1].events == ([event] if same else [])
    if together == "steering":
        fresh = TOGETHER[together]()
        run(Plain(), fresh, loader(rows, Y), max_steps=1)
        old, found, anew = (c[0].scheme.boundary for c in (first, again, fresh))
        assert (found == old) == same
        # Other queries, because they are those of the step at which it is measured.
        assert found == pytest.approx(anew, abs=0.1)


@pytest.mark.parametrize(
    ("together", "labels"), [("watching", [Y]), ("watching", []), ("steering", [Y])]
)
@pytest.mark.parametrize("change", ["same", "other"])
def test_a_loader_that_is_replaced_by_one_of_other_samples(together, labels, change, run):
    """A data module gives another part of the data every epoch."""

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            late = self.trainer.current_epoch and change == "other"
            return loader(X + 1 if late else X, *labels)

    came = run(
        Plain(),
        TOGETHER[together](),
        Data(),
        max_steps=-1,
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
    )
    told = "The training loader was replaced in epoch 1, and its samples are not rows of the bank"
    named = [text for text in came.said if told in text]
    assert came.error is None
    assert len(named) == (change == "other")
    assert came.said == named


class Audio(Plain):
    """Encodes waveforms, (B, 1, 64), to latents, (B, 8), in its step."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 1, 8, stride=8), nn.Flatten())
        self.encoder.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            x1 = self.encoder(batch["audio"])
        return self.loss(self.net, x1, batch["label"])


WAVES = torch.randn(96, 1, 64, generator=torch.Generator().manual_seed(2))


def audio():
    return DataLoader(Rows(audio=WAVES, label=Y), 16, shuffle=True)


class Scales(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net, 0.25 * batch[0], batch[1])


@EACH
def test_samples_that_the_step_scales(kind, run):
    given, came = cured(run, Scales, kind, loader, {})
    assert given == ["encode=lambda x, module: x / 4.0"]
    assert came.unchanged == (came.error is not None) == (kind == "mixing")
    if kind in WATCHING:
        assert torch.equal(came.weights, run(Scales(), []).weights)


@EACH
def test_waveforms_that_the_module_encodes(kind, run):
    """The batch holds audio, and training is on its latents: read so, or said, with ways out."""
    line = "encode=lambda x, module: module.encoder(x)"
    given, came = cured(run, Audio, kind, audio, {})
    assert given == [line]
    message = " ".join([*came.said, str(came.error or "")])
    assert came.unchanged == (came.error is not None) == (kind == "mixing")
    if kind in WATCHING:
        assert "Training encodes x_1, batch['audio'], and the bank is read again" in message
    else:
        assert f"training encodes x_1. Say so: {line}, or give what is trained on:" in message
        assert "bank=LatentBank(latents, labels)" in message


@BOTH
def test_the_bank_of_what_the_module_encodes(together, run):
    with torch.no_grad():
        latents = Audio().encoder(WAVES)
    given = [StageRun(bank=LatentBank(latents, Y)), *TOGETHER[together]()]
    came = run(Audio(), given, audio())
    assert (came.error, came.said) == (None, [])


class Depth(Plain):
    """Trains on `batch["surface"]`, given `batch["image"]`."""

    def __init__(self):
        super().__init__(16)
        self.net = Conditioned()

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch["surface"], image=batch["image"])


class Conditioned(Net):
    def __init__(self):
        super().__init__(16)
        self.read = nn.Linear(48, 16)

    def forward(self, x, t, image):
        return super().forward(x, t) + self.read(image.flatten(1)).view_as(x)


SURFACES = torch.randn(96, 1, 4, 4, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(96, 3, 4, 4, generator=torch.Generator().manual_seed(4))


@EACH
def test_another_tensor_of_the_batch_than_the_image(kind, run):
    """`batch["image"]` is the condition and `batch["surface"]` is x_1; shapes differ."""

    def data():
        return DataLoader(Rows(image=IMAGES, surface=SURFACES), 16, shuffle=True)

    given, _ = cured(run, Depth, kind, data, {})
    # That the oracle does not heed the image is another matter, said for itself.
    others = [] if kind == "times" else ["class_wise=False"]
    assert sorted(given) == [*others, "read_batch=lambda batch: (batch['surface'], None)"]


class LooksUp(Plain):
    """Has the latents itself; the batch says which rows."""

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, X[batch["row"]])


@EACH
def test_another_bank_beside_a_batch_without_x1(kind, run):
    """The batch holds row numbers only; the first step is held against the bank all the same."""
    data = DataLoader(Rows(row=torch.arange(96)), 16, shuffle=True)
    came = run(LooksUp(), [StageRun(bank=LatentBank(5 * X)), *KINDS[kind]()], data)
    if came.error is not None:
        assert "scale of the bank" in str(came.error)
        assert came.unchanged
    else:
        assert "standard deviation of" in " ".join(came.said)
    assert kind != "mixing" or came.error is not None


@BOTH
def test_its_own_bank_beside_a_batch_without_x1(together, run):
    data = DataLoader(Rows(row=torch.arange(96)), 16, shuffle=True)
    came = run(LooksUp(), [StageRun(bank=LatentBank(X)), *TOGETHER[together]()], data)
    assert (came.error, came.said) == (None, [])


def test_two_banks_in_one_trainer(run):
    """Two monitors watch against a bank each, and a third that says nothing is not guessed for."""
    banks = {"one": LatentBank(X), "two": LatentBank(OTHER)}

    def watch(name):
        return posterior(bank=banks[name], name=name, class_wise=False)

    alone, both = {}, {}
    for name in banks:
        monitor = watch(name)
        run(Plain(), [monitor], loader(X))
        alone[name] = monitor.history[0]["midpoint"]
    pair = [watch(name) for name in banks]
    came = run(Plain(), pair, loader(X))
    assert came.error is None
    assert [("not rows of the bank" in text) for text in came.said] == [True], "of the other"
    both = {monitor.name: monitor.history[0]["midpoint"] for monitor in pair}
    assert both == alone
    assert both["one"] != both["two"]
    came = run(Plain(), [*map(watch, banks), errors()], loader(X))
    assert came.unchanged
    assert "Give one for all: callbacks=[StageRun(bank=...)" in str(came.error)


# -- labels and conditions ------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_labels_that_could_be_times(together, classes, dtype, run):
    """All labels are 0, or 0 and 1: integers and constants are no times."""
    data = loader(X, (Y % classes).to(dtype), shuffle=True)
    callbacks = TOGETHER[together]()
    came = run(Plain(), callbacks, data)
    assert came.error is None
    assert came.said == []
    if together == "watching":
        assert torch.equal(came.weights, run(Plain(), [], data).weights)
    for callback in callbacks:
        network = getattr(callback, "network", None)
        assert network is None or (network.name, network.conditional) == ("net", True)


class Prepares(Plain):
    """A module with weights is called with (x_1, zeros) before the network is."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, mask):
            return x + self.weight * mask[:, None]

    def __init__(self):
        super().__init__()
        self.first = self.Masked()

    def training_step(self, batch, batch_idx):
        x1, y = batch
        return self.loss(self.net, self.first(x1, torch.zeros(len(x1))), y)


@BOTH
def test_a_module_that_is_called_with_the_data_and_zeros(together, run, read_stages, tmp_path):
    """It prepares the data, and is not the network."""
    came = run(Prepares(), TOGETHER[together]())
    assert (came.error, came.said) == (None, [])
    if together == "watching":
        header, _ = read_stages(tmp_path / "stagewise_error_logs")
        assert header["network"] == "module.net: Net(x_t, time, labels)"


class OneHot(Plain):
    def training_step(self, batch, batch_idx):
        c = nn.functional.one_hot(batch[1], 3).float()
        return self.loss(lambda x, t: self.net(x, t, c @ torch.arange(3.0)), batch[0])


class Given(Plain):
    """The network is given a tensor of the batch that is no label."""

    class Net(Net):
        def forward(self, x, t, c):
            return super().forward(x, t) + c.flatten(1).mean(1, keepdim=True)

    def __init__(self):
        super().__init__()
        self.net = self.Net()


CLUSTERS = torch.cat([torch.randn(48, SIZE) * 0.1 + centre for centre in (-2.0, 2.0)])
CONDITIONS = {
    "one-hot": nn.functional.one_hot(torch.arange(96) // 48, 2).float(),
    "an image": torch.randn(96, 3, 4, 4),
    "token embeddings": torch.randn(96, 5, 7),
    "another state": CLUSTERS.flip(0) + 0.1,
}


@star("condition", CONDITIONS)
def test_conditions_that_are_no_labels(kind, condition, run):
    """Over all rows the mean target of two clusters at +-2 is half of what either would have."""
    data = Rows(x=CLUSTERS, c=CONDITIONS[condition])

    class Module(Given):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net, batch["x"], batch["c"])

    find = "read_batch=lambda batch: (batch['x'], None)"
    came = run(Module(), [eval(f"StageRun({find})"), *KINDS[kind]()], DataLoader(data, 16))
    if kind == "times":
        assert came.error is None
        return
    message = " ".join([*came.said, str(came.error or "")])
    assert (came.error is None) == (kind == "posterior")
    assert came.error is None or came.unchanged
    assert "class_wise=False" in message
    again = [eval(f"StageRun({find}, class_wise=False)"), *KINDS[kind]()]
    came = run(Module(), again, DataLoader(data, 16))
    assert came.error is None
    assert came.said == []


class Beside(Plain):
    """Is given a condition in the channels beside x_t."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(6, 3, 1)

    def training_step(self, batch, batch_idx):
        other = batch[0].flip(-1)
        return self.loss(lambda xt, t, y: self.net(torch.cat([xt, other], 1)), *batch)


@EACH
def test_a_condition_in_the_channels_beside_x_t(kind, run):
    """How to ask that network only its user knows."""
    data = loader(PICTURES, Y, shuffle=True)
    came = run(Beside(), KINDS[kind](), data)
    assert came.unchanged == (came.error is not None) == (kind in ("errors", "copies"))
    if came.error is None:
        said = ["StageScheme(timesteps=..., weight=...)" in text for text in came.said]
        assert said == [True] * (kind == "mixing")
    if kind == "posterior":
        assert torch.equal(came.weights, run(Beside(), [], data).weights)


class Texts(Given):
    """The network reads the words itself."""

    class Net(Net):
        def forward(self, x, t, prompts):
            prompts = getattr(prompts, "words", prompts)
            prompts = [one["text"] if isinstance(one, dict) else one for one in prompts]
            return super().forward(x, t, torch.tensor([len(text) for text in prompts]))


class Reads(Given):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch["latents"], batch["text"])


def texts():
    return DataLoader(Rows(latents=X, text=CONDITIONS["token embeddings"]), 16)


FORMS = {
    "list": list,
    "tuple": tuple,
    "object": lambda words: SimpleNamespace(words=list(words)),
    "list of dict": lambda words: [{"text": word} for word in words],
}


@star("form", FORMS)
def test_prompts_that_the_network_reads_itself(kind, form, run):
    class Module(Texts):
        def training_step(self, batch, batch_idx):
            x1, prompts = batch
            return self.loss(lambda xt, t: self.net(xt, t, FORMS[form](prompts)), x1)

    data = DataLoader(list(zip(X, ["a" * int(label) for label in Y], strict=True)), 16)
    came = run(Module(), KINDS[kind](), data)
    if kind == "times":
        assert came.error is None
        return
    message = " ".join([*came.said, str(came.error or "")])
    assert (came.error is None) == (kind == "posterior")
    assert "also given prompts: " in message
    assert came.error is None or came.unchanged
    came = run(Module(), KINDS[kind](class_wise=False), data)
    assert (came.error, came.said) == (None, [])


class Drops(Plain):
    """Drops its labels, or its text, for whole steps, for classifier-free guidance."""

    steps, text = 1, False

    class Net(Net):
        def forward(self, x, t, y=None, text=None):
            h = super().forward(x, t, y)
            return h if text is None else h + text.mean(1, keepdim=True)

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def training_step(self, batch, batch_idx):
        x1, c = batch
        if self.global_step < self.steps:
            return self.loss(self.net, x1)
        name = "text" if self.text else "y"
        return self.loss(lambda xt, t: self.net(xt, t, **{name: c}), x1)


@star("steps", [1, 3, 99], 3, 99)
def test_labels_that_the_first_steps_drop(kind, steps, run):
    module = Drops()
    module.steps = steps
    callbacks = KINDS[kind]()
    came = run(module, callbacks, max_steps=8)
    assert came.error is None
    said = [text for text in came.said if "not given any" in text]
    assert bool(said) == (steps == 99 and kind == "posterior"), came.said
    for callback in callbacks if kind in ("errors", "copies") else ():
        assert callback.conditional == (steps < 99)
        wise = callback.wise
        assert wise == (steps < 99)
        assert min(entry["step"] for entry in callback.history) >= (steps if steps < 99 else 1)
        assert any("steps are dropped" in text for text in came.said) == (steps < 99)


@star("steps", [1, 3], 3)
def test_text_that_the_first_steps_drop(kind, steps, run):
    """What the oracle goes into, or is compared with, stops when it is seen."""
    module = Drops()
    module.steps, module.text = steps, True
    data = loader(X, torch.randn(96, 5))
    find = StageRun(read_batch=lambda batch: (batch[0], None))
    came = run(module, [find, *KINDS[kind]()], data, max_steps=8)
    if kind == "times":
        assert came.error is None
        return
    message = " ".join([*came.said, str(came.error or "")])
    assert "also given text: float32 (16, 5)" in message
    assert (came.error is None) == (kind == "posterior")
    assert came.trainer.global_step == (8 if kind == "posterior" else steps)
    module.steps = steps
    find = StageRun(read_batch=lambda batch: (batch[0], None), class_wise=False)
    came = run(module, [find, *KINDS[kind]()], data, max_steps=8)
    assert came.error is None


# -- the order of the values, and of the arguments ------------------------------------------------

PICTURES = torch.randn(96, 3, 4, 4, generator=torch.Generator().manual_seed(3))
ORDERS = {
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "transposed": lambda x: x.mT,
    "flat": lambda x: x.flatten(1),
    "BGR": lambda x: x.flip(1),
    "rolled": lambda x: x.roll(1, -1),
}


class Orders(Plain):
    order = None

    def __init__(self):
        super().__init__(48)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, ORDERS[self.order](batch[0]), batch[1])


@star("order", ORDERS, "flat", "BGR")
def test_values_in_another_order(kind, order, run):
    def make():
        module = Orders()
        module.order = order
        return module

    flat, watches = order == "flat", kind in WATCHING
    names = {"latents": ORDERS[order](PICTURES), "labels": Y}
    given, came = cured(run, make, kind, lambda: loader(PICTURES, Y), names)
    message = " ".join([*came.said, str(came.error or "")])
    assert (came.error is None) == (kind in ("posterior", "times") or (flat and watches))
    assert ("reshapes" if flat else "in another") in message
    if flat:
        assert given == ["encode=lambda x, module: x.reshape(-1, 48)"]
    else:
        assert given[0].startswith(
            "bank=" if order == "rolled" else "read_batch=lambda batch: (batch[0]."
        )


def test_flips_are_no_other_order(run):
    class Flips(Orders):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net, batch[0].flip(-1), batch[1])

    came = run(Flips(), KINDS["errors"](), loader(PICTURES, Y))
    assert "flipped alike. If they always are, say so" in str(came.error)
    line = "read_batch=lambda batch: (batch[0].flip(3), batch[1])"
    assert line in str(came.error)
    find = eval(line.removeprefix("read_batch="))
    assert (
        run(Flips(), [StageRun(read_batch=find), *KINDS["errors"]()], loader(PICTURES, Y)).error
        is None
    )


class Swapped(Plain):
    scale = 1.0

    def training_step(self, batch, batch_idx):
        x1, y = batch
        return self.loss(self.net, torch.randn_like(x1), y, x0=self.scale * x1)


@star("scale", [1.0, 0.3])
def test_noise_and_data_that_are_swapped(kind, scale, run):
    module = Swapped()
    module.scale = scale
    came = run(module, KINDS[kind]())
    message = " ".join([*came.said, str(came.error or "")])
    if kind == "times":
        assert came.error is None
        return
    assert (came.error is None) == (kind == "posterior")
    assert came.error is None or came.unchanged
    if kind != "mixing":
        assert "the samples of the batch as x0 and noise as x1" in message


# -- lines to paste -------------------------------------------------------------------------------


@dataclass
class Held:
    img: Any
    lab: Any


class Named(NamedTuple):
    img: Any
    lab: Any


BATCHES = {
    "dataclass": (lambda x, y: Held(x, y), lambda b: (b.img, b.lab), X),
    "object": (lambda x, y: SimpleNamespace(img=x, lab=y), lambda b: (b.img, b.lab), X),
    "bytes": (lambda x, y: (x, y), lambda b: (b[0].float() / 127.5 - 1, b[1]), X.mul(30).byte()),
    "bytes in a dict": (
        lambda x, y: {"picture": x, "kind": y},
        lambda b: (b["picture"].float() / 127.5 - 1, b["kind"]),
        X.mul(30).byte(),
    ),
    "a named tuple of bytes": (
        Named,
        lambda b: (b.img.float() / 127.5 - 1, b.lab),
        X.mul(30).byte(),
    ),
}


@star("batch", BATCHES)
def test_a_find_to_paste(kind, batch, run):
    make, taken, x = BATCHES[batch]

    class Module(Plain):
        def training_step(self, batch, batch_idx):
            return self.loss(self.net, *taken(batch))

    def collate(samples):
        return make(*(torch.stack(column) for column in zip(*samples, strict=True)))

    def data():
        return DataLoader(TensorDataset(x, Y), 16, collate_fn=collate)

    came = run(
        Module(), [StageRun(read_batch=lambda batch: (batch["no"], None)), *KINDS[kind]()], data()
    )
    assert "`read_batch` to return" in str(came.error)
    assert "For example: read_batch=lambda batch: (batch" in str(came.error)
    given, _ = cured(run, Module, kind, data, {})
    assert len(given) == 1


class Hand(Plain):
    """Its target is made by hand, and time handed over in another way."""

    class Net(Net):
        def forward(self, x, t, y):
            return super().forward(x, t / 1000, y)

    def __init__(self):
        super().__init__()
        del self.loss
        self.net = self.Net()

    def training_step(self, batch, batch_idx):
        x1, y = batch
        t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
        xt = torch.lerp(x0, x1, t[:, None])
        return (self.net(xt, 1000 * t, y) - (x1 - x0)).square().mean()


@pytest.mark.parametrize("kind", ["errors", "copies"])
def test_a_velocity_to_paste(kind, run):
    """With the labels and the time of training; of another one the first step tells."""
    came = run(Hand(), KINDS[kind]())
    assert came.unchanged
    line = str(came.error).split("velocity=")[1].removesuffix(").")
    assert line == "lambda module, xt, t, labels: module.net(xt, 1000 * t, labels)"
    came = run(Hand(), KINDS[kind](velocity=eval(line)))
    assert (came.error, came.said) == (None, [])

    def lacks(module, xt, t, labels):
        return module.net(xt, 1000 * t)

    came = run(Hand(), KINDS[kind](velocity=lacks))
    assert came.unchanged
    message = str(came.error)
    assert "`velocity` raised TypeError" in message
    assert "labels = int64 tensor (2,)" in message
    assert "module.net(xt, t, labels)" in message
    came = run(
        Hand(), KINDS[kind](velocity=lambda module, xt, t, labels: module.net(xt, t, labels))
    )
    assert "calls module.net at another time than training does" in came.said[0]
    Hand.Net.forward.__defaults__ = (None,)
    came = run(Hand(), KINDS[kind](velocity=lacks))
    Hand.Net.forward.__defaults__ = None
    assert "calls module.net without the labels that training gives it" in came.said[0]


# -- what is steered, and whether -----------------------------------------------------------------


class Manual(Plain):
    """Optimises by hand, in one of the ways that there are."""

    def __init__(self, way="backward", used=True):
        super().__init__()
        self.automatic_optimization = False
        self.way, self.used = way, used

    def training_step(self, batch, batch_idx):
        if self.used:
            self.kept = self.loss(self.net, *batch)
        else:
            x1, *y = batch
            t = torch.rand(len(x1))
            x0 = torch.randn_like(x1)
            xt = t[:, None] * x1 + (1 - t[:, None]) * x0
            self.kept = (self.net(xt, t, *y) - x1 + x0).square().mean()
        if self.way != "at the end":
            self.step()

    def on_train_batch_end(self, *_):
        if self.way == "at the end":
            self.step()

    def step(self):
        raw = self.way == "raw"
        optimizer = self.optimizers(use_pl_optimizer=not raw)
        optimizer.zero_grad()
        if self.way == "manual_backward":
            self.manual_backward(self.kept)
        else:
            self.kept.backward()
        optimizer.step()


WAYS = pytest.mark.parametrize("way", ["backward", "manual_backward", "at the end", "raw"])
ONCE = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 4}


@WAYS
@BOTH
def test_manual_optimisation(together, way, run):
    """All goes on as with automatic optimisation, wherever the optimizer steps."""
    callbacks = TOGETHER[together]()
    came = run(Manual(way), callbacks, loader(shuffle=True), **ONCE)
    plain = run(Manual(way), [], loader(shuffle=True), **ONCE)
    assert came.error is None
    assert [text for text in came.said if "draws 64 samples" not in text] == []
    assert torch.equal(came.weights, plain.weights) == (together == "watching")
    for callback in callbacks:
        assert getattr(callback, "history", [1])


@WAYS
def test_a_bank_at_another_scale_is_refused_in_manual_optimisation(way, run):
    """At five times the scale, and before a weight changes where there is a hook for it."""
    scheme = StageScheme(target=Mix("boundary"), boundary=0.3, bank=LatentBank(5 * X))
    came = run(Manual(way), [scheme], loader(X), **ONCE)
    assert "Expected samples at the scale of the bank, got 100% that are no rows" in str(came.error)
    if way == "raw":  # Lightning sees nothing of it: by the end of the batch
        assert came.trainer.fit_loop.epoch_loop.batch_progress.total.processed <= 1
    else:
        assert came.unchanged


@WAYS
@pytest.mark.parametrize("kind", ["mixing", "times"])
def test_an_objective_that_is_never_called_is_refused(kind, way, run):
    """The step makes its own target: nothing is steered, and that is said."""
    came = run(Manual(way, used=False), KINDS[kind](), **ONCE)
    assert isinstance(came.error, RuntimeError)
    assert "without module.loss, so nothing is steered" in str(came.error)
    assert came.unchanged or way == "raw"
    assert came.trainer.fit_loop.epoch_loop.batch_progress.total.completed == 0


class Skips(Plain):
    """Returns None for some batches, as where a loss is not finite."""

    def __init__(self, skips=(0, 1)):
        super().__init__()
        self.skips = skips

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skips else super().training_step(batch, batch_idx)


@BOTH
@pytest.mark.parametrize("skips", [(0,), (0, 1), (1,)], ids=str)
def test_a_training_step_that_returns_none_at_first(together, skips, run):
    """There is nothing to see in such a step: the next one is looked at."""
    callbacks = TOGETHER[together]()
    came = run(Skips(skips), callbacks, max_steps=5)
    plain = run(Skips(skips), [], max_steps=5)
    assert (came.error, came.said) == (None, [])
    assert torch.equal(came.weights, plain.weights) == (together == "watching")
    for callback in callbacks:
        assert getattr(callback, "history", [1])
        assert getattr(callback, "network", None) is None or callback.network.name == "net"


class Pairs:
    """An optimal-transport sampler, by its interface."""

    def get_map(self, x0, x1):
        return torch.eye(len(x0))

    def sample_map(self, plan, size):
        return torch.arange(size), torch.arange(size)


class ByHand(Plain):
    """Makes its target by hand, of noise that a coupling has ordered."""

    def __init__(self):
        super().__init__()
        del self.loss
        self.coupling = Pairs()

    def training_step(self, batch, batch_idx):
        x1, y = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        order = torch.cdist(x0, x1).argmin(0)
        x0 = x0[order]
        xt = torch.lerp(x0, x1, t[:, None])
        return (self.net(xt, t, y) - (x1 - x0)).square().mean()


class Pictures(Plain):
    """Goes from one picture to another, and not from noise."""

    def training_step(self, batch, batch_idx):
        x1, y = batch
        return self.loss(self.net, x1, y, x0=0.5 * x1.flip(1) + 1)


class Follows(Plain):
    """Noise of the right size that depends on the data."""

    def training_step(self, batch, batch_idx):
        x1, y = batch
        return self.loss(self.net, x1, y, x0=0.6 * x1 + 0.8 * torch.randn_like(x1))


@star("make", [ByHand, Pictures, Follows], ByHand, Follows)
def test_noise_that_is_tied_to_the_data(kind, make, run):
    """The closed form is not that of such a training: each callback says so."""
    came = run(make(), KINDS[kind]())
    message = " ".join([*came.said, str(came.error or "")])
    if kind == "times" and make is not ByHand and came.error is None:
        return  # times need no closed form
    if make is ByHand and kind in ("mixing", "times"):
        assert "Found nothing that makes the targets" in message
    else:
        assert any(word in message for word in ("x_0", "x0", "pairs noise with data")), message
    if kind == "posterior":
        assert came.error is None
        assert "may not be that of" in message or "is not that of" in message
    else:
        assert came.error is not None
        assert came.unchanged


@BOTH
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_scheduler_that_samples_beside_what_trains(together, where, run, read_stages, tmp_path):
    """An inference scheduler of diffusers is no second path: what can be steered counts."""
    scheduler = SimpleNamespace(
        scale_noise=lambda: None, sigmas=torch.zeros(1), timesteps=torch.zeros(1)
    )

    class Both(Plain):
        def __init__(self):
            super().__init__(path=CosinePath())
            if where == "first":
                objective = self.loss
                del self.loss
                self.scheduler, self.loss = scheduler, objective
            else:
                self.scheduler = scheduler

    callbacks = TOGETHER[together]()
    came = run(Both(), callbacks)
    assert (came.error, came.said) == (None, [])
    for file in tmp_path.glob("*/stages.jsonl"):
        assert "LinearPath" not in file.read_text()
    if together == "watching":
        assert read_stages(tmp_path / "stagewise_logs")[0]["path"] == "CosinePath()"
    else:
        assert isinstance(callbacks[0].scheme.path, CosinePath)


@pytest.fixture
def compiled():
    """Makes a module that is compiled anew, here and in other files."""
    torch._dynamo.reset()
    yield lambda: torch.compile(Plain(), backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["errors", pytest.param("copies", marks=pytest.mark.slow)])
def test_a_compiled_module_is_refused_with_the_line_that_works(kind, run, compiled):
    """As no hook may be put inside."""
    _, came = cured(run, compiled, kind, loader, {}, but="call of the network was not")
    assert came.error is not None


SITUATIONS = {
    "encoding": (Audio, audio, {}),
    "scaling": (Scales, loader, {}),
    "manual": (Manual, loader, {}),
    "one class": (Plain, lambda: loader(X, 0 * Y), {}),
    "text": (Reads, texts, {}),
    "bf16-true": (Plain, loader, {"precision": "bf16-true"}),
    "compiled": (None, loader, {}),
}


@pytest.mark.parametrize("steer", ["", " mixing"])
@pytest.mark.parametrize(
    "situation",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "compiled" else [])
        for name in SITUATIONS
    ],
)
def test_what_each_says_is_said_once_and_all_go_on_together(situation, steer, run, compiled):
    make, data, options = SITUATIONS[situation]
    kinds = " ".join(WATCHING) + steer
    # What a compiled network is given only its user knows.
    options = options | {"but": "call of the network was not", "also": [StageTransitions]}
    last = cured(run, make or compiled, kinds, data, {}, **options)[1].last
    histories = [each.history for each in last.callbacks if hasattr(each, "history")]
    assert [len(history) > 0 for history in histories] == [True] * 3
    if not steer:
        plain = run((make or compiled)(), [], data(), **SITUATIONS[situation][2])
        assert torch.equal(last.weights, plain.weights)


@pytest.mark.slow
def test_a_module_that_is_compiled_trains_as_it_would(run, compiled):
    """`torch.compile(module)` as a whole: the oracle stays outside of what is traced."""

    def all_that_may():
        return [posterior(), StageScheme(target=Mix("boundary"), timesteps=StageAware(0.5))]

    came = run(compiled(), all_that_may(), max_steps=5)
    plain = run(Plain(), all_that_may(), max_steps=5)
    torch._dynamo.reset()
    assert came.error is None
    assert came.said
    for text in came.said:
        assert "the call of the network was not recognised" in text
        assert "StageScheme(timesteps=..., weight=...)" in text
    torch.testing.assert_close(came.weights, plain.weights, rtol=1e-5, atol=1e-6)
    for kind in ("mixing", "times"):
        part = run(Plain(), KINDS[kind](), max_steps=5)
        assert not torch.allclose(came.weights, part.weights, atol=1e-4), "the other steers too"


@pytest.mark.parametrize("kind", ["posterior", "mixing", "times"])
def test_pure_bf16_measures_what_float32_does(kind, run):
    """`precision="bf16-true"`: times, logits and boundaries keep their digits."""
    found = []
    for precision in ("32-true", "bf16-true"):
        (callback,) = KINDS[kind](bank=LatentBank(X, Y))
        came = run(Plain(), [callback], precision=precision)
        assert came.error is None
        found.append(
            callback.history[0]["midpoint"] if kind == "posterior" else callback.scheme.boundary
        )
    assert found[0] == found[1]


def test_a_path_that_is_said_in_other_words_is_the_same(run):
    """`path=LinearPath()` is said beside a module whose own it is; another one is named."""
    for path, said in ((LinearPath(), 0), (CosinePath(), 1)):
        came = run(Plain(), [posterior(path=path)])
        assert came.error is None
        assert len(came.said) == said


# -- the step changes what it was given -----------------------------------------------------------


class ScalesInPlace(Plain):
    """Scales its batch in place."""

    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.25)
        return super().training_step(batch, batch_idx)


class ScalesDetached(ScalesInPlace):
    """The same, unseen by the version of the tensor."""

    def training_step(self, batch, batch_idx):
        batch[0].data.mul_(0.25)
        return Plain.training_step(self, batch, batch_idx)


class ReplacesItem(Plain):
    """Puts something else under the name of what it was given."""

    def training_step(self, batch, batch_idx):
        batch["x"] = 3 * batch["x"]
        return self.loss(self.net, batch["x"], batch["y"])


class Encodes(ReplacesItem):
    """The same, with what a module makes of it."""

    def __init__(self):
        super().__init__()
        self.vae = nn.Linear(SIZE, SIZE).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        batch["x"] = self.vae(batch["x"])
        return self.loss(self.net, batch["x"], batch["y"])


class Standardises(Plain):
    """Subtracts and divides in place: no factor says how."""

    def training_step(self, batch, batch_idx):
        batch[0].sub_(2).div_(0.2)
        return super().training_step(batch, batch_idx)


IN_PLACE = {
    ScalesInPlace: "x / 4.0",
    ScalesDetached: "x / 4.0",
    ReplacesItem: "x * 3.0",
    Encodes: "module.vae(x)",
    Standardises: "(x - 2.0) / 0.2",
}


def named():
    return DataLoader(Rows(x=X, y=Y), 16)


@star("make", IN_PLACE)
def test_a_step_that_changes_its_batch_in_place(kind, make, run):
    """The batch of after the step is not what the bank was read from."""
    data = named if issubclass(make, ReplacesItem) else loader
    given, came = cured(run, make, kind, data, {})
    assert given == [f"encode=lambda x, module: {IN_PLACE[make]}"]
    assert came.unchanged == (came.error is not None) == (kind == "mixing")
    if make is Standardises:
        given = [StageRun(bank=LatentBank((X - 2) / 0.2, Y)), *KINDS[kind]()]
        came = run(make(), given, data())
        assert (came.error, came.said) == (None, [])


def test_batches_that_are_changed_in_place_are_measured_as_trained_on(run):
    """Also between the probes, with either way out: `read_batch` is asked before the step."""
    windows = []
    for given in (
        {"read_batch": lambda batch: (0.25 * batch[0], batch[1])},
        {"bank": LatentBank(X / 4, Y)},
    ):
        callback = errors()
        came = run(ScalesInPlace(), [StageRun(**given), callback], max_steps=6)
        assert came.error is None
        windows.append([e for e in callback.events if e["event"] == "training_window"])
    assert windows[0]
    assert windows[0] == windows[1]


def test_scaling_in_place_by_hand_is_noticed(run):
    """Without a maker the call of the network shows it."""

    class Hand(ByHand):
        def __init__(self):
            super().__init__()
            del self.coupling

        def training_step(self, batch, batch_idx):
            x1, y = batch
            x1.mul_(3)
            x0, t = torch.randn_like(x1), torch.rand(len(x1))
            xt = torch.lerp(x0, x1, t[:, None])
            return (self.net(xt, t, y) - (x1 - x0)).square().mean()

    came = run(Hand(), [posterior()])
    assert came.error is None
    assert "read_batch=lambda batch: (3 * batch[0], batch[1])" in " ".join(came.said)


# -- rows of the batch in another order or number -------------------------------------------------


class Matched(Plain):
    """torchcfm's matcher, which is given no labels; `step(module, x1, y)` is what differs."""

    def __init__(self, step=None):
        super().__init__()
        cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
        self.loss, self.matcher = None, cfm.ConditionalFlowMatcher(0.0)
        self.step = step or Matched.match

    def match(self, x1, y, x0=None):
        x0 = torch.randn_like(x1) if x0 is None else x0
        t, xt, u = self.matcher.sample_location_and_conditional_flow(x0, x1)
        return (self.net(xt, t, y) - u).square().mean()

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)


class Objective(Plain):
    """The library's own objective, in micro-batches."""

    def training_step(self, batch, batch_idx):
        parts = zip(*(tensor.split(8) for tensor in batch), strict=True)
        return sum(self.loss(self.net, *part) for part in parts)


def permute(module, x1, y):
    order = torch.randperm(len(x1))
    return module.match(x1[order], y[order])


def drop_labels(module, x1, y):
    """In place, for guidance without a classifier."""
    y[torch.rand(len(y)) < 0.3] = 3
    return module.match(x1, y)


def own_rows(module, x1, y):
    """Rows of the training set that the batch does not hold."""
    rows = torch.randint(len(X), (24,))
    return module.match(X[rows], Y[rows])


MANY = {
    "chunks": lambda module, x1, y: sum(map(module.match, x1.chunk(2), y.chunk(2))) / 2,
    "repeats": lambda module, x1, y: module.match(x1.repeat(3, 1), y.repeat(3)),
    "interleaves": lambda module, x1, y: module.match(
        *(v.repeat_interleave(2, 0) for v in (x1, y))
    ),
    "expands": lambda module, x1, y: module.match(
        x1.expand(2, *x1.shape).flatten(0, 1), y.expand(2, -1).flatten()
    ),
    "permutes": permute,
    "drops labels": drop_labels,
    "own": own_rows,
}
MAKES = {"objective": Objective} | {name: partial(Matched, step) for name, step in MANY.items()}


@pytest.mark.parametrize(
    ("together", "name"),
    [
        *(("watching", name) for name in MAKES),
        *(("steering", name) for name in ("chunks", "repeats", "drops labels", "own")),
    ],
)
def test_rows_in_another_order_or_number_are_the_same_training(together, name, run):
    """Micro-batches, several noises for a sample, a permutation: labels go along."""
    callbacks, make = TOGETHER[together](), MAKES[name]
    came = run(make(), callbacks, max_steps=3)
    assert (came.error, came.said) == (None, [])
    if together == "watching":
        assert torch.equal(came.weights, run(make(), [], max_steps=3).weights)
    for callback in callbacks:
        network = getattr(callback, "network", None)
        assert network is None or (network.conditional, network.conditions) == (True, ())
        assert getattr(callback, "wise", True)


def test_labels_of_samples_are_those_of_their_rows():
    """In any order and number; by place for what is no row; None where that cannot be."""
    module = Matched()
    look = FirstStep(module, find_target_makers(module), LinearPath(), find_sample)
    x1, y = X[:8], torch.randint(1000, (8,))
    look.begin([x1, y])
    look.watch()
    flipped = torch.where(torch.arange(8)[:, None] % 2 == 0, x1, x1.flip(1))
    order = torch.tensor([3, 1, 7, 7, 0])
    for samples, labels in (
        (x1, y),
        (x1.double(), y),
        (x1.bfloat16(), y),
        (x1[order], y[order]),
        (x1.flip(1), y),
        (flipped, y),
        (flipped[4:7], y[4:7]),
        (x1.reshape(8, 2, 4), y),
    ):
        assert look.labels_for(samples).tolist() == labels.tolist()
    for samples in (flipped.flip(0), flipped[order], x1[:4].flip(1), torch.randn(5, 3)):
        assert look.labels_for(samples) is None
    twins = torch.cat([x1[:4], x1[:4]])
    look.begin([twins, y])
    look.watch()
    assert look.labels_for(twins).tolist() == y.tolist()
    assert look.labels_for(twins[2:6]) is None, "two classes have this row"
    look.stop()


def flipped(x1):
    return torch.where(torch.rand(len(x1), 1) < 0.5, x1.flip(1), x1)


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (lambda module, x1, y: module.match(flipped(x1), y), 1),
        (lambda module, x1, y: module.match(x1 + 0.01 * torch.randn_like(x1), y), 1),
        (lambda module, x1, y: sum(map(module.match, flipped(x1).chunk(2), y.chunk(2))), 2),
    ],
    ids=["flips", "noise", "chunks of flips"],
)
def test_a_scheme_takes_labels_from_the_batch(step, parts, run, monkeypatch):
    """Where a matcher is given none, and samples are no rows."""
    asked, plain = [], FirstStep.labels_for

    def labels_for(self, x1):
        found = plain(self, x1)
        asked.append((found, self.batch[1]))
        return found

    monkeypatch.setattr(FirstStep, "labels_for", labels_for)
    callback = StageScheme(target=Mix("boundary"))
    came = run(Matched(step), [callback], max_steps=6)
    assert came.error is None
    assert all("no rows of the bank" in text for text in came.said)
    assert callback.scheme.labels_of is None, "let go of"
    assert callback.scheme.class_wise
    assert len(asked) >= 6
    for found, y in asked:
        assert any(torch.equal(found, part) for part in y.chunk(parts))


def test_a_scheme_without_an_oracle_is_told_of_the_callback():
    with pytest.raises(ValueError, match=r"StageScheme\(target=\.\.\.\) makes one of the training"):
        Scheme(class_wise=False, target=Mix("boundary"))


# -- another layout, swapped arguments ------------------------------------------------------------


LAYOUTS = {
    "transposes": lambda module, x1, y: module.match(x1.unflatten(1, (2, 4)).mT.flatten(1), y),
    "rolls": lambda module, x1, y: module.match(x1.roll(3, 1), y),
    "swaps": lambda module, x1, y: module.match(torch.randn_like(x1), y, x0=x1),
}


@star("layout", LAYOUTS, "transposes", "swaps")
def test_another_layout_and_swapped_arguments_have_their_reason(kind, layout, run):
    came = run(Matched(LAYOUTS[layout]), KINDS[kind]())
    message = " ".join([*came.said, str(came.error or "")])
    order = "in another order, the same in every sample"
    assert ("Expected noise first" if layout == "swaps" else order) in message
    assert "cannot be looked up" not in message
    assert came.unchanged == (kind not in ("posterior", "times"))


# -- what only some batches show ------------------------------------------------------------------


def coupled(x1, x0):
    """Noise in an order by its data within the batch."""
    scipy = pytest.importorskip("scipy.optimize")
    return x0[scipy.linear_sum_assignment(torch.cdist(x1, x0).square().numpy())[1]]


def swapped(x1, x0):
    """The noise of two neighbours is swapped where that brings it nearer."""
    pairs, data = x0.unflatten(0, (-1, 2)), x1.unflatten(0, (-1, 2))
    gain = (pairs.diff(dim=1) * data.diff(dim=1)).sum((1, 2), keepdim=True)
    return torch.where(gain < 0, pairs.flip(1), pairs).flatten(0, 1)


def moved(x1, x0):
    """Noise with an offset for each sample."""
    return x0 + 0.4 * torch.randn(len(x1), 1)


def centred(x1, x0):
    return x0 - x0.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("change", "size", "steps", "kinds"),
    [
        (coupled, 8, 8, ("posterior", "errors", "mixing")),
        (coupled, 4, 32, ("errors",)),
        (coupled, 2, 128, ("errors", "mixing")),
        (swapped, 4, 128, ("errors",)),
        (moved, 8, 32, ("mixing",)),
        (centred, 8, 32, ("errors",)),
    ],
)
def test_noise_that_few_samples_do_not_show(change, size, steps, kinds, run):
    """The first batches are looked at together."""

    def step(module, x1, y):
        return module.match(x1, y, x0=change(x1, torch.randn_like(x1)))

    data = DataLoader(TensorDataset(X, Y), size, shuffle=True)
    for kind in kinds:
        few = {"every_n_steps": 1000} if kind != "mixing" else {}
        came = run(Matched(step), KINDS[kind](**few), data, max_steps=steps + 1)
        message = " ".join([*came.said, str(came.error or "")])
        assert ("`x0`" in message) or "x_0 and x_1 are not independent" in message
        assert (came.error is None) == (kind == "posterior")
        assert message.count("The posterior that is measured is not that of") <= 1


@pytest.mark.parametrize("make", [Plain, Matched])
def test_plain_noise_is_not_accused_and_nothing_is_left_behind(make, run):
    module, callbacks = make(), [*KINDS["posterior"](every_n_steps=1000), *KINDS["mixing"]()]
    maker = module.loss or module.matcher
    before = dict(vars(maker))
    came = run(module, callbacks, max_steps=140)
    assert (came.error, came.said) == (None, [])
    assert dict(vars(maker)).keys() == before.keys()
