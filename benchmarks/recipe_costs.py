"""What the ImageNet recipes cost, counted: operations, memory and bytes.

    python benchmarks/recipe_costs.py

Nothing here is measured, and no time is given. Networks are built from their configurations on the
meta device, where they have shapes and no numbers, and one forward pass is counted by torch
(`FlopCounterMode`: matrix products and convolutions, 2 operations for a multiply-add). A training
step is three forward passes per image. The oracle is counted at its worst: the products for the
logits and for the mean for every query, both split in two 16-bit parts, each reading the rows anew.

The last table multiplies what is counted by throughputs that others have published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stagewise.recipes.conf

ROWS, CLASSES = 1_281_167, 1000
GPUS = 8
RATE = 1e14  # operations a second that a GPU is assumed to sustain in training
BF16 = 2

# Bytes per weight, all in float32. With strategy=ddp gradients are views of DDP's buckets.
WEIGHT, GRADIENT, ADAMW, EMA = 4, 4, 8, 4


@dataclass(frozen=True)
class Recipe:
    """One experiment, by its composed configuration."""

    name: str
    config: DictConfig

    @cached_property
    def net(self) -> nn.Module:
        with torch.device("meta"):
            net: nn.Module = instantiate(self.config.net)
        return net

    @cached_property
    def weights(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @cached_property
    def forward(self) -> int:
        """Multiply-adds of one forward pass for one image."""
        shape = (1, *self.shape)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.net(torch.empty(shape), torch.empty(1), torch.zeros(1, dtype=torch.int64))
        return int(counter.get_total_flops()) // 2

    @property
    def training(self) -> int:
        """Operations of a training step, for each image."""
        return 3 * 2 * self.forward

    @property
    def batch(self) -> int:
        """Images in a step of one GPU."""
        return int(self.config.data.batch_size)

    @property
    def images(self) -> int:
        """Images in the whole training, on 8 GPUs."""
        return GPUS * self.batch * int(self.config.trainer.max_steps)

    @property
    def dim(self) -> int:
        channels, height, width = self.shape
        return channels * height * width

    @property
    def rows(self) -> int:
        """Rows of the bank: with their flips, if training sees these."""
        return ROWS * (1 if self.config.data.latents.flips == "none" else 2)

    @property
    def bank(self) -> int:
        """Bytes of the bank; class-wise it is the same rows in another order."""
        return BF16 * self.rows * self.dim

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.net.input_shape)  # type: ignore[arg-type]

    def state(self, strategy: str) -> int:
        """Bytes of weights, gradients and optimizer on one GPU, without activations.

        Args:
            strategy: "ddp" (or one GPU) or "fsdp" (over 8).
        """
        each = WEIGHT + GRADIENT + ADAMW
        if strategy == "fsdp":  # which Lightning cannot average
            return each * self.weights // GPUS
        return (each + EMA) * self.weights

    def oracle(self, rows: float) -> float:
        """Operations of the oracle for one query that looks at `rows`."""
        return 2 * 2 * 2 * rows * self.dim  # (logits, mean) x (high, low) x (multiply, add)

    def read(self, rows: float) -> float:
        """Bytes of the bank that such a query, alone, reads."""
        return 2 * BF16 * rows * self.dim


@dataclass(frozen=True)
class Published:
    """A throughput that others state.

    Attributes:
        recipe: The recipe whose network it is about, or has the operations of.
        rate: Images per second of one GPU.
        what: Model and hardware, as stated.
        source: Where.
    """

    recipe: str
    rate: float
    what: str
    source: str


PUBLISHED = (
    Published(
        "imagenet256_sdvae_sit_xl",
        0.84 * 128,
        "DiT-XL/2 from stored latents, mixed precision, gradient checkpointing: 0.84 steps of 128 "
        "per second on one A100",
        "https://github.com/chuanyangjin/fast-DiT",
    ),
    Published(
        "imagenet256_vavae_lightningdit_xl",
        80_000 * 1024 / (10 * 3600) / 8,
        "LightningDiT-XL/1, 64 epochs (80 000 steps of 1024) on 8 GPUs in about 10 hours",
        "https://github.com/hustvl/LightningDiT",
    ),
)


def recipes() -> dict[str, Recipe]:
    """All ImageNet experiments, by name."""
    folder = Path(next(iter(stagewise.recipes.conf.__path__)), "experiment")
    names = sorted(file.stem for file in folder.glob("imagenet*.yaml"))
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        found = [Recipe(name, compose("train", [f"experiment={name}"])) for name in names]
    return {recipe.name: recipe for recipe in sorted(found, key=_order)}


def training_table(found: Iterable[Recipe]) -> str:
    """Weights and operations."""
    head = (
        "recipe",
        "weights",
        "forward, multiply-adds",
        "training, operations per image",
        "images",
        "operations of the run",
        "1 GPU",
        f"{GPUS} GPUs",
    )
    return _table(
        head,
        [
            (
                f"`{each.name}`",
                f"{each.weights / 1e6:.1f} M",
                f"{each.forward / 1e9:.2f} G",
                f"{each.training / 1e12:.3f} T",
                f"{each.images / 1e6:.1f} M",
                f"{each.training * each.images / 1e18:.1f} E",
                *(_days(each.training * each.images / n / RATE) for n in (1, GPUS)),
            )
            for each in found
        ],
    )


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 86400 else f"{seconds / 3600:.1f} h"


def memory_table(found: Iterable[Recipe]) -> str:
    """What each GPU holds before activations."""
    head = (
        "recipe",
        "weights",
        "gradients",
        "AdamW",
        "EMA",
        "one GPU, or each of DDP",
        "each of 8, FSDP, no EMA",
    )
    lines = []
    for each in found:
        parts = [each.weights * size for size in (WEIGHT, GRADIENT, ADAMW, EMA)]
        sums = [each.state(strategy) for strategy in ("ddp", "fsdp")]
        lines.append((f"`{each.name}`", *map(_gb, [*parts, *sums])))
    return _table(head, lines)


def bank_table(found: Iterable[Recipe]) -> str:
    """Where the bank may lie; recipes with the same latents have the same one."""
    head = (
        "latents",
        "rows",
        "D",
        "on each GPU, or in host memory per process",
        "host memory of 8 processes",
        "the same, one mapped file (`data.bank_dir`)",
        "on each of 8 GPUs, sharded",
    )
    banks = {each.dim: each for each in found}
    lines = [
        (
            " x ".join(map(str, each.shape)) + (", flips" if each.rows > ROWS else ""),
            f"{each.rows:,}".replace(",", " "),
            str(each.dim),
            _gb(each.bank),
            _gb(GPUS * each.bank),
            _gb(each.bank),
            _gb(each.bank / GPUS),
        )
        for _, each in sorted(banks.items())
    ]
    return _table(head, lines)


def oracle_table(found: Iterable[Recipe]) -> str:
    """Operations and bytes of the oracle for each image, against those of training."""
    head = (
        "recipe",
        "class-wise, operations per image",
        "share of training",
        "read per query",
        "all rows, operations per image",
        "share of training",
        "read per query, in a batch",
    )
    lines = []
    for each in found:
        few, many = each.rows / CLASSES, each.rows
        lines.append(
            (
                f"`{each.name}`",
                f"{each.oracle(few) / 1e9:.3f} G",
                _percent(each.oracle(few) / each.training),
                f"{each.read(few) / 1e6:.0f} MB",
                f"{each.oracle(many) / 1e9:.0f} G",
                _percent(each.oracle(many) / each.training),
                # All queries of a step meet all rows together.
                f"{each.read(many) / each.batch / 1e6:.0f} MB, {each.batch} queries",
            )
        )
    return _table(head, lines)


def published_table(found: dict[str, Recipe]) -> str:
    """What class-wise targets for every image would read and compute at published throughputs."""
    head = ("published", "images/s per GPU", "training", "oracle, class-wise", "bank rows read")
    lines = []
    for entry in PUBLISHED:
        each = found[entry.recipe]
        few = each.rows / CLASSES
        lines.append(
            (
                f"{entry.what} ({entry.source})",
                f"{entry.rate:.0f}",
                f"{entry.rate * each.training / 1e12:.0f} T/s",
                f"{entry.rate * each.oracle(few) / 1e12:.3f} T/s",
                f"{entry.rate * each.read(few) / 1e9:.1f} GB/s",
            )
        )
    return _table(head, lines)


def tables(found: dict[str, Recipe]) -> dict[str, str]:
    """All tables as Markdown, by title."""
    return {
        "Training": training_table(found.values()),
        "Memory of a GPU, without activations": memory_table(found.values()),
        "The bank, in bfloat16": bank_table(found.values()),
        "The oracle": oracle_table(found.values()),
        "At published throughputs": published_table(found),
    }


def _order(recipe: Recipe) -> tuple[int, int]:
    return recipe.dim, recipe.weights


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0.1 else f"{100 * share:.2g}%"


if __name__ == "__main__":
    for title, text in tables(recipes()).items():
        print(f"### {title}\n\n{text}\n")
