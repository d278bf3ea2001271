"""Whether few photographs raise the memorization event and many do not.

A perceptron is trained on patches of photographs, 8 x 8 pixels, without labels: on as few as it can
learn by heart, and on many. Both runs take the same steps of the same size from the same weights,
with `VelocityErrorMonitor`, `StageTransitions` and `MemorizationMonitor` as they come. Held-out
patches are of regions that no training patch touches.

    python benchmarks/memorization_onset.py

prints a line for each run: whether and when the event was said, the errors of the bin of t where
they are farthest apart at the end, and of 64 samples the share of copies and the median d1/d2, of
the model alone and where the oracle leads to t = 0.4. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from stagewise.callbacks import MemorizationMonitor, StageTransitions, VelocityErrorMonitor
from stagewise.callbacks.stage_transitions import MEMORIZATION_ONSET
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.photos import PhotoPatches

BATCH, HELD_OUT, EVERY = 64, 1000, 500


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
    """Plain flow matching, the rate falling to 0 over the run.

    Args:
        shape: Of a sample.
        width: Of the perceptron.
        steps: Of the run.
        lr: Rate at the start.
    """

    def __init__(self, shape: tuple[int, ...], width: int, steps: int, lr: float) -> None:
        super().__init__()
        self.net, self.loss = Perceptron(torch.Size(shape).numel(), width), FlowMatchingLoss()
        self.steps, self.lr = steps, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A batch of the objective."""
        return self.loss(self.net, batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """None; its loader is where the monitors find held-out samples."""

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, object]]]:
        """Adam, its rate a quarter of a cosine."""
        adam = torch.optim.Adam(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        return [adam], [{"scheduler": schedule, "interval": "step"}]


def run(rows: int, seed: int, options: argparse.Namespace, folder: Path) -> str:
    """Trains once.

    Args:
        rows: Training patches.
        seed: Of patches, regions, weights and draws.
        options: Of the command.
        folder: Where the monitors write.

    Returns:
        A line of the table.
    """
    data = PhotoPatches(patch=8, train_size=rows, held_out_size=HELD_OUT, batch_size=1, seed=seed)
    data.setup()
    train, held_out = (TensorDataset(part.tensors[0]) for part in (data.train, data.held_out))
    pl.seed_everything(seed, verbose=False)
    errors = VelocityErrorMonitor(every_n_steps=EVERY, strata=12, queries=64, seed=seed)
    copies = MemorizationMonitor(every_n_steps=options.steps, t_resume=(), seed=seed)
    events = StageTransitions()
    trainer = pl.Trainer(
        max_steps=options.steps,
        accelerator="cpu",
        devices=1,
        callbacks=[errors, copies, events],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
    )
    start = time.process_time()
    trainer.fit(
        Run(data.shape, options.width, options.steps, options.lr),
        DataLoader(
            train,
            BATCH,
            sampler=RandomSampler(train, replacement=True, num_samples=BATCH * options.steps),
        ),
        DataLoader(held_out, BATCH),
    )
    seconds = time.process_time() - start
    onset = [event for event in events.events if event["kind"] == MEMORIZATION_ONSET]
    last, made = errors.history[-1], copies.history[-1]
    train_error, held_error = (
        torch.tensor(last[split]["conditional"]) for split in ("train", "held_out")
    )
    worst = int((held_error / train_error).argmax())
    t = (errors.edges[worst] + errors.edges[worst + 1]) / 2
    said = f"step {onset[0]['step']}" if onset else "never"
    return (
        f"{rows:>7} {seed:>4}  {said:>10}  {t:>6.2f} {train_error[worst]:>9.3f} "
        f"{held_error[worst]:>9.3f} {held_error[worst] / train_error[worst]:>6.2f}  "
        f"{made['copies'][0]:>6.0%} {made['ratio'][0]:>6.2f} "
        f"{made['copies'][-1]:>12.0%} {made['ratio'][-1]:>6.2f} {seconds:>8.0f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 2000, 20_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    print(
        f"{options.steps} steps of {BATCH}, width {options.width}\n"
        "   rows seed       onset  at t =     train  held out  ratio  copies  d1/d2  led: copies  "
        "d1/d2  seconds",
        flush=True,
    )
    for rows in options.rows:
        for seed in options.seeds:
            with TemporaryDirectory() as folder:
                print(run(rows, seed, options, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
