"""How the samples that are trained on come from those of a batch: scaled, reshaped, or encoded.

A training step may call an encoder, draw from the posterior that it returns, and scale the draw.
Each of these steps is found from its values: the input and output of a submodule's call, and what
was trained on. The same steps can then be applied to other batches, and written as code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stagewise.adapters.base import Detach, rebind
from stagewise.adapters.hooks import eager
from stagewise.adapters.scaling import Step, done, related, text_of, way_of
from stagewise.noise import is_off

__all__ = [
    *("STALE", "EncoderCall", "EncoderWeights", "Encoding", "encoder_call"),
    *("origin_of", "version_of_weights", "watch_encoders"),
]

STALE = (
    "The encoder that makes x_1 is trained in the same step, so a bank that is read once goes "
    "stale. Freeze it, module.encoder.requires_grad_(False), or give a bank of what is trained on: "
    "StageRun(bank=LatentBank(latents, labels))."
)
"""The message for a bank whose rows change in training."""


@dataclass(frozen=True)
class Encoding:
    """From `x_1` of a batch, (B, *), and the module, to what is trained on, (B, *)."""

    # Names and numbers only. Besides those of `scaling`: `call`, `get`, `draw`.
    steps: tuple[Step, ...]

    def __call__(self, x: Tensor, module: nn.Module) -> Tensor:
        """Encodes; each call draws from the posterior again."""
        value: Any = x
        for kind, *what in self.steps:
            if kind == "call":
                function: Any = module
                for part in filter(None, what[0].split(".")):
                    function = getattr(function, part)
                kind, rounded = x.device.type, what[2]
                dtype = getattr(torch, rounded) if rounded else torch.get_autocast_dtype(kind)
                with torch.autocast(kind, dtype, enabled=bool(rounded)):
                    value = function(value, **dict(what[1]))
            elif kind == "get":
                value = value[what[0]] if isinstance(what[0], int) else getattr(value, what[0])
            elif kind == "draw":
                value = value[0] + (value[1] / 2).exp() * torch.randn_like(value[0])
            else:
                value = done(value, kind, *what)
        return value

    @property
    def draws(self) -> bool:
        """Whether it draws from a posterior."""
        return any(kind in ("sample", "draw") for kind, *_ in self.steps)

    @property
    def verb(self) -> str:
        """What training does with `x_1`, in one word."""
        kinds = {kind for kind, *_ in self.steps}
        return "encodes" if "call" in kinds else "reshapes" if kinds == {"reshape"} else "scales"

    @property
    def line(self) -> str:
        """The steps as code to paste."""
        text, before = "x", ""
        for kind, *what in self.steps:
            arithmetic = kind in ("*", "/", "+", "-")
            loose = before in (("+", "-") if arithmetic else ("+", "-", "*", "/"))
            inner = f"({text})" if loose else text
            before = kind
            if kind == "call":
                options = "".join(f", {key}={value!r}" for key, value in what[1])
                called, autocast = _path(what[0]), f"x.device.type, torch.{what[2]}"
                called = f"torch.autocast({autocast})({called})" if what[2] else called
                text = f"{called}({text}{options})"
            elif kind == "get":
                text = f"{inner}[{what[0]}]" if isinstance(what[0], int) else f"{inner}.{what[0]}"
            elif kind == "draw":
                draw = "mean + (v / 2).exp() * torch.randn_like(mean)"
                text = f"(lambda mean, v, *_: {draw})(*{text})"
            else:
                text = f"{text if kind in ('+', '-') else inner}{text_of(kind, *what)}"
        return f"encode=lambda x, module: {text}"


def _path(name: str) -> str:
    """A submodule, or a method of one, as code."""
    parts = name.split(".") if name else []
    return "module" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)


class EncoderCall(NamedTuple):
    """A call of a submodule with one tensor, made of `x_1` of the batch."""

    before: tuple[Step, ...]  # what was done with `x_1`
    name: str  # of the submodule or its method, such as "vae.encode"
    options: tuple[tuple[str, Any], ...]  # keyword arguments
    autocast: str  # the type that autocast computed in, empty without it
    output: Any


def encoder_call(
    own: Tensor, name: str, args: Sequence[Any], kwargs: dict[str, Any], output: Any
) -> EncoderCall | None:
    """The call of an encoder; None if its input is not made of `x_1` of the batch."""
    plain = (bool, int, float, str, type(None))
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    if not all(isinstance(value, plain) for value in kwargs.values()):
        return None
    before = related(own, args[0])
    if before is None:
        return None
    kind = args[0].device.type
    on = torch.is_autocast_enabled(kind)
    autocast = str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if on else ""
    return EncoderCall(before, name, tuple(kwargs.items()), autocast, output)


def watch_encoders(name: str, module: nn.Module, note: Callable[..., None]) -> Iterator[Detach]:
    """Watches the methods of a module that are named `encode...`: hooks do not see them.

    `note` is called with the method's name, arguments, keyword arguments and output.
    """
    for method in dir(type(module)):
        if not method.startswith("encode") or not callable(getattr(type(module), method)):
            continue
        plain, at = getattr(module, method), f"{name}.{method}".strip(".")

        def encode(
            *args: Any, plain: Callable[..., Any] = plain, at: str = at, **kwargs: Any
        ) -> Any:
            output = plain(*args, **kwargs)
            note(at, args, kwargs, output)
            return output

        yield rebind(module, method, encode, observes=True)


@torch.no_grad()
def origin_of(x1: Tensor, own: Tensor, calls: Sequence[EncoderCall]) -> Encoding | None:
    """How samples that are trained on, `x1`, came from those of the batch, `own`, both (B, *).

    None if they are equal, or it is not known. `calls` are those of encoders, in order.
    """
    after = related(own, x1)
    if after is not None:
        return Encoding(after) if after else None
    for call in reversed(calls):  # the last one is nearest to x_1; modules end after their parts
        begin = (*call.before, ("call", call.name, call.options, call.autocast))
        for steps, mean, std in _forms(call.output):
            after = related(mean, x1) if std is None else _drawn(mean, std, x1)
            if after is not None:
                return Encoding((*begin, *steps, *after))
    return None


def _forms(output: Any, depth: int = 3) -> Iterator[tuple[tuple[Step, ...], Tensor, Tensor | None]]:
    """What training may take from an encoder's answer: steps, mean, and std if it is drawn."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim > 1:
            yield (), output, None
            if output.shape[1] % 2 == 0:
                mean, log_variance = output.chunk(2, 1)
                yield (("chunk",), ("get", 0)), mean, None
                yield (("chunk",), ("draw",)), mean, (log_variance / 2).exp()
    elif isinstance(output, (tuple, list)) and depth:
        for k, held in enumerate(output):
            for steps, mean, std in _forms(held, depth - 1):
                yield (("get", k), *steps), mean, std
        pair = [held for held in output[:2] if isinstance(held, Tensor) and held.ndim > 1]
        if len(pair) == 2 and pair[0].shape == pair[1].shape:
            yield (("draw",),), pair[0], (pair[1] / 2).exp()
    elif depth:
        for name in ("latent_dist", "latents", "mean", "z"):
            part = getattr(output, name, None)
            for steps, mean, std in _forms(part, depth - 1) if not callable(part) else ():
                if std is None or name != "mean":
                    yield (("get", name), *steps), mean, std
        centre, width = getattr(output, "mean", None), getattr(output, "std", None)
        width = width if isinstance(width, Tensor) else getattr(output, "stddev", None)
        if isinstance(centre, Tensor) and isinstance(width, Tensor) and hasattr(output, "sample"):
            yield (("sample",),), centre, width


