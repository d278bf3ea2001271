"""Where a monitor writes: the loggers of the training, and files on disk.

Every logger gets the scalars. The rest depends on what methods a logger has, not on its class, so
that loggers of `lightning` and of `pytorch_lightning` are treated alike:

    pictures   logger.log_image(key, images, step)           Weights & Biases
               experiment.add_image(tag, image, step)        TensorBoard
               experiment.log_image(run_id, image, file)     MLflow, if the logger has a `run_id`
               experiment.log_image(image, name, step)       Comet
    text       experiment.add_text(tag, text, step)          TensorBoard
    dashboard  experiment.add_custom_scalars(layout)         TensorBoard

A logger or a disk that fails is a warning: watching does not end a training.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from stagewise.callbacks.drawing import render
from stagewise.callbacks.host import Host
from stagewise.callbacks.ranks import rank_zero_warn
from stagewise.files import is_full, jsonable, replace_file

__all__ = ["Writer", "as_logger", "by_time", "chart", "margin", "show_pictures", "tags_by_time"]

_WARNED: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Loggers that failed, by their id: a logger need not be hashable."""
_TOLD: set[tuple[str, Path]] = set()
"""What could not be done, and in which folder."""


class Writer:
    """Writes one monitor's scalars, pictures and events; only rank zero writes.

    Its construction is a collective.

    Args:
        host: The training.
        name: Prefix of all tags.
        dirpath: Folder of the files, default that of the host. If the host has none
            (`fast_dev_run`), nothing is written to disk.
    """

    def __init__(self, host: Host, name: str, dirpath: str | Path | None) -> None:
        default = host.folder(name)
        self.name, self._host, self._loggers = name, host, host.loggers
        self.folder = default and Path(dirpath or default)
        self.active = host.rank == 0
        self._file = self.folder / "stages.jsonl" if self.active and self.folder else None

    def describe(self) -> str:
        """Where things are written, for a line of the log."""
        where = f"files in {self.folder}" if self.folder else "no files (fast_dev_run)"
        return where if self._loggers else f"{where}; there is no logger"

    def start(self, events: Iterable[Mapping[str, Any]], *, resumed: bool) -> None:
        """Rewrites `stages.jsonl`, so that a resumed run holds each event once; a collective.

        The events of another run are kept as `stages.bak.jsonl`.
        """
        file = self._file
        with self._host.together("writing its files"):
            if file is None:
                return
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                if not resumed and file.exists() and file.stat().st_size:
                    file.replace(file.with_name("stages.bak.jsonl"))
                replace_file(file, lambda partial: _append(partial, events))
            except OSError as error:
                raise OSError(
                    f"Cannot write {file}: {error.strerror or error}. Say where files go: "
                    "dirpath=..."
                ) from error

    def event(self, event: Mapping[str, Any]) -> None:
        """Appends a line to `stages.jsonl`; warns if it cannot."""
        file, size = self._file, None
        if file is None:
            return
        try:
            size = file.stat().st_size
            _append(file, [event])
        except OSError as error:
            if size is not None:  # half a line would make the next one unreadable
                with suppress(OSError):
                    os.truncate(file, size)
            _cannot("append to", file, error, "the event is missing there until the run resumes")
        else:
            _TOLD.discard(("append to", file.parent))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs scalars under their full tags to every logger."""
        for logger in self._loggers:
            with _spared(logger, "scalars"):
                logger.log_metrics(dict(values), step=step)

    def text(self, tag: str, message: str, step: int) -> None:
        """Shows a line of text under its full tag, in the loggers that show text."""
        self._on_boards("add_text", f"the text {tag}", tag, message, step)

    def announce(
        self, step: int, kind: str, message: str, evidence: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes an event: a line on disk, a scalar of 1 at its step, and a text."""
        event = {"event": "transition", "kind": kind, "step": step}
        event |= {"message": message, "evidence": dict(evidence)}
        self.event(event)
        self.scalars({f"{self.name}/{kind.replace(' ', '_')}": 1.0}, step - 1)
        self.text(f"{self.name}/{kind}", f"step {step}: {message}", step - 1)
        return event

    def save(self, file: Path) -> bool:
        """Replaces a checkpoint atomically; a collective.

        Returns:
            Whether it could be written. Under several processes an error is raised instead.
        """
        host, partial = self._host, file.with_name(f".{file.stem}.partial{file.suffix}")
        try:
            host.save(partial)
            if self.active:
                if file.is_dir():  # of a strategy that writes a folder
                    shutil.rmtree(file)
                partial.replace(file)
        except (OSError, RuntimeError) as error:
            if self.active:
                with suppress(OSError):
                    partial.unlink()
            if host.world_size > 1 or not (isinstance(error, OSError) or is_full(error)):
                raise
            _cannot("write", file, error, "the previous file stays")
            return False
        _TOLD.discard(("write", file.parent))
        return True

    def pictures(self, figures: Mapping[str, Figure], step: int) -> None:
        """Saves figures as PNG and shows them as `<name>/<figure>`."""
        if self.active:
            show_pictures(figures, self.name, self.folder, self._loggers, step)

    def dashboard(self, callbacks: Iterable[Any]) -> None:
        """Sets TensorBoard's custom-scalars page to the charts of all callbacks, and the epoch."""
        page = {one.name: charts for one in callbacks if (charts := one.layout())}
        page |= {"epoch": {"epoch": chart(["epoch"])}}
        self._on_boards("add_custom_scalars", "the page of its custom scalars", page)

    def _on_boards(self, method: str, what: str, *values: Any) -> None:
        """Calls a method of all loggers' experiments that have it."""
        for logger in self._loggers if self.active else ():
            with _spared(logger, what):
                if (add := getattr(_experiment(logger), method, None)) is not None:
                    add(*values)


