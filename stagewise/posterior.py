r"""The posterior over bank rows given a noisy sample, and how partial posteriors merge.

For a set S of bank rows and a query `x_t`, with `l_i = -||x_t - a_t x^(i)||^2 / (2 s_t^2)`,

    Z = sum_{i in S} exp(l_i),   gamma_i = exp(l_i) / Z,   m = sum_i gamma_i x^(i),
    H = -sum_i gamma_i log gamma_i,   ESS = 1 / sum_i gamma_i^2.

Split S into parts p with their own `Z_p, m_p, H_p, ESS_p`, and let `w_p = Z_p / sum_q Z_q`. Then

    m = sum_p w_p m_p,   H = sum_p w_p (H_p - log w_p),   1/ESS = sum_p w_p^2 / ESS_p,

so one `merge` joins blocks of rows, shards of a bank and ranks of a job, in any order and grouping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "NO_ROW",
    "UNDERFLOW",
    "Posterior",
    "Rest",
    "TailKind",
    "merge",
    "posterior_of",
    "replace_queries",
    "upload",
]

TailKind = Literal["measured", "bounded", "estimated"]
"""How a tail mass is known: from all weights; as an upper bound; or from a sample or a model."""

UNDERFLOW = -80.0
"""Log-weights are clamped at this: denormal numbers take a CPU far longer."""

NO_ROW = -1e30
"""The log-weight of a missing row: finite, so that 0 times it is 0."""

_KINDS: tuple[TailKind, ...] = ("measured", "bounded", "estimated")


@dataclass(frozen=True)
class Posterior:
    """How likely each row of a bank is the source of B noisy samples: from `Oracle.posterior`.

    Floating tensors are float64 (float32 on devices without it) for queries of any dtype, because
    `m - x_1` is later multiplied by numbers as large as `1/s_t^2`. Cast when you use them.

    Attributes:
        mean: Posterior mean `m`, (B, D), or (B, *) with the shape of a sample.
        log_evidence: `log Z`, (B,). Subtract `log N + D/2 log(2 pi s_t^2)` for a log-density.
        entropy: `H` in nats, (B,).
        ess: Effective sample size, from 1 to the number of rows, (B,).
        weights: The k largest `gamma_i`, descending, (B, k).
        rows: The rows of `weights`, as positions in `bank.rows`, (B, k), int64.
        tail_mass: Share of the posterior that is *not* in `mean`, (B,); 0 when exact.
        source_weight: `gamma` of the row the query was made from, (B,), or None if it is unknown.
        tail_kind: How the tail mass is known. If "bounded" or "estimated", the other statistics are
            those of the rows that were read.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> bank = LatentBank(torch.randn(100, 8))
        >>> post = Oracle(bank).posterior(0.99 * bank.rows[:4], 0.99, k=2)
        >>> post.rows[:, 0].tolist()  # near the data each is its own source
        [0, 1, 2, 3]
        >>> post.mean.shape, post.weights.shape
        (torch.Size([4, 8]), torch.Size([4, 2]))
    """

    mean: Tensor
    log_evidence: Tensor
    entropy: Tensor
    ess: Tensor
    weights: Tensor
    rows: Tensor
    tail_mass: Tensor
    source_weight: Tensor | None = None
    tail_kind: TailKind = "measured"

    @property
    def top1(self) -> Tensor:
        """The largest weight, `max_i gamma_i`, (B,)."""
        return self.weights[:, 0]

    @classmethod
    def empty(cls, xt: Tensor, k: int) -> Posterior:
        """The posterior of queries `xt` (B, D), float64, over no rows; `merge` ignores it."""
        zero = xt.new_zeros(len(xt))
        rows = torch.full((len(xt), k), -1, dtype=torch.int64, device=xt.device)
        statistics = (torch.full_like(zero, -torch.inf), zero, torch.ones_like(zero))
        return cls(torch.zeros_like(xt), *statistics, zero[:, None].expand(-1, k), rows, zero)

    @classmethod
    def cat(cls, parts: Sequence[Posterior], order: Sequence[int] | None = None) -> Posterior:
        """The posteriors of several batches of queries as one.

        `order` is the position of each query in the result, on the host; default as they come.
        """
        post = parts[0]
        if len(parts) > 1:
            joined: dict[str, Any] = {
                name: None if values[0] is None else torch.cat(values)
                for name in _TENSORS
                for values in [[getattr(part, name) for part in parts]]
            }
            post = cls(**joined, tail_kind=_weakest(parts))
        if order is None or list(order) == list(range(len(order))):
            return post
        back = sorted(range(len(order)), key=order.__getitem__)
        return post[upload(back, post.mean.device)]

    def __getitem__(self, index: Tensor | slice) -> Posterior:
        """The posterior of some of the queries."""
        picked: dict[str, Any] = {
            name: None if value is None else value[index]
            for name in _TENSORS
            for value in [getattr(self, name)]
        }
        return Posterior(**picked, tail_kind=self.tail_kind)


_TENSORS = tuple(field.name for field in fields(Posterior) if field.name != "tail_kind")


def _weakest(parts: Sequence[Posterior]) -> TailKind:
    return _KINDS[max(_KINDS.index(part.tail_kind) for part in parts)]


class Rest(NamedTuple):
    """Sums over the rows that are not listed, with `w_i = exp(l_i - peak)`; each (B,), float64.

    `total` is `sum_i w_i`, `squares` is `sum_i w_i^2`, `moment` is `sum_i w_i (l_i - peak)`.
    """

    peak: Tensor
    total: Tensor
    squares: Tensor
    moment: Tensor


def posterior_of(
    logits: Tensor, rows: Tensor, k: int, *, rest: Rest | None = None
) -> tuple[Posterior, Tensor]:
    """The posterior from log-weights, without its mean: the one softmax of this library.

    Args:
        logits: `l_i`, (B, n), float64; with a `rest` less its peak, and `NO_ROW` for missing rows.
        rows: The numbers of these rows, (B, n), int64; -1 for none.
        k: How many of the largest weights to return.
        rest: Sums over all other rows, default none.

    Returns:
        The posterior with an empty mean, (B, 0), and the weight of each row, (B, n), float64.
    """
    if rest is None:
        logits = logits.masked_fill(rows < 0, NO_ROW)
        peak = logits.amax(1)
        logits = logits - peak[:, None]
    else:
        peak = rest.peak
    weights = logits.exp()
    total, squares = weights.sum(1), weights.square().sum(1)
    moment = (weights * logits).sum(1)
    if rest is not None:
        total, squares = total + rest.total, squares + rest.squares
        moment = moment + rest.moment
    top, order = (weights / total[:, None]).topk(min(k, weights.shape[1]), dim=1)
    missing = (0, k - top.shape[1])
    post = Posterior(
        mean=top.new_empty(len(top), 0),
        log_evidence=peak + total.log(),
        entropy=total.log() - moment / total,
        ess=total.square() / squares,
        weights=pad(top, missing),
        rows=pad(rows.gather(1, order), missing, value=-1),
        tail_mass=torch.zeros_like(total),
    )
    return post, weights / total[:, None]


def replace_queries(post: Posterior, at: Sequence[int], other: Posterior, count: int) -> Posterior:
    """The posterior of `count` queries: `other` at the positions `at`, on the host, else `post`.

    `post` is that of all queries, or of all but those.
    """
    there = set(at)
    rest = [i for i in range(count) if i not in there]
    if len(post.mean) == count:
        post = post[upload(rest, post.mean.device)]
    return Posterior.cat([post, other], [*rest, *at])


def upload(at: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """Whole numbers, or a tensor, from the host to a device, without a device sync."""
    there = at if isinstance(at, Tensor) else torch.tensor(at, dtype=torch.int64)
    # A copy from memory that is not pinned waits for the device.
    there = there.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else there
    return there.to(device, non_blocking=True)


def merge(*parts: Posterior, k: int | None = None) -> Posterior:
    """Merges posteriors over disjoint sets of rows into the posterior over all of them.

    Args:
        parts: Posteriors of the same queries over the parts. `source_weight` is dropped: the source
            row lies in one part only, so ask for its weight after merging.
        k: How many of the largest weights to keep, at most as many as the parts hold together;
            default the largest number of a part.

    Returns:
        The posterior over all rows.

    Raises:
        ValueError: If no part is given.
    """
    if not parts:
        raise ValueError("Expected at least one posterior to merge, got none.")
    log_z = torch.stack([part.log_evidence for part in parts])
    # Not exp(log_z - logsumexp): log_z may be so large that the shares would not add up to 1.
    w = torch.softmax(log_z, dim=0)

    def average(values: list[Tensor]) -> Tensor:
        return torch.einsum("pb,pb...->b...", w, torch.stack(values))

    scaled = torch.cat([part.weights * w[p, :, None] for p, part in enumerate(parts)], dim=1)
    k = k or max(part.weights.shape[1] for part in parts)
    rows = torch.cat([part.rows for part in parts], dim=1)
    # Among weights of 0, missing rows come last.
    weights, order = scaled.masked_fill(rows < 0, -1).topk(min(k, scaled.shape[1]), dim=1)
    return Posterior(
        mean=average([part.mean for part in parts]),
        log_evidence=torch.logsumexp(log_z, dim=0),
        # xlogy: a part of weight 0 has w log w = 0.
        entropy=average([part.entropy for part in parts]) - torch.special.xlogy(w, w).sum(0),
        ess=1 / torch.stack([v**2 / part.ess for v, part in zip(w, parts, strict=True)]).sum(0),
        weights=weights.clamp_min(0),
        rows=rows.gather(1, order),
        tail_mass=average([part.tail_mass for part in parts]),
        tail_kind=_weakest(parts),
    )
