"""The training set is read again as training reads it, and leaves no trace in the run."""

import functools
import importlib
import random
import warnings
from multiprocessing import active_children

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stagewise.callbacks import PosteriorMonitor, bank_from_trainer
from stagewise.callbacks.host import TrainerHost
from stagewise.callbacks.training_bank import read_rows

pytestmark = pytest.mark.usefixtures("quick_figures")

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(11))
LABELS = torch.arange(64) % 4
GLOBAL = np.random.default_rng(7)

small = functools.partial(PosteriorMonitor, every_n_steps=2, strata=4, queries=4)


class Noisy(Dataset):
    """Samples with noise from one of the places where people draw it."""

    def __init__(self, source):
        self.source = source
        self.torch, self.numpy = torch.Generator(), np.random.default_rng(0)
        self.state, self.python = np.random.RandomState(0), random.Random(0)

    def __len__(self):
        return 64

    def __getitem__(self, i):
        draw = {
            "torch": lambda: float(torch.randn(())),
            "numpy": np.random.randn,
            "random": lambda: random.gauss(0, 1),
            "own torch": lambda: float(torch.randn((), generator=self.torch)),
            "own numpy": self.numpy.standard_normal,
            "own state": self.state.standard_normal,
            "own random": lambda: self.python.gauss(0, 1),
            "global numpy": GLOBAL.standard_normal,
            # The same for each sample as long as a worker lives.
            "of the worker": lambda: np.random.default_rng(torch.initial_seed() % 2**32).random(),
            "one in five": lambda: float(torch.rand(()) < 0.2),
        }
        return X[i] + draw[self.source]()


def alike(worker):
    for reseed in (random.seed, np.random.seed, torch.manual_seed):
        reseed(5)


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "other values of x_1" in str(w.message)]


SOURCES = [
    *("torch", "numpy", "random", "own torch", "own numpy", "own state", "own random"),
    *("global numpy", "one in five"),
]
HERE, FORK = {"num_workers": 0}, {"num_workers": 1}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("source", "workers"),
    [
        *((source, HERE) for source in SOURCES),
        *((source, FORK | {"worker_init_fn": alike}) for source in SOURCES[:3]),
        *(slow(source, FORK | {"worker_init_fn": alike}) for source in SOURCES[3:]),
        ("torch", {"num_workers": 2}),
        ("own numpy", {"num_workers": 2, "worker_init_fn": alike, "persistent_workers": True}),
        ("of the worker", FORK),
    ],
)
def test_augmentation_is_seen_whatever_draws(source, workers, make_trainer, tiny_flow):
    data = DataLoader(Noisy(source), 8, **workers)
    take = Take()
    assert len(said(lambda: make_trainer(take, max_steps=1).fit(tiny_flow(), data))) == 1
    assert len(take.bank) == 64


STARTED = """
import numpy as np, torch

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, i):
        return torch.ones(6) * i + np.random.randn()
"""


@pytest.mark.slow
def test_augmentation_is_seen_in_workers_that_are_not_forked(
    make_trainer, tiny_flow, power_cut, tmp_path, monkeypatch
):
    (tmp_path / "started.py").write_text(STARTED)  # what such workers can import
    monkeypatch.syspath_prepend(tmp_path)
    noisy = importlib.import_module("started").Noisy()
    data = DataLoader(noisy, 8, num_workers=1, multiprocessing_context="spawn")

    class Read(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            bank_from_trainer(trainer, pl_module)
            raise power_cut  # training would start a worker of its own, and `Take` some more

    def run():
        with pytest.raises(power_cut):
            make_trainer(Read()).fit(tiny_flow(), data)

    assert len(said(run)) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["collate", "hook", "read_batch"])
def test_augmentation_of_batches_is_seen(where, workers, make_trainer, tiny_flow):
    def augment(batch):
        return batch + torch.rand(())

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            collate = {"collate_fn": lambda rows: augment(torch.stack(rows))}
            return DataLoader(X, 8, num_workers=workers, **(collate if where == "collate" else {}))

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return augment(batch) if where == "hook" else batch

    find = {"read_batch": lambda batch: (augment(batch), None)} if where == "read_batch" else {}
    run = make_trainer(Take(**find), max_steps=1)
    assert len(said(lambda: run.fit(tiny_flow(), datamodule=Data()))) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_stay_raise_no_alarm(workers, dtype, make_trainer, tiny_flow):
    data = DataLoader(TensorDataset(X, LABELS), 8, shuffle=True, num_workers=workers)
    run = make_trainer(Take(dtype=dtype), max_steps=1)
    assert said(lambda: run.fit(tiny_flow(), data)) == []


class Take(pl.Callback):
    """Reads the bank, and a few rows twice."""

    def __init__(self, **options):
        self.options = options

    def on_train_start(self, trainer, pl_module):
        self.bank = bank_from_trainer(trainer, pl_module, **self.options)
        find = {"read_batch": self.options["read_batch"]} if "read_batch" in self.options else {}
        host = TrainerHost(trainer, pl_module)
        rows = (read_rows(host, trainer.train_dataloader, 12, seed=4, **find)[0] for _ in range(2))
        self.first, self.second = rows


