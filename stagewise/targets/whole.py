"""Targets from the posterior over all rows of the bank, or of a class."""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.base import Queries, blocks
from stagewise.engines.scan import Scan
from stagewise.lambdas import LambdaLike
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior
from stagewise.products import full_precision
from stagewise.targets.base import Pull, Query, Target

__all__ = ["LeaveOneOut", "Mix", "Tempered"]


class Mix(Target):
    """`u + lambda (u* - u)`: the oracle over the whole bank, or class. Unbiased.

    With lambda 1 the target has no variance left given `x_t`. It has the same, memorising, optimum
    as the conditional target: it is not a regulariser.
    """

    needs_all_rows = False
    smooths = True

    def pull(self, query: Query) -> Pull:
        """See `Target`; formula (2), or m - x_1 for an x_1 drawn from a smoothed set."""
        # The second largest weight too: the largest may be that of the row x_1 stands for.
        post = query.oracle.posterior(query.xt, query.t, query.names, source=query.stored, k=2)
        if query.oracle.smoothing is not None:
            return Pull(post.mean.flatten(1) - query.x1, post.top1, post.tail_mass)
        return _with_x1(query, post, query.path)


class Tempered(Target):
    """The oracle with weights `gamma^(1/T)`, that is, with a kernel wider by `sqrt(T)`.

    **Biased on purpose**, towards the mean of neighbouring rows: a regulariser against memorisation
    (the temperature of its optimum's weights), where plain mixing has the memorising optimum.

    Args:
        temperature: T, above 0; 1 is `Mix`.
        lam: See `Target`.

    Raises:
        ValueError: If `temperature` is not above 0.
    """

    needs_all_rows = False

    def __init__(self, temperature: float, lam: LambdaLike = 1.0) -> None:
        super().__init__(lam)
        if not temperature > 0:
            raise ValueError(f"Expected `temperature` above 0, got {temperature}.")
        self.temperature = temperature

    def pull(self, query: Query) -> Pull:
        """See `Target`; formula (2) with the wider kernel."""
        oracle, path = query.oracle, query.path
        # exp(l / T) is exp(l) at a noise level sqrt(T) times as high.
        path = path._replace(sigma=path.sigma * self.temperature**0.5)
        # Not by way of a certificate, which is about queries made at this noise level.
        post = oracle.engine.ask(oracle.bank, query.flat, path, query.names, None, 2)
        return _with_x1(query, post, path)


class LeaveOneOut(Target):
    """The oracle over all rows but the source.

    **Biased on purpose**: a regulariser against memorisation, since no row is ever the target of
    its own noisy samples. Where the posterior has collapsed the target is another row, so that with
    a lambda of 1 at all t a model learns to move away from the data: use it with "boundary" or
    `Concentration()`. Exact copies of the source stay. A class of one row has no others: there the
    target is the conditional one.

    All products are in float64, because the others are all there is.
    """

    def pull(self, query: Query) -> Pull:
        """See `Target`."""
        bank = query.oracle.bank
        with full_precision():
            parts = [_without_source(bank, part) for part in blocks(query.queries)]
        mean, top1 = (torch.cat(column) for column in zip(*parts, strict=True))
        alone = query.others == 0
        difference = (mean - query.x1).masked_fill(alone[:, None], 0)
        return Pull(difference, top1.masked_fill(alone, 1), torch.zeros_like(top1))


def _without_source(bank: LatentBank, queries: Queries) -> tuple[Tensor, Tensor]:
    """The posterior mean over the rows but the source, (B, D), and the largest weight, (B,)."""
    scan = Scan.of(bank, queries, torch.float64)
    assert queries.source is not None
    columns = torch.arange(scan.logits.shape[1], device=queries.xt.device)
    rows = scan.rows(columns.expand(len(queries), -1))
    dropped = (rows == queries.source[:, None]) | (rows < 0)
    # Finite, so that a query without other rows gets numbers.
    weights = scan.logits.masked_fill(dropped, -1e30).softmax(1)
    return scan.product(weights), weights.amax(1)


def _with_x1(query: Query, post: Posterior, path: PathCoefficients) -> Pull:
    """Formula (2): puts x_1 in the place of its row, or adds it."""
    there = query.source >= 0
    row = torch.where(there[:, None], query.rows, query.x1)
    gamma = torch.exp(query.log_weight(row, path) - post.log_evidence).clamp_max(1)
    gamma = torch.where(there, gamma, 0.0)
    own = torch.exp(query.log_weight(query.x1, path) - post.log_evidence)
    total = (1 - gamma + own).clamp_min(torch.finfo(own.dtype).tiny)
    gap = post.mean.flatten(1) - query.x1 - gamma[:, None] * (row - query.x1)
    others = post.weights.masked_fill(post.rows == query.source[:, None], 0).amax(1)
    top1 = torch.where(own.isinf(), 1.0, torch.maximum(others, own) / total)
    return Pull(gap / total[:, None], top1, post.tail_mass)
