r"""Certificates: which queries need no search, since their source carries the whole posterior.

For a query made from a known row i, `x_t = a x^(i) + s eps`, the distances of row i from the other
rows say how much of the posterior can lie outside it: at most `eta`, with probability `1 - delta`
over the noise, if `stagewise.tail` says so. Its mean is then `x_1`, off by at most `eta` x the
diameter of the rows, and no row was looked at.

* Stored are lower bounds on the distance from the nearest, the 2nd, 4th, 8th, ... nearest other
  row. Rows between two of these ranks count as near as the lower one, at the price of about 2 in
  `delta`, whatever the data.
* Rows that are looked at are not in the tail. With the K nearest rows of row i stored it begins at
  rank K + 1, and the posterior of a certified query is the softmax over the source and those.
* Exact copies of the source have its target: they share its weight and are in no tail.
* The rows of a class are fewer than those of the bank, and the m-th nearest is no nearer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from stagewise.bank import LatentBank
from stagewise.files import is_computed, read_metadata, write_tensors
from stagewise.nearest_rows import Closest, class_ends, closest
from stagewise.paths import PathCoefficients
from stagewise.posterior import Posterior, put
from stagewise.tail import Tail

__all__ = ["Certificate"]

_FORMAT = {"format": "stagewise.Certificate", "version": "1"}

_GATHER = 2**24
"""Numbers of gathered rows held at a time."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far the rows of a bank are from one another, and what follows for queries.

    Made by `compute`, `load` or `cached`. One for the whole bank serves class-wise posteriors too,
    which have fewer rows; a class-wise one is sharper there, and serves nothing else.

    `eta` is the posterior mass that may lie outside, `delta` the probability, over the noise of a
    query, that more does, and `made_in` the type that `x_t` was computed in.

    Attributes:
        rows: What is known of the rows nearest to each row.
        ends: Where the class of each row begins and ends, (N, 2), int32.
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

    rows: Closest
    ends: Tensor
    class_wise: bool
    fingerprint: str
    dim: int
    max_norm: float
    row_error: float
    _moved: dict[torch.device, Certificate] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def num_neighbours(self) -> int:
        """K."""
        return self.rows.neighbours.shape[1]

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        bank: LatentBank,
        *,
        neighbours: int = 0,
        class_wise: bool = False,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> Certificate:
        """Compares all rows with all others, once per bank: a product of N^2 D.

        Args:
            bank: The rows.
            neighbours: How many neighbours of each row to keep, K, default 0.
            class_wise: Whether to compare rows of the same class only, default False.
            device: Where to compute, default where the rows are. The result is on the CPU.
            progress: Whether to show a bar, default True; without tqdm there is none.

        Raises:
            ValueError: If `neighbours` is negative, or the bank has no classes for a class-wise
                certificate.
        """
        if neighbours < 0:
            raise ValueError(f"Expected `neighbours` of at least 0, got {neighbours}.")
        if class_wise:
            bank.require_classes()
        return cls._of(bank, closest(bank, neighbours, class_wise, device, progress), class_wise)

    @classmethod
    def _of(cls, bank: LatentBank, rows: Closest, class_wise: bool) -> Certificate:
        norm = bank.radius + float((bank.centre - bank.offset).norm())
        row_error = torch.finfo(bank.dtype).eps / 2 * norm
        settings = (class_wise, bank.fingerprint, bank.dim, bank.max_norm, row_error)
        return cls(rows, class_ends(bank), *settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, in one step: there is never half a file at `path`."""
        header = _header(
            len(self), self.dim, self.fingerprint, self.num_neighbours, self.class_wise
        )
        write_tensors(path, self.rows._asdict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], bank: LatentBank) -> Certificate:
        """Reads what `save` wrote.

        Args:
            path: The file.
            bank: The bank it was computed for, on any device.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no certificate, of another version, or belongs to other latents.
        """
        header = read_metadata(path, _FORMAT["format"], "certificate")
        if header["version"] != _FORMAT["version"]:
            raise ValueError(
                f"Expected version {_FORMAT['version']} of a certificate in {os.fspath(path)}, got "
                f"{header['version']}. Compute it again: Certificate.compute(bank).save(path)."
            )
        if header["fingerprint"] != bank.fingerprint:
            raise _other(os.fspath(path), header["rows"], header["dim"], bank)
        with safe_open(path, "pt") as file:
            rows = Closest(*(file.get_tensor(name) for name in Closest._fields))
        return cls._of(bank, rows, header["class_wise"] == "True")

    @classmethod
    def cached(
        cls,
        path: str | os.PathLike[str],
        bank: LatentBank,
        *,
        neighbours: int = 0,
        class_wise: bool = False,
        **options: Any,
    ) -> Certificate:
        """The certificate at `path` if it is the one asked for; else computes and saves it.

        Warns before it replaces one of other latents or other settings. Of several processes, let
        one go first.

        Args:
            path: The file, which need not exist.
            bank: The rows.
            neighbours: See `compute`.
            class_wise: See `compute`.
            **options: Further arguments of `compute`.

        Raises:
            ValueError: If there is a file that is no certificate; and as `compute`.
        """
        wanted = _header(len(bank), bank.dim, bank.fingerprint, neighbours, class_wise)
        if is_computed(path, wanted, "certificate"):
            return cls.load(path, bank)
        made = cls.compute(bank, neighbours=neighbours, class_wise=class_wise, **options)
        made.save(path)
        return made

    def check(self, bank: LatentBank) -> None:
        """Refuses a bank that the certificate was not computed for.

        Raises:
            ValueError: With what it was computed for and the cure.
        """
        if bank.fingerprint != self.fingerprint:
            raise _other("it", len(self), self.dim, bank)

    def certified(
        self,
        path: PathCoefficients,
        source: Tensor,
        sizes: Tensor,
        *,
        neighbours: bool = False,
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
            neighbours: Whether the neighbours of the source are looked at too, default False.
            eta: Posterior mass that may lie outside, default 1e-3.
            delta: Probability that more does, default 1e-6.
            made_in: The type that `x_t` was computed in, default float32.

        Returns:
            (B,), bool.

        Raises:
            ValueError: If a source is no row; if a query looks at more rows than a class-wise
                certificate has compared; if `eta` or `delta` is not between 0 and 1.
        """
        self._require(source, sizes)
        return self._tail(path, source, sizes, neighbours, delta, made_in).is_below(eta)

    @torch.no_grad()
    def posterior(
        self,
        bank: LatentBank,
        xt: Tensor,
        path: PathCoefficients,
        source: Tensor,
        k: int = 1,
        neighbours: bool = False,
        *,
        sizes: Tensor | None = None,
        eta: float = 1e-3,
        delta: float = 1e-6,
        made_in: torch.dtype = torch.float32,
    ) -> Posterior:
        """The posterior of certified queries, over the rows that the certificate names.

        Args:
            bank: The rows, on any device.
            xt: Noisy samples, (B, D), float64.
            path: As in `certified`, like all that is not named here.
            source: The row each query was made from, (B,).
            k: How many of the largest weights to return. Copies of the source enter the mean, the
                entropy and the effective sample size, but only the source is listed.
            neighbours: Whether to look at the neighbours, default False.
            sizes: Rows each query looks at; default those that the certificate has compared.
            eta: Mass outside that was certified.
            delta: Probability that more is outside.
            made_in: The type of `x_t`.

        Returns:
            The posterior in float64, padded with weight 0 and row -1. The tail mass is a bound that
            holds with probability `1 - delta`.

        Raises:
            ValueError: As `certified`, or if the bank is another one.
        """
        self.check(bank)
        here = self.to(xt.device)
        if sizes is None:
            sizes = here._compared(source.clamp(0, len(self) - 1))
        self._require(source, sizes)
        in_class = sizes < len(self)
        rows = source[:, None]
        if neighbours:
            near, ends = here.rows.neighbours[source].long(), here.ends[source]
            outside = in_class[:, None] & ((near < ends[:, :1]) | (near >= ends[:, 1:]))
            rows = torch.cat([rows, near.masked_fill(outside, -1)], dim=1)
        copies = here.rows.copies[source].gather(1, in_class[:, None].long())[:, 0].double()
        mass = self._tail(path, source, sizes, neighbours, delta, made_in).mass(eta)
        step = max(1, _GATHER // (rows.shape[1] * self.dim))
        parts = [
            _softmax(bank, xt[at], path.alpha[at], path.sigma[at], rows[at], copies[at], k)
            for first in range(0, max(1, len(xt)), step)
            for at in [slice(first, first + step)]
        ]
        return replace(Posterior.cat(parts), tail_mass=mass, tail_kind="bounded")

    @torch.no_grad()
    def answer(
        self,
        bank: LatentBank,
        xt: Tensor,
        path: PathCoefficients,
        labels: Sequence[int | None] | None,
        source: Tensor,
        k: int = 1,
        *,
        eta: float = 1e-3,
        delta: float = 1e-6,
        made_in: torch.dtype = torch.float32,
    ) -> tuple[Posterior, list[int]] | None:
        """Answers what needs no search. Costs one device sync.

        Args:
            bank: The rows.
            xt: Noisy samples, (B, D), float64.
            path: As in `certified`, like all that is not named here.
            labels: The class of each query, or None where it looks at the whole bank; or None.
            source: The row each query was made from, (B,); negative where it is not known.
            k: How many of the largest weights to return.
            eta: Mass that may lie outside.
            delta: Probability that more does.
            made_in: The type of `x_t`.

        Returns:
            The posterior of all queries but those left, and the positions of those. Left are the
            queries that are not certified, whose source is not known or not among the rows they
            look at, and, if the certificate is class-wise, those without a class. None if all are.

        Raises:
            ValueError: If there are no labels and the certificate is class-wise.
        """
        if labels is None and self.class_wise:
            raise ValueError(f"{_CLASS_WISE}.")
        names = [None] * len(xt) if labels is None else labels
        seen = [bank.whole if name is None else bank.segment(name) for name in names]
        ends = torch.tensor([(s.start, s.stop) for s in seen], device=xt.device).reshape(-1, 2)
        first, last = ends.long().unbind(1)
        known = (source >= first) & (source < last)
        row, sizes = torch.where(known, source, first), last - first
        known &= sizes <= self.to(xt.device)._compared(row)
        alone, either = (
            self._tail(path, row, sizes, neighbours, delta, made_in).is_below(eta) & known
            for neighbours in (False, True)
        )
        kinds = torch.where(alone, 1, torch.where(either, 2, 0)).tolist()
        left = [i for i, kind in enumerate(kinds) if kind == 0]
        if len(left) == len(xt):
            return None

        def ask(kind: int) -> Posterior:
            own = [i for i, other in enumerate(kinds) if other == kind]
            at = torch.tensor(own, dtype=torch.int64, device=xt.device)
            some = path.select(at)
            return self.posterior(
                bank,
                xt[at],
                some,
                row[at],
                k,
                kind == 2,
                sizes=sizes[at],
                eta=eta,
                delta=delta,
                made_in=made_in,
            )

        done = [kind for kind in kinds if kind]
        wide = [place for place, kind in enumerate(done) if kind == 2]
        return (put(ask(1), wide, ask(2), len(done)) if wide else ask(1)), left

    def to(self, device: torch.device | str) -> Certificate:
        """The certificate on `device`; made once and kept."""
        device = torch.device(device)
        if self.ends.device == device:
            return self
        if device not in self._moved:
            rows = Closest(*(value.to(device) for value in self.rows))
            moved = replace(self, rows=rows, ends=self.ends.to(device), _moved={})
            if type(moved.ends) is not type(self.ends):
                return moved  # a fake tensor may not be kept beside real ones
            self._moved[device] = moved
        return self._moved[device]

    def _compared(self, source: Tensor) -> Tensor:
        """How many rows each row was compared with, itself included, (B,)."""
        if not self.class_wise:
            return torch.full_like(source, len(self))
        first, last = self.ends[source].long().unbind(1)
        return last - first

    def _require(self, source: Tensor, sizes: Tensor) -> None:
        last = len(self) - 1
        inside = (source >= 0) & (source <= last)
        _require(inside, source, f"Expected `source` from 0 to {last}, the rows of the bank")
        if self.class_wise:
            compared = self.to(source.device)._compared(source.clamp(0, last))
            _require(sizes <= compared, sizes, _CLASS_WISE)

    def _tail(
        self,
        path: PathCoefficients,
        source: Tensor,
        sizes: Tensor,
        neighbours: bool,
        delta: float,
        made_in: torch.dtype,
    ) -> Tail:
        here, k = self.to(source.device), self.num_neighbours if neighbours else 0
        distance = here.rows.distances[source].double()
        if k:
            distance = torch.maximum(distance, here.rows.beyond[source, None])
        rank = 2 ** torch.arange(distance.shape[1], device=source.device)
        # None of the neighbours need be in the class: then as many rows are left as it has.
        stop = torch.minimum(here._compared(source), sizes + k)[:, None]
        count = (torch.minimum(2 * rank, stop) - rank.clamp_min(k + 1)).clamp_min(0)
        # a x_1 + s eps is rounded by the coefficients, the products and the sum.
        eps = 2 * torch.finfo(made_in).eps
        rho = (path.alpha / path.sigma)[:, None]
        errors = (eps * self.max_norm + self.row_error, eps)
        return Tail.of(rho, distance, count, errors, self.dim, delta)


def _softmax(
    bank: LatentBank,
    xt: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    rows: Tensor,
    copies: Tensor,
    k: int,
) -> Posterior:
    """The posterior over `rows` (B, n), -1 for none; the first has `copies` (B,) more."""
    x = bank.take(rows.clamp_min(0), xt.device)
    gap = xt[:, None] - alpha[:, None, None] * x
    logits = -torch.linalg.vecdot(gap, gap) / (2 * sigma[:, None] ** 2)
    logits = logits.masked_fill(rows < 0, -torch.inf)
    logits[:, 0] += copies.log1p()
    shares = logits.softmax(dim=1)
    weights = shares.clone()
    weights[:, 0] /= 1 + copies
    top, order = weights.topk(min(k, rows.shape[1]), dim=1)
    missing = (0, k - top.shape[1])
    return Posterior(
        mean=torch.einsum("bn,bnd->bd", shares, x),
        log_evidence=logits.logsumexp(dim=1),
        entropy=torch.special.entr(shares).sum(1) + shares[:, 0] * copies.log1p(),
        ess=1 / (weights * shares).sum(1),
        weights=pad(top, missing),
        rows=pad(rows.gather(1, order), missing, value=-1),
        tail_mass=torch.zeros_like(alpha),
    )


_CLASS_WISE = (
    "The certificate is class-wise: it says nothing of posteriors over more rows than a class. Ask "
    "with labels, or use Certificate.compute(bank, class_wise=False), which serves both"
)


def _require(ok: Tensor, values: Tensor, message: str) -> None:
    """Refuses with `message` if not all are `ok`; on a device by an assertion, without a sync."""
    if ok.device.type != "cpu":
        torch._assert_async(ok.all(), message)
    elif not ok.all():
        raise ValueError(f"{message}; got {int(values[~ok][0])}.")


def _header(
    rows: int, dim: int, fingerprint: str, neighbours: int, class_wise: bool
) -> dict[str, str]:
    settings = {"rows": rows, "dim": dim, "neighbours": neighbours, "class_wise": class_wise}
    return {**_FORMAT, "fingerprint": fingerprint, **{k: str(v) for k, v in settings.items()}}


def _other(name: str, rows: str | int, dim: str | int, bank: LatentBank) -> ValueError:
    return ValueError(
        f"Expected a certificate for this bank, but {name} belongs to other latents: it was made "
        f"for {rows} rows of {dim} numbers, the bank has {len(bank)} of {bank.dim}. Compute it "
        "again: Certificate.compute(bank).save(path)."
    )
