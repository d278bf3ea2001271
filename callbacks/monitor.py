"""`Monitor`: the base of callbacks that probe at intervals."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from typing_extensions import Unpack, override

from stagewise.bank import LatentBank
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.callbacks.target_maker import trained_on
from stagewise.oracle import Oracle
from stagewise.paths import same_path

__all__ = ["Monitor", "MonitorOptions"]


class MonitorOptions(RunOptions, total=False):
    """Options of every monitor, besides those of the run.

    Attributes:
        every_n_steps: Optimizer steps between probes. Default: a twentieth of the training, at most
            1000.
        figures: Probes between drawings; 0: none are drawn. Default: drawn at the first, second,
            fourth, eighth, ..., and at the last probe.
    """

    every_n_steps: int | None
    figures: int | None


class Monitor(StageCallback):
    """Decides when to probe, keeps and writes the results, and resumes them from a checkpoint.

    A probe is due at the first step, whenever a multiple of `every_n_steps` is reached, and at the
    end of training. The one at the end is dropped when the run goes on later, so that a run that
    was stopped and resumed has the same history as one that was not.

    Attributes:
        every: Steps between probes, once training has begun.
        events: The lines of `stages.jsonl` after its header; `history`: those of the probes.
        seconds: Time that each probe of this process took.
        probes: Probes in a run by default; `longest`: the largest default interval in steps.
        event: Name of its probes in `stages.jsonl`; `kept_as`: of its events in a checkpoint.
        oracle: Bank and path, within a run; None outside.
        corrected: Whether a later step than the first has shown what the network is given.
    """

    late = measures = True
    probes: ClassVar[int] = 20
    longest: ClassVar[int] = 1000
    event: ClassVar[str]
    kept_as: ClassVar[str] = "history"
    oracle: Oracle = None  # type: ignore[assignment]
    corrected = False

    def __init__(
        self,
        name: str,
        bank: LatentBank | None = None,
        *,
        every_n_steps: int | None = None,
        figures: int | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(name, bank, **options)
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        if figures is not None and figures < 0:
            raise ValueError(f"Expected `figures` of at least 0, got {figures}.")
        self.every_n_steps, self.figures = every_n_steps, figures
        self.every = 1
        self.events: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    @property
    def history(self) -> list[dict[str, Any]]:
        """The probes so far."""
        return [entry for entry in self.events if entry["event"] == self.event]

    def state_dict(self) -> dict[str, Any]:
        """The events so far, as plain numbers."""
        return {**super().state_dict(), self.kept_as: self.events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the events of a checkpoint."""
        super().load_state_dict(state_dict)
        self.events = list(state_dict[self.kept_as])

    # -- what each monitor defines ----------------------------------------------------------------

    def measure(self, step: int) -> dict[str, Any]:
        """Makes a probe, as an event without `event` and `step`; a collective."""
        raise NotImplementedError

    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        """What is logged of a probe, by full tag."""
        raise NotImplementedError

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        """Pictures of all probes by name; called on rank zero only."""
        return {}

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes the bank; a resumed run with the same bank keeps its history."""
        run = self.run
        condition = run.option(self, "condition")
        if condition is not None and not self.data_only:
            name = type(self).__name__
            raise ValueError(
                f"{name} asks the model about samples without their conditions, so it cannot use "
                f"{condition!r}. Leave out {name}; PosteriorMonitor(condition=...) needs no model."
            )
        run.bank(self)
        path, _ = run.path_of(self)
        if run.path_from and not same_path(path, run.path):
            self.warn(
                f"measures on path={path!r}, but the module trains on {run.path!r} "
                f"({run.path_from}). Leave `path` out to measure on the path of training."
            )
        past = 0 if self.renewed else run.began  # a second fit, or other latents, keep none
        kept = [e for e in self.events if past and e["step"] <= past and not e.get("at_end")]
        self.events = kept
        share = (run.total or self.probes * self.longest) // self.probes
        self.every = self.every_n_steps or max(1, min(self.longest, share))
        self.writer = run.open_writer(self)
        self._since, self.seconds = (time.perf_counter(), run.began), []

    def open_files(self, header: dict[str, Any]) -> None:
        """Begins `stages.jsonl`; a collective."""
        header = {**header, **trained_on(self.run)}
        again = self.corrected or self.run.restarted
        self.writer.start([header, *self.events], resumed=bool(self.events) or again)

    @property
    def last(self) -> int | None:
        """The step of the last probe."""
        steps = (entry["step"] for entry in reversed(self.events) if entry["event"] == self.event)
        return next(steps, None)

    def due(self, step: int) -> bool:
        """Whether to probe after `step` optimizer steps."""
        # Several optimizers advance it by more than one, and a resumed run may have probed here.
        return self.last is None or step // self.every > self.last // self.every

    @override
    def after_batch(self, step: int, before: int) -> None:
        if step == before:  # with accumulated gradients several batches share a step
            return
        if self.due(step):
            self.probe(step)
        elif (self.run.total is not None and step >= self.run.total) and step != self.last:
            self.probe(step, at_end=True)

    def end(self) -> None:
        """Probes once more if training ends early."""
        # With weight averaging, the model holds averaged weights by now.
        if self.last != self.run.step and not self.run.host.averages:
            self.probe(self.run.step, at_end=True)

    def together(self) -> AbstractContextManager[None]:
        """Raises on every rank if a probe fails on one; see `Host.together`."""
        return self.run.host.together(f"a probe of {type(self).__name__}")

    def probe(self, step: int, *, at_end: bool = False) -> None:
        """Probes, draws and writes; a collective."""
        run, device = self.run, self.run.host.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that queued training work is not counted
        start = time.perf_counter()
        last_time, last_step = self._since
        entry = {"event": self.event, "step": step, **self.measure(step), **self.oracle.over}
        if at_end:
            entry["at_end"] = True
        with self.together():
            if run.host.rank == 0 and self._draws(at_end):
                self.writer.pictures(self._figures([*self.history, entry]), step)
            self.seconds.append(time.perf_counter() - start)
            costs = {f"{self.name}/probe_seconds": self.seconds[-1]}
            if step > last_step:
                costs[f"{self.name}/share_of_step_time"] = self.seconds[-1] / (start - last_time)
            self.writer.scalars({**self.scalars(entry), **costs}, self.logged_at(step))
            self.writer.event(entry)
        self.events.append(entry)
        self._since = (time.perf_counter(), step)

    def _draws(self, at_end: bool) -> bool:
        number = len(self.history) + 1
        if self.figures is None:
            last = self.run.total is not None and self.run.step >= self.run.total
            return at_end or last or number & (number - 1) == 0
        return bool(self.figures) and (at_end or (number - 1) % self.figures == 0)

    def logged_at(self, step: int) -> int:
        """The step to log at: that of the batch which was just trained on, as Lightning has it."""
        return max(0, step - 1)

    def summary(self) -> str:
        """The number of probes, the time of the last one, and where they are written."""
        cost = f"{self.seconds[-1]:.1f} s" if self.seconds else "nothing"
        over = "".join(f", over {said}" for said in self.oracle.over.values())
        return f"{len(self.history)} probes{over}, the last cost {cost}; {self.writer.describe()}"
