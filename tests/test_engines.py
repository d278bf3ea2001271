"""Every engine against a float64 brute force, through one tester.

What an engine answers is judged by what it says of itself: one that sums all rows by the posterior,
one that looks at some rows by the posterior over those rows and by what it says of the rest.
"""

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.nn.functional import pad

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Auto, Engine, Exact, Nearest, Queries, log_weights
from stagewise.engines.exact import FEW
from stagewise.engines.log_weights import LogWeights
from stagewise.engines.nearest import Truncated, draw_rows
from stagewise.engines.torch_cluster import TorchCluster, _position, _reach
from stagewise.paths import PathCoefficients

N, K = 300, 20
SIZES = {0: 150, 1: 90, 2: 40, 3: 15, 7: 3, 9: 2}
TIMES = (0, 0.02, 0.1, 0.3, 0.6, 0.9, 0.99, 0.999)
FINER = (0, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ONE = (torch.float32,)
DIMS = (3, 512)
BANKS = ("gaussian", "clusters", "duplicates", "far")


class Plain(TorchCluster):
    """Neighbours by explicit differences in float64, in place of the library."""

    prepare = Truncated.prepare

    def search(self, bank, queries, n):
        table = torch.full((len(queries), n), -1)
        y, _ = _position(bank, queries)
        for query, segment in enumerate(queries.segments):
            rows = torch.arange(segment.start, segment.stop)
            gaps = (y[query] - (bank.take(rows) - bank.centre)).square().sum(1)
            near = gaps.topk(min(n, len(rows)), largest=False).indices
            table[query, : len(near)] = rows[near]
        return table

    def rounding(self, bank, y, distance):
        return torch.zeros_like(distance)


@dataclass(frozen=True)
class Case:
    """An engine, and what is to be expected of it.

    Attributes:
        make: Makes it.
        sums: Which rows enter the mean: "all", "found" (k rows, and the posterior is over those),
            "some" (at least k, and the other statistics are of all), or "any".
        tail_kind: What it says of its tail mass.
        max_tail: The tail mass it lets pass.
        dtypes: Banks it is tried on; one will do for a variant of another engine.
        promised: Whether it keeps the relative error of the mean that `Exact` documents.
    """

    make: Callable[[], Engine]
    sums: str
    tail_kind: str
    max_tail: float = 1.0
    dtypes: tuple[torch.dtype, ...] = DTYPES
    promised: bool = False


CASES = {
    "exact": Case(Exact, "all", "measured", promised=True),
    "exact-float64": Case(lambda: Exact("float64"), "all", "measured", promised=True),
    "exact-float32": Case(lambda: Exact("float32"), "all", "measured"),
    "exact-chunks": Case(
        lambda: Exact(chunk_size=37), "all", "measured", dtypes=ONE, promised=True
    ),
    "nearest-all": Case(lambda: Nearest(N), "all", "measured", dtypes=ONE),
    "nearest": Case(lambda: Nearest(K), "some", "measured"),
    "nearest-chunks": Case(lambda: Nearest(K, chunk_size=37), "some", "measured", dtypes=ONE),
    "nearest-exact": Case(lambda: Nearest(K, max_tail=1e-6), "all", "measured", 1e-6, dtypes=ONE),
    "nearest-draws": Case(lambda: Nearest(K, draws=30), "any", "estimated", dtypes=ONE),
    "nearest-draws-all": Case(lambda: Nearest(K, draws=N), "all", "estimated", dtypes=ONE),
    "plain": Case(lambda: Plain(K), "found", "bounded"),
    "plain-all": Case(lambda: Plain(N), "all", "bounded", dtypes=ONE),
    "plain-exact": Case(lambda: Plain(K, max_tail=1e-6), "all", "bounded", 1e-6, dtypes=ONE),
    "cluster": Case(lambda: TorchCluster(K), "found", "bounded"),
    "cluster-exact": Case(
        lambda: TorchCluster(K, max_tail=1e-6), "all", "bounded", 1e-6, dtypes=ONE
    ),
    "auto": Case(Auto, "all", "measured", dtypes=ONE, promised=True),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads do these small products no sooner, and on a busy machine far later."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_for(name):
    if name.startswith("cluster"):
        pytest.importorskip(
            "torch_cluster", reason="pip install --no-build-isolation 'stagewise[cluster]'"
        )
    return CASES[name].make()


def samples(kind, dim):
    generator = torch.Generator().manual_seed(len(kind) + dim)
    x = torch.randn(N, dim, generator=generator, dtype=torch.float64)
    if kind == "clusters":
        x = 3 * x[torch.randint(12, (N,), generator=generator)] + 0.3 * x
    if kind == "duplicates":
        x[100:200] = x[:100]
        steps = torch.randn(100, dim, generator=generator, dtype=torch.float64)
        x[200:] = x[torch.arange(100) % 7] + 1e-3 * steps / steps.norm(dim=1, keepdim=True)
    if kind == "far":
        x = x + 100
    if kind == "offset":
        x = 0.5 + 0.1 * x
    if kind == "offset more":
        x = 10 + 0.1 * x
    if kind == "far classes":
        x = 0.1 * x + 5 * (class_of_rows() % 3)[:, None]
    return x


def class_of_rows():
    labels = torch.cat([torch.full((size,), name) for name, size in SIZES.items()])
    return labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))]


