"""From a batch to what is added to its targets: whom to ask, which rows, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stagewise.engines import Sharded
from stagewise.engines.base import where
from stagewise.oracle import Labels, Oracle
from stagewise.paths import Prediction
from stagewise.schemes.checks import check_rows
from stagewise.targets import Query, Target

__all__ = ["Batch", "Correction", "correct"]


class Correction(NamedTuple):
    """What is added to the targets of a batch.

    Attributes:
        value: `lambda c_t (m - x_1)`, (B, *), float64.
        lam: lambda, (B,), float64.
        inserted: Where x_1 was put into the set because no row equals it, (B,), bool.
        tail_mass: Share of the posterior that did not enter, (B,), float64.
    """

    value: Tensor
    lam: Tensor
    inserted: Tensor
    tail_mass: Tensor

    @classmethod
    def none(cls, x1: Tensor) -> Correction:
        """Nothing is added."""
        zero = torch.zeros(len(x1), dtype=torch.float64, device=x1.device)
        value = torch.zeros_like(x1, dtype=torch.float64)
        return cls(value, zero, torch.zeros_like(zero, dtype=torch.bool), zero.clone())


@dataclass(frozen=True)
class Batch:
    """A batch and how its rows are looked up; see `Scheme` and its `__call__`.

    Attributes:
        oracle: Bank and path.
        xt: Noisy samples, (B, *).
        t: Times, (B,).
        x1: What `xt` was made from, (B, *).
        labels: Class of each, if it is known.
        source: The row that each x_1 stands for, if it is known.
        class_wise: Whether samples look at the rows of their class.
        on_missing: What to do with an x_1 that stands for no row.
        draws: Of random rows.
        labels_of: What gives the classes, (B,), or None, if rows do not.
    """

    oracle: Oracle
    xt: Tensor
    t: Tensor
    x1: Tensor
    labels: Labels | None
    source: Tensor | None
    class_wise: bool
    on_missing: Literal["insert", "error"]
    draws: Random
    labels_of: Callable[[], Tensor | None] | None = None

    def select(self, at: list[int]) -> Batch:
        """Some of the samples."""
        index = torch.tensor(at, dtype=torch.int64, device=self.xt.device)
        labels, labels_of = self.labels, self.labels_of

        def chosen() -> Tensor | None:
            found = None if labels_of is None else labels_of()
            return None if found is None else found[index.to(found.device)]

        if isinstance(labels, Tensor):
            labels = labels[index.to(labels.device)]
        elif labels is not None:
            labels = [labels[i] for i in at]
        return replace(
            self,
            xt=self.xt[index],
            t=self.t[index],
            x1=self.x1[index],
            labels=labels,
            source=None if self.source is None else self.source[index.to(self.source.device)],
            labels_of=chosen,
        )

    def query(self) -> Query:
        """Finds the rows.

        Raises:
            ValueError: If the class of a sample is not known, or a row is missing.
        """
        oracle, bank, x1 = self.oracle, self.oracle.bank, self.x1
        sharded = isinstance(oracle.engine, Sharded)
        _, path = oracle.coefficients(self.xt, self.t)
        source = self.source
        if source is not None:
            source = oracle.checked_source(source, len(x1), oracle.engine.num_rows(bank))
            source = source.to(x1.device)
        if not sharded:
            stored = bank.find(x1)
            source = stored if source is None else torch.where(source < 0, stored, source)
        elif source is not None:
            stored = source
        else:
            raise ValueError(
                "A rank of Sharded() cannot find rows of other ranks. Give `source`, the number of "
                "each x1 over all ranks, with x1 exactly as it is stored."
            )
        names: Sequence[int | None] | None = None
        if self.class_wise:
            names = self._classes(source)
            if not sharded:
                seen = [bank.whole if name is None else bank.segment(name) for name in names]
                ends = [(rows.start, rows.stop) for rows in seen]
                first, last = torch.tensor(ends, device=x1.device).reshape(-1, 2).unbind(1)
                inside = (source >= first) & (source < last)
                source, stored = source.where(inside, -1), stored.where(inside, -1)
        if self.on_missing == "error":
            _require_found(source)
        return Query(
            oracle=oracle,
            xt=self.xt,
            t=self.t.double(),
            x1=x1.flatten(1).double(),
            path=path,
            names=names,
            source=source,
            stored=stored,
            draws=self.draws,
        )

    def _classes(self, source: Tensor) -> Sequence[int | None]:
        """The class of each sample, on the host."""
        oracle, labels = self.oracle, self.labels
        if labels is None:
            rows = source.tolist()
            sharded = isinstance(oracle.engine, Sharded)
            unknown = len(rows) if sharded else sum(row < 0 for row in rows)
            if not unknown:
                return oracle.bank.labels_of(rows)
            labels = None if self.labels_of is None else self.labels_of()
        if labels is not None:
            return oracle.names(labels, len(source))
        if not sharded:
            check_rows(oracle.bank, self.x1)  # another scale is the reason rather than the labels
        raise ValueError(
            f"Expected `labels`: the class of {unknown} of {len(rows)} samples cannot be looked "
            "up, as they are no rows of this bank, and are not given it. Give the labels of the "
            "batch: classes=y to a FlowMatchingLoss, labels=y to a scheme; a StageScheme takes "
            "them from the batch, find=lambda batch: (batch[0], batch[1]). If the model is given "
            "no class, say so: class_wise=False, as in StageScheme(target=..., class_wise=False)."
        )


def correct(
    target: Target,
    batch: Batch,
    boundary: float | None,
    prediction: Prediction,
    only: Tensor | None = None,
) -> Correction:
    """What a target adds.

    Args:
        target: The rows and lambda.
        batch: The samples.
        boundary: Where the stages meet, if lambda depends on it.
        prediction: What the targets are.
        only: To which of the samples, (B,), bool; default all.

    Raises:
        ValueError: As `Batch.query`.
    """
    oracle, asked = batch.oracle, None
    whole = Correction.none(batch.x1)
    if target.lam.sparse:
        mixed = target.lam(batch.t.double(), None, oracle.path, boundary) > 0
        only = mixed if only is None else mixed & only
    if only is not None:
        # One sync on an accelerator, for which samples beyond the boundary cost nothing.
        asked = where(only)
        batch = batch.select(asked)
    # With Sharded every rank asks whenever one does.
    if not len(batch.x1) and not isinstance(oracle.engine, Sharded):
        return whole
    with torch.autocast(batch.xt.device.type, enabled=False):
        query = batch.query()
        pull = target.pull(query)
        lam = target.lam(query.t, pull.top1, oracle.path, boundary)
        c, _ = prediction.coefficients(query.path)
        # A difference below its rounding is none; at t = 1 some paths have an infinite c.
        rounding = 16 * torch.finfo(torch.float64).eps * oracle.bank.max_norm
        none = pull.difference.abs() <= rounding
        value = torch.where(none, 0.0, (lam * c)[:, None] * pull.difference)
    # A draw from a smoothed set is no row, and nothing is added to the set for it.
    inserted = (query.stored < 0) & (oracle.smoothing is None)
    part = Correction(value.reshape(-1, *whole.value.shape[1:]), lam, inserted, pull.tail_mass)
    if asked is None:
        return part
    at = torch.tensor(asked, dtype=torch.int64, device=value.device)
    return Correction(
        *(all_.index_copy(0, at, some) for all_, some in zip(whole, part, strict=True))
    )


def _require_found(source: Tensor) -> None:
    message = (
        'Expected every `x1` to be a row of the bank (on_missing="error"). Build the bank from '
        "what training sees, at its scale and with its flips, or give the `source` of resampled "
        "latents"
    )
    found = source >= 0
    if source.device.type != "cpu":
        torch._assert_async(found.all(), message)
    elif not found.all():
        raise ValueError(f"{message}. {int((~found).sum())} of {len(found)} are not.")
