r"""Smoothing: each training row becomes a Gaussian shaped by its nearest rows.

    x~_1 = x_i + sum_k A_i[k] z_k + h e,    A_i[k] = (g / sqrt K) (x_{n(i,k)} - x_i),
    z ~ N(0, I_K),  e ~ N(0, I_D),

with `n(i, .)` the K nearest rows that differ from row i, g the scale and h the floor. A model that
is trained on draws of x~_1 has another optimum than one trained on rows: the mean over
neighbourhoods, not over rows learnt by heart (geometry-aware noise: CDC-FM, arXiv 2510.05930;
manifold Parzen windows: Vincent & Bengio, NeurIPS 2002). Its oracle is `SmoothedOracle`.

**A cut in t joins two fields.** The rows are best smoothed only where the posterior has collapsed
on one of them. Targets below the boundary are then those of the rows, above it those of the
smoothed set, and no single probability path has both. A ramp in t is gentler.

**Copies of a row are not its neighbours**: they would be directions of length 0. A row with fewer
than K others that differ from it has those (K is then their number), and one with none stays.

**Latents with a mean and a standard deviation.** A sample that the VAE drew around its row is in a
Gaussian already: keep the floor 0.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from stagewise.bank import LatentBank
from stagewise.nearest_rows import nearest_others
from stagewise.oracle import Oracle
from stagewise.paths import expand_like
from stagewise.queries import Times, require_tensors
from stagewise.smoothing_inputs import (
    Strength,
    check_near,
    check_settings,
    require_fixed,
    rows_of,
    search_space,
    strength_at,
)
from stagewise.stages import StageBoundary
from stagewise.tensor_files import is_computed, read_computed, write_tensors
from stagewise.tracing import untraced

if TYPE_CHECKING:
    from stagewise.smoothing_fit import SmoothingScore

__all__ = ["Smoothing"]

_FORMAT = {"format": "stagewise.Smoothing", "version": "1"}


class Smoothing:
    """Replaces each row of a bank by a Gaussian shaped by its nearest rows, and draws from it.

    It is a plain object; a deep copy returns the smoothing itself.

    Args:
        bank: The rows, in host memory, on a device or in a file.
        neighbours: K, default 8.
        scale: g, default 1. 0 leaves the floor only.
        floor: h, in the units of the bank, default 0. On small sets 0.05 gains more; on larger ones
            it harms.
        class_wise: Whether neighbours are of the row's own class, default False: among all rows was
            measured to be better.
        features: Where to look for neighbours instead of the rows: (N, *) numbers, in the order of
            the samples that the bank was made from. Default None.
        device: Where to search, default where the bank is.
        progress: Whether to show a bar, default True; without tqdm there is none.
        file: Where the neighbours are kept, default nowhere; see `cached`.

    Attributes:
        index: The neighbours, (N, K), int32, on the CPU, in the bank's own order; the row itself
            where there are fewer.
        scores: What `fit` tried; empty without it.

    Raises:
        ValueError: On settings out of range, K of N or more, a bank without labels for
            `class_wise`, or features of another length or with NaN or Inf.
        TypeError: If `bank` is no bank or `features` no tensor.

    Example:
        >>> import torch
        >>> bank = LatentBank(torch.randn(200, 16))
        >>> smoothing = Smoothing(bank, progress=False)
        >>> source = torch.randint(200, (32,))
        >>> x1 = bank.rows[source]
        >>> t = torch.rand(32)
        >>> smoothed = smoothing.draw(x1, source, t=t, boundary=0.5)
        >>> torch.equal(smoothed[t < 0.5], x1[t < 0.5])
        True
    """

    def __init__(
        self,
        bank: LatentBank,
        neighbours: int = 8,
        scale: float = 1.0,
        floor: float = 0.0,
        *,
        class_wise: bool = False,
        features: Tensor | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        check_settings(bank, neighbours, scale, floor)
        space = search_space(bank, features, class_wise)
        self.bank, self.class_wise = bank, class_wise
        self._space = "rows" if features is None else space.fingerprint
        self.scale, self.floor = float(scale), float(floor)
        self._moved: dict[torch.device, Tensor] = {}
        self._checked = False
        self.scores: list[SmoothingScore] = []
        if file is not None and is_computed(file, self._header(neighbours), "smoothing"):
            bank.require_intact()
            wanted = {"index": (torch.int32, (len(bank), neighbours))}
            self.index: Tensor = read_computed(file, wanted, "smoothing")[0]
        else:
            near = nearest_others(space, neighbours, class_wise, device, progress)
            self.index = near.where(near >= 0, torch.arange(len(near), dtype=torch.int32)[:, None])
            if file is not None:
                self.save(file)
        self._all_have_k = self._has_all()

    def _has_all(self) -> bool:
        """Whether each row has K neighbours."""
        return bool((self.index != torch.arange(len(self.index))[:, None]).all())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._all_have_k = self._has_all()  # pickles of before lack it

    @classmethod
    def cached(
        cls, path: str | os.PathLike[str], bank: LatentBank, *settings: Any, **options: Any
    ) -> Smoothing:
        """With the neighbours in the file at `path`, if they are those asked for.

        Otherwise they are searched and saved. The file holds neighbours only: scale and floor may
        be others each time. Warns before it replaces neighbours of other latents or settings. Of
        several processes, let one go first.

        Args:
            path: The file, which need not exist.
            bank: The rows.
            *settings: Further arguments of the class.
            **options: The same.

        Raises:
            ValueError: If there is a file of something else; and as the class.
        """
        return cls(bank, *settings, **options, file=path)

    @classmethod
    def fit(
        cls,
        bank: LatentBank,
        boundary: float | StageBoundary | None = None,
        *,
        class_wise: bool = False,
        progress: bool = True,
    ) -> Smoothing | None:
        """Neighbours and scale by cross-validation, for sets of up to some thousand rows.

        Of 8, 16, 32 and 64 neighbours and scales from 0.25 to 1.4 what makes samples no farther
        from rows left out than the rows themselves are, with the best field; see `smoothing_fit`.
        If the model does not memorize (`forecast_smoothing` measures it), smoothing gains little.

        Args:
            bank: The rows; at least 20.
            boundary: Time from which on they are smoothed; see `time_of`. Default: measured,
                class-wise if the bank has classes.
            class_wise: Whether neighbours are of the row's own class.
            progress: Whether to show a bar.

        Returns:
            The smoothing, with its `scores`; or None, with a warning that says why, if none of the
            settings helps: `Scheme(smoothing=None)` is plain training.

        Raises:
            ValueError: For fewer than 20 rows, or a boundary outside [0, 1).
            TypeError: If `bank` is no bank.
        """
        from stagewise.smoothing_fit import fitted

        return fitted(bank, boundary, class_wise, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the neighbours for `cached`, in one step: there is never half a file at `path`."""
        write_tensors(path, {"index": self.index}, self._header(self.neighbours))

    def _header(self, neighbours: int) -> dict[str, str]:
        numbers = {"rows": len(self.bank), "dim": self.bank.dim, "neighbours": neighbours}
        about = {"fingerprint": self.bank.fingerprint, "class_wise": str(self.class_wise)}
        about["space"] = self._space
        return _FORMAT | about | {k: str(v) for k, v in numbers.items()}

    @untraced
    def draw(
        self,
        x1: Tensor,
        source: Tensor | None = None,
        *,
        t: Times | None = None,
        boundary: float | StageBoundary | None = None,
        strength: Strength | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Smoothed samples: x1, moved by a draw from the Gaussian around its row.

        Args:
            x1: Samples, (B, *). Nothing is written into them.
            source: Their rows, (B,), integers, as `bank.find` gives them. Default: looked up, which
                costs a product of the batch's keys and reads its rows. With the bank on the host
                give them on the host, which costs no device sync.
            t: Their times, (B,), or as in `Oracle.posterior`; for the two that follow.
            boundary: Rows are smoothed at this time and after it, and left as they are before it,
                to the last bit; see `time_of`. Default: all are smoothed.
            strength: In place of a boundary, any function of t: a ramp, say.
            generator: Of the draws, default the global one of the device of `x1`.

        Returns:
            (B, *), in the dtype and on the device of `x1`.

        Raises:
            ValueError: On samples that are no rows without a source, a source that is no row,
                samples far from their rows (in the first call), shapes that do not fit, a boundary
                or a strength without times, both, or one outside [0, 1]. On an accelerator values
                are checked by assertions, which cost no sync.
            TypeError: If `x1` or `source` is no tensor.
        """
        source = self.source_of(x1, source)
        return self.around(x1, source, strength_at(x1, t, boundary, strength), generator)

    def source_of(self, x1: Tensor, source: Tensor | None) -> Tensor:
        """The rows of samples, (B,), given or looked up; refuses what `draw` refuses of both."""
        require_tensors(x1=x1)
        if math.prod(x1.shape[1:]) != self.bank.dim or x1.ndim < 2:
            raise ValueError(
                f"Expected `x1` with shape {('B', *self.bank.shape)} as the bank's samples, got "
                f"{tuple(x1.shape)}."
            )
        source = rows_of(self.bank, x1, source)
        if not self._checked and len(x1):
            check_near(self.bank, x1, source)
            self._checked = True
        return source

    def around(
        self, x1: Tensor, source: Tensor, share: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """A draw around rows that are known, (B,), with a share of the move, (B,), or all of it."""
        place = x1.device if generator is None else generator.device
        wide = torch.promote_types(x1.dtype, torch.float32)
        shape = (len(x1), self.num_normals)
        normals = torch.randn(shape, dtype=wide, device=place, generator=generator)
        return self.moved(x1, source, normals, share)

    @property
    def neighbours(self) -> int:
        """K."""
        return self.index.shape[1]

    @property
    def num_normals(self) -> int:
        """Standard normal numbers that a draw takes: K for the neighbours, D more with a floor."""
        return self.neighbours + (self.bank.dim if self.floor else 0)

    @torch.no_grad()
    def moved(
        self, x1: Tensor, source: Tensor, normals: Tensor, share: Tensor | None = None
    ) -> Tensor:
        """What a draw does with its normal numbers, in the dtype of `x1`.

        Args:
            x1: Samples, (B, *).
            source: Their rows, (B,).
            normals: z, and after it e if there is a floor, (B, `num_normals`).
            share: What multiplies the move, (B,); default 1.
        """
        stored = self.bank.rows
        wide = torch.promote_types(x1.dtype, torch.float32)
        normals = normals.to(x1.device, wide)
        rows = source.to(stored.device)
        near = self._index_on(stored.device).index_select(0, rows)
        z = normals[:, : self.neighbours]
        if self._all_have_k:
            z = z * (
                self.scale / torch.full((), self.neighbours, dtype=wide, device=z.device).sqrt()
            )
        else:
            there = (near != rows[:, None]).to(z.device)
            z = z * (self.scale / there.sum(1, keepdim=True).clamp_min(1).to(wide).sqrt()) * there
        # Factors add up to 0, so that offsets cancel.
        table = torch.cat([near, rows[:, None]], dim=1)
        factors = torch.cat([z, -z.sum(1, keepdim=True)], dim=1)
        if stored.dtype == wide and stored.device == x1.device:
            # Adds up rows where they lie, without a copy of them.
            move = embedding_bag(table, stored, mode="sum", per_sample_weights=factors)
        else:
            move = torch.zeros(len(x1), self.bank.dim, dtype=wide, device=x1.device)
            for row, factor in zip(table.T, factors.T, strict=True):
                move.addcmul_(factor[:, None], stored[row].to(x1.device, wide))
        if self.floor:
            move.add_(normals[:, self.neighbours :], alpha=self.floor)
        if share is None:
            return (x1 + move.reshape(x1.shape)).to(x1.dtype)
        share = expand_like(share.to(x1.device, wide), x1)
        return torch.where(share > 0, (x1 + share * move.reshape(x1.shape)).to(x1.dtype), x1)

    def factors(
        self, rows: Tensor, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x_i` (n, D), `g / sqrt K` (n, 1, 1) and `A_i` (n, K, D) of some rows (n,), float64."""
        near, x = self.index[rows].long(), self.bank.take(rows, device)
        count = (near != rows[:, None]).sum(1).clamp_min(1).to(x)
        length = (self.scale / count.sqrt())[:, None, None]
        return x, length, length * (self.bank.take(near, device) - x[:, None])

    def _index_on(self, device: torch.device) -> Tensor:
        if self.index.device == device:
            return self.index
        if device not in self._moved:
            moved = self.index.to(device)
            if type(moved) is not type(self.index):
                return moved  # a fake tensor may not be kept beside real ones
            self._moved[device] = moved
        return self._moved[device]

    def with_scale(self, scale: float | None = None, floor: float | None = None) -> Smoothing:
        """The same neighbours with another scale or floor."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.scale = self.scale if scale is None else float(scale)
        other.floor = self.floor if floor is None else float(floor)
        check_settings(self.bank, self.neighbours, other.scale, other.floor)
        return other

    def check(self, oracle: Oracle) -> None:
        """Refuses an oracle of another bank, of one over ranks, or with another smoothing."""
        if not oracle.engine.holds_all_rows:
            raise ValueError(
                "Expected an oracle with all rows for a smoothing, got Sharded(): neighbours lie "
                "on other ranks. Give each rank the same memory-mapped bank: "
                "Oracle(LatentBank.open(path)), Smoothing(LatentBank.open(path))."
            )
        if oracle.smoothing is not None and oracle.smoothing is not self:
            raise ValueError(
                f"Expected one smoothing, got two: {self!r}, and {oracle.smoothing!r} of the "
                "oracle. Give the plain oracle: Oracle(oracle.bank, oracle.path)."
            )
        self.check_bank(oracle.bank)

    def check_bank(self, bank: LatentBank) -> None:
        """Refuses another bank than the smoothing's, and one whose rows change."""
        require_fixed(bank)
        if bank is not self.bank and bank.fingerprint != self.bank.fingerprint:
            raise ValueError(
                f"Expected the bank of the smoothing, {self.bank!r}, got {bank!r} with other rows. "
                "Make one for it: Smoothing(bank)."
            )

    def __copy__(self) -> Smoothing:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Smoothing:
        return self

    def __repr__(self) -> str:
        return f"Smoothing({self.neighbours} neighbours, scale={self.scale}, floor={self.floor})"
