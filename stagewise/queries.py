"""The queries of an oracle: one object from a scheme's call to the products of an engine."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stagewise.bank.rows import RowStore
from stagewise.conventions import STAGEWISE, Convention
from stagewise.device_checks import require_all, seen_within
from stagewise.masks import MaskedLabels
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, upload

__all__ = [
    "Labels",
    "Queries",
    "Times",
    "as_times",
    "check_times",
    "checked_source",
    "indices_of",
    "require_like",
    "require_shape",
    "require_tensors",
    "segments_of",
    "with_source_weight",
]

Labels: TypeAlias = "Tensor | Sequence[int | None] | MaskedLabels"
"""The class of each query, (B,). None, or the oracle's `null_class`, means the whole bank, or all
rows of the same mask. Labels with masks are `MaskedLabels`."""

Times: TypeAlias = "Tensor | float"
"""Times of B queries: (B,), (B, 1, ..., 1), or one number for all."""


@dataclass(frozen=True)
class Queries:
    """B noisy samples, and the rows of each. Made and checked by `Oracle.queries`.

    Attributes:
        xt: Noisy samples, (B, D), float64.
        path: Coefficients at the B times, each (B,), float64, sigma above 0.
        segments: The rows of each query as a slice of the bank's own order (the whole bank, or a
            class), on the host, so that grouping costs no sync. Empty if the engine does not hold
            all rows; None if there are only `ends`.
        source: The row each query was made from, (B,), int64, negative if unknown; or None.
        labels: The class of each, on the host, None for the whole bank; or None.
        made_in: The type that `x_t` was computed in.
        x1: What `x_t` was made from, (B, D), float64; or None.
        twin: The row of the query that `x1` stands for and may differ from, -1 for none, (B,); or
            None.
        ends: The first row of each query and the row after its last, (B, 2), int64, where kernels
            read them; or None.
        valid: Which numbers count, (B, D), bool; or None for all.
        condition: What the model is given for each, (B, C), float64; or None.
    """

    xt: Tensor
    path: PathCoefficients
    segments: Sequence[slice] | None
    source: Tensor | None = None
    labels: Sequence[int | None] | None = None
    made_in: torch.dtype = torch.float32
    x1: Tensor | None = None
    twin: Tensor | None = None
    ends: Tensor | None = None
    valid: Tensor | None = None
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.xt)

    def on_host(self) -> Queries:
        """The queries with `segments`: a device sync if there are only `ends`."""
        if self.segments is not None:
            return self
        assert self.ends is not None
        return replace(self, segments=[slice(*pair) for pair in self.ends.tolist()], ends=None)

    @cached_property
    def ends_on_device(self) -> Tensor:
        """The first row of each query, and the row after its last, (B, 2), int64."""
        if self.ends is not None:
            return self.ends
        assert self.segments is not None
        if len(self.groups) == 1:  # nothing has to be copied from the host
            rows = self.groups[0][1]
            ends = torch.full((len(self), 2), rows.start, device=self.xt.device)
            ends[:, 1] = rows.stop
            return ends
        starts, stops = ([getattr(s, end) for s in self.segments] for end in ("start", "stop"))
        ends = torch.tensor([starts, stops], dtype=torch.int64).T.contiguous()
        return upload(ends, self.xt.device)

    def made_from(self, x1: Tensor, source: Tensor, twin: Tensor) -> Queries:
        """With what `x_t` was made from, (B, D), the rows it equals and those it stands for."""
        made = replace(self, x1=x1, source=source, twin=twin)
        # What was found of the segments is true of them still.
        for name in ("ends_on_device", "groups"):
            if name in vars(self):
                vars(made)[name] = vars(self)[name]
        return made

    @cached_property
    def groups(self) -> list[tuple[list[int], slice]]:
        """Queries with the same rows: their positions, and the rows."""
        assert self.segments is not None
        members: dict[tuple[int, int], list[int]] = {}
        for query, rows in enumerate(self.segments):
            members.setdefault((rows.start, rows.stop), []).append(query)
        return [(at, slice(*ends)) for ends, at in members.items()]

    @property
    def sizes(self) -> list[int]:
        """How many rows each query has."""
        assert self.segments is not None
        return [rows.stop - rows.start for rows in self.segments]

    def index(self, at: Sequence[Any]) -> Tensor:
        """Whole numbers on the host as a tensor beside the queries, without a device sync."""
        return upload(at, self.xt.device)

    def place(self, at: Sequence[int]) -> slice | Tensor:
        """Positions as an index: a slice, without a copy, if they are contiguous."""
        if list(at) == list(range(at[0], at[-1] + 1)):
            return slice(at[0], at[-1] + 1)
        return self.index(at)

    def split(self, size: int) -> list[Queries]:
        """The queries in parts of at most `size`."""
        every = range(len(self))
        return [self.select(every[first : first + size]) for first in every[::size]]

    def select(self, at: Sequence[int]) -> Queries:
        """Some of the queries, by position; itself for all of them in order."""
        if list(at) == list(range(len(self))):
            return self
        index = self.index(at)
        chosen: dict[str, Any] = {"path": self.path.select(index)}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                chosen[field.name] = value[index]
            elif field.name in ("segments", "labels") and value:
                chosen[field.name] = [value[i] for i in at]
        return replace(self, **chosen)

    def holds(self, rows: Tensor) -> Tensor:
        """Whether each query has the row given for it, (B,)."""
        first, stop = self.ends_on_device.unbind(1)
        return (rows >= first) & (rows < stop)

    def log_weight(self, x: Tensor) -> Tensor:
        """`l` of one sample for each query, `x` (B, D), from differences: (B,)."""
        gap = self.xt - self.path.alpha[:, None] * x
        return -gap.square().sum(1) / (2 * self.path.sigma**2)

    def log_weights(self, x: Tensor) -> Tensor:
        """`l` of the same n samples for all queries, `x` (n, D), by a product: (B, n)."""
        alpha, centre = self.path.alpha[:, None], x.mean(0)
        y, centred = self.xt - alpha * centre, x - centre
        logits = alpha * (y @ centred.T) - alpha**2 / 2 * centred.square().sum(1)
        return (logits - y.square().sum(1, keepdim=True) / 2) / self.path.sigma[:, None] ** 2


def segments_of(bank: RowStore, labels: Sequence[int | None] | None, count: int) -> list[slice]:
    """The rows of each of `count` queries: those of its class, or for None the bank."""
    labels, whole = [None] * count if labels is None else labels, bank.whole
    return [whole if label is None else bank.segment(label) for label in labels]


def indices_of(flags: Tensor) -> list[int]:
    """Positions of true flags, on the host: a device sync."""
    return [i for i, flag in enumerate(flags.tolist()) if flag]


def checked_source(source: Tensor, count: int, rows: int | None) -> Tensor:
    """`source` itself; refuses it unless it is (count,) integers, below `rows` if that is given."""
    if source.shape != (count,) or source.is_floating_point() or source.dtype == torch.bool:
        raise ValueError(
            f"Expected integer `source` with shape ({count},), the row of each sample, got "
            f"{source.dtype} of shape {tuple(source.shape)}: source=bank.find(x1)."
        )
    if rows is not None:
        require_all(
            source < rows,
            f"Expected `source` below {rows}, the rows of the bank (negative: not known)",
            lambda: (
                f", got {int(source.max())}. Rows count in the bank's own order: `bank.find(x1)` "
                "looks them up."
            ),
        )
    return source


def with_source_weight(
    post: Posterior, bank: RowStore, queries: Queries, log_kernel: Tensor | float = 0.0
) -> Posterior:
    """The posterior with the weight of each query's source row, NaN where that is unknown.

    `log_kernel`, (B,), is what a kernel adds to the log-weight of that row.
    """
    rows = queries.source
    if rows is None or post.source_weight is not None:
        return post
    x1 = bank.take(rows.clamp_min(0), device=queries.xt.device)
    weight = (queries.log_weight(x1) + log_kernel - post.log_evidence).exp().clamp_max(1)
    weight = weight.where(queries.holds(rows), 0).masked_fill(rows < 0, torch.nan)
    return replace(post, source_weight=weight)


def require_tensors(**given: object) -> None:
    """Refuses arguments that are not tensors, with a TypeError."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected `{name}` to be a tensor, got {type(value).__name__}. Give "
                f"torch.as_tensor({name})."
            )


