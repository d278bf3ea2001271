"""Finding `x_1` and its label in whatever a data loader yields.

A batch may be a tensor, a tuple or list, or a dict. A tensor is `x_1`. In a sequence `x_1` is the
only floating-point tensor of shape (B, *) with at least two axes, in a dict it is the one under a
usual name, or else the only one. The label is the first integer tensor of shape (B,), in a dict the
one under a usual name. Anything ambiguous is refused with a list of what was seen: silence here
would measure the stages of the wrong data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["FindSample", "describe", "find_checked", "find_sample"]

FindSample: TypeAlias = Callable[[Any], "tuple[Tensor, Tensor | None]"]
"""From a batch to `(x_1, labels)`, of shapes (B, *) and (B,); labels may be None."""

_SAMPLE_NAMES = (
    *("x1", "x_1", "latents", "latent", "images", "image", "pixel_values", "img", "imgs"),
    *("x", "data", "inputs", "input", "samples", "sample"),
)
_LABEL_NAMES = (
    *("labels", "label", "y", "class_labels", "class_label", "class_id", "classes", "class"),
    *("cls", "targets", "target"),
)


def _is_sample(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _is_label(value: object, length: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == (length,)
        and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )


def describe(batch: object) -> str:
    """What a batch holds, in one line, for logs and errors."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        inner = ", ".join(describe(value) for value in batch[:6])
        return f"{type(batch).__name__}({inner}{', ...' if len(batch) > 6 else ''})"
    return type(batch).__name__


def find_sample(batch: Any) -> tuple[Tensor, Tensor | None]:
    """`x_1` and the label of a batch.

    Args:
        batch: A tensor (B, *), a tuple or list with one such tensor, or a dict.

    Returns:
        `x_1`, (B, *), and the integer labels, (B,), or None.

    Raises:
        ValueError: If there is no such tensor or several; the message lists what was seen and
            shows the cure.
    """
    if isinstance(batch, Mapping):
        items = {str(key): value for key, value in batch.items()}
        named = [items[name] for name in _SAMPLE_NAMES if _is_sample(items.get(name))]
        found = named[:1] or [value for value in items.values() if _is_sample(value)]
        labels = [items[name] for name in _LABEL_NAMES if name in items]
    else:
        values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        found = [value for value in values if _is_sample(value)]
        labels = values
    if len(found) != 1:
        raise ValueError(
            f"Expected one floating-point tensor of shape (B, *) in the batch, found {len(found)} "
            f"in {describe(batch)}. Say where x_1 is: "
            "find=lambda batch: (batch[0], None) gives (x_1, labels or None)."
        )
    x1: Tensor = found[0]
    return x1, next((value for value in labels if _is_label(value, len(x1))), None)


def find_checked(find: FindSample, batch: Any) -> tuple[Tensor, Tensor | None]:
    """What `find` gives for a batch, refused if it is not `(x_1, labels or None)`.

    Raises:
        ValueError: If it is no such pair; the message says what came.
    """
    found = find(batch)
    if isinstance(found, (tuple, list)) and len(found) == 2 and _is_sample(found[0]):
        x1, labels = found
        if labels is None or _is_label(labels, len(x1)):
            return x1, labels
    raise ValueError(
        "Expected `find` to return (x_1, labels or None), a floating-point tensor of shape (B, *) "
        f"and integers of shape (B,), got {describe(found)}. Scale images to floats there."
    )
