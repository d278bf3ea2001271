"""A bank with masks is as many banks as there are masks, each cut to the numbers that count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stagewise import Certificate, LatentBank, Mix, Oracle, ReferenceSet, Scheme, Smoothing, Target
from stagewise.batches import read_checked, seems_padded, unused_in
from stagewise.copies import nearest_rows
from stagewise.engines import Sharded
from stagewise.losses import FlowMatchingLoss, OracleRegularizer, StageWeightedLoss
from stagewise.masks import MaskedLabels, require_same_masks
from stagewise.stages import _ask
from stagewise.velocity_probe import errors_of, noisy_targets

LONGEST, WIDTH, ROWS = 6, 3, 40


def _data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (N, L, d), float64, labels and masks (N, L); some with a hole in the middle."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, LONGEST, WIDTH, generator=draws, dtype=torch.float64)
    lengths = torch.tensor([2, 4, 4, 6])[torch.arange(ROWS) % 4]
    mask = torch.arange(LONGEST) < lengths[:, None]
    mask[::8, 1] = False
    return x, torch.randint(0, 2, (ROWS,), generator=draws), mask


def _queries(x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    t = torch.rand(len(x), generator=draws, dtype=torch.float64) * 0.9
    x0 = torch.randn(x.shape, generator=draws, dtype=torch.float64)
    return t[:, None, None] * x + (1 - t[:, None, None]) * x0, t


def _alike(mask: Tensor) -> Iterator[Tensor]:
    """The positions of samples of the same mask."""
    _, kind = mask.unique(dim=0, return_inverse=True)
    for number in range(int(kind.max()) + 1):
        yield (kind == number).nonzero()[:, 0]


@pytest.mark.parametrize("labelled", [False, True])
def test_a_bank_with_masks_is_a_bank_for_each_mask(labelled: bool) -> None:
    x, y, mask = _data()
    xt, t = _queries(x)
    oracle = Oracle(LatentBank(x, y if labelled else None, mask=mask))
    labels = y if labelled else None
    found = oracle.posterior(xt, t, labels, mask=mask, k=3)
    gap = oracle.correction(xt, t, x, labels, mask=mask)
    u = oracle.velocity(xt, t, labels, mask=mask)
    for at in _alike(mask):
        valid = mask[at[0]]
        own = y[at] if labelled else None
        other = Oracle(LatentBank(x[at][:, valid], own))
        post = other.posterior(xt[at][:, valid], t[at], own, k=3)
        for name in ("log_evidence", "entropy", "ess", "weights"):
            torch.testing.assert_close(
                getattr(found, name)[at], getattr(post, name), rtol=1e-9, atol=1e-10
            )
        torch.testing.assert_close(found.mean[at][:, valid], post.mean, rtol=0, atol=1e-12)
        assert not found.mean[at][:, ~valid].any()
        best = other.correction(xt[at][:, valid], t[at], x[at][:, valid], own)
        torch.testing.assert_close(gap[at][:, valid], best, rtol=0, atol=1e-10)
        assert not gap[at][:, ~valid].any()
        best = other.velocity(xt[at][:, valid], t[at], own)
        torch.testing.assert_close(u[at][:, valid], best, rtol=0, atol=1e-10)
        assert not u[at][:, ~valid].any()


@pytest.mark.parametrize("fill", [torch.nan, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_under_the_padding_change_no_number(fill: float, dtype: torch.dtype) -> None:
    x, y, mask = _data()
    xt, t = _queries(x)
    filled, xt_filled = (v.masked_fill(~mask[..., None], fill) for v in (x, xt))
    one = Oracle(LatentBank(x, y, mask=mask, dtype=dtype))
    two = Oracle(LatentBank(filled, y, mask=mask, dtype=dtype))
    assert one.bank.fingerprint == two.bank.fingerprint
    assert one.bank.std == two.bank.std
    for labels in (y, None):
        a = one.posterior(xt, t, labels, mask=mask)
        b = two.posterior(xt_filled, t, labels, mask=mask)
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.log_evidence, b.log_evidence)
        assert not a.mean[~mask].any()  # also of rows of 16 bits
        a = one.correction(xt, t, x, labels, mask=mask)
        assert torch.equal(a, two.correction(xt_filled, t, filled, labels, mask=mask))


def test_labels_that_are_none_look_at_all_rows_of_the_mask() -> None:
    x, y, mask = _data()
    xt, t = _queries(x)
    bank = LatentBank(x, y, mask=mask)
    none = Oracle(bank).posterior(xt, t, mask=mask).mean
    mixed = Oracle(bank).posterior(xt, t, [None, *y[1:].tolist()], mask=mask).mean
    null = Oracle(bank, null_class=1).posterior(xt, t, y, mask=mask).mean
    wise = Oracle(bank).posterior(xt, t, y, mask=mask).mean
    assert torch.equal(mixed[0], none[0])
    assert bank.largest_class == torch.unique(mask, dim=0, return_counts=True)[1].max()
    torch.testing.assert_close(mixed[1:], wise[1:], rtol=0, atol=1e-13)
    torch.testing.assert_close(null, torch.where((y == 1)[:, None, None], none, wise))


def test_batches_of_their_own_lengths_make_the_same_bank(tmp_path: Path) -> None:
    x, y, mask = _data()
    lengths = mask.shape[1] - mask.flip(1).int().argmax(1)
    bank = LatentBank(x, y, mask=mask)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for at in torch.arange(ROWS).split(7):
            longest = int(lengths[at].max())
            yield x[at, :longest], y[at], mask[at, :longest]

    read = LatentBank.from_batches(batches(), ROWS, read_batch=lambda batch: batch)
    assert read.fingerprint == bank.fingerprint
    whole = ((x[at], y[at], mask[at]) for at in torch.arange(ROWS).split(7))
    path = tmp_path / "bank.safetensors"
    written = LatentBank.write(
        path, whole, ROWS, labels=y, mask=mask, read_batch=lambda batch: batch
    )
    for other in (written, LatentBank.open(path), bank.part(slice(None))):
        assert other.fingerprint == bank.fingerprint
        assert (other.std, other.classes) == (bank.std, bank.classes)
        assert torch.equal(other.classes_of([0, 39]).entries, bank.classes_of([0, 39]).entries)  # type: ignore[union-attr]
    # A batch that is shorter than the longest row is answered at its own length.
    short = (lengths <= 4).nonzero()[:5, 0]
    xt, t = _queries(x)
    want = Oracle(bank).correction(xt[short], t[short], x[short], mask=mask[short])
    cut = (v[short, :4] for v in (xt, x, mask))
    xt4, x4, mask4 = cut
    assert torch.equal(Oracle(bank).correction(xt4, t[short], x4, mask=mask4), want[:, :4])


def test_lengths_beyond_the_samples_are_refused() -> None:
    x, _, mask = _data()
    with pytest.raises(ValueError, match=rf"at most {LONGEST}, the steps .* got {LONGEST + 1}"):
        LatentBank(x, mask=mask.sum(1) + 1)


def test_lengths_and_masks_of_fewer_axes_are_the_same_mask() -> None:
    x, _, _ = _data()
    lengths = torch.arange(ROWS) % LONGEST + 1
    mask = torch.arange(LONGEST) < lengths[:, None]
    names = {
        LatentBank(x, mask=one).fingerprint
        for one in (lengths, mask, mask[..., None], mask[..., None].expand_as(x))
    }
    assert len(names) == 1
    turned = LatentBank(x.transpose(1, 2), mask=mask[:, None])
    assert turned.std == pytest.approx(LatentBank(x, mask=mask).std)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(ROWS, LONGEST), "Give mask.bool()"),
        (torch.ones(ROWS, WIDTH, dtype=torch.bool), "mask[:, None]"),
        (torch.ones(ROWS - 1, LONGEST, dtype=torch.bool), "first axes"),
        (torch.arange(LONGEST) < torch.arange(ROWS)[:, None], "none in row 0"),
        (None, "Expected the masks of the samples"),
    ],
)
def test_wrong_masks_are_refused(mask: Tensor | None, message: str) -> None:
    x, _, good = _data()
    oracle = Oracle(LatentBank(x, mask=good))
    with pytest.raises((TypeError, ValueError)) as error:
        oracle.posterior(x, 0.5, mask=mask)
    assert message in str(error.value)


def test_masks_of_no_row_and_banks_without_masks_are_refused() -> None:
    x, _, mask = _data()
    other = mask.clone()
    other[1, 0] = False
    with pytest.raises(ValueError, match="No row of the bank has this mask"):
        Oracle(LatentBank(x, mask=mask)).posterior(x, 0.5, mask=other)
    with pytest.raises(ValueError, match=r"LatentBank\(x, labels, mask=mask\)"):
        Oracle(LatentBank(x)).posterior(x, 0.5, mask=mask)


def test_find_may_return_a_mask() -> None:
    x, y, mask = _data()
    x1, labels = read_checked(lambda batch: batch, (x, y, mask))
    assert x1 is x
    assert isinstance(labels, MaskedLabels)
    assert torch.equal(labels[3:5].mask, mask[3:5])


def test_floors_errors_and_copies_count_what_is_valid() -> None:
    x, y, mask = _data()
    bank = LatentBank(x, y, mask=mask)
    oracle, noise = Oracle(bank), torch.randn(ROWS, x[0].numel())
    t = torch.linspace(0.05, 0.9, ROWS).double()
    v = torch.randn(x.shape, dtype=torch.float64)
    rows, near = list(range(ROWS)), nearest_rows(bank, v, MaskedLabels.of(None, mask, v))
    statistics = _ask(oracle, noise, t, rows, class_wise=True)
    of_rows = bank.classes_of(rows)
    assert isinstance(of_rows, MaskedLabels)
    own, labels = bank.rows.reshape(x.shape), of_rows.labels
    assert isinstance(labels, Tensor)
    x0 = noise.reshape(x.shape).double()
    xt, u, gap = noisy_targets(oracle, x0, own, t, of_rows)
    errors = errors_of(v, u, u + gap, of_rows)
    for at in _alike(mask):
        copies = nearest_rows(LatentBank(x[at][:, mask[at[0]]]), v[at][:, mask[at[0]]])
        torch.testing.assert_close(near.d1[at], copies.d1, rtol=1e-12, atol=0)
        torch.testing.assert_close(near.d2[at], copies.d2, rtol=1e-12, atol=0)
    for at in _alike(of_rows.mask):
        valid = of_rows.mask[at[0]]
        other = Oracle(LatentBank(own[at][:, valid], labels[at]))
        cut = noise[at].reshape(-1, *x.shape[1:])[:, valid].flatten(1)
        want = _ask(other, cut, t[at], list(range(len(at))), class_wise=True)
        torch.testing.assert_close(statistics[:, at], want, rtol=1e-9, atol=1e-12)
        xt, u, gap = noisy_targets(other, x0[at][:, valid], own[at][:, valid], t[at], labels[at])
        found = errors_of(v[at][:, valid], u, u + gap)
        torch.testing.assert_close(errors[:, at], found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", [Mix(), ReferenceSet(8), ReferenceSet(8, shared=True)])
def test_a_scheme_steers_what_is_valid_and_leaves_the_rest(target: Target) -> None:
    x, y, mask = _data()
    bank = LatentBank(x, y, mask=mask)
    x0 = torch.randn(x.shape, dtype=torch.float64)
    t = torch.linspace(0.05, 0.9, ROWS).double()
    xt = t[:, None, None] * x + (1 - t[:, None, None]) * x0
    scheme = Scheme(Oracle(bank), target=target)
    u, _ = scheme(x - x0, xt=xt, t=t, x1=x, labels=y, mask=mask)
    assert torch.equal(u[~mask], (x - x0)[~mask])
    assert scheme.last is not None
    assert not scheme.last.inserted.any()
    hidden = ~mask[..., None]
    again = Scheme(Oracle(bank), target=target)
    one, two, three = (v.masked_fill(hidden, torch.nan) for v in (x - x0, xt, x))
    filled, _ = again(one, xt=two, t=t, x1=three, labels=y, mask=mask)
    assert torch.equal(filled[mask], u[mask])
    if isinstance(target, Mix):
        best = x - x0 + Oracle(bank).correction(xt, t, x, y, mask=mask)
        torch.testing.assert_close(u, best, rtol=0, atol=1e-10)
        torch.testing.assert_close(scheme.last.added, u - (x - x0))
        looked_up, _ = Scheme(Oracle(bank), target=target)(x - x0, xt=xt, t=t, x1=x, mask=mask)
        torch.testing.assert_close(looked_up, u)
        at = mask[:, 4:].logical_not().all(1)
        cut = (v[at, :4] for v in (x - x0, xt, x, mask))
        short = dict(zip(("y", "xt", "x1", "mask"), cut, strict=True))
        found, _ = Scheme(Oracle(bank), target=target)(**short, t=t[at], labels=y[at])
        torch.testing.assert_close(found, u[at, :4])


def test_noise_that_is_masked_too_is_noise() -> None:
    x, _, mask = _data()
    x0 = torch.randn(x.shape, dtype=torch.float64) * mask[..., None]
    xt = (x * mask[..., None] + x0) / 2
    scheme = Scheme(Oracle(LatentBank(x, mask=mask)), target=Mix())
    scheme(x - x0, xt=xt, t=0.5, x1=x, mask=mask)
    scheme = Scheme(Oracle(LatentBank(x, mask=mask)), target=Mix())
    with pytest.raises(ValueError, match="mean square"):
        scheme(x - 2 * x0, xt=xt + x0 / 2, t=0.5, x1=x, mask=mask)


def test_losses_are_means_over_what_is_valid() -> None:
    x, _, mask = _data()
    draws = torch.Generator().manual_seed(5)
    x0, out = (torch.randn(x.shape, generator=draws, dtype=x.dtype) for _ in range(2))
    t = torch.rand(ROWS, generator=draws)
    want = ((out - (x - x0)).square().sum(2) * mask).sum(1) / (WIDTH * mask.sum(1))
    loss_fn = FlowMatchingLoss()
    loss = loss_fn(lambda xt, t: out, x, x0=x0, t=t, loss_mask=mask)
    assert loss_fn.last is not None
    torch.testing.assert_close(loss_fn.last.loss, want.float())
    torch.testing.assert_close(loss, want.float().mean())
    with pytest.raises(ValueError, match=r"beside the cosine"):
        FlowMatchingLoss(cosine=True)(lambda xt, t: out, x, x0=x0, t=t, loss_mask=mask)
    weighted = StageWeightedLoss(torch.nn.MSELoss(reduction="none"), lambda t: t)
    found = weighted(out, x - x0, t=t.double(), loss_mask=mask)
    torch.testing.assert_close(found, (t * want).mean())
    oracle = Oracle(LatentBank(x, mask=mask))
    xt = oracle.path.interpolate(x0, x, t)
    exact = oracle.velocity(xt, t, mask=mask) + (~mask[..., None]) * 7.0
    pull = OracleRegularizer(oracle)
    assert float(pull(exact, x - x0, xt=xt, t=t, x1=x, mask=mask)) < 1e-9


@pytest.mark.parametrize("padding", [float("nan"), float("inf")])
def test_no_gradient_comes_from_the_padding(padding: float) -> None:
    x, _, mask = _data()
    draws = torch.Generator().manual_seed(5)
    x0, out = (torch.randn(x.shape, generator=draws, dtype=x.dtype) for _ in range(2))
    t = torch.rand(ROWS, generator=draws, dtype=x.dtype)
    oracle = Oracle(LatentBank(x, mask=mask))
    scheme = Scheme(oracle, target=Mix())

    def gradients(x: Tensor) -> Iterator[Tensor]:
        own = out.clone().requires_grad_()
        xt, given = oracle.path.interpolate(x0, x, t), {"x0": x0, "t": t, "loss_mask": mask}
        for loss_fn in (FlowMatchingLoss(), FlowMatchingLoss(scheme=scheme)):
            yield torch.autograd.grad(loss_fn(lambda xt, t: own, x, **given), own)[0]
        weighted = StageWeightedLoss(torch.nn.MSELoss(reduction="none"), lambda t: t)
        yield torch.autograd.grad(weighted(own, x - x0, t=t, loss_mask=mask), own)[0]
        pull = OracleRegularizer(oracle)(own, x - x0, xt=xt, t=t, x1=x, mask=mask)
        yield torch.autograd.grad(pull, own)[0]

    known = mask[..., None]
    padded = gradients(x.where(known, padding))
    for found, want in zip(padded, gradients(x.where(known, 0)), strict=True):
        torch.testing.assert_close(found, want)
        assert found[mask].abs().min() > 0


def test_what_knows_no_masks_says_so() -> None:
    x, y, mask = _data()
    bank = LatentBank(x, y, mask=mask)
    for make in (Certificate.compute, Smoothing, lambda bank: Oracle(bank, engine=Sharded())):
        with pytest.raises(ValueError, match="does not support masks"):
            make(bank)


def test_masks_that_are_not_those_of_the_rows_are_refused() -> None:
    x, _, mask = _data()
    x = x * mask[..., None]
    bank, wrong = LatentBank(x, mask=mask), mask.clone()
    wrong[17] = torch.arange(LONGEST) < 5
    scheme = Scheme(Oracle(bank), target=Mix())
    x0 = torch.randn(x.shape, dtype=x.dtype)
    given = {"y": x - x0, "xt": (x + x0) / 2, "t": 0.5, "x1": x}
    with pytest.raises(ValueError, match=r"x_1 17 of the batch is row \d+ .* has 4 valid steps"):
        scheme(**given, mask=wrong)
    fewer = mask.clone()
    fewer[17] = torch.arange(LONGEST) < 2
    with pytest.raises(ValueError, match=r"x_1 17 of the batch is row \d+ .* and the batch says 2"):
        Scheme(Oracle(bank), target=Mix())(**given, mask=fewer)
    with pytest.raises(ValueError, match="Expected a bank with masks for samples"):
        Scheme(Oracle(LatentBank(x)), target=Mix())(**given, mask=mask)
    with pytest.raises(ValueError, match="Expected the masks of the samples.*mask=mask"):
        Scheme(Oracle(bank), target=Mix())(**given)
    # Equal once padded, and yet two rows: the mask tells them apart.
    twins = torch.cat([x[1:2], x[1:2], x[2:4]])
    lengths = torch.tensor([4, 6, 4, 6])
    bank = LatentBank(twins, mask=lengths)
    of = MaskedLabels.of(None, lengths, twins)
    rows = bank.find(twins, of)
    assert bank.classes_of(rows.tolist()).counts.tolist() == [12, 18, 12, 18]  # type: ignore[union-attr]
    require_same_masks(bank, twins, of)


def test_a_label_that_was_dropped_is_that_of_its_row() -> None:
    x, y, mask = _data()
    x = x * mask[..., None]
    bank, t = LatentBank(x, y, mask=mask), torch.linspace(0.1, 0.8, len(x))
    x0 = torch.randn(x.shape, dtype=x.dtype)
    given = {"y": x - x0, "t": t, "x1": x, "mask": mask}
    given["xt"] = t[:, None, None] * x + (1 - t[:, None, None]) * x0
    dropped = y.where(torch.arange(len(y)) % 3 > 0, int(y.max()) + 7)
    expected, _ = Scheme(Oracle(bank), target=Mix())(**given, labels=y)
    found, _ = Scheme(Oracle(bank), target=Mix())(**given, labels=dropped)
    assert torch.equal(found, expected)


def test_padding_that_nobody_speaks_of_is_noticed() -> None:
    x, y, mask = _data()
    zeros = (x * mask[..., None]).float()
    assert seems_padded(zeros)
    assert not seems_padded(x)
    (line,) = unused_in((zeros, y, mask), zeros, y)
    assert "read_batch=lambda batch: (batch[0], batch[1], batch[2])" in line
    masks = MaskedLabels.of(y, mask, zeros)
    assert unused_in((zeros, y, mask), zeros, y, masks) == []
    assert unused_in((zeros, ~mask, mask.sum(1)), zeros, None, masks) == []


def test_few_rows_of_a_mask_are_told() -> None:
    x, _, mask = _data()
    assert "4 masks, the median row compared with 10 rows" in repr(LatentBank(x, mask=mask))
    scheme = Scheme(Oracle(LatentBank(x, torch.arange(ROWS) // 20, mask=mask)), target=Mix())
    x0 = torch.randn(x.shape, dtype=x.dtype)
    with pytest.warns(UserWarning, match="the median one with 5 of 40"):
        scheme(x - x0, xt=(x + x0) / 2, t=0.5, x1=x, mask=mask)
