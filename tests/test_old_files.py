"""Files that stagewise 0.1 wrote still open, and hold what they held.

`data/written_by_0.1.tar.xz` was written by that version and is not to be made again: banks in each
storage type, certificates, neighbours of a smoothing, latents in each format; `known.npz` and
`known.json` are what that version read from them.
"""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stagewise import Certificate, LatentBank, Smoothing, conventions, paths
from stagewise.latents import open_latents

ARCHIVE = Path(__file__).parent / "data" / "written_by_0.1.tar.xz"

DTYPES = ["float32", "float64", "bfloat16", "float16"]
BANKS = [f"bank_{dtype}_{kind}" for dtype in DTYPES for kind in ("plain", "labels")]
LATENTS = {
    "shards": "lightningdit",
    "pairs": "fast-dit",
    "repa": "repa",
    "edm2": "edm2",
    "edm2.zip": "edm2",
    "mar": "mar",
    **{f"plain.{suffix}": "plain" for suffix in ("safetensors", "npy", "npz", "pt")},
}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def known(old):
    with np.load(old / "known.npz") as held:
        return {name: torch.from_numpy(held[name]) for name in held.files}


@pytest.mark.parametrize("name", [*BANKS, "bank_bfloat16_given"])
def test_banks(old, known, name):
    bank = LatentBank.open(old / f"{name}.safetensors", verify="full")
    about = json.loads((old / "known.json").read_text())[name]
    assert str(bank.dtype) == f"torch.{about.pop('dtype')}"
    assert bank.shape == tuple(about.pop("shape"))
    for key, value in about.items():  # fingerprint, classes, radius, max_norm, std
        assert getattr(bank, key) == value
    for key in ("centre", "sq_norms", "offset"):
        assert torch.equal(getattr(bank, key), known[f"{name}.{key}"])
    assert torch.equal(bank.take(torch.arange(8)), known[f"{name}.samples"])
    assert torch.equal(bank.find(known["x"]), known[f"{name}.found"])
    assert (bank.index is None) == name.endswith("plain")
    if bank.index is not None:
        assert torch.equal(bank.index, known[f"{name}.index"])
        assert bank.labels_of(range(8)) == known["labels"][bank.index].tolist()
    again = old / f"again_{name}"
    bank.save(again)
    now, before = again.read_bytes(), (old / f"{name}.safetensors").read_bytes()
    length = 8 + int.from_bytes(before[:8], "little")
    header, kept = (json.loads(content[8:length]) for content in (now, before))
    header["__metadata__"].pop("stagewise_crc32")  # the one thing that is new
    assert header == kept
    assert now[:8] + now[length:] == before[:8] + before[length:]


@pytest.mark.parametrize("class_wise", [False, True])
def test_certificates(old, known, class_wise):
    bank = LatentBank.open(old / "bank_float32_labels.safetensors")
    made = Certificate.load(old / f"certificate_{class_wise}.safetensors", bank)
    for key in ("distances", "copies"):
        assert torch.equal(getattr(made, key), known[f"certificate_{class_wise}.{key}"])


def test_neighbours_of_a_smoothing(old, known, recwarn):
    bank = LatentBank.open(old / "bank_float32_labels.safetensors")
    before = (old / "smoothing.safetensors").read_bytes()
    smoothing = Smoothing.cached(old / "smoothing.safetensors", bank, 2)
    assert torch.equal(smoothing.index, known["smoothing.index"])
    assert (old / "smoothing.safetensors").read_bytes() == before  # not computed again
    assert not recwarn


@pytest.mark.parametrize("name", ["STAGEWISE", "DIFFUSERS"])
def test_pickled_conventions(name):
    now = getattr(conventions, name)
    old = pickle.dumps(now, 0).replace(b"stagewise.conventions", b"stagewise.paths")
    assert b"stagewise.paths\nConvention\n" in old
    assert pickle.loads(old) == now
    assert getattr(paths, name) is now


@pytest.mark.parametrize("name", LATENTS)
def test_latents(old, known, name):
    kind = LATENTS[name]
    latents = open_latents(old / name, kind)
    assert torch.equal(latents.rows(0, 6), known[f"{name}.sample"])
    assert torch.equal(latents.fixed().rows(0, 6), known[f"{name}.mean"])
    assert torch.equal(latents.labels, known[f"{name}.labels"])
    assert latents.has_flips == (kind in ("lightningdit", "mar"))
    if latents.has_flips:
        both = open_latents(old / name, kind, flips="both", moments="mean")
        assert torch.equal(both.rows(6, 12), known[f"{name}.flips"])
