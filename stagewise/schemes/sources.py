"""`sources`: the rows that samples stand for, where a training library makes the targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from stagewise.queries import require_tensors

__all__ = ["sources", "told_sources"]

_told: ContextVar[Tensor | None] = ContextVar("stagewise.sources", default=None)


@contextmanager
def sources(rows: Tensor) -> Iterator[None]:
    """Says which row of the bank each sample stands for, to all schemes that are called within.

    For samples that are not equal to their rows (latents drawn from a mean and a standard
    deviation, noise on the data), where the call of a library has no place for it: a torchcfm
    matcher, a flow_matching path, a transport, an EDM loss, `diffusers_target`. A `source` given to
    a call of a scheme comes first.

    Args:
        rows: The row of each sample of the batch, (B,), integers, as in `Smoothing.draw`; in a
            scheme without smoothing negative for none.

    Raises:
        TypeError: If it is no tensor. A wrong shape or number is refused by the scheme.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Scheme, Smoothing, sources
        >>> x = torch.randn(60, 6)
        >>> smoothing = Smoothing(LatentBank(x), progress=False)
        >>> scheme = Scheme(smoothing=smoothing, strength=torch.ones_like)
        >>> noisy = x[:8] + 0.01 * torch.randn(8, 6)
        >>> with sources(torch.arange(8)):
        ...     smoothed = scheme.smooth(noisy, t=torch.rand(8))
    """
    require_tensors(rows=rows)
    before = _told.set(rows)
    try:
        yield
    finally:
        _told.reset(before)


def told_sources() -> Tensor | None:
    """The rows of the `sources` that surrounds the call; None outside of any."""
    return _told.get()
