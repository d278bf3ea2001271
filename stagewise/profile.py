"""`Profile`: the stages of a set of latents, before training.

It needs only the bank: size and scale of the rows, duplicates, effective dimension, the boundary as
predicted by the spectrum and as measured by queries, and how many rows explain a query at each t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.row_keys import row_keys
from stagewise.engines import Auto
from stagewise.files import jsonable
from stagewise.latents.scaling import ChannelStatistics
from stagewise.oracle import Oracle
from stagewise.paths import LinearPath, Path
from stagewise.spectrum import information, predicted_boundary, spectrum
from stagewise.stages import STATISTICS, StageBoundary, StageCurve, stage_edges, stratified_times

__all__ = ["Profile", "count_duplicates"]


@dataclass(frozen=True)
class Profile:
    """What `stagewise profile` measures of latents before training.

    Attributes:
        rows: N.
        shape: Shape of a sample.
        classes: How many; 0 without labels.
        class_rows: Rows of the smallest, median and largest class; without labels, of the bank.
        class_wise: Whether posterior and boundary are over the query's own class.
        mean: Of all numbers.
        std: Of all numbers, around `mean`.
        channel_mean: By the first axis of a sample.
        channel_std: By the first axis of a sample.
        duplicates: Rows that equal an earlier row bit by bit.
        mislabelled: Duplicates with another label.
        eigenvalues: Variances along principal axes, descending, of the bank, or of a class of
            median size if class-wise; float64, at most 2048.
        spectrum_rows: The number of these rows.
        effective_dim: `(sum lambda)^2 / sum lambda^2`.
        predicted: The predicted boundary; NaN if there is none.
        edges: Of the strata of t, (T + 1,).
        curve: The measured curve.
        boundary: The measured boundary.
        engine: The choice of `engines.Auto` for this bank, and the reason.
    """

    rows: int
    shape: tuple[int, ...]
    classes: int
    class_rows: tuple[int, int, int]
    class_wise: bool
    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    duplicates: int
    mislabelled: int
    eigenvalues: Tensor
    spectrum_rows: int
    effective_dim: float
    predicted: float
    edges: Tensor
    curve: StageCurve
    boundary: StageBoundary
    engine: str

    @property
    def dim(self) -> int:
        """D."""
        return math.prod(self.shape)

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        bank: LatentBank,
        *,
        class_wise: bool | None = None,
        path: Path | None = None,
        queries: int = 64,
        strata: int = 24,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Profile:
        """Measures a bank.

        Args:
            bank: The rows.
            class_wise: Whether the posterior is over the query's own class, default if there are
                labels.
            path: The path of training, default `LinearPath()`.
            queries: In each stratum, default 64.
            strata: Of t, half of them near the predicted boundary, default 24.
            seed: Of the queries, default 0.
            device: Where to compute, default the bank's.

        Raises:
            ValueError: If `class_wise` is true and the bank has no labels.
        """
        class_wise = bank.labelled if class_wise is None else class_wise
        path = path or LinearPath()
        seen = ChannelStatistics()
        for _, block in bank.chunks(bank.whole, max(1, 2**22 // bank.dim)):
            seen.update((block.double() + bank.offset).view(-1, *bank.shape))
        mean, std = seen.overall()
        if class_wise:
            bank.require_classes()
        by_size = sorted(map(bank.segment, bank.classes), key=_size) or [bank.whole]
        sizes = [_size(rows) for rows in by_size]
        middle = by_size[len(by_size) // 2] if class_wise else bank.whole
        eigenvalues = spectrum(bank, middle).flip(0)
        predicted = predicted_boundary(bank, path, class_wise=class_wise)
        edges = stage_edges(predicted, strata)
        engine = Auto()
        curve = StageCurve.measure(
            Oracle(bank, path, engine),
            stratified_times(edges, queries, seed=(seed, 1)),
            seed=(seed, 2),
            class_wise=class_wise,
            device=device,
        )
        duplicates, mislabelled = count_duplicates(bank)
        total = float(eigenvalues.sum())
        return cls(
            rows=len(bank),
            shape=bank.shape,
            classes=len(bank.classes),
            class_rows=(sizes[0], sizes[len(sizes) // 2], sizes[-1]),
            class_wise=class_wise,
            mean=mean,
            std=std,
            channel_mean=tuple(seen.mean.tolist()),
            channel_std=tuple(seen.std(correction=0).tolist()),
            duplicates=duplicates,
            mislabelled=mislabelled,
            eigenvalues=eigenvalues,
            spectrum_rows=_size(middle),
            effective_dim=total**2 / float(eigenvalues.square().sum()) if total else 0.0,
            predicted=predicted,
            edges=edges,
            curve=curve,
            boundary=curve.boundary(),
            engine=engine.describe(bank),
        )

    @property
    def removable(self) -> float:
        """Mean over uniform t of the floor: what oracle targets subtract from a loss."""
        return float((self.curve.mean("target_difference") * self.edges.diff()).sum())

    def information(self, t: Tensor, path: Path | None = None) -> Tensor:
        """The information in `x_t` about its row in nats, by `spectrum.information`."""
        at = (path or LinearPath())(t)
        return information(at.alpha / at.sigma, self.eigenvalues)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings and lists; None for numbers that are not finite."""
        curve: dict[str, Any] = {"t": self.curve.times.tolist()}
        curve |= {name: self.curve.mean(name).tolist() for name in STATISTICS}
        found = vars(self) | {"dim": self.dim, "removable": self.removable, "curve": curve}
        found |= {"boundary": self.boundary.as_dict()}
        found |= {"eigenvalues": self.eigenvalues.tolist(), "edges": self.edges.tolist()}
        return jsonable(found)


def count_duplicates(bank: LatentBank) -> tuple[int, int]:
    """How many stored rows equal an earlier one, and how many of these have another label."""
    keys = row_keys(bank.rows).sort(stable=True)
    pairs = (keys.values[1:] == keys.values[:-1]).nonzero()[:, 0]
    found = mislabelled = 0
    for some in pairs.split(max(1, 2**22 // bank.dim)):
        first, second = keys.indices[some], keys.indices[some + 1]
        equal = (bank.rows[first] == bank.rows[second]).all(1)
        found += int(equal.sum())
        if bank.classes:
            labels = [bank.labels_of(rows[equal].tolist()) for rows in (first, second)]
            mislabelled += sum(one != other for one, other in zip(*labels, strict=True))
    return found, mislabelled


def _size(rows: slice) -> int:
    return rows.stop - rows.start
