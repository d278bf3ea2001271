"""Latents that cannot be used are refused with the file and the cure, before any training."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stagewise.latents import convert, make_latents, open_latents, write_latents, write_stats
from stagewise.latents.fast_dit import write_fast_dit
from stagewise.latents.mar import write_mar
from stagewise.latents.mean_std import write_mean_std

SHAPE = (4, 4, 4)


def draws(n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shards(tmp_path):
    """A folder with three shards of 10 rows."""
    return make_latents(tmp_path / "shards", 30, SHAPE, 3, shard_size=10)


def shard(folder, number):
    return folder / f"latents_rank00_shard{number:03d}.safetensors"


def cut(file, share=0.5):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


# Shards.


def test_truncated_shard(shards):
    cut(shard(shards, 1))
    with pytest.raises(ValueError, match=r"shard001.safetensors is truncated: \d+ bytes") as error:
        open_latents(shards)
    assert 'on_error="skip"' in str(error.value)
    latents = open_latents(shards, on_error="skip")
    assert len(latents) == 20
    assert "1 left out: latents_rank00_shard001" in latents.describe()
    whole = make_latents(shards.parent / "whole", 30, SHAPE, 3, shard_size=10)
    torch.testing.assert_close(latents.rows(10, 20), open_latents(whole).rows(20, 30))
    with pytest.raises(ValueError, match="shard001.safetensors is truncated"):
        latents.verify()


@pytest.mark.parametrize("data", [b"", b"not a shard at all", b"\x10" + 7 * b"\0" + b"{}"])
def test_damaged_shard(shards, data):
    shard(shards, 0).write_bytes(data)
    with pytest.raises(ValueError, match="shard000.safetensors is (no|damaged|truncated)|Expected"):
        open_latents(shards)
    assert len(open_latents(shards, on_error="skip")) == 20


def test_missing_shard(shards):
    shard(shards, 1).unlink()
    with pytest.raises(ValueError, match="shard001.safetensors is missing"):
        open_latents(shards)
    assert len(open_latents(shards, on_error="skip")) == 20


def test_no_shard_is_left(shards):
    for number in range(3):
        cut(shard(shards, number), 0.1)
    with pytest.raises(ValueError, match="got 0 of 3"):
        open_latents(shards, on_error="skip")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_mixed_shapes_among_shards(shards, on_error):
    held = load_file(shard(shards, 2))
    wide = {k: v if k == "labels" else v.repeat(1, 2, 1, 1) for k, v in held.items()}
    save_file(wide, shard(shards, 2))
    with pytest.raises(ValueError, match=r"shape \(4, 4, 4\) in .*shard002.*got \(8, 4, 4\)"):
        open_latents(shards, on_error=on_error)


def test_labels_of_another_length(shards):
    held = load_file(shard(shards, 2))
    save_file(held | {"labels": held["labels"][:7]}, shard(shards, 2))
    with pytest.raises(ValueError, match=r"`labels` of shape \(10,\) in .*shard002"):
        open_latents(shards)


@pytest.mark.parametrize(("label", "limit"), [(-1, None), (3, 3), (-1, 3)])
def test_labels_out_of_range(shards, label, limit):
    held = load_file(shard(shards, 1))
    held["labels"][4] = label
    save_file(held, shard(shards, 1))
    with pytest.raises(ValueError, match=f"Expected labels .*got {label} in row 14"):
        open_latents(shards, num_classes=limit)


def test_missing_statistics(shards):
    (shards / "latents_stats.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"write_stats\(folder\).*multiplier=0.18215"):
        open_latents(shards)
    with pytest.raises(ValueError, match=r"Expected `multiplier` with normalize=False.*0\.18215"):
        open_latents(shards, normalize=False)
    write_stats(shards)
    assert len(open_latents(shards)) == 30


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"mean": torch.zeros(1, 8, 1, 1), "std": torch.ones(1, 8, 1, 1)}, r"\(1, 4, 1, 1\) in"),
        ({"mean": torch.zeros(1, 4, 1, 1), "std": torch.zeros(1, 4, 1, 1)}, "above 0"),
        ({"mean": torch.zeros(1, 4, 1, 1)}, "Expected {'mean': ..., 'std': ...}"),
        (torch.zeros(4), "got Tensor"),
    ],
)
def test_wrong_statistics(shards, stats, message):
    torch.save(stats, shards / "latents_stats.pt")
    with pytest.raises(ValueError, match=message):
        open_latents(shards)


# Scale: what LightningDiT's issues 22 and 34 are about.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": False, "multiplier": 1.0}, "normalize=True for VA-VAE, multiplier=0.18215"),
        ({"multiplier": 0.18215}, r"do not fit latents_stats.pt"),
        ({"normalize": False, "multiplier": 0.01}, "scaled before they were written"),
    ],
)
def test_shards_of_another_scale(shards, options, message):
    latents = open_latents(shards, **options)
    for check in (latents.check_scale, latents.verify, latents.bank):
        with pytest.raises(ValueError, match=message):
            check()
    size = float(latents.rows(0, 30).square().mean().sqrt())
    assert len(open_latents(shards, **options, expected_std=size).bank()) == 30


def test_shards_that_are_normalised_twice(tmp_path):
    z = 4 * draws(40, *SHAPE) + 2
    stats = {"mean": torch.full((1, 4, 1, 1), 2.0), "std": torch.full((1, 4, 1, 1), 4.0)}
    write_latents(tmp_path, [((z - 2) / 4, torch.arange(40))], stats=False)
    torch.save(stats, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match="normalised before they were written"):
        open_latents(tmp_path).bank()
    open_latents(tmp_path, normalize=False, multiplier=1.0).verify(full=True)


@pytest.mark.parametrize("scale", [1 / 0.18215, 0.18215])
def test_plain_files_and_pairs_of_another_scale(tmp_path, scale):
    np.save(tmp_path / "x.npy", (draws(40, *SHAPE) * scale).numpy())
    latents = open_latents(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="scaled"):
        latents.bank()
    open_latents(tmp_path / "x.npy", multiplier=1 / scale).bank()
    source = open_latents(tmp_path / "x.npy", multiplier=scale)
    labels = torch.zeros(40, dtype=torch.int64)
    np.save(tmp_path / "x_labels.npy", labels)
    source = open_latents(tmp_path / "x.npy")
    pairs = convert(source, tmp_path / "pairs", "fast-dit")
    with pytest.raises(ValueError, match="scaled"):
        open_latents(pairs).verify()


def test_repa_taken_for_edm2_and_the_reverse(tmp_path):
    repa = make_latents(tmp_path / "repa", 20, SHAPE, 3, "repa") / "vae-sd"
    edm2 = make_latents(tmp_path / "edm2", 20, SHAPE, 3, "edm2")
    for path in (repa, edm2):
        with pytest.raises(ValueError, match=r'Say which: format="repa".*or format="edm2"'):
            open_latents(path)
    with pytest.raises(ValueError, match='another scale: format="repa"'):
        open_latents(repa, "edm2").bank()
    open_latents(edm2, "edm2").bank()


# Pairs, means and moments: a file for each image.


def test_pairs(tmp_path):
    path = make_latents(tmp_path / "pairs", 12, SHAPE, 3, "fast-dit")
    features, labels = path / "imagenet256_features", path / "imagenet256_labels"
    cut(features / "3.npy")
    (labels / "5.npy").unlink()
    with pytest.raises(ValueError, match="5.npy has no partner in imagenet256_labels"):
        open_latents(path)
    np.save(labels / "5.npy", np.array([1]))
    with pytest.raises(ValueError, match="features/3.npy is truncated"):
        open_latents(path)
    latents = open_latents(path, on_error="skip")
    assert len(latents) == 11
    assert latents.skipped[0].startswith("imagenet256_features/3.npy")
    np.save(features / "3.npy", np.zeros((1, 8, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4, 4\) in .*3.npy.*got \(1, 8, 4, 4\)"):
        open_latents(path, on_error="skip")
    np.save(features / "3.npy", np.zeros((1, 4, 4, 4), np.float32))
    np.save(labels / "7.npy", np.array([-4]))
    latents = open_latents(path)
    for read in (lambda: latents[7], lambda: latents.labels, latents.bank):
        with pytest.raises(ValueError, match="got -4 in row"):
            read()


def test_pairs_without_labels(tmp_path):
    path = make_latents(tmp_path / "pairs", 4, SHAPE, 3, "fast-dit")
    (path / "imagenet256_labels").rename(path / "elsewhere")
    with pytest.raises(ValueError, match="imagenet256_labels, which is no folder"):
        open_latents(path)


@pytest.mark.parametrize("packed", [False, True])
def test_means(tmp_path, packed):
    path = tmp_path / ("x.zip" if packed else "vae-sd")
    moments = draws(6, 8, 4, 4)
    write_mean_std(path, [(moments[:3], torch.arange(3)), (moments[3:, :6], torch.arange(3))])
    with pytest.raises(ValueError, match=r"Expected shape \((8|6), 4, 4\) in 00000/img-mean-std"):
        open_latents(path, "repa", on_error="skip")


def test_means_and_their_index(tmp_path):
    path = make_latents(tmp_path / "x", 6, SHAPE, 3, "repa") / "vae-sd"
    index = json.loads((path / "dataset.json").read_text())
    name = index["labels"][2][0]

    def write(listed):
        (path / "dataset.json").write_text(json.dumps({"labels": listed}))

    write(index["labels"][:-1])
    with pytest.raises(ValueError, match="Expected a label for each file.*00000005.npy"):
        open_latents(path, "repa")
    write([[name, [0, 1]] for name, _ in index["labels"]])
    with pytest.raises(ValueError, match="Expected an integer for each file"):
        open_latents(path, "repa")
    (path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json of .* is damaged"):
        open_latents(path, "repa")
    write(None)
    assert open_latents(path, "repa")[0][1] == -1
    write(index["labels"])
    cut(path / name)
    with pytest.raises(ValueError, match="00000002.npy is truncated"):
        open_latents(path, "repa")
    assert len(open_latents(path, "repa", on_error="skip")) == 5
    (path / name).unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        open_latents(path, "repa")
    latents = open_latents(path, "repa", on_error="skip")
    assert (len(latents), len(latents.skipped)) == (5, 1)


def test_zips(tmp_path):
    path = make_latents(tmp_path / "x.zip", 6, SHAPE, 3, "edm2")
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(path) as a, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    with pytest.raises(ValueError, match=r"stored \(uncompressed\) zip.*zip -0"):
        open_latents(packed, "edm2")
    data = bytearray(path.read_bytes())
    place = data.index(b"img-mean-std-00000003.npy") + 200
    data[place : place + 4] = b"\xff\xff\xff\x7f"  # a number becomes NaN
    path.write_bytes(data)
    latents = open_latents(path, "edm2")
    latents.verify()
    with pytest.raises(ValueError, match="checksum"):
        latents.verify(full=True)
    cut(path)
    with pytest.raises(ValueError, match="x.zip is no whole zip"):
        open_latents(path, "edm2")


def test_moments(tmp_path):
    path = make_latents(tmp_path / "mar", 6, SHAPE, 3, "mar")
    files = sorted(path.rglob("*.npz"))
    cut(files[1])
    with pytest.raises(ValueError, match=f"{files[1].name} is no whole"):
        open_latents(path)
    assert len(open_latents(path, on_error="skip")) == 5
    np.savez(files[1], moments=np.zeros((8, 4, 4), np.float32))
    with pytest.raises(ValueError, match="moments_flip"):
        open_latents(path)
    wide = np.zeros((16, 4, 4), np.float32)
    np.savez(files[1], moments=wide, moments_flip=wide)
    with pytest.raises(ValueError, match=r"shape \(8, 4, 4\) in .*got \(16, 4, 4\)"):
        open_latents(path, on_error="skip")


# Plain files, and what is nothing of all this.


def test_plain_files(tmp_path):
    np.save(tmp_path / "x.npy", draws(20, 5))
    cut(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="x.npy is truncated"):
        open_latents(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", latents=draws(20, 5))
    cut(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npz is no whole .npz"):
        open_latents(tmp_path / "x.npz")
    save_file({"a": draws(20, 5), "b": draws(20, 5)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"one floating-point array.*'a': 'torch.float32 \(20, 5\)"
    ):
        open_latents(tmp_path / "x.safetensors")
    for labels, shape in ((torch.arange(19), "19,"), (torch.tensor(3), "")):
        torch.save({"latents": draws(20, 5), "labels": labels}, tmp_path / "x.pt")
        message = rf"Expected `labels` as 20 integers.* got torch.int64 \({shape}\)"
        with pytest.raises(ValueError, match=message):
            open_latents(tmp_path / "x.pt")
    np.save(tmp_path / "pictures.npy", np.zeros((20, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="one floating-point array"):
        open_latents(tmp_path / "pictures.npy")


def test_paths_without_latents(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such path"):
        open_latents(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    endings = r"(?s)notes.txt, got a file.*\.safetensors, \.npy, \.npz or \.pt"
    with pytest.raises(ValueError, match=endings):
        open_latents(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"notes.txt.*What is looked for") as error:
        open_latents(tmp_path)
    for name in ("LightningDiT", "fast-DiT", "REPA", "EDM2", "MAR", "plain"):
        assert name in str(error.value)


def test_options_that_do_not_fit(shards, tmp_path):
    plain = make_latents(tmp_path / "x.npy", 4, SHAPE, 2, "plain")
    with pytest.raises(ValueError, match="latents without flips"):
        open_latents(plain, flips="random")
    with pytest.raises(ValueError, match="normalize=False is only for LightningDiT"):
        open_latents(plain, normalize=False)
    with pytest.raises(ValueError, match="Expected `flips` among"):
        open_latents(plain, flips="sometimes")
    with pytest.raises(ValueError, match="Expected a folder for mar"):
        open_latents(plain, "mar")
    with pytest.raises(ValueError, match="Expected no `multiplier` for repa"):
        open_latents(shards, "repa", multiplier=2.0)
    np.save(tmp_path / "y.npy", draws(4, *SHAPE))
    with pytest.raises(ValueError, match="Expected labels for fast-dit, got none"):
        convert(tmp_path / "y.npy", tmp_path / "y", "fast-dit")
    latents = open_latents(plain)
    for index in (4, -5):
        with pytest.raises(IndexError, match="below 4"):
            latents[index]
    with pytest.raises(IndexError, match="within 0 and 4"):
        latents.rows(2, 5)


def test_rows_that_are_not_finite_are_named(shards):
    held = load_file(shard(shards, 1))
    held["latents"][2, 0, 0, 0] = torch.nan
    held["latents_flip"][5, 0, 0, 0] = torch.inf
    save_file(held, shard(shards, 1))
    latents = open_latents(shards)
    with pytest.raises(ValueError, match=r"2 problems.*row 12 has NaN.*row 15 \(flip\) has NaN"):
        latents.verify(full=True)


def test_writers_refuse(tmp_path, shards):
    with pytest.raises(ValueError, match=r"shape \(4, 4, 4\) as in the batches before"):
        write_latents(
            tmp_path / "a",
            [(draws(4, *SHAPE), torch.arange(4)), (draws(4, 4, 4, 8), torch.arange(4))],
        )
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="Expected batches"):
        write_latents(tmp_path / "a", [draws(4, *SHAPE)])
    with pytest.raises(ValueError, match="got none"):
        write_latents(tmp_path / "a", [])
    with pytest.raises(FileExistsError, match="new or empty place"):
        make_latents(shards, 3, SHAPE)
    for kind in ("lightningdit", "fast-dit", "repa", "mar"):
        with pytest.raises(ValueError, match="Expected `duplicates`"):
            make_latents(tmp_path / "b", 3, SHAPE, format=kind, duplicates=3)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("write", [write_fast_dit, write_mean_std, write_mar])
def test_writers_of_a_file_for_each_row_refuse(tmp_path, write):
    z, twice = draws(5, 8, 2, 2), write is write_mar

    def batch(labels, flips=5):
        return (z, z[:flips], labels) if twice else (z, labels)

    wrong = [(batch(torch.arange(3)), "5 and 3"), (batch(torch.arange(9)), "5 and 9")]
    wrong += [(batch(torch.arange(5), 2), "5 and 2 and 5")] * twice
    for other, lengths in wrong:
        with pytest.raises(ValueError, match=f"one length.* {lengths} in the batch from row 5 on"):
            write(tmp_path / "x", [batch(torch.arange(5)), other])
    with pytest.raises(ValueError, match="got none"):
        write(tmp_path / "empty", [])
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["vae-sd", "x.zip"])
def test_labels_of_some_rows_are_refused(tmp_path, name):
    z = draws(5, 8, 2, 2)
    batches = [(z, None), (z, torch.arange(5))]
    for some, found in ((batches, "labels"), (batches[::-1], "none")):
        with pytest.raises(ValueError, match=f"all rows or for none, got {found} from row 5 on"):
            write_mean_std(tmp_path / name, some)
