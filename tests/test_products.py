"""The two products: precision, whatever the global settings, and the split of 16-bit types."""

import pytest
import torch

from stagewise import products
from stagewise.products import (
    averages,
    full_precision,
    rounding,
    scores,
    split,
    working_dtype,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(n, dim, queries, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(n + dim)
    rows = torch.randn(n, dim, generator=generator).to(dtype)
    query = scale * torch.randn(queries, dim, generator=generator, dtype=torch.float64)
    return query, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (37, 3), (300, 64), (500, 4096)])
def test_scores_are_as_good_as_their_rounding_says(dtype, scale, n, dim):
    query, rows = make(n, dim, 20, dtype, scale)
    gap = scores(query, rows).double() - query @ rows.double().T
    u, v = rounding(dtype, dim)
    size = u * query.norm(dim=1)[:, None] * rows.double().norm(dim=1)
    size += v * (query @ rows.double().T).abs()
    error = (gap / size).square().mean().sqrt()
    assert error <= 1
    if dtype != torch.float64 and n > 30:
        assert error > 0.01, "a rounding that pessimistic is not worth stating"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 24, 128])
@pytest.mark.parametrize("dim", [3, 64, 512, 4096])
def test_rows_like_the_query_have_larger_errors(dim, queries, dtype):
    """All terms of such a product have one sign, so that its partial sums grow."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(dim, generator=generator, dtype=torch.float64)
    rows = (x + 0.01 * torch.randn(300, dim, generator=generator, dtype=torch.float64)).to(dtype)
    query = 1e6 * (x + 0.01 * torch.randn(queries, dim, generator=generator, dtype=torch.float64))
    expected = query @ rows.double().T
    u, v = rounding(dtype, dim)
    error = (scores(query, rows).double() - expected).abs() / expected
    assert error.square().mean().sqrt() <= u + v
    assert error.max() <= 8 * (u + v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages(dtype):
    query, rows = make(400, 64, 20, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.softmax(3 * query @ rows.double().T, 1).to(wide)
    got, expected = averages(weights, rows), weights.double() @ rows.double()
    assert got.dtype == wide
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 2e-5)
    assert ((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max() <= tolerance


@pytest.mark.parametrize("turned", [None, 1, 64], ids=["plain", "turned", "mixed"])
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_float32_products_whichever_factor_is_on_the_left(turned, queries, monkeypatch):
    monkeypatch.setattr(products, "_TURNED", turned)
    monkeypatch.setattr(products, "_CHUNK", 37)
    query, rows = make(100, 48, queries, torch.float32)
    got = scores(query, rows)
    assert got.is_contiguous()
    assert (got - query @ rows.double().T).abs().max() <= 1e-5
    weights = torch.rand(queries, 100, generator=torch.Generator().manual_seed(1))
    got = averages(weights, rows)
    assert (got - weights.double() @ rows.double()).abs().max() <= 2e-5


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("n", [15, 16, 24, 29], ids=["too few", "blocks", "whole", "rest"])
def test_few_queries_with_blocks_of_rows(queries, n, monkeypatch):
    monkeypatch.setattr(products, "_TURNED", 64)
    monkeypatch.setattr(products, "_BLOCK", 8)
    query, rows = make(n, 48, queries, torch.float32)
    got = scores(query, rows)
    assert got.shape == (queries, n)
    assert (got - query @ rows.double().T).abs().max() <= 1e-5
    weights = torch.rand(queries, n, generator=torch.Generator().manual_seed(1))
    got = averages(weights, rows)
    assert got.shape == (queries, 48)
    assert (got - weights.double() @ rows.double()).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_split_holds_twice_the_digits(dtype):
    x = torch.rand(1000, dtype=torch.float64) + 1
    high, low = split(x, dtype)
    assert high.dtype == low.dtype == dtype
    digits = torch.finfo(dtype).eps ** 2
    assert (high.double() + low.double() - x).abs().max() <= digits
    assert (high.double() - x).abs().max() > 50 * digits


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_full_precision_inside_and_the_callers_setting_after(setting):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        allowed = torch.backends.cuda.matmul.allow_tf32
        with full_precision():
            if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            else:
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
        with pytest.raises(RuntimeError, match="inside"), full_precision():
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_are_multiplied_in_their_own_type_where_that_pays():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert working_dtype(torch.bfloat16, cpu) == torch.float32
    assert working_dtype(torch.float16, cpu, rough=True) == torch.float32
    assert working_dtype(torch.bfloat16, cpu, rough=True) in (torch.bfloat16, torch.float32)
    assert working_dtype(torch.float32, cuda) == torch.float32
    assert working_dtype(torch.float64, cpu) == torch.float64
    assert working_dtype(torch.bfloat16, cuda) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [256, 4096])
def test_what_tensor_cores_cut_off_is_within_what_is_said(dtype, dim):
    """Emulated: 16 terms are added exactly to a sum, of which 24 digits are kept, towards 0."""
    rows = torch.randn(64, dim).to(dtype)
    query = torch.randn(64, dim, dtype=torch.float64)
    query[:32] = rows[:32]
    scale = query.abs().amax(1, keepdim=True)
    product = torch.zeros(64, 64, dtype=torch.float64)
    for part in products.split(query / scale, dtype):
        total = torch.zeros_like(product)
        for terms, some in zip(part.double().split(16, 1), rows.double().split(16, 1), strict=True):
            exact = total + terms @ some.T
            digit = 2.0 ** (exact.abs().clamp_min(1e-300).log2().floor() - 23)
            total = (exact / digit).trunc() * digit
        product += total
    true = query @ rows.double().T
    unit, growth = products.rounding(dtype, dim, truncates=True)
    size = query.norm(dim=1)[:, None] * rows.double().norm(dim=1)
    share = (product * scale - true) / (unit * size + growth * true.abs())
    own, others = share[:32, :32].diagonal(), share[32:]
    for some in (own, others):
        assert 0.02 < some.square().mean().sqrt() < 1
    before = products.rounding(torch.float16, dim)
    without = own * growth / before[1]
    assert dim < 4096 or without.square().mean().sqrt() > 1, "what is said without it is too small"


@pytest.mark.parametrize("rows", [70, 64, 20])
def test_a_long_product_is_a_sum_of_short_ones(monkeypatch, rows):
    monkeypatch.setattr(products, "_LONG", 16)
    left = torch.rand(3, rows).bfloat16()
    right = torch.randn(rows, 5).bfloat16()
    found = products.averages(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, left.float() @ right.float())


@pytest.mark.skipif(not hasattr(torch.ops.aten.mm, "dtype"), reason="torch below 2.8")
def test_a_card_without_units_for_bfloat16_gets_float32(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(products, "_multiplies", lambda dtype: dtype == torch.float16)
    assert products.working_dtype(torch.bfloat16, cuda) == torch.float32
    assert products.working_dtype(torch.float16, cuda) == torch.float16
