"""What the benchmark of schemes runs, and where a run is kept.

A run is a file in a folder, and a line in docs/results.jsonl: a benchmark that is run again, or on
another machine, has the results of before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagewise import (
    AtShare,
    LogitNormal,
    Mix,
    Oracle,
    Phase,
    Phases,
    ReferenceSet,
    Scheme,
    StageAware,
    StageCurve,
    Uniform,
    WithFloor,
)

ARCHIVE = "results.jsonl"
"""Its name, beside docs/results.md."""
BATCH, WARMUP, SAMPLES = 128, 100, 1000
LARGE = 512
"""The batch with which less noise is tried out."""


@dataclass(frozen=True)
class Plan:
    """How a data set is trained on and looked at.

    Attributes:
        horizons: Steps of a training; the learning rate is chosen at the first of them.
        rates: Learning rates that are tried.
        evaluations: How often the held-out loss is taken; samples are made every second time, and
            at the end.
        interval: Fewest steps between two evaluations.
        sampling_steps: Of the midpoint rule.
        rows: Training samples of the data set.
    """

    horizons: tuple[int, ...] = (1000, 3000)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    evaluations: int = 20
    interval: int = 1
    sampling_steps: int = 25
    rows: int = 20_000


# Of the SiT an evaluation costs more than the training between two of them.
PLANS = {
    "photos8": Plan(),
    "digits": Plan(rows=1200),
    "photos16": Plan((500, 250), (1e-3, 3e-3, 1e-2, 3e-2), 10, 50, 10),
}
DEFAULT = "default"


def schemes(oracle: Oracle, boundary: float) -> dict[str, Callable[[int], Scheme | Phases]]:
    """The rows of the tables, from a seed. Times are stratified in all of them."""
    even, middle = Uniform(stratified=True), LogitNormal(stratified=True)
    steered: dict[str, Any] = {"oracle": oracle, "target": Mix()}

    def one(timesteps: Any = even, **given: Any) -> Callable[[int], Scheme]:
        known = {"timesteps": timesteps, "boundary": boundary, **given}
        return lambda seed: Scheme(**known, seed=seed)

    def two(timesteps: Any, **given: Any) -> Callable[[int], Phases]:
        first, last = (one(times, **given) for times in (timesteps, even))
        return lambda seed: Phases([Phase(first(seed), AtShare(0.6)), Phase(last(seed))])

    def two_stages(seed: int) -> Scheme:
        measured = StageCurve.measure(oracle, class_wise=True).boundary()
        return Scheme.two_stage(oracle, timesteps=even, boundary=measured, seed=seed)

    return {
        "plain": one(),
        "oracle, all t": one(**steered),
        "oracle, navigation": one(oracle=oracle, target=Mix("boundary")),
        "reference set of 128": one(oracle=oracle, target=ReferenceSet(128)),
        "logit-normal t": one(middle),
        "logit-normal then uniform t": two(middle),
        "oracle, logit-normal then uniform t": two(middle, **steered),
        "stage-aware t (0.3)": one(StageAware(0.3, stratified=True)),
        DEFAULT: two(WithFloor(LogitNormal(), 0.5, stratified=True), **steered),
        "two stages": two_stages,
    }


NAMES = tuple(schemes(None, 0.5))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """One training run."""

    data: str
    scheme: str
    horizon: int
    lr: float
    seed: int

    @property
    def file(self) -> str:
        name = "".join(c if c.isalnum() else "_" for c in self.scheme)
        return f"{self.data}-{name}-{self.horizon}-{self.lr:g}-{self.seed}.json"


def best_rate(folder: Path, name: str, horizon: int) -> float | None:
    """The learning rate with which plain training gets lowest on the first seed, if all ran."""
    files = [folder / Part(name, "plain", horizon, lr, 0).file for lr in PLANS[name].rates]
    if not all(file.exists() for file in files):
        return None
    runs = [json.loads(file.read_text()) for file in files]
    lowest = {run["lr"]: run["curve"][-1]["loss"] for run in runs}
    return min(lowest, key=lambda lr: math.inf if math.isnan(lowest[lr]) else lowest[lr])


def options(about: str | None, folder: str, data: Iterable[str]) -> argparse.ArgumentParser:
    """What every benchmark of trainings can be told."""
    parser = argparse.ArgumentParser(description=str(about).split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(folder), help="of the runs, a file each")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where results are kept")
    parser.add_argument("--report", action="store_true", help="run nothing, write what there is")
    parser.add_argument("--data", default=",".join(data), help="which, by commas")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    return parser


# -- files ----------------------------------------------------------------------------------------


def write_once(target: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Writes the result of `make`; None if the file is there, or another process makes it."""
    claim = target.with_suffix(".running")
    if target.exists():
        return None
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return None
    try:
        result = make()
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(target)
        return result
    finally:
        claim.unlink()


def record(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds; it is made first, or waited for if another process makes it."""
    while not file.exists():
        if write_once(file, make) is None:
            time.sleep(2)
    return json.loads(file.read_text())


def unpack(archive: Path, folder: Path) -> int:
    """Writes the records that `folder` does not have yet as files there; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    new = {n: record for n, record in _read(archive).items() if not (folder / n).exists()}
    for name, record in new.items():
        (folder / name).write_text(json.dumps(record))
    return len(new)


def pack(folder: Path, archive: Path) -> None:
    """Adds the records in `folder` to the archive, in place of those of the same name."""
    records = _read(archive)
    for file in sorted(folder.glob("*.json")):
        records[file.name] = _rounded(json.loads(file.read_text()))
    lines = (json.dumps({"file": name, "record": records[name]}) for name in sorted(records))
    partial = archive.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines))
    partial.replace(archive)


def _read(archive: Path) -> dict[str, Any]:
    if not archive.exists():
        return {}
    lines = map(json.loads, archive.read_text().splitlines())
    return {line["file"]: line["record"] for line in lines}


def _rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
