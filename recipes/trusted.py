"""What the configuration of a run may call.

Hydra calls any function under `_target_`: `os.system`, or `numpy.load` of a file that holds code.
On a command line that is the user's choice, but the folder of a run may come from anybody. Its
data, model and objective are made from its configuration.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import OmegaConf

from stagewise.conventions import Convention, ddpm
from stagewise.latents import open_latents
from stagewise.losses import FlowMatchingLoss
from stagewise.paths import Path as ProbabilityPath
from stagewise.paths import Prediction
from stagewise.recipes.latents import LatentsData
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.photos import PhotoPatches
from stagewise.recipes.sit import SiT
from stagewise.timesteps import TimestepSampler
from stagewise.weights import Weight

__all__ = ["require_known"]

_PARTS = (PhotoPatches, LatentsData, open_latents, SiT, FlowMatchingLoss, FlowMatchingModule, ddpm)
_KINDS = (ProbabilityPath, Prediction, Convention, TimestepSampler, Weight)
"""Classes whose subclasses hold numbers, and read and write no files."""


def require_known(config: Mapping[str, Any], trust: Sequence[str], file: Path) -> None:
    """Refuses a configuration that calls anything but the parts of recipes and names in `trust`."""
    called, references = set(), False
    for key, value in _entries(OmegaConf.to_container(OmegaConf.create(dict(config)))):
        references |= isinstance(value, str) and "${" in value
        if key == "_target_" and value not in trust and not _is_known(value):
            called.add(str(value))
    if references:
        raise ValueError(
            f"Expected values in {file}, found references, ${{...}}, which `stagewise train` does "
            "not write. Replace them by their values."
        )
    if called:
        raise ValueError(
            f"{file} would call {', '.join(sorted(called))}, which is no part of a recipe and may "
            "do anything on this machine. If you trust the run: --trust "
            + shlex.join(sorted(called))
        )


def _entries(config: Any) -> Iterator[tuple[Any, Any]]:
    """All keys of dicts and places of lists, at any depth, with their values."""
    if isinstance(config, (dict, list)):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield key, value
            yield from _entries(value)


def _is_known(target: Any) -> bool:
    # By the object, not the name: `stagewise.files.os.system` is no part of stagewise.
    if not isinstance(target, str) or not target.startswith("stagewise."):
        return False
    found: Any = None
    with suppress(ValueError, ImportError, AttributeError):  # there is no such thing
        found = resolve_name(target)
    return found in _PARTS or (isinstance(found, type) and issubclass(found, _KINDS))
