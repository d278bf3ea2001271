r"""The engine of a smoothed set: which queries and rows take float64, and which float32.

**On a CPU** a query whose strength is 0 is answered by the plain engine. For the others all
log-weights are computed in float32, a few queries of nearly the same noise level at a time. A
log-weight is then off by about

    delta = (a/v) (u |y| R + w |<x, y>|),    u, w as in `products.rounding`,

which matters where few rows carry the posterior. Those, the **leading** ones, are computed again in
float64, as a mixture of their own: `merge` puts it and the others together. Rows lead until what is
left moves the mean by less than `_RTOL` of its distance from the bank's mean (the estimate of
`engines.exact`), and where delta is large all rows do that are within reach of the largest
log-weight. If that is a good part of all rows, or the estimate ends above `_RTOL`, the queries are
done in float64 throughout.

**On an accelerator**, where to look at values would take a sync, all are done in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.engines import Auto, Engine, Queries
from stagewise.engines.base import UNDERFLOW, where
from stagewise.gaussians import Gaussians, Mixture, Shapes, Timed
from stagewise.posterior import Posterior, inverse, merge, put
from stagewise.products import full_precision, rounding
from stagewise.smoothing import Smoothing

__all__ = ["GaussianEngine"]

_LOGITS = 2**24
"""Products with rows, and numbers that are as many, held at a time; there are about four."""

_BLOCK, _FEWER = 64, 16
"""Queries whose log-weights are computed at a time, and whose leading rows are."""

_SMALL = 512
"""Up to so many rows float64 costs no more than to find out where float32 does."""

_RTOL = 1e-5
"""Relative error `|dm| / (|m - c| min(s_t, 1))` of the mean, and of a weight, that is let pass."""

_EVIDENCE = 5e-7
"""Relative error of the log-evidence that is let pass."""

_NOTHING = 1e-10
"""A share of a posterior that adds nothing to its mean."""

_LEVELS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
"""Weights from which on rows lead, tried in turn."""

_LEAST = -26.0
"""Log of the weight from which on all rows lead where delta is large or they are few."""

_REACHED = 128
"""So many rows are few."""

_TOGETHER = 512
"""Up to so many leading rows those of all queries of a block are taken together."""

_MANY = 4
"""If one of so many rows leads, float64 throughout costs less."""


class GaussianEngine(Engine):
    """The posterior over the Gaussians of a smoothed set; see the module."""

    def __init__(self, smoothing: Smoothing) -> None:
        self.smoothing, self.plain = smoothing, Auto()
        self._shapes: dict[torch.device, Shapes] = {}
        self._segments: dict[tuple[torch.device, int, int], Gaussians] = {}

    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """See `Engine.posterior`. The weight of the source is there, where it is known."""
        on_host, path = queries.xt.device.type == "cpu", queries.path
        every, parts, order = list(range(len(queries))), [], []
        if on_host and isinstance(path, Timed):
            every = where(path.share > 0)
            plain = sorted(set(range(len(queries))).difference(every))
            if plain:
                some = queries.select(plain)
                parts.append(_with_source(bank, some, self.plain.posterior(bank, some, k)))
                order += plain
        if on_host:  # queries of nearly the same noise level then stand together
            every = torch.tensor(every)[path.sigma[every].argsort()].tolist()
        smoothed = queries.select(every)
        for at, rows in smoothed.groups if every else ():
            gaussians = self._segment(bank, rows, queries.xt.device)
            step = max(1, _LOGITS // gaussians.width)
            step = min(step, _BLOCK) if on_host else step
            for first in range(0, len(at), step):
                some = smoothed.select(at[first : first + step])
                with full_precision():
                    parts.append(self._solve(bank, gaussians, some, k))
            order += [every[i] for i in at]
        return Posterior.cat(parts)[queries.index(inverse(order))]

    def _segment(self, bank: LatentBank, rows: slice, device: torch.device) -> Gaussians:
        key = (device, rows.start, rows.stop)
        if key not in self._segments:
            if device not in self._shapes:
                self._shapes[device] = Shapes.of(bank, self.smoothing, device)
            self._segments[key] = Gaussians.of(rows, self.smoothing.index, self._shapes[device])
        return self._segments[key]

    def _solve(self, bank: LatentBank, gaussians: Gaussians, queries: Queries, k: int) -> Posterior:
        """The posterior over the Gaussians of a segment."""
        wide = bank.dtype == torch.float64 or len(gaussians) <= _SMALL
        if queries.xt.device.type != "cpu" or wide:
            return self._in_float64(bank, gaussians, queries, k)
        rough = Mixture(bank, gaussians, queries, self.smoothing.floor, torch.float32)
        weighed = Weighed.of(rough.logits(), rough.common)
        cut, error = _cut(rough, weighed, k)
        rows, columns = _above(weighed, cut)
        together = len(rows.unique()) <= _TOGETHER
        size = len(queries) if together else _FEWER
        every = range(len(queries))
        exact: list[tuple[range, Posterior | None]] = []
        rest: list[int] = []
        for at in (every[first : first + size] for first in every[::size]):
            own = rows[(columns >= at.start) & (columns < at.stop)].unique()
            if not len(own):
                exact.append((at, None))
                rest += at
                continue
            some, whole = queries.select(at), len(own) > len(gaussians) / _MANY
            chosen = gaussians if whole else self._some(bank, gaussians.numbers(own), some)
            post = self._in_float64(bank, chosen, some, k)
            exact.append((at, post))
            if not whole and weighed.without(own, slice(at.start, at.stop)) > _NOTHING:
                rest += at
        if not rest:
            return Posterior.cat([post for _, post in exact if post is not None])
        source = None if queries.source is None else queries.source[rest]
        others = _posterior(rough.select(rest), weighed.select(rest), source, k)
        parts, first = [], 0
        for at, own_post in exact:
            if at.start in rest:
                other, first = others[first : first + len(at)], first + len(at)
                parts.append(other if own_post is None else _joined(own_post, other, k))
            elif own_post is not None:
                parts.append(own_post)
        post = Posterior.cat(parts)
        wrong = sorted(set(rest).intersection(where(_relative(error, rough, post) > 2 * _RTOL)))
        if wrong:
            again = self._in_float64(bank, gaussians, queries.select(wrong), k)
            post = put(post, wrong, again, len(queries))
        return post

    def _some(self, bank: LatentBank, rows: Tensor, queries: Queries) -> Gaussians:
        return Gaussians.of(rows, self.smoothing.index, self._shapes[queries.xt.device])

    def _in_float64(
        self, bank: LatentBank, gaussians: Gaussians, queries: Queries, k: int
    ) -> Posterior:
        mixture = Mixture(bank, gaussians, queries, self.smoothing.floor)
        return _posterior(mixture, Weighed.of(mixture.logits(), mixture.common), queries.source, k)

    def __repr__(self) -> str:
        return f"Gaussians of {self.smoothing!r}"


@dataclass
class Weighed:
    """Weights of rows, from log-weights.

    Attributes:
        logits: Log-weights less the largest, (n, B).
        gamma: Weights, which add up to 1 before some are left out, (n, B).
        log_z: Log of the sum of weights, (B,), float64.
        log_total: The same, relative to the largest weight, (B,), float64.
        out: Which have been left out, (n, B), or None.
    """

    logits: Tensor
    gamma: Tensor
    log_z: Tensor
    log_total: Tensor
    out: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, common: Tensor) -> Weighed:
        """From log-weights less what is common to a query's; they are shifted in place."""
        peak = logits.amax(0)
        # Numbers too small for their type take a processor a hundred times as long.
        gamma = logits.sub_(peak).clamp_min(UNDERFLOW).exp_()
        torch.threshold_(gamma, 1.001 * math.exp(UNDERFLOW), 0)
        total = gamma.sum(0)
        log = total.double().log()
        return cls(logits, gamma.div_(total), common + peak.double() + log, log)

    def above(self, cut: Tensor) -> Tensor:
        """Which weights have a logarithm above some, (B,), of each query: (n, B)."""
        return self.logits > (cut + self.log_total).to(self.logits.dtype)

    def without(self, rows: Tensor, columns: slice) -> float:
        """Leaves some rows out for some queries, and tells the largest share of the others."""
        self.out = torch.zeros_like(self.gamma, dtype=torch.bool) if self.out is None else self.out
        self.out[rows, columns] = True
        self.gamma[rows, columns] = 0
        return float(self.gamma[:, columns].sum(0).max())

    def select(self, at: list[int]) -> Weighed:
        """Those of some queries; itself if that is all of them."""
        if len(at) == len(self.log_z):
            return self
        out = None if self.out is None else self.out[:, at]
        logits, gamma = self.logits[:, at], self.gamma[:, at]
        return Weighed(logits, gamma, self.log_z[at], self.log_total[at], out)


