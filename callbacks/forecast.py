"""`Forecast`: what oracle targets, or smoothing, could gain in a training, while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from stagewise.adapters.own import Objective
from stagewise.bank import LatentBank
from stagewise.callbacks.host import changes
from stagewise.callbacks.model_monitor import ModelMonitor
from stagewise.callbacks.monitor import MonitorOptions
from stagewise.callbacks.target_maker import schemes_of
from stagewise.callbacks.velocity_monitor import VelocityErrorMonitor
from stagewise.forecast import (
    SmoothingForecast,
    TargetForecast,
    forecast_smoothing,
    forecast_targets,
)
from stagewise.paths import Prediction
from stagewise.timesteps import TimestepSampler

__all__ = ["Forecast"]

_BATCHES = 16


class Forecast(ModelMonitor):
    """Measures what a training could gain from oracle targets and from smoothing.

    - **Oracle targets**: the share of the gradient's variance that they would remove, measured on
      16 batches in the metric in which the optimizer steps (`stagewise.forecast_targets`): "oracle
      targets are worth a batch of 1.24 times the size here (1.22 to 1.26), and about 0.87 of the
      steps: do not bother".
    - **Smoothing**: whether the model memorizes rows where smoothing acts, beyond the collapsed
      boundary (`stagewise.forecast_smoothing`): "held-out error is 40% above that on training rows
      for t in [0.70, 0.95]: smoothing has something to gain". This needs the probes of a
      `VelocityErrorMonitor` in the same trainer.

    The log has each probe, and at the end their mean. On three benchmark sets that batch was at
    most 7 % off the one with which plain training did as well (docs/forecast.md). An untrained
    network shows too small a gain, so the first probe is not at the first step. Use it in a
    training with plain targets: what a training has already is measured too, but not advised.

    **Logged to every logger** at each probe (`stagewise_forecast` is `name`):
    `stagewise_forecast/share`, `.../batch_factor`, `.../steps`, `.../noise_scale` and
    `.../smoothing_gap` (if there is one), `.../probe_seconds`, `.../share_of_step_time`; **to
    disk**, in `dirpath`, a line of `stages.jsonl` with both sentences.

    Do not use it where `VelocityErrorMonitor` cannot be used, or with parameters that are spread
    over ranks (FSDP), which have no whole gradient.

    Args:
        bank: The training latents, if they are not to be read from the loader.
        timesteps: How training draws t. Default: as the module's `FlowMatchingLoss`, with its
            weights; uniform with another objective.
        name: Prefix of tags and name of the folder, default "stagewise_forecast".
        **options: `every_n_steps`, here by default a quarter of the training, at most 5000: a
            probe is 16 forward and 32 backward passes of a batch. And options of the run, see
            `RunOptions`.

    Raises:
        ValueError: As `VelocityErrorMonitor`.

    Example:
        >>> from stagewise.callbacks import Forecast, VelocityErrorMonitor
        >>> callbacks = [VelocityErrorMonitor(), Forecast()]
    """

    order = 3
    event = "forecast"
    charts = {"batch that oracle targets are worth": "/batch_fact"}
    probes = 4
    longest = 5000

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        timesteps: TimestepSampler | None = None,
        name: str = "stagewise_forecast",
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(name, bank, **options)
        if timesteps is not None and not isinstance(timesteps, TimestepSampler):
            raise TypeError(
                f"Expected `timesteps` to be a sampler, got {timesteps!r}: "
                "Forecast(timesteps=LogitNormal())."
            )
        self.timesteps = timesteps

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes the bank."""
        super().start()
        self._errors = self.run.first(VelocityErrorMonitor)

    def settle(self) -> None:
        """After the first forward pass: rows for the batches, header."""
        super().settle()
        self._rows = self.rows(_BATCHES * self.batch_size)
        self.wise = self.is_wise(self._rows[1])
        if self._errors is None:
            self.say("smoothing is left out: it needs a VelocityErrorMonitor.")
        header = {"event": "forecasts", "network": self.describe(), "class_wise": self.wise}
        self.open_files(header)

    def renew(self) -> None:
        """Reads rows of the changed latents."""
        super().renew()
        self._rows = self.rows(_BATCHES * self.batch_size)

    def due(self, step: int) -> bool:
        """Whether to probe, but not at the first step."""
        return step // self.every > (self.last or 0) // self.every

    def end(self) -> None:
        """Logs the mean over all probes."""
        super().end()
        if self.history:
            whole = TargetForecast.mean([_targets(entry) for entry in self.history])
            last = self.history[-1]["smoothing"]
            said = "" if last is None else f"; at the last of them {last}"
            self.say(f"over {len(self.history)} probes: {whole}{said}")

    # -- one probe --------------------------------------------------------------------------------

    @override
    def measure(self, step: int) -> dict[str, Any]:
        module = self.run.module
        with self.together(), self.run.host.precision():
            found = forecast_targets(  # every rank measures the same
                self.velocity_of(module),
                module,
                self.oracle,
                self._batches(),
                optimizer=self._optimizer(),
                timesteps=self._drawn_by(),
                weight=self._weight,
                class_wise=self.wise,
                seed=self.seed,
                reachable=self.reachable,
            )
        scale = None if math.isinf(found.noise_scale) else found.noise_scale
        entry: dict[str, Any] = {"share": found.share, "share_se": found.error}
        steering = schemes_of(self.run)  # of phases, the present one counts
        entry["targets_used"] = any(scheme.target is not None for scheme in steering)
        entry |= {"noise_scale": scale, "batch": self.per_step}
        smoothing = self._smoothing()
        if smoothing is not None and any(scheme.smoothing is not None for scheme in steering):
            smoothing = replace(smoothing, used=True)
        gap = None if smoothing is None or math.isnan(smoothing.gap) else smoothing.gap
        entry |= {"targets": f"{_targets(entry)}", "smoothing_gap": gap}
        entry["smoothing"] = None if smoothing is None else f"{smoothing}"
        said = "" if smoothing is None else f"; {smoothing}"
        self.say(f"step {step}: {entry['targets']}{said}")
        return entry

    @override
    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        found = _targets(entry)
        values = {"share": found.share, "batch_factor": found.factor, "steps": found.steps}
        values |= {key: entry[key] for key in ("noise_scale", "smoothing_gap") if entry[key]}
        return {f"{self.name}/{key}": value for key, value in values.items()}

    def _smoothing(self) -> SmoothingForecast | None:
        errors = self._errors
        if errors is None or not errors.history or errors.boundary is None:
            return None
        collapsed = errors.boundary.collapsed
        if math.isnan(collapsed):
            return None
        return forecast_smoothing(errors.history[-1], errors.edges.tolist(), collapsed)

    def _batches(self) -> Iterator[tuple[Tensor, Any]]:
        """Batches from shuffled rows, which are repeated if they are few."""
        x1, labels = self._rows
        draws, count = torch.Generator().manual_seed(self.seed), _BATCHES * self.batch_size
        again = math.ceil(count / len(x1))
        order = torch.cat([torch.randperm(len(x1), generator=draws) for _ in range(again)])
        for at in order[:count].split(self.batch_size):
            yield x1[at], None if labels is None else labels[at]

    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the network, or else the first."""
        optimizers = self.run.host.optimizers
        name = "" if self.network is None else self.network.name
        net = self.run.module.get_submodule(name)
        return next((one for one in optimizers if changes(one, net)), optimizers[0])

    def _objective(self) -> Any:
        """The `FlowMatchingLoss` that the module trains with, if any."""
        maker = None if self.network is None else self.network.maker
        return maker.place.object if isinstance(maker, Objective) else None

    def _drawn_by(self) -> TimestepSampler | None:
        """How training draws t: as given, or as the module's objective does."""
        objective = self._objective()
        if self.timesteps is not None or objective is None:
            return self.timesteps
        scheme = objective.scheme
        if scheme is not None and scheme.draws_timesteps:
            return scheme.timesteps
        return objective.timesteps

    def _weight(self, t: Tensor) -> Tensor:
        """The weight of a velocity error in the loss: its own, and that of the prediction type."""
        if self.network is None:
            return torch.ones_like(t)
        maker, objective, weight = self.network.maker, self._objective(), None
        if objective is not None:
            scheme = objective.scheme
            weight = objective.weight if scheme is None else scheme.weight_of
        path = maker.path(t)
        kinds = maker.prediction, Prediction("velocity")
        own, velocity = (kind.coefficients(path)[0] for kind in kinds)
        factor = (own / velocity).square()
        return factor if weight is None else factor * weight(t)


def _targets(entry: dict[str, Any]) -> TargetForecast:
    scale = math.inf if entry["noise_scale"] is None else entry["noise_scale"]
    used = entry.get("targets_used", False)  # histories of older versions do not have it
    return TargetForecast(entry["share"], entry["share_se"], scale, entry["batch"], used)
