"""`PosteriorMonitor` beside training code of others: nothing but the callback is added."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stagewise import CosinePath, LatentBank, LinearPath, Oracle
from stagewise.callbacks import PosteriorMonitor
from stagewise.stages import STATISTICS, StageCurve

pytestmark = pytest.mark.usefixtures("quick_figures")

POINTS = torch.randn(96, 2, generator=torch.Generator().manual_seed(1)) + 2
IMAGES = torch.rand(96, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
LABELS = torch.arange(96) % 3


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.SELU(), nn.Linear(16, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None]], 1))


class Foreign(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Velocity()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.fixture
def torchcfm_module():
    """As in torchcfm's examples: the matcher draws t and x_t."""
    pytest.importorskip("torchcfm")
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    class CFM(Foreign):
        def __init__(self):
            super().__init__()
            self.matcher = ConditionalFlowMatcher(sigma=0.0)

        def training_step(self, batch, batch_idx):
            (x1,) = batch
            x0 = torch.randn_like(x1)
            t, xt, ut = self.matcher.sample_location_and_conditional_flow(x0, x1)
            return (self.model(xt, t) - ut).square().mean()

    return CFM


@pytest.fixture
def flow_matching_module():
    """As in flow_matching's examples: a path with a scheduler gives x_t and dx_t."""
    pytest.importorskip("flow_matching")
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler

    class FlowMatching(Foreign):
        def __init__(self):
            super().__init__()
            self.path = AffineProbPath(scheduler=CondOTScheduler())

        def training_step(self, batch, batch_idx):
            (x1,) = batch
            t = torch.rand(len(x1), device=x1.device)
            sample = self.path.sample(t=t, x_0=torch.randn_like(x1), x_1=x1)
            return (self.model(sample.x_t, sample.t) - sample.dx_t).square().mean()

    return FlowMatching


class LabelledImages(Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        return {"image": IMAGES[i], "label": int(LABELS[i]), "file": f"{i:03d}.png"}


@pytest.fixture
def image_module():
    """A class-conditional network on dict batches, with velocity and time the other way."""

    class ImageFlow(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 8)
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

        def training_step(self, batch, batch_idx):
            image, noise = batch["image"], torch.randn_like(batch["image"])
            label = torch.where(torch.rand(len(image)) < 0.1, 3, batch["label"])
            s = torch.rand(len(image), 1, 1, 1)
            h = self.first((1 - s) * image + s * noise) + self.embed(label)[:, :, None, None]
            return (self.last(torch.tanh(h)) - (noise - image)).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    return ImageFlow


@pytest.mark.parametrize(
    ("module", "data", "x", "labels"),
    [
        ("torchcfm_module", TensorDataset(POINTS), POINTS, None),
        ("flow_matching_module", TensorDataset(POINTS), POINTS, None),
        ("image_module", LabelledImages(), IMAGES, LABELS),
    ],
)
def test_watched_unchanged(
    module, data, x, labels, request, make_trainer, weights, read_stages, tmp_path, lightning_log
):
    make = request.getfixturevalue(module)
    monitor = PosteriorMonitor(every_n_steps=4, strata=6, queries=8)

    def train(*callbacks):
        pl.seed_everything(5, verbose=False)
        model = make()
        start = weights(model)
        make_trainer(*callbacks, max_steps=6).fit(model, DataLoader(data, 32, shuffle=True))
        return start, weights(model)

    start, plain = train()
    _, watched = train(monitor)
    assert torch.equal(plain, watched)
    assert not torch.equal(start, watched)

    header, probes = read_stages(tmp_path / "stagewise_logs")
    assert header["rows"] == 96
    assert header["shape"] == list(x.shape[1:])
    assert header["class_wise"] is (labels is not None)
    assert header["path"] == "LinearPath()"
    known = {"torchcfm_module": "torchcfm", "flow_matching_module": "flow_matching"}
    how = f"{known[module]})" if module in known else "assumed; say path=... if training uses"
    assert how in lightning_log.text
    assert [probe["step"] for probe in probes] == [0, 4]

    # The whole chain, loader to file, against the floor below on the data themselves.
    curve = StageCurve.measure(
        Oracle(LatentBank(x, labels), LinearPath()),
        monitor.curve.t,
        seed=(0, 4, 1),
        class_wise=labels is not None,
    )
    for statistic in STATISTICS:
        assert probes[-1][statistic] == pytest.approx(curve.mean(statistic).tolist(), abs=1e-9)
    assert probes[-1]["midpoint"] == pytest.approx(curve.boundary().midpoint, abs=1e-9)


def test_path_of_a_foreign_module_is_said(
    flow_matching_module, make_trainer, read_stages, tmp_path
):
    from flow_matching.path.scheduler import CosineScheduler

    model = flow_matching_module()
    model.path.scheduler = CosineScheduler()
    monitor = PosteriorMonitor(path=CosinePath(), strata=6, queries=8)
    make_trainer(monitor, max_steps=1).fit(model, DataLoader(TensorDataset(POINTS), 32))
    header, (probe,) = read_stages(tmp_path / "stagewise_logs")
    assert header["path"] == "CosinePath()"
    bank, t = LatentBank(POINTS), monitor.curve.t
    top1 = {
        type(path): StageCurve.measure(Oracle(bank, path), t, seed=(0, 0, 1)).mean("top1").tolist()
        for path in (CosinePath(), LinearPath())
    }
    assert probe["top1"] == pytest.approx(top1[CosinePath], abs=1e-9)
    assert probe["top1"] != pytest.approx(top1[LinearPath], abs=1e-2)
