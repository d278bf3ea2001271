"""What is read from the history of velocity probes, on synthetic curves."""

import functools
import math

import pytest
import torch

from stagewise.learning_events import memorization_onset, navigation_learned

learned = functools.partial(navigation_learned, window=4, patience=2, tolerance=0.05)
onset = functools.partial(
    memorization_onset, edges=torch.linspace(0, 1, 5).tolist(), patience=2, gap=0.5
)


def probes(navigation=(), gaps=(), train=1.0):
    """Probes with these oracle errors in navigation, or these gaps in the last bin."""
    history = []
    for oracle in navigation:
        history.append({"stages": {"train": {"navigation": {"oracle": oracle, "floor": 2.0}}}})
    for gap in gaps:
        bins = [0.0, 0.01, 0.02, gap]
        history.append(
            {
                "gap": bins,
                "gap_se": [0.01] * 4,
                "train": {"conditional": [train] * 4},
                "held_out": {"conditional": [train + g for g in bins]},
            }
        )
    return history


def power_law(n, floor=0.3):
    return [floor + (1 + i) ** -1.5 for i in range(n)]


def test_navigation_is_learned_when_its_error_is_flat():
    falling = [1 - 0.04 * i for i in range(20)]
    assert learned(probes(falling)) is None
    assert learned(probes(power_law(7))) is None, "too few probes"
    found = learned(probes(power_law(60)))
    assert found["first"] == 1.3
    assert found["floor"] == 2.0
    assert "flat at 0.302" in found["message"]
    # It lasts `patience` probes: the flat part must have been seen at each of them.
    late = [*falling, *[falling[-1]] * 12]
    first = next(n for n in range(len(late)) if learned(probes(late[:n])))
    second = next(n for n in range(len(late)) if learned(probes(late[:n]), patience=5))
    assert 20 < first < second


def test_noise_is_no_plateau_of_a_falling_curve():
    draws = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(40, generator=draws)
    falling = (1 - 0.02 * torch.arange(40) + noise).tolist()
    assert not any(learned(probes(falling[:n])) for n in range(41))


def test_a_nan_is_nothing_learned():
    assert learned(probes([1.0] * 20 + [math.nan])) is None


def test_onset_is_a_gap_that_opens():
    assert onset(probes(gaps=[0.0, 0.1, 0.3, 0.4])) is None
    assert onset(probes(gaps=[0.0, 0.1, 0.6])) is None, "once only"
    found = onset(probes(gaps=[0.0, 0.1, 0.6, 0.7]))
    assert (found["t_from"], found["t_to"]) == (0.75, 1.0)
    assert found["held_out"] == pytest.approx(1.7)


def test_a_gap_that_was_there_from_the_start_is_no_onset():
    """Held-out data of another kind are harder, which is no memory."""
    assert onset(probes(gaps=[0.7, 0.7, 0.8, 0.9])) is None
    assert onset(probes(gaps=[0.7, 1.3, 1.3])) is not None


def test_a_gap_within_its_error_is_none():
    history = probes(gaps=[0.0, 0.9, 0.9])
    for entry in history:
        entry["gap_se"] = [0.3] * 4
    assert onset(history) is None


def test_without_held_out_data_there_is_no_onset():
    history = [{"gap": None}] * 5
    assert onset(history) is None
