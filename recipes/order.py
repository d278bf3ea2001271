"""The order in which training meets its samples: a function of seed, epoch and place."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

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
        trained: How many batches have been trained on; see `set_epoch`. Default None.

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
        """Chooses an epoch; if it is another one, it begins at its beginning.

        With `trained`, from `start` on until a batch has been trained on, it only says what
        Lightning calls the epoch that was begun: where it resumes at the end of an epoch, or of a
        training, another number than the right one, or two in turn.
        """
        if self._begun is not None and self._trained and self._trained() == self._begun:
            self._offset = self.epoch - epoch
        epoch += self._offset
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def start(self, epoch: int, batch: int) -> None:
        """Begins after a number of batches of an epoch, this time only."""
        passed, batch = divmod(batch, self.num_batches)
        self.epoch, self._start, self._offset = epoch + passed, batch, 0
        self._begun = None if self._trained is None else self._trained()

    def __len__(self) -> int:
        """Samples of an epoch on this rank, those that are passed over included."""
        return self.num_batches * self.batch_size

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochOrder:
        """The same order at the beginning of its epoch, without the two calls into the run."""
        options: dict[str, Any] = {"seed": self.seed, "rank": self.rank}
        options["num_replicas"] = self.num_replicas
        order = EpochOrder(cast(Sized, self.dataset), self.batch_size, **options)
        order.epoch = self.epoch
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
    """A data module whose training goes on with the batch that a checkpoint would have seen next.

    Without it Lightning begins an interrupted epoch with its first batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state: dict[str, Any] | None = None
        self._order: EpochOrder | None = None
        self._fingerprint = ""

    def order(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int,
        on_epoch: Callable[[int], object] | None = None,
    ) -> EpochOrder:
        """The order of this rank, from where the run is; asked for again, from the beginning.

        Args:
            dataset: The training set.
            batch_size: Of each rank.
            seed: Of the order.
            on_epoch: See `EpochOrder`.

        Raises:
            ValueError: If the checkpoint was made with other samples, or another number of them, in
                all or per step.
        """
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = EpochOrder(
            dataset,
            batch_size,
            seed=seed,
            rank=rank,
            num_replicas=ranks,
            on_epoch=on_epoch,
            trained=self._trained,
        )
        self._order, self._fingerprint = order, _fingerprint(dataset)
        # A second training in this process begins at its own beginning.
        state, self._state = self._state, None
        if state is not None:
            self._refuse_others(state, len(dataset), batch_size, ranks)
            order.start(state["epoch"], state["batch"])
            # Lightning looks at the loader alone, and warns that it begins an epoch again.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        return order

    def _refuse_others(self, state: dict[str, Any], count: int, size: int, ranks: int) -> None:
        samples, found = state.get("samples", count), state.get("fingerprint", self._fingerprint)
        if samples != count:
            raise ValueError(
                f"The checkpoint was made with {samples} training samples, and there are {count}. "
                "Give the data that it was trained on, or begin a new run from its weights."
            )
        if found != self._fingerprint:
            raise ValueError(
                f"The checkpoint was made with as many training samples, {samples}, but with other "
                f"ones: their fingerprint is {found}, and here it is {self._fingerprint}. Give the "
                "data that it was trained on, or begin a new run from its weights: "
                "weights=CHECKPOINT run_dir=FOLDER resume=false."
            )
        if state["batch_size"] != size * ranks:
            raise ValueError(
                f"The checkpoint was made with batches of {state['batch_size']} samples over all "
                f"ranks, and this run has {size} on each of {ranks}. Give as many, or begin a new "
                "run from its weights."
            )

    def _trained(self) -> int:
        trainer = self.trainer
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready if trainer else 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """How far training has come: `epoch`, `batch` of it.

        And of what: `batch_size` over all ranks, `samples` of an epoch, and their `fingerprint`.
        """
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
    """Tells samples and their labels from others, by some of them, without what is drawn of one."""
    items = dataset.fixed() if hasattr(dataset, "fixed") else dataset
    seen = hashlib.sha256()
    for place in range(0, len(items), -(-len(items) // most)):
        for part in items[place][:2]:  # x_1, label; the row in a bank depends on the ranks
            seen.update(torch.as_tensor(part).double().numpy().tobytes())
    return seen.hexdigest()[:16]