def _drawn(mean: Tensor, std: Tensor, x1: Tensor) -> tuple[Step, ...] | None:
    """The steps after a draw from normal distributions that give `x1`; None if none do."""
    mean, std = mean[: len(x1)], std[: len(x1)]
    if mean.shape != x1.shape or std.shape != x1.shape:
        return None
    a, s, b = (value.detach().double().flatten() for value in (mean, std, x1))
    weight = 1 / s.square().clamp_min(1e-30)
    total = float(weight.sum())
    mean_a, mean_b = float((weight * a).sum()) / total, float((weight * b).sum()) / total
    size = float((weight * (a - mean_a).square()).sum())
    if size < 400:  # the factor would be known to 5 % only
        return None
    factor = float((weight * (a - mean_a) * (b - mean_b)).sum()) / size
    shift, error = mean_b - factor * mean_a, abs(factor) / math.sqrt(size)
    if abs(shift) < 4 * (abs(factor) / math.sqrt(total) + abs(mean_a) * error):
        factor, shift = float((weight * a * b).sum() / (weight * a * a).sum()), 0.0
    # As few digits as the draws can tell.
    told = (d for d in range(1, 8) if abs(factor - float(f"{factor:.{d}g}")) <= 3 * error)
    steps = way_of(0, factor, shift, next(told, 8))
    made = a
    for kind, number in steps:
        made = done(made, kind, number)
    gap = (b - made) / (abs(factor) * s).clamp_min(1e-30)
    off = is_off(len(gap), float(gap.mean()), float(gap.square().mean()))
    return None if off else steps


class EncoderWeights:
    """The weights of the submodules of `module` that `encode` calls; it is called once."""

    def __init__(self, module: nn.Module, encode: Callable[[], Any]) -> None:
        self._weights: list[nn.Parameter] = []

        def note(part: nn.Module, _: Any) -> None:
            # The parts of a compiled module cannot be watched: take all its weights.
            self._weights += part.parameters(recurse="_orig_mod" in part._modules)

        hooks = [part.register_forward_pre_hook(note) for _, part in eager(module)]
        try:
            encode()
        finally:
            for hook in hooks:
                hook.remove()
        self._version = version_of_weights(self._weights)

    def changed(self) -> bool:
        """Whether they have changed since the last call; does not read their values."""
        before, self._version = self._version, version_of_weights(self._weights)
        return self._version != before


def version_of_weights(weights: Any) -> int:
    """A number that grows with each change of a weight; does not read their values."""
    return sum(weight._version for weight in weights)
