"""Both products in one pass over rows that have to be fetched: the same answer, read once."""

import pytest
import torch

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Exact
from stagewise.engines.ahead import Ahead

NAVIGATION = torch.tensor([0.005, 0.01, 0.03, 0.05, 0.08])


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Counts how often rows are walked through, by their segment."""
    counted = []
    chunks = LatentBank.chunks

    def count(bank, segment, *args, **kwargs):
        counted.append((segment.start, segment.stop))
        return chunks(bank, segment, *args, **kwargs)

    monkeypatch.setattr(LatentBank, "chunks", count)
    return counted


def noisy(x, rows, t):
    generator = torch.Generator().manual_seed(0)
    return LinearPath().interpolate(
        torch.randn(len(t), x.shape[1], generator=generator), x[rows], t
    )


def error(post, exact, centre):
    return ((post.mean - exact.mean).norm(dim=1) / (exact.mean - centre).norm(dim=1)).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "shifted"])
@pytest.mark.parametrize("chunk_size", [None, 37])
def test_navigation_reads_converted_rows_once(dtype, shift, chunk_size, passes):
    x = shift + torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    bank = LatentBank(x, dtype=dtype)
    passes.clear()
    xt = noisy(x, [0, 1, 2, 3, 4], NAVIGATION)
    post = Oracle(bank, engine=Exact(chunk_size=chunk_size)).posterior(xt, NAVIGATION)
    assert passes == [(0, 500)]
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, NAVIGATION)
    assert error(post, exact, bank.centre) <= 5e-6
    torch.testing.assert_close(post.log_evidence, exact.log_evidence, rtol=1e-6, atol=1e-6)


def test_a_file_is_read_once(tmp_path, passes):
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(2))
    LatentBank(x).save(tmp_path / "bank.safetensors")
    bank = LatentBank.open(tmp_path / "bank.safetensors")
    passes.clear()
    xt = noisy(x, [0, 1, 2, 3, 4], NAVIGATION)
    post = Oracle(bank, engine=Exact()).posterior(xt, NAVIGATION)
    assert passes == [(0, 300)]
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, NAVIGATION)
    assert error(post, exact, bank.centre) <= 5e-6


def test_class_by_class(passes):
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(600) % 4
    bank = LatentBank(x, labels, dtype=torch.bfloat16)
    passes.clear()
    t = torch.tensor([0.02, 0.9, 0.05, 0.5, 0.01, 0.99])
    rows = [0, 1, 4, 2, 3, 7]
    xt = noisy(x, rows, t)
    post = Oracle(bank, engine=Exact()).posterior(xt, t, labels[rows])
    assert sorted(passes) == [(0, 150), (150, 300), (300, 450), (450, 600)]
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t, labels[rows])
    assert error(post, exact, bank.centre) <= 5e-6


def test_what_the_first_rows_did_not_show_is_read_again(passes):
    """Of the first chunk one row is all that counts; many as near come later."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 48, generator=generator)
    x[:50] *= 40  # far from everything, and from each other
    x[7] = x[100]
    bank = LatentBank(x, dtype=torch.bfloat16)
    passes.clear()
    t = torch.tensor([0.1])
    xt = noisy(x, [100], t)
    post = Oracle(bank, engine=Exact(chunk_size=50)).posterior(xt, t)
    assert passes == [(0, 200), (0, 200)]
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t)
    assert post.ess[0] > 5
    assert error(post, exact, bank.centre) <= 5e-6


def test_resident_rows_make_nothing_ahead(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("resident rows are multiplied for those that need it")

    monkeypatch.setattr(Ahead, "add", refuse)
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(5))
    bank, xt = LatentBank(x), noisy(x, [0, 1, 2, 3, 4], NAVIGATION)
    post = Oracle(bank, engine=Exact()).posterior(xt, NAVIGATION)
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, NAVIGATION)
    assert error(post, exact, bank.centre) <= 5e-6


@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_sums_do_not_depend_on_the_order_of_chunks(order, level):
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(90, 8, generator=generator)
    logits = 5 * torch.randn(3, 90, generator=generator)
    if order != "mixed":
        at = logits[0].argsort(descending=order == "falling")
        rows, logits = rows[at], logits[:, at]
    ahead = Ahead(3, 8, logits, lead=2, level=level)
    for first in range(0, 90, 13):
        part = slice(first, first + 13)
        ahead.add(slice(0, 3), logits[:, part], rows[part], first == 0)
    assert ahead.chosen.all()
    peak = logits.double().amax(1, keepdim=True)
    expected = (logits.double() - peak).exp() @ rows.double()
    torch.testing.assert_close(ahead.peak.double(), peak[:, 0])
    total = ahead.total
    if level:  # what was taken from each weight comes back with the sum of all rows
        assert (ahead.level > 0).all()
        total = total + ahead.level[:, None] * rows.double().sum(0)
    else:
        assert ahead.level is None
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
