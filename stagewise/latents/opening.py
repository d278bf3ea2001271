"""`open_latents` recognises what a path holds, and opens it; `convert` writes another format.

A new format is a file with a subclass of `Latents`, and a line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from stagewise.files import FilePath
from stagewise.latents.array_file import ArrayFile
from stagewise.latents.base import Block, Flips, Latents, Moments, Reading, Writing
from stagewise.latents.fast_dit import FastDiT
from stagewise.latents.lightningdit import LightningDiT
from stagewise.latents.mar import MAR
from stagewise.latents.mean_std import EDM2, REPA

__all__ = ["FORMATS", "convert", "open_latents", "require_format"]

FORMATS: dict[str, type[Latents]] = {
    "lightningdit": LightningDiT,
    "fast-dit": FastDiT,
    "repa": REPA,
    "edm2": EDM2,
    "mar": MAR,
    "plain": ArrayFile,
}
"""In the order in which they are tried, after the ambiguous ones."""


def open_latents(
    path: FilePath,
    format: str | None = None,  # noqa: A002 - what everybody calls it
    *,
    flips: Flips = "none",
    moments: Moments = "sample",
    seed: int = 0,
    num_classes: int | None = None,
    normalize: bool = True,
    multiplier: float | None = None,
    autoencoder: str | None = None,
    expected_std: float | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Latents:
    """Opens latents on disk, at the scale that models are trained on.

    Reads names, sizes and headers, but no row. `latents.describe()` says what was recognised,
    `latents.verify()` checks rows.

    Args:
        path: A folder or file.
        format: "lightningdit", "fast-dit", "repa", "edm2", "mar" or "plain"; default: recognised.
            "repa" and "edm2" must be given: their files have the same names and another scale.
        flips: Stored flips: "none" (default) leaves them out, "random" takes the row or its flip
            at each access, "both" appends them.
        moments: For stored means and standard deviations: "sample" (default) draws at each access,
            "mean" does not.
        seed: Of the draws, default 0; see `Latents.set_epoch`.
        num_classes: Labels must be below it; default: any that are not negative.
        normalize: LightningDiT: whether rows are normalised by `latents_stats.pt`, default True.
        multiplier: What rows are multiplied by: LightningDiT, fast-DiT and plain files. Default 1;
            required with normalize=False, 0.18215 for Stable Diffusion's autoencoder.
        autoencoder: "sd-vae": rows are from Stable Diffusion's autoencoder, and training is on
            0.18215 times its output, as for SiT, DiT and REPA, in any format. Replaces `normalize`
            and `multiplier`. Default None: as the format does.
        expected_std: Standard deviation of samples, for the check of scale; default 1, and 0.5 for
            EDM2.
        on_error: "raise" (default), or "skip": files that are truncated or damaged are named in
            `latents.skipped` and left out.

    Returns:
        A data set of `(x_1, label, index)`.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If there are no latents, or they cannot be used; with the file and the cure.
    """
    for name, value, allowed in (
        ("flips", flips, ("none", "random", "both")),
        ("moments", moments, ("sample", "mean")),
        ("on_error", on_error, ("raise", "skip")),
        ("format", format, (None, *FORMATS)),
    ):
        if value not in allowed:
            raise ValueError(f"Expected `{name}` among {allowed}, got {value!r}.")
    path, skip = Path(path), on_error == "skip"
    if not path.exists():
        raise FileNotFoundError(f"Expected a folder or file of latents, got {path}: no such path.")
    format = format or _recognise(path)  # noqa: A001 - as above
    kind = FORMATS[format]
    if autoencoder is not None:
        if multiplier is not None or not normalize:
            raise ValueError(
                f"Expected either autoencoder={autoencoder!r}, which says the scale, or "
                "`normalize` and `multiplier`, got both. Leave the first out: autoencoder=None."
            )
        if autoencoder not in kind.scales:
            raise ValueError(
                f"Expected `autoencoder` among {sorted(kind.scales)} for {format}, whose rows are "
                f"at another scale, got {autoencoder!r}. Leave it out: autoencoder=None."
            )
        normalize, multiplier = kind.scales[autoencoder]
    if multiplier is not None and not kind.takes_multiplier:
        raise ValueError(
            f"Expected no `multiplier` for {format}, which has its own scale, got {multiplier}."
        )
    if not normalize and kind is not LightningDiT:
        raise ValueError(
            f"normalize=False is only for LightningDiT's shards, and {path} was read as {format}, "
            "which has no file of statistics. Leave normalize out."
        )
    if kind.is_file not in (None, path.is_file()):
        wanted = "file" if kind.is_file else "folder"
        raise ValueError(f"Expected a {wanted} for {format}, got {path}.")
    reading = Reading(flips, moments, seed, num_classes, skip, multiplier, normalize, expected_std)
    return kind(path, reading)


def _recognise(path: Path) -> str:
    for name, kind in sorted(FORMATS.items(), key=lambda item: not item[1].ambiguous):
        if kind.finds(path):
            if kind.ambiguous:
                raise ValueError(f"{path} {kind.ambiguous}")
            return name
    names = [] if path.is_file() else sorted(item.name for item in path.iterdir())[:8]
    here = "a file" if path.is_file() else f"a folder with {names or 'nothing in it'}"
    looked_for = "".join(f"\n  {kind.name}: {kind.looks_like}" for kind in FORMATS.values())
    raise ValueError(f"Expected latents in {path}, got {here}. What is looked for:{looked_for}")


def convert(
    source: Latents | FilePath,
    target: FilePath,
    format: str = "lightningdit",  # noqa: A002 - as above
    *,
    dtype: torch.dtype | None = None,
    shard_size: int = 10_000,
) -> Path:
    """Writes latents in another format, so that reading both gives the same samples.

    Means replace the samples that would be drawn; flips are kept if both formats have them. Shards
    get statistics of mean 0 and standard deviation 1, which do not change the samples; means get a
    standard deviation of 0. MAR numbers its folders: if a class has no rows, higher ones move down.

    Args:
        source: Latents, or their path if `open_latents` needs no options.
        target: A folder, or a file for "plain" and for a zip of "repa" or "edm2".
        format: The format of the target.
        dtype: Of the stored numbers, default float32.
        shard_size: Rows in a shard.

    Returns:
        The target.

    Raises:
        ValueError: If the target's format needs labels that the source does not have.
    """
    kind = require_format(format)
    source = source if isinstance(source, Latents) else open_latents(source)
    fixed = source.with_options(moments="mean", flips="both" if source.has_flips else "none")
    if fixed.labels is None and kind.needs_labels:
        raise ValueError(
            f'Expected labels for {format}, got none in {source.path}. Convert to format="plain".'
        )
    how = Writing(dtype or torch.float32, shard_size)
    return kind.write(Path(target), _blocks(fixed, source.has_flips), how)


def require_format(format: str) -> type[Latents]:  # noqa: A002 - as above
    """The class of a format, by its name; refuses another name."""
    if format not in FORMATS:
        raise ValueError(f"Expected `format` among {tuple(FORMATS)}, got {format!r}.")
    return FORMATS[format]


def _blocks(fixed: Latents, flips: bool, size: int = 1024) -> Iterator[Block]:
    """Blocks `(x_1, its flip or x_1 again, labels)`."""
    count = len(fixed) // (2 if flips else 1)
    labels = fixed.labels
    for start in range(0, count, size):
        stop = min(start + size, count)
        x = fixed.rows(start, stop)
        flip = fixed.rows(count + start, count + stop) if flips else x
        yield x, flip, None if labels is None else labels[start:stop]
