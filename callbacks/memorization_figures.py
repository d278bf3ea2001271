"""Pictures of a `MemorizationMonitor`: samples beside their nearest rows, copies by t_switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from stagewise.callbacks.figures import new_figure
from stagewise.copies import COPY_RATIO

__all__ = ["Column", "copies_figure", "grid_figure", "is_image"]

_COPIED = "tab:red"


def is_image(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape can be shown: (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def copies_figure(probes: Sequence[Mapping[str, Any]]) -> Figure:
    """The share of copies by t_switch with its interval, coloured by step; probes ascend."""
    figure = new_figure()
    axes = figure.add_subplot()
    for place, probe in enumerate(probes):
        colour = colormaps["viridis"](place / max(len(probes) - 1, 1) * 0.9)
        few = place in (0, len(probes) - 1) or len(probes) < 8
        label = f"step {probe['step']}" if few else None
        low, high = np.array(probe["low"], float), np.array(probe["high"], float)
        axes.plot(probe["t_switch"], probe["copies"], ".-", color=colour, label=label)
        axes.fill_between(probe["t_switch"], low, high, color=colour, alpha=0.15, lw=0)
    axes.set(
        xlabel="t_switch   (oracle before, model after)",
        ylabel=f"share of copies (d1/d2 < {COPY_RATIO:.2f})",
        title="Copies of training rows among samples, with 95 % interval",
        ylim=(-0.02, 1.02),
    )
    axes.legend(fontsize=8)
    return figure


class Column(NamedTuple):
    """Images of a `grid_figure`.

    Attributes:
        heading: Above it.
        images: (n, C, H, W).
        ratio: The d1/d2 that is printed under each image, (n,); a copy is framed.
        of_data: Whether they are data. The least and the largest number of such images are black
            and white in all columns, so that a sample and its nearest row can be compared.
    """

    heading: str
    images: Tensor
    ratio: Tensor | None = None
    of_data: bool = False


def grid_figure(columns: Sequence[Column], title: str) -> Figure:
    """Columns of images, copies framed."""
    rows = len(columns[0].images)
    size = (max(4.0, 0.85 * len(columns)), 0.95 * rows + 0.9)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    data = torch.cat([column.images for column in columns if column.of_data])
    low, high = (float(end) for end in data.float().aminmax())
    for j, column in enumerate(columns):
        shown = ((column.images.float() - low) / max(high - low, 1e-12)).nan_to_num().clamp(0, 1)
        for i in range(rows):
            axes = grid[i, j]
            axes.imshow(shown[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            copied = column.ratio is not None and bool(column.ratio[i] < COPY_RATIO)
            for spine in axes.spines.values():
                spine.set(visible=copied, color=_COPIED, linewidth=2.5)
            if column.ratio is not None:
                label = axes.set_xlabel(f"{float(column.ratio[i]):.2f}", fontsize=7, labelpad=3)
                label.set(color=_COPIED if copied else "black")
        grid[0, j].set_title(column.heading, fontsize=7)
    said = "number: d1/d2 to the training rows; red frame: a copy; t = 0 is noise"
    figure.suptitle(f"{title}\n{said}", fontsize=9)
    return figure
