"""Reading and writing latents: every format as the public projects write it, and back."""

import io
import itertools
import json
import pickle
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from stagewise import LatentBank
from stagewise.latents import (
    Latents,
    convert,
    lightningdit,
    make_latents,
    open_latents,
    write_latents,
    write_stats,
)
from stagewise.latents.fast_dit import write_fast_dit
from stagewise.latents.making import made_rows
from stagewise.latents.mar import write_mar
from stagewise.latents.mean_std import write_mean_std
from stagewise.latents.opening import FORMATS as FORMATS_BY_NAME
from stagewise.latents.scaling import ChannelStatistics

SHAPE = (4, 4, 6)
FORMATS = {
    "lightningdit": "shards",
    "fast-dit": "pairs",
    "repa": "repa",
    "edm2": "edm2.zip",
    "mar": "mar",
    "plain": "latents.safetensors",
}


def draws(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def content(file):
    """The bytes of a file; of a safetensors header what it says, as its metadata have no order."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"].pop("stagewise_crc32", None)  # what no other project writes
    return header, data[end:]


def same_files(ours, theirs):
    found = [
        {file.relative_to(root): content(file) for file in root.rglob("[!.]*") if file.is_file()}
        for root in (ours, theirs)
    ]
    return found[0] == found[1] and len(found[0]) > 0


def opened(path, name, **options):
    return open_latents(path, name if name in ("repa", "edm2") else None, **options)


# Each format is written here as its project writes it, and compared byte for byte.


def test_lightningdit(tmp_path):
    z, flip, y = 3 * draws(50, *SHAPE) + 1, draws(50, *SHAPE, seed=1), torch.arange(50) % 7
    for path in ("public", "ours"):
        (tmp_path / path).mkdir()
    for shard, rows in enumerate((slice(0, 20), slice(20, 40), slice(40, 50))):
        held = {"latents": z[rows], "latents_flip": flip[rows], "labels": y[rows]}
        about = {"total_size": f"{len(z[rows])}", "dtype": f"{z.dtype}", "device": f"{z.device}"}
        name = tmp_path / "public" / f"latents_rank00_shard{shard:03d}.safetensors"
        save_file({key: value.clone() for key, value in held.items()}, name, metadata=about)
    batches = zip(z.split(7), flip.split(7), y.split(7), strict=True)
    write_latents(tmp_path / "ours", batches, shard_size=20, stats=False)
    assert same_files(tmp_path / "ours", tmp_path / "public")

    mean, std = z.mean([0, 2, 3], keepdim=True), z.std([0, 2, 3], keepdim=True)
    write_stats(tmp_path / "ours")
    stats = torch.load(tmp_path / "ours/latents_stats.pt", weights_only=True)
    torch.testing.assert_close(stats, {"mean": mean, "std": std}, rtol=1e-6, atol=1e-7)

    torch.save({"mean": mean, "std": std}, tmp_path / "public/latents_stats.pt")
    latents = open_latents(tmp_path / "public", flips="both")
    assert "LightningDiT" in latents.describe()
    assert "3 shards" in latents.describe()
    assert len(latents) == 100
    for index in (0, 19, 20, 49, 50, 99):
        stored = torch.cat([z, flip])[index : index + 1]
        x, label, at = latents[index]
        assert torch.equal(x[None], (stored - mean) / std * 1.0)
        assert (label, at) == (index % 50 % 7, index)
    assert torch.equal(latents.rows(0, 100), (torch.cat([z, flip]) - mean) / std)
    raw = open_latents(tmp_path / "public", normalize=False, multiplier=0.18215)
    assert torch.equal(raw.rows(0, 50), z * 0.18215)


def test_fast_dit(tmp_path):
    x, y = draws(12, 4, 8, 8), torch.arange(12)
    for name in ("imagenet256_features", "imagenet256_labels"):
        (tmp_path / "public" / name).mkdir(parents=True)
    for i in range(12):
        np.save(f"{tmp_path}/public/imagenet256_features/{i}.npy", x[i : i + 1].numpy())
        np.save(f"{tmp_path}/public/imagenet256_labels/{i}.npy", y[i : i + 1].numpy())
    write_fast_dit(tmp_path / "ours", zip(x.split(5), y.split(5), strict=True))
    assert same_files(tmp_path / "ours", tmp_path / "public")
    latents = open_latents(tmp_path / "public")
    assert torch.equal(latents.rows(0, 12), x)
    assert [latents[i][1] for i in range(12)] == latents.labels.tolist() == y.tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["repa", "edm2"])
def test_repa_and_edm2(tmp_path, name, packed):
    moments = torch.cat([draws(6, 4, 8, 8), draws(6, 4, 8, 8, seed=1).abs()], 1)
    files, labels = {}, []
    for i, mean_std in enumerate(moments):
        buffer = io.BytesIO()
        np.save(buffer, mean_std)
        files[f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy"] = buffer.getvalue()
        labels.append([list(files)[-1], i // 2])
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    path = tmp_path / ("latents.zip" if packed else "vae-sd")
    write_mean_std(
        path, [(moments[:4], torch.tensor([0, 0, 1, 1])), (moments[4:], torch.tensor([2, 2]))]
    )
    if packed:
        with zipfile.ZipFile(path) as archive:
            assert {member: archive.read(member) for member in archive.namelist()} == files
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    else:
        found = [f for f in path.rglob("[!.]*") if f.is_file()]  # but for our checksums
        found = {str(f.relative_to(path)): f.read_bytes() for f in found}
        assert found == files
    latents = open_latents(path if packed else tmp_path, name, moments="mean")
    assert latents.labels.tolist() == [0, 0, 1, 1, 2, 2]
    mean = moments[:, :4]
    if name == "repa":
        assert torch.equal(latents.rows(0, 6), mean * 0.18215)
    else:  # training/encoders.py
        scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
        bias = np.float32(0) - np.float32([5.81, 3.25, 0.12, -2.15]) * scale
        scale, bias = (torch.tensor(value).reshape(1, -1, 1, 1) for value in (scale, bias))
        assert torch.equal(latents.rows(0, 6), mean * scale + bias)


def test_mar(tmp_path):
    moments, flipped = draws(6, 8, 4, 4), draws(6, 8, 4, 4, seed=1)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    for i, label in enumerate(labels.tolist()):
        folder = tmp_path / f"public/n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            folder / f"n{label:08d}_{i:08d}.JPEG.npz",
            moments=moments[i].numpy(),
            moments_flip=flipped[i].numpy(),
        )
    write_mar(tmp_path / "ours", [(moments, flipped, labels)])
    assert same_files(tmp_path / "ours", tmp_path / "public")
    order = labels.argsort(stable=True)  # a reader goes from folder to folder
    latents = open_latents(tmp_path / "public", moments="mean", flips="both")
    assert latents.labels.tolist() == labels[order].tolist() * 2
    means = torch.cat([moments[order], flipped[order]])[:, :4]
    assert torch.equal(latents.rows(0, 12), means * 0.2325)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("labelled", [False, True])
def test_plain(tmp_path, suffix, labelled):
    x, y = draws(9, 3, 5), torch.arange(9) % 4 if labelled else None
    path = tmp_path / f"some{suffix}"
    held = {"latents": x} if y is None else {"latents": x, "labels": y}
    if suffix == ".npy":
        np.save(path, x)
        if labelled:
            np.save(tmp_path / "some_labels.npy", y)
    elif suffix == ".npz":
        np.savez(path, **held)
    elif suffix == ".pt":
        torch.save(held, path)
    else:
        save_file(held, path)
    latents = open_latents(path)
    assert torch.equal(latents.rows(0, 9), x)
    assert latents[4][1] == (0 if labelled else -1)
    assert latents.bank().classes == ([0, 1, 2, 3] if labelled else [])
    assert torch.equal(latents.bank().take(torch.arange(9))[0], x[0].flatten().double())


@pytest.mark.parametrize("held", ["tensor", "tuple", "compressed"])
def test_other_plain_files(tmp_path, held):
    x, y = draws(9, 3, 5).half(), torch.arange(9)
    path = tmp_path / ("x.npz" if held == "compressed" else "x.pt")
    if held == "compressed":
        np.savez_compressed(path, features=x, y=y.int())
    else:
        torch.save(x if held == "tensor" else (x, y), path)
    latents = open_latents(path)
    assert torch.equal(latents.rows(2, 5), x[2:5].float())
    assert latents[3][1] == (-1 if held == "tensor" else 3)


# Draws and flips.


@pytest.mark.parametrize("name", ["repa", "edm2", "mar"])
def test_draws_have_the_mean_and_deviation_that_are_stored(tmp_path, name):
    std = torch.tensor([0.5, 2.0, 1.0, 3.0])[:, None, None].expand(4, 16, 16)
    spread = 2 * std.log() if name == "mar" else std
    moments = torch.cat([draws(1, 4, 16, 16)[0], spread])[None].repeat(40, 1, 1, 1)
    labels = torch.zeros(40, dtype=torch.int64)
    if name == "mar":
        write_mar(tmp_path, [(moments, moments, labels)])
    else:
        write_mean_std(tmp_path / "vae-sd", [(moments, labels)])
    latents = opened(tmp_path, name)
    mean = latents.fixed()[0][0]
    noise = (latents.rows(0, 40) - mean) / (latents.scaling(std) - latents.scaling(0 * std))
    assert noise.std((0, 2, 3)).numpy() == pytest.approx(1, abs=0.03)
    assert noise.mean((0, 2, 3)).numpy() == pytest.approx(0, abs=0.03)
    first = latents[3][0]
    assert torch.equal(first, latents[3][0])
    assert torch.equal(first, latents.rows(0, 8)[3])
    latents.set_epoch(1)
    assert not torch.equal(first, latents[3][0])
    assert not torch.equal(opened(tmp_path, name, seed=1)[3][0], first)
    assert torch.equal(opened(tmp_path, name, seed=0)[3][0], first)


def test_random_flips_take_each_of_the_two_half_of_the_time(tmp_path):
    x = draws(400, *SHAPE)
    write_latents(tmp_path, [(x, -x, torch.zeros(400, dtype=torch.int64))])
    latents = open_latents(tmp_path, normalize=False, multiplier=1.0, flips="random")
    taken = [torch.equal(latents[i][0], -x[i]) for i in range(400)]
    assert all(flip or torch.equal(latents[i][0], x[i]) for i, flip in enumerate(taken))
    assert 160 < sum(taken) < 240
    assert torch.equal(latents.rows(0, 400)[5], latents[5][0])
    latents.set_epoch(1)
    assert taken != [torch.equal(latents[i][0], -x[i]) for i in range(400)]
    assert len(latents.bank()) == 800


# Round trips.


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_what_is_converted_reads_as_before(tmp_path, first, second):
    source = make_latents(tmp_path / FORMATS[first], 12, SHAPE, 3, first, seed=4)
    before = opened(source, first, moments="mean")
    target = convert(before, tmp_path / "converted" / FORMATS[second], second, shard_size=5)
    after = opened(target, second, moments="mean")
    # MAR's rows are in the order of their classes.
    order = torch.arange(12) if "mar" not in (second,) else before.labels.argsort(stable=True)
    torch.testing.assert_close(after.rows(0, 12), before.rows(0, 12)[order], rtol=2e-6, atol=2e-6)
    assert after.labels.tolist() == before.labels[order].tolist()
    if before.has_flips and after.has_flips:
        both = [latents.with_options(flips="both").rows(12, 24) for latents in (before, after)]
        torch.testing.assert_close(both[1], both[0][order], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("second", FORMATS)
def test_narrow_types_round_and_no_more(tmp_path, second):
    source = make_latents(tmp_path / "x.npy", 12, SHAPE, 3, "plain")
    before = open_latents(source)
    target = convert(before, tmp_path / "to" / FORMATS[second], second, dtype=torch.float16)
    after = opened(target, second, moments="mean")
    assert after.dtype == torch.float16
    order = before.labels.argsort(stable=True) if second == "mar" else torch.arange(12)
    error = (after.rows(0, 12) - before.rows(0, 12)[order]).abs()
    assert 0 < error.max() < 4 * 2**-11 * 2  # the raw numbers of EDM2 are up to twice as far from 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shards_of_other_types(tmp_path, dtype):
    x = draws(10, *SHAPE).to(dtype)
    write_latents(tmp_path, [(x, torch.arange(10))], shard_size=4)
    latents = open_latents(tmp_path, normalize=False, multiplier=1.0)
    assert torch.equal(latents.rows(0, 10), x.float())
    assert torch.equal(latents[9][0], x[9].float())


# The writer.


def test_a_writer_that_was_stopped_goes_on(tmp_path):
    z, y = draws(50, *SHAPE), torch.arange(50)

    def batches(stop=None):
        for at in range(0, 50, 7):
            if at == stop:
                raise KeyboardInterrupt
            yield z[at : at + 7], y[at : at + 7]

    write_latents(tmp_path / "whole", batches(), shard_size=10)
    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "parts", batches(stop=35), shard_size=10)
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == [
        f"latents_rank00_shard00{i}.safetensors" for i in range(3)
    ]
    with pytest.raises(FileExistsError, match="resume=True"):
        write_latents(tmp_path / "parts", batches(), shard_size=10)
    write_latents(tmp_path / "parts", batches(), shard_size=10, resume=True)
    one, two = (open_latents(tmp_path / name) for name in ("whole", "parts"))
    torch.testing.assert_close(one.rows(0, 50), two.rows(0, 50), rtol=1e-6, atol=1e-6)
    assert one.labels.tolist() == two.labels.tolist() == y.tolist()


def test_a_writer_copies_each_row_once(tmp_path, monkeypatch):
    joined, copied = lightningdit._joined, []

    def join(parts):
        copied.extend(len(part["labels"]) for part in parts)
        return joined(parts)

    monkeypatch.setattr(lightningdit, "_joined", join)
    z, y = draws(60, *SHAPE), torch.arange(60)
    write_latents(tmp_path, [(z[:3], y[:3]), (z[3:], y[3:])], shard_size=7, dtype=torch.float64)
    assert sum(copied) == 60
    assert open_latents(tmp_path).labels.tolist() == y.tolist()


def test_ranks_write_beside_one_another(tmp_path):
    z = draws(20, *SHAPE)
    for rank in (0, 1):
        write_latents(tmp_path, [(z[rank::2], torch.arange(rank, 20, 2))], rank=rank, stats=False)
    write_stats(tmp_path)
    assert sorted(open_latents(tmp_path).labels.tolist()) == list(range(20))


def test_statistics_keep_their_digits():
    z = draws(100, 3, 5, 5) * torch.tensor([1.0, 1e-3, 10.0])[:, None, None] + 1e4
    seen = ChannelStatistics()
    for block in z.split(9):
        seen.update(block)
    wide = z.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(seen.mean, wide.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(seen.std(), wide.std(1), rtol=1e-9, atol=0)
    assert seen.overall() == pytest.approx((float(wide.mean()), float(wide.std(correction=0))))


# Opening, workers, banks.


def sparse_shards(folder, shards, rows, shape=(32, 16, 16)):
    """Shards that are as large as real ones, and empty on the disk."""
    folder.mkdir()
    size = 4 * rows * int(np.prod(shape))
    parts = {"labels": ("I64", [rows], 8 * rows)}
    parts |= {name: ("F32", [rows, *shape], size) for name in ("latents", "latents_flip")}
    header, end = {}, 0
    for name, (kind, dims, length) in parts.items():
        header[name] = {"dtype": kind, "shape": dims, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for shard in range(shards):
        with open(folder / f"latents_rank00_shard{shard:03d}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    stats = {"mean": torch.zeros(1, shape[0], 1, 1), "std": torch.ones(1, shape[0], 1, 1)}
    torch.save(stats, folder / "latents_stats.pt")
    return shards * end


def test_opening_reads_no_rows(tmp_path):
    size = sparse_shards(tmp_path / "imagenet", 128, 10_010)
    assert size > 80e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    latents = open_latents(tmp_path / "imagenet", flips="both")
    assert len(latents) == 2 * 1_281_280
    x, label, index = latents[2_000_000]
    assert x.shape == (32, 16, 16)
    assert (label, index) == (0, 2_000_000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert grown < 200_000


def test_one_file_larger_than_memory(tmp_path):
    sparse_shards(tmp_path / "large", 1, 4_000_000)
    latents = open_latents(tmp_path / "large")
    assert float(latents[3_999_999][0].abs().max()) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_workers_read_the_same(tmp_path, name):
    path = make_latents(tmp_path / FORMATS[name], 30, SHAPE, 3, name)
    latents = opened(path, name)
    latents[0]  # a handle is open before the workers are made
    expected = [latents[i][0] for i in range(30)]
    assert torch.equal(pickle.loads(pickle.dumps(latents))[7][0], expected[7])
    for workers, context in ((0, None), (2, "fork")):
        loader = DataLoader(latents, 8, num_workers=workers, multiprocessing_context=context)
        x, labels, index = (torch.cat(column) for column in zip(*loader, strict=True))
        assert torch.equal(x, torch.stack(expected))
        assert labels.tolist() == latents.labels.tolist()
        assert index.tolist() == list(range(30))


def test_workers_that_live_on_see_the_epoch(tmp_path):
    latents = opened(make_latents(tmp_path / "repa", 12, SHAPE, 3, "repa"), "repa")
    loader = DataLoader(latents, 4, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        latents.set_epoch(epoch)
        epochs.append(torch.cat([batch[0] for batch in loader]))
    assert torch.equal(epochs[1], latents.rows(0, 12))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    latents = opened(make_latents(tmp_path / "x.zip", 12, SHAPE, 3, "edm2"), "edm2")
    loader = DataLoader(latents, 4, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([batch[0] for batch in loader]), latents.rows(0, 12))


def test_banks(tmp_path):
    path = make_latents(tmp_path / "repa", 60, SHAPE, 3, "repa", duplicates=5)
    latents = open_latents(path, "repa")
    bank = latents.bank()
    assert bank.classes == [0, 1, 2]
    means = latents.fixed().rows(0, 60)
    assert torch.equal(bank.rows, means.flatten(1)[bank.index])
    place = bank.index.argsort()
    assert torch.equal(bank.rows[place], means.flatten(1))
    chosen = torch.tensor([3, 50, 7, 8])
    part = latents.bank(indices=chosen)
    assert torch.equal(part.rows, means[chosen[part.index]].flatten(1))
    stored = latents.bank(path=tmp_path / "bank", dtype=torch.bfloat16)
    assert stored.residency == "memory-mapped"
    assert stored.fingerprint == latents.bank(dtype=torch.bfloat16).fingerprint
    again = LatentBank.from_batches(latents.fixed().chunks(7), 60)
    assert again.fingerprint == bank.fingerprint


# Made latents.


def test_made_latents_are_what_they_are_said_to_be():
    shape, classes = (3, 16, 16), 4
    blocks = made_rows(4000, shape, classes, exponent=2.0, duplicates=7)
    x, flip, y = (torch.cat(column) for column in zip(*blocks, strict=True))
    assert torch.equal(flip, x.flip(-1))
    assert torch.equal(x[-7:], x[:7])
    assert len(x.flatten(1).unique(dim=0)) == 3993
    within = torch.stack([x[y == label].var(0).mean() for label in range(classes)])
    assert within.numpy() == pytest.approx(0.8, rel=0.02)
    power = torch.fft.fft2(x[y == 1] - x[y == 1].mean(0)).abs().square().mean((0, 1))
    for near, far in ((1, 2), (2, 4), (1, 6)):  # along both axes
        for first, second in ((power[0, near], power[0, far]), (power[near, 0], power[far, 0])):
            assert float(first / second) == pytest.approx((far / near) ** 2, rel=0.12)


def test_a_seed_is_the_same_in_every_format(tmp_path):
    made = {
        name: opened(make_latents(tmp_path / name / place, 15, SHAPE, 3, name, seed=2), name)
        for name, place in FORMATS.items()
    }
    x = made["plain"].rows(0, 15)
    torch.testing.assert_close(made["fast-dit"].rows(0, 15), x, rtol=0, atol=0)
    torch.testing.assert_close(made["repa"].fixed().rows(0, 15), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made["edm2"].fixed().rows(0, 15), x / 2, rtol=1e-6, atol=1e-6)
    other = make_latents(tmp_path / "other.npy", 15, SHAPE, 3, "plain", seed=3)
    assert not torch.equal(open_latents(other).rows(0, 15), x)


def test_code_of_the_page_on_latents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/latents.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert "LightningDiT latents in latents: 200 rows" in capsys.readouterr().out
    assert len(names["bank"]) == 400
    assert len(open_latents("shards")) == len(open_latents("pairs")) == 200


class Columns(Latents):
    """A format of its own: one `.csv`, a row of numbers and a label in each line."""

    name, looks_like, is_file = "columns", "one .csv", True

    def __init__(self, path, reading):
        super().__init__(path, reading)
        lines = torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2))
        self.held, self.shape, self.dtype = lines[:, :-1], (lines.shape[1] - 1,), lines.dtype
        self._opened(lines[:, -1].long())

    @classmethod
    def finds(cls, path):
        return path.suffix == ".csv"

    @classmethod
    def write(cls, path, blocks, how):
        rows = [torch.cat([x.flatten(1), y[:, None]], dim=1) for x, _, y in blocks]
        np.savetxt(path, torch.cat(rows).numpy(), delimiter=",")
        return path

    def _count(self):
        return len(self.held)

    def _read(self, row, flip):
        return self.held[row]

    def _parts(self):
        return "one table"


def test_a_format_is_one_class_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS_BY_NAME, "columns", Columns)
    made = make_latents(tmp_path / "x.csv", 30, (4, 1, 1), 3, "columns")
    latents = open_latents(made)
    assert latents.describe().startswith("columns latents in")
    latents.verify(full=True)
    assert latents.bank().classes == [0, 1, 2]
    same = open_latents(make_latents(tmp_path / "x.npy", 30, (4, 1, 1), 3, "plain"))
    torch.testing.assert_close(latents.rows(0, 30), same.rows(0, 30).flatten(1))
    again = open_latents(convert(same, tmp_path / "again.csv", "columns"))
    assert torch.equal(again.labels, latents.labels)
    with pytest.raises(ValueError, match=r"(?s)What is looked for.*columns: one .csv"):
        open_latents(tmp_path)
