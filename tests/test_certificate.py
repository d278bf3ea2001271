"""Certificates against a float64 brute force: distances, the bound itself, and what is answered."""

import copy
import errno
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise import nearest_rows as search_module
from stagewise.bank import LatentBank
from stagewise.certificate import Certificate
from stagewise.nearest_rows import nearest_others, rank_distances
from stagewise.paths import CosinePath, EDMPath, LinearPath, PathCoefficients, VPPath
from stagewise.queries import Queries, segments_of
from stagewise.tail import Tail

ETA, DELTA = 1e-3, 1e-6


def answer(certificate, bank, xt, path, labels, source, k=1, made_in=torch.float32, **options):
    segments = segments_of(bank, labels, len(xt))
    queries = Queries(xt, path, segments, source, labels, made_in=made_in)
    return certificate.answer(bank, queries, k, **options)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def near(rows, step, generator):
    """Rows at the distance `step` from `rows`."""
    noise = torch.randn(rows.shape, generator=generator)
    return rows + step * noise / noise.norm(dim=1, keepdim=True)


def random_rows(n=150, dim=24):
    return torch.randn(n, dim, generator=draws())


def clusters(n=150, dim=24):
    centres = 8 * torch.randn(15, dim, generator=draws(1))
    return near(centres[torch.arange(n) % 15], 0.5, draws(2))


def duplicates(n=150, dim=24):
    x = random_rows(n, dim)
    x[1] = x[0]
    x[60:100] = x[2]  # more copies than rows that are computed exactly at first
    x[n - 1] = x[5]
    return x


def near_duplicates(n=150, dim=24):
    x = random_rows(n, dim)
    x[1:4] = near(x[:1].expand(3, dim), 1e-4, draws(3))
    x[50:110] = near(x[4:5].expand(60, dim), 1e-4, draws(4))
    return x


def low_dimensional(n=150, dim=24):
    basis = torch.randn(2, dim, generator=draws(5))
    return torch.randn(n, 2, generator=draws(6)) @ basis + 1e-3 * random_rows(n, dim)


def far_mean(n=150, dim=24):
    return near_duplicates(n, dim) + 300


ROWS = [random_rows, clusters, duplicates, near_duplicates, low_dimensional, far_mean]


def labels_of(n):
    return torch.arange(n) * 7 % 4


def certificate_of(bank, **options):
    return Certificate.compute(bank, progress=False, **options)


def all_distances(bank, class_wise=False):
    """(N, N) float64, infinite for the row itself, exact copies and, if asked, other classes."""
    x = bank.take(torch.arange(len(bank)))
    gaps = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    copies = gaps == 0
    apart = torch.zeros_like(copies)
    for label in bank.classes:
        own = bank.segment(label)
        apart[own] = True
        apart[own, own] = False
    if class_wise:
        copies &= ~apart
        gaps = gaps.masked_fill(apart, torch.inf)
    return gaps.masked_fill(gaps == 0, torch.inf), copies.sum(1) - 1, (copies & ~apart).sum(1) - 1


def sizes_of(bank, class_wise=False):
    if not class_wise:
        return torch.full((len(bank),), len(bank))
    rows = [bank.segment(label) for label in bank.classes]
    return torch.cat([torch.full((r.stop - r.start,), r.stop - r.start) for r in rows])


def query(bank, source, t, path, generator, dtype=torch.float32):
    """Queries as training makes them, in `dtype`, and their coefficients in float64."""
    x1 = bank.take(source).to(dtype)
    x0 = torch.randn(x1.shape, generator=generator).to(dtype)
    return path.interpolate(x0, x1, t.to(dtype)), path(t.to(dtype).double())


def logits_of(bank, xt, coefficients):
    x, alpha, sigma = bank.take(torch.arange(len(bank))), *coefficients[:2]
    gaps = torch.stack([(xt.double() - alpha[:, None] * row).square().sum(1) for row in x], 1)
    return -gaps / (2 * sigma[:, None] ** 2)


def mass_of(certificate, path, source, sizes, eta=ETA, delta=DELTA, made_in=torch.float32):
    """The bound on the mass outside, also of queries that are not certified."""
    return certificate._tail(path, source, sizes, delta, made_in).mass(eta)


def outside(bank, xt, coefficients, source, class_wise=False):
    """Posterior mass that is neither on the source nor a copy of it, (B,)."""
    gaps, *_ = all_distances(bank)
    logits = logits_of(bank, xt, coefficients)
    out = gaps[source] < torch.inf
    if class_wise:
        for label in bank.classes:
            own = torch.zeros(len(bank), dtype=torch.bool)
            own[bank.segment(label)] = True
            logits[own[source][:, None] & ~own] = -torch.inf
    return (logits.softmax(1) * out).sum(1)


