r"""Scripts with a noise scheduler of diffusers: flow matching (SD3, Flux), DDPM, DDIM.

These scripts write their loss out, so there is no object to attach a scheme to. One line changes,
from the target they make to

    target = diffusers_target(noisy, model_input, noise, timesteps, scheme)

with `scheme = Scheme(..., convention=noise_scheduler)`, which says what `noisy` and `timesteps` are
and what is predicted. For flow matching, `sigmas` can replace timesteps if the scheme has no
convention: with `t = 1 - sigma` the noisy input `(1 - sigma) x + sigma noise` is on the linear
path, for any `shift` of sigma. With `precondition_outputs` the target is `x`: say
`prediction="data"`.
"""

from __future__ import annotations

from torch import Tensor

from stagewise.adapters.base import Place, TargetMaker
from stagewise.conventions import CONVENTIONS, STAGEWISE, of_scheduler
from stagewise.paths import LinearPath, Prediction, PredictionKind
from stagewise.queries import Labels
from stagewise.schemes import Phases, Scheme, parts
from stagewise.schemes.conditions import unknown_conditions

__all__ = ["NoiseScheduler", "diffusers_target"]


def diffusers_target(
    noisy: Tensor,
    model_input: Tensor,
    noise: Tensor,
    times: Tensor,
    scheme: Scheme | Phases,
    *,
    labels: Labels | None = None,
    condition: Tensor | None = None,
    prediction: Prediction | PredictionKind | None = None,
) -> Tensor:
    """The target to regress on, in place of the one that the script makes.

    Multiply the script's weight by the scheme's, `scheme.last.weight`, (B,).

    Args:
        noisy: What the network is given, (B, *).
        model_input: Latents, scaled as they are trained on, (B, *).
        noise: Standard normal, (B, *).
        times: Timesteps in the scheme's `convention`, (B,), as given to
            `noise_scheduler.add_noise`. If the scheme has no convention: the `sigmas` of flow
            matching, in [0, 1] with 1 noise, (B,) or expanded to (B, 1, ..).
        scheme: What steers. One with a smoothing draws `model_input` before `noisy` is made of it:
            `scheme.smooth(model_input, t=times)`, or with `sigmas` and no convention
            `scheme.smooth(model_input, t=1 - sigmas)`.
        labels: The class of each sample, (B,); default None: the scheme looks them up if it needs
            them. These scripts condition on text: a scheme that mixes over a bank without classes
            is refused unless it says class_wise=False, "my model ignores its conditions".
        condition: For a scheme with a kernel: what the model is conditioned on, (B, *), such as
            pooled text embeddings.
        prediction: What is predicted, default that of the convention: the scheduler's
            `prediction_type`, or `noise - model_input`.

    Returns:
        The target, (B, *), in the dtype of `noise`.

    Raises:
        ValueError: If the prediction is not known, the shapes do not fit, or the scheme would
            ignore what the model is conditioned on; and as the scheme raises.

    Example:
        >>> import torch
        >>> from stagewise import Scheme
        >>> from stagewise.adapters import diffusers_target
        >>> x, noise, sigmas = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4)
        >>> s = sigmas.reshape(-1, 1, 1, 1)
        >>> noisy = (1 - s) * x + s * noise
        >>> target = diffusers_target(noisy, x, noise, sigmas, Scheme())
        >>> torch.equal(target, noise - x)
        True
    """
    if times.numel() != len(noisy):
        raise ValueError(
            f"Expected one of `times` for each of {len(noisy)} samples, got {tuple(times.shape)}."
        )
    for part in parts(scheme):
        told = part.target is None or part.class_wise or part.unconditional
        told |= part.oracle is not None and part.oracle.condition is not None
        if labels is None and not told:
            raise unknown_conditions("none, and a bank without classes")
    said = scheme.convention != STAGEWISE
    convention = scheme.convention if said else CONVENTIONS["pi0"]
    kind = Prediction.of(prediction or convention.prediction)
    times, sign = times.flatten(), convention.sign_of(kind)
    t = convention.to_t(times)
    y = kind.target(scheme.path(t), noise, model_input).to(noise)
    target, _ = scheme(
        sign * y if said else y,
        xt=noisy,
        t=times if said else t,
        x1=model_input,
        labels=labels,
        condition=condition,
        prediction=kind,
    )
    return target if said else sign * target


class NoiseScheduler(TargetMaker):
    """A scheduler of flow matching, DDPM or DDIM; the training step makes the target itself."""

    library, what = "diffusers", "diffusers scheduler"
    observable = trains = False

    @classmethod
    def of(cls, place: Place) -> NoiseScheduler | None:
        """The maker at `place`, or None if there is none of this kind."""
        convention = of_scheduler(place.object)
        if convention is None:
            return None
        refusal = (
            "its target is made in your training step. There, in place of that target, write "
            "diffusers_target(noisy, x, noise, timesteps, scheme), with "
            "scheme = Scheme(..., convention=noise_scheduler)."
        )
        return cls(place, convention.path or LinearPath(), None, convention, refusal)
