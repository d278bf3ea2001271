"""Where other libraries make their targets, and how a scheme gets in there.

One file per library. Each is recognised by its interface and imported by nobody: a library that is
not installed costs nothing. Whatever counts time or signs its target in another way is translated
here and nowhere else.
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
