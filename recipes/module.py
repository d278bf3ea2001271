"""The LightningModule of the recipes: a network, an objective, and nothing about stages."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from stagewise.losses import FlowMatchingLoss

__all__ = ["FlowMatchingModule"]


class FlowMatchingModule(L.LightningModule):
    """Trains `net(xt, t, labels)` with `objective` on batches `(x_1, labels)`.

    Logs `train/loss` and, over the validation set with fixed noise and times, `val/loss`. Noise,
    times and label dropout of a batch depend on the seed, the rank, the epoch and the batch, not on
    what was drawn before, so a run that is stopped at the end of an epoch and resumed draws what it
    would have drawn.

    Args:
        net: The network.
        objective: The objective.
        lr: Peak learning rate of AdamW, default 1e-3.
        betas: AdamW's betas, default (0.9, 0.95).
        weight_decay: Default 0.
        warmup_steps: Steps over which the rate grows linearly to `lr`, default 100.
        seed: Of noise, times and label dropout, default 0.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: FlowMatchingLoss,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.objective = net, objective
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup_steps, self.seed = warmup_steps, seed

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Seeds the draws of this batch."""
        place = (self.seed, self.global_rank, self.current_epoch, batch_idx)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch of the objective."""
        x1, labels = batch
        loss = self.objective(self.net, x1, labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The same on held-out samples; noise and times depend on the batch only."""
        x1, labels = batch
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        loss = self.objective(self.net, x1, labels, generator=generator)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(x1), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(
            self.net.parameters(),
            self.lr,
            (self.betas[0], self.betas[1]),
            weight_decay=self.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
