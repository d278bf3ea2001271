"""Targets from the posterior over all rows of the bank, or of a class."""

from __future__ import annotations

import torch

from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior
from stagewise.targets.base import Pull, Query, Target

__all__ = ["Mix"]


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
