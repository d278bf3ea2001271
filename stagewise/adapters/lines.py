"""Calls, arguments and times as code: the lines to paste in messages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from stagewise.adapters.calls import Call, Reading
from stagewise.conventions import Convention

__all__ = ["call_text", "guessed_line", "velocity_line", "where"]

_ASK = "velocity=lambda module, xt, t, labels: "


class _Code(str):
    """Code that stands in lists, tuples and dicts as it is."""

    __repr__ = str.__str__


def velocity_line(reading: Reading, *, turned: str = "t", answer: str = "") -> str:
    """How to ask for the velocity in a call that is read so, to be pasted.

    An argument that cannot be written, such as a text, appears as the name of its parameter.
    `answer` is what to write after the call to get the prediction.
    """
    slots, maker = reading.slots, reading.maker
    call, leaves = slots.call, slots.call.leaves
    x, time = "xt", _time_text(maker.convention, turned)
    if maker.convention.by_sigma:
        x = "xt / t.reshape(-1, *[1] * (xt.ndim - 1))"
    texts = {slots.x: x}
    sides = leaves[slots.time].ndim - 1
    texts[slots.time] = f"({time}).reshape(-1{', 1' * sides})" if sides else time
    if slots.labels is not None:
        like = leaves[slots.labels]
        texts[slots.labels] = "labels[:, None]" if like.ndim > 1 else "labels"
        if slots.one_hot:
            texts[slots.labels] = f"nn.functional.one_hot(labels, {like.shape[1]}).to(xt)"
    if call.columns:
        parts = ", ".join(texts.get(k, call.named[0][k]) for k, _ in call.columns)
        texts[min(call.columns)[0]] = f"torch.cat([{parts}], 1)"
    sign = "" if maker.convention.sign_of(maker.prediction) == 1 else "-"
    text = f"{sign}{call_text(call, {id(leaves[k]): text for k, text in texts.items()})}{answer}"
    if maker.prediction.kind != "velocity":
        text = f"{maker.prediction!r}.to_velocity({maker.path!r}(t), {text}, xt)"
    return f"{_ASK}{text}"


def call_text(call: Call, known: Mapping[int, str]) -> str:
    """A call as code."""
    texts = [
        known.get(id(leaf)) or (repr(leaf) if _is_plain(leaf) else name.split(" ")[0])
        for leaf, name in zip(call.leaves, call.named[0], strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(
        [_Code(text) for text in texts[: call.spec.num_leaves]], call.spec
    )
    parts = [*map(repr, args), *(f"{key}={part!r}" for key, part in kwargs.items())]
    return f"{where(call.name)}({', '.join(parts)})"


def guessed_line(root: nn.Module, *, labelled: bool) -> str:
    """How to ask the largest part of a module for the velocity, a guess without a known call."""

    def size(child: tuple[str, nn.Module]) -> int:
        return sum(weight.numel() for weight in child[1].parameters())

    name, net = max(filter(size, root.named_children()), key=size, default=("net", root))
    kinds = inspect.signature(getattr(net, "_orig_mod", net).forward).parameters.values()
    more = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in kinds) > 2
    return f"{_ASK}module.{name}(xt, t{', labels' if labelled and more else ''})"


def where(name: str) -> str:
    """A submodule as code."""
    return f"module.{name}" if name else "module"


def _is_plain(leaf: Any) -> bool:
    """Whether a value is short enough to write as its repr."""
    if isinstance(leaf, (list, tuple)):
        return all(_is_plain(one) for one in leaf) and len(leaf) <= 4
    return leaf is None or isinstance(leaf, (bool, int, float, str))


def _time_text(convention: Convention, t: str) -> str:
    if convention.by_sigma:
        return f"(1 - {t}) / {t}"
    noise, data = convention.noise_time, convention.data_time
    if (noise, data) == (0, 1):
        return t
    if data == 0:
        return f"1 - {t}" if noise == 1 else f"{noise:g} * (1 - {t})"
    start = f"{noise:g} + " if noise else ""
    return f"{start}{data - noise:g} * {t}"
