r"""Samples of a model, from the same noise in all probes, to see which of them copy a training row.

Two measurements (Liu et al., arXiv 2512.02826). From which t on does the model copy? The oracle
integrates each sample from noise to `t_switch`, and the model from there (Fig. 5); at 0 it is the
model alone. What does the model make of held-out rows? They are noised to `t_resume`,

    x_t = a_t x_1 + s_t x_0,

and the model integrates from there (Fig. 6). `stagewise.copies` says which samples are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.masks import MaskedLabels, compared_within
from stagewise.oracle import Oracle
from stagewise.sampling import Velocity, sample, time_grid

__all__ = ["METHOD", "MemorizationProbe"]

METHOD = "euler"
"""The solver. It does not ask at t = 1, where the oracle is singular."""


class MemorizationProbe:
    """Noise, labels and held-out rows that stay the same throughout a run.

    The `samples`, and the rows to resume, `held_out`, (n, *), with their labels, are the same on
    any number of ranks: this process holds every `world_size`-th, from `rank` on. It takes `steps`
    from t = 0 to 1. `labelled`: whether the model is given labels. `reachable` gives the nearest
    times, (B,), that the model knows.

    Attributes:
        labels: Classes of the samples, (n,), as frequent as in the bank; None if neither model nor
            oracle is given any.
        x1: The held-out rows of this rank, None if there are none; their labels are `x1_labels`.
    """

    def __init__(
        self,
        oracle: Oracle,
        samples: int,
        held_out: tuple[Tensor, Tensor | MaskedLabels | None] | None,
        *,
        labelled: bool,
        class_wise: bool,
        t_switch: Sequence[float],
        t_resume: Sequence[float],
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        reachable: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> None:
        self._oracle, self._steps, self._reachable = oracle, steps, reachable
        self._labelled, self._class_wise = labelled, class_wise
        self._t_switch, self._t_resume = t_switch, t_resume
        bank, own, draws = oracle.bank, slice(rank, None, world_size), _generator(seed, 0)
        self._noise = torch.randn(samples, *bank.shape, generator=draws)[own]
        rows = torch.randint(len(bank), (samples,), generator=draws)[own]
        given = labelled or class_wise or bank.pairs is not None
        self.labels = bank.classes_of(rows.tolist()) if given else None
        self.x1: Tensor | None = None
        self.x1_labels: Tensor | MaskedLabels | None = None
        if held_out is not None:
            x1, labels = held_out
            self.x1, self.x1_labels = x1[own], None if labels is None else labels[own]
            self._x1_noise = torch.randn(x1.shape, generator=_generator(seed, 1))[own]
        self._led: dict[float, Tensor] = {}

    def generate(
        self, velocity: Callable[[Tensor, Tensor, Any], Tensor], device: torch.device
    ) -> tuple[dict[float, Tensor], dict[float, tuple[Tensor, Tensor]]]:
        """Samples of this rank by `t_switch`; noised rows and samples from them by `t_resume`.

        `velocity` is that of the model, on `device`, from `x_t`, t and labels.
        """
        model, made = self._of_model(velocity, self.labels, device), {}
        for t in self._t_switch:
            x = self._led_to(t, device)
            made[t] = x if t == 1 else self._integrate(model, x, self._asked(t), 1.0)
        resumed: dict[float, tuple[Tensor, Tensor]] = {}
        if self.x1 is None:
            return made, resumed
        model = self._of_model(velocity, self.x1_labels, device)
        x1, noise = self.x1.to(device).float(), self._x1_noise.to(device)
        for t in self._t_resume:
            start = self._asked(t)
            times = torch.full((len(x1),), start, device=device)
            noised = self._oracle.path.interpolate(noise, x1, times)
            resumed[t] = noised, self._integrate(model, noised, start, 1.0)
        return made, resumed

    def _of_model(
        self,
        velocity: Callable[[Tensor, Tensor, Any], Tensor],
        labels: Tensor | MaskedLabels | None,
        device: torch.device,
    ) -> Velocity:
        given = compared_within(labels, self._labelled)
        given = None if given is None else given.to(device)

        def checked(xt: Tensor, t: Tensor) -> Tensor:
            v = velocity(xt, t, given)
            if v.shape != xt.shape:
                raise ValueError(
                    f"Expected a velocity of shape {tuple(xt.shape)}, got {tuple(v.shape)}."
                )
            return v

        return checked

    def _of_oracle(self, xt: Tensor, t: Tensor) -> Tensor:
        place, labels = self._oracle.bank.device, compared_within(self.labels, self._class_wise)
        labels = None if labels is None else labels.to(place)
        return self._oracle.inner.velocity(xt.to(place), t.to(place), labels).to(xt)

    def _led_to(self, t: float, device: torch.device) -> Tensor:
        """The samples at `t`, from where the model continues: the same at all probes."""
        if t not in self._led:
            x, end = self._noise.to(device), self._asked(t)
            led = x if t == 0 else self._integrate(self._of_oracle, x, 0.0, end)
            if isinstance(self.labels, MaskedLabels):
                # Padding is noised zeros, as in training.
                times = torch.full((len(x),), end, device=device)
                padding = self._oracle.path.interpolate(x, torch.zeros_like(x), times)
                led = led.where(self.labels.entries.to(device), padding)
            self._led[t] = led.cpu()
        return self._led[t].to(device)

    def _integrate(self, velocity: Velocity, x: Tensor, start: float, end: float) -> Tensor:
        grid = time_grid(max(1, round(self._steps * (end - start))), start=start, end=end)
        inner = self._reachable(grid[1:-1])
        inner = inner[(inner > start) & (inner < end)].unique()
        return sample(velocity, x, method=METHOD, times=torch.cat([grid[:1], inner, grid[-1:]]))

    def _asked(self, t: float) -> float:
        return t if t in (0, 1) else float(self._reachable(torch.tensor([t]).double()))


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator independent of `torch.manual_seed(seed)`, which may have made the data."""
    mixed = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)
