"""The library's own `FlowMatchingLoss` and `StageTarget`: both have a `scheme` and `observers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.adapters.base import Detach, Place, TargetMaker, Tell
from stagewise.conventions import STAGEWISE, written
from stagewise.masks import MaskedLabels, plain
from stagewise.paths import expand_like
from stagewise.schemes import Phases, Scheme, parts
from stagewise.stage_target import StageTarget

__all__ = ["Objective", "StageTargetMaker", "nominal_shares"]


class _Own(TargetMaker):
    weights = timesteps = True

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        own = self.place.object
        before = own.scheme
        if before is not None and before is not scheme:
            raise ValueError(
                f"{self.name} has a scheme already, {before!r}. Use one scheme for each maker: "
                "Scheme(timesteps=..., target=..., weight=...) holds all three."
            )
        own.scheme = scheme

        def restore() -> None:
            if own.scheme is scheme:
                own.scheme = before

        return restore

    def _observe(self, tell: Tell) -> Detach:
        own = self.place.object
        own.observers = (*own.observers, tell)

        def restore() -> None:
            own.observers = tuple(each for each in own.observers if each is not tell)

        return restore


class Objective(_Own):
    """A `FlowMatchingLoss`, recognised by its attributes: `losses` cannot be imported here."""

    library, what = "stagewise", "FlowMatchingLoss"
    losses = True

    @classmethod
    def of(cls, place: Place) -> Objective | None:
        """The maker at `place`, or None if there is none of this kind."""
        loss_fn = place.object
        names = ("path", "prediction", "convention", "scheme", "timesteps", "observers")
        if not callable(loss_fn) or not all(hasattr(loss_fn, name) for name in names):
            return None
        return cls(place, loss_fn.path, loss_fn.prediction, loss_fn.convention)

    @property
    @override
    def last(self) -> tuple[Tensor, Tensor] | None:
        record = self.place.object.last
        return None if record is None else (record.t, record.loss)


class StageTargetMaker(_Own):
    """A `StageTarget`; only its arguments are known of the step, which may use no weights."""

    library, what = "by hand", "StageTarget"
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

    @override
    def _observe(self, tell: Tell) -> Detach:
        self.place.object.begin()

        def observer(y: Tensor, xt: Tensor, t: Tensor, x1: Tensor, labels: Any, c: Any) -> None:
            masks = labels if isinstance(labels, MaskedLabels) else None
            tell(x1, self._noise(y, xt, t, x1), t, xt, {"labels": plain(labels)}, masks, c)

        return super()._observe(observer)

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


def nominal_shares(maker: TargetMaker, edges: Tensor) -> list[float] | None:
    """Share of the times that training draws in each bin of `edges`, (T + 1,), by their density.

    None if the maker does not draw its times by a sampler of this library.
    """
    own = maker.place.object
    scheme = own.scheme if isinstance(maker, _Own) else None
    drawn = scheme is not None and scheme.draws_timesteps
    density = getattr(getattr(scheme if drawn else own, "timesteps", None), "density", None)
    if density is None:
        return None
    inner = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    t = edges[:-1, None] + inner * edges.diff()[:, None]
    shares = density(t.float()).double().mean(1) * edges.diff()
    return shares.tolist()
