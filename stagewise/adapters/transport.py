"""The `Transport` of SiT (arXiv 2401.08740) and LightningDiT: `training_losses(model, x1, ...)`.

Inside, `sample(x1)` draws noise and t, `path_sampler.plan(t, x0, x1)` makes `x_t` and the velocity,
and "loss" (LightningDiT: also "cos_loss") holds the loss of each sample. The interval of t depends
on the type of the plan, so the object stays, and its method is replaced on the instance. Labels are
`model_kwargs["y"]`; other entries are conditions that no target knows, which are refused unless the
scheme says class_wise=False.

A network that predicts noise or the score is regressed on `x0`, which `sample` draws for each call:
the target overwrites it after `x_t` is made. LightningDiT's cosine loss compares directions with
the same target, so mixing changes what it means.

Variants that count time from data to noise (RAE, arXiv 2510.11690) are recognised by their
coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stagewise.adapters.base import Detach, Place, TargetMaker, Tell, chained, class_labels, rebind
from stagewise.adapters.paths import LibraryPath, recognise
from stagewise.conventions import CONVENTIONS, STAGEWISE
from stagewise.paths import Prediction
from stagewise.schemes import Phases, Scheme

__all__ = ["Transport"]


class Transport(TargetMaker):
    """A SiT or LightningDiT transport; see the module docstring."""

    library, what = "SiT transport", "SiT transport"
    weights = timesteps = losses = True

    @classmethod
    def of(cls, place: Place) -> Transport | None:
        """The maker at `place`, or None if there is none of this kind."""
        transport = place.object
        plan: Any = getattr(transport, "path_sampler", None)
        methods = ("training_losses", "sample", "check_interval")
        if not callable(getattr(plan, "plan", None)) or not all(
            callable(getattr(transport, name, None)) for name in methods
        ):
            return None

        ends = plan.compute_alpha_t(torch.tensor([0.1, 0.9], dtype=torch.float64))[0]
        convention = STAGEWISE if ends[0] < ends[1] else CONVENTIONS["pi0"]

        def coefficients(t: Tensor) -> tuple[Any, ...]:
            time, sign = convention.from_t(t), convention.sign
            alpha, d_alpha = plan.compute_alpha_t(time)
            sigma, d_sigma = plan.compute_sigma_t(time)
            return alpha, sigma, sign * d_alpha, sign * d_sigma

        path = recognise(LibraryPath(coefficients, type(plan).__name__))
        # An enumeration: NOISE, SCORE or VELOCITY.
        kind = getattr(transport.model_type, "name", str(transport.model_type)).lower()
        if kind not in ("velocity", "noise", "score"):
            return cls(place, path, refusal=f"its model_type, {kind!r}, is not known.")
        prediction = Prediction("velocity" if kind == "velocity" else "noise")
        return cls(place, path, prediction, convention)

    def _observe(self, tell: Tell) -> Detach:
        """Reports no t if the library counts it from data to noise."""
        transport, plan = self.place.object, self.place.object.path_sampler
        plain_losses, plain_plan = transport.training_losses, plan.plan
        given: Mapping[str, Any] = {}

        def training_losses(
            model: Any,
            x1: Tensor,
            model_kwargs: Mapping[str, Any] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> dict[str, Any]:
            nonlocal given
            given = model_kwargs or {}
            try:
                return plain_losses(model, x1, model_kwargs, *args, **kwargs)
            finally:
                given = {}

        def make(time: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            version = x0._version
            found = plain_plan(time, x0, x1)
            # A scheme may have overwritten the noise, which the network is regressed on.
            noise = x0 if x0._version == version else None
            tell(x1, noise, time if self.convention == STAGEWISE else None, found[1], given)
            return found

        return chained(
            rebind(transport, "training_losses", training_losses, observes=True),
            rebind(plan, "plan", make, observes=True),
        )

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        transport, plan = self.place.object, self.place.object.path_sampler
        plain_losses, plain_sample = transport.training_losses, transport.sample
        plain_plan = plan.plan
        call: dict[str, Any] | None = None  # what the parts of one `training_losses` share

        def training_losses(
            model: Any,
            x1: Tensor,
            model_kwargs: Mapping[str, Any] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> dict[str, Any]:
            nonlocal call
            call = {"labels": class_labels(scheme, model_kwargs, x1)}
            try:
                terms = plain_losses(model, x1, model_kwargs, *args, **kwargs)
                if "weight" not in call:  # a subclass made its target without the plan
                    return terms
                self._last = (call["t"], terms["loss"].detach())
                weight = call["weight"].to(terms["loss"])
                return {k: v * weight if k.endswith("loss") else v for k, v in terms.items()}
            finally:
                call = None

        def sample(x1: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            interval = args[0] if args else kwargs.get("sp_timesteps")
            if call is not None and interval is not None:
                self.refuse_given_times(scheme)
            if call is None or not scheme.draws_timesteps:
                return plain_sample(x1, *args, **kwargs)
            # As the library does, except for the distribution of t: noise first, then t on the CPU.
            x0 = torch.randn_like(x1)
            start, end = transport.check_interval(transport.train_eps, transport.sample_eps)
            t = self.convention.from_t(scheme.timesteps.sample(len(x1)))
            return (t * (end - start) + start).to(x1), x0, x1

        def make(time: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if call is None:
                return plain_plan(time, x0, x1)
            t = self.convention.to_t(time)
            x1 = scheme.smooth(x1, t=t)
            time, xt, u = plain_plan(time, x0, x1)
            regress_noise, sign = self.prediction.kind == "noise", self.convention.sign
            target, weight = scheme(
                x0 if regress_noise else sign * u,
                xt=xt,
                t=t,
                x1=x1,
                labels=call["labels"],
                prediction=self.prediction,
            )
            call.update(t=t, weight=weight)
            if regress_noise:
                x0.copy_(target)
                return time, xt, u
            return time, xt, sign * target

        return chained(
            rebind(transport, "training_losses", training_losses),
            rebind(transport, "sample", sample),
            rebind(plan, "plan", make),
        )
