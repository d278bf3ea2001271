r"""The conventions of other trainings, by their usual names, and the schedule of DDPM.

| name | time | `x_t` | target |
|---|---|---|---|
| `"sit"`, `"flow_matching"`, `"torchcfm"` | 1 is data | `t x_1 + (1 - t) x_0` | `x_1 - x_0` |
| `"pi0"`, `"repa"` | 1 is noise | `(1 - t) x_1 + t x_0` | `x_0 - x_1` |
| `"diffusers"` | 1000 is noise | the same, `t / 1000` | `x_0 - x_1` |
| `"edm"` | sigma | `x_1 + sigma x_0` | `x_1` |
| `"edm_F"` | sigma | `x_1 + sigma x_0` | `(x_1 - c_skip x)/c_out` |
| `ddpm(alphas_cumprod)` | step k | `sqrt(acp_k) x_1 + sqrt(1 - acp_k) x_0` | `x_0` |
| `ddpm(alphas_cumprod, "v")` | step k | the same | `sqrt(acp) x_0 - sqrt(1 - acp) x_1` |
| `ddpm(alphas_cumprod, "data")` | step k | the same | `x_1` |
| `"score_sde"` | 1 is noise | `VPPath()` | `-x_0 / s` |

Every `convention` argument takes a name, a `Convention` or a noise scheduler of diffusers;
`as_convention` turns each into the object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.paths import (
    LinearPath,
    Path,
    PathCoefficients,
    Prediction,
    PredictionKind,
    VPPath,
    expand_like,
    same_path,
    unlike,
)

__all__ = [
    "CONVENTIONS",
    "DIFFUSERS",
    "STAGEWISE",
    "Convention",
    "ConventionLike",
    "DDPMPath",
    "as_convention",
    "ddpm",
    "of_scheduler",
    "path_of",
    "written",
]


@dataclass(frozen=True)
class Convention:
    """How a training outside the library counts time, scales `x_t` and makes its target.

    Known ones, by name, are in `CONVENTIONS`.

    Args:
        noise_time: Its time where the library has t = 0 (noise), default 0. Infinity means that
            its time is the noise level sigma of `x_1 + sigma x_0`, which is `x_t / t` on the linear
            path at `t = 1 / (1 + sigma)`.
        data_time: Its time where the library has t = 1 (data), default 1.
        sign: +1 if its velocity is the library's, -1 if it is the negative (`noise - data`),
            default +1. Only velocities have a sign.
        prediction: What it predicts by default, default the velocity.
        path: Its path, default None: any.

    Raises:
        ValueError: If the two times are equal, the sign is neither +1 nor -1, or noise levels are
            not those of the linear path.
    """

    noise_time: float = 0.0
    data_time: float = 1.0
    sign: Literal[1, -1] = 1
    prediction: Prediction = Prediction()
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.noise_time == self.data_time:
            raise ValueError(f"Expected two different times, got {self.noise_time} twice.")
        if self.sign not in (1, -1):
            raise ValueError(f"Expected `sign` to be 1 or -1, got {self.sign}.")
        if self.by_sigma:
            if self.data_time != 0 or not same_path(self.path or LinearPath(), LinearPath()):
                raise ValueError(
                    "Expected noise levels from infinity to 0 on the linear path, got "
                    f"data_time={self.data_time} and {self.path!r}: Convention(math.inf, 0)."
                )
            object.__setattr__(self, "path", LinearPath())

    @property
    def by_sigma(self) -> bool:
        """Whether its time is the noise level of `x_1 + sigma x_0`."""
        return math.isinf(self.noise_time)

    def from_t(self, t: Tensor) -> Tensor:
        """The library's t, any shape, as its time."""
        if self.by_sigma:
            return (1 - t) / t
        time = self.noise_time + (self.data_time - self.noise_time) * t
        return _unrounded(time) if isinstance(self.path, DDPMPath) else time

    def to_t(self, time: Tensor) -> Tensor:
        """Its time, any shape, as the library's t; of integers in float32."""
        time = time if time.is_floating_point() else time.float()
        if self.by_sigma:
            return 1 / (1 + time)
        if (self.noise_time, self.data_time) == (0, 1):
            return time
        return (time - self.noise_time) / (self.data_time - self.noise_time)

    def rounded(self, t: Tensor) -> Tensor:
        """The library's t, any shape; if its times are steps (DDPM), at the nearest step."""
        return self.path.nearest_step(t) if isinstance(self.path, DDPMPath) else t

    def inside(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """From its noisy samples, (B, *), and times, (B,), to the library's `x_t` and t."""
        t = self.to_t(time)
        return (expand_like(t, x) * x if self.by_sigma else x), t

    def outside(self, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """From the library's `x_t`, (B, *), and t, (B,), to its own; undoes `inside`."""
        return (xt / expand_like(t, xt) if self.by_sigma else xt), self.from_t(t)

    def sign_of(self, prediction: Prediction) -> Literal[1, -1]:
        """The sign of its target relative to the library's, for a kind of prediction."""
        return self.sign if prediction.kind == "velocity" else 1


STAGEWISE = Convention()
"""t = 0 noise, t = 1 data, target `x_1 - x_0`: torchcfm, flow_matching, SiT, LightningDiT."""

DIFFUSERS = Convention(noise_time=1000.0, data_time=0.0, sign=-1)
"""Timestep 1000 is noise, 0 is data, target `noise - data`: the SD3 and Flux training scripts."""

ConventionLike: TypeAlias = "Convention | str | Any"
"""A convention, its name, or a noise scheduler of diffusers."""

CONVENTIONS: dict[str, Convention] = {
    "sit": STAGEWISE,
    "flow_matching": STAGEWISE,
    "torchcfm": STAGEWISE,
    "pi0": Convention(1, 0, -1),
    "repa": Convention(1, 0, -1),
    "diffusers": DIFFUSERS,
    "edm": Convention(math.inf, 0, prediction=Prediction("data")),
    "edm_F": Convention(math.inf, 0, prediction=Prediction("edm")),
    "score_sde": Convention(1, 0, prediction=Prediction("score"), path=VPPath()),
}
"""By name. DDPM has no name here, because it needs a schedule: `ddpm(alphas_cumprod)`."""

_TYPES: dict[str, PredictionKind] = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}


class DDPMPath(Path):
    """The discrete schedule of DDPM: `a = sqrt(acp_k)`, `s = sqrt(1 - acp_k)` at step k of T.

    `t = 1 - k / (T - 1)`: t = 0 is step T - 1, the most noise. Between two steps it interpolates
    the angle whose cosine is `a` and whose sine is `s`.

    Args:
        alphas_cumprod: `acp`, (T,): decreasing within [0, 1].

    Raises:
        ValueError: If it is anything else.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        values = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        falls = values.ndim == 1 and len(values) > 1 and bool((values.diff() < 0).all())
        if not (falls and values[0] <= 1 and values[-1] >= 0):
            raise ValueError(
                "Expected `alphas_cumprod` as (T,) numbers that fall within [0, 1], got shape "
                f"{tuple(values.shape)}. Take them from the schedule: "
                "noise_scheduler.alphas_cumprod."
            )
        self.alphas_cumprod = values
        self._angles = {torch.device("cpu"): torch.atan2((1 - values).sqrt(), values.sqrt())}

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        if t.device not in self._angles:  # copied once, because a copy takes a device sync
            angles = self._angles[torch.device("cpu")]
            self._angles[t.device] = angles.to(t.device, t.dtype)
        angles, last = self._angles[t.device].to(t.dtype), len(self.alphas_cumprod) - 1
        step = _unrounded(((1 - t) * last).clamp(0, last))
        below = step.floor().clamp_max(last - 1).long()
        rise = angles[below + 1] - angles[below]
        angle = angles[below] + (step - below) * rise
        alpha, sigma = torch.cos(angle).clamp_min(0), torch.sin(angle)
        return PathCoefficients(alpha, sigma, last * rise * sigma, -last * rise * alpha)

    def nearest_step(self, t: Tensor) -> Tensor:
        """The time of the step nearest to t, any shape."""
        last = len(self.alphas_cumprod) - 1
        return 1 - ((1 - t) * last).round() / last

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.alphas_cumprod,)

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"DDPMPath({len(self.alphas_cumprod)} steps, {first:.4g} to {last:.4g})"


def _unrounded(step: Tensor) -> Tensor:
    """Steps, any shape, without the rounding of t where they are whole."""
    whole = step.round()
    return torch.where((step - whole).abs() < 1e-3, whole, step)


def ddpm(alphas_cumprod: Tensor, prediction: Prediction | PredictionKind = "noise") -> Convention:
    """The convention of DDPM: integer timesteps from 0 (data) to T - 1 (noise).

    Args:
        alphas_cumprod: `acp`, (T,), of the schedule.
        prediction: What is predicted: "noise", the default, "v" or "data".
    """
    path = DDPMPath(alphas_cumprod)
    steps = len(path.alphas_cumprod)
    return Convention(steps - 1.0, 0.0, 1, Prediction.of(prediction), path)


def as_convention(value: ConventionLike) -> Convention:
    """The convention of a name of `CONVENTIONS` or a noise scheduler of diffusers; or `value`.

    A scheduler is one of flow matching, or has `alphas_cumprod` and a `prediction_type`
    (`DDPMScheduler`, `DDIMScheduler`). Raises a ValueError for an unknown name, with the known
    ones, and a TypeError for any other value.
    """
    if isinstance(value, Convention):
        return value
    if isinstance(value, str):
        if value in CONVENTIONS:
            return CONVENTIONS[value]
        if value.startswith("ddpm"):
            raise ValueError(
                f"Expected the schedule with {value!r}, got the name alone. Give the scheduler, "
                'convention=noise_scheduler, or its numbers: ddpm(alphas_cumprod, "noise").'
            )
        names = ", ".join(repr(name) for name in CONVENTIONS)
        raise ValueError(
            f"Expected `convention` to be one of {names}, a scheduler of diffusers or a "
            f"Convention, got {value!r}."
        )
    found = of_scheduler(value)
    if found is not None:
        return found
    if hasattr(value, "add_noise") and hasattr(value, "config"):
        raise TypeError(
            f"Expected the noise scheduler of the training, got {type(value).__name__}, which is "
            "for sampling. Give the one of the same schedule: "
            "convention=DDPMScheduler.from_config(noise_scheduler.config)."
        )
    raise TypeError(
        "Expected `convention` to be a Convention, a name such as "
        f'"diffusers", or a noise scheduler of diffusers, got {value!r}.'
    )


def of_scheduler(value: object) -> Convention | None:
    """The convention of a scheduler of diffusers; None if `value` is not one to train with."""

    def has(*names: str) -> bool:
        return all(hasattr(value, name) for name in names)

    if has("scale_noise", "sigmas", "timesteps"):
        return DIFFUSERS
    kind = getattr(getattr(value, "config", None), "prediction_type", None)
    # A scheduler with `sigmas`, for sampling, has an `add_noise` that is not DDPM's.
    if not has("add_noise", "alphas_cumprod") or has("sigmas") or kind not in _TYPES:
        return None
    return ddpm(value.alphas_cumprod, _TYPES[kind])  # type: ignore[attr-defined]


def path_of(convention: Convention, path: Path | None) -> Path | None:
    """`path`, or else that of the convention; refuses two that differ."""
    own = convention.path
    if own is not None and path is not None and not same_path(own, path):
        raise ValueError(
            f"Expected the path of the convention, {unlike(own, path)}. Give one of them: "
            "Oracle(bank, convention=...)."
        )
    return path or own


def written(convention: Convention) -> str:
    """A convention as code."""
    for name, known in CONVENTIONS.items():
        if known == convention:
            return f'"{name}"'
    kind = convention.prediction.kind
    if isinstance(convention.path, DDPMPath):
        return f'ddpm(alphas_cumprod, "{kind}")'
    noise, data = convention.noise_time, convention.data_time
    numbers = f"{'math.inf' if convention.by_sigma else f'{noise:g}'}, {data:g}, {convention.sign}"
    more = "" if kind == "velocity" else f", prediction={convention.prediction!r}"
    return f"Convention({numbers}{more})"
