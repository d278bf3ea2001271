"""Means by bins of t: against numpy, over ranks' sums, and resumed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.binned_sums import BinnedSums
from stagewise.velocity_probe import standard_scores

EDGES = [0.0, 0.1, 0.15, 0.6, 1.0]


def filled(t, values, edges=EDGES, keys=("a", "b")):
    means = BinnedSums.empty(edges, keys)
    means.update(t, values)
    return means


def samples(n=500, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=draws), torch.randn(2, n, generator=draws) * 3 + 7


def test_means_and_errors_are_those_of_numpy():
    t, values = samples()
    result = filled(t, values).means()
    for low, high, place in zip(EDGES, EDGES[1:], range(4), strict=False):
        inside = ((t >= low) & (t < high)).numpy()
        chosen = values.double().numpy()[:, inside]
        assert result["count"][place] == inside.sum()
        for key, row in zip(("a", "b"), chosen, strict=True):
            assert float(result[key][place]) == pytest.approx(row.mean(), rel=1e-12)
            error = row.std(ddof=1) / np.sqrt(len(row))
            assert float(result[f"{key}_se"][place]) == pytest.approx(error, rel=1e-9)
    assert float(result["share"].sum()) == pytest.approx(1)


def test_bins_hold_their_lower_edge_and_the_last_its_upper_one():
    t = torch.tensor([0.0, 0.1, 0.15, 0.6, 1.0], dtype=torch.float64)
    count = filled(t, torch.zeros(2, 5)).means()["count"]
    assert count.tolist() == [1, 1, 1, 2]


def test_an_empty_bin_is_nan_and_one_sample_has_no_error():
    result = filled(torch.tensor([0.05, 0.9]), torch.ones(2, 2)).means()
    assert result["a"].isnan().tolist() == [False, True, True, False]
    assert result["a_se"].isnan().all()


def test_what_is_not_finite_is_left_out_and_counted():
    t = torch.tensor([0.05, 0.05, 0.05, 0.9])
    values = torch.tensor([[1.0, torch.nan, 3.0, torch.inf], [1.0, 1.0, 1.0, 1.0]])
    result = filled(t, values).means()
    assert result["a"].tolist()[0] == 2.0
    assert result["nonfinite"].tolist() == [1, 0, 0, 1]
    assert result["b"].tolist()[3] == 1.0


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.integers(0, 5), st.integers(1, 399))
def test_parts_add_up_to_the_whole(n, seed, cut):
    """Sums over ranks and batches are the statistics of all samples."""
    t, values = samples(n, seed)
    whole, first, second = (
        filled(t, values),
        BinnedSums.empty(EDGES, "ab"),
        BinnedSums.empty(EDGES, "ab"),
    )
    first.update(t[:cut], values[:, :cut])
    second.update(t[cut:], values[:, cut:])
    for name in ("count", "finite", "total", "square"):
        torch.testing.assert_close(
            getattr(first, name) + getattr(second, name), getattr(whole, name)
        )
    total = whole.without(first)
    torch.testing.assert_close(total.count, second.count)


def test_wider_bins_are_exact():
    t, values = samples()
    wide = [0.0, 0.15, 1.0]
    merged = filled(t, values).merged(wide).means()
    direct = filled(t, values, wide).means()
    for key, value in direct.items():
        torch.testing.assert_close(merged[key], value)


def test_bins_of_no_width_stay_empty():
    t, values = samples()
    count = filled(t, values, [0.0, 0.5, 0.5, 1.0]).means()["count"]
    assert count[1] == 0
    assert count.sum() == len(t)


def test_ranks_are_added_up_as_one_tensor():
    t, values = samples()
    whole, first, second = filled(t, values), *(filled(t[k::2], values[:, k::2]) for k in (0, 1))
    sent = []
    first.over(lambda own: sent.append(own) or own)
    both = second.over(lambda own: own + sent[0])
    torch.testing.assert_close(both.means(), whole.means())
    assert len(sent) == 1


def test_standard_scores_have_the_tail_of_a_normal_deviate():
    from scipy import stats

    mean, error = torch.tensor([4.0, -4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    scores = standard_scores(mean, error, torch.tensor([16.0, 10_000.0, 16.0, 1.0]))
    assert float(scores[0]) == pytest.approx(stats.norm.isf(stats.t.sf(4, 15)))
    assert float(scores[1]) == pytest.approx(-4, abs=0.01)
    assert float(scores[2]) == 0
    assert scores[3].isnan()
