"""Finds where other libraries make their targets, and attaches a scheme there.

One file per library. Libraries are recognised by their interface and never imported, so none has to
be installed. Other conventions of time and sign are translated here and nowhere else.
"""

from stagewise.adapters.base import Detach, Seen, TargetMaker
from stagewise.adapters.diffusers import diffusers_target
from stagewise.adapters.find import (
    assumed_makers,
    find_couplings,
    find_target_makers,
    one_target_maker,
)
from stagewise.adapters.paths import LibraryPath, NoisedPath, ShrinkingPath

__all__ = [
    "Detach",
    "LibraryPath",
    "NoisedPath",
    "TargetMaker",
    "Seen",
    "ShrinkingPath",
    "assumed_makers",
    "diffusers_target",
    "find_couplings",
    "find_target_makers",
    "one_target_maker",
]
