"""Averaged weights that are not taken before there are any."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging

__all__ = ["RunAveraging"]


class RunAveraging(EMAWeightAveraging):
    """An `EMAWeightAveraging` whose average is used once it has begun.

    Lightning's own validates with it, and ends training with it, from the first step on: before
    `update_starting_at_step` that is the untrained network.

    Args:
        See `EMAWeightAveraging`.
    """

    @property
    def has_begun(self) -> bool:
        """Whether weights have been averaged."""
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average in, if there is one."""
        if self.has_begun:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes it out again."""
        if self.has_begun:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends with the average, if there is one."""
        if self.has_begun:
            super().on_train_end(trainer, pl_module)
