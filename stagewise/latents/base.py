"""`Latents`: what all formats have in common once they are open.

A data set of `(x_1, label, index)`, scaled as the project that wrote the files scales them for
training. Three things are the reader's choice, not the file's:

* **flips**: some formats store each row a second time, of the mirrored picture. "none" leaves them
  out, "random" takes one of the two at each access, "both" appends them: row i + N is the flip of
  row i.
* **moments**: some formats store a mean and a standard deviation, of which training draws a sample
  at each access, `x_1 = scale(mean + std * eps)`. "mean" gives `scale(mean)`.
* The coin and `eps` come from a generator of their own, seeded by (seed, epoch, index), so that
  neither workers nor the order of access change them; `set_epoch` moves on to new draws.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stagewise.bank import LatentBank
from stagewise.latents.checking import require_labels, require_scale, unreadable
from stagewise.latents.files import Problem, names
from stagewise.latents.scaling import Affine, Scaling
from stagewise.latents.statistics import ChannelStatistics
from stagewise.narrowing import HALF

__all__ = ["Latents", "Reading"]

Flips: TypeAlias = 'Literal["none", "random", "both"]'
Moments: TypeAlias = 'Literal["sample", "mean"]'


@dataclass(frozen=True)
class Reading:
    """How to read; see `open_latents`."""

    flips: Flips = "none"
    moments: Moments = "sample"
    seed: int = 0
    num_classes: int | None = None
    skip: bool = False
    multiplier: float | None = None
    normalize: bool = True
    expected_std: float | None = None


class Latents(Dataset[tuple[Tensor, int, int]]):
    """Latents in files. Use `open_latents`, which finds the format.

    Attributes:
        path: The folder or file.
        name: Name of the format.
        shape: Shape of a sample.
        dtype: Type of the stored numbers; samples are float32.
        scaling: From stored numbers to samples.
        moments: "std" or "logvar" if the second half of the stored channels is that; else None.
        has_flips: Whether flipped rows are stored.
        skipped: Files that were left out, with the reason.
        usual_std: Standard deviation that samples of this format have.
    """

    name = ""
    moments: Literal["std", "logvar"] | None = None
    has_flips = False
    usual_std = 1.0
    scale_range = 2.0

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    scaling: Scaling

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.skipped: list[str] = []
        # Shared memory: a worker that lives on sees the epoch that the main process sets.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._handles: dict[Any, Any] = {}
        self._process = os.getpid()
        self._labels: Tensor | None = None

    # What a format has to say.

    def _count(self) -> int:
        """N, the stored rows, flips not counted."""
        raise NotImplementedError

    def _read(self, row: int, flip: bool) -> Tensor:
        """A row as it is stored; it may be a view of a file."""
        raise NotImplementedError

    def _read_block(self, start: int, stop: int, flip: bool) -> Tensor:
        """Rows as they are stored, (n, *)."""
        return torch.stack([self._read(row, flip) for row in range(start, stop)])

    def _read_labels(self) -> Tensor | None:
        """All labels, (N,), int64, or None if there are none."""
        raise NotImplementedError

    def _label(self, row: int) -> int:
        labels = self._stored_labels()
        return -1 if labels is None else int(labels[row])

    def _parts(self) -> str:
        """How many files there are, for `describe`."""
        raise NotImplementedError

    def _cure(self, large: bool) -> str:
        """What to switch if the samples are too large, or too small."""
        return ""

    # What follows.

    def _stored_labels(self) -> Tensor | None:
        if self._labels is None:
            found = self._read_labels()
            self._labels = None if found is None else self._checked_labels(found)
        return self._labels

    def __len__(self) -> int:
        return self._count() * (2 if self.reading.flips == "both" else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """`(x_1, label, index)`: (*shape) float32, and -1 for a label where there are none."""
        x1, label, _ = self.placed(index)
        return x1, label, int(index) % len(self)

    def placed(self, index: int) -> tuple[Tensor, int, int]:
        """`(x_1, label, place)`: where `fixed()` has what this item is, or is a draw of."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        index = int(index) % len(self)
        row, flip = self._locate(index)
        x1 = self._sample(self._read(row, flip)[None], [index])[0]
        return x1, self._label(row), row + flip * self._count()

    @property
    def labels(self) -> Tensor | None:
        """The class of each item, (len,), int64, checked; None without labels."""
        labels = self._stored_labels()
        return labels.repeat(2) if labels is not None and self.reading.flips == "both" else labels

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the draws of an epoch, in workers that live on too."""
        self._epoch[0] = epoch

    def rows(self, start: int, stop: int) -> Tensor:
        """Items `start` to `stop` in bulk: their x_1 as single access gives them.

        Args:
            start: The first, from 0.
            stop: One after the last; at most `len`.

        Returns:
            (stop - start, *shape), float32.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Expected rows within 0 and {len(self)}, got {start} to {stop}.")
        if start == stop:
            return torch.empty(0, *self.shape)
        count = self._count()
        if self.reading.flips == "random":
            places = [self._locate(index) for index in range(start, stop)]
            z = torch.stack([self._read(*place) for place in places])
        else:
            ends = (start, min(stop, count)), (max(start, count), stop)
            z = torch.cat(
                [
                    self._read_block(first - flip * count, last - flip * count, bool(flip))
                    for flip, (first, last) in enumerate(ends)
                    if first < last
                ]
            )
        return self._sample(z, range(start, stop))

    def chunks(
        self, size: int = 1024, indices: Tensor | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """All items, block by block, as batches for `LatentBank.from_batches`.

        Args:
            size: Items in a block, default 1024.
            indices: Which items, in this order; default all.

        Yields:
            `(x_1, labels)`, (n, *shape) and (n,); without labels `(x_1,)`.
        """
        labels = self.labels
        total = len(self) if indices is None else len(indices)
        for start in range(0, total, size):
            stop = min(start + size, total)
            which = slice(start, stop) if indices is None else indices[start:stop]
            x1 = (
                self.rows(start, stop)
                if isinstance(which, slice)
                else torch.stack([self[int(index)][0] for index in which])
            )
            yield (x1,) if labels is None else (x1, labels[which])

    def fixed(self) -> Latents:
        """The same latents without chance: means for samples, both flips for a random one."""
        flips: Flips = "both" if self.reading.flips == "random" else self.reading.flips
        return self.with_options(moments="mean", flips=flips)

    def with_options(
        self, *, moments: Moments | None = None, flips: Flips | None = None
    ) -> Latents:
        """The same files, read in another way; what is None stays."""
        other = copy.copy(self)
        other.reading = replace(
            self.reading,
            moments=moments or self.reading.moments,
            flips=flips or self.reading.flips,
        )
        other._prepare()
        return other

    def bank(
        self,
        *,
        dtype: torch.dtype | None = None,
        class_wise: bool = True,
        indices: Tensor | None = None,
        path: str | os.PathLike[str] | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> LatentBank:
        """The bank of these latents: means where moments are stored, both flips if flips are read.

        Args:
            dtype: Storage of the bank, default float32.
            class_wise: Whether to keep the labels, default True.
            indices: Which items, default all.
            path: A file for the bank, for latents beyond the memory; default in memory.
            advance: Called with the number of rows read so far.

        Returns:
            The bank.

        Raises:
            MemoryError: If it would not fit into memory.
            ValueError: If the samples are not scaled as the format's are (`check_scale`), or are
                not finite.
        """
        fixed = self.fixed()
        fixed.check_scale()
        total = len(fixed) if indices is None else len(indices)
        size = max(1, min(1024, 2**24 // math.prod(self.shape)))
        batches = fixed.chunks(size, indices)
        labels = fixed.labels if class_wise else None
        # Of all items whatever the indices, so that shards of them are rounded alike.
        offset = fixed.middle() if dtype in HALF else None
        how: dict[str, Any] = {"dtype": dtype, "offset": offset, "advance": advance}
        if path is None:
            return LatentBank.from_batches(batches, total, class_wise=class_wise, **how)
        if labels is not None and indices is not None:
            labels = labels[indices]
        return LatentBank.write(path, batches, total, labels=labels, **how)

    def middle(self, max_rows: int = 256) -> Tensor:
        """The mean of evenly spaced samples, without draws, (*shape), float64."""
        total, count = torch.zeros(self.shape, dtype=torch.float64), 0
        for x1 in self._few(max_rows):
            total, count = total + x1, count + 1
        return total / count

    def statistics(self, max_rows: int = 256) -> ChannelStatistics:
        """Moments by channel of evenly spaced samples, without draws."""
        seen = ChannelStatistics()
        for x1 in self._few(max_rows):
            seen.update(x1[None])
        return seen

    def _few(self, max_rows: int) -> Iterator[Tensor]:
        """Evenly spaced samples, without draws, one by one."""
        fixed = self.fixed()
        for index in range(0, len(fixed), math.ceil(len(fixed) / max_rows)):
            yield fixed[index][0]

    def check_scale(self, max_rows: int = 256) -> None:
        """Looks at some rows, and refuses samples that are not scaled or scaled twice.

        Raises:
            ValueError: If their root mean square is far from that of the format; what to switch.
        """
        require_scale(self, max_rows)

    def verify(self, full: bool = False) -> None:
        """Checks more than opening did.

        Args:
            full: Whether to read all rows and labels; default a few rows, for their scale.

        Raises:
            ValueError: With all that is wrong; files that were left out at opening included.
        """
        wrong = list(self.skipped) + (self._read_all() if full else [])
        if wrong:
            many = "s" * (len(wrong) > 1)
            raise ValueError(f"{len(wrong)} problem{many} in {self.path}: {names(wrong, most=10)}")
        self.check_scale()

    def _read_all(self) -> list[str]:
        """What is wrong with rows and labels, from reading them all."""
        return unreadable(self)

    def describe(self) -> str:
        """What was recognised, in one line."""
        classes = ""
        if self._labels is not None and len(self._labels):
            classes = f", labels 0 to {int(self._labels.max())}"
        reading = [f"{self._count()} rows of {self.shape} {str(self.dtype).removeprefix('torch.')}"]
        reading[0] += f" in {self._parts()}{classes}"
        if self.has_flips:
            reading.append(f"flips: {self.reading.flips}")
        if self.moments:
            reading.append(f"mean and {self.moments}: {self.reading.moments}")
        reading.append(f"x_1 = {self.scaling}")
        if self.skipped:
            reading.append(f"{len(self.skipped)} left out: {names(self.skipped, 2)}")
        return f"{self.name} latents in {self.path}: " + "; ".join(reading)

    def __repr__(self) -> str:
        return f"<{self.describe()}>"

    def _locate(self, index: int) -> tuple[int, bool]:
        """Row and whether it is the flipped one."""
        if self.reading.flips == "random":
            return index, bool(self._generator(index, 1).integers(2))
        count = self._count()
        return index % count, index >= count

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        seeds = (self.reading.seed, int(self._epoch[0]), index, stream)
        return np.random.default_rng(seeds)

    def _sample(self, z: Tensor, indices: Any) -> Tensor:
        """Samples of stored rows (n, *)."""
        if self.moments is None:
            return self.scaling(z)
        mean, spread = z.float().chunk(2, dim=1)
        if self.reading.moments == "mean":
            return self.scaling(mean)
        std = (0.5 * spread.clamp(-30, 20)).exp() if self.moments == "logvar" else spread
        noise = [
            torch.from_numpy(
                self._generator(index, 0).standard_normal(mean.shape[1:], dtype=np.float32)
            )
            for index in indices
        ]
        return self.scaling(mean + std * torch.stack(noise))

    def _prepare(self) -> None:
        """Refuses a way of reading that these files do not have; the last step of opening."""
        if self.reading.flips != "none" and not self.has_flips:
            raise ValueError(
                f"{self.path} holds no flipped latents, as {self.name} files there do not. Open "
                'them with flips="none".'
            )
        if not self._count():
            raise Problem(f"{self.path} holds no rows.")
        if not math.prod(self.shape):
            raise Problem(
                f"Expected samples with numbers in {self.path}, got shape {self.shape}. Encode "
                "them again."
            )
        channels = len(self.scaling.gain) if isinstance(self.scaling, Affine) else 1
        if channels > 1 and self.shape[0] != channels:
            raise ValueError(
                f"Expected samples with {channels} channels for {self.name}, got {self.shape} in "
                f"{self.path}. Is it another format?"
            )

    def _checked_labels(self, labels: Tensor) -> Tensor:
        require_labels(labels, self.reading.num_classes, self.path)
        return labels

    def _leave_out(self, file: object, error: Exception) -> None:
        """Names a file that cannot be used, or raises."""
        if not self.reading.skip:
            raise ValueError(f'{error} To leave it out: on_error="skip".') from error
        self.skipped.append(f"{file}: {error}")

    def _handle(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is open in this process, under a key; made when it is first asked for."""
        if self._process != os.getpid():
            self._handles, self._process = {}, os.getpid()
        if key not in self._handles:
            self._handles[key] = make()
        return self._handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}
