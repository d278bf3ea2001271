r"""Noisy samples with their conditional and oracle targets, and a model's error against each.

For a sample `x_t` made from `x_1` the conditional velocity is u and the oracle's is u*. With the
model's v,

    |v - u|^2 = |v - u*|^2 + |u - u*|^2 + 2 <v - u*, u* - u>,

and if `x_1` is a draw from the training set the last term has mean zero at every `x_t`, because u*
is the mean of u there (Liu et al., arXiv 2512.02826, Sec. 2). So for any model

    conditional error = oracle error + floor,

and only a wrong oracle breaks this identity (another scale, another path, other rows, labels that
the model is given and the oracle is not). `cross` is the last term per number; its mean over its
standard error shows whether it is zero. `probe_entry` and `window_entry` turn a probe or a window
of training steps into plain numbers, by bins of t and by stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from stagewise.binned_sums import BinnedSums
from stagewise.masks import MaskedLabels, compared_within, fitted, mean_of, mean_square
from stagewise.oracle import Oracle
from stagewise.paths import Prediction
from stagewise.queries import Labels
from stagewise.stages import stratified_times

__all__ = [
    "ALARM",
    "PROBED",
    "STAGES",
    "Probe",
    "largest",
    "noisy_targets",
    "probe_entry",
    "spent",
    "standard_scores",
    "window_entry",
]

PROBED = ("conditional", "oracle", "floor", "cosine", "cross")
"""Per query: the mean over the numbers that count of (v - u)^2, (v - u*)^2 and (u - u*)^2, the
cosine of v and u*, and `cross`."""

_BATCH = 128

STAGES = ("navigation", "transition", "refinement")
"""Below the midpoint, from there to the collapsed boundary, and above."""

ALARM = 6.0
"""Standard errors of `cross` beyond which the oracle is not that of the training. Near the
collapsed boundary few queries decide, and four standard errors occur with the right oracle too."""

_KEPT = ("conditional", "oracle", "floor", "cosine", "conditional_se", "oracle_se")
_NO_FLOOR = 1e-3
"""A floor below this share of the conditional error is too small to divide by."""


def noisy_targets(
    oracle: Oracle, x0: Tensor, x1: Tensor, t: Tensor, labels: Labels | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples, float32, their conditional velocities u, and u* - u, each (B, *)."""
    x1, labels = fitted(x1, labels, oracle.bank.shape)
    xt = oracle.path.interpolate(x0, x1, t).to(torch.float32)
    u = Prediction("velocity").target(oracle.path(t), x0, x1)
    return xt, u, oracle.inner.correction(xt, t, x1, labels)


