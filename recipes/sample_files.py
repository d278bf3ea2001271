"""The files of `stagewise sample`: parts by batch, joined into one file; and its ranks.

Every batch of samples is a file of its own until all are there, so that a killed run can be resumed
with any number of ranks. The joined file is that of the evaluation suite of ADM
(openai/guided-diffusion): `arr_0`, uint8 (N, H, W, 3), and `arr_1`, labels, in an npz.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.utils import make_grid, save_image

from stagewise.files import Problem, joined, replace_file
from stagewise.latents.arrays import array_entry, check_zip, save_arrays

__all__ = ["Ranks", "SampleFolder", "group_of_ranks"]

_SETTINGS, _PARTS = "settings.json", "parts"
_NAMES = {"pictures": "samples.npz", "latents": "latents.npz"}


@dataclass(frozen=True)
class Ranks:
    """The processes that share the batches, and how long they wait for each other."""

    rank: int = 0
    count: int = 1
    minutes: float = 30.0

    def say(self, text: str) -> None:
        """Prints on the first rank."""
        if self.rank == 0:
            print(text)

    def first(self, action: Callable[[], object]) -> None:
        """Does something on rank 0; its ValueError or OSError is a ValueError on every rank."""
        error: list[str | None] = [None]
        if self.rank == 0:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = [str(caught)]
        if self.count > 1:
            dist.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise ValueError(error[0])

    def wait(self) -> None:
        """Waits for all ranks; a TimeoutError names those that are late."""
        if self.count == 1:
            return
        try:
            dist.monitored_barrier(timeout=timedelta(minutes=self.minutes), wait_all_ranks=True)
        except RuntimeError as error:
            raise TimeoutError(
                f"Rank {self.rank} waited for the others, {self.minutes:g} minutes at most: "
                f"{error}. Finished samples are kept: run it again with --resume, or wait longer "
                "with --timeout."
            ) from error


@contextmanager
def group_of_ranks(minutes: float) -> Iterator[Ranks]:
    """The ranks of torchrun, or one rank without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    rank = int(os.environ["RANK"])
    try:
        # Samples go through files; ranks only wait for each other.
        dist.init_process_group("gloo", timeout=timedelta(minutes=minutes))
    except RuntimeError as error:
        raise TimeoutError(f"Rank {rank} did not find the other {count - 1}: {error}") from error
    try:
        yield Ranks(rank, count, minutes)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class SampleFolder:
    """The output of one call: `count` samples in parts of `batch_size`."""

    path: Path
    kind: str  # "pictures" (uint8, (H, W, 3)) or "latents" (float32, (C, H, W))
    count: int
    batch_size: int

    @property
    def file(self) -> Path:
        """The joined samples."""
        return self.path / _NAMES[self.kind]

    @property
    def batches(self) -> list[range]:
        """The indices of each batch."""
        size = self.batch_size
        return [range(at, min(at + size, self.count)) for at in range(0, self.count, size)]

    def start(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the folder, or checks that its samples were made with these settings.

        Raises:
            ValueError: If it holds samples and `resume` is false, or with other settings.
            OSError: If it cannot be written.
        """
        about = self.path / _SETTINGS
        held = [name for name in _NAMES.values() if (self.path / name).exists()]
        held += [_PARTS] * any((self.path / _PARTS).glob("*.npz"))
        if held and not resume:
            raise ValueError(
                f"{self.path} holds samples already ({', '.join(held)}). To continue them: "
                "--resume. To write elsewhere: --out."
            )
        if held:
            _require_same(about, settings)
        if self.file.exists() and not _is_whole(self.file):
            raise ValueError(
                f"{self.file} is damaged. Delete it, and repeat the command to make it again."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(settings), indent=1, allow_nan=False) + "\n"
        if not held:
            replace_file(about, lambda path: path.write_text(text))
        if not self.file.exists():
            (self.path / _PARTS).mkdir(exist_ok=True)

    def missing(self, rank: int, ranks: int) -> list[int]:
        """The batches of a rank that are missing or, with a message, damaged."""
        if self.file.exists():
            return []
        missing = []
        for batch in range(rank, len(self.batches), ranks):
            part = self._part(batch)
            if not part.exists():
                missing.append(batch)
            elif not _is_whole(part):
                print(f"{part} is damaged: its samples are made again.")
                missing.append(batch)
        return missing

    def write(self, batch: int, samples: Tensor, labels: Tensor | None) -> None:
        """Writes one batch."""
        more = {} if labels is None else {"arr_1": labels}
        save_arrays(self._part(batch), {"arr_0": samples, **more})

    def join(self) -> None:
        """Joins the parts into one file, with one in memory at a time, and deletes them.

        Raises:
            ValueError: If parts are missing or of another size.
        """
        if not self.file.exists():
            parts = range(len(self.batches))
            if missing := [batch for batch in parts if not self._part(batch).exists()]:
                raise ValueError(
                    f"Expected {len(self.batches)} batches in {self.path / _PARTS}, missing: "
                    f"{joined(missing)}. Make them: --resume."
                )
            replace_file(self.file, self._join)
        if (self.path / _PARTS).exists():
            shutil.rmtree(self.path / _PARTS)

    def grid(self, count: int) -> tuple[Path, str]:
        """Draws the first samples in a grid; the PNG, and what it shows."""
        entry, count = array_entry(self.file, "arr_0.npy"), min(count, self.count)
        assert entry is not None
        x = entry.rows(0, count)
        name, about = "grid.png", f"the first {count} samples"
        if self.kind == "pictures":
            shown = x.permute(0, 3, 1, 2) / 255
        else:
            channels = 3 if x.shape[1] >= 3 else 1
            shown = _to_range(x[:, :channels])
            which = "channels 0 to 2 as red, green and blue" if channels == 3 else "channel 0"
            name = "grid_latent_channels.png"
            about += f" as latents, not decoded: {which}, each scaled to its range"
        picture = make_grid(shown, nrow=math.ceil(math.sqrt(count)), padding=1, pad_value=1.0)
        replace_file(self.path / name, lambda path: save_image(picture, path, format="PNG"))
        return self.path / name, about

    def _part(self, batch: int) -> Path:
        return self.path / _PARTS / f"{batch:06d}.npz"

    def _join(self, path: Path) -> None:
        with np.load(self._part(0), allow_pickle=False) as part:
            kinds = {name: (part[name].dtype, part[name].shape[1:]) for name in part.files}
        with zipfile.ZipFile(path, "w") as archive:
            for name, (dtype, shape) in kinds.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {
                        "descr": np.lib.format.dtype_to_descr(dtype),
                        "fortran_order": False,
                        "shape": (self.count, *shape),
                    }
                    np.lib.format.write_array_header_1_0(member, header)
                    for batch, indices in enumerate(self.batches):
                        with np.load(self._part(batch), allow_pickle=False) as part:
                            rows = part[name]
                        if rows.dtype != dtype or rows.shape != (len(indices), *shape):
                            raise ValueError(
                                f"Expected {dtype} of shape {(len(indices), *shape)} as {name} in "
                                f"{self._part(batch)}, got {rows.dtype} of {rows.shape}. Delete "
                                "that file and make it again: --resume."
                            )
                        member.write(rows.tobytes())


def _is_whole(file: Path) -> bool:
    try:
        return check_zip(file)
    except Problem:
        return False


def _require_same(about: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads(about.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected {about.name} beside the samples in {about.parent}, with the settings they "
            "were made with, but it cannot be read. Write elsewhere: --out."
        ) from error
    now = json.loads(json.dumps(dict(settings)))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys:
        listed = "; ".join(f"{key}: {before.get(key)} there, {now.get(key)} now" for key in keys)
        raise ValueError(
            f"{about.parent} holds samples made with other settings: {listed}. Use the same, or "
            "write elsewhere: --out."
        )


def _to_range(x: Tensor) -> Tensor:
    """Scales each channel of (B, C, H, W) to [0, 1]."""
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)
