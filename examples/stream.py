"""Watch and steer training on a stream that cannot be read twice.

Digits come shifted at random, without end, so there is no set of rows to build a bank of. The last
1024 samples take its place: each step's batch is among them, so their targets are right on average,
at any time. The monitor reports with each number which rows it is over. Run it with `python
examples/stream.py`; it takes a few seconds and needs the `recipes` extra for scikit-learn's digits.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stagewise import Mix, StageTarget
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme


class Shifted(IterableDataset):
    """Digits without end, each moved by up to a pixel: never the same one twice in a row."""

    def __init__(self, seed=0):
        self.x = torch.from_numpy(load_digits().images).float() / 8 - 1
        self.seed = seed

    def __iter__(self):
        """From its own generator, so that a training is the same each time."""
        draws = torch.Generator().manual_seed(self.seed)
        while True:
            index, down, right = torch.randint(3 * len(self.x), (3,), generator=draws).tolist()
            digit = self.x[index % len(self.x)] + 0.05 * torch.randn(8, 8, generator=draws)
            yield digit.roll((down % 3 - 1, right % 3 - 1), (0, 1)).flatten()


class Digits(L.LightningModule):
    """Flow matching with a perceptron, its target written by hand."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64 + 1, 256), nn.SiLU(), nn.Linear(256, 64))
        self.target = StageTarget()

    def training_step(self, x1, batch_idx):
        """Regresses what the target module gives."""
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        return (w * (self.net(torch.cat([xt, t], 1)) - u).square().mean(1)).mean()

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(*callbacks, steps=100):
    """Trains for some steps; returns the module."""
    torch.manual_seed(0)
    module, loader = Digits(), DataLoader(Shifted(), batch_size=128)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", callbacks=list(callbacks), **quiet)
    trainer.fit(module, loader)
    return module


if __name__ == "__main__":
    monitor = PosteriorMonitor(every_n_steps=50, queries=16)
    train(StageRun(reservoir=1024), monitor, StageScheme(target=Mix()))
