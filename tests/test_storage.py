"""Banks as files: written, opened without reading rows, and what is refused."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from stagewise import LatentBank
from stagewise.bank import bank_file

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LABELS = torch.tensor([7, -3, 2, 7, 2])[torch.arange(90) * 7 % 5]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same(bank, other):
    for name in ("rows", "offset", "centre", "sq_norms", "mean_sq_norm", "index"):
        one, two = getattr(bank, name), getattr(other, name)
        assert (one is None) == (two is None)
        assert one is None or torch.equal(bits(one[None]), bits(two[None]))
        assert one is None or one.dtype == two.dtype
    for name in ("shape", "radius", "max_norm", "std", "classes", "fingerprint", "dtype"):
        assert getattr(bank, name) == getattr(other, name)
    for label in bank.classes:
        assert bank.segment(label) == other.segment(label)


def unsigned(content):
    """A bank as version 0.1 wrote it, without checksums."""
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    del header["__metadata__"]["stagewise_crc32"]
    return content[:8] + json.dumps(header).encode().ljust(length - 8) + content[length:]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bank.safetensors"


@pytest.fixture
def x():
    return 4 + torch.randn(90, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_and_opened_is_the_same_to_the_bit(x, path, dtype, labels):
    bank = LatentBank(x, labels, dtype=dtype)
    bank.save(path)
    opened = LatentBank.open(str(path))
    assert_same(bank, opened)
    assert opened.residency == "memory-mapped"
    assert "memory-mapped" in repr(opened)
    assert torch.equal(opened.find(x), bank.find(x))
    assert torch.equal(opened.take(torch.arange(90)), bank.take(torch.arange(90)))
    assert os.listdir(path.parent) == [path.name]
    again = path.with_name("again")
    opened.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_reader_of_safetensors_reads_it(x, path, dtype, labels):
    bank = LatentBank(x, labels, dtype=dtype)
    bank.save(path)
    tensors = load_file(path)
    assert torch.equal(tensors["rows"], bank.rows)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        assert torch.equal(file.get_slice("rows")[3:5], bank.rows[3:5])
    assert about["format"] == "pt"
    assert json.loads(about["shape"]) == [3, 2, 2]
    assert about["fingerprint"] == bank.fingerprint
    assert float(about["std"]) == bank.std
    assert ("classes" in tensors) == (labels is not None)
    if labels is not None:
        ends = zip(tensors["starts"].tolist(), tensors["stops"].tolist(), strict=True)
        for label, (start, stop) in zip(tensors["classes"].tolist(), ends, strict=True):
            assert (labels[tensors["index"][start:stop]] == label).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_reads_no_rows(x, path, dtype):
    bank = LatentBank(x, LABELS, dtype=dtype)
    bank.save(path)
    size = path.stat().st_size
    with open(path, "r+b") as file:  # the rows are the end of the file, from a page on
        file.seek(size - bank.nbytes)
        assert file.tell() % 4096 == 0
        file.write(b"\xff" * bank.nbytes)  # NaN
    opened = LatentBank.open(path)
    assert opened.rows.isnan().all()
    assert opened.fingerprint == bank.fingerprint
    assert torch.equal(opened.sq_norms, bank.sq_norms)
    assert (opened.find(x) == -1).all()  # found by its key, but the row is not equal


@pytest.mark.parametrize("size", [1, 40, None])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_opened_bank_is_read_in_chunks(x, path, dtype, target, size):
    bank = LatentBank(x, LABELS, dtype=dtype)
    bank.save(path)
    opened = LatentBank.open(path)
    for segment in (opened.whole, opened.segment(2)):
        chunks = [
            (first, rows.clone()) for first, rows in opened.chunks(segment, size, None, target)
        ]
        assert torch.equal(torch.cat([rows for _, rows in chunks]), bank.rows[segment].to(target))
        assert chunks[0][0] == segment.start


def test_a_posterior_from_the_file(x, path):
    bank = LatentBank(x, LABELS, dtype=torch.bfloat16)
    bank.save(path)
    opened = LatentBank.open(path)
    xt = torch.randn(4, 12, dtype=torch.float64)
    logits = torch.cat(
        [
            -0.5 * (xt[:, None] - rows - opened.offset).square().sum(2)
            for _, rows in opened.chunks(opened.whole, 17, dtype=torch.float64)
        ],
        dim=1,
    )
    stored = bank.rows.double() + bank.offset
    expected = -0.5 * (xt[:, None] - stored).square().sum(2)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_an_opened_bank_is_moved_and_copied_like_any(x, path):
    LatentBank(x).save(path)
    opened = LatentBank.open(path)
    assert copy.deepcopy(opened) is opened
    assert opened.to("cpu") is opened
    moved = opened.to("meta")
    assert moved.residency == "meta"
    assert moved.sq_norms.device.type == "meta"
    path.unlink()  # the mapping keeps the file
    assert torch.equal(opened.rows, x.flatten(1))


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_written_is_as_saved(x, path, dtype, labels):
    seen = []
    bank = LatentBank.write(path, x.split(32), 90, labels=labels, dtype=dtype, advance=seen.append)
    assert seen == [32, 64, 90]
    assert bank.residency == "memory-mapped"
    batches = x.split(32) if labels is None else zip(x.split(32), labels.split(32), strict=True)
    in_memory = LatentBank.from_batches(batches, 90, dtype=dtype)
    assert_same(bank, in_memory)
    in_memory.save(path.with_name("other"))
    assert path.read_bytes() == path.with_name("other").read_bytes()
    if dtype in (None, torch.float32, torch.float64):
        assert_same(bank, LatentBank(x, labels, dtype=dtype))


def test_written_from_a_loader_with_labels(x, path):
    loader = DataLoader(TensorDataset(x, LABELS), batch_size=16)
    bank = LatentBank.write(path, loader, 90, labels=LABELS)
    assert_same(bank, LatentBank(x, LABELS))
    first = LatentBank.write(path, loader, 40)  # the file is replaced, the bank keeps the old one
    assert_same(first, LatentBank(x[:40]))
    assert_same(bank, LatentBank(x, LABELS))
    with pytest.raises(ValueError, match=r"in the order of `labels`.*after 0 rows.*shuffling"):
        LatentBank.write(path, loader, 90, labels=LABELS.flip(0))


BAD = {
    "few": (lambda x: [x[:50], x[50:]], {}, 91, r"Expected 91 rows in the batches, got 90"),
    "none": (lambda x: [], {}, 90, r"Expected 90 rows in the batches, got 0"),
    "one": (lambda x: [x], {}, 1, r"at least 2 rows, got \(1, 3, 2, 2\)"),
    "shape": (
        lambda x: [x[:9], x[9:, :1]],
        {},
        90,
        r"shape \(3, 2, 2\) as in the first batch, got \(1, 2, 2\) after 9 rows",
    ),
    "nan": (
        lambda x: [torch.where(torch.arange(90).view(-1, 1, 1, 1) == 70, torch.nan, x)],
        {"labels": LABELS},
        90,
        r"NaN or Inf in 1 of 90; the first is row 70\.",
    ),
    "labels": (lambda x: [x], {"labels": LABELS[:5]}, 90, r"`labels` with shape \(90,\)"),
    "range": (lambda x: [1e6 * x], {"dtype": torch.float16}, 90, "values beyond range"),
}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_batches_leave_no_file_and_the_old_one(x, path, case, kept):
    batches, kwargs, num_rows, message = BAD[case]
    if kept:
        LatentBank(x).save(path)
    with pytest.raises(ValueError, match=message):
        LatentBank.write(path, batches(x), num_rows, **kwargs)
    assert os.listdir(path.parent) == [path.name] * kept
    if kept:
        assert_same(LatentBank.open(path), LatentBank(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_storage_is_floating_point(x, path, dtype):
    with pytest.raises(TypeError, match="Expected `dtype` among"):
        LatentBank.write(path, [x], 90, dtype=dtype)
    with pytest.raises(TypeError, match="Expected `dtype` among"):
        LatentBank.from_batches([x], 90, dtype=dtype)
    assert not path.exists()


def test_killed_in_the_middle_leaves_the_old_file(x, path):
    LatentBank(x).save(path)

    def batches():
        yield torch.zeros(300, 12)
        os._exit(9)  # nothing is cleaned up

    child = os.fork()
    if not child:
        try:
            LatentBank.write(path, batches(), 400)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(os.listdir(path.parent)) == 2
    assert_same(LatentBank.open(path), LatentBank(x))


def test_an_error_while_saving_leaves_the_old_file(x, path, monkeypatch):
    LatentBank(x).save(path)
    monkeypatch.setattr(os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LatentBank(x + 1).save(path)
    assert os.listdir(path.parent) == [path.name]
    assert_same(LatentBank.open(path), LatentBank(x))


def test_a_full_disk_is_told_before_anything_is_written(x, path, monkeypatch):
    usage = bank_file.shutil.disk_usage(path.parent)
    monkeypatch.setattr(bank_file.shutil, "disk_usage", lambda folder: usage._replace(free=9000))
    with pytest.raises(OSError, match=r"needs 1\d\.\d kB on disk, and 9\.0 kB are free"):
        LatentBank(x).save(path)
    with pytest.raises(OSError, match=r"and 9\.0 kB are free in .*bfloat16"):
        LatentBank.write(path, [x], 90)
    assert os.listdir(path.parent) == []
    with pytest.raises(FileNotFoundError, match="Expected a folder"):
        LatentBank(x).save(path / "missing" / "bank")


def test_what_is_no_bank_is_refused(x, path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*LatentBank\.save"):
        LatentBank.open(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        LatentBank.open(path.parent)
    for content in (b"", b"PK\x03\x04" + bytes(100), bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Expected a safetensors file"):
            LatentBank.open(path)
    path.write_bytes((8).to_bytes(8, "little") + b"{nothing")
    with pytest.raises(ValueError, match="its header is no JSON"):
        LatentBank.open(path)
    save_file({"rows": x, "latents": x.clone()}, path)
    message = r"\['latents', 'rows'\] and without \['offset', 'centre', 'sq_norms', 'keys'\]"
    with pytest.raises(ValueError, match=message):
        LatentBank.open(path)
    LatentBank(x).save(path)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="without the metadata of a bank"):
        LatentBank.open(path)


@pytest.mark.parametrize("left", [30, 4090, 5000, -1])
def test_a_truncated_file_is_refused(x, path, left):
    LatentBank(x).save(path)
    size = path.stat().st_size
    os.truncate(path, left % size)
    with pytest.raises(ValueError, match=rf"is truncated: \d+ bytes .*, {left % size} are there"):
        LatentBank.open(path)


def test_a_damaged_or_later_file_is_refused(x, path):
    LatentBank(x).save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"shape": [90, 12]', b'"shape": [12, 90]'))
    with pytest.raises(ValueError, match="is damaged: its header does not match its checksum"):
        LatentBank.open(path)
    content = unsigned(content)
    path.write_bytes(content.replace(b'"stagewise_bank": "1"', b'"stagewise_bank": "9"'))
    with pytest.raises(ValueError, match=r"later version of stagewise \(file version 9"):
        LatentBank.open(path)
    path.write_bytes(content.replace(b'"shape": [90, 12]', b'"shape": [91, 12]'))
    with pytest.raises(ValueError, match="is damaged"):
        LatentBank.open(path)


def test_pages_are_asked_for_ahead(x, path, monkeypatch):
    LatentBank(x).save(path)
    bank = LatentBank.open(path)
    asked = []
    monkeypatch.setattr(
        type(bank._file), "expect", lambda self, first, last: asked.append((first, last))
    )
    for first, _ in bank.chunks(slice(10, 90), 30):
        assert asked[-1] == (min(first + 30, 70) * 48, min(first + 60, 90) * 48)
    assert asked == [(480, 1920), (1920, 3360), (3360, 4320)]
    asked.clear()
    list(bank.chunks(bank.whole, 50, dtype=torch.float64))
    assert asked == [(0, 2400), (2400, 4320)]


def test_names_are_any_path(x, tmp_path, monkeypatch):
    LatentBank(x).save(tmp_path / "with space.bank")
    monkeypatch.chdir(tmp_path)
    assert_same(LatentBank.open("with space.bank"), LatentBank(x))
    LatentBank(x).save("plain")
    assert Path("plain").exists()


def test_a_row_is_not_found_under_another_class():
    """One sample at a time: a key below or above all others stands for no row."""
    x, labels = torch.randn(8, 5), torch.arange(8) // 2
    bank = LatentBank(x, labels)
    starts = torch.tensor([bank.segment(label).start for label in range(4)])
    for row in range(8):
        sample = bank.rows[row : row + 1]
        found = [int(bank.find(sample, first=start[None])) for start in starts]
        assert found == [row if row // 2 == label else -1 for label in range(4)]
