"""The pictures of docs/watching.md: what models of three sizes do at each t, while they train.

`make figures` runs it. Each model is trained on the photographs of the recipe, once (the results
are in build/watching), and then all pictures are drawn. They show what figures 7 and 8 of Liu et
al. (arXiv 2512.02826) show: loss against the conditional and the oracle target by t, models of
three sizes, and five steps of training in one picture.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from matplotlib.figure import Figure
from PIL import Image
from schemes_plan import record

from stagewise.callbacks import VelocityErrorMonitor, velocity_figures
from stagewise.callbacks.drawing import counted, render
from stagewise.losses import FlowMatchingLoss
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.photos import PhotoPatches
from stagewise.recipes.sit import SiT
from stagewise.timesteps import Uniform

SIZES = {"small": (64, 3, 2), "base": (128, 4, 4), "large": (192, 6, 6)}  # width, depth, heads
STEPS, SHOWN = 600, (25, 50, 100, 300, 600)
ROWS, STRATA, QUERIES = 20_000, 20, 96


def train(size: str, folder: Path) -> dict[str, Any]:
    """Trains a model of a size; gives what the monitor reported."""
    pl.seed_everything(0, verbose=False)
    width, depth, heads = SIZES[size]
    net = SiT(7, 16, 3, 4, width, depth, heads)
    module = FlowMatchingModule(net, FlowMatchingLoss(timesteps=Uniform(stratified=True)))
    monitor = VelocityErrorMonitor(
        every_n_steps=25, strata=STRATA, queries=QUERIES, dirpath=folder / size
    )
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=10 * STEPS,
    )
    trainer.fit(module, datamodule=PhotoPatches(train_size=ROWS))
    weights = sum(p.numel() for p in net.parameters())
    boundary = monitor.boundary
    assert boundary is not None
    return {
        "weights": weights,
        "edges": monitor.edges.tolist(),
        "midpoint": boundary.midpoint,
        "collapsed": boundary.collapsed,
        "probes": monitor.history,
    }


def draw(found: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """The pictures, by the names of their files."""
    asked = counted(ROWS, QUERIES, STRATA)
    base = found["base"]
    edges, probes, at = base["edges"], base["probes"], (base["midpoint"], base["collapsed"])
    size = f"{base['weights'] / 1e6:.1f} M weights"
    about = f"SiT of {size} on photographs of 16 x 16 x 3; {asked}"
    shown = [probe for probe in probes if probe["step"] in SHOWN]
    models = {
        f"{model['weights'] / 1e6:.2g} M weights, step {STEPS}": model["probes"][-1]
        for model in found.values()
    }
    small = found["small"]
    ends = (small["midpoint"], small["collapsed"])
    photographs = f"photographs of 16 x 16 x 3; {asked}"
    figures = velocity_figures
    return {
        "error_by_t": figures.loss_by_time_figure(edges, probes[-1], at, about),
        "error_while_training": figures.dynamics_figure(edges, shown, "conditional", at, about),
        "oracle_error_heatmap": figures.error_heatmap(edges, probes, at, about),
        "error_by_size": figures.sizes_figure(small["edges"], models, ends, photographs),
    }


def main() -> None:
    folder, images = Path("build/watching"), Path("docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    found = {size: record(folder / f"{size}.json", partial(train, size, folder)) for size in SIZES}
    for name, figure in draw(found).items():
        Image.fromarray(render(figure)).save(images / f"{name}.png")
        print(images / f"{name}.png")


if __name__ == "__main__":
    main()
