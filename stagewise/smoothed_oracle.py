r"""The exact oracle of a smoothed set: a mixture of N Gaussians in place of N rows.

The formulas are in `stagewise.gaussians`. `g = h = 0` is the plain oracle, and `log_evidence` means
what it does there. Near t = 1 the posterior need not collapse on a row: Gaussians overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.gaussian_engine import GaussianEngine
from stagewise.gaussians import Timed
from stagewise.oracle import Oracle, Times
from stagewise.paths import Path, PathCoefficients
from stagewise.smoothing import Smoothing
from stagewise.stages import StageBoundary
from stagewise.strength import Strength, strength_at

__all__ = ["SmoothedOracle"]


class SmoothedOracle(Oracle):
    """Answers for a smoothed set, as `Oracle` does for a bank.

    `Mix` and `StageCurve.measure` take it as they take an oracle: x_1 is then a draw from the
    smoothed set (`Smoothing.draw`), with its row as `source`. Targets that read single rows
    (`ReferenceSet`, `Stratified`, `Tempered`, `LeaveOneOut`) do not know the Gaussians.

    The first question diagonalises the G_i and keeps `8 N (K (K + 4) + 2)` bytes beside the queries
    (N = 20 000, K = 8: 16 MB; N = 1.28 million: 1 GB). Sums over rows are atomic on CUDA: for runs
    that must agree to the last bit there call `torch.use_deterministic_algorithms(True)`.

    Exact for samples drawn around the rows themselves. Where the VAE draws latents around theirs,
    it does not know that spread: give the smoothing a floor of about its size.

    Args:
        bank: The rows.
        path: The path of training.
        smoothing: The Gaussians around the rows of this bank.
        boundary: See `Smoothing.draw`, like the next: rows are themselves before this time. Give
            what the draws are given.
        strength: Any function of t.
        null_class: See `Oracle`.

    Raises:
        ValueError: If the smoothing was made for another bank, or boundary and strength are given.

    Example:
        >>> import torch
        >>> from stagewise import LinearPath
        >>> bank = LatentBank(torch.randn(200, 16))
        >>> smoothing = Smoothing(bank, progress=False)
        >>> oracle = SmoothedOracle(bank, LinearPath(), smoothing)
        >>> source, t = torch.randint(200, (8,)), torch.rand(8)
        >>> x0, x1 = torch.randn(8, 16), smoothing.draw(bank.rows[source], source)
        >>> xt = oracle.path.interpolate(x0, x1, t)
        >>> u = x1 - x0 + oracle.correction(xt, t, x1)
        >>> torch.allclose(u, oracle.velocity(xt, t), atol=1e-3)
        True
    """

    smoothing: Smoothing

    def __init__(
        self,
        bank: LatentBank,
        path: Path | None,
        smoothing: Smoothing,
        *,
        boundary: float | StageBoundary | None = None,
        strength: Strength | None = None,
        null_class: int | None = None,
    ) -> None:
        if not isinstance(smoothing, Smoothing):
            raise TypeError(
                f"Expected a Smoothing, got {type(smoothing).__name__}: "
                "SmoothedOracle(bank, path, Smoothing(bank))."
            )
        smoothing.check_bank(bank)
        super().__init__(bank, path, GaussianEngine(smoothing), null_class=null_class)
        self.smoothing = smoothing
        self.boundary, self.strength = boundary, strength
        self._share(torch.zeros(1, 1), torch.ones(1))

    def _share(self, x: Tensor, t: Times) -> Tensor | None:
        return strength_at(x, t, self.boundary, self.strength)

    def sample(self, source: Tensor, t: Tensor, normals: Tensor) -> Tensor:
        """See `Oracle.sample`: a draw from the Gaussians, as wide as they are at t."""
        x1 = super().sample(source, t, normals)
        return self.smoothing.moved(x1, source, normals, self._share(x1, t))

    def coefficients(self, xt: Tensor, t: Times) -> tuple[Tensor, PathCoefficients]:
        """See `Oracle.coefficients`; they know how wide the Gaussians are at these times."""
        flat, path = super().coefficients(xt, t)
        share = self._share(flat, t)
        if share is None:
            return flat, path
        timed = Timed(*path)
        timed.share = share.to(flat)
        return flat, timed

    def __repr__(self) -> str:
        return f"SmoothedOracle({self.bank!r}, {self.path!r}, {self.smoothing!r})"
