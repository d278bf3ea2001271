"""Checkpoints that are whole, or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stagewise.latents.files import replace_file

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, and puts it in its place when it is on the disk.

    Lightning's own goes through the folder for temporary files, and copies from there if that is
    another disk: who is killed then, or runs out of room, has lost the old one too.
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
        try:
            replace_file(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:  # torch's zip writer says a full disk its own way
            raise OSError(
                f"The checkpoint {path} could not be written ({error}). What was there before is "
                "unchanged: make room, and go on with resume=true."
            ) from error
