"""How training draws its times: samplers with a density."""

from stagewise.timesteps.adaptive import LossAboveFloor, LossSecondMoment
from stagewise.timesteps.base import TimestepSampler, Uniform
from stagewise.timesteps.composed import Shifted, StageAware, WithFloor
from stagewise.timesteps.families import Beta, EDMLogNormal, LogitNormal, Mode, UShaped

__all__ = [
    "Beta",
    "EDMLogNormal",
    "LogitNormal",
    "LossAboveFloor",
    "LossSecondMoment",
    "Mode",
    "Shifted",
    "StageAware",
    "TimestepSampler",
    "UShaped",
    "Uniform",
    "WithFloor",
]
