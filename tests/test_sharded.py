"""`Sharded` in real processes (gloo, 2 and 4): the answers of one process, errors on every rank.

This file is also what the processes run: every scenario of a world size in one start of them.
"""

import copy
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import traceback
import warnings
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stagewise import LatentBank, LinearPath, Mix, Oracle, Posterior, Scheme, merge
from stagewise.engines import Exact, Nearest
from stagewise.engines.ranks import About, Header, _device, warn_of_differences
from stagewise.engines.sharded import (
    EmptyShard,
    Sharded,
    combine,
    pack,
    shard_rows,
    shares,
)
from stagewise.losses import FlowMatchingLoss
from stagewise.queries import Queries

N, SHAPE, D, K = 401, (2, 3, 4), 24, 5
TIMES = [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.99, 0.999]
NEAREST = {"k": 12, "max_tail": 0.05}
SHORT = timedelta(seconds=3)
SHARDS_NETWORKS = not torch.__version__.startswith("2.6.")  # on a CPU
FIELDS = [field.name for field in fields(Posterior)]

# The first row of each rank and N; queries of each rank.
EVEN = {2: [0, 201, 401], 4: [0, 101, 201, 301, 401]}
UNEVEN = {2: [0, 30, 401], 4: [0, 20, 170, 380, 401]}
EMPTY = {2: [0, 401, 401], 4: [0, 150, 150, 380, 401]}
BATCHES = {2: [33, 17], 4: [11, 0, 9, 30]}
ONE_ASKS = {2: [0, 50], 4: [0, 50, 0, 0]}

# name: (rows, queries, labels, type of the rows, engine)
RUNS = {
    "whole": (EVEN, BATCHES, "none", torch.float64, Exact("float64")),
    "whole, one asks": (EMPTY, ONE_ASKS, "none", torch.float64, Exact("float64")),
    "class-wise": (UNEVEN, BATCHES, "own", torch.float64, Exact("float64")),
    "class-wise, empty": (EMPTY, ONE_ASKS, "own", torch.float64, Exact("float64")),
    "some class-wise": (EMPTY, BATCHES, "some", torch.float64, Exact("float64")),
    "float32": (EVEN, BATCHES, "some", torch.float32, Exact()),
    "bfloat16": (UNEVEN, BATCHES, "some", torch.bfloat16, Exact()),
    "float16": (EMPTY, ONE_ASKS, "own", torch.float16, Exact()),
    "all_reduce": (UNEVEN, BATCHES, "some", torch.float64, Exact("float64")),
    "nearest": (EVEN, BATCHES, "none", torch.float64, Nearest(**NEAREST)),
}
EXACT = [name for name in RUNS if name != "nearest"]
HALF = (torch.bfloat16, torch.float16)
LARGE = (1600, 4096)  # rows of a bank, 26 MB in float32, whose memory is measured


