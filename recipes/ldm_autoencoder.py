"""Autoencoders in the layout of latent diffusion's code, such as VA-VAE's, as an `AutoencoderKL`.

A checkpoint of torch holds `encoder.down.0.block.0.conv1.weight` and so on, at the top or under
`state_dict`, beside what training had and decoding has not. Widths, levels, blocks and where
attention stands are read off the shapes; groups of norms are 32, as that code has them.

References:
    Rombach et al., arXiv 2112.10752, code https://github.com/CompVis/latent-diffusion
    Yao et al., VA-VAE, arXiv 2501.01423, code https://github.com/hustvl/LightningDiT
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagewise.files import first_line

__all__ = ["read_ldm"]

_NAMES = [  # (pattern there, replacement in diffusers), applied one after the other
    (r"\.block\.", ".resnets."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attn\.", ".attentions."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
]


def read_ldm(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a checkpoint.

    Args:
        path: A file of `torch.save`.

    Returns:
        The arguments of an `AutoencoderKL`, and its weights.

    Raises:
        ValueError: If the file cannot be read, or is no such autoencoder.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its unpickler or its zip reader does
        raise ValueError(
            f"Expected a checkpoint that torch.load reads with weights_only=True, {path} cannot be "
            f"read so ({first_line(error)}). Download it again, or save its weights alone: "
            "torch.save(checkpoint['state_dict'], file)."
        ) from error
    held = held.get("state_dict", held) if isinstance(held, Mapping) else {}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    found = {name: value for name, value in held.items() if str(name).startswith(parts)}
    try:
        options = _options({name: value.shape for name, value in found.items()})
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected the weights of an autoencoder of latent diffusion in {path} (VA-VAE's "
            f"checkpoint is one), and {error} is not there. Give such a file, or the folder of an "
            "AutoencoderKL."
        ) from error
    last = len(options["block_out_channels"]) - 1
    weights = {}
    for name, value in found.items():
        name = re.sub(r"\.down\.", ".down_blocks.", name)
        # Decoders count levels from the finest one there, from the coarsest one here.
        name = re.sub(r"\.up\.(\d+)", lambda match: f".up_blocks.{last - int(match[1])}", name)
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        # What is a convolution with kernels of one pixel there is a linear layer here.
        linear = re.search(r"attentions\.\d+\.to_.*weight$", name)
        weights[name] = value.flatten(1) if linear else value
    return options, weights


def _options(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def first(pattern: str) -> list[int]:
        found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
        return sorted(found)

    levels = first(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    attends = first(r"encoder\.down\.(\d+)\.attn\.")
    kinds = [("Attn" if level in attends else "") + "{}EncoderBlock2D" for level in levels]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(
            kind.format("Up").replace("Encoder", "Decoder") for kind in reversed(kinds)
        ),
        "block_out_channels": tuple(
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels
        ),
        "layers_per_block": len(first(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")),
        "latent_channels": shapes["post_quant_conv.weight"][1],
    }
