"""The rows of a bank along its principal axes: few numbers that tell most about each row.

The axes are found by subspace iteration on a sample of the rows. They need not be the very best:
whatever orthonormal axes are taken, the split into a part along and a part across them is exact.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.bank.streaming import stream
from stagewise.files import write_tensors
from stagewise.memory import format_bytes
from stagewise.products import averages, full_precision, scores, working_dtype

__all__ = ["Projection"]

_log = logging.getLogger("stagewise")

_SAMPLE, _SPARE, _ROUNDS = 8192, 16, 3
"""Rows that the axes are found from, axes found beside those kept, and iterations."""

_FORMAT = {"format": "stagewise.Projection", "version": "1"}


@dataclass(frozen=True, eq=False)
class Projection:
    """The rows of a bank along its principal axes.

    Attributes:
        axes: `P^T`, (r, D), float64, orthonormal.
        rows: `z_i`, (N, r), bfloat16, in the bank's own order.
        half_norms: `||z_i||^2 / 2` of z as it is stored, (N,), float32.
        variances: Variances `lambda` of the rows along the axes, (r,), float64.
    """

    axes: Tensor
    rows: Tensor
    half_norms: Tensor
    variances: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, bank: LatentBank, dims: int) -> Projection:
        """Finds the axes from a sample of the rows, and projects all of them in one pass.

        Args:
            bank: The rows. The projection is where they are.
            dims: r.
        """
        rows = torch.empty(len(bank), dims, dtype=torch.bfloat16, device=bank.device)
        _log.info(
            "Coarse engine: projects %d rows of %d numbers on %d axes: once, a pass over %s and "
            "%.0f GFLOP. Kept: %s. Coarse.save(path, bank) saves it for the next run.",
            *(len(bank), bank.dim, dims, format_bytes(bank.nbytes)),
            *(2e-9 * len(bank) * bank.dim * dims, format_bytes(rows.nbytes)),
        )
        with full_precision():
            axes = _principal_axes(bank, dims)
            shift = axes @ (bank.centre - bank.offset)
            kind = working_dtype(bank.dtype, bank.device)
            for first, chunk in bank.chunks(bank.whole, dtype=kind):
                rows[first : first + len(chunk)] = (scores(axes, chunk) - shift[:, None]).T
        return cls.measured(axes, rows)

    @classmethod
    def measured(cls, axes: Tensor, rows: Tensor) -> Projection:
        """A projection with what follows from its axes and rows."""
        half_norms, squares = rows.new_empty(len(rows), dtype=torch.float32), 0 * axes[:, 0]
        for first, chunk in stream(rows, slice(0, len(rows)), dtype=torch.float32):
            square = chunk.square()
            half_norms[first : first + len(chunk)] = square.sum(1) / 2
            squares += square.sum(0)
        return cls(axes, rows, half_norms, squares / len(rows))

    def save(self, path: str | os.PathLike[str], bank: LatentBank) -> None:
        """Writes a safetensors file, in one step: there is never half a file at `path`.

        Args:
            path: The file.
            bank: The bank that was projected.
        """
        header = {**_FORMAT, "fingerprint": bank.fingerprint, "dims": str(len(self.axes))}
        write_tensors(path, {"axes": self.axes, "rows": self.rows}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], bank: LatentBank, dims: int) -> Projection:
        """Reads what `save` wrote.

        Args:
            path: The file.
            bank: The bank that was projected, on any device.
            dims: r.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no projection, one of other latents, or one on another number
                of axes.
        """
        name, cure = os.fspath(path), "Coarse.save(path, bank) writes one that fits."
        if not os.path.isfile(path):
            raise FileNotFoundError(f"Expected the file of a projection, got {name}. {cure}")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if not _FORMAT.items() <= header.items():
                    raise ValueError(
                        f"Expected a file that says {_FORMAT}, got {name}, which says {header}. "
                        f"{cure}"
                    )
                if header["fingerprint"] != bank.fingerprint:
                    raise ValueError(
                        f"Expected a projection of {bank!r}, got {name}, which was made from other "
                        f"latents, or from these in another order or type. {cure}"
                    )
                if int(header["dims"]) != dims:
                    raise ValueError(
                        f"Expected a projection on {dims} axes, got {name} with {header['dims']}. "
                        f"Use Coarse(dims={header['dims']}). {cure}"
                    )
                axes, rows = (file.get_tensor(key).to(bank.device) for key in ("axes", "rows"))
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged: {error}. {cure}") from error
        return cls.measured(axes, rows)


def _principal_axes(bank: LatentBank, dims: int) -> Tensor:
    """The leading axes of evenly spaced rows, by subspace iteration; (dims, D), float64."""
    count = min(len(bank), _SAMPLE)
    x = bank.take(torch.arange(count, device=bank.device) * len(bank) // count)
    x = (x - bank.centre).float()
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(min(dims + _SPARE, bank.dim), bank.dim, generator=generator)
    axes = some.to(bank.device).double()
    for _ in range(_ROUNDS):
        axes = torch.linalg.qr(averages(scores(axes, x), x).double().T).Q.T
    along = scores(axes, x).double()
    turn = torch.linalg.eigh(along @ along.T).eigenvectors.flip(1)
    return turn[:, :dims].T @ axes
