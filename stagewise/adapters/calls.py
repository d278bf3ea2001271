"""What the arguments of a call may be: `x_t`, a time, labels, conditions."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seen, TargetMaker
from stagewise.adapters.columns import Columns, agreement, apart, columns_of, equal, shifted
from stagewise.adapters.fitting import Noisy
from stagewise.adapters.rows import equals
from stagewise.batches import LABEL_NAMES
from stagewise.conventions import Convention
from stagewise.masks import MaskedLabels, plain

__all__ = [
    "Call",
    "Reading",
    "Slots",
    "conditioning",
    "moved",
    "readings",
    "retimed",
    "rows_of",
    "short",
]


@dataclass(frozen=True)
class Call:
    """A call of a submodule."""

    name: str  # of the submodule; empty for the module that was searched
    module: nn.Module
    leaves: list[Any]  # the arguments, flattened; a list with one entry for each sample is a leaf
    spec: Any  # their structure

    @classmethod
    def of(cls, name: str, module: nn.Module, args: Any, kwargs: Any) -> Call:
        """A call with these arguments."""
        call = args, kwargs
        held = (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim)
        size = len(next(held, ()))

        def whole(value: Any) -> bool:
            return (
                isinstance(value, (list, tuple))
                and len(value) == size > 0
                and not any(value is known for known in (call, args))
                and not any(isinstance(x, Tensor) and x.ndim and len(x) == size for x in value)
            )

        return cls(name, module, *pytree.tree_flatten(call, is_leaf=whole))

    @cached_property
    def names(self) -> list[str]:
        """A name for each leaf: that of its parameter."""
        return _names(self.module, self.spec)[0]


@dataclass(frozen=True)
class Slots:
    """Which leaf of a call holds what."""

    spec: Any  # the structure of `(args, kwargs)`
    leaves: tuple[Any, ...]  # those named below are replaced when the network is asked
    x: int  # x_t
    time: int
    labels: int | None = None
    one_hot: bool = False  # whether the labels are
    masks: tuple[tuple[int, str], ...] = ()  # with their form, see `MaskedLabels.forms`
    # All others with one entry for each sample, or from the batch: index and description.
    conditions: tuple[tuple[int, str], ...] = ()
    optional: bool = False  # whether the module accepts something that it was not given
    size: int = 0  # samples in the call
    autocast: torch.dtype | None = None  # the type that autocast computes in
    columns: Columns = ()  # how x_t, time and labels lie in one leaf; `leaves` has them `apart`

    def read(self, leaves: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """`x_t`, (B, *), and time, (B,), of a call; the time keeps its type."""
        leaves = apart(leaves, self.columns)
        return leaves[self.x], leaves[self.time].reshape(-1)

    def kept(self, leaves: Sequence[Any]) -> Slots:
        """The same with leaves for later calls; of those that are replaced only one entry."""
        taken = (self.x, self.time, self.labels, *dict(self.masks))
        given = {k for k, _ in self.conditions}
        kept = tuple(
            rows_of(leaf, self.size, list(range(self.size)))
            if k in given
            else (leaf[:1].clone() if k in taken else leaf).detach()  # shape and type matter
            if isinstance(leaf, Tensor)
            else leaf
            for k, leaf in enumerate(apart(leaves, self.columns))
        )
        kind = kept[self.x].device.type
        on = torch.is_autocast_enabled(kind)
        return replace(self, leaves=kept, autocast=torch.get_autocast_dtype(kind) if on else None)


@dataclass(frozen=True)
class Reading:
    """One way to read a call: as one of a maker's network."""

    slots: Slots  # where x_t and time are
    maker: TargetMaker  # in whose convention they are
    noisy: Noisy
    moments: int  # how many different times there are


def readings(
    call: Call,
    shape: tuple[int, ...] | None,
    x1: Tensor,
    makers: Sequence[TargetMaker],
    labels: Tensor | None,
) -> Iterator[Reading]:
    """All ways to read `x_t` and a time from a call; `x_1` itself is not taken for `x_t`."""
    size = len(x1)
    for slots in _places(call, shape, size, labels):
        x, time = slots.read(call.leaves)
        moments = len(torch.unique(time))
        if moments == 1 < size or (labels is not None and equal(time, labels)):
            continue
        if equals(x, x1):
            continue
        for maker in makers:
            step = _step(time, maker.convention)
            if step is None:
                continue
            rounding = max(step, torch.finfo(x.dtype).eps, torch.finfo(x1.dtype).eps)
            xt, t = maker.convention.inside(x, time.to(torch.float32))
            yield Reading(slots, maker, Noisy(maker.path, xt, t, rounding), moments)


