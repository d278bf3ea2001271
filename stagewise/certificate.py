r"""Certificates: which queries need no search, since their source carries the whole posterior.

For a query made from a known row i, `x_t = a x^(i) + s eps`, the distances of row i from the other
rows say how much of the posterior can lie outside it: at most `eta`, with probability `1 - delta`
over the noise, if `stagewise.tail` says so. Its mean is then `x_1`, off by at most `eta` x the
diameter of the rows, and no row was looked at.

* Stored are lower bounds on the distance from the nearest, the 2nd, 4th, 8th, ... nearest other
  row. Rows between two of these ranks count as near as the lower one, at the price of about 2 in
  `delta`, whatever the data.
* Exact copies of the source have its target: they share its weight and are in no tail.
* The rows of a class are fewer than those of the bank, and the m-th nearest is no nearer.
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
    """Proves which queries need no search, from how far the rows are from one another.

    Made by `compute`, `load` or `cached`. One for the whole bank serves class-wise posteriors too,
    which have fewer rows; a class-wise one is sharper there, and serves nothing else.

    `eta` is the posterior mass that may lie outside, `delta` the probability, over the noise of a
    query, that more does, and `made_in` the type that `x_t` was computed in.

    Attributes:
        distances: Lower bounds on the distance from the nearest, 2nd, 4th, ... other row, infinite
            where there are fewer, (N, H), float32.
        copies: Exact copies of each row, of all that were compared and of its class, (N, 2), int32.
        compared: How many rows each was compared with, itself included, (N,), int64.
        class_wise: Whether rows were compared with those of their class only.
        fingerprint: That of the bank.
        dim: Numbers in a row, D.
        max_norm: An upper bound on the norm of a sample.
        row_error: How far a sample may be from the row that it is stored as.

    Example:
        >>> import torch
        >>> from stagewise import LinearPath
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
        """Compares all rows with all others, once per bank: a product of N^2 D.

        Args:
            bank: The rows.
            class_wise: Whether to compare rows of the same class only, default False.
            device: Where to compute, default where the rows are. The result is on the CPU.
            progress: Whether to show a bar, default True; without tqdm there is none.

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
        """Writes a safetensors file, in one step: there is never half a file at `path`."""
        header = _header(len(self), self.dim, self.fingerprint, self.class_wise)
        write_tensors(path, {"distances": self.distances, "copies": self.copies}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], bank: LatentBank) -> Certificate:
        """Reads what `save` wrote.

        Args:
            path: The file.
            bank: The bank it was computed for, on any device.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no certificate, of another version, damaged, or belongs to other
                latents; or if the rows of the bank, which are read once, are damaged in its file.
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
        """The certificate at `path` if it is the one asked for; else computes and saves it.

        Warns before it replaces one of other latents or settings. Let one process go first.

        Args:
            path: The file, which need not exist.
            bank: The rows.
            class_wise: See `compute`.
            **options: Further arguments of `compute`.

        Raises:
            ValueError: If there is a file that is no certificate; and as `compute`.
        """
        wanted = _header(len(bank), bank.dim, bank.fingerprint, class_wise)
        if is_computed(path, wanted, "certificate"):
            return cls.load(path, bank)
        made = cls.compute(bank, class_wise=class_wise, **options)
        made.save(path)
        return made

    def check(self, bank: LatentBank) -> None:
        """Refuses a bank that the certificate was not computed for, or that is damaged."""
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
        """Which queries have their posterior on the source row and its exact copies.

        Costs no device sync.

        Args:
            path: Coefficients at the B times, each (B,), float64.
            source: The row each query was made from, (B,), int64.
            sizes: How many rows each query looks at: those of the bank, or of the source's class,
                (B,), integers.
            eta: Posterior mass that may lie outside, default 1e-3.
            delta: Probability that more does, default 1e-6.
            made_in: The type that `x_t` was computed in, default float32.

        Returns:
            (B,), bool.

        Raises:
            ValueError: If a source is no row; if a query looks at more rows than a class-wise
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
        """Answers what needs no search. Costs one device sync.

        Args:
            bank: The rows, on any device.
            queries: With their sources.
            k: How many of the largest weights to return; of copies only the source is listed.
            eta: Mass that may lie outside.
            delta: Probability that more does.

        Returns:
            The posterior of all queries but those left, in float64, with a bound on the tail mass,
            and the positions of those. Left are the queries that are not certified, whose source is
            not known or not among the rows they look at, and, if the certificate is class-wise,
            those without a class. None if all are.

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
        """The posterior on the source and its copies, which share the weight."""
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
        """The certificate on `device`; made once and kept."""
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
    "The certificate is class-wise: it says nothing of posteriors over more rows than a class. Ask "
    "with labels, or use Certificate.compute(bank, class_wise=False), which serves both"
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
