"""Finds how one tensor is made of another: reshaped, rounded, scaled, shifted and clamped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.bank.building import HALF

__all__ = ["Step", "done", "related", "text_of", "way_of"]

Step = tuple[Any, ...]
"""An operation and its arguments: a method, or `*`, `/`, `+`, `-` with one number, or with one
for each channel and the number of axes after the channels."""

_Ends = tuple["float | None", "float | None"]
_NO_ENDS: _Ends = (None, None)
_LEAST = 6
"""The least number of values in a channel to fit its two numbers."""


_METHODS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "reshape": lambda shape: (-1, *shape),
    "to": lambda kind: (getattr(torch, kind),),
    "clamp": lambda *ends: ends,
    "sample": lambda: (),
    "chunk": lambda: (2, 1),
}
"""Steps that are a method, and its arguments."""


def done(x: Any, kind: str, *what: Any) -> Any:
    """Applies a step to samples, (B, *)."""
    if kind in _METHODS:
        return getattr(x, kind)(*_METHODS[kind](*what))
    number = what[0]
    if isinstance(number, tuple):
        number = torch.tensor(number, dtype=torch.float64).to(x).reshape(-1, *[1] * what[1])
    if kind in "*/":
        return x * number if kind == "*" else x / number
    return x + number if kind == "+" else x - number


def text_of(kind: str, *what: Any) -> str:
    """A step as code after `x`."""
    if kind in _METHODS:
        return f".{kind}({', '.join(map(repr, _METHODS[kind](*what)))})"
    if isinstance(what[0], tuple):
        sides = f".reshape(-1{', 1' * what[1]})" if what[1] else ""
        return f" {kind} torch.tensor({[*what[0]]!r}).to(x){sides}"
    return f" {kind} {what[0]!r}"


def way_of(k: int, factor: float, shift: float, digits: int) -> tuple[Step, ...]:
    """The k-th of four ways to write `factor x + shift`, with `digits` digits."""

    def short(number: float) -> float:
        return float(f"{number:.{digits}g}")

    scale = ("*", short(factor)) if k % 2 == 0 else ("/", short(1 / factor))
    before = k >= 2  # first shifted
    move = short(shift / factor if before else shift)
    steps = [scale] if scale[1] != 1 else []
    if move:
        steps.insert(0 if before else 1, ("+" if move > 0 else "-", abs(move)))
    return tuple(steps)


def related(x: Tensor, x1: Tensor) -> tuple[Step, ...] | None:
    """How `x1` is made of `x`, both (B, ...), or of its first samples; None if it is not."""
    x = x[: len(x1)]
    if len(x) != len(x1) or x.numel() != x1.numel() or not x1.is_floating_point():
        return None
    shape = tuple(x1.shape[1:])
    steps: tuple[Step, ...] = () if x.shape[1:] == shape else (("reshape", shape),)
    x, x1 = x.detach().reshape(x1.shape), x1.detach()
    if torch.equal(x.to(x1), x1):
        return steps
    low, high = (float(e) if int((x1 == e).sum()) > 1 else None for e in (x1.min(), x1.max()))
    options: list[tuple[int | None, _Ends]]
    options = [(axis, _NO_ENDS) for axis in (None, *sorted({1, x1.ndim - 1}))]
    if (low, high) != _NO_ENDS:
        options.append((None, (low, high)))
    for axis, ends in options:
        found = _Fit(x, x1, axis, ends).steps()
        if found is not None:
            return steps + found
    return None


class _Fit:
    """`x1` as `factor x + shift`, each one number or one for each channel, and clamped."""

    def __init__(
        self,
        x: Tensor,
        x1: Tensor,
        axis: int | None,
        ends: _Ends,
    ) -> None:
        self._x, self._x1, self._axis = x, x1, axis
        self._clamp: tuple[Step, ...] = () if ends == _NO_ENDS else (("clamp", *ends),)
        self._halves = [half for half in HALF if torch.equal(x1.to(half).to(x1), x1)]
        a, b = (self._channels(y.double()) for y in (x, x1))
        inside = torch.ones_like(b)
        for end, sign in zip(ends, (1, -1), strict=True):
            inside *= 1 if end is None else (sign * b > sign * end)
        count = inside.sum(1)
        mean_a, mean_b = ((y * inside).sum(1) / count.clamp_min(1) for y in (a, b))
        a, b = (a - mean_a[:, None]) * inside, (b - mean_b[:, None]) * inside
        size = a.square().sum(1)
        # A constant channel is only shifted.
        self._factor = torch.where(size > 0, (a * b).sum(1) / size, 1.0)
        eps = max(torch.finfo(kind).eps for kind in (x1.dtype, *self._halves))
        self._error = max(1e-5, 4 * eps) * b.norm(dim=1)
        gap = (b - self._factor[:, None] * a).norm(dim=1)
        shift, least = mean_b - self._factor * mean_a, 1e-5 * float(x1.abs().max())
        self._shift = shift.where(shift.abs() >= (6 * gap / count).clamp_min(least), 0.0)
        told = axis is None or float(count.min()) >= _LEAST
        self._fits = told and bool(((gap <= self._error) & (self._factor != 0)).all())

    def _channels(self, y: Tensor) -> Tensor:
        """One row for each."""
        return y.reshape(1, -1) if self._axis is None else y.movedim(self._axis, 0).flatten(1)

    def steps(self) -> tuple[Step, ...] | None:
        """Steps that give the same bits, or else nearly; None if there are none."""
        for before, after in self._casts() if self._fits else ():
            found = [steps for k in range(4) if (steps := self._exact(k, before, after))]
            if found:
                return min(found, key=lambda pair: pair[0])[1]
        near = (*self._way(0, [7] * len(self._factor)), *self._clamp)
        gap = (self._made(near) - self._x1).double().norm()
        return near if self._fits and gap <= 2 * self._error.norm() else None

    def _exact(
        self, k: int, before: tuple[Step, ...], after: tuple[Step, ...]
    ) -> tuple[int, tuple[Step, ...]] | None:
        """The number of digits and the steps, with the fewest digits that give the same bits."""
        digits = [0] * len(self._factor)
        for told in range(1, 10):
            trial = [kept or told for kept in digits]
            steps = (*before, *self._way(k, trial), *self._clamp, *after)
            right = self._channels(self._made(steps) == self._x1).all(1).tolist()
            digits = [n if same else 0 for n, same in zip(trial, right, strict=True)]
            if all(digits):
                return sum(digits), steps
        return None

    def _made(self, steps: Sequence[Step]) -> Tensor:
        own = self._x1.dtype in HALF or any(kind == "to" for kind, *_ in steps)
        made = self._x if own else self._x.to(self._x1)
        for step in steps:
            made = done(made, *step)
        return made.to(self._x1)

    def _casts(self) -> Iterator[tuple[tuple[Step, ...], tuple[Step, ...]]]:
        """The casts that may come before and after the other steps."""
        yield (), ()
        for half in self._halves:
            to, back = (("to", str(kind).removeprefix("torch.")) for kind in (half, self._x1.dtype))
            end = () if half == self._x1.dtype else (back,)
            yield (to,), end
            yield (), (to, *end)

    def _way(self, k: int, digits: Sequence[int]) -> tuple[Step, ...]:
        """`way_of` for all channels."""
        pairs = zip(self._factor.tolist(), self._shift.tolist(), digits, strict=True)
        if self._axis is None:
            return way_of(k, *next(pairs))
        sides, scales, moves = self._x1.ndim - 1 - self._axis, [], []
        for factor, shift, told in pairs:
            numbers: dict[str, float] = dict(way_of(k, factor, shift, told))
            scales.append(numbers.get("*", numbers.get("/", 1.0)))
            moves.append(numbers.get("-", -numbers.get("+", 0.0)))
        scale, move = ("/" if k % 2 else "*", tuple(scales), sides), ("-", tuple(moves), sides)
        scaled = [] if {*scales} == {1.0} else [scale]
        moved = [move] if any(moves) else []
        return (*moved, *scaled) if k >= 2 else (*scaled, *moved)
