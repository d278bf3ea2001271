"""`Latents`: what all formats have in common once they are open.

A data set of `(x_1, label, index)`, scaled as the project that wrote the files scales them for
training. The reader chooses

* **flips**: some formats store each row a second time, of the mirrored image. "none" leaves them
  out, "random" takes one of the two at each access, "both" appends them: row i + N is the flip of
  row i.
* **moments**: some formats store a mean and a standard deviation, from which training draws a
  sample at each access, `x_1 = scale(mean + std * eps)`. "mean" gives `scale(mean)`.

Random flips and `eps` are seeded by (seed, epoch, index), so they do not depend on workers or the
order of access; `set_epoch` moves on to new draws.
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
from stagewise.latents.checksums import Compared, problems
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
    """How to write."""

    dtype: torch.dtype  # of stored numbers
    shard_size: int = 10_000
    # A seed to write as from an autoencoder, with raw scales by channel and a posterior variance;
    # None: what is read is exactly what was written.
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

    # Set by each format, which is listed in `opening.FORMATS`.
    name: ClassVar[str]
    looks_like: ClassVar[str]  # what a path with such latents holds
    ambiguous: ClassVar[str] = ""  # the message if `looks_like` does not tell the format
    is_file: ClassVar[bool | None] = False  # or a folder; None: either
    takes_multiplier: ClassVar[bool] = False
    # For each autoencoder the `normalize` and `multiplier` that give the scale of training.
    scales: ClassVar[Mapping[str, tuple[bool, float | None]]] = {}
    needs_labels: ClassVar[bool] = False
    moments: Literal["std", "logvar"] | None = None
    has_flips = False
    cures = ("", "")  # what to change if samples are too large, and if they are too small
    usual_std = 1.0  # of samples
    scale_range = 2.0  # the factor by which their size may differ from it
    shape: tuple[int, ...]
    dtype: torch.dtype
    scaling: Scaling = AS_STORED

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        if reading.multiplier is not None:
            self.scaling = Affine((float(reading.multiplier),))
        self.skipped: list[str] = []
        # Shared memory: persistent workers see the epoch that the main process sets.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._handles: dict[Any, Any] = {}
        self._labels: Tensor | None = None

    @classmethod
    def finds(cls, path: Path) -> bool:
        """Whether a path holds latents of this format, by its names."""
        raise NotImplementedError

    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        """Writes blocks `(x_1, its flip, labels or None)`, (n, *) twice and (n,)."""
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
        """The number of files, for `describe`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count() * (2 if self.reading.flips == "both" else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """`(x_1, label, index)`: x_1 (*shape), float32; label -1 without labels."""
        x1, label, _ = self.placed(index)
        return x1, label, int(index) % len(self)

    def placed(self, index: int) -> tuple[Tensor, int, int]:
        """`(x_1, label, place)`: `place` is the index in `fixed()` of this item or its mean."""
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
        """Moves on to the draws of an epoch, also in persistent workers."""
        self._epoch[0] = epoch

    def rows(self, start: int, stop: int) -> Tensor:
        """The x_1 of items `start` to `stop` in bulk, `(stop - start, *shape)`, float32."""
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
        labels, every = self.labels, torch.arange(len(self)) if indices is None else indices
        for start in range(0, len(every), size):
            which = every[start : start + size]
            if indices is None:
                x1 = self.rows(start, start + len(which))
            else:
                x1 = torch.stack([self[int(index)][0] for index in which])
            yield (x1,) if labels is None else (x1, labels[which])

    def _locate(self, index: int) -> tuple[int, bool]:
        """The row, and whether its flip is meant."""
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
        """The same latents without randomness: means, and both flips in place of a random one."""
        flips: Flips = "both" if self.reading.flips == "random" else self.reading.flips
        return self.with_options(moments="mean", flips=flips)

    def with_options(
        self, *, moments: Moments | None = None, flips: Flips | None = None
    ) -> Latents:
        """The same files, read with other options; None keeps an option."""
        other, now = copy.copy(self), self.reading
        other.reading = replace(now, moments=moments or now.moments, flips=flips or now.flips)
        other._require_flips()
        return other

    def reopened(self, path: FilePath, flips: Flips) -> Latents:
        """Other latents of the same format, read with the same options except `flips`."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"Expected latents in {path}: no such path.")
        return type(self)(path, replace(self.reading, flips=flips))

    def bank(
        self,
        *,
        dtype: torch.dtype | None = None,
        indices: Tensor | None = None,
        path: FilePath | None = None,
        copies: int = 1,
        advance: Callable[[int], object] | None = None,
    ) -> LatentBank:
        """The bank of these latents: means if moments are stored, both flips if flips are read.

        Args:
            dtype: Storage of the bank, default float32.
            indices: Which items, default all.
            path: A file for the bank, for latents that exceed the memory; default in memory.
            copies: Processes on this host that build the same bank, for the check of memory.
            advance: Called with the number of rows read so far.

        Raises:
            MemoryError: If it would not fit into memory.
            ValueError: If samples are not finite, or at another scale (`check_scale`).
        """
        fixed = self.fixed()
        fixed.check_scale()
        total = len(fixed) if indices is None else len(indices)
        batches = fixed.chunks(max(1, min(1024, 2**24 // math.prod(self.shape))), indices)
        # From all items, not only `indices`, so that shards are rounded alike.
        few = list(fixed.some()) if dtype in HALF else []
        offset = sum(x1.double() for x1 in few) / len(few) if few else None
        how: dict[str, Any] = {"dtype": dtype, "offset": offset, "advance": advance}
        if path is None:
            return LatentBank.from_batches(batches, total, copies=copies, **how)
        labels = fixed.labels
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
        """Refuses latents if some of their samples are not scaled, or scaled twice."""
        expected = self.reading.expected_std or self.usual_std
        mean, std = self.statistics().overall()
        size, most = math.hypot(mean, std), self.scale_range
        # Rows that are not finite are refused when all are read.
        if math.isfinite(size) and not expected / most < size < expected * most:
            raise ValueError(
                f"Expected latents of standard deviation about {expected:.3g}, got {std:.3g} (mean "
                f"{mean:.3g}) in {self.path}, read as {self.name}, {self.scaling}. "
                f"{self.cures[size < expected]}If this is what training uses: "
                f"expected_std={size:.3g}."
            )

    def verify(self, full: bool = False) -> None:
        """Checks the scale of a few rows; with `full` reads and checks all rows and labels.

        Files are then compared with their checksums, which shards of `write_latents`, `.npz`, `.pt`
        and zip files hold, and other files of this library have beside them. Warns of files without
        checksums.

        Raises:
            ValueError: With everything that is wrong, also in files left out at opening.
        """
        wrong = list(self.skipped) + (problems(self) if full else [])
        if wrong:
            many = "s" * (len(wrong) > 1)
            raise ValueError(f"{len(wrong)} problem{many} in {self.path}: {joined(wrong, most=10)}")
        self.check_scale()

    def _compare(self) -> Compared:
        """Compares files with their checksums, unless reading a row does so."""
        return [], []

    def _opened(self, labels: Tensor | None) -> None:
        """The last step of opening: refuses what cannot be used, and keeps the labels."""
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
                f'{self.path} holds {self.name} latents without flips. Open them with flips="none".'
            )

    def _leave_out(self, file: object, error: Exception | str) -> None:
        """Records a file that cannot be used, or raises."""
        if not self.reading.skip:
            raise ValueError(f'{error} To leave it out: on_error="skip".')
        self.skipped.append(f"{file}: {error}")

    def describe(self) -> str:
        """One line: what the path holds and how it is read."""
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
        """A mapped file by its key; mapped at its first use, and again in a copy."""
        if key not in self._handles:
            self._handles[key] = make()
        return self._handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}
