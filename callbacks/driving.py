"""What a training run tells a scheme: its length, its boundary, the losses of all ranks."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor

from stagewise.adapters.base import parts
from stagewise.schemes import Phases, Scheme, SchemeRecord
from stagewise.transitions import AtEvent, AtPlateau, AtShare

__all__ = [
    "GatheredLosses",
    "SchemeMeans",
    "reads_losses",
    "refuse_unheard_events",
    "refuse_endless_phases",
]


def refuse_endless_phases(steps: int | None, scheme: Scheme | Phases) -> None:
    """Refuses a phase that cannot end within the training.

    Args:
        steps: Its optimizer steps, None if it has no end.
        scheme: The scheme.

    Raises:
        ValueError: With the cure.
    """
    start = 0
    for phase in scheme.phases[:-1] if isinstance(scheme, Phases) else []:
        assert phase.until is not None
        if steps is None and isinstance(phase.until, AtShare):
            raise ValueError(
                f"{phase.until!r} is a share of a training that has no end. Set max_steps or "
                "max_epochs, or use AtStep(step)."
            )
        start = phase.until.check(start, steps)


def reads_losses(scheme: Scheme | Phases) -> str:
    """What in the scheme needs each sample's loss, for messages; empty if nothing does."""
    for phase in scheme.phases if isinstance(scheme, Phases) else []:
        if isinstance(phase.until, AtPlateau):
            return repr(phase.until)
    adapts = any(part.state_dict()["timesteps"] for part in parts(scheme))
    return "A sampler that adapts" if adapts else ""


def refuse_unheard_events(trainer: pl.Trainer, scheme: Scheme | Phases) -> None:
    """Refuses a phase that waits for an event which nothing in the trainer would say.

    Callbacks, and the module, name what they say in an attribute `event_kinds`: a dict from the
    event to what it lacks in this run, "" if nothing. That of `StageTransitions` is known once it
    has started.

    Raises:
        ValueError: With the events that are known, and the cure.
    """
    ahead = scheme.phases[scheme.index :] if isinstance(scheme, Phases) else []
    known: dict[str, str] = {}
    for speaker in (*getattr(trainer, "callbacks", []), trainer.lightning_module):
        known |= getattr(speaker, "event_kinds", {})
    listed = [f"{kind!r}{lacks and f' (lacks {lacks})'}" for kind, lacks in known.items()]
    for until in (phase.until for phase in ahead):
        if isinstance(until, AtEvent) and not until.happened and known.get(until.event) != "":
            raise ValueError(
                f"A phase ends at {until!r}, and no callback would say so. "
                + (f"Known are {', '.join(listed)}. " if known else "")
                + "Add what says it, after the monitors: [PosteriorMonitor(), "
                "VelocityErrorMonitor(), StageTransitions(), StageScheme()]; a callback of your "
                "own names it in `event_kinds`, {event: ''}."
            )


class SchemeMeans:
    """Means over samples of what a scheme did, summed on the device and reduced when asked for."""

    _KEYS = ("lambda", "navigation_share", "weight", "inserted_share", "tail_mass")
    """The last two are over the samples with lambda above 0: no others were looked up."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, record: SchemeRecord, boundary: float | None) -> None:
        """Adds the samples of a call; without a boundary no share can be said to be below it."""
        t = record.t.float()
        inside = torch.full_like(t, math.nan) if boundary is None else (t < boundary).float()
        mixed = record.lam > 0
        values = [
            *(record.lam.float(), inside, record.weight.float()),
            *((record.inserted & mixed).float(), (record.tail_mass * mixed).float()),
            *(mixed.float(), torch.ones_like(t)),
        ]
        sums = torch.stack(values).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums

    def reduced(self, trainer: pl.Trainer) -> dict[str, float]:
        """The means over all ranks since the last time; a collective, and a device sync."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self._KEYS) + 2, device=trainer.strategy.root_device)
        self._sums = None
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        *totals, mixed, count = sums.tolist()
        over = 3 * [count] + 2 * [mixed]
        return {
            key: total / number if number else math.nan
            for key, total, number in zip(self._KEYS, totals, over, strict=True)
            if count
        }


class GatheredLosses:
    """The losses of an optimizer step from all ranks, so that every rank decides the same.

    Attributes:
        share: How many each rank sends, None until the first step; a resumed run keeps it, as its
            first step may be a short one.
    """

    def __init__(self) -> None:
        self._records: list[Tensor] = []
        self.share: int | None = None

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Takes the times and losses of a batch, each (B,)."""
        self._records.append(torch.stack([t.float(), loss.float()]))

    def gathered(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Times and losses since the last time, from all ranks; a collective.

        Ranks must send equally many. What they send is fixed by the largest first step; a rank that
        has fewer sends some of its own twice, one that has more leaves the last out.
        """
        if not self._records:
            return None, None
        record = torch.cat(self._records, dim=1)
        self._records = []
        if trainer.world_size == 1:
            return record[0], record[1]
        if self.share is None:
            count = torch.tensor(float(record.shape[1]), device=record.device)
            self.share = int(trainer.strategy.reduce(count, reduce_op="max"))
        index = torch.arange(self.share, device=record.device) % record.shape[1]
        of_all = trainer.strategy.all_gather(record[:, index])
        return of_all[:, 0].flatten(), of_all[:, 1].flatten()
