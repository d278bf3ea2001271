"""What the arguments of a call may be: `x_t`, a time, labels, conditions."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seam
from stagewise.adapters.fitting import Noisy
from stagewise.batches import LABEL_NAMES
from stagewise.paths import Convention

__all__ = [
    "Reading",
    "Slots",
    "answers",
    "call_text",
    "conditioning",
    "flatten",
    "guessed_line",
    "moved",
    "readings",
    "rows_of",
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
        conditions: The other leaves with one entry for each sample, by their index, and those
            that hold some or are taken from the batch as they are.
        optional: Whether the module accepts something that it was not given in this call.
        size: How many samples there were.
    """

    spec: Any
    leaves: tuple[Any, ...]
    x: int
    time: int
    labels: int | None = None
    one_hot: bool = False
    conditions: tuple[tuple[int, str], ...] = ()
    optional: bool = False
    size: int = 0

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
        taken, given = (self.x, self.time, self.labels), {k for k, _ in self.conditions}
        kept = tuple(
            rows_of(leaf, self.size, list(range(self.size)))
            if k in given
            else (leaf[:1].clone() if k in taken else leaf).detach()
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


def flatten(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a call; a list with one entry for each sample is a leaf."""
    call = args, kwargs
    tensors = (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim)
    size = len(next(tensors, ()))

    def whole(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == size > 0
            and not any(value is known for known in (call, args))
            and not any(isinstance(x, Tensor) and x.ndim and len(x) == size for x in value)
        )

    return pytree.tree_flatten(call, is_leaf=whole)


def conditioning(
    module: nn.Module,
    args: Any,
    leaves: Sequence[Any],
    slots: Slots,
    labels: Tensor | None,
    batch: Any = None,
) -> Slots:
    """The same slots with the leaf that holds the labels, and what else is one for each sample.

    Args:
        module: What is called.
        args: Its positional arguments, which come first among the leaves.
        leaves: All of them.
        slots: Where `x_t` and the time are.
        labels: Of the batch, or None.
        batch: That itself: what is handed on of it is a condition, whatever its length is.
    """
    size, others = len(leaves[slots.x]), []
    best = -1
    found: tuple[int | None, bool] = None, False
    parts = [part for part in pytree.tree_leaves(batch) if part is not None]
    for k, leaf in enumerate(leaves):
        if k in (slots.x, slots.time):
            continue
        # EDM's labels have no columns where there are none.
        if not _per_sample(leaf, size) and not any(leaf is part for part in parts):
            continue
        others.append(k)
        for one_hot in (False, True) if isinstance(leaf, Tensor) and leaf.ndim else ():
            agree = -1 if labels is None else _agreement(leaf, labels, one_hot=one_hot)
            if agree > best:
                best, found = agree, (k, one_hot)
    names, empty = _names(module, args, slots.spec)
    if found[0] is None and labels is not None:  # those of the whole batch may be dropped
        dropped = (k for k in others if names[k] in LABEL_NAMES and _is_constant(leaves[k]))
        found = next(dropped, None), False
    unused = empty or any(leaf is None for leaf in leaves)
    rest = tuple((k, f"{names[k]}: {short(leaves[k])}") for k in others if k != found[0])
    return replace(
        slots, labels=found[0], one_hot=found[1], conditions=rest, optional=unused, size=size
    )


def _is_constant(leaf: Any) -> bool:
    """Whether it is one whole number for all samples."""
    whole = isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.numel() == len(leaf)
    return whole and len(leaf.unique()) == 1


def moved(
    module: nn.Module, args: Any, leaves: Sequence[Any], spec: Any, before: Slots
) -> Slots | None:
    """Where `x_t` and time of a call lie that has another structure than one before.

    Args:
        module: What is called.
        args: Its positional arguments.
        leaves: All of them.
        spec: Their structure.
        before: The slots of the call before.

    Returns:
        The slots; None if it is given neither more nor less than before, or not `x_t` and time.
    """
    old = [leaf is None for leaf in before.leaves]
    if spec == before.spec and [leaf is None for leaf in leaves] == old:
        return None
    names, _ = _names(module, args, spec)
    first = pytree.tree_unflatten(list(range(before.spec.num_leaves)), before.spec)[0]
    called, _ = _names(module, first, before.spec)

    def at(k: int) -> int:  # several leaves may go by one name
        return names.index(called[k]) + k - called.index(called[k]) if k >= 0 else k

    try:
        slots = Slots(spec, (), at(before.x), at(before.time))
    except ValueError:
        return None
    x = leaves[slots.x]
    return slots if isinstance(x, Tensor) and x.ndim == before.leaves[before.x].ndim else None


def _held(value: Any) -> list[Any]:
    """What an object holds that is neither a tensor, a sequence, a function nor a module."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (str, bytes, numbers.Number, type, nn.Module)) or callable(value):
        return []
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return [getattr(value, name, None) for name in names]


def _per_sample(value: Any, size: int, depth: int = 4) -> bool:
    """Whether a value has one entry for each sample, or holds what has."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == size and 0 not in value.shape
    if isinstance(value, (list, tuple)):
        # A few numbers are a size.
        few = size <= 4 and all(isinstance(x, numbers.Number) for x in value)
        if len(value) == size and not few:
            return True
        held: Sequence[Any] = value
    else:
        held = _held(value)
    return depth > 0 and any(_per_sample(one, size, depth - 1) for one in held)


def rows_of(value: Any, size: int, rows: list[int], depth: int = 4) -> Any:
    """A value with the entries of other samples: tensors, lists, and whatever holds such.

    Args:
        value: Has an entry for each sample, or holds what has.
        size: How many samples.
        rows: Which are taken, each any number of times.
        depth: How deep to look.
    """
    if not _per_sample(value, size, depth):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, Tensor):
        return value.detach()[torch.tensor(rows, device=value.device)]
    if isinstance(value, np.ndarray):
        return value[rows]
    if isinstance(value, (list, tuple)):
        taken = [value[k] for k in rows] if len(value) == size else value
        taken = taken if len(value) == size else [rows_of(x, size, rows, depth - 1) for x in taken]
        return type(value)(*taken) if hasattr(value, "_fields") else type(value)(taken)
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            changed[key] = rows_of(inner, size, rows, depth - 1)
        return changed
    for name in [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]:
        if hasattr(value, name):  # a dataclass may be frozen
            object.__setattr__(changed, name, rows_of(getattr(value, name), size, rows, depth - 1))
    return changed


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
    dropped, agree = classes[other].unique(), size - int(other.sum())
    return agree if len(dropped) <= 1 and agree else -1


def _names(module: nn.Module, args: Any, spec: Any) -> tuple[list[str], bool]:
    """A name for each leaf, that of its parameter, and whether a parameter was given nothing."""
    forward = getattr(module, "_orig_mod", module).forward
    kinds = list(inspect.signature(forward).parameters.values())
    known = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
    unflat = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [""] * spec.num_leaves
    for i, part in enumerate(unflat[0]):
        for k in pytree.tree_leaves(part):
            names[k] = known[i] if i < len(known) else f"argument {i + 1}"
    for name, part in unflat[1].items():
        for k in pytree.tree_leaves(part):
            names[k] = name
    left = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD][len(args) :]
    left += [p.name for p in kinds if p.kind is p.KEYWORD_ONLY]
    variable = any(p.kind is p.VAR_KEYWORD for p in kinds)
    return names, variable or bool(set(left) - set(unflat[1]))


def where(name: str) -> str:
    """A submodule as one would write it."""
    return f"module.{name}" if name else "module"


def velocity_line(
    name: str,
    module: nn.Module,
    leaves: Sequence[Any],
    reading: Reading,
    *,
    turned: str = "t",
) -> str:
    """How to ask for the velocity of a call like this one, to be pasted.

    What cannot be written, such as a text, stands there by the name of its parameter.

    Args:
        name: Of the submodule.
        module: That itself.
        leaves: The arguments of the call.
        reading: What they are.
        turned: What stands for t.
    """
    slots, seam = reading.slots, reading.seam
    x, time = seam.written or ("xt", _time_text(seam.convention, turned))
    texts = {slots.x: x}
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
    known = {id(leaves[k]): text for k, text in texts.items()}
    sign = "" if seam.convention.sign == 1 else "-"
    call = f"{sign}{call_text(name, module, leaves, slots.spec, known)}"
    if seam.prediction.kind != "velocity":
        call = f"{seam.prediction!r}.to_velocity({seam.path!r}(t), {call}, xt)"
    return f"{_ASK}{call}"


def call_text(
    name: str, module: nn.Module, leaves: Sequence[Any], spec: Any, known: Mapping[int, str]
) -> str:
    """A call as one would write it.

    Args:
        name: Of the submodule.
        module: That itself.
        leaves: The arguments.
        spec: Their structure.
        known: What stands for some, by the `id` of a leaf.
    """
    args, _ = pytree.tree_unflatten(list(leaves), spec)
    names, _ = _names(module, args, spec)
    texts = [
        known.get(id(leaf)) or (repr(leaf) if _is_plain(leaf) else names[k].split(" ")[0])
        for k, leaf in enumerate(leaves)
    ]
    args, kwargs = pytree.tree_unflatten(texts, spec)
    parts = [_written(part) for part in args]
    parts += [f"{key}={_written(part)}" for key, part in kwargs.items()]
    return f"{where(name)}({', '.join(parts)})"


def guessed_line(root: nn.Module, *, labelled: bool) -> str:
    """How one would ask the largest part of a module for the velocity, where no call is known.

    Args:
        root: The module.
        labelled: Whether there are labels; they are handed on if the part takes a third argument.
    """
    children = [(name, child) for name, child in root.named_children() if _size(child)]
    name, net = max(children, key=lambda child: _size(child[1]), default=("net", root))
    kinds = inspect.signature(getattr(net, "_orig_mod", net).forward).parameters.values()
    more = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in kinds) > 2
    return f"{_ASK}module.{name}(xt, t{', labels' if labelled and more else ''})"


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


_ASK = "velocity=lambda module, xt, t, labels: "


def _is_plain(leaf: Any) -> bool:
    """Whether a value is known by its repr."""
    if isinstance(leaf, (list, tuple)):
        return all(_is_plain(one) for one in leaf) and len(leaf) <= 4
    return leaf is None or isinstance(leaf, (bool, int, float, str))


def _written(part: Any) -> str:
    """Texts in lists, tuples and dicts as one would write them."""
    if isinstance(part, Mapping):
        return "{" + ", ".join(f"{key!r}: {_written(value)}" for key, value in part.items()) + "}"
    if isinstance(part, (list, tuple)):
        inner = ", ".join(_written(one) for one in part)
        comma = "," if len(part) == 1 else ""
        return f"[{inner}]" if isinstance(part, list) else f"({inner}{comma})"
    return part


def _time_text(convention: Convention, t: str) -> str:
    noise, data = convention.noise_time, convention.data_time
    if (noise, data) == (0, 1):
        return t
    if data == 0:
        return f"1 - {t}" if noise == 1 else f"{noise:g} * (1 - {t})"
    start = f"{noise:g} + " if noise else ""
    return f"{start}{data - noise:g} * {t}"


def short(leaf: Any) -> str:
    """A value in a few words."""
    if isinstance(leaf, (list, tuple)) and leaf:
        return f"{type(leaf).__name__} of {len(leaf)} {type(leaf[0]).__name__}"
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
