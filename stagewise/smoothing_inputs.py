"""What a smoothing is given: settings, samples with their rows, and how much of it acts at t."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.device_checks import require_all, seen_within
from stagewise.queries import Times, as_times, check_times, require_tensors
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
    "time_of",
]

Strength: TypeAlias = "Callable[[Tensor], Tensor]"
"""From times (B,) to numbers in [0, 1], (B,), that multiply what is added to a row."""


def search_space(bank: LatentBank, features: Tensor | None, class_wise: bool) -> LatentBank:
    """Where neighbours are searched: the bank, or features in its order and classes.

    Args:
        bank: The rows.
        features: (N, *) numbers, in the order of the samples that the bank was made from; or None.
        class_wise: Whether neighbours are of the row's own class.

    Raises:
        ValueError: On features of another length or with NaN or Inf, or classes that are not there.
        TypeError: If the features are no tensor.
    """
    bank.require_unmasked(
        "Smoothing", "Leave it out: Scheme(oracle, target=Mix()), or StageScheme(target=Mix())."
    )
    if class_wise:
        bank.require_classes()
    if features is None:
        return bank
    require_tensors(features=features)
    if len(features) != len(bank) or features.ndim < 2:
        raise ValueError(
            f"Expected `features` with shape ({len(bank)}, F), a line for each row of the bank, "
            f"got {tuple(features.shape)}. Compute them for the samples the bank was made from."
        )
    features = features.detach().to(bank.device).flatten(1)
    features = features if features.is_floating_point() else features.float()
    wrong = (~features.isfinite().all(1)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"Expected finite `features`, got NaN or Inf in {len(wrong)} of {len(bank)} lines, the "
            f"first {wrong[0]}. Leave these samples out of the bank, or features=None."
        )
    own = features if bank.index is None else features[bank.index]
    labels = torch.tensor(bank.labels_of(range(len(bank)))) if class_wise else None
    return LatentBank(own, labels)


def time_of(boundary: float | StageBoundary, call: str) -> float:
    """From which time on rows are smoothed; NaN (never reached): nowhere.

    Args:
        boundary: A time, or what was measured, of which the collapsed boundary is taken.
        call: A line to paste.

    Raises:
        ValueError: If it is not in [0, 1].
    """
    edge = boundary.collapsed if isinstance(boundary, StageBoundary) else boundary
    if not isinstance(edge, float | int) or edge < 0 or edge > 1:
        raise ValueError(
            f"Expected `boundary` in [0, 1], the time from which on rows are smoothed, or a "
            f"StageBoundary, got {boundary!r}: {call}."
        )
    return float(edge)


def strength_at(
    x1: Tensor, t: Times | None, boundary: float | StageBoundary | None, strength: Strength | None
) -> Tensor | None:
    """The strength at the time of each sample, in [0, 1], (B,); None: 1 everywhere.

    Args:
        x1: Samples, (B, *).
        t: Their times, (B,), or as in `Oracle.posterior`.
        boundary: 0 before this time, 1 at it and after it; see `time_of`.
        strength: In place of a boundary, any function of t.

    Raises:
        ValueError: On a boundary or a strength without times, both, or numbers out of range.
    """
    if boundary is None and strength is None:
        return None
    if boundary is not None and strength is not None:
        raise ValueError(
            "Expected a `boundary` or a `strength`, got both. A step is strength=lambda t: (t >= "
            "0.5).float()."
        )
    if t is None:
        raise ValueError(
            "Expected the times `t` of the samples with a boundary or a strength, got none: "
            "draw(x1, source, t=t, boundary=0.5)."
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
            f"Expected `strength` to give a tensor of shape {tuple(time.shape)}, got "
            f"{tuple(share.shape) if isinstance(share, Tensor) else share!r}: "
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


def check_settings(bank: LatentBank, neighbours: int, scale: float, floor: float) -> None:
    """Refuses what is no bank, and numbers out of range."""
    if not isinstance(bank, LatentBank):
        raise TypeError(
            f"Expected a LatentBank to smooth, got {type(bank).__name__}. Of samples make "
            "Smoothing(LatentBank(x)); of latents in files Smoothing(latents.bank())."
        )
    require_fixed(bank)
    if isinstance(neighbours, bool) or not isinstance(neighbours, int):
        raise TypeError(f"Expected `neighbours` to be a whole number, got {neighbours!r}.")
    if not 1 <= neighbours < len(bank):
        raise ValueError(
            f"Expected `neighbours` from 1 to {len(bank) - 1}, the other rows of the bank, got "
            f"{neighbours}: Smoothing(bank, neighbours={min(8, len(bank) - 1)})."
        )
    for name, value in (("scale", scale), ("floor", floor)):
        if not isinstance(value, float | int) or not 0 <= value < math.inf:
            raise ValueError(
                f"Expected `{name}` of at least 0, got {value!r}. Give {name}=0 for none."
            )


def require_fixed(bank: LatentBank) -> None:
    """Refuses a bank whose rows change: neighbours are searched once."""
    if bank.origin:
        raise ValueError(
            f"Expected a bank whose rows stay for a smoothing, got {bank!r}: neighbours are "
            "searched once, and its rows change with each batch. Give a bank of fixed rows, "
            "Smoothing(LatentBank(x)), or train without: Scheme(oracle, target=Mix())."
        )


def default_neighbours(bank: LatentBank) -> int:
    """8 neighbours; of fewer rows all the others, and a warning says so."""
    require_fixed(bank)
    others = len(bank) - 1
    if others < 8:
        warnings.warn(
            f"stagewise: the smoothing has the {others} other rows as neighbours of each row in "
            f"place of 8, as there are {others + 1} rows: smoothing=Smoothing(bank, {others}).",
            stacklevel=caller_level(),
        )
    return min(8, others)


def rows_of(bank: LatentBank, x1: Tensor, source: Tensor | None) -> Tensor:
    """The row of each sample, (B,): as it is given, or looked up; see `Smoothing.draw`."""
    given, source = source is not None, bank.find(x1) if source is None else source
    require_tensors(source=source)
    if source.shape != x1.shape[:1] or source.is_floating_point() or source.dtype == torch.bool:
        raise ValueError(
            f"Expected integer `source` with shape ({len(x1)},), the row of each sample, got "
            f"{source.dtype} of shape {tuple(source.shape)}: draw(x1, source=bank.find(x1))."
        )
    if seen_within(source, 0, len(bank) - 1):
        return source
    inside = (source >= 0) & (source < len(bank))
    what = f"`source` from 0 to {len(bank) - 1}, the rows of the bank"
    if not given:
        what = "samples that are rows of the bank, or the `source` of each"
    require_all(
        inside,
        f"Expected {what}",
        lambda: (
            f", got {int((~inside).sum())} of {len(inside)} that are "
            + (f"not, the first {int(source[~inside][0])}. " if given else "no rows. ")
            + "Flips and crops are no rows: train without them, or make the bank of what is "
            "trained on. Or let the data set return the position i of each item: "
            "draw(x1, source=i) if the bank keeps its order (bank.index is None), otherwise "
            "draw(x1, source=bank.index.argsort()[i])."
        ),
    )
    return source


@torch.no_grad()
def check_near(bank: LatentBank, x1: Tensor, source: Tensor) -> None:
    """Refuses samples that have little to do with their rows: flips, or another order."""
    gap = x1.flatten(1).double() - bank.take(source, x1.device)
    off, spread = gap.square().sum(1).mean(), bank.mean_sq_norm.to(x1.device)
    require_all(
        off <= 0.75 * spread,  # of two random rows it is 2
        "Expected `x1` near the rows that `source` says",
        lambda: (
            f", got samples {float((off / spread).sqrt()):.2g} times as far from them as rows are "
            "from their mean. Positions in the data set? A bank with labels is sorted by class: "
            "source=bank.index.argsort()[i]. Flips or crops? Build the bank of what is trained "
            "on."
        ),
    )
