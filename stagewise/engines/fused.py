r"""One pass over the rows of each query's class: the exact engine on CUDA.

For a query `x_t = a x_1 + s eps`, a sample r near `x_1`, and row i,

    d_i = x^(i) - r,   q = x_t - a r,
    l_i - l_r = (|q|^2 - |q - a d_i|^2) / 2 s^2 = <d_i, (a/s^2) q - (a^2/2s^2) d_i>,             (1)
    m - r = sum_i gamma_i d_i.                                                                   (2)

A program reads some rows of a query's class, once. For each row it computes (1), updates an online
softmax (Milakov and Gimelshein, arXiv 1805.02867), and sums (2) with it. So the mean costs as much
as reading the rows. Nothing is subtracted afterwards: if the posterior has collapsed on a row that
is r, (2) is exactly 0.

Float32 is enough. With r near `x_1`, `l_i - l_r` is about `-rho^2 |d_i|^2 / 2 - rho |d_i| z` with
`z ~ N(0, 1)`, so rows with weight have `rho |d_i|` of about 10 at most, and rounding moves (1) by
about `2^-24 rho |d_i|`: 1e-6. Log-weights far below the largest have larger errors, which do not
matter. If `x_1` is unknown, a first pass from the bank's mean finds a row to use as r.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.engines.base import LOGIT_ERROR, LOST
from stagewise.engines.kernels import KernelError, launch, missing, shape_of
from stagewise.posterior import Posterior
from stagewise.queries import Queries

__all__ = [
    "CHOSEN_PARTS",
    "MOST",
    "Around",
    "Parts",
    "at_a_time",
    "by_rows",
    "posterior",
    "runs",
    "serves",
]

_LARGEST_DIM = 2**13
"""Largest number of numbers in a sample: a program holds three such vectors in registers."""

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_SPLIT, _PARTS, CHOSEN_PARTS, _SLOTS = 64, 512, 64, 8
"""Least rows of a program; most parts of the rows of a query, also if only chosen queries are
answered; and how many of these run in parallel."""

MOST = 65535
"""Queries at a time, by CUDA's limit on a grid."""

_PART_BYTES = 2**28
"""Memory for partial sums."""


class Parts(NamedTuple):
    """Results for parts of the rows of each query, the input of `merge`.

    Attributes:
        sums: The largest log-weight, which the others count from, and sums of `w`, `w l` and `w^2`,
            (B, parts, 4), float32.
        best: The row of the largest, (B, parts), int64.
        pulls: Sums of `w d`, (B, parts, D), float32.
        logits: `l_i - l_r`, (B, width), float32, -inf for none; (B, 0) if they are not kept.
    """

    sums: Tensor
    best: Tensor
    pulls: Tensor
    logits: Tensor


