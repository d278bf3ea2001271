"""Files that were cut or flipped: an error that names the file, or what was written; never more."""

import errno
import json
import os
import pickle
import re
import stat
import time
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stagewise import Certificate, LatentBank, Smoothing, files
from stagewise.files import Problem, replace_file
from stagewise.latents import make_latents, open_latents
from stagewise.latents.array_file import ArrayFile
from stagewise.latents.base import Writing
from stagewise.latents.mean_std import write_mean_std
from stagewise.tensor_files import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Not checked", "ignore:Detected pickle protocol")

N, SHAPE = 6, (4, 2, 2)
X = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 3


# -- every kind of file: made in a folder, and what is read from it ---------------------------


def bank_values(path, **options):
    bank = LatentBank.open(path, **options)
    held = [bank.rows, bank.offset, bank.centre, bank.sq_norms, bank.row_keys(), bank.index]
    held += [None if bank.pairs is None else bank.pairs.mask, bank.conditions]
    return [bank.shape, bank.class_ends, bank.fingerprint, bank.radius, held]


def saved_bank(folder, **given):
    LatentBank(X, LABELS, **given).save(folder / "x.bank")
    return folder / "x.bank"


def old_bank(folder):
    """As version 0.1 wrote it, without checksums."""
    path = saved_bank(folder)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    del header["__metadata__"]["stagewise_crc32"]
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(length - 8) + data[length:])
    return path


def computed(folder, kind):
    LatentBank(X, LABELS).save(folder / "x.bank")
    bank, path = LatentBank.open(folder / "x.bank"), folder / "made.safetensors"
    kind(bank, path)
    return path


def certificate_values(path, **options):
    found = Certificate.load(path, LatentBank.open(path.with_name("x.bank")))
    return [found.distances, found.copies, found.class_wise]


def smoothing_values(path, **options):
    bank = LatentBank.open(path.with_name("x.bank"))
    return [Smoothing.cached(path, bank, 2, progress=False).index]


def latents_values(root, format, **options):  # noqa: A002
    def read(path, verify="quick"):
        folder = next(p for p in (path, *path.parents) if p.name == root)
        latents = open_latents(folder, format, moments="mean", **options)
        latents.verify(full=verify == "full")
        latents = latents.with_options(flips="both" if latents.has_flips else "none")
        return [latents.rows(0, len(latents)), latents.labels, latents.shape]

    return read


def made(root, format, file, **how):  # noqa: A002
    def make(folder):
        path = make_latents(folder / root, N, SHAPE, 3, format, shard_size=4, **how)
        return path / file if file else path

    return make


def foreign(root, save):
    """A file as other projects write it."""

    def make(folder):
        save({"latents": X, "labels": LABELS}, folder / root)
        return folder / root

    return make


def packed(held, path):
    np.savez_compressed(path, **{name: value.numpy() for name, value in held.items()})


RAW = {"normalize": False, "multiplier": 1.0, "expected_std": 1.0}
KINDS = {
    # name: make, read, whether all that is in it has a checksum
    "bank": (saved_bank, bank_values, True),
    "bank with conditions": (
        lambda folder: saved_bank(folder, conditions=X[:, 0]),
        bank_values,
        True,
    ),
    "bank with masks": (
        lambda folder: saved_bank(folder, mask=torch.arange(N) % 2 + 3),
        bank_values,
        True,
    ),
    "bank of 0.1": (old_bank, bank_values, False),
    "certificate": (
        lambda folder: computed(
            folder, lambda bank, path: Certificate.cached(path, bank, progress=False)
        ),
        certificate_values,
        True,
    ),
    "smoothing": (
        lambda folder: computed(
            folder, lambda bank, path: Smoothing.cached(path, bank, 2, progress=False)
        ),
        smoothing_values,
        True,
    ),
    "shard": (
        made("x", "lightningdit", "latents_rank00_shard001.safetensors"),
        latents_values("x", None),
        True,
    ),
    "statistics": (made("x", "lightningdit", "latents_stats.pt"), latents_values("x", None), True),
    "pair": (made("x", "fast-dit", "imagenet256_features/2.npy"), latents_values("x", None), True),
    "label": (made("x", "fast-dit", "imagenet256_labels/2.npy"), latents_values("x", None), True),
    "mean": (
        made("x", "repa", "vae-sd/00000/img-mean-std-00000002.npy"),
        latents_values("x", "repa"),
        True,
    ),
    "index": (made("x", "repa", "vae-sd/dataset.json"), latents_values("x", "repa"), True),
    "zip": (made("x.zip", "edm2", None), latents_values("x.zip", "edm2"), True),
    "mar": (
        made("x", "mar", "n00000001/n00000001_00000001.JPEG.npz"),
        latents_values("x", None),
        True,
    ),
    "safetensors": (
        made("x.safetensors", "plain", None),
        latents_values("x.safetensors", None),
        True,
    ),
    "npy": (made("x.npy", "plain", None), latents_values("x.npy", None), True),
    "npz": (made("x.npz", "plain", None), latents_values("x.npz", None), True),
    "packed npz": (foreign("x.npz", packed), latents_values("x.npz", None), True),
    "pt": (made("x.pt", "plain", None), latents_values("x.pt", None), True),
    "foreign safetensors": (
        foreign("x.safetensors", save_file),
        latents_values("x.safetensors", None),
        False,
    ),
}


