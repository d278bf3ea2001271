"""Files that others wrote, or meddled with: read rightly, or refused in an error that names it."""

import json
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stagewise import LatentBank
from stagewise.latents import make_latents, open_latents
from stagewise.latents.lightningdit import LightningDiT
from stagewise.latents.mar import write_mar
from stagewise.latents.mean_std import write_mean_std

N, SHAPE = 12, (4, 2, 2)
LABELS = np.arange(N) % 3
UNSIGNED = ["u1", "u2", "u4", "u8", ">u2", ">i4", ">i8", "i8"]


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    return draws(N, *SHAPE).numpy()


# Headers of safetensors files.


def parts(path):
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header, data, length=None):
    """Without the checksums, which would notice any change; files of version 0.1 have none."""
    if isinstance(header, dict):
        (header.get("__metadata__") or {}).pop("stagewise_crc32", None)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(name, **changes):
    return lambda header: {**header, name: {**header[name], **changes}}


def moved(name, by):
    def change(header):
        offsets = [end + by for end in header[name]["data_offsets"]]
        return entry(name, data_offsets=offsets)(header)

    return change


def swapped(one, two):
    def change(header):
        ends = [header[name]["data_offsets"] for name in (one, two)]
        return entry(two, data_offsets=ends[0])(entry(one, data_offsets=ends[1])(header))

    return change


def without(name, key):
    return lambda header: {**header, name: {k: v for k, v in header[name].items() if k != key}}


def meta(**changes):
    return lambda header: {**header, "__metadata__": {**header["__metadata__"], **changes}}


def deep(count):
    return lambda header: b'{"a":' + b"[" * count + b"]" * count + b"}"


ANY = {
    "negative": lambda first: moved(first, -8),
    "overlapping": lambda first: moved(first, 4),
    "backwards": lambda first: entry(first, data_offsets=[96, 0]),
    "huge offsets": lambda first: entry(first, data_offsets=[0, 2**63]),
    "fractions": lambda first: entry(first, data_offsets=[0.5, 96.5]),
    "three ends": lambda first: entry(first, data_offsets=[0, 8, 16]),
    "no ends": lambda first: without(first, "data_offsets"),
    "no shape": lambda first: without(first, "shape"),
    "no type": lambda first: without(first, "dtype"),
    "shape of other numbers": lambda first: entry(first, shape=[7, 5]),
    "negative shape": lambda first: entry(first, shape=[-3, -4]),
    "endless shape": lambda first: entry(first, shape=[2**62, 2**62]),
    "text for a shape": lambda first: entry(first, shape="12"),
    "unknown type": lambda first: entry(first, dtype="X64"),
    "a list for a tensor": lambda first: lambda header: {**header, first: [1, 2]},
    "nothing for a tensor": lambda first: lambda header: {**header, first: None},
    "numbers for metadata": lambda first: lambda header: {**header, "__metadata__": {"a": 1}},
    "nested": lambda first: deep(100_000),
    "a list": lambda first: lambda header: b"[]",
    "nothing": lambda first: lambda header: b"",
    "not a number": lambda first: lambda header: b'{"a": NaN}',
    "no text": lambda first: lambda header: b"{\xff\xfe}",
}
LENGTHS = (0, 1, 7, 2**31, 2**63, 2**64 - 1)


@pytest.fixture
def bank(tmp_path, x):
    path = tmp_path / "x.bank"
    LatentBank(torch.from_numpy(x), torch.from_numpy(LABELS)).save(path)
    return path


@pytest.fixture
def latents(tmp_path, x):
    path = tmp_path / "x.safetensors"
    save_file({"latents": torch.from_numpy(x), "labels": torch.from_numpy(LABELS)}, path)
    return path


OPEN = {
    "bank": (LatentBank.open, "sq_norms"),
    "latents": (open_latents, "labels"),
    "shard": (
        lambda path: open_latents(path, "lightningdit", normalize=False, multiplier=1),
        "labels",
    ),
}


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("case", ANY)
def test_hostile_headers_end_in_one_error(bank, latents, kind, case):
    path = bank if kind == "bank" else latents
    read, first = OPEN[kind]
    header, data = parts(path)
    write(path, ANY[case](first)(header), data)
    with pytest.raises(ValueError, match=path.name) as error:
        read(path)
    assert "\n" not in str(error.value).split("got")[0]


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_of_any_length(bank, latents, kind, length):
    path = bank if kind == "bank" else latents
    header, data = parts(path)
    write(path, header, data, length)
    with pytest.raises(ValueError, match=path.name):
        OPEN[kind][0](path)


