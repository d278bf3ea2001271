"""What the answer of a network stands for, and at which times it is asked."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, LinearPath, Mix, Oracle, Scheme, StageTarget
from stagewise.adapters.conditions import shifted
from stagewise.callbacks import (
    Forecast,
    MemorizationMonitor,
    StageScheme,
    VelocityErrorMonitor,
    Watch,
)
from stagewise.conventions import ddpm
from stagewise.schemes.conditions import check_network

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|log_every)"),
]

DRAWS = torch.Generator().manual_seed(5)
X = 1.5 * torch.randn(96, 3, 2, 2, generator=DRAWS)
FEW = {"every_n_steps": 10, "strata": 4, "queries": 16}
BANK = LatentBank(X)


def column(t):
    return t.reshape(-1, 1, 1, 1)


class Ideal(nn.Module):
    """Predicts of the oracle's mean of x_1, times its one weight, 1."""

    def __init__(self, answer, path=None):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.ones(())), answer
        self.oracle = Oracle(BANK, path or LinearPath())
        self.asked = []

    def forward(self, xt, t):
        with torch.no_grad():
            self.asked.append((xt, t))
            mean = self.oracle.posterior(xt, self.times(t)).mean
            data, noise = mean, (xt - column(t) * mean) / (1 - column(t)).clamp_min(1e-6)
            found = self.answer(data, noise)
        return [x * self.weight for x in found] if isinstance(found, list) else found * self.weight

    def times(self, t):
        return t


class Step(pl.LightningModule):
    """Makes a velocity of the answer, and an error of that."""

    def __init__(self, answer, made, error=lambda v, u: (v - u).square()):
        super().__init__()
        self.net, self.target = Ideal(answer), StageTarget()
        self.made, self.error = made, error

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0])

    def loss(self, x1):
        x0, t = torch.randn_like(x1), 0.98 * torch.rand(len(x1))
        xt = column(t) * x1 + (1 - column(t)) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        v = self.made(self.net(xt, t), xt, column(t))
        return (column(w) * self.error(v, u)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


STEPS = {
    "velocity": (lambda x1, x0: x1 - x0, lambda f, xt, t: f),
    "data": (lambda x1, x0: x1, lambda f, xt, t: (f - xt) / (1 - t)),
    "clamped data": (lambda x1, x0: x1, lambda f, xt, t: (f - xt) / (1 - t).clamp_min(0.05)),
    "noise": (lambda x1, x0: x0, lambda f, xt, t: (xt - f) / t.clamp_min(1e-3)),
    "sign": (lambda x1, x0: x0 - x1, lambda f, xt, t: -f),
    "second": (lambda x1, x0: [x1, x1 - x0], lambda f, xt, t: f[1]),
    "one of that shape": (lambda x1, x0: [x1.mean((2, 3)), x1 - x0], lambda f, xt, t: f[1]),
    "second, data": (lambda x1, x0: [x0, x1], lambda f, xt, t: (f[1] - xt) / (1 - t)),
}
WEIGHTS = torch.linspace(0.1, 3, 12).view(3, 2, 2)
ERRORS = {
    "squares": lambda v, u: (v - u).square(),
    "absolute": lambda v, u: (v - u).abs(),
    "huber": lambda v, u: nn.functional.smooth_l1_loss(v, u, reduction="none", beta=0.3),
    "weighed": lambda v, u: WEIGHTS * (v - u).square(),
    "masked": lambda v, u: (WEIGHTS > 1) * (v - u).square(),
}


def train(module, *callbacks, steps=2):
    torch.manual_seed(7)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "max_steps": steps, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(TensorDataset(X), 32))
    return callbacks


def errors(monitor):
    """Oracle error of an ideal model over its conditional error, at the last probe."""
    train = monitor.history[-1]["train"]
    return sum(train["oracle"]) / sum(train["conditional"])


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", STEPS)
def test_the_gradient_says_what_the_answer_of_a_network_is(step, error):
    if error not in ("squares", "absolute") and step not in ("velocity", "data"):
        pytest.skip("one step for each of the other errors")
    (monitor,) = train(Step(*STEPS[step], ERRORS[error]), VelocityErrorMonitor(**FEW))
    assert errors(monitor) < 1e-6


