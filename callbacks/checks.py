"""What ranks do together, and where a bank lies beside the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch

from stagewise.bank import LatentBank
from stagewise.memory import available_memory

__all__ = ["beside_training", "together"]


@contextmanager
def together(trainer: pl.Trainer, what: str) -> Iterator[None]:
    """Does something on every rank, or raises on all of them; a collective at its end.

    Args:
        trainer: The trainer.
        what: What is done, for the ranks that could do it. Nothing in it may wait for others.

    Raises:
        Exception: What was raised on this rank.
        ValueError: If it was on another, which would wait for this one for ever.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    passed = trainer.strategy.reduce_boolean_decision(error is None)
    if error is not None:
        raise error
    if not passed:
        raise ValueError(f"Another process failed in {what}; see its message.")


def beside_training(bank: LatentBank, trainer: pl.Trainer) -> LatentBank:
    """The bank on the training device if it takes less than a quarter of what is free there."""
    root = trainer.strategy.root_device
    # The oracle needs float64, which MPS has not.
    device = torch.device("cpu") if root.type == "mps" else root
    # The model's gradients, optimizer and activations are not there yet.
    free = available_memory(device)
    return bank.to(device) if free is None or bank.nbytes < free / 4 else bank