def retimed(call: Call, seen: tuple[TargetMaker, Seen] | None) -> list[TargetMaker]:
    """A maker with each convention in which a call may hold its times in other units, `a t + b`.

    Each argument, or column of one, is fitted to t by least squares. Whole numbers may be rounded.
    """
    if seen is None or seen[1].t is None or seen[0].convention.by_sigma:
        return []
    maker, t, found = seen[0], seen[1].t.reshape(-1, 1).double(), []
    if len(t.unique()) < 4:
        return []
    dt = t - t.mean()
    for leaf in call.leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim > 2 and leaf.numel() > len(leaf):
            continue
        if not leaf.ndim or len(leaf) != len(t):
            continue
        whole = not leaf.is_floating_point()
        y = leaf.detach().reshape(len(t), -1).double()
        slope = (dt * (y - y.mean(0))).sum(0) / dt.square().sum()
        slack = torch.full_like(slope, 2.0) if whole else 1e-3 * slope.abs()
        linear = ((y - y.mean(0) - slope * dt).abs() <= slack).all(0) & (
            slope.abs() > (10 if whole else 1e-3)
        )
        for k in linear.nonzero().flatten().tolist():
            a = float(f"{float(slope[k]):.{2 if whole else 4}g}")
            b = float(y[:, k].mean()) - a * float(t.mean())
            b = 0.0 if abs(b) < (2 if whole else 1e-3 * abs(a)) else float(f"{b:.4g}")
            other = copy.copy(maker)
            other.convention = replace(maker.convention, noise_time=b, data_time=a + b)
            found.append(other)
    return found


def _places(
    call: Call, shape: tuple[int, ...] | None, size: int, labels: Tensor | None
) -> Iterator[Slots]:
    for i, x in enumerate(call.leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) != size:
            continue
        for columns in columns_of(i, len(call.leaves), x, shape, labels) if x.ndim == 2 else ():
            yield Slots(call.spec, (), i, len(call.leaves), columns=columns)
        if shape is not None and tuple(x.shape) != shape:
            continue
        for j, leaf in enumerate(call.leaves):
            if j != i and _one_each(leaf, size):
                yield Slots(call.spec, (), i, j)


def _one_each(leaf: Any, size: int) -> bool:
    """Whether a leaf is one number for each of `size` samples."""
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.dtype is torch.bool:
        return False
    return len(leaf) == size == leaf.numel()


def _step(time: Tensor, convention: Convention) -> float | None:
    """The steps of t in which a time is known; None if it is no time."""
    units = abs(convention.data_time - convention.noise_time)
    if time.is_floating_point():
        return float(torch.finfo(time.dtype).eps)
    return None if units <= 1 or convention.by_sigma else 1 / units


def _names(module: nn.Module, spec: Any) -> tuple[list[str], bool]:
    """The parameter of each leaf, and whether a parameter got no value."""
    forward = getattr(module, "_orig_mod", module).forward
    kinds = list(inspect.signature(forward).parameters.values())
    known = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named = [(known[i] if i < len(known) else f"argument {i + 1}", x) for i, x in enumerate(args)]
    names = [""] * spec.num_leaves
    for name, part in [*named, *kwargs.items()]:
        for k in pytree.tree_leaves(part):
            names[k] = name
    left = known[len(args) :] + [p.name for p in kinds if p.kind is p.KEYWORD_ONLY]
    variable = any(p.kind is p.VAR_KEYWORD for p in kinds)
    return names, variable or bool(set(left) - set(kwargs))


