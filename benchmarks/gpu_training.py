"""Cases of `benchmarks/gpu.py` with real networks, and with whole runs of a trainer."""

from __future__ import annotations

import logging
import warnings
from itertools import product
from typing import Any

import lightning.pytorch as pl
import torch
from gpu_cases import Left, Rows, Sizes, asked, clock, made
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import Mix, Oracle
from stagewise.callbacks import PosteriorMonitor, StageScheme, VelocityErrorMonitor
from stagewise.engines import Engine, Exact, Sharded
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.sit import SiT

NETWORKS = {
    "tiny": {"hidden_size": 32, "depth": 1, "num_heads": 2},
    "SiT-S/2": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "SiT-XL/2": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def network(name: str, sizes: Sizes) -> nn.Module:
    channels, side, _ = sizes.shape
    about: dict[str, Any] = NETWORKS[name]
    return SiT(sizes.classes, side, channels, patch_size=2, class_dropout=0.0, **about)


def shares(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Share of a training step: exact class-wise targets beside real networks, in bfloat16."""
    bank = made(sizes.rows, sizes.shape, sizes.classes, torch.bfloat16, device)
    count = max(sizes.queries)
    xt, t, x1, labels = asked(bank, count, torch.rand(count, device=device))
    oracle = Oracle(bank)
    ours, host = clock(lambda _: oracle.correction(xt, t, x1, labels), device, sizes.turns)
    found: Rows = []
    for name in sizes.networks:
        if left() < 0:
            break
        net = network(name, sizes).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

        def step(_: int, net: nn.Module = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            for first in range(0, count, 64):  # as many samples as the memory has room for
                some = slice(first, first + 64)
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    loss = (net(xt[some], t[some], labels[some]) - x1[some]).square().mean()
                loss.backward()
            optimizer.step()

        spent, _ = clock(step, device, 3)
        row = {"network": name, "step ms": spent, "oracle ms": ours, "oracle host ms": host}
        found.append(row | {"share": ours / spent})
        del net, optimizer
    return found


def places(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Answers by where the bank lies, relative to that of one on the device."""
    there = made(sizes.right[0], sizes.shape, 20, torch.bfloat16, device)
    xt, t, x1, labels = asked(there, 32, torch.rand(32, device=device))
    banks = {"device": there, "host": there.to("cpu")}
    if device.type == "cuda":
        banks["pinned host"] = banks["host"].pin()
    engines: dict[str, Engine] = {"Exact": Exact(), "Sharded, one rank": Sharded(Exact())}
    found: Rows = []
    for over, known in (("class", labels.tolist()), ("all rows", None)):
        first = Oracle(there, engine=Exact()).correction(xt, t, x1, known)
        for name, engine in engines.items():
            host = Oracle(banks["host"], engine=engine).correction(xt, t, x1, known)
            for place, bank in banks.items():
                answer = Oracle(bank, engine=engine).correction(xt, t, x1, known)
                size = first.flatten(1).norm(dim=1).clamp_min(1e-6)
                off = float(((answer - first).flatten(1).norm(dim=1) / size).max())
                row = {"over": over, "bank": f"{name}, {place}", "differs by": off}
                same = "the same" if torch.equal(answer, host) else "others"
                found.append(row | {"bits of the host bank": same})
    return found


class Flow(pl.LightningModule):
    """Plain flow matching with a SiT; its draws depend on the step alone."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = network(sizes.networks[0], sizes), FlowMatchingLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x1, labels = batch
        generator = torch.Generator(x1.device).manual_seed(batch_idx)
        return self.loss(self.net, x1, labels, generator=generator)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def trained(device: torch.device, sizes: Sizes, precision: str, *callbacks: pl.Callback) -> Tensor:
    """The weights after some steps, (P,)."""
    torch.manual_seed(1)
    count, batch = 40 * 16, 16
    x = torch.randn(count, *sizes.shape)
    loader = DataLoader(TensorDataset(x, torch.arange(count) % 10), batch_size=batch)
    module = Flow(sizes)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=sizes.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader)
    return torch.cat([p.detach().flatten().cpu() for p in module.parameters()])


def training(device: torch.device, sizes: Sizes, left: Left) -> Rows:
    """Weights with monitors, and those without."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: Rows = []
    often: dict[str, Any] = {"every_n_steps": max(1, sizes.steps // 2), "strata": 4, "queries": 4}
    for precision, target in product(("bf16-mixed", "bf16-true"), (None, Mix())):
        if left() < 0:
            break
        monitors = [PosteriorMonitor(**often), VelocityErrorMonitor(**often)]
        schemes = [[StageScheme(target=target)] if target else [] for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = trained(device, sizes, precision, *schemes[0])
            watched = trained(device, sizes, precision, *monitors, *schemes[1])
        same = "the same bits" if torch.equal(plain, watched) else "other numbers"
        scheme = "Mix" if target else "none"
        found.append({"precision": precision, "scheme": scheme, "weights": same})
    return found
