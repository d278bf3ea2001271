r"""When a phase ends: at a step, at a share of training, at an event, or at a plateau.

**The plateau.** The losses of samples in navigation are averaged over `every` steps, one point
each. A line through the last third of the points gives their gain,

    gain = -slope * length,   with the standard error of the fit,

which is compared with the gain since the beginning, `drop` (not with the loss itself, which has a
floor). A point is flat if `gain` is not above `tolerance * drop` by more than two standard errors;
`patience` flat points in a row are a plateau. The window is a third of the points, because losses
fall like powers of the step and any fixed window becomes flat. So a plateau is found when it has
lasted about half as long as the fall before.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["AtEvent", "AtPlateau", "AtShare", "AtStep", "Until", "is_flat"]


class Until(ABC):
    """What ends a phase."""

    @abstractmethod
    def observe(
        self,
        step: int,
        total: int | None,
        t: Tensor | None,
        loss: Tensor | None,
        boundary: float | None,
        /,
    ) -> str | None:
        """Takes a step; the reason if the phase ends with it, otherwise None."""

    @abstractmethod
    def check(self, start: int, total: float | None) -> int:
        """The first step at which a phase may end that begins at step `start` or later.

        `total` is the number of steps of the training, infinite if it has no end, None if unknown.
        Raises a ValueError with the cure if the phase can never end.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain numbers and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what `state_dict` returned."""


class AtStep(Until):
    """Ends a phase after `step` optimizer steps.

    Args:
        step: At least 1.
    """

    def __init__(self, step: int) -> None:
        if step < 1:
            raise ValueError(f"Expected `step` of at least 1, got {step}.")
        self.step = step

    @override
    def observe(self, step: int, *_: Any) -> str | None:
        return f"step {self.step}" if step >= self.step else None

    @override
    def check(self, start: int, total: float | None) -> int:
        if self.step <= start:
            raise ValueError(
                f"Expected a phase to end after it begins, got AtStep({self.step}) for one that "
                f"begins at step {start} at the earliest."
            )
        if total is not None and self.step >= total:
            raise ValueError(
                f"Expected a phase to end within the {total} steps of training, got "
                f"AtStep({self.step}). Train longer, or use AtShare(share)."
            )
        return self.step

    def __repr__(self) -> str:
        return f"AtStep({self.step})"


class AtShare(Until):
    """Ends a phase after a share of all optimizer steps.

    Args:
        share: Between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share < 1:
            raise ValueError(f"Expected `share` between 0 and 1, got {share}.")
        self.share = share

    @override
    def observe(self, step: int, total: int | None, *_: Any) -> str | None:
        if total is None:
            raise ValueError(
                f"AtShare({self.share}) needs the number of steps of training, which is not known. "
                "Set max_steps or max_epochs, or use AtStep(step)."
            )
        return f"{self.share:.0%} of {total} steps" if step >= self.share * total else None

    @override
    def check(self, start: int, total: float | None) -> int:
        if total is None:
            return start
        if math.isinf(total):
            raise ValueError(
                f"{self!r} is a share of a training that has no end. Set max_steps or max_epochs, "
                "or use AtStep(step)."
            )
        end = math.ceil(self.share * total)
        AtStep(end).check(start, total)
        return end

    def __repr__(self) -> str:
        return f"AtShare({self.share})"


class AtEvent(Until):
    """Ends a phase at an event, such as "navigation learned".

    The callback `StageTransitions` reports events; in your own loop call `Phases.notify(event)`.

    Args:
        event: The name of the event.
    """

    def __init__(self, event: str) -> None:
        if not event:
            raise ValueError("Expected the name of an event, got an empty one.")
        self.event = event
        self.happened = False

    def notify(self, event: str) -> None:
        """Takes an event."""
        self.happened = self.happened or event == self.event

    @override
    def observe(self, *_: Any) -> str | None:
        return self.event if self.happened else None

    @override
    def check(self, start: int, total: float | None) -> int:
        return start + 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"happened": self.happened}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.happened = state["happened"]

    def __repr__(self) -> str:
        return f"AtEvent({self.event!r})"


