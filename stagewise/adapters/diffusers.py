r"""diffusers' flow-matching scripts (SD3, Flux): noise is `sigma = 1`, the target `noise - x`.

The scripts write their loss out, so there is nothing to put a scheme into: one line changes, from
`target = noise - model_input` to

    target = diffusers_target(noisy_model_input, model_input, noise, sigmas, scheme)

With `t = 1 - sigma` the noisy input `(1 - sigma) x + sigma noise` is the linear path, whatever
`shift` has done to sigma, and the target is the negative velocity, so the correction is subtracted.
With `precondition_outputs` the target is `x`: say `prediction="data"`.
"""

from __future__ import annotations

from torch import Tensor

from stagewise.adapters.base import Place, Seam
from stagewise.oracle import Labels
from stagewise.paths import DIFFUSERS, LinearPath, PredictionKind
from stagewise.schemes import Phases, Scheme, parts
from stagewise.schemes.conditions import unknown_conditions

__all__ = ["FlowMatchScheduler", "diffusers_target"]


def diffusers_target(
    noisy: Tensor,
    model_input: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    scheme: Scheme | Phases,
    *,
    labels: Labels | None = None,
    condition: Tensor | None = None,
    prediction: PredictionKind = "velocity",
) -> Tensor:
    """What to regress on in place of `noise - model_input`.

    The scheme's weight is `scheme.last.weight`, (B,), for `compute_loss_weighting_for_sd3` to be
    multiplied by.

    Args:
        noisy: `(1 - sigmas) * model_input + sigmas * noise`, (B, *).
        model_input: Latents, scaled as they are trained on, (B, *).
        noise: Standard normal, (B, *).
        sigmas: Noise levels in [0, 1] with 1 noise, (B,) or as the scripts expand them, (B, 1, ..).
        scheme: What steers.
        labels: The class of each sample, (B,); default None: the scheme looks them up if it needs
            them. These scripts condition on text: a scheme that mixes over a bank without classes
            is refused unless it says class_wise=False, "my model ignores its conditions".
        condition: For a scheme with a kernel on it: what the model is given, (B, *), such as pooled
            text embeddings.
        prediction: "velocity" for the target `noise - model_input`, the default; "data" for
            `model_input`.

    Returns:
        The target, (B, *).

    Raises:
        ValueError: If `prediction` is neither, the shapes do not fit, or the scheme would ignore
            what the model is conditioned on.

    Example:
        >>> import torch
        >>> from stagewise import Scheme
        >>> x, noise, sigmas = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4)
        >>> s = sigmas.reshape(-1, 1, 1, 1)
        >>> noisy = (1 - s) * x + s * noise
        >>> target = diffusers_target(noisy, x, noise, sigmas, Scheme())
        >>> torch.equal(target, noise - x)
        True
    """
    if prediction not in ("velocity", "data"):
        raise ValueError(f'Expected `prediction` "velocity" or "data", got {prediction!r}.')
    if sigmas.numel() != len(noisy):
        raise ValueError(
            f"Expected one of `sigmas` for each of {len(noisy)} samples, got {tuple(sigmas.shape)}."
        )
    for part in parts(scheme):
        told = part.target is None or part.class_wise or part.unconditional
        told |= part.oracle is not None and part.oracle.condition is not None
        if labels is None and not told:
            raise unknown_conditions("none, and a bank without classes")
    y = model_input if prediction == "data" else model_input - noise
    target, _ = scheme(
        y,
        xt=noisy,
        t=1 - sigmas.flatten(),
        x1=model_input,
        labels=labels,
        condition=condition,
        prediction=prediction,
    )
    return target if prediction == "data" else -target


class FlowMatchScheduler(Seam):
    """A `FlowMatchEulerDiscreteScheduler`: recognised, but the target is made beside it."""

    library, what = "diffusers", "diffusers scheduler"
    observable = trains = False

    @classmethod
    def of(cls, place: Place) -> FlowMatchScheduler | None:
        """The seam at `place`, or None if there is none of this kind."""
        scheduler = place.object
        if not callable(getattr(scheduler, "scale_noise", None)) or not all(
            hasattr(scheduler, name) for name in ("sigmas", "timesteps")
        ):
            return None
        refusal = (
            "its target is made in your training step. There, in place of `noise - model_input`, "
            "write diffusers_target(noisy, model_input, noise, sigmas, scheme)."
        )
        return cls(place, LinearPath(), convention=DIFFUSERS, refusal=refusal)
