r"""The network of a training, found by what it is called with.

A target maker knows the path, the prediction and how time is counted, but not the network. In
the first training step every submodule is watched. The network is the one that is given `x_t` and
a time such that, with the `x_1` of the batch and the path of a maker, the noise

    x_0 = (x_t - a_t x_1) / s_t

comes out standard normal and independent of `x_1` (`stagewise.adapters.fitting`). No other call
passes that test: no encoder, no loss, no network that is given other samples, and not the right
network read with reversed time. After that the same call can be made with other samples, and its
answer read as a velocity. If no call passes, the calls tell why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.adapters.answers import Gradients
from stagewise.adapters.base import Detach, Seen, TargetMaker
from stagewise.adapters.calls import Call, readings, retimed
from stagewise.adapters.conditions import conditioning, kept
from stagewise.adapters.encoding import EncoderCall, encoder_call, watch_encoders
from stagewise.adapters.hooks import CallHook, eager
from stagewise.adapters.lines import call_text, guessed_line, where
from stagewise.adapters.network import Match, Network
from stagewise.adapters.reasons import GIVEN, Candidates, Made, Reasons, own_of
from stagewise.adapters.rows import equals
from stagewise.batches import leaves_of
from stagewise.masks import plain
from stagewise.paths import same_path
from stagewise.stage_target import StageTarget

__all__ = ["NetworkSearch"]


class NetworkSearch:
    """Watches the calls of one training step; see the module docstring.

    Args:
        root: The module.
        makers: What may make its targets (`find_target_makers`, `assumed_makers`).
        candidates: What `x_1` may be.
        labels: The classes of the batch, (B,), or None; with masks `MaskedLabels`.
        labels_name: Name of the labels in messages.
        batch: The batch. Parts of it that the network is given unchanged count as conditions.
        seen: Returns what a maker was given before the network is called, or None. The network may
            be given its times in other units, a t + b.

    Attributes:
        compiled: Whether the whole training step is compiled, so that nothing can be watched.
        empty: Whether no submodule was called with gradients so far.
        encoders: Calls with `x_1` of the batch, or what is made of it; None if they are not kept.
        reasons: What the calls say about `x_1` of the batch.
    """

    def __init__(
        self,
        root: nn.Module,
        makers: Iterable[TargetMaker],
        candidates: Candidates,
        labels: Any,
        *,
        labels_name: str = "batch[1]",
        batch: Any = None,
        seen: Callable[[], tuple[TargetMaker, Seen] | None] = lambda: None,
    ) -> None:
        self.root, self.labels = root, labels
        self.makers: list[TargetMaker] = []
        self._makers = set()
        for maker in makers:
            self._makers.add(id(maker.place.object))
            if not any(_alike(maker, other) for other in self.makers):
                self.makers.append(maker)
        self._candidates, self._batch, self._seen = candidates, batch, seen
        self.compiled, self.empty = _is_compiled(root), True
        self._matches: list[Match] = []
        self.reasons = Reasons(self.makers, plain(labels), labels_name)
        self._goes_on: tuple[str, str] | None = None
        self._inside: Match | None = None
        self._calls: list[tuple[int, bool, bool]] = []
        self._detach: list[Detach] = []
        observed = any(maker.observable for maker in self.makers)
        self.encoders: list[EncoderCall] | None = [] if observed else None
        # A module that is compiled in place would compile the hooks too; a compiled copy does not.
        names = {module: name for name, module in root.named_modules()}
        for name, module in () if self.compiled else eager(root):
            name = names.get(module, name)
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            self._detach += [
                CallHook(enter, module.register_forward_pre_hook, prepend=True).remove,
                CallHook(leave, module.register_forward_hook, always_call=True).remove,
            ]
            if observed:
                self._detach += watch_encoders(name, module, self._note_encoder)

    def stop(self) -> None:
        """Takes the hooks off."""
        for detach in self._detach:
            detach()
        self._detach, self.encoders = [], None

    @property
    def first(self) -> Match | None:
        """The first call that fits, also if `result` refuses it."""
        return self._matches[0] if self._matches else None

    def result(self) -> Network:
        """The network; raises a ValueError with the reason if there is not exactly one."""
        first = self.first
        if first is None:
            raise ValueError(self._nothing())
        others = {m.network.name: m for m in self._matches if m.network is not first.network}
        if others:
            fit = "".join(f"\n  {m.network.describe()}" for m in (first, *others.values()))
            raise ValueError(
                "Expected one module to be given x_t and a time that fit x_1 of the batch, got "
                f"several:{fit}\nSay which is trained: {first.line}"
            )
        if self._goes_on is not None:
            name, line = self._goes_on
            raise ValueError(
                f"{where(first.network.name)} is given x_t and time, but its answer goes on to "
                f"{where(name)}, whose answer has the same shape. Say what the velocity is: {line}"
            )
        if first.other and first.diagnosis:
            raise ValueError(f"Expected x_1 to be trained on: {first.diagnosis}")
        return first.network

    def diagnosis(self) -> str:
        """Why `x_1` of the batch is not what is trained on; empty if it is, or not known."""
        return self.reasons.diagnosis if self.first is None else self.first.diagnosis

    def asked_otherwise(self, ask: Callable[[Tensor, Tensor, Tensor | None], Any]) -> str:
        """How a function asks the network for something else; see `Match.asked_otherwise`."""
        return "" if self.first is None else self.first.asked_otherwise(ask, self.labels)

    @property
    def line(self) -> str:
        """How to ask for the velocity, to be pasted; a guess if no network was found."""
        if self.first is not None:
            return self.first.line
        return guessed_line(self.root, labelled=plain(self.labels) is not None)

    def _nothing(self) -> str:
        """Why no network was found."""
        why = self.reasons.explain(self.line)
        if self.compiled:
            why = (
                f"the training step of {type(self.root).__name__} is compiled as a whole, and "
                "calls inside it cannot be watched. Compile the network alone, "
                f"module.net = torch.compile(module.net), or say how to ask it: {self.line}"
            )
        elif self.empty:
            why = (
                "the training step called no submodule with gradients. If it calls the network by "
                f"a function, say {self.line}"
            )
        for maker in self.makers:
            if maker.late:  # it reports only when the step calls it
                why += f" {maker.name} shows what is trained on: call it before the network."
        return f"Found no network to ask for a velocity: {why}"

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        trains = torch.is_grad_enabled()
        with torch.no_grad():
            call = Call.of(name, module, args, kwargs)
            candidates = [(text, x1.detach()) for text, x1 in self._candidates()]
            own = own_of(candidates)
            alone = len(call.leaves) == 1 and own is not None and equals(call.leaves[0], own[1])
            makes = isinstance(module, StageTarget) or id(module) in self._makers
            makes = makes or any(callable(leaf) for leaf in call.leaves)
            outer = module is not self.root and not makes
            self._calls.append((len(self.reasons.made), alone, outer))
            if not trains or self._inside is not None:
                return
            self.empty = self.empty and module is self.root
            self._inside = None if makes else self._consider(call, candidates)

    @torch.no_grad()
    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start, alone, _ = self._calls.pop()
        self._note_encoder(name, args, kwargs, output)
        if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
            # A tensor that passes through several modules is counted for the outermost one.
            shape, so_far = tuple(output.shape), self.reasons.made
            inside = [made for made in so_far[start:] if made.shape != shape]
            so_far[start:] = [*inside, Made(name, weakref.ref(output), shape, alone)]
        match = self._inside
        if match is not None and module is match.network.module:
            self._inside = None
            self._take(match, args, kwargs, output)
        elif self._matches and match is None:
            self._follow(Call.of(name, module, args, kwargs), output)

    def _note_encoder(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """Keeps a call of an encoder until it is known what is trained on."""
        if self.encoders is not None and (own := own_of(self._candidates())) is not None:
            call = encoder_call(own[1], name, args, kwargs, output)
            self.encoders += [] if call is None else [call]

    def _consider(self, call: Call, candidates: list[tuple[str, Tensor]]) -> Match | None:
        """The match if this call is a network's."""
        own = own_of(candidates)
        for text, x1 in candidates:
            # x_t has the shape of x_1, and is not x_1 itself.
            for makers in (self.makers, retimed(call, self._seen())):
                found = readings(call, tuple(x1.shape), x1, makers, plain(self.labels))
                fits = [reading for reading in found if reading.noisy.fits(x1)]
                if fits:
                    break
            else:
                continue
            # The argument with the most values is the time: labels have fewer.
            reading = max(fits, key=lambda reading: reading.moments)
            slots = conditioning(reading.slots, self.labels, self._batch)
            network = Network(reading.maker, kept(slots))
            match = Match(network, replace(reading, slots=slots), text, x1)
            if own is not None:
                match.diagnosis = self.reasons.compare(call.name, reading, text, x1, *own)
                match.other = text not in (GIVEN, own[0])
            return match
        if candidates and not self._matches:
            self.reasons.note(call, candidates)
        return None

    def _take(self, match: Match, args: Any, kwargs: Any, output: Any) -> None:
        """Adds a call that fits, unless its module is frozen or was called before."""
        given = [tensor for _, tensor in leaves_of(output)]
        if given and not any(tensor.requires_grad for tensor in given):
            return
        for tensor in given:
            if tensor.requires_grad:  # read after the backward pass
                tensor.retain_grad()
        match.made = args, kwargs, output
        match.gradients = Gradients(match.reading.maker, match.reading.noisy, match.x1, output)
        alike = any(tensor.shape == match.x1.shape for tensor in given)
        match.inner = not alike and any(outer for *_, outer in self._calls)
        if not match.other:
            self._matches = [known for known in self._matches if not known.other]
        if match.matched == GIVEN:  # it is now known what is trained on
            self._matches = [known for known in self._matches if equals(known.x1, match.x1)]
        called = any(known.network.module is match.network.module for known in self._matches)
        if not called and (self.first is None or self.first.other == match.other):
            self._matches.append(match)

    def _follow(self, call: Call, output: Any) -> None:
        """Notes whether the network's answer goes through another module with weights."""
        first = self._matches[0]
        slots, answer = first.reading.slots, first.made[2]
        if (
            call.module is first.network.module
            or not isinstance(output, Tensor)
            or output.shape != first.x1.shape
            or not any(leaf is answer for leaf in call.leaves)
            or not any(True for _ in call.module.parameters())
        ):
            return
        start, _, inner = first.line.partition("labels: ")
        leaves = slots.call.leaves
        known = {id(answer): inner, id(leaves[slots.x]): "xt", id(leaves[slots.time]): "t"}
        self._goes_on = call.name, f"{start}labels: {call_text(call, known)}"


def _alike(one: TargetMaker, other: TargetMaker) -> bool:
    return (
        type(one) is type(other)
        and one.prediction == other.prediction
        and one.convention == other.convention
        and same_path(one.path, other.path)
    )


def _is_compiled(root: nn.Module) -> bool:
    """Whether the training step of a module is compiled as a whole."""
    step = getattr(root, "training_step", None)
    return (
        getattr(root, "_compiler_ctx", None) is not None  # Lightning's, of torch.compile(module)
        or getattr(root, "_compiled_call_impl", None) is not None  # module.compile()
        or hasattr(step, "_torchdynamo_orig_callable")
    )
