"""A seam: where a training's target is made, in an object of another library.

A seam knows the library's convention and what can be steered there, and puts a scheme in by setting
one attribute (or two) on the very object the user has. Taking it out again leaves `vars` of that
object as they were. Copies and pickles made meanwhile (averaged weights, checkpointed
hyperparameters) hold the object as its library made it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stagewise.adapters.paths import same_path
from stagewise.paths import STAGEWISE, Convention, Path, Prediction

if TYPE_CHECKING:
    from stagewise.schemes import Phases, Scheme

__all__ = ["Detach", "Place", "Seam", "check_noise", "mixes", "parts", "rebind", "together"]

Detach = Callable[[], None]
"""Undoes an `attach`; calling it again does nothing."""


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
        coupled: Whether something beside it pairs noise with data (`find_seams`).
    """

    library: str
    weights: bool = False
    timesteps: bool = False
    losses: bool = False

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
            on_path = part.oracle is not None or part.weight is not None
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
    """Stands for an attribute while it is steered; a copy or a pickle of it is the original."""

    def __init__(self, original: Any, function: Callable[..., Any]) -> None:
        self.__wrapped__ = original  # where `inspect.signature` looks
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.__wrapped__,)


def _itself(value: Any) -> Any:
    return value


def rebind(owner: Any, attribute: str, function: Callable[..., Any]) -> Detach:
    """Replaces a callable attribute on an instance, reversibly.

    Args:
        owner: The instance; its class is left alone.
        attribute: Name of a method or of a callable it holds.
        function: What is called instead.

    Returns:
        What puts `vars(owner)` back.

    Raises:
        ValueError: If the attribute is replaced already.
    """
    original = getattr(owner, attribute)
    if isinstance(original, _Rebound):
        raise ValueError(
            f"{type(owner).__name__}.{attribute} is steered by another scheme already. Use one "
            "scheme for each seam: Scheme(timesteps=..., target=..., weight=...) holds all three."
        )
    held = attribute in vars(owner)
    rebound = _Rebound(original, function)
    setattr(owner, attribute, rebound)

    def restore() -> None:
        if vars(owner).get(attribute) is not rebound:
            return
        if held:
            setattr(owner, attribute, original)
        else:
            delattr(owner, attribute)

    return restore


def together(*detach: Detach) -> Detach:
    """One that calls all."""

    def restore() -> None:
        for each in detach:
            each()

    return restore


def check_noise(x0: Tensor) -> None:
    """Refuses a source that is not standard normal, for which the oracle does not hold.

    Its mean and its mean square are tested, the latter as chi-squared by Wilson and Hilferty's cube
    root, which holds for few numbers too.

    Raises:
        ValueError: If one is off by more than six standard errors.
    """
    count, values = x0.numel(), x0.float()
    mean, square = float(values.mean()), float(values.square().mean())
    error = math.sqrt(2 / (9 * count))
    if abs(mean) * math.sqrt(count) > 6 or abs(square ** (1 / 3) - 1 + error**2) > 6 * error:
        raise ValueError(
            f"Expected `x0` to be standard normal noise, got a mean of {mean:.3g} and a mean "
            f"square of {square:.3g}. The oracle target holds for x0 ~ N(0, I) only: train from "
            "torch.randn_like(x1), or steer the timesteps alone."
        )
