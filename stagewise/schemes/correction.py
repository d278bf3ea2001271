"""From a batch to what is added to its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stagewise.bank.building import whole_labels
from stagewise.bank.row_classes import KNOWN
from stagewise.device_checks import require_all
from stagewise.engines import fused, fused_mix
from stagewise.engines.fused_path import coefficients
from stagewise.masks import MaskedLabels, compared_within, plain
from stagewise.oracle import Oracle
from stagewise.paths import Prediction, expand_like
from stagewise.posterior import upload
from stagewise.queries import Labels, checked_source, indices_of, require_shape
from stagewise.schemes.refusals import check_rows
from stagewise.targets import Mix, ReferenceSet, Target

__all__ = ["Batch", "Correction", "by_kernel", "correct", "runs_kernel"]


class Correction(NamedTuple):
    """What is added to the targets of a batch.

    Attributes:
        value: `lambda c_t (m - x_1)`, (B, *), float64, or the dtype of the targets.
        lam: lambda, (B,), float64.
        inserted: Whether x_1 was added to the set because no row equals it, (B,), bool.
        tail_mass: Share of the posterior that was left out, (B,), float64.
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

    def of(self, only: Tensor) -> Correction:
        """Zero but for some of the samples, (B,), bool."""
        return Correction(*(x.masked_fill(~expand_like(only, x), 0) for x in self))


@dataclass(frozen=True)
class Batch:
    """What a scheme is asked to correct, in the library's convention; see `Scheme` and its call.

    Attributes:
        draws: Chooses random rows.
        labels_of: Returns the classes of samples that are not rows.
        only: The samples to correct, (B,), bool; None for all.
        dtype: That of the targets, in which a kernel may return the value.
    """

    xt: Tensor
    t: Tensor
    x1: Tensor
    prediction: Prediction
    draws: Random
    labels: Labels | None = None
    source: Tensor | None = None
    condition: Tensor | None = None
    class_wise: bool = False
    on_missing: Literal["insert", "error"] = "insert"
    labels_of: Callable[[], Tensor | MaskedLabels | None] | None = None
    boundary: float | None = None
    only: Tensor | None = None
    dtype: torch.dtype = torch.float64


def correct(target: Target, oracle: Oracle, batch: Batch) -> Correction:
    """What a target adds to a batch."""
    labels, only, class_wise = batch.labels, batch.only, batch.class_wise
    of_masks = isinstance(labels, MaskedLabels)
    # To compute all samples then costs less than a sync to select those with a lambda above 0.
    cheap = (class_wise or of_masks) and stays_on_device(oracle, labels, batch.x1, class_wise)
    cheap = cheap and not (of_masks and target.reads_rows)
    if runs_kernel(target, oracle, labels, batch.x1, class_wise):
        part = by_kernel(target, oracle, batch)
        if part is not None:
            return part if only is None else part.of(only)
    every, lam, asked = batch.x1, None, None
    if target.lam.sparse:
        lam = target.lam(batch.t.double(), None, oracle.path, batch.boundary)
        only = lam > 0 if only is None else (lam > 0) & only
    given: tuple[Any, ...] = (batch.xt, batch.t, batch.x1)
    given += (labels, batch.source, batch.condition, lam)
    if only is not None and not cheap:
        asked = indices_of(only)
        at = upload(asked, every.device)
        given = tuple(_some(value, asked, at) for value in given)
    xt, t, x1, labels, source, condition, lam = given
    if not len(x1) and not oracle.engine.collective:
        return Correction.none(every)
    with torch.autocast(xt.device.type, enabled=False):
        whole, weighed = oracle.engine.holds_all_rows, condition if oracle.condition else None
        labelled = isinstance(labels, (Tensor, MaskedLabels)) and not _lacks(labels, oracle)
        if class_wise and whole and labelled and oracle.null_class is None:
            labels = _undropped(oracle, labels, x1)
            # A source of another class or mask is not among the rows of its query.
            queries = oracle.queries(xt, t, labels, source, condition)
            first = queries.ends_on_device[:, 0]
            row, stored = _rows(oracle, x1, source, labels, weighed, first)
            row = row if source is None else row.where(queries.holds(row), stored)
        else:
            row, stored = _rows(oracle, x1, source, labels, weighed)
            names = compared_within(labels, False)
            if class_wise:
                on_device = cheap and not of_masks
                names = _classes(oracle, row, labels, x1, batch.labels_of, asked, on_device)
            queries = oracle.queries(xt, t, names, source, condition)
            if (class_wise or of_masks) and whole:
                own, inside = torch.full_like(row, -1), queries.holds(row)
                if class_wise and not (row.device.type == "cpu" and bool(inside.all())):
                    own = oracle.bank.find(x1, labels, weighed, queries.ends_on_device[:, 0])
                row, stored = row.where(inside, own), stored.where(queries.holds(stored), own)
        if batch.on_missing == "error":
            _require_found(row if only is None or not cheap else row.where(only, 0))
        queries = queries.made_from(x1.flatten(1).double(), stored, row)
        mean = target.mean(oracle, queries, batch.draws)
        if lam is None:
            lam = target.lam(t.double(), mean.top1, oracle.path, batch.boundary)
        value = fused_mix.scaled(oracle.bank, queries, mean.difference, batch.prediction, lam)
        value = value.reshape(x1.shape)
    # A draw from a smoothed set is not a row, and is not added to the set.
    inserted = (stored < 0) & (oracle.smoothing is None)
    part = Correction(value, lam, inserted, mean.tail_mass)
    if only is not None and cheap:
        return part.of(only)
    if asked is None:
        return part
    none = Correction.none(every)
    return Correction(
        *(all_.index_copy(0, at, some) for all_, some in zip(none, part, strict=True))
    )


