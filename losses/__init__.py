"""Objectives built on a path: plain `nn.Module`s that need neither Lightning nor a callback."""

from stagewise.losses.flow_matching import FlowMatchingLoss, LossRecord
from stagewise.losses.regularizer import OracleRegularizer
from stagewise.losses.weighted import StageWeightedLoss

__all__ = ["FlowMatchingLoss", "LossRecord", "OracleRegularizer", "StageWeightedLoss"]
