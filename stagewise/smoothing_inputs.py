"""Checks of what a smoothing is given: settings, samples and their rows, times and strength."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from operator import index
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.device_checks import require_all, seen_within
from stagewise.queries import Times, as_times, check_times, checked_source, require_tensors
from stagewise.stages import StageBoundary
from stagewise.tracing import caller_level

__all__ = [
    "Strength",
    "check_near",
    "check_settings",
    "default_neighbours",
    "require_fixed",
    "rows_of",
    "search_space",
    "strength_at",
    "tell_of_neighbours",
    "time_of",
]

N = TypeVar("N")

Strength: TypeAlias = "Callable[[Tensor], Tensor]"
"""A function from times, (B,), to numbers in [0, 1], (B,), that multiply what is added to rows."""


def search_space(bank: LatentBank, features: Tensor | None, class_wise: bool) -> LatentBank:
    """The bank in which neighbours are searched: `bank`, or one of features with its labels."""
    bank.require_unmasked(
        "Smoothing", "Train without it: Scheme(oracle, target=Mix()), StageScheme(target=Mix())."
    )
    if class_wise:
        bank.require_classes()
    if features is None:
        return bank
    require_tensors(features=features)
    if len(features) != len(bank) or features.ndim < 2:
        raise ValueError(
            f"Expected `features` with shape ({len(bank)}, F), one line for each row of the bank, "
            f"got {tuple(features.shape)}. Compute them for the samples that the bank was made "
            "from, in the same order: Smoothing(LatentBank(x), features=encoder(x).flatten(1))."
        )
    features = features.detach().to(bank.device).flatten(1)
    features = features if features.is_floating_point() else features.float()
    wrong = (~features.isfinite().all(1)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"Expected finite `features`, got NaN or Inf in {len(wrong)} of {len(bank)} lines, the "
            f"first {wrong[0]}. Leave these samples out: keep = features.flatten(1).isfinite()"
            ".all(1); Smoothing(LatentBank(x[keep]), features=features[keep])."
        )
    own = features if bank.index is None else features[bank.index]
    labels = torch.tensor(bank.labels_of(range(len(bank)))) if class_wise else None
    return LatentBank(own, labels)


def time_of(boundary: float | StageBoundary, call: str) -> float:
    """The time t from which on rows are smoothed; NaN, a boundary never reached, means nowhere.

    `call` is the line to paste of the error if it is not in [0, 1].
    """
    edge = boundary.collapsed if isinstance(boundary, StageBoundary) else boundary
    if not isinstance(edge, float | int) or edge < 0 or edge > 1:
        raise ValueError(
            f"Expected `boundary` in [0, 1], the time t from which on rows are smoothed, or a "
            f"StageBoundary, got {boundary!r}: {call}."
        )
    return float(edge)


def strength_at(
    x1: Tensor, t: Times | None, boundary: float | StageBoundary | None, strength: Strength | None
) -> Tensor | None:
    """The strength of the smoothing at each sample's time, in [0, 1], (B,); None: 1 for all.

    Arguments and errors are those of `Smoothing.draw`.
    """
    if boundary is None and strength is None:
        return None
    if boundary is not None and strength is not None:
        raise ValueError(
            "Expected `boundary` or `strength`, got both. With a strength alone, a boundary at 0.5 "
            "is strength=lambda t: (t >= 0.5).float()."
        )
    if t is None:
        raise ValueError(
            "Expected the times `t` of the samples, as a boundary or a strength needs them, got "
            "none: draw(x1, source, t=t, boundary=0.5)."
        )
    time = as_times(t, x1)
    check_times(time, len(x1))
    if strength is None:
        assert boundary is not None
        edge = time_of(boundary, "draw(x1, source, t=t, boundary=0.7)")
        return (time >= edge).to(time.dtype)
    share = strength(time) if callable(strength) else strength
    if not isinstance(share, Tensor) or share.shape != time.shape:
        raise ValueError(
            f"Expected `strength` to give a tensor of shape {tuple(time.shape)}, one number for "
            f"each time, got {tuple(share.shape) if isinstance(share, Tensor) else share!r}: "
            "strength=lambda t: (t >= 0.5).float()."
        )
    require_all(
        (share >= 0) & (share <= 1),
        "Expected `strength(t)` in [0, 1]",
        lambda: (
            f", got values from {share.min():.4g} to {share.max():.4g}. Clamp it: "
            "strength=lambda t: ((t - 0.3) / 0.4).clamp(0, 1)."
        ),
    )
    return share


def check_settings(
    bank: LatentBank, neighbours: int, scale: float, floor: float
) -> tuple[int, float, float]:
    """The settings of `Smoothing`, checked; numbers of numpy's and torch's types as Python's."""
    if not isinstance(bank, LatentBank):
        raise TypeError(
            f"Expected a LatentBank to smooth, got {type(bank).__name__}. Of samples make "
            'Smoothing(LatentBank(x)); of latents in files Smoothing(open_latents("path").bank()).'
        )
    require_fixed(bank)
    count = _number(index, neighbours)
    if count is None:
        raise TypeError(
            f"Expected `neighbours` to be a whole number, got {neighbours!r}: "
            "Smoothing(bank, neighbours=8)."
        )
    if not 1 <= count < len(bank):
        raise ValueError(
            f"Expected `neighbours` from 1 to {len(bank) - 1}, the number of other rows, got "
            f"{count}: Smoothing(bank, neighbours={min(8, len(bank) - 1)})."
        )
    sizes = []
    for name, value, usual in (("scale", scale, 1), ("floor", floor, 0)):
        size = _number(float, value)
        if size is None or not 0 <= size < math.inf:
            raise ValueError(
                f"Expected `{name}` of at least 0, got {value!r}. The default is "
                f"Smoothing(bank, {name}={usual})."
            )
        sizes.append(size)
    return count, sizes[0], sizes[1]


