"""After training: losses by t and by stage on training and held-out samples, and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from stagewise.binned_sums import BinnedSums
from stagewise.callbacks import PosteriorMonitor
from stagewise.callbacks.drawing import (
    FLOOR,
    HELD_OUT,
    TRAIN,
    centres,
    counted,
    draw_boundary,
    heading,
    legend,
    new_figure,
    time_axis,
)
from stagewise.callbacks.writer import show_pictures
from stagewise.paths import Prediction
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.run_files import boundary_of, read_run, stage_bounds
from stagewise.sampling import guided, integration_range, sample
from stagewise.stages import StageBoundary, StageCurve
from stagewise.velocity_probe import STAGES

__all__ = ["evaluate", "floor_curve", "loss_by_time", "sample_grid", "stage_table"]

_CLASSES = 8  # in the picture of samples

Losses = tuple[Tensor, Tensor]
"""Times and losses of queries, both (Q,)."""


@torch.no_grad()
def loss_by_time(
    module: FlowMatchingModule, dataset: Dataset[tuple[Tensor, Tensor]], queries: int
) -> Losses:
    """Losses without weights of random samples, at times spread evenly over [0, 1].

    The samples are those of `dataset.fixed()` if there is one, since draws depend on the epoch. The
    network is put into evaluation mode.
    """
    module.eval()
    dataset = dataset.fixed() if hasattr(dataset, "fixed") else dataset
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(dataset), (queries,), generator=generator)  # type: ignore[arg-type]
    t = (torch.arange(queries) + torch.rand(queries, generator=generator)) / queries
    losses = []
    for at in torch.arange(queries).split(256):
        x1, labels = default_collate([dataset[int(row)][:2] for row in rows[at]])
        x0 = torch.randn(x1.shape, generator=generator)
        x1, labels, x0, times = (x.to(module.device) for x in (x1, labels, x0, t[at]))
        module.objective(module.net, x1, labels, x0=x0, t=times)
        assert module.objective.last is not None
        losses.append(module.objective.last.loss.cpu())
    return t, torch.cat(losses)


def floor_curve(module: FlowMatchingModule, curve: StageCurve) -> tuple[Tensor, Tensor]:
    """Times, (T,), and the floor of the loss per query, (T, Q), from a measured curve.

    MSE(conditional, oracle) of the module's prediction type: the two targets differ by
    `c_t (m - x_1)`, so it is that of the velocity times `(c_t / c_t of the velocity)^2`.
    """
    path = module.objective.path(curve.t)
    c, _ = module.objective.prediction.coefficients(path)
    c_velocity, _ = Prediction("velocity").coefficients(path)
    return curve.times, curve.statistic("target_difference") * (c / c_velocity) ** 2


def _means(losses: Losses, edges: Sequence[float] | Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard error between edges; NaN if a loss there is not finite."""
    sums = BinnedSums.empty(edges, ["loss"])
    sums.update(losses[0], losses[1][None])
    found = sums.means()
    broken = found["nonfinite"] > 0
    mean, error = (found[key].masked_fill(broken, math.nan) for key in ("loss", "loss_se"))
    return mean.tolist(), error.tolist()


def stage_table(
    boundary: StageBoundary,
    floor: tuple[Tensor, Tensor],
    train: Losses,
    held_out: Losses | None,
) -> list[dict[str, float | str]]:
    """A row for each stage, and one for all t.

    `floor` is from `floor_curve`, the losses are from `loss_by_time`. A row holds name, from, to,
    mean losses, and the gap, held-out minus training loss, with its standard error.
    """
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    between = np.interp(grid.numpy(), floor[0].numpy(), floor[1].mean(1).numpy())
    rows = []
    for names, edges in ((STAGES, stage_bounds(boundary)), (("all t",), [0.0, 1.0])):
        one, error = _means(train, edges)
        other, more = ([math.nan] * 3,) * 2 if held_out is None else _means(held_out, edges)
        floors, _ = _means((grid, torch.from_numpy(between)), edges)
        for i, name in enumerate(names):
            row: dict[str, float | str] = {"stage": name, "from": edges[i], "to": edges[i + 1]}
            row |= {"train": one[i], "held_out": other[i], "floor": floors[i]}
            if edges[i] < edges[i + 1]:
                rows.append(
                    row | {"gap": other[i] - one[i], "gap_se": math.hypot(error[i], more[i])}
                )
    return rows


