"""What happens to samples on their way into a bank: reading, sorting by class, measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stagewise.batches import FindSample, find_checked
from stagewise.narrowing import BLOCK

__all__ = [
    "as_tensor",
    "class_order",
    "first_rows",
    "measure",
    "read_batches",
    "require_labels",
    "require_rows",
    "sort_in_place",
    "whole_labels",
]

_FIRST = 256  # rows that stand for all when not all are there yet

_SORTED = 2**24  # numbers that are moved at a time, of few columns: the wider, the faster

Part: TypeAlias = "tuple[int, Tensor, Tensor | None]"


def as_tensor(value: Tensor | np.ndarray, name: str) -> Tensor:
    """Numbers as a tensor: one as it is, and an array without a copy where that is possible.

    Args:
        value: A tensor, or a NumPy array in any byte order.
        name: For the message.

    Raises:
        TypeError: If it is something else, with the cure.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(
            f"Expected `{name}` to be a tensor or a NumPy array of numbers, got {kind}. Give "
            f"torch.as_tensor({name})."
        )
    native = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def whole_labels(labels: Tensor | np.ndarray, count: int) -> Tensor:
    """Labels as integers: also those of shape (count, 1), and whole numbers of a float type.

    Args:
        labels: Classes, (count,) or (count, 1).
        count: How many samples there are.

    Returns:
        (count,), int64. Integers cost no device sync.

    Raises:
        ValueError: If there is another number of labels, or they are no whole numbers.
    """
    given = as_tensor(labels, "labels")
    flat = given[:, 0] if given.ndim == 2 and given.shape[1] == 1 else given
    if flat.shape != (count,):
        raise ValueError(
            f"Expected integer `labels` with shape ({count},), got {tuple(given.shape)}."
        )
    if flat.is_complex() or (flat.is_floating_point() and bool((flat != flat.round()).any())):
        raise ValueError(
            f"Expected integer `labels` with shape ({count},), got {given.dtype}, not all whole "
            "numbers. Only classes are labels."
        )
    return flat.long()


def require_rows(shape: tuple[int, ...]) -> None:
    """Refuses data that no posterior can be about.

    Args:
        shape: Shape of all samples together.

    Raises:
        ValueError: If it is not (N, *) with at least two rows and a number in each.
    """
    if len(shape) < 2 or shape[0] < 2 or 0 in shape:
        raise ValueError(
            f"Expected `x` with shape (N, *) and at least 2 rows, got {shape}. "
            "A posterior over fewer than two samples says nothing."
        )


def read_batches(
    batches: Iterable[Any],
    num_rows: int,
    find: FindSample,
    advance: Callable[[int], object] | None = None,
) -> tuple[Iterator[Part], tuple[int, ...], torch.dtype]:
    """Reads the first `num_rows` samples.

    Args:
        batches: Batches of anything that `find` understands; each sample once.
        num_rows: How many rows there are; rows beyond it are not read.
        find: From a batch to `(x_1, labels or None)`.
        advance: Called with the number of rows read so far.

    Returns:
        An iterator over `(rows before, samples (n, D), labels (n,) or None)`, detached and on the
        host; the shape of a sample; and the type of those in the first batch, which has been read.

    Raises:
        ValueError: If there are fewer rows than promised or shapes differ between batches, the
            latter two by the iterator.
    """
    found = (find_checked(find, batch) for batch in batches)
    first = next(found, None)
    if first is None:
        raise ValueError(f"Expected {num_rows} rows in the batches, got 0.")
    shape = tuple(first[0].shape[1:])
    require_rows((num_rows, *shape))

    def parts() -> Iterator[Part]:
        done = 0
        for x1, labels in chain([first], found):
            if x1.shape[1:] != shape:
                raise ValueError(
                    f"Expected samples of shape {shape} as in the first batch, got "
                    f"{tuple(x1.shape[1:])} after {done} rows."
                )
            x1 = x1[: num_rows - done].detach().cpu().flatten(1)
            yield done, x1, None if labels is None else labels[: len(x1)].detach().cpu()
            done += len(x1)
            if advance is not None:
                advance(done)
            if done == num_rows:
                return
        raise ValueError(f"Expected {num_rows} rows in the batches, got {done}.")

    return parts(), shape, first[0].dtype


