"""`RowClasses`: which rows of a bank belong to which class; refuses unknown classes."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from stagewise.masks import MaskedLabels

__all__ = ["KNOWN", "NO_LABEL", "NO_SOURCE", "NO_TIME", "RowClasses", "as_real"]

KNOWN = -(2**63)
"""Stands for a known label."""

NO_TIME, NO_SOURCE, NO_LABEL = KNOWN + 1, KNOWN + 2, KNOWN + 3
"""Stand for a time and a source out of range, and for an unknown class."""

_REFUSED = {
    NO_TIME: "Expected `t` in [0, 1] with t = 0 noise and t = 1 data, got others.",
    NO_SOURCE: "Expected `source` below the number of rows of the bank, got others.",
    NO_LABEL: (
        "Expected `labels`: a sample is no row of this bank, so its class cannot be looked up. "
        "Give the labels of the batch: classes=y to a FlowMatchingLoss, labels=y to a scheme."
    ),
}


class RowClasses:
    """The classes of rows, (N, D), that are sorted by class: `segments`, by label, ascending.

    With masks a class is one of `pairs` of label and mask, with its key (`stagewise.masks`) as its
    label.
    """

    def __init__(
        self, rows: Tensor, segments: dict[int, slice] | None, pairs: MaskedLabels | None
    ) -> None:
        self.rows, self._segments = rows, segments or {}
        self.pairs, self._of_masks = pairs, _of_masks(pairs, self._segments)
        self._class_table: dict[torch.device, Tensor] = {}
        self._unknown: deque[tuple[Tensor, Callable[[], bool]]] = deque()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def whole(self) -> slice:
        """All rows, as a slice."""
        return slice(0, len(self))

    @property
    def classes(self) -> list[int]:
        """The classes, ascending; empty without labels."""
        return list(self._segments)

    @property
    def class_ends(self) -> list[tuple[int, int, int]]:
        """Label, first row and end of each class."""
        return [(label, rows.start, rows.stop) for label, rows in self._segments.items()]

    @property
    def class_sizes(self) -> list[int]:
        """How many rows each class has."""
        return [rows.stop - rows.start for rows in self._segments.values()]

    @property
    def labelled(self) -> bool:
        """Whether the rows have labels; with masks they may have classes without labels."""
        return bool(self._segments) if self.pairs is None else self.pairs.labels is not None

    def scopes(self, class_wise: bool) -> list[slice]:
        """The rows that a posterior is over: each class, or all rows, or all rows of each mask."""
        if class_wise:
            self.require_classes()
            return list(self._segments.values())
        return [self.whole] if self.pairs is None else list(self._of_masks.values())

    @cached_property
    def median_class(self) -> int:
        """Size of the class of the median row."""
        sizes = sorted(self.class_sizes)
        return next(size for i, size in enumerate(sizes) if 2 * sum(sizes[: i + 1]) >= len(self))

    def require_classes(self) -> None:
        """Refuses a bank without labels, with the cure."""
        if not self._segments:
            raise ValueError(
                "A class-wise posterior needs a bank with labels: LatentBank(x, labels)."
            )

    def require_unmasked(self, what: str, cure: str) -> None:
        """Refuses a bank with masks, with the cure."""
        if self.pairs is not None:
            raise ValueError(f"{what} does not support masks, and the bank has some. {cure}")

    def has_masks(self, masks: MaskedLabels) -> Tensor:
        """Which samples have a mask (and label) that some row has, (n,), on the host."""
        known = {*self._of_masks, *self._segments}
        return torch.tensor([key in known for key in masks.tolist()])

    def segment(self, label: int) -> slice:
        """The rows of a class, as a slice of the bank's own order; refuses an unknown class."""
        found = self._segments.get(label, self._of_masks.get(label))
        if found is not None:
            return found
        self.require_classes()
        if self.pairs is not None:
            raise ValueError(
                f"No row of the bank has this mask (and label), and its {len(self._of_masks)} "
                "masks are those it was built from. Build the bank from the masks that training "
                "uses: LatentBank(x, labels, mask=mask)."
            )
        known = self.classes
        raise ValueError(
            f"Class {label} is not in the bank, which has {len(known)} classes from {known[0]} to "
            f"{known[-1]}. Build the bank from the labels that training uses. If it is the label "
            "for dropped classes (classifier-free guidance), give labels from before dropping, "
            f"labels=batch[1], or say so: Oracle(bank, null_class={label})."
        )

    @cached_property
    def largest_class(self) -> int:
        """Most rows of a class, or of a mask with any label; 0 without labels and masks."""
        ends = [*self._segments.values(), *self._of_masks.values()]
        return max((rows.stop - rows.start for rows in ends), default=0)

    @cached_property
    def smallest_class(self) -> int:
        """Size of the smallest class; 0 without labels."""
        return min(self.class_sizes, default=0)

    def class_table(self, device: torch.device) -> Tensor:
        """Label, first row and end of each class and mask, (C, 3), int64, by label; made once."""
        if not self._of_masks:
            self.require_classes()
        table = self._class_table.get(device)
        if table is None:
            ends = {**self._of_masks, **self._segments}
            ordered = [(key, ends[key].start, ends[key].stop) for key in sorted(ends)]
            table = torch.tensor(ordered, device=device)
            if as_real(table, self.rows):
                self._class_table[device] = table
        return table

    def report(self, told: Tensor) -> None:
        """Makes a later call refuse wrong samples; does not wait for the device.

        `told` is for each sample its label if that is unknown, `NO_TIME`, `NO_SOURCE` or
        `NO_LABEL`, otherwise `KNOWN`; (B,), int64.
        """
        self._require_known()
        if sent := _sent(told):
            self._unknown.append(sent)

    def _require_known(self) -> None:
        """Refuses a label, time or source that was reported; does not wait for the device."""
        while self._unknown and self._unknown[0][1]():
            label = int(self._unknown.popleft()[0].max())
            if label != KNOWN:
                self._unknown.clear()
                if label in _REFUSED:
                    raise ValueError(_REFUSED[label])
                self.segment(label)

    def labels_of(self, rows: Sequence[int]) -> list[int]:
        """The class of each of `rows` (own order), as Python integers, without a device sync."""
        classes = self.classes
        return [classes[at] for at in self.segments_at(rows)]

    def classes_of(self, rows: Sequence[int]) -> Tensor | MaskedLabels | None:
        """The labels of rows, (n,), as `MaskedLabels` if they have masks; None without classes."""
        if self.pairs is None:
            return torch.tensor(self.labels_of(rows)) if self._segments else None
        return self.pairs[torch.tensor(self.segments_at(rows))]

    def segments_at(self, rows: Sequence[int]) -> list[int]:
        """The position of the class of each of `rows` in `classes`."""
        stops = [segment.stop for segment in self._segments.values()]
        return [bisect_right(stops, row) for row in rows]


def _of_masks(pairs: MaskedLabels | None, segments: dict[int, slice]) -> dict[int, slice]:
    """The rows of each mask by its key, with any label; they are contiguous."""
    found: dict[int, slice] = {}
    keys = () if pairs is None else pairs.unlabelled().tolist()
    for key, rows in zip(keys, segments.values(), strict=pairs is not None):
        found[key] = slice(found[key].start if key in found else rows.start, rows.stop)
    return found


def _sent(told: Tensor) -> tuple[Tensor, Callable[[], bool]] | None:
    """Numbers on their way to the host, and whether they have arrived; None if not sent."""
    if not told.is_cuda:
        return told, lambda: True
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None  # fake tensors, or a graph, which makes no later call
    there = torch.empty_like(told, device="cpu", pin_memory=True)
    there.copy_(told, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return there, event.query


def as_real(value: Tensor, like: Tensor) -> bool:
    """Whether `value` may be cached for `like`: a fake tensor may not be for a real one."""
    return type(value) is type(like)
