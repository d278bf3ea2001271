"""An autoencoder of diffusers: from pictures to moments of latents, and from latents to pictures.

`AutoencoderKL` gives a Gaussian posterior for each picture,

    q(z | picture) = N(mean, std^2),    std = exp(logvar / 2),  logvar within [-30, 20].

Everything here is in the raw scale of z, without the network's `scaling_factor`. A model trains on
`scaling(z)` (`stagewise.latents`), so `decode` takes `latents.scaling.invert(x_1)`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stagewise.recipes.ldm_autoencoder import read_ldm
from stagewise.recipes.weight_files import require_entries

__all__ = [
    "VAE",
    "Autoencoder",
    "decode",
    "encode",
    "find_vae",
    "fingerprint",
    "load_vae",
    "to_pixels",
]

VAE: TypeAlias = Any
"""`diffusers.AutoencoderKL`; diffusers is optional, so type checkers do not know it."""


@dataclass(frozen=True)
class Autoencoder:
    """What the configuration of an autoencoder says; its weights are not loaded."""

    name: str  # a folder, a checkpoint of latent diffusion's code, or a name on the hub
    subfolder: str  # "vae" in a whole pipeline
    channels: int  # C of its latents
    factor: int  # side of a picture / side of its latents


def find_vae(name: str | os.PathLike[str]) -> Autoencoder:
    """Reads the configuration of an `AutoencoderKL`.

    Args:
        name: A folder from `save_pretrained`, of the autoencoder or of a whole pipeline; a
            checkpoint in the layout of latent diffusion's code, such as VA-VAE's; or a name on the
            Hugging Face hub, `owner/name`.
    """
    model, name = _model(), os.fspath(name)
    if Path(name).is_file():
        options, _ = read_ldm(Path(name))
        levels = options["block_out_channels"]
        return Autoencoder(name, "", options["latent_channels"], 2 ** (len(levels) - 1))
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"Expected the folder of an autoencoder, got {name}: no such path.")
    problem: OSError | None = None
    for subfolder in ("", "vae"):
        try:
            config: dict[str, Any] = model.load_config(name, subfolder=subfolder or None)
        except OSError as error:
            problem, cause = problem or error, error.__context__
            # The hub did not answer, and a second question takes half a minute more.
            if type(cause).__name__ == "LocalEntryNotFoundError" and isinstance(cause, OSError):
                problem = cause
                break
            continue
        kind = config.get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(
                f"Expected an AutoencoderKL in {name}, got {kind}. Give the folder or the name of "
                "one, such as stabilityai/sd-vae-ft-mse."
            )
        levels, channels = config.get("block_out_channels", (64,)), config.get("latent_channels", 4)
        return Autoencoder(name, subfolder, int(channels), 2 ** (len(levels) - 1))
    raise ValueError(
        f"Expected an AutoencoderKL (config.json and weights, as save_pretrained writes them) in "
        f"{name} or in its subfolder vae: {problem}"
    ) from problem


def load_vae(
    name: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """Loads an `AutoencoderKL`, named as in `find_vae`: without gradients, in evaluation."""
    found = find_vae(name)
    if Path(found.name).is_file():
        options, weights = read_ldm(Path(found.name))
        vae = _model()(**options)
        require_entries(Path(found.name), weights, vae.state_dict())
        vae.load_state_dict(weights)
        # `to` of diffusers warns about every type.
        return torch.nn.Module.to(vae, device, dtype).eval().requires_grad_(False)
    try:
        vae, about = _model().from_pretrained(
            found.name,
            subfolder=found.subfolder or None,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,  # true needs accelerate
            output_loading_info=True,
        )
    except OSError as error:
        raise ValueError(f"The weights of {found.name} cannot be read: {error}") from error
    # diffusers fills missing weights with random numbers, and only warns.
    if about["missing_keys"]:
        missing = sorted(about["missing_keys"])
        raise ValueError(
            f"Expected all weights of an AutoencoderKL in {found.name}, got none for "
            f"{len(missing)}, the first {missing[0]}. Copy or download it again."
        )
    return vae.to(device).eval().requires_grad_(False)


def fingerprint(vae: VAE) -> str:
    """16 digits of the SHA-256 of these weights."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def to_pixels(pictures: Tensor, low: float = -1.0) -> Tensor:
    """From bytes 0 to 255 to numbers from `low` to 1, float32."""
    return pictures.float() / (255 / (1 - low)) + low


@torch.no_grad()
def encode(vae: VAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of the posterior of pictures, `(mean, std)`, each (B, C, h, w).

    `pixels`, (B, 3, H, W), are in [-1, 1]; for EDM2 in [0, 1].
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    wide = torch.promote_types(vae.dtype, torch.float32)
    return posterior.mean.to(wide), (0.5 * posterior.logvar.to(wide)).exp()


@torch.no_grad()
def decode(vae: VAE, z: Tensor, batch: int = 32, low: float = -1.0) -> Tensor:
    """Pictures of raw latents, (B, C, h, w), as (B, 3, H, W), uint8, on the CPU.

    The network is called with `batch` latents; `low` is the value of black, 0 for EDM2.
    """
    pictures = []
    for part in z.split(batch):
        pixels = vae.decode(part.to(vae.device, vae.dtype)).sample.float()
        bytes_ = ((pixels - low) * (255 / (1 - low))).round().clamp(0, 255)
        pictures.append(bytes_.to(torch.uint8).cpu())
    return torch.cat(pictures)


def _model() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected diffusers, which reads the autoencoder, but it is not installed: "
            "pip install 'stagewise[vae]'."
        ) from error
    return AutoencoderKL
