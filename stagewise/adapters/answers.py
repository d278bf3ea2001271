r"""What the answer of a network stands for: which tensor it is, and which prediction.

A step may convert the answer f before its loss, to `A_t f + B_t x_t` (predicted data to a velocity,
for example), turn its sign, or use the second of two tensors. For a prediction
`y = c_t x_1 + b_t x_t`, a loss that grows with the distance of each number,

    sum_j w_j |A_t f_j + B_t x_t,j - (A_t y_j + B_t x_t,j)|^p,   w_j >= 0,

has a gradient at f with the sign of `f_j - y_j` in every number, for all weights, masks, A_t and
B_t. No other prediction agrees with these signs, so the first backward pass says what f is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stagewise.adapters.base import TargetMaker
from stagewise.adapters.fitting import Noisy
from stagewise.batches import leaves_of
from stagewise.paths import Prediction, PredictionKind, expand_like

__all__ = ["Gradients", "Verdict", "answer_text", "tensor_of"]

_SURE = 0.99
"""Share of the signs that must agree; rounding may turn a few."""

_UNLIKE = 0.9
"""Below this share the other terms of a loss do not explain why signs differ."""

_CLEAR = 0.002
"""By how much the best reading must be better than the next."""

_LEAST = 32
"""Fewer signs say nothing."""

_ROUNDING = 8
"""Differences below so many units of the coarsest precision may have any sign."""


def _alike(output: Any, shape: tuple[int, ...]) -> list[tuple[str, Tensor]]:
    """The tensors of a shape in what a network returns, and what to write after it to get them."""
    return [pair for pair in leaves_of(output, "") if tuple(pair[1].shape) == shape]


def tensor_of(output: Any, shape: tuple[int, ...], line: str = "", at: int = 0) -> Tensor:
    """The `at`-th tensor of a shape in what a network returns.

    Raises:
        ValueError: If there is none; the message shows `line`, how to ask for one.
    """
    found = _alike(output, shape)
    if found:
        return found[min(at, len(found) - 1)][1]
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"Expected the network to return a prediction of shape {shape}, got {came}. Say how to get "
        f"the velocity from it: {line or 'velocity=lambda module, xt, t, labels: ...'}"
    )


def answer_text(output: Any, shape: tuple[int, ...], at: int = 0) -> str:
    """What to write after a call to get a tensor of that shape; empty if there is none."""
    found = _alike(output, shape)
    if found:
        return found[min(at, len(found) - 1)][0]
    for text, tensor in leaves_of(output, ""):
        likely = tensor.ndim == len(shape) and tensor.shape[1] > shape[1]
        if likely and tensor.shape[2:] == shape[2:]:
            return f"{text}[:, :{shape[1]}]"
    return ""


@dataclass(frozen=True)
class Verdict:
    """What gradients say about an answer."""

    reads: TargetMaker | None  # whose prediction the answer is, None if not known
    at: int  # which of the tensors
    share: float  # how many signs agree with what the maker says
    doubted: bool  # whether these are too few for it to be true


class Gradients:
    """The gradient at a network's answer, and which prediction it belongs to.

    Args:
        maker: Says which prediction the loss is of.
        noisy: What the network was given.
        x1: What that was made from, (B, *).
        output: What it returned, which retains its gradients.
    """

    def __init__(self, maker: TargetMaker, noisy: Noisy, x1: Tensor, output: Any) -> None:
        self._noisy, self._x1 = noisy, x1
        self._readings = _readings(maker)
        self._answers = [tensor for _, tensor in _alike(output, tuple(x1.shape))]
        self._versions = [tensor._version for tensor in self._answers]

    @torch.no_grad()
    def votes(self, known: bool, added: Tensor | None = None) -> Tensor:
        """Numbers of signs that were compared and that agree, (answers, readings, 2).

        Args:
            known: Whether the targets are known; otherwise nothing is compared.
            added: What a scheme has added to the targets of the maker, (B, *).
        """
        count = len(self._answers), len(self._readings), 2
        votes = torch.zeros(count, dtype=torch.int64, device=self._x1.device)
        rows = self._noisy.rows()
        if rows is None or not known:
            return votes
        xt, t = self._noisy.xt[rows].float(), self._noisy.t[rows].float()
        path, x1 = self._noisy.path(t), self._x1[rows].float()
        if added is not None:
            c = self._readings[0].prediction.coefficients(path)[0]
            x1 = x1 + added[rows].float() / expand_like(c, x1)
        for n, answer in enumerate(self._answers):
            # A tensor that was changed in place is not what the network returned.
            if answer.grad is None or answer._version != self._versions[n]:
                continue
            f, g = answer.detach()[rows].float(), answer.grad[rows].float()
            eps = max(self._noisy.rounding, torch.finfo(answer.dtype).eps)
            for k, maker in enumerate(self._readings):
                sign = maker.convention.sign_of(maker.prediction)
                c, b = (expand_like(v, xt) for v in maker.prediction.coefficients(path))
                parts = f, sign * c * x1, sign * b * xt
                gap = parts[0] - parts[1] - parts[2]
                near = _ROUNDING * eps * sum(part.abs() for part in parts)
                counts = g.isfinite() & (g != 0)  # neither masked nor lost
                votes[n, k, 0] = counts.sum()
                votes[n, k, 1] = (counts & ((g > 0).eq(gap > 0) | (gap.abs() <= near))).sum()
        return votes

    def verdict(self, votes: Tensor) -> Verdict | None:
        """The result of the votes of all ranks; None if they say nothing."""
        votes = votes.cpu()
        share = torch.where(votes[..., 0] >= _LEAST, votes[..., 1] / votes[..., 0], -1.0)
        if not share.numel() or float(share.max()) < 0:
            return None
        at = int(share.max(1).values.argmax())
        own, others = float(share[at, 0]), share[at, 1:]
        best = int(others.argmax()) + 1
        if own >= max(_SURE, float(share[at, best]) - _CLEAR):
            return Verdict(self._readings[0], at, own, doubted=False)
        second = max((float(s) for k, s in enumerate(share[at]) if k != best), default=-1.0)
        if float(share[at, best]) >= max(_SURE, second + _CLEAR):
            return Verdict(self._readings[best], at, own, doubted=False)
        return Verdict(None, at, own, doubted=own < _UNLIKE)


def _readings(maker: TargetMaker) -> list[TargetMaker]:
    """The maker, and the same with other predictions or the other sign."""
    own, told = maker.prediction.kind, maker.convention
    kinds: tuple[PredictionKind, ...] = ("data", "noise", "v", "velocity")
    plain = replace(told, sign=1)
    others = [maker.like(Prediction(kind), plain) for kind in kinds if kind != own]
    turned = replace(told, sign=-told.sign if own == "velocity" else -1)  # type: ignore[arg-type]
    return [maker, *others, maker.like(Prediction("velocity"), turned)]
