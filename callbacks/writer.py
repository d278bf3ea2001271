"""Where a monitor writes: the loggers of the trainer, TensorBoard pictures, files on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from stagewise.callbacks.checks import together
from stagewise.callbacks.figures import render
from stagewise.plain import jsonable

__all__ = ["Writer", "show_pictures"]


class Writer:
    """Writes one monitor's scalars, pictures and events; only rank zero writes.

    Constructing it is a collective: every rank must.

    Args:
        trainer: The trainer.
        name: Prefix of all tags.
        dirpath: Folder of the files, default `<trainer.log_dir>/<name>`, or without a logger
            `<trainer.default_root_dir>/<name>_logs`. Nothing is written to disk in a
            `fast_dev_run`.
    """

    def __init__(self, trainer: pl.Trainer, name: str, dirpath: str | Path | None) -> None:
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: on every rank
        default = log_dir / name if trainer.loggers else log_dir / f"{name}_logs"
        self.name = name
        self.folder = None if getattr(trainer, "fast_dev_run", False) else Path(dirpath or default)
        self.active, self._trainer = trainer.is_global_zero, trainer
        self._loggers = trainer.loggers
        self._boards = _boards(trainer.loggers)

    def describe(self) -> str:
        """Where things are written, for a line of the log."""
        where = f"files in {self.folder}" if self.folder else "no files (fast_dev_run)"
        return where if self._loggers else f"{where}; the trainer has no logger"

    def start(self, events: Iterable[Mapping[str, Any]], *, resumed: bool) -> None:
        """Begins `stages.jsonl` anew, so that a resumed run holds each event once; a collective.

        The file of another run is kept beside it, as `stages.bak.jsonl`.

        Raises:
            OSError: If the folder cannot be written, with the cure.
        """
        with together(self._trainer, "writing its files"):
            if self.active and self.folder:
                self._start(self.folder / "stages.jsonl", events, resumed)

    def _start(self, file: Path, events: Iterable[Mapping[str, Any]], resumed: bool) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists() and not resumed:
                file.replace(file.with_name("stages.bak.jsonl"))
            self._events("w", events)
        except OSError as error:
            raise OSError(
                f"Cannot write {file}: {error.strerror or error}. Say where files go: dirpath=..."
            ) from error

    def event(self, event: Mapping[str, Any]) -> None:
        """Appends a line to `stages.jsonl`."""
        if self.active and self.folder:
            self._events("a", [event])

    def _events(self, mode: str, events: Iterable[Mapping[str, Any]]) -> None:
        assert self.folder is not None
        with (self.folder / "stages.jsonl").open(mode) as file:
            file.writelines(json.dumps(jsonable(event)) + "\n" for event in events)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs scalars under their full tags to every logger."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step=step)

    def text(self, tag: str, message: str, step: int) -> None:
        """Shows a line of text in TensorBoard, under its full tag."""
        if self.active:
            for board in self._boards:
                board.add_text(tag, message, step)

    def pictures(self, figures: Mapping[str, Figure], step: int) -> None:
        """Saves figures as PNG and shows them in TensorBoard as `<name>/<figure>`."""
        if self.active:
            show_pictures(figures, self.name, self.folder, self._loggers, step)

    def dashboard(self, trainer: pl.Trainer) -> None:
        """Sets TensorBoard's custom-scalars page, to that of all callbacks that have a `layout`.

        A page replaces the one before it, so each monitor writes that of all.
        """
        if not self.active:
            return
        callbacks = [c for c in getattr(trainer, "callbacks", []) if hasattr(c, "layout")]
        for board in self._boards:
            board.add_custom_scalars({callback.name: callback.layout() for callback in callbacks})


def show_pictures(
    figures: Mapping[str, Figure],
    name: str,
    folder: Path | None,
    loggers: Iterable[Logger],
    step: int,
) -> None:
    """Saves figures as `<folder>/<figure>.png` and shows them in TensorBoard.

    Args:
        figures: By their names.
        name: Prefix of the tags, `<name>/<figure>`.
        folder: Where the files go; None: nowhere.
        loggers: Those of TensorBoard get the pictures.
        step: The step they belong to.
    """
    for title, figure in figures.items():
        image = render(figure)
        if folder:
            Image.fromarray(image).save(folder / f"{title}.png")
        for board in _boards(loggers):
            board.add_image(f"{name}/{title}", image, step, dataformats="HWC")


def _boards(loggers: Iterable[Logger]) -> list[Any]:
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
