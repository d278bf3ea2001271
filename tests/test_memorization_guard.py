"""`MemorizationGuard`: announces learning by heart, is silent elsewhere, keeps weights, no trace."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from stagewise import AtEvent, LatentBank, Oracle, Phase, Phases, Scheme
from stagewise.callbacks import MemorizationGuard, StageScheme, StageTransitions
from stagewise.callbacks.stage_transitions import MEMORIZATION_ONSET
from stagewise.losses import FlowMatchingLoss
from stagewise.memorization_onset import GapWatch, OnsetLaw

pytestmark = pytest.mark.usefixtures("quick_figures")

FEW = {"samples": 16, "queries": 16, "figures": 0}
OFTEN = {**FEW, "queries": 64, "every_n_steps": 25}


class Flow(pl.LightningModule):
    """A perceptron that learns a few points by heart in some hundred steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(7, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 6)]
        self.net, self.loss = nn.Sequential(*layers), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        draws = torch.Generator().manual_seed(self.trainer.global_step)
        x1 = batch[0][torch.randint(len(batch[0]), (64,), generator=draws)]
        return self.loss(
            lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), x1, generator=draws
        )

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def gaussian(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fit(make_trainer, make_loader):
    """Trains on `rows` points, all of them in each batch; held-out ones are of the same kind."""

    def fit(rows, *callbacks, steps=300, held_out=True, ckpt_path=None, **options):
        x, model = gaussian(rows), Flow()
        sampler = RandomSampler(range(rows), replacement=True, num_samples=rows * steps)
        whole = torch.utils.data.BatchSampler(_Again(rows, steps), rows, drop_last=False)
        del sampler
        train = DataLoader(torch.utils.data.TensorDataset(x), batch_sampler=whole)
        others = make_loader(gaussian(300, seed=5), batch_size=64) if held_out else None
        trainer = make_trainer(
            *callbacks,
            **{"max_steps": steps, "check_val_every_n_epoch": 2, "log_every_n_steps": 50} | options,
        )
        trainer.fit(model, train, others, ckpt_path=ckpt_path)
        return model

    return fit
