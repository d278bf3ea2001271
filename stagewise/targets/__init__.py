"""What a model is trained on: the conditional target, pulled towards the oracle's."""

from stagewise.targets.base import Pull, Query, Target, mix_target
from stagewise.targets.sets import ReferenceSet, Stratified
from stagewise.targets.whole import LeaveOneOut, Mix, Tempered

__all__ = [
    "LeaveOneOut",
    "Mix",
    "Pull",
    "Query",
    "ReferenceSet",
    "Stratified",
    "Target",
    "Tempered",
    "mix_target",
]