@cache
def make_bank(kind, dim, dtype=torch.float32, permuted=False):
    labels = class_of_rows()
    x = samples(kind, dim).to(dtype if dtype == torch.float64 else torch.float32)
    if permuted:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
        x, labels = x[order], labels[order]
    return LatentBank(x, labels, dtype=dtype)


@dataclass(frozen=True)
class Truth:
    """Queries, and their posterior by explicit differences in float64."""

    xt: torch.Tensor
    t: torch.Tensor
    labels: list[int] | None
    x: torch.Tensor  # the samples
    diameter: torch.Tensor  # of the samples
    inside: torch.Tensor  # which of them a query looks at
    logits: torch.Tensor
    gamma: torch.Tensor
    mean: torch.Tensor
    velocity: torch.Tensor

    def over(self, rows):
        """Log-evidence, weights (of all rows) and mean over some of the rows, -1 for none."""
        there = torch.zeros(len(rows), len(self.x) + 1, dtype=torch.bool)
        there = there.scatter_(1, rows.where(rows >= 0, len(self.x)), True)[:, :-1]
        logits = self.logits.masked_fill(~there, -torch.inf)
        gamma = torch.softmax(logits, 1)
        return torch.logsumexp(logits, 1), gamma, gamma @ self.x

    def outside(self, rows):
        """The posterior mass that is not on some rows."""
        padded = torch.cat([self.gamma, torch.zeros(len(rows), 1)], 1)
        return padded.scatter(1, rows.where(rows >= 0, len(self.x)), 0).sum(1)


@cache
def truth(kind, dim, dtype, class_wise, times=TIMES):
    bank = make_bank(kind, dim, dtype)
    generator = torch.Generator().manual_seed(5)
    names = [list(SIZES)[i % len(SIZES)] for i in range(3 * len(times))]
    source = [
        int(torch.randint(s.start, s.stop, (1,), generator=generator))
        for s in map(bank.segment, names)
    ]
    x = bank.take(torch.arange(N))
    t = torch.tensor(times, dtype=torch.float64).repeat(3)
    x0 = torch.randn(len(t), dim, generator=generator, dtype=torch.float64)
    xt = LinearPath().interpolate(x0, x[source], t)
    inside = torch.ones(len(t), N, dtype=torch.bool)
    if class_wise:
        inside[:] = False
        for query, name in enumerate(names):
            inside[query, bank.segment(name)] = True
    gaps = torch.stack([(xt - t[:, None] * row).square().sum(1) for row in x], 1)
    logits = (-gaps / (2 * (1 - t[:, None]) ** 2)).masked_fill(~inside, -torch.inf)
    gamma = torch.softmax(logits, 1)
    mean = gamma @ (x - bank.centre) + bank.centre
    velocity = (mean - xt) / (1 - t[:, None])
    labels = names if class_wise else None
    diameter = torch.cdist(x, x).max()
    return Truth(xt, t, labels, x, diameter, inside, logits, gamma, mean, velocity)


def entropy_and_ess(gamma):
    return -torch.special.xlogy(gamma, gamma).sum(1), 1 / gamma.square().sum(1)


def close(got, expected, tolerance, scale=1.0):
    error = (got - expected).abs() / scale
    assert error.max() <= tolerance, f"off by {error.max():.3g}, {tolerance:.3g} is let pass"


def check_promise(post, want, bank, rtol=1e-5):
    """What `Exact(rtol=...)` documents: the error of the mean over its distance from the bank's.

    Less what float64 loses: at t = 0 the mean is that of the bank.
    """
    length = (want.mean - bank.centre).norm(dim=1)
    off = (post.mean - want.mean).norm(dim=1)
    excess = (off - 1e-14 * bank.max_norm).clamp_min(0)
    # Near the data an error is that of the velocity, which divides it by sigma.
    close(excess, 0, rtol, (length * (1 - want.t)).clamp_min(1e-300))


