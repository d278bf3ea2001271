"""What the benchmark of regularisers measures, against exact cases."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("regularisers")
    sys.path.remove(str(FOLDER))


def test_divergence_from_a_known_density_is_that_of_a_gaussian_model(bench):
    """The field of N(0, w^2) is known, and so is its density."""
    spiral, width = importlib.import_module("schemes_train"), 1.2

    def field(x, t, labels):
        t = t[:, None]
        return x * (t * width**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * width**2)

    with torch.random.fork_rng():
        torch.manual_seed(5)
        x = spiral.spiral().sample((1000,))
    model = torch.distributions.Normal(0.0, width).log_prob(x).sum(1)
    expected = float((spiral.spiral().log_prob(x) - model).mean())
    assert spiral.kl_from_density(field) == pytest.approx(expected, abs=1e-3)


def test_carre_du_champ_is_the_root_of_a_capped_covariance(bench):
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    gamma = 3.0
    noise = bench.CarreDuChamp(rows, gamma)
    distances = torch.cdist(rows, rows).sort(dim=1).values
    cap = distances[:, 1].double().square() / 9
    cap = cap.minimum(cap.quantile(0.9))
    for i in (0, 17):
        moved = noise(torch.zeros(6, 6), torch.full((6,), i), torch.eye(6)).double()
        assert torch.allclose(moved, moved.T, atol=1e-6)  # C^(1/2), symmetric
        largest = torch.linalg.eigvalsh(moved)[-1].square()
        assert largest == pytest.approx(float(gamma * cap[i]), rel=1e-4)


def test_coverage_is_the_share_of_held_out_samples_with_a_made_one_near(bench):
    data = importlib.import_module("schemes_train")
    x = torch.arange(20.0)[:, None]
    held = data.Data((x[:2], torch.zeros(2).long()), (x, torch.zeros(20).long()), None)

    class Sits(torch.nn.Module):
        """Every sample becomes 0: a straight way from the noise."""

        def forward(self, xt, t, labels):
            return -xt / (1 - t)[:, None].clamp_min(1e-3)

    found = data.of_samples(Sits(), held, 50, count=32, covered=True)
    # Rows 0 to 4 have it nearer than their fifth neighbour: 5, 4, 3, 3, 3 away.
    near = [i for i in range(20) if i < sorted(abs(i - j) for j in range(20))[5]]
    assert found["coverage"] == pytest.approx(len(near) / 20)


def test_the_report_has_a_row_for_each_setting_and_ratios_to_plain(bench, tmp_path):
    report = importlib.import_module("regularisers_report")

    def record(method, setting, seed, end, **more):
        part = bench.Part("digits-1200", method, setting, 0.003, seed)
        metrics = dict.fromkeys(("energy", "frechet", "copies", "coverage", "seconds"), 2.0)
        own = {**vars(part), "boundary": {"collapsed": 0.7}, "end": end, "best": end / 2}
        return json.dumps({"file": part.file, "record": {**own, **metrics, **more}})

    archive = tmp_path / "regularisers.jsonl"
    ends = [("plain", 0.0, s, 0.8 + 0.1 * s) for s in (0, 1, 2)]
    ends += [("smoothing", 0.0, s, 0.45) for s in (0, 1, 2)]
    archive.write_text("\n".join(record(*end) for end in ends) + "\n")
    tables = report.tables(archive)
    assert list(tables) == ["few samples: settings", "few samples, digits-1200"]
    assert (
        "| digits-1200 | 3000 | 0.003 | 0.003: 0.4000 | 0.700 |" in tables["few samples: settings"]
    )
    text = tables["few samples, digits-1200"]
    row = next(line for line in text.splitlines() if line.startswith("| smoothing |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["3", "0.45 ± 0"]
    assert cells[-3].startswith("0.500 [")  # 0.45 / 0.9
    assert cells[-2].startswith("1.000 [")  # 0.45 / 0.45
    assert not any(line.startswith("| fitted") for line in text.splitlines())  # not run
    assert math.isfinite(float(cells[-1].split()[0]))
    assert report.tables(tmp_path / "none.jsonl") == {}
