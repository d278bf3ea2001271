"""The bank, how it finds its data in batches, and what it refuses."""

import copy
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, find_sample
from stagewise import memory as memory_module
from stagewise.bank import streaming
from stagewise.bank.row_keys import find_among, row_keys

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF_EPS = {"rtol": 0.0, "atol": 4 * 2.0**-9}  # numbers up to 4 away from their mean, in bfloat16


def samples(bank):
    """What a bank says its samples are, without its own reader."""
    return bank.rows.double() + bank.offset


def test_statistics():
    x = torch.randn(500, 2, 3, 4) * 3 + 7
    bank = LatentBank(x)
    flat = x.double().flatten(1)
    assert (len(bank), bank.dim, bank.shape) == (500, 24, (2, 3, 4))
    torch.testing.assert_close(bank.centre, flat.mean(0))
    torch.testing.assert_close(bank.sq_norms, (flat - flat.mean(0)).square().sum(1))
    assert bank.std == pytest.approx(float(flat.std(correction=0)))
    assert bank.max_norm >= float(flat.norm(dim=1).max())
    assert bank.nbytes == 500 * 24 * 4


def test_spread_of_data_far_from_zero():
    x = 1e4 + 1e-4 * torch.randn(300, 10, dtype=torch.float64)
    assert LatentBank(x).std == pytest.approx(float(x.std(correction=0)), rel=1e-6)


def test_blocks_give_the_same_statistics(monkeypatch):
    x = torch.randn(101, 6)
    whole = LatentBank(x)
    monkeypatch.setattr("stagewise.bank.building.BLOCK", 60)
    blocks = LatentBank(x)
    torch.testing.assert_close(blocks.sq_norms, whole.sq_norms)
    assert blocks.std == pytest.approx(whole.std)
    x[57, 2] = torch.nan
    with pytest.raises(ValueError, match=r"in 1 of 101; the first is row 57"):
        LatentBank(x)


def test_rows_are_sorted_by_class_and_found_again():
    labels = torch.tensor([5, -1, 5, 2, 2, 5, -1])
    x = torch.arange(7.0)[:, None].repeat(1, 3)
    bank = LatentBank(x, labels)
    assert bank.classes == [-1, 2, 5]
    assert torch.equal(bank.rows, x[bank.index])
    assert bank.index.tolist() == [1, 6, 3, 4, 0, 2, 5]  # stable within a class
    assert bank.rows[bank.segment(2), 0].tolist() == [3, 4]
    assert bank.labels_of(range(7)) == labels[bank.index].tolist()


def test_no_copy_without_labels_and_itself_on_its_device():
    x = torch.randn(10, 4)
    bank = LatentBank(x)
    assert bank.rows.data_ptr() == x.data_ptr()
    assert bank.to("cpu") is bank
    assert copy.copy(bank) is copy.deepcopy(bank) is bank
    again = pickle.loads(pickle.dumps(bank))
    assert torch.equal(again.rows, bank.rows)


@pytest.mark.parametrize(
    ("x", "labels", "error", "message"),
    [
        (torch.zeros(0, 4), None, ValueError, r"at least 2 rows, got \(0, 4\)"),
        (torch.zeros(1, 4), None, ValueError, r"at least 2 rows, got \(1, 4\)"),
        (torch.zeros(4), None, ValueError, r"shape \(N, \*\)"),
        (
            torch.zeros(4, 3, dtype=torch.uint8),
            None,
            TypeError,
            "floating-point `x`, got torch.u",
        ),
        (torch.zeros(4, 3), torch.zeros(3).long(), ValueError, r"`labels` with shape \(4,\)"),
        (torch.zeros(4, 3), torch.full((4,), 0.5), ValueError, "integer `labels`.*not all whole"),
    ],
)
def test_bad_banks_are_refused(x, labels, error, message):
    with pytest.raises(error, match=message):
        LatentBank(x, labels)


