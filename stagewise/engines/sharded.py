r"""The engine for a bank that is spread over the ranks of a job: each holds a part of the rows.

Every rank has its own B queries. They are gathered, each rank p answers all of them over its own
rows with any engine, and the answers are merged (`stagewise.posterior`): with
`w_p = Z_p / sum_q Z_q`, `m = sum_p w_p m_p`, and the small statistics likewise. So a rank gets the
posterior over all rows, exactly as one process would, and holds only its own rows.

**One call**, with R ranks and at most B queries on each, in this order:

1. a header from each rank (six numbers): every rank names the ranks that disagree;
2. all-gather of queries and coefficients, `R B (D + 7)` numbers;
3. each rank's answer: `R B` queries over its `N / R` rows, so the work of one process for `B`
   queries over N rows;
4. all-gather of `log Z_p`, entropy and the like, and k weights and rows: `R^2 B (6 + 2k)` numbers;
5. reduce-scatter of `w_p m_p`: `R B D` numbers, where each rank receives its own queries' sum.

All numbers have 8 bytes. A mean in float32 would have an error of 6e-8 of a sample's norm, which
targets multiply by up to `1/(1 - t)`.

**Every rank must ask whenever one does**, also with zero queries (`xt[:0]`). A rank that does not,
or that fails, causes an error on the others after `timeout`; with NCCL, torch's watchdog then ends
the process. A certificate cannot be used: it knows the rows of one rank only.

On an accelerator a call costs a device sync for the header, one for labels if they are given, one
for `tail_kind` unless the engine is `Exact`, and those of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from stagewise.bank import LatentBank
from stagewise.bank.rows import RowStore
from stagewise.engines.base import NOTHING, Engine
from stagewise.engines.exact import Exact
from stagewise.engines.ranks import (
    About,
    Header,
    Layout,
    Ranks,
    pack_queries,
    require_agreement,
    require_classes,
    unpack_queries,
    warn_of_differences,
)
from stagewise.posterior import Posterior, TailKind, merge, replace_queries
from stagewise.queries import Queries, segments_of, with_source_weight

__all__ = ["EmptyShard", "Sharded", "combine", "pack", "shard_rows", "shares"]

_KINDS: tuple[TailKind, ...] = get_args(TailKind)

# The columns of `pack` before the weights and rows.
_LOG_Z, _ENTROPY, _ESS, _TAIL, _LOG_SOURCE, _KIND, _COLUMNS = range(7)


def shard_rows(num_rows: int, rank: int, world_size: int) -> slice:
    """The contiguous part of the rows that a rank holds.

    Sizes differ by at most one. A bank has at least two rows: if there are fewer than two for each
    rank, the last ranks get none (`EmptyShard`). For class-wise queries shuffle rows that are
    sorted by class: otherwise the few ranks that hold a class do all of its work.

    Args:
        num_rows: N, at least 2.
        rank: Which rank.
        world_size: How many ranks.

    Returns:
        The rows, as a slice of all.

    Raises:
        ValueError: For numbers out of range.

    Example:
        >>> from stagewise.engines import shard_rows
        >>> [shard_rows(10, rank, 4) for rank in range(4)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None), slice(8, 10, None)]
    """
    if num_rows < 2:
        raise ValueError(f"Expected `num_rows` of at least 2, got {num_rows}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"Expected `rank` from 0 to {world_size - 1}, got {rank}.")
    holders = min(world_size, num_rows // 2)
    size, more = divmod(num_rows, holders)
    first, last = (min(r, holders) * size + min(r, more) for r in (rank, rank + 1))
    return slice(first, last)


class EmptyShard(LatentBank):
    """The shard of a rank without rows, which has queries but no rows.

    Args:
        shape: Shape of one sample, that of the other ranks' shards.
        dtype: Their storage dtype, default float32.

    Example:
        >>> import torch
        >>> from stagewise.engines import EmptyShard
        >>> len(EmptyShard((4, 8, 8), torch.bfloat16))
        0
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        dim = torch.Size(shape).numel()
        self.centre = torch.zeros(dim, dtype=torch.float64)
        RowStore.__init__(self, torch.empty(0, dim, dtype=dtype), self.centre, tuple(shape))
        self.sq_norms = torch.empty(0, dtype=torch.float64)
        self.mean_sq_norm = torch.zeros((), dtype=torch.float64)
        # `Sharded.prepare` makes `max_norm` that of all ranks: corrections are rounded by it.
        self.radius = self.max_norm = self.std = 0.0

    def find(self, x1: Tensor, *_: Any, **__: Any) -> Tensor:
        """-1 for each sample, (B,), int64."""
        return torch.full((len(x1),), -1, dtype=torch.int64, device=x1.device)


