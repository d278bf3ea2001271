"""The unbiased tail: how fast the bias of the mean falls with the rows that stand for the rest."""

from __future__ import annotations

import math

import peers
import torch
from measure import Options, Report, engine
from torch import Tensor

from stagewise import LatentBank, Oracle

K, DRAWS, TIME = 100, (100, 316, 1000, 3162, 10_000), 0.5
PARTS = 12


def tail(options: Options) -> Report:
    """A case in which the nearest hundred alone are off by more than 10 %.

    The queries lie three standard deviations out, where few rows are and the weights are uneven:
    that is where a mean over random rows is biased most. At typical places the bias drowns in the
    spread of a single call.
    """
    n, dim, queries = options.rows(80_000), 2, 16
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, dim, generator=generator)
    t = torch.full((queries,), TIME)
    xt = torch.randn(queries, dim, generator=generator)
    xt *= 3 * math.hypot(TIME, 1 - TIME) / xt.norm(dim=1, keepdim=True)
    report = Report(
        "tail", f"N={n}, D={dim}, t={TIME}, {queries} queries at 3 standard deviations, top {K}"
    ).start()
    bank = LatentBank(x)
    mean, _ = peers.reference(x, xt, t)
    size = (mean - bank.centre).norm(dim=1)
    alone = Oracle(bank, engine=engine("Nearest", K)).posterior(xt, t)
    off = float(((alone.mean - mean).norm(dim=1) / size).square().mean().sqrt())
    mass = float(alone.tail_mass.mean())
    report.note(f"top {K} without draws: off by {off:.1%} of |m - mean|, mean tail mass {mass:.2f}")
    report.target(f"error of the top {K} alone", off, 0.1, most=False)
    for name in ("Nearest", "Faiss"):
        try:
            oracles = {
                m: Oracle(bank, engine=engine(name, K, draws=m, seed=m)) for m in DRAWS if 4 * m < n
            }
        except ImportError as error:
            report.note(f"{name}: skipped, {error}")
            continue
        lines = [
            _bias(oracle, m, xt, t, mean, size, options.scale) for m, oracle in oracles.items()
        ]
        report.plain(f"{name}({K}, draws=m), relative to |m - mean of the bank|", lines)
        known = [line for line in lines if line["bias"] > 3 * line["+-"]]
        spread = _slope(lines, "spread")
        text = f"{name}: the spread of one call falls as m^{spread:.2f}"
        if len(known) < 3:
            report.note(f"{text}; too few calls to tell the bias from 0")
            continue
        slope = _slope(known, "bias")
        report.note(f"{text}, the bias as m^{slope:.2f} (m from {known[0]['m']} to "
                    f"{known[-1]['m']}, where it is above 3 x its error)")
        report.target(f"slope of the bias, {name}", slope, -0.8)
    return report


def _bias(
    oracle: Oracle, draws: int, xt: Tensor, t: Tensor, mean: Tensor, size: Tensor, scale: float
) -> dict[str, float]:
    """Bias of the mean over many calls, with its error, and the spread of one call."""
    # The squared bias falls as 1/m^2, and what the average of R calls is off by as 1/(m R).
    calls = PARTS * math.ceil(max(24, draws * scale / 20) / PARTS)
    errors = torch.stack([oracle.posterior(xt, t).mean - mean for _ in range(calls)])
    errors /= size[:, None]
    parts = errors.unflatten(0, (PARTS, -1)).mean(1)

    def square(parts: Tensor) -> float:
        # Products of different parts: their noise is independent and averages out.
        cross = parts.sum(0).square() - parts.square().sum(0)
        return float(cross.sum(1).mean()) / (len(parts) * (len(parts) - 1))

    bias = math.sqrt(max(0.0, square(parts)))
    every = range(PARTS)
    again = [square(parts[[i for i in every if i != left]]) for left in every]
    middle = sum(again) / PARTS
    error = math.sqrt((PARTS - 1) / PARTS * sum((value - middle) ** 2 for value in again))
    return {
        "m": draws,
        "calls": calls,
        "bias": bias,
        "+-": error / (2 * bias) if bias else math.sqrt(error),
        "spread": float(errors.var(0).sum(1).mean().sqrt()),
    }


def _slope(lines: list[dict[str, float]], key: str) -> float:
    """Of a straight line through the logarithms."""
    x, y = (
        torch.tensor([math.log(line[name]) for line in lines], dtype=torch.float64)
        for name in ("m", key)
    )
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
