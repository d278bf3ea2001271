"""The strength of a smoothing, chosen by rows that were left out."""

import math
import warnings

import pytest
import torch

from stagewise import LatentBank, Oracle, Scheme, Smoothing, StageCurve
from stagewise.smoothing_fit import (
    SmoothingScore,
    _finished,
    _folds,
    _largest_near,
    cross_validated,
)


def plane(rows, dim=24, seed=0):
    """Rows near a plane, far from each other."""
    draws = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, 2, generator=draws)).Q
    return 3 * torch.randn(rows, 2, generator=draws) @ basis.T


def rings(rows, seed=0):
    """Two classes, each a circle in a plane of its own."""
    draws = torch.Generator().manual_seed(seed)
    angle, label = 2 * math.pi * torch.rand(rows, generator=draws), torch.arange(rows) % 2
    x = torch.zeros(rows, 12)
    x[torch.arange(rows), 2 * label] = 2 * angle.cos()
    x[torch.arange(rows), 2 * label + 1] = 2 * angle.sin()
    return x, label


@pytest.mark.slow
def test_a_fit_is_the_setting_with_the_best_field_of_those_near_the_data():
    x, label = rings(100)
    bank = LatentBank(x, label)
    fitted = Smoothing.fit(bank, 0.4, progress=False)
    rows, *scores = fitted.scores
    assert (rows.neighbours, rows.scale, rows.farther) == (0, 0.0, 0.0)
    assert sorted({s.neighbours for s in scores}) == [8, 16, 32, 64]
    asked = [s for s in scores if not math.isnan(s.loss)]
    best = min(asked, key=lambda score: score.loss)
    assert (fitted.neighbours, fitted.scale, fitted.floor) == (best.neighbours, best.scale, 0.0)
    assert best.loss < 0.9 * rows.loss
    for k in {s.neighbours for s in asked}:  # the largest scale that is near enough
        (chosen,) = [s.scale for s in asked if s.neighbours == k]
        tried = [s for s in scores if s.neighbours == k and s not in asked]
        assert all(s.scale < chosen for s in tried if s.farther <= 0)
        assert all(s.scale > chosen for s in tried[-1:] if s.farther > 0)
    # A circle is left by chords: many neighbours at full width are farther from the data.
    assert scores[-1].farther > 0.05


def test_finished_samples_have_the_covariance_of_gaussian_conditioning():
    """Against the posterior of `x~` given `x_c = c x~ + (1 - c) eps`, in dense float64."""
    bank = LatentBank(torch.randn(12, 5, generator=torch.Generator().manual_seed(3)))
    smoothing, row, a = Smoothing(bank, 3, 0.8, progress=False), 4, 0.6
    s = 1 - a
    made = _finished(smoothing, torch.tensor([row]), 200_000, a, seed=0)[0]
    x = bank.take(torch.arange(12))
    half = (0.8 / math.sqrt(3)) * (x[smoothing.index[row].long()] - x[row])
    prior = half.T @ half
    gain = a * prior @ torch.linalg.inv(a**2 * prior + s**2 * torch.eye(5, dtype=prior.dtype))
    expected = s**2 * gain @ gain.T + prior - a * gain @ prior
    assert torch.allclose(made.mean(0), x[row], atol=5e-3)
    assert torch.allclose(torch.cov(made.T), expected, atol=5e-3)
    assert prior.trace() > 1.2 * expected.trace()  # wide directions are held


@pytest.mark.parametrize(
    ("farther", "scale"),
    [
        ([-1.0, -0.5, 0.5], 1.5),
        ([-1.0, -0.5, -0.1], 2.0),
        ([0.1, 0.2, 0.3], None),
        ([0.0, 0.2, 0.3], 0.5),
        ([0.1, -0.3, 0.1], 1.75),
    ],
)
def test_the_scale_is_where_samples_are_as_near_as_rows(farther, scale):
    found = [SmoothingScore(8, g, f) for g, f in zip((0.5, 1.0, 2.0), farther, strict=True)]
    assert _largest_near(found) == scale


def test_a_distance_is_that_of_all_pairs():
    bank = LatentBank(plane(60, dim=5))
    for fold in _folds(bank, 0.5, seed=0):
        rows = fold.rest.take(fold.rows)
        assert len(rows) == len(fold.rest)
        to_held_out = torch.cdist(rows, fold.x1.double()).mean()
        expected = 2 * to_held_out - torch.cdist(rows, rows).mean()
        found = fold.distance(rows[:, None].expand(-1, fold.each, -1))
        assert found == pytest.approx(float(expected), rel=1e-9)


