"""Callbacks that watch and steer the stages of a training run, in Lightning or in a `Watch`."""

from stagewise.callbacks.forecast import Forecast
from stagewise.callbacks.memorization_guard import MemorizationGuard
from stagewise.callbacks.memorization_monitor import MemorizationMonitor
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.run import StageRun
from stagewise.callbacks.stage_scheme import StageScheme
from stagewise.callbacks.stage_transitions import StageTransitions
from stagewise.callbacks.training_bank import bank_from_trainer
from stagewise.callbacks.velocity_monitor import VelocityErrorMonitor
from stagewise.callbacks.watch import Watch

__all__ = [
    "Forecast",
    "MemorizationGuard",
    "MemorizationMonitor",
    "PosteriorMonitor",
    "StageRun",
    "StageScheme",
    "StageTransitions",
    "VelocityErrorMonitor",
    "Watch",
    "bank_from_trainer",
]
