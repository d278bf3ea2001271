"""The public weights of SiT and LightningDiT, loaded into our `SiT`.

Both publish checkpoints in one layout. Three things differ from ours:

    names       e.g. `blocks.0.adaLN_modulation.1.weight`, here `blocks.0.modulation.linear.weight`
    output      rows of the last layer ordered `(p, p, C)`, here `(C, p, p)`, p the patch size and
                C the channels, doubled under `learn_sigma`
    embeddings  fixed ones, of position and rotation, are in the file; here they are computed, and
                must be the same

Both predict dx/dt with noise at t = 0 and data at t = 1, as this library does. The tests compare
with the formulas of the public code (https://github.com/willisma/SiT,
https://github.com/hustvl/LightningDiT), not with the published files.
"""

from __future__ import annotations

__all__ = ["load_public_weights"]

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stagewise.recipes.sit import SiT
from stagewise.recipes.weight_files import read_weights, require_entries

_PUBLIC_NAMES = [  # (pattern in ours, replacement)
    (r"^t_embedder\.mlp\.fc1\.", "t_embedder.mlp.0."),
    (r"^t_embedder\.mlp\.fc2\.", "t_embedder.mlp.2."),
    (r"^y_embedder\.", "y_embedder.embedding_table."),
    (r"\.modulation\.linear\.", ".adaLN_modulation.1."),
    (r"^final_layer\.norm\.", "final_layer.norm_final."),
]
_PUBLIC_SWIGLU = [
    (r"(^blocks\.\d+\.mlp)\.fc1\.", r"\1.w12."),
    (r"(^blocks\.\d+\.mlp)\.fc2\.", r"\1.w3."),
]


def load_public_weights(net: SiT, path: str | Path) -> SiT:
    """Loads a checkpoint in the public layout, all of it or nothing, in place; returns `net`.

    Args:
        net: The network, built with the sizes and switches of the checkpoint: those of
            `net/sit_xl_2.yaml` for `SiT-XL-2-256.pt`, of `net/lightningdit_xl_1.yaml` for
            `lightningdit-xl-imagenet256-800ep.pt`. It keeps its type and device.
        path: A file of `torch.save`: the weights, or a dictionary that holds them under "ema",
            which is preferred, or "model".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one of another model, with the entries that differ,
            or if `net` embeds time in another way than the public models.
    """
    if net.time_embedding != "unit":
        raise ValueError(
            f"Expected `net` with time_embedding='unit', got {net.time_embedding!r}. The public "
            "weights were trained with 'unit', and a checkpoint does not show it."
        )
    found = _read(Path(path))
    ours = net.state_dict()
    public = {_public_name(name, net.swiglu): name for name in ours}
    fixed = _fixed(net)
    expected = {name: ours[own] for name, own in public.items()} | fixed
    require_entries(Path(path), found, expected)
    for name, value in fixed.items():
        error = (found[name].to(value) - value).abs().max().item()
        if not error < 1e-5:
            raise ValueError(
                f"Expected `{name}` of the checkpoint to be the embedding of `net`, got one that "
                f"differs by up to {error:.2g}. Build the network with position_embedding='dit'. "
                "If it already is, the checkpoint is of another model."
            )
    state = {own: found[name] for name, own in public.items()}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (net.patch_size**2, -1))
        state[name] = rows.transpose(0, 1).flatten(0, 1)
    net.load_state_dict(state)
    return net


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, and there is no file {path}.")
    found = read_weights(path)
    for key in ("ema", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    named = isinstance(found, Mapping) and all(isinstance(x, Tensor) for x in found.values())
    if not named or not found:
        raise ValueError(
            f"Expected a dictionary of tensors in {path}, or one under 'ema' or 'model', got "
            f"{sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__}."
        )
    return dict(found)


def _public_name(name: str, swiglu: bool) -> str:
    for pattern, replacement in _PUBLIC_NAMES + (_PUBLIC_SWIGLU if swiglu else []):
        name = re.sub(pattern, replacement, name)
    return name


def _fixed(net: SiT) -> dict[str, Tensor]:
    """What is computed here and stored in public checkpoints."""
    fixed = {"pos_embed": net.pos_embed[None]}
    if net.rope is not None:
        sines, cosines = net.rope.chunk(2, -1)
        fixed |= {"feat_rope.freqs_sin": sines, "feat_rope.freqs_cos": cosines}
    return fixed