def _append(file: Path, events: Iterable[Mapping[str, Any]]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(jsonable(event)) + "\n" for event in events)


def tags_by_time(prefix: str, edges: Tensor) -> list[str]:
    """A tag for each bin, `<prefix>/t=<centre of the bin>`."""
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    digits = max(3, 1 - math.floor(math.log10(float(edges.diff().min()))))
    return [f"{prefix}/t={t:.{digits}f}" for t in centres]


def by_time(prefix: str, edges: Tensor, values: Sequence[float]) -> dict[str, float]:
    """Scalars under the tags of `tags_by_time`; empty bins are left out."""
    pairs = zip(tags_by_time(prefix, edges), values, strict=True)
    return {tag: value for tag, value in pairs if not math.isnan(value)}


def chart(tags: Sequence[str]) -> list[Any]:
    """A chart of TensorBoard's custom-scalars page: at most four tags, spread evenly.

    TensorBoard draws all curves of a run in one colour, so more could not be told apart.
    """
    places = np.linspace(0, len(tags) - 1, min(4, len(tags))).round().astype(int)
    return ["Multiline", [f"^{re.escape(tags[place])}$" for place in places]]


def margin(tag: str) -> list[Any]:
    """A chart of a number with its interval."""
    return ["Margin", [f"{tag}{end}" for end in ("", "_low", "_high")]]


def show_pictures(
    figures: Mapping[str, Figure],
    name: str,
    folder: Path | None,
    loggers: Iterable[Any],
    step: int,
) -> None:
    """Saves figures as `<folder>/<figure>.png` and shows them as `<name>/<figure>` in the loggers.

    A file or a logger that fails is a warning; the previous file then stays.
    """
    for title, figure in figures.items():
        image, tag = Image.fromarray(render(figure)), f"{name}/{title}"
        if folder:
            _save(image, folder / f"{title}.png")
        for logger in loggers:
            with _spared(logger, f"the picture {tag}"):
                _show(logger, tag, image, step)


def _show(logger: Any, tag: str, image: Image.Image, step: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(key=tag, images=[image], step=step)
        return
    experiment = _experiment(logger)
    if hasattr(experiment, "add_image"):
        experiment.add_image(tag, np.asarray(image), step, dataformats="HWC")
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):
        experiment.log_image(logger.run_id, image, f"{tag}/step_{step:08}.png")
    elif hasattr(experiment, "log_image"):
        experiment.log_image(image, name=tag, step=step)


def _save(image: Image.Image, file: Path) -> None:
    try:
        replace_file(file, lambda partial: image.save(partial, format="png"))
    except OSError as error:
        _cannot("write the picture", file, error, "it is shown in the loggers only")
    else:
        _TOLD.discard(("write the picture", file.parent))


def _cannot(do: str, file: Path, error: Exception, so: str) -> None:
    """Warns once for a folder, until something could be written there."""
    if (do, file.parent) in _TOLD:
        return
    _TOLD.add((do, file.parent))
    code = getattr(error, "errno", None)
    rank_zero_warn(
        f"Cannot {do} {file}: {os.strerror(code) if code else error}. Training goes on, and {so}; "
        "later failures in that folder are not reported. Make room on that disk, or choose another "
        "folder: dirpath=..."
    )


class _Logger:
    """A function of (dict, step) as a logger."""

    def __init__(self, log: Callable[[dict[str, float], int], Any], experiment: Any = None) -> None:
        self._log, self.experiment = log, experiment

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self._log(values, step)


def as_logger(log: Any) -> Any:
    """What the user gave, as something with `log_metrics(values, step=)`."""
    if hasattr(log, "log_metrics"):
        return log
    if hasattr(log, "add_scalar"):

        def add(values: dict[str, float], step: int) -> None:
            for tag, value in values.items():
                log.add_scalar(tag, value, step)

        return _Logger(add, log)
    if callable(log):
        return _Logger(log)
    raise TypeError(
        f"Expected `log` to be a function of (dict, step), a SummaryWriter or a logger, got "
        f"{log!r}: Watch(..., log=lambda values, step: print(step, values))."
    )


def _experiment(logger: Any) -> Any:
    return getattr(logger, "experiment", None)


@contextmanager
def _spared(logger: Any, what: str) -> Iterator[None]:
    """Warns instead of raising, once for each logger."""
    try:
        yield
    except Exception as error:  # whatever a logger's own library raises
        if _WARNED.get(id(logger)) is not logger:
            _WARNED[id(logger)] = logger
            rank_zero_warn(
                f"{type(logger).__name__} did not take {what}: {error!r}. Training goes on, and "
                "later failures of this logger are not reported. Repair it, or add one that "
                'works: Trainer(logger=[logger, TensorBoardLogger("logs")]).'
            )
