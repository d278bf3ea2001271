r"""A kernel on the condition: the oracle of a model that is given more than classes.

For a model that is given c (text, an observation) the right oracle is that of `p(x_1 | c)`. If
each c is unique, it is one row, and the plain target is right already; the mean over all rows would
change what such a model learns. A kernel lies between the two (as in PAFM, arXiv 2605.00825),

    log w_i = -||x_t - a_t x^(i)||^2 / 2 s_t^2 + log k(c, c_i),

the oracle of the joint distribution of rows and conditions, smoothed in c. It is biased on purpose:
the model learns the mean over data whose conditions are within about a bandwidth. With a bandwidth
near 0 it is the oracle of the rows with exactly this c, with a very large one that of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.batches import describe, others_in
from stagewise.conventions import STAGEWISE, ConventionLike
from stagewise.device_checks import require_all
from stagewise.engines import Engine
from stagewise.oracle import Labels, Oracle, Times
from stagewise.paths import Path
from stagewise.posterior import Posterior, merge, posterior_of
from stagewise.queries import Queries, require_tensors

__all__ = ["Condition", "ConditionedOracle", "Kernel"]

Kernel: TypeAlias = "Literal['gaussian', 'cosine'] | Callable[[Tensor, Tensor], Tensor]"
"""A name, or from conditions (B, C) and (n, C), both divided by the bandwidth, to log k, (B, n)."""

_NUMBERS = 2**24
"""Numbers of rows and log-weights held at a time."""

_LEAST = -1e300
"""The logarithm of a kernel that is 0: finite, so that among rows that are all far the nearest win.
"""


@dataclass(frozen=True)
class Condition:
    """A kernel on what a model is given beside x_t, t and a class, such as text.

    Args:
        kernel: "gaussian", `-|c - c_i|^2 / 2 h^2`; "cosine", `-(1 - cos(c, c_i)) / h^2`, for text
            embeddings; or a function (`Kernel`). Default "gaussian".
        bandwidth: h, above 0, in the units of c (cosine: 1 and more is wide).
        read_batch: From a batch to the conditions of its samples, (B, *), before any is dropped
            for classifier-free guidance. Default: the one tensor in it beside x_1 and the labels.

    Raises:
        ValueError: For another kernel, or a bandwidth that is not a number above 0.
    """

    kernel: Kernel = "gaussian"
    bandwidth: float = 0.0
    read_batch: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kernel not in ("gaussian", "cosine") and not callable(self.kernel):
            raise ValueError(
                f'Expected `kernel` "gaussian", "cosine" or a function, got {self.kernel!r}.'
            )
        if not (isinstance(self.bandwidth, float | int) and self.bandwidth > 0):
            raise ValueError(
                f"Expected a `bandwidth` above 0, got {self.bandwidth!r}. About the distance of "
                "conditions that should share a target: torch.cdist(c, c).kthvalue(2).values"
                ".median(), the median distance to the nearest other one, is a start."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = state.pop("find", None)  # its name in pickles of before
        self.__dict__.update(state, read_batch=state.get("read_batch", found))

    def log_kernel(self, c: Tensor, rows: Tensor) -> Tensor:
        """`log k(c, c_i)`, (B, n), of conditions (B, C) and (n, C), float64; finite."""
        if callable(self.kernel):
            found = self.kernel(c / self.bandwidth, rows / self.bandwidth)
            if found.shape != (len(c), len(rows)):
                raise ValueError(
                    f"Expected the kernel to return log k of shape {(len(c), len(rows))}, got "
                    f"{tuple(found.shape)}: one for each pair, as -torch.cdist(c, rows)."
                )
            message = "Expected the kernel to return log k, got NaN"
            require_all(~found.isnan(), message, lambda: ": where k is 0 give -inf.")
            return found.double().clamp_min(_LEAST)
        if self.kernel == "cosine":
            c, rows = normalize(c, dim=1), normalize(rows, dim=1)
        # From differences: equal conditions have a distance of exactly 0 for any bandwidth.
        gap = torch.cdist(c, rows, compute_mode="donot_use_mm_for_euclid_dist")
        return ((gap / self.bandwidth).square() / -2).clamp_min(_LEAST)

    def of(self, batch: Any, x1: Tensor, labels: Any) -> Tensor:
        """The conditions in a batch, (B, *), given its x_1 and labels.

        Raises:
            ValueError: If no tensor has one for each sample, or several have, with the cure.
        """
        if self.read_batch is not None:
            found: Any = self.read_batch(batch)
            if isinstance(found, Tensor) and found.ndim and len(found) == len(x1):
                return found
            listed, left = describe(found), []
        else:
            others = others_in(batch, x1, labels)
            if len(others) == 1:
                return others[0][1]
            left = [place for place, _ in others]
            listed = ", ".join(left) or "none"
        place = left[0] if left else 'batch["embedding"]'
        raise ValueError(
            f"Expected the condition of each of {len(x1)} samples in {describe(batch)}, found "
            f"{listed}. Say where it is: {repr(self)[:-1]}, read_batch=lambda batch: {place}), "
            "with a number in each place: text must be embedded by the data set, or in "
            "`read_batch`."
        )

    def __repr__(self) -> str:
        name = getattr(self.kernel, "__name__", repr(self.kernel))
        return f"Condition({name}, bandwidth={self.bandwidth:g})"


class ConditionedOracle(Oracle):
    """An `Oracle` that weighs rows by a kernel on the condition.

    `Mix`, `Scheme` and `StageCurve.measure` take it in place of an `Oracle`. Each query comes with
    its condition, or with its `source`, whose condition it then has. With `labels` the posterior is
    over the rows of the class, weighed by the kernel. It computes in float64.

    Args:
        bank: The rows with their conditions: `LatentBank(x, labels, conditions=c)`.
        path: The path of training.
        condition: The kernel.
        null_class: As in `Oracle`.
        convention: As in `Oracle`.

    Raises:
        ValueError: If the bank has no conditions.

    Example:
        >>> import torch
        >>> from stagewise import Condition, ConditionedOracle, LatentBank
        >>> x, c = torch.randn(200, 16), torch.randn(200, 3)
        >>> oracle = ConditionedOracle(LatentBank(x, conditions=c), None, Condition(bandwidth=0.5))
        >>> xt, t = torch.randn(8, 16), torch.rand(8)
        >>> oracle.posterior(xt, t, condition=torch.randn(8, 3)).mean.shape
        torch.Size([8, 16])
    """

    condition: Condition

    def __init__(
        self,
        bank: LatentBank,
        path: Path | None,
        condition: Condition,
        *,
        null_class: int | None = None,
        convention: ConventionLike = STAGEWISE,
    ) -> None:
        if not isinstance(condition, Condition):
            raise TypeError(
                f"Expected a Condition, got {type(condition).__name__}: "
                "ConditionedOracle(bank, path, Condition(bandwidth=...))."
            )
        if bank.conditions is None and not bank.origin:
            raise ValueError(
                f"{condition!r} needs a bank that holds the condition of each row, got {bank!r}: "
                "LatentBank(x, labels, conditions=c)."
            )
        self.condition = condition
        super().__init__(
            bank, path, _Weighed(condition), null_class=null_class, convention=convention
        )

    @override
    def queries(
        self,
        xt: Tensor,
        t: Times,
        labels: Labels | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Queries:
        queries, rows = super().queries(xt, t, labels, source), self.conditions
        if condition is None:
            message = (
                f"Expected `condition` of shape (B, {rows.shape[1]}) for {self.condition!r}: what "
                "the model is given for each sample, condition=c"
            )
            if queries.source is None:
                raise ValueError(f"{message}; or the `source` of each.")
            known = queries.source >= 0
            require_all(known, message, lambda: ". The `source` of some is not known.")
            condition = rows[queries.source.clamp_min(0).to(rows.device)]
        require_tensors(condition=condition)
        flat = self.bank.as_conditions(condition, len(queries))
        return replace(queries, condition=flat.to(queries.xt))

    @property
    def conditions(self) -> Tensor:
        """The conditions of the rows, (N, C)."""
        if self.bank.conditions is None:
            raise ValueError(
                f"{self.condition!r} needs the condition of each sample of {self.bank!r}: "
                "reservoir.add(x1, conditions=c)."
            )
        return self.bank.conditions

    @override
    def log_kernel(self, queries: Queries, rows: Tensor | None = None) -> Tensor:
        c, device = queries.condition, queries.xt.device
        assert c is not None
        other = c
        if rows is not None:
            at = rows.clamp_min(0).to(self.conditions.device)
            other = self.conditions[at].to(device, torch.float64)
        return self.condition.log_kernel(c, other).diagonal()

    def __repr__(self) -> str:
        return f"ConditionedOracle({self.bank!r}, {self.path!r}, {self.condition!r})"


class _Weighed(Engine):
    """The posterior over all rows, weighed by the kernel; chunk by chunk, in float64."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition

    @override
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        order, parts = [], []
        for at, segment in queries.groups:
            parts.append(self._over(bank, queries.select(at), segment, k))
            order += at
        return Posterior.cat(parts, order)

    def _over(self, bank: LatentBank, queries: Queries, segment: slice, k: int) -> Posterior:
        c, device, parts = queries.condition, queries.xt.device, []
        assert c is not None
        assert bank.conditions is not None
        size = max(1, _NUMBERS // (len(queries) + bank.dim + c.shape[1]))
        reached = torch.zeros(len(c), dtype=torch.bool, device=device)
        for first, rows in bank.chunks(segment, size, device, torch.float64):
            some = slice(first, first + len(rows))
            x = rows + bank.offset.to(device)
            kernel = self.condition.log_kernel(c, bank.conditions[some].to(c))
            reached |= (kernel > _LEAST).any(1)
            logits = queries.log_weights(x) + kernel
            numbers = torch.arange(some.start, some.stop, device=device).expand(len(c), -1)
            post, weights = posterior_of(logits, numbers, k)
            parts.append(replace(post, mean=weights @ x))
        if callable(self.condition.kernel):  # the others are above 0 everywhere
            require_all(
                reached,
                "Expected a kernel above 0 for some row",
                lambda: (
                    f", got -inf for all rows for {int((~reached).sum())} of {len(c)} conditions: "
                    "no row says anything about them. Widen the kernel."
                ),
            )
        return merge(*parts, k=k)

    @override
    def describe(self, bank: LatentBank) -> str:
        return f"all rows in float64, each weighed by {self.condition!r}"

    def __repr__(self) -> str:
        return f"rows weighed by {self.condition!r}"
