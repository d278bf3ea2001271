r"""The network of a training, found by what it is called with.

A seam knows the path, what is predicted and how time is counted, but not who predicts. In the first
training step every submodule is watched. The network is the one that is given `x_t` and a time such
that, with the `x_1` of the batch and the path of a seam, the noise

    x_0 = (x_t - a_t x_1) / s_t

comes out standard normal and independent of `x_1` (`stagewise.adapters.fitting`). No other call
passes that test: not an encoder, not a loss, not a network that is given other samples than the
batch's, not the right network read with reversed time. From then on the same call can be made with
other samples, and its answer read as a velocity. Where no call passes, what was seen says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.asked import Network, tensor_of
from stagewise.adapters.base import Seam
from stagewise.adapters.calls import Reading, answers, conditioning, velocity_line, where
from stagewise.adapters.fitting import can_tell, noise_of
from stagewise.adapters.hooks import CallHook
from stagewise.adapters.paths import same_path
from stagewise.adapters.reasons import GIVEN, Candidates, Diagnosis, Made, Reasons, is_same, own_of

__all__ = [
    "GIVEN",
    "Candidates",
    "Diagnosis",
    "Network",
    "NetworkSearch",
    "can_tell",
    "noise_of",
    "tensor_of",
]


@dataclass
class _Match:
    """A call that fits."""

    network: Network
    leaves: list[Any]
    reading: Reading
    matched: str
    x1: Tensor
    call: tuple[Any, Any, Any] = (None, None, None)
    diagnosis: Diagnosis | None = None
    other: bool = False  # x_1 is neither that of what makes the targets nor that of the batch

    @property
    def line(self) -> str:
        return velocity_line(self.network.name, self.leaves, self.reading)


class NetworkSearch:
    """Watches the calls of one training step; see the module docstring.

    Args:
        root: The module.
        seams: What may make its targets (`find_seams`, `assumed_seams`).
        candidates: Names and tensors that may be `x_1`, asked for at each call, best first: as it
            was given to what makes the targets (`GIVEN`), as it was found in the batch, and other
            floating-point tensors of the batch. The names are written into messages.
        labels: The classes of the batch, (B,), or None.
        conditions: What to do with a network that is given more for each sample than time and
            labels: "refuse", the default, or "tile": it is given the same again, repeated or cut to
            the number of samples it is asked about.
        labels_name: How messages write the labels of a batch, default "batch[1]".

    Attributes:
        compiled: Whether the whole training step is compiled, so that nothing is watched.
        empty: Whether no submodule was called with gradients so far.
    """

    def __init__(
        self,
        root: nn.Module,
        seams: Iterable[Seam],
        candidates: Candidates,
        labels: Tensor | None,
        *,
        conditions: Literal["refuse", "tile"] = "refuse",
        labels_name: str = "batch[1]",
    ) -> None:
        self.root = root
        self.seams: list[Seam] = []
        self._makers = set()
        for seam in seams:
            self._makers.add(id(seam.place.object))
            if not any(_alike(seam, other) for other in self.seams):
                self.seams.append(seam)
        self._candidates, self._conditions = candidates, conditions
        self._labels_name = labels_name
        self.compiled = _is_compiled(root)
        self._hooks: list[CallHook] = []
        self.reset(labels)

    def reset(self, labels: Tensor | None) -> None:
        """Forgets what was seen, and looks again at the next step.

        Args:
            labels: The classes of its batch, (B,), or None.
        """
        self.stop()
        self.labels, self.empty = labels, True
        self._matches: list[_Match] = []
        self._reasons = Reasons(self.seams, self.labels, self._labels_name)
        self._goes_on: tuple[str, str] | None = None
        self._inside: nn.Module | None = None
        self._pending: _Match | None = None
        self._calls: list[tuple[int, bool]] = []
        if self.compiled:
            return
        # What is compiled in place has hooks compiled into it; a compiled copy has them outside.
        names = {module: name for name, module in self.root.named_modules()}
        for name, module in _eager(self.root):
            name = names.get(module, name)
            self._hooks += [
                CallHook(self._enter(name), module.register_forward_pre_hook, prepend=True),
                CallHook(self._leave(name), module.register_forward_hook, always_call=True),
            ]

    def stop(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def _first(self) -> _Match | None:
        return self._matches[0] if self._matches else None

    @property
    def found(self) -> Network | None:
        """The network of the first call that fits, whether or not `result` refuses it."""
        return None if self._first is None else self._first.network

    @property
    def matched(self) -> str | None:
        """The name of the candidate that it fits."""
        return None if self._first is None else self._first.matched

    @property
    def x1(self) -> Tensor | None:
        """That candidate, (B, *), detached."""
        return None if self._first is None else self._first.x1

    @property
    def call(self) -> tuple[Any, Any, Any] | None:
        """The arguments, keyword arguments and output of that call."""
        return None if self._first is None else self._first.call

    def result(self) -> Network:
        """The network.

        Raises:
            ValueError: If none was found, or not for sure, with what was seen and the cure.
        """
        first = self._first
        if first is None:
            raise ValueError(self._nothing())
        others = {m.network.name: m for m in self._matches if m.network is not first.network}
        if others:
            fit = "".join(f"\n  {m.network.describe()}" for m in (first, *others.values()))
            raise ValueError(
                f"Several modules are given x_t and a time that fit x_1 of the batch:{fit}\n"
                f"Say which is trained: {first.line}"
            )
        network = first.network
        if self._goes_on is not None:
            name, line = self._goes_on
            raise ValueError(
                f"{where(network.name)} is given x_t and time, but its answer goes on to "
                f"{where(name)}, whose answer has the same shape. Say what the velocity is: {line}"
            )
        if network.conditions and self._conditions == "refuse":
            raise ValueError(
                f"{where(network.name)} is the network, but it is also given "
                f"{' and '.join(network.conditions)}, which is not a label of the batch. An oracle "
                "over all rows mixes samples of other conditions, which is not what such a model "
                "is trained towards, and about other samples it cannot be asked without theirs. "
                f"Say how: {first.line}; or, if the model ignores it, class_wise=False."
            )
        if first.other and first.diagnosis is not None:
            raise ValueError(f"Expected x_1 to be trained on: {first.diagnosis.message}")
        return network

    def diagnosis(self) -> Diagnosis | None:
        """Why `x_1` of the batch is not what is trained on; None if it is, or nothing tells."""
        return self._reasons.diagnosis if self._first is None else self._first.diagnosis

    def origin(self, x1: Tensor, text: str, own: Tensor) -> Diagnosis | None:
        """How what is trained on came from `x_1` of the batch; see `Reasons.origin`."""
        return self._reasons.origin(x1, text, own)

    # -- messages -----------------------------------------------------------------------------

    def _nothing(self) -> str:
        """Why no network was found."""
        start = "Found no network from which a velocity can be had: "
        if self.compiled:
            largest = max(
                self.root.named_children(), key=lambda child: _size(child[1]), default=("net", None)
            )
            return (
                f"{start}the training step of {type(self.root).__name__} is compiled as a whole, "
                "and calls inside of what is compiled cannot be watched. Compile the network "
                "alone, module.net = torch.compile(module.net), or say how to ask it: "
                f"velocity=lambda module, xt, t, labels: module.{largest[0]}(xt, t)"
            )
        if self.empty:
            return (
                f"{start}the training step called no submodule with gradients. If it calls "
                "the network by a function, say velocity=lambda module, xt, t, labels: "
                "module.net(xt, t)"
            )
        return start + self._reasons.explain()

    # -- hooks --------------------------------------------------------------------------------

    def _enter(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def look(module: nn.Module, args: Any, kwargs: Any, trains: bool) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            candidates = [
                (text, x1.detach())
                for text, x1 in self._candidates()
                if x1.is_floating_point() and x1.ndim > 1
            ]
            own = own_of(candidates)
            alone = len(leaves) == 1 and own is not None and is_same(leaves[0], own[1])
            self._calls.append((len(self._reasons.made), alone))
            if not trains or self._inside is not None:
                return
            self.empty = self.empty and module is self.root
            if id(module) in self._makers or any(callable(leaf) for leaf in leaves):
                return
            self._pending = self._consider(module, name, args, leaves, spec, candidates)
            if self._pending is not None:
                self._inside = module

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            look(module, args, kwargs, torch.is_grad_enabled())

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            start, alone = self._calls.pop()
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
                self._follow(module, name, args, kwargs, output)

        return leave

    def _take(self, match: _Match, args: Any, kwargs: Any, output: Any) -> None:
        """Adds a call that fits, unless its module is frozen or was called before."""
        given = answers(output)
        if given and not any(tensor.requires_grad for tensor in given):
            return
        match.call = args, kwargs, output
        if not match.other:
            self._matches = [known for known in self._matches if not known.other]
        first = self._first
        called = any(known.network.module is match.network.module for known in self._matches)
        if not called and (first is None or first.other == match.other):
            self._matches.append(match)

    def _follow(self, module: nn.Module, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """Takes note if the network's answer goes through another module with weights."""
        first = self._matches[0]
        slots, answer = first.reading.slots, first.call[2]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if (
            module is first.network.module
            or not isinstance(output, Tensor)
            or output.shape != first.x1.shape
            or not any(leaf is answer for leaf in leaves)
            or not any(True for _ in module.parameters())
        ):
            return
        start, _, inner = first.line.partition("labels: ")
        known = {id(answer): inner, id(first.leaves[slots.x]): "xt"}
        if slots.time >= 0:
            known[id(first.leaves[slots.time])] = "t"
        given, named = pytree.tree_unflatten([known.get(id(leaf), "...") for leaf in leaves], spec)
        parts = [*map(str, given), *(f"{key}={text}" for key, text in named.items())]
        self._goes_on = name, f"{start}labels: {where(name)}({', '.join(parts)})"

    # -- one call -----------------------------------------------------------------------------

    def _consider(
        self,
        module: nn.Module,
        name: str,
        args: Any,
        leaves: list[Any],
        spec: Any,
        candidates: list[tuple[str, Tensor]],
    ) -> _Match | None:
        """The match if this call is a network's; what is inside of it is not looked at."""
        own = own_of(candidates)
        for text, x1 in candidates:
            # x_t has the shape of x_1, and is not x_1 itself.
            fits = [
                reading
                for reading in self._reasons.read(leaves, spec, tuple(x1.shape), x1)
                if reading.noisy.fits(x1)
            ]
            if not fits:
                continue
            # Of several the one whose time says most: labels have fewer values.
            reading = max(fits, key=lambda reading: reading.moments)
            slots = conditioning(module, args, leaves, reading.slots, self.labels)
            match = _Match(
                Network(module, name, reading.seam, slots.kept(leaves)),
                leaves,
                replace(reading, slots=slots),
                text,
                x1,
            )
            if own is not None:
                match.diagnosis = self._reasons.compare(name, reading, text, x1, *own)
                match.other = text not in (GIVEN, own[0])
            return match
        if candidates and not self._matches:
            self._reasons.note(module, name, args, leaves, spec, candidates)
        return None


def _alike(one: Seam, other: Seam) -> bool:
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


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())


def _eager(root: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The submodules whose hooks run as they are, outside of what is compiled."""
    if getattr(root, "_compiled_call_impl", None) is not None:
        return []
    found = [(name, root)]
    if "_orig_mod" in root._modules:  # torch.compile(module)
        return found
    for key, child in root.named_children():
        found += _eager(child, f"{name}.{key}" if name else key)
    return found