def first_rows(parts: Iterator[Part]) -> tuple[Tensor, Iterator[Part]]:
    """The first rows, the same ones whatever the batches are.

    Args:
        parts: What `read_batches` iterates over.

    Returns:
        At most 256 rows, (n, D), and an iterator over the same parts from the first on.
    """
    held: list[Part] = []
    for part in parts:
        held.append(part)
        if part[0] + len(part[1]) >= _FIRST:
            break
    return torch.cat([x1 for _, x1, _ in held])[:_FIRST], chain(held, parts)


def require_labels(found: Tensor, labels: Tensor, done: int) -> None:
    """Refuses batches that come in another order than the labels that were given.

    Args:
        found: Labels in a batch, (n,).
        labels: Those of all rows, (N,).
        done: How many rows came before the batch.

    Raises:
        ValueError: If they differ.
    """
    given = labels[done : done + len(found)].to(found)
    if not torch.equal(given, found):
        raise ValueError(
            f"Expected batches in the order of `labels`, got a batch with labels {found.tolist()} "
            f"after {done} rows, where {given.tolist()} were given. Read without shuffling, or, if "
            "these are no labels: find=lambda batch: (batch[0], None)."
        )


def class_order(labels: Tensor, num_rows: int) -> tuple[Tensor, dict[int, slice]]:
    """The order that brings rows of a class together.

    Args:
        labels: See `whole_labels`.
        num_rows: N.

    Returns:
        The old position of each row in the new order, (N,), and the classes, ascending, with their
        rows. Rows of a class keep their order.

    Raises:
        ValueError: If there is another number of labels, or they are no whole numbers.
    """
    labels = whole_labels(labels, num_rows)
    index = torch.argsort(labels, stable=True)
    classes, counts = torch.unique_consecutive(labels[index], return_counts=True)
    stops = counts.cumsum(0).tolist()
    ends = zip([0, *stops[:-1]], stops, strict=True)
    return index, {
        int(label): slice(*pair) for label, pair in zip(classes.tolist(), ends, strict=True)
    }


def sort_in_place(rows: Tensor, index: Tensor) -> None:
    """`rows[index]` where `rows` are, (N, D): a second copy of them may not fit."""
    for columns in rows.split(max(1, _SORTED // len(rows)), dim=1):
        columns.copy_(columns[index])


def measure(rows: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of rows and their squared distances from it, in two passes over them.

    Args:
        rows: (N, D).
        index: Where each row was in the user's order, if that is another.

    Returns:
        The mean, (D,), and the squared distances, (N,), float64.

    Raises:
        ValueError: If there are rows with NaN or Inf; their count and the first are named.
    """
    wide, device = torch.float64, rows.device
    step = max(1, BLOCK // rows.shape[1])
    total = torch.zeros(rows.shape[1], dtype=wide, device=device)
    # Results go to memory that is there: small ones, kept between large copies that come and go,
    # would leave holes in the heap, in the end as many bytes as the bank has.
    finite = torch.empty(len(rows), dtype=torch.bool, device=device)
    sq_norms = torch.empty(len(rows), dtype=wide, device=device)
    for block, out in zip(rows.split(step), finite.split(step), strict=True):
        out.copy_(block.isfinite().all(1))
        total += block.to(wide).sum(0)
    wrong = finite.logical_not_().nonzero()[:, 0]
    if len(wrong):
        places = (wrong if index is None else index[wrong]).sort().values
        raise ValueError(
            f"Expected finite rows, got NaN or Inf in {len(places)} of {len(rows)}; the first is "
            f"row {int(places[0])}. Remove them, or look at what produced them."
        )
    mean = total / len(rows)
    for block, norms in zip(rows.split(step), sq_norms.split(step), strict=True):
        norms.copy_((block.to(wide) - mean).square_().sum(1))
    return mean, sq_norms