@pytest.mark.parametrize(
    "change",
    [
        meta(shape="[5, 2, 2]"),
        meta(shape="[2, 4, 2]"),  # as many numbers
        meta(shape="[-4, -2, 2]"),
        meta(shape="[4, 2, 2, 1]"),
        meta(shape="16"),
        meta(shape="[[[["),
        meta(shape="[" * 100_000),
        meta(shape='"42"'),
        meta(shape="null"),
        meta(fingerprint="0" * 32),
        meta(stagewise_bank="one"),
        lambda header: {**header, "__metadata__": {"stagewise_bank": "1"}},
        lambda header: {k: v for k, v in header.items() if k != "__metadata__"},
        entry("rows", shape=[2, 6, 16]),
        entry("rows", shape=[6, 32]),
        entry("rows", shape=[192]),
        entry("rows", dtype="I32"),
        entry("offset", dtype="I64"),
        entry("keys", dtype="F64"),
        swapped("offset", "centre"),
        swapped("sq_norms", "keys"),
        swapped("index", "keys"),
        swapped("index", "sq_norms"),
        swapped("starts", "stops"),
        swapped("classes", "stops"),
    ],
)
def test_a_bank_that_was_tampered_with(bank, change):
    header, data = parts(bank)
    names = {k: v for k, v in header.items() if k != "__metadata__"}
    assert change(header) != header
    write(bank, change(header), data)
    # Of two tensors with equal bytes nobody can tell which is which.
    if change(header).get("offset") == header.get("centre"):
        data = bytearray(data)
        first = names["centre"]["data_offsets"][0]
        data[first : first + 8] = struct.pack("<d", 3.0)
        write(bank, change(header), bytes(data))
    with pytest.raises(ValueError, match=r"x\.bank"):
        LatentBank.open(bank)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_byte_of_a_header_may_be_another(tmp_path_factory, data):
    """Nothing but a ValueError that names the file, or what was there; and never a crash."""
    folder = tmp_path_factory.mktemp("bytes")
    z = draws(N, *SHAPE)
    kind = data.draw(st.sampled_from(list(OPEN)))
    path = folder / "x.safetensors"
    if kind == "bank":
        LatentBank(z, torch.from_numpy(LABELS)).save(path)
    else:
        save_file({"latents": z, "labels": torch.from_numpy(LABELS)}, path)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    end = 8 + len(raw[8 : 8 + length].rstrip())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        raw[at] = data.draw(st.sampled_from(b'0123456789-.,:[]{}"FIU ') | st.integers(0, 255))
    path.write_bytes(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = OPEN[kind][0](path)
    except ValueError as error:
        assert "x.safetensors" in str(error)  # noqa: PT017 - it may be raised, and need not
        return
    assert len(opened) in (N, N // 2, N // 3, N // 4)


# What an array may be made of.


@pytest.mark.parametrize("kind", UNSIGNED)
@pytest.mark.parametrize("shape", [(N,), (N, 1)])
@pytest.mark.parametrize("suffix", ["npz", "packed npz", "npy", "safetensors", "pt", "shard"])
def test_whole_numbers_of_any_type_are_labels(tmp_path, x, kind, shape, suffix):
    y, name = LABELS.astype(kind).reshape(shape), "y" if len(shape) > 1 else "labels"
    native = torch.from_numpy(y.astype(y.dtype.newbyteorder("=")))
    path = tmp_path / f"x.{suffix.split()[-1]}"
    if suffix == "npz":
        np.savez(path, latents=x, **{name: y})
    elif suffix == "packed npz":
        np.savez_compressed(path, latents=x, **{name: y})
    elif suffix == "npy":
        np.save(path, x)
        np.save(tmp_path / "x_labels.npy", y)
    elif suffix == "pt":
        torch.save({"latents": torch.from_numpy(x), name: native}, path)
    elif suffix == "shard":
        path = path.with_suffix(".safetensors")
        z = torch.from_numpy(x)
        save_file({"latents": z, "latents_flip": z.clone(), "labels": native}, path)
    else:
        save_file({"latents": torch.from_numpy(x), name: native}, path)
    options = {"normalize": False, "multiplier": 1.0} if suffix == "shard" else {}
    latents = open_latents(path, **options)
    assert isinstance(latents, LightningDiT) == (suffix == "shard")
    assert latents.labels.tolist() == LABELS.tolist()
    assert latents.labels.dtype == torch.int64
    assert latents[4][1] == LABELS[4]


@pytest.mark.parametrize("kind", [">f4", ">f8", ">f2", "f2", "f8"])
@pytest.mark.parametrize("packed", [None, False, True])
def test_numbers_in_any_order_of_bytes(tmp_path, x, kind, packed):
    z = x.astype(kind)
    if packed is None:
        path = tmp_path / "x.npy"
        np.save(path, z)
    else:
        path = tmp_path / "x.npz"
        (np.savez_compressed if packed else np.savez)(path, latents=z)
    latents = open_latents(path)
    torch.testing.assert_close(latents.rows(0, N), torch.from_numpy(z.astype("f4")))
    torch.testing.assert_close(latents[5][0], torch.from_numpy(z[5].astype("f4")))
    assert len(latents.bank()) == N


def test_other_formats_in_the_order_of_other_processors(tmp_path):
    pairs = make_latents(tmp_path / "pairs", 4, SHAPE, 3, "fast-dit")
    means = make_latents(tmp_path / "means", 4, SHAPE, 3, "repa") / "vae-sd"
    mar = make_latents(tmp_path / "mar", 4, SHAPE, 3, "mar")
    for path, name in ((pairs, None), (means, "repa"), (mar, None)):
        before = open_latents(path, name, moments="mean")
        x, labels = before.rows(0, 4), before.labels
        for file in [*path.rglob("*.npy"), *path.rglob("*.npz")]:
            held = np.load(file)
            if file.suffix == ".npy":
                np.save(file, held.astype(held.dtype.newbyteorder(">")))
            else:
                np.savez(file, **{k: v.astype(v.dtype.newbyteorder(">")) for k, v in held.items()})
        after = open_latents(path, name, moments="mean")
        torch.testing.assert_close(after.rows(0, 4), x)
        assert torch.equal(after.labels, labels)


def test_what_is_not_needed_is_left_alone(tmp_path, x):
    more = {
        "captions": np.array(["a"] * N),
        "bytes": np.array([b"a"] * N),
        "day": np.array(["2020-01-01"] * N, "M8[D]"),
        "tokens": np.zeros((N, 77), "i4"),
        "complex": np.zeros((N,), "c8"),
        "objects": np.array([None] * N),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", latents=x, labels=LABELS, **more)
        latents = open_latents(tmp_path / "x.npz")
        assert latents.labels.tolist() == LABELS.tolist()
        assert len(latents.bank()) == N
    tensors = {"latents": torch.from_numpy(x), "labels": torch.from_numpy(LABELS)}
    save_file(
        tensors | {"small": torch.zeros(3, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors"
    )
    assert open_latents(tmp_path / "x.safetensors").labels is not None
    odd = {"sparse": torch.eye(N).to_sparse(), "note": "text", 3: torch.zeros(2)}
    torch.save(tensors | odd, tmp_path / "x.pt")
    assert len(open_latents(tmp_path / "x.pt").bank()) == N


@pytest.mark.parametrize("name", ["latents", "labels"])
def test_what_is_needed_is_named(tmp_path, x, name):
    np.savez(tmp_path / "x.npz", **{"latents": x, "labels": LABELS, name: np.array(["a"] * N)})
    with pytest.raises(ValueError, match=rf"{name}.npy in .*x.npz is no whole .npy.*<U1"):
        open_latents(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["labels", "y"])
@pytest.mark.parametrize("kind", ["i8", "u1", "bool", "f4"])
def test_one_hot_labels_are_named_for_what_they_are(tmp_path, x, kind, name):
    y = np.eye(3, dtype=kind)[LABELS]
    np.savez(tmp_path / "x.npz", **{"latents": x, name: y})
    save_file(
        {"latents": torch.from_numpy(x), name: torch.from_numpy(y)}, tmp_path / "x.safetensors"
    )
    for file in ("x.npz", "x.safetensors"):
        message = (
            rf"{name}` as 12 integers.*{file}, got one-hot rows, \(12, 3\).*labels.argmax\(1\)"
        )
        with pytest.raises(ValueError, match=message):
            open_latents(tmp_path / file)


def test_one_hot_labels_of_other_formats(tmp_path, x):
    z, y = torch.from_numpy(x), torch.eye(3)[torch.from_numpy(LABELS)].long()
    save_file({"latents": z, "latents_flip": z.clone(), "labels": y}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"got one-hot rows, \(12, 3\)"):
        open_latents(tmp_path / "x.safetensors", normalize=False, multiplier=1.0)
    pairs = make_latents(tmp_path / "pairs", 4, SHAPE, 3, "fast-dit")
    label = pairs / "imagenet256_labels" / "2.npy"
    np.save(label, np.array([[2]], "u2"))
    assert open_latents(pairs).labels[2] == 2
    np.save(label, np.array([[0, 0, 1]]))
    with pytest.raises(ValueError, match=r"2\.npy, got one-hot rows, \(1, 3\)"):
        _ = open_latents(pairs).labels
    np.save(label, np.array([0.5]))
    with pytest.raises(ValueError, match=r"2\.npy, got torch.float64"):
        _ = open_latents(pairs).labels


@pytest.mark.parametrize(
    "y", [np.arange(N) + 0.5, np.full(N, np.nan), np.zeros((N, 4), "i8"), np.zeros((N, 1, 1), "i8")]
)
def test_labels_that_are_no_class_numbers(tmp_path, x, y):
    np.savez(tmp_path / "x.npz", latents=x, labels=y)
    with pytest.raises(ValueError, match=r"`labels` as 12 integers, .*x\.npz, got torch"):
        open_latents(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", latents=x, labels=LABELS.astype("f4"))
    assert open_latents(tmp_path / "x.npz").labels.tolist() == LABELS.tolist()


def test_two_that_may_be_labels_are_not_passed_over(tmp_path, x):
    np.savez(tmp_path / "x.npz", latents=x, y=LABELS, number=np.arange(N))
    with pytest.warns(UserWarning, match=r"without labels: .*\['y', 'number'\].*`labels`"):
        assert open_latents(tmp_path / "x.npz").labels is None


# Folders and shapes.


def test_folders_without_rows_are_no_classes(tmp_path):
    z = draws(6, 8, 2, 2)
    folder = write_mar(tmp_path / "mar", [(z, z, torch.arange(6) % 3)])
    for name in (".ipynb_checkpoints", "zz", ".cache"):
        (folder / name).mkdir()
    (folder / ".ipynb_checkpoints" / "n.npz").write_bytes(b"")
    (folder / "zz" / "notes.txt").write_text("none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the order of the classes is what it was
        latents = open_latents(folder)
    assert latents.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert "6 files in 3 folders" in latents.describe()
    (folder / "n00000001b").mkdir()
    with pytest.warns(UserWarning, match=r"without .npz files, which are no classes: n00000001b"):
        assert open_latents(folder).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_means_beside_a_hidden_folder(tmp_path):
    path = write_mean_std(tmp_path / "vae-sd", [(draws(4, 8, 2, 2), torch.arange(4))])
    (path / ".ipynb_checkpoints").mkdir()
    np.save(path / ".ipynb_checkpoints" / "copy.npy", draws(8, 2, 2).numpy())
    assert open_latents(path, "repa").labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt", "safetensors"])
@pytest.mark.parametrize("shape", [(N, 0, 4), (N, 4, 0), (0, 4)])
def test_no_numbers(tmp_path, suffix, shape):
    path, z = tmp_path / f"x.{suffix}", torch.zeros(shape)
    if suffix == "npz":
        np.savez(path, latents=z.numpy())
    elif suffix == "npy":
        np.save(path, z.numpy())
    elif suffix == "pt":
        torch.save(z, path)
    else:
        save_file({"latents": z}, path)
    with pytest.raises(ValueError, match=rf"x\.{suffix}.*(got shape|no rows)"):
        open_latents(path)


def test_no_numbers_in_other_formats(tmp_path):
    z = torch.zeros(4, 8, 0, 2)
    mar = write_mar(tmp_path / "mar", [(z, z, torch.arange(4))])
    means = write_mean_std(tmp_path / "vae-sd", [(z, None)])
    shard = tmp_path / "x.safetensors"
    save_file({"latents": z, "latents_flip": z.clone(), "labels": torch.arange(4)}, shard)
    with pytest.raises(ValueError, match=r"mar, got shape \(4, 0, 2\)"):
        open_latents(mar)
    with pytest.raises(ValueError, match=r"vae-sd, got shape \(4, 0, 2\)"):
        open_latents(means, "edm2")
    with pytest.raises(ValueError, match=r"x.safetensors, got shape \(8, 0, 2\)"):
        open_latents(shard, normalize=False, multiplier=1.0)


@pytest.mark.parametrize("kind", ["sparse", "csr", "quantised", "meta"])
def test_tensors_without_rows(tmp_path, kind):
    x = draws(N, 16)
    odd = {
        "sparse": x.to_sparse(),
        "csr": x.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "meta": x.to("meta"),
    }[kind]
    for held in (odd, {"latents": odd}):
        torch.save(held, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"Expected one floating-point array .*x\.pt"):
            open_latents(tmp_path / "x.pt")
    torch.save({"latents": x, "labels": torch.arange(N).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt, got torch.sparse|x\.pt, got sparse.*to_dense"):
        open_latents(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "shape", ["(-3, 4)", "(2**60, 4)", "(9" + "9" * 30 + ", 4)", "(3, 4.0)", "((((", "None"]
)
def test_hostile_headers_of_arrays(tmp_path, shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(48)
    (tmp_path / "x.npy").write_bytes(raw)
    with pytest.raises(ValueError, match=r"x\.npy"):
        open_latents(tmp_path / "x.npy")
    pairs = make_latents(tmp_path / "pairs", 4, SHAPE, 3, "fast-dit")
    (pairs / "imagenet256_labels" / "2.npy").write_bytes(raw)
    with pytest.raises(ValueError, match=r"2\.npy"):
        _ = open_latents(pairs).labels
