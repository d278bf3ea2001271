"""The options of `stagewise sample`: parsed, checked, and completed with measured times."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stagewise.recipes.arguments import Parser
from stagewise.recipes.checkpoints import Loaded, Weights
from stagewise.recipes.run_files import read_run
from stagewise.sampling import ADAPTIVE_SOLVERS, FIXED_SOLVERS, guidance_interval
from stagewise.sde import DIFFUSIONS, LAST_STEPS, SDE_SOLVERS

__all__ = ["Options", "parse", "parser"]

_NEVER_AT_THE_END = ("euler", "midpoint")
"""Solvers that do not evaluate at t = 1, where the oracle is singular."""
_MEASURED = "measured"
_SDE = {"diffusion_form": "sigma", "diffusion_norm": 1.0, "last_step": "mean"}
_SDE |= {"last_step_size": 0.04}
"""Options of stochastic solvers, with the defaults of SiT's commands."""
_TOLERANCES = ("rtol", "atol")
_POSITIVE = ("shift", "timeout", "diffusion_norm", *_TOLERANCES)
_RANGES: list[tuple[tuple[str, ...], Callable[[float], bool], str]] = [
    (("count", "batch_size", "steps"), lambda x: x >= 1, "of at least 1"),
    (("seed", "grid"), lambda x: x >= 0, "of at least 0"),
    (_POSITIVE, lambda x: 0 < x < math.inf, "above 0"),
    (("coarse", "then_at"), lambda x: 0 < x < 1, "between 0 and 1"),
    (("oracle_until",), lambda x: 0 <= x <= 1, "from 0 to 1"),
]
_SOLVERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_SDE, SDE_SOLVERS),
    **dict.fromkeys(_TOLERANCES, ADAPTIVE_SOLVERS),
    "coarse": FIXED_SOLVERS,
    "oracle_until": (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS),
    **dict.fromkeys(("steps", "shift"), (*FIXED_SOLVERS, *SDE_SOLVERS)),
}
"""Options that not all solvers have, with those that have them."""
_SETTINGS = ["count", "batch_size", "labels", "method", "steps", "shift", "coarse", "cfg_scale"]
_SETTINGS += ["cfg_interval", "cfg_channels", "oracle_until", "seed", "vae", "precision"]
"""What samples depend on, besides the checkpoint."""
_IF_GIVEN = [*_SDE, *_TOLERANCES, "then_at"]
"""The same, but left out of the settings of a folder if they are not used."""


