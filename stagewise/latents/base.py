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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stagewise.bank import LatentBank
from stagewise.bank.building import HALF
from stagewise.files import FilePath, Problem, joined
from stagewise.latents.arrays import require_labels
from stagewise.latents.rows_check import problems
from stagewise.latents.scaling import AS_STORED, Affine, ChannelStatistics, Scaling

__all__ = ["Latents", "Reading", "Writing"]

Flips: TypeAlias = 'Literal["none", "random", "both"]'
Moments: TypeAlias = 'Literal["sample", "mean"]'
Block: TypeAlias = "tuple[Tensor, Tensor, Tensor | None]"


@dataclass(frozen=True)
class Reading:
    """How to read; see `open_latents`."""

    flips: Flips
    moments: Moments
    seed: int
    num_classes: int | None
    skip: bool
    multiplier: float | None
    normalize: bool
    expected_std: float | None


@dataclass(frozen=True)
class Writing:
    """How to write: the type of stored numbers, and rows in a shard.

    With a seed `made`, files are as an autoencoder would give them, with raw scales by channel and
    posteriors with a spread; without, what is read is exactly what was written.
    """

    dtype: torch.dtype
    shard_size: int = 10_000
    made: int | None = None


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
    """

    # A format says what follows, and stands in `opening.FORMATS`.
    name: ClassVar[str]
    looks_like: ClassVar[str]  # what a path with such latents holds
    ambiguous: ClassVar[str] = ""  # what to say if `looks_like` does not tell the format
    is_file: ClassVar[bool | None] = False  # or a folder; None is either
    takes_multiplier: ClassVar[bool] = False
    # By autoencoder, `normalize` and `multiplier` that bring its rows to the scale of training.
    scales: ClassVar[Mapping[str, tuple[bool, float | None]]] = {}
    needs_labels: ClassVar[bool] = False
    moments: Literal["std", "logvar"] | None = None
    has_flips = False
    cures = ("", "")  # what to switch if samples are too large, and if they are too small
    usual_std = 1.0  # of samples
    scale_range = 2.0  # the factor by which theirs may differ from it
    shape: tuple[int, ...]
    dtype: torch.dtype
    scaling: Scaling = AS_STORED

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        if reading.multiplier is not None:
            self.scaling = Affine((float(reading.multiplier),))
        self.skipped: list[str] = []
        # Shared memory: a worker that lives on sees the epoch that the main process sets.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._handles: dict[Any, Any] = {}
        self._labels: Tensor | None = None

    @classmethod
    def finds(cls, path: Path) -> bool:
        """Whether a path holds latents of this format, as far as names tell."""
        raise NotImplementedError

    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        """Writes samples, `(x_1, its flip, labels or None)`, (n, *) twice and (n,)."""
        raise NotImplementedError

    def _count(self) -> int:
        """N, the stored rows, flips not counted."""
        raise NotImplementedError

    def _read(self, row: int, flip: bool) -> Tensor:
        """A row as it is stored; it may be a view of a file."""
        raise NotImplementedError

    def _read_block(self, start: int, stop: int, flip: bool) -> Tensor:
        """Rows as they are stored, (n, *)."""
        return torch.stack([self._read(row, flip) for row in range(start, stop)])

    def _parts(self) -> str:
        """How many files there are, for `describe`."""
        raise NotImplementedError

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

    def _label(self, row: int) -> int:
        return -1 if self._labels is None else int(self._labels[row])

    @property
    def labels(self) -> Tensor | None:
        """The class of each item, (len,), int64, checked; None without labels."""
        both = self._labels is not None and self.reading.flips == "both"
        return self._labels.repeat(2) if both else self._labels  # type: ignore[union-attr]

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the draws of an epoch, in workers that live on too."""
        self._epoch[0] = epoch

    def rows(self, start: int, stop: int) -> Tensor:
        """The x_1 of items `start` to before `stop`, in bulk: `(stop - start, *shape)`, float32."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Expected rows within 0 and {len(self)}, got {start} to {stop}.")
        if start == stop:
            return torch.empty(0, *self.shape)
        if self.reading.flips == "random":
            z = [self._read(*self._locate(index))[None] for index in range(start, stop)]
        else:
            count = self._count()
            ends = (start, min(stop, count)), (max(start, count), stop)
            z = [
                self._read_block(first - flip * count, last - flip * count, bool(flip))
                for flip, (first, last) in enumerate(ends)
                if first < last
            ]
        return self._sample(torch.cat(z), range(start, stop))

    def chunks(
        self, size: int = 1024, indices: Tensor | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """All items, or those of `indices`, in batches `(x_1, labels)`; without labels `(x_1,)`."""
        labels = self.labels
        total = len(self) if indices is None else len(indices)
        for start in range(0, total, size):
            stop = min(start + size, total)
            if indices is None:
                which, x1 = torch.arange(start, stop), self.rows(start, stop)
            else:
                which = indices[start:stop]
                x1 = torch.stack([self[int(index)][0] for index in which])
            yield (x1,) if labels is None else (x1, labels[which])

    def _locate(self, index: int) -> tuple[int, bool]:
        """Row and whether it is the flipped one."""
        if self.reading.flips == "random":
            return index, bool(self._generator(index, 1).integers(2))
        count = self._count()
        return index % count, index >= count

    def _generator(self, index: int, stream: int) -> np.random.Generator:
        seeds = (self.reading.seed, int(self._epoch[0]), index, stream)
        return np.random.default_rng(seeds)

    def _sample(self, z: Tensor, indices: Iterable[int]) -> Tensor:
        """Samples of stored rows (n, *)."""
        if self.moments is None:
            return self.scaling(z)
        mean, spread = z.float().chunk(2, dim=1)
        if self.reading.moments == "mean":
            return self.scaling(mean)
        std = (0.5 * spread.clamp(-30, 20)).exp() if self.moments == "logvar" else spread
        draws = (self._generator(index, 0) for index in indices)
        noise = [draw.standard_normal(mean.shape[1:], dtype=np.float32) for draw in draws]
        return self.scaling(mean + std * torch.from_numpy(np.stack(noise)))

    def fixed(self) -> Latents:
        """The same latents without chance: means for samples, both flips for a random one."""
        flips: Flips = "both" if self.reading.flips == "random" else self.reading.flips
        return self.with_options(moments="mean", flips=flips)

    def with_options(
        self, *, moments: Moments | None = None, flips: Flips | None = None
    ) -> Latents:
        """The same files, read in another way; what is None stays."""
        other, now = copy.copy(self), self.reading
        other.reading = replace(now, moments=moments or now.moments, flips=flips or now.flips)
        other._require_flips()
        return other

    def reopened(self, path: FilePath, flips: Flips) -> Latents:
        """Other latents of the same format, read in the same way but for `flips`."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"Expected latents in {path}: no such path.")
        return type(self)(path, replace(self.reading, flips=flips))

    def bank(
        self,
        *,
        dtype: torch.dtype | None = None,
        class_wise: bool = True,
        indices: Tensor | None = None,
        path: FilePath | None = None,
        copies: int = 1,
        advance: Callable[[int], object] | None = None,
    ) -> LatentBank:
        """The bank of these latents: means where moments are stored, both flips if flips are read.

        Args:
            dtype: Storage of the bank, default float32.
            class_wise: Whether to keep the labels, default True.
            indices: Which items, default all.
            path: A file for the bank, for latents beyond the memory; default in memory.
            copies: Processes on this host that build the same bank, for the check of memory.
            advance: Called with the number of rows read so far.

        Raises:
            MemoryError: If it would not fit into memory.
            ValueError: If samples are not finite, or not scaled as the format's (`check_scale`).
        """
        fixed = self.fixed()
        fixed.check_scale()
        total = len(fixed) if indices is None else len(indices)
        batches = fixed.chunks(max(1, min(1024, 2**24 // math.prod(self.shape))), indices)
        labels = fixed.labels if class_wise else None
        # Of all items whatever the indices, so that shards of them are rounded alike.
        few = list(fixed.some()) if dtype in HALF else []
        offset = sum(x1.double() for x1 in few) / len(few) if few else None
        how: dict[str, Any] = {"dtype": dtype, "offset": offset, "advance": advance}
        if path is None:
            how |= {"class_wise": class_wise, "copies": copies}
            return LatentBank.from_batches(batches, total, **how)
        if labels is not None and indices is not None:
            labels = labels[indices]
        return LatentBank.write(path, batches, total, labels=labels, **how)

    def statistics(self) -> ChannelStatistics:
        """Moments of evenly spaced samples, without draws."""
        seen = ChannelStatistics()
        for x1 in self.fixed().some():
            seen.update(x1[None])
        return seen

    def some(self) -> Iterator[Tensor]:
        """The x_1 of at most 256 evenly spaced items, one by one."""
        for index in range(0, len(self), math.ceil(len(self) / 256)):
            yield self[index][0]

    def check_scale(self) -> None:
        """Looks at some rows, and refuses samples that are not scaled or scaled twice."""
        expected = self.reading.expected_std or self.usual_std
        mean, std = self.statistics().overall()
        size, most = math.hypot(mean, std), self.scale_range
        # What is not finite is named by whoever reads all rows.
        if math.isfinite(size) and not expected / most < size < expected * most:
            raise ValueError(
                f"Expected latents of standard deviation about {expected:.3g}, got {std:.3g} (mean "
                f"{mean:.3g}) in {self.path}, read as {self.name}, {self.scaling}. "
                f"{self.cures[size < expected]}If this is what training uses: "
                f"expected_std={size:.3g}."
            )

    def verify(self, full: bool = False) -> None:
        """Looks at the scale of a few rows; with `full` reads all rows and labels.

        These are compared with their checksums, which shards of `write_latents`, `.npz`, `.pt` and
        zip files have, and what this library wrote has beside it; of files without a warning tells.

        Raises:
            ValueError: With all that is wrong; files that were left out at opening included.
        """
        wrong = list(self.skipped) + (problems(self) if full else [])
        if wrong:
            many = "s" * (len(wrong) > 1)
            raise ValueError(f"{len(wrong)} problem{many} in {self.path}: {joined(wrong, most=10)}")
        self.check_scale()

    def _compare(self) -> tuple[list[str], list[Path]]:
        """What does not match its checksum, and the files and folders that have none."""
        return [], [self.path]

    def _opened(self, labels: Tensor | None) -> None:
        """The last step of opening: refuses what cannot be read, and keeps the labels."""
        self._require_flips()
        if not self._count():
            raise Problem(f"{self.path} holds no rows.")
        if not math.prod(self.shape):
            raise Problem(f"Expected numbers in {self.path}, got shape {self.shape}. Encode again.")
        channels = self.scaling.channels
        if channels is not None and self.shape[0] != channels:
            raise ValueError(
                f"Expected samples with {channels} channels for {self.name}, got {self.shape} in "
                f"{self.path}. Is it another format?"
            )
        if labels is not None:
            require_labels(labels, self.reading.num_classes, self.path)
        self._labels = labels

    def _require_flips(self) -> None:
        if self.reading.flips != "none" and not self.has_flips:
            raise ValueError(
                f"{self.path} holds no flipped latents, as {self.name} files there do not. Open "
                'them with flips="none".'
            )

    def _leave_out(self, file: object, error: Exception | str) -> None:
        """Names a file that cannot be used, or raises."""
        if not self.reading.skip:
            raise ValueError(f'{error} To leave it out: on_error="skip".')
        self.skipped.append(f"{file}: {error}")

    def describe(self) -> str:
        """What was recognised, in one line."""
        stored = f"{self._count()} rows of {self.shape} {str(self.dtype).removeprefix('torch.')}"
        reading = [f"{stored} in {self._parts()}"]
        if self._labels is not None:
            reading[0] += f", labels 0 to {int(self._labels.max())}"
        if self.has_flips:
            reading.append(f"flips: {self.reading.flips}")
        if self.moments:
            reading.append(f"mean and {self.moments}: {self.reading.moments}")
        reading.append(f"x_1 = {self.scaling}")
        if self.skipped:
            reading.append(f"{len(self.skipped)} left out: {joined(self.skipped, 2)}")
        return f"{self.name} latents in {self.path}: " + "; ".join(reading)

    def __repr__(self) -> str:
        return f"<{self.describe()}>"

    def _handle(self, key: Any, make: Callable[[], Any]) -> Any:
        """A mapped file, under a key; mapped when it is first asked for, and again in a copy."""
        if key not in self._handles:
            self._handles[key] = make()
        return self._handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}
