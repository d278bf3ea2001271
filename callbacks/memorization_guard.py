"""`MemorizationGuard`: warns early that a model begins to copy, and keeps weights from before."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from stagewise.bank import LatentBank
from stagewise.callbacks.memorization_monitor import MemorizationMonitor
from stagewise.callbacks.monitor import MonitorOptions
from stagewise.callbacks.stage_transitions import MEMORIZATION_ONSET
from stagewise.callbacks.training_bank import Samples
from stagewise.callbacks.writer import by_time, chart, tags_by_time
from stagewise.copies import nearest_rows
from stagewise.learning_events import GapWatch, OnsetLaw
from stagewise.velocity_probe import Probe

__all__ = ["MemorizationGuard"]

_EARLY, _LATE = 2, 4
"""Bins of t before and after the posterior has collapsed on one row."""

_EARLIEST, _LATEST = 0.05, 0.75
"""The collapsed boundary is clipped to these, so that there are early and late bins: with one row
in each class it is 0."""

_COPIED = 0.01
"""A model copies if its share of copies is above this, and above that of held-out samples, with
97.5 % confidence."""

_BETTER = 0.99
"""Weights are saved again if the held-out loss is below this share of that of the saved ones."""

_PASSES = 2
"""Passes through the rows before which no onset is reported: rows cannot be memorized yet."""

_FIRST, _GROWTH = 32, 1.5
"""The step of the second probe, and the factor from there to each next one."""


class MemorizationGuard(MemorizationMonitor):
    """Warns that a model begins to memorize its training rows, before samples show it.

    At each probe the model is asked about noisy training samples and noisy held-out samples, the
    same each time, and samples are drawn from it. Memorization shows first beyond the collapsed
    boundary, where the target of training is one row: held-out error rises from its lowest value
    while training error falls (`stagewise.learning_events`), after two passes through the rows.
    Later, more than 1 % of the samples are copies, and a larger share than of held-out samples (in
    few dimensions new samples are that near to a row, too). At whichever comes first, a warning
    says where in t, since when, and how many samples are copies, as do a line of `stages.jsonl`, a
    text, and the scalar `stagewise_guard/memorization_onset`. A phase that ends
    `AtEvent("memorization onset")`, in a `StageScheme` of the same trainer, then goes on to the
    next phase, which may smooth (`Scheme.two_stage`).

    **`before_onset.ckpt`** in `dirpath` is a whole checkpoint of the probe with the lowest held-out
    loss over all t, from before it was sure that more than 1 % are copies (5 of 128 samples). It
    may be from after the warning: while the gap opens at late t, other t are still being learned.

    **Logged** at each probe (`stagewise_guard` is `name`): what `MemorizationMonitor` logs, for
    the model alone; `stagewise_guard/held_out_loss`, `.../kept_step`, `.../steps_left` (with
    `onsets`), and `stagewise_guard_by_t/{train,held_out,gap}/t=...`. Probes in `stages.jsonl` also
    name the rows that are copied most, `copied_rows`: pairs of a row's number and its samples.

    Held-out samples must be of the same kind as the training samples. Without any, only copies are
    counted, which is late. Do not use it where `MemorizationMonitor` cannot be used.

    Args:
        bank: The training latents, if they are not to be read from the loader.
        samples: Samples drawn at a probe, default 128.
        queries: Noisy samples in each of six bins of t, of training and of held-out samples,
            default 128. Fewer are cheaper, and find the onset later.
        alarm: Whether copying is unwanted, default True. False: the onset is logged, without a
            warning, and no checkpoint is kept.
        onsets: Steps of the onset on subsets of the data by their number of rows, with the same
            model, batch size and learning rate. They predict the onset on all rows (`OnsetLaw`:
            tau = c N, from several runs tau = c N^p). Default None.
        name: Prefix of tags and name of the folder, default "stagewise_guard".
        **options: See `MemorizationMonitor`; `every_n_steps` is at most 1000 by default here, and
            the first probes are at steps 1, 32, 48, 72, ... because few rows are learned early.

    Attributes:
        onset: The event of the onset, a dict; None before.
        best: `step`, `held_out_loss` and `file` of the kept checkpoint; None before there is one.

    Raises:
        ValueError: At construction for numbers out of range; else as `MemorizationMonitor`.

    Example:
        >>> from stagewise.callbacks import MemorizationGuard
        >>> guard = MemorizationGuard(onsets={64: 400, 128: 900})
        >>> robot = MemorizationGuard(alarm=False)  # copies of action tables are wanted
    """

    event = "guard_probe"
    charts = {"held-out loss": "/held_out_loss$"}
    longest: ClassVar[int] = 1000

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        samples: int = 128,
        queries: int = 128,
        alarm: bool = True,
        onsets: Mapping[int, float] | None = None,
        name: str = "stagewise_guard",
        **options: Unpack[MonitorOptions],
    ) -> None:
        alone: dict[str, Any] = {"t_switch": (0.0,), "t_resume": (), "weights": "current"}
        super().__init__(bank, samples=samples, name=name, **alone, **options)
        if queries < 2:
            raise ValueError(f"Expected `queries` of at least 2, got {queries}.")
        self.queries, self.alarm = queries, alarm
        self.law = None if onsets is None else OnsetLaw(onsets)
        self.edges = torch.empty(0)
        self.watch = GapWatch()
        self.onset: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The probes so far, what they are compared with, the onset and the kept checkpoint."""
        own = {"watch": self.watch.state_dict(), "onset": self.onset, "best": self.best}
        return {**super().state_dict(), **own}

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes the state of a resumed run; reads training and held-out samples."""
        super().start()
        stash = (self.stash or {}) if self.history else {}
        self.watch, self._saves = GapWatch(), False
        self.watch.load_state_dict(stash.get("watch") or {})
        self.onset, self.best = stash.get("onset"), stash.get("best")
        if self.onset is not None and self.onset not in self.events:  # of an older version
            self.events = sorted([*self.events, self.onset], key=lambda event: event["step"])
        if self.law is not None:
            rows, total = len(self.oracle.bank), self.run.total
            onset, past = self.law(rows), self.run.began
            within = "" if total is None else f" of the {total - past} of this training"
            self.say(
                f"by tau = {self.law!r} memorization of {rows} rows begins at step {onset:.0f}, "
                f"{onset - past:.0f} steps from here{within}"
            )

    def _take_samples(self) -> None:
        count = (_EARLY + _LATE) * self.queries
        self._splits = {"train": self.rows(count), "held_out": self.others(count)}
        self._others = None

    def _make_probe(self) -> None:
        """Noise for the samples, and the noisy samples of both kinds."""
        super()._make_probe()
        bank = self.oracle.bank
        if self.wise or (bank.labelled and self.conditional):
            for split, rows in self._splits.items():
                if rows is not None and self.lacks_classes(rows):
                    self.say(
                        f"{split} samples have no labels of the bank, so errors on held-out "
                        "samples are left out. Say where they are: "
                        "MemorizationGuard(read_batch=lambda batch: (batch[0], batch[1]))."
                    )
                    self._splits["held_out"] = None
        boundary = self.run.boundary(self.oracle, self.wise).collapsed
        late = _LATEST if math.isnan(boundary) else min(max(boundary, _EARLIEST), _LATEST)
        bins = torch.linspace(0, late, _EARLY + 1), torch.linspace(late, 1, _LATE + 1)
        self.edges = torch.cat([bins[0], bins[1][1:]]).double()
        train, others = self._splits["train"], self._splits["held_out"]
        self._probes: dict[str, Probe] = {}
        if train is not None and others is not None:
            # With few held-out rows, more noise does not tell more.
            few = max(2, min(self.queries, len(others[0])))
            self._probes["train"] = self.noisy(train, self.edges, self.queries, 0)
            self._probes["held_out"] = self.noisy(others, self.edges, few, 1)
        self._chance = self._copies_by_chance(others)

    def _copies_by_chance(self, others: Samples | None) -> float:
        """The share of held-out samples that count as copies; 0 without any."""
        found = torch.zeros(2, device=self.run.host.device)
        if others is not None:
            near = nearest_rows(self.oracle.bank, *others)
            found += torch.stack([near.copied.sum(), near.ratio.isfinite().sum()]).to(found)
        copied, total = self.run.host.reduce(found).tolist()
        return copied / max(total, 1)

    def _header(self) -> dict[str, Any]:
        others = self._splits["held_out"]
        rows = 0 if others is None else len(others[0])
        law = None if self.law is None else self.law(len(self.oracle.bank))
        own = {"event": "guard", "edges": self.edges.tolist(), "predicted_onset": law}
        return {**super()._header(), "held_out_rows": rows, **own}

    @override
    def layout(self) -> dict[str, list[Any]]:
        gap = chart(tags_by_time(f"{self.name}_by_t/gap", self.edges))
        return super().layout() | ({"gap at four t": gap} if self._probes else {})

    def renew(self) -> None:
        """Reads samples of the changed latents, and drops errors on the old ones."""
        super().renew()
        self.watch, self.best = GapWatch(), None

    def reconsider(self) -> None:
        """Drops errors of the network without its conditions."""
        before = self.network
        super().reconsider()
        if self.network is not before:
            self.watch, self.best = GapWatch(), None

    def due(self, step: int) -> bool:
        """More often than other monitors early in training."""
        last = self.last
        return super().due(step) or (last is not None and step >= max(_FIRST, _GROWTH * last))

    def probe(self, step: int, *, at_end: bool = False) -> None:
        """Probes, and reports the onset; a collective."""
        super().probe(step, at_end=at_end)
        if not at_end:  # a run that goes on does not have this probe
            self._judge(step, self.history[-1])

    def after_all(self) -> None:
        """Saves the checkpoint, now that the state of all callbacks is that of this step."""
        if self._saves:
            self._saves = False
            assert self.best is not None
            if not self.writer.save(Path(self.best["file"])):
                self.best = None  # the next probe tries again

    def end(self) -> None:
        """Logs the onset, the kept checkpoint and the rows copied most."""
        super().end()
        if not self.history:
            return
        said = "no memorization onset"
        if self.onset is not None:
            rows, step = len(self.oracle.bank), self.onset["step"]
            said = (
                f"memorization onset at step {step}; to predict it for more rows: "
                f"MemorizationGuard(onsets={{{rows}: {step}}})"
            )
        copied = self.history[-1]["copied_rows"]
        if copied:
            named = ", ".join(f"{row} ({count})" for row, count in copied)
            said += f"; rows copied most, and by how many of {self.samples} samples: {named}"
        self.say(f"{said}{self._where()}")

    # -- one probe --------------------------------------------------------------------------------

    @override
    def measure(self, step: int) -> dict[str, Any]:
        with self.together():
            own = {split: self._ask(probe) for split, probe in self._probes.items()}
        self._errors = {
            split: self._of_all_ranks(values[None], self._probes[split].size)[0].view(
                len(self.edges) - 1, -1
            )
            for split, values in own.items()
        }
        entry = super().measure(step)
        means = {split: errors.mean(1) for split, errors in self._errors.items()}
        entry |= {split: mean.tolist() for split, mean in means.items()}
        if means:
            entry["gap"] = (means["held_out"] - means["train"]).tolist()
            entry["held_out_loss"] = float(means["held_out"] @ self.edges.diff())
        return entry | {"copied_rows": self._copied_rows()}

    def _ask(self, probe: Probe) -> Tensor:
        """The conditional errors of this rank."""
        found: list[Tensor] = []
        device = self.run.host.device
        with self.asked() as velocity:
            probe.measure(velocity, lambda _, values: found.append(values[0]), device)
        return torch.cat(found).cpu().double()

    def _of_all_ranks(self, own: Tensor, total: int) -> Tensor:
        """Numbers (K, n) of which each rank holds every `world_size`-th, as (K, total)."""
        host = self.run.host
        if host.world_size == 1:
            return own
        every = own.new_zeros(len(own), total)
        every[:, host.rank :: host.world_size] = own
        return host.reduce(every)

    def _copied_rows(self) -> list[list[int]]:
        """The rows copied most, by their place in the data set, and by how many samples."""
        near, bank = self._shown[1][0.0], self.oracle.bank
        pairs = torch.stack([near.row, near.copied]).double().cpu()
        rows, copied = self._of_all_ranks(pairs, self.samples)
        counts = Counter(rows[copied > 0].long().tolist())
        places = {row: row if bank.index is None else int(bank.index[row]) for row in counts}
        return [[places[row], count] for row, count in counts.most_common(8)]

    @override
    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        scalars = super().scalars(entry)
        if self.law is not None:
            left = self.law(len(self.oracle.bank)) - entry["step"]
            scalars[f"{self.name}/steps_left"] = left
        if "gap" in entry:
            scalars[f"{self.name}/held_out_loss"] = entry["held_out_loss"]
            for key in ("train", "held_out", "gap"):
                scalars |= by_time(f"{self.name}_by_t/{key}", self.edges, entry[key])
        return scalars

    # -- the onset --------------------------------------------------------------------------------

    def _judge(self, step: int, entry: dict[str, Any]) -> None:
        """Reports the onset, and decides whether to keep the weights."""
        copying, gap = entry["low"][0] > max(_COPIED, self._chance), None
        folder = self.writer.folder
        passed = step * self.per_step >= _PASSES * len(self.oracle.bank)
        if self._errors and passed:
            train, others = (self._errors[split][_EARLY:] for split in ("train", "held_out"))
            gap = self.watch.update(step, train, others, self.edges[_EARLY:])
        if self.onset is None and (copying or gap is not None):
            self._tell_onset(step, entry, gap)
        if not self.alarm or folder is None or copying:
            return
        loss = entry.get("held_out_loss", math.nan)
        keeps = self.best is None or loss < _BETTER * self.best["held_out_loss"]
        if not self._errors:  # the last before the onset is the best that is known
            keeps = self.onset is None
        if keeps:
            file = folder / "before_onset.ckpt"
            self.best, self._saves = {"step": step, "held_out_loss": loss, "file": str(file)}, True
            self.writer.scalars({f"{self.name}/kept_step": float(step)}, self.logged_at(step))

    def _tell_onset(self, step: int, entry: dict[str, Any], gap: dict[str, Any] | None) -> None:
        samples = f"{entry['copies'][0]:.1%} of {self.samples} samples are copies"
        if self._chance:
            samples += f" ({self._chance:.1%} of held-out samples would be, too)"
        evidence: dict[str, Any] = gap or {"message": f"surely more than {_COPIED:.0%} are copied"}
        evidence["copies"] = entry["copies"][0]
        message = f"{evidence.pop('message')}; {samples}"
        if self.law is not None:
            evidence["predicted"] = self.law(len(self.oracle.bank))
            message += f"; predicted for step {evidence['predicted']:.0f}"
        self.onset = self.writer.announce(step, MEMORIZATION_ONSET, message, evidence)
        self.events.append(self.onset)
        text = f"step {step}, {MEMORIZATION_ONSET}: {message}{self._where()}"
        if self.alarm:
            cure = (
                "To train against it: more data, smoothing where there is none "
                "(StageScheme(Scheme.two_stage)), or stop here."
            )
            self.warn(f"{text}. {cure}")
        else:
            self.say(text)
        self.run.tell("notice", MEMORIZATION_ONSET)

    @property
    def event_kinds(self) -> dict[str, str]:
        """The events that it may report; see `StageTransitions`."""
        return {MEMORIZATION_ONSET: ""}

    def _where(self) -> str:
        if self.best is None:
            return ""
        loss = self.best["held_out_loss"]
        said = "" if math.isnan(loss) else f" (held-out loss {loss:.4g})"
        return f"; the weights of step {self.best['step']}{said} are in {self.best['file']}"