def check_statistics(post, log_evidence, gamma, k):
    """Log-evidence, entropy, ESS, weights and rows are those of the weights `gamma`."""
    entropy, ess = entropy_and_ess(gamma)
    close(post.log_evidence, log_evidence, 1e-5)
    close(post.entropy, entropy, 3e-5)
    close(post.ess, ess, 3e-5, ess)
    assert post.weights.shape == post.rows.shape == (len(gamma), k)
    top = gamma.topk(k, 1).values
    close(post.weights, top, 1e-5)
    none = post.rows < 0
    assert (post.weights[none] == 0).all()
    # Which of equal rows comes first is anybody's guess.
    close(gamma.gather(1, post.rows.clamp_min(0)).masked_fill(none, 0), top, 1e-5)
    for rows in post.rows:
        assert len(set(rows[rows >= 0].tolist())) == (rows >= 0).sum()


def in_turn(kinds, dims):
    """Each kind of bank with each dimension, one of them class-wise: the other with the next."""
    found = [
        (kind, dim, (k + j) % 2 > 0) for k, kind in enumerate(kinds) for j, dim in enumerate(dims)
    ]
    return pytest.mark.parametrize(("kind", "dim", "class_wise"), found)


@in_turn(BANKS, DIMS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_engine(name, dtype, kind, dim, class_wise):
    case, bank = CASES[name], make_bank(kind, dim, dtype)
    want = truth(kind, dim, dtype, class_wise)
    oracle = Oracle(bank, engine=engine_for(name))
    k = N if name in ("nearest-all", "plain-all") else K
    post = oracle.posterior(want.xt, want.t, want.labels, k=k)
    assert post.tail_kind == case.tail_kind or (post.tail_mass == 0).all()
    assert ((post.tail_mass >= 0) & (post.tail_mass <= 1)).all()
    # Rows are averaged in float32, which knows a far mean to seven digits.
    scale = (want.x - bank.centre).norm(dim=1).max() + 0.03 * bank.centre.norm()
    diameter = want.diameter
    off = (post.mean - want.mean).norm(dim=1)

    if case.sums == "all":
        assert post.tail_mass.max() <= case.max_tail
        missed = post.tail_mass.max() if case.max_tail < 1 else 0
        assert (off <= 1e-5 * scale + missed * diameter).all()
        velocity = oracle.velocity(want.xt, want.t, want.labels)
        close((velocity - want.velocity).norm(dim=1), 0, 1e-5, want.velocity.norm(dim=1))
        if case.promised:
            check_promise(post, want, bank)
        if case.max_tail == 1:
            check_statistics(post, torch.logsumexp(want.logits, 1), want.gamma, k)
            assert post.tail_mass.max() == 0
            assert (post.tail_kind == "measured") == (case.tail_kind == "measured")
        return

    if case.sums == "found":
        log_evidence, gamma, mean = want.over(post.rows)
        check_statistics(post, log_evidence, gamma, k)
        close((post.mean - mean).norm(dim=1), 0, 1e-5, scale)
        count = (post.rows >= 0).sum(1)
        assert torch.equal(count, want.inside.sum(1).clamp_max(K))
        if case.tail_kind == "bounded":
            missed = want.outside(post.rows)
            least = want.outside(want.gamma.topk(K, 1).indices)
            assert (missed <= post.tail_mass * (1 + 2e-5) + 1e-15).all()
            close(missed, least, 1e-5)  # the rows are the nearest
            assert (off <= post.tail_mass * diameter + 1e-5 * scale).all()
            # And the bound is not looser than it must be, but for a little in what float32 finds.
            logits = want.logits.gather(1, post.rows.clamp_min(0)).masked_fill(post.rows < 0, 0)
            rest = (want.inside.sum(1) - count).log()
            naive = torch.sigmoid(rest + logits.amin(1) - log_evidence + 0.15)
            early = want.t <= 0.3
            assert (post.tail_mass <= naive)[early].all()
        return

    missed = post.tail_mass
    if case.sums == "some":
        check_statistics(post, torch.logsumexp(want.logits, 1), want.gamma, k)
        # More than K rows are taken where more log-weights were computed again.
        ordered = want.gamma.sort(1, descending=True)
        tails = ordered.values.flip(1).cumsum(1).flip(1)[:, K:]
        taken = K + (tails - missed[:, None]).abs().argmin(1)
        largest = ordered.indices.where(torch.arange(N) < taken[:, None], -1)
        just_k = (want.outside(post.rows) - missed).abs() <= 1e-5
        rows = largest.where(~just_k[:, None], pad(post.rows, (0, N - K), value=-1))
        close(want.outside(rows), missed, 1e-5)
        # With weights equal at the cut nobody can tell which rows were taken.
        edge = torch.stack([taken - 1, taken.clamp_max(N - 1)], 1)
        edge = ordered.values.gather(1, edge)
        known = just_k | (edge[:, 0] > edge[:, 1] * (1 + 1e-5))
        close((post.mean - want.over(rows)[2]).norm(dim=1)[known], 0, 1e-5, scale)
    else:
        missed = torch.maximum(missed, want.outside(post.rows))
    assert (off <= missed * diameter + 1e-5 * scale).all()


@in_turn([*BANKS, "offset", "offset more", "far classes"], [64, 512])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, case in CASES.items() if case.promised for dtype in case.dtypes],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_promised_error_of_the_mean(name, dtype, kind, dim, class_wise):
    bank = make_bank(kind, dim, dtype)
    want = truth(kind, dim, dtype, class_wise, FINER)
    post = Oracle(bank, engine=engine_for(name)).posterior(want.xt, want.t, want.labels)
    check_promise(post, want, bank)


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("kind", ["gaussian", "offset", "far classes"])
def test_any_tolerance_is_kept(kind, rtol):
    bank, want = make_bank(kind, 512), truth(kind, 512, torch.float32, False, FINER)
    post = Oracle(bank, engine=Exact(rtol=rtol)).posterior(want.xt, want.t)
    check_promise(post, want, bank, rtol)


