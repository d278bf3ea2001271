"""`latents_stats.pt` of LightningDiT: mean and standard deviation by channel, beside the shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stagewise.files import first_line, joined, replace_file
from stagewise.latents.arrays import check_zip, is_dense

__all__ = ["STATS", "read_stats", "save_stats"]

STATS = "latents_stats.pt"


def read_stats(file: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, each (C, 1, 1), float32."""
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected {STATS} with the mean and standard deviation of the latents, got none in "
            f"{file.parent}. Compute it: write_stats(folder). If they are not normalised: "
            "normalize=False with multiplier=0.18215 for Stable Diffusion's autoencoder, "
            "multiplier=1.0 for latents that are already scaled."
        )
    again = "Compute it again: write_stats(folder)."
    try:
        check_zip(file)
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise ValueError(
            f"{file} cannot be read as a file of tensors ({first_line(error)}). {again}"
        ) from error
    if not isinstance(held, Mapping) or not {"mean", "std"} <= held.keys():
        found = joined(held) if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"Expected {{'mean': ..., 'std': ...}} in {file}, got {found}. {again}")
    for name in ("mean", "std"):
        shape = tuple(held[name].shape) if is_dense(held[name]) else ()
        if shape not in ((1, channels, 1, 1), (channels, 1, 1), (channels,)):
            raise ValueError(
                f"Expected `{name}` of shape {(1, channels, 1, 1)} in {file}, for latents with "
                f"{channels} channels, got {shape}. It belongs to other latents. {again}"
            )
    mean, std = (held[name].float().reshape(channels, 1, 1) for name in ("mean", "std"))
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"Expected finite numbers, `std` above 0, in {file}, got others. {again}")
    return mean, std


def save_stats(folder: Path, mean: Tensor, std: Tensor) -> None:
    """Writes `latents_stats.pt` for C channels, from numbers (C,)."""
    stats = {"mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}

    def save(partial: Path) -> None:
        with open(partial, "wb") as file:  # given a name, torch.save would record it
            torch.save(stats, file)

    replace_file(folder / STATS, save)
