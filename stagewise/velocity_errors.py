"""What a probe or a stretch of training has shown, by bins of t and by stage, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.binned_sums import BinnedSums
from stagewise.velocity_probe import standard_scores

__all__ = [
    "ALARM",
    "STAGES",
    "largest",
    "probe_entry",
    "spent",
    "window_entry",
]

STAGES = ("navigation", "transition", "refinement")
"""Below the midpoint, from there to where the posterior has collapsed, and above."""

ALARM = 6.0
"""Standard errors beyond which the oracle is said not to be that of the training. Where the
posterior collapses a few queries in a hundred decide, and four happen with the right one too."""

_KEPT = ("conditional", "oracle", "floor", "cosine", "conditional_se", "oracle_se")
_NO_FLOOR = 1e-3
"""Share of the conditional error below which the floor is none to compare with."""


def probe_entry(found: Mapping[str, BinnedSums], edges: Tensor, stages: Tensor) -> dict[str, Any]:
    """A probe by bins of t and by stage, as plain numbers and lists.

    Args:
        found: For "train" and, if there are held-out samples, "held_out": sums of `PROBED`.
        edges: Of the bins, (T + 1,).
        stages: Edges of the stages, (4,).

    Returns:
        `train` and `held_out` (or None): lists of T numbers; `gap` and `gap_se`, the conditional
        error on held-out samples minus that on training samples (or None); `alarm` (or None);
        `stages`: the same means by stage.
    """
    means = {split: sums.merged(edges).means() for split, sums in found.items()}
    train = means["train"]
    z = standard_scores(train["cross"], train["cross_se"], train["count"])
    entry: dict[str, Any] = {"train": {key: train[key].tolist() for key in _KEPT}}
    entry["train"] |= {"excess": _excess(train).tolist(), "pythagoras_z": z.tolist()}
    entry |= {"held_out": None, "gap": None, "gap_se": None, "alarm": None}
    if "held_out" in means:
        others = means["held_out"]
        kept = [key for key in _KEPT if key != "floor"]
        entry["held_out"] = {key: others[key].tolist() for key in kept}
        entry["gap"] = (others["conditional"] - train["conditional"]).tolist()
        entry["gap_se"] = torch.hypot(others["conditional_se"], train["conditional_se"]).tolist()
    worst = largest(entry["train"]["pythagoras_z"])
    if worst > ALARM:
        entry["alarm"] = (
            f"conditional error is not oracle error + floor: off by {worst:.1f} standard errors"
        )
    return entry | {"stages": _stage_means(found, stages)}


def _stage_means(
    found: Mapping[str, BinnedSums], stages: Tensor
) -> dict[str, dict[str, dict[str, float]]]:
    """By split and stage: conditional, oracle and cosine, and for training samples the floor."""
    result = {}
    for split, sums in found.items():
        means = sums.merged(stages).means()
        values = {key: means[key] for key in ("conditional", "oracle", "cosine")}
        if split == "train":
            values |= {"floor": means["floor"], "excess": _excess(means)}
        result[split] = {
            stage: {key: float(value[place]) for key, value in values.items()}
            for place, stage in enumerate(STAGES)
        }
    return result


def _excess(train: Mapping[str, Tensor]) -> Tensor:
    """Oracle error over the floor, NaN where there is none to speak of."""
    there = train["floor"] > _NO_FLOOR * train["conditional"]
    return torch.where(there, train["oracle"] / train["floor"], torch.nan)


def largest(values: Sequence[float]) -> float:
    """The largest absolute value, NaN left out; 0 if there is none."""
    return max((abs(value) for value in values if not math.isnan(value)), default=0.0)


def spent(sums: BinnedSums, stages: Tensor) -> dict[str, dict[str, float]]:
    """Shares of draws, loss and gradient norm of each stage.

    Args:
        sums: Over the keys "loss" and "gradient".
        stages: Edges of the stages, (4,).
    """
    wide = sums.merged(stages)
    totals = {"draws": wide.count, "loss": wide.total[0], "gradient": wide.total[1]}
    shares = {key: (value / value.sum()).tolist() for key, value in totals.items()}
    return {
        stage: {key: share[place] for key, share in shares.items()}
        for place, stage in enumerate(STAGES)
    }


def window_entry(
    sums: BinnedSums, edges: Tensor, stages: Tensor, density: list[float] | None
) -> dict[str, Any]:
    """A stretch of training by bins of t and by stage, as plain numbers and lists."""
    means = sums.merged(edges).means()
    return {
        "draws": means["share"].tolist(),
        "density": density,
        "loss": means["loss"].tolist(),
        "gradient": means["gradient"].tolist(),
        "stages": spent(sums, stages),
    }