@pytest.mark.parametrize(
    ("source", "workers"),
    [
        *((source, 0) for source in (*SOURCES, "of the worker")),
        *((source, 1) for source in ("torch", "global numpy", "of the worker")),
        *(slow(source, 1) for source in SOURCES if source not in ("torch", "global numpy")),
    ],
)
@pytest.mark.filterwarnings("ignore:The training set gives other values")
def test_training_draws_what_it_would_have_drawn(source, workers, make_trainer, tiny_flow, weights):
    def run(*callbacks):
        global GLOBAL
        pl.seed_everything(2, verbose=False)
        GLOBAL = np.random.default_rng(7)
        model = tiny_flow()
        generator = torch.Generator().manual_seed(3)
        options = {"shuffle": True, "generator": generator, "num_workers": workers}
        make_trainer(*callbacks).fit(model, DataLoader(Noisy(source), 8, **options))
        left = [random.random(), np.random.rand(), float(torch.rand(())), GLOBAL.random()]
        return [*weights(model).tolist(), *left]

    take = Take()
    assert run(take) == run()
    assert torch.equal(take.first, take.second), "the same seed gives the same draws"


class Encodes(pl.LightningModule):
    """Encodes in its step by a network with statistics and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)
        )
        self.frozen = torch.nn.Dropout(0.5).eval()

    def training_step(self, batch, batch_idx):
        return self.encoder(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_find_may_ask_the_module_and_leaves_no_trace(make_trainer, weights):
    asked = []

    def run(*callbacks):
        pl.seed_everything(2, verbose=False)
        make_trainer(*callbacks).fit(module, DataLoader(X, 8))
        assert [part.training for part in module.modules()] == modes
        return [*weights(module).tolist(), *module.encoder[1].running_mean.tolist()]

    def find(batch):
        asked.append((module.training, module.encoder[2].training, torch.is_grad_enabled()))
        return module.encoder(batch), None

    module = Encodes()
    modes = [part.training for part in module.modules()]
    take = Take(read_batch=find)
    plain = run()
    module = Encodes()
    assert said(lambda: asked.append(run(take))) == []
    assert asked.pop() == plain
    assert set(asked) == {(False, False, False)}


# -- batches that are no rows of a bank ---------------------------------------------------------


def refused(data, make_trainer, module, message, **options):
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(Take(**options), max_steps=1).fit(module, data)
    assert "LatentBank(" in str(error.value) or "read_batch=lambda" in str(error.value)
    assert not active_children()  # while the error is held
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_collate_that_drops_samples_is_named(workers, make_trainer, tiny_flow):
    def collate(rows):
        return torch.stack([row for row in rows if row[0] not in (9, 51)])

    x = X.clone()
    x[:, 0] = torch.arange(64)
    data = DataLoader(x, 8, collate_fn=collate, num_workers=workers)
    message = refused(data, make_trainer, tiny_flow(), "Expected an x_1 for each of 8 samples")
    assert "the first batch gave float32 tensor (8, 6)" in message
    assert "(8 to 15), got float32 tensor (7, 6)" in message


def test_collate_that_gives_views_is_named(make_trainer, tiny_flow):
    data = DataLoader(X, 8, collate_fn=lambda rows: torch.stack(rows + rows))
    refused(data, make_trainer, tiny_flow(), r"each of 8 samples \(0 to 14\), got .* \(16, 6\)")


class Ragged(Dataset):
    """Sequences of several lengths, alike within eight."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.ones(4 + i // 8, 2) * i


@pytest.mark.parametrize("size", [4, 8])
def test_shapes_that_differ_between_batches_are_named(size, make_trainer, tiny_flow):
    pad = torch.nn.utils.rnn.pad_sequence
    data = DataLoader(Ragged(), size, collate_fn=lambda rows: pad(rows, batch_first=True))
    message = refused(data, make_trainer, tiny_flow(), "Expected x_1 of one shape")
    assert f"float32 tensor ({size}, " in message
    assert "Pad or crop all to one shape" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_collated_in_order_is_named(workers, make_trainer, tiny_flow):
    # Buckets of one length each, as a sampler of batches makes them.
    buckets = [[4 * k, 4 * k + 1] for k in range(16)]
    data = DataLoader(Ragged(), batch_sampler=buckets, num_workers=workers)
    message = refused(data, make_trainer, tiny_flow(), "cannot be read in its own order")
    assert "equal size" in message


def test_labels_in_some_batches_only_are_named(make_trainer, tiny_flow):
    labels = LABELS.float()
    labels[40] = 0.5
    data = DataLoader(TensorDataset(X, labels), 8)
    refused(data, make_trainer, tiny_flow(), "labels in all batches or in none")
    take = Take(class_wise=False)
    take.on_train_start = lambda trainer, module: setattr(
        take, "bank", bank_from_trainer(trainer, module, class_wise=False)
    )
    make_trainer(take, max_steps=1).fit(tiny_flow(), data)
    assert take.bank.classes == []
    assert len(take.bank) == 64
