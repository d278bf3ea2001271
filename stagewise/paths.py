r"""Probability paths and prediction types.

A path carries noise to data,

    x_t = a_t x_1 + s_t x_0,   x_0 ~ N(0, I),   t = 0 is noise, t = 1 is data,

and the library needs only the four numbers `a_t, s_t, a'_t, s'_t` of it. How much a noisy sample
says about its source depends on `rho_t = a_t / s_t`, the square root of the signal-to-noise ratio:
two paths have the same posterior where their `rho` is the same.

A network may be trained on any target that is linear in the pair `(x_1, x_t)`,

    y = c_t x_1 + b_t x_t.

Since `b_t x_t` is known at the input, the posterior mean `m` in place of `x_1` turns every such
target into the oracle's: `y* = y + c_t (m - x_1)`. `Prediction` holds `c_t` and `b_t`.

The library uses the one convention above. A `Convention` (`stagewise.conventions`) translates
models that count time in the other direction or another unit, or have the opposite sign.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import override

__all__ = [
    "CosinePath",
    "EDMPath",
    "LinearPath",
    "Path",
    "PathCoefficients",
    "Prediction",
    "PredictionKind",
    "VPPath",
    "expand_like",
    "same_path",
    "unlike",
]


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """`value`, (B,), with trailing axes of size 1 to broadcast over `x`, (B, *): (B, 1, ..., 1)."""
    return value.reshape(-1, *(1 for _ in range(x.ndim - 1)))


class PathCoefficients(NamedTuple):
    """The path at given times: `a_t`, `s_t` and their derivatives in t, each of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def floored(self, sigma_min: float | Tensor) -> PathCoefficients:
        """The same path with `s_t` kept at or above `sigma_min`, where formulas divide by it."""
        return PathCoefficients(
            self.alpha, self.sigma.clamp_min(sigma_min), self.d_alpha, self.d_sigma
        )

    def select(self, index: Tensor) -> PathCoefficients:
        """The path at some of the times."""
        return PathCoefficients(*(value[index] for value in self))


class Path(ABC):
    """A Gaussian path `x_t = a_t x_1 + s_t x_0`; subclasses give the coefficients."""

    noisy_target = False
    """Whether the target of its library has noise that `x_t` and `x_1` do not determine."""

    @abstractmethod
    def __call__(self, t: Tensor) -> PathCoefficients:
        """The coefficients at `t`.

        Args:
            t: Times in [0, 1], any shape, floating point; t = 0 is noise.

        Returns:
            `a_t, s_t, a'_t, s'_t` with the shape, dtype and device of `t`.
        """

    def snr_sqrt(self, t: Tensor) -> Tensor:
        """`rho_t = a_t / s_t`, infinite where `s_t` is zero."""
        alpha, sigma, *_ = self(t)
        return alpha / sigma

    def time_of_snr_sqrt(self, rho: float) -> float:
        """The t in [0, 1] at which `rho_t`, which grows with t, is `rho`; else the nearer end."""
        low, high = 0.0, 1.0
        for _ in range(64):
            middle = (low + high) / 2
            value = self.snr_sqrt(torch.tensor(middle, dtype=torch.float64))
            low, high = (middle, high) if float(value) < rho else (low, middle)
        return (low + high) / 2

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """`x_t = a_t x_1 + s_t x_0` for x0, x1 of shape (B, *) and t of shape (B,)."""
        alpha, sigma, *_ = self(t)
        return expand_like(alpha, x1) * x1 + expand_like(sigma, x0) * x0

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"


class LinearPath(Path):
    """The straight path of rectified flow: `a = t`, `s = 1 - t` (arXiv 2209.03003).

    It is CondOT in flow_matching, ICPlan in SiT, sigma = 0 in torchcfm.

    Example:
        >>> import torch
        >>> from stagewise import LinearPath
        >>> x0, x1, t = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.0, 0.25])
        >>> LinearPath().interpolate(x0, x1, t)[:, 0].tolist()
        [0.0, 0.25]
    """

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        one = torch.ones_like(t)
        return PathCoefficients(t, 1 - t, one, -one)


