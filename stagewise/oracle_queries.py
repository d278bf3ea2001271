"""`OracleQueries`: from what an oracle is given to what it asks its engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.building import whole_labels
from stagewise.certificate import Certificate
from stagewise.conventions import STAGEWISE, Convention
from stagewise.engines import Engine
from stagewise.masks import as_asked
from stagewise.paths import Path, PathCoefficients
from stagewise.queries import (
    Labels,
    Queries,
    Times,
    as_times,
    check_times,
    checked_source,
    require_tensors,
    segments_of,
)

__all__ = ["OracleQueries"]


class OracleQueries:
    """Makes, and checks, the queries of an `Oracle`, which sets the attributes."""

    bank: LatentBank
    path: Path
    engine: Engine
    certificate: Certificate | None
    null_class: int | None
    convention: Convention = STAGEWISE

    def queries(
        self,
        xt: Tensor,
        t: Times,
        labels: Labels | None = None,
        source: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Queries:
        """What `ask` is asked: made once from noisy samples, checked, with the path at their times.

        Arguments are those of `posterior`, in the library's convention.

        Raises:
            ValueError: As `posterior`.
            TypeError: If `xt` is no tensor.
        """
        if condition is not None:
            raise ValueError(
                f"Expected an oracle with a kernel on the `condition`, got {self!r}: "
                "ConditionedOracle(bank, path, Condition(bandwidth=...))."
            )
        xt, valid, own = as_asked(self.bank, xt, labels, self.null_class)
        flat, path = self.coefficients(xt, t)
        names, ends = None, None
        if isinstance(own, Tensor) and self.reads_on_device(own, flat):
            ends = self.bank.ends_of(whole_labels(own, len(flat)))
        elif own is not None:
            names = self.classes_of(own, len(flat))
        if source is not None:
            source = checked_source(source, len(flat), self.engine.num_rows(self.bank))
            source = source.to(flat.device, torch.int64)
        segments: Sequence[slice] | None = ()
        if self.engine.holds_all_rows:
            segments = None if ends is not None else segments_of(self.bank, names, len(flat))
        times = as_times(t, xt).detach().to(flat)
        about: dict[str, Any] = {"made_in": xt.dtype, "ends": ends, "valid": valid}
        return Queries(flat, path, segments, source, names, times, **about)

    def reads_on_device(self, labels: Tensor, xt: Tensor) -> bool:
        """Whether labels stay where they are, which spares a device sync."""
        plain = self.certificate is None and self.null_class is None
        there = labels.device == xt.device
        return plain and there and self.engine.reads_ends(self.bank, xt.device, len(xt))

    def _inside(self, xt: Tensor, t: Times) -> tuple[Tensor, Times]:
        """Noisy samples and times of the `convention` in that of the library."""
        require_tensors(xt=xt)
        if self.convention == STAGEWISE:
            return xt, t
        xt, t = self.convention.inside(xt, as_times(t, xt))
        check_times(t, len(xt), self.convention)
        return xt, t

    def coefficients(self, xt: Tensor, t: Times) -> tuple[Tensor, PathCoefficients]:
        """Noisy samples as rows, and the path at their times, as the engines want both.

        Args:
            xt: Noisy samples, (B, *).
            t: See `posterior`.

        Returns:
            (B, D), float64, and coefficients of float64 with sigma kept above the floor.

        Raises:
            ValueError: On shapes that do not fit, t outside [0, 1], or a device without float64.
            TypeError: If `xt` is no tensor.
        """
        require_tensors(xt=xt)
        if xt.shape[1:] != self.bank.shape:
            raise ValueError(
                f"Expected `xt` with shape {('B', *self.bank.shape)} as the bank's samples, got "
                f"{tuple(xt.shape)}."
            )
        if xt.device.type == "mps":
            raise ValueError("The oracle needs float64, which MPS has not. Ask it on the CPU.")
        t = as_times(t, xt)
        check_times(t, len(xt))
        path = self.path(t.detach().to(device=xt.device, dtype=torch.float64))
        return xt.detach().flatten(1).double(), path.floored(self.engine.sigma_floor(self.bank))

    def classes_of(self, labels: Tensor | Sequence[int | None], count: int) -> list[int | None]:
        """The labels of `count` queries on the host, with None for the whole bank.

        Raises:
            ValueError: If there is another number of them, or they are no whole numbers.
        """
        own = whole_labels(labels, count).tolist() if isinstance(labels, Tensor) else labels
        names = list(own)
        if len(names) != count:
            raise ValueError(f"Expected `labels` with shape ({count},), got ({len(names)},).")
        if self.null_class is None:
            return names
        return [None if name == self.null_class else name for name in names]
