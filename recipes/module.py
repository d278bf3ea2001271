"""The LightningModule of the recipes: a network and an objective, without stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from typing_extensions import override

from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.order import EpochOrder
from stagewise.sampling import Velocity, model_velocity

__all__ = ["FlowMatchingModule"]


class FlowMatchingModule(L.LightningModule):
    """Trains `net(xt, t, labels)` with `objective` on batches `(x_1, labels)`.

    A third item of a batch, the row of the bank of each x_1, goes to the scheme.

    Logs `train/loss` and, over the validation set with fixed noise and times, `val/loss`. Noise,
    times and label dropout depend on seed, epoch and batch only, so a resumed run has the same
    draws. Noise and times do not depend on the number of ranks either, if their batches interleave
    to the same samples (`EpochOrder`); label dropout does.

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

    @override
    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._reseed(0, batch_idx)

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x1, labels, *rows = batch
        ranks = self.trainer.world_size
        net: Callable[..., Tensor] = self.net
        if ranks > 1:
            net = partial(self._with_own_dropout, batch_idx)
        part, source = (self.global_rank, ranks), rows[0] if rows else None
        loss = self.objective(net, x1, labels, part=part, classes=labels, source=source)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x1, labels = batch[:2]
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        # Lightning gives every R-th sample to a rank.
        part = (self.global_rank, self.trainer.world_size)
        loss = self.objective(self.net, x1, labels, generator=generator, part=part)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(x1), sync_dist=True)

    def velocity(self, labels: Tensor | None) -> Velocity:
        """The velocity of the network for labels, (B,); None is the null class."""
        return model_velocity(
            lambda xt, time: self.net(xt, time, labels).to(xt.dtype),
            path=self.objective.path,
            prediction=self.objective.prediction,
            convention=self.objective.convention,
        )

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        betas, weights = (self.betas[0], self.betas[1]), self.net.parameters()
        optimizer = torch.optim.AdamW(weights, self.lr, betas, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _with_own_dropout(self, batch_idx: int, xt: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The network, with the label dropout of this rank."""
        self._reseed(1 + self.global_rank, batch_idx)
        return self.net(xt, t, labels)

    def _reseed(self, stream: int, batch_idx: int) -> None:
        # Lightning's epoch is wrong after two resumes at the end of an epoch; that of the data not.
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        epoch = sampler.epoch if isinstance(sampler, EpochOrder) else self.current_epoch
        place = (self.seed, stream, epoch, batch_idx)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1)
