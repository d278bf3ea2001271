"""Finds labels among the arguments of a network, and arguments that are columns of one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Columns", "agreement", "apart", "columns_of", "equal", "joined", "shifted"]

Columns = tuple[tuple[int, int], ...]
"""The parts of a leaf with two axes, in the order of its columns: their leaves and widths.

The first part takes the place of the leaf, the others follow after all leaves.
"""


def apart(leaves: Sequence[Any], columns: Columns) -> list[Any]:
    """Splits the leaf that is made of columns into its parts."""
    found = list(leaves)
    if columns:
        found += [None] * (len(columns) - 1)
        parts = found[min(columns)[0]].split([width for _, width in columns], 1)
        for (k, _), part in zip(columns, parts, strict=True):
            found[k] = part
    return found


def joined(leaves: Sequence[Any], columns: Columns) -> list[Any]:
    """Undoes `apart`."""
    if not columns:
        return list(leaves)
    first, found = min(columns)[0], list(leaves[: len(leaves) - len(columns) + 1])
    found[first] = torch.cat([leaves[k].to(leaves[first].dtype) for k, _ in columns], 1)
    return found


def columns_of(
    i: int, count: int, x: Tensor, shape: tuple[int, ...] | None, labels: Tensor | None
) -> Iterator[Columns]:
    """All ways to split leaf `i` of `count` into `x_t`, a time and, if columns are left, labels."""
    width = x.shape[1] - 1 if shape is None else shape[1]
    left = x.shape[1] - width - 1
    if width < 1 or left < 0 or (shape is not None and len(shape) != 2):
        return
    parts = [(i, width), (count, 1)]
    if not left:
        yield from [tuple(parts)] if shape is None else itertools.permutations(parts)
    elif labels is not None:
        leaves = [x if k == i else None for k in range(count)]
        for columns in itertools.permutations([*parts, (count + 1, left)]):
            rest = apart(leaves, columns)[count + 1]
            if max(agreement(rest, labels, one_hot=one_hot) for one_hot in (False, True)) > 0:
                yield columns


def agreement(leaf: Tensor, labels: Tensor, *, one_hot: bool) -> int:
    """How many of the batch's labels a leaf has; -1 if it does not hold them.

    Labels that were dropped, for classifier-free guidance, all have one other value.
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
        return size if equal(leaf.reshape(-1), labels) else -1
    else:
        classes = leaf.reshape(-1).long()
    other = classes != labels
    dropped, agree = classes[other].unique(), size - int(other.sum())
    return agree if len(dropped) <= 1 and agree else -1


def equal(x: Tensor, labels: Tensor) -> bool:
    """Whether numbers, (B,), equal the labels."""
    labels = labels.reshape(-1).to(x.device)
    return x.shape == labels.shape and bool((x.double() == labels.double()).all())


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
