"""The benchmark of schemes: its distances, its training runs, and what its report says of them."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from stagewise import LatentBank, Oracle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Its files find one another as those of a script do."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def bench(benchmarks):
    return importlib.import_module("schemes")


@pytest.fixture(scope="module")
def plan(benchmarks):
    return importlib.import_module("schemes_plan")


@pytest.fixture(scope="module")
def parts(benchmarks):
    return importlib.import_module("schemes_train")


def test_frechet_distance_of_known_gaussians(parts):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=draws, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.cholesky(torch.cov(x.T)).inverse().T  # exactly white
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    expected = float(shift.square().sum() + (scale - 1).square().sum())
    assert parts.frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-9)
    assert parts.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_energy_distance_is_that_of_all_pairs(parts):
    x, y = torch.randn(30, 4), torch.randn(50, 4) + 1
    pairs = torch.stack([(a - b).norm() for a in x for b in y]).mean()
    own = [
        torch.stack([(z[i] - z[j]).norm() for i in range(len(z)) for j in range(i)]).mean()
        for z in (x, y)
    ]
    expected = float(2 * pairs - sum(own))
    assert parts.energy_distance(x, y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_every_scheme_trains_from_the_same_weights(plan, parts, monkeypatch):
    monkeypatch.setattr(parts, "SAMPLES", 60)
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(600, 1, 2, 2, generator=draws), torch.arange(600) % 3
    data = parts.Data((x, y), (x[:64] + 0.1, y[:64]), lambda: parts.Perceptron(4, 3, 16))
    oracle = Oracle(LatentBank(x, y))
    ends = {}
    for scheme in plan.schemes(oracle, 0.4):
        run, _ = parts.train(plan.Part("made", scheme, 20, 1e-3, 0), data, oracle, 0.4)
        assert [point["step"] for point in run["curve"]] == list(range(1, 21))
        ends[scheme] = run["curve"][-1]
        assert all(math.isfinite(value) for value in ends[scheme].values())
        assert 0.5 < run["curve"][0]["loss"] < 5
    again, _ = parts.train(plan.Part("made", "plain", 20, 1e-3, 0), data, oracle, 0.4)
    assert again["curve"][-1]["loss"] == ends["plain"]["loss"]
    assert len({end["loss"] for end in ends.values()}) == len(ends)
    odd, _ = parts.train(plan.Part("made", "plain", 45, 1e-3, 0), data, oracle, 0.4)
    assert [point["step"] for point in odd["curve"]][-2:] == [43, 45]
    assert "energy" in odd["curve"][-1]


@pytest.mark.slow
def test_each_part_is_run_once(bench, parts, tmp_path, monkeypatch):
    draws = torch.Generator().manual_seed(2)
    x, y = torch.randn(300, 4, generator=draws), torch.arange(300) % 3
    data = parts.Data((x, y), (x[:64], y[:64]), lambda: parts.Perceptron(4, 3, 16))
    monkeypatch.setattr(bench, "prepared", lambda name: (data, Oracle(LatentBank(x, y)), 0.4))
    part = bench.Part("digits", "plain", 20, 1e-3, 0)
    claim = (tmp_path / part.file).with_suffix(".running")
    claim.touch()  # another process is at it
    bench.run(tmp_path, part)
    assert not (tmp_path / part.file).exists()
    claim.unlink()
    bench.run(tmp_path, part)
    first = (tmp_path / part.file).read_text()
    assert json.loads(first)["curve"][-1]["step"] == 20
    assert not claim.exists()
    monkeypatch.setattr(bench, "train", None)  # would be called if it ran again
    bench.run(tmp_path, part)
    assert (tmp_path / part.file).read_text() == first
    assert bench.best_rate(tmp_path, "digits", 20) is None  # other rates have not been tried


def test_records_are_kept_in_one_file_and_taken_from_it(plan, tmp_path):
    archive = tmp_path / "results.jsonl"
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, value in ((here, 1.23456789), (there, 2.0)):
        folder.mkdir()
        (folder / "both.json").write_text(json.dumps({"lr": value}))
    (here / "one.json").write_text(json.dumps({"curve": [{"loss": math.nan, "step": 10**7}]}))
    (here / "two.running").touch()
    plan.pack(here, archive)
    assert plan.unpack(archive, there) == 1
    assert json.loads((there / "both.json").read_text()) == {"lr": 2.0}  # its own is kept
    point = json.loads((there / "one.json").read_text())["curve"][0]
    assert math.isnan(point["loss"])
    assert point["step"] == 10**7
    plan.pack(there, archive)
    lines = [json.loads(line) for line in archive.read_text().splitlines()]
    assert [line["file"] for line in lines] == ["both.json", "one.json"]
    assert lines[0]["record"] == {"lr": 2.0}


@pytest.mark.slow
def test_report_fills_the_page_with_what_was_reached(bench, plan, tmp_path, monkeypatch):
    def write(scheme, seed, lr, half, floor=0.0, horizon=1000):
        """A loss of `1 - step / (2 half)` which passes 0.5 at `half`."""
        steps = range(horizon // 10, horizon + 1, horizon // 10)
        value = [max(floor, 1 - step / (2 * half)) for step in steps]
        curve = [
            {"step": s, "seconds": 2.0 * s, "loss": v, "energy": v, "frechet": v, "copies": 0.0}
            for s, v in zip(steps, value, strict=True)
        ]
        part = plan.Part("digits", scheme, horizon, lr, seed)
        record = {**vars(part), "boundary": 0.3, "curve": curve}
        record["by_time"] = [0.4, 0.3, 0.2, half / 1000]
        (tmp_path / part.file).write_text(json.dumps(record))

    rates = plan.PLANS["digits"].rates
    best = rates[1]
    for lr in rates[:4]:
        write("plain", 0, lr, 1000 if lr == best else 1500)
    write("plain", 1, best, 1000)
    for seed in range(2):
        write("oracle, all t", seed, best, 400)
        write("reference set of 128", seed, best, 400)
        write("default", seed, best, 650)
        write("default", seed, best, 400, horizon=600)
    write("oracle, all t", 1, rates[0], 100)  # another rate: not counted
    write("logit-normal t", 0, best, 400, floor=0.6)
    draws = [{"energy": 0.6 + 0.1 * i, "frechet": 0.1} for i in range(3)]
    (tmp_path / "why-rows-digits.json").write_text(json.dumps({"draws": draws}))
    for scheme, batch, half in (("plain", 128, 1000), ("oracle, all t", 128, 900)):
        write(scheme, 9, best, half)
        made = tmp_path / plan.Part("digits", scheme, 1000, best, 9).file
        more = {"batch": batch, "draws": draws}
        record = json.loads(made.read_text()) | more
        made.unlink()
        why = f"why-digits-{scheme.split(',')[0]}-{batch}-0.json"
        (tmp_path / why).write_text(json.dumps(record))
    page = tmp_path / "docs/results.md"
    page.parent.mkdir()
    page.write_text("By hand.\n\n<!-- schemes: learning rates -->\nold\n<!-- end -->\n\nAfter.\n")
    monkeypatch.setattr(importlib.import_module("schemes_statistics"), "DRAWS", 100)
    arguments = ["schemes.py", "--report", "--dir", str(tmp_path), "--docs", str(page.parent)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    text = (tmp_path / "docs/results.md").read_text()
    assert text.startswith("By hand.\n\n<!-- schemes: learning rates -->\n| data |")
    assert "\nold\n" not in text
    assert "<!-- end -->\n\nAfter.\n" in text
    assert f"| digits | {best:g} | " in text
    assert f"{rates[4]:g}: not run | 0.300 |" in text
    assert "| plain itself | 1.00 [1.00, 1.00] |" in text
    assert "| oracle, all t | 0.40 [0.40, 0.40] | 0.40 [0.40, 0.40] |" in text
    assert "| logit-normal t | not [not, not] |" in text
    assert "| oracle, navigation |  | not run |" in text
    assert "| held-out loss | 0.75 | 0.65 [0.65, 0.65] | 0.5 |  |" in text
    assert "| energy distance | 0.6 | 0.65 [0.65, 0.65] | 0.5 | 0.7 ± 0.1 |" in text
    assert "| default | 0, 1 | 600 (0.60) | 0.500 [0.500, 0.500] |" in text
    assert "| 0.3000 (+0.0%) | 0.2000 (+0.0%) | 0.4000 (-60.0%) | 0% |" in text
    assert "| oracle, batch 128 | 9 | 0.4444 | 0.90 (one seed) |" in text
    kept = (tmp_path / "docs/results.jsonl").read_text().splitlines()
    assert len(kept) == len(list(tmp_path.glob("*.json")))
    for picture in ("curves_digits_1000", "steps_digits_loss", "steps_digits_frechet"):
        assert (tmp_path / f"docs/images/{picture}.png").stat().st_size > 5000
