"""`StageRun`: what is known of one training, for all callbacks alike.

Bank, oracle, path, network, labels, held-out samples and boundary are found once and handed to
whoever asks, so that no callback sees another training than its neighbour, wherever it stands in
the trainer's list. The first step is looked at (`first_step`) before the first number is reported
and before the first weight changes.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from stagewise.adapters.differences import compare, difference
from stagewise.adapters.find import dependent_noise, find_couplings, find_seams, training_path
from stagewise.adapters.first_step import PATIENCE, FirstStep
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, describe, find_sample, unused_in
from stagewise.callbacks.ranks import together
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.callbacks.training_bank import bank_from_trainer, same_samples
from stagewise.callbacks.writer import Writer
from stagewise.engines import Engine
from stagewise.memory import beside_training, oracle_device
from stagewise.oracle import Oracle
from stagewise.paths import Path as ProbabilityPath
from stagewise.paths import same_path
from stagewise.stages import Recipe, StageBoundary, StageCurve, require_whole_bank

__all__ = ["StageRun"]

Kind = TypeVar("Kind", bound=StageCallback)

_NOISE_AFTER = (8, 32, 128)
"""Batches after which the noise of all so far is looked at."""

_OFTEN = 16
"""Every so many steps the ranks tell each other what their networks are given."""

_NOT_SHARED = ("seed", "dirpath", "seam")
"""What a callback says about itself alone."""


class StageRun(StageCallback):
    """Says once what holds for all callbacks of a trainer; without it they make one themselves.

    Args:
        bank: See `StageCallback`, like all others.
        name: Name of the folder in `dirpath`; it writes nothing itself.
        **options: `find`, `path`, `class_wise`, `held_out`, `velocity`, `seam`, `dirpath`, `seed`.

    Raises:
        TypeError: At construction, for a bank or a path that is none.
        ValueError: At the start of training if callbacks contradict each other, or what makes the
            targets in the module is on several paths.

    Example:
        >>> from stagewise.callbacks import PosteriorMonitor, StageRun, VelocityErrorMonitor
        >>> run = StageRun(find=lambda batch: (batch["latents"], batch["label"]))
        >>> callbacks = [run, PosteriorMonitor(), VelocityErrorMonitor()]
    """

    order = -1
    held = (
        *StageCallback.held,
        "trainer",
        "module",
        "leader",
        "members",
        "look",
        "seams",
        "_loader",
    )
    look: FirstStep

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        name: str = "stagewise_run",
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(name, bank, **options)

    # -- the course of a training ---------------------------------------------------------------

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, members: list[StageCallback]
    ) -> None:
        """Starts all callbacks.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            members: Its stage callbacks, in the order of its list; the first one leads.
        """
        for member in {*members, self}:
            member.joins(self)
        self.trainer, self.module, self.leader = trainer, pl_module, members[0]
        self.settled, self._told, self._batches = False, False, 0
        self.members = sorted(members, key=lambda member: (member.order, member.name))
        self.began = self.step = trainer.global_step
        total = trainer.estimated_stepping_batches
        self.total = None if math.isinf(total) else int(total)
        self._forget()
        self._reread, self._measured_at = False, self.began
        kept = [member.stashed_run.get("boundaries") for member in self.members if self.began]
        self._records: dict[tuple[str, int], dict[str, float]] = {
            (old["path"], old["class_wise"]): old["boundary"]
            for old in next(filter(None, kept), [])
        }
        self._loader = trainer.train_dataloader
        for member in members:
            member.renewed = False
        self.seams = find_seams(pl_module)
        named = {who.said["seam"] for who in members if "seam" in who.said}
        chosen = [seam for seam in self.seams if seam.name in named] or self.seams
        said = any("path" in who.said for who in members)
        self.path, self.path_from = training_path(chosen, said=said)
        self.tied = dependent_noise(self.seams, find_couplings(pl_module))
        if self.tied and self.measuring:
            rank_zero_warn(f"The posterior that is measured may not be that of {self.tied}")
        self.look = FirstStep(pl_module, self.seams, self.path, self.find_of(self))
        self.tell("start")
        self.writer(self).dashboard(self.members)

    def tell(self, what: str, *values: Any) -> None:
        """Calls a method of all callbacks, in their order.

        Args:
            what: Its name.
            *values: Its arguments.
        """
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
        if self.trainer.train_dataloader is self._loader:
            return
        self._loader = self.trainer.train_dataloader
        for bank in self._banks.values():
            with self.together("reading the new training loader"):
                alike = same_samples(self.trainer, self.module, bank, find=self.find_of(self))
            if not self.trainer.strategy.reduce_boolean_decision(alike):
                rank_zero_warn(
                    f"The training loader was replaced in epoch {self.trainer.current_epoch}, and "
                    "its samples are no rows of the bank: from here on stagewise measures against "
                    "samples that are not trained on any more. Give a bank of all that is "
                    "trained on: StageRun(bank=LatentBank(x, labels))."
                )

    def batch_starts(self, batch: Any) -> None:
        """Looks at the first batches; later ones are left alone."""
        self.look.begin(batch)
        if self.settled:
            self.look.look_on()
            self.tell("before_batch", self.trainer.global_step)
            return
        self.first_step = self.trainer.global_step
        self._versions = self._weight_versions()
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
        self._open = self.on_any_rank(self.look.open)
        with self.together("looking at its first step"):
            self._look_at_step()
        self.tell("settle")
        self.look.forget()
        for member in self.members:
            member.stash = None

    def _hear(self) -> None:
        """Tells what a later step has shown of what the network is given; a collective."""
        since, many = self.trainer.global_step - self.first_step, self.trainer.world_size > 1
        if not self._open or (many and since % _OFTEN):
            return
        if not self.on_any_rank(self.look.open):
            self._open = False
            self.tell("reconsider")
            self.look.forget()
        elif not many and self.look.looked == PATIENCE:
            self.tell("reconsider")

    def on_any_rank(self, value: bool) -> bool:
        """Whether something holds on any rank; a collective."""
        return self.trainer.strategy.reduce_boolean_decision(value, all=False)

    def optimizer_steps(self) -> None:
        """Before an optimizer step: with manual optimisation there may be no other hook."""
        # With automatic optimisation it is called for a step without a loss, too.
        if not self.module.automatic_optimization:
            self.weights_may_change()

    def batch_ends(self) -> None:
        """After a batch; one that changed no weight and showed nothing does not count."""
        step, before = self.trainer.global_step, self.step
        if not self.settled:
            unchanged = step == before and self._versions == self._weight_versions()
            # Automatic optimisation says so before any backward pass. Without one the optimizer
            # still counts a step.
            idle = unchanged or self.module.automatic_optimization
            if idle and not self.look.happened:
                return
            self.weights_may_change()
        self.step, self._batches = step, self._batches + 1
        self.look.stop_looking()
        self.tell("after_batch", step, before)
        self.tell("after_all")
        self.look.batch = None
        if self._batches in _NOISE_AFTER:
            with self.together("looking at the noise of its first batches"):
                self._look_at_noise()

    def ends(self) -> None:
        """At the end of training."""
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
        self._forget()
        for member in {*self.members, self}:
            member.leaves()

    def _forget(self) -> None:
        """Leaves behind the bank, and what was made of it."""
        self._banks: dict[int, LatentBank] = {}
        self._read: LatentBank | None = None
        self._oracles: list[Oracle] = []
        self.recipes: list[Recipe] = []
        self._boundaries: dict[Recipe, StageBoundary] = {}
        self._curve: tuple[Recipe, int, StageCurve] | None = None

    def _look_at_batch(self) -> None:
        """Says what was found in the batch, and refuses what no bank can go with.

        Raises:
            ValueError: If there is no x_1 and no bank was given, or a label is no class.
        """
        look = self.look
        try:
            look.watch(self._refuse_for_schemes, self._bank_in_use)
        except ValueError:
            if not all(self.given(member) for member in self.measuring):
                raise
            rank_zero_info(
                f"stagewise: found no x_1 in {describe(look.batch)}. The bank is given, so only "
                "what the training step shows is held against it."
            )
            return
        assert look.x1 is not None
        labels = "no labels" if look.labels is None else f"labels = {describe(look.labels)}"
        rank_zero_info(
            f"stagewise: in {describe(look.batch)} took x_1 = {describe(look.x1)} and {labels}"
        )
        for note in unused_in(look.batch, look.x1, look.labels):
            rank_zero_info(f"stagewise: {note}")
        wise = [member for member in self.measuring if self.class_wise(member)]
        if wise and look.labels is not None:
            for label in set(look.labels.tolist()):
                for member in wise:
                    self.bank(member).segment(label)

    def _refuse_for_schemes(self, x1: Tensor) -> None:
        """Refuses what no oracle's target can be made for, before a scheme is asked for one."""
        mixing = any(member.mixes and not self.given(member) for member in self.members)
        if mixing and self.look.changed(x1):
            message, certain = difference(self.look, x1, self._bank_in_use())
            if certain:
                raise ValueError(message)

    def _look_at_step(self) -> None:
        """Says what of bank, path and noise is not that of the training.

        Raises:
            ValueError: If an oracle goes into targets, or is compared with, that is not theirs.
        """
        measuring = self.measuring
        if self.look.tied and any(member.mixes or member.compares for member in self.members):
            raise ValueError(self.look.tied)
        if not measuring:
            return
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
        if read and x1 is not None and self.look.changed(x1) and not self.look.swapped:
            message, certain = difference(self.look, x1, self.bank(read[0]))
            if certain and any(member.compares for member in read):
                raise ValueError(message)
            rank_zero_warn(message)

    def _look_at_noise(self) -> None:
        """Says what the noise of some batches shows that the first has not shown.

        Raises:
            ValueError: If an oracle goes into targets, or is compared with.
        """
        wrong = self.look.noise_so_far(last=self._batches == _NOISE_AFTER[-1])
        if not wrong:
            return
        if any(member.mixes or member.compares for member in self.members):
            raise ValueError(wrong)
        if self.measuring and not self.tied:
            rank_zero_warn(wrong)

    def _weight_versions(self) -> int:
        """Grows with each change of a weight, and costs nothing."""
        return sum(parameter._version for parameter in self.module.parameters())

    # -- what was said --------------------------------------------------------------------------

    def option(self, callback: StageCallback, key: str, default: Any = None) -> Any:
        """What a callback goes by: its own word, that of the run, or that of the others.

        Args:
            callback: Who asks.
            key: Of `RunOptions`.
            default: If nobody says anything.

        Raises:
            ValueError: If others say different things.
        """
        if key == "bank" and self._reread:
            return default
        for who in (callback, self):
            if key in who.said:
                return who.said[key]
        saying = [member for member in self.members if key in member.said]
        if key in _NOT_SHARED or not saying:
            return default
        first: Any = saying[0].said[key]
        for who in saying[1:]:
            other: Any = who.said[key]
            alike = same_path(first, other) if key == "path" else first is other
            if not alike:
                one, two = type(saying[0]).__name__, type(who).__name__
                raise ValueError(
                    f"{one}({key}={first!r}) and {two}({key}={other!r}) differ, and "
                    f"{type(callback).__name__} says nothing. Say it once for all: "
                    f"callbacks=[StageRun({key}=...), ...]."
                )
        return first

    def find_of(self, callback: StageCallback) -> FindSample:
        """From a batch to `(x_1, labels or None)`; a data module may have its own `find_sample`."""
        own = getattr(getattr(self.trainer, "datamodule", None), "find_sample", find_sample)
        return self.option(callback, "find", own)

    def together(self, what: str) -> AbstractContextManager[None]:
        """Does something on every rank, or raises on all of them; see `ranks.together`."""
        return together(self.trainer, what)

    def writer(self, callback: StageCallback) -> Writer:
        """Where a callback writes; a collective."""
        folder = callback.dirpath
        if folder is None and self.dirpath is not None:
            folder = Path(self.dirpath) / callback.name
        return Writer(self.trainer, callback.name, folder)

    def first(self, kind: type[Kind]) -> Kind | None:
        """The first callback of a kind in the order of names, None if there is none."""
        return next((member for member in self.members if isinstance(member, kind)), None)

    # -- path, bank and oracle --------------------------------------------------------------------

    def path_of(self, callback: StageCallback) -> tuple[ProbabilityPath, str]:
        """The path that a callback measures on, and how it is known."""
        said = self.option(callback, "path")
        if said is None:
            return self.path, self.path_from or "assumed; say path=... if training uses another"
        return said, "given"

    def bank(self, callback: StageCallback) -> LatentBank:
        """The bank of a callback: the one that was given, or what is read from the training set.

        The first call reads; a collective. A checkpoint of a run with another bank is noticed.
        """
        given = self.option(callback, "bank")
        if given is None:
            wise = (self.option(member, "class_wise") for member in self.members)
            self._read = self._read or bank_from_trainer(
                self.trainer,
                self.module,
                find=self.find_of(callback),
                class_wise=any(each is not False for each in wise),
            )
        bank = given or self._read
        assert bank is not None
        if id(bank) not in self._banks:
            self._banks[id(bank)] = beside_training(bank, self.trainer.strategy.root_device)
        self._compare_with_checkpoint(callback, bank)
        return self._banks[id(bank)]

    def _compare_with_checkpoint(self, callback: StageCallback, bank: LatentBank) -> None:
        before = callback.stashed_run.get("bank")
        if not before or not self.began or before == bank.fingerprint:
            return
        if not any(member.renewed for member in self.members):
            rank_zero_warn(
                f"The bank is not that of the checkpoint: fingerprint {bank.fingerprint[:8]} with "
                f"{len(bank)} rows, and {before[:8]} before. Boundaries and histories of the other "
                "latents are left behind, and everything is measured anew. To go on with the old "
                "ones, give their bank: StageRun(bank=LatentBank.open(file))."
            )
        callback.renewed, self._records = True, {}
        callback.stash = {**(callback.stash or {}), "run": {}}

    def _bank_in_use(self) -> LatentBank | None:
        """The bank that was read, or one that was given; None before there is any."""
        return self._banks.get(id(self._read), next(iter(self._banks.values()), None))

    def given(self, callback: StageCallback) -> bool:
        """Whether the bank was given, and not read from the training set."""
        return self.option(callback, "bank") is not None

    def oracle(
        self,
        callback: StageCallback,
        path: ProbabilityPath | None = None,
        engine: Engine | None = None,
    ) -> Oracle:
        """The oracle over the bank of a callback; one for all that want the same.

        Args:
            callback: Who asks.
            path: Default that of the callback.
            engine: Default `Auto()`.
        """
        path, bank = path or self.path_of(callback)[0], self.bank(callback)
        for oracle in self._oracles:
            fits = engine is None or oracle.engine is engine
            if fits and oracle.bank is bank and same_path(oracle.path, path):
                return oracle
        self._oracles.append(Oracle(bank, path, engine))
        return self._oracles[-1]

    def class_wise(self, callback: StageCallback) -> bool:
        """Whether the posteriors of a callback are over the rows of the sample's class."""
        wise, bank = self.option(callback, "class_wise", "auto"), self.bank(callback)
        if wise is True and not bank.classes and not self.given(callback):
            raise ValueError(
                "class_wise=True, but no labels were found in the training batches. Say where they "
                f"are: {type(callback).__name__}(find=lambda batch: (batch[0], batch[1]))."
            )
        if wise is True:
            bank.require_classes()
        return bool(bank.classes) if wise == "auto" else wise

    @property
    def measuring(self) -> list[StageCallback]:
        """The callbacks that measure something against a bank."""
        return [member for member in self.members if member.measures]

    def renew(self) -> None:
        """Reads the training set again, because its latents have changed; a collective."""
        self._reread, self._measured_at = True, self.trainer.global_step
        self._records = {}
        self._forget()
        self.tell("renew")

    # -- the boundary -----------------------------------------------------------------------------

    def curve(self, recipe: Recipe, step: int, what: str) -> StageCurve:
        """The stage curve, measured by all ranks together; a collective.

        Args:
            recipe: What is asked.
            step: The same step gives the same queries, and is measured once.
            what: What is done, for messages of other ranks.
        """
        if self._curve is not None and self._curve[:2] == (recipe, step):
            return self._curve[2]
        trainer, root = self.trainer, self.trainer.strategy.root_device
        with self.together(what):
            curve = recipe.measure(
                step,
                device=oracle_device(root),
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(curve.values.to(root), reduce_op="sum")
            assert isinstance(total, Tensor)
            curve = StageCurve(curve.t, total.cpu())
        self._curve = recipe, step, curve
        return curve

    def recipe(self, oracle: Oracle, wise: bool) -> Recipe | None:
        """How somebody measures, or has measured, the boundary of an oracle; None if nobody does.

        Args:
            oracle: Bank and path.
            wise: Whether the posterior is over the rows of the sample's class.
        """
        bank = self._banks.get(id(oracle.bank), oracle.bank)
        for recipe in (*self._boundaries, *self.recipes):
            other = recipe.oracle
            same = self._banks.get(id(other.bank), other.bank) is bank
            if same and recipe.class_wise == wise and same_path(other.path, oracle.path):
                return recipe
        return None

    def boundary(self, oracle: Oracle, wise: bool) -> StageBoundary:
        """Where the stages meet: one answer for all callbacks of the run; a collective.

        It is what the first probe of a `PosteriorMonitor` measures, or would measure, at the start
        of the training; a resumed run keeps it.

        Args:
            oracle: See `recipe`, like the other.
            wise: Kind of posterior.

        Raises:
            ValueError: If the bank is spread over the ranks.
        """
        recipe = self.recipe(oracle, wise)
        if recipe in self._boundaries:
            return self._boundaries[recipe]
        require_whole_bank(oracle)
        recipe = recipe or Recipe.of(oracle, wise)
        recorded = self._records.get(_recorded_as(recipe))
        if recorded is None:
            curve = self.curve(recipe, self._measured_at, "measuring the boundary")
            found = curve.boundary(seed=recipe.seed)
        else:
            found = StageBoundary(**recorded)
        self._boundaries[recipe] = found
        return found

    def record(self, callback: StageCallback) -> dict[str, Any]:
        """What the state of a callback holds of the run: its bank's fingerprint, the boundaries."""
        bank = self.option(callback, "bank") or self._read
        found = {_recorded_as(recipe): one.as_dict() for recipe, one in self._boundaries.items()}
        return {
            "bank": "" if bank is None else bank.fingerprint,
            "boundaries": [
                {"path": path, "class_wise": wise, "boundary": boundary}
                for (path, wise), boundary in (self._records | found).items()
            ],
        }


def _recorded_as(recipe: Recipe) -> tuple[str, int]:
    """What a boundary is known by in a checkpoint: plain numbers and strings."""
    return repr(recipe.oracle.path), int(recipe.class_wise)