class CosinePath(Path):
    """The cosine path, `a = sin(pi t / 2)`, `s = cos(pi t / 2)`: it preserves unit variance.

    It is GVP in SiT (arXiv 2401.08740), VP in torchcfm (Albergo & Vanden-Eijnden, 2209.15571).
    """

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        half_pi = math.pi / 2
        # cos(pi t / 2) written as sin(pi (1 - t) / 2), which keeps its digits, and is 0, at t = 1.
        alpha, sigma = torch.sin(half_pi * t), torch.sin(half_pi * (1 - t))
        return PathCoefficients(alpha, sigma, half_pi * sigma, -half_pi * alpha)


class VPPath(Path):
    """Variance-preserving diffusion, linear noise rate (Song et al., arXiv 2011.13456, Eq. 33).

    With tau = 1 - t, `log a = -(beta_max - beta_min) tau^2 / 4 - beta_min tau / 2` and
    `s^2 = 1 - a^2`. At t = 0 a trace of data is left (`a` = 0.0066 with the defaults). `s'` is
    unbounded at t = 1, so velocity targets are not finite at t = 1 exactly.

    Args:
        beta_min: Noise rate at the data end, default 0.1.
        beta_max: Noise rate at the noise end, default 20.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max:
            raise ValueError(f"Expected 0 < beta_min < beta_max, got {beta_min} and {beta_max}.")
        self.beta_min, self.beta_max = beta_min, beta_max

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        tau, slope = 1 - t, self.beta_max - self.beta_min
        log_alpha = -0.25 * slope * tau**2 - 0.5 * self.beta_min * tau
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        d_alpha = alpha * 0.5 * (slope * tau + self.beta_min)
        return PathCoefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


class EDMPath(Path):
    """Variance-exploding path on Karras' noise schedule (arXiv 2206.00364, Eq. 5): `a = 1`.

    `s_t = (sigma_max^(1/rho) + t (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho`; t = 0 has
    `sigma_max` and t = 1 has `sigma_min`, which is not zero. `time_of_sigma` converts back.

    Args:
        sigma_min: Smallest noise level, default 0.002.
        sigma_max: Largest noise level, default 80.
        rho: Exponent of the schedule, default 7.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"Expected 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}.")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    @override
    def __call__(self, t: Tensor) -> PathCoefficients:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        root = high + t * (low - high)
        d_sigma = self.rho * root ** (self.rho - 1) * (low - high)
        return PathCoefficients(torch.ones_like(t), root**self.rho, torch.zeros_like(t), d_sigma)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time t whose noise level is `sigma` (any shape), clipped to [0, 1]."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return ((sigma ** (1 / self.rho) - high) / (low - high)).clamp(0, 1)


