"""The order in which training meets its samples: a function of seed, epoch and place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import lightning as L
import numpy as np
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["EpochOrder", "ResumableData"]


class EpochOrder(DistributedSampler[int]):
    """Shuffles each epoch by (seed, epoch) alone, and can begin in the middle of one.

    R ranks share an order: the first B R samples of it are the first batches of all ranks, rank r
    having every R-th of them, from r on. So what a step trains on does not depend on R, if B R does
    not. What does not fill a batch on every rank is left to another epoch.

    Lightning sets the epoch, and leaves a `DistributedSampler` as it is.

    Args:
        dataset: What is ordered; its length counts.
        batch_size: B, of each rank.
        seed: Default 0.
        rank: Default 0.
        num_replicas: R, default 1.
        on_epoch: Called with each epoch before its order is made.

    Raises:
        ValueError: If there are fewer than B R samples.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        on_epoch: Callable[[int], object] | None = None,
    ) -> None:
        if len(dataset) < batch_size * num_replicas:
            raise ValueError(
                f"Expected at least one batch of training samples, {batch_size} on each of "
                f"{num_replicas} ranks, got {len(dataset)}. Lower `batch_size`."
            )
        super().__init__(
            cast(Dataset[Any], dataset),
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
            drop_last=True,
        )
        self.batch_size, self.on_epoch = batch_size, on_epoch
        self._start = 0

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, on each rank."""
        return len(cast(Sized, self.dataset)) // (self.batch_size * self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Chooses an epoch; if it is another one, it begins at its beginning."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def start(self, epoch: int, batch: int) -> None:
        """Begins behind a number of batches of an epoch, this time only."""
        passed, batch = divmod(batch, self.num_batches)
        self.epoch, self._start = epoch + passed, batch

    def __len__(self) -> int:
        """Samples of an epoch on this rank, those that are passed over included."""
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        if self.on_epoch is not None:
            self.on_epoch(self.epoch)
        size = len(cast(Sized, self.dataset))
        order = np.random.default_rng([self.seed, self.epoch]).permutation(size)
        used = order[: len(self) * self.num_replicas]
        begin = self._start * self.batch_size * self.num_replicas
        self._start = 0
        return iter(used[begin + self.rank :: self.num_replicas].tolist())


class ResumableData(L.LightningDataModule):
    """A data module whose training goes on with the batch that a checkpoint would have seen next.

    Without it Lightning begins an interrupted epoch with its first batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state: dict[str, int] | None = None

    def order(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int,
        on_epoch: Callable[[int], object] | None = None,
    ) -> EpochOrder:
        """The order of this rank, from where the run is.

        Args:
            dataset: The training set.
            batch_size: Of each rank.
            seed: Of the order.
            on_epoch: See `EpochOrder`.

        Raises:
            ValueError: If the checkpoint was made with another number of samples per step.
        """
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = EpochOrder(
            dataset, batch_size, seed=seed, rank=rank, num_replicas=ranks, on_epoch=on_epoch
        )
        if self._state is not None:
            together = self._state["batch_size"]
            if together != batch_size * ranks:
                raise ValueError(
                    f"The checkpoint was made with batches of {together} samples over all ranks, "
                    f"and this run has {batch_size} on each of {ranks}. Give as many, or begin a "
                    "new run from its weights."
                )
            order.start(self._state["epoch"], self._state["batch"])
        return order

    def state_dict(self) -> dict[str, int]:
        """How far training has come: `epoch`, `batch` of it, and `batch_size` over all ranks."""
        trainer = self.trainer
        if trainer is None or trainer.train_dataloader is None:
            return {}
        total = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batch = divmod(total, int(trainer.num_training_batches))
        size = trainer.train_dataloader.batch_size * trainer.world_size
        return {"epoch": epoch, "batch": batch, "batch_size": size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keeps it for `order`."""
        self._state = state_dict or None
