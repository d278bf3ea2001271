"""Whether `MemorizationGuard` says in time that a model begins to copy, and is silent elsewhere.

A perceptron is trained on patches of photographs, 6 x 6 pixels, without labels, at a constant rate:
on as few as it can learn by heart, and on many. Held-out patches are of regions that no training
patch touches; one half of them is for the guard, the other for the losses of the table.

    python benchmarks/memorization_onset.py

trains what is missing in `--dir`, one file for each run, and writes docs/guard.md from what is
there. It may be stopped and started again. Copies are counted among 512 samples at each probe of
the guard; "copies pass 1 %" is the first probe with more than that. The kept checkpoint is read
from its file, and its loss on the other half of the held-out patches is compared with the lowest at
any probe of the run. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from stagewise.callbacks import MemorizationGuard
from stagewise.learning_events import OnsetLaw
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.photos import PhotoPatches

BATCH, HELD_OUT, SAMPLES, PROBES, NOISES = 64, 1000, 512, 40, 4
WIDTH, RATE, PATCH = 512, 2e-3, 6
STEPS = {16: 3000, 64: 5000, 200: 5000, 20_000: 3000}
"""Of a run, by training patches."""

SEEDS = range(5)
MANY = 20_000
"""Patches that are not learned by heart."""


class Perceptron(nn.Module):
    """A field of the shape of `x_t`, from `x_t` and sines of t.

    Args:
        dim: D.
        width: Of its three hidden layers.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dim),
        )

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """The velocity, (B, *), at `x_t`, (B, *), and t, (B,)."""
        angles = t[:, None] * torch.arange(1, 9, device=t.device) * torch.pi
        features = torch.cat([xt.flatten(1), angles.sin(), angles.cos()], 1)
        return self.layers(features).view_as(xt)


class Run(pl.LightningModule):
    """Plain flow matching.

    Args:
        shape: Of a sample.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.loss = Perceptron(torch.Size(shape).numel(), WIDTH), FlowMatchingLoss()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A batch of the objective."""
        return self.loss(self.net, batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """None; its loader is where the guard finds held-out samples."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), RATE)


class HeldOutLoss(pl.Callback):
    """The loss on patches that the guard does not see, at each of its probes.

    Args:
        x1: The patches, (n, *).
        guard: Whose probes.
        seed: Of noise and times.
    """

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


def run(rows: int, seed: int, folder: Path) -> dict[str, Any]:
    """Trains once.

    Args:
        rows: Training patches.
        seed: Of patches, regions, weights and draws.
        folder: Where the guard writes.

    Returns:
        What the table says of it.
    """
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


def table(runs: list[dict[str, Any]]) -> list[str]:
    """The section of the results, as lines of Markdown."""
    lines = [
        "# What MemorizationGuard says, and when",
        "",
        f"Written by `python benchmarks/memorization_onset.py`: {PATCH} x {PATCH} photograph "
        f"patches, a perceptron of width {WIDTH}, batches of {BATCH}, Adam at {RATE:g}. Copies are "
        f'shares of {SAMPLES} samples; "never" is within the run. The last column is the kept '
        "checkpoint's loss on held-out patches that the guard did not see, over the lowest of the "
        "run.",
        "",
        "| training patches | seed | steps | onset announced | copies then | copies pass 1 % | "
        "copies at the end | kept step | copies there | its held-out loss / best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in runs:
        copies = {int(step): share for step, share in found["copies"].items()}
        onset = found["onset"]
        told = "never" if onset is None else str(onset["step"])
        then = "" if onset is None else f"{copies[onset['step']]:.1%}"
        lines.append(
            f"| {found['rows']} | {found['seed']} | {found['steps']} | {told} | {then} | "
            f"{_passes(copies) or 'never'} | {copies[max(copies)]:.1%} | {found['kept']} | "
            f"{copies[found['kept']]:.1%} | {_over_best(found):.3f} |"
        )
    return [*lines, "", *_aims(runs)]


def _passes(copies: dict[int, float]) -> int | None:
    """The first step with more than 1 % of copies."""
    return next((step for step in sorted(copies) if copies[step] > 0.01), None)


def _over_best(found: dict[str, Any]) -> float:
    return found["kept_loss"] / min(found["losses"].values())


def _law(runs: list[dict[str, Any]]) -> list[str]:
    """What the onsets on the fewest patches predict for more, and what came."""
    told: dict[int, list[int]] = {}
    for found in runs:
        if found["onset"]:
            told.setdefault(found["rows"], []).append(found["onset"]["step"])
    means = {rows: sum(steps) / len(steps) for rows, steps in sorted(told.items())}
    if len(means) < 3:
        return []
    *known, last = means
    law = OnsetLaw({rows: means[rows] for rows in known})
    line = OnsetLaw({known[-1]: means[known[-1]]})
    given = ", ".join(f"{rows}: {means[rows]:.0f}" for rows in known)
    return [
        f"- mean onsets {{{given}}} predict step {law(last):.0f} for {last} patches by tau = "
        f"{law!r}, and {line(last):.0f} by tau = c N from the last alone; in the "
        f"{len(told[last])} runs that announced it, it came at {means[last]:.0f}.",
    ]


def _aims(runs: list[dict[str, Any]]) -> list[str]:
    few, many = ([r for r in runs if (r["rows"] == MANY) == other] for other in (False, True))
    passes = [_passes({int(step): share for step, share in r["copies"].items()}) for r in few]
    told = [r["onset"] and r["onset"]["step"] for r in few]
    pairs = list(zip(told, passes, strict=True))
    shown = [(said, at) for said, at in pairs if at is not None]
    early = sum(said is not None and said < at for said, at in shown)
    silent = sum(said is not None for said, at in pairs if at is None)
    alarms = sum(found["onset"] is not None for found in many)
    worst = max((_over_best(found) for found in runs), default=float("nan"))
    return [
        f"- copies pass 1 % in {len(shown)} of {len(few)} runs on few patches; announced before "
        f"that: {early}; announced in the {len(few) - len(shown)} others: {silent};",
        f"- announced at {MANY} patches: {alarms} of {len(many)} runs;",
        f"- kept held-out loss over the best of the run: {worst:.3f} at the worst;",
        *_law(runs),
    ]


def main() -> None:
    """Trains what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--dir", type=Path, default=Path("build/guard"))
    parser.add_argument("--out", type=Path, default=Path("docs/guard.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    options.dir.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for rows in options.rows:
            file = options.dir / f"{rows}-{seed}.json"
            if file.exists():
                continue
            with TemporaryDirectory() as folder:
                found = run(rows, seed, Path(folder))
            partial = file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(found))
            partial.replace(file)
            print(f"{rows} patches, seed {seed}: {found['seconds']:.0f} s", flush=True)
    runs = [json.loads(file.read_text()) for file in options.dir.glob("*.json")]
    runs.sort(key=lambda found: (found["rows"], found["seed"]))
    options.out.write_text("\n".join(table(runs)) + "\n")


if __name__ == "__main__":
    main()
