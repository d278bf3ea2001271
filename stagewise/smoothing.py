r"""Smoothing: each training row becomes a Gaussian shaped by its nearest rows.

    x~_1 = x_i + sum_k A_i[k] z_k + f e,    A_i[k] = (g / sqrt K) (x_{n(i,k)} - x_i),
    z ~ N(0, I_K),  e ~ N(0, I_D),

with `n(i, .)` the K nearest rows that differ from row i, g the scale and f the isotropic floor. A
model that is trained on draws of x~_1 has another optimum than one that is trained on rows: it
learns neighbourhoods of rows and does not memorize the rows (geometry-aware noise: CDC-FM, arXiv
2510.05930; manifold Parzen windows: Vincent & Bengio, NeurIPS 2002). Its oracle is
`SmoothedOracle`.

**A boundary in t joins two fields.** Smoothing works best only where the posterior has collapsed
on one row. Then targets before the boundary are those of the rows, and targets after it are those
of the smoothed set. No single probability path has both. A ramp in t has no jump.

**Duplicates of a row are not its neighbours**: they would be directions of length 0. If fewer than
K other rows differ from a row, K is their number for that row. If none differs, the row is not
smoothed; a warning says so where that holds for all rows.

**Latents with a mean and a standard deviation.** If the VAE draws a sample around its row, the
sample comes from a Gaussian already: keep the isotropic floor at 0.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from stagewise.bank import LatentBank
from stagewise.bank.row_classes import as_real
from stagewise.bank.row_keys import row_keys
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
    tell_of_neighbours,
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

    A copy or a deep copy is the same object.

    Args:
        bank: The rows, in host memory, on a device or in a file.
        neighbours: K, how many nearest rows shape the Gaussian of a row, default 8.
        scale: g, default 1. It multiplies the distances to the neighbours.
        floor: f, the isotropic floor: noise of this standard deviation in all directions, in the
            units of the rows, default 0. On small sets 0.05 lowers the held-out loss further, but
            its noise stays in the samples.
        class_wise: Whether neighbours are searched among rows of the same class only, default
            False: the search among all rows gave better results.
        features: (N, F) numbers in which neighbours are searched instead of the rows, in the order
            of the samples that the bank was made from. Default None. Duplicates are still those of
            the rows.
        device: Device of the search, default the bank's.
        progress: Whether to show a progress bar, default True. It needs tqdm.
        file: File that keeps the neighbours, default none; see `cached`.

    Attributes:
        index: The neighbours of each row, (N, K), int32, on the CPU, in the order of `bank.rows`.
            Where a row has fewer, its own number stands in the rest.
        scores: The settings that `fit` tried, a list of `SmoothingScore`; empty without `fit`.

    Raises:
        ValueError: If a setting is out of range, K is N or more, `class_wise` is given for a bank
            without labels, features have another length or NaN or Inf, or rows of the bank change
            (a reservoir) or have masks.
        TypeError: If `bank` is no `LatentBank`, `neighbours` no whole number, or `features` no
            tensor.

    Example:
        >>> import torch
        >>> from stagewise import LatentBank, Smoothing
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
        neighbours, self.scale, self.floor = check_settings(bank, neighbours, scale, floor)
        space = search_space(bank, features, class_wise)
        self.bank, self.class_wise = bank, class_wise
        self._space = "rows" if space is bank else f"features {space.fingerprint}"
        self._moved: dict[torch.device, Tensor] = {}
        self._checked = False
        self.scores: list[SmoothingScore] = []
        if file is not None and is_computed(file, self._header(neighbours), "smoothing"):
            bank.require_intact()
            wanted = {"index": (torch.int32, (len(bank), neighbours))}
            self.index: Tensor = read_computed(file, wanted, "smoothing")[0]
        else:
            names = None if space is bank else row_keys(bank.rows)
            near = nearest_others(space, neighbours, class_wise, device, progress, names)
            self.index = near.where(near >= 0, torch.arange(len(near), dtype=torch.int32)[:, None])
            if file is not None:
                self.save(file)
        tell_of_neighbours(bank, self.index, class_wise)

    @classmethod
    def cached(
        cls, path: str | os.PathLike[str], bank: LatentBank, *settings: Any, **options: Any
    ) -> Smoothing:
        """A smoothing whose neighbours are kept in the file at `path`.

        They are read from the file if it has those of this bank and these settings. Otherwise they
        are searched and saved; a warning says so before neighbours of other latents or settings are
        replaced. The file does not depend on scale and floor. If several processes share the file,
        let one of them make it first.

        Args:
            path: The file. It need not exist.
            bank: The rows.
            *settings: `neighbours`, `scale` and `floor`, as in `Smoothing`.
            **options: The other arguments of `Smoothing`.

        Raises:
            ValueError: If the file is not one of neighbours; otherwise as in `Smoothing`.
            FileNotFoundError: If its folder is missing; nothing has been searched then.
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
        """Chooses neighbours and scale by cross-validation, for sets of up to some thousand rows.

        The rows are split into 5 folds, and each is left out once. For 8, 16, 32 and 64 neighbours
        it takes the largest scale, from 0.25 to 1 (wider ones made trained models worse), whose
        samples have no larger energy distance to the left-out rows than the other rows have. Of
        these it takes the setting whose exact oracle predicts the velocity of the left-out rows
        best, at times after the boundary. The isotropic floor stays 0. In our trainings the default
        was as good; if the model does not memorize (`forecast_smoothing`), smoothing gains little.

        Args:
            bank: The rows; at least 20.
            boundary: The time t from which on rows are smoothed, in [0, 1), or a `StageBoundary`,
                which stands for its `collapsed`. Default: it is measured, class-wise if the bank
                has classes.
            class_wise: Whether neighbours are of the same class only, default False.
            progress: Whether to show a progress bar, default True.

        Returns:
            The smoothing, with its `scores`. If no setting helps, None, with a warning that gives
            the reason: `Scheme(smoothing=None)` is plain training.

        Raises:
            ValueError: For fewer than 20 rows, or a boundary outside [0, 1).
            TypeError: If `bank` is no `LatentBank`.
        """
        from stagewise.smoothing_fit import fitted

        return fitted(bank, boundary, class_wise, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the neighbours to the file `path`, which `cached` reads.

        The file is replaced in one step: after a crash it is the old one or the new one.
        """
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
        """Draws a smoothed sample around the row of each sample.

        Args:
            x1: Samples, (B, *). They are not changed.
            source: The row of each sample, (B,), integers, as `bank.find` gives them. Default: they
                are looked up in the bank. If the bank is on the host, give a tensor on the host, so
                that no step waits for the device.
            t: Times of the samples, (B,), or as in `Oracle.posterior`. `boundary` and `strength`
                need them.
            boundary: Samples with t at or above it are smoothed, the others stay as they are, bit
                for bit. A number in [0, 1], or a `StageBoundary`, which stands for its `collapsed`.
                Default: all samples are smoothed.
            strength: A function of t in place of a boundary, for example a ramp: from (B,) times to
                (B,) numbers in [0, 1] that multiply the move.
            generator: Generator of the draws, default the global one of the device of `x1`.

        Returns:
            Smoothed samples, (B, *), in the dtype and on the device of `x1`.

        Raises:
            ValueError: If samples without a source are no rows, a source is no row, samples are far
                from their rows (checked in the first call with a source), shapes do not fit, a
                boundary or a strength comes without times or both are given, or one is outside
                [0, 1]. On an accelerator values are checked by assertions on the device, which
                raise later.
            TypeError: If `x1` or `source` is no tensor.
        """
        source = self.source_of(x1, source)
        return self.around(x1, source, strength_at(x1, t, boundary, strength), generator)

    def source_of(self, x1: Tensor, source: Tensor | None) -> Tensor:
        """The row of each sample, (B,), given or looked up; raises as `draw` does."""
        require_tensors(x1=x1)
        if math.prod(x1.shape[1:]) != self.bank.dim or x1.ndim < 2:
            raise ValueError(
                f"Expected `x1` with shape {('B', *self.bank.shape)}, as the samples of the bank, "
                f"got {tuple(x1.shape)}. If the model is trained on other samples than the bank's, "
                "make a smoothing of those: Smoothing(LatentBank(x))."
            )
        rows = rows_of(self.bank, x1, source)
        if source is not None and not self._checked and len(x1):
            check_near(self.bank, x1, rows)
            self._checked = True
        return rows

    def around(
        self, x1: Tensor, source: Tensor, share: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Draws around rows that are known, (B,); `share`, (B,), multiplies the move, default 1."""
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
        """Standard normal numbers that a draw needs: K, and D more for an isotropic floor."""
        return self.neighbours + (self.bank.dim if self.floor else 0)

    @torch.no_grad()
    def moved(
        self, x1: Tensor, source: Tensor, normals: Tensor, share: Tensor | None = None
    ) -> Tensor:
        """Samples around rows that are known, moved by normal numbers, in the dtype of `x1`.

        `normals`, (B, `num_normals`), are z, followed by e for an isotropic floor.
        """
        stored = self.bank.rows
        wide = torch.promote_types(x1.dtype, torch.float32)
        normals = normals.to(x1.device, wide)
        rows = source.to(stored.device)
        near = self._index_on(stored.device).index_select(0, rows)
        there = (near != rows[:, None]).to(normals.device)
        count = there.sum(1, keepdim=True).clamp_min(1)
        z = normals[:, : self.neighbours] * (self.scale / count.to(wide).sqrt()) * there
        # The factors of a sample add up to 0, so that a common offset of the rows cancels.
        table = torch.cat([near, rows[:, None]], dim=1)
        factors = torch.cat([z, -z.sum(1, keepdim=True)], dim=1)
        if stored.dtype == wide and stored.device == x1.device:
            # Adds up rows without a copy of them.
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
        """For some rows, (n,): `x_i` (n, D), `g / sqrt K` (n, 1, 1), `A_i` (n, K, D), float64."""
        near, x = self.index[rows].long(), self.bank.take(rows, device)
        count = (near != rows[:, None]).sum(1).clamp_min(1).to(x)
        length = (self.scale / count.sqrt())[:, None, None]
        return x, length, length * (self.bank.take(near, device) - x[:, None])

    def _index_on(self, device: torch.device) -> Tensor:
        moved = self._moved.get(device)
        if moved is None:
            moved = self.index.to(device)
            if as_real(moved, self.index):
                self._moved[device] = moved
        return moved

    def with_scale(self, scale: float | None = None, floor: float | None = None) -> Smoothing:
        """The same neighbours with another scale or isotropic floor."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        scale = self.scale if scale is None else scale
        floor = self.floor if floor is None else floor
        _, other.scale, other.floor = check_settings(self.bank, self.neighbours, scale, floor)
        return other

    def check(self, oracle: Oracle) -> None:
        """Raises if the oracle has another bank, a sharded one, or another smoothing."""
        if not oracle.engine.holds_all_rows:
            raise ValueError(
                "Expected an oracle whose bank has all rows, as a smoothing needs it, got "
                "Sharded(): neighbours of a row may be on other ranks. Open the same file on each "
                "rank: bank = LatentBank.open(path); Oracle(bank), Smoothing(bank)."
            )
        if oracle.smoothing is not None and oracle.smoothing is not self:
            raise ValueError(
                f"Expected one smoothing, got two: {self!r}, and {oracle.smoothing!r} in the "
                "oracle. Give an oracle without one: Oracle(oracle.bank, oracle.path)."
            )
        self.check_bank(oracle.bank)

    def check_bank(self, bank: LatentBank) -> None:
        """Raises if `bank` is not the bank of the smoothing, or its rows change."""
        require_fixed(bank)
        if bank is not self.bank and bank.fingerprint != self.bank.fingerprint:
            raise ValueError(
                f"Expected the bank of the smoothing, {self.bank!r}, got {bank!r} with other rows. "
                "Make a smoothing of this bank: Smoothing(bank)."
            )

    def __copy__(self) -> Smoothing:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Smoothing:
        return self

    def __repr__(self) -> str:
        return f"Smoothing({self.neighbours} neighbours, scale={self.scale}, floor={self.floor})"
