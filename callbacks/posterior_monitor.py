"""`PosteriorMonitor`: where navigation ends and refinement begins, measured during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import Unpack, override

from stagewise.bank import LatentBank
from stagewise.callbacks import figures as pictures
from stagewise.callbacks.drawing import counted
from stagewise.callbacks.monitor import Monitor, MonitorOptions
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.callbacks.writer import by_time, chart, margin, tags_by_time
from stagewise.engines import Engine
from stagewise.masks import few_rows
from stagewise.spectrum import predicted_boundary
from stagewise.stages import (
    STATISTICS,
    Recipe,
    StageBoundary,
    StageCurve,
    stage_edges,
    stratified_times,
)

__all__ = ["PosteriorMonitor"]


class PosteriorMonitor(Monitor):
    """Measures where the stages of the training data meet, for any LightningModule, unchanged.

    At each probe it makes noisy samples from bank rows on a stratified grid of t, asks the exact
    oracle for their posteriors, and logs the results. It does not ask the model: the curve is a
    property of the training latents and the path, and the probes of a run differ by their draws
    only. It has its own generators, so trained weights are bit-identical with and without it.

    **Logged to every logger of the trainer** (`stagewise` is `name`):

    - `stagewise/midpoint`, `stagewise/collapsed`: t where the mean largest weight crosses 0.5 and
      0.99, each with `_low` and `_high` (95 % bootstrap). NaN if not reached.
    - `stagewise/predicted`: the boundary that the spectrum of the bank predicts.
    - `stagewise/probe_seconds`, `stagewise/share_of_step_time`: the time of the probe, and that as
      a share of the wall time of training since the probe before.
    - `stagewise_by_t/{top1,entropy,ess,source_weight,target_difference}/t=...`: means by stratum;
      `target_difference` is MSE(conditional, oracle velocity).

    **To TensorBoard** also the figures `concentration`, `target_difference` and `heatmap`, and a
    custom-scalars layout, which replaces yours, if any. **To disk**, in `dirpath`: `stages.jsonl`
    (a line for the bank, and one for each probe) and the figures as PNG. Figures mark the boundary
    of the run, which is that of its first probe; `heatmap` shows the midpoint of each probe.

    Do not use it with couplings that make noise and data dependent (minibatch OT). The stages of a
    model that is conditioned on more than classes (text) come earlier.

    Args:
        bank: The training latents, if they are not to be read from the loader. It is moved to the
            training device if it takes less than a quarter of the free memory there, and otherwise
            streamed.
        strata: Strata of t, default 24; half of them lie near the predicted boundary if that is
            near an end of [0, 1] (`stages.stage_edges`).
        queries: Noisy samples in each stratum, default 64. The interval of `collapsed` depends on
            the few in a hundred that have not collapsed; more queries make it narrower.
        engine: How the oracle reaches the rows, default `Auto()`: exactly. Not `Sharded`, because
            the ranks share the queries of a probe: give each the same memory-mapped bank, which a
            machine holds in memory once.
        name: Prefix of all tags and name of the folder, default "stagewise". Two monitors in one
            trainer need two names.
        **options: `every_n_steps` and `figures`, see `MonitorOptions`; the first probe is in the
            first step, before any weight changes. And options of the run, see `RunOptions`.

    Raises:
        TypeError: At construction for an engine, bank or path of a wrong type.
        ValueError: At construction for numbers out of range; before the first training step if
            `x_1` is not found, or if bank and batch do not fit.
        MemoryError: Before the first step, if the bank would not fit.

    Example:
        >>> from stagewise.callbacks import PosteriorMonitor
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[PosteriorMonitor()], logger=False)
    """

    order = 1
    data_only = True
    event = "probe"
    charts = {
        "boundary (t, 0 = noise)": "/(midpoint|collapsed|predicted)$",
        "cost of a probe / step time": "/share_of_step_time$",
    }

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        strata: int = 24,
        queries: int = 64,
        engine: Engine | None = None,
        name: str = "stagewise",
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(name, bank, **options)
        if engine is not None and not (isinstance(engine, Engine) and engine.holds_all_rows):
            raise TypeError(
                f"Expected `engine` to be a stagewise engine other than Sharded, got {engine!r}. "
                "For a bank larger than a process: LatentBank.open(path) maps one into all ranks."
            )
        stage_edges(math.nan, strata)
        stratified_times(torch.tensor([0.0, 1.0]), queries)
        self.strata, self.queries, self.engine = strata, queries, engine
        self.curve: StageCurve | None = None
        self.boundary: StageBoundary | None = None
        self.predicted = math.nan
        self.wise = False

    def state_dict(self) -> dict[str, Any]:
        """The probes so far and the last curve, as plain numbers."""
        curve = None
        if self.curve is not None:
            curve = {"t": self.curve.t.tolist(), "values": self.curve.values.tolist()}
        return {**super().state_dict(), "curve": curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the probes of a checkpoint."""
        super().load_state_dict(state_dict)
        curve = state_dict.get("curve")
        self.curve = None
        if curve is not None:
            t, values = (torch.tensor(curve[name], dtype=torch.float64) for name in ("t", "values"))
            self.curve = StageCurve(t, values)

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes bank and path, and opens the files."""
        super().start()
        run = self.run
        self.curve = self.curve if self.history else None
        self.boundary = None if self.curve is None else self.curve.boundary(seed=self.seed)
        self._take_bank()
        bank, (path, found) = run.bank(self), run.path_of(self)
        if few_rows(bank):
            rank_zero_warn(few_rows(bank))
        elif self.wise and 2 * len(bank.classes) > len(bank):
            rank_zero_warn(
                f"The labels make {len(bank.classes)} classes of {len(bank)} rows. In a class of "
                "one row every posterior has collapsed at any t. If indices were taken for labels, "
                "say class_wise=False or read_batch=lambda batch: (batch[0], None)."
            )
        posterior = f"over {bank.origin or 'all rows'}"
        if bank.pairs is not None:
            posterior = "over the rows of its mask"
        if self.wise:
            pairs = "masks and classes" if bank.pairs is not None else "classes"
            posterior = f"over the rows of its class ({len(bank.classes)} {pairs})"
            if run.option(self, "class_wise") is None:
                posterior += ", as there are labels (class_wise=False if training ignores them)"
        alike = "" if self.oracle.condition is None else " of rows that weigh alike"
        self.say(
            f"{bank}, std {bank.std:.3g}; {path!r} ({found}), t = 0 is noise; "
            f"posterior {posterior}, by {self.oracle.engine.describe(bank)}; predicted boundary"
            f"{alike} t = {self.predicted:.3f}; {self.writer.describe()}"
        )
        self.open_files(self._header())

    def _take_bank(self, edges: Tensor | None = None) -> None:
        run = self.run
        self.wise = run.class_wise(self)
        self.oracle = run.oracle(self, engine=self.engine)
        bank, path = self.oracle.bank, self.oracle.path
        self.predicted = predicted_boundary(bank, path, class_wise=self.wise)
        recipe = Recipe.of(self.oracle, self.wise, self.strata, self.queries, self.seed)
        self.recipe = recipe if edges is None else replace(recipe, edges=edges)
        run.recipes.append(self.recipe)

    def _draws(self, at_end: bool) -> bool:
        """Whether to draw at a probe, which may be the last one before training ends."""
        total, step = self.run.total, self.run.host.global_step
        last = total is not None and step // self.every == (total - 1) // self.every
        return super()._draws(at_end or last)

    def settle(self) -> None:
        """In the first step: warns if the network has other conditions, and probes."""
        self.reconsider()
        if self.due(self.run.first_step):
            self.probe(self.run.first_step)

    @override
    def before_batch(self, step: int) -> None:
        if self.due(step):
            self.probe(step)

    def after_batch(self, step: int, before: int) -> None:
        """Does nothing: it does not ask the model."""

    def end(self) -> None:
        """Logs the boundary; it does not probe, because the data are the same."""
        last = self.history[-1]
        ends = f"{_in_words(last, 'midpoint', 0.5)}, {_in_words(last, 'collapsed', 0.99)}"
        self.say(f"boundary t = {ends} at step {last['step']}; {self.summary()}")

    def renew(self) -> None:
        """Measures the changed latents in the same strata, so that probes can be compared."""
        self._take_bank(self.recipe.edges)
        self.writer.event(self._header())
        self.probe(self.run.host.global_step)

    def reconsider(self) -> None:
        """Warns if the network is given more, or fewer, conditions than the posterior."""
        run = self.run
        if run.option(self, "class_wise") is False or self.oracle.condition is not None:
            return
        network, given = run.look.network, run.look.conditions
        rows = "the rows of a class" if self.wise else "all rows"
        labelled = run.look.labels is not None
        if given:
            rank_zero_warn(
                f"The network is also given {', '.join(given)}, and PosteriorMonitor measures the "
                f"posterior over {rows}, as for a model that ignores that. The posterior of a "
                "model that uses it collapses earlier: read the boundary as an upper bound, or "
                "weigh rows by a kernel on it: PosteriorMonitor(condition=Condition(bandwidth="
                "...)). If the model does ignore it: PosteriorMonitor(class_wise=False)."
            )
        elif run.look.waiting:
            return  # this step may have dropped what a later one is given
        elif network is not None and self.wise and not network.conditional and labelled:
            rank_zero_warn(
                "There are labels, but the network is not given any: its stages are those of the "
                "posterior over all samples. Say PosteriorMonitor(class_wise=False)."
            )
        elif network is not None and network.conditional and not self.wise:
            rank_zero_warn(
                "The network is given labels, but PosteriorMonitor has none: it measures the "
                "posterior over all rows, and the stages of a class-conditional model come "
                "earlier. Say where labels are: PosteriorMonitor(read_batch=lambda batch: "
                "(batch[0], batch[1])), or give them to the bank: LatentBank(x, labels)."
            )

    # -- one probe --------------------------------------------------------------------------------

    @override
    def measure(self, step: int) -> dict[str, Any]:
        curve = self.run.curve(self.recipe, step, "a probe of PosteriorMonitor")
        self.curve, self.boundary = curve, curve.boundary(seed=self.seed)
        self._marked = self.run.boundary(self.oracle, self.wise)
        return {
            **self.boundary.as_dict(),
            "t": curve.times.tolist(),
            **{statistic: curve.mean(statistic).tolist() for statistic in STATISTICS},
        }

    def logged_at(self, step: int) -> int:
        """The same step: it measures before the batch."""
        return step

    @override
    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        keys = [key for key in entry if key.startswith(("midpoint", "collapsed"))]
        scalars = {f"{self.name}/{key}": entry[key] for key in keys}
        scalars[f"{self.name}/predicted"] = self.predicted
        for statistic in STATISTICS:
            prefix = f"{self.name}_by_t/{statistic}"
            scalars |= by_time(prefix, self.recipe.edges, entry[statistic])
        return scalars

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        bank = self.oracle.bank
        assert self.curve is not None
        about = f"{counted(len(bank), self.queries, self.strata)}, D = {bank.dim}"
        about += f", class-wise ({len(bank.classes)} classes)" if self.wise else ""
        about += "".join(f", {kernel}" for kernel in self.oracle.over.values())
        about += f", step {probes[-1]['step']}"
        # A resumed run may have been given another number of strata.
        alike = [entry for entry in probes if len(entry["t"]) == self.strata]
        found = (self.curve, self._marked, self.predicted, about)
        return {
            "concentration": pictures.concentration_figure(*found),
            "target_difference": pictures.target_difference_figure(*found),
            "heatmap": pictures.heatmap_figure(
                [entry["step"] for entry in alike],
                self.recipe.edges.numpy(),
                np.array([entry["top1"] for entry in alike]),
                [entry["midpoint"] for entry in alike],
                about,
            ),
        }

    def _header(self) -> dict[str, Any]:
        bank = self.oracle.bank
        fixed = self.oracle.engine.holds_all_rows and not bank.origin
        return {
            "event": "bank",
            "dtype": f"{bank.dtype}",
            "fingerprint": bank.fingerprint if fixed else None,
            "rows": len(bank),
            "shape": list(bank.shape),
            "std": bank.std,
            "classes": len(bank.classes),
            "class_wise": self.wise,
            "path": repr(self.oracle.path),
            "predicted": self.predicted,
            **self.oracle.over,
        }

    @override
    def layout(self) -> dict[str, list[Any]]:
        keys = ("midpoint", "collapsed")
        intervals = {f"{key} with interval": margin(f"{self.name}/{key}") for key in keys}
        shown = {"largest weight": "top1", "effective sample size": "ess"}
        shown |= {"floor": "target_difference"}
        prefix, edges = f"{self.name}_by_t", self.recipe.edges
        by_t = {
            f"{title} at four t": chart(tags_by_time(f"{prefix}/{key}", edges))
            for title, key in shown.items()
        }
        return {**super().layout(), **by_t, **intervals}


def _in_words(entry: Mapping[str, Any], name: str, level: float) -> str:
    """A boundary with its interval, for the log."""
    value, low, high = (entry[f"{name}{end}"] for end in ("", "_low", "_high"))
    if math.isnan(value):
        return f"none ({name}: the largest weight is below {level} at all t)"
    if value == high:
        return f"{value:.3f} ({name}: the largest weight is above {level} at all t asked)"
    return f"{value:.3f} ({name}, 95 % {low:.3f} to {high:.3f})"
