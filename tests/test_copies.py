"""Copies of training rows among samples, against brute force and with duplicates in the bank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise import LatentBank
from stagewise import nearest_rows as search
from stagewise.copies import binomial_interval, nearest_rows


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("far", [0.0, 300.0])
def test_distances_are_those_of_brute_force(dtype, far):
    bank = LatentBank(draw(500, 4, 3) + far, torch.arange(500) % 7, dtype=dtype)
    x = draw(300, 4, 3, seed=1) + far
    found = nearest_rows(bank, x)
    rows = bank.take(torch.arange(500))
    distances = (x.flatten(1).double()[:, None] - rows).norm(dim=2)
    d1, row = distances.min(1)
    # Rows that are equal as stored are one row.
    equal = (rows[row][:, None] == rows).all(2)
    d2 = distances.masked_fill(equal, math.inf).min(1).values
    torch.testing.assert_close(found.d1, d1, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.d2, d2, rtol=1e-12, atol=0)
    assert torch.equal(found.row, row)


def test_a_row_in_the_bank_many_times_hides_no_copy():
    x = draw(200, 6)
    bank = LatentBank(torch.cat([x, x[:1].expand(150, 6)]))
    found = nearest_rows(bank, x[:3])
    assert found.d1.tolist() == [0, 0, 0]
    assert torch.equal(found.d2, nearest_rows(LatentBank(x), x[:3]).d2)
    assert found.copied.tolist() == [True] * 3


@pytest.mark.parametrize("numbers", [1, 7 * 40, 7 * 150, 2**22])
@pytest.mark.parametrize("sort", [False, True])
def test_chunks_of_rows_change_nothing(monkeypatch, numbers, sort):
    """Rows and duplicates of them in other chunks, near ones last: each chunk may change both."""
    x = draw(200, 7)
    samples = torch.cat([x[:20] + 0.1 * draw(20, 7, seed=1), x[20:24], draw(16, 7, seed=2)])
    rows = torch.cat([x, x[:30], x[5:6].expand(70, 7)])
    if sort:
        rows = rows[torch.cdist(rows, samples[:1])[:, 0].argsort(descending=True)]
    distances = torch.cdist(samples.double(), rows.double())
    d1, row = distances.min(1)
    equal = (rows[row][:, None] == rows).all(2)
    d2 = distances.masked_fill(equal, math.inf).min(1).values
    monkeypatch.setattr(search, "_BOUNDS", {"cpu": numbers})
    found = nearest_rows(LatentBank(rows), samples)
    torch.testing.assert_close(found.d1, d1, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.d2, d2, rtol=1e-6, atol=1e-7)
    assert torch.equal(rows[found.row], rows[row])


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest result of an operation has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                self.bytes = max(self.bytes, part.nbytes)
        return result


def test_what_is_held_does_not_grow_with_samples_times_rows(monkeypatch):
    monkeypatch.setattr(search, "_BOUNDS", {"cpu": 2**14})
    bank = LatentBank(draw(40_000, 4))
    x = bank.take(torch.arange(64) * 601).float() + 0.001
    with Largest() as largest:
        found = nearest_rows(bank, x)
    assert found.copied.float().mean() > 0.9
    assert torch.equal(found.row, torch.arange(64) * 601)
    # The rows themselves and a number for each are 40 000 times 16 and 8 bytes.
    assert largest.bytes <= bank.rows.nbytes < 64 * 40_000


def test_the_threshold_is_a_third_of_the_distance_not_of_its_square():
    bank = LatentBank(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    # d1 / d2 = 1/3 at x = 1; squared distances would call 1.4 a copy, too.
    found = nearest_rows(bank, torch.tensor([[0.99, 0.0], [1.0, 0.0], [1.4, 0.0]]))
    assert found.copied.tolist() == [True, False, False]
    assert found.ratio[1] == 1 / 3


@pytest.mark.parametrize("first", [0.5, math.nan])
def test_samples_that_are_not_finite_are_no_copies(first):
    x = draw(3, 5)
    x[0, 0], x[1, 2], x[2, 0] = first, math.nan, math.inf
    found = nearest_rows(LatentBank(draw(30, 5)), x)
    bad = [math.isnan(first), True, True]
    assert (found.row < 0).tolist() == found.ratio.isnan().tolist() == bad
    assert not found.copied[bad].any()


def test_bad_input():
    with pytest.raises(ValueError, match="Expected samples of shape"):
        nearest_rows(LatentBank(draw(4, 5)), draw(2, 6))
    with pytest.raises(ValueError, match="All rows of the bank are equal"):
        nearest_rows(LatentBank(torch.ones(40, 5)), draw(2, 5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.sampled_from([0.5, 0.9, 0.95, 0.999]), st.data())
def test_interval_is_the_exact_one(count, level, data):
    hits = data.draw(st.integers(0, count))
    low, high = binomial_interval(hits, count, level)
    assert 0 <= low <= hits / count <= high <= 1
    # At either end the tail of the binomial distribution is what it is to be.
    tail = (1 - level) / 2
    if hits:
        assert binom.sf(hits - 1, count, low) == pytest.approx(tail)
    if hits < count:
        assert binom.cdf(hits, count, high) == pytest.approx(tail)
    other = binomial_interval(count - hits, count, level)
    assert (1 - other[1], 1 - other[0]) == pytest.approx((low, high), abs=1e-12)
    exact = binomtest(hits, count).proportion_ci(level, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))


def test_interval_of_nothing_and_of_agreement():
    assert all(math.isnan(end) for end in binomial_interval(0, 0))
    assert binomial_interval(0, 64) == (0, pytest.approx(0.0560, abs=1e-4))
    assert binomial_interval(64, 64) == (pytest.approx(1 - 0.0560, abs=1e-4), 1)
    assert binomial_interval(32, 64) == pytest.approx((0.3723, 0.6277), abs=1e-4)
