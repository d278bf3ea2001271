"""Steer a training run that knows nothing of stagewise.

The module below is that of a user of torchcfm. The callback measures where navigation ends, puts
the oracle's target in place of the conditional one up to there, and draws a third of the times
there; after 60 % of the steps it goes back to plain training. Run it with `python
examples/steer.py`; it takes a few seconds and needs the `recipes` extra for scikit-learn's digits,
and torchcfm.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

from stagewise import AtShare, LatentBank, Mix, Oracle, Phase, Phases, Scheme, StageAware
from stagewise.callbacks import StageScheme


class Digits(L.LightningModule):
    """Flow matching on 8x8 digits with a perceptron."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64 + 1, 256), nn.SiLU(), nn.Linear(256, 64))
        self.FM = ConditionalFlowMatcher(sigma=0.0)

    def training_step(self, batch, batch_idx):
        """Regresses what the matcher gives."""
        (x1,) = batch
        t, xt, u = self.FM.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return nn.functional.mse_loss(self.net(torch.cat([xt, t[:, None]], 1)), u)

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


x = torch.from_numpy(load_digits().data).float() / 8 - 1
oracle = Oracle(LatentBank(x))
first = Scheme(oracle, target=Mix("boundary"), timesteps=StageAware(navigation=1 / 3))
scheme = Phases([Phase(first, until=AtShare(0.6)), Phase(Scheme())])
trainer = L.Trainer(
    max_steps=200,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
    callbacks=[StageScheme(scheme)],  # the added line
)
trainer.fit(Digits(), DataLoader(TensorDataset(x), batch_size=128, shuffle=True))
