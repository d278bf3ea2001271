r"""Events of a training, found in its velocity probes: navigation learned, memorization onset.

**Navigation is learned** when the logarithm of the oracle error in navigation is flat over the last
third of the probes (`transitions.is_flat`). In logarithms, because errors fall by factors: the fall
from an untrained model would hide all others.

**Memorization begins**, for `memorization_onset`, when in some bin of t the conditional error on
held-out samples is above that on training samples by more than a share of the latter, and by more
than at the first probe, with four standard errors.

**The gap opens**, for `GapWatch`, when held-out error rises while training error falls. With e(s)
the error of one noisy sample at step s, and r the step of the lowest held-out error in a bin of t,

    e_held-out(s) - e_held-out(r) > 0    and    e_train(s) - e_train(r) < 0,

each on average over the samples of the bin, by several standard errors, at several probes in a row.
The noisy samples are the same at all probes, so both are differences of pairs. Held-out rows that
are harder than training rows are so at all steps, and do not open the gap. Late t show it first:
beyond the collapsed boundary the target of training is a row.

**The law.** The step of the onset grows like the number of rows N, while the step at which a model
generalises does not depend on N (Bonnaire et al., arXiv 2505.17638): tau = c N for the same model,
batch size and learning rate. `OnsetLaw` fits c, and from several N also the power.

A history is a list of probes, ascending by step, as `VelocityErrorMonitor` reports them: dicts of
plain numbers, and of lists over the bins of t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.transitions import is_flat
from stagewise.velocity_probe import standard_scores

__all__ = ["GapWatch", "OnsetLaw", "memorization_onset", "navigation_learned"]

_SCORE = 3.5
"""Standard errors by which held-out error must have risen, and training error fallen."""

_RISE = 0.01
"""Least rise of the held-out error, as a share of what it was at its lowest."""

_PATIENCE = 2
"""Probes in a row."""

Probe = Mapping[str, Any]


def navigation_learned(
    history: Sequence[Probe], *, window: int, patience: int, tolerance: float
) -> dict[str, Any] | None:
    """The evidence that the oracle error in navigation has reached its plateau, or None.

    `window` and `tolerance` are those of `is_flat`, at `patience` probes in a row.
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
    """The evidence that held-out error has risen above training error, or None.

    By `gap` times the latter, at `patience` probes in a row; `edges`, (T + 1,), are of the bins.
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
            f"for t in [{low:.3f}, {high:.3f}] held-out error is above training error: up to "
            f"{held_out:.4g} against {train:.4g}"
        ),
    }


def _relative_gap(probe: Probe) -> Tensor:
    """Held-out error above training error, as a share of the latter, by bins."""
    return torch.tensor(probe["gap"]) / torch.tensor(probe["train"]["conditional"])


class GapWatch:
    """Compares each probe with the one at which held-out error was lowest, bin by bin."""

    def __init__(self) -> None:
        self.lowest: tuple[Tensor, Tensor] | None = None  # errors there, training and held-out
        self.steps = torch.empty(0, dtype=torch.int64)  # of that probe, by bin
        self.open = self.steps  # probes in a row at which the gap was open, by bin

    def update(
        self, step: int, train: Tensor, held_out: Tensor, edges: Tensor
    ) -> dict[str, Any] | None:
        """Takes the errors of a probe by bin of t, (T, Q) and (T, R); None while the gap is closed.

        Returns:
            The evidence: `t_from` and `t_to`, where the gap is open; for the bin with the largest
            `z` (rise in standard errors) `since`, the step of the lowest held-out error, and `rise`
            and `fall` of held-out and training error since then, as shares; and a `message`.
        """
        if self.lowest is None:
            self.lowest = train.clone(), held_out.clone()
            self.steps = torch.full((len(train),), step)
            self.open = torch.zeros_like(self.steps)
            return None
        before, before_others = self.lowest
        down, up = train - before, held_out - before_others
        rise = up.mean(1) / before_others.mean(1)
        fall = -down.mean(1) / before.mean(1)
        z = _scores(up)
        apart = (z > _SCORE) & (_scores(down) < -_SCORE) & (rise > _RISE)
        self.open, since = torch.where(apart, self.open + 1, 0), self.steps
        # A value that is not finite is never the lowest.
        lower = ~(up.mean(1) >= 0) & held_out.mean(1).isfinite()
        kept = lower[:, None]
        self.lowest = torch.where(kept, train, before), torch.where(kept, held_out, before_others)
        self.steps = torch.where(lower, step, self.steps)
        wide = self.open >= _PATIENCE
        if not bool(wide.any()):
            return None
        at, worst = wide.nonzero().flatten(), int(torch.where(wide, z, -torch.inf).argmax())
        evidence: dict[str, Any] = {
            "t_from": float(edges[at[0]]),
            "t_to": float(edges[at[-1] + 1]),
            "since": int(since[worst]),
            "rise": float(rise[worst]),
            "fall": float(fall[worst]),
            "z": float(z[worst]),
        }
        message = (
            "for t in [{t_from:.2f}, {t_to:.2f}] held-out error has risen by {rise:.1%} since step "
            "{since} ({z:.1f} standard errors), while training error has fallen by {fall:.1%}"
        )
        return evidence | {"message": message.format(**evidence)}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, tensors."""
        if self.lowest is None:
            return {}
        train, held_out = self.lowest
        return {"train": train, "held_out": held_out, "steps": self.steps, "open": self.open}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        if state:
            self.lowest = state["train"], state["held_out"]
            self.steps, self.open = state["steps"], state["open"]


def _scores(difference: Tensor) -> Tensor:
    """Mean over standard error by bin, as normal deviates (`standard_scores`)."""
    count = difference.shape[1]
    error = difference.std(1) / math.sqrt(count)
    return standard_scores(difference.mean(1), error, torch.full((len(difference),), count))


class OnsetLaw:
    """The step tau at which memorization begins, from runs on fewer rows: tau = c N^p.

    With one run p = 1, as published; with several both are fitted by least squares in logarithms.

    Args:
        onsets: From the number of rows N of a run to the step of its onset, above 0; at least one.

    Example:
        >>> from stagewise.learning_events import OnsetLaw
        >>> law = OnsetLaw({64: 400, 128: 900})
        >>> law, round(law(256))
        (3.08 N^1.17, 2025)
    """

    def __init__(self, onsets: Mapping[int, float]) -> None:
        pairs = [*onsets.items()] if isinstance(onsets, Mapping) else []
        numbers = all(isinstance(number, int | float) for pair in pairs for number in pair)
        if not pairs or not numbers or not all(n > 0 and 0 < tau < math.inf for n, tau in pairs):
            raise ValueError(
                f"Expected `onsets` with the step of the onset by the number of rows, got "
                f"{onsets!r}. Take them from runs on subsets: onsets={{64: 400, 128: 900}}."
            )
        rows, steps = np.log(np.asarray(pairs, dtype=np.float64)).T
        off = rows - rows.mean()
        self.power = float(off @ steps / (off @ off)) if len(pairs) > 1 else 1.0
        self.scale = math.exp(steps.mean() - self.power * rows.mean())

    def __call__(self, rows: int) -> float:
        """The step of the onset with this number of rows."""
        return self.scale * rows**self.power

    def __repr__(self) -> str:
        power = f"{self.power:.3g}"
        return f"{self.scale:.3g} N" + ("" if power == "1" else f"^{power}")
