"""stagewise: see, and use, the two stages of flow-matching and diffusion training.

Floor 1, the science, in plain torch. Losses live in `stagewise.losses`, Lightning callbacks in
`stagewise.callbacks`, runnable recipes in `stagewise.recipes`.
"""

from stagewise.bank import LatentBank
from stagewise.batches import find_sample
from stagewise.certificate import Certificate
from stagewise.lambdas import Concentration, Smooth
from stagewise.oracle import Oracle
from stagewise.paths import (
    DIFFUSERS,
    STAGEWISE,
    Convention,
    CosinePath,
    EDMPath,
    LinearPath,
    Path,
    PathCoefficients,
    Prediction,
    VPPath,
)
from stagewise.posterior import Posterior, merge
from stagewise.schemes import Phase, Phases, Scheme, SchemeRecord
from stagewise.stages import StageBoundary, StageCurve, predicted_boundary
from stagewise.targets import Mix, Target, mix_target
from stagewise.timesteps import LogitNormal, TimestepSampler, Uniform
from stagewise.transitions import AtPlateau, AtShare, AtStep
from stagewise.weights import Weight

__version__ = "0.1.0"

__all__ = [
    "DIFFUSERS",
    "STAGEWISE",
    "AtPlateau",
    "AtShare",
    "AtStep",
    "Certificate",
    "Concentration",
    "Convention",
    "CosinePath",
    "EDMPath",
    "LatentBank",
    "LinearPath",
    "LogitNormal",
    "Mix",
    "Oracle",
    "Path",
    "PathCoefficients",
    "Phase",
    "Phases",
    "Posterior",
    "Prediction",
    "Scheme",
    "SchemeRecord",
    "Smooth",
    "StageBoundary",
    "StageCurve",
    "Target",
    "TimestepSampler",
    "Uniform",
    "VPPath",
    "Weight",
    "find_sample",
    "merge",
    "mix_target",
    "predicted_boundary",
]
