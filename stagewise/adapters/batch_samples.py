"""x_1, labels, masks and conditions of the batches of a run, and of the samples trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stagewise.adapters.base import Seen, TargetMaker
from stagewise.adapters.network import Network
from stagewise.adapters.rows import equals, labels_in, labels_of_rows, place_of, version_of
from stagewise.bank import LatentBank
from stagewise.bank.row_keys import find_among
from stagewise.batches import ReadBatch, describe, leaves_of, read_checked
from stagewise.condition import Condition
from stagewise.masks import MaskedLabels, fitted, plain
from stagewise.schemes import Scheme

__all__ = ["BatchSamples"]


class BatchSamples:
    """What the batches of a run hold, and which of their samples are trained on.

    Args:
        read_batch: From a batch to `(x_1, labels or None)`.

    Attributes:
        batch: The current batch; `begin` sets it.
        x1: x_1 of the first batch before the step, (B, *), or None.
        labels: Labels of the first batch, (B,), or None.
        masks: The same with masks, or None.
        x1_at: Where that x_1 lies in the batch, such as "batch[0]"; empty if it is not there.
        labels_at: The same for the labels; "None" if they are not there.
        seen: What makes the targets, and what the first target of the batch was made from.
    """

    def __init__(self, read_batch: ReadBatch) -> None:
        self._find = read_batch
        self.batch: Any = None
        self.seen: tuple[TargetMaker, Seen] | None = None
        self._before: list[tuple[str, Tensor, int]] = []  # leaves of the batch, and their versions
        self._kept: set[str] = set()  # what each step changes in place
        self._finished = False  # the first batch is over
        self._follows = False  # later samples are read where the targets are made
        self._condition_at = ""  # where conditions lie in a batch
        self._found_nothing(lambda: None)

    def _found_nothing(self, bank: Callable[[], LatentBank | None]) -> None:
        self.x1: Tensor | None = None
        self.labels: Tensor | None = None
        self.masks: MaskedLabels | None = None
        self.x1_at, self.labels_at = "", "None"
        self._bank = bank

    def begin(self, batch: Any) -> None:
        """Takes the batch that is trained on next."""
        self.batch = batch
        if self._kept:  # the step will have overwritten these when they are read
            gone = {id(leaf) for name, leaf in leaves_of(batch) if name in self._kept}
            leaves, spec = pytree.tree_flatten(batch)
            kept = [leaf.clone() if id(leaf) in gone else leaf for leaf in leaves]
            self.batch = pytree.tree_unflatten(kept, spec)

    def _find_first(self, bank: Callable[[], LatentBank | None]) -> None:
        """Finds x_1 and labels before the first step; after a ValueError there are none."""
        self._found_nothing(bank)
        self._before = [(name, leaf, version_of(leaf)) for name, leaf in leaves_of(self.batch)]
        x1, found = read_checked(self._find, self.batch)
        self.masks, labels = found if isinstance(found, MaskedLabels) else None, plain(found)
        self.x1, self.labels = x1.detach().clone(), None if labels is None else labels.clone()
        self.x1_at = place_of(self.x1, self.batch)
        self.labels_at = place_of(self.labels, self.batch) or "None"

    def _changed_in_place(self) -> set[str]:
        """Where the first step has changed the batch."""
        now, before = dict(leaves_of(self.batch)), self._before
        changed = {
            name
            for name, leaf, version in before
            if now.get(name) is not leaf or version_of(leaf) != version
        }
        self._before = []
        return changed if self._changed_x1() is None else changed | {self.x1_at}

    def _changed_x1(self) -> Tensor | None:
        """What now lies in place of x_1 of the batch; None if that is unchanged."""
        if self.x1 is None or not self.x1_at:
            return None
        now = dict(leaves_of(self.batch)).get(self.x1_at)
        if now is None or not now.is_floating_point() or now.ndim < 2 or equals(self.x1, now):
            return None
        return now.detach()

    def take(self, seen: Seen) -> None:
        """Takes labels and masks from a call if there is no batch: given ones, or of its rows."""
        self.masks, self.labels = seen.masks, dict(seen.conditions).get("labels")
        if not self._finished and self.labels is None:
            self.labels = labels_in(self._bank(), seen.x1, seen.masks)

    def masks_of_batch(self) -> MaskedLabels | None:
        """The masks of the current batch, None if there are none."""
        own = None if self.masks is None else self._own()
        found = self.masks if own is None else own[1]
        return found if isinstance(found, MaskedLabels) else None

    def changed(self, x1: Tensor) -> bool:
        """Whether some sample is neither in the first batch nor in the bank."""
        own, bank, masks = self.x1, self._bank(), self.masks
        if own is not None and bool((find_among(own, x1) >= 0).all()):
            return False
        known = masks is not None and (len(masks), *masks.shape) == tuple(x1.shape)
        if bank is not None and known:
            x1 = fitted(x1, masks, bank.shape)[0]
        if bank is None or tuple(x1.shape[1:]) != bank.shape:
            return True
        return not bool((bank.find(x1) >= 0).all())

    def near(self, x1: Tensor) -> bool:
        """Whether all samples are rows of the bank up to rounding."""
        bank = self._bank()
        if bank is None or bank.pairs or tuple(x1.shape[1:]) != bank.shape:
            return False
        return bool((bank.find_near(x1) >= 0).all())

    def labels_for(self, x1: Tensor) -> Tensor | MaskedLabels | None:
        """The classes, (n,), int64, of samples, (n, *), that the current batch trains on.

        None if they are not known; see `labels_of_rows`.
        """
        own = None if self.labels is None and self.masks is None else self._own()
        if own is None or own[1] is None:
            return None
        if isinstance(own[1], MaskedLabels):
            if len(x1) == len(own[1]):
                return own[1]
            rows = find_among(own[0], x1)
            return own[1][rows] if bool((rows >= 0).all()) else None
        return labels_of_rows(x1, own[0], own[1], self._bank())

    def condition_for(self, condition: Condition, x1: Tensor) -> Tensor | None:
        """The conditions, (n, *), of such samples; None if they are not known."""
        if self.batch is None:
            if self.seen is not None and self.seen[1].condition is not None:
                return self.seen[1].condition
            raise ValueError(
                f"{condition!r} needs the condition of each sample, and found neither a batch nor "
                "a condition in the call that makes the targets: watch.step(step, batch)."
            )
        own = self._own() or (x1, None)
        c = self._conditions(condition, *own)
        if self._finished and not self._follows and len(x1) == len(c):  # the batch's, in order
            return c
        at = labels_of_rows(x1, own[0], torch.arange(len(c), device=x1.device), None)
        return None if at is None else c[at.to(c.device)]

    def _conditions(self, condition: Condition, x1: Tensor, labels: Any) -> Tensor:
        """The conditions of x_1 of the current batch, (B, *); where they lie is found once."""
        if condition.read_batch is None and self._condition_at:  # to compare values would sync
            return dict(leaves_of(self.batch))[self._condition_at]
        c = condition.of(self.batch, x1, labels)
        self._condition_at = place_of(c, self.batch)
        return c

    def _other_condition(self, schemes: Iterable[Scheme], network: Network) -> str:
        """A warning if a kernel goes by another condition than the network is given, or empty."""
        own = self._own()
        for kernel in {s.oracle.condition for s in schemes if s.target and s.oracle}:
            c = None if kernel is None or own is None else self._conditions(kernel, *own)
            if c is not None and not network.is_given(c):
                return (
                    f"{kernel!r} weighs rows by {self._condition_at or 'what `read_batch` gives'}, "
                    f"{describe(c)}, but the network is given {', '.join(network.conditions)}. The "
                    "targets are right only as far as one follows from the other. Say where the "
                    "condition is: Condition(..., read_batch=lambda batch: ...)."
                )
        return ""

    def _own(self) -> tuple[Tensor, Any] | None:
        """x_1 and labels of the current batch; None without a batch, as in validation."""
        if self.x1 is None or self.batch is None:
            return None
        own = (self.x1, self.masks or self.labels)
        return read_checked(self._find, self.batch) if self._finished else own
