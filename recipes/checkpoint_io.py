"""Checkpoints that are whole, or not there, and one of the last step."""

from __future__ import annotations

from glob import escape
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stagewise.files import replace_file

__all__ = ["AtomicCheckpointIO", "RunCheckpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, and puts it in its place when it is on the disk.

    Lightning's own goes through the folder for temporary files, and copies from there if that is
    another disk: who is killed then, or runs out of room, has lost the old one too. What is left of
    a write that was killed is removed by the next of the same name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint to a local path.

        Args:
            checkpoint: What is stored.
            path: The file.
            storage_options: None; local files have none.

        Raises:
            OSError: If it cannot be written; what was there before is still there.
        """
        if storage_options is not None:
            raise TypeError(f"Expected no `storage_options`, got {storage_options!r}.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
            left.unlink(missing_ok=True)
        try:
            replace_file(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:  # torch's zip writer says a full disk its own way
            raise OSError(
                f"The checkpoint {path} could not be written ({error}). What was there before is "
                "unchanged: make room, and go on with resume=true."
            ) from error


class RunCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that keeps the last step too, as `last.ckpt`, whatever its number.

    Lightning's own writes one at the end only if it wrote none before, and then when averaged
    weights have taken the place of those that are trained, and the epoch counts as over: training
    that goes on from there is not the training that would have gone on.

    Args:
        See `ModelCheckpoint`; `save_last=True`.
    """

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves as often as it was told, and behind the last step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ended = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if ended and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
