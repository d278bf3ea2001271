r"""Certificates: which queries need no search, because their source carries the posterior.

For a query made from a known row i, `x_t = a x^(i) + s eps`, the distances of row i from the other
rows bound the posterior outside row i (`stagewise.tail`): at most `eta`, with probability
`1 - delta` over the noise. The mean is then `x_1`, up to `eta` x the diameter of the rows, and no
row is read.

* The file stores lower bounds on the distance from the nearest, the 2nd, 4th, 8th, ... nearest
  other row. Rows between two of these ranks count as near as the lower one, which costs a factor
  of about 2 in `delta` for any data.
* Duplicates of the source have the same target: they share its weight and are in no tail.
* A class has fewer rows than the bank, and its m-th nearest is no nearer: a certificate of the
  whole bank holds for class-wise posteriors too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.device_checks import require_all
from stagewise.nearest_rows import rank_distances
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior
from stagewise.queries import Queries
from stagewise.tail import Tail
from stagewise.tensor_files import is_computed, read_computed, read_metadata, write_tensors

__all__ = ["Certificate"]

_FORMAT = {"format": "stagewise.Certificate", "version": "1", "neighbours": "0"}


@dataclass(frozen=True, eq=False)
class Certificate:
    """Proves which queries need no search, from the distances between the rows.

    Made by `compute`, `load` or `cached`. One for the whole bank serves class-wise posteriors too;
    a class-wise one is sharper for these, and serves nothing else.

    Attributes:
        distances: Lower bounds on the distance from the nearest, 2nd, 4th, ... other row, infinite
            where there are fewer, (N, H), float32.
        copies: Duplicates of each row, among all compared and in its class, (N, 2), int32.
        compared: How many rows each was compared with, itself included, (N,), int64.
        class_wise: Whether rows were compared with those of their class only.
        fingerprint: The bank's.
        dim: Numbers in a row, D.
        max_norm: An upper bound on the norm of a sample.
        row_error: An upper bound on the distance of a sample from its stored row.

    Example:
        >>> import torch
        >>> from stagewise import Certificate, LatentBank, LinearPath
        >>> bank = LatentBank(torch.randn(200, 64))
        >>> certificate = Certificate.compute(bank, progress=False)
        >>> t = torch.tensor([0.1, 0.9], dtype=torch.float64)
        >>> certificate.certified(LinearPath()(t), torch.tensor([3, 7]), torch.tensor([200, 200]))
        tensor([False,  True])
    """

    distances: Tensor
    copies: Tensor
    compared: Tensor
    class_wise: bool
    fingerprint: str
    dim: int
    max_norm: float
    row_error: float
    _moved: dict[torch.device, Certificate] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.copies)

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        bank: LatentBank,
        *,
        class_wise: bool = False,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> Certificate:
        """Compares all rows with all others, once per bank: N^2 D products.

        Args:
            bank: The rows.
            class_wise: Whether to compare rows of the same class only, default False.
            device: Where to compute, default the bank's. The result is on the CPU.
            progress: Whether to show a bar (needs tqdm), default True.

        Raises:
            ValueError: If the bank has no classes for a class-wise certificate.
        """
        bank.require_unmasked("A certificate", "Leave it out: Oracle(bank, path).")
        if class_wise:
            bank.require_classes()
        found = rank_distances(bank, class_wise, device, progress)
        return cls._of(bank, *found, class_wise)

    @classmethod
    def _of(
        cls, bank: LatentBank, distances: Tensor, copies: Tensor, class_wise: bool
    ) -> Certificate:
        scopes = [bank.segment(name) for name in bank.classes] if class_wise else [bank.whole]
        sizes = torch.tensor([scope.stop - scope.start for scope in scopes])
        norm = bank.radius + float((bank.centre - bank.offset).norm())
        row_error = torch.finfo(bank.dtype).eps / 2 * norm
        settings = (class_wise, bank.fingerprint, bank.dim, bank.max_norm, row_error)
        return cls(distances, copies, sizes.repeat_interleave(sizes), *settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file in one step: `path` never holds half a file."""
        header = _header(len(self), self.dim, self.fingerprint, self.class_wise)
        write_tensors(path, {"distances": self.distances, "copies": self.copies}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], bank: LatentBank) -> Certificate:
        """Reads a file of `save`.

        Args:
            path: The file.
            bank: The bank it was computed for, on any device.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a certificate, has another version, is damaged, or belongs to
                other latents; or if the rows of the bank, which are read once, are damaged.
        """
        header = read_metadata(path, _FORMAT["format"], "certificate")
        if header.get("version") != _FORMAT["version"]:
            raise ValueError(
                f"Expected version {_FORMAT['version']} of a certificate in {os.fspath(path)}, got "
                f"{header.get('version')}. Compute it again: Certificate.compute(bank).save(path)."
            )
        if header.get("fingerprint") != bank.fingerprint:
            raise _other(os.fspath(path), header.get("rows"), header.get("dim"), bank)
        bank.require_intact()
        wanted = {
            "distances": (torch.float32, (len(bank), None)),
            "copies": (torch.int32, (len(bank), 2)),
        }
        distances, copies = read_computed(path, wanted, "certificate")
        return cls._of(bank, distances, copies, header.get("class_wise") == "True")

    @classmethod
    def cached(
        cls,
        path: str | os.PathLike[str],
        bank: LatentBank,
        *,
        class_wise: bool = False,
        **options: Any,
    ) -> Certificate:
        """The certificate at `path`, which is computed and saved if it is missing or another one.

        Warns before it replaces a file of other latents or settings. Let one process go first.

        Args:
            path: The file, which need not exist.
            bank: The rows.
            class_wise: As in `compute`.
            **options: Further arguments of `compute`.

        Raises:
            ValueError: If the file there is not a certificate; and as `compute`.
            FileNotFoundError: If its folder is missing; nothing has been computed then.
        """
        wanted = _header(len(bank), bank.dim, bank.fingerprint, class_wise)
        if is_computed(path, wanted, "certificate"):
            return cls.load(path, bank)
        made = cls.compute(bank, class_wise=class_wise, **options)
        made.save(path)
        return made

    def check(self, bank: LatentBank) -> None:
        """Refuses a bank that is damaged, or not the one of the certificate."""
        if bank.fingerprint != self.fingerprint:
            raise _other("it", len(self), self.dim, bank)
        bank.require_intact()

    def certified(
        self,
        path: PathCoefficients,
        source: Tensor,
        sizes: Tensor,
        *,
        eta: float = 1e-3,
        delta: float = 1e-6,
        made_in: torch.dtype = torch.float32,
    ) -> Tensor:
        """Which queries have their posterior on the source row and its duplicates. No device sync.

        Args:
            path: Coefficients at the B times, each (B,), float64.
            source: The row each query was made from, (B,), int64.
            sizes: How many rows each query has: the bank's, or those of the source's class,
                (B,), integers.
            eta: Posterior mass that may lie outside, default 1e-3.
            delta: Probability, over the noise of a query, that more lies outside, default 1e-6.
            made_in: The type that `x_t` was computed in, default float32.

        Returns:
            (B,), bool.

        Raises:
            ValueError: If a source is not a row; if a query has more rows than a class-wise
                certificate has compared; if `eta` or `delta` is not between 0 and 1.
        """
        last = len(self) - 1
        inside = (source >= 0) & (source <= last)
        message = f"Expected `source` from 0 to {last}, the rows of the bank"
        require_all(inside, message, lambda: f"; got {int(source[~inside][0])}.")
        if self.class_wise:
            few = sizes <= self.to(source.device).compared[source.clamp(0, last)]
            require_all(few, _CLASS_WISE, lambda: f"; got {int(sizes[~few][0])}.")
        return self._tail(path, source, sizes, delta, made_in).is_below(eta)

    @torch.no_grad()
    def answer(
        self,
        bank: LatentBank,
        queries: Queries,
        k: int = 1,
        *,
        eta: float = 1e-3,
        delta: float = 1e-6,
    ) -> tuple[Posterior, list[int]] | None:
        """Answers the queries that need no search. Costs one device sync.

        Returns:
            The posterior of the certified queries, float64, with a bound on the tail mass; of
            duplicates only the source is listed. And the positions of the others: not certified,
            without a source among the rows they look at, or, for a class-wise certificate, without
            a class. None if no query is certified.

        Raises:
            ValueError: If there are no labels and the certificate is class-wise, or the bank is
                another one.
        """
        self.check(bank)
        if queries.labels is None and self.class_wise:
            raise ValueError(f"{_CLASS_WISE}.")
        source, device = queries.source, queries.xt.device
        assert source is not None
        first, last = queries.ends_on_device.unbind(1)
        known, sizes = queries.holds(source), last - first
        row = torch.where(known, source, first)
        known &= sizes <= self.to(device).compared[row]
        tail = self._tail(queries.path, row, sizes, delta, queries.made_in)
        done = (tail.is_below(eta) & known).tolist()
        left = [i for i, certain in enumerate(done) if not certain]
        if len(left) == len(queries):
            return None
        at = queries.index([i for i, certain in enumerate(done) if certain])
        post = self._on_source(bank, queries.xt[at], queries.path.select(at), row[at], sizes[at], k)
        return replace(post, tail_mass=tail.mass(eta)[at], tail_kind="bounded"), left

    def _on_source(
        self,
        bank: LatentBank,
        xt: Tensor,
        path: PathCoefficients,
        source: Tensor,
        sizes: Tensor,
        k: int,
    ) -> Posterior:
        """The posterior on the source and its duplicates, which share the weight."""
        x = bank.take(source, xt.device)
        gap = xt - path.alpha[:, None] * x
        in_class = (sizes < len(self)).long()[:, None]
        equal = 1 + self.to(xt.device).copies[source].gather(1, in_class)[:, 0].double()
        return Posterior(
            mean=x,
            log_evidence=equal.log() - gap.square().sum(1) / (2 * path.sigma**2),
            entropy=equal.log(),
            ess=equal,
            weights=pad(1 / equal[:, None], (0, k - 1)),
            rows=pad(source[:, None], (0, k - 1), value=-1),
            tail_mass=torch.zeros_like(equal),
        )

    def to(self, device: torch.device | str) -> Certificate:
        """The certificate on `device`; moved once and kept."""
        device = torch.device(device)
        if self.copies.device == device:
            return self
        if device not in self._moved:
            names = ("distances", "copies", "compared")
            tensors: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
            moved = replace(self, **tensors, _moved={})
            if type(moved.copies) is not type(self.copies):
                return moved  # a fake tensor may not be kept beside real ones
            self._moved[device] = moved
        return self._moved[device]

    def _tail(
        self,
        path: PathCoefficients,
        source: Tensor,
        sizes: Tensor,
        delta: float,
        made_in: torch.dtype,
    ) -> Tail:
        here = self.to(source.device)
        distance = here.distances[source].double()
        rank = 2 ** torch.arange(distance.shape[1], device=source.device)
        stop = torch.minimum(here.compared[source], sizes)[:, None]
        count = (torch.minimum(2 * rank, stop) - rank).clamp_min(0)
        # a x_1 + s eps is rounded by the coefficients, the products and the sum.
        eps = 2 * torch.finfo(made_in).eps
        rho = (path.alpha / path.sigma)[:, None]
        errors = (eps * self.max_norm + self.row_error, eps)
        return Tail.of(rho, distance, count, errors, self.dim, delta)


_CLASS_WISE = (
    "The certificate is class-wise: it holds for posteriors over one class only. Ask with labels, "
    "or use Certificate.compute(bank, class_wise=False), which serves both"
)


def _header(rows: int, dim: int, fingerprint: str, class_wise: bool) -> dict[str, str]:
    settings = {"rows": rows, "dim": dim, "class_wise": class_wise}
    return {**_FORMAT, "fingerprint": fingerprint, **{k: str(v) for k, v in settings.items()}}


def _other(name: str, rows: object, dim: object, bank: LatentBank) -> ValueError:
    return ValueError(
        f"Expected a certificate for this bank, but {name} belongs to other latents: it was made "
        f"for {rows} rows of {dim} numbers, the bank has {len(bank)} of {bank.dim}. Compute it "
        "again: Certificate.compute(bank).save(path)."
    )
