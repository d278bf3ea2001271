"""Autoencoders in the layout of latent diffusion's code, such as VA-VAE's, as an `AutoencoderKL`.

A checkpoint of torch holds `encoder.down.0.block.0.conv1.weight` and so on, at the top or under
`state_dict`, next to weights that only training needs. Widths, levels, blocks and the places of
attention follow from the shapes. Norms have 32 groups, as in that code.

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

from stagewise.recipes.weight_files import read_weights

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
    """The arguments of an `AutoencoderKL`, and its weights, from a file of `torch.save`.

    Raises:
        ValueError: If the file cannot be read, or is no such autoencoder.
    """
    held = read_weights(path)
    held = held.get("state_dict", held) if isinstance(held, Mapping) else {}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    found = {name: value for name, value in held.items() if str(name).startswith(parts)}
    try:
        options = _options({name: value.shape for name, value in found.items()})
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected an autoencoder of latent diffusion in {path}, such as VA-VAE's checkpoint, "
            f"but {error} is not there. Give such a file, or the folder of an AutoencoderKL."
        ) from error
    last = len(options["block_out_channels"]) - 1
    weights = {}
    for name, value in found.items():
        name = re.sub(r"\.down\.", ".down_blocks.", name)
        # That code counts levels of decoders from the finest, diffusers from the coarsest.
        name = re.sub(r"\.up\.(\d+)", lambda match: f".up_blocks.{last - int(match[1])}", name)
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        # A convolution with kernels of one pixel is a linear layer in diffusers.
        linear = re.search(r"attentions\.\d+\.to_.*weight$", name)
        weights[name] = value.flatten(1) if linear else value
    return options, weights


def _options(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    def first(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})

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
