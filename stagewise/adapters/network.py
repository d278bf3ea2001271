"""A network that was found in a training, asked as the training asks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seam
from stagewise.adapters.calls import Call, Slots, conditioning, moved, rows_of
from stagewise.adapters.columns import joined
from stagewise.adapters.lines import where

__all__ = ["Network", "tensor_of"]


class Network:
    """A network that can be asked for the velocity, as the training asks it.

    Attributes:
        module: What is called.
        name: Its name below the module that was searched; empty for that itself.
        seam: What says path, prediction and convention.
        conditional: Whether it is given labels.
        conditions: What else it is given for each sample; asked about others, it is given the same
            again, repeated or cut to their number.
        optional: Whether it accepts something that it was not given.
    """

    def __init__(self, module: nn.Module, name: str, seam: Seam, slots: Slots) -> None:
        self.module, self.name, self.seam, self._slots = module, name, seam, slots
        self.conditional, self.optional = slots.labels is not None, slots.optional
        self.conditions = tuple(text for _, text in slots.conditions)

    def describe(self) -> str:
        """One line for logs."""
        given = ["x_t", "time", *(["labels"] if self.conditional else []), *self.conditions]
        return f"{where(self.name)}: {type(self.module).__name__}({', '.join(given)})"

    def given_more(
        self, args: Any, kwargs: Any, find_labels: Callable[[], Tensor | None], batch: Any
    ) -> Network | None:
        """The same, asked as in a later call that gives it labels or conditions it was not given.

        Returns:
            The network; None if the call gives it nothing new.
        """
        call = Call.of(self.name, self.module, args, kwargs)
        slots = moved(call, self._slots)
        if slots is None:
            return None
        slots = conditioning(call, slots, find_labels(), batch)
        found = Network(self.module, self.name, self.seam, slots.kept(call.leaves))
        more = len(found.conditions) > len(self.conditions) or found.conditional > self.conditional
        return found if more else None

    def of(self, root: nn.Module) -> Network:
        """The same network in a copy of the module that was searched."""
        return Network(root.get_submodule(self.name), self.name, self.seam, self._slots)

    def is_given(self, condition: Tensor) -> bool:
        """Whether it was given that of the first batch, (B, *); some may have been dropped."""
        for k, _ in self._slots.conditions:
            leaf = self._slots.leaves[k]
            if isinstance(leaf, Tensor) and leaf.numel() == condition.numel():
                alike = leaf.reshape(condition.shape).to(condition) == condition
                if 2 * int(alike.flatten(1).all(1).sum()) >= len(condition):
                    return True
        return False

    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity at noisy samples, in the library's convention; with a graph if grad is on.

        Args:
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,), t = 0 is noise.
            labels: Classes, (B,), for a network that is given some.

        Returns:
            The velocity, (B, *), float32.

        Raises:
            ValueError: If the network is given labels and there are none, or returns another shape.
        """
        slots = self._slots
        leaves = list(slots.leaves)

        def put(k: int, value: Tensor) -> None:
            leaves[k] = value.to(leaves[k].dtype).reshape(-1, *leaves[k].shape[1:])

        x, time = self.seam.to_network(xt, t)
        leaves[slots.x] = x.to(leaves[slots.x].dtype)
        put(slots.time, time)
        if slots.labels is not None:
            if labels is None:
                raise ValueError(f"{self.describe()} is given labels, and there are none here.")
            if slots.one_hot:
                labels = functional.one_hot(labels, leaves[slots.labels].shape[1])
            put(slots.labels, labels)
        rows = [k % slots.size for k in range(len(xt))] if slots.conditions else []
        for k, _ in slots.conditions:
            leaves[k] = rows_of(leaves[k], slots.size, rows)
        args, kwargs = pytree.tree_unflatten(joined(leaves, slots.columns), slots.spec)
        kind = leaves[slots.x].device.type
        with torch.autocast(kind, slots.autocast, enabled=slots.autocast is not None):
            output = self.module(*args, **kwargs)
        return self.velocity(output, xt, t)

    def velocity(self, output: Any, xt: Tensor, t: Tensor) -> Tensor:
        """What an answer of the network stands for, (B, *), float32."""
        y = self.seam.convention.sign * tensor_of(output, tuple(xt.shape)).float()
        return self.seam.prediction.to_velocity(self.seam.path(t.float()), y, xt.float())

    def inputs(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """`x_t` and t of a call, None if it is made in another way than the first one."""
        call = Call.of(self.name, self.module, args, kwargs)
        if call.spec != self._slots.spec:
            return None
        x, time = self._slots.read(call.leaves)
        return self.seam.from_network(x, time.to(torch.float32))


def tensor_of(output: Any, shape: tuple[int, ...]) -> Tensor:
    """The tensor among what a network returns: itself, the first of a tuple, or its `.sample`."""
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        came = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"Expected the network to return what stands for a velocity, of shape {shape}, got "
            f"{came}. Say how to make one of it, for example: velocity=lambda module, xt, t, "
            f"labels: module.net(xt, t, labels)[:, :{shape[1]}]"
        )
    return found
