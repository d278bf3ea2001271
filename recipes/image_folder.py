"""Pictures in a folder, as an autoencoder takes them: found, cut to a square, read in parallel.

The cut is that of guided diffusion (ADM, Dhariwal and Nichol 2021): halve by a box filter while the
shorter side is at least twice `size`, bring it to `size` by bicubic interpolation, and keep the
square in the middle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["ImageList", "Pictures", "centre_crop", "collate", "find_images"]


@dataclass(frozen=True)
class ImageList:
    """The pictures of a folder, by class, then by name.

    Label i is that of `classes[i]`.
    """

    folder: Path
    files: list[str]  # names below it
    labels: list[int]
    classes: list[str]
    flat: bool  # no class folders, but one class

    def fingerprint(self) -> str:
        """What tells this list from another: 16 digits of the SHA-256 of names and labels."""
        lines = (f"{label} {file}\n" for file, label in zip(self.files, self.labels, strict=True))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def find_images(folder: Path) -> ImageList:
    """Lists pictures in sorted class folders (torchvision's `ImageFolder`), or in a flat folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder of images, got {folder}: no such folder.")
    loose = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in IMG_EXTENSIONS)
    folders = sorted(item.name for item in folder.iterdir() if item.is_dir())
    if loose and folders:
        raise ValueError(
            f"Expected class folders or images in {folder}, got both: {len(folders)} folders, such "
            f"as {folders[0]}, and {len(loose)} images, such as {loose[0]}. Move one or the other."
        )
    if folders and (folder / "dataset.json").is_file():
        raise ValueError(
            f"{folder} has a dataset.json, as the data sets of EDM2 and REPA have: its folders are "
            "no classes. Give the class folders that it was made of."
        )
    if loose:
        return ImageList(folder, loose, [0] * len(loose), ["0"], True)
    if not folders:
        raise ValueError(
            f"Expected images ({', '.join(IMG_EXTENSIONS)}) in {folder} or in class folders below "
            "it, got none."
        )
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"Expected images in every class folder of {folder}: {error}. Remove the empty folders "
            "if they are no classes."
        ) from error
    files = [Path(file).relative_to(folder).as_posix() for file, _ in found.samples]
    return ImageList(folder, files, [label for _, label in found.samples], found.classes, False)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The square in the middle of a picture, `size` by `size`; see the module."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class Pictures(Dataset[tuple[int, "Tensor | str"]]):
    """Pictures of a list: items `(index, (3, size, size) uint8)`, or the reason in its place.

    A picture that cannot be read is told and not raised: a loader would wrap the error in the
    trace of a worker, and end.
    """

    def __init__(self, images: ImageList, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        """The number of a picture and the picture, or why it cannot be read."""
        try:
            with Image.open(self.images.folder / self.images.files[index]) as picture:
                pixels = np.array(centre_crop(picture.convert("RGB"), self.size))
        except Exception as error:  # decoders raise what they like
            return index, " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return index, torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def collate(
    items: Sequence[tuple[int, Tensor | str]],
) -> tuple[list[int], Tensor | None, dict[int, str]]:
    """A batch: `(indices, pictures, broken)`; pictures (B, 3, H, W), None if all are broken."""
    broken = {index: held for index, held in items if isinstance(held, str)}
    whole = [(index, held) for index, held in items if isinstance(held, Tensor)]
    pictures = torch.stack([held for _, held in whole]) if whole else None
    return [index for index, _ in whole], pictures, broken
