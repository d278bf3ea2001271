"""`StageTransitions`: reports events of a run, once and with evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.callbacks.velocity_monitor import VelocityErrorMonitor
from stagewise.learning_events import memorization_onset, navigation_learned
from stagewise.transitions import AtEvent

__all__ = [
    "BOUNDARY_MOVED",
    "MEMORIZATION_ONSET",
    "NAVIGATION_LEARNED",
    "StageTransitions",
    "refuse_unheard",
]

NAVIGATION_LEARNED = "navigation learned"
MEMORIZATION_ONSET = "memorization onset"
BOUNDARY_MOVED = "boundary moved"

_READ_AGAIN = 32
"""Samples that are read again to find whether latents have changed."""


class StageTransitions(StageCallback):
    """Reports when navigation is learned, memorization begins, or the boundary has moved.

    - **navigation learned**: the logarithm of the oracle error in navigation is flat over the last
      third of the probes, `patience` probes in a row (`stagewise.learning_events`).
    - **memorization onset**: in some bin of t the conditional error on held-out samples is above
      that on training samples by more than `gap` of the latter, and by more than at the first
      probe, with four standard errors, `patience` probes in a row. `MemorizationMonitor` finds it
      later, in samples.
    - **boundary moved**: samples of the training set, read again at each probe, have changed, and
      so have latents or encoder. The monitors read them again and measure the boundary; it is
      reported if the midpoint has left the interval that was last reported.

    Each event is reported once ("boundary moved" each time), with step and evidence: in the log, as
    text to TensorBoard, as the scalar `stagewise_transitions/<kind>` with the value 1 at its step,
    and as a line of `stages.jsonl` in `dirpath`, whose first line lists the events that can be
    reported in this run. A `StageScheme` of the same trainer with a phase `AtEvent("navigation
    learned")` goes on to its next phase; one that waits for an event that cannot be reported is
    refused.

    It needs a `PosteriorMonitor` or a `VelocityErrorMonitor` in the same trainer.

    Args:
        window: The fewest probes that a line is fitted through, default 4: nothing is reported
            before `2 * window` probes.
        patience: Probes in a row, default 2.
        tolerance: The change that counts as flat, as a share of the gain so far, in logarithms;
            default 0.05.
        gap: Share of the training error by which the held-out error is above it at onset, default
            0.5.
        subscribers: Called with each event, a dict; on every rank.
        name: Prefix of tags and name of the folder, default "stagewise_transitions".
        **options: See `RunOptions`. If the training step encodes, `read_batch` should encode too,
            so that a change of the encoder is found.

    Raises:
        ValueError: At construction for numbers out of range; at the start of training if there is
            no monitor.

    Example:
        >>> from stagewise.callbacks import StageTransitions, VelocityErrorMonitor
        >>> callbacks = [VelocityErrorMonitor(), StageTransitions(subscribers=[print])]
    """

    order = 4
    charts = {"events (1 at their step)": "/"}

    def __init__(
        self,
        *,
        window: int = 4,
        patience: int = 2,
        tolerance: float = 0.05,
        gap: float = 0.5,
        subscribers: Sequence[Callable[[dict[str, Any]], None]] = (),
        name: str = "stagewise_transitions",
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(name, **options)
        for key, value, least in (("window", window, 4), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"Expected `{key}` of at least {least}, got {value}.")
        if not 0 <= tolerance < 1:
            raise ValueError(f"Expected `tolerance` in [0, 1), got {tolerance}.")
        if gap <= 0:
            raise ValueError(f"Expected `gap` above 0, got {gap}.")
        self.window, self.patience, self.tolerance, self.gap = window, patience, tolerance, gap
        self.subscribers = tuple(subscribers)
        self.events: list[dict[str, Any]] = []

    @property
    def event_kinds(self) -> dict[str, str]:
        """The events that can be reported, and what each lacks in this run, if anything."""
        errors = self._errors
        needs = {NAVIGATION_LEARNED: 2 * self.window + self.patience - 1}
        needs[MEMORIZATION_ONSET] = self.patience + 1
        lacks = dict.fromkeys(needs, "a VelocityErrorMonitor")
        if errors is not None:
            # No phase could follow an event of the last step.
            total = math.inf if self.run.total is None else self.run.total
            probes = 1 + (total - 1) // errors.every
            for kind, least in needs.items():
                lacks[kind] = ""
                if probes < least:
                    every = max(1, (total - 1) // (least - 1))
                    call = f"VelocityErrorMonitor(every_n_steps={every})"
                    lacks[kind] = f"{least} probes before the end: {call}"
            if errors._others is None:
                lacks[MEMORIZATION_ONSET] = "held-out samples: VelocityErrorMonitor(held_out=...)"
        again = "a PosteriorMonitor, and data that can be read again"
        return {**lacks, BOUNDARY_MOVED: again if self._rows is None else ""}

    def state_dict(self) -> dict[str, Any]:
        """The events so far."""
        return {**super().state_dict(), "events": self.events}

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Finds the monitors, and opens the file."""
        run = self.run
        self._errors = run.first(VelocityErrorMonitor)
        self._posterior = run.first(PosteriorMonitor)
        self._monitors = [one for one in (self._errors, self._posterior) if one is not None]
        if not self._monitors:
            raise ValueError(
                "StageTransitions reads what monitors measure, and there is none. Add them: "
                "[PosteriorMonitor(), VelocityErrorMonitor(), StageTransitions()]."
            )
        # Events of other latents are dropped.
        self.renewed = any(monitor.renewed for monitor in self._monitors)
        before = [] if self.renewed else (self.stash or {}).get("events", [])
        self.events = [event for event in before if event["step"] <= run.began]
        self.writer = run.open_writer(self)
        self._probed = self._steps_probed()
        self._rows: Tensor | None = None
        if self._posterior is not None:
            self._remember()
        # A run may have been resumed before its first event.
        resumed = not self.renewed and self.stash is not None and run.began > 0
        # It tells a run without events from one that was not watched.
        header = {"event": "transitions", "kinds": self.event_kinds}
        self.writer.start([header, *self.events], resumed=resumed or run.restarted)
        cannot = [f"{kind} (lacks {lacks})" for kind, lacks in self.event_kinds.items() if lacks]
        if cannot:
            self.say(f"cannot report {'; '.join(cannot)}")

    def _steps_probed(self) -> list[int | None]:
        return [monitor.last for monitor in self._monitors]

    def after_batch(self, step: int, before: int) -> None:
        """After a probe: looks for events."""
        probed = self._steps_probed()
        if probed == self._probed:
            return
        self._probed = probed
        if self._errors is not None:
            self._read_errors(step, self._errors)
        self._tell(step, BOUNDARY_MOVED, self._moved())

    def _read_errors(self, step: int, errors: VelocityErrorMonitor) -> None:
        said = {event["kind"] for event in self.events}
        probes, patience = errors.history, self.patience
        if NAVIGATION_LEARNED not in said:
            learned = navigation_learned(
                probes, window=self.window, patience=patience, tolerance=self.tolerance
            )
            self._tell(step, NAVIGATION_LEARNED, learned)
        if MEMORIZATION_ONSET not in said:
            edges = errors.edges.tolist()
            onset = memorization_onset(probes, edges, patience=patience, gap=self.gap)
            self._tell(step, MEMORIZATION_ONSET, onset)

    # -- a moved boundary ---------------------------------------------------------------------

    def _remember(self) -> None:
        """Reads samples twice, to know them and how much augmentation changes them."""
        read: list[Tensor] = []
        with suppress(ValueError):  # the monitor has reported it
            read = [self._read() for _ in range(2)]
        if self.run.host.all(bool(read)):
            self._rows, self._noise = read[0], _difference(*read)

    def _read(self) -> Tensor:
        return self.run.read(self, self.run.host.loader, _READ_AGAIN)[0].float()

    def _moved(self) -> dict[str, Any] | None:
        """Reads samples again; if they have changed, has the boundary measured again."""
        monitor = self._posterior
        if self._rows is None or monitor is None or monitor.boundary is None:
            return None
        with self.run.host.together("reading training samples again for StageTransitions"):
            rows = self._read()
        alike = rows.shape == self._rows.shape
        off = _difference(self._rows, rows) if alike else math.inf
        # Augmentation changes them each time, too.
        unchanged = off < 0.05 + 1.5 * self._noise
        if self.run.host.all(unchanged):
            return None
        before = monitor.boundary
        self.run.read_again()
        self._rows, self._probed = rows, self._steps_probed()
        after = monitor.boundary
        if before.midpoint_low <= after.midpoint <= before.midpoint_high:
            return None
        return {
            "before": before.as_dict(),
            "after": after.as_dict(),
            "moved": after.midpoint - before.midpoint,
            "latents_changed": off,
            "message": f"the training latents have changed by {off:.0%} of their norm, and the "
            f"boundary from t = {before.midpoint:.3f} to {after.midpoint:.3f}",
        }

    # -- reports ------------------------------------------------------------------------------

    def _tell(self, step: int, kind: str, evidence: dict[str, Any] | None) -> None:
        if evidence is None:
            return
        message = evidence.pop("message")
        event = self.writer.announce(step, kind, message, evidence)
        self.events.append(event)
        self.say(f"step {step}, {kind}: {message}")
        self.run.tell("notice", kind)
        for subscriber in self.subscribers:
            subscriber(event)


