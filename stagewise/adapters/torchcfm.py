r"""torchcfm's matchers (Tong et al., arXiv 2302.00482): `sample_location_and_conditional_flow`.

| matcher | `x_t` given `x_1` | path |
|---|---|---|
| `ConditionalFlowMatcher(sigma)` | `N(t x_1, (1 - t)^2 + sigma^2)` | `LinearPath`, noised |
| `TargetConditionalFlowMatcher(sigma)` | `N(t x_1, (1 - (1 - sigma) t)^2)` | `ShrinkingPath` |
| `VariancePreservingConditionalFlowMatcher(sigma)` | as the first | `CosinePath`, noised |

With `sigma > 0` the target `u` of the first and the last holds noise that `x_t` and `x_1` do not
determine. The scheme averages it out by the share `lambda`, so the target is `u + lambda (u* - u)`
as elsewhere.

Optimal-transport and Schroedinger-bridge matchers make `x_0` and `x_1` dependent: there is no
closed form, and they are refused. Only `u` is steered: a call with `return_noise=True`, whose noise
a network may be trained on, is refused if the scheme mixes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stagewise.adapters.base import Detach, Place, TargetMaker, Tell, chained, rebind
from stagewise.adapters.paths import NoisedPath, ShrinkingPath
from stagewise.noise import check_noise
from stagewise.paths import CosinePath, LinearPath, Path, expand_like
from stagewise.queries import Labels
from stagewise.schemes import Phases, Scheme, mixes
from stagewise.stage_target import BY_HAND

__all__ = ["TorchCFM"]

_COUPLED = (
    "its minibatch coupling makes x_0 and x_1 dependent, and the closed form of the oracle holds "
    "for independent ones only. Train with ConditionalFlowMatcher to steer."
)
_UNKNOWN = f"it is not one of torchcfm's matchers, so its path is not known; {BY_HAND}"
_PLAIN = "sample_location_and_conditional_flow"
_GUIDED = "guided_sample_location_and_conditional_flow"


class TorchCFM(TargetMaker):
    """A torchcfm matcher; see the module docstring."""

    library, what = "torchcfm", "torchcfm matcher"
    timesteps = True

    @classmethod
    def of(cls, place: Place) -> TorchCFM | None:
        """The maker at `place`, or None if there is none of this kind."""
        matcher = place.object
        if not callable(getattr(matcher, _PLAIN, None)) or not hasattr(matcher, "sigma"):
            return None
        path = None if hasattr(matcher, "ot_sampler") else _path(matcher)
        refusal = _COUPLED if hasattr(matcher, "ot_sampler") else _UNKNOWN
        maker = cls(place, path or LinearPath(), refusal=None if path else refusal)
        maker.coupled = path is None  # also if the pairing is not known
        return maker

    def _observe(self, tell: Tell) -> Detach:
        """Reports pairs after any coupling inside the matcher."""
        matcher = self.place.object
        told = False

        def look(x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> None:
            nonlocal told
            told = True
            tell(x1, None if self._makes_noise else x0, t, xt)

        def wrap_pairs(plain: Any) -> Callable[..., Any]:
            def sample(x0: Tensor, x1: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
                nonlocal told
                told = False
                found = plain(x0, x1, *args, **kwargs)
                if not told:  # the user's matcher, which makes x_t in another way
                    look(x0, x1, *found[:2])
                return found

            return sample

        def wrap_xt(plain: Any) -> Callable[..., Any]:
            def sample_xt(x0: Tensor, x1: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                xt = plain(x0, x1, t, *args, **kwargs)
                look(x0, x1, t, xt)
                return xt

            return sample_xt

        entries = {_PLAIN: wrap_pairs, _GUIDED: wrap_pairs, "sample_xt": wrap_xt}
        return chained(
            *(
                rebind(matcher, name, wrap(getattr(matcher, name)), observes=True)
                for name, wrap in entries.items()
                if callable(getattr(matcher, name, None))
            )
        )

    @property
    def _makes_noise(self) -> bool:
        """Whether it makes its own noise and ignores `x_0`, as the Target matcher does."""
        return "TargetConditionalFlowMatcher" in _classes(self.place.object)

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        matcher = self.place.object
        noisy = isinstance(self.path, NoisedPath)
        mixing = mixes(scheme)
        looked_at = not mixing or self._makes_noise
        inside = False  # of the guided method, which calls the other

        def draw(x0: Tensor, x1: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None]:
            nonlocal looked_at
            if not looked_at:
                check_noise(x0)
                looked_at = True
            if t is not None:
                self.refuse_given_times(scheme)
            elif scheme.draws_timesteps:
                t = scheme.timesteps.sample(len(x0)).type_as(x0)  # on the CPU, as torchcfm does
            elif scheme.smoothing is not None:
                t = torch.rand(len(x0)).type_as(x0)  # as torchcfm; smoothing depends on t
            return x1 if t is None else scheme.smooth(x1, t=t), t

        def target(u: Tensor, t: Tensor, xt: Tensor, x1: Tensor, labels: Labels | None) -> Tensor:
            times = t.flatten()
            steered, _ = scheme(u, xt=xt, t=times, x1=x1, labels=labels)
            if noisy and scheme.last is not None and not scheme.paused:
                c, b = self.prediction.coefficients(self.path(times))
                known = expand_like(c, x1) * x1 + expand_like(b, xt) * xt
                steered = steered + expand_like(scheme.last.lam.to(u), u) * (known - u)
            return steered

        def wrap(name: str) -> Callable[..., Any]:
            plain: Any = getattr(matcher, name)

            def sample(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
                nonlocal inside
                if inside:
                    return plain(*args, **kwargs)
                x0, x1, labels, t, rest, more = _ARGUMENTS[name](*args, **kwargs)
                if mixing and (any(rest[:1]) or more.get("return_noise")):
                    raise ValueError(
                        f"{self.name} was called with return_noise=True, but the scheme changes "
                        "only the velocity: a network that is trained on the noise would not be "
                        "steered. Call it without return_noise and train on the velocity."
                    )
                x1, t = draw(x0, x1, t)
                inside = True
                try:
                    # By position: a method of the user's may have other names.
                    t, xt, u, *others = plain(x0, x1, *labels, t, *rest, **more)
                finally:
                    inside = False
                return (t, xt, target(u, t, xt, x1, labels[1] if labels else None), *others)

            return sample

        methods = (name for name in _ARGUMENTS if hasattr(matcher, name))
        return chained(*(rebind(matcher, name, wrap(name)) for name in methods))


def _plain_arguments(x0: Any, x1: Any, t: Any = None, *rest: Any, **more: Any) -> tuple[Any, ...]:
    return x0, x1, (), t, rest, more


def _guided_arguments(
    x0: Any, x1: Any, y0: Any = None, y1: Any = None, t: Any = None, *rest: Any, **more: Any
) -> tuple[Any, ...]:
    return x0, x1, (y0, y1), t, rest, more


_ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    _PLAIN: _plain_arguments,
    _GUIDED: _guided_arguments,
}
"""Of torchcfm's methods: noise, data, labels, t and what follows."""


def _classes(matcher: Any) -> set[str]:
    return {cls.__name__ for cls in type(matcher).__mro__}


def _path(matcher: Any) -> Path | None:
    """The path of a matcher, checked against its functions; None if it is not torchcfm's."""
    names, sigma = _classes(matcher), matcher.sigma
    if "ConditionalFlowMatcher" not in names:
        return None
    if "TargetConditionalFlowMatcher" in names:
        path: Path = ShrinkingPath(sigma) if sigma else LinearPath()
    else:
        variance_preserving = "VariancePreservingConditionalFlowMatcher" in names
        path = CosinePath() if variance_preserving else LinearPath()
        path = NoisedPath(path, sigma) if sigma else path
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    alpha, kept = matcher.compute_mu_t(zero, one, t), matcher.compute_mu_t(one, zero, t)
    added = torch.as_tensor(matcher.compute_sigma_t(t))
    velocity = matcher.compute_conditional_flow(zero, one, t, alpha)
    own = path(t)
    found = (alpha, torch.sqrt(kept**2 + added**2), velocity)
    agree = zip(found, (own.alpha, own.sigma, own.d_alpha), strict=True)
    return path if all(torch.allclose(a, b) for a, b in agree) else None
