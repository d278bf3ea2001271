"""Reads rows of a data set as training reads them, in any order."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from stagewise.bank import LatentBank
from stagewise.batches import PADDED, ReadBatch, describe, read_checked
from stagewise.drawn_rows import CURE
from stagewise.masks import MaskedLabels, fitted

__all__ = ["RowReader", "same_rows"]


class RowReader:
    """Reads rows by a new loader with the data set and the settings of the training loader.

    If the data set has a method `fixed()`, what that returns is read: its samples without random
    draws. If it is several times as long (both flips of each), i + N is a version of sample i.
    Refuses data sets that cannot be read twice or have no length, with the cure. `move` makes a
    batch of a training step from one of the loader.
    """

    def __init__(self, loader: Any, read_batch: ReadBatch, move: Callable[[Any], Any]) -> None:
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"Expected one DataLoader for training, got {type(loader).__name__}. {CURE}"
            )
        if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
            raise ValueError(
                "The training set is iterable and has no length, and reading it for the bank would "
                f"take samples from training. Measure over the last samples seen instead: "
                f"StageRun(reservoir=4096). {CURE}"
            )
        if loader.batch_sampler is None:
            raise ValueError(
                f"The training loader does no batching of its own (batch_size=None). {CURE}"
            )
        fixed = getattr(loader.dataset, "fixed", None)
        self.loader, self._find, self._move = loader, read_batch, move
        self._dataset: Any = fixed() if callable(fixed) else loader.dataset

    def places_of(self, rows: Sequence[int]) -> Sequence[int]:
        """The places of samples in what is read, every version of each."""
        count = len(self.loader.dataset)  # type: ignore[arg-type]
        firsts = range(0, len(self._dataset), count)
        return [first + row for first in firsts for row in rows] if len(firsts) > 1 else rows

    def read(
        self, rows: Sequence[int], *, workers: int | None = None, times: int = 1, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`x_1` and labels of rows, in batches of the loader's size; call it in `undisturbed`.

        Each batch is read `times` times, with at most `workers`, default those of the loader.
        Refuses anything but one `x_1` for each row, all of one shape, all with labels or none.
        """
        loader = self.loader
        workers = loader.num_workers if workers is None else min(workers, loader.num_workers)
        size = getattr(loader.batch_sampler, "batch_size", None) or 64
        batches: Any = BatchSampler(rows, size, drop_last=False)
        if times > 1:
            batches = [batch for batch in batches for _ in range(times)]
        reader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=batches,
            collate_fn=loader.collate_fn,
            num_workers=workers,
            worker_init_fn=loader.worker_init_fn if workers else None,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=torch.Generator().manual_seed(seed),
        )
        read, first = iter(reader), None
        try:
            for places in batches:
                span = f"{places[0]} to {places[-1]}"
                try:
                    batch = next(read)
                except RuntimeError as error:
                    if workers:
                        traceback.clear_frames(error.__traceback__)
                    raise ValueError(
                        f"The training set cannot be read in its own order, samples {span}: "
                        f"{str(error).strip().splitlines()[-1]}. {CURE}"
                    ) from error
                batch = self._move(batch)
                x1, labels = read_checked(self._find, batch)
                first = first or (x1, labels)
                if len(x1) != len(places):
                    raise ValueError(
                        f"Expected an x_1 for each of {len(places)} samples ({span}), got "
                        f"{describe(x1)}; the first batch gave {describe(first[0])}. If the "
                        f"collate function or `read_batch` leaves out or multiplies samples: {CURE}"
                    )
                if x1.shape[1:] != first[0].shape[1:] and not isinstance(labels, MaskedLabels):
                    raise ValueError(
                        f"Expected x_1 of one shape, got {describe(first[0])} in the first batch "
                        f"and {describe(x1)} in that of samples {span}. Pad or crop all to one "
                        f"shape in the collate function or in `read_batch`. {PADDED} {CURE}"
                    )
                if type(labels) is not type(first[1]):
                    raise ValueError(
                        "Expected labels in all batches or in none, got some in one and none in "
                        f"another, {describe(batch)} of samples {span}. Say which: "
                        "read_batch=lambda batch: (batch[0], None) for none."
                    )
                yield x1, labels
        finally:
            # An error holds it, and it its workers: when all are garbage, Python waits five seconds
            # for each of them.
            del read


def same_rows(bank: LatentBank, places: range, x1: Tensor, labels: object = None) -> bool:
    """Whether samples equal the rows of a bank at these places, up to its rounding."""
    x1 = fitted(x1, labels, bank.shape)[0]
    at = torch.tensor(places)
    rows = bank.take(at if bank.index is None else torch.argsort(bank.index)[at]).double()
    off = (rows - x1.flatten(1).double()).abs().max()
    return bool(off <= 4 * torch.finfo(bank.dtype).eps * x1.abs().max())
