"""`open_latents`: finds out what a path holds, and opens it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from stagewise.latents.base import Flips, Latents, Moments, Reading
from stagewise.latents.fast_dit import FastDiT, write_fast_dit
from stagewise.latents.files import safetensors_entries
from stagewise.latents.lightningdit import LightningDiT, shard_files
from stagewise.latents.lightningdit_writer import save_stats, write_latents
from stagewise.latents.mar import MAR, write_mar
from stagewise.latents.mean_std import EDM2, REPA, find_folder, write_mean_std
from stagewise.latents.plain import SUFFIXES, Plain, write_plain

__all__ = ["FORMATS", "convert", "open_latents"]

Format: TypeAlias = 'Literal["lightningdit", "fast-dit", "repa", "edm2", "mar", "plain"]'

FORMATS: dict[str, Callable[[Path, Reading], Latents]] = {
    "lightningdit": LightningDiT,
    "fast-dit": FastDiT,
    "repa": REPA,
    "edm2": EDM2,
    "mar": MAR,
    "plain": Plain,
}

_LOOKED_FOR = """
  LightningDiT  *.safetensors shards and latents_stats.pt
  fast-DiT      *_features/0.npy ... and *_labels/0.npy ...
  REPA, EDM2    dataset.json and 00000/img-mean-std-*.npy, there, in vae-sd/ or in a stored zip
  MAR           a folder for each class with *.npz of moments
  plain         one file: .safetensors, .npy, .npz or .pt"""


def open_latents(
    path: str | os.PathLike[str],
    format: Format | None = None,  # noqa: A002 - what everybody calls it
    *,
    flips: Flips = "none",
    moments: Moments = "sample",
    seed: int = 0,
    num_classes: int | None = None,
    normalize: bool = True,
    multiplier: float | None = None,
    expected_std: float | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Latents:
    """Opens latents that are on disk, in the scale that models are trained on.

    Names, sizes and headers are looked at, no row is read. `latents.describe()` says what was
    recognised, `latents.verify()` looks at rows.

    Args:
        path: A folder or file.
        format: "lightningdit", "fast-dit", "repa", "edm2", "mar" or "plain"; default: found out.
            "repa" and "edm2" must be said, since their files have the same names and another scale.
        flips: Stored flips: "none" (default) leaves them out, "random" takes the row or its flip
            at each access, "both" appends them.
        moments: Of stored means and standard deviations: "sample" (default) draws at each access,
            "mean" does not.
        seed: Of the draws, default 0; see `Latents.set_epoch`.
        num_classes: Labels must be below it; default: any that are not negative.
        normalize: LightningDiT: whether rows are normalised by `latents_stats.pt`, default True.
        multiplier: What rows are multiplied by: LightningDiT, fast-DiT and plain files. Default 1;
            with normalize=False it must be said, 0.18215 for Stable Diffusion's autoencoder.
        expected_std: Standard deviation that samples have, for the check of scale; default 1, and
            0.5 for EDM2.
        on_error: "raise" (default), or "skip": files that are truncated or damaged are named in
            `latents.skipped` and left out.

    Returns:
        A data set of `(x_1, label, index)`.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If there are no latents, or if they cannot be used; with the file and the cure.
    """
    for name, value, allowed in (
        ("flips", flips, ("none", "random", "both")),
        ("moments", moments, ("sample", "mean")),
        ("on_error", on_error, ("raise", "skip")),
        ("format", format, (None, *FORMATS)),
    ):
        if value not in allowed:
            raise ValueError(f"Expected `{name}` among {allowed}, got {value!r}.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected a folder or file of latents, got {path}: no such path.")
    reading = Reading(
        flips,
        moments,
        seed,
        num_classes,
        on_error == "skip",
        multiplier,
        normalize,
        expected_std,
    )
    kind = format or _recognise(path)
    if multiplier is not None and kind in ("repa", "edm2", "mar"):
        raise ValueError(
            f"Expected no `multiplier` for {kind}, which has its own scale, got {multiplier}."
        )
    if not normalize and kind != "lightningdit":
        raise ValueError(
            f"normalize=False is for LightningDiT's shards; {path} was read as {kind}, which is "
            "not normalised by a file of statistics. Leave it out."
        )
    if (kind == "plain") != path.is_file() and kind not in ("repa", "edm2", "lightningdit"):
        raise ValueError(
            f"Expected a {'file' if kind == 'plain' else 'folder'} for {kind}, got {path}."
        )
    return FORMATS[kind](path, reading)


def _recognise(path: Path) -> str:
    if find_folder(path) is not None:
        raise ValueError(
            f"{path} holds means and standard deviations, and two projects write such files with "
            'the same names. Say which: format="repa" (pixels in [-1, 1], latents times 0.18215) '
            'or format="edm2" (pixels in [0, 1], normalised by channel to 0.5).'
        )
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"Expected a file that ends with one of {(*SUFFIXES, '.zip')}, got {path}."
            )
        shard = path.suffix == ".safetensors" and "latents_flip" in safetensors_entries(path)
        return "lightningdit" if shard else "plain"
    if shard_files(path):
        return "lightningdit"
    if next(path.glob("*_features"), None):
        return "fast-dit"
    if next(path.glob("*/*.npz"), None):
        return "mar"
    found = sorted(item.name for item in path.iterdir())[:8]
    raise ValueError(
        f"Expected latents in {path}, got a folder with {found or 'nothing in it'}. What is looked "
        f"for:{_LOOKED_FOR}"
    )


def convert(
    source: Latents | str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: Format = "lightningdit",  # noqa: A002 - as above
    *,
    dtype: torch.dtype | None = None,
    shard_size: int = 10_000,
) -> Path:
    """Writes latents in another format, so that what is read there is what is read here.

    Means stand for the samples that would be drawn, and flips are carried where both formats have
    them. Shards get statistics of mean 0 and standard deviation 1, which leave the samples as they
    are; means get a standard deviation of 0. MAR numbers its folders: where a class has no rows,
    those above it move down.

    Args:
        source: Latents, or the path of some that `open_latents` needs no more for.
        target: A folder, or a file for "plain" and for a zip of "repa" or "edm2".
        format: That of the target.
        dtype: Of the stored numbers, default float32.
        shard_size: Rows in a shard.

    Returns:
        The target.

    Raises:
        ValueError: If the target's format needs labels that the source does not have.
    """
    source = source if isinstance(source, Latents) else open_latents(source)
    fixed = source.with_options(moments="mean", flips="both" if source.has_flips else "none")
    if fixed.labels is None and format in ("lightningdit", "fast-dit", "mar"):
        raise ValueError(
            f"{source.path} has no labels, and {format} needs them. Write it as plain."
        )
    dtype, target = dtype or torch.float32, Path(target)
    if format == "plain":
        count = len(fixed) // (2 if source.has_flips else 1)
        labels = fixed.labels
        return write_plain(
            target, fixed.rows(0, count).to(dtype), None if labels is None else labels[:count]
        )
    blocks = _blocks(fixed, source.has_flips)
    if format == "lightningdit":
        write_latents(target, blocks, shard_size=shard_size, dtype=dtype, stats=False)
        channels = fixed.shape[0]
        save_stats(target, torch.zeros(channels), torch.ones(channels))
        return target
    if format == "fast-dit":
        return write_fast_dit(target, ((x.to(dtype), y) for x, _, y in blocks))
    scaling = {"repa": REPA, "edm2": EDM2, "mar": MAR}[format].scaling

    def moments(x: Tensor) -> Tensor:
        mean = scaling.invert(x)
        # -30 is where MAR's reader cuts off: a standard deviation of 3e-7.
        spread = torch.full_like(mean, -30.0 if format == "mar" else 0.0)
        return torch.cat([mean, spread], dim=1).to(dtype)

    if format == "mar":
        return write_mar(target, ((moments(x), moments(flip), y) for x, flip, y in blocks))
    return write_mean_std(target, ((moments(x), y) for x, _, y in blocks))


def _blocks(fixed: Latents, flips: bool, size: int = 1024) -> Iterator[tuple[Any, ...]]:
    """`(x_1, its flip or x_1 again, labels)`, block by block."""
    count = len(fixed) // (2 if flips else 1)
    labels = fixed.labels
    for start in range(0, count, size):
        stop = min(start + size, count)
        x = fixed.rows(start, stop)
        flip = fixed.rows(count + start, count + stop) if flips else x
        yield x, flip, None if labels is None else labels[start:stop]