TRUNCATING = ["nearest", "nearest-draws", "plain", "cluster"]
SOME = ["exact", *TRUNCATING, "auto"]


@pytest.mark.parametrize("name", ["exact", *TRUNCATING])
@pytest.mark.parametrize("pickled", [False, True], ids=["deepcopy", "pickle"])
def test_copies_answer_alike(name, pickled):
    want, bank = truth("gaussian", 64, torch.float32, True), make_bank("gaussian", 64)
    oracle = Oracle(bank, engine=engine_for(name))
    oracle.posterior(want.xt, want.t, want.labels)  # an engine in use, whose draws have begun
    copied = pickle.loads(pickle.dumps(oracle.engine)) if pickled else copy.deepcopy(oracle.engine)
    assert repr(copied) == repr(oracle.engine)
    assert copied is not oracle.engine
    other = Oracle(bank, engine=copied)
    one, two = (each.posterior(want.xt, want.t, want.labels, k=5) for each in (oracle, other))
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.rows, two.rows)


@pytest.mark.parametrize("name", [name for name in SOME if "draws" not in name])
@pytest.mark.parametrize("class_wise", [False, True], ids=["whole", "class-wise"])
@pytest.mark.parametrize("kind", ["gaussian", "clusters"])
def test_order_of_the_rows_does_not_matter(name, kind, class_wise):
    want = truth(kind, 64, torch.float32, class_wise)
    one, two = (
        Oracle(make_bank(kind, 64, permuted=permuted), engine=engine_for(name))
        for permuted in (False, True)
    )
    one, two = (each.posterior(want.xt, want.t, want.labels, k=K) for each in (one, two))
    # At t = 0 all rows are equally near, and which k of them are taken is anybody's guess.
    one, two = one[want.t > 0], two[want.t > 0]
    close(one.mean, two.mean, 1e-5)
    close(one.tail_mass, two.tail_mass, 1e-6)
    close(one.weights, two.weights, 1e-6)


@pytest.mark.parametrize("name", TRUNCATING)
def test_more_neighbours_than_rows_are_refused(name):
    engine, bank = engine_for(name), LatentBank(torch.randn(K - 1, 3))
    with pytest.raises(ValueError, match=f"`k` of at most {K - 1}, the rows of the bank, got {K}"):
        Oracle(bank, engine=engine)
    Oracle(LatentBank(torch.randn(K, 3)), engine=engine)


