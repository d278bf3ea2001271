"""`RunEncoding`: what training makes of x_1 before it trains on it, and whether that stays."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from stagewise.adapters.encoding import STALE, EncoderWeights, Encoding
from stagewise.adapters.first_step import FirstStep
from stagewise.batches import read_checked
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.callbacks.run_oracles import RunOracles
from stagewise.callbacks.stage_callback import StageCallback
from stagewise.through_module import through_module, without_trace

__all__ = ["RunEncoding"]


class RunEncoding(RunOracles):
    """The part of `StageRun` that reads through what the first step does with x_1."""

    look: FirstStep
    _weights: EncoderWeights | None = None

    def tell(self, what: str, *values: Any) -> None:
        """Calls a method of all callbacks by its name, in their order."""
        raise NotImplementedError

    @property
    def _asking(self) -> list[StageCallback]:
        return [member for member in self.members if member.measures or member.mixes]

    def encode(self) -> bool:
        """Reads the bank through what the first step does with x_1, if it can; a collective."""
        read = [member for member in self._asking if not self.given(member)]
        steps = () if self.look.encoding is None else self.look.encoding.steps
        said = any(
            {"read_batch", "encode"} & member.said.keys() for member in {*self.members, self}
        )
        able = bool(read and steps) and all(member.late for member in read) and not said
        if self.encoding or not self.host.all(able):
            return False
        told = [steps]  # numbers may differ in their last digits
        if self.host.world_size > 1:
            torch.distributed.broadcast_object_list(told)
        self.encoding = Encoding(told[0])
        rank_zero_warn(
            f"Training {self.encoding.verb} x_1, {self.look.x1_at}, and the bank is read again "
            f"through that. To read it once: StageRun({self.encoding.line})."
        )
        self.forget()
        self.tell("restart")
        return True

    def watch_encoder(self) -> None:
        """After the first step: notes the weights with which x_1 is made."""
        self._weights, asking, made = None, self._asking, self.look.encoding
        told = any(
            {"read_batch", "encode"} & member.said.keys() for member in {*self.members, self}
        )
        if not asking or self.reservoir is not None or not (told or made or self.encoding):
            return
        read_batch = self.find_of(asking[0])
        if made is not None and not (told or self.encoding):  # the bank was given
            read_batch = through_module(
                read_batch, self.module, made, lambda: self.host.precision()
            )
        read_batch, batch = without_trace(read_batch), self.look.batch
        with suppress(ValueError):  # the step may have taken it out of the batch
            self._weights = EncoderWeights(self.module, lambda: read_checked(read_batch, batch))

    def refuse_stale(self) -> None:
        """After a batch: refuses targets of rows that an encoder has made which has changed."""
        if self._weights is None or not self._weights.changed():
            return
        self._weights = None  # it is said once
        if any(member.mixes for member in self.members):
            raise ValueError(STALE)
        rank_zero_warn(STALE)
