"""What a scheme trains on, in words."""

from __future__ import annotations

from stagewise.lambdas import Constant, Hard
from stagewise.schemes.phases import Phases
from stagewise.schemes.scheme import Scheme
from stagewise.targets import Mix

__all__ = ["in_words"]


def in_words(scheme: Scheme | Phases) -> str:
    """The target of a scheme, its smoothing, times and weights; phases one after the other."""
    if isinstance(scheme, Phases):
        ends = [f" until {phase.until!r}" if phase.until else "" for phase in scheme.phases]
        words = [in_words(phase.scheme) for phase in scheme.phases]
        return "; then ".join(text + end for text, end in zip(words, ends, strict=True))
    parts = [_target(scheme)]
    if scheme.smoothing is not None:
        collapsed = _at(scheme.collapsed, "the collapsed boundary")
        own = "with a strength that is a function of t"
        where = f"after {collapsed}" if scheme._needs_collapsed else own
        rows = f"smoothed rows ({scheme.smoothing.neighbours} neighbours) {where}"
        parts.append(f"{rows} (monitors compare with the rows)")
    if scheme._draws_timesteps:
        parts.append(f"t drawn by {_name(scheme._sampler)}")
    if scheme.weight is not None:
        parts.append(f"weights of {_name(scheme.weight)}")
    if scheme.preserve_objective:
        parts.append("weighted as if t were uniform")
    return ", ".join(parts)


def _target(scheme: Scheme) -> str:
    if scheme.target is None:
        return "the plain target"
    mixes, lam = isinstance(scheme.target, Mix), scheme.target.lam
    name = "the oracle's target" if mixes else f"the target of {_name(scheme.target)}"
    if isinstance(lam, Hard):
        return f"{name} up to {_at(scheme.boundary, 'the boundary')}, the plain target after it"
    if lam == Constant(1.0):
        return f"{name} at all t"
    share = f"lambda = {lam.value:g}" if isinstance(lam, Constant) else f"lambda = {lam!r}"
    known = f" (boundary {_at(scheme.boundary, 'not known')})" if lam.needs_boundary else ""
    return f"a mix of the plain target and {name}, {share}{known}"


def _at(t: float | None, unknown: str) -> str:
    return unknown if t is None else f"t = {t:.3f}"


def _name(part: object) -> str:
    """The name of a function, or of the class of an object."""
    name: str = getattr(part, "__name__", type(part).__name__)
    return "a function of t" if name == "<lambda>" else name
