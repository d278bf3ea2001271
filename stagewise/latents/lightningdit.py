"""LightningDiT: safetensors shards of raw latents, with their statistics beside them.

    latents_rank00_shard000.safetensors   latents, latents_flip (n, C, H, W); labels (n,) int64
    ...
    latents_stats.pt                      {"mean", "std"}, each (1, C, 1, 1)

Rows are posterior samples from the autoencoder; readers compute `(z - mean) / std * multiplier`.
Latents of Stable Diffusion's autoencoder are not normalised but multiplied by 0.18215, which the
files do not say (hustvl/LightningDiT, issues 22 and 34).

The writer uses names, keys and metadata of the public one, and adds checksums. Its statistics are
of all un-flipped rows in float64; the public writer takes 10 000 random rows in float32.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from stagewise.files import FilePath, Problem
from stagewise.latents.arrays import Rows, class_numbers
from stagewise.latents.base import Block, Latents, Reading, Writing
from stagewise.latents.checksums import Compared, compare_tensors
from stagewise.latents.scaling import (
    STATS,
    ChannelStatistics,
    Normalised,
    Scaling,
    read_stats,
    save_stats,
)
from stagewise.tensor_files import Entry, read_header, write_tensors

__all__ = [
    "LightningDiT",
    "shard_name",
    "write_latents",
    "write_shard",
    "write_stats",
]

_NOT_NORMALISED = (
    "The rows are not scaled for training: normalize=True for VA-VAE, multiplier=0.18215 for "
    "Stable Diffusion's autoencoder. ",
    "They were scaled before they were written: multiplier=1.0, and no `autoencoder`. ",
)


class LightningDiT(Latents):
    """Shards of raw latents: a folder of shards, or one shard."""

    name = "LightningDiT"
    looks_like = "*.safetensors shards and latents_stats.pt"
    is_file = None
    takes_multiplier = True
    scales = {"sd-vae": (False, 0.18215)}
    needs_labels = True
    scale_range = 1.4  # normalised rows have a standard deviation of 1
    cures = (
        f"The rows do not fit {STATS} beside them: they were normalised before they were written "
        "(then normalize=False, multiplier=1.0), or the statistics are those of other latents "
        "(then write_stats(folder)). ",
    ) * 2

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        files = _shard_files(path) if path.is_dir() else [path]
        self._shards: list[dict[str, Entry]] = []
        self._starts = [0]
        labels: list[Tensor] = []
        for gap in _missing_shards(files):
            lost = f"{path / gap} is missing, but shards with higher numbers exist. Copy it too."
            self._leave_out(gap, lost)
        for file in files:
            try:
                entries = _shard_entries(file)
                count = entries["latents"].shape[0]
                if "labels" in entries:
                    found = entries["labels"].read()
                    labels.append(class_numbers(found, count, "`labels`", file))
            except (Problem, OSError) as error:
                self._leave_out(file.name, error)
                continue
            self._shards.append(entries)
            self._starts.append(self._starts[-1] + count)
        if not self._shards:
            raise ValueError(
                f"Expected readable shards in {path}, got 0 of {len(files)}: "
                f"{self.skipped[0] if self.skipped else 'there are no files'}"
            )
        self._require_alike(len(labels))
        first = self._shards[0]["latents"]
        self.shape, self.dtype = first.shape[1:], first.dtype
        self.has_flips = all("latents_flip" in entries for entries in self._shards)
        self.scaling = self._find_scaling(path if path.is_dir() else path.parent)
        if not reading.normalize:
            self.scale_range, self.cures = 2.0, _NOT_NORMALISED
        self._opened(torch.cat(labels) if labels else None)

    @override
    @classmethod
    def finds(cls, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".safetensors" and "latents_flip" in read_header(path)[0]
        return bool(_shard_files(path))

    def _require_alike(self, labelled: int) -> None:
        first, *others = (entries["latents"] for entries in self._shards)
        for other in others:
            if other.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"Expected rows of shape {first.shape[1:]} in {other.path}, as in "
                    f"{first.path.name}, got {other.shape[1:]}. These are latents of two "
                    "autoencoders or sizes: put each into its own folder."
                )
        if labelled not in (0, len(self._shards)):
            raise ValueError(
                f"Expected `labels` in all {len(self._shards)} shards of {self.path} or in none, "
                f"got them in {labelled}."
            )

    def _find_scaling(self, folder: Path) -> Scaling:
        multiplier = self.reading.multiplier
        if self.reading.normalize:
            mean, std = read_stats(folder / STATS, self.shape[0])
            return Normalised(mean, std, 1.0 if multiplier is None else multiplier)
        if multiplier is None:
            raise ValueError(
                f"Expected `multiplier` with normalize=False for {self.path}: 0.18215 for latents "
                "of Stable Diffusion's autoencoder, 1.0 for latents that are already scaled."
            )
        return self.scaling

    def _count(self) -> int:
        return self._starts[-1]

    def _rows(self, shard: int, flip: bool) -> Rows:
        entry = self._shards[shard]["latents_flip" if flip else "latents"]
        return self._handle((shard, flip), lambda: Rows.of(entry))

    def _read(self, row: int, flip: bool) -> Tensor:
        shard = bisect_right(self._starts, row) - 1
        return self._rows(shard, flip).x[row - self._starts[shard]]

    def _read_block(self, start: int, stop: int, flip: bool) -> Tensor:
        parts = []
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            first, last = self._starts[shard : shard + 2]
            end = min(stop, last)
            parts.append(self._rows(shard, flip).block(start - first, end - first))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compare(self) -> Compared:
        return compare_tensors(self._shards)

    def _parts(self) -> str:
        return f"{len(self._shards)} shard{'s' * (len(self._shards) > 1)}"

    @override
    @classmethod
    def write(cls, path: Path, blocks: Iterable[Block], how: Writing) -> Path:
        blocks = iter(blocks)
        first = next(blocks)
        blocks, channels = chain([first], blocks), first[0].shape[1]
        size, dtype = how.shard_size, how.dtype
        if how.made is None:
            write_latents(path, blocks, stats=False, shard_size=size, dtype=dtype)
            save_stats(path, torch.zeros(channels), torch.ones(channels))
            return path
        # Raw latents have another mean and scale in each channel, which the writer measures.
        draws = np.random.default_rng((how.made, 7))
        mean, std = (
            torch.from_numpy(values).float()[:, None, None]
            for values in (draws.normal(0, 1, channels), draws.uniform(2, 5, channels))
        )
        raw = Normalised(mean, std)
        batches = ((raw.invert(x), raw.invert(flip), y) for x, flip, y in blocks)
        return write_latents(path, batches, shard_size=size, dtype=dtype)


def _shard_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a shard, from its header; refuses other files."""
    entries, _ = read_header(file)
    if "latents" not in entries or len(entries["latents"].shape) < 2:
        raise Problem(
            f"Expected `latents` of shape (n, C, H, W) in {file}, got "
            f"{sorted(entries) or 'nothing'}. Is it a shard?"
        )
    shape, flips = entries["latents"].shape, entries.get("latents_flip", entries["latents"]).shape
    if flips != shape:
        raise Problem(
            f"Expected `latents_flip` of shape {shape} in {file}, got {flips}. Write it again."
        )
    if not entries["latents"].dtype.is_floating_point:
        raise Problem(f"Expected floating-point `latents` in {file}.")
    return entries


