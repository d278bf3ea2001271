"""The oracle against its floors, its peers and its targets.

`make bench` runs it: one table for each case, and with `--json FILE` the same as JSON. A case with
its options is `--only navigation,top100`; `--scale 0.1` is a quick look at a tenth of the rows.

All rows of a table are timed in one process, in turn, on the same inputs. Columns: the median time
of at least 7 runs after a warm-up (fewer, and it is said, where a run takes seconds), its ratio to
that of the floor, the error of the posterior mean against explicit differences in float64 (the
largest over the queries, relative), the largest tail mass, and the peak of memory beyond the
inputs. Times are of this machine; ratios of one run travel better. The bank of the size of ImageNet
has a script of its own, imagenet.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from unittest.mock import patch

import peers
import torch
import training
from certificate import certificate
from measure import Options, Report, Result, Row, engine, measure, ratio, row, run_cases
from torch import Tensor

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Engine
from stagewise.memory import available_memory
from stagewise.posterior import Posterior
from stagewise.products import full_precision, scores

DIM, QUERIES = 4096, 128
CLASS_ROWS = 1300
BLAS, ONEDNN = "floor: float32 products, torch.matmul", "floor: float32 products, oneDNN"


def asks(
    bank: LatentBank, make: Callable[[], Engine], xt: Tensor, t: Tensor, k: int = 1
) -> Callable[[], Callable[[], Posterior]]:
    """A row's maker: the posterior of `xt` by an engine that may be missing."""

    def build() -> Callable[[], Posterior]:
        oracle = Oracle(bank, engine=make())
        return lambda: oracle.posterior(xt, t, k=k)

    return build


def judged_by(mean: Tensor) -> Callable[[Posterior | Tensor], dict[str, float]]:
    """Error of a posterior, or of a plain mean, against a float64 one."""

    def judge(answer: Posterior | Tensor) -> dict[str, float]:
        if isinstance(answer, Posterior):
            tail = float(answer.tail_mass.max())
            return {"error": peers.relative(answer.mean, mean), "tail": tail}
        return {"error": peers.relative(answer, mean)}

    return judge


def navigation(options: Options) -> Report:
    """Where the whole mass is needed."""
    n = options.rows(20_000)
    x, _, t, xt = peers.gaussian(n, DIM, QUERIES, 0.1)
    report = Report(
        "navigation", f"N={n}, D={DIM}, B={QUERIES}, t~U(0, 0.1), unit-Gaussian rows"
    ).start()
    bank, half = LatentBank(x), LatentBank(x, dtype=torch.bfloat16)
    mean, gamma = peers.reference(x, xt, t)
    stored = half.take(torch.arange(n))
    judge, judge_half = judged_by(mean), judged_by(peers.reference(stored, xt, t)[0])
    del stored

    def judge_found(answer: tuple[Tensor, Tensor]) -> dict[str, float]:
        found, near = answer
        tail = float((1 - gamma.gather(1, near).sum(1)).max())
        return {"error": peers.relative(found, mean), "tail": tail}

    def faiss() -> Callable[[], tuple[Tensor, Tensor]]:
        search = peers.with_faiss(x, 100)
        return lambda: search(xt, t)

    def ours(name: str, of: LatentBank = bank, *args, **kwargs) -> Row:
        label = name if of is bank else f"{name}, bfloat16 bank"
        make = asks(of, lambda: engine(name.split("(")[0], *args, **kwargs), xt, t)
        return row(label, make, judge if of is bank else judge_half)

    few = slice(4)
    two_passes = Row(
        "closed-form FM, two passes",
        lambda: peers.with_two_passes(x, xt[few], t[few]),
        judged_by(mean[few]),
        queries=4,
        peer=True,
    )
    rows = [
        Row(BLAS, peers.bare_products(x, xt, torch.float32)),
        Row(ONEDNN, peers.bare_products(x, xt, torch.float32, onednn=True)),
        Row("floor: float64 products", peers.bare_products(x, xt, torch.float64)),
        Row("floor: bfloat16 products", peers.bare_products(x, xt, torch.bfloat16)),
        ours("Exact()"),
        ours("Exact(rtol=1e-3)", half, rtol=1e-3),
        ours("Exact()", half),
        ours('Exact("float64")', bank, "float64"),
        ours("Nearest(100)", bank, 100),
        ours("Nearest(100, draws=2000)", bank, 100, draws=2000),
        ours("Nearest(100, max_tail=1e-3)", bank, 100, max_tail=1e-3),
        Row("torch.cdist + softmax", lambda: peers.with_cdist(x, xt, t), judge, peer=True),
        two_passes,
        Row("closed-form FM, optimised", lambda: peers.with_products(x, xt, t), judge, peer=True),
        row("faiss IndexFlatL2, top 100 + softmax", faiss, judge_found, peer=True),
        row("pykeops sumsoftmaxweight", lambda: peers.with_keops(x, xt, t), judge, peer=True),
    ]
    results = measure(rows, options.runs, base=ONEDNN, queries=QUERIES)
    report.table("navigation", list(results.values()))
    bf16 = "Exact(rtol=1e-3), bfloat16 bank"
    for floor, how in ((BLAS, "torch.matmul's"), (ONEDNN, "oneDNN's")):
        report.target(
            f"exact float32 / {how} float32 floor", ratio(results, "Exact()", floor), 1.10
        )
        report.target(f"bf16 bank / {how} float32 floor", ratio(results, bf16, floor), 0.60)
    report.target("error with the bf16 bank", results[bf16].error, 2e-3)
    report.note("ratio: to the float32 products through oneDNN, the faster floor on x86")
    return report


