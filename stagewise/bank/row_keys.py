"""One number for each row, to find rows and to name a bank.

The key of a row is the sum of its bits, read as integers, times fixed odd weights, modulo 2^64. A
sum of integers does not depend on its order, so a key is the same on every device, in every batch
and version of torch. Rows that differ in one number have different keys; rows that differ in more
have equal keys with a probability of about 2^-48.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CLASS_FACTOR",
    "condition_keys",
    "find_among",
    "find_rows",
    "key_weights",
    "row_keys",
]

CLASS_FACTOR = 0x27BB2EE687B0B0FD
"""The keys of the rows of a class get this odd number times the first row of the class added."""

_BLOCK = 2**20  # words at a time: their 64-bit products stay in the cache


def row_keys(rows: Tensor) -> Tensor:
    """The keys of rows (N, D) of floating-point numbers, or of masks: (N,), int64."""
    # A 64-bit number is two words: one that was float32 ends in zeros, so a product of 64-bit words
    # would keep only its upper half.
    word = {1: torch.bool, 2: torch.int16}.get(rows.dtype.itemsize, torch.int32)
    words = rows.shape[1] * rows.dtype.itemsize // word.itemsize
    factor = key_weights(words, rows.device)
    step = max(1, _BLOCK // words)
    # Into one tensor: many small ones between the large ones of a block would break up the heap,
    # which then keeps twice the bank.
    keys = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for block, out in zip(rows.split(step), keys.split(step), strict=True):
        # Adding zero gives -0 the bits of 0.
        numbers = block if word == torch.bool else (block + 0.0).contiguous().view(word)
        torch.sum(numbers * factor, 1, out=out)
    return keys


def condition_keys(conditions: Tensor) -> Tensor:
    """The keys of conditions (N, C), floating-point, to be added to those of their rows, (N,)."""
    # Another odd factor: exchanging a row and its condition changes the sum.
    return row_keys(conditions) * 0x5851F42D4C957F2D


def key_weights(words: int, device: torch.device) -> Tensor:
    """Odd numbers of NumPy's RandomState, whose stream never changes; those of torch may."""
    made = _made.get((words, device))
    if made is None:
        odd = np.frombuffer(np.random.RandomState(0).bytes(8 * words), dtype="<i8") | 1
        made = torch.tensor(odd, device=device)
        if type(made) is Tensor:  # a fake tensor belongs to its own mode
            _made[words, device] = made
    return made


_made: dict[tuple[int, torch.device], Tensor] = {}


def find_rows(
    read: Callable[[Tensor], Tensor],
    index: tuple[Tensor, Tensor],
    wanted: Tensor,
    more: Tensor | int = 0,
) -> Tensor:
    """The number of a row that equals each of `wanted`, (B, D), or -1.

    `read` returns rows by their numbers, (n,); `index` holds the keys in ascending order and their
    rows, each (N,); `more` is added to the keys of `wanted`.
    """
    keys, order = index
    key = row_keys(wanted) + more
    # Equal keys are contiguous. Both ends are compared, as two different rows may, very rarely,
    # share a key.
    first = torch.searchsorted(keys, key).clamp_max(len(keys) - 1)
    last = (torch.searchsorted(keys, key, right=True) - 1).clamp_min(0)
    # On an accelerator this comparison would be a sync.
    once = type(key) is Tensor and key.device.type == "cpu" and torch.equal(first, last)
    if once and torch.equal(keys[first], key):
        row = order.index_select(0, first)
        if torch.equal(read(row), wanted):
            return row  # as in training
    place = first[None] if once else torch.stack([first, last])
    # Without an equal key any row will do to be read: row 0.
    alike = keys[place] == key
    row = order[place] * alike
    same = (read(row.flatten()).unflatten(0, row.shape) == wanted).all(2) & alike
    return row.where(same, -1).amax(0)


def find_among(rows: Tensor, wanted: Tensor) -> Tensor:
    """The index in `rows`, (N, *), of each of `wanted`, (B, *), at its precision, or -1."""
    if rows.shape[1:] != wanted.shape[1:] or not len(rows):
        return torch.full((len(wanted),), -1, device=wanted.device)
    rows, wanted = rows.detach().to(wanted).flatten(1), wanted.detach().flatten(1)
    keys, order = row_keys(rows).sort()
    return find_rows(lambda at: rows[at], (keys, order), wanted)
