r"""What a model is trained on: the conditional target, pulled towards the oracle's.

For a target `y = c_t x_1 + b_t x_t` and a set of rows with posterior mean m,

    target = y + lambda c_t (m - x_1).

The source is always in the set *as it is*: with `l_i = -||x_t - a x^(i)||^2 / 2 s^2`, `e = exp(l)`,

    m - x_1 = sum_{i in others} e_i (x^(i) - x_1) / (e_{x_1} + sum_{i in others} e_i),           (1)

where the others are the rows of the set without the row that x_1 stands for. From a posterior over
a set that holds that row as `x^(s)` (evidence Z, mean m', `gamma = e_s / Z`; 0 if it is not there)

    m - x_1 = [m' - x_1 - gamma (x^(s) - x_1)] / (1 - gamma + e_{x_1} / Z).                      (2)

If x_1 is the stored row this is `m' - x_1`, to the last bit. If it is a resampled twin of it, x_1
takes the twin's place. If it is no row at all, it is added to the set.

**What is unbiased** (the optimum of the regression stays the oracle): `Mix` and `ReferenceSet`, the
latter because given the set and `x_t` each of its members is the source with its own weight
(Bertrand et al., arXiv 2506.03719, Prop. 2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from torch import Tensor

from stagewise.engines import Sharded
from stagewise.engines.base import Queries
from stagewise.lambdas import Constant, Lambda, LambdaLike
from stagewise.oracle import Oracle
from stagewise.paths import PathCoefficients

__all__ = ["Pull", "Query", "Target", "mix_target"]


@dataclass(frozen=True)
class Query:
    """B noisy samples, what they were made from, and the rows they look at.

    Attributes:
        oracle: Bank and path.
        xt: Noisy samples, (B, *), as they were made.
        t: Times, (B,), float64.
        x1: What they were made from, (B, D), float64.
        path: Coefficients at the B times, float64, sigma above 0.
        names: The class of each query, None for the whole bank; or None.
        source: The row, among those a query looks at, that x_1 stands for; -1 for none. (B,).
        stored: The row that x_1 equals; -1 for none. (B,).
        draws: Of random rows.
    """

    oracle: Oracle
    xt: Tensor
    t: Tensor
    x1: Tensor
    path: PathCoefficients
    names: Sequence[int | None] | None
    source: Tensor
    stored: Tensor
    draws: Random

    @cached_property
    def flat(self) -> Tensor:
        """`xt` as (B, D), float64."""
        return self.xt.flatten(1).double()

    @cached_property
    def queries(self) -> Queries:
        """What an engine is asked; the source is given so that it can be left out."""
        bank, names = self.oracle.bank, self.names or [None] * len(self.xt)
        segments = [bank.whole if name is None else bank.segment(name) for name in names]
        return Queries(self.flat, self.path, segments, self.source)

    @cached_property
    def others(self) -> Tensor:
        """How many rows a query looks at besides its source, (B,), int64."""
        return self.queries.index(self.queries.sizes) - (self.source >= 0).long()

    @cached_property
    def rows(self) -> Tensor:
        """The sample of each `source`, (B, D), float64; any where that is -1."""
        if isinstance(self.oracle.engine, Sharded):
            return self.x1  # the row may lie on another rank
        return self.oracle.bank.take(self.source.clamp_min(0), device=self.xt.device)

    def log_weight(self, x: Tensor, path: PathCoefficients) -> Tensor:
        """`l` of one sample for each query, x (B, D): (B,)."""
        gap = self.flat - path.alpha[:, None] * x
        return -gap.square().sum(1) / (2 * path.sigma**2)


@dataclass(frozen=True)
class Pull:
    """Where a target pulls.

    Attributes:
        difference: `m - x_1`, (B, D), float64.
        top1: Largest weight in the set, (B,), float64.
        tail_mass: Share of the posterior that did not enter, (B,), float64.
    """

    difference: Tensor
    top1: Tensor
    tail_mass: Tensor


class Target(ABC):
    """What pulls, and how much: a set of rows and a lambda.

    Args:
        lam: A number in [0, 1]; "boundary" (1 in navigation, 0 in refinement); `Smooth(width)`;
            `Concentration()`. Default 1.
    """

    needs_all_rows = True
    """Whether it reads rows itself, and not only through the engine."""

    def __init__(self, lam: LambdaLike = 1.0) -> None:
        self.lam = Lambda.of(lam)

    @abstractmethod
    def pull(self, query: Query) -> Pull:
        """The posterior mean of x_1 over the target's rows, less x_1."""

    smooths = False
    """Whether it works with the oracle of a smoothed set."""

    def check(self, oracle: Oracle) -> None:
        """Refuses an oracle that the target cannot work with.

        Raises:
            ValueError: With the cure.
        """
        if oracle.smoothing is not None and not self.smooths:
            raise ValueError(
                f"{self!r} reads rows, and does not know the Gaussians that {oracle.smoothing!r} "
                "puts around them. Use Mix, or the plain Oracle(bank, path)."
            )
        if self.needs_all_rows and isinstance(oracle.engine, Sharded):
            raise ValueError(
                f"{self!r} needs the rows of the whole bank, of which a rank of Sharded() has only "
                "its part. Use Mix, or give each rank the same memory-mapped bank: "
                "LatentBank.open(path)."
            )

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"


def mix_target(y: Tensor, correction: Tensor, lam: Tensor | float) -> Tensor:
    """`y + lambda * correction`: between the conditional target and the oracle's.

    Args:
        y: Conditional target, (B, *).
        correction: `c_t (m - x_1)`, (B, *): `Oracle.correction`.
        lam: In [0, 1]: a number, or one for each sample, (B,). Tensors are not checked, which on an
            accelerator would wait for the device.

    Returns:
        (B, *), in the dtype of `y`.

    Raises:
        ValueError: If `lam` is a number outside of [0, 1].
    """
    if not isinstance(lam, Tensor):
        lam = Constant(lam).value
    elif lam.ndim:
        lam = lam.reshape(-1, *(1 for _ in range(y.ndim - 1)))
    return y + (lam * correction).to(y.dtype)
