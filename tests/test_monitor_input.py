"""`PosteriorMonitor` and wrong input: a clear error before the first training step, or a warning.

And the bank that is read from the training loader, which must be the training set.
"""

import functools
import os
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stagewise import LatentBank, memory
from stagewise.callbacks import PosteriorMonitor, bank_from_trainer

pytestmark = pytest.mark.usefixtures("quick_figures")

small = functools.partial(PosteriorMonitor, every_n_steps=2, strata=4, queries=4)

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(11))
LABELS = torch.arange(64) % 4


def loader(*tensors, **options):
    return DataLoader(TensorDataset(*tensors), **({"batch_size": 8} | options))


def with_rows(rows, value):
    x = X.clone()
    x[rows, 2] = value
    return x


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Dicts(Dataset):
    """Samples under given names."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.tensors.items()}


# -- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` of at least 1, got 0"),
        ({"every_n_steps": -5}, ValueError, "`every_n_steps` of at least 1, got -5"),
        ({"strata": 2}, ValueError, "at least 4 strata, got 2"),
        ({"queries": 1}, ValueError, "at least 2 queries per stratum, got 1"),
        ({"bank": X}, TypeError, r"`bank` to be a LatentBank, got Tensor.*LatentBank\(x, labels\)"),
        ({"bank": LatentBank(X), "class_wise": True}, ValueError, "needs a bank with labels"),
        ({"class_wise": "no"}, ValueError, '`class_wise`.* True, False or "auto", got .no.'),
        ({"path": "linear"}, TypeError, "`path`.* got .linear."),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        PosteriorMonitor(**options)


# -- runs that must not start -------------------------------------------------------------------

# What is trained on, what the monitor is given, and what is said.
REFUSED = {
    "nothing to find": (
        loader(LABELS),
        {},
        ValueError,
        r"found 0 in list\(int64 tensor \(8,\)\)\. Say where x_1 is, and the labels or None: ",
    ),
    "two candidates": (
        loader(X, X[:, :3]),
        {},
        ValueError,
        r"found 2 in list\(float32 tensor \(8, 6\), float32 tensor \(8, 3\)\)\. Say where x_1 is",
    ),
    "two candidates in a dict": (
        DataLoader(Dicts(left=X, right=X), 8),
        {},
        ValueError,
        r"found 2 in \{'left': float32 tensor \(8, 6\), 'right': float32 tensor \(8, 6\)\}",
    ),
    "unknown class": (
        loader(X, LABELS + 4),
        {"bank": (X, LABELS)},
        ValueError,
        "Class [4-7] is not in the bank, which has 4 classes from 0 to 3.*labels that training",
    ),
    "no labels": (
        loader(X),
        {"class_wise": True},
        ValueError,
        "no labels were found.*read_batch=lambda",
    ),
    "stream": (DataLoader(Stream(), 8), {}, ValueError, "iterable and has no length.*LatentBank"),
    "list of loaders": (
        [loader(X), loader(X)],
        {},
        ValueError,
        "Expected one DataLoader for training, got list.*Give the bank yourself",
    ),
    "dict of loaders": (
        pl.utilities.CombinedLoader({"a": loader(X), "b": loader(X)}, "max_size_cycle"),
        {},
        ValueError,
        "Expected one DataLoader for training, got dict",
    ),
    "no batching": (loader(X, batch_size=None), {}, ValueError, "batch_size=None"),
    "NaN": (
        loader(with_rows([33, 21, 50], float("nan")), shuffle=True),
        {},
        ValueError,
        "NaN or Inf in 3 of 64; the first is row 21",
    ),
    "NaN, in classes": (
        loader(with_rows([33, 21], float("nan")), LABELS),
        {},
        ValueError,
        "NaN or Inf in 2 of 64; the first is row 21",
    ),
    "infinite": (loader(with_rows([40], float("inf"))), {}, ValueError, "1 of 64.*is row 40"),
    "one row": (loader(X[:1]), {}, ValueError, r"at least 2 rows, got \(1, 6\)"),
    "integers": (
        loader((X * 10).to(torch.uint8)),
        {"read_batch": lambda batch: (batch[0], None)},
        ValueError,
        r"Expected `read_batch` to return.*floating-point.*got tuple\(uint8 tensor \(8, 6\), None",
    ),
    "labels that are not whole": (
        loader(X, LABELS + 0.5),
        {"read_batch": lambda batch: (batch[0], batch[1])},
        ValueError,
        r"`read_batch`.*integers of.*\(B,\), got tuple\(float32 tensor \(8, 6\), float32 tensor",
    ),
}


def never_starts(model, run, error, message):
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with pytest.raises(error, match=message):
        run()
    assert model.calls == 0
    assert torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(case, make_trainer, tiny_flow, tmp_path):
    data, options, error, message = REFUSED[case]
    if "bank" in options:
        rows = options["bank"] if isinstance(options["bank"], tuple) else (options["bank"],)
        options = options | {"bank": LatentBank(*rows)}
    monitor, model = small(**options), tiny_flow()
    never_starts(model, lambda: make_trainer(monitor).fit(model, data), error, message)
    assert monitor.history == []


# -- a bank that is given beside a batch that does not hold x_1 ----------------------------------


class Elsewhere(Dataset):
    """Pictures, of which the module trains on the latents that it has itself."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {"picture": torch.ones(3, 4, 4) * i, "other": torch.ones(3, 4, 4), "row": i}