def stays_on_device(oracle: Oracle, labels: Labels | None, x1: Tensor, class_wise: bool) -> bool:
    """Whether kernels read the rows of each sample, and labels stay on the device."""
    if oracle.smoothing is not None:
        return False
    if isinstance(labels, MaskedLabels):
        return oracle.reads_on_device(labels.mask, x1)
    if class_wise and labels is not None:
        return isinstance(labels, Tensor) and oracle.reads_on_device(labels, x1)
    return oracle.reads_on_device(None, x1)


def runs_kernel(
    target: Target | None,
    oracle: Oracle | None,
    labels: Labels | None,
    x1: Tensor,
    class_wise: bool,
) -> bool:
    """Whether kernels compute, and check, the whole correction."""
    if target is None or oracle is None or not stays_on_device(oracle, labels, x1, class_wise):
        return False
    bank = oracle.bank
    width = bank.largest_class if class_wise else len(bank)
    return (
        not oracle.condition
        and bank.pairs is None
        and type(target).mean in (Mix.mean, ReferenceSet.mean)
        and oracle.engine.runs_kernel
        # A product of float32 rows with all samples costs more than a sync.
        and (
            target.reads_rows
            or not target.lam.sparse
            or bank.dtype.itemsize == 2
            or fused.by_rows(bank, len(x1), width)
        )
    )


def by_kernel(target: Target, oracle: Oracle, batch: Batch) -> Correction | None:
    """`correct` by kernels, if `runs_kernel`; None if a kernel does not compile.

    Values out of range are reported to the bank, which refuses them when the device has found them.
    """
    assert isinstance(target, (Mix, ReferenceSet))
    xt, t, x1, source, only = batch.xt, batch.t, batch.x1, batch.source, batch.only
    for name, x in (("xt", xt), ("x1", x1)):
        require_shape(oracle.bank, name, x)
    # Labels that are given decide, others only for an x_1 that is not a row.
    labels, named = None, batch.class_wise and batch.labels is not None
    if batch.class_wise:
        labels = batch.labels if named or batch.labels_of is None else batch.labels_of()
    if labels is not None:
        assert isinstance(labels, Tensor)
        labels = whole_labels(labels, len(x1))
    if source is not None:
        source = checked_source(source, len(x1), None).to(x1.device, torch.int64)
    double, lam = t.double(), None
    least = oracle.engine.sigma_floor(oracle.bank)
    path = coefficients(oracle.bank, oracle.path, t, x1.device, least)
    if target.lam.from_t:
        lam = target.lam(double, None, oracle.path, batch.boundary)
    dtype = torch.float64 if lam is None else batch.dtype
    given = (oracle.bank, xt, t, x1, labels, source, path, batch.prediction.of_data(path), lam)
    kernels = partial(fused_mix.mixed, named=named, class_wise=batch.class_wise, dtype=dtype)
    found = fused.runs(kernels, *given, partial(target.posterior, oracle, batch.draws))
    if found is None:
        return None
    oracle.bank.report(found.wrong)
    value = found.value
    if lam is None:
        lam = target.lam(double, found.top1, oracle.path, batch.boundary)
        value = expand_like(lam, value) * value
    if batch.on_missing == "error":
        asked = found.wrong == KNOWN  # others are refused with their reason, in the next call
        asked = asked & (lam > 0) if target.lam.sparse else asked
        _require_found(found.row.where(asked if only is None else asked & only, 0))
    return Correction(value, lam, found.inserted, found.tail_mass)


