"""What a monitor checks before the first training step: that it measures what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from stagewise.adapters import find_seams
from stagewise.adapters.torchcfm import TorchCFM
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, describe, find_checked
from stagewise.memory import available_memory
from stagewise.oracle import Oracle
from stagewise.paths import LinearPath, Path

__all__ = [
    "beside_training",
    "check_bank",
    "check_batch",
    "check_rows",
    "path_of",
    "raise_together",
    "together",
    "warn_of_mismatch",
]


def path_of(pl_module: pl.LightningModule) -> tuple[Path, str]:
    """The path that a module trains on, and how that is known.

    Args:
        pl_module: The module. What makes its targets says (`stagewise.adapters`); an averaged copy
            has the same path.

    Returns:
        The path, `LinearPath()` where nothing says, and a few words for the log.

    Raises:
        ValueError: If it makes targets on several paths.
    """
    seams = find_seams(pl_module)
    for seam in seams:
        # A matcher that is refused ties noise to data, or may.
        if seam.coupled or (isinstance(seam, TorchCFM) and seam.refusal):
            rank_zero_warn(f"The posterior that is measured may not be that of {seam.name}.")
    found = {repr(seam.path): seam for seam in seams}
    if len(found) > 1:
        raise ValueError(
            f"The module makes targets on several paths, {', '.join(found)}. Say which to watch: "
            "PosteriorMonitor(path=...)."
        )
    for seam in found.values():
        return seam.path, f"from {seam.name}, {seam.library}"
    return LinearPath(), "assumed; say path=... if training uses another"


def raise_together(
    trainer: pl.Trainer, error: Exception | None, what: str = "refused its first batch"
) -> None:
    """Raises on every rank if one of them must; the others would wait for it for ever.

    Args:
        trainer: The trainer.
        error: What this rank raises, or None.
        what: What this rank did then, for the others.
    """
    passed = trainer.strategy.reduce_boolean_decision(error is None)
    if error is not None:
        raise error
    if not passed:
        raise ValueError(f"Another process {what}; see its message.")


@contextmanager
def together(trainer: pl.Trainer, what: str) -> Iterator[None]:
    """Does something on every rank, or raises on all of them; a collective at its end.

    Args:
        trainer: The trainer.
        what: What is done, for the ranks that could do it. Nothing in it may wait for others.

    Raises:
        Exception: What was raised on this rank.
        ValueError: If it was on another.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(trainer, error, f"failed in {what}")


def check_bank(bank: object, class_wise: object) -> None:
    """Refuses what is no bank, and what is no way to ask it.

    Args:
        bank: A `LatentBank` or None.
        class_wise: True, False or "auto".

    Raises:
        TypeError: With the cure, if `bank` is something else.
        ValueError: If `class_wise` is.
    """
    if bank is not None and not isinstance(bank, LatentBank):
        raise TypeError(
            f"Expected `bank` to be a LatentBank, got {type(bank).__name__}. "
            "Wrap tensors: LatentBank(x, labels)."
        )
    if class_wise not in (True, False, "auto"):
        raise ValueError(f'Expected `class_wise` to be True, False or "auto", got {class_wise!r}.')


def beside_training(bank: LatentBank, trainer: pl.Trainer) -> LatentBank:
    """The bank on the training device if it takes less than a quarter of what is free there."""
    root = trainer.strategy.root_device
    # The oracle needs float64, which MPS has not.
    device = torch.device("cpu") if root.type == "mps" else root
    # The model's gradients, optimizer and activations are not there yet.
    free = available_memory(device)
    return bank.to(device) if free is None or bank.nbytes < free / 4 else bank


def check_batch(
    batch: Any, find: FindSample, bank: LatentBank, *, class_wise: bool
) -> tuple[Tensor, Tensor | None]:
    """Finds `x_1` in a training batch, says what it found, and holds it against the bank.

    Args:
        batch: The batch.
        find: From a batch to `(x_1, labels or None)`.
        bank: The bank.
        class_wise: Whether the labels must be classes of the bank.

    Returns:
        `x_1` and the labels.

    Raises:
        ValueError: If `x_1` is not found, has another shape than the bank's samples, or a label is
            no class of the bank.
    """
    x1, labels = find_checked(find, batch)
    rank_zero_info(
        f"PosteriorMonitor: in {describe(batch)} took x_1 = {describe(x1)} and "
        + (f"labels = {describe(labels)}" if labels is not None else "no labels")
    )
    if tuple(x1.shape[1:]) != bank.shape:
        raise ValueError(
            f"The bank has samples of shape {bank.shape}, the training batch of shape "
            f"{tuple(x1.shape[1:])}. Build the bank from the same latents, or say which tensor of "
            "the batch is x_1: PosteriorMonitor(find=lambda batch: (batch[0], None))."
        )
    if class_wise and labels is not None:
        for label in set(labels.tolist()):
            bank.segment(label)
    return x1, labels