def top100(options: Options) -> Report:
    """The nearest hundred with exact weights."""
    n = options.rows(20_000)
    x, _, t, xt = peers.gaussian(n, DIM, QUERIES, 0.1, seed=1)
    report = Report("top100", f"N={n}, D={DIM}, t~U(0, 0.1): neighbours and exact weights").start()
    bank = LatentBank(x)
    best = peers.log_weights(x, xt, t).topk(100, dim=1)
    gamma = torch.softmax(best.values, 1)
    means = [g @ x[rows].double() for g, rows in zip(gamma, best.indices, strict=True)]
    true = torch.stack(means)
    found: dict[str, Tensor] = {}

    def judge(name: str) -> Callable[..., dict[str, float]]:
        def of(answer: Posterior | tuple[Tensor, Tensor]) -> dict[str, float]:
            if isinstance(answer, Posterior):
                answer = answer.mean, answer.rows
            found[name] = answer[1]
            return {"error": peers.relative(answer[0], true)}

        return of

    def peer(make: Callable[..., peers.Search]) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            search = make(x, 100)
            return lambda: search(xt, t)

        return build

    def floor() -> Tensor:
        with full_precision():
            return scores(xt.double(), x)

    mine, base = "Nearest(100)", "floor: one float32 product"
    theirs = {"faiss IndexFlatL2": peers.with_faiss, "torch_cluster.knn": peers.with_torch_cluster}
    rows = [Row(base, floor)]
    rows.append(row(mine, asks(bank, lambda: engine("Nearest", 100), xt, t, k=100), judge(mine)))
    rows += [row(name, peer(make), judge(name), peer=True) for name, make in theirs.items()]
    results = measure(rows, options.runs, base=base, queries=QUERIES)
    columns: list[str] = []
    for name in theirs:
        if mine in found and name in found:
            same = peers.same_neighbours(x, xt, t, found[mine], found[name])
            results[name].more, columns = same, list(same)
            report.target(
                f"sets equal up to ties, {name}", same["identical"] + same["ties"], 1, most=False
            )
        wanted = 1.3 if name.startswith("faiss") else 100
        report.target(f"{name} / {mine}", ratio(results, name, mine), wanted, most=False)
    report.table(f"B={QUERIES}", list(results.values()), columns)
    report.note("error: against the float64 mean over the true nearest hundred; gap: the largest")
    report.note("relative difference of distances among rows that one of both did not find")
    return report


def low_dim(options: Options) -> Report:
    """Points in space, where a tree beats a product for queries near the data."""
    n, dim = options.rows(100_000), 3
    x, _, t, xt = peers.gaussian(n, dim, QUERIES, 1.0, seed=2)
    t = t.clamp_max(0.999)
    report = Report("low-dim", f"N={n}, D={dim}, B={QUERIES}, t~U(0, 1)").start()
    bank, judge = LatentBank(x), judged_by(peers.reference(x, xt, t)[0])
    engines = {
        "Exact()": lambda: engine("Exact"),
        "Nearest(100)": lambda: engine("Nearest", 100),
        "TorchCluster(100, max_tail=1e-7)": lambda: engine("TorchCluster", 100, max_tail=1e-7),
        "Auto()": lambda: engine("Auto"),
    }
    rows = [Row(ONEDNN, peers.bare_products(x, xt, torch.float32, onednn=True))]
    rows += [row(name, asks(bank, make, xt, t), judge) for name, make in engines.items()]
    results = measure(rows, options.runs, base=ONEDNN, queries=QUERIES)
    report.table("low-dim", list(results.values()))
    whole = [r for r in results.values() if r.tail is not None and r.tail <= 1e-6]
    times = {r.name: r.milliseconds for r in whole if r.name != "Auto()"}
    if times:
        fastest = min(times, key=times.__getitem__)
        report.target(
            f"Auto() / {fastest}, which misses nothing", ratio(results, "Auto()", fastest), 1.10
        )
    return report


