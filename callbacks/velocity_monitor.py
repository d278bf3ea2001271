"""`VelocityErrorMonitor`: the model's error at each t, against both targets, during training."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from matplotlib.figure import Figure
from typing_extensions import Unpack, override

from stagewise.bank import LatentBank
from stagewise.binned_sums import BinnedSums
from stagewise.callbacks import velocity_figures
from stagewise.callbacks.drawing import counted
from stagewise.callbacks.model_monitor import ModelMonitor
from stagewise.callbacks.monitor import MonitorOptions
from stagewise.callbacks.posterior_monitor import PosteriorMonitor
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.callbacks.training_record import TrainingRecord
from stagewise.callbacks.writer import by_time, chart, tags_by_time
from stagewise.paths import same_path
from stagewise.spectrum import predicted_boundary
from stagewise.stages import StageBoundary, StageCurve, stage_edges
from stagewise.velocity_probe import PROBED, Probe, largest, probe_entry

__all__ = ["VelocityErrorMonitor"]


class VelocityErrorMonitor(ModelMonitor):
    """Measures how far a model is from its training target and from the oracle, by t.

    At each probe the model is asked about noisy training samples and noisy held-out samples, the
    same each time, in evaluation mode and without gradients. Between probes, a hook on the network
    records the training batches: no forward pass is added, and nothing waits for the device. The
    network is found in the first training step by its inputs (`stagewise.adapters.network`), for
    any module whose target is made by a `FlowMatchingLoss`, a torchcfm matcher, a flow_matching
    path, a SiT transport, an EDM loss or a diffusers scheduler.

    **Logged to every logger** at each probe (`stagewise_error` is `name`); stages are navigation,
    transition and refinement, `split` is train or held_out:

    - `stagewise_error/{split}/{conditional,oracle,cosine}/{stage}`: MSE to the conditional velocity
      and to the oracle velocity, both per number, and the cosine to the oracle velocity.
    - `stagewise_error/train/{floor,excess}/{stage}`: MSE(conditional, oracle), which no model can
      remove, and oracle error / floor (NaN if the floor is close to 0).
    - `stagewise_error/gap/{stage}`: conditional error of held-out minus training samples.
    - `stagewise_error/pythagoras`: the largest deviation, over the bins, of conditional error from
      oracle error + floor, in standard errors. Up to 4 is usual; above 6 the oracle is not that of
      this training, and a warning says so once.
    - `stagewise_error/probe_seconds`, `stagewise_error/share_of_step_time`.
    - `stagewise_error_by_t/{split}/{conditional,oracle}/t=...` and `stagewise_error_by_t/gap/t=...`

    and from the training batches of all ranks, at the trainer's `log_every_n_steps`:

    - `stagewise_error_spent/{draws,loss,gradient}/{stage}`: share of the samples, of the
      conditional error and of the norms of dL/dv, the gradient at the network's answer.
    - `stagewise_error_spent/loss_by_t/t=...`: mean conditional error.

    **To TensorBoard** also figures (error by t now and over the training, heat maps, what training
    spends on each stage) and charts on the custom-scalars page; **to disk**, in `dirpath`,
    `stages.jsonl` and the figures as PNG. A warning names step, rows and t of the first loss that
    is not finite.

    Do not use it where `PosteriorMonitor` cannot be used. On held-out samples the oracle error says
    how far the model is from repeating the training set, not how good it is.

    Args:
        bank: The training latents, if they are not to be read from the loader.
        strata: Bins of t, default 24; half of them lie near the predicted boundary if that is near
            an end of [0, 1].
        queries: Noisy samples in each bin, for training and for held-out samples, default 32. A
            probe is `2 * strata * queries` forward passes of one sample. Three times that many
            samples of float32 are kept in host memory.
        name: Prefix of tags and name of the folder, default "stagewise_error".
        **options: `every_n_steps` and `figures`, see `MonitorOptions`; the first probe is after the
            first step, the last after the last. And options of the run, see `RunOptions`:
            `read_batch` is also called for training batches, so it should not run a slow encoder.
            `class_wise` "auto" means: if there are labels and the network is given them.

    Raises:
        ValueError: At construction for numbers out of range; before the first optimizer step if the
            network is not found or is given more than labels, or the samples do not fit the bank.

    Example:
        >>> from stagewise.callbacks import PosteriorMonitor, VelocityErrorMonitor
        >>> callbacks = [PosteriorMonitor(), VelocityErrorMonitor(queries=16)]
        >>> ask = lambda module, xt, t, labels: module.net(xt, t, labels)  # if it is not found
        >>> callbacks = [VelocityErrorMonitor(velocity=ask)]
    """

    order = 2
    event, kept_as = "velocity_probe", "events"
    charts = {
        "oracle error by stage": "/train/oracle/",
        "conditional error by stage": "/train/conditional/",
        "held-out conditional error by stage": "/held_out/conditional/",
        "held-out gap by stage": "/gap/",
        "floor by stage": "/train/floor/",
        "oracle error / floor by stage": "/train/excess/",
        "share of draws by stage": "_spent/draws/",
        "share of loss by stage": "_spent/loss/",
        "share of gradient norms by stage": "_spent/gradient/",
        "Pythagoras, standard errors": "/pythagoras$",
        "cost of a probe / step time": "/share_of_step_time$",
    }
    _record: TrainingRecord | None = None
    _warned = _broke = False

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        strata: int = 24,
        queries: int = 32,
        name: str = "stagewise_error",
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(name, bank, **options)
        if queries < 2:
            raise ValueError(f"Expected `queries` of at least 2, got {queries}.")
        stage_edges(math.nan, strata)
        self.strata, self.queries = strata, queries
        self.boundary: StageBoundary | None = None
        self.edges = torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything reported so far, and the sums since the last probe.

        Lightning keeps the state of the first process only. Sums of the others since the last probe
        are lost when a run resumes, which the window tells under "lacking".
        """
        record = None if self._record is None else self._record.state_dict()
        return {**super().state_dict(), "record": record}

    # -- the course of a training -----------------------------------------------------------------

    def _take_samples(self) -> None:
        count = self.strata * self.queries
        self._rows, self._others = self.rows(count), self.others(count)

    def settle(self) -> None:
        """After the first forward pass: network, bins, boundary, header."""
        super().settle()
        run, oracle, network = self.run, self.oracle, self.network
        self.wise = self.is_wise(self._rows[1])
        predicted = predicted_boundary(oracle.bank, oracle.path, class_wise=self.wise)
        self.edges = stage_edges(predicted, self.strata)
        self._begin()
        record = (self.stash or {}).get("record")
        if self._record is not None and network is not None:
            if record is not None and not self.renewed:
                self._record.load_state_dict(record, run.host.rank, run.host.world_size)
            if self._record.lacking:
                self.say(f"in its first window {self._record.lacking}")
            self._record.take_first(run.look.search)
        held_out = 0 if self._others is None else len(self._others[0])
        wise = "over all rows" if oracle.bank.pairs is None else "over rows of the same mask"
        wise = "class-wise" if self.wise else wise
        self.say(
            f"asks {self.describe()}; {oracle.path!r}; oracle {wise}; {len(self._rows[0])} "
            f"training and {held_out} held-out samples; {self.writer.describe()}"
        )
        header = {
            "event": "velocity",
            "edges": self.edges.tolist(),
            "network": self.describe(),
            "parameters": self.parameters(),
            "maker": "" if network is None else network.maker.describe(),
            "path": repr(oracle.path),
            "queries": self.queries,
            "train_rows": len(self._rows[0]),
            "held_out_rows": held_out,
            "class_wise": self.wise,
            "midpoint": float(self._stages[1]),
            "collapsed": float(self._stages[2]),
        }
        self.open_files(header)

    @override
    def reread(self) -> None:
        if self._record is not None:
            self._record.take_first(self.run.look.search)

    def before_batch(self, step: int) -> None:
        """Gives the record the samples of the next batch."""
        if self._record is not None:
            self._record.expect(self.run.look.x1_of_batch, self.run.look.masks_of_batch)

    def after_batch(self, step: int, before: int) -> None:
        """Adds the batch; after an optimizer step, logs and probes if due."""
        if self._record is not None:
            self._record.finish(before)
            if self.run.logs(before):
                self._name_nonfinite()
                self.writer.scalars(self._record.latest(f"{self.name}_spent"), step - 1)
        super().after_batch(step, before)

    def end(self) -> None:
        """Logs how well the errors add up, and where they are written."""
        super().end()
        if self.history:
            scores = self.history[-1]["train"]["pythagoras_z"]
            found = f"{largest(scores):.1f} standard errors"
            found = f"conditional error = oracle error + floor within {found}"
            if all(map(math.isnan, scores)):
                found = "the model's answers are not finite, so its errors are not known"
            self.say(f"{found}; {self.summary()}")

    def fail(self) -> None:
        """Names the samples that were not finite, if that is why training stops."""
        with suppress(RuntimeError):  # the device may be what failed
            self._name_nonfinite()

    def stop(self) -> None:
        """Removes the hook."""
        if self._record is not None:
            self._record.close()

    def renew(self) -> None:
        """Reads samples of the changed latents, in the same bins so that probes can be compared."""
        super().renew()
        self._begin()

    def _begin(self) -> None:
        """Takes the boundary; makes a new record of what training spends on each stage.

        Refuses training samples without a class of the bank, and drops such held-out samples.
        """
        self._probes: dict[str, Probe] = {}
        labels = self._rows[1] if self.wise else None
        for label in () if labels is None else {*labels.tolist()}:
            self.oracle.bank.segment(label)
        if self.wise and self._others is not None and (has := self.lacks_classes(self._others)):
            self.say(f"held-out samples have {has}, so class-wise errors on them are left out.")
            self._others = None
        self.boundary = self.run.boundary(self.oracle, self.wise)
        ends = torch.tensor([self.boundary.midpoint, self.boundary.collapsed]).double()
        self._stages = torch.tensor([0.0, *ends.nan_to_num(nan=1.0).tolist(), 1.0]).double()
        self.stop()
        if self.network is not None:
            about = self.network, self.edges, self._stages, self.run.host.device
            add = lambda own: self.run.host.reduce(own)  # noqa: E731 a method would keep the host
            self._record = TrainingRecord(*about, add, self.run.step)

    def _name_nonfinite(self) -> None:
        if self._record is None or self._broke:
            return
        found = self._record.nonfinite()
        if found is not None:
            self._broke = True  # only the first one is reported
            rank_zero_warn(found.pop("message"))
            event = {"event": "non-finite", **found}
            self.events.append(event)
            self.writer.event(event)

    # -- one probe --------------------------------------------------------------------------------

    @override
    def measure(self, step: int) -> dict[str, Any]:
        with self.together():
            splits = {"train": self._rows, "held_out": self._others}
            for number, (split, rows) in enumerate(splits.items()):
                if rows is not None and split not in self._probes:
                    self._probes[split] = self.noisy(rows, self.edges, self.queries, number)
            asked = {split: self._ask(probe) for split, probe in self._probes.items()}
        add = self.run.host.reduce
        found = {split: sums.over(add).to("cpu") for split, sums in asked.items()}
        entry = probe_entry(found, self.edges, self._stages)
        self._warn(entry)
        self._name_nonfinite()
        self._window = None if self._record is None else self._record.window(step)
        return entry

    def _ask(self, probe: Probe) -> BinnedSums:
        """The model's errors at the queries of this rank."""
        device = self.run.host.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        edges = torch.cat([self.edges, self._stages]).unique()
        sums = BinnedSums.empty(edges, PROBED, dtype).to(device)
        with self.asked() as velocity:
            probe.measure(velocity, sums.update, device)
        return sums

    def probe(self, step: int, *, at_end: bool = False) -> None:
        """Probes, and writes what training has spent since the last probe; a collective."""
        super().probe(step, at_end=at_end)
        if self._window is not None:
            window = self._window | ({"at_end": True} if at_end else {})
            self.writer.event(window)
            self.events.append(window)

    @override
    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
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

    @override
    def layout(self) -> dict[str, list[Any]]:
        page, by_t = super().layout(), f"{self.name}_by_t"
        page["oracle error at four t"] = chart(tags_by_time(f"{by_t}/train/oracle", self.edges))
        page["held-out gap at four t"] = chart(tags_by_time(f"{by_t}/gap", self.edges))
        without = self._others is None
        return {t: c for t, c in page.items() if not (without and t.startswith("held-out"))}

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
            "check the scale of the bank, the path, augmentation, and whether model and oracle "
            f"are given the same labels (class_wise={self.wise})."
        )

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        assert self.boundary is not None
        ends = (self.boundary.midpoint, self.boundary.collapsed)
        about = counted(len(self.oracle.bank), self.queries, self.strata)
        others = [one for one in self.run.members if not isinstance(one, ModelMonitor)]
        told = (event for one in others for event in getattr(one, "events", ()))
        marks = [(e["step"], e["kind"]) for e in told if e["event"] == "transition"]
        curve, edges = self._curve_beside(), self.edges.tolist()
        return velocity_figures.of_run(edges, probes, self._window, curve, ends, about, marks)

    def _curve_beside(self) -> StageCurve | None:
        """The curve of a `PosteriorMonitor` of the same posterior."""
        members, path = self.run.members, self.oracle.path
        beside = [m for m in members if isinstance(m, PosteriorMonitor) and m.wise == self.wise]
        return next((m.curve for m in beside if same_path(m.recipe.oracle.path, path)), None)
