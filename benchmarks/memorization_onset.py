"""Whether `MemorizationGuard` says in time that a model begins to copy, and is silent elsewhere.

A perceptron is trained on patches of photographs, 6 x 6 pixels, without labels, at a constant rate:
on as few as it can learn by heart, and on many. Held-out patches are of regions that no training
patch touches; one half of them is for the guard, the other for the losses of the table.

    python benchmarks/memorization_onset.py

trains what is missing in `--dir`, a file for each run, and fills the table of docs/guard.md. It may
be stopped and started again, and started twice at once. Copies are counted among 512 samples at
each probe of the guard; "copies pass 1 %" is the first probe with more than that. The loss of the
kept checkpoint is compared with the lowest at any probe. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from schemes_plan import record, write_once
from tables import fill, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from stagewise.callbacks import MemorizationGuard
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.photos import PhotoPatches

BATCH, HELD_OUT, SAMPLES, PROBES, NOISES = 64, 1000, 512, 40, 4
WIDTH, RATE, PATCH = 512, 2e-3, 6
STEPS = {16: 3000, 64: 5000, 200: 5000, 20_000: 3000}
"""Of a run, by training patches."""
SEEDS = range(5)


class Perceptron(nn.Module):
    """A field of the shape of `x_t`, from `x_t` and sines of t; three hidden layers."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes = (dim + 16, width, width, width)
        hidden = [(nn.Linear(a, b), nn.SiLU()) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, dim))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """The velocity, (B, *), at `x_t`, (B, *), and t, (B,)."""
        angles = t[:, None] * torch.arange(1, 9, device=t.device) * torch.pi
        features = torch.cat([xt.flatten(1), angles.sin(), angles.cos()], 1)
        return self.layers(features).view_as(xt)


class Run(pl.LightningModule):
    """Plain flow matching."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.loss = Perceptron(torch.Size(shape).numel(), WIDTH), FlowMatchingLoss()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net, batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Nothing: its loader is where the guard finds held-out samples."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), RATE)


class HeldOutLoss(pl.Callback):
    """The loss on patches that the guard does not see, at each of its probes."""

    def __init__(self, x1: Tensor, guard: MemorizationGuard, seed: int) -> None:
        draws = torch.Generator().manual_seed(1000 + seed)
        self.x1 = x1.repeat(NOISES, *[1] * (x1.ndim - 1))
        count, self.guard = len(self.x1), guard
        order = torch.randperm(count, generator=draws)
        self.t = (order + torch.rand(count, generator=draws)) / count
        self.x0 = torch.randn(self.x1.shape, generator=draws)
        self.losses: dict[int, float] = {}

    @torch.no_grad()
    def of(self, net: nn.Module) -> float:
        """The loss of a network."""
        t = self.t.view(-1, *[1] * (self.x1.ndim - 1))
        v = net((1 - t) * self.x0 + t * self.x1, self.t)
        return float((v - (self.x1 - self.x0)).square().mean())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Run, *_: Any) -> None:  # type: ignore[override]
        """After the guard, which comes before it in the list."""
        step = trainer.global_step
        if self.guard.history and self.guard.history[-1]["step"] == step:
            self.losses[step] = self.of(module.net)


def run(rows: int, seed: int) -> dict[str, Any]:
    """Trains once on so many patches."""
    with TemporaryDirectory() as folder:
        return _run(rows, seed, Path(folder))


def _run(rows: int, seed: int, folder: Path) -> dict[str, Any]:
    data = PhotoPatches(
        patch=PATCH, train_size=rows, held_out_size=2 * HELD_OUT, batch_size=1, seed=seed
    )
    data.setup()
    train, others = TensorDataset(data.train.tensors[0]), data.held_out.tensors[0]
    # Patches lie photograph by photograph.
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    pl.seed_everything(seed, verbose=False)
    steps = STEPS[rows]
    guard = MemorizationGuard(
        every_n_steps=steps // PROBES, samples=SAMPLES, figures=0, seed=seed, dirpath=folder
    )
    losses = HeldOutLoss(others[HELD_OUT:], guard, seed)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[guard, losses],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
    )
    model, start = Run(data.shape), time.process_time()
    draws = RandomSampler(train, replacement=True, num_samples=BATCH * steps)
    trainer.fit(
        model,
        DataLoader(train, BATCH, sampler=draws),
        DataLoader(TensorDataset(others[:HELD_OUT]), BATCH),
    )
    seconds = time.process_time() - start
    print(f"{rows} patches, seed {seed}: {seconds:.0f} s", flush=True)
    state = torch.load(folder / "before_onset.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    assert guard.best is not None
    return {
        "rows": rows,
        "seed": seed,
        "steps": steps,
        "onset": guard.onset,
        "copies": {entry["step"]: entry["copies"][0] for entry in guard.history},
        "copied_rows": guard.history[-1]["copied_rows"],
        "losses": losses.losses,
        "kept": guard.best["step"],
        "kept_loss": losses.of(model.net),
        "seconds": seconds,
    }


def rows_of(runs: list[dict[str, Any]]) -> str:
    """The table of docs/guard.md."""
    lines = []
    for found in runs:
        copies = {int(step): share for step, share in found["copies"].items()}
        onset = found["onset"]
        told = "never" if onset is None else str(onset["step"])
        then = "" if onset is None else f"{copies[onset['step']]:.1%}"
        passes = next((str(step) for step in sorted(copies) if copies[step] > 0.01), "never")
        shares = (f"{copies[max(copies)]:.1%}", str(found["kept"]), f"{copies[found['kept']]:.1%}")
        best = f"{found['kept_loss'] / min(found['losses'].values()):.3f}"
        about = (str(found[key]) for key in ("rows", "seed", "steps"))
        lines.append([*about, told, then, passes, *shares, best])
    head = ["training patches", "seed", "steps", "onset announced", "copies then"]
    head += ["copies pass 1 %", "copies at the end", "kept step", "copies there"]
    return table([*head, "its held-out loss / best"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("build/guard"), help="for results of runs")
    folder = parser.parse_args().dir
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    folder.mkdir(parents=True, exist_ok=True)
    makes = {
        folder / f"{rows}-{seed}.json": partial(run, rows, seed)
        for rows, seed in itertools.product(STEPS, SEEDS)
    }
    for file, make in makes.items():
        write_once(file, make)
    runs = [record(file, make) for file, make in makes.items()]
    fill(Path("docs/guard.md"), {"guard": rows_of(runs)})


if __name__ == "__main__":
    main()
