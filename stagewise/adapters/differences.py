"""How bank, batch and noise differ from those of training, as its first step shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stagewise.adapters.first_step import FirstStep
from stagewise.adapters.fitting import flip_of
from stagewise.adapters.rows import place_of
from stagewise.bank import LatentBank
from stagewise.masks import fitted
from stagewise.schemes.refusals import check_rows, distance_from_rows

__all__ = ["compare", "difference", "other_rows", "several"]


_SHOW = (
    "The samples of the first step are no rows of the bank, and `step` was given no batch to "
    "compare them with: watch.step(step, batch)."
)
_FAR = 0.1
"""Relative distance from which a sample is no row at all, but of another encoder, for example."""
_MANY = 8
"""With so many samples, not all are flipped or changed by chance."""


def several(look: FirstStep, asks: str) -> str:
    """A message if the first step called several makers; the callback `asks` must choose one."""
    names = [maker.name for maker in look.called]
    if len(names) < 2:
        return ""
    return (
        f"Expected the first step to call one target maker, got {' and '.join(names)}. Say which "
        f'to measure: {asks}(target_maker="{names[0]}").'
    )


def compare(look: FirstStep, given: Sequence[LatentBank]) -> tuple[list[str], str]:
    """How bank and noise differ from those of training: warnings, and a log line or ""."""
    warnings, note, x1 = [look.tied] if look.tied else [], "", look.trained_x1
    diagnosis = look.search.diagnosis() if look.seen is None else ""
    if diagnosis:
        warnings.append(f"What is measured is not what is trained on: {diagnosis}")
    elif x1 is None and look.x1 is not None:
        note = (
            "x_1 as in the batch, not checked: the training step shows neither its x_1 nor a call "
            "of its network."
        )
    x1 = look.x1 if x1 is None else x1
    if x1 is not None and not look.swapped:
        shapes = {tuple(x.shape[1:]) for x in (x1, look.x1) if x is not None}
        warnings += filter(None, (_unlike_bank(bank, x1, shapes) for bank in given))
    return warnings, note


def difference(
    look: FirstStep, x1: Tensor, read: LatentBank | None = None, *, encoded: bool = False
) -> tuple[str, bool]:
    """How samples of the step, `x1` (B, *), differ from those that were read from the batches.

    A message with the cure, and whether they certainly differ. `read` is the bank that was read;
    `encoded`: through the encoding of the step.
    """
    if look.swapped:
        return look.tied, True
    if look.x1 is None:
        return _SHOW, True
    maker = "" if look.seen is None else f", and {look.seen[0].name} is given other samples"
    place, other = look.x1_at or "batch[0]", place_of(x1, look.batch)
    if other and other != look.x1_at:
        find = f"read_batch=lambda batch: ({other}, {look.labels_at})"
        return (
            f"Training is not on what was read from the batches{maker}: {other}, and not "
            f"{look.x1_at or 'what `read_batch` returns'}. Say so: {find}.",
            True,
        )
    if look.encoding is not None and not encoded:
        return (
            f"Training is not on what was read from the batches{maker}: training "
            f"{look.encoding.verb} x_1. Say so: {look.encoding.line}, or give what is trained on: "
            "bank=LatentBank(latents, labels).",
            True,
        )
    # The tensors of the step may be freed by now; those of the network's call were compared in it.
    why = look.search.reasons.origin(x1, place, look.x1) or look.search.diagnosis()
    cure = (
        "give what is trained on, bank=LatentBank(latents, labels), or say how it is made of x_1: "
        "encode=lambda x, module: ..."
    )
    if other:
        maker = f" (the step changes {place} in place)"
    alike = x1.shape[1:] == look.x1.shape[1:]
    flip = flip_of(x1, look.x1) if alike else ""
    if not why and flip:
        cure = (
            f"all samples of the first step are flipped alike. If they always are, say so: "
            f"read_batch=lambda batch: ({place}{flip}, {look.labels_at}); if at random, flip in "
            "the data set, or put both into a bank: StageRun(bank=LatentBank(latents, labels))"
        )
    elif not why and alike:
        cure = f"if it augments (flips, noise), expect little of the data end; if not, {cure}"
    certain = bool(why) or not alike
    if read is not None and not certain:
        try:  # augmented samples are at the scale of the bank, encoded ones are not
            check_rows(read, x1)
        except ValueError:
            certain = True
        missing = (read.find_near(x1) < 0).all() if len(x1) >= _MANY else False
        off = distance_from_rows(read, x1) if missing else 0.0
        if off > _FAR:
            certain, far = True, f"no sample is near a row, the nearest is off by {off:.0%}; "
            cure = far + cure.replace("expect little of the data end", "do that in the data set")
    return (
        f"Training is not on what was read from the batches{maker}: {why or cure}",
        certain,
    )


def other_rows(look: FirstStep, read: LatentBank, *, exact: bool) -> str:
    """How many samples of the first step are no rows of what was read; empty if none.

    Raises:
        ValueError: If they are at another scale, and the measurement must be `exact`.
    """
    x1 = look.x1 if look.trained_x1 is None else look.trained_x1
    if x1 is None or look.swapped or read.origin:
        return ""
    x1 = fitted(x1, look.masks or look.labels, read.shape)[0]
    missing = float((read.find(x1) < 0).float().mean())
    if not missing:
        return ""
    if exact:
        check_rows(read, x1)
    return (
        f"{missing:.0%} of the samples in the first step are no rows of the bank, which was read "
        "from the loader. If they are augmented, expect little of the data end; if the loop draws "
        "from another loader, give that one: Watch(model, loader, ...)."
    )


def _unlike_bank(bank: LatentBank, x1: Tensor, shapes: set[tuple[int, ...]]) -> str:
    """How samples that are trained on differ from a bank that was given; empty if they do not."""
    shape = tuple(x1.shape[1:])
    if bank.shape not in shapes:
        raise ValueError(
            f"The bank has samples of shape {bank.shape}, the training batch of shape {shape}. "
            "Build the bank from the same latents, or say which tensor of the batch is x_1: "
            "StageRun(read_batch=lambda batch: (batch[0], None))."
        )
    if shape != bank.shape:
        return (
            f"Training is on samples of shape {shape}, and the bank holds those "
            f"of the batch, of shape {bank.shape}: what is measured is not what is trained on. "
            "Give the bank of what is trained on: StageRun(bank=LatentBank(latents, labels))."
        )
    off, std = distance_from_rows(bank, x1), float(x1.detach().float().std())
    if off < 0.05:
        return ""
    if not 0.8 * bank.std < std < 1.25 * bank.std:
        return (
            f"The bank has a standard deviation of {bank.std:.4g}, the training batch one of "
            f"{std:.4g}, and its samples are not rows of the bank. If only one of them is scaled "
            "or normalised, every measured boundary is wrong: build the bank from the latents that "
            "are trained on."
        )
    return (
        "Samples of the training batch are not rows of the bank: the nearest row is off by "
        f"{off:.0%} of their norm. Flips, augmentation, another VAE sample or another data "
        "set? The boundary measured is that of the bank."
    )