@pytest.fixture
def looks_up(tiny_flow):
    class LooksUp(tiny_flow):
        def training_step(self, batch, batch_idx):
            return super().training_step(X[batch["row"]], batch_idx)

    return LooksUp


def test_a_bank_that_is_given_needs_no_x1_in_the_batch(make_trainer, looks_up, lightning_log):
    monitor = small(LatentBank(X))
    run = make_trainer(monitor)
    assert said(lambda: run.fit(looks_up(), DataLoader(Elsewhere(), 8, shuffle=True))) == []
    assert len(monitor.history) == 2
    assert "only what the training step shows is compared with the bank" in lightning_log.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [(0.2 * X, "standard deviation of 0.2"), (X.flip(1), "nearest row is off by")],
)
def test_the_first_step_is_held_against_it(rows, message, make_trainer, looks_up):
    run = make_trainer(small(LatentBank(rows)))
    (warned,) = said(lambda: run.fit(looks_up(), DataLoader(Elsewhere(), 8, shuffle=True)))
    assert message in warned


@pytest.mark.parametrize("data", [DataLoader(Elsewhere(), 8), loader(X)], ids=["elsewhere", "x_1"])
def test_another_shape_is_refused_before_a_weight_changes(data, make_trainer, looks_up, tiny_flow):
    model = looks_up() if isinstance(data.dataset, Elsewhere) else tiny_flow()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    message = r"bank has samples of shape \(5,\), the training batch of shape \(6,\).*same latents"
    with pytest.raises(ValueError, match=message):
        make_trainer(small(LatentBank(X[:, :5]))).fit(model, data)
    assert torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))


def test_bank_larger_than_memory(make_trainer, tiny_flow, monkeypatch):
    # 4000 rows of 6 float32 are 96 kB; the bank is refused before it is allocated.
    monkeypatch.setattr(memory, "available_memory", lambda device="cpu": 48_000)
    empty = torch.empty

    def never_the_bank(*size, **options):
        assert size != ((4000, 6),)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", never_the_bank)
    model, monitor = tiny_flow(), small()
    message = (
        "4000 rows x 6 numbers in torch.float32 needs 96.0 kB, and 48.0 kB are available.*"
        "dtype=torch.bfloat16.*num_rows=1600.*some classes only"
    )
    data = loader(torch.randn(4000, 6))
    never_starts(model, lambda: make_trainer(monitor).fit(model, data), MemoryError, message)