def _difference(one: Tensor, other: Tensor) -> float:
    """The median distance of samples, as a share of their median norm."""
    gap = (one - other).flatten(1).norm(dim=1).median()
    return float(gap / one.flatten(1).norm(dim=1).median().clamp_min(1e-30))


def refuse_unheard(speakers: Sequence[Any], awaited: Sequence[AtEvent]) -> None:
    """Refuses a phase that waits for an event that no speaker can report.

    Speakers, callbacks and the module, name their events in an attribute `event_kinds`: a dict from
    the event to what it lacks in this run, "" if nothing. It is known once they have started.
    """
    known: dict[str, str] = {}
    for speaker in speakers:
        # It is enough if one of several can report it.
        said = getattr(speaker, "event_kinds", {})
        known |= {kind: lacks for kind, lacks in said.items() if known.get(kind) != ""}
    listed = [f"{kind!r}{lacks and f' (lacks {lacks})'}" for kind, lacks in known.items()]
    for until in awaited:
        if known.get(until.event) != "":
            raise ValueError(
                f"A phase ends at {until!r}, and no callback reports that event. "
                + (f"Known are {', '.join(listed)}. " if known else "")
                + "Add a callback that does: [PosteriorMonitor(), "
                "VelocityErrorMonitor(), StageTransitions(), StageScheme()]; one of your "
                "own names it in `event_kinds`, {event: ''}."
            )
