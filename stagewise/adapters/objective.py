"""The library's own `FlowMatchingLoss`: it takes a scheme as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stagewise.adapters.base import Detach, Place, Seam

if TYPE_CHECKING:
    from stagewise.schemes import Phases, Scheme

__all__ = ["Objective"]


class Objective(Seam):
    """A `FlowMatchingLoss`, by its attributes: losses stand above this floor."""

    library = "stagewise"
    weights = timesteps = losses = True

    @classmethod
    def of(cls, place: Place) -> Objective | None:
        """The seam at `place`, or None if there is none of this kind."""
        loss_fn = place.object
        names = ("path", "prediction", "convention", "scheme", "timesteps")
        if not callable(loss_fn) or not all(hasattr(loss_fn, name) for name in names):
            return None
        return cls(place, loss_fn.path, loss_fn.prediction, loss_fn.convention)

    @property
    def last(self) -> tuple[Tensor, Tensor] | None:
        """See `Seam`; the losses are against the conditional target."""
        record = self.place.object.last
        return None if record is None else (record.t, record.loss)

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        loss_fn = self.place.object
        before = loss_fn.scheme
        if before is not None and before is not scheme:
            raise ValueError(
                f"{self.name} has a scheme already, {before!r}. Use one scheme for each seam: "
                "Scheme(timesteps=..., target=..., weight=...) holds all three."
            )
        loss_fn.scheme = scheme

        def restore() -> None:
            if loss_fn.scheme is scheme:
                loss_fn.scheme = before

        return restore
