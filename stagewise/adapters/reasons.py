"""Finds why `x_1` of the batch is not what a network is trained on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from stagewise.adapters.base import TargetMaker
from stagewise.adapters.calls import Call, Reading, readings
from stagewise.adapters.conditions import conditioning, short
from stagewise.adapters.fitting import arranged, factor_of, layout_of
from stagewise.adapters.lines import velocity_line, where
from stagewise.adapters.rows import equals
from stagewise.conventions import written

__all__ = ["GIVEN", "Candidates", "Made", "Reasons", "own_of"]

GIVEN = "x_1 as it was given to what makes the targets"
"""The name of this candidate; the first one with another name is the `x_1` of the batch."""

Candidates: TypeAlias = Callable[[], "Sequence[tuple[str, Tensor]]"]
"""Returns what `x_1` may be at the time of a call, best first, with names for messages: as given
to what makes the targets, as found in the batch, other floating-point tensors of the batch."""


@dataclass
class Made:
    """What a submodule returned."""

    name: str  # of the submodule
    tensor: weakref.ref[Tensor]
    shape: tuple[int, ...]
    alone: bool  # whether x_1 of the batch was its only argument


class Reasons:
    """Collects, in one training step, why calls do not fit; `made`: what submodules returned."""

    def __init__(
        self, makers: Sequence[TargetMaker], labels: Tensor | None, labels_name: str
    ) -> None:
        self.made: list[Made] = []
        self._makers, self._labels = makers, labels
        self._labels_text = "None" if labels is None else labels_name
        self._bank = f"bank=LatentBank(latents{'' if labels is None else ', labels'})."
        # The surest first: of each kind the first message, empty if there is none.
        kinds = ("scaled", "rearranged", "reversed", "encoded", "guessed")
        self._found = dict.fromkeys(kinds, "")
        self._coupled = ""
        self._lines: list[str] = []
        self._shape: tuple[int, ...] = ()

    @property
    def diagnosis(self) -> str:
        """What the calls say best, and the cure; empty if they say nothing."""
        return next(filter(None, self._found.values()), "")

    def _tell(self, kind: str, message: str) -> None:
        self._found[kind] = self._found[kind] or message

    def explain(self, line: str) -> str:
        """Why no call fits, with a cure; `line` is how to ask for the velocity."""
        calls = "".join(f"\n  {line}" for line in self._lines[:8]) or " none with such a tensor"
        calls = f"Calls with a tensor of its shape, {self._shape}:{calls}\n"
        if self._coupled:
            return f"{self._coupled}\n{calls}"
        if self.diagnosis:
            return f"{self.diagnosis}\n{calls}"
        paths = ", ".join(repr(maker.path) for maker in self._makers)
        return (
            "no call in the first training step was given x_t and a time that fit x_1 of the batch "
            f"on {paths}. {calls}"
            "If training encodes, scales, flips or reorders x_1, say read_batch=... that returns "
            "what is trained on; if it counts time or scales x_t in another way, say "
            "convention=..., the noise scheduler or a name of stagewise.conventions; if the "
            f"network is called in another way, say {line}."
        )

    def compare(
        self, name: str, reading: Reading, matched: str, x1: Tensor, text: str, own: Tensor
    ) -> str:
        """Why a call fits another candidate than `x_1` of the batch; empty if that fits too."""
        if matched == text or (own.shape == x1.shape and reading.noisy.fits(own)):
            return ""
        if matched == GIVEN:
            return self.origin(x1, text, own)
        return (
            f"{where(name)} is given x_t of {matched}, not of {text}. Say so: {self._find(matched)}"
        )

    def origin(self, x1: Tensor, text: str, own: Tensor) -> str:
        """How what is trained on, (B, *), was made from `x_1` of the batch; empty if unknown."""
        factor = factor_of(x1, own)
        if factor is not None:
            return self._scaled(factor, f"{factor:g}", text)
        for made in self.made:
            tensor = made.tensor()
            factor = None if tensor is None else factor_of(x1, tensor)
            if factor is not None:
                return self._encoded(made, factor)
        layout = layout_of(x1, own)
        return "" if layout is None else self._rearranged(layout, text)

    def note(self, call: Call, candidates: list[tuple[str, Tensor]]) -> None:
        """Records why a call does not fit."""
        text, own = own_of(candidates) or candidates[0]
        self._shape = tuple(own.shape)
        if any(isinstance(leaf, Tensor) and leaf.shape == own.shape for leaf in call.leaves):
            given = ", ".join(short(leaf) for leaf in call.leaves[:6])
            self._lines.append(f"{call.name or 'module'}: {type(call.module).__name__}({given})")
        for _, x1 in candidates:
            for reading in readings(call, tuple(x1.shape), x1, self._makers, self._labels):
                lean = reading.noisy.leans(x1)
                if lean and not self._coupled:
                    self._coupled = _depends(call.name, lean, reading.noisy.scale(x1))
        for reading in readings(call, None, own, self._makers, self._labels):
            self._explains(call.name, reading, text, own)

    def _explains(self, name: str, reading: Reading, text: str, own: Tensor) -> None:
        """Records what would make `x_1` of the batch fit a reading of a call of `name`."""
        noisy, shape = reading.noisy, tuple(reading.noisy.xt.shape)
        before = [made for made in self.made if made.shape == shape]
        alone = [made for made in before if made.alone and made.shape == self._shape]
        if alone:
            self._tell(
                "guessed",
                f"{where(alone[0].name)} is called with x_1 alone before {where(name)}, so "
                "training may be on its output. Say how: encode=lambda x, module: ..., or give the "
                "x1 of training to a StageTarget in the step, self.target(u, xt=xt, t=t, x1=x1).",
            )
        if shape == self._shape:
            factor = None if alone else noisy.scale(own)
            if factor is not None:
                self._tell("scaled", self._scaled(factor, f"about {factor:g}", text))
            by_sigma = reading.maker.convention.by_sigma  # such a time has only one direction
            if not by_sigma and replace(noisy, t=1 - noisy.t).fits(own):
                turned = replace(reading, slots=conditioning(reading.slots, self._labels))
                line = velocity_line(turned, turned="(1 - t)")
                cure = f"Say how to ask it: {line}"
                told = reading.maker.convention
                if reading.maker.place.object is None:  # assumed, or given for the whole step
                    noise, data = told.data_time, told.noise_time
                    told = replace(told, noise_time=noise, data_time=data, sign=-told.sign)
                    cure = f"Say how it runs: convention={written(told)}"
                if reading.maker.late:  # it was not called: what is predicted is not known
                    cure = (
                        f"Call {reading.maker.name} before the network, or say how time runs, "
                        'such as convention="pi0".'
                    )
                self._tell(
                    "reversed",
                    f"{where(name)} fits x_1 of the batch if its time runs the other way "
                    f"than {reading.maker.name} says. {cure}",
                )
        for layout, x1 in arranged(own, shape[1:]):
            if noisy.fits(x1):
                self._tell("rearranged", self._rearranged(layout, text))
        for made in before:
            tensor = made.tensor()
            given = reading.slots.call.leaves[reading.slots.x]
            if tensor is None or equals(tensor, own) or tensor is given:
                continue
            factor = 1.0 if noisy.fits(tensor) else noisy.scale(tensor)
            if factor is not None:
                self._tell("encoded", self._encoded(made, factor))
        if shape != self._shape and len({made.name for made in before}) == 1:
            # The step may have changed or freed it.
            self._tell("guessed", self._encoded(before[0], 1.0))

    def _find(self, x1: str) -> str:
        return f"read_batch=lambda batch: ({x1}, {self._labels_text})"

    def _rearranged(self, layout: str, text: str) -> str:
        find = self._find(_written(text) + layout)
        return (
            f"the values of x_1 are those of {_written(text)} in another order, the same in every "
            "sample. The posterior is the same, but the velocity of the model is not. "
            + (f"Say so: {find}." if layout else f"Give them in that order: {self._bank}")
        )

    def _scaled(self, factor: float, about: str, text: str) -> str:
        find = self._find(f"{factor:g} * {_written(text)}")
        return f"training scales x_1 by {about}. Say so: {find}"

    def _encoded(self, made: Made, factor: float) -> str:
        times = "" if factor == 1 else f"{factor:g} * "
        latents = f"{times}{where(made.name)}"
        encode = f"encode=lambda x, module: {latents}(x)" if made.alone else "encode=..."
        return (
            f"training encodes x_1: {latents}(...), of shape {made.shape}, fits. Say so, "
            f"{encode}, or give what is trained on: {self._bank}"
        )


def own_of(candidates: Sequence[tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
    """Name and tensor of `x_1` of the batch among the candidates."""
    return next((pair for pair in candidates if pair[0] != GIVEN), None)


def _depends(name: str, lean: float, factor: float | None) -> str:
    """The message for noise that is normal but not independent; empty if `x_1` is only scaled."""
    if lean < 0 and factor is not None:
        return ""
    scaled = "" if factor is None else f" Or is x_1 scaled by {factor:g}?"
    return (
        f"{where(name)} is given x_t and a time that fit x_1 of the batch, but x_0 and x_1 are "
        f"not independent (by {lean:.1f} standard errors): a coupling?{scaled} The closed form of "
        "the oracle holds for independent pairs only. Train from x0 = torch.randn_like(x1)."
    )


def _written(text: str) -> str:
    """A candidate's name as code to paste."""
    return text if text.startswith("batch") else "batch[0]"
