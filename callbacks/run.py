"""`StageRun`: the course of one training, the same for all its callbacks.

What is known of the training is found once (`run_oracles`), so all callbacks measure the same
training, in whatever order the trainer lists them. The first step is looked at (`first_step`)
before the first number is reported and before the first weight changes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from typing_extensions import Unpack

from stagewise.adapters.encoding import STALE, EncoderWeights, Encoding, version_of_weights
from stagewise.adapters.find import chosen_makers, dependent_noise, find_couplings, training_path
from stagewise.adapters.first_step import PATIENCE, FirstStep
from stagewise.bank import LatentBank
from stagewise.batches import read_checked
from stagewise.callbacks.first_batches import check_answer, check_batch, check_noise, check_step
from stagewise.callbacks.host import Host
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.callbacks.run_oracles import RunOracles
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.conventions import path_of
from stagewise.masks import fitted
from stagewise.reservoir import Reservoir
from stagewise.through_module import through_module, without_trace

__all__ = ["StageRun"]

_NOISE_AFTER = (8, 32, 128)
"""Batches after which the noise of all so far is looked at."""

_OFTEN = 16
"""Every so many steps the ranks tell each other what their networks are given."""


class StageRun(RunOracles):
    """Holds what is the same for all callbacks of a trainer: bank, path, how to find x_1.

    Args:
        bank: The training latents; default read from the training loader.
        name: Name of the folder in `dirpath`; it writes nothing itself.
        **options: See `RunOptions`.

    Attributes:
        total: Optimizer steps of the training, None if it has no end.
        step: Optimizer steps so far.
        first_step: The step that is looked at.
        makers: What makes the targets in the module; only those that were named, if any were.
        tied: What couples noise and data there, empty if nothing does.
        look: What the first step has shown.

    Raises:
        TypeError: At construction, for a bank or a path of a wrong type.
        ValueError: At the start of training if callbacks contradict each other, or what makes the
            targets in the module is on several paths.

    Example:
        >>> from stagewise.callbacks import PosteriorMonitor, StageRun, VelocityErrorMonitor
        >>> run = StageRun(read_batch=lambda batch: (batch["latents"], batch["label"]))
        >>> callbacks = [run, PosteriorMonitor(), VelocityErrorMonitor()]
    """

    order = -1
    settled = _told = _started = False
    _batches = 0
    look: FirstStep
    _weights: EncoderWeights | None = None

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        name: str = "stagewise_run",
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(name, bank, **options)

    @property
    def measuring(self) -> list[StageCallback]:
        """The callbacks that measure something against a bank."""
        return [member for member in (*self.members, *self.waiting) if member.measures]

    @property
    def asking(self) -> list[StageCallback]:
        """The callbacks that have started and need a bank."""
        return [member for member in self.members if member.measures or member.mixes]

    @property
    def exact(self) -> bool:
        """Whether an oracle goes into targets, or the model is compared with one."""
        return any(member.mixes or member.compares for member in self.members)

    def has_option(self, *options: str) -> bool:
        """Whether one of these options was given to any callback."""
        return any(member.options.keys() & options for member in {*self.members, self})

    def begin(self, host: Host, members: list[StageCallback]) -> None:
        """Starts all callbacks."""
        for member in {*members, self}:
            member.joins(self)
            member.renewed = False
        self.host, self.module, self.leader = host, host.module, members[0]
        self.members = sorted(members, key=lambda member: (member.order, member.name))
        self.began, self.step, self.total = host.global_step, host.global_step, host.total
        self.recall()
        self._loader = host.loader
        naming = [member for member in members if "target_maker" in member.options]
        naming = [member for member in naming if member.measures] or naming
        named = {member.options["target_maker"] for member in naming}
        self.makers = chosen_makers(self.module, named)
        given = self.has_option("path", "convention")
        self.path, self.path_from = training_path(self.makers, said=given)
        convention = self.option(self, "convention")
        if convention is not None and convention.path is not None:
            self.path = path_of(convention, self.option(self, "path")) or self.path
            self.path_from = "given by the convention"
        self.tied = dependent_noise(self.makers, find_couplings(self.module))
        if self.tied and self.measuring:
            rank_zero_warn(f"The posterior that is measured may not be that of {self.tied}")
        found = (self.module, self.makers, self.path, without_trace(self.read_batch_of(self)))
        self.look = FirstStep(*found, convention, lambda: self.host.trains())
        size = self.option(self, "reservoir")
        self.reservoir = Reservoir(size) if isinstance(size, int) else size
        if self.reservoir is None:
            self._start()
        else:
            self._wait_for(self.reservoir)

    def _start(self) -> None:
        """Starts the callbacks; only once, also if the batch is then refused and tried again."""
        if not self._started:
            self.tell("start")
            self._started = True

    def tell(self, what: str, *values: Any) -> None:
        """Calls a method of all callbacks by its name, in their order."""
        # A step in pure bfloat16 has another default type, and hooks may be called within it.
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            for member in self.members:
                getattr(member, what)(*values)
        finally:
            torch.set_default_dtype(default)

    def epoch_starts(self) -> None:
        """Says if the training loader was replaced by one of other samples."""
        if self.host.loader is self._loader:
            return
        self._loader = self.host.loader
        for bank in dict.fromkeys(self._banks.values()):
            with self.host.together("reading the new training loader"):
                x1, _ = fitted(*self.read(self, self._loader, 8), bank.shape)
                alike = tuple(x1.shape[1:]) == bank.shape and bool((bank.find(x1) >= 0).all())
            if not self.host.all(alike):
                rank_zero_warn(
                    f"The training loader was replaced in epoch {self.host.epoch}, and its samples "
                    "are not rows of the bank: from here on stagewise measures against samples "
                    "that are no longer trained on. Give a bank of all training samples: "
                    "StageRun(bank=LatentBank(x, labels))."
                )

    def batch_starts(self, batch: Any) -> None:
        """Looks at a batch before the first step; tells callbacks of later ones."""
        if self.reservoir is not None:
            self._fill(self.reservoir, batch)
        self.look.begin(batch)
        if self.settled:
            self.look.look_on()
            self.tell("before_batch", self.host.global_step)
            return
        self.first_step = self.host.global_step
        self._versions = version_of_weights(self.module.parameters())
        with self.host.together("looking at its first batch"):
            check_batch(self)
        if not self._told:
            self._told = True
            self.tell("before_first_batch")

    def weights_may_change(self) -> None:
        """Before a backward pass or an optimizer step: uses what the first step has shown."""
        if self.settled:
            self._look_again()
            return
        self.settled = True
        self.look.finish()
        self._open = self.host.any(self.look.open)
        self.encode()
        with self.host.together("looking at its first step"):
            check_step(self)
        self.watch_encoder()
        self.tell("settle")
        self.open_writer(self).dashboard(self.members)
        for member in self.members:
            member.stash = None

    def _look_again(self) -> None:
        """Tells callbacks if a later step gave the network more; a collective."""
        since, many = self.host.global_step - self.first_step, self.host.world_size > 1
        if not self._open or (many and since % _OFTEN):
            return
        if not self.host.any(self.look.open):
            self._open = False
            self.tell("reconsider")
            self.look.forget()
        elif not many and self.look.looked == PATIENCE:
            self.tell("reconsider")

    def optimizer_steps(self) -> None:
        """Before an optimizer step: with manual optimisation there may be no other hook."""
        if not self.host.automatic:  # automatic optimization counts a step without a loss, too
            self.weights_may_change()

    def batch_ends(self) -> None:
        """After a batch; one that changed no weight and showed nothing does not count."""
        step, before = self.host.global_step, self.step
        if not self.settled:
            versions = version_of_weights(self.module.parameters())
            unchanged = step == before and self._versions == versions
            # Automatic optimization announces a backward pass; without one the optimizer still
            # counts a step.
            if (unchanged or self.host.automatic) and not self.look.happened:
                return
            self.weights_may_change()
        self.step, self._batches = step, self._batches + 1
        self.look.stop_looking()
        if self._batches == 1:
            check_answer(self)
            self.look.forget()
        self.tell("after_batch", step, before)
        self.tell("after_all")
        self.refuse_stale()
        self.look.batch = None
        if self._batches in _NOISE_AFTER:
            with self.host.together("looking at the noise of its first batches"):
                check_noise(self, last=self._batches == _NOISE_AFTER[-1])

    def logs(self, before: int) -> bool:
        """Whether training logs after the last batch; `before`: the steps done before it."""
        every = self.host.log_every  # 0 is never; several optimizers advance by more than one
        return bool(every) and self.step // every > before // every

    def read_again(self) -> None:
        """Reads the training set again, because its latents have changed; a collective."""
        self._reread, self.measured_at, self._records = True, self.host.global_step, {}
        self.forget()
        self.tell("renew")

    def ends(self) -> None:
        """At the end of training."""
        if self.waiting:
            rank_zero_warn(
                f"{self.reservoir!r} was never full, so nothing was measured over it. Train for "
                "longer, or make it smaller: StageRun(reservoir=...)."
            )
        if self.settled:
            if self._open and self.look.looked and self.look.waiting:  # no later step can tell
                self.look.open = False
                self.tell("reconsider")
            self.tell("end")

    def fails(self) -> None:
        """After an exception."""
        self.tell("fail")
        self.close()

    def close(self) -> None:
        """Lets go of module, bank and hooks; what a checkpoint needs stays."""
        for member in self.members if self.settled else []:
            member.kept = self.record(member)
        self.tell("stop")
        if hasattr(self, "look"):
            self.look.stop()
        self.forget()
        for member in {*self.members, *self.waiting, self}:
            member.leaves()

    # -- what training makes of x_1 before it trains on it -----------------------------------------

    def encode(self) -> bool:
        """Reads the bank through what the first step does with x_1, if it can; a collective."""
        read = [member for member in self.asking if not self.given(member)]
        steps = () if self.look.encoding is None else self.look.encoding.steps
        able = bool(read and steps) and all(member.late for member in read)
        able = able and not self.has_option("read_batch", "encode")
        if self.encoding or not self.host.all(able):
            return False
        shared = [steps]  # on other ranks numbers may differ in their last digits
        if self.host.world_size > 1:
            torch.distributed.broadcast_object_list(shared)
        self.encoding = Encoding(shared[0])
        rank_zero_warn(
            f"Training {self.encoding.verb} x_1, {self.look.x1_at}, and the bank is read again "
            f"through that. To read it once: StageRun({self.encoding.line})."
        )
        self.forget()
        self.restarted = True
        self.tell("restart")
        return True

    def watch_encoder(self) -> None:
        """After the first step: notes the weights with which x_1 is made."""
        self._weights, asking, made = None, self.asking, self.look.encoding
        given = self.has_option("read_batch", "encode")
        if not asking or self.reservoir is not None or not (given or made or self.encoding):
            return
        read_batch = self.read_batch_of(asking[0])
        if made is not None and not (given or self.encoding):  # the bank was given
            read_batch = through_module(
                read_batch, self.module, made, lambda: self.host.precision()
            )
        read_batch, batch = without_trace(read_batch), self.look.batch
        with suppress(ValueError):  # the step may have taken it out of the batch
            self._weights = EncoderWeights(self.module, lambda: read_checked(read_batch, batch))

    def refuse_stale(self) -> None:
        """After a batch: refuses oracle targets if the encoder that made the rows has changed."""
        if self._weights is None or not self._weights.changed():
            return
        self._weights = None  # so that the warning comes once
        if any(member.mixes for member in self.members):
            raise ValueError(STALE)
        rank_zero_warn(STALE)

    # -- the last samples in place of the training set ---------------------------------------------

    def _wait_for(self, reservoir: Reservoir) -> None:
        """Keeps callbacks that measure waiting until the reservoir is full."""
        self.waiting = [m for m in self.members if m.measures and not self.given(m)]
        for member in self.waiting:
            if not member.data_only:
                name = type(member).__name__
                raise ValueError(
                    f"{name} needs the same rows throughout a run, and {reservoir!r} does not "
                    f"keep them. Give it rows, {name}(LatentBank(x, labels)), or leave it out."
                )
        self.members = [member for member in self.members if member not in self.waiting]
        again = " It is filled again: a checkpoint does not hold it." if self.began else ""
        rank_zero_info(
            f"stagewise: posteriors are over the last {reservoir.size} samples that each rank has "
            f"seen.{again}"
        )

    def _fill(self, reservoir: Reservoir, batch: Any) -> None:
        """Takes a batch; the first starts callbacks, a full reservoir those that wait for it."""
        if batch is None:
            raise ValueError(f"{reservoir!r} takes each batch: watch.step(step, batch).")
        with self.host.together("taking its batch into the reservoir"):
            x1, labels = read_checked(self.read_batch_of(self), batch)
            kernel = self.option(self, "condition")
            reservoir.add(x1, labels, None if kernel is None else kernel.of(batch, x1, labels))
        self._start()
        if self.waiting and self.settled and self.host.all(reservoir.full):
            late, self.waiting = self.waiting, ()
            self.first_step = self.measured_at = self.host.global_step
            self.members = sorted([*self.members, *late], key=lambda m: (m.order, m.name))
            for what in ("start", "before_first_batch", "settle"):
                for member in late:
                    getattr(member, what)()
