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

**Copies of a row are not its neighbours**: they would be directions of length 0, so that a row is
smoothed less for standing in the set twice. A row with fewer than K others that differ from it has
those (K is then their number), and one with none stays as it is.

**Latents with a mean and a standard deviation.** A sample that the VAE drew around its row is in a
Gaussian already. Keep the floor 0: `draw` moves the sample by the neighbourhood of its row and the
VAE's own spread is the isotropic part.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import embedding_bag

from stagewise.bank import LatentBank
from stagewise.engines import Sharded
from stagewise.files import is_computed, write_tensors
from stagewise.neighbour_index import index_header, neighbour_index, search_space
from stagewise.oracle import Oracle, Times, require_tensors
from stagewise.paths import expand_like
from stagewise.stages import StageBoundary, StageCurve
from stagewise.strength import Strength, strength_at
from stagewise.tracing import untraced

if TYPE_CHECKING:
    from stagewise.smoothing_fit import SmoothingScore

__all__ = ["Smoothing"]


class Smoothing:
    """The Gaussians around the rows of a bank, and draws from them.

    It is a plain object; a deep copy returns the smoothing itself.

    Args:
        bank: The rows, in host memory, on a device or in a file.
        neighbours: K, default 8.
        scale: g, default 1. 0 leaves the floor only.
        floor: h, in the units of the bank, default 0. On small sets 0.05 gains more; on larger ones
            it harms.
        features: Where to look for neighbours instead of the rows: (N, *) numbers, in the order of
            the samples that the bank was made from. Default None.
        class_wise: Whether neighbours are of the row's own class, default False: among all rows was
            measured to be better.
        device: Where to search, default where the bank is.
        progress: Whether to show a bar, default True; without tqdm there is none.

    Attributes:
        index: The neighbours, (N, K), int32, on the CPU, in the bank's own order; the row itself
            where there are fewer.
        scores: What `fit` tried; empty without it.

    Raises:
        ValueError: On settings out of range, K of N or more, features of another length or with NaN
            or Inf, or a bank without labels for `class_wise`.
        TypeError: If `bank` is no bank or `features` no numbers.

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
        features: Tensor | None = None,
        class_wise: bool = False,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        _check_settings(bank, neighbours, scale, floor)
        space = search_space(bank, features, class_wise)
        index = neighbour_index(space, neighbours, class_wise, device, progress)
        self._fill(bank, index, scale, floor, class_wise, space)

    def _fill(
        self,
        bank: LatentBank,
        index: Tensor,
        scale: float,
        floor: float,
        class_wise: bool,
        space: LatentBank,
    ) -> None:
        self.bank, self.index, self.class_wise = bank, index, class_wise
        self.scale, self.floor = float(scale), float(floor)
        self.space = "rows" if space is bank else space.fingerprint
        self._moved: dict[torch.device, Tensor] = {}
        self._checked = False
        self.scores: list[SmoothingScore] = []

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def cached(
        cls,
        path: str | os.PathLike[str],
        bank: LatentBank,
        neighbours: int = 8,
        scale: float = 1.0,
        floor: float = 0.0,
        *,
        features: Tensor | None = None,
        class_wise: bool = False,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> Smoothing:
        """With the neighbours in the file at `path`, if they are those asked for.

        Otherwise they are searched and saved. The file holds neighbours only: scale and floor may
        be others each time. Warns before it replaces neighbours of other latents or settings. Of
        several processes, let one go first.

        Args:
            path: The file, which need not exist.
            bank: See the class, like all that follow.
            neighbours: K.
            scale: g.
            floor: h.
            features: Where to look.
            class_wise: Among which rows.
            device: Where to search.
            progress: Whether to show a bar.

        Raises:
            ValueError: If there is a file of something else; and as the class.
        """
        _check_settings(bank, neighbours, scale, floor)
        space = search_space(bank, features, class_wise)
        made = cls.__new__(cls)
        if is_computed(path, index_header(bank, neighbours, class_wise, space), "smoothing"):
            with safe_open(path, "pt") as file:
                made._fill(bank, file.get_tensor("index"), scale, floor, class_wise, space)
            return made
        index = neighbour_index(space, neighbours, class_wise, device, progress)
        made._fill(bank, index, scale, floor, class_wise, space)
        made.save(path)
        return made

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

        Of 8, 16, 32 and 64 neighbours and scales from 0.25 to 1.4: what makes samples that are no
        farther from rows left out than the rows themselves are, with the best field; see
        `smoothing_fit`. It knows the rows, not the model: where nothing is learnt by heart, which
        `Forecast` tells, smoothing gains little or nothing.

        Args:
            bank: The rows; at least 20.
            boundary: Time from which on they are smoothed: a time, or what was measured, of which
                the collapsed boundary is taken. Default: measured, class-wise if the bank has
                classes.
            class_wise: Whether neighbours are of the row's own class.
            progress: Whether to show a bar.

        Returns:
            The smoothing, its `scores` a list of all that was tried; or None, with a warning that
            says why, if none of the settings helps: `Scheme(smoothing=None)` is plain training.

        Raises:
            ValueError: For fewer than 20 rows, or a boundary outside [0, 1).
            TypeError: If `bank` is no bank.
        """
        from stagewise.smoothing_fit import cross_validated

        _check_settings(bank, 1, 1.0, 0.0)
        if len(bank) < 20:
            raise ValueError(
                f"Expected at least 20 rows to choose a smoothing from, got {len(bank)}: "
                f"Smoothing(bank, neighbours={max(1, min(8, len(bank) - 1))})."
            )
        if boundary is None:
            boundary = StageCurve.measure(Oracle(bank)).boundary()
        edge = boundary.collapsed if isinstance(boundary, StageBoundary) else float(boundary)
        if not (math.isnan(edge) or 0 <= edge < 1):
            raise ValueError(
                f"Expected `boundary` in [0, 1), the time from which on rows are smoothed, got "
                f"{boundary}: Smoothing.fit(bank, 0.7)."
            )
        if math.isnan(edge):
            warnings.warn(
                "Smoothing.fit: none. The posterior never collapses on one row, where rows are "
                "smoothed. Rows that stand in the bank twice share it: leave them out, "
                "LatentBank(x.unique(dim=0)), or say from when on, Smoothing.fit(bank, 0.7).",
                stacklevel=2,
            )
            return None
        options: dict[str, Any] = {"class_wise": class_wise, "progress": progress}
        scales = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
        scores = cross_validated(bank, edge, (8, 16, 32, 64), scales, **options)
        best = min(
            (s for s in scores if not math.isnan(s.loss)), key=lambda s: s.loss, default=scores[0]
        )
        if not best.neighbours:
            warnings.warn(
                f"Smoothing.fit: none. On rows left out the rows as they are have a loss of "
                f"{best.loss:.4g}, and no setting that keeps samples as near to them has less.",
                stacklevel=2,
            )
            return None
        fitted = cls(bank, best.neighbours, best.scale, **options)
        fitted.scores = scores
        return fitted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the neighbours for `cached`, in one step: there is never half a file at `path`."""
        header = index_header(self.bank, self.neighbours, self.class_wise, self.space)
        write_tensors(path, {"index": self.index}, header)

    # -- draws ---------------------------------------------------------------------------------

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
            boundary: Rows are smoothed at this time and after it, and left as they are before it
                (to the last bit): a time, or what `StageCurve.boundary` measured, of which the
                collapsed boundary is taken. NaN (never reached) smooths nothing. Default: all are
                smoothed.
            strength: In place of a boundary, any function of t: a ramp, say.
            generator: Of the draws, default the global one of the device of `x1`.

        Returns:
            (B, *), in the dtype and on the device of `x1`.

        Raises:
            ValueError: If a sample is no row and no source is given for it, on a source that is no
                row, in the first call on samples that are far from the rows they are said to be, on
                that do not fit, a boundary or a strength without times, both, or a strength
                outside [0, 1]. On an accelerator values are checked by assertions, which cost no
                sync.
            TypeError: If `x1` or `source` is no tensor.
        """
        require_tensors(x1=x1)
        if math.prod(x1.shape[1:]) != self.bank.dim or x1.ndim < 2:
            raise ValueError(
                f"Expected `x1` with shape {('B', *self.bank.shape)} as the bank's samples, got "
                f"{tuple(x1.shape)}."
            )
        source = self.rows_of(x1, source)
        if not self._checked:
            self._check_rows(x1, source)
        share = strength_at(x1, t, boundary, strength)
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
        """What a draw does with its normal numbers.

        Args:
            x1: Samples, (B, *).
            source: Their rows, (B,).
            normals: z, and after it e if there is a floor, (B, `num_normals`).
            share: What multiplies the move, (B,); default 1.

        Returns:
            (B, *), in the dtype of `x1`.
        """
        stored = self.bank.rows
        wide = torch.promote_types(x1.dtype, torch.float32)
        normals = normals.to(x1.device, wide)
        rows = source.to(stored.device)
        near = self._index_on(stored.device)[rows].long()
        there = (near != rows[:, None]).to(x1.device)
        length = self.scale / there.sum(1, keepdim=True).clamp_min(1).to(wide).sqrt()
        z = normals[:, : self.neighbours] * length * there
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

    def rows_of(self, x1: Tensor, source: Tensor | None = None) -> Tensor:
        """The row of each sample, (B,): as it is given, or looked up; see `draw`."""
        given = source is not None
        source = self.bank.find(x1) if source is None else source
        require_tensors(source=source)
        if source.shape != x1.shape[:1] or source.is_floating_point() or source.dtype == torch.bool:
            raise ValueError(
                f"Expected integer `source` with shape ({len(x1)},), the row of each sample, got "
                f"{source.dtype} of shape {tuple(source.shape)}: draw(x1, source=bank.find(x1))."
            )
        inside = (source >= 0) & (source < len(self.bank))
        message = f"Expected `source` from 0 to {len(self.bank) - 1}, the rows of the bank"
        if not given:
            message = "Expected samples that are rows of the bank, or the `source` of each"
        if source.device.type != "cpu":
            torch._assert_async(inside.all(), message)
        elif not inside.all():
            wrong = ~inside
            raise ValueError(
                f"{message}, got {int(wrong.sum())} of {len(wrong)} that are "
                + (f"not, the first {int(source[wrong][0])}. " if given else "no rows. ")
                + "Flips and crops are no rows: train without them, or make the bank of what is "
                "trained on. Or let the data set return the position i of each item: "
                "draw(x1, source=i) if the bank keeps its order (bank.index is None), otherwise "
                "draw(x1, source=bank.index.argsort()[i])."
            )
        return source

    @torch.no_grad()
    def _check_rows(self, x1: Tensor, source: Tensor) -> None:
        """Refuses samples that have little to do with their rows: flips, or another order."""
        gap = x1.flatten(1).double() - self.bank.take(source, x1.device)
        spread = self.bank.mean_sq_norm.to(x1.device)
        near = gap.square().sum(1).mean() <= 0.75 * spread  # of two random rows it is 2
        message = "Expected `x1` near the rows that `source` says"
        if not len(x1):
            return
        if near.device.type != "cpu":
            torch._assert_async(near, message)
        elif not near:
            far = float((gap.square().sum(1).mean() / spread).sqrt())
            raise ValueError(
                f"{message}, got samples {far:.2g} times as far from them as rows are from their "
                "mean. Positions in the data set? A bank with labels is sorted by class: source="
                "bank.index.argsort()[i]. Flips or crops? Build the bank of what is trained on."
            )
        self._checked = True

    def _index_on(self, device: torch.device) -> Tensor:
        if self.index.device == device:
            return self.index
        if device not in self._moved:
            moved = self.index.to(device)
            if type(moved) is not type(self.index):
                return moved  # a fake tensor may not be kept beside real ones
            self._moved[device] = moved
        return self._moved[device]

    # -- what else a scheme needs --------------------------------------------------------------

    def with_scale(self, scale: float | None = None, floor: float | None = None) -> Smoothing:
        """The same neighbours with another scale or floor."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.scale = self.scale if scale is None else float(scale)
        other.floor = self.floor if floor is None else float(floor)
        _check_settings(self.bank, self.neighbours, other.scale, other.floor)
        return other

    def check(self, oracle: Oracle) -> None:
        """Refuses an oracle that does not go with the smoothing.

        Raises:
            ValueError: If its bank is another one or spread over ranks, or it has a smoothing.
        """
        if isinstance(oracle.engine, Sharded):
            raise ValueError(
                "Expected an oracle with all rows for a smoothing, got Sharded(), of which a rank "
                "has only its part: neighbours lie on other ranks. Give each rank the same "
                "memory-mapped bank: Oracle(LatentBank.open(path)), Smoothing(LatentBank.open("
                "path))."
            )
        if oracle.smoothing is not None and oracle.smoothing is not self:
            raise ValueError(
                f"Expected one smoothing, got two: {self!r}, and {oracle.smoothing!r} of the "
                "oracle. Give the plain oracle: Oracle(oracle.bank, oracle.path)."
            )
        self.check_bank(oracle.bank)

    def check_bank(self, bank: LatentBank) -> None:
        """Refuses another bank than the smoothing's.

        Raises:
            ValueError: With what both hold.
        """
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


def _check_settings(bank: LatentBank, neighbours: int, scale: float, floor: float) -> None:
    if not isinstance(bank, LatentBank):
        raise TypeError(
            f"Expected a LatentBank to smooth, got {type(bank).__name__}. Of samples make "
            "Smoothing(LatentBank(x)); of latents in files Smoothing(latents.bank())."
        )
    if isinstance(neighbours, bool) or not isinstance(neighbours, int):
        raise TypeError(f"Expected `neighbours` to be a whole number, got {neighbours!r}.")
    if not 1 <= neighbours < len(bank):
        raise ValueError(
            f"Expected `neighbours` from 1 to {len(bank) - 1}, the other rows of the bank, got "
            f"{neighbours}: Smoothing(bank, neighbours={min(8, len(bank) - 1)})."
        )
    for name, value in (("scale", scale), ("floor", floor)):
        if not isinstance(value, float | int) or not 0 <= value < math.inf:
            raise ValueError(
                f"Expected `{name}` of at least 0, got {value!r}. Give {name}=0 for none."
            )
