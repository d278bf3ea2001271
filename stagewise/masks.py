"""Which numbers of a sample count: masks of padding and of different lengths.

A mask is applied once, on input. Numbers outside of it are set to zero, in rows and noisy samples
alike, and a sample is compared with rows of the same mask only: its class is the pair of label and
mask. Distances, weights and nearest rows are then those of the valid numbers, and corrections are
zero outside. Only means over the numbers of a sample need their count (`mean_of`, `mean_square`).

A pair has one key, the same for every bank: with fixed odd weights `w_j`, modulo 2^64,

    key = sum_{j valid} w_j + (2 label + 1) c,    without the last term where there is no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.device_checks import require_all

__all__ = [
    "MaskedLabels",
    "as_asked",
    "as_mask",
    "compared_within",
    "cut",
    "few_rows",
    "fitted",
    "join",
    "masked",
    "mean_of",
    "mean_square",
    "plain",
    "require_same_masks",
    "zeroed",
]

T = TypeVar("T")

_FEW = 10
"""A warning is given if the median sample is compared with fewer rows."""

_LABEL = 0x1E3779B97F4A7C15
"""c: odd, and without a pattern in its bits."""


@dataclass(frozen=True, eq=False)
class MaskedLabels:
    """The labels of B samples that have masks.

    Attributes:
        labels: (B,), whole numbers, or a list of whole numbers and None; None for no classes.
        mask: (B, *), bool, as it was given: true where a number counts.
        shape: Of a sample; `mask` broadcasts to it, from the left.
    """

    labels: Tensor | Sequence[int | None] | None
    mask: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, labels: Any, mask: Tensor, x: Tensor) -> MaskedLabels:
        """From the labels of samples `x`, (B, *), and a mask as in `as_mask`."""
        if isinstance(labels, MaskedLabels):
            labels = labels.labels
        shape = tuple(x.shape[1:])
        return cls(labels, as_mask(mask, len(x), shape).to(x.device), shape)

    @cached_property
    def entries(self) -> Tensor:
        """The mask at every number, (B, *)."""
        missing = len(self.shape) + 1 - self.mask.ndim
        wide = self.mask.reshape(*self.mask.shape, *[1] * missing)
        return wide.expand(-1, *self.shape)

    @cached_property
    def counts(self) -> Tensor:
        """How many numbers of each sample are valid, (B,)."""
        return self.entries.flatten(1).sum(1)

    def keys(self, null_class: int | None = None) -> Tensor:
        """The key of each pair, (B,), int64; of the mask alone for a label None or `null_class`."""
        from stagewise.bank.row_keys import row_keys  # the bank imports this module

        key, labels = row_keys(self.entries.flatten(1)), self.labels
        if labels is None:
            return key
        if not isinstance(labels, Tensor):
            none = torch.tensor([y is None or y == null_class for y in labels], device=key.device)
            labels = torch.tensor([0 if y is None else y for y in labels])
        else:
            none = labels == (torch.iinfo(torch.int64).min if null_class is None else null_class)
        labels = labels.long().to(key.device)
        return key + torch.where(none.to(key.device), 0, (2 * labels + 1) * _LABEL)

    def forms(self) -> dict[str, Tensor]:
        """The forms in which a network may take it: mask, inverse, lengths; (B, *) or (B,)."""
        return {"mask": self.mask, "~mask": ~self.mask, "lengths": self.mask.flatten(1).sum(1)}

    def is_told_by(self, value: object) -> bool:
        """Whether a value is one of its `forms`, in any type, with or without axes of size 1."""
        return isinstance(value, Tensor) and self.form_of(value) is not None

    def form_of(self, value: Tensor) -> str | None:
        """The name of the form that equals a value, or None."""
        for name, form in self.forms().items():
            alike = value.numel() == form.numel() and len(value) == len(form)
            if alike and bool((value.detach().reshape(form.shape).to(form.device) == form).all()):
                return name
        return None

    def unlabelled(self) -> MaskedLabels:
        """The masks without labels."""
        return replace(self, labels=None)

    def zero(self, x: Tensor) -> Tensor:
        """Samples (B, *) or (B, D) with zeros outside of the mask."""
        return x.where(self.entries.reshape(x.shape).to(x.device), 0)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, at: Any) -> MaskedLabels:
        labels = self.labels
        if isinstance(labels, Tensor):
            labels = labels[at]
        elif labels is not None:
            labels = [labels[i] for i in torch.arange(len(labels))[at].tolist()]
        return replace(self, labels=labels, mask=self.mask[at])

    def to(self, device: torch.device | str) -> MaskedLabels:
        """The same on a device."""
        labels = self.labels.to(device) if isinstance(self.labels, Tensor) else self.labels
        return replace(self, labels=labels, mask=self.mask.to(device))

    def cpu(self) -> MaskedLabels:
        """The same on the host."""
        return self.to("cpu")

    def tolist(self) -> list[int]:
        """The keys, which are the classes of a bank with masks."""
        return self.keys().tolist()


def as_mask(mask: Any, count: int, shape: tuple[int, ...]) -> Tensor:
    """A mask, checked against `count` samples of a shape: bool, (B, *), true where a number counts.

    Its axes are the first of the samples', each of their size or 1: (B, L) or (B, L, 1) for samples
    (B, L, d), (B, 1, L) for (B, d, L). Lengths are accepted too: integers, (B,), how many steps
    along the first axis of a sample count. Raises a TypeError for other types, a ValueError for
    another shape, a length beyond it, or a mask that is all false.
    """
    kind = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
    flat = isinstance(mask, Tensor) and mask.ndim == 1 and not mask.is_floating_point()
    if flat and mask.dtype != torch.bool and len(mask) == count:
        lengths = mask
        require_all(
            lengths <= shape[0],
            f"Expected lengths of at most {shape[0]}, the steps of a sample",
            lambda: f", got {int(lengths.max())}. Give the lengths after cutting.",
        )
        mask = torch.arange(shape[0], device=mask.device) < lengths[:, None]
    elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"Expected `mask` of bools, true where a number counts, got {kind}. Give mask.bool(), "
            "or lengths, integers of shape (B,)."
        )
    fits = 2 <= mask.ndim <= len(shape) + 1 and len(mask) == count
    if not (fits and all(m in (1, s) for m, s in zip(mask.shape[1:], shape, strict=False))):
        axes = f"mask[:, None], of shape {(count, 1, *mask.shape[1:])}"
        cure = f" If its steps are the last axis: {axes}." if mask.shape[1:] == shape[-1:] else ""
        raise ValueError(
            f"Expected `mask` with the first axes of {(count, *shape)}, each of that size or 1, "
            f"got {tuple(mask.shape)}.{cure}"
        )
    valid = mask.flatten(1).any(1)
    require_all(
        valid,
        "Expected masks with at least one valid number",
        lambda: f", got none in row {int((~valid).nonzero()[0])}. Leave such samples out.",
    )
    return mask


def masked(labels: Any, mask: Tensor | None, x: Tensor) -> Any:
    """Labels of samples `x`, (B, *), with their masks if there are any."""
    return labels if mask is None else MaskedLabels.of(labels, mask, x)


def compared_within(labels: T, class_wise: bool) -> T | None:
    """What limits the rows of a posterior: label and mask, or without `class_wise` the mask."""
    if class_wise:
        return labels
    return labels.unlabelled() if isinstance(labels, MaskedLabels) else None  # type: ignore[return-value]


def require_same_masks(bank: Any, x1: Tensor, labels: object) -> None:
    """Refuses samples, (B, *), that equal rows of a `LatentBank` but have other masks."""
    _require_both(bank, labels)
    if not isinstance(labels, MaskedLabels):
        return
    whole, (x1, of_masks) = x1, fitted(x1, labels, bank.shape)
    if x1.shape[1:] != bank.shape:
        return  # the training computes its samples from these
    rows = bank.find(x1)
    if whole.shape == x1.shape:  # with a mask of fewer numbers than its row's it equals no row
        rows = rows.where(rows >= 0, bank.find(whole))
    wrong = ((rows >= 0) & (bank.find(x1, of_masks) < 0)).nonzero()[:, 0].tolist()
    if wrong:
        at, row = wrong[0], int(rows[wrong[0]])
        both = bank.classes_of([row]), of_masks[[at]]
        has, given = (int(one.forms()["lengths"][0]) for one in both)
        raise ValueError(
            f"Expected the mask of each row, but x_1 {at} of the batch is row {row} of the bank, "
            f"which has {has} valid steps, and the batch says {given}. Give bank and batch the "
            "same mask."
        )


def _require_both(bank: Any, labels: object) -> None:
    """Refuses samples with masks and a bank without, or the other way round."""
    if (bank.pairs is not None) == isinstance(labels, MaskedLabels):
        return
    if bank.pairs is None:
        raise ValueError(
            "Expected a bank with masks for samples that have some, got one without: its padding "
            "counts as data. LatentBank(x, labels, mask=mask)."
        )
    raise ValueError(
        "Expected the masks of the samples, as the bank has masks, got none: mask=mask, or in a "
        "trainer read_batch=lambda batch: (batch[0], None, batch[1])."
    )


def few_rows(bank: Any) -> str:
    """A warning for a `LatentBank` with so many masks that few rows share one; empty otherwise."""
    if bank.pairs is None or bank.median_class >= _FEW:
        return ""
    return (
        f"A sample is compared with rows of its mask only, the median one with "
        f"{bank.median_class} of {len(bank)}: over so few rows a posterior collapses early."
    )


def plain(labels: Any) -> Any:
    """Labels without their masks."""
    return labels.labels if isinstance(labels, MaskedLabels) else labels


def zeroed(x: Tensor, labels: object) -> Tensor:
    """Samples, (B, *), with zeros outside of their masks; `x` itself without any."""
    return labels.zero(x) if isinstance(labels, MaskedLabels) else x


def as_asked(
    bank: Any, x: Tensor, labels: Any, null_class: int | None
) -> tuple[Tensor, Tensor | None, Any]:
    """Queries for a `LatentBank`: samples, (B, *), which of their numbers count, and classes.

    Refuses samples with masks and a bank without, or the other way round.
    """
    _require_both(bank, labels)
    if not isinstance(labels, MaskedLabels):
        return x, None, labels
    x, labels = fitted(x, labels, bank.shape)
    return x, labels.entries.flatten(1), labels.keys(null_class)


def cut(flat: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Rows (B, D) as samples of `shape`, cut to the shape of `like`."""
    x = flat.reshape(-1, *shape)
    return x if x.shape == like.shape else x[tuple(slice(n) for n in like.shape)]


