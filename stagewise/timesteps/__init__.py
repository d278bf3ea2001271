"""How training draws its times: samplers with a density."""

from stagewise.timesteps.base import TimestepSampler, Uniform
from stagewise.timesteps.families import LogitNormal

__all__ = ["LogitNormal", "TimestepSampler", "Uniform"]
