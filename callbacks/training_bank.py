"""The bank of a run, read from its own training data loader without disturbing the run.

A data module with a method `latent_bank()` that returns a `LatentBank` is asked for it instead. A
data set with a method `fixed()` is read through what that returns: its samples without draws. Every
other sample that the run draws is read once, in order, by a loader of our own over the run's data
set, with the run's collate function and batch-transfer hooks, the module being in evaluation mode.
All random state is put back afterwards, so training draws what it would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from tqdm.auto import tqdm

from stagewise.bank import LatentBank
from stagewise.batches import FindSample, describe, find_checked, find_sample
from stagewise.drawn_rows import CURE, Drawn, drawn_rows
from stagewise.undisturbed import undisturbed

__all__ = ["bank_from_trainer", "read_rows", "same_samples", "shard_from_trainer"]

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
        dtype: Storage; default that of the samples.

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
    loader, dataset = _map_style(trainer.train_dataloader)
    # Labels that are not asked for may be in some batches and not in others.
    taken = find if class_wise else lambda batch: (find_checked(find, batch)[0], None)
    with undisturbed(pl_module, loader, find):
        rows = _drawn(trainer, loader, say=True)
        step = -(-len(rows) // _READ_TWICE)
        twice = [few for few in _batches(loader, rows[::step]) for _ in range(2)]
        # Never here if the run has workers: a file that a data set opens when it is first read
        # would be handed on to every worker forked later.
        one = min(1, loader.num_workers)
        read = list(_samples(trainer, pl_module, loader, dataset, twice, taken, one, seed=1))
        once, again = (torch.cat([x1.detach().cpu() for x1, _ in read[k::2]]) for k in range(2))
        samples = _samples(
            trainer, pl_module, loader, dataset, _batches(loader, rows), taken, loader.num_workers
        )
        with tqdm(
            total=len(rows),
            desc="stagewise: reading the bank",
            unit="row",
            disable=not trainer.is_global_zero,
        ) as bar:
            bank = LatentBank.from_batches(
                samples,
                len(rows),
                find=lambda sample: sample,
                dtype=dtype,
                copies=trainer.num_devices,
                advance=lambda done: bar.update(done - bar.n),
            )
    # Within a pass nothing is seeded again; between two the workers are, if not as in training.
    if not (torch.equal(once, again) and _holds(bank, range(0, len(rows), step), once)):
        rank_zero_warn(
            "The training set gives other values of x_1 each time it is read (augmentation, or "
            "latents resampled from mean and std). The bank holds one draw of each sample: the "
            "navigation stage is measured well, but x_1 of a training batch is not a bank row, so "
            "do not use this bank for training targets."
        )
    return bank


def _holds(bank: LatentBank, places: range, x1: Tensor) -> bool:
    """Whether samples read again are the rows at their places, up to the bank's rounding."""
    at = torch.tensor(places)
    rows = bank.take(at if bank.index is None else torch.argsort(bank.index)[at]).double()
    off = (rows - x1.flatten(1).double()).abs().max()
    return bool(off <= 4 * torch.finfo(bank.dtype).eps * x1.abs().max())


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
    with undisturbed(pl_module, loader, find, seed=seed):
        rows = _drawn(trainer, loader)
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        batches = _batches(loader, [rows[place] for place in np.sort(chosen)])
        one = min(1, loader.num_workers)
        found = list(_samples(trainer, pl_module, loader, dataset, batches, find, one, seed))
    labels = [label.cpu() for _, label in found if label is not None]
    return torch.cat([x.detach().cpu() for x, _ in found]), torch.cat(labels) if labels else None


def same_samples(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    bank: LatentBank,
    *,
    find: FindSample = find_sample,
    seed: int = 0,
) -> bool:
    """Whether the training loader of now draws what a bank holds.

    For a run that replaces its loader (`trainer.train_dataloader is not before`). Where samples are
    augmented no loader does.

    Args:
        trainer: A running trainer.
        pl_module: Its module.
        bank: What was read from an earlier loader.
        find: From a batch to `(x_1, labels or None)`.
        seed: Of the choice of the samples that are looked up, default 0.

    Raises:
        ValueError: If the loader cannot be read.
    """
    x1, _ = read_rows(trainer, pl_module, trainer.train_dataloader, 8, find=find, seed=seed)
    return tuple(x1.shape[1:]) == bank.shape and bool((bank.find(x1) >= 0).all())


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
            _say_if_few(trainer, drawn)
    return drawn.rows


