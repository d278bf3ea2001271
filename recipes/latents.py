"""`LatentsData`: latents on disk, from `open_latents`, as a data module."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from stagewise.bank import LatentBank
from stagewise.latents import Latents
from stagewise.latents.arrays import require_labels
from stagewise.recipes.arguments import DTYPES
from stagewise.recipes.order import ResumableData

__all__ = ["LatentsData"]


class LatentsData(ResumableData):
    """Latents on disk: items `(x_1, label, row)`, in the scale of training of their format.

    `row` is the number of the item in `latent_bank()`, or over the `latent_shard()`s of all ranks,
    so that an oracle knows it even if x_1 is drawn again at each access.

    Files, headers, labels and scale are checked before training. `verify="full"` reads all rows,
    also of a bank in a file, and compares checksums where there are any.

    Args:
        latents: From `open_latents`, or a function that opens them at first use (Hydra's
            `_partial_`). Their `flips` and `moments` are those of training.
        num_classes: Number of classes; labels must be below it.
        held_out: Rows kept from training for validation, chosen by `seed`; default 2000. 0 for no
            validation.
        held_out_path: Latents of the same format for validation. Then all rows of `latents` are
            trained on, and `held_out` limits how many rows of these are used.
        batch_size: Of each rank, default 32.
        num_workers: Worker processes of each loader, default 0.
        seed: Of the held-out rows and the order; default 0.
        verify: "quick" (default) or "full".
        bank_dir: A folder for a bank that does not fit into memory, outside of the latents. Its
            file is written at first use, and mapped into all ranks. Default None: in memory.
        bank_dtype: "float32" (default), "bfloat16" or "float16".
        sharded: Whether `row` counts over the shards of all ranks, for a `StageScheme` with the
            engine `Sharded()`; default False.

    Raises:
        ValueError: From `setup`: what `open_latents` and `Latents.verify` refuse, latents without
            labels, or no more rows than are held out.
    """

    train: _Items
    held_out: _Items | None

    def __init__(
        self,
        latents: Latents | Callable[[], Latents],
        num_classes: int,
        *,
        held_out: int = 2000,
        held_out_path: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        verify: Literal["quick", "full"] = "quick",
        bank_dir: str | None = None,
        bank_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        sharded: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        for name, value in {"num_classes": num_classes, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
        if held_out < 0:
            raise ValueError(f"Expected `held_out` of at least 0, got {held_out}.")
        if verify not in ("quick", "full"):
            raise ValueError(f'Expected `verify` "quick" or "full", got {verify!r}.')
        if bank_dtype not in DTYPES:
            raise ValueError(f"Expected `bank_dtype` among {list(DTYPES)}, got {bank_dtype!r}.")
        self._opens, self.num_classes, self.held_out_path = latents, num_classes, held_out_path
        self.num_held_out, self.verify = held_out, verify
        self.bank_dir, self.bank_dtype, self.sharded = bank_dir, DTYPES[bank_dtype], sharded
        self._bank: LatentBank | None = None
        self._shards = 0

    @property
    def latents(self) -> Latents:
        """The latents, opened at first use."""
        if not isinstance(self._opens, Latents):
            self._opens = self._opens()
        return self._opens

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return self.latents.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class: its number."""
        return tuple(map(str, range(self.num_classes)))

    def examples(self, classes: Sequence[int], count: int) -> Tensor:
        """The first training samples of classes, without draws, (classes, count, *).

        They repeat if a class has fewer than `count`, and are 0 if it has none.
        """
        fixed, labels = self.latents.fixed(), self._fixed_labels()[self._places]
        found = []
        for label in classes:
            places = self._places[labels == label].tolist()
            some = [fixed[place][0] for place in places[:count]] or [torch.zeros(self.shape)]
            found += [some[i % len(some)] for i in range(count)]
        return torch.stack(found).unflatten(0, (len(classes), count))

    def setup(self, stage: str | None = None) -> None:
        """Opens the latents and chooses the held-out rows, once."""
        if not hasattr(self, "train"):
            self._split()
        # A set-up before there is a trainer does not know its ranks.
        ranks = self.ranks()[1] if self.sharded else 1
        if self.train.rows is None or ranks != self._shards:
            self._shards, self.train.rows = ranks, self._bank_rows(ranks)

    def _split(self) -> None:
        latents = self._verified(self.latents)
        if self.bank_dir is not None:
            folder = Path(self.bank_dir).resolve()
            if folder.is_relative_to(latents.path.resolve()):
                raise ValueError(
                    f"Expected `bank_dir` outside of the latents in {latents.path}, got {folder}: "
                    "files written there would count as latents. Choose another folder."
                )
        plain = latents.with_options(flips="none")
        count = len(plain)
        if self.held_out_path is None and self.num_held_out >= count:
            raise ValueError(
                f"Expected fewer held-out rows than the {count} of {latents.path}, got "
                f"{self.num_held_out}. Lower `held_out`."
            )
        order = np.random.default_rng([self.seed, count]).permutation(count)
        kept = 0 if self.held_out_path else self.num_held_out
        rows = torch.from_numpy(np.sort(order[kept:]))
        both = torch.cat([rows, rows + count])
        # Places count as in `fixed()`: all rows, then their flips.
        flips = latents.reading.flips
        self._places = rows if flips == "none" else both
        self.held_out = None
        if self.held_out_path is not None and self.num_held_out:
            other = self._verified(latents.reopened(self.held_out_path, flips="none"))
            if other.shape != latents.shape:
                raise ValueError(
                    f"Expected held-out latents of shape {latents.shape}, got {other.shape} in "
                    f"{self.held_out_path}."
                )
            few = np.random.default_rng(self.seed).permutation(len(other))[: self.num_held_out]
            self.held_out = _Items(other, torch.from_numpy(np.sort(few)))
        elif kept:
            # The epoch of this second object does not change: every validation has the same draws.
            self.held_out = _Items(copy.deepcopy(plain), torch.from_numpy(np.sort(order[:kept])))
        self.train = _Items(latents, both if flips == "both" else rows)

    def _verified(self, latents: Latents) -> Latents:
        rank_zero_info(latents.describe())
        latents.verify(full=self.verify == "full")
        # Read once here, and then known to all views of these files.
        labels = latents.labels
        if labels is None:
            raise ValueError(
                f"Expected labels for the network, got none in {latents.path}. Write the latents "
                "with labels; for a network without classes all 0, and num_classes=1."
            )
        require_labels(labels, self.num_classes, latents.path)
        return latents

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of `train`, the same steps for any number of ranks."""
        return self.train_loader(self.train, self.latents.set_epoch)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """All held-out samples, in a fixed order; empty if none are held out."""
        return [] if self.held_out is None else self.val_loader(self.held_out)

    @staticmethod
    def find_sample(batch: Any) -> tuple[Tensor, Tensor]:
        """`x_1` and the labels of a batch, without the numbers of the rows."""
        return batch[0], batch[1]

    def latent_bank(self) -> LatentBank:
        """All training rows: means if moments are stored, with flips if they are used.

        Made at first use; with `bank_dir` by all ranks together.
        """
        self.setup()
        if self._bank is None and self.bank_dir is None:
            self._bank = self._read(self._places)
        elif self._bank is None:
            file = Path(str(self.bank_dir)) / f"bank_{self._name()}.safetensors"
            if self._is_first() and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                self._read(self._places, file)
            if dist.is_initialized():
                dist.barrier()
            self._bank = LatentBank.open(file, verify=self.verify)
        return self._bank

    def _is_first(self) -> bool:
        """Whether this process writes for its node."""
        if self.trainer is not None:
            return self.trainer.local_rank == 0
        return not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", "0")) == 0

    def latent_shard(self) -> LatentBank:
        """This rank's part, every R-th of the rows; ValueError if `sharded` is False."""
        if not self.sharded:
            raise ValueError("Expected LatentsData(sharded=True) for an engine that shards a bank.")
        self.setup()
        rank, ranks = self.ranks()
        return self._read(self._places[rank::ranks])

    def to_stored(self, x1: Tensor) -> Tensor:
        """Samples in the scale of the autoencoder, (B, *)."""
        return self.latents.scaling.invert(x1)

    def _fixed_labels(self) -> Tensor:
        labels = self.latents.fixed().labels
        assert labels is not None  # refused at opening
        return labels

    def _read(self, places: Tensor, file: Path | None = None) -> LatentBank:
        rank, _ = self.ranks()
        with tqdm(total=len(places), desc="bank", unit="row", disable=rank > 0) as bar:
            return self.latents.bank(
                dtype=self.bank_dtype,
                indices=places,
                path=file,
                copies=self.trainer.num_devices if self.trainer else 1,
                advance=lambda done: bar.update(done - bar.n),
            )

    def _name(self) -> str:
        """A hash of what the bank is made from."""
        latents, fixed = self.latents, self.latents.fixed()
        files = sorted(_files(latents.path.resolve()))
        digest = hashlib.sha256(repr((latents.describe(), self.bank_dtype, files)).encode())
        # Labels and statistics may be in other files beside that of the latents.
        first = fixed[int(self._places[0])][0]
        for tensor in (self._places, self._fixed_labels(), first):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _bank_rows(self, ranks: int) -> Tensor:
        """The row, over all shards, of each place of `fixed()`; -1 for held-out rows."""
        labels = self._fixed_labels()
        rows, before = torch.full((len(labels),), -1), 0
        for rank in range(ranks):
            places = self._places[rank::ranks]
            places = places[torch.argsort(labels[places], stable=True)]
            rows[places] = torch.arange(before, before + len(places))
            before += len(places)
        return rows


class _Items(Dataset[tuple[Tensor, int, int]]):
    """Some of the latents, each with its row in the bank, or -1."""

    def __init__(self, latents: Latents, indices: Tensor, rows: Tensor | None = None) -> None:
        self.latents, self.indices, self.rows = latents, indices, rows

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        x1, label, place = self.latents.placed(int(self.indices[item]))
        return x1, label, -1 if self.rows is None else int(self.rows[place])

    def fixed(self) -> _Items:
        """The same items as the bank holds them: without draws and random flips."""
        flips = self.latents.reading.flips
        plain = self.latents.with_options(
            flips="none" if flips == "random" else flips, moments="mean"
        )
        return _Items(plain, self.indices, self.rows)


def _files(path: Path) -> Iterator[str]:
    """Name, size and time of a file, or of each in a folder."""
    found = (os.path.join(place, name) for place, _, names in os.walk(path) for name in names)
    for file in [str(path)] if path.is_file() else found:
        stat = os.stat(file)
        yield f"{file} {stat.st_size} {stat.st_mtime_ns}"
