"""`MemorizationMonitor`: how many samples are copies of training rows, and from which t on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import Unpack, override

from stagewise.bank import LatentBank
from stagewise.callbacks import figures as pictures
from stagewise.callbacks.model_monitor import ModelMonitor
from stagewise.callbacks.monitor import MonitorOptions
from stagewise.callbacks.writer import chart, margin
from stagewise.copies import Nearest, copy_share, nearest_rows
from stagewise.masks import plain
from stagewise.memorization_probe import METHOD, MemorizationProbe

__all__ = ["MemorizationMonitor"]

_SHOWN = 8
"""Samples in a picture."""


class MemorizationMonitor(ModelMonitor):
    """Counts how many samples of a model are copies of training rows.

    The oracle makes each sample up to `t_switch`, and the model from there on (Liu et al., arXiv
    2512.02826, Fig. 5); 0 is the model alone. The model also finishes held-out rows that were
    noised to `t_resume` (Fig. 6). Noise and labels are the same in all probes; ranks share them.

    **Logged** (`stagewise_memorization` is `name`): `.../copies/t_switch=...` with `_low` and
    `_high` (95 %, exact binomial), `.../ratio/t_switch=...` (median d1/d2),
    `.../resumed_copies/t=...`, `.../probe_seconds`, `.../share_of_step_time`. **To TensorBoard and
    `dirpath`**: the figures `copies`, and for images `samples` and `resumed`; `stages.jsonl`.

    Args:
        bank: The training latents, if they are not to be read from the loader.
        samples: Samples at each `t_switch`, default 64; at least 2.
        t_switch: Times in [0, 1].
        t_resume: Times in [0, 1).
        weights: "average" of a `WeightAveraging`, once it has begun, "current", or "auto": the
            average if there is one.
        steps: Of Euler's method from t = 0 to 1, default 25.
        decode: From samples to images (n, 1 or 3, H, W), for the pictures.
        name: Prefix of tags and name of the folder.
        **options: `every_n_steps` (default at most 5000 here) and `figures`, see `MonitorOptions`;
            the first probe is after the first step, the last after the last. And options of the
            run, see `RunOptions`. `class_wise` "auto" means: if the network is given labels.
            Copies are always searched among all rows.

    Raises:
        ValueError: At construction for numbers out of range; at the start or in the first step if
            the network is not found, or "average" is asked for and there is none.

    Example:
        >>> from stagewise.callbacks import MemorizationMonitor
        >>> callback = MemorizationMonitor(samples=64, every_n_steps=5000)
    """

    order = 3
    event = "memorization_probe"
    longest: ClassVar[int] = 5000
    _probe: MemorizationProbe
    _shown: tuple[Any, ...]

    def __init__(
        self,
        bank: LatentBank | None = None,
        *,
        samples: int = 64,
        t_switch: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4),
        t_resume: tuple[float, ...] = (0.2, 0.5, 0.8),
        weights: Literal["auto", "average", "current"] = "auto",
        steps: int = 25,
        decode: Callable[[Tensor], Tensor] | None = None,
        name: str = "stagewise_memorization",
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__(name, bank, **options)
        for label, value, low in (("samples", samples, 2), ("steps", steps, 1)):
            if value < low:
                raise ValueError(f"Expected `{label}` of at least {low}, got {value}.")
        if not t_switch or not all(0 <= t <= 1 for t in t_switch):
            raise ValueError(f"Expected `t_switch` in [0, 1], one at least, got {t_switch}.")
        if not all(0 <= t < 1 for t in t_resume):
            raise ValueError(f"Expected `t_resume` in [0, 1), got {t_resume}.")
        if weights not in ("auto", "average", "current"):
            raise ValueError(
                f'Expected `weights` to be "auto", "average" or "current", got {weights!r}.'
            )
        self.samples, self.steps, self.weights, self.decode = samples, steps, weights, decode
        self.t_switch, self.t_resume = tuple(sorted(t_switch)), tuple(sorted(t_resume))

    # -- the course of a training -----------------------------------------------------------------

    def start(self) -> None:
        """Takes the bank, and reads held-out rows."""
        if self.weights == "average" and not self.run.host.averages:
            raise ValueError(
                'weights="average" needs an EMAWeightAveraging (or WeightAveraging) among the '
                'callbacks, and there is none. Add one, or say weights="current".'
            )
        super().start()

    def _take_samples(self) -> None:
        self._others = self.others(self.samples) if self.t_resume else None

    def settle(self) -> None:
        """After the first forward pass: noise and labels, header."""
        super().settle()
        self._make_probe()
        header = self._header()
        images = " To see samples: decode=lambda x: images of shape (n, 3, H, W)."
        self.say(
            f"asks {header['network']}, {header['weights']} weights; {self.writer.describe()}."
            + ("" if self._draws_images else images)
        )
        self.open_files(header)

    def _header(self) -> dict[str, Any]:
        return {
            "event": "memorization",
            "rows": len(self.oracle.bank),
            "network": self.describe(),
            "weights": "average" if self._averages else "current",
            "class_wise": self.wise,
            "samples": self.samples,
            "held_out_rows": self._held_out,
            "method": METHOD,
            "steps": self.steps,
            "path": repr(self.oracle.path),
        }

    def _make_probe(self) -> None:
        bank, host, others = self.oracle.bank, self.run.host, self._others
        labelled = bank.labelled and self.conditional
        self.wise = self.is_wise(bank.classes)
        if self.samples < host.world_size:
            raise ValueError(
                f"Expected `samples` of at least one for each of {host.world_size} ranks, got "
                f"{self.samples}."
            )
        if others is not None:
            no_labels = plain(others[1]) is None and (labelled or self.wise)
            if len(others[0]) < host.world_size or no_labels:
                self.say(
                    "held-out rows are fewer than ranks, or lack the labels that the network "
                    "is given: none are resumed."
                )
                others = None
        self._held_out = 0 if others is None else len(others[0])
        self._probe = MemorizationProbe(
            self.oracle,
            self.samples,
            others,
            labelled=labelled,
            class_wise=self.wise,
            t_switch=self.t_switch,
            t_resume=self.t_resume,
            steps=self.steps,
            seed=self.seed,
            rank=host.rank,
            world_size=host.world_size,
            reachable=self.reachable,
        )

    def renew(self) -> None:
        """Takes the bank of the changed latents."""
        super().renew()
        self._make_probe()

    def end(self) -> None:
        """Logs the last shares of copies, and where they are written."""
        super().end()
        if self.history:
            last = self.history[-1]
            columns = (last[key] for key in ("t_switch", "copies", "low", "high"))
            found = ", ".join(
                f"{share:.0%} (95 % {low:.0%} to {high:.0%}) from t = {t:g} on"
                for t, share, low, high in zip(*columns, strict=True)
            )
            self.say(f"copies at step {last['step']}: {found}; {self.summary()}")

    @property
    def _averages(self) -> bool:
        return self.weights != "current" and self.run.host.averages

    # -- one probe --------------------------------------------------------------------------------

    @override
    def measure(self, step: int) -> dict[str, Any]:
        bank = self.oracle.bank
        averaged = self.run.host.average() if self._averages else None
        with self.together():
            with self.asked(averaged) as velocity:
                made, resumed = self._probe.generate(velocity, self.run.host.device)
            labels, x1_labels = self._probe.labels, self._probe.x1_labels
            near = {t: nearest_rows(bank, x, labels) for t, x in made.items()}
            near_resumed = {t: nearest_rows(bank, x, x1_labels) for t, (_, x) in resumed.items()}
        self._shown = made, near, resumed, near_resumed
        add = self.run.host.reduce
        shares = [copy_share(near[t].ratio, add) for t in self.t_switch]
        shares_resumed = [copy_share(found.ratio, add) for found in near_resumed.values()]
        broken = sum(found["nonfinite"] for found in [*shares, *shares_resumed])
        if broken:
            self.warn(
                f"{broken} samples of step {step} are not finite, or have a mask that only one "
                "row has; they are left out of the shares of copies."
            )
        return {
            "weights": "current" if averaged is None else "average",
            "samples": self.samples,
            "t_switch": list(self.t_switch),
            "copies": [found["share"] for found in shares],
            "low": [found["low"] for found in shares],
            "high": [found["high"] for found in shares],
            "ratio": [found["median"] for found in shares],
            "histogram": [found["histogram"] for found in shares],
            "t_resume": list(near_resumed),
            "resumed_copies": [found["share"] for found in shares_resumed],
            "not_finite": broken,
        }

    @override
    def scalars(self, entry: dict[str, Any]) -> dict[str, float]:
        names = {
            "copies/t_switch={:g}": "copies",
            "copies/t_switch={:g}_low": "low",
            "copies/t_switch={:g}_high": "high",
            "ratio/t_switch={:g}": "ratio",
        }
        scalars = {
            f"{self.name}/{name.format(t)}": entry[key][k]
            for k, t in enumerate(self.t_switch)
            for name, key in names.items()
        }
        for t, share in zip(entry["t_resume"], entry["resumed_copies"], strict=True):
            scalars[f"{self.name}/resumed_copies/t={t:g}"] = share
        return scalars

    @override
    def layout(self) -> dict[str, list[Any]]:
        """Its charts, with at most four times in each."""
        page = super().layout()
        first = f"{self.t_switch[0]:g}"
        interval = margin(f"{self.name}/copies/t_switch={first}")
        page[f"share of copies, t_switch {first}, 95 %"] = interval
        titles = {"share of copies by t_switch": "copies", "median d1/d2 by t_switch": "ratio"}
        for title, key in titles.items():
            page[title] = chart([f"{self.name}/{key}/t_switch={t:g}" for t in self.t_switch])
        if self._held_out:
            tags = [f"{self.name}/resumed_copies/t={t:g}" for t in self.t_resume]
            page["share of copies among resumed samples"] = chart(tags)
        return page

    @property
    def _draws_images(self) -> bool:
        shape = self.oracle.bank.shape
        return self.decode is not None or (len(shape) == 3 and shape[0] in (1, 3))

    def _figures(self, probes: list[dict[str, Any]]) -> dict[str, Figure]:
        """Shares over the training, and samples of this rank beside their nearest rows."""
        made, near, resumed, near_resumed = self._shown
        bank, step = self.oracle.bank, probes[-1]["step"]
        about = f"N = {len(bank):,} rows, n = {self.samples} samples at each t_switch"
        drawn = {"copies": pictures.copies_figure(probes, about.replace(",", " ", 1))}
        if not self._draws_images:
            return drawn

        def shown(x: Tensor) -> Tensor:
            x = x[:_SHOWN]
            return (self.decode(x) if self.decode else x).detach().float().cpu()

        def beside(heading: str, x: Tensor, found: Nearest) -> list[pictures.Column]:
            rows = bank.take(found.row[:_SHOWN].clamp_min(0)).reshape(-1, *bank.shape)
            return [
                pictures.Column(heading, shown(x), ratio=found.ratio.cpu()),
                pictures.Column("nearest\nrow", shown(rows.float()), of_data=True),
            ]

        columns = [
            column for t, x in made.items() for column in beside(f"t_switch\n{t:g}", x, near[t])
        ]
        drawn["samples"] = pictures.grid_figure(columns, f"Generated samples at step {step}")
        if self._probe.x1 is not None:
            columns = [pictures.Column("held out", shown(self._probe.x1), of_data=True)]
            for t, (noised, x) in resumed.items():
                columns.append(pictures.Column(f"noised\nto t = {t:g}", shown(noised)))
                columns += beside("resumed", x, near_resumed[t])
            title = f"Held-out rows resumed at step {step}"
            drawn["resumed"] = pictures.grid_figure(columns, title)
        return drawn
