"""A stranger's path: the lines of the README, as they stand there, work at the first attempt."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits, make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stagewise
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme, VelocityErrorMonitor

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
WATCH, SAY, BOTH, LINES, _, LOOP = BLOCKS
*HEAD, FIRST, SECOND = BOTH.splitlines(keepends=True)
STEER, FEW = ("".join((*HEAD, last)) for last in (FIRST, SECOND))

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|log_every)"),
]


def line(start, block=LINES):
    """The line of a block that begins so."""
    return next(text for text in block.splitlines() if text.startswith(start))


class Posterior:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def sample(self):
        return self.mean + self.std * torch.randn_like(self.mean)


class VAE(nn.Module):
    """A small one, with the interface of diffusers' or what people write themselves."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.encoder = kind, nn.Linear(64, 8)

    def encode(self, x):
        mean, v = self.encoder(x.flatten(1)).chunk(2, 1)
        mean, v = 8 * mean, v - 6
        if self.kind == "tuple":
            return mean, v
        if self.kind == "mean":
            return mean
        return SimpleNamespace(latent_dist=Posterior(mean, (v / 2).exp()))


class Net(nn.Module):
    """What is given x_t, t, (B,), and the class."""

    def __init__(self, dim, classes):
        super().__init__()
        self.embed = nn.Embedding(classes, 16)
        self.body = nn.Sequential(nn.Linear(dim + 17, 64), nn.SiLU(), nn.Linear(64, dim))

    def forward(self, xt, t, y):
        return self.body(torch.cat([xt.flatten(1), t[:, None], self.embed(y)], 1)).view_as(xt)


