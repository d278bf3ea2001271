"""`Watch`: the callbacks of this package in your own training loop, without Lightning.

    with Watch(model, loader, PosteriorMonitor(), steps=10_000) as watch:
        for step, batch in enumerate(loader):
            watch.step(step, batch)
            ...  # loss.backward(), optimizer.step()

`step` ends the batch before and begins the next, in place of Lightning's hooks. Hooks on the
optimizer tell when weights are about to change.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook as after_steps
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps
from typing_extensions import Self, Unpack, override

from stagewise.adapters import find_couplings, find_target_makers
from stagewise.bank import LatentBank
from stagewise.callbacks.host import Host, changes
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.callbacks.run import StageRun
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.callbacks.writer import as_logger

__all__ = ["Watch"]


_IN_A_LOOP = (
    "if the loop writes the target u out, make it steerable: target = stagewise.StageTarget(), "
    "Watch(..., target=target), and once u, xt and t are made u, w = target(u, xt=xt, t=t, x1=x1) "
    "in the loop, where w weighs the loss of each sample."
)
"""What messages say about a target that no object makes."""

_BEGUN: weakref.WeakSet[Watch] = weakref.WeakSet()
"""Those whose training has begun, also if it is over."""


class Watch(Host):
    """Runs stage callbacks in your own training loop, in plain torch, Fabric or Accelerate.

    The trained weights are bit-identical with and without it. The first step is looked at before
    the optimizer changes a weight, as in Lightning. Under several processes (`torch.distributed`)
    every rank makes one, and makes the same calls.

    Args:
        model: The network that the loop calls, or a module that contains it. For `velocity=` and
            `target_maker=` it is `module.model`.
        data: The `DataLoader` of the training, which is read once more for the bank, or the bank:
            the training latents as the model is trained on them.
        *callbacks: Monitors, a `StageScheme`, ..., but no `StageRun`.
        target: What makes the targets, if that is not in the model: a `FlowMatchingLoss`, a
            matcher, a path, ...; it is `module.target`. Without one, monitors of the model need
            `velocity=`.
        steps: Optimizer steps of the training, default None: not known.
        log: Where scalars go: a function of (dict, step), such as `wandb.log` or `fabric.log_dict`,
            a `SummaryWriter`, or a logger of Lightning. Default None: to files only.
        log_every: Optimizer steps between logs of the training itself, default 50.
        held_out_loader: A `DataLoader` of samples that are not trained on, default None.
        accumulate: Batches in an optimizer step, default 1.
        **options: `RunOptions` for all callbacks: `read_batch`, `path`, `dirpath`, ... Files go to
            `<dirpath>/<name of the callback>`, default `<name>_logs`.

    Raises:
        TypeError: For a model, callback, target or log of a wrong type.
        ValueError: At the first `step` or within the first optimizer step if the training cannot
            be watched; at a `step` below the one before.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank
        >>> from stagewise.callbacks import PosteriorMonitor, Watch
        >>> bank = LatentBank(torch.randn(64, 2))
        >>> watch = Watch(torch.nn.Linear(3, 2), bank, PosteriorMonitor(), steps=100)
    """

    by_hand = _IN_A_LOOP

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *callbacks: StageCallback,
        target: Any = None,
        steps: int | None = None,
        log: Any = None,
        log_every: int = 50,
        held_out_loader: Any = None,
        accumulate: int = 1,
        **options: Unpack[RunOptions],
    ) -> None:
        _check(model, data, callbacks, target)
        bank = data if isinstance(data, LatentBank) else None
        # That of Fabric holds the loader that it was given.
        self.loader = None if bank is not None else getattr(data, "_dataloader", data)
        self.module = nn.Module()
        self.module.model = self._model = _unwrapped(model)
        if target is not None:
            self.module.target = target
        self.device = torch.device("cpu")
        self.total, self.accumulate, self.log_every = steps, accumulate, log_every
        self.limits = *self.limits[:2], float("inf" if steps is None else steps * accumulate)
        self.loggers = [] if log is None or self.rank else [as_logger(log)]
        self.known, self.global_step = (self.module, target), 0
        self._held_out, self._run = held_out_loader, StageRun(bank, **options)
        self.members = [*callbacks, self._run]
        if len({member.state_key for member in self.members}) < len(self.members):
            raise ValueError(
                "Expected a name for each of several callbacks of one kind, which share files and "
                'state: PosteriorMonitor(name="other").'
            )
        self.speakers = callbacks
        self._begun = self._open = self._stepped = self._closed = False
        self._told: int | None = None  # the `step` that was given last
        self._batches, self._heard, self._counted = 0, 1, (0, 0, 0)
        hooks = weakref.WeakMethod(self._before_step), weakref.WeakMethod(self._after_step)
        told = [lambda *call, hook=hook: hook() and hook()(*call) for hook in hooks]
        self._hooks = [before_steps(told[0]), after_steps(told[1])]
        for hook in self._hooks:
            weakref.finalize(self, hook.remove)

    # -- the loop ---------------------------------------------------------------------------------

    def step(self, step: int, batch: Any = None) -> None:
        """Before each batch, at the top of the loop.

        Args:
            step: Optimizer steps done so far.
            batch: The next batch. Default None: only what makes the targets shows what is trained
                on.
        """
        if self._closed:
            raise RuntimeError(
                "This Watch is closed. Make one for each training: "
                "Watch(model, loader, PosteriorMonitor())."
            )
        if step < self.global_step:
            raise ValueError(
                f"Expected `step` of at least {self.global_step}, the optimizer steps done, got "
                f"{step}. Count on in each epoch, step += 1, and from there after load_state_dict, "
                f"step = {self.global_step}; or make a Watch for each training."
            )
        if self._begun:
            self._finish(step)
        else:
            self._begin(step)
        self.global_step, self._open, self._stepped = step, True, False
        self._told, self._batches = step, self._batches + 1
        self._run.batch_starts(self.move(batch))

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Around evaluation in the loop: targets are plain in it.

        They are plain too while the model is in eval mode, or without gradients.
        """
        if self._begun:
            self._run.tell("before_validation")
        try:
            yield
        finally:
            if self._begun:
                self._run.tell("after_validation")

    def close(self) -> None:
        """After the loop: makes the last probes, and removes all hooks."""
        if self._stepped and self._told is None and not self._closed:
            rank_zero_warn(
                "A Watch is closed whose `step` was never called: nothing was measured or steered. "
                "Call it at the top of the loop: watch.step(step, batch)."
            )
        self._closed = True
        self._finish()
        if self._begun:
            self._run.ends()
            self._run.close()
        self._begun = False
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and self._begun:
            self._run.fails()
            self._open = self._begun = False
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_begun", False) and not sys.is_finalizing():
            settled = self._run.settled  # otherwise an error has been raised
            self._run.close()
            if settled:
                rank_zero_warn(
                    "A Watch was deleted without being closed, so its last probes are missing. "
                    "Close it after the loop: watch.close()."
                )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs of all callbacks: plain numbers, strings and tensors."""
        self._finish()
        states = {member.state_key: member.state_dict() for member in self.members}
        return {"step": self.global_step, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave, before the first `step`."""
        if self._begun:
            raise RuntimeError("Expected load_state_dict before the first step, and it has begun.")
        self.global_step = state.get("step", 0)
        for member in self.members:
            if member.state_key in state:
                member.load_state_dict(state[member.state_key])

    def _begin(self, step: int) -> None:
        if self._stepped:
            raise ValueError(
                "The optimizer has stepped before the first watch.step(step, batch). Call it at "
                "the top of the loop, before the batch is trained on, with the number of steps "
                "done: for step, batch in enumerate(loader): watch.step(step, batch)."
            )
        weights = next(self.module.parameters(), None)
        self.device = self.device if weights is None else weights.device
        for other in {*_BEGUN}:
            other.refuse_steering(self.module)
        _BEGUN.add(self)
        self.global_step, self._begun = step, True
        # `step` at the last optimizer step; `_batches` and `_heard` count from there.
        self._at = step - 1
        # A proxy, because hooks in the model may outlive this object and must not keep it alive.
        self._run.begin(weakref.proxy(self), self.members)

    def refuse_steering(self, module: nn.Module) -> None:
        """Refuses the module of another Watch if this one steers something in it."""
        if not self._begun:
            return
        makers = [maker for one in self.members if (maker := getattr(one, "maker", None))]
        steered = {id(maker.place.object) for maker in makers}
        for maker in find_target_makers(module):
            if id(maker.place.object) in steered:
                raise ValueError(
                    f"{maker.name} is steered by another Watch, which is not closed. Close it "
                    "first, watch.close(), or give all callbacks to one Watch."
                )

    def _finish(self, step: int | None = None) -> None:
        """Ends the open batch after `step` optimizer steps."""
        if not self._open or (step is None and not self._stepped):
            return
        self._open = False
        self.global_step = self.global_step + 1 if step is None else step
        if self.global_step > self._run.began:
            self._refuse_idle()
        self._run.batch_ends()

    def _refuse_idle(self) -> None:
        """Refuses a first step in which the model was never called."""
        look, parts = self._run.look, self._model.modules()
        hidden = any(getattr(part, "_compiled_call_impl", None) for part in parts)
        if not (hidden or self._run.settled or look.happened) and look.search.empty:
            raise self._idle()

    def _idle(self) -> ValueError:
        return ValueError(
            f"Expected the loop to train {type(self._model).__name__}, which was never called "
            "with gradients. Give the network that is called: "
            "Watch(model, loader, PosteriorMonitor())."
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Before a step of any optimizer; only those of the model count."""
        if all(optimizer is not known for known in self.optimizers):
            if not changes(optimizer, self.module):
                # The optimizer of a discriminator may step before that of the model.
                if self._open and not self._run.settled and self._run.look.search.empty:
                    kind = torch.optim.Optimizer
                    every = [one for one in gc.get_objects() if issubclass(type(one), kind)]
                    if not any(changes(one, self.module) for one in every):
                        raise self._idle()
                return None
            self.optimizers = [*self.optimizers, optimizer]
        if not self._open or self._stepped:
            return None
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if given is None:
            return self._settle()
        settle: list[Callable[[], None]] = [self._settle]

        def closure() -> Any:
            loss = given()
            while settle:  # once, before the first change
                settle.pop()()
            return loss

        return (optimizer, closure), {}

    def _settle(self) -> None:
        self._refuse_idle()
        self._run.weights_may_change()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if all(optimizer is not one for one in self.optimizers):
            return
        if self._open and not self._stepped:
            self._count()
        self._stepped = True
        if self._begun:
            self._heard += 1

    def _count(self) -> None:
        """Warns once if `step` or `accumulate` does not fit the steps of the optimizer."""
        assert self._told is not None
        grown, batches, heard = now = (self._told - self._at, self._batches, self._heard)
        wrong = not 1 <= grown <= heard or batches != self.accumulate
        if wrong and now == self._counted:  # once only, it may be a step that a scaler left out
            rank_zero_warn(
                f"An optimizer step comes every {batches} batches (accumulate="
                f"{self.accumulate}), and `step` has grown by {grown} from one to the next, so "
                f"steps are counted wrongly. Say Watch(..., accumulate={batches}), and step += 1 "
                "after each optimizer.step()."
            )
            now = (0, 0, -1)  # it has warned
        if self._counted[2] >= 0:
            self._counted = now
        self._at, self._batches, self._heard = self._told, 0, 0

    # -- what a run asks --------------------------------------------------------------------------

    @override
    def trains(self) -> bool:
        return torch.is_grad_enabled() and any(part.training for part in self._model.modules())

    @override
    def held_out_loader(self) -> Any:
        return getattr(self._held_out, "_dataloader", self._held_out)

    @override
    def save(self, file: Path) -> None:
        state = {"model": self._model.state_dict(), "watch": self.state_dict()}
        if self.rank == 0:
            torch.save(state | {"step": self.global_step}, file)


def _check(model: Any, data: Any, callbacks: Sequence[Any], target: Any) -> None:
    """Refuses arguments of a wrong type; warns if there are no callbacks."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            "Expected `model` to be the network that the loop trains, an nn.Module, got "
            f"{type(model).__name__}: Watch(model, loader, PosteriorMonitor())."
        )
    for callback in callbacks:
        if not isinstance(callback, StageCallback) or isinstance(callback, StageRun):
            raise TypeError(
                f"Expected callbacks of stagewise, got {callback!r}. Give options of the run to "
                "the Watch: Watch(model, loader, PosteriorMonitor(), read_batch=...)."
            )
    if isinstance(data, StageCallback):
        raise TypeError(
            f"Expected the training loader or a LatentBank before the callbacks, got {data!r}: "
            "Watch(model, loader, PosteriorMonitor())."
        )
    if not callbacks:
        rank_zero_warn(
            "A Watch without callbacks measures nothing: Watch(model, loader, PosteriorMonitor())."
        )
    if target is not None and not find_target_makers(target) and not find_couplings(target):
        raise TypeError(
            f"Expected `target` to be what makes the targets, got {target!r}, which is not one "
            f"that stagewise knows; {_IN_A_LOOP}"
        )


def _unwrapped(model: Any) -> nn.Module:
    """The user's own module, without the wrappers of DDP and Fabric."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(
        model, "_original_module"
    ):
        model = getattr(model, "_original_module", None) or model.module
    return model
