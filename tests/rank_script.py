"""What stands before each script of `on_two_ranks`: its place, a small training, its report."""

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from shared import undrawn  # noqa: F401 - scripts use it
from torch.utils.data import DataLoader, TensorDataset

from stagewise.losses import FlowMatchingLoss

out, devices = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", 0))


class Flow(pl.LightningModule):
    """Flow matching with a linear network."""

    def __init__(self, lr=0.0, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.loss, self.lr = torch.nn.Linear(7, 6), FlowMatchingLoss(), lr

    def training_step(self, batch, batch_idx):
        return self.loss(lambda xt, t: self.net(torch.cat([xt, t[:, None]], 1)), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def samples(count, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def loader(x, batch_size=8, **options):
    return DataLoader(TensorDataset(x), batch_size, **options)


def make_trainer(*callbacks, **options):
    """A quiet trainer on the CPU, of all ranks."""
    defaults = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "default_root_dir": out,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def weights(model):
    return [p.detach().flatten().tolist() for p in model.parameters()]


def report(found):
    (out / f"report{rank}.json").write_text(json.dumps(found))
