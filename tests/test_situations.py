"""Every callback in situations of real trainers: right, or refused with a line that works.

What a message tells the user to write is pasted into the same situation, which must then run.
"""

import functools
import itertools
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stagewise import Mix, StageAware
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
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated)"),
]

X = torch.randn(96, 2, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(96, 5, 7, generator=torch.Generator().manual_seed(2))
Y = torch.arange(96) % 4
FEW = {"strata": 4, "queries": 6}
KINDS = {
    "posterior": lambda **options: PosteriorMonitor(**FEW, **options),
    "errors": lambda **options: VelocityErrorMonitor(**FEW, **options),
    "copies": lambda **options: MemorizationMonitor(samples=4, steps=4, **options),
    "mixing": lambda **options: StageScheme(target=Mix("boundary"), **options),
    "times": lambda **options: StageScheme(timesteps=StageAware(0.5), **options),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(34, 32)

    def forward(self, x, t, y=None):
        y = 0 * t if y is None else y
        columns = torch.stack([t, y.to(t)], 1).to(x)
        return self.f(torch.cat([x.flatten(1), columns], 1)).view_as(x)


class Plain(pl.LightningModule):
    """What trains on `(x, y)` as they come."""

    def __init__(self, **loss):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = Net(), FlowMatchingLoss(**loss)

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class Encoding(Plain):
    """Encodes pictures in its step, as latent diffusion does."""

    def __init__(self):
        super().__init__()
        self.vae = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Unflatten(1, (2, 4, 4)))
        self.vae.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            x1 = self.vae(batch[0])
        return self.loss(self.net, x1, batch[1])


class Scaling(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net, 0.2 * batch[0], batch[1])


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(self.net, *batch).backward()
        optimizer.step()


class Texts(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, i):
        return {"latents": X[i], "text": TEXT[i]}


class Beside(Plain):
    """Is given a condition in the channels beside x_t."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(4, 2, 1)

    def training_step(self, batch, batch_idx):
        other = batch[0].flip(-1)
        return self.loss(lambda xt, t, y: self.net(torch.cat([xt, other], 1)), *batch)


class TextNet(Net):
    def __init__(self):
        super().__init__()
        self.read = nn.Linear(7, 32)

    def forward(self, x, t, text):
        return super().forward(x, t) + self.read(text).mean(1).view_as(x)


class TextConditioned(Plain):
    def __init__(self):
        super().__init__()
        self.net = TextNet()

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch["latents"], batch["text"])


def pairs(x=X, y=Y):
    return DataLoader(TensorDataset(x, y), 16, shuffle=True)


SITUATIONS = {
    "encoding": (Encoding, lambda: pairs(IMAGES), {}),
    "scaling": (Scaling, pairs, {}),
    "manual": (Manual, pairs, {}),
    "one class": (Plain, lambda: pairs(y=0 * Y), {}),
    "text": (TextConditioned, lambda: DataLoader(Texts(), 16, shuffle=True), {}),
    "beside": (Beside, pairs, {}),
    "bf16-true": (Plain, pairs, {"precision": "bf16-true"}),
    "compiled": (lambda: torch.compile(Plain(), backend="eager"), pairs, {}),
}


class Outcome:
    """What a run came to: its callbacks, warnings and error."""

    def __init__(self, module, loader, callbacks, folder, **options):
        self.callbacks, self.module = callbacks, module
        self.before = {key: value.clone() for key, value in module.state_dict().items()}
        pl.seed_everything(3, verbose=False)
        trainer = pl.Trainer(
            callbacks=callbacks,
            default_root_dir=folder,
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": 3,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            }
            | options,
        )
        self.error = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.fit(module, loader)
            except (ValueError, RuntimeError) as error:
                self.error = error
        ours = ("stagewise", "bank", "Monitor", "measure", "network", "Scheme", "oracle", "batches")
        texts = [str(w.message) for w in caught]
        self.said = [text for text in texts if any(word in text for word in ours)]
        self.weights = torch.cat([p.detach().flatten().float() for p in module.parameters()])

    @property
    def unchanged(self):
        return all(torch.equal(v, self.before[k]) for k, v in self.module.state_dict().items())


@pytest.fixture(autouse=True)
def forgotten():
    """What was compiled is compiled anew, here and in other files."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run(tmp_path):
    """`run(situation, *callbacks)`: what it comes to."""

    def run(situation, *callbacks, **changes):
        make, load, options = SITUATIONS[situation]
        return Outcome(make(), load(), list(callbacks), tmp_path, **(options | changes))

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """`plain(situation)`: what it comes to without callbacks, trained once."""

    @functools.cache
    def run(situation):
        make, load, options = SITUATIONS[situation]
        return Outcome(make(), load(), [], tmp_path_factory.mktemp("plain"), **options)

    return run


def argument(message):
    """The first argument that a message tells the user to give, as it is written there."""
    for begin in (
        "encode=lambda",
        "read_batch=lambda",
        "class_wise=False",
        "velocity=lambda",
        "bank=LatentBank(",
    ):
        at = message.find(begin)
        if at < 0:
            continue
        depth = 0
        for end in range(at, len(message) + 1):
            rest = message[end : end + 2]
            depth += (rest[:1] == "(") - (rest[:1] == ")")
            if depth < 0 or not rest or (depth == 0 and rest in (". ", "; ", ", ", ".", ";")):
                # A comma ends an argument, but not those of a lambda before its colon.
                if rest == ", " and "lambda" in message[at:end] and ":" not in message[at:end]:
                    continue
                return message[at:end]
    raise AssertionError(f"no line to paste in: {message}")


def pasted(message, kind, module):
    """The callbacks with what a message says, said once for the run."""
    line = f"StageRun({argument(message)})"
    return [eval(line, {**globals(), "module": module}), KINDS[kind]()]


# In the others all goes well with each, or test_cases.py has the like.
ALONE = [
    *itertools.product(("scaling", "text", "beside"), KINDS),
    *(("compiled", "errors"), ("compiled", "copies")),
]


@pytest.mark.parametrize(("situation", "kind"), ALONE, ids=lambda value: value)
def test_alone(run, plain, situation, kind, tmp_path):
    """Refused before a weight has changed, warned, or right; and the line of a message works."""
    outcome = run(situation, KINDS[kind]())
    assert plain(situation).error is None
    if outcome.error is not None:
        assert outcome.unchanged, "refused too late"
        message = str(outcome.error)
    else:
        if kind in ("posterior", "errors", "copies"):
            assert torch.equal(outcome.weights, plain(situation).weights)
        message = " ".join(outcome.said)
    expected = EXPECTED.get((situation, kind), "fine")
    came = "refused" if outcome.error is not None else "said" if outcome.said else "fine"
    assert came == expected, message or outcome.said
    if came == "fine" or (situation == "beside" and kind in ("errors", "copies")):
        return  # how to ask that network only its user knows
    if "the call of the network was not recognised" in message:  # nor what it is given
        assert "StageScheme(timesteps=..., weight=...)" in message
        return
    make, load, options = SITUATIONS[situation]
    module = make()
    callbacks = pasted(message, kind, module)
    again = Outcome(module, load(), callbacks, tmp_path, **options)
    assert again.error is None, again.error
    assert again.said == []


EXPECTED = {
    ("scaling", "posterior"): "said",
    ("scaling", "errors"): "said",
    ("scaling", "copies"): "said",
    ("scaling", "mixing"): "refused",
    ("scaling", "times"): "said",
    ("text", "posterior"): "said",
    ("text", "errors"): "refused",
    ("text", "copies"): "refused",
    ("text", "mixing"): "refused",
    ("beside", "errors"): "refused",
    ("beside", "copies"): "refused",
    ("beside", "mixing"): "said",
    ("compiled", "errors"): "refused",
    ("compiled", "copies"): "refused",
}


TOGETHER = [
    # Each alone is tried above.
    pytest.param(name, marks=[pytest.mark.slow] if name == "compiled" else [])
    for name in SITUATIONS
    if name != "beside"
]


@pytest.mark.parametrize("situation", TOGETHER)
def test_all_together(plain, situation, tmp_path):
    """What the messages say is said once, and all callbacks go on together."""
    make, load, options = SITUATIONS[situation]
    watch = [KINDS[kind] for kind in ("posterior", "errors", "copies")]
    for steer in ([], [KINDS["mixing"]]):
        words = {}
        for _ in range(3):
            module = make()
            said = {key: eval(text, {**globals(), "module": module}) for key, text in words.items()}
            callbacks = [StageRun(**said), *(each() for each in watch + steer), StageTransitions()]
            outcome = Outcome(module, load(), callbacks, tmp_path, **options)
            # What that network is given only its user knows.
            said = [one for one in outcome.said if "call of the network was not" not in one]
            if outcome.error is None and not said:
                break
            assert outcome.error is None or outcome.unchanged, "refused too late"
            message = str(outcome.error) if outcome.error else " ".join(outcome.said)
            key, _, text = argument(message).partition("=")
            words[key] = text
        assert outcome.error is None
        assert said == []
        assert [len(callback.history) > 0 for callback in callbacks[1:4]] == [True] * 3
        if not steer:
            assert torch.equal(outcome.weights, plain(situation).weights)
