"""The options of `stagewise sample`: checked, with measured times filled in, and as settings."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stagewise.recipes.checkpoints import Loaded, Weights
from stagewise.recipes.run_files import read_run
from stagewise.sampling import ADAPTIVE_SOLVERS, FIXED_SOLVERS, guidance_interval

__all__ = ["Options"]

_NEVER_AT_THE_END = ("euler", "midpoint")
"""Solvers that do not ask at t = 1, where the oracle is singular."""


@dataclass(frozen=True)
class Options:
    """What is to be sampled, and how: the arguments of `stagewise sample`, by their names.

    Raises:
        ValueError: If one is out of range, or does not go with another.
    """

    run: Path
    checkpoint: Path | None
    weights: Weights | None
    count: int
    batch_size: int
    labels: tuple[int, ...] | None
    method: str
    steps: int | None
    shift: float
    cfg_scale: float
    cfg_interval: tuple[float, float] | None
    cfg_channels: int | None
    oracle_until: float | None
    coarse: float | None
    seed: int
    vae: str | None
    out: Path | None
    device: str | None
    precision: str
    grid: int
    resume: bool
    timeout: float
    measured: tuple[str, ...] = ()
    """Which of `cfg_interval`, `oracle_until` and `coarse` are still to be taken from the run."""

    def __post_init__(self) -> None:
        least = {"count": 1, "batch_size": 1, "seed": 0, "grid": 0, "steps": 1, "cfg_channels": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"Expected {_flag(name)} of at least {smallest}, got {value}.")
        for name in ("shift", "timeout"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"Expected {_flag(name)} above 0, got {getattr(self, name)}.")
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"Expected a finite --cfg-scale, got {self.cfg_scale}.")
        for name in ("cfg_interval", "cfg_channels"):
            given = getattr(self, name) is not None or name in self.measured
            if given and self.cfg_scale == 1:
                raise ValueError(
                    f"Expected a --cfg-scale other than 1 with {_flag(name)}: 1 is no guidance."
                )
        if self.cfg_interval is not None:
            low, high = self.cfg_interval
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"Expected --cfg-interval with 0 <= LOW < HIGH <= 1, got {low} and {high}."
                )
        if self.coarse is not None and not 0 < self.coarse < 1:
            raise ValueError(f"Expected --coarse between 0 and 1, got {self.coarse}.")
        self._check_oracle()
        self._check_solver()

    def _check_oracle(self) -> None:
        until = self.oracle_until
        if until is None:
            return
        if not 0 <= until <= 1:
            raise ValueError(f"Expected --oracle-until from 0 to 1, got {until}.")
        if until > 0.999 and self.method not in _NEVER_AT_THE_END:
            raise ValueError(
                f"Expected --method {' or '.join(_NEVER_AT_THE_END)} with --oracle-until {until}, "
                f"got {self.method}, which asks the oracle at t = 1, where it is singular."
            )

    def _check_solver(self) -> None:
        if self.method not in ADAPTIVE_SOLVERS:
            return
        named = {"steps": self.steps is not None, "shift": self.shift != 1}
        named["coarse"] = self.coarse is not None or "coarse" in self.measured
        for name, given in named.items():
            if given:
                raise ValueError(
                    f"Expected no {_flag(name)} with --method {self.method}, which chooses its own "
                    f"steps. Those with given steps are {', '.join(FIXED_SOLVERS)}."
                )

    def with_measured(self) -> Options:
        """The same, with the times that were to be taken from the run.

        Raises:
            ValueError: If nothing was measured there, or nothing follows from it.
        """
        if not self.measured:
            return self
        flags = ", ".join(map(_flag, self.measured))
        try:
            probes = read_run(self.run).of("probe")
        except ValueError:
            probes = []
        if not probes:
            raise ValueError(
                f"Expected a measured stage boundary in {self.run} for {flags}, found none: no "
                "PosteriorMonitor wrote a probe there. Give numbers, or profile the data: "
                "stagewise profile."
            )
        found: dict[str, Any] = {}
        midpoint, collapsed = (
            math.nan if probes[-1].get(key) is None else float(probes[-1][key])
            for key in ("midpoint", "collapsed")
        )
        for name in self.measured:
            if name == "cfg_interval":
                found[name] = guidance_interval(collapsed)
                if found[name] is None:
                    raise ValueError(
                        f"No interval follows from the measured boundary (collapsed at t = "
                        f"{collapsed:.3g}): one is known only where targets collapse before 0.5. "
                        "Give --cfg-interval LOW HIGH, and scan it; 0.1 0.6 is the one best known."
                    )
            elif 0 < midpoint < 1:
                found[name] = midpoint
            else:
                raise ValueError(
                    f"Expected a measured midpoint between 0 and 1 for {_flag(name)}, got "
                    f"{midpoint:.3g}: no t was found where the stages part. Give a number."
                )
        return replace(self, measured=(), **found)

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        """Refuses what does not go with the run's data.

        Raises:
            ValueError: On labels, guidance or channels that it has not.
        """
        wrong = [label for label in self.labels or () if not 0 <= label < classes]
        if wrong:
            there = f"from 0 to {classes - 1}" if classes else "none: the run has no classes"
            raise ValueError(f"Expected --labels {there}, got {wrong}.")
        if self.cfg_scale != 1 and not classes:
            raise ValueError(
                f"Expected --cfg-scale 1, got {self.cfg_scale:g}: the run has no classes to guide "
                "to."
            )
        if self.cfg_channels is not None and self.cfg_channels > shape[0]:
            raise ValueError(
                f"Expected --cfg-channels of at most {shape[0]}, the channels of this run's "
                f"samples, got {self.cfg_channels}."
            )

    def place(self) -> torch.device:
        """Where to compute: of several CUDA devices that of the rank.

        Raises:
            ValueError: If there is no such device.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(
                f"Expected --device such as cpu, cuda or mps, got {name!r}."
            ) from error
        if device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= count:
            raise ValueError(
                f"Expected a CUDA device of number {index} for --device {name}, found {count} "
                "devices. Start as many ranks as there are devices, or give --device cpu."
            )
        return torch.device("cuda", index)

    def folder(self, loaded: Loaded) -> Path:
        """Where the samples go: `out`, or a folder of the run named after the settings."""
        if self.out is not None:
            return self.out
        parts = [f"step{loaded.step}", loaded.weights, f"{self.method}{self.steps or ''}"]
        if self.shift != 1:
            parts.append(f"shift{self.shift:g}")
        if self.coarse is not None:
            parts.append(f"coarse{self.coarse:.3g}")
        if self.cfg_scale != 1:
            parts.append(f"cfg{self.cfg_scale:g}")
        if self.cfg_interval is not None:
            parts.append("from{:.3g}to{:.3g}".format(*self.cfg_interval))
        if self.cfg_channels is not None:
            parts.append(f"channels{self.cfg_channels}")
        if self.oracle_until:
            parts.append(f"oracle{self.oracle_until:.3g}")
        if self.vae is not None:
            parts.append("decoded")
        parts += [f"seed{self.seed}", f"n{self.count}"]
        return self.run / "samples" / "_".join(parts)

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """All that samples depend on, as it is written beside them."""
        return {
            "checkpoint": loaded.path.name,
            "step": loaded.step,
            "weights": loaded.weights,
            "fingerprint": loaded.fingerprint,
            "count": self.count,
            "batch_size": self.batch_size,
            "labels": "all" if self.labels is None else list(self.labels),
            "method": self.method,
            "steps": self.steps,
            "shift": self.shift,
            "coarse": self.coarse,
            "cfg_scale": self.cfg_scale,
            "cfg_interval": None if self.cfg_interval is None else list(self.cfg_interval),
            "cfg_channels": self.cfg_channels,
            "oracle_until": self.oracle_until,
            "seed": self.seed,
            "vae": self.vae,
            "precision": self.precision,
        }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
