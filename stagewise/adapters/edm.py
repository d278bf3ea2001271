r"""The losses of EDM (arXiv 2206.00364) and EDM2 (2312.02696): `loss_fn(net, images, labels)`.

The network sees `x_1 + sigma x_0`, which is `x_t / t` on the linear path at `t = 1 / (1 + sigma)`,
and is regressed on `x_1`, so the oracle's target is the posterior mean. The loss makes input and
target from the same `images`. It is given a clone of them, which the target overwrites when the
network is called, after the input is made.

The loss draws `sigma`: set `P_mean` and `P_std` for another distribution. It returns (B, *), not
reduced, so weights apply. Labels may be one-hot, as in EDM; labels without columns are none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.adapters.base import Detach, Place, TargetMaker, Tell, rebind
from stagewise.conventions import CONVENTIONS
from stagewise.paths import LinearPath, expand_like
from stagewise.queries import Labels
from stagewise.schemes import Phases, Scheme

__all__ = ["EDMLoss"]


class EDMLoss(TargetMaker):
    """An EDM or EDM2 loss; see the module docstring."""

    library, what = "EDM", "EDM loss"
    weights = losses = by_call = True

    @classmethod
    def of(cls, place: Place) -> EDMLoss | None:
        """The maker at `place`, or None if there is none of this kind."""
        loss_fn = place.object
        names = ("P_mean", "P_std", "sigma_data")
        if not callable(loss_fn) or not all(hasattr(loss_fn, name) for name in names):
            return None
        # A network of EDM's may have such attributes too.
        call = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
        if list(inspect.signature(call).parameters)[:2] != ["net", "images"]:
            return None
        return cls(place, LinearPath(), convention=CONVENTIONS["edm"])

    def _observe(self, tell: Tell) -> Detach:
        """Reports the images as they are trained on, after augmentation, and the labels."""
        plain = getattr(*self.place.call)

        def loss(
            net: Any,
            images: Tensor,
            labels: Tensor | None = None,
            augment_pipe: Callable[..., Any] | None = None,
            **kwargs: Any,
        ) -> Tensor:
            def look(x1: Tensor, augment_labels: Any = None) -> None:
                tell(x1, given={"labels": labels, "augment_labels": augment_labels})

            if augment_pipe is None:
                look(images)
                return plain(net, images, labels, **kwargs)

            def augmented(*args: Any, **kwargs: Any) -> Any:
                found = augment_pipe(*args, **kwargs)
                look(*found)
                return found

            return plain(net, images, labels, augmented, **kwargs)

        return rebind(*self.place.call, loss, observes=True)

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        plain = getattr(*self.place.call)

        def loss(
            net: Any, images: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
        ) -> Tensor:
            if args or any(value is not None for value in kwargs.values()):
                raise ValueError(
                    f"{self.name} augments its images, so they are no rows of the bank. Call it "
                    "without augment_pipe to steer."
                )
            target = images.clone()
            t = weight = torch.empty(0)

            def denoise(x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
                nonlocal t, weight
                t = self.convention.to_t(sigma.flatten())
                x1 = scheme.smooth(images, t=t)
                if x1 is not images:
                    x = x + (x1 - images)
                xt = expand_like(t, x) * x
                steered, weight = scheme(
                    x1,
                    xt=xt,
                    t=t,
                    x1=x1,
                    labels=_classes(labels),
                    prediction=self.prediction,
                )
                target.copy_(steered)
                return net(x, sigma, *args, **kwargs)

            losses = plain(denoise, target, labels)
            self._last = (t, losses.detach().flatten(1).mean(1))
            return losses * expand_like(weight.to(losses), losses)

        return rebind(*self.place.call, loss)


def _classes(labels: Tensor | None) -> Labels | None:
    """Labels as the oracle takes them: the class of each one-hot row, None for a row of zeros."""
    if labels is None or not labels.numel():
        return None
    if not labels.is_floating_point():
        return labels
    found = zip(labels.argmax(1).tolist(), labels.any(1).tolist(), strict=True)
    return [label if given else None for label, given in found]
