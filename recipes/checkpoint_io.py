"""How checkpoints of a run are written: whole files, the last step, averages that have begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from stagewise.files import replace_file

__all__ = ["AtomicCheckpointIO", "RunAveraging", "RunCheckpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, and replaces that when the new one is on the disk.

    Lightning's own writes to the folder for temporary files, and copies from there to another disk:
    a run that is killed meanwhile, or finds the disk full, loses the old checkpoint too.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"Expected no `storage_options`, got {storage_options!r}.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: torch.save(checkpoint, file))


class RunCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that also keeps the last step, whatever its number, as `last.ckpt`.

    Lightning's own writes the last step only if it wrote no other, and after averaged weights have
    replaced the trained ones and the epoch counts as over: a training that resumes from it is not
    the same training.
    """

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        super().on_train_batch_end(trainer, *arguments, **named)
        ended = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if ended and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class RunAveraging(EMAWeightAveraging):
    """An `EMAWeightAveraging` whose average is used only after `update_starting_at_step`.

    Lightning's own validates with the average, and ends training with it, from the first step on:
    before `update_starting_at_step` that is the untrained network. Without that argument the
    average begins at the initial weights, as in SiT and LightningDiT, not after the first step.
    """

    @override
    def on_train_start(self, *arguments: Any) -> None:
        super().on_train_start(*arguments)
        if self._average_model is not None and self.update_starting_at_step is None:
            self._average_model.n_averaged.clamp_(min=1)

    @property
    def has_begun(self) -> bool:
        """Whether weights have been averaged."""
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    @override
    def on_validation_epoch_start(self, *arguments: Any) -> None:
        if self.has_begun:
            super().on_validation_epoch_start(*arguments)

    @override
    def on_validation_epoch_end(self, *arguments: Any) -> None:
        if self.has_begun:
            super().on_validation_epoch_end(*arguments)

    @override
    def on_train_end(self, *arguments: Any) -> None:
        if self.has_begun:
            super().on_train_end(*arguments)
