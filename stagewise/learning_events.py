r"""What happens once in a training, read from the history of its velocity probes.

**Navigation is learned** when the logarithm of the oracle error in navigation is flat over the last
third of the probes (`transitions.is_flat`). In logarithms, because errors fall by factors: the fall
from an untrained model would hide all others. The queries of a probe stay the same, so its curve is
smooth.

**Memorization begins** when in some bin of t the conditional error on held-out samples is above
that on training samples by more than a share of the latter, and by more than it was at the first
probe, with four standard errors. Error by t shows it before samples do (`stagewise.copies`).

A history is a list of probes, ascending by step, as `VelocityErrorMonitor` reports them: dicts of
plain numbers, and of lists over the bins of t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.transitions import is_flat

__all__ = ["memorization_onset", "navigation_learned"]

Probe = Mapping[str, Any]


def navigation_learned(
    history: Sequence[Probe], *, window: int, patience: int, tolerance: float
) -> dict[str, Any] | None:
    """The evidence that the oracle error in navigation has reached its plateau, or None.

    Args:
        history: The probes so far.
        window: Probes that a line is fitted through at the least, at least 4; there is no evidence
            before `2 * window` probes.
        patience: Probes in a row at which it must be flat.
        tolerance: What is flat, as a share of what has been gained, in logarithms.
    """
    navigation = [probe["stages"]["train"]["navigation"] for probe in history]
    points = [stage["oracle"] for stage in navigation]
    if len(points) < 2 * window or not all(map(math.isfinite, points)):
        return None
    logs = [math.log(max(point, 1e-30)) for point in points]
    ends = [logs[: len(logs) - back] for back in range(patience)]
    if not all(is_flat(end, window, tolerance) for end in ends):
        return None
    return {
        "oracle_error": points[-1],
        "first": points[0],
        "floor": navigation[-1]["floor"],
        "message": (
            f"the oracle error in navigation is flat at {points[-1]:.4g} (at first "
            f"{points[0]:.4g}, floor {navigation[-1]['floor']:.4g})"
        ),
    }


def memorization_onset(
    history: Sequence[Probe], edges: Sequence[float], *, patience: int, gap: float
) -> dict[str, Any] | None:
    """The evidence that the gap of training and held-out error has opened, or None.

    Args:
        history: The probes so far.
        edges: Of their bins of t, (T + 1,).
        patience: Probes in a row at which it must be open.
        gap: Share of the training error by which the held-out error must be above it.
    """
    if len(history) < patience + 1 or history[-1]["gap"] is None:
        return None
    first = _relative_gap(history[0])
    open_in = torch.ones(len(first), dtype=torch.bool)
    for probe in history[-patience:]:
        relative = _relative_gap(probe)
        difference, error = torch.tensor(probe["gap"]), torch.tensor(probe["gap_se"])
        grown = torch.minimum(relative, relative - first.nan_to_num())
        open_in &= (grown > gap) & (difference > 4 * error)
    if not bool(open_in.any()):
        return None
    at = open_in.nonzero().flatten()
    low, high = edges[int(at[0])], edges[int(at[-1]) + 1]
    worst = int(torch.where(open_in, relative, -torch.inf).argmax())
    train = history[-1]["train"]["conditional"][worst]
    held_out = history[-1]["held_out"]["conditional"][worst]
    return {
        "t_from": low,
        "t_to": high,
        "train": train,
        "held_out": held_out,
        "message": (
            f"for t in [{low:.3f}, {high:.3f}] held-out error has left training error: up to "
            f"{held_out:.4g} against {train:.4g}"
        ),
    }


def _relative_gap(probe: Probe) -> Tensor:
    """Held-out error above training error, as a share of the latter, by bins."""
    return torch.tensor(probe["gap"]) / torch.tensor(probe["train"]["conditional"])