def samples():
    """Rows in blocks of a class that are not in the order of classes; two that are nearly equal."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(N, *SHAPE, generator=draws, dtype=torch.float64) + 2
    x[390] = x[10] + 1e-3
    labels = torch.tensor([3, 1, 7, 0, 2]).repeat_interleave(torch.tensor([120, 90, 3, 88, 100]))
    labels[10], labels[390], labels[300] = 2, 2, 3
    return x, labels


def queries(labels_mode):
    """50 queries: x_t, t, the class asked for, and the sample it was made from, -1 if unknown."""
    x, labels = samples()
    source = torch.arange(50) * 8
    source[:7] = torch.tensor([10, 390, 211, 210, 0, 400, 300])
    t = torch.tensor(TIMES, dtype=torch.float64).repeat(5)
    x0 = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = labels[source].tolist()
    if labels_mode == "some":
        names = [name if i % 3 else None for i, name in enumerate(names)]
        names[2] = 0  # not the class of its source
    asked = None if labels_mode == "none" else names
    unknown = torch.arange(50) % 9 == 0
    return LinearPath().interpolate(x0, x[source], t), t, asked, source.masked_fill(unknown, -1)


def shard(first, last, dtype):
    x, labels = samples()
    if first == last:
        return EmptyShard(SHAPE, dtype)
    if dtype in HALF:
        return LatentBank(x[first:last], labels[first:last], dtype=dtype, offset=x[:99].mean(0))
    return LatentBank(x[first:last].to(dtype), labels[first:last])


def asked_in(dtype):
    """The type of queries."""
    return torch.float32 if dtype in HALF else dtype


def stored(dtype):
    """The samples as banks of a type hold them, (N, D), float64."""
    bank = shard(0, N, dtype)
    return bank.take(bank.index.argsort())


def sample_of_row(ends):
    """Which sample each row is, if rows count one shard after the other."""
    _, labels = samples()
    pairs = zip(ends[:-1], ends[1:], strict=True)
    return torch.cat([a + labels[a:b].sort(stable=True).indices for a, b in pairs])


# ---- what a process does


def main(out, world, rank):
    signal.alarm(100)  # ends what hangs
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    report = {name: parity(name, world, rank) for name in RUNS}
    report["errors"] = {name: caught(ask) for name, ask in disagreements(rank).items()}
    report["kind"] = weakest_kind(rank)
    report["bytes"] = traffic(rank)
    report["memory"] = memory(world, rank)
    if world == 4:
        report["subgroups"] = subgroups(rank)
    elif SHARDS_NETWORKS:
        net = network()
        for part in (*net.children(), net):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        mine = shard_rows(N, rank, world)
        bank = LatentBank(samples()[0][mine].flatten(1).clone())
        train(net, Oracle(bank, engine=Sharded(Exact("float64"))), [rank])
        report["fsdp"] = [value.full_tensor().detach() for value in net.parameters()]
    torch.save(report, out / f"report{rank}.pt")
    dist.barrier()
    for call in (never_prepares,) if world == 2 else (never_asks, ends):
        torch.save(call(rank), out / f"{call.__name__}{rank}.pt")
    if world == 2:
        # Left to the interpreter's exit, gloo's threads now and then abort the process.
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)


def parity(name, world, rank):
    rows, batches, mode, dtype, engine = RUNS[name]
    ends = rows[world]
    bank = shard(ends[rank], ends[rank + 1], dtype)
    collectives = ("reduce_scatter_single", "reduce_scatter_tensor")
    kept = {name: getattr(dist, name) for name in collectives if hasattr(dist, name)}
    if name == "all_reduce":
        for collective in kept:
            setattr(dist, collective, refuse)
    oracle = Oracle(bank, engine=Sharded(engine))
    first, last = (sum(batches[world][:r]) for r in (rank, rank + 1))
    xt, t, labels, source = queries(mode)
    row_of_sample = sample_of_row(ends).argsort()
    source = torch.where(source < 0, -1, row_of_sample[source])
    post = oracle.posterior(
        xt[first:last].to(asked_in(dtype)),
        t[first:last],
        None if labels is None else labels[first:last],
        source=source[first:last],
        k=K,
    )
    for collective, function in kept.items():
        setattr(dist, collective, function)
    about = {"held": len(bank), "nbytes": bank.nbytes, "max_norm": bank.max_norm}
    about["offsets"] = oracle.engine.offsets(bank)
    about["num_rows"] = oracle.engine.num_rows(bank)
    about["floor"] = oracle.engine.sigma_floor(bank)
    return about | {field: getattr(post, field) for field in FIELDS}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()


def train(net, oracle, ranks):
    """Three steps on the batches of some of two ranks, each of rows of its own shard."""
    loss_fn = FlowMatchingLoss(scheme=Scheme(oracle, target=Mix(1.0)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, draws = samples()[0].flatten(1), torch.Generator().manual_seed(5)
    for _ in range(3):
        x0 = torch.randn(2, 16, D, generator=draws, dtype=torch.float64)
        t = 0.6 * torch.rand(2, 16, generator=draws)
        for rank in ranks:
            rows = torch.arange(16) + shard_rows(N, rank, 2).start
            loss = loss_fn(lambda xt, t: net(xt), x[rows], x0=x0[rank], t=t[rank], source=rows)
            (loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def memory(world, rank):
    """Bytes of a rank's rows as they are stored, and of all tensors that a query left behind."""
    n, dim = LARGE
    gc.collect()
    gc.freeze()  # there are a million objects, and few of them are tensors
    before = alive()
    rows = shard_rows(n, rank, world)
    x = torch.randn(rows.stop - rows.start, dim, generator=torch.Generator().manual_seed(rank))
    bank = LatentBank(x)
    oracle = Oracle(bank, engine=Sharded())
    post = oracle.posterior(bank.take(torch.arange(4)).float(), torch.full((4,), 0.9))
    assert post.weights.min() > 0.99
    return bank.rows.untyped_storage().nbytes(), alive() - before


