"""`stagewise encode`: a folder of pictures to latents on disk, through an autoencoder of diffusers.

Each rank encodes a contiguous part of the pictures, block by block, and notes after each block how
far it is (`encode_record`). Whoever resumes goes on there, without reading a picture again. The
rank that is done last writes the statistics.
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
from stagewise.recipes.arguments import Parser, ends_in_a_line
from stagewise.recipes.autoencoder import VAE, encode, find_vae, fingerprint, load_vae, to_pixels
from stagewise.recipes.encode_record import SETTINGS, Record
from stagewise.recipes.encode_writers import WRITERS, Moments, Writer
from stagewise.recipes.image_folder import ImageList, Pictures, collate, find_images

__all__ = ["main", "parser", "run"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RESUME = "The same command with --resume goes on behind what is written."


def run(options: argparse.Namespace) -> None:
    """Encodes what the arguments name; refuses what cannot be used, before it begins."""
    rank, ranks, local = _ranks()
    images = _images(options, ranks)
    settings, device = _settings(options, images, ranks), _device(options.device, local)
    record = Record(options.out, rank, ranks, images, options.shard_size)
    record.begin(settings, options.resume)
    kind = WRITERS[options.format]
    writer = kind(options.out, images, rank, options.seed, _DTYPES[options.dtype])
    for damaged in record.compare(writer.files):
        print(damaged)
    if record.is_closed():
        print(f"{options.out} is complete already.")
        return
    if images.flat and rank == 0:
        print(
            f"{images.folder} has no class folders: all {len(images.files)} pictures are class 0."
        )
    if record.missing():
        vae = load_vae(options.vae, device, _DTYPES[options.precision])
        record.settle(settings | {"vae_weights": fingerprint(vae)})
        try:
            _encode(vae, images, writer, record, options)
        except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
            smaller = " Try a smaller --batch-size." * isinstance(error, torch.OutOfMemoryError)
            raise OSError(
                f"{str(error).rstrip('.')}.{smaller} {record.done} of {record.count} pictures are "
                f"written, and stay. {_RESUME}"
            ) from error
    notes = record.all_notes()
    if notes is None:
        print(f"Rank {rank} of {ranks} is done; the one that is done last writes the statistics.")
    else:
        _finish(writer, record, options.format, *notes)


def _encode(
    vae: VAE, images: ImageList, writer: Writer, record: Record, options: argparse.Namespace
) -> None:
    flips = options.flips and writer.takes_flips
    # Batches end with blocks, so that they are the same ones for whoever resumes.
    batches = [
        (block, record.indices(block)[at : at + options.batch_size])
        for block in record.missing()
        for at in range(0, len(record.indices(block)), options.batch_size)
    ]
    loader: DataLoader[Any] = DataLoader(
        Pictures(images, options.size),
        batch_sampler=[list(indices) for _, indices in batches],
        collate_fn=collate,
        num_workers=options.num_workers,
        pin_memory=vae.device.type == "cuda",
    )
    label = "encode" if record.ranks == 1 else f"rank 0 of {record.ranks}"
    about: dict[str, Any] = {"desc": label, "unit": " pictures", "disable": record.rank > 0}
    bar = tqdm(total=record.count, initial=record.done, **about)
    with bar:
        for (block, indices), batch in zip(batches, loader, strict=True):
            if batch.broken and not options.skip_broken:
                index, reason = next(iter(batch.broken.items()))
                raise ValueError(
                    f"{images.folder / images.files[index]} cannot be read ({reason}). Replace it, "
                    f"or leave out all such pictures: --skip-broken. {_RESUME}"
                )
            record.add(batch, indices)
            if batch.pictures is not None:
                pictures = batch.pictures.to(vae.device, non_blocking=True)
                x = to_pixels(pictures, writer.pixels_from)
                names = [images.files[index] for index in batch.indices]
                moments = _moments(vae, x, names)
                mirrored = _moments(vae, x.flip(-1), names) if flips else None
                writer.add(batch.indices, moments, mirrored)
            bar.update(len(indices))
            if indices[-1] == record.indices(block)[-1]:
                if record.with_rows(block):
                    writer.close(record.number(block))
                record.close_block(block, writer.files)


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
    """Writes what is over all rows, and looks at the result as its reader does."""
    out, images = record.folder, writer.images
    there = [at for at, name in enumerate(images.files) if name not in skipped]
    if not there:
        raise ValueError(f"None of the pictures in {images.folder} can be read; see {out}.")
    files = writer.finish(there)
    latents = open_latents(out, kind)
    if len(latents) != len(there):
        raise ValueError(
            f"Expected {len(there)} rows in {out}, got {len(latents)}: files were removed or added "
            "since they were written. Encode into another folder."
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
        print(f"Note: left out as no pictures, by their endings: {images.about_left_out()}.")
    said = f" --format {kind}" if latents.ambiguous else ""
    left = f", without {len(skipped)} pictures ({SETTINGS})" if skipped else ""
    classes = len(images.classes)
    print(
        f"{len(there)} rows of {latents.shape} {str(latents.dtype).removeprefix('torch.')} for "
        f"{latents.name}, {classes} class{'es' * (classes > 1)}{left}: {out}. "
        f"Next: stagewise profile {shlex.quote(str(out))}{said}"
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
    """What must be the same for whoever resumes; the weights are added when they are loaded."""
    vae, kind = find_vae(options.vae), WRITERS[options.format]
    if options.size % vae.factor:
        raise ValueError(
            f"Expected --size that {vae.factor} divides, the factor of {vae.name}, got "
            f"{options.size}."
        )
    channels = FORMATS[options.format].scaling.channels
    if channels not in (None, vae.channels):
        raise ValueError(
            f"Expected a vae with {channels} channels for {options.format}, got {vae.channels}."
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


def _ranks() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, ranks, local = (int(os.environ.get(name, value)) for name, value in names.items())
    if not 0 <= rank < ranks:
        raise ValueError(f"Expected RANK in 0 to {ranks - 1} (WORLD_SIZE), got {rank}.")
    return rank, ranks, local


def _device(name: str | None, local: int) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"Expected --device cpu, cuda, cuda:1 ..., got {name!r}.") from error
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"There is no {device}: {torch.cuda.device_count()} are found.")
    return device


def parser() -> Parser:
    """The arguments of `stagewise encode`."""
    made = Parser(
        prog="stagewise encode",
        description=(
            "Encode a folder of pictures into latents, through an AutoencoderKL of diffusers. "
            "Pictures are cut to a square as ADM does. A run that was stopped goes on with "
            "--resume."
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
    flips = (
        "encode mirrored pictures too, for lightningdit and mar; without, rows are stored in their "
        "place"
    )
    add = made.add_argument
    add("images", type=Path, help="a folder of class folders, or of pictures (one class)")
    add("out", type=Path, help="a new folder for the latents")
    vae = "a folder, a name on the hub, or VA-VAE's .pt"
    add("--vae", required=True, metavar="PATH_OR_NAME", help=vae)
    add("--format", choices=list(WRITERS), default="lightningdit", help=formats)
    add("--size", type=int, default=256, help="of the square, in pixels (%(default)s)")
    add("--batch-size", type=int, default=32, help="(%(default)s)")
    add("--num-workers", type=int, default=4, help="processes that read pictures (%(default)s)")
    add("--flips", action=argparse.BooleanOptionalAction, default=True, help=flips)
    add("--precision", choices=list(_DTYPES), default="float32", help="of the vae (%(default)s)")
    add("--dtype", choices=list(_DTYPES), default="float32", help="as stored (%(default)s)")
    add("--shard-size", type=int, default=10_000, help="pictures in a block (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--device", help="default the GPU of LOCAL_RANK, or else the CPU")
    add("--resume", action="store_true", help="go on behind what is written")
    add("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    return made


def main() -> None:
    """The entry point of `stagewise encode`."""
    with ends_in_a_line("encode"):
        try:
            run(parser().parse_args())
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f". {_RESUME}") from None


if __name__ == "__main__":
    main()
