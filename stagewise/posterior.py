r"""The posterior over bank rows given a noisy sample, and how partial posteriors merge.

For a set S of bank rows and a query `x_t`, with `l_i = -||x_t - a_t x^(i)||^2 / (2 s_t^2)`,

    Z = sum_{i in S} exp(l_i),   gamma_i = exp(l_i) / Z,   m = sum_i gamma_i x^(i),
    H = -sum_i gamma_i log gamma_i,   ESS = 1 / sum_i gamma_i^2.

Split S into parts p with their own `Z_p, m_p, H_p, ESS_p`, and let `w_p = Z_p / sum_q Z_q`. Then

    m = sum_p w_p m_p,   H = sum_p w_p (H_p - log w_p),   1/ESS = sum_p w_p^2 / ESS_p,

so blocks of rows, shards of a bank and ranks of a job are all put together by one `merge`, in any
order and grouping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Posterior", "TailKind", "inverse", "merge", "put"]

TailKind = Literal["measured", "bounded", "estimated"]
"""How a tail mass is known: from all weights; as an upper bound; or from a sample or a model."""

_KINDS: tuple[TailKind, ...] = ("measured", "bounded", "estimated")


@dataclass(frozen=True)
class Posterior:
    """Posterior over bank rows for B queries.

    All floating tensors are float64 (float32 on devices without it), whatever the dtype of the
    query: `m - x_1` is later multiplied by numbers as large as `1/s_t^2`, so its digits matter.
    Cast when you use them.

    Attributes:
        mean: Posterior mean `m`, (B, D), or (B, *) with the shape of a sample.
        log_evidence: `log Z`, (B,). Subtract `log N + D/2 log(2 pi s_t^2)` for a log-density.
        entropy: `H` in nats, (B,).
        ess: Effective sample size, from 1 to the number of rows, (B,).
        weights: The k largest `gamma_i`, descending, (B, k).
        rows: The rows of `weights`, as positions in `bank.rows`, (B, k), int64.
        tail_mass: Share of the posterior that was *not* taken into `mean`, (B,); 0 when exact.
        source_weight: `gamma` of the row the query was made from, (B,), or None if it is unknown.
        tail_kind: How the tail mass is known. Where it is "bounded" or "estimated" the other
            statistics are those of the rows that were seen.
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
        """The posterior of no queries: `xt` is (0, D)."""
        none = xt.new_zeros(0)
        rows = torch.zeros(0, k, dtype=torch.int64, device=xt.device)
        return cls(xt, none, none, none, none[:, None].expand(0, k), rows, none)

    @classmethod
    def cat(cls, parts: Sequence[Posterior]) -> Posterior:
        """The posteriors of several batches of queries as one, in the order of the parts."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {
            name: None if values[0] is None else torch.cat(values)
            for name in _TENSORS
            for values in [[getattr(part, name) for part in parts]]
        }
        return cls(**joined, tail_kind=_weakest(parts))

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


def inverse(order: Sequence[int]) -> list[int]:
    """Where each of 0, 1, ... stands in `order`, which holds each of them once."""
    return sorted(range(len(order)), key=order.__getitem__)


def put(post: Posterior, at: Sequence[int], other: Posterior, count: int) -> Posterior:
    """The posterior of `count` queries of which `other` answers those at `at`.

    Args:
        post: Answers of all queries, of which those at `at` are dropped; or of all but those.
        at: Positions, on the host.
        other: Answers of those.
        count: How many queries there are.
    """
    there = set(at)
    rest = [i for i in range(count) if i not in there]
    device = post.mean.device
    if len(post.mean) == count:
        post = post[torch.tensor(rest, dtype=torch.int64, device=device)]
    order = [*rest, *at]
    back = torch.tensor(inverse(order), dtype=torch.int64, device=device)
    return Posterior.cat([post, other])[back]


def merge(*parts: Posterior, k: int | None = None) -> Posterior:
    """The posterior over the union of disjoint sets of rows.

    Args:
        parts: Posteriors of the same queries over the parts. All but `source_weight` are used:
            the source row lies in one part only, so ask for its weight after merging.
        k: How many of the largest weights to keep, at most as many as the parts hold together;
            default the largest number that a part holds.

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
    # Of weights that are 0 those of no row at all come last.
    weights, order = scaled.masked_fill(rows < 0, -1).topk(min(k, scaled.shape[1]), dim=1)
    return Posterior(
        mean=average([part.mean for part in parts]),
        log_evidence=torch.logsumexp(log_z, dim=0),
        # xlogy: a part that carries nothing has w log w = 0.
        entropy=average([part.entropy for part in parts]) - torch.special.xlogy(w, w).sum(0),
        ess=1 / torch.stack([v**2 / part.ess for v, part in zip(w, parts, strict=True)]).sum(0),
        weights=weights.clamp_min(0),
        rows=rows.gather(1, order),
        tail_mass=average([part.tail_mass for part in parts]),
        tail_kind=_weakest(parts),
    )
