"""`LatentBank`: the training latents, as the oracle needs them.

The bank holds N samples as rows of D numbers, sorted by class if there are labels, so that a class
is a contiguous block and needs no copy. A sample is `row + offset`; the offset is zero unless rows
have 16 bits (`building`). The bank also stores what every query needs: the mean (`centre`), the
squared distances from it (`sq_norms`), and their largest (`radius`), in float64, of the samples as
they are stored.

It is not an `nn.Module`: as a buffer it would be broadcast by DDP, duplicated by an averaged (EMA)
copy of the model, and written into every checkpoint. A deep copy of a bank is the bank itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stagewise.bank.bank_file import open_bank, read_rows, write_bank
from stagewise.bank.building import (
    as_tensor,
    class_order,
    measure,
    narrow,
    offset_for,
    read_batches,
    require_rows,
    require_spread,
    require_storage,
    sort_in_place,
)
from stagewise.bank.rows import RowStore
from stagewise.batches import ReadBatch, find_sample
from stagewise.files import FilePath
from stagewise.masks import MaskedLabels, plain
from stagewise.memory import format_bytes

__all__ = ["LatentBank"]


class LatentBank(RowStore):
    """The training samples that posteriors are over.

    Args:
        x: Samples, (N, *), floating point, at least two; a tensor or a NumPy array. Kept without a
            copy when no labels are given and `dtype` is theirs already: do not change them in place
            afterwards.
        labels: Class of each sample, (N,) or (N, 1), any whole numbers; default None (no classes).
        mask: Which numbers of each sample count: bool, (N, *), with the first axes of `x`, such as
            (N, L) for (N, L, d); or lengths, integers (N,). Default None: all. Samples are then
            compared with those of the same mask only (`stagewise.masks`), and stand by mask.
        conditions: What the model is given for each sample besides time and class (text embeddings,
            observations, one-hot), (N, *), for a `ConditionedOracle`; default None. `save`
            writes them, too; a bank of `write` has none: `with_conditions(c)`.
        dtype: Storage: float32, float64, bfloat16 or float16; default that of `x`. A 16-bit bank
            halves the memory; the posterior is then over the rounded samples.
        offset: What 16-bit rows are rounded relative to, D numbers near the mean; default the mean
            of `x`. Parts of one bank (`Sharded`) must share it to be rounded alike.

    Attributes:
        rows: The samples less `offset`, (N, D), in the bank's own order (sorted by class if there
            are labels). `take` and `chunks` read them.
        offset: What is added to a row to get the sample, (D,), float64; zero unless 16-bit rows
            were made from wider samples.
        index: Position in `x` of each row, (N,), or None if the order is unchanged. The oracle
            counts rows in the bank's own order; this translates.
        shape: Shape of one sample.
        centre: Mean of the samples, (D,), float64.
        sq_norms: Squared distance of each sample from `centre`, (N,), float64.
        mean_sq_norm: Mean of `sq_norms`, (), float64.
        radius: The largest distance of a sample from `centre` (not squared).
        max_norm: An upper bound on the norm of a sample.
        off_centre: The distance of `offset` from `centre`.
        conditions: The conditions of the rows, (N, C), in the bank's own order, or None.
        std: Standard deviation of all numbers inside the masks, around their one mean.
        classes: The classes, ascending; empty without labels. With masks, the keys of the pairs of
            mask and label.
        pairs: With masks, `labels` (C,) or None and `mask` (C, *) of each class; else None.

    Raises:
        ValueError: If there are fewer than two rows, rows with NaN or Inf (the count and the first
            index are named), numbers beyond the range of `dtype`, labels of another length, or
            labels that are no whole numbers.
        TypeError: If `x` is not floating point, or either is neither a tensor nor an array.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank
        >>> bank = LatentBank(torch.randn(100, 4, 8, 8), labels=torch.arange(100) % 10)
        >>> len(bank), bank.dim, bank.shape, len(bank.classes)
        (100, 256, (4, 8, 8), 10)
    """

    def __init__(
        self,
        x: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | None = None,
        *,
        mask: Tensor | None = None,
        conditions: Tensor | np.ndarray | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
    ) -> None:
        x = as_tensor(x, "x")
        if not x.is_floating_point():
            raise TypeError(f"Expected floating-point `x`, got {x.dtype}. Scale images to floats.")
        dtype = require_storage(dtype or x.dtype)
        require_rows(tuple(x.shape))
        masks = None if mask is None else MaskedLabels.of(None, mask, x)
        given = (x if masks is None else masks.zero(x)).detach().flatten(1)
        offset = offset_for(given, dtype, offset, masks is not None)
        rows = given if given.dtype == dtype else narrow(given, offset, dtype)
        index, segments, pairs = class_order(labels, len(rows), rows.device, masks)
        if index is not None and rows is given:
            rows = rows[index]
        else:
            sort_in_place(rows, index)
        super().__init__(rows, offset, tuple(x.shape[1:]), index, segments, pairs=pairs)
        self._measure(given.dtype != dtype)
        if conditions is not None:
            self.conditions = self._in_order(conditions)

    def with_conditions(self, conditions: Tensor | np.ndarray) -> LatentBank:
        """A bank of the same rows, which are not copied, with the condition of each.

        Args:
            conditions: (N, *), in the order in which the bank was built (see `index`).

        Raises:
            ValueError: If there are not N of them, or one is not finite.
        """
        bank = self._moved(lambda value: value)
        bank._file, bank.conditions = self._file, self._in_order(conditions)
        bank._fingerprint = None
        return bank

    def _in_order(self, conditions: Tensor | np.ndarray) -> Tensor:
        c = as_tensor(conditions, "conditions").detach()
        if not c.ndim or len(c) != len(self):
            raise ValueError(
                f"Expected `conditions` with shape ({len(self)}, *), one for each row, got "
                f"{tuple(c.shape)}."
            )
        c = (c if c.is_floating_point() else c.float()).reshape(len(c), -1)
        if not c.isfinite().all():
            raise ValueError("Expected finite `conditions`, got NaN or Inf.")
        return c if self.index is None else c[self.index.to(c.device)]

    @classmethod
    def _of(cls, *parts: Any, **more: Any) -> LatentBank:
        """A bank without measures, from the arguments of `RowStore`."""
        bank = cls.__new__(cls)
        RowStore.__init__(bank, *parts, **more)
        return bank

    def _measure(self, narrowed: bool = False) -> LatentBank:
        mean, self.sq_norms = measure(self.rows, self.index)
        self.centre = mean + self.offset
        if narrowed:
            require_spread(math.sqrt(float(self.sq_norms.mean()) / self.dim), self.dtype)
        return self._summarise()

    def _summarise(self) -> LatentBank:
        self.mean_sq_norm = self.sq_norms.mean()
        self.radius = math.sqrt(float(self.sq_norms.max()))
        self.max_norm = self.radius + float(self.centre.norm())
        self.off_centre = float((self.centre - self.offset).norm())
        scatter = self.mean_sq_norm / self.dim + self.centre.var(correction=0)
        if self.pairs is not None:
            sizes = torch.tensor(self.class_sizes)
            valid = float((sizes * self.pairs.counts).sum()) / len(self)
            mean, square = self.centre.sum(), self.mean_sq_norm + self.centre.square().sum()
            scatter = (square / valid - (mean / valid).square()).clamp_min(0)
        self.std = math.sqrt(float(scatter))
        return self

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Any],
        num_rows: int,
        *,
        read_batch: ReadBatch = find_sample,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        copies: int = 1,
        advance: Callable[[int], object] | None = None,
    ) -> LatentBank:
        """Builds a bank in host memory from batches, for example of a `DataLoader`.

        Args:
            batches: Batches of any kind that `read_batch` understands; each sample once.
            num_rows: Number of rows (`len(dataset)`); rows beyond it are not read.
            read_batch: From a batch to `(x_1, labels or None)` or `(x_1, labels or None, mask)`;
                default `batches.find_sample`. With masks, batches may have samples of different
                lengths: all are padded to the longest at the end.
            dtype: Storage dtype; default that of the samples.
            offset: What 16-bit rows are rounded relative to, see the class; default the mean of the
                first rows, up to 256 of them.
            copies: Processes on this host that build the same bank, for the check of memory.
            advance: Called with the number of rows read so far, for a progress display.

        Raises:
            MemoryError: If the bank would not fit into the available memory, before it is
                allocated; the message gives the size and how to make it fit.
            ValueError: If there are fewer than `num_rows` rows, or shapes differ between batches.
        """
        read = read_batches(batches, num_rows, read_batch, dtype, offset, advance, copies)
        rows = torch.empty((num_rows, math.prod(read.shape)), dtype=read.dtype)
        labels, labelled = torch.empty(num_rows, dtype=torch.int64), 0
        for done, part, label in read.parts:
            rows[done : done + len(part)] = part
            if label is not None:
                labels[done : done + len(part)] = label
                labelled += len(part)
        own = labels[:labelled] if labelled else None
        index, segments, pairs = class_order(own, num_rows, masks=read.masks)
        sort_in_place(rows, index)
        bank = cls._of(rows, read.offset, read.shape, index, segments, pairs=pairs)
        return bank._measure(read.narrowed)

    @classmethod
    def write(
        cls,
        path: FilePath,
        batches: Iterable[Any],
        num_rows: int,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        read_batch: ReadBatch = find_sample,
        advance: Callable[[int], object] | None = None,
    ) -> LatentBank:
        """Builds a bank of any size on disk from batches, and opens it (`open`).

        Args:
            path: The file, which is replaced if it exists.
            batches: As for `from_batches`.
            num_rows: As for `from_batches`.
            labels: Integer class of each row, (N,), in the order of the batches; default None (no
                classes). They are needed beforehand because rows are written in order of class.
            mask: The masks of all rows, as for the class; default None: all samples have one shape.
            dtype: Storage dtype; default that of the samples.
            offset: As for `from_batches`.
            read_batch: From a batch to `(x_1, labels or None)`; its labels are compared with
                `labels`.
            advance: As for `from_batches`.

        Raises:
            OSError: If the disk has no room for it.
            ValueError: As `from_batches`, or if labels of a batch differ from `labels`.
        """
        read = read_batches(batches, num_rows, read_batch, dtype, offset, advance, mask=mask)
        index, segments, pairs = class_order(labels, num_rows, masks=read.masks)
        place = torch.arange(num_rows) if index is None else torch.argsort(index)
        rows = torch.empty(num_rows, math.prod(read.shape), dtype=read.dtype, device="meta")
        bank = cls._of(rows, read.offset, read.shape, index, segments, pairs=pairs)

        def fill(rows: Tensor) -> None:
            for done, part, found in read.parts:
                if labels is not None and found is not None:
                    _require_same(found, labels[done : done + len(part)], done)
                rows[place[done : done + len(part)]] = part
            bank.rows = rows
            bank._measure(read.narrowed)

        write_bank(path, bank, fill)
        return cls.open(path)

    def part(self, rows: slice) -> LatentBank:
        """A shard: some of the rows, at least two, as a bank in host memory.

        Rows keep their rounding, order and classes and count from 0. A stride, such as
        `slice(rank, None, world_size)`, gives every shard its share of each class.
        """
        at = torch.arange(len(self), device=self.device)[rows]
        require_rows((len(at), *self.shape))
        own = self.classes_of(at.tolist())
        masks = own if isinstance(own, MaskedLabels) else None
        _, segments, pairs = class_order(plain(own), len(at), masks=masks)
        offset = self.offset.cpu()
        part = self._of(self.rows[at].cpu(), offset, self.shape, None, segments, pairs=pairs)
        part._measure()
        part.conditions = None if self.conditions is None else self.conditions[at].cpu()
        return part

    def save(self, path: FilePath) -> None:
        """Writes the bank to a safetensors file, chunk by chunk, for `open`.

        Args:
            path: The file. If it exists it is replaced once the new one is complete.

        Raises:
            OSError: If the disk has no room for it.
            ValueError: If it was opened from a file whose rows are damaged.
        """
        self.require_intact()

        def fill(rows: Tensor) -> None:
            for first, chunk in self.chunks(self.whole, device=torch.device("cpu")):
                rows[first : first + len(chunk)] = chunk

        write_bank(path, self, fill)

    @classmethod
    def open(cls, path: FilePath, verify: Literal["quick", "full"] = "quick") -> LatentBank:
        """Opens a bank in a file, memory-mapped: a row is read when it is needed.

        The mapping is read-only: writing to `rows` ends the process.

        Args:
            path: What `save` or `write` wrote.
            verify: "quick" (default) compares all except the rows with their checksums; "full"
                reads the rows, too. Certificates, `save` and resumed training do so once.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no bank, not complete, or not what was written.
        """
        if verify not in ("quick", "full"):
            raise ValueError(f'Expected `verify` "quick" or "full", got {verify!r}.')
        bank = open_bank(path, cls._of)
        if verify == "full":
            read_rows(path, bank)
        return bank._summarise()

    def __repr__(self) -> str:
        classes = f", {len(self._segments)} classes" if self.labelled else ""
        if self.pairs is not None:
            classes = f", {len(self._of_masks)} masks{classes}"
            classes += f", the median row compared with {self.median_class} rows"
        if self.conditions is not None:
            classes += f", conditions of {self.conditions.shape[1]} numbers"
        return (
            f"LatentBank({len(self)} rows of shape {self.shape}{classes}, {self.dtype}, "
            f"{self.residency}, {format_bytes(self.nbytes)})"
        )


def _require_same(found: Tensor, labels: Tensor, done: int) -> None:
    if not torch.equal(labels.to(found), found):
        raise ValueError(
            f"Expected batches in the order of `labels`, got a batch with labels {found.tolist()} "
            f"after {done} rows, where {labels.tolist()} were given. Read without shuffling, or, "
            "if these are no labels: read_batch=lambda batch: (batch[0], None)."
        )
