"""The steps that build a bank: samples are read, rounded, sorted by class and measured.

A row is stored as `(x - offset)` rounded to the storage type, and a sample is `row + offset`. With
an offset near the mean, a 16-bit type rounds relative to the distance from the mean, not from zero:
pixels in [0, 255] or latents with a bias lose no digits to their mean. Wider types have no offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stagewise.batches import PADDED, ReadBatch, as_labels, read_checked
from stagewise.masks import MaskedLabels, as_mask, join
from stagewise.memory import require_memory

__all__ = [
    "BLOCK",
    "HALF",
    "as_tensor",
    "class_order",
    "measure",
    "narrow",
    "offset_for",
    "read_batches",
    "require_rows",
    "require_spread",
    "require_storage",
    "sort_in_place",
    "whole_labels",
]

HALF = (torch.bfloat16, torch.float16)
"""The 16-bit types, which get an offset."""

BLOCK = 2**20
"""Numbers per block where float64 results need the whole bank: the copies stay in the cache, and
their memory is used again."""

_STORAGE = (torch.float32, torch.float64, *HALF)
_FIRST = 256  # rows for the offset, if not all are known
_SORTED = 2**24  # numbers that are moved at a time; wider blocks of columns are faster
_LEAST = 2**-13
"""A standard deviation below which float16, whose numbers are 2^-24 apart there, loses digits."""


def as_tensor(value: Tensor | np.ndarray, name: str) -> Tensor:
    """A tensor as it is; an array, in any byte order, as a tensor, without a copy if possible."""
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
    """Labels of shape (count,) or (count, 1), integers or whole floats, as int64, (count,).

    Refuses others. Integers cost no device sync.
    """
    given = as_tensor(labels, "labels")
    if (whole := as_labels(given, count, booleans=True)) is not None:
        return whole
    got = f"{given.dtype}, not all whole numbers. Only classes are labels."
    if given.shape not in ((count,), (count, 1)):
        cure = " For one-hot labels give labels.argmax(1)." if given.ndim == 2 else ""
        got = f"{tuple(given.shape)}.{cure}"
    raise ValueError(f"Expected integer `labels` with shape ({count},), got {got}")


def require_rows(shape: tuple[int, ...]) -> None:
    """Refuses a shape of all samples that is not (N, *) with at least two rows."""
    if len(shape) < 2 or shape[0] < 2 or 0 in shape:
        raise ValueError(
            f"Expected `x` with shape (N, *) and at least 2 rows, got {shape}. "
            "A posterior over one sample is that sample at all t: it has no stages."
        )


def require_storage(dtype: torch.dtype) -> torch.dtype:
    """Refuses a type that rows are not stored in."""
    if dtype not in _STORAGE:
        raise TypeError(f"Expected `dtype` among {_STORAGE}, got {dtype}.")
    return dtype


class Incoming(NamedTuple):
    """Samples of batches on their way into a bank, on the host."""

    parts: Iterator[tuple[int, Tensor, Tensor | None]]  # rows before, rows (n, D), labels
    shape: tuple[int, ...]  # of a sample
    dtype: torch.dtype  # of the stored rows
    offset: Tensor
    narrowed: bool  # whether samples had another type
    masks: MaskedLabels | None  # of all rows


def read_batches(
    batches: Iterable[Any],
    num_rows: int,
    read_batch: ReadBatch,
    dtype: torch.dtype | None,
    offset: Tensor | None,
    advance: Callable[[int], object] | None,
    copies: int | None = None,
    mask: Tensor | None = None,
) -> Incoming:
    """The first `num_rows` samples; the arguments are those of `LatentBank.from_batches`.

    With `copies`, samples that do not fit in memory are refused after the first batch. If masks
    are not given but found in the batches, all are read at once: the longest sample is known only
    after the last.
    """
    found = (read_checked(read_batch, batch) for batch in batches)
    first = next(found, None)
    if first is None:
        raise ValueError(f"Expected {num_rows} rows in the batches, got 0.")
    shape = tuple(first[0].shape[1:])
    require_rows((num_rows, *shape))
    masked = isinstance(first[1], MaskedLabels)
    if masked and mask is None and copies is None:
        raise ValueError(
            "Expected the masks of all rows beforehand, as rows are written in order of mask: "
            "LatentBank.write(path, batches, num_rows, mask=mask). Or, in memory: "
            "LatentBank.from_batches(batches, num_rows, read_batch=read_batch).save(path)."
        )
    masks = None if mask is None else MaskedLabels(None, as_mask(mask, num_rows, shape), shape)

    def read() -> Iterator[tuple[int, Tensor, Any]]:
        done = 0
        for x1, labels in chain([first], found):
            own = isinstance(labels, MaskedLabels)
            if own != masked:
                raise ValueError(
                    "Expected a mask in all batches or in none, got some in one and none in "
                    f"another after {done} rows. Let `read_batch` return one of each."
                )
            if x1.shape[1:] != shape and (masks is not None or not own):
                raise ValueError(
                    f"Expected samples of shape {shape} as in the first batch, got "
                    f"{tuple(x1.shape[1:])} after {done} rows. {PADDED}"
                )
            x1 = x1[: num_rows - done].detach().cpu()
            labels = None if labels is None else labels[: len(x1)].cpu()
            if masks is not None:
                here = masks[done : done + len(x1)].cpu()
                if own and not torch.equal(labels.entries, here.entries):  # type: ignore[union-attr]
                    raise ValueError(
                        f"Expected batches in the order of `mask`, got other masks after {done} "
                        "rows. Read without shuffling."
                    )
                x1, labels = here.zero(x1), labels.labels if own else labels  # type: ignore[union-attr]
            yield done, x1, labels
            done += len(x1)
            if advance is not None:
                advance(done)
            if done == num_rows:
                return
        raise ValueError(f"Expected {num_rows} rows in the batches, got {done}.")

    given, samples = first[0].dtype, read()
    dtype = require_storage(dtype or given)
    if copies is not None:
        require_memory(num_rows, math.prod(shape), dtype, copies)
    if masked and masks is None:
        x, masks = join([(x1, labels) for _, x1, labels in samples])
        assert isinstance(masks, MaskedLabels)
        shape, known = masks.shape, masks.labels
        samples = iter([(0, masks.zero(x), known)])
    flat = ((done, x1.flatten(1), labels) for done, x1, labels in samples)
    held = []
    for part in flat:
        held.append(part)
        if part[0] + len(part[1]) >= _FIRST:
            break
    some = torch.cat([x1 for _, x1, _ in held])[:_FIRST]
    middle = offset_for(some, dtype, offset, masks is not None)
    parts = ((done, narrow(x1, middle, dtype), y) for done, x1, y in chain(held, flat))
    return Incoming(parts, shape, dtype, middle, given != dtype, masks)


def class_order(
    labels: Tensor | np.ndarray | None,
    num_rows: int,
    device: torch.device | str = "cpu",
    masks: MaskedLabels | None = None,
) -> tuple[Tensor | None, dict[int, slice], MaskedLabels | None]:
    """The order of rows in which those of a class, or of a mask and a class, are contiguous.

    The old position of each row, (N,); the classes, ascending, with their rows; and with masks the
    pairs, by mask from short to long, then by label. Without labels and masks: None, {}, None.
    """
    if labels is not None:
        labels = whole_labels(as_tensor(labels, "labels").to(device), num_rows)
    if masks is None and labels is None:
        return None, {}, None
    if masks is None:
        assert labels is not None
        index, keys = torch.argsort(labels, stable=True), labels
    else:
        masks = replace(masks.to(device), labels=labels)
        index, keys = torch.arange(num_rows, device=device), masks.keys()
        for order in (labels, masks.unlabelled().keys(), masks.counts):
            index = index if order is None else index[torch.argsort(order[index], stable=True)]
    classes, counts = torch.unique_consecutive(keys[index], return_counts=True)
    stops = counts.cumsum(0)
    pairs = None if masks is None else masks[index[stops - 1]].cpu()
    ends = zip([0, *stops.tolist()[:-1]], stops.tolist(), strict=True)
    segments = {key: slice(*pair) for key, pair in zip(classes.tolist(), ends, strict=True)}
    return index, segments, pairs


def sort_in_place(rows: Tensor, index: Tensor | None) -> None:
    """Assigns `rows[index]` to `rows`, (N, D), without a second copy, which may not fit."""
    if index is not None:
        for columns in rows.split(max(1, _SORTED // len(rows)), dim=1):
            columns.copy_(columns[index])


def offset_for(
    x: Tensor, dtype: torch.dtype, given: Tensor | None = None, masked: bool = False
) -> Tensor:
    """What to subtract from samples, (N, D), before they are rounded to `dtype`: (D,), float64.

    For a 16-bit type it is `given`, or the mean of the finite samples, as float32 numbers: these
    have few digits, so `row + offset` in float64 is exact, and `(row + offset) - offset` is `row`
    again. It is zero if samples already have that type, and for wider types. If they are `masked`
    it is rounded to `dtype`: then numbers that are 0, as in padding, stay 0.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    if dtype not in HALF or x.dtype == dtype:
        return total
    if given is not None:
        if given.numel() != x.shape[1] or not given.isfinite().all():
            raise ValueError(
                f"Expected `offset` of {x.shape[1]} finite numbers, as many as a sample has, got "
                f"shape {tuple(given.shape)}. Give a vector near the mean, for example "
                "x[:1000].float().mean(0)."
            )
        mean = given.detach().flatten().to(x.device)
    else:
        count = torch.zeros((), dtype=torch.int64, device=x.device)
        for block in x.split(max(1, BLOCK // x.shape[1])):
            finite = block.isfinite().all(1)
            total += block.double().where(finite[:, None], 0.0).sum(0)
            count += finite.sum()
        mean = total / count.clamp_min(1)
    return mean.float().to(dtype if masked else torch.float32).double()


def narrow(x: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples (N, D) as they are stored, `(x - offset)` rounded to `dtype`; `x` if nothing changes.

    Refuses finite numbers beyond the range of `dtype`; NaN and Inf pass.
    """
    if x.dtype == dtype and dtype not in HALF:
        return x
    rows = torch.empty_like(x, dtype=dtype)
    step = max(1, BLOCK // x.shape[1])
    for block, out in zip(x.split(step), rows.split(step), strict=True):
        out.copy_(block.double() - offset)
        beyond = out.isinf() & block.isfinite()
        if beyond.any():
            largest = float(block[beyond].double().abs().max())
            cure = "bfloat16 or dtype=torch.float32" if dtype == torch.float16 else "float64"
            where = " from the mean" if dtype in HALF else ""
            raise ValueError(
                f"Expected numbers that fit into {dtype}, which ends at "
                f"{torch.finfo(dtype).max:.5g}{where}, got values beyond range, the largest "
                f"{largest:.5g}. Store them as dtype=torch.{cure}, or scale them."
            )
    return rows


def require_spread(spread: float, dtype: torch.dtype) -> None:
    """Refuses rows with a root mean square that is too small for float16."""
    if dtype == torch.float16 and spread < _LEAST:
        raise ValueError(
            f"Expected samples that differ from their mean by at least {_LEAST:.2g}, root mean "
            f"square, to be stored as {dtype}, which has few numbers near zero, got {spread:.2g}. "
            "Store them as dtype=torch.bfloat16 or torch.float32, or scale them."
        )


def measure(rows: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of rows (N, D), and their squared distances from it, (N,), float64, in two passes.

    Refuses rows with NaN or Inf; the message counts rows in the user's order, by `index`.
    """
    wide, device = torch.float64, rows.device
    step = max(1, BLOCK // rows.shape[1])
    total = torch.zeros(rows.shape[1], dtype=wide, device=device)
    # Results are written to memory that is allocated first: small tensors between large temporary
    # ones would fragment the heap, by as many bytes as the bank has.
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
