"""Schemes that change during training."""

from __future__ import annotations

from stagewise import AtShare, LogitNormal, Mix, Oracle, Phase, Phases, Scheme, Uniform

__all__ = ["logit_normal_then_uniform"]


def logit_normal_then_uniform(oracle: Oracle, share: float = 0.6) -> Phases:
    """Logit-normal times for a `share` of the steps, then uniform ones.

    Both with the oracle's target up to the boundary.
    """
    target = Mix("boundary")
    first = Scheme(oracle, timesteps=LogitNormal(stratified=True), target=target)
    then = Scheme(oracle, timesteps=Uniform(stratified=True), target=target)
    return Phases([Phase(first, AtShare(share), "logit-normal"), Phase(then, name="uniform")])
