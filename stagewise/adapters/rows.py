"""Which samples that are trained on are which of a batch, and what their classes are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.row_keys import find_among
from stagewise.batches import leaves_of

__all__ = ["is_label", "labels_of_rows", "place_of", "same", "version_of"]


def same(own: Tensor, x1: Tensor) -> bool:
    """Whether they are equal, to the precision of `x1`."""
    return own.shape == x1.shape and torch.equal(own.to(x1), x1)


def version_of(x: Tensor) -> int:
    """Grows with each change in place."""
    return 0 if x.is_inference() else x._version


def is_label(x: Tensor) -> bool:
    """Whether a tensor that a model is given can be the class of each sample."""
    return not x.is_floating_point() and x.numel() == len(x)


def place_of(tensor: Tensor, batch: Any) -> str:
    """Where a tensor lies in a batch, as one would write it; empty if it does not."""
    for place, leaf in leaves_of(batch):
        alike = leaf.shape == tensor.shape or leaf.numel() == tensor.numel() == len(tensor)
        if alike and torch.equal(leaf.reshape(tensor.shape).to(tensor), tensor):
            return place
    return ""


def labels_of_rows(
    x1: Tensor, own: Tensor, labels: Tensor, bank: LatentBank | None
) -> Tensor | None:
    """The classes of samples, by the batch that they are of.

    Rows of the batch have the labels that they have there, in whatever order and number they
    come. Others are taken to be made from those in their place (flips, noise), unless what is
    unchanged stands in other places.

    Returns:
        (n,), int64; None if it cannot be said.
    """
    if len(own) == len(x1) and same(own, x1):
        return labels
    rows = find_among(own, x1)
    known = rows >= 0
    if bool(known.all()):
        first = find_among(own, own)
        unsure = first[labels[first] != labels]  # equal rows of several classes
        return None if bool(torch.isin(rows, unsure).any()) else labels[rows]
    if bank is not None and bank.classes and tuple(x1.shape[1:]) == bank.shape:
        stored = bank.find(x1)
        if bool((stored >= 0).all()):
            return torch.tensor(bank.labels_of(stored.tolist())).to(labels)
    if not bool(known.any()):
        return labels if len(x1) == len(own) else None
    at = int(known.nonzero()[0])
    start = 0 if len(x1) == len(own) else int(rows[at]) - at
    piece = own[start : start + len(x1)] if start >= 0 else own[:0]
    if len(piece) < len(x1) or not bool((piece.to(x1) == x1).flatten(1).all(1)[known].all()):
        return None
    return labels[start : start + len(x1)]
