"""What the first training step shows of a run: the x_1, x_t and t that are really trained on.

What makes the targets is looked at as it is called, and the calls of submodules with it. From both
follow the network, what it is conditioned on, and whether bank, path and independence of noise and
data are those of the training. A module may scale or encode its batch, train on another tensor of
it, count time the other way, or couple noise with data: none of it shows in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stagewise.adapters.base import Seam, Seen, check_independent, check_noise, looks, parts
from stagewise.adapters.find import assumed_seams
from stagewise.adapters.fitting import factor_of
from stagewise.adapters.network import GIVEN, Network, NetworkSearch
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, describe, find_checked, leaves_of, unused_in
from stagewise.paths import Path
from stagewise.schemes.checks import check_rows, distance_from_rows

if TYPE_CHECKING:
    from stagewise.schemes import Phases, Scheme

__all__ = ["PATIENCE", "FirstStep"]

PATIENCE = 20
"""Steps without labels after which a network that accepts some is taken not to be given any."""


class FirstStep:
    """Looks at the first step of a training, without changing a bit of it.

    Args:
        module: What is trained.
        seams: What may make its targets (`find_seams`).
        path: The path of training, where no seam says it.
        find: From a batch to `(x_1, labels or None)`.

    Attributes:
        batch: The present batch; the loop sets it.
        x1: Its x_1 as `find` has it, (B, *); None if there is none.
        labels: Its labels, (B,), or None.
        network: What predicts, once `finish` was called; None if it was not found.
        conditions: What the network is given besides x_t, time and class labels, for messages.
        open: Whether the network accepts more than it was given so far, and the batch holds more:
            what a step drops for classifier-free guidance may be given in a later one.
        looked: In how many later calls it was given no more.
        swapped: Whether what makes the targets is given data for noise, and noise for data.
    """

    def __init__(
        self, module: nn.Module, seams: Sequence[Seam], path: Path, find: FindSample
    ) -> None:
        self._module, self._find = module, find
        # What cannot be steered yields to what can.
        able = [seam for seam in seams if not seam.refusal] or list(seams)
        self._seams = able or assumed_seams(path)
        self.batch: Any = None
        self.x1: Tensor | None = None
        self.labels: Tensor | None = None
        self.network: Network | None = None
        self.conditions: tuple[str, ...] = ()
        self._search: NetworkSearch | None = None
        self._seen: tuple[Seam, Seen] | None = None
        self._noise: list[str] = []
        self.swapped = self.open = False
        self.looked = 0
        self._later: Callable[[], None] | None = None
        self._follows = False
        self._on_seen: Callable[[Tensor], None] | None = None
        self._detach = [seam.observe(self._teller(seam)) for seam in able if seam.observable]

    def _teller(self, seam: Seam) -> Callable[[Seen], None]:
        def tell(seen: Seen) -> None:
            first = self._seen is None
            if not first and not self._follows:
                return
            if first:
                self.swapped = self._is_swapped(seen)
                self._noise = _look_at_noise(seam, seen, swapped=self.swapped)
            # What steers may write the target into it.
            self._seen = seam, replace(seen, x1=seen.x1.clone())
            if first and self._on_seen is not None:
                self._on_seen(self._seen[1].x1)

        return tell

    def watch(self, on_seen: Callable[[Tensor], None] | None = None) -> None:
        """Before a first batch is trained on: finds x_1 in it, and begins to look.

        Args:
            on_seen: Called with the x_1 that what makes the targets is given, before it makes any.

        Raises:
            ValueError: If the batch holds no x_1; looking has begun all the same.
        """
        self.stop_search()
        self._seen = self.x1 = self.labels = None
        self._on_seen = on_seen
        try:
            self.x1, self.labels = find_checked(self._find, self.batch)
        finally:
            self._search = NetworkSearch(
                self._module,
                self._seams,
                self._candidates,
                self.labels,
                conditions="tile",
                labels_name=self._place(self.labels) or "batch[1]",
                batch=self.batch,
            )

    def _is_swapped(self, seen: Seen) -> bool:
        if seen.x0 is None or self.x1 is None or not self.changed(seen.x1):
            return False
        return factor_of(seen.x0, self.x1) is not None or (
            not _is_noise(seen.x0) and _is_noise(seen.x1)
        )

    def _candidates(self) -> list[tuple[str, Tensor]]:
        """What may be x_1, as one would write it, the likeliest first."""
        found = [] if self._seen is None else [(GIVEN, self._seen[1].x1)]
        if self.x1 is not None:
            found.append((self._place(self.x1) or "batch[0]", self.x1))
        for place, leaf in leaves_of(self.batch):
            if leaf.is_floating_point() and leaf.ndim > 1 and leaf is not self.x1:
                found.append((place, leaf))
        return found

    @property
    def tied(self) -> str:
        """What is wrong with the noise of the first call that was seen; empty if nothing is."""
        return self._noise[0] if self._seen is not None and self._noise else ""

    @property
    def happened(self) -> bool:
        """Whether anything was seen of the training in the present batch."""
        return self._seen is not None or (
            self._search is not None and self._search.found is not None
        )

    def finish(self) -> None:
        """Takes the hooks off, and notes the network and its conditions."""
        self.stop_search()
        self.network = None if self.search.inner else self.search.found
        if self.network is not None:
            self.conditions = self.network.conditions
        elif self._seen is not None:
            given = self._seen[1].conditions
            self.conditions = tuple(f"{name}: {describe(x)}" for name, x in given if not _label(x))
        network = self.network
        if network is not None and network.optional:
            labelled = self.labels is not None and not network.conditional
            self.open = (
                labelled or self.x1 is None or bool(unused_in(self.batch, self.x1, self.labels))
            )
        # Later samples are taken where they are seen, if they are not those of the batch.
        self._follows = self._seen is not None and self.changed(self._seen[1].x1)
        if not self._follows:
            self.stop()

    def look_on(self) -> None:
        """Before a later batch: looks whether the network is given more than in those before."""
        if self.open and self.network is not None:
            module = self.network.module
            self._later = module.register_forward_pre_hook(self._look, with_kwargs=True).remove

    @property
    def waiting(self) -> bool:
        """Whether it is too early to say that the network is given no more."""
        return self.open and self.looked < PATIENCE

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        network = self.network
        if not self.open or network is None or module is not network.module or not looks():
            return
        self.looked += 1
        more = network.given_more(
            args, kwargs, lambda: find_checked(self._find, self.batch)[1], self.batch
        )
        if more is not None:
            self.network, self.conditions, self.open = more, more.conditions, False

    def stop_looking(self) -> None:
        """After a later batch."""
        if self._later is not None:
            self._later()
        self._later = None

    @property
    def search(self) -> NetworkSearch:
        """The search for the network; its `result` says what is wrong if there is none."""
        assert self._search is not None
        return self._search

    @property
    def trained_x1(self) -> Tensor | None:
        """x_1 of the first batch as it is trained on, (B, *); None if that was not seen."""
        if self._seen is not None:
            return self._seen[1].x1
        return None if self.search.found is None else self.search.x1

    def x1_of_batch(self) -> Tensor:
        """x_1 of the present batch as it is trained on, (B, *)."""
        if self._follows and self._seen is not None:
            return self._seen[1].x1
        return self._find(self.batch)[0]

    def changed(self, x1: Tensor) -> bool:
        """Whether samples are others than x_1 of the batch."""
        own = self.x1
        return own is None or own.shape != x1.shape or not torch.equal(own.to(x1), x1)

    def stop_search(self) -> None:
        """Takes the hooks of the search off."""
        if self._search is not None:
            self._search.stop()

    def stop(self) -> None:
        """Takes all hooks off."""
        self.stop_search()
        self.stop_looking()
        for detach in self._detach:
            detach()
        self._detach = []

    # -- what is not as it was taken to be --------------------------------------------------------

    def compare(self, given: Sequence[LatentBank]) -> tuple[list[str], str]:
        """What of the bank and of the noise is not that of the training.

        Args:
            given: Banks that the user gave.

        Returns:
            Warnings, and a line for the log, which may be empty.

        Raises:
            ValueError: If neither the batch nor the step holds samples of a given bank's shape.
        """
        warnings, note, x1 = [], "", self.trained_x1
        if self._seen is not None:
            warnings += self._noise
        diagnosis = self.search.diagnosis() if self._seen is None else None
        if diagnosis is not None:
            warnings.append(f"What is measured is not what is trained on: {diagnosis.message}")
        elif x1 is None and self.x1 is not None:
            note = (
                "x_1 as in the batch, not checked: the training step shows neither its x_1 nor a "
                "call of its network that could be recognised."
            )
        for bank in given if not self.swapped else ():
            warnings += self._hold(bank, x1 if x1 is not None else self.x1)
        return warnings, note

    def _hold(self, bank: LatentBank, x1: Tensor | None) -> list[str]:
        """Holds samples against a bank that was given."""
        if x1 is None:
            return []
        if tuple(x1.shape[1:]) != bank.shape:
            if self.x1 is None or tuple(self.x1.shape[1:]) != bank.shape:
                raise ValueError(
                    f"The bank has samples of shape {bank.shape}, the training batch of shape "
                    f"{tuple(x1.shape[1:])}. Build the bank from the same latents, or say which "
                    "tensor of the batch is x_1: StageRun(find=lambda batch: (batch[0], None))."
                )
            return [
                f"Training is on samples of shape {tuple(x1.shape[1:])}, and the bank holds those "
                f"of the batch, of shape {bank.shape}: what is measured is not what is trained on. "
                "Give the bank of what is trained on: StageRun(bank=LatentBank(latents, labels))."
            ]
        off, std = distance_from_rows(bank, x1), float(x1.detach().float().std())
        if off < 0.05:
            return []
        if not 0.8 * bank.std < std < 1.25 * bank.std:
            return [
                f"The bank has a standard deviation of {bank.std:.4g}, the training batch one of "
                f"{std:.4g}, and its samples are not rows of the bank. If one of them is scaled or "
                "normalised and the other is not, every measured boundary is wrong: build the bank "
                "from the latents that are trained on."
            ]
        return [
            "Samples of the training batch are not rows of the bank: the nearest row is off by "
            f"{off:.0%} of their norm. Flips, augmentation, another VAE sample or another data "
            "set? The boundary measured is that of the bank."
        ]

    def check_conditions(self, scheme: Scheme | Phases) -> str:
        """Holds what the network is given against the rows that the targets of a scheme are of.

        Args:
            scheme: Whose targets the network is trained on.

        Returns:
            A warning if the network was not recognised, or else an empty text.

        Raises:
            ValueError: If the network is given more than labels, or labels that the bank has not.
        """
        mixing = [part for part in parts(scheme) if part.target is not None]
        if not mixing or all(part.unconditional for part in mixing):
            return ""
        given = self.conditions
        if not given and self.network is None:
            return (
                "the call of the network was not recognised, so it is not known what "
                "the model is conditioned on. Targets of the oracle are right for a model that is "
                "given x_t, t and the classes of the bank. For one that is given more (text, an "
                "image beside x_t) they move the optimum: steer times and weights only. If it is "
                "given nothing else, or ignores it, say so: class_wise=False."
            )
        if not given and self.network is not None and self.network.conditional:
            given = () if all(part.class_wise for part in mixing) else ("labels",)
        if given:
            has = "has no labels" if given == ("labels",) else "knows nothing of that"
            raise ValueError(
                f"The network is also given {', '.join(given)}, and the bank {has}: the oracle's "
                "target would be a mean over samples of all conditions, which moves the optimum of "
                "a model that uses them. Steer timesteps and weights only, give the labels "
                "of classes to the bank, LatentBank(x, labels), or, if the model ignores what it "
                "is given: class_wise=False, as in StageScheme(target=..., class_wise=False)."
            )
        return ""

    def difference(self, x1: Tensor, read: LatentBank | None = None) -> tuple[str, bool]:
        """How samples of the step differ from those that were read from the batches.

        Args:
            x1: As they are trained on, (B, *).
            read: The bank of what was read.

        Returns:
            A message with the cure, and whether the shape or the scale is another one.
        """
        if self.swapped:
            return self._noise[0], True
        maker = "" if self._seen is None else f", and {self._seen[0].name} is given other samples"
        assert self.x1 is not None
        place, other = self._place(self.x1) or "batch[0]", self._place(x1)
        if other:
            find = f"find=lambda batch: ({other}, {self._place(self.labels) or None})"
            return (
                f"Training is not on what was read from the batches{maker}: {other}, and not "
                f"{place}. Say so: {find}.",
                True,
            )
        # What made x_1 may be gone by the end of the step; the network's call was looked at in it.
        why = self.search.origin(x1, place, self.x1) or self.search.diagnosis()
        cure = "give what is trained on: bank=LatentBank(latents, labels)."
        if why is None and x1.shape == self.x1.shape:
            cure = f"if it augments (flips, noise), expect little of the data end; if not, {cure}"
        certain = why is not None or x1.shape != self.x1.shape
        if read is not None and not certain:
            try:  # augmented samples are at the scale of the bank, encoded ones are not
                check_rows(read, x1)
            except ValueError:
                certain = True
        return (
            f"Training is not on what was read from the batches{maker}: "
            f"{cure if why is None else why.message}",
            certain,
        )

    def _place(self, tensor: Tensor | None) -> str:
        """Where a tensor lies in the batch, as one would write it; empty if it does not."""
        if tensor is None:
            return "None"
        for place, leaf in leaves_of(self.batch):
            same = leaf.shape == tensor.shape or leaf.numel() == tensor.numel() == len(tensor)
            if same and torch.equal(leaf.reshape(tensor.shape).to(tensor), tensor):
                return place
        return ""


def _is_noise(x: Tensor) -> bool:
    try:
        check_noise(x)
    except ValueError:
        return False
    return True


def _look_at_noise(seam: Seam, seen: Seen, *, swapped: bool) -> list[str]:
    """Warns of a source that is not noise, and of one that depends on the data."""
    if seen.x0 is None:
        return []
    if swapped:
        return [
            f"The posterior that is measured is not that of {seam.name}: it is given the samples "
            "of the batch as x0 and noise as x1, so that it goes from data to noise, and t = 1 is "
            "noise. Expected noise first: x0 = torch.randn_like(x1), then the samples x1."
        ]
    try:
        check_noise(seen.x0)
        check_independent(seen.x0, seen.x1)
    except ValueError as error:
        return [f"The posterior that is measured is not that of {seam.name}: {error}"]
    return []


def _label(x: Tensor) -> bool:
    """Whether a tensor that a model is given can be the class of each sample."""
    return not x.is_floating_point() and x.numel() == len(x)
