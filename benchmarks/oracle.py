"""The oracle against its floors, its peers and its targets.

`make bench` runs it: a table for each case, and with `--json FILE` the same as JSON. Some cases are
`--only navigation,top100`; `--scale 0.1` is a quick look at a tenth of the rows.

All rows of a table are timed in one process, in turn, on the same inputs. Columns: the median time
after a warm-up, its ratio to that of the floor, the error of the posterior mean against explicit
differences in float64 (the largest over the queries, relative), and the largest tail mass. Times
are of this machine; ratios of one run travel better. A bank of the size of ImageNet is in
imagenet.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import peers
import torch
import training
from certificate import certificate
from measure import Judge, Options, Report, Row, measure, ratio, row, run_cases
from torch import Tensor

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Engine, Exact, Nearest
from stagewise.memory import available_memory
from stagewise.posterior import Posterior
from stagewise.products import full_precision, scores

DIM, QUERIES = 4096, 128
CLASS_ROWS = 1300
BLAS, ONEDNN = "floor: float32 products, torch.matmul", "floor: float32 products, oneDNN"


def judged_by(mean: Tensor) -> Judge:
    """Error of a posterior, or of a plain mean, against a float64 one."""

    def judge(answer: Posterior | Tensor) -> dict[str, float]:
        if isinstance(answer, Posterior):
            error = peers.relative(answer.mean, mean)
            return {"error": error, "tail": float(answer.tail_mass.max())}
        return {"error": peers.relative(answer, mean)}

    return judge


def navigation(options: Options) -> Report:
    """Where the whole mass is needed."""
    n = options.rows(20_000)
    x, _, t, xt = peers.gaussian(n, DIM, QUERIES, 0.1)
    about = f"N={n}, D={DIM}, B={QUERIES}, t~U(0, 0.1), unit-Gaussian rows"
    report = Report("navigation", about)
    bank, half = LatentBank(x), LatentBank(x, dtype=torch.bfloat16)
    mean, gamma = peers.reference(x, xt, t)
    judge = judged_by(mean)
    judge_half = judged_by(peers.reference(half.take(torch.arange(n)), xt, t)[0])

    def judge_found(answer: tuple[Tensor, Tensor]) -> dict[str, float]:
        found, near = answer
        tail = float((1 - gamma.gather(1, near).sum(1)).max())
        return {"error": peers.relative(found, mean), "tail": tail}

    def ours(name: str, engine: Engine, of: LatentBank = bank) -> Row:
        oracle = Oracle(of, engine=engine)
        return Row(name, lambda: oracle.posterior(xt, t), judge if of is bank else judge_half)

    exact = ours("Exact()", Exact())
    bf16 = ours("Exact(rtol=1e-3), bfloat16 bank", Exact(rtol=1e-3), half)
    rows = [
        Row(BLAS, peers.bare_products(x, xt, torch.float32)),
        Row(ONEDNN, peers.bare_products(x, xt, torch.float32, onednn=True)),
        Row("floor: bfloat16 products", peers.bare_products(x, xt, torch.bfloat16)),
        *(exact, bf16, ours("Exact(), bfloat16 bank", Exact(), half)),
        *(ours('Exact("float64")', Exact("float64")), ours("Nearest(100)", Nearest(100))),
        Row("torch.cdist + softmax", lambda: peers.with_cdist(x, xt, t), judge, peer=True),
        Row("expanded distances", lambda: peers.with_products(x, xt, t), judge, peer=True),
        row("faiss, top 100", lambda: peers.with_faiss(x, xt, t, 100), judge_found, peer=True),
        row("pykeops sumsoftmaxweight", lambda: peers.with_keops(x, xt, t), judge, peer=True),
    ]
    results = measure(rows, options.runs, base=ONEDNN)
    report.results("navigation", results)
    for floor, how in ((BLAS, "torch.matmul's"), (ONEDNN, "oneDNN's")):
        share = ratio(results, exact.name, floor)
        report.target(f"exact float32 / {how} float32 floor", share, 1.10)
        report.target(f"bf16 bank / {how} float32 floor", ratio(results, bf16.name, floor), 0.60)
    report.target("error with the bf16 bank", results[bf16.name].columns.get("error"), 2e-3)
    report.note("ratio: to the float32 products by oneDNN, the faster floor on x86")
    return report


def top100(options: Options) -> Report:
    """The nearest hundred with exact weights."""
    n = options.rows(20_000)
    x, _, t, xt = peers.gaussian(n, DIM, QUERIES, 0.1, seed=1)
    report = Report("top100", f"N={n}, D={DIM}, t~U(0, 0.1): neighbours and exact weights")
    best = peers.log_weights(x, xt, t).topk(100, dim=1)
    gamma = torch.softmax(best.values, 1)
    means = [g @ x[rows].double() for g, rows in zip(gamma, best.indices, strict=True)]
    true = torch.stack(means)
    found: dict[str, Tensor] = {}

    def judge(name: str) -> Judge:
        def of(answer: tuple[Tensor, Tensor]) -> dict[str, float]:
            mean, found[name] = answer
            return {"error": peers.relative(mean, true)}

        return of

    def floor() -> Tensor:
        with full_precision():
            return scores(xt.double(), x)

    oracle = Oracle(LatentBank(x), engine=Nearest(100))

    def nearest() -> tuple[Tensor, Tensor]:
        post = oracle.posterior(xt, t, k=100)
        return post.mean, post.rows

    mine, base = "Nearest(100)", "floor: one float32 product"
    theirs = {"faiss IndexFlatL2": peers.with_faiss, "torch_cluster.knn": peers.with_torch_cluster}
    rows = [Row(base, floor), Row(mine, nearest, judge(mine))]
    for name, search in theirs.items():
        rows.append(row(name, partial(search, x, xt, t, 100), judge(name), peer=True))
    results = measure(rows, options.runs, base=base)
    for name in found.keys() & theirs:
        pairs = list(zip(found[mine].tolist(), found[name].tolist(), strict=True))
        same = sum(set(a) == set(b) for a, b in pairs) / len(pairs)
        results[name].columns["same sets"] = same
    for name in theirs:
        wanted = 1.3 if name.startswith("faiss") else 100
        report.target(f"{name} / {mine}", ratio(results, name, mine), wanted, most=False)
    report.results(f"B={QUERIES}", results)
    report.note("error: against the float64 mean over the true nearest hundred")
    return report


def class_wise(options: Options) -> Report:
    """One query for each class: reading the rows is all there is to do."""
    classes = max(4, round(100 * options.scale))
    n = classes * CLASS_ROWS
    about = f"{classes} classes x {CLASS_ROWS} rows, D={DIM}, a query each"
    report = Report("class-wise", about)
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
    reads = [
        Row("read: sum", lambda: wide.rows.sum()),
        Row("read: rows x vector", lambda: torch.mv(wide.rows, vector)),
    ]
    rows, asked = list(reads), {}
    for t_max in (0.1, 1.0):
        t = 0.001 + (t_max - 0.002) * torch.rand(classes, generator=generator)
        x0 = torch.randn(classes, DIM, generator=generator)
        for kind, bank in banks.items():
            xt = LinearPath().interpolate(x0, bank.take(source).float(), t)
            oracle = Oracle(bank, engine=Exact())

            def ask(oracle: Oracle = oracle, xt: Tensor = xt, t: Tensor = t) -> Posterior:
                return oracle.posterior(xt, t, names)

            name = f"Exact(), {str(kind)[6:]}, t~U(0, {t_max:g})"
            rows.append(Row(name, ask))
            asked[name] = bank, _bytes_read(ask) / bank.nbytes
    results = measure(rows, options.runs)
    reading = min(results[each.name].milliseconds or torch.inf for each in reads)
    for name, (bank, passes) in asked.items():
        if (spent := results[name].milliseconds) is not None:
            share = bank.nbytes / wide.nbytes * reading / spent
            more = {"share": share, "passes": passes, "of passes": share * passes}
            results[name].columns |= more
    report.results("class-wise", results)
    report.note(f"bandwidth: {wide.nbytes / reading / 1e6:.1f} GB/s, of the faster read")
    report.note("share: the time in which all rows are read once, over that of the row")
    report.note("passes: how often rows were read, for queries in navigation twice: share x passes")
    for name in asked:
        value = results[name].columns.get("of passes")
        report.target(f"bytes read, share of the bandwidth, {name}", value, 0.6, most=False)
    return report


def _bytes_read(ask: Callable[[], object]) -> int:
    """Of the bank, by one call."""
    count, chunks = 0, LatentBank.chunks

    def counted(bank: LatentBank, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Tensor]]:
        nonlocal count
        for first, rows in chunks(bank, *args, **kwargs):
            count += rows.numel() * bank.rows.element_size()
            yield first, rows

    with patch.object(LatentBank, "chunks", counted):
        ask()
    return count


CASES = {
    "navigation": navigation,
    "top100": top100,
    "certificate": certificate,
    "class-wise": class_wise,
    "training": training.photos,
}

if __name__ == "__main__":
    sys.exit(run_cases(CASES, str(__doc__)))