@pytest.mark.parametrize("kind", [Nearest, Plain, TorchCluster])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "`k` of at least 1, got 0"),
        ({"k": -5}, "`k` of at least 1, got -5"),
        ({"max_tail": -0.1}, r"`max_tail` in \[0, 1\), got -0.1"),
        ({"max_tail": 1.0}, r"`max_tail` in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("settings", [{"precision": "half"}, {"rtol": -1.0}, {"chunk_size": -1}])
def test_exact_refuses_what_is_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Exact(**settings)


@pytest.mark.parametrize("name", TRUNCATING)
def test_more_weights_than_neighbours(name):
    want, bank = truth("gaussian", 64, torch.float32, True), make_bank("gaussian", 64)
    post = Oracle(bank, engine=engine_for(name)).posterior(want.xt, want.t, want.labels, k=2 * K)
    assert post.rows.shape == (len(want.t), 2 * K)
    if "draws" not in name:
        count = (post.rows >= 0).sum(1)
        assert torch.equal(count, want.inside.sum(1).clamp_max(2 * K))
        close(post.mean, want.over(post.rows)[2], 1e-5) if name != "nearest" else None


def queries_at(bank, xt, alpha, sigma):
    """Queries of the whole bank with the same coefficients."""
    alpha, sigma = (torch.full((len(xt),), v, dtype=torch.float64) for v in (alpha, sigma))
    return Queries(xt, PathCoefficients(alpha, sigma, alpha, sigma), [bank.whole] * len(xt))


class Given(Plain):
    """Finds the rows it is given, and errs by as much as it is told."""

    def __init__(self, rows, error=0.0):
        super().__init__(rows.shape[1])
        self.rows, self.error = rows, error

    def search(self, bank, queries, n):
        return self.rows.clone()

    def rounding(self, bank, y, distance):
        return torch.full_like(distance, self.error)


def test_rows_that_are_missing_from_a_search():
    bank, want = make_bank("gaussian", 3), truth("gaussian", 3, torch.float32, False)
    count = torch.arange(len(want.t)) % K + 1
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in want.t])
    rows = rows.where(torch.arange(K) < count[:, None], -1)
    post = Oracle(bank, engine=Given(rows)).posterior(want.xt, want.t, k=K)
    log_evidence, gamma, mean = want.over(rows)
    check_statistics(post, log_evidence, gamma, K)
    close(post.mean, mean, 1e-5)
    # The bound is made of the n - K rows that were not found and the least of those that were.
    least = want.logits.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, torch.inf).amin(1)
    odds = (N - count).log() + least - log_evidence
    at_zero = want.t == 0
    close(post.tail_mass[at_zero], torch.sigmoid(odds)[at_zero], 1e-7)
    assert (post.tail_mass >= torch.sigmoid(odds) - 1e-7).all()


@pytest.mark.parametrize("name", ["exact", *TRUNCATING])
def test_what_is_not_a_number_stays_so(name):
    want, bank = truth("gaussian", 3, torch.float32, True), make_bank("gaussian", 3)
    xt = want.xt.clone()
    xt[1] = torch.nan
    post = Oracle(bank, engine=engine_for(name)).posterior(xt, want.t, want.labels)
    assert post.mean[1].isnan().all()
    others = torch.arange(len(xt)) != 1
    assert post.mean[others].isfinite().all()
    assert post.tail_mass[others].isfinite().all()


def test_the_bound_allows_for_a_search_that_errs():
    # Rows on a line, a query at its end: the distances of neighbours in line differ by little.
    x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None]
    bank = LatentBank(x)
    queries = queries_at(bank, torch.tensor([[-1.0]], dtype=torch.float64), 1.0, 0.2)
    logits = -(1 + x[:, 0]).square() / (2 * 0.2**2)
    gamma = torch.softmax(logits, 0)
    # The search takes the square of row 12 for larger than that of row 13.
    found = torch.tensor([[*range(12), 13]])
    missed = 1 - gamma[found[0]].sum()
    error = float((1 + x[13, 0]) ** 2 - (1 + x[12, 0]) ** 2)
    tails = {v: Given(found, v).posterior(bank, queries).tail_mass for v in (0.0, error)}
    rest = 40 - 13
    z = logits[found[0]].exp().sum()
    for v, tail in tails.items():
        last = rest * (logits[13] + v / (2 * 0.2**2)).exp()
        close(tail, last / (z + last), 1e-9)
    assert missed < tails[error]
    # Row 12 alone in the rest: without the allowance the bound would be broken.
    bank = LatentBank(x[:14])
    queries = queries_at(bank, queries.xt, 1.0, 0.2)
    missed = torch.softmax(logits[:14], 0)[12]
    assert Given(found, 0.0).posterior(bank, queries).tail_mass < missed
    assert Given(found, error).posterior(bank, queries).tail_mass >= missed


def test_the_bound_where_queries_do_not_stand_where_they_are():
    # At 0 < a < a' the rows nearest to y are not those of least distance: on the circle
    # <z, x> = b ||x||^2 / 2 with a < b < a' the longest rows have the largest weights, and the
    # shortest are found.
    z = torch.tensor([[0.0, 50.0]], dtype=torch.float64)
    height = torch.linspace(0.1, 1, 30, dtype=torch.float64)
    wide = 50 / 256
    alpha, b = wide / 2, 0.75 * wide
    along = b * height.square() / (2 * 50)
    x = torch.cat([torch.stack([side * height, along], 1) for side in (1, -1)])
    bank = LatentBank(x)
    xt = z + alpha * bank.centre
    queries = queries_at(bank, xt, alpha, 1.0)
    assert _reach(bank) == pytest.approx(1, rel=1e-3)
    assert _position(bank, queries)[1] > 1.9 * alpha
    logits = -(xt - alpha * x).square().sum(1) / 2
    post = Plain(10).posterior(bank, queries, k=10)
    missed = 1 - torch.softmax(logits, 0)[post.rows[0]].sum()
    logits = logits[post.rows[0]] - logits.max()
    naive = 50 * logits.min().exp()
    assert missed > 1.0001 * naive / (naive + logits.exp().sum())
    assert missed <= post.tail_mass < missed + 0.01