def coefficients_at(rho):
    """A path that has `alpha / sigma = rho`."""
    alpha = rho / (1 + rho)
    return PathCoefficients(alpha, 1 - alpha, alpha, alpha)


def critical_rho(certificate, source, sizes, **options):
    """The `rho` from which on each source is certified."""
    low, high = torch.full((len(source),), 1e-4).double(), torch.full((len(source),), 1e9).double()
    for _ in range(50):
        middle = (low * high).sqrt()
        yes = certificate.certified(coefficients_at(middle), source, sizes, **options)
        low, high = torch.where(yes, low, middle), torch.where(yes, middle, high)
    return high


# --- Distances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_distances_are_tight_lower_bounds(rows, class_wise, dtype):
    bank = LatentBank(rows(), labels_of(150), dtype=dtype)
    distances, found_copies = rank_distances(bank, class_wise, progress=False)
    neighbours = nearest_others(bank, 7, class_wise, progress=False)
    gaps, copies, class_copies = all_distances(bank, class_wise)
    ordered = gaps.sort(1).values
    ranks = 2 ** torch.arange(distances.shape[1])
    assert ranks[-1] <= sizes_of(bank, class_wise).max() - 1 < 2 * ranks[-1]
    bound, true = distances.double(), ordered[:, ranks - 1]
    assert (bound <= true).all()
    assert bool((bound.isinf() == true.isinf()).all())
    # Where the product is good for it, that is, not within a cluster of near duplicates.
    fair = true > 0.05 * bank.radius
    torch.testing.assert_close(bound[fair], true[fair], rtol=0.03, atol=0)
    torch.testing.assert_close(bound[:, 0], true[:, 0], rtol=1e-6, atol=0)
    assert torch.equal(found_copies, torch.stack([copies, class_copies], 1).int())
    there = gaps.gather(1, neighbours.long().clamp_min(0)).masked_fill(neighbours < 0, torch.inf)
    torch.testing.assert_close(there, ordered[:, :7], rtol=1e-6, atol=0)
    assert all(len(set(row.tolist()) - {-1}) == (row >= 0).sum() for row in neighbours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_hold_for_products_of_16_bit_rows_far_from_0(dtype, monkeypatch):
    """As an accelerator multiplies them: rows less their mean are not rounded again."""
    monkeypatch.setattr(search_module, "working_dtype", lambda dtype, device: dtype)
    x = torch.randn(400, 64, generator=draws()) + 0.3
    x[:, :4] += 200
    bank = LatentBank(x, dtype=dtype, offset=torch.zeros(64))
    assert bank.off_centre > bank.radius
    true = all_distances(bank, False)[0].sort(1).values
    bounds = rank_distances(bank, progress=False)[0].double()
    assert (bounds <= true[:, 2 ** torch.arange(bounds.shape[1]) - 1]).all()


@pytest.mark.parametrize("numbers", [1, 3000])
def test_blocks_of_rows_and_of_columns_do_not_matter(numbers, monkeypatch):
    bank = LatentBank(near_duplicates(), labels_of(150))

    def found():
        return (*rank_distances(bank, progress=False), nearest_others(bank, 3, progress=False))

    whole = found()
    monkeypatch.setattr(search_module, "_BOUNDS", {"cpu": numbers})
    for one, other in zip(whole, found(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_errors_of_the_product_are_within_its_bound():
    # All terms of the products have one sign, and true distances are known from the construction.
    dim, n = 4096, 40
    x = near(torch.ones(n, dim) + 0.1, 1e-2, draws(7))
    x[-1] = -x[0]  # keeps the mean at 0 from hiding the magnitude
    bank = LatentBank(torch.cat([x, -x]))
    found, _ = rank_distances(bank, progress=False)
    true = all_distances(bank)[0].sort(1).values[:, 2 ** torch.arange(found.shape[1]) - 1]
    assert (found <= true).all()
    torch.testing.assert_close(found[:, 0].double(), true[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("neighbours", [1, 20])
def test_errors_as_large_as_the_bound_allows(neighbours, monkeypatch):
    # Rows in pairs, and pairs at distances that differ by less than the error of the product.
    dim, n = 256, 160
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=draws(19)).double()).Q[: n // 2]
    basis *= 1 + 1e-6 * torch.rand(n // 2, 1, generator=draws(20))
    bank = LatentBank(torch.cat([basis, near(basis, 0.1, draws(21))]).float())
    generator, exact = draws(22), search_module.scores

    def worst(query, rows):
        norms = query.square().sum(1)[:, None] + rows.double().square().sum(1)
        sign = torch.rand(norms.shape, generator=generator).round() * 2 - 1
        bound = 4 * (math.sqrt(dim) + 1) * 2.0**-24 * norms
        return (exact(query, rows).double() + 0.95 * sign * bound).float()

    monkeypatch.setattr(search_module, "scores", worst)
    found, _ = rank_distances(bank, progress=False)
    gaps = all_distances(bank)[0]
    true = gaps.sort(1).values
    assert (found <= true[:, 2 ** torch.arange(found.shape[1]) - 1]).all()
    rows = nearest_others(bank, neighbours, progress=False).long()
    torch.testing.assert_close(gaps.gather(1, rows), true[:, :neighbours], rtol=1e-6, atol=0)


def test_few_rows():
    bank = LatentBank(torch.tensor([[0.0], [3.0], [3.0], [7.0]]), torch.tensor([0, 0, 0, 1]))
    distances, copies = rank_distances(bank, progress=False)
    torch.testing.assert_close(distances[:, 0], torch.tensor([3.0, 3, 3, 4]))
    torch.testing.assert_close(distances[:, 1], torch.tensor([3.0, 4, 4, 4]))
    assert nearest_others(bank, 5, progress=False)[1].tolist() == [0, 3, -1, -1, -1]
    assert copies.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    assert rank_distances(bank, True, progress=False)[0][3].isinf().all()
    alone = nearest_others(bank, 1, class_wise=True, progress=False)
    assert alone[0, 0] in (1, 2)
    assert alone[1:, 0].tolist() == [0, 0, -1]


def test_all_rows_equal():
    bank = LatentBank(torch.ones(60, 3))
    certificate = certificate_of(bank)
    assert (certificate.copies == 59).all()
    path = coefficients_at(torch.tensor([1e-3], dtype=torch.float64))
    post, left = answer(certificate, bank, torch.zeros(1, 3).double(), path, None, one(4))
    assert not left
    assert post.ess.item() == pytest.approx(60)
    assert torch.equal(post.mean, torch.ones(1, 3).double())


# --- The bound ---------------------------------------------------------------------------------


def one(value):
    return torch.tensor([value])


@pytest.mark.parametrize("eta", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("delta", [0.2, 0.02])
def test_bound_against_the_exact_probability_for_one_other_row(eta, delta):
    # P(M > eta) = Phi(L/r - r/2), and (1) says twice that: no slack to hide an error in.
    distance, dim = 3.0, 16
    bank = LatentBank(torch.eye(2, dim) * distance / math.sqrt(2))
    certificate = certificate_of(bank)
    rho = critical_rho(certificate, one(0), one(2), eta=eta, delta=delta)
    r = rho.item() * distance
    exact = torch.special.ndtr(torch.tensor(math.log(1 / eta) / r - r / 2).double()).item()
    assert exact == pytest.approx(0.99 * delta / 2, rel=1e-3)
    count = 20_000
    path = coefficients_at(rho.expand(count))
    source = torch.zeros(count, dtype=torch.int64)
    x0 = torch.randn(count, dim, generator=draws(8)).double()
    xt = path.alpha[:, None] * bank.take(source) + path.sigma[:, None] * x0
    ratio = logits_of(bank, xt, path)
    rate = (ratio[:, 1] - ratio[:, 0] > math.log(eta)).double().mean().item()
    assert rate == pytest.approx(exact, abs=4 * math.sqrt(exact / count))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("delta", [0.2, 1e-6])
def test_bound_holds_where_it_is_tightest(rows, class_wise, delta):
    # At the first time at which each row is certified, where the mass outside is largest.
    bank = LatentBank(rows().double(), labels_of(150))
    certificate = certificate_of(bank)
    source = torch.arange(150).repeat(10)
    sizes = sizes_of(bank, class_wise)[source]
    options = {"eta": ETA, "delta": delta, "made_in": torch.float64}
    rho = critical_rho(certificate, source, sizes, **options) * (1 + 1e-9)
    path = coefficients_at(rho)
    assert certificate.certified(path, source, sizes, **options).all()
    x1 = bank.take(source)
    xt = path.alpha[:, None] * x1
    xt += path.sigma[:, None] * torch.randn(x1.shape, generator=draws(9)).double()
    mass = outside(bank, xt, path, source, class_wise)
    labels = bank.labels_of(source.tolist()) if class_wise else None
    post, left = answer(certificate, bank, xt, path, labels, source, **options)
    assert not left
    assert (post.tail_mass <= ETA).all()
    for bound in (ETA, post.tail_mass):
        rate = (mass > bound).double().mean().item()
        assert rate <= (delta + 3 * math.sqrt(delta / len(source)) if delta > 0.1 else 0)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath(), EDMPath()], ids=repr)
@pytest.mark.parametrize("rows", ROWS)
def test_certified_queries_of_training_are_right(path, rows):
    bank = LatentBank(rows())
    certificate = certificate_of(bank)
    source = torch.arange(150).repeat(20)
    t = torch.rand(len(source), generator=draws(10)).sqrt().clamp_max(0.9999)
    xt, coefficients = query(bank, source, t, path, draws(11))
    yes = certificate.certified(coefficients, source, sizes_of(bank)[source])
    assert (outside(bank, xt, coefficients, source)[yes] <= ETA).all()


def test_bound_on_the_mass_holds_everywhere():
    bank = LatentBank(clusters())
    certificate = certificate_of(bank)
    source = torch.arange(150).repeat(20)
    rho = 60 * torch.rand(len(source), generator=draws(12)).double()
    path = coefficients_at(rho)
    x1 = bank.take(source)
    xt = path.alpha[:, None] * x1
    xt += path.sigma[:, None] * torch.randn(x1.shape, generator=draws(13)).double()
    mass = outside(bank, xt, path, source)
    for delta in (0.3, 0.01):
        tail = mass_of(certificate, path, source, sizes_of(bank)[source], delta=delta)
        assert (mass > tail).double().mean() <= delta
        assert (tail < 1e-9).any()
        assert (tail == 1).any()
    zero = coefficients_at(torch.zeros(1).double())
    assert mass_of(certificate, zero, source[:1], sizes_of(bank)[:1]).item() == 1


def test_most_of_well_separated_data_is_certified():
    bank = LatentBank(torch.randn(300, 1024, generator=draws(14)))
    certificate = certificate_of(bank)
    source = torch.arange(300)
    t = torch.linspace(0, 0.999, 300).double()
    share = certificate.certified(LinearPath()(t), source, sizes_of(bank)).double().mean()
    assert share > 0.75


def plain(certificate, source, count, rho, eta, delta):
    """The union bound over N equally near rows, all with one quantile."""
    r = rho * certificate.distances[source, 0].double()
    a = -torch.special.ndtri(torch.tensor(delta / (count + 1)).double())
    return (r >= a) & (math.log(count) - r**2 / 2 + a * r <= math.log(eta))


def test_sharper_than_the_plain_bound_by_the_ladder():
    bank = LatentBank(low_dimensional(600))
    certificate = certificate_of(bank)
    source, sizes = torch.arange(600), sizes_of(bank)
    first = critical_rho(certificate, source, sizes)
    reach = certificate.distances
    level = replace(certificate, distances=reach[:, :1].expand_as(reach), _moved={})
    union = 1 / first
    for _ in range(60):  # the plain bound's own critical rho, by bisection
        yes = plain(certificate, source, 599, 1 / union, ETA, DELTA)
        union = torch.where(yes, union, union / 1.02)
    without_ladder = critical_rho(level, source, sizes)
    assert (first <= without_ladder * (1 + 1e-9)).all()
    assert (without_ladder < 1 / union).all()
    assert (first * union).median() < 0.85


@pytest.mark.parametrize("size", [40, 7, 2, 1])
def test_spends_delta_on_every_row(size):
    # 40 rows at equal distances: (1) is a product.
    bank = LatentBank(torch.eye(40).double())
    rho = critical_rho(certificate_of(bank), torch.arange(40), torch.full((40,), size))
    r = rho * math.sqrt(2)
    spent = (size - 1) * 2 * torch.special.ndtr(-math.log(ETA) / r - r / 2)
    expected = torch.full((40,), 0.99 * DELTA if size > 1 else 0).double()
    torch.testing.assert_close(spent, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_slack_for_rounding_is_neither_less_nor_more(made_in, offset):
    """What is spent beyond the exact probability: for the noise, and for rows far from 0."""
    dim = 2048
    certificate = certificate_of(LatentBank(torch.eye(2, dim).double() + offset))
    rho = critical_rho(certificate, one(0), one(2), made_in=made_in)
    r = rho * certificate.distances[0, 0].double()
    quantile = torch.special.ndtri(torch.tensor(0.99 * DELTA / 2).double())
    slack = quantile + r / 2 - math.log(1 / ETA) / r
    u = torch.finfo(made_in).eps / 2  # each of the two is rounded four times
    noise = 4 * u * (math.sqrt(dim) + math.sqrt(2 * math.log(100 / DELTA)))
    rows = 4 * u * rho * certificate.max_norm
    assert rows > 3 * noise if offset else noise > 3 * rows
    torch.testing.assert_close(slack, noise + rows, rtol=0.02, atol=0)


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
def test_rounding_of_the_noise_alone(made_in):
    # The rows are so near 0 that only the noise has digits to lose, all towards the other row.
    dim, delta, count = 2048, 0.02, 2000
    bank = LatentBank(torch.eye(2, dim).double() * 1e-3)
    certificate = certificate_of(bank)
    options = {"delta": delta, "made_in": made_in}
    rho = critical_rho(certificate, one(0), one(2), **options)
    path = coefficients_at(rho.expand(count))
    x, other = bank.take(torch.arange(2))
    noise = path.sigma[:, None] * torch.randn(count, dim, generator=draws(23)).double()
    towards = (other - x) / (other - x).norm()
    lost = 2 * torch.finfo(made_in).eps * noise.norm(dim=1, keepdim=True) * towards
    logits = logits_of(bank, path.alpha[:, None] * x + noise + lost, path)
    rate = (logits[:, 1] - logits[:, 0] > math.log(ETA)).double().mean()
    assert rate <= delta / 2 + 3 * math.sqrt(delta / 2 / count)


def test_ladder_costs_little_against_all_distances():
    bank = LatentBank(low_dimensional(300))
    certificate = certificate_of(bank)
    source, sizes = torch.arange(300), sizes_of(bank)
    gaps = all_distances(bank)[0]
    rho = critical_rho(certificate, source, sizes)
    full = Tail.of(rho[:, None], gaps, (gaps < torch.inf).long(), (0.0, 0.0), bank.dim, DELTA)
    spent = 2 * torch.special.ndtr(-math.log(ETA) / full.r - full.half)
    spent = spent.nan_to_num(0).sum(1)
    assert (spent <= 0.99 * DELTA * (1 + 1e-5)).all()
    assert (spent > DELTA / 2.5).all()


@pytest.mark.parametrize("name", ["eta", "delta"])
def test_monotone(name):
    bank = LatentBank(clusters())
    certificate = certificate_of(bank)
    source = torch.arange(150)
    rhos = [
        critical_rho(certificate, source, sizes_of(bank), **{name: value})
        for value in (1e-1, 1e-2, 1e-4, 1e-8)
    ]
    assert all((one < other).all() for one, other in zip(rhos, rhos[1:], strict=False))
    small = critical_rho(certificate, source, torch.full((150,), 20))
    assert (small <= critical_rho(certificate, source, sizes_of(bank))).all()


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan])
@pytest.mark.parametrize("name", ["eta", "delta"])
def test_eta_and_delta_are_checked(name, value):
    certificate = certificate_of(LatentBank(random_rows()))
    path = coefficients_at(torch.ones(1).double())
    with pytest.raises(ValueError, match=f"`{name}` between 0 and 1"):
        certificate.certified(path, one(0), one(150), **{name: value})


def test_ends_of_the_path():
    bank = LatentBank(duplicates())
    certificate = certificate_of(bank)
    source = torch.arange(150)
    start, end = (LinearPath()(torch.full((150,), t).double()) for t in (0.0, 1.0))
    assert not certificate.certified(start, source, sizes_of(bank)).any()
    assert certificate.certified(end, source, sizes_of(bank)).all()
    end = end.floored(1e-4)
    assert certificate.certified(end, source, sizes_of(bank)).all()


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [random_rows, clusters, near_duplicates])
def test_the_worst_rounding_is_covered(rows, made_in, stored):
    # Everything that may be rounded is, and moves the query straight to the nearest other row.
    bank = LatentBank(rows(), dtype=stored)
    certificate = certificate_of(bank)
    source, sizes = torch.arange(150), sizes_of(bank)
    x = bank.take(source)
    u = torch.finfo(made_in).eps / 2
    towards = bank.take(nearest_others(bank, 1, progress=False)[:, 0].long()) - x
    towards /= towards.norm(dim=1, keepdim=True)
    stored_error = (x - rows().double()).norm(dim=1, keepdim=True)
    assert (stored_error <= certificate.row_error).all()
    found = 0
    for rho in torch.logspace(-1, 7, 33).double():
        path = coefficients_at(rho.expand(150))
        x0 = torch.randn(x.shape, generator=draws(15)).double()
        signal, noise = path.alpha[:, None] * x, path.sigma[:, None] * x0
        error = path.alpha[:, None] * stored_error
        for part in (signal, noise, signal, noise):
            error += u * part.norm(dim=1, keepdim=True)
        yes = certificate.certified(path, source, sizes, made_in=made_in)
        assert (outside(bank, signal + noise + error * towards, path, source)[yes] <= ETA).all()
        found += int(yes.sum())
    assert found or (rows is clusters and torch.bfloat16 in (made_in, stored))


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
def test_rounded_queries_and_rounded_banks(made_in):
    x = random_rows()
    bank = LatentBank(x, dtype=torch.bfloat16)
    certificate = certificate_of(bank)
    source = torch.arange(150).repeat(10)
    sizes = sizes_of(bank)[source]
    rho = critical_rho(certificate, source, sizes, made_in=made_in)
    exact = certificate_of(LatentBank(bank.take(torch.arange(150))))
    assert (rho > critical_rho(exact, source, sizes)).all()
    for factor in (1, 3, 30, 1e5):
        t = (rho * factor / (1 + rho * factor)).clamp_max(0.99).to(made_in)
        x0 = torch.randn(len(source), 24, generator=draws(15)).to(made_in)
        xt = LinearPath().interpolate(x0, x[source].to(made_in), t)
        path = LinearPath()(t.double())
        yes = certificate.certified(path, source, sizes, made_in=made_in)
        assert (outside(bank, xt, path, source)[yes] <= ETA).all()
        assert yes.any()


# --- Posteriors --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [clusters, duplicates, near_duplicates])
@pytest.mark.parametrize(("class_wise", "own"), [(False, False), (True, False), (True, True)])
def test_posterior_equals_brute_force(rows, class_wise, own):
    bank = LatentBank(rows(), labels_of(150))
    certificate = certificate_of(bank, class_wise=own)
    source, sizes = torch.arange(150), sizes_of(bank, class_wise)
    rho = critical_rho(certificate, source, sizes, eta=1e-10) * (1 + 1e-9)
    path = coefficients_at(rho)
    x = bank.take(source)
    xt = path.alpha[:, None] * x
    xt += path.sigma[:, None] * torch.randn(x.shape, generator=draws(16)).double()
    labels = bank.labels_of(source.tolist()) if class_wise else None
    post, left = answer(certificate, bank, xt, path, labels, source, 5, eta=1e-10)
    assert not left
    logits = logits_of(bank, xt, path)
    if class_wise:
        same = (bank.index * 7 % 4)[:, None] == (bank.index * 7 % 4)
        logits = logits.masked_fill(~same, -torch.inf)
    gamma = logits.softmax(1)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(post.mean, gamma @ x, **close)
    torch.testing.assert_close(post.log_evidence, logits.logsumexp(1), **close)
    torch.testing.assert_close(post.entropy, torch.special.entr(gamma).sum(1), **close)
    torch.testing.assert_close(post.ess, 1 / gamma.square().sum(1), **close)
    torch.testing.assert_close(post.top1, gamma.max(1).values, **close)
    named = gamma.gather(1, post.rows.clamp_min(0)).masked_fill(post.rows < 0, 0)
    torch.testing.assert_close(post.weights, named, **close)
    assert post.weights.shape == post.rows.shape == (150, 5)
    assert post.tail_kind == "bounded"
    assert torch.equal(post.mean, x)
    assert torch.equal(post.rows, torch.nn.functional.pad(source[:, None], (0, 4), value=-1))


def test_mean_is_within_eta_of_the_full_one():
    bank = LatentBank(clusters())
    certificate = certificate_of(bank)
    source, sizes = torch.arange(150), sizes_of(bank)
    path = coefficients_at(critical_rho(certificate, source, sizes))
    xt = path.alpha[:, None] * bank.take(source)
    xt += path.sigma[:, None] * torch.randn(xt.shape, generator=draws(17)).double()
    full = logits_of(bank, xt, path).softmax(1) @ bank.take(source)
    post, left = answer(certificate, bank, xt, path, None, source)
    assert not left
    assert ((post.mean - full).norm(dim=1) <= ETA * 2 * bank.radius).all()


def test_answer_takes_what_it_can_and_names_the_rest():
    bank = LatentBank(clusters(), labels_of(150))
    certificate = certificate_of(bank)
    count = 90
    source = torch.arange(count)
    source[5] = -1
    t = torch.linspace(0.8, 0.99, count)
    xt, path = query(bank, source.clamp_min(0), t, LinearPath(), draws(18))
    xt = xt.double()
    labels = [bank.labels_of([max(0, row)])[0] for row in source.tolist()]
    labels[88], labels[81] = None, (labels[81] + 1) % 4
    post, left = answer(certificate, bank, xt, path, labels, source, 2, eta=ETA, delta=DELTA)
    assert {5, 81} <= set(left)
    assert 88 not in left
    done = [i for i in range(count) if i not in left]
    assert len(post.mean) == len(done)
    sizes = torch.tensor([150 if name is None else 37 + (name < 2) for name in labels])
    yes = certificate.certified(path, source.clamp_min(0), sizes)
    assert yes[done].all()
    assert yes.sum() == len(done) + 1  # the one that is not of the class it asks about
    assert torch.equal(post.mean, bank.take(source[done]))
    bound = mass_of(certificate, path.select(torch.tensor(done)), source[done], sizes[done])
    assert torch.equal(post.tail_mass, bound)
    nothing = coefficients_at(torch.zeros(3).double())
    assert answer(certificate, bank, xt[:3], nothing, None, source[:3]) is None


def test_no_queries():
    bank = LatentBank(clusters())
    certificate = certificate_of(bank)
    none = torch.zeros(0, dtype=torch.int64)
    path = coefficients_at(torch.zeros(0).double())
    assert certificate.certified(path, none, none).shape == (0,)
    assert answer(certificate, bank, torch.zeros(0, 24).double(), path, None, none) is None


# --- What a certificate is valid for -------------------------------------------------------------


def test_class_wise_is_refused_for_the_whole_bank():
    bank = LatentBank(clusters(), labels_of(150))
    certificate = certificate_of(bank, class_wise=True)
    path = coefficients_at(torch.full((1,), 50.0).double())
    assert certificate.certified(path, one(0), one(38)).all()
    with pytest.raises(ValueError, match="class-wise"):
        certificate.certified(path, one(0), one(150))
    xt = bank.take(one(0))
    with pytest.raises(ValueError, match="class-wise"):
        answer(certificate, bank, xt, path, None, one(0))
    # In a batch where only some queries have a class, the others are left to a search.
    two = PathCoefficients(*(value.expand(2) for value in path))
    label = bank.labels_of([0])[0]
    _, left = answer(certificate, bank, xt.expand(2, -1), two, [None, label], torch.zeros(2).long())
    assert left == [0]


def test_class_wise_needs_classes():
    with pytest.raises(ValueError, match="LatentBank\\(x, labels\\)"):
        certificate_of(LatentBank(clusters()), class_wise=True)


def test_class_wise_is_at_least_as_sharp():
    bank = LatentBank(clusters(), labels_of(150))
    source, sizes = torch.arange(150), sizes_of(bank, class_wise=True)
    whole = critical_rho(certificate_of(bank), source, sizes)
    assert (critical_rho(certificate_of(bank, class_wise=True), source, sizes) <= whole).all()


@pytest.mark.parametrize("row", [-1, 150, 10_000])
def test_source_out_of_range(row):
    bank = LatentBank(clusters())
    certificate = certificate_of(bank)
    path = coefficients_at(torch.ones(2).double())
    source, sizes = torch.tensor([3, row]), torch.tensor([150, 150])
    with pytest.raises(ValueError, match=f"`source` from 0 to 149.*got {row}"):
        certificate.certified(path, source, sizes)


def test_other_bank_is_refused():
    bank, other = LatentBank(clusters()), LatentBank(clusters(120))
    certificate = certificate_of(bank)
    certificate.check(bank)
    certificate.check(LatentBank(clusters()))
    for call in (
        lambda: certificate.check(other),
        lambda: answer(
            certificate,
            other,
            torch.zeros(1, 24).double(),
            coefficients_at(torch.ones(1).double()),
            None,
            one(0),
        ),
    ):
        with pytest.raises(ValueError, match="other latents.*150 rows of 24.*has 120 of 24"):
            call()


# --- Files ---------------------------------------------------------------------------------------


def assert_same(one, other):
    for name in ("distances", "copies", "compared"):
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in ("class_wise", "fingerprint", "dim", "max_norm", "row_error"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("class_wise", [False, True])
def test_save_and_load(tmp_path, class_wise):
    bank = LatentBank(duplicates(), labels_of(150))
    made = certificate_of(bank, class_wise=class_wise)
    made.save(tmp_path / "certificate.safetensors")
    assert_same(Certificate.load(tmp_path / "certificate.safetensors", bank), made)
    assert os.listdir(tmp_path) == ["certificate.safetensors"]


@pytest.mark.filterwarnings("error")
def test_files_of_before_are_read(tmp_path):
    """They held neighbours, of which none had to be."""
    bank, file = LatentBank(duplicates(), labels_of(150)), tmp_path / "c.safetensors"
    made = certificate_of(bank)
    none = torch.zeros(150, 0, dtype=torch.int32)
    tensors = {"beyond": made.distances[:, 0].clone(), "neighbours": none}
    about = {"fingerprint": bank.fingerprint, "rows": "150", "dim": "24", "neighbours": "0"}
    about |= {"format": "stagewise.Certificate", "version": "1", "class_wise": "False"}
    save_file({"distances": made.distances, "copies": made.copies, **tensors}, file, about)
    assert_same(Certificate.cached(file, bank), made)


def test_load_refuses_what_does_not_fit(tmp_path):
    bank, file = LatentBank(clusters()), tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError):
        Certificate.load(file, bank)
    certificate_of(bank).save(file)
    other = clusters()
    other[0, 0] += 1
    for rows in (LatentBank(other), LatentBank(clusters().flip(0)), LatentBank(clusters(100))):
        with pytest.raises(ValueError, match=r"other latents.*Certificate.compute\(bank\)"):
            Certificate.load(file, rows)
    save_file({"x": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="Expected a certificate"):
        Certificate.load(file, bank)
    file.write_text("something else")
    with pytest.raises(ValueError, match="Expected a certificate"):
        Certificate.cached(file, bank)
    assert file.read_text() == "something else"


def test_load_refuses_another_version(tmp_path, monkeypatch):
    bank, file = LatentBank(clusters()), tmp_path / "c.safetensors"
    made = certificate_of(bank)
    with monkeypatch.context() as patch:
        patch.setitem(Certificate.load.__func__.__globals__["_FORMAT"], "version", "0")
        made.save(file)
    with pytest.raises(ValueError, match="version 1 .* got 0"):
        Certificate.load(file, bank)
    with pytest.warns(UserWarning, match="version 0"):
        Certificate.cached(file, bank, progress=False)


def test_cached(tmp_path, monkeypatch, recwarn):
    bank, file = LatentBank(clusters(), labels_of(150)), tmp_path / "c.safetensors"
    made = Certificate.cached(file, bank, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Certificate, "compute", None)
        assert_same(Certificate.cached(file, bank), made)
    assert not recwarn
    with pytest.warns(UserWarning, match="other settings.*wise"):
        again = Certificate.cached(file, bank, progress=False, class_wise=True)
    assert_same(again, Certificate.load(file, bank))
    with pytest.warns(UserWarning, match="other latents.*rows 150"):
        Certificate.cached(file, LatentBank(clusters(90)), progress=False)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    bank, file = LatentBank(clusters()), tmp_path / "c.safetensors"
    made = certificate_of(bank)
    made.save(file)
    before = file.read_bytes()

    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        OSError, match=r"No space left on device: .*c\.safetensors could not be written"
    ):
        made.save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


def test_progress_needs_no_tqdm(monkeypatch, capsys):
    bank = LatentBank(clusters())
    Certificate.compute(bank)
    assert "certificate" in capsys.readouterr().err
    Certificate.compute(bank, progress=False)
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    Certificate.compute(bank)
    assert capsys.readouterr().err == ""


def test_copies_and_devices():
    certificate = certificate_of(LatentBank(clusters()))
    assert_same(copy.deepcopy(certificate), certificate)
    assert certificate.to("cpu") is certificate
    assert certificate.to("meta") is certificate.to("meta")
    assert certificate.to("meta").copies.device.type == "meta"


@pytest.mark.parametrize("residency", ["cuda", "cpu"])
@pytest.mark.parametrize("class_wise", [False, True])
def test_on_cuda(residency, class_wise):
    bank = LatentBank(clusters(), labels_of(150))
    certificate = certificate_of(bank, class_wise=class_wise)
    assert bank.fingerprint  # known before tensors are fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        bank = bank.to(residency)
        source = torch.arange(5, device="cuda")
        path = LinearPath()(torch.rand(5, device="cuda", dtype=torch.float64))
        sizes = torch.full((5,), 30, device="cuda")
        xt = torch.randn(5, 24, device="cuda", dtype=torch.float64)
        yes = certificate.certified(path, source, sizes)
        assert yes.device.type == "cuda"
        assert yes.dtype == torch.bool
        post = certificate._on_source(bank, xt, path, source, sizes, 2)
        for name in ("mean", "weights", "rows", "ess", "entropy", "log_evidence"):
            assert getattr(post, name).device.type == "cuda", name
        assert mass_of(certificate, path, source, sizes).device.type == "cuda"
        assert post.mean.shape == (5, 24)


def test_numbers_of_a_rank_are_those_of_a_sort():
    x = torch.randn(5, 40, generator=draws(3))
    x[1] = x[1, 0]
    found = search_module._of_rank(x, [1, 2, 16, 64])
    assert torch.equal(found, x.sort(1).values[:, [1, 2, 16, 39]])