@dataclass(frozen=True)
class Options:
    """The arguments of `stagewise sample`, by name; ValueError if they do not fit together."""

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
    cfg_channels: int | None  # 0 for all, None for the setting of the run
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
    rtol: float | None = None
    atol: float | None = None
    diffusion_form: str | None = None
    diffusion_norm: float | None = None
    last_step: str | None = None
    last_step_size: float | None = None
    then: Path | None = None
    then_at: float | None = None
    trust: Sequence[str] = ()
    measured: tuple[str, ...] = ()
    """Which of `cfg_interval`, `oracle_until`, `coarse` and `then_at` the run must provide."""

    def __post_init__(self) -> None:
        for names, holds, words in _RANGES:
            for name in names:
                value = getattr(self, name)
                fits = value is None or holds(value)
                _require(fits, f"Expected {_flag(name)} {words}, got {value}.")
        _require(
            math.isfinite(self.cfg_scale), f"Expected a finite --cfg-scale, got {self.cfg_scale}."
        )
        for name in ("cfg_interval", "cfg_channels"):
            _require(
                not self._given(name) or self.cfg_scale != 1,
                f"Expected a --cfg-scale other than 1 with {_flag(name)}: 1 is no guidance.",
            )
        low, high = self.cfg_interval or (0, 1)
        _require(
            0 <= low < high <= 1,
            f"Expected --cfg-interval with 0 <= LOW < HIGH <= 1, got {low} and {high}.",
        )
        until = self.oracle_until or 0
        _require(
            until <= 0.999 or self.method in _NEVER_AT_THE_END,
            f"Expected --method {' or '.join(_NEVER_AT_THE_END)} with --oracle-until {until}, got "
            f"{self.method}, which evaluates the oracle at t = 1, where it is singular.",
        )
        adaptive = self.method in ADAPTIVE_SOLVERS
        for name, having in _SOLVERS.items():
            given = self.shift != 1 if name == "shift" else self._given(name)
            _require(
                not given or self.method in having,
                f"Expected no {_flag(name)} with --method {self.method}"
                f"{', which chooses its own steps' if adaptive else ''}; the solvers with it are "
                f"{', '.join(having)}.",
            )
        _require(
            self.method != "sde-heun" or self.last_step != "none",
            "Expected a --last-step other than none with --method sde-heun, whose steps would end "
            "with the score at t = 1, where there is none.",
        )
        _require(
            (self.then is not None) == self._given("then_at"),
            "Expected --then RUN and --then-at T together: its network takes over at T.",
        )
        _require(
            self.then is None or not self._given("oracle_until"),
            "Expected --then or --oracle-until, got both.",
        )

    def _given(self, name: str) -> bool:
        return getattr(self, name) is not None or name in self.measured

    def with_measured(self) -> Options:
        """The same, with the times that were measured in the run; ValueError if there are none."""
        if not self.measured:
            return self
        try:
            probes = read_run(self.run).of("probe")
        except ValueError:
            probes = []
        _require(
            bool(probes),
            f"Expected a measured stage boundary in {self.run} for "
            f"{', '.join(map(_flag, self.measured))}, found none: no PosteriorMonitor wrote a "
            "probe there. Give numbers, or profile the data: stagewise profile.",
        )
        midpoint, collapsed = (
            math.nan if probes[-1].get(key) is None else float(probes[-1][key])
            for key in ("midpoint", "collapsed")
        )
        found: dict[str, Any] = dict.fromkeys(self.measured, midpoint)
        if "cfg_interval" in found:
            found["cfg_interval"] = guidance_interval(collapsed)
            _require(
                found["cfg_interval"] is not None,
                f"No interval follows from the measured boundary (collapsed at t = "
                f"{collapsed:.3g}): that needs a collapse before 0.5. Give --cfg-interval LOW "
                "HIGH and try several; 0.1 0.6 is the best known one.",
            )
        others = [_flag(name) for name in found if name != "cfg_interval"]
        _require(
            not others or 0 < midpoint < 1,
            f"Expected a measured midpoint between 0 and 1 for {', '.join(others)}, got "
            f"{midpoint:.3g}: the run found no stage boundary. Give a number.",
        )
        return replace(self, measured=(), **found)

    def with_channels(self, evaluation: Mapping[str, Any], there: int) -> Options:
        """The same, with the number of guided channels, by default from the run's `evaluation`."""
        few = self.cfg_channels
        if few is None and self.cfg_scale != 1:
            few = min(evaluation.get("cfg_channels") or there, there)
            few = None if few == there else few
        return replace(self, cfg_channels=few or None)

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        """Refuses labels, guidance or channels that the run's data do not have."""
        wrong = [label for label in self.labels or () if not 0 <= label < classes]
        there = f"from 0 to {classes - 1}" if classes else "none: the run has no classes"
        _require(not wrong, f"Expected --labels {there}, got {wrong}.")
        _require(
            self.cfg_scale == 1 or classes > 0,
            f"Expected --cfg-scale 1, got {self.cfg_scale:g}: the run has no classes to guide to.",
        )
        last = 1 - (self.last_step_size or 0)
        _require(
            self.then_at is None or self.then_at <= last,
            f"Expected --then-at before the last step, which begins at {last:g}, got "
            f"{self.then_at}.",
        )
        _require(
            self.cfg_channels is None or self.cfg_channels <= shape[0],
            f"Expected --cfg-channels of at most {shape[0]}, the channels of this run's samples, "
            f"got {self.cfg_channels}.",
        )

    def folder(self, loaded: Loaded) -> Path:
        """The folder of the samples: `out`, or one in the run, named after the settings."""
        if self.out is not None:
            return self.out
        parts = [f"step{loaded.step}", loaded.weights, f"{self.method}{self.steps or ''}"]
        parts += [f"shift{self.shift:g}"] * (self.shift != 1)
        parts += [] if self.coarse is None else [f"coarse{self.coarse:.3g}"]
        parts += [f"cfg{self.cfg_scale:g}"] * (self.cfg_scale != 1)
        if self.cfg_interval is not None:
            parts.append("from{:.3g}to{:.3g}".format(*self.cfg_interval))
        parts += [f"channels{self.cfg_channels}"] * (self.cfg_channels is not None)
        parts += [f"{k}{v}" for k, v in self._if_given().items() if v not in (None, _SDE.get(k))]
        parts += [] if self.then is None else [f"then{self.then.resolve().name}"]
        parts += [f"oracle{self.oracle_until:.3g}"] if self.oracle_until else []
        parts += ["decoded"] * (self.vae is not None)
        return self.run / "samples" / "_".join([*parts, f"seed{self.seed}", f"n{self.count}"])

    def _if_given(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in _IF_GIVEN if getattr(self, k) is not None}

    def settings(self, loaded: Loaded) -> dict[str, Any]:
        """Everything that samples depend on, for the file beside them."""
        own = {name: getattr(self, name) for name in _SETTINGS}
        own = {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}
        about = {"checkpoint": loaded.path.name, "step": loaded.step, "weights": loaded.weights}
        about |= {"fingerprint": loaded.fingerprint, **own, **self._if_given()}
        return about | ({"labels": "all"} if self.labels is None else {})


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line, by default that of the process; ValueError as in `Options`."""
    given = vars(parser().parse_args(arguments))
    if given["cfg_interval"] == [_MEASURED]:
        given["cfg_interval"] = _MEASURED
    elif given["cfg_interval"] is not None:
        try:
            low, high = map(float, given["cfg_interval"])
        except ValueError:
            got = " ".join(given["cfg_interval"])
            raise ValueError(f"Expected --cfg-interval LOW HIGH or measured, got {got}.") from None
        given["cfg_interval"] = low, high
    names = ("cfg_interval", "oracle_until", "coarse", "then_at")
    measured = tuple(name for name in names if given[name] == _MEASURED)
    try:
        chosen = given["labels"]
        given["labels"] = None if chosen == "all" else tuple(map(int, chosen.split(",")))
    except ValueError:
        raise ValueError(
            f"Expected --labels all, or numbers such as 0,3,7, got {chosen!r}."
        ) from None
    if given["method"] in SDE_SOLVERS:
        defaults = {k: v for k, v in _SDE.items() if given[k] is None}
        given |= {**defaults, "steps": given["steps"] or 250}
    elif given["steps"] is None and given["method"] in FIXED_SOLVERS:
        given["steps"] = 50
    return Options(**given | dict.fromkeys(measured), measured=measured)


def _time(text: str) -> float | str:
    try:
        return text if text == _MEASURED else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a time in t or {_MEASURED}, got {text!r}"
        ) from None


def _channels(text: str) -> int:
    if text == "all":
        return 0
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1 or all, got {text!r}")
    return int(text)


def parser() -> Parser:
    """The arguments of `stagewise sample`."""
    made = Parser(
        prog="stagewise sample",
        description=(
            "Sample from a trained run. Times are in t: 0 is noise, 1 is data. Under torchrun the "
            "ranks share the batches; the files do not depend on the number of ranks."
        ),
        epilog=(
            "examples: stagewise sample RUN --cfg-scale 2.5 --cfg-interval 0.1 0.6 --shift 0.3 | "
            "stagewise sample RUN --oracle-until measured --method euler | torchrun "
            "--nproc-per-node=8 -m stagewise.recipes.sample RUN --count 50000 --vae "
            "stabilityai/sd-vae-ft-mse"
        ),
    )
    given, own, random = map(", ".join, (FIXED_SOLVERS, ADAPTIVE_SOLVERS, SDE_SOLVERS))
    flags: dict[str, tuple[Any, Any, str]] = {  # (type, default, help)
        "checkpoint": (Path, None, "a path, or a name in the run's checkpoints (the last step)"),
        "weights": (str, None, "averaged or current (averaged, if there are any)"),
        "count": (int, 64, "how many samples (%(default)s)"),
        "batch_size": (int, 32, "(%(default)s)"),
        "labels": (str, "all", "all classes in turn, or some in turn, such as 0,3,7 (all)"),
        "method": (str, "midpoint", f"with --steps: {given}; with steps of their own: {own}; SiT's "
                   f"SDE, with noise at each step: {random} (%(default)s)"),
        "steps": (int, None, "steps from noise to data (50; 250 for an SDE, with the last step). "
                  "Public samplers count times: their N is N - 1 here, and N for an SDE"),
        "rtol": (float, None, "relative tolerance of a solver with steps of its own (1e-4; 1e-3 in "
                 "SiT)"),
        "atol": (float, None, "absolute tolerance (1e-4; 1e-6 in SiT)"),
        "diffusion_form": (str, None, f"of an SDE: {', '.join(DIFFUSIONS)} (sigma)"),
        "diffusion_norm": (float, None, "factor of the diffusion (1)"),
        "last_step": (str, None, f"of an SDE: {', '.join(LAST_STEPS)} (mean)"),
        "last_step_size": (float, None, "size of the last step in t (0.04)"),
        "shift": (float, 1.0, "t -> S t / (1 + (S - 1) t); below 1 more steps near noise (1)"),
        "coarse": (_time, None, "one large step from noise to T, the others from there; measured: "
                   "T is the run's measured midpoint"),
        "cfg_scale": (float, 1.0, "classifier-free guidance; 1 is none (%(default)s)"),
        "cfg_interval": (str, None, "LOW HIGH: guide between these times only; measured: from the "
                         "run's measured collapsed boundary to 0.6"),
        "cfg_channels": (_channels, None, "guide only the first N channels, or all (the run's "
                         "evaluation.cfg_channels: 3 for SiT and LightningDiT)"),
        "oracle_until": (_time, None, "use the oracle of the training data up to T, the network "
                         "from there; measured: T is the run's measured midpoint"),
        "then": (Path, None, "a second run, whose network takes over at --then-at"),
        "then_at": (_time, None, "T of --then; measured: the first run's measured midpoint"),
        "seed": (int, 0, "of the noise (%(default)s)"),
        "vae": (str, None, "autoencoder that decodes latents, a folder or a name"),
        "out": (Path, None, "folder (RUN/samples/ and a name made from the settings)"),
        "device": (str, None, "cpu, cuda, cuda:1, mps (the GPU of LOCAL_RANK, or the CPU)"),
        "precision": (str, "32", "of the network: 32 or bf16 (%(default)s)"),
        "grid": (int, 64, "samples in the PNG; 0 for none (%(default)s)"),
        "timeout": (float, 30.0, "minutes that ranks wait for each other (%(default)s)"),
    }  # fmt: skip
    choices = {"weights": ["averaged", "current"], "precision": ["32", "bf16"]}
    choices["method"] = [*FIXED_SOLVERS, *ADAPTIVE_SOLVERS, *SDE_SOLVERS]
    choices |= {"diffusion_form": [*DIFFUSIONS], "last_step": [*LAST_STEPS]}
    made.add_argument("run", type=Path, help="folder of a run, with config.yaml and checkpoints")
    for name, (kind, default, about) in flags.items():
        more: dict[str, Any] = {"labels": {"metavar": "CLASSES"}}.get(name, {})
        more = {"metavar": "RUN"} if name == "then" else more
        if name == "cfg_interval":
            more = {"nargs": "+", "metavar": ("LOW", "HIGH")}
        more |= {"choices": choices[name], "metavar": "NAME"} if name in choices else {}
        made.add_argument(_flag(name), type=kind, default=default, help=about, **more)
    about = "names that the run's config.yaml may call, besides the parts of recipes"
    made.add_argument("--trust", nargs="+", default=(), metavar="NAME", help=about)
    about = "continue the samples in the folder"
    made.add_argument("--resume", action="store_true", help=about)
    return made
