"""Which samples a probe of the model is made from."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.batches import FindSample
from stagewise.callbacks.training_bank import read_rows

__all__ = ["HeldOut", "held_out_rows", "training_rows"]

HeldOut = Tensor | tuple[Tensor, Tensor | None]
"""Samples, (n, *), alone or with their labels, (n,)."""


def training_rows(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    bank: LatentBank,
    count: int,
    *,
    given: bool,
    find: FindSample,
    seed: int,
    asks: str,
) -> tuple[Tensor, Tensor | None]:
    """Samples as training draws them, so that a bank that is not theirs shows.

    Args:
        trainer: A running trainer.
        pl_module: Its module.
        bank: The bank.
        count: How many; all if there are fewer.
        given: Whether the user gave the bank: then its rows serve where data cannot be read again.
        find: From a batch to `(x_1, labels or None)`.
        seed: Of the choice.
        asks: Name of the callback, for messages.

    Returns:
        Samples, (n, *), and labels, (n,), or None, on the CPU.

    Raises:
        ValueError: If they have another shape than the rows of the bank, or cannot be read.
    """
    try:
        loader = trainer.train_dataloader
        x1, labels = read_rows(trainer, pl_module, loader, count, find=find, seed=seed)
    except ValueError:
        if not given:
            raise
        index = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))[:count]
        rank_zero_info(
            f"{asks}: the training data cannot be read a second time, so rows of the bank stand "
            "for it. A bank of another scale than training's would not show."
        )
        x1 = bank.take(index.to(bank.device)).reshape(-1, *bank.shape).float().cpu()
        labels = torch.tensor(bank.labels_of(index.tolist())) if bank.classes else None
    if tuple(x1.shape[1:]) != bank.shape:
        raise ValueError(
            f"The bank has samples of shape {bank.shape}, the training data of shape "
            f"{tuple(x1.shape[1:])}. Build the bank from the same latents, or say which tensor "
            f"of the batch is x_1: {asks}(find=lambda batch: (batch[0], None))."
        )
    return x1, labels


def held_out_rows(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    bank: LatentBank,
    count: int,
    *,
    given: HeldOut | None,
    find: FindSample,
    seed: int,
    asks: str,
) -> tuple[Tensor, Tensor | None] | None:
    """Samples that are not trained on: what the user gave, or the first validation loader's.

    Args:
        trainer: See `training_rows`, like all others.
        pl_module: See there.
        bank: See there.
        count: See there.
        given: What the user gave, or None.
        find: See there.
        seed: See there.
        asks: See there.

    Returns:
        Samples and labels on the CPU; None if there are none, which the log says.

    Raises:
        ValueError: If what the user gave has another shape than the rows of the bank.
    """
    if given is not None:
        x1, labels = (given, None) if isinstance(given, Tensor) else given
        if tuple(x1.shape[1:]) != bank.shape or not len(x1):
            raise ValueError(
                f"Expected `held_out` with samples of shape {bank.shape} as the bank's, got "
                f"{tuple(x1.shape)}."
            )
        return x1.cpu(), None if labels is None else labels.cpu()
    loader = _validation_loader(trainer)
    why = "there is no validation data"
    if loader:
        try:
            x1, labels = read_rows(trainer, pl_module, loader, count, find=find, seed=seed)
            if tuple(x1.shape[1:]) == bank.shape:
                return x1, labels
            why = f"validation samples have the shape {tuple(x1.shape[1:])}, not {bank.shape}"
        except ValueError as error:
            why = f"the validation data cannot be read: {str(error).split('. ')[0]}"
    rank_zero_info(
        f"{asks}: {why}. What needs held-out samples is left out. Give some: "
        f"{asks}(held_out=(samples, labels))."
    )
    return None


def _validation_loader(trainer: pl.Trainer) -> Any:
    """The first validation loader, None if there is none."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # Where the first epoch has no validation Lightning sets it up later, in the same way.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    loader = trainer.val_dataloaders
    return loader[0] if isinstance(loader, (list, tuple)) and loader else loader