def alive():
    """Bytes of all new tensors of this process. The resident size also moves with the allocator."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def refuse(*_, **__):
    raise RuntimeError("not supported")


def caught(ask):
    try:
        ask()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def disagreements(rank):
    """Calls in which rank 1 does as the others do not."""
    x, labels = samples()
    odd = rank == 1
    mine = slice(100 * rank, 100 * rank + 100)
    plain, classes = LatentBank(x[mine]), LatentBank(x[mine], labels[mine])
    engine = Sharded()
    engine.prepare(plain)
    engine.prepare(classes)
    xt, t, half = x[:3], torch.full((3,), 0.5), Sharded()

    def ask(bank, xt=xt, engine=engine, **options):
        oracle = object.__new__(Oracle)
        oracle.__dict__.update(vars(Oracle(plain)) | {"bank": bank, "engine": engine})
        return oracle.posterior(xt, t[: len(xt)], **options)

    def prepares(bank, engine=None):
        return lambda: half.prepare(bank) if engine is None else Sharded(engine).prepare(bank)

    return {
        "shape": prepares(LatentBank(x[mine].flatten(1) if odd else x[mine])),
        "dtype": prepares(LatentBank(x[mine], dtype=torch.bfloat16 if odd else None)),
        "empty dtype": prepares(EmptyShard(SHAPE) if odd else plain),
        "labels": prepares(classes if odd else plain),
        "engine": prepares(plain, Nearest(9) if odd else Exact()),
        "refused": prepares(LatentBank(x[:5]) if odd else plain, Nearest(9)),
        "no rows": prepares(EmptyShard(SHAPE, torch.float64)),
        "k": lambda: ask(plain, k=2 if odd else 1),
        "some labels": lambda: ask(classes, labels=None if odd else [0, 1, 3]),
        "some sources": lambda: ask(plain, source=torch.arange(3) if odd else None),
        "bank": lambda: ask(plain if odd else classes),
        "unknown class": lambda: ask(classes, labels=[3, 99 if odd else 3, 3]),
        "no labels": lambda: ask(plain, labels=[3, None, 3] if odd else [None] * 3),
        # None of these is an error.
        "no queries": lambda: ask(plain, xt=xt[:0], k=2 if odd else 1),
        "no say": lambda: ask(
            classes, xt=xt[:0] if odd else xt, k=4, labels=None if odd else [3, 3, None]
        ),
        "alike": lambda: ask(plain),
    }


class Kind(Nearest):
    """Says "bounded" on rank 1 only, and keeps the sources it was given."""

    def posterior(self, bank, queries, k=1):
        self.source = queries.source.tolist()
        post = super().posterior(bank, queries, k)
        bounded = dist.get_rank() == 1
        return Posterior(**vars(post) | {"tail_kind": "bounded" if bounded else "measured"})


def weakest_kind(rank):
    x, _ = samples()
    engine = Kind(9)
    oracle = Oracle(LatentBank(x[100 * rank : 100 * rank + 100]), engine=Sharded(engine))
    post = oracle.posterior(x[:2], torch.full((2,), 0.5), source=torch.tensor([5, 107]))
    return post.tail_kind, engine.source


def traffic(rank):
    """Numbers of 8 bytes that a call hands to the collectives, and what they make of it."""
    x, _ = samples()
    oracle = Oracle(LatentBank(x[100 * rank : 100 * rank + 100]), engine=Sharded())
    seen = []
    names = ("all_gather_single", "all_gather_into_tensor")
    names += ("reduce_scatter_single", "reduce_scatter_tensor", "all_reduce")
    kept = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def noted(function):
        def call(out, own, **options):
            seen.append((own.nbytes // 8, out.nbytes // 8))
            return function(out, own, **options)

        return call

    for name, function in kept.items():
        setattr(dist, name, noted(function))
    oracle.posterior(x[:3], torch.full((3,), 0.5), k=2)
    for name, function in kept.items():
        setattr(dist, name, function)
    return seen


def subgroups(rank):
    """Two banks, each shared by two of four ranks: of 0 and 1, of 2 and 3."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x, _ = samples()
    bank = LatentBank(x[100 * rank : 100 * rank + 100])
    engine = Sharded(Exact("float64"), group=groups[rank // 2])
    oracle = Oracle(bank, engine=engine)
    other = caught(lambda: Sharded(group=groups[1 - rank // 2]).prepare(bank))
    mean = oracle.posterior(x[:4], torch.full((4,), 0.2)).mean
    return engine.num_rows(bank), mean, other


def never_prepares(rank):
    x, _ = samples()
    result = None
    if rank == 0:
        result = caught(lambda: Sharded(timeout=SHORT).prepare(LatentBank(x)))
    dist.barrier()
    return result


def never_asks(rank):
    x, _ = samples()
    oracle = Oracle(LatentBank(x), engine=Sharded(timeout=SHORT))
    silent = rank == 2
    result = None if silent else caught(lambda: oracle.posterior(x[:3], torch.ones(3)))
    dist.barrier()
    return result


def ends(rank):
    x, _ = samples()
    oracle = Oracle(LatentBank(x), engine=Sharded(timeout=SHORT))
    oracle.posterior(x[:3], torch.ones(3))
    if rank == 3:
        os._exit(0)
    return caught(lambda: oracle.posterior(x[:3], torch.ones(3)))


# ---- the tests


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(world)`: where that many processes, 2 or 4, left their reports."""
    made = tmp_path_factory.mktemp("sharded")
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    command = [sys.executable, "-W", "ignore", __file__, str(made)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return lambda world: made / str(world)


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)])
def world(request):
    """How many processes."""
    return request.param


@pytest.fixture
def reports(folders, world):
    """What each rank reported."""
    return [read(folders(world), "report", rank) for rank in range(world)]


def read(folder, name, rank):
    return torch.load(folder / f"{name}{rank}.pt", weights_only=False)


def together(reports, name):
    """What the ranks were told, in the order of all queries."""
    return {
        field: torch.cat([report[name][field] for report in reports])
        for field in FIELDS
        if field != "tail_kind"
    }


def alone(name):
    """What one process with all rows says."""
    _, _, mode, dtype, engine = RUNS[name]
    bank = shard(0, N, dtype)
    xt, t, labels, source = queries(mode)
    source = torch.where(source < 0, -1, bank.index.argsort()[source])
    return Oracle(bank, engine=engine).posterior(
        xt.to(asked_in(dtype)), t, labels, source=source, k=K
    )


@pytest.mark.parametrize("name", EXACT)
def test_answers_are_those_of_one_process(reports, name):
    one, got = alone(name), together(reports, name)
    tolerance = 1e-6 if "float" in name else 1e-11
    for field in ("mean", "log_evidence", "entropy", "ess", "weights", "source_weight"):
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(got[field], getattr(one, field), **close, msg=field)
    assert got["source_weight"].isnan().sum() == 6
    assert not got["tail_mass"].any()


@pytest.mark.parametrize("name", EXACT)
def test_rows_are_those_that_have_the_weights(reports, world, name):
    got, (rows, _, mode, dtype, _) = together(reports, name), RUNS[name]
    _, labels = samples()
    xt, t, asked, _ = queries(mode)
    x, xt = stored(dtype), xt.to(asked_in(dtype)).double().flatten(1)
    which = sample_of_row(rows[world])[got["rows"]]
    gap = xt[:, None] - t[:, None, None] * x[which]
    sigma = (1 - t).clamp_min(reports[0][name]["floor"])[:, None]
    weights = (-gap.square().sum(2) / (2 * sigma**2) - got["log_evidence"][:, None]).exp()
    there = got["rows"] >= 0
    torch.testing.assert_close(
        weights[there],
        got["weights"][there],
        rtol=1e-6,
        atol=1e-9 if dtype == torch.float64 else 1e-6,
    )
    for row, name in zip(got["rows"].tolist(), asked or [None] * 50, strict=True):
        real = [i for i in row if i >= 0]
        assert len(set(real)) == len(real)
        # A class of three rows has no more than those.
        assert len(real) == (3 if name == 7 else K)
        assert row[len(real) :] == [-1] * (K - len(real))
    if asked is not None:
        own = torch.tensor([-1 if name is None else name for name in asked])[:, None]
        assert ((labels[which] == own) | (own < 0))[there].all()


def test_each_rank_holds_its_part(reports, world):
    for name in ("whole", "class-wise", "class-wise, empty"):
        ends = RUNS[name][0][world]
        for rank, report in enumerate(reports):
            count = ends[rank + 1] - ends[rank]
            assert report[name]["held"] == count
            assert report[name]["nbytes"] == count * D * 8
            assert report[name]["offsets"] == tuple(ends)
            assert report[name]["num_rows"] == N
    assert reports[0]["whole"]["held"] == pytest.approx(N / world, abs=1)


def test_the_memory_of_a_rank_is_that_of_its_part(reports, world):
    whole = 4 * LARGE[0] * LARGE[1]
    for report in reports:
        held, grown = report["memory"]
        assert held == whole / world
        if grown is not None:
            assert 0.9 * held < grown < held + 0.4 * whole


@pytest.mark.skipif(not SHARDS_NETWORKS, reason="fully_shard of torch 2.6 needs an accelerator")
@pytest.mark.slow
def test_a_network_in_shards_trains_on_a_bank_in_shards_as_in_one_process(folders):
    net = network()
    oracle = Oracle(LatentBank(samples()[0].flatten(1)), engine=Exact("float64"))
    train(net, oracle, [0, 1])
    plain = network()
    for got in (read(folders(2), "report", rank)["fsdp"] for rank in range(2)):
        for value, mine, before in zip(got, net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(value, mine.detach(), rtol=1e-9, atol=1e-10)
            assert (value - before).abs().max() > 1e-3


def test_says_what_makes_shards_no_parts_of_one_bank():
    x, labels = samples()
    parts = [x[:200], x[200:]]
    alone = [LatentBank(part, dtype=torch.bfloat16) for part in parts]
    alike = [LatentBank(part, dtype=torch.bfloat16, offset=x.mean(0)) for part in parts]
    copies = [LatentBank(part.clone()) for part in parts]
    cut = [LatentBank(x, labels, dtype=torch.bfloat16).part(slice(r, None, 2)) for r in (0, 1)]
    empty = [alike[0], EmptyShard(SHAPE, torch.bfloat16)]
    for banks, message in (
        (alone, "relative to different means.*offset="),
        (alike, None),
        (cut, None),
        (empty, None),
        (copies, None),
        ([LatentBank(x[:50]), copies[1]], r"a view of .* LatentBank\(x\[rows\].clone\(\)\)"),
    ):
        everyone = [About.of(bank, Exact(), None) for bank in banks]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_differences(everyone, banks[0])
        if message is None:
            assert not seen
        else:
            assert re.search(message, str(seen[0].message))


def test_ranks_agree_on_what_is_of_all(reports, world):
    for name in ("class-wise", "class-wise, empty"):
        ends = RUNS[name][0][world]
        banks = [shard(*pair, torch.float64) for pair in zip(ends[:-1], ends[1:], strict=True)]
        floors = [Exact().sigma_floor(bank) for bank in banks if len(bank)]
        assert {report[name]["floor"] for report in reports} == {max(floors)}
    # The last runs had an empty shard, which takes the norm of the others for its own.
    norms = [bank.max_norm or max(b.max_norm for b in banks) for bank in banks]
    assert [report["class-wise, empty"]["max_norm"] for report in reports] == norms


def test_nearest_rows_of_each_rank(reports, world):
    ends = EVEN[world]
    xt, t, _, _ = queries("none")
    parts, oracle = [], Oracle(shard(0, N, torch.float64), engine=Exact("float64"))
    floor = reports[0]["nearest"]["floor"]
    path = LinearPath()(t).floored(floor)
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        bank = shard(first, last, torch.float64)
        queries_here = Queries(xt.flatten(1), path, [bank.whole] * len(xt))
        parts.append(Nearest(**NEAREST).posterior(bank, queries_here, K))
    expected, exact = merge(*parts, k=K), oracle.posterior(xt, t, k=K)
    got = together(reports, "nearest")
    for field in ("log_evidence", "entropy", "ess", "weights", "tail_mass"):
        torch.testing.assert_close(
            got[field], getattr(expected, field), rtol=1e-11, atol=1e-11, msg=field
        )
    torch.testing.assert_close(got["mean"].flatten(1), expected.mean, rtol=1e-11, atol=1e-11)
    assert reports[0]["nearest"]["tail_kind"] == "measured"
    # Neither all nor nothing is left out, and what that does is within its bound.
    assert 1e-3 < got["tail_mass"].max() <= NEAREST["max_tail"]
    error = (got["mean"] - exact.mean).flatten(1).norm(dim=1)
    x, _ = samples()
    assert (error <= got["tail_mass"] * torch.pdist(x.flatten(1)).max() + 1e-11).all()
    torch.testing.assert_close(got["log_evidence"], exact.log_evidence, rtol=1e-6, atol=1e-6)


def test_tail_is_known_as_the_weakest_part_is(reports):
    assert {report["kind"][0] for report in reports} == {"bounded"}


def test_engines_get_sources_as_rows_of_their_own(reports, world):
    assert [report["kind"][1] for report in reports] == [
        [5, -1] * world,
        [-1, 7] * world,
        *[[-1, -1] * world] * (world - 2),
    ]


def test_traffic_is_as_documented(reports, world):
    header = (6, 6 * world)
    payload = (3 * (D + 7), 3 * (D + 7) * world)
    small = (3 * world * (6 + 4), 3 * world * (6 + 4) * world)
    mean = (3 * D * world, 3 * D)
    for report in reports:
        assert report["bytes"] == [header, payload, small, mean]


ERRORS = {
    "shape": "same shape on every rank, got (2, 3, 4) on rank 0; (24,) on rank 1",
    "dtype": "same dtype on every rank, got torch.float64 on rank 0; torch.bfloat16 on rank 1",
    "empty dtype": "same dtype on every rank, got torch.float64 on rank 0; torch.float32 on rank 1",
    "labels": "got no labels on rank 0; labels on rank 1",
    "engine": "same engine on every rank, got Exact on rank 0; Nearest on rank 1",
    "refused": "Expected `k` of at most 5, the rows of the bank, got 9",
    "no rows": "Expected rows on at least one rank",
    "k": "the same `k`, got 1 on rank 0; 2 on rank 1",
    "some labels": "the same `labels`, got given on rank 0; none on rank 1",
    "some sources": "the same `source`, got none on rank 0; given on rank 1",
    "bank": "the same bank, got 2 on rank 0; 1 on rank 1",
    "unknown class": "Class 99 is not in the bank of any rank",
    "no labels": "needs banks with labels",
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_rank_refuses_what_one_does(reports, world, name):
    errors = [report["errors"][name] for report in reports]
    assert len(set(errors)) == 1
    kind, message = errors[0]
    assert kind == "ValueError"
    # With four ranks it reads "on rank 0, 2, 3".
    said = message.replace("rank 0, 2, 3", "rank 0")
    assert ERRORS[name] in said
    assert ("rank 0, 2, 3" in message) == (world == 4 and "rank 0;" in said)


@pytest.mark.parametrize("name", ["no queries", "no say", "alike"])
def test_what_ranks_may_do_differently(reports, name):
    assert [report["errors"][name] for report in reports] == [None] * len(reports)


@pytest.mark.slow
def test_groups_of_ranks_are_apart(folders):
    x, _ = samples()
    reports = [read(folders(4), "report", rank) for rank in range(4)]
    for first in (0, 2):
        bank = LatentBank(x[100 * first : 100 * first + 200])
        oracle = Oracle(bank, engine=Exact("float64"))
        expected = oracle.posterior(x[:4], torch.full((4,), 0.2)).mean
        for report in reports[first : first + 2]:
            rows, mean, (kind, message) = report["subgroups"]
            assert rows == 200
            torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-11)
            assert kind == "ValueError"
            assert "that this rank belongs to" in message


@pytest.mark.parametrize(
    ("world", "call", "missing"),
    [(2, never_prepares, 1), (4, never_asks, 2), (4, ends, 3)],
)
@pytest.mark.slow
def test_a_rank_that_does_not_come_is_an_error_on_the_others(folders, world, call, missing):
    for rank in set(range(world)) - {missing}:
        kind, message = read(folders(world), call.__name__, rank)
        assert kind == "RuntimeError"
        assert "Expected every rank to ask the oracle, also with zero queries" in message
        assert "did not ask within 0:00:03" in message


class TwoRanks:
    """Stands for the other ranks: they say what this one does."""

    rank, size = 0, 2

    def gather(self, own):
        return torch.stack([own, own])

    def sum_own(self, blocks):
        return 2 * blocks[0]


@pytest.fixture
def agreed():
    """A prepared engine with its bank, in a job of which the test is rank 0 of 2."""
    engine, bank = Sharded(Exact("float32")), shard(0, 150, torch.float32)
    engine.prepare(bank)
    layout = engine._layouts[bank]
    engine._layouts[bank] = replace(layout, ranks=TwoRanks(), offsets=(0, 150, 300))
    return engine, bank


def test_merging_on_cuda(agreed, monkeypatch):
    # Fake tensors raise when devices are mixed or a value is read; the header is read on purpose.
    engine, bank = agreed
    header = Header([3, 3], 2, labels=False, source=True)
    monkeypatch.setattr(Header, "gather", lambda *_: header)
    monkeypatch.setattr(FakeTensor, "tolist", lambda value: [[0, 0, 4]] * len(value))
    with FakeTensorMode(allow_non_fake_inputs=True):
        xt = torch.randn(3, D, device="cuda", dtype=torch.float64)
        path = LinearPath()(torch.rand(3, device="cuda", dtype=torch.float64))
        source = torch.tensor([4, 200, -1], device="cuda")
        post = engine.posterior(bank, Queries(xt, path, (), source), 2)
        for field in FIELDS[:-1]:
            assert getattr(post, field).device.type == "cuda", field
        assert (post.mean.shape, post.rows.shape) == ((3, D), (3, 2))


def test_own_rows_on_cuda(agreed):
    engine, bank = agreed
    with FakeTensorMode(allow_non_fake_inputs=True):
        xt = torch.randn(4, D, device="cuda", dtype=torch.float64)
        path = LinearPath()(torch.rand(4, device="cuda", dtype=torch.float64))
        source = torch.tensor([200, 149, 0, -1], device="cuda")
        asked = Queries(xt, path, (), source, [3, None, 2, 1])
        layout = engine._layouts[bank]
        layout = replace(layout, own=frozenset({1, 3}))
        post, log_source = engine._over_own_rows(bank, asked, layout, 0, 2)
        assert post.mean.device.type == log_source.device.type == "cuda"
        assert pack(post, log_source).shape == (4, 6 + 2 * 2)


def test_where_a_backend_wants_its_tensors(monkeypatch):
    assert _device("cpu:gloo,cuda:gloo") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device("cpu:gloo,cuda:nccl") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device("cpu:gloo,cuda:nccl") == torch.device("cuda")
    assert _device("cuda:nccl") == torch.device("cuda")


def test_shard_rows():
    for count in range(2, 40):
        for world in range(1, 9):
            parts = [shard_rows(count, rank, world) for rank in range(world)]
            held = [row for part in parts for row in range(count)[part]]
            assert held == list(range(count))
            sizes = [part.stop - part.start for part in parts]
            some = [size for size in sizes if size]
            assert max(some) - min(some) <= 1
            assert min(some) >= 2
            assert len(some) == min(world, count // 2)
    with pytest.raises(ValueError, match="`num_rows` of at least 2, got 1"):
        shard_rows(1, 0, 1)
    with pytest.raises(ValueError, match="`rank` from 0 to 3, got 4"):
        shard_rows(10, 4, 4)


def packed(*parts, first=0):
    none = torch.full_like(parts[0].log_evidence, -torch.inf)
    return torch.stack([pack(part, none) for part in parts])


def test_an_empty_part_changes_nothing():
    bank, (xt, t, _, _) = shard(0, N, torch.float64), queries("none")
    asked = Queries(xt.flatten(1), LinearPath()(t), [bank.whole] * len(xt))
    post = Exact("float64").posterior(bank, asked, K)
    empty = Posterior.empty(post.mean, K)
    small = packed(empty, post, empty)
    assert torch.equal(shares(small), torch.tensor([0.0, 1, 0]).double()[:, None].expand(3, 50))
    got = combine(small)
    for field in ("log_evidence", "entropy", "weights", "tail_mass"):
        assert torch.equal(getattr(got, field), getattr(post, field)), field
    # Of equal weights any comes first.
    apart = post.weights.diff(dim=1).abs().amin(1) > 0
    assert apart.sum() > 20
    assert torch.equal(got.rows[apart], post.rows[apart])
    torch.testing.assert_close(got.ess, post.ess, rtol=1e-15, atol=0)


def test_parts_of_any_weight_are_put_together():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    part = Posterior.empty(zero, 3)

    def made(log_z, weights, rows):
        some = torch.tensor([weights]).double()
        return Posterior(
            **vars(part)
            | {
                "log_evidence": torch.tensor([log_z]).double(),
                "weights": some,
                "rows": torch.tensor([rows]),
                "entropy": torch.special.entr(some).sum(1),
                "ess": 1 / some.square().sum(1),
                "tail_mass": torch.tensor([0.25]).double(),
            }
        )

    # Equal parts; the third has a share of about 1e-13: it counts, but adds nothing to a mean.
    small = packed(
        made(-1e6, [0.75, 0.25, 0], [4, 5, -1]),
        made(-1e6, [1, 0, 0], [9, 8, -1]),
        made(-1e6 - 30, [1, 0, 0], [1, -1, -1]),
    )
    assert shares(small)[:, 0].tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-12)
    assert shares(small)[2] == 0
    got = combine(small)
    assert got.rows.tolist() == [[9, 4, 5]]
    assert got.weights[0].tolist() == pytest.approx([0.5, 0.375, 0.125], rel=1e-12)
    weights = torch.tensor([0.5, 0.375, 0.125], dtype=torch.float64)
    assert got.entropy.item() == pytest.approx(torch.special.entr(weights).sum().item(), abs=1e-11)
    assert got.ess.item() == pytest.approx(1 / weights.square().sum().item(), rel=1e-11)
    assert got.tail_mass.item() == pytest.approx(0.25, abs=1e-12)
    assert got.log_evidence.item() == pytest.approx(-1e6 + 0.6931471805599453, abs=1e-9)
    # All weight on one part: rows of weight 0 stand before those that are none.
    small = packed(
        made(0, [1, 0, 0], [4, -1, -1]),
        made(-1e6, [0.5, 0.5, 0], [9, 8, -1]),
    )
    got = combine(small)
    assert got.weights.tolist() == [[1, 0, 0]]
    assert got.rows[0, 0] == 4
    assert set(got.rows[0, 1:].tolist()) == {8, 9}


def test_without_other_ranks_it_is_the_inner_engine():
    x, labels = samples()
    bank = LatentBank(x, labels)
    xt, t, names, source = queries("some")
    inner, sharded = (Oracle(bank, engine=engine) for engine in (Exact(), Sharded()))
    for options in ({}, {"labels": names, "source": source, "k": 3}):
        one, other = (o.posterior(xt, t, **options) for o in (inner, sharded))
        for field in FIELDS:
            a, b = getattr(one, field), getattr(other, field)
            same = (
                a == b
                if not isinstance(a, torch.Tensor)
                else torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
            )
            assert same, field
    assert sharded.engine.offsets(bank) == (0, N)
    with pytest.raises(ValueError, match="Expected rows on at least one rank"):
        Oracle(EmptyShard(SHAPE), engine=Sharded())
    with pytest.raises(ValueError, match="Expected `k` of at most 401"):
        Oracle(bank, engine=Sharded(Nearest(402)))
    with pytest.raises(ValueError, match="that the ranks have agreed on"):
        Sharded().num_rows(bank)
    with pytest.raises(ValueError, match="positive `timeout`, got 0:00:00"):
        Sharded(timeout=timedelta(0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_has_to_be_prepared_anew(copied):
    bank = shard(0, N, torch.float64)
    engine = Sharded(Nearest(9), timeout=SHORT)
    engine.prepare(bank)
    twin = copied(engine)
    assert (twin.engine.k, twin.timeout, twin.group) == (9, SHORT, None)
    with pytest.raises(ValueError, match="that the ranks have agreed on"):
        twin.num_rows(bank)
    twin.prepare(bank)
    assert twin.num_rows(bank) == N


def test_an_empty_shard_is_a_bank():
    bank = EmptyShard(SHAPE, torch.bfloat16)
    assert (len(bank), bank.dim, bank.shape, bank.nbytes) == (0, D, SHAPE, 0)
    assert bank.classes == []
    assert bank.find(torch.zeros(3, *SHAPE)).tolist() == [-1, -1, -1]
    assert bank.take(torch.empty(0, dtype=torch.int64)).shape == (0, D)
    assert len(bank.fingerprint) == 32
    assert "0 rows of shape (2, 3, 4)" in repr(bank)


def start(made):
    """Runs groups of 2 and of 4 processes side by side; whether one of them failed."""
    children = []
    for count, number in ((2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)):
        (made / str(count)).mkdir(exist_ok=True)
        child = os.fork()
        if not child:
            try:
                main(made / str(count), count, number)
            finally:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    # A rank that failed leaves the others waiting for it.
    failed = False
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status and not failed:
            failed = True
            for child in children:
                os.kill(child, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    # Forked before torch has any threads: imports are most of the time of a process.
    sys.exit(start(Path(sys.argv[1])))


def test_a_certificate_is_refused_because_it_knows_one_rank_only():
    from stagewise import Certificate

    bank = LatentBank(torch.randn(20, 4))
    certificate = Certificate.compute(bank, progress=False)
    with pytest.raises(ValueError, match="leave it out with Sharded"):
        Oracle(bank, engine=Sharded(), certificate=certificate)
