"""LightningDiT: safetensors shards of raw latents, with their statistics beside them.

    latents_rank00_shard000.safetensors   latents, latents_flip (n, C, H, W); labels (n,) int64
    ...
    latents_stats.pt                      {"mean", "std"}, each (1, C, 1, 1)

Rows are posterior samples as the autoencoder gave them; whoever reads them computes
`(z - mean) / std * multiplier`. Latents of Stable Diffusion's autoencoder are not normalised but
multiplied by 0.18215, which the files do not say (hustvl/LightningDiT, issues 22 and 34).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stagewise.latents.base import Latents, Reading
from stagewise.latents.checking import class_numbers
from stagewise.latents.files import (
    Entry,
    Problem,
    Rows,
    map_rows,
    read_tensor,
    safetensors_entries,
)
from stagewise.latents.scaling import Affine, Normalised

__all__ = ["STATS", "LightningDiT", "read_stats", "shard_entries", "shard_files"]

STATS = "latents_stats.pt"


class LightningDiT(Latents):
    """Shards of raw latents.

    Args:
        path: The folder, or one shard.
        reading: How to read.
    """

    name = "LightningDiT"
    scale_range = 1.4  # divided by their own standard deviation, rows are at 1

    def __init__(self, path: Path, reading: Reading) -> None:
        super().__init__(path, reading)
        files = shard_files(path) if path.is_dir() else [path]
        self._shards: list[tuple[Path, dict[str, Entry]]] = []
        self._starts = [0]
        labels: list[Tensor] = []
        for gap in missing_shards(files):
            lost = f"{path / gap} is missing: there are shards with higher numbers. Copy it too."
            self._leave_out(gap, Problem(lost))
        for file in files:
            try:
                entries = shard_entries(file)
                found = _labels(file, entries)
            except (Problem, OSError) as error:
                self._leave_out(file.name, error)
                continue
            self._shards.append((file, entries))
            self._starts.append(self._starts[-1] + entries["latents"].shape[0])
            if found is not None:
                labels.append(found)
        if not self._shards:
            raise ValueError(
                f"Expected shards that can be read in {path}, got none of {len(files)}: "
                f"{self.skipped[0] if self.skipped else 'there are no files'}"
            )
        self._require_alike(len(labels))
        first = self._shards[0][1]["latents"]
        self.shape, self.dtype = first.shape[1:], first.dtype
        self.has_flips = all("latents_flip" in entries for _, entries in self._shards)
        self._all_labels = torch.cat(labels) if labels else None
        self.scaling = self._find_scaling(path if path.is_dir() else path.parent)
        if not reading.normalize:
            self.scale_range = 2.0
        self._prepare()
        self._stored_labels()

    def _require_alike(self, labelled: int) -> None:
        (first, entries), *others = self._shards
        for file, other in others:
            if other["latents"].shape[1:] != entries["latents"].shape[1:]:
                raise ValueError(
                    f"Expected rows of shape {entries['latents'].shape[1:]} in {file}, as in "
                    f"{first.name}, got {other['latents'].shape[1:]}. These are latents of two "
                    "autoencoders or sizes: keep each in a folder of its own."
                )
        if labelled not in (0, len(self._shards)):
            raise ValueError(
                f"Expected `labels` in all {len(self._shards)} shards of {self.path} or in none, "
                f"got them in {labelled}."
            )

    def _find_scaling(self, folder: Path) -> Normalised | Affine:
        multiplier = self.reading.multiplier
        if self.reading.normalize:
            mean, std = read_stats(folder / STATS, self.shape[0])
            return Normalised(mean, std, 1.0 if multiplier is None else multiplier)
        if multiplier is None:
            raise ValueError(
                f"Expected `multiplier` with normalize=False for {self.path}: 0.18215 for latents "
                "of Stable Diffusion's autoencoder, 1.0 for latents that are scaled already."
            )
        return Affine((multiplier,))

    def _count(self) -> int:
        return self._starts[-1]

    def _rows(self, shard: int, flip: bool) -> Rows:
        (file, entries), name = self._shards[shard], "latents_flip" if flip else "latents"
        return self._handle((shard, flip), lambda: map_rows(file, entries[name]))

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

    def _read_labels(self) -> Tensor | None:
        return self._all_labels

    def _parts(self) -> str:
        return f"{len(self._shards)} shard{'s' * (len(self._shards) > 1)}"

    def _cure(self, large: bool) -> str:
        if self.reading.normalize:
            return (
                f"The rows do not fit {STATS} beside them: they were normalised before they were "
                "written (then normalize=False, multiplier=1.0), or the statistics are those of "
                "other latents (then write_stats(folder)). "
            )
        if large:
            return (
                "Nothing brings the rows to the scale of training: normalize=True for VA-VAE, "
                "multiplier=0.18215 for Stable Diffusion's autoencoder (LightningDiT issues 22 "
                "and 34). "
            )
        return "They were scaled before they were written: multiplier=1.0. "


def shard_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a shard, from its header.

    Raises:
        Problem: If it is no shard, or not whole.
    """
    entries = safetensors_entries(file)
    if "latents" not in entries or len(entries["latents"].shape) < 2:
        raise Problem(
            f"Expected `latents` of shape (n, C, H, W) in {file}, got "
            f"{sorted(entries) or 'nothing'}. Is it a shard?"
        )
    shape = entries["latents"].shape
    if "latents_flip" in entries and entries["latents_flip"].shape != shape:
        raise Problem(
            f"Expected `latents_flip` of shape {shape} in {file}, got "
            f"{entries['latents_flip'].shape}. Write it again."
        )
    if not entries["latents"].dtype.is_floating_point:
        raise Problem(f"Expected floating-point `latents` in {file}.")
    return entries


