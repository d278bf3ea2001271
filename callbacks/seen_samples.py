"""`SeenSamples`: a reservoir in place of the training set, filled with what a run is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stagewise.batches import read_checked
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.reservoir import Reservoir

if TYPE_CHECKING:
    from stagewise.callbacks.run import StageRun

__all__ = ["SeenSamples"]


class SeenSamples:
    """Takes each batch before it is trained on; monitors start once the reservoir is full."""

    def __init__(self, run: StageRun, reservoir: Reservoir) -> None:
        self._run, self._reservoir, self._began = run, reservoir, False
        run.waiting = [m for m in run.members if m.measures and not run.given(m)]
        for member in run.waiting:
            if not member.data_only:
                name = type(member).__name__
                raise ValueError(
                    f"{name} needs the same rows throughout a run, and {reservoir!r} does not "
                    f"keep them. Give it rows, {name}(LatentBank(x, labels)), or leave it out."
                )
        run.members = [member for member in run.members if member not in run.waiting]
        again = " It is filled again: a checkpoint does not hold it." if run.began else ""
        rank_zero_info(
            f"stagewise: posteriors are over the last {reservoir.size} samples that each rank has "
            f"seen.{again}"
        )

    def take(self, batch: Any) -> None:
        """Takes a batch; the first starts callbacks, a full reservoir those that measure."""
        run = self._run
        if batch is None:
            raise ValueError(f"{self._reservoir!r} takes each batch: watch.step(step, batch).")
        with run.host.together("taking its batch into the reservoir"):
            x1, labels = read_checked(run.find_of(run), batch)
            kernel = run.option(run, "condition")
            c = None if kernel is None else kernel.of(batch, x1, labels)
            self._reservoir.add(x1, labels, c)
        if not self._began:
            self._began = True
            run.tell("start")
        elif run.waiting and run.settled and not run.host.any(not self._reservoir.full):
            late, run.waiting = run.waiting, ()
            run.first_step = run.measured_at = run.host.global_step
            run.members = sorted([*run.members, *late], key=lambda m: (m.order, m.name))
            for what in ("start", "before_first_batch", "settle"):
                for member in late:
                    getattr(member, what)()

    def end(self) -> None:
        """Warns if it was never full."""
        if self._run.waiting:
            rank_zero_warn(
                f"{self._reservoir!r} was never full, so nothing was measured over it. Train for "
                "longer, or make it smaller: StageRun(reservoir=...)."
            )
