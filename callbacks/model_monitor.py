"""`ModelMonitor`: a monitor that asks the model of the run for its velocity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.adapters.answers import tensor_of
from stagewise.adapters.lines import guessed_line
from stagewise.adapters.network import Network
from stagewise.batches import describe
from stagewise.callbacks.monitor import Monitor
from stagewise.callbacks.stage_callback import AskVelocity
from stagewise.callbacks.training_bank import Samples
from stagewise.conventions import DDPMPath
from stagewise.masks import MaskedLabels, fitted, masked, plain
from stagewise.stage_target import BY_HAND
from stagewise.undisturbed import in_eval_mode, same_draws
from stagewise.velocity_probe import Probe

__all__ = ["ModelMonitor"]


_FEW = 8
"""Below so many held-out samples, the log says that they are few."""


class ModelMonitor(Monitor):
    """Asks the network that was found in the first step, or the `velocity` that was given.

    Attributes:
        network: The network, None if a `velocity` was given.
        conditional: Whether the model is given labels; True for a given `velocity`.
        wise: Whether its posterior is over the rows of the sample's class.
        batch_size: Samples in the first batch of this process; `per_step`: in an optimizer step.
    """

    compares = True
    network: Network | None = None
    _given: AskVelocity | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.wise, self.conditional, self.batch_size, self.per_step = False, True, 0, 0

    def start(self) -> None:
        """Takes the oracle and samples; refuses couplings, which have no oracle."""
        super().start()
        run, self.network = self.run, None
        self._given = run.option(self, "velocity")
        if run.tied:
            name, _, reason = run.tied.partition(": ")
            raise ValueError(f"{name} has no oracle to compare with: {reason or run.tied}")
        self.oracle = run.oracle(self)
        self._take_samples()
        if self._given is not None:
            self._try_velocity(*self.rows(2))

    def _take_samples(self) -> None:
        """Reads the samples about which it asks the model."""

    def _try_velocity(self, xt: Tensor, labels: Any) -> None:
        """Checks a given `velocity` on two samples."""
        module, device = self.run.module, self.run.host.device
        xt, t = xt.to(device), torch.full((len(xt),), 0.5, device=device)
        y = None if labels is None else labels.to(device)
        try:
            with self.asked() as velocity:
                v = velocity(xt, t, y)
        except Exception as error:
            raise ValueError(
                f"`velocity` raised {type(error).__name__}: {error}, for xt = {describe(xt)}, "
                f"t = {describe(t)} and labels = {describe(y)}. Give the network what training "
                f"gives it, such as {guessed_line(module, labelled=y is not None)}."
            ) from error
        came = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        if came != tuple(xt.shape):
            raise ValueError(
                f"Expected `velocity` to return a tensor of shape {tuple(xt.shape)}, got {came}."
            )

    def settle(self) -> None:
        """Takes the network; a collective."""
        look, host, name = self.run.look, self.run.host, type(self).__name__
        first = look.search.first
        x1 = look.x1 if first is None else first.x1
        self.batch_size = 64 if x1 is None else len(x1)
        self.per_step = self.batch_size * host.world_size * host.accumulate
        if self._given is not None:
            with self.asked() as velocity:
                said = look.search.asked_otherwise(velocity)
            if said:
                self.warn(said)
            return
        told = self.run.option(self, "convention") is not None
        if not (told or look.called) and all(maker.late for maker in self.run.makers):
            why = f"Found nothing that makes the targets in {type(self.run.module).__name__}"
            ask = (
                " Or say how to ask for the velocity (t = 0 is noise, t = 1 is data): "
                f"{name}({look.search.line})."
            )
            if self.run.makers:  # the line would be of its convention, which the step does not use
                why, ask = f"The first step did not call {self.run.makers[0].name}", ""
            raise ValueError(
                f"{why}, so what its network predicts is not known; {BY_HAND} Or say what it "
                'is trained on: convention="pi0", another name of stagewise.conventions, or the '
                f"noise scheduler.{ask}"
            )
        with self.run.host.together("finding its network"):
            found = look.search.result()
            self.network = look.network or found
            assert first is not None
            # Refuses what is no velocity.
            tensor_of(first.made[2], tuple(first.x1.shape), look.search.line)
            if look.conditions and self.run.option(self, "class_wise") is not False:
                replaced = ", ".join(text.split(":")[0] for text in look.conditions)
                raise ValueError(
                    f"{self.network.describe()} is also given {', '.join(look.conditions)}. "
                    f"{name} would ask it about other samples, and compare it with the posterior "
                    "over all rows, which a model that uses these conditions does not learn. If it "
                    f"ignores them: {name}(class_wise=False). To ask it with your own conditions, "
                    f"put them in place of {replaced}: {name}({look.search.line})."
                )
        self.conditional = self.run.host.any(self.network.conditional)

    def is_wise(self, labels: Any) -> bool:
        """Whether the posterior of samples with these labels, or None, is class-wise."""
        wise, given = self.run.class_wise(self), plain(labels) is not None
        if self.run.option(self, "class_wise") is None:
            return wise and self.conditional and given
        if wise and not given:
            raise ValueError(
                "class_wise=True, but no labels were found in the training batches. Say where they "
                f"are: {type(self).__name__}(read_batch=lambda batch: (batch[0], batch[1]))."
            )
        return wise

    def reconsider(self) -> None:
        """Takes the network again, if a later step has shown what it is given."""
        network = self.run.look.network
        if self._given is not None or network is None or self.network is network:
            return
        if self.history:
            self.warn(
                f"the network is given more than in the steps before, {network.describe()}. "
                "Probes of those steps are dropped, and the next probe gives it as much."
            )
        self.corrected = True
        self.events = [event for event in self.events if event["step"] <= self.run.began]
        self.settle()

    def renew(self) -> None:
        """Takes the bank that was read again, and samples of it."""
        self.oracle = self.run.oracle(self)
        self._take_samples()

    def describe(self) -> str:
        """The network, for logs."""
        return "the given velocity" if self.network is None else self.network.describe()

    def parameters(self) -> int | None:
        """How many parameters are trained; None if each process has a part of them."""
        module = self.run.module if self.network is None else self.network.module
        sizes = [each.numel() for each in module.parameters() if each.requires_grad]
        return sum(sizes) if sizes and all(sizes) else None

    def reachable(self, t: Tensor) -> Tensor:
        """The nearest times, (B,), that the model knows: with DDPM those of its steps."""
        if self.network is not None:
            return self.network.reachable(t)
        path = self.oracle.path
        return path.nearest_step(t) if isinstance(path, DDPMPath) else t

    def velocity_of(self, module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The velocity of a module: that of the run, or one with averaged weights."""
        if self.network is not None:
            return self.network.of(module)
        given = self._given
        assert given is not None

        def velocity(xt: Tensor, t: Tensor, labels: Any) -> Tensor:
            mask = (labels.mask,) if isinstance(labels, MaskedLabels) else ()
            return given(module, xt, t, plain(labels), *mask)

        return velocity

    @contextmanager
    def asked(self, module: nn.Module | None = None) -> Iterator[Callable[..., Tensor]]:
        """The velocity of a module, default that of the run, in training's precision.

        The mode of every submodule and the global random state are restored afterwards.
        """
        module = self.run.module if module is None else module
        with in_eval_mode(module), same_draws(), torch.no_grad(), self.run.host.precision():
            yield self.velocity_of(module)

    # -- samples ----------------------------------------------------------------------------------

    def rows(self, count: int) -> Samples:
        """Training samples, read from the loader, so that a bank of other samples is noticed."""
        run, bank = self.run, self.run.bank(self)
        given = run.given(self)
        try:
            x1, labels = fitted(*run.read(self, run.host.loader, count), bank.shape)
        except ValueError:
            if not given:
                raise
            why = "the training data cannot be read a second time"
        else:
            shape = tuple(x1.shape[1:])
            if shape == bank.shape:
                return x1, labels
            if not given:
                raise ValueError(
                    f"The bank has samples of shape {bank.shape}, the training data of shape "
                    f"{shape}. Say which tensor of the batch is x_1: "
                    "StageRun(read_batch=lambda batch: (batch[0], None))."
                )
            why = f"the batches hold samples of shape {shape}, not {bank.shape}"
        self.say(f"{why}, so rows of the bank are taken for the training samples.")
        draws = torch.Generator().manual_seed(self.seed)
        index = torch.randperm(len(bank), generator=draws)[:count]
        x1 = bank.take(index.to(bank.device)).reshape(-1, *bank.shape).float().cpu()
        return x1, bank.classes_of(index.tolist())

    def others(self, count: int) -> Samples | None:
        """Held-out samples: those that were given, or of the first validation loader; or None."""
        name, bank = type(self).__name__, self.run.bank(self)
        given = self.run.option(self, "held_out")
        if given is not None:
            x1, labels, mask = (*((given,) if isinstance(given, Tensor) else given), None, None)[:3]
            x1, labels = fitted(x1, masked(labels, mask, x1), bank.shape)
            if tuple(x1.shape[1:]) != bank.shape or not len(x1):
                raise ValueError(
                    f"Expected `held_out` with samples of shape {bank.shape} as the bank's, got "
                    f"{tuple(x1.shape)}."
                )
            return self._known(x1.cpu(), None if labels is None else labels.cpu())
        why, loader = "there is no validation data", self.run.host.held_out_loader()
        if loader:
            try:
                x1, labels = fitted(*self.run.read(self, loader, count), bank.shape)
                if tuple(x1.shape[1:]) == bank.shape:
                    return self._known(x1, labels)
                why = f"validation samples have the shape {tuple(x1.shape[1:])}, not {bank.shape}"
            except ValueError as error:
                why = f"the validation data cannot be read: {str(error).split('. ')[0]}"
        self.say(
            f"{why}. What needs held-out samples is left out. Give some: "
            f"{name}(held_out=(samples, labels))."
        )
        return None

    def _known(self, x1: Tensor, labels: Any) -> Samples | None:
        """Held-out samples without those whose mask no row has, as these have no posterior."""
        if isinstance(labels, MaskedLabels):
            known = self.run.bank(self).has_masks(labels)
            if missing := int((~known).sum()):
                self.say(f"{missing} held-out samples have masks of no row, and are left out.")
            x1, labels = x1[known], labels[known]
        if 0 < len(x1) < _FEW:
            self.say(
                f"{len(x1)} held-out samples: errors on them, with their standard errors, "
                "are of these samples only."
            )
        return (x1, labels) if len(x1) else None

    def lacks_classes(self, samples: Samples) -> str:
        """Why samples are not in classes of the bank, in words; empty if they are."""
        labels = samples[1]
        if labels is None or plain(labels) is None:
            return "no labels"
        unknown = sorted({*labels.tolist()} - {*self.oracle.bank.classes})
        return f"labels without rows, {unknown[:8]}" if unknown else ""

    def noisy(self, samples: Samples, edges: Tensor, queries: int, number: int) -> Probe:
        """This rank's noisy samples, the same at every probe."""
        return Probe(
            *samples,
            edges,
            queries,
            self.oracle,
            class_wise=self.wise,
            seed=(self.seed, number),
            device=self.oracle.bank.device,
            rank=self.run.host.rank,
            world_size=self.run.host.world_size,
            reachable=self.reachable,
        )
