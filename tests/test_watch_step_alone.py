"""`watch.step(step)` without the batch: what the step gives to its target says the rest."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stagewise import Condition, LatentBank, Mix, StageTarget
from stagewise.callbacks import PosteriorMonitor, StageScheme, VelocityErrorMonitor, Watch

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore"),
]

N = 64
FEW = {"strata": 4, "queries": 8}
draws = torch.Generator().manual_seed(2)
X = torch.randn(N, 6, 2, generator=draws)
Y = torch.arange(N) % 4
C = torch.randn(N, 3, generator=draws)
MASK = (torch.arange(6) < torch.randint(3, 7, (N, 1), generator=draws))[:, :, None].expand(X.shape)
ROWS = [{"x": x, "y": y, "c": c, "mask": m} for x, y, c, m in zip(X, Y, C, MASK, strict=True)]
SAID = {
    "labels": {"read_batch": lambda batch: (batch["x"], batch["y"])},
    "mask": {"read_batch": lambda batch: (batch["x"], None, batch["mask"])},
    "condition": {
        "read_batch": lambda batch: (batch["x"], None),
        "condition": Condition(bandwidth=0.9, read_batch=lambda batch: batch["c"]),
    },
}
KEY = {"labels": "y", "mask": "mask", "condition": "c"}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.net = (
            kind,
            nn.Linear(12 + 1 + {"labels": 4, "mask": 12, "condition": 3}[kind], 12),
        )

    def forward(self, xt, t, given):
        given = nn.functional.one_hot(given, 4) if self.kind == "labels" else given
        return self.net(torch.cat([xt.flatten(1), t[:, None], given.flatten(1)], 1)).view_as(xt)


def train(kind, *callbacks, given=True, shown=False, data=None, **said):
    loader, net, target = DataLoader(ROWS, 16, shuffle=True), Net(kind), StageTarget()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(5)
    watch = Watch(net, loader if data is None else data, *callbacks, target=target, steps=4, **said)
    targets = []
    for step, batch in enumerate(loader):
        watch.step(step, *([batch] if shown else []))
        x1, c = batch["x"], batch[KEY[kind]]
        x1 = x1 * c if kind == "mask" else x1
        t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
        xt = t.view(-1, 1, 1) * x1 + (1 - t).view(-1, 1, 1) * x0
        u, w = target(x1 - x0, xt=xt, t=t, x1=x1, **({kind: c} if given else {}))
        targets.append(u)
        gap = (net(xt, t, c) - u).square() * (c if kind == "mask" else 1)
        (w * gap.flatten(1).mean(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return torch.cat(targets)


@pytest.mark.parametrize("kind", SAID)
def test_what_the_step_gives_is_enough(kind, tmp_path):
    said = {**SAID[kind], "dirpath": tmp_path}
    expected = train(kind, StageScheme(target=Mix(1.0)), shown=True, **said)
    steered = train(kind, PosteriorMonitor(**FEW), StageScheme(target=Mix(1.0)), **said)
    assert torch.equal(steered, expected)
    if kind != "condition":  # its network is asked about rows
        train(kind, VelocityErrorMonitor(**FEW), **said)


@pytest.mark.parametrize("given", [True, False])
def test_classes_are_those_of_the_bank_where_no_loader_is_given(given, tmp_path, recwarn):
    expected = train("labels", StageScheme(target=Mix(1.0)), shown=True, **SAID["labels"])
    bank, callbacks = LatentBank(X, Y), (StageScheme(target=Mix(1.0)), VelocityErrorMonitor(**FEW))
    steered = train("labels", *callbacks, data=bank, given=given, dirpath=tmp_path)
    assert torch.allclose(steered, expected, atol=1e-5)
    assert not [m for m in (str(w.message) for w in recwarn) if "upper bound" in m or "kernel" in m]


@pytest.mark.parametrize("kind", ["mask", "condition"])
def test_what_it_does_not_give_is_asked_for(kind, tmp_path):
    said = {**SAID[kind], "dirpath": tmp_path}
    with pytest.raises(ValueError, match=r": watch\.step\(step, batch\)\.$"):
        train(kind, StageScheme(target=Mix(1.0)), given=False, **said)
    train(kind, StageScheme(target=Mix(1.0)), given=False, shown=True, **said)