def _some(value: Any, asked: list[int], at: Tensor) -> Any:
    """The entries at some samples, `at` being `asked` as a tensor; None for None."""
    if value is None:
        return None
    if not isinstance(value, (Tensor, MaskedLabels)):
        return [value[i] for i in asked]
    device = value.mask.device if isinstance(value, MaskedLabels) else value.device
    at = at if at.device == device else upload(asked, device)
    return value[at] if isinstance(value, MaskedLabels) else value.index_select(0, at)


def _rows(
    oracle: Oracle,
    x1: Tensor,
    source: Tensor | None,
    labels: Labels | None,
    condition: Tensor | None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The row that each x_1 stands for, and the row that it equals, (B,); -1 for none.

    With a `condition` the row must have it too; with `first` it is of the class that begins there.
    """
    if source is not None:
        rows = oracle.engine.num_rows(oracle.bank)
        source = checked_source(source, len(x1), rows).to(x1.device)
    if oracle.engine.holds_all_rows:
        stored = oracle.bank.find(x1, labels, condition, first)
        return stored if source is None else torch.where(source < 0, stored, source), stored
    if source is None:
        raise ValueError(
            "Expected `source` with Sharded(), as a rank cannot find rows of other ranks: the "
            "number of each x1 over all ranks, with x1 exactly as it is stored: with "
            "stagewise.sources(rows): around the step."
        )
    return source, source


def _lacks(labels: Labels | None, oracle: Oracle) -> bool:
    """Whether there are masks without labels, and the bank has classes."""
    return isinstance(labels, MaskedLabels) and labels.labels is None and oracle.bank.labelled


def _undropped(oracle: Oracle, labels: Labels | None, x1: Tensor) -> Labels | None:
    """Labels on the host, with the class of the row for a dropped label (as `place` does)."""
    bank, given, masks = oracle.bank, plain(labels), isinstance(labels, MaskedLabels)
    if not isinstance(given, Tensor) or given.device.type != "cpu" or masks == (bank.pairs is None):
        return labels
    given = given.reshape(-1)
    known = torch.as_tensor(bank.classes if bank.pairs is None else bank.pairs.labels)
    gone = ~torch.isin(given, known)
    if gone.any():
        row = bank.find(x1, labels if masks else None).cpu()
        own = known[bank.segments_at(row.clamp_min(0).tolist())].to(given)
        given = own.where(gone & (row >= 0), given)
    return replace(labels, labels=given) if isinstance(labels, MaskedLabels) else given


def _classes(
    oracle: Oracle,
    row: Tensor,
    labels: Labels | None,
    x1: Tensor,
    labels_of: Callable[[], Tensor | MaskedLabels | None] | None,
    asked: list[int] | None,
    on_device: bool,
) -> Labels:
    """The class of each sample."""
    lacking = _lacks(labels, oracle)
    if labels is not None and not lacking:
        return labels
    if on_device:
        table, labels = oracle.bank.class_table(row.device), labels_of() if labels_of else None
        own = table[torch.searchsorted(table[:, 2].contiguous(), row.clamp_min(0), right=True), 0]
        if isinstance(labels, Tensor):
            return own.where(row >= 0, labels)
        torch._assert_async((row >= 0).all(), "Expected `labels`, or samples that are rows")
        return own
    rows = row.tolist()
    whole = oracle.engine.holds_all_rows
    unknown = sum(number < 0 for number in rows) if whole else len(rows)
    if not unknown:
        found = oracle.bank.labels_of(rows)
        return oracle.bank.classes_of(rows) if lacking else found  # type: ignore[return-value]
    labels = None if labels_of is None else labels_of()
    if labels is not None:
        return labels if asked is None else _some(labels, asked, upload(asked, row.device))
    if whole:
        check_rows(oracle.bank, x1)  # a wrong scale is reported first
    raise ValueError(
        f"Expected `labels`: the class of {unknown} of {len(rows)} samples cannot be looked "
        "up, as they are no rows of this bank. Give the labels of the "
        "batch: classes=y to a FlowMatchingLoss, labels=y to a scheme; a StageScheme takes "
        "them from the batch, read_batch=lambda batch: (batch[0], batch[1]). If the model is given "
        "no class, say so: class_wise=False, as in StageScheme(target=..., class_wise=False)."
    )


def _require_found(source: Tensor) -> None:
    found = source >= 0
    require_all(
        found,
        'Expected every `x1` to be a row of the bank (on_missing="error"). Build the bank from '
        "what training sees, at its scale and with its flips, or give the `source` of resampled "
        "latents",
        lambda: f". {int((~found).sum())} of {len(found)} are not.",
    )
