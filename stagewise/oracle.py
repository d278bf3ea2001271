r"""The oracle: the marginal velocity of a finite training set, in closed form.

For a Gaussian prior, independent coupling and the bank `x^(1..N)` (Liu et al., arXiv 2512.02826,
Theorem 2.1),

    gamma_i(x_t, t) = softmax_i( -||x_t - a_t x^(i)||^2 / (2 s_t^2) ),   m = sum_i gamma_i x^(i),
    u*(x_t, t) = a'_t m + s'_t (x_t - a_t m) / s_t.

For training targets use `correction`, `c_t (m - x_1)`: added to the conditional target of any
prediction type it gives the oracle's target, and it vanishes exactly where the posterior has
collapsed on `x_1`, where the textbook form divides rounding errors by `s_t`.

**The data end.** At t = 1 (s_t = 0) the weights are the limit t -> 1: all mass on the rows nearest
to `x_t / a_t`. The whole oracle is evaluated at `max(s_t, floor)`, with the floor near 1.5e-6 times
the norm of a row (`engines.exact.sigma_floor`); for a query made from a bank row the correction
there is 0. `velocity` at t = 1 has lost the noise direction and returns `a'_t m` only, for paths
whose `s'_t` is finite.

**Not valid** under couplings that make `x_0` and `x_1` dependent (minibatch OT, SD-FM,
Schroedinger bridges): the posterior above assumes independence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.engines.exact import exact_posterior, sigma_floor
from stagewise.paths import LinearPath, Path, PathCoefficients, Prediction, PredictionKind
from stagewise.posterior import Posterior

__all__ = ["Oracle"]


class Oracle:
    """Answers for a bank and a path: posterior, correction of a target, marginal velocity.

    Like the bank it is a plain object; a deep copy returns the oracle itself.

    Args:
        bank: The training latents.
        path: The path of training, default `LinearPath()`.
        chunk_size: Rows streamed at a time; default fits 32 MiB. The result does not depend on it.

    Example:
        >>> import torch
        >>> bank = LatentBank(torch.randn(1000, 16))
        >>> oracle = Oracle(bank, LinearPath())
        >>> x0, x1, t = torch.randn(8, 16), bank.rows[:8], torch.rand(8)
        >>> xt = oracle.path.interpolate(x0, x1, t)
        >>> u = x1 - x0 + oracle.correction(xt, t, x1)
        >>> torch.allclose(u, oracle.velocity(xt, t), atol=1e-3)
        True
    """

    def __init__(
        self, bank: LatentBank, path: Path | None = None, *, chunk_size: int | None = None
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"Expected `chunk_size` of at least 1, got {chunk_size}.")
        self.bank = bank
        self.path = path or LinearPath()
        self.chunk_size = chunk_size

    @torch.no_grad()
    def posterior(
        self,
        xt: Tensor,
        t: Tensor,
        labels: Tensor | Sequence[int] | None = None,
        *,
        source: Tensor | None = None,
        k: int = 1,
    ) -> Posterior:
        """The exact posterior over bank rows for each query.

        Args:
            xt: Noisy samples, (B, *) with the bank's sample shape.
            t: Times in [0, 1], (B,).
            labels: Class of each query, (B,), integers: the posterior is then over the rows of that
                class, which is a valid target for a class-conditional model. Default None: over all
                rows. A list or a CPU tensor costs no device sync, one on an accelerator does.
            source: The row of `bank.rows` each query was made from, (B,), for `source_weight`;
                default None.
            k: How many of the largest weights to return, default 1; at most the rows of the bank.
                Where a class has fewer rows the rest has weight 0 and row -1.

        Returns:
            The posterior, in float64.

        Raises:
            ValueError: On shapes that do not fit, t outside [0, 1], an unknown class, k below 1, or
                queries on a device without float64 (MPS).
        """
        flat, path = self._prepare(xt, t)
        if k < 1:
            raise ValueError(f"Expected `k` of at least 1, got {k}.")
        if source is not None and source.shape != (len(flat),):
            raise ValueError(
                f"Expected `source` with shape ({len(flat)},), got {tuple(source.shape)}."
            )
        k = min(k, len(self.bank))
        with torch.autocast(flat.device.type, enabled=False):
            if labels is None or len(flat) == 0:
                post = exact_posterior(self.bank, flat, path, k=k, chunk_size=self.chunk_size)
            else:
                post = self._by_class(flat, path, labels, k)
            source_weight = None
            if source is not None:
                rows = self.bank.rows[source.to(self.bank.device)].to(flat)
                distance = (flat - path.alpha[:, None] * rows).square().sum(1)
                log_weight = -distance / (2 * path.sigma**2) - post.log_evidence
                source_weight = log_weight.exp().clamp_max(1)
        return replace(
            post, mean=post.mean.reshape(-1, *self.bank.shape), source_weight=source_weight
        )

    def correction(
        self,
        xt: Tensor,
        t: Tensor,
        x1: Tensor,
        labels: Tensor | Sequence[int] | None = None,
        *,
        prediction: Prediction | PredictionKind = "velocity",
        posterior: Posterior | None = None,
    ) -> Tensor:
        """`c_t (m - x_1)`: what turns a conditional target into the oracle's.

        Args:
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,).
            x1: The samples `xt` was made from, (B, *). They must be rows of the bank: with others
                the correction is as large as their distance to the bank times `c_t`.
            labels: See `posterior`.
            prediction: What the target is, default "velocity".
            posterior: The posterior at these queries if it is known already.

        Returns:
            The correction, (B, *), in the dtype of `x1`.

        Raises:
            ValueError: As `posterior`, or if `x1` has another shape than `xt`.
        """
        if x1.shape != xt.shape:
            raise ValueError(
                f"Expected `x1` with the shape of `xt`, {tuple(xt.shape)}, got {tuple(x1.shape)}."
            )
        flat, path = self._prepare(xt, t)
        post = posterior or self.posterior(xt, t, labels)
        c, _ = Prediction.of(prediction).coefficients(path)
        difference = post.mean.flatten(1) - x1.detach().flatten(1).to(flat.dtype)
        # A difference below its rounding is none; at t = 1 some paths have an infinite c.
        rounding = 16 * torch.finfo(torch.float64).eps * self.bank.max_norm
        gap = torch.where(difference.abs() <= rounding, 0.0, c[:, None] * difference)
        return gap.reshape(x1.shape).to(x1.dtype)

    def velocity(
        self, xt: Tensor, t: Tensor, labels: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """The marginal velocity `u*(x_t, t)`.

        Args:
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,). At sigma = 0 see the module docstring.
            labels: See `posterior`.

        Returns:
            The velocity, (B, *), in the dtype of `xt`.
        """
        flat, path = self._prepare(xt, t)
        mean = self.posterior(xt, t, labels).mean.flatten(1)
        noise = (flat - path.alpha[:, None] * mean) / path.sigma[:, None]
        velocity = path.d_alpha[:, None] * mean + path.d_sigma[:, None] * noise
        return velocity.reshape(xt.shape).to(xt.dtype)

    def _prepare(self, xt: Tensor, t: Tensor) -> tuple[Tensor, PathCoefficients]:
        if xt.shape[1:] != self.bank.shape:
            raise ValueError(
                f"Expected `xt` with shape {('B', *self.bank.shape)} as the bank's samples, got "
                f"{tuple(xt.shape)}."
            )
        if xt.device.type == "mps":
            raise ValueError("The oracle needs float64, which MPS has not. Ask it on the CPU.")
        check_times(t, len(xt))
        path = self.path(t.detach().to(device=xt.device, dtype=torch.float64))
        return xt.detach().flatten(1).double(), path.floored(sigma_floor(self.bank))

    def _by_class(
        self, flat: Tensor, path: PathCoefficients, labels: Tensor | Sequence[int], k: int
    ) -> Posterior:
        if isinstance(labels, Tensor) and (labels.ndim != 1 or labels.is_floating_point()):
            raise ValueError(
                f"Expected integer `labels` with shape ({len(flat)},), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        names = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if len(names) != len(flat):
            raise ValueError(f"Expected `labels` with shape ({len(flat)},), got ({len(names)},).")
        members: dict[int, list[int]] = {}
        for query, label in enumerate(names):
            members.setdefault(label, []).append(query)
        segments = {label: self.bank.segment(label) for label in members}
        parts = []
        for label, segment in segments.items():
            at = torch.tensor(members[label], device=flat.device)
            coefficients = PathCoefficients(*(value[at] for value in path))
            post = exact_posterior(
                self.bank, flat[at], coefficients, segment=segment, k=k, chunk_size=self.chunk_size
            )
            missing = (0, k - post.weights.shape[1])
            weights = torch.nn.functional.pad(post.weights, missing)
            rows = torch.nn.functional.pad(post.rows, missing, value=-1)
            parts.append(replace(post, weights=weights, rows=rows))
        order = [query for group in members.values() for query in group]
        back = torch.argsort(torch.tensor(order, device=flat.device))
        fields = ("mean", "log_evidence", "entropy", "ess", "weights", "rows", "tail_mass")
        return Posterior(
            **{name: torch.cat([getattr(p, name) for p in parts])[back] for name in fields}
        )

    def __copy__(self) -> Oracle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Oracle:
        return self

    def __repr__(self) -> str:
        return f"Oracle({self.bank!r}, {self.path!r})"


def check_times(t: Tensor, length: int) -> None:
    """Refuses times of another shape than (length,) or outside [0, 1].

    On an accelerator the range is checked by a device-side assertion, which costs no sync but, as
    CUDA has it, ends the process: the message is the same.

    Raises:
        ValueError: With what was expected and what came.
    """
    if t.shape != (length,):
        raise ValueError(f"Expected `t` with shape ({length},), got {tuple(t.shape)}.")
    inside = ((t >= 0) & (t <= 1)).all()
    message = "Expected `t` in [0, 1] with t = 0 noise and t = 1 data"
    if t.device.type != "cpu":
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(f"{message}, got values from {t.min():.4g} to {t.max():.4g}.")