class Stranger(L.LightningModule):
    """A hand-written step; `by_line` says whether the lines of the README are in it."""

    def __init__(self, kind, by_line):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.by_line, self.seen = kind, by_line, []
        if kind in ("tuple", "mean", "posterior"):
            self.vae = VAE(kind).requires_grad_(False)
        dim = {"moons": 2, "columns": 2, "pictures": 64, "scaled": 64, "flat": 64}.get(kind, 4)
        self.net = Net(dim, 10)
        if kind == "columns":
            self.net = nn.Sequential(nn.Linear(2 + 1 + 2, 32), nn.SiLU(), nn.Linear(32, 2))
        if by_line:
            exec(line("self.target"), {**vars(stagewise), "self": self})

    def latents(self, batch):
        """x_1 and the class, as the step makes them."""
        if self.kind in ("moons", "columns"):
            return batch
        x, y = batch["image"], batch["label"]
        if self.kind == "pictures":
            return x, y
        if self.kind == "scaled":
            return 2 * x - 1, y
        if self.kind == "flat":
            return x.flatten(1), y
        with torch.no_grad():
            z = self.vae.encode(x)
            if self.kind == "tuple":
                z = z[0] + (0.5 * z[1]).exp() * torch.randn_like(z[0])
            return 0.18215 * (z.latent_dist.sample() if self.kind == "posterior" else z), y

    def training_step(self, batch, batch_idx):
        x1, y = self.latents(batch)
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        s = t.reshape(-1, *[1] * (x1.ndim - 1))
        xt = s * x1 + (1 - s) * x0
        names = {"x1": x1, "x0": x0, "t": t, "xt": xt, "y": y, "self": self}
        loss = line("loss =")
        if self.kind == "columns":
            names["given"] = torch.cat([xt, s, nn.functional.one_hot(y, 2)], 1)
            loss = loss.replace("self.net(xt, t, y)", "self.net(given)")
        if self.by_line:
            exec(line("u, w ="), names)
            self.seen.append({**names, "self": None})
        else:
            names |= {"u": x1 - x0, "w": torch.ones(len(x1))}
        exec(loss, names)
        return names["loss"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def data(kind):
    if kind in ("moons", "columns"):
        x, y = make_moons(200, noise=0.05, random_state=0)
        return TensorDataset(torch.from_numpy(x).float(), torch.from_numpy(y))
    digits = load_digits()
    x = torch.from_numpy(digits.images[:200]).float()[:, None] / 16
    y = torch.from_numpy(digits.target[:200])
    return [{"image": a, "label": b} for a, b in zip(x, y, strict=True)]


@pytest.fixture
def run(tmp_path, caplog):
    """Executes a block that makes a trainer, and trains; gives module and trainer."""

    def run(block, kind, by_line, *more):
        class Lightning:
            Trainer = partial(
                L.Trainer,
                max_steps=2,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                default_root_dir=tmp_path,
            )

        names = {"L": Lightning, "PosteriorMonitor": PosteriorMonitor}  # imported a block before
        exec(block.replace("import lightning as L", ""), names)  # of two steps
        trainer = names["trainer"]
        trainer.callbacks += more
        module = Stranger(kind, by_line)
        torch.manual_seed(1)
        trainer.fit(module, DataLoader(data(kind), 64, shuffle=True))
        return module, trainer

    return run


KINDS = ["moons", "columns", "pictures", "scaled", "flat", "mean", "posterior", "tuple"]


@pytest.mark.parametrize("kind", ["moons", "columns", "pictures"])
def test_watching_a_module_as_it_is(run, kind):
    run(WATCH, kind, False)


def test_watching_a_module_that_encodes_by_what_is_said(run):
    said = eval(line("StageRun(encode=", SAY), {"StageRun": StageRun})
    _, trainer = run(WATCH, "posterior", False, said)
    monitor = next(c for c in trainer.callbacks if isinstance(c, PosteriorMonitor))
    assert monitor.history
    assert said.kept["bank"]
    assert said.kept["bank"] == monitor.kept["bank"]


@pytest.mark.parametrize("kind", ["columns", "flat", "posterior", "tuple"])
def test_watching_by_the_line(run, kind, caplog):
    plain, _ = run("trainer = L.Trainer()", kind, False)
    monitor = VelocityErrorMonitor(every_n_steps=2, queries=4, strata=4)
    watched, trainer = run(WATCH, kind, True, monitor)
    assert monitor.history
    pairs = zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_steering_by_the_line(run, kind, recwarn):
    module, trainer = run(STEER.replace('"boundary"', "1.0"), kind, True)
    oracle = next(c for c in trainer.callbacks if isinstance(c, StageScheme)).scheme.oracle
    bank = oracle.bank
    draws = kind in ("posterior", "tuple")
    for got in module.seen:
        near = got["t"] < 0.9
        for x1, xt, t, label, u in zip(
            *(got[key][near] for key in ("x1", "xt", "t", "y", "u")), strict=True
        ):
            held = torch.tensor(bank.labels_of(range(len(bank)))) == label
            rows = bank.take(torch.arange(len(bank)))[held].double()
            if draws:  # x_1 takes the place of the draw that it nearly is, or joins
                gap = (rows - x1.flatten().double()).norm(dim=1)
                beside = rows[gap > 0.01 * (x1.flatten() - bank.centre).norm()]
                rows = torch.cat([beside, x1.flatten()[None].double()])
            t = t.double()
            far = (xt.flatten().double() - t * rows).square().sum(1)
            mean = torch.softmax(-far / (2 * (1 - t) ** 2), 0) @ rows
            expected = (mean - xt.flatten().double()) / (1 - t)
            torch.testing.assert_close(u.flatten().double(), expected, rtol=1e-5, atol=2e-5)
    assert any("no rows of the bank" in str(w.message) for w in recwarn) == draws


def test_few_samples_need_their_line_in_a_hand_written_step(run):
    with pytest.raises(ValueError, match=r"x1 = self\.target\.smooth\(x1, t=t\)"):
        run(FEW, "moons", True)


def test_the_loop():
    for kind in ("moons", "pictures"):
        module = Stranger(kind, False)
        batch = next(iter(DataLoader(data(kind), 200)))
        latents, labels = module.latents(batch)
        names = {"torch": torch, "latents": latents, "labels": labels, "model": module.net}
        exec(LOOP, names)
        names["loss"].backward()
        assert all(p.grad is not None for p in module.net.parameters())