def _number(kind: Callable[[Any], N], value: Any) -> N | None:
    """A number of any library as Python's; None for what is no number."""
    with suppress(TypeError, ValueError, RuntimeError):
        return None if isinstance(value, bool | str) else kind(value)
    return None


def tell_of_neighbours(bank: LatentBank, index: Tensor, class_wise: bool) -> None:
    """Warns if no row has a neighbour; `index`, (N, K), has the row itself where it has none."""
    if (index == torch.arange(len(bank))[:, None]).all():
        why = "all rows are equal"
        if class_wise and len(bank.classes) > 1:
            why = "no class has rows that differ (class_wise=False searches among all rows)"
        warnings.warn(
            f"stagewise: no row has a neighbour, since {why}: only an isotropic floor "
            "moves samples.",
            stacklevel=3,
        )


def require_fixed(bank: LatentBank) -> None:
    """Raises if the rows of the bank change, since neighbours are searched once."""
    if bank.origin:
        raise ValueError(
            f"Expected a bank of fixed rows for a smoothing, got {bank!r}, whose rows change with "
            "each batch: neighbours are searched once. Smooth fixed rows, "
            "Smoothing(LatentBank(x)), or train without smoothing: Scheme(oracle, target=Mix())."
        )


def default_neighbours(bank: LatentBank) -> int:
    """8 neighbours, or all other rows if they are fewer, with a warning."""
    require_fixed(bank)
    others = len(bank) - 1
    if others < 8:
        warnings.warn(
            f"stagewise: the bank has {others + 1} rows, so smoothing takes all {others} other "
            "rows as the neighbours of each row, where 8 are usual. To say so yourself, without "
            f"this warning: smoothing=Smoothing(bank, {others}).",
            stacklevel=caller_level(),
        )
    return min(8, others)


def rows_of(bank: LatentBank, x1: Tensor, source: Tensor | None) -> Tensor:
    """The row of each sample, (B,), given or looked up; see `Smoothing.draw`."""
    source = bank.find(x1) if source is None else source
    require_tensors(source=source)
    checked_source(source, len(x1), None)
    if seen_within(source, 0, len(bank) - 1):
        return source
    inside = (source >= 0) & (source < len(bank))
    require_all(
        inside,
        "Expected samples that are rows of the bank, or the `source` of each, from 0 to "
        f"{len(bank) - 1}",
        lambda: (
            f", got {int((~inside).sum())} of {len(inside)} that are not, the first "
            f"{int(source[~inside][0])} (-1: no row is equal). "
            "Flips and crops of rows are no rows: train without them, or build the bank from the "
            "samples that the model is trained on. Nor are latents that are drawn again each "
            "time: let the data set return the position i of each item, and say source=i to "
            "`draw`, `smooth` or FlowMatchingLoss, or around any other step "
            "`with stagewise.sources(i):`. That is for a bank that keeps its order (bank.index is "
            "None); otherwise it is bank.index.argsort()[i]."
        ),
    )
    return source


@torch.no_grad()
def check_near(bank: LatentBank, x1: Tensor, source: Tensor) -> None:
    """Raises if samples are far from their rows: they are flips, or in another order."""
    gap = x1.flatten(1).double() - bank.take(source, x1.device)
    off, spread = gap.square().sum(1).mean(), bank.mean_sq_norm.to(x1.device)
    require_all(
        off <= 0.75 * spread,  # between two random rows it is 2
        "Expected `x1` near the rows that `source` gives",
        lambda: (
            f", got samples {float((off / spread).sqrt()):.2g} times as far from them as rows are "
            "from their mean. If `source` has positions i in the data set: a bank with labels is "
            "sorted by class, draw(x1, source=bank.index.argsort()[i]). If samples are flips or "
            "crops: build the bank from the samples that the model is trained on."
        ),
    )
