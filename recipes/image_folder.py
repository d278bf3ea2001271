"""Pictures in a folder: found, cut to a square, read in parallel.

The cut is that of guided diffusion (ADM, Dhariwal and Nichol 2021): halve by a box filter while the
shorter side is at least twice `size`, bring it to `size` by bicubic interpolation, and keep the
square in the middle.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from stagewise.recipes.to_rgb import to_rgb

__all__ = ["Batch", "ImageList", "Pictures", "centre_crop", "find_images"]


@dataclass(frozen=True)
class ImageList:
    """The pictures of a folder, by class, then by name."""

    folder: Path
    files: list[str]  # names below it
    labels: list[int]  # places in `classes`
    classes: list[str]
    flat: bool  # one class, without a folder
    left_out: list[str]  # other files that are not hidden

    def fingerprint(self) -> str:
        """16 digits of the SHA-256 of names and labels."""
        lines = (f"{label} {file}\n" for file, label in zip(self.files, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]

    def about_left_out(self) -> str:
        """The number of files left out, by ending, and an example of each."""
        endings = Counter(os.path.splitext(name)[1].lower() for name in self.left_out)
        first = {os.path.splitext(name)[1].lower(): name for name in reversed(self.left_out)}
        return ", ".join(
            f"{count} {ending or 'without an ending'} ({first[ending]})"
            for ending, count in endings.most_common(5)
        )


def find_images(folder: Path) -> ImageList:
    """Lists pictures in sorted class folders (as torchvision's `ImageFolder`), or in a flat one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder of images, got {folder}: no such folder.")
    items = sorted(folder.iterdir())
    folders = [item.name for item in items if item.is_dir()]
    here = [item.name for item in items if not item.is_dir()]
    loose, others = _by_ending(here)
    if loose and folders:
        raise ValueError(
            f"Expected class folders or images in {folder}, got both: {len(folders)} folders, such "
            f"as {folders[0]}, and {len(loose)} images, such as {loose[0]}. Move one of the two."
        )
    if folders and (folder / "dataset.json").is_file():
        raise ValueError(
            f"{folder} has a dataset.json, as in EDM2 and REPA, so its folders are no classes. "
            "Give the class folders that it was made from."
        )
    if loose:
        return ImageList(folder, loose, [0] * len(loose), ["0"], True, others)
    if not folders:
        raise ValueError(
            f"Expected images ({', '.join(IMG_EXTENSIONS)}) in {folder} or in class folders below "
            "it, got none."
        )
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(folders):
        before = len(files)
        for place, _, held in sorted(os.walk(folder / name, followlinks=True)):
            below = Path(place).relative_to(folder).as_posix()
            pictures, rest = _by_ending(sorted(held))
            files += [f"{below}/{file}" for file in pictures]
            others += [f"{below}/{file}" for file in rest]
        labels += [label] * (len(files) - before)
        empty += [name] * (len(files) == before)
    if empty:
        raise ValueError(
            f"Expected images in every class folder of {folder}, got none in {len(empty)}, such as "
            f"{empty[0]}. Remove the empty folders if they are no classes."
        )
    return ImageList(folder, files, labels, folders, False, others)


def _by_ending(names: Sequence[str]) -> tuple[list[str], list[str]]:
    pictures = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    taken = set(pictures)
    return pictures, [name for name in names if name not in taken and not name.startswith(".")]


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The square in the middle of a picture, `size` by `size`, cut as in ADM."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def read_stamped(file: Path) -> tuple[tuple[int, int], bytes]:
    """The stamp and a hash of a file, and its contents."""
    with open(file, "rb") as stream:
        mark, data = stamp(os.fstat(stream.fileno())), stream.read()
    return (mark, _number(data)), data


def stamp(about: os.stat_result) -> int:
    """A number that changes when a file is written, replaced or copied; reads no contents."""
    return _number(f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}".encode())


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


class Batch(NamedTuple):
    """Pictures (B, 3, size, size) uint8, None if all are broken, with their numbers."""

    indices: list[int]
    pictures: Tensor | None
    broken: dict[int, str]  # why others cannot be read
    notes: dict[int, list[str]]  # what `to_rgb` changed
    stamps: list[tuple[int, int]]  # of all files, with a hash


class Pictures(Dataset[Batch]):
    """Batches of pictures of a list, by their numbers.

    Unreadable pictures are named with the reason: a loader would end at an error.
    """

    def __init__(self, images: ImageList, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The pictures that can be read, and why others cannot."""
        whole: dict[int, Tensor] = {}
        noted: dict[int, list[str]] = {}
        broken, stamps = {}, []
        for index in indices:
            mark = (0, 0)
            try:
                mark, data = read_stamped(self.images.folder / self.images.files[index])
                with Image.open(io.BytesIO(data)) as picture:
                    upright, notes = to_rgb(picture)
                    pixels = np.array(centre_crop(upright, self.size))
                whole[index] = torch.from_numpy(pixels).permute(2, 0, 1)
                if notes:
                    noted[index] = notes
            except Exception as error:  # decoders raise what they like
                broken[index] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            stamps.append(mark)
        pictures = torch.stack(list(whole.values())) if whole else None
        return Batch(list(whole), pictures, broken, noted, stamps)