def _noise(mixture: Mixture, norm: Tensor | float) -> Tensor:
    """Standard deviation of a float32 log-weight of a row at some squared distance, (B,)."""
    unit, growth = rounding(torch.float32, mixture.bank.dim)
    root, length = norm**0.5, torch.linalg.vector_norm(mixture.y, dim=1)
    product = mixture.alpha * norm + mixture.variance.sqrt() * root
    # A row's squared norm counts from the mean of all.
    norms = mixture.alpha * (norm - mixture.bank.mean_sq_norm).abs()
    return mixture.alpha / mixture.v * (unit * (length * root + norms) + growth * product)


def _cut(mixture: Mixture, weighed: Weighed, k: int) -> tuple[Tensor, Tensor]:
    """The log-weights above which rows lead, and what the others' errors move the mean by, (B,)."""
    bank, gamma = mixture.bank, weighed.gamma
    norm = (mixture.norms().to(gamma) @ gamma).double()
    share = bank.mean_sq_norm / bank.dim
    # The distance of the mean from the bank's is about that of a Gaussian as wide as the bank.
    wiener = mixture.alpha * share / (mixture.alpha.square() * share + mixture.variance)
    length = wiener * torch.linalg.vector_norm(mixture.y, dim=1) / norm.sqrt()
    noise = _noise(mixture, norm)
    allowed = _RTOL * length.clamp_max(1) * mixture.variance.sqrt().clamp_max(1) / noise
    # Errors of rows that are alike may be alike: weights do not show it, but their sum does.
    tail = _EVIDENCE * (1 + weighed.log_z.abs()) / noise
    left = gamma.square().sum(0).double()
    cut, missing = torch.zeros_like(noise), (left.sqrt() > allowed) | (tail < 1)
    if missing.any():
        reach = 1 + mixture.snr * mixture.gaussians.values.max()
        margin = 64 * _noise(mixture, bank.radius**2) + 2**-22 * (bank.dim + 60) * reach
        least = _LEAST - margin
        few = missing & (weighed.above(least).sum(0) <= _REACHED)
        cut, left = torch.where(missing, least, cut), torch.where(few, 0, left)
        missing &= ~few
    for level in _LEVELS if missing.any() else ():
        below = torch.threshold(-gamma, -level, 0)
        enough = missing & (below.sum(0).neg() <= tail)
        some = below.square_().sum(0).double()
        enough &= some.sqrt() <= allowed
        cut, left = torch.where(enough, math.log(level), cut), torch.where(enough, some, left)
        missing &= ~enough
        if not missing.any():
            break
    left = torch.where(missing, 0, left)
    inexact = noise > _RTOL
    if inexact.any():
        largest = gamma.amax(0) if k == 1 else gamma.topk(min(k, len(gamma)), 0).values[-1]
        cut = torch.where(inexact, torch.minimum(cut, largest.double().log() - 0.01), cut)
    unit, _ = rounding(torch.float32, bank.dim)
    return cut, (noise + 20 * unit) * (norm * left).sqrt()