def _labels(file: Path, entries: dict[str, Entry]) -> Tensor | None:
    if "labels" not in entries:
        return None
    labels = read_tensor(file, entries["labels"])
    return class_numbers(labels, entries["latents"].shape[0], "`labels`", file)


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, in the order of the public reader."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def missing_shards(files: Iterable[Path]) -> list[str]:
    """Names that the writer must have used, by the numbers of those that are there."""
    numbers: dict[int, set[int]] = {}
    for file in files:
        match = re.fullmatch(r"latents_rank(\d+)_shard(\d+)", file.stem)
        if match:
            numbers.setdefault(int(match[1]), set()).add(int(match[2]))
    ranks = range(max(numbers, default=-1) + 1)
    return [
        f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
        for rank in ranks
        for shard in range(max(numbers.get(rank, {0}), default=0) + 1)
        if shard not in numbers.get(rank, set())
    ]


def read_stats(file: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, each (C, 1, 1), float32.

    Raises:
        FileNotFoundError: If there is no such file, with the ways to do without.
        ValueError: If it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {STATS} with the mean and standard deviation of the latents, and there is "
            f"none in {file.parent}. Compute it, write_stats(folder), or, if they are not to be "
            "normalised: normalize=False with multiplier=0.18215 for Stable Diffusion's "
            "autoencoder, multiplier=1.0 for latents that are scaled already."
        )
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise ValueError(
            f"{file} cannot be read as a file of tensors ({str(error).splitlines()[0][:120]}). "
            "Compute it again: write_stats(folder)."
        ) from error
    named = isinstance(held, Mapping) and all(
        isinstance(held.get(name), Tensor) for name in ("mean", "std")
    )
    if not named:
        raise ValueError(
            f"Expected {{'mean': ..., 'std': ...}} in {file}, got "
            f"{sorted(held) if isinstance(held, Mapping) else type(held).__name__}. Compute it "
            "again: write_stats(folder)."
        )
    for name in ("mean", "std"):
        shape = tuple(held[name].shape)
        if shape not in ((1, channels, 1, 1), (channels, 1, 1), (channels,)):
            raise ValueError(
                f"Expected `{name}` of shape {(1, channels, 1, 1)} in {file}, for latents with "
                f"{channels} channels, got {shape}. It belongs to other latents; compute it: "
                "write_stats(folder)."
            )
    mean, std = (held[name].float().reshape(channels, 1, 1) for name in ("mean", "std"))
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(
            f"Expected finite numbers in {file} and standard deviations above 0, got others. "
            "Compute it again: write_stats(folder)."
        )
    return mean, std
