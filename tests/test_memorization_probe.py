"""`MemorizationProbe` without a trainer: the oracle leads, the model finishes, ranks share."""

import pytest
import torch

from stagewise import CosinePath, LatentBank, Oracle
from stagewise.copies import nearest_rows
from stagewise.memorization_probe import MemorizationProbe

CPU = torch.device("cpu")


def probe_of(held_out=None, path=None, labels=None, **options):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    options = {
        "labelled": labels is not None,
        "class_wise": labels is not None,
        "t_switch": (0.0, 0.4, 1.0),
        "t_resume": (0.5,),
        "steps": 25,
        "seed": 3,
    } | options
    oracle = Oracle(LatentBank(x, labels), *([] if path is None else [path]))
    return oracle, MemorizationProbe(oracle, 9, held_out, **options)


def still(xt, t, labels):
    return torch.zeros_like(xt)


def test_the_oracle_leads_to_t_switch_and_the_model_goes_on():
    oracle, probe = probe_of()
    asked = []

    def counts(xt, t, labels):
        asked.append(float(t[0]))
        return still(xt, t, labels)

    made, resumed = probe.generate(counts, CPU)
    assert resumed == {}
    shares = [float(nearest_rows(oracle.bank, x).copied.float().mean()) for x in made.values()]
    assert (shares[0], shares[2]) == (0, 1)
    assert len(asked) == 25 + 15
    assert min(asked[25:]) == pytest.approx(0.4)
    again, _ = probe.generate(still, CPU)
    assert all(torch.equal(made[t], again[t]) for t in made)


def test_held_out_rows_are_noised_on_the_path():
    x1 = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    _, probe = probe_of((x1, None), CosinePath())
    noised, finished = probe.generate(still, CPU)[1][0.5]
    assert torch.equal(noised, finished)
    noise = (noised - 0.5**0.5 * x1) / 0.5**0.5
    assert abs(float(noise.std()) - 1) < 0.3
    assert torch.equal(probe.x1, x1)


def test_labels_are_given_to_the_model_that_takes_some():
    labels = torch.arange(40) % 3
    given = []

    def takes(xt, t, y):
        given.append(y)
        return torch.zeros_like(xt)

    _, probe = probe_of((torch.zeros(3, 6), torch.tensor([2, 1, 0])), labels=labels)
    probe.generate(takes, CPU)
    assert torch.equal(given[0], probe.labels)
    assert given[-1].tolist() == [2, 1, 0]
    _, probe = probe_of(labels=labels, labelled=False)
    given.clear()
    probe.generate(takes, CPU)
    assert probe.labels is not None
    assert given[0] is None


def test_ranks_hold_every_other_sample():
    held_out = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), None
    made, resumed = probe_of(held_out)[1].generate(still, CPU)
    for rank in range(2):
        part, part_resumed = probe_of(held_out, rank=rank, world_size=2)[1].generate(still, CPU)
        for t, x in part.items():
            torch.testing.assert_close(x, made[t][rank::2])
        torch.testing.assert_close(part_resumed[0.5][0], resumed[0.5][0][rank::2])


def test_a_velocity_of_another_shape():
    _, probe = probe_of()
    with pytest.raises(ValueError, match=r"velocity of shape \(9, 6\), got \(9, 3\)"):
        probe.generate(lambda xt, t, labels: xt[:, :3], CPU)
