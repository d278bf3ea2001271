"""Which rows of a data set a loader draws: the bank of a run holds exactly these.

For the shuffling samplers of torch the rows are known. Any other sampler is copied, and the copy
runs for two epochs: training uses the rows that both epochs draw. If the second epoch repeats the
first in order, a limit on the batches of an epoch leaves out the same rows each time.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

__all__ = ["CURE", "Drawn", "drawn_rows"]

CURE = (
    "Give the bank yourself: PosteriorMonitor(LatentBank(x, labels)), or "
    "LatentBank.from_batches(loader, num_rows)."
)

_UNWEIGHTED = "The bank holds each sample once, so its posterior is that of unweighted training."

_LONGEST = 4
"""A sampler without an end is stopped after this many times the length of the data set."""


class Drawn(NamedTuple):
    """What a loader draws.

    Attributes:
        rows: Positions in the data set, each once, ascending (those of a `SubsetRandomSampler` as
            it lists them); all positions if the loader cannot be analysed.
        batches: In an epoch.
        per_batch: Samples in a batch of all ranks.
        warnings: Where a bank of these rows differs from what is trained on.
        looked: Draws that were analysed, 0 for a sampler with an end.
    """

    rows: Sequence[int]
    batches: float
    per_batch: float
    warnings: Sequence[str] = ()
    looked: int = 0

    @property
    def cut(self) -> bool:
        """Whether an epoch ends before all rows have come up."""
        return self.batches < len(self.rows) // self.per_batch

    def few(self, epochs: float, batches: float) -> str:
        """A warning if so many epochs or batches draw fewer samples than there are rows."""
        draws = self.per_batch * min(epochs * self.batches, batches)
        if draws >= len(self.rows):
            return ""
        return (
            f"The training loader draws {draws:.0f} samples in the whole training, and the bank "
            f"holds the {len(self.rows)} that may come up. The boundary is that of training on all "
            "of them. Train for longer, or on fewer: torch.utils.data.Subset(dataset, indices)."
        )


def drawn_rows(
    loader: DataLoader[Any],
    *,
    limit: float = math.inf,
    world_size: int = 1,
    epoch: int = 0,
    kept: Sequence[Any] = (),
) -> Drawn:
    """The rows of its data set that a loader draws, on any rank and in any epoch.

    Call it within `undisturbed`, because a copy of the sampler draws. Refuses a loader that draws
    nothing, or something other than positions.

    Args:
        loader: A loader over a data set with a length. It is not advanced.
        limit: Batches after which training cuts an epoch, default none.
        world_size: Processes that train.
        epoch: The current one, for samplers with `set_epoch`.
        kept: Objects that a copy of the sampler shares: trainer, module.
    """
    drawn = _known(loader, limit, world_size)
    drawn = drawn or _analysed(loader, limit, world_size, epoch, kept)
    if not drawn.rows:
        raise ValueError(f"Expected a loader that draws samples, got one that draws none. {CURE}")
    return drawn


def _known(loader: DataLoader[Any], limit: float, world_size: int) -> Drawn | None:
    """What the shuffling samplers of torch draw."""
    whole, size = loader.batch_sampler, len(loader.dataset)  # type: ignore[arg-type]
    if type(whole) is not BatchSampler:
        return None
    sampler: Any = whole.sampler
    # With several processes Lightning wraps a sampler that it does not know.
    inner: Any = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    rows: Sequence[int]
    warnings = []
    if type(inner) is SubsetRandomSampler:
        rows = _positions(inner.indices, size)
    elif type(inner) is WeightedRandomSampler:
        weights = inner.weights[:size]
        rows = weights.nonzero()[:, 0].tolist()
        if (weights[rows] != weights.max()).any():
            warnings.append(f"its samples with weights. {_UNWEIGHTED}")
    elif type(inner) is RandomSampler:
        rows = range(min(size, len(inner.data_source)))
    elif type(inner) is DistributedSampler and inner.shuffle:
        rows = range(min(size, len(inner.dataset)))  # type: ignore[arg-type]
    else:
        return None
    batches = min(len(whole), limit)
    samples = min(batches * whole.batch_size, len(sampler)) * world_size
    return Drawn(rows, batches, samples / batches, warnings)


def _analysed(
    loader: DataLoader[Any], limit: float, world_size: int, epoch: int, kept: Sequence[Any]
) -> Drawn:
    """What copies of the batch sampler, one for each rank, draw in two epochs."""
    whole: Any = loader.batch_sampler
    size = len(loader.dataset)  # type: ignore[arg-type]
    plain = type(whole) is BatchSampler
    name = type(whole.sampler if plain else whole).__name__
    # A sampler that does not know its rank is copied once.
    ranked = world_size > 1 and any(hasattr(part, "rank") for part in _parts(whole))
    ranks: Sequence[int | None] = range(world_size) if ranked else [None]
    try:
        runs = [_two_epochs(loader, rank, epoch, _LONGEST * size, kept) for rank in ranks]
    except Exception as error:  # monitoring must not stop a run whose sampler works
        warning = (
            f"with {name}, a copy of which failed ({type(error).__name__}: {error}). "
            f"The bank holds all {size} samples. {CURE}"
        )
        return Drawn(range(size), limit, math.inf, [warning])
    first, second = (
        [[_positions(batch, size) for batch in run[epoch]] for run in runs] for epoch in (0, 1)
    )
    looked = sum(map(len, first[0]))
    looked = looked if looked >= _LONGEST * size else 0
    cut = [batches[: None if math.isinf(limit) else int(limit)] for batches in first]
    if first == second:
        first = second = cut
    times, others = (Counter(chain(*chain(*epoch))) for epoch in (first, second))
    rows: Sequence[int] = sorted(times)
    warnings = []
    if times.keys() != others.keys():
        rows = range(size)
        together = max(map(len, first[0]), default=0) * world_size
        # A shuffle leaves out samples that do not fill a batch, others in each epoch.
        if size - min(len(times), len(others)) >= together and len(times | others) < size:
            warnings.append(
                f"{len(times)} of {size} samples in one epoch and {len(others)} in the next, not "
                f"the same ones ({name}). The bank holds all {size}. If some are never trained on, "
                "leave them out: torch.utils.data.Subset(dataset, indices)."
            )
    # A plain sequence is the same on all ranks.
    elif len(ranks) < world_size and not (plain and name == SequentialSampler.__name__):
        if len(rows) < size:
            warnings.append(
                f"{len(rows)} of {size} samples on this process ({name}); what the others draw is "
                f"not known. The bank holds all {size}. {CURE}"
            )
        rows = range(size)
    if _is_uneven(list(times.values()), bool(looked), len(ranks)):
        warnings.append(
            f"some samples more often than others, up to {max(times.values())} times in "
            f"{f'{looked} draws' if looked else 'an epoch'} ({name}). {_UNWEIGHTED}"
        )
    batches = max(map(len, cut))
    samples = sum(len(batch) for batch in chain(*cut)) * world_size / len(ranks)
    return Drawn(rows, limit if looked else batches, samples / max(batches, 1), warnings, looked)


def _parts(whole: Any) -> list[Any]:
    """A batch sampler and what it draws from."""
    return [whole, getattr(whole, "sampler", None)]


def _two_epochs(
    loader: DataLoader[Any], rank: int | None, epoch: int, most: int, kept: Sequence[Any]
) -> list[Any]:
    """The batches of two epochs, each cut after `most` draws."""
    whole = copy.deepcopy(loader.batch_sampler, {id(one): one for one in (loader.dataset, *kept)})
    epochs = []
    for number in (epoch, epoch + 1):
        for part in _parts(whole):
            if rank is not None and hasattr(part, "rank"):
                part.rank = rank
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        batches: list[Any] = []
        drawn = 0
        for batch in whole:  # type: ignore[union-attr]
            batches.append(batch)
            drawn += len(batch)
            if drawn >= most:
                break
        epochs.append(batches)
    return epochs


def _positions(indices: Any, size: int) -> list[int]:
    """Indices as positions from 0."""
    try:
        found = [operator.index(index) for index in indices]
    except TypeError:
        raise ValueError(
            f"Expected a sampler of positions in the data set, got {indices[0]!r}. {CURE}"
        ) from None
    if found and not -size <= min(found) <= max(found) < size:
        raise ValueError(
            f"Expected a sampler of positions below {size}, the length of the data set, got "
            f"{max(found, key=abs)}. {CURE}"
        )
    return [index % size for index in found]


def _is_uneven(times: list[int], endless: bool, ranks: int) -> bool:
    """Whether samples are drawn with weights, judged by how often each was drawn."""
    if not times:
        return False
    if endless:
        # Uniform draws with replacement have a variance as large as their mean.
        mean = sum(times) / len(times)
        return sum((number - mean) ** 2 for number in times) / len(times) > 2 * mean
    # Each rank but one may repeat a sample, so that all ranks have the same number.
    return sum(times) - min(times) * len(times) >= ranks