def class_wise(options: Options) -> Report:
    """One query for each class: reading the rows is all there is to do."""
    classes = max(4, round(100 * options.scale))
    n = classes * CLASS_ROWS
    report = Report("class-wise", f"{classes} classes x {CLASS_ROWS} rows, D={DIM}, a query each")
    report.start()
    need, have = 3.5 * n * DIM * 4, available_memory()
    if have is not None and have < need:
        report.note(f"skipped: needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} are available")
        return report
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, DIM, generator=generator)
    labels = torch.arange(classes).repeat_interleave(CLASS_ROWS)
    banks = {kind: LatentBank(x, labels, dtype=kind) for kind in (torch.float32, torch.bfloat16)}
    del x
    wide = banks[torch.float32]
    source = torch.arange(classes) * CLASS_ROWS
    source += torch.randint(CLASS_ROWS, (classes,), generator=generator)
    names, vector = list(range(classes)), torch.randn(DIM, generator=generator)
    flat = wide.rows.flatten()
    blocks, weights = flat.view(classes, CLASS_ROWS, DIM), torch.rand(classes, 1, CLASS_ROWS)
    reads = {
        "read: sum": lambda: flat.sum(),
        "read: dot product": lambda: torch.dot(flat, flat),
        "read: rows x vector": lambda: torch.mv(wide.rows, vector),
        "read: weights x rows": lambda: torch.bmm(weights, blocks),
    }
    rows = [Row(name, run) for name, run in reads.items()]
    asked: dict[str, tuple[LatentBank, float]] = {}  # and how often the bank was read
    for t_max in (0.1, 1.0):
        t = 0.001 + (t_max - 0.002) * torch.rand(classes, generator=generator)
        x0 = torch.randn(classes, DIM, generator=generator)
        for kind, bank in banks.items():
            xt = LinearPath().interpolate(x0, bank.take(source).float(), t)

            def make(bank=bank, xt=xt, t=t):
                oracle = Oracle(bank, engine=engine("Exact"))
                return lambda: oracle.posterior(xt, t, names)

            def judge(post, bank=bank, xt=xt, t=t) -> dict[str, float]:
                # A few classes: the explicit differences of all would take longer than the case.
                errors = []
                for i in range(0, classes, max(1, classes // 8)):
                    segment, one = bank.segment(i), slice(i, i + 1)
                    own = bank.take(torch.arange(segment.start, segment.stop))
                    true = peers.reference(own, xt[one], t[one])[0]
                    errors.append(peers.relative(post.mean[one], true))
                return {"error": max(errors), "tail": float(post.tail_mass.max())}

            name = f"Exact(), {str(kind)[6:]}, t~U(0, {t_max:g})"
            rows.append(row(name, make, judge))
            asked[name] = bank, _bytes_read(make) / bank.nbytes
    results = measure(rows, options.runs)
    timed = [results[name] for name in reads if results[name].milliseconds is not None]
    fastest: Result = min(timed, key=lambda result: result.milliseconds)
    bandwidth = wide.nbytes / fastest.milliseconds  # bytes per ms
    for name, (bank, passes) in asked.items():
        if results[name].milliseconds is not None:
            share = bank.nbytes / bandwidth / results[name].milliseconds
            results[name].ratio = 1 / share
            results[name].more = {"share": share, "passes": passes, "of passes": share * passes}
    report.table("class-wise", list(results.values()), ["share", "passes", "of passes"])
    report.note(f"bandwidth: {bandwidth / 1e6:.1f} GB/s, '{fastest.name}'")
    report.note("ratio: to the bytes of all rows, read once, over the bandwidth; share: 1 / ratio")
    report.note("passes: how often rows were read, for queries in navigation twice: share x passes")
    for name in asked:
        value = results[name].more.get("of passes")
        report.target(f"bytes read, share of the bandwidth, {name}", value, 0.6, False)
    return report


def _bytes_read(make: Callable[[], Callable[[], object]]) -> int:
    """Of the bank, by one call of what `make` makes."""
    count, chunks = 0, LatentBank.chunks

    def counted(bank: LatentBank, *args, **kwargs) -> Iterator[tuple[int, Tensor]]:
        nonlocal count
        for first, rows in chunks(bank, *args, **kwargs):
            count += rows.numel() * bank.rows.element_size()
            yield first, rows

    with patch.object(LatentBank, "chunks", counted):
        make()()
    return count


CASES = {
    "navigation": navigation,
    "top100": top100,
    "low-dim": low_dim,
    "certificate": certificate,
    "class-wise": class_wise,
    "training": training.photos,
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, str(__doc__)))