def is_flat(points: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether the last third of the points is flat; see the module.

    Args:
        points: Mean losses, in order; NaN or infinity raises a ValueError.
        window: Least number of points of the line, at least 4. Fewer than `2 * window` points are
            never flat.
        tolerance: Largest gain that is flat, as a share of the drop so far.
    """
    y = np.asarray(points, dtype=np.float64)
    if not np.isfinite(y).all():
        bad = int(np.flatnonzero(~np.isfinite(y))[0])
        raise ValueError(f"Expected finite losses, got {y[bad]} at point {bad}.")
    if len(y) < 2 * window:
        return False
    length = max(window, len(y) // 3)
    last, x = y[-length:], np.arange(length) - (length - 1) / 2
    slope = x @ last / (x @ x)
    residual = last - last.mean() - slope * x
    error = math.sqrt(residual @ residual / (length - 2) / (x @ x)) * length
    drop = max(0.0, y[:window].mean() - last.mean())
    return bool(-slope * length - 2 * error <= tolerance * drop)


class AtPlateau(Until):
    """Ends a phase when the loss of navigation has stopped falling.

    Args:
        every: Steps per point, default 50.
        window: Least number of points of the fitted line, default 8.
        patience: Flat points in a row that are a plateau, default 3.
        tolerance: Largest gain that is flat, as a share of the drop so far, default 0.02.

    Raises:
        ValueError: For numbers out of range.
    """

    def __init__(
        self, every: int = 50, *, window: int = 8, patience: int = 3, tolerance: float = 0.02
    ) -> None:
        numbers = (("every", every, 1), ("window", window, 4), ("patience", patience, 1))
        for name, value, least in numbers:
            if value < least:
                raise ValueError(f"Expected `{name}` of at least {least}, got {value}.")
        if not 0 <= tolerance < 1:
            raise ValueError(f"Expected `tolerance` in [0, 1), got {tolerance}.")
        self.every, self.window, self.patience = every, window, patience
        self.tolerance = tolerance
        self.points: list[float] = []
        self.flat = 0
        self._begin: int | None = None
        self._sums: Tensor | None = None

    @override
    def observe(
        self,
        step: int,
        total: int | None,
        t: Tensor | None,
        loss: Tensor | None,
        boundary: float | None,
        /,
    ) -> str | None:
        if t is None or loss is None or boundary is None:
            missing = "boundary of the stages" if boundary is None else "losses of the step"
            cure = "observe(step=..., total=..., t=..., loss=...)."
            if boundary is None:
                cure = "set_boundary(...), before the first step."
            raise ValueError(f"AtPlateau needs the {missing}, got none: {cure}")
        if self._begin is None:
            self._begin = step - 1
        inside = t < boundary
        values = loss.detach().double()
        sums = torch.stack([values.where(inside, 0.0).sum(), inside.sum().double()])
        self._sums = sums if self._sums is None else sums + self._sums.to(sums.device)
        if step - self._begin < self.every:
            return None
        added, count = self._sums.tolist()
        begin, self._begin, self._sums = self._begin, step, None
        if not count:
            return None
        if not math.isfinite(added):
            raise ValueError(
                f"Expected finite losses, got {added} in navigation between steps {begin} and "
                f"{step}: training has diverged."
            )
        self.points.append(added / count)
        flat = is_flat(self.points, self.window, self.tolerance)
        self.flat = self.flat + 1 if flat else 0
        if self.flat < self.patience:
            return None
        return f"plateau of navigation at {self.points[-1]:.4g}"

    @override
    def check(self, start: int, total: float | None) -> int:
        first = start + self.every * (2 * self.window + self.patience - 1)
        if total is not None and first >= total:
            raise ValueError(
                f"Expected a phase to end within the {total} steps of training, but {self!r} ends "
                f"none before step {first}. Lower `every`, `window` or `patience`."
            )
        return first

    @override
    def state_dict(self) -> dict[str, Any]:
        sums = None if self._sums is None else self._sums.tolist()
        return {"points": list(self.points), "flat": self.flat, "begin": self._begin, "sums": sums}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.flat, self._begin = list(state["points"]), state["flat"], state["begin"]
        sums = state["sums"]
        self._sums = None if sums is None else torch.tensor(sums, dtype=torch.float64)

    def __repr__(self) -> str:
        return (
            f"AtPlateau({self.every}, window={self.window}, patience={self.patience}, "
            f"tolerance={self.tolerance})"
        )
