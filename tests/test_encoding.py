"""What a training step does with x_1 before it trains on it: found, written down, repeated."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, Mix, Scheme, Smoothing, StageTarget
from stagewise.adapters.encoding import encoder_call, origin_of
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|log_every)"),
]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(12, 10)
        self.layer.bias.data[5:] -= 6

    def encode(self, x, return_dict=True):
        mean = 5 * self.layer(x.flatten(1))
        return {"mean": mean} if return_dict else (mean[:, :5], mean[:, 5:] + 24)

    def forward(self, x):
        return torch.distributions.Normal(5 * self.layer(x.flatten(1)), 0.05)


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.models = nn.ModuleList([Encoder()])


X = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(4))
WAYS = {
    "x * 0.18215": (lambda x, e: x * 0.18215, 0),
    "x / 127.5 - 1.0": (lambda x, e: x / 127.5 - 1, 0),
    "(x - 0.3) / 0.7": (lambda x, e: (x - 0.3) / 0.7, 0),
    "x.reshape(-1, 12)": (lambda x, e: x.flatten(1), 0),
    "module.models[0].encode(x, return_dict=False)[1] * 3.0": (
        lambda x, e: 3 * e.encode(x, return_dict=False)[1],
        0,
    ),
    "module.models[0](x * 2.0 - 1.0).mean / 0.13": (lambda x, e: e(2 * x - 1).mean / 0.13, 0),
    "module.models[0](x).sample() * 0.5": (lambda x, e: 0.5 * e(x).sample(), 1),
    "(lambda mean, v, *_: mean + (v / 2).exp() * torch.randn_like(mean))"
    "(*module.models[0].encode(x, return_dict=False)) * 2.0": (
        lambda x, e: 2 * draw(*e.encode(x, return_dict=False)),
        1,
    ),
    "(lambda mean, v, *_: mean + (v / 2).exp() * torch.randn_like(mean))"
    "(*module.models[0].layer(x.reshape(-1, 12)).chunk(2, 1))": (
        lambda x, e: draw(*e.layer(x.flatten(1)).chunk(2, 1)),
        1,
    ),
}


def draw(mean, v):
    return mean + torch.randn_like(mean) * (v / 2).exp()


@pytest.mark.parametrize("text", WAYS)
def test_what_was_done_is_found_written_and_done_again(text):
    root, calls = Root(), []
    encoder = root.models[0]

    def note(name, args, kwargs, output):
        call = encoder_call(X, name, args, kwargs, output)
        calls.extend([] if call is None else [call])

    encoder.register_forward_hook(lambda _, a, k, o: note("models.0", a, k, o), with_kwargs=True)
    encoder.layer.register_forward_hook(lambda _, a, o: note("models.0.layer", a, {}, o))
    plain = encoder.encode

    def encode(*args, **kwargs):
        output = plain(*args, **kwargs)
        note("models.0.encode", args, kwargs, output)
        return output

    encoder.encode = encode
    make, draws = WAYS[text]
    torch.manual_seed(1)
    x1 = make(X, encoder)
    found = origin_of(x1, X, calls)
    assert found.draws == bool(draws)
    assert found.line == f"encode=lambda x, module: {text}"
    said = eval(found.line.removeprefix("encode="), {"torch": torch})
    for way in (found, said):
        torch.manual_seed(1)
        again = way(X, root)
        assert torch.equal(again, x1) if not draws else torch.allclose(again, x1, atol=1e-5)
    assert draws or origin_of(x1[:16], X, calls) == found  # the first part of a batch
    assert origin_of(x1.roll(1, 0), X, calls) is None
    assert origin_of(torch.randn_like(x1), X, calls) is None


class Normalised(pl.LightningModule):
    """Encodes by a layer with running statistics and dropout that train along; draws in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.vae = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.net, self.target, self.modes = nn.Linear(5, 4), StageTarget(), []
        self.vae.register_forward_hook(lambda vae, *_: self.modes.append(vae.training))

    def training_step(self, batch, batch_idx):
        x1 = self.vae(batch[0]).detach()
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (self.net(torch.cat([xt, t], 1)) - u).square().mean(1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.fixture
def fit(make_trainer):
    def run(module, *callbacks, steps=2, batch=16, **options):
        trainer = make_trainer(*callbacks, max_steps=steps)
        torch.manual_seed(5)
        trainer.fit(module, DataLoader(TensorDataset(X), batch, shuffle=True), **options)
        return trainer

    return run


SAID = [
    {"encode": lambda x, module: module.vae(x)},
    {"read_batch": lambda batch, module: (module.vae(batch[0]) + 0 * torch.randn(1), None)},
]


@pytest.mark.parametrize("said", SAID)
def test_what_is_said_of_the_module_is_asked_without_a_trace(fit, said):
    plain, watched = Normalised(), Normalised()
    fit(plain)
    with pytest.warns(UserWarning, match="not on what was read"):  # dropout trains, and is off here
        fit(watched, StageRun(**said), PosteriorMonitor(strata=4, queries=8))
    pairs = zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert watched.modes.count(True) == 2
    assert watched.modes.count(False) >= 4


def test_a_resumed_run_reads_through_the_same_encoder_at_once(fit, tmp_path, recwarn):
    class Frozen(Normalised):
        def training_step(self, batch, batch_idx):
            self.vae.eval()
            return super().training_step(batch, batch_idx)

    monitor, again = PosteriorMonitor(every_n_steps=1), PosteriorMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="Training encodes x_1, batch"):
        fit(Frozen(), monitor).save_checkpoint(tmp_path / "half.ckpt")
    with torch.no_grad():
        latents = Frozen().eval().vae(X)
    assert monitor.kept["bank"] == LatentBank(latents).fingerprint
    module = Frozen()
    fit(module, again, steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert [entry["step"] for entry in again.history] == [0, 1, 2, 3]
    assert not any("stagewise" in str(w.message) or "bank" in str(w.message) for w in recwarn)


class Smooths(Normalised):
    """Smooths what a frozen layer gives, which draws or does not."""

    def __init__(self, make):
        super().__init__()
        self.vae, self.make = self.vae[:2].requires_grad_(False), make

    def training_step(self, batch, batch_idx):
        t, x1 = torch.rand(len(batch[0]), 1), self.make(self.vae(batch[0]))
        x0, x1 = torch.randn_like(x1), self.target.smooth(x1, t=t)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (self.net(torch.cat([xt, t], 1)) - u).square().mean(1)).mean()

    def on_before_backward(self, loss):
        pytest.fail("trained")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda mean: 0.5 * mean, "encode=lambda x, module: module.vae(x) * 0.5, or give"),
        (lambda mean: mean + torch.randn_like(mean), "encode=lambda x, module: ..."),
    ],
)
@pytest.mark.parametrize(
    "scheme", [Scheme.two_stage, lambda oracle: Scheme(smoothing=Smoothing(oracle.bank))]
)
def test_smoothing_of_what_the_step_encodes_stops_with_the_line(fit, scheme, make, line):
    with pytest.raises(ValueError, match="^Training is not on what was read") as refused:
        fit(Smooths(make), StageScheme(scheme))
    assert line in str(refused.value)