def _above(weighed: Weighed, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and queries of the weights above a cut."""
    if cut.min() >= 0:
        none = torch.empty(0, dtype=torch.int64)
        return none, none
    found = weighed.above(cut).nonzero()
    return found[:, 0], found[:, 1]


def _relative(error: Tensor, mixture: Mixture, post: Posterior) -> Tensor:
    """An error of the mean over its distance from the bank's mean and the noise level, (B,)."""
    length = (post.mean - mixture.bank.centre).norm(dim=1)
    return torch.where(error > 0, error / (length * mixture.variance.sqrt().clamp_max(1)), 0)


def _posterior(mixture: Mixture, weighed: Weighed, source: Tensor | None, k: int) -> Posterior:
    """The posterior over the rows that have not been left out."""
    gaussians, gamma, own = mixture.gaussians, weighed.gamma, None
    log_z, log_total = weighed.log_z, weighed.log_total
    if weighed.out is not None:
        total = gamma.sum(0).clamp_min(math.exp(UNDERFLOW))
        gamma, log = gamma / total, total.double().log()
        log_z, log_total = log_z + log, log_total + log
    if source is not None:
        place, inside = gaussians.places(source.to(gamma.device))
        own = (gamma.gather(0, place[None])[0] * inside).double()
        own = own.masked_fill(source.to(gamma.device) < 0, torch.nan)
    ranked = gamma if weighed.out is None else gamma.masked_fill(weighed.out, -1)
    if k == 1:
        weights, top = (value[None] for value in ranked.max(0))
    else:
        weights, top = ranked.topk(min(k, len(gamma)), dim=0)
    rows = gaussians.numbers(top).masked_fill(weights < 0, -1)
    missing = (0, k - len(weights))
    return Posterior(
        mean=mixture.mean(gamma),
        log_evidence=log_z,
        entropy=log_total - (gamma * weighed.logits).sum(0),
        ess=1 / gamma.square().sum(0).double(),
        weights=pad(weights.T.double().clamp_min(0), missing),
        rows=pad(rows.T, missing, value=-1),
        tail_mass=torch.zeros_like(log_z),
        source_weight=own,
    )


def _joined(one: Posterior, other: Posterior, k: int) -> Posterior:
    """The posterior over the rows of both."""
    post = merge(one, other, k=k)
    if one.source_weight is None or other.source_weight is None:
        return post
    shares = [(part.log_evidence - post.log_evidence).exp() for part in (one, other)]
    own = one.source_weight * shares[0] + other.source_weight * shares[1]
    return replace(post, source_weight=own)


def _with_source(bank: LatentBank, queries: Queries, post: Posterior) -> Posterior:
    """With the weight of the source, where it is known."""
    if queries.source is None:
        return post
    path, source = queries.path, queries.source
    gap = queries.xt - path.alpha[:, None] * bank.take(source.clamp_min(0), queries.xt.device)
    log = -gap.square().sum(1) / (2 * path.sigma.square()) - post.log_evidence
    ends = torch.tensor([(rows.start, rows.stop) for rows in queries.segments]).to(source)
    inside = (source >= ends[:, 0]) & (source < ends[:, 1])
    own = (log.exp().clamp_max(1) * inside).masked_fill(source < 0, torch.nan)
    return replace(post, source_weight=own)