def _shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, in the order of the public reader."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _missing_shards(files: Iterable[Path]) -> list[str]:
    """Names of missing shards, by the gaps in the numbers of the others."""
    found = {
        (int(match[1]), int(match[2]))
        for file in files
        if (match := re.fullmatch(r"latents_rank(\d+)_shard(\d+)", file.stem))
    }
    return [
        shard_name(rank, shard)
        for rank in range(max((rank for rank, _ in found), default=-1) + 1)
        for shard in range(max((s for r, s in found if r == rank), default=0) + 1)
        if (rank, shard) not in found
    ]


def write_stats(folder: FilePath) -> ChannelStatistics:
    """Computes `latents_stats.pt` from all un-flipped rows of a folder of shards, and writes it."""
    folder, seen = Path(folder), ChannelStatistics()
    for file in _shard_files(folder):
        rows = _shard_entries(file)["latents"]
        for start in range(0, rows.shape[0], 256):
            seen.update(rows.rows(start, min(start + 256, rows.shape[0])))
    if not seen.count:
        raise ValueError(f"Expected shards (*.safetensors) in {folder}, got none.")
    save_stats(folder, seen.mean, seen.std())
    return seen


def write_latents(
    folder: FilePath,
    batches: Iterable[Any],
    *,
    shard_size: int = 10_000,
    rank: int = 0,
    dtype: torch.dtype | None = None,
    stats: bool = True,
    resume: bool = False,
) -> Path:
    """Writes raw latents as LightningDiT does; a killed process leaves complete shards.

    Args:
        folder: The folder, which is made if it does not exist.
        batches: Dicts with `latents`, `latents_flip` and `labels`, or tuples `(latents, labels)`
            or `(latents, latents_flip, labels)`; latents (B, C, H, W), labels (B,), integers.
            Without flips the rows are written twice, since the public readers take one of the two
            at random.
        shard_size: Rows in a shard, default 10 000.
        rank: Of this process, for the names; each rank writes its own shards.
        dtype: Of the stored latents, default as given.
        stats: Whether to write `latents_stats.pt`, from all un-flipped rows in the folder; default
            True. With several ranks, one of them calls `write_stats(folder)` at the end.
        resume: Whether to skip the rows that this rank has already written, given the same batches;
            default False.

    Raises:
        FileExistsError: If this rank has shards there and `resume` is False.
        ValueError: If a batch is none of these, or its shapes do not fit the others.
    """
    if shard_size < 1:
        raise ValueError(f"Expected `shard_size` of at least 1, got {shard_size}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(folder.glob(f"latents_rank{rank:02d}_shard*.safetensors"))
    if old and not resume:
        raise FileExistsError(
            f"{folder} already holds {len(old)} shards of rank {rank}, the last {old[-1].name}. "
            "Choose another folder, or continue after them: resume=True, with the same batches."
        )
    written = [_shard_entries(file)["latents"].shape for file in old]
    shape, skip = written[-1][1:] if old else None, sum(count for count, *_ in written)
    number = begun = int(old[-1].stem.rpartition("shard")[2]) + 1 if old else 0
    seen = ChannelStatistics()
    for shard in _shards(batches, shard_size, skip, shape, dtype):
        seen.update(shard["latents"])
        write_shard(folder, rank, number, shard)
        number += 1
    if not number:
        raise ValueError("Expected batches of latents, got none.")
    if stats and len(_shard_files(folder)) == number - begun:
        save_stats(folder, seen.mean, seen.std())
    elif stats:
        write_stats(folder)
    return folder


def write_shard(folder: Path, rank: int, number: int, shard: dict[str, Tensor]) -> None:
    """Writes shard `number`, from 0: `latents`, `latents_flip` and `labels`, on the CPU."""
    latents = shard["latents"]
    about = {"total_size": f"{len(latents)}", "dtype": f"{latents.dtype}", "device": "cpu"}
    write_tensors(folder / shard_name(rank, number), shard, about)


def shard_name(rank: int, number: int) -> str:
    """The name of shard `number`, from 0, of a rank."""
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def _shards(
    batches: Iterable[Any],
    size: int,
    skip: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype | None,
) -> Iterator[dict[str, Tensor]]:
    """The rows of batches after the first `skip`, in shards of `size` rows."""
    held: list[dict[str, Tensor]] = []
    count = 0
    for batch in batches:
        part = _batch(batch, dtype)
        shape = shape or tuple(part["latents"].shape[1:])
        if tuple(part["latents"].shape[1:]) != shape:
            raise ValueError(
                f"Expected latents of shape {shape} as in the batches before, got "
                f"{tuple(part['latents'].shape[1:])}."
            )
        at, rows = min(skip, len(part["labels"])), len(part["labels"])
        skip -= at
        while at < rows:  # each row is copied once, also from a batch of many shards
            end = min(rows, at + size - count)
            held.append({name: value[at:end] for name, value in part.items()})
            at, count = end, count + end - at
            if count == size:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def _batch(batch: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    z = flip = labels = None
    if isinstance(batch, Mapping):
        z, flip, labels = (batch.get(name) for name in ("latents", "latents_flip", "labels"))
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        z, flip, labels = batch if len(batch) == 3 else (batch[0], None, batch[1])
    if not (isinstance(z, Tensor) and isinstance(labels, Tensor) and z.is_floating_point()):
        raise ValueError(
            "Expected batches (latents, labels), (latents, latents_flip, labels) or dicts with "
            f"these names, latents floating-point, got {type(batch).__name__}."
        )
    flip = z if flip is None else flip
    if z.ndim != 4 or flip.shape != z.shape or labels.shape != z.shape[:1]:
        raise ValueError(
            "Expected latents (B, C, H, W), flips of the same shape and labels (B,), got "
            f"{tuple(z.shape)}, {tuple(flip.shape)} and {tuple(labels.shape)}."
        )
    z, flip = (value.detach().cpu().to(dtype or value.dtype) for value in (z, flip))
    return {"latents": z, "latents_flip": flip, "labels": labels.detach().cpu().long()}
