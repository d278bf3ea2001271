"""`VelocityErrorMonitor`: what the model does at each t, against both targets, during training."""

from __future__ import annotations

import math
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from stagewise import paths
from stagewise.adapters.paths import same_path
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, find_checked, find_sample
from stagewise.callbacks import velocity_figures
from stagewise.callbacks.checks import check_bank, path_of, together
from stagewise.callbacks.driving import measured_boundary
from stagewise.callbacks.metrics import BinnedMeans
from stagewise.callbacks.named import NamedCallback
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.probe_rows import (
    HeldOut,
    held_out_rows,
    training_rows,
)
from stagewise.callbacks.training_bank import oracle_of_run
from stagewise.callbacks.training_record import TrainingRecord
from stagewise.callbacks.velocity_entries import (
    largest,
    probe_entry,
    probe_scalars,
)
from stagewise.callbacks.velocity_probe import PROBED, Probe
from stagewise.callbacks.velocity_source import AskVelocity, VelocitySource, model_in_eval_mode
from stagewise.callbacks.writer import Writer
from stagewise.oracle import Oracle
from stagewise.stages import StageBoundary, predicted_boundary, stage_edges

__all__ = ["VelocityErrorMonitor"]

_WHAT = "a probe of VelocityErrorMonitor"


class VelocityErrorMonitor(NamedCallback):
    """Measures a model's velocity by t, against the conditional target and against the oracle.

    The posterior is a property of the data; this is what moves during training. Every
    `every_n_steps` optimizer steps the model is asked about noisy training samples and noisy
    held-out ones, the same at every probe, in evaluation mode and without gradients. Between the
    probes the training batches themselves are looked at, by one hook on the network: no forward
    pass is added, and nothing waits for the device.

    The network is found in the first training step by what it is given
    (`stagewise.adapters.network`), for any module whose target a `FlowMatchingLoss`, a torchcfm
    matcher, a flow_matching path, a SiT transport, an EDM loss or a diffusers scheduler makes.

    **Logged to every logger** at each probe (`stagewise_error` is `name`); stages are navigation,
    transition and refinement, `split` is train or held_out:

    - `stagewise_error/{split}/{conditional,oracle,cosine}/{stage}`: MSE against the conditional
      velocity and against the oracle's, both per number, and the cosine to the oracle's.
    - `stagewise_error/train/{floor,excess}/{stage}`: MSE(conditional, oracle), which no model can
      remove, and oracle error / floor (NaN where the floor is next to nothing).
    - `stagewise_error/gap/{stage}`: conditional error on held-out samples minus that on training
      samples.
    - `stagewise_error/pythagoras`: the largest deviation, over the bins, of conditional error from
      oracle error + floor, in standard errors. Up to 4 is usual; above 6 the oracle is not that of
      this training, and the log says so once.
    - `stagewise_error/probe_seconds`, `stagewise_error/share_of_step_time`.
    - `stagewise_error_by_t/{split}/{conditional,oracle}/t=...` and `stagewise_error_by_t/gap/t=...`

    and from the training batches, over all ranks, at the trainer's `log_every_n_steps`:

    - `stagewise_error_spent/{draws,loss,gradient}/{stage}`: share of the samples, of the
      conditional velocity error and of the norms of dL/dv. The last is the pull at the network's
      answer, weights included; how it adds up in the parameters is not seen there.
    - `stagewise_error_spent/loss_by_t/t=...`: mean conditional velocity error.

    **To TensorBoard** also figures (error by t now and over the training, heat maps, what training
    spends on each stage) and charts on the custom-scalars page; **to disk**, in `dirpath`,
    `stages.jsonl` and the figures as PNG. The first loss that is not finite is named with its step,
    rows and t.

    When not to use it: as for `PosteriorMonitor`. On held-out samples the oracle error says how far
    the model is from repeating the training set, not how good it is.

    Args:
        bank: The training latents *as the model is trained on them*. Default: that of a callback
            that stands before this one and has the same path, or else read from the training data.
        velocity: From `(module, xt, t, labels)` to the velocity in this library's convention, for
            networks that cannot be found. Then training batches are not looked at.
        held_out: Samples that are not trained on, (n, *), or `(samples, labels)`. Default: read
            from the first validation loader; without one, held-out errors are left out.
        every_n_steps: Optimizer steps between probes, default 1000. The first is after the first
            step, the last after the last.
        strata: Bins of t, default 24; half of them lie near the predicted boundary if that is near
            an end of [0, 1].
        queries: In each bin, for training and for held-out samples, default 32. A probe is
            `2 * strata * queries` forward passes of one sample, and keeps three times as many times
            D numbers of float32 in host memory.
        class_wise: Whether the oracle is over the rows of the query's class. Default "auto": if
            there are labels and the network is given them.
        find: From a batch to `(x_1, labels or None)`; called for every training batch, so let it
            not encode: give `velocity` or latents where it would.
        path: The path of training; default: what makes the targets says.
        dirpath: Where files go; default `<trainer.log_dir>/<name>`, or without a logger
            `<trainer.default_root_dir>/<name>_logs`.
        name: Prefix of tags and name of the folder, default "stagewise_error".
        seed: Of the queries, default 0.

    Raises:
        ValueError: At construction for numbers out of range; before the first optimizer step if no
            velocity can be had, what comes is none, or the samples do not fit the bank.
    """

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        velocity: AskVelocity | None = None,
        held_out: HeldOut | None = None,
        every_n_steps: int = 1000,
        strata: int = 24,
        queries: int = 32,
        class_wise: bool | Literal["auto"] = "auto",
        find: FindSample = find_sample,
        path: paths.Path | None = None,
        dirpath: str | Path | None = None,
        name: str = "stagewise_error",
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        if queries < 2:
            raise ValueError(f"Expected `queries` of at least 2, got {queries}.")
        check_bank(bank, class_wise)
        stage_edges(math.nan, strata)
        self.every_n_steps, self.strata, self.queries = every_n_steps, strata, queries
        self.class_wise, self.find, self.path = class_wise, find, path
        self.dirpath, self.name, self.seed = dirpath, name, seed
        self.events: list[dict[str, Any]] = []
        self.oracle: Oracle | None = None
        self.boundary: StageBoundary | None = None
        self._measured: dict[str, float] | None = None
        self.edges = torch.empty(0)
        self._given, self._held_out = bank, held_out
        self._source = VelocitySource(velocity, find, "VelocityErrorMonitor")
        self._probes: dict[str, Probe] = {}
        self._record: TrainingRecord | None = None
        self._stash: dict[str, Any] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The probes so far."""
        return [event for event in self.events if event["event"] == "velocity_probe"]

    def state_dict(self) -> dict[str, Any]:
        """All that was reported so far, and the sums since the last probe; never the bank.

        Of several processes Lightning keeps the state of the first: sums of the others since the
        last probe are lost when a run resumes.
        """
        record = None if self._record is None else self._record.state_dict()
        boundary = None if self.boundary is None else self.boundary.as_dict()
        return {"events": self.events, "record": record, "boundary": boundary}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state of a checkpoint for the start of training."""
        self.events, self._stash = list(state_dict["events"]), state_dict["record"]
        self._measured = state_dict.get("boundary")

    # -- hooks --------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes or builds the bank, reads training and held-out samples, opens the files."""
        past = trainer.global_step
        # A callback may serve a second fit: only a resumed run has a past.
        self.events = [event for event in self.events if past and event["step"] <= past]
        self._measured = self._measured if past else None
        self._last = self.history[-1]["step"] if self.history else None
        self._take_samples(trainer, pl_module, self.path or path_of(pl_module)[0])
        self._source.start(trainer, pl_module, *self._rows)
        self._ready = self._warned = self._broke = False
        self._writer = Writer(trainer, self.name, self.dirpath)
        self._total = trainer.estimated_stepping_batches
        self._step, self._since = past, (time.perf_counter(), past)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch: begins to look for the network."""
        if self._record is not None:
            self._record.expect(find_checked(self.find, batch)[0])
        elif not self._ready:
            self._source.watch(pl_module, batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """In the first step: takes what was found, or refuses to go on."""
        if not self._ready:
            self._settle(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Adds the batch; after an optimizer step, logs and probes if it is time."""
        if not self._ready:  # a step that never went backward
            self._settle(trainer, pl_module)
        step, before = trainer.global_step, self._step
        if self._record is not None:
            self._record.finish(before)
        if step == before:  # gradients are accumulated
            return
        self._step = step
        if self._record is not None and _crosses(
            before, step, getattr(trainer, "log_every_n_steps", 0)
        ):
            self._name_nonfinite()
            self._writer.scalars(self._record.latest(f"{self.name}_spent"), step - 1)
        last = self._last
        due = last is None or step // self.every_n_steps > last // self.every_n_steps
        if due or (step >= self._total and step != last):
            self._probe(trainer, pl_module, step)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Says which samples were not finite, if that is why training stops."""
        with suppress(RuntimeError):  # the device may be what failed
            self._name_nonfinite()
        self._close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where things are."""
        if self._last is None:
            return
        last = self.history[-1]
        cost = f"{last['probe_seconds']:.1f} s"
        if "share_of_step_time" in last:
            cost += f", {last['share_of_step_time']:.1%} of the steps before it"
        worst = largest(last["train"]["pythagoras_z"])
        rank_zero_info(
            f"VelocityErrorMonitor: {len(self.history)} probes, the last cost {cost}; conditional "
            f"error = oracle error + floor within {worst:.1f} standard errors; "
            f"{self._writer.describe()}"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the hook off, and lets go of bank and queries."""
        self._close()
        self.oracle, self._probes = None, {}

    def _name_nonfinite(self) -> None:
        if self._record is None or self._broke:
            return
        found = self._record.nonfinite()
        if found is not None:
            self._broke = True  # what follows the first is no news
            rank_zero_warn(found.pop("message"))
            self._report({"event": "non-finite", **found})

    def _close(self) -> None:
        self._source.stop()
        if self._record is not None:
            self._record.close()
        self._record = None

    # -- set-up -------------------------------------------------------------------------------

    def renew(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads all samples anew, because latents have changed; a collective.

        The bins stay as they are, so that probes can be compared. A bank that was given is replaced
        by what is read, as are held-out samples only if they were read.

        Args:
            trainer: The trainer, in training.
            pl_module: Its module.
        """
        self._given = self._measured = None
        self._take_samples(trainer, pl_module, self._oracle.path)
        self._match_labels()
        self._place_stages(trainer, pl_module)

    def _take_samples(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: paths.Path
    ) -> None:
        """Bank, training samples and held-out samples."""
        self.oracle = oracle_of_run(
            trainer,
            pl_module,
            self,
            path,
            given=self._given,
            find=self.find,
            class_wise=bool(self.class_wise),
        )
        bank, count = self.oracle.bank, self.strata * self.queries
        if self.class_wise is True:
            bank.require_classes()
        about: dict[str, Any] = {
            "find": self.find,
            "seed": self.seed,
            "asks": "VelocityErrorMonitor",
        }
        given = self._given is not None
        self._rows = training_rows(trainer, pl_module, bank, count, given=given, **about)
        self._others = held_out_rows(trainer, pl_module, bank, count, given=self._held_out, **about)
        self._probes = {}

    def _match_labels(self) -> None:
        """Refuses training samples without a class of the bank; leaves held-out ones out."""
        bank, labels = self._oracle.bank, self._rows[1]
        if not self._wise:
            return
        if labels is None:
            raise ValueError(
                "class_wise=True, but no labels were found in the training batches. Say where they "
                "are: VelocityErrorMonitor(find=lambda batch: (batch[0], batch[1]))."
            )
        for label in set(labels.tolist()):
            bank.segment(label)
        if self._others is None:
            return
        labels = self._others[1]
        unknown = None if labels is None else set(labels.tolist()) - set(bank.classes)
        if unknown is None or unknown:
            has = "no labels" if unknown is None else f"labels without rows, {sorted(unknown)[:8]}"
            rank_zero_info(
                f"VelocityErrorMonitor: held-out samples have {has}, and the oracle is class-wise: "
                "errors on them are left out."
            )
            self._others = None

    def _place_stages(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where the stages meet, and what training spends on each, from here on."""
        self.boundary = self._boundary(trainer)
        ends = torch.tensor([self.boundary.midpoint, self.boundary.collapsed]).double()
        self._stages = torch.tensor([0.0, *ends.nan_to_num(nan=1.0).tolist(), 1.0]).double()
        if self._record is not None:
            self._record.close()
        if self._source.network is not None:
            self._record = TrainingRecord(
                self._source.network, self.edges, self._stages, pl_module.device, self._step
            )

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once the first forward pass is done: network, boundary, bins, header."""
        self._source.settle(trainer)
        oracle, network = self._oracle, self._source.network
        wise = bool(oracle.bank.classes) and self.class_wise is not False
        if self.class_wise == "auto":
            wise = wise and self._source.conditional and self._rows[1] is not None
        self._wise = wise
        self._match_labels()
        predicted = predicted_boundary(oracle.bank, oracle.path, class_wise=wise)
        self.edges = stage_edges(predicted, self.strata)
        self._place_stages(trainer, pl_module)
        if self._record is not None and network is not None:
            if self._stash is not None and trainer.is_global_zero:
                self._record.load_state_dict(self._stash)
            x1, *call = self._source.take_call()
            self._record.expect(x1)
            self._record.look(network.module, *call)
        self._stash = None
        about, seam = self._source.describe(), "" if network is None else network.seam.describe()
        held_out = 0 if self._others is None else len(self._others[0])
        rank_zero_info(
            f"VelocityErrorMonitor: asks {about}; {oracle.path!r}; oracle "
            f"{'class-wise' if wise else 'over all rows'}; {len(self._rows[0])} training and "
            f"{held_out} held-out samples; {self._writer.describe()}"
        )
        header = {
            "event": "velocity",
            "edges": self.edges.tolist(),
            "network": about,
            "seam": seam,
            "path": repr(oracle.path),
            "queries": self.queries,
            "train_rows": len(self._rows[0]),
            "held_out_rows": held_out,
            "class_wise": wise,
            "midpoint": float(self._stages[1]),
            "collapsed": float(self._stages[2]),
        }
        self._writer.start([header, *self.events], resumed=bool(self.events))
        self._writer.dashboard(trainer)
        self._ready = True

    def _boundary(self, trainer: pl.Trainer) -> StageBoundary:
        """What a monitor before this one has measured, or else measured now."""
        callbacks = getattr(trainer, "callbacks", [self])
        self._posterior: PosteriorMonitor | None = None
        for monitor in callbacks[: callbacks.index(self)]:
            if isinstance(monitor, PosteriorMonitor) and monitor.oracle is not None:
                alike = same_path(monitor.oracle.path, self._oracle.path)
                if alike and monitor.wise == self._wise:
                    self._posterior = monitor
                    break
        if self._measured is not None:  # by the run that is resumed
            return StageBoundary(**self._measured)
        if self._posterior is not None and self._posterior.boundary is not None:
            return self._posterior.boundary
        return measured_boundary(trainer, self._oracle, class_wise=self._wise, seed=self.seed)

    @property
    def _oracle(self) -> Oracle:
        assert self.oracle is not None
        return self.oracle

    def layout(self) -> dict[str, list[Any]]:
        """Its charts on TensorBoard's custom-scalars page."""
        name = re.escape(self.name)
        charts = {
            "oracle error": f"{name}/train/oracle/",
            "oracle error by t": f"{name}_by_t/train/oracle/",
            "conditional error": f"{name}/train/conditional/",
            "conditional error by t": f"{name}_by_t/train/conditional/",
            "oracle error / floor": f"{name}/train/excess/",
            "held-out minus training error": f"{name}/gap/",
            "held-out minus training error by t": f"{name}_by_t/gap/",
            "share of draws": f"{name}_spent/draws/",
            "share of loss": f"{name}_spent/loss/",
            "share of gradient norms": f"{name}_spent/gradient/",
            "Pythagoras, standard errors": f"{name}/pythagoras$",
            "cost of a probe / step time": f"{name}/share_of_step_time$",
        }
        return {title: ["Multiline", [f"^{pattern}"]] for title, pattern in charts.items()}

    # -- one probe ----------------------------------------------------------------------------

    def _probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that queued training work is not counted as ours
        start = time.perf_counter()
        last_time, last_step = self._since
        training_seconds = start - last_time
        with together(trainer, _WHAT):
            if not self._probes:
                self._make_probes(trainer)
            asked = {split: self._ask(trainer, pl_module, split) for split in self._probes}
        found = {}
        for split, means in asked.items():
            with means.sync_context():
                found[split] = means.merged().cpu()
        entry = {
            "event": "velocity_probe",
            "step": step,
            **probe_entry(found, self.edges, self._stages),
        }
        self._last = step
        self._warn(entry)
        window = None if self._record is None else self._record.window(step)
        events = [event for event in (entry, window) if event is not None]
        with together(trainer, _WHAT):
            if trainer.is_global_zero:
                self._writer.pictures(self._figures([*self.history, entry], window), step)
            seconds = time.perf_counter() - start
            entry["probe_seconds"] = seconds
            if step > last_step:
                entry["share_of_step_time"] = seconds / training_seconds
            self._writer.scalars(probe_scalars(self.name, entry, self.edges), step - 1)
            for event in events:
                self._writer.event(event)
        self.events += events
        self._since = (time.perf_counter(), step)

    def _ask(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> BinnedMeans:
        """What the model does at the queries of this rank."""
        device = pl_module.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        means = BinnedMeans(torch.cat([self.edges, self._stages]).unique(), PROBED, dtype)
        with model_in_eval_mode(trainer, pl_module):
            self._probes[split].measure(self._source.of(pl_module), means.to(device), device)
        return means

    def _make_probes(self, trainer: pl.Trainer) -> None:
        splits = {"train": self._rows, "held_out": self._others}
        for number, (split, rows) in enumerate(splits.items()):
            if rows is None:
                continue
            self._probes[split] = Probe(
                *rows,
                self.edges,
                self.queries,
                self._oracle,
                class_wise=self._wise,
                seed=(self.seed, number),
                device=self._oracle.bank.device,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )

    def _warn(self, entry: dict[str, Any]) -> None:
        if entry["alarm"] is None or self._warned:
            return
        self._warned = True
        z = torch.tensor(entry["train"]["pythagoras_z"])
        at = int(z.abs().nan_to_num().argmax())
        rank_zero_warn(
            f"At t in [{self.edges[at]:.3f}, {self.edges[at + 1]:.3f}] the model's conditional "
            f"error differs from its oracle error + floor by {abs(float(z[at])):.1f} standard "
            "errors. They are equal for every model, so the oracle is not that of this training: "
            "look at the scale of the bank, the path, augmentation, and whether model and oracle "
            f"are given the same labels (class_wise={self._wise})."
        )

    def _report(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._writer.event(event)

    def _figures(
        self, probes: list[dict[str, Any]], window: dict[str, Any] | None
    ) -> dict[str, Figure]:
        boundary = self.boundary
        assert boundary is not None
        edges, probe = self.edges.tolist(), probes[-1]
        # A resumed run may have been given another number of strata.
        probes = [entry for entry in probes if len(entry["train"]["oracle"]) == len(edges) - 1]
        at = (boundary.midpoint, boundary.collapsed)
        pictures = {
            "loss_by_t": velocity_figures.loss_by_time_figure(edges, probe, *at),
            "oracle_error": velocity_figures.dynamics_figure(edges, probes, "oracle", *at),
            "conditional_error": velocity_figures.dynamics_figure(
                edges, probes, "conditional", *at
            ),
            "oracle_error_heatmap": velocity_figures.error_heatmap(edges, probes),
        }
        gaps = [entry for entry in probes if entry["gap"] is not None]
        if gaps:
            pictures["gap_heatmap"] = velocity_figures.gap_heatmap(edges, gaps)
        if window is not None:
            pictures["spending"] = velocity_figures.spending_figure(edges, window)
        if self._posterior is not None and self._posterior.curve is not None:
            curve = self._posterior.curve
            pictures["stages_and_error"] = velocity_figures.stages_and_error_figure(
                edges, probe, curve.times.tolist(), curve.mean("top1").tolist(), *at
            )
        return pictures


def _crosses(before: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` lies between; several optimizers advance by more than one."""
    return bool(every) and step // every > before // every
