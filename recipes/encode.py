"""`stagewise encode`: from a folder of pictures to latents, with an autoencoder of diffusers.

Each rank encodes a contiguous part of the pictures, block by block, and records its progress after
each block (`encode_record`). A resumed run continues there, without reading a picture again. The
rank that finishes last writes the statistics.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from stagewise.latents import open_latents
from stagewise.latents.opening import FORMATS
from stagewise.recipes.arguments import DTYPES, Parser, device_of, exit_with_message
from stagewise.recipes.autoencoder import VAE, encode, find_vae, fingerprint, load_vae, to_pixels
from stagewise.recipes.encode_record import SETTINGS, Record
from stagewise.recipes.encode_writers import WRITERS, Moments, Writer
from stagewise.recipes.image_folder import ImageList, Pictures, find_images

__all__ = ["main", "parser", "run"]

_RESUME = "To continue, repeat the command with --resume."


def run(options: argparse.Namespace) -> None:
    """Encodes what the arguments name; refuses what cannot be used before it begins."""
    rank, ranks = (int(os.environ.get(*each)) for each in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not 0 <= rank < ranks:
        raise ValueError(f"Expected RANK in 0 to {ranks - 1} (WORLD_SIZE), got {rank}.")
    images = _images(options, ranks)
    settings, device = _settings(options, images, ranks), device_of(options.device)
    kind = WRITERS[options.format]
    writer = kind(options.out, images, rank, options.seed, DTYPES[options.dtype])
    record = Record(options.out, rank, ranks, images, options.shard_size, writer.files)
    record.begin(settings, options.resume)
    for damaged in record.drop_damaged():
        print(damaged)
    if record.is_closed():
        print(f"{options.out} is complete already.")
        return
    if images.flat and rank == 0:
        print(
            f"{images.folder} has no class folders: all {len(images.files)} pictures are class 0."
        )
    if record.missing():
        vae = load_vae(options.vae, device, DTYPES[options.precision])
        record.write_settings(settings | {"vae_weights": fingerprint(vae)})
        try:
            _encode(vae, images, writer, record, options)
        except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
            smaller = " Try a smaller --batch-size." * isinstance(error, torch.OutOfMemoryError)
            raise OSError(
                f"{str(error).rstrip('.')}.{smaller} {record.done} of {record.count} pictures are "
                f"written. {_RESUME}"
            ) from error
    notes = record.all_notes()
    if notes is None:
        print(f"Rank {rank} of {ranks} is done. The rank that finishes last writes the statistics.")
    else:
        _finish(writer, record, options.format, *notes)


def _encode(
    vae: VAE, images: ImageList, writer: Writer, record: Record, options: argparse.Namespace
) -> None:
    flips = options.flips and writer.takes_flips
    # Batches end with blocks, so that a resumed run has the same ones.
    batches = [
        (block, record.indices(block)[at : at + options.batch_size])
        for block in record.missing()
        for at in range(0, len(record.indices(block)), options.batch_size)
    ]
    loader: DataLoader[Any] = DataLoader(
        Pictures(images, options.size),
        batch_size=None,  # the data set makes batches itself
        sampler=[list(indices) for _, indices in batches],
        num_workers=options.num_workers,
        pin_memory=vae.device.type == "cuda",
    )
    label = "encode" if record.ranks == 1 else f"rank 0 of {record.ranks}"
    about: dict[str, Any] = {"desc": label, "unit": " pictures", "disable": record.rank > 0}
    with tqdm(total=record.count, initial=record.done, **about) as bar:
        for (block, indices), batch in zip(batches, loader, strict=True):
            if batch.broken and not options.skip_broken:
                index, reason = next(iter(batch.broken.items()))
                raise ValueError(
                    f"{images.folder / images.files[index]} cannot be read ({reason}). Replace it, "
                    f"or leave out all broken pictures: --skip-broken. {_RESUME}"
                )
            record.add(batch, indices)
            if batch.pictures is not None:
                pictures = batch.pictures.to(vae.device, non_blocking=True)
                x = to_pixels(pictures, writer.pixels_from)
                names = [images.files[index] for index in batch.indices]
                mirrored = _moments(vae, x.flip(-1), names) if flips else None
                writer.add(batch.indices, _moments(vae, x, names), mirrored)
            bar.update(len(indices))
            if indices[-1] == record.indices(block)[-1]:
                if record.with_rows(block):
                    writer.close(record.number(block))
                record.close_block(block)


def _moments(vae: VAE, x: Tensor, names: list[str]) -> Moments:
    mean, std = (value.cpu().contiguous() for value in encode(vae, x))
    finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1)
    if not finite.all():
        name = names[int((~finite).nonzero()[0, 0])]
        cure = (
            "The weights are damaged." if vae.dtype == torch.float32 else "Use --precision float32."
        )
        raise ValueError(f"The autoencoder gives NaN or Inf for {name} in {vae.dtype}. {cure}")
    return mean, std


def _finish(
    writer: Writer, record: Record, kind: Any, skipped: dict[str, str], converted: dict[str, Any]
) -> None:
    """Writes the files over all rows, and opens the result to check it."""
    out, images = record.folder, writer.images
    there = [at for at, name in enumerate(images.files) if name not in skipped]
    if not there:
        raise ValueError(f"None of the pictures in {images.folder} can be read; see {out}.")
    files = writer.finish(there)
    latents = open_latents(out, kind)
    if len(latents) != len(there):
        raise ValueError(
            f"Expected {len(there)} rows in {out}, got {len(latents)}: files were added or removed "
            "after they were written. Encode into another folder."
        )
    try:
        latents.check_scale()
    except ValueError as error:
        print(f"Note: {error}")
    about = {"rows": len(there), "skipped": skipped, "converted": converted}
    record.close(about, files)
    for note, held in converted.items():
        many = f"{held['count']} picture{'s' * (held['count'] > 1)}"
        print(f"Note: {note}: {many}, such as {held['names'][0]} ({SETTINGS}).")
    if images.left_out:
        found = images.about_left_out()
        print(f"Note: left out, since their endings are not those of pictures: {found}.")
    form = f" --format {kind}" if latents.ambiguous else ""
    left = f", without {len(skipped)} pictures ({SETTINGS})" if skipped else ""
    classes = len(images.classes)
    print(
        f"{len(there)} rows of {latents.shape} {str(latents.dtype).removeprefix('torch.')} for "
        f"{latents.name}, {classes} class{'es' * (classes > 1)}{left}: {out}. "
        f"Next: stagewise profile {shlex.quote(str(out))}{form}"
    )


def _images(options: argparse.Namespace, ranks: int) -> ImageList:
    for name in ("size", "batch_size", "shard_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} of at least 1.")
    if options.dtype == "bfloat16" and options.format != "lightningdit":
        raise ValueError(f"Expected --dtype float32 or float16 for {options.format}: .npy files.")
    if options.out.resolve().is_relative_to(options.images.resolve()):
        raise ValueError(
            f"Expected a folder outside of {options.images}, got {options.out}: it would be taken "
            "for a class."
        )
    images = find_images(options.images)
    if len(images.files) < ranks:
        raise ValueError(
            f"Expected at least as many pictures as ranks, got {len(images.files)} and {ranks}."
        )
    return images


def _settings(options: argparse.Namespace, images: ImageList, ranks: int) -> dict[str, Any]:
    """What must not change when a run is resumed; the hash of the weights is added later."""
    vae, kind = find_vae(options.vae), WRITERS[options.format]
    if options.size % vae.factor:
        raise ValueError(
            f"Expected --size divisible by {vae.factor}, the factor of {vae.name}, got "
            f"{options.size}."
        )
    channels = FORMATS[options.format].scaling.channels
    if channels not in (None, vae.channels):
        raise ValueError(
            f"Expected a --vae with {channels} channels for {options.format}, got {vae.channels}."
        )
    given = ("format", "size", "precision", "dtype", "seed", "shard_size")
    return {
        "vae": vae.name,
        **{name: getattr(options, name) for name in given},
        "pixels": [kind.pixels_from, 1.0],
        "flips": options.flips and kind.takes_flips,
        "ranks": ranks,
        "images": len(images.files),
        "image_list": images.fingerprint(),
    }


def parser() -> Parser:
    """The arguments of `stagewise encode`."""
    made = Parser(
        prog="stagewise encode",
        description=(
            "Encode a folder of pictures into latents with an AutoencoderKL of diffusers. Pictures "
            "are cut to a square as in ADM. --resume continues a run that was stopped."
        ),
        epilog=(
            "examples: stagewise encode imagenet/train latents --vae stabilityai/sd-vae-ft-mse | "
            "torchrun --nproc-per-node 8 -m stagewise.recipes.encode imagenet/train latents "
            "--vae stabilityai/sd-vae-ft-mse --resume"
        ),
    )
    formats = (
        "lightningdit: raw samples in shards; repa: mean and std; edm2: the same, of pixels in "
        "[0, 1] (the others: [-1, 1]); mar: mean and log-variance (%(default)s)"
    )
    flips = "for lightningdit and mar: encode mirrored pictures, else the rows are stored twice"
    add = made.add_argument
    add("images", type=Path, help="a folder of class folders, or of pictures (one class)")
    add("out", type=Path, help="a new folder for the latents")
    vae = "a folder, a name on the hub, or VA-VAE's .pt"
    add("--vae", required=True, metavar="PATH_OR_NAME", help=vae)
    add("--format", choices=list(WRITERS), default="lightningdit", help=formats)
    add("--size", type=int, default=256, help="side of the square in pixels (%(default)s)")
    add("--batch-size", type=int, default=32, help="(%(default)s)")
    add("--num-workers", type=int, default=4, help="processes that read pictures (%(default)s)")
    add("--flips", action=argparse.BooleanOptionalAction, default=True, help=flips)
    add("--precision", choices=list(DTYPES), default="float32", help="of the vae (%(default)s)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the files (%(default)s)")
    add("--shard-size", type=int, default=10_000, help="pictures in a block (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps (the GPU of LOCAL_RANK, or the CPU)")
    add("--resume", action="store_true", help="continue a run that was stopped")
    add("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    return made


def main() -> None:
    """The entry point of `stagewise encode`."""
    with exit_with_message("encode"):
        try:
            run(parser().parse_args())
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f". {_RESUME}") from None


if __name__ == "__main__":
    main()
