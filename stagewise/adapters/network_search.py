r"""The network of a training, found by what it is called with.

A target maker knows the path, what is predicted and how time is counted, but not who predicts. In
the first training step every submodule is watched. The network is the one that is given `x_t` and
a time such that, with the `x_1` of the batch and the path of a maker, the noise

    x_0 = (x_t - a_t x_1) / s_t

comes out standard normal and independent of `x_1` (`stagewise.adapters.fitting`). No other call
passes that test: not an encoder, not a loss, not a network that is given other samples than the
batch's, not the right network read with reversed time. From then on the same call can be made with
other samples, and its answer read as a velocity. Where no call passes, what was seen says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.adapters.answers import Gradients, tensors_of
from stagewise.adapters.base import Detach, Seen, TargetMaker
from stagewise.adapters.calls import Call, conditioning, is_same, readings, retimed
from stagewise.adapters.encoding import EncoderCall, encoder_call, watch_encoders
from stagewise.adapters.hooks import CallHook
from stagewise.adapters.lines import call_text, guessed_line, where
from stagewise.adapters.match import Match
from stagewise.adapters.network import Network
from stagewise.adapters.reasons import GIVEN, Candidates, Diagnosis, Made, Reasons, own_of
from stagewise.masks import plain
from stagewise.paths import same_path
from stagewise.stage_target import StageTarget

__all__ = ["NetworkSearch", "eager"]


class NetworkSearch:
    """Watches the calls of one training step; see the module docstring.

    Args:
        root: The module.
        makers: What may make its targets (`find_target_makers`, `assumed_makers`).
        candidates: Names and tensors that may be `x_1`, asked for at each call, best first: as it
            was given to what makes the targets (`GIVEN`), as it was found in the batch, and other
            floating-point tensors of the batch. The names are written into messages.
        labels: The classes of the batch, (B,), or None; with masks `MaskedLabels`.
        labels_name: How messages write the labels of a batch, default "batch[1]".
        batch: The batch: what the network is given of it as it is counts as a condition.
        seen: What a maker was given before the network is called, or None: of it a network may be
            given the time in other units, a t + b.

    Attributes:
        compiled: Whether the whole training step is compiled, so that nothing is watched.
        beside: What is on the channels of x_t besides, where no call fits for that reason.
        empty: Whether no submodule was called with gradients so far.
        encoders: Calls with `x_1` of the batch, or what is made of it; None where nothing is kept.
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
        self.compiled, self.empty, self.beside = _is_compiled(root), True, ""
        self._matches: list[Match] = []
        self._reasons = Reasons(self.makers, plain(labels), labels_name)
        self._goes_on: tuple[str, str] | None = None
        self._inside: nn.Module | None = None
        self._pending: Match | None = None
        self._calls: list[tuple[int, bool, bool]] = []
        self._hooks: list[CallHook] = []
        self._detach: list[Detach] = []
        observed = any(maker.observable for maker in self.makers)
        self.encoders: list[EncoderCall] | None = [] if observed else None
        # What is compiled in place has hooks compiled into it; a compiled copy has them outside.
        names = {module: name for name, module in root.named_modules()}
        for name, module in () if self.compiled else eager(root):
            name = names.get(module, name)
            self._hooks += [
                CallHook(self._enter(name), module.register_forward_pre_hook, prepend=True),
                CallHook(self._leave(name), module.register_forward_hook, always_call=True),
            ]
            if observed:
                self._detach += watch_encoders(name, module, self._note_encoder)

    def stop(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        for detach in self._detach:
            detach()
        self._hooks, self._detach, self.encoders = [], [], None

    @property
    def first(self) -> Match | None:
        """The first call that fits, whether or not `result` refuses it."""
        return self._matches[0] if self._matches else None

    @property
    def x1(self) -> Tensor | None:
        """The candidate that it fits, (B, *), detached."""
        return None if self.first is None else self.first.x1

    @property
    def call(self) -> tuple[Any, Any, Any] | None:
        """The arguments, keyword arguments and output of that call."""
        return None if self.first is None else self.first.made

    def result(self) -> Network:
        """The network."""
        first = self.first
        if first is None:
            raise ValueError(self._nothing())
        others = {m.network.name: m for m in self._matches if m.network is not first.network}
        if others:
            fit = "".join(f"\n  {m.network.describe()}" for m in (first, *others.values()))
            raise ValueError(
                f"Several modules are given x_t and a time that fit x_1 of the batch:{fit}\n"
                f"Say which is trained: {first.line}"
            )
        if self._goes_on is not None:
            name, line = self._goes_on
            raise ValueError(
                f"{where(first.network.name)} is given x_t and time, but its answer goes on to "
                f"{where(name)}, whose answer has the same shape. Say what the velocity is: {line}"
            )
        if first.other and first.diagnosis is not None:
            raise ValueError(f"Expected x_1 to be trained on: {first.diagnosis.message}")
        return first.network

    def diagnosis(self) -> Diagnosis | None:
        """Why `x_1` of the batch is not what is trained on; None if it is, or nothing tells."""
        return self._reasons.diagnosis if self.first is None else self.first.diagnosis

    def origin(self, x1: Tensor, text: str, own: Tensor) -> Diagnosis | None:
        """How what is trained on came from `x_1` of the batch; see `Reasons.origin`."""
        return self._reasons.origin(x1, text, own)

    def asked_otherwise(self, ask: Callable[[Tensor, Tensor, Tensor | None], Any]) -> str:
        """How a function asks the network for something else; see `Match.asked_otherwise`."""
        return "" if self.first is None else self.first.asked_otherwise(ask, self.labels)

    @property
    def line(self) -> str:
        """How to ask for the velocity, to be pasted; a guess where no network was found."""
        if self.first is not None:
            return self.first.line
        return guessed_line(self.root, labelled=plain(self.labels) is not None)

    def _nothing(self) -> str:
        """Why no network was found."""
        why = self._reasons.explain(self.line)
        if self.compiled:
            why = (
                f"the training step of {type(self.root).__name__} is compiled as a whole, "
                "and calls inside of what is compiled cannot be watched. Compile the network "
                "alone, module.net = torch.compile(module.net), or say how to ask it: "
                f"{self.line}"
            )
        elif self.empty:
            why = (
                "the training step called no submodule with gradients. If it calls the "
                f"network by a function, say {self.line}"
            )
        for maker in self.makers:
            if maker.late:  # it tells what is trained on when the step calls it
                why += f" What is trained on is known by {maker.name}: call it before the network."
        return f"Found no network from which a velocity can be had: {why}"

    # -- hooks --------------------------------------------------------------------------------

    def _enter(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def look(call: Call, trains: bool) -> None:
            candidates = [
                (text, x1.detach())
                for text, x1 in self._candidates()
                if x1.is_floating_point() and x1.ndim > 1
            ]
            own, module, leaves = own_of(candidates), call.module, call.leaves
            alone = len(leaves) == 1 and own is not None and is_same(leaves[0], own[1])
            makes = isinstance(module, StageTarget) or id(module) in self._makers
            makes = makes or any(callable(leaf) for leaf in leaves)
            outer = module is not self.root and not makes
            self._calls.append((len(self._reasons.made), alone, outer))
            if not trains or self._inside is not None:
                return
            self.empty = self.empty and module is self.root
            if makes:
                return
            self._pending = self._consider(call, candidates)
            if self._pending is not None:
                self._inside = module

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            look(Call.of(name, module, args, kwargs), torch.is_grad_enabled())

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            start, alone, _ = self._calls.pop()
            self._note_encoder(name, args, kwargs, output)
            if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
                # What is inside of a module that returns it is that module's.
                shape = tuple(output.shape)
                so_far = self._reasons.made
                inside = [made for made in so_far[start:] if made.shape != shape]
                so_far[start:] = [*inside, Made(name, weakref.ref(output), shape, alone)]
            if module is self._inside:
                match, self._inside, self._pending = self._pending, None, None
                if match is not None:
                    self._take(match, args, kwargs, output)
            elif self._matches and self._inside is None:
                self._follow(Call.of(name, module, args, kwargs), output)

        return leave

    def _note_encoder(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """Keeps a call until what makes the targets is given what is trained on."""
        own = None if self.encoders is None else own_of(self._candidates())
        call = None if own is None else encoder_call(own[1], name, args, kwargs, output)
        if self.encoders is not None and call is not None:
            self.encoders.append(call)

    def _consider(self, call: Call, candidates: list[tuple[str, Tensor]]) -> Match | None:
        """The match if this call is a network's; what is inside of it is not looked at."""
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
            # Of several the one whose time says most: labels have fewer values.
            reading = max(fits, key=lambda reading: reading.moments)
            slots = conditioning(call, reading.slots, self.labels, self._batch)
            network = Network(call.module, call.name, reading.maker, slots.kept(call.leaves))
            match = Match(network, call, replace(reading, slots=slots), text, x1)
            if own is not None:
                match.diagnosis = self._reasons.compare(call.name, reading, text, x1, *own)
                match.other = text not in (GIVEN, own[0])
            return match
        if candidates and not self._matches:
            self._reasons.note(call, candidates)
            self.beside = self.beside or self._channels(call, candidates[0][1])
        return None

    def _channels(self, call: Call, x1: Tensor) -> str:
        """What lies beside `x_t` on the channels of one argument, as an image to be filled in."""
        size, shape = x1.shape[1], tuple(x1.shape)
        for k, leaf in enumerate(call.leaves):
            if not isinstance(leaf, Tensor) or leaf.ndim != x1.ndim or leaf.ndim < 3:
                continue
            more = leaf.shape[1] - size
            if more < 1 or (*leaf.shape[:1], size, *leaf.shape[2:]) != shape:
                continue
            for part in (leaf[:, :size], leaf[:, more:]):
                other = replace(
                    call, leaves=[part if n == k else x for n, x in enumerate(call.leaves)]
                )
                makers = [*self.makers, *retimed(call, self._seen())]
                for reading in readings(other, shape, x1, makers, plain(self.labels)):
                    if reading.noisy.fits(x1):
                        return f"{call.names[k]}: {more} channels beside those of x_t"
        return ""

    def _take(self, match: Match, args: Any, kwargs: Any, output: Any) -> None:
        """Adds a call that fits, unless its module is frozen or was called before."""
        given = [tensor for _, tensor in tensors_of(output)]
        if given and not any(tensor.requires_grad for tensor in given):
            return
        for tensor in given:
            if tensor.requires_grad:  # for who asks after the backward pass
                tensor.retain_grad()
        match.made = args, kwargs, output
        match.gradients = Gradients(match.reading.maker, match.reading.noisy, match.x1, output)
        alike = any(tensor.shape == match.x1.shape for tensor in given)
        match.inner = not alike and any(outer for *_, outer in self._calls)
        if not match.other:
            self._matches = [known for known in self._matches if not known.other]
        if match.matched == GIVEN:  # what is trained on is known by now
            self._matches = [known for known in self._matches if is_same(known.x1, match.x1)]
        called = any(known.call.module is match.call.module for known in self._matches)
        if not called and (self.first is None or self.first.other == match.other):
            self._matches.append(match)

    def _follow(self, call: Call, output: Any) -> None:
        """Takes note if the network's answer goes through another module with weights."""
        first = self._matches[0]
        slots, answer = first.reading.slots, first.made[2]
        if (
            call.module is first.call.module
            or not isinstance(output, Tensor)
            or output.shape != first.x1.shape
            or not any(leaf is answer for leaf in call.leaves)
            or not any(True for _ in call.module.parameters())
        ):
            return
        start, _, inner = first.line.partition("labels: ")
        known = {id(answer): inner, id(first.call.leaves[slots.x]): "xt"}
        if not slots.columns:
            known[id(first.call.leaves[slots.time])] = "t"
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


def eager(root: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The submodules whose hooks run as they are, outside of what is compiled."""
    if getattr(root, "_compiled_call_impl", None) is not None:
        return []
    found = [(name, root)]
    if "_orig_mod" in root._modules:  # torch.compile(module)
        return found
    for key, child in root.named_children():
        found += eager(child, f"{name}.{key}" if name else key)
    return found