class Rounds(Smooths):
    """Its encoder rounds otherwise in each batch size, as products of matrices do."""

    def __init__(self):
        super().__init__(self.rounded)
        self.calls = []

    @staticmethod
    def rounded(x):
        return x * (1 + 1e-6 * len(x))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        last, x1 = self.target.scheme.last, self.rounded(self.vae(batch[0]))
        self.calls.append((last.source, x1, last.inserted & (last.source < 0)))
        return loss

    on_before_backward = pl.LightningModule.on_before_backward


@pytest.mark.parametrize(
    "options", [{"scheme": Scheme.two_stage}, {"target": Mix(1.0)}], ids=["smooths", "mixes"]
)
def test_a_row_that_the_encoder_made_in_another_batch_is_that_row(fit, options, recwarn):
    module = Rounds()
    encode = StageRun(encode=lambda x, m: m.rounded(m.vae(x)))
    scheme = StageScheme(options.get("scheme"), target=options.get("target"))
    fit(module, encode, scheme, steps=4, batch=20)
    bank = scheme.scheme.oracle.bank
    exact = 0
    for source, x1, inserted in module.calls:
        assert not inserted.any()
        expected = torch.cdist(x1.double(), bank.take(torch.arange(len(bank)))).argmin(1)
        assert torch.equal(source, expected)
        exact += int((bank.find(x1) >= 0).sum())
    assert exact < sum(len(x1) for _, x1, _ in module.calls)
    assert not [m for m in (str(w.message) for w in recwarn) if "no rows" in m]


SCRIPT = """
from stagewise import StageTarget
from stagewise.callbacks import PosteriorMonitor


class Encodes(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.vae, self.net = torch.nn.Linear(6, 4).requires_grad_(False), torch.nn.Linear(5, 4)
        self.target = StageTarget()

    def training_step(self, batch, batch_idx):
        x1 = 0.18215 * self.vae(batch[0])
        t, x0 = torch.rand(len(x1), 1), torch.randn_like(x1)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (self.net(torch.cat([xt, t], 1)) - u).square().mean(1)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 1e-2)


monitor = PosteriorMonitor(strata=4, queries=8)
make_trainer(monitor, max_steps=2).fit(Encodes(), loader(samples(64), shuffle=True))
report({"bank": monitor.kept["bank"], "midpoint": monitor.history[0]["midpoint"]})
"""


@pytest.mark.slow
def test_on_two_ranks_the_same_bank_is_read(on_one_and_two_ranks, reports_of):
    found = reports_of(*on_one_and_two_ranks(SCRIPT))
    assert len({each["bank"] for each in found}) == 1
    assert found[1] == found[2]
    assert found[0]["midpoint"] == pytest.approx(found[1]["midpoint"])
