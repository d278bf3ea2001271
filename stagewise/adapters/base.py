"""`TargetMaker`: where a training's target is made, in an object of another library.

A maker knows the library's convention and what can be steered there. It attaches a scheme by
setting one or two attributes on the user's object, and detaching restores `vars` of that object.
Copies and pickles made meanwhile (averaged weights, checkpointed hyperparameters) hold the object
as its library made it.

A maker can also be watched: `observe` reports what each target is made from, and changes nothing.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.batches import leaves_of
from stagewise.conventions import STAGEWISE, Convention
from stagewise.masks import MaskedLabels
from stagewise.paths import Path, Prediction, same_path
from stagewise.queries import Labels
from stagewise.schemes import Phases, Scheme, parts
from stagewise.schemes.conditions import check_conditions

__all__ = [
    *("Detach", "Place", "Seen", "TargetMaker", "Tell"),
    *("class_labels", "rebind", "chained", "unwrapped", "watched"),
]

Detach = Callable[[], None]
"""Undoes an `attach` or an `observe`; calling it again does nothing."""


@dataclass
class Seen:
    """What one target of a training is made from: detached tensors, which are not copied.

    Read them inside the call that reports them: training may overwrite them afterwards.

    Attributes:
        x1: Data, (B, *), as the maker of the targets was given them.
        x0: Noise, (B, *); None if it is not visible.
        t: Times, (B,), t = 0 is noise; None if they are not known in this convention.
        xt: Noisy samples, (B, *); None if they are not known.
        conditions: Names and tensors that the model is given besides `x_t` and time.
        masks: Which numbers count, as `MaskedLabels`, or None.
        condition: What a kernel goes by, (B, *), or None.
        graph: The `grad_fn` of `x1`; a copy has none.
    """

    x1: Tensor
    x0: Tensor | None = None
    t: Tensor | None = None
    xt: Tensor | None = None
    conditions: tuple[tuple[str, Tensor], ...] = ()
    masks: MaskedLabels | None = None
    condition: Tensor | None = None
    graph: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.graph = self.x1.grad_fn
        self.x1 = self.x1.detach()
        self.x0, self.t, self.xt = (
            None if x is None else x.detach() for x in (self.x0, self.t, self.xt)
        )
        self.conditions = tuple((name, value.detach()) for name, value in self.conditions)


Tell = Callable[..., None]
"""Called for every target with the fields of a `Seen`; conditions by name, with what holds them."""


@dataclass(frozen=True)
class Place:
    """An object and where it was found."""

    object: Any
    name: str  # such as "module.FM"
    owner: Any = None  # what holds it as an attribute; None at the root and inside containers
    attribute: str = ""  # of `owner`

    @property
    def call(self) -> tuple[Any, str]:
        """What holds the callable that a call of the object runs, None if unknown, and its name."""
        # Python looks `__call__` up on the class; a module's `forward` can be set on the instance.
        if isinstance(self.object, nn.Module):
            return self.object, "forward"
        return self.owner, self.attribute


class TargetMaker:
    """An object that makes the targets of a training. One file of this folder for each library.

    A subclass has a classmethod `of(place)`, which recognises the object or returns None, and the
    methods `_attach(scheme)` and `_observe(tell)`, which `rebind` the methods of the object.

    Args:
        place: The object.
        path: The path it trains on.
        prediction: What the network is trained to predict, default that of the convention.
        convention: How it counts time, scales `x_t` and signs its target; default this library's
            own (t = 0 noise).
        refusal: Why it cannot be steered, with the cure; default None: it can.

    Attributes:
        library: Whose interface it has.
        what: What the object is, for messages.
        trains: Whether it makes targets of a training; if not, it only samples.
        weights: Whether it can weigh each sample's loss.
        timesteps: Whether it can draw t.
        losses: Whether it sees each sample's loss.
        by_call: Whether calling the object makes the target, so that it must be an attribute.
        late: Whether another scheme can be attached while it reports a target.
        observable: Whether `observe` can report anything.
        coupled: Whether it, or an object beside it, pairs noise with data.
        last: Times, (B,), and losses before the scheme's weight, (B,), of the latest call,
            detached. None before the first call, and if losses are not visible.
    """

    library: str
    what: str = ""
    trains: bool = True
    weights: bool = False
    timesteps: bool = False
    losses: bool = False
    by_call: bool = False
    late: bool = False
    observable: bool = True

    def __init__(
        self,
        place: Place,
        path: Path,
        prediction: Prediction | None = None,
        convention: Convention = STAGEWISE,
        refusal: str | None = None,
    ) -> None:
        self.place, self.path = place, path
        self.prediction, self.convention = prediction or convention.prediction, convention
        self.refusal, self.coupled = refusal, False
        if self.by_call and place.call[0] is None:
            self.observable = False
            self.refusal = refusal or "keep it as an attribute, self.loss_fn."
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """Where it was found."""
        return self.place.name

    @property
    def last(self) -> tuple[Tensor, Tensor] | None:
        """Times and losses of the latest call, or None."""
        return self._last

    def describe(self) -> str:
        """One line for logs: what was recognised, and its convention."""
        convention = self.convention
        sign = "" if convention.sign_of(self.prediction) == 1 else "minus the "
        time = (
            "input x_1 + sigma x_0, time sigma"
            if convention.by_sigma
            else f"time {convention.noise_time:g} is noise and {convention.data_time:g} is data"
        )
        return (
            f"{self.name}: {type(self.place.object).__name__} ({self.library}), {self.path!r}, "
            f"predicts {sign}{self.prediction.kind}, {time}"
        )

    def attach(self, scheme: Scheme | Phases, *, weighed: bool = False) -> Detach:
        """Lets the scheme make the targets, and draw times and weigh losses if the maker can.

        Args:
            scheme: What steers.
            weighed: Whether the training step applies the scheme's weights itself, for a maker
                that cannot. Default False.

        Returns:
            A function that restores the object.

        Raises:
            ValueError: If the maker cannot be steered, is steered already, or cannot do what the
                scheme asks for; with the cure.
        """
        self.check(scheme, weighed=weighed)
        return self._attach(scheme)

    def like(self, prediction: Prediction, convention: Convention) -> TargetMaker:
        """The same with another prediction and convention."""
        other = copy.copy(self)
        other.prediction, other.convention = prediction, convention
        return other

    def refuse(self) -> None:
        """Raises the `refusal`, if there is one."""
        if self.refusal:
            raise ValueError(f"{self.name} cannot be steered: {self.refusal}")

    def check(self, scheme: Scheme | Phases, *, weighed: bool = False) -> None:
        """Refuses what `attach` would refuse, except that the maker is steered already."""
        self.refuse()
        for part in parts(scheme):
            on_path = any(each is not None for each in (part.oracle, part.weight, part.smoothing))
            if on_path and not same_path(part.path, self.path):
                raise ValueError(
                    f"{self.name} trains on {self.path!r}, the scheme is for {part.path!r}. Use "
                    "the path of the maker: Oracle(bank, path), or Scheme(path=path), with "
                    "path = one_target_maker(module).path."
                )
            weighs = part.weight is not None or (part.preserve_objective and part.draws_timesteps)
            if weighs and not self.weights and not weighed:
                raise ValueError(
                    f"{self.name} ({self.library}) makes targets and never sees the loss, so it "
                    "cannot weigh it. Apply the weights of the same scheme in your training step: "
                    "StageWeightedLoss(loss_fn, scheme), with a loss_fn that does not reduce."
                )
            if part.draws_timesteps and not self.timesteps:
                raise ValueError(
                    f"{self.name} ({self.library}) is given its times. Draw them from the scheme "
                    "in your training step, t = scheme.timesteps.sample(len(x1)), and steer "
                    "with a scheme that has no timesteps of its own."
                )

    def refuse_given_times(self, scheme: Scheme | Phases) -> None:
        """Refuses times from the caller if the scheme draws times."""
        if any(part.draws_timesteps for part in parts(scheme)):
            raise ValueError(
                f"{self.name} was given its times, but the scheme draws them. Call it without "
                "times, or give the scheme no timesteps."
            )

    def observe(self, tell: Callable[[Seen], None]) -> Detach:
        """Reports what every target is made from, and changes nothing.

        Only calls with gradients enabled count, or those of a `StageTarget` that trains, and none
        that `torch.compile` traces. A maker can be observed several times, steered, and released in
        any order.

        Args:
            tell: Called with a `Seen`; an error that it raises stops the training.

        Returns:
            A function that ends it. If `observable` is False nothing is ever reported.
        """

        def report(
            x1: Tensor,
            x0: Tensor | None = None,
            t: Tensor | None = None,
            xt: Tensor | None = None,
            given: Mapping[str, Any] | None = None,
            *more: Any,
        ) -> None:
            if self.late or watched():
                held = (given or {}).items()
                leaves = tuple(pair for name, value in held for pair in leaves_of(value, name))
                tell(Seen(x1, x0, t, xt, leaves, *more))

        return self._observe(report) if self.observable else chained()

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        raise NotImplementedError

    def _observe(self, tell: Tell) -> Detach:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"


class _Rebound:
    """Replaces an attribute while it is steered or observed; a copy or pickle is the original.

    Several may be nested around one attribute. One that is released inside others only forwards.
    """

    def __init__(
        self, original: Any, function: Callable[..., Any], *, observes: bool, held: bool
    ) -> None:
        self.__wrapped__ = original  # where `inspect.signature` looks
        self._function: Callable[..., Any] | None = function
        self._observes, self._held = observes, held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._function or self.__wrapped__)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, ((self.__wrapped__,), 0)


def unwrapped(value: Any) -> Any:
    """An attribute without the wrappers that steer or observe it."""
    while isinstance(value, _Rebound):
        value = value.__wrapped__
    return value


def rebind(
    owner: Any, attribute: str, function: Callable[..., Any], *, observes: bool = False
) -> Detach:
    """Replaces a callable attribute on an instance until the returned function is called.

    `vars(owner)` are restored once all wrappers of the attribute are released. Many may observe,
    but a second one that steers raises a ValueError.
    """
    original = inner = getattr(owner, attribute)
    while not observes and isinstance(inner, _Rebound):
        if inner._function is not None and not inner._observes:
            raise ValueError(
                f"{type(owner).__name__}.{attribute} is steered by another scheme already. Use one "
                "scheme for each maker: Scheme(timesteps=..., target=..., weight=...) holds all "
                "three."
            )
        inner = inner.__wrapped__
    rebound = _Rebound(original, function, observes=observes, held=attribute in vars(owner))
    setattr(owner, attribute, rebound)

    def restore() -> None:
        rebound._function = None
        while True:
            top = vars(owner).get(attribute)
            if not isinstance(top, _Rebound) or top._function is not None:
                return
            if top._held:
                setattr(owner, attribute, top.__wrapped__)
            else:
                delattr(owner, attribute)

    return restore


def chained(*detach: Detach) -> Detach:
    """One function that calls all."""

    def restore() -> None:
        for each in detach:
            each()

    return restore


def class_labels(
    scheme: Scheme | Phases, model_kwargs: Mapping[str, Any] | None, x1: Tensor
) -> Labels | None:
    """The classes "y" among a model's arguments; refuses others that the targets ignore."""
    others = dict(model_kwargs or {})
    y = others.pop("y", None)
    found = [
        check_conditions(part, [y], [others], len(x1), part.with_masks(None, None, x1))
        for part in parts(scheme)
    ]
    return next((labels for labels in found if labels is not None), None)


def watched() -> bool:
    """Whether a call is reported to observers: gradients are on, and it is not being traced."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
