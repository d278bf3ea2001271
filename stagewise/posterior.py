r"""The posterior over bank rows given a noisy sample, and how partial posteriors merge.

For a set S of bank rows and a query `x_t`, with `l_i = -||x_t - a_t x^(i)||^2 / (2 s_t^2)`,

    Z = sum_{i in S} exp(l_i),   gamma_i = exp(l_i) / Z,   m = sum_i gamma_i x^(i),
    H = -sum_i gamma_i log gamma_i,   ESS = 1 / sum_i gamma_i^2.

Split S into parts p with their own `Z_p, m_p, H_p, ESS_p`, and let `w_p = Z_p / sum_q Z_q`. Then

    m = sum_p w_p m_p,   H = sum_p w_p (H_p - log w_p),   1/ESS = sum_p w_p^2 / ESS_p,

so chunks of a stream, shards of a bank and ranks of a job are all put together by one `merge`,
in any order and grouping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Posterior", "merge"]


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
    """

    mean: Tensor
    log_evidence: Tensor
    entropy: Tensor
    ess: Tensor
    weights: Tensor
    rows: Tensor
    tail_mass: Tensor
    source_weight: Tensor | None = None

    @property
    def top1(self) -> Tensor:
        """The largest weight, `max_i gamma_i`, (B,)."""
        return self.weights[:, 0]

    @classmethod
    def from_logits(cls, logits: Tensor, x: Tensor, k: int, first_row: int = 0) -> Posterior:
        """The posterior over a block of rows, from the rows and their `l_i`.

        Args:
            logits: `l_i`, (B, C), finite. Overwritten: at this size a pass over memory counts.
            x: The rows, (C, D), of the same dtype.
            k: How many of the largest weights to keep, at most C of them.
            first_row: Row number of `x[0]`, default 0.

        Returns:
            The posterior, with `mean` of shape (B, D).
        """
        top, rows = logits.topk(min(k, logits.shape[1]), dim=1) if k > 1 else logits.max(1, True)
        peak = top[:, :1]
        shifted = logits.sub_(peak)
        gamma = shifted.exp()
        z = gamma.sum(1)
        return cls(
            mean=gamma @ x / z[:, None],
            log_evidence=peak[:, 0] + z.log(),
            entropy=z.log() - torch.einsum("bc,bc->b", gamma, shifted) / z,
            ess=z**2 / torch.einsum("bc,bc->b", gamma, gamma),
            weights=(top - peak).exp() / z[:, None],
            rows=rows + first_row,
            tail_mass=torch.zeros_like(z),
        )


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
    weights, order = scaled.topk(min(k, scaled.shape[1]), dim=1)
    return Posterior(
        mean=average([part.mean for part in parts]),
        log_evidence=torch.logsumexp(log_z, dim=0),
        # xlogy: a part that carries nothing has w log w = 0.
        entropy=average([part.entropy for part in parts]) - torch.special.xlogy(w, w).sum(0),
        ess=1 / torch.stack([v**2 / part.ess for v, part in zip(w, parts, strict=True)]).sum(0),
        weights=weights,
        rows=torch.cat([part.rows for part in parts], dim=1).gather(1, order),
        tail_mass=average([part.tail_mass for part in parts]),
    )
