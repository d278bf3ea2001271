"""What the exact oracle costs a training step on accelerators, from counted bytes and operations.

Prints the table of docs/engines.md. Nothing here is measured: rates are those of data sheets, and
every time is a lower bound (counted amount over peak rate).
"""

from __future__ import annotations

from dataclasses import dataclass

# One accelerator of the A100-80GB class, by its data sheet.
FLOPS = 312e12  # bfloat16 products
BANDWIDTH = 2.0e12  # bytes/s from its own memory
MEMORY = 80e9
LINKS = {1: None, 8: 300e9, 64: 25e9}  # bytes/s in one direction: within a node, between nodes

BATCH = 32  # queries of each accelerator
D = 4096  # SD-VAE latents, 4 x 32 x 32
# SiT-XL/2 at 256 x 256: 118.6 G multiply-adds forward (Peebles & Xie, arXiv 2212.09748, Table 4;
# the papers write Gflops), two operations each, and twice as much again for the backward pass.
TRAINING = 3 * 2 * 118.6e9 * BATCH


@dataclass(frozen=True)
class Bank:
    """Rows that exist, and rows that a query looks at."""

    name: str
    rows: int
    looked_at: int


BANKS = (
    Bank("ImageNet, class-wise", 1_281_167, 1_281),
    Bank("ImageNet, all rows", 1_281_167, 1_281_167),
    Bank("100 M rows", 100_000_000, 100_000_000),
)


@dataclass(frozen=True)
class Cost:
    """Per accelerator and step."""

    memory: float  # bytes of bank
    operations: float
    read: float  # bytes of bank read
    sent: float  # bytes received over the links

    def seconds(self, ranks: int) -> dict[str, float]:
        """Lower bounds by resource."""
        link = LINKS[ranks]
        return {
            "arithmetic": self.operations / FLOPS,
            "memory bandwidth": self.read / BANDWIDTH,
            "network": 0.0 if link is None else self.sent / link,
        }


def cost(bank: Bank, ranks: int) -> Cost:
    """The whole posterior for every query: both products, both split in two bfloat16 parts."""
    products = 2 * 2 * 2 * BATCH * D  # (logits, mean) x (high, low) x (multiply, add)
    if bank.looked_at < bank.rows:
        # Class-wise every rank holds all rows and reads one class for each query, at worst.
        read = 2 * 2 * min(BATCH * bank.looked_at, bank.rows) * D
        return Cost(2 * bank.rows * D, products * bank.looked_at, read, 0)
    # All queries meet all rows: R times the queries with 1/R of the rows.
    queries = ranks * BATCH
    sent = 0.0 if ranks == 1 else 2 * (ranks - 1) / ranks * queries * D * 8
    rows = bank.rows / ranks
    return Cost(2 * rows * D, products * ranks * rows, 2 * 2 * rows * D, sent)


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| bank | accelerators | bank in each | operations | share of training | read | sent | at "
        "least | first to saturate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for bank in BANKS:
        for ranks in LINKS:
            each = cost(bank, ranks)
            seconds = each.seconds(ranks)
            slowest = max(seconds, key=lambda name: seconds[name])
            first = f"memory: {each.memory / MEMORY:.1f} x its size"
            if each.memory < 0.9 * MEMORY:
                first = slowest
            lines.append(
                f"| {bank.name} | {ranks} | {each.memory / 1e9:.1f} GB "
                f"| {each.operations / 1e12:.3g} T | {each.operations / TRAINING:.2%} "
                f"| {each.read / 1e9:.2g} GB | {each.sent / 1e6:.0f} MB "
                f"| {max(seconds.values()) * 1e3:.2g} ms | {first} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
