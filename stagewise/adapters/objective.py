"""The library's own `FlowMatchingLoss`, which takes a scheme directly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stagewise.adapters.base import Detach, Place, Seen, TargetMaker, Tell, rebind, watched
from stagewise.adapters.hooks import in_place_of
from stagewise.batches import leaves_of
from stagewise.paths import Path, PathCoefficients
from stagewise.schemes import Phases, Scheme

__all__ = ["Objective", "nominal_shares"]


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Objective(TargetMaker):
    """A `FlowMatchingLoss`, recognised by its attributes: `losses` cannot be imported here."""

    library, what = "stagewise", "FlowMatchingLoss"
    weights = timesteps = losses = True

    @classmethod
    def of(cls, place: Place) -> Objective | None:
        """The maker at `place`, or None if there is none of this kind."""
        loss_fn = place.object
        names = ("path", "prediction", "convention", "scheme", "timesteps")
        if not callable(loss_fn) or not all(hasattr(loss_fn, name) for name in names):
            return None
        return cls(place, loss_fn.path, loss_fn.prediction, loss_fn.convention)

    @property
    @override
    def last(self) -> tuple[Tensor, Tensor] | None:
        record = self.place.object.last
        return None if record is None else (record.t, record.loss)

    def _observe(self, tell: Tell) -> Detach:
        loss_fn = self.place.object
        plain = loss_fn.forward
        signature = inspect.signature(plain)
        rest = [name for name, each in signature.parameters.items() if each.kind in _REST]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not watched():
                return plain(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            conditions: list[tuple[str, Tensor]] = []
            for name, value in ((name, given.get(name, ())) for name in rest):
                items = value.items() if isinstance(value, dict) else [(name, value)]
                conditions += (pair for key, held in items for pair in leaves_of(held, key))

            def look(x0: Tensor, x1: Tensor, t: Tensor, xt: Tensor) -> None:
                tell(Seen(x1, x0, t, xt, tuple(conditions)))

            # Noise and times are drawn inside, and pass through the path. The path itself is
            # shared with others; a module may refuse `setattr`.
            held, path = vars(loss_fn), loss_fn.path
            holds = "path" in held
            held["path"] = _WatchedPath(path, look)
            try:
                return plain(*args, **kwargs)
            finally:
                if holds:
                    held["path"] = path
                else:
                    del held["path"]

        return rebind(loss_fn, "forward", forward, observes=True)

    def _attach(self, scheme: Scheme | Phases) -> Detach:
        loss_fn = self.place.object
        before = loss_fn.scheme
        if before is not None and before is not scheme:
            raise ValueError(
                f"{self.name} has a scheme already, {before!r}. Use one scheme for each maker: "
                "Scheme(timesteps=..., target=..., weight=...) holds all three."
            )
        loss_fn.scheme = scheme

        def restore() -> None:
            if loss_fn.scheme is scheme:
                loss_fn.scheme = before

        return restore


def nominal_shares(maker: TargetMaker, edges: Tensor) -> list[float] | None:
    """Share of the times that training draws in each bin of `edges`, (T + 1,), by their density.

    None if the maker does not draw its times by a sampler of this library.
    """
    loss_fn = maker.place.object
    scheme = getattr(loss_fn, "scheme", None)
    sampler = getattr(loss_fn, "timesteps", None)
    if scheme is not None and scheme.draws_timesteps:
        sampler = scheme.timesteps
    density = getattr(sampler, "density", None)
    if density is None:
        return None
    inner = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    t = edges[:-1, None] + inner * edges.diff()[:, None]
    shares = density(t.float()).double().mean(1) * edges.diff()
    return shares.tolist()


class _WatchedPath(Path):
    """A path that reports what it interpolates."""

    def __init__(self, path: Path, look: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> None:
        self._path, self._look = path, look

    def __call__(self, t: Tensor) -> PathCoefficients:
        return self._path(t)

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        xt = self._path.interpolate(x0, x1, t)
        self._look(x0, x1, t, xt)
        return xt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return in_place_of(self._path)

    def __repr__(self) -> str:
        return repr(self._path)
