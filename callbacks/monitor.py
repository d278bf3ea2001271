"""`Monitor`: what all callbacks share that probe now and then."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.figure import Figure
from typing_extensions import Unpack

from stagewise.bank import LatentBank
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.paths import same_path

__all__ = ["Monitor"]


class Monitor(StageCallback):
    """Says when to probe, keeps what was found, writes it, and takes it up when a run resumes.

    A probe is due at the first step, whenever a multiple of `every_n_steps` is reached, and at the
    end of training. That last one is left out of the history when the run goes on later, so that
    a run that was stopped and resumed has the history of one that was not.

    Args:
        bank: See `StageCallback`.
        every_n_steps: Optimizer steps between probes; None: a twentieth of the training, at most
            `longest`.
        figures: Draw at every so many probes; None: at the first, second, fourth, eighth, ..., and
            at the last; 0: never.
        name: See `StageCallback`.
        **options: See `RunOptions`.

    Attributes:
        every: Steps between probes, once training has begun.
        history: The probes so far.
        seconds: What each probe of this process has cost.
        probes: Probes in a run whose interval nobody gives.
        longest: The largest default of `every_n_steps`.
        event: What its lines in `stages.jsonl` are called.

    Raises:
        ValueError: For numbers out of range.
    """

    measures = True
    probes: ClassVar[int] = 20
    longest: ClassVar[int] = 1000
    event: ClassVar[str]

    def __init__(
        self,
        bank: LatentBank | None,
        *,
        every_n_steps: int | None,
        figures: int | None,
        name: str,
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
        raise NotImplementedError

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes the bank; keeps what a resumed run has found with the same."""
        run = self.run
        run.bank(self)
        path, _ = run.path_of(self)
        if run.path_from and not same_path(path, run.path):
            rank_zero_warn(
                f"{type(self).__name__} goes by path={path!r}, but the module trains on "
                f"{run.path!r} ({run.path_from}). Leave `path` out to watch the training."
            )
        past = run.began
        # A callback may serve a second fit: only a resumed run has a past.
        going_on = bool(past) and not self.renewed
        self.history = [e for e in self.history if going_on and self._stays(e, past)]
        share = (run.total or self.probes * self.longest) // self.probes
        self.every = self.every_n_steps or max(1, min(self.longest, share))
        self.writer = run.writer(self)
        self._since, self.seconds = (time.perf_counter(), past), []

    @staticmethod
    def _stays(event: dict[str, Any], past: int) -> bool:
        return event["step"] <= past and not event.get("at_end")

    @property
    def _last(self) -> int | None:
        return self.history[-1]["step"] if self.history else None

    def due(self, step: int) -> bool:
        """Whether to probe, `step` optimizer steps being done."""
        # Several optimizers advance it by more than one, and a resumed run may have probed here.
        return self._last is None or step // self.every > self._last // self.every

    def after_batch(self, step: int, before: int) -> None:
        """Probes if it is time; with accumulated gradients several batches share a step."""
        if step == before:
            return
        if self.due(step):
            self.probe(step)
        elif (self.run.total is not None and step >= self.run.total) and step != self._last:
            self.probe(step, at_end=True)

    def end(self) -> None:
        """Probes once more where training ends early."""
        averaging = any(isinstance(c, WeightAveraging) for c in self.run.trainer.callbacks)  # type: ignore[attr-defined]
        # What is averaged has taken the place of what was trained by now.
        if self._last != self.run.step and not averaging:
            self.probe(self.run.step, at_end=True)

    def probe(self, step: int, *, at_end: bool = False) -> None:
        """Probes, draws and writes; a collective.

        Args:
            step: Optimizer steps done.
            at_end: Whether only the end of training is the reason.
        """
        run, device = self.run, self.run.module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that queued training work is not counted as ours
        start = time.perf_counter()
        last_time, last_step = self._since
        entry = {"event": self.event, "step": step, **self.measure(step)}
        if at_end:
            entry["at_end"] = True
        with run.together(f"a probe of {type(self).__name__}"):
            if run.trainer.is_global_zero and self._draws(at_end):
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
        """The step of the trainer's own logs: that of the batch which was just trained on."""
        return max(0, step - 1)

    def cost(self) -> str:
        """What the last probe cost, for the log."""
        return f"{self.seconds[-1]:.1f} s" if self.seconds else "nothing"