class Probe:
    """Queries that stay the same throughout a run, so that its curves can be compared.

    The targets do not depend on the model: they are computed once, by the oracle on the `device`,
    and kept on the CPU, three times `queries * strata * D` numbers of float32, over all ranks.

    There are `queries` in each stratum of t, (T + 1,) `edges`, from the samples `x1`, (n, *), each
    used equally often, up to one. They are the same on any number of ranks: this process holds
    every `world_size`-th, from `rank` on. `reachable` gives the nearest times, (B,), that the model
    knows.
    """

    def __init__(
        self,
        x1: Tensor,
        labels: Tensor | MaskedLabels | None,
        edges: Tensor,
        queries: int,
        oracle: Oracle,
        *,
        class_wise: bool,
        seed: tuple[int, ...],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        reachable: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> None:
        t = stratified_times(edges, queries, seed=seed).flatten()
        draws = np.random.default_rng((*seed, 1))
        rows = draws.permutation(np.arange(len(t)) % len(x1))
        noise_seeds = draws.integers(2**62, size=len(t)).tolist()
        own = torch.arange(len(t))[rank::world_size]
        index = torch.from_numpy(rows)[own]
        self.t, self.size, self.edges = reachable(t[own]).float(), len(t), edges
        self.labels = None if labels is None else labels[index]
        generator = torch.Generator()
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for part in torch.arange(len(own)).split(_BATCH):
            x = x1[index[part]].to(device, torch.float32)
            noise = [
                torch.randn(x.shape[1:], generator=generator.manual_seed(noise_seeds[i]))
                for i in own[part].tolist()
            ]
            x0, times = torch.stack(noise).to(device), self.t[part].to(device)
            wise = compared_within(self.labels, class_wise)
            wise = None if wise is None else wise[part].to(device)
            noisy, u, gap = noisy_targets(oracle, x0, x, times, wise)
            kept.append((noisy.cpu(), u.cpu(), (u + gap).cpu()))
        self.xt, self.u, self.oracle_u = (torch.cat(part) for part in zip(*kept, strict=True))

    @torch.no_grad()
    def measure(
        self,
        velocity: Callable[[Tensor, Tensor, Any], Tensor],
        add: Callable[[Tensor, Tensor], None],
        device: torch.device,
    ) -> None:
        """Gives `add` the times, (B,), and errors, (K, B) as `PROBED`, of the queries of this rank.

        `velocity` is that of the model, on `device`, from `x_t`, t and labels.
        """
        for part in torch.arange(len(self.t)).split(_BATCH):
            labels = None if self.labels is None else self.labels[part].to(device)
            t, xt, u, best = (
                value[part].to(device) for value in (self.t, self.xt, self.u, self.oracle_u)
            )
            v = velocity(xt, t, labels).float()
            add(t, errors_of(v, u, best, labels))


def errors_of(v: Tensor, u: Tensor, best: Tensor, labels: object = None) -> Tensor:
    """The values of `PROBED`, (5, B)."""
    to_u, to_best, gap = v - u, v - best, u - best
    squares = [mean_square(value, labels) for value in (to_u, to_best, gap)]
    sizes = mean_square(v, labels).sqrt() * mean_square(best, labels).sqrt()
    cosine = mean_of(v * best, labels) / sizes.clamp_min(1e-30)
    return torch.stack([*squares, cosine, -2 * mean_of(to_best * gap, labels)])


def standard_scores(mean: Tensor, error: Tensor, count: Tensor) -> Tensor:
    """Means over their standard errors, (T,), as normal deviates of the same probability.

    With few samples the ratio has Student's distribution, whose tails are wider: 4 standard errors
    of 16 samples are only 3.3. NaN for a count below two.
    """
    freedom = (count.double() - 1).clamp_min(1).cpu().numpy()
    ratio = torch.where(mean == 0, 0.0, mean.double() / error.double()).cpu().numpy()
    tail = stats.t.logsf(np.abs(ratio), freedom)
    deviates = np.sign(ratio) * stats.norm.isf(np.maximum(np.exp(tail), 1e-300))
    return torch.from_numpy(np.where(count.cpu().numpy() > 1, deviates, np.nan))


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
    """Oracle error over the floor, NaN where the floor is too small."""
    there = train["floor"] > _NO_FLOOR * train["conditional"]
    return torch.where(there, train["oracle"] / train["floor"], torch.nan)


def largest(values: Sequence[float]) -> float:
    """The largest absolute value, NaN left out; 0 if there is none."""
    return max((abs(value) for value in values if not math.isnan(value)), default=0.0)


def spent(sums: BinnedSums, stages: Tensor) -> dict[str, dict[str, float]]:
    """Shares of draws, "loss" and "gradient" of each stage; edges of the `stages`, (4,)."""
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
    """A window of training steps by bins of t and by stage, as plain numbers and lists."""
    means = sums.merged(edges).means()
    return {
        "samples": int(sums.count.sum()),
        "draws": means["share"].tolist(),
        "density": density,
        "loss": means["loss"].tolist(),
        "gradient": means["gradient"].tolist(),
        "stages": spent(sums, stages),
    }
