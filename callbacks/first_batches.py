"""What the first batches of a run show: what it takes from them, and what does not fit its bank.

A difference is a warning, or an error where it would make oracle targets or comparisons wrong.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagewise.adapters.base import TargetMaker
from stagewise.adapters.differences import compare, difference, other_rows, several
from stagewise.adapters.encoding import STALE
from stagewise.adapters.lines import where
from stagewise.batches import describe, unused_in
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.callbacks.target_maker import schemes_of
from stagewise.masks import compared_within, fitted, require_same_masks
from stagewise.schemes import mixes, parts
from stagewise.schemes.refusals import tell_rounding

if TYPE_CHECKING:
    from stagewise.callbacks.run import StageRun

__all__ = ["check_answer", "check_batch", "check_noise", "check_step", "refuse_other_rows"]


def check_batch(run: StageRun) -> None:
    """Before the first step: says what was found in its batch, and checks labels and masks."""
    look = run.look
    try:
        look.watch(lambda x1: _refuse_for_schemes(run, x1), run.bank_in_use)
    except ValueError:
        if look.batch is not None and not all(run.given(one) for one in run.measuring):
            raise
        found = "got no batch" if look.batch is None else "found no x_1 in the batch, "
        found += "" if look.batch is None else describe(look.batch)
        rank_zero_info(
            f"stagewise: {found}: only what the training step shows is compared with the bank."
        )
        return
    assert look.x1 is not None
    took = f"x_1 = {describe(look.x1)} and "
    took += "no labels" if look.labels is None else f"labels = {describe(look.labels)}"
    took += f", mask = {describe(look.masks.mask)}" if look.masks else ""
    kernels, c = [k for m in run.members if (k := run.option(m, "condition"))], None
    with suppress(ValueError):  # raised where it is needed
        c = look.condition_for(kernels[0], look.x1) if kernels else None
    took += "" if c is None else f", condition = {describe(c)}"
    rank_zero_info(f"stagewise: in {describe(look.batch)} took {took}")
    for note in unused_in(look.batch, look.x1, look.labels, look.masks, c):
        say = rank_zero_warn if run.exact and "which numbers" in note else rank_zero_info
        say(f"stagewise: {note}")
    for member in run.measuring:
        bank = run.bank(member)
        require_same_masks(bank, look.x1, look.masks)
        own = fitted(look.x1, look.masks or look.labels, bank.shape)[1]
        own = compared_within(own, run.class_wise(member))
        for label in set() if own is None else set(own.tolist()):
            bank.segment(label)


def _refuse_for_schemes(run: StageRun, x1: Tensor) -> None:
    """Refuses samples that no oracle target can be made for, before a scheme makes one."""
    look, asking, bank = run.look, run.asking, run.bank_in_use()
    mixes_any = any(member.mixes for member in run.members)
    if any(run.option(member, "class_wise") is not False for member in asking):
        look.check_labels(mixes=mixes_any)
    if mixes_any and bank is not None and bank.pairs and look.batch is None and look.masks is None:
        raise ValueError(
            "The bank has masks, and the step says nothing of them. Give them to what makes "
            "the targets, mask=mask, or show the batch: watch.step(step, batch)."
        )
    mixing = any(member.mixes and not run.given(member) for member in run.members)
    if look.trains_encoder and any(not run.given(member) for member in asking):
        if mixing:
            raise ValueError(STALE)
        rank_zero_warn(STALE)
    if mixing:
        refuse_other_rows(run, x1)
    for scheme in look.schemes:
        for part in parts(scheme):
            tell_rounding(part, x1)


def refuse_other_rows(run: StageRun, x1: Tensor) -> None:
    """Refuses samples of the first step that certainly differ from those that were read."""
    look = run.look
    if not look.changed(x1):
        return
    # `encode` is a collective, and the other ranks may not come here.
    if (run.host.world_size == 1 and run.encode()) or look.near(x1):
        return
    message, certain = difference(look, x1, run.bank_in_use())
    if certain:
        raise ValueError(message)


def check_step(run: StageRun) -> None:
    """In the first step: compares bank, path and noise with those of the training."""
    measuring, look = run.measuring, run.look
    if look.tied and run.exact:
        raise ValueError(look.tied)
    if not measuring:
        return
    if said := several(look, type(measuring[0]).__name__):
        if run.exact:
            raise ValueError(said)
        rank_zero_warn(said)
    given = [member for member in measuring if run.given(member)]
    read = [member for member in measuring if not run.given(member)]
    if look.x1 is not None and look.labels is None and any(map(run.class_wise, given)):
        rank_zero_warn(
            "The bank has labels, so the posterior is class-wise, but no labels were found in "
            "the training batch. If training is not class-conditional, say class_wise=False."
        )
    warnings, note = compare(look, list({id(b): b for b in map(run.bank, given)}.values()))
    for warning in warnings:
        rank_zero_warn(warning)
    if note:
        rank_zero_info(f"stagewise: {note}")
    if not read or (run.encoding is not None and run.encoding.draws):
        return  # of random draws `read_bank` has warned
    x1, bank, compares = look.trained_x1, run.bank(read[0]), any(one.compares for one in read)
    if x1 is not None and look.changed(x1) and not (look.swapped or look.near(x1)):
        message, certain = difference(look, x1, bank, encoded=run.encoding is not None)
        if certain and compares:
            raise ValueError(message)
        rank_zero_warn(message)
    elif not (run.host.feeds or run.has_option("read_batch", "encode")):
        mixing = any(member.mixes for member in run.members)
        if not mixing and (warning := other_rows(look, bank, exact=compares)):
            rank_zero_warn(warning)


def check_noise(run: StageRun, *, last: bool) -> None:
    """After some batches: compares their noise with that of the path."""
    wrong = run.look.noise_so_far(last=last)
    if wrong and run.exact:
        raise ValueError(wrong)
    if wrong and run.measuring and not run.tied:
        rank_zero_warn(wrong)


# -- what the network returns ---------------------------------------------------------------------


def check_answer(run: StageRun) -> None:
    """After the first backward pass: compares the network's answer with the gradient of the loss.

    A collective; costs a device sync. If the gradient shows that the network predicts something
    else than assumed, it is read so from here on, before anything is measured.
    """
    asking = [m for m in run.members if m.compares and getattr(m, "network", None) is not None]
    first = run.look.search.first if asking else None
    if first is None or first.gradients is None:
        return
    network, gradients = first.network, first.gradients
    votes = gradients.votes(*_mixed(run, first.x1))
    found = gradients.verdict(run.host.reduce(votes))
    kind, name = network.maker.prediction.kind, type(asking[0]).__name__
    about = f"stagewise: {where(network.name)}"
    if found is not None and found.reads is not None:
        known = found.reads is network.reads and found.at == network.at
        network.reads, network.at = found.reads, found.at
        made = "" if found.reads is network.maker else f", of which the step makes the {kind}"
        rank_zero_info(
            f"{about} predicts {_written(found.reads)}{made}, as the gradient of the loss says. "
            f"So it is asked: {name}({first.line})."
        )
        if not known:
            run.tell("reread")
    elif found is not None and found.doubted:
        rank_zero_warn(
            f"{where(network.name)} is taken as predicting the {kind}, and the gradient of the "
            f"loss contradicts: {found.share:.0%} of its signs are those of an error of that. If "
            "the step makes its prediction from the answer in another way, what monitors report of "
            "the model is wrong. Change this line so that it makes the prediction as the step "
            f"does: {name}({first.line}). If the loss has large terms besides that error, or is of "
            "mixed targets, the line is right as it is."
        )
    else:
        rank_zero_info(
            f"{about} is taken as predicting the {kind} (not checked). If the step makes that from "
            f"its answer, change this line accordingly: {name}({first.line})."
        )


def _written(reads: TargetMaker) -> str:
    minus = reads.convention.sign_of(reads.prediction) < 0
    return f"{'minus ' if minus else ''}the {reads.prediction.kind}"


def _mixed(run: StageRun, x1: Tensor) -> tuple[bool, Tensor | None]:
    """Whether it is known what the targets were, and what schemes have added to them."""
    schemes = schemes_of(run)
    for scheme in schemes if any(map(mixes, schemes)) else ():
        last = scheme.last
        if last is not None and last.x1.shape == x1.shape and torch.equal(last.x1, x1):
            return True, last.added
    return not any(map(mixes, schemes)), None
