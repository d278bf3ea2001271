"""`StageScheme`: steers what a LightningModule is trained on, without a change to the module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Unpack, override

from stagewise.adapters import Detach, TargetMaker
from stagewise.bank import LatentBank
from stagewise.callbacks.first_batches import refuse_other_rows
from stagewise.callbacks.ranks import GatheredLosses, SchemeMeans
from stagewise.callbacks.stage_callback import RunOptions, StageCallback
from stagewise.callbacks.stage_transitions import refuse_unheard
from stagewise.callbacks.target_maker import maker_for, own_scheme, refuse_engine, refuse_second
from stagewise.callbacks.training_bank import read_shard
from stagewise.certificate import Certificate
from stagewise.engines import Engine
from stagewise.losses.weighted import weighs
from stagewise.oracle import Oracle
from stagewise.schemes import Phases, Scheme, mixes, parts
from stagewise.schemes.refusals import check_rows, tell_rounding
from stagewise.schemes.words import in_words
from stagewise.stage_target import BY_HAND
from stagewise.stages import StageBoundary
from stagewise.targets import Target
from stagewise.timesteps import TimestepSampler
from stagewise.weights import Weight

__all__ = ["StageScheme"]


class StageScheme(StageCallback):
    """Steers what a module is trained on by a scheme, without a change to the module.

    What makes its targets is found by its interface: a `FlowMatchingLoss`, a `StageTarget` in a
    step that writes its target out, a torchcfm matcher, a flow_matching path, a SiT or LightningDiT
    transport, an EDM loss. A module that calls the same scheme itself is left as it is. A matcher
    or path has no loss: for weights the module needs a `StageWeightedLoss` of the same scheme.
    Validation has the plain targets, so its loss stays comparable.

    In the first step samples are compared with the bank: another scale is refused, and samples that
    are not rows get a warning. A target that mixes the oracle in is refused for a network that is
    given more than x_t, t and class labels, unless class_wise=False says that it ignores that. A
    boundary that is not given is measured.

    **Logged to every logger** at the trainer's `log_every_n_steps` (`stagewise_scheme` is `name`),
    as means over the samples of all ranks since the last time: `stagewise_scheme/lambda`,
    `.../weight`, `.../navigation_share` (of t below the boundary; NaN without one), and of mixed
    samples `.../inserted_share` (added to the posterior, as they are not rows) and
    `.../tail_mass`; also `.../boundary`, t, and `.../phase`, its number, from 0. A change of phase
    is `.../transition`, a text in TensorBoard, and a line of `stages.jsonl` in `dirpath`.

    Args:
        scheme: A `Scheme` or `Phases`, or a function from the oracle of the training to one.
            Default: of the parts below; without any, that of the module's `FlowMatchingLoss`.
        target: See `Scheme`, like `timesteps` (default: as the module draws them), `weight`,
            `boundary` and `preserve_objective`.
        engine: How the oracle reaches the rows, default `Auto()`. With `Sharded()` the bank is this
            rank's part, and training must say the `source` of its samples.
        certificate: A `Certificate` of the bank, or a file, which is written if it does not hold
            that of this bank. Not with a `scheme` that has an oracle, nor with `Sharded()`.
        name: Prefix of all tags and name of the folder, default "stagewise_scheme". Two callbacks
            in one trainer need two names.
        bank: The training latents, if they are not to be read from the loader.
        **options: See `RunOptions`. A `scheme` with an oracle gives bank and path itself.

    Raises:
        ValueError: At construction or before the first training step, for what cannot be steered.

    Example:
        >>> from stagewise import Mix
        >>> from stagewise.callbacks import StageScheme
        >>> callback = StageScheme(target=Mix("boundary"))
    """

    order, steers = 5, True
    maker: TargetMaker | None = None
    _detach: Detach | None = None
    _plain = 0  # optimizer steps since one was steered

    def __init__(
        self,
        scheme: Scheme | Phases | Callable[[Oracle], Scheme | Phases] | None = None,
        *,
        target: Target | None = None,
        timesteps: TimestepSampler | None = None,
        weight: Weight | Callable[[Tensor], Tensor] | None = None,
        boundary: float | None = None,
        preserve_objective: bool = False,
        engine: Engine | None = None,
        certificate: Certificate | str | Path | None = None,
        name: str = "stagewise_scheme",
        bank: LatentBank | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(name, bank, **options)
        steers: dict[str, Any] = {"target": target, "timesteps": timesteps, "weight": weight}
        steers |= {"boundary": boundary, "preserve_objective": preserve_objective or None}
        self._parts = {key: part for key, part in steers.items() if part is not None}
        if scheme is not None and (self._parts or "class_wise" in self.options):
            raise ValueError(
                "Expected a scheme or its parts, got both. Give the parts to the scheme: "
                "Scheme(timesteps=..., target=..., weight=...)."
            )
        self._make: Callable[[Oracle], Scheme | Phases] | None = None
        if scheme is not None and not isinstance(scheme, Scheme | Phases):
            if not callable(scheme):
                kinds = "a Scheme or Phases, or a function of an oracle (Scheme.two_stage)"
                raise TypeError(f"Expected `scheme` to be {kinds}, got {scheme!r}.")
            self._make, scheme = scheme, None
        self.scheme: Scheme | Phases = scheme  # type: ignore[assignment]
        self.engine, self.certificate, self._given = engine, certificate, scheme
        self.transitions: list[dict[str, Any]] = []
        self._begin: dict[str, Any] | None = None
        self._losses: GatheredLosses | None = None
        given = [] if scheme is None else parts(scheme)  # with an oracle: its bank and path
        refuse_engine(given, engine or certificate)
        oracles = [p.oracle for p in given if p.oracle and p.oracle.engine.holds_all_rows]
        if oracles and all(oracle.bank is oracles[0].bank for oracle in oracles):
            known: dict[str, Any] = {"path": oracles[0].path, "condition": oracles[0].condition}
            known["reservoir" if oracles[0].bank.origin else "bank"] = oracles[0].bank
            self.options = {key: v for key, v in known.items() if v is not None} | self.options
        for smoothing in (p.smoothing for p in given if p.smoothing and not oracles):
            self.options = {"bank": smoothing.bank} | self.options

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        """Whether the oracle goes into its targets."""
        return self.scheme is not None and mixes(self.scheme)

    @property
    def late(self) -> bool:  # type: ignore[override]
        """Whether its scheme can be replaced in the first call."""
        fixed = self._given or self.scheme.draws_timesteps or self.scheme.smoothing
        return not fixed and self.maker is not None and self.maker.late

    def __getstate__(self) -> dict[str, Any]:
        """As its base, with the initial state of its scheme, for a copy in another fit."""
        return {**super().__getstate__(), "_begin": self._begin}

    def state_dict(self) -> dict[str, Any]:
        """The scheme's state and the changes of phase so far."""
        scheme = None if self.scheme is None else self.scheme.state_dict()
        share = None if self._losses is None else self._losses.share
        own = {"scheme": scheme, "transitions": self.transitions, "share": share}
        return super().state_dict() | own

    def start(self) -> None:
        """Finds what makes the targets, and attaches the scheme to it."""
        run = self.run
        try:
            self.maker = maker_for(run.module, run.option(self, "target_maker"), self._given)
        except ValueError as error:
            raise ValueError(str(error).replace(BY_HAND, run.host.by_hand)) from None
        refuse_second(self, run.members[: run.members.index(self)])  # those that have started
        self.scheme = self._given or self._made()
        self._weighed = weighs(run.module, self.scheme)
        if self.maker is not None:
            self.maker.check(self.scheme, weighed=self._weighed)
        reader = self.scheme.needs_losses
        if reader and not (self.maker is not None and self.maker.losses):
            raise ValueError(
                f"{reader} needs each sample's loss, which {self._where()} never sees. Train with "
                "FlowMatchingLoss, or call scheme.observe(t=..., loss=...) in a loop of your own."
            )
        self._losses = GatheredLosses() if reader else None
        if isinstance(self.scheme, Phases):
            self.scheme.check_ends(math.inf if run.total is None else run.total)
        run.share_bank(parts(self.scheme))
        self._resumed = self._resume()
        self.writer = run.open_writer(self)
        about, path = self._where(), self.scheme.path
        if self.maker is not None:  # a scheme without an oracle need not know the path
            about, path = self.maker.describe(), self.maker.path
        asked = [part.oracle.over for part in parts(self.scheme) if part.target and part.oracle]
        about += "".join(f", over {text}" for text in {t for said in asked for t in said.values()})
        self.say(f"steers {about}; {self.writer.describe()}")
        self._header = {"event": "scheme", "maker": about, "path": repr(path)}
        self._seen, self._means = self.scheme.last, SchemeMeans()
        self._attach()

    def restart(self) -> None:
        """Makes the scheme again, of the other bank."""
        self._restore()
        self.run.look.schemes.remove(self.scheme)
        self.scheme, self._resumed = self._made(), True  # the files are those of this run
        self.before_first_batch()
        self._attach()

    def before_first_batch(self) -> None:
        """Sets the boundary, checks the scheme, and opens the files."""
        scheme, speakers = self.scheme, self.run.host.speakers
        refuse_unheard(speakers, scheme.awaited if isinstance(scheme, Phases) else [])
        unknown = self.renewed or any(part.boundary is None for part in parts(scheme))
        if unknown and (boundary := self._boundary()) is not None:
            scheme.set_boundary(boundary)
            self.say(f"the stages meet at t = {scheme.boundary:.3f}")
        scheme.check()
        self._header["trained_on"] = in_words(scheme)
        self.say(f"trains on {self._header['trained_on']}")
        self.writer.start([self._header, *self.transitions], resumed=self._resumed)

    def settle(self) -> None:
        """Refuses a first step without a steered target, and checks its samples and conditions."""
        record, near = self.scheme.last, bool(parts(self.scheme)[0].encoded)
        if record is None or record is self._seen:
            cure = "Make it outside of torch.no_grad(), with the model in train mode."
            if self.maker is None or not self.maker.late:
                cure += " If another object makes it, say which: target_maker=...; "
                cure += self.run.host.by_hand
            raise RuntimeError(
                f"The first training step made its target without {self._where()}, so nothing is "
                f"steered: in eval mode or without gradients it is plain. {cure}"
            )
        # Smoothed samples are not rows.
        mixing = [part for part in parts(self.scheme) if part.target and not part.smoothing]
        oracles = {part.oracle.bank: part.oracle for part in mixing if part.oracle}
        with self.run.host.together("comparing its samples with the bank"):
            for bank, oracle in oracles.items():
                kernel, shard = oracle.condition, not oracle.engine.holds_all_rows
                known, x1 = record.source is not None and not near, record.x1
                c = self.run.look.condition_for(kernel, x1) if kernel else None
                if said := check_rows(bank, x1, known=known, shard=shard, near=near, condition=c):
                    self.warn(said)
        if warning := self.run.look.check_conditions(self.scheme):
            self.warn(warning)

    @override
    def reconsider(self) -> None:
        self.run.look.check_conditions(self.scheme)

    def after_batch(self, step: int, before: int) -> None:
        """Adds the batch; after an optimizer step, lets the scheme adapt, and logs."""
        scheme = self.scheme
        if scheme.last is not self._seen and scheme.last is not None:
            self._seen = scheme.last
            self._means.add(scheme.last, scheme.boundary)
            self._plain = -1
            if self._losses is not None and self.maker is not None and self.maker.last is not None:
                self._losses.add(*self.maker.last)
        if step == before:  # with gradient accumulation several batches share a step
            return
        self._plain += 1
        if self._plain == 3:  # a training step may return None
            self.warn(
                f"3 optimizer steps up to {before} came without a target that was steered: targets "
                "in eval mode or without gradients are plain. Call model.train()."
            )
        if self.run.logs(before):
            boundary = math.nan if scheme.boundary is None else scheme.boundary
            phase = float(getattr(scheme, "index", 0))
            values = {**self._means.reduced(self.run.host), "boundary": boundary, "phase": phase}
            self.writer.scalars({f"{self.name}/{k}": v for k, v in values.items()}, step - 1)
        t, loss = self._losses.gathered(self.run.host) if self._losses else (None, None)
        for message in scheme.observe(step=step, total=self.run.total, t=t, loss=loss):
            index, tag = getattr(scheme, "index", 0), f"{self.name}/transition"
            event = {"event": "transition", "step": step, "phase": index, "message": message}
            self.transitions.append(event)
            self.writer.event(event)
            self.writer.scalars({tag: float(index)}, step - 1)
            self.writer.text(tag, message, step - 1)
            self.say(message)

    def renew(self) -> None:
        """Warns: its targets stay over the rows that were read first."""
        if self.mixes:
            self.warn(
                "the training latents have changed, and its targets are still over those that the "
                "bank was read from. To train on targets of the new ones, stop and resume from a "
                "checkpoint: a bank that was not given is read again then."
            )

    def notice(self, event: str) -> None:
        """Tells the phases."""
        if isinstance(self.scheme, Phases):
            self.scheme.notify(event)

    def before_validation(self) -> None:
        """Detaches the scheme: validation has plain targets."""
        self._restore()

    def after_validation(self) -> None:
        """Attaches the scheme again."""
        self._attach()

    @override
    def stop(self) -> None:
        self._restore()
        self.maker = None
        for part in [] if self.scheme is None else parts(self.scheme):
            part.labels_of = part.condition_of = part.encoded = None
            part.before_smoothing = part.trains = None

    def _restore(self) -> None:
        if self._detach is not None:
            self._detach()
        self._detach = None

    end = _restore

    def _where(self) -> str:
        return "the scheme that the module holds" if self.maker is None else self.maker.name

    def _attach(self) -> None:
        run, look = self.run, self.run.look
        self._restore()
        made = run.encoding or run.option(self, "read_batch") or run.option(self, "encode")
        for part in parts(self.scheme):  # rows are checked in `settle`, on all ranks together
            part.rows_checked = True
            part.labels_of, part.condition_of = look.labels_for, look.condition_for
            part.before_smoothing = self._before_smoothing
            part.encoded = bool(made and not run.given(self)) or part.encoded
        look.schemes = [*(one for one in look.schemes if one is not self.scheme), self.scheme]
        if self.maker is not None:
            self._detach = self.maker.attach(self.scheme, weighed=self._weighed)
        for part in parts(self.scheme):
            # A bound method of the host would keep a deleted `Watch` alive.
            part.trains = lambda: run.host.trains()

    def _before_smoothing(self, x1: Tensor) -> None:
        """Refuses samples of the first step that are not rows: only rows are smoothed."""
        if self.run.settled:
            return
        if not self.run.given(self):
            self.run.look.trace(x1)
            refuse_other_rows(self.run, x1)
        for part in parts(self.scheme):
            tell_rounding(part, x1)

    def _made(self) -> Scheme | Phases:
        """The scheme of the parts, or the one that the module's loss has."""
        assert self.maker is not None
        if self._make is not None:
            if isinstance(made := self._make(self._oracle()), Scheme | Phases):
                return made
            raise TypeError(f"Expected a function that makes a Scheme or Phases, got {made!r}.")
        if not self._parts:
            own = own_scheme(self.maker)
            if own is None:
                raise ValueError(
                    "Expected a scheme or its parts, got none. Give some: "
                    "StageScheme(timesteps=..., target=..., weight=...), or a Scheme or Phases."
                )
            # The scheme of another module than in the last fit begins as it is.
            self._begin = self._begin if own is self.scheme else None
            return own
        given = {"seed": self.seed, "class_wise": self.run.option(self, "class_wise", "auto")}
        given |= self._parts
        if "target" in given:
            return Scheme(self._oracle(), **given)
        return Scheme(path=self.maker.path, **given)

    def _oracle(self) -> Oracle:
        run = self.run
        path = run.path if self.maker is None else self.maker.path
        if self.engine is None or self.engine.holds_all_rows:
            return run.oracle(self, path, self.engine, self.certificate)
        bank = run.moved(run.option(self, "bank") or read_shard(run.host))
        return Oracle(bank, path, self.engine, certificate=self.certificate)  # type: ignore[arg-type]

    def _resume(self) -> bool:
        """Takes the state of a checkpoint; without one, a second fit begins as the first."""
        if self._begin is None:
            self._begin = copy.deepcopy(self.scheme.state_dict())
        resumed = self.stash is not None
        if self.stashed_run.get("boundaries"):
            self.run.bank(self)  # sets `renewed` if boundaries were measured on other latents
        stash = self.stash or {"scheme": self._begin, "transitions": []}
        if not resumed and self.run.began:
            return False
        if stash["scheme"] is not None:
            state = copy.deepcopy(stash["scheme"])
            if self.renewed:
                both = [one.get("schemes", [one]) for one in (state, self._begin)]
                for late, early in zip(*both, strict=False):
                    late |= {key: early[key] for key in ("boundary", "collapsed")}
            self.scheme.load_state_dict(state)
        self.transitions = list(stash["transitions"])
        if self._losses is not None:
            self._losses.share = stash.get("share")
        return resumed

    def _boundary(self) -> StageBoundary | None:
        """The boundary of the run; None if it is neither needed nor measured."""
        run, lacks = self.run, self.scheme.lacks_boundary
        known = [(p.oracle, p.class_wise) for p in parts(self.scheme) if p.oracle]
        if not known:
            if not lacks and not run.recipes:
                return None
            known = [(self._oracle(), run.class_wise(self))]
            self.measures = True
        return run.boundary(*known[0]) if lacks or run.recipe(*known[0]) else None
