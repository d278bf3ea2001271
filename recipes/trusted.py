"""What a run that is opened may call: a `config.yaml` from elsewhere can name any function.

Hydra calls what stands under `_target_`, wherever it comes from: `os.system`, or `numpy.load` of a
file that holds code. On a command line that is its writer's own choice. A folder of a run may come
from anybody, and what is made of its configuration is the data, the model and the objective.
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
"""Classes whose subclasses hold numbers, and neither read nor write files."""


def require_known(config: Mapping[str, Any], trust: Sequence[str], file: Path) -> None:
    """Refuses a configuration that calls anything but what recipes are made of.

    Args:
        config: The parts that are to be made.
        trust: What it may call besides, by the names that it has for them.
        file: Where it was read, for the message.

    Raises:
        ValueError: With what it would call, and the option that lets it.
    """
    called, references = set(), False
    for key, value in _entries(OmegaConf.to_container(OmegaConf.create(dict(config)))):
        references |= isinstance(value, str) and "${" in value
        if key == "_target_" and value not in trust and not _is_known(value):
            called.add(str(value))
    if references:
        raise ValueError(
            f"Expected values in {file}, found references, ${{...}}, which `stagewise train` "
            "does not write there. Write out what they stand for."
        )
    if called:
        raise ValueError(
            f"{file} would call {', '.join(sorted(called))}, which is no part of a recipe and may "
            "do anything on this machine. If the run is yours, or you know what that does: --trust "
            + shlex.join(sorted(called))
        )


def _entries(config: Any) -> Iterator[tuple[Any, Any]]:
    """All keys of dicts and places of lists, however deep, with their values."""
    if isinstance(config, (dict, list)):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield key, value
            yield from _entries(value)


def _is_known(target: Any) -> bool:
    # By what the name stands for: `stagewise.files.os.system` is a name that begins alike.
    if not isinstance(target, str) or not target.startswith("stagewise."):
        return False
    found: Any = None
    with suppress(ValueError, ImportError, AttributeError):  # there is no such thing
        found = resolve_name(target)
    return found in _PARTS or (isinstance(found, type) and issubclass(found, _KINDS))
