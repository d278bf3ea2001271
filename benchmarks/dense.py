"""Cases over a whole bank: navigation, the nearest hundred, and few dimensions."""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from measure import Options, Result, Row, measure, ratio, row
from report import Report
from torch import Tensor

from stagewise import LatentBank, Oracle
from stagewise.engines import Auto, Engine, Exact, Nearest, TorchCluster
from stagewise.posterior import Posterior
from stagewise.products import full_precision, scores

DIM, QUERIES = 4096, 128


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

    few = slice(4)
    blas, onednn = "floor: float32 products, torch.matmul", "floor: float32 products, oneDNN"
    f32, bf16 = "Exact(), float32 bank", "Exact(rtol=1e-3), bfloat16 bank"
    rows = [
        Row(blas, peers.bare_products(x, xt, torch.float32)),
        Row(onednn, peers.bare_products(x, xt, torch.float32, onednn=True)),
        Row("floor: float64 products", peers.bare_products(x, xt, torch.float64)),
        Row("floor: bfloat16 products", peers.bare_products(x, xt, torch.bfloat16)),
        row(f32, asks(bank, Exact, xt, t), judge),
        row(bf16, asks(half, lambda: Exact(rtol=1e-3), xt, t), judge_half),
        row("Exact(), bfloat16 bank", asks(half, Exact, xt, t), judge_half),
        row('Exact("float64")', asks(bank, lambda: Exact("float64"), xt, t), judge),
        row("Nearest(100)", asks(bank, lambda: Nearest(100), xt, t), judge),
        row(
            "Nearest(100, draws=2000)",
            asks(bank, lambda: Nearest(100, draws=2000), xt, t),
            judge,
        ),
        row(
            "Nearest(100, max_tail=1e-3)",
            asks(bank, lambda: Nearest(100, max_tail=1e-3), xt, t),
            judge,
        ),
        Row("torch.cdist + softmax", lambda: peers.with_cdist(x, xt, t), judge, peer=True),
        Row(
            "closed-form FM, two passes",
            lambda: peers.with_two_passes(x, xt[few], t[few]),
            judged_by(mean[few]),
            queries=4,
            peer=True,
        ),
        Row("closed-form FM, optimised", lambda: peers.with_products(x, xt, t), judge, peer=True),
        row("faiss IndexFlatL2, top 100 + softmax", faiss, judge_found, peer=True),
        row("pykeops sumsoftmaxweight", lambda: peers.with_keops(x, xt, t), judge, peer=True),
    ]
    results = measure(rows, options.runs, base=onednn, queries=QUERIES)
    report.table("navigation", list(results.values()))
    for floor, how in ((blas, "torch.matmul's"), (onednn, "oneDNN's")):
        report.target(f"exact float32 / {how} float32 floor", ratio(results, f32, floor), 1.10)
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

    def judge(name: str, count: int) -> Callable[..., dict[str, float]]:
        def of(answer: Posterior | tuple[Tensor, Tensor]) -> dict[str, float]:
            if isinstance(answer, Posterior):
                answer = answer.mean, answer.rows
            found[name] = answer[1]
            return {"error": peers.relative(answer[0], true[:count])}

        return of

    def agreement(results: dict[str, Result], ours: str, theirs: str, count: int) -> None:
        if ours not in found or theirs not in found:
            return
        same = peers.same_neighbours(x, xt[:count], t[:count], found[ours], found[theirs])
        report.note(
            f"{theirs}: {same['identical']:.1%} of the sets identical, {same['ties']:.1%} more up "
            f"to ties (1e-5); largest relative difference {same['gap']:.1e}"
        )
        results[theirs].more = same
        report.target("sets equal up to ties", same["identical"] + same["ties"], 1, most=False)

    def floor(count: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with full_precision():
                return scores(xt[:count].double(), x)

        return run

    for count, theirs, make in (
        (QUERIES, "faiss IndexFlatL2", peers.with_faiss),
        (QUERIES, "torch_cluster.knn", peers.with_torch_cluster),
    ):
        q, time = xt[:count], t[:count]

        def peer(q=q, time=time, make=make) -> Callable[[], tuple[Tensor, Tensor]]:
            search = make(x, 100)
            return lambda: search(q, time)

        ours, base = "Nearest(100)", "floor: one float32 product"
        rows = [
            Row(base, floor(count)),
            row(
                ours,
                asks(bank, lambda: Nearest(100), q, time, k=100),
                judge(ours, count),
            ),
            row(f"{theirs}, gather, softmax", peer, judge(theirs, count), peer=True),
        ]
        results = measure(rows, options.runs, base=base, queries=count)
        # Under the short name too, for the findings.
        named = {**results, theirs: results[rows[2].name]}
        report.table(f"B={count}", list(results.values()))
        agreement(named, ours, theirs, count)
        wanted = 1.3 if make is peers.with_faiss else 100
        report.target(
            f"{theirs} / Nearest(100)", ratio(results, rows[2].name, ours), wanted, most=False
        )
    report.note("error: against the float64 mean over the true nearest hundred")
    return report


def low_dim(options: Options) -> Report:
    """Points in space, where a tree beats a product for queries near the data."""
    n, dim = options.rows(100_000), 3
    x, _, t, xt = peers.gaussian(n, dim, QUERIES, 1.0, seed=2)
    t = t.clamp_max(0.999)
    report = Report("low-dim", f"N={n}, D={dim}, B={QUERIES}, t~U(0, 1)").start()
    bank = LatentBank(x)
    judge = judged_by(peers.reference(x, xt, t)[0])
    base = "floor: float32 products, oneDNN"
    rows = [
        Row(base, peers.bare_products(x, xt, torch.float32, onednn=True)),
        row("Exact()", asks(bank, Exact, xt, t), judge),
        row("Nearest(100)", asks(bank, lambda: Nearest(100), xt, t), judge),
        row(
            "TorchCluster(100, max_tail=1e-7)",
            asks(bank, lambda: TorchCluster(100, max_tail=1e-7), xt, t),
            judge,
        ),
        row("Auto()", asks(bank, Auto, xt, t), judge),
    ]
    results = measure(rows, options.runs, base=base, queries=QUERIES)
    report.table("low-dim", list(results.values()))
    whole = [r for r in results.values() if r.tail is not None and r.tail <= 1e-6]
    times = {r.name: r.milliseconds for r in whole if r.name != "Auto()"}
    fastest = min(times, key=times.__getitem__, default=None)
    if fastest:
        report.note(f"fastest that misses nothing: {fastest}")
        reached = ratio(results, "Auto()", fastest)
        report.target(f"Auto() / {fastest}", reached, 1.10)
    return report