def far_from_collapsed():
    """A bank and queries in navigation, and their posterior."""
    generator = torch.Generator().manual_seed(3)
    bank = LatentBank(torch.randn(800, 3, generator=generator, dtype=torch.float64))
    x0 = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    queries = queries_at(bank, 0.4 * bank.rows[:6] + 0.6 * x0, 0.4, 0.6)
    return bank, queries, Exact("float64").posterior(bank, queries)


@pytest.mark.slow
def test_the_bias_of_nearest_falls_with_its_draws():
    generator = torch.Generator().manual_seed(1)
    bank = LatentBank(torch.randn(4000, 3, generator=generator, dtype=torch.float64))
    x0 = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    queries = queries_at(bank, 0.4 * bank.rows[:6] + 0.6 * x0, 0.4, 0.6)
    exact = Exact("float64").posterior(bank, queries, k=len(bank))
    weights = torch.zeros(6, len(bank), dtype=torch.float64).scatter_(1, exact.rows, exact.weights)
    rest = weights.scatter(1, exact.rows[:, :100], 0)
    middle = rest @ bank.rows / rest.sum(1, keepdim=True)
    truncated = Nearest(100, precision="float64").posterior(bank, queries)
    spread = (exact.mean - bank.centre).norm(dim=1)
    assert ((truncated.mean - exact.mean).norm(dim=1) > 0.1 * spread).all()
    torch.testing.assert_close(truncated.tail_mass, rest.sum(1))
    numbers, biases = [], []
    for draws in (100, 300, 900):
        engine = Nearest(100, draws=draws, precision="float64")
        off, used = torch.zeros(6, 3, dtype=torch.float64), draws + 100
        for _ in range(100):
            drawn = draw_rows(bank.whole, used, copy.deepcopy(engine.generator))
            error = engine.posterior(bank, queries).mean - exact.mean
            # What is linear in the draws has mean 0, and is most of the error.
            part = rest[:, drawn] @ bank.rows[drawn] - rest[:, drawn].sum(1, keepdim=True) * middle
            off += error - len(bank) / used * part
        numbers.append(1 / used - 1 / len(bank))  # that all rows leave no bias
        biases.append(off.norm() / 100)
    x, y = torch.tensor(numbers).double().log(), torch.stack(biases).log()
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    assert 0.85 < slope < 1.15


def test_a_small_share_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    bank = LatentBank(torch.randn(20_000, 3, generator=generator, dtype=torch.float32))
    xt, t = torch.randn(4, 3, generator=generator).double(), torch.full((4,), 0.05).double()
    post = Oracle(bank, engine=Nearest(8)).posterior(xt, t, k=8)
    x = bank.take(post.rows)
    gamma = torch.softmax(-(xt[:, None] - 0.05 * x).square().sum(2) / (2 * 0.95**2), 1)
    assert (post.tail_mass > 0.99).all()
    close(post.mean, torch.einsum("bk,bkd->bd", gamma, x), 1e-6)


def test_every_query_draws_from_its_own_rest():
    # Rows of the identity and no signal: the mean says which rows are in it, and by how much.
    bank, one = LatentBank(torch.eye(100)), torch.ones(1, dtype=torch.float64)
    oracle = Oracle(bank, engine=Nearest(90, draws=1))
    for _ in range(20):
        mean = oracle.posterior(torch.zeros(1, 100), 0 * one).mean[0]
        close(mean.sum(), 1, 1e-6)
        assert (mean > 0).sum() > 90
        assert ((mean - 0.01).abs() < 1e-6).sum() >= 90


def test_random_rows_without_weight_stand_for_nothing():
    # 100 rows at 1 are all that matters: 70 of them are found, and most draws are others.
    x = torch.full((2000, 1), -1.0)
    x[:100] = 1
    oracle = Oracle(LatentBank(x), engine=Nearest(70, draws=1))
    for _ in range(10):
        post = oracle.posterior(torch.ones(2, 1), torch.full((2,), 0.99))
        close(post.mean, 1, 1e-6)