def test_memory_error_of_a_real_size():
    with pytest.raises(MemoryError) as caught:
        memory.require_memory(2 * 10**9, 4096, torch.float32)
    message = str(caught.value)
    assert "2000000000 rows x 4096 numbers in torch.float32 needs 32.8 TB" in message
    assert "dtype=torch.bfloat16 (16.4 TB)" in message
    rows = int(message.split("num_rows=")[1].split(";")[0])
    assert rows * 4096 * 4 < memory.available_memory() * 1.2
    with pytest.raises(MemoryError) as caught:
        memory.require_memory(2 * 10**9, 4096, torch.bfloat16)
    assert "dtype=" not in str(caught.value), "nothing smaller than 16 bits to offer"


def test_find_that_gives_no_pair(make_trainer, tiny_flow):
    model, monitor = tiny_flow(), small(read_batch=lambda batch: batch[0])
    message = r"`read_batch`.*\(x_1, labels"
    never_starts(
        model, lambda: make_trainer(monitor).fit(model, loader(X)), (TypeError, ValueError), message
    )


# -- runs that start with a warning -------------------------------------------------------------


def said(run):
    """What stagewise warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    words = ("bank", "training set", "training batch", "classes of")
    return [str(w.message) for w in caught if any(word in str(w.message) for word in words)]


@pytest.mark.parametrize("given", [None, X, X.bfloat16()], ids=["none", "float32", "bfloat16"])
def test_nothing_is_said_when_all_is_well(given, make_trainer, tiny_flow):
    bank = None if given is None else LatentBank(given)
    run = make_trainer(small(bank=bank))
    assert said(lambda: run.fit(tiny_flow(), loader(X, shuffle=True))) == []


@pytest.mark.parametrize("factor", [0.18215, 1 / 0.18215, 0.5, 2.0])
def test_other_scale_is_named(factor, make_trainer, tiny_flow):
    bank = LatentBank(X * factor)
    (message,) = said(lambda: make_trainer(small(bank)).fit(tiny_flow(), loader(X)))
    assert f"standard deviation of {bank.std:.4g}, the training batch one of" in message
    assert f"{float(X[:8].std()):.4g}" in message
    assert "build the bank from the latents" in message


def test_rows_of_another_set_are_named(make_trainer, tiny_flow):
    bank = LatentBank(X.flip(1))
    (message,) = said(lambda: make_trainer(small(bank)).fit(tiny_flow(), loader(X)))
    assert "not rows of the bank: the nearest row is off by" in message
    share = int(message.split("off by ")[1].split("%")[0])
    off = torch.cdist(X[:8], X.flip(1)).min(1).values / X[:8].norm(dim=1)
    assert share == pytest.approx(100 * float(off.median()), abs=0.6)


def test_batches_of_few_or_uneven_samples_raise_no_alarm(make_trainer, tiny_flow):
    # Samples differ in contrast by a factor of 16, and each batch holds one of them.
    x = X * torch.logspace(-2, 2, 64, base=2)[:, None]
    data = loader(x, batch_size=1)
    assert said(lambda: make_trainer(small(LatentBank(x))).fit(tiny_flow(), data)) == []


class Noisy(Dataset):
    """Another draw around the sample each time it is read."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(6)


def test_random_augmentation_is_detected(make_trainer, tiny_flow):
    monitor = small()
    (message,) = said(lambda: make_trainer(monitor).fit(tiny_flow(), DataLoader(Noisy(), 8)))
    assert "other values of x_1 each time it is read" in message
    assert "oracle targets it is added to the rows" in message
    assert len(monitor.history) == 2, "measured all the same"


class Flips(Noisy):
    """Mirrors half of the samples, as most training sets of images do."""

    def __getitem__(self, i):
        return X[i].flip(0) if torch.rand(()) < 0.5 else X[i]


def test_flips_are_detected_in_batches_of_one(make_trainer, tiny_flow):
    for seed in range(4):
        pl.seed_everything(seed, verbose=False)
        found = said(lambda: make_trainer(small()).fit(tiny_flow(), DataLoader(Flips(), 1)))
        assert ["other values of x_1" in message for message in found] == [True]


