"""The writer of LightningDiT's shards (`lightningdit` says what they hold).

Names, keys and metadata are those of the public writer. What differs: a shard is written under
another name and renamed, so that a file with its name is whole; and the statistics are those of all
un-flipped rows, summed in float64, where the public writer takes 10 000 random rows in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stagewise.latents.files import map_rows, replace_file
from stagewise.latents.lightningdit import STATS, shard_entries, shard_files
from stagewise.latents.statistics import ChannelStatistics

__all__ = ["save_stats", "write_latents", "write_shard", "write_stats"]


def write_stats(folder: str | os.PathLike[str]) -> ChannelStatistics:
    """Computes `latents_stats.pt` from all un-flipped rows of a folder, and writes it.

    Args:
        folder: A folder of shards.

    Returns:
        The statistics. The public writer takes 10 000 random rows instead, in float32.
    """
    folder, seen = Path(folder), ChannelStatistics()
    for file in shard_files(folder):
        rows = map_rows(file, shard_entries(file)["latents"])
        for start in range(0, len(rows.x), 256):
            seen.update(rows.block(start, min(start + 256, len(rows.x))))
    if not seen.count:
        raise ValueError(f"Expected shards (*.safetensors) in {folder}, got none.")
    save_stats(folder, seen.mean, seen.std())
    return seen


def save_stats(folder: Path, mean: Tensor, std: Tensor) -> None:
    """Writes `latents_stats.pt` for C channels, from numbers (C,)."""
    stats = {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}
    replace_file(folder / STATS, lambda name: torch.save(stats, name))


def write_latents(
    folder: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    shard_size: int = 10_000,
    rank: int = 0,
    dtype: torch.dtype | None = None,
    stats: bool = True,
    resume: bool = False,
) -> Path:
    """Writes raw latents as LightningDiT does.

    A shard has its name only when it is complete and on the disk: whoever is killed leaves whole
    shards, and `resume=True` with the same batches goes on behind them.

    Args:
        folder: The folder, which is made if need be.
        batches: Dicts with `latents`, `latents_flip` and `labels`, or tuples `(latents, labels)`
            or `(latents, latents_flip, labels)`; latents (B, C, H, W), labels (B,), integers.
            Without flips the rows are written twice, since the public readers take one of the two
            at random.
        shard_size: Rows in a shard, default 10 000.
        rank: Of this process, for the names; each rank writes shards of its own.
        dtype: Of the stored latents, default as given.
        stats: Whether to write `latents_stats.pt`, from all un-flipped rows in the folder; default
            True. With several ranks let one do it at the end: `write_stats(folder)`.
        resume: Whether to leave out as many rows as this rank has written; default False.

    Returns:
        The folder.

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
            f"{folder} holds {len(old)} shards of rank {rank} already, the last {old[-1].name}. "
            "Choose another folder, or go on behind them: resume=True, with the same batches."
        )
    shape, skip = None, 0
    for file in old:
        latents = shard_entries(file)["latents"]
        shape, skip = latents.shape[1:], skip + latents.shape[0]
    number = int(old[-1].stem.rpartition("shard")[2]) + 1 if old else 0
    seen = ChannelStatistics()
    for shard in _shards(batches, shard_size, skip, shape, dtype):
        seen.update(shard["latents"])
        write_shard(folder, rank, number, shard)
        number += 1
    if not old and not number:
        raise ValueError("Expected batches of latents, got none.")
    if stats and len(shard_files(folder)) == number - len(old):
        save_stats(folder, seen.mean, seen.std())
    elif stats:
        write_stats(folder)
    return folder


def write_shard(folder: Path, rank: int, number: int, shard: dict[str, Tensor]) -> None:
    """Writes one shard, which has its name when it is whole and on the disk.

    Args:
        folder: The folder; it exists.
        rank: Of this process, for the name.
        number: Of the shard among those of the rank, from 0.
        shard: `latents` and `latents_flip` (n, C, H, W), `labels` (n,) int64, on the CPU.
    """
    about = {
        "total_size": f"{len(shard['latents'])}",
        "dtype": f"{shard['latents'].dtype}",
        "device": "cpu",
    }
    name = f"latents_rank{rank:02d}_shard{number:03d}.safetensors"
    replace_file(folder / name, lambda file: save_file(shard, file, about))


def _shards(
    batches: Iterable[Any],
    size: int,
    skip: int,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype | None,
) -> Iterator[dict[str, Tensor]]:
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
        passed = min(skip, len(part["labels"]))
        skip -= passed
        part = {name: value[passed:] for name, value in part.items()}
        while len(part["labels"]):
            taken = min(size - count, len(part["labels"]))
            held.append({name: value[:taken] for name, value in part.items()})
            part = {name: value[taken:] for name, value in part.items()}
            count += taken
            if count == size:
                yield _joined(held)
                held, count = [], 0
    if count:
        yield _joined(held)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def _batch(batch: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if isinstance(batch, Mapping):
        given = {name: batch.get(name) for name in ("latents", "latents_flip", "labels")}
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        given = {"latents": batch[0], "latents_flip": batch[1], "labels": batch[-1]}
        if len(batch) == 2:
            given["latents_flip"] = None
    else:
        given = {}
    z, labels = given.get("latents"), given.get("labels")
    if not (isinstance(z, Tensor) and isinstance(labels, Tensor) and z.is_floating_point()):
        raise ValueError(
            "Expected batches (latents, labels), (latents, latents_flip, labels) or dicts with "
            f"these names, latents floating-point, got {type(batch).__name__}."
        )
    flip = given["latents_flip"]
    flip = z if flip is None else flip
    if z.ndim != 4 or flip.shape != z.shape or labels.shape != z.shape[:1]:
        raise ValueError(
            "Expected latents (B, C, H, W), flips of the same shape and labels (B,), got "
            f"{tuple(z.shape)}, {tuple(flip.shape)} and {tuple(labels.shape)}."
        )
    z, flip = (value.detach().cpu().to(dtype or value.dtype) for value in (z, flip))
    return {"latents": z, "latents_flip": flip, "labels": labels.detach().cpu().long()}