class Sharded(Engine):
    """Spreads a bank over the ranks: the posterior is over the rows of all of them.

    On every rank make an `Oracle` with this engine and the rank's own rows (`shard_rows`, or
    `EmptyShard` for none). Parts may have different sizes, and a class may be missing on some
    ranks. 16-bit rows are those of one bank if all shards have the same `offset`, as parts of a
    bank do (`LatentBank.part`).

    Building the oracle and asking it are collective. Without `torch.distributed`, or on one rank,
    it is the inner engine.

    Row numbers count over all ranks, in order of rank, in `Posterior.rows` and in `source`.
    `offsets(bank)` translates.

    Args:
        engine: How each rank reaches its own rows, default `Exact()`. With `Nearest(k)` it is k
            rows on every rank.
        group: Ranks that share the bank; default all. The engine makes a group of its own with
            these ranks and this backend, separate from that of DDP.
        timeout: How long to wait for a rank that does not ask, default 5 minutes.

    Raises:
        ValueError: If `timeout` is not positive.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Oracle
        >>> from stagewise.engines import Sharded, shard_rows
        >>> samples, rank, world_size = torch.randn(100, 8), 0, 1  # of torch.distributed
        >>> rows = shard_rows(len(samples), rank, world_size)
        >>> bank = LatentBank(samples[rows].clone())  # a view would keep all of them
        >>> oracle = Oracle(bank, engine=Sharded())
        >>> oracle.posterior(samples[:3], torch.full((3,), 0.5)).mean.shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        engine: Engine | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        if timeout <= timedelta(0):
            raise ValueError(f"Expected a positive `timeout`, got {timeout}.")
        self.engine, self.group, self.timeout = engine or Exact(), group, timeout
        self._forget()

    holds_all_rows = False
    collective = True

    def _forget(self) -> None:
        self._ranks: Ranks | None = None
        self._layouts: WeakKeyDictionary[LatentBank, Layout] = WeakKeyDictionary()
        self._prepared = 0

    def prepare(self, bank: LatentBank) -> None:
        """Agrees with the other ranks on the bank. Collective.

        Raises:
            ValueError: On every rank, if shape, dtype, engine or the presence of labels differ
                between shards, an engine refuses its shard, or no rank has rows.
            ImportError: On every rank, if the engine lacks a library.
            RuntimeError: If a rank does not arrive within `timeout`.
        """
        problem: Exception | None = None
        try:
            bank.require_unmasked(
                "Sharded()", "Give each rank the same bank: LatentBank.open(path)."
            )
            if len(bank):
                self.engine.prepare(bank)
        except Exception as error:  # raised below, after the other ranks know
            problem = error
        if self._ranks is None or not self._ranks.alive:
            self._ranks = Ranks.of(self.group, self.timeout)
        if self._ranks is None and problem is not None:
            raise problem
        self._prepared += 1
        own = About.of(bank, self.engine, problem)
        everyone = [own] if self._ranks is None else self._ranks.objects(own)
        require_agreement(everyone, problem)
        if self._ranks is not None:
            warn_of_differences(everyone, bank)
        offsets = [0]
        for about in everyone:
            offsets.append(offsets[-1] + about.rows)
        if isinstance(bank, EmptyShard):
            bank.max_norm = max(about.max_norm for about in everyone)
        self._layouts[bank] = Layout(
            ranks=self._ranks,
            number=self._prepared,
            offsets=tuple(offsets),
            classes=frozenset[int]().union(*(about.classes for about in everyone)),
            own=frozenset(bank.classes),
            floor=max(about.floor for about in everyone),
        )

    def offsets(self, bank: LatentBank) -> tuple[int, ...]:
        """The number of each rank's first row, and N: R + 1 numbers.

        Row i of the shard of rank r is row `offsets(bank)[r] + i` of all.
        """
        return self._layout(bank).offsets

    def num_rows(self, bank: LatentBank) -> int:
        """How many rows there are on all ranks."""
        return self._layout(bank).offsets[-1]

    def sigma_floor(self, bank: LatentBank) -> float:
        """The largest `sigma_floor` of a rank's engine."""
        return self._layout(bank).floor

    @override
    @torch.no_grad()
    def posterior(self, bank: LatentBank, queries: Queries, k: int = 1) -> Posterior:
        """The posterior over the rows of all ranks, with `source_weight`. Collective.

        Raises:
            ValueError: On every rank, if ranks with queries disagree on `k` or on whether there are
                labels or sources, if they ask about different banks, or about a class that no rank
                has.
            RuntimeError: If a rank does not ask within `timeout`.
        """
        layout, xt, source = self._layout(bank), queries.xt, queries.source
        ranks = layout.ranks
        if ranks is None:
            segments = segments_of(bank, queries.labels, len(queries))
            if not segments:
                return Posterior.empty(xt, k)
            queries = replace(queries, segments=segments)
            return with_source_weight(self.engine.posterior(bank, queries, k), bank, queries)
        flags = (queries.labels is not None, source is not None)
        header = Header.gather(ranks, (layout.number, len(queries), k, xt.shape[1], *flags))
        if not any(header.counts):
            none = None if source is None else xt.new_zeros(0)
            return replace(Posterior.empty(xt, k), source_weight=none)
        packed = ranks.gather(pack_queries(queries, max(header.counts)))
        everyone = unpack_queries(packed, queries, header)
        require_classes(everyone, layout)
        post, log_source = self._over_own_rows(bank, everyone, layout, ranks.rank, header.k)
        small = ranks.gather(pack(post, log_source)).to(xt.device)
        # Reading it is a device sync.
        exact = type(self.engine) is Exact
        kinds = [0] if exact else small[:, 0, _KIND].long().tolist()
        part = shares(small)[ranks.rank, :, None] * post.mean
        mean = ranks.sum_own(header.padded(part)).to(xt.device)[: len(queries)]
        first = sum(header.counts[: ranks.rank])
        small = small[:, first : first + len(queries)]
        own = replace(combine(small), mean=mean, tail_kind=_KINDS[max(kinds)])
        if source is None:
            return own
        log_weight = small[..., _LOG_SOURCE].amax(0) - own.log_evidence
        weight = log_weight.exp().clamp_max(1).masked_fill(source.to(xt.device) < 0, torch.nan)
        return replace(own, source_weight=weight)

    def _over_own_rows(
        self, bank: LatentBank, everyone: Queries, layout: Layout, rank: int, k: int
    ) -> tuple[Posterior, Tensor]:
        """All ranks' queries over the rows of this one, and the log-weight of sources it holds."""
        post = Posterior.empty(everyone.xt, k)
        log_source = torch.full_like(post.log_evidence, -torch.inf)
        labels = everyone.labels or [None] * len(everyone)
        held = [i for i, name in enumerate(labels) if name is None or name in layout.own]
        if not len(bank) or not held:
            return post, log_source
        first, last = layout.offsets[rank : rank + 2]
        some, own = everyone.select(held), None
        if some.source is not None:
            here = (some.source >= first) & (some.source < last)
            own = torch.where(here, some.source - first, -1)
        segments = segments_of(bank, some.labels, len(held))
        some = replace(some, segments=segments, source=own)
        part = self.engine.posterior(bank, some, k)
        there = torch.where(part.rows < 0, part.rows, part.rows + first)
        part = replace(part, rows=there, source_weight=None)
        if own is not None:
            weight = some.log_weight(bank.take(own.clamp_min(0), device=own.device))
            log_source[everyone.place(held)] = weight.where(some.holds(own), -torch.inf)
        return part if len(held) == len(everyone) else replace_queries(
            post, held, part, len(everyone)
        ), log_source

    def _layout(self, bank: LatentBank) -> Layout:
        layout = self._layouts.get(bank)
        if layout is None:
            raise ValueError(
                "Expected a bank that the ranks have agreed on. Build an `Oracle` from this bank "
                "and this engine on every rank, or call `prepare(bank)` on every rank."
            )
        return layout

    def __getstate__(self) -> dict[str, Any]:
        # Agreements with other ranks hold in this process only: a copy must be prepared again.
        return {"engine": self.engine, "group": self.group, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        ranks = 1 if self._ranks is None else self._ranks.size
        return f"Sharded({self.engine!r}, {ranks} ranks)"


def pack(post: Posterior, log_source: Tensor) -> Tensor:
    """A rank's answer without the mean, (B, 6 + 2k), float64: rows are exact up to 2^53."""
    kind = torch.full_like(post.log_evidence, _KINDS.index(post.tail_kind))
    small = (post.log_evidence, post.entropy, post.ess, post.tail_mass, log_source, kind)
    return torch.cat([torch.stack(small, 1), post.weights, post.rows.to(kind)], 1)


def shares(small: Tensor) -> Tensor:
    """`w_p` of the packed answers, (R, B); 0 below `NOTHING`."""
    share = torch.softmax(small[..., _LOG_Z], 0)
    return share.masked_fill(share < NOTHING, 0)


def combine(small: Tensor) -> Posterior:
    """The posterior over all rows from the packed answers, with an empty mean, (B, 0)."""
    k = (small.shape[-1] - _COLUMNS) // 2
    return merge(
        *(
            Posterior(
                mean=part[:, :0],
                log_evidence=part[:, _LOG_Z],
                entropy=part[:, _ENTROPY],
                ess=part[:, _ESS],
                weights=part[:, _COLUMNS : _COLUMNS + k],
                rows=part[:, _COLUMNS + k :].long(),
                tail_mass=part[:, _TAIL],
            )
            for part in small
        )
    )
