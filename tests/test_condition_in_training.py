"""A kernel on the condition in a trainer: where conditions are found, targets, what is said."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from stagewise import Condition, ConditionedOracle, LatentBank, Mix, Scheme
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme, VelocityErrorMonitor
from stagewise.engines import Exact
from stagewise.losses import FlowMatchingLoss

N, DIM, WIDTH = 96, 6, 2
DRAW = torch.Generator().manual_seed(2)
OBS = torch.randn(N, WIDTH, generator=DRAW)
X = torch.cat([OBS, OBS.flip(1), OBS**2], 1) + 0.3 * torch.randn(N, DIM, generator=DRAW)
KERNEL = Condition(bandwidth=0.5)
SAID = "Condition('gaussian', bandwidth=0.5)"


def rows(conditions):
    return [{"x": x, "obs": c} for x, c in zip(X, conditions, strict=True)]


class Policy(pl.LightningModule):
    """Actions given observations, dropped for guidance in some samples, or not given at all."""

    def __init__(self, given="obs", drop=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(DIM + 1 + WIDTH, DIM)
        self.loss = FlowMatchingLoss()
        self.given, self.drop, self.targets = given, drop, []

    def forward(self, xt, t, obs=None):
        obs = xt[:, :WIDTH] if obs is None else obs
        return self.net(torch.cat([xt, t[:, None], obs], 1))

    def training_step(self, batch, batch_idx):
        given = {}
        if self.given:
            kept = torch.rand(len(batch["obs"]), 1) >= self.drop
            obs = batch["obs"] * kept if self.given == "obs" else batch["obs"].cos()
            given = {"obs": obs}
        return self.loss(self, batch["x"], **given)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.fixture
def fit(make_trainer, make_loader):
    def run(*callbacks, module=None, data=None, **options):
        loader = torch.utils.data.DataLoader(data or rows(OBS), 16, shuffle=True)
        module = module or Policy()
        make_trainer(*callbacks, max_steps=4, **options).fit(module, loader)
        return module

    return run


def watched(calls):
    """A scheme whose calls are kept."""

    class Kept(Scheme):
        def __call__(self, y, **batch):
            target, weight = super().__call__(y, **batch)
            calls.append((y, batch, target))
            return target, weight

    return Kept


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_targets_are_those_of_the_conditions_in_the_batch(fit, drop, lightning_log, quick_figures):
    calls = []
    steer = StageScheme(lambda oracle: watched(calls)(oracle, target=Mix()), condition=KERNEL)
    fit(PosteriorMonitor(every_n_steps=2, queries=4), steer, module=Policy(drop=drop))
    assert len(calls) == 4
    for y, batch, target in calls:
        xt, t, x1 = batch["xt"].double(), batch["t"].double()[:, None], batch["x1"]
        row = (x1[:, None] == X).all(2).int().argmax(1)
        logits = -(xt[:, None] - t[:, :, None] * X.double()).square().sum(2) / (2 * (1 - t) ** 2)
        logits -= (OBS[row, None] - OBS).double().square().sum(2) / (2 * KERNEL.bandwidth**2)
        u = (logits.softmax(1) @ X.double() - xt) / (1 - t)
        assert ((target - u).norm(dim=1) / u.norm(dim=1)).max() < 1e-5
        assert (target - y).abs().max() > 1e-3
    assert SAID in steer.scheme.oracle.__repr__()
    lines = [r.getMessage() for r in lightning_log.records]
    for start in ("StageScheme: steers", "PosteriorMonitor: LatentBank", "PosteriorMonitor: bound"):
        assert any(line.startswith(start) and SAID in line for line in lines), (start, lines)


def test_events_state_the_kernel_and_nothing_trained_changes(
    fit, weights, read_stages, tmp_path, quick_figures
):
    plain = weights(fit())
    monitor = PosteriorMonitor(every_n_steps=2, queries=4, dirpath=tmp_path / "a")
    assert torch.equal(weights(fit(StageRun(condition=KERNEL), monitor)), plain)
    header, probes = read_stages(tmp_path / "a")
    assert SAID in header["condition"]
    assert len(probes) == 2
    assert all(SAID in probe["condition"] for probe in probes)
    # The same as with the bank and the oracle of one's own.
    bank = LatentBank(X, conditions=OBS)
    assert monitor.history[0]["midpoint"] < 0.9
    own = PosteriorMonitor(
        bank, condition=KERNEL, every_n_steps=2, queries=4, dirpath=tmp_path / "b"
    )
    fit(own)
    for one, other in zip(monitor.history, own.history, strict=True):
        assert one["top1"] == pytest.approx(other["top1"], abs=1e-9)


def test_refusal_by_default_with_a_line_that_works(fit, quick_figures):
    with pytest.raises(ValueError, match=r"condition=Condition\(bandwidth=\.\.\.\)") as refused:
        fit(StageScheme(target=Mix()))
    assert "class_wise=False" in str(refused.value)
    fit(StageScheme(target=Mix(), condition=Condition(bandwidth=0.5)))
    with pytest.warns(UserWarning, match=r"condition=Condition\(bandwidth=\.\.\.\)"):
        fit(PosteriorMonitor(every_n_steps=2, queries=4))


@pytest.mark.parametrize(
    ("module", "kernel", "said"),
    [
        (Policy(given=""), KERNEL, "given only x_t, t and classes"),
        (Policy(given="other"), KERNEL, r"by batch\['obs'\].*but the network is given"),
    ],
)
def test_a_network_that_is_given_something_else(fit, module, kernel, said):
    with pytest.warns(UserWarning, match=said):
        fit(StageScheme(target=Mix(), condition=kernel), module=module)


@pytest.mark.parametrize("same", [True, False])
def test_resuming_with_other_conditions_of_the_same_rows(fit, make_trainer, tmp_path, same):
    """Captions that were made anew, of the same pictures."""
    first, again = (PosteriorMonitor(every_n_steps=2, queries=4, figures=0) for _ in range(2))
    trainer = make_trainer(StageRun(condition=KERNEL), first, max_steps=4)
    trainer.fit(Policy(), torch.utils.data.DataLoader(rows(OBS), 16))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer = make_trainer(StageRun(condition=KERNEL), again, max_steps=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loader = torch.utils.data.DataLoader(rows(OBS if same else OBS.flip(0)), 16)
        trainer.fit(Policy(), loader, ckpt_path=tmp_path / "end.ckpt")
    assert any("not that of the checkpoint" in str(w.message) for w in said) == (not same)
    assert (again.history[0]["step"] < 4) == same


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|is deprecated|log_every)")
def test_resuming_with_another_bandwidth(make_trainer, tmp_path, quick_figures):
    def steer(bandwidth):
        return StageScheme(target=Mix("boundary"), condition=Condition(bandwidth=bandwidth))

    loader, first, again = torch.utils.data.DataLoader(rows(OBS), 16), steer(3.0), steer(0.1)
    trainer = make_trainer(first, max_steps=2)
    trainer.fit(Policy(), loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match=r"bandwidth=0.1\), and in the checkpoint by .*=3\)"):
        make_trainer(again, max_steps=4).fit(Policy(), loader, ckpt_path=tmp_path / "half.ckpt")
    fresh = steer(0.1)
    make_trainer(fresh, max_steps=2).fit(Policy(), loader)
    assert again.scheme.boundary == fresh.scheme.boundary < first.scheme.boundary


def test_a_stream_keeps_the_conditions_of_what_was_seen(fit, quick_figures, lightning_log):
    calls = []
    steer = StageScheme(lambda oracle: watched(calls)(oracle, target=Mix()), condition=KERNEL)
    fit(StageRun(reservoir=48), PosteriorMonitor(every_n_steps=2, queries=4), steer)
    seen = torch.cat([batch["x1"] for _, batch, _ in calls])
    for at, (_, batch, target) in enumerate(calls):
        held = seen[: 16 * (at + 1)][-48:]
        own, c = batch["x1"], OBS[(held[:, None] == X).all(2).int().argmax(1)]
        row = (own[:, None] == held).all(2).int().argmax(1)
        xt, t = batch["xt"].double(), batch["t"].double()[:, None]
        logits = -(xt[:, None] - t[..., None] * held.double()).square().sum(2) / (2 * (1 - t) ** 2)
        logits -= (c[row, None] - c).double().square().sum(2) / (2 * KERNEL.bandwidth**2)
        u = (logits.softmax(1) @ held.double() - xt) / (1 - t)
        assert ((target - u).norm(dim=1) / u.norm(dim=1)).max() < 1e-5
    with pytest.raises(ValueError, match="got both"):
        StageRun(bank=LatentBank(X), reservoir=48)


def test_captions_that_are_drawn_are_told_of_and_join_the_rows(fit, lightning_log):
    """The bank holds one caption of each picture, and training draws another."""
    given = torch.cat([OBS[:, None], OBS[:, None] + 1], 1)

    class Captions(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, at):
            return {"x": X[at], "obs": given[at, torch.randint(2, ()).item()]}

    bank = LatentBank(X, conditions=OBS)
    calls, steer = (
        [],
        StageScheme(lambda o: watched(calls)(o, target=Mix()), bank=bank, condition=KERNEL),
    )
    with pytest.warns(
        UserWarning, match=r"% of the samples in the first step are rows of the bank under"
    ):
        fit(steer, data=Captions())
    assert len(calls) == 4
    assert 0 < steer.scheme.last.inserted.sum() < 16


def test_the_log_names_the_condition_as_what_is_used(fit, lightning_log, quick_figures):
    fit(PosteriorMonitor(every_n_steps=2, queries=4), StageScheme(target=Mix(), condition=KERNEL))
    fit(StageRun(class_wise=False), PosteriorMonitor(every_n_steps=2, queries=4))
    lines = [r.getMessage() for r in lightning_log.records if "stagewise: " in r.getMessage()]
    took = [line for line in lines if " took " in line]
    assert took[0].endswith("no labels, condition = float32 tensor (16, 2)")
    assert took[1].endswith("no labels")
    assert sum("batch['obs'], float32 tensor (16, 2), is not used" in line for line in lines) == 1
    assert lines.index(took[1]) < next(i for i, line in enumerate(lines) if "is not used" in line)


def test_a_scheme_of_ones_own_and_what_does_not_go_together(fit, quick_figures, lightning_log):
    bank = LatentBank(X, conditions=OBS)
    scheme = Scheme(ConditionedOracle(bank, None, KERNEL), target=Mix())
    monitor = PosteriorMonitor(every_n_steps=2, queries=4)
    fit(monitor, StageScheme(scheme))
    assert SAID in monitor.history[0]["condition"]
    told = Condition(bandwidth=0.5, read_batch=lambda batch: batch["obs"][:, :1])
    with pytest.raises(ValueError, match=r"\(16, 2\).*2 numbers, got \(16, 1\)"):
        fit(StageScheme(target=Mix(), bank=bank, condition=told))
    with pytest.raises(ValueError, match="conditions=c"):
        fit(PosteriorMonitor(LatentBank(X), condition=KERNEL))
    with pytest.raises(ValueError, match="no engine"):
        fit(PosteriorMonitor(engine=Exact(), condition=KERNEL))
    with pytest.raises(ValueError, match="Leave out VelocityErrorMonitor"):
        fit(StageRun(condition=KERNEL), VelocityErrorMonitor())
    with pytest.raises(TypeError, match="Condition"):
        PosteriorMonitor(condition=0.5)
