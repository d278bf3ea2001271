"""`Host`: what a run asks of its training, which is a Lightning `Trainer` or a `Watch`.

Ranks are those of `torch.distributed`, if it is initialised. Every rank makes the same collective
calls in the same order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
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

__all__ = ["Host", "TrainerHost", "changes"]


def changes(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Whether an optimizer steps on a parameter of a module."""
    own = {id(one) for one in module.parameters()}
    return any(id(one) in own for group in optimizer.param_groups for one in group["params"])


class Host:
    """What a run asks of its training.

    Attributes:
        module: What is trained, on `device`.
        global_step: Optimizer steps so far; `total`: those of the training, None if not known.
        epoch: Passes through the training loader so far.
        accumulate: Batches in an optimizer step.
        limits: The most batches in an epoch, epochs, and batches in the whole training.
        automatic: Whether backward passes are announced (Lightning's automatic optimisation).
        loader: The training loader.
        feeds: Whether all batches of the training come from that loader.
        data: A data module that may have `latent_bank()`, `latent_shard()` or `find_sample(batch)`.
        known: Objects that a sampler may refer to and that are not copied with it.
        optimizers: Those of the module.
        speakers: Objects that may name events in an attribute `event_kinds`.
        averages: Whether an average of the weights is kept.
        loggers: Each has `log_metrics(values, step=)`; see `writer` for the rest.
        log_every: Optimizer steps between logs, 0: never.
        by_hand: For messages: how to make a target steerable that no object makes.
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
        """The default folder of a callback's files; None: no files. A collective."""
        return Path(f"{name}_logs")

    def held_out_loader(self) -> Any:
        """The first validation loader, None if there is none."""
        return None

    def trains(self) -> bool:
        """Whether a target that is made now is one of training."""
        return True

    def move(self, batch: Any) -> Any:
        """A batch of the loader, as the training step is given it."""
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), batch)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which training calls its network."""
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
        """The number of processes."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The number of this process."""
        return dist.get_rank() if self.world_size > 1 else 0

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
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
        """Raises on every rank if the block fails on one; a collective at its end.

        There may be no collective in the block. `what` names it in the error of the other ranks.
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
    global_step = property(attrgetter("trainer.global_step"))  # type: ignore[assignment]
    epoch = property(attrgetter("trainer.current_epoch"))  # type: ignore[assignment]
    loader = property(attrgetter("trainer.train_dataloader"))
    local_rank = property(attrgetter("trainer.local_rank"))
    local_size = property(attrgetter("trainer.num_devices"))

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
        # Found by its attribute: `WeightAveraging` came with Lightning 2.6.
        self._average = next((one for one in callbacks if hasattr(one, "_average_model")), None)
        self.averages = self._average is not None
        self.log_every = getattr(trainer, "log_every_n_steps", 0)

    @property
    @override
    def limits(self) -> tuple[float, float, float]:  # type: ignore[override]
        trainer = self.trainer
        if trainer.fast_dev_run:  # its bank is the whole set all the same
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