def fitted(x: Tensor, labels: T, shape: tuple[int, ...]) -> tuple[Tensor, T]:
    """Samples, (B, *), as rows of a bank: zero outside of the mask, padded at the end to `shape`.

    Samples without masks, and longer ones, stay as they are.
    """
    if not isinstance(labels, MaskedLabels):
        return x, labels
    x, own = labels.zero(x), labels.shape
    short = len(own) == len(shape) and all(a <= b for a, b in zip(own, shape, strict=True))
    if own == shape or not short:
        return x, labels
    missing, mask = [b - a for a, b in zip(own, shape, strict=True)], labels.mask
    known = mask.ndim - 1
    if any(missing[known:]):
        mask, known = labels.entries, len(own)
    # An axis of size 1 means all numbers, but not those that are added.
    axes = zip(mask.shape[1:], own, missing, strict=False)
    mask = mask.expand(-1, *(a if more else m for m, a, more in axes))
    mask = _padded(mask, missing[:known])
    return _padded(x, missing), replace(labels, mask=mask, shape=shape)


def _padded(x: Tensor, missing: list[int]) -> Tensor:
    return pad(x, [n for more in reversed(missing) for n in (0, more)])


def join(parts: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Samples and labels of several batches as one; those with masks are padded to the longest."""
    masks = [labels for _, labels in parts if isinstance(labels, MaskedLabels)]
    if masks:
        longest = tuple(max(sizes) for sizes in zip(*(one.shape for one in masks), strict=True))
        parts = [fitted(x, labels, longest) for x, labels in parts]
        masks = [labels for _, labels in parts]
    x = torch.cat([x for x, _ in parts])
    known = [plain(labels) for _, labels in parts]
    labels = None if known[0] is None else torch.cat(known)
    if not masks:
        return x, labels
    alike = len({one.mask.ndim for one in masks}) == 1
    held = [one.mask if alike else one.entries for one in masks]
    sizes = [max(axis) for axis in zip(*(one.shape[1:] for one in held), strict=True)]
    mask = torch.cat([one.expand(-1, *sizes) for one in held])
    return x, MaskedLabels(labels, mask, tuple(x.shape[1:]))


def mean_of(x: Tensor, labels: object = None) -> Tensor:
    """The mean over the numbers of each sample that count, `x` (B, *): (B,)."""
    if not isinstance(labels, MaskedLabels):
        return x.flatten(1).mean(1)
    return labels.zero(x).flatten(1).sum(1) / labels.counts.to(x.device)


def mean_square(x: Tensor, labels: object = None) -> Tensor:
    """The mean square over the numbers of each sample that count, `x` (B, *): (B,)."""
    # Zero before the square: its gradient at a NaN is NaN.
    return mean_of(zeroed(x, labels).square(), labels)
