"""Neighbours from faiss: an index of the whole bank, built once.

"Flat" compares a query with all rows and is exact. An inverted file ("IVF1024,Flat") looks at the
rows around those `nprobe` of its centroids that are nearest to the query, and may miss a near row.
What was missed cannot be bounded then: the tail mass is estimated from 256 random rows that were
not found, which says how much the bulk of the rest weighs, and knows nothing of a single missed
row that outweighs it. Trust it in navigation, and compare with `Exact` before you trust an index
near the data. With all lists probed an "IVF...,Flat" is exact again.

Vectors are centred on the bank's mean, scaled to R = 1 and rounded to float32. Between a query y
and a row x a squared distance is then wrong by (D + 8) u (|y| + R)^2, as faiss multiplies it out,
and by 2 u |y - x| (|y| + R) for the rounding of both, with u the unit roundoff.

A class is a contiguous range of rows, which a selector restricts the search to; there is one index
for all classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.building import BLOCK
from stagewise.engines.base import Queries
from stagewise.engines.neighbours import Neighbours, reach, stand

__all__ = ["Faiss"]

_GPU_K = 2048
"""The neighbours that faiss finds on a GPU."""

_TRAIN = 256
"""Rows per list that k-means looks at; faiss would take as many of more."""


class Faiss(Neighbours):
    """The mean over the k nearest rows, found by faiss.

    The index holds a float32 copy of the rows (of a compressed one less), in host memory or on a
    GPU, for as long as the bank lives. It is no part of a pickled or copied engine, which builds it
    again when it needs it. Queries pass through host memory, which on an accelerator is a sync.

    Args:
        k: How many rows, default 100.
        index: "Flat", the default, or any of faiss' factory strings for an inverted file, such as
            "IVF1024,Flat".
        nprobe: Lists of an inverted file that are searched; default the square root of their
            number. Where these hold fewer than k rows (of the class) all are searched.
        gpu: Whether to search on a GPU, the one the bank lies on or else the current one; default
            False. Only for queries that look at the whole bank, since faiss ignores selectors
            there.
        draws: Random other rows that stand for the rest, see `Neighbours`.
        max_tail: Queries with a larger tail mass get the exact mean; default None.
        seed: Of the draws and of the rows that the index is trained on, default 0.

    Raises:
        ValueError: For numbers out of range, or an index of another kind.
    """

    def __init__(
        self,
        k: int = 100,
        index: str = "Flat",
        *,
        nprobe: int | None = None,
        gpu: bool = False,
        draws: int = 0,
        max_tail: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(k, draws=draws, max_tail=max_tail, seed=seed)
        if index != "Flat" and not index.startswith("IVF"):
            raise ValueError(
                'Expected `index` to be "Flat" or an inverted file such as "IVF1024,Flat", got '
                f"{index!r}."
            )
        if nprobe is not None and (index == "Flat" or nprobe < 1):
            raise ValueError(
                f"Expected `nprobe` of at least 1 and an inverted file, got {nprobe} with "
                f"{index!r}."
            )
        if gpu and k > _GPU_K:
            raise ValueError(f"Expected `k` of at most {_GPU_K} with gpu=True, got {k}.")
        self.index, self.nprobe, self.gpu, self.seed = index, nprobe, gpu, seed
        self._built: WeakKeyDictionary[LatentBank, _Built] = WeakKeyDictionary()

    def prepare(self, bank: LatentBank) -> None:
        """Builds the index, unless it is there.

        Raises:
            ValueError: If `k` or the lists of the index are more than the rows of the bank,
                `nprobe` is more than the lists, or faiss does not know the index.
            ImportError: If faiss is not installed, or is one without GPUs for `gpu=True`.
        """
        super().prepare(bank)
        self._of(bank)

    def search(self, bank: LatentBank, queries: Queries, segment: slice, n: int) -> Tensor:
        """See `Neighbours.search`.

        Raises:
            ValueError: With `gpu=True`, for queries that look at a class, or `n` above 2048.
        """
        faiss, built = _library(self.gpu), self._of(bank)
        whole = segment == bank.whole
        if self.gpu and (n > _GPU_K or not whole):
            raise ValueError(
                f"Expected `k` of at most {_GPU_K} and queries of the whole bank with gpu=True, "
                f"got {n} neighbours among rows {segment.start} to {segment.stop}. Use gpu=False, "
                "or for classes the engine Nearest or TorchCluster."
            )
        y, _ = stand(bank, queries)
        points = (y / reach(bank)).float().cpu().numpy()
        selector = None if whole else faiss.IDSelectorRange(segment.start, segment.stop)

        def nearest(points: Any, nprobe: int) -> Tensor:
            kind = faiss.SearchParametersIVF if built.lists else faiss.SearchParameters
            settings = {"nprobe": nprobe} if built.lists else {}
            if selector is not None:
                settings["sel"] = selector
            params = kind(**settings) if settings else None
            return torch.from_numpy(built.index.search(points, n, params=params)[1])

        found = nearest(points, built.nprobe)
        short = (found[:, -1] < 0).nonzero()[:, 0]
        if built.lists > built.nprobe and len(short):
            found[short] = nearest(points[short.numpy()], built.lists)
        return found.to(queries.xt.device)

    def is_exact(self, bank: LatentBank) -> bool:
        """See `Neighbours.is_exact`: not for an inverted file that is searched in part."""
        built = self._of(bank)
        return built.keeps and built.nprobe == built.lists

    def rounding(self, bank: LatentBank, y: Tensor, distance: Tensor) -> Tensor:
        """See `Neighbours.rounding`."""
        unit = torch.finfo(torch.float32).eps / 2
        both = torch.linalg.vector_norm(y, dim=1) + reach(bank)
        return 2 * unit * both * ((bank.dim + 8) * both + 2 * distance)

    def _of(self, bank: LatentBank) -> _Built:
        built = self._built.get(bank)
        if built is None:
            built = self._built[bank] = self._build(bank)
        return built

    def _build(self, bank: LatentBank) -> _Built:
        faiss = _library(self.gpu)
        if self.index == "Flat":
            built = _Built(faiss.IndexFlatL2(bank.dim), lists=0, nprobe=0, keeps=True)
        else:
            built = self._trained(faiss, bank)
        if self.gpu:
            device = bank.device.index if bank.device.type == "cuda" else None
            device = torch.cuda.current_device() if device is None else device
            built.resources = faiss.StandardGpuResources()
            built.index = faiss.index_cpu_to_gpu(built.resources, device, built.index)
        size = max(1, BLOCK // bank.dim)
        for _, rows in bank.chunks(bank.whole, size, torch.device("cpu")):
            built.index.add(_vectors(bank, rows.double() + bank.offset.cpu()))
        return built

    def _trained(self, faiss: ModuleType, bank: LatentBank) -> _Built:
        try:
            index, reason = faiss.index_factory(bank.dim, self.index), "it is something else"
        except RuntimeError as error:
            index, reason = None, str(error)
        if not isinstance(index, faiss.IndexIVF):
            raise ValueError(
                f"Expected `index` to be an inverted file that faiss can make for {bank.dim} "
                f'dimensions, got {self.index!r}: {reason}. Try "IVF1024,Flat".'
            )
        nprobe = self.nprobe or round(index.nlist**0.5)
        if not nprobe <= index.nlist <= len(bank):
            raise ValueError(
                f"Expected `nprobe` <= lists of the index <= the {len(bank)} rows of the bank, got "
                f"nprobe={nprobe} and {self.index!r} with {index.nlist} lists."
            )
        index.cp.min_points_per_centroid = 1  # fewer work as well, and print a warning
        draws = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(bank), generator=draws)[: _TRAIN * index.nlist].sort().values
        index.train(_vectors(bank, bank.take(rows, device=torch.device("cpu"))))
        return _Built(index, index.nlist, nprobe, keeps=isinstance(index, faiss.IndexIVFFlat))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_built"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _built=WeakKeyDictionary())

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, index={self.index!r})"


@dataclass
class _Built:
    """An index and what is to be known of it.

    Attributes:
        index: The index.
        lists: How many lists it has; 0 if it is flat.
        nprobe: How many of them are searched.
        keeps: Whether it holds the vectors themselves, not something shorter.
        resources: What an index on a GPU must not outlive.
    """

    index: Any
    lists: int
    nprobe: int
    keeps: bool
    resources: Any = None


def _vectors(bank: LatentBank, samples: Tensor) -> Any:
    """Samples (n, D) on the CPU as faiss gets them."""
    return ((samples - bank.centre.cpu()) / reach(bank)).float().numpy()


def _library(gpu: bool) -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "The engine Faiss needs faiss, which is not installed: pip install 'stagewise[faiss]'."
        ) from error
    if gpu and not hasattr(faiss, "StandardGpuResources"):
        raise ImportError(
            "gpu=True needs a faiss with GPU support, and this one has none: pip install "
            "faiss-gpu-cu12 in place of faiss-cpu, or use gpu=False."
        )
    return faiss
