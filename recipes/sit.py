"""The Scalable Interpolant Transformer and LightningDiT, made of timm's layers.

SiT is the DiT architecture trained on velocities. An image becomes a sequence of patches; every
block is modulated by one vector `c`, the sum of a time and a class embedding, through adaLN-Zero:

    x <- x + gate(c) * f( LayerNorm(x) * (1 + scale(c)) + shift(c) ),   f = attention, then MLP

The layers that make shift, scale and gate start at zero, and so does the output layer: at
initialisation every block is the identity and the output is zero.

The null class, one row after the real ones, means "no label". In training it replaces a label with
probability `class_dropout`, for classifier-free guidance.

By default the model is a SiT with a time embedding that separates times well. Options make it the
function of the public weights (`stagewise.recipes.public_weights` loads them):

    SiT            learn_sigma, time_embedding="unit", position_embedding="dit"
    LightningDiT   the last two, and rms_norm, swiglu, rotary

LightningDiT's modulation without shift, which its published models do not use, is left out.

References:
    Ma et al., SiT, https://arxiv.org/abs/2401.08740
    Peebles and Xie, DiT, https://arxiv.org/abs/2212.09748
    Yao et al., LightningDiT, https://arxiv.org/abs/2501.01423
"""

from __future__ import annotations

__all__ = ["SiT"]

import math
from typing import Any, Literal

import torch
from timm.layers import (
    AttentionRope,
    GELUTanh,
    Mlp,
    PatchEmbed,
    RmsNorm,
    SwiGLUPacked,
    build_rotary_pos_embed,
    build_sincos2d_pos_embed,
)
from torch import Tensor, nn
from torch.nn.functional import silu


