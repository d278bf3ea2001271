"""A real image data set without a download: patches of photographs inside installed wheels.

The wheels of scikit-image and scikit-learn carry seven colour photographs of everyday scenes, of
300 x 451 to 500 x 741 pixels. Left out are grey and synthetic images, those from microscope, fundus
camera and telescope (nearly all of one texture), and the right half of the stereo pair, which shows
the motorcycle again and would put held-out content into the training set.

`PhotoPatches` cuts them into small patches, labelled by photograph:

* **Held out by region.** A grid of `block` x `block` tiles covers each photograph; those of the
  last row and column may be smaller. A seeded share of the tiles is held out, and a patch stays
  inside its tile, so no held-out pixel is trained on.
* **Equal shares.** Every photograph gives the same number of patches, whatever its area, so the
  classes are balanced.
* **No flat patches.** 36 % of random patches are sky, backdrop or blur, nearly equal to each other.
  Their posterior hardly concentrates, and hides the stages of all others. So a patch needs a
  contrast of `min_contrast`.
"""

from __future__ import annotations

__all__ = ["PhotoPatches", "photographs"]

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stagewise.recipes.order import ResumableData

# name -> (import name, distribution, file inside the package)
_FILES = {
    "astronaut": ("skimage", "scikit-image", "data/astronaut.png"),
    "chelsea": ("skimage", "scikit-image", "data/chelsea.png"),
    "coffee": ("skimage", "scikit-image", "data/coffee.png"),
    "rocket": ("skimage", "scikit-image", "data/rocket.jpg"),
    "motorcycle": ("skimage", "scikit-image", "data/motorcycle_left.png"),
    "china": ("sklearn", "scikit-learn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "scikit-learn", "datasets/images/flower.jpg"),
}
_SPLITS = ("train", "held_out")


def photographs() -> dict[str, np.ndarray]:
    """The photographs in the installed wheels by name, `(H, W, 3)` uint8, in a fixed order."""
    return {name: _read(name, *where) for name, where in _FILES.items()}


class PhotoPatches(ResumableData):
    """Patches of photographs: items `(x_1, label)`, `(3, patch, patch)` in [-1, 1] and int64.

    All patches are in memory, as the `TensorDataset`s `train` and `held_out`. Cutting and shuffling
    do not use the global generator.

    Args:
        patch: Side of a patch in pixels, default 16.
        train_size: Training patches over all photographs, default 20 000.
        held_out_size: Held-out patches over all photographs, default 2000.
        block: Side of a tile in pixels, default 64. Larger tiles leave more positions for a patch,
            and keep held-out patches farther from trained pixels.
        held_out_share: Share of the tiles of every photograph that is held out, in (0, 1).
        min_contrast: Least standard deviation of a patch over its pixels, averaged over the
            colours, for pixels in [-1, 1]; default 0.05. 0 allows flat patches.
        batch_size: Of each rank, default 128.
        seed: Of tiles, positions and shuffling, default 0. Which tiles are held out does not depend
            on the two sizes.
        num_workers: Worker processes of each loader, default 0.

    Attributes:
        positions: From `setup` on, where the patches of "train" and "held_out" were taken, in their
            order, (N, 3), int64: index of the photograph, row and column of the top left pixel.

    Raises:
        ValueError: If an argument is out of range; from `setup`, if a photograph has too few
            tiles or positions.
    """

    train: TensorDataset
    held_out: TensorDataset

    def __init__(
        self,
        patch: int = 16,
        train_size: int = 20_000,
        held_out_size: int = 2_000,
        block: int = 64,
        held_out_share: float = 0.2,
        min_contrast: float = 0.05,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.patch, self.block, self.sizes = patch, block, (train_size, held_out_size)
        self.held_out_share, self.min_contrast = held_out_share, min_contrast
        self.positions: dict[str, np.ndarray] = {}
        names = ("patch", "train_size", "held_out_size", "batch_size")
        for name, value in zip(names, (patch, *self.sizes, batch_size), strict=True):
            if value < 1:
                raise ValueError(f"Expected `{name}` of at least 1, got {value}.")
        if patch > block:
            raise ValueError(
                f"Expected `patch` of at most `block`, since a patch lies inside one tile; "
                f"got patch={patch}, block={block}."
            )
        if not 0 < held_out_share < 1:
            raise ValueError(f"Expected `held_out_share` in (0, 1), got {held_out_share}.")
        if min_contrast < 0:
            raise ValueError(f"Expected `min_contrast` of at least 0, got {min_contrast}.")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the photographs; a label is an index into them."""
        return tuple(_FILES)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one patch, `(3, patch, patch)`."""
        return 3, self.patch, self.patch

    @property
    def num_classes(self) -> int:
        """The number of photographs."""
        return len(_FILES)

    def examples(self, classes: Sequence[int], count: int) -> Tensor:
        """The first training patches of some classes, (classes, count, 3, patch, patch)."""
        x1, labels = self.train.tensors
        return torch.stack([x1[labels == label][:count] for label in classes])

    def setup(self, stage: str | None = None) -> None:
        """Cuts the patches, once."""
        if self.positions:
            return
        images = list(photographs().values())
        corners = [self._corners(label, image) for label, image in enumerate(images)]
        for split, parts in zip(_SPLITS, zip(*corners, strict=True), strict=True):
            labels = np.repeat(np.arange(len(images)), [len(part) for part in parts])
            patches = [
                # All patches as a view: (H - patch + 1, W - patch + 1, 3, patch, patch).
                sliding_window_view(image, (self.patch, self.patch), axis=(0, 1))[
                    part[:, 0], part[:, 1]
                ]
                for image, part in zip(images, parts, strict=True)
            ]
            x_1 = torch.from_numpy(np.concatenate(patches)).float().div_(127.5).sub_(1)
            setattr(self, split, TensorDataset(x_1, torch.from_numpy(labels)))
            self.positions[split] = np.column_stack([labels, np.concatenate(parts)])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of `train`; the last, smaller one is dropped."""
        return self.train_loader(self.train)

    def val_dataloader(self) -> DataLoader:
        """All of `held_out`, in a fixed order."""
        return self.val_loader(self.held_out)

    def _corners(self, label: int, image: np.ndarray) -> list[np.ndarray]:
        """Draws the top left pixels, `(N, 2)` for each split, in one photograph."""
        # One generator per photograph, and tiles before patches: the held-out region does not
        # depend on the number of patches.
        rng = np.random.default_rng([self.seed, label])
        usable = _contrast(image, self.patch) >= self.min_contrast
        for axis in (0, 1):
            inside = np.arange(usable.shape[axis]) % self.block <= self.block - self.patch
            usable &= np.expand_dims(inside, 1 - axis)
        corners = np.argwhere(usable)
        row, column = (corners // self.block).T
        tile = row * image.shape[1] + column
        tiles = rng.permutation(np.unique(tile))
        name = self.class_names[label]
        if len(tiles) < 2:
            raise ValueError(
                f"Expected at least 2 tiles with usable patches in {name!r}, got {len(tiles)}; "
                f"lower `patch`, `block` or `min_contrast`."
            )
        count = min(max(round(self.held_out_share * len(tiles)), 1), len(tiles) - 1)
        held_out = np.isin(tile, tiles[:count])

        chosen = []
        for split, total, mask in zip(_SPLITS, self.sizes, (~held_out, held_out), strict=True):
            pool = corners[mask]
            size = len(range(label, total, len(_FILES)))  # equal shares, up to the remainder
            if size > len(pool):
                raise ValueError(
                    f"Asked for {size} {split} patches of {name!r}, which has {len(pool)} "
                    f"positions for them; lower `{split}_size` or `min_contrast`, or change "
                    f"`held_out_share`."
                )
            chosen.append(pool[rng.choice(len(pool), size, replace=False)])
        return chosen


def _read(name: str, package: str, distribution: str, file: str) -> np.ndarray:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The photograph {name!r} is part of {distribution}, which is not installed: "
            f"pip install {distribution}"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the photograph {name!r} at {path}, but this release of {distribution} "
            f"does not contain it. Install another: pip install --upgrade {distribution}"
        )
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _contrast(image: np.ndarray, patch: int) -> np.ndarray:
    """Standard deviation of every patch, averaged over the colours, for pixels in [-1, 1]."""
    # Integer moments over a summed-area table: exact, so a constant patch has contrast 0.
    n, total = patch * patch, np.float64(0)
    for colour in np.moveaxis(image.astype(np.int64), -1, 0):
        variance = n * _window_sums(colour**2, patch) - _window_sums(colour, patch) ** 2
        total = total + np.sqrt(variance)
    return total / image.shape[-1] / (n * 127.5)


def _window_sums(values: np.ndarray, patch: int) -> np.ndarray:
    """Sum of `(H, W)` over every patch x patch window, `(H - patch + 1, W - patch + 1)`."""
    for axis in (0, 1):
        total = np.insert(values.cumsum(axis), 0, 0, axis=axis).swapaxes(0, axis)
        values = (total[patch:] - total[:-patch]).swapaxes(0, axis)
    return values
