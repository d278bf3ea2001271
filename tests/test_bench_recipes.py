"""The numbers of the ImageNet recipes: counted ones against formulas, measured ones once."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagewise.latents import open_latents

pytestmark = pytest.mark.slow  # all build the seven networks

ROOT = Path(__file__).parents[1]


def module(name):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def costs():
    return module("costs")


@pytest.fixture(scope="module")
def found(costs):
    return costs.recipes()


def test_there_are_seven_recipes(found):
    assert len(found) == 7
    assert all(all(p.is_meta for p in each.net.parameters()) for each in found.values())


@pytest.mark.parametrize(
    ("size", "published", "depth", "width"),
    [("s", 6.06, 12, 384), ("b", 23.01, 12, 768), ("l", 80.71, 24, 1024), ("xl", 118.64, 28, 1152)],
)
def test_forward_is_the_published_number_and_that_of_the_formula(
    found, size, published, depth, width
):
    each = found[f"imagenet256_sdvae_sit_{size}"]
    # Linear layers, attention and modulation, by hand; then the ends of the network.
    blocks = depth * (12 * width**2 * 256 + 2 * 256**2 * width + 6 * width**2)
    ends = 256 * width * 16 * 3 + 2 * width**2 + width * (256 + width)
    assert each.forward == blocks + ends
    assert each.forward / 1e9 == pytest.approx(published, abs=0.03)
    assert each.training == 6 * each.forward


def test_lightningdit_has_the_weights_and_flips_of_its_recipe(found, costs):
    each = found["imagenet256_vavae_lightningdit_xl"]
    assert each.weights / 1e6 == pytest.approx(675, abs=1)
    assert (each.dim, each.rows) == (8192, 2 * costs.ROWS)
    assert each.images == 1024 * 80_000
    assert found["imagenet256_sdvae_sit_xl"].rows == 2 * costs.ROWS


def test_memory_and_oracle_are_those_counted_by_hand(found):
    each = found["imagenet256_sdvae_sit_s"]
    assert each.state("ddp") == 20 * each.weights
    assert each.state("fsdp") == 16 * each.weights // 8
    assert each.bank == 2 * 2 * 1_281_167 * 4096
    # Two products, each with two parts, a multiplication and an addition for each number.
    assert each.oracle(1281.167) == pytest.approx(8 * 1281.167 * 4096)
    assert each.read(1281.167) == pytest.approx(2 * 2 * 1281.167 * 4096)


def test_backward_is_twice_forward(found):
    """What "three forward passes" rests on."""
    from torch.utils.flop_counter import FlopCounterMode

    each = found["imagenet256_vavae_lightningdit_s"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = torch.empty(2, *each.net.input_shape), torch.empty(2), torch.zeros(2).long()
        each.net(*inputs).sum().backward()
    assert counter.get_total_flops() / 2 == pytest.approx(each.training, rel=1e-3)


def test_tables_are_markdown_with_a_line_for_each_recipe(costs, found):
    tables = costs.tables(found)
    for title in ("Training", "Memory of a GPU, without activations", "The oracle"):
        lines = tables[title].split("\n")
        assert len(lines) == 2 + len(found)
        assert len({line.count("|") for line in lines}) == 1
    assert "| 21.0 GB | 167.9 GB | 21.0 GB | 2.62 GB |" in tables["The bank, in bfloat16"]
    assert all(source in tables["At published throughputs"] for *_, source in costs.PUBLISHED)


def test_sparse_shards_are_opened_and_pass_the_check_of_scale(tmp_path):
    bench = module("recipes")
    bench.sparse_shards(tmp_path / "made", 3, 500)
    latents = open_latents(tmp_path / "made", flips="both", num_classes=bench.CLASSES)
    latents.verify(full=True)
    assert len(latents) == 3000
    assert latents.labels[:1500].bincount().tolist() == [2, 1] * 500
    assert latents[7][0].abs().eq(1).all()
    used = sum(file.stat().st_blocks for file in (tmp_path / "made").iterdir()) * 512
    assert used < 2**20


def test_shares_are_of_the_steered_step():
    bench = module("training")
    plain = [bench.Taken(8.0, 16.0, 0.0), bench.Taken(9.0, 16.0, 0.0), bench.Taken(9.5, 16.0, 0.0)]
    steered = [bench.Taken(10.0, 20.0, w) for w in (1.0, 2.0, 3.0)]
    line = bench.shares("name", plain, steered)
    assert line[bench.PAIRS] == pytest.approx(0.1)
    assert line["the same, processor time"] == pytest.approx(0.2)
    assert line[bench.INSIDE] == pytest.approx(0.2)
    assert line["ms inside"] == pytest.approx(2000)


SHALLOW = """
import runpy
import sys

import measure
import training

whole = training.recipe
training.recipe = lambda experiment: whole(experiment, "net.depth=1")
measure.Options.rows = lambda self, count: 128
training.ORACLE_BATCH = 2
runpy.run_path("recipes.py", run_name="__main__")
"""


def test_the_script_measures_all_cases(tmp_path):
    """With one block of each network, few rows and small batches."""
    file, folder = tmp_path / "numbers.json", ROOT / "benchmarks"
    command = [sys.executable, "-c", SHALLOW, "--threads", "1"]
    command += ["--runs", "1", "--scale", "0.02", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    cases = {case["name"]: case for case in json.loads(file.read_text())["cases"]}
    assert list(cases) == ["loader", "opening", "oracle"]
    assert all(target["reached"] is not None for c in cases.values() for target in c["targets"])
    assert len(cases["loader"]["targets"]) == 8
    steps = cases["oracle"]["tables"]["medians over 1 steps, in pairs"]
    assert all(0 < line["inside the scheme"] < 1 for line in steps[2:])
