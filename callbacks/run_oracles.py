"""`RunOracles`: bank, path, oracles and boundaries of a run, the same for all callbacks.

Methods take the callback that asks. It gets its own option, or that of the `StageRun`, or that of
another callback, or what is found in the training, in this order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from stagewise.adapters.encoding import Encoding
from stagewise.bank import LatentBank
from stagewise.batches import ReadBatch, find_sample
from stagewise.callbacks.host import Host
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.callbacks.stage_callback import StageCallback
from stagewise.callbacks.training_bank import Samples, read_bank, read_rows
from stagewise.callbacks.writer import Writer
from stagewise.certificate import Certificate
from stagewise.condition import ConditionedOracle
from stagewise.conventions import Convention
from stagewise.engines import Engine
from stagewise.memory import oracle_device
from stagewise.oracle import Oracle
from stagewise.paths import LinearPath, same_path
from stagewise.paths import Path as ProbabilityPath
from stagewise.reservoir import Reservoir
from stagewise.schemes import Scheme
from stagewise.stages import Recipe, StageBoundary, StageCurve, require_whole_bank
from stagewise.through_module import through_module

__all__ = ["RunOracles"]

Kind = TypeVar("Kind", bound=StageCallback)

_NOT_SHARED = ("seed", "dirpath", "target_maker")
"""Options that hold for the callback alone."""


class RunOracles(StageCallback):
    """The part of `StageRun` that the callbacks ask.

    Attributes:
        host: The training.
        module: What is trained.
        members: The stage callbacks, in the order in which the run calls them.
        began: Optimizer steps at the start of training.
        encoding: What training makes of x_1, as its first step has shown; None if nothing.
        path: The path of training; `path_from`: how it is known, empty if it is assumed.
        recipes: How boundaries are measured; `measured_at`: the step that seeds their draws.
        reservoir: The samples seen, if they stand for the training set.
        waiting: Callbacks that start once it is full.
        restarted: Whether the bank was read again through `encoding` in the first step.
    """

    reservoir: Reservoir | None = None
    waiting: Sequence[StageCallback] = ()
    restarted = False

    host: Host
    module: nn.Module
    members: list[StageCallback]
    began: int
    encoding: Encoding | None = None
    path: ProbabilityPath
    path_from: str

    def forget(self) -> None:
        """Drops the bank, and all that was made from it."""
        self._banks: WeakKeyDictionary[LatentBank, LatentBank] = WeakKeyDictionary()
        self._read: LatentBank | None = None
        self._oracles: list[Oracle] = []
        self.recipes: list[Recipe] = []
        self._boundaries: dict[Recipe, StageBoundary] = {}
        self._curve: tuple[Recipe, int, StageCurve] | None = None

    def recall(self) -> None:
        """Takes boundaries and encoding from a checkpoint, and forgets everything else."""
        self.forget()
        self._reread, self.measured_at = False, self.began
        steps = (member.stashed_run.get("encoding") for member in self.members if self.began)
        self.encoding = next((Encoding(_nested(each, tuple)) for each in steps if each), None)
        kept = [member.stashed_run.get("boundaries") for member in self.members if self.began]
        self._records: dict[tuple[str, int], dict[str, float]] = {
            (old["path"], old["class_wise"]): old["boundary"]
            for old in next(filter(None, kept), [])
        }

    # -- options --------------------------------------------------------------------------------

    def option(self, callback: StageCallback, key: str, default: Any = None) -> Any:
        """The option of a callback: its own, that of the run, or that of another callback."""
        if key == "bank" and self._reread:
            return default
        for who in (callback, self):
            if key in who.options:
                return who.options[key]
        others = [member for member in (*self.members, *self.waiting) if key in member.options]
        if key in _NOT_SHARED or not others:
            return default
        first: Any = others[0].options[key]
        for who in others[1:]:
            other: Any = who.options[key]
            if not _ALIKE.get(key, operator.is_)(first, other):
                one, two = type(others[0]).__name__, type(who).__name__
                raise ValueError(
                    f"{one}({key}={first!r}) and {two}({key}={other!r}) differ, and "
                    f"{type(callback).__name__} has neither. Give one for all: "
                    f"callbacks=[StageRun({key}=...), ...]."
                )
        return first

    def read_batch_of(self, callback: StageCallback) -> ReadBatch:
        """From a batch to `(x_1, labels or None)`; a data module may have its own `find_sample`."""
        own = getattr(self.host.data, "find_sample", find_sample)
        read_batch = self.option(callback, "read_batch", own)
        encode = self.option(callback, "encode") or self.encoding
        return through_module(read_batch, self.module, encode, lambda: self.host.precision())

    def open_writer(self, callback: StageCallback) -> Writer:
        """The writer of a callback; a collective."""
        folder = callback.dirpath
        if folder is None and self.dirpath is not None:
            folder = Path(self.dirpath) / callback.name
        return Writer(self.host, callback.name, folder)

    def first(self, kind: type[Kind]) -> Kind | None:
        """The first callback of a class by `order` and name, None if there is none."""
        return next((member for member in self.members if isinstance(member, kind)), None)

    # -- path, bank and oracle --------------------------------------------------------------------

    def path_of(self, callback: StageCallback) -> tuple[ProbabilityPath, str]:
        """The path of a callback, and how it is known."""
        given = self.option(callback, "path")
        if given is None:
            return self.path, self.path_from or "assumed; say path=... if training uses another"
        return given, "given"

    def bank(self, callback: StageCallback) -> LatentBank:
        """The bank of a callback: the one that was given, or one read from the training set.

        A collective, as the first call reads. Warns if a checkpoint is of another bank.
        """
        bank = self.option(callback, "bank")
        if bank is None and self.reservoir is not None:
            return self.reservoir
        if bank is None:
            wise = (self.option(member, "class_wise") for member in self.members)
            self._read = self._read or read_bank(
                self.host,
                read_batch=self.read_batch_of(callback),
                class_wise=any(each is not False for each in wise),
                condition=self.option(callback, "condition"),
            )
            bank = self._read
        moved = self.moved(bank)
        self._read = moved if bank is self._read else self._read  # frees the one on the host
        self._compare_with_checkpoint(callback, moved)
        return moved

    def moved(self, bank: LatentBank) -> LatentBank:
        """A bank on the training device if it fits (`beside_training`), moved once for all."""
        if bank not in self._banks:
            taken = still_to_come(self.host.optimizers)
            moved = bank.beside_training(self.host.device, taken)
            self._banks[bank] = self._banks[moved] = moved
        return self._banks[bank]

    def _compare_with_checkpoint(self, callback: StageCallback, bank: LatentBank) -> None:
        before = callback.stashed_run.get("bank")
        if not before or not self.began:
            return
        bank.require_intact()
        was, kernel = callback.stashed_run.get("condition"), self._kernel(callback)
        weighed = was is not None and was != kernel
        if before == bank.fingerprint and not weighed:
            return
        if not any(member.renewed for member in self.members):
            rank_zero_warn(
                f"Rows are weighed by {kernel or 'nothing'}, and in the checkpoint by "
                f"{was or 'nothing'}: everything is measured again."
                if weighed
                else f"The bank is not that of the checkpoint: fingerprint {bank.fingerprint[:8]} "
                f"with {len(bank)} rows, and {before[:8]} before. Boundaries and histories of the "
                "old latents are dropped, and everything is measured again. To go on with the old "
                "latents, give their bank: StageRun(bank=LatentBank.open(file))."
            )
        callback.renewed, self._records = True, {}
        callback.stash = {**(callback.stash or {}), "run": {}}

    def _kernel(self, callback: StageCallback) -> str:
        """The kernel that weighs the rows of a callback; empty if there is none."""
        condition = self.option(callback, "condition")
        return "" if condition is None else repr(condition)

    def share_bank(self, schemes: Iterable[Scheme]) -> None:
        """Gives oracles of schemes the bank that was moved, so that it is in memory once."""
        for oracle in (scheme.oracle for scheme in schemes):
            if oracle is not None and oracle.engine.holds_all_rows:
                oracle.bank = self.moved(oracle.bank)
                oracle.engine.prepare(oracle.bank)

    def bank_in_use(self) -> LatentBank | None:
        """The bank that was read, or one that was given; None before there is any."""
        if self.reservoir is not None:
            return self.reservoir
        return self._read or next(iter(self._banks.values()), None)

    def given(self, callback: StageCallback) -> bool:
        """Whether the bank was given, and not read from the training set."""
        return self.option(callback, "bank") is not None

    def oracle(
        self,
        callback: StageCallback,
        path: ProbabilityPath | None = None,
        engine: Engine | None = None,
        certificate: Certificate | str | Path | None = None,
    ) -> Oracle:
        """The oracle of a callback, shared by those that need the same.

        With a certificate, or a file of one, it is a collective; a missing file is written.
        """
        path, bank = path or self.path_of(callback)[0], self.bank(callback)
        condition = self.option(callback, "condition")
        if condition is not None and (engine or certificate):
            raise ValueError(
                f"{condition!r} weighs all rows, so it allows no engine and no certificate. Leave "
                f"them out: {type(callback).__name__}(condition=Condition(bandwidth=...))."
            )
        if certificate is not None:
            # The first process of each machine writes the file; the others read it.
            for first in (True, False):
                with self.host.together("reading its certificate"):
                    mine = first == (self.host.local_rank == 0)
                    if mine and not isinstance(certificate, Certificate):
                        wise = self.class_wise(callback)
                        certificate = Certificate.cached(certificate, bank, class_wise=wise)
            assert isinstance(certificate, Certificate)
            return Oracle(bank, path, engine, certificate=certificate)
        for oracle in self._oracles:
            fits = engine is None or oracle.engine is engine
            fits = fits and oracle.condition == condition
            if fits and oracle.bank is bank and same_path(oracle.path, path):
                return oracle
        weighed = condition and ConditionedOracle(bank, path, condition)
        self._oracles.append(weighed or Oracle(bank, path, engine))
        return self._oracles[-1]

    def read(self, callback: StageCallback, loader: Any, count: int) -> Samples:
        """Random samples of a loader, and labels or None; see `read_rows`."""
        read_batch, seed = self.read_batch_of(callback), callback.seed
        return read_rows(self.host, loader, count, read_batch=read_batch, seed=seed)

    def class_wise(self, callback: StageCallback) -> bool:
        """Whether the posteriors of a callback are over the rows of the sample's class."""
        wise, bank = self.option(callback, "class_wise", "auto"), self.bank(callback)
        if wise is True and not bank.classes and not self.given(callback):
            raise ValueError(
                "class_wise=True, but no labels were found in the training batches. Say where they "
                f"are: {type(callback).__name__}(read_batch=lambda batch: (batch[0], batch[1]))."
            )
        if wise is True:
            bank.require_classes()
        return bank.labelled if wise == "auto" else wise

    # -- the boundary -----------------------------------------------------------------------------

    def curve(self, recipe: Recipe, step: int, what: str) -> StageCurve:
        """The stage curve, measured by all ranks together, once for each step; a collective."""
        if self._curve is not None and self._curve[:2] == (recipe, step):
            return self._curve[2]
        host = self.host
        ranks = {"rank": host.rank, "world_size": host.world_size}
        with self.host.together(what):
            curve = recipe.measure(step, device=oracle_device(host.device), **ranks)
        curve = StageCurve(curve.t, host.reduce(curve.values).cpu())
        self._curve = recipe, step, curve
        return curve

    def recipe(self, oracle: Oracle, wise: bool) -> Recipe | None:
        """How the boundary of this posterior is measured; None if no callback measures it."""
        bank = self._banks.get(oracle.bank, oracle.bank)
        for recipe in (*self._boundaries, *self.recipes):
            other = recipe.oracle
            same = self._banks.get(other.bank, other.bank) is bank
            same = same and other.condition == oracle.condition
            if same and recipe.class_wise == wise and same_path(other.path, oracle.path):
                return recipe
        return None

    def boundary(self, oracle: Oracle, wise: bool) -> StageBoundary:
        """The one boundary of the run for this posterior; a collective.

        It is that of the first probe of a `PosteriorMonitor`, also if there is no such monitor. A
        resumed run keeps it.
        """
        if oracle.bank is self.reservoir and not self.reservoir.full:
            raise ValueError(
                f"The boundary is needed before the first step, and {self.reservoir!r} is not full "
                'by then. Give it: StageScheme(target=Mix("boundary"), boundary=0.3), or use a '
                "target that needs none: StageScheme(target=Mix())."
            )
        recipe = self.recipe(oracle, wise)
        if recipe in self._boundaries:
            return self._boundaries[recipe]
        require_whole_bank(oracle)
        recipe = recipe or Recipe.of(oracle, wise)
        recorded = self._records.get(_recorded_as(recipe))
        if recorded is None:
            curve = self.curve(recipe, self.measured_at, "measuring the boundary")
            found = curve.boundary(seed=recipe.seed)
        else:
            found = StageBoundary(**recorded)
        self._boundaries[recipe] = found
        return found

    def record(self, callback: StageCallback) -> dict[str, Any]:
        """The run's part of a callback's state: fingerprint of the bank, encoding, boundaries."""
        bank = self.option(callback, "bank")
        bank = self._read if bank is None else bank
        found = {_recorded_as(recipe): one.as_dict() for recipe, one in self._boundaries.items()}
        return {
            "bank": "" if bank is None else bank.fingerprint,
            "condition": self._kernel(callback),
            "encoding": [] if self.encoding is None else _nested(self.encoding.steps, list),
            "boundaries": [
                {"path": path, "class_wise": wise, "boundary": boundary}
                for (path, wise), boundary in (self._records | found).items()
            ],
        }


def _same_convention(one: Convention, two: Convention) -> bool:
    return one == two and same_path(one.path or LinearPath(), two.path or LinearPath())


_ALIKE: dict[str, Callable[[Any, Any], bool]] = {
    "path": same_path,
    "condition": operator.eq,
    "convention": _same_convention,
}
"""When options of two callbacks agree; others must be the same object."""


def _nested(steps: Any, kind: type) -> Any:
    """The steps of an encoding with tuples and lists turned into one of them, `kind`."""
    if isinstance(steps, (tuple, list)):
        return kind(_nested(each, kind) for each in steps)
    return steps


def still_to_come(optimizers: Iterable[Optimizer]) -> int:
    """Bytes that training will still allocate: gradients, and two moments of each parameter."""
    return sum(
        value.numel() * value.element_size() * ((value.grad is None) + 2 * (value not in one.state))
        for one in optimizers
        for group in one.param_groups
        for value in group["params"]
    )


def _recorded_as(recipe: Recipe) -> tuple[str, int]:
    """The key of a boundary in a checkpoint, of plain numbers and strings."""
    weighed = f", {recipe.oracle.condition!r}" if recipe.oracle.condition else ""
    return repr(recipe.oracle.path) + weighed, int(recipe.class_wise)
