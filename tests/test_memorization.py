"""`MemorizationMonitor`: a model that copies by construction, one that does not, and no trace."""

import pytest
import torch

from stagewise import LatentBank, Oracle
from stagewise.callbacks.memorization_monitor import MemorizationMonitor

SMALL = {"every_n_steps": 2, "samples": 8, "t_switch": (0, 0.4, 1), "t_resume": (0.5,), "steps": 25}


def fit(tiny_flow, make_trainer, make_loader, x, *callbacks):
    model = tiny_flow()
    make_trainer(*callbacks).fit(model, make_loader(x))
    return model


def test_the_oracle_copies_and_a_gaussian_does_not(
    tiny_flow, make_trainer, make_loader, make_data, tmp_path, read_stages
):
    x, _ = make_data(64)
    oracle = Oracle(LatentBank(x))

    def copying(module, xt, t, labels):
        return oracle.velocity(xt, t)

    monitor = MemorizationMonitor(
        velocity=copying, held_out=torch.randn(5, 6), dirpath=tmp_path / "m", **SMALL
    )
    fit(tiny_flow, make_trainer, make_loader, x, monitor)
    header, probes = read_stages(tmp_path / "m")
    assert header["event"] == "memorization"
    assert [probe["step"] for probe in probes] == [1, 2, 4]
    assert probes[0]["copies"] == [1, 1, 1]
    assert probes[0]["resumed_copies"] == [1]
    assert probes[0]["ratio"] == probes[2]["ratio"], "the same noise in all probes"
    assert (tmp_path / "m" / "copies.png").exists()

    def still(module, xt, t, labels):
        return torch.zeros_like(xt)  # samples stay where the noise is

    monitor = MemorizationMonitor(velocity=still, dirpath=tmp_path / "s", **SMALL)
    fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert [monitor.history[0]["copies"][k] for k in (0, 2)] == [0, 1]


def test_weights_are_bit_identical_with_and_without(
    tiny_flow, make_trainer, make_loader, make_data, weights
):
    x, _ = make_data(32)
    plain = fit(tiny_flow, make_trainer, make_loader, x)
    monitor = MemorizationMonitor(**SMALL)
    watched = fit(tiny_flow, make_trainer, make_loader, x, monitor)
    assert torch.equal(weights(plain), weights(watched))
    assert len(monitor.history) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 1},
        {"t_switch": (1.2,)},
        {"t_resume": (1.0,)},
        {"weights": "ema"},
        {"steps": 0},
        {"method": "rk4"},
    ],
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        MemorizationMonitor(**wrong)


def test_an_average_that_is_not_there(tiny_flow, make_trainer, make_loader, make_data):
    monitor = MemorizationMonitor(weights="average")
    with pytest.raises(ValueError, match="EMAWeightAveraging"):
        fit(tiny_flow, make_trainer, make_loader, make_data(16)[0], monitor)
