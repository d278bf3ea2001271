"""What the first training step shows of a run: the x_1, x_t and t that are really trained on.

`FirstStep` watches the calls of target makers and of submodules. They show the network, what it is
conditioned on, and whether bank and path are those of training and noise is independent of data.
The batch alone does not: a module may scale or encode it, train on another tensor of it, count time
the other way, or couple noise with data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from stagewise.adapters.base import Seen, TargetMaker, watched
from stagewise.adapters.batch_samples import BatchSamples
from stagewise.adapters.encoding import Encoding, origin_of
from stagewise.adapters.find import assumed_makers
from stagewise.adapters.fitting import factor_of
from stagewise.adapters.hooks import CallHook
from stagewise.adapters.network import Network
from stagewise.adapters.network_search import NetworkSearch
from stagewise.adapters.reasons import GIVEN
from stagewise.adapters.rows import equals, is_label
from stagewise.bank import LatentBank
from stagewise.batches import ReadBatch, describe, find_sample, leaves_of, read_checked, unused_in
from stagewise.conventions import Convention
from stagewise.masks import plain
from stagewise.noise import NoiseSums, is_noise
from stagewise.paths import Path
from stagewise.schemes import Phases, Scheme, parts
from stagewise.schemes.conditions import check_network
from stagewise.schemes.refusals import check_labels
from stagewise.schemes.smoothed import SmoothedSamples

__all__ = ["PATIENCE", "FirstStep"]

PATIENCE = 20
"""Steps without labels after which a network that accepts some is taken not to be given any."""


class FirstStep(BatchSamples):
    """Watches the first step of a training without changing it.

    Args:
        module: What is trained.
        makers: What may make its targets (`find_target_makers`).
        path: The path of training, where no maker says it.
        read_batch: From a batch to `(x_1, labels or None)`.
        convention: The convention of a step that makes its target by hand, if it is known.
        trains: Whether calls belong to training now, default always.

    Attributes (besides those of `BatchSamples`):
        network: What predicts, once `finish` was called; None if it was not found.
        conditions: What the network is given besides x_t, time and class labels, for messages.
        search: The search for the network; its `result` says what is wrong if there is none.
        called: Each `StageTarget` that the first step called.
        encoding: How what is trained on was made from x_1 of the batch; None if it is x_1, or
            not known.
        tied: What is wrong with the noise of the first call; empty if nothing is.
        schemes: What steers.
        open: Whether a later step may give the network more: it accepts more, and the batch holds
            more. A step may drop labels for classifier-free guidance.
        looked: Number of later calls that gave it no more.
        trains_encoder: Whether x_1 is made by weights that are trained.
        swapped: Whether the maker of the targets is given data as noise, and noise as data.
    """

    search: NetworkSearch

    def __init__(
        self,
        module: nn.Module,
        makers: Sequence[TargetMaker],
        path: Path,
        read_batch: ReadBatch,
        convention: Convention | None = None,
        trains: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(read_batch)
        self._module, self._trains = module, trains
        self._asks = read_batch is not find_sample  # it may encode, and draw
        # Makers that can be steered come first.
        able = [maker for maker in makers if not maker.refusal] or list(makers)
        by_hand = convention is not None or not able
        self._makers = assumed_makers(path, convention) if by_hand else able
        self.network: Network | None = None
        self.conditions: tuple[str, ...] = ()
        self.schemes: list[Scheme | Phases] = []
        self.swapped = self.open = self.trains_encoder = False
        self.looked = 0
        self._before_smoothing: Tensor | None = None
        self._later: CallHook | None = None
        self._on_seen: Callable[[Tensor], None] | None = None
        self._reset()
        self._detach = [maker.observe(partial(self._tell, maker)) for maker in able]

    def _reset(self) -> None:
        self.tied, self.seen = "", None
        self.encoding: Encoding | None = None
        self.called: list[TargetMaker] = []
        self._maker: TargetMaker | None = None
        self._sums: NoiseSums | None = None

    @override
    def begin(self, batch: Any) -> None:
        super().begin(batch)
        if self._finished:
            self.seen = None

    def watch(
        self,
        on_seen: Callable[[Tensor], None] | None = None,
        bank: Callable[[], LatentBank | None] = lambda: None,
    ) -> None:
        """Finds x_1 in the first batch before it is trained on, and begins to watch.

        `on_seen` is called with the x_1 of the first target, before the target is made. A batch
        without x_1 raises a ValueError after watching has begun.
        """
        self._stop_search()
        self._reset()
        self._on_seen, self._sums = on_seen, NoiseSums()
        try:
            self._find_first(bank)
        finally:
            self.search = NetworkSearch(
                self._module,
                self._makers,
                self._candidates,
                self.masks or self.labels,
                labels_name=self.labels_at if self.labels_at != "None" else "batch[1]",
                batch=self.batch,
                seen=lambda: self.seen,
            )

    def _tell(self, maker: TargetMaker, seen: Seen) -> None:
        if not self._trains():
            return
        if self.batch is None:
            self.take(seen)
        if self._sums is not None and seen.x0 is not None and self._maker in (None, maker):
            masks = self.masks_of_batch()
            if masks is None or len(masks) == len(seen.x1):
                self._sums.add(seen.x0, seen.x1, masks)
        if maker.late and maker not in self.called:
            self.called.append(maker)
        # The first call stands for the batch: others are for its other parts.
        if self.seen is not None or (self._finished and not self._follows):
            return
        # A scheme may write the target into it.
        drawn = self._drawn()
        smoothed = drawn is not None and drawn.x1.data_ptr() == seen.x1.data_ptr()
        x1 = seen.x1.clone()
        self.seen = maker, replace(seen, x1=x1)
        self._before_smoothing = drawn.before.clone() if drawn and smoothed else None
        if self._finished:
            return
        self.swapped = False
        if seen.x0 is not None and self.x1 is not None and self.changed(seen.x1):
            noise_last = not is_noise(seen.x0) and is_noise(seen.x1)
            self.swapped = noise_last or factor_of(seen.x0, self.x1) is not None
        self._maker, self.tied = maker, self._wrong_noise(maker)
        x1 = x1 if self._before_smoothing is None else self._before_smoothing
        self.trace(x1)
        labels = self.labels_for(x1) if self.batch is not None else self.masks or self.labels
        if labels is not None:
            self.search.labels = labels
        self.trains_encoder = _from_weights(seen.graph) and self.changed(x1)
        if self._on_seen is not None:
            self._on_seen(x1)

    def trace(self, x1: Tensor) -> None:
        """Finds how the first step made `x1` from x_1 of the batch, if they differ."""
        own = self.x1
        if own is not None and self.search.encoders is not None and not equals(x1, own):
            self.encoding = origin_of(x1, own, self.search.encoders)
        self.search.encoders = None

    @property
    def happened(self) -> bool:
        """Whether the current batch showed a target or a call of the network."""
        return self.seen is not None or (hasattr(self, "search") and self.search.first is not None)

    def finish(self) -> None:
        """Takes the hooks off, and notes the network and its conditions."""
        self._stop_search()
        first = self.search.first
        self.network = None if first is None or first.inner else first.network
        if self.network is not None:
            self.conditions = self.network.conditions
        elif self.seen is not None:
            given = self.seen[1].conditions
            self.conditions = tuple(
                f"{name}: {describe(x)}" for name, x in given if not is_label(x)
            )
        in_place, self._finished = self._changed_in_place(), True
        if self.network is not None and self.network.optional:
            labelled = self.labels is not None and not self.network.conditional
            self.open = (
                labelled
                or self.x1 is None
                or bool(unused_in(self.batch, self.x1, self.labels, self.masks))
            )
        # Later samples that are not those of the batch are read where the targets are made.
        trained = self.trained_x1
        another = trained is None or self.x1 is None or not equals(trained, self.x1)
        self._follows = self.seen is not None and (bool(in_place) or another or self._asks)
        if trained is not None and not self.changed(trained):
            self._kept = in_place
        if self.tied or self.seen is None or self.seen[1].x0 is None:
            self._sums = None
        self._stop_following()

    def look_on(self) -> None:
        """Before a later batch: watches whether the network is given more than before."""
        if self.open and self.network is not None:
            self._later = CallHook(self._look, self.network.module.register_forward_pre_hook)

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        network = self.network
        if not self.open or network is None or module is not network.module or not watched():
            return
        self.looked += 1
        more = network.given_more(
            args, kwargs, lambda: read_checked(self._find, self.batch)[1], self.batch
        )
        if more is not None:
            self.network, self.conditions, self.open = more, more.conditions, False

    def stop_looking(self) -> None:
        """After a later batch."""
        if self._later is not None:
            self._later.remove()

    @property
    def waiting(self) -> bool:
        """Whether a later step may still give the network more."""
        return self.open and self.looked < PATIENCE

    def forget(self) -> None:
        """Frees the recorded calls and their graph; what they showed stays."""
        self._stop_search()
        if not self.open and hasattr(self, "search"):
            del self.search

    def stop(self) -> None:
        """Takes all hooks off, and drops the bank."""
        self._stop_search()
        self.stop_looking()
        self._follows, self._sums, self._bank = False, None, lambda: None
        self._stop_following()

    def _stop_search(self) -> None:
        if hasattr(self, "search"):
            self.search.stop()

    def _stop_following(self) -> None:
        """Takes the hooks off the target makers once they are no longer needed."""
        if self._follows or self._sums is not None:
            return
        for detach in self._detach:
            detach()
        self._detach = []

    def _candidates(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of everything that may be x_1, the likeliest first."""
        given = self._changed_x1() if self.seen is None else self.seen[1].x1
        own = self.x1_at or "batch[0]"
        others = (pair for pair in leaves_of(self.batch) if pair[0] != self.x1_at)
        found = ((GIVEN, given), (own, self.x1), *others)
        return [
            (at, x) for at, x in found if x is not None and x.is_floating_point() and x.ndim > 1
        ]

    @property
    def trained_x1(self) -> Tensor | None:
        """x_1 of the first batch as it is trained on, (B, *), before smoothing; None if unknown."""
        if self.seen is not None:
            return self.seen[1].x1 if self._before_smoothing is None else self._before_smoothing
        return self._changed_x1() if self.search.first is None else self.search.first.x1

    def x1_of_batch(self) -> Tensor:
        """x_1 of the current batch as it is trained on, (B, *), after smoothing."""
        drawn = self._drawn()
        if drawn is not None:
            return drawn.x1
        if self._follows and self.seen is not None:
            return self.seen[1].x1
        return self._find(self.batch)[0]

    def _drawn(self) -> SmoothedSamples | None:
        """What a scheme has smoothed last, if one does."""
        return next((s.drawn for s in self.schemes if s.smoothing is not None), None)

    def _wrong_noise(self, maker: TargetMaker) -> str:
        """What is wrong with the noise so far; empty if nothing is."""
        about = f"The posterior that is measured is not that of {maker.name}: "
        if self.swapped:
            return (
                f"{about}it got the samples of the batch as x0 and noise as x1, so it goes from "
                "data to noise, and t = 1 is noise. Expected noise first: "
                "x0 = torch.randn_like(x1), then the samples x1."
            )
        try:
            if self._sums is not None:
                self._sums.check()
        except ValueError as error:
            return f"{about}{error}"
        return ""

    def noise_so_far(self, *, last: bool) -> str:
        """What is wrong with the noise so far; empty if nothing is. Costs one device sync.

        After the `last` check the noise is no longer recorded.
        """
        wrong = "" if self._maker is None else self._wrong_noise(self._maker)
        if wrong or last:
            self._sums = None
            self._stop_following()
        return wrong

    def check_conditions(self, scheme: Scheme | Phases) -> str:
        """Compares what the network is given with the rows of targets: a warning, or ""."""
        labelled = None if self.network is None else self.network.conditional
        warning = check_network(parts(scheme), self.conditions, labelled)
        if warning or self.network is None:
            return warning
        return self._other_condition(parts(scheme), self.network)

    def check_labels(self, *, mixes: bool) -> None:
        """Refuses labels given to a `StageTarget` that are not those of x_1.

        Labels of no class in the bank count only if the scheme `mixes`.
        """
        x1, seen, bank = self.trained_x1, self.seen, self._bank()
        given = dict(seen[1].conditions).get("labels") if seen and seen[0].late else None
        own = None if x1 is None else plain(self.labels_for(x1))
        if given is None or own is None or not is_label(given):
            return
        given, classes = given.detach().cpu(), [] if bank is None else bank.classes
        if not mixes and classes:
            inside = torch.isin(given, torch.tensor(classes))
            given = torch.where(inside.reshape(-1), given.reshape(-1), own.cpu())
        oracles = [part.oracle for one in self.schemes for part in parts(one) if part.oracle]
        null = next((o.null_class for o in oracles if o.null_class is not None), None)
        check_labels(given, own.cpu(), classes, null)


def _from_weights(node: Any) -> bool:
    """Whether a graph leads to weights that are trained."""
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        left += [before for before, _ in node.next_functions]
    return False
