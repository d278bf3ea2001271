"""`examples/diffusers_text_to_image.py` runs, and trains on the targets of the kernel's oracle."""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "examples/diffusers_text_to_image.py"


@pytest.fixture
def example():
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("diffusers_text_to_image", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_steered_targets_are_those_of_a_float64_computation(example, monkeypatch, kind):
    made, plain = [], example.diffusers_target

    def record(noisy, x, noise, timesteps, scheme, condition):
        target = plain(noisy, x, noise, timesteps, scheme, condition=condition)
        made.append((noisy, timesteps, condition, target, scheme.oracle.bank))
        return target

    monkeypatch.setattr(example, "diffusers_target", record)
    losses = example.train(4, kind)
    assert len(made) == len(losses) == 4
    assert len(FILE.read_text().splitlines()) <= 80
    acp = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).double()
    for noisy, steps, condition, target, bank in made:
        rows = bank.take(torch.arange(len(bank))).double().flatten(1)
        a, s = (value.sqrt()[:, None] for value in (acp[steps], 1 - acp[steps]))
        x = noisy.double().flatten(1)
        c, own = (torch.nn.functional.normalize(v.double()) for v in (condition, bank.conditions))
        gap = (x[:, None] - a[:, :, None] * rows).square().sum(2)
        logits = (c @ own.T - 1) / 0.3**2 - gap / (2 * s**2)
        m = logits.softmax(1) @ rows
        away = (x - a * m) / s
        expected = {"epsilon": away, "v_prediction": a * away - s * m, "sample": m}[kind]
        torch.testing.assert_close(target.double().flatten(1), expected, rtol=1e-5, atol=1e-5)