def conditioning(call: Call, slots: Slots, labels: Any, batch: Any = None) -> Slots:
    """The slots with labels, masks and conditions filled in."""
    of_masks, labels = labels if isinstance(labels, MaskedLabels) else None, plain(labels)
    masks = []
    leaves, size, others = apart(call.leaves, slots.columns), len(call.leaves[slots.x]), []
    best = -1
    found: tuple[int | None, bool] = None, False
    parts = [part for part in pytree.tree_leaves(batch) if part is not None]
    for k, leaf in enumerate(leaves):
        if k in (slots.x, slots.time):
            continue
        # EDM's labels have no columns where there are none.
        if not _per_sample(leaf, size) and not any(leaf is part for part in parts):
            continue
        form = None
        if of_masks is not None and isinstance(leaf, Tensor) and len(leaf) == len(of_masks):
            form = of_masks.form_of(leaf)
        if form is not None:
            masks.append((k, form))
            continue
        others.append(k)
        for one_hot in (False, True) if isinstance(leaf, Tensor) and leaf.ndim else ():
            agree = -1 if labels is None else agreement(leaf, labels, one_hot=one_hot)
            if agree > best:
                best, found = agree, (k, one_hot)
    names, empty = _names(call.module, call.spec)
    names += [names[slots.x]] * (len(leaves) - len(names))
    if found[0] is None and labels is not None:  # those of the whole batch may be dropped
        dropped = (k for k in others if names[k] in LABEL_NAMES and _is_constant(leaves[k]))
        found = next(dropped, None), False
    unused = empty or any(leaf is None for leaf in leaves)
    rest = tuple(
        (k, f"{names[k]}: {short(leaves[k])}{shifted(leaves[k], labels)}")
        for k in others
        if k != found[0]
    )
    slots = replace(slots, labels=found[0], one_hot=found[1], masks=tuple(masks))
    return replace(slots, conditions=rest, optional=unused, size=size)


def _is_constant(leaf: Any) -> bool:
    """Whether all samples have the same whole number."""
    whole = isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.numel() == len(leaf)
    return whole and len(leaf.unique()) == 1


def moved(call: Call, before: Slots) -> Slots | None:
    """Where `x_t` and time lie in a call with other arguments than `before`; None if it has not."""
    if before.columns:
        return None
    old = [leaf is None for leaf in before.leaves]
    if call.spec == before.spec and [leaf is None for leaf in call.leaves] == old:
        return None
    names, called = call.names, _names(call.module, before.spec)[0]

    def at(k: int) -> int:  # several leaves may go by one name
        return names.index(called[k]) + k - called.index(called[k])

    try:
        slots = Slots(call.spec, (), at(before.x), at(before.time))
    except ValueError:
        return None
    x = call.leaves[slots.x]
    return slots if isinstance(x, Tensor) and x.ndim == before.leaves[before.x].ndim else None


def _attributes(value: Any) -> list[str]:
    """Names of what an object holds; none for numbers, functions and modules."""
    if isinstance(value, (str, bytes, numbers.Number, type, nn.Module)) or callable(value):
        return []
    return [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]


def _per_sample(value: Any, size: int, depth: int = 4) -> bool:
    """Whether a value, or one inside it, has one entry for each sample."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == size and 0 not in value.shape
    held: Sequence[Any]
    if isinstance(value, (list, tuple)):
        # A few numbers are a size.
        few = size <= 4 and all(isinstance(x, numbers.Number) for x in value)
        if len(value) == size and not few:
            return True
        held = value
    elif isinstance(value, Mapping):
        held = list(value.values())
    else:
        held = [getattr(value, name, None) for name in _attributes(value)]
    return depth > 0 and any(_per_sample(one, size, depth - 1) for one in held)


def rows_of(value: Any, size: int, rows: list[int], depth: int = 4) -> Any:
    """A value with the entries of other samples: tensors, lists, and objects that hold them."""

    def inner(held: Any) -> Any:
        return rows_of(held, size, rows, depth - 1)

    if not _per_sample(value, size, depth):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, Tensor):
        return value.detach()[torch.tensor(rows, device=value.device)]
    if isinstance(value, np.ndarray):
        return value[rows]
    if isinstance(value, (list, tuple)):
        taken = [value[k] for k in rows] if len(value) == size else [inner(x) for x in value]
        return type(value)(*taken) if hasattr(value, "_fields") else type(value)(taken)
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        for key, held in value.items():
            changed[key] = inner(held)
        return changed
    for name in _attributes(value):
        if hasattr(value, name):
            object.__setattr__(changed, name, inner(getattr(value, name)))  # it may be frozen
    return changed


def short(leaf: Any) -> str:
    """A value in a few words."""
    if isinstance(leaf, (list, tuple)) and leaf:
        return f"{type(leaf).__name__} of {len(leaf)} {type(leaf[0]).__name__}"
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__name__
