"""The bank of a run, read from its own training data loader without disturbing the run.

A data module with a method `latent_bank()` that returns a `LatentBank` is asked for it instead. A
data set with a method `fixed()` is read through what that returns: its samples without draws. Every
other sample is read once, in order, by a loader of our own over the run's data set, with the run's
collate function and batch-transfer hooks. The global random state is put back afterwards, and no
generator of the run's loader or sampler is advanced, so training draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from tqdm.auto import tqdm

from stagewise.adapters.paths import same_path
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, find_checked, find_sample
from stagewise.callbacks.checks import beside_training
from stagewise.oracle import Oracle
from stagewise.paths import Path

__all__ = ["bank_from_trainer", "oracle_of_run", "read_rows", "shard_from_trainer"]

_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that come to every sample, in one epoch or another."""

_CURE = (
    "Give the bank yourself: PosteriorMonitor(LatentBank(x, labels)), or "
    "LatentBank.from_batches(loader, num_rows)."
)


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
        dtype: Storage; default that of the samples.

    Returns:
        The bank; that of the data module, if it has one. A data set that augments at random gives
        one draw of each sample, with a warning. One that draws from a generator of its own, hidden
        in the data set, is advanced by reading.

    Raises:
        ValueError: If the loader cannot be read twice or has no length, with the cure.
        MemoryError: See `LatentBank.from_batches`.
    """
    own = _own(trainer, "latent_bank")
    if own is not None:
        return own
    loader, dataset = _map_style(trainer.train_dataloader)

    batches = partial(_batches, trainer, pl_module, loader)
    with isolate_rng(), torch.no_grad():
        few = Subset(dataset, range(min(16, len(dataset))))
        # Never here if the run has workers: a file that a data set opens when it is first read
        # would be handed on to every worker forked later.
        workers = min(1, loader.num_workers)
        once, again = (
            torch.cat([find_checked(find, batch)[0] for batch in batches(few, workers)])
            for _ in range(2)
        )
        if not torch.equal(once.nan_to_num(), again.nan_to_num()):
            rank_zero_warn(
                "The training set gives other values of x_1 each time it is read (augmentation, "
                "or latents resampled from mean and std). The bank holds one draw of each sample: "
                "the navigation stage is measured well, but x_1 of a training batch is not a bank "
                "row, so do not use this bank for training targets."
            )
        with tqdm(
            total=len(dataset),
            desc="stagewise: reading the bank",
            unit="row",
            disable=not trainer.is_global_zero,
        ) as bar:
            return LatentBank.from_batches(
                batches(dataset, loader.num_workers),
                len(dataset),
                find=find,
                dtype=dtype,
                class_wise=class_wise,
                copies=trainer.num_devices,
                advance=lambda done: bar.update(done - bar.n),
            )


def shard_from_trainer(trainer: pl.Trainer) -> LatentBank:
    """This rank's part of the training set, for an engine that shards the bank over ranks.

    Args:
        trainer: A trainer whose data module has a method `latent_shard()`, as `LatentsData` has.

    Raises:
        ValueError: If it has none.
    """
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
) -> tuple[Tensor, Tensor | None]:
    """Reads random samples of a loader's data set, as `bank_from_trainer` reads all of them.

    Args:
        trainer: A running trainer.
        pl_module: Its module.
        loader: Its training or validation data loader.
        count: How many distinct samples; all if there are fewer.
        find: From a batch to `(x_1, labels or None)`.
        seed: Of the choice, and of what the data set draws from global generators: two readings
            with the same seed give the same samples even if they are augmented. Default 0.

    Returns:
        `x_1`, (count, *), and labels, (count,), or None, on the CPU, in the order of the data set.

    Raises:
        ValueError: If the loader cannot be read twice or has no length.
    """
    loader, dataset = _map_style(loader)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    part = Subset(dataset, np.sort(chosen).tolist())
    with isolate_rng(), torch.no_grad():
        for reseed in (random.seed, np.random.seed, torch.manual_seed):
            reseed(seed)
        found = [
            find_checked(find, batch)
            for batch in _batches(trainer, pl_module, loader, part, min(1, loader.num_workers))
        ]
    x1 = torch.cat([x.detach().cpu() for x, _ in found])
    labels = [label.cpu() for _, label in found if label is not None]
    return x1, torch.cat(labels) if len(labels) == len(found) else None


def oracle_of_run(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    callback: pl.Callback,
    path: Path,
    *,
    given: LatentBank | None,
    find: FindSample = find_sample,
    class_wise: bool = True,
) -> Oracle:
    """The oracle over a given bank, or that of a callback before this one, or over what is read.

    Args:
        trainer: A trainer whose training data loader is set up.
        pl_module: Its module.
        callback: Who asks; the hooks of callbacks before it have run when its own do.
        path: The path of training; an oracle of another path is not taken.
        given: The bank that the user gave, or None.
        find: See `bank_from_trainer`.
        class_wise: See `bank_from_trainer`.

    Returns:
        The oracle; a bank of its own lies beside the training if there is room.
    """
    if given is None:
        callbacks = getattr(trainer, "callbacks", [callback])
        for before in callbacks[: callbacks.index(callback)]:
            oracle = getattr(before, "oracle", None)
            if isinstance(oracle, Oracle) and same_path(oracle.path, path):
                return oracle
        given = bank_from_trainer(trainer, pl_module, find=find, class_wise=class_wise)
    return Oracle(beside_training(given, trainer), path)


def _batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any, dataset: Any, num_workers: int
) -> Iterator[Any]:
    """The batches of a data set, read by a loader of our own and moved as in training."""
    reader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=getattr(loader.batch_sampler, "batch_size", None) or 64,
        collate_fn=loader.collate_fn,
        num_workers=num_workers,
        worker_init_fn=loader.worker_init_fn if num_workers else None,
        multiprocessing_context=loader.multiprocessing_context if num_workers else None,
        generator=torch.Generator(),
    )
    for batch in reader:
        # The same three steps as in Lightning's training loop.
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _map_style(loader: Any) -> tuple[DataLoader[Any], Any]:
    """The loader and the data set whose every item is one training sample."""
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Expected one DataLoader for training, got {type(loader).__name__}. {_CURE}"
        )
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise ValueError(
            "The training set is iterable and has no length, and reading it for the bank would "
            f"take samples from training. {_CURE}"
        )
    if loader.batch_sampler is None:
        raise ValueError(
            f"The training loader does no batching of its own (batch_size=None). {_CURE}"
        )
    data = loader.dataset
    fixed = getattr(data, "fixed", None)
    if callable(fixed):
        data = fixed()
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # Under several processes Lightning wraps a sampler that it does not know.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    size = len(loader.dataset)
    if isinstance(sampler, SubsetRandomSampler):
        return loader, Subset(data, list(sampler.indices))
    if isinstance(sampler, WeightedRandomSampler):
        rank_zero_warn(
            "The training loader draws its samples with weights. The bank holds each sample once, "
            "so its posterior is that of unweighted training."
        )
    elif not isinstance(sampler, _WHOLE) and isinstance(sampler, Sized) and len(sampler) != size:
        rank_zero_warn(
            f"The sampler of the training loader, {type(sampler).__name__}, draws {len(sampler)} "
            f"of {size} samples, and the bank holds all {size}. If the others are never trained "
            f"on, leave them out: torch.utils.data.Subset. {_CURE}"
        )
    return loader, data
