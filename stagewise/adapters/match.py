"""`Match`: a call of a network that fits what is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.answers import Gradients, answer_text
from stagewise.adapters.calls import Call, Reading
from stagewise.adapters.lines import velocity_line, where
from stagewise.adapters.network import Network
from stagewise.adapters.reasons import Diagnosis

__all__ = ["Match"]


@dataclass
class Match:
    """A call that fits."""

    network: Network
    call: Call
    reading: Reading  # what the arguments are
    matched: str  # the name of the candidate that it fits
    x1: Tensor  # that candidate, (B, *), detached
    made: tuple[Any, Any, Any] = (None, None, None)  # arguments, keyword arguments and output
    diagnosis: Diagnosis | None = None  # why the candidate is not `x_1` of the batch
    other: bool = False  # neither `x_1` of the batch nor what the target maker was given
    inner: bool = False  # a layer of a module that may be given more
    gradients: Gradients | None = None

    @property
    def line(self) -> str:
        """How to ask for the velocity, to be pasted."""
        network = self.network
        answer = answer_text(self.made[2], tuple(self.x1.shape), network.at)
        return velocity_line(self.call, replace(self.reading, maker=network.reads), answer=answer)

    def asked_otherwise(self, ask: Callable[[Tensor, Tensor, Any], Any], known: Any) -> str:
        """How a function asks the network differently than training does.

        Args:
            ask: From x_t, t and labels to the velocity.
            known: The labels of the batch, (B,), or None; with masks `MaskedLabels`.

        Returns:
            What differs, with the line that asks as in training; empty if nothing differs, or the
            function does not call the network exactly once.
        """
        slots, calls = self.reading.slots, []
        if self.inner or slots.columns:
            return ""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = pytree.tree_leaves((args, kwargs))
            calls.append([leaf for leaf in leaves if isinstance(leaf, Tensor)])

        hook = self.network.module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            ask(self.reading.noisy.xt, self.reading.noisy.t, known)
        finally:
            hook.remove()
        if len(calls) != 1:
            return ""
        tensors = calls[0]
        time = self.call.leaves[slots.time].reshape(-1)
        near = 1e-3 * float(time.detach().abs().max())
        timed = any(
            leaf.numel() == len(time) and bool(((leaf.reshape(-1) - time).abs() <= near).all())
            for leaf in tensors
        )
        what = "" if timed else "at another time than training does for the same x_t"
        if timed and slots.labels is not None:
            like = self.call.leaves[slots.labels]
            given = any(x.shape == like.shape and x.dtype == like.dtype for x in tensors)
            what = "" if given else "without the labels that training gives it"
        return what and (
            f"`velocity` calls {where(self.network.name)} {what}. As in training: {self.line}"
        )
