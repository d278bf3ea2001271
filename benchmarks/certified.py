"""The certificate: how many rows a training step need not look at, and that nothing is lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import Options, measure, ratio, row
from report import Report
from torch import Tensor

from stagewise import LatentBank, LinearPath, Oracle
from stagewise.engines import Exact

ETA, DELTA = 1e-3, 1e-6
QUERIES, BATCH, TIMED = 10_000, 500, 128


def certificate(options: Options) -> Report:
    """Training mix t ~ U(0, 1) on clusters and on photographs."""
    report = Report(
        "certificate", f"t~U(0, 1), eta={ETA:g}, delta={DELTA:g}, timed with B={TIMED}"
    ).start()
    lines: list[dict[str, Any]] = []
    bank = LatentBank(clusters(options.rows(20_000), 4096, 200))
    lines += of_bank(report, "clusters", bank, [False], options)
    del bank
    photos = photo_bank(options)
    if isinstance(photos, str):
        report.note(f"photographs: skipped, {photos}")
    else:
        lines += of_bank(report, "photographs", photos, [False, True], options)
    report.plain("rows touched, and what is lost", lines)
    for line in lines:
        if line["bank"] == "clusters":
            report.target(
                f"rows touched without / with it, clusters, K={line['K']}",
                line["factor"],
                5,
                most=False,
            )
    for line in lines:
        missed = line["missed"]
        report.target(f"mass missed, {line['bank']}, K={line['K']}", missed, ETA)
    report.note("missed: the largest true posterior mass that a certified answer lacks;")
    report.note("mean off: the largest error of its mean, relative to the diameter of the rows")
    return report


def clusters(n: int, dim: int, count: int) -> Tensor:
    """Unit variance, about half of it within clusters: near rows are some 60 apart, as latents."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, dim, generator=generator)
    centres = torch.randn(count, dim, generator=generator)
    within = 0.3 + 0.4 * torch.rand(count, 1, generator=generator)
    member = torch.arange(n) % count
    return x.mul_(within[member].sqrt()).add_(((1 - within).sqrt() * centres)[member])


def photo_bank(options: Options) -> LatentBank | str:
    """The patches of the recipe, or why there are none."""
    try:
        from stagewise.recipes.photos import PhotoPatches

        data = PhotoPatches(train_size=options.rows(20_000))
        data.setup()
    except ModuleNotFoundError as error:
        return str(error).split("\n")[0]
    return LatentBank(*data.train.tensors)


def of_bank(
    report: Report, name: str, bank: LatentBank, scopes: list[bool], options: Options
) -> list[dict[str, Any]]:
    """Lines of the table for one bank: whole and class-wise, K = 0 and 100."""
    from stagewise.certificate import Certificate

    lines = []
    for wise in scopes:
        start = time.perf_counter()
        wide = Certificate.compute(bank, neighbours=100, class_wise=wise, progress=False)
        seconds = time.perf_counter() - start
        where = f"{name}{', class-wise' if wise else ''}"
        nearest = float(wide.rows.distances[:, 0].median())
        report.note(
            f"{where}: {len(bank)} x {bank.dim}, median distance to the nearest row {nearest:.3g}; "
            f"certificate computed in {seconds:.1f} s"
        )
        narrow = replace(
            wide, rows=wide.rows._replace(neighbours=wide.rows.neighbours[:, :0]), _moved={}
        )
        timed = timings(bank, {0: narrow, 100: wide}, wise, options)
        report.table(f"{where}: a batch of {TIMED}", list(timed.values()))
        for k, line in verify(bank, {0: narrow, 100: wide}, wise, options).items():
            speed = ratio(timed, "without", f"K={k}")
            lines.append({"bank": where, "K": k, **line, "speed-up": speed})
    return lines


def timings(bank: LatentBank, certificates: dict[int, Any], wise: bool, options: Options) -> Any:
    """Time of a batch with and without, over batches that are the same for all rows."""
    batches = list(itertools.islice(mix(bank, TIMED, wise, 6), options.runs + 2))

    def maker(**settings: Any) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            oracle = Oracle(bank, engine=Exact(), **settings)
            turn = itertools.cycle(batches)

            def run() -> Any:
                xt, t, source, labels = next(turn)
                return oracle.posterior(xt, t, labels, source=source)

            return run

        return make

    rows = [row("without", maker())]
    for k, made in certificates.items():
        rows.append(row(f"K={k}", maker(certificate=made, eta=ETA, delta=DELTA)))
    return measure(rows, options.runs, base="without")


