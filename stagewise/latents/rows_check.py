"""What is wrong with latents, from reading all of them: checksums, labels, rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stagewise.files import Problem, joined
from stagewise.latents.arrays import check_zip
from stagewise.tensor_files import Entry, check_tensor

if TYPE_CHECKING:
    from stagewise.latents.base import Latents

__all__ = ["compare_tensors", "compare_zip", "problems"]


def problems(latents: Latents) -> list[str]:
    """What is wrong with files, labels, rows and their flips; warns of files without checksums."""
    wrong, unknown = latents._compare()
    if unknown:
        warnings.warn(
            f"Not checked: {joined(unknown)} {'have' if len(unknown) > 1 else 'has'} no checksums. "
            "All numbers are read and must be finite; whether they are those that were written is "
            "not known.",
            stacklevel=3,
        )
    try:
        _ = latents.labels  # some formats read them when they are asked for
    except ValueError as error:
        wrong.append(str(error))
    return wrong + _unreadable(
        latents.with_options(flips="both" if latents.has_flips else "none", moments="mean")
    )


def compare_tensors(
    files: Iterable[tuple[Path, Mapping[str, Entry]]],
) -> tuple[list[str], list[Path]]:
    """What does not match its checksum in safetensors files, and the files that have none."""
    wrong, unknown = [], []
    for file, entries in files:
        try:
            if not all([check_tensor(file, entry) for entry in entries.values()]):
                unknown.append(file)
        except (Problem, OSError) as error:
            wrong.append(str(error))
    return wrong, unknown


def compare_zip(file: Path) -> tuple[list[str], list[Path]]:
    """The same of a file that may be a zip, whose format has checksums."""
    try:
        return [], [] if check_zip(file) else [file]
    except Problem as error:
        return [str(error)], []


def _unreadable(latents: Latents) -> list[str]:
    """What is wrong with rows of latents without chance."""
    wrong = []
    block = max(1, 2**22 // math.prod(latents.shape))
    for start in range(0, len(latents), block):
        stop = min(start + block, len(latents))
        with suppress(ValueError, OSError):
            if latents.rows(start, stop).isfinite().all():
                continue
        for index in range(start, stop):
            row, flip = latents._locate(index)
            name = f"row {row}{' (flip)' * flip}"
            try:
                if not latents.rows(index, index + 1).isfinite().all():
                    wrong.append(f"{name} has NaN or Inf. Encode it again.")
            except (ValueError, OSError) as error:
                wrong.append(f"{name} cannot be read: {error}")
    return wrong
