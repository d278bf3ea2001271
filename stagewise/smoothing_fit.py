r"""How strong a smoothing should be: two questions to rows that were left out.

With the rows in folds, and neighbours from all but one, the rows of that one are asked about a
model that has learnt all it is given:

**How far are its samples from them?** It leads a sample to row i, at the boundary c it has
`x_c = c x_i + (1 - c) eps`, and finishes it to a draw of the Gaussian of row i given that,

    x~ = x_i + A_i^T M_i^-1 (z + (a/s) A_i (eps - eps')),    M_i = I + (a^2/s^2) A_i A_i^T,

with a = c, s = 1 - c, and z, eps' as new as eps (Matheron's rule). Wide directions of A_i are held
by x_c, to `s/a`: that is why smoothing after the boundary may be wider than at all t. Their energy
distance (Szekely & Rizzo 2013) is compared with that of the rows as they are.

**How good is the field it has learnt?** `E |u*(x_t, t) - (x_1 - x_0)|^2 / D` at times after c, x_1
left out, u* the exact oracle of the smoothed set. This alone, like the likelihood, asks for more
width than the data have.

For each number of neighbours the scale is the largest whose samples are no farther from held-out
rows than the rows are, by interpolation; of these the one with the best field is taken. The
isotropic floor is not among the settings: it stays in the samples as noise, and beside many
neighbours it gained nothing.

**Scales end at 1**, a cap by measurement. Where x_c holds the samples the distance hardly depends
on the scale, and the field of the oracle is at its best at 1.4 to 2 with 32 neighbours or more. A
trained model wants less: on 300 rows of the cancer table its held-out loss with 64 neighbours is
.807, .820, .852 and .873 with scales 1, 1.4, 2.8 and 4 (plain: .840).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.row_keys import row_keys
from stagewise.nearest_rows import progress_bar
from stagewise.oracle import Oracle
from stagewise.paths import expand_like
from stagewise.smoothed_oracle import SmoothedOracle
from stagewise.smoothing import Smoothing
from stagewise.smoothing_inputs import check_settings, time_of
from stagewise.stages import StageBoundary, StageCurve

__all__ = ["SmoothingScore", "cross_validated", "fitted"]

FOLDS, ASKED, DRAWN = 5, 1000, 2000
_LAST = 0.03
"""Times end at this share of what is left after the boundary: the loss of rows diverges at 1."""

_GATHER = 2**24
"""Numbers of gathered rows held at a time."""


@dataclass(frozen=True)
class SmoothingScore:
    """What a setting came to on rows that were left out.

    Attributes:
        neighbours: K; 0 is the rows as they are.
        scale: g.
        farther: By how much finished samples are farther from held-out rows than the rows are, as
            energy distances. 0 at an interpolated scale.
        loss: Mean squared error of the oracle's velocity over D numbers; NaN if not asked for.
    """

    neighbours: int
    scale: float
    farther: float
    loss: float = math.nan


@dataclass(frozen=True)
class _Fold:
    """All rows but those of a fold, some of these, and noise that all settings share."""

    rest: LatentBank
    x1: Tensor
    labels: Tensor | None
    t: Tensor
    x0: Tensor
    rows: Tensor
    each: int
    seed: int

    def distance(self, samples: Tensor) -> float:
        """The energy distance of samples, (n, `each`, D), around `rows` from held-out rows.

        Pairs of samples of one row are weighed by their chance in a model, one in all rows, which
        leaves much less noise than random rows. The part of the held-out rows alone is left out.
        """
        n, each, dim = samples.shape
        flat, held_out = samples.reshape(-1, dim), self.x1.flatten(1).double()
        same = torch.cdist(samples, samples).sum()
        other = (torch.cdist(flat, flat).sum() - same) / (n * (n - 1) * each**2)
        chance = 1 / len(self.rest)
        apart = (1 - chance) * other + chance * same / (n * each * (each - 1))
        return float(2 * torch.cdist(flat, held_out).mean() - apart)

    def loss(self, oracle: Oracle) -> Tensor:
        """That of the oracle's field, at each held-out row, (B,)."""
        xt = self.x0.lerp(self.x1, expand_like(self.t, self.x1))
        off = oracle.velocity(xt, self.t, self.labels) - (self.x1 - self.x0)
        return off.flatten(1).double().square().mean(1)