@torch.no_grad()
def warn_of_mismatch(bank: LatentBank, x1: Tensor, labels: Tensor | None, class_wise: bool) -> None:
    """Warns if a given bank is not what training draws from.

    Args:
        bank: The bank.
        x1: Samples of a training batch, (B, *).
        labels: Their labels, or None.
        class_wise: Whether the posterior will be class-wise.
    """
    if class_wise and labels is None:
        rank_zero_warn(
            "The bank has labels, so the posterior is class-wise, but no labels were found in the "
            "training batch. If training is not class-conditional, say class_wise=False."
        )
    off = _nearest(bank, x1)
    if off < 0.05:
        return
    std = float(x1.detach().float().std())
    if not 0.8 * bank.std < std < 1.25 * bank.std:
        rank_zero_warn(
            f"The bank has a standard deviation of {bank.std:.4g}, the training batch one of "
            f"{std:.4g}, and its samples are not rows of the bank. If one of them is scaled or "
            "normalised and the other is not, every measured boundary is wrong: build the bank "
            "from the latents that are trained on."
        )
    else:
        rank_zero_warn(
            "Samples of the training batch are not rows of the bank: the nearest row is off by "
            f"{off:.0%} of their norm. Flips, augmentation, another VAE sample or another data "
            "set? The boundary measured is that of the bank."
        )


@torch.no_grad()
def check_rows(bank: LatentBank, x1: Tensor, *, known: bool = False, shard: bool = False) -> None:
    """Holds what a scheme is given against the bank its oracle asks, and warns of what is no row.

    Refused is a scale that no row explains: most samples are no rows, and the distance of the
    median one from the bank's centre is more than 1.5 times that of the median row, and above that
    of 99 % of the rows; or below in the same way. Augmented and resampled samples are not so far
    off.

    Args:
        bank: The bank.
        x1: Samples of the first training step, (B, *), as the scheme was given them.
        known: Whether their rows are known, so that they stand in for these and nothing is warned
            of. Default False.
        shard: Whether the bank is only this rank's part of one, in which samples are not looked up.
            Default False.

    Raises:
        ValueError: On another scale than the bank's, or another shape.
    """
    missing = torch.ones(len(x1), dtype=torch.bool) if shard else bank.find(x1).cpu() < 0
    if not missing.any():
        return
    share, others = float(missing.float().mean()), x1[missing.to(x1.device)].to(bank.device)
    distance = (others.flatten(1).double() - bank.centre).norm(dim=1).median()
    further = float((bank.sq_norms > distance.square()).double().mean())
    ratio = float(distance / bank.sq_norms.median().sqrt().clamp_min(1e-30))
    if share > 0.5 and (ratio > 1.5 and further < 0.01 or ratio < 1 / 1.5 and further > 0.99):
        raise ValueError(
            f"Expected samples at the scale of the bank, got {share:.0%} that are no rows of it, "
            f"{ratio:.3g} times as far from its centre as its rows: the oracle's targets would be "
            "wrong. Build the bank from the latents that are trained on, as the model sees them "
            "(scaled, normalised)."
        )
    if not shard and not known:
        rank_zero_warn(
            f"StageScheme: {share:.0%} of the samples in the first step are no rows of the bank, "
            "and each of them joins its rows: the nearest row is off by "
            f"{_nearest(bank, others):.0%} of their norm. Flips, augmentation, another VAE sample "
            "or another data set? Build the bank from what is trained on; give the `source` of "
            "resampled latents, which then take the place of their row; or refuse them: "
            'Scheme(on_missing="error").'
        )


def _nearest(bank: LatentBank, x1: Tensor) -> float:
    """The median distance of a few samples from their nearest rows, as a share of their norm."""
    # On the linear path t = 1 has no noise at all: the posterior mean is the nearest row.
    few = x1[:16].detach().to(bank.device, torch.float32)
    nearest = Oracle(bank, LinearPath()).posterior(few, torch.ones(len(few), device=few.device))
    gap = (nearest.mean - few).flatten(1).norm(dim=1).median()
    return float(gap / few.flatten(1).norm(dim=1).median().clamp_min(1e-30))