@pytest.mark.parametrize("step", ["velocity", "data", "second, data"])
def test_what_the_first_batches_spent_is_read_so_too(step):
    module, losses = Step(*STEPS[step]), []
    module.error = lambda v, u: losses.append((v - u).square().mean().item()) or (v - u).square()
    (monitor,) = train(module, VelocityErrorMonitor(**FEW), steps=2)
    window = [event for event in monitor.events if event["event"] == "training_window"][0]
    loss, draws = (torch.tensor(window[key]).nan_to_num() for key in ("loss", "draws"))
    assert float((loss * draws).sum()) == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("step", ["velocity", "data", "sign"])
def test_mixed_targets_do_not_hide_it(step):
    callbacks = VelocityErrorMonitor(**FEW), StageScheme(target=Mix())
    assert errors(train(Step(*STEPS[step]), *callbacks)[0]) < 1e-6


def test_a_loop_of_ones_own_is_read_so_too():
    module = Step(*STEPS["data"])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    monitor = VelocityErrorMonitor(**FEW)
    with Watch(module, DataLoader(TensorDataset(X), 32), monitor, steps=2) as watch:
        for step, batch in enumerate(X.split(32)[:2]):
            watch.step(step, batch)
            module.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert errors(monitor) < 1e-6


def test_what_contradicts_every_prediction_is_said_with_a_line():
    step = Step(lambda x1, x0: x1.flip(2) - x0, lambda f, xt, t: f.flip(2))
    with pytest.warns(UserWarning, match=r"gradient of the loss\s+contradicts.*velocity=lambda"):
        train(step, VelocityErrorMonitor(**FEW))


def test_a_small_further_term_of_the_loss_is_no_contradiction(recwarn):
    step = Step(*STEPS["velocity"], lambda v, u: (v - u).square() + 0.02 * v.abs())
    (monitor,) = train(step, VelocityErrorMonitor(**FEW))
    assert errors(monitor) < 1e-6
    assert not [one for one in recwarn if "contradicts" in str(one.message)]


SIGMAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


class Steps(Step):
    """DDPM, whose network knows whole steps only and says which noise it is shown."""

    def __init__(self):
        super().__init__(*STEPS["velocity"])
        self.target = StageTarget(convention=ddpm(SIGMAS))
        self.net = Ideal(None, ddpm(SIGMAS).path)
        self.net.answer = lambda x1, x0: x0
        self.net.forward = self.noise

    def noise(self, xt, k):
        self.net.asked.append((xt, k))
        a, s = SIGMAS[k].sqrt(), (1 - SIGMAS[k]).sqrt()
        mean = self.net.oracle.posterior(xt, 1 - k / 999).mean
        return (xt - column(a) * mean) / column(s) * self.net.weight

    def loss(self, x1):
        x0, k = torch.randn_like(x1), torch.randint(1000, (len(x1),))
        xt = column(SIGMAS[k].sqrt()) * x1 + column((1 - SIGMAS[k]).sqrt()) * x0
        u, w = self.target(x0, xt=xt, t=k, x1=x1)
        return (column(w) * (self.net(xt, k) - u).square()).mean()


@pytest.mark.parametrize(
    "monitor",
    [
        lambda: VelocityErrorMonitor(**FEW),
        lambda: MemorizationMonitor(samples=4, steps=7, every_n_steps=10, held_out=X[:4] + 0.1),
        lambda: Forecast(every_n_steps=2),
    ],
)
def test_a_network_that_counts_steps_is_shown_samples_of_whole_ones(monitor, monkeypatch):
    asked, to_t = [], type(ddpm(SIGMAS)).from_t

    def from_t(self, t):
        asked.append(to_t(self, t))
        return asked[-1]

    monitor = monitor()
    module = Steps()
    monkeypatch.setattr(type(ddpm(SIGMAS)), "from_t", from_t)
    train(module, monitor)
    assert asked
    assert all(torch.equal(steps, steps.round()) for steps in asked)
    if isinstance(monitor, VelocityErrorMonitor):
        assert errors(monitor) < 1e-5


def test_whole_steps_of_a_linear_path_are_kept_to_as_well():
    class Whole(Step):
        def loss(self, x1):
            x0, k = torch.randn_like(x1), torch.randint(1, 200, (len(x1),))
            t = k / 200
            xt = column(t) * x1 + (1 - column(t)) * x0
            u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
            return (column(w) * (self.net(xt, k) - u).square()).mean()

    module = Whole(*STEPS["velocity"])
    module.net.forward = lambda xt, k: Ideal.forward(module.net, xt, k / 200)
    (monitor,) = train(module, VelocityErrorMonitor(**FEW))
    assert errors(monitor) < 1e-8


