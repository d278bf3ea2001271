"""Checks what a model is conditioned on against the rows behind the targets of a scheme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stagewise.bank.building import whole_labels
from stagewise.masks import MaskedLabels, plain
from stagewise.queries import Labels

if TYPE_CHECKING:
    from stagewise.schemes.scheme import Scheme

__all__ = ["check_conditions", "check_network", "has_classes", "unknown_conditions"]


def unknown_conditions(what: str) -> ValueError:
    """The error for targets over all rows and a model that is given conditions."""
    return ValueError(
        f"Expected a target for the conditions of the model, got {what}. A conditioned model "
        "should predict the mean over the data of its condition: the mean over other rows changes "
        "what it learns. For classes give the bank the labels of its rows, LatentBank(x, labels); "
        "for text, observations and the like weigh its rows by a kernel, as an approximation, "
        "ConditionedOracle(LatentBank(x, conditions=c), path, Condition(bandwidth=...)), in a "
        "trainer StageScheme(target=..., condition=Condition(bandwidth=...)); "
        "if the model ignores its conditions, say Scheme(..., class_wise=False); otherwise steer "
        "without a target, Scheme(timesteps=..., weight=...)."
    )


def check_conditions(
    scheme: Scheme,
    labels: Iterable[Any],
    others: Iterable[Any],
    count: int,
    masks: object = None,
) -> Tensor | None:
    """The labels, (count,), int64, or None; refuses inputs of a model that the targets ignore.

    One of `labels` may be the class of each sample; `others` are not labels. `masks` may be
    `MaskedLabels`, which the targets know.
    """
    if scheme.target is None or scheme.unconditional:
        return None

    def known(value: Tensor) -> bool:
        return isinstance(masks, MaskedLabels) and value.ndim > 0 and masks.is_told_by(value)

    found, left = None, [value for value in _tensors(others) if not known(value)]
    for value in _tensors(labels):
        if known(value):
            continue
        try:
            own = whole_labels(value, count)
        except ValueError:
            own = None
        if own is None or found is not None:
            left.append(value)
        else:
            found = own
    if left and (scheme.oracle is None or scheme.oracle.condition is None):
        raise unknown_conditions(
            f"{str(left[0].dtype).removeprefix('torch.')} of shape {tuple(left[0].shape)}, which "
            "are not the class of each sample"
        )
    if found is not None and not scheme.class_wise:
        raise unknown_conditions("labels, and a bank without classes")
    return found


def check_network(schemes: Sequence[Scheme], given: tuple[str, ...], labelled: bool | None) -> str:
    """Refuses a network with inputs that the schemes' targets ignore.

    `labelled`: whether it is given labels; None if it was not found. `given`: its other inputs.

    Returns:
        A warning if its inputs are unknown, otherwise an empty text.
    """
    mixing = [scheme for scheme in schemes if scheme.target is not None]
    kernels = [s.oracle.condition for s in mixing if s.oracle and s.oracle.condition]
    if kernels and len(kernels) == len(mixing):
        if given or labelled is None:
            return ""
        return (
            f"the network is given only x_t, t and classes, but its targets are for a model that "
            f"is given a condition, {kernels[0]!r}. Leave out the condition, or "
            "give it to the network."
        )
    if all(scheme.unconditional for scheme in mixing):
        return ""
    if not given and labelled is None:
        # Targets over all rows would be wrong for a model that is given classes.
        wise = any(scheme.class_wise for scheme in mixing)
        cure = "If it is given nothing else, or ignores it, say so: class_wise=False."
        unless = "StageScheme(timesteps=..., weight=...)." if wise else cure
        return (
            "the call of the network was not recognised, so it is not known what "
            "the model is conditioned on. Targets of the oracle are right for a model that is "
            "given x_t, t and the classes of the bank. If it is given more (text, an image beside "
            f"x_t), they move the optimum: steer times and weights only. {unless}"
        )
    if not given and labelled and not all(scheme.class_wise for scheme in mixing):
        given = ("labels",)
    if given:
        has = f"does not have {'them' if given[1:] else 'it'}"
        has = "has no labels" if given == ("labels",) else has
        raise ValueError(
            f"The network is also given {', '.join(given)}, and the bank {has}: the oracle's "
            "target would be a mean over samples of all conditions, which moves the optimum of "
            "a model that uses them. Steer timesteps and weights only, give the labels "
            "of classes to the bank, LatentBank(x, labels), weigh its rows by a kernel, "
            "StageScheme(target=..., condition=Condition(bandwidth=...)), or, if the model "
            "ignores what it is given: class_wise=False, as in StageScheme(target=..., "
            "class_wise=False)."
        )
    return ""


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def has_classes(labels: Labels | None) -> bool:
    """Whether any sample has a class."""
    given = plain(labels)
    if isinstance(given, list | tuple):
        return any(label is not None for label in given)
    return given is not None
