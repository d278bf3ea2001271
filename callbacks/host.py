"""`Host`: what a run asks of the training that hosts it. Lightning's `Trainer` is one, `Watch` too.

Ranks are those of `torch.distributed`, if it is initialised. What is collective is called by every
rank, in the same order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from stagewise.stage_target import BY_HAND

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["Host", "TrainerHost"]


class Host:
    """What a run asks of its training.

    Attributes:
        module: What is trained, on `device`.
        global_step: Optimizer steps so far, and `total`, those of the training, None without end.
        epoch: Passes through the training loader so far.
        accumulate: Batches in an optimizer step.
        limits: At most so many batches in an epoch, epochs, and batches in the whole training.
        automatic: Whether a backward pass is announced, so that a step of an optimizer says nothing
            more: it may come without a loss.
        loader: The training loader.
        feeds: Whether training takes its batches from that very loader, and from no other.
        data: What may have `latent_bank()`, `latent_shard()` or `find_sample(batch)` of its own.
        known: Objects that a sampler may refer to and that are not copied with it.
        optimizers: Those of the module.
        speakers: What may name events in an attribute `event_kinds`.
        averages: Whether an average of the weights is kept beside them.
        loggers: Each has `log_metrics(values, step=)`; what else one may have is in `writer`.
        log_every: Optimizer steps between logs, 0: never.
        by_hand: How a target that no object makes is made steerable, for messages.
    """

    module: nn.Module
    device: torch.device
    global_step: int
    total: int | None
    epoch: int = 0
    accumulate: int = 1
    limits: tuple[float, float, float] = (math.inf, math.inf, math.inf)
    automatic: bool = False
    feeds: bool = False
    loader: Any = None
    data: Any = None
    known: Sequence[Any] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()
    speakers: Sequence[Any] = ()
    averages: bool = False
    loggers: Sequence[Any] = ()
    log_every: int = 0
    by_hand: str = BY_HAND

    def folder(self, name: str) -> Path | None:
        """Where the files of a callback go that says nothing; None: nowhere. A collective."""
        return Path(f"{name}_logs")

    def held_out_loader(self) -> Any:
        """The first loader of samples that are not trained on, None if there is none."""
        return None

    def trains(self) -> bool:
        """Whether what makes targets is called by training now, as far as hooks do not tell it."""
        return True

    def move(self, batch: Any) -> Any:
        """A batch of the loader, as the training step is given it."""
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), batch)

    def precision(self) -> AbstractContextManager[Any]:
        """In which training calls its network, beside the autocast that is seen in the call."""
        return nullcontext()

    def average(self) -> nn.Module | None:
        """The module with averaged weights; None if there are none yet."""
        return None

    def save(self, file: Path) -> None:
        """Saves a whole checkpoint; a collective."""
        raise NotImplementedError

    # -- ranks ------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Processes that train."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The number of this one."""
        return dist.get_rank() if self.world_size > 1 else 0

    @property
    def local_rank(self) -> int:
        """Its number on its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) if self.world_size > 1 else 0

    @property
    def local_size(self) -> int:
        """Processes on this machine."""
        many = self.world_size
        return int(os.environ.get("LOCAL_WORLD_SIZE", many)) if many > 1 else 1

    def reduce(self, value: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Adds up a tensor over ranks, or takes the largest; a collective."""
        if self.world_size == 1:
            return value
        own = value.to(self.device, copy=True)
        dist.all_reduce(own, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return own.to(value.device)

    def gather(self, value: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, stacked; a collective."""
        if self.world_size == 1:
            return value[None]
        own = value.to(self.device).contiguous()
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own)
        return torch.stack(every).to(value.device)

    def any(self, value: bool) -> bool:
        """Whether something holds on any rank; a collective."""
        if self.world_size == 1:
            return value
        return bool(self.reduce(torch.tensor(float(value), device=self.device), "max"))

    def all(self, value: bool) -> bool:
        """Whether something holds on every rank; a collective."""
        return not self.any(not value)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Does something on every rank, or raises on all of them; a collective at its end.

        Nothing in it may wait for others. A rank that could do it says that another failed in
        `what`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ValueError(f"Another process failed in {what}; see its message.")


class TrainerHost(Host):
    """A trainer of Lightning, once its training loader is set up (`on_train_start`)."""

    feeds = True

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer: Any = trainer
        self.module = self._module = module
        self.device = trainer.strategy.root_device
        total = trainer.estimated_stepping_batches
        self.total = None if math.isinf(total) else int(total)
        self.accumulate, self.loggers = trainer.accumulate_grad_batches, trainer.loggers
        self.automatic = module.automatic_optimization
        self.data, self.optimizers = getattr(trainer, "datamodule", None), trainer.optimizers
        self.known = (trainer, module, self.data)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.speakers = (*callbacks, module)
        # By what a `WeightAveraging` has: it came with Lightning 2.6.
        keeps = [one for one in callbacks if hasattr(one, "_average_model")]
        self._average, self.averages = next(iter(keeps), None), bool(keeps)
        self.log_every = getattr(trainer, "log_every_n_steps", 0)

    @property
    @override
    def global_step(self) -> int:  # type: ignore[override]
        return self.trainer.global_step

    @property
    @override
    def epoch(self) -> int:  # type: ignore[override]
        return self.trainer.current_epoch

    @property
    @override
    def loader(self) -> Any:  # type: ignore[override]
        return self.trainer.train_dataloader

    @property
    @override
    def limits(self) -> tuple[float, float, float]:  # type: ignore[override]
        trainer = self.trainer
        if trainer.fast_dev_run:  # which is no training, and cuts nothing
            return math.inf, math.inf, math.inf
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        counted = trainer.max_steps != -1 and self.automatic
        batches = trainer.max_steps * trainer.accumulate_grad_batches if counted else math.inf
        return trainer.num_training_batches, epochs, batches

    @override
    def folder(self, name: str) -> Path | None:
        trainer = self.trainer
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: on every rank
        if trainer.fast_dev_run:
            return None
        return log_dir / (name if trainer.loggers else f"{name}_logs")

    @override
    def held_out_loader(self) -> Any:
        trainer = self.trainer
        if trainer.val_dataloaders is None and trainer.enable_validation:
            # Where the first epoch has no validation Lightning sets it up later, in the same way.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        loader = trainer.val_dataloaders
        return loader[0] if isinstance(loader, (list, tuple)) and loader else loader

    @override
    def move(self, batch: Any) -> Any:
        # The three steps of Lightning's own loop.
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    @override
    def precision(self) -> AbstractContextManager[Any]:
        return self.trainer.precision_plugin.forward_context()

    @override
    def average(self) -> nn.Module | None:
        averaged = None if self._average is None else self._average._average_model
        return averaged.module if averaged is not None and bool(averaged.n_averaged) else None

    @override
    def save(self, file: Path) -> None:
        self.trainer.save_checkpoint(file, weights_only=False)

    @property
    @override
    def local_rank(self) -> int:
        return self.trainer.local_rank

    @property
    @override
    def local_size(self) -> int:
        return self.trainer.num_devices
