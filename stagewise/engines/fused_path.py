# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
"""The coefficients of the library's own paths on CUDA, in one launch; torch takes 5 to 19.

`stagewise.paths` has the formulas, by which every other path is computed.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines import fused
from stagewise.engines.kernels import kernel, launch, tl
from stagewise.paths import CosinePath, EDMPath, LinearPath, Path, PathCoefficients, VPPath

__all__ = ["coefficients"]

_BLOCK = 256


@kernel
def number(bits) -> object:
    """A float64 number from its bits: Triton passes Python's numbers as float32."""
    return (tl.full((), 0, tl.int64) + bits).to(tl.float64, bitcast=True)


@kernel
def along_path(
    times,
    made,
    count,
    least,
    first,
    second,
    third,
    kind: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """`a_t`, `s_t` of at least `least`, `a'_t` and `s'_t`."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    t = tl.load(times + at, mask=at < count, other=0.0).to(tl.float64)
    one = tl.full((block,), 1.0, tl.float64)
    low, high, third = number(first), number(second), number(third)
    if kind == 0:  # linear
        alpha, sigma, d_alpha, d_sigma = t, one - t, one, -one
    elif kind == 1:  # cosine, low is pi / 2
        alpha, sigma = tl.sin(low * t), tl.sin(low * (one - t))
        d_alpha, d_sigma = low * sigma, -low * alpha
    elif kind == 2:  # variance-preserving, rates of noise
        rate = low + (high - low) * (one - t)
        half = (one - t) * (rate + low) / -4
        alpha = tl.exp(half)
        rest = alpha * alpha
        # 1 - exp(x) = x (1 - exp(x)) / log(exp(x)) is right to the last digit near x = 0 too.
        near = tl.where(rest == 1, -2 * half, 2 * half * (1 - rest) / tl.log(rest))
        sigma = tl.sqrt(tl.where(rest < 0.5, 1 - rest, near))
        d_alpha = alpha * rate / 2
        d_sigma = -alpha * d_alpha / sigma
    else:  # EDM: roots of noise levels, and their exponent
        root = low + t * (high - low)
        alpha, d_alpha = one, one - one
        sigma = tl.exp(third * tl.log(root))
        d_sigma = third * sigma / root * (high - low)
    sigma = tl.maximum(sigma, number(least))
    tl.store(made + at, alpha, mask=at < count)
    tl.store(made + count + at, sigma, mask=at < count)
    tl.store(made + 2 * count + at, d_alpha, mask=at < count)
    tl.store(made + 3 * count + at, d_sigma, mask=at < count)


def coefficients(
    bank: LatentBank, path: Path, t: Tensor, device: torch.device, least: float
) -> PathCoefficients:
    """The path at times (B,), float64 on `device`, with `s_t` of at least `least`."""
    t = t.detach().to(device)
    if (settings := _settings(path)) and fused.serves(bank, device):
        found = fused.runs(_launched, t, settings, least)
        if found is not None:
            return PathCoefficients(*found.unbind())
    return path(t.double()).floored(least)


def _settings(path: Path) -> tuple[int, ...] | None:
    """A path's number in the kernel, and its settings as bits; None for one of another library."""
    kind, settings = 0, (0.0, 0.0, 0.0)
    if type(path) is CosinePath:
        kind, settings = 1, (math.pi / 2, 0.0, 0.0)
    elif type(path) is VPPath:
        kind, settings = 2, (path.beta_min, path.beta_max, 0.0)
    elif type(path) is EDMPath:
        high, low = (sigma ** (1 / path.rho) for sigma in (path.sigma_max, path.sigma_min))
        kind, settings = 3, (high, low, path.rho)
    elif type(path) is not LinearPath:
        return None
    return *map(_bits, settings), kind


def _bits(x: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits


def _launched(t: Tensor, settings: tuple[int, ...], least: float) -> Tensor:
    made = torch.empty(4, len(t), dtype=torch.float64, device=t.device)
    numbers = [len(t), _bits(least), *settings, _BLOCK]
    launch("along_path", [-(-len(t) // _BLOCK)], [t.contiguous()], [made], numbers)
    return made