def test_distances_hardly_depend_on_folds_and_noise():
    """They are compared with 0, and once decided about a setting by their noise."""
    x, label = rings(100)
    bank = LatentBank(x, label)
    found = [
        cross_validated(bank, 0.4, [8], [0.5, 1.0], seed=seed, progress=False)[1:]
        for seed in range(4)
    ]
    farther = torch.tensor([[s.farther for s in tried if s.scale in (0.5, 1)] for tried in found])
    assert farther.std(0).max() < 0.004  # 0.0083 with samples of random rows


def test_copies_of_a_row_are_in_its_fold_and_noise_is_shared():
    x = plane(40)
    bank = LatentBank(torch.cat([x, x, x[:10]]))
    for fold in _folds(bank, 0.5, seed=1):
        apart = torch.cdist(
            fold.x1.flatten(1), fold.rest.take(torch.arange(len(fold.rest))).float()
        )
        assert apart.min() > 1e-3
        assert (fold.t > 0.5).all()
        assert (fold.t < 1).all()
    sizes = [len(fold.rest) for fold in _folds(bank, 0.5, seed=1)]
    assert sum(len(bank) - size for size in sizes) == len(bank)


def test_a_class_of_one_row_is_not_asked_about():
    x, label = rings(60)
    label[7] = 5
    scores = cross_validated(LatentBank(x, label), 0.7, (8,), (0.5,), progress=False)
    assert all(math.isfinite(s.farther) for s in scores)
    assert math.isfinite(scores[0].loss)


def test_none_where_the_posterior_never_collapses():
    with pytest.warns(UserWarning, match="none. The posterior never collapses"):
        assert Smoothing.fit(LatentBank(torch.ones(30, 4)), progress=False) is None


def test_none_where_every_width_leaves_the_data():
    """Five rows in a place, far from all others: of each left out there are some as good."""
    centre = 100 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    bank = LatentBank(torch.cat([centre + 0.01 * i for i in range(5)]))
    with pytest.warns(UserWarning, match=r"none. On rows left out"):
        assert Smoothing.fit(bank, 0.2, progress=False) is None


def test_fit_in_a_scheme_of_two_stages():
    bank = LatentBank(plane(40))
    boundary = StageCurve.measure(Oracle(bank)).boundary()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = Smoothing.fit(bank, boundary, progress=False)
    measured = Smoothing.fit(bank, progress=False)
    assert repr(measured.scores) == repr(fitted.scores)  # NaN equals no NaN
    scheme = Scheme.two_stage(Oracle(bank), smoothing=fitted, boundary=boundary)
    assert scheme.smoothing is fitted
    assert scheme.collapsed == boundary.collapsed
    assert Scheme.two_stage(Oracle(bank), smoothing=None, boundary=0.6).smoothing is None


def test_too_few_rows_are_refused_with_a_line_to_paste():
    with pytest.raises(ValueError, match=r"Smoothing\(bank, neighbours=8\)"):
        Smoothing.fit(LatentBank(plane(19)))


@pytest.mark.slow
def test_copies_that_fill_a_fold_leave_fewer_neighbours_to_try():
    x = plane(60)
    x[:24] = x[0]
    fitted = Smoothing.fit(LatentBank(x), 0.4, progress=False)
    rest = min(len(fold.rest) for fold in _folds(LatentBank(x), 0.4, seed=0))
    assert max(score.neighbours for score in fitted.scores) < rest


@pytest.mark.parametrize("class_wise", [False, True])
def test_none_where_each_row_is_a_class(class_wise):
    """Those of a fold are of no class outside it."""
    bank = LatentBank(plane(30), torch.arange(30))
    with pytest.warns(UserWarning, match=r"none.*too few rows differ from others of their class"):
        assert Smoothing.fit(bank, class_wise=class_wise, progress=False) is None


@pytest.mark.parametrize("differ", [1, 2, 4])
def test_none_where_too_few_rows_differ(differ):
    bank = LatentBank(plane(differ).repeat(20, 1))
    with pytest.warns(UserWarning, match=r"none.*too few rows differ from others\."):
        assert Smoothing.fit(bank, 0.7, progress=False) is None


@pytest.mark.parametrize("boundary", [-1.0, 1.0, 5.0])
def test_a_boundary_that_is_no_time_is_refused(boundary):
    with pytest.raises(ValueError, match=r"Smoothing\.fit\(bank, 0\.7\)"):
        Smoothing.fit(LatentBank(plane(30)), boundary)


def test_what_is_no_bank_is_refused():
    with pytest.raises(TypeError, match=r"Smoothing\(LatentBank\(x\)\)"):
        Smoothing.fit(plane(30))
