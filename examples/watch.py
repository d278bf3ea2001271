"""Watch the stages of a training run that knows nothing of stagewise.

The module below is that of a user, with its own batches (dicts of digit images) and its own loss.
The callback is the only line added. Run it with `python examples/watch.py`; it takes a few seconds
and needs the `recipes` extra for scikit-learn's digits.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from stagewise.callbacks import PosteriorMonitor


class Digits(L.LightningModule):
    """Flow matching on 8x8 digits with a perceptron."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64 + 1 + 10, 256), nn.SiLU(), nn.Linear(256, 64))

    def training_step(self, batch, batch_idx):
        """Regresses the velocity x_1 - x_0."""
        x1 = batch["image"].flatten(1)
        label = nn.functional.one_hot(batch["label"], 10)
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        return nn.functional.mse_loss(self.net(torch.cat([xt, t, label], 1)), x1 - x0)

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
data = [
    {"image": x, "label": y} for x, y in zip(images, torch.from_numpy(digits.target), strict=True)
]
trainer = L.Trainer(
    max_steps=200,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
    callbacks=[PosteriorMonitor(every_n_steps=100)],  # the added line
)
trainer.fit(Digits(), DataLoader(data, batch_size=128, shuffle=True))
