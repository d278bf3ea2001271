"""Which rows a loader draws, whatever the sampler, and what is said where a bank is not these."""

import itertools
import random
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stagewise.callbacks import PosteriorMonitor, bank_from_trainer
from stagewise.callbacks.host import TrainerHost
from stagewise.callbacks.training_bank import _drawn as drawn_rows
from stagewise.callbacks.training_bank import read_rows
from stagewise.recipes.order import EpochOrder

pytestmark = pytest.mark.usefixtures("quick_figures")

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(11))
PLACES = torch.arange(64).float()[:, None]
CHOSEN = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:40].tolist()


def loader(x=X, **options):
    return DataLoader(TensorDataset(x), **({"batch_size": 8} | options))


class Draws(Sampler):
    """A sampler of its own class, from a function of itself; counts its epochs."""

    def __init__(self, draw, length=64):
        self.draw, self.length, self.epoch, self.rng = draw, length, 0, np.random.default_rng(5)

    def __iter__(self):
        self.epoch += 1
        return iter(self.draw(self))

    def __len__(self):
        return self.length


class Batches(Sampler):
    """A batch sampler without `sampler`."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def rows_of(data, world=1, limit=float("inf"), *, training=True, say=False, **options):
    """The rows that are drawn, and what is warned of."""
    trainer = SimpleNamespace(
        **(
            {"fast_dev_run": False, "num_training_batches": min(limit, len(data))}
            | {"max_epochs": 1000, "max_steps": -1, "accumulate_grad_batches": 1}
            | options
        )
    )
    limits = TrainerHost.limits.fget(SimpleNamespace(trainer=trainer, automatic=True))
    host = SimpleNamespace(limits=limits, world_size=world, epoch=0, known=())
    host.loader = data if training else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = drawn_rows(host, data, say=say)
    return list(rows), [str(w.message) for w in caught]


def first(count):
    return list(range(count))


# -- limits -------------------------------------------------------------------------------------


class Seen(pl.LightningModule):
    """Notes the rows it is trained on."""

    def __init__(self):
        super().__init__()
        self.w, self.rows = torch.nn.Parameter(torch.zeros(())), set()

    def training_step(self, batch, batch_idx):
        self.rows.update(int(place) for place in batch[0].flatten())
        return self.w * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Take(pl.Callback):
    """Reads a bank and a few rows at the start."""

    def on_train_start(self, trainer, pl_module):
        bank = bank_from_trainer(trainer, pl_module)
        self.bank = bank.take(torch.arange(len(bank)))[:, 0].int().tolist()
        x1, _ = read_rows(TrainerHost(trainer, pl_module), trainer.train_dataloader, 64)
        self.read = x1[:, 0].int().tolist()


SHUFFLED = {"shuffle": True}


@pytest.mark.parametrize(
    ("options", "data", "rows"),
    [
        ({"overfit_batches": 1}, {}, first(8)),
        ({"overfit_batches": 2}, SHUFFLED, first(16)),
        ({"overfit_batches": 0.5}, {}, first(32)),
        ({"limit_train_batches": 3}, {}, first(24)),
        ({"limit_train_batches": 0.25}, {}, first(16)),
        ({"limit_train_batches": 100}, {}, first(64)),
        ({"limit_train_batches": 2}, SHUFFLED, first(64)),
        ({}, {"batch_size": 10, "drop_last": True}, first(60)),
        ({}, {"batch_size": 10, "drop_last": True} | SHUFFLED, first(64)),
        ({"limit_train_batches": 2}, {"sampler": CHOSEN}, sorted(CHOSEN[:16])),
        (
            {"overfit_batches": 1},
            {"batch_sampler": Batches([3, 1], [2, 5]), "batch_size": 1},
            [1, 3],
        ),
        ({"overfit_batches": 1}, {"sampler": DistributedSampler(X, 1, 0)}, first(8)),
        ({"limit_train_batches": 1}, {"sampler": DistributedSampler(X, 1, 0)}, first(64)),
    ],
)
def test_the_bank_holds_what_is_trained_on(options, data, rows, make_trainer):
    take, module = Take(), Seen()
    run = make_trainer(take, max_steps=-1, max_epochs=40, **options)
    run.fit(module, loader(PLACES, **data))
    assert module.rows == set(rows), "40 epochs come to all rows"
    assert take.bank == rows
    assert take.read == rows


def test_a_subset_is_cut_in_its_own_order(make_trainer):
    take, module = Take(), Seen()
    data = DataLoader(Subset(TensorDataset(PLACES), CHOSEN), 8)
    make_trainer(take, max_steps=-1, max_epochs=1, limit_train_batches=2).fit(module, data)
    assert take.bank == CHOSEN[:16]
    assert module.rows == set(CHOSEN[:16])


def test_a_trial_run_cuts_nothing(make_trainer):
    take = Take()
    make_trainer(take, max_steps=-1, fast_dev_run=1).fit(Seen(), loader(PLACES))
    assert take.bank == first(64)


def test_the_boundary_is_that_of_the_rows_trained_on(make_trainer, tiny_flow):
    def boundary(monitor, data, **options):
        make_trainer(monitor, **options).fit(tiny_flow(), data)
        return monitor.history[0]["midpoint"]

    few = PosteriorMonitor(strata=4, queries=16), PosteriorMonitor(strata=4, queries=16)
    assert boundary(few[0], loader(), overfit_batches=1) == boundary(few[1], loader(X[:8]))


# -- samplers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (loader(sampler=Draws(lambda self: CHOSEN)), sorted(CHOSEN)),
        (loader(sampler=Draws(lambda self: np.array(CHOSEN))), sorted(CHOSEN)),
        (loader(sampler=Draws(lambda self: self.rng.permutation(CHOSEN))), sorted(CHOSEN)),
        (loader(sampler=Draws(lambda self: random.sample(CHOSEN, 40))), sorted(CHOSEN)),
        (loader(sampler=Draws(lambda self: self.rng.permutation(64))), first(64)),
        (loader(sampler=Draws(lambda self: [-1, -2, 5])), [5, 62, 63]),
        (loader(sampler=range(40)), first(40)),
        (loader(sampler=RandomSampler(range(40))), first(40)),
        (loader(batch_sampler=Batches([4, 9], (2, 1)), batch_size=1), [1, 2, 4, 9]),
        (loader(batch_sampler=BatchSampler(Draws(lambda self: CHOSEN), 8, True), batch_size=1),
         sorted(CHOSEN)),
        (loader(sampler=Draws(lambda self: itertools.cycle(range(10)))), first(10)),
        (loader(sampler=RandomSampler(X, replacement=True, num_samples=64)), first(64)),
        (loader(sampler=SubsetRandomSampler(CHOSEN)), CHOSEN),
        (loader(sampler=WeightedRandomSampler([0.0, 1.0] * 32, 64)), first(64)[1::2]),
    ],
)  # fmt: skip
def test_rows_of_any_sampler(data, rows):
    assert rows_of(data, say=True) == (rows, [])


def test_rows_of_weight_zero_leave_the_bank_and_the_others_are_said_to_be_weighted():
    weights = torch.rand(64) + 0.1
    weights[::2] = 0
    rows, (message,) = rows_of(loader(sampler=WeightedRandomSampler(weights, 64)), say=True)
    assert rows == first(64)[1::2]
    assert "draws its samples with weights" in message


def test_a_part_that_is_another_each_epoch_is_named():
    data = loader(sampler=Draws(lambda self: self.rng.permutation(64)[:20]))
    rows, (message,) = rows_of(data, say=True)
    assert rows == first(64)
    assert "draws 20 of 64 samples in one epoch and 20 in the next, not the same ones" in message
    assert "Subset(dataset, indices)" in message
    # Two halves in turn: nothing is left out.
    data = loader(sampler=Draws(lambda self: range(self.epoch % 2, 64, 2)))
    assert rows_of(data, say=True) == (first(64), [])


def test_a_shuffle_that_leaves_out_less_than_a_batch_is_not_named():
    ragged = Draws(lambda self: self.rng.permutation(64)[:60])
    assert rows_of(loader(batch_size=10, sampler=ragged), say=True) == (first(64), [])
    # As many left out, but in smaller batches: that is no end of an epoch.
    _, (message,) = rows_of(loader(batch_size=4, sampler=ragged), say=True)
    assert "not the same ones" in message


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_order_of_the_recipes_is_looked_at_without_its_run(epoch):
    told = []
    order = EpochOrder(range(64), 10, on_epoch=told.append, trained=lambda: 7)
    order.start(epoch, 2)
    assert rows_of(loader(batch_size=10, sampler=order), say=True) == (first(64), [])
    assert told == []
    assert order.epoch == epoch
    assert len(list(order)) == 40, "it goes on in the middle of its epoch"
    assert told == [epoch]


@pytest.mark.parametrize("holder", ["module", "trainer", "data"])
def test_what_a_sampler_refers_to_of_the_run_is_not_copied(holder, make_trainer):
    class Refuses:
        def __deepcopy__(self, memo):
            raise AssertionError("copied with the sampler")

    module, data = Seen(), pl.LightningDataModule()
    sampler = Draws(lambda self: CHOSEN, len(CHOSEN))
    data.train_dataloader = lambda: loader(PLACES, sampler=sampler)
    trainer = make_trainer(take := Take(), max_steps=1)
    sampler.run = {"module": module, "trainer": trainer, "data": data}[holder]
    sampler.run.heavy = Refuses()
    trainer.fit(module, datamodule=data)
    assert take.bank == sorted(CHOSEN)


@pytest.mark.parametrize("draws", [[*range(64), *range(16)], [0] * 3 + first(64), [1, 1, 2, 3] * 8])
def test_samples_that_are_drawn_more_often_are_named(draws):
    rows, (message,) = rows_of(loader(sampler=Draws(lambda self: draws, len(draws))), say=True)
    assert rows == sorted(set(draws))
    assert f"up to {max(map(draws.count, draws))} times in an epoch (Draws)" in message
    assert "posterior is that of unweighted training" in message
    three = loader(sampler=Draws(lambda self: first(64) * 3, 192))
    assert rows_of(three, say=True) == (first(64), []), "alike"


def test_a_sampler_without_an_end_is_looked_at_for_a_while(lightning_log):
    def endless(self):
        while True:
            yield from self.rng.permutation(64)

    def weighted(self):
        while True:
            yield int(64 * self.rng.random() ** 3)

    assert rows_of(loader(sampler=Draws(endless)), say=True) == (first(64), [])
    assert "The sampler has no end: 256 of its draws were read" in lightning_log.text
    rows, messages = rows_of(loader(sampler=Draws(weighted)), say=True)
    assert rows == first(64)
    assert ["some samples more often than others" in one for one in messages] == [False, True]


def test_looking_disturbs_nothing(make_trainer):
    generator = torch.Generator().manual_seed(3)

    def draw(self):
        random.random(), np.random.rand(), torch.rand(())
        return torch.randperm(64, generator=generator)[: 20 + int(self.rng.integers(9))].tolist()

    def trained_on(*callbacks):
        pl.seed_everything(1, verbose=False)
        generator.manual_seed(3)
        module = Seen()
        module.on_train_batch_start = lambda batch, index: orders.append(batch[0].clone())
        make_trainer(*callbacks, max_steps=6).fit(module, loader(PLACES, sampler=Draws(draw)))
        return orders, [random.random(), np.random.rand(), float(torch.rand(()))]

    orders = []
    plain, draws = trained_on()
    orders = []
    watched, same = trained_on(Take())
    assert draws == same
    assert len(plain) == len(watched) == 6
    assert all(map(torch.equal, plain, watched))


def test_what_cannot_be_looked_at_is_said():
    sampler = Draws(lambda self: CHOSEN)
    sampler.lock = (number for number in range(3))
    rows, (message,) = rows_of(loader(sampler=sampler), say=True)
    assert rows == first(64)
    assert "with Draws, a copy of which failed (TypeError: cannot pickle" in message


@pytest.mark.parametrize(
    ("draws", "got"), [([("a", 1)], "'a', 1"), ([3, 64], "64"), (["b"], "'b'")]
)
def test_what_is_no_position_is_refused(draws, got):
    with pytest.raises(ValueError, match=f"of positions .*got .*{got}.*Give the bank yourself"):
        rows_of(loader(sampler=Draws(lambda self: draws)))


# -- several processes --------------------------------------------------------------------------


def ranked(sampler, **options):
    return loader(sampler=sampler, **options)


@pytest.mark.parametrize(
    ("data", "limit", "rows"),
    [
        (ranked(DistributedSampler(X, 2, 0, shuffle=False)), 2, first(32)),
        (ranked(DistributedSampler(X, 2, 1, shuffle=False)), 2, first(32)),
        (ranked(DistributedSampler(X, 2, 1, shuffle=False)), 99, first(64)),
        (ranked(DistributedSampler(X, 2, 1)), 1, first(64)),
        # 61 rows on 2 ranks: one is drawn twice, or left out.
        (ranked(DistributedSampler(X[:61], 2, 1, shuffle=False)), 99, first(61)),
        (ranked(DistributedSampler(X[:61], 2, 1, shuffle=False, drop_last=True)), 99, first(60)),
        (ranked(DistributedSampler(X, 2, 0, shuffle=False), batch_size=10, drop_last=True), 99,
         first(60)),
        (ranked(DistributedSamplerWrapper(Draws(lambda self: CHOSEN, 40), num_replicas=2, rank=0)),
         99, sorted(CHOSEN)),
        (ranked(DistributedSamplerWrapper(SubsetRandomSampler(CHOSEN), num_replicas=2, rank=1)), 99,
         CHOSEN),
        (ranked(SequentialSampler(X)), 3, first(24)),
    ],
)  # fmt: skip
def test_rows_of_all_ranks(data, limit, rows):
    assert rows_of(data, world=2, limit=limit, say=True) == (rows, [])


def test_a_sampler_that_hides_its_rank_is_named():
    rows, (message,) = rows_of(loader(sampler=Draws(lambda self: range(0, 64, 2))), 2, say=True)
    assert rows == first(64)
    assert "32 of 64 samples on this process (Draws)" in message


# -- fewer draws than rows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({"limit": 2, "max_epochs": 3}, 48),
        ({"limit": 2, "max_epochs": 4}, None),
        ({"limit": 1, "max_epochs": -1, "max_steps": 3}, 24),
        ({"limit": 1, "max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 2}, 48),
        ({"limit": 1, "max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 3}, None),
        ({"limit": 1, "max_epochs": 2, "world": 3}, 48),
    ],
)
def test_a_training_that_draws_fewer_samples_than_rows_is_named(options, draws):
    rows, messages = rows_of(loader(shuffle=True), say=True, **options)
    assert rows == first(64)
    if draws is None:
        assert messages == []
    else:
        (message,) = messages
        assert f"draws {draws} samples in the whole training, and the bank holds the 64" in message
    assert rows_of(loader(shuffle=True), training=False, say=True, **options)[1] == []


def test_a_short_run_over_whole_epochs_is_only_logged(lightning_log):
    assert rows_of(loader(shuffle=True), say=True, max_steps=4)[1] == []
    assert "draws 32 samples in the whole training" in lightning_log.text
