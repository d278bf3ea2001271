"""Which samples that are trained on are which of a batch, and which numbers are their classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.row_keys import find_among
from stagewise.batches import leaves_of

__all__ = [
    "agreement",
    "equals",
    "is_label",
    "labels_in",
    "labels_of_rows",
    "place_of",
    "version_of",
]


def equals(x: Any, x1: Tensor) -> bool:
    """Whether a value is a tensor equal to `x1`, at the precision of the value."""
    return isinstance(x, Tensor) and x.shape == x1.shape and torch.equal(x, x1.to(x))


def version_of(x: Tensor) -> int:
    """A number that grows with each change in place; 0 for inference tensors."""
    return 0 if x.is_inference() else x._version


def is_label(x: Tensor) -> bool:
    """Whether a tensor can hold the class of each sample."""
    return not x.is_floating_point() and x.ndim > 0 and x.numel() == len(x)


def place_of(tensor: Tensor | None, batch: Any) -> str:
    """Where a tensor lies in a batch, such as "batch[0]"; empty if it is not there."""
    if tensor is None:
        return ""
    for place, leaf in leaves_of(batch):
        alike = leaf.shape == tensor.shape or leaf.numel() == tensor.numel() == len(tensor)
        if alike and torch.equal(leaf.reshape(tensor.shape).to(tensor), tensor):
            return place
    return ""


def labels_in(bank: LatentBank | None, x1: Tensor, masks: object = None) -> Tensor | None:
    """The classes of samples in a bank, (n,), int64; None if it has none, or not all samples."""
    if bank is None or not bank.classes or tuple(x1.shape[1:]) != bank.shape:
        return None
    rows = bank.find(x1, masks)
    if not bool((rows >= 0).all()):
        return None
    return torch.tensor(bank.labels_of(rows.tolist()), device=rows.device)


def labels_of_rows(
    x1: Tensor, own: Tensor, labels: Tensor, bank: LatentBank | None
) -> Tensor | None:
    """The classes of samples `x1`, (n,), int64, from those of the batch; None if not known.

    A sample of the batch keeps its label, in any order. Changed samples (flips, noise) are taken
    to come from the sample in the same place, unless the unchanged ones have moved.
    """
    if equals(x1, own):
        return labels
    rows = find_among(own, x1)
    known = rows >= 0
    if bool(known.all()):
        first = find_among(own, own)
        unsure = first[labels[first] != labels]  # equal rows of several classes
        return None if bool(torch.isin(rows, unsure).any()) else labels[rows]
    stored = labels_in(bank, x1)
    if stored is not None:
        return stored.to(labels)
    if not bool(known.any()):
        return labels if len(x1) == len(own) else None
    at = int(known.nonzero()[0])
    start = 0 if len(x1) == len(own) else int(rows[at]) - at
    piece = own[start : start + len(x1)] if start >= 0 else own[:0]
    if len(piece) < len(x1) or not bool((piece.to(x1) == x1).flatten(1).all(1)[known].all()):
        return None
    return labels[start : start + len(x1)]


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
        return size if equals(leaf.reshape(-1), labels) else -1
    else:
        classes = leaf.reshape(-1).long()
    other = classes != labels
    dropped, agree = classes[other].unique(), size - int(other.sum())
    return agree if len(dropped) <= 1 and agree else -1
