"""Which rows of latents cannot be read, or are not finite."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagewise.latents.base import Latents

__all__ = ["unreadable"]


def unreadable(latents: Latents) -> list[str]:
    """What is wrong with rows of latents without chance (`fixed`), from reading them all."""
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