def _predicted(run_dir: Path, monitor: PosteriorMonitor) -> float:
    """The predicted boundary; a run that had ended before has it only in its files."""
    if math.isnan(monitor.predicted):
        with suppress(ValueError):
            found = read_run(run_dir).first("bank").get("predicted")
            return math.nan if found is None else found
    return monitor.predicted


def _print_table(b: StageBoundary, predicted: float, rows: list[dict[str, Any]]) -> None:
    print(f"\n{'stage boundary':28}{'t':>7}   95 % interval     (t = 0 is noise)")
    print(f"{'  predicted from spectrum':28}{predicted:7.3f}")
    for name, at, low, high in (
        ("  midpoint  (weight 0.50)", b.midpoint, b.midpoint_low, b.midpoint_high),
        ("  collapsed (weight 0.99)", b.collapsed, b.collapsed_low, b.collapsed_high),
    ):
        print(f"{name:28}{at:7.3f}   [{low:.3f}, {high:.3f}]")
    print(
        f"\n{'loss by stage':14}{'t from':>8}{'to':>8}{'train':>9}{'held out':>10}"
        f"{'gap, 2 standard errors':>26}{'floor':>9}"
    )
    for row in rows:
        share, error = row["gap"] / row["train"], 2 * row["gap_se"] / row["train"]
        print(
            f"  {row['stage']:12}{row['from']:8.3f}{row['to']:8.3f}{row['train']:9.4f}"
            f"{row['held_out']:10.4f}{f'{share:+.1%} ± {error:.1%}':>26}{row['floor']:9.4f}"
        )
    print(
        "weight = mean largest posterior weight: how far one row explains a noisy sample.\n"
        "gap = held out minus train, as a share of train.\n"
        "floor = MSE(conditional, oracle): the part of the training loss that no model can remove."
    )


