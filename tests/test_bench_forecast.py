"""The benchmark of forecasts: what it has run is kept beside its page, and not run again."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def forecast(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("forecast")


def test_parts_outlive_their_folder(forecast, tmp_path, monkeypatch):
    part = {"data": "digits", "scheme": "plain", "seed": 0, "batch": 160, "loss": 0.4567891}
    docs, name = tmp_path / "docs", "digits-plain-160-0.json"

    def report(folder):
        folders = ["--dir", f"{tmp_path / folder}", "--records", f"{tmp_path / 'records'}"]
        monkeypatch.setattr(sys, "argv", ["forecast", *folders, "--docs", f"{docs}", "--report"])
        forecast.main()

    docs.mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / name).write_text(json.dumps(part))
    report("one")
    assert json.loads((docs / "forecast.jsonl").read_text()) == {
        "file": name,
        "record": {**part, "loss": 0.456789},
    }
    report("two")
    assert json.loads((tmp_path / "two" / name).read_text())["loss"] == 0.456789
    assert len((docs / "forecast.jsonl").read_text().splitlines()) == 1


def test_a_part_is_run_once(forecast, tmp_path, monkeypatch):
    made = []

    def ended(part, data, scheme, batch):
        made.append(batch)
        return {**vars(part), "batch": batch, "loss": 1.0}

    monkeypatch.setattr(forecast, "ended", ended)
    monkeypatch.setattr(forecast, "asked", lambda part, data, oracle: {**vars(part), "found": []})
    monkeypatch.setattr(forecast, "smoothed", lambda part, data, oracle: vars(part))
    monkeypatch.setattr(forecast, "best_rate", lambda *_: 0.01)
    for _ in range(2):
        forecast.run(tmp_path, tmp_path, "digits", 1)
    assert made == list(forecast.BATCHES)
    assert len(list(tmp_path.glob("*.json"))) == 2 + len(forecast.BATCHES)