class SiT(nn.Module):
    """Predicts a field of the shape of `x_t` from `(x_t, t, label)`.

    Args:
        num_classes: Number of classes; 0 for an unconditional model. `num_classes` itself is the
            label of the null class.
        input_size: Height and width of the input, in pixels.
        in_channels: Channels of input and output.
        patch_size: Side of a patch, in pixels; divides `input_size`.
        hidden_size: Width of the tokens; divisible by 4 and by `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Width of the MLP relative to `hidden_size`.
        class_dropout: Probability, in [0, 1], that a label is dropped in training mode, drawn
            from the global generator of the device.
        learn_sigma: Whether the output layer makes twice the channels, and the second half is
            dropped: in SiT, a remainder of DiT, which learned a variance. Default False.
        time_embedding: "thousand" (default) for frequencies from 1000 to 0.1 radians per unit of
            t; "unit" for those of SiT and LightningDiT, 1 to about 1e-4, where t = 0.50 hardly
            differs from t = 0.51.
        position_embedding: Order of the channels of the fixed embedding of the position. "timm"
            (default): sines of row and column, then cosines. "dit": sine and cosine of the
            column, then of the row, as in the public codes.
        rms_norm: RMSNorm with a learned scale, not LayerNorm without one. Default False.
        swiglu: A SwiGLU with two thirds of the width, and so as many weights, as MLP. Default
            False.
        rotary: Rotates queries and keys by the row (first half of a head) and the column (second
            half), besides the fixed embedding. Default False.
        qk_norm: Normalises queries and keys, for training that diverges. Default False, as in the
            published LightningDiT.

    Raises:
        ValueError: If sizes do not divide, or an argument is out of range.
    """

    pos_embed: Tensor
    rope: Tensor | None

    def __init__(
        self,
        num_classes: int,
        input_size: int = 16,
        in_channels: int = 3,
        patch_size: int = 4,
        hidden_size: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        class_dropout: float = 0.1,
        learn_sigma: bool = False,
        time_embedding: Literal["thousand", "unit"] = "thousand",
        position_embedding: Literal["timm", "dit"] = "timm",
        rms_norm: bool = False,
        swiglu: bool = False,
        rotary: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"Expected `input_size` divisible by `patch_size`, got {input_size} and "
                f"{patch_size}."
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"Expected `hidden_size` divisible by `num_heads` and by 4 (sine and cosine of "
                f"two coordinates), got hidden_size={hidden_size}, num_heads={num_heads}."
            )
        if num_classes < 0 or not 0 <= class_dropout <= 1:
            raise ValueError(
                f"Expected `num_classes` of at least 0 and `class_dropout` in [0, 1], got "
                f"{num_classes} and {class_dropout}."
            )
        if time_embedding not in ("thousand", "unit"):
            raise ValueError(
                f"Expected `time_embedding` 'thousand' or 'unit', got {time_embedding!r}."
            )
        if position_embedding not in ("timm", "dit"):
            raise ValueError(
                f"Expected `position_embedding` 'timm' or 'dit', got {position_embedding!r}."
            )
        if rotary and hidden_size // num_heads % 4:
            raise ValueError(
                f"Expected `hidden_size / num_heads` divisible by 4 with `rotary` (pairs for two "
                f"coordinates), got hidden_size={hidden_size}, num_heads={num_heads}."
            )
        self.num_classes = num_classes
        self.input_shape = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.class_dropout = class_dropout
        self.learn_sigma = learn_sigma
        self.time_embedding = time_embedding
        self.swiglu = swiglu

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = _TimestepEmbedder(hidden_size, time_embedding)
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size)
        grid = list(self.x_embedder.grid_size)
        pos_embed = _positions(grid, hidden_size, position_embedding)
        self.register_buffer("pos_embed", pos_embed, persistent=False)  # (tokens, hidden_size)
        rope = None
        if rotary:
            angles = build_rotary_pos_embed(grid, dim=hidden_size // num_heads, in_pixels=False)
            rope = torch.cat(angles, -1)  # sines, then cosines
        self.register_buffer("rope", rope, persistent=False)  # (tokens, 2 * head width)
        self.blocks = nn.ModuleList(
            _Block(hidden_size, num_heads, mlp_ratio, rms_norm, swiglu, qk_norm)
            for _ in range(depth)
        )
        channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * channels, rms_norm)
        self._init_weights()

    def forward(self, xt: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The output for a batch, (B, C, H, W).

        Args:
            xt: Noisy samples, `(B, C, H, W)`.
            t: Times in [0, 1], `(B,)`; 0 is noise, 1 is data.
            labels: Classes, `(B,)` integers in [0, num_classes], where the last is the null class;
                default None, the null class for all.

        Raises:
            ValueError: If a shape is wrong.
            IndexError: If a label is out of range, on the CPU.
        """
        if xt.shape[1:] != self.input_shape:
            raise ValueError(
                f"Expected `xt` with shape (B, {', '.join(map(str, self.input_shape))}), "
                f"got {tuple(xt.shape)}."
            )
        if labels is None:
            labels = torch.full(xt.shape[:1], self.num_classes, device=xt.device)
        for name, value in {"t": t, "labels": labels}.items():
            if value.shape != xt.shape[:1]:
                raise ValueError(
                    f"Expected `{name}` with shape ({xt.shape[0]},), got {tuple(value.shape)}."
                )
        c = self.t_embedder(t) + self._embed(labels)
        x = self.x_embedder(xt) + self.pos_embed
        for block in self.blocks:
            x = block(x, c, self.rope)
        x = self.final_layer(x, c)
        if self.learn_sigma:
            x = x.chunk(2, -1)[0]
        return self.unpatchify(x)

    def unpatchify(self, x: Tensor) -> Tensor:
        """From patches, `(B, tokens, C * patch_size**2)`, to `(B, C, H, W)`."""
        channels, height, width = self.input_shape
        p = self.patch_size
        x = x.reshape(-1, height // p, width // p, channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)

    def _embed(self, labels: Tensor) -> Tensor:
        if self.training and self.class_dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.class_dropout
            labels = labels.masked_fill(drop, self.num_classes)
        try:
            return self.y_embedder(labels)
        except IndexError as error:
            raise IndexError(f"Expected `labels` in [0, {self.num_classes}].") from error

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # The convolution is a linear layer over flattened patches, and starts like one.
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp.fc1.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp.fc2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, _Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.final_layer.linear.weight)


class _Modulation(nn.Module):
    """Makes `count` shifts, scales or gates `(B, 1, dim)` from `c`, `(B, dim)`."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, count * dim)
        self.count = count

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(silu(c))[:, None].chunk(self.count, -1)


class _Block(nn.Module):
    """Attention and MLP under adaLN-Zero: `(B, tokens, dim), (B, dim) -> (B, tokens, dim)`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        rms_norm: bool,
        swiglu: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.modulation = _Modulation(dim, 6)
        self.norm1 = _norm(dim, rms_norm)
        norm: Any = RmsNorm if rms_norm else nn.LayerNorm
        self.attn = AttentionRope(
            dim, num_heads, num_prefix_tokens=0, norm_layer=norm, qk_norm=qk_norm
        )
        self.norm2 = _norm(dim, rms_norm)
        width = int(dim * mlp_ratio)
        # The packed SwiGLU draws its two first layers as one matrix, as LightningDiT.
        self.mlp = (
            SwiGLUPacked(dim, 2 * int(2 / 3 * width))
            if swiglu
            else Mlp(dim, width, act_layer=GELUTanh)
        )

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, rope=rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _FinalLayer(nn.Module):
    """Modulated norm, then a linear map: `(B, tokens, dim), (B, dim) -> (B, tokens, out)`."""

    def __init__(self, dim: int, out: int, rms_norm: bool) -> None:
        super().__init__()
        self.modulation = _Modulation(dim, 2)
        self.norm = _norm(dim, rms_norm)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(self.norm(x) * (1 + scale) + shift)


def _norm(dim: int, rms_norm: bool) -> nn.Module:
    if rms_norm:
        return RmsNorm(dim, eps=1e-6)
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def _positions(grid: list[int], dim: int, order: str) -> Tensor:
    """Sines and cosines of row and column of every token, `(tokens, dim)`."""
    if order == "timm":
        return build_sincos2d_pos_embed(grid, dim)
    rows_first = build_sincos2d_pos_embed(grid, dim, interleave_sin_cos=True)
    return rows_first.roll(dim // 2, -1)


class _TimestepEmbedder(nn.Module):
    """Sines and cosines of t, then an MLP: `(B,) -> (B, dim)`."""

    def __init__(self, dim: int, embedding: str, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies, self.embedding = frequencies, embedding
        self.mlp = Mlp(2 * frequencies, dim, dim, act_layer=nn.SiLU)

    def forward(self, t: Tensor) -> Tensor:
        features = _sinusoids(t, self.frequencies, self.embedding)
        return self.mlp(features.to(self.mlp.fc1.weight.dtype))


def _sinusoids(t: Tensor, frequencies: int, embedding: str = "thousand") -> Tensor:
    """Cosines, then sines, `(B, 2 * frequencies)` float32, of t in [0, 1], `(B,)`.

    The frequencies fall geometrically: from 1000 to 0.1 radians per unit of t, as over the
    thousand steps of DiT, or from 1 towards 1e-4, which is DiT's embedding of t itself.
    """
    # Computed at each call: a buffer would follow the module to 16 bits, where 1000 radians are
    # wrong by whole periods.
    if embedding == "thousand":
        top, exponent = 1000, torch.linspace(0, 1, frequencies, device=t.device)
    else:
        top, exponent = 1, torch.arange(frequencies, device=t.device) / frequencies
    angle = t.float()[:, None] * top * torch.exp(-math.log(1e4) * exponent)
    return torch.cat([angle.cos(), angle.sin()], -1)
