"""stagewise: see, and use, the two stages of flow-matching and diffusion training.

Floor 1, the science, in plain torch. Losses live in `stagewise.losses`, Lightning callbacks in
`stagewise.callbacks`, runnable recipes in `stagewise.recipes`.
"""

from stagewise.bank import LatentBank
from stagewise.batches import find_sample
from stagewise.certificate import Certificate
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
from stagewise.stages import StageBoundary, StageCurve, predicted_boundary
from stagewise.timesteps import LogitNormal, TimestepSampler, Uniform

__version__ = "0.1.0"

__all__ = [
    "DIFFUSERS",
    "STAGEWISE",
    "Certificate",
    "Convention",
    "CosinePath",
    "EDMPath",
    "LatentBank",
    "LinearPath",
    "LogitNormal",
    "Oracle",
    "Path",
    "PathCoefficients",
    "Posterior",
    "Prediction",
    "StageBoundary",
    "StageCurve",
    "TimestepSampler",
    "Uniform",
    "VPPath",
    "find_sample",
    "merge",
    "predicted_boundary",
]
