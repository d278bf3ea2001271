"""The order of an epoch: the same for any number of ranks, and from any batch on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagewise.recipes.order import EpochOrder


def batches(size, batch_size, ranks=1, epoch=0, start=None, **options):
    """What all ranks train on, a set for each step."""
    parts = []
    for rank in range(ranks):
        order = EpochOrder(range(size), batch_size, rank=rank, num_replicas=ranks, **options)
        order.set_epoch(epoch)
        if start is not None:
            order.start(epoch, start)
        parts.append(torch.tensor(list(order), dtype=torch.int64).reshape(-1, batch_size))
    return torch.stack(parts, 2).flatten(1)  # as one rank would have them


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 60), st.integers(0, 3), st.integers(0, 9)
)
def test_ranks_share_the_batches_of_one(ranks, batch_size, more, epoch, seed):
    size = ranks * batch_size + more
    one = batches(size, ranks * batch_size, epoch=epoch, seed=seed)
    assert torch.equal(one, batches(size, batch_size, ranks, epoch=epoch, seed=seed))
    assert len(one) == size // (ranks * batch_size)
    assert len(set(one.flatten().tolist())) == one.numel()
    assert 0 <= one.min() <= one.max() < size


def test_epochs_and_seeds_differ_and_cover_all():
    first, second = batches(40, 4), batches(40, 4, epoch=1)
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist()) == list(range(40))
    assert not torch.equal(first, second)
    assert not torch.equal(first, batches(40, 4, seed=1))


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_begins_behind_a_batch_once(ranks):
    whole = batches(43, 4, ranks, epoch=2)
    for start in range(len(whole)):
        assert torch.equal(batches(43, 4, ranks, epoch=2, start=start), whole[start:])
    order = EpochOrder(range(43), 4)
    order.start(2, 3)
    assert len(list(order)) == 40 - 12
    assert len(order) == len(list(order)) == 40
    # Behind the last batch comes the next epoch.
    order.start(2, 10)
    assert list(order) == batches(43, 4, epoch=3).flatten().tolist()
    # Another epoch begins at its beginning.
    order.start(2, 3)
    order.set_epoch(2)
    assert len(list(order)) == 28
    order.start(2, 3)
    order.set_epoch(3)
    assert len(list(order)) == 40


def test_until_a_batch_is_trained_on_lightning_may_count_otherwise():
    trained = []
    order = EpochOrder(range(43), 4, trained=lambda: len(trained))
    for calls in ([1], [2], [3], [1, 2], [2, 3]):
        order.start(2, 3)
        for called in calls:
            order.set_epoch(called)
        assert list(order) == batches(43, 4, epoch=2, start=3).flatten().tolist()
        order.start(2, 3)
        for called in calls:
            order.set_epoch(called)
        trained.append(calls)
        order.set_epoch(calls[-1])
        assert len(list(order)) == 28
        order.set_epoch(calls[-1] + 1)
        assert list(order) == batches(43, 4, epoch=3).flatten().tolist()


def test_epochs_are_told_before_their_order_is_made():
    told = []
    order = EpochOrder(range(8), 2, on_epoch=told.append)
    for epoch in (0, 5):
        order.set_epoch(epoch)
        list(order)
    assert told == [0, 5]


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="4 on each of 2 ranks, got 7"):
        EpochOrder(range(7), 4, num_replicas=2)
