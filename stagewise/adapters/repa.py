r"""REPA's loss (arXiv 2410.06940): `loss_fn(model, images, model_kwargs, zs)`.

It draws t and noise inside, with t = 1 as noise, makes `x_t` and its target from the four numbers
of `interpolant(t)`, and returns each sample's denoising loss and projection loss. The target is not
accessible, but the model's answer is: if the scheme adds `d` to the target, `(model - d) - target`
is `model - (target + d)`. So the loss gets a model with `d` subtracted from its answer. The
projection and its gradient do not change.

Labels are `model_kwargs["y"]`, which the model itself drops for guidance. Other entries are
conditions that no target knows; they are refused unless the scheme says class_wise=False.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stagewise.adapters.base import Detach, Place, TargetMaker, Tell, class_labels, rebind
from stagewise.adapters.paths import LibraryPath, recognise
from stagewise.conventions import CONVENTIONS
from stagewise.paths import expand_like
from stagewise.schemes import Phases, Scheme

__all__ = ["REPALoss"]


class REPALoss(TargetMaker):
    """REPA's `SILoss`; see the module docstring."""

    library, what = "REPA", "REPA loss"
    weights = losses = by_call = True

    @classmethod
    def of(cls, place: Place) -> REPALoss | None:
        """The maker at `place`, or None if there is none of this kind."""
        loss_fn = place.object
        names = ("interpolant", "path_type", "prediction", "weighting")
        if not callable(loss_fn) or not all(hasattr(loss_fn, name) for name in names):
            return None
        convention = CONVENTIONS["repa"]

        def coefficients(t: Tensor) -> tuple[Any, ...]:
            alpha, sigma, d_alpha, d_sigma = loss_fn.interpolant(convention.from_t(t))
            return alpha, sigma, -d_alpha, -d_sigma

        path = recognise(LibraryPath(coefficients, f"SILoss({loss_fn.path_type!r})"))
        known = loss_fn.prediction == "v"
        refusal = None if known else f"its prediction, {loss_fn.prediction!r}, is not known."
        return cls(place, path, None, convention, refusal)

    def _observe(self, tell: Tell) -> Detach:
        plain = getattr(*self.place.call)

        def loss(model: Any, images: Tensor, model_kwargs: Any = None, zs: Any = None) -> Any:
            def look(x: Tensor, time: Tensor, **kwargs: Any) -> Any:
                tell(images, None, self.convention.to_t(time), x, kwargs)
                return model(x, time, **kwargs)

            return plain(look, images, model_kwargs, zs)

        return rebind(*self.place.call, loss, observes=True)

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        plain = getattr(*self.place.call)

        def loss(
            model: Any,
            images: Tensor,
            model_kwargs: Mapping[str, Any] | None = None,
            zs: Any = None,
        ) -> tuple[Tensor, Any]:
            labels = class_labels(scheme, model_kwargs, images)
            t = weight = torch.empty(0)

            def steered(x: Tensor, time: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
                nonlocal t, weight
                t = self.convention.to_t(time.float())
                x1 = scheme.smooth(images, t=t)
                alpha, sigma, d_alpha, d_sigma = (expand_like(v, x) for v in self.path(t))
                noise = (x - alpha * images) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
                x = (x + alpha * (x1 - images)).to(x)
                u = d_alpha * x1 + d_sigma * noise
                target, weight = scheme(u, xt=x, t=t, x1=x1, labels=labels)
                answer, *more = model(x, time, **kwargs)
                # The loss uses the negative velocity of the images before smoothing.
                moved = (target - u) + d_alpha * (x1 - images)
                return (answer + moved.to(answer), *more)

            losses, projection = plain(steered, images, model_kwargs, zs)
            self._last = (t, losses.detach())
            return losses * weight.to(losses), projection

        return rebind(*self.place.call, loss)
