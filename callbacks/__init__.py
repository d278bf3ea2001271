"""Lightning callbacks that watch and steer the stages of a training run."""

from stagewise.callbacks.forecast import Forecast
from stagewise.callbacks.memorization_guard import MemorizationGuard
from stagewise.callbacks.memorization_monitor import MemorizationMonitor
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.run import StageRun
from stagewise.callbacks.stage_scheme import StageScheme
from stagewise.callbacks.stage_transitions import StageTransitions
from stagewise.callbacks.training_bank import bank_from_trainer
from stagewise.callbacks.velocity_monitor import VelocityErrorMonitor

__all__ = [
    "Forecast",
    "MemorizationGuard",
    "MemorizationMonitor",
    "PosteriorMonitor",
    "StageRun",
    "StageScheme",
    "StageTransitions",
    "VelocityErrorMonitor",
    "bank_from_trainer",
]
