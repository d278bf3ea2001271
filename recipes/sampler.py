"""How `stagewise sample` makes samples: with a trained module, an oracle, an autoencoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagewise.bank import LatentBank
from stagewise.oracle import Oracle
from stagewise.paths import same_path
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.sample_options import Options
from stagewise.sampling import (
    FIXED_SOLVERS,
    Velocity,
    guided,
    integration_range,
    sample,
    switched,
    time_grid,
    times_between,
)
from stagewise.sde import SDE_SOLVERS, sample_sde, sde_grid

__all__ = ["Sampler", "bank_of", "finisher", "noise_of", "require_alike"]

_STREAM = 0x5A3D1E
"""Makes draws differ from those of training. Not 0: a `SeedSequence` ignores zeros at its end."""


def noise_of(seed: int, index: int, shape: tuple[int, ...], *step: int) -> Tensor:
    """The noise x_0 of a sample, or that of a step from 1 on: `shape`, float32, on the CPU."""
    mixed = np.random.SeedSequence((seed, index, _STREAM, *step)).generate_state(1, np.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(mixed) >> 1))


@dataclass
class Sampler:
    """Makes samples of a module.

    With `oracle`, that gives the velocity up to `options.oracle_until`. With `then`, that gives it
    from `options.then_at` on.
    """

    module: FlowMatchingModule
    options: Options
    shape: tuple[int, ...]
    classes: int
    oracle: Oracle | None = None
    then: FlowMatchingModule | None = None

    def __post_init__(self) -> None:
        options = self.options
        start, end = integration_range(self.module.objective.prediction)
        if options.oracle_until:
            if options.oracle_until < start:
                raise ValueError(
                    f"Expected --oracle-until of at least {start:g}, where a network that predicts "
                    f"the {self.module.objective.prediction.kind} can begin, got "
                    f"{options.oracle_until:g}."
                )
            start, end = 0.0, max(end, options.oracle_until)
        self.start, self.end, self.times = start, end, None
        if options.method in SDE_SOLVERS:
            assert options.steps is not None
            assert options.last_step is not None
            assert options.last_step_size is not None
            # Infinite at t = 0; SiT begins there for a network that predicts noise.
            start = max(start, 1e-3) if options.diffusion_form == "sbdm" else start
            about = {"shift": options.shift, "start": start}
            self.times = sde_grid(options.steps, options.last_step, options.last_step_size, **about)
        elif options.method in FIXED_SOLVERS:
            assert options.steps is not None
            self.times = time_grid(
                options.steps, shift=options.shift, coarse=options.coarse, start=start, end=end
            )

    def labels(self, indices: range) -> Tensor:
        """The labels of samples, (B,): the chosen ones in turn."""
        chosen = self.options.labels or range(max(1, self.classes))
        return torch.tensor([chosen[i % len(chosen)] for i in indices])

    def __call__(self, indices: range) -> Tensor:
        """The samples with these numbers, (B, *), float32, on the CPU.

        Raises:
            ValueError: If some are not finite.
        """
        options, device = self.options, self.module.device
        x0 = torch.stack([noise_of(options.seed, i, self.shape) for i in indices]).to(device)
        labels = self.labels(indices)
        given = labels.to(device) if self.classes else None
        first = self._guided(self.module, given)
        second, at = first, options.then_at
        if self.then is not None:
            second = self._guided(self.then, given)
        elif self.oracle is not None:
            first, at = self._of_oracle(self.oracle, labels), options.oracle_until or 0.0
        if options.method in SDE_SOLVERS:
            x = self._stochastic(first, second, at, x0, indices)
        else:
            about: dict[str, Any] = {"method": options.method, "times": self.times}
            about |= {"start": self.start, "end": self.end}
            tolerances = {"rtol": options.rtol, "atol": options.atol}
            about |= {k: v for k, v in tolerances.items() if v is not None}
            if at is None:
                x = sample(first, x0, **about)
            else:
                x = switched(first, second, x0, at, **about)
        x = x.float().cpu()
        broken = int((~x.isfinite().flatten(1).all(1)).sum())
        if broken:
            raise ValueError(
                f"{broken} of the samples {indices[0]} to {indices[-1]} are not finite. The run "
                "has diverged, or the settings are too coarse: try --precision 32, more --steps or "
                "a lower --cfg-scale."
            )
        return x

    def _stochastic(
        self, first: Velocity, second: Velocity, at: float | None, x0: Tensor, indices: range
    ) -> Tensor:
        """Samples of the stochastic equation: the second velocity takes over at `at`."""
        options, steps, times = self.options, itertools.count(1), self.times
        assert times is not None
        assert options.last_step is not None

        def noise() -> Tensor:
            step = next(steps)
            return torch.stack([noise_of(options.seed, i, self.shape, step) for i in indices])

        about: dict[str, Any] = {"path": self.module.objective.path, "method": options.method}
        about |= {
            "diffusion": options.diffusion_form,
            "norm": options.diffusion_norm,
            "noise": noise,
        }
        if at is not None:
            before, times = (
                times_between(times, *ends) for ends in ((times[0], at), (at, times[-1]))
            )
            x0 = sample_sde(first, x0, times=before, last_step="none", **about)
        return sample_sde(second, x0, times=times, last_step=options.last_step, **about)

    def _guided(self, module: FlowMatchingModule, labels: Tensor | None) -> Velocity:
        options = self.options
        return guided(
            self._velocity(module, labels),
            self._velocity(module, None),
            options.cfg_scale,
            options.cfg_interval or (0.0, 1.0),
            options.cfg_channels,
        )

    def _velocity(self, module: FlowMatchingModule, labels: Tensor | None) -> Velocity:
        velocity, narrow = module.velocity(labels), self.options.precision == "bf16"

        def under_autocast(xt: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(xt.device.type, torch.bfloat16, enabled=narrow):
                return velocity(xt, t)

        return under_autocast

    def _of_oracle(self, oracle: Oracle, labels: Tensor) -> Velocity:
        given = labels if self.classes and oracle.bank.classes else None

        def velocity(xt: Tensor, t: Tensor) -> Tensor:
            place = oracle.bank.device
            return oracle.velocity(xt.to(place), t.to(place), given).to(xt)

        return velocity


def require_alike(config: Any, module: FlowMatchingModule, other: Any, then: Any) -> None:
    """Refuses a second run whose shape, classes, path or scale are not those of the first."""
    latents = [each.data.get("latents") or {} for each in (config, other)]
    scales = [{key: one.get(key) for key in ("normalize", "multiplier")} for one in latents]
    paths = module.objective.path, then.objective.path
    pairs: list[tuple[str, Any, Any]] = [
        (what, getattr(module.net, key, None), getattr(then.net, key, None))
        for what, key in (("samples of shape", "input_shape"), ("classes", "num_classes"))
    ]
    pairs += [("data made by", config.data.get("_target_"), other.data.get("_target_"))]
    pairs += [("latents scaled by", scales[0], scales[1])]
    pairs += [] if same_path(*paths) else [("the path", *paths)]
    for what, one, two in pairs:
        if one != two:
            raise ValueError(
                f"Expected a run with the same noisy samples for --then, got {what} {one} in the "
                f"first run and {two} in the second."
            )


def bank_of(data: Any, options: Options, sampler: Sampler) -> LatentBank:
    """The bank of a data module; ValueError if a chosen class has no rows."""
    data.setup()
    bank = data.latent_bank() if hasattr(data, "latent_bank") else LatentBank(*data.train.tensors)
    chosen = set(sampler.labels(range(options.count)).tolist())
    absent = sorted(chosen - set(bank.classes)) if bank.classes and sampler.classes else []
    if absent:
        raise ValueError(
            f"Expected --labels of classes with training rows for --oracle-until, got {absent}."
        )
    return bank


def finisher(
    data: Any, options: Options, shape: tuple[int, ...], device: torch.device, pictures: bool
) -> Callable[[Tensor], Tensor]:
    """From samples, (B, C, H, W), to what is stored: uint8 (B, H, W, 3), or the samples.

    Raises:
        ValueError, OSError, ImportError: If the autoencoder does not exist or fit these latents.
    """
    if not pictures:
        return lambda x: x
    if options.vae is None:
        return lambda x: _channels_last(x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8))
    from stagewise.recipes.autoencoder import decode, find_vae, load_vae

    channels = find_vae(options.vae).channels
    if channels != shape[0]:
        raise ValueError(
            f"Expected a --vae with {shape[0]} channels, those of this run's latents, got "
            f"{channels} in {options.vae}."
        )
    vae = load_vae(options.vae, device)
    # EDM2 encodes pixels from 0 to 1, all others from -1 to 1.
    low = 0.0 if getattr(getattr(data, "latents", None), "name", None) == "EDM2" else -1.0
    return lambda x: _channels_last(decode(vae, data.to_stored(x), options.batch_size, low))


def _channels_last(pictures: Tensor) -> Tensor:
    return pictures.permute(0, 2, 3, 1).contiguous()