def same(one, two):
    """Equal to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        bits = [x.contiguous().flatten().view(torch.uint8) for x in (one, two)]
        return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.equal(*bits)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def attempt(path, data, read, verify):
    """What is read of a file that has become other bytes; None for an error, which names it."""
    new = path.with_name("new")
    new.write_bytes(data)
    new.replace(path)  # an older mapping keeps the older file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path, verify=verify)
    except Exception as error:
        own = type(error) is ValueError or isinstance(error, Problem)
        if not own or str(path.parents[2]) not in str(error):  # the file, or a folder it is in
            raise AssertionError(f"{error!r} of {path}") from error
        return None


def places(length, count, seed):
    """One in each part of a file, so that no field of some bytes is passed over."""
    count = min(count, length)
    parts = np.arange(count) + np.random.default_rng(seed).random(count)
    return (parts * length / count).astype(int).tolist()


def campaign(kind, folder, cuts, flips):
    make, read, summed = KINDS[kind]
    path = make(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        right = read(path)
        assert not said
        assert same(read(path, verify="full"), right)
    unchecked = [w for w in said if "Not checked" in str(w.message)]
    assert bool(unchecked) == (not summed and kind != "bank of 0.1")
    data = path.read_bytes()
    for cut in places(len(data), cuts, 0):
        assert attempt(path, data[:cut], read, "quick") is None, cut
    noticed = 0
    for at in places(len(data), flips, 1):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        attempt(path, flipped, read, "quick")
        found = attempt(path, flipped, read, "full")
        noticed += found is None
        assert not summed or found is None or same(found, right), at
    assert noticed
    path.write_bytes(data)
    assert same(read(path, verify="full"), right)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_or_flipped(tmp_path, kind):
    (tmp_path / "x").mkdir()
    campaign(kind, tmp_path / "x", cuts=6, flips=16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_cut_or_flipped_anywhere(tmp_path, kind):
    (tmp_path / "x").mkdir()
    campaign(kind, tmp_path / "x", cuts=200, flips=800)


@pytest.mark.parametrize("kind", ["bank", "certificate", "smoothing", "shard", "safetensors"])
def test_every_flip_of_a_header_that_is_written_here_is_noticed_at_opening(tmp_path, kind):
    (tmp_path / "x").mkdir()
    make, read, _ = KINDS[kind]
    path = make(tmp_path / "x")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for at in places(end, 60, 2):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        assert attempt(path, flipped, read, "quick") is None, at


HEADERS = {
    "pair": (0, 128),
    "label": (0, 21),  # what comes then is the order of the bytes, which may be another
    "mean": (0, 128),
    "npy": (0, 128),
    "foreign safetensors": (0, 136),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_flips_of_headers_without_checksums_are_noticed_or_harmless(tmp_path, kind):
    (tmp_path / "x").mkdir()
    make, read, _ = KINDS[kind]
    path = make(tmp_path / "x")
    right, data = read(path), path.read_bytes()
    first, last = HEADERS[kind]
    for at in places(last - first, 40, 3):
        flipped = bytearray(data)
        flipped[first + at] ^= 1 << at % 8
        found = attempt(path, flipped, read, "quick")
        assert found is None or same(found, right), at


# -- which part is damaged --------------------------------------------------------------------


def flip(path, at, bit=3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_damaged_row_of_a_bank_is_named_before_it_is_relied_on(tmp_path):
    bank = LatentBank(X, LABELS)
    bank.save(tmp_path / "x.bank")
    Certificate.compute(bank, progress=False).save(tmp_path / "certificate")
    Smoothing.cached(tmp_path / "smoothing", bank, 2, progress=False)
    flip(tmp_path / "x.bank", -3)  # of the last row
    opened = LatentBank.open(tmp_path / "x.bank")
    assert opened.fingerprint == bank.fingerprint
    message = r"x\.bank is damaged: 1 of its 6 rows .* the first is row 5 of the file\. Copy or"
    for use in (
        lambda: LatentBank.open(tmp_path / "x.bank", verify="full"),
        lambda: Certificate.load(tmp_path / "certificate", opened),
        lambda: Certificate.load(tmp_path / "certificate", bank).check(opened),
        lambda: Certificate.cached(tmp_path / "certificate", opened),
        lambda: Smoothing.cached(tmp_path / "smoothing", opened, 2),
        lambda: opened.save(tmp_path / "copy"),
        lambda: opened.with_conditions(torch.ones(N, 1)).require_intact(),
    ):
        with pytest.raises(Problem, match=message):
            use()
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ValueError, match='"quick" or "full", got True'):
        LatentBank.open(tmp_path / "x.bank", verify=True)


def test_the_sign_of_a_zero_is_a_bit_too(tmp_path):
    LatentBank(torch.cat([torch.zeros(1, 4), torch.ones(2, 4)])).save(tmp_path / "x.bank")
    flip(tmp_path / "x.bank", 3 - 48, bit=7)
    assert LatentBank.open(tmp_path / "x.bank").rows[0, 0].signbit()
    with pytest.raises(Problem, match="`rows` does not match its checksum"):
        LatentBank.open(tmp_path / "x.bank", verify="full")


def test_rows_are_compared_once(tmp_path, monkeypatch):
    bank = LatentBank(X)
    bank.save(tmp_path / "x.bank")
    certificate = Certificate.compute(bank, progress=False)
    opened, read = LatentBank.open(tmp_path / "x.bank"), []
    chunks = LatentBank.chunks
    monkeypatch.setattr(LatentBank, "chunks", lambda *a, **k: read.append(a) or chunks(*a, **k))
    for _ in range(3):
        certificate.check(opened)
    certificate.check(bank)
    assert len(read) == 1


def test_damage_is_told_with_the_tensor_and_the_cure(tmp_path):
    bank = LatentBank(X, LABELS)
    made = Certificate.compute(bank, progress=False)
    made.save(tmp_path / "c")
    flip(tmp_path / "c", -1)
    message = (
        r"c is damaged: `distances` does not .* Or delete it: then the certificate is computed"
    )
    for read in (Certificate.load, Certificate.cached):
        with pytest.raises(Problem, match=message):
            read(tmp_path / "c", bank)
    path = make_latents(tmp_path / "x", N, SHAPE, 3, shard_size=4)
    shard = path / "latents_rank00_shard001.safetensors"
    flip(shard, -1)
    open_latents(path).verify()
    with pytest.raises(ValueError, match=r"1 problem .*shard001.*`latents_flip` does not match"):
        open_latents(path).verify(full=True)
    other = load_file(shard)
    save_file(other, shard)  # as another program writes it
    with pytest.warns(UserWarning, match=r"Not checked: .*shard001\.safetensors has no checksums"):
        open_latents(path).verify(full=True)


def test_files_of_tensors_are_those_of_the_library(tmp_path):
    held = {"a": torch.randn(3, 2), "b": torch.tensor(3), "c": torch.zeros(0, 4).half()}
    held |= {"d": torch.tensor([True, False, True]), "e": torch.randn(4, 6).bfloat16().t()}
    write_tensors(tmp_path / "x", held, {"format": "pt"})
    found = load_file(tmp_path / "x")
    assert found.keys() == held.keys()
    assert all(same(found[name], held[name]) for name in held)


# -- no file outside, and no code -------------------------------------------------------------


NAMES = ["../../x.npy", "a/../../x.npy", "/tmp/x.npy", "C:\\x.npy", "..\\x.npy", "\\\\host\\x.npy"]


@pytest.mark.parametrize("name", NAMES)
def test_members_of_zips_that_lie_outside_are_no_rows(tmp_path, name):
    path = make_latents(tmp_path / "in" / "x.zip", N, SHAPE, 3, "edm2")
    with zipfile.ZipFile(path) as archive:
        row = archive.read("00000/img-mean-std-00000000.npy")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, row)
    before = sorted(tmp_path.rglob("*"))
    stored = zipfile.ZipFile(path).namelist()[-1]
    message = r"x\.npy in .*x\.zip has a name that points outside it\. Write the zip again\."
    with pytest.raises(ValueError, match=message) as error:
        open_latents(path, "edm2")
    assert stored in str(error.value)
    latents = open_latents(path, "edm2", on_error="skip")
    assert len(latents) == N
    assert stored in latents.skipped[0]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(name, row)
    with pytest.raises(ValueError, match=r"x\.npz, .*x\.npy, is no whole .npz .*outside"):
        open_latents(tmp_path / "x.npz")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "x.npz"])


def test_an_index_reads_no_file_outside(tmp_path):
    path = make_latents(tmp_path / "x", N, SHAPE, 3, "repa") / "vae-sd"
    np.save(tmp_path / "secret.npy", np.zeros((8, 2, 2), "f4"))
    index = json.loads((path / "dataset.json").read_text())
    index["labels"].append(["../../secret.npy", 1])
    (path / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\.\./\.\./secret\.npy is in dataset\.json .* no such"):
        open_latents(path, "repa")
    assert len(open_latents(path, "repa", on_error="skip")) == N


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return exec, ("import os; os.mkdir(os.environ['RAN'])",)


def test_no_reader_runs_code(tmp_path, monkeypatch):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    bomb = pickle.dumps(Code())
    objects = np.array([Code()] * N, dtype=object)
    shards = make_latents(tmp_path / "shards", N, SHAPE, 3)
    pairs = make_latents(tmp_path / "pairs", N, SHAPE, 3, "fast-dit")
    means = make_latents(tmp_path / "means", N, SHAPE, 3, "repa") / "vae-sd"
    mar = make_latents(tmp_path / "mar", N, SHAPE, 3, "mar")
    row = next(mar.rglob("*.npz"))
    bank = LatentBank(X)
    cases = {
        shards / "latents_stats.pt": lambda: open_latents(shards),
        pairs / "imagenet256_features/0.npy": lambda: open_latents(pairs)[0],
        pairs / "imagenet256_labels/0.npy": lambda: open_latents(pairs).labels,
        means / "00000/img-mean-std-00000000.npy": lambda: open_latents(means, "repa")[0],
        row: lambda: open_latents(mar).rows(0, N),
    }
    for suffix in ("pt", "pth", "npy", "npz", "safetensors"):
        cases[tmp_path / f"x.{suffix}"] = lambda s=suffix: open_latents(tmp_path / f"x.{s}")
    cases[tmp_path / "x.bank"] = lambda: LatentBank.open(tmp_path / "x.bank")
    cases[tmp_path / "c"] = lambda: Certificate.load(tmp_path / "c", bank)
    cases[tmp_path / "s"] = lambda: Smoothing.cached(tmp_path / "s", bank, 2)
    arrays, tensors = "no whole .npy file of numbers", "cannot be read as a file of tensors"
    held = {"mean": Code(), "std": 1, "latents": X, "x": Code()}
    writers = (  # the endings that they fit, with what is said of those
        ((), "", lambda path: path.write_bytes(bomb)),
        ((".pt", ".pth"), tensors, lambda path: torch.save(held, path)),
        ((".npy",), arrays, lambda path: np.save(path.open("wb"), objects, allow_pickle=True)),
        (
            (".npz",),
            arrays,
            lambda path: np.savez(path.open("wb"), latents=objects, moments=objects),
        ),
    )
    for path, read in cases.items():
        before = path.read_bytes() if path.exists() else None
        for endings, said, write in writers:
            write(path)
            with pytest.raises(ValueError, match=re.escape(path.name)) as error:
                read()
            assert path.suffix not in endings or said in str(error.value)
            assert not (tmp_path / "ran").exists(), path
        if before is not None:
            path.write_bytes(before)
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()


# -- how files are written --------------------------------------------------------------------


def everything(folder):
    """One of each file that the library writes."""
    folder.mkdir()
    bank = LatentBank(X, LABELS)
    bank.save(folder / "x.bank")
    LatentBank.write(folder / "written.bank", [X], N)
    Certificate.cached(folder / "certificate", bank, progress=False)
    Smoothing.cached(folder / "smoothing", bank, 2, progress=False)
    for kind in ("lightningdit", "fast-dit", "repa", "mar"):
        make_latents(folder / kind, N, SHAPE, 3, kind)
    make_latents(folder / "x.zip", N, SHAPE, 3, "edm2")
    for suffix in ("pt", "npy", "npz", "safetensors"):
        make_latents(folder / f"x.{suffix}", N, SHAPE, 3, "plain")
    return [file for file in folder.rglob("*") if file.is_file()]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_rights_are_those_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        files = everything(tmp_path / "x")
    finally:
        os.umask(before)
    assert len(files) > 30
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}
    hidden = {file.name for file in files if file.name.startswith(".")}
    assert hidden == {".crc32.json", ".x.npy.crc32.json"}


def plain(path, rows):
    ArrayFile.write(path, [(rows, rows, None)], Writing(torch.float32))


WRITES = {
    "saved.bank": lambda path, rows: LatentBank(rows).save(path),
    "written.bank": lambda path, rows: LatentBank.write(path, [rows], len(rows)),
    "tensors": lambda path, rows: write_tensors(path, {"x": rows}, {}),
    "torch": lambda path, rows: replace_file(path, lambda file: torch.save(rows, file)),
    "x.safetensors": plain,
    "x.pt": plain,
    "x.npy": plain,
    "x.npz": plain,
    "x.zip": lambda path, rows: write_mean_std(path, [(rows, None)]),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, name):
    resource = pytest.importorskip("resource")
    path, write = tmp_path / name, WRITES[name]
    write(path, torch.randn(N, *SHAPE))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left on device") as error:
            write(path, torch.randn(999, 8, 4, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path} could not be written; a file that was there is" in str(error.value)
    assert f"Make room in {tmp_path}, or choose another folder." in str(error.value)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert {file for file in os.listdir(tmp_path) if not file.endswith(".crc32.json")} == {name}


def test_a_folder_that_is_not_there_is_named_by_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*none/x'$"):
        write_tensors(tmp_path / "none" / "x", {"x": X}, {})


def test_other_errors_stay_what_they_are(tmp_path):
    def write(partial):
        partial.write_text("half")
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        replace_file(tmp_path / "x", write)
    assert os.listdir(tmp_path) == []


def fork(write, path):
    """A process that writes a file and does not end; what it has begun, and how to end it."""
    (told, tell), (waits, go_on) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:

            def begin(partial):
                partial.write_text("half")
                os.write(tell, partial.name.encode())
                write(waits)

            replace_file(path, begin)
        finally:
            os._exit(0)
    begun = os.read(told, 300).decode()
    return begun, lambda: (os.write(go_on, b"!"), os.waitpid(child, 0))


def test_what_killed_writers_left_is_removed_by_the_next_and_no_more(tmp_path):
    """Their own, of any file in the folder; not what another process is about to complete."""
    kept, complete = fork(lambda waits: os.read(waits, 1), tmp_path / "a")
    left, _ = fork(lambda waits: os._exit(9), tmp_path / "b")
    os.wait()
    foreign, recent, old = (
        tmp_path / f".x.{made}.partial" for made in ("0123abcd-1-89abcdef", "89abcdef", "89abcdee")
    )
    others = [tmp_path / name for name in (".note.partial", "y.89abcdef.partial", ".z.txt.0123")]
    for file in (foreign, recent, old, *others):
        file.write_text("half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert {kept, left} <= {file.name for file in tmp_path.iterdir()}
    files._swept.clear()
    replace_file(tmp_path / "c", lambda file: file.write_text("whole"))
    found = {file.name for file in tmp_path.iterdir()}
    assert found == {"c", kept, foreign.name, recent.name, *(file.name for file in others)}
    complete()
    assert (tmp_path / "a").read_text() == "half"
    assert not (tmp_path / kept).exists()


def test_a_thread_leaves_the_files_of_others_alone(tmp_path):
    def outer(partial):
        partial.write_text("outer")
        replace_file(tmp_path / "inner", lambda file: file.write_text("inner"))
        assert partial.exists()

    replace_file(tmp_path / "outer", outer)
    assert (tmp_path / "outer").read_text() == "outer"
    # A number that a process had before: that of one that is no more.
    left = tmp_path / f".x.{files._machine()}-{os.getpid()}-89abcdef.partial"
    left.write_text("half")
    files._swept.clear()  # a folder is not listed at every write
    replace_file(tmp_path / "inner", lambda file: file.write_text("again"))
    assert not left.exists()


def test_names_as_long_as_a_folder_takes(tmp_path):
    for name in ("x" * 255, "\u00e9" * 127):
        replace_file(tmp_path / name, lambda file: file.write_text("whole"))
        assert (tmp_path / name).read_text() == "whole"


def test_listing_a_folder_takes_a_small_part_of_writing_into_it(tmp_path, monkeypatch):
    now, listed, scan = [0.0], [], os.scandir

    def listing(folder):
        now[0] += 1
        return listed.append(now[0]) or scan(folder)

    def write(file):
        now[0] += 1
        file.write_text("")

    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    for _ in range(120):
        replace_file(tmp_path / "x", write, sync=False)
    assert listed == [1, 52, 103]
