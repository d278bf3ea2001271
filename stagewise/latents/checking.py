"""What is wrong with latents that opened: their scale, their labels, their numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagewise.latents.files import Problem

if TYPE_CHECKING:
    from stagewise.latents.base import Flips, Latents

__all__ = ["class_numbers", "is_one_hot", "require_labels", "require_scale", "unreadable"]

_BLOCK = 2**22  # numbers read at a time


def require_scale(latents: Latents, max_rows: int) -> None:
    """Refuses samples whose root mean square is far from that of their format.

    Args:
        latents: The latents.
        max_rows: How many, evenly spaced, are looked at.

    Raises:
        ValueError: With what to switch.
    """
    expected = latents.reading.expected_std or latents.usual_std
    mean, std = latents.statistics(max_rows).overall()
    size, most = math.hypot(mean, std), latents.scale_range
    # What is not finite is named by whoever reads all rows.
    if not math.isfinite(size) or expected / most < size < expected * most:
        return
    raise ValueError(
        f"Expected latents of standard deviation about {expected:.3g}, got {std:.3g} (mean "
        f"{mean:.3g}) in {latents.path}, read as {latents.name}, {latents.scaling}. "
        f"{latents._cure(size > expected)}If this is what training uses: expected_std={size:.3g}."
    )


def class_numbers(labels: Tensor, rows: int, name: str, path: Path) -> Tensor:
    """Labels as class numbers, one for each row.

    Args:
        labels: Whole numbers of any type, (N,) or (N, 1).
        rows: N.
        name: What they are called, for the message.
        path: Where they are.

    Returns:
        (N,), int64.

    Raises:
        Problem: If they are something else, with what it is and the cure.
    """
    expected = f"Expected {name} as {rows} integers, {name} of shape {(rows,)} in {path}, got"
    if labels.shape not in ((rows,), (rows, 1)):
        if is_one_hot(labels, rows):
            raise Problem(
                f"{expected} one-hot rows, {tuple(labels.shape)}. Write their class numbers: "
                "labels.argmax(1)."
            )
        raise Problem(
            f"{expected} {labels.dtype} {tuple(labels.shape)}. Write one class number for each "
            "row, or leave them out."
        )
    numbers = labels.reshape(rows).to(torch.int64, copy=True)
    if labels.is_complex() or not torch.equal(numbers.to(labels.dtype), labels.reshape(rows)):
        raise Problem(f"{expected} {labels.dtype}. Write class numbers: labels.long().")
    return numbers


def is_one_hot(labels: Tensor, rows: int) -> bool:
    """Whether the first rows of (N, k) have a single 1 each, and zeros."""
    if labels.ndim != 2 or labels.shape[0] != rows or labels.shape[1] < 2:
        return False
    some = labels[:64].float()
    return bool(((some == 0) | (some == 1)).all() and (some.sum(1) == 1).all())


def require_labels(labels: Tensor, limit: int | None, path: Path) -> None:
    """Refuses labels that are negative, or not below `limit`.

    Args:
        labels: (N,).
        limit: How many classes there are, or None.
        path: For the message.

    Raises:
        ValueError: With the first such label and its row.
    """
    wrong = labels < 0 if limit is None else (labels < 0) | (labels >= limit)
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0, 0])
    wanted = "of at least 0" if limit is None else f"in 0 to {limit - 1}"
    raise ValueError(
        f"Expected labels {wanted}, got {int(labels[row])} in row {row} of {path}, and "
        f"{int(wrong.sum())} such labels in all. "
        + ("Correct them." if limit is None else "Correct them, or num_classes.")
    )


def unreadable(latents: Latents) -> list[str]:
    """Reads all rows, their flips too, and all labels.

    Returns:
        What is wrong with them, a sentence each.
    """
    wrong = []
    try:
        _ = latents.labels
    except ValueError as error:
        wrong.append(str(error))
    flips: Flips = "both" if latents.has_flips else "none"
    every = latents.with_options(flips=flips, moments="mean")
    block = max(1, _BLOCK // math.prod(latents.shape))
    for start in range(0, len(every), block):
        stop = min(start + block, len(every))
        try:
            finite = every.rows(start, stop).flatten(1).isfinite().all(1)
        except (ValueError, OSError):
            finite = torch.zeros(stop - start, dtype=torch.bool)
        for index in (start + (~finite).nonzero()[:, 0]).tolist():
            row, flip = every._locate(index)
            name = f"row {row}{' (flip)' * flip}"
            try:
                if not every.rows(index, index + 1).isfinite().all():
                    wrong.append(f"{name} has NaN or Inf. Encode it again.")
            except (ValueError, OSError) as error:
                wrong.append(f"{name} cannot be read: {error}")
    return wrong