def verify(
    bank: LatentBank, certificates: dict[int, Any], wise: bool, options: Options
) -> dict[int, dict[str, Any]]:
    """Rows touched, and every certified answer against the full engine.

    The certificate with the most neighbours certifies what the others do, so those queries that it
    does not are not asked: without an exact answer there is nothing to compare.
    """
    exact = Oracle(bank, engine=Exact())
    oracles = {
        k: Oracle(bank, engine=Exact(), certificate=made, eta=ETA, delta=DELTA)
        for k, made in certificates.items()
    }
    most = max(certificates)
    count = max(BATCH, round(QUERIES * options.scale))
    sums = {k: {"certified": 0, "with": 0, "missed": 0.0, "off": 0.0} for k in certificates}
    without = asked = 0
    for xt, t, source, labels in itertools.islice(mix(bank, BATCH, wise, 7), count // BATCH):
        asked += len(t)
        names = [None] * len(t) if labels is None else labels
        segments = [bank.whole if name is None else bank.segment(name) for name in names]
        sizes = torch.tensor([segment.stop - segment.start for segment in segments])
        without += int(sizes.sum())
        path, looked = LinearPath()(t.double()), {}
        for k, made in certificates.items():
            settings = {"eta": ETA, "delta": DELTA}
            alone = made.certified(path, source, sizes, **settings)
            either = alone | made.certified(path, source, sizes, neighbours=k > 0, **settings)
            looked[k] = torch.where(alone, 1, torch.where(either, k + 1, 0))
            sums[k]["with"] += int(torch.where(either, looked[k], sizes).sum())
            sums[k]["certified"] += int(either.sum())
        some = looked[most].nonzero()[:, 0]
        if not len(some):
            continue
        own = [names[i] for i in some.tolist()] if wise else None
        full = exact.posterior(xt[some], t[some], own, source=source[some])
        for k, oracle in oracles.items():
            at = looked[k][some].nonzero()[:, 0]
            if not len(at):
                continue
            here = some[at]
            own = [names[i] for i in here.tolist()] if wise else None
            post = oracle.posterior(xt[here], t[here], own, source=source[here])
            if post.tail_kind != "bounded":
                raise RuntimeError("a query that `certified` names was answered by the engine")
            mass = full.source_weight[at] * (
                1 + certificates[k].rows.copies[source[here], int(wise)]
            )
            wide = (looked[k][here] > 1).nonzero()[:, 0]
            for part in wide.split(64) if len(wide) else ():
                near = certificates[k].rows.neighbours[source[here[part]]].long()
                evidence = full.log_evidence[at[part]]
                log = log_weights(bank, near, xt[here[part]], t[here[part]]) - evidence[:, None]
                inside = torch.tensor(
                    [(s.start, s.stop) for s in (segments[i] for i in here[part])]
                )
                outside = (near < inside[:, :1]) | (near >= inside[:, 1:])
                mass[part] += log.exp().masked_fill(outside, 0).sum(1)
            off = (post.mean - full.mean[at]).flatten(1).norm(dim=1) / (2 * bank.radius)
            sums[k]["missed"] = max(sums[k]["missed"], float((1 - mass).max()))
            sums[k]["off"] = max(sums[k]["off"], float(off.max()))
    return {
        k: {
            "queries": asked,
            "certified": value["certified"] / asked,
            "rows without": without / asked,
            "rows with": value["with"] / asked,
            "factor": without / value["with"],
            "missed": value["missed"],
            "mean off": value["off"],
        }
        for k, value in sums.items()
    }


def mix(bank: LatentBank, size: int, wise: bool, seed: int) -> Any:
    """Batches of queries as training makes them: noisy samples, times, sources, labels."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        source = torch.randint(len(bank), (size,), generator=generator)
        t = torch.rand(size, generator=generator)
        x0 = torch.randn(size, *bank.shape, generator=generator)
        x1 = bank.take(source).float().reshape(x0.shape)
        labels = bank.labels_of(source.tolist()) if wise else None
        yield LinearPath().interpolate(x0, x1, t), t, source, labels


def log_weights(bank: LatentBank, rows: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """`-||x_t - t x||^2 / 2 (1 - t)^2` (B, n) for some rows (B, n) of each query."""
    t = t.double()[:, None]
    gap = xt.double().flatten(1)[:, None] - t[:, :, None] * bank.take(rows.clamp_min(0))
    return -gap.square().sum(2) / (2 * (1 - t) ** 2)
