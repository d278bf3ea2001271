"""What a probe or a stretch of training has shown, as lines of a file and as scalars of a log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.callbacks.metrics import BinnedMeans
from stagewise.callbacks.tags import by_time
from stagewise.velocity_probe import standard_scores

__all__ = [
    "ALARM",
    "STAGES",
    "largest",
    "probe_entry",
    "probe_scalars",
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


def probe_entry(found: Mapping[str, BinnedMeans], edges: Tensor, stages: Tensor) -> dict[str, Any]:
    """A probe by bins of t and by stage, as plain numbers and lists.

    Args:
        found: For "train" and, if there are held-out samples, "held_out": means of `PROBED`.
        edges: Of the bins, (T + 1,).
        stages: Edges of the stages, (4,).

    Returns:
        `train` and `held_out` (or None): lists of T numbers; `gap` and `gap_se`, the conditional
        error on held-out samples minus that on training samples (or None); `alarm` (or None);
        `stages`: the same means by stage.
    """
    means = {split: metric.merged(edges).compute() for split, metric in found.items()}
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
    found: Mapping[str, BinnedMeans], stages: Tensor
) -> dict[str, dict[str, dict[str, float]]]:
    """By split and stage: conditional, oracle and cosine, and for training samples the floor."""
    result = {}
    for split, metric in found.items():
        means = metric.merged(stages).compute()
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


def probe_scalars(name: str, entry: Mapping[str, Any], edges: Tensor) -> dict[str, float]:
    """The scalars of a probe; see `VelocityErrorMonitor`. Stages without samples are left out."""
    stages = entry["stages"]
    scalars = {
        f"{name}/{split}/{key}/{stage}": value
        for split, by_stage in stages.items()
        for stage, values in by_stage.items()
        for key, value in values.items()
    }
    for split in stages:
        for key in ("conditional", "oracle"):
            scalars |= by_time(f"{name}_by_t/{split}/{key}", edges, entry[split][key])
    if entry["gap"] is not None:
        for stage in STAGES:
            errors = [stages[split][stage]["conditional"] for split in ("held_out", "train")]
            scalars[f"{name}/gap/{stage}"] = errors[0] - errors[1]
        scalars |= by_time(f"{name}_by_t/gap", edges, entry["gap"])
    scalars[f"{name}/pythagoras"] = largest(entry["train"]["pythagoras_z"])
    return {tag: value for tag, value in scalars.items() if not math.isnan(value)}


def spent(metric: BinnedMeans, stages: Tensor) -> dict[str, dict[str, float]]:
    """Shares of draws, loss and gradient norm of each stage.

    Args:
        metric: Over the keys "loss" and "gradient".
        stages: Edges of the stages, (4,).
    """
    wide = metric.merged(stages)
    sums = {"draws": wide.count, "loss": wide.total[0], "gradient": wide.total[1]}
    shares = {key: (value / value.sum()).tolist() for key, value in sums.items()}
    return {stage: {key: shares[key][place] for key in sums} for place, stage in enumerate(STAGES)}


def window_entry(
    metric: BinnedMeans, edges: Tensor, stages: Tensor, density: list[float] | None
) -> dict[str, Any]:
    """A stretch of training by bins of t and by stage, as plain numbers and lists."""
    means = metric.merged(edges).compute()
    return {
        "draws": means["share"].tolist(),
        "density": density,
        "loss": means["loss"].tolist(),
        "gradient": means["gradient"].tolist(),
        "stages": spent(metric, stages),
    }