def same_path(one: Path, other: Path) -> bool:
    """Whether two paths give the same four numbers at all t (to 1e-4, on a grid).

    Not their repr: two schedulers of one class may print alike and differ.
    """
    t = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    pairs = zip(one(t), other(t), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def unlike(expected: Path, given: Path) -> str:
    """Two different paths for a message: "LinearPath(), got CosinePath()"."""
    alike = repr(expected) == repr(given)
    return f"{expected!r}, got {'one that prints alike but differs' if alike else repr(given)}"


PredictionKind = Literal["velocity", "data", "noise", "score", "v", "edm"]


@dataclass(frozen=True)
class Prediction:
    """What the network is trained to predict, as a linear function of `(x_1, x_t)`.

    The kinds, their targets and their `c_t`:

    - "velocity": `a' x_1 + s' x_0`, with `a' - a s'/s`;
    - "data": `x_1`, with 1;
    - "noise": `x_0`, with `-a/s`;
    - "score": `-x_0 / s`, with `a/s^2`;
    - "v": `a x_0 - s x_1` (Salimans & Ho, arXiv 2202.00512), with `-(a^2 + s^2)/s`;
    - "edm": EDM's F, `(x_1 - c_skip x)/c_out` (arXiv 2206.00364, Eq. 7), with `1/c_out`.

    Args:
        kind: One of the above, default "velocity".
        sigma_data: EDM's standard deviation of the data, default 0.5; used by "edm" only.

    Raises:
        ValueError: If `kind` is not one of the above.
    """

    kind: PredictionKind = "velocity"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        kinds = get_args(PredictionKind)
        if self.kind not in kinds:
            raise ValueError(f"Expected `prediction` to be one of {kinds}, got {self.kind!r}.")

    @classmethod
    def of(cls, value: Prediction | PredictionKind) -> Prediction:
        """`value` itself, or the prediction of that name."""
        return value if isinstance(value, Prediction) else cls(value)

    def coefficients(self, path: PathCoefficients) -> tuple[Tensor, Tensor]:
        """`c_t` and `b_t` of `y = c_t x_1 + b_t x_t`, each of the shape of t.

        They are infinite where the path's sigma is 0, for every kind but "data"; give
        `path.floored(...)` where a finite number is needed.
        """
        alpha, sigma, _, d_sigma = path
        c = self.of_data(path)
        if self.kind == "velocity":
            return c, d_sigma / sigma
        if self.kind == "data":
            return c, torch.zeros_like(alpha)
        if self.kind == "noise":
            return c, 1 / sigma
        if self.kind == "score":
            return c, -1 / sigma**2
        if self.kind == "v":
            return c, alpha / sigma
        root = torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        return c, -alpha * self.sigma_data**2 / (sigma * self.sigma_data * root)

    def of_data(self, path: PathCoefficients) -> Tensor:
        """`c_t` alone, as `coefficients` gives it."""
        alpha, sigma, d_alpha, d_sigma = path
        if self.kind == "velocity" and alpha.element_size() > 2:
            return torch.addcdiv(d_alpha, alpha * d_sigma, sigma, value=-1)
        if self.kind == "velocity":  # 16 bits are rounded at each step, as they always were
            return d_alpha - alpha * d_sigma / sigma
        if self.kind == "data":
            return torch.ones_like(alpha)
        if self.kind == "noise":
            return -alpha / sigma
        if self.kind == "score":
            return alpha / sigma**2
        if self.kind == "v":
            return -(alpha**2 + sigma**2) / sigma
        root = torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        return root / (sigma * self.sigma_data)

    def target(self, path: PathCoefficients, x0: Tensor, x1: Tensor) -> Tensor:
        """The conditional target `y` for x0, x1 of shape (B, *); finite wherever it exists."""
        alpha, sigma, d_alpha, d_sigma = (expand_like(value, x1) for value in path)
        if self.kind == "velocity":
            return d_alpha * x1 + d_sigma * x0
        if self.kind == "data":
            return x1
        if self.kind == "noise":
            return x0
        if self.kind == "score":
            return -x0 / sigma
        if self.kind == "v":
            return alpha * x0 - sigma * x1
        root = torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        return (sigma / self.sigma_data * x1 - alpha * self.sigma_data * x0) / root

    def to_velocity(self, path: PathCoefficients, y: Tensor, xt: Tensor) -> Tensor:
        """The velocity that a prediction `y` at `xt` stands for, both (B, *).

        Solves `y = c_t x_1 + b_t x_t` for `x_1`. Noise and score predictions lose `x_1` where
        alpha is 0; start the solver a little after t = 0 with these.
        """
        if self.kind == "velocity":
            return y
        c, b = self.coefficients(path)
        c_v, b_v = Prediction("velocity").coefficients(path)
        x1 = (y - expand_like(b, xt) * xt) / expand_like(c, xt)
        return expand_like(c_v, xt) * x1 + expand_like(b_v, xt) * xt


def __getattr__(name: str) -> Any:
    """`Convention` and its constants, which were here: older pickles look them up here."""
    if name in ("Convention", "STAGEWISE", "DIFFUSERS"):
        from stagewise import conventions

        return getattr(conventions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
