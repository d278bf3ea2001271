"""What a run was trained on, in words, in the first line of its files."""

import json

import pytest
import torch
from torch import nn

from stagewise import (
    AtShare,
    Concentration,
    LatentBank,
    LogitNormal,
    MinSNR,
    Mix,
    Oracle,
    Phase,
    Phases,
    ReferenceSet,
    Scheme,
    Smoothing,
    StageAware,
    StageTarget,
)
from stagewise.callbacks import Forecast, PosteriorMonitor, StageScheme, VelocityErrorMonitor, Watch
from stagewise.losses import FlowMatchingLoss, OracleRegularizer
from stagewise.schemes.words import in_words
from stagewise.stages import StageBoundary

BOUNDARY = StageBoundary(0.38, 0.36, 0.40, 0.87, 0.86, 0.88, 0.95)
BANK = LatentBank(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))


def test_every_part_of_a_scheme_has_its_words():
    oracle, late = Oracle(BANK), "the plain target after it"
    smoothing = Smoothing(BANK, 8)
    two_stage = Scheme.two_stage(oracle, smoothing=smoothing)
    assert in_words(two_stage).startswith(f"the oracle's target up to the boundary, {late}, smooth")
    two_stage.set_boundary(BOUNDARY)
    cases = {
        "the plain target": Scheme(),
        f"the oracle's target up to t = 0.380, {late}": Scheme(oracle, target=Mix("boundary")),
        "the oracle's target at all t": Scheme(oracle, target=Mix()),
        "a mix of the plain target and the oracle's target, lambda = 0.5": Scheme(
            oracle, target=Mix(0.5)
        ),
        "a mix of the plain target and the oracle's target, lambda = Concentration()": Scheme(
            oracle, target=Mix(Concentration())
        ),
        "the target of ReferenceSet at all t": Scheme(oracle, target=ReferenceSet(8)),
        "the plain target, weights of a function of t": Scheme(weight=lambda t: t),
        "the plain target, t drawn by StageAware, weights of MinSNR, weighted as if t were "
        "uniform": Scheme(timesteps=StageAware(0.3), weight=MinSNR(), preserve_objective=True),
        f"the oracle's target up to t = 0.380, {late}, smoothed rows (8 neighbours) after "
        "t = 0.870 (monitors compare with the rows)": two_stage,
        "the plain target, smoothed rows (8 neighbours) with a strength that is a function of t "
        "(monitors compare with the rows)": Scheme(
            smoothing=smoothing, strength=lambda t: (t > 0.5).float()
        ),
    }
    for words, scheme in cases.items():
        scheme.set_boundary(BOUNDARY)
        assert in_words(scheme) == words
    phases = Phases([Phase(Scheme(timesteps=LogitNormal()), AtShare(0.6)), Phase(Scheme())])
    first = "the plain target, t drawn by LogitNormal until AtShare(0.6)"
    assert in_words(phases) == f"{first}; then the plain target"


class Model(nn.Module):
    """A module with a loss of the library, or without."""

    def __init__(self, loss_fn=None):
        super().__init__()
        self.net, self.loss_fn = nn.Linear(6, 6), loss_fn
        self.target = StageTarget() if loss_fn is None else None

    def forward(self, xt, t):
        return self.net(xt)

    def loss(self, x1):
        if self.loss_fn is not None:
            return self.loss_fn(self, x1)
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        xt = t[:, None] * x1 + (1 - t[:, None]) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (self(xt, t) - u).square().mean(1)).mean()


def headers(model, folder, *callbacks):
    """The first lines of the files of a training of three steps."""
    rows = BANK.take(torch.arange(64)).float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), 16)
    watch = Watch(model, loader, *callbacks, steps=3, dirpath=folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, batch in zip(range(3), loader, strict=False):
        watch.step(step, batch)
        optimizer.zero_grad()
        model.loss(batch[0]).backward()
        optimizer.step()
    watch.close()
    files = folder.rglob("stages.jsonl")
    return {file.parent.name: json.loads(file.read_text().split("\n")[0]) for file in files}


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("kind", ["by hand", "plain", "own scheme", "held", "callback"])
def test_files_say_what_was_trained_on(kind, tmp_path):
    own = Scheme(Oracle(BANK), target=Mix("boundary"), boundary=0.25)
    made = {
        "by hand": lambda: None,
        "plain": FlowMatchingLoss,
        "own scheme": lambda: FlowMatchingLoss(scheme=own),
        "held": lambda: None,
        "callback": FlowMatchingLoss,
    }
    model = Model(made[kind]())
    if kind == "held":  # and called in its step
        model.scheme = own
        model.regularizer = OracleRegularizer(own.oracle)
    monitors = [PosteriorMonitor(strata=4, queries=4), VelocityErrorMonitor(queries=4, strata=4)]
    steer = [StageScheme(target=Mix("boundary"), boundary=0.25)] * (kind == "callback")
    forecast = Forecast(every_n_steps=2)
    found = headers(model, tmp_path, *monitors, forecast, *steer)
    advised = {"which this training has" not in one["targets"] for one in forecast.history}
    assert advised == {kind in ("by hand", "plain")}
    words = "the oracle's target up to t = 0.250, the plain target after it"
    said = {name: (one.get("trained_on"), one.get("steered")) for name, one in found.items()}
    if kind == "callback":
        assert said.pop("stagewise_scheme")[0] == words
        assert set(said.values()) == {(None, None)}
        return
    assert len(said) == 3
    expected = {
        "by hand": ("the target of its own step; no scheme was found in the module", False),
        "plain": ("the plain target", False),
        "own scheme": (words, True),
        "held": (words, True),
    }
    assert set(said.values()) == {expected[kind]}
