"""The order of training samples: a function of seed, epoch and place, also after a resume."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler
from typing_extensions import override

__all__ = ["EpochOrder", "ResumableData"]


class EpochOrder(DistributedSampler[int]):
    """Shuffles each epoch by (seed, epoch) alone, and can begin in the middle of one.

    R ranks share an order: the first B R samples of it are the first batches of all ranks, and rank
    r has every R-th of them, from r on. So the samples of a step depend on B R only. Samples that
    do not fill a batch on every rank are left out of the epoch.

    Lightning sets the epoch, and does not replace a `DistributedSampler`.

    Args:
        dataset: What is ordered; only its length is used, at least B R.
        batch_size: B, of each rank.
        seed: Default 0.
        rank: Default 0.
        num_replicas: R, default 1.
        on_epoch: Called with each epoch before its order is made.
        trained: Returns the number of batches trained so far, for `set_epoch`.
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
        trained: Callable[[], int] | None = None,
    ) -> None:
        self.size = len(dataset)
        if self.size < batch_size * num_replicas:
            raise ValueError(
                f"Expected at least one batch of training samples, {batch_size} on each of "
                f"{num_replicas} ranks, got {self.size}. Lower `batch_size`."
            )
        about = {"num_replicas": num_replicas, "rank": rank, "seed": seed, "drop_last": True}
        super().__init__(cast(Dataset[Any], dataset), **about)  # type: ignore[arg-type]
        self.batch_size, self.on_epoch = batch_size, on_epoch
        self.num_batches = self.size // (batch_size * num_replicas)  # of an epoch, on each rank
        self._trained = trained
        self._start, self._offset = 0, 0
        self._begun: int | None = None

    @override
    def set_epoch(self, epoch: int) -> None:
        """Chooses an epoch; a new one starts with its first batch.

        Between `start` and the first trained batch, Lightning passes its own number of the epoch
        that was begun. After a resume at the end of an epoch or a training it is wrong, or passed
        twice with different values. Then only the difference of the numbers is kept.
        """
        if self._begun is not None and self._trained and self._trained() == self._begun:
            self._offset = self.epoch - epoch
        epoch += self._offset
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def start(self, epoch: int, batch: int) -> None:
        """Begins the next iteration after a number of batches of an epoch."""
        passed, batch = divmod(batch, self.num_batches)
        self.epoch, self._start, self._offset = epoch + passed, batch, 0
        self._begun = None if self._trained is None else self._trained()

    def __len__(self) -> int:
        """Samples of an epoch on this rank, also those before the start."""
        return self.num_batches * self.batch_size

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochOrder:
        """The same order at the beginning of its epoch, without the two callbacks."""
        order = copy.copy(self)
        order.on_epoch = order._trained = order._begun = None
        order._start = order._offset = 0
        return order

    def __iter__(self) -> Iterator[int]:
        if self.on_epoch is not None:
            self.on_epoch(self.epoch)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        used = order[: len(self) * self.num_replicas]
        begin = self._start * self.batch_size * self.num_replicas
        self._start = 0
        return iter(used[begin + self.rank :: self.num_replicas].tolist())


class ResumableData(L.LightningDataModule):
    """A data module whose training resumes with the batch after that of the checkpoint.

    Lightning alone would restart the interrupted epoch. `batch_size` is that of each rank, `seed`
    that of the order.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._state: dict[str, Any] | None = None
        self._order: EpochOrder | None = None
        self._fingerprint = ""

    def train_loader(
        self, dataset: Any, on_epoch: Callable[[int], object] | None = None
    ) -> DataLoader[Any]:
        """Shuffled batches, from the place of the run; the next call starts from the beginning.

        Refuses a checkpoint made with other samples, or another number of them in all or per step.
        """
        rank, ranks = self.ranks()
        order = EpochOrder(
            dataset,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            num_replicas=ranks,
            on_epoch=on_epoch,
            trained=self._trained,
        )
        self._order, self._fingerprint = order, _fingerprint(dataset)
        # A second training in this process begins at its own beginning.
        state, self._state = self._state, None
        if state is not None:
            self._require_same(state, len(dataset), self.batch_size * ranks)
            order.start(state["epoch"], state["batch"])
            # Lightning looks only at the loader, and warns that it restarts the epoch.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        return self._loader(dataset, order, drop_last=True)

    def val_loader(self, dataset: Any) -> DataLoader[Any]:
        """All samples, in their order."""
        return self._loader(dataset, SequentialSampler(dataset), drop_last=False)

    def ranks(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def _loader(self, dataset: Any, sampler: Sampler[int], *, drop_last: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A loader draws a seed when it is iterated: not from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _require_same(self, state: dict[str, Any], count: int, batch: int) -> None:
        samples, found = state.get("samples", count), state.get("fingerprint", self._fingerprint)
        cure = "or begin a new run from its weights: weights=CHECKPOINT run_dir=FOLDER resume=false"
        if samples != count:
            raise ValueError(
                f"The checkpoint was made with {samples} training samples, and there are {count}. "
                f"Give the data that it was trained on, {cure}."
            )
        if found != self._fingerprint:
            raise ValueError(
                f"The checkpoint was made with other training samples: their fingerprint is "
                f"{found}, and here it is {self._fingerprint}. Give the data that it was trained "
                f"on, {cure}."
            )
        if state["batch_size"] != batch:
            raise ValueError(
                f"The checkpoint was made with batches of {state['batch_size']} samples over all "
                f"ranks, and this run has {batch}. Change data.batch_size, which is that of one of "
                f"the {self.ranks()[1]} ranks, {cure}."
            )

    def _trained(self) -> int:
        trainer = self.trainer
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready if trainer else 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """The `epoch`, the next `batch` of it, and what a resumed run must share."""
        trainer, order = self.trainer, self._order
        if trainer is None or trainer.train_dataloader is None or order is None:
            return {}
        epoch, batch = order.epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batch >= trainer.num_training_batches:
            epoch, batch = epoch + 1, 0
        of = {"batch_size": order.batch_size * order.num_replicas, "samples": order.size}
        return {"epoch": epoch, "batch": batch, **of, "fingerprint": self._fingerprint}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


def _fingerprint(dataset: Any, most: int = 256) -> str:
    """A hash of some samples and their labels, without random draws of them."""
    items = dataset.fixed() if hasattr(dataset, "fixed") else dataset
    digest = hashlib.sha256()
    for place in range(0, len(items), -(-len(items) // most)):
        for part in items[place][:2]:  # x_1, label; the row in a bank depends on the ranks
            digest.update(torch.as_tensor(part).double().numpy().tobytes())
    return digest.hexdigest()[:16]
