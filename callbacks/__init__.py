"""Lightning callbacks that watch the stages of a training run."""

from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.training_bank import bank_from_trainer

__all__ = ["PosteriorMonitor", "bank_from_trainer"]
