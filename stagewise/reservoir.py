r"""A reservoir: a bank of the last training samples, for data without a fixed set of rows.

With M samples `x^(1..M)`, which include the batch of the step, the posterior mean is

    m = sum_j w_j x^(j),   w = softmax_j( -||x_t - a_t x^(j)||^2 / 2 s_t^2 ).

**Unbiased by exchangeability** (Bertrand et al., arXiv 2506.03719, Prop. 2): if draws are
independent and the choice of the M does not depend on their values, each of them could have been
the source of `x_t` with the same probability, so given `x_t` and the M it is the source with its
own weight. Over the steps the mean target is that of the oracle of the *stream*, for any M. The
source must be among them: without it the mean is biased. The draws of a finite set in epochs are
not independent: there the bias is of the order of 1/M.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.masks import MaskedLabels

__all__ = ["Reservoir"]


class Reservoir(LatentBank):
    """A bank of the last `size` samples of a stream, with the current batch.

    Call `add` with each batch before you ask for its targets. An `Oracle` over the reservoir is
    over these samples; equal samples count as often as they were drawn. Rows stay on the device of
    the batches. A checkpoint does not contain them.

    Args:
        size: M, at least the size of a batch; about 10 times as many for much less variance.

    Raises:
        ValueError: If `size` is below 2.

    Example:
        >>> import torch
        >>> from stagewise import Mix, Oracle, Reservoir, Scheme
        >>> reservoir = Reservoir(512)
        >>> scheme = Scheme(Oracle(reservoir), target=Mix())
        >>> for _ in range(3):
        ...     x1, x0, t = torch.randn(64, 16), torch.randn(64, 16), torch.rand(64)
        ...     reservoir.add(x1)
        ...     u, w = scheme(x1 - x0, xt=t[:, None] * x1 + (1 - t[:, None]) * x0, t=t, x1=x1)
        >>> len(reservoir), reservoir.origin
        (192, 'the 192 samples seen so far, of at most 512')
    """

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError(f"Expected `size` of at least 2, got {size}.")
        self.size, self.seen = size, 0
        self._labels: Tensor | None = None
        self._from_oldest = torch.empty(0, dtype=torch.int64)
        super(LatentBank, self).__init__(torch.empty(0, 0), torch.zeros(0), ())

    @property
    def full(self) -> bool:
        """Whether it holds `size` samples."""
        return len(self) == self.size

    @property
    @override
    def origin(self) -> str:
        if not self.full:
            return f"the {len(self)} samples seen so far, of at most {self.size}"
        return f"the last {len(self)} samples seen"

    def add(
        self, x1: Tensor, labels: Tensor | None = None, conditions: Tensor | None = None
    ) -> None:
        """Adds a batch; call it before you ask for its targets.

        Args:
            x1: Samples, (B, *), as they are trained on.
            labels: Their classes, (B,); for all batches or for none.
            conditions: What the model is given for each, (B, *), for a `ConditionedOracle`; for all
                batches or for none.

        Raises:
            ValueError: If the batch is larger than the reservoir, has another shape than those
                before, is a first batch of one sample, or has masks, NaN or Inf. The reservoir is
                then unchanged.
        """
        if isinstance(labels, MaskedLabels):
            raise ValueError(
                "A reservoir does not support masks, and these samples have them. Give the "
                "training set itself: LatentBank(x, labels, mask=mask)."
            )
        count = len(x1)
        if count > self.size:
            raise ValueError(
                f"Expected a reservoir of at least the {count} samples of a batch, got one of "
                f"{self.size}: Reservoir({10 * count}), or StageRun(reservoir={10 * count})."
            )
        before = _kind_of(self.shape, self._labels, self.conditions)
        given = _kind_of(tuple(x1.shape[1:]), labels, conditions)
        if self.seen and given != before:
            raise ValueError(f"Expected {before} as before, got {given}.")
        there = self._from_oldest[max(0, len(self) + count - self.size) :].to(x1.device)

        def joined(new: Tensor, kept: Tensor | None) -> Tensor:
            new = new.detach().to(x1.device)
            return torch.cat([new, kept.to(new)[there]]) if self.seen and kept is not None else new

        x = joined(x1.flatten(1), self.rows)
        labels = None if labels is None else joined(labels, self._labels)
        if conditions is not None:
            conditions = joined(conditions.reshape(count, -1), self.conditions)
        made = LatentBank(x.reshape(-1, *x1.shape[1:]), labels, conditions=conditions)
        at = torch.arange(len(x), device=x.device).roll(-count)
        if labels is not None and made.index is not None:
            at, labels = made.index.argsort()[at], labels[made.index]
        own = {"size": self.size, "seen": self.seen + count, "_labels": labels, "_from_oldest": at}
        # There is no other order of the rows than its own, and what was reported is still wrong.
        self.__dict__ = vars(made) | {"index": None, "_unknown": self._unknown} | own

    @override
    def __repr__(self) -> str:
        return f"Reservoir({self.size}, {self.origin})"


def _kind_of(shape: tuple[int, ...], labels: Tensor | None, conditions: Tensor | None) -> str:
    classes, given = ("without" if x is None else "with" for x in (labels, conditions))
    return f"samples of shape {shape} {classes} labels and {given} conditions"
