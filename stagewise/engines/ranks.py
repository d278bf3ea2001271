"""The messages between the ranks of a job about a bank that they share.

`About` is sent once for a bank, and gives a `Layout`; a `Header` and the queries with each call.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.engines.base import Engine
from stagewise.memory import format_bytes
from stagewise.paths import PathCoefficients
from stagewise.queries import Queries

__all__ = [
    "About",
    "Header",
    "Layout",
    "Ranks",
    "pack_queries",
    "require_agreement",
    "require_classes",
    "unpack_queries",
    "warn_of_differences",
]


@dataclass(frozen=True)
class Layout:
    """What the ranks agreed on for a bank.

    Attributes:
        ranks: The ranks that share it; None for a single one.
        number: A number of the bank, the same on every rank.
        offsets: The number of each rank's first row, and of all rows, R + 1 numbers.
        classes: The classes of all ranks.
        own: The classes of this rank.
        floor: The largest `sigma_floor` of a rank's engine.
    """

    ranks: Ranks | None
    number: int
    offsets: tuple[int, ...]
    classes: frozenset[int]
    own: frozenset[int]
    floor: float


@dataclass(frozen=True)
class About:
    """What a rank sends about its shard before the first query."""

    shape: tuple[int, ...]
    dtype: str
    engine: str
    rows: int
    classes: list[int]
    floor: float
    max_norm: float
    offset: str
    problem: str | None

    @classmethod
    def of(cls, bank: LatentBank, engine: Engine, problem: Exception | None) -> About:
        """A shard, or the problem that its engine has with it."""
        return cls(
            shape=bank.shape,
            dtype=str(bank.dtype),
            engine=type(engine).__name__,
            rows=len(bank),
            classes=bank.classes,
            floor=engine.sigma_floor(bank) if len(bank) and problem is None else 0.0,
            max_norm=bank.max_norm,
            offset=hashlib.sha256(bank.offset.cpu().numpy().tobytes()).hexdigest(),
            problem=None if problem is None else f"{problem}",
        )


def require_agreement(everyone: Sequence[About], problem: Exception | None) -> None:
    """Refuses, on every rank, shards of different banks, or a shard that its engine refuses."""
    problems = {rank: a.problem for rank, a in enumerate(everyone) if a.problem is not None}
    if problems:
        kind = ImportError if isinstance(problem, ImportError) else ValueError
        raise kind(f"The engine refuses a shard: {_by_rank(problems)}") from problem
    cure = "Build all shards from the same samples and settings, and `EmptyShard` like them."
    for name in ("shape", "dtype", "engine"):
        values = {rank: getattr(about, name) for rank, about in enumerate(everyone)}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"Expected the same {name} on every rank, got {_by_rank(values)}. {cure}"
            )
    labelled = {
        rank: "labels" if about.classes else "no labels"
        for rank, about in enumerate(everyone)
        if about.rows
    }
    if not labelled:
        raise ValueError("Expected rows on at least one rank, got none on any.")
    if len(set(labelled.values())) > 1:
        raise ValueError(
            f"Expected labels on every rank that has rows, or on none, got {_by_rank(labelled)}. "
            "Build the banks alike: LatentBank(x, labels)."
        )


def warn_of_differences(everyone: Sequence[About], bank: LatentBank) -> None:
    """Warns of shards that differ a little from parts of one bank, or keep too much memory."""
    if len({about.offset for about in everyone if about.rows}) > 1:
        warnings.warn(
            f"The shards are rounded to {bank.dtype} relative to different means, so that the "
            "posterior differs, by about a rounding, from that of one process with all rows. Give "
            "all shards the same: LatentBank(x, labels, dtype=..., offset=vector near the mean), "
            "or cut them from one bank: bank.part(slice(rank, None, world_size)).",
            stacklevel=3,
        )
    held = bank.rows.untyped_storage().nbytes()
    if bank.residency != "memory-mapped" and held > 2 * bank.nbytes > 0:
        warnings.warn(
            f"The shard is a view of {format_bytes(held)}, which this rank keeps for "
            f"{format_bytes(bank.nbytes)} of rows. Copy its rows, LatentBank(x[rows].clone()), and "
            "delete x.",
            stacklevel=3,
        )


def _require_alike(name: str, values: Mapping[int, object]) -> None:
    if len(set(values.values())) > 1:
        raise ValueError(
            f"Expected every rank to ask with the same {name}, got {_by_rank(values)}. Ranks ask "
            "together: see that all reach the same call, those without queries with `xt[:0]`."
        )


def _by_rank(values: Mapping[int, object]) -> str:
    """Values and their ranks: `1 on rank 0; 5 on rank 1, 2`."""
    ranks: dict[object, list[str]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(f"{value} on rank {', '.join(at)}" for value, at in ranks.items())


@dataclass(frozen=True)
class Header:
    """The number of queries of each rank, and their common settings."""

    counts: list[int]
    k: int
    labels: bool
    source: bool

    @classmethod
    def gather(cls, ranks: Ranks, own: Sequence[int]) -> Header:
        """From this rank's number of the bank, B, k, D, and whether it has labels and sources."""
        everyone = ranks.gather(torch.tensor(own)).tolist()
        # The settings of a rank without queries do not matter.
        asking = {rank: row for rank, row in enumerate(everyone) if row[1]}
        _require_alike("bank", {rank: row[0] for rank, row in enumerate(everyone)})
        _require_alike("`k`", {rank: row[2] for rank, row in asking.items()})
        _require_alike("size of a query", {rank: row[3] for rank, row in asking.items()})
        for column, name in ((4, "`labels`"), (5, "`source`")):
            given = {rank: "given" if row[column] else "none" for rank, row in asking.items()}
            _require_alike(name, given)
        _, _, k, _, labels, source = next(iter(asking.values()), own)
        return cls([row[1] for row in everyone], k, bool(labels), bool(source))

    def padded(self, value: Tensor) -> Tensor:
        """Rows of all ranks, (sum of counts, n), in a block of equal size for each rank."""
        width = max(self.counts)
        blocks = value.split(self.counts)
        return torch.stack([pad(block, (0, 0, 0, width - len(block))) for block in blocks])


