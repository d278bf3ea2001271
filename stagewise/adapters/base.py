"""A seam: where a training's target is made, in an object of another library.

A seam knows the library's convention and what can be steered there, and puts a scheme in by setting
one attribute (or two) on the very object the user has. Taking it out again leaves `vars` of that
object as they were. Copies and pickles made meanwhile (averaged weights, checkpointed
hyperparameters) hold the object as its library made it.

A seam can also be watched: `observe` tells what each target is made from, and changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagewise.adapters.hooks import in_place_of
from stagewise.adapters.paths import same_path
from stagewise.paths import STAGEWISE, Convention, Path, Prediction

if TYPE_CHECKING:
    from stagewise.schemes import Phases, Scheme

__all__ = [
    "Detach",
    "NoiseSums",
    "Place",
    "Seam",
    "Seen",
    "Tell",
    "check_independent",
    "check_noise",
    "dependence",
    "looks",
    "mixes",
    "named_tensors",
    "parts",
    "plain",
    "rebind",
    "seen",
    "together",
]

_NOISE = (
    "The oracle target holds for x0 ~ N(0, I) only: train from torch.randn_like(x1), or steer the "
    "timesteps alone."
)

Detach = Callable[[], None]
"""Undoes an `attach` or an `observe`; calling it again does nothing."""


@dataclass(frozen=True)
class Seen:
    """What one target of a training is made from: detached references, nothing is copied.

    Read the tensors while you are told: training may overwrite them afterwards.

    Attributes:
        x1: Data, (B, *), as what makes the targets was given them.
        x0: Noise, (B, *); None where it is drawn out of sight.
        t: Times, (B,), t = 0 is noise; None where they are not at hand in this convention.
        xt: Noisy samples, (B, *); None where they are not at hand.
        conditions: Names and tensors that are handed on to the model beside `x_t` and time.
    """

    x1: Tensor
    x0: Tensor | None = None
    t: Tensor | None = None
    xt: Tensor | None = None
    conditions: tuple[tuple[str, Tensor], ...] = ()


Tell = Callable[[Seen], None]
"""Is told of every target that is made with gradients enabled."""


@dataclass(frozen=True)
class Place:
    """An object and where it was found.

    Attributes:
        object: The object.
        name: Its name as one would write it, such as "module.FM".
        owner: What holds it as an attribute; None for the first object and inside containers.
        attribute: Under which name `owner` holds it.
    """

    object: Any
    name: str
    owner: Any = None
    attribute: str = ""


class Seam(ABC):
    """What makes the targets of a training, recognised.

    Args:
        place: The object.
        path: The path it trains on.
        prediction: What the network is trained to predict, default velocity.
        convention: How the library counts time and signs its target; the default is the library's
            own (t = 0 noise).
        refusal: Why it cannot be steered, with the cure; default None: it can.

    Attributes:
        library: Whose interface it has.
        weights: Whether it can weigh each sample's loss.
        timesteps: Whether it can draw t.
        losses: Whether it sees each sample's loss.
        observable: Whether `observe` can see anything here.
        written: What it gives its network for `x_t` and t, as one would write it; None: as the
            convention says.
        coupled: Whether something beside it pairs noise with data (`find_seams`).
    """

    library: str
    weights: bool = False
    timesteps: bool = False
    losses: bool = False
    observable: bool = True
    written: tuple[str, str] | None = None

    def __init__(
        self,
        place: Place,
        path: Path,
        prediction: Prediction | None = None,
        convention: Convention = STAGEWISE,
        refusal: str | None = None,
    ) -> None:
        self.place, self.path = place, path
        self.prediction, self.convention = prediction or Prediction(), convention
        self.refusal = refusal
        self.coupled = False
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """Where it was found."""
        return self.place.name

    @property
    def last(self) -> tuple[Tensor, Tensor] | None:
        """Times, (B,), and losses before the scheme's weight, (B,), of the latest call, detached.

        None before the first call, and where losses are not seen.
        """
        return self._last

    def describe(self) -> str:
        """One line for logs: what was recognised, and its convention."""
        convention = self.convention
        sign = "" if convention.sign == 1 else "minus the "
        return (
            f"{self.name}: {type(self.place.object).__name__} ({self.library}), {self.path!r}, "
            f"predicts {sign}{self.prediction.kind}, time {convention.noise_time:g} is noise and "
            f"{convention.data_time:g} is data"
        )

    def to_network(self, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the library gives its network for `x_t`, (B, *), and t, (B,)."""
        return xt, self.convention.from_t(t)

    def from_network(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """`x_t` and t from what a network was given; undoes `to_network`."""
        return x, self.convention.to_t(time)

    def attach(self, scheme: Scheme | Phases, *, weighed: bool = False) -> Detach:
        """Lets the scheme make the targets, and whatever else it can here.

        Args:
            scheme: What steers.
            weighed: Whether the training step applies the scheme's weights itself, where the seam
                cannot. Default False.

        Returns:
            What puts the object back as it was.

        Raises:
            ValueError: If this cannot be steered, is steered already, or the scheme asks for what
                cannot be had here, with the cure.
        """
        self.check(scheme, weighed=weighed)
        return self._attach(scheme)

    def refuse(self) -> None:
        """Raises the `refusal`, if there is one."""
        if self.refusal:
            raise ValueError(f"{self.name} cannot be steered: {self.refusal}")

    def check(self, scheme: Scheme | Phases, *, weighed: bool = False) -> None:
        """Refuses what `attach` would refuse, except that the seam is steered already."""
        self.refuse()
        for part in parts(scheme):
            on_path = any(each is not None for each in (part.oracle, part.weight, part.smoothing))
            if on_path and not same_path(part.path, self.path):
                raise ValueError(
                    f"{self.name} trains on {self.path!r}, the scheme is for {part.path!r}. Give "
                    "it the path of the seam: Oracle(bank, path), or Scheme(path=path), with "
                    "path = one_seam(module).path."
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
        """Refuses, while steered, times that the caller chose if the scheme chooses some too."""
        if any(part.draws_timesteps for part in parts(scheme)):
            raise ValueError(
                f"{self.name} was given its times, but the scheme draws them. Call it without, or "
                "give the scheme no timesteps."
            )

    @abstractmethod
    def observe(self, tell: Tell) -> Detach:
        """Tells what every target is made from, and changes nothing.

        Only calls with gradients enabled are told of, and none that `torch.compile` traces. What
        is observed can be observed again, and steered, and let go of in any order.

        Args:
            tell: Called with what was seen; what it raises stops the training.

        Returns:
            What ends it. Where `observable` is False nothing is ever told.
        """

    @abstractmethod
    def _attach(self, scheme: Scheme | Phases) -> Detach:
        """`attach` after the checks."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"


def parts(scheme: Scheme | Phases) -> list[Scheme]:
    """The schemes of all phases, or the one."""
    return [phase.scheme for phase in scheme.phases] if hasattr(scheme, "phases") else [scheme]


def mixes(scheme: Scheme | Phases) -> bool:
    """Whether the targets of any phase are other than the conditional ones."""
    return any(part.target is not None for part in parts(scheme))


class _Rebound:
    """Stands for an attribute while it is steered or observed; a copy or pickle is the original.

    Several may stand for the same attribute, each around the one before it. One that is let go of
    inside of others hands every call on.
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
        return in_place_of(self.__wrapped__)


def plain(value: Any) -> Any:
    """What an attribute is without those that steer or observe it."""
    while isinstance(value, _Rebound):
        value = value.__wrapped__
    return value


def rebind(
    owner: Any, attribute: str, function: Callable[..., Any], *, observes: bool = False
) -> Detach:
    """Replaces a callable attribute on an instance, reversibly.

    Args:
        owner: The instance; its class is left alone.
        attribute: Name of a method or of a callable it holds.
        function: What is called instead.
        observes: Whether it only looks on. Default False: it steers, which one may do.

    Returns:
        What puts `vars(owner)` back, once all that stand for the attribute are let go of.

    Raises:
        ValueError: If the attribute is steered already, and this would steer it too.
    """
    original = inner = getattr(owner, attribute)
    while not observes and isinstance(inner, _Rebound):
        if inner._function is not None and not inner._observes:
            raise ValueError(
                f"{type(owner).__name__}.{attribute} is steered by another scheme already. Use one "
                "scheme for each seam: Scheme(timesteps=..., target=..., weight=...) holds all "
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


def together(*detach: Detach) -> Detach:
    """One that calls all."""

    def restore() -> None:
        for each in detach:
            each()

    return restore


def looks() -> bool:
    """Whether a call is told to an observer: it trains, and is not being traced."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def seen(
    x1: Tensor,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    xt: Tensor | None = None,
    conditions: Iterable[tuple[str, Tensor]] = (),
) -> Seen:
    """A `Seen` of detached tensors."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach()

    return Seen(x1.detach(), cut(x0), cut(t), cut(xt), tuple(conditions))


def named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, however deep in lists and dicts, detached, each with its name."""
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from named_tensors(f"{name}[{key!r}]", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from named_tensors(f"{name}[{index}]", part)


def check_noise(x0: Tensor) -> None:
    """Refuses a source that is not standard normal, for which the oracle does not hold.

    Its mean and its mean square are tested, the latter as chi-squared.

    Raises:
        ValueError: If one is off by more than six standard errors.
    """
    values = x0.float()
    _check_moments(x0.numel(), float(values.mean()), float(values.square().mean()))


def _check_moments(count: int, mean: float, square: float) -> None:
    if abs(mean) * math.sqrt(count) > 6 or _off(square, count):
        raise ValueError(
            f"Expected `x0` to be standard normal noise, got a mean of {mean:.3g} and a mean "
            f"square of {square:.3g}. {_NOISE}"
        )


def _off(square: float, count: int) -> bool:
    """Whether a mean of squares of normal numbers is beyond six standard errors from 1.

    By Wilson and Hilferty's cube root, which holds for few numbers too.
    """
    error = math.sqrt(2 / (9 * count))
    return abs(square ** (1 / 3) - 1 + error**2) > 6 * error


def dependence(x0: Tensor, x1: Tensor) -> float:
    r"""By how many standard errors noise leans towards its data: 0 on average if independent.

        z = sum_i <x0_i, x1_i - mean(x1)> / sqrt(sum_i |x1_i - mean(x1)|^2)

    is standard normal for standard normal `x0`, whatever the data are. A minibatch coupling makes
    it large and positive.

    Args:
        x0: Noise, (B, *).
        x1: Data, (B, *).
    """
    product, size = _leaning(x0.detach().float(), x1.detach().float()).tolist()
    return product / math.sqrt(size) if size else 0.0


def _leaning(x0: Tensor, x1: Tensor) -> Tensor:
    """Numerator and squared denominator of `dependence`, (2,)."""
    gap = x1 - (x1.mean(0) if len(x1) > 1 else x1.mean())
    return torch.stack([(x0 * gap).sum(), gap.square().sum()])


def check_independent(x0: Tensor, x1: Tensor) -> None:
    """Refuses noise that depends on the data it is paired with; for standard normal noise.

    Args:
        x0: Noise, (B, *).
        x1: Data, (B, *).

    Raises:
        ValueError: If `dependence` is beyond six standard errors.
    """
    _check_leaning(dependence(x0, x1))


def _check_leaning(z: float) -> None:
    if abs(z) > 6:
        raise ValueError(
            f"Expected `x0` to be independent of `x1`, but they correlate, {z:.1f} standard errors "
            "from zero. Is noise paired with data, as by optimal transport within the batch? The "
            "closed form of the oracle holds for independent pairs only: train from "
            "x0 = torch.randn_like(x1)."
        )


class NoiseSums:
    """Noise and its data, summed over batches: what a few samples do not show, many do.

    Adding waits for no device, `check` does.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._values = self._samples = 0

    def add(self, x0: Tensor, x1: Tensor) -> None:
        """Adds the pairs of a batch.

        Args:
            x0: Noise, (B, *).
            x1: Data, (B, *).
        """
        if x0.shape != x1.shape or x0.ndim < 2 or not x0.numel():
            return
        x0, x1 = x0.detach().flatten(1).float(), x1.detach().flatten(1).float()
        own = torch.stack([x0.sum(), x0.square().sum(), x0.sum(1).square().sum() / x0.shape[1]])
        sums = torch.cat([own, _leaning(x0, x1)])
        sums = sums if x0.device.type == "mps" else sums.double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._values, self._samples = self._values + x0.numel(), self._samples + len(x0)

    def check(self) -> None:
        """Refuses noise that is not standard normal, or not independent of its data.

        Mean, mean square, the means of samples and `dependence` are tested.

        Raises:
            ValueError: If one is beyond six standard errors.
        """
        if self._sums is None:
            return
        total, square, of_samples, product, size = self._sums.tolist()
        _check_moments(self._values, total / self._values, square / self._values)
        # The means of samples vary by 1 / D: an offset of each shows there first.
        spread = of_samples / self._samples
        if _off(spread, self._samples):
            raise ValueError(
                "Expected `x0` to be standard normal noise, got samples whose means vary "
                f"{spread:.3g} times as much as those of such noise: is an offset added to each? "
                f"{_NOISE}"
            )
        _check_leaning(product / math.sqrt(size) if size else 0.0)
