"""Objectives built on a path: plain `nn.Module`s that need neither Lightning nor a callback."""

from stagewise.losses.flow_matching import FlowMatchingLoss, LossRecord

__all__ = ["FlowMatchingLoss", "LossRecord"]