def _say_if_few(trainer: pl.Trainer, drawn: Drawn) -> None:
    """Says it if the whole training draws fewer samples than there are rows."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = math.inf
    if trainer.max_steps != -1 and trainer.lightning_module.automatic_optimization:
        steps = trainer.max_steps * trainer.accumulate_grad_batches
    draws = drawn.per_batch * min(epochs * drawn.batches, steps)
    if draws >= len(drawn.rows):
        return
    cut = drawn.batches < len(drawn.rows) // drawn.per_batch
    (rank_zero_warn if cut else rank_zero_info)(
        f"The training loader draws {draws:.0f} samples in the whole training, and the bank holds "
        f"the {len(drawn.rows)} that may come up. The boundary is that of training on all of them. "
        "Train for longer, or on fewer: torch.utils.data.Subset(dataset, indices)."
    )


def _batches(loader: DataLoader[Any], rows: Sequence[int]) -> BatchSampler:
    """Rows in order, in batches of the run's size."""
    return BatchSampler(rows, getattr(loader.batch_sampler, "batch_size", None) or 64, False)


def _samples(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: DataLoader[Any],
    dataset: Any,
    batches: Iterable[list[int]],
    find: FindSample,
    workers: int,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`x_1` and labels of batches of rows, read by a loader of our own and moved as in training.

    Raises:
        ValueError: If they are not one `x_1` for each row, all of one shape, with labels or all
            without, with the cure.
    """
    reader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
        num_workers=workers,
        worker_init_fn=loader.worker_init_fn if workers else None,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=torch.Generator().manual_seed(seed),
    )
    read, first = iter(reader), None
    for rows in batches:
        try:
            batch = next(read)
        except RuntimeError as error:
            raise ValueError(
                "The training set cannot be read in its own order, samples "
                f"{rows[0]} to {rows[-1]}: {str(error).strip().splitlines()[-1]}. {CURE}"
            ) from error
        # The same three steps as in Lightning's training loop.
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        x1, labels = find_checked(find, trainer.strategy.batch_to_device(batch, dataloader_idx=0))
        first = first or (x1, labels)
        if len(x1) != len(rows):
            raise ValueError(
                f"Expected an x_1 of each of {len(rows)} samples ({rows[0]} to {rows[-1]}), got "
                f"{describe(x1)}; the first batch gave {describe(first[0])}. If the collate "
                f"function or `find` leaves samples out, or makes several of one: {CURE}"
            )
        if x1.shape[1:] != first[0].shape[1:]:
            raise ValueError(
                f"Expected x_1 of one shape, got {describe(first[0])} in the first batch and "
                f"{describe(x1)} in that of samples {rows[0]} to {rows[-1]}. Pad or crop all to "
                f"one shape in the collate function or in `find`. {CURE}"
            )
        if (labels is None) != (first[1] is None):
            raise ValueError(
                "Expected labels in all batches or in none, got some in one and none in another, "
                f"{describe(batch)} of samples {rows[0]} to {rows[-1]}. Say which: "
                "find=lambda batch: (batch[0], None) for none."
            )
        yield x1, labels


def _map_style(loader: Any) -> tuple[DataLoader[Any], Any]:
    """The loader and the data set whose every item is one training sample."""
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Expected one DataLoader for training, got {type(loader).__name__}. {CURE}"
        )
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise ValueError(
            "The training set is iterable and has no length, and reading it for the bank would "
            f"take samples from training. {CURE}"
        )
    if loader.batch_sampler is None:
        raise ValueError(
            f"The training loader does no batching of its own (batch_size=None). {CURE}"
        )
    fixed = getattr(loader.dataset, "fixed", None)
    return loader, fixed() if callable(fixed) else loader.dataset
