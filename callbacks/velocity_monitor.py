"""`VelocityErrorMonitor`: what the model does at each t, against both targets, during training."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from typing_extensions import Unpack

from stagewise.bank import LatentBank
from stagewise.callbacks import velocity_figures
from stagewise.callbacks.metrics import BinnedMeans
from stagewise.callbacks.model_monitor import ModelMonitor, model_in_eval_mode
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.stage_callback import RunOptions
from stagewise.callbacks.tags import by_time, charts
from stagewise.callbacks.training_record import TrainingRecord
from stagewise.oracle import Oracle
from stagewise.paths import same_path
from stagewise.spectrum import predicted_boundary
from stagewise.stages import StageBoundary, StageCurve, stage_edges
from stagewise.velocity_probe import PROBED, Probe, largest, probe_entry

__all__ = ["VelocityErrorMonitor"]


class VelocityErrorMonitor(ModelMonitor):
    """Measures a model's velocity by t, against the conditional target and against the oracle.

    The posterior is a property of the data; this is what moves during training. Now and then the
    model is asked about noisy training samples and noisy held-out ones, the same at every probe, in
    evaluation mode and without gradients. Between the probes the training batches themselves are
    looked at, by one hook on the network: no forward pass is added, and nothing waits for the
    device.

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
        bank: See `StageCallback`.
        every_n_steps: Optimizer steps between probes; default a twentieth of the training, at most
            1000. The first is after the first step, the last after the last.
        strata: Bins of t, default 24; half of them lie near the predicted boundary if that is near
            an end of [0, 1].
        queries: In each bin, for training and for held-out samples, default 32. A probe is
            `2 * strata * queries` forward passes of one sample, and keeps three times as many times
            D numbers of float32 in host memory.
        figures: See `PosteriorMonitor`.
        name: Prefix of tags and name of the folder, default "stagewise_error".
        **options: What it says about the run: `velocity`, `held_out`, `find`, `path`, `class_wise`,
            `dirpath`, `seed`, ...; see `RunOptions`. `find` is called for training batches too, so
            let it not encode where that is dear. Class-wise is "auto" here: if there are labels
            and the network is given them.

    Raises:
        ValueError: At construction for numbers out of range; before the first optimizer step if no
            velocity can be had, what comes is none, the network is given more than labels, or the
            samples do not fit the bank.
    """

    order = 2
    event = "velocity_probe"

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        every_n_steps: int | None = None,
        strata: int = 24,
        queries: int = 32,
        figures: int | None = None,
        name: str = "stagewise_error",
        **options: Unpack[RunOptions],
    ) -> None:
        super().__init__(bank, every_n_steps=every_n_steps, figures=figures, name=name, **options)
        if queries < 2:
            raise ValueError(f"Expected `queries` of at least 2, got {queries}.")
        stage_edges(math.nan, strata)
        self.strata, self.queries = strata, queries
        self.events: list[dict[str, Any]] = []
        self.oracle: Oracle | None = None
        self.boundary: StageBoundary | None = None
        self.edges = torch.empty(0)
        self._probes: dict[str, Probe] = {}
        self._record: TrainingRecord | None = None

    def state_dict(self) -> dict[str, Any]:
        """All that was reported so far, and the sums since the last probe; never the bank.

        Of several processes Lightning keeps the state of the first: sums of the others since the
        last probe are lost when a run resumes.
        """
        record = None if self._record is None else self._record.state_dict()
        state = {**super().state_dict(), "events": self.events, "record": record}
        del state["history"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state of a checkpoint for the start of training."""
        self.events = list(state_dict["events"])
        probes = [event for event in self.events if event["event"] == self.event]
        super().load_state_dict({**state_dict, "history": probes})

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes or builds the bank, reads training and held-out samples, opens the files."""
        super().start()
        past = self.run.began
        kept = bool(past) and not self.renewed
        self.events = [event for event in self.events if kept and self._stays(event, past)]
        self._take_samples()
        self.try_velocity(*self._rows)
        self._warned = self._broke = False

    def _take_samples(self) -> None:
        """Oracle, training samples and held-out samples."""
        self.oracle, count = self.run.oracle(self), self.strata * self.queries
        self._rows, self._others = self.rows(count), self.others(count)
        self._probes = {}

    def settle(self) -> None:
        """Once the first forward pass is done: network, boundary, bins, header."""
        super().settle()
        run, oracle, network = self.run, self._oracle, self.network
        self._wise = run.class_wise(self)
        if run.option(self, "class_wise") is None:
            self._wise = self._wise and self.conditional and self._rows[1] is not None
        self._probes = {}
        self._match_labels()
        predicted = predicted_boundary(oracle.bank, oracle.path, class_wise=self._wise)
        self.edges = stage_edges(predicted, self.strata)
        self._place_stages()
        record = (self.stash or {}).get("record")
        if self._record is not None and network is not None:
            if record is not None and run.trainer.is_global_zero and not self.renewed:
                self._record.load_state_dict(record)
            x1, call = run.look.search.x1, run.look.search.call
            assert x1 is not None
            assert call is not None
            self._record.expect(lambda: x1)
            self._record.look(network.module, *call)
        about, seam = self.describe(), "" if network is None else network.seam.describe()
        held_out = 0 if self._others is None else len(self._others[0])
        rank_zero_info(
            f"VelocityErrorMonitor: asks {about}; {oracle.path!r}; oracle "
            f"{'class-wise' if self._wise else 'over all rows'}; {len(self._rows[0])} training and "
            f"{held_out} held-out samples; {self.writer.describe()}"
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
            "class_wise": self._wise,
            "midpoint": float(self._stages[1]),
            "collapsed": float(self._stages[2]),
        }
        known = bool(self.events) or self.corrected
        self.writer.start([header, *self.events], resumed=known)

    def reconsider(self) -> None:
        """See `ModelMonitor`."""
        if self.network is not self.run.look.network and self._given is None:
            began = self.run.began
            self.events = [event for event in self.events if event.get("step", 0) <= began]
        super().reconsider()

    def before_batch(self, step: int) -> None:
        """Names the samples of the batch that comes."""
        if self._record is not None:
            self._record.expect(self.run.look.x1_of_batch)

    def after_batch(self, step: int, before: int) -> None:
        """Adds the batch; after an optimizer step, logs and probes if it is time."""
        if self._record is not None:
            self._record.finish(before)
            if _crosses(before, step, getattr(self.run.trainer, "log_every_n_steps", 0)):
                self._name_nonfinite()
                self.writer.scalars(self._record.latest(f"{self.name}_spent"), step - 1)
        super().after_batch(step, before)

    def end(self) -> None:
        """Says where things are."""
        super().end()
        if not self.history:
            return
        worst = largest(self.history[-1]["train"]["pythagoras_z"])
        rank_zero_info(
            f"VelocityErrorMonitor: {len(self.history)} probes, the last cost {self.cost()}; "
            f"conditional error = oracle error + floor within {worst:.1f} standard errors; "
            f"{self.writer.describe()}"
        )

    def fail(self) -> None:
        """Says which samples were not finite, if that is why training stops."""
        with suppress(RuntimeError):  # the device may be what failed
            self._name_nonfinite()

    def stop(self) -> None:
        """Takes the hook off, and lets go of bank and queries."""
        if self._record is not None:
            self._record.close()
        self._record, self.oracle, self._probes = None, None, {}

    def renew(self) -> None:
        """Takes all samples anew, because latents have changed; a collective.

        The bins stay as they are, so that probes can be compared. Held-out samples are read again
        only if they were read.
        """
        self._take_samples()
        self._match_labels()
        self._place_stages()

    # -- set-up -----------------------------------------------------------------------------------
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

    def _place_stages(self) -> None:
        """Where the stages meet, and what training spends on each, from here on."""
        self.boundary = self.run.boundary(self._oracle, self._wise)
        ends = torch.tensor([self.boundary.midpoint, self.boundary.collapsed]).double()
        self._stages = torch.tensor([0.0, *ends.nan_to_num(nan=1.0).tolist(), 1.0]).double()
        if self._record is not None:
            self._record.close()
        if self.network is not None:
            self._record = TrainingRecord(
                self.network, self.edges, self._stages, self.run.module.device, self.run.step
            )

    def _name_nonfinite(self) -> None:
        if self._record is None or self._broke:
            return
        found = self._record.nonfinite()
        if found is not None:
            self._broke = True  # what follows the first is no news
            rank_zero_warn(found.pop("message"))
            event = {"event": "non-finite", **found}
            self.events.append(event)
            self.writer.event(event)

    @property
    def _oracle(self) -> Oracle:
        assert self.oracle is not None
        return self.oracle

    def layout(self) -> dict[str, list[Any]]:
        """Its charts on TensorBoard's custom-scalars page."""
        name = re.escape(self.name)
        return charts(
            {
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
        )

    # -- one probe --------------------------------------------------------------------------------

    def measure(self, step: int) -> dict[str, Any]:
        """See `Monitor`."""
        with self.run.together("a probe of VelocityErrorMonitor"):
            if not self._probes:
                self._make_probes()
            asked = {split: self._ask(split) for split in self._probes}
        found = {}
        for split, means in asked.items():
            with means.sync_context():
                found[split] = means.sums.to("cpu")
        entry = probe_entry(found, self.edges, self._stages)
        self._warn(entry)
        self._window = None if self._record is None else self._record.window(step)
        return entry

    def probe(self, step: int, *, at_end: bool = False) -> None:
        """Probes, and reports what training has spent since the last probe; a collective."""
        super().probe(step, at_end=at_end)
        self.events.append(self.history[-1])
        if self._window is not None:
            window = self._window | ({"at_end": True} if at_end else {})
            self.writer.event(window)
            self.events.append(window)

    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        """See `Monitor`. Stages without samples are left out."""
        name, stages, by_bins = self.name, entry["stages"], f"{self.name}_by_t"
        scalars = {
            f"{name}/{split}/{key}/{stage}": value
            for split, by_stage in stages.items()
            for stage, values in by_stage.items()
            for key, value in values.items()
        }
        for split in stages:
            for key in ("conditional", "oracle"):
                scalars |= by_time(f"{by_bins}/{split}/{key}", self.edges, entry[split][key])
        if entry["gap"] is not None:
            for stage, values in stages["held_out"].items():
                gap = values["conditional"] - stages["train"][stage]["conditional"]
                scalars[f"{name}/gap/{stage}"] = gap
            scalars |= by_time(f"{by_bins}/gap", self.edges, entry["gap"])
        scalars[f"{name}/pythagoras"] = largest(entry["train"]["pythagoras_z"])
        return {tag: value for tag, value in scalars.items() if not math.isnan(value)}

    def _ask(self, split: str) -> BinnedMeans:
        """What the model does at the queries of this rank."""
        module, device = self.run.module, self.run.module.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        means = BinnedMeans(torch.cat([self.edges, self._stages]).unique(), PROBED, dtype)
        with model_in_eval_mode(self.run.trainer, module):
            means = means.to(device)
            self._probes[split].measure(self.velocity_of(module), means.update, device)
        return means

    def _make_probes(self) -> None:
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
                rank=self.run.trainer.global_rank,
                world_size=self.run.trainer.world_size,
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

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        boundary, window = self.boundary, self._window
        assert boundary is not None
        edges, probe = self.edges.tolist(), probes[-1]
        # A resumed run may have been given another number of strata.
        probes = [entry for entry in probes if len(entry["train"]["oracle"]) == len(edges) - 1]
        at = (boundary.midpoint, boundary.collapsed)
        pictures = {
            "loss_by_t": velocity_figures.loss_by_time_figure(edges, probe, at),
            "oracle_error": velocity_figures.dynamics_figure(edges, probes, "oracle", at),
            "conditional_error": velocity_figures.dynamics_figure(edges, probes, "conditional", at),
            "oracle_error_heatmap": velocity_figures.error_heatmap(edges, probes),
        }
        gaps = [entry for entry in probes if entry["gap"] is not None]
        if gaps:
            pictures["gap_heatmap"] = velocity_figures.gap_heatmap(edges, gaps)
        if window is not None:
            pictures["spending"] = velocity_figures.spending_figure(edges, window)
        curve = self._curve_beside()
        if curve is not None:
            pictures["stages_and_error"] = velocity_figures.stages_and_error_figure(
                edges, probe, curve.times.tolist(), curve.mean("top1").tolist(), at
            )
        return pictures

    def _curve_beside(self) -> StageCurve | None:
        """What a `PosteriorMonitor` of the same posterior has measured."""
        for monitor in self.run.members:
            if not isinstance(monitor, PosteriorMonitor) or monitor.wise != self._wise:
                continue
            if same_path(monitor.recipe.oracle.path, self._oracle.path):
                return monitor.curve
        return None


def _crosses(before: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` lies between; several optimizers advance by more than one."""
    return bool(every) and step // every > before // every
