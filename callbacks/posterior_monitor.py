"""`PosteriorMonitor`: where navigation ends and refinement begins, measured during training."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from stagewise import paths
from stagewise.bank import LatentBank
from stagewise.batches import FindSample, find_sample
from stagewise.callbacks import figures
from stagewise.callbacks.checks import (
    beside_training,
    check_bank,
    check_batch,
    path_of,
    raise_together,
    together,
    warn_of_mismatch,
)
from stagewise.callbacks.named import NamedCallback
from stagewise.callbacks.training_bank import bank_from_trainer
from stagewise.callbacks.writer import Writer
from stagewise.engines import Auto, Engine, Sharded
from stagewise.oracle import Oracle
from stagewise.stages import (
    STATISTICS,
    StageBoundary,
    StageCurve,
    predicted_boundary,
    stage_edges,
    stratified_times,
)

__all__ = ["PosteriorMonitor"]

_WHAT = "a probe of PosteriorMonitor"


class PosteriorMonitor(NamedCallback):
    """Measures the posterior over the training set by t, for any LightningModule, unchanged.

    Every `every_n_steps` optimizer steps it makes noisy samples from bank rows on a stratified grid
    of t, asks the exact oracle for their posteriors, and logs what it finds. It asks nothing of the
    model: the curve is a property of the training latents and the path. The bank is read once, so
    that the probes of a run differ by their draws only; a large `every_n_steps` loses nothing. It
    draws from generators of its own, so the trained weights are bit-identical with and without it.

    **Logged to every logger of the trainer** (`stagewise` is `name`):

    - `stagewise/midpoint`, `stagewise/collapsed`: t where the mean largest weight crosses 0.5 and
      0.99, each with `_low` and `_high` (95 % bootstrap). NaN while not reached.
    - `stagewise/predicted`: the boundary that the spectrum of the bank predicts.
    - `stagewise/probe_seconds`, `stagewise/share_of_step_time`: what the probe cost, and that cost
      as a share of the wall time of training since the one before.
    - `stagewise_by_t/{top1,entropy,ess,source_weight,target_difference}/t=...`: means by stratum;
      `target_difference` is MSE(conditional, oracle velocity).

    **To TensorBoard** also the figures `stagewise/concentration`, `stagewise/target_difference` and
    `stagewise/heatmap`, and a custom-scalars layout (which replaces a layout of yours, if any).
    **To disk**, in `dirpath`: `stages.jsonl` (one line for the bank, one per probe) and the figures
    as PNG.

    When not to use it: with couplings that make noise and data dependent (minibatch OT), where the
    posterior below does not hold; and with data sets without a fixed set of samples (streams).

    Args:
        bank: The training latents *as the model is trained on them*: same scale, same shape.
            Default None: read from the training data loader at the start. It is moved to the
            training device if it takes less than a quarter of the memory free there, and
            otherwise streamed from where it lies.
        every_n_steps: Optimizer steps between probes, default 1000. The first probe is
            before the first step of the fit.
        strata: Strata of t, default 24; half of them lie near the predicted boundary if that is
            near an end of [0, 1] (`stages.stage_edges`).
        queries: Queries in each stratum, default 64. The cost of a probe is that of
            `strata * queries` queries to the whole bank (or to a class). The interval of
            `collapsed` hangs on the few queries in a hundred that have not collapsed: give more if
            you need it sharp.
        class_wise: Whether the posterior is over the rows of the query's own class, which is what a
            class-conditional model is trained on. Default "auto": if there are labels. Say False if
            the batches have labels but training does not use them.
        find: From a batch to `(x_1, labels or None)`; default finds them in tensors, tuples and
            dicts with usual keys.
        engine: How the oracle reaches the rows, default `Auto()`: exactly. Not `Sharded`, because
            the ranks share the queries of a probe: give each the same memory-mapped bank, which a
            node holds in memory once.
        path: The path of training. Default None: that of the module's `FlowMatchingLoss` if it has
            one (or several with the same path), otherwise `LinearPath()`.
        dirpath: Where files go; default `<trainer.log_dir>/<name>`, or without a logger
            `<trainer.default_root_dir>/<name>_logs`.
        name: Prefix of all tags and name of the folder, default "stagewise". Give two monitors in
            one trainer two names.
        seed: Of the probes' own generators, default 0.

    Raises:
        ValueError: At construction for numbers out of range; before the first training step if
            `x_1` cannot be found, or if bank and batch do not fit, with the cure.
        MemoryError: Before the first step, if the bank would not fit.
    """

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        every_n_steps: int = 1000,
        strata: int = 24,
        queries: int = 64,
        class_wise: bool | Literal["auto"] = "auto",
        find: FindSample = find_sample,
        engine: Engine | None = None,
        path: paths.Path | None = None,
        dirpath: str | Path | None = None,
        name: str = "stagewise",
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1, got {every_n_steps}.")
        check_bank(bank, class_wise)
        if path is not None and not isinstance(path, paths.Path):
            raise TypeError(f"Expected `path` to be a stagewise.Path, got {path!r}.")
        if isinstance(engine, Sharded) or not isinstance(engine, Engine | None):
            raise TypeError(
                f"Expected `engine` to be a stagewise engine other than Sharded, got {engine!r}. "
                "For a bank larger than a process: LatentBank.open(path) maps one into all ranks."
            )
        if class_wise is True and bank is not None and not bank.classes:
            raise ValueError("class_wise=True needs a bank with labels: LatentBank(x, labels).")
        stage_edges(math.nan, strata)
        stratified_times(torch.tensor([0.0, 1.0]), queries)
        self.every_n_steps, self.strata, self.queries = every_n_steps, strata, queries
        self.class_wise, self.find, self.path = class_wise, find, path
        self.engine = engine or Auto()
        self.dirpath, self.name, self.seed = dirpath, name, seed
        self.oracle: Oracle | None = None
        self.curve: StageCurve | None = None
        self.boundary: StageBoundary | None = None
        self.predicted = math.nan
        self.history: list[dict[str, Any]] = []
        self.wise = False
        self._given = bank
        self._batch_checked = False

    def state_dict(self) -> dict[str, Any]:
        """The probes so far, as plain numbers, and the last curve; never the bank."""
        curve = None
        if self.curve is not None:
            curve = {"t": self.curve.t.tolist(), "values": self.curve.values.tolist()}
        return {"history": self.history, "curve": curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the probes of a checkpoint."""
        self.history = list(state_dict["history"])
        curve = state_dict.get("curve")
        self.curve = None
        if curve is not None:
            t, values = (torch.tensor(curve[name], dtype=torch.float64) for name in ("t", "values"))
            self.curve = StageCurve(t, values)

    # -- hooks --------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes or builds the bank, and opens the files."""
        # A callback may serve a second fit: only a resumed run has a past.
        past = trainer.global_step
        self.history = [entry for entry in self.history if past and entry["step"] <= past]
        self.curve = self.curve if self.history else None
        self.boundary = None if self.curve is None else self.curve.boundary(seed=self.seed)
        bank = self._given or bank_from_trainer(
            trainer, pl_module, find=self.find, class_wise=bool(self.class_wise)
        )
        wise = bool(bank.classes) if self.class_wise == "auto" else self.class_wise
        if wise and not bank.classes:
            raise ValueError(
                "class_wise=True, but no labels were found in the training batches. Say where they "
                "are: PosteriorMonitor(find=lambda batch: (batch[0], batch[1]))."
            )
        if wise and 2 * len(bank.classes) > len(bank):
            rank_zero_warn(
                f"The labels make {len(bank.classes)} classes of {len(bank)} rows. Over a class of "
                "one row every posterior has collapsed at any t. If indices were taken for labels, "
                "say class_wise=False or find=lambda batch: (batch[0], None)."
            )
        self.wise = wise
        path, found = (self.path, "given") if self.path else path_of(pl_module)
        root = trainer.strategy.root_device
        # The oracle needs float64, which MPS has not.
        self._device = torch.device("cpu") if root.type == "mps" else root
        bank = beside_training(bank, trainer)
        self.oracle = Oracle(bank, path, self.engine)
        self.predicted = predicted_boundary(bank, path, class_wise=wise)
        self._edges = stage_edges(self.predicted, self.strata)
        self._batch_checked = False
        self._writer = Writer(trainer, self.name, self.dirpath)
        posterior = "over all rows"
        if wise:
            posterior = f"over the rows of its class ({len(bank.classes)} classes)"
            if self.class_wise == "auto":
                posterior += ", as there are labels (class_wise=False if training ignores them)"
        rank_zero_info(
            f"PosteriorMonitor: {bank}, std {bank.std:.3g}; {path!r} ({found}), t = 0 is noise; "
            f"posterior {posterior}, by {self.engine.describe(bank)}; predicted boundary "
            f"t = {self.predicted:.3f}; "
            f"{self._writer.describe()}"
        )
        self._writer.start([self._header(), *self.history], resumed=bool(self.history))
        self._writer.dashboard(trainer)
        self._since = (time.perf_counter(), trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Probes if it is time; the first batch is checked against the bank."""
        if not self._batch_checked:
            self._check_first(trainer, batch)
            self._batch_checked = True
        step = trainer.global_step
        # With gradient accumulation several batches share a step, several optimizers may advance
        # it by more than one, and a resumed run may have probed here already.
        last = self.history[-1]["step"] if self.history else -1
        if step // self.every_n_steps > last // self.every_n_steps:
            self._probe(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where things are."""
        if not self.history:
            return
        last = self.history[-1]
        cost = f"{last['probe_seconds']:.1f} s"
        if "share_of_step_time" in last:
            cost += f", {last['share_of_step_time']:.1%} of the steps before it"
        rank_zero_info(
            f"PosteriorMonitor: boundary t = {last['midpoint']:.3f} (midpoint), "
            f"{last['collapsed']:.3f} (collapsed) at step {last['step']}; {len(self.history)} "
            f"probes, the last cost {cost}; {self._writer.describe()}"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets go of the bank."""
        self.oracle = None

    def renew(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the training set anew, because its latents have changed, and probes; a collective.

        The strata stay as they are, so that probes can be compared.

        Args:
            trainer: The trainer, in training.
            pl_module: Its module.
        """
        assert self.oracle is not None
        path = self.oracle.path
        bank = bank_from_trainer(
            trainer, pl_module, find=self.find, class_wise=bool(self.class_wise)
        )
        self.oracle = Oracle(beside_training(bank, trainer), path, self.engine)
        self.predicted = predicted_boundary(bank, path, class_wise=self.wise)
        self._writer.event(self._header())
        self._probe(trainer, trainer.global_step)

    # -- one probe ----------------------------------------------------------------------------

    def _probe(self, trainer: pl.Trainer, step: int) -> None:
        oracle, device = self.oracle, self._device
        assert oracle is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that queued training work is not counted as ours
        start = time.perf_counter()
        last_time, last_step = self._since
        training_seconds = start - last_time
        with together(trainer, _WHAT):
            curve = StageCurve.measure(
                oracle,
                stratified_times(self._edges, self.queries, seed=(self.seed, step)),
                seed=(self.seed, step, 1),
                class_wise=self.wise,
                device=device,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(curve.values.to(device), reduce_op="sum")
            assert isinstance(total, Tensor)
            curve = StageCurve(curve.t, total.cpu())
        self.curve, self.boundary = curve, curve.boundary(seed=self.seed)
        entry = {
            "event": "probe",
            "step": step,
            **self.boundary.as_dict(),
            "t": curve.times.tolist(),
            **{statistic: curve.mean(statistic).tolist() for statistic in STATISTICS},
        }
        with together(trainer, _WHAT):
            if trainer.is_global_zero:
                pictures = self._figures(curve, self.boundary, [*self.history, entry])
                self._writer.pictures(pictures, step)
            seconds = time.perf_counter() - start
            entry["probe_seconds"] = seconds
            if step > last_step:
                entry["share_of_step_time"] = seconds / training_seconds
            self._log(entry)
        self.history.append(entry)
        self._since = (time.perf_counter(), step)

    def _log(self, entry: dict[str, Any]) -> None:
        centres = (self._edges[1:] + self._edges[:-1]) / 2
        digits = max(3, 1 - math.floor(math.log10(float(self._edges.diff().min()))))
        keys = [f"{key}{end}" for key in ("midpoint", "collapsed") for end in ("", "_low", "_high")]
        keys += [key for key in ("probe_seconds", "share_of_step_time") if key in entry]
        scalars = {f"{self.name}/{key}": entry[key] for key in keys}
        scalars[f"{self.name}/predicted"] = self.predicted
        for statistic in STATISTICS:
            for t, value in zip(centres.tolist(), entry[statistic], strict=True):
                scalars[f"{self.name}_by_t/{statistic}/t={t:.{digits}f}"] = value
        self._writer.scalars(scalars, entry["step"])
        self._writer.event(entry)

    def _figures(
        self, curve: StageCurve, boundary: StageBoundary, history: list[dict[str, Any]]
    ) -> dict[str, figures.Figure]:
        assert self.oracle is not None
        bank = self.oracle.bank
        title = f"N = {len(bank)}, D = {bank.dim}"
        title += f", class-wise ({len(bank.classes)} classes)" if self.wise else ""
        # A resumed run may have been given another number of strata.
        alike = [entry for entry in history if len(entry["t"]) == self.strata]
        about = (curve, boundary, self.predicted, f"{title}, step {history[-1]['step']}")
        return {
            "concentration": figures.concentration_figure(*about),
            "target_difference": figures.target_difference_figure(*about),
            "heatmap": figures.heatmap_figure(
                [entry["step"] for entry in alike],
                self._edges.numpy(),
                np.array([entry["top1"] for entry in alike]),
                [entry["midpoint"] for entry in alike],
            ),
        }

    # -- set-up -------------------------------------------------------------------------------

    def _check_first(self, trainer: pl.Trainer, batch: Any) -> None:
        assert self.oracle is not None
        error = None
        try:
            x1, labels = check_batch(batch, self.find, self.oracle.bank, class_wise=self.wise)
            if self._given is not None:
                warn_of_mismatch(self.oracle.bank, x1, labels, self.wise)
        except ValueError as caught:
            error = caught
        raise_together(trainer, error)

    def _header(self) -> dict[str, Any]:
        assert self.oracle is not None
        bank = self.oracle.bank
        return {
            "event": "bank",
            "rows": len(bank),
            "shape": list(bank.shape),
            "std": bank.std,
            "classes": len(bank.classes),
            "class_wise": self.wise,
            "path": repr(self.oracle.path),
            "predicted": self.predicted,
        }

    def layout(self) -> dict[str, list[Any]]:
        """Its charts on TensorBoard's custom-scalars page."""
        name, pattern = self.name, re.escape(self.name)
        return {
            "boundary (t, 0 = noise)": [
                "Multiline",
                [rf"^{pattern}/(midpoint|collapsed|predicted)$"],
            ],
            "midpoint with interval": [
                "Margin",
                [f"{name}/midpoint", f"{name}/midpoint_low", f"{name}/midpoint_high"],
            ],
            "collapsed with interval": [
                "Margin",
                [f"{name}/collapsed", f"{name}/collapsed_low", f"{name}/collapsed_high"],
            ],
            **{
                f"{statistic.replace('_', ' ')} by t": [
                    "Multiline",
                    [rf"^{pattern}_by_t/{statistic}/.*"],
                ]
                for statistic in STATISTICS
            },
            "cost of a probe / step time": ["Multiline", [rf"^{pattern}/share_of_step_time$"]],
        }
