"""`StageTransitions`: says once, with its evidence, when a run goes from one stage to the next."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from stagewise.batches import FindSample, find_sample
from stagewise.callbacks.checks import together
from stagewise.callbacks.named import NamedCallback
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.training_bank import read_rows
from stagewise.callbacks.velocity_monitor import VelocityErrorMonitor
from stagewise.callbacks.writer import Writer
from stagewise.transitions import is_flat

__all__ = ["BOUNDARY_MOVED", "MEMORIZATION_ONSET", "NAVIGATION_LEARNED", "StageTransitions"]

NAVIGATION_LEARNED = "navigation learned"
MEMORIZATION_ONSET = "memorization onset"
BOUNDARY_MOVED = "boundary moved"

_READ_AGAIN = 32
"""Samples that are read again to see whether latents have changed."""


class StageTransitions(NamedCallback):
    """Notices what happens once in a run, from the probes of the monitors before it.

    - **navigation learned**: the logarithm of the oracle error in navigation is flat over the last
      third of the probes (`transitions.is_flat`), `patience` probes in a row. In logarithms,
      because errors fall by factors: the fall from an untrained model would hide all others. The
      queries of a `VelocityErrorMonitor` are the same at every probe, so its curve is smooth.
    - **memorization onset**: in some bin of t the conditional error on held-out samples is above
      that on training samples by more than `gap` of the latter, and by more than it was at the
      first probe, with four standard errors, `patience` probes in a row. Error by t shows it before
      samples do; `MemorizationMonitor` looks at samples.
    - **boundary moved**: samples of the training set, read again at each probe, are not what they
      were: latents or encoder have changed. The monitors read them anew, and the boundary is
      measured; it is said if the midpoint has left the interval that was last reported.

    Each is said once (the last: each time), with step and evidence: in the log, as text to
    TensorBoard, as the scalar `stagewise_transitions/<kind>` with the value 1 at its step, and as a
    line of `stages.jsonl` in `dirpath`. A scheme with a phase `AtEvent("navigation learned")`, in a
    `StageScheme` of the same trainer, goes on to its next phase (one that waits for what cannot be
    said in this run is refused); `subscribers` are called.

    It stands after the monitors in the list of callbacks, and needs one of them at least.

    Args:
        window: Probes that a line is fitted through at the least, default 4: nothing is said before
            `2 * window` probes.
        patience: Probes in a row, default 2.
        tolerance: What is flat, as a share of what has been gained, in logarithms; default 0.05.
        gap: Share of the training error by which the held-out error is above it at onset, default
            0.5.
        find: From a batch to `(x_1, labels or None)`. If training encodes within its step, encode
            here too, to have a changed encoder seen.
        subscribers: Called with each event, a dict; on every rank.
        dirpath: Where `stages.jsonl` goes; default `<trainer.log_dir>/<name>`, or without a logger
            `<trainer.default_root_dir>/<name>_logs`.
        name: Prefix of tags and name of the folder, default "stagewise_transitions".
        seed: Of the samples that are read again, default 0.

    Raises:
        ValueError: At construction for numbers out of range; at the start of training if no monitor
            stands before it.
    """

    def __init__(
        self,
        *,
        window: int = 4,
        patience: int = 2,
        tolerance: float = 0.05,
        gap: float = 0.5,
        find: FindSample = find_sample,
        subscribers: Sequence[Callable[[dict[str, Any]], None]] = (),
        dirpath: str | Path | None = None,
        name: str = "stagewise_transitions",
        seed: int = 0,
    ) -> None:
        for key, value, least in (("window", window, 4), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"Expected `{key}` of at least {least}, got {value}.")
        if not 0 <= tolerance < 1:
            raise ValueError(f"Expected `tolerance` in [0, 1), got {tolerance}.")
        if gap <= 0:
            raise ValueError(f"Expected `gap` above 0, got {gap}.")
        self.window, self.patience, self.tolerance, self.gap = window, patience, tolerance, gap
        self.find, self.subscribers = find, tuple(subscribers)
        self.dirpath, self.name, self.seed = dirpath, name, seed
        self.events: list[dict[str, Any]] = []
        self._stash: list[dict[str, Any]] = []

    @property
    def event_kinds(self) -> dict[str, str]:
        """What may be said in the training that has started, and what each lacks, if anything."""
        errors = self._errors
        needs = {NAVIGATION_LEARNED: 2 * self.window + self.patience - 1}
        needs[MEMORIZATION_ONSET] = self.patience + 1
        lacks = dict.fromkeys(needs, "a VelocityErrorMonitor before StageTransitions")
        if errors is not None:
            # Within the last step no phase could follow.
            probes = 1 + (self._total - 1) // errors.every_n_steps
            for kind, least in needs.items():
                few = f"{least} probes before the end: VelocityErrorMonitor(every_n_steps=...)"
                lacks[kind] = few if probes < least else ""
            if errors._others is None:
                lacks[MEMORIZATION_ONSET] = "held-out samples: VelocityErrorMonitor(held_out=...)"
        again = "a PosteriorMonitor before StageTransitions, and data that can be read again"
        return {**lacks, BOUNDARY_MOVED: again if self._rows is None else ""}

    def state_dict(self) -> dict[str, Any]:
        """The events so far; what leads to them is in the monitors' state."""
        return {"events": self.events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the events of a checkpoint for the start of training."""
        self._stash = list(state_dict["events"])

    # -- hooks --------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the monitors, and opens the file."""
        callbacks = getattr(trainer, "callbacks", [self])
        before = callbacks[: callbacks.index(self)]
        self._errors = _first(before, VelocityErrorMonitor)
        self._posterior = _first(before, PosteriorMonitor)
        if self._errors is None and self._posterior is None:
            raise ValueError(
                "StageTransitions reads what monitors measure, and none stands before it. "
                "Callbacks: [PosteriorMonitor(), VelocityErrorMonitor(), StageTransitions()]."
            )
        self.events = [event for event in self._stash if event["step"] <= trainer.global_step]
        self._stash = []
        self._writer = Writer(trainer, self.name, self.dirpath)
        self._writer.start(self.events, resumed=bool(self.events))
        self._writer.dashboard(trainer)
        self._probed = _last_step(self._errors), _last_step(self._posterior)
        self._total = trainer.estimated_stepping_batches
        self._rows: Tensor | None = None
        if self._posterior is not None:
            self._remember(trainer, pl_module)
        without = []
        if self._errors is None:
            without.append("navigation and memorization (VelocityErrorMonitor)")
        if self._rows is None:
            without.append("a moved boundary (PosteriorMonitor, data that can be read again)")
        if without:
            rank_zero_info(f"StageTransitions: nothing will be said of {' and '.join(without)}")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After a probe: looks for what has happened."""
        probed = _last_step(self._errors), _last_step(self._posterior)
        if probed == self._probed:
            return
        self._probed = probed
        step = trainer.global_step
        history = [] if self._errors is None else self._errors.history
        said = {event["kind"] for event in self.events}
        if NAVIGATION_LEARNED not in said:
            self._say(trainer, step, NAVIGATION_LEARNED, self.navigation_learned(history))
        if MEMORIZATION_ONSET not in said:
            self._say(trainer, step, MEMORIZATION_ONSET, self.memorization_onset(history))
        self._say(trainer, step, BOUNDARY_MOVED, self._moved(trainer, pl_module))

    def layout(self) -> dict[str, list[Any]]:
        """Its chart on TensorBoard's custom-scalars page."""
        return {"transitions (1 at their step)": ["Multiline", [f"^{re.escape(self.name)}/"]]}

    # -- decisions ----------------------------------------------------------------------------

    def navigation_learned(self, history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The evidence that the oracle error in navigation has reached its plateau, or None.

        Args:
            history: The probes of a `VelocityErrorMonitor`.
        """
        navigation = [entry["stages"]["train"]["navigation"] for entry in history]
        points = [stage["oracle"] for stage in navigation]
        if len(points) < 2 * self.window or not all(map(math.isfinite, points)):
            return None
        logs = [math.log(max(point, 1e-30)) for point in points]
        ends = [logs[: len(logs) - back] for back in range(self.patience)]
        if not all(is_flat(end, self.window, self.tolerance) for end in ends):
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

    def memorization_onset(self, history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The evidence that the gap of training and held-out error has opened, or None.

        Args:
            history: The probes of a `VelocityErrorMonitor`.
        """
        if len(history) < self.patience + 1 or history[-1]["gap"] is None:
            return None
        first = _relative_gap(history[0])
        open_in = torch.ones(len(first), dtype=torch.bool)
        for entry in history[-self.patience :]:
            relative = _relative_gap(entry)
            gap, error = torch.tensor(entry["gap"]), torch.tensor(entry["gap_se"])
            grown = torch.minimum(relative, relative - first.nan_to_num())
            open_in &= (grown > self.gap) & (gap > 4 * error)
        if not bool(open_in.any()):
            return None
        edges = self._errors.edges.tolist()
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

    # -- a moved boundary ---------------------------------------------------------------------

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes what samples of the training set are, and how much they are that at all."""
        read: list[Tensor] = []
        with suppress(ValueError):  # the monitor has said what cannot be read
            read = [self._read(trainer, pl_module) for _ in range(2)]
        if trainer.strategy.reduce_boolean_decision(bool(read)):
            self._rows, self._noise = read[0], _difference(*read)

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        loader = trainer.train_dataloader
        return read_rows(trainer, pl_module, loader, _READ_AGAIN, find=self.find, seed=self.seed)[
            0
        ].float()

    def _moved(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any] | None:
        """Reads samples again; if they have changed, has the boundary measured anew."""
        monitor = self._posterior
        if self._rows is None or monitor is None or monitor.boundary is None:
            return None
        with together(trainer, "reading training samples again for StageTransitions"):
            rows = self._read(trainer, pl_module)
        alike = rows.shape == self._rows.shape
        off = _difference(self._rows, rows) if alike else math.inf
        # Augmentation changes them each time: that is not what is looked for.
        unchanged = off < 0.05 + 1.5 * self._noise
        if trainer.strategy.reduce_boolean_decision(unchanged):
            return None
        before = monitor.boundary
        monitor.renew(trainer, pl_module)
        if self._errors is not None:
            self._errors.renew(trainer, pl_module)
        self._rows, self._probed = rows, (self._probed[0], _last_step(monitor))
        after = monitor.boundary
        if before.midpoint_low <= after.midpoint <= before.midpoint_high:
            return None
        return {
            "before": before.as_dict(),
            "after": after.as_dict(),
            "moved": after.midpoint - before.midpoint,
            "latents_changed": off,
            "message": (
                f"the training latents have changed by {off:.0%} of their norm, and the boundary "
                f"from t = {before.midpoint:.3f} to {after.midpoint:.3f}"
            ),
        }

    # -- saying it ----------------------------------------------------------------------------

    def _say(
        self, trainer: pl.Trainer, step: int, kind: str, evidence: dict[str, Any] | None
    ) -> None:
        if evidence is None:
            return
        message = evidence.pop("message")
        event = {
            "event": "transition",
            "kind": kind,
            "step": step,
            "message": message,
            "evidence": evidence,
        }
        self.events.append(event)
        self._writer.event(event)
        self._writer.scalars({f"{self.name}/{kind.replace(' ', '_')}": 1.0}, step - 1)
        self._writer.text(f"{self.name}/{kind}", f"step {step}: {message}", step - 1)
        rank_zero_info(f"StageTransitions: step {step}, {kind}: {message}")
        for callback in getattr(trainer, "callbacks", []):
            notify = getattr(getattr(callback, "scheme", None), "notify", None)
            if notify is not None:
                notify(kind)
        for subscriber in self.subscribers:
            subscriber(event)


def _first(callbacks: Sequence[pl.Callback], kind: type[Any]) -> Any:
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _last_step(monitor: Any) -> int | None:
    return monitor.history[-1]["step"] if monitor is not None and monitor.history else None


def _relative_gap(entry: dict[str, Any]) -> Tensor:
    """Held-out error above training error, as a share of the latter, by bins."""
    return torch.tensor(entry["gap"]) / torch.tensor(entry["train"]["conditional"])


def _difference(one: Tensor, other: Tensor) -> float:
    """The median distance of samples, as a share of their median norm."""
    gap = (one - other).flatten(1).norm(dim=1).median()
    return float(gap / one.flatten(1).norm(dim=1).median().clamp_min(1e-30))
