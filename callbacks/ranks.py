"""What ranks do together: log once, average what a scheme did, and gather its losses."""

from __future__ import annotations

import logging
import math
import warnings

import torch
from torch import Tensor

from stagewise.callbacks.host import Host
from stagewise.schemes import SchemeRecord

__all__ = ["GatheredLosses", "SchemeMeans", "rank_zero_info", "rank_zero_warn"]

_LOG = logging.getLogger("stagewise")
_LOG.setLevel(logging.INFO)
if not _LOG.hasHandlers():  # without a handler of the user, to the terminal
    _LOG.addHandler(logging.StreamHandler())


def rank_zero_info(message: str) -> None:
    """A line of the log "stagewise", of the first rank."""
    if Host().rank == 0:
        _LOG.info(message)


def rank_zero_warn(message: str) -> None:
    """A warning of the first rank."""
    if Host().rank == 0:
        warnings.warn(message, stacklevel=3)


class SchemeMeans:
    """Means over samples of what a scheme did, summed on the device until `reduced` is called."""

    _KEYS = ("lambda", "navigation_share", "weight", "inserted_share", "tail_mass")
    """The last two are over the samples with lambda above 0: no others were looked up."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, record: SchemeRecord, boundary: float | None) -> None:
        """Adds the samples of a call; without a boundary the navigation share is NaN."""
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

    def reduced(self, host: Host) -> dict[str, float]:
        """The means over all ranks since the last call; a collective, and a device sync."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self._KEYS) + 2, device=host.device)
        self._sums = None
        *totals, mixed, count = host.reduce(sums).tolist()
        over = 3 * [count] + 2 * [mixed]
        return {
            key: total / number if number else math.nan
            for key, total, number in zip(self._KEYS, totals, over, strict=True)
            if count
        }


class GatheredLosses:
    """The losses of an optimizer step from all ranks, so that every rank decides the same.

    Attributes:
        share: Losses that each rank sends, as ranks must send equally many: those of the largest
            first step. A rank with fewer repeats some, a rank with more leaves the last out. None
            until then; a resumed run keeps it.
    """

    def __init__(self) -> None:
        self._records: list[Tensor] = []
        self.share: int | None = None

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Takes the times and losses of a batch, each (B,)."""
        self._records.append(torch.stack([t.float(), loss.float()]))

    def gathered(self, host: Host) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Times and losses since the last call, from all ranks; a collective."""
        if not self._records:
            return None, None
        record = torch.cat(self._records, dim=1)
        self._records = []
        if host.world_size == 1:
            return record[0], record[1]
        if self.share is None:
            count = torch.tensor(float(record.shape[1]), device=record.device)
            self.share = int(host.reduce(count, "max"))
        index = torch.arange(self.share, device=record.device) % record.shape[1]
        of_all = host.gather(record[:, index])
        return of_all[:, 0].flatten(), of_all[:, 1].flatten()
