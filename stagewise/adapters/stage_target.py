"""The library's own `StageTarget`, which a hand-written training step calls with its target."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.adapters.base import Detach, Place, Seen, TargetMaker, Tell
from stagewise.conventions import STAGEWISE, written
from stagewise.masks import MaskedLabels, plain
from stagewise.paths import expand_like
from stagewise.queries import Labels
from stagewise.schemes import Phases, Scheme, parts
from stagewise.stage_target import StageTarget

__all__ = ["StageTargetMaker"]


class StageTargetMaker(TargetMaker):
    """A `StageTarget`; only its arguments are known of the step."""

    library, what = "by hand", "StageTarget"
    weights = timesteps = True  # as far as the step uses them
    late = True

    @classmethod
    def of(cls, place: Place) -> StageTargetMaker | None:
        """The maker at `place`, or None if there is none of this kind."""
        target = place.object
        if not isinstance(target, StageTarget):
            return None
        return cls(place, target.path, target.prediction, target.convention)

    @override
    def check(self, scheme: Scheme | Phases, *, weighed: bool = False) -> None:
        super().check(scheme, weighed=weighed)
        for part in parts(scheme):
            if part.convention != STAGEWISE:
                raise ValueError(
                    f"Expected a scheme without a convention, because {self.name} has it, got "
                    f"{written(part.convention)}. Give it there: "
                    f"StageTarget(convention={written(part.convention)})."
                )

    def _observe(self, tell: Tell) -> Detach:
        target: StageTarget = self.place.object
        target.begin()

        def observer(
            y: Tensor, xt: Tensor, t: Tensor, x1: Tensor, labels: Labels | None, c: Tensor | None
        ) -> None:
            masks, labels = labels if isinstance(labels, MaskedLabels) else None, plain(labels)
            given = (("labels", labels),) if isinstance(labels, Tensor) else ()
            tell(Seen(x1, self._noise(y, xt, t, x1), t, xt, given, masks, c))

        target.observers = (*target.observers, observer)

        def restore() -> None:
            target.observers = tuple(each for each in target.observers if each is not observer)

        return restore

    @torch.no_grad()
    def _noise(self, y: Tensor, xt: Tensor, t: Tensor, x1: Tensor) -> Tensor | None:
        """The noise by least squares of `x_t` and the target, which hold it also near data."""
        if self.prediction.kind in ("data", "score"):  # without noise, or infinite near data
            return None
        path, one = self.path(t.float()), torch.ones_like(t, dtype=torch.float32)
        zero = torch.zeros_like(one)
        p, q = (self.prediction.target(path, *pair) for pair in ((zero, one), (one, zero)))
        a, s, p, q = (expand_like(value, x1) for value in (path.alpha, path.sigma, p, q))
        y = self.convention.sign_of(self.prediction) * y
        of_xt, of_y = xt.float() - a * x1.float(), y.float() - p * x1.float()
        return (s * of_xt + q * of_y) / (s.square() + q.square())

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        target: StageTarget = self.place.object
        if target.scheme is not None:
            raise ValueError(
                f"{self.name} is steered by another scheme already. Use one scheme for each maker: "
                "Scheme(timesteps=..., target=..., weight=...) holds all three."
            )
        target.scheme = scheme

        def restore() -> None:
            if target.scheme is scheme:
                target.scheme = None

        return restore
