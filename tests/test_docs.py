"""What the documentation shows runs: the examples of docstrings and the code of the README."""

import doctest
import importlib
import json
import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

import stagewise
import stagewise.callbacks
from stagewise.callbacks import stage_transitions
from stagewise.callbacks.stage_transitions import MEMORIZATION_ONSET

ROOT = Path(__file__).parents[1]
FLOORS = ("stagewise", "losses", "callbacks", "recipes")
MODULES = [
    ".".join((*(() if floor == "stagewise" else ("stagewise",)), *file.with_suffix("").parts))
    for floor in FLOORS
    for file in (file.relative_to(ROOT) for file in sorted((ROOT / floor).rglob("*.py")))
    if "    >>> " in (ROOT / file).read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    torch.manual_seed(0)
    # Of an empty namespace, so that each example runs as it is pasted.
    failed, tried = doctest.testmod(importlib.import_module(name), globs={})
    assert tried > 0
    assert failed == 0


class Model(torch.nn.Linear):
    """A network of rows of four numbers; what else it is given it ignores."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, xt, t, y):
        return super().forward(xt)


def test_code_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names = {
        **vars(stagewise),
        "L": L,
        "torch": torch,
        "latents": torch.randn(160, 4, 4, 4),
        "labels": torch.arange(160) % 4,
        "model": Model(),
    }
    names["self"] = SimpleNamespace(net=names["model"])
    names |= dict.fromkeys(("x1", "x0", "xt"), torch.zeros(4, 4)) | {"t": torch.rand(4), "y": None}
    names["loader"] = torch.utils.data.DataLoader(names["latents"], 160)  # one batch
    for block in blocks:
        exec(block, names)
    expected = names["oracle"].velocity(names["xt"], names["t"], names["y"])
    torch.testing.assert_close(names["u_star"], expected, rtol=1e-3, atol=1e-3)
    assert names["loss"].isfinite()


def test_code_of_the_page_on_watching():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/watching.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names = {**vars(stagewise), **vars(stagewise.callbacks)}
    for block in blocks[:2]:
        exec(block, names)
    assert [type(callback).__name__ for callback in names["callbacks"]][0] == "StageRun"
    for block in blocks[2:]:
        exec(block, names)
    oracle = stagewise.Oracle(stagewise.LatentBank(torch.randn(40, 6)))
    assert names["smooth_from_the_onset"](oracle).awaited[0].event == MEMORIZATION_ONSET
    assert names["phases"].phases[0].until.event == stage_transitions.NAVIGATION_LEARNED


def test_code_of_the_page_on_engines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/engines.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    latents, labels = torch.randn(160, 4, 4, 4), torch.arange(160) % 4
    t, x0 = torch.rand(8), torch.randn(8, 4, 4, 4)
    names = {
        "torch": torch,
        "latents": latents,
        "labels": labels,
        "loader": torch.utils.data.DataLoader(latents, 16),
        "num_rows": 160,
        "x0": x0,
        "x1": latents[:8],
        "y": labels[:8],
        "t": t,
        "xt": stagewise.LinearPath().interpolate(x0, latents[:8], t),
        "path": stagewise.LinearPath(),
        "rank": 0,
        "world_size": 1,
    }
    for block in blocks:
        exec(block, names)
    assert names["post"].tail_mass.max() == 0
    assert names["target"].isfinite().all()
    assert names["bank"].residency == "memory-mapped"


def test_code_of_the_page_on_steering():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/steering.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    latents, labels = torch.randn(160, 4, 4, 4), torch.arange(160) % 4
    t = torch.linspace(0, 0.9, 8)
    names = {"latents": latents, "labels": labels, "t": t}
    names |= {"features": torch.zeros(8, 3), "reference": torch.ones(8, 3)}
    for block in blocks:
        exec(block, names)
    late = (t >= names["scheme"].boundary).float()
    torch.testing.assert_close(names["gate"](t), late)
    torch.testing.assert_close(names["auxiliary"], late.mean())
    assert names["phases"].check(total=100) is None
    assert "ends at step 60" in names["phases"].observe(step=60, total=100)[0]


def test_the_table_of_costs_is_what_the_script_counts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    costs = importlib.import_module("costs")
    assert costs.accelerators() in (ROOT / "docs/engines.md").read_text()


@pytest.mark.slow
def test_example(tmp_path, monkeypatch, lightning_log):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples/watch.py"), run_name="__main__")
    assert "took x_1 = float32 tensor (128, 1, 8, 8) and labels" in lightning_log.text
    lines = (tmp_path / "stagewise_logs/stages.jsonl").read_text().splitlines()
    bank, first, second = map(json.loads, lines)
    assert (bank["rows"], bank["classes"], second["step"]) == (1797, 10, 100)
    assert 0.05 < first["midpoint"] < 0.95


def test_readme_pictures_and_make_targets_exist():
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size > 5000, picture
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "lint", "bench", "bench-imagenet", "docs"):
        assert f"make {target}" in listed
