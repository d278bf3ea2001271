"""The bank of a run, read from its own training data loader without disturbing the run.

A data module with a method `latent_bank()` that returns a `LatentBank` is asked for it instead. A
data set with a method `fixed()` is read through what that returns: its samples without draws. Every
other sample that the run draws is read once, in order, by a loader of our own over the run's data
set, with the run's collate function and batch-transfer hooks, the module being in evaluation mode.
All random state is put back afterwards, so training draws what it would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from stagewise.bank import LatentBank
from stagewise.batches import FindSample, find_checked, find_sample
from stagewise.drawn_rows import drawn_rows
from stagewise.memory import format_bytes
from stagewise.row_reader import RowReader, same_rows
from stagewise.undisturbed import undisturbed

__all__ = ["Samples", "bank_from_trainer", "read_rows", "shard_from_trainer"]

Samples = tuple[Tensor, "Tensor | None"]
"""Samples, (n, *), and their labels, (n,), or None, on the CPU."""

_LARGE = 10**9
"""Bytes above which a bank beside a CUDA device has 16 bits."""

_READ_TWICE = 32  # samples: what changes one in ten is seen with a chance of 99.8 %


def bank_from_trainer(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    find: FindSample = find_sample,
    class_wise: bool = True,
    dtype: torch.dtype | None = None,
) -> LatentBank:
    """Reads the training set of a running trainer into a bank in host memory.

    Under several processes every rank reads the whole set.

    Args:
        trainer: A trainer whose training data loader is set up (`on_train_start` or later).
        pl_module: Its module, whose batch-transfer hooks are applied.
        find: From a batch to `(x_1, labels or None)`.
        class_wise: Whether to keep labels, default True.
        dtype: Storage; default that of the samples, and bfloat16 for more than 1 GB of them beside
            a CUDA device, which is said with what it changes.

    Returns:
        The bank; that of the data module, if it has one. Its rows are those that the sampler draws
        (`drawn_rows`). A data set that augments at random gives one draw of each, with a warning.

    Raises:
        ValueError: If the loader cannot be read twice or has no length, or its batches are no rows
            of a bank, with the cure.
        MemoryError: See `LatentBank.from_batches`.
    """
    own = _own(trainer, "latent_bank")
    if own is not None:
        return own
    # Labels that are not asked for may be in some batches and not in others.
    taken = find if class_wise else lambda batch: (find_checked(find, batch)[0], None)
    reader = _reader(trainer, pl_module, trainer.train_dataloader, taken)
    with undisturbed(pl_module, reader.loader, find):
        rows = _drawn(trainer, reader.loader, say=True)
        step = -(-len(rows) // _READ_TWICE)
        # Never here if the run has workers: a file that a data set opens when it is first read
        # would be handed on to every worker forked later.
        twice = [x1.cpu() for x1, _ in reader.read(rows[::step], workers=1, times=2, seed=1)]
        once, again = torch.cat(twice[::2]), torch.cat(twice[1::2])
        dtype = dtype or storage_beside(trainer.strategy.root_device, len(rows), once)
        with tqdm(
            total=len(rows),
            desc="stagewise: reading the bank",
            unit="row",
            disable=not trainer.is_global_zero,
        ) as bar:
            bank = LatentBank.from_batches(
                reader.read(rows),
                len(rows),
                find=lambda sample: sample,
                dtype=dtype,
                copies=trainer.num_devices,
                advance=lambda done: bar.update(done - bar.n),
            )
    # Within a pass nothing is seeded again; between two the workers are, if not as in training.
    if not (torch.equal(once, again) and same_rows(bank, range(0, len(rows), step), once)):
        rank_zero_warn(
            "The training set gives other values of x_1 each time it is read (augmentation, or "
            "latents resampled from mean and std). The bank holds one draw of each sample: the "
            "navigation stage is measured well, but x_1 of a training batch is not a bank row, so "
            "do not use this bank for training targets."
        )
    return bank


def storage_beside(device: torch.device, count: int, samples: Tensor) -> torch.dtype | None:
    """The type of a bank of `count` samples like these, (n, *), for training on a device.

    Returns:
        bfloat16 for more than 1 GB on a CUDA device, after a line of log; else None: theirs.
    """
    x = samples.detach().flatten(1)
    size = count * x.shape[1] * x.element_size()
    if device.type != "cuda" or x.element_size() == 2 or size <= _LARGE:
        return None
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        rank_zero_info(
            f"The bank takes {format_bytes(size)}: {device} has no bfloat16, which would halve it."
        )
        return None
    x = x.double() - x.double().mean(0)
    error = (x.to(torch.bfloat16).double() - x).norm() / x.norm()
    rank_zero_info(
        f"The bank is stored in bfloat16, {format_bytes(2 * count * x.shape[1])} in place of "
        f"{format_bytes(size)}: its rows, and so the oracle's mean, are rounded by "
        f"{float(error):.2%} of their distance from the mean of all (measured on {len(x)}, root "
        "mean square; each number by 0.39% at most); x_1 itself keeps its digits. To keep those "
        "of all: StageRun(bank=LatentBank(x, labels))."
    )
    return torch.bfloat16


def shard_from_trainer(trainer: pl.Trainer) -> LatentBank:
    """This rank's part of the training set, for an engine that shards the bank over ranks."""
    shard = _own(trainer, "latent_shard")
    if shard is None:
        raise ValueError(
            "Sharded() needs the part of the bank that each rank holds: give it, bank=LatentBank("
            "x[shard_rows(len(x), rank, world_size)].clone()), or use a data module with "
            "`latent_shard()`."
        )
    return shard


