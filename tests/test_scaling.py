"""What a step does with the numbers of x_1 is found, and its targets are those of the oracle."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, Mix, Oracle, Scheme, StageTarget
from stagewise.adapters.encoding import Encoding
from stagewise.adapters.scaling import related
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme, VelocityErrorMonitor

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|log_every)"),
]

X = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(4))
MEAN, STD = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1.1, 0.9, 1.3])
_C = ".to(x).reshape(-1, 1, 1)"
WAYS = {
    "x * 0.18215": lambda x: x * 0.18215,
    f"(x - torch.tensor([0.1, -0.2, 0.3]){_C}) / torch.tensor([1.1, 0.9, 1.3]){_C}": lambda x: (
        (x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    ),
    f"x - torch.tensor([0.1, -0.2, 0.3]){_C}": lambda x: x - MEAN.view(3, 1, 1),
    "x * torch.tensor([2.0, 3.0]).to(x)": lambda x: x * torch.tensor([2.0, 3.0]),
    "x.clamp(-1.0, 1.0)": lambda x: x.clamp(-1, 1),
    "(x * 2.0 + 0.5).clamp(-0.5, 0.75)": lambda x: (x * 2 + 0.5).clamp(-0.5, 0.75),
    "x.clamp(-1.0, None)": lambda x: x.clamp_min(-1),
    "x.to(torch.bfloat16).to(torch.float32)": lambda x: x.bfloat16().float(),
    "x.to(torch.float16).to(torch.float32)": lambda x: x.half().float(),
    "(x.reshape(-1, 12) * 2.0 - 1.0).to(torch.bfloat16).to(torch.float32)": lambda x: (
        (x.flatten(1) * 2 - 1).bfloat16().float()
    ),
}


@pytest.mark.parametrize("text", WAYS)
def test_arithmetic_is_found_written_and_done_again(text):
    x1 = WAYS[text](X)
    steps = related(X, x1)
    assert steps is not None
    found = Encoding(steps)
    assert found.line == f"encode=lambda x, module: {text}"
    said = eval(found.line.removeprefix("encode="), {"torch": torch})
    for way in (found, said):
        assert torch.equal(way(X, None), x1)
    assert related(X, x1[:48]) == steps  # the first part of a batch
    assert related(X, x1.roll(1, 0)) is None
    assert related(X, x1 + 1e-2 * torch.randn_like(x1)) is None


class Makes(pl.LightningModule):
    """Trains on what is made of x_1; keeps what its target was asked and gave."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(3)
        self.make, self.target, self.seen = make, StageTarget(), []
        self.net = nn.Linear(X[0].numel() + 1, X[0].numel())

    def training_step(self, batch, batch_idx):
        x1 = self.make(batch[0])
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1, 1, 1)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        self.seen.append((xt, t.flatten(), u))
        v = self.net(torch.cat([xt.flatten(1), t.flatten(1)], 1)).view_as(u)
        return (w * (v - u).square().flatten(1).mean(1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def off(module, rows):
    """How far steered targets are from those over rows, in float64 and without the library."""
    rows, worst = rows.flatten(1).double(), 0.0
    for xt, t, u in module.seen:
        query, t = xt.flatten(1).double(), t.double()[:, None]
        logits = -(query[:, None] - t[:, :, None] * rows).square().sum(2) / (2 * (1 - t) ** 2)
        best = (logits.softmax(1) @ rows - query) / (1 - t)
        worst = max(worst, float((u.flatten(1) - best).norm() / best.norm()))
    return worst


@pytest.fixture
def fit(make_trainer):
    def run(module, *callbacks, steps=3, **options):
        trainer = make_trainer(*callbacks, max_steps=steps, **options)
        torch.manual_seed(5)
        trainer.fit(module, DataLoader(TensorDataset(X), 16, shuffle=True))
        return module

    return run


@pytest.mark.parametrize("text", [text for text in WAYS if ".reshape(-1, 12)" not in text])
def test_targets_are_those_over_what_is_trained_on(fit, text):
    module = Makes(WAYS[text])
    with pytest.warns(UserWarning, match="is read again"):
        fit(module, StageScheme(target=Mix(1.0)))
    assert off(module, WAYS[text](X)) < 1e-5


class Encodes(Makes):
    """A frozen encoder that autocast rounds, whatever the precision of the rest is."""

    def __init__(self, autocast):
        super().__init__(self.encode)
        self.vae, self.autocast = nn.Conv2d(3, 3, 2, padding="same").requires_grad_(False), autocast

    def encode(self, x):
        with torch.no_grad(), torch.autocast("cpu", enabled=self.autocast):
            return self.vae(x).float()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_bank_is_read_in_the_precision_in_which_the_step_encodes(fit, autocast, precision):
    module = Encodes(autocast)
    with pytest.warns(UserWarning, match="is read again") as said:
        fit(module, StageScheme(target=Mix(1.0)), precision=precision)
    rows = module.encode(X)
    assert off(module, rows) < 1e-5
    line = next(str(w.message) for w in said if "StageRun(encode=" in str(w.message))
    line = line.partition("StageRun(encode=")[2].removesuffix(").")
    again = eval(line, {"torch": torch})(X, module)
    assert torch.equal(again.float(), rows)


class Trains(Makes):
    """An encoder that is trained beside the network, and whose answer is detached."""

    def __init__(self, every=1):
        super().__init__(lambda x: self.vae(x).detach())
        self.vae, self.every = nn.Conv2d(3, 3, 1), every

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        on = self.global_step % self.every == self.every - 1
        return loss + self.vae(batch[0]).square().mean() if on else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


SAID = [
    {},
    {"encode": lambda x, module: module.vae(x)},
    {"read_batch": lambda batch, module: (module.vae(batch[0]), None)},
    {"bank": True},
]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("said", SAID)
def test_targets_end_once_the_encoder_of_x1_has_changed(fit, said, every):
    module = Trains(every)
    said = {**said, "bank": LatentBank(module.make(X))} if "bank" in said else said
    with pytest.raises(ValueError, match="goes stale. Freeze it"):
        fit(module, StageRun(**said), StageScheme(target=Mix(1.0)), steps=4)
    assert len(module.seen) == every
    module = Trains(every)
    with pytest.warns(UserWarning, match="goes stale. Freeze it") as warned:
        fit(module, StageRun(**said), PosteriorMonitor(strata=4, queries=8), steps=4)
    assert sum("goes stale" in str(w.message) for w in warned) == 1
    module = Trains(99)  # its weights are given to the optimizer, and never change
    fit(module, StageRun(**said), StageScheme(target=Mix(1.0)), steps=4)
    assert off(module, module.make(X)) < 1e-5


def rounded(x):
    """What is off by rounding in another way than a cast."""
    return x * (1 + 3e-3 * torch.sin(1e4 * x))


@pytest.mark.parametrize("rows", [64, 20_000])
def test_a_sample_that_is_a_row_but_for_rounding_stands_for_it(rows):
    x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(1))
    bank = LatentBank(x)
    assert bank.find_near(rounded(x[:64])).tolist() == list(range(64))
    assert bool((bank.find_near(torch.randn(64, 12)) == -1).all())
    x0, t, x1 = torch.randn(16, 12), torch.linspace(0.05, 0.95, 16), rounded(x[:16])
    scheme = Scheme(Oracle(bank), target=Mix(1.0))
    xt = scheme.path.interpolate(x0, x1, t)
    u, _ = scheme(x1 - x0, xt=xt, t=t, x1=x1)
    module = Makes(None)
    module.seen = [(xt, t, u)]
    assert off(module, rounded(x)) < 1e-2
    assert scheme.last.source.tolist() == list(range(16))


@pytest.mark.parametrize(
    "said",
    [{"bank": LatentBank(rounded(X))}, {"encode": lambda x, module: rounded(x)}],
    ids=["bank", "encode"],
)
def test_a_bank_of_other_rounding_is_that_of_training(fit, said, recwarn):
    module = Makes(lambda x: x * 1.0)
    fit(
        module,
        StageRun(**said),
        PosteriorMonitor(strata=4, queries=8),
        StageScheme(target=Mix(1.0)),
    )
    assert off(module, X) < 1e-2
    assert not [m for m in (str(w.message) for w in recwarn) if "no rows" in m or "not on" in m]


FAR = {
    "flip": lambda x: x.flip(3),
    "rotation": lambda x: torch.einsum("bchw,cd->bdhw", x, torch.linalg.qr(ROTATE)[0]),
    "centre": lambda x: x - x.mean((2, 3), keepdim=True),
    "tanh": lambda x: torch.tanh(x),
}
ROTATE = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("what", FAR)
def test_what_mixes_or_compares_stops_where_no_sample_is_near_a_row(fit, what):
    for callback in (StageScheme(target=Mix(1.0)), VelocityErrorMonitor(strata=4, queries=8)):
        with pytest.raises(ValueError, match="no sample is near a row, the nearest is") as refused:
            fit(Makes(FAR[what]), callback)
    with pytest.warns(UserWarning, match="Training is not on what was read"):
        fit(Makes(FAR[what]), PosteriorMonitor(strata=4, queries=8))
    if what == "flip":
        assert "read_batch=lambda batch: (batch[0].flip(3), None);" in str(refused.value)
        module = Makes(FAR[what])
        fit(module, StageScheme(target=Mix(1.0), read_batch=lambda batch: (batch[0].flip(3), None)))
        assert off(module, X.flip(3)) < 1e-5


@pytest.mark.parametrize(
    "augment",
    [
        lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3)),
        lambda x: x + 0.02 * torch.randn_like(x),
    ],
    ids=["flips", "noise"],
)
def test_what_augments_a_little_is_only_warned_of(fit, augment):
    with pytest.warns(UserWarning, match="Training is not on what was read"):
        fit(Makes(augment), PosteriorMonitor(strata=4, queries=8), StageScheme(target=Mix(1.0)))
