"""`LatentsData`: what an item is, which row of the bank it stands for, and what is refused."""

import math
import threading

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from stagewise.latents import make_latents, open_latents
from stagewise.recipes.checkpoints import current
from stagewise.recipes.latents import LatentsData

COUNT, CLASSES, SHAPE = 37, 5, (4, 2, 3)
FORMATS = ("lightningdit", "fast-dit", "repa", "edm2", "mar", "plain")
DRAWN = ("repa", "edm2", "mar")
READINGS = [
    (format, flips, moments)
    for format in FORMATS
    for flips in (("none", "random", "both") if format in ("lightningdit", "mar") else ("none",))
    for moments in (("sample", "mean") if format in DRAWN else ("sample",))
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(format)`: latents that are made once."""
    folder, there = tmp_path_factory.mktemp("latents"), {}

    def make(format):
        if format not in there:
            name = f"{format}.safetensors" if format == "plain" else format
            there[format] = make_latents(folder / name, COUNT, SHAPE, CLASSES, format)
        return there[format]

    return make


class Ranks:
    """As much of a trainer as a data module asks for."""

    def __init__(self, rank=0, ranks=1):
        self.global_rank = self.local_rank = rank
        self.world_size = self.num_devices = ranks


OPENING = ("format", "flips", "moments", "normalize", "multiplier", "expected_std")


def opened(path, options):
    """The latents, without the options of `open_latents`."""
    given = {name: options.pop(name) for name in OPENING if name in options}
    return open_latents(path, **given, seed=options.get("seed", 0))


def data_of(path, ranks=None, **options):
    latents = opened(path, options)
    data = LatentsData(latents, CLASSES, **{"held_out": 6, "batch_size": 4, **options})
    data.trainer = ranks
    data.setup()
    return data


def named(format):
    return format if format in ("repa", "edm2") else None


def samples(bank):
    return bank.take(torch.arange(len(bank))).reshape(len(bank), *bank.shape).float()


def labels_of(bank):
    return torch.cat(
        [torch.full_like(torch.arange(len(bank))[bank.segment(c)], c) for c in bank.classes]
    )


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "flips", "moments"), READINGS)
@pytest.mark.parametrize("ranks", [None, 3])
def test_an_item_is_its_row_or_a_draw_of_it(made, format, flips, moments, ranks):
    """`ranks` None is one bank, a number that many shards."""
    options = {"format": named(format), "flips": flips, "moments": moments}
    if ranks is None:
        modules = [data_of(made(format), **options)]
        banks = [modules[0].latent_bank()]
    else:
        modules = [
            data_of(made(format), Ranks(rank, ranks), sharded=True, **options)
            for rank in range(ranks)
        ]
        banks = [data.latent_shard() for data in modules]
    rows, labels = torch.cat([*map(samples, banks)]), torch.cat([*map(labels_of, banks)])
    assert len(rows) == (COUNT - 6) * (1 if flips == "none" else 2)
    assert len(rows.flatten(1).unique(dim=0)) == len(rows)
    for data in modules[-1:]:
        drawn = set()
        for epoch in range(4 if flips == "random" else 1):
            data.latents.set_epoch(epoch)
            met = []
            for x1, label, row in data.train:
                assert label == labels[row]
                if format in DRAWN and moments == "sample":
                    # The spread that is made is far below the distance of any two rows.
                    assert (rows - x1).flatten(1).norm(dim=1).argmin() == row
                    assert not torch.equal(x1, rows[row])
                else:
                    assert torch.equal(x1, rows[row])
                met.append(row)
            assert len(set(met)) == len(met) == len(data.train)
            drawn |= set(met)
        # With "random" four tosses of a coin for each of 31 pairs.
        assert (len(drawn) > 1.5 * (COUNT - 6)) == (flips != "none")


def test_a_flip_is_that_of_the_row(made):
    data = data_of(made("mar"), flips="both", moments="mean", held_out=0)
    plain = open_latents(made("mar"), moments="mean")
    whole = open_latents(made("mar"), moments="mean", flips="both")
    for item in range(COUNT):
        assert torch.equal(data.train[item][0], plain[item][0])
        assert torch.equal(data.train[item + COUNT][0], whole[item + COUNT][0])
        assert not torch.equal(data.train[item][0], data.train[item + COUNT][0])
        assert data.train[item][1] == data.train[item + COUNT][1] == plain[item][1]


def test_draws_depend_on_seed_and_epoch_alone(made):
    options = {"flips": "random", "moments": "sample"}
    data, other = (data_of(made("mar"), **options) for _ in range(2))
    data.latents.set_epoch(3)
    before = [item[0] for item in data.train]
    other.latents.set_epoch(2)
    _ = list(other.train)
    other.latents.set_epoch(3)
    backwards = [other.train[item][0] for item in reversed(range(len(other.train)))]
    assert all(map(torch.equal, before, reversed(backwards)))
    data.latents.set_epoch(4)
    assert not any(map(torch.equal, before, [item[0] for item in data.train]))
    seeded = data_of(made("mar"), held_out=0, seed=1, **options)
    unseeded = data_of(made("mar"), held_out=0, seed=2, **options)
    assert not torch.equal(seeded.train[0][0], unseeded.train[0][0])


def test_fixed_items_are_rows_that_are_not_flipped(made):
    data = data_of(made("mar"), flips="random")
    rows, fixed = samples(data.latent_bank()), data.train.fixed()
    plain = open_latents(made("mar"), moments="mean")
    assert len(fixed) == len(data.train)
    for item, (x1, _, row) in enumerate(fixed):
        assert torch.equal(x1, rows[row])
        assert torch.equal(x1, plain[int(data.train.indices[item])][0])


def test_the_ranks_of_a_trainer_that_comes_later_count(made):
    early = LatentsData(open_latents(made("lightningdit")), CLASSES, held_out=6, sharded=True)
    early.setup()
    alone = early.train.rows
    early.trainer = Ranks(1, 2)
    early.setup("fit")
    late = data_of(made("lightningdit"), Ranks(1, 2), sharded=True)
    assert torch.equal(early.train.rows, late.train.rows)
    assert not torch.equal(early.train.rows, alone)


# -- what is held out -----------------------------------------------------------------------------


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    held_out=st.integers(0, COUNT - 1),
    seed=st.integers(0, 2**32),
    flips=st.sampled_from(["none", "random", "both"]),
)
def test_no_row_is_both_trained_on_and_held_out(made, held_out, seed, flips):
    data = data_of(made("lightningdit"), held_out=held_out, seed=seed, flips=flips)
    again = data_of(made("lightningdit"), held_out=held_out, seed=seed, flips="none")
    trained = {int(index) % COUNT for index in data.train.indices}
    kept = set() if data.held_out is None else set(data.held_out.indices.tolist())
    assert trained.isdisjoint(kept)
    assert trained | kept == set(range(COUNT))
    assert len(kept) == held_out
    assert trained == set(again.train.indices.tolist())
    assert (data.train.rows >= 0).sum() == (COUNT - held_out) * (1 if flips == "none" else 2)
    if data.held_out is None:
        assert data.val_dataloader() == []
    else:
        assert all(row == -1 for _, _, row in data.held_out)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_held_out_draws_are_those_of_every_validation(made, elsewhere):
    path = made("mar")
    data = data_of(path, flips="random", held_out_path=str(path) if elsewhere else None)
    data.latents.set_epoch(1)
    before = [x1 for x1, *_ in data.held_out]
    data.latents.set_epoch(2)
    assert all(map(torch.equal, before, [x1 for x1, *_ in data.held_out]))
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat([batch[0] for batch in batches]), torch.stack(before))


def test_latents_for_validation_of_their_own(made, tmp_path):
    other = make_latents(tmp_path / "other", 20, SHAPE, CLASSES, seed=7)
    data = data_of(made("lightningdit"), held_out_path=str(other), held_out=8)
    assert len(data.train) == COUNT
    assert len(data.held_out) == 8
    read = open_latents(other)
    for item, (x1, label, row) in enumerate(data.held_out):
        wanted = read[int(data.held_out.indices[item])]
        assert torch.equal(x1, wanted[0])
        assert (label, row) == (wanted[1], -1)
    assert len(data_of(made("lightningdit"), held_out_path=str(other), held_out=99).held_out) == 20
    none = data_of(made("lightningdit"), held_out_path=str(other), held_out=0)
    assert none.held_out is None
    assert none.val_dataloader() == []
    large = make_latents(tmp_path / "large", 20, (4, 4, 4), CLASSES)
    with pytest.raises(ValueError, match=r"held-out latents of shape \(4, 2, 3\), got \(4, 4, 4\)"):
        data_of(made("lightningdit"), held_out_path=str(large))


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_ranks_are_those_of_one_and_workers_see_the_epoch(made, workers):
    def loaded(ranks, **options):
        found = []
        for rank in range(ranks):
            data = data_of(
                made("mar"), Ranks(rank, ranks), flips="random", batch_size=8 // ranks, **options
            )
            loader = data.train_dataloader()
            epochs = []
            for epoch in range(3):
                loader.sampler.set_epoch(epoch)
                epochs.append(list(loader))
            found.append(epochs)
        return found

    (one,), two = loaded(1, num_workers=workers), loaded(2)
    for epoch, batches in enumerate(one):
        assert len(batches) == (COUNT - 6) // 8
        for step, batch in enumerate(batches):
            halves = [rank[epoch][step] for rank in two]
            for column, whole in enumerate(batch):
                assert torch.equal(torch.stack([h[column] for h in halves], 1).flatten(0, 1), whole)
    assert not torch.equal(one[0][0][0], one[1][0][0])


def test_examples_are_rows_of_their_class_in_turn(made):
    data = data_of(made("lightningdit"), held_out=0)
    made_examples = data.examples([1, 4], 9)
    assert made_examples.shape == (2, 9, *SHAPE)
    labels = data.latents.labels
    for found, label in zip(made_examples, (1, 4), strict=True):
        wanted = [data.latents[i][0] for i in (labels == label).nonzero()[:, 0].tolist()]
        for place in range(9):
            assert torch.equal(found[place], wanted[place % len(wanted)])
    empty = LatentsData(open_latents(made("lightningdit")), CLASSES + 1, held_out=0)
    empty.setup()
    assert not empty.examples([CLASSES], 2).any()
    assert data.class_names == ("0", "1", "2", "3", "4")


def test_what_an_autoencoder_decodes_is_what_was_stored(made):
    data = data_of(made("lightningdit"), held_out=0)
    stored = load_file(next(made("lightningdit").glob("*.safetensors")))["latents"]
    torch.testing.assert_close(data.to_stored(data.train[5][0][None])[0], stored[5].float())


# -- banks in files -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_bank_in_a_file_is_found_again_until_the_latents_change(tmp_path, format):
    name = "own.safetensors" if format == "plain" else "own"
    path = make_latents(tmp_path / name, COUNT, SHAPE, CLASSES, format)
    options = {"format": named(format), "bank_dir": str(tmp_path / "banks")}

    def files():
        return sorted((tmp_path / "banks").iterdir())

    bank = data_of(path, **options).latent_bank()
    assert torch.equal(samples(bank), samples(data_of(path, format=named(format)).latent_bank()))
    (file,) = files()
    written = file.stat().st_mtime_ns
    data = data_of(path, **options)
    # What was read before the bank is asked for makes no difference.
    _ = data.train[0], data.latents.labels, data.examples([0], 1)
    again = data.latent_bank()
    assert data.latent_bank() is again
    assert (files(), file.stat().st_mtime_ns) == ([file], written)
    assert again.fingerprint == bank.fingerprint
    # Another split, storage or scale is another bank.
    for other in ({"held_out": 7}, {"seed": 1}, {"bank_dtype": "bfloat16"}):
        _ = data_of(path, **options, **other).latent_bank()
    assert len(files()) == 4
    # Of the same names and sizes, in folders whose own time stays.
    (changed,) = sorted(path.rglob("*.np*"))[:1] or [*path.glob("*.safetensors")] or [path]
    rewrite(changed)
    new = data_of(path, **options).latent_bank()
    assert len(files()) == 5
    assert new.fingerprint != bank.fingerprint
    assert torch.equal(samples(new), samples(data_of(path, format=named(format)).latent_bank()))


def rewrite(file):
    """Other numbers, in place."""
    if file.suffix == ".npy":
        array = np.load(file)
        with open(file, "r+b") as stream:
            np.save(stream, array * np.float32(0.5))
    elif file.suffix == ".npz":
        with np.load(file) as held:
            arrays = {name: value * np.float32(0.5) for name, value in held.items()}
        np.savez(file, **arrays)
    else:
        tensors = load_file(file)
        tensors["latents"] = tensors["latents"] * 0.9
        save_file(tensors, file)


def test_two_runs_that_write_the_same_bank_at_once(made, tmp_path):
    modules = [data_of(made("lightningdit"), bank_dir=str(tmp_path)) for _ in range(2)]
    both, banks = threading.Barrier(2), {}

    def write(number):
        read = modules[number]._read

        def together(*rest):
            both.wait()  # neither saw the file of the other
            return read(*rest)

        modules[number]._read = together
        banks[number] = modules[number].latent_bank()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(samples(banks[0]), samples(banks[1]))
    assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_bank_that_could_not_be_written_is_not_there(made, tmp_path, monkeypatch):
    data = data_of(made("lightningdit"), bank_dir=str(tmp_path))
    read, calls = type(data.latents)._read, []

    def fails(latents, row, flip):
        calls.append(row)
        if len(calls) > COUNT + 10:  # behind the check of the scale
            raise OSError("the disk is gone")
        return read(latents, row, flip)

    with monkeypatch.context() as patch:
        patch.setattr(type(data.latents), "_read", fails)
        with pytest.raises(OSError, match="the disk is gone"):
            data.latent_bank()
    assert not list(tmp_path.iterdir())
    assert len(data.latent_bank()) == COUNT - 6


def test_a_bank_in_memory_is_counted_once_for_each_process(made, monkeypatch):
    data = data_of(made("lightningdit"))
    rows = (COUNT - 6) * math.prod(SHAPE) * 4
    monkeypatch.setattr("stagewise.memory.available_memory", lambda *_: 2.5 * rows)
    assert len(data.latent_bank()) == COUNT - 6
    crowded = data_of(made("lightningdit"), Ranks(0, 3))
    with pytest.raises(MemoryError, match="3 processes|3 x|3 copies"):
        crowded.latent_bank()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` of at least 1, got 0"),
        ({"held_out": -1}, "`held_out` of at least 0, got -1"),
        ({"verify": "slow"}, '`verify` "quick" or "full", got \'slow\''),
        ({"bank_dtype": "int8"}, "`bank_dtype` among .*got 'int8'"),
        ({"held_out": COUNT}, f"fewer held-out rows than the {COUNT} of .*got {COUNT}. Lower"),
        ({"flips": "all"}, "`flips` among .*got 'all'"),
        ({"moments": "median"}, "`moments` among .*got 'median'"),
        ({"expected_std": 5.0}, "standard deviation about 5"),
    ],
)
def test_wrong_options_are_refused(made, options, message):
    with pytest.raises(ValueError, match=message):
        data_of(made("lightningdit"), **options)


