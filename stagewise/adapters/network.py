"""`Network`: a network that was found in a training; `Match`: the call in which it was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from stagewise.adapters.answers import Gradients, answer_text, tensor_of
from stagewise.adapters.base import TargetMaker
from stagewise.adapters.calls import Call, Reading, Slots, moved
from stagewise.adapters.conditions import conditioning, kept, rows_of
from stagewise.adapters.lines import velocity_line, where
from stagewise.conventions import DDPMPath
from stagewise.masks import MaskedLabels, plain

__all__ = ["Match", "Network"]


class Network:
    """A network that is asked for the velocity in the way that training calls it.

    Attributes:
        module: What is called.
        name: Its name in the module that was searched; empty for that module itself.
        maker: Says path, prediction and convention of the training.
        reads: Says them for what the network returns, if the step converts that first.
        at: Which tensor, if it returns several.
        conditional: Whether it is given labels.
        conditions: What else it is given for each sample. For other samples these are given again,
            repeated or cut to their number.
        optional: Whether it accepts something that it was not given.
    """

    def __init__(self, maker: TargetMaker, slots: Slots) -> None:
        self.maker, self._slots = maker, slots
        self.module, self.name = slots.call.module, slots.call.name
        self.reads, self.at = maker, 0
        self.conditional, self.optional = slots.labels is not None, slots.optional
        self.conditions = tuple(text for _, text in slots.conditions)

    def describe(self) -> str:
        """One line for logs."""
        given = ["x_t", "time", *(["labels"] if self.conditional else [])]
        given += [*(form for _, form in self._slots.masks), *self.conditions]
        return f"{where(self.name)}: {type(self.module).__name__}({', '.join(given)})"

    def given_more(
        self, args: Any, kwargs: Any, find_labels: Callable[[], Tensor | None], batch: Any
    ) -> Network | None:
        """The same network asked as in a later call with more labels or conditions; None if none.

        `find_labels` returns the labels of `batch`.
        """
        call = Call.of(self.name, self.module, args, kwargs)
        slots = moved(call, self._slots)
        if slots is None:
            return None
        found = self._like(kept(conditioning(slots, find_labels(), batch)))
        more = len(found.conditions) > len(self.conditions) or found.conditional > self.conditional
        return found if more else None

    def of(self, root: nn.Module) -> Network:
        """The same network in a copy of the module that was searched."""
        call = replace(self._slots.call, module=root.get_submodule(self.name))
        return self._like(replace(self._slots, call=call))

    def _like(self, slots: Slots) -> Network:
        found = Network(self.maker, slots)
        found.reads, found.at = self.reads, self.at
        return found

    def is_given(self, condition: Tensor) -> bool:
        """Whether it was given this condition of the first batch, (B, *), except dropped ones."""
        for k, _ in self._slots.conditions:
            leaf = self._slots.call.leaves[k]
            if isinstance(leaf, Tensor) and leaf.numel() == condition.numel():
                alike = leaf.reshape(condition.shape).to(condition) == condition
                if 2 * int(alike.flatten(1).all(1).sum()) >= len(condition):
                    return True
        return False

    def __call__(self, xt: Tensor, t: Tensor, labels: Any = None) -> Tensor:
        """The velocity at noisy samples, (B, *), float32; with a graph if gradients are on.

        Args:
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,), t = 0 is noise.
            labels: Classes, (B,), for a network that is given some; `MaskedLabels` with masks.

        Raises:
            ValueError: If labels or masks are missing, or the network returns another shape.
        """
        slots, masks, labels = self._slots, labels, plain(labels)
        leaves = list(slots.call.leaves)

        def put(k: int, value: Tensor) -> None:
            like = leaves[k]
            if value.is_floating_point() and not like.is_floating_point():
                value = value.round()  # the nearest step
            leaves[k] = value.to(like.dtype).reshape(-1, *like.shape[1:])

        x, time = self.maker.convention.outside(xt, t)
        leaves[slots.x] = x.to(leaves[slots.x].dtype)
        put(slots.time, time)
        if slots.labels is not None:
            if labels is None:
                raise ValueError(
                    f"Expected labels, got none, because training gives them to {self.describe()}. "
                    "Pass them: network(xt, t, labels)."
                )
            if slots.one_hot:
                labels = functional.one_hot(labels, leaves[slots.labels].shape[1])
            put(slots.labels, labels)
        for k, form in slots.masks:
            if not isinstance(masks, MaskedLabels):
                raise ValueError(
                    f"Expected masks, got none, because training gives them to {self.describe()}."
                )
            value = masks.forms()[form]
            # The length may differ from that of the first call.
            sizes = iter([size for size in value.shape[1:] if size != 1])
            shape = [1 if size == 1 else next(sizes, 1) for size in leaves[k].shape[1:]]
            leaves[k] = value.to(leaves[k]).reshape(-1, *shape)
        rows = [k % slots.size for k in range(len(xt))] if slots.conditions else []
        for k, _ in slots.conditions:
            leaves[k] = rows_of(leaves[k], slots.size, rows)
        args, kwargs = slots.call.arguments(leaves)
        kind = leaves[slots.x].device.type
        with torch.autocast(kind, slots.autocast, enabled=slots.autocast is not None):
            output = self.module(*args, **kwargs)
        return self.velocity(output, xt, t)

    def velocity(self, output: Any, xt: Tensor, t: Tensor) -> Tensor:
        """The velocity that an answer of the network stands for, (B, *), float32."""
        prediction = self.reads.prediction
        sign = self.reads.convention.sign_of(prediction)
        y = sign * self.answer(output, tuple(xt.shape)).float()
        return prediction.to_velocity(self.maker.path(t.float()), y, xt.float())

    def reachable(self, t: Tensor) -> Tensor:
        """The nearest times, (B,), that it can be asked about: if it counts steps, whole ones."""
        convention = self.maker.convention
        whole = not self._slots.call.leaves[self._slots.time].is_floating_point()
        if isinstance(convention.path, DDPMPath) or not whole:
            return convention.rounded(t)
        first, last = sorted((convention.noise_time, convention.data_time))
        steps = convention.from_t(t).round()  # the ends may have no noise
        return convention.to_t(steps.clamp(first + 1, last - 1))

    def answer(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that shape in what the network returns."""
        return tensor_of(output, shape, at=self.at)

    def inputs(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """`x_t` and t of a call; None if it has other arguments than the first one."""
        known, call = self._slots.call, Call.of(self.name, self.module, args, kwargs)
        if call.spec != known.spec:
            return None
        x, time = replace(self._slots, call=call.split(known.columns)).read()
        return self.maker.convention.inside(x, time.to(torch.float32))


@dataclass
class Match:
    """A call that fits."""

    network: Network
    reading: Reading  # what the arguments are
    matched: str  # the name of the candidate that it fits
    x1: Tensor  # that candidate, (B, *), detached
    made: tuple[Any, Any, Any] = (None, None, None)  # arguments, keyword arguments and output
    diagnosis: str = ""  # why the candidate is not `x_1` of the batch
    other: bool = False  # neither `x_1` of the batch nor what the target maker was given
    inner: bool = False  # a layer of a module that may be given more
    gradients: Gradients | None = None

    @property
    def line(self) -> str:
        """How to ask for the velocity, to be pasted."""
        network = self.network
        answer = answer_text(self.made[2], tuple(self.x1.shape), network.at)
        return velocity_line(replace(self.reading, maker=network.reads), answer=answer)

    def asked_otherwise(self, ask: Callable[[Tensor, Tensor, Any], Any], known: Any) -> str:
        """How a function of x_t, t and labels asks the network differently than training does.

        With the line that asks as in training; empty if nothing differs, or the function does not
        call the network exactly once. `known` are the labels of the batch.
        """
        slots, calls = self.reading.slots, []
        leaves = slots.call.leaves
        if self.inner or slots.call.columns:
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
        time = leaves[slots.time].reshape(-1)
        near = 1e-3 * float(time.detach().abs().max())
        timed = any(
            leaf.numel() == len(time) and bool(((leaf.reshape(-1) - time).abs() <= near).all())
            for leaf in tensors
        )
        what = "" if timed else "at another time than training does for the same x_t"
        if timed and slots.labels is not None:
            like = leaves[slots.labels]
            given = any(x.shape == like.shape and x.dtype == like.dtype for x in tensors)
            what = "" if given else "without the labels that training gives it"
        return what and (
            f"`velocity` calls {where(self.network.name)} {what}. As in training: {self.line}"
        )