def test_not_finite_is_not_taken_for_augmentation(make_trainer, tiny_flow):
    def run():
        with pytest.raises(ValueError, match="NaN or Inf in 1 of 64"):
            make_trainer(small()).fit(tiny_flow(), loader(with_rows([3], float("nan"))))

    assert said(run) == []


def test_given_classes_that_training_does_not_use_are_named(make_trainer, tiny_flow):
    # The batch has no labels, so training is unconditional and the class-wise curve is not its.
    bank = LatentBank(X, LABELS)
    messages = said(lambda: make_trainer(small(bank)).fit(tiny_flow(), loader(X)))
    assert ["labels" in message for message in messages] == [True]


def test_indices_are_not_taken_for_classes_in_silence(make_trainer, tiny_flow):
    # Each sample is a class of its own, over which every posterior has collapsed at any t.
    (message,) = said(lambda: make_trainer(small()).fit(tiny_flow(), loader(X, torch.arange(64))))
    assert "64 classes" in message
    assert "class_wise=False" in message


def test_identical_samples_are_measured(make_trainer, tiny_flow):
    same = torch.ones(16, 6)
    monitor = small(LatentBank(same))
    make_trainer(monitor).fit(tiny_flow(), loader(same))
    assert monitor.history[-1]["top1"] == pytest.approx([1 / 16] * 4)
    assert np.isnan(monitor.history[-1]["midpoint"])


# -- the bank from the loader -------------------------------------------------------------------


class TakeBank(pl.Callback):
    """Reads the bank and stops the run."""

    def __init__(self, **options):
        self.options = options

    def on_train_start(self, trainer, pl_module):
        self.bank = bank_from_trainer(trainer, pl_module, **self.options)
        trainer.should_stop = True


@pytest.fixture
def read(make_trainer, tiny_flow):
    """`read(loader)`: the bank in the order of the data set, and the labels of its rows."""

    def read(data, model=None, **options):
        take = TakeBank(**options)
        how = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {
            "train_dataloaders": data
        }  # fmt: skip
        make_trainer(take, max_steps=1).fit(model or tiny_flow(), **how)
        bank = take.bank
        back = slice(None) if bank.index is None else torch.argsort(bank.index)
        labels = torch.tensor(bank.labels_of(range(len(bank))))[back] if bank.classes else None
        samples = bank.take(torch.arange(len(bank)))[back].float()
        return samples.reshape(-1, *bank.shape), labels

    return read


def dicts(**options):
    return DataLoader(Dicts(image=X, label=LABELS), 8, **options)


@pytest.mark.parametrize(
    "data",
    [
        loader(X, LABELS),
        loader(X, LABELS, shuffle=True),
        loader(X, LABELS, batch_size=10, drop_last=True, shuffle=True),
        loader(X, LABELS, batch_size=1000),
        loader(X, LABELS, num_workers=1),
        loader(X, LABELS, sampler=WeightedRandomSampler([1.0] * 64, 16)),
        loader(X, LABELS, batch_sampler=BatchSampler(range(64), 8, True), batch_size=1),
        loader(X, LABELS[:, None]),
        loader(X, LABELS.float()),
        DataLoader(list(zip(X, LABELS.tolist(), strict=True)), 8),
        dicts(),
        DataLoader(X, 8, collate_fn=lambda rows: {"x1": torch.stack(rows), "y": None}),
    ],
    ids=[
        *("in_order", "shuffled", "drop_last", "one_batch", "worker", "weighted", "batch_sampler"),
        *("column", "floats", "list_of_pairs", "dicts", "collate"),
    ],
)
@pytest.mark.filterwarnings("ignore:The training loader draws")
def test_bank_is_the_training_set(data, read):
    rows, labels = read(data)
    assert torch.equal(rows, X)
    assert labels is None or torch.equal(labels, LABELS)
    assert (labels is None) == (data.collate_fn.__name__ == "<lambda>")


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_shape_and_storage(shape, read):
    x = X.reshape(-1, *shape)
    for dtype, tolerance in ((None, 0), (torch.bfloat16, 2**-7), (torch.float64, 0)):
        rows, _ = read(loader(x), dtype=dtype)
        torch.testing.assert_close(rows, x, rtol=tolerance, atol=tolerance)
        assert torch.equal(rows, x) == (dtype is not torch.bfloat16)
    assert read(loader(x, LABELS), class_wise=False)[1] is None