def fitted(
    bank: LatentBank, boundary: float | StageBoundary | None, class_wise: bool, progress: bool
) -> Smoothing | None:
    """What `Smoothing.fit` gives."""
    check_settings(bank, 1, 1.0, 0.0)
    if len(bank) < 20:
        raise ValueError(
            f"Expected at least 20 rows to choose a smoothing from, got {len(bank)}: "
            f"Smoothing(bank, neighbours={max(1, min(8, len(bank) - 1))})."
        )
    if boundary is None:
        boundary = StageCurve.measure(Oracle(bank)).boundary()
    edge = time_of(boundary, "Smoothing.fit(bank, 0.7)")
    if edge == 1:
        raise ValueError(
            "Expected `boundary` below 1, after which rows are smoothed, got 1: "
            "Smoothing.fit(bank, 0.7)."
        )
    if math.isnan(edge):
        _warn(
            "The posterior never collapses on one row, where rows are smoothed. Rows that stand in "
            "the bank twice share it: leave them out, LatentBank(x.unique(dim=0)), or say from "
            "when on, Smoothing.fit(bank, 0.7)."
        )
        return None
    scales = (0.25, 0.35, 0.5, 0.7, 1.0)  # a cap: see the module docstring
    scores = cross_validated(
        bank, edge, (8, 16, 32, 64), scales, class_wise=class_wise, progress=progress
    )
    if not scores:
        _warn(
            "Rows are left out in five parts, and in one of them there is none to ask about: too "
            "few rows differ from others" + (" of their class." if bank.classes else ".")
        )
        return None
    asked = [score for score in scores if not math.isnan(score.loss)]
    best = min(asked, key=lambda score: score.loss, default=scores[0])
    if not best.neighbours:
        _warn(
            f"On rows left out the rows as they are have a loss of {best.loss:.4g}, and no setting "
            "that keeps samples as near to them has less."
        )
        return None
    made = Smoothing(bank, best.neighbours, best.scale, class_wise=class_wise, progress=progress)
    made.scores = scores
    return made


def _warn(reason: str) -> None:
    warnings.warn(f"Smoothing.fit: none. {reason}", stacklevel=4)