class Fills(Step):
    """Has an image beside x_t on the channels."""

    def __init__(self, first):
        super().__init__(*STEPS["velocity"])
        self.first, self.net = first, nn.Conv2d(5, 3, 1)
        self.net.forward = lambda x, t: nn.Conv2d.forward(self.net, x)

    def loss(self, x1):
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        xt = column(t) * x1 + (1 - column(t)) * x0
        u, _ = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        parts = [xt, x1[:, :2]] if self.first else [x1[:, :2], xt]
        return (self.net(torch.cat(parts, 1), t) - u).square().mean()


@pytest.mark.parametrize("first", [True, False])
def test_an_image_beside_x_t_on_the_channels_is_a_condition(first):
    with pytest.raises(ValueError, match=r"also given .*: 2 channels beside those of x_t"):
        train(Fills(first), StageScheme(target=Mix()))
    train(Fills(first), StageScheme(target=Mix(), class_wise=False))


def test_a_convention_that_runs_the_other_way_is_named():
    module = Step(*STEPS["velocity"])
    del module.target
    module.target = lambda u, xt, t, x1: (u, torch.ones(len(x1)))
    with pytest.raises(ValueError, match=r'runs the other way .*convention="sit"'):
        train(module, VelocityErrorMonitor(**FEW, convention="pi0"))
    (monitor,) = train(module, VelocityErrorMonitor(**FEW, convention="sit"))
    assert errors(monitor) < 1e-6


def test_a_model_that_answers_nan_is_named_at_the_end(caplog):
    step = Step(lambda x1, x0: x1 * torch.nan, lambda f, xt, t: f)
    train(step, VelocityErrorMonitor(**FEW))
    assert "the model's answers are not finite" in caplog.text
    assert "0.0 standard errors" not in caplog.text


def test_steps_out_of_range_are_refused_in_the_units_of_the_step():
    target = StageTarget(convention=ddpm(SIGMAS))
    target.scheme = Scheme(Oracle(BANK, ddpm(SIGMAS).path), target=Mix())
    target._fits = True  # a later batch
    k = torch.randint(1000, 1990, (8,))
    with pytest.raises(ValueError, match=r"in \[0, 999\] with t = 999 noise.*from 1\d\d\d to"):
        target(X[:8], xt=X[:8], t=k, x1=X[:8])


def test_another_schedule_is_said_to_be_that():
    other = torch.cumprod(1 - torch.linspace(1e-3, 0.01, 1000), 0)
    module = Steps()
    module.target = StageTarget(convention=ddpm(other))
    with pytest.raises(ValueError, match="given schedule, DDPMPath.* is not that of x_t"):
        train(module, StageScheme(target=Mix()))


def test_a_scheduler_that_samples_is_named_without_its_configuration():
    class EulerDiscreteScheduler:
        config, add_noise, sigmas = {"prediction_type": "epsilon"}, None, SIGMAS

        def __repr__(self):
            return "a long configuration"

    with pytest.raises(TypeError, match=r"DDPMScheduler\.from_config") as error:
        StageTarget(convention=EulerDiscreteScheduler())
    assert "EulerDiscreteScheduler" in str(error.value)
    assert "a long" not in str(error.value)


@pytest.mark.parametrize("labels", [None, torch.arange(96) % 3])
def test_class_wise_false_is_not_offered_for_classes(labels):
    scheme = Scheme(Oracle(LatentBank(X, labels)), target=Mix())
    warning = check_network([scheme], (), None)
    assert "was not recognised" in warning
    assert ("class_wise=False" in warning) == (labels is None)


@pytest.mark.parametrize(
    ("number", "said"),
    [(lambda y: y + 1, "batch[1] + 1"), (lambda y: (2 * y) % 3, "the_number_of(batch[1])")],
)
def test_labels_under_other_numbers_are_named_with_the_line(number, said):
    y = torch.arange(12) % 3
    assert said in shifted(number(y), y)
    assert shifted(y // 2, y) == ""
    assert shifted(torch.zeros_like(y), y) == ""
    assert shifted(number(y).float(), y) == ""
