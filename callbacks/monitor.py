"""`Monitor`: what all callbacks share that probe now and then."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from typing_extensions import Unpack, override

from stagewise.bank import LatentBank
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.oracle import Oracle
from stagewise.paths import same_path

__all__ = ["Monitor", "MonitorOptions"]


class MonitorOptions(RunOptions, total=False):
    """What every monitor takes beside what it may say about the run.

    Attributes:
        every_n_steps: Optimizer steps between probes; default a twentieth of the training, at most
            1000.
        figures: Draw at every so many probes; default at the first, second, fourth, eighth, ...,
            and at the last; 0: never.
    """

    every_n_steps: int | None
    figures: int | None


class Monitor(StageCallback):
    """Says when to probe, keeps what was found, writes it, and takes it up when a run resumes.

    A probe is due at the first step, whenever a multiple of `every_n_steps` is reached, and at the
    end of training. That last one is left out of the history when the run goes on later, so that
    a run that was stopped and resumed has the history of one that was not.

    Args:
        name: See `StageCallback`, like `bank`.
        bank: The training latents.
        **options: See `MonitorOptions`.

    Attributes:
        every: Steps between probes, once training has begun.
        history: The probes so far.
        seconds: What each probe of this process has cost.
        probes: Probes in a run whose interval nobody gives, and `longest`, the largest interval
            then.
        event: What its lines in `stages.jsonl` are called.
        oracle: Bank and path, within a run; None outside.

    Raises:
        ValueError: For numbers out of range.
    """

    late = measures = True
    held = (*StageCallback.held, "oracle")
    probes: ClassVar[int] = 20
    longest: ClassVar[int] = 1000
    event: ClassVar[str]
    oracle: Oracle = None  # type: ignore[assignment]
    corrected = False
    """Whether a later step than the first has shown what the network is given."""

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
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """The probes so far, as plain numbers; never the bank."""
        return {**super().state_dict(), "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the probes of a checkpoint."""
        super().load_state_dict(state_dict)
        self.history = list(state_dict["history"])

    # -- what each monitor says for itself --------------------------------------------------------

    def measure(self, step: int) -> dict[str, Any]:
        """Probes: a collective. Returns an event, without `event` and `step`."""
        raise NotImplementedError

    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        """What of an event is logged, under its full tags."""
        raise NotImplementedError

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        """Pictures by their names, of all probes; asked of rank zero only."""
        return {}

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes the bank; keeps what a resumed run has found with the same."""
        run = self.run
        condition = run.option(self, "condition")
        if condition is not None and not self.data_only:
            name = type(self).__name__
            raise ValueError(
                f"{name} asks the model about other samples without their conditions, so it does "
                f"not go with {condition!r}. Leave out {name}: what is measured over rows weighed "
                "by a kernel are the data, PosteriorMonitor(condition=...)."
            )
        run.bank(self)
        path, _ = run.path_of(self)
        if run.path_from and not same_path(path, run.path):
            self.warn(
                f"goes by path={path!r}, but the module trains on {run.path!r} ({run.path_from}). "
                "Leave `path` out to watch the training."
            )
        self.history = self._still(self.history)
        share = (run.total or self.probes * self.longest) // self.probes
        self.every = self.every_n_steps or max(1, min(self.longest, share))
        self.writer = run.open_writer(self)
        self._since, self.seconds = (time.perf_counter(), run.began), []

    @override
    def restart(self) -> None:
        self.corrected = True
        self.start()

    def _still(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that a run that goes on has: a second fit of a callback, or other latents, none."""
        past = 0 if self.renewed else self.run.began
        return [e for e in events if past and e["step"] <= past and not e.get("at_end")]

    def open_files(self, header: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Begins `stages.jsonl` with what is known; a collective."""
        self.writer.start([header, *events], resumed=bool(events) or self.corrected)

    @property
    def last(self) -> int | None:
        """The step of the last probe."""
        return self.history[-1]["step"] if self.history else None

    def due(self, step: int) -> bool:
        """Whether to probe, `step` optimizer steps being done."""
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
        """Probes once more where training ends early."""
        # What is averaged has taken the place of what was trained by now.
        if self.last != self.run.step and not self.run.host.averages:
            self.probe(self.run.step, at_end=True)

    def together(self) -> AbstractContextManager[None]:
        """Probes on every rank, or raises on all of them; see `Host.together`."""
        return self.run.host.together(f"a probe of {type(self).__name__}")

    def probe(self, step: int, *, at_end: bool = False) -> None:
        """Probes, draws and writes; a collective."""
        run, device = self.run, self.run.host.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that queued training work is not counted as ours
        start = time.perf_counter()
        last_time, last_step = self._since
        entry = {"event": self.event, "step": step, **self.measure(step), **self.over}
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
        self.history.append(entry)
        self._since = (time.perf_counter(), step)

    def _draws(self, at_end: bool) -> bool:
        number = len(self.history) + 1
        if self.figures is None:
            last = self.run.total is not None and self.run.step >= self.run.total
            return at_end or last or number & (number - 1) == 0
        return bool(self.figures) and (at_end or (number - 1) % self.figures == 0)

    def logged_at(self, step: int) -> int:
        """The step of the training's own logs: that of the batch which was just trained on."""
        return max(0, step - 1)

    def summary(self) -> str:
        """How often it has probed, what the last probe cost, and where that is written."""
        cost = f"{self.seconds[-1]:.1f} s" if self.seconds else "nothing"
        over = "".join(f", over {said}" for said in self.over.values())
        return f"{len(self.history)} probes{over}, the last cost {cost}; {self.writer.describe()}"

    @property
    def over(self) -> dict[str, str]:
        """What each event says of the rows of its posterior; see `Oracle.over`."""
        return {} if self.oracle is None else self.oracle.over
