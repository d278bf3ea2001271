"""What a model is trained on: the conditional target, pulled towards the oracle's."""

from stagewise.targets.base import Pull, Query, Target, mix_target
from stagewise.targets.sets import ReferenceSet
from stagewise.targets.whole import Mix

__all__ = [
    "Mix",
    "Pull",
    "Query",
    "ReferenceSet",
    "Target",
    "mix_target",
]
