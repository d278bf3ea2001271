"""The bank of a run, read from its training loader without disturbing the run.

A method `latent_bank()` of the data module gives the bank instead. A method `fixed()` of the data
set gives its samples without random draws. Every other sample that the run draws is read once, in
order, by a separate loader over the same data set, with the run's collate function and transfer
hooks, while the module is in evaluation mode. Random state is restored, so training draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from stagewise.bank import LatentBank
from stagewise.batches import PADDED, ReadBatch, find_sample, read_checked, seems_padded
from stagewise.callbacks.host import Host, TrainerHost
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.condition import Condition
from stagewise.drawn_rows import drawn_rows
from stagewise.masks import MaskedLabels, compared_within, join, zeroed
from stagewise.memory import format_bytes
from stagewise.row_reader import RowReader, same_rows
from stagewise.undisturbed import undisturbed

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Samples", "bank_from_trainer", "read_bank", "read_rows", "read_shard"]

Samples = tuple[Tensor, "Tensor | MaskedLabels | None"]
"""Samples, (n, *), and their labels, (n,), or None, on the CPU; with masks `MaskedLabels`."""

_LARGE = 10**9
"""Bytes above which a bank for training on a CUDA device has 16 bits."""

_READ_TWICE = 32  # samples: what changes one in ten is seen with a chance of 99.8 %


def bank_from_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, **options: Any
) -> LatentBank:
    """Reads the bank of a trainer whose loader is set up (`on_train_start` or later)."""
    return read_bank(TrainerHost(trainer, pl_module), **options)


def read_bank(
    host: Host,
    *,
    read_batch: ReadBatch = find_sample,
    class_wise: bool = True,
    dtype: torch.dtype | None = None,
    condition: Condition | None = None,
) -> LatentBank:
    """Reads the training set of a running training into a bank in host memory.

    Under several processes every rank reads the whole set.

    Args:
        host: The training.
        read_batch: From a batch to `(x_1, labels or None)`.
        class_wise: Whether to keep labels, default True.
        dtype: Storage; default that of the samples, or bfloat16, with a line of log, if they take
            more than 1 GB and training is on a CUDA device.
        condition: Its conditions are stored, too, for which the set is read once more.

    Returns:
        The bank; that of the data module, if it has one. Its rows are those that the sampler draws
        (`drawn_rows`). A data set that augments at random gives one draw of each, with a warning.

    Raises:
        ValueError: If the loader cannot be read twice or has no length, or its batches cannot be
            rows of a bank.
        MemoryError: See `LatentBank.from_batches`.
    """
    own = _own(host, "latent_bank")
    if own is not None:
        return own

    # Labels that are not needed may be missing in some batches.
    def taken(batch: Any) -> tuple[Tensor, Any]:
        x1, labels = read_checked(read_batch, batch)
        return x1, compared_within(labels, class_wise)

    reader = RowReader(host.loader, taken, host.move)
    with undisturbed(host.module, reader.loader, read_batch):
        rows = reader.places_of(_drawn(host, reader.loader, say=True))
        step = -(-len(rows) // _READ_TWICE)
        # In a worker, if the run has workers: a file that the data set opens at its first read
        # would be inherited by every worker forked later.
        twice = [
            (x1.cpu(), None if labels is None else labels.cpu())
            for x1, labels in reader.read(rows[::step], workers=1, times=2, seed=1)
        ]
        (once, labels), (again, _) = join(twice[::2]), join(twice[1::2])
        once, again = zeroed(once, labels), zeroed(again, labels)
        dtype = dtype or storage_beside(host.device, len(rows), once)
        with tqdm(
            total=len(rows),
            desc="stagewise: reading the bank",
            unit="row",
            disable=host.rank > 0,
        ) as bar:
            bank = LatentBank.from_batches(
                reader.read(rows),
                len(rows),
                read_batch=lambda sample: sample,
                dtype=dtype,
                copies=host.local_size,
                advance=lambda done: bar.update(done - bar.n),
            )
        if condition is not None:

            def find_condition(batch: Any) -> Samples:
                c = condition.of(batch, *read_checked(read_batch, batch))
                return c.reshape(len(c), -1).float(), None

            given = RowReader(host.loader, find_condition, host.move)
            bank = bank.with_conditions(torch.cat([c.cpu() for c, _ in given.read(rows)]))
    if not isinstance(labels, MaskedLabels) and seems_padded(once):
        rank_zero_warn(
            "Many samples end in zeros, at different steps: if that is padding, it counts as data "
            f"in distances and errors. {PADDED}"
        )
    # Workers are seeded between passes, not within one: two reads of each kind are compared.
    if not (torch.equal(once, again) and same_rows(bank, range(0, len(rows), step), once, labels)):
        rank_zero_warn(
            "The training set gives other values of x_1 each time it is read (augmentation, or "
            "latents resampled from mean and std). The bank holds one draw of each sample: the "
            "navigation stage is measured well, but x_1 of a training batch is not a bank row. In "
            "oracle targets it is added to the rows, beside the stored draw of the same sample. "
            "To use the last samples seen instead: StageRun(reservoir=4096), but for a smoothing, "
            "which needs the `source` of such samples (`stagewise.sources`)."
        )
    return bank


def storage_beside(device: torch.device, count: int, samples: Tensor) -> torch.dtype | None:
    """bfloat16, with a line of log, for a bank over 1 GB of training on a CUDA device, or None.

    `count` is that of all rows, `samples` are some of them, (n, *).
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
        "mean square; each number by 0.39% at most); x_1 itself is not rounded. To store all "
        "digits: StageRun(bank=LatentBank(x, labels))."
    )
    return torch.bfloat16