def test_wrong_classes_and_places_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="`num_classes` of at least 1, got 0"):
        LatentsData(lambda: None, 0)
    few = LatentsData(open_latents(made("fast-dit")), CLASSES - 1, held_out=0)
    with pytest.raises(ValueError, match=r"labels in 0 to 3, got 4 .*or num_classes"):
        few.setup()
    with pytest.raises(FileNotFoundError, match="no such path"):
        data_of(tmp_path / "nothing")
    with pytest.raises(ValueError, match="latents without flips"):
        data_of(made("fast-dit"), flips="random")
    with pytest.raises(ValueError, match=r"LatentsData\(sharded=True\)"):
        data_of(made("fast-dit")).latent_shard()
    data = data_of(made("lightningdit"), batch_size=32)
    with pytest.raises(ValueError, match="at least one batch of training samples, 32 .*got 31"):
        data.train_dataloader()


def test_latents_without_labels_are_refused_before_a_step(tmp_path):
    save_file({"latents": torch.randn(30, *SHAPE)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Expected labels.*none in .*x.safetensors. Write"):
        data_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("inside", ["", "banks", "a/b"])
def test_a_bank_among_the_latents_is_refused(made, inside):
    path = made("lightningdit")
    with pytest.raises(ValueError, match="`bank_dir` outside of the latents"):
        data_of(path, bank_dir=str(path / inside))
    assert data_of(path, bank_dir=f"{path}_banks").bank_dir == f"{path}_banks"


def test_all_rows_are_read_on_request(tmp_path):
    path = make_latents(tmp_path / "own", 600, SHAPE, CLASSES)
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["latents"][301, 0, 0, 0] = math.nan  # not among the 256 that are looked at
    save_file(tensors, file)
    assert data_of(path).verify == "quick"
    with pytest.raises(ValueError, match="row 301 has NaN or Inf"):
        data_of(path, verify="full")
    clean = make_latents(tmp_path / "clean", COUNT, SHAPE, CLASSES)
    with pytest.raises(ValueError, match="row 301 has NaN or Inf"):
        data_of(clean, verify="full", held_out_path=str(path))


def test_without_a_trainer_one_process_of_a_node_writes_the_bank(made, tmp_path, monkeypatch):
    """As `stagewise sample` under torchrun."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    waits = []
    monkeypatch.setattr("torch.distributed.barrier", lambda: waits.append(1))
    options = {"bank_dir": str(tmp_path)}
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(FileNotFoundError):
        data_of(made("lightningdit"), **options).latent_bank()
    monkeypatch.setenv("LOCAL_RANK", "0")
    written = data_of(made("lightningdit"), **options).latent_bank()
    monkeypatch.setenv("LOCAL_RANK", "1")
    opened = data_of(made("lightningdit"), **options).latent_bank()
    assert opened.fingerprint == written.fingerprint
    assert len(waits) == 3


def test_a_configuration_of_version_0_1_opens_the_same_latents(made):
    old = OmegaConf.create(
        {
            "data": {
                **{"_target_": "stagewise.recipes.latents.LatentsData", "path": str(made("repa"))},
                **{"num_classes": CLASSES, "format": "repa", "held_out": 6, "flips": "none"},
                **{"moments": "mean", "normalize": True, "multiplier": None, "seed": 3},
            }
        }
    )
    data = instantiate(current(old).data)
    data.setup()
    wanted = data_of(made("repa"), format="repa", moments="mean", seed=3)
    assert data.latents.reading == wanted.latents.reading
    assert all(map(torch.equal, *([x1 for x1, *_ in part.train] for part in (data, wanted))))
    assert current(current(old)) == old