def test_every_call_draws_anew_and_a_seed_repeats_them():
    bank, queries, _ = far_from_collapsed()
    one, two = (Nearest(10, draws=20, seed=4) for _ in range(2))
    first = one.posterior(bank, queries).mean
    assert torch.equal(first, two.posterior(bank, queries).mean)
    assert not torch.equal(first, one.posterior(bank, queries).mean)
    assert not torch.equal(first, Nearest(10, draws=20, seed=5).posterior(bank, queries).mean)


def test_watching_draws_nothing_from_the_global_generators():
    bank, queries, _ = far_from_collapsed()
    state, python_state = torch.get_rng_state(), random.getstate()
    Nearest(10, draws=20).posterior(bank, queries)
    assert torch.equal(state, torch.get_rng_state())
    assert python_state == random.getstate()


@pytest.mark.parametrize("kind", [Plain, Nearest])
def test_max_tail_decides_who_is_answered_exactly(kind):
    want, bank = truth("gaussian", 64, torch.float32, False), make_bank("gaussian", 64)
    free = Oracle(bank, engine=kind(K)).posterior(want.xt, want.t)
    limit = float(free.tail_mass.sort().values[len(want.t) // 2])
    post = Oracle(bank, engine=kind(K, max_tail=limit)).posterior(want.xt, want.t)
    over = free.tail_mass > limit
    assert over.any()
    assert not over.all()
    assert (post.tail_mass[over] == 0).all()
    assert torch.equal(post.tail_mass[~over], free.tail_mass[~over])
    assert torch.equal(post.mean[~over], free.mean[~over])
    close(post.mean[over], want.mean[over], 1e-5)
    assert (free.mean - want.mean)[over].norm(dim=1).max() > 0.1


@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("kind", BANKS)
def test_a_coarse_tolerance_is_kept(kind, dim, class_wise):
    """Where a CPU has units for it, such a bank is multiplied in its own type."""
    want = truth(kind, dim, torch.bfloat16, class_wise)
    bank = make_bank(kind, dim, torch.bfloat16)
    post = Oracle(bank, engine=Exact(rtol=1e-3)).posterior(want.xt, want.t, want.labels)
    off = (post.mean - want.mean).norm(dim=1)
    length = (want.mean - bank.centre).norm(dim=1)
    assert (off <= 1e-3 * length + 1e-6 * bank.max_norm).all()
    assert post.tail_mass.max() == 0


def test_only_rows_that_can_matter_are_read_again(monkeypatch):
    """And those that are left out are far below, with a near duplicate of the source at hand."""
    read = []
    rows_one_by_one = LogWeights._rows_one_by_one

    def counted(found, rows):
        read.append(len(rows))
        return rows_one_by_one(found, rows)

    monkeypatch.setattr(LogWeights, "_rows_one_by_one", counted)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 256, generator=generator)
    x[1] = x[0] + 1e-4 * torch.randn(256, generator=generator)
    t = torch.tensor([0.5, 0.5, 0.01])
    x0 = torch.randn(3, 256, generator=generator)
    xt = LinearPath().interpolate(x0, x[[0, 7, 9]], t)
    bank = LatentBank(x)
    post = Oracle(bank, engine=Exact()).posterior(xt, t, k=4)
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t, k=4)
    assert read[0] == 2 + 1 + FEW  # the twins, one row, and all that lead in navigation
    torch.testing.assert_close(post.mean, exact.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(post.weights, exact.weights, rtol=1e-6, atol=1e-9)
    assert set(post.rows[0, :2].tolist()) == {0, 1}
    assert 0.4 < post.weights[0, 1] < 0.5


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {}])
def test_rows_that_are_converted_are_read_once(monkeypatch, settings, chunk_size):
    """In navigation: those of a class, for one query or two, and all rows for all queries."""
    read = []
    chunks = LatentBank.chunks

    def counted(bank, segment, *rest):
        read.append(segment)
        return chunks(bank, segment, *rest)

    g = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.3, 2, 40).repeat_interleave(120)[:, None]
    # Rows far from the origin: those of 32 bits are centred before they are multiplied.
    x = 5 + spread * torch.randn(4800, 300, generator=g)
    bank = LatentBank(x, torch.arange(40).repeat_interleave(120), **settings)
    labels = torch.randperm(40, generator=g)
    labels[1] = labels[0]
    t = torch.linspace(0, 0.05, 40)
    xt = LinearPath().interpolate(torch.randn(40, 300, generator=g), bank.take(120 * labels), t)
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t, labels)
    monkeypatch.setattr(LatentBank, "chunks", counted)
    # Without the check, which reads the rows of a doubtful query again.
    engine = Exact("float32", chunk_size=chunk_size)
    post = Oracle(bank, engine=engine).posterior(xt, t, labels)
    assert len(read) == 39
    off = (post.mean - exact.mean).norm(dim=1) / (exact.mean - bank.centre).norm(dim=1)
    assert off.max() < 1e-6
    assert (exact.ess > 10).sum() > 20  # navigation

    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t)
    read.clear()
    post = Oracle(bank, engine=engine).posterior(xt, t)
    assert len(read) == 1
    off = (post.mean - exact.mean).norm(dim=1) / (exact.mean - bank.centre).norm(dim=1)
    assert off[1:].max() < 1e-6  # at t = 0 the mean is that of all rows


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_what_one_row_answers_is_summed_no_further(monkeypatch, chunk_size):
    """Of all rows, converted: half of the queries are near a row of some chunk."""
    g = torch.Generator().manual_seed(3)
    bank = LatentBank(torch.randn(600, 300, generator=g), dtype=torch.bfloat16)
    rows, t = torch.arange(0, 600, 30), torch.tensor([0.01, 0.35]).repeat(10)
    xt = LinearPath().interpolate(torch.randn(20, 300, generator=g), bank.take(rows), t)
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t)
    summed, averages = [], log_weights.averages
    monkeypatch.setattr(
        log_weights, "averages", lambda w, rows: summed.append(len(w)) or averages(w, rows)
    )
    post = Oracle(bank, engine=Exact("float32", chunk_size=chunk_size)).posterior(xt, t)
    assert summed[0] == 10 if chunk_size is None else summed[0] > summed[40] > summed[-1] == 10
    assert len(summed) == (1 if chunk_size is None else 86)
    off = (post.mean - exact.mean).norm(dim=1) / (exact.mean - bank.centre).norm(dim=1)
    assert off.max() < 1e-6


