"""flow_matching's affine paths (Lipman et al., arXiv 2412.06264): `path.sample(x_0, x_1, t)`.

Its `PathSample` holds the conditional target as `dx_t`; a steered path returns the scheme's target
there. The library never draws t and never sees a loss.

Only `dx_t` is steered. A network that is regressed on `x_1` or `x_0` of the `PathSample` trains as
without a scheme, which cannot be detected. Make its target in the training step:
`y, w = scheme(x_1, xt=x_t, t=t, x1=x_1, prediction="data")`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from stagewise.adapters.base import Detach, Place, TargetMaker, Tell, rebind
from stagewise.adapters.paths import LibraryPath, recognise
from stagewise.noise import check_noise
from stagewise.schemes import Phases, Scheme, mixes

__all__ = ["FlowMatching"]


class FlowMatching(TargetMaker):
    """A flow_matching `AffineProbPath`; see the module docstring."""

    library, what = "flow_matching", "flow_matching path"

    @classmethod
    def of(cls, place: Place) -> FlowMatching | None:
        """The maker at `place`, or None if there is none of this kind."""
        path = place.object
        # Discrete and geodesic paths have `sample` and `scheduler` too, but not these converters.
        methods = ("sample", "scheduler", "target_to_velocity", "velocity_to_target")
        if not all(callable(getattr(path, name, None)) for name in methods):
            return None

        def coefficients(t: Tensor) -> tuple[Tensor, ...]:
            found = path.scheduler(t)
            return found.alpha_t, found.sigma_t, found.d_alpha_t, found.d_sigma_t

        name = f"{type(path).__name__}({type(path.scheduler).__name__})"
        return cls(place, recognise(LibraryPath(coefficients, name)))

    def _observe(self, tell: Tell) -> Detach:
        plain = self.place.object.sample

        def sample(x_0: Tensor, x_1: Tensor, t: Tensor) -> Any:
            found = plain(x_0=x_0, x_1=x_1, t=t)
            tell(x_1, x_0, t, found.x_t)
            return found

        return rebind(self.place.object, "sample", sample, observes=True)

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        plain = self.place.object.sample
        looked_at = not mixes(scheme)

        def sample(x_0: Tensor, x_1: Tensor, t: Tensor) -> Any:
            nonlocal looked_at
            x_1 = scheme.smooth(x_1, t=t)
            found = plain(x_0=x_0, x_1=x_1, t=t)
            if not looked_at:
                check_noise(x_0)
                looked_at = True
            target, _ = scheme(found.dx_t, xt=found.x_t, t=t, x1=x_1)
            return replace(found, dx_t=target)

        return rebind(self.place.object, "sample", sample)
