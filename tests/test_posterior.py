"""The one softmax: equal rows, rows that are not listed, no rows, and the order of parts."""

import pytest
import torch

from stagewise import Posterior, merge
from stagewise.posterior import Rest, posterior_of, replace_queries

STATISTICS = ("log_evidence", "entropy", "ess", "weights", "tail_mass")


def logits(*shape, seed=0):
    return 5 * torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def of(values, first=0, k=3):
    rows = first + torch.arange(values.shape[1]).expand(len(values), -1)
    return posterior_of(values, rows, k)


def same(one, other):
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), msg=name)


def test_statistics_are_those_of_the_softmax():
    values = logits(4, 9)
    post, shares = of(values)
    gamma = values.softmax(1)
    torch.testing.assert_close(shares, gamma)
    torch.testing.assert_close(post.log_evidence, values.logsumexp(1))
    torch.testing.assert_close(post.entropy, torch.special.entr(gamma).sum(1))
    torch.testing.assert_close(post.ess, 1 / gamma.square().sum(1))
    top = gamma.topk(3, 1)
    torch.testing.assert_close(post.weights, top.values)
    assert torch.equal(post.rows, top.indices)


def test_a_class_of_fewer_rows_than_are_asked_for():
    post, shares = posterior_of(logits(3, 4), torch.arange(4).expand(3, -1), 7)
    torch.testing.assert_close(shares.sum(1), torch.ones(3).double())
    assert (post.rows[:, 4:] == -1).all()
    assert (post.weights[:, 4:] == 0).all()


def test_rows_that_are_not_listed():
    values = logits(5, 30).sort(1, descending=True).values
    peak = values[:, 0]
    others = values[:, 10:] - peak[:, None]
    w = others.exp()
    rest = Rest(peak, w.sum(1), w.square().sum(1), (w * others).sum(1))
    listed = values[:, :10] - peak[:, None]
    post, shares = posterior_of(listed, torch.arange(10).expand(5, -1), 3, rest=rest)
    whole, every = of(values)
    same(post, whole)
    torch.testing.assert_close(shares, every[:, :10])


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_parts_merge_to_the_whole_and_no_rows_to_nothing(cut):
    values = logits(6, 9)
    parts = [of(values[:, :cut])[0], of(values[:, cut:], first=cut)[0]]
    empty = Posterior.empty(values[:, :0], 3)
    same(merge(*parts, empty, k=3), of(values)[0])
    assert torch.equal(merge(*parts, k=3).rows, of(values)[0].rows)


def test_queries_without_a_row_have_numbers():
    values = logits(2, 3)
    post, shares = posterior_of(values, torch.tensor([[-1, -1, -1], [4, -1, 7]]), 2)
    assert post.log_evidence[0] < -1e29
    assert shares.isfinite().all()
    torch.testing.assert_close(post.log_evidence[1], values[1, [0, 2]].logsumexp(0))
    assert set(post.rows[1].tolist()) == {4, 7}


def test_parts_of_a_batch_are_put_where_they_belong():
    values = logits(5, 6)
    whole, _ = of(values)
    mixed = Posterior.cat([of(values[[3, 0]])[0], of(values[[4, 2, 1]])[0]], [3, 0, 4, 2, 1])
    same(mixed, whole)
    wrong, _ = of(logits(5, 6, seed=1))
    same(
        replace_queries(
            replace_queries(wrong, [1, 4], of(values[[1, 4]])[0], 5),
            [0, 2, 3],
            of(values[[0, 2, 3]])[0],
            5,
        ),
        whole,
    )