class Around:
    """Queries, each around a sample r: `near`, (B, D), float64."""

    def __init__(self, bank: LatentBank, queries: Queries, near: Tensor) -> None:
        self.rows, self.near = bank.rows, near.contiguous()
        count, dim = near.shape
        self.block, self.at_once, self.warps = shape_of(dim, bank.dtype.itemsize)
        self.query, self.origin = near.new_empty(2, count, dim, dtype=torch.float32)
        self.factors = near.new_empty(count, 2)
        given = (queries.xt, self.near, bank.offset.to(near.device), *queries.path[:2])
        made = [self.query, self.origin, self.factors]
        read = [x.contiguous() for x in given]
        values = [bank.radius / LOST, bank.radius * LOST / LOGIT_ERROR]
        launch("prepare", [count], read, made, [dim, self.block], self.warps, values)

    def parts(
        self,
        ends: Tensor,
        width: int,
        listed: bool = False,
        tabled: bool = False,
        order: Tensor | None = None,
        spare: int = 0,
    ) -> Parts:
        """Reads rows.

        Args:
            ends: The first row of each query and the row after its last, (B, 2), int64; if
                `tabled`, its rows, (B, width), -1 for none.
            width: Rows of a query, at most.
            listed: Whether to keep the log-weights.
            tabled: Whether `ends` is a table.
            order: The number of queries to answer, and which, int32; default all.
            spare: Free parts at the end.
        """
        count, dim = self.near.shape
        most = _PARTS if order is None else CHOSEN_PARTS
        split = max(_SPLIT, -(-width // most))
        parts = -(-width // split)
        held = parts + spare
        single: Any = {"dtype": torch.float32, "device": self.near.device}
        made = Parts(
            torch.empty(count, held, 4, **single),
            torch.empty(count, held, dtype=torch.int64, device=self.near.device),
            torch.empty(count, held, dim, **single),
            torch.full((count, width), -torch.inf, **single)
            if listed
            else torch.empty(count, 0, **single),
        )
        launch(
            "pull",
            [parts, count if order is None else min(count, _SLOTS)],
            [
                *(self.rows, self.query, self.origin, self.factors, ends.contiguous()),
                self.factors if order is None else order,
            ],
            made,
            [
                *(width, held, split, dim, self.block, self.at_once),
                *(listed, tabled, order is not None),
            ],
            self.warps,
        )
        return made

    def merge(
        self, parts: Parts, into: tuple[Tensor, ...] = (), order: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The posterior, written `into` tensors of an earlier call if these are given.

        Returns:
            The mean, (B, D); log-evidence, entropy, effective sample size, largest weight,
            `log sum_i exp(l_i - l_r)`, and 0, (6, B); all float64. The row of the largest weight,
            (B,).
        """
        count, dim = self.near.shape
        made = into or (
            torch.empty_like(self.near),
            self.near.new_empty(6, count),
            self.near.new_empty(count, dtype=torch.int64),
        )
        step = min(self.block, 512)
        launch(
            "merge",
            [count if order is None else min(count, _SLOTS), -(-dim // step)],
            [*parts[:3], self.near, self.factors, self.factors if order is None else order],
            made,
            [count, parts.sums.shape[1], dim, step, order is not None],
        )
        return made


_said: set[str] = set()


def serves(bank: LatentBank, device: torch.device) -> bool:
    """Whether the kernels work for a bank on a device; warns once if Triton is missing."""
    fits = (
        device.type == "cuda"
        and bank.device == device
        and bank.dtype in _TYPES
        and bank.rows.is_contiguous()
        and bank.dim <= _LARGEST_DIM
    )
    if not fits or _said:
        return False
    reason = missing()
    if reason:
        _say(reason)
    return not reason


def _say(reason: str) -> None:
    """Warns, and uses products from now on."""
    _said.add(reason)
    warnings.warn(
        f"The oracle's kernels do not run here, and products are used instead: {reason}",
        stacklevel=4,
    )


def runs(answer: Any, *args: Any) -> Any:
    """The result of a function of kernels; None, after one warning, if they do not run here."""
    if _said:
        return None
    try:
        return answer(*args)
    except KernelError as error:
        _say(str(error))
        return None


def by_rows(bank: LatentBank, count: int, width: int) -> bool:
    """Whether reading `width` rows for each query costs less than products with all rows.

    By rates of one H200: a product with 256 queries takes 11 ns of tensor cores per row of 4096
    numbers, in float32 80 ns, and at least 4 ns to read; a query takes 2 ns to read a row.
    """
    queries = 32 if bank.dtype.itemsize == 2 else 5
    return count * width <= max(2, count / queries) * len(bank)


def posterior(
    bank: LatentBank, queries: Queries, k: int, width: int, table: Tensor | None = None
) -> Posterior:
    """The posterior of each query over its at most `width` rows, for a bank that `serves` accepts.

    Costs no device sync. Rows are those of its ends, or with a `table`, (B, width), those listed
    there, -1 for none, of queries with `x1`. Returns what `Engine.posterior` does.
    """
    step = at_a_time(bank, width)
    if table is None:
        return Posterior.cat([_posterior(bank, some, k, width) for some in queries.split(step)])
    pairs = zip(queries.split(step), table.split(step), strict=True)
    return Posterior.cat([_posterior(bank, some, k, width, own) for some, own in pairs])


def at_a_time(bank: LatentBank, width: int) -> int:
    """Number of queries of at most `width` rows whose partial sums fit into memory."""
    parts = min(_PARTS, -(-width // _SPLIT))
    return min(MOST, max(1, _PART_BYTES // (4 * bank.dim * parts)))


def _posterior(
    bank: LatentBank, queries: Queries, k: int, width: int, table: Tensor | None = None
) -> Posterior:
    xt, ends = queries.xt, queries.ends_on_device if table is None else table
    tabled, near = table is not None, queries.x1
    if near is None:
        around = Around(bank, queries, bank.centre.to(xt.device).expand_as(xt))
        near = bank.take(around.merge(around.parts(ends, width))[2], xt.device)
    around = Around(bank, queries, near)
    parts = around.parts(ends, width, listed=k > 1, tabled=tabled)

    def rows_at(place: Tensor) -> Tensor:
        return ends.gather(1, place) if tabled else ends[:, :1] + place

    mean, told, row = around.merge(parts)
    return listing(mean, told, row, k, parts.logits, rows_at)


def listing(
    mean: Tensor, told: Tensor, row: Tensor, k: int, logits: Tensor, rows_at: Any
) -> Posterior:
    """The posterior from what `Around.merge` returns, with the k largest of the `logits`."""
    log_evidence, entropy, ess, top, relative, tail = told
    weights, rows = top[:, None], row[:, None]
    if k > 1:
        largest, place = logits.topk(min(k, logits.shape[1]), dim=1)
        weights = (largest - relative[:, None]).exp()
        rows = rows_at(place).masked_fill(largest == -torch.inf, -1)
        if none := k - place.shape[1]:
            weights, rows = pad(weights, (0, none)), pad(rows, (0, none), value=-1)
    return Posterior(mean, log_evidence, entropy, ess, weights, rows, tail)
