"""`MemorizationMonitor`: how many samples copy a training row, and from which t the model does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn
from typing_extensions import Unpack

from stagewise.bank import LatentBank
from stagewise.callbacks import memorization_figures as pictures
from stagewise.callbacks.metrics import CopyShare
from stagewise.callbacks.model_monitor import ModelMonitor, model_in_eval_mode
from stagewise.callbacks.stage_callback import RunOptions
from stagewise.copies import Nearest, nearest_rows
from stagewise.oracle import Oracle
from stagewise.paths import expand_like
from stagewise.sampling import Velocity, switched

__all__ = ["MemorizationMonitor"]

_SHOWN = 8
"""Samples in a picture."""

_METHOD = "euler"
"""It does not ask at t = 1, where the oracle is singular."""


class MemorizationMonitor(ModelMonitor):
    """Samples from the model now and then, and counts copies of training rows (`copies`).

    The oracle leads each sample to `t_switch` and the model from there (Liu et al., arXiv
    2512.02826, Fig. 5): 0 is the model alone. Held-out rows noised to `t_resume` are finished by
    the model (Fig. 6). Noise and labels are the same in all probes; ranks share them.

    **Logged** (`stagewise_memorization` is `name`): `.../copies/t_switch=...` with `_low` and
    `_high` (95 %, exact binomial), `.../ratio/t_switch=...` (median d1/d2),
    `.../resumed_copies/t=...`, `.../probe_seconds`, `.../share_of_step_time`. **To TensorBoard and
    `dirpath`**: `copies`, and for images `samples` and `resumed`; `stages.jsonl`.

    Args:
        bank: See `StageCallback`.
        every_n_steps: Optimizer steps between probes; default a twentieth of the training, at most
            5000. The first is after step one, the last after the last.
        samples: How many, default 64; at least 2.
        t_switch: Times in [0, 1].
        t_resume: Times in [0, 1).
        weights: "average" of a `WeightAveraging`, once it has begun, "current", or "auto": the
            former if there is one.
        steps: Of Euler's method from t = 0 to 1, default 25.
        decode: From samples to images (n, 1 or 3, H, W), for the pictures.
        figures: See `PosteriorMonitor`.
        name: Prefix of tags and name of the folder.
        **options: What it says about the run: `velocity`, `held_out`, `find`, `class_wise`,
            `dirpath`, `seed`, ...; see `RunOptions`. Class-wise is "auto" here: if the network is
            given labels. Copies are looked for among all rows.

    Raises:
        ValueError: At construction for numbers out of range; at the start or in the first step if
            no velocity can be had or "average" is asked for and there is none.
    """

    order = 3
    event = "memorization_probe"
    longest: ClassVar[int] = 5000

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        every_n_steps: int | None = None,
        samples: int = 64,
        t_switch: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4),
        t_resume: tuple[float, ...] = (0.2, 0.5, 0.8),
        weights: Literal["auto", "average", "current"] = "auto",
        steps: int = 25,
        decode: Callable[[Tensor], Tensor] | None = None,
        figures: int | None = None,
        name: str = "stagewise_memorization",
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(bank, every_n_steps=every_n_steps, figures=figures, name=name, **options)
        for label, value, low in (("samples", samples, 2), ("steps", steps, 1)):
            if value < low:
                raise ValueError(f"Expected `{label}` of at least {low}, got {value}.")
        if not t_switch or not all(0 <= t <= 1 for t in t_switch):
            raise ValueError(f"Expected `t_switch` in [0, 1], one at least, got {t_switch}.")
        if not all(0 <= t < 1 for t in t_resume):
            raise ValueError(f"Expected `t_resume` in [0, 1), got {t_resume}.")
        if weights not in ("auto", "average", "current"):
            raise ValueError(
                f'Expected `weights` to be "auto", "average" or "current", got {weights!r}.'
            )
        self.samples, self.steps, self.weights, self.decode = samples, steps, weights, decode
        self.t_switch, self.t_resume = tuple(sorted(t_switch)), tuple(sorted(t_resume))
        self.oracle: Oracle | None = None
        self._shown: tuple[Any, ...] | None = None

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes or builds the bank, and reads held-out rows."""
        callbacks = self.run.trainer.callbacks  # type: ignore[attr-defined]
        self._averaging = next((c for c in callbacks if isinstance(c, WeightAveraging)), None)
        if self.weights == "average" and self._averaging is None:
            raise ValueError(
                'weights="average" needs an EMAWeightAveraging (or WeightAveraging) among the '
                'callbacks, and there is none. Add one, or say weights="current".'
            )
        super().start()
        self._take_bank()
        self.try_velocity(*self.rows(2))

    def _take_bank(self) -> None:
        self.oracle = self.run.oracle(self)
        self._others = self.others(self.samples) if self.t_resume else None
        self._led: dict[float, Tensor] = {}

    def settle(self) -> None:
        """Once the network is known: noise and labels, header."""
        super().settle()
        self._draw()
        header = {
            "event": "memorization",
            "rows": len(self._oracle.bank),
            "network": self.describe(),
            "weights": "average" if self._averages else "current",
            "class_wise": self.wise,
            "samples": self.samples,
            "held_out_rows": self._held_out,
            "method": _METHOD,
            "steps": self.steps,
            "path": repr(self._oracle.path),
        }
        images = " To see samples: decode=lambda x: images of shape (n, 3, H, W)."
        rank_zero_info(
            f"MemorizationMonitor: asks {header['network']}, {header['weights']} weights; "
            f"{self.writer.describe()}."
            + ("" if self.decode or pictures.is_image(self._oracle.bank.shape) else images)
        )
        self.writer.start([header, *self.history], resumed=bool(self.history))

    def _draw(self) -> None:
        """Noise and labels of all probes."""
        bank, trainer = self._oracle.bank, self.run.trainer
        asked = bool(bank.classes) and self.conditional
        said = self.run.option(self, "class_wise")
        self.wise = asked if said is None else said
        if self.wise:
            bank.require_classes()
        draws = _generator(self.seed, 0)
        if self.samples < trainer.world_size:
            raise ValueError(
                f"Expected `samples` of at least one for each of {trainer.world_size} ranks, got "
                f"{self.samples}."
            )
        mine = slice(trainer.global_rank, None, trainer.world_size)
        self._noise = torch.randn(self.samples, *bank.shape, generator=draws)[mine]
        rows = torch.randint(len(bank), (self.samples,), generator=draws)[mine]
        self._labels = torch.tensor(bank.labels_of(rows.tolist())) if asked or self.wise else None
        self._held_out = 0
        if self._others is not None:
            x1, labels = self._others
            if len(x1) < trainer.world_size or (labels is None and self._labels is not None):
                rank_zero_info(
                    "MemorizationMonitor: held-out rows are fewer than ranks, or have no labels "
                    "for a network that is given some: nothing is resumed from them."
                )
                self._others = None
        if self._others is not None:
            self._held_out = len(x1)
            noise = torch.randn(x1.shape, generator=_generator(self.seed, 1))
            self._others = x1[mine], None if labels is None else labels[mine]
            self._resume_noise = noise[mine]

    def renew(self) -> None:
        """Takes the bank anew: copies are looked for among the latents of now."""
        self._take_bank()
        self._draw()

    def end(self) -> None:
        """Says where things are."""
        super().end()
        if not self.history:
            return
        last = self.history[-1]
        shares = zip(self.t_switch, last["copies"], strict=True)
        found = ", ".join(f"{share:.0%} from t = {t:g} on" for t, share in shares)
        rank_zero_info(
            f"MemorizationMonitor: copies at step {last['step']}: {found}; {len(self.history)} "
            f"probes, the last cost {self.cost()}; {self.writer.describe()}"
        )

    def stop(self) -> None:
        """Lets go of the bank."""
        self.oracle, self._led, self._shown = None, {}, None

    def layout(self) -> dict[str, list[Any]]:
        """Its charts on TensorBoard's custom-scalars page."""
        name = re.escape(self.name)
        charts = {
            "share of copies by t_switch": f"{name}/copies/t_switch=[^_]*$",
            "median d1/d2 by t_switch": f"{name}/ratio/",
            "share of copies among resumed samples": f"{name}/resumed_copies/",
        }
        return {title: ["Multiline", [f"^{pattern}"]] for title, pattern in charts.items()}

    @property
    def _averages(self) -> bool:
        return self.weights != "current" and self._averaging is not None

    def _average(self) -> nn.Module | None:
        """The averaged module, if it is asked for and has begun."""
        averaged = getattr(self._averaging, "_average_model", None) if self._averages else None
        return averaged.module if averaged is not None and bool(averaged.n_averaged) else None

    def _velocity(self, module: nn.Module, labels: Tensor | None) -> Velocity:
        ask = self.velocity_of(module)

        def velocity(xt: Tensor, t: Tensor) -> Tensor:
            v = ask(xt, t, labels)
            if v.shape != xt.shape:
                raise ValueError(
                    f"Expected a velocity of shape {tuple(xt.shape)}, got {tuple(v.shape)}."
                )
            return v

        return velocity

    # -- one probe --------------------------------------------------------------------------------

    def measure(self, step: int) -> dict[str, Any]:
        """See `Monitor`."""
        run, bank = self.run, self._oracle.bank
        averaged = self._average()
        module = run.module if averaged is None else averaged
        with run.together("a probe of MemorizationMonitor"):
            with model_in_eval_mode(run.trainer, module):
                made, resumed = self._generate(module, run.module.device)
            near = {t: nearest_rows(bank, x) for t, x in made.items()}
            near_resumed = {t: nearest_rows(bank, x) for t, (_, x) in resumed.items()}
        entry = self._entry(near, near_resumed)
        if entry["not_finite"]:
            rank_zero_warn(
                f"MemorizationMonitor: {entry['not_finite']} samples of step {step} are not "
                "finite; they are left out of the shares of copies."
            )
        self._shown = made, near, resumed, near_resumed
        return entry

    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        """See `Monitor`."""
        names = [("copies", ""), ("low", "_low"), ("high", "_high")]
        scalars = {
            f"{self.name}/copies/t_switch={t:g}{end}": entry[key][k]
            for k, t in enumerate(self.t_switch)
            for key, end in names
        }
        for t, ratio in zip(self.t_switch, entry["ratio"], strict=True):
            scalars[f"{self.name}/ratio/t_switch={t:g}"] = ratio
        for t, share in zip(entry["t_resume"], entry["resumed_copies"], strict=True):
            scalars[f"{self.name}/resumed_copies/t={t:g}"] = share
        return scalars

    def _generate(
        self, module: nn.Module, device: torch.device
    ) -> tuple[dict[float, Tensor], dict[float, tuple[Tensor, Tensor]]]:
        """Samples by t_switch; noised and resumed samples by t_resume."""
        assert self.oracle is not None
        oracle, labels = self.oracle, self._labels
        asked = labels if self.wise else None

        def led(xt: Tensor, t: Tensor) -> Tensor:
            place = oracle.bank.device
            return oracle.velocity(xt.to(place), t.to(place), asked).to(xt)

        x0 = self._noise.to(device)
        given = labels.to(device) if labels is not None and self.conditional else None
        model, made = self._velocity(module, given), {}
        for t in self.t_switch:
            if t not in self._led:  # the oracle's part is the same in all probes
                x = x0 if t == 0 else switched(led, led, x0, 0.0, end=t, **self._part(t))
                self._led[t] = x.cpu()
            x, rest = self._led[t].to(device), self._part(1 - t)
            made[t] = x if t == 1 else switched(model, model, x, 0.0, start=t, **rest)
        resumed = {}
        if self._others is not None:
            x1 = self._others[0].to(device).float()
            names = self._others[1] if given is not None else None
            model = self._velocity(module, None if names is None else names.to(device))
            noise = self._resume_noise.to(device)
            for t in self.t_resume:
                path = oracle.path(torch.full((len(x1),), t, device=device))
                noised = expand_like(path.alpha, x1) * x1 + expand_like(path.sigma, x1) * noise
                about = self._part(1 - t)
                resumed[t] = noised, switched(model, model, noised, 0.0, start=t, **about)
        return made, resumed

    def _part(self, share: float) -> dict[str, Any]:
        """Solver and steps of a part of [0, 1]."""
        return {"method": _METHOD, "steps": max(1, round(self.steps * share))}

    def _entry(
        self, near: dict[float, Nearest], near_resumed: dict[float, Nearest]
    ) -> dict[str, Any]:
        """Copies of all ranks, as plain numbers; a collective."""

        def over_ranks(found: Nearest) -> dict[str, Any]:
            share = CopyShare().to(found.d1.device)
            share.update(found.ratio.float())
            return share.compute()

        switched_ = [over_ranks(near[t]) for t in self.t_switch]
        resumed = [over_ranks(found) for found in near_resumed.values()]
        return {
            "weights": "current" if self._average() is None else "average",
            "samples": self.samples,
            "t_switch": list(self.t_switch),
            "copies": [found["share"] for found in switched_],
            "low": [found["low"] for found in switched_],
            "high": [found["high"] for found in switched_],
            "ratio": [found["median"] for found in switched_],
            "histogram": [found["histogram"] for found in switched_],
            "t_resume": list(near_resumed),
            "resumed_copies": [found["share"] for found in resumed],
            "not_finite": sum(found["nonfinite"] for found in [*switched_, *resumed]),
        }

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        """Shares over the training, and samples of this rank beside their nearest rows."""
        assert self._shown is not None
        made, near, resumed, near_resumed = self._shown
        bank, step = self._oracle.bank, probes[-1]["step"]
        drawn = {"copies": pictures.copies_figure(probes)}

        def shown(x: Tensor) -> Tensor:
            x = x[:_SHOWN]
            return (self.decode(x) if self.decode else x).detach().float().cpu()

        def rows(found: Nearest) -> Tensor:
            taken = bank.take(found.row[:_SHOWN].clamp_min(0)).reshape(-1, *bank.shape)
            return shown(taken.float())

        if self.decode or pictures.is_image(bank.shape):
            columns: list[tuple[str, Tensor]] = []
            ratios: dict[int, Tensor] = {}
            for t, found in near.items():
                ratios[len(columns)] = found.ratio.cpu()
                columns += [(f"t_switch\n{t:g}", shown(made[t])), ("nearest\nrow", rows(found))]
            data = torch.cat([images for _, images in columns[1::2]])
            drawn["samples"] = pictures.grid_figure(
                columns, ratios, data, f"Samples at step {step}"
            )
        if resumed and "samples" in drawn and self._others is not None:
            columns, ratios = [("held out", shown(self._others[0]))], {}
            for t, found in near_resumed.items():
                ratios[len(columns) + 1] = found.ratio.cpu()
                noised, x = (shown(part) for part in resumed[t])
                columns += [
                    (f"noised\nto t = {t:g}", noised),
                    ("resumed", x),
                    ("nearest\nrow", rows(found)),
                ]
            data = torch.cat([columns[0][1], *(images for _, images in columns[3::3])])
            drawn["resumed"] = pictures.grid_figure(
                columns, ratios, data, f"Held-out rows resumed at step {step}"
            )
        return drawn

    @property
    def _oracle(self) -> Oracle:
        assert self.oracle is not None
        return self.oracle


def _generator(seed: int, stream: int) -> torch.Generator:
    """One whose draws are not those of `torch.manual_seed(seed)`, with which data may be made."""
    mixed = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))
