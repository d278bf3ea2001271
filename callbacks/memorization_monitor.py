"""`MemorizationMonitor`: how many samples copy a training row, and from which t the model does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn

from stagewise.bank import LatentBank
from stagewise.batches import FindSample, find_sample
from stagewise.callbacks import memorization_figures as figures
from stagewise.callbacks.checks import check_bank, path_of, together
from stagewise.callbacks.metrics import CopyShare
from stagewise.callbacks.named import NamedCallback
from stagewise.callbacks.probe_rows import HeldOut, held_out_rows, training_rows
from stagewise.callbacks.training_bank import oracle_of_run
from stagewise.callbacks.velocity_source import AskVelocity, VelocitySource, model_in_eval_mode
from stagewise.callbacks.writer import Writer
from stagewise.copies import Nearest, nearest_rows
from stagewise.oracle import Oracle
from stagewise.paths import expand_like
from stagewise.sampling import Velocity, switched

__all__ = ["MemorizationMonitor"]

_SHOWN = 8
"""Samples in a picture."""

_WHAT = "a probe of MemorizationMonitor"


class MemorizationMonitor(NamedCallback):
    """Samples from the model now and then, and counts copies of training rows (`copies`).

    The oracle leads each sample to `t_switch` and the model from there (Liu et al., arXiv
    2512.02826, Fig. 5): 0 is the model alone. Held-out rows noised to `t_resume` are finished by
    the model (Fig. 6). Noise and labels are the same in all probes; ranks share them.

    **Logged** (`stagewise_memorization` is `name`): `.../copies/t_switch=...` with `_low` and
    `_high` (95 % bootstrap), `.../ratio/t_switch=...` (median d1/d2), `.../resumed_copies/t=...`,
    `.../probe_seconds`. **To TensorBoard and `dirpath`**: `copies`, and for images `samples` and
    `resumed`; `stages.jsonl`.

    Args:
        bank: The training rows; default those of a monitor before this one, or read from the
            training loader.
        velocity: From `(module, xt, t, labels)` to the velocity; default: the network is found.
        every_n_steps: Optimizer steps between probes, default 5000; the first is after step one.
        samples: How many, default 64; at least 2.
        t_switch: Times in [0, 1].
        t_resume: Times in [0, 1).
        held_out: Samples, or samples and labels; default from the validation loader.
        weights: "average" of a `WeightAveraging`, once it has begun, "current", or "auto": the
            former if there is one.
        method: "euler" or "midpoint": they do not ask at t = 1, where the oracle is singular.
        steps: From t = 0 to 1, default 25.
        class_wise: Whether the oracle is over the sample's class; "auto": if the network is given
            labels. Copies are looked for among all rows.
        decode: From samples to images (n, 1 or 3, H, W), for the pictures.
        find: From a batch to `(x_1, labels or None)`.
        dirpath: See `PosteriorMonitor`.
        name: Prefix of tags and name of the folder.
        seed: Of noise and labels.

    Raises:
        ValueError: At construction for numbers out of range; at the start or in the first step if
            no velocity can be had or "average" is asked for and there is none.
    """

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        velocity: AskVelocity | None = None,
        every_n_steps: int = 5000,
        samples: int = 64,
        t_switch: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4),
        t_resume: tuple[float, ...] = (0.2, 0.5, 0.8),
        held_out: HeldOut | None = None,
        weights: Literal["auto", "average", "current"] = "auto",
        method: Literal["euler", "midpoint"] = "euler",
        steps: int = 25,
        class_wise: bool | Literal["auto"] = "auto",
        decode: Callable[[Tensor], Tensor] | None = None,
        find: FindSample = find_sample,
        dirpath: str | Path | None = None,
        name: str = "stagewise_memorization",
        seed: int = 0,
    ) -> None:
        least = (("every_n_steps", every_n_steps, 1), ("samples", samples, 2), ("steps", steps, 1))
        for label, value, low in least:
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
        if method not in ("euler", "midpoint"):
            raise ValueError(f'Expected `method` "euler" or "midpoint", got {method!r}.')
        check_bank(bank, class_wise)
        self.every_n_steps, self.samples, self.steps = every_n_steps, samples, steps
        self.t_switch, self.t_resume = tuple(sorted(t_switch)), tuple(sorted(t_resume))
        self.weights, self.method, self.class_wise = weights, method, class_wise
        self.decode, self.find = decode, find
        self.dirpath, self.name, self.seed = dirpath, name, seed
        self.history: list[dict[str, Any]] = []
        self.oracle: Oracle | None = None
        self._given, self._held_out = bank, held_out
        self._source = VelocitySource(velocity, find, "MemorizationMonitor")

    def state_dict(self) -> dict[str, Any]:
        """The probes so far, as plain numbers and lists."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the probes of a checkpoint."""
        self.history = list(state_dict["history"])

    # -- hooks --------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes or builds the bank, reads held-out rows, opens the files."""
        past = trainer.global_step
        self.history = [entry for entry in self.history if past and entry["step"] <= past]
        self._averaging = next(
            (c for c in getattr(trainer, "callbacks", []) if isinstance(c, WeightAveraging)), None
        )
        if self.weights == "average" and self._averaging is None:
            raise ValueError(
                'weights="average" needs an EMAWeightAveraging (or WeightAveraging) among the '
                'callbacks, and there is none. Add one, or say weights="current".'
            )
        path = path_of(pl_module)[0]
        self.oracle = oracle_of_run(
            trainer, pl_module, self, path, given=self._given, find=self.find
        )
        about: dict[str, Any] = {
            "find": self.find,
            "seed": self.seed,
            "asks": "MemorizationMonitor",
        }
        bank, given = self.oracle.bank, self._given is not None
        if self.class_wise is True:
            bank.require_classes()
        rows = training_rows(trainer, pl_module, bank, 2, given=given, **about)
        self._others = None
        if self.t_resume:
            self._others = held_out_rows(
                trainer, pl_module, bank, self.samples, given=self._held_out, **about
            )
        self._source.start(trainer, pl_module, *rows)
        self._ready, self._step = False, past
        self._led: dict[float, Tensor] = {}
        self._writer = Writer(trainer, self.name, self.dirpath)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch: begins to look for the network."""
        if not self._ready:
            self._source.watch(pl_module, batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """In the first step: takes what was found, or refuses to go on."""
        if not self._ready:
            self._settle(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Probes if it is time."""
        if not self._ready:  # a step that never went backward
            self._settle(trainer, pl_module)
        step, before = trainer.global_step, self._step
        if step == before:  # gradients are accumulated
            return
        self._step = step
        last = self.history[-1]["step"] if self.history else None
        if last is None or step // self.every_n_steps > last // self.every_n_steps:
            self._probe(trainer, pl_module, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where things are."""
        if not self.history:
            return
        last = self.history[-1]
        shares = zip(self.t_switch, last["copies"], strict=True)
        found = ", ".join(f"{share:.0%} from t = {t:g} on" for t, share in shares)
        rank_zero_info(
            f"MemorizationMonitor: copies at step {last['step']}: {found}; {len(self.history)} "
            f"probes, the last cost {last['probe_seconds']:.1f} s; {self._writer.describe()}"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the hooks off, and lets go of the bank."""
        self._source.stop()
        self.oracle, self._led = None, {}

    # -- set-up -------------------------------------------------------------------------------

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once the network is known: noise and labels, header."""
        self._source.settle(trainer)
        assert self.oracle is not None
        bank = self.oracle.bank
        asked = bank.classes and self._source.conditional
        self.wise = bool(asked) if self.class_wise == "auto" else self.class_wise
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
        held_out = 0
        if self._others is not None:
            x1, labels = self._others
            if len(x1) < trainer.world_size or (labels is None and self._labels is not None):
                rank_zero_info(
                    "MemorizationMonitor: held-out rows are fewer than ranks, or have no labels "
                    "for a network that is given some: nothing is resumed from them."
                )
                self._others = None
        if self._others is not None:
            held_out = len(x1)
            noise = torch.randn(x1.shape, generator=_generator(self.seed, 1))
            self._others = x1[mine], None if labels is None else labels[mine]
            self._resume_noise = noise[mine]
        header = {
            "event": "memorization",
            "rows": len(bank),
            "network": self._source.describe(),
            "weights": "average" if self._averages else "current",
            "class_wise": self.wise,
            "samples": self.samples,
            "held_out_rows": held_out,
            "method": self.method,
            "steps": self.steps,
            "path": repr(self.oracle.path),
        }
        images = " To see samples: decode=lambda x: images of shape (n, 3, H, W)."
        rank_zero_info(
            f"MemorizationMonitor: asks {header['network']}, {header['weights']} weights; "
            f"{self._writer.describe()}."
            + ("" if self.decode or figures.is_image(bank.shape) else images)
        )
        self._writer.start([header, *self.history], resumed=bool(self.history))
        self._writer.dashboard(trainer)
        self._ready = True

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

    def _module(self, pl_module: pl.LightningModule) -> nn.Module:
        averaged = self._average()
        return pl_module if averaged is None else averaged

    def _velocity(self, module: nn.Module, labels: Tensor | None) -> Velocity:
        ask = self._source.of(module)

        def velocity(xt: Tensor, t: Tensor) -> Tensor:
            v = ask(xt, t, labels)
            if v.shape != xt.shape:
                raise ValueError(
                    f"Expected a velocity of shape {tuple(xt.shape)}, got {tuple(v.shape)}."
                )
            return v

        return velocity

    # -- one probe ----------------------------------------------------------------------------

    def _probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that queued training work is not counted as ours
        start = time.perf_counter()
        module, bank = self._module(pl_module), self._oracle.bank
        with together(trainer, _WHAT):
            with model_in_eval_mode(trainer, module):
                made, resumed = self._generate(module, device)
            near = {t: nearest_rows(bank, x) for t, x in made.items()}
            near_resumed = {t: nearest_rows(bank, x) for t, (_, x) in resumed.items()}
        entry = {"event": "memorization_probe", "step": step, **self._entry(near, near_resumed)}
        if entry["not_finite"]:
            rank_zero_warn(
                f"MemorizationMonitor: {entry['not_finite']} samples of step {step} are not "
                "finite; they are left out of the shares of copies."
            )
        with together(trainer, _WHAT):
            if trainer.is_global_zero:
                pictures = self._figures(made, near, resumed, near_resumed, [*self.history, entry])
                self._writer.pictures(pictures, step)
            entry["probe_seconds"] = time.perf_counter() - start
            self._writer.scalars(self._scalars(entry), step - 1)
            self._writer.event(entry)
        self.history.append(entry)

    def _scalars(self, entry: dict[str, Any]) -> dict[str, float]:
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
        scalars[f"{self.name}/probe_seconds"] = entry["probe_seconds"]
        return scalars

    def _generate(
        self, module: nn.Module, device: torch.device
    ) -> tuple[dict[float, Tensor], dict[float, tuple[Tensor, Tensor]]]:
        """Samples by t_switch; noised and resumed samples by t_resume."""
        assert self.oracle is not None
        oracle, labels = self.oracle, self._labels
        about: dict[str, Any] = {"method": self.method, "steps": self.steps}
        asked = labels if self.wise else None

        def led(xt: Tensor, t: Tensor) -> Tensor:
            place = oracle.bank.device
            return oracle.velocity(xt.to(place), t.to(place), asked).to(xt)

        x0 = self._noise.to(device)
        given = labels.to(device) if labels is not None and self._source.conditional else None
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
        return {"method": self.method, "steps": max(1, round(self.steps * share))}

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

    def _figures(
        self,
        made: dict[float, Tensor],
        near: dict[float, Nearest],
        resumed: dict[float, tuple[Tensor, Tensor]],
        near_resumed: dict[float, Nearest],
        history: list[dict[str, Any]],
    ) -> dict[str, Figure]:
        """Shares over the training, and samples of this rank beside their nearest rows."""
        bank, step = self._oracle.bank, history[-1]["step"]
        pictures = {"copies": figures.copies_figure(history)}

        def shown(x: Tensor) -> Tensor:
            x = x[:_SHOWN]
            return (self.decode(x) if self.decode else x).detach().float().cpu()

        def rows(found: Nearest) -> Tensor:
            taken = bank.take(found.row[:_SHOWN].clamp_min(0)).reshape(-1, *bank.shape)
            return shown(taken.float())

        if self.decode or figures.is_image(bank.shape):
            columns: list[tuple[str, Tensor]] = []
            ratios: dict[int, Tensor] = {}
            for t, found in near.items():
                ratios[len(columns)] = found.ratio.cpu()
                columns += [(f"t_switch\n{t:g}", shown(made[t])), ("nearest\nrow", rows(found))]
            data = torch.cat([images for _, images in columns[1::2]])
            pictures["samples"] = figures.grid_figure(
                columns, ratios, data, f"Samples at step {step}"
            )
        if resumed and "samples" in pictures and self._others is not None:
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
            pictures["resumed"] = figures.grid_figure(
                columns, ratios, data, f"Held-out rows resumed at step {step}"
            )
        return pictures

    @property
    def _oracle(self) -> Oracle:
        assert self.oracle is not None
        return self.oracle


def _generator(seed: int, stream: int) -> torch.Generator:
    """One whose draws are not those of `torch.manual_seed(seed)`, with which data may be made."""
    mixed = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))
