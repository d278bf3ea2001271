"""The unbiased tail: how fast the bias of the mean falls with the rows that stand for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peers
import torch
from measure import Options
from report import Report
from torch import Tensor

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Nearest

K, DRAWS, TIME, CALLS = 100, (100, 316, 1000, 3162, 10_000), 0.5, 24


def tail(options: Options) -> Report:
    """A case in which the nearest hundred alone are off by more than 10 %."""
    n, dim, queries = options.rows(40_000), 8, 16
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, dim, generator=generator)
    source = torch.randint(n, (queries,), generator=generator)
    t = torch.full((queries,), TIME)
    xt = LinearPath().interpolate(torch.randn(queries, dim, generator=generator), x[source], t)
    report = Report("tail", f"N={n}, D={dim}, t={TIME}, {queries} queries, top {K}").start()
    case = Case.of(x, xt, t)
    alone = Oracle(case.bank, engine=Nearest(K)).posterior(xt, t)
    off = float(((alone.mean - case.mean).norm(dim=1) / case.size).square().mean().sqrt())
    mass = float(alone.tail_mass.mean())
    report.note(f"top {K} without draws: off by {off:.1%} of |m - mean|, mean tail mass {mass:.2f}")
    report.target(f"error of the top {K} alone", off, 0.1, most=False)
    lines = [case.bias(m) for m in DRAWS if 4 * m <= n]
    report.plain(f"Nearest({K}, draws=m), {CALLS} calls each, relative to |m - mean|", lines)
    report.note(
        f"the spread of one call falls as m^{_slope(lines, 'spread'):.2f}, the bias as "
        f"m^{_slope(lines, 'bias'):.2f}"
    )
    off = abs(_slope(lines, "bias") + 1)
    report.target("slope of the bias, distance from -1", off, 0.15)
    report.note("used: rows drawn, 100 more than are asked for;")
    report.note("bias: the average over calls, with what is linear in the draws and averages to 0")
    report.note("by construction taken out of each call; +-: its standard error")
    return report


@dataclass
class Case:
    """Queries with their true posterior.

    Attributes:
        bank: The rows.
        xt: Noisy samples, (B, D).
        t: Times, (B,).
        mean: The posterior mean, (B, D), float64.
        rest: The weights, with 0 for the nearest hundred, (B, N), float64.
        moment: `rest @ x`, (B, D).
        size: `|m - mean of the bank|`, (B,).
    """

    bank: LatentBank
    xt: Tensor
    t: Tensor
    mean: Tensor
    rest: Tensor
    moment: Tensor
    size: Tensor

    @classmethod
    def of(cls, x: Tensor, xt: Tensor, t: Tensor) -> Case:
        bank = LatentBank(x)
        mean, gamma = peers.reference(x, xt, t)
        rest = gamma.scatter(1, gamma.topk(K, dim=1).indices, 0)
        size = (mean - bank.centre).norm(dim=1)
        return cls(bank, xt, t, mean, rest, rest @ x.double(), size)

    def bias(self, draws: int) -> dict[str, float]:
        """Bias of the mean, its standard error, and the spread of one call."""
        oracle = Oracle(self.bank, engine=Nearest(K, draws=draws, seed=draws))
        errors, rests = [], []
        for _ in range(CALLS):
            with self.taken() as rows:
                error = oracle.posterior(self.xt, self.t).mean - self.mean
            drawn = max(rows, key=len)
            used = len(drawn)
            linear = self.linear(drawn)
            errors.append(error / self.size[:, None])
            rests.append((error - linear) / self.size[:, None])
        error, rest = torch.stack(errors), torch.stack(rests)
        # The squared mean of R calls is too large by 1/R of their variance.
        noise = rest.var(0).sum(1) / CALLS
        square = float((rest.mean(0).square().sum(1) - noise).mean())
        bias = math.sqrt(max(0.0, square))
        doubt = (2 * noise.square() + 4 * square * noise).clamp_min(0) / self.xt.numel()
        return {
            "m": draws,
            "used": used,
            "bias": bias,
            "+-": float(doubt.mean().sqrt()) / max(2 * bias, 1e-30),
            "spread": float(error.var(0).sum(1).mean().sqrt()),
        }

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """What an engine takes from the bank, one by one: among it the rows it has drawn."""
        rows: list[Tensor] = []
        take = self.bank.take

        def listen(wanted: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if wanted.ndim == 1:
                rows.append(wanted)
            return take(wanted, *args, **kwargs)

        self.bank.take = listen
        try:
            yield rows
        finally:
            del self.bank.take

    def linear(self, drawn: Tensor) -> Tensor:
        """The error of the mean to first order in the draws, (B, D).

        It is 0 on average for any uniform draws, so that it may be taken out of what a call is off
        by. What is left falls as the bias does, where the whole falls as its square root only.

        Args:
            drawn: The rows, (n,).
        """
        weights, mass = self.rest[:, drawn], self.rest.sum(1, keepdim=True)
        middle, each = self.moment / mass, len(self.bank) / len(drawn)
        part = weights @ self.bank.take(drawn) - weights.sum(1, keepdim=True) * middle
        return each * part - (self.moment - mass * middle)


def _slope(lines: list[dict[str, float]], key: str) -> float:
    """Of a straight line through the logarithms."""
    x, y = (
        torch.tensor([math.log(max(line[name], 1e-30)) for line in lines], dtype=torch.float64)
        for name in ("used", key)
    )
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