def _loss_figure(
    curves: dict[str, Losses], floor: tuple[Tensor, Tensor] | None, rows: int, bins: int = 32
) -> Figure:
    """Losses by t over the floor, all with two standard errors."""
    figure = new_figure()
    axes = figure.add_subplot()
    edges = torch.linspace(0, 1, bins + 1)
    t = centres(edges.tolist())
    time_axis(axes, t)
    if floor is not None:
        at, values = (value.numpy() for value in floor)
        mean, error = values.mean(1), 2 * values.std(1) / values.shape[1] ** 0.5
        axes.fill_between(at, mean, color=FLOOR, lw=0, label="floor: no model goes below")
        axes.fill_between(at, mean - error, mean + error, color="0.5", alpha=0.3, lw=0)
    looks = ((TRAIN, ".-"), (HELD_OUT, ".--"))
    for (name, losses), (colour, fmt) in zip(curves.items(), looks, strict=False):
        mean, error = _means(losses, edges)
        bars = 2 * np.nan_to_num(error)
        axes.errorbar(t, mean, bars, fmt=fmt, color=colour, ms=4, lw=1.3, label=name)
    axes.set(ylabel="flow-matching loss per number")
    axes.set_ylim(bottom=0)
    queries = len(next(iter(curves.values()))[0])
    about = counted(rows, queries // bins, bins)
    heading(axes, "Loss by t after training, with 2 standard errors", about)
    return figure


def sample_grid(real: Tensor, generated: Tensor, names: Sequence[str], title: str) -> Figure:
    """Training samples, (classes, n, 3, H, W) in [0, 1], beside generated ones, by class."""
    figure = Figure(figsize=(9, 0.62 * len(names) + 0.8), dpi=110, layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for row, name in enumerate(names):
        for column, images in enumerate((real[row], generated[row])):
            strip = torch.nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
            picture = strip.permute(2, 0, 3, 1).flatten(1, 2).clamp(0, 1)
            axes[row, column].imshow(picture.cpu().numpy(), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    axes[0, 0].set_title("training samples", fontsize=10)
    axes[0, 1].set_title(title, fontsize=10)
    return figure


@torch.no_grad()
def _samples(
    module: FlowMatchingModule,
    data: Any,
    samples_per_class: int,
    cfg_scale: float,
    cfg_channels: int | None,
    method: str,
    steps: int,
) -> Figure:
    module.eval()
    names = data.class_names
    classes = torch.linspace(0, len(names) - 1, min(len(names), _CLASSES)).round().int().tolist()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(classes) * samples_per_class, *data.shape, generator=generator)
    labels = torch.tensor(classes, device=module.device).repeat_interleave(samples_per_class)
    given, null = module.velocity(labels), module.velocity(None)
    few = None if cfg_channels is None else min(cfg_channels, data.shape[0])
    field = guided(given, null, cfg_scale, channels=few)
    start, end = integration_range(module.objective.prediction)
    noise = noise.to(module.device)
    made = sample(field, noise, method=method, steps=steps, start=start, end=end)
    made = made.reshape(len(classes), samples_per_class, *data.shape).cpu()
    real = data.examples(classes, samples_per_class)
    title = f"generated samples ({method}, {steps} steps, guidance {cfg_scale:g})"
    channels = real.shape[2]
    shown = [0, 1, 2] if channels >= 3 else [0, 0, 0]
    low, high = -1.0, 1.0
    if channels != 3:
        title += f"\nlatents: {'channels 1 to 3' if channels > 3 else 'channel 1'}"
        low, high = (real[:, :, shown].quantile(share).item() for share in (0.01, 0.99))
    real, made = ((x[:, :, shown] - low) / (high - low) for x in (real, made))
    return sample_grid(real, made, [names[label] for label in classes], title)


def evaluate(
    module: FlowMatchingModule,
    data: Any,
    monitor: PosteriorMonitor | None,
    loggers: Sequence[Logger],
    step: int,
    run_dir: Path,
    *,
    queries: int,
    **sampling: Any,
) -> dict[str, Any]:
    """Prints the table, saves and logs the pictures, and returns `stages` and the mean losses.

    `data` has data sets `train` and `held_out` (or None), `class_names`, `shape` and a method
    `examples(classes, count)`. Without `monitor` there are no boundaries, and `stages` is empty.
    `queries` counts the (sample, t) pairs of each split. `sampling` is of the picture of samples:
    samples_per_class, cfg_scale, cfg_channels, method, steps.
    """
    train, held_out = loss_by_time(module, data.train, queries), None
    curves = {"training samples": train}
    if data.held_out is not None:
        curves["held-out samples"] = held_out = loss_by_time(module, data.held_out, queries)
    curve = None if monitor is None else monitor.curve
    floor = None if curve is None else floor_curve(module, curve)
    figure = _loss_figure(curves, floor, len(data.train))
    rows: list[dict[str, Any]] = []
    if monitor is not None and floor is not None:
        # The first probe defines the stages for the monitors and schemes of the run.
        boundary, predicted = boundary_of(monitor.history[0]), _predicted(run_dir, monitor)
        rows = stage_table(boundary, floor, train, held_out)
        _print_table(boundary, predicted, rows)
        draw_boundary(figure.axes[0], boundary, predicted)
    legend(figure)
    pictures = {"loss_by_t": figure, "samples": _samples(module, data, **sampling)}
    show_pictures(pictures, "evaluation", run_dir, loggers, step)
    return {
        "stages": rows,
        "train_loss": float(train[1].mean()),
        "held_out_loss": math.nan if held_out is None else float(held_out[1].mean()),
    }
