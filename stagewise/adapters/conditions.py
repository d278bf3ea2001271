"""What else a network is given for each sample: labels, masks and conditions."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stagewise.adapters.calls import Slots
from stagewise.adapters.rows import agreement, is_label
from stagewise.batches import LABEL_NAMES
from stagewise.masks import MaskedLabels, plain

__all__ = ["conditioning", "kept", "rows_of", "shifted", "short"]


def conditioning(slots: Slots, labels: Any, batch: Any = None) -> Slots:
    """The slots with labels, masks and conditions filled in."""
    call = slots.call
    of_masks, labels = labels if isinstance(labels, MaskedLabels) else None, plain(labels)
    masks, others, texts, best = [], [], {}, -1
    found: tuple[int | None, bool] = None, False
    size, (names, lacks) = len(call.leaves[slots.x]), call.named
    parts = [part for part in pytree.tree_leaves(batch) if part is not None]
    for k, leaf in enumerate(call.leaves):
        if k in (slots.x, slots.time):
            continue
        # EDM's labels have no columns where there are none.
        if _taken(leaf, size, [0]) is None and not any(leaf is part for part in parts):
            continue
        form = None
        if of_masks is not None and isinstance(leaf, Tensor) and len(leaf) == len(of_masks):
            form = of_masks.form_of(leaf)
        if form is not None:
            masks.append((k, form))
            continue
        others.append(k)
        texts[k] = f"{names[k]}: {short(leaf)}{shifted(leaf, labels)}"
        if k >= call.spec.num_leaves:
            texts[k] = f"{names[k]}: {leaf.shape[1]} channels beside those of x_t"
        for one_hot in (False, True) if isinstance(leaf, Tensor) and leaf.ndim else ():
            agree = -1 if labels is None else agreement(leaf, labels, one_hot=one_hot)
            if agree > best:
                best, found = agree, (k, one_hot)
    if found[0] is None and labels is not None:  # those of the whole batch may be dropped
        dropped = (k for k in others if names[k] in LABEL_NAMES and _is_constant(call.leaves[k]))
        found = next(dropped, None), False
    return replace(
        slots,
        labels=found[0],
        one_hot=found[1],
        masks=tuple(masks),
        conditions=tuple((k, texts[k]) for k in others if k != found[0]),
        optional=lacks or any(leaf is None for leaf in call.leaves),
        size=size,
    )


def kept(slots: Slots) -> Slots:
    """The same with leaves for later calls; of those that are replaced only one entry."""
    taken = (slots.x, slots.time, slots.labels, *dict(slots.masks))
    given, leaves = dict(slots.conditions), list(slots.call.leaves)
    for k, leaf in enumerate(leaves):
        if k in given:
            leaves[k] = rows_of(leaf, slots.size, list(range(slots.size)))
        if isinstance(leaf, Tensor) and k not in given:
            leaves[k] = (leaf[:1].clone() if k in taken else leaf).detach()  # shape and type matter
    kind = leaves[slots.x].device.type
    on = torch.is_autocast_enabled(kind)
    autocast = torch.get_autocast_dtype(kind) if on else None
    return replace(slots, call=replace(slots.call, leaves=leaves), autocast=autocast)


def _is_constant(leaf: Any) -> bool:
    """Whether all samples have the same whole number."""
    return isinstance(leaf, Tensor) and is_label(leaf) and len(leaf.unique()) == 1


def _attributes(value: Any) -> list[str]:
    """Names of what an object holds; none for numbers, functions and modules."""
    if isinstance(value, (str, bytes, numbers.Number, type, nn.Module)) or callable(value):
        return []
    return [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]


def rows_of(value: Any, size: int, rows: list[int]) -> Any:
    """A value with the entries of other samples: tensors, lists, and objects that hold them."""
    found = _taken(value, size, rows)
    if found is None:
        return value.detach() if isinstance(value, Tensor) else value
    return found


@torch.no_grad()
def _taken(value: Any, size: int, rows: list[int], depth: int = 4) -> Any:
    """`rows_of` what has an entry for each sample, or holds such; None for everything else."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value[rows] if value.ndim and len(value) == size and 0 not in value.shape else None
    if isinstance(value, (list, tuple)):
        # A few numbers are a size.
        few = size <= 4 and all(isinstance(x, numbers.Number) for x in value)
        if len(value) == size and not few:
            taken = [value[k] for k in rows]
        else:
            inner = [_taken(x, size, rows, depth - 1) if depth else None for x in value]
            if all(x is None for x in inner):
                return None
            taken = [x if x is not None else old for x, old in zip(inner, value, strict=True)]
        return type(value)(*taken) if hasattr(value, "_fields") else type(value)(taken)
    mapped = isinstance(value, Mapping)
    changed, held = None, dict(value) if mapped else {}
    held = held or {name: getattr(value, name, None) for name in _attributes(value)}
    for name, old in held.items() if depth else ():
        new = _taken(old, size, rows, depth - 1)
        if new is not None:
            changed = copy.copy(value) if changed is None else changed
            # Past its own `__setattr__`: it may be frozen.
            (type(changed).__setitem__ if mapped else object.__setattr__)(changed, name, new)
    return changed


def short(leaf: Any) -> str:
    """A value in a few words."""
    if isinstance(leaf, (list, tuple)) and leaf:
        return f"{type(leaf).__name__} of {len(leaf)} {type(leaf[0]).__name__}"
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__name__


def shifted(leaf: Any, labels: Tensor | None) -> str:
    """Says if a leaf holds the labels under other numbers, with the cure; empty if not."""
    whole = isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.ndim > 0
    if labels is None or not whole or leaf.numel() != len(labels):
        return ""
    pairs = {*zip(labels.reshape(-1).tolist(), leaf.reshape(-1).tolist(), strict=True)}
    if not len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs) > 1:
        return ""
    by = {new - old for old, new in pairs}
    number = f"batch[1] {min(by):+d}".replace("+", "+ ").replace("-", "- ")
    number = number if len(by) == 1 else "the_number_of(batch[1])"
    return (
        " (the labels under other numbers; use the same numbers: "
        f"StageRun(read_batch=lambda batch: (batch[0], {number})))"
    )
