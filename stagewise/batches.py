"""Finds `x_1` and its labels in a batch of a data loader.

A batch is a tensor, a tuple or list, or a dict. A tensor is `x_1`. In a sequence `x_1` is the only
floating-point tensor of shape (B, *) with at least two axes; in a dict it is the one with a usual
name, or else the only one. Labels are whole numbers of shape (B,) or (B, 1), of an integer or a
floating type; in a dict they have a usual name, and may then be booleans, two classes. An ambiguous
batch is refused with a list of its contents: a guess would measure the stages of the wrong data.
`unused_in` lists what was not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stagewise.masks import MaskedLabels, plain

__all__ = [
    "LABEL_NAMES",
    "PADDED",
    "ReadBatch",
    "as_labels",
    "describe",
    "read_checked",
    "find_sample",
    "is_one_hot",
    "leaves_of",
    "others_in",
    "seems_padded",
    "suggested_read_batch",
    "unused_in",
]

ReadBatch: TypeAlias = Callable[[Any], "tuple[Tensor, Any] | tuple[Tensor, Any, Tensor]"]
"""From a batch to `(x_1, labels)`, of shapes (B, *) and (B,), or `(x_1, labels, mask)`; labels may
be None, and a mask is as in `masks.as_mask`."""

PADDED = (
    "If samples have different lengths and are padded, say which numbers count: "
    "read_batch=lambda batch: (batch[0], None, batch[1]), with a mask or lengths in batch[1]."
)

_SAMPLE_NAMES = (
    *("x1", "x_1", "latents", "latent", "images", "image", "pixel_values", "img", "imgs"),
    *("x", "data", "inputs", "input", "samples", "sample"),
)
LABEL_NAMES = (
    *("labels", "label", "y", "class_labels", "class_label", "class_id", "classes", "class"),
    *("cls", "targets", "target"),
)


def _is_sample(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def is_one_hot(value: object) -> bool:
    """Whether it is a tensor (N, k) with a single 1 and zeros in each row."""
    if not isinstance(value, Tensor) or value.is_complex() or value.ndim != 2 or value.shape[1] < 2:
        return False
    return bool(((value == 0) | (value == 1)).all() and (value.sum(1) == 1).all())


def as_labels(value: object, length: int, *, booleans: bool) -> Tensor | None:
    """Labels as int64, (B,); None if a value is not whole numbers of shape (B,) or (B, 1)."""
    if not isinstance(value, Tensor) or value.shape not in ((length,), (length, 1)):
        return None
    if value.is_complex() or (value.dtype == torch.bool and not booleans):
        return None
    if value.is_floating_point() and not (value.isfinite() & (value == value.round())).all():
        return None
    return (value if value.ndim == 1 else value[:, 0]).long()


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and value.dtype != torch.bool


def _entries(batch: Any) -> dict[Any, Any]:
    """The first level of a batch, by key or position; a single value has the key None."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return dict(enumerate(batch)) if isinstance(batch, (tuple, list)) else {None: batch}


def _place(key: object) -> str:
    return "batch" if key is None else f"batch[{key!r}]"


def _children(value: Any, place: str) -> list[tuple[str, Any]]:
    """What a dict, a sequence or a plain object holds, with its place; empty for other values."""
    if isinstance(value, Mapping):
        return [(f"{place}[{key!r}]", inner) for key, inner in value.items()]
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        return [
            (f"{place}[{k}]" if names is None else f"{place}.{names[k]}", inner)
            for k, inner in enumerate(value)
        ]
    if isinstance(value, (Tensor, np.ndarray, type, torch.nn.Module)) or callable(value):
        return []
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return [
        (f"{place}.{name}", getattr(value, name, None))
        for name in names
        if not name.startswith("_")
    ]


def leaves_of(value: Any, place: str = "batch", depth: int = 6) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch, each with its place as code: `batch["y"]`."""
    if isinstance(value, Tensor):
        yield place, value
    for inner_place, inner in _children(value, place) if depth else ():
        yield from leaves_of(inner, inner_place, depth - 1)


def suggested_read_batch(batch: Any) -> str:
    """A `read_batch` to paste: the first tensor that may be `x_1`, and its labels."""
    leaves = [(place, value) for place, value in leaves_of(batch) if value.ndim]
    samples = [pair for pair in leaves if _is_sample(pair[1]) and not is_one_hot(pair[1])]
    images = [pair for pair in leaves if pair[1].ndim > 1 and pair[1].dtype == torch.uint8]
    if not samples and not images:
        return "read_batch=lambda batch: (batch[0], None)"
    place, x1 = (samples or images)[0]
    whole = {
        at: value
        for at, value in leaves
        if at != place and as_labels(value, len(x1), booleans=False) is not None
    }
    integers = [at for at, value in whole.items() if _is_integer(value)]
    scaled = place if samples else f"{place}.float() / 127.5 - 1"
    return f"read_batch=lambda batch: ({scaled}, {[*integers, *whole, None][0]})"


def describe(batch: object) -> str:
    """The contents of a batch in one line, for logs and errors."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        inner = ", ".join(describe(value) for value in batch[:6])
        return f"{type(batch).__name__}({inner}{', ...' if len(batch) > 6 else ''})"
    held = ", ".join(f"{at[1:]}={describe(value)}" for at, value in _children(batch, "")[:6])
    return type(batch).__name__ + (f"({held})" if held else "")


