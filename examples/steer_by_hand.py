"""Steer a training step that writes its target out.

The two marked lines are added to the module: without a callback they change nothing. The oracle's
target replaces the conditional one in navigation, and a monitor finds network, path and samples by
the same line. Run it with `python examples/steer_by_hand.py`; it takes a few seconds and needs the
`recipes` extra for scikit-learn's two moons.
"""

import lightning as L
import torch
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import Mix, StageTarget
from stagewise.callbacks import PosteriorMonitor, StageScheme, VelocityErrorMonitor


class Moons(L.LightningModule):
    """Class-conditional flow matching in the plane with a perceptron."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 + 1 + 2, 256), nn.SiLU(), nn.Linear(256, 2))
        self.target = StageTarget()  # the first added line

    def training_step(self, batch, batch_idx):
        """Regresses the velocity x_1 - x_0."""
        x1, y = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1, labels=y)  # the second, for u = x1 - x0
        v = self.net(torch.cat([xt, t, nn.functional.one_hot(y, 2)], 1))
        return (w * (v - u).square().mean(1)).mean()

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


x, y = make_moons(2000, noise=0.05, random_state=0)
data = TensorDataset(torch.from_numpy(x).float(), torch.from_numpy(y))
callbacks = [PosteriorMonitor(every_n_steps=100), VelocityErrorMonitor(every_n_steps=100)]
if __name__ == "__main__":
    trainer = L.Trainer(
        max_steps=200,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*callbacks, StageScheme(target=Mix("boundary"))],
    )
    trainer.fit(Moons(), DataLoader(data, batch_size=128, shuffle=True))
