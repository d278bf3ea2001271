"""`StageScheme`: steers what a LightningModule is trained on, without a change to the module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from stagewise import paths
from stagewise.adapters import Detach, Seam, find_seams, one_seam
from stagewise.adapters.base import parts
from stagewise.adapters.objective import Objective
from stagewise.adapters.paths import same_path
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, find_sample
from stagewise.callbacks.checks import beside_training, check_rows, together
from stagewise.callbacks.driving import (
    GatheredLosses,
    SchemeMeans,
    measured_boundary,
    reads_losses,
    refuse_unheard_events,
    steps_of,
)
from stagewise.callbacks.named import NamedCallback
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.training_bank import bank_from_trainer, shard_from_trainer
from stagewise.callbacks.writer import Writer
from stagewise.certificate import Certificate
from stagewise.engines import Engine, Sharded
from stagewise.losses import StageWeightedLoss
from stagewise.oracle import Oracle
from stagewise.schemes import Phases, Scheme
from stagewise.stages import StageBoundary
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler
from stagewise.weights import Weight

__all__ = ["StageScheme"]

_CURE = (
    "Say what to steer: StageScheme(timesteps=..., target=..., weight=...), or a Scheme or Phases."
)


class StageScheme(NamedCallback):
    """Puts a scheme into whatever makes the targets in the module, and takes it out at the end.

    What makes the targets is found by its interface (`stagewise.adapters`): a `FlowMatchingLoss`, a
    torchcfm matcher, a flow_matching path, a SiT or LightningDiT transport, an EDM loss. A module
    that has the very scheme as an attribute, and asks it in its training step, is left as it is.
    A matcher or path never sees the loss: for weights the module needs a `StageWeightedLoss` of the
    same scheme. Validation sees the plain targets, so its loss stays comparable.

    In the first step the samples that the scheme is given are held against the bank: another scale
    is refused, and samples that are no rows of it are warned of, with their share.

    The boundary of the stages, if it is not given, is that of the first probe of a
    `PosteriorMonitor` that stands before this callback and watches the same path; otherwise it is
    measured once, before the first step. It does not change afterwards, and a resumed run keeps it.

    **Logged to every logger of the trainer** at its `log_every_n_steps` (`stagewise_scheme` is
    `name`), as means over the samples of all ranks since the time before:

    - `stagewise_scheme/lambda`: share of the oracle in the target.
    - `stagewise_scheme/navigation_share`: share of the draws with t below the boundary (NaN if
      nothing depends on a boundary).
    - `stagewise_scheme/weight`: weight of a sample.
    - `stagewise_scheme/inserted_share`: share of samples that are no rows of the bank, and were put
      into its posterior; `stagewise_scheme/tail_mass`: share of the posterior that did not enter.
      Both over the samples that were mixed (NaN if none was).
    - `stagewise_scheme/boundary`: t; `stagewise_scheme/phase`: number of the phase, from 0.

    A change of phase is logged at its step as `stagewise_scheme/transition`, the number of the new
    phase, as text to TensorBoard, and as a line of `stages.jsonl` in `dirpath`.

    Args:
        scheme: A `Scheme` or `Phases`, or a function that makes one of the oracle, (oracle) ->
            scheme, for phases over a bank that is read from the training. Default None: made from
            the parts below; without any, the scheme that the module's `FlowMatchingLoss` has.
        target: See `Scheme`, like the next four.
        timesteps: How t is drawn; default: as the module does it.
        weight: From t to the weight of a sample.
        boundary: Where navigation meets refinement.
        preserve_objective: Whether weights make up for `timesteps`.
        class_wise: Whether posteriors are over the rows of the sample's class.
        bank: The training latents *as the model is trained on them*. Default: those of the
            `PosteriorMonitor` that stands before this callback, or else read from the training data
            loader. Not needed with a `scheme` that has an oracle.
        engine: How the oracle reaches the rows, default `Auto()`. With `Sharded()` the bank is this
            rank's part, and training must say the `source` of its samples.
        certificate: A `Certificate` of the bank, or the file of one, which is written before the
            first step if there is none of this bank: queries that it answers need no search.
            Default None. Not with a `scheme` that has an oracle, nor with `Sharded()`.
        seam: Name of what makes the targets, such as "module.FM". Default: there is one only.
        find: From a batch to `(x_1, labels or None)`, for reading the bank.
        dirpath: Where `stages.jsonl` goes; default `<trainer.log_dir>/<name>`, or without a logger
            `<trainer.default_root_dir>/<name>_logs`.
        name: Prefix of all tags and name of the folder, default "stagewise_scheme".
        seed: Of random rows and of the measurement, default 0.

    Raises:
        ValueError: At construction if both a scheme and parts are given; before the first training
            step if nothing or several things make the targets, they cannot do what the scheme asks
            for, a phase waits for an event that nothing says, or the samples are not at the scale
            of the bank, with the cure.
        RuntimeError: In the first training step, if it did not use what was steered.
    """

    def __init__(
        self,
        scheme: Scheme | Phases | Callable[[Oracle], Scheme | Phases] | None = None,
        *,
        target: Target | None = None,
        timesteps: TimestepSampler | None = None,
        weight: Weight | Callable[[Tensor], Tensor] | None = None,
        boundary: float | None = None,
        preserve_objective: bool = False,
        class_wise: bool | Literal["auto"] = "auto",
        bank: LatentBank | None = None,
        engine: Engine | None = None,
        certificate: Certificate | str | Path | None = None,
        seam: str | None = None,
        find: FindSample = find_sample,
        dirpath: str | Path | None = None,
        name: str = "stagewise_scheme",
        seed: int = 0,
    ) -> None:
        steers: dict[str, Any] = {
            "target": target,
            "timesteps": timesteps,
            "weight": weight,
            "boundary": boundary,
            "preserve_objective": preserve_objective or None,
            "class_wise": None if class_wise == "auto" else class_wise,
        }
        self._parts = {key: part for key, part in steers.items() if part is not None}
        if scheme is not None and self._parts:
            raise ValueError(
                "Expected a scheme or its parts, got both. Give the parts to the scheme: "
                "Scheme(timesteps=..., target=..., weight=...)."
            )
        self._make: Callable[[Oracle], Scheme | Phases] | None = None
        if scheme is not None and not isinstance(scheme, Scheme | Phases):
            if not callable(scheme):
                raise TypeError(
                    f"Expected `scheme` to be a Scheme or Phases, or a function that makes one of "
                    f"an oracle, got {scheme!r}. {_CURE}"
                )
            self._make, scheme = scheme, None
        self.scheme = scheme
        self.bank, self.engine, self.find, self.dirpath = bank, engine, find, dirpath
        self.certificate = certificate
        self.name, self.seed = name, seed
        self.transitions: list[dict[str, Any]] = []
        self.seam: Seam | None = None
        self._at, self._given = seam, scheme
        self._begin: dict[str, Any] | None = None
        self._set_up = False
        self._stash: dict[str, Any] | None = None
        self._detach: Detach | None = None
        self._losses: GatheredLosses | None = None
        self._paused = False

    @property
    def state_key(self) -> str:
        """That of its name once it is set up.

        Before it is its own: of two with one name training says what is wrong, and not Lightning.
        """
        return super().state_key if self._set_up else f"{super().state_key} {id(self)}"

    def state_dict(self) -> dict[str, Any]:
        """The scheme's state and the transitions so far; never the bank."""
        scheme = None if self.scheme is None else self.scheme.state_dict()
        share = None if self._losses is None else self._losses.share
        return {"scheme": scheme, "transitions": self.transitions, "share": share}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state of a checkpoint for the start of training."""
        self._stash = state_dict

    # -- hooks --------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here on checkpoints know it by its name."""
        self._set_up = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds what makes the targets, and puts the scheme in."""
        self._settled = False
        self.seam = self._found(pl_module)
        self._refuse_others(trainer)
        self.scheme = self._given or self._made(trainer, pl_module)
        self._weighed = any(
            isinstance(module, StageWeightedLoss)
            and getattr(module.weight, "__self__", None) is self.scheme
            for module in pl_module.modules()
        )
        if self.seam is not None:
            self.seam.check(self.scheme, weighed=self._weighed)
        reader = reads_losses(self.scheme)
        if reader and not (self.seam is not None and self.seam.losses):
            raise ValueError(
                f"{reader} needs each sample's loss, which {self._where()} never sees. Train with "
                "FlowMatchingLoss, or call scheme.observe(t=..., loss=...) in a loop of your own."
            )
        self._losses = GatheredLosses() if reader else None
        self._total = steps_of(trainer, self.scheme)
        self._resume(trainer)
        self._writer = Writer(trainer, self.name, self.dirpath)
        about = self._where() if self.seam is None else self.seam.describe()
        rank_zero_info(f"StageScheme: steers {about}; {self._writer.describe()}")
        header = {"event": "scheme", "seam": about, "path": repr(self._path)}
        self._writer.start([header, *self.transitions], resumed=bool(self._stash))
        self._stash = None
        self._step, self._seen = trainer.global_step, self.scheme.last
        self._means = SchemeMeans()
        self._used = False
        self._attach()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch: settles the boundary, and refuses what cannot work."""
        if self._settled:
            return
        scheme = self._scheme
        refuse_unheard_events(trainer, scheme)
        if any(part.boundary is None for part in parts(scheme)):
            boundary = self._watched(trainer)
            if boundary is None and scheme.lacks_boundary:
                boundary = self._measured(trainer, pl_module)
            if boundary is not None:
                scheme.set_boundary(boundary)
                rank_zero_info(f"StageScheme: the stages meet at t = {scheme.boundary:.3f}")
        scheme.check()
        self._settled = True

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Refuses a first training step that did not use what is steered, or not with its bank."""
        if self._used:
            return
        record = self._scheme.last
        if record is None or record is self._seen:
            raise RuntimeError(
                f"The first training step made its target without {self._where()}, so nothing is "
                "steered. If another object makes it, say which: seam=...; if the step itself "
                "does, write there u, w = scheme(x1 - x0, xt=xt, t=t, x1=x1)."
            )
        with together(trainer, "holding its samples against the bank"):
            oracles = [part.oracle for part in parts(self._scheme) if part.target is not None]
            for bank, shard in {
                oracle.bank: isinstance(oracle.engine, Sharded) for oracle in oracles if oracle
            }.items():
                check_rows(bank, record.x1, known=record.source is not None, shard=shard)
        self._used = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes note of the batch; after an optimizer step, drives the scheme and logs."""
        scheme = self._scheme
        if scheme.last is not self._seen and scheme.last is not None:
            self._seen = scheme.last
            self._means.add(scheme.last, scheme.boundary)
            if self._losses is not None and self.seam is not None and self.seam.last is not None:
                self._losses.add(*self.seam.last)
        # With gradient accumulation several batches share a step.
        step, last = trainer.global_step, self._step
        if step == last:
            return
        self._step = step
        # Several optimizers advance it by more than one; 0 is never.
        every = getattr(trainer, "log_every_n_steps", 0)
        if every and step // every > last // every:
            self._log(trainer, step)
        t, loss = (None, None) if self._losses is None else self._losses.gathered(trainer)
        for message in scheme.observe(step=step, total=self._total, t=t, loss=loss):
            self._announce(message, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the scheme out: validation compares with the plain targets."""
        self._paused = self._detach is not None
        self._restore()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts it back."""
        if self._paused:
            self._attach()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the scheme out."""
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Takes the scheme out."""
        self._restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the scheme out, and lets go of the module."""
        self._restore()
        self.seam = None

    # -- set-up -------------------------------------------------------------------------------

    @property
    def _scheme(self) -> Scheme | Phases:
        assert self.scheme is not None
        return self.scheme

    @property
    def _path(self) -> paths.Path:
        """That of training, which a scheme without an oracle need not know."""
        return self._scheme.path if self.seam is None else self.seam.path

    def _attach(self) -> None:
        self._paused = False
        if self.seam is not None:
            self._detach = self.seam.attach(self._scheme, weighed=self._weighed)

    def _restore(self) -> None:
        if self._detach is not None:
            self._detach()
        self._detach = None

    def _found(self, pl_module: pl.LightningModule) -> Seam | None:
        """What makes the targets; None if the module has the scheme, and asks it itself."""
        if self._given is None or self._at is not None:
            return one_seam(pl_module, self._at)
        # An objective that has it sees the losses too.
        ours = [seam for seam in find_seams(pl_module) if _scheme_of(seam) is self._given]
        if len(ours) == 1:
            return ours[0]
        held = any(value is self._given for value in vars(pl_module).values())
        return None if held else one_seam(pl_module)

    def _where(self) -> str:
        return "the scheme that the module holds" if self.seam is None else self.seam.name

    def _refuse_others(self, trainer: pl.Trainer) -> None:
        callbacks = getattr(trainer, "callbacks", [self])
        for other in callbacks[: callbacks.index(self)]:
            if not isinstance(other, StageScheme):
                continue
            mine, theirs = self.seam, other.seam
            same = mine and theirs and mine.place.object is theirs.place.object
            if same or (self._given is not None and other._given is self._given):
                raise ValueError(
                    f"Two StageScheme callbacks, {other.name!r} and {self.name!r}, steer the same: "
                    f"{self._where()}. Use one: StageScheme(timesteps=..., target=..., weight=...)."
                )
            if other.name == self.name:
                raise ValueError(
                    f"Expected a name for each StageScheme, got two with {self.name!r}, which "
                    "share tags, files and state. Give it: StageScheme(..., name=...)."
                )

    def _made(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Scheme | Phases:
        """The scheme of the parts, or the one that the module's loss has."""
        assert self.seam is not None
        if self._make is not None:
            made = self._make(self._oracle(trainer, pl_module, self.seam.path))
            if not isinstance(made, Scheme | Phases):
                raise TypeError(f"Expected a function that makes a Scheme or Phases, got {made!r}.")
            return made
        if not self._parts:
            own = _scheme_of(self.seam)
            if own is None:
                raise ValueError(f"Expected something to steer with, got nothing. {_CURE}")
            if own is not self.scheme:  # that of another module than in the fit before
                self._begin = None
            return own
        given = {"seed": self.seed, **self._parts}
        if "target" not in given:
            return Scheme(path=self.seam.path, **given)
        return Scheme(self._oracle(trainer, pl_module, self.seam.path), **given)

    def _oracle(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: paths.Path
    ) -> Oracle:
        bank, certificate = self._bank(trainer, pl_module), self.certificate
        if certificate is None or isinstance(certificate, Certificate):
            return Oracle(bank, path, self.engine, certificate=certificate)
        wise = bool(bank.classes) and self._parts.get("class_wise") is not False
        # One of each host first; the others find its file.
        for first in (True, False):
            with together(trainer, "reading its certificate"):
                if first == (trainer.local_rank == 0):
                    made = Certificate.cached(certificate, bank, class_wise=wise)
        return Oracle(bank, path, self.engine, certificate=made)

    def _bank(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LatentBank:
        bank = self.bank
        if bank is None and isinstance(self.engine, Sharded):
            bank = shard_from_trainer(trainer)
        watched = [monitor.oracle.bank for monitor in self._monitors(trainer) if monitor.oracle]
        if bank is None and watched:
            bank = watched[0]
        if bank is None:
            wise = self._parts.get("class_wise", True)
            bank = bank_from_trainer(trainer, pl_module, find=self.find, class_wise=wise)
        return beside_training(bank, trainer)

    def _monitors(self, trainer: pl.Trainer) -> list[PosteriorMonitor]:
        """Those that stand before this callback, whose hooks have run when its own do."""
        callbacks = getattr(trainer, "callbacks", [self])
        before = callbacks[: callbacks.index(self)]
        return [callback for callback in before if isinstance(callback, PosteriorMonitor)]

    def _resume(self, trainer: pl.Trainer) -> None:
        """Takes up the state of a checkpoint; a callback in a second fit begins anew."""
        if self._begin is None:
            self._begin = copy.deepcopy(self._scheme.state_dict())
        stash = self._stash or {"scheme": self._begin, "transitions": []}
        if self._stash is None and trainer.global_step:
            return
        if stash["scheme"] is not None:
            self._scheme.load_state_dict(copy.deepcopy(stash["scheme"]))
        self.transitions = list(stash["transitions"])
        if self._losses is not None:
            self._losses.share = stash.get("share")

    def _watched(self, trainer: pl.Trainer) -> StageBoundary | None:
        """What a monitor of the same path has measured."""
        for monitor in self._monitors(trainer):
            if monitor.oracle and same_path(monitor.oracle.path, self._path):
                return monitor.boundary
        return None

    def _measured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> StageBoundary:
        for part in parts(self._scheme):
            if part.oracle is not None:
                oracle, wise = part.oracle, part.class_wise
                break
        else:
            oracle = self._oracle(trainer, pl_module, self._path)
            wise = bool(oracle.bank.classes)
        return measured_boundary(trainer, oracle, class_wise=wise, seed=self.seed)

    # -- per step -----------------------------------------------------------------------------

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        boundary = self._scheme.boundary
        values = self._means.reduced(trainer)
        values["boundary"] = math.nan if boundary is None else boundary
        values["phase"] = float(getattr(self._scheme, "index", 0))
        scalars = {f"{self.name}/{key}": value for key, value in values.items()}
        self._writer.scalars(scalars, step - 1)

    def _announce(self, message: str, step: int) -> None:
        index = getattr(self._scheme, "index", 0)
        event = {"event": "transition", "step": step, "phase": index, "message": message}
        self.transitions.append(event)
        self._writer.event(event)
        self._writer.scalars({f"{self.name}/transition": float(index)}, step - 1)
        self._writer.text(f"{self.name}/transition", message, step - 1)
        rank_zero_info(f"StageScheme: {message}")


def _scheme_of(seam: Seam) -> Scheme | Phases | None:
    """What an objective steers itself with, if anything."""
    return seam.place.object.scheme if isinstance(seam, Objective) else None
