"""What the arguments of a call may be: `x_t` and a time."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seen, TargetMaker
from stagewise.adapters.fitting import Noisy
from stagewise.adapters.rows import agreement, equals
from stagewise.conventions import Convention

__all__ = ["Call", "Columns", "Reading", "Slots", "moved", "readings", "retimed"]

Columns = tuple[tuple[int, int], ...]
"""The parts of an argument along its second axis, in their order: their leaves and widths.

The first part takes the place of the argument, the others follow after all leaves.
"""


@dataclass(frozen=True)
class Call:
    """A call of a submodule."""

    name: str  # of the submodule; empty for the module that was searched
    module: nn.Module
    leaves: Sequence[Any]  # the arguments, flattened; a list with an entry for each sample is one
    spec: Any  # their structure
    columns: Columns = ()  # of an argument that is made of several leaves

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

    def split(self, columns: Columns) -> Call:
        """The same with the parts of an argument as leaves."""
        if not columns:
            return self
        leaves = [*self.leaves, *columns[1:]]
        parts = leaves[min(columns)[0]].split([width for _, width in columns], 1)
        for (k, _), part in zip(columns, parts, strict=True):
            leaves[k] = part
        return replace(self, leaves=leaves, columns=columns)

    def arguments(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """Its arguments and keyword arguments with other leaves."""
        if self.columns:
            first, end = min(self.columns)[0], len(leaves) - len(self.columns) + 1
            parts = [leaves[k].to(leaves[first].dtype) for k, _ in self.columns]
            leaves = [*leaves[:first], torch.cat(parts, 1), *leaves[first + 1 : end]]
        return pytree.tree_unflatten(leaves, self.spec)

    @cached_property
    def named(self) -> tuple[list[str], bool]:
        """The name of each leaf, that of its parameter, and whether a parameter got no value."""
        forward = getattr(self.module, "_orig_mod", self.module).forward
        kinds = list(inspect.signature(forward).parameters.values())
        known = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
        args, kwargs = pytree.tree_unflatten(list(range(self.spec.num_leaves)), self.spec)
        called = [*known, *(f"argument {k + 1}" for k in range(len(known), len(args)))]
        names = [""] * self.spec.num_leaves
        for name, part in [*zip(called, args, strict=False), *kwargs.items()]:
            for k in pytree.tree_leaves(part):
                names[k] = name
        names += [names[min(self.columns)[0]] for _ in self.columns[1:]]
        left = {*known[len(args) :], *(p.name for p in kinds if p.kind is p.KEYWORD_ONLY)}
        return names, any(p.kind is p.VAR_KEYWORD for p in kinds) or bool(left - kwargs.keys())


@dataclass(frozen=True)
class Slots:
    """Which leaf of a call holds what."""

    call: Call  # leaves that are named below are replaced when the network is asked
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

    def read(self) -> tuple[Tensor, Tensor]:
        """`x_t`, (B, *), and time, (B,), of the call; the time keeps its type."""
        return self.call.leaves[self.x], self.call.leaves[self.time].reshape(-1)


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
        x, time = slots.read()
        moments = len(torch.unique(time))
        if moments == 1 < size or (labels is not None and equals(time, labels.reshape(-1))):
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
            told = replace(maker.convention, noise_time=b, data_time=a + b)
            found.append(maker.like(maker.prediction, told))
    return found


def _places(
    call: Call, shape: tuple[int, ...] | None, size: int, labels: Tensor | None
) -> Iterator[Slots]:
    count = len(call.leaves)
    for i, x in enumerate(call.leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) != size:
            continue
        for columns in _columns(i, count, tuple(x.shape), shape):
            parts = call.split(columns)
            if len(columns) == 3 and not _are_labels(parts.leaves[-1], labels):
                continue
            for j in [count] if columns and x.ndim == 2 else range(count):
                if j != i and _one_each(parts.leaves[j], size):
                    yield Slots(parts, i, j)


def _columns(
    i: int, count: int, whole: tuple[int, ...], shape: tuple[int, ...] | None
) -> Iterator[Columns]:
    """The ways to split leaf `i` of `count`: vectors into `x_t`, time and the rest; channels."""
    if shape is None or whole == shape:
        yield ()
    if shape is None:
        if len(whole) == 2 and whole[1] > 1:
            yield (i, whole[1] - 1), (count, 1)
    elif len(whole) == len(shape) and whole[1] > shape[1] and whole[2:] == shape[2:]:
        left = whole[1] - shape[1]
        parts = [(count, 1), (count + 1, left - 1)] if len(whole) == 2 else [(count, left)]
        yield from itertools.permutations([(i, shape[1]), *(part for part in parts if part[1])])


def _are_labels(leaf: Tensor, labels: Tensor | None) -> bool:
    return labels is not None and any(
        agreement(leaf, labels, one_hot=one_hot) > 0 for one_hot in (False, True)
    )


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


def moved(call: Call, before: Slots) -> Slots | None:
    """Where `x_t` and time lie in a call with other arguments than `before`; None if it has not."""
    old = before.call
    if old.columns:
        return None
    empty = [leaf is None for leaf in call.leaves], [leaf is None for leaf in old.leaves]
    if call.spec == old.spec and empty[0] == empty[1]:
        return None
    names, called = call.named[0], old.named[0]

    def at(k: int) -> int:  # several leaves may go by one name
        return names.index(called[k]) + k - called.index(called[k])

    try:
        slots = Slots(call, at(before.x), at(before.time))
    except ValueError:
        return None
    x = call.leaves[slots.x]
    return slots if isinstance(x, Tensor) and x.ndim == old.leaves[before.x].ndim else None
