"""What the network of a run returns, held against the gradient of its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagewise.adapters.base import TargetMaker
from stagewise.adapters.lines import where
from stagewise.callbacks.ranks import rank_zero_info, rank_zero_warn
from stagewise.schemes import Phases, Scheme, mixes

if TYPE_CHECKING:
    from stagewise.callbacks.run import StageRun

__all__ = ["check_answer"]


def check_answer(run: StageRun) -> None:
    """After the first backward pass: says what the answer of the network is, or that it is unsure.

    A collective; costs a device sync. Where the step makes its prediction of another one, the
    network is read so from here on, before anything is measured.
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
            "the step makes its prediction of the answer in another way, all that is said of the "
            f"model is wrong; say how, with the answer in: {name}({first.line}). If the loss has "
            "large terms besides that error, or is of mixed targets, say that line as it is."
        )
    else:
        rank_zero_info(
            f"{about} is taken as predicting the {kind} (not checked). If the step makes that of "
            f"its answer, say how, with its answer in: {name}({first.line})."
        )


def _written(reads: TargetMaker) -> str:
    minus = reads.convention.sign_of(reads.prediction) < 0
    return f"{'minus ' if minus else ''}the {reads.prediction.kind}"


def _mixed(run: StageRun, x1: Tensor) -> tuple[bool, Tensor | None]:
    """Whether it is known what the targets were, and what schemes have added to them."""
    own = (getattr(maker.place.object, "scheme", None) for maker in run.makers)
    schemes = [*run.look.schemes, *(one for one in own if isinstance(one, Scheme | Phases))]
    for scheme in schemes if any(map(mixes, schemes)) else ():
        last = scheme.last
        if last is not None and last.x1.shape == x1.shape and torch.equal(last.x1, x1):
            return True, last.added
    return not any(map(mixes, schemes)), None
