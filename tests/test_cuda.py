"""On a card, `pytest -m cuda`: answers, waits, graphs, and weights with monitors on."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def cases():
    """The cases of `benchmarks/gpu.py`, at sizes that take seconds."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("gpu_cases"), importlib.import_module("gpu_training")
    sys.path.pop(0)


def never():
    return 1.0


def test_answers_are_right(cases):
    found = cases[0].right(DEVICE, cases[0].Sizes(right=(5000, 256)), never)
    assert len(found) == 3 * 2 * 2 * len(cases[0].TIMES)
    wrong = [row for row in found if row["pull"] > (1e-5 if row["over"] == "class" else 1e-4)]
    assert not wrong


def test_products_are_as_right_as_it_is_said(cases):
    found = cases[0].digits(DEVICE, cases[0].Sizes(), never)
    assert not [row for row in found if row["of said"] > 1]


def test_nothing_waits_and_graphs_hold_it(cases):
    found = cases[0].waits(DEVICE, cases[0].Sizes(right=(20_000, 0)), never)
    assert not [row for row in found if row["waits"] != "none"]
    assert not [row for row in found[:3] if row["graph"] != "the same bits"]


def test_monitors_change_no_bit(cases):
    small = cases[0].SMALL
    assert all(row["weights"] == "the same bits" for row in cases[1].training(DEVICE, small, never))


def test_an_unknown_label_is_named_and_the_process_lives(cases):
    from stagewise import Oracle

    bank = cases[0].made(2000, (4, 4, 4), 20, torch.bfloat16, DEVICE)
    xt, t, _, labels = cases[0].asked(bank, 4, 0.5)
    oracle = Oracle(bank)
    labels[2] = 77
    mean = oracle.posterior(xt, t, labels).mean
    assert mean.isnan().flatten(1).all(1).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="Class 77 is not in the bank"):
        oracle.posterior(xt, t, labels)