def require_like(name: str, x: Tensor, other: str, like: Tensor) -> None:
    """Refuses a tensor `x` of another shape than the tensor `like`, which is called `other`."""
    if x.shape != like.shape:
        raise ValueError(
            f"Expected `{name}` with the shape of `{other}`, {tuple(like.shape)}, got "
            f"{tuple(x.shape)}."
        )


def require_shape(bank: RowStore, name: str, x: Tensor) -> None:
    """Refuses samples of another shape than the bank's."""
    if x.shape[1:] != bank.shape:
        raise ValueError(
            f"Expected `{name}` with shape {('B', *bank.shape)} as the bank's samples, got "
            f"{tuple(x.shape)}."
        )


def as_times(t: Times, x: Tensor) -> Tensor:
    """The time of each sample of `x`, (B, *): (B,); a `t` of another shape comes back as it is.

    Raises a TypeError if `t` is neither a tensor nor a number.
    """
    if isinstance(t, numbers.Real):
        # 16 bits hold too few times.
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.full((len(x),), float(t), dtype=dtype, device=x.device)
    require_tensors(t=t)
    assert isinstance(t, Tensor)
    if not t.ndim:
        return t.expand(len(x))
    return t.flatten() if t.shape[0] == len(x) == t.numel() else t


def check_times(
    t: Tensor, length: int, convention: Convention = STAGEWISE, *, shape_only: bool = False
) -> None:
    """Refuses times of another shape than (length,) or outside [0, 1].

    The message is in the times of the `convention`. With `shape_only` a kernel checks the range.
    """
    if t.shape != (length,):
        raise ValueError(f"Expected `t` with shape ({length},), got {tuple(t.shape)}.")
    if shape_only or seen_within(t, 0, 1):
        return
    noise, data = convention.noise_time, convention.data_time
    low, high = sorted((noise, data))

    def given() -> str:
        ends = convention.from_t(torch.stack([t.min(), t.max()])).sort()[0]
        return f", got values from {ends[0]:.4g} to {ends[1]:.4g}."

    message = f"Expected `t` in [{low:g}, {high:g}] with t = {noise:g} noise and t = {data:g} data"
    require_all((t >= 0) & (t <= 1), message, given)
