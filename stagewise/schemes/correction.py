"""From a batch to what is added to its targets: whom to ask, which rows, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stagewise.oracle import Labels, Oracle
from stagewise.paths import Prediction, expand_like
from stagewise.queries import indices_of
from stagewise.schemes.checks import check_rows
from stagewise.targets import Target

__all__ = ["Correction", "correct"]


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


def correct(
    target: Target,
    oracle: Oracle,
    *,
    xt: Tensor,
    t: Tensor,
    x1: Tensor,
    prediction: Prediction,
    draws: Random,
    labels: Labels | None = None,
    source: Tensor | None = None,
    condition: Tensor | None = None,
    class_wise: bool = False,
    on_missing: Literal["insert", "error"] = "insert",
    labels_of: Callable[[], Tensor | None] | None = None,
    boundary: float | None = None,
    only: Tensor | None = None,
) -> Correction:
    """What a target adds; see `Scheme` and its `__call__`.

    Args:
        target: The rows and lambda.
        oracle: Bank and path.
        xt: Noisy samples, (B, *).
        t: Times, (B,).
        x1: What `xt` was made from, (B, *).
        prediction: What the targets are.
        draws: Of random rows.
        labels: Class of each, if it is known.
        source: The row that each x_1 stands for, if it is known.
        condition: What the model is given for each, (B, *), for an oracle with a kernel on it.
        class_wise: Whether samples look at the rows of their class.
        on_missing: What to do with an x_1 that stands for no row.
        labels_of: What gives the classes, (B,), or None, if rows do not.
        boundary: Where the stages meet, if lambda depends on it.
        only: To which of the samples, (B,), bool; default all.

    Raises:
        ValueError: If the class of a sample is not known, or a row is missing.
    """
    whole, asked = Correction.none(x1), None
    if target.lam.sparse:
        mixed = target.lam(t.double(), None, oracle.path, boundary) > 0
        only = mixed if only is None else mixed & only
    # Where a kernel reads the rows of each query's class, to ask for all costs less than to wait
    # for the device; elsewhere samples beyond the boundary cost nothing.
    cheap = isinstance(labels, Tensor) and class_wise and not target.reads_rows
    cheap = cheap and oracle.smoothing is None and oracle.certificate is None
    cheap = cheap and oracle.engine.reads_ends(oracle.bank, xt.device, len(xt))
    if only is not None and not cheap:
        asked = indices_of(only)
        xt, t, x1, labels, source, condition = (
            _some(value, asked) for value in (xt, t, x1, labels, source, condition)
        )
    if not len(x1) and not oracle.engine.collective:
        return whole
    with torch.autocast(xt.device.type, enabled=False):
        row, stored = _rows(oracle, x1, source)
        names = None
        if class_wise:
            names = _classes(oracle, row, labels, x1, labels_of, asked)
        queries = oracle.queries(xt, t, names, source, condition)
        if class_wise and oracle.engine.holds_all_rows:
            # A row of another class is none of those that a query looks at.
            inside = queries.holds(row)
            row, stored = row.where(inside, -1), stored.where(inside, -1)
        if on_missing == "error":
            _require_found(row if only is None or not cheap else row.where(only, 0))
        queries = replace(queries, x1=x1.flatten(1).double(), source=stored, twin=row)
        pull = target.pull(oracle, queries, draws)
        lam = target.lam(t.double(), pull.top1, oracle.path, boundary)
        value = queries.correction(pull.difference, prediction, oracle.bank.max_norm, lam)
        value = value.reshape(-1, *whole.value.shape[1:])
    # A draw from a smoothed set is no row, and nothing is added to the set for it.
    inserted = (stored < 0) & (oracle.smoothing is None)
    part = Correction(value, lam, inserted, pull.tail_mass)
    if only is not None and cheap:
        return Correction(*(x.masked_fill(~expand_like(only, x), 0) for x in part))
    if asked is None:
        return part
    at = queries.index(asked)
    return Correction(
        *(all_.index_copy(0, at, some) for all_, some in zip(whole, part, strict=True))
    )


def _some(value: Any, at: list[int]) -> Any:
    """Some of what there is one of for each sample; None of what is not given."""
    if isinstance(value, Tensor):
        return value[torch.tensor(at, dtype=torch.int64, device=value.device)]
    return None if value is None else [value[i] for i in at]


def _rows(oracle: Oracle, x1: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
    """The row that each x_1 stands for, and the row that it equals, (B,); -1 for none."""
    if source is not None:
        rows = oracle.engine.num_rows(oracle.bank)
        source = oracle.checked_source(source, len(x1), rows).to(x1.device)
    if oracle.engine.holds_all_rows:
        stored = oracle.bank.find(x1)
        return stored if source is None else torch.where(source < 0, stored, source), stored
    if source is None:
        raise ValueError(
            "A rank of Sharded() cannot find rows of other ranks. Give `source`, the number of "
            "each x1 over all ranks, with x1 exactly as it is stored."
        )
    return source, source


def _classes(
    oracle: Oracle,
    row: Tensor,
    labels: Labels | None,
    x1: Tensor,
    labels_of: Callable[[], Tensor | None] | None,
    asked: list[int] | None,
) -> Labels:
    """The class of each sample."""
    if labels is not None:
        return labels
    rows = row.tolist()
    whole = oracle.engine.holds_all_rows
    unknown = sum(number < 0 for number in rows) if whole else len(rows)
    if not unknown:
        return oracle.bank.labels_of(rows)
    labels = None if labels_of is None else labels_of()
    if labels is not None:
        return labels if asked is None else _some(labels, asked)
    if whole:
        check_rows(oracle.bank, x1)  # another scale is the reason rather than the labels
    raise ValueError(
        f"Expected `labels`: the class of {unknown} of {len(rows)} samples cannot be looked "
        "up, as they are no rows of this bank, and are not given it. Give the labels of the "
        "batch: classes=y to a FlowMatchingLoss, labels=y to a scheme; a StageScheme takes "
        "them from the batch, find=lambda batch: (batch[0], batch[1]). If the model is given "
        "no class, say so: class_wise=False, as in StageScheme(target=..., class_wise=False)."
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
