"""The fault campaign, a handful of each fault: what is killed goes on, what is damaged is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forks")
def test_a_handful_of_faults(tmp_path):
    pytest.importorskip("diffusers")
    base, page = tmp_path / "faults", tmp_path / "faults.md"
    counts = ["--kills", "1", "--flips", "1", "--disks", "1", "--seconds", "900"]
    command = [sys.executable, ROOT / "benchmarks/faults.py", "--dir", base, "--page", page]
    ended = subprocess.run(
        [*map(str, command), *counts],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in (base / "faults.jsonl").read_text().splitlines()]
    kinds = {}
    for line in lines:
        kinds.setdefault(line["key"].split()[0], []).append(line)
    assert {"kill", "flip", "config", "checkpoint", "pickle", "names"} <= kinds.keys()
    assert [line["key"] for line in lines if line["raw"]] == []
    assert [line["key"] for line in lines if line.get("ran")] == []
    gone_on = kinds["kill"] + kinds.get("disk", [])
    assert {
        line["key"]: line["differs"] for line in gone_on if line["outcome"] != "identical"
    } == {}
    assert sum(line["kills"] for line in kinds["kill"]) >= 2
    refused = [line for kind in ("config", "checkpoint", "pickle", "names") for line in kinds[kind]]
    assert {line["outcome"] for line in refused} <= {"named", "not asked for"}
    assert "| train |" in page.read_text()
