"""`StageRun`: the course of one training, for all callbacks alike.

What is known of the training is found once and handed to whoever asks (`run_oracles`), so that no
callback sees another training than its neighbour, wherever it stands in the trainer's list. The
first step is looked at (`first_step`) before the first number is reported and before the first
weight changes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from stagewise.adapters.differences import compare, difference, other_rows, several
from stagewise.adapters.encoding import STALE, version_of_weights
from stagewise.adapters.find import chosen_makers, dependent_noise, find_couplings, training_path
from stagewise.adapters.first_step import PATIENCE, FirstStep
from stagewise.bank import LatentBank
from stagewise.batches import describe, unused_in
from stagewise.callbacks.answer_check import check_answer
from stagewise.callbacks.host import Host
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.callbacks.run_encoding import RunEncoding
from stagewise.callbacks.seen_samples import SeenSamples
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.conventions import path_of
from stagewise.masks import compared_within, fitted, require_same_masks
from stagewise.reservoir import Reservoir
from stagewise.schemes import parts
from stagewise.schemes.refusals import tell_rounding
from stagewise.through_module import without_trace

__all__ = ["StageRun"]

_NOISE_AFTER = (8, 32, 128)
"""Batches after which the noise of all so far is looked at."""

_OFTEN = 16
"""Every so many steps the ranks tell each other what their networks are given."""


class StageRun(RunEncoding):
    """Says once what holds for all callbacks of a trainer: bank, path, how to find x_1.

    Args:
        bank: The training latents; default read from the training loader.
        name: Name of the folder in `dirpath`; it writes nothing itself.
        **options: See `RunOptions`.

    Attributes:
        total: Optimizer steps of the training, None if it has no end.
        step: Optimizer steps so far.
        first_step: The step that is looked at.
        makers: What makes the targets in the module; those that were named, if any were.
        tied: What couples noise and data there, empty if nothing does.
        look: What the first step has shown.

    Raises:
        TypeError: At construction, for a bank or a path that is none.
        ValueError: At the start of training if callbacks contradict each other, or what makes the
            targets in the module is on several paths.

    Example:
        >>> from stagewise.callbacks import PosteriorMonitor, StageRun, VelocityErrorMonitor
        >>> run = StageRun(read_batch=lambda batch: (batch["latents"], batch["label"]))
        >>> callbacks = [run, PosteriorMonitor(), VelocityErrorMonitor()]
    """

    order = -1
    held = (
        *StageCallback.held,
        *("host", "module", "leader", "members", "look", "makers", "_loader"),
        *("reservoir", "seen", "waiting", "_banks"),
    )
    seen: SeenSamples | None = None
    look: FirstStep

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

    def begin(self, host: Host, members: list[StageCallback]) -> None:
        """Starts all callbacks."""
        self.waiting = ()
        for member in {*members, self}:
            member.joins(self)
        self.host, self.module, self.leader = host, host.module, members[0]
        self.settled, self._told, self._batches = False, False, 0
        self.members = sorted(members, key=lambda member: (member.order, member.name))
        self.began, self.step, self.total = host.global_step, host.global_step, host.total
        self.recall()
        self._loader = host.loader
        for member in members:
            member.renewed = False
        saying = [who for who in members if "target_maker" in who.said]
        saying = [who for who in saying if who.measures] or saying
        self.makers = chosen_makers(self.module, {who.said["target_maker"] for who in saying})
        said = any({"path", "convention"} & who.said.keys() for who in members)
        self.path, self.path_from = training_path(self.makers, said=said)
        convention = self.option(self, "convention")
        if convention is not None and convention.path is not None:
            self.path = path_of(convention, self.option(self, "path")) or self.path
            self.path_from = "given by the convention"
        self.tied = dependent_noise(self.makers, find_couplings(self.module))
        if self.tied and self.measuring:
            rank_zero_warn(f"The posterior that is measured may not be that of {self.tied}")
        found = (self.module, self.makers, self.path, without_trace(self.find_of(self)))
        self.look = FirstStep(*found, convention, lambda: self.host.trains())
        size = self.option(self, "reservoir")
        self.reservoir = Reservoir(size) if isinstance(size, int) else size
        self.seen = None if self.reservoir is None else SeenSamples(self, self.reservoir)
        if self.seen is None:
            self.start_members()

    def start_members(self) -> None:
        """Tells them that training starts; with a reservoir once it holds a batch."""
        self.tell("start")

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
            with self.together("reading the new training loader"):
                x1, _ = fitted(*self.read(self, self._loader, 8), bank.shape)
                alike = tuple(x1.shape[1:]) == bank.shape and bool((bank.find(x1) >= 0).all())
            if not self.host.all(alike):
                rank_zero_warn(
                    f"The training loader was replaced in epoch {self.host.epoch}, and "
                    "its samples are no rows of the bank: from here on stagewise measures against "
                    "samples that are not trained on any more. Give a bank of all that is "
                    "trained on: StageRun(bank=LatentBank(x, labels))."
                )

    def batch_starts(self, batch: Any) -> None:
        """Looks at the first batches; later ones are left alone."""
        if self.seen is not None:
            self.seen.take(batch)
        self.look.begin(batch)
        if self.settled:
            self.look.look_on()
            self.tell("before_batch", self.host.global_step)
            return
        self.first_step = self.host.global_step
        self._versions = version_of_weights(self.module.parameters())
        with self.together("looking at its first batch"):
            self._look_at_batch()
        if not self._told:
            self._told = True
            self.tell("before_first_batch")

    def weights_may_change(self) -> None:
        """Before a backward pass or an optimizer step: what the first step showed is settled."""
        if self.settled:
            self._hear()
            return
        self.settled = True
        self.look.finish()
        self._open = self.host.any(self.look.open)
        self.encode()
        with self.together("looking at its first step"):
            self._look_at_step()
        self.watch_encoder()
        self.tell("settle")
        self.open_writer(self).dashboard(self.members)
        for member in self.members:
            member.stash = None

    def _hear(self) -> None:
        """Tells what a later step has shown of what the network is given; a collective."""
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
        if not self.host.automatic:  # which would count a step without a loss, too
            self.weights_may_change()

    def batch_ends(self) -> None:
        """After a batch; one that changed no weight and showed nothing does not count."""
        step, before = self.host.global_step, self.step
        if not self.settled:
            unchanged = step == before and self._versions == version_of_weights(
                self.module.parameters()
            )
            # Automatic optimisation says so before any backward pass. Without one the optimizer
            # still counts a step.
            idle = unchanged or self.host.automatic
            if idle and not self.look.happened:
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
            with self.together("looking at the noise of its first batches"):
                self._look_at_noise()

    def logs(self, before: int) -> bool:
        """Whether training logs after the last batch, before which so many steps were done."""
        every = self.host.log_every  # 0 is never; several optimizers advance by more than one
        return bool(every) and self.step // every > before // every

    def read_again(self) -> None:
        """Reads the training set again, because its latents have changed; a collective."""
        self.forget_rows()
        self.tell("renew")

    def ends(self) -> None:
        """At the end of training."""
        if self.seen is not None:
            self.seen.end()
        if self.settled:
            if self._open and self.look.looked and self.look.waiting:  # nothing more comes
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

    # -- what the first batches show --------------------------------------------------------------

    def _look_at_batch(self) -> None:
        """Says what was found in the batch, and refuses what no bank can go with."""
        look = self.look
        try:
            look.watch(self._refuse_for_schemes, self.bank_in_use)
        except ValueError:
            if look.batch is not None and not all(self.given(one) for one in self.measuring):
                raise
            found = "is shown no batch" if look.batch is None else "found no x_1 in the batch, "
            found += "" if look.batch is None else describe(look.batch)
            rank_zero_info(
                f"stagewise: {found}: only what the training step shows is held against the bank."
            )
            return
        assert look.x1 is not None
        took = f"x_1 = {describe(look.x1)} and "
        took += "no labels" if look.labels is None else f"labels = {describe(look.labels)}"
        took += f", mask = {describe(look.masks.mask)}" if look.masks else ""
        kernels, c = [k for m in self.members if (k := self.option(m, "condition"))], None
        with suppress(ValueError):  # raised where it is needed
            c = look.condition_for(kernels[0], look.x1) if kernels else None
        took += "" if c is None else f", condition = {describe(c)}"
        rank_zero_info(f"stagewise: in {describe(look.batch)} took {took}")
        for note in unused_in(look.batch, look.x1, look.labels, look.masks, c):
            say = rank_zero_warn if self._exact and "which numbers" in note else rank_zero_info
            say(f"stagewise: {note}")
        for member in self.measuring:
            bank = self.bank(member)
            require_same_masks(bank, look.x1, look.masks)
            own = fitted(look.x1, look.masks or look.labels, bank.shape)[1]
            own = compared_within(own, self.class_wise(member))
            for label in set() if own is None else set(own.tolist()):
                bank.segment(label)

    def _refuse_for_schemes(self, x1: Tensor) -> None:
        """Refuses what no oracle's target can be made for, before a scheme is asked for one."""
        asking = [member for member in self.members if member.measures or member.mixes]
        if any(self.option(member, "class_wise") is not False for member in asking):
            self.look.check_labels(mixes=any(member.mixes for member in asking))
        mixing = any(member.mixes and not self.given(member) for member in self.members)
        bank, alone = self.bank_in_use(), self.look.batch is None and self.look.masks is None
        if alone and bank is not None and bank.pairs and any(m.mixes for m in self.members):
            raise ValueError(
                "The bank has masks, and the step says nothing of them. Give them to what makes "
                "the targets, mask=mask, or show the batch: watch.step(step, batch)."
            )
        if self.look.trains_encoder and any(not self.given(member) for member in asking):
            if mixing:
                raise ValueError(STALE)
            rank_zero_warn(STALE)
        if mixing:
            self.refuse_others(x1)
        for scheme in self.look.schemes:
            for part in parts(scheme):
                tell_rounding(part, x1)

    def refuse_others(self, x1: Tensor) -> None:
        """Refuses samples of the first step that are surely other than what was read."""
        if not self.look.changed(x1):
            return
        # On several ranks the others may not come by here.
        if (self.host.world_size == 1 and self.encode()) or self.look.near(x1):
            return
        message, certain = difference(self.look, x1, self.bank_in_use())
        if certain:
            raise ValueError(message)

    @property
    def _exact(self) -> bool:
        """Whether an oracle goes into targets, or is compared with."""
        return any(member.mixes or member.compares for member in self.members)

    def _look_at_step(self) -> None:
        """Says what of bank, path and noise is not that of the training, or refuses it."""
        measuring = self.measuring
        if self.look.tied and self._exact:
            raise ValueError(self.look.tied)
        if not measuring:
            return
        if said := several(self.look, type(measuring[0]).__name__):
            if self._exact:
                raise ValueError(said)
            rank_zero_warn(said)
        given = {id(b): b for b in (self.bank(m) for m in measuring if self.given(m))}
        unlabelled = self.look.x1 is not None and self.look.labels is None
        if unlabelled and any(self.given(m) and self.class_wise(m) for m in measuring):
            rank_zero_warn(
                "The bank has labels, so the posterior is class-wise, but no labels were found in "
                "the training batch. If training is not class-conditional, say class_wise=False."
            )
        warnings, note = compare(self.look, list(given.values()))
        for warning in warnings:
            rank_zero_warn(warning)
        if note:
            rank_zero_info(f"stagewise: {note}")
        x1, read = self.look.trained_x1, [m for m in measuring if not self.given(m)]
        if self.encoding is not None and self.encoding.draws:
            return  # reading the bank has said so
        look = self.look
        other = x1 is not None and look.changed(x1) and not (look.swapped or look.near(x1))
        if read and other and x1 is not None:
            encoded, bank = self.encoding is not None, self.bank(read[0])
            message, certain = difference(self.look, x1, bank, encoded=encoded)
            if certain and any(member.compares for member in read):
                raise ValueError(message)
            rank_zero_warn(message)
        elif read and not self.host.feeds and not any(m.mixes for m in self.members):
            told = any(
                {"read_batch", "encode"} & member.said.keys() for member in {*self.members, self}
            )
            exact = any(member.compares for member in read)
            if not told and (warning := other_rows(self.look, self.bank(read[0]), exact=exact)):
                rank_zero_warn(warning)

    def _look_at_noise(self) -> None:
        """Says what the noise of some batches shows that the first has not shown, or refuses it."""
        wrong = self.look.noise_so_far(last=self._batches == _NOISE_AFTER[-1])
        if wrong and self._exact:
            raise ValueError(wrong)
        if wrong and self.measuring and not self.tied:
            rank_zero_warn(wrong)