@torch.no_grad()
def cross_validated(
    bank: LatentBank,
    boundary: float,
    neighbours: Sequence[int],
    scales: Sequence[float],
    *,
    class_wise: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[SmoothingScore]:
    """The scores of all settings, that of the rows as they are first.

    The oracle is class-wise if the bank has classes. At most 1000 rows are asked about, and about
    2000 samples made in each of five folds. `scales` ascend; a K for which a fold has too few rows
    is left out.

    Returns:
        One for the rows, and for each K one for each g and, with its loss, the largest scale that
        is near enough, by interpolation; none at all if a fold has no row to ask about.
    """
    boundary = max(boundary, 1e-3)  # 0: one row explains every query from the start
    folds = list(_folds(bank, boundary, seed))
    if len(folds) < FOLDS:
        return []
    # Copies share a fold, which may be a large one.
    most = min(len(fold.rest) for fold in folds) - 1
    neighbours = [k for k in neighbours if k <= most]
    rows = SmoothingScore(0, 0.0, 0.0, _mean(fold.loss(Oracle(fold.rest)) for fold in folds))
    scores = [rows]
    for k in progress_bar(neighbours, len(neighbours), progress, "cross-validation"):
        found = [SmoothingScore(k, g, 0.0) for g in scales]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a fold leaves no row a neighbour
            smoothings = [
                Smoothing(fold.rest, k, class_wise=class_wise, progress=False) for fold in folds
            ]
        for fold, smoothing in zip(folds, smoothings, strict=True):
            base = fold.distance(fold.rest.take(fold.rows)[:, None].expand(-1, fold.each, -1))
            for i, score in enumerate(found):
                made = _finished(
                    smoothing.with_scale(score.scale), fold.rows, fold.each, boundary, fold.seed
                )
                farther = score.farther + (fold.distance(made) - base) / FOLDS
                found[i] = replace(score, farther=farther)
        if (g := _largest_near(found)) is not None:
            loss = _mean(
                fold.loss(SmoothedOracle(fold.rest, None, smoothing.with_scale(g)))
                for fold, smoothing in zip(folds, smoothings, strict=True)
            )
            tried = {score.scale: score.farther for score in found}
            found = [score for score in found if score.scale != g]
            found.append(SmoothingScore(k, g, tried.get(g, 0.0), loss))
        scores += found
    return scores


def _largest_near(found: Sequence[SmoothingScore]) -> float | None:
    """The largest scale that is near enough, between those that were tried; None if none is."""
    near = [i for i, score in enumerate(found) if score.farther <= 0]
    if not near:
        return None
    last, after = found[near[-1]], found[near[-1] + 1 : near[-1] + 2]
    if not after:
        return last.scale
    share = last.farther / (last.farther - after[0].farther)
    return round(last.scale + share * (after[0].scale - last.scale), 2)


def _folds(bank: LatentBank, boundary: float, seed: int) -> Iterator[_Fold]:
    """Those that have a row to ask about."""
    rows = torch.arange(len(bank))
    labels = torch.tensor(bank.labels_of(rows.tolist())) if bank.classes else None
    # Copies of a row are in its fold: otherwise what is trained on would have it.
    same = row_keys(bank.rows).cpu().unique(return_inverse=True)[1]
    order = torch.randperm(int(same.max()) + 1, generator=torch.Generator().manual_seed(seed))

    def samples(at: Tensor) -> Tensor:
        return bank.take(at).float().cpu().reshape(-1, *bank.shape)

    for number in range(FOLDS):
        draws = torch.Generator().manual_seed(seed + number)
        out = order[same] % FOLDS == number
        if out.all():  # all rows are equal
            continue
        rest = LatentBank(samples(rows[~out]), None if labels is None else labels[~out])
        if labels is not None:  # a class that is in this fold only cannot be asked about
            out = out & torch.isin(labels, torch.tensor(rest.classes))
        asked = rows[out]
        if not len(asked):
            continue
        asked = asked[torch.randperm(len(asked), generator=draws)[: ASKED // FOLDS]]
        x1 = samples(asked)
        share = (torch.arange(len(x1)) + torch.rand(len(x1), generator=draws)) / len(x1)
        yield _Fold(
            rest,
            x1,
            None if labels is None else labels[asked],
            t=boundary + (1 - boundary) * (1 - _LAST) * share,
            x0=torch.randn(x1.shape, generator=draws),
            rows=torch.randperm(len(rest), generator=draws)[: DRAWN // 2],
            each=max(2, DRAWN // len(rest)),
            seed=seed + number,
        )


def _finished(smoothing: Smoothing, rows: Tensor, each: int, boundary: float, seed: int) -> Tensor:
    """Some samples that were led to each of some rows until the boundary, (n, each, D), float64."""
    bank, k, ratio = smoothing.bank, smoothing.neighbours, boundary / (1 - boundary)
    draws = torch.Generator().manual_seed(seed)
    made = []
    for some in rows.split(max(1, _GATHER // ((k + each) * bank.dim))):
        x, _, a = smoothing.factors(some)
        z = torch.randn(len(some), k, each, generator=draws, dtype=a.dtype)
        noise = torch.randn(len(some), bank.dim, each, generator=draws, dtype=a.dtype)
        z += ratio * math.sqrt(2) * (a @ noise)  # eps - eps'
        m = torch.eye(k, dtype=a.dtype) + ratio**2 * (a @ a.mT)
        made.append(x[:, None] + torch.linalg.solve(m, z).mT @ a)
    return torch.cat(made)


def _mean(losses: Iterator[Tensor]) -> float:
    return float(torch.cat(list(losses)).mean())