def test_bad_rows_are_named_in_the_users_order():
    """In 16 bits too, where they do not spoil the others."""
    x = torch.randn(20, 3)
    x[17, 0], x[4, 2], x[9] = torch.inf, torch.nan, -torch.inf
    labels = torch.arange(20).flip(0) % 4
    for make in (
        *(lambda dtype=dtype: LatentBank(x, dtype=dtype) for dtype in (None, *DTYPES[2:])),
        lambda: LatentBank(x, labels),
        lambda: LatentBank.from_batches([x], 20),
        lambda: LatentBank.from_batches([(x, labels)], 20),
    ):
        with pytest.raises(ValueError, match=r"NaN or Inf in 3 of 20; the first is row 4\."):
            make()


def test_from_batches():
    x, y = torch.randn(25, 3, 2), torch.arange(25) % 4
    seen = []
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    bank = LatentBank.from_batches(loader, 25, advance=seen.append)
    assert seen == [8, 16, 24, 25]
    assert torch.equal(bank.rows, x.flatten(1)[bank.index])
    assert bank.classes == [0, 1, 2, 3]
    only_x = {"read_batch": lambda batch: (batch[0], None)}
    plain = LatentBank.from_batches(loader, 10, **only_x, dtype=torch.bfloat16)
    assert plain.classes == []
    torch.testing.assert_close(plain.take(torch.arange(10)).float(), x[:10].flatten(1), **HALF_EPS)
    with pytest.raises(ValueError, match="Expected 30 rows in the batches, got 25"):
        LatentBank.from_batches(loader, 30)
    with pytest.raises(ValueError, match=r"`labels` with shape \(25,\), got \(20,\)"):
        LatentBank.from_batches([x[:5], (x[5:], y[5:])], 25)
    with pytest.raises(
        ValueError, match=r"shape \(3, 2\) as in the first batch, got \(2, 2\) after 4"
    ):
        LatentBank.from_batches([torch.zeros(4, 3, 2), torch.zeros(4, 2, 2)], 8)


def test_a_bank_beyond_memory_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(memory_module, "available_memory", lambda device="cpu": 10**9)
    batch = torch.zeros(2, 4, 32, 32)
    with pytest.raises(MemoryError) as error:
        LatentBank.from_batches([batch], 1_281_167)
    message = str(error.value)
    for part in ("1281167 rows x 4096", "needs 21.0 GB", "1.0 GB are available"):
        assert part in message
    ways = ("dtype=torch.bfloat16 (10.5 GB)", "num_rows=48828", "some classes only")
    for way in (*ways, "LatentBank.write(path, batches, num_rows)"):
        assert way in message


def test_available_memory_is_told(monkeypatch):
    if not Path("/proc/meminfo").exists():
        pytest.skip("only Linux tells")
    free = memory_module.available_memory()
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert 0 < free < total
    monkeypatch.setattr(memory_module, "_control_group", lambda: 12345)
    assert memory_module.available_memory() == 12345


X, Y = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("batch", "has_label"),
    [
        (X, False),
        ((X, Y), True),
        ([Y, X], True),
        ((X,), False),
        ((X, torch.rand(4)), False),
        ({"latents": X, "labels": Y}, True),
        ({"image": X, "mask": torch.rand(4, 8, 8), "y": Y}, True),
        ({"unusual": X, "index": Y}, False),
        ({"pixel_values": X, "class_labels": Y, "caption": ["a"] * 4}, True),
    ],
)
def test_x1_and_label_are_found(batch, has_label):
    x1, labels = find_sample(batch)
    assert x1 is X
    assert labels is (Y if has_label else None)


@pytest.mark.parametrize(
    "batch",
    [
        Y,
        (Y, Y),
        (X, X.clone()),
        {"a": X, "b": X.clone()},
        {"caption": ["a"]},
        "text",
        {"nested": {"image": X}},
    ],
)
def test_what_was_seen_and_the_cure_are_named(batch):
    with pytest.raises(ValueError, match="one floating-point tensor") as error:
        find_sample(batch)
    assert "read_batch=lambda batch" in str(error.value)
    if isinstance(batch, tuple):
        assert str(tuple(batch[0].shape)) in str(error.value)