def pack_queries(queries: Queries, count: int) -> Tensor:
    """Queries as one tensor of `count` lines, (count, D + 7), int64, which holds any label."""
    labels = queries.labels or [None] * len(queries)
    names, none = [label or 0 for label in labels], [label is None for label in labels]
    coded = torch.stack([queries.index(names), queries.index(none)], 1)
    unknown = torch.full_like(coded[:, 0], -1)
    source = unknown if queries.source is None else queries.source.to(coded)
    numbers = torch.cat([queries.xt, torch.stack(queries.path, 1)], 1).view(torch.int64)
    own = torch.cat([numbers, coded, source[:, None]], 1)
    return pad(own, (0, 0, 0, count - len(own)))


def unpack_queries(packed: Tensor, like: Queries, header: Header) -> Queries:
    """The queries of all ranks, in order of rank, from `pack_queries` of each, (R, B, n)."""
    lines = [part[:count] for part, count in zip(packed, header.counts, strict=True)]
    whole = torch.cat(lines).to(like.xt.device)
    dim, dtype = like.xt.shape[1], like.xt.dtype
    labels = None
    if header.labels:
        coded = whole[:, dim + 4 : dim + 6].tolist()
        labels = [None if none else label for label, none in coded]
    return Queries(
        xt=whole[:, :dim].contiguous().view(dtype),
        path=PathCoefficients(*whole[:, dim : dim + 4].T.contiguous().view(dtype)),
        segments=(),
        source=whole[:, dim + 6] if header.source else None,
        labels=labels,
    )


def require_classes(queries: Queries, layout: Layout) -> None:
    """Refuses, on every rank, a class that none of them has."""
    missing = sorted({name for name in queries.labels or () if name is not None} - layout.classes)
    if missing and not layout.classes:
        raise ValueError(
            "A class-wise posterior needs banks with labels: LatentBank(x, labels) on every rank."
        )
    if missing:
        raise ValueError(
            f"Class {missing[0]} is not in the bank of any rank; they have {len(layout.classes)} "
            f"classes from {min(layout.classes)} to {max(layout.classes)}. Build the banks from "
            "the labels that training uses."
        )


class Ranks:
    """A process group of the engine, and the collectives that it needs."""

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self._group, self._timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = _device(dist.get_backend_config(group))
        self._scatters = True
        try:
            self.sum_own(torch.zeros(self.size, 1, dtype=torch.float64))
        except RuntimeError:  # older backends have no such collective
            self._scatters = False

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, timeout: timedelta) -> Ranks | None:
        """The ranks of a group; None for a single one."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return None
        if dist.get_world_size(group) < 1:
            raise ValueError("Expected a `group` that this rank belongs to, got one of others.")
        with _explained(timeout):
            if group is None:
                own = dist.new_group(timeout=timeout)
            else:
                # Ranks outside the group do not call this.
                own = dist.new_group(
                    dist.get_process_group_ranks(group),
                    timeout,
                    dist.get_backend(group),
                    use_local_synchronization=True,
                )
            assert isinstance(own, dist.ProcessGroup)
            return cls(own, timeout)

    @property
    def alive(self) -> bool:
        """Whether the group still exists: destroying the default group ends all groups."""
        if not dist.is_initialized():
            return False
        try:
            return bool(dist.get_process_group_ranks(self._group))
        except KeyError:
            return False

    def objects(self, own: Any) -> list[Any]:
        """One object of each rank."""
        everyone: list[Any] = [None] * self.size
        with _explained(self._timeout):
            dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def gather(self, own: Tensor) -> Tensor:
        """Tensors of the same shape from all ranks, stacked."""
        own = own.to(self._device).contiguous()
        everyone = own.new_empty(self.size, *own.shape)
        with _explained(self._timeout):
            gather = _named("all_gather_single", "all_gather_into_tensor")
            gather(everyone.flatten(), own.flatten(), group=self._group)
        return everyone

    def sum_own(self, blocks: Tensor) -> Tensor:
        """The sum over ranks of this rank's block; `blocks` is (R, ...)."""
        blocks = blocks.to(self._device).contiguous()
        own = blocks.new_empty(blocks.shape[1:])
        with _explained(self._timeout):
            if self._scatters:
                scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
                scatter(own.flatten(), blocks.flatten(), group=self._group)
                return own
            dist.all_reduce(blocks, group=self._group)
        return blocks[self.rank]


def _named(name: str, before: str) -> Callable[..., Any]:
    """A collective by its name since torch 2.14, or by its earlier name."""
    return getattr(dist, name, None) or getattr(dist, before)


def _device(config: str) -> torch.device:
    """The device for tensors of a backend `config` such as "cpu:gloo,cuda:nccl"."""
    for pair in config.split(","):
        kind, _, backend = pair.partition(":")
        if kind != "cpu" and backend != "gloo" and torch.get_device_module(kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


@contextmanager
def _explained(timeout: timedelta) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Expected every rank to ask the oracle, also with zero queries (`xt[:0]`): one ended, "
            f"or did not ask within {timeout}. Look for an earlier error of another rank; if it is "
            f"only slow, raise `Sharded(timeout=...)`. The backend says: {error}"
        ) from error
