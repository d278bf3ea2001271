r"""The oracle over a support set as a layer: one attention head with a Gaussian kernel.

For a support `y_1..y_M` the marginal velocity is a kernel smoother whose bandwidth falls with t
(Smola, arXiv 2605.13386),

    g_i = softmax_i( -||x_t - a_t y_i||^2 / (2 s_t^2) ),   m = sum_i g_i y_i,   u* = c_t m + b_t x_t

with `c_t, b_t` of `paths.Prediction`. As attention it has the query `x_t`, the keys and values
`y_i`, and the logits

    (a_t <x_t, y_i> - a_t^2 ||y_i||^2 / 2) / s_t^2.

Two things that the oracle fixes can be learned here: a bandwidth h (`h s_t` in place of `s_t` in
the weights; h > 1 smooths, as tempering by h^2 does) and a linear map L of the distance,
`||L (x_t - a_t y_i)||`. The layer is differentiable in the support, `x_t`, t, the prior weights,
h and L.

**Precision.** The logits are large and differ by little: `a/s^2 ||y||^2` is 4e7 at t = 0.99 and
D = 4096, where float32 has no digit after the point. The layer computes in float64, which autocast
does not change, around the mean of the support.

**The data end.** As for the oracle, `s_t` stays above about 1.5e-6 times the norm of a row. At t =
1 the weights are on the nearest rows and the velocity is singular: for an `x_t` that is a row it is
`a'_t m`, without the noise direction, otherwise the distance to the nearest row over that least
`s_t`. Stop at 0.999.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stagewise.device_checks import require_all
from stagewise.engines.base import LOGIT_ERROR
from stagewise.paths import LinearPath, Path, PathCoefficients, Prediction, PredictionKind
from stagewise.queries import check_times

__all__ = ["GaussianAttention"]


class GaussianAttention(nn.Module):
    """The oracle of a support set as an attention head, differentiable in the support.

    A call holds all B x M logits and the support in float64. Without learned parameters the
    `state_dict` is empty.

    Args:
        path: The path of training, default `LinearPath()`.
        prediction: What is returned, default "velocity"; "data" is the posterior mean m.
        bandwidth: Factor h of `s_t` in the weights, above 0; default 1, the oracle.
        metric: The linear map L of the distance, for samples as rows of D numbers: one factor per
            number, (D,), or a matrix, (r, D), r below D for a distance in fewer dimensions.
            Default None, the identity: the oracle.
        learn_bandwidth: Whether `log h` is a parameter, default False.
        learn_metric: Whether `metric` is a parameter, default False. The weights depend on L / h
            only: with both learned, h is the scale of L.

    Raises:
        ValueError: If `bandwidth` is not positive and finite, `metric` is neither (D,) nor (r, D),
            or it is to be learned but not given.

    Example:
        >>> import torch
        >>> from stagewise import GaussianAttention, LatentBank, Oracle
        >>> support = torch.randn(50, 16, requires_grad=True)
        >>> xt, t = torch.randn(8, 16), torch.rand(8)
        >>> head = GaussianAttention()
        >>> velocity = head(xt, t, support)
        >>> torch.allclose(velocity, Oracle(LatentBank(support)).velocity(xt, t))
        True
        >>> velocity.square().mean().backward()
        >>> support.grad.shape
        torch.Size([50, 16])
    """

    log_bandwidth: Tensor | None
    metric: Tensor | None

    def __init__(
        self,
        path: Path | None = None,
        prediction: Prediction | PredictionKind = "velocity",
        *,
        bandwidth: float = 1.0,
        metric: Tensor | None = None,
        learn_bandwidth: bool = False,
        learn_metric: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"Expected `bandwidth` above 0 and finite, got {bandwidth}.")
        if metric is None and learn_metric:
            raise ValueError(
                "Expected `metric` with learn_metric=True, got None. Give where learning starts: "
                "torch.ones(D), or a matrix (r, D)."
            )
        if metric is not None and (metric.ndim not in (1, 2) or not metric.is_floating_point()):
            raise ValueError(
                "Expected floating-point `metric` with shape (D,) or (r, D), got "
                f"{metric.dtype} of shape {tuple(metric.shape)}."
            )
        self.path = path or LinearPath()
        self.prediction = Prediction.of(prediction)
        self._bandwidth = float(bandwidth)
        log_h = nn.Parameter(torch.tensor(math.log(bandwidth))) if learn_bandwidth else None
        self.register_parameter("log_bandwidth", log_h)
        metric = None if metric is None else metric.detach().clone()
        if metric is not None and learn_metric:
            self.metric = nn.Parameter(metric)
        else:
            self.register_buffer("metric", metric, persistent=False)

    @property
    def bandwidth(self) -> float | Tensor:
        """The factor h; a tensor, (), float64, if it is learned."""
        if self.log_bandwidth is None:
            return self._bandwidth
        return self.log_bandwidth.double().exp()

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        support: Tensor,
        *,
        mask: Tensor | None = None,
        log_weights: Tensor | None = None,
    ) -> Tensor:
        """What the support predicts at `xt`.

        Args:
            xt: Noisy samples, (B, *).
            t: Times in [0, 1], (B,). At sigma = 0 see the module docstring.
            support: Samples, (M, *) for all queries, or (B, M, *) with a set for each.
            mask: Which of them count, bool, (M,) or (B, M), at least one for each query. The values
                of the others, even NaN, have no effect. Default None: all.
            log_weights: Logarithms of prior weights, (M,) or (B, M), up to a constant. Default
                None: equal weights.

        Returns:
            The prediction, (B, *), in the dtype of `xt`.

        Raises:
            ValueError: On shapes that do not fit, t outside [0, 1], a query without a row, or a
                device without float64 (MPS). Values are not checked under `torch.compile`.
        """
        weights, rows, centre, path, x = self._attend(xt, t, support, mask, log_weights)
        c, b = self.prediction.coefficients(path)
        return (c * (weights @ rows + centre) + b * x).reshape(xt.shape).to(xt.dtype)

    def weights(
        self,
        xt: Tensor,
        t: Tensor,
        support: Tensor,
        *,
        mask: Tensor | None = None,
        log_weights: Tensor | None = None,
    ) -> Tensor:
        """The weights `g`, (B, M), in the dtype of `xt`, for the arguments of `forward`."""
        weights = self._attend(xt, t, support, mask, log_weights)[0]
        return weights.reshape(len(xt), weights.shape[-1]).to(xt.dtype)

    def _attend(
        self,
        xt: Tensor,
        t: Tensor,
        support: Tensor,
        mask: Tensor | None,
        log_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, PathCoefficients, Tensor]:
        """Weights (G, Q, M), rows (G, M, D) around their centre (G, 1, D), path, x_t (G, Q, D).

        The batch is G groups of Q queries with the same rows: one of B, or B of one.
        """
        count = self._check(xt, t, support, mask, log_weights)
        own = support.ndim > xt.ndim
        groups, dim = (len(xt), 1) if own else (1, len(xt)), math.prod(xt.shape[1:])
        x = xt.double().reshape(*groups, dim)
        rows = support.double().reshape(groups[0], count, dim)
        path = PathCoefficients(
            *(value.reshape(*groups, 1) for value in self.path(t.to(x.device, torch.float64)))
        )
        keep = None if mask is None else mask.expand(len(xt), -1).reshape(*groups, count)
        used = torch.ones_like(rows[..., :1]) if keep is None else keep.any(1)[..., None].to(rows)
        rows = rows.masked_fill(used == 0, 0.0)
        # A constant: weights and mean do not depend on the point that they are computed around.
        centre = rows.detach().sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp_min(1)
        rows = (rows - centre) * used
        path = path.floored(_sigma_floor(rows, centre))
        query, keys = self._map(x - path.alpha * centre), self._map(rows)
        width = self.bandwidth * path.sigma
        width = torch.maximum(width, _sigma_floor(keys, self._map(centre)))
        # Not scaled_dot_product_attention: float32 does not hold these logits, and CUDA has no
        # fused kernel for float64, so it would be the same two products.
        norms = keys.square().sum(-1).unsqueeze(1)
        logits = (query @ keys.mT - path.alpha / 2 * norms) * (path.alpha / width.square())
        if log_weights is not None:
            prior = log_weights.double().expand(len(xt), -1)
            logits = logits + prior.reshape(*groups, count)
        if keep is not None:
            logits = logits.masked_fill(~keep, -torch.inf)
        return logits.softmax(-1), rows, centre, path, x

    def _map(self, rows: Tensor) -> Tensor:
        """Rows (G, n, D) as the distance sees them, (G, n, D) or (G, n, r)."""
        if self.metric is None:
            return rows
        metric = self.metric.double()
        return rows * metric if metric.ndim == 1 else rows @ metric.mT

    def _check(
        self,
        xt: Tensor,
        t: Tensor,
        support: Tensor,
        mask: Tensor | None,
        log_weights: Tensor | None,
    ) -> int:
        """Refuses arguments that do not fit; returns the number of rows, M."""
        if xt.ndim < 2 or not xt.is_floating_point():
            raise ValueError(
                "Expected floating-point `xt` with shape (B, *) and at least two axes, got "
                f"{xt.dtype} of shape {tuple(xt.shape)}."
            )
        if xt.device.type == "mps":
            raise ValueError("GaussianAttention needs float64, which MPS lacks. Use the CPU.")
        size, shape = len(xt), tuple(xt.shape[1:])
        lead = support.shape[: support.ndim - len(shape)]
        fits = tuple(support.shape[len(lead) :]) == shape and len(lead) in (1, 2)
        if not fits or lead[-1] == 0 or (len(lead) == 2 and lead[0] != size):
            raise ValueError(
                f"Expected `support` with shape {('M', *shape)} or {(size, 'M', *shape)} and M at "
                f"least 1, got {tuple(support.shape)}."
            )
        count = lead[-1]
        for name, value in (("mask", mask), ("log_weights", log_weights)):
            if value is not None and value.shape not in ((count,), (size, count)):
                raise ValueError(
                    f"Expected `{name}` with shape ({count},) or ({size}, {count}), got "
                    f"{tuple(value.shape)}."
                )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"Expected bool `mask`, True for rows that count, got {mask.dtype}.")
        if self.metric is not None and self.metric.shape[-1] != math.prod(shape):
            raise ValueError(
                f"Expected `xt` with {self.metric.shape[-1]} numbers per sample, the columns of "
                f"`metric`, got {math.prod(shape)}."
            )
        # Reading values would break the graph.
        if not torch.compiler.is_compiling():
            check_times(t, size)
            if mask is not None:
                require_all(
                    mask.any(-1),
                    "Expected `mask` with at least one row for each query",
                    lambda: ", got one that leaves none. Drop such queries beforehand.",
                )
        return count

    def extra_repr(self) -> str:
        """The settings, as `print` shows them."""
        metric = None if self.metric is None else tuple(self.metric.shape)
        learned = [name for name, _ in self.named_parameters()]
        h = float(torch.as_tensor(self.bandwidth).detach())
        return (
            f"{self.path!r}, {self.prediction.kind!r}, bandwidth={h:.4g}, "
            f"metric={metric}, learned={learned}"
        )


def _sigma_floor(rows: Tensor, centre: Tensor) -> Tensor:
    """`Engine.sigma_floor` for rows (G, M, D) around centre (G, 1, D): (G, 1, 1), no sync."""
    radius = rows.detach().norm(dim=-1).amax(1)[:, None, None]
    bound = radius * (radius + centre.detach().norm(dim=-1, keepdim=True))
    bound = bound.clamp_min(torch.finfo(torch.float32).tiny)
    return (bound * (torch.finfo(torch.float64).eps / LOGIT_ERROR)).sqrt()