def test_from_batches_sorts_in_blocks_of_columns(monkeypatch):
    monkeypatch.setattr("stagewise.bank.building._SORTED", 60)
    x, y = torch.randn(25, 3, 2), torch.arange(25).flip(0) % 4
    bank = LatentBank.from_batches([(x, y)], 25)
    plain = LatentBank(x, y)
    assert torch.equal(bank.rows, plain.rows)
    assert torch.equal(bank.index, plain.index)
    assert bank.labels_of(range(25)) == plain.labels_of(range(25))


@pytest.mark.parametrize("labels", [None, torch.arange(200) % 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_samples_as_stored(dtype, labels):
    x = 50 + 3 * torch.randn(200, 3, 5, dtype=torch.float64)
    bank = LatentBank(x, labels, dtype=dtype)
    stored = samples(bank)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(bank.centre, stored.mean(0), **close)
    torch.testing.assert_close(bank.sq_norms, (stored - stored.mean(0)).square().sum(1), **close)
    torch.testing.assert_close(bank.mean_sq_norm, bank.sq_norms.mean(), **close)
    assert bank.radius == pytest.approx(float((stored - stored.mean(0)).norm(dim=1).max()), 1e-12)
    assert bank.max_norm >= float(stored.norm(dim=1).max())
    assert bank.std == pytest.approx(float(stored.std(correction=0)), 1e-12)
    for value in (bank.offset, bank.centre, bank.sq_norms, bank.mean_sq_norm):
        assert value.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", ["tensor", "batches"])
def test_sixteen_bits_round_relative_to_the_distance_from_the_mean(dtype, build):
    x = 100 + torch.randn(500, 12)
    if build == "tensor":
        bank = LatentBank(x, dtype=dtype)
    else:
        bank = LatentBank.from_batches(x.split(64), 500, dtype=dtype)
    error = (samples(bank) - x).abs()
    # Half a unit in the last place of x - offset; the offset is near the mean in both.
    info = torch.finfo(dtype)
    assert (error <= 0.501 * info.eps * (x.double() - bank.offset).abs().clamp_min(info.tiny)).all()
    assert error.max() < (x.to(dtype).double() - x).abs().max() / 10
    assert torch.equal(bank.offset, bank.offset.float().double())
    # Nothing is lost on the way out: what is taken is stored as the same row again.
    assert torch.equal((samples(bank) - bank.offset).to(dtype), bank.rows)


def test_rows_do_not_depend_on_the_batches_they_came_in():
    x, labels = torch.randn(600, 6) + 3, torch.arange(600) % 5
    made = [
        LatentBank.from_batches(
            zip(x.split(n), labels.split(n), strict=True), 600, dtype=torch.bfloat16
        )
        for n in (7, 32, 600)
    ]
    assert len({bank.fingerprint for bank in made}) == 1


def test_parts_with_one_offset_are_rounded_as_the_whole():
    x, labels = torch.randn(90, 2, 3) + 5, torch.arange(90) % 4
    whole = LatentBank(x, labels, dtype=torch.bfloat16)
    again = [
        LatentBank(x[:30], labels[:30], dtype=torch.bfloat16, offset=whole.offset),
        LatentBank.from_batches([x[:30]], 30, dtype=torch.bfloat16, offset=whole.offset),
    ]
    for bank in again:
        assert (whole.find(x[:30]) >= 0).all()
        taken = bank.take(torch.arange(30) if bank.index is None else bank.index.argsort())
        assert torch.equal(taken, whole.take(whole.find(x[:30])))
    with pytest.raises(ValueError, match=r"`offset` of 6 finite numbers.*got shape \(2,\)"):
        LatentBank(x, dtype=torch.bfloat16, offset=torch.zeros(2))
    assert LatentBank(x, offset=whole.offset).offset.count_nonzero() == 0


@pytest.mark.parametrize("rows", [slice(1, None, 3), slice(20, 60)])
def test_part(rows, tmp_path):
    x, labels = torch.randn(90, 2, 3) + 5, torch.arange(90) % 4
    LatentBank(x, labels, dtype=torch.float16).save(tmp_path / "bank")
    whole = LatentBank.open(tmp_path / "bank")
    part = whole.part(rows)
    at = torch.arange(90)[rows]
    assert part.rows.untyped_storage().nbytes() == len(at) * 6 * 2
    assert part.shape == (2, 3)
    assert torch.equal(samples(part), samples(whole)[at])
    assert part.labels_of(list(range(len(at)))) == whole.labels_of(at.tolist())
    torch.testing.assert_close(part.centre, samples(whole)[at].mean(0))
    with pytest.raises(ValueError, match="at least 2 rows"):
        whole.part(slice(3, 4))


@pytest.mark.parametrize("build", ["tensor", "batches"])
@pytest.mark.parametrize("scale", [1e-5, 1e-9])
def test_samples_too_close_together_for_float16_are_refused(scale, build):
    x = 1 + scale * torch.randn(100, 6, dtype=torch.float64)
    make = {
        "tensor": lambda: LatentBank(x, dtype=torch.float16),
        "batches": lambda: LatentBank.from_batches(x.split(9), 100, dtype=torch.float16),
    }
    with pytest.raises(
        ValueError, match=r"differ from their mean by at least 0.00012.*dtype=torch.bfloat"
    ):
        make[build]()
    LatentBank(x, dtype=torch.bfloat16)
    LatentBank(1e3 * (x - 1) + 1, dtype=torch.float16 if scale == 1e-5 else torch.bfloat16)


def test_offset_is_zero_unless_bits_are_lost():
    x = 5 + torch.randn(20, 4)
    half = x.half()
    kept = LatentBank(half)
    assert kept.rows.data_ptr() == half.data_ptr()
    for bank in (kept, LatentBank(x), LatentBank(x.double(), dtype=torch.float32)):
        assert torch.equal(bank.offset, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(LatentBank.from_batches([half], 20).rows, half)
    other = LatentBank(half, dtype=torch.bfloat16)
    torch.testing.assert_close(other.offset, half.double().mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (torch.tensor([[7e4, 0.0], [-7e4, 1.0]]), torch.float16, r"float16.*65504.*70000.*float32"),
        (
            torch.tensor([[4e38], [-4e38]], dtype=torch.float64),
            torch.float32,
            r"float32.*4e\+38.*float64",
        ),
        (
            torch.tensor([[1e300], [0.0]], dtype=torch.float64),
            torch.bfloat16,
            r"bfloat16.*1e\+300.*float64",
        ),
    ],
)
def test_numbers_beyond_the_range_are_refused(x, dtype, message):
    with pytest.raises(ValueError, match="values beyond range") as error:
        LatentBank(x, dtype=dtype)
    error.match(message)
    with pytest.raises(ValueError, match=message):
        LatentBank.from_batches([x], 2, dtype=dtype)


def test_range_is_that_of_the_distance_from_the_mean():
    x = 1e5 + torch.randn(50, 3)
    bank = LatentBank(x, dtype=torch.float16)
    assert (samples(bank) - x).abs().max() < 4 * 2.0**-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_take(dtype):
    x = 3 + torch.randn(30, 2, 2)
    bank = LatentBank(x, torch.arange(30) % 4, dtype=dtype)
    rows = torch.tensor([[3, 29, 3], [0, 11, 7]])
    for taken in (bank.take(rows), bank.take(rows, torch.device("cpu"))):
        assert taken.shape == (2, 3, 4)
        assert taken.dtype == torch.float64
        assert torch.equal(taken, samples(bank)[rows])
    assert bank.take(torch.tensor(5)).shape == (4,)
    with pytest.raises(IndexError):
        bank.take(torch.tensor([30]))


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [None, torch.arange(300) % 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_find(dtype, labels, given):
    generator = torch.Generator().manual_seed(1)
    x = 2 + torch.randn(300, 3, 4, generator=generator).to(given)
    bank = LatentBank(x, labels, dtype=dtype)
    order = torch.randperm(300, generator=generator)
    state = torch.get_rng_state()
    found = bank.find(x[order])
    assert torch.equal(torch.get_rng_state(), state)
    own = torch.arange(300) if bank.index is None else bank.index
    assert torch.equal(own[found], order)
    assert torch.equal(bank.find(samples(bank).reshape(300, 3, 4)), torch.arange(300))
    near = x[:5].clone()
    near.flatten(1)[range(5), range(5)] += 0.5
    near = torch.cat([near, x[:1], torch.full_like(near[:3], torch.nan), near[:1] * torch.inf])
    assert bank.find(near).tolist()[:5] == [-1] * 5
    assert bank.find(near).tolist()[6:] == [-1] * 4
    assert bank.find(near)[5] == bank.find(x[:1])[0] >= 0
    assert bank.find(x[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finds_a_row_whose_last_digits_are_others(dtype):
    draws = torch.Generator().manual_seed(3)
    x = 5 + torch.randn(2000, 24, generator=draws)
    x[7] = x[6]
    bank = LatentBank(x, torch.arange(2000) % 7, dtype=dtype)
    rows = samples(bank).float()
    near = rows * (1 + 1e-5 * torch.randn(2000, 1, generator=draws))
    found = bank.find_near(near)
    assert torch.equal(rows[found], rows)
    assert (bank.find(near) < 0).double().mean() > 0.1
    assert torch.equal(bank.find_near(rows), bank.find(rows))
    assert (bank.find_near(1.05 * rows) == -1).all()
    assert (bank.find_near(1.05 * rows, within=0.5) >= 0).any()
    # Far from 0 all rows are within 1 % of one another, as shares of their norms.
    far = LatentBank(rows + 1000, torch.arange(2000) % 7)
    other = rows.double().flip(0) + 1000 + 0.1
    assert (far.find_near(other) == -1).all()
    assert torch.equal(far.rows[far.find_near(samples(far) + 1e-4)], far.rows)
    assert bank.find_near(rows[:0]).shape == (0,)
    moved = pickle.loads(pickle.dumps(bank))
    assert torch.equal(moved.find_near(near), found)


def banks_of(x, tmp_path):
    """The same samples in memory and in a file, with labels and without."""
    bank = LatentBank(x, torch.arange(len(x)) % 3)
    bank.save(tmp_path / "bank.safetensors")
    return LatentBank(x), bank, LatentBank.open(tmp_path / "bank.safetensors")


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_find_at_the_precision_of_the_query(stored, asked, tmp_path):
    generator = torch.Generator().manual_seed(2)
    # Small numbers too, of which float16 keeps few digits.
    x = torch.randn(300, 3, 40, generator=generator, dtype=torch.float64) * torch.tensor(
        [1, 1e-3, 1e-6]
    ).double().view(3, 1)
    x = x.to(stored)
    for bank in banks_of(x, tmp_path):
        own = torch.arange(300) if bank.index is None else bank.index
        before = bank.fingerprint
        for _ in range(2):  # the second time from what was kept
            assert torch.equal(own[bank.find(x.to(asked))], torch.arange(300))
        assert torch.equal(own[bank.find(x)], torch.arange(300))
        assert bank.fingerprint == before
        other = (x.float() + 0.05).to(asked)  # a sample of the row, as a VAE draws it
        assert (bank.find(other) == -1).all()
        assert bank.find(x[:0].to(asked)).shape == (0,)


def test_rows_that_are_equal_once_rounded():
    x = torch.tensor([[1.0, 2], [1.0 + 2**-12, 2], [1.5, 2], [1e6, 2], [2e6, 2]])
    bank = LatentBank(x)
    assert bank.find(x.bfloat16())[:2].tolist() in ([0, 0], [1, 1])
    assert bank.find(x.bfloat16())[2:].tolist() == [2, 3, 4]
    assert bank.find(x).tolist() == [0, 1, 2, 3, 4]
    # Beyond the range of float16 both are infinite, and equal.
    assert bank.find(x.half())[2] == 2
    assert bank.find(x.half())[3] in (3, 4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_samples_of_a_bank_with_an_offset_are_found_in_16_bits(stored, asked):
    x = 2 + torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
    bank = LatentBank(x, dtype=stored)
    assert bank.offset.any()
    assert torch.equal(bank.find(samples(bank).to(asked)), torch.arange(300))
    assert torch.equal(bank.find(x), torch.arange(300))
    # Parts of it share its offset.
    assert torch.equal(
        bank.part(slice(100, 300)).find(samples(bank)[100:].to(asked)).sort().values,
        torch.arange(200),
    )


def test_a_moved_bank_looks_at_its_own_rows():
    bank = LatentBank(torch.randn(20, 3))
    bank.find(bank.rows.bfloat16())
    moved = bank._moved(torch.clone)
    moved.rows += 1
    moved._keys = None
    assert torch.equal(moved.find(moved.rows.bfloat16()), torch.arange(20))


def test_sorted_keys_are_not_kept_when_a_bank_moves():
    x = torch.randn(20, 3)
    bank = LatentBank(x, torch.arange(20) % 2)
    for asked in (x, x.bfloat16()):
        bank.find(asked)
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = bank.to("cuda")
        for asked in (x, x.bfloat16()):
            assert moved.find(asked.to("cuda")).device.type == "cuda"
        for dtype in (None, torch.bfloat16):
            assert {keys.device.type for keys in moved.key_index(dtype)} == {"cuda"}
    half = bank.part(slice(1, None, 2))
    for asked in (x, x.bfloat16()):
        assert torch.equal(half.find(asked[bank.index[1::2]]), torch.arange(10))
        assert (half.find(asked[bank.index[::2]]) == -1).all()


def test_queries_of_the_bank_s_own_type_keep_one_index():
    bank = LatentBank(torch.randn(20, 3))
    bank.find(bank.rows)
    bank.find(bank.rows.double())
    assert list(bank._sorted_keys) == [None]
    bank.find(bank.rows.bfloat16())
    assert list(bank._sorted_keys) == [None, torch.bfloat16]


def test_find_among_duplicates_and_signs_of_zero():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    bank = LatentBank(x)
    assert bank.find(x)[0] in (0, 2, 4)
    assert bank.find(x)[1] in (1, 3)
    assert bank.find(torch.tensor([[-0.0, 1.0]]))[0] in (0, 2, 4)
    with pytest.raises(ValueError, match=r"shape \('B', 2\) as the bank's samples, got \(2, 3\)"):
        bank.find(torch.zeros(2, 3))


def test_find_is_right_when_keys_collide(monkeypatch):
    x = torch.randn(40, 3)
    monkeypatch.setattr("stagewise.bank.rows.row_keys", lambda rows: rows[:, 0].ge(0).long())
    monkeypatch.setattr("stagewise.bank.row_keys.row_keys", lambda rows: rows[:, 0].ge(0).long())
    found = LatentBank(x).find(x)
    assert ((found == torch.arange(40)) | (found == -1)).all()  # missed, perhaps, but never wrong


@pytest.mark.parametrize("target", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_are_the_rows(dtype, target):
    bank = LatentBank(torch.randn(101, 6), dtype=dtype)
    segments = slice(0, 101), slice(13, 57), slice(20, 21), slice(5, 5)
    for segment, size in product(segments, [1, 7, 44, 1000, None]):
        seen = []
        for first, rows in bank.chunks(segment, size, dtype=target):
            assert first == segment.start + sum(map(len, seen))
            assert size is None or len(rows) <= size
            if target in (None, dtype):
                assert rows.data_ptr() == bank.rows[first].data_ptr()
            seen.append(rows.clone())
        expected = bank.rows[segment].to(target or dtype)
        assert torch.equal(torch.cat([expected[:0], *seen]), expected)
        assert all(rows.dtype == expected.dtype for rows in seen)


def test_chunks_pass_through_one_buffer_of_bounded_size(monkeypatch):
    bank = LatentBank(torch.randn(1000, 16))
    assert bank.whole == slice(0, 1000)
    places = {rows.data_ptr() for _, rows in bank.chunks(bank.whole, 100, dtype=torch.float64)}
    assert len(places) == 1
    monkeypatch.setitem(streaming._BUFFER_BYTES, "cpu", 300 * 16 * 8)
    sizes = [len(rows) for _, rows in bank.chunks(bank.whole, dtype=torch.float64)]
    assert sizes == [300, 300, 300, 100]
    assert [len(rows) for _, rows in bank.chunks(bank.whole)] == [1000]
    monkeypatch.setitem(streaming._BUFFER_BYTES, "cpu", 1)
    sizes = [len(rows) for _, rows in bank.chunks(bank.whole, dtype=torch.float64)]
    assert sizes == [256, 256, 256, 232]
    with pytest.raises(ValueError, match="`size` of at least 1 row, got 0"):
        bank.chunks(bank.whole, 0)


def test_fake_tensors_leave_no_trace_in_a_real_bank():
    x = torch.randn(30, 6)
    bank = LatentBank(x, torch.arange(30) % 3, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for here in (bank, bank.to("cuda")):
            query = torch.randn(4, 6, device="cuda")
            assert here.find(query).device.type == "cuda"
            rows = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
            assert here.take(rows).device.type == here.device.type
            assert here.take(rows, query.device).device == query.device
            for dtype in (torch.bfloat16, torch.float32):
                chunks = list(here.chunks(here.segment(1), 4, query.device, dtype))
                assert [(first, tuple(rows.shape)) for first, rows in chunks] == [
                    *((10, (4, 6)), (14, (4, 6)), (18, (2, 6)))
                ]
                assert all(rows.device == query.device for _, rows in chunks)
        assert "cuda:0" in repr(bank.to("cuda"))
    assert torch.equal(bank.index[bank.find(x)], torch.arange(30))


def test_fingerprint():
    x = torch.randn(60, 5)
    labels = torch.arange(60) % 3
    name = LatentBank(x, labels).fingerprint
    assert len(name) == 32
    assert name == LatentBank(x.clone(), labels).fingerprint
    assert (
        name == LatentBank.from_batches([(x[:7], labels[:7]), (x[7:], labels[7:])], 60).fingerprint
    )
    one, rows, columns, sign = (x.clone() for _ in range(4))
    one[31, 4] = torch.nextafter(one[31, 4], torch.tensor(9.0))
    rows[[2, 5]] = rows[[5, 2]]
    columns[:, [1, 3]] = columns[:, [3, 1]]
    sign[3] = -sign[3]
    others = [LatentBank(other, labels).fingerprint for other in (one, rows, columns, sign)]
    others += [LatentBank(x, dtype=dtype).fingerprint for dtype in DTYPES]
    others += [LatentBank(x.reshape(60, 5, 1), labels).fingerprint]
    others += [LatentBank(x, labels + 1).fingerprint, LatentBank(x[:59], labels[:59]).fingerprint]
    others += [LatentBank(x + 1, dtype=torch.bfloat16).fingerprint]
    assert len({name, *others}) == len(others) + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_do_not_depend_on_blocks_and_hardly_collide(dtype, monkeypatch):
    # Small integers and widened numbers: most of their bits are zero.
    x = torch.cartesian_prod(*[torch.arange(-3.0, 3.0)] * 5).to(dtype)
    keys = row_keys(x)
    assert len(keys.unique()) == len(x) == 7776
    monkeypatch.setattr("stagewise.bank.row_keys._BLOCK", 64)
    assert torch.equal(row_keys(x), keys)
    assert torch.equal(row_keys(x.T.contiguous().T), keys)
    assert torch.equal(row_keys(x[17:18]), keys[17:18])


def test_keys_stay_the_same_for_ever():
    """They are in files."""
    assert row_keys(torch.tensor([[1.0, -2.5, 0.0]])).tolist() == [3867110339684335616]
    bank = LatentBank(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert bank.fingerprint == "bd04afa0b04cf1b548e484e1242daa8e"


def test_pinning_needs_a_device():
    bank = LatentBank(torch.randn(5, 2))
    assert bank.residency == "host"
    assert "host" in repr(bank)
    if torch.cuda.is_available():
        assert bank.pin().residency == "pinned host"
    else:
        with pytest.raises(RuntimeError, match="Expected a CUDA device, found none"):
            bank.pin()


def test_sizes_are_for_people():
    assert [memory_module.format_bytes(n) for n in (0, 999, 1540, 10.5e9, 3.2e13, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "10.5 GB",
        "32.0 TB",
        "5000.0 TB",
    ]


def test_arrays_and_labels_as_files_have_them():
    x, y = np.random.default_rng(0).normal(size=(12, 2, 3)), np.arange(12) % 3
    expected = LatentBank(torch.from_numpy(x), torch.from_numpy(y))
    read_only = x.copy()
    read_only.flags.writeable = False
    for own in (x, x.astype(">f8"), read_only, np.asfortranarray(x), torch.from_numpy(x)):
        for labels in (
            y,
            y[:, None],
            y.astype("f4"),
            y.astype("u2"),
            y.astype(">i4"),
            y[::-1][::-1],
        ):
            bank = LatentBank(own, labels)
            assert torch.equal(bank.rows, expected.rows)
            assert bank.classes == expected.classes
            assert torch.equal(bank.index, expected.index)
    columns = torch.from_numpy(y)[:, None].double()
    assert torch.equal(LatentBank(torch.from_numpy(x), columns).index, expected.index)


def test_what_is_neither_tensor_nor_array_is_refused_with_a_cure():
    x = torch.randn(4, 3)
    for wrong in (x.tolist(), "latents.pt", None, np.array([["a"] * 3] * 4)):
        with pytest.raises(
            TypeError, match=r"`x` to be a tensor or a NumPy array .*as_tensor\(x\)"
        ):
            LatentBank(wrong)
    for wrong in ([0, 1, 0, 1], np.array(["a", "b", "a", "b"])):
        with pytest.raises(TypeError, match=r"`labels` to be a tensor.*torch\.as_tensor\(labels\)"):
            LatentBank(x, wrong)
    for odd in (0.5, np.nan, np.inf):
        wrong = np.array([0, odd, 1, 1])
        for labels in (wrong, torch.from_numpy(wrong)):
            with pytest.raises(ValueError, match="not all whole numbers"):
                LatentBank(x, labels)
    with pytest.raises(TypeError, match=r"floating-point `x`, got torch.int64"):
        LatentBank(np.ones((4, 3), dtype=np.int64))


def test_rows_are_found_among_others_at_the_precision_of_what_is_asked():
    rows = torch.randn(9, 2, 3)
    order = torch.tensor([4, 4, 0, 8])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert find_among(rows, rows[order].to(dtype)).tolist() == order.tolist()
    mixed = torch.cat([rows[3:4], -rows[3:4]])
    assert find_among(rows, mixed).tolist() == [3, -1]
    assert find_among(rows, rows.flatten(1)).tolist() == [-1] * 9
    assert find_among(rows[:0], rows[:2]).tolist() == [-1, -1]


def test_a_part_of_a_class_wise_bank_is_saved(tmp_path):
    bank = LatentBank(torch.randn(12, 3), torch.arange(12) // 4)
    part = bank.part(slice(0, None, 2))
    part.save(tmp_path / "part.safetensors")
    again = LatentBank.open(tmp_path / "part.safetensors")
    assert torch.equal(again.rows, part.rows)
    assert again.class_ends == part.class_ends


def test_what_was_made_for_a_device_is_not_pickled():
    bank = LatentBank(torch.randn(12, 3), torch.arange(12) // 4)
    bank.class_table(bank.device)
    bank.find(bank.rows)
    assert bank._class_table
    assert bank._sorted_keys
    again = pickle.loads(pickle.dumps(bank))
    assert again._class_table == again._sorted_keys == {}
    assert torch.equal(again.find(bank.rows), bank.find(bank.rows))
