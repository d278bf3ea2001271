"""What the arguments of a call may be: `x_t`, a time, labels, conditions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seam
from stagewise.adapters.fitting import Noisy
from stagewise.paths import Convention

__all__ = [
    "Reading",
    "Slots",
    "answers",
    "conditioning",
    "readings",
    "short",
    "velocity_line",
    "where",
]


@dataclass(frozen=True)
class Slots:
    """Where in the flattened arguments of a call what lies.

    Attributes:
        spec: The structure of `(args, kwargs)`.
        leaves: Its leaves; those below are replaced in a call of our own.
        x: The leaf that holds `x_t`.
        time: The leaf that holds the time; -1: the last column of `x`.
        labels: The leaf that holds the classes; None: there is none.
        one_hot: Whether these are one-hot.
        conditions: The other leaves with one entry for each sample, by their index.
    """

    spec: Any
    leaves: tuple[Any, ...]
    x: int
    time: int
    labels: int | None = None
    one_hot: bool = False
    conditions: tuple[tuple[int, str], ...] = ()

    def read(self, leaves: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """`x`, (B, *), and time, (B,), of a call."""
        x, time = self.raw(leaves)
        return x, time.to(torch.float32)

    def raw(self, leaves: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """The same, the time in its own type."""
        x = leaves[self.x]
        if self.time < 0:
            return x[:, :-1], x[:, -1]
        return x, leaves[self.time].reshape(-1)

    def kept(self, leaves: Sequence[Any]) -> Slots:
        """The same with the leaves as they are reused.

        Of those that are replaced only the shape and type matter.
        """
        taken = (self.x, self.time, self.labels)
        kept = tuple(
            (leaf[:1].clone() if k in taken else leaf).detach()
            if isinstance(leaf, Tensor)
            else leaf
            for k, leaf in enumerate(leaves)
        )
        return replace(self, leaves=kept)


@dataclass(frozen=True)
class Reading:
    """One way to read a call: as one of a seam's network.

    Attributes:
        slots: Where `x_t` and time are.
        seam: In whose convention.
        noisy: What they are.
        moments: How many different times there are.
    """

    slots: Slots
    seam: Seam
    noisy: Noisy
    moments: int

    def coarser(self, dtype: torch.dtype) -> Reading:
        """The same for data that are known to the precision of `dtype`."""
        rounding = max(self.noisy.rounding, torch.finfo(dtype).eps)
        return replace(self, noisy=replace(self.noisy, rounding=rounding))


def readings(
    leaves: Sequence[Any],
    spec: Any,
    shape: tuple[int, ...] | None,
    size: int,
    seams: Sequence[Seam],
    labels: Tensor | None,
) -> Iterator[Reading]:
    """All ways to read `x_t` and a time out of a call.

    Args:
        leaves: Its arguments.
        spec: Their structure.
        shape: Of `x_t`, (B, *); None: any.
        size: B.
        seams: What says how time is counted.
        labels: Of the batch; they are no times.
    """
    for slots in _places(leaves, spec, shape, size):
        x, time = slots.raw(leaves)
        moments = len(torch.unique(time))
        if moments == 1 < size or (labels is not None and _equal(time, labels)):
            continue
        for seam in seams:
            step = _step(time, seam.convention)
            if step is None:
                continue
            xt, t = seam.from_network(x, time.to(torch.float32))
            yield Reading(
                slots,
                seam,
                Noisy(seam.path, xt, t, max(step, torch.finfo(x.dtype).eps)),
                moments,
            )


def _places(
    leaves: Sequence[Any], spec: Any, shape: tuple[int, ...] | None, size: int
) -> Iterator[Slots]:
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) != size:
            continue
        if x.ndim == 2 and x.shape[1] > 1 and shape in (None, (size, x.shape[1] - 1)):
            yield Slots(spec, (), i, -1)
        if shape is not None and tuple(x.shape) != shape:
            continue
        for j, leaf in enumerate(leaves):
            if j != i and _one_each(leaf, size):
                yield Slots(spec, (), i, j)


def _one_each(leaf: Any, size: int) -> bool:
    """Whether a leaf is one number for each of `size` samples."""
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.dtype is torch.bool:
        return False
    return len(leaf) == size == leaf.numel()


def _step(time: Tensor, convention: Convention) -> float | None:
    """In which steps of t a time is known; None if it is none."""
    units = abs(convention.data_time - convention.noise_time)
    if time.is_floating_point():
        return float(torch.finfo(time.dtype).eps)
    return None if units <= 1 else 1 / units


def _equal(x: Tensor, labels: Tensor) -> bool:
    labels = labels.reshape(-1).to(x.device)
    return x.shape == labels.shape and bool((x.double() == labels.double()).all())


def conditioning(
    module: nn.Module, args: Any, leaves: Sequence[Any], slots: Slots, labels: Tensor | None
) -> Slots:
    """The same slots with the leaf that holds the labels, and what else is one for each sample.

    Args:
        module: What is called.
        args: Its positional arguments, which come first among the leaves.
        leaves: All of them.
        slots: Where `x_t` and the time are.
        labels: Of the batch, or None.
    """
    size, others = len(leaves[slots.x]), []
    best = -1
    found: tuple[int | None, bool] = None, False
    for k, leaf in enumerate(leaves):
        if k in (slots.x, slots.time) or not isinstance(leaf, Tensor):
            continue
        if not leaf.ndim or len(leaf) != size or not leaf.numel():
            continue  # EDM's labels have no columns where there are none
        others.append(k)
        for one_hot in (False, True):
            agree = -1 if labels is None else _agreement(leaf, labels, one_hot=one_hot)
            if agree > best:
                best, found = agree, (k, one_hot)
    names = _names(module, args, slots.spec)
    rest = tuple((k, f"{names[k]}: {short(leaves[k])}") for k in others if k != found[0])
    return replace(slots, labels=found[0], one_hot=found[1], conditions=rest)


def _agreement(leaf: Tensor, labels: Tensor, *, one_hot: bool) -> int:
    """How many of the batch's labels a leaf has; -1 if it does not hold them.

    Those that were dropped, for classifier-free guidance, all have one other value in their place.
    """
    labels, size = labels.reshape(-1).to(leaf.device), len(leaf)
    if len(labels) != size or leaf.dtype is torch.bool and not one_hot:
        return -1
    if one_hot:
        if leaf.ndim != 2 or not bool(((leaf == 0) | (leaf == 1)).all()):
            return -1
        count = leaf.sum(1)
        if bool((count > 1).any()):
            return -1
        classes = torch.where(count == 1, leaf.to(torch.uint8).argmax(1), -1)
    elif leaf.numel() != size:
        return -1
    elif leaf.is_floating_point():
        return size if _equal(leaf.reshape(-1), labels) else -1
    else:
        classes = leaf.reshape(-1).long()
    other = classes != labels
    dropped, agree = len(torch.unique(classes[other])), size - int(other.sum())
    return agree if dropped <= 1 and agree else -1


def _names(module: nn.Module, args: Any, spec: Any) -> list[str]:
    """A name for each leaf: that of the parameter it is given for."""
    forward = getattr(module, "_orig_mod", module).forward
    kinds = inspect.signature(forward).parameters.values()
    known = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
    unflat = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [""] * spec.num_leaves
    for i, part in enumerate(unflat[0]):
        for k in pytree.tree_leaves(part):
            names[k] = known[i] if i < len(known) else f"argument {i + 1}"
    for name, part in unflat[1].items():
        for k in pytree.tree_leaves(part):
            names[k] = name
    return names


def where(name: str) -> str:
    """A submodule as one would write it."""
    return f"module.{name}" if name else "module"


def velocity_line(name: str, leaves: Sequence[Any], reading: Reading, *, turned: str = "t") -> str:
    """How to ask for the velocity of a call like this one, to be pasted.

    Args:
        name: Of the submodule.
        leaves: The arguments of the call.
        reading: What they are.
        turned: What stands for t.
    """
    slots, seam = reading.slots, reading.seam
    start = "velocity=lambda module, xt, t, labels: "
    if seam.prediction.kind != "velocity":
        return start + "..."
    texts = [
        repr(leaf) if leaf is None or isinstance(leaf, (bool, int, float, str)) else "..."
        for leaf in leaves
    ]
    time = _time_text(seam.convention, turned)
    texts[slots.x] = "xt"
    if slots.time < 0:
        texts[slots.x] = f"torch.cat([xt, ({time})[:, None]], 1)"
    else:
        sides = leaves[slots.time].ndim - 1
        texts[slots.time] = f"({time}).reshape(-1{', 1' * sides})" if sides else time
    if slots.labels is not None:
        like = leaves[slots.labels]
        texts[slots.labels] = "labels"
        if slots.one_hot:
            texts[slots.labels] = f"nn.functional.one_hot(labels, {like.shape[1]}).to(xt)"
        elif like.ndim > 1:
            texts[slots.labels] = "labels[:, None]"
    args, kwargs = pytree.tree_unflatten(texts, slots.spec)
    parts = [_text(part) for part in args]
    parts += [f"{key}={_text(part)}" for key, part in kwargs.items()]
    sign = "" if seam.convention.sign == 1 else "-"
    return f"{start}{sign}{where(name)}({', '.join(parts)})"


def _text(part: Any) -> str:
    return part if isinstance(part, str) else "..."


def _time_text(convention: Convention, t: str) -> str:
    noise, data = convention.noise_time, convention.data_time
    if (noise, data) == (0, 1):
        return t
    if data == 0:
        return f"1 - {t}" if noise == 1 else f"{noise:g} * (1 - {t})"
    return f"{noise:g} + {data - noise:g} * {t}"


def short(leaf: Any) -> str:
    """A value in a few words."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__name__


def answers(output: Any) -> list[Tensor]:
    """The tensors in what a module returns, also in a record such as those of diffusers."""
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        else:
            held = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
            found += [value for value in held.values() if isinstance(value, Tensor)]
    return found
