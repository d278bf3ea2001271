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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seam
from stagewise.adapters.calls import (
    Reading,
    Slots,
    answers,
    conditioning,
    readings,
    short,
    velocity_line,
    where,
)
from stagewise.adapters.fitting import can_tell, factor_of, noise_of
from stagewise.adapters.paths import same_path

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

GIVEN = "x_1 as it was given to what makes the targets"
"""The name of that candidate; the first of another name is the `x_1` found in the batch."""

Candidates: TypeAlias = Callable[[], "Sequence[tuple[str, Tensor]]"]
"""What `x_1` may be at the time of a call, best first, with names to be pasted: "batch[0]"."""


class Network:
    """A network that can be asked for the velocity, as the training asks it.

    Attributes:
        module: What is called.
        name: Its name below the module that was searched; empty for that itself.
        seam: What says path, prediction and convention.
    """

    def __init__(self, module: nn.Module, name: str, seam: Seam, slots: Slots) -> None:
        self.module, self.name, self.seam = module, name, seam
        self._slots = slots

    def describe(self) -> str:
        """One line for logs."""
        given = ["x_t", "time", *(["labels"] if self.conditional else []), *self.conditions]
        return f"{where(self.name)}: {type(self.module).__name__}({', '.join(given)})"

    @property
    def conditional(self) -> bool:
        """Whether it is given labels."""
        return self._slots.labels is not None

    @property
    def conditions(self) -> tuple[str, ...]:
        """What else it is given for each sample; asked about others, it is given the same again."""
        return tuple(text for _, text in self._slots.conditions)

    def of(self, root: nn.Module) -> Network:
        """The same network in a copy of the module that was searched."""
        return Network(root.get_submodule(self.name), self.name, self.seam, self._slots)

    @torch.no_grad()
    def __call__(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity at noisy samples, in the library's convention.

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
        x, time = self.seam.to_network(xt, t)
        if slots.time < 0:
            like = leaves[slots.x]
            leaves[slots.x] = torch.cat([x.to(like.dtype), time[:, None].to(like.dtype)], 1)
        else:
            leaves[slots.x] = x.to(leaves[slots.x].dtype)
            like = leaves[slots.time]
            leaves[slots.time] = time.to(like.dtype).reshape(-1, *like.shape[1:])
        if slots.labels is not None:
            if labels is None:
                raise ValueError(f"{self.describe()} is given labels, and there are none here.")
            like = leaves[slots.labels]
            if slots.one_hot:
                leaves[slots.labels] = functional.one_hot(labels, like.shape[1]).to(like.dtype)
            else:
                leaves[slots.labels] = labels.to(like.dtype).reshape(-1, *like.shape[1:])
        for k, _ in slots.conditions:
            rows = torch.arange(len(xt), device=leaves[k].device) % len(leaves[k])
            leaves[k] = leaves[k][rows]
        args, kwargs = pytree.tree_unflatten(leaves, slots.spec)
        return self.velocity(self.module(*args, **kwargs), xt, t)

    def velocity(self, output: Any, xt: Tensor, t: Tensor) -> Tensor:
        """What an answer of the network stands for, (B, *), float32."""
        y = self.seam.convention.sign * tensor_of(output, tuple(xt.shape)).float()
        return self.seam.prediction.to_velocity(self.seam.path(t.float()), y, xt.float())

    def inputs(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
        """`x_t` and t of a call, None if it is made in another way than the first one."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._slots.spec:
            return None
        return self.seam.from_network(*self._slots.read(leaves))


def tensor_of(output: Any, shape: tuple[int, ...]) -> Tensor:
    """The tensor among what a network returns: itself, the first of a tuple, or its `.sample`.

    Raises:
        ValueError: If there is none of this shape.
    """
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        came = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"Expected the network to return what stands for a velocity, of shape {shape}, got "
            f"{came}. Say how: velocity=lambda module, xt, t, labels: ..."
        )
    return found


@dataclass(frozen=True)
class Diagnosis:
    """Why `x_1` of the batch is not what is trained on.

    Attributes:
        kind: "scaled": times `factor`; "reversed": it is, but time runs the other way than the
            seam says; "other tensor": another tensor of the batch is; "encoded": what `module`
            made of it is.
        message: What was seen, and the cure.
        factor: By which `x_1`, or what `module` made of it, is multiplied. None: by none.
        module: Such as "module.vae", for "encoded".
    """

    kind: Literal["scaled", "reversed", "other tensor", "encoded"]
    message: str
    factor: float | None = None
    module: str | None = None


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


@dataclass
class _Made:
    """What a submodule returned: its name, the tensor if it still exists, its shape."""

    name: str
    tensor: weakref.ref[Tensor]
    shape: tuple[int, ...]
    alone: bool  # whether x_1 of the batch was all that it was given


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
        self.root, self.labels = root, labels
        self.seams: list[Seam] = []
        self._makers = set()
        for seam in seams:
            self._makers.add(id(seam.place.object))
            if not any(_alike(seam, other) for other in self.seams):
                self.seams.append(seam)
        self._candidates, self._conditions = candidates, conditions
        self._labels_text = "None" if labels is None else labels_name
        self.compiled = _is_compiled(root)
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen, and looks again at the next step."""
        self.stop()
        self.empty = True
        self._matches: list[_Match] = []
        self._diagnoses: list[Diagnosis] = []
        self._guess: Diagnosis | None = None
        self._coupled = ""
        self._goes_on: tuple[str, str] | None = None
        self._lines: list[str] = []
        self._shape: tuple[int, ...] = ()
        self._inside: nn.Module | None = None
        self._pending: _Match | None = None
        self._made: list[_Made] = []
        self._calls: list[tuple[int, bool]] = []
        if self.compiled:
            return
        # What is compiled in place has hooks compiled into it; a compiled copy has them outside.
        names = {module: name for name, module in self.root.named_modules()}
        for name, module in _eager(self.root):
            name = names.get(module, name)
            self._hooks += [
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True, prepend=True),
                module.register_forward_hook(self._leave(name), with_kwargs=True, always_call=True),
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
        return self._first and self._first.network

    @property
    def matched(self) -> str | None:
        """The name of the candidate that it fits."""
        return self._first and self._first.matched

    @property
    def x1(self) -> Tensor | None:
        """That candidate, (B, *), detached."""
        return self._first and self._first.x1

    @property
    def call(self) -> tuple[Any, Any, Any] | None:
        """The arguments, keyword arguments and output of that call."""
        return self._first and self._first.call

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
        if self._first is not None:
            return self._first.diagnosis
        kinds = ("scaled", "reversed", "encoded")
        return min(self._diagnoses, key=lambda found: kinds.index(found.kind), default=self._guess)

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
        calls = "".join(f"\n  {line}" for line in self._lines[:8]) or " none with such a tensor"
        calls = f"Calls with a tensor of its shape, {self._shape}:{calls}\n"
        why, diagnosis = self._coupled, self.diagnosis()
        if not why and diagnosis is not None:
            why = diagnosis.message
        if why:
            return f"{start}{why}\n{calls}"
        paths = ", ".join(repr(seam.path) for seam in self.seams)
        return (
            f"{start}no call in the first training step was given x_t and a time that fit x_1 of "
            f"the batch on {paths}. {calls}"
            "If training encodes, scales, flips or reorders x_1 itself, say find=... so that it "
            "is what is trained on; if the network is called in another way, say "
            "velocity=lambda module, xt, t, labels: module.net(xt, t, labels)."
        )

    def _find(self, x1: str) -> str:
        return f"find=lambda batch: ({x1}, {self._labels_text})"

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
            own = next((x1 for text, x1 in candidates if text != GIVEN), None)
            alone = len(leaves) == 1 and own is not None and _is(leaves[0], own)
            self._calls.append((len(self._made), alone))
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
                inside = [made for made in self._made[start:] if made.shape != shape]
                made = _Made(name, weakref.ref(output), shape, alone)
                self._made[start:] = [*inside, made]
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
        own = next(((text, x1) for text, x1 in candidates if text != GIVEN), None)
        for text, x1 in candidates:
            # x_t has the shape of x_1, and is not x_1 itself.
            fits = [
                reading
                for reading in self._read(leaves, spec, tuple(x1.shape), x1)
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
                match.diagnosis = self._compare(match, *own)
                match.other = text not in (GIVEN, own[0])
            return match
        if candidates and not self._matches:
            self._note(module, name, args, leaves, spec, candidates)
        return None

    def _read(
        self, leaves: list[Any], spec: Any, shape: tuple[int, ...] | None, x1: Tensor
    ) -> Iterable[Reading]:
        for reading in readings(leaves, spec, shape, len(x1), self.seams, self.labels):
            if not _is(reading.slots.raw(leaves)[0], x1):
                yield reading.coarser(x1.dtype)

    def _compare(self, match: _Match, text: str, own: Tensor) -> Diagnosis | None:
        """Why a call fits another candidate than `x_1` of the batch."""
        if match.matched == text or (own.shape == match.x1.shape and match.reading.noisy.fits(own)):
            return None
        if match.matched != GIVEN:
            return Diagnosis(
                "other tensor",
                f"{where(match.network.name)} is given x_t of {match.matched}, not of {text}. "
                f"Say so: {self._find(match.matched)}",
            )
        return self.why(match.x1, text, own)

    def why(self, x1: Tensor, text: str, own: Tensor) -> Diagnosis | None:
        """How samples that are trained on came from those of the batch, as far as it shows.

        Args:
            x1: What is trained on, (B, *).
            text: How one would write x_1 of the batch.
            own: x_1 of the batch, (B, *).
        """
        factor = factor_of(x1, own)
        if factor is not None:
            return self._scaled(factor, f"{factor:g}", text)
        for made in self._made:
            tensor = made.tensor()
            factor = None if tensor is None else factor_of(x1, tensor)
            if factor is not None:
                return self._encoded(made, factor, text)
        return None

    def _note(
        self,
        module: nn.Module,
        name: str,
        args: Any,
        leaves: list[Any],
        spec: Any,
        candidates: list[tuple[str, Tensor]],
    ) -> None:
        """Keeps what a call that does not fit says about why."""
        text, own = next((pair for pair in candidates if pair[0] != GIVEN), candidates[0])
        self._shape = tuple(own.shape)
        if any(isinstance(leaf, Tensor) and leaf.shape == own.shape for leaf in leaves):
            given = ", ".join(short(leaf) for leaf in leaves[:6])
            self._lines.append(f"{name or 'module'}: {type(module).__name__}({given})")
        for _, x1 in candidates:
            for reading in self._read(leaves, spec, tuple(x1.shape), x1):
                lean = reading.noisy.leans(x1)
                if lean and not self._coupled:
                    self._coupled = self._depends(name, lean, reading.noisy.scale(x1))
        for reading in self._read(leaves, spec, None, own):
            noisy = reading.noisy
            shape = tuple(noisy.xt.shape)
            if shape == self._shape:
                factor = noisy.scale(own)
                if factor is not None:
                    self._diagnoses.append(self._scaled(factor, f"about {factor:g}", text))
                if replace(noisy, t=1 - noisy.t).fits(own):
                    slots = conditioning(module, args, leaves, reading.slots, self.labels)
                    turned = replace(reading, slots=slots)
                    line = velocity_line(name, leaves, turned, turned="(1 - t)")
                    self._diagnoses.append(
                        Diagnosis(
                            "reversed",
                            f"{where(name)} fits x_1 of the batch if its time runs the other way "
                            f"than {reading.seam.name} says. Say how to ask it: {line}",
                        )
                    )
            before = [made for made in self._made if made.shape == shape]
            for made in before:
                tensor = made.tensor()
                if tensor is None or _is(tensor, own) or tensor is leaves[reading.slots.x]:
                    continue
                factor = 1.0 if noisy.fits(tensor) else noisy.scale(tensor)
                if factor is not None:
                    self._diagnoses.append(self._encoded(made, factor, text))
            if shape != self._shape and len({made.name for made in before}) == 1:
                # It may be used in another way than as it is, or be gone.
                self._guess = self._guess or self._encoded(before[0], 1.0, text)

    def _depends(self, name: str, lean: float, factor: float | None) -> str:
        """Why noise that is normal is not independent, empty if `x_1` is only scaled."""
        if lean < 0 and factor is not None:
            return ""
        scaled = "" if factor is None else f" Or is x_1 scaled by {factor:g}?"
        return (
            f"{where(name)} is given x_t and a time that fit x_1 of the batch, but x_0 and x_1 are "
            f"not independent, {lean:.1f} standard errors from it: a coupling?{scaled} The closed "
            "form of the oracle holds for independent pairs only. Train from "
            "x0 = torch.randn_like(x1)."
        )

    def _scaled(self, factor: float, about: str, text: str) -> Diagnosis:
        return Diagnosis(
            "scaled",
            f"training scales x_1 by {about}. Say so: "
            f"{self._find(f'{factor:g} * {_written(text)}')}",
            factor,
        )

    def _encoded(self, made: _Made, factor: float, text: str) -> Diagnosis:
        times = "" if factor == 1 else f"{factor:g} * "
        latents = f"{times}{where(made.name)}"
        find = self._find(f"{latents}({_written(text)})") if made.alone else "find=..."
        bank = "latents" if self.labels is None else "latents, labels"
        return Diagnosis(
            "encoded",
            f"training encodes x_1: what fits is {latents}(...), of shape {made.shape}. Say so, "
            f"{find}, or give what is trained on: bank=LatentBank({bank})",
            None if factor == 1 else factor,
            where(made.name),
        )


def _written(text: str) -> str:
    """A candidate's name as it can be pasted."""
    return text if text.startswith("batch") else "batch[0]"


def _is(x: Any, x1: Tensor) -> bool:
    """Whether a value is these data, at its own precision."""
    return isinstance(x, Tensor) and x.shape == x1.shape and torch.equal(x, x1.to(x.dtype))


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