CHOSEN = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:40].tolist()


class Chosen(Sampler):
    """A subset, by somebody's own sampler."""

    def __init__(self):
        pass

    def __iter__(self):
        return iter(CHOSEN)

    def __len__(self):
        return len(CHOSEN)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(CHOSEN), "batch_size": 8},
        {"sampler": SubsetRandomSampler(CHOSEN), "batch_size": 7, "drop_last": True},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 8, False), "batch_size": 1},
    ],
    ids=["sampler", "drop_last", "batch_sampler"],
)
def test_bank_of_a_subset_holds_what_is_drawn(options, read):
    rows, labels = read(loader(X, LABELS, **options))
    assert torch.equal(rows, X[CHOSEN])
    assert torch.equal(labels, LABELS[CHOSEN])


def test_the_bank_of_a_sampler_that_draws_a_part_holds_that_part(read, lightning_log):
    found = []
    assert said(lambda: found.append(read(loader(X, LABELS, sampler=Chosen())))) == []
    ((rows, labels),) = found
    assert torch.equal(rows, X[sorted(CHOSEN)])
    assert torch.equal(labels, LABELS[sorted(CHOSEN)])
    assert "Training draws 40 of 64 samples: the bank's rows." in lightning_log.text


def scaled(batch):
    return [0.18215 * batch[0], *batch[1:]]


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_of_the_module_are_applied(hook, read, tiny_flow):
    model = type("Scaling", (tiny_flow,), {hook: lambda self, batch, dataloader_idx: scaled(batch)})
    rows, labels = read(loader(X, LABELS, shuffle=True), model())
    assert torch.equal(rows, 0.18215 * X)
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_of_the_data_module_are_applied(hook, read):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(X, LABELS)

    setattr(Data, hook, lambda self, batch, dataloader_idx: scaled(batch))
    rows, _ = read(Data())
    assert torch.equal(rows, 0.18215 * X)


def test_find_of_the_user_is_used(make_trainer, tiny_flow, read_stages, tmp_path):
    # Two candidates, of which the second is x_1; the labels lie in an (B, 1) column.
    seen = []

    def find(batch):
        seen.append(tuple(batch[1].shape))
        return batch[1].reshape(-1, 2, 3), batch[2][:, 0]

    class Second(tiny_flow):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[1], batch_idx)

    data = loader(X[:, :3], X, LABELS[:, None])
    make_trainer(small(read_batch=find)).fit(Second(), data)
    header, _ = read_stages(tmp_path / "stagewise_logs")
    assert (header["rows"], header["shape"], header["classes"]) == (64, [2, 3], 4)
    assert len(seen) > 8, "for the bank and for the first batch of training"
    assert set(seen) == {(8, 6)}


class Lazy(Dataset):
    """Opens its file when it is first read, as data sets of h5 or lmdb files do."""

    def __init__(self):
        self.opened_by = None

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.opened_by = self.opened_by or os.getpid()
        if self.opened_by != os.getpid():
            raise RuntimeError("a handle was inherited from another process")
        return X[i]


def test_no_handle_is_inherited_by_the_workers_of_the_run(make_trainer, tiny_flow):
    data = Lazy()
    run = make_trainer(small(), max_epochs=2, max_steps=-1)
    run.fit(tiny_flow(), DataLoader(data, 32, num_workers=1))
    assert run.global_step == 4
    assert data.opened_by is None, "read in the main process"