def find_sample(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Finds `x_1` and the labels in a batch.

    Args:
        batch: A tensor (B, *), a tuple or list with one such tensor, or a dict. If there are
            several, one-hot rows and single columns are not `x_1`.

    Returns:
        `x_1`, (B, *), and the labels, int64, (B,), or None. Integers go before whole floats.

    Raises:
        ValueError: If there is no such tensor or several, or several that may be the labels and
            differ; the message lists the contents of the batch and shows the cure.

    Example:
        >>> import torch
        >>> from stagewise import find_sample
        >>> x1, labels = find_sample({"image": torch.randn(4, 3, 8, 8), "label": torch.arange(4)})
        >>> x1.shape, labels.tolist()
        (torch.Size([4, 3, 8, 8]), [0, 1, 2, 3])
    """
    entries, named = _entries(batch), isinstance(batch, Mapping)
    found = _sample_keys(entries, named)
    if len(found) != 1:
        raise ValueError(
            f"Expected one floating-point tensor of shape (B, *) in the batch, found {len(found)} "
            f"in {describe(batch)}. Say where x_1 is, and the labels or None: "
            f"{suggested_read_batch(batch)}."
        )
    x1: Tensor = entries[found[0]]
    keys = [name for name in LABEL_NAMES if name in entries] if named else list(entries)
    usable = {
        key: labels
        for key in keys
        if key != found[0]
        and (labels := as_labels(entries[key], len(x1), booleans=named)) is not None
    }
    # Weights are floats and masks are booleans: they count only if there are no integers.
    integers = {key: value for key, value in usable.items() if _is_integer(entries[key])}
    kept: dict[Any, Any] = {**(integers or usable)} or {None: None}
    (first, labels), *others = kept.items()
    if any(not torch.equal(labels, other) for _, other in others):
        listed = ", ".join(_place(key) for key in (first, *dict(others)))
        x1_at = _place(found[0])
        raise ValueError(
            f"Expected one tensor of labels in the batch, found {1 + len(others)} that differ, "
            f"{listed}, in {describe(batch)}. Say which are the labels: "
            f"read_batch=lambda batch: ({x1_at}, {_place(first)}), or ({x1_at}, None) for none."
        )
    return x1, labels


def _sample_keys(entries: dict[Any, Any], named: bool) -> list[Any]:
    """The keys of the values that may be `x_1`."""
    if named:
        usual = [name for name in _SAMPLE_NAMES if _is_sample(entries.get(name))]
        if usual:
            return usual[:1]
    found = [key for key, value in entries.items() if _is_sample(value)]

    def is_label(value: Tensor) -> bool:
        return is_one_hot(value) or as_labels(value, len(value), booleans=False) is not None

    def is_column(value: Tensor) -> bool:
        return value.shape[1:] == (1,)

    for unlikely in (is_label, is_column):
        if len(found) > 1:
            rest = [key for key in found if not unlikely(entries[key])]
            found = rest if len(rest) == 1 else found
    return found


def read_checked(read_batch: ReadBatch, batch: Any) -> tuple[Tensor, Any]:
    """`x_1`, (B, *), and the labels of a batch by `read_batch`, after a check.

    Labels may be whole numbers or booleans, (B,) or (B, 1), or None; they come back as int64,
    (B,), or None, with a mask as `MaskedLabels`. Raises a ValueError if `read_batch` returns
    something else, a TypeError if the mask is not one.
    """
    try:
        found = read_batch(batch)
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"Expected `read_batch` to return (x_1, labels or None) for {describe(batch)}, but it "
            f"raised {type(error).__name__}: {error}. For example: {suggested_read_batch(batch)}."
        ) from error
    if isinstance(found, (tuple, list)) and len(found) in (2, 3) and _is_sample(found[0]):
        x1, labels, *mask = found
        masked = isinstance(labels, MaskedLabels)
        whole = None if masked else as_labels(labels, len(x1), booleans=True)
        if labels is None or masked or whole is not None:
            labels = labels if masked else whole
            return x1, MaskedLabels.of(labels, mask[0], x1) if mask else labels
    raise ValueError(
        "Expected `read_batch` to return (x_1, labels or None), a floating-point tensor of shape "
        f"(B, *) and integers of shape (B,), got {describe(found)}. Scale images to floats there, "
        "and make labels whole: labels.argmax(1) if they are one-hot, labels.round() otherwise. "
        f"For this batch, for example: {suggested_read_batch(batch)}."
    )


def unused_in(
    batch: Any,
    x1: Tensor,
    labels: Tensor | None,
    masks: MaskedLabels | None = None,
    condition: Tensor | None = None,
) -> list[str]:
    """One sentence for each value of length B, at any depth, that is not among those given.

    The sentence has the place, type and shape of the value; for possible labels and masks also the
    line that uses them. If `read_batch` computes `x_1`, the value it is computed from is listed.
    Compares values, so it is for the first batch only.
    """
    leaves = list(_leaves(batch, "batch", len(x1)))
    x1_at = next((place for place, value in leaves if _equal(value, x1)), "batch[0]")
    lines = []
    for place, value in leaves:
        whole = as_labels(
            torch.as_tensor(value) if _is_numbers(value) else value, len(x1), booleans=True
        )
        one_hot = value.int().argmax(1) if is_one_hot(value) else None
        if (
            place == x1_at
            or _equal(value, x1)
            or (masks is not None and masks.is_told_by(value))
            or (labels is not None and (_equal(whole, labels) or _equal(one_hot, labels)))
            or (condition is not None and _equal(value, condition))
        ):
            continue
        line = f"{place}, {describe(value)}, is not used."
        cure = None if labels is not None else _as_cure(place, value, whole is not None)
        if cure is not None:
            line += f" If it holds the labels: read_batch=lambda batch: ({x1_at}, {cure})."
        elif (
            isinstance(value, Tensor)
            and value.dtype == torch.bool
            and 1 < value.ndim <= x1.ndim
            and all(m in (1, s) for m, s in zip(value.shape, x1.shape, strict=False))
        ):
            own = (
                None if labels is None else next((p for p, v in leaves if _equal(v, labels)), None)
            )
            cure = f"read_batch=lambda batch: ({x1_at}, {own}, {place})."
            line += f" If it says which numbers count: {cure}"
        lines.append(f"{line} If the model is given it, its posterior is over fewer rows.")
    return lines


def seems_padded(x1: Tensor) -> bool:
    """Whether sequences, (n, L, d), end in zeros of different lengths, as if they were padded."""
    if x1.ndim != 3 or x1.shape[1] < 4:
        return False
    last = ((x1 != 0).any(2) * torch.arange(1, x1.shape[1] + 1, device=x1.device)).amax(1)
    cut = last[(last > 0) & (last < x1.shape[1])]
    return 4 * len(cut) >= len(x1) and len(last.unique()) > 2


def others_in(batch: Any, x1: Tensor, labels: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a batch with an entry for each sample, other than `x_1` and the labels."""
    masks = labels if isinstance(labels, MaskedLabels) else None
    return [
        (place, value)
        for place, value in leaves_of(batch)
        if value.ndim and len(value) == len(x1)
        if masks is None or not masks.is_told_by(value)
        if not any(used is not None and _equal(value, used) for used in (x1, plain(labels)))
    ]


def _is_numbers(value: Any) -> bool:
    """Whether a list, tuple or array holds integers, as `torch.as_tensor` reads them."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(one, int) for one in value)
    return isinstance(value, np.ndarray) and value.dtype.kind in "iub"


def _as_cure(place: str, value: Any, whole: bool) -> str | None:
    """The expression that turns a value into labels; None if it cannot be meant as labels."""
    if whole:
        return f"torch.as_tensor({place})" if _is_numbers(value) else place
    if is_one_hot(value):
        return f"{place}{'.int()' if value.dtype == torch.bool else ''}.argmax(1)"
    if isinstance(value, Tensor):
        flat = value.ndim == 1 or value.shape[1:] == (1,)
        return f"{place}.round()" if flat and value.is_floating_point() else None
    if isinstance(value, (tuple, list)) and isinstance(value[0], str):
        return f"torch.tensor([CLASSES.index(name) for name in {place}])"
    return None


def _leaves(value: Any, place: str, length: int) -> Iterator[tuple[str, Any]]:
    """The values of a batch with an entry for each sample, tensors or not, with their places."""
    held = _children(value, place)
    sequence = isinstance(value, (tuple, list)) and not any(
        isinstance(inner, Tensor) or _children(inner, "") for _, inner in held
    )
    if held and not sequence:
        for inner_place, inner in held:
            yield from _leaves(inner, inner_place, length)
    elif isinstance(value, Sized) and not isinstance(value, str):
        scalar = isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0
        if not scalar and len(value) == length:
            yield place, value


def _equal(value: object, other: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.numel() != other.numel():
        return False
    return value is other or torch.equal(value.reshape(other.shape), other)
