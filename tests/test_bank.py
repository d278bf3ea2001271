"""The bank, how it finds its data in batches, and what it refuses."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank, find_sample
from stagewise import memory as memory_module


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
    monkeypatch.setattr("stagewise.bank._BLOCK", 60)
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
        (torch.zeros(4, 3), torch.zeros(4), TypeError, "integer `labels`"),
    ],
)
def test_bad_banks_are_refused(x, labels, error, message):
    with pytest.raises(error, match=message):
        LatentBank(x, labels)


def test_bad_rows_are_named_in_the_users_order():
    x = torch.randn(20, 3)
    x[17, 0], x[4, 2], x[9] = torch.inf, torch.nan, -torch.inf
    for labels in (None, torch.arange(20).flip(0) % 4):
        with pytest.raises(ValueError, match=r"NaN or Inf in 3 of 20; the first is row 4\."):
            LatentBank(x, labels)
        batch = x if labels is None else (x, labels)
        with pytest.raises(ValueError, match=r"NaN or Inf in 3 of 20; the first is row 4\."):
            LatentBank.from_batches([batch], 20)


def test_from_batches():
    x, y = torch.randn(25, 3, 2), torch.arange(25) % 4
    seen = []
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    bank = LatentBank.from_batches(loader, 25, advance=seen.append)
    assert seen == [8, 16, 24, 25]
    assert torch.equal(bank.rows, x.flatten(1)[bank.index])
    assert bank.classes == [0, 1, 2, 3]
    plain = LatentBank.from_batches(loader, 10, class_wise=False, dtype=torch.bfloat16)
    assert plain.classes == []
    assert torch.equal(plain.rows, x[:10].flatten(1).bfloat16())
    with pytest.raises(ValueError, match="Expected 30 rows in the batches, got 25"):
        LatentBank.from_batches(loader, 30)
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
    for way in ("dtype=torch.bfloat16 (10.5 GB)", "num_rows=48828", "some classes only"):
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
    assert "find=lambda batch" in str(error.value)
    if isinstance(batch, tuple):
        assert str(tuple(batch[0].shape)) in str(error.value)


def test_from_batches_sorts_in_blocks_of_columns(monkeypatch):
    monkeypatch.setattr("stagewise.bank._BLOCK", 60)
    x, y = torch.randn(25, 3, 2), torch.arange(25).flip(0) % 4
    bank = LatentBank.from_batches([(x, y)], 25)
    plain = LatentBank(x, y)
    assert torch.equal(bank.rows, plain.rows)
    assert torch.equal(bank.index, plain.index)
    assert bank.labels_of(range(25)) == plain.labels_of(range(25))


def test_sizes_are_for_people():
    assert [memory_module.format_bytes(n) for n in (0, 999, 1540, 10.5e9, 3.2e13, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "10.5 GB",
        "32.0 TB",
        "5000.0 TB",
    ]