def _own(trainer: pl.Trainer, name: str) -> LatentBank | None:
    """What a method of the data module returns; None if it has no such method."""
    method = getattr(getattr(trainer, "datamodule", None), name, None)
    if not callable(method):
        return None
    bank = method()
    if not isinstance(bank, LatentBank):
        raise TypeError(
            f"Expected `{name}()` of the data module to return a LatentBank, got "
            f"{type(bank).__name__}."
        )
    return bank


def read_rows(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: Any,
    count: int,
    *,
    find: FindSample = find_sample,
    seed: int = 0,
) -> Samples:
    """Reads random samples of a loader's data set, as `bank_from_trainer` reads all of them.

    In the order of the data set. Two readings with the same seed give the same samples even if they
    are augmented.
    """
    reader = _reader(trainer, pl_module, loader, find)
    with undisturbed(pl_module, loader, find, seed=seed):
        rows = _drawn(trainer, loader)
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        few = [rows[place] for place in np.sort(chosen)]
        found = list(reader.read(few, workers=1, seed=seed))
    labels = [label.cpu() for _, label in found if label is not None]
    return torch.cat([x.detach().cpu() for x, _ in found]), torch.cat(labels) if labels else None


def _drawn(trainer: pl.Trainer, loader: DataLoader[Any], *, say: bool = False) -> Sequence[int]:
    """The rows that a loader draws; those of the training loader as the trainer cuts its epochs."""
    # `fast_dev_run` is no training and cuts nothing.
    training = loader is trainer.train_dataloader and not trainer.fast_dev_run  # type: ignore[attr-defined]
    drawn = drawn_rows(
        loader,
        limit=trainer.num_training_batches if training else math.inf,
        world_size=trainer.world_size,
        epoch=trainer.current_epoch,
        kept=[trainer, trainer.lightning_module, getattr(trainer, "datamodule", None)],
    )
    size = len(loader.dataset)  # type: ignore[arg-type]
    if say:
        if len(drawn.rows) < size:
            rank_zero_info(f"Training draws {len(drawn.rows)} of {size} samples: the bank's rows.")
        if drawn.looked:
            rank_zero_info(f"The sampler has no end: {drawn.looked} of its draws were looked at.")
        for warning in drawn.warnings:
            rank_zero_warn(f"The training loader draws {warning}")
        if training:
            epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
            counted = trainer.max_steps != -1 and trainer.lightning_module.automatic_optimization
            batches = trainer.max_steps * trainer.accumulate_grad_batches if counted else math.inf
            few = drawn.few(epochs, batches)
            if few:
                (rank_zero_warn if drawn.cut else rank_zero_info)(few)
    return drawn.rows


def _reader(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any, find: FindSample
) -> RowReader:
    """Reads what a loader draws from, and moves it in the three steps of Lightning's own loop."""

    def move(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return RowReader(loader, find, move)
