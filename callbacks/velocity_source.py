"""How a callback asks the model of a run for its velocity: the network it found, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from stagewise.adapters import find_seams
from stagewise.adapters.network import Network, NetworkSearch, tensor_of
from stagewise.adapters.torchcfm import TorchCFM
from stagewise.batches import FindSample, find_checked
from stagewise.callbacks.checks import raise_together

__all__ = ["AskVelocity", "VelocitySource", "model_in_eval_mode"]

AskVelocity: TypeAlias = Callable[[nn.Module, Tensor, Tensor, "Tensor | None"], Tensor]
"""From a module, `x_t`, (B, *), t, (B,), and labels, (B,) or None, to the velocity, (B, *)."""


@contextmanager
def model_in_eval_mode(trainer: pl.Trainer, module: nn.Module) -> Iterator[None]:
    """Lets a model be asked in training's precision, and leaves no trace of it.

    Every submodule gets its mode back, and the global random state is put back.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


class VelocitySource:
    """Finds the network in the first training step, unless a function is given.

    Args:
        given: From `(module, xt, t, labels)` to the velocity, or None.
        find: From a batch to `(x_1, labels or None)`.
        asks: Name of the callback, for messages.
    """

    def __init__(self, given: AskVelocity | None, find: FindSample, asks: str) -> None:
        self._given, self._find, self._asks = given, find, asks
        self._search: NetworkSearch | None = None
        self.network: Network | None = None
        self._call: tuple[Any, ...] | None = None

    def start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, x1: Tensor, labels: Tensor | None
    ) -> None:
        """At the start of training: refuses what can never work.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            x1: Two samples or more, (n, *), on which a given function is tried.
            labels: Their labels, (n,), or None.

        Raises:
            ValueError: If nothing makes targets, noise and data are coupled, or the function
                returns no velocity.
        """
        self.stop()
        self.network, self._seams = None, find_seams(pl_module)
        for seam in self._seams:
            # A matcher that is refused ties noise to data, or its path is not known.
            if seam.coupled or (isinstance(seam, TorchCFM) and seam.refusal):
                raise ValueError(f"{seam.name} has no oracle to compare with: {seam.refusal}")
        if self._given is not None:
            self._try(trainer, pl_module, x1[:2], labels)
        elif not self._seams:
            raise ValueError(
                f"Found nothing that makes the targets in {type(pl_module).__name__}, so what its "
                "network predicts is not known. Say how to ask for the velocity (t = 0 is noise): "
                f"{self._asks}(velocity=lambda module, xt, t, labels: module.net(xt, t))."
            )

    def _try(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, x1: Tensor, labels: Tensor | None
    ) -> None:
        device = pl_module.device
        xt, t = x1.to(device), torch.full((len(x1),), 0.5, device=device)
        with model_in_eval_mode(trainer, pl_module):
            v = self.of(pl_module)(xt, t, None if labels is None else labels[:2].to(device))
        came = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        if came != tuple(xt.shape):
            raise ValueError(
                f"Expected `velocity` to return a tensor of shape {tuple(xt.shape)}, got {came}."
            )

    def watch(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Before the first training step: begins to look at the calls of its submodules."""
        if self._given is None and self.network is None and self._search is None:
            x1, labels = find_checked(self._find, batch)
            self._search = NetworkSearch(
                pl_module, self._seams, lambda: [("x_1 of the batch", x1)], labels
            )

    def settle(self, trainer: pl.Trainer) -> None:
        """Once its forward pass is done: takes what was found; a collective.

        Raises:
            ValueError: If there was nothing, or it returned no velocity, on every rank.
        """
        error = None
        if self._search is not None:
            self.stop()
            try:
                self.network = self._search.result()
                x1, call = self._search.x1, self._search.call
                assert call is not None
                assert x1 is not None
                tensor_of(call[2], tuple(x1.shape))  # refuses what stands for no velocity
                self._call = x1, *call
            except ValueError as caught:
                error = caught
            self._search = None
        raise_together(trainer, error)

    def take_call(self) -> tuple[Any, ...]:
        """`x_1`, arguments, keyword arguments and output of the call that was found, once."""
        call, self._call = self._call, None
        assert call is not None
        return call

    @property
    def conditional(self) -> bool:
        """Whether the model is given labels; a given function may be."""
        return self.network is None or self.network.conditional

    def describe(self) -> str:
        """What is asked, for logs."""
        return "the given velocity" if self.network is None else self.network.describe()

    def of(self, module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The velocity of a module, which may be a copy of the one that was searched.

        Args:
            module: That of the run, or one with averaged weights.

        Returns:
            From `x_t`, (B, *), t, (B,), and labels, (B,) or None, to the velocity, (B, *).
        """
        if self.network is not None:
            return self.network.of(module)
        assert self._given is not None
        return partial(self._given, module)

    def stop(self) -> None:
        """Takes all hooks off."""
        if self._search is not None:
            self._search.stop()
