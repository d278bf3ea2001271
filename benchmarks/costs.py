"""What the oracle and the ImageNet recipes cost, counted: operations, memory and bytes.

    python benchmarks/costs.py

Nothing here is measured. Rates are those of data sheets, and every time is a lower bound (counted
amount over peak rate). Networks are built from their configurations on the meta device, where they
have shapes and no numbers, and one forward pass is counted by torch (`FlopCounterMode`: matrix
products and convolutions, 2 operations for a multiply-add). A training step is three forward passes
per image. The oracle is counted at its worst: the products for the logits and for the mean for
every query, both split in two 16-bit parts, each of which reads the rows.
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
from tables import table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stagewise.recipes.conf

ROWS, CLASSES, GPUS = 1_281_167, 1000, 8
RATE = 1e14  # operations a second that a GPU is assumed to sustain in training

# Bytes per weight, all in float32. With strategy=ddp gradients are views of DDP's buckets.
BYTES = {"weights": 4, "gradients": 4, "AdamW": 8, "EMA": 4}

# One accelerator of the A100-80GB class, by its data sheet.
FLOPS, BANDWIDTH, MEMORY = 312e12, 2.0e12, 80e9  # bfloat16 products, bytes/s, bytes
LINKS = {1: 0.0, 8: 1 / 300e9, 64: 1 / 25e9}  # s/byte in one direction: none, in a node, between
BATCH, D = 32, 4096  # queries of each accelerator; SD-VAE latents, 4 x 32 x 32
# SiT-XL/2 at 256 x 256: 118.6 G multiply-adds forward (Peebles & Xie, arXiv 2212.09748, Table 4;
# the papers write Gflops), two operations each, and twice as much again for the backward pass.
TRAINING = 3 * 2 * 118.6e9 * BATCH
BANKS = [("ImageNet, class-wise", ROWS, 1_281), ("ImageNet, all rows", ROWS, ROWS)]
BANKS += [("100 M rows", 100_000_000, 100_000_000)]  # name, rows, rows a query looks at


def operations(rows: float, dim: int) -> float:
    """Of the oracle for one query that looks at `rows`."""
    return 2 * 2 * 2 * rows * dim  # (logits, mean) x (high, low) x (multiply, add)


def bytes_read(rows: float, dim: int) -> float:
    """Of a bfloat16 bank by such a query, alone: for logits, and for the mean."""
    return 2 * 2 * rows * dim


def accelerators() -> str:
    """The exact oracle on one accelerator, on a node, on several: the table of docs/engines.md."""
    lines = []
    for name, rows, looked_at in BANKS:
        for ranks, link in LINKS.items():
            if looked_at < rows:
                # Class-wise every rank holds all rows and reads one class for each query, at worst.
                held, sent = 2.0 * rows * D, 0.0
                read = bytes_read(min(BATCH * looked_at, rows), D)
            else:
                # All queries meet all rows: R times the queries with 1/R of the rows.
                held, sent = 2 * rows / ranks * D, 2 * (ranks - 1) * BATCH * D * 8.0
                read = bytes_read(rows / ranks, D)
            done = BATCH * operations(looked_at, D)
            seconds = {"arithmetic": done / FLOPS, "memory bandwidth": read / BANDWIDTH}
            seconds["network"] = sent * link
            first = max(seconds, key=seconds.__getitem__)
            if held >= 0.9 * MEMORY:
                first = f"memory: {held / MEMORY:.1f} x its size"
            about = [name, f"{ranks}", f"{held / 1e9:.1f} GB", f"{done / 1e12:.3g} T"]
            about += [f"{done / TRAINING:.2%}", f"{read / 1e9:.2g} GB", f"{sent / 1e6:.0f} MB"]
            lines.append((*about, f"{max(seconds.values()) * 1e3:.2g} ms", first))
    head = ["bank", "accelerators", "bank in each", "operations", "share of training", "read"]
    return table([*head, "sent", "at least", "first to saturate"], lines)


# -- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One experiment, by its composed configuration; a bank has the rows that training sees."""

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

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.net.input_shape)  # type: ignore[arg-type]

    @property
    def dim(self) -> int:
        return self.shape.numel()

    @cached_property
    def forward(self) -> int:
        """Multiply-adds of one forward pass for one image."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.net(torch.empty(1, *self.shape), torch.empty(1), torch.zeros(1).long())
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
    def rows(self) -> int:
        return ROWS * (1 if self.config.data.latents.flips == "none" else 2)

    @property
    def bank(self) -> int:
        """Bytes of the bank in bfloat16."""
        return 2 * self.rows * self.dim

    def state(self, strategy: str) -> int:
        """Bytes of weights, gradients and optimizer on one GPU ("ddp", or "fsdp" over 8)."""
        every = sum(BYTES.values()) * self.weights
        # Lightning cannot average sharded weights.
        return every if strategy == "ddp" else (every - BYTES["EMA"] * self.weights) // GPUS

    def oracle(self, rows: float) -> float:
        return operations(rows, self.dim)

    def read(self, rows: float) -> float:
        return bytes_read(rows, self.dim)


def recipes() -> dict[str, Recipe]:
    """All ImageNet experiments, by name."""
    folder = Path(next(iter(stagewise.recipes.conf.__path__)), "experiment")
    names = sorted(file.stem for file in folder.glob("imagenet*.yaml"))
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        found = [Recipe(name, compose("train", [f"experiment={name}"])) for name in names]
    return {each.name: each for each in sorted(found, key=lambda each: (each.dim, each.weights))}


PUBLISHED = (  # recipe, images per second of one GPU, model and hardware as stated, where
    (
        "imagenet256_sdvae_sit_xl",
        0.84 * 128,
        "DiT-XL/2 from stored latents, mixed precision, gradient checkpointing: 0.84 steps of 128 "
        "per second on one A100",
        "https://github.com/chuanyangjin/fast-DiT",
    ),
    (
        "imagenet256_vavae_lightningdit_xl",
        80_000 * 1024 / (10 * 3600) / 8,
        "LightningDiT-XL/1, 64 epochs (80 000 steps of 1024) on 8 GPUs in about 10 hours",
        "https://github.com/hustvl/LightningDiT",
    ),
)


def training_table(found: Iterable[Recipe]) -> str:
    """Weights and operations."""
    head = ["recipe", "weights", "forward, multiply-adds", "training, operations per image"]
    lines = []
    for each in found:
        whole = each.training * each.images
        counts = (f"{each.forward / 1e9:.2f} G", f"{each.training / 1e12:.3f} T")
        about = (f"`{each.name}`", f"{each.weights / 1e6:.1f} M", *counts)
        days = (_days(whole / n / RATE) for n in (1, GPUS))
        lines.append((*about, f"{each.images / 1e6:.1f} M", f"{whole / 1e18:.1f} E", *days))
    return table([*head, "images", "operations of the run", "1 GPU", f"{GPUS} GPUs"], lines)


def memory_table(found: Iterable[Recipe]) -> str:
    """What each GPU holds before activations."""
    lines = []
    for each in found:
        sizes = [each.weights * size for size in BYTES.values()]
        sizes += [each.state("ddp"), each.state("fsdp")]
        lines.append((f"`{each.name}`", *map(_gb, sizes)))
    return table(["recipe", *BYTES, "one GPU, or each of DDP", "each of 8, FSDP, no EMA"], lines)


def bank_table(found: Iterable[Recipe]) -> str:
    """Where the bank may lie; recipes with the same latents have the same one."""
    head = ["latents", "rows", "D", "on each GPU, or in host memory per process"]
    head += ["host memory of 8 processes", "the same, one mapped file (`data.bank_dir`)"]
    lines = []
    for _, each in sorted({each.dim: each for each in found}.items()):
        name = " x ".join(map(str, each.shape)) + (", flips" if each.rows > ROWS else "")
        sizes = (each.bank, GPUS * each.bank, each.bank, each.bank / GPUS)
        lines.append((name, f"{each.rows:,}".replace(",", " "), str(each.dim), *map(_gb, sizes)))
    return table([*head, "on each of 8 GPUs, sharded"], lines)


def oracle_table(found: Iterable[Recipe]) -> str:
    """Operations and bytes of the oracle for each image, against those of training."""
    head = ["recipe", "class-wise, operations per image", "share of training", "read per query"]
    head += ["all rows, operations per image", "share of training", "read per query, in a batch"]
    lines = []
    for each in found:
        few, many = each.rows / CLASSES, each.rows
        shares = [_percent(each.oracle(rows) / each.training) for rows in (few, many)]
        own = (f"{each.oracle(few) / 1e9:.3f} G", shares[0], f"{each.read(few) / 1e6:.0f} MB")
        # All queries of a step meet all rows together.
        together = f"{each.read(many) / each.batch / 1e6:.0f} MB, {each.batch} queries"
        whole = (f"{each.oracle(many) / 1e9:.0f} G", shares[1], together)
        lines.append((f"`{each.name}`", *own, *whole))
    return table(head, lines)


def published_table(found: dict[str, Recipe]) -> str:
    """What class-wise targets for every image would read and compute at published throughputs."""
    head = ["published", "images/s per GPU", "training", "oracle, class-wise", "bank rows read"]
    lines = []
    for name, rate, what, source in PUBLISHED:
        each, few = found[name], found[name].rows / CLASSES
        counts = (rate * each.training / 1e12, rate * each.oracle(few) / 1e12)
        cells = (f"{counts[0]:.0f} T/s", f"{counts[1]:.3f} T/s")
        read = f"{rate * each.read(few) / 1e9:.1f} GB/s"
        lines.append((f"{what} ({source})", f"{rate:.0f}", *cells, read))
    return table(head, lines)


def tables(found: dict[str, Recipe]) -> dict[str, str]:
    """All tables of the recipes as Markdown, by title."""
    return {
        "Training": training_table(found.values()),
        "Memory of a GPU, without activations": memory_table(found.values()),
        "The bank, in bfloat16": bank_table(found.values()),
        "The oracle": oracle_table(found.values()),
        "At published throughputs": published_table(found),
    }


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 86400 else f"{seconds / 3600:.1f} h"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share > 0.1 else f"{100 * share:.2g}%"


if __name__ == "__main__":
    for title, text in {"Accelerators": accelerators(), **tables(recipes())}.items():
        print(f"### {title}\n\n{text}\n")