def read_shard(host: Host) -> LatentBank:
    """This rank's part of the training set, for an engine that shards the bank over ranks."""
    shard = _own(host, "latent_shard")
    if shard is None:
        raise ValueError(
            "Sharded() needs the part of the bank that each rank holds: give it, bank=LatentBank("
            "x[shard_rows(len(x), rank, world_size)].clone()), or use a data module with "
            "`latent_shard()`."
        )
    return shard


def _own(host: Host, name: str) -> LatentBank | None:
    """The bank that a method of the data module returns; None if it has no such method."""
    method = getattr(host.data, name, None)
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
    host: Host,
    loader: Any,
    count: int,
    *,
    read_batch: ReadBatch = find_sample,
    seed: int = 0,
) -> Samples:
    """Reads random samples of a loader's data set as `read_bank` does, in the set's order.

    The same seed gives the same samples, also if they are augmented.
    """
    reader = RowReader(loader, read_batch, host.move)
    with undisturbed(host.module, loader, read_batch, seed=seed):
        rows = _drawn(host, loader)
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        few = [rows[place] for place in np.sort(chosen)]
        found = list(reader.read(few, workers=1, seed=seed))
    x1, labels = join([(x.detach().cpu(), None if y is None else y.cpu()) for x, y in found])
    return zeroed(x1, labels), labels


def _drawn(host: Host, loader: DataLoader[Any], *, say: bool = False) -> Sequence[int]:
    """The rows that a loader draws, in the training loader within the limits of training."""
    limit, epochs, batches = host.limits if loader is host.loader else 3 * [math.inf]
    drawn = drawn_rows(
        loader, limit=limit, world_size=host.world_size, epoch=host.epoch, kept=host.known
    )
    size = len(loader.dataset)  # type: ignore[arg-type]
    if say:
        if len(drawn.rows) < size:
            rank_zero_info(f"Training draws {len(drawn.rows)} of {size} samples: the bank's rows.")
        if drawn.looked:
            rank_zero_info(f"The sampler has no end: {drawn.looked} of its draws were read.")
        for warning in drawn.warnings:
            rank_zero_warn(f"The training loader draws {warning}")
        few = drawn.few(epochs, batches)
        if few:
            (rank_zero_warn if drawn.cut else rank_zero_info)(few)
    return drawn.rows
