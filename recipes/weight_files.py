"""Files of weights: read without running code, and compared with the network they are for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagewise.files import first_line

__all__ = ["read_weights", "require_entries"]

_MOST = 10  # entries that a message lists
_ALONE = "save its weights alone: torch.save(checkpoint['state_dict'], file)"


def read_weights(path: Path, cure: str = _ALONE) -> Any:
    """What a file of `torch.save` holds, on the CPU; ValueError, with a cure, if it is damaged."""
    try:
        # Checkpoints of SiT's training hold their command line.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise ValueError(
            f"{path} is no whole checkpoint of tensors and plain values: {first_line(error)}. Copy "
            f"it again, or {cure}."
        ) from error


def require_entries(path: Path, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuses a checkpoint whose names and shapes are not those of a network."""
    shapes = [{name: _shape(x) for name, x in held.items()} for held in (own, found)]
    wrong = [name for name in {**own, **found} if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        none = "no such entry"
        lines = [
            f"\n  {name}: {shapes[0].get(name, none)}, got {shapes[1].get(name, none)}"
            for name in wrong[:_MOST]
        ]
        more = f"\n  and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
        raise ValueError(
            f"{path} is a checkpoint of another model. {len(wrong)} entries differ (expected, "
            f"got):{''.join(lines)}{more}\nBuild the network with the sizes and switches of the "
            "checkpoint. Nothing was loaded."
        )


def _shape(entry: object) -> str:
    return str(tuple(entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__
