"""`StageCallback`: the base of all callbacks. Only here are hooks of Lightning.

A run has one `StageRun`. The first stage callback in the trainer's list leads: its hooks call the
run, and the run calls all callbacks by their `order`. So the order in the list changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn
from typing_extensions import Unpack

from stagewise.bank import LatentBank
from stagewise.batches import ReadBatch
from stagewise.callbacks.host import TrainerHost
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.condition import Condition
from stagewise.conventions import ConventionLike, as_convention
from stagewise.paths import Path as ProbabilityPath
from stagewise.reservoir import Reservoir
from stagewise.through_module import Encode

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback

    from stagewise.callbacks.run import StageRun
    from stagewise.callbacks.writer import Writer

else:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:  # a `Watch` needs no hooks of Lightning
        Callback = object

__all__ = ["AskVelocity", "HeldOut", "RunOptions", "StageCallback"]

AskVelocity = Callable[..., Tensor]
"""From a module, `x_t`, (B, *), t, (B,), labels, (B,) or None, and with masks these, (B, *), to the
velocity, (B, *)."""

HeldOut = Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]
"""Samples, (n, *), alone or with their labels, (n,), or with labels and masks."""


class RunOptions(TypedDict, total=False):
    """Options of a run besides its bank. Give each once, to a `StageRun` or to any callback.

    Attributes:
        read_batch: From a batch, or a batch and the module, to `(x_1, labels or None)`, or to
            `(x_1, labels or None, mask)` for padded samples. Default: finds the first two in
            tensors, tuples and dicts with usual names.
        encode: From `(x_1, module)` to what is trained on, for a step that encodes. Default: what
            the first step has shown.
        path: The path of training. Default: that of what makes the targets in the module, or else
            `LinearPath()`.
        convention: How a training step that makes its target by hand counts time, scales `x_t` and
            signs its target: a name such as "edm", a noise scheduler of diffusers or a
            `Convention`; see `stagewise.conventions`. Default: the usual one that fits the first
            step.
        class_wise: Whether posteriors are over the rows of the sample's own class, as a
            class-conditional model needs. Default "auto": if there are labels. False also says that
            the model ignores other conditions, such as text or observations.
        condition: A kernel on such conditions, which weighs the rows of posteriors. Default None.
        reservoir: How many of the last samples seen, or a `Reservoir`, stand for the training set,
            for streams and random augmentation. Default None: the training set is read.
        held_out: Samples that are not trained on, (n, *), or `(samples, labels)`, or
            `(samples, labels, mask)`. Default: read from the first validation loader.
        velocity: From `(module, xt, t, labels)`, or with masks `(module, xt, t, labels, mask)`, to
            the velocity (t = 0 is noise), for networks that are not found.
        target_maker: Name of what makes the targets, such as "module.FM", if there are several.
        dirpath: Folder of the files. Default `<trainer.log_dir>/<name>`, or without a logger
            `<trainer.default_root_dir>/<name>_logs`. That of a `StageRun` holds a folder for each
            callback.
        seed: Of all generators of the callbacks, default 0.
    """

    read_batch: ReadBatch | Callable[[Any, nn.Module], Any] | None
    encode: Encode | None
    path: ProbabilityPath | None
    convention: ConventionLike | None
    class_wise: bool | Literal["auto"]
    condition: Condition | None
    reservoir: int | Reservoir | None
    held_out: HeldOut | None
    velocity: AskVelocity | None
    target_maker: str | None
    dirpath: str | Path | None
    seed: int


def _tells(method: str, *values: Any) -> Callable[..., None]:
    """A hook of Lightning in which the leading callback calls a method of the run."""

    def hook(self: StageCallback, *_: Any, **__: Any) -> None:
        if self._leads:
            getattr(self.run, method)(*values)

    return hook


class StageCallback(Callback):
    """The base of all callbacks; the run calls its methods.

    Args:
        name: Keeps its checkpointed state, its tags and its files apart from others'.
        bank: The training latents *as the model is trained on them*: same scale, same shape.
            Default: those of the run, or else read from the training data loader.
        **options: See `RunOptions`.

    Attributes:
        order: The run calls callbacks in ascending order.
        late: Whether it can still take another bank in the first step.
        measures: Whether it measures something against the bank.
        compares: Whether it compares the model with the oracle over that bank.
        data_only: Whether it needs neither the model nor the same rows at each probe.
        mixes: Whether it puts the oracle into the targets.
        steers: Whether it changes what the module is trained on.
        options: The options that were given to it.
        charts: Of TensorBoard's custom-scalars page: by title, the tags as a pattern after `name`.
        run: The run, from the start of training to its end.
        stash: The state of a checkpoint, until training has started from it.
        renewed: Whether the bank differs from that of the checkpoint, so that everything is
            measured again.
        kept: What the state holds of a run that is over.

    Raises:
        TypeError: For an unknown option, or one of a wrong type.
        ValueError: For a wrong `class_wise`.
    """

    order: ClassVar[int] = 0
    late: bool = False
    measures: bool = False
    compares: bool = False
    data_only: ClassVar[bool] = False
    mixes: bool = False
    steers: ClassVar[bool] = False
    charts: ClassVar[dict[str, str]] = {}
    run: StageRun = None  # type: ignore[assignment]
    writer: Writer
    _before: dict[str, Any] | None = None

    def __init__(
        self, name: str, bank: LatentBank | None = None, **options: Unpack[RunOptions]
    ) -> None:
        given: dict[str, Any] = {"bank": bank, **options}
        unknown = sorted(given.keys() - {"bank"} - RunOptions.__annotations__.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument {unknown[0]!r}. Options of the run are: "
                f"bank, {', '.join(RunOptions.__annotations__)}."
            )
        _check(given)
        if given.get("convention") is not None:
            given["convention"] = as_convention(given["convention"])
        self.name, self.dirpath = name, given.pop("dirpath", None)
        self.options = {key: value for key, value in given.items() if value not in (None, "auto")}
        self.stash: dict[str, Any] | None = None
        self.kept: dict[str, Any] = {}
        self.renewed = False

    @property
    def _leads(self) -> bool:
        return self.run is not None and self.run.leader is self

    @property
    def seed(self) -> int:
        """Of its generators: its own option, or that of the run."""
        own = self.options.get("seed", 0)
        return int(own if self.run is None else self.run.option(self, "seed", own))

    def say(self, message: str) -> None:
        """A line of the log, with the name of the class."""
        rank_zero_info(f"{type(self).__name__}: {message}")

    def warn(self, message: str) -> None:
        """A warning, with the name of the class."""
        rank_zero_warn(f"{type(self).__name__}: {message}")

    def layout(self) -> dict[str, list[Any]]:
        """Its charts for TensorBoard's custom-scalars page, once it has settled."""
        name = re.escape(self.name)
        return {title: ["Multiline", [f"^{name}{tags}"]] for title, tags in self.charts.items()}

    @property
    def state_key(self) -> str:
        """Distinct for callbacks of distinct names."""
        return f"{type(self).__qualname__}{ {'name': self.name}!r}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers, strings, tensors, lists and dicts."""
        return {"run": self.kept if self.run is None else self.run.record(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state of a checkpoint for the start of training."""
        self.stash, self.kept = state_dict, state_dict.get("run") or {}

    @property
    def stashed_run(self) -> dict[str, Any]:
        """What the state of a checkpoint holds of the run."""
        return (self.stash or {}).get("run") or {}

    # -- what belongs to one run ------------------------------------------------------------------

    def joins(self, run: StageRun) -> None:
        """Takes part in a run."""
        # Lightning has set the last two to methods of the module.
        others = ("run", "_before", "log", "log_dict")
        self._before = {key: value for key, value in vars(self).items() if key not in others}
        self.run = run

    def leaves(self) -> None:
        """Drops what the run has added; results, which it had before by name, stay."""
        for key in vars(self).keys() - (self._before or vars(self)).keys():
            delattr(self, key)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle that is made within a run is as before the run."""
        before = self._before
        return dict(vars(self)) if before is None else {**before, "stash": None}

    # -- what the run calls -----------------------------------------------------------------------

    def start(self) -> None:
        """At the start of training."""

    def restart(self) -> None:
        """In the first step, before `settle`, if the bank is no longer that of the start."""
        self.start()

    def before_first_batch(self) -> None:
        """Before the first batch, once all callbacks have started."""

    def settle(self) -> None:
        """In the first training step, before any weight changes."""

    def reconsider(self) -> None:
        """If a later step has shown what the network is given, or none has for long; collective."""

    def reread(self) -> None:
        """After the first batch, if its gradients show another prediction than assumed."""

    def before_batch(self, step: int) -> None:
        """Before each batch but the first, after `step` optimizer steps."""

    def after_batch(self, step: int, before: int) -> None:
        """After each batch: `step` optimizer steps are done, and `before` it that many."""

    def after_all(self) -> None:
        """After `after_batch` of all callbacks, so that their states can be saved."""

    def before_validation(self) -> None:
        """Before validation during training."""

    def after_validation(self) -> None:
        """After validation during training."""

    def renew(self) -> None:
        """If the training latents have changed and the bank was read again; a collective."""

    def notice(self, event: str) -> None:
        """At an event in the run, such as "navigation learned"."""

    def end(self) -> None:
        """At the end of training."""

    def fail(self) -> None:
        """After an exception, before `stop`."""

    def stop(self) -> None:
        """After training or an exception, perhaps twice: undoes what it did to the module."""

    # -- the hooks of Lightning -------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the run, if this is the first stage callback; makes it if there is none."""
        from stagewise.callbacks.run import StageRun

        members = [c for c in trainer.callbacks if isinstance(c, StageCallback)]  # type: ignore[attr-defined]
        runs = [member for member in members if isinstance(member, StageRun)]
        if len(runs) > 1:
            raise ValueError(
                f"Expected one StageRun for each trainer, got {len(runs)}. Give all options to "
                "one: StageRun(bank=..., read_batch=...)."
            )
        if members[0] is self:
            (runs[0] if runs else StageRun()).begin(TrainerHost(trainer, pl_module), members)

    def on_train_batch_start(self, _: Any, __: Any, batch: Any, ___: int) -> None:  # type: ignore[override]
        """Hands the batch to the run."""
        if self._leads:
            self.run.batch_starts(batch)

    on_train_epoch_start = _tells("epoch_starts")
    on_before_backward = _tells("weights_may_change")
    on_before_optimizer_step = _tells("optimizer_steps")
    on_train_batch_end = _tells("batch_ends")
    on_validation_start = _tells("tell", "before_validation")
    on_validation_end = _tells("tell", "after_validation")
    on_train_end = _tells("ends")
    on_exception = _tells("fails")
    teardown = _tells("close")


_OPTION_TYPES: dict[str, tuple[Any, str]] = {
    "path": (ProbabilityPath, "a stagewise.Path"),
    "condition": (Condition, "a kernel, Condition(bandwidth=...)"),
    "reservoir": (int | Reservoir, "a number or a Reservoir"),
    **dict.fromkeys(("read_batch", "encode", "velocity"), (Callable, "a function")),
}
"""Types of options, and how messages name them."""


def _check(options: dict[str, Any]) -> None:
    """Refuses options of a wrong type."""
    bank, wise = options.get("bank"), options.get("class_wise", "auto")
    if bank is not None and not isinstance(bank, LatentBank):
        raise TypeError(
            f"Expected `bank` to be a LatentBank, got {type(bank).__name__}. "
            "Wrap tensors: LatentBank(x, labels)."
        )
    if isinstance(bank, Reservoir):
        raise TypeError(
            f"Expected a bank, got {bank!r}. Give it as StageRun(reservoir=Reservoir(4096))."
        )
    for key, (kind, name) in _OPTION_TYPES.items():
        if options.get(key) is not None and not isinstance(options[key], kind):
            raise TypeError(f"Expected `{key}` to be {name}, got {options[key]!r}.")
    if options.get("reservoir") is not None and bank is not None:
        raise ValueError(
            "Expected either a bank or a reservoir, got both. "
            "With a bank leave the reservoir out: StageRun(bank=LatentBank(x, labels))."
        )
    if wise not in (True, False, "auto"):
        raise ValueError(f'Expected `class_wise` to be True, False or "auto", got {wise!r}.')
    if wise is True and bank is not None and not bank.classes:
        raise ValueError("class_wise=True needs a bank with labels: LatentBank(x, labels).")
