"""`benchmarks/gpu.py` where there is no card: its logic, what it counts, what it writes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def found(gpu, tmp_path_factory):
    """What a run with small sizes on the CPU finds; trainings take a minute (make bench-gpu)."""
    file = tmp_path_factory.mktemp("gpu") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CASES", {k: v for k, v in gpu.CASES.items() if k != "training"})
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main(["--small", "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_all_is_measured(found, gpu):
    assert found["failed"] == {}
    assert set(found) == {"meta", "failed", *gpu.CASES} - {"training"}
    assert {row["what"] for row in found["times"]} == {
        *("stagewise", "padded bmm", "two bare products", "cdist + softmax", "SDPA")
    }
    assert all(row.get("ms", 0) > 0 for row in found["times"])
    assert {row["t"] for row in found["right"]} == {0, 0.001, 0.01, 0.03, 0.1, 0.5, 0.9, 0.999, 1}
    assert max(row["mean"] for row in found["right"]) < 1e-5, "what `rtol` allows a CPU"


def test_no_time_is_left(gpu, tmp_path, monkeypatch):
    found = gpu.measured(torch.device("cpu"), gpu.gpu_cases.SMALL, -1)
    assert found["failed"] == dict.fromkeys(gpu.CASES, "no time was left")
    assert "times: not measured (no time was left)." in gpu.pages(found)["gpu"]


def test_aims_that_are_missed_are_named(found, gpu):
    about = {"rows": "bfloat16", "queries": 256, "t": "U(0, 1)", "host ms": 0.1}
    ours = {"what": "stagewise", "GB": 2.7}
    found = found | {
        "ceilings": [{"what": "copy", "unit": "TB/s", "reached": 4.0}],
        "times": [
            about | ours | {"over": "class", "ms": 1.2},
            about | ours | {"over": "all rows", "ms": 19.0},
            about | {"what": "two bare products", "over": "all rows", "ms": 10.0},
        ],
        "shares": [{"network": "SiT-XL/2", "share": 0.004}],
    }
    told = {text: (reached, held) for text, reached, _, held in gpu.aims(found)}
    assert told["class, 256 queries, ms"] == (1.2, False)
    assert told["class, share of the copy bandwidth"] == (pytest.approx(2.7 / 1.2 / 4), True)
    assert told["all rows, 256 queries, ms"] == (19.0, True)
    assert told["all rows, in bare products"] == (1.9, False)
    assert told["class-wise targets, share of a SiT-XL/2 step"] == (0.004, True)
    page = gpu.pages(found)["gpu"]
    assert "| class, 256 queries, ms | 1.2 | at most 1 | missed |" in page
    assert page.startswith("Measured on no card: a CPU, 20")


def test_a_file_fills_the_page(found, gpu, tmp_path):
    file, page = tmp_path / "found.json", tmp_path / "page.md"
    file.write_text(json.dumps(found))
    page.write_text("before\n\n<!-- gpu -->\nold\n<!-- end -->\nafter\n")
    assert gpu.main(["--fill", str(file), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n\n<!-- gpu -->\nMeasured on")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text


def test_without_a_card_it_says_so_in_a_line(gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "none.json")]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_counted_is_what_the_page_says(gpu):
    table = gpu.gpu_counted.counted()
    assert table in (ROOT / "docs" / "engines.md").read_text(), "python benchmarks/gpu.py --counted"
    counts = gpu.gpu_counted.cases()
    assert all(each.waits == 0 for each in counts.values())
    assert all(each.launches <= 60 for each in counts.values())
    assert counts["class", "bfloat16", 256].seconds <= 1e-3
    assert counts["all rows", "bfloat16", 256].seconds <= 20e-3
