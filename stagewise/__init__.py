"""stagewise: see, and use, the two stages of flow-matching and diffusion training.

Floor 1, the science, in plain torch. Losses live in `stagewise.losses`, callbacks for Lightning and
for loops of one's own (`stagewise.Watch`) in `stagewise.callbacks`, recipes in `stagewise.recipes`.
"""

from importlib import import_module
from typing import Any

from stagewise.attention import GaussianAttention
from stagewise.bank import LatentBank
from stagewise.batches import find_sample
from stagewise.certificate import Certificate
from stagewise.condition import Condition, ConditionedOracle
from stagewise.conventions import DIFFUSERS, STAGEWISE, Convention, ddpm
from stagewise.forecast import (
    SmoothingForecast,
    TargetForecast,
    forecast_smoothing,
    forecast_targets,
)
from stagewise.lambdas import Concentration, Smooth
from stagewise.latents import open_latents
from stagewise.oracle import Oracle
from stagewise.paths import (
    CosinePath,
    EDMPath,
    LinearPath,
    Path,
    PathCoefficients,
    Prediction,
    VPPath,
    same_path,
)
from stagewise.posterior import Posterior, merge
from stagewise.profile import Profile
from stagewise.reservoir import Reservoir
from stagewise.schemes import Phase, Phases, Scheme, SchemeRecord, sources
from stagewise.smoothed_oracle import SmoothedOracle
from stagewise.smoothing import Smoothing
from stagewise.spectrum import predicted_boundary
from stagewise.stage_target import StageTarget
from stagewise.stages import StageBoundary, StageCurve
from stagewise.targets import (
    Mix,
    ReferenceSet,
    Target,
    mix_target,
)
from stagewise.timesteps import (
    Beta,
    EDMLogNormal,
    LogitNormal,
    LossAboveFloor,
    LossSecondMoment,
    Mode,
    Shifted,
    StageAware,
    TimestepSampler,
    Uniform,
    UShaped,
    WithFloor,
)
from stagewise.transitions import AtEvent, AtPlateau, AtShare, AtStep
from stagewise.weights import P2, EDMWeight, InverseFloor, MinSNR, StageFactors, StageGate, Weight

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Watch":  # of a row above, which needs matplotlib
        return import_module("stagewise.callbacks").Watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DIFFUSERS",
    "P2",
    "STAGEWISE",
    "AtEvent",
    "AtPlateau",
    "AtShare",
    "AtStep",
    "Beta",
    "Certificate",
    "Concentration",
    "Condition",
    "ConditionedOracle",
    "Convention",
    "CosinePath",
    "EDMLogNormal",
    "EDMPath",
    "EDMWeight",
    "GaussianAttention",
    "InverseFloor",
    "LatentBank",
    "LinearPath",
    "LogitNormal",
    "LossAboveFloor",
    "LossSecondMoment",
    "MinSNR",
    "Mix",
    "Mode",
    "Oracle",
    "Path",
    "PathCoefficients",
    "Phase",
    "Phases",
    "Posterior",
    "Prediction",
    "Profile",
    "ReferenceSet",
    "Reservoir",
    "Scheme",
    "SchemeRecord",
    "Shifted",
    "Smooth",
    "SmoothedOracle",
    "Smoothing",
    "SmoothingForecast",
    "StageAware",
    "StageBoundary",
    "StageCurve",
    "StageFactors",
    "StageGate",
    "StageTarget",
    "Target",
    "TargetForecast",
    "TimestepSampler",
    "UShaped",
    "Uniform",
    "VPPath",
    "Weight",
    "WithFloor",
    "ddpm",
    "find_sample",
    "forecast_smoothing",
    "forecast_targets",
    "merge",
    "mix_target",
    "open_latents",
    "predicted_boundary",
    "same_path",
    "sources",
]
