"""Names of scalars by bins of t, and the charts that TensorBoard makes of names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["by_time", "charts"]


def by_time(prefix: str, edges: Tensor, values: Sequence[float]) -> dict[str, float]:
    """Scalars under `<prefix>/t=<centre of the bin>`; empty bins are left out."""
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    digits = max(3, 1 - math.floor(math.log10(float(edges.diff().min()))))
    pairs = zip(centres, values, strict=True)
    return {f"{prefix}/t={t:.{digits}f}": value for t, value in pairs if not math.isnan(value)}


def charts(patterns: Mapping[str, str]) -> dict[str, list[Any]]:
    """Charts of the custom-scalars page: by title, the pattern that the tags begin with."""
    return {title: ["Multiline", [f"^{pattern}"]] for title, pattern in patterns.items()}