def test_nearest_rows_of_converted_classes_need_no_sum_of_all(monkeypatch):
    g, labels = torch.Generator().manual_seed(4), torch.arange(4)
    each = labels.repeat_interleave(300)
    bank = LatentBank(torch.randn(1200, 64, generator=g), each, dtype=torch.bfloat16)
    summed, averages = [], log_weights.averages
    monkeypatch.setattr(
        log_weights, "averages", lambda *given: summed.append(1) or averages(*given)
    )
    for engine, count in ((Nearest(5), 0), (Exact(), 4)):
        summed.clear()
        oracle = Oracle(bank, engine=engine)
        oracle.posterior(torch.randn(4, 64, generator=g), torch.full((4,), 0.02), labels)
        assert len(summed) == count


def test_rows_of_a_table_are_not_those_of_the_class():
    """One query for each class, whose rows are converted: only those in its table are summed."""
    g, labels = torch.Generator().manual_seed(4), torch.arange(4)
    each = labels.repeat_interleave(100)
    bank = LatentBank(torch.randn(400, 64, generator=g), each, dtype=torch.bfloat16)
    xt, t = torch.randn(4, 64, generator=g), torch.full((4,), 0.02)
    table = 100 * labels[:, None] + torch.arange(20)
    post = Exact().solve(bank, Oracle(bank).queries(xt, t, labels), 1, table=table)
    some = Oracle(LatentBank(bank.take(table.flatten()), each[::5]), engine=Exact("float64"))
    torch.testing.assert_close(
        post.mean, some.posterior(xt, t, labels).mean.double(), rtol=1e-6, atol=1e-6
    )


def test_float64_is_for_queries_that_more_leading_rows_do_not_help(monkeypatch):
    made = []
    init = LogWeights.__init__

    def counted(found, bank, queries, dtype, **options):
        made.append((dtype, len(queries)))
        init(found, bank, queries, dtype, **options)

    g = torch.Generator().manual_seed(5)
    x, t = torch.randn(3000, 512, generator=g), torch.linspace(0.02, 0.25, 64)
    xt = LinearPath().interpolate(torch.randn(64, 512, generator=g), x[:64], t)
    bank = LatentBank(x)
    exact = Oracle(bank, engine=Exact("float64")).posterior(xt, t).mean
    monkeypatch.setattr(LogWeights, "__init__", counted)
    passes = {}
    for rtol in (1e-5, 2e-6, 1e-6):
        made.clear()
        mean = Oracle(bank, engine=Exact(rtol=rtol)).posterior(xt, t).mean
        passes[rtol] = [dtype for dtype, _ in made]
        assert ((mean - exact).norm(dim=1) <= rtol * (exact - bank.centre).norm(dim=1)).all()
        assert all(count < 64 for _, count in made[1:])
    single, double = torch.float32, torch.float64
    assert passes == {1e-5: [single], 2e-6: [single] * 2, 1e-6: [single, single, double]}
